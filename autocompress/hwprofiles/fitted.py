"""Latencies of whole networks -> a law of each kernel family: what is known of a device on which nobody timed kernels.

A law is a roofline (``predict.py``): non-negative nanoseconds of overhead, MACs, elements read and written, and weights.
Families form a tree: all kernels, an operator, its grouping, its window, its format, its image size. One network's latency
says little about each of them, so a family is drawn towards the one above it (hierarchical ridge) and leaves it only where
the data insist.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from autocompress.errors import UsageError
from autocompress.hwprofiles.predict import FLOOR_NS, Family, features
from autocompress.types import Kernel

FloatArray = npt.NDArray[np.float64]
ROOT: Family = ()
RIDGE = 1e-4
"""Weight of a family's distance to the one above it, against the mean squared relative error."""
TERMS = ("overhead", "macs", "elements_in", "elements_out", "weights")


def family_of(kernel: Kernel) -> Family:
    """The words that name a kernel's family: ``("conv", "dense", "3x3", "float")``."""
    words = [kernel.kind]
    if kernel.kind == "conv":
        depthwise = kernel.groups > 1 and kernel.groups == kernel.in_shape[0]
        words.append("dense" if kernel.groups == 1 else "depthwise" if depthwise else "grouped")
    if kernel.kind in ("conv", "pool"):
        words.append(f"{kernel.kernel[0]}x{kernel.kernel[1]}")
    return (*words, kernel.format)


def lineage(kernel: Kernel) -> list[Family]:
    """From the root through the kernel's family to its octave of image sizes: ``(), ("conv",), ("conv", "dense"), …,
    ("conv", "dense", "3x3", "float", "16 px")``; of sequences and vectors the family is the last."""
    words = family_of(kernel)
    if len(kernel.out_shape) == 3 and kernel.kind != "attention":
        octave = round(math.log2(math.prod(kernel.out_shape[1:])) / 2)
        words = (*words, f"{2**octave} px")
    return [words[:n] for n in range(len(words) + 1)]


@dataclass(frozen=True)
class Law:
    """A family's nanoseconds: ``coefficients`` of ``TERMS``, the last four a thousand MACs, elements or weights."""

    family: Family
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Laws:
    """Laws that predict any kernel: its own family's, else the nearest one above it. A format that was not fitted takes as
    long as float: no speed-up is promised that nobody has seen."""

    laws: tuple[Law, ...]

    def __post_init__(self) -> None:
        if ROOT not in self._of:
            raise UsageError(
                "Fitted laws need one of all kernels (family []), for what they do not know; it is missing."
            )

    @cached_property
    def _of(self) -> Mapping[Family, FloatArray]:
        return {law.family: np.array(law.coefficients, np.float64) for law in self.laws}

    def knows(self, kernel: Kernel) -> bool:
        """Whether the kernel's own family was fitted."""
        return family_of(kernel) in self._of

    def __call__(self, kernel: Kernel) -> float:
        if kernel.format != "float" and not self.knows(kernel):
            return self(replace(kernel, format="float"))
        family = next(name for name in reversed(lineage(kernel)) if name in self._of)
        return max(float(np.dot(features(kernel), self._of[family])), FLOOR_NS)


