"""``conditional``: one policy for every budget (CACP, conditional automated channel pruning, Liu et al. 2020).

AMC's agent with the target in its state. Each episode has another target on the way from dense to the budgets, so the policy
learns all of them at once, and what one target teaches helps the next. Now and then it is asked for a plan of each target,
without noise; with quality budgets alone also for the target half-way between the cheapest plan that holds them and the next
cheaper one that does not.
"""

from __future__ import annotations

import numpy as np

from autocompress.search.amc import Amc
from autocompress.search.base import CONTROLLERS, Asking
from autocompress.search.tables import UNLIMITED, FloatArray, target_ladder
from autocompress.search.wall import Wall
from autocompress.types import METRICS, IntArray, Plan


@CONTROLLERS.register("conditional")
class Conditional(Amc):
    """DDPG conditioned on the target; ``walls[0]`` is the budgets, or the middle of the cost axis when none binds.

    The reward is minus the loss, in units of its target's median. ``n_between``: targets between dense and the budgets.
    """

    n_between = 5
    n_beyond = 3
    """Targets beyond the middle when no budget on a cost binds: the whole axis is the user's."""
    warmup = 30
    read_every = 24
    reward = "hard budget"

    def _limits(self) -> list[IntArray]:
        dense, floor = self.choices.dense_cost, self.choices.floor
        if not self.free:
            return [self.limits.limit, *target_ladder(dense, self.limits.limit, floor, self.n_between, 0)]
        middle = floor + (dense - floor) // 2
        return [middle, *target_ladder(dense, middle, floor, self.n_between, self.n_beyond)]

    def _target(self, episode: int) -> int:
        """Each target once a round, in random order; the first episode is for the budgets."""
        place = episode % len(self.walls)
        if place == 0:
            self.round = list(range(len(self.walls)))
            self.rng.shuffle(self.round)
            if episode == 0:
                self.round.remove(0)
                self.round.insert(0, 0)
        return self.round[place]

    def _n_extra(self) -> int:
        return len(self.choices.dense_cost)

    def _seen_by(self, wall: Wall, states: FloatArray) -> FloatArray:
        share = np.minimum(wall.limit / np.maximum(self.choices.dense_cost, 1), 1.0)
        return np.concatenate([states, np.tile(share, (len(states), 1))], axis=1)

    def _between(self, episode: int) -> Asking:
        if episode < self.warmup or episode % self.read_every:
            return
        plans = [self._walk(target, 0.0) for target in range(len(self.walls))]
        answers = yield from self._judge(plans, "full")
        for target, answer in enumerate(answers):
            self._learn(target, answer)
        if self.free and any(METRICS[b.metric].quality for b in self.budgets):
            yield from self._judge([self._ask_between()], "full")

    def _ask_between(self) -> Plan:
        """The policy's plan half-way between the cheapest good evaluation and the next cheaper bad one."""
        dense = np.maximum(self.choices.dense_cost, 1)
        known = [(self.tables.share(plan), e) for (_, plan), e in self.seen.items()]
        good = min((share for share, e in known if e.feasible), default=1.0)
        bad = max((share for share, e in known if not e.feasible and share < good), default=0.0)
        asked: IntArray = np.minimum((dense * (good + bad) / 2).astype(np.int64), UNLIMITED)
        self.walls.append(Wall(self.choices, asked))
        plan = self._walk(len(self.walls) - 1, 0.0)
        self.walls.pop()
        return plan
