"""The evaluator: what is paid once is never paid again, and what cannot be judged is infeasible, not a crash."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.errors import UsageError
from autocompress.evaluate import Measurer, ModelEvaluator, NoLedger, fitness, forward
from autocompress.types import Budget, Ledger, Query
from tests import networks
from tests.test_database import make, pruned


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    return make("resnet-b", tmp_path_factory.mktemp("resnet-b"))


class Counting(NoLedger):
    """A ledger on JSON, as the store's is: what is not JSON does not come back."""

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        super().put(key, json.loads(json.dumps(dict(value), allow_nan=False)))


class Builder:
    """Stitches, and counts how often."""

    def __init__(self, database: LevelDatabase, change: Any = None) -> None:
        self.database, self.change, self.n = database, change, 0

    def __call__(self, plan: Any, fidelity: Any) -> nn.Module:
        self.n += 1
        model = self.database.stitch(plan)
        if self.change:
            self.change(model)
        return model


def evaluator(
    database: LevelDatabase, *budgets: str, ledger: Ledger | None = None, build: Any = None, **kwargs: Any
) -> ModelEvaluator:
    """``build``: judges whole models from there."""
    costs = CostModel(database.graph, database.space, {})
    dense = costs.in_units(database.space.dense)
    measurer = Measurer(database, build, plain=build is not None)
    limits = [Budget.parse(b).absolute(dense) for b in budgets]
    return ModelEvaluator(database, costs, limits, ledger, measurer=measurer, **kwargs)


def test_the_dense_plan_loses_nothing(database: LevelDatabase) -> None:
    (result,) = evaluator(database, "macs<=100%")([Query(database.space.dense, "full")])
    assert abs(result.values["loss"]) < 1e-9 and result.values["accuracy_drop"] == 0.0
    assert result.values["metric"] == 1.0, "labels are what the net answers"
    assert result.feasible and result.violation == 0.0


def test_answers_come_in_the_order_asked_and_rungs_differ(database: LevelDatabase) -> None:
    space = database.space
    queries = [Query(pruned(space), rung) for rung in ("full", "table", "slice", "refitted")] + [
        Query(space.dense, "slice")
    ]
    run = evaluator(database, "macs<=50%")
    results = run(queries)
    assert [(r.plan, r.fidelity) for r in results] == [(q.plan, q.fidelity) for q in queries]
    assert results[1].values == {} and results[1].costs == results[0].costs
    assert results[3].values["loss"] != results[0].values["loss"]
    assert run.counts == {"full": 1, "slice": 2, "refitted": 1}
    assert set(run.seconds) == {"full", "slice", "refitted"}


def test_a_known_plan_runs_no_model(database: LevelDatabase) -> None:
    ledger = Counting()
    query = Query(pruned(database.space), "full")
    build = Builder(database)
    (first,) = evaluator(database, "macs<=50%", ledger=ledger, build=build)([query])
    assert build.n == 1 and not first.cached
    again = evaluator(database, "macs<=50%", ledger=ledger, build=build)
    (second,) = again([query])
    assert build.n == 1 and second.cached and again.counts == {}
    assert second == replace(first, seconds=second.seconds)
    again([Query(query.plan, "slice"), Query(database.space.dense, "full")])
    assert build.n == 3, "another rung and another plan are other questions"


def test_new_budgets_judge_old_measurements(database: LevelDatabase) -> None:
    ledger, build = Counting(), Builder(database)
    query = Query(pruned(database.space), "full")
    (loose,) = evaluator(database, "macs<=90%", ledger=ledger, build=build)([query])
    (tight,) = evaluator(database, "macs<=1%", "accuracy_drop<=-100", ledger=ledger, build=build)([query])
    assert build.n == 1 and loose.feasible and loose.violation == 0.0
    dense = CostModel(database.graph, database.space, {}).in_units(database.space.dense)["macs"]
    limit = 0.01 * dense
    want = (tight.costs["macs"] - limit) / limit + (tight.values["accuracy_drop"] + 100) / 100
    assert tight.violation == pytest.approx(want) and not tight.feasible


def test_quality_budgets_wait_until_quality_is_known(database: LevelDatabase) -> None:
    (table,) = evaluator(database, "accuracy_drop<=-50")([Query(database.space.dense, "table")])
    (full,) = evaluator(database, "accuracy_drop<=-50")([Query(database.space.dense, "full")])
    assert table.violation == 0.0 and full.violation == pytest.approx(1.0)


