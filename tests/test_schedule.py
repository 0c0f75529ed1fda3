from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import PartialState
from numpy.typing import NDArray
from torch.optim import lr_scheduler as torch_schedules

from ma_monitor.errors import ConfigError
from ma_monitor.schedule import planned_rates

TOTAL = 40
PEAK = 3e-3

Optimizer = torch.optim.Optimizer
Make = Callable[[Optimizer], Any]


def _sequential(optimizer: Optimizer) -> torch_schedules.SequentialLR:
    warm = torch_schedules.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    fall = torch_schedules.CosineAnnealingLR(optimizer, T_max=25)
    tail = torch_schedules.ExponentialLR(optimizer, gamma=0.9)
    return torch_schedules.SequentialLR(optimizer, [warm, fall, tail], milestones=[5, 30])


def _chained(optimizer: Optimizer) -> torch_schedules.ChainedScheduler:
    first = torch_schedules.ConstantLR(optimizer, factor=0.1, total_iters=7)
    return torch_schedules.ChainedScheduler([first, torch_schedules.ExponentialLR(optimizer, gamma=0.95)], optimizer)


def _onecycle(optimizer: Optimizer) -> torch_schedules.OneCycleLR:
    return torch_schedules.OneCycleLR(optimizer, max_lr=[PEAK, 2 * PEAK], total_steps=TOTAL)


def _named(name: str, **kwargs: Any) -> Make:
    def make(optimizer: Optimizer) -> Any:
        return transformers.get_scheduler(name, optimizer, 4, TOTAL, scheduler_specific_kwargs=kwargs)

    return make


MAKERS: dict[str, Make] = {
    "lambda": lambda o: torch_schedules.LambdaLR(o, lambda s: 1 / (1 + s)),
    "multiplicative": lambda o: torch_schedules.MultiplicativeLR(o, lambda s: 0.97),
    "step": lambda o: torch_schedules.StepLR(o, step_size=7, gamma=0.5),
    "held at first": lambda o: torch_schedules.ConstantLR(o, factor=0.2, total_iters=9),
    "rising": lambda o: torch_schedules.LinearLR(o, start_factor=0.1, total_iters=9),
    "exponential": lambda o: torch_schedules.ExponentialLR(o, gamma=0.9),
    "averaging": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-4, anneal_epochs=9),
    "multistep": lambda o: torch_schedules.MultiStepLR(o, milestones=[3, 20]),
    "cosine": lambda o: torch_schedules.CosineAnnealingLR(o, T_max=TOTAL, eta_min=1e-5),
    "restarts": lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, T_0=6, T_mult=2),
    "polynomial": lambda o: torch_schedules.PolynomialLR(o, total_iters=TOTAL, power=2.0),
    "cyclic": lambda o: torch_schedules.CyclicLR(o, base_lr=1e-4, max_lr=PEAK, step_size_up=6, mode="triangular2"),
    "onecycle": _onecycle,
    "sequential": _sequential,
    "chained": _chained,
    "transformers linear": _named("linear"),
    "transformers cosine": _named("cosine"),
    "transformers restarts": _named("cosine_with_restarts", num_cycles=2),
    "transformers polynomial": _named("polynomial"),
    "transformers constant": _named("constant"),
    "transformers warm-up": _named("constant_with_warmup"),
    "transformers inverse sqrt": _named("inverse_sqrt"),
    "transformers min lr": _named("cosine_with_min_lr", min_lr_rate=0.1),
    "transformers wsd cosine": _named("warmup_stable_decay", num_decay_steps=10, decay_type="cosine"),
    "transformers min lr warm-up": _named("cosine_warmup_with_min_lr", min_lr_rate=0.1),
    "transformers wsd": _named("warmup_stable_decay", num_decay_steps=10),
}


