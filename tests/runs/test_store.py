from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ma_monitor.errors import ConfigError, StoreError
from ma_monitor.runs.log import HEADER, REVIVED, encode, scan
from ma_monitor.runs.records import Measurements, Plan
from ma_monitor.runs.store import Run
from tests.runs.makers import any_measurements, bits, make_measurements, make_meta, make_plan, plan_bits

META = make_meta()
PLAN = make_plan()
SHAPE = (META.rows, META.probe.sequences, META.k)


def make_run(path: Path, steps: range = range(0, 50, 10), plan: Plan | None = PLAN) -> Path:
    with Run.create(path, META, plan) as run:
        for step in steps:
            run.append(make_measurements(step, META))
    return path


def contents(run: Run) -> list[tuple[object, ...]]:
    return [bits(m) for m in run.measurements()]


def expected(*steps: int) -> list[tuple[object, ...]]:
    return [bits(make_measurements(step, META)) for step in steps]


def tree(path: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its content and time of change."""
    return {
        str(file.relative_to(path)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def test_a_run_comes_back(tmp_path: Path) -> None:
    path = make_run(tmp_path / "deep" / "run")
    run = Run.open(path)
    assert run.path == path
    assert run.meta == META
    assert run.damage is None
    assert run.layers == (1, 2)
    assert run.steps.tolist() == [0, 10, 20, 30, 40]
    assert run.steps.dtype == np.int64
    assert [plan_bits(plan) for plan in run.plans] == [plan_bits(PLAN)]
    assert contents(run) == expected(0, 10, 20, 30, 40)
    assert run.stack().top.shape == (5, *SHAPE)


@settings(max_examples=30)
@given(st.lists(any_measurements(SHAPE), max_size=4))
def test_any_measurements_come_back(tmp_path_factory: pytest.TempPathFactory, many: list[Measurements]) -> None:
    path = tmp_path_factory.mktemp("any") / "run"
    with Run.create(path, META, None) as run:
        for m in many:
            run.append(m)
        live = contents(run)
    latest = {m.step: m for m in many}
    assert contents(Run.open(path)) == live == [bits(latest[step]) for step in sorted(latest)]


Action = tuple[str, int, int]
KINDS = ["append", "append", "append", "rewind", "resume", "resume", "reopen"]
ACTIONS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 6), st.integers(0, 2)), max_size=12)


@settings(max_examples=50)
@given(ACTIONS)
def test_appends_rewinds_and_resumes_equal_a_dict(tmp_path_factory: pytest.TempPathFactory, todo: list[Action]) -> None:
    path = tmp_path_factory.mktemp("actions") / "run"
    measured: dict[int, Measurements] = {}
    plans = {0: make_plan(0)}
    run = Run.create(path, META, plans[0])
    for action, step, seed in todo:
        if action == "append":
            measured[step] = make_measurements(step, META, seed)
            run.append(measured[step])
            continue
        if action == "reopen":
            run.close()
            run = Run.open(path, writable=True)
            continue
        measured = {held: m for held, m in measured.items() if held <= step}
        plans = {start: plan for start, plan in plans.items() if start <= step}
        if action == "rewind":
            run.rewind(step)
            continue
        run.close()
        plan = make_plan(from_step=step, peak=1e-3 * (1 + seed))
        if not plan.same_as(plans[max(plans)]):
            plans[step] = plan
        run = Run.continue_(path, META, plan, from_step=step)
    run.copy_to(path.parent / "copy")
    for view in (run, Run.open(path), Run.open(path.parent / "copy")):
        assert contents(view) == [bits(measured[step]) for step in sorted(measured)]
        assert [plan_bits(plan) for plan in view.plans] == [plan_bits(plans[start]) for start in sorted(plans)]
        for step in (0, 3, 6, 99):
            in_force = view.plan_at(step)
            assert in_force is not None
            assert plan_bits(in_force) == plan_bits(plans[max(start for start in plans if start <= step)])
    run.close()


def test_the_same_measurements_give_the_same_bytes(tmp_path: Path) -> None:
    make_run(tmp_path / "live")
    make_run(tmp_path / "replayed")
    make_run(tmp_path / "resumed", range(0, 30, 10))
    with Run.continue_(tmp_path / "resumed", META, PLAN, from_step=20) as run:
        for step in (30, 40):
            run.append(make_measurements(step, META))
    for name in ("run.json", "measurements.bin"):
        live = (tmp_path / "live" / name).read_bytes()
        assert live == (tmp_path / "replayed" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_a_copy_of_a_resumed_run_has_the_bytes_of_one_that_was_never_interrupted(tmp_path: Path) -> None:
    make_run(tmp_path / "live")
    make_run(tmp_path / "resumed", range(0, 50, 10))
    with Run.continue_(tmp_path / "resumed", META, PLAN, from_step=15) as run:
        for step in (20, 30, 40):
            run.append(make_measurements(step, META))
        run.copy_to(tmp_path / "copy")
    assert (tmp_path / "copy" / "measurements.bin").read_bytes() == (
        tmp_path / "live" / "measurements.bin"
    ).read_bytes()


def test_no_file_but_the_diary_knows_the_time(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    assert sorted(tree(path)) == ["events.jsonl", "measurements.bin", "run.json"]
    assert all("schema_version" in json.loads(line) for line in (path / "events.jsonl").read_text().splitlines())
    assert json.loads((path / "run.json").read_text())["schema_version"] == 1


def test_truncation_at_every_byte_of_the_last_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_run(tmp_path / "run", range(3))
    log = path / "measurements.bin"
    whole = log.read_bytes()
    last = scan(whole, "log").frames[-1]
    caplog.set_level(logging.ERROR, "ma_monitor")
    for size in range(last.offset, len(whole)):
        log.write_bytes(whole[:size])
        before = tree(path)
        run = Run.open(path)
        assert contents(run) == expected(0, 1)
        assert (run.damage is None) == (size == last.offset)
        assert tree(path) == before
    # the writer repairs, and what it then appends is what an undisturbed run holds
    for size in (last.offset + 1, last.offset + 13, len(whole) - 1):
        log.write_bytes(whole[:size])
        with Run.open(path, writable=True) as run:
            assert log.stat().st_size == last.offset
            run.append(make_measurements(2, META))
        assert log.read_bytes() == whole


def test_a_repair_is_warned_about_and_written_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_run(tmp_path / "run", range(3))
    with (path / "measurements.bin").open("ab") as file:
        file.write(encode(b"half a record")[:-4])
    with caplog.at_level(logging.WARNING, "ma_monitor"), Run.open(path, writable=True) as run:
        assert run.damage is not None
        assert "are not a whole record" in run.damage
    assert [record.getMessage() for record in caplog.records] == [f"{path / 'measurements.bin'}: {run.damage}"]
    assert [(e.kind, e.message) for e in run.events if e.kind == "repaired"] == [("repaired", run.damage)]
    assert Run.open(path).damage is None


def test_truncation_at_every_byte_of_the_header_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", range(1))
    for size in range(len(HEADER)):
        (path / "measurements.bin").write_bytes(HEADER[:size])
        before = tree(path)
        for writable in (False, True):
            with pytest.raises(StoreError, match=r"measurements.bin: a log begins with 12 bytes of header"):
                Run.open(path, writable=writable)
        assert tree(path) == before


def test_damage_in_the_middle_is_named_and_the_rest_kept(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", range(4))
    log = path / "measurements.bin"
    data = bytearray(log.read_bytes())
    frame = scan(bytes(data), "log").frames[4]  # the plan, step 0, step 1 and what was read besides, step 2
    data[frame.offset + 30] ^= 1
    log.write_bytes(bytes(data))
    run = Run.open(path)
    assert contents(run) == expected(0, 1, 3)
    assert run.damage == f"bytes {frame.offset} to {frame.offset + frame.size} are unreadable and left out ({REVIVED})"
    with Run.open(path, writable=True) as writer:
        writer.append(make_measurements(4, META))
        writer.copy_to(tmp_path / "copy")
    assert log.read_bytes()[: len(data)] == data
    assert [e.kind for e in writer.events].count("damaged") == 1
    assert contents(Run.open(path)) == contents(Run.open(tmp_path / "copy")) == expected(0, 1, 3, 4)
    assert Run.open(tmp_path / "copy").damage is None


def test_what_was_read_besides_lost_measurements_is_named_and_left_out(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", range(4))
    log = path / "measurements.bin"
    data = bytearray(log.read_bytes())
    data[scan(bytes(data), "log").frames[2].offset + 30] ^= 1  # the plan, step 0, step 1
    log.write_bytes(bytes(data))
    run = Run.open(path)
    assert contents(run) == expected(0, 2, 3)
    assert run.damage is not None
    assert "what was read besides measurements without these" in run.damage


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_damaged_rewind_is_named_as_reviving_what_it_superseded(tmp_path: Path, *, goes_on: bool) -> None:
    path = make_run(tmp_path / "run")
    log = path / "measurements.bin"
    at = log.stat().st_size
    with Run.open(path, writable=True) as run:
        run.rewind(20)
        if goes_on:
            run.append(make_measurements(30, META, seed=1))
    data = bytearray(log.read_bytes())
    data[at + len(encode(b""))] ^= 1
    log.write_bytes(bytes(data))

    run = Run.open(path)

    assert run.steps.tolist() == [0, 10, 20, 30, 40]
    assert run.damage is not None
    assert "if a rewind was there, the steps that it superseded count again" in run.damage


def test_a_record_of_another_run_is_named_and_left_out(tmp_path: Path) -> None:
    from ma_monitor.runs.codec import encode_measurements

    path = make_run(tmp_path / "run", range(2))
    foreign = encode_measurements(make_measurements(5, make_meta(layers=7)))
    with (path / "measurements.bin").open("ab") as file:
        file.write(encode(foreign) + encode(b"\x09" + bytes(8)) + encode(b""))
    run = Run.open(path)
    assert contents(run) == expected(0, 1)
    assert run.damage is not None
    for words in ("shape (8, 3, 3) instead of (3, 3, 3)", "kind 9", "too short"):
        assert words in run.damage


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("x"), lambda path: None])
def test_what_is_no_run_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "thing")
    with pytest.raises(StoreError, match=r"thing: not a run: a run is a directory that holds run.json and"):
        Run.open(tmp_path / "thing")


def test_a_run_without_its_log_is_refused(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "measurements.bin").unlink()
    with pytest.raises(StoreError, match=r"measurements.bin: cannot be read"):
        Run.open(path)
    with pytest.raises(StoreError, match=r"run: cannot be written \(No such file"):
        Run.open(path, writable=True)
    assert not (path / "measurements.bin").exists()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("measurements.bin", b"PK\x03\x04" + bytes(50), "not a log of ma_monitor"),
        ("measurements.bin", HEADER[:8] + b"\2\0\0\0", "schema version 2, this ma_monitor reads 1"),
        ("run.json", b"\xff\xfe\x00", "not a JSON file that ma_monitor wrote"),
        ("run.json", b'{"schema_version": 2}', "schema version 2, this ma_monitor reads 1"),
        ("run.json", b"[" * 100_000, "not a JSON file that ma_monitor wrote"),
        ("run.json", b'{"schema_version": 1, "model": 7}', "`model` must be an object"),
    ],
)
def test_foreign_and_future_files_are_refused_and_nothing_changes(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    path = make_run(tmp_path / "run")
    (path / name).write_bytes(data)
    before = tree(path)
    for writable in (False, True):
        with pytest.raises(StoreError, match=message):
            Run.open(path, writable=writable)
    with pytest.raises(StoreError, match="already holds a run"):
        Run.create(path, META, None)
    assert tree(path) == before


def test_a_directory_holds_one_run(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    before = tree(path)
    with pytest.raises(StoreError, match="run: already holds a run; continue it with"):
        Run.create(path, META, None)
    assert tree(path) == before


def test_a_run_is_made_beside_other_files_but_not_over_one(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    make_run(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(StoreError, match="notes.txt: cannot be written"):
        Run.create(tmp_path / "notes.txt", META, None)


@pytest.mark.parametrize("size", [0, 5, len(HEADER), len(HEADER) + 30, None])
def test_a_creation_that_was_interrupted_can_be_begun_again(tmp_path: Path, size: int | None) -> None:
    path = make_run(tmp_path / "run", range(0))
    log = path / "measurements.bin"
    whole = log.read_bytes()
    log.write_bytes(whole[:size])
    (path / "run.json").unlink()
    make_run(path, range(0))
    assert log.read_bytes() == whole


def test_measurements_without_metadata_are_not_overwritten(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "run.json").unlink()
    before = tree(path)
    with pytest.raises(StoreError, match=r"holds measurements but no run.json; bring it back"):
        Run.create(path, META, None)
    (path / "measurements.bin").write_bytes(b"somebody else's")
    with pytest.raises(StoreError, match="not a log of ma_monitor"):
        Run.create(path, META, None)
    assert (path / "measurements.bin").read_bytes() == b"somebody else's"
    assert tree(path).keys() == before.keys()


def test_a_run_that_is_not_open_for_writing_cannot_be_written(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    closed = Run.open(path, writable=True)
    closed.close()
    closed.close()
    before = tree(path)
    for run in (closed, Run.open(path)):
        refused = pytest.raises(StoreError, match="closed or open for reading only")
        with refused:
            run.append(make_measurements(99, META))
        with refused:
            run.rewind(0)
        with refused:
            run.add_plan(make_plan(60))
        with refused:
            run.event("fault", "x")
        with refused:
            run.write_document("fits", {})
        assert contents(run) == expected(0, 10, 20, 30, 40)
    assert tree(path) == before


def test_arguments_that_break_a_rule(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", make_meta(first_layer=1), None) as run:
        with pytest.raises(ConfigError, match=r"axes \[layer, sequence, rank\] = \(2, 3, 3\), got \(3, 3, 3\)"):
            run.append(make_measurements(0, META))
        with pytest.raises(ConfigError, match="cannot be negative, got -1"):
            run.rewind(-1)
        for layer in (0, 3, -1):
            with pytest.raises(ConfigError, match=f"`layer` must be one of this run's, 1 to 2, got {layer}"):
                run.trajectory(layer)
        for rank in (0, 4):
            with pytest.raises(ConfigError, match=f"`rank` must be one of this run's, 1 to 3, got {rank}"):
                run.trajectory(1, rank)
            with pytest.raises(ConfigError, match=f"`rank` must be one of this run's, 1 to 3, got {rank}"):
                run.ratios(rank)
        assert len(run.steps) == 0
        assert run.ratios().shape == (2, 0)


def test_ratios_and_trajectories_are_of_the_right_layer(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "run"))
    many = run.measurements()
    for rank in (1, 2, 3):
        table = [[np.abs(m.top[row, :, rank - 1]).mean() / m.median[row].mean() for m in many] for row in range(3)]
        np.testing.assert_allclose(run.ratios(rank), table[1:], rtol=1e-14)  # order of two sums
        for layer in (0, 1, 2):
            trajectory = run.trajectory(layer, rank)
            assert (trajectory.layer, trajectory.rank) == (layer, rank)
            np.testing.assert_array_equal(trajectory.steps, run.steps)
            np.testing.assert_allclose(trajectory.values, table[layer], rtol=1e-14)
    each = [[(np.abs(m.top[row, :, 0]) / m.median[row]).mean() for m in many] for row in (1, 2)]
    np.testing.assert_allclose(run.ratios(ratio="mean_of_ratios"), each, rtol=1e-14)


def test_a_run_reduces_its_sequences_as_its_metadata_say(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", make_meta(ratio="mean_of_ratios"), None) as run:
        run.append(make_measurements(0, META))
        np.testing.assert_array_equal(run.ratios(), run.ratios(1, "mean_of_ratios"))
        np.testing.assert_array_equal(run.trajectory(2).values, run.ratios(1, "mean_of_ratios")[1])
        assert not np.array_equal(run.ratios(), run.ratios(1, "ratio_of_means"))


def test_a_run_goes_on_with_another_plan(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with Run.open(path, writable=True) as run:
        run.write_document("fits", {"layers": []})
        run.write_document("forecast", {"at": 40})
    with Run.continue_(path, META, make_plan(0), from_step=40) as run:
        assert len(run.plans) == 1
        assert run.read_document("forecast") == {"at": 40}
    other = make_plan(from_step=0, total=200)
    with Run.continue_(path, make_meta(versions={"torch": "9"}), other, from_step=40) as run:
        assert [plan.from_step for plan in run.plans] == [0, 40]
        assert run.plan_at(39) is run.plans[0]
        assert run.plan_at(40) is run.plans[1]
        assert run.plans[1].total_steps == 200
        assert run.read_document("fits") == {"layers": []}
        assert run.read_document("forecast") is None
    kinds = [(event.kind, event.message) for event in run.events]
    assert ("plan changed", "at step 40: cosine, 200 steps") in kinds
    assert ("resumed", "from step 40 with other package versions") in kinds
    assert [plan.total_steps for plan in Run.open(path).plans] == [100, 200]
    with Run.continue_(path, META, None, from_step=40) as run:
        assert len(run.plans) == 2
    with Run.continue_(path, META, make_plan(total=300), from_step=40) as run:
        assert [plan.total_steps for plan in run.plans] == [100, 300]
    assert [plan.total_steps for plan in Run.open(path).plans] == [100, 300]


def test_a_run_without_a_plan_goes_on_without_one(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", plan=None)
    with Run.open(path, writable=True) as run:
        run.write_document("forecast", {"at": 40})
    with Run.continue_(path, META, Plan(40, None, None, None, "unknown"), from_step=40) as run:
        assert run.plans == ()
        assert run.read_document("forecast") == {"at": 40}
    assert "plan changed" not in [event.kind for event in run.events]


def test_a_rewind_voids_what_was_made_of_superseded_measurements(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with Run.open(path, writable=True) as run:
        run.write_document("fits", {"layers": []})
        run.write_document("forecast", {"at": 40})
        size = (path / "measurements.bin").stat().st_size
        run.rewind(40)
        assert (path / "measurements.bin").stat().st_size == size
        assert run.read_document("fits") == {"layers": []}
        run.rewind(20)
        assert run.read_document("fits") is None
        assert run.read_document("forecast") is None
        assert contents(run) == expected(0, 10, 20)
    assert [e.message for e in run.events if e.kind == "rewound"] == ["to step 20: 2 later steps are superseded"]
    assert contents(Run.open(path)) == expected(0, 10, 20)


def test_a_run_goes_on_only_as_what_it_was(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    log = (path / "measurements.bin").read_bytes()
    other = make_meta(layers=5, k=1)
    with pytest.raises(
        StoreError, match="run: a run goes on only as what it was: k was 3, is 1; model layers was 2, is 5"
    ):
        Run.continue_(path, other, PLAN, from_step=0)
    assert (path / "measurements.bin").read_bytes() == log
    Run.open(path, writable=True).close()  # the refused one left no lock
    with pytest.raises(StoreError, match="not a run"):
        Run.continue_(tmp_path / "none", META, PLAN, from_step=0)


def test_no_plan_is_known_before_the_first(tmp_path: Path) -> None:
    make_run(tmp_path / "run", plan=None)
    with Run.continue_(tmp_path / "run", META, PLAN, from_step=20) as run:
        assert run.plan_at(19) is None
        assert run.plan_at(20) is run.plans[0]


def test_a_copy_is_whole_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    target = tmp_path / "checkpoint-40" / "ma_monitor"
    with Run.open(path, writable=True) as run:
        run.copy_to(target)
        run.append(make_measurements(50, META))
        run.copy_to(target)
    assert sorted(tree(target)) == ["measurements.bin", "run.json"]
    assert contents(Run.open(target)) == expected(0, 10, 20, 30, 40, 50)
    assert os.listdir(target.parent) == ["ma_monitor"]
    Run.open(target).copy_to(tmp_path / "back")
    with Run.continue_(tmp_path / "back", META, PLAN, from_step=20) as back:
        assert contents(back) == expected(0, 10, 20)


def test_a_copy_destroys_nothing(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "run"))
    before = tree(run.path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    another = make_run(tmp_path / "another", range(3))
    held = tree(another)
    for target in (tmp_path / "other", tmp_path / "file", run.path, tmp_path / "other" / ".." / "run", another):
        with pytest.raises(StoreError, match="a copy would destroy what is there"):
            run.copy_to(target)
    with pytest.raises(StoreError, match="cannot be written"):
        run.copy_to(tmp_path / "file" / "ma_monitor")
    (tmp_path / "empty").mkdir()
    run.copy_to(tmp_path / "empty")
    copy = Run.open(tmp_path / "empty")
    with pytest.raises(StoreError, match="a copy would destroy what is there"):
        copy.copy_to(tmp_path / "empty")
    assert (tree(run.path), tree(another)) == (before, held)
    assert contents(copy) == contents(run)


def test_documents_come_back_and_are_replaced(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with Run.open(path, writable=True) as run:
        assert run.read_document("fits") is None
        documents: list[dict[str, Any]] = [{"layers": [{"K": None, "r2": 0.1 + 0.2, "class": "flat"}]}, {"layers": []}]
        for document in documents:
            run.write_document("fits", document)
            assert Run.open(path).read_document("fits") == document
        held = (path / "fits.json").read_bytes()
        for value in (float("nan"), float("inf"), {1, 2}, np.float64("nan")):
            with pytest.raises(ConfigError, match="a document must be JSON, with null for what is not finite"):
                run.write_document("fits", {"value": value})
        assert (path / "fits.json").read_bytes() == held
    assert json.loads(held)["schema_version"] == 1
    assert sorted(tree(path)) == ["events.jsonl", "fits.json", "measurements.bin", "run.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a JSON file"), ("[]", "holds a list"), ("{}", "version None"), ('{"schema_version": 2}', "version 2")],
)
def test_a_document_that_is_not_ours_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = make_run(tmp_path / "run")
    (path / "forecast.json").write_text(text)
    with pytest.raises(StoreError, match=rf"forecast.json: .*{message}"):
        Run.open(path).read_document("forecast")
