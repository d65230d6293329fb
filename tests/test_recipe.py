"""Recipes of recovery: what can be written, and that every term and every kind of step does what its paper says."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autocompress import pipeline
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import UnknownName, UsageError
from autocompress.fitness import forward
from autocompress.graph import trace
from autocompress.methods import Sparse
from autocompress.methods.sparsity import WeightMask
from autocompress.pairing import attention_log, pair, tapped, with_originals
from autocompress.recipe import BARE, Recipe
from autocompress.recover import (
    Recovery,
    _Training,
    attention_divergence,
    attention_transfer,
    compressed,
    recover,
    relative_error,
)
from autocompress.results import Request
from autocompress.schedule import Schedule, at
from autocompress.space import make_space
from autocompress.tasks import load_task
from autocompress.tasks.resnet import ProjectionBlock, ResNet
from autocompress.types import Plan
from autocompress.validate import make_request
from tests import language, networks
from tests.test_database import pruned, uniform
from tests.test_recover import judged

SHORT = Recovery(steps=12, batch_size=32, checks=2)
ALL_WORDS = ("labels", "features", "attention", "labels,dot", "theseus", "cram", "accumulate=3", "bf16", "patience=1")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    """Stages of two blocks; the second has no projection, so four blocks keep their stream."""
    model = networks.lively(lambda: ResNet(ProjectionBlock, 2, widths=(16, 16, 24)))
    task = networks.taught("resnet", model)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph), task, tmp_path_factory.mktemp("resnet"))
    database.build()
    return database


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    task = networks.task("resnet-b", n=64)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph, ("sparse",)), task, tmp_path_factory.mktemp("sparse"))
    database.build()
    return database


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    folder = language.write_folder(tmp_path_factory.mktemp("decoder"), windows=200, steps=30)
    task = load_task(f"lm:{folder}", (), 0)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph, ("channels", "blocks")), task, folder / "database")
    database.build()
    return database


def widest_blocks(database: LevelDatabase, *drop: str) -> Plan:
    """Narrow inside blocks, all channels alive between them; blocks named in ``drop`` are gone."""
    inside = [frozenset(block.body) for block in database.graph.blocks]
    plan = []
    for site, n in zip(database.space.sites, database.space.n_levels, strict=True):
        group = next((g for g in database.graph.groups if site.name == f"channels:{g.name}"), None)
        private = group and any({database.graph.layers[p].node for p in group.producers} <= body for body in inside)
        plan.append(n - 1 if private else int(site.name.removeprefix("block:") in drop))
    return tuple(plan)


def training(database: LevelDatabase, plan: Plan, words: str, **changes: object) -> _Training:
    task = database.task
    settings = replace(SHORT, recipe=Recipe.parse(words), **changes)  # type: ignore[arg-type]
    reference = forward(database.graph.module, task, task.search)
    with torch.enable_grad():
        return _Training(database.stitch(plan), database.graph.module, task, settings, reference, pair(database, plan))


def recovered(
    database: LevelDatabase, plan: Plan, words: str, **changes: object
) -> tuple[fx.GraphModule, fx.GraphModule]:
    task, live = database.task, database.stitch(plan)
    settings = replace(SHORT, recipe=Recipe.parse(words), **changes)  # type: ignore[arg-type]
    reference = forward(database.graph.module, task, task.search)
    return live, recover(live, database.graph.module, task, settings, reference, pairing=pair(database, plan))


# ---------------------------------------------------------------- the text


@given(st.sets(st.sampled_from(sorted(BARE)), max_size=4), st.integers(0, 10**6))
def test_recipes_read_back_what_they_write(words: set[str], seed: int) -> None:
    rng = random.Random(seed)
    number = {
        name: f"={rng.choice(['0.01', '0.09'])}" for name in words if BARE[name] is not True and rng.random() < 0.5
    }
    number.pop("patience", None)
    try:
        recipe = Recipe.parse(", ".join(name + number.get(name, "") for name in words))
    except UsageError:
        return
    assert Recipe.parse(str(recipe)) == recipe


def test_the_plain_recipe_is_logits_and_every_word_is_known() -> None:
    assert str(Recipe()) == "logits"
    assert Recipe.parse("") == Recipe.parse("logits") == Recipe()
    assert set(BARE) <= {field.name for field in fields(Recipe)}
    assert Recipe.parse("features=0.5,labels,dot,bf16") == Recipe(features=0.5, labels=1.0, dot=0.075, bf16=True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("logits=0", "needs something to learn"),
        ("dot", "write 'dot,labels'"),
        ("dot=0.2,labels", "below 0.1"),
        ("features=-1", "0 or more"),
        ("features=nan", "0 or more"),
        ("accumulate=0", "above 0"),
        ("accumulate", "write for example 'accumulate=2'"),
        ("accumulate=x", "takes a number"),
        ("bf16=1", "takes no number"),
        ("theseus=2", "a share up to 1"),
        ("labels,labels=2", "twice"),
        ("clusters,scales", "leave one out"),
        ("shrink,gradual", "leave one out"),
    ],
)
def test_what_cannot_be_a_recipe_is_a_sentence(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Recipe.parse(text)


def test_a_misspelt_word_is_corrected() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'features'"):
        Recipe.parse("feature")


# ---------------------------------------------------------------- every word trains


@pytest.mark.slow
@pytest.mark.parametrize("words", ALL_WORDS)
def test_every_word_helps_a_pruned_network(database: LevelDatabase, words: str) -> None:
    before, after = recovered(database, pruned(database.space), words, steps=40, learning_rate=0.01)
    assert judged(database, after) < judged(database, before)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["labels,dot", "features,theseus", "cram,accumulate=2"])
def test_words_repeat_with_their_seed(database: LevelDatabase, words: str) -> None:
    plan = widest_blocks(database)
    first, second = (recovered(database, plan, words)[1].state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_more_than_outputs_needs_a_pairing(database: LevelDatabase) -> None:
    task, live = database.task, database.stitch(pruned(database.space))
    reference = forward(database.graph.module, task, task.search)
    with pytest.raises(UsageError, match="needs a pairing"):
        recover(live, database.graph.module, task, replace(SHORT, recipe=Recipe(features=1.0)), reference)


# ---------------------------------------------------------------- what is taught


def test_hints_are_the_values_behind_blocks_at_the_channels_that_live(database: LevelDatabase) -> None:
    plan = pruned(database.space)
    pairing, live = pair(database, plan), database.stitch(plan)
    x = database.task.inputs(database.task.search)
    assert len(pairing.hints) == len(database.graph.blocks)
    with torch.no_grad():
        _, mine, _ = tapped(live, [h.mine for h in pairing.hints])(x)
        out, theirs, _ = tapped(database.graph.module, [h.theirs for h in pairing.hints])(x)
    torch.testing.assert_close(out, database.graph.module(x))
    for hint in pairing.hints:
        assert mine[hint.mine].shape[1] == len(hint.kept) < theirs[hint.theirs].shape[1]


def test_the_dense_model_has_nothing_to_learn(database: LevelDatabase) -> None:
    for words in ("features,logits=0", "attention,logits=0", "logits"):
        run = training(database, database.space.dense, words)
        with torch.enable_grad():
            taught, labelled = run._terms(*run._batch())
        assert float(taught.detach()) == pytest.approx(0.0, abs=1e-6)
        assert float(labelled) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("word", ["features", "attention"])
def test_a_taught_value_comes_nearer(database: LevelDatabase, word: str) -> None:
    """Trained on one term alone, that term falls on examples that were not trained on."""
    plan = widest_blocks(database)
    run = training(database, plan, f"{word},logits=0", steps=60, learning_rate=0.02)
    task = database.task
    x, y = task.inputs(task.report), task.report.targets
    with torch.no_grad():
        before = float(run._terms(x, y)[0])
    with torch.enable_grad():
        run.run(None, None)
    with torch.no_grad():
        assert float(run._terms(x, y)[0]) < 0.9 * before


def test_attention_transfer_ignores_widths_and_sizes() -> None:
    a = torch.randn(4, 6, 5, 5)
    assert float(attention_transfer(a, 3 * a, 1)) == pytest.approx(0.0, abs=1e-10)
    assert float(attention_transfer(a, torch.cat([a, a], 1), 1)) == pytest.approx(0.0, abs=1e-10)
    b = torch.randn(4, 2, 5, 5)
    p, q = (F.normalize(v.square().sum(1).flatten(1)) for v in (a, b))
    torch.testing.assert_close(attention_transfer(a, b, 1), (p - q).square().sum(1).mean())


def test_relative_error_is_one_for_nothing() -> None:
    a = torch.randn(3, 4)
    assert float(relative_error(torch.zeros_like(a), a)) == pytest.approx(1.0)
    assert float(relative_error(a, a)) == 0.0


@pytest.mark.parametrize("causal", [True, False])
def test_attention_probabilities_are_what_the_operator_weighs_with(causal: bool) -> None:
    q, k, v = (torch.randn(2, 3, 7, 4) for _ in range(3))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(attention_log(q, k, v, is_causal=causal).exp() @ v, want, rtol=1e-5, atol=1e-5)
    mask = torch.rand(7, 7) < 0.7
    mask[:, 0] = True
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attention_log(q, k, v, mask).exp() @ v, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_heads_that_live_learn_their_own_maps(decoder: LevelDatabase) -> None:
    plan = tuple(
        n - 1 if site.kind == "channels" else 0
        for site, n in zip(decoder.space.sites, decoder.space.n_levels, strict=True)
    )
    pairing, live = pair(decoder, plan), decoder.stitch(plan)
    assert len(pairing.maps) == 2 and all(0 < len(m.kept) < 4 for m in pairing.maps)
    x = decoder.task.inputs(decoder.task.search.take(4))
    with torch.no_grad():
        _, _, mine = tapped(live, maps=[m.mine for m in pairing.maps])(x)
        _, _, theirs = tapped(decoder.graph.module, maps=[m.theirs for m in pairing.maps])(x)
    for m in pairing.maps:
        other = theirs[m.theirs][:, m.kept]
        assert mine[m.mine].shape == other.shape
        divergence = attention_divergence(mine[m.mine], other)
        assert torch.isfinite(divergence) and divergence >= -1e-6
        # the first layer's heads read what the original's do: their own maps, not another head's
        if m is pairing.maps[0] and all(h.kept.numel() == 32 for h in pairing.hints):
            assert divergence < 1e-4
    before, after = recovered(decoder, plan, "attention,features", steps=30, learning_rate=0.01)
    assert judged(decoder, after) < judged(decoder, before)


# ---------------------------------------------------------------- how it steps


def test_parts_of_a_batch_add_up_to_it(database: LevelDatabase) -> None:
    """Also where it does not divide."""
    plan = widest_blocks(database)
    whole = training(database, plan, "labels,features=0,logits")
    parts = training(database, plan, "labels,accumulate=3")
    batch = whole._batch()
    with torch.enable_grad():
        (one,), (many,) = whole._gradients(batch), parts._gradients(batch)
    for a, b in zip(one, many, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_dot_keeps_two_momenta(database: LevelDatabase) -> None:
    """Two steps by hand: ``v <- (mu +- delta) v + g`` each, with Nesterov's look ahead, and the sum of both moves the weights."""
    plan, rate = widest_blocks(database), 1e-3
    run = training(database, plan, "labels,dot=0.05", weight_decay=0.0)
    optimizers, _ = run._optimizers(rate)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = rate
    weights = [p.detach().clone() for p in run.weights]
    speeds: list[list[Tensor | float]] = [[0.0] * len(weights) for _ in range(2)]
    with torch.enable_grad():
        for _ in range(2):
            batch = run._batch()
            gradients = run._gradients(batch)
            assert len(gradients) == 2
            for k, momentum in enumerate((0.95, 0.85)):
                norm = torch.stack([g.norm() for g in gradients[k] if g is not None]).norm()
                for i, g in enumerate(gradients[k]):
                    assert g is not None
                    g = g * min(1.0, 5.0 / (float(norm) + 1e-6))
                    speeds[k][i] = momentum * speeds[k][i] + g
                    weights[i] = weights[i] - rate * (g + momentum * speeds[k][i])
            run._step(optimizers, batch)
    for mine, hand in zip(run.weights, weights, strict=True):
        torch.testing.assert_close(mine.detach(), hand, rtol=1e-4, atol=1e-6)


