"""Channels that are large over many tokens, and how far the largest entry of each token stands out.

Raman et al. (2025, arXiv:2505.21670) name two kinds of outliers, massive activations (single tokens) and channel-wise
ones (a channel over most tokens). Their numeric rule for the second could not be confirmed, so the one here is this
project's: that of LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339, section 4: magnitude at least 6, in at least 6 % of
the sequence's positions), counted layer by layer, without their third part (at least 25 % of the layers), and with
magnitudes in units of the token's root mean square. LLM.int8 reads inputs of linear maps, which a norm has brought to
that unit; a residual stream has none.
"""

from __future__ import annotations

from torch import Tensor

from ma_monitor.measure.phenomena.base import StreamReader

LARGE = 6.0
"""An entry is large from so many root mean squares of its token on."""
COMMON = 0.06
"""A channel is an outlier where it is large in at least this share of the tokens of a sequence."""


class OutliersReader(StreamReader):
    """Outlying channels, and the largest entry of each token in units of its root mean square."""

    name = "outliers"

    def of_stream(self, hidden: Tensor) -> dict[str, Tensor]:
        """The three metrics of a residual stream ``[b, S, d]``."""
        sizes = hidden.float().abs()
        unit = sizes.square().mean(dim=2, keepdim=True).sqrt()
        largest = (sizes.amax(dim=2, keepdim=True) / unit)[..., 0]
        return {
            "outliers/channels": outlying_channels(sizes, unit),
            "outliers/token_mean": largest.mean(dim=1),
            "outliers/token_largest": largest.amax(dim=1),
        }


def outlying_channels(sizes: Tensor, unit: Tensor) -> Tensor:
    """Number of channels that are large in enough tokens; NaN where a sequence has an entry that is not finite.

    Args:
        sizes: abs(h), ``[b, S, d]``.
        unit: Root mean square of each token, ``[b, S, 1]``. A token of zeros has no large entry.

    Returns:
        ``[b]``.
    """
    times = ((sizes >= LARGE * unit) & (sizes > 0)).sum(dim=1)
    count = (times >= COMMON * sizes.shape[1]).sum(dim=1).float()
    return count.where(unit.isfinite().all(dim=1)[:, 0], float("nan"))
