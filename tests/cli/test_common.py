"""What all commands print with."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_monitor.cli.common import emit_json, note, say, table, user_file
from ma_monitor.errors import ConfigError
from ma_monitor.report.words import band, count, number, printable


@given(st.text())
def test_printable_cannot_steer_a_terminal(text: str) -> None:
    shown = printable(text)
    assert all(character.isprintable() for character in shown)
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\u202e\u2066\u200b\u2028", "\\u202e\\u2066\\u200b\\u2028"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("bad \udc80 byte", "bad \\udc80 byte"),
        ("modèle 模型", "modèle 模型"),
        (7, "7"),
    ],
)
def test_printable(text: object, shown: str) -> None:
    assert printable(text) == shown


def test_say_copes_with_a_narrow_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("modèle\n\x1b[1m")
    sys.stdout.flush()
    assert raw.getvalue() == b"mod\\xe8le\n\\x1b[1m\n"


def test_note_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    note("several\nlines,\n  tabs\t and \x1b[2J")
    assert capsys.readouterr() == ("", "several lines, tabs and \\x1b[2J\n")


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        emit_json({"value": float("nan")})
    assert capsys.readouterr().out == ""
    emit_json({"path": "\udc80 ü", "none": None})
    assert json.loads(capsys.readouterr().out) == {"path": "\udc80 ü", "none": None}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0, "0"),
        (12345, "12,345"),
        (0.0, "0"),
        (1.23456, "1.235"),
        (-12345.678, "-12,346"),
        (3.2e-7, "3.2e-07"),
        (-5.639e115, "-5.639e+115"),
    ],
)
def test_number(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_band() -> None:
    assert band(None, 1.0, 2.0) == "-"
    assert band(12.3456, 1.0, 1234.5) == "12.3 [1, 1,234]"
    assert band(1234, None, 20000) == "1,234 [?, 20,000]"


def test_count() -> None:
    assert [count(n, "step") for n in (0, 1, 2, 1234)] == ["0 steps", "1 step", "2 steps", "1,234 steps"]


def test_table() -> None:
    lines = table(("a", "name", "value"), [("1", "x", "10.5"), ("22", "long\x1b", "3")], left=2).split("\n")
    assert lines == ["a   name      value", "1   x          10.5", "22  long\\x1b      3"]
    assert table(("a", "b"), []) == "a  b"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("odd"), EOFError("odd")])
def test_user_file(error: Exception) -> None:
    def read() -> None:
        with user_file("a.txt", "it must rhyme") as path:
            assert path == Path("a.txt")
            raise error

    with pytest.raises(ConfigError, match=r"a\.txt: it must rhyme, .* cannot be read so \((odd|Input/output error)\)"):
        read()
