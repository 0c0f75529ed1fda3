"""Trains a small Pythia-like model and watches its massive activations emerge, in a few minutes on two cores.

    python examples/train_pythia_like.py

Pythia's recipe (parallel residual, rotary embedding of a quarter of each head, AdamW .9/.95, weight decay .1, warm-up
1 %, cosine to 10 %, no dropout) scaled down, on documentation found on this machine. All that ma_monitor needs is the
line with ``MassiveActivationCallback``. With options it is a real trainer:

    python examples/train_pythia_like.py --dataset allenai/c4:en --config pythia-70m --max-steps 20000 --device cuda
"""
# ruff: noqa: E402 - the clock starts before the imports, which take seconds

import time

STARTED = time.perf_counter()

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from text_rows import Text, hub_text, local_text
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from ma_monitor import MassiveActivationCallback, MonitorConfig, Run
from ma_monitor.analysis import Analysis, forecast_run
from ma_monitor.cli.common import table
from ma_monitor.numerics.forecast import LayerForecast
from ma_monitor.phenomena import named
from ma_monitor.report.words import asymptote_words, band, peak_words


class Shape(NamedTuple):
    """Size of a model, and how its training goes unless an option says otherwise."""

    layers: int
    width: int
    heads: int
    learning_rate: float
    vocabulary: int = 50_304
    length: int = 2_048
    batch: int = 8
    steps: int = 20_000


