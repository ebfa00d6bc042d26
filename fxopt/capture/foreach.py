"""`aten::_foreach_*`: one element op per tensor, so that what optimizers compute fuses within each parameter.

torch's optimizers work on lists of tensors (`foreach=True`, the default on CUDA): each list op reads and writes all
parameters once, which is what fusion is there to avoid. Tensors of one size share the kernel that results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_SAME_NAME = (
    *("abs", "acos", "add", "asin", "atan", "ceil", "clamp_max", "clamp_min", "clone", "copy", "cos", "cosh", "div", "erf"),
    *("erfc", "exp", "expm1", "floor", "frac", "lerp", "lgamma", "log", "log10", "log1p", "log2", "max", "mm", "mul", "neg"),
    *("pow", "reciprocal", "round", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt", "sub", "tan", "tanh", "trunc"),
)
"""List ops whose element op has their name and parameters."""


def _addcmul(x: Tensor, a: Tensor, b: Tensor, value: Any = 1) -> Tensor:
    return aten.addcmul(x, a, b, value=value)


def _addcdiv(x: Tensor, a: Tensor, b: Tensor, value: Any = 1) -> Tensor:
    return aten.addcdiv(x, a, b, value=value)


def _maximum(x: Tensor, other: Any) -> Tensor:
    return aten.maximum(x, other) if isinstance(other, Tensor) else aten.clamp_min(x, other)


def _minimum(x: Tensor, other: Any) -> Tensor:
    return aten.minimum(x, other) if isinstance(other, Tensor) else aten.clamp_max(x, other)


def _norm(x: Tensor, ord: Any = 2, dtype: torch.dtype | None = None) -> Tensor:
    return aten.linalg_vector_norm(x, ord, dtype=dtype)


_OTHERS: dict[str, Callable[..., Tensor]] = {
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "maximum": _maximum,
    "minimum": _minimum,
    "norm": _norm,
    "zero": aten.zeros_like,
}


def _for_each(element: Callable[..., Tensor]) -> Callable[..., Any]:
    """The list op of `element`: of every argument that is a list, each call takes one item."""

    def foreach(*args: Any, **kwargs: Any) -> Any:
        count = next(len(a) for a in args if isinstance(a, list | tuple))
        return [element(*(a[k] if isinstance(a, list | tuple) else a for a in args), **kwargs) for k in range(count)]

    return foreach


def _decompositions() -> dict[Any, Callable[..., Any]]:
    table = {}
    for name in (*_SAME_NAME, *_OTHERS):
        packet = getattr(aten, f"_foreach_{name}", None)
        if packet is None:  # not in this version of torch
            continue
        element = _OTHERS.get(name) or getattr(aten, name)
        for overload in map(packet.__getattr__, packet.overloads()):
            tensor_of_scalars = any(a.name == "scalars" and str(a.type) == "Tensor" for a in overload._schema.arguments)
            if not overload._schema.is_mutable and not tensor_of_scalars:
                table[overload] = _for_each(element)
    return table


FOREACH: dict[Any, Callable[..., Any]] = _decompositions()
"""List op to its decomposition. Not the forms whose factors are one tensor: eager reads that on the host."""
