"""The one estimate: what is stored rather than computed again, how many bytes a buffer means."""

from __future__ import annotations

import pytest
import torch

from fxopt.ir.exprs import ASSUMED_SIZE, Sym, mul, symbol
from fxopt.ir.loops import Const, Load, Op, Scalar
from fxopt.ir.region import BufferSpec
from fxopt.lower import cost
from fxopt.lower.values import Computed, dim_indices

F32, CPU = torch.float32, torch.device("cpu")
SHAPE = (64, 32)
I, J = dim_indices(SHAPE)  # noqa: E741
X = Load("x", I * 32 + J, F32)
Y = Load("y", I * 32 + J, F32)
ROW = Load("bias", J, F32)


NARROW = Op("cast", (Load("n", I * 32 + J, torch.bfloat16),), F32)
MASK = Load("m", I * 32 + J, torch.bool)


def value(body: Scalar) -> Computed:
    return Computed(body, F32, CPU, SHAPE)


def op(name: str, *args: Scalar) -> Scalar:
    return Op(name, args, F32)


@pytest.mark.parametrize(
    ("body", "readers", "stored"),
    [
        (op("add", X, Y), 1, False),  # one reader: nothing to share
        (op("mul", X, Const(2.0, F32)), 2, False),  # reading x twice costs less than a write and two reads
        (op("add", X, Y), 2, True),  # a tie, and joining may drop the write
        (op("exp", X), 2, True),  # expensive to repeat
        (op("exp", op("exp", X)), 1, False),
        (op("exp", Const(2.0, F32)), 3, False),  # no memory behind it
        (op("add", ROW, Const(1.0, F32)), 4, False),  # a vector is cheap to read again
        (op("where", MASK, NARROW, Const(0.0, F32)), 3, False),  # nine bytes read again; stored, 15 moved
        (op("add", op("add", NARROW, NARROW), X), 3, True),  # as much read as three passes over the value
    ],
)
def test_what_is_stored(body: Scalar, readers: int, stored: bool) -> None:
    assert cost.should_store(value(body), readers) is stored


def test_an_expression_that_grew_too_large_is_stored() -> None:
    body: Scalar = X
    for k in range(cost.MAX_NODES):
        body = op("add", body, Const(float(k), F32))
    assert cost.should_store(value(body), 1)


def test_an_expression_of_too_many_loads_is_stored() -> None:
    body: Scalar = X
    for k in range(cost.MAX_LOADS):
        body = op("add", body, Load(f"b{k}", I * 32 + J, F32))
    assert cost.should_store(value(body), 1)


def spec(shape: tuple[object, ...], strides: tuple[object, ...], dtype: torch.dtype = F32) -> BufferSpec:
    return BufferSpec("b", dtype, CPU, shape, strides)  # type: ignore[arg-type]


def test_bytes_count_distinct_elements() -> None:
    assert cost.nbytes(spec((8, 4), (4, 1))) == 128
    assert cost.nbytes(spec((8, 4), (4, 1), torch.float16)) == 64
    assert cost.nbytes(spec((8, 4), (0, 1))) == 16, "an expanded dimension is one row in memory"
    assert cost.nbytes(spec((), ())) == 4


def test_unknown_sizes_are_assumed_and_their_least_values_kept() -> None:
    n, many = symbol(Sym("n", lo=2)), symbol(Sym("m", lo=5000))
    assert cost.extent([n, 4]) == 4 * ASSUMED_SIZE
    assert cost.extent([many]) == 5000
    assert cost.extent([mul(n, n), None]) == ASSUMED_SIZE
    assert cost.extent([symbol(Sym("few", lo=2, hi=9)), 4]) == 36, "no more than it can be"


def test_few_long_rows_are_split() -> None:
    assert cost.needs_split(1, 1 << 20, CPU)
    assert not cost.needs_split(1, 100, CPU)
    assert not cost.needs_split(1 << 16, 1 << 20, CPU)
    assert cost.needs_split(100, 1 << 20, torch.device("cuda"))
    assert not cost.needs_split(100, 1 << 20, CPU)
