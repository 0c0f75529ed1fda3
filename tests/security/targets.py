"""What reads files of other people, each with a way to make hostile ones.

The property of every target: it gives a value or raises one of `ma_monitor.errors`, soon and in little memory.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from rich.console import Console

from ma_monitor.cli import watch
from ma_monitor.cli.forecast import read_steps
from ma_monitor.config import MonitorConfig
from ma_monitor.learned.combiner import load
from ma_monitor.learned.correction import Corrections, packaged_path, save_prior
from ma_monitor.learned.prior import LEVELS, Prior
from ma_monitor.monitor import Observer
from ma_monitor.numerics.clock import learning_rate_clock
from ma_monitor.numerics.mixture import Mixture, make_mixture
from ma_monitor.replay import follow
from ma_monitor.replay.sources import list_source, weight_files
from ma_monitor.report.summary import about, faults, summary
from ma_monitor.runs.codec import MEASUREMENTS, encode_measurements, encode_phenomena, encode_plan, encode_rewind
from ma_monitor.runs.log import HEADER, encode
from ma_monitor.runs.published import read_published
from ma_monitor.runs.records import Plan
from ma_monitor.runs.store import Run
from ma_monitor.schedule import KEYS, planned_rates
from ma_monitor.sinks.telling import told_of
from tests.learned.past import LR, TOTAL, past_run
from tests.runs.makers import make_measurements, make_meta, make_plan
from tests.security.mutants import TEXTS, arrays, byte_mutants, json_bytes, npy_bytes, npz_bytes

META = make_meta(layers=2, sequences=2)


class Target(NamedTuple):
    """A reader: hostile content, and what it does with it in an empty folder."""

    name: str
    content: st.SearchStrategy[bytes]
    read: Callable[[Path, bytes], object]


@cache
def run_files() -> dict[str, bytes]:
    """The files of a short run with fits, a forecast and a diary."""
    with tempfile.TemporaryDirectory() as place:
        observer = Observer(Run.create(Path(place) / "run", META, make_plan()), MonitorConfig(strict=True))
        for step in range(0, 60, 5):
            observer.observe(make_measurements(step, META))
        observer.finish()
        observer.close()
        return {file.name: file.read_bytes() for file in (Path(place) / "run").iterdir()}


def opened(folder: Path, name: str, content: bytes) -> Run:
    """The short run with one of its files replaced."""
    for other, whole in run_files().items():
        (folder / other).write_bytes(whole)
    (folder / name).write_bytes(content)
    return Run.open(folder)


# ------------------------------------------------------------------------------------------------------------ a run


def at_a_glance(folder: Path) -> None:
    """What `ma-monitor watch` shows, on a terminal."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=40)
    snapshot = watch.read(folder)
    console.print(watch.view(snapshot, console, 0.0))
    json.dumps(snapshot.document(), allow_nan=False)


def read_meta(folder: Path, content: bytes) -> None:
    run = opened(folder, "run.json", content)
    run._repr_html_()
    about(run)
    at_a_glance(folder)


def read_records(folder: Path, content: bytes) -> None:
    run = opened(folder, "measurements.bin", content)
    run.ratios()
    run.measurements()
    about(run)
    at_a_glance(folder)


def read_whole(folder: Path, content: bytes) -> None:
    run = opened(folder, "measurements.bin", content)
    json.dumps(summary(run), allow_nan=False)


def read_diary(folder: Path, content: bytes) -> None:
    run = opened(folder, "events.jsonl", content)
    about(run)
    faults(run)
    told_of(run)
    at_a_glance(folder)


def read_fits(folder: Path, content: bytes) -> None:
    opened(folder, "fits.json", content)
    at_a_glance(folder)


def read_forecast(folder: Path, content: bytes) -> None:
    opened(folder, "forecast.json", content)
    at_a_glance(folder)


@st.composite
def logs(draw: st.DrawFn) -> bytes:
    """A log of whole frames, some of which hold what no run of ours would."""
    payloads = []
    for _ in range(draw(st.integers(1, 6))):
        step = draw(st.integers(0, 40) | st.sampled_from([2**31, 2**53, 2**62, 2**63 - 1]))
        payload = draw(
            st.sampled_from(
                [encode_measurements(make_measurements(step, META)), encode_rewind(step), encode_plan(make_plan(step))]
            )
            | st.just(step).flatmap(odd_plans)
        )
        payloads.append(draw(st.just(payload) | byte_mutants(payload)))
        if payload[0] == MEASUREMENTS and draw(st.booleans()):
            payloads.append(draw(odd_phenomena(step)))
    log = draw(st.sampled_from([HEADER, run_files()["measurements.bin"]])) + b"".join(map(encode, payloads))
    return draw(st.just(log) | byte_mutants(log))


