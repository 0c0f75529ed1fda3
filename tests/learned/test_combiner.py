from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ma_monitor import Run
from ma_monitor.analysis import forecast_run
from ma_monitor.errors import ConfigError
from ma_monitor.learned.combiner import adopt, from_dict, kind_of, load, part_of
from ma_monitor.learned.inputs import NAMES, inputs_of
from ma_monitor.numerics.clock import learning_rate_clock, step_clock
from ma_monitor.numerics.forecast import forecast
from ma_monitor.numerics.mixture import Correction, Mixture, make_mixture
from ma_monitor.runs.documents import COMBINER
from ma_monitor.runs.records import Plan
from tests.learned.past import LR, STEPS, TOTAL, past_run, taught
from tests.test_monitor import META, made_up

AT = 30
"""Points seen: half of the plan."""


def _mixture(points: int = AT, seed: int = 100) -> Mixture:
    run = past_run(seed)
    return make_mixture(learning_rate_clock(run.lr), run.steps[:points], run.ratios[:, :points], float(TOTAL))


def _said(points: int, correct: Any = None) -> str:
    run = past_run(100)
    result = forecast(run.steps[:points], run.ratios[:, :points], lr=run.lr, correct=correct)
    return json.dumps(result.to_dict(), allow_nan=False)


# ------------------------------------------------------------------------------------------------ what it does


def test_past_runs_teach_what_the_run_itself_cannot_know() -> None:
    """Sixteen past runs halved late; a new one that has not yet is told so. Errors at the end, in ln ratio."""
    alone: list[float] = []
    learned: list[float] = []
    for seed in range(100, 106):
        run = past_run(seed)
        truth = np.log(run.ratios[:, -1])
        for correct, errors in ((None, alone), (taught().correct, learned)):
            result = forecast(run.steps[:AT], run.ratios[:, :AT], lr=run.lr, correct=correct)
            ends = np.array([layer.end for layer in result.layers], dtype=float)
            errors.append(np.abs(np.log(ends[:, 3]) - truth).mean())
    assert np.mean(learned) < 0.75 * np.mean(alone)
    assert np.mean(alone) > 0.4  # the rule is worth learning: ln 2 is .69


def test_its_bands_hold_what_they_promise_on_runs_left_out() -> None:
    held = []
    for seed in range(100, 112):
        run = past_run(seed)
        for seen in (12, 24, 36, 46):
            early = run.ratios[:, :seen]
            result = forecast(STEPS[:seen], early, lr=LR, grid=STEPS, correct=taught().correct)
            bands = np.stack([layer.quantiles for layer in result.layers])
            came = run.ratios[:, seen:]
            held.append(((bands[:, 1] <= came) & (came <= bands[:, 5])).mean())
    assert 0.72 < np.mean(held) < 0.92  # 80 % within twelve points: twelve runs, four cutoffs


def test_bands_are_ordered_and_nothing_later_is_used() -> None:
    for points in (10, AT, 45):
        result = forecast(STEPS[:points], past_run(100).ratios[:, :points], lr=LR, correct=taught().correct)
        bands = np.stack([layer.quantiles for layer in result.layers])
        assert (np.diff(bands, axis=1) >= 0).all()
        assert np.isfinite(bands).all()
    run = past_run(100)
    changed = run.ratios.copy()
    changed[:, AT:] *= 7
    options: dict[str, Any] = {"at": int(STEPS[AT - 1]), "lr": LR, "correct": taught().correct}
    assert forecast(STEPS, changed, **options).to_dict() == forecast(STEPS, run.ratios, **options).to_dict()


def test_its_say_fades_as_the_run_is_seen() -> None:
    weights = [taught().correct(_mixture(points), TOTAL).weight for points in (8, 20, 40, 50)]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > 0.7
    assert weights[-1] < 0.4


def test_a_run_unlike_all_past_ones_is_left_to_its_own_mixture_with_a_wider_band() -> None:
    run = past_run(100)
    strange = run.ratios[:, :AT] * np.exp(2 * np.sin(np.arange(AT)))
    mixture = make_mixture(learning_rate_clock(LR), STEPS[:AT], strange, float(TOTAL))
    correction = taught().correct(mixture, TOTAL)
    assert correction.weight == 0
    assert "unlike every past one" in correction.words
    np.testing.assert_array_equal(correction.shift, 0)
    usual = taught().correct(_mixture(), TOTAL)
    assert "unlike" not in usual.words
    assert correction.below.min() > 1.2 * taught().widen[0, 1, 0]


