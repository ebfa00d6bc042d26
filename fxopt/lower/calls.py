"""Nodes that run as the calls that they were, and writes into inputs."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Expr, Int, index
from fxopt.ir.loops import Load, Nest, Store, loads_below
from fxopt.ir.region import Call, Ref, Region, Size
from fxopt.lower import layout
from fxopt.lower.opsets import STORAGE_OFFSET_OPS, VIEW_OPS, kernels_hold
from fxopt.lower.values import (
    Computed,
    Opaque,
    Stored,
    Value,
    address,
    at,
    broadcast_indices,
    cast,
    nodes_of,
    pointwise,
    symbols_of,
)

if TYPE_CHECKING:
    from fxopt.lower.lowering import Lowering


_COPIES: dict[Any, int] = {
    torch.ops.aten._to_copy.default: 0,
    torch.ops.aten.copy.default: 1,
    torch.ops.prims.device_put.default: 0,
}
"""Ops that may copy between devices, with the position of the argument that is copied."""


_WRONG_SIZES = (torch.ops.aten._unique.default,)
"""Ops of data-dependent size for which FakeTensor makes one up (torch 2.11: one element, however many there are)."""


def call(ctx: Lowering, node: fx.Node) -> Any:
    """Append `node` as a Call; its results as values. Raises UnsupportedError for a result of data-dependent size."""
    sizes = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.SymInt)]
    if node.target in _WRONG_SIZES or any(size.node.hint is None for size in sizes):
        raise UnsupportedError(f"{node.name} ({node.target}) has a data-dependent size")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: _argument(ctx, arg))
    _refuse_offsets_into_arena(ctx, node)
    results, names = _declare_results(ctx, node)
    op, args, kwargs = _op_name(ctx, node, args, kwargs)
    effect = has_effect(node) or not isinstance(node.target, torch._ops.OpOverload)  # nothing is known of other callables
    ctx.steps.append(Call(op, args, kwargs, names, ctx.origins[node.name], _written(ctx, node), effect))
    return results


def changes_device(node: fx.Node) -> bool:
    """Whether the call copies a tensor from one device to another, which no kernel can do: a call by design."""
    position = _COPIES.get(node.target)
    if position is None or len(node.args) <= position:
        return False
    source = node.args[position]
    read = source.meta.get("val") if isinstance(source, fx.Node) else None
    made = node.meta.get("val")
    return isinstance(read, torch.Tensor) and isinstance(made, torch.Tensor) and read.device != made.device


def moved(ctx: Lowering, value: Value, device: torch.device) -> Value:
    """`value` in memory of `device`, copied there by a call when it is elsewhere."""
    if value.device == device:
        return value
    copy = ctx.new_buffer(value.dtype, device, value.shape)
    source = Ref(ctx.tensor_name(value))
    name = overload_name(torch.ops.aten._to_copy.default)
    ctx.steps.append(Call(name, (source,), {"device": device}, (copy.buffer,), ctx.origins[ctx.node.name], (), False))
    return copy


def _argument(ctx: Lowering, arg: fx.Node) -> Any:
    value = ctx.values[arg]
    if isinstance(value, (Stored, Computed)):
        if isinstance(value, Computed) and arg.target not in VIEW_OPS:
            value = ctx.values[arg] = ctx.store(value, layout.dense_strides(ctx, arg.meta["val"]))
        return Ref(ctx.tensor_name(value, arg))
    if isinstance(value, Opaque):
        return Ref(value.name)
    return Size(value) if isinstance(value, Expr) else value


def _refuse_offsets_into_arena(ctx: Lowering, node: fx.Node) -> None:
    """Raise UnsupportedError for an offset from the start of a storage when the plan decides what else lies in that."""
    if node.target not in STORAGE_OFFSET_OPS:
        return
    value = ctx.values[node.args[0]]  # type: ignore[index]
    own = isinstance(value, Stored) and any(isinstance(s, Region) and value.buffer in s.nest.writes() for s in ctx.steps)
    if own:
        raise UnsupportedError(f"{node.name} ({node.target}) counts from the start of memory that other tensors share")


def _declare_results(ctx: Lowering, node: fx.Node) -> tuple[Any, tuple[str | None, ...]]:
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return ctx.declare(node.name, val), (node.name,)
    if not isinstance(val, (tuple, list)):
        return val, (None,)
    results, names = [], []
    picked = {u.args[1] for u in node.users if u.target is operator.getitem}
    whole = any(u.target is not operator.getitem for u in node.users)
    for k, item in enumerate(val):
        # A result nobody picks stays unnamed: fused attention returns None where its FakeTensor version has a tensor.
        wanted = isinstance(item, torch.Tensor) and (whole or k in picked)
        name = f"{node.name}_{k}" if wanted else None
        results.append(ctx.declare(name, item) if name is not None else item)
        names.append(name)
    return tuple(results), tuple(names)


def _written(ctx: Lowering, node: fx.Node) -> tuple[str, ...]:
    """The buffers that the call changes in place."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ()
    writes = []
    for argument, given in zip(node.target._schema.arguments, node.args, strict=False):
        if argument.is_write and isinstance(given, fx.Node) and isinstance(ctx.values[given], Stored):
            writes.append(ctx.values[given].buffer)
    return tuple(writes)


