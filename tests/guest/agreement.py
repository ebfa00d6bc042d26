"""Running a function eagerly and compiled by fxopt, on equal inputs, and comparing all that a caller could notice."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.journal import RECENT, Journal

Fn = Callable[..., Any]


def compiled(fn: Fn, *, strict: bool = True, dynamic: bool | None = None, **options: Any) -> Any:
    """`fn` compiled by fxopt from a clean slate; a retreat is an error unless `strict` is off."""
    torch.compiler.reset()
    RECENT.clear()
    return torch.compile(fn, backend="fxopt", dynamic=dynamic, options={"strict": strict, **options})


def graphs() -> list[Journal]:
    """Journals of the graphs compiled since `compiled` was last called."""
    return [j for j in RECENT if j.graph.startswith("graph ")]


def retreats() -> list[tuple[str, str]]:
    return [r for j in RECENT for r in j.retreats]


def kernels() -> int:
    return sum(len(j.kernels) for j in RECENT)


def agree(fn: Fn, *args: Any, strict: bool = True, dynamic: bool | None = None, calls: int = 2) -> Any:
    """Assert that compiled `fn` does what eager `fn` does to equal copies of `args`, `calls` times; the last outputs.

    Compared: outputs (values, dtypes, strides, requires_grad), the arguments afterwards, who shares memory with whom, and
    gradients of all floating outputs with respect to the arguments that require them.
    """
    mine, eager = copy.deepcopy(args), copy.deepcopy(args)
    run = compiled(fn, strict=strict, dynamic=dynamic)
    for _ in range(calls):
        got, want = run(*mine), fn(*eager)
        same((got, mine), (want, eager))
        torch.testing.assert_close(gradients(got, mine), gradients(want, eager), equal_nan=True)
    return got


def same(got: Any, want: Any) -> None:
    """Assert that two pytrees agree in structure, values, layouts and sharing of memory."""
    got_leaves, got_spec = pytree.tree_flatten(got)
    want_leaves, want_spec = pytree.tree_flatten(want)
    assert got_spec == want_spec
    for mine, theirs in zip(got_leaves, want_leaves, strict=True):
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(mine, theirs, equal_nan=True, check_stride=theirs.layout == torch.strided)
            assert mine.requires_grad == theirs.requires_grad
        else:
            assert mine == theirs or (mine != mine and theirs != theirs)
    assert sharing(got_leaves) == sharing(want_leaves)


def sharing(leaves: list[Any]) -> list[tuple[int, int, bool]]:
    """(i, j, whether they are one object) for the pairs of tensors that share a storage."""
    plain = [(i, t) for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.layout == torch.strided]
    pairs = itertools.combinations([(i, t) for i, t in plain if t.numel()], 2)
    return [(i, j, a is b) for (i, a), (j, b) in pairs if a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()]


def gradients(outputs: Any, inputs: Any) -> Any:
    """Of the sum of all outputs that can have any, with respect to every leaf that wants one; None when there is none."""
    ends = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    wanted = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.requires_grad and t.is_leaf]
    if not ends or not wanted:
        return None
    weights = [torch.linspace(0.5, 1.5, t.numel()).to(t).view(t.shape) for t in ends]
    return torch.autograd.grad(ends, wanted, weights, allow_unused=True)
