"""What a configuration says about a model, and the numbers that predictors see of it: the paper's Table 4 and more.

Nothing here needs weights: a model is built without memory only to count its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Floats = NDArray[np.float64]

TABLE_4 = (
    "layer position",
    "layer position²",
    "layer position³",
    "layer position^½",
    "heads / width",
    "MLP / width",
    "width / depth",
    "heads / depth",
    "log width",
    "layer × depth",
)
"""The paper's Table 4, in its order: ℓ/L, (ℓ/L)², (ℓ/L)³, √(ℓ/L), H/d, d_ff/d, d/L, H/L, ln d, ℓL."""
FURTHER = (
    "rotary share",
    "log rotary base",
    "log vocabulary",
    "log parameters",
    "head size",
    "RMS norm",
)
"""What the paper's Methods name besides (rotary share and base, logarithms of large numbers), head size and norm."""
FEATURES = TABLE_4 + FURTHER

_MLP = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_FOURFOLD = ("bloom", "mpt")
"""Families whose MLP is four times as wide as the model without the configuration saying so."""


@dataclass(frozen=True)
class Shape:
    """The architecture of a decoder-only language model.

    Attributes:
        layers: Decoder blocks, L.
        width: Width of the residual stream, d.
        heads: Query heads of a block, H.
        mlp: Width inside a block's MLP, d_ff.
        head_size: Channels of a head.
        vocabulary: Tokens known.
        parameters: All, embeddings included.
        rotary_share: Share of a head's channels with rotary positions; 0 where there are none.
        rotary_base: Base of the rotary angles; 1 where there are none.
        rms_norm: Whether norms are RMS norms, else layer norms.
    """

    layers: int
    width: int
    heads: int
    mlp: int
    head_size: int
    vocabulary: int
    parameters: int
    rotary_share: float
    rotary_base: float
    rms_norm: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def layer_features(shape: Shape) -> Floats:
    """The numbers of every layer: ``[L, len(FEATURES)]``, columns as in ``FEATURES``."""
    s = shape
    layer = np.arange(1, s.layers + 1, dtype=np.float64)
    place = layer / s.layers
    of_model = (
        s.heads / s.width,
        s.mlp / s.width,
        s.width / s.layers,
        s.heads / s.layers,
        np.log(s.width),
    )
    further = (
        s.rotary_share,
        np.log(s.rotary_base),
        np.log(s.vocabulary),
        np.log(s.parameters),
        s.head_size,
        float(s.rms_norm),
    )
    columns = (place, place**2, place**3, np.sqrt(place), *of_model, layer * s.layers, *further)
    return np.stack([np.broadcast_to(np.asarray(column, dtype=np.float64), layer.shape) for column in columns], axis=1)


def shape_of(config: PreTrainedConfig) -> Shape:
    """The shape that a transformers configuration describes, of any family of decoder-only language models.

    Raises:
        ConfigError: If it is none of such a model, or lacks a number that the features need.
    """
    text = config.get_text_config(decoder=True)
    layers = _number(text, "num_hidden_layers")
    width = _number(text, "hidden_size")
    heads = _number(text, "num_attention_heads")
    vocabulary = _number(text, "vocab_size")
    own = getattr(text, "head_dim", None)
    head_size = own if isinstance(own, int) else width // heads
    share, base = _rotary(text, head_size)
    return Shape(
        layers=layers,
        width=width,
        heads=heads,
        mlp=_mlp(text, width),
        head_size=head_size,
        vocabulary=vocabulary,
        parameters=_parameters(text),
        rotary_share=share,
        rotary_base=base,
        rms_norm=getattr(text, "rms_norm_eps", None) is not None,
    )


def _number(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"a prediction needs `{name}` as one whole number of at least 1, and this {config.model_type} "
            f"configuration has {value!r}; give {name}=… or predict for a decoder-only transformer"
        )
    return value


