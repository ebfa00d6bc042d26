"""Lifetimes and shared storage."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from fxopt.ir.exprs import Int, evaluate
from fxopt.ir.region import Alias, Call, Ref
from fxopt.runtime.lifetimes import returns_fresh
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import Free, Plan, SymbolSource
from tests.runtime.plans import S0, buffer, increment, plan, tensor


def chain(length: int, size: Int = 1024, **kwargs: Any) -> Plan:
    """x -> b0 -> b1 -> ... -> b{length-1}, the last one returned."""
    names = ["x", *(f"b{i}" for i in range(length))]
    steps = [increment(a, b, size, **({"inplace": ((b, a),)} if kwargs.get("inplace") else {})) for a, b in pairwise(names)]
    symbols = [] if isinstance(size, int) else [SymbolSource("s0", 0)]
    return plan([tensor("x", size)], [buffer(n, size) for n in names[1:]], steps, [Ref(names[-1])], symbols=symbols)


def test_a_value_is_freed_after_its_last_use() -> None:
    done = plan_memory(chain(3))
    frees = [s.names for s in done.steps if isinstance(s, Free)]
    assert frees == [("x",), ("b0",), ("b1",)]
    assert isinstance(done.steps[1], Free)


def test_an_unused_input_is_freed_first() -> None:
    done = plan_memory(plan([tensor("x", 4), tensor("y", 4)], [buffer("a", 4)], [increment("y", "a", 4)], [Ref("a")]))
    assert done.steps[0] == Free(("x",))


def test_two_storages_are_enough_for_a_chain() -> None:
    done = plan_memory(chain(6))
    assert len(done.slots) == 2 and done.slots[0].nbytes == 4096
    assert "b5" not in done.placement, "an output has its own storage"
    for a, b in pairwise(range(5)):
        assert done.placement[f"b{a}"] != done.placement[f"b{b}"], "producer and consumer are alive together"


def test_symbolic_sizes_share_when_equal() -> None:
    done = plan_memory(chain(6, S0))
    assert len(done.slots) == 2 and evaluate(done.slots[0].nbytes, {"s0": 10}) == 40


def test_in_place_only_when_asked() -> None:
    done = plan_memory(chain(4, inplace=True))
    assert {done.placement[f"b{i}"] for i in range(3)} == {0} and len(done.slots) == 1


def test_in_place_needs_a_dying_input() -> None:
    steps = [
        increment("x", "a", 8),
        increment("a", "b", 8, inplace=(("b", "a"),)),
        increment("a", "c", 8),
        increment("b", "d", 8),
    ]
    done = plan_memory(plan([tensor("x", 8)], [buffer(n, 8) for n in "abcd"], steps, [Ref("c"), Ref("d")]))
    assert "a" not in done.placement or done.placement["a"] != done.placement["b"]


def test_in_place_never_takes_an_input() -> None:
    steps = [increment("x", "a", 8, inplace=(("a", "x"),)), increment("a", "b", 8)]
    done = plan_memory(plan([tensor("x", 8)], [buffer("a", 8), buffer("b", 8)], steps, [Ref("b")]))
    assert list(done.placement) == ["a"], "x is the caller's, b is an output"


def test_a_dead_storage_grows_for_a_larger_buffer() -> None:
    sizes = {"a": 16, "b": 64, "c": 256, "d": 16}
    steps = [
        increment("x", "a", 16),
        increment("a", "b", 16),
        increment("b", "c", 16),
        increment("c", "d", 16),
        increment("d", "e", 16),
    ]
    done = plan_memory(
        plan([tensor("x", 16)], [*(buffer(n, s) for n, s in sizes.items()), buffer("e", 16)], steps, [Ref("e")])
    )
    assert sorted(s.nbytes for s in done.slots) == [256, 1024]
    assert done.placement["a"] == done.placement["c"] and done.placement["b"] == done.placement["d"]


def _with_call(op: str) -> Plan:
    """a is handed to `op`; its result outlives a; b could take a's storage."""
    steps = [
        increment("x", "a", 8),
        Call(op, (Ref("a"),), outputs=("r",)),
        increment("x", "b", 8),
        increment("b", "c", 8),
        Call("aten::add.Tensor", (Ref("r"), Ref("c")), outputs=("out",)),
    ]
    return plan([tensor("x", 8)], [buffer("a", 8), buffer("b", 8), buffer("c", 8)], steps, [Ref("out")])


@pytest.mark.parametrize(
    ("op", "shares"),
    [("aten::exp.default", True), ("aten::view.default", False), ("mylib::op.default", False), ("local:hop", False)],
)
def test_what_a_library_call_may_keep_is_not_reused(op: str, shares: bool) -> None:
    assert ("a" in plan_memory(_with_call(op)).placement) is shares


