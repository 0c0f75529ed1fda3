"""``ma-monitor --completion bash``: what a shell needs to complete commands, options and names of files."""

from __future__ import annotations

import argparse
from typing import Any

from ma_monitor.errors import MissingExtraError

SHELLS = ("bash", "zsh", "tcsh")
FILES, FOLDERS = ("FILE", "PATH"), ("RUN", "DIR", "SOURCE")
"""Words in an argument's place that stand for a file, and for a directory."""


class Completion(argparse.Action):
    """Prints the completion of the whole parser for one shell, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        """Prints it.

        Raises:
            MissingExtraError: If shtab is not installed.
        """
        try:
            import shtab
        except ImportError as error:
            raise MissingExtraError("shtab", "completion") from error
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    _mark(command, shtab)
        print(shtab.complete(parser, values))
        parser.exit()


def _mark(command: argparse.ArgumentParser, shtab: Any) -> None:
    """Says which of a command's arguments are names of files and directories."""
    for action in command._actions:
        shown = str(action.metavar or "")
        if any(word in shown for word in FILES + FOLDERS):
            kind = shtab.FILE if any(word in shown for word in FILES) else shtab.DIRECTORY
            action.complete = kind  # type: ignore[attr-defined]
