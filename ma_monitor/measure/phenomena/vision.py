"""Models that see: massive activations by token kind, high-norm patches of a ViT, visual sinks of a VLM.

Two sources, two rules:

- Darcet et al. (2024, "Vision transformers need registers", arXiv:2309.16588) call a patch token an artifact where its
  norm at the output of DINOv2 ViT-g is above 150, and say that this hand-picked cutoff varies across models. Most norms
  lie between 0 and 100 there, so the cutoff is three times the middle of that band; here it is `HIGH_NORM` = 3 times
  the median norm of the image's own patches in that layer, which has no scale of its own.
- Kang et al. (2025, "See what you are told: visual attention sink in large multimodal models", arXiv:2503.03321): with
  D the channels in which the language model's first token is massive, φ(x) = max over d in D of abs(x[d])/RMS(x), and
  an image token with φ ≥ τ = `TAU` = 20 is a visual sink (their code has > instead of ≥, and ε = 10⁻⁶ under the
  root). They list D once a model; here it is read from the model: the channels of the k largest entries of the first
  text token, in each layer and image. Their sinks of layer ℓ are found in its input, h_{ℓ−1}. Since φ ≤ √d, no model
  narrower than 400 channels has any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ma_monitor.errors import ConfigError, ModelError
from ma_monitor.measure.forward import reading_layers, undisturbed_forward
from ma_monitor.measure.layers import find_layers
from ma_monitor.measure.statistics import Statistics, activation_statistics
from ma_monitor.runs.history import sequence_ratio

HIGH_NORM = 3.0
"""A patch of so many times the median patch norm is an artifact."""
TAU = 20.0
"""A token whose largest value in the massive channels is so many times its RMS is a sink."""
ALL = "all"
"""Every token of an image but padding, as if of one kind."""


@dataclass(frozen=True)
class KindReading:
    """The largest entries among the tokens of one kind, as `Measurements` has them.

    Attributes:
        top: Signed values of the k largest, ``[R, n, k]``; NaN where an image has fewer numbers of this kind.
        position: Token position of each, ``[R, n, k]``; -1 where unknown.
        channel: Channel of each, ``[R, n, k]``; -1 where unknown.
        median: Lower median of the magnitudes of this kind's entries, ``[R, n]``.
    """

    top: NDArray[np.float64]
    position: NDArray[np.int64]
    channel: NDArray[np.int64]
    median: NDArray[np.float64]


@dataclass(frozen=True)
class VisionReading:
    """What one forward showed of h_0 … h_L (R rows), n images of S tokens.

    Attributes:
        kinds: Which tokens are of which kind, ``[n, S]`` each; every token is of one.
        of: Kind → its entries; `ALL` for those of all tokens but padding.
        norms: Euclidean norm of every token, ``[R, n, S]``.
        sink_values: φ of every token, ``[R, n, S]``; NaN where there is no first text token.
    """

    kinds: Mapping[str, NDArray[np.bool_]]
    of: Mapping[str, KindReading]
    norms: NDArray[np.float64]
    sink_values: NDArray[np.float64]

    def ratio(self, kind: str = ALL, rank: int = 1) -> NDArray[np.float64]:
        """A kind's entry of this rank over the median of `ALL` tokens (paper, Eq. 8), ``[R]``.

        The common denominator makes kinds comparable: the largest of them is the model's ratio.
        """
        return sequence_ratio(self.of[kind].top[..., rank - 1], self.of[ALL].median, "ratio_of_means")

    @property
    def seen(self) -> NDArray[np.bool_]:
        """The tokens that stand for a piece of the image: of kind ``patch`` or ``image``, ``[n, S]``."""
        none = np.zeros(self.norms.shape[1:], bool)
        return np.asarray(self.kinds.get("patch", none) | self.kinds.get("image", none))

    @property
    def high_norm(self) -> NDArray[np.bool_]:
        """The artifacts among the `seen`: above `HIGH_NORM` times the median norm of the image's, ``[R, n, S]``."""
        norms = np.where(self.seen & ~np.isnan(self.norms), self.norms, np.inf)
        known = np.count_nonzero(self.seen & ~np.isnan(self.norms), axis=-1)
        middle = np.maximum(known - 1, 0)[..., None] // 2  # of those known, which come first
        median = np.take_along_axis(np.sort(norms, axis=-1), middle, axis=-1)
        return np.asarray(self.seen & (self.norms > HIGH_NORM * median))

    @property
    def high_norm_share(self) -> NDArray[np.float64]:
        """Share of the `seen` tokens of all images that are artifacts, ``[R]``; those of no known norm left out."""
        return _share(self.high_norm, self.seen & ~np.isnan(self.norms))

    @property
    def sinks(self) -> NDArray[np.bool_]:
        """The visual sinks among the `seen`: φ at least `TAU`, ``[R, n, S]``."""
        return np.asarray(self.seen & (self.sink_values >= TAU))

    @property
    def sink_share(self) -> NDArray[np.float64]:
        """Share of the `seen` tokens of all images that are visual sinks, ``[R]``; NaN where no φ is known."""
        return _share(self.sinks, self.seen & ~np.isnan(self.sink_values))


