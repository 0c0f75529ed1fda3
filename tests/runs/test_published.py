from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from ma_monitor.errors import SourceError, StoreError
from ma_monitor.runs.published import TEXT_LIMIT, Published, import_run, read_published
from ma_monitor.runs.records import UNKNOWN
from ma_monitor.runs.store import Run

SEQUENCES, LAYERS = 4, 5


def make_stats(seed: int, sequences: int = SEQUENCES, ranks: int = 3, layers: int = LAYERS) -> NDArray[np.float64]:
    """``[n, k + 1, L]``: ranks fall, the median is smallest."""
    return -np.sort(-np.random.default_rng(seed).lognormal(2, 1, (sequences, ranks + 1, layers)), axis=1)


def write_step(folder: Path, step: int, content: Any, model: str = "pythia-14m") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"exp2_{model}_step{step}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else repr(content))
    return file


def make_model(root: Path, name: str = "pythia_14m", steps: tuple[int, ...] = (0, 1, 1000, 20)) -> Path:
    for step in steps:
        write_step(root / name / "stats", step, make_stats(step).tolist())
    return root / name


def only(found: list[Published]) -> Published:
    (model,) = found
    return model


@pytest.mark.parametrize("inside", [".", "pythia_14m", "pythia_14m/stats"])
def test_a_root_a_model_and_its_stats_are_the_same(tmp_path: Path, inside: str) -> None:
    make_model(tmp_path)
    model = only(read_published(tmp_path / inside))
    assert (model.name, model.problems, model.plan) == ("pythia_14m", (), None)
    assert [m.step for m in model.measurements] == [0, 1, 20, 1000]
    for m in model.measurements:
        stats = make_stats(m.step)
        for layer in range(LAYERS):
            for sequence in range(SEQUENCES):
                assert m.top[layer, sequence].tolist() == stats[sequence, :3, layer].tolist()
                assert m.median[layer, sequence] == stats[sequence, 3, layer]
        assert (m.position == UNKNOWN).all()
        assert (m.nan == 0).all()


def test_a_relative_path_knows_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_model(tmp_path) / "stats")
    assert only(read_published("../stats")).name == "pythia_14m"
    monkeypatch.chdir("..")
    assert only(read_published("stats")).name == "pythia_14m"
    assert only(read_published(".")).name == "pythia_14m"


GOOD = make_stats(0).tolist()
MALFORMED: list[tuple[Any, str]] = [
    ("[[[1.0, 2.0], [1.0]], []]\n", "the lists are ragged"),
    ("", r"not a literal list \(JSONDecodeError\)"),
    (b"\x80\x04\x95pickle", "can't decode byte"),
    ("__import__('os').system('echo')", r"not a literal list \(JSONDecodeError\)"),
    ("[" * 200_000, r"not a literal list \(RecursionError\)"),
    (f"[[[1{'0' * 5000}], [1]]]", r"not a literal list \(ValueError\)"),
    ("(((3, 4.5), (1, 2)),)", "not a literal list"),
    ("[[[1.0, 2.0", "not a literal list"),
    ("[1, 2, 3]", r"got int64 of shape \(3,\)"),
    ('{"a": 1}', r"got object of shape \(\)"),
    ('[[["1", "2"]]]', r"got <U1|got str"),
    ("[[[true], [false]]]", "got bool"),
    ("[[[1e3]]]", r"got float64 of shape \(1, 1, 1\)"),
    ("[[[], []]]", r"shape \(1, 2, 0\)"),
    (f"[[[1{'0' * 400}], [1]]]", "got object"),
    ([[[-2.0], [-3.0]]], "holds negative numbers"),
    ([[[1.0], [2.0]]], "the ranks and the median do not fall"),
    (make_stats(1, layers=LAYERS + 1).tolist(), r"is \(6, 4, 3\), most steps have \(5, 4, 3\)"),
]


