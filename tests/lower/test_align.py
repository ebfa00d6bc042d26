"""One iteration domain for two nests: every mapping that is offered is a bijection, checked point by point."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxopt.ir.exprs import Int, Sym, add, contiguous_strides, evaluate, floordiv, mod, mul, prod, ravel, symbol
from fxopt.ir.loops import Load, Nest, Reduce, Store
from fxopt.lower.align import Mapping, division_count, mappings

F32 = torch.float32
SHAPES = [(4, 6), (24,), (2, 12), (6, 4), (2, 3, 4), (3, 8), (5,), (4, 4), (2, 2, 6)]


NONE: frozenset[int] = frozenset()


def nest(shape: tuple[int, ...], reduced: frozenset[int] = NONE, order: tuple[int, ...] = (), writes: str = "out") -> Nest:
    """A read of `a` over loops of `shape`, those in `reduced` summed; memory lies in the `order` of the loops."""
    syms = [Sym(f"{'r' if k in reduced else 'x'}{k}", size=n) for k, n in enumerate(shape)]
    order = order or tuple(range(len(shape)))
    strides = dict(zip(order, contiguous_strides(tuple(shape[k] for k in order)), strict=True))
    where: Int = 0
    for k, sym in enumerate(syms):
        where = add(where, mul(symbol(sym), strides[k]))
    points = tuple(s for k, s in enumerate(syms) if k not in reduced)
    axes = tuple(s for k, s in enumerate(syms) if k in reduced)
    value = Load("a", where, F32)
    out = ravel(tuple(map(symbol, points)), tuple(s.size for s in points if s.size is not None))
    return Nest(points, axes, (Store(writes, out, Reduce("sum", (value,), axes, F32) if axes else value),))


def domain(loops: tuple[Sym, ...]) -> list[dict[str, int]]:
    ranges = [range(evaluate(s.size, {}) if s.size is not None else 0) for s in loops]
    return [dict(zip((s.name for s in loops), values, strict=True)) for values in itertools.product(*ranges)]


def assert_bijection(source: tuple[Sym, ...], target: tuple[Sym, ...], mapping: Mapping) -> None:
    images = {tuple(evaluate(mapping[s], env) for s in source) for env in domain(target)}
    assert images == {tuple(env.values()) for env in domain(source)}
    assert len(images) == len(domain(target)), "two iterations of the target are one of the source"


def check(source: Nest, target: Nest) -> int:
    """Assert that each mapping is a bijection, of points and reduced loops apart where the source has both; their count."""
    offered = list(mappings(source, target))
    for mapping in offered:
        assert mapping.keys() == {*source.points, *source.reduced}
        if source.reduced:
            assert_bijection(source.points, target.points, mapping)
            assert_bijection(source.reduced, target.reduced, mapping)
        else:
            every = (*target.points, *target.reduced)
            points_only = prod(s.size for s in source.points if s.size is not None) != len(domain(every))
            assert_bijection(source.points, target.points if points_only else every, mapping)
    return len(offered)


def subsets(rank: int) -> list[frozenset[int]]:
    return [frozenset(c) for n in range(rank + 1) for c in itertools.combinations(range(rank), n)]


def test_every_mapping_is_a_bijection() -> None:
    offered = 0
    nests = [nest(shape, reduced) for shape in SHAPES for reduced in subsets(len(shape))]
    nests += [nest(shape, r, (1, 0)) for shape in ((4, 6), (4, 4)) for r in subsets(2)]
    for source, target in itertools.product(nests, nests):
        offered += check(source, target)
    assert offered > 300, "many pairs fit"


@pytest.mark.parametrize(("source", "target"), [((4, 6), (24,)), ((24,), (4, 6)), ((2, 3, 4), (6, 4)), ((4, 6), (3, 8))])
def test_pointwise_nests_of_equal_size_fit(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    assert check(nest(source), nest(target)) >= 1


def test_a_transposed_access_is_followed_first() -> None:
    """Same sizes, memory the other way round: the loops are exchanged, so that both walk `a` alike."""
    source, target = nest((4, 4)), nest((4, 4), order=(1, 0), writes="other")
    first = next(iter(mappings(source, target)))
    assert [first[s] for s in source.points] == [symbol(target.points[1]), symbol(target.points[0])]


def test_a_pointwise_nest_fits_the_rows_of_a_reduction() -> None:
    assert check(nest((4,)), nest((4, 6), frozenset({1}))) == 1
    assert check(nest((4, 6)), nest((4, 6), frozenset({1}))) >= 1


def test_reductions_need_as_many_rows_and_as_long_ones() -> None:
    rows = frozenset({1})
    assert check(nest((4, 6), rows), nest((6, 4), rows)) == 0
    assert check(nest((4, 6), rows), nest((2, 6), rows)) == 0
    assert check(nest((4, 6), rows), nest((4, 6))) == 0
    assert check(nest((2, 2, 6), frozenset({2})), nest((4, 6), rows)) >= 1


def test_symbolic_sizes_fit_when_their_products_are_equal() -> None:
    n = Sym("n", lo=2)
    x0, x1, whole = Sym("x0", size=symbol(n)), Sym("x1", size=4), Sym("x0", size=mul(symbol(n), 4))
    flat = Nest((whole,), (), (Store("out", symbol(whole), Load("a", symbol(whole), F32)),))
    where = add(mul(symbol(x0), 4), symbol(x1))
    square = Nest((x0, x1), (), (Store("out", where, Load("a", where, F32)),))
    assert next(iter(mappings(flat, square))) == {whole: where}
    assert next(iter(mappings(square, flat))) == {x0: floordiv(symbol(whole), 4), x1: mod(symbol(whole), 4)}


def test_divisions_count_accesses_that_need_one() -> None:
    x = Sym("x0", size=24)
    plain, divided = symbol(x), floordiv(symbol(x), 6)
    one = Nest((x,), (), (Store("out", plain, Load("a", divided, F32)),))
    assert division_count(one) == 1
    assert division_count(Nest((x,), (), (Store("out", plain, Load("a", plain, F32)),))) == 0
