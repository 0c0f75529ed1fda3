"""The tables and figures of the paper that the published measurements decide, beside what was printed.

    ma-monitor import --hub Aimpoint-Digital/pythia-massive-activations --out runs     # or any copy of the data
    python benchmarks/paper.py DATA --out FOLDER

DATA is a folder of models in the published layout (``pythia_<size>/stats/exp2_…_step<N>``), or of runs that
``ma-monitor import`` or ``replay`` made. FOLDER gets ``paper.md`` and the figures. Tables 1, 2 and 5 and Figures 2 to 8
are made; every number of the print stands beside its counterpart with the difference. Tables 3 and 4 and Figures 9 and
10 are about predicting the parameters from the architecture, which is another command.
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from ma_monitor.analysis import fit_run, sequence_ratios
from ma_monitor.cli.common import open_run
from ma_monitor.errors import MaMonitorError
from ma_monitor.numerics.fit import Fit
from ma_monitor.numerics.noise import PARAMETERS
from ma_monitor.numerics.variability import Variability, variability
from ma_monitor.report import figures
from ma_monitor.runs.published import import_run
from ma_monitor.runs.store import Run

SIZES = ("14M", "70M", "160M", "410M", "1B", "1.4B", "2.8B", "6.9B", "12B")


def _printed(*values: float) -> dict[str, float]:
    return dict(zip(SIZES, values, strict=True))


TABLE_1 = _printed(0.9307, 0.9681, 0.9831, 0.9937, 0.9922, 0.9956, 0.9686, 0.9954, 0.9829)
TABLE_2 = {
    "CV %": _printed(6.95, 7.00, 6.98, 4.64, 6.57, 5.19, 6.46, 5.78, 4.22),
    "SEM %": _printed(2.20, 2.21, 2.21, 1.47, 2.08, 1.64, 2.04, 1.83, 1.34),
    "95 % CI ± %": _printed(4.97, 5.00, 4.99, 3.32, 4.70, 3.71, 4.62, 4.13, 3.02),
}
TABLE_5 = {
    "Original": _printed(0.9951, 0.9829, 0.8068, 0.9832, 0.9922, 0.9666, 0.9928, 0.9947, 0.9659),
    "Reparametrized": _printed(0.9956, 0.9825, 0.9307, 0.9831, 0.9922, 0.9630, 0.9936, 0.9954, 0.9681),
    "Step 1": _printed(0.8008, 0.6177, -0.6833, 0.2592, 0.6183, 0.3134, 0.8202, 0.8774, -0.3587),
    "Step 2": _printed(0.9754, 0.9682, 0.6316, 0.9071, 0.9760, 0.9619, 0.9816, 0.9774, 0.8031),
}
FIGURE_3 = {"14M": 83.0, "1.4B": 2350.0, "12B": 3200.0}
"""Ratio of top 1 to median that the caption gives for the end of training."""
MEAN_R2, LEAST_R2, LAYERS, LAST_STEP = 0.984, 0.93, 188, 143_000
"""What the text says of all fits together: mean, lowest, number of layers, and the last step."""
BEST_5 = {size: max(TABLE_5["Original"][size], TABLE_5["Reparametrized"][size]) for size in SIZES}
NONE = "–"


@dataclass(frozen=True)
class Model:
    """One model of the data.

    Attributes:
        name: Its size as the print has it, else its folder's name.
        run: Its measurements, reduced as in Eq. 8.
        left_out: What could not be read.
    """

    name: str
    run: Run
    left_out: tuple[str, ...] = field(default=())

    @cached_property
    def fits(self) -> tuple[Fit, ...]:
        """Fits of every layer with all hypotheses."""
        return fit_run(self.run)

    @cached_property
    def r2(self) -> NDArray[np.float64]:
        """R² of every layer under Eq. 8, NaN where there is none."""
        return scores(self.fits)

    @cached_property
    def r2_of_ratios(self) -> NDArray[np.float64]:
        """The same under Eq. 6 and 7."""
        return scores(fit_run(open_run(str(self.run.path), "mean_of_ratios"), compare=False))

    @cached_property
    def spread(self) -> Variability:
        """Variability over sequences, all layers and steps."""
        return variability(sequence_ratios(self.run))

    def hypothesis(self, *names: str) -> float:
        """Mean over layers of the best R² among these hypotheses."""
        each = [[fit.hypotheses[name].r2 for name in names if name in fit.hypotheses] for fit in self.fits]
        best = [max((score for score in layer if score is not None), default=math.nan) for layer in each]
        return mean(best)

    @property
    def parameters(self) -> float:
        """Number of parameters: the run's, else the size in its name, NaN if it has none."""
        size = re.fullmatch(r"([\d.]+)([MB])", self.name)
        return float(
            self.run.meta.model.parameters or (float(size[1]) * 10 ** (6 + 3 * (size[2] == "B")) if size else math.nan)
        )


