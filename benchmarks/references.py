"""Our methods beside the code that others published, on the same layers with the same inputs in the same run.

Run: python benchmarks/references.py --data ASSETS --sparsegpt FOLDER --gptq FOLDER --torchprune FOLDER --zipnn FOLDER. Each is a
checkout of github.com/IST-DASLab/sparsegpt, IST-DASLab/gptq, lucaslie/torchprune; for ZipNN one that holds the package ``zipnn``
(``pip install --target FOLDER --no-deps zipnn``). What is not given is skipped and says so; torch-pruning is taken where it is
installed. One thread, nothing is random.

Errors of layers are ``||(W - W') X|| / ||W X||``, a mean over layers: on the calibration inputs that all saw, and on held-out
text.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import io
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib import metadata, util
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, load, opened, quality, save

from autocompress.deploy import deploy
from autocompress.finish import finish
from autocompress.gram import unfold
from autocompress.graph import Graph, Keep, rebuild, trace
from autocompress.methods.coding import Form, coded_bytes, pack, unpack
from autocompress.methods.gptq import gptq
from autocompress.methods.grouped import SPLITS, best_split, group_rank, grouped_factors
from autocompress.methods.hessian import Hessian
from autocompress.methods.importance import l2_importance
from autocompress.methods.quantization import pack_weight
from autocompress.methods.sparsity import Sparse, prune
from autocompress.space import make_space
from autocompress.tasks import Task, load_task

LAYERS = tuple(
    f"model.layers.4.{name}"
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
)  # fmt: skip
"""Every linear layer of one block of the small Llama."""
HELD_OUT = 32
IMAGES = 128
"""Whose windows are the inputs of a convolution."""
JUDGED = 2000
SPARSE = {
    "50%": Sparse(0.5), "70%": Sparse(0.7), "90%": Sparse(0.9), "2:4": Sparse(0.5, 2, 4), "4:8": Sparse(0.5, 4, 8)
}  # fmt: skip
GRIDS = ((4, 0), (3, 0), (2, 0), (4, 32), (3, 64), (2, 64))
"""Bits, and inputs a scale (0: a channel)."""
OPTIONS: dict[str, dict[str, bool]] = {
    "as its scripts run it": {"sym": False, "mse": False, "actorder": False},
    "ordered": {"sym": False, "mse": False, "actorder": True},
    "ordered, mse": {"sym": False, "mse": True, "actorder": True},
    "symmetric, ordered": {"sym": True, "mse": False, "actorder": True},
    "symmetric, ordered, mse": {"sym": True, "mse": True, "actorder": True},
}
"""Of GPTQ's reference: asymmetric grids unless said, columns by falling ``H_jj``, ranges by squared error."""
FLOATS = {"bf16": (torch.bfloat16, "bfloat16"), "fp32": (torch.float32, "float32")}
WEIGHTS = {"python_llama": "python_llama/model.safetensors", "resnet56": "cifar10_resnets/resnet56.safetensors"}

COMMAND = (
    "python benchmarks/references.py --data ASSETS --sparsegpt FOLDER --gptq FOLDER --torchprune FOLDER --zipnn FOLDER"
)

Row = dict[str, Any]


def imported(folder: str, *names: str) -> list[Any]:
    """Modules from a checkout; both repositories have a ``quant``, so the one of the other goes first."""
    for name in (*names, "quant"):
        sys.modules.pop(name, None)
    sys.path.insert(0, folder)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(folder)


def fingerprint(*modules: Any) -> str:
    """What was compared with: names and the first digits of their hashes."""
    files = [Path(module.__file__) for module in modules]
    return ", ".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}" for file in files)


def asset(data: list[str], name: str) -> Path:
    return next(Path(folder) / name for folder in data if (Path(folder) / name).exists())


# ---------------------------------------------------------------- one layer


def weight_of(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight).detach()


class Inputs:
    """What one layer reads: rows for those who measure themselves, second moments with a last one for us."""

    def __init__(self, layer: nn.Module, rows: list[Tensor]) -> None:
        self.layer, self.weight = layer, weight_of(layer)
        self.rows = torch.cat(rows)  # (rows, n + 1)
        x = self.rows.double()
        self.gram = x.T @ x / len(x)
        self.others = self.gram

    def errors(self, weight: Tensor) -> tuple[float, float]:
        """Relative output error of other weights on these inputs, and on the others."""
        w = self.weight.flatten(1).double()
        change = w - weight.flatten(1).double()

        def norm(of: Tensor, gram: Tensor) -> float:
            return float(((of @ gram[:-1, :-1]) * of).sum().clamp_min(0).sqrt())

        return norm(change, self.gram) / norm(w, self.gram), norm(change, self.others) / norm(w, self.others)


