"""A few seconds of what ``fuzz.py`` does for minutes, and what that has found."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from ma_monitor.errors import MaMonitorError
from ma_monitor.runs.codec import encode_measurements, encode_plan
from ma_monitor.runs.log import HEADER, encode
from tests.runs.makers import make_measurements, make_plan
from tests.security import slow_targets as slow
from tests.security import targets as own
from tests.security.fuzz import fed
from tests.security.slow_targets import CONFIG, SETTINGS, TOKENIZER
from tests.security.targets import Target, run_files, targets

EXAMPLES = 12
"""Inputs to each reader."""


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_a_reader_gives_a_value_or_an_error_of_ours(target: Target) -> None:
    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(target.content)
    def check(content: bytes) -> None:
        fed(target, content)

    check()


def run_file(name: str, **changes: object) -> bytes:
    return json.dumps(json.loads(run_files()[name]) | changes).encode()


def diary(**words: object) -> bytes:
    return json.dumps({"time": "", "kind": "opened", "message": "created", **words}).encode()


def plan_of(text: bytes) -> bytes:
    payload = encode_plan(make_plan(3, total=6))
    at, end = payload.index(b"{"), payload.index(b"}") + 1
    odd = payload[: at - 8] + len(text).to_bytes(4, "little") + payload[at - 4 : at] + text + payload[end:]
    return run_files()["measurements.bin"] + encode(odd)


def far_ahead() -> bytes:
    return HEADER + encode(encode_measurements(make_measurements(2**63 - 1, own.META)))


WORDS = {"total_steps": 6, "batch": 8, "schedule": "cosine", "lr": True}
DEEP = b"[" * 100_000
PANIC = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA=="}}
LENGTH_OF_WORDS = json.dumps(SETTINGS | {"model_max_length": ""}).encode()
FOUND: dict[str, tuple[Callable[[Path, bytes], object], bytes]] = {
    "a time that is none": (own.read_diary, diary(time=None)),
    "a time before all time": (own.read_diary, diary(time="0001-01-01T00:00:00+23:59")),
    "a step of five thousand digits": (own.read_diary, diary(kind="resumed", message="from step " + "9" * 5000)),
    "fits without layers": (own.read_fits, b'{"schema_version": 1, "at": 55}'),
    "fits of nothing": (own.read_fits, run_file("fits.json", layers=[None])),
    "a class that is markup": (own.read_fits, run_file("fits.json", layers=[{"layer": 1, "class": "[/nothing]"}])),
    "a forecast without an end": (own.read_forecast, run_file("forecast.json", layers=[{"layer": 1, "end": 5}])),
    "a forecast of infinity": (own.read_forecast, b'{"schema_version": 1, "layers": 1e999}'),
    "a deep plan": (own.read_records, plan_of(DEEP)),
    "a plan of words": (own.read_records, plan_of(json.dumps(WORDS | {"total_steps": "all"}).encode())),
    "a plan without a name": (own.read_records, plan_of(json.dumps(WORDS | {"schedule": None}).encode())),
    "a step beyond all numbers": (own.read_whole, far_ahead()),
    "a header cut within its version": (own.read_records, b"\x89MArun\r\n\x02"),
    "a deep state": (own.read_trainer_state, DEEP),
    "a deep index": (own.read_index, DEEP),
    "a name too long for the disk": (own.read_index, json.dumps({"weight_map": {"a": "x" * 5000}}).encode()),
    "a home that cannot be": (own.read_list, b"1000 ~\0obody/step7\n"),
    "the home of nobody": (own.read_list, b"1000 ~nobody-at-all/step7\n"),
    "a log in the place of steps": (own.read_grid, b"\x93NUMPY" + b"\xff" * 40),
    "a page's tokenizer that panics": (slow.read_tokens, json.dumps(TOKENIZER | PANIC).encode()),
    "a probe's tokenizer that panics": (slow.read_vocabulary("tokenizer.json"), json.dumps(TOKENIZER | PANIC).encode()),
    "a length of words": (slow.read_vocabulary("tokenizer_config.json"), LENGTH_OF_WORDS),
    "less than no words": (slow.read_config, json.dumps(CONFIG | {"vocab_size": -1}).encode()),
    "a width of words": (slow.read_config, json.dumps(CONFIG | {"hidden_size": None}).encode()),
}
"""Each raised something else than an error of ours, or nothing, before it was mended."""


@pytest.mark.parametrize("find", FOUND)
def test_what_was_found_is_mended(tmp_path: Path, find: str) -> None:
    read, content = FOUND[find]
    with suppress(MaMonitorError):
        read(tmp_path, content)