@pytest.mark.parametrize(("content", "message"), MALFORMED)
def test_a_malformed_file_is_named_and_left_out(tmp_path: Path, content: Any, message: str) -> None:
    path = make_model(tmp_path)
    write_step(path / "stats", 77, content)
    model = only(read_published(path))
    assert [m.step for m in model.measurements] == [0, 1, 20, 1000]
    (problem,) = model.problems
    assert problem.startswith("exp2_pythia-14m_step77: ")
    assert re.search(message, problem)


def test_the_first_step_may_be_the_odd_one(tmp_path: Path) -> None:
    path = make_model(tmp_path)
    write_step(path / "stats", 0, make_stats(0, layers=2).tolist())
    model = only(read_published(path))
    assert [m.step for m in model.measurements] == [1, 20, 1000]
    assert model.problems == ("exp2_pythia-14m_step0: [layer, sequence, rank] is (2, 4, 3), most steps have (5, 4, 3)",)


def test_names_that_are_not_understood_and_steps_that_come_twice_are_named(tmp_path: Path) -> None:
    path = make_model(tmp_path)
    (path / "stats" / "README.md").write_text("about")
    (path / "stats" / "exp2_pythia-14m_step0020").write_text(repr(GOOD))
    (path / "stats" / "exp2_pythia-14m_step-5").write_text(repr(GOOD))
    assert only(read_published(path)).problems == (
        "README.md: the name is not exp2_<model>_step<N>",
        "exp2_pythia-14m_step-5: the name is not exp2_<model>_step<N>",
        "exp2_pythia-14m_step20: step 20 is there twice",
    )


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = make_model(tmp_path)
    with write_step(path / "stats", 77, "").open("wb") as file:
        file.truncate(TEXT_LIMIT + 1)
    assert only(read_published(path)).problems == (
        f"exp2_pythia-14m_step77: {TEXT_LIMIT + 1} bytes, at most {TEXT_LIMIT} are read",
    )


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    path = make_model(tmp_path)
    (path / "stats" / "exp2_pythia-14m_step77").mkdir()
    (problem,) = only(read_published(path)).problems
    assert problem.startswith("exp2_pythia-14m_step77: ")
    assert "not a plain file" in problem


@pytest.mark.parametrize("word", [repr, json.dumps], ids=["python", "json"])
def test_overflow_and_nan_are_read_as_python_and_json_write_them(tmp_path: Path, word: Any) -> None:
    stats = make_stats(3)
    stats[0, 0, 0] = np.inf
    stats[1, :, 1] = np.nan
    file = write_step(tmp_path / "pythia_14m" / "stats", 3, word(stats.tolist()))
    (m,) = only(read_published(file.parent)).measurements
    np.testing.assert_array_equal(m.top, stats[:, :3].transpose(2, 0, 1))
    np.testing.assert_array_equal(m.median, stats[:, 3].T)


