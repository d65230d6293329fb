"""Which kernels to measure next: those of the families that are predicted worst from their own others.

Leave-one-out errors are a family's doubt at an image size; what is left is measured in proportion to it (active
learning by expected error; Settles 2009, section 3.4, with the cheapest estimate of it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autocompress.hwprofiles.predict import Layout, Predictor
from autocompress.types import Kernel

Group = tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]
LEAST = 4
"""With fewer members nothing is known of a group but that."""
UNKNOWN = 0.5
SURE = 0.01


def group_of(kernel: Kernel, layout: Layout) -> Group:
    """Kernels that are interpolated between: one family at one image size."""
    return layout.family(kernel), kernel.in_shape[1:], kernel.out_shape[1:]


def doubts(ns: Mapping[Kernel, float], layout: Layout) -> dict[Group, float]:
    """Mean relative error of each group's members, each predicted from the others."""
    groups: dict[Group, list[Kernel]] = {}
    for kernel in ns:
        groups.setdefault(group_of(kernel, layout), []).append(kernel)
    found = {}
    for group, members in groups.items():
        errors = [_without(kernel, members, ns, layout) for kernel in members] if len(members) >= LEAST else [UNKNOWN]
        found[group] = max(sum(errors) / len(errors), SURE)
    return found


def _without(kernel: Kernel, members: Sequence[Kernel], ns: Mapping[Kernel, float], layout: Layout) -> float:
    others = Predictor(((k, ns[k]) for k in members if k != kernel), layout)
    return min(abs(math.log(others(kernel) / ns[kernel])), 1.0)


def by_doubt(ns: Mapping[Kernel, float], rest: Sequence[Kernel], layout: Layout) -> list[Kernel]:
    """``rest`` in an order that gives each group as many measurements as it is doubtful; ``ns``: what is measured."""
    doubt, seen = doubts(ns, layout), dict[Group, int]()
    keyed: list[tuple[float, int, Kernel]] = []
    for kernel in rest:
        group = group_of(kernel, layout)
        seen[group] = rank = seen.get(group, 0) + 1
        keyed.append((rank / doubt.get(group, 1.0), len(keyed), kernel))
    return [kernel for _, _, kernel in sorted(keyed, key=lambda item: item[:2])]
