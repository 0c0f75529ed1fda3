"""What a replay costs beside what it must do: loading and running each checkpoint, or downloading it.

    python -m benchmarks.replay --shape pythia-1.4b --device cuda     # seconds a revision and peak memory
    python -m benchmarks.replay --overlap                             # downloads as long as computing them

Both make random checkpoints of that shape (float16 safetensors, as Pythia's are) in a temporary folder: the first two
sets of weights, whatever the number of revisions (28 GB in all of pythia-6.9b), the second one a revision. The result
is printed and goes to ``benchmarks/results/replay-SHAPE-DEVICE.json`` or
``replay-overlap-SHAPE-REVISIONS-DEVICE.json`` (``--out FOLDER`` for elsewhere).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe, get_context
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHAPES = {  # layers, width, heads
    "pythia-14m": (6, 128, 4),
    "pythia-70m": (6, 512, 8),
    "pythia-410m": (24, 1024, 16),
    "pythia-1.4b": (24, 2048, 16),
    "pythia-6.9b": (32, 4096, 32),
}
VOCABULARY, CONTEXT, PADDED = 50254, 2048, 50304
SHARD = "4GB"


def configuration(shape: str) -> Any:
    """The configuration of a Pythia."""
    from transformers import GPTNeoXConfig

    layers, width, heads = SHAPES[shape]
    return GPTNeoXConfig(
        vocab_size=PADDED,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=CONTEXT,
        rotary_pct=0.25,
    )


def make_checkpoints(root: Path, shape: str, revisions: int, device: str, *, different: int) -> None:
    """Random weights, made on the device since that is quicker; so many sets of them, in turn, by hard links."""
    import torch
    from transformers import GPTNeoXForCausalLM

    with torch.device("meta"):
        model = GPTNeoXForCausalLM(configuration(shape)).to(torch.float16)
    model = model.to_empty(device=device)
    for step in range(min(revisions, different)):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1.0)
        model.save_pretrained(root / f"step{step}", max_shard_size=SHARD)
    for step in range(different, revisions):
        shutil.copytree(root / f"step{step % different}", root / f"step{step}", copy_function=os.link)


def synchronised(device: str) -> None:
    """Waits for what the device still does."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int | None:
    """Most memory of the device since the last reset; unknown on a CPU, where mapped files count as a process's own."""
    import torch

    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else None


