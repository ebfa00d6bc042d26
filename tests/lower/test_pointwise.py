"""Element-wise lowerings against eager: edge values, type promotion, overloads, and torch's own samples of every op."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import BinaryUfuncInfo, UnaryUfuncInfo
from torch.utils import _pytree as pytree

from fxopt.capture.decompositions import decompositions
from fxopt.ir.loops import Op, postorder
from tests.lower.capturing import library_calls
from tests.lower.harness import check, lower, outputs
from tests.lower.interpreter import run_lowered

aten = torch.ops.aten
INF, NAN = math.inf, math.nan
EDGES = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 1.5, 3.0, -3.0, 88.0, -104.0, 1e-30, INF, -INF, NAN])
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


# ---------------------------------------------------------------------- one argument

UNARY = [
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh",
    "tanh", "asinh", "acosh", "atanh", "sqrt", "rsqrt", "erf", "erfc", "erfinv", "lgamma", "sigmoid", "reciprocal",
    "neg", "abs", "sign", "floor", "ceil", "trunc", "round", "frac", "square", "sinc", "signbit", "isnan", "isinf",
    "isfinite", "isposinf", "isneginf", "logical_not", "relu", "nan_to_num", "deg2rad", "angle",
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_float(name, dtype):
    check(getattr(torch, name), EDGES.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize(
    "name", ["exp", "sqrt", "sigmoid", "abs", "sign", "floor", "isnan", "signbit", "logical_not", "square"]
)
def test_functions_of_one_integer(name, dtype):
    if dtype == torch.bool and name in ("abs", "floor"):
        pytest.skip("not defined for bool")
    check(getattr(torch, name), torch.arange(6).reshape(2, 3).to(dtype))


ACTIVATIONS = {
    "relu6": F.relu6, "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.75), "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, 1.5), "celu": lambda x: F.celu(x, 0.7), "selu": F.selu, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "mish": F.mish, "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "softplus": lambda x: F.softplus(x, 2.0, 5.0), "hardshrink": F.hardshrink,
    "softshrink": F.softshrink, "threshold": lambda x: F.threshold(x, 0.3, -7.0),
    "round": lambda x: torch.round(x, decimals=1),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    for dtype in FLOATS:
        check(ACTIVATIONS[name], (normal(4, 5) * 4).to(dtype))
    check(ACTIVATIONS[name], torch.tensor([INF, -INF, NAN, 0.0, -0.0]))


BACKWARDS = {
    "sigmoid": lambda g, y: aten.sigmoid_backward(g, y), "tanh": lambda g, y: aten.tanh_backward(g, y),
    "gelu": lambda g, x: aten.gelu_backward(g, x), "gelu_tanh": lambda g, x: aten.gelu_backward(g, x, approximate="tanh"),
    "silu": lambda g, x: aten.silu_backward(g, x), "mish": lambda g, x: aten.mish_backward(g, x),
    "hardswish": lambda g, x: aten.hardswish_backward(g, x), "hardsigmoid": lambda g, x: aten.hardsigmoid_backward(g, x),
    "hardtanh": lambda g, x: aten.hardtanh_backward(g, x, -1.0, 1.0), "relu": lambda g, y: aten.threshold_backward(g, y, 0),
    "leaky_relu": lambda g, x: aten.leaky_relu_backward(g, x, 0.1, False),
    "elu": lambda g, x: aten.elu_backward(g, 1.2, 1.1, 0.9, False, x),
    "elu_of_result": lambda g, y: aten.elu_backward(g, 1.2, 1.1, 0.9, True, y),
    "softplus": lambda g, x: aten.softplus_backward(g, x, 2.0, 5.0),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKWARDS)
def test_activation_gradients(name):
    for dtype in (torch.float32, torch.bfloat16):  # in float64 eager's own constants are rounded to float32
        check(BACKWARDS[name], normal(4, 6, dtype=dtype), normal(4, 6, dtype=dtype) * 4)


# ---------------------------------------------------------------------- two arguments and promotion

OPERANDS = {
    "int64": torch.tensor([[3, -7, 2], [5, 1, -4]]), "int32": torch.tensor([2, -3, 5], dtype=torch.int32),
    "uint8": torch.tensor([7, 1, 3], dtype=torch.uint8), "bool": torch.tensor([True, False, True]),
    "float32": torch.tensor([1.5, -2.25, 0.5]), "float64": torch.tensor([[0.1], [-3.7]], dtype=torch.float64),
    "bfloat16": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16), "float16": torch.tensor(2.5, dtype=torch.float16),
    "int scalar": torch.tensor(3), "float scalar": torch.tensor(0.75, dtype=torch.float64),
}  # fmt: skip
PROMOTING = {
    "add": torch.add, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum, "eq": torch.eq, "lt": torch.lt,
    "atan2": torch.atan2, "logical_xor": torch.logical_xor, "fmax": torch.fmax,
}  # fmt: skip


@pytest.mark.parametrize("name", PROMOTING)
@pytest.mark.parametrize("left", OPERANDS)
def test_tensors_promote_as_in_eager(name, left):
    def fn(x: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        return [PROMOTING[name](x, y) for y in others]

    args = OPERANDS[left], *(y.clone() for y in OPERANDS.values())
    for got, want in zip(outputs(fn, *args), fn(*args), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("number", [3, -2, 0.5, True])
@pytest.mark.parametrize("operand", OPERANDS)
def test_numbers_promote_as_in_eager(operand, number):
    def fn(x: torch.Tensor) -> list[torch.Tensor]:
        return [x + number, x * number, x / number, number / x, x > number, torch.where(x > 1, x, number)]

    for got, want in zip(outputs(fn, OPERANDS[operand]), fn(OPERANDS[operand]), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


DIVISIONS = {
    "floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "floor_divide": torch.floor_divide, "remainder": torch.remainder, "fmod": torch.fmod,
}  # fmt: skip


@pytest.mark.parametrize("name", DIVISIONS)
def test_rounding_divisions(name):
    a, b = torch.tensor([7, -7, 7, -7, 0]), torch.tensor([2, 2, -2, -2, 3])
    check(DIVISIONS[name], a, b)
    check(DIVISIONS[name], a.float() + 0.5, b.float())
    check(DIVISIONS[name], torch.tensor([1.0, -1.0, 0.0, INF, NAN]), torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0]))


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 0.5, -0.5, -1, -2, 1.7, -3, 4])
def test_powers_by_a_number(exponent):
    check(lambda x: x**exponent, EDGES.double())
    check(lambda x: x**exponent, normal(7).abs() + 0.1)
    if exponent in (0, 1, 2, 3, 4):
        check(lambda x: x**exponent, torch.tensor([-3, 0, 2, 5]))


def test_other_powers():
    check(lambda x: 2**x, torch.arange(5))
    check(lambda x: 1**x, EDGES)
    check(torch.pow, torch.tensor([2, -3, 1]), torch.tensor([5, 3, 7]))
    check(torch.pow, torch.tensor([2, -3, 1]), torch.tensor([0.5, 3.0, NAN]))


def test_alpha_scales_the_second_operand():
    a, b = normal(3, 4), normal(4)
    check(lambda x, y: (torch.add(x, y, alpha=2.5), torch.sub(x, y, alpha=3), torch.rsub(x, y, alpha=2)), a, b)
    check(lambda x, y: torch.add(x, y, alpha=-2), torch.arange(4), torch.arange(4))


def test_minimum_maximum_clamp_and_nan():
    a = torch.tensor([NAN, 1.0, NAN, 2.0])
    b = torch.tensor([1.0, NAN, NAN, -1.0])
    check(lambda x, y: (torch.maximum(x, y), torch.minimum(x, y), torch.fmax(x, y), torch.fmin(x, y)), a, b)
    check(lambda x: (x.clamp(-1.0, 1.0), x.clamp(min=0), x.clamp(max=0.5), x.clamp(2.0, 1.0)), EDGES)
    check(lambda x, lo, hi: torch.clamp(x, lo, hi), normal(3, 4), torch.tensor(-0.5), torch.rand(4))


def test_functions_of_two_numbers():
    a, b = torch.tensor([0.0, -0.0, 1.0, INF, NAN, 0.0]), torch.tensor([0.0, 2.0, -1.0, INF, 1.0, NAN])
    check(lambda x, y: (torch.xlogy(x, y), torch.special.xlog1py(x, y), torch.logaddexp(x, y)), a, b)
    check(lambda x, y: (torch.hypot(x, y), torch.copysign(x, y), torch.atan2(x, y), torch.nextafter(x, y)), a, b)
    check(lambda x, y: (torch.heaviside(x, y), torch.ldexp(x, y), torch.logaddexp2(x, y)), a, b)


def test_lerp_and_fused_products():
    a, b, c = normal(3, 4), normal(4), torch.rand(3, 1) + 0.5
    check(lambda x, y, w: (torch.lerp(x, y, w), torch.lerp(x, y.expand(3, 4), 0.3)), a, b, c)
    check(lambda x, y, z: (torch.addcmul(x, y, z, value=0.5), torch.addcdiv(x, y, z, value=2)), a, b, c)


# ---------------------------------------------------------------------- bits, logic, selection


def test_bits_and_shifts():
    a, b = torch.tensor([5, -3, 12, 0]), torch.tensor([1, 2, 40, 63])
    check(lambda x, y: (x & y, x | y, x ^ y, ~x, x << y, x >> y, x << 3, x >> 1), a, b)
    check(lambda x, y: (x & y, x | y, x ^ y, ~x), a > 0, b > 2)


def test_where_broadcasts_and_promotes():
    cond = torch.tensor([[True], [False]])
    check(lambda c, x, y: torch.where(c, x, y), cond, torch.arange(3), normal(3))
    check(lambda c, x: (torch.where(c, x, 2.0), torch.where(c, 1, x), x.masked_fill(c, -INF)), cond, normal(2, 3))
    check(lambda c, x: x.masked_fill(c, 7), cond, torch.arange(3))


def test_a_condition_only_selects():
    """Arms that are not chosen may be NaN."""
    check(lambda x: torch.where(x > 0, torch.log(x), torch.zeros_like(x)), EDGES)


# ---------------------------------------------------------------------- layout, precision, shapes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("one", [lambda e: 1 + e, lambda e: e + 1.0, lambda e: e.add(1)])
def test_a_sigmoid_written_out_is_one(dtype, one):
    """As torch takes the gradient of SiLU apart."""

    def written(x):
        return torch.reciprocal(one(torch.exp(-x)))

    check(written, EDGES.to(dtype))
    steps = lower(written, (EDGES.to(dtype),)).steps
    found = {n.name for s in steps for n in postorder(s.nest.roots) if isinstance(n, Op)}
    assert "sigmoid" in found and "reciprocal" not in found


def test_half_types_are_not_rounded_between_operations():
    x = normal(64, dtype=torch.bfloat16)
    (got,) = outputs(lambda v: (v * 1.01 + 3.0) * 1.01 - 3.0, x)
    exact = (x.double() * 1.01 + 3.0) * 1.01 - 3.0
    assert (got.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max() / 2


def test_comparisons_see_what_memory_holds():
    """x.exp() inline has more bits than its stored maximum; the gradient of amax compares the two."""
    x = normal(4, 8, dtype=torch.bfloat16)
    (mask,) = outputs(lambda v: v.exp() == v.exp().amax(1, keepdim=True), x)
    assert (mask.sum(1) >= 1).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1)])
def test_shapes_without_extent(shape):
    check(lambda x: (x * 2 + 1, torch.sigmoid(x), x > 0), torch.rand(shape))


def test_strides_are_eagers():
    x = normal(2, 3, 4, 5).to(memory_format=torch.channels_last)
    check(lambda v: (v + 1, torch.relu(v) * 2), x)
    check(lambda v: v.sin(), normal(4, 6)[:, ::2])
    check(lambda v: v.exp(), normal(3, 5).t())


def test_symbolic_sizes():
    check(lambda x, y: torch.tanh(x + y) * 2, normal(5, 7), normal(7), dynamic=True)


# ---------------------------------------------------------------------- torch's own samples

LIBRARY = frozenset(
    "cdouble cfloat chalf complex polar digamma frexp gcd lcm i0 igamma igammac polygamma mvlgamma nn.functional.rrelu "
    "jiterator_unary jiterator_binary jiterator_binary_return_by_ref nextafter special.log_ndtr special.ndtri special.zeta "
    "special.erfcx special.i0e special.i1 special.i1e special.airy_ai special.polygamma special.spherical_bessel_j0".split()
)
"""Ops left to the library: complex results, random draws, special functions that eager computes by long expansions."""
SERIES = ("special.bessel", "special.modified_bessel", "special.scaled_modified_bessel", "polynomial")
SAMPLED = [
    op
    for op in op_db
    if isinstance(op, (UnaryUfuncInfo, BinaryUfuncInfo)) and op.name not in LIBRARY and not any(s in op.name for s in SERIES)
]


@pytest.mark.parametrize("op", SAMPLED, ids=lambda op: op.full_name)
def test_samples(op):
    for dtype in (torch.float32, torch.int64):
        if dtype in op.supported_dtypes("cpu"):
            for sample in itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), 3):
                check_sample(op, sample)


def check_sample(op, sample):
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def fn(*tensors: torch.Tensor) -> list[torch.Tensor]:
        filled = list(leaves)
        for k, tensor in zip(places, tensors, strict=True):
            filled[k] = tensor
        first, args, kwargs = pytree.tree_unflatten(filled, spec)
        return [r for r in pytree.tree_leaves(op.op(first, *args, **kwargs)) if isinstance(r, torch.Tensor)]

    tensors = tuple(leaves[k] for k in places)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        low = lower(fn, tensors, decompose=decompositions())
        want = fn(*tensors)
    assert not library_calls(low), library_calls(low)
    got = run_lowered(low, dict(zip(low.inputs, tensors, strict=True)))
    torch.testing.assert_close(got, want, equal_nan=True)
