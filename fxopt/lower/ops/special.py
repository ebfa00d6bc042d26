"""Special functions whose eager kernels are formulas of a fixed number of steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int
from fxopt.ir.loops import Op
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops import terms as t
from fxopt.lower.ops.elementwise import compute_dtype, elementwise, formula
from fxopt.lower.ops.terms import Number, Term
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value

aten = torch.ops.aten
TABLE = Table()

Rational = tuple[Sequence[float], Sequence[float]]
"""The coefficients of a numerator and of a denominator."""


def horner(x: Term, coefficients: Sequence[float]) -> Term:
    """The polynomial in x with these coefficients, highest power first."""
    return functools.reduce(lambda value, c: value * x + c, coefficients[1:], t.literal(coefficients[0], x.dtype))


def rational(x: Term, fraction: Rational) -> Term:
    return horner(x, fraction[0]) / horner(x, fraction[1])


# ---------------------------------------------------------------------- derivatives of lgamma, zeta

DIGAMMA_SERIES = (1 / 12, -691 / 32760, 1 / 132, -1 / 240, 1 / 252, -1 / 120, 1 / 12)
"""Coefficients of the asymptotic series of digamma in 1/x**2, highest power first (Abramowitz and Stegun, 6.3.18)."""


@formula(TABLE, aten.digamma.default)
def _digamma(x: Term) -> Term:
    """Reflection to positive arguments, ten steps of the recurrence, the asymptotic series."""
    reflected = x.lt(0.0)
    y = t.where(reflected, 1.0 - x, x)
    result = t.literal(0.0, x.dtype)
    for _ in range(10):
        small = y.lt(10.0)
        result = t.where(small, result - 1.0 / y, result)
        y = t.where(small, y + 1.0, y)
    square = 1.0 / (y * y)
    result = result + t.unary("log", y) - 0.5 / y - square * horner(square, DIGAMMA_SERIES)
    fraction = x - t.trunc(x)
    # Near a pole the quotient is large and the fraction's rounding with it: in float64, as eager does.
    pole = (math.pi / t.unary("tan", fraction.to(torch.float64) * math.pi)).to(x.dtype)
    result = t.where(reflected, result - pole, result)
    result = t.where(reflected & fraction.eq(0.0), math.nan, result)
    return t.where(x.eq(0.0), t.binary("copysign", math.inf, -x), result)


def _trigamma(x: Term) -> Term:
    """Reflection to arguments above a half, six steps of the recurrence, the asymptotic series."""
    reflected = x.lt(0.5)
    sine = t.sin(x * math.pi)
    y = t.where(reflected, 1.0 - x, x)
    result = t.where(reflected, -(math.pi * math.pi) / (sine * sine), 0.0)
    for _ in range(6):
        result = result + 1.0 / (y * y)
        y = y + 1.0
    square = 1.0 / (y * y)
    series = 1.0 + 1.0 / (2.0 * y) + square * (1 / 6 - square * (1 / 30 - square * (1 / 42)))
    result = result + series / y
    return t.where(reflected, -result, result)


BERNOULLI = (
    1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798, -174611 / 330, 854513 / 138,
    -236364091 / 2730,
)  # fmt: skip
"""The Bernoulli numbers B2, B4, ..., B24."""

DIRECT_TERMS = 10
MAX_ORDER = 12


def _power(x: Term, n: int) -> Term:
    """x ** n by repeated multiplication, n >= 1."""
    return functools.reduce(lambda product, _: product * x, range(n - 1), x)


def _zeta(s: int, q: Term) -> Term:
    """The sum of (q + k) ** -s over k = 0, 1, ... for q > 0: ten terms, and Euler and Maclaurin's formula for the others.

    Source: Abramowitz and Stegun, 23.1.30 with 23.2; Cephes' zeta takes the same terms.
    """
    total = t.literal(0.0, q.dtype)
    for k in range(DIRECT_TERMS):
        last = _power(1.0 / (q + float(k)), s)
        total = total + last
    w = q + float(DIRECT_TERMS - 1)
    total = total + last * w / float(s - 1) - last * 0.5
    correction, inverse = last / w, 1.0 / (w * w)
    for k, number in enumerate(BERNOULLI):
        rising = math.prod(range(s, s + 2 * k + 1))
        total = total + correction * (number * rising / math.factorial(2 * k + 2))
        correction = correction * inverse
    return total


def _cotangent_derivative(n: int, cotangent: Term) -> Term:
    """The n-th derivative of cot at an angle with that cotangent: c' = -(1 + c * c), applied to polynomials in c."""
    polynomial = [0, 1]
    for _ in range(n):
        slope = [k * c for k, c in enumerate(polynomial)][1:]
        polynomial = [-(a + b) for a, b in zip([*slope, 0, 0], [0, 0, *slope], strict=True)]
    return horner(cotangent, [float(c) for c in reversed(polynomial)])