@st.composite
def odd_phenomena(draw: st.DrawFn, step: int) -> bytes:
    """What was read besides measurements, in any shapes under any names."""
    read = {"kurtosis": np.ones(META.rows), "sinks": np.ones((META.rows, 2))}
    payload = encode_phenomena(replace(make_measurements(step, META), phenomena=read))
    at, end = payload.index(b"{"), payload.index(b"}") + 1
    words = draw(json_bytes(json.loads(payload[at:end])))
    odd = payload[: at - 8] + len(words).to_bytes(4, "little") + payload[at - 4 : at] + words + payload[end:]
    return draw(st.sampled_from([payload, odd]))


@st.composite
def odd_plans(draw: st.DrawFn, step: int) -> bytes:
    """A plan in whose words anything may stand."""
    plan = encode_plan(make_plan(step, total=6))
    at = plan.index(b"{")
    end = plan.index(b"}", at) + 1
    words = draw(json_bytes(json.loads(plan[at:end])))
    rates = draw(st.lists(st.floats(), min_size=7, max_size=7))
    odd = encode_plan(Plan(step, 6, np.array(rates), 8, "odd"))
    tail = draw(st.sampled_from([plan[end:], odd[odd.index(b"}") + 1 :]]))
    return plan[: at - 8] + len(words).to_bytes(4, "little") + plan[at - 4 : at] + words + tail


def diaries() -> st.SearchStrategy[bytes]:
    """Lines of a diary, most of them hostile."""
    line = json.loads(run_files()["events.jsonl"].splitlines()[0])
    kinds = st.sampled_from(["opened", "resumed", "alert", "fault", "weights", "replayed"])
    texts = st.sampled_from([*TEXTS, "created", "from step 5", line["time"]])
    words = st.fixed_dictionaries({"time": texts, "kind": kinds | texts, "message": texts})
    lines = (words.map(lambda value: json.dumps(value).encode())) | json_bytes(line)
    return st.lists(lines, min_size=1, max_size=4).map(b"\n".join)


# -------------------------------------------------------------------------------------------- what forecasts rest on


@cache
def mixture() -> Mixture:
    run = past_run(100)
    return make_mixture(learning_rate_clock(run.lr), run.steps[:30], run.ratios[:, :30], float(TOTAL))


@cache
def small_combiner() -> dict[str, Any]:
    """The packaged combiner with three of its trees."""
    document: dict[str, Any] = json.loads(packaged_path().read_text())
    model = document["trees"]["learner"]["gradient_booster"]["model"]
    model["trees"], model["tree_info"] = model["trees"][:3], model["tree_info"][:3]
    document["states"] = document["states"][:5]
    return document


@cache
def prior() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        time = np.linspace(0, 1, 5)
        quantiles = np.log(20.0) + np.arange(len(LEVELS))[None, :, None] * 0.3 + np.zeros((3, len(LEVELS), 5))
        save_prior(Prior(time, quantiles), TOTAL, float(LR[:-1].sum()), Path(place))
        document: dict[str, Any] = json.loads((Path(place) / "prior.json").read_text())
        return document


def read_combiner(folder: Path, content: bytes) -> None:
    (folder / "combiner.json").write_bytes(content)
    Corrections(folder)(mixture(), TOTAL)
    load(folder / "combiner.json")


def read_prior(folder: Path, content: bytes) -> None:
    (folder / "prior.json").write_bytes(content)
    Corrections(folder)(mixture(), TOTAL)


# ---------------------------------------------------------------------------------------------- published measurements

STATS = [[[30.0, 50.0], [20.0, 25.0], [10.0, 12.0], [1.0, 1.5]], [[3.0, 5.0], [2.0, 2.5], [1.0, 1.2], [0.1, 0.15]]]


def read_text(folder: Path, content: bytes) -> None:
    stats = folder / "pythia_1m" / "stats"
    stats.mkdir(parents=True)
    (stats / "exp2_pythia_1m_step0").write_text(json.dumps(STATS))
    (stats / "exp2_pythia_1m_step1").write_bytes(content)
    read_published(folder)


