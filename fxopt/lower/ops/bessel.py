"""Bessel functions, modified and exponentially scaled ones among them, and Airy's Ai.

Coefficients: Cephes (S. L. Moshier, netlib.org/cephes: i0, i1, k0, k1, j0, j1, airy), highest power or index first.
Formulas: Abramowitz and Stegun, chapters 9 and 10. Eager leaves the leading x**n of Cephes' denominators out in J, Y and in
Ai below -2.09, which costs it digits (1e-6 of J0's value at 5); so do these, whose measure is eager.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fxopt.errors import UnsupportedError
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops import terms as t
from fxopt.lower.ops.elementwise import elementwise, formula
from fxopt.lower.ops.special import horner, rational
from fxopt.lower.ops.terms import Term
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value

aten = torch.ops.aten
TABLE = Table()


def _chebyshev(x: Term, coefficients: Sequence[float]) -> Term:
    """The sum of coefficients times T_k(x / 2), the last one halved, by Clenshaw's recurrence.

    What x's dtype cannot see is left out: sums are of the order of one, the first coefficients tiny. At float32 the limit
    leaves Cephes' single-precision tables, and so eager's own rounding errors, which are 8 eps for i1 at 8.
    """
    least = torch.finfo(x.dtype).eps / 32
    seen = [c for k, c in enumerate(coefficients) if any(abs(d) > least for d in coefficients[: k + 1])]
    value, last, before = t.literal(seen[0], x.dtype), t.literal(0.0, x.dtype), t.literal(0.0, x.dtype)
    for coefficient in seen[1:]:
        value, last, before = x * value - last + coefficient, value, last
    return 0.5 * (value - before)


# ---------------------------------------------------------------------- I: modified, first kind

I0_NEAR = (
    -4.4153416464793395e-18, 3.3307945188222384e-17, -2.431279846547955e-16, 1.715391285555133e-15, -1.1685332877993451e-14,
    7.676185498604936e-14, -4.856446783111929e-13, 2.95505266312964e-12, -1.726826291441556e-11, 9.675809035373237e-11,
    -5.189795601635263e-10, 2.6598237246823866e-09, -1.300025009986248e-08, 6.046995022541919e-08, -2.670793853940612e-07,
    1.1173875391201037e-06, -4.4167383584587505e-06, 1.6448448070728896e-05, -5.754195010082104e-05, 0.00018850288509584165,
    -0.0005763755745385824, 0.0016394756169413357, -0.004324309995050576, 0.010546460394594998, -0.02373741480589947,
    0.04930528423967071, -0.09490109704804764, 0.17162090152220877, -0.3046826723431984, 0.6767952744094761,
)  # fmt: skip
"""exp(-x) I0(x) for x up to 8, in x / 2 - 2."""

I0_FAR = (
    -7.233180487874754e-18, -4.830504485944182e-18, 4.46562142029676e-17, 3.461222867697461e-17, -2.8276239805165836e-16,
    -3.425485619677219e-16, 1.7725601330565263e-15, 3.8116806693526224e-15, -9.554846698828307e-15, -4.150569347287222e-14,
    1.54008621752141e-14, 3.8527783827421426e-13, 7.180124451383666e-13, -1.7941785315068062e-12, -1.3215811840447713e-11,
    -3.1499165279632416e-11, 1.1889147107846439e-11, 4.94060238822497e-10, 3.3962320257083865e-09, 2.266668990498178e-08,
    2.0489185894690638e-07, 2.8913705208347567e-06, 6.889758346916825e-05, 0.0033691164782556943, 0.8044904110141088,
)  # fmt: skip
"""exp(-x) sqrt(x) I0(x) for x above 8, in 32 / x - 2."""

I1_NEAR = (
    2.7779141127610464e-18, -2.111421214358166e-17, 1.5536319577362005e-16, -1.1055969477353862e-15, 7.600684294735408e-15,
    -5.042185504727912e-14, 3.223793365945575e-13, -1.9839743977649436e-12, 1.1736186298890901e-11, -6.663489723502027e-11,
    3.625590281552117e-10, -1.8872497517228294e-09, 9.381537386495773e-09, -4.445059128796328e-08, 2.0032947535521353e-07,
    -8.568720264695455e-07, 3.4702513081376785e-06, -1.3273163656039436e-05, 4.781565107550054e-05, -0.00016176081582589674,
    0.0005122859561685758, -0.0015135724506312532, 0.004156422944312888, -0.010564084894626197, 0.024726449030626516,
    -0.05294598120809499, 0.1026436586898471, -0.17641651835783406, 0.25258718644363365,
)  # fmt: skip
"""exp(-x) I1(x) / x for x up to 8, in x / 2 - 2."""

I1_FAR = (
    7.517296310842105e-18, 4.414348323071708e-18, -4.6503053684893586e-17, -3.209525921993424e-17, 2.96262899764595e-16,
    3.3082023109209285e-16, -1.8803547755107825e-15, -3.8144030724370075e-15, 1.0420276984128802e-14, 4.272440016711951e-14,
    -2.1015418427726643e-14, -4.0835511110921974e-13, -7.198551776245908e-13, 2.0356285441470896e-12, 1.4125807436613782e-11,
    3.2526035830154884e-11, -1.8974958123505413e-11, -5.589743462196584e-10, -3.835380385964237e-09, -2.6314688468895196e-08,
    -2.512236237870209e-07, -3.882564808877691e-06, -0.00011058893876262371, -0.009761097491361469, 0.7785762350182801,
)  # fmt: skip
"""exp(-x) sqrt(x) I1(x) for x above 8, in 32 / x - 2."""


def _i0_near(x: Term) -> Term:
    """exp(-x) I0(x), 0 <= x <= 8."""
    return _chebyshev(x * 0.5 - 2.0, I0_NEAR)


def _i1_near(x: Term) -> Term:
    """exp(-x) I1(x), 0 <= x <= 8."""
    return _chebyshev(x * 0.5 - 2.0, I1_NEAR) * x


@formula(TABLE, aten.special_i0e.default)
def _i0e(x: Term) -> Term:
    x = t.absolute(x)
    return t.where(x.le(8.0), _i0_near(x), _chebyshev(32.0 / x - 2.0, I0_FAR) / t.sqrt(x))


@formula(TABLE, aten.i0.default, aten.special_modified_bessel_i0.default)
def _i0(x: Term) -> Term:
    """NaN at infinity, as eager's: a product with exp, then a quotient by the root."""
    x = t.absolute(x)
    power = t.exp(x)
    return t.where(x.le(8.0), power * _i0_near(x), power * _chebyshev(32.0 / x - 2.0, I0_FAR) / t.sqrt(x))


