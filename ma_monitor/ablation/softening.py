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
from ma_monitor.measure.phenomena.emergence import find_feed_forward
from ma_monitor.measure.phenomena.super_weights import find_down_projection

Softening = Literal["cap", "gain", "product"]
SOFTENINGS: tuple[Softening, ...] = get_args(Softening)
"""What vanpe20/ME_Layer (arXiv:2605.08504) does to the massive token in the Massive Emergence Layer: ``cap``: its
feed-forward update is at most ``CAP`` times the median token's; ``gain``: the gain w of the norm before the
feed-forward becomes mean(w) + ``GAIN``·(w − mean(w)); ``product``: what goes into the down projection is at most as
large (RMS) as the median other token's."""
CAP, GAIN = 2.0, 0.5


@dataclass(frozen=True)
class Parts:
    """The parts of a block that are changed.

    Attributes:
        feed_forward: Gives the update ``[1, S, d]`` or ``[S, d]`` that is added to the residual stream.
        down: Its last projection; None where it has many (experts).
        norm: What normalises its input; None where nothing does right before it.
    """

    feed_forward: nn.Module
    down: nn.Module | None
    norm: nn.Module | None

    def allow(self, softening: Softening) -> bool:
        """Whether the block has what this softening changes."""
        return {"cap": self.feed_forward, "gain": getattr(self.norm, "weight", None), "product": self.down}[
            softening
        ] is not None


def find_parts(model: nn.Module) -> list[Parts]:
    """The parts of each block, by their names and by what is given to what in a forward of two tokens.

    Raises:
        ModelError: If a block has no feed-forward, or it does not run.
    """
    width = describe_model(model).width
    found: list[tuple[nn.Module, nn.Module | None, dict[int, nn.Module]]] = []
    with ExitStack() as hooks:
        for number, block in enumerate(find_layers(model), start=1):
            norms, entry, end = find_feed_forward(block, width)
            if entry is None or end is None:
                raise ModelError(f"a block must have a feed-forward to be changed there, and block {number} has none")
            made: dict[int, tuple[nn.Module, Tensor]] = {}
            taken: dict[int, nn.Module] = {}

            def keep(norm: nn.Module, _args: Any, output: Tensor, made: Any = made) -> None:
                made[output.data_ptr()] = norm, output  # kept, so that its memory is not another's meanwhile

            def look(_module: nn.Module, args: tuple[Any, ...], made: Any = made, taken: Any = taken) -> None:
                if args and args[0].data_ptr() in made:
                    taken[0] = made[args[0].data_ptr()][0]
                made.clear()

            for norm in norms:
                hooks.callback(norm.register_forward_hook(keep).remove)
            hooks.callback(entry.register_forward_pre_hook(look).remove)
            found.append((end, find_down_projection(block, width), taken))
        ends = [Parts(end, None, None) for end, _, _ in found]
        ran = hooks.enter_context(updates_of(ends))
        undisturbed_forward(model, torch.zeros(1, 2, dtype=torch.long))
    if len(ran) < len(ends):
        raise ModelError(f"every block's feed-forward must run to be changed; of {len(ends)} blocks {len(ran)} did so")
    return [Parts(end, down, taken.get(0)) for end, down, taken in found]


def _matrix(module: nn.Module) -> Tensor:
    """A projection's own weights as ``[out, in]``, whichever way they lie."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T


@contextmanager
def softened(parts: Parts, softening: Softening, token: int) -> Iterator[None]:
    """While open, a block is softened at one token of a forward of one sequence, if it has that token.

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
        if token < update.shape[-2]:
            norms = update.float().norm(dim=-1)
            factor = (CAP * norms.median(dim=-1).values / norms[..., token]).clamp(max=1)
            update[..., token, :] *= factor[..., None].to(update.dtype)
        return replaced(output, update)

    return change


def _evened(norm: nn.Module, token: int) -> Callable[..., Any]:
    even: Any = copy.deepcopy(norm)
    gain: Tensor = even.weight.detach()
    gain.copy_(gain.mean() + GAIN * (gain - gain.mean()))

    def change(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        changed = output.clone()
        changed[..., token : token + 1, :] = even.forward(args[0][..., token : token + 1, :])
        return changed

    return change


def _lowered(token: int) -> Callable[..., Any]:
    def change(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        product = args[0].clone()
        if 1 < product.shape[-2] > token:
            size = product.float().square().mean(dim=-1).sqrt()
            others = torch.cat([size[..., :token], size[..., token + 1 :]], dim=-1)
            factor = (others.median(dim=-1).values / size[..., token]).clamp(max=1)
            product[..., token, :] *= factor[..., None].to(product.dtype)
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
    """While open, the feed-forward updates of the last forward of one sequence, number of the block → ``[S, d]``."""
    found: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for number, parts in enumerate(blocks):

            def keep(_module: nn.Module, _args: Any, output: Any, number: int = number) -> None:
                found[number] = first(output).flatten(0, -2).float()

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
