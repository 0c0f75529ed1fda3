"""What a measurement costs: the statistics against one read, a probe against a forward, the callback in training.

Run with ``python -m benchmarks.measure SECTION…``; each section's result goes to
``benchmarks/results/measure-SECTION-DEVICE.json`` (``--out FOLDER`` for elsewhere) with a hash of the sources measured.
Sections: ``cpu``; ``probe``, on a GPU or not; on a GPU ``statistics``, ``cost``, ``memory``, ``training``, ``steps``,
``tests``; on two ``two_gpus``.
``--stale`` names the recorded results whose sources have changed since, with the command to refresh each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ma_monitor.measure
from ma_monitor import MassiveActivationCallback, MonitorConfig, Probe
from ma_monitor.measure.forward import measure
from ma_monitor.measure.statistics import activation_statistics

RESULTS = Path(__file__).parent / "results"
SHAPES = [(10, 512, 128), (10, 512, 768), (10, 2048, 768), (10, 2048, 2048), (10, 2048, 5120)]
PYTHIA = {  # layers, width, heads: EleutherAI's published configurations
    "70m": (6, 512, 8),
    "160m": (12, 768, 12),
    "410m": (24, 1024, 16),
    "1.4b": (24, 2048, 16),
}


def hash_of_measure() -> str:
    """Changes with every source file directly in ``ma_monitor/measure``."""
    folder = Path(ma_monitor.measure.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def on_gpu(action: Callable[[], Any]) -> float:
    """Median milliseconds on the device, from a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(action, warmup=5, rep=25, return_mode="median"))


