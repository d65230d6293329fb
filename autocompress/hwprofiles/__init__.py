"""Devices: profile files, the latency they predict, and the measurements behind them. No torch, no plans."""

from __future__ import annotations

from autocompress.hwprofiles.agent import describe_host
from autocompress.hwprofiles.bench import Comparison, Latency, Timing, compare, measure_ms, measure_one, node_profile
from autocompress.hwprofiles.device import Device
from autocompress.hwprofiles.explanation import Explanation, explain
from autocompress.hwprofiles.feedback import recalibrated, scaled
from autocompress.hwprofiles.findings import Finding
from autocompress.hwprofiles.fitted import Laws
from autocompress.hwprofiles.grid import default_grid
from autocompress.hwprofiles.measure import (
    exact_int8,
    fastest_int8,
    measure_default,
    measure_local,
    noise_floor,
)
from autocompress.hwprofiles.predict import Layout
from autocompress.hwprofiles.profile import FITTED, Entry, HardwareProfile
from autocompress.hwprofiles.profiles import known_profiles, load_profile, save_profile
from autocompress.hwprofiles.targets import open_target

__all__ = [
    "Comparison",
    "Device",
    "Entry",
    "Explanation",
    "Finding",
    "HardwareProfile",
    "FITTED",
    "Laws",
    "Latency",
    "Layout",
    "Timing",
    "compare",
    "default_grid",
    "describe_host",
    "exact_int8",
    "explain",
    "fastest_int8",
    "known_profiles",
    "load_profile",
    "measure_default",
    "measure_local",
    "measure_ms",
    "measure_one",
    "node_profile",
    "noise_floor",
    "open_target",
    "recalibrated",
    "save_profile",
    "scaled",
]