@formula(TABLE, aten.special_i1e.default)
def _i1e(x: Term) -> Term:
    y = t.absolute(x)
    value = t.where(y.le(8.0), _i1_near(y), _chebyshev(32.0 / y - 2.0, I1_FAR) / t.sqrt(y))
    return t.where(x.lt(0.0), -value, value)


@formula(TABLE, aten.special_i1.default, aten.special_modified_bessel_i1.default)
def _i1(x: Term) -> Term:
    y = t.absolute(x)
    power = t.exp(y)
    value = t.where(y.le(8.0), power * _i1_near(y), power * _chebyshev(32.0 / y - 2.0, I1_FAR) / t.sqrt(y))
    return t.where(x.lt(0.0), -value, value)


# ---------------------------------------------------------------------- K: modified, second kind

K0_NEAR = (
    1.374465435613523e-16, 4.25981614279661e-14, 1.0349695257633842e-11, 1.904516377220209e-09, 2.5347910790261494e-07,
    2.286212103119452e-05, 0.001264615411446926, 0.0359799365153615, 0.3442898999246285, -0.5353273932339028,
)  # fmt: skip
"""K0(x) + log(x / 2) I0(x) for x up to 2, in x**2 - 2."""

K0_FAR = (
    5.300433772686263e-18, -1.6475804301524212e-17, 5.2103915050390274e-17, -1.678231096805412e-16, 5.512055978524319e-16,
    -1.848593377343779e-15, 6.3400764774050706e-15, -2.2275133269916698e-14, 8.032890775363575e-14, -2.9800969231727303e-13,
    1.140340588208475e-12, -4.514597883373944e-12, 1.8559491149547177e-11, -7.957489244477107e-11, 3.577397281400301e-10,
    -1.69753450938906e-09, 8.574034017414225e-09, -4.660489897687948e-08, 2.766813639445015e-07, -1.8317555227191195e-06,
    1.39498137188765e-05, -0.00012849549581627802, 0.0015698838857300533, -0.0314481013119645, 2.4403030820659555,
)  # fmt: skip
"""exp(x) sqrt(x) K0(x) for x above 2, in 8 / x - 2."""

K1_NEAR = (
    -7.023863479386288e-18, -2.427449850519366e-15, -6.666901694199329e-13, -1.4114883926335278e-10, -2.213387630734726e-08,
    -2.4334061415659684e-06, -0.0001730288957513052, -0.006975723859639864, -0.12261118082265715, -0.3531559607765449,
    1.5253002273389478,
)  # fmt: skip
"""x (K1(x) - log(x / 2) I1(x)) for x up to 2, in x**2 - 2."""

