"""Devices: profile files, the latency they predict, and the measurements behind them. No torch, no plans."""

from __future__ import annotations

from autocompress.hwprofiles.bench import Comparison, Timing, compare, measure_ms, node_profile
from autocompress.hwprofiles.fitted import Laws
from autocompress.hwprofiles.measure import (
    default_grid,
    describe_host,
    exact_int8,
    fastest_int8,
    measure_default,
    measure_local,
    noise_floor,
)
from autocompress.hwprofiles.predict import Layout
from autocompress.hwprofiles.profile import FITTED, Entry, HardwareProfile
from autocompress.hwprofiles.profiles import known_profiles, load_profile, save_profile

__all__ = [
    "Comparison",
    "Entry",
    "HardwareProfile",
    "FITTED",
    "Laws",
    "Layout",
    "Timing",
    "compare",
    "default_grid",
    "describe_host",
    "exact_int8",
    "fastest_int8",
    "known_profiles",
    "load_profile",
    "measure_default",
    "measure_local",
    "measure_ms",
    "node_profile",
    "noise_floor",
    "save_profile",
]