def test_layers_that_do_not_move_are_left_to_their_own_mixture() -> None:
    """A trained model that is fine-tuned: past runs, which all began anew, say nothing of it."""
    flat = 500 * np.exp(0.01 * np.random.default_rng(0).standard_normal((4, 12)))
    flat[0] *= np.linspace(1, 2, 12)
    mixture = make_mixture(learning_rate_clock(LR), STEPS[:12], flat, float(TOTAL))
    trusting = replace(taught(), usual=1e9)
    correction = trusting.correct(mixture, TOTAL)
    np.testing.assert_array_equal(correction.shift[1:], 0)
    np.testing.assert_allclose(correction.below[1:], 1)
    assert (correction.shift[0] != 0).any()
    still = make_mixture(learning_rate_clock(LR), STEPS[:12], flat[1:], float(TOTAL))
    assert "nothing has moved" in trusting.correct(still, TOTAL).words


@pytest.mark.parametrize("left", [1, 2, 3, 5, 11])
def test_a_few_updates_before_the_end_all_is_finite(left: int) -> None:
    run = past_run(100)
    steps = np.append(STEPS[:-1], TOTAL - left)[np.argsort(np.append(STEPS[:-1], TOTAL - left))]
    steps = np.unique(steps[steps <= TOTAL - left])
    result = forecast(steps, run.ratios[:, : steps.size], lr=LR, correct=taught().correct)
    assert result.past_runs > 0
    assert all(np.isfinite(layer.quantiles).all() for layer in result.layers)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"usual": 0}, "widths above 0"),
        ({"widen": [[1, 1], [1, float("nan")], [1, 1]]}, "must be finite"),
        ({"widen": [[1, 1], [1, 1]]}, "other shapes"),
        ({"states": [[0.0]]}, "other shapes"),
        ({"inputs": ["one"]}, "other inputs"),
        ({"schema_version": 2}, "schema version 2, this ma_monitor reads 1"),
    ],
)
def test_hostile_numbers_are_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        from_dict({**taught().to_dict(), **change})


def test_a_file_of_before_lengths_were_told_apart_is_read() -> None:
    old = from_dict({**taught().to_dict(), "widen": [[1.0, 1.1], [1.2, 1.3], [1.4, 1.5]]})
    assert [old.widen[kind_of(planned), 1, 0] for planned in (1, 2499, 2500, 4999, 5000, 10**6)] == [1.2] * 6


def test_a_run_is_calibrated_with_those_of_its_length() -> None:
    """Bands scale with the factors of the run's own kind and with no other's."""
    inputs = inputs_of(_mixture(), np.array([300.0, float(TOTAL)]), TOTAL)
    assert [kind_of(planned) for planned in (2499, 2500, 4999, 5000)] == [0, 1, 1, 2]
    part, seen = replace(taught(), length=1e9), part_of(inputs.seen)
    for kind, planned in enumerate((600, 3000, 9000)):
        widen, others = part.widen.copy(), np.full_like(part.widen, 9.0)
        widen[kind, seen] *= (2, 3)
        others[kind, seen] = part.widen[kind, seen]
        asked = replace(inputs, planned=planned)
        own, wider, still = (replace(part, widen=factors).correct_at(asked) for factors in (part.widen, widen, others))
        np.testing.assert_allclose(wider.below / own.below, 2)
        np.testing.assert_allclose(wider.above / own.above, 3)
        np.testing.assert_array_equal(still.below, own.below)


def test_trees_that_lead_nowhere_are_refused() -> None:
    """They would be followed for ever."""
    for name, value, why in (
        ("left_children", 0, "lead nowhere"),
        ("right_children", 10**6, "lead nowhere"),
        ("split_indices", 10**8, "ask for inputs or give outputs that there are not"),
    ):
        document = json.loads(json.dumps(taught().to_dict()))
        tree = document["trees"]["learner"]["gradient_booster"]["model"]["trees"][0]
        tree[name] = [value, *tree[name][1:]]
        with pytest.raises(ValueError, match=why):
            from_dict(document)


def test_a_run_longer_than_past_ones_gets_a_wider_band_the_less_has_been_seen() -> None:
    usual, long = taught(), replace(taught(), length=TOTAL / np.e)
    for points, least in ((8, 1.4), (50, 1.05)):
        ours, theirs = (combiner.correct(_mixture(points), TOTAL) for combiner in (usual, long))
        np.testing.assert_allclose(theirs.above / ours.above, 1 + 1.5 * ours.weight**2)
        assert (theirs.below / ours.below).min() > least
        np.testing.assert_array_equal(theirs.shift, ours.shift)
        assert "longer than most" in theirs.words
        assert "longer" not in ours.words


def test_without_a_schedule_or_an_end_it_says_nothing_but_why() -> None:
    run = past_run(100)
    steps_only = make_mixture(step_clock(), STEPS[:AT], run.ratios[:, :AT], float(TOTAL))
    for mixture, end in ((steps_only, TOTAL), (_mixture(), None)):
        correction = taught().correct(mixture, end)
        assert correction.weight == 0
        assert "no schedule that has moved, or no end, is known" in correction.words
        paths = mixture.sample(np.array([500.0]))
        assert correction.apply(paths, np.array([0.1])) is paths
    assert "end is reached" in taught().correct(_mixture(STEPS.size), TOTAL).words


