"""How far the entries of a residual stream are from a Gaussian: two definitions that go by one name, and the largest.

Two further sources mean other things by the word: mosaicml's composer takes the biased kurtosis per token, not in
excess, and He et al. (2024, arXiv:2405.19279) that of the channels' root mean squares.
"""

from __future__ import annotations

from torch import Tensor

from ma_monitor.measure.phenomena.base import StreamReader


class KurtosisReader(StreamReader):
    """Kurtosis over channels and over everything, and the infinity norm."""

    name = "kurtosis"

    def of_stream(self, hidden: Tensor) -> dict[str, Tensor]:
        """The three metrics of a residual stream ``[b, S, d]``."""
        hidden = hidden.float()
        return {
            "kurtosis/per_token": excess_per_token(hidden),
            "kurtosis/per_sequence": per_sequence(hidden),
            "kurtosis/infinity_norm": hidden.abs().amax(dim=(1, 2)),
        }


def excess_per_token(hidden: Tensor) -> Tensor:
    """Mean over tokens of relu(mean(x⁴)/std(x)⁴ − 3), over the channels x of a token, ``[b, S, d]`` → ``[b]``.

    Outlier-Safe Pre-Training (Park et al. 2025, arXiv:2506.19697) as coded there: the numerator is not centred, the
    standard deviation is, and is unbiased. A token whose channels are all equal has none and counts as 0.
    """
    fourth = hidden.square().square_().mean(dim=2)
    variance = (hidden - hidden.mean(dim=2, keepdim=True)).square_().sum(dim=2) / (hidden.shape[2] - 1)
    return (fourth / variance.square() - 3).relu().where(variance != 0, 0).mean(dim=1)


def per_sequence(hidden: Tensor) -> Tensor:
    """mean((x − μ)⁴)/(s⁴ + 10⁻⁶) over all entries of a sequence, s unbiased, ``[b, S, d]`` → ``[b]``.

    Qualcomm's (Bondarenko et al. 2023, arXiv:2306.12929), not in excess: 3 for a Gaussian.
    """
    flat = hidden.flatten(1)
    squares = (flat - flat.mean(dim=1, keepdim=True)).square_()
    variance = squares.sum(dim=1) / (flat.shape[1] - 1)
    return squares.square_().mean(dim=1) / (variance.square() + 1e-6)
