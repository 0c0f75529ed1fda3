"""``ma-monitor predict``: what a configuration will do, before it is trained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_monitor.cli.common import Commands, add_command, emit_json, note, positive, say, table
from ma_monitor.errors import ConfigError
from ma_monitor.report.words import asymptote_words, band, number, peak_words

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ma_monitor.architecture.prediction import Prediction

FAMILIES = {"neox": "gpt_neox", "llama": "llama"}
BASE = {"layers": 6, "width": 384, "heads": 6, "mlp": 1536, "vocabulary": 16_384}
"""What holds where no CONFIG is given and a number is not named: the middle of the packaged sweep."""


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "predict",
        run,
        help="predict every layer of a model that has not been trained",
        text=(
            "Trajectories, peak and asymptote of every layer from a configuration alone, as the packaged sweep of\n"
            "small trainings teaches, with 80 % intervals as wide as errors on models held out were. CONFIG is a\n"
            "config.json or its folder, MODEL_ID a model on the Hub; key=value changes one of its numbers (layers,\n"
            "width, heads, mlp, vocabulary, or any that transformers knows), or describes a model by itself\n"
            "(family=neox or llama). What lies outside of what was seen is warned about. --compare asks what else\n"
            "would be: a changed number, several with commas between, or another CONFIG or MODEL_ID."
        ),
        example="ma-monitor predict layers=12 width=768 heads=12 --compare heads=6 --compare mlp=6144",
    )
    parser.add_argument("model", metavar="CONFIG|MODEL_ID|key=value", nargs="+", help="what to predict")
    parser.add_argument("--compare", metavar="ALTERNATIVE", action="append", default=[], help="what else to predict")
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="planned updates (default: those of the sweep's trainings)"
    )


def run(args: argparse.Namespace) -> int:
    """Does it."""
    from ma_monitor.architecture.prediction import predict

    base = configuration(args.model)
    prediction = predict(base, args.steps)
    others = {words: predict(configuration(words.split(","), base), args.steps) for words in args.compare}
    for name, one in ((" ".join(args.model), prediction), *others.items()):
        for warning in one.warnings:
            note(f"ma-monitor: warning: {name}: {warning}")
    rows = [summary(" ".join(args.model), prediction, prediction)]
    rows += [summary(name, one, prediction) for name, one in others.items()]
    if args.json:
        compared = [{**row, **others[row["model"]].to_dict()} for row in rows[1:]]
        emit_json(
            {"model": rows[0]["model"], **prediction.to_dict(), "largest": rows[0]["largest"], "compare": compared}
        )
        return 0
    say(describe(prediction))
    say()
    say(layer_table(prediction))
    if others:
        say()
        say(compare_table(rows))
    return 0


def configuration(words: Sequence[str], base: PreTrainedConfig | None = None) -> PreTrainedConfig:
    """The configuration that words describe: a CONFIG or MODEL_ID and changes, or changes to another, or all numbers.

    Raises:
        ConfigError: If they describe none.
        SourceError: If the Hub cannot give it.
    """
    from ma_monitor.architecture.features import changed

    named = [word for word in words if "=" not in word]
    pairs = dict(word.split("=", 1) for word in words if "=" in word)
    if len(named) > 1:
        raise ConfigError(f"one configuration is predicted at a time, got {', '.join(named)}; compare by --compare")
    family = pairs.pop("family", None)
    changes = {name: _value(name, text) for name, text in pairs.items()}
    if named:
        base = read_configuration(named[0])
    if named and family is not None:
        raise ConfigError("family=… describes a model by itself; leave it out beside a CONFIG or MODEL_ID")
    if family is not None and base is not None:  # the same numbers, but another family
        changes = numbers(base) | changes
    if base is None or family is not None:
        base = blank(family or "neox")
    return changed(base, changes) if changes else base


def numbers(config: PreTrainedConfig) -> dict[str, float]:
    """What the command's short names say of a configuration."""
    from ma_monitor.architecture.features import SHORT, shape_of

    shape = shape_of(config).to_dict()
    return {name: shape[name] for name in SHORT}


