"""``ma-monitor merge`` of small runs made of parts of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.errors import StoreError
from ma_monitor.runs.merge import merge
from ma_monitor.runs.records import Measurements, Plan
from ma_monitor.runs.store import Run
from tests.cli.conftest import PLAN, STEPS, Call, make_measurements, make_meta

FILES = ("run.json", "measurements.bin", "fits.json", "forecast.json")
LATER = replace(PLAN, from_step=300, total_steps=1800)
UNKNOWN = Plan(0, None, None, None, "unknown")


def write(path: Path, measurements: list[Measurements], plan: Plan = PLAN, later: Plan | None = LATER) -> Path:
    """A run as a replay of these steps writes it: the later plan before the first step after it, or before the last."""
    with Run.create(path, make_meta(), plan) as run:
        for m in measurements:
            if later is not None and len(run.plans) == 1 and (m.step > later.from_step or m is measurements[-1]):
                run.add_plan(later)
            run.append(m)
    return path


def contents(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def measured() -> list[Measurements]:
    return make_measurements()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_give_the_whole_run_to_the_byte(
    call: Call, tmp_path: Path, measured: list[Measurements], count: int
) -> None:
    shards = [write(tmp_path / f"shard-{i}", measured[i::count]) for i in range(count)]
    whole = write(tmp_path / "whole", measured)
    assert call("merge", whole, "--out", tmp_path / "alone").code == 0

    document = call("merge", *reversed(shards), "--out", tmp_path / "out", "--json").document

    assert document == {"run": str(tmp_path / "out"), "runs": list(map(str, reversed(shards))), "steps": len(STEPS)}
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert (tmp_path / "out" / "measurements.bin").read_bytes() == (whole / "measurements.bin").read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*FILES, "events.jsonl"])


def test_what_is_there_is_joined_and_again_changes_nothing(
    call: Call, tmp_path: Path, measured: list[Measurements]
) -> None:
    parts = [write(tmp_path / f"part-{i}", measured[i::3]) for i in range(3)]
    assert call("merge", *parts, "--out", tmp_path / "at once").code == 0
    (tmp_path / "out" / ".merge-killed").mkdir(parents=True)
    assert call("merge", *parts[:2], "--out", tmp_path / "out").code == 0

    result = call("merge", parts[2], "--out", tmp_path / "out")

    assert result.out.splitlines()[0] == f"{tmp_path / 'out'}: {len(STEPS)} steps of 1 run"
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")
    assert not (tmp_path / "out" / ".merge-killed").exists()
    assert call("merge", *parts, "--out", tmp_path / "out").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")


def test_a_shard_that_knew_no_plan_does_no_harm(tmp_path: Path, measured: list[Measurements]) -> None:
    known = write(tmp_path / "known", measured[::2])
    unknown = write(tmp_path / "unknown", measured[1::2], UNKNOWN, None)
    write(tmp_path / "whole", measured)
    for number, order in enumerate([(known, unknown), (unknown, known)]):
        merge(order, tmp_path / str(number))
        assert [plan.total_steps for plan in Run.open(tmp_path / str(number)).plans] == [2000, 1800]
        log = (tmp_path / str(number) / "measurements.bin").read_bytes()
        assert log == (tmp_path / "whole" / "measurements.bin").read_bytes()


def test_steps_held_twice_must_have_the_same_numbers(
    refused: Callable[..., str], tmp_path: Path, measured: list[Measurements]
) -> None:
    broken = replace(measured[3], median=np.full_like(measured[3].median, np.nan))
    one, same = write(tmp_path / "one", [*measured[:3], broken]), write(tmp_path / "same", [broken, *measured[4:]])
    other = write(tmp_path / "other", measured[3:])

    assert merge([one, same], tmp_path / "out") == len(STEPS)
    words = refused("merge", one, other, "--out", tmp_path / "no")

    assert f"other: step {measured[3].step} has other numbers than in {one}" in words
    assert not (tmp_path / "no").exists()


def test_runs_of_another_kind_are_refused(
    refused: Callable[..., str], tmp_path: Path, measured: list[Measurements]
) -> None:
    one = write(tmp_path / "one", measured[::2])
    meta = make_meta()
    for name, changed in {
        "probe hash was": replace(meta, probe=replace(meta.probe, hash="cd" * 32)),
        "precision was float32, is bfloat16": replace(meta, precision="bfloat16"),
        "model width was 16, is 32": replace(meta, model=replace(meta.model, width=32)),
        "ratio was ratio_of_means": replace(meta, ratio="mean_of_ratios"),
    }.items():
        other = tmp_path / name.replace(" ", "-")
        with Run.create(other, changed, PLAN) as run:
            run.append(measured[1])
        assert name in refused("merge", one, other, "--out", tmp_path / "out")
    assert "not a run" in refused("merge", one, tmp_path / "absent", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_either_read_besides_a_step_is_kept(tmp_path: Path, measured: list[Measurements]) -> None:
    rows = len(measured[0].top)
    score, entropy = np.full(rows, np.nan), np.arange(rows, dtype=float)

    def besides(name: str, **values: np.ndarray) -> Path:
        phenomena = {key.replace("_", "/"): value for key, value in values.items()}
        return write(tmp_path / name, [replace(measured[0], phenomena=phenomena), *measured[1:]])

    one, other = besides("one", sinks_score=score), besides("other", sinks_score=score, compression_entropy=entropy)
    merge([one, other], tmp_path / "out")
    found = Run.open(tmp_path / "out").phenomena()
    np.testing.assert_array_equal(found["sinks/score"].values, [score])
    np.testing.assert_array_equal(found["compression/entropy"].values, [entropy])
    with pytest.raises(StoreError, match="has other numbers than in"):
        merge([other, besides("third", compression_entropy=entropy + 1)], tmp_path / "no")


def test_the_first_of_two_plans_for_a_step_counts(tmp_path: Path, measured: list[Measurements]) -> None:
    one = write(tmp_path / "one", measured[::2])
    other = write(tmp_path / "other", measured[1::2], replace(PLAN, total_steps=9))
    merge([one, other], tmp_path / "out")
    assert [plan.total_steps for plan in Run.open(tmp_path / "out").plans] == [2000, 1800]
    with pytest.raises(StoreError, match="there is no run to join"):
        merge([], tmp_path / "no")


def test_the_diaries_are_joined_in_order_and_each_event_once(tmp_path: Path, measured: list[Measurements]) -> None:
    parts = [write(tmp_path / f"part-{i}", measured[i::2]) for i in range(2)]
    for number in range(4):
        with Run.open(parts[number % 2], writable=True) as run:
            run.event("fault", f"number {number}")

    merge(parts, tmp_path / "out")
    merge([*parts, tmp_path / "out"], tmp_path / "out")

    events = Run.open(tmp_path / "out").events
    assert [event.message for event in events if event.kind == "fault"] == [f"number {n}" for n in range(4)]
    assert list(events) == sorted(events, key=lambda event: event.time)
    held = {event for part in parts for event in Run.open(part).events}
    assert [event.kind for event in events if event not in held][-2:] == ["merged", "merged"]
    assert len(set(events)) == len(events)


@pytest.mark.parametrize("there", [False, True], ids=["a new run", "one that is there"])
def test_killed_anywhere_the_same_call_joins_the_same(
    tmp_path: Path, measured: list[Measurements], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    parts = [write(tmp_path / f"part-{i}", measured[i::3]) for i in range(3)]
    merge(parts, tmp_path / "at once")
    whole = {name: (tmp_path / "at once" / name).read_bytes() for name in FILES[:2]}

    class Killed(BaseException):
        """Nothing after it is done, as after a SIGKILL."""

    replace_path = Path.replace
    for kill_at in range(20):
        out = tmp_path / f"out-{kill_at}"
        if there:
            write(out, measured[::3])
        left = kill_at

        def counted(path: Path, target: Path) -> Path:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return replace_path(path, target)

        monkeypatch.setattr(Path, "replace", counted)
        killed = False
        try:
            merge(parts, out)
        except Killed:
            killed = True
        monkeypatch.undo()
        if not killed:
            break
        assert merge(parts, out) == len(STEPS)
        assert {name: (out / name).read_bytes() for name in whole} == whole
    assert kill_at >= 3, "the run was replaced in one piece"


def test_a_run_that_is_being_written_is_not_replaced(tmp_path: Path, measured: list[Measurements]) -> None:
    one, out = write(tmp_path / "one", measured[::2]), write(tmp_path / "out", measured[1::2])
    before = (out / "measurements.bin").read_bytes()
    with Run.open(out, writable=True), pytest.raises(StoreError, match="one writer at a time"):
        merge([one], out)
    assert (out / "measurements.bin").read_bytes() == before
