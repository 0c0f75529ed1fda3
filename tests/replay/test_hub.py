"""The real Hub client against a server on the loopback interface."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from ma_monitor.errors import SourceError
from ma_monitor.replay.hub import PAPER_REVISIONS, hub_source
from ma_monitor.replay.sources import Checkpoint, Source, open_source
from tests.replay.loopback import LoopbackHub

REPO = "lab/tiny"
SAFE = {"config.json": b"{}", "model.safetensors": b"safe" * 1000}


def only(revision: str) -> Checkpoint:
    return Checkpoint(int(revision.removeprefix("step")), revision)


def contents(folder: Path) -> dict[str, bytes]:
    """What a folder holds, the client's own records aside."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def downloaded(source: Source, scratch: Path, revision: str) -> dict[str, bytes]:
    """What comes of a revision."""
    return contents(source.fetch(only(revision), scratch))


def test_all_means_every_step_branch_in_order(hub: LoopbackHub) -> None:
    hub.repos[REPO] = {name: SAFE for name in ("main", "step1000", "step16", "step2", "dev", "stepx")}

    source = open_source(REPO, "all")

    assert source.checkpoints == (only("step2"), only("step16"), only("step1000"))
    assert source.problems == ()
    assert source.name == REPO


def test_a_model_without_step_branches_is_refused(hub: LoopbackHub) -> None:
    hub.repos[REPO] = {"main": SAFE}
    with pytest.raises(SourceError, match="lab/tiny has none of 'all' among main"):
        hub_source(REPO, "all")


def test_paper_takes_what_the_model_has_of_pythias_revisions(hub: LoopbackHub) -> None:
    assert len(PAPER_REVISIONS) == 37
    assert {"step0", "step1", "step512", "step1000", "step143000"} <= set(PAPER_REVISIONS)
    hub.repos[REPO] = {name: SAFE for name in ("main", "step0", "step1", "step3000", "step143000")}

    source = hub_source(REPO, "paper")

    assert source.checkpoints == (only("step0"), only("step1"), only("step143000"))
    assert len(source.problems) == 34


def test_a_missing_revision_is_named_with_the_nearest_and_the_rest_kept(hub: LoopbackHub) -> None:
    hub.repos[REPO] = {name: SAFE for name in ("main", "step1000", "step2000")}

    source = hub_source(REPO, "step1000, step200, main")

    assert source.checkpoints == (only("step1000"),)
    missing, unnumbered = source.problems
    assert missing.startswith("step200 left out: no such revision (nearest: step2000")
    assert unnumbered == "main left out: its name does not tell a step, as step1000 does"


def test_only_missing_revisions_are_refused(hub: LoopbackHub) -> None:
    hub.repos[REPO] = {name: SAFE for name in ("main", "step1000")}
    with pytest.raises(SourceError, match=r"lab/tiny has none of 'step100' .* \(nearest: step1000\)"):
        hub_source(REPO, "step100")
    with pytest.raises(SourceError, match="none of ',' among main"):
        hub_source(REPO, ",")


