"""``bayes`` and its variants: Optuna's samplers behind ask and tell, their proposals finished into plans worth paying for.

What a plan costs is known before it is judged. So a proposal over a limit is not told as a violation, it is repaired: the
switches with the most relief for the least expected harm, until the limits hold, and then back up while they still do. The
trial holds the repaired plan. Budgets on quality are constraints in Optuna's sense (``Trial.set_constraint``). A plan is never
proposed twice; one whose loss is not a number is a pruned trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from autocompress.errors import UsageError
from autocompress.search.base import CONTROLLERS, Asking, fitness
from autocompress.search.exact import TableSearch
from autocompress.search.random_ import TINY
from autocompress.search.solver import repair
from autocompress.search.tables import all_plans, switch
from autocompress.types import METRICS, Budget, Costs, Evaluation, Plan, SearchSpace, digest

if TYPE_CHECKING:
    from optuna.trial import Trial

PENALTY = 100.0
"""What a violation of 1 adds to the objective of a sampler that knows no constraints."""


class Optuna(TableSearch):
    """What the variants share. ``storage``: a journal file that gets a copy of the study (see ``study.PlanStudy``).

    ``fills``: spend what a proposal leaves of the limits. ``costs_constrain``: budgets on costs are told as constraints too,
    which matters where no plan can hold them.
    """

    sampler: ClassVar[str]
    fills: ClassVar[bool] = True
    costs_constrain: ClassVar[bool] = True
    knows_constraints: ClassVar[bool] = True
    group = 4
    tries = 100

    def __init__(
        self,
        space: SearchSpace,
        costs: Costs,
        budgets: Sequence[Budget],
        seed: int = 0,
        storage: Path | None = None,
    ) -> None:
        super().__init__(space, costs, budgets, seed)
        self.storage = storage
        self._check_space()

    def _check_space(self) -> None:
        """Refuse a space that the sampler does not take."""

    def _search(self) -> Asking:
        from autocompress.search.study import Parameters, PlanStudy

        self._prepare()
        self.parameters = Parameters(self.space, self.orders)
        self.quality_only = bool(self.budgets) and not self.limits.limited
        self.goal = self.limits.limit if self.quality_only else self.targets[0]
        self.prior = self.one_site.losses()
        self.pool = self._tiny() if self.space.size <= TINY else None
        key = digest([self.space.hash, [str(budget) for budget in self.budgets]])
        name = f"{self.sampler}-{key}-seed{self.seed}"
        self.trials: dict[Plan, Trial] = {}  # those asked and not told
        seed, objectives = self.rng.getrandbits(32), self._objectives()
        self.study = PlanStudy(self.sampler, seed, self.parameters, self._finish, objectives, name, self.storage)
        starts = self._starts()
        while plans := self._group_of(starts):
            yield from self._judge(plans, "full")

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """As for any controller; the study has the answers at once."""
        super().tell(evaluations)
        for evaluation in evaluations:
            self._record(self.trials.pop(evaluation.plan), evaluation)

    def _group_of(self, starts: list[Plan]) -> list[Plan]:
        """The next proposals; none when there is nothing left that was not judged."""
        for _ in range(self.group):
            if self.pool is not None and all(map(self._known, self.pool)):
                break
            trial, plan = self.study.ask(starts.pop(0) if starts else None)
            if self._known(plan):
                self.study.drop(trial)
                break
            self.trials[plan] = trial
        return list(self.trials)

    def _starts(self) -> list[Plan]:
        """What the prior thinks best for the limits; for several objectives or quality alone, along the whole cost axis."""
        spread = self.quality_only or len(self._objectives()) > 1
        plans = [self._solve(self.prior, target, quick=True) for target in range(len(self.targets) if spread else 1)]
        return list(dict.fromkeys(plan for plan in plans if plan is not None))

    # ------------------------------------------------------------ proposals

    def _known(self, plan: Plan) -> bool:
        return plan in self.trials or ("full", plan) in self.seen

    def _tiny(self) -> list[Plan]:
        """All plans within the limits; all plans when none are."""
        plans = all_plans(self.space)
        inside = [p for p, fits in zip(plans, self.tables.fits(plans, self.goal), strict=True) if fits]
        return inside or plans

    def _finish(self, plan: Plan) -> Plan:
        """A plan within the limits that was not judged yet, near the proposal; a known one when none was found."""
        if self.pool is not None:
            fresh = [p for p in self.pool if not self._known(p)]
            return min(fresh, key=lambda p: (self._distance(p, plan), p), default=plan)
        plan = self._fit(plan)
        for _ in range(self.tries):
            if not self._known(plan):
                break
            site = self.rng.randrange(len(plan))
            plan = self._fit(switch(plan, site, self.rng.randrange(self.tables.n_levels[site])), fill=False)
        return plan

    def _distance(self, one: Plan, two: Plan) -> float:
        """Sites that differ, and by how much of their range."""
        steps = 0.0
        for order, a, b in zip(self.orders, one, two, strict=True):
            if a != b:
                steps += 1 + abs(order.index(a) - order.index(b)) / len(order)
        return steps

    def _fit(self, plan: Plan, fill: bool = True) -> Plan:
        """Down to the limits by the prior's harm; and up while they hold, the greatest expected gain first."""
        plan = repair(self.tables, self.prior, plan, self.goal)
        while fill and self.fills and not self.quality_only:
            change = self.prior - self.prior[self.tables.current(plan)][self.tables.site_of]
            holds = (self.tables.cost([plan])[0] + self.tables.deltas(plan) <= self.goal).all(axis=1)
            gain = np.where(holds, change, 0.0)
            option = int(np.argmin(gain))
            if gain[option] >= -1e-12:
                break
            plan = self.tables.switched(plan, option)
        return self.space.effective(plan)

    # ------------------------------------------------------------ answers

    def _objectives(self) -> list[str]:
        return ["cost" if self.quality_only else "loss"]

    def _values(self, evaluation: Evaluation) -> list[float]:
        """One number an objective, all finite."""
        return [self.tables.share(evaluation.plan) if self.quality_only else fitness(evaluation)]

    def _record(self, trial: Trial, evaluation: Evaluation) -> None:
        judged = [b for b in self.budgets if self.costs_constrain or METRICS[b.metric].quality]
        constraints = {str(budget): _signed(budget, evaluation[budget.key]) for budget in judged}
        whole = np.isfinite([fitness(evaluation), *constraints.values()]).all()
        values = self._values(evaluation) if whole else None
        if values is not None and not self.knows_constraints:
            values[0] += PENALTY * evaluation.violation
        numbers = {**evaluation.values, **evaluation.costs, "seconds": evaluation.seconds}
        notes = {"plan": self.space.describe(evaluation.plan), **{k: v for k, v in numbers.items() if math.isfinite(v)}}
        self.study.tell(trial, values, constraints if whole else {}, notes)