def _optimizer() -> torch.optim.AdamW:
    """Two groups; the second has most parameters and twice the rate."""
    small, large = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3, 4))
    groups: list[dict[str, Any]] = [{"params": [small]}, {"params": [large], "lr": 2 * PEAK}]
    return torch.optim.AdamW(groups, lr=PEAK)


def _train(optimizer: Optimizer, schedule: Any, updates: int) -> list[float]:
    """Rate of the second group in each of so many real updates."""
    used = []
    for _ in range(updates):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = p.detach().sin()
        used.append(float(optimizer.param_groups[1]["lr"]))
        optimizer.step()
        schedule.step()
    return used


def _rates(schedule: object, total: int | None = TOTAL, optimizer: object = None) -> NDArray[np.float64]:
    lr = planned_rates(schedule, total, optimizer).lr
    assert lr is not None
    return lr


def _state(optimizer: Optimizer, schedule: Any) -> str:
    return repr((optimizer.state_dict(), schedule.state_dict()))


def test_every_scheduler_of_torch_and_transformers_is_tried_here() -> None:
    """What a later version adds makes this fail, until its future is known here too."""
    tried = {type(make(_optimizer())).__name__ for make in MAKERS.values()}
    moved = {"ReduceLROnPlateau", "LRScheduler"}  # decided by losses; and the base class
    assert set(torch_schedules.__all__) <= tried | moved
    names = ["reduce_lr_on_plateau", "greedy"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers, "get_scheduler", lambda name, *args, **kwargs: names.append(name))
        for make in MAKERS.values():
            make(_optimizer())
    assert set(names) == {kind.value for kind in transformers.SchedulerType}


@pytest.mark.parametrize("name", MAKERS)
def test_a_scheduler_gives_the_rates_that_training_uses(name: str) -> None:
    optimizer = _optimizer()
    schedule = MAKERS[name](optimizer)
    planned = _rates(schedule)
    assert planned.shape == (TOTAL + 1,)
    assert not planned_rates(schedule, TOTAL).held
    np.testing.assert_array_equal(planned[:TOTAL], _train(optimizer, schedule, TOTAL))


@pytest.mark.parametrize("done", [1, 5, 17, TOTAL - 1, TOTAL])
@pytest.mark.parametrize("name", MAKERS)
def test_a_scheduler_that_was_stepped_gives_the_same_array(name: str, done: int) -> None:
    optimizer = _optimizer()
    schedule = MAKERS[name](optimizer)
    at_start = planned_rates(schedule, TOTAL)
    _train(optimizer, schedule, done)
    later = planned_rates(schedule, TOTAL)
    assert later.lr is not None
    np.testing.assert_array_equal(later.lr, _rates(MAKERS[name](_optimizer())))
    assert later.schedule == at_start.schedule


@pytest.mark.parametrize("name", MAKERS)
def test_neither_the_scheduler_nor_the_optimizer_is_touched(name: str) -> None:
    ends = []
    for look in (False, True):
        optimizer = _optimizer()
        schedule = MAKERS[name](optimizer)
        for _ in range(4):
            before = _state(optimizer, schedule)
            if look:
                planned_rates(schedule, TOTAL)
            assert _state(optimizer, schedule) == before
            _train(optimizer, schedule, 5)
        ends.append(
            (_state(optimizer, schedule), [p.detach().clone() for g in optimizer.param_groups for p in g["params"]])
        )
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


def test_a_resumed_scheduler_gives_the_same_array() -> None:
    optimizer = _optimizer()
    schedule = _sequential(optimizer)
    whole = _rates(schedule)
    _train(optimizer, schedule, 12)
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    optimizer = _optimizer()
    schedule = _sequential(optimizer)
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    np.testing.assert_array_equal(_rates(schedule), whole)


