"""The Python facade on results as they lie on disk; tests/test_demo.py runs the whole way."""

from __future__ import annotations

from pathlib import Path

import pytest

import autocompress
from autocompress.api import default_folder, judged_last
from autocompress.dashboard.front import read_front
from autocompress.errors import BudgetUnmet, StoreError, UnknownName, UsageError
from autocompress.results import Request
from autocompress.validate import make_request
from tests.dashboard import sample

KEY = "latency_ms@local"


@pytest.fixture
def result(tmp_path: Path) -> autocompress.Result:
    found = sample.result()
    front = {(p.id, p.fidelity) for p in read_front(found).points["front"]}
    points = [p.model_copy(update={"on_front": (p.id, p.fidelity) in front}) for p in found.points]
    (tmp_path / "result.json").write_text(found.model_copy(update={"points": tuple(points)}).model_dump_json())
    return autocompress.Result.load(tmp_path)


def test_front_is_sorted_and_best_holds_the_budget(result: autocompress.Result) -> None:
    losses = [p.values["loss"] for p in result.front]
    assert len(losses) > 1
    assert losses == sorted(losses)
    assert result.best().id == result.result.best
    middle = sorted(p.measured.get(KEY, p.costs[KEY]) for p in result.front)[len(losses) // 2]
    chosen = result.best(f"latency_ms<={middle}")
    fitting = [p for p in result.front if p.measured.get(KEY, p.costs[KEY]) <= middle]
    assert chosen.values["loss"] == min(p.values["loss"] for p in fitting)
    assert result.best("latency_ms<=100%").id == result.front[0].id


def test_best_says_what_is_nearest(result: autocompress.Result) -> None:
    fastest = min(result.front, key=lambda p: p.measured.get(KEY, p.costs[KEY]))
    with pytest.raises(BudgetUnmet, match=f"nearest is {fastest.id[:8]}"):
        result.best("latency_ms<=0.0001")
    with pytest.raises(UsageError, match="holds no 'latency_ms@pixel3'; it has"):
        result.best("latency_ms<=3@pixel3")


def test_the_highest_rung_speaks_for_a_plan(result: autocompress.Result) -> None:
    recovered = next(p for p in result.result.points if p.fidelity == "recovered")
    assert sum(p.id == recovered.id for p in result.result.points) > 1
    assert judged_last(result.result, recovered.id) == recovered
    with pytest.raises(UnknownName, match="Unknown plan 'nothing'"):
        judged_last(result.result, "nothing")


def test_notebook_table_is_escaped(result: autocompress.Result) -> None:
    page = result._repr_html_()
    assert page.count("<tr") == len(result.front) + 2
    renamed = result.result.model_copy(update={"metric_name": "<script>"})
    assert "<script>" not in autocompress.Result(result.folder, renamed)._repr_html_()


def test_load_refuses_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no result\.json"):
        autocompress.Result.load(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(StoreError, match="damaged"):
        autocompress.Result.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"budgets": []}, "at least one budget"),
        ({"budgets": ["size_mb<=1"], "controler": "exact"}, "Did you mean 'controller'"),
        ({"budgets": ["size_mb<=1"], "evaluations": "many"}, "evaluations: .*got 'many'"),
        ({"budgets": ["size_mb<=1"], "seed": -1}, "--seed is 0 or more"),
        ({"budgets": ["size_mb<=1"], "task": "digit"}, "Did you mean 'digits'"),
    ],
)
def test_compress_refuses_before_it_starts(arguments: dict[str, object], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        autocompress.compress(**{"task": "digits", "out": tmp_path / "out", **arguments})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_same_request_finds_its_folder_again() -> None:
    first = make_request({"task": "digits", "budgets": ["size_mb <= 50%", "latency_ms<=2"]})
    again = make_request({"task": "digits", "budgets": ["size_mb<=50%", "latency_ms<=2@local"]})
    other = make_request({"task": "digits", "budgets": ["size_mb<=50%", "latency_ms<=3"]})
    assert default_folder(first) == default_folder(again)
    assert default_folder(first) != default_folder(other)
    assert default_folder(Request(task="a/b.py:make", budgets=())).name.startswith("b.py-make-")
