"""Programs share values: nothing runs twice that is kept, and nothing kept changes a value or passes the limit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autocompress.database import LevelDatabase
from autocompress.evaluate import Measurer
from autocompress.prefix import INPUT, Activations, ByteCache, Cut, Program, choose_cuts, find_cuts
from autocompress.types import Plan
from tests import networks
from tests.test_database import make, uniform


class Counted:
    """Adds one, and counts how often."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.n += 1
        return x + 1


def chain(*calls: Counted) -> tuple[Program, bytes]:
    program, digest = Program(), INPUT
    for i, call in enumerate(calls):
        digest = program.add(("add", i, id(call)), [digest], call, worth=2)
    return program, digest


def run(kept: Activations, made: tuple[Program, bytes], place: object = 0, least: int = 1) -> Tensor:
    kept.expect(made[0])
    (found,) = kept.run(made[0], [made[1]], place, lambda: torch.zeros(100_000), least)
    assert isinstance(found, Tensor)
    return found


def test_what_two_plans_share_runs_once_more_and_never_again() -> None:
    a, b, c, d, e = (Counted() for _ in range(5))
    kept = Activations(10**8)
    for last in (c, d, e, Counted()):
        assert torch.equal(run(kept, chain(a, b, last)), torch.full((100_000,), 3.0))
    assert (a.n, b.n, c.n, d.n, e.n) == (2, 2, 1, 1, 1), "the second plan keeps what the third and fourth begin with"
    run(kept, chain(a, b, c), place=1)
    assert a.n == 3, "another batch has other values"


def test_small_answers_are_kept_at_once_and_large_ones_where_they_are_worth_it() -> None:
    small, large = Counted(), Counted()
    kept = Activations(10**8)
    program = Program()
    target = program.add("small", [INPUT], small)
    for _ in range(2):
        kept.run(program, [target], 0, lambda: torch.zeros(10))
    assert small.n == 1
    for _ in range(3):
        run(kept, chain(large), least=3)
    assert large.n == 3


@pytest.mark.parametrize("limit", [0, 400_000, 900_000, 10**8])
def test_a_limit_costs_time_and_never_a_value(limit: int) -> None:
    kept, rng = Activations(limit), random.Random(0)
    steps = [Counted() for _ in range(6)]
    for _ in range(30):
        n = rng.randint(1, 6)
        assert torch.equal(run(kept, chain(*steps[:n]), place=rng.randrange(2)), torch.full((100_000,), float(n)))
        assert kept.kept.bytes <= limit


def test_the_cache_drops_what_was_used_least_recently() -> None:
    cache: ByteCache[str, int] = ByteCache(10)
    for name in "abc":
        cache.put(name, ord(name), 4)
    assert cache.get("a") is None and cache.get("b") == ord("b") and cache.bytes == 8
    cache.put("d", 0, 4)
    assert cache.get("b") is not None and cache.get("c") is None
    assert cache.put("huge", 1, 11) == 1 and cache.get("huge") is None and cache.bytes == 8


def test_cuts_are_chosen_by_what_they_save_for_a_byte() -> None:
    cuts = [Cut("early", 1, 100), Cut("late", 3, 50), Cut("end", 4, 1)]
    assert choose_cuts(cuts, [1, 1, 1, 1], 1000) == {"early", "late"}, "behind the last layer nothing is saved"
    assert choose_cuts(cuts, [1, 1, 1, 1], 60) == {"late"}
    assert choose_cuts(cuts, [1, 1, 1, 1], 10) == frozenset()


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LevelDatabase]:
    return {name: make(name, tmp_path_factory.mktemp(name)) for name in networks.BUILDERS}


def walk(database: LevelDatabase, n: int) -> list[Plan]:
    """Random plans, and mutations of the dense and of one random plan, all methods among them."""
    space, rng = database.space, random.Random(0)
    plans = [space.dense, space.sample(rng), uniform(space, "int8")]
    for _ in range(n):
        plan = list(rng.choice(plans[:3]))
        site = rng.randrange(len(plan))
        plan[site] = rng.randrange(space.n_levels[site])
        plans.append(tuple(plan))
    return plans


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.BUILDERS)
def test_every_network_has_the_values_of_whole_models_to_the_bit(
    databases: dict[str, LevelDatabase], name: str
) -> None:
    database = databases[name]
    fast, tiny, plain = Measurer(database), Measurer(database, limit=100_000), Measurer(database, plain=True)
    plans = walk(database, 5)
    for i, plan in enumerate(plans):
        rung = "slice" if i % 2 else "full"
        want, *others = ({**m(plan, rung), "seconds": 0} for m in (plain, fast, tiny))
        assert others == [want, want]
    assert fast.stitched is not None and fast.stitched.worth, "there is a place to start from"


def test_cuts_stand_where_everything_passes(databases: dict[str, LevelDatabase]) -> None:
    """Between the blocks of a residual network, one between two layers, with the bytes of their values."""
    graph = databases["resnet-b"].graph
    cuts = find_cuts(graph)
    inside = {name for block in graph.blocks for name in block.body}
    assert cuts and not inside & {cut.node for cut in cuts}
    assert [cut.before for cut in cuts] == sorted({cut.before for cut in cuts})
    for cut in cuts:
        assert cut.bytes == 4 * torch.Size(graph.values[cut.node].shape[1:]).numel()


def test_layers_before_the_first_change_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = make("resnet-b", tmp_path)
    measurer, ran = Measurer(database), list[str]()
    measurer(database.space.dense, "full")
    original = torch.nn.functional.conv2d

    def counted(*args: Tensor, **kwargs: object) -> Tensor:
        ran.append("conv")
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("torch.nn.modules.conv.F.conv2d", counted)
    last = max(i for i, site in enumerate(database.space.sites) if site.kind == "layer" and "conv" in site.name)
    eight_bits = next(i for i, level in enumerate(database.space.levels[last]) if level.label == "8-bit weights")
    plan = tuple(eight_bits if i == last else 0 for i in range(len(database.space.sites)))
    measurer(plan, "slice")
    assert 1 <= len(ran) < len(database.graph.layers) / 2
    before = len(ran)
    measurer(plan, "slice")
    measurer(plan, "full")  # no more examples than the slice has
    assert len(ran) == before
