"""Finding the decoder blocks of a model and describing its shape."""

from __future__ import annotations

from typing import Any

from torch import nn

from ma_monitor.errors import ModelError
from ma_monitor.runs.records import ModelShape


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a model, in order.

    The list looked for lies under ``get_decoder()`` (the whole model where that gives nothing usable) and is as long as
    the configuration is deep: a vision tower or an expert list next to it is not taken for the decoder.

    Args:
        model: A transformers model, PEFT-wrapped or compiled ones included, or any module with such a list.

    Raises:
        ModelError: If no list, or more than one, has the depth of the configuration.
    """
    model = getattr(model, "_orig_mod", model)
    depths: list[int | None] = [*_depths(model)] or [None]
    searched = []
    for root in _roots(model):
        lists = {name: m for name, m in root.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
        for depth in depths:
            deep = {name: m for name, m in lists.items() if depth is None or len(m) == depth}
            outer = [m for name, m in deep.items() if not any(name.startswith(f"{other}.") for other in deep)]
            if len(outer) == 1:
                return outer[0]
        searched.append(f"{type(root).__name__} has {sorted((name, len(m)) for name, m in lists.items()) or 'none'}")
    wanted = " or ".join(str(depth) for depth in depths if depth) or "its"
    raise ModelError(
        f"a model must hold exactly one list of {wanted} blocks to be measured; found as lists of modules: "
        f"{'; '.join(searched)}. Pass the model whose blocks you mean."
    )


def describe_model(model: nn.Module) -> ModelShape:
    """The shape that decides whether two runs can be one.

    Raises:
        ModelError: If the decoder blocks cannot be found.
    """
    layers = len(find_layers(model))
    config = _text_config(model)

    def number(name: str) -> int | None:
        value = getattr(config, name, None)
        return value if isinstance(value, int) else None

    family = getattr(config, "model_type", None)
    return ModelShape(
        # never a path or a class: copies of one model, wrapped or not, must be able to share a run
        name=family or type(model).__name__,
        family=family,
        layers=layers,
        width=number("hidden_size"),
        heads=_decoder_number(model, "decoder_attention_heads") or number("num_attention_heads"),
        vocabulary=number("vocab_size"),
        parameters=_parameter_count(model),
    )


def context_length(model: nn.Module) -> int | None:
    """Longest sequence the model's positions allow, None where the configuration does not say."""
    value = getattr(_text_config(model), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _roots(model: nn.Module) -> list[nn.Module]:
    """Where to look for the blocks: the decoder first, the whole model after."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return [decoder, model] if isinstance(decoder, nn.Module) and decoder is not model else [model]


def _text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder, None where a model has no transformers configuration."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config(decoder=True) if callable(get_text_config) else config


def _decoder_number(model: nn.Module, name: str) -> int | None:
    """What BART's or T5's configuration says of the decoder; the text configuration drops or mislays these."""
    value = getattr(getattr(model, "config", None), name, None)
    return value if isinstance(value, int) else None


def _depths(model: nn.Module) -> list[int]:
    """How many decoder blocks the configuration speaks of, the decoder's own number first; empty if of none.

    The second is for an encoder alone, whose configuration still describes the decoder that it came with.
    """
    own = [_decoder_number(model, name) for name in ("decoder_layers", "num_decoder_layers")]
    depth = getattr(_text_config(model), "num_hidden_layers", None)
    return list(dict.fromkeys(d for d in (*own, depth) if isinstance(d, int)))


def needs_every_rank(model: nn.Module) -> bool:
    """Whether a forward is a collective operation: parameters are sharded over processes (FSDP, ZeRO-3, TP)."""
    return _is_fsdp1(model) or any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())


def _is_fsdp1(model: nn.Module) -> bool:
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def _parameter_count(model: nn.Module) -> int | None:
    """Parameters of the whole model; None under FSDP1, where a process sees its own share only."""
    if _is_fsdp1(model):
        return None
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters())  # ZeRO-3 keeps the size apart
