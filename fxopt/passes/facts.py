"""What a rewrite may rely on: statically known facts about nodes, none of which adds a guard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.spec import COPY_INTO, known_equal

_LOOKED_THROUGH = frozenset(
    "view _unsafe_view reshape expand permute t transpose unsqueeze squeeze slice select clone alias detach".split()
)
_RESHAPES = frozenset(
    {
        torch.ops.aten.view.default,
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten.unsqueeze.default,
        torch.ops.aten.squeeze.dim,
    }
)
_ZEROS, _ONES = frozenset({"zeros", "zeros_like", "new_zeros"}), frozenset({"ones", "ones_like", "new_ones"})


def tensor(node: Any) -> torch.Tensor | None:
    """The FakeTensor of a node; None for anything that is not a strided tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) and value.layout == torch.strided else None


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two shapes (or strides) are known to be equal."""
    return len(a) == len(b) and all(known_equal(x, y) for x, y in zip(a, b, strict=True))


def same_tensor(a: fx.Node, b: Any) -> bool:
    """Whether two nodes are known to agree in shape, dtype, device and strides."""
    x, y = tensor(a), tensor(b)
    if x is None or y is None or x.dtype != y.dtype or x.device != y.device:
        return False
    if x.is_conj() != y.is_conj() or x.is_neg() != y.is_neg():
        return False
    return x is y or (same_sizes(x.shape, y.shape) and same_sizes(x.stride(), y.stride()))


def static_shape(value: torch.Tensor) -> bool:
    return all(isinstance(s, int) for s in value.shape)


def is_contiguous(value: torch.Tensor) -> bool:
    """Whether the strides are known to be row-major, those of size-1 dimensions included."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not known_equal(stride, expected):
            return False
        expected = expected * (1 if known_equal(size, 0) else size)
    return True


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an OpOverload call by schema name, defaults filled in."""
    out: dict[str, Any] = {}
    for position, parameter in enumerate(ops.schema(node.target).arguments):
        if position < len(node.args):
            out[parameter.name] = node.args[position]
        elif parameter.name in node.kwargs:
            out[parameter.name] = node.kwargs[parameter.name]
        else:
            out[parameter.name] = parameter.default_value
    return out


def base(node: fx.Node) -> fx.Node:
    """The node that owns the memory of `node`: the start of its chain of views."""
    while node.op == "call_function" and ops.is_view(node.target) and not ops.is_higher_order(node.target):
        source = next(iter(node.all_input_nodes), None)
        if source is None:
            break
        node = source
    return node


def escapes(node: fx.Node, without: fx.Node | None = None) -> bool:
    """Whether `node` or a view of it is an output, its memory outliving the call; not counting views by way of `without`."""
    return node is not without and any(user.op == "output" for user in _users_of_views(node, without))


def _users_of_views(node: fx.Node, without: fx.Node | None = None) -> Iterator[fx.Node]:
    """The users of `node` and of its views, but of those by way of `without`."""
    seen, stack = {node, without}, [node]
    while stack:
        for user in stack.pop().users:
            yield user
            if user.op == "call_function" and ops.is_view(user.target) and user not in seen:
                seen.add(user)
                stack.append(user)


def needs_memory(node: fx.Node) -> bool:
    """Whether the caller or a library call reads `node`, which then stands in memory as it is; else only kernels of ours."""
    if escapes(node):
        return True
    for user in node.users:
        if ops.is_view(user.target) and user.op == "call_function":
            if needs_memory(user):
                return True
        elif ops.category(user.target) in ("contraction", "library", "higher_order"):
            return True
    return False


def is_output(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def feeds_copy(node: fx.Node) -> bool:
    """Whether `node` or a view of it is what a trailing copy_ writes into an input."""
    return any(user.target is COPY_INTO for user in _users_of_views(node))


def is_written(node: fx.Node) -> bool:
    """Whether `node` is an input that a trailing copy_ overwrites."""
    return any(user.target is COPY_INTO and user.args[0] is node for user in node.users)


def owner(node: fx.Node) -> fx.Node | None:
    """The node whose new memory `node` is all of, itself or under another shape; None for inputs and other views."""
    while node.op == "call_function" and node.target in _RESHAPES:
        node = node.args[0]  # type: ignore[assignment]
    if node.op != "call_function":
        return None
    if node.target is ops.GETITEM:
        container = node.args[0]
        return node if isinstance(container, fx.Node) and not ops.is_view(container.target) else None
    return None if ops.is_view(node.target) else node


def may_stand_for(old: fx.Node, new: fx.Node) -> bool:
    """Whether every use of `old` may become a use of the equal value `new` without changing what is aliased outside.

    An output that was fresh stays fresh and unshared; an output that was a view stays a tensor object of its own; what is
    copied into one input does not become a read of an input that another copy overwrites.
    """
    if feeds_copy(old) and is_written(base(new)) and not is_written(base(old)):
        return False
    if not escapes(old):
        return True
    if base(new) is base(old):
        return not is_output(old) or (new.op == "call_function" and not is_output(new))
    ours, theirs = owner(new), owner(old)
    return ours is not None and not escapes(ours) and theirs is not None and not escapes(theirs, without=old)


def uniform_value(node: Any) -> bool | int | float | None:
    """The one value that all elements of `node` have, when it is built from a factory (None: not known)."""
    while isinstance(node, fx.Node) and node.op == "call_function" and ops.is_overload(node.target):
        name = ops.name_of(node.target)
        if name in _ZEROS:
            return 0
        if name in _ONES:
            return 1
        if name in ("full", "full_like", "new_full", "scalar_tensor"):
            value = arguments(node).get("s" if name == "scalar_tensor" else "fill_value")
            return _stored(value, tensor(node))
        if name == "_to_copy":
            inner = uniform_value(node.args[0])
            return None if inner is None else _stored(inner, tensor(node))
        if name not in _LOOKED_THROUGH or node.target is torch.ops.aten.view.dtype:
            return None
        node = node.args[0]
    return node if isinstance(node, bool | int | float) else None


def _stored(value: Any, holder: torch.Tensor | None) -> bool | int | float | None:
    """`value` as a tensor like `holder` stores it."""
    if holder is None or not isinstance(value, bool | int | float) or holder.dtype.is_complex:
        return None
    if not holder.dtype.is_floating_point and isinstance(value, float) and not math.isfinite(value):
        return None
    try:
        stored: bool | int | float = torch.tensor(value, dtype=holder.dtype).item()
    except (RuntimeError, OverflowError):
        return None
    return stored


def is_positive_zero(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value == 0 and math.copysign(1.0, value) > 0
