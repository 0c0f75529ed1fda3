"""Makes real runs to learn from: small GPT-NeoX and Llama trainings of many shapes, rates and schedules.

    python benchmarks/make_runs.py CORPUS.txt.xz OUT [--set varied large …] [--jobs N] [--gpus 0,1] …

Six sets. ``varied`` and ``large`` (GPU), ``tiny`` and ``long`` (CPU) vary everything, to learn forecasting from;
``sweep`` (GPU) and ``tiny_sweep`` (CPU) vary the shape alone, to learn what it does. Every training is a real Hugging
Face Trainer with this project's callback, in a process of its own; several go at once. CORPUS holds documents separated
by NUL bytes. OUT gets one ``NAME.npz`` a training that ended (``steps [T]``, ``stats [T, n, k + 1, L]``, ``lr``, and
the configuration as JSON), which ``ma-monitor import`` reads. Take at most four at once on one GPU, or eight where
NVIDIA's multi-process service runs (``nvidia-cuda-mps-control -d``).

    python benchmarks/make_runs.py CORPUS.txt.xz OUT --pack FOLDER

trains nothing: it writes OUT's runs to FOLDER as means over the probe's sequences, a tenth of the size.
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_ROWS = 10
Family = Literal["neox", "llama"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]


@dataclasses.dataclass(frozen=True)
class Training:
    """One training; batches are ``batch`` rows of ``length`` tokens, each led by an end-of-text token."""

    name: str
    kind: Literal["gpu", "cpu"]
    family: Family
    layers: int
    width: int
    heads: int
    rate: float
    schedule: Schedule
    steps: int
    batch: int
    length: int = 256
    mlp: float = 4.0
    vocabulary: int = 16_384
    seed: int = 0


def _shaped(
    kind: Literal["gpu", "cpu"], family: Family, shape: str, rate: float, schedule: Schedule, steps: int, **more: Any
) -> Training:
    """A training named by its shape, which is layers x width x heads; the MLP is the family's usual one."""
    layers, width, heads = (int(number) for number in shape.split("x"))
    seed = more.get("seed", 0)
    name = f"{kind}-{family}-{layers}x{width}-{schedule}-{steps}" + (f"-seed{seed}" if seed else "")
    usual = {"mlp": 4.0 if family == "neox" else 8 / 3}
    return Training(name, kind, family, layers, width, heads, rate, schedule, steps, **usual | more)


def varied_trainings() -> list[Training]:
    """Trainings for GPUs, the longest first: families, shapes, rates, schedules, lengths and batches all differ."""

    def one(family: Family, shape: str, rate: float, schedule: Schedule, steps: int, **more: Any) -> Training:
        return _shaped("gpu", family, shape, rate, schedule, steps, **{"batch": 32, "length": 128} | more)

    return [
        one("neox", "4x256x4", 3e-3, "cosine", 15_000, batch=16),
        one("llama", "16x512x8", 3e-3, "cosine", 6000),
        one("neox", "12x768x12", 3e-3, "constant", 5000),
        one("llama", "8x1024x16", 4e-3, "wsd", 5000),
        one("llama", "4x256x4", 6e-3, "wsd", 15_000, batch=16),
        one("llama", "12x768x12", 4e-3, "linear", 5000),
        one("neox", "8x1024x8", 2e-3, "cosine", 5000),
        one("neox", "6x512x8", 2e-3, "linear", 6000, length=256),
        one("neox", "6x256x4", 4e-3, "constant", 9000, batch=16),
        one("llama", "6x640x10", 3e-3, "cosine", 6000),
        one("llama", "6x640x10", 3e-3, "cosine", 6000, seed=1),
        one("llama", "8x512x8", 1e-3, "constant", 6000, length=256),
        one("neox", "3x768x12", 6e-3, "wsd", 7000, mlp=8.0),
        one("neox", "16x256x8", 2e-3, "linear", 5000, batch=64),
        one("llama", "10x384x6", 5e-3, "linear", 6000, mlp=4.0),
        one("neox", "10x384x6", 1.5e-3, "wsd", 6000, batch=64),
        one("neox", "4x768x12", 2e-3, "linear", 1500, length=256),
        one("llama", "8x384x6", 4e-3, "wsd", 2000, length=256),
        one("neox", "8x512x4", 3e-3, "cosine", 2000, mlp=2.0, length=256),
        one("llama", "4x512x8", 8e-3, "cosine", 2500),
        one("neox", "6x384x6", 5e-3, "wsd", 3000),
        one("llama", "12x320x5", 3e-3, "linear", 3000),
    ]  # fmt: skip