def read_archive(folder: Path, content: bytes) -> None:
    (folder / "model.npz").write_bytes(content)
    read_published(folder / "model.npz")


def archives() -> st.SearchStrategy[bytes]:
    """Archives with damage, and whole ones with anything in them."""
    stats = np.array([STATS, STATS])
    whole = npz_bytes(steps=np.array([0, 5]), stats=stats, lr=np.ones(6))
    odd = st.builds(
        lambda steps, own, lr: npz_bytes(steps=steps, stats=own, lr=lr),
        st.just(np.array([0, 5])) | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(np.array) | arrays(),
        st.just(stats) | arrays(),
        st.just(np.ones(6)) | arrays(),
    )
    return byte_mutants(whole) | odd


# ---------------------------------------------------------------------------------------------------------- schedules


def read_name(folder: Path, content: bytes) -> None:
    text, _, total = content.decode(errors="replace").rpartition("|")
    planned_rates(text, int(total) if total.isdecimal() and len(total) < 5 else 50)


def names() -> st.SearchStrategy[bytes]:
    options = st.builds(
        "{}={}".format, st.sampled_from(["warmup", "floor", "decay", "", "lr"]), st.sampled_from([*TEXTS, ".1", "nan"])
    )
    said = st.builds(
        lambda name, rest: f"{name}:{','.join(rest)}|7".encode(errors="surrogatepass"),
        st.sampled_from([*KEYS, *TEXTS]) | st.text(max_size=9),
        st.lists(options, max_size=3),
    )
    return said | byte_mutants(b"cosine:warmup=.01,floor=.1|100")


def schedule_in(suffix: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        file = folder / f"rates{suffix}"
        file.write_bytes(content)
        planned_rates(file, None)

    return read


def read_trainer_state(folder: Path, content: bytes) -> None:
    file = folder / "trainer_state.json"
    file.write_bytes(content)
    follow._ended(folder)
    planned_rates(file, None)


TRAINER_STATE = {
    "global_step": 4,
    "max_steps": 8,
    "log_history": [{"step": step, "learning_rate": 1e-3 / step, "loss": 2.0} for step in range(1, 5)],
}


# -------------------------------------------------------------------------------------------------------- checkpoints


def read_index(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content)
    weight_files(folder)


def read_list(folder: Path, content: bytes) -> None:
    (folder / "list.txt").write_bytes(content)
    list_source(folder / "list.txt")


def read_grid(folder: Path, content: bytes) -> None:
    file = folder / ("steps.npy" if content.startswith(b"\x93NUMPY") else "steps.txt")
    file.write_bytes(content)
    read_steps(str(file))


INDEX = {"metadata": {"total_size": 5}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


def targets() -> tuple[Target, ...]:
    """All that is fast enough for thousands of inputs a minute."""
    files = run_files()
    return (
        Target("run.json", json_bytes(json.loads(files["run.json"])), read_meta),
        Target("measurements.bin", logs(), read_records),
        Target("a damaged run.s page", logs(), read_whole),
        Target("events.jsonl", diaries(), read_diary),
        Target("fits.json", json_bytes(json.loads(files["fits.json"])), read_fits),
        Target("forecast.json", json_bytes(json.loads(files["forecast.json"])), read_forecast),
        Target("combiner.json", json_bytes(small_combiner()), read_combiner),
        Target("prior.json", json_bytes(prior()), read_prior),
        Target("published text", json_bytes(STATS), read_text),
        Target("published npz", archives(), read_archive),
        Target("schedule names", names(), read_name),
        Target("rates.json", json_bytes({"lr": [1.0, 0.5, 0.1]}), schedule_in(".json")),
        Target("rates.csv", byte_mutants(b"step,lr\n0,1.0\n5,.5\n9,.1\n"), schedule_in(".csv")),
        Target("rates.npy", byte_mutants(npy_bytes(np.ones(9))) | arrays().map(npy_bytes), schedule_in(".npy")),
        Target("rates.npz", byte_mutants(npz_bytes(lr=np.ones(9))), schedule_in(".npz")),
        Target("trainer_state.json", json_bytes(TRAINER_STATE), read_trainer_state),
        Target("index of weights", json_bytes(INDEX), read_index),
        Target("list of checkpoints", byte_mutants(b"step5\n1000 exports/early\n~nobody/step7\n"), read_list),
        Target("steps to forecast", byte_mutants(b"1 2,3\n40") | arrays().map(npy_bytes), read_grid),
    )
