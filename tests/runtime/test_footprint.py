"""What a plan is said to hold."""

from __future__ import annotations

import torch

from fxopt.ir.exprs import contiguous_strides
from fxopt.ir.graph import Role
from fxopt.ir.region import Alias, BufferSpec, Call, Ref
from fxopt.runtime.footprint import Footprint, footprint, holdings, peak_with, standing
from fxopt.runtime.lifetimes import Lifetimes
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import InputSpec, Launch, Plan, SymbolSource
from tests.runtime.plans import F32, S0

GPU = torch.device("cuda", 0)
KIB = 1 << 10


def _spec(name: str, kib: int) -> BufferSpec:
    return BufferSpec(name, F32, GPU, (kib * 256,), (1,))


def _launch(source: str, target: str) -> Launch:
    return Launch("k", "triton", "k", (source, target), (target,), GPU)


def _plan(*, role: Role = Role.USER) -> Plan:
    """x -> a -> (library) r -> b -> c, which is returned."""
    steps = (
        _launch("x", "a"),
        Call("aten::exp.default", (Ref("a"),), outputs=("r",)),
        Alias("half", "r", (128,), (1,), 0),
        _launch("half", "b"),
        _launch("b", "c"),
    )
    x = InputSpec("x", "tensor", role, F32, GPU, (16 * 256,), contiguous_strides((16 * 256,)))
    buffers = (_spec("a", 64), _spec("r", 32), _spec("b", 8), _spec("c", 4))
    return Plan("test", (x,), (), (), buffers, steps, (Ref("c"),))


def test_the_peak_and_its_parts() -> None:
    found = footprint(plan_memory(_plan()), GPU)
    assert found == Footprint(peak=96 * KIB, planned=64 * KIB, own=0, library=32 * KIB, outputs=4 * KIB)


def test_inputs_that_are_given_stand_until_their_last_use() -> None:
    made = plan_memory(_plan())
    assert peak_with(made, GPU, []) == 96 * KIB
    assert peak_with(made, GPU, [(("x",), 16 * KIB)]) == 96 * KIB, "x ends with the first step, when only a is there"
    assert peak_with(made, GPU, [(("x",), 64 * KIB)]) == 128 * KIB
    assert peak_with(made, GPU, [(("unused", "x"), 64 * KIB)]) == 128 * KIB


def test_another_device_holds_nothing() -> None:
    assert footprint(plan_memory(_plan()), torch.device("cuda", 1)) == Footprint(0, 0, 0, 0, 0)


def test_an_alias_keeps_a_result_of_the_library() -> None:
    made = _plan()
    (result,) = [h for h in holdings(made, Lifetimes.of(made)) if h.name == "r"]
    assert (result.interval.first, result.interval.last) == (1, 3)


def test_whether_inputs_stay_is_not_known() -> None:
    for role, kib in ((Role.USER, [16, 0]), (Role.PARAMETER, [0, 0])):
        made = _plan(role=role)
        freed, kept = standing([h for h in holdings(made, Lifetimes.of(made)) if h.name == "x"], 6)
        assert [freed[0], freed[1]] == [n * KIB for n in kib] and set(kept) == {kib[0] * KIB}


def test_sizes_known_only_at_run_time() -> None:
    made = Plan(
        "test",
        (InputSpec("x", "tensor", Role.USER, F32, GPU, (S0,), (1,)),),
        (),
        (SymbolSource("s0", 0),),
        (BufferSpec("a", F32, GPU, (S0,), (1,)),),
        (_launch("x", "a"),),
        (Ref("a"),),
    )
    assert footprint(plan_memory(made), GPU) is None and peak_with(plan_memory(made), GPU, []) is None
