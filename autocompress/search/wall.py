"""The action wall of AMC (He et al. 2018), for any number of limits on any costs of the tables.

A plan is decided site by site. At each site only the levels are allowed from which the limits can still be held; and of those,
not the ones that save more than is needed when a milder level of the same methods would do with everything after it dense. The
first half is AMC's; the second keeps plans from spending less than the budget, as those of AMC's release do. Both look at the
true costs of whole plans, after rounding to levels, so that coupled and measured costs need no special case.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from autocompress.search.solver import Solver, repair
from autocompress.search.sweep import OneSite
from autocompress.search.tables import CostTables, switch
from autocompress.types import IntArray, Plan, SearchSpace


class Choices:
    """What can be chosen at each site, and cheap plans to come back to; shared by the walls of several limits.

    ``orders``: the levels of each site that save something, from dense on, by what they save. ``sites``: those with a choice.
    ``milder[site][level]``: levels that save less with no other methods than ``level`` has, so that they lose less too.
    """

    def __init__(self, space: SearchSpace, tables: CostTables) -> None:
        self.space, self.tables = space, tables
        one_site = OneSite(space, tables)
        saved = one_site.saved
        self.orders = [
            [0, *(v for v in order if v and saved[a + v] > 0)]
            for order, a in zip(one_site.by_saving, tables.offsets[:-1], strict=True)
        ]
        self.sites = [s for s, order in enumerate(self.orders) if len(order) > 1]
        self.most = [float(saved[a:b].max(initial=0.0)) for a, b in itertools.pairwise(tables.offsets)]
        self.milder = [self._milder(site) for site in range(len(space.sites))]
        self.dense_cost = tables.dense
        unit = 1 / np.maximum(self.dense_cost, 1)
        weights = [unit, *(np.eye(len(unit))[k] * unit for k in range(len(unit)))]
        self.cheap = list(dict.fromkeys([*(tables.cheapest(w) for w in weights), tuple(o[-1] for o in self.orders)]))
        self.floor: IntArray = tables.cost(self.cheap).min(axis=0)

    def _milder(self, site: int) -> dict[int, list[int]]:
        methods = [{type(step) for step in level.steps} for level in self.space.levels[site]]
        order = self.orders[site]
        return {level: [m for m in order[:i] if methods[m] <= methods[level]] for i, level in enumerate(order)}

    def at(self, action: float, site: int) -> int:
        """The place in ``orders[site]`` that an action asks for: 1 keeps everything, 0 saves the most."""
        return round((1 - action) * (len(self.orders[site]) - 1))

    def action(self, site: int, level: int) -> float:
        """The action that stands for ``level``: inverse of :meth:`at`."""
        order = self.orders[site]
        return 1 - order.index(level) / (len(order) - 1) if level in order else 0.0

    def uniform(self, limit: IntArray, fixed: Mapping[int, int] = MappingProxyType({}), steps: int = 64) -> Plan:
        """The mildest plan with the same action everywhere that holds ``limit``; the most saving one if none does.

        ``fixed``: levels of sites that are decided already.
        """
        shares = [1 - i / steps for i in range(steps + 1)]
        plans = [
            tuple(fixed.get(s, order[self.at(share, s)]) for s, order in enumerate(self.orders)) for share in shares
        ]
        within = self.tables.fits(plans, limit)
        return plans[within.index(True) if any(within) else -1]


class Wall:
    """Limits that every plan decided through :class:`Walk` holds, whenever a plan that holds them is found at all.

    Where none is found, ``limit`` is raised to the cost of the nearest plan and ``reachable`` is false. ``fill``: also push up to
    the limits. ``limit``  # (n_columns,)
    """

    def __init__(self, choices: Choices, limit: IntArray, fill: bool = True) -> None:
        self.choices, self.limit, self.fill = choices, limit, fill
        plans = [choices.space.dense, *choices.cheap]
        self.witnesses = self._holding(plans)
        if not self.witnesses:
            zero = np.zeros(choices.tables.n_options)
            repaired = [repair(choices.tables, zero, plan, limit) for plan in plans]
            self.witnesses = self._holding(repaired)
            if not self.witnesses:
                found = Solver(choices.tables).solve(zero, limit)
                self.witnesses = [] if found is None else [found.plan]
            plans += repaired
        self.reachable = bool(self.witnesses)
        if not self.reachable:
            costs = choices.tables.cost(plans)
            over = np.maximum(costs / np.maximum(limit, 1) - 1, 0).sum(axis=1)
            nearest = int(np.argmin(over))
            self.limit, self.witnesses = np.maximum(limit, costs[nearest]), [plans[nearest]]

    def _holding(self, plans: Sequence[Plan]) -> list[Plan]:
        fits = self.choices.tables.fits(plans, self.limit)
        return list(dict.fromkeys(plan for plan, ok in zip(plans, fits, strict=True) if ok))

    def filled(self, plan: Plan, sites: Sequence[int] | None = None) -> Plan:
        """Milder levels wherever they still fit, the ones that use most of what is left first; only at ``sites``, if given."""
        tables, choices = self.choices.tables, self.choices
        unit = np.maximum(np.minimum(self.limit, choices.dense_cost), 1)
        for _ in range(tables.n_options):
            room = self.limit - tables.cost([plan])[0]
            delta = tables.deltas(plan)
            options = [
                int(tables.offsets[s]) + level
                for s in (choices.sites if sites is None else sites)
                for level in choices.milder[s].get(plan[s], ())
                if (delta[tables.offsets[s] + level] <= room).all()
            ]
            if not options:
                return plan
            best = min(options, key=lambda o: (-float((delta[o] / unit).sum()), o))
            plan = tables.switched(plan, best)
        return plan


class Walk:
    """One plan on its way through a wall: ``allowed()``, then ``take(level)``, for each of ``choices.sites``; then ``plan()``.

    Each step keeps a witness: a whole plan that holds the limits and begins with what was decided.
    """

    def __init__(self, wall: Wall) -> None:
        self.wall, self.choices = wall, wall.choices
        self.witness = wall.witnesses[0]
        self.step = 0
        self._found: dict[int, Plan] = {}
        self._decided = self.choices.space.dense

    def allowed(self) -> list[int]:
        """Levels that this site may take, mildest first; never empty."""
        site, choices = self.choices.sites[self.step], self.choices
        levels = list(choices.orders[site])
        if self.witness[site] not in levels:
            levels.append(self.witness[site])
        rests = list(dict.fromkeys(p[site + 1 :] for p in (self._decided, self.witness, *self.wall.witnesses)))
        rests = list(dict.fromkeys([*rests, *(p[site + 1 :] for p in choices.cheap)]))
        plans = [(*self._head(site), level, *rest) for level in levels for rest in rests]
        fits = np.array(choices.tables.fits(plans, self.wall.limit)).reshape(len(levels), len(rests))
        self._found = {
            level: plans[i * len(rests) + int(np.argmax(fits[i]))] for i, level in enumerate(levels) if fits[i].any()
        }
        if not self.wall.fill:
            return list(self._found)
        easy = {level for i, level in enumerate(levels) if fits[i, 0]}  # it holds with all that follows dense
        milder = choices.milder[site]
        return [level for level in self._found if not easy.intersection(milder.get(level, ()))]

    def take(self, level: int) -> None:
        """Decide the site for one of the levels that :meth:`allowed` just gave."""
        site = self.choices.sites[self.step]
        self.witness = self._found[level]
        self._decided = switch(self._decided, site, level)
        self.step += 1

    def follow(self, plan: Plan) -> None:
        """Decide all that is left for the allowed level nearest to that of ``plan``."""
        while not self.done:
            site = self.choices.sites[self.step]
            order = self.choices.orders[site]
            self.take(nearest(order, order.index(plan[site]), self.allowed()))

    def _head(self, site: int) -> Plan:
        # sites without a choice are decided by the witness
        return self.witness[:site]

    @property
    def done(self) -> bool:
        return self.step == len(self.choices.sites)

    def plan(self) -> Plan:
        """What was decided, filled up to the limits."""
        return self.wall.filled(self.witness) if self.wall.fill else self.witness


def nearest(order: Sequence[int], wanted: int, allowed: Sequence[int]) -> int:
    """The allowed level nearest to place ``wanted`` of ``order``; of two, the milder one."""
    places = {level: order.index(level) if level in order else len(order) for level in allowed}
    return min(allowed, key=lambda level: (abs(places[level] - wanted), places[level]))
