"""A plan is its bytes: everything survives the round trip, and damage is named."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch

from fxopt.errors import PlanError
from fxopt.ir.exprs import floordiv
from fxopt.ir.graph import Role
from fxopt.ir.region import Alias, Call, Ref, Size
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import InputSpec, Plan, SymbolSource
from tests.runtime.plans import CPU, F32, S0, buffer, increment, plan, tensor

ARGUMENTS: list[Any] = [
    None,
    True,
    3,
    -(2**70),
    2.5,
    -0.0,
    1e-300,
    float("inf"),
    float("-inf"),
    complex(1.5, float("inf")),
    "text",
    torch.bfloat16,
    torch.device("cuda", 1),
    torch.strided,
    torch.channels_last,
    [1, [Ref("x"), None], (2.0, "a")],
    (),
    {"key": [Size(S0 * 2 + 1)], "dtype": torch.float8_e4m3fn},
]


def full() -> Plan:
    half = floordiv(S0, 2)
    steps = [
        increment("x", "a", S0, 4, label="first", errors=("out of bounds",), inplace=(("a", "x"),)),
        Alias("v", "a", (half, 4), (8, 1), S0),
        Call("aten::mul.Tensor", (Ref("v"), 2.0), {"dtype": torch.float32}, ("c", None), "layer.0", ("v",), True),
        increment("c", "d", half, 4),
    ]
    return plan(
        [tensor("x", S0, 4, role=Role.PARAMETER), InputSpec("n", "int"), InputSpec("f", "float"), InputSpec("g", "other")],
        [buffer("a", S0, 4), buffer("c", half, 4), buffer("d", half, 4)],
        steps,
        [Ref("d"), Size(S0), None, 1.5],
        symbols=[SymbolSource("s0", 0, "size", 0)],
        constants=[buffer("w", 3)],
    )


def test_round_trip_keeps_everything() -> None:
    for original in (full(), plan_memory(full())):
        back = Plan.from_json(original.to_json())
        assert back == original
        assert back.from_bytes and not original.from_bytes
        assert back.to_json() == original.to_json()
        assert Plan.from_json(original.to_json().encode()) == original


@pytest.mark.parametrize("value", ARGUMENTS, ids=repr)
def test_every_kind_of_argument_survives(value: Any) -> None:
    call = Call("aten::f.default", (value,), {"k": value})
    made = plan([tensor("x", S0)], [], [call], [], symbols=[SymbolSource("s0", 0)])
    (back,) = Plan.from_json(made.to_json()).steps
    assert isinstance(back, Call)
    for found in (back.args[0], back.kwargs["k"]):
        assert found == value and type(found) is type(value) and repr(found) == repr(value)


def test_nan_survives() -> None:
    made = plan([], [], [Call("aten::f.default", (float("nan"),))], [])
    (back,) = Plan.from_json(made.to_json()).steps
    assert isinstance(back, Call) and math.isnan(back.args[0])


def test_what_a_plan_cannot_hold_is_named() -> None:
    made = plan([], [], [Call("aten::f.default", (1, [object()]))], [])
    with pytest.raises(PlanError, match=r"plan\.steps\[0\]\.args\[1\]\[0\].*object"):
        made.to_json()


def _set(data: Any, path: str, value: Any) -> Any:
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    for key in parents:
        data = data[key]
    data[last] = value
    return data


DAMAGE = [
    ("version", 999, "plan.version"),
    ("name", 1, "plan.name"),
    ("inputs.0.kind", "tensr", r"plan.inputs\[0\].kind"),
    ("inputs.0.role", "x", r"plan.inputs\[0\].role"),
    ("inputs.0.dtype", "float33", r"plan.inputs\[0\].dtype"),
    ("inputs.0.dtype", "nn", r"plan.inputs\[0\].dtype"),
    ("inputs.0.device", "toaster", r"plan.inputs\[0\].device"),
    ("inputs.0.strides", [1], r"plan.inputs\[0\].strides"),
    ("symbols.0", ["s0", 7, "size", 0, 1, 0], r"plan.symbols\[0\]"),
    ("symbols.0", ["s0", 0, "size", 5, 1, 0], r"plan.symbols\[0\]"),
    ("symbols.0", ["s0", 1, "size", 0, 1, 0], r"plan.symbols\[0\]"),
    ("symbols.0", ["s9", 0, "size", 0, 1, 0], "s0"),
    ("symbols.0", ["s0", 0, "size", 0, 0, 0], r"plan.symbols\[0\]"),
    ("symbols.0", ["s0"], r"plan.symbols\[0\]"),
    ("buffers.0.shape", ["x"], r"plan.buffers\[0\].shape\[0\]"),
    ("buffers.0.shape", [["+", [1, ["floordiv", 1, 0]]], 4], r"plan.buffers\[0\].shape\[0\]"),
    ("buffers.1.name", "a", "plan.buffers"),
    ("inputs.1.name", "x", "plan.buffers"),
    ("steps.0.step", "jump", r"plan.steps\[0\].step"),
    ("steps.0.language", "fortran", r"plan.steps\[0\].language"),
    ("steps.0.buffers", ["x", "zzz"], r"plan.steps\[0\].*zzz"),
    ("steps.0.writes", ["d"], r"plan.steps\[0\].*'d'"),
    ("steps.0.aligned", [2], r"plan.steps\[0\].aligned"),
    ("steps.0.grid", [1, 1], r"plan.steps\[0\].grid"),
    ("steps.2.args", [{"ref": "d"}, {"reff": "d"}], r"plan.steps\[2\].args\[1\]"),
    ("steps.2.args", [{"ref": "later"}], r"plan.steps\[2\].*later"),
    ("steps.2.effect", 1, r"plan.steps\[2\].effect"),
    ("outputs", [{"ref": "nothing"}], "plan.outputs.*nothing"),
    ("placement", {"x": 0}, "plan.placement.x"),
    ("placement", {"a": 3}, "plan.placement.a"),
    ("offsets", {"x": 16}, "plan.offsets.x: the buffer is in no slot"),
]


@pytest.mark.parametrize(("path", "value", "message"), DAMAGE)
def test_damage_is_named(path: str, value: Any, message: str) -> None:
    data = json.loads(full().to_json())
    _set(data, path, value)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("offset", [-16, 8, 32])
def test_an_offset_lies_within_its_slot(offset: int) -> None:
    steps = [increment("x", "a", 8), increment("a", "b", 8)]
    made = plan_memory(plan([tensor("x", 8)], [buffer("a", 8), buffer("b", 8)], steps, [Ref("b")]))
    data = json.loads(made.to_json())
    data["slots"][0][1] = 48
    data["offsets"] = {"a": 16}
    assert Plan.from_json(json.dumps(data)).offsets == {"a": 16}
    data["offsets"] = {"a": offset}
    with pytest.raises(PlanError, match=r"plan\.offsets\.a"):
        Plan.from_json(json.dumps(data))


def test_every_missing_field_is_named() -> None:
    data = json.loads(full().to_json())
    for key in data:
        damaged = {k: copy.deepcopy(v) for k, v in data.items() if k != key}
        with pytest.raises(PlanError, match=rf"plan\.{key}"):
            Plan.from_json(json.dumps(damaged))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"version": NaN}', b"\xff\xfe", "[" * 100000])
def test_not_a_plan(text: str | bytes) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_a_freed_name_is_gone() -> None:
    made = plan_memory(
        plan(
            [tensor("x", 4)], [buffer("a", 4), buffer("b", 4)], [increment("x", "a", 4), increment("a", "b", 4)], [Ref("b")]
        )
    )
    data = json.loads(made.to_json())
    data["outputs"] = [{"ref": "a"}]
    with pytest.raises(PlanError, match="'a'"):
        Plan.from_json(json.dumps(data))


def test_dtype_and_device_are_torch_values() -> None:
    back = Plan.from_json(full().to_json())
    assert back.inputs[0].dtype is F32 and back.inputs[0].device == CPU and back.inputs[0].role is Role.PARAMETER
