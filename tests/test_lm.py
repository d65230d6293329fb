"""``lm:FOLDER``: the decoder computes what Hugging Face's does, its sites are coupled right, and a run ends in a proved file."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import TaskError, UsageError
from autocompress.evaluate import Measurer, fitness
from autocompress.export import export_onnx
from autocompress.finish import finish
from autocompress.graph import Graph, prove, rebuild, trace
from autocompress.onnx_cost import file_costs
from autocompress.pipeline import compress
from autocompress.results import Importance, Request
from autocompress.space import make_space
from autocompress.tasks import Task, load_task
from autocompress.tasks.decoder import load_decoder
from autocompress.types import SearchSpace
from autocompress.verify import check_model, quality
from autocompress.workers import Opening
from tests.language import LENGTH, SMALL, write_folder
from tests.quick import shorten


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny", steps=150)


@pytest.fixture(scope="module")
def task(folder: Path) -> Task:
    return load_task(f"lm:{folder}")


@pytest.fixture(scope="module")
def graph(task: Task) -> Graph:
    return trace(task.model, task.example_inputs)


@pytest.fixture(scope="module")
def space(graph: Graph) -> SearchSpace:
    return make_space(graph, ("channels", "blocks", "lowrank", "w8", "w4"))


# ---------------------------------------------------------------- the decoder


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"model_type": "qwen2"},
        {"model_type": "mistral", "sliding_window": 32, "head_dim": 16},
    ],
    ids=["llama", "untied", "no-gqa", "qwen2", "mistral"],
)
def test_logits_are_those_of_transformers(tmp_path: Path, changes: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    write_folder(tmp_path, **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = load_decoder(tmp_path, LENGTH)
    ids = torch.from_numpy(np.load(tmp_path / "eval_ids.npy").astype(np.int64))
    with torch.no_grad():
        want, got = theirs(ids).logits, ours(ids)
    assert float((want - got).abs().max()) < 1e-4 * float(want.abs().max())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "linear"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"vocab_size": "many"}, "many"),
        ({"hidden_size": 64}, "embed_tokens"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused_by_name(
    folder: Path, tmp_path: Path, changes: dict[str, object], word: str
) -> None:
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **changes}))
    with pytest.raises(TaskError, match=word):
        load_decoder(tmp_path, LENGTH)


# ---------------------------------------------------------------- the task


def test_splits_are_disjoint_windows_and_a_seed_repeats(folder: Path) -> None:
    first, again, other = (load_task(f"lm:{folder}", seed=s) for s in (0, 0, 1))
    assert first.hash == again.hash != other.hash
    parts = [{tuple(row) for row in split.inputs.tolist()} for split in first.splits.values()]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert len(first.calibration) + len(first.search) + (len(first.train) if first.train else 0) == 40


def test_perplexity_is_the_exponential_of_the_mean_loss(task: Task) -> None:
    ids = task.report.inputs.long()
    with torch.no_grad():
        logits = task.model(ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert task.metric(logits, task.report.targets) == pytest.approx(float(loss.exp()), rel=1e-5)
    assert float(task.loss(logits, task.report.targets)) == pytest.approx(float(loss), rel=1e-5)


def test_a_point_is_one_percent_of_the_perplexity(task: Task) -> None:
    """Scores are losses: 0.1 nats more make the perplexity exp(0.1) times as large."""
    assert task.drop_of(-0.1) == pytest.approx(100 * (math.exp(0.1) - 1))
    assert task.drop_of(0.0) == 0.0
    assert task.drop_of(-1000.0) == math.inf


def test_kl_of_token_logits_is_taken_over_the_vocabulary(task: Task) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, LENGTH, 48, generator=generator) for _ in range(2))
    want = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none")
    assert fitness(task, q, p, torch.zeros(5)) == pytest.approx(float(want.sum(-1).mean()), rel=1e-5)


def test_a_name_is_looked_up_in_the_data_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_task("lm:tiny", [str(folder.parent)]).report.inputs.shape == (12, LENGTH)
    monkeypatch.setenv("AUTOCOMPRESS_DATA", str(folder.parent))
    assert load_task("lm:tiny").metric_name == "perplexity"


def test_what_is_missing_is_said_with_its_place(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"looked in nowhere, .*nowhere: write lm:FOLDER"):
        load_task("lm:nowhere", [str(tmp_path)])
    for name in ("config.json", "model.safetensors", "eval_ids.npy"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(TaskError, match=r"put calib_ids.npy .* or calib.txt there"):
        load_task(f"lm:{tmp_path}")
    for bad, word in (
        (np.zeros((3, 4), np.float32), "integers"),
        (np.full((9, LENGTH), 48), "vocabulary of 48, calib in .* has 48"),
        (np.zeros(5, np.int64), "At least one window"),
        (np.zeros((2, LENGTH), np.int64), "at least 3 windows"),
    ):
        np.save(tmp_path / "calib_ids.npy", bad)
        with pytest.raises(TaskError, match=word):
            load_task(f"lm:{tmp_path}")


def test_text_is_read_by_the_folders_tokenizer(tmp_path: Path) -> None:
    """Bytes as tokens: what comes out is known."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    write_folder(tmp_path)
    words = {f"w{i}": i for i in range(48)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    ids = np.load(tmp_path / "calib_ids.npy")
    (tmp_path / "calib_ids.npy").unlink()
    (tmp_path / "calib.txt").write_text(" ".join(f"w{i}" for i in ids.ravel()))
    found = load_task(f"lm:{tmp_path}")
    rows = {
        tuple(r) for split in (found.calibration, found.search, found.train) if split for r in split.inputs.tolist()
    }
    assert rows == {tuple(r) for r in ids.tolist()}


# ---------------------------------------------------------------- sites


def test_heads_and_neurons_are_groups_and_branches_are_blocks(graph: Graph) -> None:
    groups = {group.name: group for group in graph.groups}
    heads, neurons = groups["model.layers.0.self_attn.q_proj"], groups["model.layers.0.mlp.gate_proj"]
    assert len(heads.classes) == SMALL["num_key_value_heads"]
    assert {name.rpartition(".")[2] for name in heads.producers} == {"q_proj", "k_proj", "v_proj"}
    assert [name.rpartition(".")[2] for name in heads.consumers] == ["o_proj"]
    assert len(neurons.classes) == SMALL["intermediate_size"]
    assert {name.rpartition(".")[2] for name in neurons.producers} == {"gate_proj", "up_proj"}
    want = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]
    assert [block.name for block in graph.blocks] == want
    assert len(graph.layers) == 14
    assert "embed_tokens" in graph.refused["linear"]  # the tied head


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_every_group_is_exact(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    loaded = load_decoder(
        write_folder(tmp_path, num_key_value_heads=kv_heads, tie_word_embeddings=tied, model_type="qwen2"), LENGTH
    )
    ids = torch.arange(2 * LENGTH).reshape(2, LENGTH) % 48
    found = trace(loaded, ids, proofs=False)
    assert len(found.groups) == 5
    for group in found.groups:
        assert prove(found, group, ids, seed=3) < 1e-4
    assert ("lm_head" in found.layers) == (not tied)


def test_the_proof_sees_a_head_that_is_coupled_wrongly(graph: Graph, task: Task) -> None:
    """Half of one head's channels and half of another's: pruned is not masked, or does not run."""
    group = next(g for g in graph.groups if len(g.classes) == 2)
    layer = graph.layers["model.layers.0.self_attn.q_proj"]
    wrong = graph.keep_all()
    wrong[layer.outputs[0]] = False
    narrowed = rebuild(graph, wrong)
    assert narrowed.get_submodule("model.layers.0.self_attn.q_proj").out_features == 16  # two heads of four
    assert narrowed.get_submodule("model.layers.0.self_attn.k_proj").out_features == 8
    assert prove(graph, group, task.example_inputs) < 1e-4


class _OwnAttention(torch.nn.Module):
    """Heads as users write them: views with sizes, permute, split and an explicit number of heads."""

    def __init__(self, heads: int = 4, inner: int = 8) -> None:
        super().__init__()
        self.heads, self.inner = heads, inner
        self.q, self.k, self.v = (torch.nn.Linear(16, heads * inner) for _ in range(3))
        self.out = torch.nn.Linear(heads * inner, 16)
        self.norm = torch.nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t = x.shape[0], x.shape[1]
        y = self.norm(x)
        q = self.q(y).view(n, t, self.heads, self.inner).permute(0, 2, 1, 3)
        k = self.k(y).reshape(n, t, self.heads, self.inner).transpose(1, 2)
        v = self.v(y).view(n, -1, self.heads, self.inner).transpose(1, 2)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).reshape(n, t, self.heads * self.inner))


