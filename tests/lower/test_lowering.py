"""The walk over a graph: what falls back and how that is noted, results of several tensors, inputs that are no tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.capture.symbols import to_int
from fxopt.errors import RetreatError, UnsupportedError
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.region import Alias, Call, Ref, Region, Size, Step
from fxopt.journal import Journal
from fxopt.lower import Lowered, layout, lower_graph, lowering
from fxopt.lower.ops.elements import fresh
from fxopt.lower.schedule import schedule
from fxopt.lower.table import Table, table
from tests.lower.interpreter import run_lowered

aten = torch.ops.aten


def graph_of(fn: Callable[..., Any], *args: Any, mode: str = "fake") -> Graph:
    gm = make_fx(fn, tracing_mode=mode)(*args)
    gm.graph.eliminate_dead_code()
    inputs = [Input(n.name, Role.USER) for n in gm.graph.nodes if n.op == "placeholder"]
    return Graph(gm, inputs, Phase.INFERENCE, "test", to_int)


def check(low: Lowered, fn: Callable[..., Any], *args: Any) -> None:
    got = run_lowered(low, dict(zip(low.inputs, args, strict=True)))
    want = fn(*args)
    torch.testing.assert_close(tuple(got), want if isinstance(want, tuple) else (want,))


def steps_of(low: Lowered, kind: type) -> list[Any]:
    return [s for s in low.steps if isinstance(s, kind)]


def kinds(steps: list[Step]) -> list[str]:
    return [type(s).__name__ for s in steps]


# ---------------------------------------------------------------------- several devices


def _on_two_devices(fn: Callable[..., Any]) -> tuple[Lowered, Journal]:
    """fn(x on a GPU, y and the number z on the CPU), lowered; the tensors are fake, and no retreat is allowed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = torch.empty(8, 8, device="cuda"), torch.empty(8), torch.empty(())
        graph = graph_of(fn, *given, mode="real")
    journal = Journal("test", strict=True)
    return lower_graph(graph, journal), journal


def test_a_copy_between_devices_is_a_planned_call() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Any:
        return (x * 2).cpu().sum() + y, y.to("cuda:0", torch.float64) * 2, (y + 1).cos()

    low, journal = _on_two_devices(fn)
    assert [c.op for c in steps_of(low, Call)] == ["aten::_to_copy.default"] * 2
    assert [r.device.type for r in steps_of(low, Region)] == ["cuda", "cpu", "cpu", "cuda", "cpu"]
    assert not journal.retreats


def test_attention_in_training_is_two_calls_and_no_copies() -> None:
    """Heads-last operands, as a projection leaves them; the number of the backend stays on the CPU."""

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out, statistics, number = torch.ops.fxopt.attention_forward(q, k, v)
        return number, *torch.ops.fxopt.attention_backward(out, q, k, v, None, out, statistics, number)

    with FakeTensorMode(allow_non_fake_inputs=True):
        given = (torch.empty(2, 8, 4, 16, device="cuda").half().transpose(1, 2) for _ in range(3))
        graph = graph_of(fn, *given, mode="real")
    low = lower_graph(graph, Journal("test", strict=True))
    forward, backward = low.steps
    assert [forward.op, backward.op] == ["fxopt::attention_forward.default", "fxopt::attention_backward.default"]
    number = low.buffers[forward.outputs[2]]
    assert (number.device.type, number.dtype, number.shape) == ("cpu", torch.int64, ())
    assert {low.buffers[name].strides for name in (forward.outputs[0], *backward.outputs)} == {(512, 16, 64, 1)}


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y, z: x + z,
        lambda x, y, z: torch.where(x > z, x, z.sin()),
        lambda x, y, z: x + torch.tensor(2.0),
        lambda x, y, z: aten.copy.default(x, y) + 1,
    ],
    ids=["number", "computed", "constant", "copy"],
)
def test_a_number_on_the_cpu_is_copied_to_the_gpus_kernel(fn: Callable[..., Any]) -> None:
    low, _ = _on_two_devices(fn)
    calls = steps_of(low, Call)
    assert calls and {c.op for c in calls} <= {"aten::_to_copy.default", "aten::copy.default"}
    assert steps_of(low, Region)[-1].device.type == "cuda"
    assert all(spec.device == region.device for region in steps_of(low, Region) for spec in region.buffers.values())


