"""A run's metadata: to JSON and back, and whether two runs can be one."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from types import UnionType
from typing import Any, get_args, get_type_hints

import ma_monitor
from ma_monitor.errors import StoreError
from ma_monitor.runs.codec import RECORD_LIMIT, record_bytes
from ma_monitor.runs.log import SCHEMA_VERSION
from ma_monitor.runs.records import ModelShape, ProbeInfo, Ratio, RunMeta


def installed_versions() -> dict[str, str]:
    """Versions of ma_monitor and of the packages that its numbers come from."""
    found = {"ma_monitor": ma_monitor.__version__}
    for name in ("torch", "transformers", "numpy", "scipy"):
        with suppress(importlib.metadata.PackageNotFoundError):  # built from source, or only on the path
            found[name] = importlib.metadata.version(name)
    return found


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
    meta = RunMeta(**_checked(document, get_type_hints(RunMeta), name))
    if record_bytes((meta.rows, meta.probe.sequences, meta.k)) > RECORD_LIMIT:
        raise StoreError(f"{name}: one step would take more than {RECORD_LIMIT} bytes; the file is not ma_monitor's")
    return meta


def differences(old: RunMeta, new: RunMeta) -> list[str]:
    """Why one run cannot go on as the other, in words; sources, versions, and names but for the Hub's may differ."""
    pairs = {name: (getattr(old, name), getattr(new, name)) for name in ("k", "first_layer", "ratio", "precision")}
    for name in (field.name for field in fields(ModelShape) if field.name != "name"):
        pairs[f"model {name}"] = getattr(old.model, name), getattr(new.model, name)
    if "/" in old.model.name and "/" in new.model.name:  # ids on the Hub: models of one shape, trained apart
        pairs["model name"] = old.model.name, new.model.name
    for name in (field.name for field in fields(ProbeInfo) if field.name != "source"):
        pairs[f"probe {name}"] = getattr(old.probe, name), getattr(new.probe, name)
    return [f"{name} was {before}, is {now}" for name, (before, now) in pairs.items() if before != now]


_Rule = tuple[str, Callable[[Any], bool]]
_OBJECT: _Rule = ("an object", lambda value: isinstance(value, dict))
_RULES: dict[Any, _Rule] = {
    str: ("text", lambda value: isinstance(value, str)),
    int: (f"a whole number from 1 to {2**53}", lambda value: type(value) is int and 1 <= value <= 2**53),
    (int, "layers"): ("a whole number from 1 to 10000", lambda value: type(value) is int and 1 <= value <= 10_000),
    (int, "first_layer"): ("0 or 1", lambda value: type(value) is int and value in (0, 1)),
    Ratio: (" or ".join(get_args(Ratio)), lambda value: value in get_args(Ratio)),
}
"""Type of a field (and its name, where that matters) → what its values are, in words and as a test."""


def _checked(values: dict[str, Any], types: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values of a JSON object, by the type that each must have."""
    return {key: _value(values, key, kind, name) for key, kind in types.items()}


def _value(values: dict[str, Any], key: str, kind: Any, name: str) -> Any:
    value: Any = values.get(key)
    if isinstance(kind, UnionType):  # a type or None
        if value is None and key in values:
            return None
        kind = get_args(kind)[0]
    rule, fits = _RULES.get((kind, key)) or _RULES.get(kind, _OBJECT)
    if not fits(value):
        raise StoreError(f"{name}: `{key}` must be {rule}, is {str(values.get(key, 'missing'))[:80]!r}")
    if kind in (ModelShape, ProbeInfo):
        return kind(**_checked(value, get_type_hints(kind), f"{name}: {key}"))
    return _checked(value, dict.fromkeys(value, str), f"{name}: {key}") if isinstance(value, dict) else value
