"""Removed channels made good without data: a linear combination of those that stay (UDFC; Bai et al. 2023).

``W'_{:,j} = W_{:,j} + sum_m s_mj W_{:,m}`` in the layers that read removed channels ``m``, with ``s`` by ridge regression in
closed form, ``S = C_{:,K} (C_KK + ridge I)^-1`` over the kept channels ``K``. ``C`` are the channels' second moments as weights
alone tell them: for white inputs pre-activations are Gaussian, their correlations the cosines of the folded filters, their
variances and means the batch norm's (the filter's and the bias where there is none). Where one layer makes the channels and a
ReLU stands behind it the moments are taken behind the ReLU, by quadrature; the published regression on filters is that of the
linear case. Channels that several layers make have those layers' filters side by side, without a mean.

The paper's other half, for the error of quantized channels, is ``datafree_quant.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from autocompress.graph import Graph, Group, Layer
from autocompress.methods.pruning import ChannelPruning
from autocompress.op_kinds import relu_ceiling

RIDGE = 1e-2
"""Of the mean second moment."""
NODES = 12
"""Of the quadrature, each way."""
SMALL = 1e-12


@dataclass(frozen=True)
class UDFC(ChannelPruning):
    """Keep the most important channels, and make good the others without data: nothing is measured on calibration inputs."""

    def describe(self) -> str:
        return f"keep {self.keep}/{self.width} without data"


Folded = Callable[[str], tuple[Tensor, Tensor]]


def combination(moments: Tensor, kept: Sequence[int]) -> Tensor:
    """Every channel from the kept ones, which stay as they are.  # (n, n) -> (n, len(kept))"""
    index = torch.tensor(list(kept), dtype=torch.long)
    eye = torch.eye(len(index), dtype=moments.dtype)
    chosen = moments[index][:, index]
    ridge = RIDGE * float(chosen.diagonal().mean()) + SMALL
    found: Tensor = torch.linalg.solve(chosen + ridge * eye, moments[index]).T
    found[index] = eye
    return found


def moments_of(graph: Graph, group: Group, folded: Folded) -> Tensor | None:
    """Second moments of a group's channels; ``None`` where a channel stands for many (attention heads).  # (n, n)"""
    layers = [graph.layers[name] for name in group.producers]
    if not layers or any(int(np.isin(layer.outputs, group.classes).sum()) > len(group.classes) for layer in layers):
        return None
    filters = [_filters(layer, group, folded) for layer in layers]
    if len(layers) > 1:
        side_by_side = torch.cat([rows / rows.norm().clamp_min(SMALL) for rows, _ in filters], dim=1)
        return side_by_side @ side_by_side.T
    (layer,), ((rows, mean),) = layers, filters
    deviation = rows.norm(dim=1)
    cosines = (rows @ rows.T / torch.outer(deviation, deviation).clamp_min(SMALL)).clamp(-1, 1)
    norm = graph.module.get_submodule(layer.norm) if layer.norm else None
    if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and norm.weight is not None:
        places = [int(np.flatnonzero(layer.outputs == c)[0]) for c in group.classes]
        deviation, mean = norm.weight.detach().abs().double()[places], norm.bias.detach().double()[places]
    if layer.activation is None:
        return cosines * torch.outer(deviation, deviation) + torch.outer(mean, mean)
    node = next(n for n in graph.module.graph.nodes if n.name == layer.activation)
    return rectified(mean, deviation, cosines, relu_ceiling(graph.module, node))


def _filters(layer: Layer, group: Group, folded: Folded) -> tuple[Tensor, Tensor]:
    """Folded filters and biases of a group's channels, zeros where the layer makes none.  # (n, d), (n,)"""
    weight, bias = (t.double() for t in folded(layer.name))
    places = [np.flatnonzero(layer.outputs == c) for c in group.classes]
    index = torch.tensor([int(p[0]) if len(p) else -1 for p in places])
    here = (index >= 0).double()
    return weight.flatten(1)[index] * here[:, None], bias[index] * here


def rectified(mean: Tensor, deviation: Tensor, correlation: Tensor, ceiling: float) -> Tensor:
    """``E[r(z_i) r(z_j)]`` of Gaussian ``z`` with ``r = clip(z, 0, ceiling)``, by Gauss-Hermite quadrature.  # (n, n)"""
    points, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(NODES))
    weights = weights / weights.sum()
    rest = (1 - correlation.square()).clamp_min(0).sqrt()
    found = torch.empty_like(correlation)
    for i in range(len(mean)):
        own = (mean[i] + deviation[i] * points).clamp(0, ceiling)  # (q,)
        other = correlation[i][:, None, None] * points[:, None] + rest[i][:, None, None] * points  # (n, q, q)
        other = (mean[:, None, None] + deviation[:, None, None] * other).clamp(0, ceiling)
        found[i] = (other @ weights) @ (own * weights)
    return (found + found.T) / 2


def compensated(
    graph: Graph, layer: Layer, weight: Tensor, columns: npt.NDArray[np.intp], moments: Callable[[Group], Tensor | None]
) -> Tensor:
    """A layer's weight on its kept input channels, with what it read from the others.  # (out, in, ...) -> (out, kept, ...)"""
    absorbed = torch.zeros(len(layer.inputs), len(columns), dtype=torch.float64)
    absorbed[torch.from_numpy(columns), torch.arange(len(columns))] = 1.0
    place = {int(c): i for i, c in enumerate(columns)}
    for group in graph.groups:
        where = [np.flatnonzero(layer.inputs == c) for c in group.classes]
        kept = [i for i, at in enumerate(where) if len(at) and int(at[0]) in place]
        if not any(len(at) for at in where) or not kept or len(kept) == len(where):
            continue
        second = moments(group)
        if second is None:
            continue
        shares = combination(second, kept)
        for m in set(range(len(where))) - set(kept):
            for share, j in zip(shares[m].tolist(), kept, strict=True):
                if len(where[m]) == len(where[j]):
                    for copy, target in zip(where[m], where[j], strict=True):  # flattened maps: position by position
                        absorbed[int(copy), place[int(target)]] = share
    return torch.einsum("oi...,ij->oj...", weight.double(), absorbed).to(weight.dtype)