def test_heads_in_the_users_own_views_are_followed() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 16)
    found = trace(_OwnAttention().eval(), x)
    assert [(group.name, len(group.classes)) for group in found.groups] == [("q", 4)]
    keep = found.keep_all()
    keep[found.groups[0].classes[[0, 2]]] = False
    small = rebuild(found, keep)
    assert small.get_submodule("out").in_features == 16 and small(x).shape == x.shape


# ---------------------------------------------------------------- costs, weights and files


def _some_plan(space: SearchSpace) -> tuple[int, ...]:
    """A head, neurons and a block gone, other layers factorized or rounded."""
    plan = list(space.dense)
    wanted = {
        "channels:model.layers.0.self_attn.q_proj": 1,
        "channels:model.layers.0.mlp.gate_proj": 3,
        "block:model.layers.1.mlp": 1,
    }
    formats = iter((3, 4, 1, 2))
    for i, site in enumerate(space.sites):
        if site.name in wanted:
            plan[i] = wanted[site.name]
        elif site.kind == "layer" and site.name.endswith(("1.self_attn.q_proj", "1.self_attn.o_proj", "0.mlp.up_proj")):
            plan[i] = min(next(formats), len(space.levels[i]) - 1)
    return tuple(plan)


@pytest.mark.slow
def test_costs_are_those_of_the_file(task: Task, graph: Graph, space: SearchSpace, tmp_path: Path) -> None:
    """MACs with attention's products, parameters with rotary tables, bytes: dense and compressed."""
    database = LevelDatabase(graph, space, task, tmp_path / "db")
    database.build()
    examples = task.inputs(task.calibration.take(3))
    dense = export_onnx(deploy(database.stitch(space.dense)), examples, tmp_path / "dense.onnx")
    costs = CostModel(graph, space, {}, dense.bytes)
    plan = _some_plan(space)
    model = deploy(finish(database, plan))
    small = export_onnx(model, examples, tmp_path / "small.onnx")
    assert small.coverage == {name: {"expected": 1, "found": 1} for name in ("w8", "w4", "lowrank")}
    for each, path in ((space.dense, dense.path), (plan, small.path)):
        predicted, found = costs.in_units(each), file_costs(path)
        assert predicted["macs"] == found["macs"]
        assert predicted["params"] == pytest.approx(found["params"], abs=4)
        assert predicted["size_mb"] == pytest.approx(found["size_mb"], rel=0.03)
    assert costs.in_units(plan)["macs"] < 0.9 * costs.in_units(space.dense)["macs"]
    before, after = quality(dense.path, small.path, task), quality(None, dense.path, task)
    assert after.drop[0] == pytest.approx(0, abs=1e-3)
    assert before.relative and before.compressed[0] == pytest.approx(before.original[0] * (1 + before.drop[0] / 100))
    assert before.drop[1] <= before.drop[0] <= before.drop[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "family", "count"),
    [
        ("60% sparse", "sparse", 14),
        ("2:4 sparse", "sparse", 14),
        ("3-bit weights by GPTQ", "w3", 14),
        ("2-bit tables", "lookup", 14),
    ],
)
def test_research_levels_on_every_layer(
    task: Task, graph: Graph, tmp_path: Path, label: str, family: str, count: int
) -> None:
    """Fitted on windows of text, judged, exported and counted; weights that stay are counted alike in table and file."""
    research = make_space(graph, ("sparse", "w3", "lut"))
    database = LevelDatabase(graph, research, task, tmp_path / "db")
    database.build()
    plan = tuple(next(i for i, v in enumerate(levels) if v.label == label) for levels in research.levels)
    model = deploy(finish(database, plan))
    examples = task.inputs(task.calibration.take(3))
    artifact = export_onnx(model, examples, tmp_path / "m.onnx", exporters=["legacy"])
    assert artifact.coverage[family] == {"expected": count, "found": count}
    predicted, found = CostModel(graph, research, {}).in_units(plan), file_costs(artifact.path, ("nonzeros",))
    assert predicted["weight_bits"] < 21
    if family == "sparse":
        assert 0.95 * predicted["nonzeros"] < found["nonzeros"] <= predicted["nonzeros"] + 4


