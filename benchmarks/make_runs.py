"""Makes real runs to learn from: small GPT-NeoX and Llama trainings of many shapes, rates and schedules.

    python benchmarks/make_runs.py CORPUS.txt.xz OUT [--kind gpu|cpu] [--jobs N] [--minutes M]

Every training is a real Hugging Face Trainer with this project's callback, in a process of its own; several go at once.
CORPUS holds documents separated by NUL bytes. OUT gets one ``NAME.npz`` a training that ended (``steps [T]``,
``stats [T, n, k + 1, L]``, ``lr``, and the configuration as JSON), which ``ma-monitor import`` reads. Take few at once:
twelve trainings sharing one GPU took 0.2 s an update each, and only the shortest ended within nine minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_ROWS = 10


@dataclasses.dataclass(frozen=True)
class Training:
    """One training; batches are ``batch`` rows of ``length`` tokens, each led by an end-of-text token."""

    name: str
    kind: Literal["gpu", "cpu"]
    family: Literal["neox", "llama"]
    layers: int
    width: int
    heads: int
    rate: float
    schedule: Literal["cosine", "linear", "constant", "wsd"]
    steps: int
    batch: int
    length: int = 256
    mlp: float = 4.0
    vocabulary: int = 16_384
    seed: int = 0


GPU = [
    Training("gpu-neox-6x512", "gpu", "neox", 6, 512, 8, 2e-3, "cosine", 6000, 32),
    Training("gpu-llama-8x512", "gpu", "llama", 8, 512, 8, 1e-3, "constant", 5000, 32, mlp=8 / 3),
    Training("gpu-llama-6x640", "gpu", "llama", 6, 640, 10, 3e-3, "cosine", 4000, 32, mlp=8 / 3),
    Training("gpu-neox-12x384", "gpu", "neox", 12, 384, 6, 1.5e-3, "wsd", 6000, 32),
    Training("gpu-llama-4x256", "gpu", "llama", 4, 256, 4, 6e-3, "cosine", 10_000, 16, mlp=8 / 3),
    Training("gpu-neox-6x256", "gpu", "neox", 6, 256, 4, 4e-3, "constant", 8000, 16),
    Training("gpu-llama-12x512", "gpu", "llama", 12, 512, 8, 2e-3, "linear", 5000, 32, mlp=8 / 3),
    Training("gpu-neox-4x768", "gpu", "neox", 4, 768, 12, 2e-3, "linear", 5000, 32),
    Training("gpu-llama-6x640-seed1", "gpu", "llama", 6, 640, 10, 3e-3, "cosine", 4000, 32, mlp=8 / 3, seed=1),
    Training("gpu-neox-16x256", "gpu", "neox", 16, 256, 8, 2e-3, "linear", 4000, 16),
    Training("gpu-llama-8x384", "gpu", "llama", 8, 384, 6, 4e-3, "wsd", 5000, 32, mlp=4),
    Training("gpu-neox-8x512-short", "gpu", "neox", 8, 512, 4, 3e-3, "cosine", 1500, 32, mlp=2),
]


def tiny_trainings() -> list[Training]:
    """Trainings for single cores: shapes, rates and schedules drawn once and for all."""
    draw = np.random.default_rng(0)
    out = []
    for number in range(60):
        heads = int(draw.choice([2, 4, 8]))
        family: Literal["neox", "llama"] = "neox" if draw.random() < 0.6 else "llama"
        out.append(
            Training(
                f"cpu-{family}-{number:02d}",
                "cpu",
                family,
                layers=int(draw.integers(2, 6)),
                width=heads * int(draw.choice([16, 24, 32])),
                heads=heads,
                rate=float(draw.choice([1e-3, 2e-3, 3e-3, 5e-3, 8e-3])),
                schedule=("cosine", "linear", "constant", "wsd")[int(draw.integers(4))],
                steps=int(draw.choice([1500, 2000, 3000, 4500])),
                batch=int(draw.choice([4, 8])),
                length=64,
                mlp=float(draw.choice([2, 4, 8])),
                vocabulary=2048,
                seed=number,
            )
        )
    return out


TRAININGS = {training.name: training for training in [*GPU, *tiny_trainings()]}


def tokenize(corpus: Path, work: Path, vocabulary: int) -> None:
    """Trains a tokenizer and writes the corpus as one line of token ids, each document led by end-of-text (id 0)."""
    from tokenizers import ByteLevelBPETokenizer

    documents = lzma.open(corpus, "rt").read().split("\0")
    documents = documents[: len(documents) // (2 if vocabulary > 5000 else 8)]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        documents[:: max(1, len(documents) // 2500)],
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    ids = [np.array([0, *encoding.ids], dtype=np.uint16) for encoding in bpe.encode_batch(documents)]
    np.save(work / f"tokens-{vocabulary}.npy", np.concatenate(ids))


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens, each led by end-of-text."""

    def __init__(self, tokens: NDArray[np.uint16], length: int) -> None:
        """Cuts ``tokens`` into rows of ``length``."""
        count = len(tokens) // (length - 1)
        body = tokens[: count * (length - 1)].reshape(count, length - 1)
        self.rows = np.pad(body, ((0, 0), (1, 0)))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One row, which is its own label."""
        ids = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def build(training: Training) -> Any:
    """An untrained model of this shape."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": training.width,
        "num_hidden_layers": training.layers,
        "num_attention_heads": training.heads,
        "intermediate_size": round(training.mlp * training.width / 32) * 32,
        "vocab_size": training.vocabulary,
        "max_position_embeddings": training.length,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "attention_dropout": 0.0,
    }
    if training.family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, hidden_dropout=0.0, rotary_pct=0.25, use_parallel_residual=True))


SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "linear": ("linear", {}),
    "constant": ("constant_with_warmup", {}),
    "wsd": ("warmup_stable_decay", {"num_decay_steps": 0.2}),
}


def train(training: Training, work: Path, out: Path) -> None:
    """Trains with the callback and writes ``NAME.npz``."""
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    from ma_monitor import MassiveActivationCallback, MonitorConfig, Probe

    set_seed(training.seed)
    if training.kind == "cpu":
        torch.set_num_threads(1)
    rows = Rows(np.load(work / f"tokens-{training.vocabulary}.npy", mmap_mode="r"), training.length)
    held_out = np.linspace(0, len(rows) - 1, HELD_OUT_ROWS).astype(int)
    probe = Probe.from_ids(rows.rows[held_out].astype(np.int64), "rows of the training corpus")
    scheduler, options = SCHEDULES[training.schedule]
    if "num_decay_steps" in options:
        options = {"num_decay_steps": int(options["num_decay_steps"] * training.steps)}
    arguments = TrainingArguments(
        output_dir=str(work / training.name),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch,
        learning_rate=training.rate,
        lr_scheduler_type=scheduler,
        lr_scheduler_kwargs=options,
        warmup_steps=max(1, training.steps // 100),
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        bf16=training.kind == "gpu",
        use_cpu=training.kind == "cpu",
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=training.seed,
    )
    callback = MassiveActivationCallback(MonitorConfig(every=training.steps // 140), probe=probe)
    trainer = Trainer(model=build(training), args=arguments, train_dataset=rows, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    monitor = callback.monitor
    if monitor is None or monitor.run is None:
        raise SystemExit(f"{training.name}: the monitor was off")
    stack, plan = monitor.run.stack(), monitor.run.plan_at(0)
    statistics = np.concatenate([np.abs(stack.top), stack.median[..., None]], axis=3)[:, 1:]  # h_0 is left out
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    facts = dataclasses.asdict(training) | {
        "seconds": round(seconds, 1),
        "monitor_share": round(monitor.seconds / seconds, 4),
        "last_loss": losses[-1],
        "device": torch.cuda.get_device_name() if training.kind == "gpu" else "one CPU core",
        "precision": monitor.run.meta.precision,
        "torch": torch.__version__,
    }
    np.savez_compressed(
        out / f"{training.name}.npz",
        steps=monitor.run.steps,
        stats=statistics.transpose(0, 2, 3, 1).astype(np.float32),
        lr=np.array([]) if plan is None or plan.lr is None else plan.lr,
        config=json.dumps(facts),
    )
    ratios = monitor.run.ratios()
    print(
        f"{training.name}: {len(monitor.run.steps)} measurements, loss {losses[-1]:.2f}, largest ratio "
        f"{ratios[:, 0].max():.1f} -> {ratios[:, -1].max():.1f} (at most {ratios.max():.1f}), {seconds:.0f} s, "
        f"monitor {monitor.seconds / seconds:.1%}",
        flush=True,
    )


def run_all(names: list[str], jobs: int, deadline: float, arguments: list[str], log: Path) -> None:
    """Trains these, ``jobs`` at a time, until the deadline; what has not ended then is stopped."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    waiting = list(names)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    while (waiting or running) and time.monotonic() < deadline:
        for name in [name for name, process in running.items() if process.poll() is not None]:
            if running.pop(name).returncode != 0:
                print(f"{name}: failed, see {log / name}.txt", flush=True)
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            command = [sys.executable, __file__, *arguments, "--one", name]
            with (log / f"{name}.txt").open("wb") as errors:
                running[name] = subprocess.Popen(command, env=environment, stderr=errors)
        time.sleep(0.2)
    for name, process in running.items():
        process.terminate()
        print(f"{name}: stopped at the deadline", flush=True)


def main() -> None:
    """Tokenizes, trains, packs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("make_runs"), help="scratch folder")
    parser.add_argument("--kind", choices=("gpu", "cpu"), default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many of this kind")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        train(TRAININGS[options.one], options.work, options.out)
        return
    names = [name for name, training in TRAININGS.items() if training.kind == options.kind][options.skip :]
    vocabulary = TRAININGS[names[0]].vocabulary
    if not (options.work / f"tokens-{vocabulary}.npy").exists():
        tokenize(options.corpus, options.work, vocabulary)
    print(f"tokens ready, {(deadline - time.monotonic()) / 60:.1f} minutes left", flush=True)
    run_all(names, options.jobs, deadline, sys.argv[1:], options.work)


if __name__ == "__main__":
    main()
