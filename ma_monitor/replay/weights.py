"""A checkpoint's tensors poured, one after the other, into a model that is already in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ma_monitor.errors import SourceError
from ma_monitor.replay.sources import weight_files

Stored = Mapping[str, Callable[[], Tensor]]
"""Name of each tensor of a checkpoint → what reads it."""

READERS = 4
"""Tensors on their way at once: enough to keep a disk busy, few enough that they weigh little beside the model."""
SAMPLED = 1024
"""Entries of a tensor that are looked at to tell whether two are the same."""


@contextmanager
def stored_tensors(folder: Path) -> Iterator[Stored]:
    """The tensors of a checkpoint, none of them read yet; nothing but tensors is ever unpickled."""
    with ExitStack() as files:
        found: dict[str, Callable[[], Tensor]] = {}
        for file in weight_files(folder):
            if file.suffix == ".bin":
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                found |= {name: partial(loaded.__getitem__, name) for name in loaded}
            else:
                opened = files.enter_context(safe_open(file, framework="pt"))
                found |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
        yield found


def fingerprint(folder: Path) -> str | None:
    """A digest of the first numbers of each matrix of a checkpoint: the same for a copy, another for other weights.

    Not of vectors: of those some formats hold constants that others do not. None where they cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with stored_tensors(folder) as stored:
            for name in sorted(stored):
                tensor = stored[name]()
                if tensor.dim() > 1 and tensor.is_floating_point():
                    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                    digest.update(tensor.flatten()[:SAMPLED].view(torch.uint8).numpy().tobytes())
    except Exception:  # each format of weights has its own errors; whoever loads them explains
        return None
    return digest.hexdigest()[:16]


def places(stored: Stored, entries: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint belongs in the model that has just been loaded from it.

    A tensor belongs to the entry of its name, or of its name behind the base model's prefix, if shape and numbers are
    the same: whatever transformers renames or converts on the way (heads, fused experts) is seen not to be there.

    Args:
        stored: The checkpoint's tensors.
        entries: The model's ``state_dict``.
        prefix: Of the base model's entries, such as ``gpt_neox``.

    Returns:
        Name in the checkpoint → the model's own memory. Tensors and entries without a match are left out.
    """
    named = {name: entries.get(name, entries.get(f"{prefix}.{name}")) for name in stored}
    return {name: entry for name, entry in named.items() if entry is not None and _same(stored[name](), entry)}


def pour(stored: Stored, into: Mapping[str, Tensor]) -> None:
    """Copies a checkpoint's tensors over a model's, in the model's dtype and on its device.

    No more than `READERS` tensors are in memory besides the model. After an error the model holds a mixture and must
    be poured into again.

    Raises:
        SourceError: If a tensor is of another shape than its place.
    """

    def copy(name: str) -> None:
        tensor, place = stored[name](), into[name]
        if tensor.shape != place.shape:
            raise SourceError(f"its {name} has the shape {list(tensor.shape)} instead of {list(place.shape)}")
        # A conversion of many gigabytes belongs on the device; a plain copy needs no second place there.
        place.copy_(tensor if tensor.dtype == place.dtype else tensor.to(place.device))

    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:
        list(readers.map(copy, into))


def own_memory(model: torch.nn.Module, stored: Stored) -> None:
    """Moves what lies in a mapped file into the process's own memory.

    On a CPU transformers lends parameters of the checkpoint's dtype the pages of its file, which is soon to be deleted,
    or may be cut by whoever writes it.
    """
    dtypes = {read().dtype for read in stored.values()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.dtype in dtypes:
            tensor.data = tensor.data.clone()


def _same(stored: Tensor, entry: Tensor) -> bool:
    """Whether two tensors have the same shape and, as far as a sample tells, the same numbers."""
    if stored.shape != entry.shape:
        return False
    stride = max(1, stored.numel() // SAMPLED)
    return torch.equal(stored.flatten()[::stride].to(entry.dtype), entry.flatten()[::stride].cpu())
