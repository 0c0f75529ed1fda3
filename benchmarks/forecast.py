"""Scores the forecast against simple rules on recorded runs.

    python benchmarks/forecast.py RUN.npz... [--out results/forecast.json]

At 10, 20, 40, 60 and 80 % of each run the rest is forecast: mean absolute error of the ln ratio over the remaining
measurements, first averaged over the layers of a run, then over runs; and the share of them inside the 50, 80 and 95 %
bands. The rules: the last value, and a regression of ln ratio on ln(step + 1) over the last half of the points seen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ma_monitor.numerics.forecast import forecast

CUTOFFS = (0.1, 0.2, 0.4, 0.6, 0.8)
BANDS = {"50": (2, 4), "80": (1, 5), "95": (0, 6)}
"""Places of each band's ends among the forecast's quantiles."""


def score(file: Path, cutoff: float) -> dict[str, float]:
    """Errors and coverage of one run at one cutoff."""
    data = np.load(file)
    steps, statistics = data["steps"], data["stats"].astype(float)
    ratios = (statistics[:, :, 0].mean(axis=1) / statistics[:, :, -1].mean(axis=1)).T
    seen = int((steps <= cutoff * steps[-1]).sum())
    came = ratios[:, seen:]
    result = forecast(steps[:seen], ratios[:, :seen], lr=data["lr"], total_steps=int(steps[-1]), grid=steps[seen:])
    quantiles = np.stack([layer.quantiles for layer in result.layers])

    def error(guess: NDArray[np.float64]) -> float:
        return float(np.abs(np.log(guess / came)).mean())

    half = slice(seen // 2, seen)
    slope, level = np.polyfit(np.log1p(steps[half]), np.log(ratios[:, half]).T, 1)
    trend = np.exp(level[:, None] + slope[:, None] * np.log1p(steps[seen:]))
    inside = {
        f"in_{name}": float(((came >= quantiles[:, low]) & (came <= quantiles[:, high])).mean())
        for name, (low, high) in BANDS.items()
    }
    return {"forecast": error(quantiles[:, 3]), "last": error(ratios[:, [seen - 1]]), "trend": error(trend), **inside}


def main() -> None:
    """Prints the table and, where asked, writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table = {}
    for cutoff in CUTOFFS:
        scores = [score(file, cutoff) for file in options.runs]
        table[f"{cutoff:.0%}"] = {key: round(float(np.mean([s[key] for s in scores])), 3) for key in scores[0]}
    columns = list(next(iter(table.values())))
    print("seen  " + "  ".join(f"{column:>8}" for column in columns))
    for seen, row in table.items():
        print(f"{seen:>4}  " + "  ".join(f"{row[column]:8.3f}" for column in columns))
    if options.out:
        options.out.write_text(
            json.dumps({"runs": [file.stem for file in options.runs], "table": table}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
