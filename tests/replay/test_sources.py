from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_monitor.errors import SourceError
from ma_monitor.replay.sources import Checkpoint, folder_source, list_source, open_source, step_of


def write_checkpoint(folder: Path, *names: str) -> Path:
    """A folder that looks like a checkpoint; what is in the files does not matter to a source."""
    folder.mkdir(parents=True)
    for name in names or ("config.json", "model.safetensors"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("step0", 0),
        ("step143000", 143000),
        ("step-7", 7),
        ("step_7", 7),
        ("step1000-tokens4B", 1000),
        ("neox-14m-step3000", 3000),
        ("checkpoint-best", None),
        ("main", None),
        ("step", None),
        ("step12x", None),
        ("footstep12", None),
    ],
)
def test_step_of_reads_the_names_that_trainers_give(name: str, step: int | None) -> None:
    assert step_of(name) == step


@given(st.integers(min_value=0, max_value=10**9), st.sampled_from(["checkpoint-{}", "step{}", "run-a_step{}"]))
def test_step_of_reads_back_any_step(step: int, form: str) -> None:
    assert step_of(form.format(step)) == step


def test_folder_lists_checkpoints_in_the_order_of_steps(tmp_path: Path) -> None:
    for name in ("checkpoint-1000", "checkpoint-20", "step3"):
        write_checkpoint(tmp_path / name)
    write_checkpoint(tmp_path / "logs")
    (tmp_path / "checkpoint-7").write_text("a file, not a folder", encoding="utf-8")

    source = folder_source(tmp_path)

    assert [(c.step, c.name) for c in source.checkpoints] == [
        (3, "step3"),
        (20, "checkpoint-20"),
        (1000, "checkpoint-1000"),
    ]
    assert source.problems == ()
    assert source.name == tmp_path.name


def test_folder_gives_the_checkpoint_itself_and_leaves_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "step3")

    assert folder_source(tmp_path).fetch(Checkpoint(3, "step3"), tmp_path / "scratch") == folder

    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert not (tmp_path / "scratch").exists()


def test_a_checkpoint_itself_is_a_source(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run-step40")
    write_checkpoint(tmp_path / "run-step50")

    source = folder_source(tmp_path / "run-step40")

    assert source.checkpoints == (Checkpoint(40, "run-step40"),)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (("model.safetensors",), "no config.json"),
        (("config.json",), "no model.safetensors or pytorch_model.bin"),
        (("config.json", "optimizer.pt"), "no model.safetensors or pytorch_model.bin"),
        (("config.json", "model.safetensors.index.json"), "model.safetensors.index.json cannot be read"),
    ],
)
def test_a_half_written_checkpoint_is_left_out_and_named(tmp_path: Path, files: tuple[str, ...], why: str) -> None:
    write_checkpoint(tmp_path / "checkpoint-1")
    write_checkpoint(tmp_path / "checkpoint-2", *files)

    source = folder_source(tmp_path)

    assert source.checkpoints == (Checkpoint(1, "checkpoint-1"),)
    (problem,) = source.problems
    assert problem.startswith("checkpoint-2 left out: half written")
    assert why in problem


@pytest.mark.parametrize("present", [(), ("a.safetensors",), ("a.safetensors", "b.safetensors")])
def test_shards_must_all_be_there(tmp_path: Path, present: tuple[str, ...]) -> None:
    write_checkpoint(tmp_path / "checkpoint-1")
    folder = write_checkpoint(tmp_path / "checkpoint-2", "config.json", *present)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    source = folder_source(tmp_path)

    absent = [name for name in ("a.safetensors", "b.safetensors") if name not in present]
    assert len(source.checkpoints) == (1 if absent else 2)
    assert [problem.endswith(", ".join(absent)) for problem in source.problems] == [True] * bool(absent)


