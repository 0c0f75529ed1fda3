"""The command line as a whole: help, exit codes, one line for every kind of bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ma_monitor
from ma_monitor.cli.__main__ import COMMANDS, build_parser, main
from ma_monitor.runs.store import Run
from tests.cli.conftest import Call, make_run

NAMES = ("demo", "replay", "import", "fit", "forecast", "export", "log")


def test_help_in_a_process_of_its_own_loads_nothing_heavy() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['ma-monitor', '--help']\n"
        "try:\n"
        "    runpy.run_module('ma_monitor.cli', run_name='__main__')\n"
        "except SystemExit as done:\n"
        "    assert done.code == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'scipy', 'wandb', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"    {name} " in done.stdout for name in NAMES)
    assert done.stderr == ""


def test_module_is_the_program() -> None:
    done = subprocess.run([sys.executable, "-m", "ma_monitor.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ma_monitor {ma_monitor.__version__}\n", "")


@pytest.mark.parametrize("name", NAMES)
def test_each_command_explains_itself(call: Call, name: str) -> None:
    result = call(name, "--help")
    assert result.code == 0
    example = result.out.split("example:\n  ma-monitor ")[1].split()
    assert example[0] == name
    assert build_parser().parse_args(example).run in [command.run for command in COMMANDS]
    assert "--json" in result.out
    assert "None" not in result.out, "a default that means something else is printed as None"
    assert result.err == ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "arguments are required: COMMAND; see ma-monitor --help"),
        (["grow"], "invalid choice: 'grow'"),
        (["fit"], "arguments are required: RUN; see ma-monitor fit --help"),
        (["fit", "r", "--at", "x"], "argument --at: must be a whole number of at least 0, got 'x'"),
        (["fit", "r", "--at", "-1"], "must be a whole number of at least 0, got '-1'"),
        (["fit", "r", "--rank", "0"], "must be a whole number of at least 1, got '0'"),
        (["fit", "r", "--ratio", "mean"], "invalid choice: 'mean'"),
        (["log", "r", "--to", "carrier-pigeon"], "invalid choice: 'carrier-pigeon'"),
        (["log", "r"], "arguments are required: --to"),
        (["replay", "x"], "arguments are required: --out"),
        (["replay", "x", "--out", "y", "--probe-ids", "a", "--probe-text", "b"], "not allowed with argument"),
        (["replay", "x", "--out", "y", "--batch-size", "0"], "must be a whole number of at least 1, got '0'"),
        (["forecast", "r", "--until", "5", "--steps", "f"], "not allowed with argument"),
    ],
)
def test_arguments_that_break_a_rule(refused: Callable[..., str], argv: list[str], words: str) -> None:
    assert words in refused(*argv)


READERS: list[list[Any]] = [
    ["fit", "{}"],
    ["forecast", "{}"],
    ["export", "{}", "--out", "x.csv"],
    ["log", "{}", "--to", "tensorboard"],
]


@pytest.mark.parametrize("argv", READERS, ids=lambda argv: str(argv[0]))
def test_what_is_no_run(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with_words = [(tmp_path / "absent", "not a run"), (tmp_path, "not a run")]
    future = make_run(tmp_path / "future") / "run.json"
    future.write_text(future.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with_words.append((future.parent, "schema version 99"))
    binary = make_run(tmp_path / "binary") / "measurements.bin"
    binary.write_bytes(b"\x7fELF" + bytes(100))
    with_words.append((binary.parent, "measurements.bin"))
    for path, words in with_words:
        assert words in refused(*(word.format(path) for word in argv))
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("argv", READERS, ids=lambda argv: str(argv[0]))
def test_a_run_without_measurements(
    call: Call, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "empty", steps=np.arange(0))
    if argv[0] == "export":
        assert call(*(word.format("empty") for word in argv), "--json").document["rows"] == 0
    else:
        assert "holds no" in refused(*(word.format("empty") for word in argv)).replace("it holds none", "holds no")


def test_terminal_is_not_steered_by_names(call: Call, refused: Callable[..., str], tmp_path: Path) -> None:
    evil = "\x1b[2J\x9b31m\u202egnp.exe"
    path = make_run(tmp_path / "run", name=evil)
    result = call("fit", path)
    assert result.code == 0
    assert "\\x1b[2J\\x9b31m\\u202egnp.exe" in result.out
    assert not set("\x1b\x9b\u202e") & set(result.out + result.err)
    error = refused("fit", tmp_path / "no\x1b[2J\nrun")
    assert "\x1b" not in error
    assert "no\\x1b[2J run" in error


def test_damage_is_told_on_stderr_and_json_stays_whole(call: Call, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    log = path / "measurements.bin"
    whole = log.read_bytes()
    log.write_bytes(whole[:-7])
    result = call("fit", path, "--json")
    assert len(result.document["layers"]) == 3
    assert result.err.startswith("ma-monitor: warning: ")
    assert result.err.count("\n") == 1
    assert log.read_bytes() == whole[:-7], "a reader must change nothing"


def test_a_path_that_the_system_refuses(refused: Callable[..., str]) -> None:
    assert "File name too long" in refused("fit", "x" * 300)


def test_bugs_are_not_hidden(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Run, "open", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["fit", str(run_dir)])

    def pathless(*_: object) -> None:
        raise OSError("no file is to blame")

    monkeypatch.setattr(Run, "open", pathless)
    with pytest.raises(OSError, match="no file is to blame"):
        main(["fit", str(run_dir)])


def test_interruption(call: Call, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "open", interrupted)
    assert call("fit", run_dir) == (130, "", "ma-monitor: interrupted\n")


def test_a_reader_that_has_seen_enough(run_dir: Path) -> None:
    """What ``ma-monitor export … | head -1`` does: the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", "ma_monitor.cli", "fit", str(run_dir), "--json"]
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_export(call: Call, refused: Callable[..., str], run_dir: Path, tmp_path: Path) -> None:
    import pandas as pd

    frame = Run.open(run_dir).to_pandas()
    for ending, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        file = tmp_path / f"run.{ending}"
        document = call("export", run_dir, "--out", file, "--json").document
        assert document == {"run": str(run_dir), "file": str(file), "rows": len(frame)}
        pd.testing.assert_frame_equal(read(file), frame)
    assert f"{len(frame):,} rows" in call("export", run_dir, "--out", tmp_path / "again.csv").out
    assert ".csv or .parquet" in refused("export", run_dir, "--out", tmp_path / "run.xlsx")
    assert "cannot be written" in refused("export", run_dir, "--out", tmp_path / "absent" / "run.csv")
