"""Integer expressions against plain evaluation: whatever is simplified, bounded or decided holds for every value."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.ir.exprs import (
    Expr,
    Int,
    Sym,
    add,
    as_symbol,
    ask,
    bounds,
    coefficient,
    contiguous_strides,
    evaluate,
    floordiv,
    free_symbols,
    in_range,
    index,
    maximum,
    minimum,
    mod,
    mul,
    never_equal,
    prod,
    ravel,
    substitute,
    symbol,
    unravel,
)
from fxopt.ir.exprs_json import from_json, to_json

N = Sym("n", lo=2, hi=4)
M = Sym("m", lo=1)
ROW, J = Sym("i", size=6), Sym("j", size=4)
K = Sym("k", size=symbol(N))
L = Sym("l", size=mul(symbol(N), 3))
SIGNED = Sym("t", lo=-3, hi=2)
SYMBOLS = (N, M, ROW, J, K, L, SIGNED)
PLAIN = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "min": min,
    "max": max,
}
SYMBOLIC = {
    "+": add,
    "-": lambda a, b: add(a, mul(b, -1)),
    "*": mul,
    "//": floordiv,
    "%": mod,
    "min": minimum,
    "max": maximum,
}


def environments() -> Iterator[dict[str, int]]:
    """Values of all symbols: every size, the extremes and some middle of every index."""
    for n, m, i, j, t in itertools.product((2, 3, 4), (1, 5), (0, 1, 5), (0, 3), (-3, -1, 2)):
        for k, last in itertools.product(sorted({0, n - 1}), sorted({0, n, 3 * n - 1})):
            yield {"n": n, "m": m, "i": i, "j": j, "k": k, "l": last, "t": t}


ENVIRONMENTS = list(environments())


@dataclass(frozen=True)
class Tree:
    """An expression as it was written."""

    op: str
    a: Tree | Sym | int
    b: Tree | Sym | int

    def plain(self, env: dict[str, int]) -> int:
        return PLAIN[self.op](plain(self.a, env), plain(self.b, env))

    def symbolic(self) -> Int:
        return SYMBOLIC[self.op](symbolic(self.a), symbolic(self.b))


def plain(x: Tree | Sym | int, env: dict[str, int]) -> int:
    return x if isinstance(x, int) else env[x.name] if isinstance(x, Sym) else x.plain(env)


def symbolic(x: Tree | Sym | int) -> Int:
    return x if isinstance(x, int) else symbol(x) if isinstance(x, Sym) else x.symbolic()


LEAVES = st.one_of(st.integers(-4, 12), st.sampled_from(SYMBOLS))
DIVISORS = st.one_of(
    st.integers(1, 12), st.sampled_from((N, M)), st.builds(Tree, st.just("*"), st.sampled_from((N, M)), st.integers(1, 4))
)


def grown(parts: st.SearchStrategy) -> st.SearchStrategy:  # type: ignore[type-arg]
    free = st.builds(Tree, st.sampled_from(["+", "-", "*", "min", "max"]), parts, parts)
    return st.one_of(free, st.builds(Tree, st.sampled_from(["//", "%"]), parts, DIVISORS))


TREES = st.recursive(LEAVES, grown, max_leaves=7)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(TREES)
def test_simplified_expressions_have_the_plain_value(tree: Tree | Sym | int) -> None:
    x = symbolic(tree)
    low, high = bounds(x)
    for env in ENVIRONMENTS:
        value = plain(tree, env)
        assert evaluate(x, env) == value
        assert low is None or low <= value
        assert high is None or value <= high


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TREES, TREES)
def test_what_is_decided_holds_everywhere(a: Tree | Sym | int, b: Tree | Sym | int) -> None:
    x, y = symbolic(a), symbolic(b)
    values = [(plain(a, env), plain(b, env)) for env in ENVIRONMENTS]
    if in_range(x, y):
        assert all(0 <= v < w for v, w in values)
    for relation, holds in (("==", int.__eq__), ("<", int.__lt__), ("<=", int.__le__)):
        known = ask(relation, x, y)
        assert known is None or all(holds(v, w) is known for v, w in values)
    assert x != y or all(v == w for v, w in values)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TREES, TREES)
def test_what_is_never_equal_has_no_common_value(a: Tree | Sym | int, b: Tree | Sym | int) -> None:
    if never_equal(symbolic(a), symbolic(b)):
        assert {plain(a, env) for env in ENVIRONMENTS}.isdisjoint(plain(b, env) for env in ENVIRONMENTS)


def test_parts_of_one_row_are_never_equal() -> None:
    row, pair, width = Sym("p0", size=symbol(Sym("n"))), Sym("p1", size=5), Sym("q", size=4)
    assert never_equal(2 * symbol(row), 2 * symbol(row) + 1)
    assert never_equal(8 * symbol(row) + symbol(width), 8 * symbol(row) + symbol(width) + 4)
    assert not never_equal(8 * symbol(row) + symbol(width), 8 * symbol(row) + symbol(width) + 3)
    assert never_equal(symbol(pair), symbol(pair) + 5)
    assert not never_equal(symbol(pair), symbol(pair) + 4)
    assert not never_equal(3 * symbol(row), 3 * symbol(row))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TREES, TREES)
def test_substitution_is_evaluation_in_two_steps(tree: Tree | Sym | int, image: Tree | Sym | int) -> None:
    x = substitute(symbolic(tree), {SIGNED: symbolic(image)})
    for env in ENVIRONMENTS[::7]:
        inner = plain(image, env)
        low, high = -3, 2
        if low <= inner <= high:  # a symbol stands only for values of its range
            assert evaluate(x, env) == plain(tree, {**env, "t": inner})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TREES)
def test_json_round_trip(tree: Tree | Sym | int) -> None:
    x = symbolic(tree)
    back = from_json(json.loads(json.dumps(to_json(x))))
    assert back == x
    assert hash(back) == hash(x)
    assert free_symbols(back) == free_symbols(x)


@pytest.mark.parametrize("bad", [None, True, 1.5, "n", [], ["-"], ["+", ["a"]], ["+", [1, ["xor", 1, 2]]]])
def test_what_is_no_expression_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="integer"):
        from_json(bad)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TREES)
def test_coefficient_is_the_stride(tree: Tree | Sym | int) -> None:
    """c of x = c*i + rest: moving i by one moves x by c, whatever the rest."""
    step = coefficient(symbolic(tree), ROW)
    if step is None:
        return
    assert ROW not in free_symbols(step)
    for env in ENVIRONMENTS[::5]:
        moved = plain(tree, {**env, "i": 3}) - plain(tree, {**env, "i": 2})
        assert moved == evaluate(step, env)


SHAPES = [(6,), (2, 3), (4, 1, 5), (3, symbol(N)), (symbol(N), 4, symbol(M)), (2, 2, 2, 2), (1, 1), ()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unravel_undoes_ravel(shape: tuple[Int, ...]) -> None:
    indices = tuple(index(f"x{k}", size) for k, size in enumerate(shape))
    assert unravel(ravel(indices, shape), shape) == indices


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ravel_undoes_unravel(shape: tuple[Int, ...]) -> None:
    linear = index("x0", prod(shape))
    assert ravel(unravel(linear, shape), shape) == linear


@pytest.mark.parametrize(
    ("source", "target"), [((4, 6), (24,)), ((24,), (4, 6)), ((2, 3, 4), (6, 4)), ((6, 4), (2, 3, 4)), ((8, 9), (12, 6))]
)
def test_reshapes_reach_every_element_once(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    indices = tuple(index(f"x{k}", size) for k, size in enumerate(source))
    moved = unravel(ravel(indices, source), target)
    assert ravel(moved, target) == ravel(indices, source)
    assert all(in_range(i, size) for i, size in zip(moved, target, strict=True))


def test_known_simplifications() -> None:
    i, j, n = index("i", 16), index("j", 8), symbol(N)
    assert floordiv(add(mul(i, 8), j), 8) == i
    assert mod(add(mul(i, 8), j), 8) == j
    assert add(mul(floordiv(i, 4), 4), mod(i, 4)) == i
    assert floordiv(floordiv(i, 2), 4) == floordiv(i, 8)
    assert mod(mod(i, 8), 4) == mod(i, 4)
    k = index("k", n)
    assert floordiv(add(mul(j, n), k), n) == j
    assert mod(add(mul(j, n), k), n) == k
    assert minimum(n, 1) == 1
    assert maximum(add(n, -1), 1) == add(n, -1)


def test_equal_polynomials_are_equal_objects_of_one_hash() -> None:
    n, m = symbol(N), symbol(M)
    left, right = mul(add(n, m), add(n, mul(m, -1))), add(mul(n, n), mul(mul(m, m), -1))
    assert left == right
    assert hash(left) == hash(right)


def test_a_symbolic_integer_has_no_truth_value() -> None:
    with pytest.raises(TypeError, match="no truth value"):
        bool(symbol(N))


def test_symbols_of_one_name_and_different_ranges_differ() -> None:
    assert symbol(Sym("s", lo=0)) != symbol(Sym("s", lo=2))
    assert index("x0", 4) != index("x0", 5)


def test_operators_are_the_functions() -> None:
    n = symbol(N)
    assert (n + 1, 1 + n, n - 1, 1 - n) == (add(n, 1), add(1, n), add(n, -1), add(1, mul(n, -1)))
    assert (n * 3, -n, n // 3, n % 3) == (mul(n, 3), mul(n, -1), floordiv(n, 3), mod(n, 3))
    assert (12 // n, 12 % n) == (floordiv(12, n), mod(12, n))
    assert isinstance(n + 1, Expr)
    assert as_symbol(n) == N
    assert as_symbol(n + 1) is None


def test_strides_are_torch_s() -> None:
    import torch

    for shape in [(2, 3, 4), (5,), (), (2, 0, 3), (1, 4, 1)]:
        assert contiguous_strides(shape) == torch.empty(shape).stride()


def test_evaluation_names_a_missing_symbol() -> None:
    with pytest.raises(KeyError, match="m"):
        evaluate(symbol(M) * 2, {"n": 3})
