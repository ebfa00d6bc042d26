"""Reductions, softmax and scans against eager and float64: dimensions, dtypes, NaN, emptiness, layout."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import ReductionOpInfo

from fxopt.ir.region import Region
from tests.lower.harness import check, lower, outputs
from tests.lower.test_pointwise import check_sample

aten = torch.ops.aten
INF, NAN = math.inf, math.nan
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
X = torch.linspace(-3.0, 4.0, 60).reshape(3, 4, 5).sin() * 5
WITH_NAN = torch.tensor([[1.0, NAN, 3.0], [INF, 2.0, -INF], [-0.0, 0.0, -1.0], [NAN, NAN, 0.0]])

OVER_DIMS = {
    "sum": torch.sum, "mean": torch.mean, "amax": torch.amax, "amin": torch.amin, "var": torch.var, "std": torch.std,
    "logsumexp": torch.logsumexp, "norm": lambda x, d, keepdim=False: torch.linalg.vector_norm(x, 2, d, keepdim),
}  # fmt: skip


@pytest.mark.parametrize("name", OVER_DIMS)
@pytest.mark.parametrize("dim", [0, 1, -1, (0, 2), (0, 1, 2)])
def test_dimensions(name, dim):
    check(lambda x: (OVER_DIMS[name](x, dim), OVER_DIMS[name](x, dim, keepdim=True)), X)


@pytest.mark.parametrize("name", OVER_DIMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_floating_types(name, dtype):
    check(lambda x: OVER_DIMS[name](x, 1), X.to(dtype))


@pytest.mark.parametrize("name", OVER_DIMS)
def test_special_values(name):
    check(lambda x: OVER_DIMS[name](x, 1), WITH_NAN)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers(dtype):
    x = X.abs().to(dtype)
    check(lambda v: (v.sum(), v.sum(1), v.amax(0), v.amin(2), v.any(), v.all(1), v.any(-1, keepdim=True)), x)
    check(lambda v: (v.prod(1), torch.count_nonzero(v, 1), v.sum(dtype=torch.float32)), x)
    check(lambda v: (v.max(1).values, v.max(1).indices), x)


def test_whole_tensors():
    check(lambda x: (x.sum(), x.mean(), x.max(), x.min(), x.prod(), x.var(), x.std(), x.argmax(), x.argmin()), X)
    check(lambda x: (x.any(), x.all(), x.norm(), x.aminmax().min, x.aminmax().max), X)


def test_a_scalar_reduces_to_itself():
    x = torch.tensor(2.5)
    check(
        lambda v: (
            v.sum(),
            v.mean(0),
            v.amax(),
            v.argmax(),
            v.softmax(0),
            v.var(correction=0),
            v.cumsum(0),
            v.max(0).indices,
        ),
        x,
    )
    check(lambda v: (v.sum(0), v.amax(0), v.softmax(0), v.logsumexp(0)), torch.rand(1, 3))


def test_moments_with_corrections():
    for correction in (0, 1, 2, 4):
        check(lambda x, c=correction: (*torch.var_mean(x, 1, correction=c), *torch.std_mean(x, 0, correction=c)), X)
    check(lambda x: torch.var_mean(x, 2), X.bfloat16())


def test_a_large_mean_does_not_swallow_the_variance():
    """The difference of two sums of squares would have no digit left here."""
    x = X.reshape(6, 10) * 1e-2 + 1e3
    torch.testing.assert_close(outputs(lambda v: v.var(1), x)[0].double(), x.double().var(1), rtol=1e-3, atol=0)


def test_bool_and_integer_sums_do_not_overflow():
    check(lambda x: x.sum(), torch.ones(300, dtype=torch.bool))
    check(lambda x: x.sum(), torch.full((300,), 250, dtype=torch.uint8))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 0.5, -1, INF, -INF])
def test_norms(order):
    check(lambda x: (torch.linalg.vector_norm(x, order, 1), torch.linalg.vector_norm(x, order)), X)
    check(lambda x: torch.linalg.vector_norm(x, order, (0, 2), keepdim=True), X.bfloat16())


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_positions(name):
    fn = getattr(torch, name)
    check(lambda x: (fn(x), fn(x, 0), fn(x, -1), fn(x, 1, keepdim=True)), X)
    check(lambda x: (fn(x), fn(x, 0), fn(x, 1)), WITH_NAN)


def test_the_first_of_equal_elements_wins():
    x = torch.tensor([[2, 5, 5, 1], [1, 1, 1, 1]])
    check(lambda v: (v.argmax(1), v.argmin(1), v.max(1).indices, v.min(1).indices, v.argmax()), x)


def test_positions_of_computed_half_values_are_those_of_their_stored_form():
    """Neighbours that differ in float32 may be equal in bfloat16: then the first of them is the maximum."""
    x = torch.linspace(1.0, 1.01, 16).bfloat16().reshape(2, 8)
    check(lambda v: (v * 1.001).argmax(1), x)


# ---------------------------------------------------------------------- softmax


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("dtype", FLOATS)
def test_softmax(dim, dtype):
    check(lambda x: (x.softmax(dim), x.log_softmax(dim)), (X * 10).to(dtype))


def test_softmax_of_special_rows():
    rows = torch.tensor([[-INF, -INF, -INF], [INF, 0.0, 1.0], [NAN, 0.0, 1.0], [-INF, 0.0, 1.0], [1e4, -1e4, 9999.0]])
    check(lambda x: (x.softmax(1), x.log_softmax(1), x.logsumexp(1)), rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_softmax_gradients(dtype):
    grad = X.cos().to(dtype)
    check(lambda g, y: aten._softmax_backward_data(g, y, 1, dtype), grad, X.softmax(1).to(dtype))
    check(lambda g, y: aten._log_softmax_backward_data(g, y, -1, dtype), grad, X.log_softmax(-1).to(dtype))


# ---------------------------------------------------------------------- scans


@pytest.mark.parametrize("name", ["cumsum", "cumprod", "cummax", "cummin"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_scans(name, dim):
    fn = getattr(torch, name)
    check(lambda x: fn(x, dim), X)
    check(lambda x: fn(x, dim), X.long())
    check(lambda x: fn(x, dim), WITH_NAN)


def test_running_sums_of_exponentials():
    infinities = torch.tensor([[-INF, -INF, 1.0, INF, 2.0], [INF, INF, NAN, 0.0, 1.0], [-900.0, 800.0, 3.0, -INF, 0.0]])
    for x in (X, X * 100, X.bfloat16(), X.double(), infinities, torch.empty(3, 0), torch.tensor(2.5)):
        check(lambda x: (torch.logcumsumexp(x, 0), torch.logcumsumexp(x, -1)), x)


def test_scans_of_other_types():
    check(lambda x: (x.cumsum(1), x.cumsum(0, dtype=torch.float32)), X > 0)
    check(lambda x: x.cumsum(2), X.bfloat16())
    check(lambda x: torch.cummax(x, 0), X > 0)


def test_the_last_of_equal_elements_is_where_a_running_maximum_was_seen():
    check(lambda x: (torch.cummax(x, 0).indices, torch.cummin(x, 0).indices), torch.tensor([1, 3, 3, 0, 3, 0]))


# ---------------------------------------------------------------------- emptiness, layout, fusion, symbolic sizes


def test_nothing_to_reduce():
    x = torch.rand(2, 0, 3)
    check(
        lambda v: (v.sum(1), v.mean(1), v.prod(1), v.any(1), v.all(1), v.var(1), torch.var_mean(v, 1)[1], v.logsumexp(1)), x
    )
    check(lambda v: (v.sum(), v.mean(), v.sum(0), v.amax(0), v.softmax(1), v.cumsum(1), v.argmax(2)), x)


def test_results_have_eagers_strides():
    x = X.permute(2, 0, 1)
    check(lambda v: (v.sum(1), v.amax(2, keepdim=True), v.cumsum(0), v.var(0), v.softmax(1)), x)


def test_producers_are_computed_inside():
    check(lambda x, y: ((x * y + 1).sum(-1), torch.sigmoid(x).amax(0), (x - y).square().mean((0, 1))), X, X.cos())


def test_symbolic_sizes():
    check(lambda x: (x.mean(1), x.var(0), x.softmax(-1), x.argmax(1), x.argmax(), x.cumsum(2)), X, dynamic=True)


def test_dropout_like_fusion_counts_every_element():
    (got,) = outputs(lambda x: torch.ones_like(x).sum(1), X)
    assert torch.equal(got, torch.full((3, 5), 4.0))


# ---------------------------------------------------------------------- torch's own samples

LIBRARY = frozenset(("hash_tensor",))
SAMPLED = [op for op in op_db if isinstance(op, ReductionOpInfo) and op.name not in LIBRARY]
SAMPLED += [
    op for op in op_db if op.name in ("softmax", "log_softmax", "logsumexp", "cumsum", "cumprod", "cummax", "var_mean")
]


@pytest.mark.parametrize("op", SAMPLED, ids=lambda op: op.full_name)
def test_samples(op):
    for dtype in (torch.float32, torch.int64):
        if dtype in op.supported_dtypes("cpu"):
            for sample in list(op.sample_inputs("cpu", dtype, requires_grad=False))[::5][:6]:
                check_sample(op, sample)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_of_one_hot_rows_takes_no_loop(dtype, keepdim):
    """Also where no element of a row is hit."""

    def fn(place, value):
        hit = torch.arange(6)[None] == place[:, None]
        return torch.where(hit, value[:, None], 0.0).to(dtype).sum(1, keepdim=keepdim).float() * 2

    place, value = torch.tensor([0, 5, 3, -100, 6]), torch.tensor([1.0, 2.5, -3.0, 4.0, 5.0])
    check(fn, place, value)
    assert not any(s.nest.reduced for s in lower(fn, (place, value)).steps if isinstance(s, Region))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_share_the_sum_of_what_is_the_same_for_all(dtype):
    """As the gradient of a cross-entropy with weights and smoothed labels has it: a multiple of the weights in each row, and
    another one of one of them, wherever that is."""

    def fn(place, scale, weight):
        hit = torch.arange(6)[None] == place[:, None]
        picked = torch.where(hit, -2.0 * weight.float() * scale[:, None].float(), 0.0).to(dtype)
        return (scale[:, None] * weight + picked).float().sum(1, keepdim=True) * 3

    place, scale = torch.tensor([0, 5, 3, -100, 6]), torch.tensor([1.0, 2.5, -3.0, 4.0, 5.0], dtype=dtype)
    weight = torch.rand(6).to(dtype)
    check(fn, place, scale, weight)
    reducing = [s.nest for s in lower(fn, (place, scale, weight)).steps if isinstance(s, Region) and s.nest.reduced]
    assert [n.points for n in reducing] == [()]


def test_rows_that_share_nothing_are_summed_each():
    def fn(rows, scale, weight):
        return (rows * weight + scale[:, None] * weight).sum(1), (scale[:, None] + weight).sum(1)

    args = torch.rand(5, 6), torch.rand(5), torch.rand(6)
    check(fn, *args)
    assert all(s.nest.points for s in lower(fn, args).steps if isinstance(s, Region) and s.nest.reduced)


def test_sums_of_more_than_one_term_stay_sums():
    def twice(place, value):
        return torch.where(torch.arange(6)[None] == place[:, None], value[:, None], 1.0).sum(1)

    def along(place, rows):
        return torch.where(torch.arange(6)[None] == place[:, None], rows, 0.0).sum(1)

    place = torch.tensor([0, 5, 3, -100])
    check(twice, place, torch.arange(4.0))
    check(along, place, torch.arange(24.0).reshape(4, 6))
