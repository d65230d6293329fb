"""The one way through: task -> sites -> database -> costs -> search -> refit -> recover -> export -> verify.

``compress`` runs a request in a folder and can be killed at any moment: the database, the profile, every evaluation, refitted
and distilled models and the state of the clock-dependent choices are on disk, so that the same call goes on where it stopped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from autocompress.deliver import LEDGER_START, LOCAL, Delivery, certified, replay_command, timed
from autocompress.diagnose import diagnose
from autocompress.errors import BudgetUnmet, Cancelled, InfeasibleBudget, StoreError, UsageError, VerificationError
from autocompress.files import make_folder, write_text
from autocompress.hwprofiles import recalibrated
from autocompress.inherit import uninherited
from autocompress.ledger import JobLedger, NoLedger, Shared, Start, started
from autocompress.level_errors import level_errors
from autocompress.opened import open_run
from autocompress.report import make_result
from autocompress.results import Diagnosis, JobResult, LedgerRow, Progress, RaceEntry, Request
from autocompress.search import CONTROLLERS, ParetoFront, Polish, Racer, check_feasible, racers, run_race
from autocompress.search import run as run_search
from autocompress.stages import Stages
from autocompress.tasks import Task
from autocompress.types import (
    FIDELITIES,
    METRICS,
    Budget,
    Controller,
    Evaluation,
    Fidelity,
    Ledger,
    Objective,
    Plan,
    Query,
)
from autocompress.verify import BudgetCheck, Certificate
from autocompress.where import Where
from autocompress.workers import LocalWorkers, Opening, RayWorkers, workers_of

DEFAULT_EVALUATIONS = 400
BATCH = 8
"""Plans asked for at once; with workers, enough to keep them busy. What is asked does not depend on it."""
REFITTED = 10
"""Plans that are judged after sequential refit: the best under the budgets' costs, and a spread over the front."""
RECOVERED = 4
"""Plans that are distilled: those nearest the budgets (the ladder's K)."""
TIMED = 10
LONGER = 4
"""The plan that recovers best is then distilled this many times longer."""
CERTIFIED = 3
"""How many plans may be written and timed again until one holds its budgets on costs."""
REACH = 3.0
"""A quality budget that is missed by so many points (or times its limit) may come within reach by distillation."""
POLISH_SHARE = 10
"""One evaluation in so many is spent again after refit, climbing from the best plans."""
SEARCHED: tuple[Fidelity, ...] = ("slice", "full")
"""Rungs of the search; what is known there from earlier jobs belongs to the front."""
RUNGS: tuple[Fidelity, ...] = ("slice", "full", "refitted")
SLOWER = 1.03
"""A file that takes this much longer than the original, timed in the same rounds, is slower."""
SENSITIVITY_SHARE, LEAST_SENSITIVITY = 4, 24
"""One-site plans that are judged for the sensitivity map, beside those that the search knows: one in so many evaluations."""
ENOUGH = (RECOVERED, 2, 2)
"""Where fewer plans hold the limits as measured, the profile is corrected by what they took, and the search goes on."""
SPARE, ROOM = 0.98, 0.94
"""After predictions proved too low, the search aims this much below the limit (each time again), and one plan below that."""


