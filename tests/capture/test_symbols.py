"""torch's symbolic sizes become integer expressions with the same value at any size."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxopt.capture.symbols import to_int
from fxopt.errors import UnsupportedError
from fxopt.ir import exprs


def symbolic_sizes(*shape: int) -> tuple[torch.SymInt, ...]:
    env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(shape))
    fake = mode.from_tensor(torch.empty(shape), source=ConstantSource("x"), symbolic_context=context)
    return tuple(fake.shape)


FORMS = {
    "sum": lambda a, b: a + 2 * b - 3,
    "product": lambda a, b: a * b * a,
    "power": lambda a, b: a**3 + b,
    "floordiv": lambda a, b: (a + b) // 4,
    "symbolic divisor": lambda a, b: (3 * a) // b,
    "modulo": lambda a, b: (a * b) % 7,
    "ceil": lambda a, b: -(-a // 8) * b,
    "max": lambda a, b: torch.sym_max(a, b + 1),
    "min": lambda a, b: torch.sym_min(a, b * 2),
    "truncated true division": lambda a, b: int(a / 3) + b if isinstance(a, int) else torch.sym_int(a / 3) + b,
    "nested": lambda a, b: ((a + 7) // 8 + b) % (b + 1),
    "conv": lambda a, b: (a + 2 * 1 - 3) // 2 + 1 + b,
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_keep_their_value(name):
    a, b = symbolic_sizes(12, 30)
    converted = to_int(FORMS[name](a, b))
    assert isinstance(converted, exprs.Expr)
    names = [exprs.as_symbol(to_int(s)).name for s in (a, b)]
    for sizes in ((12, 30), (5, 9), (101, 17), (2, 1000)):
        assert exprs.evaluate(converted, dict(zip(names, sizes, strict=True))) == FORMS[name](*sizes)


def test_range_comes_from_the_shape_env():
    (size,) = symbolic_sizes(16)
    torch._check(size <= 64)
    symbol = exprs.as_symbol(to_int(size))
    assert (symbol.lo, symbol.hi) == (2, 64)
    assert exprs.ask("<", to_int(size), 65) is True


def test_one_symbol_per_name_even_when_the_range_narrows_later():
    (size,) = symbolic_sizes(16)
    first = to_int(size)
    torch._check(size <= 32)
    assert to_int(size) == first


def test_plain_integers_pass_through():
    assert to_int(7) == 7 and to_int(True) == 1


def test_data_dependent_sizes_are_refused():
    size = ShapeEnv().create_unbacked_symint()
    with pytest.raises(UnsupportedError, match="depends on data"):
        to_int(size)


def test_other_values_are_refused():
    (size,) = symbolic_sizes(6)
    for value in (1.5, "s0", size * 1.0, size == 3):
        with pytest.raises(UnsupportedError):
            to_int(value)
    with pytest.raises(UnsupportedError, match="rounds"):
        to_int(torch.sym_int(size * 0.7))
