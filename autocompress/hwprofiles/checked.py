"""How far off a measured profile is on whole networks that it was not made from; nine in ten stay below what is stated."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from autocompress.hwprofiles.device import Device, FloatArray, Lane
from autocompress.hwprofiles.profile import HardwareProfile
from autocompress.hwprofiles.references import residual_network
from autocompress.hwprofiles.robust import middle_mean
from autocompress.hwprofiles.timing import clock_lane
from autocompress.types import Format, Kernel

NETWORKS = 20
QUANTILE = 0.9


def checked(profile: HardwareProfile, device: Device, seconds: float, seed: int = 0) -> HardwareProfile:
    """The profile with the ``expected_error`` of its predictions, and in ``how["networks"]`` what it comes from.

    ``NETWORKS`` residual networks of random depth and widths, in float and int8, are timed in about ``seconds`` and
    predicted; each round is brought to the clock that the profile was made with.
    """
    networks = _networks(profile, random.Random(seed))
    lanes = [clock_lane(profile.threads)]
    lanes += [Lane(model, profile.threads, profile.batch, warm_up=5, settle_most=2) for model, _ in networks]
    rounds = device.rounds(lanes, seconds=seconds, least=6, most=200)
    drift = rounds.lane(0) / profile.how.get("clock_ns", float(np.median(rounds.lane(0))))
    measured = np.array([middle_mean(rounds.lane(1 + i) / drift) for i in range(len(networks))])
    off = np.abs(_predicted(profile, [kernels for _, kernels in networks]) / measured - 1)
    told = {
        "networks": len(off),
        "mape": round(float(off.mean()), 4),
        "within_10": round(float((off <= 0.1).mean()), 4),
    }
    error = round(float(np.quantile(off, QUANTILE)), 4)
    return replace(profile, expected_error=error, how={**profile.how, "checked": told})


def _networks(profile: HardwareProfile, rng: random.Random) -> list[tuple[bytes, list[Kernel]]]:
    found = []
    for i in range(NETWORKS):
        form: Format = "int8" if i % 4 == 3 else "float"
        stream, widths = rng.choice((16, 32)), []
        for _ in range(3):
            widths += [(stream, rng.randrange(8, 2 * stream + 1, 4)) for _ in range(rng.randint(1, 3))]
            stream *= 2
        size = rng.choice((16, 32, 56))
        found.append(residual_network(widths, form, size, profile.batch, profile.int8_format, seed=i))
    return found


def _predicted(profile: HardwareProfile, networks: list[list[Kernel]]) -> FloatArray:
    return np.array([profile.overhead_ns + float(profile.predict_ns(kernels).sum()) for kernels in networks])
