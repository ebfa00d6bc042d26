"""A good guest on CUDA: streams, devices, Triton kernels of the user, autocast, broken surroundings, device errors."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.guest.agreement import agree, compiled, graphs, kernels, same

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 8)).cuda()


def run_apart(script: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"FXOPT_CACHE_DIR": str(cache)} | environment
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=500)


def test_layouts_and_alignment() -> None:
    memory = torch.randn(4200, device="cuda")
    run = compiled(lambda x: (x * 2 + 1, x.sum(0), x.t().contiguous()))
    for start in (0, 1, 2, 3, 4):
        x = memory[start : start + 4096].view(64, 64)
        same(run(x), (x * 2 + 1, x.sum(0), x.t().contiguous()))
    agree(lambda x: (x + 1, x.amax()), memory[1:3601].view(60, 60).t())
    agree(lambda x: x.sum(0) * 2, memory[:7].expand(9, 7))


def test_unaligned_memory_is_written_in_place() -> None:
    memory = torch.zeros(200, device="cuda")
    run = compiled(lambda x: x.add_(1).sum())
    for start in (0, 1, 5):
        run(memory[start : start + 128])
    assert memory.sum() == 3 * 128 and memory[0] == 1


def test_the_current_stream_is_used() -> None:
    run = compiled(lambda x, y: (x @ y).relu().sum(1) + 1)
    x, y = torch.randn(2048, 2048, device="cuda"), torch.eye(2048, device="cuda")
    run(x, y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = x
        for _ in range(20):
            late = late @ y
        out = run(late, y)
    side.synchronize()
    torch.testing.assert_close(out, (x @ y).relu().sum(1) + 1, rtol=1e-3, atol=1e-2)


def test_cpu_and_cuda_in_one_graph() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> Any:
        return (x * 2).sum(), (y + 1).cos(), y * x.cpu().sum(), x + torch.tensor(2.0)

    agree(fn, torch.randn(8, 8, device="cuda"), torch.randn(5))
    assert kernels() >= 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_in_one_graph() -> None:
    agree(lambda x, y: ((x + 1).softmax(0), (y * 2).sum(), x.to(y.device) + y), *(torch.randn(9, device=d) for d in "01"))


def test_training_with_autocast_and_a_gradient_scaler() -> None:
    mine = network()
    eager = copy.deepcopy(mine)
    run = compiled(mine)
    for model, module in ((run, mine), (eager, eager)):
        torch.manual_seed(1)
        optimizer, scaler = torch.optim.SGD(module.parameters(), lr=0.1), torch.amp.GradScaler("cuda")
        for _ in range(3):
            with torch.autocast("cuda", dtype=torch.float16):
                loss = F.cross_entropy(model(torch.randn(16, 64, device="cuda")), torch.arange(16, device="cuda") % 8)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(list(mine.parameters()), list(eager.parameters()), rtol=2e-2, atol=2e-2)


def test_a_triton_kernel_of_the_user() -> None:
    from tests.gpu import user_kernel

    agree(lambda x: user_kernel.double(x.sin()).cos() + 1, torch.randn(1000, device="cuda"), strict=False)


def test_dropout_under_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    x, w = torch.randn(64, 64, device="cuda"), torch.ones(64, device="cuda", requires_grad=True)
    fn = compiled(lambda x, w: checkpoint(lambda x, w: F.dropout((x * w).sin(), 0.5), x, w, use_reentrant=False))
    out = fn(x, w)
    (got,) = torch.autograd.grad(out.sum(), w)
    torch.testing.assert_close(got, ((out != 0) * 2.0 * x * (x * w).cos()).sum(0).detach(), rtol=1e-4, atol=1e-4)


def test_bounded_compilations() -> None:
    run = compiled(lambda x: F.layer_norm(x, (32,)).softmax(1).sum(1))
    for length in range(2, 60):
        x = torch.randn(3, length, 32, device="cuda")
        torch.testing.assert_close(run(x), F.layer_norm(x, (32,)).softmax(1).sum(1), rtol=1e-4, atol=1e-5)
    assert len(graphs()) <= 2


CHECK = """
    import warnings, torch
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PRELUDE
        x = torch.randn(100, 33, device="cuda")
        for fn in (lambda x: x.softmax(1) + 1, lambda x: x.sum(0).sin()):
            torch.testing.assert_close(torch.compile(fn, backend="fxopt")(x), fn(x))
    messages = [str(w.message) for w in caught if "fxopt" in str(w.message)]
    assert len(messages) == 1 and "MESSAGE" in messages[0], messages
"""


@pytest.mark.parametrize(
    ("prelude", "message"),
    [
        ("from fxopt.codegen import triton_build as b; b.available = lambda: 'Triton is not installed'", "not installed"),
        ("from fxopt.target import Target; real = Target.current; "
         "Target.current = staticmethod(lambda d: Target.cuda(130) if torch.device(d).type == 'cuda' else real(d))",
         "the GPU sm_130"),
    ],
    ids=["no Triton", "unknown GPU"],
)  # fmt: skip
def test_right_results_without_generated_kernels(tmp_path: Path, prelude: str, message: str) -> None:
    done = run_apart(CHECK.replace("PRELUDE", prelude).replace("MESSAGE", message), tmp_path / "cache")
    assert done.returncode == 0, done.stderr


def test_an_index_out_of_bounds_is_an_error_not_a_value(tmp_path: Path) -> None:
    script = """
        import torch
        x, i = torch.randn(10, device="cuda"), torch.tensor([3, 70], device="cuda")
        torch.compile(lambda x, i: x[i] * 2, backend="fxopt")(x, i).cpu()
    """
    done = run_apart(script, tmp_path / "cache")
    assert done.returncode != 0 and "device-side assert" in done.stderr, done.stderr