SHAPES = {
    # Pythia-31M at half its depth. Rows this short hold many end-of-text tokens, on which massive activations gather;
    # with a rate this high they emerge within minutes instead of hours.
    "tiny": Shape(3, 256, 8, 3e-3, vocabulary=2_048, length=32, batch=8, steps=1_700),
    "pythia-14m": Shape(6, 128, 4, 1e-3),
    "pythia-31m": Shape(6, 256, 8, 1e-3),
    "pythia-70m": Shape(6, 512, 8, 1e-3),
    "pythia-160m": Shape(12, 768, 12, 6e-4),
    "pythia-410m": Shape(24, 1024, 16, 3e-4),
    "pythia-1b": Shape(16, 2048, 8, 3e-4),
    "pythia-1.4b": Shape(24, 2048, 16, 2e-4),
    "pythia-2.8b": Shape(32, 2560, 32, 1.6e-4),
    "pythia-6.9b": Shape(32, 4096, 32, 1.2e-4, vocabulary=50_432),
    "pythia-12b": Shape(36, 5120, 40, 1.2e-4, vocabulary=50_688),
}
GROWN, AGREE = 4.0, 0.8
"""Massive: this many times the ratio at step 0, in one channel in this share of the probe's sequences."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, then says what the monitor saw."""
    options = parse(arguments)
    shape = SHAPES[options.config]
    set_seed(options.seed)
    if options.device == "cpu" and options.config == "tiny":
        torch.set_num_threads(1)  # matrices this small lose more to waiting for another core than they gain by it
    print("collecting text and tokenizing it ...", flush=True)
    text = prepare_text(options)
    model = build_model(shape, text, options.seq_len)
    size = f"{model.num_parameters():,} parameters, {options.max_steps:,} updates"
    print(f"{size} of {options.batch_size} x {options.seq_len} tokens on {options.device}", flush=True)
    callback = MassiveActivationCallback(
        MonitorConfig(every=options.every, phenomena=named(options.phenomena))
    )  # all it needs
    trainer = Trainer(
        model=model,
        args=training_arguments(options),
        train_dataset=text.train,
        eval_dataset=text.held_out,  # the callback takes its probe from here
        processing_class=text.tokenizer,
        data_collator=default_data_collator,  # rows have one length: nothing to pad
        callbacks=[callback],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(MeasurementLines(callback))
    began = time.perf_counter()
    trainer.train()
    trained = time.perf_counter() - began
    trainer.save_model()
    monitor = callback.monitor
    if monitor is None or monitor.run is None or monitor.latest is None:
        print("the model is trained and saved, but there is nothing to sum up: see the warnings above")
        return
    print_summary(monitor.run, monitor.latest)
    print_places(monitor.run, trainer)
    share = monitor.seconds / trained
    print(f"\nmonitor: {monitor.seconds:.1f} s of the training's {trained:.1f} s ({share:.1%})")
    print(f"in all:  {time.perf_counter() - STARTED:.0f} s")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what they leave open taken from the configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", choices=SHAPES, default="tiny", help="shape of the model (default: tiny)")
    add("--dataset", metavar="NAME[:CONFIG]", help="a data set of the Hub, streamed (default: this machine's text)")
    add("--text-column", metavar="NAME", help="its column that holds the text (default: found)")
    add("--corpus-mb", type=float, default=3.0, help="millions of characters of this machine's text (default: 3)")
    add("--max-steps", type=positive, help="updates")
    add("--batch-size", type=positive, help="rows of an update on each device")
    add("--seq-len", type=positive, help="tokens of a row")
    add("--learning-rate", type=float, help="highest rate of the schedule")
    add("--phenomena", default="", help="what to measure besides, names with commas between, or `all` (default: none)")
    add("--every", type=positive, help="updates between measurements (default: 15 times, and more often at the start)")
    add("--report-to", nargs="+", default=["tensorboard"], help="where the Trainer reports to (default: tensorboard)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output-dir", type=Path, default=Path("runs/train_pythia_like"))
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    shape = SHAPES[options.config]
    options.max_steps = options.max_steps or shape.steps
    options.batch_size = options.batch_size or shape.batch
    options.seq_len = options.seq_len or shape.length
    options.learning_rate = options.learning_rate or shape.learning_rate
    options.every = options.every or max(1, options.max_steps // 15)
    return options


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def prepare_text(options: argparse.Namespace) -> Text:
    """Rows to train on. A Pythia shape on text of the Hub gets Pythia's tokenizer; else one is trained on the text."""
    common = options.corpus_mb, options.seq_len, SHAPES[options.config].vocabulary
    if options.dataset is None:
        return local_text(*common)
    published = None if options.config == "tiny" else f"EleutherAI/{options.config}"
    return hub_text(options.dataset, options.text_column, published, *common, options.seed)


def build_model(shape: Shape, text: Text, length: int) -> GPTNeoXForCausalLM:
    """An untrained model of this shape.

    What is not said is Pythia's too: parallel residual, rotary embedding of a quarter of each head, no dropout.
    """
    config = GPTNeoXConfig(
        vocab_size=max(shape.vocabulary, len(text.tokenizer)),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        max_position_embeddings=length,
        bos_token_id=text.tokenizer.eos_token_id,
        eos_token_id=text.tokenizer.eos_token_id,
    )
    return GPTNeoXForCausalLM(config)


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """Pythia's recipe, as the Trainer wants it."""
    return TrainingArguments(
        output_dir=str(options.output_dir),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, options.max_steps // 100),
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        bf16=options.device == "cuda",
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=options.device == "cuda",
        eval_strategy="steps",
        eval_steps=max(1, options.max_steps // 4),
        logging_steps=10,
        save_strategy="no",  # the Trainer cannot resume a GPT-NeoX exactly; the final model is saved
        report_to=options.report_to,
        seed=options.seed,
    )


class MeasurementLines(ProgressCallback):
    """The Trainer's progress bar, with a line at each measurement in place of the Trainer's own lines."""

    def __init__(self, callback: MassiveActivationCallback) -> None:
        """Shows what this callback measures."""
        super().__init__()
        self.watched = callback
        self.shown = -1
        self.loss: float | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step 0 is measured here."""
        self.show()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        self.show()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keeps the loss for the next line."""
        self.loss = logs.get("loss", self.loss)
        if "eval_loss" in logs and self.training_bar is not None:
            self.training_bar.write(f"step {state.global_step:6,}  loss on held-out text {logs['eval_loss']:.3f}")

    def show(self) -> None:
        """Prints the last measurement, once."""
        monitor = self.watched.monitor
        if monitor is None or monitor.run is None or len(monitor.run.steps) == 0 or self.training_bar is None:
            return
        step = int(monitor.run.steps[-1])
        if step != self.shown:
            self.shown = step
            self.training_bar.write(measurement_line(monitor.run, monitor.latest, self.loss))


def measurement_line(run: Run, latest: Analysis | None, loss: float | None) -> str:
    """The last measurement in words, with the forecast of the layer whose ratio is the largest."""
    ratios = run.ratios()[:, -1]
    row = int(ratios.argmax())
    line = f"step {run.steps[-1]:6,}  loss {'    -' if loss is None else f'{loss:5.3f}'}"
    line += f"  largest ratio {ratios[row]:6.1f} in layer {row + 1}"
    end = None if latest is None else latest.forecast.layers[row].to_dict()["end"]
    return line if end is None else f"{line}  at the end {band(end['median'], end['p10'], end['p90'])}"


def print_summary(run: Run, latest: Analysis) -> None:
    """What every layer did, and how good the forecast at half time was."""
    half = forecast_run(run, at=int(run.steps[-1]) // 2)  # uses no measurement after that step
    columns = ("layer", "step 0", "now", "times", "one channel", "class", "peak step", "height", "asymptote")
    rows, grown = [], []
    for layer, fit, forecast in zip(run.layers, latest.fits, half.layers, strict=True):
        values = run.trajectory(layer).values
        times, share = values[-1] / values[0], share_of_one_channel(run, layer)
        if times >= GROWN and share >= AGREE:
            grown.append(str(layer))
        row = [str(layer), f"{values[0]:.1f}", f"{values[-1]:.1f}", f"{times:.1f}", f"{share:.0%}"]
        peak, document = fit.peak, fit.to_dict()
        height = band(peak.height, peak.height_low, peak.height_high) if peak.identified else "-"
        row += [document["class"], peak_words(document["peak"]), height, asymptote_words(document["asymptote"])]
        rows.append(row + forecast_cells(forecast, values[-1]))
    print(f"\nlargest/median of every layer, 80 % intervals in brackets; the forecast was made at step {half.at:,}\n")
    print(table((*columns, "forecast for now", "held"), rows))
    print(
        f"\n{len(grown)} of {len(run.layers)} layers ended at {GROWN:g} or more times their ratio at step 0 with the "
        f"largest entry in one channel\nin at least {AGREE:.0%} of the {run.meta.probe.sequences} probe sequences"
        + (f": {', '.join(grown)}" if grown else "")
    )


def share_of_one_channel(run: Run, layer: int) -> float:
    """Share of the probe's sequences whose largest entry is now in the channel where most of them have it."""
    channels = run.measurements()[-1].channel[layer - run.meta.first_layer, :, 0].tolist()
    return Counter(channels).most_common(1)[0][1] / len(channels)


def forecast_cells(forecast: LayerForecast, came: float) -> list[str]:
    """What was forecast for the end, and whether what came lies within the interval."""
    end = forecast.to_dict()["end"]
    if end is None or end["median"] is None:
        return ["-", "-"]
    return [band(end["median"], end["p10"], end["p90"]), "yes" if end["p10"] <= came <= end["p90"] else "no"]


def print_places(run: Run, trainer: Trainer) -> None:
    """Where everything is, and how to open it."""
    print(f"\nrun:         {run.path}\n             ma-monitor fit {shlex.quote(str(run.path))}")
    for reporter in trainer.callback_handler.callbacks:
        if isinstance(reporter, TensorBoardCallback):
            folder = str(reporter.logging_dir)
            print(f"TensorBoard: {folder}\n             tensorboard --logdir {shlex.quote(folder)}")
    print(f"model:       {trainer.args.output_dir}")


if __name__ == "__main__":
    main()