def scores(fits: Iterable[Fit]) -> NDArray[np.float64]:
    """R² of fits, NaN where there is none."""
    return np.array([math.nan if fit.r2 is None else fit.r2 for fit in fits])


def mean(values: Iterable[float]) -> float:
    """Mean of what is finite, NaN of nothing."""
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def size_of(name: str) -> str:
    """The size in a model's name as the print writes it: ``pythia_1.4b`` is 1.4B; the name itself if there is none."""
    found = re.search(r"pythia[-_](\d+(?:[._-]\d+)?)([mb])", name.lower())
    return f"{re.sub('[_-]', '.', found[1])}{found[2].upper()}" if found else name


def load(data: Path, scratch: Path) -> list[Model]:
    """The models of a folder of runs or of published data, smallest first."""
    runs = [
        open_run(str(file.parent), "ratio_of_means")
        for file in sorted([*data.glob("run.json"), *data.glob("*/run.json")])
    ]
    if runs:
        models = [
            Model(size_of(run.meta.model.name), run, tuple(e.message for e in run.events if e.kind == "left out"))
            for run in runs
        ]
    else:
        imported = import_run(data, scratch / "runs")
        models = [Model(size_of(one.name), Run.open(one.path), one.problems) for one in imported if one.path]
    order = {size: place for place, size in enumerate(SIZES)}
    return sorted(models, key=lambda model: (order.get(model.name, len(SIZES)), model.name))


def cell(value: float, digits: int) -> str:
    """A number in so many digits after the point; a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else NONE


def beside(own: float, printed: float | None, digits: int) -> tuple[str, str, str]:
    """Own number, the print's, and the difference: three cells."""
    if printed is None:
        return cell(own, digits), NONE, NONE
    return cell(own, digits), cell(printed, digits), f"{own - printed:+.{digits}f}" if math.isfinite(own) else NONE


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def data_section(models: Sequence[Model]) -> str:
    """What was read, and what the print has besides."""
    rows = [
        (
            model.name,
            str(model.run.meta.model.layers),
            str(len(model.run.steps)),
            f"{model.run.steps[0]:,} … {model.run.steps[-1]:,}",
            str(model.run.meta.probe.sequences),
            "; ".join(model.left_out) or NONE,
        )
        for model in models
    ]
    absent = [size for size in SIZES if size not in {model.name for model in models}]
    layers = sum(model.run.meta.model.layers for model in models)
    text = f"{layers} layers; the print fits {LAYERS}."
    if absent:
        text += f" **Printed but not in these data: {', '.join(absent)}.**"
    head = ("model", "layers", "steps", "from … to", "sequences", "left out")
    return "\n\n".join(("## The data", table(head, rows), text))


def table_1(models: Sequence[Model]) -> str:
    """R² per model under both readings of the ratio, and which of the print's two labellings the data agree with."""
    rows = []
    for model in models:
        own = mean(model.r2)
        others = beside(own, BEST_5.get(model.name), 4)[1:]
        rows.append((model.name, *beside(own, TABLE_1.get(model.name), 4), cell(mean(model.r2_of_ratios), 4), *others))
    head = ("model", "R² (Eq. 8)", "printed, Table 1", "difference", "R² (Eq. 6, 7)", "printed, Table 5", "difference")
    every = np.concatenate([model.r2 for model in models])
    facts = [
        ("mean R² over layers", *beside(mean(every), MEAN_R2, 3)),
        ("lowest R² of a layer", *beside(float(np.nanmin(every, initial=1.0)), LEAST_R2, 3)),
    ]
    shared = [model for model in models if model.name in SIZES]
    gaps = [sum(abs(mean(model.r2) - printed[model.name]) for model in shared) for printed in (TABLE_1, BEST_5)]
    nearer = "Table 1's" if gaps[0] < gaps[1] else "Table 5's" if gaps[1] < gaps[0] else "neither"
    verdict = (
        f"Sum of absolute differences over {len(shared)} models: {gaps[0]:.4f} with Table 1's labels, {gaps[1]:.4f} "
        f"with Table 5's. These data are nearer to {nearer} labels."
    )
    totals = table(("over all layers", "here", "printed, text", "difference"), facts)
    return "\n\n".join(("## Table 1: quality of the fit", table(head, rows), totals, verdict))


