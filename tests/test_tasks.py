"""Tasks: the loader's spellings, what is refused and how, the digits task, and the documented example."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.errors import TaskError, UnknownName, UsageError
from autocompress.files import cache_dir
from autocompress.tasks import Split, Task, check, known_tasks, load_task
from autocompress.tasks.augment import random_crop
from autocompress.tasks.digits import single_thread

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "own_task.py"

OWN = """
import torch
from torch import nn
from autocompress.tasks import Split, Task

def make(seed=0, data=()):
    g = torch.Generator().manual_seed(seed)
    a, b, c = (Split(torch.randn(20, 4, generator=g), torch.arange(20) % 3) for _ in range(3))
    model = nn.Linear(4, 3)
    nn.init.constant_(model.weight, 0.5)
    nn.init.zeros_(model.bias)
    return Task(f"own {seed} {data}", model, a, b, c)
"""


def split(n: int = 20, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    return Split(torch.randn(n, 4, generator=generator), torch.arange(n) % 3)


def linear(bias: float = 0.0) -> nn.Module:
    model = nn.Linear(4, 3)
    nn.init.constant_(model.weight, 0.5)
    nn.init.constant_(model.bias, bias)
    return model


def small(**changes: Any) -> Task:
    """A sound task, changed."""
    fields: dict[str, Any] = {
        "name": "t",
        "model": linear(),
        "calibration": split(),
        "search": split(seed=1),
        "report": split(seed=2),
    }
    return Task(**(fields | changes))


# ---------------------------------------------------------------- Task and Split


def test_batches_cover_a_split_in_order() -> None:
    images = Split(torch.arange(50, dtype=torch.uint8).reshape(10, 5), torch.arange(10))
    task = small(calibration=images, prepare=lambda x: x.float() / 2)
    batches = list(task.batches(images, 4))
    assert [len(targets) for _, targets in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), images.inputs.float() / 2)
    assert torch.equal(task.inputs(images), task.inputs(images.inputs))
    assert torch.equal(task.example_inputs, images.inputs[:1].float() / 2)
    assert len(images.take(3)) == 3
    assert len(images.take(99)) == 10


def test_the_metric_is_the_mean_of_the_scores() -> None:
    outputs = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [5.0, 1.0]])
    targets = torch.tensor([0, 1, 1, 0])
    assert small().score(outputs, targets).tolist() == [1, 1, 0, 1]
    assert small().metric(outputs, targets) == 0.75
    pixels = small().score(outputs.T.reshape(1, 2, 2, 2), targets.reshape(1, 2, 2))  # one picture of four pixels
    assert pixels.tolist() == [0.75]


def test_the_model_is_put_into_eval_mode() -> None:
    assert not small(model=nn.Sequential(linear(), nn.Dropout())).model.training


def halved(x: Tensor) -> Tensor:
    return x / 2


@pytest.mark.parametrize(
    "changes",
    [
        {"model": linear(bias=1.0)},
        {"model": nn.Sequential(linear())},
        {"report": split(seed=3)},
        {"report": split(19, seed=2)},
        {"train": split(seed=3)},
        {"prepare": halved},
        {"loss": nn.functional.nll_loss},
        {"fitness": "mse"},
        {"higher_is_better": False},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_the_hash_follows_the_content(changes: dict[str, Any]) -> None:
    assert small().hash == small(name="other").hash
    assert small(**changes).hash != small().hash


@pytest.mark.slow
def test_the_hash_is_the_same_in_another_process_and_place(tmp_path: Path) -> None:
    hashes: list[str] = []
    for folder in ("a", "b"):
        path = tmp_path / folder / "own.py"
        path.parent.mkdir()
        path.write_text(OWN)
        code = "import sys; from autocompress.tasks import load_task; print(load_task(sys.argv[1]).hash)"
        env = os.environ | {"PYTHONHASHSEED": str(len(hashes)), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, f"{path}:make"]
        hashes.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip())
    assert hashes[0] == hashes[1] == load_task(f"{path}:make").hash
    path.write_text(OWN.replace(" a, b, c)", " a, b, c, fitness='loss')"))
    assert load_task(f"{path}:make").hash != hashes[0]


# ---------------------------------------------------------------- what check refuses


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("boom\nmore")


class Overflows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


def raising(outputs: Tensor, targets: Tensor) -> Tensor:
    raise KeyError("targets")


def leaky() -> Split:
    """A report split that holds 5 of the 20 search examples."""
    fresh, search = split(15, seed=2), split(seed=1).take(5)
    return Split(torch.cat([fresh.inputs, search.inputs]), torch.cat([fresh.targets, search.targets]))


BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "nan": (lambda: {"model": nn.Sequential(linear(), linear(float("nan")))}, r"3 of the 3 values in '1\.bias' .* NaN"),
    "inf": (lambda: {"model": linear(float("inf"))}, r"3 of the 3 values in 'bias'"),
    "device": (lambda: {"model": nn.Linear(4, 3, device="meta")}, r"'weight' is on meta"),
    "half": (
        lambda: {"model": linear().half()},
        r"must be float32: 'weight' of task 't' is float16; call model\.float\(\)",
    ),
    "bfloat16": (lambda: {"model": linear().bfloat16()}, r"'weight' of task 't' is bfloat16"),
    "double": (lambda: {"model": linear().double()}, r"'weight' of task 't' is float64"),
    "no model": (lambda: {"model": torch.relu}, r"needs a torch\.nn\.Module"),
    "no calibration": (lambda: {"calibration": split(0)}, r"calibration split of task 't' is empty"),
    "no report": (lambda: {"report": split(0)}, r"report split of task 't' is empty"),
    "no train": (lambda: {"train": split(0)}, r"train split of task 't' is empty"),
    "lengths": (
        lambda: {"search": Split(torch.ones(3, 4), torch.ones(2))},
        r"search split .* \(3, 4\) and targets \(2,\)",
    ),
    "no split": (lambda: {"search": (1, 2)}, r"search split of task 't' must be a Split"),
    "overlap": (lambda: {"report": leaky()}, r"never seen by the search: 5 of the 20 .* its search split"),
    "overlap train": (lambda: {"train": split(seed=2)}, r"20 of the 20 .* its train split"),
    "two outputs": (lambda: {"model": Two()}, r"must return one tensor, got tuple"),
    "model raises": (lambda: {"model": Raises()}, r"model of task 't' raised ValueError .*: boom$"),
    "model overflows": (lambda: {"model": Overflows()}, r"returns NaN or infinite outputs"),
    "no batch": (lambda: {"model": nn.Flatten(0)}, r"one row per example, got shape \(8,\) for 2"),
    "prepare raises": (lambda: {"prepare": lambda x: x @ x}, r"prepare function of task 't' raised RuntimeError"),
    "score raises": (lambda: {"score": raising}, r"score of task 't' raised KeyError"),
    "score is a mean": (
        lambda: {"score": nn.functional.cross_entropy},
        r"one number per example, shape \(2,\), got \(\)",
    ),
    "loss per example": (lambda: {"loss": lambda o, t: o.sum(1)}, r"loss of task 't' must be one finite number"),
    "fitness": (lambda: {"fitness": "accuracy"}, r"'kl', 'loss' or 'mse', got 'accuracy'"),
    "no classes": (lambda: {"model": nn.Linear(4, 1)}, r"Fitness 'kl' needs class logits"),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_check_refuses_in_one_sentence(changes: Callable[[], dict[str, Any]], words: str) -> None:
    with pytest.raises(TaskError, match=words) as caught:
        check(small(**changes()))
    assert "\n" not in str(caught.value)


def test_check_accepts_sound_tasks_and_a_few_duplicates() -> None:
    check(small())
    few = split(1000, seed=2)
    few.inputs[0] = split().inputs[0]
    check(small(report=few))
    check(
        small(model=nn.Linear(4, 1), fitness="mse", score=lambda o, t: -(o[:, 0] - t).abs(), loss=lambda o, t: o.mean())
    )


# ---------------------------------------------------------------- the loader


def test_own_tasks_load_by_path_and_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "neighbour_of_own.py").write_text(OWN)
    (tmp_path / "own_by_path.py").write_text("from neighbour_of_own import make\n")
    before = list(sys.path)
    assert load_task(f"{tmp_path / 'own_by_path.py'}:make").name == "own 0 ()"
    assert load_task(f"{tmp_path / 'own_by_path.py'}:make", ["x"], seed=3).name == "own 3 ('x',)"
    monkeypatch.chdir(tmp_path)
    assert load_task("own_by_path.py:make").name == "own 0 ()"
    assert load_task("neighbour_of_own:make").name == "own 0 ()"
    assert sys.path == before


@pytest.mark.parametrize(
    "spec", ["digit", "cifar10", "cifar10:resnet18", "cifar10:", "digits:x", "", ":", "a/b:c", ".x:y"]
)
def test_unknown_tasks_name_the_known_ones(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()  # a folder of data is no package
    with pytest.raises(UnknownName) as caught:
        load_task(spec)
    assert caught.value.known == known_tasks()
    assert "path/to/file.py:factory" in str(caught.value)


def test_a_misspelling_gets_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match=r"Did you mean 'digits'\?"):
        load_task("digts")
    with pytest.raises(UnknownName, match=r"Did you mean 'cifar10:resnet20'\?"):
        load_task("cifar:resnet20")


@pytest.mark.parametrize(
    ("text", "factory", "error", "words"),
    [
        ("x = 1\nraise ValueError('no\\ndata')", "make", TaskError, r"raised ValueError: no \(.*own.py, line 2\)\.$"),
        ("def make():\n    return 1 / 0", "make", TaskError, r"raised ZeroDivisionError: .*own.py, line 2\)"),
        ("import json\ndef make():\n    json.loads('')", "make", TaskError, r"JSONDecodeError: .*own.py, line 3\)"),
        ("def make(:\n", "make", TaskError, r"raised SyntaxError: [^(]+ \(.*own.py, line 1\)"),
        ("import sys; sys.exit(3)", "make", TaskError, r"raised SystemExit: 3 \(.*own.py, line 1\)"),
        ("import no_such_module_here", "make", TaskError, r"raised ModuleNotFoundError: No module named 'no_such"),
        ("def make(path):\n    pass", "make", TaskError, r"raised TypeError: make\(\) missing 1 required"),
        ("def make():\n    return 3", "make", TaskError, r"must return an autocompress.tasks.Task, .* returned int\."),
        ("def make():\n    pass", "mak", UnknownName, r"Unknown factory in .*own.py 'mak'; known: make\. Did you mean"),
        ("make = 3", "make", UnknownName, r"Unknown factory .*; known: none"),
        (OWN.replace("zeros_(model.bias)", "constant_(model.bias, torch.nan)"), "make", TaskError,
         r"3 of the 3 values in 'bias' of task 'own 0 \(\)' are NaN"),
    ],
)  # fmt: skip
def test_bad_task_files_are_told_in_one_sentence(
    text: str, factory: str, error: type[Exception], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(error, match=words) as caught:
        load_task(f"{path}:{factory}")
    assert "\n" not in str(caught.value)


def test_the_first_error_stays_attached(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise ValueError('first')")
    with pytest.raises(TaskError) as caught:
        load_task(f"{tmp_path / 'own.py'}:make")
    assert isinstance(caught.value.__cause__, ValueError)


def test_absent_files_and_missing_factories_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"A task file must exist, got .*absent\.py"):
        load_task(f"{tmp_path / 'absent.py'}:make")
    (tmp_path / "own.py").write_text(OWN)
    for spec in (str(tmp_path / "own.py"), f"{tmp_path / 'own.py'}:"):
        with pytest.raises(UsageError, match=r"write '.*own\.py:factory'"):
            load_task(spec)


def test_a_package_that_lacks_something_is_not_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "__init__.py").write_text("import no_such_module_here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match="No module named 'no_such_module_here'"):
        load_task("lacking.tasks:make")


# ---------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digits() -> Task:
    return load_task("digits")


def metric(task: Task, name: str) -> float:
    with torch.inference_mode():
        return task.metric(task.model(task.inputs(task.splits[name])), task.splits[name].targets)


def test_digits_is_worth_compressing(digits: Task) -> None:
    assert metric(digits, "report") >= 0.97
    assert metric(digits, "search") >= 0.97
    assert {name: len(s) for name, s in digits.splits.items()} == {
        "calibration": 512, "search": 300, "report": 497, "train": 1000,
    }  # fmt: skip
    assert digits.example_inputs.shape == (1, 1, 8, 8)
    names = dict(digits.model.named_modules())
    assert {"conv1", "bn1", "layer1.0.conv1", "layer2.0.shortcut.0", "linear"} <= set(names)
    traced = torch.fx.symbolic_trace(digits.model)
    assert torch.equal(traced(digits.example_inputs), digits.model(digits.example_inputs))


def test_digits_splits_are_disjoint(digits: Task) -> None:
    rows = {name: {bytes(row) for row in s.inputs.flatten(1).numpy()} for name, s in digits.splits.items()}
    assert rows["calibration"] < rows["train"]
    assert not rows["search"] & (rows["train"] | rows["report"])
    assert not rows["report"] & rows["train"]


def test_the_seed_changes_calibration_only(digits: Task) -> None:
    other = load_task("digits", seed=1)
    assert not torch.equal(other.calibration.inputs, digits.calibration.inputs)
    assert torch.equal(other.report.inputs, digits.report.inputs)
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), digits.model.parameters(), strict=True))
    assert load_task("digits").hash == digits.hash != other.hash


def test_digits_augment_shifts_by_one_pixel_on_black(digits: Task) -> None:
    assert digits.augment is not None
    inputs = digits.inputs(digits.train.take(100) if digits.train else digits.search)
    out = digits.augment(inputs, torch.Generator().manual_seed(0))
    assert out.shape == inputs.shape
    assert torch.isclose(out.min(), inputs.min(), atol=1e-5)
    assert torch.equal(out, digits.augment(inputs, torch.Generator().manual_seed(0)))
    assert 0 < sum(torch.allclose(a, b, atol=1e-5) for a, b in zip(out, inputs, strict=True)) < 50


def test_random_crop_without_padding_changes_nothing() -> None:
    images = torch.randn(3, 2, 5, 7)
    assert torch.equal(random_crop(images, 0, torch.Generator()), images)


def test_images_of_one_channel_lie_by_rows() -> None:
    """They count as contiguous and as channels-last, and convolutions follow their strides."""
    assert random_crop(torch.randn(3, 1, 5, 7), 1, torch.Generator()).stride() == (35, 35, 7, 1)


def test_single_thread_restores_the_number() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        with single_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_digits_trains_to_the_same_bytes_in_another_process(digits: Task, tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    for cached in (cache_dir() / "digits").iterdir():  # this process trained with one of them
        (tmp_path / "digits" / cached.name).write_bytes(cached.read_bytes()[:-8])
    code = (
        "import torch; from autocompress.tasks import load_task; torch.manual_seed(5); torch.rand(3)\n"
        "state = torch.get_rng_state(); task = load_task('digits')\n"
        "print(task.hash, torch.equal(state, torch.get_rng_state()))"
    )
    env = os.environ | {
        "AUTOCOMPRESS_HOME": str(tmp_path), "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "2", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    for _ in range(2):  # trained as the file is damaged, then from the cache
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"{digits.hash} True"


# ---------------------------------------------------------------- the documented example


def test_the_example_runs_and_stands_in_the_docs() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    assert f"```python\n{text}```" in (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    task = load_task(f"{EXAMPLE}:wine")
    assert metric(task, "report") > 0.9
    assert load_task(f"{EXAMPLE}:wine").hash == task.hash


def test_the_docs_know_every_task_and_field() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    for name in [*known_tasks(), *(field.name for field in dataclasses.fields(Task))]:
        assert f"`{name}`" in text
