"""What the figures show, read from their axes: data, scales, labels; no pixels."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.special import lambertw

from ma_monitor.analysis import analyse, fit_run
from ma_monitor.errors import ConfigError
from ma_monitor.numerics.curve import Curve
from ma_monitor.report import figures
from ma_monitor.report.axes import PALE, edges, short, step_axis, words
from ma_monitor.report.comparison import compare_runs
from ma_monitor.runs.records import Measurements, ModelShape, ProbeInfo, RunMeta
from ma_monitor.runs.store import Run
from tests.cli.conftest import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_run(tmp_path_factory.mktemp("figures") / "run"))


def make(path: Path, ratios: NDArray[np.float64], steps: NDArray[np.int64], *, name: str = "made") -> Run:
    """A run of one sequence with these ratios ``[L, T]`` of rank 1, and one rank."""
    layers = len(ratios)
    shape = ModelShape(name, None, layers, None, None, None, None)
    meta = RunMeta(shape, ProbeInfo(None, 1, None, "made"), 1, 1, "ratio_of_means", "float32")
    with Run.create(path, meta, None) as run:
        for step, column in zip(steps.tolist(), ratios.T, strict=True):
            run.append(Measurements.from_statistics(step, column[:, None, None], np.ones((layers, 1))))
    return Run.open(path)


def drawn(figure: Figure) -> bytes:
    """The figure as PNG: drawing raises where matplotlib cannot, and warnings are errors here."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue()


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.axison]