def test_two_checkpoints_of_one_step_give_one_and_a_problem(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step5")
    write_checkpoint(tmp_path / "checkpoint-5")

    source = folder_source(tmp_path)

    assert source.checkpoints == (Checkpoint(5, "step5"),)
    assert source.problems == ("checkpoint-5 left out: step5 is of the same step",)


@pytest.mark.parametrize("copy", ["backup-checkpoint-10", "zz-checkpoint-10"])
def test_a_name_without_a_prefix_goes_before_one_with(tmp_path: Path, copy: str) -> None:
    write_checkpoint(tmp_path / copy)
    assert folder_source(tmp_path).checkpoints == (Checkpoint(10, copy),)
    write_checkpoint(tmp_path / "checkpoint-10")

    source = folder_source(tmp_path)

    assert source.checkpoints == (Checkpoint(10, "checkpoint-10"),)
    assert source.problems == (f"{copy} left out: checkpoint-10 is of the same step",)


def test_a_checkpoint_that_was_being_written_is_left_out_and_named(tmp_path: Path) -> None:
    unfinished = write_checkpoint(tmp_path / "tmp-checkpoint-20")
    write_checkpoint(tmp_path / "checkpoint-10")

    source = folder_source(tmp_path)

    assert source.checkpoints == (Checkpoint(10, "checkpoint-10"),)
    assert source.problems == ("tmp-checkpoint-20 left out: half written, its name begins with tmp-",)
    with pytest.raises(SourceError, match="tmp-checkpoint-20 left out: half written"):
        folder_source(unfinished)


def test_a_folder_without_checkpoints_is_refused_with_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="must hold checkpoint-<step> or step<step> folders .* holds none$"):
        folder_source(tmp_path)
    write_checkpoint(tmp_path / "step9", "model.safetensors")
    with pytest.raises(SourceError, match=r"holds none; step9 left out: half written, there is no config\.json"):
        folder_source(tmp_path)


def test_tokenizer_comes_from_the_last_checkpoint_or_beside_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step1")
    last = write_checkpoint(tmp_path / "step2")
    source = folder_source(tmp_path)

    with pytest.raises(SourceError, match="needs the model's tokenizer"):
        source.fetch(source.checkpoints[-1], tmp_path, "tokenizer")
    (tmp_path / "tokenizer.json").touch()
    assert source.fetch(source.checkpoints[-1], tmp_path, "tokenizer") == tmp_path
    (last / "tokenizer.json").touch()
    assert source.fetch(source.checkpoints[-1], tmp_path, "tokenizer") == last


def test_an_existing_folder_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "owner" / "model" / "step4")
    monkeypatch.chdir(tmp_path)

    assert open_source("owner/model").checkpoints == (Checkpoint(4, "step4"),)
    with pytest.raises(SourceError, match="revisions are of a model on the Hub, and 'owner/model' is on this machine"):
        open_source("owner/model", "step4")


@pytest.mark.parametrize("text", ["./nowhere", "/no/such/folder", "a/b/c", "owner/model name"])
def test_what_is_neither_folder_nor_hub_id_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="existing folder or a Hub id"):
        open_source(text)


def test_a_list_names_folders_and_where_it_must_their_steps(tmp_path: Path) -> None:
    early = write_checkpoint(tmp_path / "a" / "step5")
    late = write_checkpoint(tmp_path / "elsewhere" / "exported model")
    (tmp_path / "list.txt").write_text(f"\n 70 {late}\na/step5\nno-step\na/step9\n", encoding="utf-8")

    source = open_source(str(tmp_path / "list.txt"))

    assert [(c.step, c.name) for c in source.checkpoints] == [(5, "a/step5"), (70, str(late))]
    assert source.name == "list"
    assert source.problems == (
        "a/step9 left out: half written, there is no config.json",
        "no-step left out: its name does not tell a step; write the step before it",
    )
    for checkpoint, folder in zip(source.checkpoints, (early, late), strict=True):
        assert source.fetch(checkpoint, tmp_path).resolve() == folder
        assert source.size(checkpoint) == len("{}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "list holds none$"),
        (b"step3", "step3 left out: half written"),
        (b"\xff", "must be UTF-8 text"),
    ],
)
def test_a_list_of_nothing_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(SourceError, match=words):
        list_source(tmp_path / "list.txt")