@pytest.mark.slow
def test_plans_are_judged_without_models_of_their_own(
    folder: Path, task: Task, graph: Graph, space: SearchSpace, tmp_path: Path
) -> None:
    """To the bit what whole models answer, and the same where a worker opens the database by its task's name."""
    database = LevelDatabase(graph, space, task, tmp_path / "db")
    database.build()
    request = Request(
        task=f"lm:{folder}", budgets=("macs<=75%",), methods=("channels", "blocks", "lowrank", "int8", "w8", "w4")
    )
    fast, plain = Measurer(database), Measurer(database, plain=True)
    opened = Opening.of(database, request, tmp_path / "models", 1).open()
    assert fast.stitched is not None
    assert any(name.startswith("add") for name in fast.stitched.worth), "blocks of layers are places to start from"
    rng = random.Random(0)
    for i, plan in enumerate([space.dense, _some_plan(space), *(space.sample(rng) for _ in range(3))]):
        rung = "full" if i % 2 else "slice"
        want, *others = ({**m(plan, rung), "seconds": 0} for m in (plain, fast, opened))
        assert others == [want, want] and want["loss"] is not None


def test_finish_refits_layers_on_sequences(task: Task, graph: Graph, space: SearchSpace, tmp_path: Path) -> None:
    """Refit with the neurons' own Gram matrices is nearer to the original than leaving the others' weights as they are."""
    database = LevelDatabase(graph, space, task, tmp_path / "db")
    database.build()
    plan = list(space.dense)
    for i, site in enumerate(space.sites):
        if site.kind == "channels" and "mlp" in site.name:
            plan[i] = 4
    inputs, targets = task.inputs(task.search), task.search.targets
    with torch.no_grad():
        reference = task.model(inputs)
        losses = [
            fitness(task, model(inputs), reference, targets)
            for model in (
                rebuild(graph, database.keep(tuple(plan))),
                database.stitch(tuple(plan)),
                finish(database, tuple(plan)),
            )
        ]
    assert losses[0] > losses[1] > losses[2] > 0


