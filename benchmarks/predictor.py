"""From architecture to trajectory: packs the sweep, and says how well shapes that were held out are predicted.

    python benchmarks/predictor.py pack FOLDER…         # recorded runs (NAME.npz of make_runs.py) → the packaged data
    python benchmarks/predictor.py table3 [--data RUNS] # the paper's Table 3, by rows and by whole models
    python benchmarks/predictor.py trajectories         # final ratio and intervals, whole shapes held out; seeds
    python benchmarks/predictor.py prior [FOLDER…]      # the forecast with and without the prior, at 5 and 10 % seen
    python benchmarks/predictor.py explain --out FOLDER [--data RUNS]   # what decides K, λ and the final ratio; figures

All read the packaged sweep, but with ``--data``, which takes runs that ``ma-monitor import --hub`` made of the paper's
data. Results go to ``benchmarks/results/predictor-*.json``. Seeds of one shape are always held out together.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from xgboost import XGBRegressor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ma_monitor.analysis import fit_run
from ma_monitor.architecture import explain, figures, parameters
from ma_monitor.architecture.features import FEATURES, Shape, layer_features, shape_of
from ma_monitor.architecture.prediction import prior
from ma_monitor.architecture.predictor import PACKAGED as PREDICTOR
from ma_monitor.architecture.predictor import (
    RIDGE,
    SETTINGS,
    TIMES,
    Predictor,
    Table,
    fit_predictor,
    load_predictor,
    log_trajectories,
    make_table,
    places,
    recipe_of,
    save_predictor,
)
from ma_monitor.architecture.sweep import PACKAGED as SWEEP
from ma_monitor.architecture.sweep import Training, load_sweep, save_sweep
from ma_monitor.cli.common import open_run
from ma_monitor.learned import training
from ma_monitor.learned.prior import LEVELS, Prior, combined, conditioned
from ma_monitor.numerics.clock import learning_rate_clock
from ma_monitor.numerics.fit import Fit, fit_trajectories
from ma_monitor.numerics.forecast import forecast

Floats = NDArray[np.float64]
Correct = Callable[..., Any]
RESULTS = Path(__file__).with_name("results")
PYTHIA = {
    "14m": (6, 128, 4, 50_304),
    "70m": (6, 512, 8, 50_304),
    "160m": (12, 768, 12, 50_304),
    "410m": (24, 1024, 16, 50_304),
    "1b": (16, 2048, 8, 50_304),
    "1.4b": (24, 2048, 16, 50_304),
    "2.8b": (32, 2560, 32, 50_304),
    "6.9b": (32, 4096, 32, 50_432),
    "12b": (36, 5120, 40, 50_688),
}
"""Depth, width, heads and vocabulary; MLP 4×, rotary share 0.25 and base 10,000 throughout."""


def read_recorded(path: Path) -> Training:
    """One recorded run as the sweep holds it."""
    from benchmarks import make_runs

    with np.load(path, allow_pickle=False) as data:
        facts: dict[str, Any] = json.loads(str(data["config"]))
        names = {field.name for field in dataclasses.fields(make_runs.Training)}
        made = make_runs.Training(**{name: value for name, value in facts.items() if name in names})
        return Training(
            name=made.name,
            kind=made.kind,
            shape=shape_of(make_runs.build(made).config),
            seed=made.seed,
            schedule=made.schedule,
            batch=made.batch * made.length,
            lr=data["lr"].astype(np.float64),
            steps=data["steps"].astype(np.int64),
            means=data["stats"].astype(np.float64).mean(axis=1),
        )


def pack(folders: Sequence[Path]) -> None:
    """Writes the packaged sweep, its fitted parameters, and the predictor that it teaches."""
    trainings = [read_recorded(file) for folder in folders for file in sorted(folder.glob("*.npz"))]
    save_sweep(trainings, SWEEP)
    trainings = list(load_sweep())
    fits = {one.name: fit_trajectories(one.steps, one.ratios, compare=False) for one in trainings}
    columns = ("A", "log_abs_A", "lambda", "gamma", "t0", "K", "r2", "class")
    with SWEEP.with_name("parameters.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("training", "layer", *columns))
        for name, layers in fits.items():
            for number, fit in enumerate(layers, start=1):
                values = fit.to_dict()
                cells = [f"{values[c]:.5g}" if isinstance(values[c], float) else values[c] for c in columns]
                out.writerow((name, number, *cells))
    save_predictor(fit_predictor([one for one in trainings if one.kind == "gpu"]), PREDICTOR)
    for path in (SWEEP, PREDICTOR, SWEEP.with_name("parameters.csv")):
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    grown = [bool((one.ratios[:, -1] >= 5 * one.ratios[:, 0]).any()) for one in trainings]
    print(f"{len(trainings)} trainings, {sum(grown)} with a layer that ends at 5 times its start or more")


def models_of(data: Path | None) -> tuple[list[str], list[tuple[Shape, Sequence[Fit]]]]:
    """Names and fits of the paper's models, or of the packaged sweep's GPU trainings."""
    if data is None:
        trainings = [one for one in load_sweep() if one.kind == "gpu"]
        fits = [fit_trajectories(one.steps, one.ratios, compare=False) for one in trainings]
        return [one.name for one in trainings], [(one.shape, fit) for one, fit in zip(trainings, fits, strict=True)]
    runs = {path.parent.name: open_run(str(path.parent), "ratio_of_means") for path in sorted(data.glob("*/run.json"))}
    sizes = {name: name.lower().replace("pythia", "").strip("-_") for name in runs}
    unknown = [name for name, size in sizes.items() if size not in PYTHIA]
    if unknown or not runs:
        raise SystemExit(f"{data}: runs must be of Pythia's sizes ({', '.join(PYTHIA)}), got {unknown or 'none'}")
    models: list[tuple[Shape, Sequence[Fit]]] = [
        (pythia(sizes[name]), fit_run(run, compare=False)) for name, run in runs.items()
    ]
    for name, (shape, own) in zip(runs, models, strict=True):
        if len(own) != shape.layers:
            raise SystemExit(f"{data}: {name} must have Pythia's {shape.layers} layers, and its run has {len(own)}")
    return list(runs), models


def pythia(size: str) -> Shape:
    """The shape of a Pythia model."""
    from transformers import GPTNeoXConfig

    layers, width, heads, vocabulary = PYTHIA[size]
    return shape_of(
        GPTNeoXConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            vocab_size=vocabulary,
        )
    )


def table3(data: Path | None) -> dict[str, Any]:
    """Five regressors × five parameters, each predicted for rows and for whole models that were held out."""
    begin = time.perf_counter()
    names, models = models_of(data)
    samples = parameters.make_samples(models)
    shapes = list(dict.fromkeys(shape for shape, _ in models))
    first = {shapes.index(shape): name for name, (shape, _) in reversed(list(zip(names, models, strict=True)))}
    out: dict[str, Any] = {}
    for parameter, regressor in itertools.product(parameters.PARAMETERS, parameters.REGRESSORS):
        for split in ("rows", "models"):
            predicted = parameters.predict_held_out(samples, parameter, regressor, split)
            score = dataclasses.asdict(parameters.score(samples, parameter, predicted))
            score["worst"] = first[score["worst"]]
            out.setdefault(parameter, {}).setdefault(regressor, {})[split] = rounded(score)
    print("| parameter | regressor | R² rows [80 %] | R² models [80 %] | MAE rows, models | RMSE rows, models |")
    print("|---|---|---|---|---|---|")
    for parameter, each in out.items():
        for regressor, both in each.items():
            one, two = both["rows"], both["models"]
            r2 = (f"{x['r2']:.3f} [{x['r2_low']:.2f}, {x['r2_high']:.2f}]" for x in (one, two))
            errors = (f"{one[key]:.3g}, {two[key]:.3g}" for key in ("mae", "rmse"))
            print(f"| {parameter} | {regressor} | {' | '.join((*r2, *errors))} |")
    rows = len(samples.model)
    left_out = {name: int(np.isnan(values).sum()) for name, values in samples.targets.items()}
    facts = {"models": len(shapes), "trainings": len(names), "rows": rows, "undefined": left_out}
    return {**facts, "seconds": round(time.perf_counter() - begin, 1), "scores": out}


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers to four digits; NaN, where nothing varies, as None."""
    return {
        key: (float(f"{v:.4g}") if math.isfinite(v) else None) if isinstance(v, float) else v
        for key, v in values.items()
    }


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """Every row of a sweep, predicted by several ways from the other shapes.

    Attributes:
        group: Number of the shape, ``[N]``.
        truth: ln of the last measured ratio, ``[N]``.
        curve: ln ratio at ``TIMES``, ``[N, G]``.
        ways: Name → prediction of ``curve``, ``[N, G]``.
        low: 10 % quantile of the predictor's, ``[N, G]``.
        high: 90 % quantile, ``[N, G]``.
    """

    group: NDArray[np.int64]
    truth: Floats
    curve: Floats
    ways: dict[str, Floats]
    low: Floats
    high: Floats


