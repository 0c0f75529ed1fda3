"""Dashboards that fail under way: full disks below them, errors of their own, accounts that are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from ma_monitor import MassiveActivationCallback, Run
from tests.faults.disks import FILLER, fill
from tests.faults.trainings import BEFORE, CONFIG, DUE, STRICT, At, faults, refuses, trained, undisturbed, warned
from tests.training import the_run


class KeepsItsFaults(TensorBoardCallback):
    """TensorBoard's reporter with its own faults kept from the Trainer, which dies of them otherwise."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        with suppress(OSError):
            super().on_log(*args, **kwargs)  # type: ignore[no-untyped-call]

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        with suppress(OSError):
            super().on_train_end(*args, **kwargs)  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_tensorboard_writer_that_raises(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(disk / "events"))
    callback, reporter = MassiveActivationCallback(CONFIG), KeepsItsFaults()  # type: ignore[no-untyped-call]
    assert trained(tmp_path, [reporter, callback, At(lambda: fill(disk))]) == undisturbed()
    run = Run.open(the_run(callback).path)
    assert run.steps.tolist() == DUE
    reason = "the tensorboard sink failed and is left out. OSError: [Errno 28] No space left on device"
    assert faults(run) == [reason]
    assert warned(caplog) == [f"ma_monitor: {reason}"]
    (disk / FILLER).unlink()
    again = KeepsItsFaults()  # type: ignore[no-untyped-call]
    strict: list[TrainerCallback] = [MassiveActivationCallback(STRICT), again, At(lambda: fill(disk))]
    refuses(tmp_path / "strict", OSError, "No space left on device", strict)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("watched", [False, True])
def test_the_trainers_own_tensorboard_ends_a_training_watched_or_not(
    watched: bool, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unwatched it has little to write, for which a page of the full disk may have room for some steps."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(disk / "events"))
    callback = MassiveActivationCallback(CONFIG)
    events: list[TrainerCallback] = [callback] if watched else []
    with pytest.raises(OSError, match="No space left on device"):
        trained(tmp_path, [*events, At(lambda: fill(disk))], report_to=["tensorboard"], max_steps=40)
    if watched:
        the_run(callback).close()
        assert Run.open(tmp_path / "ma_monitor").steps.tolist()[: len(BEFORE)] == BEFORE


class Ledger(TrainerCallback):
    """A reporter whose server does not want our scalars any more, from step 4 on."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "ma/max_ratio" in logs and state.global_step >= 4:
            raise ConnectionError(f"the ledger is closed at step {state.global_step}")


def test_a_reporter_that_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "ledger", Ledger)
    callback = MassiveActivationCallback(CONFIG)
    assert trained(tmp_path, [callback, Ledger()]) == undisturbed()
    run = Run.open(tmp_path / "ma_monitor")
    assert run.steps.tolist() == DUE
    reason = "the Ledger sink failed and is left out. ConnectionError: the ledger is closed at step 4"
    assert faults(run) == [reason]
    assert warned(caplog) == [f"ma_monitor: {reason}"]
    strict: list[TrainerCallback] = [MassiveActivationCallback(STRICT), Ledger()]
    refuses(tmp_path / "strict", ConnectionError, "closed at step 4", strict)


def test_an_alert_that_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The rules are pure and have no outside that could fail, so this one is patched."""

    def due_alerts(*_: Any) -> Any:
        raise ZeroDivisionError("a rule divided by nothing")

    monkeypatch.setattr("ma_monitor.monitor.due_alerts", due_alerts)
    callback = MassiveActivationCallback(CONFIG)
    assert trained(tmp_path, [callback]) == undisturbed()
    run = Run.open(tmp_path / "ma_monitor")
    assert run.steps.tolist() == DUE
    assert run.read_document("forecast") is not None
    assert faults(run) == ["the alerts failed and is left out. ZeroDivisionError: a rule divided by nothing"]
    assert warned(caplog) == [f"ma_monitor: {faults(run)[0]}"]
    strict: list[TrainerCallback] = [MassiveActivationCallback(STRICT)]
    refuses(tmp_path / "strict", ZeroDivisionError, "divided by nothing", strict)


@pytest.fixture
def refused_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A W&B account that W&B itself refuses, before it asks any server."""
    import wandb

    wandb.teardown()
    for name, value in {"WANDB_API_KEY": "wrong", "WANDB_MODE": "online", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    yield
    wandb.teardown()


class KeepsItsRefusal(WandbCallback):
    """W&B's reporter in a training that is to go on without W&B."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        import wandb

        with suppress(wandb.Error):
            super().setup(*args, **kwargs)  # type: ignore[no-untyped-call]

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to log to."""


def test_a_wandb_run_that_cannot_begin(refused_account: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There is nobody to report to, so there is no fault of the monitor's; it says nothing and measures all."""
    reporter = KeepsItsRefusal()  # type: ignore[no-untyped-call]
    assert trained(tmp_path, [reporter, MassiveActivationCallback(STRICT)]) == undisturbed()
    run = Run.open(tmp_path / "ma_monitor")
    assert run.steps.tolist() == DUE
    assert faults(run) == warned(caplog) == []


@pytest.mark.parametrize("callbacks", [list, lambda: [MassiveActivationCallback(CONFIG)]], ids=["plain", "watched"])
def test_the_trainers_own_wandb_ends_a_training_watched_or_not(
    callbacks: Callable[[], list[TrainerCallback]], refused_account: None, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="WANDB_API_KEY invalid"):
        trained(tmp_path, callbacks(), report_to=["wandb"])
    assert not (tmp_path / "ma_monitor").exists()
