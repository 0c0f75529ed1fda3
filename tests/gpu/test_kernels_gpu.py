"""Triton's kernels on a CUDA device: exact, waiting for nothing, and small."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ma_monitor import Probe
from ma_monitor.measure import launch
from ma_monitor.measure.forward import measure
from ma_monitor.measure.statistics import activation_statistics
from tests.measure.activations import SEQUENCES, misleading

pytestmark = pytest.mark.gpu

SHAPES = [(10, 512, 128), (3, 2048, 768), (13, 100, 1000)]
"""Below and above the sample's size, and more sequences than one launch takes."""


def equals_pytorch(hidden: torch.Tensor, k: int = 3) -> bool:
    """PyTorch's back end, which the default tests compare with a sort, on the host."""
    return torch.equal(
        activation_statistics(hidden.cuda(), k, backend="triton").packed.cpu(),
        activation_statistics(hidden, k, backend="torch").packed,
    )


@pytest.mark.parametrize("dtype", launch.DTYPES)
@pytest.mark.parametrize("kind", sorted(SEQUENCES))
def test_the_kernels_equal_pytorchs_back_end(kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        assert equals_pytorch(SEQUENCES[kind](*shape).to(dtype)), shape


@pytest.mark.parametrize("dtype", launch.DTYPES)
def test_a_sample_that_misleads_costs_time_only(dtype: torch.dtype) -> None:
    assert equals_pytorch(misleading(2, 512, 768).to(dtype))


@pytest.mark.parametrize("kind", ["massive", "not finite", "two values", "half zero"])
def test_pytorchs_back_end_is_the_same_on_both_devices(kind: str) -> None:
    for dtype in launch.DTYPES:
        hidden = SEQUENCES[kind](2, 512, 768).to(dtype)
        got = activation_statistics(hidden.cuda(), 3, backend="torch").packed.cpu()
        assert torch.equal(got, activation_statistics(hidden, 3, backend="torch").packed), dtype


@pytest.mark.parametrize("k", [1, 20])
def test_any_number_of_ranks(k: int) -> None:
    assert equals_pytorch(SEQUENCES["massive"](2, 512, 768), k)
    assert equals_pytorch(SEQUENCES["few values"](2, 3, 2), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_pythia_against_a_sort(dtype: torch.dtype) -> None:
    hidden = SEQUENCES["massive"](3, 2048, 5120).to(dtype).cuda()
    got = activation_statistics(hidden, 3)
    ordered = hidden.float().abs().flatten(1).sort(dim=1).values
    assert torch.equal(got.median, ordered[:, (ordered.shape[1] - 1) // 2])
    assert torch.equal(got.top.abs(), ordered[:, -3:].flip(1))
    assert torch.equal(hidden.flatten(1).gather(1, got.index).float(), got.top)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the mode is a prototype, it says
def test_nothing_waits_for_the_device() -> None:
    hidden = torch.randn(10, 512, 768, device="cuda")
    activation_statistics(hidden, 3)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        activation_statistics(hidden, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(10, 2048, 2048), (10, 512, 128)])
@pytest.mark.parametrize("dtype", launch.DTYPES)
def test_the_memory_taken_is_a_twentieth_of_the_activations_or_4_mb(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    hidden = torch.randn(shape, device="cuda").to(dtype)
    activation_statistics(hidden, 3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    activation_statistics(hidden, 3)
    assert torch.cuda.max_memory_allocated() - before <= max(hidden.nbytes // 20, 4 * 2**20)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_probe_gives_on_the_gpu_what_it_gives_on_the_cpu(deterministic: bool) -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256
    )
    model: torch.nn.Module = GPTNeoXForCausalLM(config)
    probe = Probe.from_ids(torch.randint(99, (4, 200), generator=torch.Generator().manual_seed(0)).numpy())
    expected = measure(model, probe, 0, k=3)
    torch.use_deterministic_algorithms(deterministic)
    try:
        got = measure(model.cuda(), probe, 0, k=3)
    finally:
        torch.use_deterministic_algorithms(False)
    # Sums in another order: 1e-4 relative, the bar for one model on two devices in float32.
    torch.testing.assert_close(got.top, expected.top, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.median, expected.median, rtol=1e-4, atol=1e-5)
