"""This machine's NVIDIA GPU: kernels as torch runs them inside CUDA graphs, timed by the GPU's own events.

Convolutions are cuDNN's in the channels-last layout, products cuBLAS'; what stands behind them (bias, addition, activation) is
one kernel, as ``torch.compile`` fuses it. A graph holds copies of a kernel, so that what a launch costs the host is not counted:
it is in ``overhead_ns``, once a run. The only file of this package that needs torch; it is loaded when a GPU is measured.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autocompress.errors import UsageError
from autocompress.hwprofiles.grid import default_grid
from autocompress.hwprofiles.measure import Progress, measuring_order
from autocompress.hwprofiles.predict import FLOOR_NS, Layout
from autocompress.hwprofiles.probes import pads_of
from autocompress.hwprofiles.profile import Entry, HardwareProfile
from autocompress.hwprofiles.robust import middle_mean
from autocompress.types import APART, Format, Kernel

GpuPrecision = Literal["float32", "tf32", "float16", "bfloat16"]
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
COPIES, ROUNDS, CHUNK = 16, 9, 24
SPAN_NS = 1_000_000
"""How long a graph is replayed in a round, at least."""
WARM_UP = 3
CLIFF = 1.15
"""A width that takes this much longer than the next rounder one is not rounded up to it."""
INT8_ROWS, INT8_STEP = 17, 8
"""``torch._int_mm``: more rows than 16, and widths that are multiples of 8."""

Run = Callable[[], object]
FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]


TOKENS = (1, 64, 256)


def cuda_grid() -> list[Kernel]:
    """The grid of any network on a processor, as far as GPUs have its kernels, with what transformers are made of."""
    floats = [k for k in default_grid() if k.format == "float" and k.kind not in ("quantize", "dequantize")]
    kernels = [
        k for k in floats if k.kernel[0] == k.kernel[1] and len(k.out_shape) != 2 and not k.fused.startswith(APART)
    ]
    forms: tuple[Format, ...] = ("float", "int8")
    for t in TOKENS:
        for a in (64, 128, 256, 512, 1024):
            kernels += [Kernel("linear", (a, t), (b, t), format=f) for b in (64, 256, 704, 1024) for f in forms]
            kernels += [Kernel("norm", (a, t), (a, t)), Kernel("add", (a, t), (a, t), n_inputs=2)]
            kernels += [Kernel("activation", (a, t), (a, t), fused="silu"), Kernel("mul", (a, t), (a, t), n_inputs=2)]
        kernels += [Kernel("attention", (h, t, 32), (h, t, 32)) for h in (2, 4, 8, 16)]
    return kernels


def measure_cuda(
    kernels: Sequence[Kernel],
    *,
    device: str = "cuda",
    precision: str = "float16",
    batch: int = 1,
    seconds: float = 60,
    progress: Progress | None = None,
    name: str = "cuda",
) -> HardwareProfile:
    """Measure ``kernels`` on a GPU with torch in about ``seconds``; what cannot run there is left out and named by ``explains``.

    ``precision`` is that of kernels whose format is ``float``; int8 is there for linear layers alone, as in torch. Raises
    ``UsageError`` for impossible settings and where torch sees no GPU.
    """
    if not kernels or batch < 1 or not seconds > 0 or precision not in DTYPES:
        raise UsageError(
            f"A GPU's measurement needs kernels, batch >= 1, seconds > 0 and a precision among {', '.join(DTYPES)}; "
            f"got {len(kernels)} kernels, batch={batch}, seconds={seconds:g}, precision={precision!r}."
        )
    if not torch.cuda.is_available():
        raise UsageError(
            f"torch {torch.__version__} sees no GPU to measure; install a build of torch with CUDA, or name another target."
        )
    start = time.perf_counter()
    bench = Bench(device, cast(GpuPrecision, precision), batch)
    layout = bench.layout()
    wanted = [kernel for kernel in measuring_order(kernels, layout) if bench.operator(kernel) is not None]
    if not wanted:
        raise UsageError(f"None of the kernels can be measured: {', '.join(sorted({k.kind for k in kernels}))}.")
    entries: list[Entry] = []
    for at in range(0, len(wanted), CHUNK):
        if entries and time.perf_counter() - start > seconds:
            break
        entries += bench.time(wanted[at : at + CHUNK])
        if progress:
            progress(len(entries), len(wanted))
    properties, cudnn = torch.cuda.get_device_properties(device), torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return HardwareProfile(
        name=name,
        device=properties.name,
        runtime=f"torch CUDA graphs, {precision}",
        runtime_version=f"{torch.__version__}, cuDNN {cudnn}",
        threads=1,
        batch=batch,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        entries=tuple(entries),
        overhead_ns=bench.overhead_ns(),
        noise_floor=bench.noise(),
        layout=layout,
        host={
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        },
        how={
            "precision": precision,
            "copies": COPIES,
            "rounds": f"{ROUNDS}, interleaved, of at least {SPAN_NS / 1e6:g} ms",
            "statistic": "mean of the middle half of the rounds, in units of a reference",
            "memory_format": "channels last",
            "kernels_asked": len(wanted),
            "kernels_measured": len(entries),
            "seconds": round(time.perf_counter() - start, 1),
        },
    )


@dataclass
class _Graph:
    """Copies of one kernel as a CUDA graph, and how often it is replayed in a round. ``run`` holds the tensors that it reads."""

    run: Run
    graph: Any
    copies: int
    replays: int = 1

    def ns(self) -> float:
        """Of one copy, by the GPU's own clock."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(self.replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e6 / (self.replays * self.copies)


