"""What the tests of replay share: a Hub on the loopback interface."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.measure.probe import Probe
from tests.replay.loopback import LoopbackHub, serving
from tests.replay.makers import STEPS, save_model


@pytest.fixture
def hub_server() -> Iterator[LoopbackHub]:
    """A running server that no client has been told of yet."""
    with serving(LoopbackHub()) as hub:
        yield hub


@pytest.fixture
def hub(hub_server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A running server that the real client in this process talks to."""
    from huggingface_hub import close_session, constants

    from ma_monitor.replay import asking

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the server is on this machine
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    template = hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
    yield hub_server
    close_session()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints; not to be changed."""
    root = tmp_path_factory.mktemp("saved")
    for step in STEPS:
        save_model(root / f"checkpoint-{step}", seed=step)
    return root


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoints to be changed at will."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe.from_ids(np.random.default_rng(7).integers(0, 50, size=(3, 12)))
