"""Twelve revisions of a trained model on a Hub where much goes wrong, through the command line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ma_monitor.cli.__main__ import main
from ma_monitor.measure.probe import Probe
from ma_monitor.replay.hub import hub_source
from ma_monitor.replay.models import ModelLoader
from ma_monitor.replay.runner import replay
from ma_monitor.replay.sources import folder_source
from ma_monitor.runs.store import Run
from tests.replay.loopback import LoopbackHub
from tests.replay.makers import FILES, IDS, contents, train

REPO = "lab/tiny"
STEPS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36)
PATIENCE = 60.0
"""Seconds after which a download that should have come is taken for lost."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve states of one training; not to be changed."""
    return train(tmp_path_factory.mktemp("trained"), STEPS)


@pytest.fixture
def full_hub(hub: LoopbackHub, trained: Path) -> LoopbackHub:
    """All twelve as revisions of one model."""
    for step in STEPS:
        hub.put(REPO, f"step{step}", trained / f"step{step}")
    return hub


def cli(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], list[str]]:
    """Exit code, JSON and lines on stderr of a command, those of the Hub's client about its retries left out."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("ma-monitor: ") or "%|" in line]
    return code, json.loads(out) if out else {}, lines


def test_the_rest_is_measured_whatever_goes_wrong(
    full_hub: LoopbackHub, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    full_hub.faults = {
        "/refs$": [503, 429],
        f"/{full_hub.sha(REPO, 'step2')}/model.safetensors": [503, 503],
        f"/{full_hub.sha(REPO, 'step8')}/model.safetensors": [0],
        "/revision/step16$": [429],
    }
    full_hub.corrupt = {(REPO, "step12", "model.safetensors")}
    names = ",".join(f"step{step}" for step in (*STEPS, 7, 200))
    ask = ("--out", tmp_path / "run", "--probe-ids", tmp_path / "ids.npy", "--json")

    code, document, said = cli(capsys, "replay", REPO, "--revisions", names, *ask)

    good = [step for step in STEPS if step != 12]
    assert code == 3
    assert (document["measured"], document["skipped"]) == (good, [])
    assert [problem.split(":")[0] for problem in document["problems"]] == [
        "step7 left out",
        "step200 left out",
        "step12 left out",
    ]
    assert "nearest: step" in document["problems"][0]
    assert "came with another size or SHA-256 than the Hub lists" in document["problems"][2]
    assert said == [f"ma-monitor: {problem}" for problem in document["problems"]]
    assert all(not waiting for waiting in full_hub.faults.values()), "not every fault was met"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted([*FILES, "events.jsonl"])

    full_hub.corrupt.clear()
    code, document, said = cli(capsys, "replay", REPO, *ask)
    assert (code, document["measured"], document["skipped"], said) == (0, [12], good, [])
    replay(folder_source(trained), Probe.from_ids(IDS), None, tmp_path / "folder")
    assert np.array_equal(Run.open(tmp_path / "run").ratios(), Run.open(tmp_path / "folder").ratios())


def test_a_gated_and_a_misspelt_model_are_bad_input(
    full_hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full_hub.gated.add(REPO)
    for repo, words in (
        (REPO, "lab/tiny is gated: accept its terms"),
        ("lab/tinny", "no public model 'lab/tinny' (nearest: tiny)"),
    ):
        code, document, said = cli(capsys, "replay", repo, "--out", tmp_path / "run", "--json")
        assert (code, document, len(said)) == (2, {}, 1), said
        assert words in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("full_hub")
def test_two_revisions_at_most_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: list[int]) -> None:
    import huggingface_hub

    download, load = huggingface_hub.snapshot_download, ModelLoader.load
    there = threading.Semaphore(0)
    wanted = iter((2, 1, 1, 1, 0))  # downloads to wait for at each load: its own, the next, and so on
    at_loads: list[int] = []

    def counted_download(*args: Any, **kwargs: Any) -> Any:
        result = download(*args, **kwargs)
        if Path(kwargs["local_dir"]).name.startswith("step"):  # and not what the training recorded
            there.release()
        return result

    def late_load(self: ModelLoader, folder: Path) -> Any:
        for _ in range(next(wanted)):
            assert there.acquire(timeout=PATIENCE)
        at_loads.append(on_disk(tmp_path / "run"))
        return load(self, folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", counted_download)
    monkeypatch.setattr(ModelLoader, "load", late_load)

    replay(hub_source(REPO, "step0,step1,step2,step4,step8"), Probe.from_ids(IDS), None, tmp_path / "run")

    assert at_loads == [2, 2, 2, 2, 1], "one is loaded while the next comes"
    assert max(watched) <= 2, "and never a third"
    assert not (tmp_path / "run" / "incoming").exists()


def on_disk(run: Path) -> int:
    """Folders of revisions in the run's place for downloads."""
    return len(list(run.glob("incoming/step*")))


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[list[int]]:
    """What `on_disk` gives, seen by a thread all the time."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(on_disk(tmp_path / "run"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield seen
    done.set()
    watcher.join()


def test_kept_revisions_are_a_source_of_their_own(
    full_hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    ask = ("--probe-ids", tmp_path / "ids.npy", "--json")
    run = tmp_path / "run"
    assert cli(capsys, "replay", REPO, "--revisions", "step0,step36", "--keep", "--out", run, *ask)[0] == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step0", "step36"]

    full_hub.requests.clear()
    assert cli(capsys, "replay", run / "checkpoints", "--out", tmp_path / "again", *ask)[0] == 0

    assert full_hub.requests == []
    again = contents(tmp_path / "again")
    again["run.json"] = again["run.json"].replace(b'"name": "gpt_neox"', f'"name": "{REPO}"'.encode())  # not in files
    assert again == contents(run)


def test_a_dry_run_tells_sizes_and_downloads_nothing(
    full_hub: LoopbackHub, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    size = (trained / "step0" / "model.safetensors").stat().st_size
    full_hub.repos[REPO]["step1"] = {"config.json": b"{}"}
    run = tmp_path / "run"

    code, document, said = cli(capsys, "replay", REPO, "--dry-run", "--out", run, "--json")

    assert (code, document["held"], document["seconds"]) == (3, [], None)
    assert [row["step"] for row in document["pending"]] == list(STEPS)
    assert [row["bytes"] for row in document["pending"]] == [size, None, *[size] * 10]
    assert said == ["ma-monitor: step1: lab/tiny holds no configuration, weights or tokenizer to use"]
    assert not [request for request in full_hub.requests if "/resolve/" in request]
    assert not run.exists()

    replay(hub_source(REPO, "step0,step2,step4,step8"), Probe.from_ids(IDS), None, run)
    _, document, _ = cli(
        capsys, "replay", REPO, "--revisions", "step0,step2,step24", "--dry-run", "--out", run, "--json"
    )
    (told,) = [event.message for event in Run.open(run).events if event.kind == "replayed"]
    seconds = told.split()[0]
    assert told.endswith("(4)")
    assert ([row["step"] for row in document["pending"]], document["held"]) == ([24], [0, 2, 4, 8])
    assert document["seconds"] == pytest.approx(float(seconds))
    with Run.open(run, writable=True) as held:
        for unknown in ("2 hours", "", "3 checkpoints at 1.5 seconds a checkpoint (4)"):
            held.event("replayed", unknown)
    _, document, _ = cli(capsys, "replay", REPO, "--revisions", "step24", "--dry-run", "--out", run, "--json")
    assert document["seconds"] == pytest.approx(float(seconds)), "what another version noted counts for nothing"
    assert main(["replay", REPO, "--revisions", "step24", "--dry-run", "--out", str(run)]) == 0
    assert f"1 checkpoint to measure, {size / 1e9:.3g} GB, ~" in capsys.readouterr().out