def large_trainings() -> list[Training]:
    """Trainings for GPUs that go on for longer or see far more tokens than the varied ones."""

    def one(
        family: Family, shape: str, rate: float, schedule: Schedule, steps: int, rows: int, length: int
    ) -> Training:
        return _shaped("gpu", family, shape, rate, schedule, steps, batch=rows, length=length)

    return [
        one("neox", "4x256x4", 3e-3, "constant", 20_000, 16, 128),
        one("llama", "6x384x6", 2e-3, "wsd", 10_000, 32, 256),
        one("neox", "6x512x8", 2e-3, "linear", 10_000, 32, 256),
        one("neox", "8x768x12", 3e-3, "cosine", 6000, 64, 512),
        one("neox", "6x256x4", 1e-3, "constant", 4000, 64, 512),
        one("llama", "6x512x8", 2e-3, "cosine", 3000, 64, 512),
        one("neox", "6x512x8", 1e-3, "linear", 3000, 64, 512),
        one("llama", "4x384x6", 3e-3, "wsd", 4000, 64, 512),
    ]


def tiny_trainings() -> list[Training]:
    """Trainings for single cores: shapes, rates and schedules drawn once and for all."""
    draw = np.random.default_rng(0)
    out = []
    for number in range(72):
        heads = int(draw.choice([2, 4, 8]))
        family: Family = "neox" if draw.random() < 0.6 else "llama"
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


def long_trainings() -> list[Training]:
    """Trainings for single cores that go on far longer than the others: every schedule, 8,000 to 20,000 updates."""

    def one(family: Family, shape: str, rate: float, schedule: Schedule, steps: int) -> Training:
        small = {"batch": 8, "length": 64, "mlp": 4.0, "vocabulary": 2048}
        return _shaped("cpu", family, shape, rate, schedule, steps, **small)

    return [
        one("neox", "3x64x4", 5e-3, "cosine", 20_000),
        one("llama", "3x64x4", 8e-3, "wsd", 16_000),
        one("neox", "4x64x4", 8e-3, "linear", 12_000),
        one("llama", "2x96x4", 5e-3, "constant", 10_000),
        one("neox", "2x128x4", 8e-3, "wsd", 8000),
        one("llama", "4x64x2", 3e-3, "cosine", 14_000),
    ]


def sweep_trainings() -> list[Training]:
    """Shapes for GPUs: each of depth, width, heads, MLP and vocabulary alone, then together; three with three seeds."""
    base = Training("", "gpu", "neox", 6, 384, 6, 4e-3, "cosine", 3000, 32, length=128)
    alone: list[dict[str, Any]] = [
        {},
        *({"layers": layers} for layers in (3, 12, 18)),
        *({"width": width, "heads": width // 64} for width in (192, 576, 768)),
        *({"heads": heads} for heads in (3, 12, 24)),
        *({"mlp": mlp} for mlp in (2.0, 6.0, 8.0)),
        {"vocabulary": 4096},
    ]
    draw = np.random.default_rng(1)
    together: list[dict[str, Any]] = []
    for _ in range(6):
        width = int(draw.choice([256, 384, 512, 640]))
        together.append(
            {
                "layers": int(draw.integers(4, 15)),
                "width": width,
                "heads": width // int(draw.choice([32, 64, 128])),
                "mlp": float(draw.choice([2, 3, 4, 6, 8])),
                "vocabulary": int(draw.choice([4096, 16_384])),
            }
        )
    seeds = [{"seed": seed, **shape} for shape in ({}, {"layers": 12}) for seed in (1, 2)]
    families: tuple[Family, ...] = ("neox", "llama")
    out = [
        dataclasses.replace(base, family=family, **changes)
        for family in families
        for changes in [*alone, *together, *(seeds if family == "neox" else seeds[:2])]
    ]
    return _named("sweep", out)


def tiny_sweep_trainings() -> list[Training]:
    """Shapes for single cores, drawn once and for all; the first two of each family with three seeds."""
    base = Training("", "cpu", "neox", 4, 96, 4, 6e-3, "cosine", 3000, 8, length=32, vocabulary=2048)
    draw = np.random.default_rng(2)
    out = []
    for number in range(56):
        heads, size = int(draw.choice([2, 3, 4, 6, 8])), int(draw.choice([8, 16, 24, 32]))
        out.append(
            dataclasses.replace(
                base,
                family=("neox", "llama")[number % 2],
                layers=int(draw.integers(2, 9)),
                width=min(160, max(32, heads * size)) // heads * heads // 2 * 2,
                heads=heads,
                mlp=float(draw.choice([2, 3, 4, 6, 8])),
            )
        )
    out = [training for training in out if training.width % (2 * training.heads) == 0]
    return _named("tiny", out + [dataclasses.replace(training, seed=seed) for training in out[:4] for seed in (1, 2)])


def _named(kind: str, trainings: list[Training]) -> list[Training]:
    """Names that tell the shape; of two alike the first is kept."""
    named: dict[str, Training] = {}
    for t in trainings:
        name = f"{kind}-{t.family}-{t.layers}x{t.width}-h{t.heads}-m{t.mlp:g}-v{t.vocabulary // 1024}k-s{t.seed}"
        named.setdefault(name, dataclasses.replace(t, name=name))
    return list(named.values())


SETS = {
    "varied": varied_trainings(),
    "large": large_trainings(),
    "tiny": tiny_trainings(),
    "long": long_trainings(),
    "sweep": sweep_trainings(),
    "tiny_sweep": tiny_sweep_trainings(),
}
TRAININGS = {training.name: training for trainings in SETS.values() for training in trainings}


def cost(training: Training) -> float:
    """About how long it takes, to begin with the longest: on a GPU a small layer costs its kernels' start alone."""
    size = training.batch * training.length * training.width
    return training.steps * training.layers * (1 + size / (1e7 if training.kind == "gpu" else 1e4))


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
    shape["rotary_pct"] = 0.25
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, hidden_dropout=0.0, use_parallel_residual=True))


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