def hold_out(trainings: Sequence[Training], also: Sequence[Training] = ()) -> HeldOut:
    """Predicts each training from those of other shapes (and from others that are never scored), calibrated anew."""
    table = make_table(trainings)
    predicted = {way: np.empty_like(table.values) for way in ("mean at the same relative depth", "predictor")}
    low, high = np.empty_like(table.values), np.empty_like(table.values)
    for group in np.unique(table.group):
        rows = np.flatnonzero(table.group == group)
        numbers = set(table.training[rows].tolist())
        others = [one for number, one in enumerate(trainings) if number not in numbers]
        predicted["mean at the same relative depth"][rows] = mean_at_depth(others, table, rows)
        teacher = fit_predictor([*others, *also])
        for number in numbers:
            own = np.flatnonzero(table.training == number)
            quantiles = teacher.quantiles(trainings[number].shape, recipe_of(trainings[number].lr))
            low[own], predicted["predictor"][own], high[own] = (quantiles[:, LEVELS.index(q)] for q in (0.1, 0.5, 0.9))
    truth = np.concatenate([np.log(one.ratios[:, -1]) for one in trainings])
    return HeldOut(table.group, truth, table.values, predicted, low, high)


def mean_at_depth(others: Sequence[Training], table: Table, rows: NDArray[Any]) -> Floats:
    """What the mean training does at each row's relative depth, between layers by straight lines: ``[rows, G]``."""
    groups: dict[bytes, list[Floats]] = {}
    for one in others:
        depth = np.arange(1, one.shape.layers + 1) / one.shape.layers
        profile = log_trajectories(one).T
        at = table.features[rows, FEATURES.index("layer position")]
        values = np.stack([np.interp(at, depth, column) for column in profile], axis=1)
        groups.setdefault(json.dumps(one.shape.to_dict()).encode(), []).append(values)
    return np.asarray(np.mean([np.mean(values, axis=0) for values in groups.values()], axis=0))