def measure_vision(
    model: nn.Module, inputs: Mapping[str, Any], kinds: Mapping[str, Tensor] | None = None, *, k: int = 3
) -> VisionReading:
    """Runs a model once on images and reads its residual stream by token kind; nothing of the model is changed.

    Of a vision-language model the stream of the text decoder is read; pass its vision tower for that of the tower. As
    the probe's, the forward is in evaluation mode, without gradients, not compiled, and puts back every random state
    and training flag. One process alone: no sharded model.

    Args:
        model: A transformers model that takes ``pixel_values``, with or without ``input_ids``.
        inputs: What the model is called with, as its processor gives it.
        kinds: Which tokens are of which kind, ``[n, S]`` bool; None for `token_kinds`. High norms and sinks are looked
            for in ``patch`` and ``image``, D in ``first_text``; ``padding`` is not in `ALL`.
        k: Largest entries kept of each image and kind.

    Raises:
        ConfigError: If there are no pixels, or the kinds do not put every token into exactly one.
        ModelError: If the blocks cannot be found, one did not run, or its output is not a residual stream of one
            length; if the kinds are not given and not known.
    """
    if not isinstance(inputs.get("pixel_values"), Tensor):
        raise ConfigError(f"the inputs of a model that sees must hold `pixel_values`, a tensor, got {sorted(inputs)}")
    layers = find_layers(model)
    rows: list[_Row] = []
    masks: dict[str, Tensor] = {}

    def read(row: int, value: Any) -> None:
        hidden = _stream(value, row, rows[0].norms.shape if rows else None)
        if not masks:
            found = kinds if kinds is not None else token_kinds(getattr(model, "config", None), inputs, hidden.shape[1])
            masks.update(_checked(found, hidden.shape[:2], hidden.device))
        rows.append(_Row.of(hidden, {name: mask.to(hidden.device) for name, mask in masks.items()}, k))

    with reading_layers(layers, read):
        undisturbed_forward(_Call(model, inputs), inputs["pixel_values"])
    if len(rows) <= len(layers):
        raise ModelError(f"every block must run once with these inputs; {len(rows)} of {len(layers) + 1} streams seen")
    return VisionReading(
        kinds={name: mask.cpu().numpy() for name, mask in masks.items()},
        of={name: _kind([row.statistics[name] for row in rows], len(rows), rows[0].width) for name in (ALL, *masks)},
        norms=np.stack([row.norms.double().cpu().numpy() for row in rows]),
        sink_values=np.stack([row.sink_values.double().cpu().numpy() for row in rows]),
    )


