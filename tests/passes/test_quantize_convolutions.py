"""Quantized convolutions: the documented arithmetic, norms folded into scales, residuals in 8 bits, and what stays high."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.graph import Graph
from fxopt.ir.quantized_convolution import SCALED_CONVOLUTION, scaled_convolution
from fxopt.ir.quantized_ops import FLOAT8, quantize_weight
from fxopt.journal import Journal
from fxopt.passes import quantized_pools
from fxopt.passes.context import Context, DefaultOptions
from fxopt.passes.pipeline import run
from fxopt.precision import Decisions, KnownLayer
from tests.passes.graphs import calls, capture, execute

NAME = "fxopt::scaled_convolution"


class Ranges:
    """A table of convolutions: shapes of their weights, in order, and one scale for all."""

    def __init__(self, *shapes: tuple[int, ...], scale: float = 0.03) -> None:
        self.shapes = {f"#{k}" if k else "": shape for k, shape in enumerate(shapes)}
        self.steps = scale

    def digest(self) -> str:
        return str(self.shapes)

    def names(self) -> list[str]:
        return list(self.shapes)

    def known(self, layer: str) -> KnownLayer | None:
        return KnownLayer("convolution", self.shapes[layer], None, None) if layer in self.shapes else None

    def scale(self, layer: str, precision: str) -> float:
        return self.steps

    def channels(self, layer: str) -> None:
        return None

    def refinement(self, layer: str, precision: str) -> None:
        return None


def quantized(
    fn: Any, args: tuple[Tensor, ...], frozen: tuple[int, ...], precision: Any = "int8", table: Any = None, **options: Any
) -> tuple[Graph, Context]:
    graph = capture(fn, args, frozen=frozen)
    given = DefaultOptions(check=True, precision=Decisions.of(precision), calibration=table, **options)
    return graph, run(graph, given, Journal("test"))


def notes(context: Context) -> list[str]:
    return [text for topic, text in context.journal.notes if topic == "precision"]


def image(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def model_of(x: Tensor, w: Tensor, scale: float, dtype: torch.dtype, *geometry: Any) -> Tensor:
    """The documented arithmetic, its sums in float64."""
    largest = 127.0 if dtype == torch.int8 else 448.0
    values = x.float() * torch.tensor(scale).reciprocal()
    values = values.round() if dtype == torch.int8 else values
    values = values.clamp(-largest, largest).to(dtype).double()
    stored, scales = quantize_weight(w.reshape(len(w), -1), dtype)
    weight = stored.double().reshape(w.shape) * scales.double()[:, None, None, None]
    return F.conv2d(values, weight, None, *geometry) * scale


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8])
@pytest.mark.parametrize("geometry", [(1, 1, 1), (2, 1, 1), ((1, 2), (0, 2), (2, 1))])
def test_values_are_those_of_the_documented_arithmetic(dtype: torch.dtype, geometry: Any) -> None:
    x, w = image(2, 16, 9, 7), torch.randn(24, 16, 3, 3)
    graph, _ = quantized(
        lambda x, w: F.conv2d(x, w, None, *geometry),
        (x, w),
        (1,),
        "int8" if dtype == torch.int8 else "fp8",
        Ranges((24, 16, 3, 3)),
    )
    assert NAME in calls(graph) and "convolution" not in calls(graph)
    (got,) = execute(graph, (x, w))
    wanted = model_of(x, w, 0.03, dtype, *geometry)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    eager = F.conv2d(x, w, None, *geometry)
    assert got.stride() == eager.stride() and float((got - eager).norm() / eager.norm()) < 0.05


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_bias_and_a_norm_are_scales_of_the_convolution(channels_last: bool) -> None:
    x, w, bias = image(2, 16, 5, 6), torch.randn(24, 16, 3, 3), torch.randn(24)
    x = x if channels_last else x.contiguous()
    norm = (torch.randn(24), torch.rand(24) + 0.5, torch.randn(24), torch.randn(24))

    def layer(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        y = F.conv2d(x, w, b, 1, 1)
        y = (y - mean[:, None, None]) * torch.rsqrt(var + 1e-5)[:, None, None]
        return torch.relu(y * gain[:, None, None] + shift[:, None, None])

    args = (x, w, bias, *norm)
    graph, _ = quantized(layer, args, tuple(range(1, 7)), table=Ranges((24, 16, 3, 3)))
    names = calls(graph)
    assert not {"sub", "add", "convolution"} & set(names) and names.count("mul") == 1  # that of the cast
    (got,), eager = execute(graph, args), layer(*args)
    assert float((got - eager).norm() / eager.norm()) < 0.03 and got.stride() == eager.stride()


def test_what_others_read_is_not_folded() -> None:
    x, w, shift = image(1, 16, 5, 5), torch.randn(16, 16, 3, 3), torch.randn(16, 1, 1)
    graph, _ = quantized(lambda x, w, s: ((y := F.conv2d(x, w)) + s, y), (x, w, shift), (1, 2), table=Ranges((16, 16, 3, 3)))
    more, plain = execute(graph, (x, w, shift))
    torch.testing.assert_close(more, plain + shift)


def chain(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """A residual block behind an activation."""
    x = torch.relu(x)
    y = torch.relu(F.conv2d(x, w, None, 1, 1))
    return torch.relu(F.conv2d(y, v, None, 1, 1) + x)


CHAIN = (image(2, 16, 5, 5), torch.randn(16, 16, 3, 3) / 12, torch.randn(16, 16, 3, 3) / 12)
TABLE = Ranges((16, 16, 3, 3), (16, 16, 3, 3))


def test_a_residual_is_read_in_8_bits() -> None:
    graph, context = quantized(chain, CHAIN, (1, 2), table=TABLE)
    relu = next(n for n in graph.gm.graph.nodes if n.target is torch.ops.aten.relu.default)
    assert [u.target for u in relu.users] == [torch.ops.aten.mul.Tensor]  # the cast, and nothing else
    assert any("stored in int8 alone" in note for note in notes(context))
    clamps = [n.args[1:] for n in graph.gm.graph.nodes if n.target is torch.ops.aten.clamp.default]
    assert clamps == [(0.0, 127.0)] * 2, "what a relu makes is not below zero"
    (got,), eager = execute(graph, CHAIN), chain(*CHAIN)
    assert float((got - eager).norm() / eager.norm()) < 0.03


@pytest.mark.parametrize(
    ("fn", "precision", "options"),
    [
        (chain, "fp8", {}),  # kernels do not read these
        (chain, "int8", {"disable": ("quantized_residuals",)}),
        (lambda x, w, v: (chain(x, w, v), torch.relu(x)), "int8", {}),  # it is stored anyway
        (lambda x, w, v: chain(x, w, v) * torch.relu(x), "int8", {}),
    ],
)
def test_a_residual_stays_as_it_is(fn: Any, precision: str, options: Any) -> None:
    graph, context = quantized(fn, CHAIN, (1, 2), precision, TABLE, **options)
    assert calls(graph).count(NAME) == 2 and not any("alone" in note for note in notes(context))


def stem(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """A first layer, a pooling and the next convolution."""
    y = torch.relu(F.conv2d(x, w, None, 1, 1) * 2.0)
    return F.conv2d(F.max_pool2d(y, 3, 2, 1), v, None, 1, 1)


POOLS: dict[str, tuple[Any, str, bool]] = {
    "largest": (stem, "int8", True),
    "a residual besides": (
        lambda x, w, v: torch.relu(F.conv2d(y := F.max_pool2d(F.conv2d(x, w), 3, 1, 1), v, None, 1, 1) + y), "int8", True,
    ),
    "float8": (stem, "fp8", False),
    "windows that do not overlap": (lambda x, w, v: F.conv2d(F.max_pool2d(F.conv2d(x, w), 2), v), "int8", False),
    "read by others": (lambda x, w, v: (F.conv2d(y := F.max_pool2d(F.conv2d(x, w), 3, 1), v), y), "int8", False),
    "of an input": (lambda x, w, v: F.conv2d(F.max_pool2d(x, 3, 1), w) + F.conv2d(x, v).sum(), "int8", False),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
def test_what_is_pooled_is_quantized_before_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_pools, "pools_on", lambda device: True)
    fn, precision, expected = POOLS[name]
    args = image(2, 16, 9, 8), torch.randn(16, 16, 3, 3) / 12, torch.randn(16, 16, 3, 3) / 12
    graph, _ = quantized(fn, args, (1, 2), precision, TABLE)
    apart, _ = quantized(fn, args, (1, 2), precision, TABLE, disable=("quantized_pools",))
    pools = [n for n in graph.gm.graph.nodes if n.target is torch.ops.aten.max_pool2d_with_indices.default]
    assert [n.args[0].meta["val"].dtype == torch.int8 for n in pools] == [expected]
    for got, wanted in zip(execute(graph, args), execute(apart, args), strict=True):
        assert torch.equal(got, wanted) and got.stride() == wanted.stride()


def test_casts_that_may_turn_order_around_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a negative scale, or one that is not known."""
    monkeypatch.setattr(quantized_pools, "pools_on", lambda device: True)

    def fn(x: Tensor, w: Tensor, factor: Tensor) -> Tensor:
        return (F.max_pool2d(F.conv2d(x, w), 3, 2) * factor).round().clamp(-127.0, 127.0).to(torch.int8).float()

    args = image(1, 8, 9, 8), torch.randn(8, 8, 3, 3)
    for factor, frozen, expected in ((3.0, (1, 2), True), (-3.0, (1, 2), False), (3.0, (1,), False)):
        given = (*args, torch.tensor(factor))
        graph = capture(fn, given, frozen=frozen)
        context = run(graph, DefaultOptions(check=True), Journal("test"))
        assert any(r.rule == "quantized_pools.max_pool" for r in context.log) == expected
        assert torch.equal(execute(graph, given)[0], fn(*given))


