"""Which precision a fitness allows: tried on plans of the space before the search, from mild to hard.

What rounding adds to a divergence is nearly the same for all plans (ResNet-20 in bfloat16: 4e-5 nats), so that it does not change
their order; where it is not, or is no small part of what plans lose, the next finer precision is tried.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.errors import UsageError
from autocompress.evaluate import Measurer
from autocompress.fitness import slice_of
from autocompress.types import Plan, Query, SearchSpace
from autocompress.where import Precision, Where

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Probed plans have a level drawn at this share of their sites, and at one site at least."""
TOLERANCE = 0.02
"""By so much of a plan's loss, beside what rounding adds to all, a coarser precision may be off."""
NEGLIGIBLE = 1e-6
"""Of the largest loss."""
COARSEST_FIRST: tuple[Precision, ...] = ("bfloat16", "tf32")
HEAVY = 1e12
"""Multiply-accumulates of a slice from which bfloat16 is worth trying. Below, a GPU waits for its launches and not for numbers:
on an H200 ResNet-20 (1e10) is judged 30 times a second in tf32 and 26 in bfloat16."""


def allowed(database: LevelDatabase, device: str, precision: str, seed: int = 0) -> tuple[Where, str]:
    """Where to judge, and one sentence about it (empty where there was nothing to decide).

    ``precision``: one of :data:`~autocompress.where.PRECISIONS` is taken as it is; ``auto`` is float32 on the processor, where
    rounding saves no time, and on a GPU the coarsest that the fitness allows.
    """
    if precision != "auto":
        return Where(device, precision), ""  # type: ignore[arg-type]
    exact = Where(device)
    if not exact.gpu:
        return exact, ""
    plans = list(probes(database.space, seed))
    truth = losses(database, plans, exact)
    told = "float32"
    macs = CostModel(database.graph, database.space, {}).in_units(database.space.dense)["macs"]
    heavy = macs * slice_of(database.task) >= HEAVY
    for coarse in COARSEST_FIRST if heavy else COARSEST_FIRST[1:]:
        where = Where(device, coarse)
        off, floor = deviation(truth, losses(database, plans, where))
        if off <= TOLERANCE and floor <= TOLERANCE * median(truth[1:]):
            added = f"rounding adds {floor:.1e} to the loss of every plan, and beside that at most {off:.1%} of it"
            return where, f"Plans are judged in {coarse} on {device}: on {len(plans) - 1} plans {added}."
        told = f"{told}, for {coarse} is off by up to {off:.1%} of the loss"
    return exact, f"Plans are judged in {told} on {device}."


def probes(space: SearchSpace, seed: int) -> list[Plan]:
    """The dense plan, and others from one changed site to all."""
    rng = random.Random(seed)
    found = [space.dense]
    choices = [site for site, count in enumerate(space.n_levels) if count > 1]
    if not choices:
        raise UsageError("A precision is tried on plans that differ, and this space has one level everywhere.")
    for share in SHARES:
        plan = list(space.dense)
        for site in {rng.choice(choices), *(s for s in choices if rng.random() < share)}:
            plan[site] = rng.randrange(1, space.n_levels[site])
        found.append(tuple(plan))
    return found


def losses(database: LevelDatabase, plans: Sequence[Plan], where: Where) -> list[float]:
    """Of each plan on the slice; one that is not a number is left as infinity."""
    found = Measurer(database, where=where).many([Query(plan, "slice") for plan in plans])
    return [float("inf") if values["loss"] is None else float(values["loss"]) for values in found]


def deviation(truth: Sequence[float], coarse: Sequence[float]) -> tuple[float, float]:
    """Largest relative error beside the dense plan's, which is the first, and that of the dense plan.

    Plans that lose as little as rounding adds, or next to nothing, say nothing and are left out, as are those without a finite
    loss.
    """
    floor = abs(coarse[0] - truth[0])
    finite = [(a, b) for a, b in zip(truth[1:], coarse[1:], strict=True) if a < float("inf")]
    least = max(floor, NEGLIGIBLE * max((abs(a) for a, _ in finite), default=0.0))
    pairs = [(a, b) for a, b in finite if abs(a) > least]
    return max((max(0.0, abs(b - a) - floor) / abs(a) for a, b in pairs), default=float("inf")), floor
