"""A large head's loss on CUDA: values, gradients and memory, with the sizes of chunks that the op itself chooses."""

from __future__ import annotations

import pytest
import torch

from benchmarks.linear_cross_entropy import forget_gradients, make_inputs, training_step
from fxopt.passes import linear_cross_entropy as early_pass
from fxopt.report.measure import memory_in_use, peak_memory
from tests.passes.test_linear_cross_entropy import check, loss_of

pytestmark = pytest.mark.gpu
ROWS, FEATURES, CLASSES = 3000, 64, 8192


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_pass, "MIN_BYTES", 0)
    hidden, weight, bias = (
        torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in ((ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    )
    labels = torch.randint(0, CLASSES, (ROWS,), device="cuda")
    labels[::7] = -100
    check(loss_of(reduction=reduction, label_smoothing=0.1), hidden, weight, bias, labels, grad=0.3)


@pytest.mark.parametrize("features", [1024, 4096])
def test_memory_is_at_most_a_fifth_of_eagers(features: int) -> None:
    device = torch.device("cuda", 0)
    inputs = make_inputs(8192, features, 128 * 1024, torch.bfloat16, device)
    peaks = {}
    for name in ("eager", "fxopt"):
        step = training_step(name, inputs)
        step()
        forget_gradients(inputs)
        peaks[name] = peak_memory(step, device, memory_in_use(device)) or 0
    assert peaks["fxopt"] <= peaks["eager"] / 5


def test_a_step_does_not_wait_for_the_gpu() -> None:
    inputs = make_inputs(8192, 1024, 128 * 1024, torch.bfloat16, torch.device("cuda", 0))
    step = training_step("fxopt", inputs)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
