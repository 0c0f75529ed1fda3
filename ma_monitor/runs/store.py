"""A run: a directory that survives whatever happens to the process that writes it.

    run.json           what is fixed for the whole run (`RunMeta`); written once, last of all when a run is created
    measurements.bin   append-only: plans, measurements and rewinds (`ma_monitor.runs.log`, `ma_monitor.runs.codec`)
    events.jsonl       the diary, the only file with times in it
    fits.json, forecast.json   the latest documents, replaced atomically

A ``kill -9`` at any byte loses at most the record being written. A writable open drops such a torn tail and says so; a
reader changes nothing and sees what is whole. One process writes at a time, readers never wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.errors import ConfigError, StoreError
from ma_monitor.html import table
from ma_monitor.runs import documents
from ma_monitor.runs.codec import encode_measurements, encode_phenomena, encode_plan, encode_rewind
from ma_monitor.runs.contents import Contents, Place, leftover
from ma_monitor.runs.deleted import made_again
from ma_monitor.runs.documents import EVENTS, LOG, META, Document, copy_given, refuse_run, remove_documents
from ma_monitor.runs.events import LOGGER, Event, add_event, read_events
from ma_monitor.runs.files import read_json, replace_folder, write_bytes, write_json, writing
from ma_monitor.runs.history import History, Stack
from ma_monitor.runs.log import HEADER, LogWriter, read_log, scan
from ma_monitor.runs.meta import differences, meta_from_json, meta_to_json
from ma_monitor.runs.records import Measurements, Plan, Ratio, Readings, RunMeta, Trajectory

if TYPE_CHECKING:
    import pandas as pd


class Run:
    """The measurements of one training, on disk and in memory.

    Made by `create`, `open` or `continue_`; a context manager that closes itself.

    Attributes:
        path: The directory.
        meta: What is fixed for the whole run.
        damage: What could not be read when the run was opened, in words; None where all is whole.
    """

    def __init__(
        self, path: Path, meta: RunMeta, contents: Contents, history: History, writer: LogWriter | None
    ) -> None:
        """Not for callers: use `create`, `open` or `continue_`."""
        self.path = path
        self.meta = meta
        self.damage: str | None = None
        self._contents = contents
        self._history = history
        self._writer = writer

    @classmethod
    def create(cls, path: str | Path, meta: RunMeta, plan: Plan | None) -> Run:
        """Makes a new run, open for writing.

        Args:
            path: A directory, made where there is none.
            meta: What is fixed for the whole run.
            plan: What is planned at the start; None where unknown.

        Raises:
            StoreError: If the directory already holds a run, or cannot be written.
        """
        path = Path(path)
        refuse_run(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        writer = LogWriter(path / LOG, create=True)
        try:
            refuse_run(path)  # another process may have made one since
            if not leftover(read_log(path / LOG), str(path / LOG)):
                raise StoreError(f"{path}: holds measurements but no {META}; bring it back or use another directory")
            writer.start()
            contents = Contents(meta)
            run = cls(path, meta, contents, History(contents.shape), writer)
            if plan is not None:
                contents.add_plan(plan, Place(*writer.queue(encode_plan(plan))))
                writer.flush()
            with writing(path):
                write_json(path / META, meta_to_json(meta), sync=True)
        except BaseException:
            writer.close()
            raise
        run._opened("opened", "created")
        return run

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> Run:
        """Opens a run.

        Args:
            path: The run's directory.
            writable: Be its one writer: a torn tail is dropped, with a warning and an event. A reader changes nothing.

        Raises:
            StoreError: If this is no run, its files are not ma_monitor's or of a later version, or, to be written,
                it has a writer already or cannot be written.
        """
        path = Path(path)
        if not (path / META).is_file():
            raise StoreError(f"{path}: not a run: a run is a directory that holds {META} and {LOG}")
        meta = meta_from_json(read_json(path / META), str(path / META))
        writer = LogWriter(path / LOG) if writable else None
        try:
            run = cls._load(path, meta, writer)
        except BaseException:
            if writer is not None:
                writer.close()
            raise
        if writable:
            run._opened("opened", f"{len(run.steps)} steps measured so far")
        return run

    @classmethod
    def _load(cls, path: Path, meta: RunMeta, writer: LogWriter | None) -> Run:
        found = scan(read_log(path / LOG), str(path / LOG))
        contents = Contents(meta)
        measurements, problems = contents.load(found.frames)
        history = History(contents.shape)
        history.load(measurements)
        run = cls(path, meta, contents, history, writer)
        run.damage = "; ".join([*found.damage(), *problems]) or None
        if run.damage is not None:
            LOGGER.warning("%s: %s", path / LOG, run.damage)
        if writer is not None:
            with writing(path):
                writer.cut(found.end)
            if run.damage is not None:
                run.event("repaired" if found.size > found.end else "damaged", run.damage)
        return run

    @classmethod
    def continue_(cls, path: str | Path, meta: RunMeta, plan: Plan | None, *, from_step: int) -> Run:
        """Opens a run for writing where its training goes on.

        What was measured after ``from_step`` is superseded. A plan that differs from the one in force is recorded and
        voids the forecast; package versions, the model's name and the probe's source may differ.

        Args:
            path: The run's directory.
            meta: The run as it is now.
            plan: The plan as it is now; None where unknown.
            from_step: Updates done in the state from which the training goes on.

        Raises:
            StoreError: As `open`, or if the model, the probe or the way of measuring is another.
        """
        run = cls.open(path, writable=True)
        try:
            if why := differences(run.meta, meta):
                raise StoreError(f"{path}: a run goes on only as what it was: {'; '.join(why)}; use another directory")
            changed = " with other package versions" if meta.versions != run.meta.versions else ""
            run.event("resumed", f"from step {from_step}{changed}")
            run.rewind(from_step)
            current = run.plan_at(from_step) or Plan(0, None, None, None, "unknown")
            if plan is not None and not plan.same_as(current):
                run.add_plan(replace(plan, from_step=from_step))
        except BaseException:
            run.close()
            raise
        return run

    @property
    def steps(self) -> NDArray[np.int64]:
        """The measured steps in order, ``[T]``."""
        return self._history.stack().steps

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are fitted, 1 … L."""
        return tuple(range(1, self.meta.model.layers + 1))

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans that were in force, in the order of their steps."""
        return tuple(plan for plan, _ in self._contents.plans)

    @property
    def events(self) -> tuple[Event, ...]:
        """The diary."""
        return read_events(self.path / EVENTS)

    def plan_at(self, step: int) -> Plan | None:
        """The plan in force at this step; None where none was known."""
        return next((plan for plan in reversed(self.plans) if plan.from_step <= step), None)

    def append(self, m: Measurements) -> None:
        """Records one step; the same step measured before is superseded.

        Raises:
            ConfigError: If the measurements are of another shape than the run's.
            StoreError: If the run is not open for writing, or the disk refuses: the record is then kept in memory, is
                part of what this object gives, and goes to the disk with the next one.
        """
        writer = self._writable()
        if m.top.shape != self._contents.shape:
            raise ConfigError(
                f"{self.path}: measurements must have the axes [layer, sequence, rank] = {self._contents.shape}, "
                f"got {m.top.shape}"
            )
        place = Place(*writer.queue(encode_measurements(m)))
        if m.phenomena:
            place = Place(place.offset, place.size + writer.queue(encode_phenomena(m))[1])
        self._history.add(m)
        self._contents.places[m.step] = place
        self._writer = made_again(writer, self.meta)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        """Supersedes everything after this step: measurements, plans, fits and the forecast.

        Raises:
            StoreError: If the run is not open for writing, or the disk refuses.
        """
        writer = self._writable()
        if step < 0:
            raise ConfigError(f"a run is rewound to a step, which cannot be negative, got {step}")
        if not self._contents.rewind(step):
            return
        dropped = self._history.rewind(step)
        writer.queue(encode_rewind(step))
        remove_documents(self.path, "fits", "forecast")
        self.event("rewound", f"to step {step}: {dropped} later steps are superseded")
        writer.flush()

    def add_plan(self, plan: Plan) -> None:
        """Records what is planned from the plan's own step on; voids the forecast. Raises as `rewind` does."""
        writer = self._writable()
        remove_documents(self.path, "forecast")
        self.event("plan changed", f"at step {plan.from_step}: {plan.schedule}, {plan.total_steps} steps")
        self._contents.add_plan(plan, Place(*writer.queue(encode_plan(plan))))
        writer.flush()

    def event(self, kind: str, message: str) -> None:
        """Adds a line to the diary: its kind, such as ``fault`` or ``final``, and a message.

        Raises:
            StoreError: If the run is not open for writing. A disk that refuses is warned about, never raised.
        """
        self._writable()
        add_event(self.path / EVENTS, kind, message)

    def write_document(self, name: Document, document: dict[str, Any]) -> None:
        """Replaces ``fits.json`` or ``forecast.json``.

        Raises:
            ConfigError: If the document holds what JSON cannot say, NaN and infinities included.
            StoreError: If the run is not open for writing, or the disk refuses.
        """
        self._writable()
        documents.write_document(self.path, name, document)

    def read_document(self, name: Document) -> dict[str, Any] | None:
        """The latest fits or forecast; None where there are none.

        Raises:
            StoreError: If the file is not a document of this version.
        """
        return documents.read_document(self.path, name)

    def measurements(self) -> list[Measurements]:
        """Every measured step in order, what is superseded left out."""
        return self._history.measurements()

    def phenomena(self) -> dict[str, Readings]:
        """What was read besides the measurements, by name (`ma_monitor.phenomena`): the steps that have it."""
        return self._history.readings()

    def phenomena_at(self, step: int) -> Mapping[str, NDArray[np.float64]]:
        """What was read besides the measurements of a step: name → ``[R]`` or ``[R, m]``; empty where nothing was."""
        return self._history.besides.get(step, {})

    def stack(self) -> Stack:
        """Every measured step in order, as arrays that cannot be written to and do not change any more."""
        return self._history.stack()

    def ratios(self, rank: int = 1, ratio: Ratio | None = None) -> NDArray[np.float64]:
        """The ratio of layers 1 … L at every step (paper, Eq. 6 to 8; `ma_monitor.runs.history.sequence_ratio`).

        Args:
            rank: 1 for the largest entry, up to the run's k.
            ratio: How sequences are reduced; the run's own where None.

        Returns:
            ``[L, T]``, NaN where undefined. Cannot be written to.

        Raises:
            ConfigError: If the run has no such rank.
        """
        return self._rows(rank, ratio)[1 - self.meta.first_layer :]

    def trajectory(self, layer: int, rank: int = 1) -> Trajectory:
        """The ratio of one layer against step; layer 0 is the first block's input.

        Raises:
            ConfigError: If the run has no such layer or rank.
        """
        first, last = self.meta.first_layer, self.meta.model.layers
        if not first <= layer <= last:
            raise ConfigError(f"`layer` must be one of this run's, {first} to {last}, got {layer}")
        return Trajectory(layer, rank, self.steps, self._rows(rank, None)[layer - first])

    def to_pandas(self) -> pd.DataFrame:
        """One row for each step, layer and sequence, as `export` writes them.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        from ma_monitor.runs.export import to_frame

        return to_frame(self.stack(), self.meta.first_layer)

    def export(self, path: str | Path) -> None:
        """Writes columns ``step,layer,sequence,top1,…,median`` to a ``.csv`` or ``.parquet`` file.

        Values are magnitudes, as published data have them (signs are in `stack`), and read back bit for bit.

        Raises:
            ConfigError: If the name ends in neither.
            MissingExtraError: If pandas or pyarrow is not installed.
            StoreError: If the file cannot be written.
        """
        from ma_monitor.runs.export import write_frame

        with writing(Path(path)):
            write_frame(Path(path), self.to_pandas)

    def copy_to(self, folder: str | Path) -> None:
        """Makes a compact copy, all that is needed to go on: the metadata and what is not superseded.

        It is written beside and renamed, so that the folder holds a whole run or none. A copy already there is
        replaced; a run with a diary of its own is no copy.

        Raises:
            StoreError: If the folder holds something else than a copy of a run, or cannot be written.
        """
        folder = Path(folder)
        copy = (folder / META).exists() and not (folder / EVENTS).exists() and folder.resolve() != self.path.resolve()
        if folder.exists() and not copy and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(f"{folder}: a copy would destroy what is there, not a copy of a run; use another folder")
        data = read_log(self.path / LOG) if self._writer is None else self._writer.read()
        places = [*self._contents.places.values(), *(place for _, place in self._contents.plans)]
        log = HEADER + b"".join(data[place.offset : place.offset + place.size] for place in sorted(places))

        def write(new: Path) -> None:
            write_bytes(new / LOG, log, sync=True)
            write_json(new / META, meta_to_json(self.meta), sync=True)
            copy_given(self.path, new)

        with writing(folder):
            replace_folder(folder, write)

    def close(self) -> None:
        """Gives the lock up. What was read stays usable; may be called twice.

        Raises:
            StoreError: If the disk refuses what it refused before, which is lost then.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def __enter__(self) -> Run:
        """The run itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the run."""
        self.close()

    def _repr_html_(self) -> str:
        pairs = zip(self.layers, self.ratios().tolist(), strict=True) if len(self.steps) else ()
        rows = [{"layer": layer, "first ratio": own[0], "last ratio": own[-1]} for layer, own in pairs]
        return table(f"{self.meta.model.name}: {len(self.steps)} steps, the last {max(self.steps, default=None)}", rows)

    def _writable(self) -> LogWriter:
        if self._writer is None:
            raise StoreError(f"{self.path}: the run is closed or open for reading only; use Run.open(…, writable=True)")
        return self._writer

    def _opened(self, kind: str, message: str) -> None:
        self.event(kind, message)
        if not self._writable().locked:
            self.event("unlocked", "the file system has no locks: nothing keeps a second writer off")

    def _rows(self, rank: int, ratio: Ratio | None) -> NDArray[np.float64]:
        if not 1 <= rank <= self.meta.k:
            raise ConfigError(f"`rank` must be one of this run's, 1 to {self.meta.k}, got {rank}")
        return self._history.ratios(rank, ratio or self.meta.ratio)