def _higher_polygamma(n: int, x: Term) -> Term:
    """(-1)**(n+1) n! zeta(n + 1, x), negative arguments by reflection; in float64: terms leave float32's range."""
    dtype, x = x.dtype, x.to(torch.float64)
    sign = -1.0 if n % 2 == 0 else 1.0
    reflected = x.lt(0.0)
    value = sign * math.factorial(n) * _zeta(n + 1, t.where(reflected, 1.0 - x, x))
    fraction = x - t.trunc(x)
    cotangent = 1.0 / t.unary("tan", fraction * math.pi)
    turned = -(math.pi ** (n + 1)) * _cotangent_derivative(n, cotangent)
    value = t.where(reflected, turned - sign * value, value)
    value = t.where(x.le(0.0) & fraction.eq(0.0), sign * math.inf, value)
    return t.where(x.eq(-math.inf), sign * math.inf, value).to(dtype)


@TABLE.lowers(aten.polygamma.default)
def polygamma(ctx: Lowering, n: Int, x: Value) -> Computed:
    """Derivative `n` of digamma."""
    if not isinstance(n, int) or not 0 <= n <= MAX_ORDER:
        raise UnsupportedError(f"polygamma of order {n}")
    if n > 1 and x.dtype == torch.float64:
        raise UnsupportedError("polygamma to a double's last bits")
    return elementwise(ctx, (x,), {0: _digamma, 1: _trigamma}.get(n, functools.partial(_higher_polygamma, n)))


def _riemann_zeta(s: Term, q: float) -> Term:
    """`_zeta` for orders known only to the kernel, q > 0; as eager, NaN below order 1, and no terms too small to matter."""
    total = t.literal(0.0, s.dtype)
    for k in range(DIRECT_TERMS):
        last = t.binary("pow", q + k, -s)
        total = total + last
    w = q + DIRECT_TERMS - 1
    rest, rising, power = last * w / (s - 1.0) - last * 0.5, s, last / w
    for k, number in enumerate(BERNOULLI):
        rest = rest + rising * power * (number / math.factorial(2 * k + 2))
        rising = rising * (s + (2.0 * k + 1.0)) * (s + (2.0 * k + 2.0))
        power = power / w / w
    total = t.where(last.lt(total * torch.finfo(s.dtype).eps * 0.5), total, total + rest)
    return t.where(s.eq(1.0), math.inf, t.where(s.lt(1.0), math.nan, total))


@TABLE.lowers(aten.special_zeta.default, aten.special_zeta.self_scalar)
def zeta(ctx: Lowering, s: Value, q: Value) -> Computed:
    raise UnsupportedError("a series of data-dependent length")


@TABLE.lowers(aten.special_zeta.other_scalar)
def zeta_from_number(ctx: Lowering, s: Value, q: Number) -> Computed:
    """The order is a tensor, the first term's base a number. In float64, as eager's sums are."""
    if not isinstance(q, (int, float)) or not 0.0 < q < math.inf:
        raise UnsupportedError(f"zeta of {q}")
    base = float(q)
    return elementwise(ctx, (s,), lambda x: _riemann_zeta(x.to(torch.float64), base).to(x.dtype))


# ---------------------------------------------------------------------- the normal distribution's functions

ERFCX_MIDDLE = (
    (2.1531153547440383e-08, 0.5641884969886701, 8.883149794388377, 66.11919063714163, 298.6351381974001, 881.952221241769,
     1712.0476126340707, 2051.0783778260716, 1230.3393547979972),
    (1.0, 15.744926110709835, 117.6939508913125, 537.1811018620099, 1621.3895745666903, 3290.7992357334597,
     4362.619090143247, 3439.3676741437216, 1230.3393548037495),
)  # fmt: skip
"""erfcx(x) for x from 0.46875 to 4 (W. J. Cody, Rational Chebyshev approximations for the error function, 1969)."""

