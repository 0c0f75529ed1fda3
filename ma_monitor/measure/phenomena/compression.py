"""How few directions a residual stream lies in: matrix entropy, anisotropy, and what the first token alone explains.

Queipo-de-Llano et al. (2025, arXiv:2510.06477): X ``[T, d]`` are a sequence's hidden states, neither centred nor
normalised, σ_j its singular values, p_j = σ_j²/‖X‖²; entropy H = −Σ p ln p, anisotropy p_1. With M = ‖x_0‖²,
R = Σ_{i>0} ‖x_i‖², c = M/R and α = Σ_{i>0} (x_i·x_0)²/(M R), p_1 ≥ (c + α)/(c + 1), since the direction of x_0 has that
share of ‖X‖². A massive token makes c large: the middle layers' entropy falls into a valley.

Others mean other things: Skean et al. (2025, arXiv:2502.02013) centre and normalise the rows first, which takes the
massive token's norm out, and Roy and Vetterli's effective rank (2007) has σ_j/Σσ for p_j.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ma_monitor.measure.phenomena.base import StreamReader

TOKENS = 256
"""First tokens of a sequence that are looked at: eigenvalues cost the cube of their number."""


class CompressionReader(StreamReader):
    """Entropy, effective rank, anisotropy and its lower bound, and the first token's norm against the others'."""

    name = "compression"

    def of_stream(self, hidden: Tensor) -> dict[str, Tensor]:
        """The five metrics of a residual stream ``[b, S, d]``, of its first 256 tokens."""
        return compression(hidden[:, :TOKENS])


def compression(hidden: Tensor) -> dict[str, Tensor]:
    """The five metrics ``[b]`` of ``[b, T, d]``; NaN for a sequence that is zero throughout or not finite somewhere.

    The eigenvalues of the smaller of the two Gram matrices are σ². All in float64: where two tokens are massive in one
    channel, float32 products are off by 7·10⁻⁴ of the entropy at 10⁴ times the rest, and by 3·10⁻³ at 10⁵ times.

    The entropy is divided by ln min(T, d), so that 1 is every direction alike; the effective rank is exp(H).
    """
    hidden = hidden.double()
    gram = hidden @ hidden.mT if hidden.shape[1] <= hidden.shape[2] else hidden.mT @ hidden
    known = gram.isfinite().all(dim=2).all(dim=1)
    power = torch.linalg.eigvalsh(gram.where(known[:, None, None], 0)).clamp(min=0)  # which raises on NaN
    share = power / power.sum(dim=1, keepdim=True)
    entropy = -torch.xlogy(share, share).sum(dim=1)
    norms = hidden.norm(dim=2)
    along = (hidden @ hidden[:, 0, :, None])[..., 0] / norms[:, :1]  # of each token, in the direction of the first
    metrics = {
        "compression/entropy": entropy / math.log(len(gram[0])),
        "compression/effective_rank": entropy.exp(),
        "compression/anisotropy": share[:, -1],
        "compression/first_token_bound": along.square().sum(dim=1) / norms.square().sum(dim=1),
        "compression/first_token_norm": norms[:, 0] / norms[:, 1:].mean(dim=1),
    }
    return {key: values.where(known, torch.nan) for key, values in metrics.items()}