def table_2(models: Sequence[Model]) -> str:
    """Variability over sequences."""
    head = ["model"]
    for name in TABLE_2:
        head += [name, "printed", "difference"]
    rows = []
    for model in models:
        own = (model.spread.cv_percent, model.spread.sem_percent, model.spread.ci95_percent)
        cells = [
            beside(math.nan if value is None else value, printed.get(model.name), 2)
            for value, printed in zip(own, TABLE_2.values(), strict=True)
        ]
        rows.append((model.name, *(one for three in cells for one in three)))
    own_sem = mean(math.nan if m.spread.sem_percent is None else m.spread.sem_percent for m in models)
    printed_sem = mean(TABLE_2["SEM %"].values())
    text = f"Mean SEM over models: {cell(own_sem, 2)} %; printed: 2 in the text, {printed_sem:.2f} from the table. "
    text += "Here all layers and steps count alike; the print does not say over which it averages."
    return "\n\n".join(("## Table 2: variability over the sequences", table(head, rows), text))


def table_5(models: Sequence[Model]) -> str:
    """The hypotheses."""
    damped = [f"second_order_{kind}" for kind in ("underdamped", "critically_damped", "overdamped")]
    kinds: dict[str, tuple[dict[str, float] | None, Callable[[Model], float]]] = {
        "Eq. 9 = Eq. 14": (BEST_5, lambda model: mean(model.r2)),
        "step 1": (TABLE_5["Step 1"], lambda model: model.hypothesis("first_order")),
        "step 2": (TABLE_5["Step 2"], lambda model: model.hypothesis(*damped)),
        "step 1 + offset": (None, lambda model: model.hypothesis("first_order_offset")),
        "step 2 + offset": (None, lambda model: model.hypothesis(*(f"{name}_offset" for name in damped))),
        "logarithm": (None, lambda model: model.hypothesis("logarithm")),
        "power law": (None, lambda model: model.hypothesis("power_law")),
    }
    head, rows = ["model"], [[model.name] for model in models]
    for name, (printed, of) in kinds.items():
        head += [name, "printed", "difference"] if printed else [name]
        for row, model in zip(rows, models, strict=True):
            row += beside(of(model), printed.get(model.name), 4) if printed else [cell(of(model), 4)]
    fits = [fit for model in models for fit in model.fits if fit.r2 is not None]
    steps = sum(beaten(fit, lambda name: "order" in name and "offset" not in name) for fit in fits)
    every = sum(beaten(fit, lambda _: True) for fit in fits)
    text = (
        f"By AIC on all points, as in the print, the curve beats every step response as printed on {steps} of "
        f"{len(fits)} layers, and every other hypothesis here on {every}. The "
        "print's Original and Reparametrized are one curve from two starts of a local solver; the better is shown. "
        "Step 2 is the best of its three dampings, by layer."
    )
    return "\n\n".join(("## Table 5: other hypotheses", table(head, rows), text))


def beaten(fit: Fit, counts: Callable[[str], bool]) -> bool:
    """Whether the curve's AIC is below that of all hypotheses that count: n·ln(1 - R²) + 2 × parameters, per series."""
    others = [other for name, other in fit.hypotheses.items() if counts(name) and other.r2 is not None]
    own = fit.n * math.log(max(1 - (fit.r2 or 0.0), 1e-300)) + 2 * PARAMETERS
    return all(own < fit.n * math.log(max(1 - (o.r2 or 0.0), 1e-300)) + 2 * len(o.parameters) for o in others)


def draw(models: Sequence[Model]) -> dict[str, tuple[Figure, str]]:
    """Figures 2 to 8: file name → figure, and what it has beside or instead of the printed one."""
    named = {model.name: model for model in models}

    def pick(*sizes: str) -> list[Model]:
        """Those of these sizes that there are, else as many others from the smallest to the largest."""
        places = np.unique(np.linspace(0, len(models) - 1, len(sizes)).round().astype(int))
        return [named[size] for size in sizes if size in named] or [models[place] for place in places]

    ends = {model.name: float(np.nanmax(model.run.ratios()[:, -1])) for model in models}
    sized = [model for model in models if math.isfinite(model.parameters)]
    highest = {model.name: np.nanmax(model.run.ratios(), axis=1) for model in models}
    steps = {model.name: model.run.steps[np.nanargmax(model.run.ratios(), axis=1)] for model in models}
    r2 = {model.name: model.r2 for model in models}
    captions = [
        f"{size}: {' / '.join(beside(ends[size], value, 0))}" for size, value in FIGURE_3.items() if size in ends
    ]
    evolving = pick("1B")[0]
    points, t0 = _fitted_points(models)
    lambdas, gammas = (np.geomspace(*_range(points[:, column], usual), 300) for column, usual in enumerate(USUAL))
    made: dict[str, tuple[Figure, str]] = {}
    if sized:
        made["figure_2"] = (
            figures.scale([m.parameters for m in sized], [ends[m.name] for m in sized], [m.name for m in sized]),
            "Nominal sizes from the models' names. The print gives no numbers.",
        )
    return made | {
        "figure_3": (
            figures.magnitudes([model.run for model in pick("14M", "1.4B", "12B")]),
            "Largest ratio at the end, here / printed / difference: " + ("; ".join(captions) or "none of the printed"),
        ),
        "figure_4": (figures.trajectories(evolving.run), f"{evolving.name}; the print shows 1B on linear steps."),
        "figure_5a": (figures.depth_map(highest, "highest ratio", log=True), "Highest measured ratio of every layer."),
        "figure_5b": (
            figures.depth_map({k: v.astype(np.float64) for k, v in steps.items()}, "step of the highest ratio"),
            f"The print's trainings all end at {LAST_STEP:,}.",
        ),
        "figure_6": (
            figures.fitted([(model.run, model.fits) for model in pick("1B", "6.9B")]),
            "First, middle and last layer; the print does not say which it shows.",
        ),
        "figure_7a": (figures.fit_quality(r2), "By relative depth, all models."),
        "figure_7b": (figures.depth_map(r2, "R²"), "The colour scale spans the values."),
        "figure_8": (
            figures.peak_steps(lambdas, gammas, t0, last=LAST_STEP, points=points),
            f"Seen from above. t₀ = {t0:.4g} is the median of these fits; the print does not give its own. The crosses "
            "are layers with a maximum (A > 0, λ > 0).",
        ),
    }


