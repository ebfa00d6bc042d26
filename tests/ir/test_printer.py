"""What graphs and loop nests look like as text."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline

from fxopt.ir.exprs import Sym, symbol
from fxopt.ir.loops import Const, Load, Masked, Nest, Op, Reduce, Store
from fxopt.ir.printer import describe, print_graph, print_nest, print_region
from fxopt.ir.region import BufferSpec, Region
from tests.passes.graphs import capture, optimize


def test_graph() -> None:
    graph, _ = optimize(
        lambda x, w, b: ((x @ w.t() + b) / 2.0, x.view(-1)), (torch.ones(2, 3), torch.ones(4, 3), torch.ones(4))
    )
    next(n for n in graph.gm.graph.nodes if "addmm" in n.name).meta["module"] = "encoder.0"
    assert_expected_inline(
        print_graph(graph),
        """\
# test: inference, 4 calls
import torch
from torch import device

aten = torch.ops.aten


def test(
    x_1,  # f32[2, 3] · user
    w_1,  # f32[4, 3] · user
    b_1,  # f32[4] · user
):
    permute_default = aten.permute.default(w_1, [1, 0])  # 0000 f32[3, 4] strides (1, 3) · by views
    addmm_default = aten.addmm.default(b_1, x_1, permute_default)  # 0001 f32[2, 4] · encoder.0 · by mm_bias
    mul_tensor = aten.mul.Tensor(addmm_default, 0.5)  # 0002 f32[2, 4] · by algebra
    view = aten.view.default(x_1, [-1])  # 0003 f32[6]
    return (mul_tensor, view)
""",
    )


def test_a_printed_graph_runs() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean, deviation = torch.var_mean(x, 1)
        return (x.masked_fill(x > 0, float("-inf")).double(), mean, deviation + torch.arange(3)[:3])

    x = torch.randn(3, 4)
    space: dict[str, object] = {}
    exec(print_graph(capture(function, (x,))), space)
    for ours, theirs in zip(space["test"](x), function(x), strict=True):  # type: ignore[operator]
        assert torch.equal(ours, theirs)


def softmax_nest() -> Nest:
    row, col = Sym("i0", size=4), Sym("r0", size=7)
    x = Load("b0", 7 * symbol(row) + symbol(col), torch.float32)
    top = Reduce("max", (x,), (col,), torch.float32)
    power = Op("exp", (Op("sub", (x, top), torch.float32),), torch.float32)
    total = Reduce("sum", (power,), (col,), torch.float32)
    value = Op("truediv", (power, total), torch.float32)
    masked = Masked(Op("lt", (x, Const(0.0, torch.float32)), torch.bool), value, Const(0.0, torch.float32))
    return Nest((row,), (col,), (Store("b1", 7 * symbol(row) + symbol(col), masked),))


def test_nest() -> None:
    assert_expected_inline(
        print_nest(softmax_nest()),
        """\
for i0 in range(4):
    # reduced: r0 in range(7)
    v0 = b0[(7*i0 + r0)]  # f32, per r0
    v1 = max(v0; over r0)[0]  # f32
    v2 = exp(sub(v0, v1))  # f32, per r0
    v3 = sum(v2; over r0)[0]  # f32
    b1[(7*i0 + r0)] = (truediv(v2, v3) if lt(v0, 0.0) else 0.0)
""",
    )


def test_region() -> None:
    buffers = {name: BufferSpec(name, torch.float32, torch.device("cpu"), (4, 7), (7, 1)) for name in ("b0", "b1")}
    region = Region("r0", softmax_nest(), buffers, torch.device("cpu"), origins=("encoder.0.softmax",))
    assert print_region(region).splitlines()[:5] == [
        "# region r0 on cpu",
        "# from encoder.0.softmax",
        "b0: f32[4, 7] strides (7, 1)",
        "b1: f32[4, 7] strides (7, 1)  # written",
        "for i0 in range(4):",
    ]


def test_values() -> None:
    assert describe(torch.empty(2, 3).t()) == "f32[3, 2] strides (1, 3)"
    assert describe((torch.empty(2, dtype=torch.bfloat16), 3, None)) == "(bf16[2], int 3, None)"
    assert describe(torch.empty(2, device="meta")) == "f32[2] meta"