def test_cram_looks_from_the_compressed_weights_and_comes_back() -> None:
    weights = [nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 0.5]])), nn.Parameter(torch.tensor([1.0]))]
    gradients: list[Tensor | None] = [torch.tensor([[-5.0, 0.0], [0.0, 30.0]]), torch.tensor([10.0])]
    with compressed(weights, gradients, 0.1, 0.5):
        torch.testing.assert_close(weights[0].data, torch.tensor([[0.0, 0.0], [3.0, 3.5]]))
        torch.testing.assert_close(weights[1].data, torch.tensor([2.0]))
    assert weights[0].tolist() == [[1.0, -2.0], [3.0, 0.5]] and weights[1].tolist() == [1.0]


@pytest.mark.slow
def test_after_cram_a_network_can_be_pruned_at_once(database: LevelDatabase) -> None:
    """One-shot magnitude at 70 % after as many steps: well below what is left after SGD; the dense model is as good."""
    lost, dense = {}, {}
    for words in ("labels,logits=0.1", "labels,logits=0.1,cram"):
        run = training(database, database.space.dense, words, steps=150, learning_rate=0.02)
        with torch.enable_grad():
            run.run(None, None)
        made = copy.deepcopy(run.model)
        dense[words] = judged(database, made)
        with torch.no_grad():
            for part in made.modules():
                if isinstance(part, nn.Conv2d):
                    flat = part.weight.abs().flatten()
                    part.weight *= part.weight.abs() > flat.kthvalue(round(0.7 * len(flat))).values
        lost[words] = judged(database, made)
    sgd, cram = lost
    assert lost[cram] < 0.8 * lost[sgd]
    assert dense[cram] < dense[sgd] + 0.3


