"""What a replay costs beside what it must do: loading and running each checkpoint, or downloading it.

    python -m benchmarks.replay --shape pythia-1.4b --device cuda     # seconds a revision and peak memory
    python -m benchmarks.replay --overlap                             # downloads as long as computing them

The first makes random checkpoints of that shape (float16 safetensors, as Pythia's are; 14 GB each of pythia-6.9b) in a
temporary folder. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe, get_context
from pathlib import Path
from statistics import median
from typing import Any

from tests.replay.loopback import LoopbackHub, serving

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


def make_checkpoints(root: Path, shape: str, steps: range, device: str) -> None:
    """Random weights, others at each step, made on the device since that is quicker."""
    import torch
    from transformers import GPTNeoXForCausalLM

    with torch.device("meta"):
        model = GPTNeoXForCausalLM(configuration(shape)).to(torch.float16)
    model = model.to_empty(device=device)
    for step in steps:
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1.0)
        model.save_pretrained(root / f"step{step}", max_shard_size=SHARD)


def synchronised(device: str) -> None:
    """Waits for what the device still does."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """Most memory so far: of the device since the last reset, or of this process where there is none."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: str) -> None:
    """Begins to count anew, on a device."""
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def bare(folder: Path, ids: Any, dtype: Any, device: str, batch: int) -> tuple[float, int, int]:
    """Seconds of load and forward as transformers does them, bytes of the weights, and most memory meanwhile."""
    import torch
    from transformers import GPTNeoXForCausalLM

    reset_peak(device)
    started = time.perf_counter()
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=dtype, device_map=torch.device(device))
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
        make_checkpoints(root, args.shape, range(args.revisions), args.device)
        with torch.device("meta"):
            blank = GPTNeoXForCausalLM(configuration(args.shape))
        dtype = checked_dtype(args.dtype) or default_dtype(blank)
        folders = [root / f"step{step}" for step in range(args.revisions)]
        plain = [bare(folder, ids, dtype, args.device, args.batch_size) for folder in folders]
        weights, plain_peak = plain[0][1], max(peak for _, _, peak in plain)
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
    # The first loads each file twice from the disk's cache at most and warms up; it is given apart.
    replayed = [later - earlier for earlier, later in zip(ticks, ticks[1:], strict=False)]
    alone = [seconds for seconds, _, _ in plain]
    return {
        "shape": args.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "device": args.device,
        "measured": len(result.measured),
        "problems": list(result.problems),
        "bare_seconds": alone,
        "replay_seconds": replayed,
        "seconds_ratio": median(replayed[1:]) / median(alone[1:]),
        "weights_bytes": weights,
        "bare_peak_bytes": plain_peak,
        "replay_peak_bytes": replay_peak,
        # Beyond the bare forward's activations: the replay's peak without what the bare forward needs beside weights.
        "model_sizes": (replay_peak - (plain_peak - weights)) / weights,
    }


@contextmanager
def served(root: Path, rate: float) -> Iterator[str]:
    """A loopback Hub in a process of its own, so that it takes no time from the replay's; gives its address."""
    ours, theirs = Pipe()

    def serve() -> None:
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
        make_checkpoints(root, args.shape, range(args.revisions), args.device)

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
    parser.add_argument("--revisions", type=int, default=3)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each of the ten sequences")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", default=None, help="folder for the checkpoints (default: the system's)")
    args = parser.parse_args()
    disable_progress_bars()
    measure: Callable[[argparse.Namespace], dict[str, Any]] = overlap if args.overlap else cost
    print(json.dumps(measure(args), indent=1))


if __name__ == "__main__":
    main()