def inputs_of(model: nn.Module, names: tuple[str, ...], inputs: Tensor) -> dict[str, Inputs]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, given: found[name].append(unfold(layer, given[0]))

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for start in range(0, len(inputs), 16):
            model(inputs[start : start + 16])
    for handle in hooks:
        handle.remove()
    return {name: Inputs(model.get_submodule(name), rows) for name, rows in found.items()}


def linear_layers(task: Task) -> dict[str, Inputs]:
    found = inputs_of(task.model, LAYERS, task.inputs(task.calibration))
    others = inputs_of(task.model, LAYERS, task.inputs(task.report.take(HELD_OUT)))
    for name, layer in found.items():
        layer.others = others[name].gram
    return found


def compared(layers: dict[str, Inputs], ways: dict[str, Callable[[Inputs], Tensor]]) -> Row:
    """Means over layers of both errors of each way, and the single ones."""
    each = {way: {name: layer.errors(make(layer)) for name, layer in layers.items()} for way, make in ways.items()}
    row: Row = {"layers": {way: {n: round(e[0], 5) for n, e in of.items()} for way, of in each.items()}}
    for way, of in each.items():
        row[way] = f"{np.mean([e[0] for e in of.values()]):.2%}"
        row[f"{way}_held_out"] = f"{np.mean([e[1] for e in of.values()]):.2%}"
    return row


def sparse_rows(folder: str, layers: dict[str, Inputs]) -> Iterator[Row]:
    (module,) = imported(folder, "sparsegpt")
    for label, config in SPARSE.items():

        def theirs(layer: Inputs, config: Sparse = config) -> Tensor:
            copied = copy.deepcopy(layer.layer)
            reference = module.SparseGPT(copied)
            reference.add_batch(layer.rows[None, :, :-1], None)
            with redirect_stdout(io.StringIO()):
                reference.fasterprune(config.sparsity, prunen=config.of - config.keep, prunem=config.of)
            return weight_of(copied)

        def ours(layer: Inputs, config: Sparse = config) -> Tensor:
            return prune(layer.weight.double(), config, Hessian(layer.gram, biased=False))[0]

        def magnitude(layer: Inputs, config: Sparse = config) -> Tensor:
            return prune(layer.weight.double(), config, None)[0]

        row = compared(layers, {"theirs": theirs, "ours": ours, "plain": magnitude})
        yield {"what": "SparseGPT", "setting": label, "plainly": "magnitude", "reference": fingerprint(module), **row}


def gptq_rows(folder: str, layers: dict[str, Inputs]) -> Iterator[Row]:
    module, quant = imported(folder, "gptq", "quant")
    for bits, group in GRIDS:

        def theirs(options: dict[str, bool], bits: int = bits, group: int = group) -> Callable[[Inputs], Tensor]:
            def make(layer: Inputs) -> Tensor:
                copied = copy.deepcopy(layer.layer)
                reference = module.GPTQ(copied)
                reference.add_batch(layer.rows[None, :, :-1], None)
                reference.quantizer = quant.Quantizer()
                reference.quantizer.configure(bits, perchannel=True, sym=options["sym"], mse=options["mse"])
                ordered = options["actorder"]
                fixed = ordered and bool(group)
                with redirect_stdout(io.StringIO()):
                    reference.fasterquant(groupsize=group or -1, actorder=ordered, static_groups=fixed)
                return weight_of(copied)

            return make

        def ours(layer: Inputs, bits: int = bits, group: int = group) -> Tensor:
            return gptq(layer.weight, bits, group, Hessian(layer.gram, biased=False), grid="full").dequantize()

        def nearest(layer: Inputs, bits: int = bits, group: int = group) -> Tensor:
            return pack_weight(layer.weight, bits, group, grid="full").dequantize()

        variants = {f"theirs, {name}": theirs(options) for name, options in OPTIONS.items()}
        row = compared(layers, {**variants, "ours": ours, "plain": nearest})
        best = min(variants, key=lambda name: float(row[name].rstrip("%")))
        first = next(iter(variants))
        yield {
            "what": "GPTQ",
            "setting": f"{bits} bits, " + (f"groups of {group}" if group else "a channel"),
            "plainly": "nearest",
            "reference": fingerprint(module, quant),
            **row,
            "theirs": row[first],
            "theirs_held_out": row[f"{first}_held_out"],
            "remark": f"theirs at its best {row[best]} ({best.removeprefix('theirs, ')})",
        }