def _value(name: str, text: str) -> float:
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError as error:
        raise ConfigError(f"key=value gives a number, got {name}={text!r}") from error


def blank(family: str) -> PreTrainedConfig:
    """The sweep's middle shape in a family.

    Raises:
        ConfigError: If there is no such family.
    """
    from transformers import AutoConfig

    from ma_monitor.architecture.features import SHORT

    if family not in FAMILIES:
        raise ConfigError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}; or give a CONFIG or MODEL_ID")
    config: PreTrainedConfig = AutoConfig.for_model(
        FAMILIES[family], **{SHORT[name]: value for name, value in BASE.items()}
    )
    return config


def read_configuration(name: str) -> PreTrainedConfig:
    """A configuration from a file, a folder, or the Hub; nothing but ``config.json`` is read.

    Raises:
        ConfigError: If a file or folder holds none.
        SourceError: If the Hub cannot give it.
    """
    from huggingface_hub import hf_hub_download
    from transformers import AutoConfig

    from ma_monitor.replay.asking import asked
    from ma_monitor.replay.models import check_demands
    from ma_monitor.runs.files import parse_json, read_bounded

    path = Path(name)
    if not path.exists():
        if name.endswith(".json") or path.is_absolute() or name.startswith("."):
            raise ConfigError(f"{name}: there is no such file or folder; give a config.json, its folder, or a Hub id")
        path = Path(asked(lambda: hf_hub_download(name, "config.json"), name))
    try:
        check_demands(parse_json(read_bounded(path / "config.json" if path.is_dir() else path)))
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a configuration is free text to transformers: it fails in as many ways
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name}: no configuration that transformers knows ({reason})") from error
    return config


def describe(prediction: Prediction) -> str:
    """The shape and what the prediction rests on, in two lines."""
    from ma_monitor.architecture.prediction import packaged

    shape, taught = prediction.shape, packaged()
    end = prediction.layers[0].end_step
    return (
        f"{shape.layers} layers x {shape.width}, {shape.heads} heads, MLP {shape.mlp:,}, vocabulary "
        f"{shape.vocabulary:,}, {shape.parameters / 1e6:,.1f}M parameters, {end:,} updates\n"
        f"learned from {len(taught.shapes)} shapes, trained at a highest rate of {taught.recipe.rate:.3g} for "
        f"{taught.steps:,} updates"
    )


def layer_table(prediction: Prediction) -> str:
    """A line a layer."""
    end = prediction.layers[0].end_step
    columns = (
        "layer",
        "ratio at first",
        f"at step {end:,} [80 %]",
        "peak step [80 %]",
        "asymptote [80 %]",
        "above 100",
    )
    rows = []
    for layer in prediction.to_dict()["layers"]:
        last = layer["end"]
        rows.append(
            (
                str(layer["layer"]),
                number(layer["median"][0]),
                band(last["median"], last["p10"], last["p90"]),
                peak_words(layer["peak"]),
                asymptote_words(layer["asymptote"]),
                f"{layer['crossings']['100']['probability']:.0%}",
            )
        )
    return table(columns, rows, left=1)


def summary(name: str, prediction: Prediction, base: Prediction) -> dict[str, Any]:
    """The layer expected to be largest at the end, and by what factor that is more than in the base."""
    layers = prediction.to_dict()["layers"]
    top = max(layers, key=lambda layer: layer["end"]["median"])
    most = max(layer["end"]["median"] for layer in base.to_dict()["layers"])
    end = {key: top["end"][key] for key in ("median", "p10", "p90")}
    return {"model": name, "largest": {"layer": top["layer"], **end, "factor": end["median"] / most}}


def compare_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line an alternative."""
    cells = []
    for row in rows:
        top = row["largest"]
        ratio = band(top["median"], top["p10"], top["p90"])
        cells.append((row["model"], str(top["layer"]), ratio, f"x {top['factor']:.2f}"))
    return table(("what if", "largest layer", "its ratio at the end [80 %]", "against the first"), cells, left=1)
