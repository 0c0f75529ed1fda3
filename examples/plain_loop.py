"""Trains a small Llama in a plain PyTorch loop and watches its massive activations: build a Monitor, call it.

python examples/plain_loop.py
"""

import argparse
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from text_rows import local_text
from torch.utils.data import DataLoader, RandomSampler
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from ma_monitor import Monitor, MonitorConfig, Probe
from ma_monitor.report.words import band

LENGTH, VOCABULARY, BATCH = 32, 1_024, 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and prints where the run is and how good its forecast was."""
    options = parse(arguments)
    steps = options.max_steps
    torch.manual_seed(0)
    torch.set_num_threads(1)  # matrices this small lose more to waiting for another core than they gain by it
    text = local_text(options.corpus_mb, LENGTH, VOCABULARY)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=len(text.tokenizer), max_position_embeddings=LENGTH)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 100), steps)
    monitor = Monitor(
        model,
        Probe.from_rows(text.held_out),
        MonitorConfig(every=max(1, steps // 20)),
        run_dir=options.run_dir,
        schedule=schedule,
        total_steps=steps,
        batch=BATCH,
    )
    monitor.step(0)
    forecast = None
    rows = DataLoader(text.train, BATCH, sampler=RandomSampler(text.train, num_samples=BATCH * steps))
    for step, batch in enumerate(islice(rows, steps), start=1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        monitor.step(step, final=step == steps)
        if step == steps // 2:
            forecast = monitor.forecast()
    print(f"run: {options.run_dir}, loss {loss.item():.2f}")
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
    parser.add_argument("--run-dir", type=Path, default=Path("runs") / time.strftime("plain_loop-%Y%m%d-%H%M%S"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
