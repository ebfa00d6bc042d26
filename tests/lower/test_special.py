"""Special functions against float64, next to eager: poles, reflections, both ends of the range."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from tests.lower.capturing import library_calls, lower_function
from tests.lower.harness import check, outputs
from tests.numerics import assert_closer

EDGES = [0.0, -0.0, 1.0, -1.0, -2.0, 0.5, 1e-20, -1e-20, 10.0, 9.999, 1e17, 1e30, math.inf, -math.inf, math.nan]
FLOATS = (torch.float64, torch.float32, torch.bfloat16)


POINTS = torch.cat([torch.tensor(EDGES), torch.linspace(-8.77, -0.03, 23), torch.linspace(0.01, 30, 97)])


@pytest.mark.parametrize(
    ("order", "dtype"),
    [*itertools.product((0, 1), FLOATS), *itertools.product((2, 3, 4, 7), (torch.float32, torch.bfloat16))],
)
def test_each_point(order: int, dtype: torch.dtype) -> None:
    """One by one: next to a pole an error at another point would not show."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.polygamma(order, x)

    x = POINTS.to(dtype)
    (got,) = outputs(fn, x)
    for triple in zip(got, fn(x), fn(x.double()), strict=True):
        assert_closer(*triple)


def test_integers_are_floats_first() -> None:
    check(torch.digamma, torch.arange(1, 9))


def test_higher_derivatives_stay_with_eager() -> None:
    lowered = lower_function(lambda x: torch.polygamma(20, x), (torch.rand(3) + 1,))
    assert library_calls(lowered) == ["aten::polygamma.default"]


# ---------------------------------------------------------------------- Bessel functions, the normal distribution's, zeta

INF, NAN = math.inf, math.nan
SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, 5.0, -5.0, 8.0, -8.0, 1e-20, -1e-20, 1e30, INF, -INF, NAN])
RANGES = {
    "special": SPECIAL, "small": torch.linspace(-3.0, 3.0, 121), "middle": torch.linspace(-20.0, 20.0, 161),
    "large": torch.linspace(60.0, 110.0, 51), "first": torch.linspace(0.0, 1.0, 201),
    "tail": torch.logspace(-37.0, -1.0, 73),
}  # fmt: skip
HALF_TOO = ("i0", "i0e", "i1", "i1e")
FUNCTIONS = (
    *HALF_TOO, "modified_bessel_i0", "modified_bessel_i1", "modified_bessel_k0", "modified_bessel_k1",
    "scaled_modified_bessel_k0", "scaled_modified_bessel_k1", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1",
    "spherical_bessel_j0", "airy_ai", "erfcx", "ndtri",
)  # fmt: skip