def test_patience_ends_a_training_that_gains_nothing(database: LevelDatabase) -> None:
    seen: list[int] = []
    task, live = database.task, database.stitch(pruned(database.space))
    reference = forward(database.graph.module, task, task.search)
    settings = replace(SHORT, steps=40, checks=20, learning_rate=1e3, recipe=Recipe(patience=3))
    recover(live, database.graph.module, task, settings, reference, lambda done, total: seen.append(done))
    assert seen[-1] == 6  # three checks of two steps each


# ---------------------------------------------------------------- Theseus


def test_a_model_of_all_the_originals_blocks_is_the_original_between_them(database: LevelDatabase) -> None:
    plan = widest_blocks(database)
    pairing, live = pair(database, plan), database.stitch(plan)
    assert pairing.units
    x = database.task.inputs(database.task.report)
    with torch.no_grad():
        torch.testing.assert_close(with_originals(live, database.graph.module, [])(x), live(x))
        mixed = with_originals(live, database.graph.module, pairing.units)
        assert not torch.allclose(mixed(x), live(x))
        # what is not in a unit (stem, blocks with a projection, classifier) reads whole streams, too
        theirs = database.graph.module(x)
        assert (mixed(x) - theirs).abs().mean() < (live(x) - theirs).abs().mean()


