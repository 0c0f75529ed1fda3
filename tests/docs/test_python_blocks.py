"""Every Python block of README and the documentation runs: one page after another, with what its reader would have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

from ma_monitor import MassiveActivationCallback, Monitor, MonitorConfig, Probe, Run
from ma_monitor.runs.published import import_run
from tests.docs.blocks import PAGES, ROOT, name, python_blocks
from tests.training import ROWS, VOCABULARY, Rows, make_trainer, tiny_llama

RECORDED = ROOT / "benchmarks" / "runs" / "sweep" / "sweep-neox-18x384-h6-m4-v16k-s0.npz"
DONE, PLANNED = 6, 12
"""Updates before a resume, and in all."""
OWN_TESTS = ("README.md", "docs/dashboards.md", "docs/paper.md", "docs/predict.md", "docs/recipes.md")
CODE = {name(page): python_blocks(page.read_text(encoding="utf-8")) for page in PAGES}


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(character) % VOCABULARY for character in text]}


def setting(page: str, folder: Path) -> dict[str, Any]:
    """What a reader has already who copies a block: a model, its data and a training; and runs on disk."""
    trainer = make_trainer(folder / "out", [MassiveActivationCallback()], save_strategy="steps", save_steps=DONE)
    model, probe = tiny_llama(max_position_embeddings=512), Probe.from_ids(Rows().ids.numpy()[:4])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    row = Rows().ids[:4]
    own = {
        "model": model,
        "args": trainer.args,
        "rows": Rows(),
        "texts": ["some text of ours. " * ROWS],
        "tokenizer": tokenizer,
        "probe": probe,
        "config": MonitorConfig(),
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "batches": [{"input_ids": row, "labels": row}] * 3,
        "total_steps": 3,
        "updates_done": DONE,
        "Trainer": Trainer,
    }
    if page == "README.md":  # whose first block leaves open what else a Trainer is given
        own["Trainer"] = lambda _, callbacks: make_trainer(folder / "out", callbacks)
    if page == "docs/start.md":
        import_run(RECORDED, folder / "runs" / "mine")
    if any('Run.open("runs/a")' in block for block in CODE[page]):
        import_run(RECORDED, folder / "runs" / "a")
    if page == "docs/recipes.md":
        trainer.args.max_steps = DONE
        trainer.train()
        trainer.args.max_steps = PLANNED
        first = Monitor(model, probe, run_dir="runs/mine", schedule="cosine:warmup=.01", total_steps=1000)
        for step in range(DONE + 1):
            first.step(step)
        first.close()
    if page == "docs/predict.md":
        layers, quantiles = model.config.num_hidden_layers, np.linspace(1.0, 2.0, 7)
        own |= {"total_steps": 1000, "lr": np.full(1001, 1e-3), "now": 0.4, "times": np.array([0.5, 1.0])}
        own["recent_log_ratio"] = np.full(layers, 1.5)
        own["forecast_log_quantiles"] = np.broadcast_to(quantiles[:, None], (layers, 7, 2))
    return own


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in. W&B writes files there and asks no network."""
    monkeypatch.chdir(tmp_path)
    for key, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(key, value)
    return tmp_path


@pytest.fixture
def wandb_run(folder: Path) -> Iterator[None]:
    """An active run of W&B, for the page that needs one."""
    import wandb

    wandb.teardown()
    wandb.init(project="docs")
    yield
    wandb.finish()
    wandb.teardown()


def run_page(page: str, folder: Path) -> dict[str, Any]:
    """Runs the blocks of a page in one namespace, as a reader who goes down the page."""
    names = setting(page, folder)
    for code in CODE[page]:
        exec(compile(code, ROOT / page, "exec"), names)
        if isinstance(names.get("monitor"), Monitor):
            names["monitor"].close()
    return names


def test_readme(folder: Path) -> None:
    names = run_page("README.md", folder)
    names["trainer"].train()
    with Run.open(folder / "out" / "ma_monitor") as run:
        assert run.steps.tolist() == [0, 1, 2, 4, 8, 12]
    with Run.open(folder / "runs" / "a") as run:
        assert run.steps.tolist() == [0, 1, 2]
        assert run.plans[0].total_steps == 100_000


@pytest.mark.parametrize("page", [page for page, code in CODE.items() if code and page not in OWN_TESTS])
def test_a_page(page: str, folder: Path) -> None:
    run_page(page, folder)


def test_prediction_page(folder: Path) -> None:
    names = run_page("docs/predict.md", folder)
    assert names["both"].shape == (names["model"].config.num_hidden_layers, 7, 2)


@pytest.mark.slow
def test_dashboards_page(folder: Path, wandb_run: None) -> None:
    run_page("docs/dashboards.md", folder)
    assert list((folder / "tb").iterdir())


@pytest.mark.slow
def test_paper_page(folder: Path) -> None:
    run_page("docs/paper.md", folder)
    assert {path.name for path in folder.iterdir()} >= {"trajectories.png", "fits.svg", "heat.pdf"}


@pytest.mark.slow
def test_recipes_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("docs/recipes.md", folder)
    with Run.open(folder / "out" / "ma_monitor") as resumed:
        assert resumed.steps.tolist() == [0, 1, 2, 4, 6, 8, 12]
    assert [event["kind"] for event in names["diary"]] == ["opened", "opened", "resumed"]
    told = capsys.readouterr().out
    assert re.search(r"^18 \w+ (peak not identified|\d)", told, re.MULTILINE)