def test_what_is_known_can_be_listed(database: LevelDatabase) -> None:
    ledger, space = Counting(), database.space
    run = evaluator(database, "macs<=90%", ledger=ledger)
    queries = [Query(plan, rung) for rung in ("refitted", "full", "slice") for plan in (pruned(space), space.dense)]  # type: ignore[arg-type]
    answers = run([*queries, Query(pruned(space), "table")])
    evaluator(database, ledger=ledger, threads=2)([Query(space.dense, "full")])
    ledger.put("another", {"loss": 0.0})  # as versions before kept it
    ledger.put("wrong", {**ledger._kept[run.key(space.dense, "full")], "plan": {"nowhere": "x"}})
    known = run.known()
    assert known == sorted(answers[:6], key=lambda e: (["slice", "full", "refitted"].index(e.fidelity), e.plan))
    assert all(e.cached for e in known)
    tight = evaluator(database, "macs<=1%", ledger=ledger).known()
    assert [e.values for e in tight] == [e.values for e in known] and not any(e.feasible for e in tight)
    distilled = evaluator(database, recovery_key=lambda: {"steps": 3})
    key = distilled.key(space.dense, "recovered")
    entry = {**ledger._kept[run.key(space.dense, "full")], "fidelity": "recovered"}
    assert [e.fidelity for e in distilled.known([(key, entry)])] == ["recovered"]
    assert run.known([(key, entry)]) == [], "distilled in another way"


def _poison(model: nn.Module) -> None:
    next(p for p in model.parameters() if p.ndim == 4).data.fill_(float("nan"))


def test_nan_outputs_are_infeasible_and_json_safe(database: LevelDatabase) -> None:
    ledger = Counting()  # refuses NaN
    run = evaluator(database, "accuracy_drop<=5", ledger=ledger, build=Builder(database, _poison))
    for _ in range(2):  # measured, then from the ledger
        (result,) = run([Query(pruned(database.space), "full")])
        assert math.isnan(result.values["loss"]) and not result.feasible
    assert run.counts == {"full": 1}


def test_the_key_holds_all_that_decides(database: LevelDatabase) -> None:
    plan = pruned(database.space)
    base = evaluator(database)
    keys = {
        base.key(plan, "full"),
        base.key(plan, "slice"),
        base.key(plan, "recovered"),
        base.key(database.space.dense, "full"),
        evaluator(database, threads=2).key(plan, "full"),
        evaluator(database, recovery_key=lambda: {"steps": 3}).key(plan, "recovered"),
    }
    assert len(keys) == 6
    assert evaluator(database, "macs<=10%").key(plan, "full") == base.key(plan, "full"), "budgets decide nothing"
    assert evaluator(database, recovery_key=lambda: {"steps": 3}).key(plan, "full") == base.key(plan, "full")


def test_recovered_without_a_recovery_is_a_sentence(database: LevelDatabase) -> None:
    with pytest.raises(UsageError, match="needs a recovery"):
        evaluator(database)([Query(database.space.dense, "recovered")])


def test_fitness_by_hand() -> None:
    task = networks.task("resnet-a", n=4)
    outputs, reference = torch.randn(6, 4), torch.randn(6, 4)
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    p, q = reference.softmax(1), outputs.softmax(1)
    assert fitness(task, outputs, reference, targets) == pytest.approx(
        float((p * (p / q).log()).sum(1).mean()), rel=1e-4
    )
    assert fitness(replace(task, fitness="mse"), outputs, reference, targets) == pytest.approx(
        float((outputs - reference).pow(2).mean()), rel=1e-5
    )
    assert fitness(replace(task, fitness="loss"), outputs, reference, targets) == pytest.approx(
        float(nn.functional.cross_entropy(outputs, targets)), rel=1e-5
    )


def test_outputs_of_all_batches_in_order() -> None:
    task = networks.task("resnet-a", n=200)  # more than one batch
    with torch.no_grad():
        want: Tensor = task.model(task.inputs(task.search))
    torch.testing.assert_close(forward(task.model, task, task.search), want, rtol=1e-4, atol=1e-5)
