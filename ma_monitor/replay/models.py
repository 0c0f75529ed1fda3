"""A model from the files of a checkpoint: no pickled code, no remote code, no weights that were not in the files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_monitor.errors import ConfigError, SourceError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model of a checkpoint, in evaluation mode.

    Args:
        folder: Holds ``config.json`` and weights: safetensors, or ``.bin`` of tensors alone.
        dtype: What the weights are converted to.
        device: Where they go, without a stay in the host's memory.

    Raises:
        SourceError: If the files cannot be read as a model, or lack weights of the residual stream, which would be
            left at random values.
    """
    try:
        model, info = _class_for(_configuration(folder)).from_pretrained(
            folder, dtype=dtype, device_map=device, trust_remote_code=False, weights_only=True, output_loading_info=True
        )
    except SourceError:
        raise
    except Exception as error:  # each format of weights has its own errors, down to those of its Rust library
        raise SourceError(f"its weights cannot be read ({_words(error)})") from error
    missing = sorted(key for key in info["missing_keys"] if _shapes_the_stream(key, model))
    if missing:
        raise SourceError(f"its weights lack {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}")
    loaded: PreTrainedModel = model
    return loaded


def blank_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the checkpoint's shape without any weights: only ``config.json`` is read.

    Raises:
        SourceError: If there is no configuration that transformers knows.
    """
    import torch

    configuration = _configuration(folder)
    with torch.device("meta"):
        model: PreTrainedModel = _class_for(configuration).from_config(configuration, dtype=dtype)
    return model


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype meant, float32 for None.

    Raises:
        ConfigError: If it is not one of floating point.
    """
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"`dtype` must be float32, bfloat16, float16 or float64, got {dtype!r}")
    return found


def checked_device(device: str) -> torch.device:
    """The device meant.

    Raises:
        ConfigError: If torch has no such device here.
    """
    import torch

    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise ConfigError(f"`device` must be one that torch finds here, got {device!r} ({_words(error)})") from error


def _configuration(folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        configuration: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a configuration is free text to transformers: it fails in as many ways
        raise SourceError(f"its config.json cannot be used ({_words(error)})") from error
    return configuration


def _class_for(configuration: PreTrainedConfig) -> Any:
    """With a causal head where the architecture has one, else the bare model: the residual stream is the same."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return AutoModelForCausalLM if type(configuration) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel


def _shapes_the_stream(key: str, model: PreTrainedModel) -> bool:
    """Whether a weight can change what is measured: all of the base model, but no head and no pooler on top."""
    in_base = model.base_model is model or key.startswith(f"{model.base_model_prefix}.")
    return in_base and "pooler" not in key.split(".")


def _words(error: Exception) -> str:
    """An error's type and first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