def _mlp(config: PreTrainedConfig, width: int) -> int:
    """Width inside the MLP, under whatever name; where that is empty, transformers takes four times the model's."""
    held = [name for name in _MLP if hasattr(config, name)]
    given = [name for name in held if getattr(config, name) is not None]
    if config.model_type in _FOURFOLD or (held and not given):
        return 4 * width
    if not given:
        raise ConfigError(
            f"a prediction needs the width of the MLP, and this {config.model_type} configuration has none of "
            f"{', '.join(_MLP)}; give intermediate_size=…"
        )
    return _number(config, given[0])


def _rotary(config: PreTrainedConfig, head_size: int) -> tuple[float, float]:
    """Share of a head's channels that carry rotary positions, and their base; (0, 1) for other positions.

    Where layers differ in base (sliding and full attention), the largest counts.
    """
    kinds = getattr(config, "rope_parameters", None) or {}
    nested = [kind for kind in kinds.values() if isinstance(kind, Mapping)] if isinstance(kinds, Mapping) else []
    found = nested or ([kinds] if kinds else [])
    dimension = getattr(config, "rotary_dim", None)
    if isinstance(dimension, int):  # GPT-J and CodeGen, whose base is fixed in code
        return dimension / head_size, 10_000.0
    bases = [float(kind["rope_theta"]) for kind in found if kind.get("rope_theta")]
    if not bases:
        return 0.0, 1.0
    shares = [float(kind.get("partial_rotary_factor") or 1.0) for kind in found]
    return max(shares), max(bases)


def _parameters(config: PreTrainedConfig) -> int:
    """Number of parameters, of a model without memory."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or encoder or config.is_encoder_decoder:
        raise ConfigError(
            f"a prediction is for decoder-only language models, and a {config.model_type!r} configuration is for none"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a configuration is free numbers to transformers: it fails in as many ways
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"no {config.model_type} model can be built of this configuration: {reason}") from error
    return sum(parameter.numel() for parameter in model.parameters())


SHORT = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "vocabulary": "vocab_size",
}
"""Short names of what a shape is asked to have instead → what transformers calls it."""
_DERIVED = ("head_dim", "num_key_value_heads", "layer_types", "mlp_layer_types")
"""What follows from the other numbers unless a configuration says otherwise, and is dropped when they change."""


def changed(config: PreTrainedConfig, changes: Mapping[str, float]) -> PreTrainedConfig:
    """The configuration with other numbers: names as in ``SHORT`` or as transformers has them.

    A new width keeps the MLP's ratio to it. What follows from depth, width and heads follows the new ones.

    Raises:
        ConfigError: If the configuration has no such number.
    """
    text = config.get_text_config(decoder=True)
    wanted = {SHORT.get(name, name): value for name, value in changes.items()}
    if text.model_type in _FOURFOLD and "intermediate_size" in wanted:
        raise ConfigError(f"the MLP of a {text.model_type} model is four times as wide as the model; leave mlp=… out")
    if "hidden_size" in wanted and text.model_type not in _FOURFOLD:
        ratio = _mlp(text, _number(text, "hidden_size")) / _number(text, "hidden_size")
        wanted.setdefault("intermediate_size", round(ratio * wanted["hidden_size"]))
    numbers = text.to_dict()
    moved = any(name in wanted for name in list(SHORT.values())[:3])
    for name in _DERIVED if moved else ():
        numbers.pop(name, None)
    for name, value in wanted.items():
        key = _mlp_name(text) if name == "intermediate_size" else text.attribute_map.get(name, name)
        if key not in numbers and key not in SHORT.values():
            raise ConfigError(
                f"a {text.model_type} configuration has no number {name!r}; give one of {', '.join(SHORT)}"
            )
        numbers[key] = value
    try:
        return type(text).from_dict(numbers)
    except Exception as error:  # a configuration checks its numbers in its own ways
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"a {text.model_type} configuration cannot have {dict(changes)}: {reason}") from error


def _mlp_name(config: PreTrainedConfig) -> str:
    """Under which name a configuration holds the width of its MLP."""
    held = [name for name in _MLP if hasattr(config, name)]
    return next((name for name in held if getattr(config, name) is not None), held[0] if held else _MLP[0])