WAYS: dict[str, Callable[[], Any]] = {
    "boosted trees": lambda: XGBRegressor(**SETTINGS),
    "ridge": lambda: Ridge(RIDGE),
    "random forest": lambda: RandomForestRegressor(100, min_samples_leaf=2, max_features=0.5, random_state=0),
    "Gaussian process": lambda: GaussianProcessRegressor(RBF(5.0), alpha=0.1, normalize_y=True, optimizer=None),
}


def other_ways(trainings: Sequence[Training]) -> dict[str, Floats]:
    """What else could predict ``curve``: regressors of the trajectory itself, and the five parameters' curves."""
    table = make_table(trainings)
    x = np.concatenate([np.hstack([layer_features(one.shape), places(one.shape.layers)]) for one in trainings])
    out = {}
    for name, make in WAYS.items():
        model = make_pipeline(StandardScaler(), make())
        out[name] = cross_val_predict(model, x, table.values, groups=table.group, cv=LeaveOneGroupOut())
    fits = [fit_trajectories(one.steps, one.ratios, compare=False) for one in trainings]
    samples = parameters.make_samples([(one.shape, fit) for one, fit in zip(trainings, fits, strict=True)])
    predicted = {
        name: parameters.predict_held_out(samples, name, "random forest", "models") for name in parameters.PARAMETERS
    }
    total = len(trainings[0].lr) - 1
    clock = learning_rate_clock(trainings[0].lr)
    ratio = parameters.curves(predicted, samples.level, clock.step(TIMES * clock.time(total)))
    out["five parameters (random forest)"] = np.log(np.clip(np.nan_to_num(ratio, nan=1.0), 1.0, 1e6))
    return out


