"""Which changes of the numerical code no test notices: a random sample of mutmut's mutants.

    python -m benchmarks.mutants [--count 200] [--seed 0]

Works in ``mutants/`` beside the package (ignored by git). What is mutated and which tests judge stands in
``pyproject.toml`` under ``[tool.mutmut]``; Hypothesis tries 8 examples there. A mutant survives if every test that runs
its function passes. All mutants would take days on two cores, hence a sample drawn once and for all; its share of
survivors has a Wilson interval. The result goes to ``results/mutants-SEED.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

from scipy.stats import binomtest

FOLDER = Path("mutants")
SURVIVED = 0
NOT_TRIED = (None, 33)
"""mutmut's codes of a mutant that was not run, or whose function no test runs (which then survives, too)."""


def codes() -> dict[str, int | None]:
    """Exit code of pytest by mutant; None where it was not tried."""
    found: dict[str, int | None] = {}
    for file in sorted(FOLDER.rglob("*.meta")):
        found |= json.loads(file.read_text())["exit_code_by_key"]
    return found


def mutmut(*names: str) -> None:
    """Tries these mutants."""
    subprocess.run([sys.executable, "-m", "mutmut", "run", "--max-children", "2", *names], check=False)


def main() -> None:
    """Draws, tries, and writes what survived, with its change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not any(FOLDER.rglob("*.meta")):
        mutmut("ma_monitor.numerics.values.*")  # makes them all
    drawn = random.Random(options.seed).sample(sorted(codes()), options.count)
    mutmut(*drawn)
    after = codes()
    tried = {name: after[name] for name in drawn if after[name] is not None}
    survivors = sorted(name for name, code in tried.items() if code in (SURVIVED, *NOT_TRIED))
    interval = binomtest(len(survivors), len(tried)).proportion_ci(method="wilson")
    changes = {
        name: subprocess.run([sys.executable, "-m", "mutmut", "show", name], capture_output=True, text=True).stdout
        for name in survivors
    }
    document = {
        "mutants": len(after),
        "tried": len(tried),
        "codes": Counter(str(code) for code in tried.values()),
        "survived": len(survivors),
        "share": round(len(survivors) / len(tried), 3),
        "interval_95": [round(interval.low, 3), round(interval.high, 3)],
        "survivors": changes,
    }
    result = Path(__file__).parent / "results" / f"mutants-{options.seed}.json"
    result.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({key: value for key, value in document.items() if key != "survivors"}, indent=1))


if __name__ == "__main__":
    main()
