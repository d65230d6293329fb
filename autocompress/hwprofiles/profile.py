"""A device as data: what was measured on it or fitted, how, when and with what; and the latency it predicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from autocompress.errors import UsageError
from autocompress.files import write_text
from autocompress.hwprofiles.fitted import TERMS, Law, Laws, family_of
from autocompress.hwprofiles.predict import Layout, Predictor
from autocompress.hwprofiles.schema import SCHEMA, EntryPart, ProfileFile, first_error
from autocompress.types import Int8Format, IntArray, Kernel, digest

READABLE = (1, 2)
"""Schema 1 had no ``laws`` and what belongs to them; its files are profiles still."""
MEASURED = "measured"
FITTED = "fitted from published measurements"
UNSEEN_ERROR = 1.0
"""Relative error of a kernel whose family the profile has never seen: half or twice the time, and no promise."""
_KERNEL_FIELDS = ("kind", "in_shape", "out_shape", "kernel", "stride", "groups", "format", "fused", "n_inputs")


@dataclass(frozen=True)
class Entry:
    """One measured kernel: nanoseconds at the profile's batch and threads; ``interval`` is the half width of the 95 %
    interval relative to ``ns``."""

    kernel: Kernel
    ns: float
    interval: float = 0.0


@dataclass(frozen=True)
class HardwareProfile:
    """What is known of a device; a ``LatencyModel``.

    ``entries``: measured kernels; ``laws``: in their place, laws of kernel families fitted to latencies of whole networks.
    ``overhead_ns``: what one run costs beside its kernels (add it once a network). ``noise_floor``: median relative
    difference of the same network timed twice in one round. ``int8_format``: the fastest form of quantized
    activations, with the times behind it in ``int8_evidence`` (ms). ``layout``: how channels are rounded. ``how``:
    warm-up, rounds and what was left out. ``host``: CPU model, flags, cores, system.

    Of a fitted profile, ``source`` cites the measurements and their licence; ``fit_error`` has ``mape`` and ``spearman`` on
    held-out networks by search space; ``limits`` says which sizes and operators stand behind it; ``expected_error`` is the
    relative error that nine in ten held-out networks stayed below.
    """

    name: str
    device: str
    runtime: str
    runtime_version: str
    threads: int
    batch: int
    measured_at: str
    entries: tuple[Entry, ...]
    overhead_ns: float = 0.0
    noise_floor: float = 0.0
    int8_format: Int8Format = "u8u8"
    int8_evidence: Mapping[str, float] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)
    host: Mapping[str, Any] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)
    provenance: str = MEASURED
    laws: Laws | None = None
    source: Mapping[str, str] = field(default_factory=dict)
    fit_error: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    expected_error: float = 0.0

    @property
    def fitted(self) -> bool:
        """Whether its predictions come from others' measurements of whole networks, not from kernels timed on the device."""
        return self.provenance != MEASURED

    @cached_property
    def _predictor(self) -> Predictor:
        if not self.entries:
            raise UsageError(
                f"A profile needs measured kernels or fitted laws to predict from; profile {self.name!r} has none."
            )
        return Predictor(((e.kernel, e.ns) for e in self.entries), self.layout)

    @cached_property
    def hash(self) -> str:
        """Of all its data: equal profiles predict equally."""
        return digest(self.to_json())

    def predict_ns(self, kernels: Sequence[Kernel]) -> IntArray:
        """Latency of each kernel in nanoseconds, without ``overhead_ns``.  # (n_kernels,)

        Exact where measured, else interpolated (``predict.py``). Families that were never measured are guessed from all
        others: ask :meth:`explains`.
        """
        predict = self.laws or self._predictor
        return np.fromiter((round(predict(kernel)) for kernel in kernels), np.int64, len(kernels))

    def explains(self, kernels: Sequence[Kernel]) -> set[str]:
        """Names of the families among ``kernels`` that were never measured here."""
        if self.laws:
            return {" ".join(family_of(k)) for k in kernels if not self.laws.knows(k)}
        return {" ".join(self.layout.family(k)) for k in kernels if not self._predictor.knows(k)}

    def relative_error(self, kernels: Sequence[Kernel]) -> float:
        """Half width of the interval of a network's latency, relative: ``expected_error`` of the time in known families and
        ``UNSEEN_ERROR`` of the rest."""
        ns = self.predict_ns(kernels)
        known = (self.laws or self._predictor).knows
        unseen = float(sum(t for t, kernel in zip(ns.tolist(), kernels, strict=True) if not known(kernel)))
        total = float(ns.sum()) + self.overhead_ns
        return self.expected_error + (UNSEEN_ERROR - self.expected_error) * (unseen / total if total else 0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the schema's version."""
        data = {"schema": SCHEMA, **{k: v for k, v in self.__dict__.items() if not k.startswith("_") and k != "hash"}}
        data["layout"] = asdict(self.layout)
        data["entries"] = [_entry_to_json(entry) for entry in self.entries]
        data["laws"] = [{"family": list(law.family), **_named(law)} for law in self.laws.laws] if self.laws else []
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}

    @classmethod
    def from_json(cls, data: Any, source: str = "the profile") -> HardwareProfile:
        """Inverse of :meth:`to_json`; ``source`` names the file in errors. Raises ``UsageError``."""
        found = data.get("schema") if isinstance(data, dict) else None
        if isinstance(found, bool) or found not in READABLE:
            readable = " or ".join(map(str, READABLE))
            raise UsageError(f"A hardware profile has schema {readable}, {source} has {found!r}; measure it again.")
        try:
            return _read(ProfileFile.model_validate(data))
        except ValidationError as error:
            field, wrong = first_error(error)
        if wrong is None:
            raise UsageError(f"A hardware profile needs the field {field!r}, which {source} lacks; measure it again.")
        raise UsageError(f"Every field of a hardware profile must be usable, in {source} one is not: {field} {wrong}.")

    def save(self, path: Path | str) -> None:
        """Write as JSON, atomically; one kernel or law a line."""
        write_text(Path(path), _lines(self.to_json()))

    @classmethod
    def load(cls, path: Path | str) -> HardwareProfile:
        """Read a profile file. Raises ``UsageError`` in one sentence when it is missing or unusable."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"Cannot read the hardware profile {path}: {error.strerror}.") from None
        except ValueError as error:
            raise UsageError(f"A hardware profile is a JSON file, {path} is not: {error}.") from None
        return cls.from_json(data, str(path))


def _lines(data: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, list | tuple) and value:
            return "[\n  " + ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n ]"
        return json.dumps(value, ensure_ascii=False)

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {text(value)}" for key, value in data.items()) + "\n}\n"


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    fields = {name: getattr(entry.kernel, name) for name in _KERNEL_FIELDS}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()} | {
        "ns": entry.ns,
        "interval": entry.interval,
    }


def _named(law: Law) -> dict[str, float]:
    return dict(zip(TERMS, law.coefficients, strict=True))


def _read(data: ProfileFile) -> HardwareProfile:
    fields = {name: getattr(data, name) for name in type(data).model_fields if name != "version"}
    laws = tuple(Law(tuple(law.family), tuple(getattr(law, term) for term in TERMS)) for law in data.laws)
    made = {
        "entries": tuple(_read_entry(entry) for entry in data.entries),
        "layout": Layout(data.layout.block, data.layout.granule),
        "laws": Laws(laws) if laws else None,
    }
    return HardwareProfile(**fields | made)


def _read_entry(entry: EntryPart) -> Entry:
    found = {name: getattr(entry, name) for name in _KERNEL_FIELDS}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    return Entry(Kernel(**values), entry.ns, entry.interval)
