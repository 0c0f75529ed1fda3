"""Is the fit the global optimum, how fast is it, and do its intervals hold what they say?

Run with ``python benchmarks/fit.py [--runs DIRECTORY] [--quick]`` on one core (``OMP_NUM_THREADS=1``); the result goes
to ``benchmarks/results/fit.json``. Times are the best of several repetitions: whatever else the machine does only adds
to them. The reference solvers take nearly all of the ten minutes; ``--quick`` runs them on a tenth of the curves and
writes nothing.

    optimum     residual sums against curve_fit on Eq. 9 and Eq. 14 and differential evolution, in the same box
    speed       36 layers at 154 and at 1500 points, memory, and curve_fit on Eq. 14 beside it
    table_5     mean R² and AICc per run and hypothesis
    coverage    how often 80 % intervals hold the truth, and what is identified that should not be
    foresight   real runs cut at 60 %: identified quantities against the rest of the run
    box         how much identified asymptotes depend on the edge of the box in τ₀
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy.optimize import Bounds, curve_fit, differential_evolution

from ma_monitor.numerics.batch import fit_curves
from ma_monitor.numerics.curve import Curve
from ma_monitor.numerics.fit import Fit, fit_trajectories
from ma_monitor.numerics.projection import B_MAX, C_MAX, C_MIN

Floats = NDArray[np.float64]
HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "fit.json"
WORSE, FLOOR = 1e-6, 1e-12
"""Room of a residual sum against the best reference: relative, and as a share of the total sum of squares."""


@dataclass(frozen=True)
class Series:
    """One trajectory and where it comes from."""

    name: str
    t: Floats
    y: Floats


def load_runs(directory: Path) -> dict[str, tuple[Floats, Floats]]:
    """Name → steps ``[T]`` and ratios of means ``[L, T]`` of every run in the directory."""
    runs = {}
    for path in sorted(directory.glob("*.npz")):
        with np.load(path) as data:
            means = data["stats"].mean(axis=1)
            runs[path.stem] = data["steps"].astype(np.float64), (means[:, 0] / means[:, 3]).T
    return runs


def synthetic(rng: np.random.Generator, number: int) -> Series:
    """A random curve of every class, dips and decays included: 8 to 1500 points, noise 0 to 10 %, both spacings."""
    points = int(np.exp(rng.uniform(np.log(8), np.log(1500))))
    last = 10 ** rng.uniform(2, 6)
    linear = rng.random() < 0.5
    t = np.linspace(0, last, points) if linear else np.unique(np.r_[0, np.geomspace(1, last, points)])
    s = t / last
    kind = ("Eq. 14", "Eq. 14", "early peak", "log increase", "decay", "dip", "line", "flat")[number % 8]
    b, c = 10 ** rng.uniform(-4, 2.5), 10 ** rng.uniform(-5, 1.4)
    a1, a2 = rng.choice([1, 1, -1]) * 10 ** rng.uniform(-1, 2), rng.normal() * 10 ** rng.uniform(-1, 2)
    shapes: dict[str, Callable[[], Floats]] = {
        "Eq. 14": lambda: np.exp(-b * s) * (a1 * np.log(s + c) + a2) + 10 ** rng.uniform(0, 2),
        "early peak": lambda: 6 + 60 * np.exp(-rng.uniform(3, 30) * s) * (np.log(s + 0.01) + 4.6),
        "log increase": lambda: 6 + rng.uniform(1, 20) * np.log1p(s / 10 ** rng.uniform(-4, -1)),
        "decay": lambda: 5 + 20 * np.exp(-rng.uniform(2, 100) * s),
        "dip": lambda: 9 - 5 * np.exp(-rng.uniform(5, 50) * s) * (np.log(s + 0.02) + 4),
        "line": lambda: 5 + rng.uniform(-4, 20) * s,
        "flat": lambda: np.full_like(s, 30.0),
    }
    noise = float(rng.choice([0, 0.001, 0.02, 0.05, 0.1])) if kind != "flat" else float(rng.uniform(0.01, 0.1))
    clean = np.asarray(shapes[kind](), dtype=np.float64)
    name = f"{kind}, {len(t)} {'linear' if linear else 'log'}, {noise:.1%}"
    return Series(name, t, clean * (1 + noise * rng.standard_normal(len(t))))


def boxed(series: Series, beta: float, tau0: float) -> float:
    """Residual sum of the best curve at this (β, τ₀), moved into the box if it is outside."""
    t, y = series.t, series.y
    s = (t - t[0]) / t[-1]
    b = float(np.clip(beta * t[-1], 0, B_MAX))
    c = float(np.clip((tau0 + t[0]) / t[-1], C_MIN, C_MAX))
    return projected(np.array([np.log10(max(b, 1e-9)), np.log10(c)]), s, y - y.mean())


def projected(place: Floats, s: Floats, y: Floats) -> float:
    """Residual sum of Eq. 14 at (log10 βT, log10 (τ₀ + t_min)/T): three columns by ``lstsq``."""
    b, c = 10.0**place
    design = np.stack([np.ones_like(s), -np.expm1(-b * s), np.exp(-b * s) * np.log1p(s / c)], axis=1)
    size = np.linalg.norm(design, axis=0)
    design /= np.where(size > 0, size, 1.0)
    residual = y - design @ np.linalg.lstsq(design, y, rcond=1e-12)[0]
    return float(residual @ residual)


def evolution(series: Series) -> float:
    """Differential evolution on the projected Eq. 14 over the whole box."""
    s = (series.t - series.t[0]) / series.t[-1]
    box = Bounds([-9.0, np.log10(C_MIN)], [np.log10(B_MAX), np.log10(C_MAX)])
    args = (s, series.y - series.y.mean())
    return float(differential_evolution(projected, box, args=args, seed=0, tol=1e-10, maxiter=120).fun)


def equation_9(t: Floats, a: float, lam: float, gamma: float, t0: float, k: float) -> Floats:
    """Eq. 9."""
    x = gamma * t + t0
    return np.asarray(a * np.exp(-lam * x) * np.log(x) + k)


def equation_14(t: Floats, beta: float, tau0: float, a1: float, a2: float, k: float) -> Floats:
    """Eq. 14."""
    return np.asarray(np.exp(-beta * t) * (a1 * np.log(t + tau0) + a2) + k)


def jacobian_14(t: Floats, *parameters: float) -> Floats:
    """Its analytic Jacobian."""
    return Curve(*parameters).jacobian(t)


def by_curve_fit(series: Series, equation: int, evaluations: int | None) -> tuple[float, float] | None:
    """(β, τ₀) that ``curve_fit`` finds from the paper's start, normalised as the paper does; None where it fails."""
    t, y = series.t / series.t[-1], series.y
    spread = float(np.ptp(y)) or 1.0
    y = (y - y.min()) / spread
    lam, gamma, t0 = 1 / np.std(t), 1 / np.ptp(t), 1.0
    a, k = 1.0, 0.5
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            low, high = np.array([-np.inf, 0, 1e-12, 1e-9, -np.inf]), np.full(5, np.inf)
            if equation == 9:
                start = (a, lam, gamma, t0, k)
                _, lam, gamma, t0, _ = curve_fit(equation_9, t, y, start, bounds=(low, high), max_nfev=evaluations)[0]
                return float(lam * gamma / series.t[-1]), float(t0 / gamma * series.t[-1])
            a1 = a * np.exp(-lam * t0)
            start = (lam * gamma, t0 / gamma, a1, a1 * np.log(gamma), k)
            low[:2], low[2:], high[:2] = (0, C_MIN - t[0]), -np.inf, (B_MAX, C_MAX - t[0])
            options: dict[str, Any] = {"bounds": (low, high), "jac": jacobian_14, "max_nfev": evaluations}
            found = curve_fit(equation_14, t, y, start, **options)[0]
            return float(found[0] / series.t[-1]), float(found[1] * series.t[-1])
        except (RuntimeError, ValueError):
            return None


