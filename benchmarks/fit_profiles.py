"""Profiles of phones, a Raspberry Pi, GPUs and server CPUs, fitted to latencies that others have published.

Writes ``autocompress/hwprofiles/data/<device>.json`` and how good they are on networks, and on search spaces, that were
not fitted, beside a FLOPs-only and a roofline baseline on the same rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import published
import published_hat
import published_tfnas
from common import folders, load, save
from scipy.optimize import nnls

from autocompress.hwprofiles import FITTED, HardwareProfile
from autocompress.hwprofiles.fitted import Laws, error, fit_laws, predict_networks
from autocompress.hwprofiles.profiles import SHIPPED
from autocompress.types import Kernel

FloatArray = npt.NDArray[np.float64]
FOLDS = 3
ROWS = 3000
"""Of a space, at most so many networks are fitted: each space counts alike."""
GOAL = {"mape": 0.10, "spearman": 0.95, "across": 0.85}
HELP = (
    "H. Lee et al., HELP: Hardware-Adaptive Efficient Latency Prediction for NAS via Meta-Learning, NeurIPS 2021; MIT"
)
HWNAS = (
    "C. Li et al., HW-NAS-Bench: Hardware-Aware Neural Architecture Search Benchmark, ICLR 2021, as distributed with "
    "HELP; MIT"
)
HAT = "H. Wang et al., HAT: Hardware-Aware Transformers for Efficient Natural Language Processing, ACL 2020; MIT"
TFNAS = (
    "Y. Hu et al., TF-NAS: Rethinking Three Search Freedoms of Latency-Constrained Differentiable Neural Architecture "
    "Search, ECCV 2020; MIT"
)
OFA = "H. Cai et al., Once-for-All: Train One Network and Specialize it for Efficient Deployment, ICLR 2020; MIT"


SPACES = {
    **published.SPACES,
    "HAT encoder": published_hat.encoder,
    "HAT decoder": published_hat.decoder,
    "TF-NAS blocks": published_tfnas.blocks,
}


@dataclass(frozen=True)
class Device:
    """Where a device's measurements lie: search space -> column; ``kind``: devices that lend each other their laws;
    ``runtime``, ``threads``: as far as they are stated."""

    name: str
    title: str
    kind: str
    columns: Mapping[str, str]
    source: str = HELP
    batch: int = 1
    runtime: str = "as published"
    version: str = "not stated"
    threads: str = "as published, not stated"


def _both(column: str, **more: str) -> dict[str, str]:
    return {"NAS-Bench-201": column, "FBNet": column, **more}


def _gpu(name: str, title: str, batch: int, ofa: str = "") -> Device:
    more = {"Once-for-all": f"{ofa}_{batch}"} if ofa else {}
    suffix = f"-batch{batch}" if batch > 1 else ""
    return Device(name + suffix, title, f"GPU at batch {batch}", _both(f"{name}_{batch}", **more), batch=batch)


def _hat(name: str, title: str, column: str) -> Device:
    # Profiles of their own: not in the runtime that the Pi's convolutional networks ran in, nor surely the TITAN Xp's.
    columns = {"HAT encoder": column, "HAT decoder": column}
    return Device(f"{name}-transformer", title, f"transformers on {name}", columns, HAT, runtime="PyTorch (fairseq)")


DEVICES = (
    Device("pixel2", "Google Pixel 2 (phone)", "phone", _both("pixel2")),
    Device("pixel3", "Google Pixel 3 (phone)", "TensorFlow Lite", _both("pixel3"), HWNAS),
    Device("samsung_a50", "Samsung Galaxy A50 (phone)", "phone", _both("samsung_a50")),
    Device("essential_ph_1", "Essential PH-1 (phone)", "phone", _both("essential_ph_1")),
    Device("raspi4", "Raspberry Pi 4", "TensorFlow Lite", _both("raspi4"), HWNAS),
    Device("note10", "Samsung Galaxy Note10 (phone)", "Note10", {"Once-for-all blocks": ""}, OFA),
    *(
        _gpu(name, title, batch, ofa)
        for batch in (1, 32)
        for name, title, ofa in (
            ("1080ti", "NVIDIA GeForce GTX 1080 Ti", ""),
            ("2080ti", "NVIDIA GeForce RTX 2080 Ti", "2080ti"),
            ("titanx", "NVIDIA TITAN X", ""),
            ("titanxp", "NVIDIA TITAN Xp", "titan_xp"),
        )
    ),
    # Left out: the Xeon Gold 6226. FBNet's networks took 11 times as long as NAS-Bench-201's there, in the median; 2.3 and
    # 3.0 times on the other two Xeons: its two spaces were not timed under the same conditions.
    Device("xeon_gold_6240", "Intel Xeon Gold 6240", "Xeon", _both("gold_6240")),
    Device("xeon_silver_4114", "Intel Xeon Silver 4114", "Xeon", _both("silver_4114")),
    Device(
        "xeon_gold_6130",
        "Intel Xeon Gold 6130",
        "TF-NAS",
        {"TF-NAS blocks": ""},
        TFNAS,
        runtime="PyTorch",
        version="1.1",
        threads="1",
    ),
    _hat("raspi4", "Raspberry Pi 4 (ARM Cortex-A72)", "cpu_raspberrypi"),
    _hat("xeon_e5_2640", "Intel Xeon E5-2640", "cpu_xeon"),
    _hat("titanxp", "NVIDIA TITAN Xp", "gpu_titanxp"),
)

Model = Callable[[published.Measured], FloatArray]
Fitted = tuple[Laws, float]


# ---------------------------------------------------------------- models


def sample(measured: published.Measured, rows: npt.NDArray[np.bool_] | None = None) -> published.Measured:
    """At most ``ROWS`` networks, the same ones every time."""
    chosen = np.flatnonzero(np.ones(len(measured.ns), bool) if rows is None else rows)
    chosen = np.sort(np.random.default_rng(0).permutation(chosen)[:ROWS])
    return replace(measured, networks=measured.networks.only(chosen), ns=measured.ns[chosen])


def together(spaces: Sequence[published.Measured]) -> tuple[tuple[Kernel, ...], FloatArray, FloatArray]:
    """Kernels, counts and latencies of several spaces as one."""
    index: dict[Kernel, int] = {}
    for space in spaces:
        for kernel in space.networks.kernels:
            index.setdefault(kernel, len(index))
    counts = np.zeros((sum(len(space.ns) for space in spaces), len(index)))
    start = 0
    for space in spaces:
        columns = [index[kernel] for kernel in space.networks.kernels]
        counts[start : start + len(space.ns), columns] = space.networks.counts
        start += len(space.ns)
    return tuple(index), counts, np.concatenate([space.ns for space in spaces])


def laws_of(spaces: Sequence[published.Measured], donors: Sequence[Fitted] = ()) -> Fitted:
    """The model that is shipped."""
    kernels, counts, ns = together(spaces)
    whole = all(space.whole for space in spaces)
    return fit_laws(kernels, counts, ns, donors=donors, whole=whole)


def by_laws(fitted: Fitted) -> Model:
    return lambda m: predict_networks(*fitted, m.networks.kernels, m.networks.counts)


def by_flops(spaces: Sequence[published.Measured]) -> Model:
    """A constant and a time a MAC."""
    kernels, counts, ns = together(spaces)
    macs = counts @ np.array([kernel.macs for kernel in kernels], np.float64)
    found = _relative(np.stack([np.ones_like(ns), macs], 1), ns)
    return lambda m: found[0] + found[1] * m.networks.macs


def by_roofline(spaces: Sequence[published.Measured]) -> Model:
    """A constant and, of each kernel, the longer of its arithmetic and its traffic (Williams et al., CACM 2009)."""
    kernels, counts, ns = together(spaces)

    def times(of: Sequence[Kernel], intensity: float) -> FloatArray:
        return np.array([max(k.macs, _traffic(k) * intensity) for k in of], np.float64)

    best: tuple[float, float, FloatArray] | None = None
    for intensity in np.geomspace(0.01, 1000, 26):  # MACs in the time of one element
        columns = np.stack([np.ones_like(ns), counts @ times(kernels, intensity)], 1)
        found = _relative(columns, ns)
        off = float(np.mean((columns @ found / ns - 1) ** 2))
        if best is None or off < best[0]:
            best = off, float(intensity), found
    assert best is not None
    _, intensity, found = best
    return lambda m: found[0] + found[1] * (m.networks.counts @ times(m.networks.kernels, intensity))


def _traffic(kernel: Kernel) -> float:
    return float(np.prod(kernel.in_shape) * kernel.n_inputs + np.prod(kernel.out_shape) + kernel.weights)


def _relative(columns: FloatArray, ns: FloatArray) -> FloatArray:
    rows = columns / ns[:, None]
    scale = np.maximum(rows.mean(axis=0), 1e-30)
    return np.asarray(nnls(rows / scale, np.ones(len(ns)))[0] / scale)


def by_table(measured: published.Measured) -> Model:
    """A free number for each choice at each position: what additive predictions can reach in the noise of these rows."""
    width = int(measured.networks.table.max()) + 1

    def one_hot(table: npt.NDArray[np.int64]) -> FloatArray:
        rows = np.ones((len(table), width + 1))
        rows[:, 1:] = 0
        np.add.at(rows, (np.arange(len(table))[:, None], 1 + np.minimum(table, width - 1)), 1.0)
        return rows

    rows = one_hot(measured.networks.table) / measured.ns[:, None]
    found = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    return lambda m: one_hot(m.networks.table) @ found


# ---------------------------------------------------------------- judging


def held_out(
    measured: published.Measured,
    fit: Callable[[npt.NDArray[np.bool_]], Model],
    folds: npt.NDArray[np.int64] | None = None,
) -> dict[str, float]:
    """Errors over whole groups of networks that were not fitted, each group once; over ``folds``, where they are given."""
    folds = measured.networks.group % FOLDS if folds is None else folds
    predicted = np.zeros(len(measured.ns))
    for fold in np.unique(folds):
        test = folds == fold
        part = replace(measured, networks=measured.networks.only(test), ns=measured.ns[test])
        predicted[test] = fit(~test)(part)
    return error(predicted, measured.ns)


def spread_of_twins(measured: published.Measured) -> dict[str, float] | None:
    """How far networks lie from the mean of the others that run exactly the same kernels: no prediction can be nearer."""
    _, which = np.unique(measured.networks.counts, axis=0, return_inverse=True)
    size = np.bincount(which)[which]
    if np.mean(size > 1) < 0.5:
        return None
    total = np.bincount(which, measured.ns)[which]
    several = size > 1
    return error(((total - measured.ns) / np.maximum(size - 1, 1))[several], measured.ns[several])


def noise_of(measured: published.Measured) -> dict[str, float]:
    """What the data allow: the better of the free table and of networks with the same kernels. A table knows only numbers
    that it has seen: where whole groups have numbers of their own, every third row is held out in their place."""
    folds, table = measured.networks.group % FOLDS, measured.networks.table
    if any(np.setdiff1d(table[folds == fold], table[folds != fold]).size for fold in range(FOLDS)):
        folds = np.arange(len(measured.ns)) % FOLDS
    found = [held_out(measured, lambda rows: by_table(sample(measured, rows)), folds)]
    if twins := spread_of_twins(measured):
        found.append(twins)
    return max(found, key=lambda each: each["spearman"])


def judge(spaces: Sequence[published.Measured], i: int, donors: Sequence[Fitted]) -> dict[str, Any]:
    """All figures of one device and space."""
    one, others = spaces[i], [sample(space) for j, space in enumerate(spaces) if j != i]
    row: dict[str, Any] = {"networks": len(one.ns), "dropped": one.dropped, "noise": noise_of(one)}
    row["within"] = {
        "laws": held_out(one, lambda rows: by_laws(laws_of([sample(one, rows)]))),
        "shipped": held_out(one, lambda rows: by_laws(laws_of([sample(one, rows), *others], donors))),
        "roofline": held_out(one, lambda rows: by_roofline([sample(one, rows)])),
        "flops": held_out(one, lambda rows: by_flops([sample(one, rows)])),
    }
    if others:
        row["across"] = {
            "laws": error(by_laws(laws_of(others))(one), one.ns),
            "roofline": error(by_roofline(others)(one), one.ns),
            "flops": error(by_flops(others)(one), one.ns),
        }
        if donors:
            row["across"]["shipped"] = error(by_laws(laws_of(others, donors))(one), one.ns)
    noisy = row["noise"]["spearman"] < GOAL["spearman"] or row["noise"]["mape"] > GOAL["mape"]
    row["verdict"] = "met" if _met(row) else "noise" if noisy else "missed"
    return row


def _met(row: Mapping[str, Any]) -> bool:
    within = row["within"]["shipped"]
    return bool(within["mape"] <= GOAL["mape"] and within["spearman"] >= GOAL["spearman"])


# ---------------------------------------------------------------- writing


def profile_of(
    device: Device, spaces: Sequence[published.Measured], fitted: Fitted, rows: Mapping[str, Any]
) -> HardwareProfile:
    """The shipped profile."""
    laws, overhead = fitted
    known = sorted({" ".join(law.family) for law in laws.laws if law.family and law.family[-1] == "float"})
    shipped = {space: row["within"]["shipped"] for space, row in rows.items()}
    errors = {space.space: {k: round(v, 4) for k, v in shipped[space.space].items()} for space in spaces}
    for name, found in shipped.items():
        space, _, regrouped = name.partition(", ")
        if regrouped:
            errors[space] |= {f"{key}_with_{regrouped.replace(' ', '_')}": round(v, 4) for key, v in found.items()}
    for space in errors:
        found = rows[space].get("across", {})
        for key, value in found.get("shipped", found.get("laws", {})).items():
            errors[space][f"{key}_when_the_space_was_held_out"] = round(value, 4)
    sizes = [size for space in spaces for size in space.sizes]
    return HardwareProfile(
        name=device.name,
        device=device.title,
        runtime=device.runtime,
        runtime_version=device.version,
        threads=1,
        batch=device.batch,
        measured_at="as published",
        entries=(),
        overhead_ns=round(overhead),
        how={"fitted_by": "benchmarks/fit_profiles.py", "networks": {s.space: len(s.ns) for s in spaces}},
        provenance=FITTED,
        laws=laws,
        source={"citation": device.source.rpartition(";")[0], "licence": device.source.rpartition(";")[2].strip()},
        fit_error=errors,
        limits={
            "batch": device.batch,
            spaces[0].unit: [min(sizes), max(sizes)],
            "spaces": [space.space for space in spaces],
            "operators": known,
            "formats": ["float"],
            "threads": device.threads,
        },
        expected_error=round(max(found["p90"] for found in shipped.values()), 3),
    )


def in_words(device: Device, space: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as the table shows it: MAPE and rank correlation."""

    def pair(found: Mapping[str, float] | None) -> str:
        return f"{found['mape']:.1%} / {found['spearman']:.3f}" if found else "–"

    across = row.get("across", {})
    return {
        **row,
        "device": device.name,
        "space": space,
        "left out": ", ".join(f"{n} {why}" for why, n in row["dropped"].items()) or "–",
        **{f"within {name}": pair(row["within"].get(name)) for name in ("shipped", "laws", "roofline", "flops")},
        **{f"across {name}": pair(across.get(name)) for name in ("shipped", "laws", "roofline", "flops")},
        "allowed": pair(row["noise"]),
    }