@pytest.mark.parametrize("values", RANGES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_fixed_formulas(name: str, values: str) -> None:
    dtypes = (torch.float32, torch.float64, *((torch.bfloat16, torch.float16) if name in HALF_TOO else ()))
    for dtype in dtypes:
        if (name, dtype) != ("airy_ai", torch.float64):
            check(getattr(torch.special, name), RANGES[values].to(dtype))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fixed_formulas_of_integers(name: str) -> None:
    """As floats of the default dtype; eager's result for them has float32's errors, and is no measure."""
    fn = getattr(torch.special, name)
    for x in (torch.arange(9), torch.arange(3, dtype=torch.uint8), torch.tensor([True, False])):
        torch.testing.assert_close(outputs(fn, x), outputs(fn, x.float()), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [-3.7, 0.3, 1.7, 2.05, 4.6, 7.7, 9.2, 31.0])
@pytest.mark.parametrize("name", ["i0e", "modified_bessel_k0", "scaled_modified_bessel_k1", "bessel_j0", "erfcx"])
def test_one_point(name: str, x: float, dtype: torch.dtype) -> None:
    """At its own scale."""
    check(getattr(torch.special, name), torch.tensor([x], dtype=dtype))


def test_half_types_compute_in_float32() -> None:
    """Where eager has no kernel."""
    x = torch.linspace(0.1, 9.0, 60).bfloat16()
    (got,) = outputs(torch.special.bessel_y0, x)
    torch.testing.assert_close(got, torch.special.bessel_y0(x.float()).bfloat16())


def test_derivatives() -> None:
    def gradients(x: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        value = torch.special.i0(leaf) + torch.special.i1e(leaf) + torch.special.erfcx(leaf)
        return list(torch.autograd.grad(value.sum(), leaf))

    check(gradients, torch.linspace(-4.0, 4.0, 33))


@pytest.mark.parametrize("q", [0.1, 1.0, 2, 30.5])
def test_zeta_from_a_number(q: float) -> None:
    orders = torch.tensor([0.0, 0.5, 1.0, 1.001, 1.5, 2.0, 3.3, 20.0, 200.0, 1e30, INF, -INF, NAN])
    for dtype in (torch.float32, torch.float64):
        check(lambda s: torch.special.zeta(s, q), orders.to(dtype))
    check(lambda s: torch.special.zeta(s, q), torch.arange(5))


DEGREES = (-2, 0, 1, 2, 3, 5, 8, 2.9)
POLYNOMIALS = (
    "chebyshev_polynomial_t", "chebyshev_polynomial_u", "chebyshev_polynomial_v", "chebyshev_polynomial_w",
    "shifted_chebyshev_polynomial_t", "shifted_chebyshev_polynomial_u", "shifted_chebyshev_polynomial_v",
    "shifted_chebyshev_polynomial_w", "hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l",
    "legendre_polynomial_p",
)  # fmt: skip


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polynomials_of_a_known_degree(name: str, degree: float) -> None:
    """Eager reads memory that it did not write at NaN, degree 2 and above."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        return getattr(torch.special, name)(x, degree)

    for x in (torch.linspace(-1.0, 1.0, 101), torch.linspace(-6.0, 6.0, 49), torch.tensor([INF, -INF, 0.0, 1e30])):
        check(fn, x)
        if degree <= 3:
            check(fn, x.double())
    check(fn, torch.arange(-3, 4))


def stays_a_call(fn: Callable[..., torch.Tensor], *args: torch.Tensor) -> bool:
    return bool(library_calls(lower_function(fn, args)))


def test_what_depends_on_data_stays_with_eager() -> None:
    x, degrees = torch.rand(3), torch.tensor([1, 2, 3])
    assert stays_a_call(torch.special.hermite_polynomial_h, x, degrees)
    assert stays_a_call(lambda n: torch.special.hermite_polynomial_h(0.5, n), degrees)
    assert stays_a_call(lambda v: torch.special.legendre_polynomial_p(v, 9), x)
    assert stays_a_call(lambda v: torch.special.legendre_polynomial_p(v, 4), x.double())
    assert stays_a_call(torch.special.zeta, x + 2, x + 2)
    assert stays_a_call(lambda v: torch.special.zeta(v, -1.5), x + 2)
    assert stays_a_call(torch.special.airy_ai, x.double())


# ---------------------------------------------------------------------- frexp


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parts_of_a_float(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    edges = [0.0, -0.0, 1.0, -0.75, 3.0, 1e-5, limits.max, limits.tiny, limits.tiny / 4, -limits.tiny / 8]
    for given in (
        torch.tensor(edges, dtype=dtype),
        torch.randn(7, dtype=dtype) * 100,
        torch.tensor([INF, -INF, NAN], dtype=dtype),
    ):
        (mantissa, exponent), want = outputs(torch.frexp, given), torch.frexp(given)
        torch.testing.assert_close(mantissa, want.mantissa, rtol=0, atol=0, equal_nan=True)
        assert exponent.dtype == torch.int32
        assert torch.equal(exponent, want.exponent)


def test_parts_of_a_half_type_are_those_of_the_rounded_value() -> None:
    """0.996 * 1.003 is 1 in bfloat16, whose exponent is 1 and not 0."""
    x = torch.tensor([0.9961, 0.5, 1.992], dtype=torch.bfloat16)
    mantissa, exponent = outputs(lambda v: torch.frexp(v * 1.003), x)
    want = torch.frexp(x * 1.003)
    assert torch.equal(mantissa, want.mantissa)
    assert torch.equal(exponent, want.exponent)
