"""Training with CUDA graphs on a GPU: losses and gradients are those of the same plans without graphs, bit for bit."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxopt.journal import RECENT
from fxopt.runtime import backward_pieces, cuda_graph, recording, training_graph, training_window
from fxopt.runtime.training_graph import GraphedBackward, GraphedForward
from tests.guest.agreement import compiled

pytestmark = pytest.mark.gpu
WIDTH = 64


class Made:
    """The executors with graphs that are made during a test."""

    def __init__(self) -> None:
        self.forwards: list[GraphedForward] = []
        self.backwards: list[GraphedBackward] = []

    def replays(self) -> tuple[int, int]:
        return sum(f._replays for f in self.forwards), sum(b._replays for b in self.backwards)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    found = Made()

    class WatchedForward(GraphedForward):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            found.forwards.append(self)

    class WatchedBackward(GraphedBackward):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            found.backwards.append(self)

    monkeypatch.setattr(training_graph, "GraphedForward", WatchedForward)
    monkeypatch.setattr(training_graph, "GraphedBackward", WatchedBackward)
    monkeypatch.setattr(training_graph, "LEAST_OVERWRITTEN", 1)
    return found


class Perceptron(nn.Module):
    """Layers with dropout; the first one's is at the input, so that what it draws is saved."""

    def __init__(self, drop: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(drop), nn.LayerNorm(WIDTH)) for _ in range(4))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Attention(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop if self.training else 0.0, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(b, s, WIDTH))


class Transformer(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(100, WIDTH)
        self.blocks = nn.Sequential(*(nn.Sequential(Attention(drop), Perceptron()) for _ in range(2)))
        self.head = nn.Linear(WIDTH, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.table(x)))


class Normalized(nn.Module):
    """With running statistics, which the forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def fresh(kind: Callable[[], nn.Module] = Perceptron, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return kind().cuda().to(dtype).train()


def x_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (32, WIDTH), generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def tokens(seed: int, distinct: bool = False) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    if distinct:
        return torch.randperm(100, generator=generator, device="cuda")[:96].view(4, 24)
    return torch.randint(100, (4, 32), generator=generator, device="cuda")


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


Steps = Callable[[nn.Module, Any], list[Any]]


def agree(
    steps: Steps,
    made: Made,
    kind: Callable[[], nn.Module] = Perceptron,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 0.0,
) -> None:
    """`steps(model, compiled model)` returns and leaves in model and generator the same bits with and without graphs, or
    floating values that differ by at most `tolerance`."""
    results = []
    for graphs in (False, True):
        model = fresh(kind, dtype)
        run = compiled(model, mode="reduce-overhead", cuda_graphs=graphs)
        torch.manual_seed(1)
        out = steps(model, run)
        results.append((out, list(model.state_dict().values()), torch.cuda.get_rng_state()))
        if not graphs:
            assert made.replays() == (0, 0)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=tolerance)


def backward(out: torch.Tensor) -> torch.Tensor:
    loss = out.float().pow(2).mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Perceptron, Transformer, Normalized])
def test_loss_curves(kind: type[nn.Module], dtype: torch.dtype, made: Made) -> None:
    """What the positions of one token add to its row of the table, a GPU adds up in any order. Of bfloat16, where rounding
    is as large as what a step changes, tokens are therefore distinct. SGD keeps float32's differences small: the bias of
    keys has a gradient of nothing but rounding, which AdamW would scale up."""
    exact = kind is not Transformer or dtype is torch.bfloat16

    def steps(model: nn.Module, run: Any) -> list[Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for k in range(6):
            optimizer.zero_grad()
            losses.append(backward(run(tokens(k, exact) if kind is Transformer else x_of(k).to(dtype))))
            optimizer.step()
        return losses

    agree(steps, made, kind, dtype, 0.0 if exact else 4e-6)
    assert made.replays() == (5, 4), reasons()


@pytest.mark.parametrize("kind", [Perceptron, Transformer])
def test_a_backward_in_pieces(kind: type[nn.Module], made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are kept, added to and dropped, with a backward that is cut wherever that can be."""
    for name, value in (("SMALLEST", 1), ("PIECE_STEPS", 2), ("PASSING_SHARE", 1e6)):
        monkeypatch.setattr(backward_pieces, name, value)

    def steps(model: nn.Module, run: Any) -> list[Any]:
        out = []
        for k in range(8):
            out.append(backward(run(tokens(k, True) if kind is Transformer else x_of(k).bfloat16())))
            if k % 2:
                out += [p.grad for p in model.parameters()]
                model.zero_grad()
        return out

    agree(steps, made, kind, torch.bfloat16)
    replays = [piece._replays for piece in made.backwards]
    assert replays.count(6) > 1, reasons()


