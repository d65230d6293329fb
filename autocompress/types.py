"""The vocabulary that every room shares: values are frozen dataclasses, seams are Protocols.

Knows nothing of torch, ONNX, files or databases.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from autocompress.errors import UnknownName, UsageError

Plan = tuple[int, ...]
"""One level index a site, in the order of ``SearchSpace.sites``; all zeros is the dense model."""

Fidelity = Literal["table", "slice", "full", "refitted", "recovered"]
FIDELITIES: tuple[Fidelity, ...] = ("table", "slice", "full", "refitted", "recovered")
"""The ladder: free prediction, fixed small slice, whole search split, after ``finish``, after distillation.
Fitnesses compare only within one rung."""

IntArray = npt.NDArray[np.int64]


def digest(value: object) -> str:
    """16 hex digits of the SHA-256 of ``value`` as canonical JSON: the same in every process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- what is searched


@dataclass(frozen=True)
class Storage:
    """How a layer's weights are stored: ``values`` that are not masked away, of ``bits`` each, and ``extra`` bits of masks,
    scales, tables and outliers."""

    values: int
    bits: int = 32
    extra: int = 0

    @property
    def total_bits(self) -> int:
        return self.values * self.bits + self.extra


@dataclass(frozen=True)
class MethodConfig:
    """One method's settings. Subclasses live in ``methods/``; their handlers are registered by type."""

    exports: ClassVar[Literal["onnx", "simulated"]] = "onnx"

    def describe(self) -> str:
        """A few words for tables, for example ``"keep 12/16"``."""
        return type(self).__name__

    @property
    def fitted(self) -> bool:
        """Whether the weights depend on the layer's inputs or on each other across outputs: then it acts on folded weights."""
        return False

    def store(self, kernel: Kernel, before: Storage) -> Storage:
        """How the weights of one of the layer's kernels are stored once this step is taken."""
        return before

    def to_json(self) -> dict[str, Any]:
        """Name and fields, the input of the level's hash."""
        return {"method": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Level:
    """Steps applied in order at one site; ``()`` is dense and is level 0 of every site."""

    steps: tuple[MethodConfig, ...] = ()

    @property
    def hash(self) -> str:
        return digest([step.to_json() for step in self.steps])

    @property
    def label(self) -> str:
        return " + ".join(step.describe() for step in self.steps) or "dense"


@dataclass(frozen=True)
class Site:
    """One decision point: layers that must be treated together.

    ``kind`` is ``channels`` (a coupled group, or the inputs of one layer), ``block`` (a residual branch) or ``layer`` (one
    convolution or linear layer's rank and format). ``width`` is the number of channels of a group or of inputs (1 otherwise),
    ``macs`` and ``params`` are those of the dense members, for one example.
    """

    name: str
    kind: Literal["channels", "block", "layer"]
    members: tuple[str, ...]
    width: int = 1
    shape: tuple[int, ...] = ()
    macs: int = 0
    params: int = 0


@dataclass(frozen=True)
class SearchSpace:
    """Sites and the levels each offers; ``levels[i][0]`` is dense."""

    sites: tuple[Site, ...]
    levels: tuple[tuple[Level, ...], ...]

    def __post_init__(self) -> None:
        if len(self.sites) != len(self.levels):
            raise UsageError(
                f"Each site needs its levels: {len(self.sites)} sites, {len(self.levels)} lists of levels."
            )
        for site, levels in zip(self.sites, self.levels, strict=True):
            if not levels or levels[0] != Level():
                raise UsageError(f"Level 0 of every site is dense; site {site.name!r} starts with something else.")

    @property
    def n_levels(self) -> tuple[int, ...]:
        return tuple(len(levels) for levels in self.levels)

    @property
    def size(self) -> int:
        """Number of plans, exactly."""
        return math.prod(self.n_levels)

    @property
    def dense(self) -> Plan:
        return (0,) * len(self.sites)

    @property
    def hash(self) -> str:
        return digest(
            [
                [site.name, [level.hash for level in levels]]
                for site, levels in zip(self.sites, self.levels, strict=True)
            ]
        )

    def sample(self, rng: random.Random) -> Plan:
        """One plan, uniformly."""
        return tuple(rng.randrange(n) for n in self.n_levels)

    def effective(self, plan: Plan) -> Plan:
        """The same network without choices for what is gone: sites inside a dropped block are dense."""
        idle = {j for block, inside in self._inside.items() if plan[block] for j in inside}
        return tuple(0 if i in idle else level for i, level in enumerate(plan)) if idle else plan

    @cached_property
    def _inside(self) -> dict[int, tuple[int, ...]]:
        """Block site -> the other sites whose layers all lie in it; of blocks with the same layers the first holds the rest."""
        layers = [frozenset(site.members) for site in self.sites]

        def within(j: int, block: int) -> bool:
            same = layers[j] == layers[block] and self.sites[j].kind == "block"
            return j != block and layers[j] <= layers[block] and bool(layers[j]) and (not same or block < j)

        blocks = [i for i, site in enumerate(self.sites) if site.kind == "block"]
        return {block: tuple(j for j in range(len(layers)) if within(j, block)) for block in blocks}

    def neighbours(self, plan: Plan) -> Iterator[Plan]:
        """All plans that differ from ``plan`` at one site by one level."""
        for i, n in enumerate(self.n_levels):
            for level in (plan[i] - 1, plan[i] + 1):
                if 0 <= level < n:
                    yield (*plan[:i], level, *plan[i + 1 :])

    def describe(self, plan: Plan) -> dict[str, str]:
        """Site -> label of its level, for the sites that are not dense."""
        return {site.name: self.levels[i][plan[i]].label for i, site in enumerate(self.sites) if plan[i]}

    def plan_to_json(self, plan: Plan) -> dict[str, str]:
        """Site -> level hash, for the sites that are not dense: what is written to disk."""
        return {site.name: self.levels[i][plan[i]].hash for i, site in enumerate(self.sites) if plan[i]}

    def plan_from_json(self, stored: Mapping[str, str]) -> Plan:
        """Inverse of :meth:`plan_to_json`; a site or level this space lacks is an error that names it."""
        index = {site.name: i for i, site in enumerate(self.sites)}
        plan = list(self.dense)
        for name, level_hash in stored.items():
            if name not in index:
                raise UnknownName("site", name, index)
            hashes = [level.hash for level in self.levels[index[name]]]
            if level_hash not in hashes:
                raise UsageError(
                    f"Site {name!r} does not offer level {level_hash}; the plan belongs to other settings."
                )
            plan[index[name]] = hashes.index(level_hash)
        return tuple(plan)


# ---------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class Metric:
    """A quantity that can be budgeted. ``scale`` turns the integer base unit of cost tables into ``unit``.

    ``additive``: a sum over operators, not a maximum.
    """

    name: str
    unit: str
    description: str
    scale: float = 1.0
    per_device: bool = False
    quality: bool = False
    additive: bool = True


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("latency_ms", "ms", "median latency of one run on a device (nanoseconds inside)", 1e-6, per_device=True),
        Metric("size_mb", "MB", "bytes of the ONNX file / 1e6", 1e-6),
        Metric("packed_mb", "MB", "bytes of the ONNX file as 'autocompress pack' writes it / 1e6", 1e-6),
        Metric("macs", "", "multiply-accumulates of one example"),
        Metric("params", "", "number of weights and biases after folding of batch norm"),
        Metric("nonzeros", "", "weights and biases that no mask holds at zero"),
        Metric(
            "weight_bits",
            "bits",
            "bits of all weights of convolutions and linear layers, with scales, masks and tables, over the number of such "
            "weights in the original (billionths inside)",
            1e-9,
        ),
        Metric("peak_mb", "MB", "peak bytes of live activations of one example / 1e6", 1e-6, additive=False),
        Metric(
            "accuracy_drop",
            "points",
            "metric of the original minus metric of the compressed, in points (of a perplexity: percent by which it rises)",
            quality=True,
        ),
    )
}