def optimum(runs: dict[str, tuple[Floats, Floats]], curves: int, evaluations: int) -> dict[str, Any]:
    """Residual sums of the fit against the best of the references on every curve."""
    rng = np.random.default_rng(1)
    every = [Series(f"{name}, layer {i + 1}", t, y[i]) for name, (t, y) in runs.items() for i in range(len(y))]
    every += [synthetic(rng, number) for number in range(curves)]
    worst, misses, solved = -np.inf, [], {"9": 0, "14": 0}
    excess: dict[str, list[float]] = {"9": [], "14": [], "evolution": []}
    for series in every:
        own = float(fit_curves(series.t, series.y[None]).sse[0])
        total = float(((series.y - series.y.mean()) ** 2).sum())
        reference = {"evolution": evolution(series)}
        for equation in (9, 14):
            place = by_curve_fit(series, equation, evaluations)
            if place is not None:
                solved[str(equation)] += 1
                reference[str(equation)] = boxed(series, *place)
        best = min(reference.values())
        room = (own - best - FLOOR * total) / best if best > 0 else (0.0 if own <= FLOOR * total else np.inf)
        worst = max(worst, room)
        if own > best * (1 + WORSE) + FLOOR * total:
            misses.append({"curve": series.name, "sse": own, **reference})
        for name, value in reference.items():
            excess[name].append((value - own) / total)
    return {
        "curves": len(every),
        "worse_than_best_reference": misses,
        "largest_relative_excess_after_floor": worst,
        "curve_fit_max_nfev": evaluations,
        "converged": {f"curve_fit Eq. {name}": count / len(every) for name, count in solved.items()},
        "left_a_share_of_1e-6_of_the_variance_or_more_unexplained": {
            name: float(np.mean(np.array(values) > 1e-6)) for name, values in excess.items()
        },
    }