# ---------------------------------------------------------------- grouped SVD


def alds(folder: str) -> tuple[Any, Any, Any]:
    """The allocator, the sparsifier and the folding of torchprune, whose packages' own imports need its whole environment."""
    root = next(path for path in Path(folder).rglob("torchprune") if (path / "method" / "alds").is_dir())
    places = {name: root.joinpath(*name.split(".")) for name in ("util", "method")}
    places |= {f"method.{name}": root / "method" / name for name in ("base", "base_decompose", "alds")}
    made = {"torchprune": types.ModuleType("torchprune")}
    made["torchprune"].__path__ = [str(root)]
    for name, place in places.items():
        made[name] = types.ModuleType(f"torchprune.{name}")
        made[name].__path__ = [str(place)]
        sys.modules[f"torchprune.{name}"] = made[name]
    sys.modules["torchprune"] = made["torchprune"]
    made["method.base"].BaseSparsifier = type("BaseSparsifier", (), {})  # type: ignore[attr-defined]
    made["method.base"].BaseFilterAllocator = nn.Module  # type: ignore[attr-defined]
    at = "torchprune.method.base_decompose."
    folding = importlib.import_module(at + "base_decompose_util")
    sparsifier = importlib.import_module(at + "base_decompose_sparsifier")
    made["method.base_decompose"].FoldScheme = folding.FoldScheme  # type: ignore[attr-defined]
    base = importlib.import_module(at + "base_decompose_allocator")
    made["method.base_decompose"].BaseDecomposeAllocator = base.BaseDecomposeAllocator  # type: ignore[attr-defined]
    return importlib.import_module("torchprune.method.alds.alds_allocator"), sparsifier, folding


def rank_of(weight: Tensor, ratio: float, groups: int) -> int:
    return group_rank(ratio, weight.shape[0], weight.shape[1], weight[0, 0].numel(), groups)


def factored(weight: Tensor, ratio: float, groups: int, gram: Tensor | None) -> Tensor:
    """Our grouped SVD multiplied out.  # (out, n)"""
    u, v = grouped_factors(weight.flatten(1).double(), rank_of(weight, ratio, groups), groups, gram)
    wide: Tensor = torch.block_diag(*v.double().chunk(groups))  # type: ignore[no-untyped-call]
    return u.double() @ wide


def their_split(allocator: Any, folding: Any, weight: Tensor, ratio: float) -> int:
    """How many slices their search chooses for a layer at the weights that one slice has, from the numbers we choose from."""
    kind, scheme, rank = allocator.ALDSErrorIterativeAllocator, folding.FoldScheme(0), rank_of(weight, ratio, 1)
    self = types.SimpleNamespace(
        _kernel_shapes=[weight.shape[2:]],
        _out_features=torch.tensor([weight.shape[0]]),
        _in_features=torch.tensor([weight.shape[1]]),
        _possible_k_splits=[[k for k in SPLITS if weight.shape[1] % k == 0]],
        _scheme_choices=[scheme],
        _rounding_factor=-1e-6,  # down, as ours: what is asked for is a limit
        get_num_samples=lambda ell: (torch.tensor(rank), torch.tensor(1), torch.tensor(0)),
        _compute_sv_for_weight=kind._compute_sv_for_weight,
        _compute_norm_for_weight=kind._compute_norm_for_weight,
    )
    self._lookup_rel_error = lambda ell, k, scheme: kind._compute_rel_error_for_weight(
        self, weight, torch.tensor(k), scheme
    )
    self._round_rank = lambda value: kind._round_rank(self, torch.as_tensor(value))
    return int(kind._find_best_k_s(self, 0)[0])


