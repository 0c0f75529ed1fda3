"""Measurements that others have published, as runs.

Two layouts are read. The paper's data: ``pythia_<size>/stats/exp2_<model>_step<N>``, a text file a step with a literal
list ``[n][k + 1][L]``: per sequence a row of layers for each rank, largest first, and last the median. And a ``.npz``
with ``steps [T]``, ``stats [T, n, k + 1, L]`` and optionally the learning rate ``lr``.

Only magnitudes are known of such data: no places, no layer 0, no probe. What is malformed is named and left out.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.errors import SourceError
from ma_monitor.runs.codec import LAST_STEP
from ma_monitor.runs.documents import refuse_run
from ma_monitor.runs.files import opened_arrays, parse_json, read_bounded
from ma_monitor.runs.records import Measurements, ModelShape, Plan, ProbeInfo, Ratio, RunMeta
from ma_monitor.runs.store import Run

TEXT_LIMIT = 32 * 2**20
"""Bytes of one step's text file at most; the published ones have some thousands."""

_STEP_FILE = re.compile(r"exp2_.+_step([0-9]{1,15})")
_BARE = {"nan": "NaN", "inf": "Infinity"}


@dataclass(frozen=True)
class Published:
    """What was found of one model.

    Attributes:
        name: The model's folder, or the file without ``.npz``.
        measurements: What could be read, in step order, all of one shape.
        plan: The schedule, where the data tell it.
        problems: What could not be read, by name.
    """

    name: str
    measurements: tuple[Measurements, ...]
    plan: Plan | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """A run made of published data; ``path`` is None where nothing of a model could be read."""

    name: str
    path: Path | None
    steps: int
    problems: tuple[str, ...]


