"""A real training, replay, report and logging, in a process whose environment holds secrets; all below ``sys.argv[1]``.

Run by ``test_secrets.py``.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from huggingface_hub.utils import _http

from ma_monitor import MassiveActivationCallback, MonitorConfig, Run
from ma_monitor.cli.__main__ import main
from ma_monitor.monitor import Observer
from ma_monitor.replay import asking
from tests.training import make_trainer


def session(root: Path) -> None:
    """All that writes or prints."""
    asking.FIRST_WAIT = 0.01
    _http.time = SimpleNamespace(sleep=lambda seconds: None, time=time.time)  # type: ignore[assignment, attr-defined]
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(root / "tensorboard")
    callback = MassiveActivationCallback(MonitorConfig(every=2))
    trainer = make_trainer(
        root / "out", [callback], report_to=["wandb", "tensorboard"], save_strategy="steps", save_steps=6
    )
    trainer.train()
    np.save(root / "ids.npy", np.arange(24).reshape(2, 12))
    probe = ["--probe-ids", str(root / "ids.npy"), "--out", str(root / "replayed")]
    codes = [
        main(["replay", str(root / "out"), *probe]),
        main(["report", str(root / "out" / "ma_monitor"), "--out", str(root / "report.html")]),
        main(["log", str(root / "out" / "ma_monitor"), "--to", "tensorboard", "--dir", str(root / "logged")]),
        main(["log", str(root / "out" / "ma_monitor"), "--to", "wandb", "--dir", str(root)]),
        main(["fit", str(root / "out" / "ma_monitor"), "--json"]),
        main(["watch", str(root / "out" / "ma_monitor")]),
    ]
    assert codes == [0] * len(codes), codes
    source = f"https://user:{os.environ['SOURCE_PASSWORD']}@host/lab/tiny"
    refused = [
        main(["replay", source, *probe]),
        main(["replay", "lab/tiny", *probe, "--json"]),  # the Hub's address holds a password, and nobody answers
        main(["predict", "lab/tiny"]),
        main(["import", source, "--out", str(root / "imported")]),
        main(["report", source]),
        main(["forecast", str(root / "replayed"), source]),
    ]
    assert refused == [2] * len(refused), refused
    assert trainer.state.global_step == 12
    observer = Observer(Run.open(root / "out" / "ma_monitor", writable=True))
    observer.fault("fetching", OSError(f"cannot reach {source}?X-Amz-Signature={os.environ['AWS_SESSION_TOKEN']}"))
    observer.close()


if __name__ == "__main__":
    session(Path(sys.argv[1]))
