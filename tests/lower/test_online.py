"""The maximum of a row and its sum of exponentials become one reduction, and nothing else does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.capture.softmax import SOFTMAX
from fxopt.capture.symbols import to_int
from fxopt.ir.exprs import Sym, symbol
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.loops import Load, Nest, Op, Reduce, Scalar, Store, holds_reduction, postorder
from fxopt.ir.region import Region
from fxopt.journal import Journal
from fxopt.lower import lower_graph
from fxopt.lower.online import one_pass
from fxopt.lower.schedule import schedule
from tests.lower.capturing import moved
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


def smoothed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (torch.log_softmax(x, -1) * w).sum(-1)


def soft_targets(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """As it is written by hand: the targets are as many as the logits."""
    return -torch.sum(w.expand_as(x) * torch.log_softmax(x, -1), -1)


def unweighted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(x, -1).sum(-1) * w[0]


def weighted_twice(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    logarithms = torch.log_softmax(x, -1)
    return (logarithms * w).sum(-1) + (logarithms * w.square()).sum(-1)


def on_gpu(fn: Callable[..., torch.Tensor], *args: torch.Tensor) -> Region:
    """The region that a GPU has of `fn`, whose values are compared with eager's on the way."""
    scheduled = schedule(moved(lower(fn, args, decompose=SOFTMAX), "cuda"))
    (region,) = (s for s in scheduled.steps if isinstance(s, Region))
    low = moved(scheduled, "cpu")
    (got,) = run_lowered(low, dict(zip(low.inputs, args, strict=True)))
    assert_closer(got, fn(*args), fn(*(a.double() for a in args)))
    return region


@pytest.mark.parametrize("fn", [smoothed, soft_targets, unweighted])
def test_a_weighted_sum_of_logarithms_is_found_with_the_statistics(fn: Callable[..., torch.Tensor]) -> None:
    region = on_gpu(fn, torch.randn(6, 40), torch.rand(40))
    assert kinds(region.nest) == {"weighted_softmax"}
    assert not any(map(holds_reduction, (a for n in postorder(region.nest.roots) if isinstance(n, Reduce) for a in n.args)))


def test_nothing_is_rounded_where_a_log_softmax_was_taken_apart() -> None:
    args = torch.randn(6, 40).bfloat16(), torch.rand(40).bfloat16()
    with traceback.preserve_node_meta():
        gm = make_fx(smoothed, decomposition_table=SOFTMAX, tracing_mode="fake")(*args)
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    graph = Graph(gm, [Input(n, Role.USER) for n in names], Phase.INFERENCE, "test", to_int)
    low = schedule(moved(lower_graph(graph, Journal("test")), "cuda"))
    (region,) = (s for s in low.steps if isinstance(s, Region))
    assert kinds(region.nest) == {"weighted_softmax"}
    (got,) = run_lowered(moved(low, "cpu"), dict(zip(low.inputs, args, strict=True)))
    assert_closer(got, smoothed(*args), smoothed(*(a.double() for a in args)))


def test_what_is_infinite_in_a_weighted_sum_stays_so() -> None:
    assert kinds(on_gpu(smoothed, ROWS, torch.tensor([0.0, 0.5, 2.0])).nest) == {"weighted_softmax"}


def test_other_weights_do_not_have_statistics_of_their_own() -> None:
    region = on_gpu(weighted_twice, torch.randn(6, 40), torch.rand(40))
    assert kinds(region.nest) == {"weighted_softmax", "sum"}
    assert len({n.operands for n in postorder(region.nest.roots) if isinstance(n, Reduce) and n.kind != "sum"}) == 1


def test_a_cast_that_was_written_still_rounds() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (torch.log_softmax(x, -1).bfloat16().float() * w).sum(-1)

    region = on_gpu(fn, torch.randn(6, 40), torch.rand(40))
    assert kinds(region.nest) == {"softmax_stats", "sum"}


def test_a_cpu_has_the_row_in_its_cache() -> None:
    x, w = torch.randn(6, 40), torch.rand(40)
    scheduled = schedule(lower(smoothed, (x, w), decompose=SOFTMAX))
    assert kinds(next(s for s in scheduled.steps if isinstance(s, Region)).nest) == {"softmax_stats", "sum"}