def seed_noise(trainings: Sequence[Training]) -> dict[str, Any]:
    """How far the last ln ratio of seeds lies from their shape's own mean, per layer: what no predictor can know."""
    shapes: dict[Shape, list[Floats]] = {}
    for one in trainings:
        shapes.setdefault(one.shape, []).append(np.log(one.ratios[:, -1]))
    several = {shape: np.stack(values) for shape, values in shapes.items() if len(values) > 1}
    if not several:
        return {"shapes": 0}
    # Deviations from a mean of n are smaller than from the truth by √(1 - 1/n).
    apart = np.concatenate([((v - v.mean(axis=0)) / math.sqrt(1 - 1 / len(v))).ravel() for v in several.values()])
    pairs = [np.abs(v[i] - v[j]) for v in several.values() for i, j in itertools.combinations(range(len(v)), 2)]
    return {
        "shapes": len(several),
        "trainings": sum(len(values) for values in several.values()),
        "median abs deviation from the shape's mean": float(np.median(np.abs(apart))),
        "median abs difference of two seeds": float(np.median(np.concatenate([d.ravel() for d in pairs]))),
        "standard deviation": float(np.sqrt(np.mean(apart**2))),
    }


DRAWS = 2000


def bootstrap(group: NDArray[np.int64], statistic: Callable[[NDArray[Any]], float]) -> list[float]:
    """80 % interval of a statistic of rows, over draws of whole shapes."""
    names = np.unique(group)
    rows = {name: np.flatnonzero(group == name) for name in names}
    draw = np.random.default_rng(0)
    values = [statistic(np.concatenate([rows[name] for name in draw.choice(names, len(names))])) for _ in range(DRAWS)]
    return [float(v) for v in np.quantile(values, (0.1, 0.9))]


def trajectories() -> dict[str, Any]:
    """Errors of the final ratio on whole shapes held out, for the two sweeps apart."""
    begin = time.perf_counter()
    sweep = load_sweep()
    kinds = {kind: [one for one in sweep if one.kind == kind] for kind in ("gpu", "cpu")}
    out = {kind: judged(own) for kind, own in kinds.items() if len(own) > 1}
    print(json.dumps(out, indent=1, ensure_ascii=False))
    return {"seconds": round(time.perf_counter() - begin, 1), **out}


def judged(own: Sequence[Training]) -> dict[str, Any]:
    """What is said of one sweep: errors of every way, coverage, seed noise."""
    held = hold_out(own)
    ways = held.ways | other_ways(own)
    errors = {name: np.abs(curve[:, -1] - held.truth) for name, curve in ways.items()}
    base, best = errors["mean at the same relative depth"], errors["predictor"]
    inside = (held.low <= held.curve) & (held.curve <= held.high)
    noise = seed_noise(own)

    def over(statistic: Callable[[NDArray[Any]], float]) -> dict[str, Any]:
        return {"value": statistic(np.arange(len(held.group))), "interval": bootstrap(held.group, statistic)}

    def median_of(e: Floats) -> Callable[[NDArray[Any]], float]:
        return lambda rows: float(np.median(e[rows]))

    out = {
        "trainings": len(own),
        "shapes": len(np.unique(held.group)),
        "layers": len(held.truth),
        "trainings with a layer that ends at 5 times its start": sum(
            bool((one.ratios[:, -1] >= 5 * one.ratios[:, 0]).any()) for one in own
        ),
        "median abs log error of the final ratio": {name: over(median_of(e)) for name, e in errors.items()},
        "mean abs log error over the whole time": {
            name: float(np.abs(curve - held.curve).mean()) for name, curve in ways.items()
        },
        "against the mean at the same depth": over(lambda rows: float(np.median(best[rows]) / np.median(base[rows]))),
        "coverage of 80 % intervals at the end": over(lambda rows: float(inside[rows, -1].mean())),
        "coverage over the whole time": float(inside.mean()),
        "width of the interval at the end, as a factor": float(np.exp(np.median((held.high - held.low)[:, -1]))),
        "seed noise": noise,
    }
    if noise["shapes"]:
        out["against seed noise"] = float(np.median(best) / noise["median abs deviation from the shape's mean"])
    return out


SEEN = (0.05, 0.1)
RECENT = 5
"""Measurements whose mean ln ratio says where a layer is now."""