@given(
    hnp.arrays(np.float64, (2, 3, 4), elements=st.floats(0, allow_infinity=False)).map(lambda a: -np.sort(-a, axis=1)),
    st.integers(0, 10**15 - 1),
)
def test_every_float_comes_back_to_its_last_bit(
    tmp_path_factory: pytest.TempPathFactory, stats: NDArray[np.float64], step: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    write_step(folder, step, stats.tolist())
    (m,) = only(read_published(folder)).measurements
    assert m.step == step
    np.testing.assert_array_equal(m.top, stats[:, :2].transpose(2, 0, 1))


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("[[[]]]")
    for path in (tmp_path / "empty", tmp_path / "file.txt"):
        with pytest.raises(SourceError, match=rf"{path}: no measurements; expected pythia_<size>/stats/"):
            read_published(path)
    write_step(tmp_path / "pythia_1b" / "stats", 0, "[")
    with pytest.raises(SourceError, match=r"found: exp2_pythia-14m_step0: not a literal list"):
        read_published(tmp_path)


@pytest.mark.parametrize("name", ["gone", "gone.npz", "gone/stats"])
def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match=rf"{name}: no measurements, for there is no such file or folder"):
        read_published(tmp_path / name)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def iterdir(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(SourceError, match=rf"{tmp_path}: cannot be read \(Permission denied\)"):
        read_published(tmp_path)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


STEPS = np.array([0, 5, 10])
STATS = np.stack([make_stats(step) for step in STEPS])


@pytest.mark.parametrize(("planned", "rates"), [(10, 11), (10, 10), (40, 41)])
def test_an_npz_with_its_schedule(tmp_path: Path, planned: int, rates: int) -> None:
    lr = np.linspace(1, 0, rates).astype(np.float32)
    model = only(read_published(save(tmp_path / "mine.npz", steps=STEPS[::-1], stats=STATS[::-1], lr=lr, other=[1])))
    assert (model.name, model.problems) == ("mine", ())
    assert [m.step for m in model.measurements] == [0, 5, 10]
    np.testing.assert_array_equal(model.measurements[2].median, STATS[2, :, 3].T)
    assert model.plan is not None
    assert (model.plan.from_step, model.plan.total_steps) == (0, planned)
    np.testing.assert_array_equal(model.plan.lr, lr.astype(np.float64))


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (np.ones(9), r"lr: must hold a rate for every planned step, at least 10, got shape \(9,\)"),
        (np.ones((11, 2)), "lr: must hold a rate"),
        (np.array(["a"] * 11), "lr: must hold a rate"),
        (np.array([object()] * 11), "lr: Object arrays cannot be loaded"),
        (np.full(11, np.nan), "lr: the rates must be finite and at least 0"),
        (np.full(11, -1.0), "lr: the rates must be finite and at least 0"),
    ],
)
def test_a_bad_schedule_costs_the_schedule_only(tmp_path: Path, lr: NDArray[Any], message: str) -> None:
    model = only(read_published(save(tmp_path / "mine.npz", steps=STEPS, stats=STATS, lr=lr)))
    assert model.plan is None
    assert len(model.measurements) == 3
    (problem,) = model.problems
    assert re.match(f"mine.npz: {message}", problem)


def test_bad_steps_of_an_npz_are_named(tmp_path: Path) -> None:
    stats = np.concatenate([STATS, STATS])
    stats[4, 0, 0, 0] = -1
    steps = np.array([0, 5, 10, -3, 20, 10])
    model = only(read_published(save(tmp_path / "mine.npz", steps=steps, stats=stats)))
    assert [m.step for m in model.measurements] == [0, 5, 10]
    assert [problem.split(": ", 2)[1] for problem in model.problems] == [
        "steps[3] = -3",
        "steps[4] = 20",
        "steps[5] = 10",
    ]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"stats": STATS}, "needs the arrays `steps` and `stats`"),
        ({"steps": STEPS, "stats": STATS[:2]}, r"needs steps \[T\] as whole numbers"),
        ({"steps": STEPS.astype(float), "stats": STATS}, r"needs steps \[T\] as whole numbers"),
        ({"steps": STEPS, "stats": STATS[0]}, r"needs steps \[T\] as whole numbers"),
        ({"steps": STEPS[:0], "stats": STATS[:0]}, r"needs steps \[T\] as whole numbers"),
        ({"steps": STEPS, "stats": np.array([object()])}, "Object arrays cannot be loaded"),
    ],
)
def test_an_npz_without_what_is_needed(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=f"mine.npz: {message}"):
        read_published(save(tmp_path / "mine.npz", **arrays))


@pytest.mark.parametrize("size", [0, 1, 10, 200, -1])
def test_a_truncated_or_foreign_npz(tmp_path: Path, size: int) -> None:
    file = save(tmp_path / "mine.npz", steps=STEPS, stats=STATS)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(SourceError, match=r"found: mine.npz: \w"):
        read_published(file)
    file.write_bytes(b"\x80\x04\x95" + bytes(50))
    with pytest.raises(SourceError, match=r"found: mine.npz: .*allow_pickle"):
        read_published(file)


def test_an_npy_under_another_name(tmp_path: Path) -> None:
    with (tmp_path / "mine.npz").open("wb") as file:
        np.save(file, STATS)
    with pytest.raises(SourceError, match="mine.npz: holds one array, not an archive"):
        read_published(tmp_path / "mine.npz")


