"""The planned learning rate of every update: ``lr[s]`` is the rate of the update from s to s + 1.

The only place that knows schedulers. What a schedule may be:

- a scheduler of torch, transformers or accelerate: its copy is replayed on a dummy optimizer with the same parameter
  groups, so that neither the scheduler nor the optimizer in training is touched;
- a name, with a peak rate of 1: ``constant``, ``linear``, ``cosine`` or ``wsd`` (warm-up, stable, linear decay),
  and after a colon any of ``warmup=`` and ``decay=`` (fractions of the planned updates; ``decay`` is for ``wsd``,
  and .1 unless given) and ``floor=`` (the last rate as a fraction of the peak), such as
  ``cosine:warmup=.01,floor=.1``;
- a file: ``.npy``, ``.npz`` (its ``lr``), ``.json`` (a list, an object with ``lr``, or a ``trainer_state.json``),
  ``.csv`` (one rate a line, or columns ``lr`` and perhaps ``step`` under a header);
- the rates themselves.
"""

from __future__ import annotations

import bisect
import copy
import csv
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.errors import ConfigError
from ma_monitor.runs.files import opened_arrays, parse_json, read_bounded

if TYPE_CHECKING:
    from torch.optim import Optimizer

FILES = (".npy", ".npz", ".json", ".csv")
LONGEST = 10**8
"""Most updates whose rates are listed from a file that names only some: each costs memory."""
KEYS = {
    "constant": ("warmup",),
    "linear": ("warmup", "floor"),
    "cosine": ("warmup", "floor"),
    "wsd": ("warmup", "floor", "decay"),
}
DEFAULTS = {"warmup": 0.0, "floor": 0.0, "decay": 0.1}
MOVED_BY_TRAINING = ("ReduceLROnPlateau", "GreedyLR", "AdafactorSchedule", "LayerWiseDummyScheduler")
"""Schedulers whose next rate depends on losses or on the optimizer's state, and so cannot be replayed."""


@dataclass(frozen=True)
class Rates:
    """The planned rates, and the schedule in words.

    Attributes:
        lr: ``lr[s]`` for s = 0 … planned end, ``[total_steps + 1]``; None where it is not known.
        schedule: The schedule in words, with what had to be assumed.
        held: Whether rates to come are not known, and a known one is held in their place.
    """

    lr: NDArray[np.float64] | None
    schedule: str
    held: bool = False


def planned_rates(schedule: object, total_steps: int | None, optimizer: object = None) -> Rates:
    """The learning rate of every planned update.

    Args:
        schedule: A scheduler, a name, a file or the rates (see the module); None where there is none.
        total_steps: Planned updates. None where unknown: then only a file or the rates themselves give an array.
        optimizer: The optimizer in training, for a schedule that is None or has no optimizer of its own; its present
            rate is held.

    Returns:
        The rates of the parameter group with most parameters, and the schedule in words.

    Raises:
        ConfigError: If ``total_steps`` or the schedule breaks a rule. A live scheduler never raises: what cannot be
            replayed holds its present rate, and the words say so.
    """
    if total_steps is not None and (isinstance(total_steps, bool) or total_steps < 1):
        raise ConfigError(f"the planned length must be at least 1 update, got {total_steps!r}; leave it out if unknown")
    if isinstance(schedule, Path) or (isinstance(schedule, str) and Path(schedule).suffix in FILES):
        return _from_file(Path(schedule), total_steps)
    if isinstance(schedule, str):
        return _from_name(schedule, total_steps)
    if isinstance(schedule, np.ndarray | list | tuple):
        return Rates(_checked(schedule, total_steps, "the schedule"), "given rates")
    if schedule is None and optimizer is None:
        return Rates(None, "unknown")
    if schedule is None:
        return _held(optimizer, total_steps, "no scheduler")
    return _from_scheduler(schedule, total_steps, optimizer)


# ---------------------------------------------------------------------------------------------------------- arrays


