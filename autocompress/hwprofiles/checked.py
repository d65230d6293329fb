"""Whole networks correct a measured profile; others, that it was not made from, tell how far off it then is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autocompress.hwprofiles.device import Device, FloatArray, Lane
from autocompress.hwprofiles.feedback import recalibrated
from autocompress.hwprofiles.profile import HardwareProfile
from autocompress.hwprofiles.references import residual_network
from autocompress.hwprofiles.robust import middle_mean
from autocompress.hwprofiles.timing import clock_lane
from autocompress.types import Format, Kernel

NETWORKS = 12
"""To correct with, and as many to state the error on."""
QUANTILE = 0.9


def checked(profile: HardwareProfile, device: Device, seconds: float, seed: int = 0) -> HardwareProfile:
    """The profile corrected by networks, with the ``expected_error`` of its predictions; ``how["checked"]`` tells more.

    Residual networks of random depth and widths, in float and int8, are timed in about ``seconds``; each round is brought
    to the clock that the profile was made with. Nine in ten of those that did not correct stay below ``expected_error``.
    """
    networks = _networks(profile, random.Random(seed))
    lanes = [clock_lane(profile.threads)]
    lanes += [Lane(model, profile.threads, profile.batch, warm_up=5, settle_most=2) for model, _ in networks]
    rounds = device.rounds(lanes, seconds=seconds, least=6, most=200)
    drift = rounds.lane(0) / profile.how.get("clock_ns", float(np.median(rounds.lane(0))))
    timed = [(k, middle_mean(rounds.lane(1 + i) / drift)) for i, (_, k) in enumerate(networks)]
    told, correct = timed[:NETWORKS], timed[NETWORKS:]
    raw, profile = _off(profile, told), recalibrated(profile, correct)
    off = _off(profile, told)
    accuracy = {
        "networks": len(off),
        "mape": round(float(off.mean()), 4),
        "within_10": round(float((off <= 0.1).mean()), 4),
    }
    how = {**profile.how, "checked": {**accuracy, "mape_uncorrected": round(float(raw.mean()), 4)}}
    return replace(profile, expected_error=round(float(np.quantile(off, QUANTILE)), 4), how=how)


def _off(profile: HardwareProfile, timed: Sequence[tuple[Sequence[Kernel], float]]) -> FloatArray:
    """Relative errors of the predictions.  # (n_networks,)"""
    predicted = [profile.overhead_ns + float(profile.predict_ns(kernels).sum()) for kernels, _ in timed]
    return np.abs(np.array(predicted) / [ns for _, ns in timed] - 1)


def _networks(profile: HardwareProfile, rng: random.Random) -> list[tuple[bytes, list[Kernel]]]:
    found = []
    for i in range(2 * NETWORKS):
        form: Format = "int8" if i % 4 == 3 else "float"
        stream, widths = rng.choice((16, 32)), []
        for _ in range(3):
            widths += [(stream, rng.randrange(8, 2 * stream + 1, 4)) for _ in range(rng.randint(1, 3))]
            stream *= 2
        size = rng.choice((16, 32, 56))
        found.append(residual_network(widths, form, size, profile.batch, profile.int8_format, seed=i))
    return found
