"""Makes what ``ma-monitor forecast`` compares a run with: the ratios of past runs by depth and share of the training.

    python -m benchmarks.make_reference RUNS…

RUNS are ``.npz`` files as ``make_runs.py`` leaves them, or folders of such. Writes ``learned/data/reference.json`` in
the package. Layers of one third of the depth are pooled, every run counting alike.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import ma_monitor
from ma_monitor.learned.reference import LEVELS, SHARES, Floats, thirds

TARGET = Path(ma_monitor.__file__).parent / "learned" / "data" / "reference.json"


def read(path: Path) -> tuple[str, int, int, Floats, float]:
    """Kind, parameters and updates of a run, its ratios at ``SHARES`` ``[L, len(SHARES)]``, and the largest of all."""
    with np.load(path) as file:
        config, steps = json.loads(str(file["config"])), file["steps"]
        means = file["stats"].astype(np.float64).mean(axis=1)
    total = int(config["steps"])
    if steps[-1] != total:
        raise ValueError(f"{path}: a past run must have come to its end, step {total}, got {steps[-1]}; leave it out")
    ratios = (means[:, 0] / means[:, -1]).T
    at = np.log(np.maximum(np.array(SHARES) * total, 1))
    known = [np.exp(np.interp(at, np.log(np.maximum(steps, 1)), np.log(row))) for row in ratios]
    return config.get("kind", "gpu").upper(), parameters(config), total, np.array(known), float(ratios.max())


def parameters(config: dict[str, Any]) -> int:
    """Weights of the matrices: two embeddings, attention, and an MLP of two matrices (GPT-NeoX) or three (Llama)."""
    width = config.get("width") or config["hidden"]
    inner = config["mlp"] * width if "mlp" in config else config["ff"]
    vocabulary = config.get("vocabulary") or config["vocab"]
    matrices = 3 if config["family"] == "llama" else 2
    return int(2 * vocabulary * width + config["layers"] * (4 * width**2 + matrices * inner * width))


def pooled(runs: list[Floats], third: int) -> list[list[float]]:
    """Quantiles at ``LEVELS`` of the layers in a third of the depth, ``[len(LEVELS), len(SHARES)]``."""
    parts = [run[thirds(len(run)) == third] for run in runs]
    values = np.concatenate(parts)
    weights = np.concatenate([np.full(len(part), 1 / len(part)) for part in parts if len(part)])
    order = values.argsort(axis=0)
    passed = weights[order].cumsum(axis=0) / weights.sum()
    ordered = np.take_along_axis(values, order, axis=0)
    places = [(passed < level - 1e-9).sum(axis=0) for level in LEVELS]  # the first at which the level is passed
    return [[float(f"{value:.4g}") for value in np.take_along_axis(ordered, at[None], axis=0)[0]] for at in places]


def main() -> None:
    """Reads and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS")
    paths = parser.parse_args().runs
    found = [read(file) for path in paths for file in (sorted(path.glob("*.npz")) if path.is_dir() else [path])]
    kinds = []
    for name in ("GPU", "CPU"):
        runs = [one for one in found if one[0] == name]
        _, sizes, totals, ratios, largest = zip(*runs, strict=True)
        kinds.append(
            {
                "kind": name,
                "runs": len(runs),
                "parameters": [min(sizes), max(sizes)],
                "steps": [min(totals), max(totals)],
                "largest": round(max(largest), 1),
                "quantiles": [pooled(list(ratios), third) for third in range(3)],
            }
        )
        print(
            f"{name}: {len(runs)} runs, {min(sizes):,} to {max(sizes):,} parameters, ratios of at most {max(largest)}"
        )
    card = "Ratio (largest entry over median, Eq. 8) of real trainings, GPT-NeoX and Llama, made by make_runs.py"
    document = {"about": card, "levels": LEVELS, "shares": SHARES, "kinds": kinds}
    TARGET.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