K1_FAR = (
    -5.756744483665017e-18, 1.7940508731475592e-17, -5.689462558442859e-17, 1.838093544366639e-16, -6.057047248373319e-16,
    2.038703165624334e-15, -7.019837090418314e-15, 2.4771544244813043e-14, -8.976705182324994e-14, 3.3484196660784293e-13,
    -1.2891739609510289e-12, 5.13963967348173e-12, -2.1299678384275683e-11, 9.218315187605006e-11, -4.1903547593418965e-10,
    2.015049755197033e-09, -1.0345762465678097e-08, 5.7410841254500495e-08, -3.5019606030878126e-07, 2.406484947837217e-06,
    -1.936197974166083e-05, 0.00019521551847135162, -0.002857816859622779, 0.10392373657681724, 2.7206261904844427,
)  # fmt: skip
"""exp(x) sqrt(x) K1(x) for x above 2, in 8 / x - 2."""


def _i_series(x: Term, order: int) -> Term:
    """I0(x) or I1(x), x <= 2: Abramowitz and Stegun, 9.6.10."""
    factors = [1.0 / (math.factorial(k) * math.factorial(k + order)) for k in range(13)]
    quarter, least = 0.25 * (x * x), torch.finfo(x.dtype).eps / 64
    series = horner(quarter, [c for c in reversed(factors) if c > least])
    return 0.5 * x * series if order else series


def _k0_near(x: Term) -> Term:
    """K0(x), x <= 2: infinite at 0, NaN below."""
    return _chebyshev(x * x - 2.0, K0_NEAR) - t.log(0.5 * x) * _i_series(x, 0)


def _k1_near(x: Term) -> Term:
    """K1(x), x <= 2: infinite at 0, NaN below."""
    value = t.log(0.5 * x) * _i_series(x, 1) + _chebyshev(x * x - 2.0, K1_NEAR) / x
    return t.where(x.eq(0.0), math.inf, value)


def _k_far(x: Term, coefficients: Sequence[float]) -> Term:
    """exp(x) times K0(x) or K1(x), x > 2."""
    return _chebyshev(8.0 / x - 2.0, coefficients) / t.sqrt(x)


@formula(TABLE, aten.special_modified_bessel_k0.default)
def _k0(x: Term) -> Term:
    return t.where(x.le(2.0), _k0_near(x), t.exp(-x) * _k_far(x, K0_FAR))


@formula(TABLE, aten.special_modified_bessel_k1.default)
def _k1(x: Term) -> Term:
    return t.where(x.le(2.0), _k1_near(x), t.exp(-x) * _k_far(x, K1_FAR))


@formula(TABLE, aten.special_scaled_modified_bessel_k0.default)
def _scaled_k0(x: Term) -> Term:
    return t.where(x.le(2.0), _k0_near(x) * t.exp(x), _k_far(x, K0_FAR))


@formula(TABLE, aten.special_scaled_modified_bessel_k1.default)
def _scaled_k1(x: Term) -> Term:
    return t.where(x.le(2.0), _k1_near(x) * t.exp(x), _k_far(x, K1_FAR))


# ---------------------------------------------------------------------- J and Y: first and second kind

J0_NEAR = (
    (-4794432209.782018, 1956174919465.5657, -249248344360967.72, 9708622510473064.0),
    (499.563147152651, 173785.4016763747, 48440965.83399621, 11185553704.535683, 2112775201154.892, 310518229857422.56,
     3.1812195594320496e+16, 1.7108629408104315e+18),
)  # fmt: skip
"""J0(x) without its first two zeros for x up to 5, in x**2."""

J0_ZEROS = (5.78318596294678452118, 30.4712623436620863991)
"""The squares of J0's first two zeros."""

Y0_NEAR = (
    (15592.436785523574, -14663929.59039716, 5435264770.518765, -982136065717.9115, 87590639439536.7, -3466283033847297.0,
     4.4273326857256984e+16, -1.8495080043698668e+16),
    (1041.2835366425984, 626107.330137135, 268919633.39381415, 86400248710.3935, 20297961275010.555, 3171577528429750.5,
     2.5059625617265306e+17),
)  # fmt: skip
"""Y0(x) - 2 / pi log(x) J0(x) for x up to 5, in x**2."""

J1_NEAR = (
    (-899971225.7055594, 452228297998.19403, -72749424522181.83, 3682957328638529.0),
    (620.8364781180543, 256987.25675774884, 83514679.14319493, 22151159547.97925, 4749141220799.914, 784369607876235.9,
     8.952223361846274e+16, 5.322786203326801e+18),
)  # fmt: skip
"""J1(x) / x without its first two zeros for x up to 5, in x**2."""

