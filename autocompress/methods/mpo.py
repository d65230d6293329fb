"""Matrix product operators: a linear layer as a train of small cores (Tomut et al. 2024, CompactifAI; Novikov et al. 2015).

``W[(o_1 .. o_n), (i_1 .. i_n)] = sum A_1[o_1, i_1, r_1] A_2[r_1, o_2, i_2, r_2] ... A_n[r_(n-1), o_n, i_n]`` with bonds ``r`` up
to ``chi``, by truncated SVDs from the left (Oseledets 2011). With a Gram matrix the first core, the last to be multiplied, is
then fitted to the outputs. A full bond dimension is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from autocompress.errors import UnsupportedModel, UsageError
from autocompress.methods.base import LayerContext, handles
from autocompress.methods.factored import Factored, damped
from autocompress.types import Kernel, MethodConfig


@dataclass(frozen=True)
class TensorTrain(Factored):
    """``cores`` cores with about ``ratio`` times the weights, all bonds up to the same dimension."""

    cores: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cores < 2:
            raise UsageError(f"A matrix product has 2 cores or more, got {self.cores}.")

    def describe(self) -> str:
        return f"{self.cores} cores {self.ratio:.0%}"

    def bonds(self, n_out: int, n_in: int) -> tuple[int, ...]:
        """The largest bonds within the ratio, 1 at both ends."""
        outs, ins = near_equal(n_out, self.cores), near_equal(n_in, self.cores)
        most = full_bonds(outs, ins)
        best = tuple(min(1, bond) for bond in most)
        for chi in range(1, max(most) + 1):
            bonds = tuple(min(chi, bond) for bond in most)
            if train_weights(outs, ins, bonds) > self.ratio * n_out * n_in:
                break
            best = bonds
        return best


def near_equal(n: int, parts: int) -> tuple[int, ...]:
    """``n`` as a product of ``parts`` factors as near to each other as its divisors allow; a prime is itself times ones."""
    found: list[int] = []
    for left in range(parts, 0, -1):
        goal = n ** (1 / left)
        divisor = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(math.log(d / goal)))
        found.append(divisor)
        n //= divisor
    return tuple(found)


def full_bonds(outs: Sequence[int], ins: Sequence[int]) -> tuple[int, ...]:
    """Bonds at which nothing is truncated, 1 at both ends.  # len(outs) + 1"""
    sizes = [o * i for o, i in zip(outs, ins, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(len(sizes) + 1))


def train_weights(outs: Sequence[int], ins: Sequence[int], bonds: Sequence[int]) -> int:
    return sum(a * o * i * b for o, i, a, b in zip(outs, ins, bonds[:-1], bonds[1:], strict=True))


class MatrixProduct(nn.Module):
    """``y = W x + bias`` through the cores, the last core first; each is one linear layer between reshapes.

    Child ``0`` is multiplied first. Core ``k`` maps ``(i_k, r_k)`` to ``(r_(k-1), o_k)``.
    """

    bias: Tensor | None

    def __init__(self, cores: Sequence[Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.outs, self.ins = tuple(c.shape[1] for c in cores), tuple(c.shape[2] for c in cores)
        self.bonds = (1, *(c.shape[3] for c in cores))
        for place, core in enumerate(reversed(cores)):  # (r_(k-1), o, i, r_k)
            a, o, i, b = core.shape
            linear = nn.Linear(i * b, a * o, bias=False)
            linear.weight = nn.Parameter(core.reshape(a * o, i * b).contiguous(), requires_grad=False)
            self.add_module(str(place), linear)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        rest = [int(size) for size in x.shape[1:-1]]  # only the batch may differ from run to run
        made = self._product(x, len(self.outs), math.prod(rest)).reshape(-1, *rest, math.prod(self.outs))
        return made if self.bias is None else made + self.bias

    def _product(self, x: Tensor, cores: int, rows: int = 1) -> Tensor:
        """``x`` through the ``cores`` last cores.  # (n, rows * in) -> (n, rows * i_1 .. * r, .. o_n), of all (n, rows, out)"""
        n = len(self.outs)
        before, done, bond = rows * math.prod(self.ins), 1, 1  # inputs left, outputs made, the open bond
        state = x
        for place in range(cores):
            k = n - 1 - place
            o, i, a = self.outs[k], self.ins[k], self.bonds[k]
            before //= i
            # (before, i, bond, done) -> (before, done, i * bond)
            state = state.reshape(-1, before, i * bond, done).transpose(-1, -2)
            state = getattr(self, str(place))(state)  # (before, done, a * o)
            # -> (before, a, o * done)
            state = state.transpose(-1, -2).reshape(-1, before * a, o * done)
            done, bond = o * done, a
        return state

    def dense_weight(self) -> Tensor:
        """The matrix that the cores make.  # (out, in)"""
        first = cast(nn.Linear, getattr(self, "0")).weight
        return self._product(torch.eye(math.prod(self.ins), dtype=first.dtype), len(self.outs))[:, 0].T

    def inputs_of_first(self) -> Tensor:
        """What the first core, the last to be multiplied, reads of each input.  # (done, i_1 * r_1, in)"""
        eye = torch.eye(math.prod(self.ins), dtype=cast(nn.Linear, getattr(self, "0")).weight.dtype)
        return self._product(eye, len(self.outs) - 1).permute(2, 1, 0)


@handles(TensorTrain, "mpo")
class _TensorTrainHandler:
    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        assert isinstance(config, TensorTrain)
        n_out, n_in = kernel.out_shape[0], kernel.in_shape[0]
        outs, ins = near_equal(n_out, config.cores), near_equal(n_in, config.cores)
        bonds, rows = config.bonds(n_out, n_in), math.prod(kernel.out_shape[1:])
        found: list[Kernel] = []
        before, done = n_in, 1
        for o, i, a, b in reversed(list(zip(outs, ins, bonds[:-1], bonds[1:], strict=True))):
            before //= i
            shape = (i * b, before * done * rows), (a * o, before * done * rows)
            found += [Kernel("transpose", shape[0], shape[0])] if found else []
            found.append(Kernel("linear", *shape))
            done *= o
        return tuple(found)

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, TensorTrain)
        if not isinstance(layer, nn.Linear):
            raise UnsupportedModel(f"Only linear layers have a matrix product form, got {layer}.")
        weight = layer.weight.detach()
        bonds = config.bonds(*weight.shape)
        cores = tensor_train(
            weight.double(), near_equal(len(weight), config.cores), near_equal(weight.shape[1], config.cores), bonds
        )
        made = MatrixProduct(cores, layer.bias)
        if context.gram is not None:
            last = cast(nn.Linear, getattr(made, str(config.cores - 1)))
            last.weight = nn.Parameter(_refit_first(made, weight.double(), context.gram), requires_grad=False)
        return made.to(weight.dtype)


def tensor_train(weight: Tensor, outs: Sequence[int], ins: Sequence[int], bonds: Sequence[int]) -> list[Tensor]:
    """Cores ``(r_(k-1), o_k, i_k, r_k)`` of a matrix ``(out, in)``, truncated at ``bonds``."""
    n = len(outs)
    axes = [axis for k in range(n) for axis in (k, n + k)]
    rest = weight.reshape(*outs, *ins).permute(axes).reshape(1, -1)  # (o_1, i_1, o_2, i_2, ..)
    cores: list[Tensor] = []
    for k in range(n - 1):
        u, s, v = torch.linalg.svd(rest.reshape(bonds[k] * outs[k] * ins[k], -1), full_matrices=False)
        scale = s[: bonds[k + 1]].sqrt()
        cores.append((u[:, : bonds[k + 1]] * scale).reshape(bonds[k], outs[k], ins[k], bonds[k + 1]))
        rest = scale[:, None] * v[: bonds[k + 1]]
    cores.append(rest.reshape(bonds[n - 1], outs[n - 1], ins[n - 1], 1))
    return cores


def _refit_first(made: MatrixProduct, weight: Tensor, gram: Tensor) -> Tensor:
    """The first core by least squares behind the others: ``y[o_1, g] = A_1 (B_g x)`` for all ``g``.  # (o_1, i_1 * r_1)"""
    n = weight.shape[1]
    h = damped(gram[:n, :n].double())
    reads = made.inputs_of_first()  # (rest, i_1 * r_1, in)
    wanted = weight.reshape(made.outs[0], len(reads), n)  # (o_1, rest, in)
    seen = reads @ h  # (rest, i_1 * r_1, in)
    square = torch.einsum("gan,gbn->ab", seen, reads)
    cross = torch.einsum("ogn,gan->oa", wanted, seen)
    solved: Tensor = torch.linalg.solve(damped(square), cross.T)
    return solved.T.contiguous()
