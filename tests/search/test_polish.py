"""Polish: what it takes over from the search before it."""

from __future__ import annotations

import pytest

from autocompress.search.polish import Polish
from autocompress.types import Budget, Evaluation, Plan
from tests.search import toys


def test_one_site_losses_count_from_the_original_on_their_own_slice() -> None:
    space, costs = toys.space_of(2, 2), toys.separable((2, 2))

    def judged(plan: Plan, loss: float, part: int) -> Evaluation:
        return Evaluation(plan, "slice", {"loss": loss}, {}, 0.0, part=part)

    known = [judged((0, 0), 1.0, 0), judged((0, 0), 3.0, 1), judged((1, 0), 3.25, 1), judged((0, 1), 1.5, 0)]
    polish = Polish(space, costs, [Budget("macs", 1.0)], 0, known)
    polish._prepare()
    polish._prior()
    assert polish.one_site.measured == pytest.approx({(0, 1): 0.25, (1, 1): 0.5})


def test_output_errors_are_scaled_to_what_plans_lose_after_refit() -> None:
    """Nothing was measured site by site: the prior is what was told, at the size of the refitted plans' losses."""
    space, costs = toys.space_of(3, 3), toys.separable((3, 3))

    def judged(plan: Plan, loss: float) -> Evaluation:
        return Evaluation(plan, "refitted", {"loss": loss}, {}, 0.0)

    errors = {0: (0.0, 1.0, 3.0), 1: (0.0, 0.1, 0.2)}
    known = [judged((1, 1), 0.11), judged((2, 1), 0.31), judged((1, 2), 0.5)]
    polish = Polish(space, costs, [Budget("macs", 1.0)], 0, known, errors)
    polish.ask(1)
    assert polish._prior().tolist() == pytest.approx([0.0, 0.1, 0.3, 0.0, 0.01, 0.02], rel=0.02)
