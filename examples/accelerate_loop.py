"""Trains a small GPT-NeoX in an accelerate loop and watches its massive activations, on one process or several.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py

Every process builds the Monitor and calls it alike, with what `prepare` returned; the first one keeps the run.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from text_rows import local_text
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, RandomSampler
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ma_monitor import Monitor, Probe
from ma_monitor.report.words import band

LENGTH, VOCABULARY, BATCH, ACCUMULATED = 32, 1_024, 4, 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and prints where the run is and how good its forecast was."""
    options = parse(arguments)
    steps = options.max_steps
    torch.manual_seed(0)
    torch.set_num_threads(1)  # matrices this small lose more to waiting for another core than they gain by it
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED, cpu=True)
    batch = BATCH * ACCUMULATED * accelerator.num_processes
    text = local_text(options.corpus_mb, LENGTH, VOCABULARY)
    rows = DataLoader(text.train, BATCH, sampler=RandomSampler(text.train, num_samples=batch * steps))
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = GPTNeoXConfig(**sizes, vocab_size=len(text.tokenizer), max_position_embeddings=LENGTH)
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = CosineAnnealingLR(optimizer, steps * accelerator.num_processes)  # accelerate steps it once a process
    model, optimizer, rows, schedule = accelerator.prepare(model, optimizer, rows, schedule)
    probe = Probe.from_rows(text.held_out)
    monitor = Monitor(model, probe, run_dir=options.run_dir, schedule=schedule, total_steps=steps, batch=batch)
    monitor.step(0)
    step, forecast = 0, None
    for microbatch in rows:
        with accelerator.accumulate(model):
            loss = model(**microbatch).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            monitor.step(step, final=step == steps)
            if step == steps // 2:
                forecast = monitor.forecast()
    accelerator.print(f"run: {options.run_dir}, loss {loss.item():.2f}")
    for layer in forecast.layers if forecast else ():
        end = layer.to_dict()["end"] or {}
        expected = band(*map(end.get, ("median", "p10", "p90")))  # made half way, with its 80 % interval
        print(f"layer {layer.layer}: forecast {expected}, came {monitor.run.trajectory(layer.layer).values[-1]:.1f}")
    monitor.close()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=400, help="updates (default: 400)")
    parser.add_argument("--corpus-mb", type=float, default=0.5, help="millions of characters of text (default: .5)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs") / time.strftime("accelerate_loop-%Y%m%d-%H%M%S"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
