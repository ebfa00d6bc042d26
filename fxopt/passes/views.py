"""Views: one spelling for each kind, chains merged. Only index arithmetic changes, never data."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.spec import known_equal
from fxopt.passes.context import Context, Rule, apply_rules
from fxopt.passes.facts import arguments, is_contiguous, same_tensor, static_shape, tensor

aten = torch.ops.aten
_RESHAPES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)


def views(context: Context) -> None:
    apply_rules(context, RULES)


def _source(node: fx.Node) -> fx.Node | None:
    """The operand of a view, when it is itself the result of an ATen call."""
    inner = node.args[0]
    good = isinstance(inner, fx.Node) and inner.op == "call_function" and ops.is_overload(inner.target)
    return inner if good else None  # type: ignore[return-value]


def as_permute(context: Context, node: fx.Node) -> fx.Node | None:
    """t and transpose become permute, so that equal permutations look equal."""
    value = tensor(node)
    if value is None or value.dim() == 0:
        return None
    dims = list(range(value.dim()))
    if ops.name_of(node.target) == "t":
        dims.reverse()
    else:
        a, b = node.args[1], node.args[2]
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        dims[a], dims[b] = dims[b], dims[a]
    return context.emit(aten.permute.default, (node.args[0], dims), node)


def merge_permutes(context: Context, node: fx.Node) -> fx.Node | None:
    """permute(permute(x)) is one permute, or x."""
    inner, value = _source(node), tensor(node)
    if inner is None or value is None or inner.target is not aten.permute.default:
        return None
    first, second = _dims(inner), _dims(node)
    merged = [first[d] for d in second]
    source = inner.args[0]
    if merged == list(range(value.dim())) and isinstance(source, fx.Node):
        return source
    return context.emit(aten.permute.default, (source, merged), node)


def _dims(node: fx.Node) -> list[int]:
    dims: Any = node.args[1]
    return [d % len(dims) for d in dims]


def as_view(context: Context, node: fx.Node) -> fx.Node | None:
    """_unsafe_view and reshape become view (the same memory, nothing is copied)."""
    source, value = tensor(node.args[0]), tensor(node)
    if source is None or value is None:
        return None
    if ops.name_of(node.target) == "_unsafe_view" or (is_contiguous(source) and is_contiguous(value)):
        return context.emit(aten.view.default, (node.args[0], node.args[1]), node)
    return None


def merge_reshapes(context: Context, node: fx.Node) -> fx.Node | None:
    """A view of a view of x is a view of x, when x can be viewed so with the same strides."""
    inner, value = _source(node), tensor(node)
    if inner is None or value is None or node.target not in _RESHAPES or not _is_reshape(inner):
        return None
    source, shape = inner.args[0], _target_shape(node, value)
    held = tensor(source)
    if isinstance(source, fx.Node) and same_tensor(node, source):
        return source
    if shape is None or held is None or held.is_conj() or not isinstance(source, fx.Node):
        return None
    if is_contiguous(held) and is_contiguous(value):
        return context.emit(aten.view.default, (source, shape), node)
    return context.emit_checked(aten.view.default, (source, shape), node)


def _is_reshape(node: fx.Node) -> bool:
    """Whether a view keeps the order of elements: a reshape, or a permutation that moves only dimensions of size 1."""
    if node.target is not aten.permute.default:
        return node.target in _RESHAPES
    value = tensor(node.args[0])
    moved = [d for d in _dims(node) if value is None or not known_equal(value.shape[d], 1)]
    return moved == sorted(moved)


def _target_shape(node: fx.Node, value: torch.Tensor) -> list[Any] | None:
    """The shape argument that a single view would take: integers, or the size nodes that `node` itself was given."""
    if static_shape(value):
        return list(value.shape)
    shape = node.args[1] if ops.name_of(node.target) in ("view", "_unsafe_view", "reshape") else None
    return list(shape) if isinstance(shape, tuple | list) else None


def merge_expands(context: Context, node: fx.Node) -> fx.Node | None:
    """expand(expand(x)) is one expand."""
    inner, value = _source(node), tensor(node)
    if inner is None or value is None or inner.target is not aten.expand.default or not static_shape(value):
        return None
    return context.emit_checked(aten.expand.default, (inner.args[0], list(value.shape)), node)


def merge_slices(context: Context, node: fx.Node) -> fx.Node | None:
    """x[a:b][c:d] along one dimension, step 1, is one slice."""
    inner, value = _source(node), tensor(node)
    if inner is None or value is None or inner.target is not aten.slice.Tensor:
        return None
    outer_args, inner_args = arguments(node), arguments(inner)
    if outer_args["dim"] != inner_args["dim"] or outer_args["step"] != 1 or inner_args["step"] != 1:
        return None
    held, dim = tensor(inner.args[0]), outer_args["dim"]
    if held is None or not static_shape(held) or not static_shape(value):
        return None
    between = tensor(inner)
    assert between is not None
    start = _start(inner_args["start"], held.shape[dim]) + _start(outer_args["start"], between.shape[dim])
    return context.emit_checked(aten.slice.Tensor, (inner.args[0], dim, start, start + value.shape[dim]), node)


def _start(start: Any, size: int) -> int:
    """A slice start, wrapped and clamped as slicing does."""
    start = 0 if start is None else int(start)
    return min(max(start + size if start < 0 else start, 0), size)


RULES: dict[str, tuple[Rule, ...]] = {
    "t": (as_permute,),
    "transpose": (as_permute,),
    "permute": (merge_permutes,),
    "_unsafe_view": (as_view,),
    "reshape": (as_view,),
    **dict.fromkeys("view unsqueeze squeeze".split(), (merge_reshapes,)),
    "expand": (merge_expands,),
    "slice": (merge_slices,),
}
"""Op name -> rules, tried in order."""
