"""How unequal a layer's weights are: the PQ index (Diao et al. 2023, "Pruning deep neural networks from a sparsity perspective").

0 where all magnitudes are equal, near 1 where few weights hold everything. Where those that go hold ``eta`` times the
``sum |w|^p`` of those that stay, at least ``d (1 + eta)^(-q / (q - p)) (1 - I)^(p q / (q - p))`` of ``d`` stay (SAP's bound);
with the defaults that is a share of ``(1 - I) / (1 + eta)^2``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from autocompress.errors import UsageError


def pq_index(weights: Tensor, p: float = 0.5, q: float = 1.0) -> float:
    """``I = 1 - d^(1/q - 1/p) ||w||_p / ||w||_q`` of all weights, in [0, 1); 0 of weights that are all zero."""
    if not 0 < p < q:
        raise UsageError(f"A PQ index needs 0 < p < q, got p = {p} and q = {q}.")
    magnitudes = weights.detach().double().abs().flatten()
    largest = float(magnitudes.max()) if len(magnitudes) else 0.0
    if largest == 0.0:
        return 0.0
    shares = magnitudes / largest
    norms: list[float] = [float(shares.pow(r).mean()) ** (1 / r) for r in (p, q)]  # the factor of d is in the means
    return max(0.0, 1.0 - norms[0] / norms[1])


def sap_sparsities(weights: Tensor, rounds: Iterable[int]) -> tuple[float, ...]:
    """What share of the weights SAP has pruned after so many rounds, without training in between.

    Each round keeps what the bound with ``eta = 0`` says of the weights that are left: a share of ``1 - I``, and at least one.
    """
    magnitudes = weights.detach().double().abs().flatten().sort(descending=True).values
    total = len(magnitudes)
    if not total or not float(magnitudes[0]):
        return tuple(0.0 for _ in rounds)
    roots, sums = magnitudes.sqrt().cumsum(0), magnitudes.cumsum(0)
    kept = [total]
    for _ in range(max(rounds := tuple(rounds))):
        n = kept[-1]
        left = float(roots[n - 1]) ** 2 / float(sums[n - 1])  # n (1 - I) for p = 1/2, q = 1
        kept.append(max(1, min(n, math.ceil(left - 1e-9 * n))))
    return tuple(1 - kept[r] / total for r in rounds)
