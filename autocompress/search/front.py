"""The Pareto front: which plans nothing else beats, what to pick from them, and how much they cover.

Fitnesses compare only within one rung of the ladder of fidelities, so each rung has its own front.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from autocompress.errors import UsageError
from autocompress.search.tables import FloatArray
from autocompress.types import FIDELITIES, METRICS, Budget, Evaluation, Fidelity, Objective, Plan


def non_dominated(points: FloatArray) -> list[int]:
    """Indices of the rows no other row beats (all objectives minimized); of equal rows the first.  # (n, m) -> [n]"""
    order = np.lexsort((np.arange(len(points)), *points.T[::-1]))
    kept: list[int] = []
    for i in order:
        if not any((points[j] <= points[i]).all() for j in kept):
            kept.append(int(i))
    return kept


def hypervolume(points: FloatArray, reference: Sequence[float]) -> float:
    """Volume between minimized ``points`` (n, m) and ``reference`` (m,), exactly, for m = 1, 2 or 3.

    Two objectives by a sweep; three by slices along the last one (Beume et al. 2009 give the faster version).
    """
    ref = np.asarray(reference, float)
    if len(ref) not in (1, 2, 3):
        raise UsageError(f"Hypervolume is computed for 1 to 3 objectives, got {len(ref)}; leave some out.")
    points = points[(points < ref).all(axis=1)]
    if not len(points):
        return 0.0
    if len(ref) == 1:
        return float(ref[0] - points.min())
    if len(ref) == 2:
        area, top = 0.0, float(ref[1])
        for x, y in points[np.lexsort((points[:, 1], points[:, 0]))]:
            if y < top:
                area += (ref[0] - x) * (top - y)
                top = y
        return float(area)
    points = points[np.argsort(points[:, 2], kind="stable")]
    depths = np.diff(np.append(points[:, 2], ref[2]))
    return sum(float(d) * hypervolume(points[: i + 1, :2], ref[:2].tolist()) for i, d in enumerate(depths) if d > 0)


class ParetoFront:
    """Evaluations of all rungs and the fronts among them. The order of the answers does not depend on the order of adding.

    ``objectives``: keys of ``Evaluation.values`` or ``.costs``; the first is the fitness. Methods take a rung; by default it
    is the highest that has evaluations.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        if not objectives:
            raise UsageError("A front needs at least one objective, for example Objective('loss').")
        self.objectives = tuple(objectives)
        self._rungs: dict[Fidelity, dict[Plan, Evaluation]] = {}

    def add(self, evaluations: Iterable[Evaluation]) -> None:
        """Take evaluations in; a plan that is judged again on the same rung replaces the earlier one."""
        for evaluation in evaluations:
            self._rungs.setdefault(evaluation.fidelity, {})[evaluation.plan] = evaluation

    @property
    def fidelity(self) -> Fidelity:
        """The highest rung that has evaluations; ``full`` while there are none."""
        return next((rung for rung in reversed(FIDELITIES) if rung in self._rungs), "full")

    def evaluations(self, fidelity: Fidelity | None = None) -> list[Evaluation]:
        """All evaluations of one rung, ordered by objectives and plan."""
        found = self._rungs.get(fidelity or self.fidelity, {}).values()
        return sorted(found, key=lambda e: (*self._key(e), e.plan))

    def at(self, fidelity: Fidelity | None = None, *, feasible: bool = True) -> list[Evaluation]:
        """The non-dominated evaluations of one rung, the best fitness first.

        With ``feasible=False`` those that miss a budget count too: the whole trade-off from dense on.
        """
        found = [e for e in self.evaluations(fidelity) if (e.feasible if feasible else self._finite(e))]
        return [found[i] for i in non_dominated(self.points(found))] if found else []

    def best(self, budgets: Sequence[Budget] | None = None, fidelity: Fidelity | None = None) -> Evaluation | None:
        """The evaluation that holds the budgets with the best fitness, or ``None``.

        ``budgets`` (absolute) replace the ones the evaluations were judged by. When all of them are on quality, the cheapest
        one by the first cost objective is the best.
        """
        found = [e for e in self.evaluations(fidelity) if self._finite(e) and self._violation(e, budgets) <= 0]
        cost = next((o for o in self.objectives if found and o.key in found[0].costs), None)
        if budgets and cost is not None and all(METRICS[b.metric].quality for b in budgets):
            return min(found, key=lambda e: (self._minimized(e, cost), self._key(e), e.plan), default=None)
        return found[0] if found else None

    def nearest(self, budgets: Sequence[Budget] | None = None, fidelity: Fidelity | None = None) -> Evaluation | None:
        """The evaluation that misses the budgets by least; :meth:`best` when they can be held."""
        best = self.best(budgets, fidelity)
        if best is not None:
            return best
        found = [e for e in self.evaluations(fidelity) if self._finite(e)]
        return min(found, key=lambda e: (self._violation(e, budgets), self._key(e), e.plan), default=None)

    def knee(self, fidelity: Fidelity | None = None) -> Evaluation | None:
        """The front's point farthest below the plane through its extremes, objectives scaled to 0..1 (Das 1999)."""
        front = self.at(fidelity)
        if not front:
            return None
        points = self.points(front)
        span = np.ptp(points, axis=0)
        scaled = (points - points.min(axis=0)) / np.where(span > 0, span, 1.0)
        return front[int(np.argmin(scaled.sum(axis=1)))]

    def hypervolume(self, reference: Sequence[float], fidelity: Fidelity | None = None) -> float:
        """Volume between the feasible front and ``reference``, which has one number an objective, in its own direction."""
        if len(reference) != len(self.objectives):
            raise UsageError(
                f"A reference point has one number an objective: {len(self.objectives)} are needed, got {len(reference)}."
            )
        signs = [-1.0 if o.direction == "maximize" else 1.0 for o in self.objectives]
        return hypervolume(self.points(self.at(fidelity)), [s * r for s, r in zip(signs, reference, strict=True)])

    def points(self, evaluations: Sequence[Evaluation]) -> FloatArray:
        """Objectives of evaluations, turned so that all are minimized.  # (n, n_objectives)"""
        return np.array([self._key(e) for e in evaluations], float).reshape(len(evaluations), len(self.objectives))

    def _minimized(self, evaluation: Evaluation, objective: Objective) -> float:
        try:
            value = evaluation[objective.key]
        except KeyError:
            known = ", ".join(sorted([*evaluation.values, *evaluation.costs]))
            raise UsageError(f"Objective {objective.key!r} is not among what was judged: {known}.") from None
        value = -value if objective.direction == "maximize" else value
        return math.inf if math.isnan(value) else value

    def _key(self, evaluation: Evaluation) -> tuple[float, ...]:
        return tuple(self._minimized(evaluation, o) for o in self.objectives)

    def _finite(self, evaluation: Evaluation) -> bool:
        return all(math.isfinite(v) for v in self._key(evaluation)) and math.isfinite(
            evaluation.values.get("loss", 0.0)
        )

    def _violation(self, evaluation: Evaluation, budgets: Sequence[Budget] | None) -> float:
        if budgets is None:
            return evaluation.violation
        total = 0.0
        for budget in budgets:
            try:
                total += budget.violation(evaluation[budget.key])
            except KeyError:
                known = ", ".join(sorted([*evaluation.values, *evaluation.costs]))
                raise UsageError(
                    f"Budget {str(budget)!r} is on something that was not judged; known: {known}."
                ) from None
        return total