def with_prior(folders: Sequence[Path]) -> dict[str, Any]:
    """Forecasts made early in a training, alone and with what a predictor of the other shapes expected beforehand.

    Besides, of the runs in ``folders``, which are of other recipes: the packaged predictor, and a forecast that learned
    from the sweeps alone.
    """
    begin = time.perf_counter()
    sweep = load_sweep()
    own = [one for one in sweep if one.kind == "gpu"]
    table = make_table(own)
    shapes = [int(table.group[table.training == number][0]) for number in range(len(own))]
    learned = learned_without(own, [one for one in sweep if one.kind != "gpu"], shapes)
    asked = []
    for number, one in enumerate(own):
        teacher = fit_predictor([other for i, other in enumerate(own) if shapes[i] != shapes[number]])
        asked.append((one, expected_of(one, teacher), learned[shapes[number]], shapes[number]))
    out = {f"{share:.0%} seen": weighed(asked, share) for share in SEEN}
    if folders:
        others = [read_recorded(file) for folder in folders for file in sorted(folder.glob("*.npz"))]
        correct = training.train([past_run(str((one.kind, one.shape)), one) for one in sweep]).correct
        packaged = load_predictor()
        known: dict[tuple[Shape, bytes], int] = {}
        numbers = [known.setdefault((one.shape, one.lr.tobytes()), len(known)) for one in others]
        asked = [
            (one, expected_of(one, packaged), correct, number) for one, number in zip(others, numbers, strict=True)
        ]
        out["other recipes"] = {
            "trainings": len(others),
            "before training": beforehand(others, packaged),
            **{f"{share:.0%} seen": weighed(asked, share) for share in (*SEEN, 0.2, 0.4)},
        }
    print(json.dumps(out, indent=1, ensure_ascii=False))
    return {"seconds": round(time.perf_counter() - begin, 1), "trainings": len(own), **out}


def expected_of(one: Training, teacher: Predictor) -> Prior:
    """What a predictor lets expect of a training by its shape and its rates."""
    return prior(one.shape, len(one.lr) - 1, one.lr, teacher)


def past_run(configuration: str, one: Training) -> training.PastRun:
    """A training as the forecast learns from it."""
    return training.PastRun(configuration, one.steps.astype(np.float64), one.ratios, one.lr)


def beforehand(trainings: Sequence[Training], teacher: Predictor) -> dict[str, float]:
    """How far the layers' final ln ratio lay from what was predicted, and how often it lay within 80 % intervals."""
    errors, inside = [], []
    for one in trainings:
        last, truth = teacher.quantiles(one.shape, recipe_of(one.lr))[:, :, -1], np.log(one.ratios[:, -1])
        low, middle, high = (last[:, LEVELS.index(level)] for level in (0.1, 0.5, 0.9))
        errors.append(np.abs(middle - truth))
        inside.append(((low <= truth) & (truth <= high)).mean())
    return {
        "median abs log error": float(np.median(np.concatenate(errors))),
        "coverage of 80 % intervals": float(np.mean(inside)),
    }


def weighed(asked: Sequence[tuple[Training, Prior, Correct, int]], share: float) -> dict[str, Any]:
    """Scores at a share of trainings, each with what was expected of it, a learned forecast and its shape's number."""
    ways: dict[str, list[list[float]]] = {}
    for one, expected, correct, _ in asked:
        for name, (error, inside) in early(one, expected, share, correct).items():
            ways.setdefault(name, []).append([float(error.mean()), float(inside.mean())])
    group = np.array([number for *_, number in asked])
    each = {name: np.array(values) for name, values in ways.items()}
    out: dict[str, Any] = {
        name: {
            "mean abs log error": float(values[:, 0].mean()),
            "interval": bootstrap(group, mean_of(values[:, 0])),
            "coverage of 80 % intervals": float(values[:, 1].mean()),
        }
        for name, values in each.items()
    }
    for name in ("in-run forecast", "learned forecast"):
        alone, joined = each[name][:, 0], each[f"{name} with the prior"][:, 0]
        out[f"{name}: with / without"] = {
            "value": float(joined.mean() / alone.mean()),
            "interval": bootstrap(group, mean_of(joined, alone)),
            "better in": f"{int((joined < alone).sum())} of {len(alone)} trainings",
        }
    return out


def mean_of(values: Floats, over: Floats | None = None) -> Callable[[NDArray[Any]], float]:
    """The mean of these rows' values, over that of others where given."""
    return lambda rows: float(values[rows].mean() / (1.0 if over is None else over[rows].mean()))


PARTS = 3
"""Parts of the shapes that the learned forecast is retrained without."""


