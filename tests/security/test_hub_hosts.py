"""A Hub that leads elsewhere, or whose answers do not end: the real client, and real servers on two ports."""

from __future__ import annotations

import hashlib
import json
import resource
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ma_monitor.errors import SourceError
from ma_monitor.replay import bounds
from ma_monitor.replay.hub import hub_source
from ma_monitor.replay.sources import Checkpoint

REPO, TOKEN = "lab/tiny", "hf_" + "plantedtoken" * 3
COMMIT = "c" * 40
BRANCH = {"name": "step10", "ref": "refs/heads/step10", "targetCommit": COMMIT}
REFS = {"branches": [BRANCH], "converts": [], "tags": []}
WEIGHTS = b"safe" * 1000
Answer = Callable[["Handler"], None]
Start = Callable[[Answer], "Host"]


class Handler(BaseHTTPRequestHandler):
    """Answers as the test says, and writes down what came."""

    protocol_version = "HTTP/1.1"
    server: Host

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Authorization"]))
        self.close_connection = True
        try:
            self.server.answer(self)
        except (BrokenPipeError, ConnectionResetError):  # the client has had enough
            self.server.cut += 1

    do_HEAD = do_GET  # noqa: N815

    def say(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def say_for_ever(self, status: int = 200, **headers: str) -> None:
        """Chunk after chunk until the client goes; after a gigabyte the test has failed."""
        self.send_response(status)
        for key, value in {"Transfer-Encoding": "chunked", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        block = b" " * 2**20
        for _ in range(2**10):
            self.wfile.write(b"100000\r\n" + block + b"\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the tests' output clean."""


class Host(ThreadingHTTPServer):
    """A server; ``asked`` are the paths and credentials that came, ``cut`` how often a client went."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked, self.cut = answer, list[tuple[str, str | None]](), 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def host() -> Iterator[Start]:
    """Starts servers."""
    started: list[tuple[Host, threading.Thread]] = []

    def start(answer: Answer) -> Host:
        server = Host(answer)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(host: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a server that the client in this process, which has a token, takes for the Hub."""
    from huggingface_hub import close_session, constants

    from ma_monitor.replay import asking

    def start(answer: Answer) -> Host:
        server = host(answer)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return server

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
    yield start
    close_session()


def listing(*files: tuple[str, bytes]) -> dict[str, object]:
    siblings = [{"rfilename": name, "size": len(content)} for name, content in files]
    return {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": []}


def in_order(
    *files: tuple[str, bytes], instead: dict[str, Callable[[Handler], None]] | None = None
) -> Callable[[Handler], None]:
    """A Hub with one revision of these files; ``instead`` answers paths that end so."""

    def answer(asked: Handler) -> None:
        path = asked.path.partition("?")[0]
        for end, other in (instead or {}).items():
            if path.endswith(end):
                return other(asked)
        content = dict(files).get(path.rpartition("/")[2])
        if path.endswith("/refs"):
            asked.say(json.dumps(REFS).encode())
        elif "/tree/" in path:
            tree = [{"type": "file", "oid": "0" * 40, "size": len(body), "path": name} for name, body in files]
            asked.say(json.dumps(tree).encode())
        elif "/resolve/" in path and content is not None:
            asked.say(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        elif "/revision/" in path or path.endswith("/auth-check"):
            asked.say(json.dumps(listing(*files)).encode())
        else:
            asked.say(b"{}", 404)

    return answer


STEP = Checkpoint(10, "step10")
SAFE = (("config.json", b"{}"), ("model.safetensors", WEIGHTS))


def test_a_download_that_leads_to_another_host_takes_no_token_there(hub: Start, host: Start, tmp_path: Path) -> None:
    elsewhere = host(lambda asked: asked.say(WEIGHTS))

    def away(asked: Handler) -> None:
        digest = hashlib.sha256(WEIGHTS).hexdigest()
        facts = {
            "ETag": '"x"',
            "X_Linked_ETag": f'"{digest}"',
            "X_Linked_Size": str(len(WEIGHTS)),
            "X_Repo_Commit": COMMIT,
        }
        asked.say(b"", 302, Location=f"{elsewhere.url}/blob", **facts)

    server = hub(in_order(*SAFE, instead={"model.safetensors": away}))
    folder = hub_source(REPO, "all").fetch(STEP, tmp_path / "scratch")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    with_token = {path for path, credentials in server.asked if credentials == f"Bearer {TOKEN}"}
    assert any(path.endswith("model.safetensors") for path in with_token), "or this test shows nothing"
    assert [credentials for _, credentials in elsewhere.asked] == [None] * len(elsewhere.asked)
    assert elsewhere.asked


@pytest.mark.parametrize("path", ["/refs", "/auth-check", "/revision/step10", "/tree/" + COMMIT])
def test_an_api_that_leads_to_another_host_is_not_followed(hub: Start, host: Start, tmp_path: Path, path: str) -> None:
    elsewhere = host(lambda asked: asked.say(json.dumps(REFS).encode()))
    hub(in_order(*SAFE, instead={path: lambda asked: asked.say(b"", 302, Location=f"{elsewhere.url}/api{asked.path}")}))
    with pytest.raises(SourceError, match=r"sends us to another host, 127\.0\.0\.1, where nothing is asked"):
        hub_source(REPO, "all").fetch(STEP, tmp_path / "scratch")
    assert elsewhere.asked == []


def test_redirects_in_a_circle_end(hub: Start) -> None:
    server = hub(lambda asked: asked.say(b"", 302, Location=asked.path))
    with pytest.raises(SourceError, match="TooManyRedirects"):
        hub_source(REPO, "all")
    assert len(server.asked) < 200


@pytest.mark.parametrize("status", [200, 302, 404, 500])
def test_an_endless_answer_is_not_read_into_memory(hub: Start, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(bounds, "ANSWER_LIMIT", 2**22)
    server = hub(lambda asked: asked.say_for_ever(status, Location="/api/next"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SourceError, match="answer has more than 4194304 bytes and may never end"):
        hub_source(REPO, "all")
    assert len(server.asked) == 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**17, "128 MiB: the client's own buffers and copies of four"


def test_an_endless_file_is_ended_soon_after_what_is_listed(hub: Start, tmp_path: Path) -> None:
    def endless(asked: Handler) -> None:
        facts: dict[str, Any] = {"ETag": '"x"', "X_Linked_Size": str(len(WEIGHTS)), "X_Repo_Commit": COMMIT}
        if asked.command == "HEAD":
            asked.say(b"", **facts)
        else:
            asked.say_for_ever(**facts)

    server = hub(in_order(*SAFE, instead={"model.safetensors": endless}))
    with pytest.raises(SourceError, match="the Hub sends more than the 4002 bytes that it lists"):
        hub_source(REPO, "all").fetch(STEP, tmp_path / "scratch")
    assert [path.endswith("model.safetensors") for path, _ in server.asked].count(True) <= 2, "asked once, and its head"
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size < 2**26, "the client hands over its blocks of 10 MiB one by one"


@pytest.mark.parametrize("name", ["tokenizer*", "vocab.[!x]*", "tokenizer??????*"])
def test_a_name_that_is_a_pattern_brings_no_other_file(hub: Start, tmp_path: Path, name: str) -> None:
    """The client takes names for patterns whose stars cross folders."""
    planted = "vocab.d/planted" if name.startswith("vocab") else "tokenizer/planted"
    server = hub(in_order(("config.json", b"{}"), ("tokenizer.json", b"{}"), (name, b"x"), (planted, b"x")))
    with pytest.raises(SourceError, match=r"cannot be read from the Hub|came with another size"):
        hub_source(REPO, "all").fetch(STEP, tmp_path / "a" / "b" / "scratch", "tokenizer")
    assert not any("planted" in path for path, _ in server.asked if "/resolve/" in path)
    assert not list(tmp_path.rglob("planted"))


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "a/../../model.safetensors"])
def test_names_that_lead_out_of_the_folder_are_nobodys_weights(hub: Start, tmp_path: Path, name: str) -> None:
    hub(in_order(("config.json", b"{}"), (name, WEIGHTS)))
    with pytest.raises(SourceError, match="holds no configuration, weights or tokenizer"):
        hub_source(REPO, "all").fetch(STEP, tmp_path / "a" / "scratch")
    assert not list(tmp_path.rglob("model.safetensors"))


def test_a_password_in_the_hubs_address_is_not_told(hub: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = hub(lambda asked: asked.say(b"{}", 418))
    with_password = server.url.replace("://", "://user:planted-password@")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", with_password)
    with pytest.raises(SourceError, match="cannot be read from the Hub") as refused:
        hub_source(REPO, "all")
    assert server.asked
    assert "planted-password" not in str(refused.value)