def test_one_model_becomes_a_run(tmp_path: Path) -> None:
    path = make_model(tmp_path / "data")
    write_step(path / "stats", 77, "[[1], []]")
    (imported,) = import_run(path, tmp_path / "run")
    assert (imported.name, imported.path, imported.steps) == ("pythia_14m", tmp_path / "run", 4)
    run = Run.open(tmp_path / "run")
    assert run.steps.tolist() == [0, 1, 20, 1000]
    assert run.layers == (1, 2, 3, 4, 5)
    assert (run.meta.first_layer, run.meta.k, run.meta.probe.sequences) == (1, 3, SEQUENCES)
    assert (run.meta.model.name, run.meta.probe.hash, run.plans) == ("pythia_14m", None, ())
    stats = make_stats(20)
    np.testing.assert_allclose(run.ratios()[:, 2], stats[:, 0].mean(0) / stats[:, 3].mean(0), rtol=1e-14)  # two sums
    assert [event.message for event in run.events if event.kind == "left out"] == list(imported.problems)


def test_several_models_become_runs_and_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    make_model(tmp_path / "data", "pythia_14m")
    make_model(tmp_path / "data", "pythia_70m", steps=(0, 512))
    write_step(tmp_path / "data" / "pythia_1b" / "stats", 0, "[")
    save(tmp_path / "data" / "mine.npz", steps=STEPS, stats=STATS, lr=np.ones(11))
    (tmp_path / "data" / "unrelated").mkdir()
    found = import_run(tmp_path / "data", tmp_path / "runs")
    assert [(i.name, i.path, i.steps) for i in found] == [
        ("mine", tmp_path / "runs" / "mine", 3),
        ("pythia_14m", tmp_path / "runs" / "pythia_14m", 4),
        ("pythia_1b", None, 0),
        ("pythia_70m", tmp_path / "runs" / "pythia_70m", 2),
    ]
    assert found[2].problems == ("exp2_pythia-14m_step0: not a literal list (JSONDecodeError)",)
    assert len(Run.open(tmp_path / "runs" / "mine").plans) == 1


def test_an_import_over_a_run_makes_none(tmp_path: Path) -> None:
    make_model(tmp_path / "data", "pythia_14m")
    make_model(tmp_path / "data", "pythia_70m")
    import_run(tmp_path / "data" / "pythia_70m", tmp_path / "runs" / "pythia_70m")
    with pytest.raises(StoreError, match="pythia_70m: already holds a run"):
        import_run(tmp_path / "data", tmp_path / "runs")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["pythia_70m"]


def test_two_models_of_one_name_make_no_run(tmp_path: Path) -> None:
    make_model(tmp_path / "data", "a")
    make_model(tmp_path / "data", "b")
    save(tmp_path / "data" / "a.npz", steps=STEPS, stats=STATS)
    with pytest.raises(
        SourceError, match=r"data: each model becomes a run of its name, but 2 would be .*runs/a; rename"
    ):
        import_run(tmp_path / "data", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_published_layout_that_is_shared(shared_data: Path, tmp_path: Path) -> None:
    (imported,) = import_run(shared_data / "published_layout" / "pythia_14m", tmp_path / "run")
    assert imported.steps == 30
    assert imported.problems == (
        "exp2_pythia-14m_step77: the lists are ragged, expected [sequence][rank…, median][layer]",
    )
    model = only(read_published(shared_data / "runs" / "neox-14m.npz"))
    assert model.plan is not None
    assert model.plan.total_steps == 12000
    whole = {m.step: m for m in model.measurements}
    rounding = 0.5e-6 + 1e-12  # the text has six decimals
    for m in Run.open(tmp_path / "run").measurements():
        np.testing.assert_allclose(m.top, whole[m.step].top, rtol=0, atol=rounding)
        np.testing.assert_allclose(m.median, whole[m.step].median, rtol=0, atol=rounding)