def _checked(values: object, total_steps: int | None, source: str) -> NDArray[np.float64]:
    """Rates as ``[total_steps + 1]``; the last, which no planned update uses, may be left out."""
    try:
        lr = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"rates must be numbers, but {source} holds something else ({error}); give one number an update"
        ) from error
    if lr.ndim != 1 or lr.size == 0:
        raise ConfigError(f"rates must be one list, a number an update, but {source} has shape {lr.shape}; flatten it")
    if not (np.isfinite(lr).all() and (lr >= 0).all() and (lr > 0).any()):
        raise ConfigError(
            f"rates must be finite, not negative and not all 0, but {source} breaks that; correct the rates"
        )
    if total_steps is None or lr.size == total_steps + 1:
        return lr
    if lr.size == total_steps:
        return np.append(lr, lr[-1])
    raise ConfigError(
        f"a plan of {total_steps} updates needs {total_steps} rates (or one more), but {source} has {lr.size}; "
        "give the planned length that belongs to it"
    )


def _interpolated(points: dict[float, float], total_steps: int | None, source: str) -> NDArray[np.float64]:
    """Rates known at some updates, linear between them and held beyond."""
    if not points:
        raise ConfigError(f"a schedule needs at least one learning rate, but {source} has none; give another source")
    at = np.array(sorted(points))
    total = total_steps if total_steps is not None else int(at[-1])
    if total > LONGEST:
        raise ConfigError(f"at most {LONGEST:,} rates are listed, but {source} speaks of {total:,}; correct it")
    return _checked(np.interp(np.arange(total + 1), at, [points[s] for s in at]), total, source)


# ----------------------------------------------------------------------------------------------------------- names


def _from_name(text: str, total_steps: int | None) -> Rates:
    name, options = _parsed(text)
    if total_steps is None:
        raise ConfigError(
            f"the schedule {text!r} is in fractions of the planned length, which is unknown; give total_steps"
        )
    steps = np.arange(total_steps + 1, dtype=np.float64)
    warm = math.ceil(options["warmup"] * total_steps)
    start = total_steps - math.floor(options["decay"] * total_steps) if name == "wsd" else warm
    done = np.clip((steps - start) / max(1, total_steps - start), 0.0, 1.0)
    fall = {"constant": 0.0 * done, "cosine": (1 - np.cos(np.pi * done)) / 2}.get(name, done)
    lr = 1 - (1 - options["floor"]) * fall
    lr[:warm] = steps[:warm] / max(1, warm)
    return Rates(lr, text)


def _parsed(text: str) -> tuple[str, dict[str, float]]:
    """``name:key=value,…`` as the name and every option."""
    name, _, rest = text.partition(":")
    if name not in KEYS:
        raise ConfigError(
            f"a schedule is one of {', '.join(KEYS)} or a file ({', '.join(FILES)}), got {text!r}; give one"
        )
    options = dict(DEFAULTS)
    for item in rest.split(",") if rest else ():
        key, _, value = item.partition("=")
        if key not in KEYS[name]:
            raise ConfigError(
                f"the schedule {name!r} takes {', '.join(KEYS[name])}, got {item!r} in {text!r}; leave it out"
            )
        options[key] = _fraction(value, item)
    if options["warmup"] + (options["decay"] if name == "wsd" else 0.0) > 1:
        raise ConfigError(
            f"warm-up and decay must fit into the planned length, but add up to more than 1 in {text!r}; shorten one"
        )
    return name, options


