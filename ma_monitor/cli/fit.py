"""``ma-monitor fit``: the paper's curve and the other hypotheses, fitted to every layer."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from typing import Any

from ma_monitor.cli.common import (
    Commands,
    add_command,
    add_rank,
    add_ratio,
    emit_json,
    open_run,
    reasons,
    say,
    table,
    whole,
)
from ma_monitor.errors import ConfigError
from ma_monitor.report.words import UNKNOWN, asymptote_words, compare, count, number, peak_words

CURVE = ("A", "lambda", "gamma", "t0")
FLAT = ("layer", "class", *CURVE, "K", "log_abs_A", "beta", "tau0", "A1", "A2", "r2", "aicc", "at_bound")
FOOTNOTE = "(K): a parameter of the best curve, not a level that the data show the ratio to settle at"
FITTED = "fitted"
"""Status of a layer of which there is nothing else to say."""
UNFITTED = ("not known", "not known")
"""Peak and asymptote of a layer without a curve: it may well have them."""
NESTED = {
    "peak": ("step", "height", "low", "high", "identified", "status"),
    "asymptote": ("value", "low", "high", "identified"),
    "variability": ("cv_percent", "sem_percent", "ci95_percent"),
}


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "fit",
        run,
        help="fit the paper's curve to every layer of a run",
        text=(
            "Least squares of the ratio in steps, per layer: the five parameters, peak and asymptote with 80 %\n"
            "intervals where the data identify them, and the other hypotheses by R2 and AICc as in the paper's Table 5."
        ),
        example="ma-monitor fit runs/a --at 5000",
    )
    parser.add_argument("run_dir", metavar="RUN", help="directory of a run")
    parser.add_argument("--at", type=whole, metavar="STEP", help="use measurements up to this step (default: all)")
    add_rank(parser)
    add_ratio(parser)
    parser.add_argument("--csv", action="store_true", help="print the layers as CSV on stdout and nothing else")


def run(args: argparse.Namespace) -> int:
    """Does it."""
    if args.csv and args.json:
        raise ConfigError("--csv and --json both ask for stdout; give one of them")
    from ma_monitor.analysis import fit_run, sequence_ratios
    from ma_monitor.numerics.variability import variability

    source = open_run(args.run_dir, args.ratio)
    fits = fit_run(source, at=args.at, rank=args.rank)
    each = sequence_ratios(source, at=args.at, rank=args.rank)
    layers = [{"layer": layer, **fit.to_dict()} for layer, fit in zip(source.layers, fits, strict=True)]
    spreads = [{"layer": layer, **variability(of).to_dict()} for layer, of in zip(source.layers, each, strict=True)]
    spread = {**variability(each).to_dict(), "layers": spreads}
    shown = [{**layer, "variability": one} for layer, one in zip(layers, spreads, strict=True)]
    at = int(source.steps[-1] if args.at is None else source.steps[source.steps <= args.at][-1])
    compared = compare(layers)
    if args.csv:
        write_csv(shown)
    elif args.json:
        document = {"run": str(source.path), "at": at, "rank": args.rank, "ratio": source.meta.ratio}
        emit_json({**document, "layers": layers, "comparison": compared, "variability": spread})
    else:
        points = count(int((source.steps <= at).sum()), "measurement")
        say(f"{source.path}: {source.meta.model.name}, {points} up to step {at:,}")
        say()
        say(fit_table(shown))
        say()
        say(variability_words(spread, source.meta.probe.sequences))
        say()
        say(comparison_table(compared, len(layers)))
    return 0


def fit_table(layers: Sequence[dict[str, Any]]) -> str:
    """A line a layer, and below it what is not plain: parameters that are no level, layers that were not fitted."""
    columns = ("layer", "class", *CURVE, "K", "R2", "AICc", "peak step [80 %]", "asymptote [80 %]", "CV %")
    rows = [
        (
            str(layer["layer"]),
            str(layer["class"]),
            *(number(layer[name]) for name in CURVE),
            _level(layer),
            UNKNOWN if layer["r2"] is None else f"{layer['r2']:.4f}",
            number(layer["aicc"]),
            *(UNFITTED if layer["K"] is None else (peak_words(layer["peak"]), asymptote_words(layer["asymptote"]))),
            number(layer["variability"]["cv_percent"]),
        )
        for layer in layers
    ]
    footnote = FOOTNOTE if "(" in "".join(row[6] for row in rows) else ""
    return "\n".join(filter(None, (table(columns, rows, left=2), footnote, reasons(layers, FITTED))))


def _level(layer: dict[str, Any]) -> str:
    """K, in parentheses where it is only a parameter of the curve: a bare number would be read as the limit."""
    level = number(layer["K"])
    return level if layer["K"] is None or layer["asymptote"]["identified"] else f"({level})"


def variability_words(spread: dict[str, Any], sequences: int) -> str:
    """How much the ratio differs between the probe's sequences, over all layers and steps (paper, Table 2)."""
    if spread["cv_percent"] is None:
        return "how much the ratio differs between sequences is not known: fewer than two have one"
    cv, sem, half = (number(spread[key]) for key in NESTED["variability"])
    return (
        f"over the probe's {sequences} sequences, mean of all layers and steps: "
        f"CV {cv} %, standard error {sem} %, 95 % interval ±{half} %"
    )


def comparison_table(compared: dict[str, dict[str, Any]], layers: int) -> str:
    """A line a hypothesis, the best mean R² first."""
    order = sorted(compared.items(), key=lambda item: (item[1]["mean_r2"] is None, -(item[1]["mean_r2"] or 0.0)))
    rows = [
        (name, UNKNOWN if entry["mean_r2"] is None else f"{entry['mean_r2']:.4f}", f"{entry['best']} of {layers}")
        for name, entry in order
    ]
    return table(("hypothesis", "mean R2", "best by AICc"), rows, left=1)


def write_csv(layers: Sequence[dict[str, Any]]) -> None:
    """Prints a header and a line a layer; what is not known is empty."""
    names = [f"{group}_{key}" for group, keys in NESTED.items() for key in keys]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*FLAT, *names])
    for layer in layers:
        nested = [(layer[group] or {}).get(key) for group, keys in NESTED.items() for key in keys]
        writer.writerow([*(layer[name] for name in FLAT), *nested])
