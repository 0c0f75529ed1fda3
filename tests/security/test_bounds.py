"""Files that would take all memory, all time, or never end: sparse ones, bombs, pipes, and lines of a gigabyte."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ma_monitor import Run
from ma_monitor.cli.__main__ import main
from ma_monitor.errors import ConfigError, SourceError, StoreError
from ma_monitor.learned.boosting import read_trees
from ma_monitor.learned.combiner import load
from ma_monitor.replay import follow
from ma_monitor.replay.models import blank_model
from ma_monitor.replay.sources import list_source, weight_files
from ma_monitor.report.places import token_texts
from ma_monitor.runs.codec import encode_measurements, encode_plan, encode_rewind
from ma_monitor.runs.contents import Contents
from ma_monitor.runs.files import opened_arrays, parse_json
from ma_monitor.runs.log import HEADER, MAGIC, MARKER, encode, scan
from ma_monitor.runs.published import read_published
from ma_monitor.runs.records import Measurements, Plan
from ma_monitor.schedule import planned_rates
from tests.runs.makers import make_measurements, make_meta
from tests.security.slow_targets import CONFIG
from tests.security.targets import META, run_files, small_combiner

HUGE = 2**40
"""Bytes of a sparse file, which takes no room."""
SOON = 20.0
"""Seconds within which a hostile file must be done with on a busy machine; unbounded it would take hours."""


def sparse(path: Path, beginning: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(beginning)
        file.truncate(HUGE)
    return path


def written(folder: Path) -> Path:
    """The files of a run that is in order."""
    folder.mkdir(exist_ok=True)
    for name, content in run_files().items():
        (folder / name).write_bytes(content)
    return folder


READERS: dict[str, tuple[str, type[Exception], Callable[[Path], object]]] = {
    "metadata": ("run.json", StoreError, lambda file: Run.open(file.parent)),
    "records": ("measurements.bin", StoreError, lambda file: Run.open(file.parent)),
    "fits": ("fits.json", StoreError, lambda file: Run.open(file.parent).read_document("fits")),
    "combiner": ("combiner.json", ConfigError, load),
    "json schedule": ("lr.json", ConfigError, lambda file: planned_rates(file, None)),
    "csv schedule": ("lr.csv", ConfigError, lambda file: planned_rates(file, None)),
    "npy schedule": ("lr.npy", ConfigError, lambda file: planned_rates(file, None)),
    "npz schedule": ("lr.npz", ConfigError, lambda file: planned_rates(file, None)),
    "published archive": ("model.npz", SourceError, read_published),
    "published step": ("exp2_m_step5", SourceError, lambda file: read_published(file.parent)),
    "list of checkpoints": ("list.txt", SourceError, list_source),
    "index of weights": ("model.safetensors.index.json", SourceError, lambda file: weight_files(file.parent)),
    "configuration": ("config.json", SourceError, lambda file: blank_model(file.parent)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_terabyte_is_not_read(tmp_path: Path, reader: str) -> None:
    name, error, read = READERS[reader]
    folder = written(tmp_path / "files") if name in run_files() else tmp_path
    sparse(folder / name)
    with pytest.raises(error):
        read(folder / name)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("planted", ["pipe", "device"])
def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path, reader: str, planted: str) -> None:
    name, error, read = READERS[reader]
    folder = written(tmp_path / "files") if name in run_files() else tmp_path
    (folder / name).unlink(missing_ok=True)
    if planted == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(error):
        read(folder / name)


def test_of_an_endless_diary_the_end_is_read(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    told = Run.open(run).events
    whole = (run / "events.jsonl").read_bytes()
    with (run / "events.jsonl").open("wb") as file:
        file.truncate(2**30)  # one line of a gigabyte, which takes no room
        file.seek(2**30)
        file.write(b"\n" + whole)
    assert Run.open(run).events == told
    (run / "events.jsonl").unlink()
    os.mkfifo(run / "events.jsonl")
    assert Run.open(run).events == ()


def test_state_tokens_and_prior_that_never_end_say_nothing(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    sparse(tmp_path / "trainer_state.json")
    assert not follow._ended(tmp_path)
    (tmp_path / "trainer_state.json").write_bytes(b"[" * 10**6)
    assert not follow._ended(tmp_path)
    sparse(run / "tokenizer.json")
    assert token_texts(Run.open(run), [1]) == {}


@pytest.mark.parametrize("version", [b"", b"\x01", b"\x09\0\0"])
def test_a_header_cut_within_its_version_is_named(version: bytes) -> None:
    with pytest.raises(StoreError, match="a log begins with 12 bytes of header, this one ends after"):
        scan(MAGIC + version, "log")


def test_a_log_made_to_be_slow_is_refused_soon() -> None:
    """Every marker tells of a frame that reaches to the end: unbounded, 3 TB would be checksummed."""
    size = 8 * 2**20
    frame = MARKER + struct.pack("<II", size // 2, 7)
    data = (HEADER + frame * (size // len(frame)))[:size]
    started = time.monotonic()
    with pytest.raises(StoreError, match="made to be slow to read"):
        scan(data, "log")
    assert time.monotonic() - started < SOON


def test_many_rewinds_and_plans_are_read_soon() -> None:
    plans = [encode_plan(Plan(step, None, None, None, "")) for step in range(4000)]
    frames = [encode(payload) for payload in (*plans, *[encode_rewind(10**6)] * 4000)]
    started = time.monotonic()
    contents = loaded(HEADER + b"".join(frames))
    assert len(contents.plans) == 4000
    assert time.monotonic() - started < SOON


def loaded(log: bytes) -> Contents:
    contents = Contents(META)
    contents.load(scan(log, "log").frames)
    return contents


said = st.tuples(st.sampled_from("mmpr"), st.integers(0, 6))


@given(st.lists(said, max_size=12))
@settings(max_examples=60)
def test_one_pass_says_what_writing_one_after_the_other_said(records: list[tuple[str, int]]) -> None:
    steps: set[int] = set()
    plans: list[int] = []
    payloads = []
    for kind, step in records:
        if kind == "m":
            steps.add(step)
            payloads.append(encode_measurements(make_measurements(step, META)))
        elif kind == "p":
            plans = [earlier for earlier in plans if earlier < step] + [step]
            payloads.append(encode_plan(Plan(step, None, None, None, "")))
        else:
            steps, plans = {s for s in steps if s <= step}, [p for p in plans if p <= step]
            payloads.append(encode_rewind(step))
    contents = loaded(HEADER + b"".join(map(encode, payloads)))
    assert list(contents.places) == sorted(steps)
    assert [plan.from_step for plan, _ in contents.plans] == plans


def test_records_made_to_fill_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ma_monitor.runs.contents.SPARE", 2**20)
    meta = make_meta(layers=100, sequences=100)
    top, median = np.zeros((101, 100, 3)), np.zeros((101, 100))
    frames = [encode(encode_measurements(Measurements.from_statistics(step, top, median))) for step in range(3)]
    with pytest.raises(StoreError, match="unpack to so much more than they take"):
        Contents(meta).load(scan(HEADER + b"".join(frames), "log").frames)


def npz(header: bytes, packed: bytes, claimed: int | None = None) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lr.npy", header + packed)
    data = file.getvalue()
    return (
        data if claimed is None else data.replace(struct.pack("<I", len(header + packed)), struct.pack("<I", claimed))
    )


def array_header(count: int) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (count,)})
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (npz(array_header(10**15), b"\0" * 80), "allocate|EOF|reading array data"),
        (npz(array_header(10), b"\0" * 80, claimed=2**32 - 2), "at most .* are read|EOF|CRC"),
        (array_header(10**15) + b"\0" * 80, "allocate|reading array data|cannot reshape"),
    ],
    ids=["claims a petabyte", "claims four gigabytes unpacked", "not an archive, claims a petabyte"],
)
def test_arrays_that_claim_more_than_there_is(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / "bomb.npz"
    file.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=why), opened_arrays(file) as loaded:
        np.asarray(loaded["lr"] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded)


def test_a_plan_of_a_billion_updates_in_a_state_is_refused(tmp_path: Path) -> None:
    rows = [{"step": 1, "learning_rate": 1.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows, "max_steps": 3 * 10**9}))
    with pytest.raises(ConfigError, match="at most 100,000,000 rates are listed, but .* speaks of 3,000,000,000"):
        planned_rates(tmp_path / "trainer_state.json", None)


def test_trees_that_would_fill_the_memory_are_refused() -> None:
    document: dict[str, Any] = small_combiner()["trees"]
    model = document["learner"]["gradient_booster"]["model"]
    chain = {"left_children": [-1] * 5001, "right_children": [-1] * 5001, "split_indices": [0] * 5001}
    model["trees"] = [{**chain, "split_conditions": [0.0] * 5001}] + [model["trees"][0]] * 2000
    with pytest.raises(ValueError, match="must have at most 10000000 nodes"):
        read_trees(document, 10)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_hidden_layers": 10**9}, "more than 4,096 parts of a kind .num_hidden_layers"),
        ({"text_config": {"n_layer": 1e12}}, "more than 4,096 parts of a kind .n_layer"),
        ({"num_local_experts": 10**7}, "more than 4,096 parts of a kind .num_local_experts"),
        ({"vocab_size": -1}, "describes no model"),
        ({"hidden_size": "wide"}, "cannot be used|describes no model"),
    ],
)
def test_a_configuration_of_a_million_layers_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(SourceError, match=why):
        blank_model(tmp_path)


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", '{"a": 1e999}'])
def test_numbers_that_are_not_finite_are_told_apart(text: str) -> None:
    with pytest.raises(ValueError, match="is not finite"):
        parse_json(text, finite=True)
    parse_json(text)


def test_no_prediction_is_made_of_a_million_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 10**9}))
    for given_as in (tmp_path, tmp_path / "config.json"):
        assert main(["predict", str(given_as)]) == 2
        assert "asks for more than 4,096 parts of a kind" in capsys.readouterr().err