def grouped_rows(folder: str, data: list[str]) -> Iterator[Row]:
    allocator, sparsifier, folding = alds(folder)
    task = load_task("cifar10:resnet20", data)
    names = tuple(
        name for name, part in task.model.named_modules() if isinstance(part, nn.Conv2d) and part.weight.numel() >= 1024
    )
    layers = inputs_of(task.model, names, task.inputs(task.calibration.take(IMAGES)))
    for ratio in (0.75, 0.5, 0.25):
        splits: dict[str, dict[Inputs, int]] = {
            "theirs": {layer: their_split(allocator, folding, layer.weight, ratio) for layer in layers.values()},
            "ours": {layer: best_split(layer.weight, ratio) for layer in layers.values()},
        }

        def theirs(layer: Inputs, ratio: float = ratio, splits: dict[Inputs, int] = splits["theirs"]) -> Tensor:
            rank, scheme = rank_of(layer.weight, ratio, splits[layer]), folding.FoldScheme(0)
            made = sparsifier.GroupedDecomposeSparsifier()._sparsify(layer.weight, rank, splits[layer], scheme)
            return torch.cat([u @ v for u, v in made], dim=1)

        def ours(layer: Inputs, ratio: float = ratio, splits: dict[Inputs, int] = splits["ours"]) -> Tensor:
            return factored(layer.weight, ratio, splits[layer], layer.gram)

        def plain(layer: Inputs, ratio: float = ratio, splits: dict[Inputs, int] = splits["ours"]) -> Tensor:
            return factored(layer.weight, ratio, splits[layer], None)

        row = compared(layers, {"theirs": theirs, "ours": ours, "plain": plain})
        same = sum(splits["theirs"][layer] == splits["ours"][layer] for layer in layers.values())
        yield {
            "what": "ALDS",
            "setting": f"{ratio:.0%} of the weights",
            "remark": f"the same number of slices in {same} of {len(names)} layers",
            "plainly": "ours without data",
            "reference": fingerprint(allocator, sparsifier),
            "slices": {way: {name: of[layer] for name, layer in layers.items()} for way, of in splits.items()},
            **{key: value for key, value in row.items() if not key.endswith("held_out")},
        }


# ---------------------------------------------------------------- files


def coding_rows(folder: str, data: list[str]) -> Iterator[Row]:
    sys.path.append(folder)  # behind everything that is installed: only ZipNN itself is taken from there
    zipnn = importlib.import_module("zipnn")
    version = next((d.version for d in metadata.distributions(path=[folder], name="zipnn")), "unknown")
    for name, file in WEIGHTS.items():
        weights = {key: t for key, t in load_file(asset(data, file)).items() if t.is_floating_point()}
        for word, (dtype, their_word) in FLOATS.items():
            state = {key: t.to(dtype) for key, t in weights.items()}
            whole = as_bytes(state)

            def theirs(raw: bytes, their_word: str = their_word) -> int:
                coded = zipnn.ZipNN(bytearray_dtype=their_word).compress(bytearray(raw))
                back = zipnn.ZipNN(bytearray_dtype=their_word).decompress(coded)
                if bytes(back) != raw:
                    raise SystemExit(f"ZipNN did not give back {len(raw)} bytes of {their_word}.")
                return len(coded)

            packed = pack(whole, ".safetensors")
            if unpack(packed) != whole:
                raise SystemExit(f"unpack did not give back {name} in {word}.")
            raws = {key: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for key, t in state.items()}
            total = sum(len(raw) for raw in raws.values())
            ours = sum(
                coded_bytes(raw, Form("float", dtype.itemsize, tuple(state[k].shape))) for k, raw in raws.items()
            )
            base: Row = {"what": "ZipNN", "reference": f"zipnn {version}", "lossless": "both"}
            yield {
                **base, "setting": f"{name}, {word}, the file",
                "theirs": f"{theirs(whole) / len(whole):.2%}", "ours": f"{len(packed) / len(whole):.2%}",
            }  # fmt: skip
            yield {
                **base, "setting": f"{name}, {word}, each tensor",
                "theirs": f"{sum(theirs(raw) for raw in raws.values()) / total:.2%}", "ours": f"{ours / total:.2%}",
            }  # fmt: skip


# ---------------------------------------------------------------- channels


def inner(graph: Graph) -> list[str]:
    """Layers whose channels nobody else makes: the first of each residual block."""
    return [group.producers[0] for group in graph.groups if len(group.producers) == 1]