# ---------------------------------------------------------------------- falling back


def test_an_op_without_a_lowering_is_a_call_and_noted() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return aten.linalg_inv_ex.default(x * 2)[0] + 1

    journal, x = Journal("test"), torch.randn(4, 4)
    low = lower_graph(graph_of(fn, x), journal)
    assert kinds(low.steps) == ["Region", "Call", "Region"]
    assert journal.retreats == [("linalg_inv_ex (aten.linalg_inv_ex.default)", "no lowering for this op")]
    check(low, fn, x)


def test_strict_names_the_op_without_a_lowering() -> None:
    graph = graph_of(lambda x: aten.linalg_inv_ex.default(x)[0], torch.randn(4, 4))
    with pytest.raises(RetreatError, match=r"linalg_inv_ex.*no lowering"):
        lower_graph(graph, Journal("test", strict=True))


def test_a_lowering_that_refuses_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it stored before it gave up is taken back, and its reason is the retreat's."""

    def refuses(ctx: lowering.Lowering, x: Any) -> None:
        ctx.store(x)
        results = [(0, x.dtype)]
        ctx.reduce("sum", x.shape, [0], lambda i: (lowering.at(x, i),), accumulate=x.dtype, inputs=[x], results=results)
        raise UnsupportedError("only on Sundays")

    other = Table({**table(), aten.tanh.default: refuses})
    monkeypatch.setattr(lowering, "table", lambda: other)
    journal, x = Journal("test"), torch.randn(4, 4)
    low = lower_graph(graph_of(torch.tanh, x), journal)
    assert kinds(low.steps) == ["Call"]
    assert journal.retreats == [("tanh (aten.tanh.default)", "only on Sundays")]
    check(low, torch.tanh, x)


@pytest.mark.parametrize("wrong", ["dtype", "shape", "rank"])
def test_a_lowering_that_disagrees_with_torch_is_not_believed(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def lies(ctx: lowering.Lowering, x: lowering.Stored) -> lowering.Stored:
        if wrong == "dtype":
            return lowering.replace(x, dtype=torch.float64)
        return lowering.replace(x, shape=(3, 4) if wrong == "shape" else (4,))

    other = Table({**table(), aten.tanh.default: lies})
    monkeypatch.setattr(lowering, "table", lambda: other)
    journal, x = Journal("test"), torch.randn(4, 4)
    low = lower_graph(graph_of(torch.tanh, x), journal)
    assert "lowering gives" in journal.retreats[0][1]
    check(low, torch.tanh, x)


def test_planned_library_ops_are_no_retreat() -> None:
    journal = Journal("test", strict=True)
    low = lower_graph(graph_of(torch.mm, torch.randn(3, 4), torch.randn(4, 5)), journal)
    assert kinds(low.steps) == ["Call"]


def test_nodes_named_as_library_nodes_are_calls_without_a_note() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(torch.tanh(x) + 1)

    journal, x = Journal("test", strict=True), torch.randn(4, 4)
    low = lower_graph(graph_of(fn, x), journal, frozenset({"tanh"}))
    assert [s.op for s in steps_of(low, Call)] == ["aten::tanh.default"]
    check(low, fn, x)


def test_element_types_that_kernels_lack_are_calls() -> None:
    journal, x = Journal("test"), torch.randn(4, dtype=torch.complex64)
    low = lower_graph(graph_of(lambda x: x * 2, x), journal)
    assert kinds(low.steps) == ["Call"]
    assert "element type" in journal.retreats[0][1]


def test_a_data_dependent_size_cannot_be_lowered() -> None:
    graph = graph_of(lambda x: aten.nonzero.default(x) * 2, torch.randn(4), mode="symbolic")
    with pytest.raises(UnsupportedError, match="data"):
        lower_graph(graph, Journal("test"))


# ---------------------------------------------------------------------- results and inputs


def test_several_results_are_values_of_their_own() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = aten.topk.default(x, 2)
        return values * 2, indices + 1

    x = torch.randn(3, 8)
    low = lower_graph(graph_of(fn, x), Journal("test"))
    check(low, fn, x)


def test_results_that_nobody_picks_have_no_buffer() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return aten.linalg_inv_ex.default(x)[0]

    (call,) = steps_of(lower_graph(graph_of(fn, torch.randn(4, 4)), Journal("test")), Call)
    assert [name is None for name in call.outputs] == [False, True]


def test_lowered_reductions_give_several_tensors() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.var_mean(x, 1))

    x = torch.randn(3, 8, dtype=torch.float64)
    low = lower_graph(graph_of(fn, x), Journal("test", strict=True))
    assert not steps_of(low, Call)
    check(low, fn, x)


