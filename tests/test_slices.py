"""Slices of the search split: each is judged as a whole model is on those examples, and a full evaluation tells of all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.errors import UsageError
from autocompress.evaluate import Measurer, ModelEvaluator
from autocompress.graph import trace
from autocompress.ledger import NoLedger
from autocompress.space import make_space
from autocompress.types import Query
from tests import networks
from tests.test_database import pruned

N, SLICE = 70, 20
"""Three slices, and ten examples that belong to none."""


def opened(folder: Path, fitness: str = "kl", n: int = N) -> LevelDatabase:
    task = replace(networks.task("resnet-b", n=n), fitness=fitness, batch_size=10, slice_size=SLICE)  # type: ignore[arg-type]
    graph = trace(task.model, task.example_inputs)
    made = LevelDatabase(graph, make_space(graph), task, folder / "db")
    made.build()
    return made


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    return opened(tmp_path_factory.mktemp("slices"))


def evaluator(database: LevelDatabase, ledger: NoLedger | None = None) -> ModelEvaluator:
    return ModelEvaluator(database, CostModel(database.graph, database.space, {}), [], ledger)


@pytest.mark.parametrize("fitness", ["kl", "mse", "loss"])
def test_a_full_evaluation_tells_the_loss_on_each_slice(fitness: str, tmp_path: Path) -> None:
    database = opened(tmp_path, fitness)
    run, plan = evaluator(database), pruned(database.space)
    (full,) = run([Query(plan, "full")])
    slices = run([Query(plan, "slice", part=part) for part in range(3)])
    assert [e.part for e in slices] == [0, 1, 2] and all(e.slices == () for e in slices)
    np.testing.assert_allclose(full.slices, [e.values["loss"] for e in slices], rtol=1e-5)
    assert len(set(full.slices)) == 3, "other examples"
    assert run([Query(plan, "slice")])[0].values == slices[0].values


def test_a_slice_is_judged_as_a_whole_model_is(database: LevelDatabase) -> None:
    fast, plain = Measurer(database), Measurer(database, plain=True)
    for part in range(3):
        want, got = ({**m(pruned(database.space), "slice", part), "seconds": 0} for m in (plain, fast))
        assert got == want
    with pytest.raises(UsageError, match="has 3 slices, numbered from 0; there is no slice 3"):
        fast(pruned(database.space), "slice", 3)


def test_a_split_smaller_than_a_slice_is_one_slice(tmp_path: Path) -> None:
    database = opened(tmp_path, n=15)
    (full, part) = evaluator(database)([Query(pruned(database.space), rung) for rung in ("full", "slice")])
    assert full.slices == pytest.approx([part.values["loss"]])


def test_slices_have_entries_of_their_own_in_the_ledger(database: LevelDatabase) -> None:
    ledger, plan = NoLedger(), pruned(database.space)
    first, again = evaluator(database, ledger), evaluator(database, ledger)
    queries = [Query(plan, "full"), *(Query(plan, "slice", part=part) for part in (2, 0))]
    paid = first(queries)
    assert first.counts == {"full": 1, "slice": 2}
    assert [replace(e, seconds=0) for e in again(queries)] == [replace(e, seconds=0) for e in paid]
    assert again.counts == {}
    known = again.known()
    assert [(e.fidelity, e.part) for e in known] == [("slice", 0), ("slice", 2), ("full", 0)]
    assert known[2].slices == paid[0].slices