def learned_without(own: Sequence[Training], also: Sequence[Training], shapes: Sequence[int]) -> dict[int, Correct]:
    """For every shape what past runs teach the forecast, learned from others and from runs that are never scored."""
    called = [*map(str, shapes), *(str(one.shape) for one in also)]
    runs = [past_run(name, one) for name, one in zip(called, [*own, *also], strict=True)]
    cases = [case for number, run in enumerate(runs) for case in training.cases_of(run, number)]
    order = np.random.default_rng(0).permutation(np.unique(shapes))
    out: dict[int, Correct] = {}
    for part in np.array_split(order, PARTS):
        names = {str(shape) for shape in part}
        teacher = training.train_on([case for case in cases if case.configuration not in names])
        out |= dict.fromkeys(part.tolist(), teacher.correct)
    return out


def early(one: Training, expected: Prior, share: float, learned: Correct) -> dict[str, tuple[Floats, Floats]]:
    """Mean abs log error of every layer over the rest, and the share inside the 80 % interval, by several ways."""
    total = len(one.lr) - 1
    at = int(one.steps[one.steps <= share * total][-1])
    seen = one.steps <= at
    forecasts = {}
    for name, correct in (("in-run forecast", None), ("learned forecast", learned)):
        made = forecast(
            one.steps, one.ratios, at=at, grid=one.steps[~seen], lr=one.lr, total_steps=total, correct=correct
        )
        forecasts[name] = np.log(np.stack([layer.quantiles for layer in made.layers]))
    now, later = float(one.clock[seen][-1]), one.clock[~seen]
    known = np.log(one.ratios[:, seen][:, -RECENT:]).mean(axis=1)
    conditional = conditioned(expected, now, known, later)
    last = np.tile(known[:, None, None], (1, len(LEVELS), len(later)))  # for its median: it has no interval
    joined = {
        f"{name} with the prior": combined(conditional, alone, now, expected.trust) for name, alone in forecasts.items()
    }
    ways = {"last value": last, "prior": conditional, **forecasts, **joined}
    truth = np.log(one.ratios[:, ~seen])
    low, middle, high = (LEVELS.index(level) for level in (0.1, 0.5, 0.9))
    return {
        name: (
            np.abs(q[:, middle] - truth).mean(axis=1),
            ((q[:, low] <= truth) & (truth <= q[:, high])).mean(axis=1),
        )
        for name, q in ways.items()
    }


def explanations(data: Path | None, out: Path) -> dict[str, Any]:
    """What decides K, λ and the last ln ratio: readings and figures in a folder."""
    _, models = models_of(data)
    samples = parameters.make_samples(models)
    if data is None:
        ends = np.concatenate([np.log(one.ratios[:, -1]) for one in load_sweep() if one.kind == "gpu"])
        samples = dataclasses.replace(samples, targets={**samples.targets, "ln final ratio": ends})
    out.mkdir(parents=True, exist_ok=True)
    readings = {}
    for target in ("K", "lambda", "ln final ratio")[: 3 if data is None else 2]:
        explanation = explain.explain(samples, target)
        highest = int(np.argmax(explanation.contributions.sum(axis=1)))
        name = target.replace(" ", "_")
        for kind, figure in {
            "summary": figures.summary(explanation),
            "waterfall": figures.waterfall(explanation, highest),
            "dependence": figures.dependence(explanation),
        }.items():
            figure.savefig(out / f"{name}_{kind}.png", dpi=110)
        readings[target] = explain.reading(explanation)
        print(readings[target])
    return readings


def main() -> None:
    """Does one of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "table3", "trajectories", "prior", "explain"))
    parser.add_argument("folders", nargs="*", type=Path, help="of recorded runs: those to pack, or others to score")
    parser.add_argument("--data", type=Path, help="runs of the paper's data, for table3 and explain")
    parser.add_argument("--out", type=Path, help="folder for figures, of explain")
    options = parser.parse_args()
    if options.what == "pack":
        pack(options.folders)
        return
    if options.what == "explain" and options.out is None:
        parser.error("explain writes figures: give --out FOLDER")
    actions: dict[str, Callable[[], dict[str, Any]]] = {
        "explain": lambda: explanations(options.data, options.out),
        "table3": lambda: table3(options.data),
        "trajectories": trajectories,
        "prior": lambda: with_prior(options.folders),
    }
    result = actions[options.what]()
    name = options.what + ("-published" if options.data else "")
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (RESULTS / f"predictor-{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