def test_one_tensor_returned_twice_is_one_object_and_its_detached_twin_another() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x + 1
        return y, y, aten.detach.default(y)

    low = lower_graph(graph_of(fn, torch.randn(4)), Journal("test"))
    first, second, third = low.outputs
    assert first == second == Ref(first.name)
    assert third != first
    assert [s.of for s in steps_of(low, Alias)] == [first.name]


def test_sizes_none_and_numbers_are_outputs_too() -> None:
    graph = graph_of(lambda x: (x.shape[0], x * 2, x.shape[0] * 2 + 1), torch.randn(5, 3), mode="symbolic")
    low = lower_graph(graph, Journal("test"))
    assert [type(o) for o in low.outputs] == [Size, Ref, Size]
    assert run_lowered(low, {low.inputs[0]: torch.randn(7, 3)})[::2] == [7, 15]


def test_sparse_inputs_go_only_to_library_calls() -> None:
    fn = lambda s, x: torch.mm(s, x) + 1  # noqa: E731
    dense, x = torch.eye(4), torch.randn(4, 4)
    low = lower_graph(graph_of(fn, dense.to_sparse(), x), Journal("test"))
    assert "s_1" not in low.buffers
    (call,) = steps_of(low, Call)
    assert call.op == "aten::mm.default"
    check(low, fn, dense.to_sparse(), x)


def test_constants_of_the_graph_are_buffers() -> None:
    kept, x = torch.randn(4), torch.randn(4)
    graph = graph_of(lambda x: x + 1, x)
    graph.gm.register_buffer("kept", kept)
    add = next(n for n in graph.gm.graph.nodes if n.op == "call_function")
    with graph.gm.graph.inserting_before(add):
        attribute = graph.gm.graph.get_attr("kept")
    attribute.meta["val"] = add.meta["val"]
    add.args = (add.args[0], attribute)
    low = lower_graph(graph, Journal("test"))
    assert list(low.constants.values()) == [kept]
    check(low, lambda x: x + kept, x)