def token_kinds(config: Any, inputs: Mapping[str, Any], tokens: int) -> dict[str, Tensor]:
    """Which of the tokens of a stream are of which kind, ``[n, S]`` each; every token is of one.

    With ``input_ids``: ``image`` (the configuration's image or video placeholders), ``first_text`` (BOS where the
    tokenizer puts one), ``text`` and ``padding`` (zeros of ``attention_mask``). Without: ``cls``, ``register`` and
    ``patch``, in this order, as many patches as the images have. Kinds without a token are left out.

    Args:
        config: The model's configuration.
        inputs: What the model is called with.
        tokens: S.

    Raises:
        ModelError: If the configuration does not say enough, or what it says does not add up to S.
    """
    ids = inputs.get("input_ids")
    if ids is not None:
        places = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
        if places == [None, None] or ids.shape[1] != tokens:
            raise ModelError(
                "image tokens are known by placeholders in `input_ids`, one a token of the stream; "
                f"here they are {places} in {ids.shape[1]} ids for {tokens} tokens. Pass `kinds`."
            )
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        image = real & torch.isin(ids, ids.new_tensor([place for place in places if place is not None]))
        text = real & ~image
        first = text & (text.cumsum(1) == 1)
        kinds = {"image": image, "first_text": first, "text": text & ~first, "padding": ~real}
        return {name: mask for name, mask in kinds.items() if mask.any()}
    size = getattr(config, "patch_size", None)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    pixels = inputs["pixel_values"].shape
    patches = (pixels[-2] // height) * (pixels[-1] // width) if height and width else 0
    registers = getattr(config, "num_register_tokens", 0)
    extra = tokens - patches - registers
    if patches == 0 or extra not in (0, 1):
        raise ModelError(
            f"the tokens of a ViT must be its patches, its registers and at most one CLS; of {tokens} tokens "
            f"{patches} are patches of {size} and {registers} registers. Pass `kinds`."
        )
    place = torch.arange(tokens).expand(pixels[0], tokens)
    kinds = {"cls": place < extra, "register": (extra <= place) & (place < extra + registers)}
    kinds["patch"] = place >= extra + registers
    return {name: mask for name, mask in kinds.items() if mask.any()}


@dataclass(frozen=True)
class _Row:
    """What is kept of one residual stream ``[n, S, d]``."""

    statistics: dict[str, Statistics]
    norms: Tensor
    sink_values: Tensor
    width: int

    @classmethod
    def of(cls, hidden: Tensor, masks: Mapping[str, Tensor], k: int) -> _Row:
        """Reads a kind by making all other tokens NaN, which the exact statistics leave out."""

        def without(others: Tensor | None) -> Statistics:
            left = hidden if others is None else hidden.masked_fill(others[..., None], torch.nan)
            return activation_statistics(left, k)

        statistics = {ALL: without(masks.get("padding"))} | {name: without(~mask) for name, mask in masks.items()}
        wide = hidden.float()
        first = statistics.get("first_text")
        values = sink_values(wide, first.index % hidden.shape[2], first.index >= 0) if first is not None else None
        norms = wide.norm(dim=2)
        unknown = torch.full_like(norms, torch.nan)
        return cls(statistics, norms, unknown if values is None else values, hidden.shape[2])


def sink_values(hidden: Tensor, channels: Tensor, known: Tensor) -> Tensor:
    """φ(x) = max over d of abs(x[d])/RMS(x) of every token (Kang et al. 2025), ``[n, S]``.

    Args:
        hidden: ``[n, S, d]`` float32.
        channels: D of each image, ``[n, k]``.
        known: Which of them count, ``[n, k]``.

    Returns:
        NaN where a token is zero or not finite, or where no channel of its image is known.
    """
    chosen = hidden.abs().gather(2, channels[:, None].expand(-1, hidden.shape[1], -1))
    values = chosen.masked_fill(~known[:, None], 0).amax(dim=2) / hidden.pow(2).mean(dim=2).sqrt()
    return values.masked_fill(~(hidden.isfinite().all(dim=2) & known.any(dim=1)[:, None]), torch.nan)


class _Call(nn.Module):
    """A model with all that it is called with but the pixels, so that the probe's own forward can run it."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.inputs = dict(inputs)

    def forward(self, pixels: Tensor) -> None:
        given = self.inputs | {"pixel_values": pixels}
        self.model(**{name: v.to(pixels.device) if isinstance(v, Tensor) else v for name, v in given.items()})


def _stream(value: Any, row: int, shape: tuple[int, ...] | None) -> Tensor:
    hidden = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or (shape is not None and hidden.shape[:2] != shape):
        got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ModelError(
            f"h_{row} must have axes [image, token, channel] and as many tokens as h_0, got {got}; models that merge "
            "patches or put all images into one sequence are not supported"
        )
    return hidden.detach()


def _checked(kinds: Mapping[str, Tensor], shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    masks = {name: torch.as_tensor(mask, device=device).bool() for name, mask in kinds.items()}
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    if ALL in masks or set(shapes.values()) != {tuple(shape)}:
        raise ConfigError(f"`kinds` must be masks of shape {tuple(shape)}, none named {ALL!r}, got {shapes}")
    if (torch.stack([*masks.values()]).sum(0) != 1).any():
        raise ConfigError(
            f"every token must be of exactly one kind; the masks of {sorted(masks)} overlap or leave gaps"
        )
    return masks


def _kind(statistics: list[Statistics], rows: int, width: int) -> KindReading:
    """The statistics of h_0 … h_L on the host."""
    whole = Statistics(torch.cat([one.packed.cpu() for one in statistics]), statistics[0].k)

    def shaped(values: Tensor) -> NDArray[Any]:
        return values.reshape(rows, -1, *values.shape[1:]).numpy()

    index = shaped(whole.index)
    return KindReading(
        top=shaped(whole.top).astype(np.float64),
        position=np.where(index < 0, -1, index // width),
        channel=np.where(index < 0, -1, index % width),
        median=shaped(whole.median).astype(np.float64),
    )


def _share(chosen: NDArray[np.bool_], among: NDArray[np.bool_]) -> NDArray[np.float64]:
    """How many of the tokens of all images are chosen, ``[R, n, S]`` → ``[R]``; NaN of none."""
    number = np.broadcast_to(among, chosen.shape).sum(axis=(1, 2))
    return np.where(number > 0, chosen.sum(axis=(1, 2)) / np.maximum(number, 1), np.nan)
