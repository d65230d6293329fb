"""The packed file: an index, then each tensor's code; any one of them can be read without the others.

::

    8 bytes   magic, its last byte is the version
    8 bytes   length of the index, little endian
    32 bytes  SHA-256 of the index as it lies there
    index     zstd: 4 bytes length of a JSON document, the document, the bytes between the tensors
    codes     one after the other

The document holds the original file's kind, size and SHA-256 and, for each tensor, name, type, shape, place in the original,
planes with their coders, and 16 bytes of BLAKE2b over its bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from autocompress.errors import AutoCompressError, UnknownName, UsageError, VerificationError
from autocompress.files import write_bytes
from autocompress.methods.coding.planes import CODERS, Coded, Form, code, decode
from autocompress.methods.coding.spans import Span, spans_of

MAGIC, VERSION = b"ACPACK\n", 1
SUFFIX = ".acpack"
INDEX_LEVEL = 19
LARGEST_INDEX = 2**31


@dataclass(frozen=True)
class Packing:
    """What packing one file came to, in bytes."""

    path: str
    original_bytes: int
    packed_bytes: int
    tensors: int
    sha256: str


def pack(data: bytes, suffix: str) -> bytes:
    """A model file's bytes as a packed file's. ``suffix``: ``.onnx`` or ``.safetensors``."""
    entries, codes, between, at = [], [], [], 0
    for span in spans_of(data, suffix):
        raw = data[span.start : span.stop]
        coded = code(raw, span.form)
        entries.append(_entry(span, coded, raw))
        codes.append(coded.data)
        between.append(data[at : span.start])
        at = span.stop
    between.append(data[at:])
    document = {"kind": suffix, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "tensors": entries}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    index = len(text).to_bytes(4, "little") + text + b"".join(between)
    index = zstandard.ZstdCompressor(level=INDEX_LEVEL).compress(index)
    head = MAGIC + bytes([VERSION]) + len(index).to_bytes(8, "little") + hashlib.sha256(index).digest()
    return b"".join([head, index, *codes])


def pack_file(source: Path, target: Path) -> Packing:
    """Write ``source`` packed to ``target``, once what is written has been read back equal; ``target`` must not exist."""
    _need_new(target)
    data = _read(source)
    packed = pack(data, source.suffix)
    opened = Packed(io.BytesIO(packed), str(source))
    if opened.original() != data:
        raise VerificationError(f"{source} does not come back from its packed form; nothing was written.")
    write_bytes(target, packed)
    return Packing(str(target), len(data), len(packed), len(opened.names), opened.sha256)


def unpack(packed: bytes, name: str = "the packed file") -> bytes:
    """The original bytes; raises :class:`UsageError` where they are not a whole packed file's."""
    return Packed(io.BytesIO(packed), name).original()


def unpack_file(source: Path, target: Path) -> Packing:
    """Write the original of a packed file to ``target``, every hash checked; ``target`` must not exist."""
    _need_new(target)
    with Packed(source) as opened:
        data = opened.original()
        packing = Packing(str(target), len(data), source.stat().st_size, len(opened.names), opened.sha256)
    write_bytes(target, data)
    return packing


class Packed:
    """A packed file opened for reading, tensor by tensor; a context manager where it was opened by its path."""

    def __init__(self, source: Path | BinaryIO, name: str = "") -> None:
        self._name = name or str(source)
        try:
            self._file = open(source, "rb") if isinstance(source, Path) else source  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"{self._name} cannot be read: {error.strerror or error}.") from error
        try:
            self._read_index()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Packed:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def names(self) -> list[str]:
        return [entry["name"] for entry in self._entries]

    @property
    def sha256(self) -> str:
        """Of the original file."""
        return str(self._document["sha256"])

    @property
    def kind(self) -> str:
        """How the original file's name ends."""
        return str(self._document["kind"])

    def form(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type, as the original's format calls it, and shape of one tensor."""
        entry = self._find(name)
        return entry["dtype"], tuple(entry["form"][2])

    def tensor(self, name: str) -> bytes:
        """One tensor's bytes as they lie in the original; no other tensor is read."""
        return self._tensor(self._find(name))

    def original(self) -> bytes:
        """The whole original file, checked against its hash."""
        parts, at, used = [], 0, 0
        for entry in self._entries:
            gap = entry["start"] - at
            parts += [self._between[used : used + gap], self._tensor(entry)]
            used, at = used + gap, entry["stop"]
        data = b"".join([*parts, self._between[used:]])
        if len(data) != self._document["bytes"] or hashlib.sha256(data).hexdigest() != self.sha256:
            raise self._damaged("it does not give the file that was packed")
        return data

    # ------------------------------------------------------------ reading

    def _read_index(self) -> None:
        head = self._file.read(len(MAGIC) + 1 + 8 + 32)
        if not head.startswith(MAGIC):
            raise UsageError(
                f"{self._name} is no packed model: only what 'autocompress pack' has written can be unpacked."
            )
        if head[len(MAGIC) : len(MAGIC) + 1] != bytes([VERSION]):
            raise UsageError(
                f"{self._name} is packed in version {head[len(MAGIC)] if len(head) > len(MAGIC) else '?'} of the format, "
                f"this release reads version {VERSION}; install the release that packed it."
            )
        length = int.from_bytes(head[-40:-32], "little")
        index = self._file.read(length) if length < LARGEST_INDEX else b""
        if hashlib.sha256(index).digest() != head[-32:]:
            raise self._damaged("its index is not what was written")
        text = zstandard.ZstdDecompressor().decompress(index)
        size = int.from_bytes(text[:4], "little")
        self._document: dict[str, Any] = json.loads(text[4 : 4 + size])
        self._entries: list[dict[str, Any]] = self._document["tensors"]
        self._between = text[4 + size :]
        at = len(head) + length
        for entry in self._entries:
            entry["at"] = at
            at += sum(entry["planes"][1::2])

    def _find(self, name: str) -> dict[str, Any]:
        for entry in self._entries:
            if entry["name"] == name:
                return entry
        raise UnknownName("tensor", name, self.names)

    def _tensor(self, entry: dict[str, Any]) -> bytes:
        self._file.seek(entry["at"])
        numbers = entry["planes"]
        planes = tuple((CODERS[coder], size) for coder, size in zip(numbers[::2], numbers[1::2], strict=True))
        data = self._file.read(sum(size for _, size in planes))
        number, size, shape = entry["form"]
        try:
            raw = decode(
                Coded(entry["split"], planes, data), Form(number, size, tuple(shape)), entry["stop"] - entry["start"]
            )
        except AutoCompressError:
            raise
        # damaged codes: each coder has an error of its own
        except Exception as error:
            raise self._damaged(f"tensor {entry['name']!r} cannot be decoded") from error
        if _digest(raw) != entry["hash"]:
            raise self._damaged(f"tensor {entry['name']!r} is not what was packed")
        return raw

    def _damaged(self, reason: str) -> UsageError:
        return UsageError(f"{self._name} is damaged ({reason}); get the file again or pack the original again.")


def _entry(span: Span, coded: Coded, raw: bytes) -> dict[str, Any]:
    return {
        "name": span.name,
        "dtype": span.dtype,
        "form": [span.form.number, span.form.size, span.form.shape],
        "start": span.start,
        "stop": span.stop,
        "split": coded.split,
        "planes": [number for coder, size in coded.planes for number in (CODERS.index(coder), size)],
        "hash": _digest(raw),
    }


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error


def _need_new(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} exists already and is left as it is; name another file with -o.")
