"""Super weights: the one weight of a down projection that turns a spike of its input into one of its output.

Yu et al. (2024, arXiv:2411.07191; code LLMSuperWeight): of every down projection the largest abs(input) and abs(output)
with their channels; the candidate is W[channel of the output, channel of the input]. A spike is larger than 50 in their
call, 100 by their function's default. They confirm a candidate by setting it to zero, which reading cannot do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ma_monitor.errors import ModelError
from ma_monitor.measure.layers import describe_model
from ma_monitor.measure.phenomena.base import Reader

SPIKES = (50, 100)
"""Sizes from which on input and output are called spikes."""
_MIXES_TOKENS = ("attn.", "attention.")
_MIXER_KINDS = ("attention", "mixer", "recurrentblock")
"""What the name, and the name of the class, of a module hold that mixes tokens: hybrids call every kind `mixer`."""


class SuperWeightsReader(Reader):
    """The largest input and output of every block's down projection, and the weight that joins their channels."""

    name = "super_weights"

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        """Finds the down projections.

        Raises:
            ModelError: If no block has one: all are mixtures of experts, or not transformer blocks.
        """
        super().__init__(model, layers)
        width = describe_model(model).width
        self._projections = {row: find_down_projection(layer, width) for row, layer in enumerate(layers, start=1)}
        if not any(self._projections.values()):
            raise ModelError(
                "super weights are read at the linear map that ends a block's dense feed-forward, and no block has "
                'one (experts have many); leave "super_weights" out of `phenomena`'
            )
        self._sequences = 0
        self._read: dict[int, dict[str, Tensor]] = {}

    def hooks(self) -> AbstractContextManager[Any]:
        """A hook on every down projection; the first one, before what frees a gathered weight."""
        hooks = ExitStack()
        for row, projection in self._projections.items():
            if projection is not None:
                read = self.caught(lambda module, args, output, row=row: self._spikes(row, module, args[0], output))
                hooks.callback(projection.register_forward_hook(read, prepend=True).remove)
        return hooks

    def hidden(self, row: int, hidden: Tensor) -> None:
        """Sees how many sequences there are, which a projection of all tokens in one axis does not show."""
        self._sequences = len(hidden)

    def values(self) -> dict[str, Tensor]:
        """The metrics ``[R, b]``; NaN for h_0 and for blocks that have no one down projection."""
        read, self._read = self._read, {}
        unknown = torch.full((self._sequences,), torch.nan)
        rows = [read.get(row, {}) for row in range(self.rows)]
        return {key: torch.stack([row.get(key, unknown).double().cpu() for row in rows]) for key in self.sizes}

    def _spikes(self, row: int, projection: nn.Module, given: Tensor, made: Tensor) -> None:
        """Reads ``given [b, S, f]`` and ``made [b, S, d]``, or the same with all tokens in one axis."""
        weight: Any = projection.weight
        weight = weight.detach() if isinstance(projection, nn.Linear) else weight.detach().T
        split = any(hasattr(each, "device_mesh") for each in (weight, given, made))
        coded = not weight.is_floating_point() or weight.element_size() < 2  # means something with its scale alone
        if split or coded or weight.shape != (made.shape[-1], given.shape[-1]):
            raise ModelError(
                f"a down projection must have one whole weight of {made.shape[-1]} x {given.shape[-1]} numbers to be "
                f"looked into, got {tuple(weight.shape)} of {weight.dtype} in a {type(projection.weight).__name__}: "
                "quantised or split over processes"
            )
        (inputs, columns), (outputs, rows) = (largest(each.detach(), self._sequences) for each in (given, made))
        known = ~(inputs.isnan() | outputs.isnan())
        candidate = {"input_channel": columns, "output_channel": rows, "value": weight[rows, columns]}
        numbers = {"input": inputs, "output": outputs}
        for bound in SPIKES:
            numbers[f"past_{bound}"] = ((inputs > bound) & (outputs > bound)).double()
        for name, each in {**numbers, **candidate}.items():
            self._read.setdefault(row, {})[f"super_weights/{name}"] = each.double().where(known, torch.nan)


def find_down_projection(block: nn.Module, width: int | None) -> nn.Module | None:
    """The linear map that ends a block's dense feed-forward: the last one that narrows to the residual stream.

    Llama's ``down_proj``, GPT-NeoX's ``dense_4h_to_h``, OPT's ``fc2``, GPT-2's ``c_proj`` (a Conv1D), T5's ``wo`` and
    BERT's ``output.dense`` are found, under LoRA too. Maps inside experts or what mixes tokens are none.

    Args:
        block: A block of the model.
        width: Channels of the residual stream; None where not known.

    Returns:
        None where the block has none, or has experts, of which no one is the block's.
    """
    if any("expert" in name.lower() for name, _ in block.named_modules()):
        return None
    found = None
    for module in outside_of_mixers(block).values():
        sizes = _sizes(module)
        if sizes is not None and sizes[0] >= sizes[1] and sizes[1] == (width or sizes[1]):
            found = module
    return found


def outside_of_mixers(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a block that are no part of its attention, state space or recurrence, by name."""
    named = dict(block.named_modules())
    mixers = [
        f"{name}."
        for name, module in named.items()
        if name and any(kind in type(module).__name__.lower() for kind in _MIXER_KINDS)
    ]
    return {
        name: module
        for name, module in named.items()
        if not any(part in f"{name.lower()}." for part in _MIXES_TOKENS) and not f"{name}.".startswith(tuple(mixers))
    }


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Channels of the input and of the output of a linear map; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    given: Any = module
    return (given.nx, given.nf) if type(module).__name__ == "Conv1D" else None


def largest(values: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """The largest abs of each sequence ``[b]`` and its channel ``[b]``, of ``[b, S, c]`` or ``[b·S, c]``.

    Of equals the first in the order of tokens. NaN where there is one. No copy is made of what is read.
    """
    tokens = values.reshape(sequences, -1, values.shape[-1])
    sizes = torch.maximum(tokens.amax(dim=2), -tokens.amin(dim=2))
    size, at = sizes.max(dim=1)
    return size, tokens[torch.arange(sequences, device=at.device), at].abs().argmax(dim=1)
