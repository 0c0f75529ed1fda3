"""What the tests of replay share: a Hub on the loopback interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.replay.loopback import LoopbackHub, serving


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