def compress(
    request: Request,
    out: Path,
    *,
    task: Task | None = None,
    ledger: Ledger | None = None,
    shared: Shared | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> JobResult:
    """Run a request in the folder ``out``: request.json, result.json, model.onnx and certificate.json come to lie there.

    ``task``: a task object instead of the request's spec. ``ledger``: the job's own; ``shared``: opens the one that all jobs on
    a model fill, which is read only where the request says ``warm``. Raises :class:`InfeasibleBudget` before the search where
    that can be known, :class:`BudgetUnmet` after everything is written when the measured plan misses a budget, :class:`Cancelled`
    when stopped; every evaluation is kept then.
    """
    if task is not None and request.workers is not None:
        raise UsageError(
            "Workers load the task by its name, and a Task object given in Python has none; "
            "write it as 'path/to/file.py:factory', or leave workers out."
        )
    Where(request.device, "float32" if request.precision == "auto" else request.precision)  # refuses what is not there
    make_folder(out)
    _refuse_foreign(request, out)
    stages = Stages(progress, out / "seconds.json")
    torch.set_num_threads(request.threads or len(os.sched_getaffinity(0)))
    run = _Run(request, out, task, ledger, stages, cancelled, shared)
    try:
        return run.go()
    except KeyboardInterrupt:
        raise Cancelled("Stopped; everything so far is kept, and the same command continues there.") from None
    finally:
        run.close()


def _refuse_foreign(request: Request, out: Path) -> None:
    """A folder belongs to one request; another one would overwrite its results."""
    try:
        earlier = Request.model_validate_json((out / "request.json").read_bytes())
    except (OSError, ValueError):
        return
    resolved = {"recover_steps": None, "workers": None}  # resolved by the run, and without effect on it
    if earlier.model_copy(update=resolved) != request.model_copy(update=resolved):
        raise UsageError(f"{out} holds the results of another request (see its request.json); choose another folder.")


class _Run:
    """One request on its way; the steps of the module's first line, in order."""

    def __init__(
        self,
        request: Request,
        out: Path,
        task: Task | None,
        ledger: Ledger | None,
        stages: Stages,
        cancelled: Callable[[], bool] | None,
        shared: Shared | None = None,
    ) -> None:
        self.request, self.out, self.stages, self.cancelled = request, out, stages, cancelled
        self.field = racers(request.controller, request.race)
        self.race: tuple[RaceEntry, ...] = ()
        self.diagnosis: Diagnosis | None = None
        self.given_task, self.own, self.shared = task, NoLedger() if ledger is None else ledger, shared
        self.start = Start()
        self.known: list[Evaluation] = []
        self.open = ExitStack()
        self.notes: list[str] = []
        self.round = ""
        self.searched = 0
        self.workers: LocalWorkers | RayWorkers | None = None

    def close(self) -> None:
        """End what runs beside this process."""
        self.open.close()
        if self.workers is not None:
            self.workers.close()

    def go(self) -> JobResult:
        self._prepare()
        self._begin()
        with self.stages.at("search", self.request.controller):
            check_feasible(self.made.space, self.made.costs, self.budgets)
            if self.request.race:
                self._race()
            else:
                self._search(self.field[0], self.budgets)
        self._refit()
        deliveries = self._recover(self._correct(self._timed(self._chosen())))
        return self._finish(deliveries)

    # ------------------------------------------------------------ steps

    def _prepare(self) -> None:
        opened = open_run(self.request, self.out, self.given_task, self.stages, self.cancelled)
        self.made, self.models, self.evaluator = opened.made, opened.models, opened.evaluator
        self.request, self.budgets = opened.request, opened.budgets
        self.limited = any(not METRICS[b.metric].quality for b in self.budgets)
        self.notes += opened.notes
        self.models.on_step = self._distilling
        if self.request.workers is not None:
            where = self.evaluator.measurer.where
            opening = Opening.of(self.made.database, self.request, self.models.folder, torch.get_num_threads(), where)
            self.evaluator.workers = self.workers = workers_of(self.request.workers, opening)
        cost = next((b.key for b in self.budgets if not METRICS[b.metric].quality), LOCAL)
        self.front = ParetoFront([Objective("loss"), Objective(cost)])

    def _begin(self) -> None:
        """Open the ledgers; the start is decided once and kept in the folder."""
        path, model = self.out / LEDGER_START, self.evaluator.model
        shared: Ledger | None = None
        try:
            shared = self.open.enter_context(self.shared(model)) if self.shared is not None else None
        except StoreError as error:
            if self.request.warm and not path.exists():
                raise
            self.notes.append(f"What this job measures is not kept for others: {error}")
        if self.request.warm or self.request.warm_from:
            given = Path(self.request.warm_from) if self.request.warm_from else None
            self.start = started(path, model, given, shared)
            self.notes.append(self.start.sentence)
        self.ledger = self.evaluator.ledger = JobLedger(self.own, self.start, shared)
        self.known = self.evaluator.known(self.start.entries.items())
        self.front.add(self._known_to_search())

    def _known_to_search(self) -> list[Evaluation]:
        """What earlier jobs have judged at the rungs of a search."""
        return [e for e in self.known if e.fidelity in SEARCHED]

    def _race(self) -> None:
        """Every controller searches as if alone; what they judged is one front."""
        dense = self._judge([self.made.space.dense], "full")[0]
        tick = self.stages.tick
        self.race = run_race(
            self.field,
            lambda name: self._controller(name, self.budgets),
            self.evaluator,
            self.front,
            reference=(dense.values["loss"] + 1.0, dense[self.front.objectives[-1].key]),
            path=self.out / "race.json",
            known=self._known_to_search(),
            evaluations=None if self.request.minutes else self.request.evaluations or DEFAULT_EVALUATIONS,
            minutes=self.request.minutes,
            batch=self._batch(),
            on_progress=lambda name, own, n, total: tick(n, total, f"{name}: {self._best_so_far('full', own)}"),
            cancelled=self.cancelled,
        )
        self.searched = sum(entry.evaluations for entry in self.race)
        if self.limited:
            winner = min(self.race, key=lambda e: math.inf if e.end.loss is None else e.end.loss)
        else:  # then the best loss is that of a plan that saves nothing
            winner = max(self.race, key=lambda e: e.end.hypervolume)
        self.field = (Racer(winner.controller, max(1, winner.evaluations)),)  # if there is a search once more

    def _batch(self) -> int:
        return max(BATCH, 2 * self.evaluator.width)

    def _controller(self, name: str, budgets: Sequence[Budget]) -> Controller:
        controller = CONTROLLERS[name](self.made.space, self.made.costs, budgets, self.request.seed)
        controller.learn(self.known, level_errors(self.made.database))
        return controller

    def _search(self, racer: Racer, budgets: Sequence[Budget]) -> None:
        minutes = None if racer.evaluations else self.request.minutes
        outcome = run_search(
            self._controller(racer.name, budgets),
            self.evaluator,
            self.front,
            evaluations=racer.evaluations or (None if minutes else self._limit()),
            minutes=minutes,
            batch=self._batch(),
            on_progress=lambda done, total: self.stages.tick(done, total, self._best_so_far()),
            cancelled=self.cancelled,
        )
        self.searched += outcome.n
        self._judge([self.made.space.dense], "full")

    def _best_so_far(self, rung: Fidelity = "full", front: ParetoFront | None = None) -> str:
        inside = [e for e in (front or self.front).evaluations(rung) if self._cheap_enough(e)]
        if not inside:
            return "no plan holds every budget yet"
        return f"best drop {inside[0].values['accuracy_drop']:.2f} points at {_short(inside[0], self.front)}"

    def _refit(self) -> None:
        """The candidates after sequential refit, then a climb from the best of them at that rung."""
        plans = self._candidates()
        with self.stages.at("refit", f"{len(plans)} plans"):
            for i in range(0, len(plans), self.evaluator.width):
                self.stages.tick(i, len(plans))
                self._judge(plans[i : i + self.evaluator.width], "refitted")
            if not self.limited:
                return  # nothing says how cheap a plan should be, so there is no best one to climb from
            known = [e for rung in RUNGS for e in self.front.evaluations(rung)]
            climb = Polish(self.made.space, self.made.costs, self.budgets, self.request.seed)
            climb.learn(known, level_errors(self.made.database))
            limit = max(4, self._limit() // POLISH_SHARE)
            run_search(
                climb,
                self.evaluator,
                self.front,
                evaluations=limit,
                batch=2,
                on_progress=lambda done, total: self.stages.tick(done, total, self._best_so_far("refitted")),
                cancelled=self.cancelled,
            )

    def _judge(self, plans: Sequence[Plan], fidelity: Fidelity) -> list[Evaluation]:
        if self.cancelled and self.cancelled():
            raise Cancelled("Stopped while judging plans; everything evaluated so far is kept.")
        found = self.evaluator([Query(plan, fidelity) for plan in plans])
        self.front.add(found)
        return found

    def _limit(self) -> int:
        """Evaluations to spend: what was asked for, or what a search by the clock or a race has made."""
        made = self.searched if self.request.minutes or self.request.race else DEFAULT_EVALUATIONS
        return made if self.request.race else self.request.evaluations or made

    def _chosen(self) -> list[Evaluation]:
        """Refitted plans to be timed: the best under the limits on costs, and a spread over the whole front."""
        inside = [e for e in self.front.evaluations("refitted") if self.limited and self._cheap_enough(e)]
        line = [e for e in self.front.at("refitted", feasible=False) if e not in inside[:RECOVERED]]
        count = min(len(line), TIMED - min(len(inside), RECOVERED))
        spread = [line[round(i * (len(line) - 1) / max(1, count - 1))] for i in range(count)]
        return list({e.plan: e for e in [*inside[:RECOVERED], *spread]}.values())

    def _cheap_enough(self, evaluation: Evaluation) -> bool:
        return self._holds(Delivery(evaluation))

    def _timed(self, judged: Sequence[Evaluation], known: Sequence[Delivery] = ()) -> list[Delivery]:
        """``known`` and what was judged, exported and timed."""
        with self.stages.at("export", f"{len(judged)} plans, to time them"):
            found, failures = timed(judged, self.models, self.made, self.request, self.stages.tick, self.cancelled)
        if failures:
            self.notes.append(
                f"{len(failures)} of {len(judged)} plans are left out, as their files fail: {failures[0]}"
            )
        if failures and not found and not known:
            raise failures[0]
        return [*known, *found]

    def _candidates(self) -> list[Plan]:
        """Plans worth a refit: first those under the cost budgets with the best fitness, then along the whole front."""
        full = [e for e in self.front.evaluations("full") if e.plan != self.made.space.dense]
        inside = [e for e in full if self._cheap_enough(e)]
        near = [e.plan for e in inside[: REFITTED // 2]] if self.limited else []
        line = [e.plan for e in self.front.at("full", feasible=False) if e.plan != self.made.space.dense]
        count = min(len(line), REFITTED - len(near))
        spread = [line[round(i * (len(line) - 1) / max(1, count - 1))] for i in range(count)]
        return list(dict.fromkeys([*near, *spread])) or [e.plan for e in full[:1]]

    def _holds(self, delivery: Delivery) -> bool:
        """Whether every budget on costs holds, measured where it was measured; quality may still be recovered."""
        return all(b.violation(delivery.value(b.key)) == 0 for b in self.budgets if not METRICS[b.metric].quality)

    def _correct(self, deliveries: list[Delivery]) -> list[Delivery]:
        """While too few plans hold the budgets as measured, though others were predicted to: what was measured corrects the
        profile, and the search goes on."""
        for turn, enough in enumerate(ENOUGH):
            promised = [d for d in deliveries if self._cheap_enough(d.evaluation) and not self._holds(d)]
            if not promised or self.made.profiles["local"].laws or sum(self._holds(d) for d in deliveries) >= enough:
                break
            off = max(d.measured[LOCAL] / d.evaluation.costs[LOCAL] for d in promised) - 1
            self.notes.append(
                f"Measured latency was up to {off:.0%} above the prediction, so the search went on with a corrected profile."
            )
            deliveries = self._corrected(deliveries)
            with self.stages.at("search", "again, under the corrected latency"):
                tight = _tightened(self.budgets, SPARE ** (turn + 1))
                try:
                    check_feasible(self.made.space, self.made.costs, tight)
                except InfeasibleBudget:
                    break
                self._search(self.field[0], tight)
            new = self._untimed(tight, {d.evaluation.plan for d in deliveries})
            with self.stages.at("refit", f"{len(new)} plans"):
                judged = self._judge(new, "refitted")
            deliveries = self._timed(judged, deliveries)
        return deliveries

    def _corrected(self, deliveries: list[Delivery]) -> list[Delivery]:
        """The same with the costs that a profile corrected by them predicts, as all that was judged has from now on."""
        made, profile = self.made, self.made.profiles["local"]
        timed = [
            (made.space.dense, made.dense_costs[LOCAL]),
            *((d.evaluation.plan, d.measured[LOCAL]) for d in deliveries),
        ]
        scale = METRICS["latency_ms"].scale
        networks = [(made.costs.executed(plan), ms / scale) for plan, ms in timed]
        self.made = made = made.with_profile("local", recalibrated(profile, networks))
        self.evaluator.costs = made.costs
        self.known = self.evaluator.known(self.start.entries.items())
        judged = [e for rung in FIDELITIES for e in self.front.evaluations(rung)]
        self.front = ParetoFront(self.front.objectives)
        self.front.add(map(self.evaluator.priced, judged))
        return [replace(d, evaluation=self.evaluator.priced(d.evaluation)) for d in deliveries]

    def _untimed(self, tight: Sequence[Budget], known: set[Plan]) -> list[Plan]:
        """The best plans under tight limits, and the best one that has room to spare."""
        plans: list[Plan] = []
        for share, count in ((1.0, RECOVERED), (ROOM, RECOVERED + 1)):
            costly = [b for b in _tightened(tight, share) if not METRICS[b.metric].quality]
            inside = [e for e in self.front.evaluations("full") if not any(b.violation(e[b.key]) for b in costly)]
            plans += [e.plan for e in inside if e.plan not in {*known, *plans}][: count - len(plans)]
        return plans

    def _recover(self, deliveries: list[Delivery]) -> list[Delivery]:
        """The plans nearest the budgets, distilled equally briefly and judged again; the best of them then goes on."""
        if self.models.recovery is None:
            return deliveries
        inside = [d for d in deliveries if self._holds(d)] or deliveries
        chosen = sorted(inside, key=self._promise)[:RECOVERED]
        with self.stages.at("recover", f"{len(chosen)} plans"):
            judged: list[Delivery] = []
            for i, delivery in enumerate(chosen):
                self.round = f"plan {i + 1} of {len(chosen)}"
                (evaluation,) = self._judge([delivery.evaluation.plan], "recovered")
                judged.append(replace(delivery, evaluation=evaluation))
            winner = min(judged, key=self._promise)
            self.round = "the best, longer"
            brief = self.models.steps
            self.models.steps = brief * LONGER
            (final,) = self._judge([winner.evaluation.plan], "recovered")
            self.models.steps = brief
        if self.models.recovery.recipe.wid:
            self.notes += uninherited(self.made.database, final.plan)
        return [*deliveries, *(d for d in judged if d is not winner), replace(winner, evaluation=final)]

    def _distilling(self, done: int, total: int) -> None:
        self.stages.tick(done, total, self.round)

    def _finish(self, deliveries: list[Delivery]) -> JobResult:
        if not deliveries:
            raise UsageError(
                "The search ended before it had judged a compressed plan; give it more evaluations or minutes."
            )
        holding = sorted((d for d in deliveries if self._holds(d) and self._quality_holds(d)), key=self._preference)
        nearest = min(deliveries, key=lambda d: (self._violation(d), d.evaluation.values["loss"]))
        best = holding[0] if holding else None
        self._write(deliveries, best)
        certificate, refused = None, VerificationError("No plan could be written as a file.")
        queue = holding or [nearest]
        for _ in range(CERTIFIED):
            if not queue:
                break
            delivery, *queue = queue
            try:
                chosen, certificate = delivery, self._certified(delivery)
            except VerificationError as error:
                refused = error
                self.notes.append(f"A plan is left out, as its file fails: {error}")
                continue
            failed = [check for check in certificate.budgets if check.holds is False]
            over = [check for check in failed if not METRICS[Budget.parse(check.budget).metric].quality]
            if not over:
                break  # a plan at a cost's limit may miss it in the final file: then another has its turn
            queue = _with_room(queue, delivery, over)
        if certificate is None:
            raise refused
        best = chosen if holding and not failed else None
        self.notes += certificate.statements
        self._write(deliveries, best)
        self._diagnose(chosen, deliveries)
        result = self._write(deliveries, best)
        if best is None:
            reasons = " ".join(check.sentence for check in failed) or "No plan holds every budget on the search split."
            raise BudgetUnmet(
                f"{reasons} The nearest plan is in {self.out / 'model.onnx'}; raise the limit, allow more methods, "
                "or search longer."
            )
        return result

    def _diagnose(self, chosen: Delivery, deliveries: Sequence[Delivery]) -> None:
        """What the plan that is handed out does to the model; others at its rung, the best first, answer beside it."""
        plan, rung = chosen.evaluation.plan, chosen.evaluation.fidelity
        others = [d.evaluation for d in deliveries if d.evaluation.fidelity == rung and d.evaluation.plan != plan]
        with self.stages.at("diagnose"):
            self.diagnosis = diagnose(
                chosen.evaluation,
                sorted(others, key=lambda e: e.values["loss"]),
                self.models,
                self.made,
                self.evaluator,
                [e for rung in SEARCHED for e in self.front.evaluations(rung)],
                max(LEAST_SENSITIVITY, self._limit() // SENSITIVITY_SHARE),
                self.stages.tick,
                self.cancelled,
            )

    def _certified(self, delivery: Delivery) -> Certificate:
        with self.stages.at("export"):
            return certified(
                delivery.evaluation,
                self.models,
                self.made,
                self.out / "model.onnx",
                self.request,
                replay_command(self.request, self.out, self.searched, self.race),
                self.start.hash,
                lambda: self.stages.at("verify"),
            )

    def _write(self, deliveries: list[Delivery], best: Delivery | None) -> JobResult:
        refusal = self.ledger.refusal
        result = make_result(
            self.request,
            self.made,
            self.front,
            deliveries,
            best,
            self.budgets,
            self.stages.seconds,
            self.searched,
            self.notes + ([f"What this job measured is not all kept for others: {refusal}"] if refusal else []),
            LedgerRow(hash=self.start.hash, entries=len(self.start.entries)),
            self.race,
            self.diagnosis,
        )
        write_text(self.out / "result.json", result.model_dump_json(indent=1))
        return result

    # ------------------------------------------------------------ judging

    def _preference(self, delivery: Delivery) -> tuple[float, ...]:
        """The best fitness; when only quality is budgeted, the cheapest. Where a budget says what quality will do, a file that is
        slower than the original comes last: smaller is no use to whoever waits longer."""
        loss = delivery.evaluation.values["loss"]
        if not self.limited:
            return delivery.value(LOCAL), loss
        enough = any(METRICS[b.metric].quality for b in self.budgets)
        return float(enough and delivery.ratio > SLOWER), loss

    def _promise(self, delivery: Delivery) -> tuple[float, ...]:
        """What is worth distilling: the best fitness; when only quality is budgeted, the cheapest within reach of it."""
        if self.limited:
            return self._preference(delivery)
        reach = [b.violation(delivery.value(b.key)) <= REACH for b in self.budgets]
        return (float(not all(reach)), *self._preference(delivery))

    def _quality_holds(self, delivery: Delivery) -> bool:
        return all(b.violation(delivery.value(b.key)) == 0 for b in self.budgets if METRICS[b.metric].quality)

    def _violation(self, delivery: Delivery) -> float:
        return sum(b.violation(delivery.value(b.key)) for b in self.budgets)


def _tightened(budgets: Sequence[Budget], share: float) -> list[Budget]:
    """The budgets with a share of the limit on this machine's latency."""
    return [replace(b, limit=b.limit * share) if b.key == LOCAL else b for b in budgets]


def _with_room(queue: list[Delivery], missed: Delivery, over: list[BudgetCheck]) -> list[Delivery]:
    """Those that would hold the limits if their files took as much more than expected as the one that missed them.

    If none would, the one that comes nearest.
    """

    def need(delivery: Delivery) -> float:
        """What its file is expected to take, as a share of the limit: the largest over the budgets."""
        shares = []
        for check in over:
            key = Budget.parse(check.budget).key
            assert check.measured is not None  # it does not hold, so it was measured
            shares.append(delivery.value(key) / missed.value(key) * check.measured / check.limit)
        return max(shares)

    return [d for d in queue if need(d) <= 1] or sorted(queue, key=need)[:1]


def _short(evaluation: Evaluation, front: ParetoFront) -> str:
    key = front.objectives[-1].key
    metric = METRICS[key.partition("@")[0]]
    return f"{evaluation.costs[key]:.4g} {metric.unit or metric.name}"
