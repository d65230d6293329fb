"""How unequal a layer's weights are: the PQ index (Diao et al. 2023, "Pruning deep neural networks from a sparsity perspective").

0 where all magnitudes are equal, near 1 where few weights hold everything. Where those that go hold ``eta`` times the
``sum |w|^p`` of those that stay, at least ``d (1 + eta)^(-q / (q - p)) (1 - I)^(p q / (q - p))`` of ``d`` stay (SAP's bound);
with the defaults that is a share of ``(1 - I) / (1 + eta)^2``.
"""

from __future__ import annotations

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
