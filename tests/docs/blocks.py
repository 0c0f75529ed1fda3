"""The code of README and of the pages under ``docs/``: what a reader would copy."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

_BLOCK = re.compile(r"(?P<left_out><!-- not run: [^\n]+ -->\n+)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"^    (.+)$", re.M)
_OURS = re.compile(r"(?:ma-monitor|-m ma_monitor\.cli) (.+)")
SHELL = ("", "bash", "console")


def name(page: Path) -> str:
    """The page as its readers know it, such as ``docs/replay.md``."""
    return str(page.relative_to(ROOT))


def python_blocks(text: str) -> list[str]:
    """Python code, that of blocks under ``<!-- not run: why -->`` left out.

    Each begins on the line that it has in its page, so that a traceback points there.
    """
    return [
        "\n" * (text.count("\n", 0, found.start("code"))) + found["code"]
        for found in _BLOCK.finditer(text)
        if found["language"] == "python" and not found["left_out"]
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every ``ma-monitor`` (or ``python -m ma_monitor.cli``) of shell blocks and indented lines."""
    shell = [found["code"] for found in _BLOCK.finditer(text) if found["language"] in SHELL]
    for line in "\n".join([*shell, *_INDENTED.findall(_BLOCK.sub("", text))]).replace("\\\n", " ").split("\n"):
        for rest in _OURS.findall(line):
            within = rest.rpartition("'")[0] if rest.count("'") % 2 else rest  # … --wrap 'ma-monitor …'
            yield shlex.split(within, comments=True)


def inline_commands(text: str) -> set[str]:
    """The names of commands in running text, such as fit of ```ma-monitor fit RUN```."""
    return set(re.findall(r"`ma-monitor ([a-z]+)", text))


def links(text: str) -> list[str]:
    """Targets of links and pictures that lie in the repository."""
    return [target for target in re.findall(r"\]\(([^)#\s]+)", _BLOCK.sub("", text)) if "://" not in target]