def best_of(function: Callable[[], object], repeat: int) -> float:
    """Least wall time of several calls, in milliseconds."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def speed(runs: dict[str, tuple[Floats, Floats]], repeat: int) -> dict[str, Any]:
    """Times and memory of 36 layers, and curve_fit on Eq. 14 on the real layers."""
    rng = np.random.default_rng(2)
    result: dict[str, Any] = {}
    for points in (154, 1500):
        t = np.r_[0, 2.0 ** np.arange(9), np.linspace(1000, 143_000, points - 10)]
        s = t / t[-1]
        clean = [6 + 30 * rng.random() * np.exp(-0.15 * k * s) * np.log1p(s / 0.02) for k in range(36)]
        y = np.array(clean) * (1 + 0.03 * rng.standard_normal((36, points)))
        tracemalloc.start()
        fit_curves(t, y)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        result[f"36 layers x {points}"] = {
            "curves_ms": best_of(partial(fit_curves, t, y), repeat),
            "with_intervals_classes_and_hypotheses_ms": best_of(partial(fit_trajectories, t, y), repeat),
            "curves_peak_memory_mb": memory / 2**20,
        }
    own = result["36 layers x 154"]["curves_ms"] / 36
    every = [Series(name, t, row) for name, (t, y) in runs.items() for row in y]
    reference = {}
    for label, evaluations in (("default", None), ("20000", 20_000)):
        taken, solved = [], 0
        for series in every:
            start = time.perf_counter()
            solved += by_curve_fit(series, 14, evaluations) is not None
            taken.append(1e3 * (time.perf_counter() - start))
        reference[label] = {
            "mean_ms_per_layer": float(np.mean(taken)),
            "median_ms_per_layer": float(np.median(taken)),
            "success": solved / len(every),
            "times_slower_mean": float(np.mean(taken)) / own,
            "times_slower_median": float(np.median(taken)) / own,
        }
    return {**result, "own_ms_per_layer": own, "curve_fit Eq. 14 by maxfev": reference}


def table_5(runs: dict[str, tuple[Floats, Floats]]) -> dict[str, Any]:
    """Mean R² and mean AICc over layers for each hypothesis; ``second_order`` is the best of its three dampings."""
    table: dict[str, Any] = {}
    for run, (t, y) in runs.items():
        fits = fit_trajectories(t, y)
        scores: dict[str, list[tuple[float, float]]] = {"curve": [(fit.r2 or 0, fit.aicc or 0) for fit in fits]}
        for name in fits[0].hypotheses:
            scores[name] = [(fit.hypotheses[name].r2 or 0, fit.hypotheses[name].aicc or 0) for fit in fits]
        for end in ("", "_offset"):
            kinds = [scores[f"second_order_{kind}damped{end}"] for kind in ("under", "critically_", "over")]
            scores[f"second_order{end}"] = [max(layer) for layer in zip(*kinds, strict=True)]
        table[run] = {
            name: {"r2": float(np.mean([r2 for r2, _ in values])), "aicc": float(np.mean([aicc for _, aicc in values]))}
            for name, values in scores.items()
        }
        lowest = [min(scores, key=lambda name: scores[name][layer][1]) for layer in range(len(fits))]
        table[run]["lowest_aicc_by_layer"] = lowest
    return table


@dataclass(frozen=True)
class Truth:
    """A curve with its true asymptote, peak (as a share of the window) and height."""

    values: Floats
    asymptote: float
    peak: float
    height: float


def truth(rng: np.random.Generator, s: Floats, earliest: float, latest: float) -> Truth:
    """A random curve that starts at 7, peaks between these shares of the window, and settles above 1."""
    while True:
        peak = np.exp(rng.uniform(np.log(earliest), np.log(latest)))
        b, c = np.exp(rng.uniform(np.log(0.3), np.log(8))) / peak, peak * np.exp(rng.uniform(np.log(0.01), np.log(2)))
        ratio = 1 / (b * (peak + c)) - np.log(peak + c)
        shape = np.exp(-b * s) * (np.log(s + c) + ratio)
        start, top = (np.exp(-b * at) * (np.log(at + c) + ratio) for at in (0.0, peak))
        height = 7 * rng.uniform(2, 20)
        amplitude = (height - 7) / (top - start)
        asymptote = 7 - amplitude * start
        if 1 < asymptote < height and amplitude > 0:
            return Truth(amplitude * shape + asymptote, asymptote, peak, height)


def holds(low: float | None, high: float | None, value: float) -> bool:
    """Whether an interval holds a value."""
    return low is not None and high is not None and low <= value <= high


def coverage(layers: int) -> dict[str, Any]:
    """Share of identified quantities whose 80 % interval holds the truth, and of far peaks that are identified."""
    hits: dict[str, dict[str, list[bool]]] = {}
    far: dict[str, list[bool]] = {}
    for rho in (0.0, 0.6):
        for points in (60, 154):
            for noise in (0.02, 0.04, 0.07):
                for earliest, latest in ((0.03, 2.0), (2.0, 10.0)):
                    rng = np.random.default_rng([int(1e3 * noise), points, int(10 * rho), int(latest)])
                    late = np.linspace(143_000 / (points - 11), 143_000, points - 11)
                    t = np.unique(np.r_[0, 2.0 ** np.arange(10), late])
                    truths = [truth(rng, t / t[-1], earliest, latest) for _ in range(layers)]
                    error = rng.standard_normal((layers, len(t)))
                    for i in range(1, len(t)):
                        error[:, i] = rho * error[:, i - 1] + np.sqrt(1 - rho**2) * error[:, i]
                    fits = fit_trajectories(t, np.array([true.values for true in truths]) * (1 + noise * error))
                    label = "white" if rho == 0 else "AR(1) .6"
                    for key in (f"{label}, all", f"{label}, {points} points"):
                        score(hits.setdefault(key, {"K": [], "peak step": [], "peak height": []}), fits, truths, t[-1])
                    if earliest >= 2:
                        far.setdefault(label, []).extend(fit.peak.identified for fit in fits)
    shown = {
        key: {name: {"coverage": float(np.mean(hit)), "identified": len(hit)} for name, hit in group.items()}
        for key, group in hits.items()
    }
    unidentified = {label: 1 - float(np.mean(flags)) for label, flags in far.items()}
    return {"by_noise": shown, "far_peaks_not_identified": unidentified}


def score(hits: dict[str, list[bool]], fits: tuple[Fit, ...], truths: list[Truth], last: float) -> None:
    """Adds whether the intervals of identified quantities hold the truth."""
    for fit, true in zip(fits, truths, strict=True):
        if fit.asymptote.identified:
            hits["K"].append(holds(fit.asymptote.low, fit.asymptote.high, true.asymptote))
        if fit.peak.identified:
            hits["peak step"].append(holds(fit.peak.low, fit.peak.high, true.peak * last))
            hits["peak height"].append(holds(fit.peak.height_low, fit.peak.height_high, true.height))


def foresight(runs: dict[str, tuple[Floats, Floats]]) -> dict[str, Any]:
    """Runs cut at 60 %: each layer's class and identified quantities then, beside the fit of the whole run."""
    layers: list[dict[str, Any]] = []
    for run, (t, y) in runs.items():
        seen = t <= 0.6 * t[-1]
        pairs = zip(fit_trajectories(t[seen], y[:, seen]), fit_trajectories(t, y), strict=True)
        for number, (early, late) in enumerate(pairs, start=1):
            layers.append(
                {
                    "run": run,
                    "layer": number,
                    "class_at_60_and_end": (early.trajectory_class.value, late.trajectory_class.value),
                    "asymptote_identified": early.asymptote.identified,
                    "asymptote": [early.asymptote.low, early.asymptote.value, early.asymptote.high],
                    "asymptote_at_end": late.asymptote.value,
                    "mean_of_last_5": float(y[number - 1, -5:].mean()),
                    "peak_identified": early.peak.identified,
                }
            )
    identified = [layer for layer in layers if layer["asymptote_identified"]]
    held = [holds(layer["asymptote"][0], layer["asymptote"][2], layer["mean_of_last_5"]) for layer in identified]
    misses = [abs(float(np.log(layer["asymptote"][1] / layer["mean_of_last_5"]))) for layer in identified]
    return {
        "asymptotes_identified": len(identified),
        "of_which_hold_the_mean_of_the_last_5": sum(held),
        "median_abs_log_error_against_last_5": float(np.median(misses)) if misses else None,
        "peaks_identified": sum(layer["peak_identified"] for layer in layers),
        "layers": layers,
    }