LEFT: list[tuple[Any, tuple[int, ...], tuple[int, ...], str, Any, str]] = [
    (F.conv2d, (1, 4, 8, 8), (4, 4, 3, 3), "int8", None, "takes its scale from a calibration"),
    (F.conv2d, (1, 4, 8, 8), (4, 4, 3, 3), "int8-weight", None, "to fp8 or int8"),
    (F.conv2d, (1, 4, 8, 8), (4, 4, 3, 3), "int8-dynamic", "table", "to fp8 or int8"),
    (lambda x, w: F.conv2d(x, w, groups=2), (1, 8, 8, 8), (4, 4, 3, 3), "int8", "table", "grouped"),
    (F.conv_transpose2d, (1, 4, 8, 8), (4, 4, 3, 3), "int8", "table", "transposed"),
    (F.conv1d, (1, 4, 8), (4, 4, 3), "int8", "table", "images"),
]


@pytest.mark.parametrize(("fn", "x", "w", "precision", "table", "reason"), LEFT)
def test_what_stays_high_says_why(
    fn: Any, x: tuple[int, ...], w: tuple[int, ...], precision: str, table: Any, reason: str
) -> None:
    args = torch.randn(x), torch.randn(w)
    graph, context = quantized(fn, args, (1,), precision, Ranges(w) if table else None)
    (note,) = notes(context)
    assert "convolution" in calls(graph) and f"stays high, not {precision}" in note and reason in note