def pack(file: Path, folder: Path) -> None:
    """Writes a run as the means over its sequences (n = 1), from which the ratio of means is the same."""
    with np.load(file) as data:
        np.savez_compressed(
            folder / file.name,
            steps=data["steps"].astype(np.int32),
            stats=data["stats"].mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32),
            lr=data["lr"].astype(np.float32),
            config=data["config"],
        )


def run_all(names: list[str], gpus: list[str], deadline: float, arguments: list[str], log: Path) -> None:
    """Trains these, one in each place of ``gpus``, until the deadline; what has not ended then is stopped."""
    running: dict[str, tuple[subprocess.Popen[bytes], str]] = {}
    waiting, free = list(names), list(gpus)
    while (waiting or running) and time.monotonic() < deadline:
        for name in [name for name, (process, _) in running.items() if process.poll() is not None]:
            process, gpu = running.pop(name)
            free.append(gpu)
            if process.returncode != 0:
                print(f"{name}: failed, see {log / name}.txt", flush=True)
        while waiting and free:
            name, gpu = waiting.pop(0), free.pop(0)
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "CUDA_VISIBLE_DEVICES": gpu,
            }
            command = [sys.executable, __file__, *arguments, "--one", name]
            with (log / f"{name}.txt").open("wb") as errors:
                running[name] = subprocess.Popen(command, env=environment, stderr=errors), gpu
        time.sleep(0.2)
    for name, (process, _) in running.items():
        process.terminate()
        print(f"{name}: stopped at the deadline", flush=True)
    if waiting:
        print(f"not begun: {', '.join(waiting)}", flush=True)


def main() -> None:
    """Tokenizes, trains, packs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("make_runs"), help="scratch folder")
    parser.add_argument("--set", nargs="+", choices=sorted(SETS), default=["tiny"])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    parser.add_argument("--gpus", default="0", help="GPUs to share evenly, such as 0,1")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--below", type=int, help="only trainings of at most so many updates")
    parser.add_argument("--above", type=int, default=0, help="only trainings of more updates than this")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="only write OUT's runs there, as means")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pack:
        options.pack.mkdir(parents=True, exist_ok=True)
        for file in sorted(options.out.glob("*.npz")):
            pack(file, options.pack)
        return
    deadline = time.monotonic() + 60 * options.minutes
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        train(TRAININGS[options.one], options.work, options.out)
        return
    chosen = [t for name in options.set for t in SETS[name] if options.above < t.steps <= (options.below or t.steps)]
    chosen = [t for t in chosen if not (options.out / f"{t.name}.npz").exists()]
    missing = sorted({t.vocabulary for t in chosen if not (options.work / f"tokens-{t.vocabulary}.npy").exists()})
    if missing:
        with ProcessPoolExecutor(len(missing)) as pool:
            list(pool.map(tokenize, *zip(*[(options.corpus, options.work, size) for size in missing], strict=True)))
    print(f"tokens ready, {(deadline - time.monotonic()) / 60:.1f} minutes left", flush=True)
    gpus = options.gpus.split(",")
    places = [gpus[i % len(gpus)] for i in range(options.jobs)]
    run_all([t.name for t in sorted(chosen, key=cost, reverse=True)], places, deadline, sys.argv[1:], options.work)


if __name__ == "__main__":
    main()
