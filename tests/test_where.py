"""Where plans are judged: other devices and precisions find the same up to rounding, and what is not there is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.errors import UsageError
from autocompress.evaluate import Measurer, ModelEvaluator
from autocompress.precision import allowed, deviation, losses, probes
from autocompress.results import Request
from autocompress.types import Query
from autocompress.validate import make_request
from autocompress.where import Where
from tests.test_database import make

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no GPU")


class Elsewhere(Where):
    """The processor, treated as a device whose answers come later."""

    gpu = True  # type: ignore[assignment]

    def room(self, share: int = 1) -> int | None:
        return 10**8 // share

    def batch(self, least: int, most: int, largest: int) -> int:
        return 3 * least


@pytest.fixture(scope="module", params=["resnet-b", "mobilenet"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    return make(request.param, tmp_path_factory.mktemp(request.param))


def test_plans_that_are_launched_together_are_judged_as_one_by_one(database: LevelDatabase) -> None:
    plans = probes(database.space, 0)
    queries = [Query(plan, rung) for plan in plans[:4] for rung in ("slice", "full", "refitted")]  # type: ignore[arg-type]
    here, there = Measurer(database), Measurer(database, where=Elsewhere())
    assert there.batch == 3 * there.slice
    for query, found in zip(queries, there.many(queries), strict=True):
        want = here(query.plan, query.fidelity)
        assert found["loss"] == pytest.approx(want["loss"], rel=1e-4, abs=1e-9), query
        assert found["accuracy_drop"] == want["accuracy_drop"]
        assert found.get("slices", []) == pytest.approx(want.get("slices", []), rel=1e-4, abs=1e-9)


def test_bfloat16_adds_little_to_every_loss_and_is_another_evaluation(database: LevelDatabase) -> None:
    coarse = Where(precision="bfloat16")
    plans = probes(database.space, 0)
    truth, found = losses(database, plans, Where()), losses(database, plans, coarse)
    off, floor = deviation(truth, found)
    assert truth[0] == 0 < floor < 1e-3, "the teacher answers in float32, the plan does not"
    assert off < 0.5, "of tiny layers; rounding of int8 falls otherwise, too"
    costs = CostModel(database.graph, database.space, {})
    keys = {ModelEvaluator(database, costs, [], measurer=Measurer(database, where=w)).model for w in (Where(), coarse)}
    assert len(keys) == 2
    refitted = Query(plans[1], "refitted")
    [exact], [same] = Measurer(database).many([refitted]), Measurer(database, where=coarse).many([refitted])
    assert exact["loss"] == same["loss"], "finished models are judged in float32"


def test_deviation_leaves_out_what_the_dense_plan_is_off_by() -> None:
    off, floor = deviation([0.0, 1e-6, 0.1, 1.0, math.inf], [1e-4, 1e-4, 0.1011, 1.0001, math.inf])
    assert floor == 1e-4
    assert off == pytest.approx(0.01), "0.001 of 0.1; what loses less than rounding adds says nothing"
    assert deviation([0.0, 0.0], [1e-4, 1e-4])[0] == math.inf, "no plan that says anything allows nothing"


def test_probes_go_from_one_site_to_all(database: LevelDatabase) -> None:
    found = probes(database.space, 3)
    changed = [sum(level > 0 for level in plan) for plan in found]
    assert changed[0] == 0
    assert changed[1] == 1
    assert changed[-1] == sum(count > 1 for count in database.space.n_levels)
    assert found == probes(database.space, 3)


def test_on_the_processor_nothing_is_to_decide(database: LevelDatabase) -> None:
    assert allowed(database, "cpu", "auto") == (Where(), "")
    assert allowed(database, "cpu", "bfloat16") == (Where("cpu", "bfloat16"), "")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"device": "gpu"}, "--device is cpu, cuda or cuda:N, got 'gpu'."),
        ({"precision": "tf32"}, "--precision tf32 is of GPUs"),
        ({"precision": "half"}, "precision: input should be 'auto', 'float32', 'tf32' or 'bfloat16', got 'half'."),
        ({"device": "cuda", "workers": "ray"}, "--workers ray"),
    ],
)
def test_what_cannot_be_is_one_sentence(given: dict[str, str], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        make_request({"task": "digits", "budgets": ["macs<=50%"], **given})
    assert sentence in str(error.value)


def test_a_device_is_part_of_a_request_only_where_it_is_said() -> None:
    plain = Request(task="digits", budgets=("macs<=50%",))
    assert plain.hash == plain.model_copy(update={"device": "cpu"}).hash
    assert plain.hash != plain.model_copy(update={"device": "cuda"}).hash


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch sees a GPU")
def test_a_gpu_that_is_not_there_is_named_before_anything_is_written(tmp_path: Path) -> None:
    from autocompress.pipeline import compress

    request = Request(task="digits", budgets=("macs<=50%",), device="cuda")
    with pytest.raises(UsageError, match="sees no GPU"):
        compress(request, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@GPU
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_gpu_finds_the_same(database: LevelDatabase, precision: str) -> None:
    plans = probes(database.space, 0)
    where = Where("cuda", precision)  # type: ignore[arg-type]
    off, floor = deviation(losses(database, plans, Where()), losses(database, plans, where))
    assert floor < {"float32": 1e-8, "tf32": 1e-5, "bfloat16": 1e-3}[precision]
    assert off < {"float32": 0.02, "tf32": 0.02, "bfloat16": 0.5}[precision]
    assert losses(database, plans, where) == losses(database, plans, where), "it repeats itself to the bit"
