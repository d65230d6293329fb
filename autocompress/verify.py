"""The proof that an exported file is right and fast, as far as it is: certificate.json and the check of a file.

Accuracy is measured through ONNX Runtime on the report split, pair by pair with the original. Knows nothing of plans
and searches: hashes of what led to the file are given by the caller.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autocompress.errors import UsageError
from autocompress.files import write_json
from autocompress.hwprofiles.bench import Comparison, compare
from autocompress.onnx_cost import file_costs
from autocompress.onnx_file import Artifact, Parity, open_session, ort_outputs, parity, run_session, sha256_of
from autocompress.tasks.base import Task
from autocompress.tasks.load import load_task
from autocompress.types import METRICS, Budget

__all__ = [
    "BudgetCheck",
    "Certificate",
    "Quality",
    "certify",
    "check_model",
    "mean_interval",
    "ort_outputs",
    "paired_interval",
    "parity",
    "quality",
]

Scores = npt.NDArray[np.float64]
RESAMPLES = 2000
BATCH = 250
"""Most examples a run when a split is judged."""
VERSIONS = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "autocompress")


# ---------------------------------------------------------------- accuracy


def mean_interval(scores: npt.ArrayLike, *, seed: int = 0, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of the scores ``(n,)`` and the ends of its percentile bootstrap interval (Efron 1979), seeded."""
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not len(values):
        raise UsageError(f"An interval needs one score an example, at least one; got an array of shape {values.shape}.")
    if not np.isfinite(values).all():
        raise UsageError("An interval needs finite scores, got NaN or infinity.")
    if not 0 < level < 1:
        raise UsageError(f"A confidence level lies between 0 and 1, got {level}.")
    rng, n = np.random.default_rng(seed), len(values)
    means = np.array([values[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def paired_interval(
    original_scores: npt.ArrayLike,
    compressed_scores: npt.ArrayLike,
    *,
    seed: int = 0,
    level: float = 0.95,
    points: float = 100.0,
) -> tuple[float, float, float]:
    """Mean drop from original to compressed in points, and its paired bootstrap interval: ``(drop, low, high)``.

    Scores are ``(n,)``, of the same examples in the same order; examples are resampled, so that what both models find
    hard does not widen the interval. Positive: the compressed model scores lower.
    """
    first, second = np.asarray(original_scores, np.float64), np.asarray(compressed_scores, np.float64)
    if first.shape != second.shape:
        raise UsageError(f"Paired scores belong to the same examples, got {first.shape} and {second.shape}.")
    return mean_interval((first - second) * points, seed=seed, level=level)


@dataclass(frozen=True)
class Quality:
    """The metric of both files on the report split, through ONNX Runtime, each as ``(value, low, high)``.

    ``drop`` is in points, positive when the compressed model is worse, whatever the metric's direction; ``relative``: a
    point is one percent of the original's metric.
    """

    metric_name: str
    higher_is_better: bool
    original: tuple[float, float, float]
    compressed: tuple[float, float, float]
    drop: tuple[float, float, float]
    examples: int
    level: float
    relative: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def task_scores(path: Path | str, task: Task, threads: int = 1) -> Scores:
    """The score of each example of the report split, as the file computes it in ONNX Runtime.  # (n,)"""
    session = open_session(path, threads=threads)

    def run(inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(run_session(session, (np.ascontiguousarray(inputs.numpy()),)))

    return _scores(task, run)


def _model_scores(task: Task) -> Scores:
    """The same for the task's own model, in torch.  # (n,)"""
    with torch.no_grad():
        return _scores(task, task.model)


def _scores(task: Task, run: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
    """Batch by batch: the logits of a whole split may not fit into memory.  # (n,)"""
    batches = task.batches(task.report, min(BATCH, task.batch_size * 2))
    parts = [task.score(run(inputs), targets) for inputs, targets in batches]
    return np.asarray(torch.cat(parts).numpy(), np.float64)


def quality(
    original: Path | str | None,
    compressed: Path | str,
    task: Task,
    *,
    threads: int = 1,
    seed: int = 0,
    level: float = 0.95,
) -> Quality:
    """Judge two ONNX files on the report split; ``original=None`` takes the task's torch model instead."""
    before = _model_scores(task) if original is None else task_scores(original, task, threads)
    after = task_scores(compressed, task, threads)
    if task.log_scores:  # intervals keep their order through the exponential
        drop = paired_interval(before, after, seed=seed, level=level, points=1.0)
        worst = sorted(map(task.drop_of, drop[1:]))
        gap = (task.drop_of(drop[0]), worst[0], worst[1])
    else:
        gap = paired_interval(before, after, seed=seed, level=level, points=task.drop_of(1.0))
    first, second = mean_interval(before, seed=seed, level=level), mean_interval(after, seed=seed, level=level)
    return Quality(
        metric_name=task.metric_name,
        higher_is_better=task.higher_is_better,
        original=_metric_of(task, first),
        compressed=_metric_of(task, second),
        drop=gap,
        examples=len(before),
        level=level,
        relative=task.log_scores,
    )


def _metric_of(task: Task, interval: tuple[float, float, float]) -> tuple[float, float, float]:
    value, low, high = map(task.metric_of, interval)
    return value, low, high


# ---------------------------------------------------------------- budgets


def _latencies(speed: Comparison) -> tuple[float, float]:
    """Milliseconds of the original and of the compressed model; the original's is by the paired ratio of the rounds."""
    return speed.candidate_p50_ms / speed.ratio, speed.candidate_p50_ms


@dataclass(frozen=True)
class BudgetCheck:
    """A budget beside what was measured; ``limit`` and ``measured`` are in the metric's unit.

    ``measured`` and ``holds`` are ``None`` for what cannot be measured here (another device, peak memory).
    """

    budget: str
    limit: float
    measured: float | None
    holds: bool | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sentence(self) -> str:
        metric = METRICS[self.budget.partition("<=")[0]]
        if self.measured is None:
            return f"{self.budget} was predicted, not measured here."
        values = f"{self.measured:.4g} against a limit of {self.limit:.4g} {metric.unit}".rstrip()
        return f"{self.budget} {'holds' if self.holds else 'does not hold'}: {values}."


def check_budgets(
    budgets: Sequence[Budget], measured: Mapping[str, float], original: Mapping[str, float]
) -> list[BudgetCheck]:
    """Each budget against the measured costs; both mappings are by :func:`types.cost_key`."""
    checks = []
    for budget in budgets:
        if budget.relative and budget.key not in original:
            if budget.key in measured:
                raise UsageError(f"{budget} is relative and needs the original's ONNX file to compare with.")
            checks.append(BudgetCheck(str(budget), budget.limit, None, None))
            continue
        absolute, value = budget.absolute(original), measured.get(budget.key)
        holds = None if value is None else absolute.violation(value) == 0
        checks.append(BudgetCheck(str(budget), absolute.limit, value, holds))
    return checks


def check_model(
    path: Path | str,
    budgets: Sequence[Budget],
    *,
    task: Task | str | None = None,
    against: Path | str | None = None,
    data: Sequence[str] = (),
    threads: int = 1,
    seconds: float = 10.0,
) -> list[BudgetCheck]:
    """Measure an ONNX file on this machine and hold it against ``budgets``: a gate for CI.

    ``against``: the original's ONNX file, for relative budgets and, if given, for the accuracy drop; else the drop is
    counted from the task's own model. ``seconds``: time for measuring latency. Raises :class:`UsageError` when a budget
    cannot be judged.
    """
    keys = {budget.key for budget in budgets}
    if "weight_bits" in keys:
        raise UsageError("weight_bits belongs to a plan, and no file stores all of it; check size_mb or nonzeros here.")
    measured = file_costs(path, keys)
    original = file_costs(against, keys) if against is not None else {}
    if "accuracy_drop" in keys:
        if task is None:
            raise UsageError("accuracy_drop is judged on a task's report split; name one with --task.")
        judged = load_task(task, data) if isinstance(task, str) else task
        measured["accuracy_drop"] = quality(against, path, judged, threads=threads).drop[0]
    if "latency_ms@local" in keys:
        speed = compare(Path(path), Path(against or path), threads=threads, seconds=seconds)
        before, measured["latency_ms@local"] = _latencies(speed)
        if against is not None:
            original["latency_ms@local"] = before
    checks = check_budgets(budgets, measured, original)
    if unknown := [c.budget for c in checks if c.measured is None]:
        raise UsageError(f"{', '.join(unknown)} cannot be measured on this machine; budgets here are 'local' ones.")
    return checks


# ---------------------------------------------------------------- certificate


@dataclass(frozen=True)
class Certificate:
    """Everything that is claimed of an exported file, with how it was found; ``statements`` are for a person."""

    statements: tuple[str, ...]
    artifact: Artifact
    original: Mapping[str, Any]
    costs: Mapping[str, Mapping[str, float]]
    parity: Parity
    quality: Quality
    speed: Comparison
    budgets: tuple[BudgetCheck, ...]
    hashes: Mapping[str, str]
    environment: Mapping[str, Any]
    replay: str

    @property
    def holds(self) -> bool:
        """Whether every budget that was measured holds."""
        return all(check.holds is not False for check in self.budgets)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


def certify(
    artifact: Artifact,
    original: Path | str,
    *,
    parity: Parity,
    quality: Quality,
    speed: Comparison,
    budgets: Sequence[Budget],
    hashes: Mapping[str, str],
    replay: str,
) -> Certificate:
    """Put together what was measured and write it beside the ONNX file, see :func:`certificate_of`.

    ``original``: the uncompressed model's ONNX file, exported the same way. ``hashes``: of the plan, task, database and
    profile. ``replay``: the command that makes the file again. Raises :class:`UsageError` when the file is not the one
    that ``artifact`` describes.
    """
    if sha256_of(artifact.path) != artifact.sha256:
        raise UsageError(f"{artifact.path!r} has changed since it was exported; export it again.")
    compressed_costs, original_costs = file_costs(artifact.path), file_costs(original)
    before_ms, after_ms = _latencies(speed)
    compressed_costs |= {"latency_ms@local": after_ms, "accuracy_drop": quality.drop[0]}
    original_costs |= {"latency_ms@local": before_ms, "accuracy_drop": 0.0}
    checks = check_budgets(budgets, compressed_costs, original_costs)
    source = {"path": str(original), "sha256": sha256_of(original), "bytes": Path(original).stat().st_size}
    certificate = Certificate(
        statements=(
            *_statements(artifact, source["bytes"], parity, quality, speed, checks),
            f"Packed, it has {compressed_costs['packed_mb']:.4g} MB, the original {original_costs['packed_mb']:.4g} MB.",
        ),
        artifact=artifact,
        original=source,
        costs={"original": original_costs, "compressed": compressed_costs},
        parity=parity,
        quality=quality,
        speed=speed,
        budgets=tuple(checks),
        hashes=dict(hashes),
        environment=environment(),
        replay=replay,
    )
    write_json(certificate_of(Path(artifact.path)), certificate.to_json())
    return certificate


def certificate_of(model: Path) -> Path:
    """Where a file's certificate lies: ``certificate.json`` for ``model.onnx``, ``NAME.certificate.json`` for another
    name, so that several files in one folder keep theirs.
    """
    return model.with_name("certificate.json" if model.stem == "model" else f"{model.stem}.certificate.json")


def _statements(
    artifact: Artifact,
    original_bytes: Any,
    parity: Parity,
    quality: Quality,
    speed: Comparison,
    checks: Sequence[BudgetCheck],
) -> list[str]:
    """What a person must know, a sentence each."""
    fine = 0 < max(map(abs, quality.drop)) < 0.1  # a metric of small numbers, such as a squared error
    value, low, high = (f"{end + 0.0:.2g}" if fine else f"{end + 0.0:.2f}" for end in quality.drop)
    lost = f"worse by {value} %" if quality.relative else f"a drop of {value} points"
    sentences = [
        f"{quality.metric_name} on {quality.examples} report examples is {quality.compressed[0]:.4f}, the original's "
        f"{quality.original[0]:.4f}: {lost} "
        f"({quality.level:.0%} paired interval {low} to {high}).",
        speed_statement(speed),
        f"The file has {artifact.bytes / 1e6:.4g} MB, the original's {original_bytes / 1e6:.4g} MB "
        f"({artifact.bytes / original_bytes:.1%}).",
        f"ONNX Runtime differs from torch by at most {max(parity.off.relative, parity.on.relative):.1e} of the range "
        f"of the outputs (allowed {parity.tolerance:.1e}).",
    ]
    for name, count in artifact.coverage.items():
        if count["found"] < count["expected"]:
            sentences.append(f"{name} was asked for in {count['expected']} places and runs in {count['found']}.")
    sentences += [f"{layer}: {reason}." for layer, reason in artifact.missing.items()]
    if artifact.fallback_reason:
        sentences.append(f"It was written by the {artifact.exporter} exporter. {artifact.fallback_reason}")
    return sentences + [check.sentence for check in checks]


def speed_statement(speed: Comparison) -> str:
    """The paired speed-up in words; it says so when nothing was gained."""
    low, high = speed.ratio_interval
    noise = max(abs(end - 1) for end in speed.noise)
    return (
        f"The compressed model is {1 / speed.ratio:.2f}x the original's speed (95% interval {1 / high:.2f}x to "
        f"{1 / low:.2f}x, noise floor {noise:.1%}): {speed.verdict}."
    )


def environment() -> dict[str, Any]:
    """Versions and the machine, for reproduction."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    machine = {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": _cpu_name(),
        "torch_threads": torch.get_num_threads(),
        "byte_order": sys.byteorder,
    }
    return {"versions": versions, "machine": machine}


def _cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
