"""Scores the forecast on real runs: what is learned from past runs, and the in-run mixture without it.

    python benchmarks/forecast.py [RUN.npz...] [--quick] [--model MODEL] [--folds N] [--out results/forecast.json]

From 10, 20, 40, 60 and 80 % of each run on the rest is forecast and compared with four rules (``numerics/backtest.py``
says how). What is learned is retrained for every fold, and never sees a configuration it is scored on (seeds of one
together). Then whole kinds are left out: learned on GPU runs and scored on CPU runs, the reverse, and the longest runs
(5,000 updates or more) left out. ``--quick`` retrains nothing and scores MODEL, a combiner's file, by default the
packaged one, which knows its own runs. Without files: all of ``benchmarks/runs``. Intervals are 95 %, by 2,000
bootstrap draws of configurations.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.learned import training
from ma_monitor.learned.combiner import load as load_combiner
from ma_monitor.learned.correction import packaged_path
from ma_monitor.numerics.backtest import (
    BANDS,
    BASELINES,
    CUTOFFS,
    METHODS,
    SCORED,
    Score,
    Trial,
    run_trials,
    score_trials,
    summarize,
    true_peaks,
)
from ma_monitor.numerics.forecast import Forecast, forecast

Floats = NDArray[np.float64]
Correct = Callable[..., Any]

DRAWS = 2000
LONG = 5000
"""Updates from which a run counts as long."""
SETS = {"sweep": "GPU sweep", "gpu": "GPU varied", "neox": "GPU varied", "cpu": "CPU tiny", "tiny": "CPU tiny sweep"}
"""Which set a run is of, by the first part of its name; ``neox-14m`` and ``neox-70m`` are GPU runs of another maker."""
VARYING = ("name", "seed", "seconds", "monitor_share", "last_loss", "device", "precision", "torch")
"""What does not make a configuration."""
THRESHOLDS = (100.0, 300.0)
"""Ratios whose crossings are scored; none of the runs passes 1000."""
ENOUGH_LAYERS, ENOUGH_RUNS = 20, 5
"""Peaks whose intervals are judged; of fewer only counts are given."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """One run: its ratios ``[L, T]`` at ``steps [T]`` and its planned rates ``[N + 1]``."""

    name: str
    of: str
    configuration: str
    steps: NDArray[np.int64]
    ratios: Floats
    lr: Floats
    peaks: Floats

    @property
    def gpu(self) -> bool:
        """Whether it was made on a GPU."""
        return self.of.startswith("GPU")

    @cached_property
    def cases(self) -> list[training.Case]:
        """What is learned from it, made once for all folds."""
        return training.cases_of(
            training.PastRun(self.configuration, self.steps.astype(np.float64), self.ratios, self.lr)
        )

    def trials(self, correct: Correct | None) -> list[Trial]:
        """Forecasts from every cutoff."""

        def forecaster(at: int, grid: NDArray[np.int64]) -> Forecast:
            seen, total = self.steps <= at, int(self.steps[-1])
            return forecast(
                self.steps[seen],
                self.ratios[:, seen],
                grid=grid,
                lr=self.lr,
                total_steps=total,
                thresholds=THRESHOLDS,
                correct=correct,
            )

        return run_trials(self.steps, self.ratios, forecaster, run=self.name, configuration=self.configuration)


def load(file: Path) -> Recorded:
    """Reads a run."""
    with np.load(file) as data:
        means = data["stats"].astype(float).mean(axis=1)  # [T, k + 1, L]
        facts = json.loads(str(data["config"]))
        ratios = (means[:, 0] / means[:, -1]).T
        steps = data["steps"].astype(np.int64)
        configuration = json.dumps({key: value for key, value in facts.items() if key not in VARYING}, sort_keys=True)
        if "schedule" not in facts:  # the two runs of another maker: one of each name
            configuration = facts["name"]
        of = SETS[file.stem.split("-")[0]]
        return Recorded(
            file.stem, of, configuration, steps, ratios, data["lr"].astype(float), true_peaks(steps, ratios)
        )


def ways(runs: Sequence[Recorded], model: Path | None, folds: int) -> Iterator[tuple[str, list[Trial]]]:
    """Ways to forecast, and their trials."""
    yield "in-run mixture alone", [trial for run in runs for trial in run.trials(None)]
    if model:
        correct = load_combiner(model).correct
        yield "model", [trial for run in runs for trial in run.trials(correct)]
        return
    yield from transfers(runs)
    yield "configuration left out", left_out(runs, folds)


def left_out(runs: Sequence[Recorded], count: int) -> list[Trial]:
    """All runs, each forecast by what was learned from other configurations; ``count`` retrainings."""
    names = np.random.default_rng(0).permutation(sorted({run.configuration for run in runs}))
    trials = []
    for number, fold in enumerate(np.array_split(names, min(count, len(names))), start=1):
        began, out = time.perf_counter(), set(fold.tolist())
        correct = learn([run for run in runs if run.configuration not in out])
        trials += [trial for run in runs if run.configuration in out for trial in run.trials(correct)]
        print(f"fold {number}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return trials


def learn(runs: Sequence[Recorded]) -> Correct:
    """What these runs teach."""
    return training.train_on([case for run in runs for case in run.cases]).correct


def transfers(runs: Sequence[Recorded]) -> Iterator[tuple[str, list[Trial]]]:
    """Whole kinds left out."""
    kinds: dict[str, Callable[[Recorded], bool]] = {
        "learned on GPU runs, scored on CPU runs": lambda run: not run.gpu,
        "learned on CPU runs, scored on GPU runs": lambda run: run.gpu,
        f"learned on runs below {LONG} updates, scored on longer": lambda run: int(run.steps[-1]) >= LONG,
    }
    for name, scored in kinds.items():
        taught, asked = [run for run in runs if not scored(run)], [run for run in runs if scored(run)]
        if taught and asked:
            correct = learn(taught)
            yield name, [trial for run in asked for trial in run.trials(correct)]


def assess(trials: Sequence[Trial], runs: Sequence[Recorded]) -> dict[str, Any]:
    """Scores of one way to forecast, for all runs, each set and kind; a rule's bands come from runs of the same set."""
    of = {run.name: run.of for run in runs}
    sets = {name: score_trials([t for t in trials if of[t.run] == name]) for name in sorted(set(of.values()))}
    scores = {name: own for name, own in sets.items() if own}
    everything = [score for own in scores.values() for score in own]
    groups = {"all": everything} if len(scores) > 1 else {}
    return {
        "scores": {name: with_intervals(own) for name, own in (groups | scores).items()},
        "peaks": {name: peaks([t for t in trials if name in ("all", of[t.run])], runs) for name in (*groups, *scores)},
        "crossings": crossings(trials, runs),
        "leads": leads(trials),
        "seeds": seeds(trials, runs),
    }


