"""Functions as AOTAutograd would hand them over (decomposed, then functional), lowered, run and compared with eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fxopt.lower import Lowered
from tests.lower.capturing import library_calls, lower_function
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64


def lower(fn: Callable[..., Any], args: tuple[Any, ...], *, decompose: Any = None, dynamic: bool = False) -> Lowered:
    """`fn` on tensors `args`, ops in `decompose` taken apart; functional after that, since decompositions mutate."""
    mode = "symbolic" if dynamic else "fake"
    given = lambda *tensors: fn(*tensors)  # noqa: E731  make_fx refuses parameters with defaults
    pieces = make_fx(given, decomposition_table=dict(decompose or {}), tracing_mode=mode)(*args)
    return lower_function(functionalize(pieces), args, dynamic=dynamic)


def outputs(fn: Callable[..., Any], *args: torch.Tensor, dynamic: bool = False) -> list[Any]:
    """Results of fn(*args) through lowering; a library call is an error."""
    low = lower(fn, args, dynamic=dynamic)
    assert not library_calls(low), library_calls(low)
    return run_lowered(low, dict(zip(low.inputs, args, strict=True)))


def check(fn: Callable[..., Any], *args: torch.Tensor, dynamic: bool = False) -> None:
    """Assert that fn through lowering is as close to float64 as eager is, with eager's dtypes, shapes and strides.

    Integers, booleans, NaN and infinities must be eager's own.
    """
    got, want = outputs(fn, *args, dynamic=dynamic), pytree.tree_leaves(fn(*args))
    assert_closer(got, want, pytree.tree_leaves(fn(*to_float64(args))))
    for g, w in zip(got, want, strict=True):
        assert g.stride() == w.stride() or g.numel() <= 1, f"strides {g.stride()}, eager's {w.stride()}"