_BUDGET = re.compile(
    r"^\s*(?P<metric>[a-z_]+)\s*(?P<sense><=|>=|<|>|=)\s*(?P<limit>[-+0-9.eE]+)\s*(?P<unit>%|[kKMG])?\s*(@(?P<device>.+?))?\s*$"
)
_SUFFIX = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Budget:
    """A hard constraint ``metric <= limit``; ``relative`` limits are fractions of the original's value.

    Written ``latency_ms<=5@pixel3``, ``latency_ms<=50%@local``, ``size_mb<=3``, ``macs<=20M``, ``accuracy_drop<=1.0``.
    """

    metric: str
    limit: float
    relative: bool = False
    device: str | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read one budget as written on the command line."""
        example = "Write for example 'latency_ms<=50%@local' or 'size_mb<=3' (quoted: '<' is the shell's)."
        match = _BUDGET.match(text)
        if match is None:
            raise UsageError(f"A budget reads METRIC<=LIMIT[%][@DEVICE], got {text!r}. {example}")
        name, device = match["metric"], match["device"]
        if name not in METRICS:
            raise UnknownName("budget metric", name, METRICS)
        if match["sense"] != "<=":
            raise UsageError(f"A budget is an upper limit, written '<=', got {match['sense']!r} in {text!r}. {example}")
        try:
            limit = float(match["limit"])
        except ValueError:
            raise UsageError(f"A budget's limit is a number, got {match['limit']!r} in {text!r}. {example}") from None
        relative = match["unit"] == "%"
        limit = limit / 100 if relative else limit * _SUFFIX.get(match["unit"] or "", 1.0)
        metric = METRICS[name]
        if not math.isfinite(limit) or (limit <= 0 and not metric.quality):
            raise UsageError(f"A budget's limit is a positive number, got {match['limit']!r} in {text!r}.")
        if metric.quality and relative:
            raise UsageError(f"{name} is in points already and takes no '%', got {text!r}; write '{name}<=1.0'.")
        if device and not metric.per_device:
            raise UsageError(f"{name} does not depend on a device, got '@{device}' in {text!r}; leave it out.")
        return cls(name, limit, relative, (device or "local") if metric.per_device else None)

    def __str__(self) -> str:
        limit = f"{self.limit * 100:g}%" if self.relative else f"{self.limit:g}"
        return f"{self.metric}<={limit}" + (f"@{self.device}" if self.device else "")

    @property
    def key(self) -> str:
        """The cost's name: ``metric`` or ``metric@device``."""
        return cost_key(self.metric, self.device)

    def absolute(self, dense: Mapping[str, float]) -> Budget:
        """The same budget with its limit in the metric's unit; ``dense`` maps :attr:`key` to the original's cost."""
        if not self.relative:
            return self
        return Budget(self.metric, self.limit * dense[self.key], False, self.device)

    def violation(self, value: float) -> float:
        """``max(0, value - limit)``, relative to the limit (at least 1 point for quality metrics); NaN is infinite."""
        if math.isnan(value):
            return math.inf
        unit = max(abs(self.limit), 1.0) if METRICS[self.metric].quality else self.limit
        return max(0.0, (value - self.limit) / unit)


