"""Which index expressions are runs of neighbours."""

from __future__ import annotations

import pytest

from fxopt.codegen.triton_index import in_runs
from fxopt.ir.exprs import Int, Sym, evaluate, floordiv, mod, symbol

R = Sym("r", size=65536)
r, x = symbol(R), symbol(Sym("x", size=100))


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (x * 37 + r, True),
        (x * 8192 + mod(r, 8192) + floordiv(r, 8192) * 33554432, True),
        (mod(r + 32, 64), True),
        (mod(r, 6) + floordiv(r, 6) * 8, False),
        (mod(r + 2, 64), False),
        (r * 2, False),
        (x, False),
    ],
)
def test_runs_of_four(index: Int, expected: bool) -> None:
    values = [[_at(index, 4 * group + place) for place in range(4)] for group in range(1000)]
    assert in_runs(index, R, 4) == expected == all(v == [v[0] + k for k in range(4)] for v in values)


def _at(index: Int, number: int) -> int:
    return evaluate(index, {"r": number, "x": 3})
