"""What was measured of a device before it vanished, kept in the cache folder so that the next call goes on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autocompress.files import cache_dir, write_json
from autocompress.hwprofiles.device import Device
from autocompress.hwprofiles.predict import Layout
from autocompress.hwprofiles.timing import Samples
from autocompress.types import Int8Format, Kernel, digest

FORMAT = 1


@dataclass(frozen=True)
class Traits:
    """What is found out of a device before its kernels are measured; fields as in ``HardwareProfile``."""

    layout: Layout
    int8: Int8Format
    evidence: Mapping[str, float]
    noise: float


class Unfinished:
    """The file of one device, runtime and setting. Times are kept beside the clock's of their rounds, so that what two
    calls measured is put on one clock."""

    def __init__(self, device: Device, threads: int, batch: int) -> None:
        key = [FORMAT, device.name, device.host, device.hello["onnxruntime"], threads, batch]
        self.path = cache_dir() / "profiles" / "unfinished" / f"{digest(key)}.json"

    def read(self) -> tuple[Traits, Samples] | None:
        """What is kept, or ``None`` where nothing usable is: it can be measured again."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            traits = Traits(Layout(**data["layout"]), data["int8"], data["evidence"], data["noise"])
            kernels = {
                _kernel(row["kernel"]): (np.array(row["ns"], np.float64), np.array(row["ticks"], np.float64))
                for row in data["kernels"]
            }
            return traits, Samples(kernels, [float(tick) for tick in data["ticks"]])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, traits: Traits, samples: Samples) -> None:
        """Keep it, atomically."""
        rows: list[dict[str, Any]] = [
            {"kernel": asdict(kernel), "ns": ns.tolist(), "ticks": ticks.tolist()}
            for kernel, (ns, ticks) in samples.kernels.items()
        ]
        data = {**traits.__dict__, "layout": asdict(traits.layout), "ticks": samples.ticks, "kernels": rows}
        write_json(self.path, data)

    def remove(self) -> None:
        """The profile is whole."""
        self.path.unlink(missing_ok=True)


def _kernel(fields: Mapping[str, Any]) -> Kernel:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Kernel(**values)
