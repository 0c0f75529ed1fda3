"""Running the probe through a model without leaving a trace, and reading each block's output on the way."""

from __future__ import annotations

import functools
import inspect
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ma_monitor.errors import ModelError
from ma_monitor.measure.distributed import Team, resharded
from ma_monitor.measure.layers import find_layers
from ma_monitor.measure.probe import Probe
from ma_monitor.measure.sharded import statistics_of
from ma_monitor.runs.records import Measurements


def measure(
    model: nn.Module, probe: Probe, step: int, *, k: int, batch_size: int | None = None, team: Team | None = None
) -> Measurements:
    """Runs the probe and gives the measurements of h_0 … h_L.

    Training goes on exactly as if this had not happened: evaluation mode, no gradients, random states and training
    flags restored, own hooks that are gone afterwards, no compilation.

    Args:
        model: A transformers model as the training calls it, so that its autocast applies; may be compiled or wrapped.
        probe: What to run.
        step: Optimizer updates done.
        k: Largest entries kept per sequence.
        batch_size: Sequences per forward; None for all at once.
        team: The processes that measure with this one, each of which calls this; None for this one alone. All get the
            same measurements, or all raise.

    Raises:
        ModelError: If the blocks cannot be found, one of them did not run, or its output is not a residual stream.
    """
    team = team or Team()
    batches = torch.split(torch.from_numpy(probe.ids), batch_size or len(probe.ids))
    layers = team.agreed(lambda: find_layers(model))
    turns = [min(turn, len(batches) - 1) for turn in team.turns(len(batches))]
    parts, width = team.agreed(lambda: _forwards(model, layers, [batches[turn] for turn in turns], k))
    packed = torch.zeros(len(layers) + 1, *probe.ids.shape[:1], parts[0].shape[-1], dtype=torch.long, device="cpu")
    for turn, part in zip(team.turns(len(batches)), parts, strict=True):
        if turn < len(batches):
            packed[:, turn * len(batches[0]) :][:, : part.shape[1]] = part
    return _measurements(step, team.merged(packed).numpy(), probe.ids, k, width)


@contextmanager
def reading_training(model: nn.Module, *, k: int, sequences: int) -> Iterator[Callable[[int], Measurements]]:
    """While open, the next training forward through ``model`` is read; called with its step, the result measures it.

    Nothing is run besides, and nothing is raised in that forward. One without gradients (sampling, a reference) is
    passed over. A block that runs again, as gradient checkpointing has it in the backward, counts once. The first
    ``sequences`` of the batch are read, padding and all; where it has fewer, the rest is unknown. Token ids are known
    where the model is called with those of the stream that is read.

    Args:
        model: As the training calls it, but not compiled.
        k: Largest entries kept per sequence.
        sequences: Sequences of a measurement.

    Raises:
        ModelError: If the model is compiled, or its blocks cannot be found; from the result, if one of them did not
            run, or its output was not a residual stream.
    """
    _check_not_compiled(model)
    layers = find_layers(model)
    packed: dict[int, Tensor] = {}
    found: dict[str, Any] = {"ids": None, "passed over": False}
    faults: list[Exception] = []

    def read(row: int, value: Any) -> None:
        if found["passed over"]:
            return
        try:
            hidden = _hidden(value, row)
            found["shape"] = hidden.shape
            packed[row] = statistics_of(hidden.detach()[:sequences], k).packed
        except Exception as fault:
            faults[:] = faults or [fault]
        if row == len(layers):
            hooks.close()  # at once: nothing tells of a training that fails later in its forward or in its backward

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not packed:
            seen.clear()
        found["passed over"] = bool(packed) or not torch.is_grad_enabled()  # never two forwards in one measurement
        if not found["passed over"]:
            found["ids"] = _stream_ids(model, args, kwargs)

    def measured(step: int) -> Measurements:
        _check_seen(set(packed), layers, faults)
        rows = _on_host([*map(packed.__getitem__, sorted(packed))]).numpy()
        _, length, width = found["shape"]
        ids = np.full((sequences, length), -1)
        if found["ids"] is not None and found["ids"].shape == found["shape"][:2]:
            ids[: rows.shape[1]] = found["ids"][:sequences].cpu().numpy()
        whole = np.zeros((len(rows), sequences, rows.shape[2]), dtype=np.int64)
        whole[..., :k] = whole[..., 2 * k] = np.float32(np.nan).view(np.int32)
        whole[..., k : 2 * k] = -1
        whole[:, : rows.shape[1]] = rows
        return _measurements(step, whole, ids, k, width)

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        seen = hooks.enter_context(reading_layers(layers, read))
        yield measured


