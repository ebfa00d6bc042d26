"""The pass `quantize` on attention: the rules that ask for it, values against the arithmetic, layouts, and what stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.ir.attention_op import attention
from fxopt.precision import KnownLayer
from fxopt.quant.emulate_attention import AttentionCall, quantized_attention
from tests.passes.graphs import calls, execute
from tests.passes.test_quantize import notes, quantized

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
OP = "fxopt::scaled_attention"
RULE = {"*@attention": "fp8"}
SCALES = {"@attention.query": 0.01, "@attention.key": 0.02, "@attention.value": 0.005}


class Table:
    """Of one attention in the model itself."""

    def __init__(
        self,
        obstacle: str | None = None,
        names: tuple[str, ...] = tuple(SCALES),
        heads: dict[str, Tensor] | None = None,
    ) -> None:
        self.obstacle, self._names, self.heads = obstacle, names, heads or {}

    def digest(self) -> str:
        return ""

    def names(self) -> list[str]:
        return ["@attention"]

    def known(self, layer: str) -> KnownLayer | None:
        return KnownLayer("attention", (4, 32), None, self.obstacle) if layer in self._names else None

    def scale(self, layer: str, precision: str) -> float:
        return SCALES[layer]

    def head_scales(self, operand: str, precision: str) -> Tensor | None:
        return self.heads.get(operand)

    def zero_point(self, layer: str, precision: str) -> int:
        return 0

    def channels(self, layer: str) -> None:
        return None

    def refinement(self, layer: str, precision: str) -> None:
        return None


def operands(rows: int = 20, keys: int = 45, width: int = 32, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, n, 4, width).to(dtype).transpose(1, 2) for n in (rows, keys, keys))


def on_grid(x: Tensor, scale: float) -> Tensor:
    return (x.float() * torch.tensor(scale).reciprocal()).clamp(-448, 448).to(FP8).double() * scale


@pytest.mark.parametrize("keys", [45, 48])
@pytest.mark.parametrize("causal", [False, True])
def test_values_are_those_of_operands_on_the_grid(keys: int, causal: bool) -> None:
    q, k, v = operands(keys=keys)
    graph, context = quantized(lambda q, k, v: attention(q, k, v, None, 0.0, causal), (q, k, v), (), RULE, Table())
    (got,) = execute(graph, (q, k, v))
    wide = [on_grid(x, scale) for x, scale in zip((q, k, v), SCALES.values(), strict=True)]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=causal)
    assert OP in calls(graph) and got.dtype == BF16 and notes(context) == ["@attention: fp8"]
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=1e-2)
    (node,) = (n for n in graph.gm.graph.nodes if str(n.target).startswith("fxopt.scaled_attention"))
    value = node.args[2].meta["val"]
    assert value.dtype == FP8 and value.stride(2) == 1 and value.stride(3) == 48


@pytest.mark.parametrize("kept", ["query", "key", "value", "all"])
@pytest.mark.parametrize("groups", [4, 2])
def test_heads_may_have_scales_of_their_own(kept: str, groups: int) -> None:
    """As emulated; those of a query's heads that share a key are one."""
    q, k, v = operands()
    k, v = k[:, :groups], v[:, :groups]
    heads = {
        f"@attention.{name}": torch.rand(n) * 0.02 + 0.005 for name, n in (("query", 4), ("key", groups), ("value", groups))
    }
    own = heads if kept == "all" else {f"@attention.{kept}": heads[f"@attention.{kept}"]}
    graph, _ = quantized(lambda q, k, v: attention(q, k, v, enable_gqa=groups < 4), (q, k, v), (), RULE, Table(heads=own))
    (got,) = execute(graph, (q, k, v))
    assert OP in calls(graph)
    call = AttentionCall("", q, k, v, None, False, None, groups < 4)
    scales = {name.partition(".")[2]: own.get(name, scale) for name, scale in SCALES.items()}
    torch.testing.assert_close(got.float(), quantized_attention(call, scales).float(), rtol=3e-2, atol=2e-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v)


@pytest.mark.parametrize(
    ("fn", "args", "table", "precision", "why"),
    [
        (attend, operands(), None, "fp8", "there is none"),
        (attend, operands(), Table(names=()), "fp8", "did not observe attention"),
        (attend, operands(), Table("only zeros"), "fp8", "only zeros"),
        (attend, operands(), Table(), "int8", "in fp8, not in int8"),
        (attend, operands(width=24), Table(), "fp8", "32 to 256 wide"),
        (attend, operands(dtype=torch.float32), Table(), "fp8", "half type"),
    ],
)
def test_what_cannot_be_quantized_says_why(
    fn: Callable[..., Any], args: tuple[Tensor, ...], table: Table | None, precision: str, why: str
) -> None:
    graph, context = quantized(fn, args, (), {"*@attention": precision}, table)
    (note,) = notes(context)
    assert OP not in calls(graph) and note.startswith(f"@attention stays high, not {precision}") and why in note


def test_a_rule_for_all_layers_means_no_attention() -> None:
    graph, context = quantized(attend, operands(), (), "fp8", Table())
    assert OP not in calls(graph) and notes(context) == []