def with_intervals(scores: Sequence[Score]) -> dict[str, Any]:
    """The summary, with bootstrap intervals for the forecast's error and bands, for ratios and for their mean."""
    names = sorted({score.configuration for score in scores})
    total = np.zeros((len(names), len(CUTOFFS), len(METHODS), len(SCORED)))
    count = np.zeros((len(names), len(CUTOFFS)))
    for score in scores:
        row, column = names.index(score.configuration), CUTOFFS.index(score.percent)
        values = [np.nan if value is None else value for value in (getattr(score, name) for name in SCORED)]
        total[row, column, METHODS.index(score.method)] += values
        count[row, column] += score.method == "forecast"
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), DRAWS)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.einsum("dn,ncms->dcms", draws, total) / (draws @ count)[:, :, None, None]
    document = summarize(scores)
    for place, name in enumerate(SCORED[:3]):
        ratios = means[:, :, 0, place] / means[:, :, 1:, place].min(axis=2)
        for cutoff in document["cutoffs"]:
            column = CUTOFFS.index(cutoff["percent"])
            cutoff.setdefault("ratio_95", {})[name] = interval(ratios[:, column])
        document.setdefault("mean_ratio_95", {})[name] = interval(ratios.mean(axis=1))
    for cutoff in document["cutoffs"]:
        own = means[:, CUTOFFS.index(cutoff["percent"]), 0]
        cutoff["forecast_95"] = {name: interval(own[:, place]) for place, name in enumerate(SCORED)}
    pooled = means[:, :, 0].mean(axis=1)
    mine = [cutoff["methods"]["forecast"] for cutoff in document["cutoffs"]]
    document["coverage"] = {
        name: {"mean": mean_or_none([one[name] for one in mine]), "95": interval(pooled[:, SCORED.index(name)])}
        for name in BANDS
    }
    return document


