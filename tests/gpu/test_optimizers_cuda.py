"""Compiled optimizer steps on a GPU: few launches, eager's values, whatever moves, and wherever it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.optimizers import Lion
from fxopt.report.explanation import journals
from tests.numerics import assert_closer, to_float64

pytestmark = pytest.mark.gpu

SIZES = ((1,), (3,), (33, 31), (1024,), (1000,), (2048,), (64, 48), (16, 64, 3), (1,), (50_000,), (300, 1024), (7,))
STEPS = 5

MAKES: dict[str, Callable[..., Any]] = {
    "SGD": lambda p, **how: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
    "Adam": lambda p, **how: torch.optim.Adam(p, lr=1e-2, foreach=True, **how),
    "AdamW": lambda p, **how: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True, foreach=True, **how),
    "AdamW, lr a tensor": lambda p, **how: torch.optim.AdamW(
        p, lr=torch.tensor(1e-2, device="cuda"), foreach=True, capturable=True
    ),
    "Lion": lambda p, **how: Lion(p, lr=1e-2),
}


def values(dtype: torch.dtype, given: torch.dtype, seed: int, moved: int = 0) -> list[torch.Tensor]:
    """One tensor of each size, of numbers that `given` holds; every third starts past an aligned address, the others too if
    `moved`."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for k, shape in enumerate(SIZES):
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to("cuda", given)
        skip = 1 if k % 3 == 2 else moved
        memory = torch.empty(drawn.numel() + skip, dtype=dtype, device="cuda")[skip:]
        out.append(memory.view(shape).copy_(drawn))
    return out


def trained(
    make: Callable[..., Any],
    dtype: torch.dtype,
    given: torch.dtype,
    *,
    compiled: bool = True,
    keep: bool = False,
    around: Callable[[int, Callable[[], None]], None] = lambda number, step: step(),
) -> list[torch.Tensor]:
    """Parameters and state of `dtype` after some steps from numbers of `given`. `around` runs each step.

    Gradients stay in their memory if `keep`, else each step has new ones, aligned or not in turn.
    """
    parameters = [torch.nn.Parameter(v) for v in values(dtype, given, 1)]
    optimizer = make(parameters, capturable=True)
    step = torch.compile(optimizer.step, backend="fxopt", options={"strict": True}) if compiled else optimizer.step
    for number in range(STEPS):
        for p, g in zip(parameters, values(dtype, given, 10 + number, number % 2), strict=True):
            if keep and p.grad is not None:
                p.grad.copy_(g)
            else:
                p.grad = g
        around(number, step)
    torch.cuda.synchronize()
    if isinstance(optimizer, Lion):
        return [p.detach() for p in (*parameters, *optimizer.momenta)]
    state = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    return [p.detach() for p in (*parameters, *state)]


def check(name: str, dtype: torch.dtype = torch.float32, **how: Any) -> None:
    torch.compiler.reset()
    got = trained(MAKES[name], dtype, dtype, **how)
    keep = how.get("keep", False)
    eager, exact = (trained(MAKES[name], d, dtype, compiled=False, keep=keep) for d in (dtype, torch.float64))
    assert_closer(got, eager, to_float64(exact), k=32.0)  # what remains of a single element may be small after five steps


@pytest.mark.parametrize("keep", [False, True], ids=["new gradients", "gradients stay"])
@pytest.mark.parametrize("name", MAKES)
def test_steps_are_as_near_to_float64_as_eager_ones(name: str, keep: bool) -> None:
    with journals() as found:
        check(name, keep=keep)
    graphs = [[k.name for k in j.kernels] for j in found if j.kernels]
    assert graphs and all(any(n.startswith("fx_batch_") for n in names) for names in graphs)
    assert max(map(len, graphs)) <= 4


def test_half_precision_parameters() -> None:
    check("SGD", torch.bfloat16)
    check("Lion", torch.bfloat16)


@pytest.mark.parametrize("keep", [False, True], ids=["new gradients", "gradients stay"])
def test_steps_on_two_streams_in_turn(keep: bool) -> None:
    streams = [torch.cuda.Stream() for _ in range(2)]

    def around(number: int, step: Callable[[], None]) -> None:
        stream = streams[number % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)  # the step is queued long before it runs
            step()
        torch.cuda.current_stream().wait_stream(stream)

    check("AdamW", keep=keep, around=around)


def test_tables_are_not_overwritten_while_they_are_copied() -> None:
    """Many steps queued behind a busy stream, each with gradients elsewhere."""
    torch.compiler.reset()
    parameters = [torch.nn.Parameter(torch.zeros(100 + k, device="cuda")) for k in range(20)]
    step = torch.compile(torch.optim.SGD(parameters, lr=1.0, foreach=True).step, backend="fxopt")
    gradients = [[torch.full_like(p, float(n)) for p in parameters] for n in range(12)]
    for round_ in range(2):
        torch.cuda._sleep(20_000_000 if round_ else 1)
        for grads in gradients:
            for p, g in zip(parameters, grads, strict=True):
                p.grad = g
            step()
    assert all(torch.equal(p.detach(), torch.full_like(p, -2.0 * sum(range(12)))) for p in parameters)


def test_steps_in_several_threads() -> None:
    torch.compiler.reset()

    @torch.compile(backend="fxopt")
    def add(xs: list[torch.Tensor], ys: list[torch.Tensor]) -> None:
        torch._foreach_add_(xs, ys)

    def lists() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        shapes = [(64 + k,) for k in range(16)]
        return [torch.zeros(s, device="cuda") for s in shapes], [torch.ones(s, device="cuda") for s in shapes]

    add(*lists())
    made, failures = [lists() for _ in range(4)], []

    def work(xs: list[torch.Tensor], ys: list[torch.Tensor]) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    add(xs, ys)
        except Exception as error:
            failures.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=pair) for pair in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not failures
    assert all(torch.equal(x, torch.full_like(x, 50.0)) for xs, _ in made for x in xs)


def test_a_step_in_a_cuda_graph_of_the_users() -> None:
    """Replays read tables that later calls elsewhere do not touch."""
    torch.compiler.reset()
    xs = [torch.zeros(100 + k, device="cuda") for k in range(16)]
    ys = [torch.ones_like(x) for x in xs]

    @torch.compile(backend="fxopt")
    def add(xs: list[torch.Tensor], ys: list[torch.Tensor]) -> None:
        torch._foreach_add_(xs, ys)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        add(xs, ys)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(xs, ys)
    for x in xs:
        x.zero_()
    others = [torch.zeros_like(x) for x in xs]
    for _ in range(3):
        graph.replay()
        add(others, ys)
        _ = [torch.full((64,), 7, device="cuda") for _ in range(50)]  # what was freed becomes something else
    torch.cuda.synchronize()
    for tensors in (xs, others):
        assert all(torch.equal(x, torch.full_like(x, 3.0)) for x in tensors)


def test_more_elements_than_int32_counts() -> None:
    torch.compiler.reset()
    large = torch.zeros(2**31 + 5, dtype=torch.int8, device="cuda")
    xs = [large, *(torch.zeros(k + 1, dtype=torch.int8, device="cuda") for k in range(9))]

    @torch.compile(backend="fxopt")
    def add(xs: list[torch.Tensor]) -> None:
        torch._foreach_add_(xs, 1)

    with journals() as found:
        add(xs)
    assert any(k.name.startswith("fx_batch_") for j in found for k in j.kernels)
    assert all(bool((x == 1).all()) for x in xs[1:]) and int(large[-1]) == 1
    assert all(bool((part == 1).all()) for part in large.split(2**28))