def test_units_of_a_decoder_with_dropped_blocks(decoder: LevelDatabase) -> None:
    """Dropped blocks belong to the unit of the block before them; with all units exchanged it is the original again."""
    names = [block.name for block in decoder.graph.blocks]
    plan = widest_blocks(decoder, names[1], names[3])
    pairing, live = pair(decoder, plan), decoder.stitch(plan)
    assert len(pairing.units) == len(names) - 2
    x = decoder.task.inputs(decoder.task.search.take(4))
    with torch.no_grad():
        mixed = with_originals(live, decoder.graph.module, pairing.units)
        torch.testing.assert_close(mixed(x), decoder.graph.module(x), rtol=1e-4, atol=1e-4)
        one = with_originals(live, decoder.graph.module, pairing.units[1:])
        assert not torch.allclose(one(x), decoder.graph.module(x), atol=1e-3)
        assert not torch.allclose(one(x), live(x), atol=1e-3)


@pytest.mark.slow
def test_gradients_pass_the_originals_blocks_and_leave_them_as_they_are(decoder: LevelDatabase) -> None:
    names = [block.name for block in decoder.graph.blocks]
    plan = widest_blocks(decoder, names[1])
    dense = {k: v.clone() for k, v in decoder.graph.module.state_dict().items()}
    before, after = recovered(decoder, plan, "theseus=0.3", steps=30, learning_rate=0.01)
    assert judged(decoder, after) < judged(decoder, before)
    assert all(torch.equal(v, dense[k]) for k, v in decoder.graph.module.state_dict().items())