def _signed(budget: Budget, value: float) -> float:
    """The violation where there is one, else how far below the limit the value is, as a negative number."""
    violation = budget.violation(value)
    return violation if violation > 0 else (value - budget.limit) / max(abs(budget.limit), 1.0)


@CONTROLLERS.register("bayes")
class Bayes(Optuna):
    """Tree-structured Parzen estimator, multivariate, with constraints (Watanabe & Hutter 2023)."""

    sampler = "tpe"


@CONTROLLERS.register("bayes-gp")
class BayesGP(Optuna):
    """Gaussian process with constrained expected improvement. A proposal takes about 30 ms a site, so sites are limited.

    Costs are no constraints here: a process fitted to them would shy away from the limits, where the best plans are.
    """

    sampler = "gp"
    costs_constrain = False
    group = 1
    most = 64

    def _check_space(self) -> None:
        free = sum(n > 1 for n in self.space.n_levels)
        if free > self.most:
            raise UsageError(
                f"bayes-gp takes at most {self.most} sites that offer a choice, this space has {free}: its Gaussian process "
                "would need seconds for a plan; use bayes, bayes-nsga2, bayes-nsga3 or bayes-cmaes."
            )


class _Front(Optuna):
    """Several objectives at once: the loss and what the plan costs, so that a front appears within the limits."""

    fills = False

    def _objectives(self) -> list[str]:
        return ["loss", "cost"]

    def _values(self, evaluation: Evaluation) -> list[float]:
        return [fitness(evaluation), self.tables.share(evaluation.plan)]


@CONTROLLERS.register("bayes-nsga2")
class BayesNSGA2(_Front):
    """NSGA-II (Deb et al. 2002) on the loss and the share of the dense cost, averaged over the budgeted costs."""

    sampler = "nsga2"


@CONTROLLERS.register("bayes-nsga3")
class BayesNSGA3(_Front):
    """NSGA-III (Deb & Jain 2014) on the loss and each budgeted cost for itself."""

    sampler = "nsga3"

    def _objectives(self) -> list[str]:
        return ["loss", *self.limits.keys]

    def _values(self, evaluation: Evaluation) -> list[float]:
        return [fitness(evaluation), *(evaluation.costs[key] for key in self.limits.keys)]


@CONTROLLERS.register("bayes-cmaes")
class BayesCMAES(Optuna):
    """CMA-ES on the sites' positions in the order of saving; it knows no categories and no constraints."""

    sampler = "cmaes"
    costs_constrain = False
    knows_constraints = False

    def _check_space(self) -> None:
        from autocompress.search.study import Parameters

        orders = [list(range(n)) for n in self.space.n_levels]
        if mixed := Parameters(self.space, orders).categorical:
            raise UsageError(
                f"bayes-cmaes needs levels that can be put in order, and {len(mixed)} sites offer different methods, such as "
                f"{mixed[0]!r}; use bayes, bayes-gp, bayes-nsga2 or bayes-nsga3, or search one method."
            )