@given(points=st.integers(8, 50), factor=st.sampled_from([1e-3, 2.0, 1e6]))
@settings(max_examples=10)
def test_the_size_of_the_ratio_does_not_matter(points: int, factor: float) -> None:
    clock, run = learning_rate_clock(LR), past_run(100)
    knots = np.array([STEPS[points - 1] + 1, TOTAL])
    ours, theirs = (
        inputs_of(make_mixture(clock, STEPS[:points], scale * run.ratios[:, :points], float(TOTAL)), knots, TOTAL)
        for scale in (1.0, factor)
    )
    np.testing.assert_allclose(theirs.values, ours.values, atol=1e-6)  # the curve's residuals lose half the digits


def test_a_run_ten_times_as_long_is_no_stranger() -> None:
    """The same trajectory over ten times the steps: inputs are the same but for the 1 in ln(t + 1)."""
    run = past_run(100)
    inputs = []
    for times in (1, 10):
        clock = learning_rate_clock(np.append(np.repeat(LR[:-1], times), LR[-1]))
        mixture = make_mixture(clock, times * STEPS[10:AT], run.ratios[:, 10:AT], float(times * TOTAL))
        inputs.append(inputs_of(mixture, times * np.array([400.0, 600.0]), times * TOTAL).values)
    late = [i for i, name in enumerate(NAMES) if name not in ("then_30", "highest_at", "lowest_at")]
    np.testing.assert_allclose(inputs[1][..., late], inputs[0][..., late], atol=0.05)


# --------------------------------------------------------------------------------------------------- correction


def test_a_correction_moves_the_median_and_stretches_both_sides() -> None:
    rng = np.random.default_rng(0)
    paths, ahead = rng.standard_normal((2, 4, 101)), np.array([0.0, 0.5, 1.0, 3.0])
    knots = np.array([0.5, 1.0])
    shift, below, above = (np.array(rows) for rows in ([[1.0, 2], [0, 0]], [[2.0, 4], [1, 1]], [[0.5, 1], [1, 1]]))
    moved = Correction(knots, shift, below, above, 1.0, "").apply(paths, ahead)
    for layer in range(2):
        for g, h in enumerate(ahead):
            middle = np.median(paths[layer, g])
            to = np.interp(h, [0, 0.5, 1], [0, *shift[layer]])
            for path in range(101):
                away = paths[layer, g, path] - middle
                factor = np.interp(h, knots, (below if away < 0 else above)[layer])
                assert moved[layer, g, path] == pytest.approx(middle + to + factor * away, abs=1e-12)


# ------------------------------------------------------------------------------------------------------- files


def test_a_combiner_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / COMBINER
    path.write_text(json.dumps(taught().to_dict()))
    assert _said(AT, load(path).correct) == _said(AT, from_dict(json.loads(path.read_text())).correct)
    ours, theirs = (combiner.correct(_mixture(), TOTAL) for combiner in (taught(), load(path)))
    np.testing.assert_allclose(theirs.shift, ours.shift, atol=1e-2)  # states are kept to three digits
    assert load(path).card["about"] == "made up"


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / COMBINER
    for text in ("", "[]", '{"inputs": []}', json.dumps(taught().to_dict())[:1000]):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"a combiner must be a file that `ma-monitor learn` wrote"):
            load(path)
    with pytest.raises(ConfigError, match="a combiner must be a file"):
        load(tmp_path / "nothing")


def test_the_packaged_one_is_used_unless_the_run_holds_its_own(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", META, Plan(0, 100, np.linspace(1.0, 0.1, 101), 8, "linear")) as run:
        for step in range(0, 51, 2):
            run.append(made_up(step))
    packaged = forecast_run(Run.open(tmp_path / "run"))
    assert packaged.past_runs > 0
    assert "past runs" in packaged.rests_on
    own = tmp_path / "own.json"
    own.write_text(json.dumps({**taught().to_dict(), "usual": 1e9}))
    adopt(str(own), tmp_path / "run")
    assert (tmp_path / "run" / COMBINER).read_bytes() == own.read_bytes()
    adopted = forecast_run(Run.open(tmp_path / "run"))
    assert adopted.past_runs == pytest.approx(1 / (1 + 0.5 / 0.3))
    assert adopted.to_dict() != packaged.to_dict()
    (tmp_path / "run" / COMBINER).write_text("{}")
    broken = forecast_run(Run.open(tmp_path / "run"))
    assert broken.past_runs == 0
    assert "a combiner must be a file" in broken.rests_on
