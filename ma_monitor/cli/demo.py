"""``ma-monitor demo``: a real recorded training, played back through the code that watches a live one."""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_monitor.cli.common import Commands, add_command, emit_json, say, table
from ma_monitor.report.words import UNKNOWN, asymptote_words, band, number, peak_words

if TYPE_CHECKING:
    from ma_monitor.runs.published import Published
    from ma_monitor.runs.store import Run
    from ma_monitor.sinks.base import Emission

RECORDED = "neox-70m.npz"
WIDTH, HEADS, VOCABULARY, LENGTH = 512, 8, 16384, 512
"""What is known of the recorded model and its probe besides the measurements."""
EVERY = 12
"""Measurements between two printed lines."""
SEEN = 0.5
"""Share of the training after which the forecast shown against the outcome was made."""


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "demo",
        run,
        help="play back a real recorded training, in seconds",
        text=(
            "Plays the measurements of a real training that come with the package (GPT-NeoX of Pythia-70M's shape,\n"
            "10,000 updates) through the code that watches a live one, and shows its fit and its forecast."
        ),
        example="ma-monitor demo --out runs/demo",
    )
    parser.add_argument("--out", metavar="RUN", help="directory of the new run (default: a fresh temporary one)")


def run(args: argparse.Namespace) -> int:
    """Does it."""
    started = time.perf_counter()
    out = Path(args.out) if args.out else Path(tempfile.mkdtemp(prefix="ma_monitor-demo-"), "run")
    if not args.json:
        say(f"Playing back a recorded training into {out}")
        say()
    _play(recorded(), out, Lines(quiet=args.json))
    from ma_monitor.runs.store import Run

    source = Run.open(out)
    layers = outcome(source)
    seconds = time.perf_counter() - started
    if args.json:
        emit_json({"run": str(out), "steps": [int(step) for step in source.steps], "layers": layers})
        return 0
    say()
    say(outcome_table(layers))
    say()
    say(f"{len(source.steps)} measurements played back, fitted and forecast in {seconds:.1f} s. The run: {out}")
    say("This run is among those that the forecast learned from: of a new one it knows less.")
    say("next:")
    for words in ("fit {}", "forecast {} --at 3000", "log {} --to tensorboard", "export {} --out demo.csv"):
        say(f"  ma-monitor {words.format(out)}")
    return 0


def recorded() -> Published:
    """The recorded training that comes with the package."""
    from ma_monitor.runs.published import read_published

    with resources.as_file(resources.files("ma_monitor.learned").joinpath("data", RECORDED)) as file:
        (published,) = read_published(file)
    return published


class Lines:
    """A sink that prints a line every few measurements."""

    def __init__(self, *, quiet: bool) -> None:
        """Prints nothing at all where ``quiet``."""
        self.name = "lines"
        self.pictures = False
        self._quiet = quiet
        self._count = 0
        self._end = ""

    def emit(self, emission: Emission) -> None:
        """Prints the step, the largest ratio and the latest forecast of it."""
        values = emission.scalars
        if "ma/forecast/max_end" in values:
            ends = (values[f"ma/forecast/max_end{end}"] for end in ("", "_low", "_high"))
            self._end = f"  forecast of the largest at the end: {band(*ends)}"
        if not self._quiet and self._count % EVERY == 0 and "ma/max_ratio" in values:
            largest = f"{values['ma/max_ratio']:.1f} (layer {values['ma/max_ratio_layer']:.0f})"
            say(f"step {emission.step:>6,}  largest ratio {largest:<16}{self._end}".rstrip())
        self._count += 1

    def close(self) -> None:
        """Does nothing."""


def _play(published: Published, out: Path, lines: Lines) -> None:
    """Drives an observer as a live training would, with the recorded measurements."""
    from ma_monitor.config import MonitorConfig
    from ma_monitor.monitor import Observer
    from ma_monitor.runs.records import ModelShape, ProbeInfo, RunMeta
    from ma_monitor.runs.store import Run

    layers, sequences, ranks = published.measurements[0].top.shape
    meta = RunMeta(
        model=ModelShape(published.name, "gpt_neox", layers, WIDTH, HEADS, VOCABULARY, None),
        probe=ProbeInfo(None, sequences, LENGTH, "recorded"),
        k=ranks,
        first_layer=1,
        ratio="ratio_of_means",
        precision="float32",
    )
    run = Run.create(out, meta, published.plan)
    with closing(Observer(run, MonitorConfig(strict=True), sinks=[lines])) as observer:
        for measurements in published.measurements:
            observer.observe(measurements, final=measurements is published.measurements[-1])


def outcome(source: Run) -> list[dict[str, Any]]:
    """Per layer: the ratio at the end, what fit and forecast say then, and what was forecast of it at half time.

    Returns:
        A document a layer; ``end_forecast`` has the step ``at`` which it was made, ``median``, ``p10``, ``p90`` and
        whether the ratio that came lies ``inside``.
    """
    from ma_monitor.analysis import analyse, forecast_run
    from ma_monitor.numerics.values import none_if_not_finite

    end = int(source.steps[-1])
    now = analyse(source)
    earlier = forecast_run(source, at=round(SEEN * end), grid=[end]).to_dict()
    documents = zip(now.fits_document["layers"], now.forecast_document["layers"], earlier["layers"], strict=True)
    layers = []
    for (fit, forecast, then), last in zip(documents, source.ratios()[:, -1], strict=True):
        ratio = none_if_not_finite(last)
        said = {key: then[key][-1] for key in ("median", "p10", "p90")}
        inside = None if None in (ratio, *said.values()) else bool(said["p10"] <= ratio <= said["p90"])
        layers.append(
            {
                "layer": fit["layer"],
                "ratio": ratio,
                "class": fit["class"],
                "peak": forecast["peak"],
                "asymptote": forecast["asymptote"],
                "end_forecast": {"at": earlier["at"], **said, "inside": inside},
            }
        )
    return layers


def outcome_table(layers: list[dict[str, Any]]) -> str:
    """A line a layer."""
    at = layers[0]["end_forecast"]["at"]
    columns = ("layer", "class", "peak step [80 %]", "asymptote [80 %]", f"end, forecast at {at:,}", "came", "inside")
    words = {True: "yes", False: "no", None: UNKNOWN}
    rows = []
    for layer in layers:
        said = layer["end_forecast"]
        forecast = band(said["median"], said["p10"], said["p90"])
        ends = (peak_words(layer["peak"]), asymptote_words(layer["asymptote"]), forecast, number(layer["ratio"]))
        rows.append((str(layer["layer"]), str(layer["class"]), *ends, words[said["inside"]]))
    return table(columns, rows, left=2)
