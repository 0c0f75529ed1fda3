"""``ma-monitor ablate``: what it reads, prints, keeps and refuses, and what is shown of it afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaModel, PreTrainedTokenizerFast

from ma_monitor.ablation.experiment import TABLES, ablate
from ma_monitor.ablation.interventions import Rule
from ma_monitor.cli.__main__ import build_parser
from ma_monitor.cli.ablate import run
from ma_monitor.cli.log import emissions
from ma_monitor.errors import StoreError
from ma_monitor.report.ablation import read_ablation, tables
from ma_monitor.report.page import render
from ma_monitor.runs.documents import read_document, write_document
from ma_monitor.runs.store import Run
from ma_monitor.sinks.tensorboard import markdown
from tests.ablation.models import LAYERS, WIDTH, documents, spiky_documents, spiky_llama
from tests.cli.conftest import STEPS, Call, make_run
from tests.replay.conftest import hub, hub_server
from tests.replay.loopback import LoopbackHub
from tests.report.pages import HOSTILE, Page
from tests.training import VOCABULARY, tiny_llama

__all__ = ["hub", "hub_server"]  # fixtures


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a spike, and a tokenizer of words w0 … w39."""
    folder = tmp_path_factory.mktemp("ablate") / "checkpoint-40"
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    spiky_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> Path:
    """Two documents, and a line that is too short to be one."""
    lines = [" ".join(f"w{token}" for token in ids) for ids in spiky_documents(2)]
    file = checkpoint.parent / "held-out.txt"
    file.write_text("\n\n".join([*lines, "w3"]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def document(checkpoint: Path) -> dict[str, Any]:
    """What the command finds in the two documents, by the largest entry of each layer."""
    return {"checkpoint": checkpoint.name, "text": "held-out.txt", **ablate(spiky_llama(), spiky_documents(2), Rule(1))}


@pytest.fixture
def kept(tmp_path: Path, document: dict[str, Any]) -> Path:
    """A run of the small run's shape that holds it."""
    path = make_run(tmp_path / "run", steps=STEPS[:6])
    write_document(path, "ablation", document)
    return path


def test_it_is_kept(call: Call, checkpoint: Path, text: Path, tmp_path: Path, document: dict[str, Any]) -> None:
    path = make_run(tmp_path / "run", steps=STEPS[:6])
    said = call("ablate", checkpoint, "--text", text, "--top", 1, "--run", path, "--json").document
    assert said == document
    assert read_document(path, "ablation") == document
    assert (document["documents"], document["tokens"], document["emergence"]) == (2, 12 + 11, 2)


def test_it_is_shown_everywhere(kept: Path, document: dict[str, Any]) -> None:
    shown = tables(document)
    assert [one.key for one in shown] == [*TABLES, "quantisation"]

    page = Page(render([Run.open(kept)]))
    assert "What they do" in page.text
    assert "checkpoint-40: 2 documents of 23 tokens in all, from held-out.txt; float32." in page.text
    assert "Emergence layer: 2." in page.text
    *earlier, last = emissions(Run.open(kept))
    assert not any(key.startswith("ma/ablation") for before in earlier for key in before.tables)
    assert "ma/layers" in last.tables
    for one in shown:
        assert one.title in page.text
        for words in (words for row in one.cells for _, words in row):
            assert words in page.text
        logged = last.tables[f"ma/ablation/{one.key}"]
        assert len(logged.rows) == len(document[one.key])
        assert {len(row) for row in logged.rows} == {len(logged.columns)}
        assert markdown(logged).count("\n") == len(document[one.key]) + 1
    entries = last.tables["ma/ablation/entries"]
    row = dict(zip(entries.columns, entries.rows[0], strict=True))
    zero = document["entries"][0]
    assert (row["set to"], row["entries"]) == ("zero", LAYERS)
    assert [row[f"loss change{end}"] for end in ("", " from", " to")] == [
        zero[f"difference{end}"] for end in ("", "_low", "_high")
    ]


def test_words(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "ids.npy"
    np.save(file, np.stack([ids[:9] for ids in spiky_documents(2)]))
    result = call("ablate", checkpoint, "--ids", file, "--threshold", 1000)
    lines = result.out.splitlines()
    assert lines[0] == "checkpoint-40: 2 documents of 18 tokens in all, from ids.npy; float32."
    assert lines[1] == "Massive are entries of at least 1000 times the median of their layer and document."
    assert lines[2].startswith("Unchanged: loss 3.")
    assert lines[3] == "Emergence layer: 2."
    heads = next(line for line in lines if line.startswith("set to"))
    assert heads.split()[:5] == ["set", "to", "entries", "loss", "change"]
    zero = lines[lines.index(heads) + 1].split()
    assert zero[:2] == ["zero", "2"], "the spike in layers 2 and 3"
    softened = [line.split() for line in lines if line.split()[:1] in (["cap"], ["gain"], ["product"])]
    assert [words[2] for words in softened] == ["no", "yes", "no"] * 3


def test_token_ids_refused(refused: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "ids.npy"
    np.save(file, np.full((2, 9), VOCABULARY))
    assert "every probe id must be below the model's vocabulary" in refused("ablate", checkpoint, "--ids", file)
    file.write_text("none")
    assert "token ids must be one array [documents, tokens]" in refused("ablate", checkpoint, "--ids", file)


def malformed(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Documents that are none, by what is wrong with them."""
    row = document["entries"][0]
    return {
        "no table": {key: value for key, value in document.items() if key != "layers"},
        "a table of numbers": document | {"layers": 3},
        "rows of numbers": document | {"layers": [3]},
        "a row without a number": document | {"entries": [{**row, "difference": None, "effect": []}]},
        "text for a number": document | {"entries": [{**row, "difference_low": "x"}]},
        "no base": document | {"base": []},
        "an endless number": document | {"entries": [{**row, "effect": 10**400}]},
        "many rows": document | {"entries": [row] * 10_001},
        "another version": document | {"schema_version": 99},
    }


def test_a_malformed_document_is_left_out_and_named(
    kept: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = kept / "ablation.json"
    version = json.loads(file.read_text())["schema_version"]
    for wrong in malformed(document).values():
        file.write_text(json.dumps({"schema_version": version, **wrong}))
        with pytest.raises(StoreError, match=r"not what `ma-monitor ablate` writes|this ma_monitor reads"):
            read_ablation(kept)
    page = Page(render([Run.open(kept)]))
    assert "Ablation left out: " in page.text
    assert "What they do" not in page.text
    *_, last = emissions(Run.open(kept))
    assert "ablation left out: " in capsys.readouterr().err
    assert "ma/ablation/entries" not in last.tables


def test_hostile_words_stay_words(kept: Path, document: dict[str, Any]) -> None:
    text = HOSTILE.encode("utf-8", "replace").decode()
    row = document["entries"][0] | {"intervention": text}
    hostile = {"checkpoint": text, "text": text, "rule": text, "precision": text, "problems": [text], "entries": [row]}
    plain = Page(render([Run.open(kept)]))
    write_document(kept, "ablation", document | hostile)
    raw = render([Run.open(kept)])
    page = Page(raw)
    assert "What they do" in page.text
    assert set(page.tags) == set(plain.tags)
    assert page.tags.count("script") == plain.tags.count("script")
    assert "\x1b" not in raw


def test_refused(refused: Callable[..., str], checkpoint: Path, text: Path, tmp_path: Path) -> None:
    assert "must be an existing folder or a Hub id, and './none' is neither" in refused("ablate", "./none")
    assert "half written, there is no config.json" in refused("ablate", tmp_path)
    assert "must be a folder with config.json and weights, and" in refused("ablate", text)
    assert "--revision is of a model on the Hub" in refused("ablate", checkpoint, "--revision", "step3")
    assert "must be a ratio to the median above 1, got '1'" in refused("ablate", checkpoint, "--threshold", 1)
    assert "must be a ratio to the median above 1, got 'x'" in refused("ablate", checkpoint, "--threshold", "x")
    assert "not allowed with argument --top" in refused("ablate", checkpoint, "--top", 1, "--threshold", 9)
    assert "cannot be read so (No such file or directory)" in refused("ablate", checkpoint, "--text", tmp_path / "no")
    one = tmp_path / "one.txt"
    one.write_text("w1 w2 w3\n")
    assert "at least two of at least two tokens, got 1 of 3 tokens" in refused("ablate", checkpoint, "--text", one)
    assert "not a run: a run is a directory" in refused("ablate", checkpoint, "--run", tmp_path)


def test_a_run_of_another_model(refused: Callable[..., str], checkpoint: Path, text: Path, tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "two")
    for file in checkpoint.glob("tokenizer*"):
        (tmp_path / "two" / file.name).write_bytes(file.read_bytes())
    path = make_run(tmp_path / "run")
    told = refused("ablate", tmp_path / "two", "--text", text, "--run", path)
    assert f"has {LAYERS} layers of width {WIDTH}, the checkpoint 2 of {WIDTH}" in told


def test_a_checkpoint_without_a_head(refused: Callable[..., str], checkpoint: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    for file in checkpoint.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).parent.mkdir(exist_ok=True)
            (folder / file.name).write_bytes(file.read_bytes())
    body = spiky_llama().model
    assert isinstance(body, LlamaModel)
    config = (folder / "config.json").read_bytes()
    body.save_pretrained(folder)
    (folder / "config.json").write_bytes(config)
    told = refused("ablate", folder, "--text", text)
    assert "a loss needs a language model's head, and the weights of bare hold none" in told


@pytest.mark.slow
def test_a_model_on_the_hub(call: Call, hub: LoopbackHub, checkpoint: Path, text: Path) -> None:
    hub.put("org/spiky", "step40", checkpoint)
    document = call("ablate", "org/spiky", "--revision", "step40", "--text", text, "--json").document
    assert document["checkpoint"] == "org/spiky@step40"
    assert document["tokens"] == sum(map(len, documents(2)))


def test_help(call: Call) -> None:
    result = call("ablate", "--help")
    example = result.out.split("example:\n  ma-monitor ")[1].split()
    assert build_parser().parse_args(example).run is run