def has_effect(node: fx.Node) -> bool:
    """Whether the call must keep its place among others: it writes, draws random numbers or returns nothing."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return isinstance(op, torch._ops.HigherOrderOperator)
    return op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags or not op._schema.returns


def _op_name(ctx: Lowering, node: fx.Node, args: Any, kwargs: Any) -> tuple[str, Any, Any]:
    """(Call.op, args, kwargs): a local callable when the op has no overload or an argument that a Plan cannot hold."""
    if isinstance(node.target, torch._ops.OpOverload) and layout.is_plain_data((args, kwargs)):
        return overload_name(node.target), args, kwargs
    key = f"{ctx.graph.name}/{node.name}"
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, (Ref, Size)))
    moving = [k for k, leaf in enumerate(leaves) if isinstance(leaf, (Ref, Size))]
    target = node.target

    def local(*given: Any) -> Any:
        filled = list(leaves)
        for k, value in zip(moving, given, strict=True):
            filled[k] = value
        call_args, call_kwargs = pytree.tree_unflatten(filled, spec)
        return target(*call_args, **call_kwargs)  # type: ignore[operator]

    ctx.local_ops[key] = local
    return f"local:{key}", tuple(leaves[k] for k in moving), {}


def overload_name(op: torch._ops.OpOverload) -> str:
    """ "namespace::name.overload" of an op, as in Call.op."""
    return f"{op._schema.name}.{op._overloadname}"


def copy_into(ctx: Lowering, node: fx.Node) -> Any:
    """copy_(input, value): store into the input's own memory, after what still wants its old contents is stored."""
    dest, value = ctx.values[node.args[0]], ctx.values[node.args[1]]  # type: ignore[index]
    if (
        not isinstance(dest, Stored)
        or not kernels_hold(dest.dtype, dest.device)
        or not isinstance(value, (Stored, Computed))
    ):
        return call(ctx, node)
    if value == dest:  # the op that made the value has written it in place
        return dest
    ctx.store_pending_readers(dest.buffer, node)
    if node.name in ctx.library_nodes:
        return call(ctx, node)
    source = _broadcast(ctx.values[node.args[1]], dest.shape)  # type: ignore[index]
    if source.device != dest.device:
        return call(ctx, node)
    points = tuple(index(f"x{k}", size) for k, size in enumerate(dest.shape))
    where = address(dest, points)
    if at(source, points) == Load(dest.buffer, where, dest.dtype):  # its own contents by way of views and clones
        return dest
    own = [load for load in loads_below((at(source, points),)) if load.buffer == dest.buffer]
    if any(load.index != where or load.indirect for load in own):  # elements would be read after they were overwritten
        source = ctx.store(_broadcast(source, dest.shape, copy=True))
    store = Store(dest.buffer, where, cast(at(source, points), dest.dtype))
    ctx.emit(Nest(symbols_of(points), (), (store,)), dest.device, nodes_of(source))
    return dest


def _broadcast(value: Value, shape: tuple[Int, ...], copy: bool = False) -> Value:
    """`value` expanded to `shape`; as an expression of its own when `copy`."""
    if value.shape == shape and not copy:
        return value
    return pointwise(shape, value.dtype, value.device, lambda i: at(value, broadcast_indices(value.shape, i)), (value,))