COLUMNS = [
    ("device", "device"),
    ("space", "space"),
    ("networks", "networks"),
    ("within shipped", "held-out networks: shipped"),
    ("within laws", "laws of this space alone"),
    ("within roofline", "roofline"),
    ("within flops", "FLOPs only"),
    ("allowed", "what the noise allows"),
    ("verdict", "goal"),
    ("across shipped", "held-out space: shipped way"),
    ("across laws", "without other devices"),
    ("across roofline", "roofline "),
    ("across flops", "FLOPs only "),
    ("left out", "rows left out"),
]


def renew(same: Sequence[Device], folder: Path) -> dict[str, Any]:
    """Profiles of devices of one kind, and the rows that judge them."""
    spaces = {d.name: [SPACES[s](folder, column) for s, column in d.columns.items()] for d in same}
    alone = {d.name: laws_of([sample(space) for space in spaces[d.name]]) for d in same}
    rows: dict[str, Any] = {}
    for device in same:
        donors = [alone[other.name] for other in same if other is not device]
        mine = spaces[device.name]
        found = {space.space: judge(mine, i, donors) for i, space in enumerate(mine)}
        for i, space in enumerate(mine):
            for name, group in space.also.items():
                regrouped = replace(space, networks=replace(space.networks, group=group))
                found[f"{space.space}, {name}"] = judge([*mine[:i], regrouped, *mine[i + 1 :]], i, donors)
        profile = profile_of(device, mine, laws_of([sample(space) for space in mine], donors), found)
        profile.save(SHIPPED / f"{device.name}.json")
        for space, row in found.items():
            rows[f"{device.name} {space}"] = said = in_words(device, space, row)
            print(device.name, space, said["within shipped"], said["across shipped"], row["verdict"], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    kinds = list(dict.fromkeys(device.kind for device in DEVICES))
    parser.add_argument("--kinds", nargs="*", default=kinds, choices=kinds, help="devices to renew; the others stay")
    asked = parser.parse_args()
    folder = published.find(asked.data)
    SHIPPED.mkdir(exist_ok=True)
    rows = load("fit_profiles")
    for kind in asked.kinds:
        rows |= renew([device for device in DEVICES if device.kind == kind], folder)
    order = [f"{device.name} {space}" for device in DEVICES for space in device.columns]
    rows = dict(sorted(rows.items(), key=lambda item: order.index(item[0].partition(",")[0])))
    title = "Fitted profiles: MAPE / Spearman on networks, and on search spaces, that were not fitted"
    save("fit_profiles", rows, COLUMNS, title, "python benchmarks/fit_profiles.py --data DIR")


if __name__ == "__main__":
    main()