def interval(values: Floats) -> list[float] | None:
    """The middle 95 % of bootstrap draws; None where a score is not known."""
    return None if not np.isfinite(values).all() else np.quantile(values, [0.025, 0.975]).tolist()


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean, None where one is not known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def peaks(trials: Sequence[Trial], runs: Sequence[Recorded]) -> list[dict[str, Any]]:
    """For each cutoff: Brier score of "a peak before the end" beside the best constant's, and the intervals' hits.

    Brier scores are means over layers, then over runs. The constant is the share of layers with a peak in the very runs
    that are scored: no constant does better. Hits are counted over layers that have a peak.
    """
    real = {run.name: run.peaks for run in runs}
    rows = []
    for percent in CUTOFFS:
        said, came, hits, ahead = [], [], [], []
        for trial in (t for t in trials if t.percent == percent):
            truth = real[trial.run][[layer.layer - 1 for layer in trial.layers]]
            said.append(np.array([layer.peak.probability if layer.peak else 0.0 for layer in trial.layers]))
            came.append(np.isfinite(truth).astype(float))
            inside = [holds(layer.peak, step) for layer, step in zip(trial.layers, truth, strict=True)]
            hits.append(np.array(inside)[np.isfinite(truth)])
            ahead.append(truth[np.isfinite(truth)] > trial.at)
        if not came:
            continue
        rate = float(np.mean([one.mean() for one in came]))
        found, later = np.concatenate(hits).astype(bool), np.concatenate(ahead).astype(bool)
        where = sum(len(one) > 0 for one in hits)
        enough = len(found) >= ENOUGH_LAYERS and where >= ENOUGH_RUNS
        rows.append(
            {
                "percent": percent,
                "layers": int(sum(map(len, came))),
                "with_peak": len(found),
                "runs_with_peak": where,
                "brier": float(np.mean([((p - c) ** 2).mean() for p, c in zip(said, came, strict=True)])),
                "brier_of_constant": float(np.mean([((rate - c) ** 2).mean() for c in came])),
                "inside_80": float(found.mean()) if enough else None,
                "peaks_ahead": int(later.sum()),
                "inside_80_ahead": float(found[later].mean()) if later.sum() >= ENOUGH_LAYERS else None,
            }
        )
    return rows


def holds(peak: Any, step: float) -> bool:
    """Whether the 80 % interval holds the real step; one without an upper end reaches to the scheduled end."""
    if peak is None or peak.low is None:
        return False
    return bool(peak.low <= step and (peak.high is None or step <= peak.high))


def crossings(trials: Sequence[Trial], runs: Sequence[Recorded]) -> list[dict[str, Any]]:
    """For each cutoff and threshold: the Brier score of "it is crossed before the end", of layers that were below it.

    Scores are means over layers, for crossings are few. The constant is the share of these very layers that crossed.
    """
    ratios, steps = {run.name: run.ratios for run in runs}, {run.name: run.steps for run in runs}
    rows = []
    for percent in CUTOFFS:
        for threshold in THRESHOLDS:
            said, came = [], []
            for trial in (t for t in trials if t.percent == percent):
                later = steps[trial.run] > trial.at
                for layer in trial.layers:
                    over, crossing = ratios[trial.run][layer.layer - 1] >= threshold, layer.crossings[threshold]
                    if crossing is not None and not over[~later].any():
                        said.append(crossing.probability)
                        came.append((trial.run, bool(over.any())))
            p, y = np.array(said), np.array([crossed for _, crossed in came])
            if y.size:
                rows.append(
                    {
                        "percent": percent,
                        "threshold": threshold,
                        "layers": len(y),
                        "crossed": int(y.sum()),
                        "runs_crossed": len({run for run, crossed in came if crossed}),
                        "brier": float(((p - y) ** 2).mean()),
                        "brier_of_constant": float(y.mean() * (1 - y.mean())),
                        "probability_where_crossed": float(p[y].mean()) if y.any() else None,
                        "probability_elsewhere": float(p[~y].mean()) if not y.all() else None,
                    }
                )
    return rows


