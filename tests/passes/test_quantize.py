"""The pass `quantize`: its values are those of the documented arithmetic, and what it must leave alone stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt import journal
from fxopt.errors import CalibrationError
from fxopt.ir import ops
from fxopt.ir.graph import Graph
from fxopt.ir.quantized_ops import dequantized, quantize_weight
from fxopt.journal import Journal
from fxopt.passes.context import Context, DefaultOptions
from fxopt.passes.pipeline import run
from fxopt.precision import PRECISIONS, Decisions, KnownLayer, Refinement
from tests.passes.graphs import calls, capture, execute

LAYERS = ("fp8", "int8")


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning is given once in a process."""
    monkeypatch.setattr(journal, "_told", set())


class Ranges:
    """A table of linear layers with given weights' shapes and scales."""

    def __init__(self, layers: Mapping[str, tuple[tuple[int, int], float]], **known: Any) -> None:
        self.layers, self.known_fields = layers, {"precision": None, "obstacle": None} | known
        self.zeros: dict[str, int] = {}
        self.refined: Refinement | None = None

    def digest(self) -> str:
        return str(self.layers)

    def names(self) -> list[str]:
        return list(self.layers)

    def known(self, layer: str) -> KnownLayer | None:
        return KnownLayer("linear", self.layers[layer][0], **self.known_fields) if layer in self.layers else None

    def scale(self, layer: str, precision: str) -> float:
        return self.layers[layer][1]

    def zero_point(self, layer: str, precision: str) -> int:
        return self.zeros.get(layer, 0)

    def channels(self, layer: str) -> None:
        return None

    def refinement(self, layer: str, precision: str) -> Refinement | None:
        return self.refined


def quantized(
    fn: Callable[..., Any], args: tuple[Tensor, ...], frozen: tuple[int, ...], precision: Any, table: Any = None, **how: Any
) -> tuple[Graph, Context]:
    """Captured and optimized, checked after every pass."""
    decisions = None if precision is None else Decisions.of(precision)
    graph = capture(fn, args, frozen=frozen, **how)
    return graph, run(graph, DefaultOptions(check=True, precision=decisions, calibration=table), Journal("test"))


def notes(context: Context) -> list[str]:
    return [text for topic, text in context.journal.notes if topic == "precision"]


def model_of(x: Tensor, weight: Tensor, bias: Tensor | None, name: str, scale: float | None) -> Tensor:
    """The documented arithmetic; the sum and what follows in float64. x [M, K], weight [N, K]."""
    precision = PRECISIONS[name]
    dtype = getattr(torch, str(precision.activations))
    scales = torch.tensor(scale) if scale is not None else (x.float().abs().amax(1) * (1.0 / precision.largest))
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)
    factor = scales.reciprocal()
    values = x.float() * (factor if scale is not None else factor[:, None])
    if dtype == torch.int8:
        values = values.round()
    values = values.clamp(-precision.largest, precision.largest).to(dtype).double()
    by_channel, channels = quantize_weight(weight, dtype)
    out = values @ by_channel.double().t() * (scales if scale is not None else scales[:, None]).double() * channels.double()
    return out if bias is None else out + bias.double()


