"""Tokens, keys and passwords are in nothing that is written or printed."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

from ma_monitor.errors import redacted
from ma_monitor.runs.events import add_event

SECRETS = {
    "HF_TOKEN": "hf_PlantedTokenOfTheHubAbcdefghijklmno",
    "HUGGING_FACE_HUB_TOKEN": "hf_PlantedOlderTokenAbcdefghijklmnopq",
    "WANDB_API_KEY": "5ec2e7" + "0123456789abcdef" * 2 + "ff",
    "AWS_SECRET_ACCESS_KEY": "wJalrPlantedKey/K7MDENG/bPxRfiCYzz",
    "AWS_SESSION_TOKEN": "PlantedSessionTokenFwoGZXIvYXdzEBYaD",
    "OPENAI_API_KEY": "sk-planted-1234567890abcdefghijkl",
    "SOURCE_PASSWORD": "planted-password-of-a-source",
    "ENDPOINT_PASSWORD": "planted-password-of-the-hub",
}
KEPT_BY_THE_TRAINER = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def searched(content: bytes) -> list[bytes]:
    """Content as it is, and whatever of it is packed by zlib."""
    found, at = [content], 0
    while (at := content.find(b"\x78", at)) >= 0:
        if content[at + 1 : at + 2] in (b"\x01", b"\x5e", b"\x9c", b"\xda"):
            try:
                found.append(zlib.decompressobj().decompress(content[at:], 2**24))
            except zlib.error:
                pass
        at += 1
    return found


def spellings(secret: str) -> list[bytes]:
    """As text, as UTF-16, and as any of the three ways in which base64 may hold it."""
    raw = secret.encode()
    shifted = [base64.b64encode(b"x" * shift + raw)[4 if shift else 0 : -4] for shift in range(3)]
    return [raw, secret.encode("utf-16-le"), *shifted]


def told(root: Path, secrets: dict[str, str]) -> list[str]:
    """Which secret is in which file or in a file's name."""
    leaks = []
    for file in (path for path in root.rglob("*") if path.is_file()):
        contents = searched(file.read_bytes())
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        for name, secret in secrets.items():
            if any(way in content for way in spellings(secret) for content in (*contents, str(file).encode())):
                leaks.append(f"{name} in {file.relative_to(root)}")
    return leaks


@pytest.mark.slow
def test_a_session_with_secrets_tells_none_of_them(tmp_path: Path) -> None:
    root = tmp_path / "session"
    root.mkdir()
    folders = {name: str(root / name.lower()) for name in ("HOME", "HF_HOME", "WANDB_DIR", "TMPDIR", "XDG_CONFIG_HOME")}
    for folder in folders.values():
        Path(folder).mkdir()
    settings = {
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://user:{SECRETS['ENDPOINT_PASSWORD']}@127.0.0.1:9",  # the discard port: nobody listens
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    environment = {**os.environ, **folders, **settings, **SECRETS}
    command = [sys.executable, "-m", "tests.security.secret_session", str(root)]
    with (root / "stdout").open("wb") as out, (root / "stderr").open("wb") as err:
        done = subprocess.run(command, env=environment, stdout=out, stderr=err, check=False)
    printed = (root / "stderr").read_text()
    assert done.returncode == 0, printed[-2000:]
    for made in ("out/ma_monitor/run.json", "out/checkpoint-6/ma_monitor/run.json", "replayed/run.json", "report.html"):
        assert (root / made).is_file(), "or this test looks at nothing"
    assert list(root.rglob("*.wandb"))
    assert list((root / "tensorboard").rglob("events.out.tfevents.*"))
    assert printed.count("https://…@host") >= 2, "passwords were there to be told"
    assert "lab/tiny cannot be read from the Hub" in printed
    assert told(root, SECRETS) == []


def test_the_search_finds_what_is_hidden(tmp_path: Path) -> None:
    secret = SECRETS["AWS_SECRET_ACCESS_KEY"]
    hidden = {
        "plain": secret.encode(),
        "wide": secret.encode("utf-16-le"),
        "packed": b"head" + zlib.compress(b"..." + secret.encode()),
        **{f"base64 {shift}": base64.b64encode(b"y" * shift + secret.encode() + b"tail") for shift in range(4)},
    }
    for name, content in hidden.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "harmless").write_bytes(b"nothing")
    assert sorted(told(tmp_path, {"KEY": secret})) == sorted(f"KEY in {name}" for name in hidden)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pa:ss@w@host/x", "https://…@host/x"),
        ("get 'http://u:p@h:90/api?token=1&a=2' failed", "get 'http://…@h:90/api?…' failed"),
        ("https://cdn/x?X-Amz-Signature=abc and on", "https://cdn/x?… and on"),
        ("https:/user:secret@host/x: no such folder", "https:/…@host/x: no such folder"),
        ("login hf_abcdefghijklmnop failed", "login hf_… failed"),
        ("http://host/a@b is it? yes & no, a@b.c", "http://host/a@b is it? yes & no, a@b.c"),
        ("https://host/path without secrets", "https://host/path without secrets"),
    ],
)
def test_what_a_url_holds_of_secrets_is_left_out(text: str, shown: str, tmp_path: Path) -> None:
    assert redacted(text) == shown
    add_event(tmp_path / "events.jsonl", "fault", text)
    assert "pa:ss" not in (tmp_path / "events.jsonl").read_text()
