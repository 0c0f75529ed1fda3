"""The files of a run, by name, and its latest fits and forecast: plain JSON documents, replaced atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ma_monitor.errors import ConfigError, StoreError
from ma_monitor.runs.files import read_json, write_bytes, write_json, writing
from ma_monitor.runs.log import SCHEMA_VERSION

META, LOG, EVENTS = "run.json", "measurements.bin", "events.jsonl"
Document = Literal["fits", "forecast", "ablation"]
COMBINER, PRIOR = GIVEN = ("combiner.json", "prior.json")
"""What the forecasts of a run rest on besides its measurements."""


def refuse_run(path: Path) -> None:
    """Lets nobody begin a run where there is one.

    Raises:
        StoreError: If the directory holds a run.
    """
    if (path / META).exists():
        raise StoreError(f"{path}: already holds a run; continue it with Run.continue_ or use another directory")


def write_document(folder: Path, name: Document, document: dict[str, Any]) -> None:
    """Replaces a document.

    Raises:
        ConfigError: If it holds what JSON cannot say, NaN and infinities included.
        StoreError: If the disk refuses.
    """
    file = folder / f"{name}.json"
    try:
        with writing(file):
            write_json(file, {"schema_version": SCHEMA_VERSION, **document})
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file}: a document must be JSON, with null for what is not finite: {error}") from error


def read_document(folder: Path, name: Document) -> dict[str, Any] | None:
    """The latest document of this name; None where there is none.

    Raises:
        StoreError: If the file is not a document of this version.
    """
    file = folder / f"{name}.json"
    if not file.exists():
        return None
    document = read_json(file)
    version = document.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise StoreError(f"{file}: schema version {version!r}, this ma_monitor reads {SCHEMA_VERSION}; remove the file")
    return document


def remove_documents(folder: Path, *names: Document) -> None:
    """Removes documents that no longer hold.

    Raises:
        StoreError: If the disk refuses.
    """
    for name in names:
        with writing(folder):
            (folder / f"{name}.json").unlink(missing_ok=True)


def copy_given(folder: Path, to: Path) -> None:
    """Copies what forecasts rest on, as far as it is there."""
    for name in GIVEN:
        if (folder / name).is_file() and not (folder / name).is_symlink():  # nor what a link leads to
            write_bytes(to / name, (folder / name).read_bytes(), sync=True)
