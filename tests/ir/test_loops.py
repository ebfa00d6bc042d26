"""The loop IR: equal expressions are one object, substitution keeps values, hashes do not depend on the process."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

from fxopt.ir.exprs import Int, Sym, add, floordiv, mod, mul, symbol
from fxopt.ir.loops import (
    Const,
    IndexValue,
    Load,
    Masked,
    Nest,
    Op,
    Reduce,
    Scalar,
    Scan,
    Store,
    content_hash,
    indirect_symbol,
    loop_order,
    postorder,
    transform,
)
from tests.lower.interpreter import _NestValues

F64, I64 = torch.float64, torch.int64
X0, X1, R2 = Sym("x0", size=4), Sym("x1", size=6), Sym("r2", size=3)
x0, x1, r2 = symbol(X0), symbol(X1), symbol(R2)


def load(buffer: str, index: Int, dtype: torch.dtype = F64) -> Load:
    return Load(buffer, index, dtype)


def double(x: Scalar) -> Scalar:
    return Op("mul", (x, Const(2.0, F64)), F64)


MEMORY = {
    "a": torch.randn(4 * 6 * 3, dtype=F64),
    "b": torch.randn(4 * 6, dtype=F64),
    "i": torch.tensor([3, -1, 0, 2, 1, -4]),
}


def run(nest: Nest) -> dict[str, torch.Tensor]:
    """What each store writes, by the tests' interpreter, in buffers as large as a."""
    out = {}
    for store, (where, value) in zip(nest.stores, _NestValues(nest, {}, MEMORY.__getitem__).stores(), strict=True):
        memory = torch.zeros(72, dtype=F64)
        memory[where.reshape(-1)] = value.reshape(-1)
        out[store.buffer] = memory
    return out


def gather() -> Scalar:
    """b[i[x1] wrapped to 4, x1]: an element that an index in memory picks."""
    picked = Op("checked_index", (load("i", x1, I64), Const(4, I64)), I64)
    sym, binding = indirect_symbol(picked, 4)
    return Load("b", add(mul(symbol(sym), 6), x1), F64, (binding,))


# ---------------------------------------------------------------------- interning


def test_equal_expressions_are_one_object() -> None:
    assert double(load("a", x0 * 3 + 1)) is double(load("a", 1 + 3 * x0))
    assert gather() is gather()
    assert Reduce("sum", (load("a", r2),), (R2,), F64) is Reduce("sum", (load("a", r2),), (R2,), F64)
    assert Scan("cumsum", load("a", r2), R2, F64) is Scan("cumsum", load("a", r2), R2, F64)


def test_what_differs_stays_apart() -> None:
    assert load("a", x0) is not load("a", x0, torch.float32)
    assert Const(0.0, F64) is not Const(-0.0, F64)
    assert Const(1, I64) is not Const(1.0, F64)
    assert Reduce("welford", (load("a", r2),), (R2,), F64, 0) is not Reduce("welford", (load("a", r2),), (R2,), F64, 1)


def test_nan_is_equal_to_itself() -> None:
    assert Const(float("nan"), F64) is Const(float("nan"), F64)


def test_interned_expressions_are_freed() -> None:
    from fxopt.ir.loops import _interned

    keep = load("freed", x0)
    before = len(_interned)
    double(double(keep))
    gc.collect()
    assert len(_interned) == before


def test_known_operands_fold() -> None:
    assert IndexValue(3) is Const(3, I64)
    a, b = load("a", x0), load("b", x0)
    assert Masked(Const(True, torch.bool), a, b) is a
    assert Masked(Const(False, torch.bool), a, b) is b


def test_names_outside_the_ir_are_refused() -> None:
    with pytest.raises(ValueError, match="scalar op"):
        Op("sine", (load("a", x0),), F64)
    with pytest.raises(ValueError, match="reduction"):
        Reduce("mean", (load("a", r2),), (R2,), F64)
    with pytest.raises(ValueError, match="scan"):
        Scan("cumxor", load("a", r2), R2, F64)


# ---------------------------------------------------------------------- symbols and order


def test_free_symbols_leave_out_what_is_bound() -> None:
    total = Reduce("sum", (load("a", x0 * 3 + r2),), (R2,), F64)
    assert total.symbols() == {X0}
    assert Scan("cumsum", load("a", x0 * 3 + r2), R2, F64).symbols() == {X0, R2}
    assert gather().symbols() == {X1}


def test_operands_come_before_users_and_once() -> None:
    shared = double(load("a", x0))
    root = Op("add", (shared, double(shared)), F64)
    nodes = list(postorder((root, shared)))
    assert len(nodes) == len(set(nodes))
    assert all(nodes.index(a) < nodes.index(n) for n in nodes for a in n.args)


def test_deep_expressions_need_no_recursion() -> None:
    value: Scalar = load("a", x0)
    for _ in range(5000):
        value = Op("neg", (value,), F64)
    assert transform(value, {X0: symbol(X1)}).symbols() == {X1}
    assert len(content_hash(value)) == 12


def test_loops_are_ordered_by_dimension() -> None:
    assert loop_order([Sym("x10", size=2), Sym("r2", size=2), Sym("x1", size=2)])[0].name == "x1"


# ---------------------------------------------------------------------- transformation