def operands(dtype: torch.dtype = torch.float32, rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, 32, dtype=dtype)
    x[1] = 0.0
    x[2] *= 1e-30 if dtype != torch.float16 else 1e-4
    return x, torch.randn(48, 32, dtype=dtype), torch.randn(48, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scale", [None, 0.004])
def test_values_are_those_of_the_documented_arithmetic(dtype: torch.dtype, name: str, scale: float | None) -> None:
    """With a scale that clips, rows of zeros and tiny rows."""
    x, w, b = operands(dtype)
    table = None if scale is None else Ranges({"": ((48, 32), scale)})
    graph, _ = quantized(F.linear, (x, w, b), (1, 2), name, table)
    (got,) = execute(graph, (x, w, b))
    assert "fxopt::scaled_mm" in calls(graph) and got.dtype == dtype
    exact = model_of(x, w, b, name, scale)
    torch.testing.assert_close(got.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize(("name", "bits", "group"), [("int8-weight", 8, 0), ("int4-weight", 4, 32)])
def test_weights_alone(name: str, bits: int, group: int) -> None:
    x, w, b = operands()
    graph, context = quantized(F.linear, (x, w, b), (1, 2), name)
    stored = quantize_weight(w, torch.uint8 if bits == 4 else torch.int8, bits, group)
    exact = x.double() @ dequantized(*stored, bits, group).double().t() + b.double()
    torch.testing.assert_close(execute(graph, (x, w, b))[0].double(), exact, rtol=1e-5, atol=1e-5)
    assert notes(context) == [f": {name}" + (f", groups of {group}" if group else "")]


def test_a_weight_by_row_and_no_bias() -> None:
    """[K, N], as in GPT-2's layers, on the side of the module."""
    x, w, _ = operands()
    graph, _ = quantized(lambda x, w: x @ w, (x, w.t().contiguous()), (1,), "int8")
    (got,) = execute(graph, (x, w.t().contiguous()))
    torch.testing.assert_close(got.double(), model_of(x, w, None, "int8", None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_zero_point_shifts_the_operand_and_is_subtracted(bias: bool) -> None:
    """An operand in [-0.2, 6], by the formula, in float64; both ends are reached."""
    x, w, b = torch.rand(6, 32) * 6.2 - 0.2, torch.randn(48, 32), torch.randn(48)
    x[0, 0], x[0, 1] = -0.2, 6.0
    scale, zero = 6.2 / 255, -120
    table = Ranges({"": ((48, 32), scale)})
    table.zeros[""] = zero
    args = (x, w, b) if bias else (x, w)
    graph, context = quantized(F.linear, args, tuple(range(1, len(args))), "int8", table)
    q = (x.double() * torch.tensor(scale).reciprocal().double() + zero).float().round().clamp(-128, 127).double()
    assert float(q.min()) == -128 and float(q.max()) == 127
    by_channel, channels = quantize_weight(w, torch.int8)
    exact = (q - zero) @ by_channel.double().t() * scale * channels.double() + (b.double() if bias else 0.0)
    torch.testing.assert_close(execute(graph, args)[0].double(), exact, rtol=1e-4, atol=1e-4)
    assert notes(context) == [": int8, scale 0.02431, zero at -120"]


@pytest.mark.parametrize("name", ["fp8", "int8", "int8-weight", "int4-weight"])
def test_what_was_fitted_clips_the_weight_and_corrects_the_bias(name: str) -> None:
    x, w, b = operands()
    precision = PRECISIONS[name]
    group = 32 if precision.group else 0
    limits = w.abs().amax(1) * 0.5
    table = Ranges({"": ((48, 32), 0.03)})
    table.refined = Refinement(name, limits[:, None] if group else limits, torch.randn(48))
    graph, _ = quantized(F.linear, (x, w, b), (1, 2), name, table)
    stored = quantize_weight(w, getattr(torch, str(precision.weights)), precision.bits, group, table.refined.limits)
    seen = dequantized(*stored, precision.bits, group).double()
    assert float((seen.abs().amax(1) / limits - 1.0).abs().max()) < 1e-5
    given = x.double()
    if precision.activations is not None:
        values = x / torch.tensor(0.03)
        values = (values.round() if name == "int8" else values).clamp(-precision.largest, precision.largest)
        given = values.to(getattr(torch, precision.activations)).double() * 0.03
    exact = given @ seen.t() + b.double() + table.refined.correction.double()
    torch.testing.assert_close(execute(graph, (x, w, b))[0].double(), exact, rtol=1e-4, atol=1e-4)


def test_a_correction_of_a_bias_that_is_no_constant_is_added() -> None:
    x, w, b = operands()
    table = Ranges({"": ((48, 32), 0.03)})
    table.refined = Refinement("int8-weight", None, torch.full((48,), 3.0))
    graph, _ = quantized(F.linear, (x, w, b), (1,), "int8-weight", table)
    plain, _ = quantized(F.linear, (x, w, b), (1,), "int8-weight")
    torch.testing.assert_close(execute(graph, (x, w, b))[0], execute(plain, (x, w, b))[0] + 3.0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fp8-dynamic", "int8-dynamic"])
def test_dynamic_precisions_take_no_scale_from_a_table(name: str) -> None:
    x, w, b = operands()
    graph, context = quantized(F.linear, (x, w, b), (1, 2), name, Ranges({"": ((48, 32), 0.004)}, obstacle="only zeros"))
    torch.testing.assert_close(execute(graph, (x, w, b))[0].double(), model_of(x, w, b, name, None), rtol=1e-5, atol=1e-5)
    assert notes(context) == [f": {name}, scaled row by row"]


def test_float8_saturates_and_keeps_nan() -> None:
    x, w, _ = operands()
    x[0, 0], x[3, 3], x[4, 4] = 1e30, float("nan"), float("-inf")
    graph, _ = quantized(F.linear, (x, w), (1,), "fp8", Ranges({"": ((48, 32), 0.01)}))
    (got,) = execute(graph, (x, w))
    assert got[[0, 1, 2, 4, 5]].isfinite().all() and got[3].isnan().all()
    torch.testing.assert_close(got[0].double(), model_of(x, w, None, "fp8", 0.01)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_that_is_not_finite_is_not_finite_afterwards(name: str) -> None:
    x, w, _ = operands()
    x[0, 0], x[3, 3] = float("inf"), float("nan")
    (got,) = execute(quantized(F.linear, (x, w), (1,), name)[0], (x, w))
    assert not got[[0, 3]].isfinite().any() and got[[1, 2, 4, 5]].isfinite().all()


def attention_input(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    h = F.layer_norm(x, x.shape[-1:])
    return F.linear(h, q), F.linear(h, k), F.linear(h, v)


@pytest.mark.parametrize("table", [None, Ranges(dict.fromkeys(("", "#1", "#2"), ((32, 32), 0.03)))])
def test_what_several_layers_are_given_is_quantized_once(table: Ranges | None) -> None:
    args = (torch.randn(2, 5, 32), *(torch.randn(32, 32) for _ in range(3)))
    graph, _ = quantized(attention_input, args, (1, 2, 3), "int8", table)
    names = calls(graph)
    assert names.count("fxopt::scaled_mm") == 3
    assert names.count("round") == 1 and names.count("amax") == (table is None)
    operand = {
        n.args[0] for n in graph.gm.graph.nodes if n.op == "call_function" and ops.name_of(n.target) == "fxopt::scaled_mm"
    }
    assert len(operand) == 1


def test_layers_after_each_other_are_both_quantized() -> None:
    """What the second is given is what the first was replaced by."""
    x, w, v = torch.randn(4, 32), torch.randn(32, 32), torch.randn(16, 32)
    graph, _ = quantized(lambda x, w, v: F.linear(F.linear(x, w), v), (x, w, v), (1, 2), "fp8")
    between = model_of(x, w, None, "fp8", None).float()
    torch.testing.assert_close(
        execute(graph, (x, w, v))[0].double(), model_of(between, v, None, "fp8", None), rtol=0.02, atol=0.5
    )
    assert calls(graph).count("fxopt::scaled_mm") == 2


@pytest.mark.parametrize(
    ("args", "frozen", "reason"),
    [
        ((torch.randn(4, 32).double(), torch.randn(16, 32).double()), (1,), "float64"),
        ((torch.randn(4, 40), torch.randn(16, 40)), (1,), "no multiple of 32"),
    ],
)
def test_what_cannot_be_quantized_stays_and_says_why(args: tuple[Tensor, ...], frozen: tuple[int, ...], reason: str) -> None:
    graph, context = quantized(F.linear, args, frozen, "int4-weight")
    assert "mm" in calls(graph)
    (note,) = notes(context)
    assert "stays high, not int4-weight" in note and reason in note
    assert torch.equal(execute(graph, args)[0], F.linear(*args))


def test_only_frozen_weights_are_layers() -> None:
    x, w, b = operands()
    graph, context = quantized(F.linear, (x, w, b), (), "int8")
    assert "fxopt::scaled_mm" not in calls(graph) and notes(context) == []


# ---------------------------------------------------------------------- decisions and tables


def pair(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.linear(F.linear(x, w).relu(), v)


PAIR = (torch.randn(4, 32), torch.randn(48, 32), torch.randn(16, 48))
PAIR_RANGES = {"": ((48, 32), 0.03), "#1": ((16, 48), 0.05)}


@pytest.mark.parametrize(
    ("precision", "own", "expected"),
    [
        ({"": "fp8"}, None, [": fp8, scale 0.03"]),
        ({"*": "int8", "": "high"}, None, ["#1: int8, scale 0.05"]),
        ({"*": "high", "#*": "int8"}, None, ["#1: int8, scale 0.05"]),
        (None, "int8", [": int8, scale 0.03", "#1: int8, scale 0.05"]),
        ({"*": "fp8"}, "int8", [": int8, scale 0.03", "#1: int8, scale 0.05"]),
        ({"#1": "high"}, "int8", [": int8, scale 0.03"]),
    ],
)
def test_own_name_before_the_tables_user_before_patterns(precision: Any, own: str | None, expected: list[str]) -> None:
    _, context = quantized(pair, PAIR, (1, 2), precision, Ranges(PAIR_RANGES, precision=own))
    assert notes(context) == expected


def test_a_layer_that_calibration_did_not_see_stays_high_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"'#1': calibration did not see it"):
        graph, _ = quantized(pair, PAIR, (1, 2), "int8", Ranges({"": PAIR_RANGES[""]}))
    assert calls(graph).count("fxopt::scaled_mm") == 1


def test_a_layer_with_an_obstacle_stays_high_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"'', '#1': only zeros"):
        graph, _ = quantized(pair, PAIR, (1, 2), "int8", Ranges(PAIR_RANGES, obstacle="only zeros"))
    assert "fxopt::scaled_mm" not in calls(graph)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"": ((48, 32), 1.0), "#1": ((16, 47), 1.0)}, ["'#1'", "16 x 47", "16 x 48"]),
        ({"encoder.1": ((48, 32), 1.0)}, ["none of this graph's 2 layers", "48 x 32", "'encoder.1'"]),
    ],
)
def test_another_models_table_is_an_error_that_names_the_first_layer(layers: Any, words: list[str]) -> None:
    with pytest.raises(CalibrationError) as caught:
        quantized(pair, PAIR, (1, 2), "int8", Ranges(layers))
    assert all(word in str(caught.value) for word in words)


def test_a_rule_that_matches_nothing_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"none of the 2 layers of this graph is called '#11'; did you mean '#1'"):
        quantized(pair, PAIR, (1, 2), {"#11": "int8", "*": "high"})
