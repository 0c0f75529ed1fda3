"""What each phenomenon adds to a probe, at the shape of Pythia-160M, as a share of the probe's time.

    python -m benchmarks.phenomena

Writes ``results/phenomena-DEVICE.json``: 12 layers of width 768, 12 heads, random weights, a probe of 10 × 512 tokens,
float32. Probes with and without are run in turn; the median of each is compared.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.measure import alternating, probe_of, pythia
from ma_monitor.measure.phenomena.reading import measure_with
from ma_monitor.phenomena import PHENOMENA

REPEAT = 6


def failed(name: str, error: Exception) -> None:
    """Lets no phenomenon fail unseen."""
    raise RuntimeError(name) from error


def main() -> None:
    """Measures and writes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, probe = pythia("160m", torch.float32, device).eval(), probe_of(512)

    def probed(*names: str) -> None:
        measure_with(model, probe, 0, k=3, phenomena=names, failed=failed)

    actions = {"none": probed, **{name: lambda name=name: probed(name) for name in PHENOMENA}}
    actions["all"] = lambda: probed(*PHENOMENA)
    times = alternating(actions, REPEAT)
    rows = {name: {"ms": round(ms, 1), "adds": round(ms / times["none"] - 1, 3)} for name, ms in times.items()}
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    document = {"device": where, "torch": torch.__version__, "model": "pythia-160m", "tokens": "10 x 512", "rows": rows}
    name = "cpu" if device == "cpu" else where.lower().replace(" ", "-")
    (Path(__file__).parent / "results" / f"phenomena-{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
