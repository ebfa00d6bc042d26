"""The maximum of a row and its sum of exponentials become one reduction, and nothing else does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fxopt.capture.softmax import SOFTMAX
from fxopt.ir.exprs import Sym, symbol
from fxopt.ir.loops import Load, Nest, Op, Reduce, Scalar, Store, postorder
from fxopt.ir.region import Region
from fxopt.lower.online import one_pass
from fxopt.lower.schedule import schedule
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer

F32 = torch.float32
ROW, COLUMN = Sym("x0", size=4), Sym("r1", size=6)
X = Load("a", symbol(ROW) * 6 + symbol(COLUMN), F32)
TOP = Reduce("max", (X,), (COLUMN,), F32)


def op(name: str, *args: Scalar) -> Scalar:
    return Op(name, args, args[0].dtype)


def total(term: Scalar, axes: tuple[Sym, ...] = (COLUMN,), dtype: torch.dtype = F32) -> Reduce:
    return Reduce("sum", (term,), axes, dtype)


def nest(*values: Scalar) -> Nest:
    return Nest((ROW,), (COLUMN,), tuple(Store(f"out{k}", symbol(ROW), v) for k, v in enumerate(values)))


def kinds(found: Nest) -> set[str]:
    return {n.kind for n in postorder(found.roots) if isinstance(n, Reduce)}


def test_the_pair_becomes_two_outputs_of_one_reduction() -> None:
    log_sum = op("add", op("log", total(op("exp", op("sub", X, TOP)))), TOP)
    merged = one_pass(nest(log_sum, TOP))
    assert kinds(merged) == {"softmax_stats"}
    top, rows = (Reduce("softmax_stats", (X,), (COLUMN,), F32, k) for k in (0, 1))
    assert merged == nest(op("add", op("log", rows), top), top)


def test_addresses_that_were_loaded_follow() -> None:
    """A store whose place depends on a value is rebuilt with the values it depends on."""
    place = Sym("t0", size=4)
    total_ = total(op("exp", op("sub", X, TOP)))
    where = Op("cast", (total_,), torch.int64)
    before = Nest((ROW,), (COLUMN,), (Store("out", symbol(place), total_, "add", ((place, where),)),))
    (store,) = one_pass(before).stores
    ((_, value),) = store.indirect
    assert kinds(Nest((), (), (Store("", 0, value),))) == {"softmax_stats"}


OTHER_TOP = Reduce("max", (op("neg", X),), (COLUMN,), F32)
ALONE: dict[str, Scalar] = {
    "another function": total(op("exp2", op("sub", X, TOP))),
    "the difference turned round": total(op("exp", op("sub", TOP, X))),
    "the maximum of something else": total(op("exp", op("sub", X, OTHER_TOP))),
    "a minimum": total(op("exp", op("sub", X, Reduce("min", (X,), (COLUMN,), F32)))),
    "a product": Reduce("prod", (op("exp", op("sub", X, TOP)),), (COLUMN,), F32),
    "no maximum": total(op("exp", X)),
    "another dtype": total(Op("exp", (op("sub", X, TOP),), F32), dtype=torch.float64),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_only_looks_like_it_stays(name: str) -> None:
    before = nest(ALONE[name], TOP)
    assert one_pass(before) is before


INF, NAN = math.inf, math.nan
ROWS = torch.tensor([[-INF, -INF, -INF], [INF, 0.0, 1.0], [NAN, 0.0, 1.0], [-INF, 0.0, 1.0], [1e4, -1e4, 9999.0]])
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda x: torch.softmax(x + 1, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "by hand": lambda x: (e := (x - x.amax(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("x", [ROWS, torch.randn(6, 40), torch.randn(6, 40).bfloat16()], ids=["special", "float", "half"])
def test_scheduled_softmax_is_one_kernel_with_one_statistic(name: str, x: torch.Tensor) -> None:
    if name == "by hand" and x.dtype == torch.bfloat16:
        x = x.float()  # eager rounds between these pieces
    scheduled = schedule(lower(FUNCTIONS[name], (x,), decompose=SOFTMAX))
    (region,) = (s for s in scheduled.steps if isinstance(s, Region))
    assert kinds(region.nest) == {"softmax_stats"}
    (got,) = run_lowered(scheduled, {scheduled.inputs[0]: x})
    assert_closer(got, FUNCTIONS[name](x), FUNCTIONS[name](x.double()))


def test_few_long_rows_read_their_statistics_in_one_pass_over_many_blocks() -> None:
    """There the sum must not wait for the maximum: each block has both of its part."""
    scheduled = schedule(lower(lambda x: torch.log_softmax(x, -1), (torch.randn(2, 9000),), decompose=SOFTMAX))
    reduced = [s.nest for s in scheduled.steps if isinstance(s, Region) and s.nest.reduced]
    assert [kinds(n) for n in reduced] == [{"softmax_stats"}]
