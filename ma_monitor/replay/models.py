"""A model from the files of a checkpoint: no pickled code, no remote code, no weights that were not in the files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ma_monitor.errors import ConfigError, SourceError
from ma_monitor.measure.layers import describe_model
from ma_monitor.replay.weights import Stored, own_memory, places, pour, stored_tensors
from ma_monitor.runs.files import parse_json, read_bounded
from ma_monitor.runs.records import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LARGEST_IN_FLOAT32 = 1_500_000_000
"""Parameters; Pythia-1.4B has 1.41e9, the next larger one 2.78e9."""
COUNTS, MOST = re.compile(r"((^|_)n(um)?_.*(layers?|experts|blocks)|layers|depths?)$"), 4096
"""What in a configuration counts parts, which cost time and memory even without weights, and how many at most."""
INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""What may differ between the configurations of two checkpoints of one model."""


class ModelLoader:
    """Loads checkpoint after checkpoint of one training into one model.

    transformers loads the first. What has the same configuration and tensors of the same names after that is poured
    into that model's own memory (a head, which nothing measured depends on, may stay the first one's); whatever differs
    is loaded by transformers again, once the old model is gone.

    Attributes:
        dtype: What weights are converted to; None until the first checkpoint tells how large the model is.
        shape: Of the first model; checkpoints of another are refused.
    """

    def __init__(self, dtype: torch.dtype | None, device: torch.device) -> None:
        """Takes the dtype (None for `default_dtype`) and where weights go."""
        self.dtype = dtype
        self.shape: ModelShape | None = None
        self._device = device
        self._model: PreTrainedModel | None = None
        self._facts: dict[str, Any] = {}
        self._places: Mapping[str, Tensor] = {}
        self._names: Set[str] = frozenset()

    def load(self, folder: Path) -> PreTrainedModel:
        """The model with a checkpoint's weights, in evaluation mode; what was given before has them too.

        Args:
            folder: Holds ``config.json`` and weights: safetensors, or ``.bin`` of tensors alone.

        Raises:
            SourceError: If the files cannot be read as a model of the same shape as before, or lack weights of the
                residual stream, which would be left at random values, or hold some that the model has no place for.
        """
        facts = {key: value for key, value in _configuration(folder).to_dict().items() if key not in INCIDENTAL}
        if facts != self._facts:
            self._check_shape(blank_model(folder))
        try:
            with stored_tensors(folder) as stored:
                if self._model is not None and facts == self._facts and stored.keys() == self._names:
                    pour(stored, self._places)
                    return self._model
                self.release()
                self._model = _from_pretrained(folder, self.dtype, self._device)
                self._facts = facts
                self._learn(self._model, stored)
        except SourceError:
            raise
        except Exception as error:  # each format of weights has its own errors, down to those of its Rust library
            raise SourceError(f"its weights cannot be read ({_words(error)})") from error
        return self._model

    def _check_shape(self, blank: PreTrainedModel) -> None:
        """Refuses a model of another shape than the first, which also tells the dtype."""
        shape = describe_model(blank)
        if self.shape not in (None, shape):
            raise SourceError("its model is of another shape than the one before")
        self.shape, self.dtype = shape, self.dtype or default_dtype(blank)

    def release(self) -> None:
        """Gives the model's memory back."""
        old: nn.Module | None = self._model
        if old is not None:
            old.to("meta")
        self._model, self._places, self._names = None, {}, frozenset()

    def _learn(self, model: PreTrainedModel, stored: Stored) -> None:
        """Where the next checkpoint's tensors go; nowhere if what is measured would not be covered."""
        own_memory(model, stored)
        entries = model.state_dict()
        self._places = places(stored, entries, model.base_model_prefix)
        covered = {place.data_ptr() for place in self._places.values()}
        whole = all(e.data_ptr() in covered for name, e in entries.items() if _shapes_the_stream(name, model))
        self._names = set(stored) if whole else set()


def default_dtype(model: nn.Module) -> torch.dtype:
    """float32 up to the size of Pythia-1.4B, bfloat16 above: never float16, which ends at 65504."""
    return torch.float32 if sum(p.numel() for p in model.parameters()) <= LARGEST_IN_FLOAT32 else torch.bfloat16


def _from_pretrained(folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """The model of a checkpoint as transformers loads it."""
    model, info = _class_for(_configuration(folder)).from_pretrained(
        folder, dtype=dtype, device_map=device, trust_remote_code=False, weights_only=True, output_loading_info=True
    )
    if missing := [key for key in info["missing_keys"] if _shapes_the_stream(key, model)]:
        raise SourceError(f"its weights lack {_some(missing)}")
    # A bare model has no place for the heads of whatever model was saved, which do not matter.
    if foreign := [key for key in info["unexpected_keys"] if key.startswith(f"{model.base_model_prefix}.")]:
        raise SourceError(f"the model of its config.json has no place for {_some(foreign)} among its weights")
    loaded: PreTrainedModel = model
    return loaded


def blank_model(folder: Path) -> PreTrainedModel:
    """A model of the checkpoint's shape without any weights: only ``config.json`` is read.

    Raises:
        SourceError: If there is no configuration that transformers knows and can make a model of.
    """
    configuration = _configuration(folder)
    try:
        return _blank(configuration)
    except Exception as error:  # numbers that fit no model fail anywhere in it
        raise SourceError(f"its config.json describes no model ({_words(error)})") from error


def _blank(configuration: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = _class_for(configuration).from_config(configuration, trust_remote_code=False)
    return model


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype meant, None for None or ``auto``, which is `default_dtype`.

    Raises:
        ConfigError: If it is not one of floating point.
    """
    if dtype in (None, "auto"):
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"`dtype` must be auto, float32, bfloat16, float16 or float64, got {dtype!r}")
    return found


def checked_device(device: str) -> torch.device:
    """The device meant.

    Raises:
        ConfigError: If torch has no such device here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise ConfigError(f"`device` must be one that torch finds here, got {device!r} ({_words(error)})") from error


def _configuration(folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        check_demands(parse_json(read_bounded(folder / "config.json")))
        configuration: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except SourceError:
        raise
    except Exception as error:  # a configuration is free text to transformers: it fails in as many ways
        raise SourceError(f"its config.json cannot be used ({_words(error)})") from error
    return configuration


def check_demands(words: Any) -> None:
    """Refuses a configuration that asks for code from elsewhere, or for more parts than any model has.

    Raises:
        SourceError: If it does.
    """
    for key, value in words.items() if isinstance(words, dict) else ():
        if key.endswith("_implementation") and "/" in str(value):
            raise SourceError(
                f"its config.json asks for code from the Hub, which is not run ({key}: {str(value)[:80]})"
            )
        if COUNTS.search(key) and isinstance(value, int | float) and value > MOST:
            raise SourceError(f"its config.json asks for more than {MOST:,} parts of a kind ({key}: {value:.4g})")
        check_demands(value)


def _class_for(configuration: PreTrainedConfig) -> Any:
    """With a causal head where the architecture has one, else the bare model: the residual stream is the same."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return AutoModelForCausalLM if type(configuration) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel


def _shapes_the_stream(key: str, model: PreTrainedModel) -> bool:
    """Whether a weight can change what is measured: all of the base model, but no head and no pooler on top."""
    in_base = model.base_model is model or key.startswith(f"{model.base_model_prefix}.")
    return in_base and "pooler" not in key.split(".")


def _some(names: Sequence[str]) -> str:
    """The first three names."""
    return f"{', '.join(sorted(names)[:3])}{' and more' if len(names) > 3 else ''}"


def _words(error: Exception) -> str:
    """An error's type and first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
