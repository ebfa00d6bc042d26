"""Attention of operands in 8 bits: what a kernel of ours is told of it, and which stay the library's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.ir.quantized_attention import scaled_attention
from fxopt.ir.region import Attention
from tests.lower.test_attention_kernels import kernel_of, kernels, rand, repeat_kv, searched

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
SCALED = torch.ops.fxopt.scaled_attention


def stored(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    x = torch.randn(shape) * 40
    return x.round().clamp(-127, 127).to(dtype)


def only(fn: Callable[..., Any], *args: Tensor) -> Attention:
    (own,) = kernels(searched(fn, *args))
    return own


def of(q: Tensor, k: Tensor, v: Tensor, *scales: Tensor | None, mask: Tensor | None = None) -> Tensor:
    return SCALED(q, k, v, *scales, mask, False, None, True, BF16)


ONE, HEADS, ROWS = torch.tensor(0.1), torch.rand(1, 2, 1, 1), torch.rand(2, 2, 40, 1)


@pytest.mark.parametrize(
    ("scale", "strides"), [(ONE, (0, 0, 0)), (HEADS, (0, 1, 0)), (HEADS[0], (0, 1, 0)), (ROWS, (80, 40, 1))], ids=str
)
def test_factors_are_broadcast(scale: Tensor, strides: tuple[int, ...]) -> None:
    args = rand(2, 8, 1, 64), stored(2, 2, 40, 64), stored(2, 2, 40, 64)
    own = only(lambda q, k, v, s: of(q, k, v, None, s, None), *args, scale)
    assert own.factors is not None and own.factors.query is None and own.factors.value is None
    assert own.factors.key is not None and own.factors.key.strides == strides and own.dtype == BF16
    assert set(own.reads()) == set(own.buffers) - {own.out.buffer}


def test_repeated_heads_are_read_once() -> None:
    args = rand(2, 8, 1, 64), stored(2, 2, 40, 64), stored(2, 2, 40, 64), ONE
    own = kernel_of(searched(lambda q, k, v, s: of(q, repeat_kv(k), repeat_kv(v), None, s, s), *args))
    assert own.key.shape == (2, 2, 40, 64) and own.factors is not None


def test_those_with_factors_of_their_own_are_read_as_they_are_numbered() -> None:
    args = rand(2, 8, 1, 64), stored(2, 2, 40, 64), stored(2, 2, 40, 64), torch.rand(1, 8, 1, 1)
    own = only(lambda q, k, v, s: of(q, repeat_kv(k), repeat_kv(v), None, s, s), *args)
    assert own.key.shape == (2, 8, 40, 64)


@pytest.mark.parametrize(
    ("args", "rows_of_values"),
    [
        ((stored(1, 2, 5, 64, dtype=FP8),) * 3, True),
        ((rand(1, 2, 5, 64), stored(1, 2, 5, 64, dtype=FP8), stored(1, 2, 5, 64)), False),
    ],
)
def test_types_that_kernels_take(args: tuple[Tensor, ...], rows_of_values: bool) -> None:
    own = only(lambda q, k, v, s: of(q, k, v.mT.contiguous().mT if rows_of_values else v, None, s, s), *args, ONE)
    assert own.value.strides[2 if rows_of_values else 3] == 1


@pytest.mark.parametrize("width", [16, 36, 264])
def test_widths_that_they_do_not_take(width: int) -> None:
    narrow = stored(1, 2, 5, width, dtype=FP8)
    assert not list(kernels(searched(lambda q, s: of(q, q, q, s, s, s), narrow, ONE)))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((stored(1, 2, 5, 32), stored(1, 2, 5, 32), stored(1, 2, 5, 32), None, None, None), "no attention of torch.int8"),
        ((rand(1, 2, 5, 32), rand(1, 2, 5, 32), stored(1, 2, 5, 32), None, None, None), "no attention of torch.bfloat16"),
        ((rand(1, 2, 5, 32), *(stored(1, 2, 5, 32),) * 2, torch.ones(2), None, None), "query's scale"),
        ((rand(1, 2, 5, 32), *(stored(1, 2, 5, 32),) * 2, None, torch.ones(1, 2, 5, 32), None), "key's scale"),
        ((rand(1, 2, 5, 32), *(stored(1, 2, 5, 32),) * 2, None, None, torch.ones(3, 1, 1)), "value's scale"),
        ((rand(1, 2, 5, 32)[0], *(stored(1, 2, 5, 32),) * 2, None, None, None), "4 dimensions"),
    ],
)
def test_what_the_op_refuses(args: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scaled_attention(*args, None, False, None, False, BF16)


def test_the_eager_form_is_attention_of_what_is_stored() -> None:
    q, k, v = rand(2, 4, 3, 32), stored(2, 4, 9, 32), stored(2, 4, 9, 32, dtype=FP8)
    mask = torch.randn(3, 9).to(BF16)
    got = SCALED(q, k, v, None, ROWS[:, :1, :9], ONE, mask, False, 0.3, False, BF16)
    wide = (k.float() * ROWS[:, :1, :9]).to(BF16), (v.float() * ONE).to(BF16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, *wide, mask, scale=0.3)
    assert torch.equal(got, expected)