J1_ZEROS = (14.6819706421238932572, 49.2184563216946036703)
"""The squares of J1's first two zeros."""

Y1_NEAR = (
    (1263204747.9017804, -647355876379.1603, 114509511541823.73, -8127702555013251.0, 2.024394757135949e+17,
     -7.788771962659501e+17),
    (594.3015923461282, 235564.09294306856, 73481194.44597217, 18760131610.870617, 3882312774962.3857, 620557727146953.8,
     6.871410873553005e+16, 3.9727060811656064e+18),
)  # fmt: skip
"""(Y1(x) - 2 / pi (log(x) J1(x) - 1 / x)) / x for x up to 5, in x**2."""

FAR0 = (
    (0.0007969367292973471, 0.08283523921074408, 1.239533716464143, 5.447250030587687, 8.74716500199817, 5.303240382353949,
     1.0),
    (0.0009244088105588637, 0.08562884743544745, 1.2535274390105895, 5.470977403304171, 8.761908832370695,
     5.306052882353947, 1.0),
    (-0.011366383889846916, -1.2825271867050931, -19.553954425773597, -93.20601521237683, -177.68116798048806,
     -147.07750515495118, -51.41053267665993, -6.050143506007285),
    (64.3178256118178, 856.4300259769806, 3882.4018360540163, 7240.467741956525, 5930.727011873169, 2062.0933166032783,
     242.0057402402914),
)  # fmt: skip
FAR1 = (
    (0.0007621256162081731, 0.07313970569409176, 1.1271960812968493, 5.112079511468076, 8.424045901417724,
     5.214515986823615, 1.0),
    (0.0005713231280725487, 0.06884559087544954, 1.105142326340617, 5.073863861286015, 8.399855543276042,
     5.209828486823619, 1.0),
    (0.05108625947501766, 4.982138729512334, 75.82382841325453, 366.7796093601508, 710.8563049989261, 597.4896124006136,
     211.68875710057213, 25.207020585802372),
    (74.23732770356752, 1056.4488603826283, 4986.410583376536, 9562.318924047562, 7997.041604473507, 2826.1927851763908,
     336.0936078106983),
)  # fmt: skip
"""The modulus of the cosine and that of the sine, two fractions each, for x above 5, in 25 / x**2."""


def _j0_near(x: Term) -> Term:
    square = x * x
    value = (square - J0_ZEROS[0]) * (square - J0_ZEROS[1]) * rational(square, J0_NEAR)
    return t.where(x.lt(1e-5), 1.0 - square / 4.0, value)


def _j1_near(x: Term) -> Term:
    square = x * x
    return rational(square, J1_NEAR) * x * (square - J1_ZEROS[0]) * (square - J1_ZEROS[1])


def _far(x: Term, order: int, *, second: bool) -> Term:
    """J or, when `second`, Y of that order for x > 5: P and Q of Abramowitz and Stegun, 9.2.5 and 9.2.6; NaN at infinity."""
    p, p_under, q, q_under = FAR1 if order else FAR0
    inverse = 25.0 / (x * x)
    cosine_part, sine_part = rational(inverse, (p, p_under)), 5.0 / x * rational(inverse, (q, q_under))
    angle = x - (0.25 + 0.5 * order) * math.pi
    sine, cosine = t.sin(angle), t.unary("cos", angle)
    wave = cosine_part * sine + sine_part * cosine if second else cosine_part * cosine - sine_part * sine
    return wave * math.sqrt(2.0 / math.pi) / t.sqrt(x)


@formula(TABLE, aten.special_bessel_j0.default)
def _j0(x: Term) -> Term:
    x = t.absolute(x)
    return t.where(x.le(5.0), _j0_near(x), _far(x, 0, second=False))


@formula(TABLE, aten.special_bessel_j1.default)
def _j1(x: Term) -> Term:
    y = t.absolute(x)
    value = t.where(y.le(5.0), _j1_near(y), _far(y, 1, second=False))
    return t.where(x.lt(0.0), -value, value)


@formula(TABLE, aten.special_bessel_y0.default)
def _y0(x: Term) -> Term:
    """-inf at 0, NaN below."""
    near = rational(x * x, Y0_NEAR) + 2.0 / math.pi * t.log(x) * _j0_near(x)
    return t.where(x.le(5.0), near, _far(x, 0, second=True))


