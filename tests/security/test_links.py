"""Links and names that lead out of a folder: nothing there is written, removed, loaded or copied."""

from __future__ import annotations

import json
import logging
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainerState

from ma_monitor import MassiveActivationCallback, Run
from ma_monitor.callback import STATE_KEY
from ma_monitor.cli.__main__ import main
from ma_monitor.errors import SourceError, StoreError
from ma_monitor.measure.probe import Probe
from ma_monitor.replay.runner import replay
from ma_monitor.replay.sources import folder_source, weight_files
from tests.replay.makers import save_model
from tests.runs.makers import make_measurements, make_plan
from tests.security.targets import META, run_files

SECRET = b"not yours\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in run_files().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that is none of a run's business."""
    file = tmp_path / "home" / ".profile"
    file.parent.mkdir()
    file.write_bytes(SECRET)
    return file


@pytest.fixture
def probe() -> Probe:
    return Probe.from_ids(np.arange(24).reshape(2, 12))


def test_the_diary_is_not_written_through_a_link(run: Path, outside: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "events.jsonl").unlink()
    (run / "events.jsonl").symlink_to(outside)
    with caplog.at_level(logging.WARNING, "ma_monitor"), Run.open(run, writable=True) as opened:
        opened.event("fault", "told")
    assert outside.read_bytes() == SECRET
    assert "events.jsonl: cannot be written" in caplog.text


def test_records_are_not_written_through_a_link(run: Path, outside: Path) -> None:
    outside.write_bytes((run / "measurements.bin").read_bytes())
    (run / "measurements.bin").unlink()
    (run / "measurements.bin").symlink_to(outside)
    with pytest.raises(StoreError, match="cannot be written"):
        Run.open(run, writable=True)
    assert outside.read_bytes() == run_files()["measurements.bin"]


def test_a_new_run_makes_no_file_at_the_end_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "measurements.bin").symlink_to(tmp_path / "made")
    with pytest.raises(StoreError, match="cannot be written"):
        Run.create(tmp_path / "new", META, make_plan())
    assert not (tmp_path / "made").exists()


def test_documents_take_the_place_of_a_link(run: Path, outside: Path) -> None:
    (run / "fits.json").unlink()
    (run / "fits.json").symlink_to(outside)
    with Run.open(run, writable=True) as opened:
        opened.append(make_measurements(99, META))
        opened.write_document("fits", {"layers": []})
    assert outside.read_bytes() == SECRET
    assert not (run / "fits.json").is_symlink()


def test_a_copy_takes_nothing_from_the_end_of_a_link(run: Path, outside: Path, tmp_path: Path) -> None:
    """A checkpoint holds such a copy, and checkpoints are uploaded."""
    (run / "combiner.json").symlink_to(outside)
    (run / "prior.json").unlink(missing_ok=True)
    (run / "prior.json").symlink_to(outside)
    Run.open(run).copy_to(tmp_path / "copy")
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == ["measurements.bin", "run.json"]


def test_what_a_replay_clears_away_is_its_own(tmp_path: Path, outside: Path, probe: Probe) -> None:
    (outside.parent / "photos").mkdir()
    save_model(tmp_path / "saved" / "step5", seed=0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "incoming").symlink_to(outside.parent)
    with pytest.raises(StoreError, match="is a link, and all that is in this folder is removed"):
        replay(folder_source(tmp_path / "saved"), probe, None, tmp_path / "out")
    assert sorted(file.name for file in outside.parent.iterdir()) == [".profile", "photos"]
    (tmp_path / "out" / "incoming").unlink()
    (tmp_path / "out" / "incoming").mkdir()
    (tmp_path / "out" / "incoming" / "lock").symlink_to(outside)
    with pytest.raises(StoreError, match="cannot be written"):
        replay(folder_source(tmp_path / "saved"), probe, None, tmp_path / "out")
    assert outside.read_bytes() == SECRET


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "deep/model.safetensors"])
def test_an_index_names_files_beside_it_alone(tmp_path: Path, name: str) -> None:
    save_model(tmp_path / "step5", seed=0)
    weights = tmp_path / "step5" / "model.safetensors"
    shutil.copy(weights, tmp_path / "model.safetensors")
    weights.rename(tmp_path / "step5" / "good.safetensors")
    index = {"weight_map": {"a": "good.safetensors", "b": name}}
    (tmp_path / "step5" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"index\.json may only name files beside it, and names"):
        weight_files(tmp_path / "step5")


def test_an_archive_is_no_source_and_nothing_is_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    payload = tmp_path / "payload"
    payload.write_bytes(b"\xff" * 10)
    with tarfile.open(tmp_path / "run.tar", "w") as archive:
        for name in ("../planted", "/tmp/planted-by-a-tar", "step5/../../planted"):
            archive.add(payload, arcname=name)
    before = sorted(tmp_path.iterdir())
    for command in ("replay", "import"):
        assert main([command, str(tmp_path / "run.tar"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("ma-monitor: ") == 2
    assert sorted(tmp_path.iterdir()) == before
    assert not Path("/tmp/planted-by-a-tar").exists()


@pytest.mark.parametrize("name", ["..", "../elsewhere", "/", "", "../../home/elsewhere"])
def test_a_checkpoint_that_names_a_run_elsewhere_is_not_followed(run: Path, tmp_path: Path, name: str) -> None:
    """What the Trainer's state carries is one name, looked for beside the run's own place."""
    output = tmp_path / "out"
    shutil.copytree(run, tmp_path / "elsewhere")
    for file in run.iterdir():
        shutil.copy(file, tmp_path)
    state = TrainerState(global_step=55)
    state.stateful_callbacks = {STATE_KEY: {"run": name, "measured": 0, "told": []}}  # type: ignore[assignment]
    assert MassiveActivationCallback()._candidates(output / "ma_monitor", state) == []