def _check_not_compiled(model: nn.Module) -> None:
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise ModelError(
            'source="train_batch" cannot look into a compiled forward, and to try would compile it anew; '
            'use source="probe", which runs beside it'
        )


def _stream_ids(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The token ids of the decoder's own stream in a call of a model; None where it was called without them."""
    given = [kwargs.get("decoder_input_ids")] if _has_encoder(model) else [kwargs.get("input_ids"), *args[:1]]
    return next((ids.detach() for ids in given if isinstance(ids, Tensor)), None)


def _forwards(
    model: nn.Module, layers: nn.ModuleList, batches: Sequence[Tensor], k: int
) -> tuple[tuple[Tensor, ...], int]:
    """Runs micro-batches; gives the packed statistics ``[R, b, 2k + 3]`` of each, on the host, and the width d.

    Nothing is raised inside a forward, and every forward is run: where it is a collective operation, the other
    processes wait for this one in it.
    """
    collected: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
    widths: list[int] = []
    faults: list[Exception] = []

    def read(row: int, value: Any) -> None:
        try:
            hidden = _hidden(value, row)
            _check_positions(hidden, row, batches[0].shape[1])
            widths.append(hidden.shape[-1])
            collected[row].append(statistics_of(hidden, k).packed)
        except Exception as fault:
            faults[:] = faults or [fault]

    every: list[set[int]] = []
    for batch in batches:
        with reading_layers(layers, read) as seen:
            undisturbed_forward(model, batch)
        every.append(seen)
    _check_seen(min(every, key=len), layers, faults)
    packed = _on_host([row[0] if len(row) == 1 else torch.cat(row) for row in collected])
    return torch.split(packed, [len(batch) for batch in batches], dim=1), widths[0]


def _on_host(rows: Sequence[Tensor]) -> Tensor:
    """Statistics of h_0 … h_L, which may lie on several devices, by one transfer."""
    return torch.stack([row.to(rows[0].device) for row in rows]).cpu()


def precision_of(model: nn.Module) -> str:
    """Arithmetic of a forward through ``model``, such as ``float32`` or ``float32 under bfloat16 autocast``.

    Seen from inside a forward of two tokens, because a mixed-precision wrapper shows nowhere else. Weights say too
    little: adapters may outnumber them, quantised ones hold whole numbers, sharded ones rest in another type.

    Raises:
        ModelError: As ``measure``, and if the model does not run on token ids alone.
    """
    found: list[str] = []

    def read(row: int, value: Any) -> None:
        hidden = _hidden(value, row)
        if len(hidden) != 1:
            raise ModelError(
                f"h_{row} must have axes [sequence, token, channel], got shape {tuple(hidden.shape)} for one sequence "
                "of two tokens; a model that puts tokens first is not supported"
            )
        device = hidden.device.type
        dtype = autocast = hidden.dtype
        if torch.is_autocast_enabled(device):  # which may have cast h_0 already
            sizes = Counter[torch.dtype]()
            for p in model.parameters():
                sizes[p.dtype] += getattr(p, "ds_numel", p.numel()) if p.is_floating_point() else 0
            dtype = max(sizes, key=lambda kind: sizes[kind], default=dtype)
            autocast = torch.get_autocast_dtype(device)
        name = str(dtype).removeprefix("torch.")
        found.append(name if autocast == dtype else f"{name} under {str(autocast).removeprefix('torch.')} autocast")

    layers = find_layers(model)
    with reading_layers(layers, read) as seen:
        try:
            undisturbed_forward(model, torch.zeros(1, 2, dtype=torch.long))
        except ModelError:
            raise
        except Exception as error:
            kind: Any = type(_innermost(model))
            raise ModelError(
                f"a model must run on token ids alone to be measured; {kind.__name__} takes "
                f"{', '.join(_parameters_of_forward(kind)[:3])}, … and stopped at two tokens with "
                f"{type(error).__name__}: {error}"
            ) from error
    _check_seen(seen, layers)
    return found[0]


@contextmanager
def reading_layers(layers: nn.ModuleList, read: Any) -> Iterator[set[int]]:
    """While open, ``read(ℓ, value)`` is called in a forward, for ℓ = 0 the first block's input, else a block's output.

    Only the first run of each block in a forward counts. Gives the set of ℓ seen so far.
    """
    seen: set[int] = set()

    def take(row: int, value: Any) -> None:
        if row not in seen:
            seen.add(row)
            read(row, value)

    def before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(0, args[0] if args else kwargs.get("hidden_states"))

    def after(row: int) -> Any:
        return lambda _module, _args, output: take(row, output)

    with ExitStack() as hooks:
        hooks.callback(layers[0].register_forward_pre_hook(before_first, with_kwargs=True).remove)
        for row, layer in enumerate(layers, start=1):
            hooks.callback(layer.register_forward_hook(after(row)).remove)
        yield seen


def _check_seen(seen: set[int], layers: nn.ModuleList, faults: Sequence[Exception] = ()) -> None:
    if faults:
        raise faults[0]
    if len(seen) <= len(layers):
        raise ModelError(
            f"every block must run once in the probe's forward; of h_0 … h_{len(layers)} only {sorted(seen)} were seen"
        )


def undisturbed_forward(model: nn.Module, ids: Tensor) -> None:
    """One evaluation forward of ``ids [b, S]`` that leaves model, random states and compiled code as they were."""
    device = _input_device(model)
    ids = ids.to(device)
    modules = list(model.modules())
    with (
        resharded(modules),
        random_states_kept(device),
        _evaluation_mode(modules),
        _nothing_compiled(),
        torch.no_grad(),
    ):
        model(ids, **_forward_arguments(model, ids))


def _hidden(value: Any, row: int) -> Tensor:
    """The hidden states in what a block was given or gave: a tensor, or the first of a tuple."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        raise ModelError(
            f"h_{row} must be a tensor or the first entry of a tuple, got {type(value).__name__}; "
            "this kind of block is not supported"
        )
    if value.ndim != 3:
        raise ModelError(
            f"h_{row} must have axes [sequence, token, channel], got shape {tuple(value.shape)}; a model that keeps "
            "several streams (AltUp, hyper-connections) has no one residual stream"
        )
    return value


def _check_positions(hidden: Tensor, row: int, expected: int) -> None:
    if hidden.shape[1] != expected:
        raise ModelError(
            f"h_{row} must have a position for every token of the probe, {expected}, got {hidden.shape[1]}; "
            "a model that adds or drops positions (prompt tuning) is not supported"
        )


def _measurements(
    step: int, packed: np.ndarray[Any, Any], ids: np.ndarray[Any, Any], k: int, width: int
) -> Measurements:
    """Unpacks ``[R, n, 2k + 3]``, given the token ids ``[n, S]``."""

    def floats(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return values.astype(np.int32).view(np.float32).astype(np.float64)

    index = packed[..., k : 2 * k]
    known = index >= 0
    position = np.where(known, index // width, -1)
    token = np.where(known, np.take_along_axis(ids[None], np.maximum(position, 0), axis=2), -1)
    return Measurements(
        step=step,
        top=floats(packed[..., :k]),
        position=position.astype(np.int32),
        token=token.astype(np.int32),
        channel=np.where(known, index % width, -1).astype(np.int32),
        median=floats(packed[..., 2 * k]),
        nan=packed[..., 2 * k + 1],
        inf=packed[..., 2 * k + 2],
    )


def _input_device(model: nn.Module) -> torch.device:
    """Where the model wants its token ids."""
    get_embeddings = getattr(model, "get_input_embeddings", None)
    embeddings = get_embeddings() if callable(get_embeddings) else None
    parameter = next((embeddings if isinstance(embeddings, nn.Module) else model).parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _forward_arguments(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Arguments that make the forward cheap: no cache, and logits of one position instead of all."""
    arguments: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    if _has_encoder(model):
        arguments["decoder_input_ids"] = ids
    kind: Any = type(_innermost(model))
    accepted = _parameters_of_forward(kind)
    return {name: value for name, value in arguments.items() if name in accepted}


def _has_encoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(_innermost(model), "config", None), "is_encoder_decoder", False))


