"""The projected problem against plain least squares and finite differences."""

from __future__ import annotations

import numpy as np
import pytest

from ma_monitor.numerics.projection import (
    C_MAX,
    C_MIN,
    Floats,
    Problem,
    grid_nodes,
    grid_residuals,
    make_problem,
    project,
    to_b,
    to_u,
)


def series(rng: np.random.Generator, points: int = 40) -> tuple[Floats, Floats]:
    """Three noisy series at irregular times from 0."""
    t = np.sort(np.concatenate([[0.0], rng.uniform(1, 1000, points - 1)]))
    s = t / t[-1]
    shapes = np.stack([np.exp(-3 * s) * np.log(s + 0.01), np.log(s + 0.1), np.sin(9 * s)])
    return t, 5 + shapes + 0.05 * rng.standard_normal(shapes.shape)


def plain_residual(problem: Problem, row: int, b: float, c: float) -> float:
    """Residual sum of the natural columns 1, e^(-bs), e^(-bs)·ln(s + c), by ``lstsq``."""
    root = problem.root[min(row, len(problem.root) - 1)]
    decay = np.exp(-b * problem.s)
    design = np.stack([np.ones_like(decay), decay, decay * np.log(problem.s + c)], axis=1) * root[:, None]
    design /= np.linalg.norm(design, axis=0)
    coefficients = np.linalg.lstsq(design, problem.y[row], rcond=None)[0]
    return float(((problem.y[row] - design @ coefficients) ** 2).sum())


class TestGrid:
    @pytest.mark.parametrize("weighted", [False, True])
    def test_residuals_are_those_of_plain_least_squares(self, rng: np.random.Generator, weighted: bool) -> None:
        t, y = series(rng)
        problem = make_problem(t, y, rng.uniform(0.5, 2, y.shape) if weighted else None)
        b, c = np.array([0.3, 4.0, 50.0]), np.array([1e-4, 0.02, 1.0])
        residuals = grid_residuals(problem, b, c)
        for row in range(3):
            for i in range(3):
                for j in range(3):
                    expected = plain_residual(problem, row, b[i], c[j])
                    assert residuals[row, i, j] == pytest.approx(expected, rel=1e-8)

    def test_nodes_cover_the_box(self, rng: np.random.Generator) -> None:
        problem = make_problem(*series(rng), None)
        b, c = grid_nodes(problem, 20)
        assert b[-1] == pytest.approx(1e3)
        assert b[0] <= 1e-5
        assert (c[0], c[-1]) == (pytest.approx(C_MIN), pytest.approx(C_MAX))
        assert (np.diff(b) > 0).all()

    def test_series_in_turns_give_the_same(self, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = make_problem(*series(rng), None)
        nodes = grid_nodes(problem, 9)
        together = grid_residuals(problem, *nodes)
        monkeypatch.setattr("ma_monitor.numerics.projection._CHUNK", 1)
        np.testing.assert_allclose(grid_residuals(problem, *nodes), together, rtol=1e-9)


class TestProject:
    @pytest.mark.parametrize("weighted", [False, True])
    def test_derivatives_are_those_of_finite_differences(self, rng: np.random.Generator, weighted: bool) -> None:
        t, y = series(rng)
        problem = make_problem(t, y, rng.uniform(0.5, 2, y.shape) if weighted else None)
        step = 1e-4
        for b, c in ((0.3, 0.5), (3.0, 0.01), (40.0, 2.0)):
            for row in range(3):
                moves = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [1, -1], [-1, 1], [-1, -1]])
                point = np.array([to_u(np.float64(b)), np.log(c)]) + step * moves
                state = project(problem, np.full(len(moves), row), point)
                f = state.value
                gradient = np.array([f[1] - f[2], f[3] - f[4]]) / (2 * step)
                cross = (f[5] - f[6] - f[7] + f[8]) / (4 * step**2)
                hessian = np.array([[f[1] - 2 * f[0] + f[2], 0], [0, f[3] - 2 * f[0] + f[4]]]) / step**2
                hessian += np.array([[0, cross], [cross, 0]])
                np.testing.assert_allclose(state.gradient[0], gradient, rtol=1e-5, atol=1e-9)
                np.testing.assert_allclose(state.hessian[0], hessian, rtol=1e-4, atol=1e-6)

    def test_value_and_coefficients_are_those_of_plain_least_squares(self, rng: np.random.Generator) -> None:
        problem = make_problem(*series(rng), None)
        b, c = 2.0, 0.03
        state = project(problem, np.arange(3), np.tile([to_u(np.float64(b)), np.log(c)], (3, 1)))
        columns = np.stack(
            [np.ones_like(problem.s), -np.expm1(-b * problem.s), np.exp(-b * problem.s) * np.log1p(problem.s / c)]
        )
        for row in range(3):
            assert 2 * state.value[row] == pytest.approx(plain_residual(problem, row, b, c), rel=1e-10)
            residual = problem.y[row] - (state.coefficients[row] @ columns) * problem.root[0]
            assert (residual**2).sum() == pytest.approx(2 * state.value[row], rel=1e-10)

    @pytest.mark.parametrize(
        ("b", "c"),
        [(1e-9, 0.01), (1e-9, C_MAX), (1e3, C_MIN), (1e3, C_MAX), (1.0, C_MIN)],
        ids=["no decay", "a parabola", "one point", "two points", "one offset"],
    )
    def test_where_rank_is_lost_it_stays_finite_and_no_worse_than_its_columns(
        self, rng: np.random.Generator, b: float, c: float
    ) -> None:
        """At each corner the residual is at most that of the two well-behaved columns alone."""
        t = np.linspace(0, 100, 30)
        y = rng.standard_normal((3, 30))
        problem = make_problem(t, y, None)
        state = project(problem, np.arange(3), np.tile([to_u(np.float64(b)), np.log(c)], (3, 1)))
        assert np.isfinite(state.value).all()
        assert np.isfinite(state.coefficients).all()
        column = -np.expm1(-b * problem.s)
        design = np.stack([np.ones_like(column), column / np.abs(column).max()], axis=1) * problem.root.T
        for row in range(3):
            coefficients = np.linalg.lstsq(design, problem.y[row], rcond=None)[0]
            two = ((problem.y[row] - design @ coefficients) ** 2).sum()
            assert 2 * state.value[row] <= two * (1 + 1e-9)