def read_published(path: str | Path) -> list[Published]:
    """Reads published measurements.

    Args:
        path: A ``.npz`` file, a model's folder, its ``stats`` folder, or a folder of several of these.

    Returns:
        One entry a model, by name.

    Raises:
        SourceError: If nothing is there, or nothing usable.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise SourceError(f"{path}: no measurements, for there is no such file or folder")
        models = [_read_model(path)] if _is_model(path) else [_read_model(c) for c in _children(path) if _is_model(c)]
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not any(model.measurements for model in models):
        problems = "; ".join(problem for model in models for problem in model.problems[:3])
        raise SourceError(
            f"{path}: no measurements; expected pythia_<size>/stats/exp2_<model>_step<N> or a .npz with `steps` and "
            f"`stats`{', found: ' + problems if problems else ''}"
        )
    return models


def published_files(names: Iterable[str]) -> tuple[str, list[str]]:
    """Finds published measurements among the file names of a repository, at any depth.

    Args:
        names: Paths with slashes, relative to the repository's root.

    Returns:
        The folder that `read_published` reads (empty for the root), and every file beside a step's file.
    """
    paths = [PurePosixPath(name) for name in names]
    folders = {path.parent for path in paths if _STEP_FILE.fullmatch(path.name)}
    models = [folder.parent if folder.name == "stats" else folder for folder in folders]
    root = posixpath.commonpath(models) if models else ""
    return root, [str(path) for path in paths if path.parent in folders]


def import_run(
    path: str | Path, out: str | Path, *, ratio: Ratio = "ratio_of_means", source: str = "published data"
) -> list[Imported]:
    """Makes runs of published measurements.

    Args:
        path: What `read_published` reads.
        out: Directory of the run; of several models, ``out/<model>`` each.
        ratio: How sequences are reduced.
        source: Where the measurements are from, in words, for the run's metadata.

    Raises:
        SourceError: If nothing usable is there, or two models have one name (then no run is made).
        StoreError: If a run is there already (then none is made), or the disk refuses.
    """
    models = read_published(path)
    targets = [Path(out) if len(models) == 1 else Path(out) / model.name for model in models]
    for target, count in Counter(targets).items():
        if count > 1:
            raise SourceError(
                f"{path}: each model becomes a run of its name, but {count} would be {target}; rename one"
            )
        refuse_run(target)
    return [_write(model, target, ratio, source) for model, target in zip(models, targets, strict=True)]


def _write(model: Published, target: Path, ratio: Ratio, source: str) -> Imported:
    if not model.measurements:
        return Imported(model.name, None, 0, model.problems)
    layers, sequences, ranks = model.measurements[0].top.shape
    meta = RunMeta(
        model=ModelShape(model.name, None, layers, None, None, None, None),
        probe=ProbeInfo(hash=None, sequences=sequences, length=None, source=source),
        k=ranks,
        first_layer=1,
        ratio=ratio,
        precision="unknown",
    )
    with Run.create(target, meta, model.plan) as run:
        for m in model.measurements:
            run.append(m)
        for problem in model.problems:
            run.event("left out", problem)
        run.event("final", f"{len(model.measurements)} steps imported")
    return Imported(model.name, target, len(model.measurements), model.problems)


def _children(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else []


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return (path / "stats").is_dir() or any(_STEP_FILE.fullmatch(child.name) for child in path.iterdir())
    return path.suffix == ".npz"


def _read_model(path: Path) -> Published:
    if path.suffix == ".npz" and path.is_file():
        return _read_npz(path)
    stats = path / "stats" if (path / "stats").is_dir() else path
    found: list[tuple[str, Measurements]] = []
    problems: list[str] = []
    for file in _children(stats):
        match = _STEP_FILE.fullmatch(file.name)
        if match is None:
            problems.append(f"{file.name}: the name is not exp2_<model>_step<N>")
            continue
        try:
            found.append((file.name, _measurements(int(match[1]), _literal(file))))
        except (ValueError, OSError) as error:
            problems.append(f"{file.name}: {error.strerror if isinstance(error, OSError) else error}")
    kept, odd = _consistent(found)
    return Published(
        stats.resolve().parent.name if stats.name == "stats" else stats.name, kept, None, (*problems, *odd)
    )


def _literal(file: Path) -> Any:
    """The value of a text file that holds one list of numbers, as Python or JSON write it.

    Raises:
        ValueError: If it is none, or too large.
    """
    text = read_bounded(file, TEXT_LIMIT).decode()
    try:
        return parse_json(re.sub(r"\b(nan|inf)\b", lambda word: _BARE[word[0]], text))
    except ValueError as error:
        raise ValueError(f"not a literal list ({type(error.__cause__ or error).__name__})") from error


def _measurements(step: int, value: Any) -> Measurements:
    """The measurements of one step.

    Args:
        step: Optimizer updates done.
        value: ``[n][k + 1][L]``, nested lists or an array.

    Raises:
        ValueError: If it is something else.
    """
    try:
        stats = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise ValueError("the lists are ragged, expected [sequence][rank…, median][layer]") from error
    if stats.dtype.kind not in "iuf" or stats.ndim != 3 or stats.shape[1] < 2 or 0 in stats.shape:
        raise ValueError(
            f"expected numbers [sequence][rank…, median][layer], got {stats.dtype.name} of shape {stats.shape}"
        )
    if not 0 <= step <= LAST_STEP:
        raise ValueError(f"a step is a whole number from 0 to {LAST_STEP}")
    stats = stats.astype(np.float64).transpose(2, 0, 1)  # [L, n, k + 1]
    if (stats < 0).any():
        raise ValueError("holds negative numbers where magnitudes are expected")
    if (stats[..., 1:] > stats[..., :-1]).any():
        raise ValueError("the ranks and the median do not fall, so the rows are not top-1, top-2, …, median")
    return Measurements.from_statistics(step, stats[..., :-1], stats[..., -1])


def _consistent(found: list[tuple[str, Measurements]]) -> tuple[tuple[Measurements, ...], list[str]]:
    """Keeps what has the most frequent shape, one for each step, in step order; names the rest."""
    shapes = Counter(m.top.shape for _, m in found)
    common = shapes.most_common(1)[0][0] if shapes else ()
    kept: dict[int, Measurements] = {}
    problems = []
    for name, m in found:
        if m.top.shape != common:
            problems.append(f"{name}: [layer, sequence, rank] is {m.top.shape}, most steps have {common}")
        elif m.step in kept:
            problems.append(f"{name}: step {m.step} is there twice")
        else:
            kept[m.step] = m
    return tuple(kept[step] for step in sorted(kept)), problems


def _read_npz(path: Path) -> Published:
    problems: list[str] = []
    found: list[tuple[str, Measurements]] = []
    plan = None
    try:
        with opened_arrays(path) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("holds one array, not an archive of several")
            steps, stats = _steps_and_stats(arrays)
            try:
                plan = _plan(arrays["lr"], int(steps.max())) if "lr" in arrays else None
            except Exception as error:  # zipfile and zlib raise anything; the rest of the archive may be in order
                problems.append(f"{path.name}: lr: {error}")
    except (OSError, ValueError) as error:
        return Published(path.stem, (), None, (f"{path.name}: {error}",))
    for index, step in enumerate(steps.tolist()):
        name = f"{path.name}: steps[{index}] = {step}"
        try:
            found.append((name, _measurements(step, stats[index])))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    kept, odd = _consistent(found)
    return Published(path.stem, kept, plan, (*problems, *odd))


def _steps_and_stats(arrays: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    if "steps" not in arrays or "stats" not in arrays:
        raise ValueError("needs the arrays `steps` and `stats`")
    steps, stats = arrays["steps"], arrays["stats"]
    if steps.dtype.kind not in "iu" or steps.ndim != 1 or stats.ndim != 4 or len(steps) != len(stats) or not len(steps):
        raise ValueError(
            f"needs steps [T] as whole numbers and stats [T, n, k + 1, L], "
            f"got {steps.dtype.name} {steps.shape} and {stats.shape}"
        )
    return steps.astype(np.int64), stats


def _plan(lr: NDArray[Any], last_step: int) -> Plan:
    """The plan of a learning-rate array ``lr[s]``, s = 0 … planned steps − 1, or one more.

    Raises:
        ValueError: If it is no schedule for a training that reached ``last_step``.
    """
    if lr.ndim != 1 or lr.dtype.kind not in "iuf" or len(lr) < max(last_step, 1):
        raise ValueError(f"must hold a rate for every planned step, at least {last_step}, got shape {lr.shape}")
    rates = lr.astype(np.float64)
    if not np.isfinite(rates).all() or (rates < 0).any():
        raise ValueError("the rates must be finite and at least 0")
    total = len(rates) if last_step == len(rates) else len(rates) - 1
    return Plan(from_step=0, total_steps=total, lr=rates, batch=None, schedule="from the published `lr`")