def test_the_share_of_own_blocks_grows_to_one(database: LevelDatabase) -> None:
    schedule = Schedule(database.stitch(database.space.dense), Recipe(theseus=0.5), 100, {}, dict)
    shares = [schedule.own(step) for step in range(100)]
    assert shares[0] == 0.5 and shares == sorted(shares) and shares[30] == pytest.approx(0.75)
    assert set(shares[60:]) == {1.0}


# ---------------------------------------------------------------- sparse levels


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: part.mask.clone() for name, part in model.named_modules() if isinstance(part, WeightMask)}


@pytest.mark.parametrize("words", ["logits", "features,labels,dot", "cram", "theseus", "bf16"])
@pytest.mark.parametrize("label", ["80% sparse", "2:4 sparse"])
def test_masks_survive_every_recipe(sparse: LevelDatabase, words: str, label: str) -> None:
    plan = uniform(sparse.space, label)
    run = training(sparse, plan, words, learning_rate=0.01)
    mine = masks(run.model)
    with torch.enable_grad():
        run.run(None, None)
    theirs, start = masks(run.model), sparse.stitch(plan)
    assert mine and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not torch.equal(
        run.model.get_submodule("layer2.0.conv1").weight, start.get_submodule("layer2.0.conv1").weight
    )
    for part in deploy(run.model).modules():
        assert all(form.holds(part.weight) for form in getattr(part, "forms", ()))


@pytest.mark.slow
@pytest.mark.parametrize("label", ["80% sparse", "2:4 sparse"])
def test_a_gradual_recovery_ends_at_the_level(sparse: LevelDatabase, label: str) -> None:
    """It begins dense, masks of its own grow by the cubic rule, and what wins has as many zeros as the level asks for."""
    plan = uniform(sparse.space, label)
    run = training(sparse, plan, "gradual=0.6", steps=30, learning_rate=0.01)
    shares = []
    for step in range(30):
        run.schedule.mask(step)
        found = masks(run.model)
        shares.append(1 - sum(int(m.sum()) for m in found.values()) / sum(m.numel() for m in found.values()))
    assert shares[0] == 0.0 and shares == sorted(shares) and len(set(shares[18:])) == 1
    before, after = recovered(sparse, plan, "gradual=0.6", steps=60, learning_rate=0.02)
    mine, theirs = masks(before), masks(after)
    assert {k: int(m.sum()) for k, m in mine.items()} == {k: int(m.sum()) for k, m in theirs.items()}
    assert judged(sparse, after) <= judged(sparse, before)


