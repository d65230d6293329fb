# Everything from a bare clone: each target makes the environment in .venv when it is missing or out of date.

VENV ?= .venv
PYTHON ?=
JOBS ?= auto
PYTEST_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Several test processes share the cores: one thread each is several times faster than all of them fighting.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg

.PHONY: help install demo test test-fast check format docs clean

help:
	@echo "make demo       compress a small network end to end, in under five minutes"
	@echo "make test       the whole suite"
	@echo "make test-fast  the suite without the slow tests"
	@echo "make check      formatting, lint, types, and who may import whom"
	@echo "make format     format the code and fix what can be fixed"
	@echo "make docs       write docs/cli.md from the command line's own help"
	@echo "make install    only make the environment in $(VENV)"
	@echo "make clean      remove the environment and everything that was built"

$(STAMP): pyproject.toml constraints.txt
	@found=; \
	for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "AutoCompress needs Python 3.11 or newer, and none was found as python3, python3.13, python3.12 or python3.11;" \
	    "install one, or name yours: make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	[ -x $(BIN)/python ] || "$$found" -m venv $(VENV)
	@# torch on its own first: the build that the constraint and the index agree on, whatever else asks for it.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,images,ray,text]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/autocompress demo

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/python -m autocompress.cli.docs docs/cli.md

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache autocompress-demo
	find autocompress tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
