"""How CUDA launches are written down, without a GPU: kernels are Python functions over CPU memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from fxopt.ir.exprs import Int, floordiv
from fxopt.ir.kernel import Artifact
from fxopt.ir.region import Alias, BufferSpec, Call, Ref
from fxopt.runtime import executor
from fxopt.runtime.executor import Executor
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import Launch, Plan, SymbolSource
from tests.runtime.plans import S0, buffer, plan, tensor


class Increment:
    """Stands for a loaded kernel out[i] = x[i] + 1 with arguments (stream, grid, x, out, n)."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.devices: list[int] = []
        self.early: list[bool] = []
        self.current = 0

    def bind(self, label: str, early: bool) -> Any:
        def launch(*arguments: int) -> None:
            self.early.append(early)
            self.launch(*arguments)

        return launch

    def launch(self, stream: int, gx: int, gy: int, gz: int, source: int, target: int, n: int) -> None:
        self.calls.append((stream, gx, gy, gz, source, target, n))
        self.devices.append(self.current)
        floats = ctypes.c_float * n
        values = [x + 1 for x in floats.from_address(source)]
        floats.from_address(target)[:] = values


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Increment:
    """The fake, with torch.cuda's notion of a current device replaced."""
    made = Increment()

    def set_device(device: int) -> None:
        made.current = device

    @contextmanager
    def entered(device: int) -> Iterator[None]:
        before, made.current = made.current, device
        yield
        made.current = before

    monkeypatch.setattr(executor, "_loaded_cuda", lambda launches, kernels, loaded: [made] * len(launches))
    monkeypatch.setitem(executor._HELPERS, "stream", lambda device: 100 + device)
    monkeypatch.setitem(executor._HELPERS, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: made.current)
    monkeypatch.setattr(torch.cuda, "device", entered)
    return made


def launch(
    source: str, target: str, n: Int, grid: tuple[Int, Int, Int] = (1, 1, 1), device: int = 0, **kwargs: Any
) -> Launch:
    names = (source, target)
    return Launch("k", "triton", "k", names, (target,), torch.device("cuda", device), (n,), grid, aligned=(0, 1), **kwargs)


def bind(made: Plan, **kwargs: Any) -> Executor:
    artifact = Artifact("k", "triton", "k", None)  # type: ignore[arg-type]
    return Executor(Plan.from_json(plan_memory(made).to_json()), {"k": artifact}, **kwargs)


def test_arguments_of_a_launch(kernel: Increment) -> None:
    blocks = floordiv(S0 + 7, 8)
    made = plan(
        [tensor("x", S0)],
        [buffer("a", S0)],
        [launch("x", "a", S0, (blocks, 2, 1))],
        [Ref("a")],
        symbols=[SymbolSource("s0", 0)],
    )
    run = bind(made)
    x = torch.randn(20)
    (a,) = run([x])
    torch.testing.assert_close(a, x + 1)
    assert kernel.calls == [(100, 3, 2, 1, x.data_ptr(), a.data_ptr(), 20)]


def _early(source: str, target: str, n: Int = 8, **kwargs: Any) -> Launch:
    return launch(source, target, n, early=True, **kwargs)


def test_a_launch_is_early_where_it_follows_another_one(kernel: Increment) -> None:
    steps = [
        _early("x", "a"),
        _early("a", "b"),
        launch("b", "c", 8),
        _early("c", "d"),
        Alias("half", "d", (4,), (1,), 0),
        _early("d", "e"),
        Call("aten::neg.default", (Ref("e"),), {}, ("f",)),
        _early("f", "g"),
        _early("g", "h", device=1),
        _early("h", "i", device=1),
    ]
    bind(plan([tensor("x", 8)], [buffer(n, 8) for n in "abcdefghi"], steps, [Ref("half"), Ref("i")]))([torch.zeros(8)])
    assert kernel.early == [False, True, False, True, True, False, False, True]