def test_ends_that_run_plainly(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where copies count for much, what makes the results and what reads their gradients is no part of the captured runs."""
    monkeypatch.setattr(training_window, "COPY_BYTES_PER_SECOND", 1e8)

    def steps(model: nn.Module, run: Any) -> list[Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        out = []
        for k in range(7):
            optimizer.zero_grad()
            out.append(backward(run(tokens(k, True))))
            out += gradients(model)
            optimizer.step()
        return out

    agree(steps, made, Transformer, torch.bfloat16)
    assert made.replays() == (6, 5) and sum("steps at the ends" in text for text in reasons()) >= 2, reasons()


def test_attention_that_drops(made: Made) -> None:
    """What is dropped, and where the generator stands afterwards, is as without graphs, whoever else draws in between."""

    def steps(model: nn.Module, run: Any) -> list[Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        out = []
        for k in range(6):
            optimizer.zero_grad()
            out.append(backward(run(tokens(k, distinct=True))))
            out.append(torch.rand(3, device="cuda"))
            optimizer.step()
            if k == 3:
                torch.manual_seed(5)
        return out

    agree(steps, made, functools.partial(Transformer, 0.2), torch.bfloat16)
    assert made.replays() == (5, 4), reasons()


def test_the_generator_is_as_before_when_a_capture_fails(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(functools.partial(Transformer, 0.2), torch.bfloat16)
    run = compiled(model, mode="reduce-overhead")
    backward(run(tokens(0)))
    with monkeypatch.context() as patch:
        patch.setattr(recording, "_results", lambda *args: torch.cuda.synchronize())
        backward(run(tokens(1)))
    assert not made.forwards[0].graphs and any("not captured" in text for text in reasons())
    torch.manual_seed(1)
    want = torch.rand(4, device="cuda")
    torch.manual_seed(1)
    torch.testing.assert_close(torch.rand(4, device="cuda"), want, rtol=0, atol=0)
    backward(run(tokens(2)))


def reasons() -> list[str]:
    return [text for journal in RECENT for topic, text in journal.notes if topic == cuda_graph.NAME]


def warm(model: nn.Module, run: Any) -> None:
    """Forward is captured in the second step, backward in the third."""
    for k in range(3):
        backward(run(x_of(k)))
        model.zero_grad()


def test_gradients_are_the_callers_own(made: Made) -> None:
    def steps(model: nn.Module, run: Any) -> list[Any]:
        kept = []
        for k in range(6):
            loss = backward(run(x_of(k)))
            kept.append((loss, [p.grad for p in model.parameters()]))
            model.zero_grad()
        return kept

    agree(steps, made)
    assert made.replays() == (5, 4)
    (recording,) = (made.backwards[0]._latest,)
    assert isinstance(recording, training_graph.BackwardRecording) and recording.overwritten, reasons()


def test_accumulation(made: Made) -> None:
    def steps(model: nn.Module, run: Any) -> list[Any]:
        out = []
        for k in range(8):
            out.append(backward(run(x_of(k))))
            if k % 4 == 3:
                out += gradients(model)
                model.zero_grad(set_to_none=k < 4)
        return out

    agree(steps, made)
    assert made.replays() == (7, 6)


def test_several_forwards_before_their_backwards(made: Made) -> None:
    def steps(model: nn.Module, run: Any) -> list[Any]:
        warm(model, run)
        out = []
        for order in ([0, 1], [1, 0]):
            losses = [run(x_of(k)).pow(2).mean() for k in range(2)]
            for k in order:
                losses[k].backward()
                out += gradients(model)
            out += [loss.detach() for loss in losses]
            model.zero_grad()
            del losses
        return out

    agree(steps, made)
    assert made.replays() == (4, 3)


def test_a_graph_of_autograd_that_is_retained(made: Made) -> None:
    def steps(model: nn.Module, run: Any) -> list[Any]:
        warm(model, run)
        loss = run(x_of(5)).pow(2).mean()
        out = []
        for k in range(3):
            loss.backward(retain_graph=True)
            out += gradients(model)
            out.append(backward(run(x_of(k))))
            out += gradients(model)
        return out

    agree(steps, made)
    assert made.replays() == (3, 1), "replays of the backward would destroy what is retained"


def test_checkpointed(made: Made) -> None:
    def steps(model: nn.Module, run: Any) -> list[Any]:
        out = []
        for k in range(6):
            x = x_of(k).requires_grad_()
            out.append(backward(checkpoint(run, x, use_reentrant=False)))
            out += [*gradients(model), x.grad]
            model.zero_grad()
        return out

    agree(steps, made)
    forwards, backwards = made.replays()
    assert forwards >= 9 and backwards >= 3


def test_scaled_gradients(made: Made) -> None:
    def steps(model: nn.Module, run: Any) -> list[Any]:
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cuda", init_scale=2.0**10)
        out = []
        for k in range(8):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = run(x_of(k) * (float("inf") if k == 4 else 1)).float().pow(2).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            out.append(scaler.get_scale())
        return out

    agree(steps, made)
    assert made.replays() == (7, 6)


def test_two_models_in_turns(made: Made) -> None:
    results = []
    for graphs in (False, True):
        models = [fresh(), fresh()]
        torch.compiler.reset()
        options = {"mode": "reduce-overhead", "cuda_graphs": graphs}
        runs = [torch.compile(model, backend="fxopt", options=options) for model in models]
        torch.manual_seed(1)
        for k in range(6):
            losses = [run(x_of(k + n)).pow(2).mean() for n, run in enumerate(runs)]
            for loss in losses:
                loss.backward()
            del loss, losses
        results.append([gradients(model) for model in models])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert made.replays() == (10, 8)


def test_evaluation_and_other_work_between_forward_and_backward(made: Made) -> None:
    def steps(model: nn.Module, run: Any) -> list[Any]:
        out = []
        for k in range(6):
            loss = run(x_of(k)).pow(2).mean()
            with torch.no_grad():
                out.append(run(x_of(k + 7)).clone())
            junk = [torch.full((1 << 18,), float("nan"), device="cuda") for _ in range(16)]
            loss.backward()
            out += gradients(model)
            del junk
        return out

    agree(steps, made)
    assert made.replays() == (5, 4)


def test_exceptions_and_dropped_forwards(made: Made) -> None:
    def steps(model: nn.Module, run: Any) -> list[Any]:
        warm(model, run)
        out = []
        for k in range(3):
            try:
                held = run(x_of(k))
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                out.append(held.detach().clone())
            out.append(backward(run(x_of(k))))  # while what the first has saved is held
            del held
            gc.collect()
            out.append(backward(run(x_of(k))))
            out += gradients(model)
        return out

    agree(steps, made)
    assert made.replays() == (2 + 6, 1 + 3)


def test_weights_at_other_addresses(made: Made) -> None:
    def steps(model: nn.Module, run: Any) -> list[Any]:
        out = []
        for k in range(9):
            if k in (4, 6):
                for p in model.parameters():
                    p.data = p.data.clone() * 0.9
            out.append(backward(run(x_of(k))))
            out += gradients(model)
            model.zero_grad()
        return out

    agree(steps, made)
    assert made.replays()[0] >= 5


def test_saved_tensors_are_offloaded(made: Made) -> None:
    def steps(model: nn.Module, run: Any) -> list[Any]:
        out = []
        for k in range(6):
            if k % 2:
                out.append(backward(run(x_of(k))))
            else:
                with torch.autograd.graph.save_on_cpu():
                    out.append(backward(run(x_of(k))))
            out += gradients(model)
        return out

    agree(steps, made)
    assert made.replays()[0] == 5


def test_streams(made: Made) -> None:
    def steps(model: nn.Module, run: Any) -> list[Any]:
        out = []
        streams = [torch.cuda.Stream() for _ in range(3)]
        for k in range(24):
            stream = streams[k % 3]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)
                out.append(backward(run(x_of(k))))
            torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        return out + gradients(model)

    agree(steps, made)
    assert made.replays()[0] >= training_graph.STREAM_CHANGES


def test_threads(made: Made) -> None:
    """Models of their own, and one that all threads train without drawing random numbers."""
    results = []
    for graphs in (False, True):
        shared, own = fresh(Normalized).eval(), [fresh(Normalized).eval() for _ in range(3)]
        torch.compiler.reset()
        options = {"mode": "reduce-overhead", "cuda_graphs": graphs}
        common, *runs = [torch.compile(m, backend="fxopt", options=options) for m in (shared, *own)]
        for run in (common, *runs):
            for k in range(3):
                torch.autograd.grad(
                    run(x_of(k)).pow(2).mean(),
                    shared.parameters() if run is common else [*own[runs.index(run)].parameters()],
                )
        found: list[Any] = [None] * 3

        def work(
            number: int,
            found: list[Any] = found,
            runs: Any = runs,
            own: Any = own,
            common: Any = common,
            shared: Any = shared,
        ) -> None:
            mine = []
            with torch.cuda.stream(torch.cuda.Stream()):
                for k in range(30):
                    mine.append(torch.autograd.grad(runs[number](x_of(k)).pow(2).mean(), list(own[number].parameters())))
                    mine.append(torch.autograd.grad(common(x_of(k)).pow(2).mean(), list(shared.parameters())))
                torch.cuda.current_stream().synchronize()
            found[number] = mine

        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        results.append(found)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert made.replays()[0] > 60


def test_memory_comes_back(made: Made) -> None:
    def held() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    model = fresh()
    run = compiled(model, mode="reduce-overhead")
    for k in range(4):
        backward(run(x_of(k, 1 << 16, WIDTH)))
        model.zero_grad()
    assert made.replays() == (3, 2), reasons()
    assert any("stay allocated between calls" in text for text in reasons())
    during = held()
    del run
    made.forwards.clear()
    made.backwards.clear()
    torch.compiler.reset()
    assert held() < during - (96 << 20), "activations of four layers, 16 MiB each and more than one a layer"


def test_a_pool_is_hardly_larger_than_what_a_step_holds(made: Made) -> None:
    """Beside its first piece: a workspace of cuBLAS's, and where torch's allocator keeps small values."""
    model = fresh()
    run = compiled(model, mode="reduce-overhead")
    for k in range(4):
        backward(run(x_of(k, 1 << 16, WIDTH)))
        model.zero_grad()
    assert made.replays() == (3, 2), reasons()
    (forward,), (recording,) = made.forwards, (made.backwards[0]._latest,)
    assert isinstance(recording, training_graph.BackwardRecording) and recording.overwritten, reasons()
    taken = sum(segment["total_size"] for segment in recording.memory.pool.snapshot())
    first = forward.room + forward.room // training_graph.ROOM
    assert first <= taken <= first + (58 << 20), f"{taken >> 20} MiB for {forward.room >> 20}, {reasons()}"


STEPS = """
import threading
import torch
from torch import nn

model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(4))).cuda().bfloat16()
run = torch.compile(model, backend="fxopt", mode="reduce-overhead")
x = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
for _ in range(5):
    run(x).float().pow(2).mean().backward()
    model.zero_grad()
