"""A run's metadata: to JSON and back, and whether two runs can be one."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, get_args

from ma_monitor.errors import StoreError
from ma_monitor.runs.codec import RECORD_LIMIT, record_bytes
from ma_monitor.runs.log import SCHEMA_VERSION
from ma_monitor.runs.records import ModelShape, ProbeInfo, Ratio, RunMeta


def meta_to_json(meta: RunMeta) -> dict[str, Any]:
    """The document that ``run.json`` holds."""
    return {"schema_version": SCHEMA_VERSION, **asdict(meta)}


def meta_from_json(document: dict[str, Any], name: str) -> RunMeta:
    """The metadata of a document, trusting nothing about it.

    Raises:
        StoreError: If the document is of a later version, or a value is missing, of the wrong type or out of range.
    """
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{name}: schema version {version!r}, this ma_monitor reads {SCHEMA_VERSION}; install the one that wrote it"
        )
    read = _Reader(document, name)
    model, probe = read.inner("model"), read.inner("probe")
    meta = RunMeta(
        model=ModelShape(
            name=model.text("name"),
            family=model.text_or_none("family"),
            layers=model.number("layers", 1),
            width=model.number_or_none("width"),
            heads=model.number_or_none("heads"),
            vocabulary=model.number_or_none("vocabulary"),
            parameters=model.number_or_none("parameters"),
        ),
        probe=ProbeInfo(
            hash=probe.text_or_none("hash"),
            sequences=probe.number("sequences", 1),
            length=probe.number_or_none("length"),
            source=probe.text("source"),
        ),
        k=read.number("k", 1),
        first_layer=read.number("first_layer", 0, 1),
        ratio=read.ratio(),
        precision=read.text("precision"),
        versions=read.versions(),
    )
    if record_bytes((meta.rows, meta.probe.sequences, meta.k)) > RECORD_LIMIT:
        raise StoreError(f"{name}: one step would take more than {RECORD_LIMIT} bytes; the file is not ma_monitor's")
    return meta


def differences(old: RunMeta, new: RunMeta) -> list[str]:
    """Why one run cannot go on as the other, in words; names, sources and versions may differ."""
    pairs = {name: (getattr(old, name), getattr(new, name)) for name in ("k", "first_layer", "ratio", "precision")}
    for name in (field.name for field in fields(ModelShape) if field.name != "name"):
        pairs[f"model {name}"] = getattr(old.model, name), getattr(new.model, name)
    for name in (field.name for field in fields(ProbeInfo) if field.name != "source"):
        pairs[f"probe {name}"] = getattr(old.probe, name), getattr(new.probe, name)
    return [f"{name} was {before}, is {now}" for name, (before, now) in pairs.items() if before != now]


class _Reader:
    """A JSON object whose values are checked as they are taken out."""

    def __init__(self, values: dict[str, Any], name: str) -> None:
        self._values = values
        self._name = name

    def _wrong(self, key: str, rule: str) -> StoreError:
        return StoreError(f"{self._name}: `{key}` must be {rule}, is {str(self._values.get(key, 'missing'))[:80]!r}")

    def inner(self, key: str) -> _Reader:
        value = self._values.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return _Reader(value, f"{self._name}: {key}")

    def text(self, key: str) -> str:
        value = self._values.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "text")
        return value

    def number(self, key: str, low: int, high: int = 2**53) -> int:
        value = self._values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(key, f"a whole number from {low} to {high}")
        return value

    def text_or_none(self, key: str) -> str | None:
        return None if key in self._values and self._values[key] is None else self.text(key)

    def number_or_none(self, key: str) -> int | None:
        return None if key in self._values and self._values[key] is None else self.number(key, 1)

    def ratio(self) -> Ratio:
        value = self.text("ratio")
        for ratio in get_args(Ratio):
            if value == ratio:
                return ratio  # type: ignore[no-any-return]
        raise self._wrong("ratio", " or ".join(get_args(Ratio)))

    def versions(self) -> dict[str, str]:
        reader = self.inner("versions")
        return {key: reader.text(key) for key in reader._values}