def box(runs: dict[str, tuple[Floats, Floats]]) -> dict[str, Any]:
    """Identified asymptotes of fits that end on an edge of the box, with the edge in τ₀ a hundred times further out."""
    changes = []
    for t, y in runs.values():
        fits = fit_trajectories(t, y)
        with mock.patch("ma_monitor.numerics.projection.C_MAX", 100 * C_MAX):
            further = fit_trajectories(t, y)
        for near, far in zip(fits, further, strict=True):
            if near.at_bound and near.asymptote.identified and far.asymptote.value is not None:
                changes.append(abs(far.asymptote.value / (near.asymptote.value or 1) - 1))
    return {"identified_on_the_edge": len(changes), "largest_relative_change_of_K": max(changes, default=None)}


def main() -> None:
    """Runs everything, prints it, and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=HERE.parents[1] / "shared" / "data" / "runs")
    parser.add_argument("--quick", action="store_true", help="a tenth of the curves; write nothing")
    options = parser.parse_args()
    runs = load_runs(options.runs)
    result = {
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "processor": platform.processor() or platform.machine(),
        "runs": sorted(runs),
        "speed": speed(runs, 5 if options.quick else 30),
        "table_5": table_5(runs),
        "coverage": coverage(30 if options.quick else 300),
        "foresight": foresight(runs),
        "box": box(runs),
        "optimum": optimum(runs, 24 if options.quick else 240, 100 if options.quick else 1000),
    }
    print(text := json.dumps(result, indent=1))
    if not options.quick:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