def alternating(actions: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Median milliseconds of each, run in turn so that whatever else the machine does meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeat):
        for name, action in actions.items():
            synchronize()
            begin = time.perf_counter()
            action()
            synchronize()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def synchronize() -> None:
    """Waits for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def of_statistics() -> list[dict[str, Any]]:
    """The kernels against one read and against the better of torch's own ways, and on hard data."""
    from tests.measure.activations import SEQUENCES

    hard = [
        "all equal",
        "all infinite",
        "two values",
        "half zero",
        "one exponent",
        "every magnitude",
        "not finite",
        "denormal",
    ]
    rows = []
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for kind in ["ordinary", *(hard if shape[2] >= 2048 else [])]:
                hidden = SEQUENCES[kind](*shape).to(dtype).cuda()
                flat = hidden.flatten(1)
                read = min(on_gpu(hidden.amax), on_gpu(lambda flat=flat: flat.amax(1)))
                ours = on_gpu(lambda hidden=hidden: activation_statistics(hidden, 3, backend="triton"))
                row = {"shape": shape, "dtype": str(dtype)[6:], "data": kind, "read_ms": read, "ms": ours}
                row["reads"] = ours / read
                if kind == "ordinary":
                    sort = on_gpu(lambda flat=flat: flat.abs().sort(dim=1))
                    row["torch_ms"] = min(sort, on_gpu(lambda flat=flat: flat.abs().median(1)))
                    row["torch_ms"] += on_gpu(lambda flat=flat: flat.abs().topk(3))
                    row["times_faster"] = row["torch_ms"] / ours
                row["exact"] = equals_a_sort(hidden)
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def equals_a_sort(hidden: torch.Tensor) -> bool:
    """Whether the kernels' values, places and counts are those of a stable sort, sequence by sequence."""
    got = activation_statistics(hidden, 3, backend="triton")
    for i, values in enumerate(hidden.flatten(1).float()):
        magnitude = values.abs().nan_to_num(nan=-1.0, posinf=torch.inf)
        ordered, index = magnitude.sort(descending=True, stable=True)
        known = int((ordered >= 0).sum())
        exact = [
            torch.equal(got.index[i], index[:3]),
            torch.equal(got.top[i], values[index[:3]]),
            got.median[i] == ordered[known // 2],  # the lower middle one, counted from the largest
            got.nan[i] == len(values) - known,
            got.inf[i] == (ordered == torch.inf).sum(),
        ]
        if not all(exact):
            return False
    return True


def of_cpu() -> list[dict[str, Any]]:
    """PyTorch's back end on two cores against ``torch.median`` and ``topk``."""
    torch.set_num_threads(2)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(10, 512, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
        flat = hidden.flatten(1)
        times = alternating(
            {
                "ms": lambda h=hidden: activation_statistics(h, 3, backend="torch"),
                "read_ms": hidden.amax,
                "median_ms": lambda f=flat: f.abs().median(1),
                "topk_ms": lambda f=flat: f.abs().topk(3),
            },
            30,
        )
        faster = (times["median_ms"] + times["topk_ms"]) / times["ms"]
        rows.append({"shape": (10, 512, 512), "dtype": str(dtype)[6:], **times, "times_faster": faster})
    return rows


def pythia(name: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A randomly initialised model of a Pythia's shape."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    layers, width, heads = PYTHIA[name]
    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: torch.nn.Module = GPTNeoXForCausalLM(config)
    return model.to(dtype)


def probe_of(length: int) -> Probe:
    """Ten sequences of random tokens."""
    return Probe.from_ids(np.random.default_rng(0).integers(0, 50304, (10, length)))


def of_probe() -> list[dict[str, Any]]:
    """A probe against the bare forward of the same sequences: same call, same arguments, no hooks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [("160m", 512), ("160m", 2048), ("1.4b", 512), ("1.4b", 2048)] if device == "cuda" else [("70m", 512)]
    rows = []
    for name, length in cases:
        for dtype in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,):
            model = pythia(name, dtype, device).eval()
            probe = probe_of(length)

            def bare(model: Any = model, probe: Probe = probe) -> None:
                with torch.no_grad():
                    model(torch.from_numpy(probe.ids).to(device), use_cache=False, logits_to_keep=1)

            def probed(model: Any = model, probe: Probe = probe) -> None:
                measure(model, probe, 0, k=3)

            bare(), probed()
            times = alternating({"bare_ms": bare, "probe_ms": probed}, 16 if device == "cuda" else 8)
            ratio = times["probe_ms"] / times["bare_ms"]
            rows.append({"model": name, "tokens": 10 * length, "dtype": str(dtype)[6:], **times, "ratio": ratio})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def of_cost() -> list[dict[str, Any]]:
    """A probe and an update's forward and backward, both under bfloat16 autocast, by model size and probe length."""
    rows = []
    for name in PYTHIA:
        model = pythia(name, torch.float32, "cuda")
        ids = torch.randint(50304, (4, 2048), device="cuda")

        def update(model: Any = model, ids: torch.Tensor = ids) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                model(ids, labels=ids).loss.backward()

        def probed(length: int, model: Any = model) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                measure(model, probe_of(length), 0, k=3)

        actions = {
            "update_of_8192_tokens_ms": update,
            "probe_10x512_ms": lambda probed=probed: probed(512),
            "probe_10x2048_ms": lambda probed=probed: probed(2048),
        }
        alternating(actions, 2)  # compiles
        rows.append({"model": name, **alternating(actions, 6)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def of_memory() -> list[dict[str, Any]]:
    """Peak device memory of a probe beyond that of the bare forward, in bytes, against its limit."""
    rows = []
    for name, length, batch in (("160m", 512, None), ("1.4b", 2048, 2)):
        model = pythia(name, torch.bfloat16, "cuda").eval()
        probe = probe_of(length)
        ids = torch.from_numpy(probe.ids[: batch or len(probe.ids)]).cuda()
        peaks = {}
        measure(model, probe, 0, k=3, batch_size=batch)
        for which in ("bare", "probe"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            if which == "bare":
                with torch.no_grad():
                    model(ids, use_cache=False, logits_to_keep=1)
            else:
                measure(model, probe, 0, k=3, batch_size=batch)
            peaks[which] = torch.cuda.max_memory_allocated()
        activation = ids.numel() * PYTHIA[name][1] * 2
        limit = max(activation // 20, 4 * 2**20)
        extra = peaks["probe"] - peaks["bare"]
        rows.append({"model": name, "micro_batch": ids.shape, **peaks, "extra": extra, "limit": limit})
        print(json.dumps(rows[-1], default=list), flush=True)
    return rows


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random tokens: the cost does not depend on them."""

    def __init__(self, count: int, length: int = 2048) -> None:
        """Makes ``count`` rows."""
        self._ids = torch.randint(50304, (64, length), generator=torch.Generator().manual_seed(0))
        self._count = count

    def __len__(self) -> int:
        """How many."""
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One row."""
        row = self._ids[index % len(self._ids)]
        return {"input_ids": row, "labels": row}


def trained(batch: int, micro: int, steps: int, config: MonitorConfig | None) -> tuple[list[float], Any]:
    """Seconds of each update of a Pythia-160M-shaped training, and the callback (None: without)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    begins: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            begins.append(time.perf_counter())

    callback = MassiveActivationCallback(config, probe=probe_of(512)) if config else None
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro,
            bf16=True,
            report_to=["tensorboard"],
            logging_steps=10,
            save_strategy="no",
            disable_tqdm=True,
            lr_scheduler_type="cosine",
        )
        trainer = Trainer(
            pythia("160m", torch.float32, "cuda"),
            arguments,
            train_dataset=Rows(batch * steps),
            callbacks=[*([callback] if callback else []), Clock()],
        )
        trainer.train()
    begins.append(time.perf_counter())
    return list(np.diff(begins)), callback


def of_training() -> list[dict[str, Any]]:
    """Share of the callback at its defaults in a training of 160M parameters, refits and logging included."""
    rows = []
    for batch, micro, steps in ((64, 32, 110), (4, 4, 600)):
        seconds, callback = trained(batch, micro, steps, MonitorConfig())
        monitor = callback.monitor
        plain = statistics.median(seconds)
        due = [i for i in range(1, steps) if MonitorConfig().due(i)]
        extra = [seconds[i - 1] - plain for i in due]  # step i is measured at the end of the update before it
        rows.append(
            {
                "tokens_a_step": batch * 2048,
                "steps": steps,
                "step_s": plain,
                "callback_s": monitor.seconds,
                "share": monitor.seconds / sum(seconds),
                "share_when_every_100": statistics.mean(extra[-4:]) / (100 * plain),
                "extra_at_due_steps_s": [round(e, 4) for e in extra],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def of_steps() -> list[dict[str, Any]]:
    """Whether steps without a probe are slower with the callback: pairs of trainings in turn, 8,192 tokens a step."""
    medians: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(3):
        for watched in (True, False) if pair % 2 else (False, True):
            seconds, _ = trained(4, 4, 128, MonitorConfig() if watched else None)
            medians[watched].append(
                statistics.median(s for i, s in enumerate(seconds, start=1) if not MonitorConfig().due(i))
            )
    ratios = [a / b - 1 for a, b in zip(medians[True], medians[False], strict=True)]
    mean, error = statistics.mean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
    # Student's t, two degrees of freedom, 95 %.
    return [{"slower_by": mean, "low": mean - 4.30 * error, "high": mean + 4.30 * error, "pairs": len(ratios)}]


def of_tests(arguments: tuple[str, ...] = ("tests/gpu/test_kernels_gpu.py", "tests/gpu/test_compiled_gpu.py")) -> Any:
    """What pytest says of the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-o", "addopts=", "-m", "gpu", "-rA", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parents[1])
    print(done.stdout[-2000:])
    return [
        line
        for line in done.stdout.splitlines()
        if re.match(r"PASSED|FAILED|ERROR|[a-z0-9_]+ \[|\d+ (passed|failed)", line)
    ]


def of_two_gpus() -> Any:
    """The same of the tests that need two, and what each scenario found."""
    return of_tests(("tests/gpu/test_two_gpus.py",))


SECTIONS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "statistics": of_statistics,
    "cpu": of_cpu,
    "probe": of_probe,
    "cost": of_cost,
    "memory": of_memory,
    "training": of_training,
    "steps": of_steps,
    "tests": of_tests,
    "two_gpus": of_two_gpus,
}


def warn_of_stale_results() -> None:
    """Prints a line for each recorded result that was measured with other sources than these."""
    for path in sorted(RESULTS.glob("measure-*.json")):
        document = json.loads(path.read_text())
        if document["hash_of_measure"] != hash_of_measure():
            print(
                f"warning: {path.name} is stale (ma_monitor/measure has changed since); refresh it with "
                f"`python -m benchmarks.measure {document['section']}` on {document['device']}"
            )


def main() -> None:
    """Runs sections and writes each one's result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(sorted(SECTIONS)))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--stale", action="store_true", help="name the recorded results that are out of date")
    arguments = parser.parse_args()
    if arguments.stale:
        warn_of_stale_results()
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name().lower().replace(" ", "-")
    for section in arguments.sections:
        rows = SECTIONS[section]()
        where = "cpu" if section == "cpu" else device
        document = {
            "section": section,
            "device": f"{platform.machine()}, 2 threads" if where == "cpu" else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "hash_of_measure": hash_of_measure(),
            "rows": rows,
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"measure-{section}-{where}.json").write_text(json.dumps(document, indent=1) + "\n")
        print(section, json.dumps(rows)[:3000], flush=True)


if __name__ == "__main__":
    main()
