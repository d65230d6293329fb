"""A device's profile: which kernels to measure first, how noisy it is, which int8 form is fast."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import get_args

import numpy as np

from autocompress.errors import MeasurementError, UsageError
from autocompress.hwprofiles.active import Group, by_doubt, group_of
from autocompress.hwprofiles.agent import FOREVER
from autocompress.hwprofiles.builder import SCALE, GraphBuilder
from autocompress.hwprofiles.checked import checked
from autocompress.hwprofiles.device import Device, FloatArray, Lane, local_device
from autocompress.hwprofiles.grid import default_grid
from autocompress.hwprofiles.predict import Layout
from autocompress.hwprofiles.profile import Entry, HardwareProfile
from autocompress.hwprofiles.references import residual_network
from autocompress.hwprofiles.robust import middle_mean
from autocompress.hwprofiles.timing import (
    CHUNK,
    MAX_ROUNDS,
    MIN_ROUNDS,
    WARM_UP,
    Samples,
    Setting,
    run_overhead_ns,
    time_kernels,
)
from autocompress.hwprofiles.unfinished import Traits, Unfinished
from autocompress.types import Format, Int8Format, Kernel

MAX_NOISE = 0.30
CHECKED = 0.05
"""Share of the time in which whole networks are measured, to state how good the predictions are."""
SPREAD = 0.6
"""Share of the kernels that are chosen before any time is known."""
_PROBE_SECONDS = 0.08
"""What a kernel should get at least; where time is shorter, fewer kernels are measured."""
_NETWORK = ((32, 32), (32, 32), (64, 64))
_HOW: dict[str, object] = {
    "warm_up_runs": WARM_UP,
    "rounds": f"{MIN_ROUNDS}-{MAX_ROUNDS}, interleaved",
    "statistic": "mean of the middle half of the undisturbed rounds",
    "spinning": "ONNX Runtime's default (workers spin)",
}

Progress = Callable[[int, int], None]


def measure_local(
    kernels: Sequence[Kernel],
    *,
    threads: int = 1,
    batch: int = 1,
    seconds: float = 60,
    progress: Progress | None = None,
    name: str = "local",
    device: Device | None = None,
    unfinished: Unfinished | None = None,
) -> HardwareProfile:
    """Measure ``kernels`` with ONNX Runtime on this machine's CPU (or ``device``'s), in about ``seconds``.

    Kernels that take the same time (widths that are rounded up to the same block) are measured once. Where there are
    more than time allows, those that span each family are measured and the rest is left to interpolation; ``how`` tells
    how many. A noisy host is not an error here: see ``noise_floor`` and ``how["warning"]``. What ``unfinished`` holds is
    not measured again, and it is kept up to date. Raises ``UsageError`` for nothing to measure or impossible settings,
    ``MeasurementError`` when the device vanishes.
    """
    if not kernels or threads < 1 or batch < 1 or not seconds > 0:
        raise UsageError(
            f"A measurement needs kernels, threads >= 1, batch >= 1 and seconds > 0, "
            f"got {len(kernels)} kernels, threads={threads}, batch={batch}, seconds={seconds:g}."
        )
    start, device = time.perf_counter(), device or local_device()
    kept = unfinished.read() if unfinished else None
    traits = kept[0] if kept else _traits(threads, seconds, device)
    samples = kept[1] if kept else Samples()
    wanted = measuring_order(kernels, traits.layout)
    left = max(seconds - (time.perf_counter() - start), seconds / 2)
    total = min(len(wanted), max(8, int(left / _PROBE_SECONDS)))
    report = progress or (lambda done, total: None)
    setting, rest = Setting(threads, batch, traits.int8, device), wanted
    for share in (SPREAD, 1.0):  # first spread over all families, then where those predict themselves worst
        rest, before = [kernel for kernel in rest if kernel not in samples.kernels], len(samples.kernels)
        if share == 1.0 and samples.kernels:
            rest = by_doubt({k: t.ns for k, t in samples.times().items()}, rest, traits.layout)
        todo = rest[: max(0, min(total, max(CHUNK, round(share * total))) - before)]
        rest = rest[len(todo) :]  # what has no probe is not asked for twice

        def tick(samples: Samples, done: int, before: int = before) -> None:
            if unfinished:
                unfinished.write(traits, samples)
            report(min(before + done, total), total)

        if todo:
            time_kernels(todo, setting, left * len(todo) / total, tick, samples)
    if not samples.kernels:
        raise UsageError(f"None of the kernels can be measured: {', '.join(sorted({k.kind for k in kernels}))}.")
    entries = tuple(Entry(kernel, timed.ns, timed.interval) for kernel, timed in samples.times().items())
    how = {
        **_HOW,
        "target": device.name,
        "kernels_asked": len(wanted),
        "kernels_measured": len(entries),
        "seconds": round(time.perf_counter() - start, 1),
        "clock_ns": samples.usual,
        "int8_exact": list(exact_int8(device)),
    }
    how |= {"warning": _too_noisy(traits.noise, device)} if traits.noise > MAX_NOISE else {}
    return HardwareProfile(
        name=name,
        device=str(device.host["cpu"]),
        runtime="onnxruntime CPUExecutionProvider",
        runtime_version=str(device.hello["onnxruntime"]),
        threads=threads,
        batch=batch,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        entries=entries,
        overhead_ns=run_overhead_ns(threads, device),
        noise_floor=traits.noise,
        int8_format=traits.int8,
        int8_evidence=traits.evidence,
        layout=traits.layout,
        host=device.host,
        how=how,
    )


def _traits(threads: int, seconds: float, device: Device) -> Traits:
    """What is found out of a device before its kernels are measured."""
    layout = detect_layout(threads, seconds=min(2.0, seconds / 10), device=device)
    int8, evidence = fastest_int8(threads, seconds=min(2.0, seconds / 15), device=device)
    return Traits(layout, int8, evidence, noise_floor(threads, seconds=min(2.0, seconds / 15), device=device))


def measure_default(
    *,
    minutes: float = 10,
    threads: int = 1,
    batch: int = 1,
    progress: Progress | None = None,
    name: str = "local",
    device: Device | None = None,
) -> HardwareProfile:
    """A profile of this machine (or ``device``) for any network: the grid of :func:`default_grid`.

    Cut short, the next call with the same settings goes on where it stopped. Raises ``MeasurementError`` when the host
    stays too noisy (noise floor above 30 %) after a second try, or when it vanishes.
    """
    device = device or local_device()
    noise = noise_floor(threads, device=device, seconds=min(3.0, minutes * 6))
    if noise > MAX_NOISE:
        time.sleep(min(10.0, minutes * 6))
        noise = min(noise, noise_floor(threads, seconds=min(5.0, minutes * 6), device=device))
    if noise > MAX_NOISE:
        raise MeasurementError(_too_noisy(noise, device))
    unfinished = Unfinished(device, threads, batch)
    profile = measure_local(
        default_grid(),
        threads=threads,
        batch=batch,
        seconds=(1 - CHECKED) * minutes * 60,
        progress=progress,
        name=name,
        device=device,
        unfinished=unfinished,
    )
    unfinished.remove()
    return checked(profile, device, seconds=CHECKED * minutes * 60)


def _too_noisy(noise: float, device: Device) -> str:
    where = "this host" if device is local_device() else device.name
    return (
        f"The same network timed twice differs by {noise:.0%} on {where} (at most {MAX_NOISE:.0%} can be measured); "
        "stop other work on it or use another one."
    )


def measuring_order(kernels: Iterable[Kernel], layout: Layout) -> list[Kernel]:
    """Distinct kernels as the device sees them, those first that tell most: corners of each family's grid, then the
    farthest from what is already there, taking turns between families and image sizes."""
    groups: dict[Group, list[Kernel]] = {}
    for kernel in dict.fromkeys(layout.canonical(k) for k in kernels):
        groups.setdefault(group_of(kernel, layout), []).append(kernel)
    ranked = [(rank, g, k) for g, group in enumerate(groups.values()) for rank, k in enumerate(_spread(group))]
    return [kernel for _, _, kernel in sorted(ranked, key=lambda item: item[:2])]


def _spread(group: list[Kernel]) -> list[Kernel]:
    """Farthest-point order in the logarithms of both widths, from the widest kernel on (Gonzalez 1985)."""
    points = np.log([[k.in_shape[0], k.out_shape[0]] for k in group])  # (n, 2)
    first = int(np.argmax(points.sum(axis=1)))
    order, distance = [first], np.abs(points - points[first]).sum(axis=1)
    while len(order) < len(group):
        distance[order] = -1.0
        order.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.abs(points - points[order[-1]]).sum(axis=1))
    return [group[i] for i in order]


def detect_layout(threads: int = 1, seconds: float = 2.0, device: Device | None = None) -> Layout:
    """Find out how convolutions round their channels, by timing widths on either side of the known block sizes."""
    widths = ((32, 32), (32, 24), (32, 20), (32, 16), (31, 32))
    kernels = [Kernel("conv", (a, 16, 16), (b, 16, 16), (3, 3)) for a, b in widths]
    times = time_kernels(kernels, Setting(threads, device=device or local_device()), seconds).times()
    whole, three, more_than_two, two, odd = (times[kernel].ns for kernel in kernels)
    granule = 4 if odd > 1.25 * whole else 1
    # Where 20 channels cost as much as 32, they were rounded up by 16; as much as 24, by 8.
    if more_than_two - two > 0.75 * (whole - two) > 0:
        return Layout(16, granule)
    if more_than_two - two > 0.75 * (three - two) > 0:
        return Layout(8, granule)
    return Layout(1, granule)


def exact_int8(device: Device | None = None) -> tuple[Int8Format, ...]:
    """The forms of int8 in which the host's ONNX Runtime computes what the file says, optimized or not.

    x86 processors without VNNI saturate sums of ``u8s8`` products at 16 bits. ``u8u8`` is exact everywhere.
    """
    return _exact_int8(device or local_device())


@functools.lru_cache(maxsize=8)
def _exact_int8(device: Device) -> tuple[Int8Format, ...]:
    forms: tuple[Int8Format, ...] = get_args(Int8Format)
    models = []
    for form in forms:
        graph = GraphBuilder((1, 64, 4, 4), form)
        y = graph.conv(graph.quantize("x", "in"), "conv", (64, 64), (3, 3), form="int8")
        graph.output(graph.quantize(y, "out"))
        models.append(graph.build())
    x = np.full((1, 64, 4, 4), 255 * SCALE, np.float32)  # the largest activations there are
    plain, optimized = (device.outputs(models, {"x": x}, optimized=on) for on in (False, True))
    # A rounding may fall on either side.
    exact = [float(np.abs(a - b).max()) < 1.5 * SCALE for (a,), (b,) in zip(plain, optimized, strict=True)]
    return tuple(form for form, right in zip(forms, exact, strict=True) if right)


def fastest_int8(
    threads: int = 1, seconds: float = 3.0, device: Device | None = None
) -> tuple[Int8Format, dict[str, float]]:
    """The fastest exact form of int8 on this host, and milliseconds of one network in all of them and in float."""
    forms: tuple[tuple[str, Format, Int8Format], ...] = (
        *((f"{form}_ms", "int8", form) for form in get_args(Int8Format)),
        ("float_ms", "float", "u8u8"),
    )
    models = [residual_network(_NETWORK, form, size=16, int8=int8)[0] for _, form, int8 in forms]
    times = _interleaved(models, threads, seconds, device)
    evidence = {key: round(middle_mean(t) / 1e6, 4) for (key, _, _), t in zip(forms, times, strict=True)}
    return min(exact_int8(device), key=lambda form: evidence[f"{form}_ms"]), evidence


def noise_floor(threads: int = 1, seconds: float = 3.0, device: Device | None = None) -> float:
    """Median relative difference between two sessions of one network, timed alternately in the same rounds."""
    model = residual_network(_NETWORK, size=16)[0]
    first, second = _interleaved([model, model], threads, seconds, device)
    return float(np.median(2 * np.abs(first - second) / (first + second)))


def _interleaved(models: Sequence[bytes], threads: int, seconds: float, device: Device | None) -> list[FloatArray]:
    """Nanoseconds of each model in each round; each counted run follows an uncounted one."""
    lanes = [Lane(model, threads, warm_up=0, slow_ns=FOREVER, settle_most=1) for model in models]
    rounds = (device or local_device()).rounds(lanes, seconds=seconds, least=10, most=300)
    return [rounds.lane(i) for i in range(len(models))]
