"""What a job is asked and what it answers, as JSON: the store keeps it, the command line and the dashboard show it.

Knows nothing of torch or ONNX.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from autocompress.errors import UnknownName
from autocompress.types import Fidelity, cost_key, digest

Stage = Literal["task", "graph", "database", "profile", "search", "refit", "recover", "export", "verify", "diagnose"]
STAGES: tuple[Stage, ...] = get_args(Stage)

METHOD_FAMILIES = ("channels", "blocks", "lowrank", "int8", "w8", "w4")
"""The families a search uses unless ``--methods`` says otherwise."""
RESEARCH_FAMILIES = (
    "width",
    "udfc",
    "inputs",
    "lord",
    "cur",
    "tucker",
    "grouped",
    "mpo",
    "int8-percentile",
    "int8-mse",
    "int8-entropy",
    "w3",
    "w2",
    "w4-nearest",
    "w3-nearest",
    "w2-nearest",
    "w4-udfc",
    "w3-udfc",
    "sparse",
    "sparse-obc",
    "sparse-chita",
    "sparse-fisher",
    "sparse-magnitude",
    "sparse-pq",
    "lut",
    "spqr",
    "billm",
    "rate",
)
"""To be named by a user: longer searches, or no gain in a runtime. Budgets: ``nonzeros``, ``weight_bits`` and ``packed_mb``."""
ALL_FAMILIES = (*METHOD_FAMILIES, *RESEARCH_FAMILIES)


Importance = Literal["obs", "l1", "l2", "fpgm", "bn", "taylor", "fisher", "lrp", "random"]
"""How the channels of a group are ordered; see ``methods/pruning.py`` and ``methods/importance.py``."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Request(_Record):
    """One compression job: everything that decides its outcome. The resolved request lies beside the result."""

    task: str
    data: tuple[str, ...] = ()
    budgets: tuple[str, ...]
    controller: str = "auto"
    """One name; with ``race`` several, joined by commas, each perhaps with its own number of evaluations: ``exact:87``."""
    race: bool = False
    """Whether several controllers search one after the other, each with ``evaluations`` or ``minutes``."""
    warm: bool = False
    """Whether to start from all that earlier jobs have judged on the same model, instead of from an empty ledger."""
    warm_from: str | None = None
    """A job's ``ledger_start.json``: to start from exactly what that job started from. A replay gives it."""
    evaluations: int | None = None
    minutes: float | None = None
    seed: int = 0
    methods: tuple[str, ...] = METHOD_FAMILIES
    importance: Importance = "obs"
    profiles: dict[str, str] = Field(default_factory=dict)
    """Device name in a budget -> profile file; a device without one is a shipped profile or ``local``."""
    recover_minutes: float = 2.0
    """Distillation time of each recovered plan, in minutes of this machine; 0 turns recovery off."""
    recover_steps: int | None = None
    """Distillation steps of each recovered plan; ``None`` takes what fits into ``recover_minutes``. A replay gives them."""
    recovery: str = "logits"
    """What recovery learns from and how it steps; see ``recipe.py``."""
    batch: int = 1
    """Batch size at which latency is predicted and measured."""
    threads: int = 1
    """Threads for evaluation; 0 takes the cores this process may use. One is the default: on a shared host two can be slower than
    one (measured: 4.5 times). Latency is measured with 1 unless a profile says more."""

    device: str = "cpu"
    """Where plans are judged: ``cpu``, ``cuda`` or ``cuda:N``. Refit, distillation and the reported numbers stay on the CPU."""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Of the search's rungs; ``auto`` is float32 on the CPU, and on a GPU the coarsest that the fitness allows."""
    workers: str | int | None = None
    """Who judges plans: so many processes of this machine, ``ray`` or a Ray cluster's address; ``None`` is this process. It does
    not change what they find, so it is no part of the hash."""

    @property
    def hash(self) -> str:
        # left out where unsaid, so that requests from before there were these fields keep their hash
        fields = type(self).model_fields
        since = ("race", "warm", "warm_from", "recovery", "device", "precision")
        unsaid = {n for n in since if getattr(self, n) == fields[n].default}
        return digest(self.model_dump(mode="json", exclude={"workers", *unsaid}))


class Progress(_Record):
    """One tick of a running job, for progress bars. ``total`` is ``None`` while unknown."""

    stage: Stage
    done: int = 0
    total: int | None = None
    message: str = ""


class OpRow(_Record):
    """One executed operator of a plan: predicted time, and measured time where the plan was exported and profiled."""

    name: str
    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    format: str
    predicted_ms: dict[str, float] = Field(default_factory=dict)


class SiteRow(_Record):
    name: str
    kind: str
    members: tuple[str, ...]
    width: int
    macs: int
    params: int


class BudgetRow(_Record):
    text: str
    key: str
    limit: float
    """Absolute, in the metric's unit."""


class Point(_Record):
    """One judged plan. ``id`` is the plan's hash; ``plan`` maps site -> label of its level, dense sites left out."""

    id: str
    plan: dict[str, str]
    levels: dict[str, str]
    fidelity: Fidelity
    values: dict[str, float]
    costs: dict[str, float]
    measured: dict[str, float] = Field(default_factory=dict)
    """Measured costs by key, for example ``latency_ms@local``; only for points that were exported and timed."""
    intervals: dict[str, float] = Field(default_factory=dict)
    """Relative half width of the interval of a predicted latency, by key; for devices whose profile states its error."""
    violation: float = 0.0
    feasible: bool = True
    on_front: bool = False
    ops: tuple[OpRow, ...] = ()


class LedgerRow(_Record):
    """The ledger a job started from: its hash, and how many evaluations of earlier jobs it holds."""

    hash: str
    entries: int