BAD: dict[str, dict[str, Any]] = {
    "both float8_e4m3fn or both int8": {"weight": torch.zeros(4, 3, 3, 4)},
    "operands are": {"weight": torch.zeros(4, 3, 3, 5, dtype=torch.int8)},
    "images have one float32 scale": {"scale_x": torch.ones(4)},
    "a weight's scale is": {"scale_w": torch.ones(3)},
    "a bias is": {"bias": torch.ones(3)},
    "dtype is floating": {"out_dtype": torch.int8},
    "stride is two numbers, 1 or more": {"stride": [0, 1]},
    "padding is two numbers": {"padding": [1]},
    "does not fit": {"dilation": [9, 9]},
}


@pytest.mark.parametrize("reason", BAD)
def test_operands_that_do_not_fit_are_refused(reason: str) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(1, 4, 6, 6, dtype=torch.int8),
        "weight": torch.zeros(4, 3, 3, 4, dtype=torch.int8),
        "scale_x": torch.tensor(1.0),
        "scale_w": torch.ones(4),
        "bias": None,
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "out_dtype": torch.float32,
    }
    assert scaled_convolution(**given).shape == SCALED_CONVOLUTION(*given.values()).shape == (1, 4, 6, 6)
    with pytest.raises(ValueError, match=reason):
        scaled_convolution(**(given | BAD[reason]))