def line(axes: Axes, label: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    (found,) = (line for line in axes.lines if line.get_label() == label)
    return np.asarray(found.get_xdata(), dtype=float), np.asarray(found.get_ydata(), dtype=float)


def cells(axes: Axes) -> list[QuadMesh]:
    return [found for found in axes.collections if isinstance(found, QuadMesh)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_magnitudes(run: Run) -> None:
    figure = figures.magnitudes([run, run])
    assert drawn(figure)
    assert len(panels(figure)) == 4
    before, after = panels(figure)[2:]
    stack = run.stack()
    for axes, when in ((before, 0), (after, -1)):
        for rank, label in enumerate(("largest", "second", "third")):
            x, y = line(axes, label)
            assert x.tolist() == [1, 2, 3]
            np.testing.assert_allclose(y, np.abs(stack.top[when, :, :, rank]).mean(axis=1))
        np.testing.assert_allclose(line(axes, "median")[1], stack.median[when].mean(axis=1))
    assert before.get_ylim() == after.get_ylim(), "before and after are to be compared"
    assert before.get_yscale() == "log", "the ratios reach hundreds"
    assert (before.get_title(), after.get_title()) == ("tiny, step 0", "tiny, step 1,500")
    assert legend(figure) == ["largest", "second", "third", "median"]


def test_scale() -> None:
    figure = figures.scale([1e9, 14e6, 12e9], [2350.0, 83.0, np.nan], ["1B", "14M", "12B"])
    assert drawn(figure)
    (axes,) = figure.axes
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [14e6, 1e9, 12e9]
    assert np.asarray(axes.lines[0].get_ydata())[:2].tolist() == [83, 2350]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("log", "linear", "parameters (log)")
    assert [text.get_text() for text in axes.texts] == ["1B", "14M"]


def test_trajectories(run: Run) -> None:
    figure = figures.trajectories(run)
    assert drawn(figure)
    assert [axes.get_title() for axes in panels(figure)] == ["layer 1", "layer 2", "layer 3"]
    for axes, layer in zip(panels(figure), run.layers, strict=True):
        for rank, label in enumerate(("largest", "second", "third"), start=1):
            x, y = line(axes, label)
            np.testing.assert_array_equal(x, run.steps)
            np.testing.assert_array_equal(y, run.ratios(rank)[layer - 1])
        assert (axes.get_xscale(), axes.get_yscale()) == ("symlog", "log")
    assert legend(figure) == ["largest", "second", "third"]
    assert figure.get_supxlabel() == "step (log; linear below 1)"
    (second,) = panels(figures.trajectories(run, [2]))
    assert second.get_title() == "layer 2"


def test_fitted(run: Run) -> None:
    fits = fit_run(run, compare=False)
    figure = figures.fitted([(run, fits)])
    assert drawn(figure)
    first, second, _ = panels(figure)
    assert first.get_title() == f"layer 1, R² = {fits[0].r2:.3f}"
    for axes, fit, values in zip(panels(figure), fits, run.ratios(), strict=True):
        np.testing.assert_array_equal(line(axes, "measured")[1], values)
        x, y = line(axes, "Eq. 9")
        assert isinstance(fit.curve, Curve)
        np.testing.assert_array_equal(y, fit.curve.evaluate(x))
        assert set(run.steps) <= set(x), "the curve passes over no measurement"
    assert fits[0].peak.identified
    (peak,) = first.containers
    assert peak.get_label() == "peak, 80 % interval"
    (bars,) = peak[2]
    ((low, high),) = [sorted(segment[:, 0]) for segment in bars.get_segments()]
    assert (low, high) == pytest.approx((fits[0].peak.low, fits[0].peak.high))
    assert not second.containers, "a peak that is not identified is not drawn"
    for axes, level in zip(panels(figure), (fit.asymptote for fit in fits), strict=True):
        bands = [patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches]
        want = [(level.low, level.high)] if level.identified else []
        assert [(band.y0, band.y1) for band in bands] == [pytest.approx(pair) for pair in want]
    assert sum(fit.asymptote.identified for fit in fits) in (1, 2), "both kinds are to be seen"
    both = figures.fitted([(run, fits), (run, fits)], [1, 2])
    assert [axes.get_title().split(",")[:2] for axes in panels(both)[:2]] == [
        ["tiny", " layer 1"],
        ["tiny", " layer 2"],
    ]


def test_heat_map(run: Run) -> None:
    figure = figures.heat_map(run)
    assert drawn(figure)
    axes, bar = figure.axes
    (mesh,) = cells(axes)
    np.testing.assert_array_equal(np.asarray(mesh.get_array()), run.ratios())
    assert isinstance(mesh.norm, LogNorm)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (run.ratios().min(), run.ratios().max())
    coordinates = np.asarray(mesh.get_coordinates(), dtype=float)
    corners = coordinates[0, :, 0]
    assert (corners[0], corners[-1]) == pytest.approx((0, 1500))
    assert ((corners[1:-1] > run.steps[:-1]) & (corners[1:-1] < run.steps[1:])).all(), "a cell holds its step"
    assert coordinates[:, 0, 1].tolist() == [0.5, 1.5, 2.5, 3.5]
    assert (axes.get_ylabel(), bar.get_ylabel()) == ("layer", "largest / median of |h| (log)")


def test_depth_map_and_quality() -> None:
    models = {"a": [0.9, 0.95], "b_$": [0.99, np.nan, 0.5], "_c": [0.7]}
    figure = figures.depth_map(models, "R²", limits=(0.5, 1))
    assert drawn(figure)
    axes, bar = figure.axes
    shown = [np.ma.masked_array(mesh.get_array()).ravel() for mesh in cells(axes)]
    assert [row.tolist() for row in shown] == [[0.9, 0.95], [0.99, None, 0.5], [0.7]]
    assert {(mesh.norm.vmin, mesh.norm.vmax) for mesh in cells(axes)} == {(0.5, 1)}
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", r"b_\$", " _c"]
    assert bar.get_ylabel() == "R²"
    steep = figures.depth_map({"a": [1.0, 1e4, 0.0]}, "ratio", log=True)
    assert drawn(steep)
    assert isinstance(cells(steep.axes[0])[0].norm, LogNorm)
    quality = figures.fit_quality(models)
    assert drawn(quality)
    x, y = line(quality.axes[0], "a")
    assert (x.tolist(), y.tolist()) == ([0.5, 1.0], [0.9, 0.95])
    assert len(quality.axes[0].get_legend().get_texts()) == 3, "a name that begins with _ is in the legend too"  # type: ignore[union-attr]


def test_peak_steps() -> None:
    lambdas, gammas, t0 = np.geomspace(1e-2, 10, 7), np.geomspace(1e-5, 1e-2, 5), 1.2
    figure = figures.peak_steps(lambdas, gammas, t0, last=1000, points=[[0.1, 1e-3]])
    assert drawn(figure)
    (mesh,) = cells(figure.axes[0])
    shown = np.ma.filled(np.ma.masked_array(mesh.get_array()), np.nan)
    tops = np.array([float(np.exp(lambertw(1 / value).real)) for value in lambdas])
    want = (tops[None] - t0) / gammas[:, None]  # Eq. 13 as printed
    want[want <= 0] = np.nan
    assert np.isnan(want).any()
    np.testing.assert_allclose(shown, want, rtol=1e-12)
    for x in (0, 3):
        curve = Curve(lambdas[x] * gammas[2], t0 / gammas[2], 1.0, float(np.log(gammas[2])), 0.0)
        peak = curve.peak()
        assert peak is not None
        assert shown[2, x] == pytest.approx(peak[0], rel=1e-9)
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "t₀ = 1.2" in axes.get_title()
    assert drawn(figures.peak_steps(lambdas, gammas, 1e9, last=1000)), "no peak anywhere"


def test_comparison(run: Run, tmp_path: Path) -> None:
    twice = Run.open(make_run(tmp_path / "other"))
    figure = figures.comparison(compare_runs([run, twice]), ["one", "other"])
    assert drawn(figure)
    for axes, values in zip(panels(figure), run.ratios(), strict=True):
        np.testing.assert_array_equal(line(axes, "one")[1], values)
        np.testing.assert_array_equal(line(axes, "median, from lowest to highest")[1], values)
    assert figure.get_supxlabel().startswith("step (log")
    share = figures.comparison(compare_runs([run, twice], time="share"), ["one", "other"])
    assert drawn(share)
    assert share.get_supxlabel() == "share of the training"


def test_forecasts(run: Run) -> None:
    made = analyse(run, at=700)
    figure = figures.forecasts(run, made, fit_run(run, compare=False))
    assert drawn(figure)
    for axes, layer in zip(panels(figure), run.layers, strict=True):
        x, _ = line(axes, "measured, seen by the forecast")
        assert x.max() == 700
        assert line(axes, "measured afterwards")[0].min() == 750
        x, y = line(axes, "forecast, with its 80 % and 95 % bands")
        prediction = made.forecast.layers[layer - 1]
        np.testing.assert_array_equal(x, prediction.steps)
        np.testing.assert_array_equal(y, prediction.quantiles[3])


SIZES: dict[str, tuple[int, NDArray[np.int64]]] = {
    "one layer, one point": (1, np.array([500])),
    "one layer, step 0 alone": (1, np.array([0])),
    "two points": (2, np.array([0, 1000])),
    "80 layers": (80, np.arange(0, 60_000, 1000)),
    "5000 points": (2, np.arange(5000) * 28),
    "late start": (3, np.arange(100_000, 143_001, 1000)),
}


@pytest.mark.parametrize("size", SIZES)
def test_any_size(size: str, tmp_path: Path) -> None:
    layers, steps = SIZES[size]
    rng = np.random.default_rng(5)
    made = make(tmp_path / "run", 5 + rng.random((layers, len(steps))), steps)
    fits = fit_run(made, compare=False)
    shown = [figures.magnitudes([made]), figures.trajectories(made), figures.fitted([(made, fits)])]
    for figure in (*shown, figures.heat_map(made)):
        assert drawn(figure)
    chosen = panels(shown[1])
    assert len(chosen) == min(layers, figures.PANELS)
    assert (chosen[0].get_title(), chosen[-1].get_title()) == ("layer 1", f"layer {layers}")
    if layers > figures.PANELS:
        assert "16 of 80 layers" in (shown[1].legends[0].get_title().get_text())
    assert chosen[0].get_yscale() == "linear"
    assert chosen[0].get_ylim()[0] == 0, "a linear ratio axis begins at 0"
    points = chosen[0].lines[0]
    assert (points.get_marker() == "None") == (len(steps) > 60)


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    ratios = np.full((3, 30), 8.0) * np.geomspace(1, 500, 30)
    ratios[0], ratios[1, 5:9] = np.nan, np.inf
    made = make(tmp_path / "run", ratios, np.arange(30) * 10)
    for figure in (
        figures.magnitudes([made]),
        figures.trajectories(made),
        figures.fitted([(made, fit_run(made, compare=False))]),
        figures.heat_map(made),
    ):
        assert drawn(figure)
    (mesh,) = cells(figures.heat_map(made).axes[0])
    assert np.ma.getmaskarray(np.ma.masked_array(mesh.get_array())).sum() == 34
    assert to_hex(tuple(mesh.get_cmap().get_bad())) == PALE.lower(), "what is not known looks like a value"


def test_an_empty_run_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path / "run", np.empty((2, 0)), np.array([], dtype=np.int64))
    draw: tuple[Any, ...] = (figures.heat_map, figures.trajectories, lambda one: figures.magnitudes([one]))
    for figure in draw:
        with pytest.raises(ConfigError, match="a figure needs measurements, and this run holds none"):
            figure(made)


def test_steps_on_an_axis() -> None:
    cases: list[tuple[list[int], str, list[float]]] = [
        ([0, 1, 2, 143_000], "step (log; linear below 1)", [0, 10, 1000, 1e5]),
        ([0, 1000, 143_000], "step (log; linear below 1k)", [0, 1000, 10_000, 1e5]),
        ([500, 20_000], "step (log)", [1000, 10_000]),
        ([0, 50, 70], "step (log; linear below 50)", [0, 50, 70]),
        ([7], "step", [7]),
    ]
    for steps, label, ticks in cases:
        axes = Figure().subplots()
        axes.plot(steps, steps)
        step_axis(axes, steps)
        assert axes.get_xlabel() == label
        assert axes.get_xticks().tolist() == ticks
        inner = edges(axes, steps)
        assert len(inner) == len(steps) + 1
        assert (np.diff(inner) > 0).all()
    assert [short(step) for step in (0, 512, 1000, 143_000, 1.5e6, 2e9)] == ["0", "512", "1k", "143k", "1.5M", "2G"]


@given(st.sets(st.integers(0, 10**9), min_size=1, max_size=30))
@settings(max_examples=50)
def test_any_steps_on_an_axis(chosen: set[int]) -> None:
    steps = np.array(sorted(chosen))
    axes = Figure().subplots()
    axes.plot(steps, steps)
    step_axis(axes, steps)
    ticks = axes.get_xticks()
    assert 1 <= len(ticks) <= 5
    assert ((ticks >= steps[0]) & (ticks <= steps[-1])).all()
    assert ("linear below" in axes.get_xlabel()) == (len(steps) > 1 and steps[0] == 0), "step 0 is not said on the axis"
    inner = edges(axes, steps)
    assert ((inner[1:-1] > steps[:-1]) & (inner[1:-1] < steps[1:])).all()


def test_names_are_text() -> None:
    assert words("$x_1$ \n\x1b[31m") == r"\$x_1\$ ??[31m"
    assert words("_hidden") == " _hidden"
    assert len(words("x" * 500)) == 60


def test_nothing_global_is_touched() -> None:
    code = "import ma_monitor.report.figures, sys; print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_without_matplotlib_the_extra_is_named() -> None:
    code = "import sys; sys.modules['matplotlib.axes'] = None; import ma_monitor.report.figures"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "matplotlib is not installed; run: pip install 'ma_monitor[report]'" in done.stderr
