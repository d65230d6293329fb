"""``gradient``: levels as probabilities, descended along the gradient of the loss under the expected cost.

DiffRate (Chen et al. 2023) and the l1/l2 latency surrogates train one soft choice a layer against a differentiable cost. Here
the choice is a distribution over a site's levels, the loss is that of the network that mixes them (``SoftQuery``), and the cost
is the expected one under the cost tables. The descent is entropic, with annealing: ``p ~ exp(-(G + prices * costs) / T)``, where
``G`` is a moving average of gradients and the prices are Lagrange multipliers, found anew after every step so that the expected
costs hold the limits. Adam on logits, as in DiffRate, moves sites that hardly matter as far as those that do; it ended worse.

A mixture is no plan, and rounding it is not what makes a good one: the table model with the gradients as losses is solved, and
its plans are judged at ``full``. Then gradients are taken on the way from the distribution to the best plan, where they say what
its neighbours would lose.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import cast

import numpy as np

from autocompress.search.base import CONTROLLERS, Asking, fitness
from autocompress.search.exact import TableSearch
from autocompress.search.expected import expected_cost
from autocompress.search.surrogate import refine
from autocompress.search.tables import UNLIMITED, FloatArray
from autocompress.types import Evaluation, IntArray, Plan, Query, SoftEvaluation, SoftQuery, best_levels


@CONTROLLERS.register("gradient")
class Gradient(TableSearch):
    """A descent of ``steps`` mixtures towards the goal, gradients around the best plan, then these as the losses of all targets;
    ends as ``exact`` does.

    ``warm``, ``cold``: first and last temperature, in standard deviations of the first gradient. ``memory``: share of a new
    gradient in the average. ``mix``: how far a step goes. Every ``every`` steps the goal is solved with the last gradient and
    with the average. ``way``: mixtures around the best plan, by its share in them; ``patience``: rounds of them without a gain.
    """

    steps, every = 24, 4
    way, patience = (0.3, 0.6, 0.9), 4
    warm, cold = 0.3, 0.03
    memory, mix = 0.3, 0.5

    def _search(self) -> Asking:
        self._prepare()
        yield from self._ask_targets(self.one_site.losses(), [0], quick=True)
        losses = yield from self._descend(self.targets[1 if self.free and self.limits.limited else 0])
        losses = yield from self._improve(losses)
        yield from self._ask_targets(losses, range(len(self.targets)))
        yield from self._bisect(losses)
        yield from self._around(losses)

    def _descend(self, limit: IntArray) -> Generator[list[Query], list[Evaluation], FloatArray]:
        """The average of the gradients at the end of the descent.  # (n_options,)"""
        average = self.one_site.losses()
        if self.space.size == 1:
            return average
        scale = float(np.std(average)) or 1.0
        p = self._held(average, scale, self._uniform(), limit)
        for step in range(self.steps):
            answer = yield from self._slope(p)
            gradient = self._relative(answer)
            if not np.isfinite(fitness(answer)):  # broken: back towards dense
                prior = self.one_site.losses()
                gradient = prior * (2 * scale / (float(np.std(prior)) or 1.0))
            if step == 0:
                average, scale = gradient, float(np.std(gradient)) or scale
            average = average + self.memory * (gradient - average)
            temperature = scale * self.warm * (self.cold / self.warm) ** (step / max(self.steps - 1, 1))
            after = p + self.mix * (self._held(average, temperature, p, limit) - p)
            if (step + 1) % self.every == 0:
                yield from self._round(gradient, limit, after)
                yield from self._round(average, limit, after)
            if np.abs(after - p).max() < 1e-9:
                break
            p = after
        return average

    def _improve(self, losses: FloatArray) -> Generator[list[Query], list[Evaluation], FloatArray]:
        """Gradients on the way from the distribution to the best plan, corrected by what whole plans lost, while that gains.

        Returns the last losses.  # (n_options,)
        """
        tables, limit, idle = self.tables, self.targets[0], 0
        best, p = self._incumbent(), self._uniform()
        while best is not None and not self.free and idle < self.patience:
            scale = float(np.std(losses)) or 1.0
            p = self._held(losses, scale * self.warm / 3, p, limit)
            corner = np.zeros(tables.n_options)
            corner[tables.current(best.plan)] = 1.0
            slopes = []
            for share in self.way:
                slopes.append(self._relative((yield from self._slope(share * corner + (1 - share) * p))))
            gradient: FloatArray = np.mean(slopes, axis=0)
            losses = (losses + gradient) / 2
            full = self._finite("full")
            gains = np.array([fitness(e) - fitness(best) for e in full])
            yield from self._round(gradient, limit, corner)
            yield from self._round(refine(tables, losses, best.plan, [e.plan for e in full], gains), limit, corner)
            after = self._incumbent()
            idle = idle + 1 if after is None or after.plan == best.plan else 0
            best = after
        return losses

    def _relative(self, answer: SoftEvaluation) -> FloatArray:
        """Slopes above those of the dense levels.  # (n_options,)"""
        slopes = np.array(answer.gradient)
        relative: FloatArray = slopes - slopes[self.tables.offsets[:-1]][self.tables.site_of]
        return relative

    def _slope(self, p: FloatArray) -> Generator[list[Query], list[Evaluation], SoftEvaluation]:
        """The loss of a mixture and its gradient."""
        plan = best_levels(p, self.tables.offsets)
        (answer,) = yield [SoftQuery(plan, "slice", probabilities=tuple(p.tolist()))]
        return cast(SoftEvaluation, answer)

    def _round(self, losses: FloatArray, limit: IntArray, p: FloatArray) -> Asking:
        """Judge the best plan of the linearised loss within the limits."""
        start: Plan = best_levels(p, self.tables.offsets)
        plan = self._decide(lambda: self._within(losses, limit, start))
        if plan is not None:
            yield from self._judge([plan], "full")

    def _uniform(self) -> FloatArray:
        return 1 / np.array(self.tables.n_levels, float)[self.tables.site_of]

    def _softmax(self, logits: FloatArray) -> FloatArray:
        """Probabilities that add up to 1 at each site.  # (n_options,) -> (n_options,)"""
        site, first = self.tables.site_of, self.tables.offsets[:-1]
        powers = np.exp(logits - np.maximum.reduceat(logits, first)[site])
        probabilities: FloatArray = powers / np.add.reduceat(powers, first)[site]
        return probabilities

    def _held(
        self, losses: FloatArray, temperature: float, p: FloatArray, limit: IntArray, rounds: int = 3
    ) -> FloatArray:
        """The distribution of least ``losses @ p - temperature * entropy`` whose expected costs hold the limits.

        Costs are linearised around ``p`` and then around what came out.
        """
        prices = np.zeros(len(limit))
        unit = np.where(limit < UNLIMITED, np.maximum(limit, 1), np.inf)
        for _ in range(rounds):
            cost, slope = expected_cost(self.tables, p, best_levels(p, self.tables.offsets))
            slope = slope / unit
            room = 1 - cost / unit + p @ slope  # what p @ slope may be
            for column in [*range(len(limit))] * (2 if len(limit) > 1 else 1):
                prices[column] = self._price(losses, temperature, slope, prices, column, float(room[column]))
            p = self._softmax(-(losses + slope @ prices) / temperature)
        return p

    def _price(
        self, losses: FloatArray, temperature: float, slope: FloatArray, prices: FloatArray, column: int, room: float
    ) -> float:
        """The least price of one cost at which its limit holds, the others' prices given; a large one where none does."""

        def over(price: float) -> bool:
            tried = prices.copy()
            tried[column] = price
            return float(self._softmax(-(losses + slope @ tried) / temperature) @ slope[:, column]) > room

        if not over(0.0):
            return 0.0
        low, high = temperature * 2.0**-20, temperature * 2.0**20
        for _ in range(40):  # to 1 % of the price
            middle = float(np.sqrt(low * high))
            low, high = (middle, high) if over(middle) else (low, middle)
        return high
