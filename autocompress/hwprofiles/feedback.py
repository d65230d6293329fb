"""Networks that were timed correct the profile that predicted them: one factor a kind and format of kernels.

What no kernel shows alone (a layer that breaks its neighbours' fusion or layout) shows in whole networks. Factors are
least squares of the networks' relative errors, drawn to 1 where the networks say little:
min_s sum_i ((sum_g s_g t_ig + t_0) / y_i - 1)^2 + RIDGE sum_g (s_g - 1)^2, bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import lsq_linear

from autocompress.errors import UsageError
from autocompress.hwprofiles.profile import HardwareProfile
from autocompress.types import Kernel

RIDGE = 3e-3
"""A factor of 2 must take 5 % off the error of one network, or as much in all."""
BOUNDS = (0.25, 4.0)


def recalibrated(profile: HardwareProfile, networks: Sequence[tuple[Sequence[Kernel], float]]) -> HardwareProfile:
    """The profile that predicts ``networks`` (their kernels, and nanoseconds of a run) best, the first of them exactly.

    Only measured profiles can be corrected: raises ``UsageError`` for a fitted one.
    """
    if profile.laws is not None:
        raise UsageError(
            f"Only a measured profile can be corrected by timed networks; {profile.name!r} is {profile.provenance}."
        )
    groups = sorted({_group(k) for kernels, _ in networks for k in kernels})
    times = np.zeros((len(networks), len(groups)))  # ns by network and group
    for row, (kernels, _) in zip(times, networks, strict=True):
        np.add.at(row, [groups.index(_group(k)) for k in kernels], profile.predict_ns(kernels))
    measured = np.array([ns for _, ns in networks])
    weights = 1.0 / measured
    rows = np.concatenate([times * weights[:, None], np.sqrt(RIDGE) * np.eye(len(groups))])
    wanted = np.concatenate([1.0 - profile.overhead_ns * weights, np.full(len(groups), np.sqrt(RIDGE))])
    factors = lsq_linear(rows, wanted, BOUNDS).x
    first = max(measured[0] - profile.overhead_ns, 0.5 * measured[0]) / float(times[0] @ factors)
    found = {group: float(factor * first) for group, factor in zip(groups, factors, strict=True)}
    entries = tuple(replace(e, ns=max(1.0, e.ns * found.get(_group(e.kernel), first))) for e in profile.entries)
    told = {group: round(factor, 3) for group, factor in found.items()}
    return replace(profile, entries=entries, how={**profile.how, "corrected_by_networks": told})


def _group(kernel: Kernel) -> str:
    return f"{kernel.kind} {kernel.format}"
