"""``auto``: a model of what plans lose, learned while searching; other examples for each plan; the whole front at once.

A few plans that are plain to see are compared, and plans near the best of them are judged, each on another slice of the search
split, so that no slice can be overfitted. A Gaussian process over plans (``process``) learns from that and predicts the loss of
any plan over all slices. Candidates are mutations of the plans that it likes best, climbed uphill on its predictions; a few are
judged, half of them the likeliest, half the most promising if what is not known turned out well. What it likes best of all that
was judged goes to ``full``. The search is over when for a dozen generations no gain above a thousandth of the loss was in sight.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Generator, Iterable, Iterator

import numpy as np

from autocompress.search.base import CONTROLLERS, Asking, Judged, fitness
from autocompress.search.evolution import Evolution
from autocompress.search.process import Process
from autocompress.search.random_ import TINY
from autocompress.search.tables import all_plans, switch
from autocompress.types import Evaluation, IntArray, Plan, Query

NOISE = 1e-3
"""A gain of this share of a loss is nothing: other images would say otherwise."""
FORMATS = 8
"""The formats that most layers offer: each makes a start."""
SAMPLED = (8, 24, 48)
"""One-site plans, at most one a site, that are judged first where layers choose formats: after so many, what the table model
makes of them is judged, too."""
FILLS = 8
"""Switches that use up what a candidate leaves of the limits."""


@CONTROLLERS.register("auto")
class Auto(Evolution):
    """The default controller: any budgets on any costs, quality budgets by the violation that comes back."""

    offspring = 6
    goal_share = 0.85
    initial = 24
    """Plans judged before the first prediction, one to four mutations away from the start."""
    candidates = 64
    """Mutations a round."""
    climbs = (4, 16)
    """Rounds of mutation of the candidates that the model likes best, before any of them is judged: fewest and most. They
    become more as more is known: a model that knows little is not to be followed far."""
    known_a_climb = 25
    """Plans judged for each round."""
    parents = 6
    worth = 18
    """Plans judged on a slice for one at ``full``: that rung then costs a third of the time."""
    idle_after = 12
    """Generations without a gain above ``NOISE`` in sight after which the search is over."""

    def _search(self) -> Asking:
        self._prepare()
        self.pool = all_plans(self.space) if self.space.size <= TINY else None
        self.parts = self._turns()
        yield from self._begin()
        yield from self._bisect(self.one_site.losses())
        limit = self._pick() if self.free else self.targets[0]
        yield from self._judge(self._near(self._parent(limit), limit), "slice", self.parts)
        since = 0
        while self._goes_on():
            since += len((yield from self._generation(limit, self.parts)))
            if since >= self.worth:
                since = 0
                yield from self._promote(limit)
            limit = self._pick()
        for limit in self.targets:
            yield from self._promote(limit)

    def _prepare(self) -> None:
        super()._prepare()
        self.idle = self.quiet = 0  # generations since a plan was found, and since a gain was in sight

    def _goes_on(self) -> bool:
        """Whether new plans are still found and gains in sight."""
        return self.idle < self.patience and self.quiet < self.idle_after

    def _generation(self, limit: IntArray, parts: Iterable[int] = itertools.repeat(0)) -> Judged:
        """Candidates within a limit, judged at the raced rung."""
        children, gain = self._propose(self._model(), limit)
        self.idle = 0 if children else self.idle + 1
        self.quiet = self.quiet + 1 if gain <= NOISE else 0
        return (yield from self._judge(children, self.raced, parts))

    def _turns(self) -> Iterator[int]:
        """The slices, one after the other."""
        while True:
            yield from range(len(self._dense_losses()))

    def _dense_losses(self) -> tuple[float, ...]:
        """Losses of the dense plan on each slice; on the first alone, if the evaluator knows of no other."""
        dense = self.seen.get(("full", self.space.dense))
        known = dense.slices if dense is not None else ()
        return tuple(loss if math.isfinite(loss) else 0.0 for loss in known) or (self._zero(),)

    # ------------------------------------------------------------ where to begin

    def _begin(self) -> Asking:
        """A plan for whoever stops early, the original's losses, the best plan that is plain to see, and the best ones known."""
        holds = self.tables.fits([self.space.dense], self.targets[0])[0]
        plain = self._plain(self.targets[1 if holds and len(self.targets) > 1 else 0])
        yield from self._judge(plain[:1], "full")
        [dense] = yield from self._judge([self.space.dense], "full")
        if not dense.slices:
            yield from self._judge([self.space.dense], "slice")
        found = yield from self._judge(plain, "slice")
        known = [e for e in self.known if e.fidelity == "full" and self.tables.fits([e.plan], self.targets[0])[0]]
        best = [*_by_loss(found)[:1], *_by_loss(known)[: self.promoted]]
        yield from self._judge([e.plan for e in best], "full")
        if any(site.kind == "layer" for site in self.space.sites):
            yield from self._sample()

    def _sample(self) -> Asking:
        """Where layers choose formats, no plan that is plain to see is a good start: some one-site losses, and what the table
        model makes of them."""
        zero = self._dense_losses()[0]
        plans = [plan for plans in self.one_site.passes()[:1] for plan in plans]
        for start, end in itertools.pairwise((0, *SAMPLED)):
            for evaluation in (yield from self._judge(plans[start:end], "slice")):
                self.one_site.record(evaluation.plan, fitness(evaluation) - zero)
            if plans[start:end]:
                yield from self._ask_targets(self.one_site.losses(), [0], quick=True)

    def _plain(self, limit: IntArray) -> list[Plan]:
        """The mildest plans within limits that go equally far at every site, or have one format and go equally far elsewhere;
        and the optimum of the table model before anything was measured."""
        space, ladder = self.space, self.one_site.ladder()
        layers = [s for s, site in enumerate(space.sites) if site.kind == "layer"]
        offered = [{level.hash: i for i, level in enumerate(space.levels[s]) if i} for s in layers]
        ladders = [ladder]
        for chosen, n in Counter(h for hashes in offered for h in hashes).most_common(FORMATS):
            if 2 * n >= len(layers):
                at = {s: hashes[chosen] for s, hashes in zip(layers, offered, strict=True) if chosen in hashes}
                ladders.append([tuple(at.get(s, level) for s, level in enumerate(plan)) for plan in ladder])
        inside = [[p for p, ok in zip(plans, self.tables.fits(plans, limit), strict=True) if ok] for plans in ladders]
        solved = self._solve(self.one_site.losses(), 0, quick=True)
        found = [*(plans[0] for plans in inside if plans), *([solved] if solved is not None else [])]
        return list(dict.fromkeys(map(space.effective, found)))

    def _near(self, start: Plan, limit: IntArray) -> list[Plan]:
        """Plans around the start, within limits."""
        found: dict[Plan, None] = {}
        for _ in range(20 * self.initial):
            plan = start
            for _ in range(self.rng.randint(1, 4)):
                plan = self._mutate(plan)
            found.update(dict.fromkeys(self._fresh([self.space.effective(plan)], limit)))
            if len(found) >= self.initial:
                break
        return list(found)

    # ------------------------------------------------------------ candidates

    def _model(self) -> Process:
        """The process that knows all that was judged, and what earlier searches have."""
        dense = self._dense_losses()
        observed: list[dict[Plan, float]] = [{} for _ in dense]
        for e in (*self.known, *self.seen.values()):
            if e.fidelity == "slice":
                losses = {e.part: fitness(e)}
            elif e.fidelity == "full":
                losses = dict(enumerate(e.slices))
            else:
                continue
            for part, loss in losses.items():
                if math.isfinite(loss):
                    observed[part][e.plan] = loss - dense[part]
        model = Process(self.space, self.orders, self.errors)
        model.fit(observed)
        return model

    def _propose(self, model: Process, limit: IntArray) -> tuple[list[Plan], float]:
        """Plans to judge on a slice, and the gain in sight as a share of the loss."""
        starts = self._best_known(model, limit) or [self._parent(limit)]
        found = self._candidates(model, limit, starts)
        if not found:
            return [], 0.0
        loss, hope = model.predict(found)
        likely, hoped = ([found[i] for i in np.argsort(values, kind="stable")] for values in (loss, hope))
        chosen = dict[Plan, None]()
        for plans, n in ((likely, self.offspring // 2), (hoped, self.offspring)):
            for plan in plans:
                if len(chosen) < n:
                    chosen[self._filled(model, plan, limit)] = None
        best = float(model.predict(starts[:1])[0][0])
        return list(chosen), (best - float(hope.min())) / max(best, 1e-12)

    def _filled(self, model: Process, plan: Plan, limit: IntArray) -> Plan:
        """The plan, and on top of it the milder switches that the model likes best, for what the limits leave."""
        filled = plan
        for _ in range(FILLS if self.pool is None else 0):
            orders = zip(filled, self.orders, strict=True)
            milder = [switch(filled, s, o[o.index(v) - 1]) for s, (v, o) in enumerate(orders) if v != o[0]]
            fresh = self._fresh([self.space.effective(p) for p in milder], limit)
            if not fresh:
                break
            losses = model.predict([filled, *fresh])[0]
            if losses[1:].min() > losses[0]:
                break
            filled = fresh[int(losses[1:].argmin())]
        return filled

    def _best_known(self, model: Process, limit: IntArray) -> list[Plan]:
        """The plans within limits that the model likes best, of all that were judged."""
        plans = list(dict.fromkeys(plan for _, plan in self.seen))
        return self._liked(model, plans, limit)[: self.parents]

    def _liked(self, model: Process, plans: list[Plan], limit: IntArray) -> list[Plan]:
        """Those within limits, the best predicted first."""
        inside = [p for p, fits in zip(plans, self.tables.fits(plans, limit), strict=True) if fits]
        return [inside[i] for i in np.argsort(model.predict(inside)[0], kind="stable")] if inside else []

    def _candidates(self, model: Process, limit: IntArray, starts: list[Plan]) -> list[Plan]:
        """New plans within the limits: mutations of the starts, then of those that the model likes best."""
        if self.pool is not None:
            return self._fresh(self.pool, limit)
        first, found = starts[0], dict[Plan, float]()
        fewest, most = self.climbs
        for _ in range(min(max(len(self.seen) // self.known_a_climb, fewest), most)):
            each = max(self.candidates // len(starts), 4)
            raw = dict.fromkeys(self.space.effective(self._mutate(s)) for s in starts for _ in range(each))
            fresh = [p for p in self._fresh(list(raw), limit) if p not in found]
            if fresh:
                found.update(zip(fresh, model.predict(fresh)[0].tolist(), strict=True))
            ranked = sorted(found, key=lambda p: (found[p], p))
            starts = [*ranked[: self.parents], first]
        return sorted(found)

    def _promote(self, limit: IntArray) -> Generator[list[Query], list[Evaluation], None]:
        """Of all plans within limits that were judged on a slice alone, the one that the model likes best goes to ``full``."""
        plans = [p for rung, p in self.seen if rung == "slice" and ("full", p) not in self.seen]
        yield from self._judge(self._liked(self._model(), plans, limit)[:1], "full")


def _by_loss(evaluations: list[Evaluation]) -> list[Evaluation]:
    return sorted(evaluations, key=lambda e: (fitness(e), e.plan))
