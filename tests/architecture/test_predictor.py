"""The Gaussian process: against conditional Gaussians written out, on a sweep whose rules are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.architecture.features import Shape
from ma_monitor.architecture.predictor import (
    OF_MODEL,
    TIMES,
    Kernel,
    Predictor,
    coordinates,
    fit_predictor,
    held_out_error,
    load_predictor,
    log_trajectories,
    make_table,
    places,
    recipe_of,
    save_predictor,
    weighted_quantile,
)
from ma_monitor.architecture.sweep import Training
from ma_monitor.errors import SourceError
from ma_monitor.learned.prior import LEVELS
from tests.architecture.made import LR, SHAPE, TOTAL, level, make_shape, make_training


def slow_covariance(predictor: Predictor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The covariance of the table's rows, one pair after the other."""
    table, k = predictor.table, predictor.kernel
    shapes = np.array([table.models[table.group == g][0] for g in np.unique(table.group)])
    spread = shapes.std(axis=0)
    z = [
        [(v - c) / s if s > 1e-6 else 0.0 for v, c, s in zip(row, shapes.mean(axis=0), spread, strict=True)]
        for row in table.models
    ]
    out = np.empty((len(z), len(z)))
    for i, a in enumerate(z):
        for j, b in enumerate(z):
            near = np.exp(
                -sum((p - q) ** 2 for p, q in zip(table.places[i], table.places[j], strict=True)) / 2 / k.depth_reach**2
            )
            like = np.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / 2 / k.reach**2)
            like += k.trend * sum(p * q for p, q in zip(a, b, strict=True))
            out[i, j] = k.place * near + like * (k.model + k.both * near)
            if table.training[i] == table.training[j]:
                out[i, j] += k.training + k.training_place * near
            if i == j:
                out[i, j] += k.noise
    return out


def test_held_out_in_closed_form(sweep: list[Training]) -> None:
    """A shape's rows given all others', by partitioned Gaussians."""
    predictor = Predictor(make_table(sweep[-5:]), Kernel(), np.ones(2), TOTAL)
    table = predictor.table
    covariance = slow_covariance(predictor)
    weights = np.array([1 / (table.group == g).sum() for g in table.group])
    weights /= weights.sum()
    mean = weights @ table.values
    unit = np.sqrt(weights @ (table.values - mean) ** 2)
    y = (table.values - mean) / unit
    found, deviation = predictor.held_out
    for group in np.unique(table.group):
        own, rest = table.group == group, table.group != group
        solved = np.linalg.solve(covariance[np.ix_(rest, rest)], np.hstack([y[rest], covariance[np.ix_(rest, own)]]))
        cross = covariance[np.ix_(own, rest)]
        np.testing.assert_allclose(found[own], cross @ solved[:, : TIMES.size], atol=1e-8)
        left = covariance[np.ix_(own, own)] - cross @ solved[:, TIMES.size :]
        np.testing.assert_allclose(deviation[own], np.sqrt(np.diag(left)), atol=1e-8)


def test_moments_are_those_of_a_row_held_out(sweep: list[Training]) -> None:
    """A shape predicted from a table without it, in the units of that table."""
    rest = Predictor(make_table(sweep[3:6]), Kernel(), np.ones(2), TOTAL)
    mean, deviation = rest.moments(sweep[6].shape, recipe_of(LR))
    assert mean.shape == deviation.shape == (sweep[6].shape.layers, TIMES.size)
    again, _ = rest.moments(sweep[3].shape, recipe_of(LR))
    assert np.abs(again - log_trajectories(sweep[3])).mean() < np.abs(mean[:1] - log_trajectories(sweep[3])).mean()
    assert (deviation > 0).all()


def test_what_is_predicted_of_shapes_not_seen(predictor: Predictor) -> None:
    """Half way between shapes that were seen; the rules' own last value is known."""
    for width, ratio in ((96, 4), (180, 3)):
        shape = make_shape(5, width, 4, ratio)
        mean, _ = predictor.moments(shape, recipe_of(LR))
        place = np.arange(1, 6) / 5
        truth = 1.7 + (level(shape) - 2 * (place - 0.5) ** 2) * (1 - np.exp(-5)) - 0.3 * place
        assert np.abs(mean[:, -1] - truth).max() < 0.25  # of a range of 2 over shapes, with seeds 0.07 apart


