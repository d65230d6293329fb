"""An Optuna study over plans: parameters for sites, samplers whose proposals are finished into plans, a file for dashboards.

The only module that imports Optuna, and itself imported when a search begins. Optuna imports torch for its GP sampler and
``cmaes`` for CMA-ES, each when first used.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from autocompress.errors import UsageError
from autocompress.types import Level, Plan, SearchSpace


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna announces each study, and that multi-objective and GP samplers are experimental; nobody asked here."""
    before = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            yield
        finally:
            optuna.logging.set_verbosity(before)


def ordered(levels: Sequence[Level]) -> bool:
    """Whether levels differ in strength only: two of them, or all but dense apply the same methods."""
    return len(levels) <= 2 or len({tuple(type(step) for step in level.steps) for level in levels[1:]}) == 1


class Parameters:
    """Plans as Optuna parameters, one for each site that has a choice.

    An ordered site is an integer, 0 for the costliest level and so on by saving (``orders``: levels of each site in that
    order); any other site is categorical, its choices are the levels' labels.
    """

    def __init__(self, space: SearchSpace, orders: Sequence[Sequence[int]]) -> None:
        self.space = space
        self.distributions: dict[str, BaseDistribution] = {}
        self._values: dict[str, list[Any]] = {}  # site -> the parameter's value of each level
        for site, levels, order in zip(space.sites, space.levels, orders, strict=True):
            if len(levels) < 2:
                continue
            if ordered(levels):
                self._values[site.name] = [order.index(level) for level in range(len(levels))]
                self.distributions[site.name] = IntDistribution(0, len(levels) - 1)
            else:
                labels = [level.label for level in levels]
                unique = len(set(labels)) == len(labels)
                names = labels if unique else [f"{i}: {label}" for i, label in enumerate(labels)]
                self._values[site.name] = names
                self.distributions[site.name] = CategoricalDistribution(names)

    @property
    def categorical(self) -> list[str]:
        """Names of the sites whose levels have no order."""
        return [name for name, d in self.distributions.items() if isinstance(d, CategoricalDistribution)]

    def of(self, plan: Plan) -> dict[str, Any]:
        """The parameters of a plan."""
        levels = zip(self.space.sites, plan, strict=True)
        return {site.name: self._values[site.name][level] for site, level in levels if site.name in self._values}

    def plan(self, params: Mapping[str, Any]) -> Plan:
        """Inverse of :meth:`of`."""
        return tuple(
            self._values[site.name].index(params[site.name]) if site.name in self._values else 0
            for site in self.space.sites
        )


class Finished(BaseSampler):
    """A sampler whose proposals go through ``finish`` before they become a trial's parameters.

    So the trial holds what was really judged, and the sampler learns from that. ``given`` replaces the next proposal.
    """

    def __init__(self, inner: BaseSampler, parameters: Parameters, finish: Callable[[Plan], Plan]) -> None:
        self.inner, self.parameters, self.finish = inner, parameters, finish
        self.given: Plan | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.parameters.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        with _quiet():
            inferred = self.inner.infer_relative_search_space(study, trial)
            params = self.inner.sample_relative(
                study, trial, inferred
            )  # also where a plan is given: it keeps its books
            if self.given is None:
                missing = {name: d for name, d in search_space.items() if name not in params}
                independent = self.inner.sample_independent
                params = params | {name: independent(study, trial, name, d) for name, d in missing.items()}
        plan, self.given = self.parameters.plan(params) if self.given is None else self.given, None
        return self.parameters.of(self.finish(plan))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError("every parameter was sampled together")

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        with _quiet():  # CMA-ES says that it does not look at constraints
            self.inner.after_trial(study, trial, state, values)


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed, population_size=20),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
}


class PlanStudy:
    """Ask and tell in plans. ``finish`` makes a proposal a plan that may be judged; all objectives are minimized.

    With ``storage``, every told trial is also appended to a study called ``name`` in that journal file, which
    ``optuna.load_study`` and ``optuna-dashboard`` open. A study of that name is begun anew, others in the file stay.
    """

    def __init__(
        self,
        sampler: str,
        seed: int,
        parameters: Parameters,
        finish: Callable[[Plan], Plan],
        objectives: Sequence[str],
        name: str,
        storage: Path | None = None,
    ) -> None:
        self.parameters = parameters
        with _quiet():
            self._sampler = Finished(SAMPLERS[sampler](seed), parameters, finish)
            self._study = optuna.create_study(directions=["minimize"] * len(objectives), sampler=self._sampler)
            self._copy = None if storage is None else _begin(storage, name, objectives)

    def ask(self, given: Plan | None = None) -> tuple[Trial, Plan]:
        """A trial and its plan: a proposal, or ``given``, finished."""
        self._sampler.given = given
        trial = self._study.ask(self.parameters.distributions)
        return trial, self.parameters.plan(trial.params)

    def tell(
        self, trial: Trial, values: Sequence[float] | None, constraints: Mapping[str, float], notes: Mapping[str, Any]
    ) -> None:
        """``values`` of the objectives, ``None`` for a broken plan; a constraint above 0 is violated."""
        for key, value in constraints.items():
            trial.set_constraint(key, value)
        state = TrialState.PRUNED if values is None else TrialState.COMPLETE
        told = self._study.tell(trial, None if values is None else list(values), state=state)
        if self._copy is not None:
            kept = optuna.trial.create_trial(
                state=state,
                values=values,
                params=told.params,
                distributions=told.distributions,
                constraints=dict(constraints),
                user_attrs=dict(notes),
            )
            kept.datetime_start, kept.datetime_complete = told.datetime_start, told.datetime_complete
            self._copy.add_trial(kept)

    def drop(self, trial: Trial) -> None:
        """A trial that will not be judged."""
        self._study.tell(trial, state=TrialState.FAIL)


def _begin(path: Path, name: str, objectives: Sequence[str]) -> Study:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = JournalFileOpenLock(str(path))
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
        if name in optuna.get_all_study_names(storage):
            optuna.delete_study(study_name=name, storage=storage)
        study = optuna.create_study(study_name=name, storage=storage, directions=["minimize"] * len(objectives))
        study.set_metric_names(list(objectives))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"The Optuna storage is a journal file that can be written, {str(path)!r} is not ({error}); give another path."
        ) from error
    return study
