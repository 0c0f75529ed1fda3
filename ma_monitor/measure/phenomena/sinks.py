"""How much attention the first token gets, head by head, in a short forward with eager attention.

Gu et al. (2025, arXiv:2410.10781; sail-sg/Attention-Sink): with A_ik what query i gives to key k, of T = 64 tokens,
α_k = Σ_{i≥k} A_ik / (T − k) is the mean attention to token k of those that can see it; a head has its sink at k where
α_k > 0.3, and the sink rate is the share of sequences, layers and heads with α_0 > 0.3. Of uniform causal attention
α_0 = (1 + 1/2 + … + 1/T)/T, which is 0.074 at T = 64.

The probe's first 64 tokens are read as they are (all of them where it has fewer): without a BOS unless the probe has
one. Weights are what the model computes in its own precision, where the source ran in float32; means are in float32.
A sliding window narrower than T counts as attention of 0 to what lies outside. Where queries share keys (GQA, MQA)
heads are query heads. Queipo-de-Llano et al. (arXiv:2510.06477) call α_0 the sink score, and take ≥ for >.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ma_monitor.errors import ModelError
from ma_monitor.measure.layers import describe_model
from ma_monitor.measure.phenomena.base import Reader

THRESHOLD = 0.3
"""Gu et al.'s ε: a mean attention above it is a sink."""
FEWEST = 10
"""Tokens from which on uniform attention is below it: (1 + 1/2 + … + 1/9)/9 = 0.31, (1 + … + 1/10)/10 = 0.29."""


class SinksReader(Reader):
    """Attention sinks of each block's heads; h_0 has none."""

    name = "sinks"
    tokens = 64

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        """Needs the number of heads; how a block's attention gives its weights is seen in the forward.

        Raises:
            ModelError: If the configuration speaks of no attention heads.
        """
        super().__init__(model, layers)
        heads = describe_model(model).heads
        if heads is None:
            raise ModelError(
                f"a model must say how many attention heads it has to be read for sinks; the configuration of "
                f"{type(model).__name__} has no `num_attention_heads`. Leave sinks out for models without attention"
            )
        self._model, self._layers, self._heads = model, layers, heads
        self._to: dict[int, Tensor] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """One number a layer, but for ``sinks/heads``."""
        return super().sizes | {"sinks/heads": self._heads}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Eager attention in all parts of the model, and a look at what every module in a block gives."""
        self._to.clear()
        with ExitStack() as hooks:
            hooks.enter_context(eager_attention(self._model))
            for row, layer in enumerate(self._layers, start=1):
                see = self.caught(self._seeing(row))
                for module in layer.modules():
                    hooks.callback(module.register_forward_hook(see).remove)
            yield

    def _seeing(self, row: int) -> Callable[[nn.Module, Any, Any], None]:
        """A hook that keeps block ``row``'s first attention weights, which are those to its own stream."""

        def see(_module: nn.Module, _args: Any, output: Any) -> None:
            if row not in self._to and isinstance(output, tuple):
                found = next((value for value in output if self._are_weights(value)), None)
                if found is not None:
                    self._to[row] = attention_to(found)

        return see

    def _are_weights(self, value: Any) -> bool:
        """Whether this is ``[b, H, T, T]`` and nowhere negative, as queries and keys of T channels would be."""
        square = isinstance(value, Tensor) and value.ndim == 4 and value.shape[2] == value.shape[3]
        return square and value.shape[1] == self._heads and not bool((value < 0).any())

    def values(self) -> dict[str, Tensor]:
        """The four metrics.

        Raises:
            ModelError: If no block gave attention weights.
        """
        if not self._to:
            raise ModelError(
                f"at least one block must give its attention weights [sequence, {self._heads}, token, token] in a "
                f"forward with eager attention; none of {len(self._layers)} did. Heads that are split over devices, "
                "and attention of a kernel's own, cannot be read for sinks"
            )
        of_rows = [sinks(self._to[row]) if row in self._to else None for row in range(self.rows)]
        known = next(filter(None, of_rows))
        unknown = {key: torch.full_like(value, torch.nan) for key, value in known.items()}
        device = known["sinks/rate"].device
        return {key: torch.stack([(of or unknown)[key].to(device) for of in of_rows]) for key in known}


def attention_to(weights: Tensor) -> Tensor:
    """α_k, the mean attention of queries i ≥ k to key k, of weights ``[b, H, T, T]`` → ``[b, H, T]`` in float32."""
    tokens = weights.shape[-1]
    return weights.float().tril().sum(dim=2) / torch.arange(tokens, 0, -1, device=weights.device)


def sinks(attention: Tensor) -> dict[str, Tensor]:
    """The four metrics of one block's α ``[b, H, T]``: ``[b]`` each, and ``[b, H]`` of each head.

    Elsewhere is where α_k > 0.3 for some k of 1 … T/2; of later ones α_k is a mean over few queries. In fewer than 10
    tokens what passes the threshold is not known to be a sink.
    """
    first, later = attention[..., 0], attention[..., 1 : attention.shape[-1] // 2 + 1]
    known = torch.where(torch.isfinite(attention).all(dim=2).all(dim=1), 0.0, torch.nan)
    told = known if attention.shape[-1] >= FEWEST else torch.full_like(known, torch.nan)
    return {
        "sinks/rate": (first > THRESHOLD).float().mean(dim=1) + told,
        "sinks/score": first.mean(dim=1) + known,
        "sinks/elsewhere": (later > THRESHOLD).any(dim=2).float().mean(dim=1) + told,
        "sinks/heads": first + known[:, None],
    }


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """While open, every configuration in the model asks for eager attention, the only kind that gives weights.

    What each had is put back on its own: the library's setter would hand a parent's on to the parts below it.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        _collect(getattr(module, "config", None), configs)
    had = {number: config._attn_implementation_internal for number, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for number, config in configs.items():
            config._attn_implementation_internal = had[number]


def _collect(config: Any, configs: dict[int, Any]) -> None:
    """Adds a configuration and those inside it."""
    if hasattr(config, "_attn_implementation_internal") and id(config) not in configs:
        configs[id(config)] = config
        for part in vars(config).values():
            _collect(part, configs)
