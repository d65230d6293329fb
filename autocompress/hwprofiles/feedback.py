"""Networks that were timed correct the profile that predicted them: factors of kinds and formats of kernels and of the
overhead, and a constant a layer.

What no kernel shows alone (caches that other kernels have filled, a layer that breaks its neighbours' fusion or layout)
shows in whole networks. One factor c fits them all first, then each group's own is drawn to it where the networks say little:
min_{s,a} sum_i ((sum_g s_g t_ig + a n_i) / y_i - 1)^2 + RIDGE (sum_g (s_g / c - 1)^2 + (a / m)^2), bounded;
n_i counts layers, m is the mean time of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear

from autocompress.errors import UsageError
from autocompress.hwprofiles.profile import Entry, HardwareProfile
from autocompress.types import Kernel

RIDGE = 3e-3
"""A group's factor twice the common one must take 5 % off the error of one network, or as much in all."""
BOUNDS = (0.25, 4.0)
LEAST = 0.05
"""A group that never takes this share of a network has no factor of its own: it would mend what others do."""
OVERHEAD = "overhead"
LAYERS = ("conv", "linear")
"""Kernels that take the constant."""


def recalibrated(profile: HardwareProfile, networks: Sequence[tuple[Sequence[Kernel], float]]) -> HardwareProfile:
    """The profile that predicts ``networks`` (their kernels, and nanoseconds of a run) best.

    Only measured profiles can be corrected: raises ``UsageError`` for a fitted one.
    """
    if profile.laws is not None:
        raise UsageError(
            f"Only a measured profile can be corrected by timed networks; {profile.name!r} is {profile.provenance}."
        )
    measured = np.array([ns for _, ns in networks])
    groups, times, rest = _shares(profile, networks)
    together = times.sum(axis=1) + rest
    common = float(np.clip(together.sum() / (together @ together), *BOUNDS))
    layers = np.array([sum(k.kind in LAYERS for k in kernels) for kernels, _ in networks])
    mean = float((together * measured).sum() / max(layers.sum(), 1))  # ns of a layer
    pull, n = np.sqrt(RIDGE), len(groups)
    known = np.concatenate([common * times, (mean * layers / measured)[:, None]], axis=1)
    wanted = np.concatenate([1.0 - common * rest, np.full(n, pull), [0.0]])
    lower, upper = np.array([*[BOUNDS[0]] * n, 0.0]), np.array([*[BOUNDS[1]] * n, 1.0])
    *own, share = lsq_linear(np.concatenate([known, pull * np.eye(n + 1)]), wanted, (lower, upper)).x
    factors = {group: round(float(common * factor), 4) for group, factor in zip(groups, own, strict=True)}
    constant = float(share * mean)

    def corrected(entry: Entry) -> Entry:
        ns = entry.ns * factors.get(_group(entry.kernel), common) + constant * (entry.kernel.kind in LAYERS)
        return replace(entry, ns=max(1.0, ns))

    how = {
        **profile.how,
        "corrected_by_networks": {**factors, "others": round(common, 4), "ns a layer": round(constant, 1)},
    }
    overhead = profile.overhead_ns * factors.get(OVERHEAD, common)
    return replace(profile, entries=tuple(map(corrected, profile.entries)), overhead_ns=overhead, how=how)


def _shares(
    profile: HardwareProfile, networks: Sequence[tuple[Sequence[Kernel], float]]
) -> tuple[list[str], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Groups, what each is predicted to take of what each network took, and the same of all that is too little to be one.

    # (n_networks, n_groups), (n_networks,)
    """
    rows: list[dict[str, float]] = []
    for kernels, ns in networks:
        rows.append({OVERHEAD: profile.overhead_ns / ns})
        for kernel, time in zip(kernels, profile.predict_ns(kernels).tolist(), strict=True):
            rows[-1][_group(kernel)] = rows[-1].get(_group(kernel), 0.0) + time / ns
    every = sorted({group for row in rows for group in row})
    times = np.array([[row.get(group, 0.0) for group in every] for row in rows])
    large = times.max(axis=0) >= LEAST
    return (
        [group for group, kept in zip(every, large, strict=True) if kept],
        times[:, large],
        times[:, ~large].sum(axis=1),
    )


def scaled(profile: HardwareProfile, factor: float) -> HardwareProfile:
    """The profile on which everything takes ``factor`` times as long."""
    entries = tuple(replace(entry, ns=max(1.0, entry.ns * factor)) for entry in profile.entries)
    return replace(profile, entries=entries, overhead_ns=profile.overhead_ns * factor)


def _group(kernel: Kernel) -> str:
    return f"{kernel.kind} {kernel.format}"