def test_no_launch_is_early_after_one_that_may_not_happen(kernel: Increment) -> None:
    """The first kernel of a run, which waits for all that came before it, is one that is launched."""
    blocks = floordiv(S0 + 7, 8)
    steps = [launch("x", "a", S0, (blocks, 1, 1), early=True), _early("y", "b"), _early("b", "c")]
    made = plan(
        [tensor("x", S0), tensor("y", 8)],
        [buffer("a", S0), buffer("b", 8), buffer("c", 8)],
        steps,
        [Ref("a"), Ref("c")],
        symbols=[SymbolSource("s0", 0)],
    )
    bind(made)([torch.zeros(0), torch.zeros(8)])
    assert kernel.early == [False, True]


def test_no_launch_is_early_after_a_copy_for_alignment(kernel: Increment) -> None:
    run = bind(
        plan([tensor("x", 5)], [buffer("a", 5), buffer("b", 5)], [_early("x", "a", 5), _early("x", "b", 5)], [Ref("b")])
    )
    run([torch.arange(9.0)[:5]])
    run([torch.arange(9.0)[1:6]])
    assert kernel.early == [False, True, False, False]


def test_an_empty_grid_is_not_launched(kernel: Increment) -> None:
    blocks = floordiv(S0 + 7, 8)
    steps = [launch("x", "a", S0, (blocks, 1, 1)), launch("y", "b", 0, (0, 1, 1))]
    made = plan(
        [tensor("x", S0), tensor("y", 4)],
        [buffer("a", S0), buffer("b", 4)],
        steps,
        [Ref("a"), Ref("b")],
        symbols=[SymbolSource("s0", 0)],
    )
    assert bind(made)([torch.zeros(0), torch.zeros(4)])[0].shape == (0,)
    assert kernel.calls == []


def test_a_misaligned_input_is_copied(kernel: Increment) -> None:
    run = bind(plan([tensor("x", 5)], [buffer("a", 5)], [launch("x", "a", 5)], [Ref("a")]))
    x = torch.arange(9.0)[1:6]
    torch.testing.assert_close(run([x])[0], x + 1)
    assert x.data_ptr() % 16 != 0 and kernel.calls[0][4] % 16 == 0
    run([x.clone()])
    assert len(kernel.calls) == 2


def test_a_misaligned_input_that_is_written_gets_the_result(kernel: Increment) -> None:
    run = bind(plan([tensor("x", 5)], [], [launch("x", "x", 5), launch("x", "x", 5)], []))
    whole = torch.arange(9.0)
    run([whole[1:6]])
    assert whole.tolist() == [0, 3, 4, 5, 6, 7, 6, 7, 8]


def test_a_misaligned_view_of_an_input(kernel: Increment) -> None:
    steps = [Alias("v", "x", (3,), (1,), 1), launch("v", "a", 3), launch("x", "v", 3)]
    run = bind(plan([tensor("x", 4)], [buffer("a", 3)], steps, [Ref("a")]))
    x = torch.arange(4.0)
    assert run([x])[0].tolist() == [2, 3, 4]
    assert x.tolist() == [0, 1, 2, 3]


def test_an_expanded_misaligned_input_keeps_its_strides(kernel: Increment) -> None:
    source = torch.arange(9.0)[1:4]
    copy = executor._aligned_copy(source.expand(2, 3))
    assert copy.stride() == (0, 1) and copy.data_ptr() % 16 == 0
    torch.testing.assert_close(copy, source.expand(2, 3))
    assert executor._aligned_copy(torch.arange(9.0)[1:1]).shape == (0,)


def test_a_misaligned_constant_is_copied_once(kernel: Increment) -> None:
    w = torch.arange(9.0)[1:6]
    made = plan([], [buffer("a", 5)], [launch("w", "a", 5)], [Ref("a")], constants=[buffer("w", 5)])
    run = bind(made, constants={"w": w})
    for _ in range(2):
        torch.testing.assert_close(run([])[0], w + 1)
    assert kernel.calls[0][4] == kernel.calls[1][4] and kernel.calls[0][4] % 16 == 0


