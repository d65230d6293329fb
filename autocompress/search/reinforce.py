"""``reinforce``: recurrent policies remove blocks, then shrink what is left (N2N learning, Ashok et al. 2018).

Stage 1: a bidirectional LSTM reads all blocks and keeps or drops each. Stage 2: an autoregressive LSTM chooses a shrink factor
for each other site, reading the last one. Both learn by REINFORCE from ``R = C (2 - C) * quality``, where C is the share of the
cost that is saved; -1 for a plan that is invalid: broken, over a quality budget, or over a limit on a cost. The last is known
from the tables, so nothing is paid for it; it teaches while few plans fit, later it would drown what rewards say.

Unlike N2N's release each rollout is credited with its own reward, not with its batch's mean; a budget on costs caps C, as saving
more than was asked earns nothing, and a plan below it is filled up, with what was executed learnt; no plan is paid twice; each
round of rollouts is used for several steps. The policies read sites in numbers that mean the same in every space, so that one
trained on a small network starts the search of a large one: ``policy_state()``, ``load_policy()``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from autocompress.errors import UsageError
from autocompress.search.base import CONTROLLERS, Asking, BaseController, fitness
from autocompress.search.states import N_FEATURES, describe
from autocompress.search.tables import FloatArray, switch
from autocompress.search.wall import Choices, Walk, Wall
from autocompress.types import Budget, Costs, Evaluation, Plan, Query, SearchSpace

if TYPE_CHECKING:  # a search that learns nothing loads no torch
    from autocompress.search.policy import Recurrent

Rollouts = Generator[list[Query], list[Evaluation], None]


@CONTROLLERS.register("reinforce")
class Reinforce(BaseController):
    """N2N's two stages under any budgets. ``factors``: shrink factors from 1 (dense) to 0 (the most saving level)."""

    rollouts = 5
    """Plans judged between two updates, as in N2N."""
    draws = 32
    """Sequences drawn for them: the invalid and known ones among these teach too, and cost nothing."""
    updates = 8
    """Gradient steps a round; N2N takes one, and trains a network for each rollout."""
    factors = 11
    removal_rounds = 4
    drop_chance = 0.25
    spread = 0.3
    """Standard deviation of the first shrink factors around the uniform plan that holds the limits."""
    patience = 20
    """Rounds in a row, at rising temperature, without a new plan: the search is over."""

    def __init__(self, space: SearchSpace, costs: Costs, budgets: Sequence[Budget], seed: int = 0) -> None:
        self._given: dict[str, Any] | None = None
        self._policies: dict[str, Recurrent] = {}
        super().__init__(space, costs, budgets, seed)

    def policy_state(self) -> dict[str, Any]:
        """What was learnt, as JSON values, for :meth:`load_policy` of a search in another space."""
        if not self._policies:
            raise UsageError("A policy is learnt by searching: ask and tell first.")
        return {name: policy.state() for name, policy in self._policies.items()}

    def load_policy(self, state: Mapping[str, Any]) -> None:
        """Start from a policy that was learnt in another space; before the first :meth:`ask`."""
        if self._told or self._asked:
            raise UsageError("A policy is loaded before the first ask(); this search has begun.")
        for name, policy in self._make_policies().items():
            policy.load(state.get(name, {}))
        self._given = dict(state)

    def state_dict(self) -> dict[str, Any]:
        """As every controller's, with the policy that the search started from."""
        return {**super().state_dict(), "policy": self._given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._given = state.get("policy")
        super().load_state_dict(state)

    def _make_policies(self) -> dict[str, Recurrent]:
        from autocompress.search.policy import Recurrent

        return {
            "removal": Recurrent(N_FEATURES, 2, False, self.seed),
            "shrinkage": Recurrent(N_FEATURES, self.factors, True, self.seed + 1),
        }

    def _search(self) -> Asking:
        self._prepare()
        self.dense_loss = fitness((yield from self._judge([self.space.dense], "full"))[0])
        self.dense_loss = self.dense_loss if math.isfinite(self.dense_loss) else 0.0
        blocks = [s for s in self.choices.sites if self.space.sites[s].kind == "block"]
        dropped: dict[int, int] = {}
        if blocks:
            dropped = yield from self._remove(blocks)
        shrunk = [s for s in self.choices.sites if s not in blocks]
        if shrunk:
            yield from self._shrink(shrunk, dropped)

    def _prepare(self) -> None:
        self.choices = Choices(self.space, self.tables)
        self.rows = describe(self.choices)
        self._policies = self._make_policies()
        for name, policy in self._policies.items():
            if self._given is not None:
                policy.load(self._given[name])
        self.free = bool((self.choices.dense_cost <= self.limits.limit).all())
        self.wall = Wall(self.choices, self.limits.limit, fill=not self.free)
        dense = np.maximum(self.choices.dense_cost, 1)
        self.most_saved = 1.0 if self.free else 1 - float(np.minimum(self.wall.limit / dense, 1).mean())
        self.scale: float | None = None

    def _remove(self, blocks: list[int]) -> Generator[list[Query], list[Evaluation], dict[int, int]]:
        """Stage 1: which blocks to drop, the other sites at the mildest uniform level that then holds the limits."""
        rows = self.rows[[self.choices.sites.index(s) for s in blocks]]
        prior = np.tile([0.0, math.log(self.drop_chance / (1 - self.drop_chance))], (len(blocks), 1))

        def levels(actions: Sequence[int]) -> dict[int, int]:
            return {s: self.choices.orders[s][-1 if a else 0] for s, a in zip(blocks, actions, strict=True)}

        def decode(actions: Sequence[int]) -> Plan:
            return self.choices.uniform(self.wall.limit, levels(actions))

        for _ in range(self.removal_rounds):
            yield from self._round(self._policies["removal"], rows, prior, decode, 1.0)
        judged = [e for (rung, plan), e in self.seen.items() if rung == "full" and plan != self.space.dense]
        if not judged:
            return {}
        best = max(judged, key=lambda e: (self._reward(e), [-level for level in e.plan]))
        return {s: best.plan[s] for s in blocks}

    def _shrink(self, sites: list[int], dropped: Mapping[int, int]) -> Rollouts:
        """Stage 2: a shrink factor for every other site, until no new plan comes out."""
        rows = self.rows[[self.choices.sites.index(s) for s in sites]]
        start = self.choices.uniform(self.wall.limit, dropped) if not self.free else self.space.dense
        centre = float(np.mean([self._factor(s, start[s]) for s in sites])) if not self.free else 0.1
        base = self.space.dense
        for site, level in dropped.items():
            base = switch(base, site, level)

        def decode(actions: Sequence[int]) -> Plan:
            plan = list(base)
            for s, action in zip(sites, actions, strict=True):
                plan[s] = self.choices.orders[s][self.choices.at(1 - action / (self.factors - 1), s)]
            return tuple(plan)

        temperature, idle = 1.0, 0
        while idle < self.patience:
            prior = np.tile(-(((np.linspace(0, 1, self.factors) - centre) / self.spread) ** 2) / 2, (len(sites), 1))
            before = len(self.seen)
            rewards = yield from self._round(self._policies["shrinkage"], rows, prior, decode, temperature, sites)
            found = len(self.seen) > before
            temperature, idle = (max(temperature / 1.3, 1.0), 0) if found else (min(temperature * 1.3, 50.0), idle + 1)
            if self.free and max(rewards, default=0.0) <= -1:  # everything fails the quality budget: milder
                centre /= 2

    def _factor(self, site: int, level: int) -> float:
        return 1 - self.choices.action(site, level)

    def _round(
        self,
        policy: Recurrent,
        rows: FloatArray,
        prior: FloatArray,
        decode: Callable[[Sequence[int]], Plan],
        temperature: float,
        sites: Sequence[int] = (),
    ) -> Generator[list[Query], list[Evaluation], list[float]]:
        """Draw, judge what is new, learn from it and from what is known: the rewards."""
        drawn = policy.sample(rows, prior, self.draws, self.rng, temperature)
        plans = [decode(actions) for actions in drawn]
        fits = self.tables.fits(plans, self.wall.limit)
        if sites and not any(fits):  # a tight budget: what was drawn is moved inside
            plans[0], fits[0] = self._inside(plans[0]), True
        if sites and self.wall.fill:
            plans = [self.wall.filled(plan, sites) if ok else plan for plan, ok in zip(plans, fits, strict=True)]
        for i in range(len(plans)):
            if fits[i] and sites:  # the executed actions, as in AMC
                drawn[i] = [round(self._factor(s, plans[i][s]) * (self.factors - 1)) for s in sites]
        plans = [self.space.effective(plan) for plan in plans]
        first = {plan: i for i, plan in reversed(list(enumerate(plans)))}
        inside = sorted(i for plan, i in first.items() if fits[i])
        new = [i for i in inside if ("full", plans[i]) not in self.seen][: self.rollouts]
        old = [i for i in inside if ("full", plans[i]) in self.seen][: self.rollouts]
        bad = [i for i in range(len(plans)) if not fits[i]] if len(inside) < self.rollouts else []
        answers = yield from self._judge([plans[i] for i in new + old], "full")
        if self.scale is None:
            excess = [fitness(e) - self.dense_loss for e in answers if math.isfinite(fitness(e))]
            self.scale = max(median(excess), 1e-12) if excess else None
        rewards = [self._reward(e) for e in answers] + [-1.0] * len(bad)
        if rewards:
            policy.reinforce(rows, prior, [drawn[i] for i in new + old + bad], rewards, self.updates)
        return rewards

    def _inside(self, plan: Plan) -> Plan:
        """The plan, each level moved to the nearest from which the limits can still be held."""
        walk = Walk(self.wall)
        walk.follow(plan)
        return walk.witness

    def _reward(self, answer: Evaluation) -> float:
        """N2N's ``C (2 - C) * quality``; quality is 1 for the original and one half at the first plans' median loss."""
        loss = fitness(answer)
        if self._quality_miss(answer) > 0 or not math.isfinite(loss):
            return -1.0
        saved = 1 - self.tables.share(answer.plan)
        c = min(max(saved, 0.0), self.most_saved)
        return c * (2 - c) / (1 + max(loss - self.dense_loss, 0.0) / (self.scale or 1.0))
