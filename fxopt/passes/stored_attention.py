"""Keys and values that are stored in 8 bits (a quantized cache) are read by attention as they lie.

`attention(query, widened(key), widened(value))` becomes `fxopt::scaled_attention` of what is stored, where widened is a cast
of int8 or float8 with a product by a scale, in any order and type, and views. Its kernel reads half the bytes, and what was
widened is never stored. Only for few rows (decoding): with many, the bytes do not count, and a library's kernel on widened
keys is the faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.attention_op import attention
from fxopt.ir.graph import Phase
from fxopt.ir.quantized_attention import FLOAT8, SCALED_ATTENTION, STORED
from fxopt.ir.spec import fake_mode
from fxopt.passes.constant_folding import add_constant
from fxopt.passes.context import Context
from fxopt.passes.facts import arguments, static_shape, tensor
from fxopt.passes.quantize_attention import kernels_are_off, obstacle_of_mask
from fxopt.precision import MOST_WIDTH
from fxopt.target import Target

aten = torch.ops.aten

MOST_ROWS = 64
"""Of queries, times the heads of a group: a tile of them goes over all keys at once."""

KERNELS = "attention_kernels"
"""What switches the kernels off (FXOPT_DISABLE): without them, widening apart is as good."""

Scale = fx.Node | float | None
Stored = tuple[fx.Node, Scale]


def stored_attention(context: Context) -> None:
    off = KERNELS in context.options.disable or context.options.tuning_seconds == 0
    if context.graph.phase is not Phase.INFERENCE or off or kernels_are_off():
        return
    for node in context.nodes:
        if node.target is not attention or context.exhausted:
            continue
        given = arguments(node)
        key, value = _stored(context, given["key"]), _stored(context, given["value"])
        if key is None or value is None:
            continue
        reason = _obstacle(given, key[0], value[0])
        if reason is not None:
            context.reject("stored", reason)
            continue
        new = _replacement(context, node, given, key, value)
        if new is not None:
            context.replace("stored", node, new)


def _replacement(context: Context, node: fx.Node, given: dict[str, Any], key: Stored, value: Stored) -> fx.Node | None:
    scales = [_as_node(context, node, scale) for _, scale in (key, value)]
    args = (given["query"], key[0], value[0], None, *scales, given["attn_mask"], given["is_causal"])
    dtype = node.meta["val"].dtype
    return context.derive(SCALED_ATTENTION, (*args, given["scale"], given["enable_gqa"], dtype), node)


def _as_node(context: Context, node: fx.Node, scale: Scale) -> fx.Node | None:
    if scale is None or isinstance(scale, fx.Node):
        return scale
    own = torch.tensor(scale, dtype=torch.float32, device=node.meta["val"].device)
    mode = fake_mode(context.graph)
    assert mode is not None, "the graph has tensors"
    with mode:
        fake = torch.empty((), dtype=own.dtype, device=own.device)
    return add_constant(context, f"{node.name}_scale", own, {"val": fake, "module": node.meta.get("module", "")})


def _obstacle(given: dict[str, Any], key: fx.Node, value: fx.Node) -> str | None:
    query, stored = tensor(given["query"]), (tensor(key), tensor(value))
    known = [x for x in (query, *stored) if x is not None]
    if query is None or len(known) < 3 or not all(static_shape(x) and x.dim() == 4 for x in known) or not known[1].numel():
        return "sizes that are known only at run time"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return "a query in another type than half"
    if any(x.shape[3] % 8 or x.shape[3] > MOST_WIDTH or 1 not in x.stride()[2:] for x in known) or query.stride(3) != 1:
        return "a layout or width that kernels do not take"
    reason = obstacle_of_mask(given)
    if reason is not None:
        return reason
    if query.shape[2] * query.shape[1] > MOST_ROWS * known[1].shape[1]:
        return "many rows"
    cuda = query.device.type == "cuda" and torch.cuda.is_available()
    if cuda and any(x.dtype == FLOAT8 for x in known) and not Target.current(query.device).has_float8:
        return "a GPU without float8"
    return None


def _stored(context: Context, node: fx.Node) -> Stored | None:
    """What `node` is in memory, in 8 bits, and by what it is multiplied, broadcast to its rows; None for anything else."""
    views: list[fx.Node] = []
    while node.op == "call_function" and _moves(node.target) and len(node.all_input_nodes) == 1:
        views.append(node)
        node = node.all_input_nodes[0]
    found = _widened(node)
    if found is None:
        return None
    source, scale = found
    if isinstance(scale, fx.Node) and not _has_one_column(scale, whole=bool(views)):
        return None
    for view in reversed(views):
        derived = context.derive(view.target, (source, *view.args[1:]), view, dict(view.kwargs))
        if derived is None:
            return None
        source = derived
    return source, scale


def _moves(target: Any) -> bool:
    """Whether an op leaves values as they are, of whatever type: heads that are repeated are views and a copy."""
    return ops.is_view(target) or target is aten.clone.default


def _has_one_column(scale: fx.Node, whole: bool) -> bool:
    """Whether a scale is one number, or if not for the `whole` tensor, has at most four dimensions, the last of size 1."""
    value = tensor(scale)
    if value is None or not value.is_floating_point() or not static_shape(value):
        return False
    return value.dim() == 0 or (not whole and value.dim() <= 4 and value.shape[-1] == 1)


def _widened(node: fx.Node) -> Stored | None:
    """The tensor in 8 bits that `node` is a cast of, and its factor."""
    node = _uncast(node)
    stored = tensor(node)
    if stored is not None and stored.dtype in STORED:
        return node, None
    if node.target is not aten.mul.Tensor:
        return None
    for x, scale in (node.args, reversed(node.args)):
        source = _uncast(x) if isinstance(x, fx.Node) else None
        value = tensor(source)
        if source is None or value is None or value.dtype not in STORED or value.shape != node.meta["val"].shape:
            continue
        if isinstance(scale, fx.Node):
            return source, _uncast(scale)  # the kernel takes any floating type: a cast would be a kernel of its own
        return (source, float(scale)) if isinstance(scale, (int, float)) else None
    return None


def _uncast(node: fx.Node) -> fx.Node:
    """What `node` casts to a floating type, layouts as they are; else itself."""
    while node.target is aten._to_copy.default and set(node.kwargs) <= {"dtype"} and node.meta["val"].is_floating_point():
        (source,) = node.all_input_nodes
        stored = tensor(source)
        if stored is None or not (stored.is_floating_point() or stored.dtype in STORED):
            break
        node = source
        if stored.dtype in STORED:
            break
    return node
