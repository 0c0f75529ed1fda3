from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_monitor.errors import StoreError
from ma_monitor.runs.files import read_json
from ma_monitor.runs.meta import differences, meta_from_json, meta_to_json
from ma_monitor.runs.records import ModelShape, ProbeInfo, RunMeta
from tests.runs.makers import make_meta

maybe = st.none() | st.integers(1, 10**12)
names = st.text(max_size=8)
metas = st.builds(
    RunMeta,
    model=st.builds(ModelShape, names, st.none() | names, st.integers(1, 200), maybe, maybe, maybe, maybe),
    probe=st.builds(ProbeInfo, st.none() | names, st.integers(1, 50), maybe, names),
    k=st.integers(1, 9),
    first_layer=st.integers(0, 1),
    ratio=st.sampled_from(["ratio_of_means", "mean_of_ratios"]),
    precision=names,
    versions=st.dictionaries(names, names, max_size=3),
)


@given(metas)
def test_metadata_come_back(meta: RunMeta) -> None:
    assert meta_from_json(json.loads(json.dumps(meta_to_json(meta))), "run.json") == meta


HOSTILE: list[tuple[tuple[str, ...], Any]] = [
    (("model",), None),
    (("model",), [1]),
    (("model", "layers"), "6"),
    (("model", "layers"), 0),
    (("model", "layers"), 2.0),
    (("model", "layers"), True),
    (("model", "layers"), 10**400),
    (("model", "name"), None),
    (("model", "width"), -1),
    (("model", "family"), 3),
    (("probe", "sequences"), None),
    (("probe", "hash"), {}),
    (("k",), 1e300),
    (("k",), float("inf")),
    (("first_layer",), 2),
    (("first_layer",), -1),
    (("ratio",), "median_of_means"),
    (("ratio",), ["ratio_of_means"]),
    (("precision",), 32),
    (("versions",), ["torch"]),
    (("versions", "torch"), 2),
]


@pytest.mark.parametrize(("keys", "value"), HOSTILE)
def test_a_value_of_the_wrong_type_or_range_is_named(keys: tuple[str, ...], value: Any) -> None:
    document: dict[str, Any] = json.loads(json.dumps(meta_to_json(make_meta())))
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    with pytest.raises(StoreError, match=f"run.json.*`{keys[-1]}` must be"):
        meta_from_json(document, "run.json")


@pytest.mark.parametrize("key", [field.name for field in fields(RunMeta)])
def test_a_missing_value_is_named(key: str) -> None:
    document = meta_to_json(make_meta())
    del document[key]
    with pytest.raises(StoreError, match=f"`{key}` must be .* is 'missing'"):
        meta_from_json(document, "run.json")


def test_another_schema_version_is_refused() -> None:
    for version in (0, 2, "1", None, 10**30):
        with pytest.raises(StoreError, match=r"schema version .*, this ma_monitor reads 1"):
            meta_from_json({**meta_to_json(make_meta()), "schema_version": version}, "run.json")


def test_a_record_of_impossible_size_is_refused() -> None:
    with pytest.raises(StoreError, match="one step would take more than"):
        meta_from_json(meta_to_json(make_meta(layers=10**4, sequences=10**6)), "run.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not a JSON file that ma_monitor wrote"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not a JSON file that ma_monitor wrote"),
        (b"[" * 200_000, "not a JSON file that ma_monitor wrote"),
        (b'{"a":' * 200_000, "not a JSON file that ma_monitor wrote"),
        (b'{"k": ' + b"9" * 10_000 + b"}", "not a JSON file that ma_monitor wrote"),
        (b"[1, 2]", "must hold a JSON object, holds a list"),
        (b"null", "must hold a JSON object, holds a NoneType"),
    ],
)
def test_hostile_json_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(StoreError, match=message):
        read_json(tmp_path / "run.json")


def test_a_huge_json_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(2**40)  # sparse: takes no room
    with pytest.raises(StoreError, match="1099511627776 bytes, at most .* are read"):
        read_json(tmp_path / "run.json")


def test_json_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"run.json: cannot be read \(No such file"):
        read_json(tmp_path / "run.json")


def test_what_may_differ_and_what_may_not() -> None:
    meta = make_meta()
    same = replace(
        meta,
        model=replace(meta.model, name="checkpoint-500"),
        probe=replace(meta.probe, source="elsewhere"),
        versions={"torch": "3.0"},
    )
    assert differences(meta, same) == []
    other = replace(
        meta,
        model=replace(meta.model, width=32, layers=4, heads=None),
        probe=replace(meta.probe, hash="0f", length=64),
        k=1,
        first_layer=1,
        ratio="mean_of_ratios",
        precision="bfloat16",
    )
    assert differences(meta, other) == [
        "k was 3, is 1",
        "first_layer was 0, is 1",
        "ratio was ratio_of_means, is mean_of_ratios",
        "precision was float32, is bfloat16",
        "model layers was 2, is 4",
        "model width was 16, is 32",
        "model heads was 2, is None",
        f"probe hash was {meta.probe.hash}, is 0f",
        "probe length was 32, is 64",
    ]
