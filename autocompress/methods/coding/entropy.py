"""Adaptive range coding of small integers: no table is stored, the decoder counts what the encoder counted.

Values are coded block by block, each under the counts of all blocks before it, so a block is one vectorized call. Two orders:

* *flat*: blocks that double, one context;
* *neighbours*: the anti-diagonals of a matrix, where the neighbours above and to the left of every value are already known. The
  context is which of the two differ from the commonest value, of quantized weights zero (Wiedemann et al. 2020, DeepCABAC,
  section III-B: the flags of neighbouring weights; values there are binarized, here one model has the whole alphabet).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from autocompress.errors import UsageError

try:
    from constriction import stream
except ImportError:  # there are no wheels for Linux on ARM: zstd alone codes there
    stream = None

Symbols = npt.NDArray[np.uint8]
Places = npt.NDArray[np.intp]

FIRST_BLOCK, LARGEST_BLOCK = 16, 2**16
PRIOR = 1 / 32
"""What every symbol counts before any is seen: of 256 few occur."""
NARROWEST = 8
"""A matrix with fewer rows or columns has diagonals of a few values, a call for each."""


def encode(values: Symbols, alphabet: int) -> bytes:
    """Code ``values (n,)``, all below ``alphabet``, in their order."""
    return _encode(_Flat(np.ascontiguousarray(values.reshape(-1))), alphabet)


def decode(data: bytes, n: int, alphabet: int) -> Symbols:
    """Inverse of :func:`encode`.  # (n,)"""
    return _decode(_Flat(np.zeros(n, np.uint8)), data, alphabet)


def encode_matrix(values: Symbols, alphabet: int) -> bytes:
    """Code a matrix ``(rows, columns)`` by its neighbours; at least :data:`NARROWEST` both ways."""
    common = int(np.bincount(values.reshape(-1)).argmax())
    return bytes([common]) + _encode(_Diagonals(values, common), alphabet)


def decode_matrix(data: bytes, shape: tuple[int, int], alphabet: int) -> Symbols:
    """Inverse of :func:`encode_matrix`.  # shape"""
    found = _decode(_Diagonals(np.zeros(shape, np.uint8), data[0]), data[1:], alphabet)
    return found.reshape(shape)


class _Flat:
    """Blocks of one context."""

    contexts = 1

    def __init__(self, values: Symbols) -> None:
        self.values = values

    def __iter__(self) -> Iterator[tuple[int, Places]]:
        start, size = 0, FIRST_BLOCK
        while start < len(self.values):
            yield 0, np.arange(start, min(start + size, len(self.values)))
            start, size = start + size, min(2 * size, LARGEST_BLOCK)


class _Diagonals:
    """Anti-diagonals of a matrix by context; what a context is made of has been coded when it is asked for."""

    contexts = 4

    def __init__(self, values: Symbols, common: int) -> None:
        self.rows, self.columns = values.shape
        self.values, self.common = values.reshape(-1), common

    def __iter__(self) -> Iterator[tuple[int, Places]]:
        differs = np.zeros((self.rows + 1, self.columns + 1), np.int8)  # one row above, one column to the left
        for d in range(self.rows + self.columns - 1):
            i = np.arange(max(0, d - self.columns + 1), min(d, self.rows - 1) + 1)
            j = d - i
            context = differs[i, j + 1] + 2 * differs[i + 1, j]
            places = i * self.columns + j
            for one in range(self.contexts):
                mine = places[context == one]
                if len(mine):
                    yield one, mine
            differs[i + 1, j + 1] = self.values[places] != self.common


def available() -> bool:
    """Whether this machine has the range coder."""
    return stream is not None


def _coder() -> Any:
    if stream is None:
        raise UsageError(
            "This file is packed with a range coder, which needs one more package: pip install constriction."
        )
    return stream.queue


def _code(order: _Flat | _Diagonals, alphabet: int, code: Callable[[Any, Places], npt.NDArray[np.int32]]) -> None:
    """The walk that both sides share; ``code`` gives the values at some places, under a model of them."""
    counts = np.full((order.contexts, alphabet), PRIOR)
    for context, places in order:
        found = code(stream.model.Categorical(counts[context], perfect=False), places)
        counts[context] += np.bincount(found, minlength=alphabet)


def _encode(order: _Flat | _Diagonals, alphabet: int) -> bytes:
    encoder = _coder().RangeEncoder()

    def code(model: Any, places: Places) -> npt.NDArray[np.int32]:
        known = order.values[places].astype(np.int32)
        encoder.encode(known, model)
        return known

    _code(order, alphabet, code)
    return bytes(encoder.get_compressed().astype("<u4").tobytes())


def _decode(order: _Flat | _Diagonals, data: bytes, alphabet: int) -> Symbols:
    decoder = _coder().RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def code(model: Any, places: Places) -> npt.NDArray[np.int32]:
        found: npt.NDArray[np.int32] = decoder.decode(model, len(places))
        order.values[places] = found
        return found

    _code(order, alphabet, code)
    return order.values
