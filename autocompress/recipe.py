"""How recovery trains, as one word on the command line for each choice: ``--recovery features,dot,labels``.

Knows nothing of torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from autocompress.errors import UnknownName, UsageError

BARE: dict[str, Any] = {
    "logits": 1.0,
    "labels": 1.0,
    "features": 1.0,
    "attention": 1.0,
    "dot": 0.075,
    "theseus": 0.5,
    "bf16": True,
    "patience": 2,
    "gradual": 0.5,
    "shrink": 4,
    "wid": True,
    "cram": 0.05,
    "scales": True,
    "bits": 0.02,
    "clusters": 0.1,
}
"""What a word without a value means."""


@dataclass(frozen=True)
class Recipe:
    """What the loss holds, and what a step does; written ``word`` or ``word=number``, joined by commas.

    ``logits``, ``labels``, ``features``, ``attention``: weights of the loss's terms. ``logits`` is the divergence from the
    original's outputs at ``temperature`` (Hinton et al. 2015), ``labels`` the task's own loss, ``features`` the relative
    squared error of the values behind residual blocks (Romero et al. 2015), ``attention`` that of attention maps (Zagoruyko &
    Komodakis 2017; of a transformer the divergence of its attention's probabilities, Wang et al. 2020).

    ``dot``: how far the momentum of the distillation's gradient is above that of the labels' (Zhao et al. 2023), which it
    needs. ``theseus``: the share of blocks that are the plan's own at the start, the others being the original's; it grows to 1
    in 60 % of the steps (Xu et al. 2020). ``gradual``: the share of the steps in which sparse layers go from dense to their
    level (Zhu & Gupta 2017). ``shrink``: stages in which widths, ranks and blocks go from the original's to the
    plan's, with half of the steps between them (NetAdapt, Yang et al. 2018; TrimLLM, Hu et al. 2024; see ``shrink.py``).
    ``wid``: weights beside removed channels are trained as mixtures of the original's (weight-inherited distillation, Wu et al.
    2023; see ``inherit.py``). ``cram``: the step of the compression-aware minimizer (Peste et al. 2023).

    ``scales``: steps of grids and entries of tables are trained, too. ``bits``: price of a bit a weight (Self-compressing neural
    networks, Cséfalvay & Imber 2023). ``clusters``: softness of tables that are trained as clusters, in mean
    distances between neighbouring entries (eDKM, Cho et al. 2023). See ``trained.py``.

    ``accumulate``: parts a batch is run in; ``bf16``: forward passes in bfloat16; ``patience``: checks on the search split
    without a gain after which training stops, 0: never.
    """

    logits: float = 1.0
    labels: float = 0.0
    features: float = 0.0
    attention: float = 0.0
    temperature: float = 1.0
    dot: float = 0.0
    theseus: float = 0.0
    gradual: float = 0.0
    shrink: int = 0
    wid: bool = False
    cram: float = 0.0
    scales: bool = False
    bits: float = 0.0
    clusters: float = 0.0
    accumulate: int = 1
    bf16: bool = False
    patience: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value) or value < 0:
                raise UsageError(f"{name!r} of a recovery is 0 or more, got {value}.")
        for name in ("temperature", "accumulate"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name!r} of a recovery is above 0, got {getattr(self, name)}.")
        for name in ("theseus", "gradual"):
            if getattr(self, name) > 1:
                raise UsageError(f"{name!r} of a recovery is a share up to 1, got {getattr(self, name)}.")
        if not self.taught and not self.labels:
            raise UsageError("A recovery needs something to learn: logits, features, attention or labels above 0.")
        if self.dot and not (self.taught and self.labels):
            raise UsageError("'dot' keeps two gradients apart, those of distillation and labels; write 'dot,labels'.")
        if self.dot >= 0.1:
            raise UsageError(f"'dot' adds to a momentum of 0.9, so it is below 0.1, got {self.dot}.")
        if self.shrink and self.gradual:
            raise UsageError("'shrink' and 'gradual' both begin from the original, each in its way; leave one out.")
        if self.clusters and self.scales:
            raise UsageError("'clusters' and 'scales' both train tables, got both; leave one out.")

    @property
    def taught(self) -> bool:
        """Whether anything is learned from the original."""
        return bool(self.logits or self.features or self.attention)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read ``features,dot=0.05``; what is not named keeps its default. Raises ``UsageError`` in one sentence."""
        known: dict[str, Any] = {field.name: field.default for field in fields(cls)}
        given: dict[str, Any] = {}
        for word in filter(None, (part.strip() for part in text.split(","))):
            name, equals, number = word.partition("=")
            if name not in known:
                raise UnknownName("word of a recovery", name, known)
            if name in given:
                raise UsageError(f"A recovery names each word once, got {name!r} twice in {text!r}.")
            if not equals and name not in BARE:
                raise UsageError(f"{name!r} of a recovery takes a number; write for example '{name}=2'.")
            if equals and isinstance(known[name], bool):
                raise UsageError(f"{name!r} of a recovery takes no number, got {word!r}; leave it out to turn it off.")
            try:
                given[name] = type(known[name])(number) if equals else BARE[name]
            except ValueError:
                raise UsageError(f"{name!r} of a recovery takes a number, got {number!r} in {text!r}.") from None
        return cls(**given)

    def __str__(self) -> str:
        """The shortest text that :meth:`parse` reads back; the plain recipe is ``logits``."""
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words.append(field.name if value == BARE.get(field.name) else f"{field.name}={value:g}")
        return ",".join(words) or "logits"