allocated = torch.cuda.memory_allocated()
torch._C._cuda_clearCublasWorkspaces()
print(allocated - torch.cuda.memory_allocated(), [thread.name for thread in threading.enumerate()])
"""


ATTENTION = """
import threading
import torch
import torch.nn.functional as F
from torch import nn

first, last, norm = nn.Linear(512, 1536), nn.Linear(512, 512), nn.LayerNorm(512)
model = nn.ModuleList([first, last, norm]).cuda().bfloat16()

def attended(x):
    q, k, v = first(norm(x)).view(2, 64, 3, 8, 64).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v)
    return x + F.gelu(last(y.transpose(1, 2).reshape(2, 64, 512)))

run = torch.compile(lambda x: attended(attended(x)), backend="fxopt")
x = torch.randn(2, 64, 512, device="cuda", dtype=torch.bfloat16)
with torch.no_grad():
    for _ in range(4):
        run(x)
allocated = torch.cuda.memory_allocated()
torch._C._cuda_clearCublasWorkspaces()
print(allocated - torch.cuda.memory_allocated(), [thread.name for thread in threading.enumerate()])
"""


def no_workspaces_are_left(script: str, cache: Path) -> None:
    """By a process of its own: where other threads are about, workspaces stay."""
    environment = os.environ | {"FXOPT_CACHE_DIR": str(cache)}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, env=environment)
    assert found.stdout.startswith("0 "), found.stdout + found.stderr


def test_no_workspaces_are_left_in_a_process_that_only_trains(tmp_path: Path) -> None:
    no_workspaces_are_left(STEPS, tmp_path)


def test_none_is_left_where_attention_was_timed_while_kernels_were_compiled(tmp_path: Path) -> None:
    no_workspaces_are_left(ATTENTION, tmp_path)


def test_what_was_saved_outlives_the_graphs(made: Made) -> None:
    def steps(model: nn.Module, run: Any) -> list[Any]:
        warm(model, run)
        loss = run(x_of(5)).pow(2).mean()
        for executor in made.forwards:
            executor._decline("its graphs are dropped")
        gc.collect()
        torch.cuda.empty_cache()
        junk = [torch.full((1 << 16,), float("nan"), device="cuda") for _ in range(64)]
        loss.backward()
        del junk
        return [loss.detach(), *gradients(model)]

    agree(steps, made)
    assert made.replays() == (3, 2)


def test_default_mode_is_left_alone(made: Made) -> None:
    model = fresh()
    run = compiled(model)
    warm(model, run)
    assert not made.forwards and not made.backwards
