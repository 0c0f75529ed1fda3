"""Where along the layers the massive token comes about, by what, and how little it changes afterwards.

The Massive Emergence Layer (arXiv:2605.08504): in one layer a token's state grows at once, through the gain of a norm
and the feed-forward, and then stays as it is. The massive token of a sequence is the one that holds the largest entry
of all layers; everything here is read at it, in every layer. `numerics.places.emergence_layer` derives the layer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ma_monitor.measure.layers import describe_model
from ma_monitor.measure.phenomena.base import Reader
from ma_monitor.measure.phenomena.super_weights import find_down_projection, outside_of_mixers

_POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
"""Norms behind a feed-forward: their output is what is added to the residual stream (Gemma 2, OLMo 2, GLM 4)."""
_FEED_FORWARDS = ("mlp", "mlp_block", "feed_forward", "ffn", "block_sparse_moe")


class EmergenceReader(Reader):
    """Norm, direction, entropy, and what the feed-forward and the norm before it contribute, at the massive token."""

    name = "emergence"

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        """Finds every block's feed-forward; what a block without one gives of it is not known."""
        super().__init__(model, layers)
        width = describe_model(model).width
        self._parts = {row: find_feed_forward(block, width) for row, block in enumerate(layers, start=1)}
        self._forget()

    def _forget(self) -> None:
        self._before: Tensor | None = None
        self._massive: tuple[Tensor, ...] = ()
        self._tokens: dict[int, dict[str, Tensor]] = {row: {} for row in range(self.rows)}
        self._gains: dict[int, Tensor] = {}
        self._normed: tuple[Any, Any] = (None, None)

    def hooks(self) -> AbstractContextManager[Any]:
        """Hooks on every block's feed-forward, and on the norms that may stand before it."""
        hooks = ExitStack()
        for row, (norms, entry, end) in self._parts.items():
            for norm in norms:
                normed = self.caught(lambda module, _, output: setattr(self, "_normed", (module, output)))
                hooks.callback(norm.register_forward_hook(normed).remove)
            if entry is not None and end is not None:
                enters = self.caught(lambda _, args, row=row: self._enters(row, args[0]))
                leaves = self.caught(lambda _, args, output, row=row: self._leaves(row, output))
                hooks.callback(entry.register_forward_pre_hook(enters).remove)
                hooks.callback(end.register_forward_hook(leaves).remove)
        return hooks

    def hidden(self, row: int, hidden: Tensor) -> None:
        """Keeps four numbers of every token, since which is massive is known in the end, and h_row until h_row+1."""
        stream = hidden.detach().float()
        norm = stream.norm(dim=2)
        self._tokens[row] |= {"norm": norm, "entropy": entropy(stream, norm)}
        if self._before is not None:
            before = self._before.to(stream.device)
            products = torch.linalg.vecdot(stream, before)
            self._tokens[row]["cosine"] = products / (norm * self._tokens[row - 1]["norm"].to(stream.device))
        self._before = stream.clone() if stream.data_ptr() == hidden.data_ptr() else stream
        size, token = torch.maximum(stream.amax(dim=2), -stream.amin(dim=2)).max(dim=1)
        channel = stream[torch.arange(len(token), device=token.device), token].abs().argmax(dim=1)
        found = (size, token, channel)
        held = tuple(one.to(size.device) for one in self._massive) or found
        larger = size > held[0]
        self._massive = tuple(torch.where(larger, new, old) for new, old in zip(found, held, strict=True))

    def _enters(self, row: int, given: Tensor) -> None:
        """Reads the gains of the norm that made a feed-forward's input, where one did."""
        norm, output = self._normed
        if isinstance(output, Tensor) and output.data_ptr() == given.data_ptr():
            self._gains[row] = gains(norm, output)

    def _leaves(self, row: int, output: Any) -> None:
        added = output[0] if isinstance(output, tuple) else output
        shape = self._tokens[row - 1]["norm"].shape
        self._tokens[row]["added"] = added.detach().float().norm(dim=-1).reshape(shape)

    def values(self) -> dict[str, Tensor]:
        """The metrics ``[R, b]``; NaN where a layer has none."""
        tokens, gains_of, (size, token, channel) = self._tokens, self._gains, (one.cpu() for one in self._massive)
        self._forget()
        unknown = torch.full(size.shape, torch.nan)

        def at(row: int, name: str) -> Tensor:
            found = tokens[row].get(name) if row >= 0 else None
            return unknown if found is None else found.cpu().gather(1, token[:, None])[:, 0]

        def typical(row: int) -> Tensor:
            return (tokens[row]["norm"].cpu() / tokens[row - 1]["norm"].cpu()).median(dim=1).values if row else unknown

        def gain(row: int) -> Tensor:
            own = gains_of.get(row)
            return unknown if own is None else (own.abs() / own.abs().mean()).cpu()[channel]

        rows = range(self.rows)
        return {
            "emergence/norm_jump": torch.stack([at(row, "norm") / at(row - 1, "norm") for row in rows]),
            "emergence/typical_jump": torch.stack([typical(row) for row in rows]),
            "emergence/cosine": torch.stack([at(row, "cosine") for row in rows]),
            "emergence/feed_forward": torch.stack([at(row, "added") / at(row - 1, "norm") for row in rows]),
            "emergence/norm_gain": torch.stack([gain(row) for row in rows]),
            "emergence/entropy": torch.stack([at(row, "entropy") for row in rows]),
        }


def find_feed_forward(
    block: nn.Module, width: int | None
) -> tuple[list[nn.Module], nn.Module | None, nn.Module | None]:
    """Of a block the norms outside of attention, what its feed-forward begins with, and what gives what is added.

    Args:
        block: A block of the model.
        width: Channels of the residual stream; None where not known.

    Returns:
        Entry and end are None where there is no feed-forward. A mixture of experts is one.
    """
    named = outside_of_mixers(block)
    norms = [module for module in named.values() if "Norm" in type(module).__name__]
    whole = next((module for name, module in named.items() if name.rpartition(".")[2] in _FEED_FORWARDS), None)
    first = next(
        (m for m in named.values() if isinstance(m, nn.Linear) and m.in_features == (width or m.in_features)), None
    )
    post = next((module for name, module in named.items() if name.rpartition(".")[2] in _POST_NORMS), None)
    down = find_down_projection(block, width)
    if whole is None and down is None:
        return norms, None, None
    return norms, whole or first, post or down or whole


def entropy(stream: Tensor, norm: Tensor) -> Tensor:
    """Entropy in nats of x_j²/Σx² over the channels of each token, ``[b, S, d]`` and its norm ``[b, S]`` → ``[b, S]``.

    ln d where all channels are alike, 0 where one holds everything.
    """
    shares = (stream / norm[..., None]).square()
    entropies: Tensor = torch.special.entr(shares).sum(dim=2)
    return entropies


def gains(norm: Any, output: Tensor) -> Tensor:
    """By how much a norm multiplies each channel once it has normalised, ``[d]``, whatever it calls its weights.

    A vector of ±1 in turn is normalised already, for LayerNorm as for RMSNorm; half the difference to its negative is
    free of the bias. Gemma's norms multiply by one more than their weight.
    """
    signs = torch.ones_like(output[:1, :1] if output.ndim == 3 else output[:1])
    signs[..., 1::2] = -1
    difference: Tensor = norm.forward(signs) - norm.forward(-signs)
    return (difference / 2 * signs).detach().float().flatten()
