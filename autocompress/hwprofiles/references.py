"""Small residual networks that stand for real ones: the clock of all measurements, and the sum the parts must give."""

from __future__ import annotations

from collections.abc import Sequence

from autocompress.hwprofiles.builder import GraphBuilder
from autocompress.types import Format, Int8Format, Kernel

COMPARED: dict[str, Kernel] = {
    "conv 3x3, 16 channels, 32 px": Kernel("conv", (16, 32, 32), (16, 32, 32), (3, 3)),
    "conv 3x3, 64 channels, 8 px": Kernel("conv", (64, 8, 8), (64, 8, 8), (3, 3)),
    "conv 1x1, 64 channels, 16 px": Kernel("conv", (64, 16, 16), (64, 16, 16)),
    "conv 1x1, 64 channels, 16 px, int8": Kernel("conv", (64, 16, 16), (64, 16, 16), format="int8"),
    "depthwise 3x3, 96 channels, 16 px": Kernel("conv", (96, 16, 16), (96, 16, 16), (3, 3), groups=96),
    "add, 64 channels, 16 px": Kernel("add", (64, 16, 16), (64, 16, 16), n_inputs=2),
    "linear, 512 to 512": Kernel("linear", (512,), (512,)),
}
"""Kernels that tell two devices apart."""


def residual_network(
    widths: Sequence[tuple[int, int]],
    form: Format = "float",
    size: int = 32,
    batch: int = 1,
    int8: Int8Format = "u8u8",
    seed: int = 0,
    stem: int | None = None,
) -> tuple[bytes, list[Kernel]]:
    """A CIFAR-like residual network and the kernels that it runs.

    ``widths``: (stream, inner) channels of each block; where the stream's width changes, the block has stride 2 and a
    1x1 convolution as its shortcut. ``form`` is ``float`` or ``int8`` (the last linear layer stays float).
    """
    build = _Residual(GraphBuilder((batch, 3, size, size), int8, seed), form, size)
    stream = stem or widths[0][0]
    x = build.edge("x", "quantize", (3, size, size))
    x = build.conv(x, "stem", 3, stream, 3, 1, "relu")
    for i, (width, inner) in enumerate(widths):
        x = build.block(x, f"b{i}", stream, inner, width)
        stream = width
    build.head(x, stream)
    return build.graph.build(), build.kernels


class _Residual:
    """The network being written, and its kernels beside it."""

    def __init__(self, graph: GraphBuilder, form: Format, size: int) -> None:
        self.graph, self.form, self.size = graph, form, size
        self.kernels: list[Kernel] = []

    def edge(self, x: str, kind: str, shape: tuple[int, ...]) -> str:
        """A change of format at the network's border, where there is one."""
        if self.form != "int8":
            return x
        self.kernels.append(Kernel(kind, shape, shape))
        return self.graph.quantize(x, "input") if kind == "quantize" else x

    def conv(self, x: str, name: str, c_in: int, c_out: int, k: int, s: int, fused: str, quantized: bool = True) -> str:
        pads = (k // 2, k // 2, k // 2, k // 2)
        y = self.graph.conv(x, name, (c_in, c_out), (k, k), (s, s), pads, form=self.form)
        y = self.graph.activation(y, name, fused)
        out = self.size // s
        shapes = (c_in, self.size, self.size), (c_out, out, out)
        self.kernels.append(Kernel("conv", *shapes, (k, k), (s, s), format=self.form, fused=fused))
        return self.graph.quantize(y, f"{name}_out") if self.form == "int8" else y

    def block(self, x: str, name: str, c_in: int, inner: int, c_out: int) -> str:
        stride = 1 if c_in == c_out else 2
        y = self.conv(x, f"{name}a", c_in, inner, 3, stride, "relu")
        skip = x if stride == 1 else self.conv(x, f"{name}s", c_in, c_out, 1, stride, "")
        self.size //= stride
        y = self.conv(y, f"{name}b", inner, c_out, 3, 1, "")
        y = self.graph.activation(self.graph.node("Add", [y, skip], f"{name}add"), f"{name}add", "relu")
        shape = (c_out, self.size, self.size)
        self.kernels.append(Kernel("add", shape, shape, format=self.form, fused="relu", n_inputs=2))
        return self.graph.quantize(y, f"{name}add_out") if self.form == "int8" else y

    def head(self, x: str, width: int) -> None:
        y = self.graph.node("GlobalAveragePool", [x], "pool")
        y = self.graph.quantize(y, "pool_out") if self.form == "int8" else y
        shape = (width, self.size, self.size)
        self.kernels.append(Kernel("global_pool", shape, (width, 1, 1), format=self.form))
        self.edge(y, "dequantize", (width,))
        y = self.graph.linear(self.graph.node("Flatten", [y], "flatten"), "head", (width, 10), 1)
        self.kernels.append(Kernel("linear", (width,), (10,)))
        self.graph.output(y)
