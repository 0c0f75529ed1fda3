"""What can be read besides the ratio, and what it is called everywhere.

A phenomenon is switched on by its name (``MonitorConfig(phenomena=("sinks", …))``) and gives metrics, each of which is
a number for each of h_0 … h_L at every measurement. `ma_monitor.measure.phenomena` reads them; runs keep them, sinks
log them and the report draws them under the names that stand here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Metric:
    """One number a layer.

    Attributes:
        key: Its name, ``phenomenon/metric``; a dashboard has it as ``ma/phenomenon/metric``.
        title: What it is, in words for a chart.
        shown: Which of the layers' numbers a dashboard's line shows; None for none (several numbers a layer).
        log: Whether a chart's scale is logarithmic.
        index: Whether it names something (a channel), of which there is no mean: what more than half of the sequences
            have in common is kept, NaN where they have nothing.
    """

    key: str
    title: str
    shown: Literal["largest", "smallest", "mean"] | None = "largest"
    log: bool = False
    index: bool = False


PHENOMENA: dict[str, tuple[Metric, ...]] = {
    "kurtosis": (
        Metric("kurtosis/per_token", "excess kurtosis over channels, mean over tokens (OSP)", log=True),
        Metric("kurtosis/per_sequence", "kurtosis over all entries (Qualcomm)", log=True),
        Metric("kurtosis/infinity_norm", "largest absolute entry", log=True),
    ),
    "outliers": (
        Metric("outliers/channels", "channels that are large in at least 6 % of the tokens"),
        Metric("outliers/token_mean", "largest entry over root mean square of a token, mean over tokens", log=True),
        Metric("outliers/token_largest", "largest entry over root mean square of a token, largest token", log=True),
    ),
    "super_weights": (
        Metric("super_weights/input", "largest input of the down projection", log=True),
        Metric("super_weights/output", "largest output of the down projection", log=True),
        Metric("super_weights/past_50", "share of sequences in which both are past 50 (Yu et al.)"),
        Metric("super_weights/past_100", "share of sequences in which both are past 100"),
        Metric("super_weights/input_channel", "channel of the largest input, in most sequences", None, index=True),
        Metric("super_weights/output_channel", "channel of the largest output, in most sequences", None, index=True),
        Metric("super_weights/value", "weight from that input to that output, in most sequences", None, index=True),
    ),
    "emergence": (
        Metric("emergence/norm_jump", "norm of the massive token over that in the layer before", log=True),
        Metric("emergence/typical_jump", "the same of the median token", log=True),
        Metric("emergence/cosine", "cosine of the massive token's state to that in the layer before", "smallest"),
        Metric("emergence/feed_forward", "norm of what the feed-forward adds to it over its norm before", log=True),
        Metric("emergence/norm_gain", "gain at its largest channel over mean gain, of the norm before", log=True),
        Metric("emergence/entropy", "entropy of the massive token over channels (nats)", "smallest"),
    ),
    "sinks": (
        Metric("sinks/rate", "sink rate: share of heads with the first token as sink (Gu et al.)", "mean"),
        Metric("sinks/score", "mean attention to the first token", "mean"),
        Metric("sinks/elsewhere", "share of heads with another token as sink", "mean"),
        Metric("sinks/heads", "mean attention to the first token, of each head", None),
    ),
    "compression": (
        Metric("compression/entropy", "matrix entropy / ln min(T, d) (Queipo-de-Llano et al.)", "smallest"),
        Metric("compression/effective_rank", "effective rank, exp(matrix entropy)", "smallest", log=True),
        Metric("compression/anisotropy", "share of the first principal direction, uncentred"),
        Metric("compression/first_token_bound", "lower bound of the anisotropy by the first token alone"),
        Metric("compression/first_token_norm", "norm of the first token / mean norm of the others", log=True),
    ),
}
"""Name of a phenomenon → its metrics."""

METRICS: dict[str, Metric] = {metric.key: metric for metrics in PHENOMENA.values() for metric in metrics}


def named(text: str) -> tuple[str, ...]:
    """The names in a text with commas between; ``all`` for every one, nothing for none."""
    return tuple(PHENOMENA) if text == "all" else tuple(filter(None, text.split(",")))


def of_layers(metric: Metric, values: NDArray[np.float64]) -> float | None:
    """The one number that a dashboard shows of the layers' ``[R]``; None where nothing is known."""
    known = values[abs(values) < math.inf]  # numpy is loaded when arrays are; False for NaN
    if metric.shown is None or not known.size:
        return None
    return {"largest": float(known.max()), "smallest": float(known.min()), "mean": float(known.mean())}[metric.shown]
