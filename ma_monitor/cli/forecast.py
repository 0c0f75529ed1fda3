"""``ma-monitor forecast``: where every layer of a run is heading."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ma_monitor.cli.common import (
    MOST,
    Commands,
    add_command,
    add_rank,
    add_ratio,
    emit_json,
    open_run,
    reasons,
    say,
    table,
    user_file,
    whole,
)
from ma_monitor.errors import ConfigError
from ma_monitor.report.words import UNKNOWN, asymptote_words, band, count, number, peak_words, percent

if TYPE_CHECKING:
    from ma_monitor.runs.records import Plan
    from ma_monitor.runs.store import Run

RULE = f"steps must be one list of whole numbers from 0 to {MOST:,}, in text or saved by np.save"
LONGEST = 10**7
"""Most updates whose rates are listed for a what-if: each costs memory."""
UNLIKELY = 0.05
"""Layers less likely to reach a threshold are not told one by one."""


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "forecast",
        run,
        help="forecast every layer of a run",
        text=(
            "Median and 50/80/95 % bands per layer, peak, asymptote, and the value at the end; whether thresholds are\n"
            "crossed; how earlier forecasts of this run fared; and where it stands among past runs. No measurement\n"
            "after --at is used; the planned learning-rate schedule and length are. --schedule asks what would come\n"
            "if the training went on from there under another schedule, which stretches over the planned length (or\n"
            "to --until where that is farther), its rates relative to the run's highest; the answer is labelled so."
        ),
        example="ma-monitor forecast runs/a --at 5000 --schedule cosine:floor=.1",
    )
    parser.add_argument("run_dir", metavar="RUN", help="directory of a run")
    parser.add_argument("--at", type=whole, metavar="STEP", help="forecast from this step (default: the last)")
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--until", type=whole, metavar="STEP", help="forecast to this step (default: the planned end)")
    grid.add_argument("--steps", metavar="FILE", help="forecast these steps: .npy, or whole numbers in a text file")
    parser.add_argument(
        "--schedule", metavar="NAME", help="what if: constant, linear, cosine or wsd, with options as in the example"
    )
    parser.add_argument(
        "--threshold",
        type=above_zero,
        action="append",
        metavar="RATIO",
        help="tell when a ratio of this is first reached; may be repeated (default: 100 and 1000)",
    )
    add_rank(parser)
    add_ratio(parser)


def above_zero(text: str) -> float:
    """A ratio above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Does it."""
    grid = None if args.steps is None else read_steps(args.steps)

    from ma_monitor.analysis import forecast_run
    from ma_monitor.numerics.forecast import FORECAST, THRESHOLDS
    from ma_monitor.report.normal import among_past_runs, normal_words
    from ma_monitor.report.track import track_document, track_record, track_words

    source = open_run(args.run_dir, args.ratio)
    farthest = args.until if grid is None else grid[-1]
    plan = None if args.schedule is None else what_if(source, args.schedule, args.at, farthest)
    forecast = forecast_run(
        source,
        at=args.at,
        until=args.until,
        grid=grid,
        rank=args.rank,
        plan=plan,
        thresholds=sorted(set(args.threshold or THRESHOLDS)),
    )
    if farthest is not None and farthest <= (forecast.at or 0):
        raise ConfigError(f"a forecast made at step {forecast.at} must reach beyond it, got {farthest}; ask for more")
    record = track_record(source, at=args.at, rank=args.rank)
    past = among_past_runs(source, forecast.at) if args.rank == 1 else None
    document = {
        **forecast.to_dict(),
        **{"what_if": args.schedule, "ratio": source.meta.ratio, "rank": args.rank},
        **{"track_record": track_document(record), "normal": None if past is None else past.to_dict()},
    }
    if args.json:
        emit_json({"run": str(source.path), **document})
        return 0
    what = f"forecast of rank {args.rank}" if args.rank > 1 else "forecast"
    say(f"{source.path}: {source.meta.model.name}, {what} from step {document['at']:,}, clock: {document['clock']}")
    if args.schedule is not None:
        say(f"WHAT IF: from step {document['at']:,} on the schedule is {args.schedule}; this is not the run's own plan")
    say()
    say(forecast_table(source, document))
    if why := reasons(document["layers"], FORECAST):
        say(why)
    told = crossing_words(document["layers"]), track_words(record), past and normal_words(past)
    for words in filter(None, told):
        say(f"\n{words}")
    return 0


def what_if(source: Run, schedule: str, at: int | None, until: int | None) -> Plan:
    """The plan of a run whose schedule changes now.

    Updates to come get the named schedule's rates at their place in the whole length, times the run's highest planned
    rate (a file's rates are taken as they are). Updates done keep theirs: `forecast_run` sees to that.

    Args:
        source: The run.
        schedule: Name with options, or a file.
        at: The last measurement up to here is where the schedule changes; all of them where None.
        until: The length is at least this.

    Raises:
        ConfigError: If the schedule breaks a rule, nothing was measured by then, or nothing or too much is
            planned after it.
    """
    from ma_monitor.runs.records import Plan
    from ma_monitor.schedule import FILES, planned_rates

    seen = source.steps if at is None else source.steps[source.steps <= at]
    now = int(seen[-1]) if len(seen) else 0
    current = source.plan_at(now)
    planned = None if current is None else current.total_steps
    total = max(planned or 0, until or 0)
    if total <= now:
        known = "is not known" if planned is None else f"is {planned}"
        raise ConfigError(
            f"--schedule changes the rates after step {now}, and the planned length {known}; give a later --until"
        )
    if total > LONGEST:
        raise ConfigError(f"--schedule lists every rate, of at most {LONGEST:,} updates, got {total:,}; ask for fewer")
    rates = planned_rates(schedule, total)
    lr = rates.lr
    if lr is not None and current is not None and current.lr is not None and not schedule.endswith(FILES):
        lr *= current.lr.max()
    return Plan(now, total, lr, None, schedule, rates.held)


def read_steps(path: str) -> list[int]:
    """The steps of a file, in order, each once.

    Raises:
        ConfigError: If it cannot be read or holds something else than such whole numbers.
    """
    import numpy as np

    from ma_monitor.runs.files import opened_arrays, read_bounded

    with user_file(path, RULE) as file:
        if file.suffix == ".npy":
            with opened_arrays(file) as loaded:
                values = np.asarray(loaded)
        else:
            words = re.split(r"[\s,;]+", read_bounded(file).decode().strip())
            values = np.array([int(word) for word in words if word], dtype=np.int64)
    if values.ndim != 1 or values.size == 0 or values.dtype.kind not in "iu":
        raise ConfigError(f"{path}: {RULE}, got {values.dtype.name} of shape {values.shape}")
    if values.min() < 0 or values.max() > MOST:
        raise ConfigError(f"{path}: {RULE}, got {values.min()} to {values.max()}")
    return [int(step) for step in np.unique(values)]


def forecast_table(source: Run, document: dict[str, Any]) -> str:
    """A line a layer: the ratio now, at the last step of the grid, peak, asymptote and what leads the forecast.

    Where no step is left, the planned end stands for the grid's last step.
    """
    from ma_monitor.numerics.values import none_if_not_finite

    seen = int((source.steps <= document["at"]).sum())
    now = source.ratios(document["rank"])[:, seen - 1]
    farthest = [_farthest(layer) for layer in document["layers"]]
    last = next((end["step"] for end in farthest if end["step"] is not None), None)
    columns = (
        "layer",
        "ratio now",
        "at the end" if last is None else f"at step {last:,} [80 %]",
        "peak step [80 %]",
        "asymptote [80 %]",
        "led by",
    )
    rows = [
        (
            str(layer["layer"]),
            number(none_if_not_finite(now[layer["layer"] - 1])),
            band(end["median"], end["p10"], end["p90"]),
            peak_words(layer["peak"], planned=layer["end"] is not None),
            asymptote_words(layer["asymptote"]),
            layer["led_by"] or UNKNOWN,
        )
        for layer, end in zip(document["layers"], farthest, strict=True)
    ]
    return table(columns, rows, left=1)


def _farthest(layer: dict[str, Any]) -> dict[str, Any]:
    """What is said of the grid's last step, or of the planned end where that has been reached."""
    keys = ("median", "p10", "p90")
    if layer["steps"]:
        return {"step": layer["steps"][-1], **{key: layer[key][-1] for key in keys}}
    return layer["end"] or dict.fromkeys(("step", *keys))


def crossing_words(layers: Sequence[dict[str, Any]]) -> str:
    """A row for each layer that has reached a threshold, or may, and a column a threshold; empty if none is known."""
    layers = [layer for layer in layers if any(layer["crossings"].values())]
    names = list(layers[0]["crossings"]) if layers else []
    if not names:
        return ""
    columns = ("layer", *(f"reaches {number(float(name))} [80 %]" for name in names))
    cells = [(str(layer["layer"]), *(_crossing(layer["crossings"][name]) for name in names)) for layer in layers]
    shown = [row for row in cells if any(cell != UNKNOWN for cell in row[1:])]
    rest = f"less than {percent(UNLIKELY)} likely to reach {' or '.join(number(float(name)) for name in names)}"
    if not shown:
        return f"all layers: {rest}"
    others = f"\n{count(len(cells) - len(shown), 'other layer')}: {rest}" if len(shown) < len(cells) else ""
    return table(columns, shown, left=1) + others


def _crossing(crossing: dict[str, Any] | None) -> str:
    """When a layer reaches a threshold, in a cell."""
    if crossing is None or crossing["probability"] < UNLIKELY:
        return UNKNOWN
    step, low, high = (round(crossing[key]) for key in ("step", "low", "high"))
    if low == high and crossing["probability"] == 1:
        return f"reached at step {step:,}"
    return f"{percent(crossing['probability'])} likely: step {band(step, low, high)}"