def test_kernels_run_on_their_own_devices(kernel: Increment) -> None:
    steps = [
        launch("x", "a", 4, device=1),
        launch("x", "b", 4, device=0),
        launch("b", "c", 4, device=1),
        launch("c", "d", 4, device=1),
    ]
    run = bind(plan([tensor("x", 4)], [buffer(n, 4) for n in "abcd"], steps, [Ref("a"), Ref("d")]))
    run([torch.zeros(4)])
    assert kernel.devices == [1, 0, 1, 1] and kernel.current == 0
    assert [call[0] for call in kernel.calls] == [101, 100, 101, 101]


def test_another_current_device_is_left_and_restored(kernel: Increment) -> None:
    run = bind(plan([tensor("x", 4)], [buffer("a", 4)], [launch("x", "a", 4)], [Ref("a")]))
    kernel.current = 3
    run([torch.zeros(4)])
    assert kernel.devices == [0] and kernel.current == 3


def test_library_results_may_be_misaligned_too(kernel: Increment) -> None:
    steps = [Call("aten::slice.Tensor", (Ref("x"), 0, 1, 5), outputs=("y",)), launch("y", "a", 4)]
    run = bind(plan([tensor("x", 6)], [buffer("a", 4), buffer("y", 4)], steps, [Ref("a")]))
    assert run([torch.arange(6.0)])[0].tolist() == [2, 3, 4, 5] and kernel.calls[0][4] % 16 == 0


@pytest.fixture
def pretended(kernel: Increment, monkeypatch: pytest.MonkeyPatch) -> Increment:
    """Memory of the GPU is taken from the CPU."""

    def empty(shape: Any, strides: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype)

    monkeypatch.setitem(executor._HELPERS, "empty", empty)

    def quick(shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype)

    monkeypatch.setitem(executor._HELPERS, "empty_cuda", quick)
    return kernel


def on_gpu(name: str, *shape: int) -> BufferSpec:
    return replace(buffer(name, *shape), device=torch.device("cuda", 0))


def test_buffers_lie_in_one_block(pretended: Increment) -> None:
    """Each at its own offset, as addresses for kernels, tensors for the library, views, and results of products."""
    steps = [
        launch("x", "a", 4),
        launch("a", "b", 2),
        Call("aten::mm.default", (Ref("y"), Ref("y")), outputs=("c",)),
        Alias("part", "c", (2,), (1,), 2),
        Call("aten::add.Tensor", (Ref("part"), Ref("b")), outputs=("d",)),
        launch("d", "e", 2),
        launch("c", "f", 4),
    ]
    buffers = [on_gpu(n, s) for n, s in (("a", 4), ("b", 2), ("d", 2), ("e", 2), ("f", 4))]
    run = bind(plan([tensor("x", 4), tensor("y", 2, 2)], [*buffers, on_gpu("c", 2, 2)], steps, [Ref("e"), Ref("f")]))
    assert set(run.plan.placement) == {"a", "b", "c"} and len(run.plan.slots) == 1
    assert run.plan.offsets == {"b": 512}, "the product lies where its first operand was"
    x, y = torch.arange(4.0), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for _ in range(2):
        e, f = run([x, y])
        torch.testing.assert_close(e, (y @ y)[1] + x[:2] + 2 + 1)
        torch.testing.assert_close(f, (y @ y).flatten() + 1)
    assert all(address % 16 == 0 for call in pretended.calls for address in call[4:6] if address != e.data_ptr())


def test_layers_share_tensor_objects(pretended: Increment) -> None:
    """A value at the place and in the layout of an earlier one needs no tensor of its own."""
    names = ["x", "a", "b", "c", "d", "e"]
    steps = [Call("aten::mm.default", (Ref(s), Ref(s)), outputs=(t,)) for s, t in pairwise(names)]
    buffers = [*(on_gpu(n, 2, 2) for n in names[1:]), on_gpu("f", 4)]
    run = bind(plan([tensor("x", 2, 2)], buffers, [*steps, launch("e", "f", 4)], [Ref("f")]))
    assert run.source.count("reinterpret(") + run.source.count("as_strided") == 2
    x = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert run([x])[0].tolist() == [2.0, 33.0, 1.0, 2.0]
