from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.cli.__main__ import main
from ma_monitor.errors import ConfigError, MissingExtraError
from ma_monitor.learned.combiner import load, part_of
from ma_monitor.learned.correction import packaged_path
from ma_monitor.learned.training import CUTOFFS, FOLDS, PastRun, _beyond, _widths, cases_of, train
from tests.learned.past import LR, STEPS, past_run, taught


def test_cases_know_nothing_of_what_comes() -> None:
    run = past_run(0)
    changed = run.ratios.copy()
    half = int((STEPS <= 0.5 * STEPS[-1]).sum())
    changed[:, half:] *= 3
    same = zip(cases_of(run), cases_of(PastRun("other", STEPS, changed, LR)), strict=True)
    early = [(ours, theirs) for ours, theirs in same if ours.inputs.seen <= 0.5]
    assert len(early) == CUTOFFS.index(0.5) + 1
    for ours, theirs in early:
        np.testing.assert_array_equal(ours.inputs.values, theirs.inputs.values)
        assert (ours.came != theirs.came).any()


def test_what_came_is_what_was_measured() -> None:
    run = past_run(1)
    case = cases_of(run)[-1]
    assert case.came[0, -1] == np.log(run.ratios[0, -1])
    assert (np.isin(np.exp(case.came).round(9), run.ratios.round(9))).all()


@pytest.mark.slow
def test_training_is_repeatable_and_says_what_it_saw() -> None:
    again = train([past_run(seed) for seed in range(16)], card={"about": "made up"})
    assert json.dumps(again.to_dict()) == json.dumps(taught().to_dict())
    assert again.card == {"runs": 16, "configurations": 16, "about": "made up"}


def test_few_configurations_teach_nothing() -> None:
    with pytest.raises(ConfigError, match=f"at least {2 * FOLDS} configurations with a known schedule, got 9"):
        train([past_run(seed) for seed in range(9)])
    with pytest.raises(ConfigError, match="got 1;"):
        train([PastRun("one", STEPS, past_run(seed).ratios, LR) for seed in range(20)])


def test_lengths_with_enough_configurations_are_calibrated_apart() -> None:
    """Factors of a kind are the quantiles of its own cases, each weighing the same; too few borrow everybody's."""
    combiner = taught()
    cases = [case for seed in range(2 * FOLDS + 9) for case in cases_of(past_run(seed))]
    names = sorted({case.configuration for case in cases})
    long = set(names[: 2 * FOLDS])  # which are enough; nine are not, and none is of the middle kind
    cases = [
        replace(case, inputs=replace(case.inputs, planned=9000 if case.configuration in long else 600))
        for case in cases
    ]
    beyond = [(case, (1 + 4 * (case.configuration in long)) * _beyond(combiner, case)) for case in cases]
    short, middle, longer = (_widths(beyond, kind) for kind in range(3))
    for kind, found in ((None, short), (None, middle), (9000, longer)):
        for part in range(3):
            values = [
                (float(value), 1 / away.size)
                for case, away in beyond
                if part_of(case.inputs.seen) == part and kind in (None, case.inputs.planned)
                for value in away
            ]
            for side, level in ((0, 0.1), (1, 0.9)):
                end = found[part, side] * (1 if side else -1)
                total = sum(weight for _, weight in values)
                below = sum(weight for value, weight in values if value < end) / total
                within = sum(weight for value, weight in values if value <= end) / total
                assert below - 1e-9 <= level <= within + 1e-9  # sums in another order
                assert found[part, side] > 0.1, "no factor is at its least, which would hide the quantile"
    assert (longer > short).all()
    without = [(case, away) for case, away in beyond if case.inputs.planned == 600 or part_of(case.inputs.seen) > 0]
    np.testing.assert_array_equal(_widths(without, 2), _widths(without, 1))  # nothing of their first quarter is known


def test_training_needs_xgboost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(MissingExtraError, match=r"xgboost is not installed; run: pip install 'ma_monitor\[predict\]'"):
        train([past_run(seed) for seed in range(12)])


def test_the_packaged_combiner_has_a_card() -> None:
    card = load(packaged_path()).card
    assert card["configurations"] >= 50
    assert "Limits:" in card["about"]


# ------------------------------------------------------------------------------------------------------ command


def _save(folder: Path, seed: int, *, lr: bool = True) -> str:
    run = past_run(seed, layers=2 + seed % 12)
    stats = np.stack([run.ratios, 0.5 * run.ratios, np.ones_like(run.ratios)])  # [k + 1, L, T], a sequence
    path = folder / f"run-{seed}.npz"
    steps, layout = STEPS.astype(np.int64), stats.transpose(2, 0, 1)[:, None]
    if lr:
        np.savez(path, steps=steps, stats=layout, lr=LR)
    else:
        np.savez(path, steps=steps, stats=layout)
    return str(path)


@pytest.mark.slow
def test_the_command_learns_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [_save(tmp_path, seed) for seed in range(12)] + [_save(tmp_path, 20, lr=False)]
    (tmp_path / "card.md").write_text("twelve made-up runs\n")
    out = tmp_path / "combiner.json"
    assert main(["learn", *files, "--out", str(out), "--card", str(tmp_path / "card.md"), "--json"]) == 0
    said = capsys.readouterr()
    assert "run-20.npz: left out: its schedule is not known" in said.err
    facts = json.loads(said.out)
    assert (facts["runs"], facts["configurations"], facts["about"]) == (12, 12, "twelve made-up runs")
    assert load(out).card["runs"] == 12


def test_the_command_refuses_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn", _save(tmp_path, 0), "--out", str(tmp_path / "c.json")]) == 2
    assert "a forecast learns from at least" in capsys.readouterr().err
