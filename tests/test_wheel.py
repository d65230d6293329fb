"""The wheel: what is in it, and that it works where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, **environment: str) -> str:
    # without the test run's own variables: nothing may come from the checkout
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    (found,) = out.glob("autocompress-*.whl")
    return found


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"autocompress"}
    assert "autocompress/py.typed" in names
    assert "autocompress/search/__init__.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    shipped = {name for name in names if name.endswith(".py")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "autocompress").rglob("*.py")}
    assert shipped == sources


def test_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "search.py").write_text("raise RuntimeError('a user may have a file of this name')\n")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", str(site), str(wheel), cwd=tmp_path)
    code = (
        "import autocompress, autocompress.search as s\n"
        "print(autocompress.__file__, autocompress.Budget.parse('size_mb<=3'), 'evolution' in s.CONTROLLERS)"
    )
    said = run(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(site)).split()
    assert Path(said[0]).is_relative_to(site)
    assert said[1:] == ["size_mb<=3", "True"]
    assert "compress" in run(sys.executable, "-m", "autocompress", "--help", cwd=elsewhere, PYTHONPATH=str(site))
    assert (site / "bin" / "autocompress").is_file()