@pytest.mark.parametrize("importance", get_args(Importance))
def test_heads_are_ordered_whole(task: Task, graph: Graph, tmp_path: Path, importance: str) -> None:
    offered = make_space(graph, ("channels",), importance)  # type: ignore[arg-type]
    database = LevelDatabase(graph, offered, task, tmp_path / "db")
    database.build()
    site = next(i for i, s in enumerate(offered.sites) if s.name.endswith("0.self_attn.q_proj"))
    plan = tuple(1 if i == site else 0 for i in range(len(offered.sites)))
    assert offered.levels[site][1].label == "keep 1/2"
    assert database.stitch(plan).get_submodule("model.layers.0.self_attn.k_proj").out_features == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "methods"), [("macs<=75%", ("channels", "blocks")), ("size_mb<=55%", ("lowrank", "w8", "w4"))]
)
def test_a_run_ends_in_a_verified_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str, methods: tuple[str, ...]
) -> None:
    shorten(monkeypatch, exporter="dynamo")  # the byte limit is set for its files
    request = Request(
        task=f"lm:{folder}", budgets=(budget,), methods=methods, evaluations=24, recover_minutes=0.0, threads=1
    )
    result = compress(request, tmp_path / "out")
    assert result.best is not None and result.metric_name == "perplexity"
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["holds"] and certificate["quality"]["relative"]
    assert "worse by" in certificate["statements"][0]
    checks = check_model(tmp_path / "out" / "model.onnx", [], task=request.task)
    assert checks == []


def test_int8_is_withheld_with_its_reason(folder: Path, tmp_path: Path) -> None:
    request = Request(task=f"lm:{folder}", budgets=("macs<=75%",), methods=("int8",), evaluations=4)
    with pytest.raises(UsageError, match="int8: calibrated 8-bit activations"):
        compress(request, tmp_path / "out")


# ---------------------------------------------------------------- the assets


@pytest.mark.assets
@pytest.mark.slow
def test_python_llama_has_the_perplexity_of_its_readme() -> None:
    """3.3933 nats, perplexity 29.76, on all 483 windows of 256 tokens."""
    found = load_task("lm:python_llama")
    with torch.inference_mode():
        batches = found.batches(found.report, 16)
        scores = torch.cat([found.score(found.model(inputs), targets) for inputs, targets in batches])
    assert scores.shape == (483,)
    assert float(scores.double().mean()) == pytest.approx(3.3933, abs=5e-5)
    assert found.metric_of(float(scores.double().mean())) == pytest.approx(29.76, abs=5e-3)