def test_a_revision_gone_since_the_listing_is_explained(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.repos[REPO] = {"step10": SAFE, "step20": SAFE}
    source = hub_source(REPO, "all")
    del hub.repos[REPO]["step20"]
    with pytest.raises(SourceError, match="no revision step20"):
        source.fetch(only("step20"), tmp_path)


def test_only_what_is_needed_is_downloaded(hub: LoopbackHub, tmp_path: Path) -> None:
    record = {"trainer_state.json": b"{}", "ma_monitor/run.json": b"{}"}
    other = {"pytorch_model.bin": b"x", "optimizer.pt": b"x", "tokenizer.json": b"{}", "sub/model.safetensors": b"x"}
    hub.repos[REPO] = {"step10": SAFE | record | other, "step5": SAFE}
    scratch = tmp_path / "scratch"
    source = hub_source(REPO, "all")

    assert downloaded(source, scratch, "step10") == SAFE
    record_of = source.fetch(only("step10"), tmp_path / "record", "record")
    assert contents(record_of) == {"config.json": b"{}"} | record


def test_pickled_weights_are_taken_only_where_there_are_no_others(hub: LoopbackHub, tmp_path: Path) -> None:
    shards = {"pytorch_model.bin.index.json": b"{}", "pytorch_model-00001-of-00001.bin": b"x"}
    hub.repos[REPO] = {"step10": {"config.json": b"{}", "README.md": b"x"} | shards}

    assert downloaded(hub_source(REPO, "all"), tmp_path, "step10") == {"config.json": b"{}"} | shards


@pytest.mark.parametrize("files", [{"config.json": b"{}"}, {"model.safetensors": b"x"}])
def test_a_revision_without_weights_or_configuration_is_refused(
    hub: LoopbackHub, tmp_path: Path, files: dict[str, bytes]
) -> None:
    hub.repos[REPO] = {"step10": files}
    with pytest.raises(SourceError, match="lab/tiny holds no configuration, weights or tokenizer to use"):
        hub_source(REPO, "all").fetch(only("step10"), tmp_path)


def test_a_tokenizer_comes_without_weights(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.repos[REPO] = {"step20": SAFE | {"tokenizer.json": b"20"}}
    folder = hub_source(REPO, "all").fetch(only("step20"), tmp_path, "tokenizer")
    assert contents(folder) == {"config.json": b"{}", "tokenizer.json": b"20"}


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_for_the_revisions_again(hub: LoopbackHub, status: int) -> None:
    hub.repos[REPO] = {"step10": SAFE}
    hub.faults = {"/refs$": [status, status]}

    assert hub_source(REPO, "all").checkpoints == (only("step10"),)

    assert hub.requests.count(f"GET /api/models/{REPO}/refs") == 3


def test_a_server_that_stays_busy_is_given_up_with_a_reason(hub: LoopbackHub) -> None:
    hub.repos[REPO] = {"step10": SAFE}
    hub.faults = {"/refs$": [503] * 50}
    with pytest.raises(SourceError, match=r"lab/tiny cannot be read from the Hub .*503.* run the same command again"):
        hub_source(REPO, "all")
    assert hub.requests.count(f"GET /api/models/{REPO}/refs") == 5


@pytest.mark.parametrize(("asked", "waits"), [("7", [7, 7]), ("86400", [60, 60]), ("tomorrow", [0.01, 0.02])])
def test_a_server_says_how_long_to_wait_within_reason(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, asked: str, waits: list[float]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("ma_monitor.replay.asking.time.sleep", slept.append)
    hub.repos[REPO] = {"step10": SAFE}
    hub.faults, hub.retry_after = {"/refs$": [429, 503]}, asked

    hub_source(REPO, "all")

    assert slept == waits


@pytest.mark.parametrize(("ahead", "expected"), [(30, 30), (86400, 60), (-86400, 0)])
def test_a_server_says_until_when_to_wait_within_reason(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, ahead: float, expected: float
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("ma_monitor.replay.asking.time.sleep", slept.append)
    hub.repos[REPO] = {"step10": SAFE}
    hub.faults, hub.retry_after = {"/refs$": [429]}, formatdate(time.time() + ahead, usegmt=True)

    hub_source(REPO, "all")

    assert slept == [pytest.approx(expected, abs=5)]  # a date is whole seconds, and the server takes its time


def test_a_full_disk_is_named(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO] = {"step10": SAFE}
    source = hub_source(REPO, "all")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(SourceError, match="No space left on device.*check network and disk"):
        source.fetch(only("step10"), tmp_path)


def test_a_download_that_ends_early_is_not_taken_for_whole(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO] = {"step10": SAFE}
    source = hub_source(REPO, "all")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: None)
    with pytest.raises(SourceError, match=r"config\.json, model\.safetensors came with another size or SHA-256"):
        source.fetch(only("step10"), tmp_path)


@pytest.mark.parametrize(
    "faults",
    [{"/revision/": [503, 429]}, {"/tree/": [503]}, {"model.safetensors": [503]}, {"model.safetensors": [0]}],
    ids=["commit", "listing", "file", "connection broken in the middle of a file"],
)
def test_a_passing_fault_during_a_download_does_no_harm(
    hub: LoopbackHub, tmp_path: Path, faults: dict[str, list[int]]
) -> None:
    hub.repos[REPO] = {"step10": SAFE}
    hub.faults = faults

    assert downloaded(hub_source(REPO, "all"), tmp_path, "step10") == SAFE
    assert all(not waiting for waiting in hub.faults.values())


def test_a_missing_model_is_not_asked_for_twice(hub: LoopbackHub) -> None:
    with pytest.raises(SourceError, match="no folder and no public model 'lab/absent'"):
        open_source("lab/absent")
    assert [request for request in hub.requests if "lab/absent" in request] == ["GET /api/models/lab/absent/refs"]


def test_a_misspelt_model_is_named_with_the_nearest(hub: LoopbackHub) -> None:
    hub.repos = {"lab/tiny": {}, "lab/other": {}, "else/tinny": {}}
    with pytest.raises(SourceError, match=r"no public model 'lab/tinny' \(nearest: tiny\): check the spelling"):
        open_source("lab/tinny")
    for misspelt in ("labb/tiny", "tiny"):
        with pytest.raises(SourceError, match=rf"no public model '{misspelt}' \(nearest: lab/tiny\): check"):
            open_source(misspelt)
    hub.faults = {"/api/models$": [404]}
    with pytest.raises(SourceError, match="no public model 'lab/tinny': check the spelling"):
        open_source("lab/tinny")


def test_a_gated_model_is_called_gated_and_not_missing(hub: LoopbackHub) -> None:
    hub.repos[REPO] = {"step10": SAFE}
    hub.gated.add(REPO)
    with pytest.raises(SourceError, match="lab/tiny is gated: accept its terms"):
        hub_source(REPO, "all")


def test_offline_mode_is_honoured(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        SourceError, match="offline mode is on, and the Hub's cache holds none of its revisions; unset HF_HUB_OFFLINE"
    ):
        hub_source(REPO, "all")
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached_is_said_so(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(SourceError, match=r"cannot be read from the Hub \(ConnectError.*check network and disk"):
        hub_source(REPO, "all")


def test_endpoint_and_offline_mode_come_from_the_environment(hub_server: LoopbackHub, tmp_path: Path) -> None:
    hub_server.repos[REPO] = {"step10": SAFE}
    script = (
        "from pathlib import Path; from ma_monitor.replay.sources import open_source\n"
        f"source = open_source({REPO!r})\n"
        "folder = source.fetch(source.checkpoints[0], Path('scratch'))\n"
        "print((folder / 'config.json').read_text())"
    )
    environment = os.environ | {"HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}

    def run(**extra: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, cwd=tmp_path, env=environment | extra, capture_output=True, text=True)

    online, offline = run(), run(HF_HUB_OFFLINE="1")

    assert online.returncode == 0, online.stderr
    assert online.stdout.strip() == "{}"
    assert "offline mode is on" in offline.stderr
    assert list((tmp_path / "home").rglob("model.safetensors")) == [], "downloads belong into the folder given"


def test_log_takes_the_nearest_to_each_power_of_two(hub: LoopbackHub) -> None:
    steps = (0, 1, 2, 4, 8, *range(10, 100, 10))
    hub.repos[REPO] = {f"step{step}": SAFE for step in steps}
    assert [c.step for c in hub_source(REPO, "log").checkpoints] == [0, 1, 2, 4, 8, 20, 30, 60, 90]
    hub.repos[REPO] = {"step7": SAFE}
    assert [c.step for c in hub_source(REPO, "log").checkpoints] == [7]
    hub.repos[REPO] = {"main": SAFE}
    with pytest.raises(SourceError, match="lab/tiny has none of 'log' among main"):
        hub_source(REPO, "log")


def test_names_of_other_suites_are_understood(hub: LoopbackHub) -> None:
    hub.repos[REPO] = {name: SAFE for name in ("step500-tokens2B", "step1000-tokens4B", "main")}
    assert [c.step for c in hub_source(REPO, "all").checkpoints] == [500, 1000]
    hub.repos[REPO] = {name: SAFE for name in ("stage1-step0-tokens0B", "stage1-step1000-tokens5B", "main")}
    assert [c.name for c in hub_source(REPO, "all").checkpoints] == [
        "stage1-step0-tokens0B",
        "stage1-step1000-tokens5B",
    ]


def test_what_came_corrupt_is_fetched_again_and_not_taken(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.repos[REPO] = {"step10": SAFE}
    hub.corrupt = {(REPO, "step10", "model.safetensors")}
    source = hub_source(REPO, "all")
    with pytest.raises(SourceError, match=r"model\.safetensors came with another size or SHA-256 than the Hub lists"):
        source.fetch(only("step10"), tmp_path)
    assert len([r for r in hub.requests if r.startswith("GET") and r.endswith("model.safetensors")]) == 5
    assert not (tmp_path / "model.safetensors").exists()


def test_sizes_are_those_that_the_hub_lists(hub: LoopbackHub) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": b"x" * (1000 * i) for i in (1, 2)}
    hub.repos[REPO] = {
        "step10": SAFE | {"model.safetensors.index.json": b"{}"},
        "step20": {"config.json": b"{}"} | shards,
    }
    source = hub_source(REPO, "all")
    assert source.size(only("step10")) == len(SAFE["model.safetensors"]) + 2
    assert source.size(only("step20")) == 3000
    hub.repos[REPO]["step20"] = {}
    with pytest.raises(SourceError, match="holds no configuration"):
        source.size(only("step20"))


def test_offline_the_cache_is_the_source(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    half = {"config.json": b"{}"}
    hub.repos[REPO] = {"step10": SAFE, "step20": SAFE, "step30": half, "main": SAFE}
    cache = tmp_path / "hf-cache"
    for revision in ("step10", "step30"):
        snapshot_download(REPO, revision=revision, cache_dir=cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()

    source = hub_source(REPO, "all")

    assert source.checkpoints == (only("step10"),)
    (problem,) = source.problems
    assert problem.startswith("step30 left out: half written")
    assert contents(source.fetch(only("step10"), tmp_path)) == SAFE
    assert source.size(only("step10")) == len(SAFE["model.safetensors"])
    with pytest.raises(SourceError, match=r"step20 left out: no such revision .nearest: step30, step10"):
        hub_source(REPO, "step20")
    with pytest.raises(SourceError, match="lab/tiny holds none; step30 left out: half written"):
        hub_source(REPO, "step30")
    assert hub.requests == []