def test_search_and_intervals(predictor: Predictor, sweep: list[Training]) -> None:
    start = replace(predictor, kernel=Kernel())
    assert held_out_error(predictor) < held_out_error(start)
    assert (
        held_out_error(
            replace(
                predictor,
                kernel=replace(Kernel(), noise=0.0, training=0.0, training_place=0.0, place=0.0, model=0.0, both=0.0),
            )
        )
        == np.inf
    )
    quantiles = predictor.quantiles(sweep[0].shape, recipe_of(LR))
    assert quantiles.shape == (sweep[0].shape.layers, len(LEVELS), TIMES.size)
    assert (np.diff(quantiles, axis=1) >= 0).all()
    mean, deviation = predictor.held_out
    low, high = (mean + deviation[:, None] * predictor.spread[LEVELS.index(q)] for q in (0.1, 0.9))
    inside = ((low <= predictor._scaled) & (predictor._scaled <= high)).mean(axis=0)
    assert 0.75 < (predictor.weights @ ((low <= predictor._scaled) & (predictor._scaled <= high))).mean() < 0.95, inside


def test_seeds_are_one_shape(predictor: Predictor, sweep: list[Training]) -> None:
    table = predictor.table
    assert len(np.unique(table.training)) == len(sweep) == len(np.unique(table.group)) + 2
    assert predictor.weights.sum() == pytest.approx(1)
    by_shape = np.bincount(table.group, predictor.weights)
    np.testing.assert_allclose(by_shape, by_shape[0])


def test_coordinates() -> None:
    place = dict(zip(OF_MODEL, coordinates(SHAPE, recipe_of(LR)), strict=True))
    assert place["depth"] == pytest.approx(np.log(4))
    assert place["head size"] == pytest.approx(np.log(32))
    assert place["MLP / width"] == pytest.approx(np.log(4))
    assert (place["rotary share"], place["RMS norm"]) == (0.25, 0)
    assert place["rate"] == pytest.approx(np.log(1e-3))
    assert place["updates"] == pytest.approx(np.log(LR[:-1].sum() / 1e-3))
    np.testing.assert_allclose(places(2), [[1, 2, 1], [2, 1, 2]])


def test_a_coordinate_that_never_varied_is_not_heeded(predictor: Predictor) -> None:
    recipe = recipe_of(LR)
    shape = Shape(**{**SHAPE.to_dict(), "vocabulary": 100_000})  # 4096 throughout
    np.testing.assert_array_equal(predictor.moments(shape, recipe)[0], predictor.moments(SHAPE, recipe)[0])


def test_log_trajectories_are_smooth_and_start_where_measured() -> None:
    one = make_training(SHAPE, 0)
    found = log_trajectories(one)
    np.testing.assert_allclose(found[:, 0], np.log(one.ratios[:, 0]))
    own = np.log(one.ratios)
    t = len(one.steps) // 2
    u = one.clock[t]
    between = np.array([np.interp(u, TIMES, row) for row in found])
    np.testing.assert_allclose(between, own[:, t - 2 : t + 3].mean(axis=1), atol=0.02)  # TIMES are not the steps


def test_weighted_quantile(rng: np.random.Generator) -> None:
    values = rng.normal(size=31)
    levels = np.array([0.1, 0.5, 0.77])
    equal = weighted_quantile(values, np.full(31, 0.2), levels)
    np.testing.assert_allclose(equal, np.quantile(values, levels, method="hazen"))
    assert weighted_quantile(np.array([1.0, 5.0]), np.array([1.0, 0.0]), np.array([0.4]))[0] == pytest.approx(1.0)


def test_saved_as_plain_arrays(predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "predictor.npz"
    save_predictor(predictor, path)
    with np.load(path, allow_pickle=False) as data:
        assert all(array.dtype.kind in "fi" for array in data.values())
    again = load_predictor(path)
    assert again.steps == predictor.steps == TOTAL
    one, other = (p.quantiles(SHAPE, recipe_of(LR)) for p in (predictor, again))
    np.testing.assert_allclose(one, other, atol=1e-4)  # kept as float32


@pytest.mark.parametrize("content", [None, b"nothing"])
def test_unreadable(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "predictor.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match="a predictor is an .npz that this package wrote"):
        load_predictor(path)


def test_packaged_is_what_the_packaged_sweep_teaches() -> None:
    """The kernel's search is not repeated here; the table is."""
    from ma_monitor.architecture.sweep import load_sweep

    table, packaged = make_table(load_sweep()), load_predictor().table
    np.testing.assert_array_equal(table.group, packaged.group)
    for name in ("models", "places", "values"):
        np.testing.assert_allclose(getattr(table, name), getattr(packaged, name), atol=1e-5)  # kept as float32


def test_fit_takes_the_usual_schedule(sweep: list[Training]) -> None:
    other = replace(sweep[3], lr=np.ones(11), steps=np.arange(11), means=sweep[3].means[:11])
    fitted = fit_predictor([other, *sweep[:3]])
    assert fitted.steps == TOTAL
    np.testing.assert_allclose(fitted.schedule, np.interp(np.linspace(0, TOTAL, 201), np.arange(TOTAL + 1), LR / 1e-3))
