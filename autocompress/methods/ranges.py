"""Where the 8-bit grid of a tensor ends, from what was seen of it on calibration inputs.

* ``minmax``: the smallest and the largest value;
* ``percentile``: all but one value in 10,000 at either end;
* ``mse``: the share of that range, both ends alike, whose grid has the least squared error;
* ``entropy``: the share whose 256 levels lose least of the histogram, ``KL(P || Q)``, values outside counted at the ends
  (Migacz 2017).

Exact extremes, and for the others at most :data:`SAMPLES` evenly spaced values of each batch, so that a run repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from autocompress.methods.quantization import ActivationQuant, Ranges

SAMPLES = 2**14
TAIL = 1e-4
SHARES = np.linspace(1.0, 0.3, 36).tolist()
BINS, LEVELS = 2048, 256

Values = npt.NDArray[np.float64]


class RangeObserver(nn.Module):
    """Passes values on and remembers what of them its choice of a range needs."""

    def __init__(self, by: Ranges = "minmax") -> None:
        super().__init__()
        self.by = by
        self.low, self.high = 0.0, 0.0
        self.seen: list[Values] = []

    def forward(self, x: Tensor) -> Tensor:
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        if self.by != "minmax":
            stride = -(-x.numel() // SAMPLES) | 1  # odd: not the same channels again and again
            self.seen.append(x.detach().flatten()[::stride].double().numpy().copy())
        return x

    def range(self) -> tuple[float, float]:
        """The chosen ends; zero lies between them."""
        if self.by == "minmax" or not self.seen or self.low == self.high:
            return self.low, self.high
        return CHOICES[self.by](np.concatenate(self.seen), self.low, self.high)


def percentile(values: Values, low: float, high: float) -> tuple[float, float]:
    """All but a share TAIL at either end."""
    ends = np.quantile(values, [TAIL, 1 - TAIL])
    return min(0.0, float(ends[0])), max(0.0, float(ends[1]))


def least_squares(values: Values, low: float, high: float) -> tuple[float, float]:
    """The share of the range with the least squared error of rounding and clipping."""
    x = torch.from_numpy(values).float()
    return _share(low, high, lambda a, b: float((ActivationQuant(a, b)(x) - x).double().square().sum()))


def least_divergence(values: Values, low: float, high: float) -> tuple[float, float]:
    """The share of the range whose levels say most of how values are distributed."""

    def divergence(a: float, b: float) -> float:
        inside, _ = np.histogram(values[(values >= a) & (values <= b)], BINS, (a, b))
        p = np.histogram(np.clip(values, a, b), BINS, (a, b))[0].astype(float)
        groups, full = inside.reshape(LEVELS, -1), (p > 0).reshape(LEVELS, -1)
        q = (full * (groups.sum(1) / np.maximum(1, full.sum(1)))[:, None]).reshape(-1)
        p, q = p / p.sum(), (q + 1e-9) / (q + 1e-9).sum()
        return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())

    return _share(low, high, divergence)


def _share(low: float, high: float, loss: Callable[[float, float], float]) -> tuple[float, float]:
    best = min(SHARES, key=lambda share: loss(low * share, high * share))
    return low * best, high * best


CHOICES: Mapping[str, Callable[[Values, float, float], tuple[float, float]]] = {
    "percentile": percentile,
    "mse": least_squares,
    "entropy": least_divergence,
}


def freeze_ranges(model: nn.Module) -> None:
    """Every observer becomes the quantizer of its range."""
    for name, part in list(model.named_modules()):
        if isinstance(part, RangeObserver):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, ActivationQuant(*part.range()))
