"""Where plans are judged: a device, and the precision of its arithmetic.

On a GPU, plans are launched one behind the other without waiting for their answers, in batches of whole slices. ``tf32`` rounds
what is multiplied to 10 bits behind the point (NVIDIA, A100 whitepaper, 2020), ``bfloat16`` weights and activations to 7
(Kalamkar et al. 2019). What that leaves of a fitness is measured, not believed: see :mod:`~autocompress.precision`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from autocompress.errors import UsageError

Precision = Literal["float32", "tf32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEVICE_SHARE = 4
"""Kept values may take this part of a GPU's free memory."""
BATCH_SHARE, LIVE = 8, 4
"""A batch may take this part of a GPU's memory, if so many of the largest values lie there at the same time."""

Placed = TypeVar("Placed", nn.Module, Tensor)


@dataclass(frozen=True)
class Where:
    """``device``: ``cpu``, ``cuda`` or ``cuda:N``."""

    device: str = "cpu"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            kind = self.device
        if kind not in ("cpu", "cuda"):
            raise UsageError(f"Plans are judged on 'cpu', 'cuda' or 'cuda:N', got {self.device!r}.")
        if self.precision not in PRECISIONS:
            raise UsageError(f"A precision is one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                f"torch {torch.__version__} sees no GPU, so nothing can run on {self.device!r}; "
                "install a build of torch with CUDA, or use --device cpu."
            )
        index = torch.device(self.device).index
        if kind == "cuda" and index is not None and index >= torch.cuda.device_count():
            raise UsageError(f"There is no {self.device!r} among {torch.cuda.device_count()} GPUs; name another one.")
        if kind == "cpu" and self.precision == "tf32":
            raise UsageError("'tf32' is a precision of GPUs; use float32 or bfloat16 on the CPU.")

    @property
    def here(self) -> bool:
        """Whether models need not be moved: the processor, in float32."""
        return not self.gpu and self.precision == "float32"

    @property
    def gpu(self) -> bool:
        """Whether answers come later than they are asked for."""
        return self.device != "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """What weights and activations are kept in."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def exact(self) -> Where:
        """The same device in float32."""
        return Where(self.device)

    @property
    def key(self) -> tuple[str, ...]:
        """What the ledger has to know; a GPU's sums differ from the processor's in the last bits."""
        return () if self.here else (torch.cuda.get_device_name(self.device) if self.gpu else "cpu", self.precision)

    def put(self, what: Placed) -> Placed:
        """A tensor there, or a module moved there; numbers that are no floats keep their type."""
        if self.here:
            return what
        if isinstance(what, Tensor):
            return what.to(self.device, self.dtype if what.is_floating_point() else None)
        return what.to(self.device, self.dtype)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, a GPU repeats itself to the bit, and multiplies as precisely as was asked for."""
        if not self.gpu:
            yield
            return
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS' own words for sums in a fixed order
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
        cudnn.deterministic, cudnn.benchmark = True, False
        cudnn.allow_tf32 = matmul.allow_tf32 = self.precision == "tf32"
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before

    def room(self, share: int = 1) -> int | None:
        """Bytes of a GPU's memory that kept values may take in one of ``share`` processes; ``None`` on the processor."""
        return torch.cuda.mem_get_info(self.device)[0] // DEVICE_SHARE // share if self.gpu else None

    def batch(self, least: int, most: int, largest: int) -> int:
        """Examples to run at once on a GPU, a multiple of ``least``: small batches leave it idle.

        ``most``: how many there are; ``largest``: elements of a model's largest value for one example.
        """
        memory = torch.cuda.get_device_properties(self.device).total_memory // BATCH_SHARE
        fit = memory // (4 * LIVE * max(1, largest)) // least
        return least * max(1, min(fit, -(-most // least)))
