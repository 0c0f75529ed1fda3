"""A run whose directory was deleted while it was being written."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ma_monitor.errors import StoreError
from ma_monitor.runs.documents import EVENTS, LOG, META
from ma_monitor.runs.events import LOGGER, add_event
from ma_monitor.runs.files import replace_folder, write_bytes, write_json, writing
from ma_monitor.runs.log import LogWriter
from ma_monitor.runs.meta import meta_to_json
from ma_monitor.runs.records import RunMeta

_SAID = (
    "the directory was deleted under way and is made again with all measurements; its diary so far and what forecasts "
    "rest on besides are lost"
)


def made_again(writer: LogWriter, meta: RunMeta) -> LogWriter:
    """The writer of a run's log, which is made again where its directory was deleted: what is open can still be read.

    Args:
        writer: The writer so far; closed if it is replaced.
        meta: The run's metadata.

    Returns:
        ``writer``, or that of a new log in which every frame lies where it lay.

    Raises:
        StoreError: If something else is in the directory by now, or the disk refuses; ``writer`` goes on then.
    """
    if not writer.deleted:
        return writer
    folder, whole = writer.path.parent, writer.read()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(
            f"{folder}: {LOG} was deleted under way, and what is there now is not this run's; move it away"
        )

    def write(new: Path) -> None:
        write_bytes(new / LOG, whole, sync=True)
        write_json(new / META, meta_to_json(meta), sync=True)

    with writing(folder):
        replace_folder(folder, write)
    again = LogWriter(folder / LOG)
    again.cut(len(whole))
    with suppress(StoreError):  # the disk that it was on may be gone
        writer.close()
    LOGGER.warning("%s: %s", folder, _SAID)
    add_event(folder / EVENTS, "repaired", _SAID)
    return again
