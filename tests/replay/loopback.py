"""A Hub on the loopback interface, with the routes that the real client asks for, faults to order and a slow line."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]

API = re.compile(
    r"/api/(models|datasets)/(?P<repo>[^/]+/[^/]+)(/(?P<what>refs|revision|tree|auth-check)(/(?P<revision>[^/]+))?)?"
)
FILE = re.compile(r"(/datasets)?/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
LARGE = (".safetensors", ".bin")
"""Files that the Hub keeps as large ones, of which it lists the SHA-256."""
BLOCK = 2**14
"""Bytes that are sent at once."""


@dataclass
class Answer:
    """What the server sends back."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def _json(value: Any) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _error(status: int, code: str) -> Answer:
    return Answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})


@functools.cache
def _digest(kind: str, content: bytes) -> str:
    return hashlib.new(kind, content).hexdigest()


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    large = {"lfs": {"size": len(content), "sha256": _digest("sha256", content), "pointerSize": 134}}
    return {"rfilename": name, "size": len(content)} | (large if name.endswith(LARGE) else {})


@dataclass
class LoopbackHub:
    """Models and data sets as ``repo → revision → file → content``.

    ``gated`` names repositories whose files want a login. ``faults`` maps a pattern of the path to the statuses that
    the next requests for it get; status 0 stands for a connection that breaks in the middle of the body. ``corrupt``
    are repo, revision and file of what is sent with its last byte changed. ``rate`` is bytes a second of each
    connection, None without limit.
    """

    repos: dict[str, dict[str, Files]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    corrupt: set[tuple[str, str, str]] = field(default_factory=set)
    rate: float | None = None
    faults: dict[str, list[int]] = field(default_factory=dict)
    retry_after: str = "0"
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def put(self, repo: str, revision: str, folder: Path) -> None:
        """Offers the files of a folder as a revision."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repos.setdefault(repo, {})[revision] = files

    def sha(self, repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo} {revision}".encode()).hexdigest()

    def fault(self, path: str) -> int | None:
        """The status ordered for this request, None for none."""
        return next((waiting.pop(0) for at, waiting in self.faults.items() if waiting and re.search(at, path)), None)

    def answer(self, path: str, query: str, span: str | None) -> Answer:
        """The answer to a request for a path, ``span`` being its Range header."""
        if path == "/api/models":
            asked_for = parse_qs(query)
            owner, part = (asked_for.get(key, [""])[0] for key in ("author", "search"))
            found = [repo for repo in self.repos if owner in ("", repo.partition("/")[0]) and part in repo]
            return _json([{"id": repo, "modelId": repo} for repo in found])
        match = API.fullmatch(path) or FILE.fullmatch(path)
        if match is None or match["repo"] not in self.repos:
            return _error(404, "RepoNotFound")
        repo, asked = match["repo"], unquote(match.groupdict()["revision"] or "main")
        what = match.groupdict().get("what")
        if what == "refs":
            return self._refs(repo)
        if what == "auth-check":
            return _error(403, "GatedRepo") if repo in self.gated else _json({})
        revision = next((name for name in self.repos[repo] if asked in (name, self.sha(repo, name))), None)
        if revision is None:
            return _error(404, "RevisionNotFound")
        if "file" in match.groupdict():
            return self._file(repo, revision, unquote(match["file"]), span)
        return self._listing(repo, revision, tree=what == "tree")

    def _refs(self, repo: str) -> Answer:
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": self.sha(repo, n)} for n in self.repos[repo]]
        return _json({"branches": branches, "converts": [], "tags": []})

    def _listing(self, repo: str, revision: str, *, tree: bool) -> Answer:
        files = self.repos[repo][revision]
        if tree:
            oid = {name: _digest("sha1", content) for name, content in files.items()}
            return _json([{"type": "file", "oid": oid[n], "size": len(c), "path": n} for n, c in files.items()])
        siblings = [_sibling(name, content) for name, content in files.items()]
        return _json({"id": repo, "modelId": repo, "sha": self.sha(repo, revision), "siblings": siblings, "tags": []})

    def _file(self, repo: str, revision: str, name: str, span: str | None) -> Answer:
        if repo in self.gated:
            return _error(401, "GatedRepo")
        content = self.repos[repo][revision].get(name)
        if content is None:
            return _error(404, "EntryNotFound")
        headers = {"ETag": f'"{_digest("sha256", content)}"', "X-Repo-Commit": self.sha(repo, revision)}
        if (repo, revision, name) in self.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 255])
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", span or "")
        if part is None:
            return Answer(200, content, headers)
        start, stop = int(part[1]), int(part[2]) + 1 if part[2] else len(content)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return Answer(206, content[start:stop], headers)


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path, query = urlsplit(self.path).path, urlsplit(self.path).query
            hub.requests.append(f"{self.command} {path}")
            status = hub.fault(path) if self.command == "GET" else None
            answer = (
                Answer(status, b"busy", {"Retry-After": hub.retry_after})
                if status
                else hub.answer(path, query, self.headers["Range"])
            )
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command == "GET":
                self._send(answer.body[: len(answer.body) // 2] if status == 0 else answer.body)
            self.close_connection = status == 0

        def _send(self, body: bytes) -> None:
            for start in range(0, len(body), BLOCK):
                self.wfile.write(body[start : start + BLOCK])
                if hub.rate is not None:
                    time.sleep(len(body[start : start + BLOCK]) / hub.rate)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the tests' output clean."""

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of connections that a killed client breaks."""


@contextmanager
def serving(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """Runs the server while open."""
    server = _Server(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