def half_by_l2(graph: Graph, layers: list[str]) -> Keep:
    """Without the half of the channels of each group, or of those of these layers, that have the least weights."""
    keep = graph.keep_all()
    for group in graph.groups:
        if not layers or group.producers[0] in layers:
            order = np.argsort(l2_importance(graph, group), kind="stable")
            keep[group.classes[order[: len(order) // 2]]] = False
    return keep


def half_by_theirs(tp: Any, task: Task, layers: list[str]) -> nn.Module:
    model = copy.deepcopy(task.model)
    tp.pruner.MagnitudePruner(
        model,
        task.example_inputs,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.0 if layers else 0.5,
        pruning_ratio_dict={model.get_submodule(name): 0.5 for name in layers},
        ignored_layers=[part for part in model.modules() if isinstance(part, nn.Linear)],
    ).step()
    return model


def judged(task: Task, model: nn.Module) -> str:
    n = sum(p.numel() for p in model.parameters())
    try:
        return f"{quality(task, model, task.report.take(JUDGED)):.1%} of {n:,} parameters"
    except RuntimeError as error:
        return f"does not run: {error}"


def channel_rows(data: list[str]) -> Iterator[Row]:
    tp = importlib.import_module("torch_pruning")
    for name in ("resnet20", "resnet56"):
        task = load_task(f"cifar10:{name}", data)
        graph = trace(task.model, task.example_inputs)
        linear = [part for part in task.model.modules() if isinstance(part, nn.Linear)]
        groups = tp.DependencyGraph().build_dependency(task.model, example_inputs=task.example_inputs)
        theirs = list(groups.get_all_groups(ignored_layers=linear, root_module_types=[nn.Conv2d, nn.Linear]))
        base: Row = {"what": "torch-pruning", "reference": f"torch-pruning {metadata.version('torch-pruning')}"}
        yield {**base, "setting": f"{name}, groups of channels", "theirs": len(theirs), "ours": len(graph.groups)}
        space = make_space(graph, ("channels",), "l2")
        half = tuple(
            min(range(len(levels)), key=lambda i: abs((levels[i].steps[0].keep if i else site.width) - site.width / 2))  # type: ignore[attr-defined]
            for site, levels in zip(space.sites, space.levels, strict=True)
        )  # fmt: skip
        for label, layers in (("inside blocks", inner(graph)), ("everywhere", [])):
            row = {
                "theirs": judged(task, half_by_theirs(tp, task, layers)),
                "ours": judged(task, rebuild(graph, half_by_l2(graph, layers))),
            }
            names = {group.name for group in graph.groups if not layers or group.producers[0] in layers}
            plan = tuple(
                i if any(site.name.endswith(own) for own in names) else 0
                for i, site in zip(half, space.sites, strict=True)
            )
            if name == "resnet20":
                row["remark"] = "ours refitted: " + judged(task, deploy(finish(opened(graph, space, task), plan)))
            yield {**base, "setting": f"{name}, half of the channels {label}, by L2", **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    for name in ("sparsegpt", "gptq", "torchprune", "zipnn"):
        parser.add_argument(f"--{name}", metavar="FOLDER")
    parser.add_argument("--only", nargs="*", metavar="WHAT", help="of SparseGPT, GPTQ, ALDS, ZipNN, torch-pruning")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda device=None: None  # the references wait for a GPU that need not be there
    rows = load("references")
    layers: dict[str, Inputs] = {}
    if given.sparsegpt or given.gptq:
        layers = linear_layers(load_task(f"lm:{asset(given.data, 'python_llama')}", given.data))
    runs: dict[str, tuple[object, Callable[[], Iterator[Row]]]] = {
        "SparseGPT": (given.sparsegpt, lambda: sparse_rows(given.sparsegpt, layers)),
        "GPTQ": (given.gptq, lambda: gptq_rows(given.gptq, layers)),
        "ALDS": (given.torchprune, lambda: grouped_rows(given.torchprune, given.data)),
        "ZipNN": (given.zipnn, lambda: coding_rows(given.zipnn, given.data)),
        "torch-pruning": (util.find_spec("torch_pruning"), lambda: channel_rows(given.data)),
    }
    columns = [
        ("what", "reference"),
        ("setting", "setting"),
        ("theirs", "theirs"),
        ("remark", "remark"),
        ("ours", "ours"),
        ("plain", "plain"),
        ("plainly", "plain is"),
        ("theirs_held_out", "held out: theirs"),
        ("ours_held_out", "ours"),
        ("plain_held_out", "plain"),
    ]
    for what, (there, run) in runs.items():
        if given.only and what not in given.only:
            continue
        if not there:
            print(f"{what}: skipped, its reference was not given", flush=True)
            continue
        for row in run():
            rows[f"{what}, {row['setting']}"] = row
            save("references", rows, columns, "Beside reference code", COMMAND)
            print({key: value for key, value in row.items() if key not in ("layers", "slices")}, flush=True)


if __name__ == "__main__":
    main()