def _fraction(value: str, item: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise ConfigError(
            f"a schedule's option must be a fraction from 0 to 1, got {item!r}; write it as in 'warmup=.01'"
        )
    return number


# ----------------------------------------------------------------------------------------------------------- files


def _from_file(path: Path, total_steps: int | None) -> Rates:
    if path.suffix not in FILES:
        raise ConfigError(f"a file of rates must be one of {', '.join(FILES)}, got {path}; convert it")
    read = {".npy": _numpy, ".npz": _numpy, ".json": _json, ".csv": _csv}[path.suffix]
    try:
        return read(path, total_steps)
    except ConfigError:
        raise
    except Exception as error:  # numpy, zipfile, zlib, json and csv raise anything on what is cut short or hostile
        raise ConfigError(
            f"a file of rates must be readable as {path.suffix}, but {path} is not ({error!r}); check the file"
        ) from error


def _numpy(path: Path, total_steps: int | None) -> Rates:
    with opened_arrays(path) as loaded:
        values = loaded if isinstance(loaded, np.ndarray) else loaded["lr"]
    return Rates(_checked(values, total_steps, str(path)), f"from {path.name}")


def _json(path: Path, total_steps: int | None) -> Rates:
    document = parse_json(read_bounded(path))
    if isinstance(document, dict) and "log_history" in document:
        return _trainer_state(document, total_steps, path)
    values = document["lr"] if isinstance(document, dict) else document
    return Rates(_checked(values, total_steps, str(path)), f"from {path.name}")


def _trainer_state(state: dict[str, Any], total_steps: int | None, path: Path) -> Rates:
    """Rates from a Trainer's log: the row of step S was logged with the rate of the update that led to it."""
    rows = [row for row in state["log_history"] if "learning_rate" in row and row.get("step", 0) >= 1]
    points = {float(row["step"]) - 1: float(row["learning_rate"]) for row in rows}
    total = total_steps or int(state.get("max_steps", 0)) or None
    lr = _interpolated(points, total, str(path))
    last = int(max(points)) + 1
    held = last < lr.size - 1
    return Rates(lr, f"from {path.name}, interpolated" + (f"; held after step {last}" if held else ""), held)


def _csv(path: Path, total_steps: int | None) -> Rates:
    rows = [row for row in csv.reader(read_bounded(path).decode().splitlines()) if row]
    header = [name.strip() for name in rows[0]] if rows else []
    if "lr" not in header:
        return Rates(_checked([float(row[0]) for row in rows], total_steps, str(path)), f"from {path.name}")
    rates = [float(row[header.index("lr")]) for row in rows[1:]]
    if "step" not in header:
        return Rates(_checked(rates, total_steps, str(path)), f"from {path.name}")
    steps = [float(row[header.index("step")]) for row in rows[1:]]
    return Rates(
        _interpolated(dict(zip(steps, rates, strict=True)), total_steps, str(path)), f"from {path.name}, interpolated"
    )


# -------------------------------------------------------------------------------------------------- live schedulers


def _from_scheduler(schedule: object, total_steps: int | None, optimizer: object) -> Rates:
    from accelerate.scheduler import AcceleratedScheduler
    from torch.optim.lr_scheduler import LRScheduler

    inner = schedule.scheduler if isinstance(schedule, AcceleratedScheduler) else schedule
    owner = getattr(inner, "optimizer", None) or optimizer
    name = type(inner).__name__
    if not isinstance(inner, LRScheduler) or name in MOVED_BY_TRAINING:
        return _held(owner, total_steps, f"{name}, which cannot be known in advance")
    if total_steps is None:
        return Rates(None, f"{name}, planned length unknown")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of schedulers stepped without their optimizer
            lr, remark = _replayed(inner, total_steps, _steps_per_update(schedule))
        return Rates(_checked(lr, total_steps, name), name + remark)
    except Exception as error:  # a scheduler is the user's own code: whatever it raises, training goes on
        return _held(owner, total_steps, f"{name}, which could not be replayed ({error!r})")


def _held(optimizer: object, total_steps: int | None, why: str) -> Rates:
    """The present rate, for as long as is planned."""
    try:
        group = _largest_group(optimizer)
        rate = float(group["lr"])
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(
            f"a schedule is a scheduler, a name, a file or an array, or has an optimizer; got {why}; give one of these"
        ) from error
    if total_steps is None or not (math.isfinite(rate) and rate > 0):
        return Rates(None, f"{why}; present rate {rate:g}")
    return Rates(np.full(total_steps + 1, rate), f"{why}: the present rate {rate:g} is held", held=True)


def _steps_per_update(schedule: object) -> int:
    """How often a scheduler is stepped an update: more than once only under accelerate.

    Its wrapper steps the scheduler once a process unless batches are split among the processes. Subclasses with a
    ``step`` of their own (DeepSpeed's) leave the stepping to their engine, once an update.
    """
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.state import AcceleratorState

    if not isinstance(schedule, AcceleratedScheduler) or type(schedule).step is not AcceleratedScheduler.step:
        return 1
    together = schedule.split_batches or not schedule.step_with_optimizer
    return 1 if together else int(AcceleratorState().num_processes)


def _replayed(scheduler: Any, total_steps: int, per_update: int) -> tuple[NDArray[np.float64], str]:
    """Rates of the whole plan from copies of a scheduler, wherever it stands now; and a remark."""
    done = _position(scheduler) // per_update
    future = _run(*_copied(scheduler), per_update, total_steps + 1 - done)
    if done == 0:
        return future, ""
    past = _run(*_copied(scheduler, rewind=True), per_update, min(done, total_steps) + 1)
    remark = ""
    if future.size and not math.isclose(past[-1], future[0], rel_tol=1e-9, abs_tol=0.0):
        remark = f"; before step {done} as this schedule would have been"
    return np.concatenate([past[: past.size - 1 if future.size else None], future]), remark


def _run(scheduler: Any, group: dict[str, Any], per_update: int, count: int) -> NDArray[np.float64]:
    """The present rate and the ``count - 1`` that follow it."""
    lr = np.empty(max(0, count))
    for s in range(lr.size):
        lr[s] = float(group["lr"])
        try:
            _advance(scheduler, per_update)
        except ValueError:  # OneCycleLR refuses to go past its end: training would stop there
            lr[s + 1 :] = lr[s]
            break
    return lr


def _advance(scheduler: Any, per_update: int) -> None:
    """What one update does to a scheduler (accelerate stops those that know their end, and so does this)."""
    from torch.optim.lr_scheduler import LambdaLR

    if type(scheduler) is LambdaLR:  # its rate depends on the count alone, and thousands of processes are many steps
        scheduler.last_epoch += per_update - 1
        scheduler.step()
        return
    for _ in range(per_update):
        if per_update == 1 or scheduler._step_count <= getattr(scheduler, "total_steps", math.inf):
            scheduler.step()


def _position(scheduler: Any) -> int:
    """Steps that a scheduler has done; a chain has no count of its own."""
    children: Sequence[Any] = getattr(scheduler, "_schedulers", ())
    return int(scheduler.last_epoch) if hasattr(scheduler, "last_epoch") else _position(children[0])


def _copied(scheduler: Any, *, rewind: bool = False) -> tuple[Any, dict[str, Any]]:
    """A copy of a scheduler on a dummy optimizer, as it stands or as it began, and the group to read."""
    import torch

    if _reads_on(scheduler):
        raise TypeError("its function reads on from an iterator, which looking ahead would use up")
    groups = scheduler.optimizer.param_groups
    kept = [{k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")} for group in groups]
    dummy = torch.optim.SGD([{**group, "params": [torch.zeros(())]} for group in kept], lr=0.0)
    memo: dict[int, Any] = {id(p): p for group in groups for p in group["params"]}  # no copy of any weight
    memo[id(scheduler.optimizer)] = dummy
    twin = copy.deepcopy(scheduler, memo)
    if rewind:
        _set_back(dummy)
        _rewind(twin, lambda: _set_back(dummy))
    largest = _largest_group(scheduler.optimizer)
    return twin, next(own for own, group in zip(dummy.param_groups, groups, strict=True) if group is largest)


def _reads_on(scheduler: Any) -> bool:
    """Whether a function that tells rates holds an iterator, such as a generator or a file: copies would share it."""
    functions: Sequence[Any] = getattr(scheduler, "lr_lambdas", ())
    cells = [cell for function in functions for cell in getattr(function, "__closure__", None) or ()]
    children: Sequence[Any] = getattr(scheduler, "_schedulers", ())
    return any(hasattr(cell.cell_contents, "__next__") for cell in cells) or any(map(_reads_on, children))


def _set_back(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = copy.deepcopy(group["initial_lr"])


def _rewind(scheduler: Any, set_back: Callable[[], None]) -> None:
    """Puts a copy where its constructor left it: each scheduler takes its first step again, in order."""
    from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, SequentialLR

    children: Sequence[Any] = getattr(scheduler, "_schedulers", ())
    for child in children:
        _rewind(child, set_back)
    if isinstance(scheduler, SequentialLR):
        scheduler.last_epoch = 0
        set_back()
        scheduler.recursive_undo()
        children[bisect.bisect_right(scheduler._milestones, 0)]._initial_step()
    elif not children:
        scheduler.last_epoch = -1
        if isinstance(scheduler, CosineAnnealingWarmRestarts):
            scheduler.T_cur, scheduler.T_i = -1, scheduler.T_0
        scheduler._initial_step()


def _largest_group(optimizer: Any) -> dict[str, Any]:
    """The parameter group with most parameters (the first of equals)."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    return max(groups, key=lambda group: sum(int(p.numel()) for p in group["params"]))
