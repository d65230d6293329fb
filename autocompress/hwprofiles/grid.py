"""The kernels of a profile for any network: what convolutional networks and transformers run, whole and compressed."""

from __future__ import annotations

from collections.abc import Iterator

from autocompress.types import APART, Format, Kernel

WIDTHS = (8, 16, 32, 48, 64, 128, 256)
ODD = (6, 18, 30, 62, 126)
"""Widths that no layout likes: pruned ones."""
SIZES = (112, 56, 32, 28, 16, 14, 8, 7, 4)
TOKENS = (64, 128, 256)
STREAMS = (64, 128, 256, 512)
LARGEST = 400e6
"""MACs of a convolution, at most."""


def default_grid() -> list[Kernel]:
    """Convolutions, linear layers and what stands between them, at widths 6 to 256 and image sizes 4 to 112; and the parts of a
    transformer of 64 to 512 channels on 64 to 256 tokens."""
    kernels: list[Kernel] = []
    both: tuple[Format, ...] = ("float", "int8")
    stored: tuple[Format, ...] = ("w8", "w4")
    for form in both:
        for size in SIZES:
            kernels += [*_images(size, form), *_pruned(size, form)]
        kernels += [Kernel("linear", (a,), (b,), format=form) for a in WIDTHS for b in (10, *WIDTHS, 1000)]
    for size in SIZES:
        kernels += [*_edges(size), *_factors(size)]
        for form in stored:
            kernels += _stored(size, form)
    for form in stored:
        kernels += [Kernel("linear", (a,), (b,), format=form) for a in (64, 256, 512) for b in (10, 64, 256, 1000)]
    for tokens in TOKENS:
        kernels += _sequences(tokens)
    return kernels


def _images(size: int, form: Format) -> Iterator[Kernel]:
    half = -(-size // 2)
    for c in WIDTHS:
        full, small = (c, size, size), (c, half, half)
        yield from _depthwise(full, small, form)
        yield Kernel("add", full, full, format=form, n_inputs=2)
        yield Kernel("pool", full, small, (2, 2), (2, 2), format=form)
        yield Kernel("global_pool", full, (c, 1, 1), format=form)
        yield Kernel("conv", (3, size, size), full, (3, 3), format=form)
        yield Kernel("conv", (3, size, size), small, (3, 3), (2, 2), format=form)
        for d in WIDTHS:
            if c * d * size * size * 9 <= LARGEST:
                for k in (1, 3):
                    yield Kernel("conv", full, (d, size, size), (k, k), format=form)
                    yield Kernel("conv", full, (d, half, half), (k, k), (2, 2), format=form)


def _depthwise(full: tuple[int, int, int], small: tuple[int, int, int], form: Format) -> Iterator[Kernel]:
    for out in (full, small):
        stride = (1, 1) if out == full else (2, 2)
        yield Kernel("conv", full, out, (3, 3), stride, groups=full[0], format=form)


def _pruned(size: int, form: Format) -> Iterator[Kernel]:
    """Channels that were left over."""
    half = -(-size // 2)
    for c in ODD:
        full, small = (c, size, size), (c, half, half)
        yield from _depthwise(full, small, form)
        yield Kernel("add", full, full, format=form, n_inputs=2)
        for d in (8, 30, 128):
            for k in (1, 3):
                if c * d * size * size * k * k <= LARGEST:
                    yield Kernel("conv", full, (d, size, size), (k, k), format=form)
                    if k == 3:
                        yield Kernel("conv", full, (d, half, half), (k, k), (2, 2), format=form)
    for d in (8, 32, 128):
        yield Kernel("conv", (4, size, size), (d, size, size), format=form)


def _edges(size: int) -> Iterator[Kernel]:
    """What changes the format, or the shape of a shortcut."""
    half = -(-size // 2)
    for c in WIDTHS:
        full = (c, size, size)
        yield Kernel("quantize", full, full)
        yield Kernel("dequantize", full, full)
        for alone in (APART, f"{APART} relu"):
            yield Kernel("add", full, full, fused=alone, n_inputs=2)
        yield Kernel("slice", full, (c, half, half))
        yield Kernel("pad", full, (2 * c, size, size))


def _factors(size: int) -> Iterator[Kernel]:
    """A convolution split in two: a column, and a row of windows."""
    half = -(-size // 2)
    for c in WIDTHS:
        for d in (8, 32, 128):
            if c * d * size * size * 3 <= LARGEST:
                yield Kernel("conv", (c, size, size), (d, size, size), (3, 1))
                yield Kernel("conv", (c, size, size), (d, size, size), (1, 3))
                yield Kernel("conv", (c, size, size), (d, half, size), (3, 1), (2, 1))
                yield Kernel("conv", (c, size, half), (d, half, half), (1, 3), (1, 2))


def _stored(size: int, form: Format) -> Iterator[Kernel]:
    """Weights alone in 8 or 4 bits."""
    half = -(-size // 2)
    yield Kernel("conv", (3, size, size), (32, half, half), (3, 3), (2, 2), format=form)
    for c in (16, 64, 128):
        full, small = (c, size, size), (c, half, half)
        yield from _depthwise(full, small, form)
        for d in (16, 64, 128):
            for k in (1, 3):
                if c * d * size * size * k * k <= LARGEST / 2:
                    yield Kernel("conv", full, (d, size, size), (k, k), format=form)
                    yield Kernel("conv", full, (d, half, half), (k, k), (2, 2), format=form)


def _sequences(tokens: int) -> Iterator[Kernel]:
    """A transformer's parts; ``(channels, tokens)`` is how sequences are written, heads with their size at the end."""
    forms: tuple[Format, ...] = ("float", "w8", "w4")
    for c in STREAMS:
        full = (c, tokens)
        yield Kernel("norm", full, full)
        yield Kernel("add", full, full, n_inputs=2)
        yield Kernel("mul", full, full, n_inputs=2)
        for fused in ("silu", "gelu", "relu"):
            yield Kernel("activation", full, full, fused=fused)
        yield Kernel("embedding", (4096, tokens), full)
        for d in (*STREAMS, 1024):
            for form in forms:
                yield Kernel("linear", full, (d, tokens), format=form)
    for heads in (2, 4, 8):
        for size in (32, 64):
            yield Kernel("attention", (heads, tokens, size), (heads, tokens, size))
        whole, half = (heads, 32 * tokens), (heads, 16 * tokens)
        yield Kernel("transpose", whole, whole)
        yield Kernel("repeat", (heads // 2, 32 * tokens), whole)
        yield Kernel("slice", (heads, 1), half)
        yield Kernel("concat", half, whole, n_inputs=2)
        yield Kernel("add", whole, whole, n_inputs=2)
        yield Kernel("mul", whole, whole, n_inputs=2)