@pytest.mark.slow
@pytest.mark.parametrize("label", ["80% sparse by fisher", "2:4 sparse by fisher"])
def test_a_gradual_recovery_asks_the_fisher_matrix_anew(label: str, tmp_path: Path) -> None:
    """Each update has gradients of the network as it is then; what is gone stays gone, what lives makes it good."""
    task = networks.task("resnet-b", n=64)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph, ("sparse-fisher",)), task, tmp_path)
    database.build()
    plan = uniform(database.space, label)
    run = training(database, plan, "gradual=0.6", steps=30, learning_rate=0.01)
    measure, asked = run.schedule.moments, list[dict[str, Tensor]]()

    def moments(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        asked.append(dict(measure(weights)))
        return asked[-1]

    run.schedule.moments = moments
    before, changes = dict[str, Tensor](), 0
    name = "layer1.0.conv1"
    for step in range(30):
        layer = run.model.get_submodule(name)
        weights = layer.weight.detach().clone()  # type: ignore[operator]
        run.schedule.mask(step)
        now = masks(run.model)
        assert all((now[key] <= before.get(key, now[key])).all() for key in now)
        mask = now[f"{name}.parametrizations.weight.0"]
        if before and not torch.equal(mask, before[f"{name}.parametrizations.weight.0"]):
            assert not torch.equal(layer.weight[mask], weights[mask])  # type: ignore[index]
            changes += 1
        before = now
    assert changes >= 2 and len(asked) == 9 and not torch.equal(asked[0][name], asked[-1][name])
    assert {k: int(m.sum()) for k, m in masks(database.stitch(plan)).items()} == {
        k: int(m.sum()) for k, m in before.items()
    }


def test_the_schedule_is_zhu_and_guptas() -> None:
    assert at(Sparse(0.8), 0.0).sparsity == 0.0 and at(Sparse(0.8), 1.0) == Sparse(0.8, by="magnitude")
    assert [at(Sparse(0.5, 2, 4), share).keep for share in (0.0, 0.5, 1.0)] == [4, 3, 2]


def test_the_first_step_of_a_gradual_recovery_is_the_dense_network(sparse: LevelDatabase) -> None:
    plan = uniform(sparse.space, "90% sparse")
    run = training(sparse, plan, "gradual")
    run.schedule.mask(0)
    x = sparse.task.inputs(sparse.task.report)
    with torch.no_grad():
        torch.testing.assert_close(run.model(x), sparse.graph.module(x), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- in a job


def test_every_word_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recovery.md").read_text(encoding="utf-8")
    for field in fields(Recipe):
        assert f"`{field.name}" in page or f"{field.name}=T" in page, field.name


@pytest.mark.slow
def test_a_job_recovers_as_its_recipe_says_and_its_replay_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "REFITTED", 2)
    monkeypatch.setattr(pipeline, "RECOVERED", 1)
    task = networks.task("resnet-b", n=64)
    fields_of = {"task": "resnet-b", "budgets": ("macs<=85%",), "evaluations": 6, "recover_steps": 4}
    request = Request.model_validate({**fields_of, "recovery": "labels,dot,features", "methods": ("channels",)})
    result = pipeline.compress(request, tmp_path / "run", task=task)
    assert any(point.fidelity == "recovered" for point in result.points)
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert "--recovery labels,dot,features" in certificate["replay"].replace("'", "")
    assert request.hash != Request.model_validate(fields_of).hash


def test_requests_name_recipes_in_their_normal_form() -> None:
    fields_of = {"task": "digits", "budgets": ["macs<=50%"]}
    assert make_request({**fields_of, "recovery": " dot, labels=1 "}).recovery == "labels,dot"
    assert make_request(fields_of).recovery == "logits"
    with pytest.raises(UnknownName, match="Did you mean 'theseus'"):
        make_request({**fields_of, "recovery": "thesus"})
