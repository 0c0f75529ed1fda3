"""What is changed at a block's feed-forward: softenings of the massive token, even damping, and one weight left out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ma_monitor.ablation.interventions import first, replaced
from ma_monitor.errors import ModelError
from ma_monitor.measure.forward import undisturbed_forward
from ma_monitor.measure.layers import describe_model, find_layers
from ma_monitor.measure.phenomena.super_weights import find_down_projection

Softening = Literal["cap", "gain", "product"]
SOFTENINGS: tuple[Softening, ...] = get_args(Softening)
"""What vanpe20/ME_Layer (arXiv:2605.08504) does to the massive token in the Massive Emergence Layer: ``cap``: its
feed-forward update is at most ``CAP`` times the median token's; ``gain``: the gain w of the norm before the
feed-forward becomes mean(w) + ``GAIN``·(w − mean(w)); ``product``: what goes into the down projection is at most as
large (RMS) as the median other token's."""
CAP, GAIN = 2.0, 0.5
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "ff")


@dataclass(frozen=True)
class Parts:
    """The parts of a block that are changed.

    Attributes:
        feed_forward: Gives the update ``[b, S, d]`` that is added to the residual stream.
        down: Its last projection; None where it has many (experts).
        norm: What gives it its input, with a gain ``[d]``; None where it gets it otherwise.
    """

    feed_forward: nn.Module
    down: nn.Module | None
    norm: nn.Module | None

    def allow(self, softening: Softening) -> bool:
        """Whether the block has what this softening changes."""
        return {"cap": self.feed_forward, "gain": self.norm, "product": self.down}[softening] is not None


def find_parts(model: nn.Module) -> list[Parts]:
    """The parts of each block, by their names and by what is given to what in a forward of two tokens.

    Raises:
        ModelError: If a block has no child that is named as a feed-forward is.
    """
    found = []
    with ExitStack() as hooks:
        for number, block in enumerate(find_layers(model), start=1):
            children = dict(block.named_children())
            feed_forward = next((children[name] for name in _FEED_FORWARD if name in children), None)
            if feed_forward is None:
                raise ModelError(
                    f"a block's feed-forward must be a child called one of {', '.join(_FEED_FORWARD)} to be changed, "
                    f"and block {number} has {', '.join(children) or 'no children'}"
                )
            seen = _Seen()
            for child in children.values():
                hooks.callback(child.register_forward_hook(seen.keep).remove)
            hooks.callback(feed_forward.register_forward_pre_hook(seen.look).remove)
            found.append((feed_forward, seen))
        undisturbed_forward(model, torch.zeros(1, 2, dtype=torch.long))
    width = describe_model(model).width
    downs = [find_down_projection(block, width) for block in find_layers(model)]
    return [Parts(part, down, seen.norm) for (part, seen), down in zip(found, downs, strict=True)]


class _Seen:
    """What the children of a block gave, until the feed-forward was given some of it."""

    def __init__(self) -> None:
        self.outputs: list[tuple[nn.Module, Any]] = []
        self.norm: nn.Module | None = None

    def keep(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.outputs.append((module, output))

    def look(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        for child, output in self.outputs:
            if args and output is args[0] and getattr(getattr(child, "weight", None), "ndim", 0) == 1:
                self.norm = child
        self.outputs = []


def _matrix(module: nn.Module) -> Tensor:
    """A projection's own weights as ``[out, in]``, whichever way they lie."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T


@contextmanager
def softened(parts: Parts, softening: Softening, token: int) -> Iterator[None]:
    """While open, a block is softened at one token of every sequence that has it.

    Raises:
        ModelError: If the block has not what this softening changes.
    """
    if softening == "cap":
        handle = parts.feed_forward.register_forward_hook(_capped(token))
    elif softening == "gain" and parts.norm is not None:
        handle = parts.norm.register_forward_hook(_evened(parts.norm, token))
    elif softening == "product" and parts.down is not None:
        handle = parts.down.register_forward_pre_hook(_lowered(token))
    else:
        raise ModelError(f"this kind of block has not what the softening {softening!r} changes")
    try:
        yield
    finally:
        handle.remove()


def _capped(token: int) -> Callable[..., Any]:
    def change(_module: nn.Module, _args: Any, output: Any) -> Any:
        update = first(output).clone()
        if token < update.shape[1]:
            norms = update.float().norm(dim=2)
            factor = (CAP * norms.median(dim=1).values / norms[:, token]).clamp(max=1)
            update[:, token] *= factor[:, None].to(update.dtype)
        return replaced(output, update)

    return change


def _evened(norm: nn.Module, token: int) -> Callable[..., Any]:
    even: Any = copy.deepcopy(norm)
    gain: Tensor = even.weight.detach()
    gain.copy_(gain.mean() + GAIN * (gain - gain.mean()))

    def change(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, token : token + 1] = even.forward(args[0][:, token : token + 1])
        return changed

    return change


def _lowered(token: int) -> Callable[..., Any]:
    def change(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        product = args[0].clone()
        if product.ndim == 3 and 1 < product.shape[1] > token:
            size = product.float().pow(2).mean(dim=2).sqrt()
            others = torch.cat([size[:, :token], size[:, token + 1 :]], dim=1)
            product[:, token] *= (others.median(dim=1).values / size[:, token]).clamp(max=1)[:, None].to(product.dtype)
        return (product, *args[1:])

    return change


@contextmanager
def damped(parts: Parts, factor: float) -> Iterator[None]:
    """While open, a block's feed-forward updates of all tokens are multiplied by a factor."""

    def change(_module: nn.Module, _args: Any, output: Any) -> Any:
        return replaced(output, first(output) * factor)

    handle = parts.feed_forward.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def updates_of(blocks: Sequence[Parts]) -> Iterator[dict[int, Tensor]]:
    """While open, the feed-forward updates of the last forward's first sequence, number of the block → ``[S, d]``."""
    found: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for number, parts in enumerate(blocks):

            def keep(_module: nn.Module, _args: Any, output: Any, number: int = number) -> None:
                found[number] = first(output)[0].float()

            hooks.callback(parts.feed_forward.register_forward_hook(keep).remove)
        yield found


def largest_other(down: nn.Module, row: int, column: int) -> tuple[int, int]:
    """Where the largest magnitude of a projection's matrix lies, but for one weight."""
    sizes = _matrix(down).abs().clone()
    sizes[row, column] = -1
    index = int(sizes.argmax())
    return index // sizes.shape[1], index % sizes.shape[1]


@contextmanager
def weight_removed(down: nn.Module, row: int, column: int) -> Iterator[None]:
    """While open, W[row, column] of a projection is zero; then what it was, to the bit."""
    place = _matrix(down)[row : row + 1, column]
    kept = place.clone()
    place.zero_()
    try:
        yield
    finally:
        place.copy_(kept)