def values_agree(value: Scalar, points: tuple[Sym, ...], where: Int, mapping: dict[Sym, Int], onto: tuple[Sym, ...]) -> None:
    """A store under `mapping` over the loops `onto` writes what it wrote over `points`."""
    reduced = tuple(dict.fromkeys(s for n in postorder((value,)) if isinstance(n, Reduce) for s in n.axes))
    plain = Nest(points, reduced, (Store("out", where, value),))
    place = transform(load("out", where), mapping)
    assert isinstance(place, Load)
    moved = transform(value, mapping)
    axes = tuple(dict.fromkeys(s for n in postorder((moved,)) if isinstance(n, Reduce) for s in n.axes))
    torch.testing.assert_close(run(plain), run(Nest(onto, axes, (Store("out", place.index, moved),))), rtol=0, atol=1e-12)


SPLIT = (Sym("x1", size=2), Sym("x2", size=3))
MERGED = Sym("x0", size=24)


@pytest.mark.parametrize(
    ("mapping", "onto"),
    [
        ({X0: symbol(Sym("x1", size=4)), X1: symbol(Sym("x0", size=6))}, (Sym("x0", size=6), Sym("x1", size=4))),
        ({X1: add(mul(symbol(SPLIT[0]), 3), symbol(SPLIT[1]))}, (X0, *SPLIT)),
        ({X0: floordiv(symbol(MERGED), 6), X1: mod(symbol(MERGED), 6)}, (MERGED,)),
    ],
    ids=["renamed", "split", "merged"],
)
@pytest.mark.parametrize(
    "value",
    [
        double(load("b", x0 * 6 + x1)),
        gather(),
        Reduce("sum", (double(load("a", x0 * 18 + x1 * 3 + r2)),), (R2,), F64),
        Masked(Op("lt", (IndexValue(x1), Const(4, I64)), torch.bool), load("b", x0 * 6 + x1), Const(7.0, F64)),
    ],
    ids=["pointwise", "gather", "reduction", "masked"],
)
def test_loops_may_be_renamed_split_and_merged(value: Scalar, mapping: dict[Sym, Int], onto: tuple[Sym, ...]) -> None:
    values_agree(value, (X0, X1), x0 * 6 + x1, mapping, onto)


def test_a_reduction_s_axis_is_renamed_and_split() -> None:
    wide = Sym("r1", size=6)
    total = Reduce("sum", (load("b", x0 * 6 + symbol(wide)),), (wide,), F64)
    outer, inner = Sym("r1", size=2), Sym("r2", size=3)
    mapping = {wide: add(mul(symbol(outer), 3), symbol(inner))}
    split = transform(total, mapping)
    assert isinstance(split, Reduce)
    assert split.axes == (outer, inner)
    values_agree(total, (X0,), x0, mapping, (X0,))


def test_a_load_is_replaced_where_it_stands() -> None:
    chain = double(double(load("a", x0)))
    passed = transform(chain, {X0: x1}, lambda n: Const(5.0, F64) if n.buffer == "a" and n.index == x1 else None)
    assert passed is double(double(Const(5.0, F64)))


def test_what_a_mapping_does_not_touch_stays_the_same_object() -> None:
    assert transform(gather(), {X0: x1}) is gather()
    assert transform(double(load("a", x0)), {}) is double(load("a", x0))


# ---------------------------------------------------------------------- hashes

HASHES = """
import torch
from tests.ir.test_loops import *
print(content_hash(gather()), content_hash(Reduce("sum", (gather(),), (X1,), F64)))
"""


def test_hashes_are_equal_in_every_process() -> None:
    own = f"{content_hash(gather())} {content_hash(Reduce('sum', (gather(),), (X1,), F64))}"
    out = subprocess.run([sys.executable, "-c", HASHES], capture_output=True, text=True, check=True)
    assert out.stdout.split() == own.split()


def test_hashes_tell_expressions_apart() -> None:
    a = load("a", x0 * 3 + r2)
    different = [
        a,
        load("a", x0 * 3 + r2, torch.float32),
        load("b", x0 * 3 + r2),
        load("a", x0 * 3),
        double(a),
        Op("neg", (a,), F64),
        Reduce("sum", (a,), (R2,), F64),
        Reduce("max", (a,), (R2,), F64),
        Scan("cumsum", a, R2, F64),
        Const(2.0, F64),
        Const(2, I64),
        IndexValue(x0),
        gather(),
    ]
    assert len({content_hash(n) for n in different}) == len(different)


# ---------------------------------------------------------------------- nests


def test_a_nest_knows_what_it_touches() -> None:
    stores = (Store("out", x0, load("a", x0)), Store("out2", x0, Op("add", (load("b", x0), load("a", x0)), F64)))
    nest = Nest((X0,), (), stores)
    assert nest.reads() == ("a", "b")
    assert nest.writes() == ("out", "out2")
    assert [n.buffer for n in nest.loads()] == ["a", "b"]


def test_a_store_s_symbols_include_its_indirect_address() -> None:
    sym, binding = indirect_symbol(load("i", x1, I64), 4)
    store = Store("out", symbol(sym), load("a", x0), "add", (binding,))
    assert store.symbols() == {X0, X1}
    assert store.roots == (load("i", x1, I64), load("a", x0))


def test_a_transformed_store_carries_its_address() -> None:
    """Index, what the index is loaded from and the value change together; a binding that is no longer used goes."""
    sym, binding = indirect_symbol(load("i", x1, I64), 6)
    store = Store("o", symbol(sym) * 4 + x0, load("b", x1), "add", (binding,))
    shifted = store.transformed({X0: x0 + 1, X1: r2})
    new, other = indirect_symbol(load("i", r2, I64), 6)
    assert shifted == Store("o", symbol(new) * 4 + x0 + 1, load("b", r2), "add", (other,))
    replaced = store.transformed({}, lambda v: double(v) if v.dtype == F64 else v)
    assert replaced == Store("o", store.index, double(load("b", x1)), "add", (binding,))
    assert store.transformed({sym: 0}).indirect == ()