class TestProblem:
    def test_coordinates_there_and_back(self) -> None:
        b = np.array([1e-8, 0.1, 30.0, 1e3])
        np.testing.assert_allclose(to_b(to_u(b)), b, rtol=1e-12)

    def test_late_start_leaves_room_for_the_factor_of_the_shift(self) -> None:
        """e^(b·t_min/T) must fit a float, so b stops short of 1000."""
        t = np.linspace(900.0, 1000.0, 20)
        problem = make_problem(t, t[None], None)
        assert float(to_b(problem.high[0])) == pytest.approx(400 / 0.9)

    @pytest.mark.parametrize("spacing", ["linear", "logarithmic", "late", "repeated"])
    def test_binning_keeps_weight_mean_and_the_first_points(self, rng: np.random.Generator, spacing: str) -> None:
        t = {
            "linear": np.linspace(0, 1e5, 3000),
            "logarithmic": np.concatenate([[0], np.geomspace(1, 1e5, 2999)]),
            "late": np.linspace(1e5, 2e5, 3000),
            "repeated": np.repeat(np.linspace(0, 1e5, 600), 5),
        }[spacing]
        problem = make_problem(t, rng.standard_normal((2, len(t))), None)
        small = problem.binned(400)
        assert 200 <= len(small.s) <= 404  # the first two and the last come on top
        assert (small.root**2).sum() == pytest.approx(1)
        np.testing.assert_allclose((small.y * small.root).sum(axis=1), 0, atol=1e-12)
        assert small.s[0] == 0
        assert small.s[-1] == pytest.approx(problem.s[-1])
        assert ((small.y**2).sum(axis=1) <= (problem.y**2).sum(axis=1) + 1e-12).all()

    def test_few_points_are_not_binned(self, rng: np.random.Generator) -> None:
        problem = make_problem(*series(rng), None)
        assert problem.binned(100) is problem
