"""Every scalar op as printed C++, vector and scalar code, against torch: float64's values, eager's special cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fxopt.ir.exprs import Sym, symbol
from fxopt.ir.loops import (
    BINARY,
    COMPARE,
    FLOAT_UNARY,
    PREDICATES,
    SAME_UNARY,
    Const,
    IndexValue,
    Load,
    Nest,
    Op,
    Scalar,
    Store,
)
from fxopt.ir.random_ops import philox, randint, randn
from fxopt.ir.random_ops import rand as rand_op
from tests.codegen.cpp_harness import HOST, Capability, build, run
from tests.codegen.triton_nests import Case, buffer, make

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
I8, I16, I32, I64, U8, BOOL = torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool
FLOATS, INTS = (F16, BF16, F32, F64), (I8, I16, I32, I64, U8)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -0.5, -2.5, math.inf, -math.inf, math.nan, 1e-3, -3.25, 0.999, 7.0)
VECTORS, SCALARS = 67, 3
"""Domain sizes: four vectors and a tail; so short that scalar code is printed."""

TORCH: dict[str, Callable[..., torch.Tensor]] = {
    "bitwise_not": torch.bitwise_not,
    "truediv": torch.true_divide,
    "floordiv": torch.floor_divide,
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "lshift": torch.bitwise_left_shift,
    "rshift": torch.bitwise_right_shift,
}


def torch_function(name: str) -> Callable[..., torch.Tensor]:
    return TORCH.get(name) or getattr(torch, name)


def elementwise(names: list[str], of: torch.dtype, operands: int, n: int, out: torch.dtype | None = None) -> Case:
    """One nest that stores every op of `names` applied to a (and b)."""
    x = Sym("x0", size=n)
    loads = tuple(Load(b, symbol(x), of) for b in "ab"[:operands])
    result = lambda name: BOOL if name in PREDICATES or name in COMPARE else out or of  # noqa: E731
    stores = tuple(Store(f"o_{name}", symbol(x), Op(name, loads, result(name))) for name in names)
    buffers = [buffer(b, of, (n,)) for b in "ab"[:operands]] + [buffer(f"o_{k}", result(k), (n,)) for k in names]

    def reference(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch_function(name)(*args) for name in names)

    return make(Nest((x,), (), stores), buffers, " ".join("ab"[:operands]), " ".join(f"o_{k}" for k in names), reference)


def floats(n: int, dtype: torch.dtype, seed: int, scale: float = 2.0) -> torch.Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale
    order = torch.arange(min(n, len(SPECIAL))) * (1 + 2 * seed) % len(SPECIAL)
    values[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=F64)[order]
    return values.to(dtype)


def integers(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    info = torch.iinfo(dtype)
    values = torch.randint(max(-9, info.min), 10, (n,), generator=torch.Generator().manual_seed(seed))
    edge = torch.tensor([info.min, info.max, 0, 1, info.max - 1]) if seed == 0 else torch.tensor([2, 1, 3, 1, 2])
    values[: min(n, 5)] = edge[:n]
    return values.to(dtype)


def agree(name: str, actual: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, slack: float = 4.0) -> None:
    """Equal where eager is not finite; elsewhere as close to float64 as eager, or within `slack` rounding errors."""
    if not actual.is_floating_point():
        assert torch.equal(actual, eager), f"{name}: {actual} is not {eager}"
        return
    special = ~eager.isfinite()
    torch.testing.assert_close(actual[special], eager[special], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")
    got, want, theirs = actual[~special].double(), exact[~special].double(), eager[~special].double()
    eps = torch.finfo(actual.dtype).eps
    allowed = 1.5 * (theirs - want).abs() + slack * eps * want.abs() + torch.finfo(actual.dtype).tiny
    wrong = ~((got - want).abs() <= allowed)
    assert not wrong.any(), f"{name}: {got[wrong]} is not {want[wrong]} (eager {theirs[wrong]})"


def check_against_eager(case: Case, kernel: object, slack: float = 4.0, **inputs: torch.Tensor) -> None:
    eager = case.reference(*inputs.values())
    exact = case.reference(*(t.double() if t.is_floating_point() else t for t in inputs.values()))
    for name, got, wide, narrow in zip(case.outputs, run(case, kernel, inputs), exact, eager, strict=True):  # type: ignore[arg-type]
        agree(name, got, wide, narrow, slack)


FLOAT_OPS = sorted(FLOAT_UNARY | (SAME_UNARY - {"bitwise_not"}) | PREDICATES)
FLOAT_BINARY = sorted((BINARY | COMPARE) - {n for n in BINARY if n.startswith(("bitwise", "lshift", "rshift"))})
INT_UNARY = ["neg", "abs", "sign", "bitwise_not", "floor", "isnan", "isinf"]
INT_BINARY = sorted((BINARY | COMPARE) - {"truediv", "atan2", "hypot", "copysign", "nextafter", "pow"})
BOOL_BINARY = ["add", "mul", "maximum", "minimum", "bitwise_and", "bitwise_or", "bitwise_xor", *sorted(COMPARE)]


@pytest.mark.parametrize("n", [VECTORS, SCALARS])
def test_floating_point_functions(n: int, tmp_path: Path) -> None:
    cases = [elementwise(FLOAT_OPS, dtype, 1, n) for dtype in FLOATS]
    for case, kernel, dtype in zip(cases, build(cases, tmp_path), FLOATS, strict=True):
        for seed in range(3):
            check_against_eager(case, kernel, a=floats(n, dtype, seed))


@pytest.mark.parametrize("n", [VECTORS, SCALARS])
def test_floating_point_operators(n: int, tmp_path: Path) -> None:
    cases = [elementwise(FLOAT_BINARY, dtype, 2, n) for dtype in FLOATS]
    for case, kernel, dtype in zip(cases, build(cases, tmp_path), FLOATS, strict=True):
        for seed in range(3):
            check_against_eager(case, kernel, a=floats(n, dtype, seed), b=floats(n, dtype, seed + 3))


@pytest.mark.parametrize("n", [VECTORS, SCALARS])
def test_integer_operators(n: int, tmp_path: Path) -> None:
    cases = [elementwise(INT_BINARY, dtype, 2, n) for dtype in INTS]
    for case, kernel, dtype in zip(cases, build(cases, tmp_path), INTS, strict=True):
        divisor = integers(n, dtype, 1)
        divisor[divisor == 0] = 3
        check_against_eager(case, kernel, a=integers(n, dtype, 0), b=divisor)


def test_integer_functions(tmp_path: Path) -> None:
    cases = [elementwise(INT_UNARY, dtype, 1, VECTORS) for dtype in INTS]
    for case, kernel, dtype in zip(cases, build(cases, tmp_path), INTS, strict=True):
        check_against_eager(case, kernel, a=integers(VECTORS, dtype, 0))


@pytest.mark.parametrize("n", [VECTORS, SCALARS])
def test_bool_operators(n: int, tmp_path: Path) -> None:
    cases = [elementwise(BOOL_BINARY, BOOL, 2, n), elementwise(["bitwise_not"], BOOL, 1, n)]
    binary, unary = build(cases, tmp_path)
    a, b = torch.arange(n) % 2 == 0, torch.arange(n) % 3 == 0
    check_against_eager(cases[0], binary, a=a, b=b)
    check_against_eager(cases[1], unary, a=a)


def test_integer_powers_and_shifts_out_of_range(tmp_path: Path) -> None:
    case = elementwise(["pow", "lshift", "rshift"], I64, 2, 40)
    (kernel,) = build([case], tmp_path)
    base, exponent = torch.arange(-4, 4).repeat(5), torch.tensor([-3, -1, 0, 1, 2, 3, 64, 70]).repeat_interleave(5)
    check_against_eager(case, kernel, a=base, b=exponent)


@pytest.mark.parametrize("n", [VECTORS, SCALARS])
def test_casts_between_all_dtypes(n: int, tmp_path: Path) -> None:
    """Values that fit, fractions, infinities and NaN to bool and to floating point."""
    dtypes = (*FLOATS, *INTS, BOOL)
    x = Sym("x0", size=n)
    names = [str(d).removeprefix("torch.") for d in dtypes]
    cases = []
    for of in dtypes:
        a = Load("a", symbol(x), of)
        stores = tuple(Store(k, symbol(x), Op("cast", (a,), d)) for k, d in zip(names, dtypes, strict=True))
        buffers = [buffer("a", of, (n,)), *(buffer(k, d, (n,)) for k, d in zip(names, dtypes, strict=True))]
        cases.append(make(Nest((x,), (), stores), buffers, "a", " ".join(names), lambda a: tuple(a.to(d) for d in dtypes)))
    for case, kernel, of in zip(cases, build(cases, tmp_path), dtypes, strict=True):
        values = (torch.arange(n, dtype=F64) % 120 * 0.75 - (0 if of == U8 else 3)).to(of)
        for got, expected in zip(run(case, kernel, {"a": values}), case.reference(values), strict=True):
            assert torch.equal(got, expected), f"{of} to {expected.dtype}"


def test_casts_of_what_does_not_fit(tmp_path: Path) -> None:
    x = Sym("x0", size=VECTORS)
    a = Load("a", symbol(x), F32)
    stores = tuple(Store(f"o{i}", symbol(x), Op("cast", (a,), d)) for i, d in enumerate((I32, I64, BOOL)))
    buffers = [buffer("a", F32, (VECTORS,)), *(buffer(f"o{i}", d, (VECTORS,)) for i, d in enumerate((I32, I64, BOOL)))]
    case = make(Nest((x,), (), stores), buffers, "a", "o0 o1 o2", lambda a: (a.to(I32), a.to(I64), a.to(BOOL)))
    (kernel,) = build([case], tmp_path)
    values = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, 0.0, -0.9] * 9)[:VECTORS]
    for got, expected in zip(run(case, kernel, {"a": values}), case.reference(values), strict=True):
        assert torch.equal(got, expected)


BITCASTS = [(F32, I32), (I32, F32), (F64, I64), (BF16, I16), (I16, BF16), (F16, I16), (I16, F16)]


@pytest.mark.parametrize(("of", "to"), BITCASTS)
def test_bitcast_is_of_stored_precision(of: torch.dtype, to: torch.dtype, tmp_path: Path) -> None:
    x = Sym("x0", size=VECTORS)
    nest = Nest((x,), (), (Store("o", symbol(x), Op("bitcast", (Load("a", symbol(x), of),), to)),))
    case = make(nest, [buffer("a", of, (VECTORS,)), buffer("o", to, (VECTORS,))], "a", "o", lambda a: a.view(to))
    (kernel,) = build([case], tmp_path)
    values = floats(VECTORS, of, 0).nan_to_num(1.0) if of.is_floating_point else torch.arange(VECTORS).to(of) * 3
    (got,) = run(case, kernel, {"a": values})
    assert torch.equal(got.view(to), values.view(to))


def random_case(name: str, n: int, *limits: int) -> Case:
    x = Sym("x0", size=n)
    key = Load("seed", 0, I64)
    out = I64 if name == "randint" else F32
    value: Scalar = Op(name, (key, IndexValue(symbol(x)), *(Const(v, I64) for v in limits)), out)
    buffers = [buffer("seed", I64, (1,)), buffer("o", out, (n,))]
    functions = {"rand": rand_op, "randn": randn}
    reference = (lambda s: randint(s[0], *limits, [n])) if name == "randint" else (lambda s: functions[name](s[0], [n]))
    return make(Nest((x,), (), (Store("o", symbol(x), value),)), buffers, "seed", "o", reference)


@pytest.mark.parametrize("n", [VECTORS, SCALARS])
def test_random_numbers_are_those_of_the_eager_ops(n: int, tmp_path: Path) -> None:
    cases = [random_case("rand", n), random_case("randn", n), random_case("randint", n, -5, 1000)]
    cases.append(random_case("randint", n, -(2**63), 2**63 - 1))
    for case, kernel in zip(cases, build(cases, tmp_path), strict=True):
        for seed in (0, -(2**61) + 12345, 2**62 + 7):
            inputs = {"seed": torch.tensor([seed])}
            (got,), (expected,) = run(case, kernel, inputs), case.reference(*inputs.values())
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def test_philox_known_answer() -> None:
    """The counter-zero, key-zero vector of the Random123 distribution: what the test above compares with is Philox."""
    first, second, *_ = philox(torch.tensor(0), torch.tensor([0]))
    assert (int(first), int(second)) == (0x6627E8D5, 0xE169C58D)


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_narrower_vectors(capability: str, tmp_path: Path) -> None:
    if HOST.cpu_capability not in ("AVX512", "AVX2"):
        pytest.skip("this CPU has no AVX2")
    cases = [elementwise(FLOAT_OPS, F32, 1, VECTORS), elementwise(FLOAT_BINARY, F64, 2, VECTORS)]
    functions, operators = build(cases, tmp_path, Capability(capability))
    check_against_eager(cases[0], functions, a=floats(VECTORS, F32, 1))
    check_against_eager(cases[1], operators, a=floats(VECTORS, F64, 1), b=floats(VECTORS, F64, 4))