ERFCX_FAR = (
    (0.016315387137302097, 0.30532663496123236, 0.36034489994980445, 0.12578172611122926, 0.016083785148742275,
     0.0006587491615298378),
    (1.0, 2.568520192289822, 1.8729528499234673, 0.5279051029514285, 0.06051834131244132, 0.0023352049762686918),
)  # fmt: skip
"""(1 / sqrt(pi) - x erfcx(x)) x**2 for x above 4, in 1 / x**2. Source: as before."""


@formula(TABLE, aten.special_erfcx.default)
def _erfcx(x: Term) -> Term:
    """exp(x**2) erfc(x)."""
    square = x * x
    inverse = 1.0 / square
    far = (1.0 / math.sqrt(math.pi) - inverse * rational(inverse, ERFCX_FAR)) / x
    value = t.where(x.le(4.0), rational(x, ERFCX_MIDDLE), far)
    return t.where(x.lt(0.46875), t.exp(square) * t.unary("erfc", x), value)


NDTRI_CENTRE = (
    (-59.96335010141079, 98.00107541859997, -56.67628574690703, 13.931260938727968, -1.2391658386738125),
    (1.0, 1.9544885833814176, 4.676279128988815, 86.36024213908905, -225.46268785411937, 200.26021238006066,
     -82.03722561683334, 15.90562251262117, -1.1833162112133),
)  # fmt: skip
"""x / sqrt(2 pi) over y - 1/2, less 1, over (y - 1/2)**2, in (y - 1/2)**2 for exp(-2) < y < 1 - exp(-2) (Cephes, ndtri)."""

NDTRI_TAIL = (
    (4.0554489230596245, 31.525109459989388, 57.16281922464213, 44.08050738932008, 14.684956192885803, 2.1866330685079025,
     -0.1402560791713545, -0.03504246268278482, -0.0008574567851546854),
    (1.0, 15.779988325646675, 45.39076351288792, 41.3172038254672, 15.04253856929075, 2.504649462083094,
     -0.14218292285478779, -0.03808064076915783, -0.0009332594808954574),
)  # fmt: skip
"""z - log(z) / z - x over 1 / z, in 1 / z with z = sqrt(-2 log(y)) from 2 to 8 (Cephes, ndtri)."""

NDTRI_FAR_TAIL = (
    (3.2377489177694603, 6.915228890689842, 3.9388102529247444, 1.3330346081580755, 0.20148538954917908,
     0.012371663481782003, 0.00030158155350823543, 2.6580697468673755e-06, 6.239745391849833e-09),
    (1.0, 6.02427039364742, 3.6798356385616087, 1.3770209948908132, 0.21623699359449663, 0.013420400608854318,
     0.00032801446468212774, 2.8924786474538068e-06, 6.790194080099813e-09),
)  # fmt: skip
"""The same for z from 8 to 64."""


@formula(TABLE, aten.special_ndtri.default)
def _ndtri(y: Term) -> Term:
    """Where the normal distribution function is y: infinite at 0 and 1, NaN outside."""
    edge = math.exp(-2.0)
    upper = y.gt(1.0 - edge)
    tail = t.where(upper, 1.0 - y, y)
    centre = tail - 0.5
    square = centre * centre
    middle = (centre + centre * (square * rational(square, NDTRI_CENTRE))) * math.sqrt(2.0 * math.pi)
    z = t.sqrt(-2.0 * t.log(tail))
    inverse = 1.0 / z
    ratio = t.where(z.lt(8.0), rational(inverse, NDTRI_TAIL), rational(inverse, NDTRI_FAR_TAIL))
    outside = z - t.log(z) / z - inverse * ratio
    value = t.where(tail.gt(edge), middle, t.where(upper, outside, -outside))
    return t.where(y.eq(0.0), -math.inf, t.where(y.eq(1.0), math.inf, value))


# ---------------------------------------------------------------------- orthogonal polynomials of a known degree

MAX_DEGREE = {torch.float32: 8, torch.float64: 3}
"""By the dtype computed in. Beyond, errors grow apart from eager's, whose Chebyshev polynomials are cosines there."""

Step = Callable[[int, Term, Term, Term], Term]
"""The polynomial of degree k + 1 from k, x, the polynomial of degree k and the one before."""


def _chebyshev_step(k: int, x: Term, q: Term, p: Term) -> Term:
    return (x + x) * q - p