def reset_peak(device: str) -> None:
    """Begins to count a device's memory anew."""
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def bare(folder: Path, ids: Any, dtype: Any, device: str, batch: int) -> tuple[float, int, int | None]:
    """Seconds of load and forward as transformers does them, bytes of the weights, and most memory of the forward."""
    import torch
    from transformers import GPTNeoXForCausalLM

    reset_peak(device)
    started = time.perf_counter()
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=dtype, device_map=torch.device(device))
    synchronised(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        for part in torch.split(torch.from_numpy(ids).to(device), batch):
            model(part, use_cache=False, logits_to_keep=1)
    synchronised(device)
    seconds = time.perf_counter() - started
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return seconds, weights, peak_bytes(device)


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a revision and peak memory of a replay against the bare load and forward."""
    import numpy as np
    import torch
    from transformers import GPTNeoXForCausalLM

    from ma_monitor.config import MonitorConfig
    from ma_monitor.measure.probe import Probe
    from ma_monitor.replay.models import checked_dtype, default_dtype
    from ma_monitor.replay.runner import replay
    from ma_monitor.replay.sources import folder_source

    ids = np.random.default_rng(0).integers(0, VOCABULARY, (10, args.length))
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = Path(scratch) / "checkpoints"
        make_checkpoints(root, args.shape, args.revisions, args.device, different=2)
        with torch.device("meta"):
            blank = GPTNeoXForCausalLM(configuration(args.shape))
        dtype = checked_dtype(args.dtype) or default_dtype(blank)
        folders = [root / f"step{step}" for step in range(args.revisions)]
        plain = [bare(folder, ids, dtype, args.device, args.batch_size) for folder in folders]
        _, weights, plain_peak = plain[-1]
        reset_peak(args.device)
        ticks: list[float] = []
        result = replay(
            folder_source(root),
            Probe.from_ids(ids),
            MonitorConfig(batch_size=args.batch_size),
            Path(scratch) / "run",
            dtype=dtype,
            device=args.device,
            progress=lambda done, total, name: (synchronised(args.device), ticks.append(time.perf_counter())),
        )
        replay_peak = peak_bytes(args.device)
    # The first of each only warms up.
    replayed = [later - earlier for earlier, later in zip(ticks, ticks[1:], strict=False)]
    alone = [seconds for seconds, _, _ in plain]
    return {
        "shape": args.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "sequences": list(ids.shape),
        "batch_size": args.batch_size,
        "measured": len(result.measured),
        "problems": list(result.problems),
        "bare_seconds": alone,
        "replay_seconds": replayed,
        "seconds_ratio": median(replayed[1:]) / median(alone[1:]),
        "weights_bytes": weights,
        "bare_forward_peak_bytes": plain_peak,
        "replay_peak_bytes": replay_peak,
        # Beyond the bare forward's activations: the replay's peak without what the bare forward needs beside weights.
        "model_sizes": None if plain_peak is None else (replay_peak - (plain_peak - weights)) / weights,
    }


def facts(device: str) -> dict[str, str]:
    """What the figures hang on besides the source."""
    import torch
    import transformers

    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


@contextmanager
def served(root: Path, rate: float) -> Iterator[str]:
    """A loopback Hub in a process of its own, so that it takes no time from the replay's; gives its address."""
    ours, theirs = Pipe()

    def serve() -> None:
        from tests.replay.loopback import LoopbackHub, serving

        hub = LoopbackHub(rate=rate)
        for folder in root.iterdir():
            hub.put("lab/model", folder.name, folder)
        with serving(hub):
            theirs.send(hub.url)
            ours.close()
            with suppress(EOFError):
                theirs.recv()

    process = get_context("fork").Process(target=serve, daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def overlap(args: argparse.Namespace) -> dict[str, Any]:
    """Wall time of a replay from a server so slow that a download takes as long as the rest, against each alone."""
    import numpy as np
    from huggingface_hub import constants

    from ma_monitor.measure.probe import Probe
    from ma_monitor.replay.hub import hub_source
    from ma_monitor.replay.runner import replay
    from ma_monitor.replay.sources import folder_source

    ids = np.random.default_rng(0).integers(0, VOCABULARY, (10, args.length))
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = Path(scratch) / "checkpoints"
        make_checkpoints(root, args.shape, args.revisions, args.device, different=args.revisions)

        def run(source: Any, name: str) -> float:
            started = time.perf_counter()
            replay(source, Probe.from_ids(ids), None, Path(scratch) / name, device=args.device)
            return time.perf_counter() - started

        run(folder_source(root), "warm")
        computing = run(folder_source(root), "compute")
        size = sum(path.stat().st_size for path in (root / "step0").glob("*.safetensors"))
        with served(root, size * args.revisions / computing) as url:
            constants.HF_HUB_OFFLINE, constants.ENDPOINT = False, url
            constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
            source = hub_source("lab/model", "all")
            started = time.perf_counter()
            for checkpoint in source.checkpoints:
                source.fetch(checkpoint, Path(scratch) / "alone" / checkpoint.name)
            downloading = time.perf_counter() - started
            wall = run(source, "overlap")
    return {
        "shape": args.shape,
        "revisions": args.revisions,
        "sequences": list(ids.shape),
        "download_seconds": downloading,
        "compute_seconds": computing,
        "wall_seconds": wall,
        "wall_to_longer": wall / max(downloading, computing),
        "wall_to_sum": wall / (downloading + computing),
    }


def main() -> None:
    """Does one of the two."""
    from huggingface_hub.utils import disable_progress_bars

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="pythia-70m")
    parser.add_argument("--overlap", action="store_true", help="a throttled loopback Hub instead of a folder")
    parser.add_argument("--revisions", type=int, default=4, help="of which the first only warms up")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each of the ten sequences")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", default=None, help="folder for the checkpoints (default: the system's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    args = parser.parse_args()
    if args.revisions < 2:
        parser.error("--revisions must be at least 2")
    disable_progress_bars()
    measure: Callable[[argparse.Namespace], dict[str, Any]] = overlap if args.overlap else cost
    document = measure(args) | facts(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    kind = f"overlap-{args.shape}-{args.revisions}" if args.overlap else args.shape
    file = args.out / f"replay-{kind}-{document['device'].lower().replace(' ', '-')}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    if args.overlap:
        print(f"{args.shape}: wall time is {document['wall_to_longer']:.3f} times the longer of the two sums -> {file}")
    else:
        sizes = document["model_sizes"]
        memory = "" if sizes is None else f", peak memory without activations {sizes:.3f} model sizes"
        ratio = document["seconds_ratio"]
        print(f"{args.shape} in {document['dtype']}: {ratio:.3f} times a bare load and forward{memory} -> {file}")


if __name__ == "__main__":
    main()