@formula(TABLE, aten.special_bessel_y1.default)
def _y1(x: Term) -> Term:
    """-inf at 0, NaN below."""
    near = x * rational(x * x, Y1_NEAR) + 2.0 / math.pi * (_j1_near(x) * t.log(x) - 1.0 / x)
    return t.where(x.eq(0.0), -math.inf, t.where(x.le(5.0), near, _far(x, 1, second=True)))


@formula(TABLE, aten.special_spherical_bessel_j0.default)
def _spherical_j0(x: Term) -> Term:
    value = t.where(x.eq(0.0), 1.0, t.sin(x) / x)
    return t.where(t.predicate("isinf", x), 0.0, value)


# ---------------------------------------------------------------------- Airy's Ai

AIRY_DECAY = (
    (0.346538101525629, 12.007595273964581, 76.27960536152345, 168.08922493463058, 159.75639135016442, 70.53609068404442,
     14.026469116338967, 1.0),
    (0.5675945326387702, 14.75625625848472, 84.51389701414746, 177.31808814540045, 164.2346928715297, 71.47784008255756,
     14.095913560783403, 1.0),
)  # fmt: skip
"""Above 2.09, in 1 / zeta with zeta = 2 / 3 x**1.5."""

AIRY_WAVE_F = (
    (-0.1316963234183318, -0.6264565444319123, -0.6931580360369335, -0.2797799815451191, -0.04919001326095003,
     -0.004062659235948854, -0.0001592764962392621, -2.776491081552329e-06, -1.6778769848911465e-08),
    (13.356042070655324, 32.682503279522464, 26.736704094149957, 9.187074029072596, 1.4752914677166642,
     0.11568717379518804, 0.004402916416152112, 7.547203482874142e-05, 4.5185009297058035e-07),
)  # fmt: skip
AIRY_WAVE_G = (
    (0.01973399320916857, 0.39110302961568827, 1.0657989759959559, 0.9391692298166502, 0.35146565610554764,
     0.06338889196289255, 0.005858041130483885, 0.000282851600836737, 6.98793669997261e-06, 8.117892395543892e-08,
     3.415517847659236e-10),
    (9.30892908077442, 19.835292871831214, 15.564662893286462, 5.476860694229755, 0.9542936116189619, 0.08645808263523921,
     0.004126565238242226, 0.00010125908511650914, 1.1716673321441352e-06, 4.9183457006293e-09),
)  # fmt: skip
"""The moduli of sine and cosine below -2.09, in 1 / zeta**2."""

AIRY_LIMIT = 2.09
AIRY_TERMS = 8
"""Of the power series: the next is below a float's last bit at AIRY_LIMIT."""

AI_AT_ZERO, SLOPE_AT_ZERO = 0.355028053887817239260, 0.258819403792806798405


def _airy_series(x: Term) -> Term:
    """Abramowitz and Stegun, 10.4.2: Ai(0) f(x) + Ai'(0) g(x), both series in x**3."""
    steps = range(AIRY_TERMS, 0, -1)
    f = [1.0 / math.prod((3 * j - 1) * 3 * j for j in range(1, k + 1)) for k in steps]
    g = [1.0 / math.prod(3 * j * (3 * j + 1) for j in range(1, k + 1)) for k in steps]
    cube = x * x * x
    return AI_AT_ZERO * horner(cube, [*f, 1.0]) - SLOPE_AT_ZERO * (x * horner(cube, [*g, 1.0]))


def _airy_ai(x: Term) -> Term:
    """NaN at both infinities, 0 above 103.892, as eager's."""
    y = t.absolute(x)
    root = t.sqrt(y)
    zeta = 2.0 * y * root / 3.0
    inverse = 1.0 / zeta
    amplitude = 1.0 / math.sqrt(math.pi) / t.sqrt(root)
    decay = amplitude * 0.5 * rational(inverse, AIRY_DECAY) / t.exp(zeta)
    square, angle = inverse * inverse, zeta + 0.25 * math.pi
    sine_part = t.sin(angle) * (1.0 + square * rational(square, AIRY_WAVE_F))
    wave = amplitude * (sine_part - t.unary("cos", angle) * (inverse * rational(square, AIRY_WAVE_G)))
    value = t.where(x.lt(-AIRY_LIMIT), wave, t.where(x.ge(AIRY_LIMIT), decay, _airy_series(x)))
    return t.where(t.predicate("isinf", x), math.nan, t.where(x.gt(103.892), 0.0, value))


@TABLE.lowers(aten.special_airy_ai.default)
def airy_ai(ctx: Lowering, x: Value) -> Computed:
    if ctx.out().dtype == torch.float64:
        raise UnsupportedError("airy_ai to a double's last bits: its phase rounds as the compiler pleases")
    return elementwise(ctx, (x,), _airy_ai)
