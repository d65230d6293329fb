"""One tensor's bytes, coded in the smallest of a few ways that are all lossless, and back.

Floats: bytes by place, the exponents' apart from the mantissas' (Hershcovitch et al. 2024, ZipNN). Of a trained weight the
exponent takes few values, sign and mantissa all of them. The bits are first rotated left by two: sign and the exponent's highest
bit (zero in weights below 2) go to the end, so the first byte holds what is left of the exponent and the mantissa's first bits,
which depend on each other. Integers stay as they are; matrices of up to 8 bits are also coded by their neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import zstandard

from autocompress.methods.coding import entropy

Bytes = npt.NDArray[np.uint8]
Coder = Literal["stored", "zstd", "range", "nibbles", "neighbours"]
CODERS: tuple[Coder, ...] = ("stored", "zstd", "range", "nibbles", "neighbours")
"""``range`` codes bytes, ``nibbles`` halves of bytes, ``neighbours`` whichever of the two a matrix has."""
LEVEL = 9
"""Of zstd: what byte planes have left is hardly smaller at higher ones."""

Number = Literal["float", "integer", "nibbles", "bytes"]
"""What a tensor's bytes are: floats, integers, two integers of 4 bits a byte, or nothing that is known."""


@dataclass(frozen=True)
class Form:
    """Type and shape of a tensor, as far as coding needs them. ``size``: bytes of one number (1 of nibbles)."""

    number: Number
    size: int
    shape: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, int] | None:
        """Rows and columns ``(out, in * kh * kw)`` of small integers, ``None`` where neighbours cannot help."""
        if len(self.shape) < 2 or self.size != 1 or self.number not in ("integer", "nibbles"):
            return None
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        return (rows, columns) if min(rows, columns) >= entropy.NARROWEST else None


@dataclass(frozen=True)
class Coded:
    """A tensor as coded: its planes one after the other in ``data``. ``split``: one plane for each byte of a number."""

    split: bool
    planes: tuple[tuple[Coder, int], ...]
    data: bytes


def code(data: bytes, form: Form) -> Coded:
    """The smallest of: zstd on the bytes as they are, each byte plane by the best coder, neighbours."""
    candidates = [_coded(False, [_best(np.frombuffer(data, np.uint8))])]
    if form.size > 1 and len(data) and len(data) % form.size == 0:
        candidates.append(_coded(True, [_best(plane) for plane in _planes(data, form)]))
    symbols = _symbols(data, form) if entropy.available() else None
    if symbols is not None and form.number == "nibbles":
        candidates.append(_coded(False, [("nibbles", entropy.encode(symbols, 16))]))
    if symbols is not None and form.matrix and symbols.size == math.prod(form.matrix):
        near = entropy.encode_matrix(symbols.reshape(form.matrix), _alphabet(form))
        candidates.append(_coded(False, [("neighbours", near)]))
    return min(candidates, key=lambda found: len(found.data) + 2 * len(found.planes))


def decode(coded: Coded, form: Form, n_bytes: int) -> bytes:
    """Inverse of :func:`code`; ``n_bytes``: how many there were. Raises ``ValueError`` on bytes that are no such code."""
    parts = list(_parts(coded))
    if not coded.split:
        ((coder, data),) = parts
        if coder in ("nibbles", "neighbours"):
            return _from_symbols(coder, data, form)
        return _undo(coder, data, n_bytes)
    n = n_bytes // form.size
    rows = [np.frombuffer(_undo(coder, data, n), np.uint8) for coder, data in parts]
    return _joined(rows, form)


def coded_bytes(data: bytes, form: Form) -> int:
    """How many bytes a tensor takes when packed, less its entry in the index."""
    return len(code(data, form).data)


# ---------------------------------------------------------------- planes


def _planes(data: bytes, form: Form) -> Bytes:
    """Bytes by place, the highest first.  # (size, n)"""
    numbers = np.frombuffer(data, f"<u{form.size}")
    if form.number == "float":
        numbers = (numbers << 2) | (numbers >> (8 * form.size - 2))
    return np.ascontiguousarray(numbers.astype(f">u{form.size}").view(np.uint8).reshape(-1, form.size).T)


def _joined(rows: Sequence[Bytes], form: Form) -> bytes:
    """Inverse of :func:`_planes`."""
    numbers = np.ascontiguousarray(np.stack(rows, axis=1)).view(f">u{form.size}").reshape(-1).astype(f"<u{form.size}")
    if form.number == "float":
        numbers = (numbers >> 2) | (numbers << (8 * form.size - 2))
    return numbers.tobytes()


def _symbols(data: bytes, form: Form) -> Bytes | None:
    """Integers of up to 8 bits, one a byte; ``None`` for other tensors.  # (n,)"""
    whole = np.frombuffer(data, np.uint8)
    if form.number == "nibbles":
        pairs = np.stack([whole & 15, whole >> 4], axis=1).reshape(-1)
        return pairs[: math.prod(form.shape)] if _padded(data, form) else None
    return whole if form.number == "integer" and form.size == 1 else None


def _padded(data: bytes, form: Form) -> bool:
    """Whether nibbles fill their bytes as they should: an odd one leaves four zeros."""
    n = math.prod(form.shape)
    return len(data) == (n + 1) // 2 and (n % 2 == 0 or data[-1] >> 4 == 0)


def _from_symbols(coder: Coder, data: bytes, form: Form) -> bytes:
    if coder == "nibbles":
        symbols = entropy.decode(data, math.prod(form.shape), 16)
    elif form.matrix is None:
        raise ValueError("only matrices of small integers have neighbours")
    else:
        symbols = entropy.decode_matrix(data, form.matrix, _alphabet(form)).reshape(-1)
    if form.number != "nibbles":
        return symbols.tobytes()
    pairs = np.concatenate([symbols, np.zeros(len(symbols) % 2, np.uint8)]).reshape(-1, 2)
    return bytes((pairs[:, 0] | (pairs[:, 1] << 4)).tobytes())


def _alphabet(form: Form) -> int:
    return 16 if form.number == "nibbles" else 256


# ---------------------------------------------------------------- coders of bytes


def _best(plane: Bytes) -> tuple[Coder, bytes]:
    """The smallest code of one plane; one that does not shrink is stored."""
    raw = plane.tobytes()
    found: list[tuple[Coder, bytes]] = [("stored", raw)]
    counts = np.bincount(plane, minlength=256) / max(1, len(plane))
    entropy_bits = float(-(counts[counts > 0] * np.log2(counts[counts > 0])).sum())
    if entropy_bits < 7.99 and entropy.available():
        found.append(("range", entropy.encode(plane, 256)))
    found.append(("zstd", zstandard.ZstdCompressor(level=LEVEL, write_content_size=False).compress(raw)))
    return min(found, key=lambda pair: len(pair[1]))


def _undo(coder: Coder, data: bytes, n: int) -> bytes:
    if coder == "zstd":
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=n) if n else b""
    if coder == "range":
        return entropy.decode(data, n, 256).tobytes()
    return data


def _coded(split: bool, parts: Sequence[tuple[Coder, bytes]]) -> Coded:
    return Coded(split, tuple((coder, len(data)) for coder, data in parts), b"".join(data for _, data in parts))


def _parts(coded: Coded) -> Iterator[tuple[Coder, bytes]]:
    start = 0
    for coder, size in coded.planes:
        yield coder, coded.data[start : start + size]
        start += size
