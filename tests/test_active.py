"""What is measured next is what is predicted worst; how far off a profile is comes from whole networks."""

from __future__ import annotations

import math

import pytest

from autocompress.hwprofiles.active import by_doubt, doubts, group_of
from autocompress.hwprofiles.checked import NETWORKS, checked
from autocompress.hwprofiles.device import local_device
from autocompress.hwprofiles.measure import measure_local
from autocompress.hwprofiles.predict import Layout
from autocompress.types import Kernel

PLAIN = Layout()


def conv(a: int, b: int, size: int) -> Kernel:
    return Kernel("conv", (a, size, size), (b, size, size), (3, 3))


def times(size: int, jump: float) -> dict[Kernel, float]:
    """Proportional to the MACs, but for a jump at wide outputs."""
    widths = (8, 16, 32, 64, 128)
    return {conv(a, b, size): conv(a, b, size).macs * (jump if b >= 64 else 1.0) for a in widths for b in widths}


def test_a_family_with_a_cliff_is_in_doubt_and_measured_more() -> None:
    ns = {**times(8, 1.0), **times(16, 3.0)}
    found = doubts(ns, PLAIN)
    smooth, cliff = (found[group_of(conv(8, 8, size), PLAIN)] for size in (8, 16))
    assert cliff > 3 * smooth
    rest = [conv(a, b, size) for a in (24, 48, 96) for b in (24, 48, 96) for size in (8, 16)]
    order = by_doubt(ns, rest, PLAIN)
    assert sorted(order, key=rest.index) == rest
    assert sum(kernel.in_shape[1] == 16 for kernel in order[:8]) >= 6


def test_an_unknown_group_comes_before_one_that_is_well_known() -> None:
    order = by_doubt(times(8, 1.0), [conv(24, 24, 8), conv(24, 24, 32)], PLAIN)
    assert order[0] == conv(24, 24, 32)


@pytest.mark.slow
def test_a_profile_states_how_far_off_it_is_on_networks() -> None:
    device = local_device()
    profile = measure_local([conv(16, 16, 16), conv(32, 32, 16), conv(16, 32, 16)], seconds=0.5, device=device)
    found = checked(profile, device, seconds=0.1)
    assert found.how["checked"]["networks"] == NETWORKS
    assert found.expected_error > 0 and math.isfinite(found.expected_error)
    assert found.entries != profile.entries and profile.expected_error == 0
