"""``amc``: a policy learns one keep ratio a site by DDPG (AMC, He et al. 2018).

An episode walks through the sites; the actor sees AMC's state and gives an action in [0, 1], which the action wall (``wall.py``)
turns into a level, so that every plan holds the limits on costs and uses them up. The plan is judged once, at ``full``, and its
reward goes to all steps. What AMC's release gets wrong is put right: the replay holds the action that was executed, after the
wall and rounding; costs are the tables' own, coupled sites and measured latency included; no plan is paid twice.

Constants are AMC's but for the warm-up: 25 random episodes instead of 100, because a search here has hundreds of evaluations, not
800. A controller does not know how many it will get.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Literal

import numpy as np

from autocompress.search.base import CONTROLLERS, Asking, BaseController, fitness
from autocompress.search.states import States
from autocompress.search.tables import FloatArray
from autocompress.search.wall import Choices, Walk, Wall, nearest
from autocompress.types import METRICS, Evaluation, IntArray, Plan

if TYPE_CHECKING:  # a search that learns nothing loads no torch
    from autocompress.search.policy import Ddpg

Reward = Literal["hard budget", "trade", "guaranteed"]


@CONTROLLERS.register("amc")
class Amc(BaseController):
    """DDPG under an action wall; any number of budgets on any costs.

    ``reward``: one of AMC's three, by default the one that fits the budgets. ``hard budget``: minus the loss, the wall does the
    rest. ``trade``: minus error times log cost, when no budget binds. ``guaranteed``: what is saved, once the quality budgets
    hold. A loss counts as ``loss / (loss + m)``, an error between 0 and 1, where ``m`` is the median of the warm-up.
    """

    reward: Reward | None = None
    warmup = 25
    sigma, decay = 0.5, 0.95
    widen = 1.5
    """Factor of the noise each time in a row that only known plans come out."""
    patience = 100
    """Plans in a row that are known already, under ever wider noise, for each target: the search is over."""
    dense_error = 0.1
    """``trade`` needs an error of the original, as one that has none is never worth compressing."""

    def _search(self) -> Asking:
        self._prepare()
        episode, known = 0, 0
        while known < self.patience * len(self.walls):
            target = self._target(episode) if not known else self.rng.randrange(len(self.walls))
            first = episode == 0 and not known
            plan = self._first(target) if first else self._walk(target, self._noise(episode, known))
            plan = self.space.effective(plan)
            fresh = ("full", plan) not in self.seen
            if fresh or known == 0:
                answer = (yield from self._judge([plan], "full"))[0]
                self._learn(target, answer)
                episode += 1
            known = 0 if fresh else known + 1
            if fresh:
                yield from self._between(episode)

    def _prepare(self) -> None:
        from autocompress.search.policy import Ddpg

        self.choices = Choices(self.space, self.tables)
        self.states = States(self.choices)
        self.free = bool((self.choices.dense_cost <= self.limits.limit).all())
        quality = any(METRICS[budget.metric].quality for budget in self.budgets)
        self.kind: Reward = self.reward or ("hard budget" if not self.free else "guaranteed" if quality else "trade")
        self.walls = [Wall(self.choices, limit, fill=self._fills()) for limit in self._limits()]
        n = max(len(self.choices.sites), 1)
        self.agent: Ddpg = Ddpg(self.states.n + self._n_extra(), 100 * n, self.seed)
        self.waiting: list[tuple[int, Evaluation]] = []
        self.scales: list[float] | None = None

    def _limits(self) -> list[IntArray]:
        """The limits of each wall; an episode has one of them as its target."""
        return [self.limits.limit]

    def _fills(self) -> bool:
        return self.kind == "hard budget"

    def _target(self, episode: int) -> int:
        return 0

    def _n_extra(self) -> int:
        """Numbers that a state has beyond AMC's."""
        return 0

    def _seen_by(self, wall: Wall, states: FloatArray) -> FloatArray:
        """States as the policy sees them.  # (n, states.n + _n_extra())"""
        return states

    def _between(self, episode: int) -> Asking:
        """What else is asked after an episode."""
        yield from ()

    def _noise(self, episode: int, known: int) -> float | None:
        """Sigma of the actions; ``None`` for the uniform ones of the warm-up, and where noise has become as wide as that."""
        sigma = max(self.sigma * self.decay ** (episode - self.warmup), 0.01) * self.widen ** min(known, 30)
        return None if episode < self.warmup or sigma > 10 else sigma

    def _first(self, target: int) -> Plan:
        """The first episode keeps the same share everywhere: what a policy has to beat."""
        wall = self.walls[target]
        if not self._fills():
            return self._walk(target, None)
        walk = Walk(wall)
        walk.follow(self.choices.uniform(wall.limit))
        return walk.plan()

    def _walk(self, target: int, sigma: float | None) -> Plan:
        """One episode: the actor's actions with noise (0: without), or uniform ones.

        Without a wall on one side uniform actions would break every network, so those episodes draw how much they keep at least.
        """
        from autocompress.search.policy import truncated_normal

        wall = self.walls[target]
        walk = Walk(wall)
        least = 0.0 if self._fills() else self.rng.random()
        while not walk.done:
            site = self.choices.sites[walk.step]
            if sigma is None:
                action = least + (1 - least) * self.rng.random()
            else:
                state = self.states.at(walk.step, walk.witness)
                action = self.agent.act(self._seen_by(wall, state[None])[0])
                if sigma:
                    action = truncated_normal(action, sigma, self.rng.random())
            walk.take(nearest(self.choices.orders[site], self.choices.at(action, site), walk.allowed()))
        return walk.plan()

    def _learn(self, target: int, answer: Evaluation) -> None:
        """Replay an episode; the warm-up's are kept until its losses give the scale."""
        if self.scales is None:
            self.waiting.append((target, answer))
            if len(self.waiting) == self.warmup:
                self.scales = self._loss_scales()
                for waiting in self.waiting:
                    self._observe(*waiting)
            return
        self._observe(target, answer)
        if self.choices.sites:
            self.agent.update(self.rng, len(self.choices.sites))

    def _loss_scales(self) -> list[float]:
        """The median loss of the warm-up, for each target."""
        everything = [fitness(e) for _, e in self.waiting if math.isfinite(fitness(e))]
        found = []
        for target in range(len(self.walls)):
            own = [fitness(e) for t, e in self.waiting if t == target and math.isfinite(fitness(e))] or everything
            found.append(max(median(own), 1e-12) if own else 1.0)
        return found

    def _observe(self, target: int, answer: Evaluation) -> None:
        plan, sites = answer.plan, self.choices.sites
        if not sites:
            return
        actions = np.array([self.choices.action(s, plan[s]) for s in sites])
        states = self._seen_by(self.walls[target], self.states.along(plan))
        self.agent.observe(states, actions, self._reward(target, answer))

    def _reward(self, target: int, answer: Evaluation) -> float:
        """Within [-2, 1]; a broken plan has the error 1."""
        assert self.scales is not None  # the warm-up is over
        loss, miss = fitness(answer), min(answer.violation, 1e9)
        error = max(loss, 0.0) / (max(loss, 0.0) + self.scales[target]) if math.isfinite(loss) else 1.0
        share = self.tables.share(answer.plan)
        if self.kind == "guaranteed":
            return 1 - share if answer.feasible else -(miss / (1 + miss) if math.isfinite(loss) else 1.0)
        if self.kind == "trade":
            floor = float((self.choices.floor / np.maximum(self.choices.dense_cost, 1)).mean())
            unit = 1 + math.log(1 / max(floor, 1e-6))
            return -(self.dense_error + error) * (1 + math.log(max(share, 1e-6) / max(floor, 1e-6))) / unit
        missed = self._quality_miss(answer)
        return -error - missed / (1 + missed)