def _hermite_step(k: int, x: Term, q: Term, p: Term) -> Term:
    return (x + x) * q - 2.0 * k * p


def _hermite_e_step(k: int, x: Term, q: Term, p: Term) -> Term:
    return x * q - float(k) * p


def _laguerre_step(k: int, x: Term, q: Term, p: Term) -> Term:
    return ((2.0 * k + (1.0 - x)) * q - float(k) * p) / (k + 1.0)


def _legendre_step(k: int, x: Term, q: Term, p: Term) -> Term:
    return ((2.0 * k + 1.0) * x * q - float(k) * p) / (k + 1.0)


POLYNOMIALS: dict[str, tuple[Callable[[Term], Term], Step]] = {
    "chebyshev_polynomial_t": (lambda x: x, _chebyshev_step),
    "chebyshev_polynomial_u": (lambda x: x + x, _chebyshev_step),
    "chebyshev_polynomial_v": (lambda x: x + x - 1.0, _chebyshev_step),
    "chebyshev_polynomial_w": (lambda x: x + x + 1.0, _chebyshev_step),
    "hermite_polynomial_h": (lambda x: x + x, _hermite_step),
    "hermite_polynomial_he": (lambda x: x, _hermite_e_step),
    "laguerre_polynomial_l": (lambda x: 1.0 - x, _laguerre_step),
    "legendre_polynomial_p": (lambda x: x, _legendre_step),
}
"""Degree 1, and the recurrence (Abramowitz and Stegun, 22.7); degree 0 is 1."""


def _polynomial(name: str, shifted: bool) -> Callable[[Lowering, Value, Number], Computed]:
    first, step = POLYNOMIALS[name]

    def lower(ctx: Lowering, x: Value, n: Number) -> Computed:
        if not isinstance(n, (int, float)) or not n <= MAX_DEGREE[compute_dtype(ctx.out().dtype)]:
            raise UnsupportedError(f"{name} of degree {n}")
        degree = int(max(n, -1))

        def fn(x: Term) -> Term:
            if degree <= 0:
                return t.literal(1.0 if degree == 0 else 0.0, x.dtype)
            x = x + x - 1.0 if shifted else x
            last, value = t.literal(1.0, x.dtype), first(x)
            for k in range(1, degree):
                last, value = value, step(k, x, value, last)
            return value

        return elementwise(ctx, (x,), fn)

    return lower


for _name in POLYNOMIALS:
    TABLE.lowers(getattr(aten, f"special_{_name}").n_scalar)(_polynomial(_name, shifted=False))
    if _name.startswith("chebyshev"):
        TABLE.lowers(getattr(aten, f"special_shifted_{_name}").n_scalar)(_polynomial(_name, shifted=True))


# ---------------------------------------------------------------------- parts of a floating number

_LAYOUT = {torch.float32: (torch.int32, 23, 8), torch.float64: (torch.int64, 52, 11)}
"""The integer of the same width, bits of the fraction, bits of the exponent."""


def _parts(x: Term) -> tuple[Term, Term]:
    """Mantissa in [0.5, 1) and exponent; 0, infinities and NaN are their own mantissa, with the exponent 0."""
    integer, fraction_bits, exponent_bits = _LAYOUT[x.dtype]
    mask, half = (1 << exponent_bits) - 1, (1 << (exponent_bits - 1)) - 2
    subnormal = t.absolute(x).lt(torch.finfo(x.dtype).tiny)
    bits = Term(Op("bitcast", (t.where(subnormal, x * 2.0**64, x).scalar,), integer))
    exponent = t.binary("rshift", bits, fraction_bits) & mask
    halves = (bits & ~(mask << fraction_bits)) | (half << fraction_bits)
    plain = x.eq(0.0) | exponent.eq(mask)
    mantissa = t.where(plain, x, Term(Op("bitcast", (halves.scalar,), x.dtype)))
    return mantissa, t.where(plain, 0, exponent - half - t.where(subnormal, t.literal(64, integer), 0))


@TABLE.lowers(aten.frexp.Tensor)
def frexp(ctx: Lowering, x: Value) -> tuple[Computed, Computed]:
    compute = compute_dtype(x.dtype)
    mantissa = elementwise(ctx, (x,), lambda v: _parts(v)[0], compute=compute, exact=True, position=0)
    return mantissa, elementwise(ctx, (x,), lambda v: _parts(v)[1], compute=compute, exact=True, position=1)
