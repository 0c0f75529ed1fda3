"""Nothing that comes with data is run: no pickle, no code of a checkpoint, a tokenizer, a configuration or the Hub."""

from __future__ import annotations

import ast
import json
import os
import pickle
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ma_monitor
from ma_monitor.cli.__main__ import main
from ma_monitor.errors import ConfigError, SourceError
from ma_monitor.replay.models import ModelLoader, blank_model
from ma_monitor.replay.probes import text_probe
from ma_monitor.replay.sources import Checkpoint, FolderSource, folder_source
from ma_monitor.runs.published import read_published
from ma_monitor.schedule import planned_rates
from tests.replay.makers import save_model
from tests.security.slow_targets import CONFIG, SETTINGS, TOKENIZER

ROOT = Path(ma_monitor.__file__).parent
EXAMPLES = ROOT.parent / "examples"
LOADERS = ("from_pretrained", "from_config")
PICKLES = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


@cache
def trees() -> tuple[tuple[Path, ast.AST], ...]:
    files = [file for folder in (ROOT, EXAMPLES) for file in folder.rglob("*.py")]
    return tuple((file, ast.parse(file.read_text(encoding="utf-8"))) for file in files)


def calls(*names: str) -> list[tuple[Path, str, ast.Call]]:
    """Calls of functions or methods of these names: in which file, of what, and the call."""
    nodes = [(file, node) for file, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [(file, ast.unparse(node.func), node) for file, node in nodes]
    return [(file, name, node) for file, name, node in named if name.rpartition(".")[2] in names]


def keyword(call: ast.Call, name: str) -> Any:
    return next((ast.literal_eval(word.value) for word in call.keywords if word.arg == name), None)


def test_no_module_imports_what_unpickles() -> None:
    imported = [
        (file.name, alias.name)
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in [*node.names, *([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else [])]
    ]
    assert len(imported) > 100, "or this test looks at nothing"
    assert [one for one in imported if one[1].partition(".")[0] in PICKLES] == []


def test_every_load_of_tensors_or_arrays_takes_nothing_else() -> None:
    for function, word, value in (("torch.load", "weights_only", True), ("np.load", "allow_pickle", False)):
        said = [keyword(call, word) for _, name, call in calls("load") if name == function]
        assert said, "or this test looks at nothing"
        assert said == [value] * len(said)


def test_code_of_a_repository_is_never_trusted() -> None:
    """What loads a model, its configuration or tokenizer says so itself, lest the library ask whoever sits there."""
    loading = [call for file, name, call in calls(*LOADERS) if ROOT in file.parents and not name.startswith("cls.")]
    said = [keyword(call, "trust_remote_code") for call in loading]
    assert len(said) >= 5, "or this test looks at nothing"
    assert said == [False] * len(said)
    words = [node for _, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    assert {ast.unparse(word.value) for word in words if word.arg == "trust_remote_code"} == {"False"}


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def saved_by_torch(value: Any, file: Path) -> None:
    torch.save({"weight": value}, file)


def saved_by_torch_of_old(value: Any, file: Path) -> None:
    torch.save({"weight": value}, file, _use_new_zipfile_serialization=False)


def bare(value: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(value))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint without weights."""
    folder = tmp_path / "saved" / "checkpoint-5"
    save_model(folder, seed=0)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("save", [saved_by_torch, saved_by_torch_of_old, bare])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_a_malicious_checkpoint_given_to_the_command(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, save: Callable[[Any, Path], None]
) -> None:
    save(Malicious(tmp_path / "executed"), checkpoint / name)
    if "-of-" in name:
        index = {"metadata": {}, "weight_map": {"weight": name}}
        (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for other in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):  # as a Trainer leaves them
        save(Malicious(tmp_path / "executed"), checkpoint / other)
    np.save(tmp_path / "ids.npy", np.arange(24).reshape(2, 12))
    command = [
        "replay",
        str(checkpoint.parent),
        "--probe-ids",
        str(tmp_path / "ids.npy"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(command) == 2
    assert "checkpoint-5 left out: its weights cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
    torch.load(checkpoint / name, weights_only=False) if save is not bare else pickle.loads(
        (checkpoint / name).read_bytes()
    )
    assert (tmp_path / "executed").exists(), "the file was harmless, so this test showed nothing"


def pickled_array(folder: Path) -> Any:
    return np.array([Malicious(folder)], dtype=object)


@pytest.mark.parametrize(
    ("name", "error", "read"),
    [
        ("lr.npy", ConfigError, lambda file: planned_rates(file, None)),
        ("lr.npz", ConfigError, lambda file: planned_rates(file, None)),
        ("model.npz", SourceError, read_published),
    ],
)
def test_arrays_of_objects_are_not_unpickled(
    tmp_path: Path, name: str, error: type[Exception], read: Callable[[Path], object]
) -> None:
    objects = pickled_array(tmp_path / "executed")
    if name.endswith(".npy"):
        np.save(tmp_path / name, objects, allow_pickle=True)
    else:
        np.savez(tmp_path / name, allow_pickle=True, lr=objects, steps=objects, stats=objects)
    with pytest.raises(error, match="allow_pickle=False"):
        read(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("command", ["--probe-ids", "--steps"])
def test_arrays_given_to_a_command_are_not_unpickled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    file = tmp_path / "array.npy"
    np.save(file, pickled_array(tmp_path / "executed"), allow_pickle=True)
    rest = (
        ["replay", str(tmp_path), "--out", str(tmp_path / "run")] if command == "--probe-ids" else ["forecast", "run"]
    )
    assert main([*rest, command, str(file)]) == 2
    assert "allow_pickle=False" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


CODE = "import os\nos.mkdir({!r})\nraise SystemExit('executed')\n"


@pytest.mark.parametrize("kind", ["gpt_neox", "own", "clip_vision_model"])
def test_code_beside_a_configuration_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of a known model, an unknown one, and one that no class for text is known of; nor if the user would say yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    own = {"auto_map": dict.fromkeys(names, "own.Own"), "model_type": kind}
    folder = tmp_path / "step5"
    folder.mkdir()
    (folder / "own.py").write_text(CODE.format(str(tmp_path / "executed")))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **own}))
    for read in (blank_model, ModelLoader(torch.float32, torch.device("cpu")).load):
        try:
            read(folder)
        except SourceError:
            pass
        assert not (tmp_path / "executed").exists()
    assert "own" not in sys.modules


def test_code_beside_a_tokenizer_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "step5"
    folder.mkdir()
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "own.py").write_text(CODE.format(str(tmp_path / "executed")))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps({**SETTINGS, **own}))
    probe = text_probe(FolderSource("made", {Checkpoint(5, "step5"): folder}, ()))
    assert probe.ids.shape[0] == 10, "the library's own class reads tokenizer.json"
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_kernels_of_the_hub_are_not_asked_for(tmp_path: Path, key: str, nested: bool) -> None:
    asked = {key: "kernels-community/flash-attn"}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **({"text_config": asked} if nested else asked)}))
    with pytest.raises(SourceError, match="asks for code from the Hub, which is not run .*flash-attn"):
        blank_model(tmp_path)


def test_an_adapter_beside_the_weights_brings_no_other_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its base model would be asked of the Hub."""
    from huggingface_hub import constants

    folder = tmp_path / "saved" / "checkpoint-5"
    save_model(folder, seed=0)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "somebody/else", "peft_type": "LORA", "auto_mapping": {"x": "own"}})
    )
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    source = folder_source(folder.parent)
    with pytest.raises(SourceError, match="adapter"):
        ModelLoader(torch.float32, torch.device("cpu")).load(source.folders[source.checkpoints[0]])