def test_a_schedule_changed_at_the_resume_is_said() -> None:
    optimizer = _optimizer()
    schedule = torch_schedules.LambdaLR(optimizer, lambda s: 1 / (1 + s))
    _train(optimizer, schedule, 10)
    changed = torch_schedules.LambdaLR(optimizer, lambda s: 0.5)
    schedule.lr_lambdas = changed.lr_lambdas
    optimizer.param_groups[1]["lr"] = 2 * PEAK / 11  # as training left it
    rates = planned_rates(schedule, TOTAL)
    assert rates.schedule == "LambdaLR; before step 10 as this schedule would have been"
    assert rates.lr is not None
    np.testing.assert_array_equal(rates.lr[[9, 10, 11]], [PEAK, 2 * PEAK / 11, PEAK])


def test_a_plan_that_has_been_passed_gives_its_own_rates() -> None:
    optimizer = _optimizer()
    schedule = torch_schedules.ExponentialLR(optimizer, gamma=0.9)
    whole = _rates(schedule, 10)
    _train(optimizer, schedule, 25)
    np.testing.assert_array_equal(_rates(schedule, 10), whole)


def test_onecycle_holds_its_last_rate_past_its_end() -> None:
    schedule = _onecycle(_optimizer())
    longer = _rates(schedule, TOTAL + 9)
    assert longer[-1] == longer[TOTAL + 1] < longer[TOTAL // 2]


@pytest.mark.parametrize("name", ["transformers cosine", "onecycle", "cosine"])
@pytest.mark.parametrize("split", [False, True])
def test_accelerates_wrapper_steps_once_a_process(name: str, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Accelerator(cpu=True)
    monkeypatch.setitem(PartialState().__dict__, "num_processes", 3)
    optimizer = _optimizer()
    optimizer.step_was_skipped = False  # type: ignore[attr-defined]
    wrapped = AcceleratedScheduler(MAKERS[name](optimizer), optimizer, split_batches=split)
    fresh = _rates(wrapped)
    np.testing.assert_array_equal(fresh[:20], _train(optimizer, wrapped, 20))
    same_end = slice(None) if name != "onecycle" or split else slice(0, TOTAL // 3)
    np.testing.assert_array_equal(_rates(wrapped)[same_end], fresh[same_end])


def test_a_wrapper_that_leaves_stepping_to_an_engine_counts_once() -> None:
    class EngineSteps(AcceleratedScheduler):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> None:
            """The engine steps."""

    schedule = torch_schedules.ExponentialLR(_optimizer(), gamma=0.9)
    np.testing.assert_array_equal(_rates(EngineSteps(schedule, [])), _rates(schedule))


@pytest.mark.parametrize(
    "make",
    [
        torch_schedules.ReduceLROnPlateau,
        lambda o: transformers.get_scheduler("reduce_lr_on_plateau", o),
        lambda o: transformers.get_scheduler("greedy", o),
        lambda o: transformers.optimization.AdafactorSchedule(o, PEAK),
    ],
)
def test_what_training_decides_holds_the_present_rate(make: Make) -> None:
    optimizer = _optimizer()
    rates = planned_rates(make(optimizer), TOTAL)
    assert "cannot be known in advance" in rates.schedule
    assert "is held" in rates.schedule
    assert rates.held
    assert rates.lr is not None
    np.testing.assert_array_equal(rates.lr, np.full(TOTAL + 1, optimizer.param_groups[1]["lr"]))


def test_a_scheduler_that_breaks_holds_the_present_rate() -> None:
    class Broken(torch_schedules.LRScheduler):
        def get_lr(self) -> list[float]:  # type: ignore[override]
            if self.last_epoch > 3:
                raise RuntimeError("no more")
            return [float(g["lr"]) for g in self.optimizer.param_groups]

    rates = planned_rates(Broken(_optimizer()), TOTAL)
    assert "could not be replayed (RuntimeError('no more'))" in rates.schedule
    assert rates.lr is not None
    assert set(rates.lr) == {2 * PEAK}


def test_no_scheduler_holds_the_optimizers_rate() -> None:
    rates = planned_rates(None, TOTAL, _optimizer())
    assert rates.schedule == "no scheduler: the present rate 0.006 is held"
    assert rates.lr is not None
    assert set(rates.lr) == {2 * PEAK}


def test_an_unknown_length_gives_no_rates() -> None:
    optimizer = _optimizer()
    assert planned_rates(_chained(optimizer), None).lr is None
    assert planned_rates(None, None, optimizer).lr is None
    assert planned_rates(None, TOTAL).schedule == "unknown"
    with pytest.raises(ConfigError, match="planned length, which is unknown; give total_steps"):
        planned_rates("cosine", None)


def test_a_tensor_rate_is_read() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=torch.tensor(PEAK))
    schedule = torch_schedules.LambdaLR(optimizer, lambda s: 0.5**s)
    np.testing.assert_allclose(_rates(schedule, 3), PEAK * 0.5 ** np.arange(4), rtol=1e-6)  # a float32 rate
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(PEAK)


def test_a_name_agrees_with_the_trainers_own_scheduler() -> None:
    optimizer = _optimizer()
    live = _rates(transformers.get_cosine_schedule_with_warmup(optimizer, 4, TOTAL))
    np.testing.assert_allclose(_rates("cosine:warmup=.1"), live / (2 * PEAK), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("schedule", [7, object()])
def test_something_else_is_refused(schedule: object) -> None:
    with pytest.raises(ConfigError, match="a schedule is a scheduler, a name, a file or an array"):
        planned_rates(schedule, TOTAL)


def test_a_real_trainers_state_gives_the_rates_it_used(tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.GPTNeoXForCausalLM(config)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=2, learning_rate=PEAK, warmup_steps=3,
        lr_scheduler_type="cosine", logging_steps=1, save_steps=12, report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    state = _rates(tmp_path / "checkpoint-12" / "trainer_state.json", None)
    live = _rates(trainer.lr_scheduler, 12)
    np.testing.assert_allclose(state[:12], live[:12], rtol=1e-12)


def _npy(values: NDArray[np.float64]) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _npz(method: int | None = None) -> bytes:
    """An archive whose ``lr`` is not what it says: corrupt, or of a compression method that nobody knows."""
    file = io.BytesIO()
    np.savez_compressed(file, lr=np.linspace(1.0, 0.1, TOTAL))
    data = bytearray(file.getvalue())
    if method is None:
        data[data.index(b"lr.npy") + 40 : data.index(b"lr.npy") + 60] = b"\xff" * 20
    for at in (data.index(b"PK\x03\x04") + 8, data.index(b"PK\x01\x02") + 10):
        data[at] = data[at] if method is None else method
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("empty.npy", b"", "EOFError"),
        ("cut.npy", _npy(np.ones(TOTAL))[:150], "ValueError"),
        ("cut.npz", _npz()[:60], "BadZipFile"),
        ("corrupt.npz", _npz(), "error"),
        ("unknown.npz", _npz(method=97), "NotImplementedError"),
        ("short.csv", b"step,lr\n0,1.0\n1\n", "IndexError"),
        ("words.json", b'{"log_history": ["learning_rate"]}', "AttributeError"),
        ("deep.json", b"[" * 200_000, "nested too deeply"),
        ("endless.json", b'{"log_history": [{"step": 1, "learning_rate": 1}], "max_steps": 1e999}', "OverflowError"),
        ("binary.json", b"\xff\xfe", "UnicodeDecodeError"),
    ],
)
def test_whatever_is_wrong_with_a_file_is_one_message(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    suffix = Path(name).suffix
    rule = rf"a file of rates must be readable as {suffix}, but .*{name} is not \(.*{error}.*\); check the file"
    with pytest.raises(ConfigError, match=rule):
        planned_rates(tmp_path / name, TOTAL if name != "endless.json" else None)


def test_the_module_loads_no_torch() -> None:
    code = "import sys, ma_monitor.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
