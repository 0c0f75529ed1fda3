"""``ma-monitor workspace`` and ``--completion``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ma_monitor.cli.completion import SHELLS
from ma_monitor.cli.log import emissions
from ma_monitor.runs.store import Run
from tests.cli.conftest import STEPS, Call, make_run

pytestmark = pytest.mark.filterwarnings("ignore:.*[Pp]ydantic:DeprecationWarning")  # of wandb-workspaces' own
ARGS = ("workspace", "--entity", "team", "--project", "pre training")


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to write into, and no W&B login."""
    import wandb

    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()
    yield
    wandb.teardown()


def panels(file: Path) -> list[dict[str, Any]]:
    """The panels of the only section of a workspace that was written."""
    view = json.loads(file.read_text())
    assert (view["entity"], view["project"]) == ("team", "pre training")
    (section,) = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert section["name"] == view["displayName"] == "Massive activations"
    assert section["isOpen"]
    return list(section["panels"])


def test_panels_show_what_is_logged(call: Call, tmp_path: Path) -> None:
    """Every key of a panel is one that a run gives, and every picture, table and layer has a panel."""
    document = call(*ARGS, "--out", "w.json", "--json").document
    assert document == {"url": None, "file": "w.json"}
    shown = panels(tmp_path / "w.json")
    everything = [e for e in emissions(Run.open(make_run(tmp_path / "run", steps=STEPS[:8])))]
    scalars = {key for e in everything for key in e.scalars}
    lines = {key for panel in shown for key in panel["config"].get("metrics", [])}
    assert lines <= scalars | {"ma/forecast/max_end", "ma/forecast/max_end_low", "ma/forecast/max_end_high"}
    assert {"ma/max_ratio", "ma/layers_past_100", "ma/layers_past_1000"} <= lines
    assert all(p["config"]["xAxis"] == "train/global_step" for p in shown if p["viewType"] == "Run History Line Plot")
    (pattern,) = (panel["config"]["metricRegex"] for panel in shown if "metricRegex" in panel["config"])
    assert [key for key in sorted(scalars) if re.fullmatch(pattern, key)] == [f"ma/ratio/layer_0{i}" for i in (1, 2, 3)]
    media = {key for panel in shown for key in panel["config"].get("mediaKeys", [])}
    assert media == {key for e in everything for key in e.images}
    (table,) = {key for e in everything for key in e.tables}
    assert table in json.dumps([panel for panel in shown if panel["viewType"] == "Weave"])


def test_without_a_server_it_is_written(call: Call, tmp_path: Path) -> None:
    result = call(*ARGS)
    assert result.code == 0
    assert "workspace written to ma_monitor_workspace.json" in result.out
    assert "W&B did not take the workspace (No API key configured" in result.err
    assert len(panels(tmp_path / "ma_monitor_workspace.json")) > 5


def test_with_a_server_it_is_saved(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb_workspaces.workspaces import Workspace

    saved = []
    monkeypatch.setattr(Workspace, "save", lambda self: saved.append(self.name))
    monkeypatch.setattr(Workspace, "url", property(lambda self: f"https://wandb.example/{self.entity}"))
    assert call(*ARGS, "--json").document == {"url": "https://wandb.example/team", "file": None}
    assert "workspace saved: https://wandb.example/team" in call(*ARGS).out
    assert saved == ["Massive activations"] * 2
    assert not list(tmp_path.glob("*.json"))


def test_what_cannot_be_done(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be written (No such file or directory); give another --out" in refused(*ARGS, "--out", "no/w.json")
    assert "required: --entity" in refused("workspace", "--project", "p")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert "wandb-workspaces is not installed; run: pip install 'ma_monitor[workspace]'" in refused(*ARGS)


def test_help_has_an_example(call: Call) -> None:
    assert "example:\n  ma-monitor workspace --entity" in call("workspace", "--help").out


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_options(shell: str, call: Call) -> None:
    result = call("--completion", shell)
    assert result.code == 0
    for word in ("watch", "forecast", "tensorboard", "--project" if shell != "tcsh" else "project"):
        assert word in result.out


def test_bash_completes(call: Call, tmp_path: Path) -> None:
    (tmp_path / "completion.bash").write_text(call("--completion", "bash").out)
    (tmp_path / "my-run").mkdir()
    (tmp_path / "my-file").touch()

    def completed(*words: str) -> list[str]:
        asked = " ".join(words)
        script = (
            f"source completion.bash; COMP_WORDS=(ma-monitor {asked}); COMP_CWORD={len(words)}; "
            '_shtab_ma_monitor; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "--norc", "-c", script], capture_output=True, text=True, check=True, env=dict(os.environ)
        )
        return done.stdout.split()

    assert completed("wat") == ["watch"]
    assert completed("log", "x", "--t") == ["--to"]
    assert completed("watch", "my-") == ["my-run"]


def test_completion_without_its_package(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "shtab is not installed; run: pip install 'ma_monitor[completion]'" in refused("--completion", "bash")
