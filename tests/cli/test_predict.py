"""``ma-monitor predict``: what it reads, prints and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTNeoXConfig, LlamaConfig

from ma_monitor.architecture.features import shape_of
from ma_monitor.architecture.prediction import packaged, predict
from ma_monitor.cli.__main__ import build_parser
from ma_monitor.cli.predict import BASE, run
from tests.cli.conftest import Call
from tests.replay.conftest import hub, hub_server
from tests.replay.loopback import LoopbackHub

__all__ = ["hub", "hub_server"]  # fixtures

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 2048,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a configuration."""
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    return tmp_path


def test_a_configuration(call: Call, folder: Path) -> None:
    expected = predict(LlamaConfig(**SIZES), 700).to_dict()
    for words in ((folder,), (folder / "config.json",)):
        document = call("predict", *words, "--steps", 700, "--json").document
        assert document["compare"] == []
        assert document["largest"]["factor"] == 1
        assert {key: document[key] for key in expected} == json.loads(json.dumps(expected))


def test_numbers_alone(call: Call) -> None:
    document = call("predict", "layers=3", "width=128", "heads=4", "--json").document
    config = GPTNeoXConfig(**{**SIZES, "vocab_size": BASE["vocabulary"]})
    assert document["shape"] == shape_of(config).to_dict(), "the MLP keeps its ratio"
    llama = call("predict", "family=llama", "layers=3", "--json").document
    assert llama["shape"]["rms_norm"]
    assert llama["shape"]["width"] == BASE["width"]


def test_what_if(call: Call, folder: Path) -> None:
    alternatives = ("heads=8", "layers=2,mlp=1024", "family=neox", str(folder / "config.json"))
    flags = [word for other in alternatives for word in ("--compare", other)]
    document = call("predict", folder, *flags, "--json").document
    rows = {row["model"]: row for row in document["compare"]}
    assert list(rows) == list(alternatives)
    base = LlamaConfig(**SIZES)
    fewer = predict(LlamaConfig(**{**SIZES, "num_attention_heads": 8}))
    ends = [layer["end"]["median"] for layer in fewer.to_dict()["layers"]]
    top = max(layer["end"]["median"] for layer in predict(base).to_dict()["layers"])
    assert rows["heads=8"]["largest"]["median"] == max(ends)
    assert rows["heads=8"]["largest"]["layer"] == 1 + ends.index(max(ends))
    assert rows["heads=8"]["largest"]["factor"] == pytest.approx(max(ends) / top)
    assert (rows["layers=2,mlp=1024"]["shape"]["layers"], rows["layers=2,mlp=1024"]["shape"]["mlp"]) == (2, 1024)
    assert rows["family=neox"]["shape"] == shape_of(GPTNeoXConfig(**SIZES)).to_dict()
    assert rows[alternatives[3]]["largest"]["factor"] == 1


def test_words(call: Call, folder: Path) -> None:
    result = call("predict", folder, "--compare", "heads=2", "--steps", 3000)
    lines = result.out.splitlines()
    assert lines[0].startswith("3 layers x 128, 4 heads, MLP 512, vocabulary 2,048, ")
    assert f"learned from {len(packaged().shapes)} shapes" in lines[1]
    assert lines[3].split("  ")[0] == "layer"
    assert [line.split()[0] for line in lines[4:7]] == ["1", "2", "3"]
    assert lines[8].startswith("what if")
    assert lines[9].endswith("x 1.00")
    assert lines[10].startswith("heads=2 ")


def test_warnings_are_on_stderr(call: Call) -> None:
    result = call("predict", "layers=20", "width=8192", "heads=64", "--json")
    document = result.document
    assert any("width 8.19e+03 lies outside of what was seen" in words for words in document["warnings"])
    assert result.err.count("ma-monitor: warning: layers=20 width=8192 heads=64: ") == len(document["warnings"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/config.json"], "there is no such file or folder; give a config.json"),
        (["family=mamba"], "family must be one of neox, llama, got 'mamba'"),
        (["layers=two"], "key=value gives a number, got layers='two'"),
        (["depth=3"], "has no number 'depth'"),
        (["width=100"], "cannot have {'width': 100}"),
        (["layers=0"], "needs `num_hidden_layers` as one whole number of at least 1"),
        (["layers=3", "--compare", "family=x"], "family must be one of"),
        (["layers=3", "--steps", "0"], "must be a whole number of at least 1"),
    ],
)
def test_refused(refused: Callable[..., str], words: list[str], message: str) -> None:
    assert message in refused("predict", *words)


def test_folders_refused(refused: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    assert "one configuration is predicted at a time" in refused("predict", folder, folder)
    assert "family=… describes a model by itself" in refused("predict", folder, "family=neox")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no configuration that transformers knows" in refused("predict", empty)


def test_a_model_of_another_kind(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert "needs `num_attention_heads` as one whole number of at least 1, and this mamba" in refused(
        "predict", tmp_path
    )


def test_a_model_on_the_hub(call: Call, refused: Callable[..., str], hub: LoopbackHub, folder: Path) -> None:
    hub.put("org/small", "main", folder)
    assert call("predict", "org/small", "--json").document["shape"] == shape_of(LlamaConfig(**SIZES)).to_dict()
    assert "there is no folder and no public model 'org/none'" in refused("predict", "org/none")


def test_help(call: Call) -> None:
    result = call("predict", "--help")
    example = result.out.split("example:\n  ma-monitor ")[1].split()
    assert build_parser().parse_args(example).run is run
    assert "--compare" in result.out