def leads(trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
    """For each cutoff: mean weight of past runs, share of runs that the in-run mixture led, and that it had alone."""
    found = {}
    for percent in CUTOFFS:
        weights = np.array([trial.past_runs for trial in trials if trial.percent == percent])
        if weights.size:
            shares = {"mixture_led": (weights < 0.5).mean(), "mixture_alone": (weights == 0).mean()}
            found[str(percent)] = {"past_runs": float(weights.mean())} | {k: float(v) for k, v in shares.items()}
    return found


def seeds(trials: Sequence[Trial], runs: Sequence[Recorded]) -> list[dict[str, Any]]:
    """What another seed's course is worth: each run predicted by the mean change of the others of its configuration.

    ``other_seeds`` is the error of that from the cutoff on, ``limit`` what it would be with the mean of endlessly many
    seeds (errors of the mean of n - 1 seeds and of the run itself add up in squares). Who knows all of a configuration
    but the seed (first weights, order of the data) has no more than that, beside what the run itself has shown.
    """
    rows = []
    for name in sorted({trial.configuration for trial in trials}):
        own = [run for run in runs if run.configuration == name]
        if len(own) < 2 or any(not np.array_equal(run.steps, own[0].steps) for run in own):
            continue
        made = score_trials([trial for trial in trials if trial.configuration == name])
        for percent in CUTOFFS:
            now = int((100 * own[0].steps <= percent * own[0].steps[-1]).sum()) - 1
            change = np.stack([np.log(run.ratios[:, now + 1 :] / run.ratios[:, [now]]) for run in own])
            error = float(np.abs(change - (change.sum(axis=0) - change) / (len(own) - 1)).mean())
            scores = {
                method: float(np.mean([s.error for s in made if s.percent == percent and s.method == method]))
                for method in METHODS
            }
            limit = error / float(np.sqrt(1 + 1 / (len(own) - 1)))
            names = [run.name for run in own]
            rows.append({"runs": names, "percent": percent, "other_seeds": error, "limit": limit, **scores})
    return rows


def error_table(document: dict[str, Any]) -> str:
    """Errors and ratios in Markdown."""
    lines = [
        "| seen | runs | forecast | " + " | ".join(BASELINES) + " | forecast / best rule | CRPS / best | coverage |"
    ]
    lines.append("|---" * (len(BASELINES) + 6) + "|")
    for row in document["cutoffs"]:
        numbers = " | ".join(f"{row['methods'][method]['error']:.3f}" for method in METHODS)
        low, high = row["ratio_95"]["error"] or (np.nan, np.nan)
        covered = " / ".join(f"{row['methods']['forecast'][name]:.2f}" for name in BANDS)
        crps = row["ratio"]["crps"]
        lines.append(
            f"| {row['percent']} % | {row['runs']} | {numbers} | {row['ratio']['error']:.2f} ({low:.2f}–{high:.2f}) "
            f"| {'' if crps is None else format(crps, '.2f')} | {covered} |"
        )
    low, high = document["mean_ratio_95"]["error"] or (np.nan, np.nan)
    held = " / ".join("" if c["mean"] is None else format(c["mean"], ".2f") for c in document["coverage"].values())
    crps, band = (document["mean_ratio"][name] for name in ("crps", "interval"))
    more = "" if crps is None else f", of CRPS {crps:.2f}, of the interval score {band:.2f}"
    ratio = f"mean ratio {document['mean_ratio']['error']:.2f} ({low:.2f}–{high:.2f}){more}; bands hold {held}"
    return "\n".join(lines) + f"\n\n{ratio}"


def rounded(value: Any) -> Any:
    """Numbers to four digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Prints tables and, where asked, writes all scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--quick", action="store_true", help="retrain nothing: MODEL and the mixture alone")
    parser.add_argument("--model", type=Path, default=packaged_path(), help="of --quick (default: the packaged one)")
    parser.add_argument("--folds", type=int, default=10, help="retrainings (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    files = options.runs or sorted((Path(__file__).parent / "runs").rglob("*.npz"))
    runs = [load(file) for file in files]
    document: dict[str, Any] = {
        "runs": {of: sorted(run.name for run in runs if run.of == of) for of in sorted({run.of for run in runs})},
        "folds": None if options.quick else options.folds,
        "ways": {},
    }
    for name, trials in ways(runs, options.model if options.quick else None, options.folds):
        document["ways"][name] = assess(trials, runs)
        for group, scores in document["ways"][name]["scores"].items():
            print(f"\n{name}: {group}\n\n{error_table(scores)}", flush=True)
        if options.out:  # after each, for the last takes long
            options.out.write_text(json.dumps(rounded(document), indent=1) + "\n")


if __name__ == "__main__":
    main()
