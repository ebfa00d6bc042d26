"""Judging results against float64, next to eager's own error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree


def to_float64(value: Any) -> Any:
    """`value` (a pytree of tensors, or a module: then a copy) in float64, complex tensors in complex128."""
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).double()

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_complex():
            return leaf.to(torch.complex128)
        wide = leaf.detach().to(torch.float64) if leaf.is_floating_point() else leaf.detach().clone()
        return wide.requires_grad_(leaf.requires_grad)

    return pytree.tree_map(convert, value)


def exact_products() -> None:
    """Have CUDA's libraries compute float32 in float32: with TF32, eager's own errors would hide anybody's."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._C._set_cudnn_allow_tf32(False)  # torch.backends.cudnn is frozen once torch's own test modules are imported


def max_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference from `exact` (float64), NaN and infinities of equal sign counting as equal.

    A NaN or infinity on one side only is an infinite error.
    """
    actual, exact = actual.detach().to(exact.dtype).cpu(), exact.detach().cpu()
    difference = (actual - exact).abs()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference = torch.where(same, torch.zeros_like(difference), difference)
    return float(torch.nan_to_num(difference, nan=float("inf")).max()) if difference.numel() else 0.0


def _scale(exact: torch.Tensor) -> float:
    finite = exact[exact.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def assert_closer(actual: Any, eager: Any, exact: Any, *, factor: float = 1.5, k: float = 4.0) -> None:
    """Assert err(actual) <= factor * err(eager) + k * eps * scale for every tensor of the three equally shaped pytrees.

    Errors are against `exact` (float64), eps is that of the result's dtype, scale the largest finite magnitude of the exact
    tensor. Shapes, dtypes and devices must be eager's; integers and booleans must be equal to it.
    """
    actual_leaves, actual_spec = pytree.tree_flatten(actual)
    eager_leaves, eager_spec = pytree.tree_flatten(eager)
    exact_leaves, _ = pytree.tree_flatten(exact)
    assert actual_spec == eager_spec, f"result structure {actual_spec} is not eager's {eager_spec}"
    for number, (a, e, x) in enumerate(zip(actual_leaves, eager_leaves, exact_leaves, strict=True)):
        if isinstance(e, torch.Tensor):
            _assert_tensor_closer(f"output {number}", a, e, x, factor, k)
        else:
            assert a == e, f"output {number}: {a!r} is not eager's {e!r}"


def _assert_tensor_closer(
    name: str, actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, factor: float, k: float
) -> None:
    got, want = ((t.shape, t.dtype, t.device) for t in (actual, eager))
    assert got == want, f"{name}: {got} is not eager's {want}"
    if not (actual.is_floating_point() or actual.is_complex()):
        assert torch.equal(actual, eager), f"{name}: integer values differ from eager's"
        return
    error, eager_error = max_error(actual, exact), max_error(eager, exact)
    allowed = factor * eager_error + k * torch.finfo(actual.dtype).eps * _scale(exact)
    assert error <= allowed, f"{name}: error {error:.3e} against float64; eager's {eager_error:.3e}, allowed {allowed:.3e}"


def check_compiled(
    fn: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, dynamic: bool | None = None, k: float = 4.0
) -> Any:
    """Compile `fn` (function or module) with fxopt, call it on `args`, judge the result by assert_closer, return it."""
    torch.compiler.reset()
    merged: Any = {"strict": True, **(options or {})}
    actual = torch.compile(fn, backend="fxopt", options=merged, dynamic=dynamic)(*args)
    eager = fn(*args)
    wide_fn = to_float64(fn) if isinstance(fn, torch.nn.Module) else fn
    assert_closer(actual, eager, wide_fn(*to_float64(args)), k=k)
    return actual