class RaceMark(_Record):
    """Where a controller stood when its best loss fell, or at its end."""

    evaluations: int
    """Answers so far, at every rung and from the ledger too."""
    seconds: float
    """Processor seconds so far: what its answers cost when they were paid, and what it thought itself."""
    loss: float | None
    """The best loss at the rung ``full`` that holds every budget; ``None`` while there is none."""
    hypervolume: float
    """Share of the box between the original (its cost, its loss and 1 more) and zero cost that its own front covers."""


class RaceEntry(_Record):
    """One controller of a race; ``own_seconds``: what it thought itself; ``history`` ends where it ended."""

    controller: str
    evaluations: int
    own_seconds: float
    history: tuple[RaceMark, ...]

    @property
    def end(self) -> RaceMark:
        return self.history[-1]

    @property
    def found(self) -> RaceMark:
        """Where it first had its best loss."""
        return next(mark for mark in self.history if mark.loss == self.end.loss)


class Exemplar(_Record):
    """An example of the report split that compressed models answer otherwise than the original (Hooker et al. 2019).

    ``compressed``: the answer that most of them give, ``agreement`` their share. Labels are ``None`` where answers are no
    classes.
    """

    index: int
    target: int | None
    original: int | None
    compressed: int | None
    agreement: float
    drop: float
    """Mean score of the compressed models below the original's."""


class ClassRow(_Record):
    """A class of the report split: scores, and the change of the delivered plan in points with a 95 % paired interval.

    ``relative``: the change minus that of all examples; ``unlike``: whether its interval leaves out zero.
    """

    label: int
    examples: int
    original: float
    compressed: float
    change: float
    half_width: float
    relative: float
    unlike: bool


class SensitivityRow(_Record):
    """One level at one site, all others dense: the loss above the dense model's."""

    site: str
    level: str
    loss: float


class LayerRow(_Record):
    """A layer of the delivered plan: ``|y - y'|^2 / |y|^2`` of its outputs (after norm and ReLU) at the channels that live.

    ``bits``: what its integers need on average, where it has some. ``pq``: the PQ index of the original's weights with
    their norm folded, which says how few of them hold most.
    """

    name: str
    level: str
    width: str
    error: float
    bits: float | None = None
    pq: float | None = None


class ContributionRow(_Record):
    """The delivered plan without one method, or ``nothing``: refitted, and what it costs; ``None`` where that is not finite."""

    without: str
    sites: int
    loss: float | None
    accuracy_drop: float | None
    costs: dict[str, float]


class Diagnosis(_Record):
    """What compression did, where and by what; ``plan``: id of the plan it is about, ``rung``: that of its model.

    ``models``: ids of the plans whose answers are compared; ``examples``: of the report split; ``changed``: exemplars in all, of
    which the first are listed; ``right``: shares of exemplars that the original and the compressed models answer right.
    """

    plan: str
    rung: Fidelity
    models: tuple[str, ...]
    examples: int
    changed: int | None
    right: tuple[float, float] | None
    exemplars: tuple[Exemplar, ...]
    classes: tuple[ClassRow, ...]
    sensitivity: tuple[SensitivityRow, ...]
    layers: tuple[LayerRow, ...]
    contributions: tuple[ContributionRow, ...]


class JobResult(_Record):
    """The outcome of a compress job; ``points`` holds every rung's evaluations of interest, the front's among them."""

    task: str
    metric_name: str
    higher_is_better: bool
    original: Point
    budgets: tuple[BudgetRow, ...]
    objectives: tuple[str, ...]
    """Keys of the front's axes, for example ``("loss", "latency_ms@local")``; all are minimized."""
    sites: tuple[SiteRow, ...]
    points: tuple[Point, ...]
    hypervolume: float | None = None
    best: str | None = None
    """Id of the plan that was exported: the best that holds every budget."""
    evaluations: int = 0
    seconds: dict[str, float] = Field(default_factory=dict)
    """Wall time by stage."""
    devices: dict[str, dict[str, Any]] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Sentences a person must read: refused layers, missed budgets, plans that are smaller but not faster."""
    ledger: LedgerRow | None = None
    race: tuple[RaceEntry, ...] = ()
    """The controllers that raced, in the order they were named."""
    diagnosis: Diagnosis | None = None
    request: Request | None = None

    def device_label(self, device: str) -> str:
        """The device as it is shown: ``pixel3, fitted`` where its profile was fitted to what others have published."""
        fitted = str(self.devices.get(device, {}).get("provenance", "")).startswith("fitted")
        return f"{device}, fitted" if fitted else device

    def key_label(self, key: str) -> str:
        """A cost's key as it is shown: ``latency_ms@pixel3, fitted``."""
        name, at, device = key.partition("@")
        return f"{name}@{self.device_label(device)}" if at else name

    @property
    def deliverable(self) -> list[Point]:
        """The points that can be handed out: those of the upper rungs, or all where no plan came so far."""
        return [p for p in self.points if p.fidelity in ("refitted", "recovered")] or list(self.points)

    def device_key(self, device: str) -> str:
        """The key of a device's predicted latency. Raises ``UnknownName`` where there is none, with the way to it."""
        key = cost_key("latency_ms", device)
        if key not in self.original.costs:
            known = [name for metric, at, name in (k.partition("@") for k in self.original.costs) if at]
            raise UnknownName("device", device, known, f"Add it with 'autocompress predict JOB {device}'.")
        return key

    def point(self, point_id: str) -> Point:
        for point in (self.original, *self.points):
            if point.id == point_id or point.id.startswith(point_id):
                return point
        raise KeyError(point_id)