USUAL = ((1e-3, 10.0), (1e-6, 1e-1))
"""Ranges of λ and γ where no fit says otherwise."""


def _fitted_points(models: Sequence[Model]) -> tuple[NDArray[np.float64], float]:
    """``(λ, γ)`` of the layers whose curve has a maximum, ``[P, 2]``, and the median of their t₀ (1 if none)."""
    curves = [fit.curve.to_paper() for model in models for fit in model.fits if fit.curve is not None]
    kept = [(c.lambda_, c.gamma, c.t0) for c in curves if c.sign > 0 and c.lambda_ and c.gamma and c.t0 is not None]
    array = np.array(kept, dtype=np.float64).reshape(-1, 3)
    return array[:, :2], float(np.median(array[:, 2])) if len(array) else 1.0


def _range(values: NDArray[np.float64], usual: tuple[float, float]) -> tuple[float, float]:
    """A decade around the middle 80 % of the values: single fits lie far out, for λ and γ are weakly identified."""
    low, high = np.quantile(values, (0.1, 0.9)) if len(values) else usual
    return float(low) / 10, float(high) * 10


def slips() -> str:
    """What in the print does not agree with itself, and what is done otherwise here."""
    gaps = [[abs(BEST_5[other] - TABLE_1[one]) for other in SIZES] for one in SIZES]
    twins = [f"{SIZES[one]} ↔ {SIZES[other]}" for one, other in zip(*linear_sum_assignment(gaps), strict=True)]
    return f"""## Where the print disagrees with itself, and what is done otherwise here

- Eq. 6 and 7 (mean of the sequences' ratios) and Eq. 8 (ratio of the means) are two numbers; the print uses both
  names for one. Table 1 above has both.
- Table 1 and Table 5 hold nearly the same nine values under other labels. Nearest values, Table 1 ↔ Table 5:
  {", ".join(twins)}.
  Weighted by layers, Table 1's labels give the text's .984, Table 5's give .980.
- The text says that no layer falls below R² ≈ .93; Table 1's own mean for 14M is .9307, Table 5 has a mean of .8068.
- The text says at least 37 steps a model in one place and at least 27 points in another.
- K is predicted with R² .847 (Table 3) or .8186 (text), on a random split that puts layers of one model on both sides.
- Table 2's three columns are one number: SEM is CV/√10, and the interval 2.262 SEM (Student's t, 9 degrees of freedom).
- Here every fit is the global least-squares optimum in a stated box, the print's is where a local solver stopped; on
  equal data R² here cannot be lower but where the box binds. AICc counts effective points; the print's AIC counts all.
- Step axes are logarithmic here (linear below the first step after 0) and linear in the print."""


def write_page(models: Sequence[Model], out: Path) -> Path:
    """Writes the figures and ``paper.md``; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    shown = []
    for name, (figure, words) in draw(models).items():
        figure.savefig(out / f"{name}.png", dpi=130)
        title = name.replace("_", " ").capitalize()
        shown.append(f"### {title}\n\n![{title}]({name}.png)\n\n{words}")
    sections = (data_section(models), table_1(models), table_2(models), table_5(models))
    parts = ("# The paper's tables and figures, remade", *sections, slips(), "## Figures", *shown)
    page = out / "paper.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def main(argv: Sequence[str] | None = None) -> Path:
    """Does it all; returns the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="models in the published layout, or runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and the figures")
    options: Any = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="ma_monitor-") as scratch:
            page = write_page(load(options.data, Path(scratch)), options.out)
    except MaMonitorError as error:
        parser.error(str(error))
    print(page)
    return page


if __name__ == "__main__":
    main()
