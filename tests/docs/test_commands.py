"""Every command line in README and the documentation is taken by the real parser."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ma_monitor.cli.__main__ import build_parser
from ma_monitor.errors import ConfigError
from tests.docs.blocks import PAGES, ROOT, commands, inline_commands, links, name, python_blocks

pages = pytest.mark.parametrize("page", PAGES, ids=name)


@pages
def test_command_lines_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "8")
    for arguments in commands(page.read_text(encoding="utf-8")):
        build_parser().parse_args([os.path.expandvars(argument) for argument in arguments])


@pages
def test_commands_in_running_text_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in inline_commands(page.read_text(encoding="utf-8")):
        with pytest.raises(SystemExit, match="0"):
            build_parser().parse_args([command, "--help"])
        assert f"ma-monitor {command}" in capsys.readouterr().out


def test_links_of_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [target for target in links(text) if not (ROOT / target).exists()] == []


def test_there_is_something_to_check() -> None:
    texts = {name(page): page.read_text(encoding="utf-8") for page in PAGES}
    found = {page: list(commands(text)) for page, text in texts.items()}
    assert ["fit", "runs/pythia-14m"] in found["README.md"]
    assert ["merge", "runs/pythia-1.4b/shard-*", "--out", "runs/pythia-1.4b/all"] in found["docs/replay.md"]
    assert sum(line[0] == "report" for line in found["docs/report.md"]) == 3
    assert {"workspace", "log"} <= inline_commands(texts["docs/dashboards.md"])
    assert "docs/images/forecast.png" in links(texts["README.md"])


def test_what_is_found_in_a_page() -> None:
    page = (
        "`ma-monitor fit RUN` and\n\n    ma-monitor report a  # why\n\n```bash\nma-monitor compare a \\\n  b\n"
        "sbatch --wrap 'ma-monitor merge a b'\n```\n\n```text\nma-monitor nothing\n```\n\n```python\nx = 1\n```\n"
        "<!-- not run: no such thing -->\n```python\nx = 2\n```\n[a](b.md#c) [d](https://e.org)\n"
    )
    assert list(commands(page)) == [["compare", "a", "b"], ["merge", "a", "b"], ["report", "a"]]
    assert inline_commands(page) == {"fit"}
    (block,) = python_blocks(page)
    assert block.strip() == "x = 1"
    assert page.split("\n")[block.index("x") :][0] == "x = 1"
    assert links(page) == ["b.md"]
    with pytest.raises(ConfigError, match="argument COMMAND: invalid choice"):
        build_parser().parse_args(["nothing"])