def test_an_alias_keeps_the_storage() -> None:
    steps = [
        increment("x", "a", 8),
        Alias("view", "a", (4,), (1,), 4),
        increment("x", "b", 8),
        increment("b", "c", 8),
        increment("view", "d", 4),
        increment("c", "e", 8),
    ]
    done = plan_memory(
        plan([tensor("x", 8)], [buffer(n, 8) for n in "abce"] + [buffer("d", 4)], steps, [Ref("d"), Ref("e")])
    )
    assert done.placement.get("a", -1) not in (done.placement.get("b", -2), done.placement.get("c", -2))
    freed_at = next(i for i, s in enumerate(done.steps) if isinstance(s, Free) and "a" in s.names)
    assert freed_at > done.steps.index(steps[4])


def test_an_output_seen_through_an_alias_keeps_its_storage() -> None:
    steps = [
        increment("x", "a", 8),
        Alias("view", "a", (4,), (1,), 4),
        increment("x", "b", 8),
        increment("b", "c", 8),
        increment("c", "d", 8),
    ]
    done = plan_memory(plan([tensor("x", 8)], [buffer(n, 8) for n in "abcd"], steps, [Ref("view"), Ref("d")]))
    assert "a" not in done.placement
    assert not any(isinstance(s, Free) and "a" in s.names for s in done.steps)


def test_the_caller_may_know_its_ops_better() -> None:
    assert "a" not in plan_memory(_with_call("aten::exp.default"), fresh=lambda op: False).placement


def test_a_matrix_product_writes_into_a_planned_buffer() -> None:
    """Unless its result is an output or has strides that the library would not write."""
    calls = [Call("aten::mm.default", (Ref("x"), Ref("x")), outputs=(name,)) for name in "abc"]
    steps = [*calls, increment("a", "d", 8, 8), increment("b", "e", 8, 8)]
    buffers = [buffer("b", 8, 8, strides=(1, 8)), *(buffer(n, 8, 8) for n in "acde")]
    done = plan_memory(plan([tensor("x", 8, 8)], buffers, steps, [Ref("c"), Ref("d"), Ref("e")]))
    found = [s for s in done.steps if isinstance(s, Call)]
    assert [s.op for s in found] == ["aten::mm.out", "aten::mm.default", "aten::mm.default"]
    assert found[0].kwargs == {"out": Ref("a")} and found[0].writes == ("a",) and "a" in done.placement


@pytest.mark.parametrize(
    ("op", "fresh"),
    [
        ("aten::mm.default", True),
        ("aten::convolution.default", True),
        ("aten::view.default", False),
        ("aten::copy_.default", False),
        ("aten::add.out", False),
        ("aten::_unsafe_view.default", False),
        ("aten::reshape.default", False),
        ("aten::type_as.default", False),
        ("aten::native_dropout.default", False),
        ("aten::no_such_op.default", False),
        ("custom::op.default", False),
    ],
)
def test_which_ops_return_fresh_tensors(op: str, fresh: bool) -> None:
    assert returns_fresh(op) is fresh


def test_planning_again_changes_nothing() -> None:
    once = plan_memory(chain(5))
    assert plan_memory(once) == once


def test_no_two_live_buffers_share() -> None:
    """Random graphs: at every launch, its arguments and all that is still needed later have distinct storages."""
    generator = torch.Generator().manual_seed(0)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    for _ in range(30):
        names, steps = ["x"], []
        for i in range(20):
            source = names[-1 - pick(min(len(names), 4))]
            steps.append(increment(source, f"b{i}", 8 * (1 + pick(3)), inplace=((f"b{i}", source),) if pick(2) else ()))
            names.append(f"b{i}")
        buffers = [buffer(n, 32) if pick(2) else buffer(n, 64) for n in names[1:]]
        _assert_disjoint(plan_memory(plan([tensor("x", 64)], buffers, steps, [Ref(names[-1]), Ref(names[7])])))


def _assert_disjoint(done: Plan) -> None:
    launches = [s for s in done.steps if not isinstance(s, Free)]
    last = {name: i for i, s in enumerate(launches) for name in s.buffers}  # type: ignore[union-attr]
    content: dict[int, str] = {}
    for i, step in enumerate(launches):
        source, target = step.buffers  # type: ignore[union-attr]
        if source in done.placement:
            assert content[done.placement[source]] == source, "the input was overwritten before its last use"
        if target in done.placement:
            slot = done.placement[target]
            previous = content.get(slot)
            in_place = previous == source and (target, source) in step.inplace  # type: ignore[union-attr]
            assert previous is None or last[previous] < i or (last[previous] == i and in_place)
            content[slot] = target