def test_kernels_do_not_mix_devices() -> None:
    """Two devices in one graph (meta stands for the second): each region stays on its own."""

    def fn(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(x) + 1, torch.exp(y) * 2

    low = lower_graph(graph_of(fn, torch.randn(4), torch.randn(4, device="meta")), Journal("test"))
    regions: list[Region] = steps_of(low, Region)
    assert {r.device.type for r in regions} == {"cpu", "meta"}
    assert all({spec.device for spec in r.buffers.values()} == {r.device} for r in regions)


# ---------------------------------------------------------------------- mutation


@pytest.mark.parametrize("joined", [False, True])
def test_a_copy_of_values_read_elsewhere_goes_through_fresh_memory(joined: bool) -> None:
    """x[i, j] = x[j, i]: one kernel would read what it has written."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        return aten.copy_.default(x, aten.permute.default(x, [1, 0]))

    low = lower_graph(graph_of(fn, torch.randn(4, 4)), Journal("test"))
    low = schedule(low) if joined else low
    assert kinds(low.steps) == ["Region", "Region"]
    x = torch.randn(4, 4)
    want = x.t().clone()
    run_lowered(low, {low.inputs[0]: x})
    torch.testing.assert_close(x, want)


def test_values_of_the_old_contents_are_stored_before_a_write() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        old = torch.tanh(x)
        aten.copy_.default(x, y)
        return old + x

    low = lower_graph(graph_of(fn, torch.randn(4), torch.randn(4)), Journal("test"))
    x, y = torch.randn(4), torch.randn(4)
    want = torch.tanh(x) + y
    (got,) = run_lowered(low, dict(zip(low.inputs, (x, y), strict=True)))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y.split(2, -1)[1].unsqueeze(1),
        lambda y: y.split([1, 3], -1)[1].permute(0, 2, 1).view(3, 3, 2, 1),
        lambda y: y.unbind(1)[1].chunk(2, -1)[0],
        lambda y: y.transpose(0, 2).relu()[:, ::2],
    ],
)
def test_views_of_computed_values_are_returned_with_the_strides_of_tracing(view: Callable[[torch.Tensor], Any]) -> None:
    x, index = torch.randn(3, 2, 4), torch.randint(4, (3, 2, 4))
    low = lower_graph(graph_of(lambda x, index: view(x.gather(-1, index)), x, index), Journal("test"))
    (got,) = run_lowered(low, dict(zip(low.inputs, (x, index), strict=True)))
    want = view(x.gather(-1, index))
    assert torch.equal(got, want)
    assert got.stride() == want.stride()


def test_an_output_whose_value_is_laid_out_otherwise_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward is compiled for the strides of tracing, and reads what the forward saved by them."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        return (x + 1).t()

    monkeypatch.setattr(layout, "dense_strides", lambda ctx, val: (1, val.shape[0]))
    x = torch.randn(3, 4)
    low = lower_graph(graph_of(fn, x), Journal("test"))
    (got,) = run_lowered(low, {low.inputs[0]: x})
    assert torch.equal(got, fn(x))
    assert got.stride() == fn(x).stride()


def test_an_offset_into_memory_of_the_plan_is_never_left_to_a_call() -> None:
    """The plan may put a buffer anywhere in a larger storage, and the call would count from the start of that."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        return aten.as_strided_scatter.default(x, torch.ones(2), [2], [1], 3)

    x, journal = torch.randn(6), Journal("test")
    left = frozenset({"as_strided_scatter"})
    with pytest.raises(UnsupportedError, match="start of memory"):
        lower_graph(graph_of(lambda x: fn(x.exp()), x), journal, left)
    low = lower_graph(graph_of(fn, x), journal, left)
    (got,) = run_lowered(low, dict(zip(low.inputs, (x,), strict=False)))
    assert torch.equal(got, fn(x))


def test_a_lowering_that_gives_up_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it stored early is an expression again: the buffer's writer is gone with its other steps."""

    def gives_up(ctx: Any, x: Any, *args: Any) -> Any:
        ctx.store_pending_readers(x.buffer, ctx.node)
        ctx.tensor_name(ctx.store(fresh(x)))
        raise UnsupportedError("not today")

    monkeypatch.setitem(table(), aten.index_copy.default, gives_up)

    def fn(x: torch.Tensor, i: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        double = x * 2
        changed = aten.index_copy.default(x, 0, i, s)
        later = double + 1
        x.copy_(changed)
        return later

    args = (torch.randn(4, 3), torch.tensor([2, 0]), torch.randn(2, 3))
    low = lower_graph(graph_of(fn, *args), Journal("test"))
    assert [c.op for c in steps_of(low, Call)] == ["aten::index_copy.default"]
    want = fn(*(a.clone() for a in args))
    (got,) = run_lowered(low, dict(zip(low.inputs, args, strict=True)))
    assert torch.equal(got, want)
