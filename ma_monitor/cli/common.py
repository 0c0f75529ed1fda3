"""What all commands share: how they are declared, and how they print tables, JSON and warnings."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from ma_monitor.errors import ConfigError, redacted
from ma_monitor.report.words import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ma_monitor.runs.records import Ratio
    from ma_monitor.runs.store import Run

RATIOS = ("ratio_of_means", "mean_of_ratios")
RATIO_HELP = "how sequences are reduced: ratio_of_means is Eq. 8 of the paper, mean_of_ratios Eq. 6 and 7"
TALKATIVE = ("huggingface_hub.utils._http", "huggingface_hub.file_download")
"""Loggers that tell whole URLs."""
MOST = 10**9
"""Largest step or count that is taken from a user: no training is longer."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises what it has to say, so that bad input of any kind ends in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises the message.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}; see {self.prog} --help")


class Commands(Protocol):
    """Where commands are declared: what argparse's ``add_subparsers`` gives."""

    def add_parser(self, *args: Any, **options: Any) -> Parser:
        """Adds one."""


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], *, help: str, text: str, example: str
) -> Parser:
    """Declares a command, with the ``--json`` that every one has.

    Args:
        commands: Where it is added.
        name: What the user types.
        run: Does it and returns the exit code.
        help: One line for the list of commands.
        text: What it does, for its own help.
        example: A command line that works.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")
    return parser


def add_ratio(parser: Parser, *, default: str | None = None) -> None:
    """Declares ``--ratio``; None stands for the way a run was made, and `open_run` heeds it."""
    shown = default or "as the run was made"
    parser.add_argument("--ratio", choices=RATIOS, default=default, help=f"{RATIO_HELP} (default: {shown})")


def add_rank(parser: Parser) -> None:
    """Declares ``--rank``."""
    parser.add_argument(
        "--rank", type=positive, default=1, metavar="K", help="which of the largest entries (default: %(default)s)"
    )


def open_run(path: str, ratio: Ratio | None = None) -> Run:
    """The run that a command reads; all it gives is reduced as ``--ratio`` asks, and on disk nothing changes."""
    from ma_monitor.runs.store import Run

    source = Run.open(path)
    if ratio is not None:
        source.meta = replace(source.meta, ratio=ratio)
    return source


def whole(text: str, least: int = 0) -> int:
    """A whole number that is not negative and not beyond any training, as steps are."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    if number > MOST:
        raise argparse.ArgumentTypeError(f"must be a whole number of at most {MOST:,}, got {text!r}")
    return number


def positive(text: str) -> int:
    """A whole number of at least 1, as counts are."""
    return whole(text, 1)


@contextmanager
def user_file(path: str, rule: str) -> Iterator[Path]:
    """Turns whatever goes wrong while a file is read that the user named into one sentence.

    Args:
        path: The file.
        rule: What it must hold, in words.

    Raises:
        ConfigError: If it cannot be read, or not as what it must hold.
    """
    try:
        yield Path(path)
    except (OSError, EOFError, ValueError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{path}: {rule}, and this cannot be read so ({reason})") from error


def user_ids(path: str, axes: str) -> NDArray[Any]:
    """The array in a file that the user named, which should be token ids with axes such as ``documents, tokens``.

    Raises:
        ConfigError: If it is no array.
    """
    import numpy as np

    from ma_monitor.runs.files import opened_arrays

    rule = f"token ids must be one array [{axes}] of whole numbers, saved by np.save"
    with user_file(path, rule) as file, opened_arrays(file) as loaded:
        return np.asarray(loaded)


def user_documents(path: str, what: str) -> list[str]:
    """The lines of a text file that the user named as ``what``, empty ones left out.

    Raises:
        ConfigError: If it cannot be read, or is not UTF-8.
    """
    with user_file(path, f"{what} must be UTF-8, a document a line") as file:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def say(text: str = "") -> None:
    """Prints lines on stdout; what its encoding lacks is escaped, what would steer the terminal too."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in text.split("\n"):
        print(printable(line).encode(encoding, "backslashreplace").decode(encoding))


def note(text: object) -> None:
    """Prints one line on stderr, where progress and warnings go."""
    print(redacted(printable(" ".join(str(text).split()))), file=sys.stderr)


def emit_json(document: dict[str, Any]) -> None:
    """Prints the one JSON document of a command.

    Raises:
        ValueError: If it holds NaN or an infinity, which is a bug.
    """
    print(json.dumps(document, allow_nan=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 0) -> str:
    """Aligned columns, two spaces apart, under a line of headings.

    Args:
        columns: Headings.
        rows: Cells, as many as headings.
        left: This many of the first columns are aligned to the left, the others to the right.
    """
    lines = [tuple(columns), *(tuple(printable(cell) for cell in row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def padded(line: Sequence[str]) -> str:
        pairs = enumerate(zip(line, widths, strict=True))
        return "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in pairs).rstrip()

    return "\n".join(map(padded, lines))


def reasons(layers: Iterable[dict[str, Any]], plain: str) -> str:
    """A line for each status other than the plain one, with its layers; empty where there is none."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer["status"] != plain:
            found.setdefault(layer["status"], []).append(str(layer["layer"]))
    return "\n".join(f"layer {', '.join(numbers)}: {status}" for status, numbers in found.items())


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Shows the package's warnings as single lines on stderr while a command runs, and no secrets in others'."""
    logger = logging.getLogger("ma_monitor")
    handler = _Notes()
    logger.addHandler(handler)
    for name in TALKATIVE:
        logging.getLogger(name).addFilter(_without_secrets)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for name in TALKATIVE:
            logging.getLogger(name).removeFilter(_without_secrets)


def _without_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = redacted(record.getMessage()), ()
    return True


class _Notes(logging.Handler):
    """Prints records by `note`."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"ma-monitor: {record.levelname.lower()}: {record.getMessage()}")