def _innermost(model: nn.Module) -> Any:
    """The model inside a compiled or adapted one."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@functools.lru_cache(maxsize=8)
def _parameters_of_forward(kind: Any) -> list[str]:
    """Read from the class, because mixed precision hides the signature behind a wrapper on the instance."""
    return list(inspect.signature(kind.forward).parameters)[1:]


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Puts back the random states of Python, numpy, torch and the model's accelerator."""
    python, numpy = random.getstate(), np.random.get_state()
    accelerator = [] if device.type == "cpu" else [device.index or 0]
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        with torch.random.fork_rng(devices=accelerator, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode; each module's own training flag is put back, since a frozen part may be in evaluation.

    Only flags are set: ``eval()`` may do more (some LoRA layers merge their weights in it), which a flag cannot undo.
    """
    in_training = [module for module in modules if module.training]
    try:
        _set_training(in_training, False)
        yield
    finally:
        _set_training(in_training, True)


def _set_training(modules: Sequence[nn.Module], training: bool) -> None:
    """Past ``nn.Module.__setattr__``, whose questions about parameters take longer than a block's launches."""
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):  # keeps its flag where only its own way reaches
            module.training = training
        else:
            object.__setattr__(module, "training", training)


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Keeps torch.compile from compiling the probe. Where dynamo was never loaded nothing can be compiled."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