class Bench:
    """A GPU made ready: kernels become functions on tensors that lie there, functions become graphs, graphs times."""

    def __init__(self, device: str, precision: GpuPrecision, batch: int) -> None:
        self.device, self.precision, self.batch, self.dtype = device, precision, batch, DTYPES[precision]
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        self.clock = self.graph(
            cast(Run, self.operator(Kernel("conv", (64, 16, 16), (64, 16, 16), (3, 3), fused="relu")))
        )

    # ------------------------------------------------------------ time

    def graph(self, run: Run, copies: int = COPIES) -> _Graph:
        """The function ``copies`` times, captured."""
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
            side.synchronize()
            graph.capture_begin()  # torch.cuda.graph() collects garbage first, which takes longer than all the rest
            for _ in range(copies):
                run()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        found = _Graph(run, graph, copies)
        found.ns()
        found.replays = max(1, math.ceil(SPAN_NS / (found.ns() * copies)))
        return found

    def time(self, kernels: Sequence[Kernel]) -> Iterator[Entry]:
        """All kernels in turn, a reference between the rounds; what fails for lack of memory is left out."""
        made: list[tuple[Kernel, _Graph, _Graph | None]] = []
        for kernel in kernels:
            try:
                run, less = self.operator(kernel), self.without(kernel)
                made.append((kernel, self.graph(cast(Run, run)), self.graph(less) if less else None))
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
        ticks, rows = [], []
        for _ in range(ROUNDS):
            ticks.append(self.clock.ns())
            rows.append([graph.ns() - (less.ns() if less else 0.0) for _, graph, less in made])
        scale = np.array(ticks) / float(np.median(ticks))
        for (kernel, _, _), values in zip(made, np.array(rows).T / scale, strict=True):
            low, high = np.percentile(values, [25, 75])
            ns = max(middle_mean(values), FLOOR_NS)
            yield Entry(kernel, round(ns, 1), round(float(1.57 * (high - low) / math.sqrt(len(values)) / ns), 4))

    def overhead_ns(self) -> float:
        """What the host waits for a graph that computes next to nothing."""
        x = torch.zeros(16, device=self.device)
        tiny = self.graph(lambda: torch.relu(x), copies=1)
        return wall_ns(tiny.graph.replay) - tiny.ns()

    def noise(self) -> float:
        """Median relative difference of one convolution timed twice in a round."""
        pairs = np.array([[self.clock.ns(), self.clock.ns()] for _ in range(30)])
        return float(np.median(2 * np.abs(pairs[:, 0] - pairs[:, 1]) / pairs.sum(1)))

    def layout(self) -> Layout:
        """Whether widths are rounded up to multiples of 8: then 28 channels take the time of 32, and of 31 much longer."""
        whole, less, odd = (
            self.graph(cast(Run, self.operator(Kernel("conv", (c, 32, 32), (64, 32, 32), (3, 3))))).ns()
            for c in (32, 28, 31)
        )
        if less > CLIFF * whole:  # a width that tensor cores do not take as it is
            return Layout(1, 8)
        return Layout(8, 4 if odd > CLIFF * whole else 1)

    # ------------------------------------------------------------ kernels

    def operator(self, kernel: Kernel) -> Run | None:
        """The kernel on random tensors on the GPU, or ``None`` where torch has none."""
        make = getattr(self, f"_{kernel.kind}", None)
        int8 = kernel.format == "int8" and kernel.kind == "linear" and self._int8_rows(kernel)
        if make is None or not (kernel.format == "float" or int8):
            return None
        return cast("Run | None", make(kernel))

    def without(self, kernel: Kernel) -> Run | None:
        """What is subtracted: an addition is done by the kernel that adds the bias, whose time a convolution has."""
        if kernel.kind != "add" or len(kernel.out_shape) != 3:
            return None
        x, bias = self.image(kernel.out_shape), self._bias(kernel.out_shape[0])
        return lambda: pointwise("x + b", "x b")(x, bias)

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, device=self.device, dtype=self.dtype)

    def image(self, shape: Sequence[int]) -> Tensor:
        value = self.tensor(*shape)
        return value.contiguous(memory_format=torch.channels_last) if len(shape) == 3 else value

    def weight(self, *shape: int) -> Tensor:
        value = torch.randn(*shape, device=self.device, dtype=self.dtype) * 0.05
        return value.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else value

    def _bias(self, channels: int) -> Tensor:
        return self.weight(1, channels, 1, 1)

    def _conv(self, kernel: Kernel) -> Run | None:
        if len(kernel.in_shape) != 3:
            return None
        x, (top, left, bottom, right) = self.image(kernel.in_shape), pads_of(kernel)
        w = self.weight(kernel.out_shape[0], kernel.in_shape[0] // kernel.groups, *kernel.kernel)
        b, then = self._bias(kernel.out_shape[0]), pointwise(activated("x + b", kernel.fused), "x b")
        pad = max(top, bottom), max(left, right)
        return lambda: then(functional.conv2d(x, w, None, kernel.stride, pad, 1, kernel.groups), b)

    def _linear(self, kernel: Kernel) -> Run:
        rows, c_in, c_out = self.batch * math.prod(kernel.in_shape[1:]), kernel.in_shape[0], kernel.out_shape[0]
        if kernel.format == "int8":
            a, w = (
                torch.randint(-127, 128, shape, device=self.device, dtype=torch.int8)
                for shape in ((rows, c_in), (c_out, c_in))
            )
            scale, b = self.weight(1, c_out).float(), self.weight(1, c_out).float()
            then = pointwise(activated("x * s + b", kernel.fused), "x s b")
            return lambda: then(torch._int_mm(a, w.t()), scale, b)
        x, weight, bias = self.weight(rows, c_in), self.weight(c_out, c_in), self.weight(c_out)
        if not kernel.fused:
            return lambda: functional.linear(x, weight, bias)
        act = pointwise(activated("x", kernel.fused), "x")
        return lambda: act(functional.linear(x, weight, bias))

    def _int8_rows(self, kernel: Kernel) -> bool:
        rows = self.batch * math.prod(kernel.in_shape[1:])
        return rows >= INT8_ROWS and kernel.in_shape[0] % INT8_STEP == kernel.out_shape[0] % INT8_STEP == 0

    def _add(self, kernel: Kernel) -> Run:
        x, y = (self.image(kernel.out_shape) for _ in range(2))
        if len(kernel.out_shape) != 3:
            then = pointwise(activated("x + y", kernel.fused), "x y")
            return lambda: then(x, y)
        fused, b = pointwise(activated("x + b + y", kernel.fused), "x b y"), self._bias(kernel.out_shape[0])
        return lambda: fused(x, b, y)

    def _mul(self, kernel: Kernel) -> Run:
        x = self.image(kernel.out_shape)
        y = self._bias(kernel.out_shape[0]) if len(kernel.out_shape) == 3 else self.image(kernel.out_shape)
        return lambda: pointwise("x * y", "x y")(x, y)

    def _activation(self, kernel: Kernel) -> Run:
        x, act = self.image(kernel.in_shape), pointwise(activated("x", kernel.fused or "sigmoid"), "x")
        return lambda: act(x)

    def _relu(self, kernel: Kernel) -> Run:
        x = self.image(kernel.in_shape)
        return lambda: pointwise(activated("x", "relu"), "x")(x)

    def _batch_norm(self, kernel: Kernel) -> Run:
        x, a, b = self.image(kernel.in_shape), *(self._bias(kernel.in_shape[0]) for _ in range(2))
        return lambda: pointwise(activated("x * a + b", kernel.fused), "x a b")(x, a, b)

    def _quantize(self, kernel: Kernel) -> Run:
        x = self.image(kernel.in_shape)
        return lambda: pointwise("rint(x * 20)", "x")(x)

    _dequantize = _quantize

    def _pool(self, kernel: Kernel) -> Run:
        x, pad = (
            self.image(kernel.in_shape),
            tuple(max(pair) for pair in zip(pads_of(kernel)[:2], pads_of(kernel)[2:], strict=True)),
        )
        pool = functional.avg_pool2d if kernel.fused.startswith("av") else functional.max_pool2d
        return lambda: pool(x, kernel.kernel, kernel.stride, pad)

    def _global_pool(self, kernel: Kernel) -> Run:
        x = self.image(kernel.in_shape)
        return lambda: x.mean((2, 3))

    def _attention(self, kernel: Kernel) -> Run:
        q, k, v = (self.tensor(*kernel.in_shape) for _ in range(3))
        return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def _norm(self, kernel: Kernel) -> Run:
        x, weight = self.tensor(*kernel.in_shape[::-1]), self.weight(kernel.in_shape[0])
        return lambda: functional.rms_norm(x, (kernel.in_shape[0],), weight)

    def _embedding(self, kernel: Kernel) -> Run:
        table = self.weight(kernel.in_shape[0], kernel.out_shape[0])
        ids = torch.randint(kernel.in_shape[0], (self.batch, *kernel.in_shape[1:]), device=self.device)
        return lambda: functional.embedding(ids, table)

    def _concat(self, kernel: Kernel) -> Run | None:
        parts, rest = divmod(kernel.out_shape[0], max(1, kernel.n_inputs))
        if not parts:
            return None
        values = [self.image((parts + (i < rest), *kernel.out_shape[1:])) for i in range(kernel.n_inputs)]
        return lambda: torch.cat(values, 1)

    def _pad(self, kernel: Kernel) -> Run | None:
        if len(kernel.in_shape) != 3:
            return None
        x, gaps = self.image(kernel.in_shape), [b - a for a, b in zip(kernel.in_shape, kernel.out_shape, strict=True)]
        pads = [side for gap in reversed(gaps) for side in (gap // 2, gap - gap // 2)]
        return lambda: functional.pad(x, pads)

    def _copy(self, kernel: Kernel) -> Run:
        x = self.image(kernel.out_shape)
        return lambda: x.clone()

    _slice = _transpose = _repeat = _copy


def wall_ns(run: Callable[[], object], rounds: int = 200) -> float:
    """Nanoseconds that the host waits for one run, GPU idle before and after."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter_ns() - start)
    return middle_mean(np.array(times, np.float64))


_ACTIVATIONS = {
    "": "{x}",
    "relu": "({x}) > 0 ? ({x}) : 0",
    "relu6": "({x}) > 0 ? (({x}) < 6 ? ({x}) : 6) : 0",
    "sigmoid": "1 / (1 + exp(-({x})))",
    "silu": "({x}) / (1 + exp(-({x})))",
    "tanh": "tanh({x})",
    "gelu": "0.5f * ({x}) * (1 + erf(({x}) * 0.70710678f))",
}


def activated(expression: str, fused: str) -> str:
    """The expression behind an activation; one that is not known costs what a sigmoid does."""
    return _ACTIVATIONS.get(fused, _ACTIVATIONS["sigmoid"]).format(x=expression)


@functools.cache
def pointwise(expression: str, names: str) -> Callable[..., Tensor]:
    """One kernel for an expression of broadcast tensors, computed in float32 (torch's run-time compiled element-wise kernels)."""
    given = names.split()
    arguments = ", ".join(f"T {name}_" for name in given)
    floats = " ".join(f"const float {name} = static_cast<float>({name}_);" for name in given)
    code = f"template <typename T> T fused({arguments}) {{ {floats} return static_cast<T>({expression}); }}"
    return cast("Callable[..., Tensor]", torch.cuda.jiterator._create_jit_fn(code))