def cost_key(metric: str, device: str | None = None) -> str:
    """``"latency_ms@local"`` or ``"size_mb"``: how a cost is named in tables, evaluations and files."""
    return f"{metric}@{device}" if device else metric


@dataclass(frozen=True)
class Objective:
    """What a front trades: a key of ``Evaluation.values`` or ``Evaluation.costs`` and its direction."""

    key: str
    direction: Literal["minimize", "maximize"] = "minimize"


Format = Literal["float", "int8", "w8", "w4"]
"""How a layer is stored and run: float; int8 weights *and* activations; 8- or 4-bit weights dequantized on the fly."""
Int8Format = Literal["u8s8", "s8s8", "u8u8"]
"""Types of activations and weights; the integers mean the same numbers in all of them. x86 processors without VNNI add pairs of
products of ``u8s8`` (and of ``s8s8``, which ONNX Runtime turns into it) in 16 bits, where they saturate: such a file then
computes something else, without a word. ``u8u8`` is exact everywhere."""


APART = "apart"
"""How ``Kernel.fused`` of an addition begins of which one input is in another layout: it runs on its own."""


@dataclass(frozen=True)
class Kernel:
    """What the hardware sees: one executed operator at its final widths, for one example (nn-Meter's word).

    ``kind``: ``conv`` | ``linear`` | ``add`` | ``mul`` | ``concat`` | ``relu`` | ``activation`` | ``pool`` | ``global_pool`` |
    ``pad`` | ``slice`` | ``batch_norm`` | ``quantize`` | ``dequantize`` | ``attention`` | ``norm`` | ``embedding`` |
    ``transpose`` | ``repeat`` | ``other``.
    ``in_shape`` / ``out_shape``: ``(C, H, W)``, ``(C,)``, or ``(C, T)`` of a sequence, without the batch. Attention has
    ``(heads, T, head_dim)``, an embedding reads ``(vocabulary, T)``. A following ReLU is part of the kernel. An image's
    addition that no convolution can take in is ``fused="apart"`` or ``"apart relu"``.
    """

    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    format: Format = "float"
    fused: str = ""
    n_inputs: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one example, of layers and of attention's two products (all positions with all); else 0."""
        if self.kind == "attention":
            return (math.prod(self.in_shape) + math.prod(self.out_shape)) * self.in_shape[1]
        if self.kind not in ("conv", "linear"):
            return 0
        area = self.kernel[0] * self.kernel[1]
        return math.prod(self.out_shape) * (self.in_shape[0] // self.groups) * area

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        if self.kind not in ("conv", "linear", "embedding"):
            return 0
        return self.out_shape[0] * (self.in_shape[0] // self.groups) * self.kernel[0] * self.kernel[1]


class LatencyModel(Protocol):
    """What a cost model asks of a device: nanoseconds of kernels (``hwprofiles.HardwareProfile`` is one)."""

    @property
    def name(self) -> str: ...

    def predict_ns(self, kernels: Sequence[Kernel]) -> IntArray:
        """Latency of each kernel at the profile's batch size and threads.  # (n_kernels,)"""
        ...


class Costs(Protocol):
    """What controllers see of a cost model."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the columns, as :func:`cost_key` writes them."""
        ...

    def cost(self, plans: Sequence[Plan]) -> IntArray:
        """Costs in integer base units (ns, bytes, MACs).  # (n_plans, n_keys)"""
        ...

    def deltas(self, plan: Plan) -> IntArray:
        """Change of each cost that is a sum when one site of ``plan`` switches to one level; options are numbered site by
        site.  # (n_options, n_keys)"""
        ...

    def factors(self) -> Sequence[CostFactor]:
        """The same costs as a sum of small tables, for exact solvers: their sum equals :meth:`cost`."""
        ...


@dataclass(frozen=True, eq=False)
class CostFactor:
    """A summand of the cost: ``table[classes of levels..., key]`` in integer base units.

    ``classes``: level -> class of levels that always cost the same, one array a site; without them each level is one.
    ``table`` is ``None`` where it would be too large; ``cost(levels)`` then gives rows on demand.
    """

    name: str
    sites: tuple[int, ...]
    table: IntArray | None  # (classes of sites[0], ..., n_keys)
    cost: Callable[[IntArray], IntArray] | None = None  # (n, len(sites)) -> (n, n_keys)
    classes: tuple[IntArray, ...] = ()

    def rows(self, levels: IntArray) -> IntArray:
        """Costs at levels of the sites.  # (n, len(sites)) -> (n, n_keys)"""
        if self.table is None:
            if self.cost is None:
                raise ValueError(f"Cost factor {self.name!r} has neither a table nor a function.")
            return self.cost(levels)
        places = [of[own] for of, own in zip(self.classes, levels.T, strict=True)] if self.classes else levels.T
        found: IntArray = self.table[tuple(places)]
        return found if self.sites else np.broadcast_to(found, (len(levels), found.shape[-1]))


# ---------------------------------------------------------------- asking and telling


def best_levels(probabilities: npt.NDArray[np.float64], offsets: Sequence[int] | IntArray) -> Plan:
    """The most likely level of each site. ``probabilities``  # (n_options,); ``offsets``: where sites begin  # (n_sites + 1,)"""
    return tuple(int(np.argmax(probabilities[a:b])) for a, b in itertools.pairwise(offsets))


@dataclass(frozen=True)
class Query:
    """A plan to be judged at one rung; ``budget`` is the index of the budget it was made for, if any.

    ``part``: which slice of the search split the rung ``slice`` takes; there are as many as ``Evaluation.slices`` of ``full``.
    """

    plan: Plan
    fidelity: Fidelity = "full"
    budget: int | None = None
    part: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What a plan turned out to be.

    ``values``: ``loss`` (the fitness, lower is better: KL to the original's outputs in nats, or the task's loss),
    ``metric`` (the task's metric on the search split) and ``accuracy_drop`` in points. ``costs``: by
    :func:`cost_key`, in the metrics' units. ``violation``: sum over budgets, 0 when all hold.
    ``seconds``: processor time that measuring took when it was paid; ``cached`` tells that it was answered from the ledger.
    ``part``: the slice it was judged on. ``slices``: at the rung ``full``, the loss on each slice alone.
    """

    plan: Plan
    fidelity: Fidelity
    values: Mapping[str, float]
    costs: Mapping[str, float]
    violation: float
    seconds: float = 0.0
    cached: bool = field(default=False, compare=False)
    part: int = 0
    slices: tuple[float, ...] = ()

    @property
    def feasible(self) -> bool:
        return self.violation <= 0.0 and math.isfinite(self.values.get("loss", math.nan))

    def __getitem__(self, key: str) -> float:
        """A value or a cost by its key."""
        return self.values[key] if key in self.values else self.costs[key]


@dataclass(frozen=True)
class SoftQuery(Query):
    """A mixture of levels instead of one a site, asked for the slope of the loss on the slice; ``plan`` has the likeliest levels.

    ``probabilities``: of all options, numbered site by site; those of a site add up to 1.  # (n_options,)
    """

    probabilities: tuple[float, ...] = ()


@dataclass(frozen=True)
class SoftEvaluation(Evaluation):
    """The answer to a :class:`SoftQuery`: ``values`` has the mixture's ``loss``, nats as ever.

    It has no costs and holds no budget: a mixture is no plan, and fronts do not get it. ``gradient``: slope of the loss along
    every probability, zero throughout where the loss is not a number.  # (n_options,)
    """

    probabilities: tuple[float, ...] = ()
    gradient: tuple[float, ...] = ()


class Evaluator(Protocol):
    """Judges plans; the only place that counts evaluations."""

    def __call__(self, queries: Sequence[Query]) -> list[Evaluation]:
        """Evaluations in the order asked."""
        ...


@runtime_checkable
class SoftEvaluator(Evaluator, Protocol):
    """An evaluator that can also mix levels, for differentiable controllers."""

    def loss_and_grad(self, probabilities: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        """Loss of the mixture on the slice and its gradient; ``probabilities``, gradient  # (n_options,)

        Options are numbered site by site, as in :meth:`Costs.deltas`: sites offer different numbers of levels, so there is no
        array of sites by levels. At probabilities of 0 and 1 the loss is the plan's. Entries of the gradient compare within a
        site; what they have in common means nothing.
        """
        ...


LevelErrors = Mapping[int, tuple[float, ...]]
"""Site -> the relative output error of each of its levels, dense first; of sites where something is known without judging."""


class Controller(Protocol):
    """A search algorithm: it sees a space, costs and evaluations, never a model.

    Built as ``Controller(space, costs, budgets, seed)``; ``budgets`` are absolute.
    """

    def ask(self, n: int) -> list[Query]:
        """At most ``n`` plans to be judged next; an empty list says that the search is over."""
        ...

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """The answers to the last :meth:`ask`, in its order."""
        ...

    def learn(self, known: Sequence[Evaluation], errors: LevelErrors | None = None) -> None:
        """What earlier searches on the same model have judged, and what is known of levels; before the first :meth:`ask`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on in another process, as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Ledger(Protocol):
    """Evaluations kept by key, so that a plan is never paid twice. The store implements it."""

    def get(self, key: str) -> dict[str, Any] | None: ...

    def put(self, key: str, value: Mapping[str, Any]) -> None: ...

    def items(self) -> Iterable[tuple[str, dict[str, Any]]]: ...
