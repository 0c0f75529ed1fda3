"""Hook of the documentation site: runs ``notebook.ipynb`` and makes it a page, with what its cells print and draw.

The notebook is kept without outputs, so that none of them can be older than the code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from mkdocs.structure.files import File
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

NOTEBOOK = Path(__file__).with_name("notebook.ipynb")
SECONDS = 300
"""A cell that takes longer is stopped, and the site is not built."""


def executed() -> Any:
    """The notebook after all its cells have run in its own folder.

    Raises:
        CellExecutionError: If a cell raises.
    """
    notebook = nbformat.reads(NOTEBOOK.read_text(encoding="utf-8"), as_version=4)
    return NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page and its pictures."""
    body, resources = MarkdownExporter().from_notebook_node(executed())
    plain = body.replace(' class="dataframe"', "")  # the theme lets a table without a class scroll on a telephone
    files.append(File.generated(config, "notebook.md", content=plain))
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, name, content=content))
    return files