def fit_laws(
    kernels: Sequence[Kernel],
    counts: FloatArray,
    ns: FloatArray,
    ridge: float = RIDGE,
    levels: int | None = None,
    donors: Sequence[tuple[Laws, float]] = (),
    whole: bool = True,
) -> tuple[Laws, float]:
    """Laws and the overhead of a network (ns) from latencies of whole networks; least squares of relative errors.

    ``counts``: how often each kernel runs  # (n_networks, n_kernels). ``ns``  # (n_networks,). ``levels``: at most so many
    words of a family; 0 is one roofline of everything. ``donors``: fitted devices of the same kind; their laws, each
    brought to this device by one factor, are where families start. ``whole``: the rows are networks;
    single blocks have no overhead of a network.
    """
    if len(ns) == 0 or not np.all(ns > 0):
        raise UsageError(
            f"Laws are fitted to latencies above 0, got {len(ns)} of which {int(np.sum(ns <= 0))} are not."
        )
    rows = np.array([features(kernel) for kernel in kernels], np.float64)  # (n_kernels, 5)
    lines = [lineage(kernel) for kernel in kernels]
    known, overhead = _average(donors, kernels, counts, ns)
    given = set(known)
    deepest = max(map(len, lines)) - 1
    last = deepest if levels is None else min(levels, deepest)
    for depth in range(last if donors else 0, last + 1):
        owners = [line[min(depth, len(line) - 1)] for line in lines]
        names = sorted(set(owners))
        sums = np.stack(
            [counts[:, [o == name for o in owners]] @ rows[[o == name for o in owners]] for name in names], 1
        )
        prior = np.array([_nearest(known, name) for name in names])  # (n_names, 5)
        found, overhead = _solve(sums, ns, prior, overhead if whole else None, ridge)
        known.update(zip(names, found, strict=True))
    laws = tuple(Law(name, tuple(float(f"{v:.6g}") for v in known[name])) for name in sorted({*given, *known}))
    return Laws(laws), overhead


def _nearest(known: Mapping[Family, FloatArray], name: Family) -> FloatArray:
    return next((known[name[:n]] for n in range(len(name), -1, -1) if name[:n] in known), np.zeros(len(TERMS)))


def _average(
    donors: Sequence[tuple[Laws, float]], kernels: Sequence[Kernel], counts: FloatArray, ns: FloatArray
) -> tuple[dict[Family, FloatArray], float]:
    """The donors' mean laws and overhead, each brought to these latencies by the median ratio."""
    found: dict[Family, list[FloatArray]] = {}
    overheads = []
    for laws, overhead in donors:
        ratio = float(np.median(ns / predict_networks(laws, overhead, kernels, counts)))
        overheads.append(overhead * ratio)
        for law in laws.laws:
            found.setdefault(law.family, []).append(np.array(law.coefficients) * ratio)
    return {name: np.mean(values, axis=0) for name, values in found.items()}, float(np.mean(overheads or [0.0]))


def _solve(
    sums: FloatArray, ns: FloatArray, prior: FloatArray, overhead: float | None, ridge: float
) -> tuple[FloatArray, float]:
    """Non-negative coefficients of each family  # (n_families, 5), near ``prior``, and a network's overhead (None: none)."""
    shares = sums / ns[:, None, None]  # (n_networks, n_families, 5)
    # One scale a term, whatever the family: one that seldom runs must not take up what belongs to the network.
    term = np.maximum(shares.sum(axis=1).mean(axis=0), 1e-12)  # (5,)
    constant = np.zeros_like(ns) if overhead is None else 1 / ns
    scale = np.append(np.tile(term, len(prior)), (1 / ns).mean())
    relative = np.concatenate([shares.reshape(len(ns), -1), constant[:, None]], 1)  # (n_networks, 5 families + 1)
    centre = np.append(prior.ravel(), overhead or 0.0) * scale
    # Normal equations: the same minimum as the stacked least squares, on a matrix of a few dozen columns.
    scaled = relative / scale
    gram = scaled.T @ scaled / len(ns) + ridge * np.eye(len(scale))
    right = scaled.mean(axis=0) + ridge * centre
    lower = np.linalg.cholesky(gram)
    solved = nnls(lower.T, np.linalg.solve(lower, right), maxiter=100 * len(scale))[0] / scale
    return solved[:-1].reshape(prior.shape), float(solved[-1])


def predict_networks(laws: Laws, overhead: float, kernels: Iterable[Kernel], counts: FloatArray) -> FloatArray:
    """Nanoseconds of whole networks.  # (n_networks,)"""
    return np.asarray(counts @ np.array([laws(kernel) for kernel in kernels]) + overhead)


def error(predicted: FloatArray, ns: FloatArray) -> dict[str, float]:
    """``mape``: mean absolute relative error; ``spearman``: rank correlation; ``p90``: 90th percentile of the error."""
    from scipy.stats import spearmanr

    off = np.abs(predicted - ns) / ns
    rank = float(spearmanr(predicted, ns).statistic) if np.ptp(predicted) > 0 else math.nan
    return {"mape": float(off.mean()), "spearman": rank, "p90": float(np.quantile(off, 0.9))}
