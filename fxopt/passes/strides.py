"""Strides after a value's layout has changed: what is computed from it is propagated again, up to where strides matter.

A pass that gives a value other strides than it was traced with (channels-last convolutions, columns of a merged product)
seeds a `StrideWalk` with it. What is seen from outside keeps its strides, and so does the memory behind it: outputs and the
views of them, and operands of calls of which nothing is known. There the value is cloned back, once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.errors import UnsupportedError
from fxopt.ir import ops
from fxopt.ir.spec import COPY_INTO, fake_mode, known_equal, propagation
from fxopt.passes.context import Context
from fxopt.passes.facts import tensor

aten = torch.ops.aten

FOLLOWING = frozenset({"pointwise", "reduction", "scan", "view", "indexing", "factory", "contraction", "getitem"})
"""Categories of ops whose values do not depend on the strides of their operands ..."""

FOLLOWING_CALLS = frozenset(
    "avg_pool2d avg_pool2d_backward avg_pool3d avg_pool3d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward "
    "_adaptive_avg_pool3d _adaptive_avg_pool3d_backward max_pool2d_with_indices max_pool2d_with_indices_backward "
    "max_pool3d_with_indices max_pool3d_with_indices_backward upsample_bicubic2d fxopt::max_pool_offsets "
    "fxopt::max_pool_offsets_backward fxopt::attention fxopt::attention_forward fxopt::scaled_attention "
    "scaled_dot_product_attention "
    "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_flash_attention_for_cpu".split()
)
"""... and names of others, which have kernels for any layout."""

BY_STRIDES = frozenset("as_strided as_strided_scatter as_strided_copy _reshape_alias _int_mm _scaled_mm".split())
"""Names in FOLLOWING's categories of ops that read memory by its strides, or that take only some."""


@dataclass
class StrideWalk:
    """One pass over the nodes, in order. `traced` has the values of tracing of all nodes whose strides have changed."""

    context: Context
    traced: dict[fx.Node, Any] = field(default_factory=dict)
    clones: dict[tuple[fx.Node, torch.memory_format], fx.Node] = field(default_factory=dict)

    def visit(self, node: fx.Node) -> None:
        """Give `node` the strides that follow from those of its operands, and what sees them from outside a copy."""
        if has_strides(node) and any(a in self.traced for a in node.all_input_nodes):
            self.settle(node)
            if node in self.traced and owns_memory(node):
                self.show_as_traced(node)

    def settle(self, node: fx.Node) -> None:
        """Propagate `node`, from copies of its operands as they were traced where it takes no others."""
        if not self.propagate(node):  # a view of rows that are no longer one after the other, say
            self.clone_operands(node, [a for a in node.all_input_nodes if a in self.traced], torch.contiguous_format)
            self.propagate(node)

    def clone_operands(self, node: fx.Node, operands: list[fx.Node], layout: torch.memory_format) -> None:
        """Have `node` read clones of `operands` in `layout`, each made once."""
        for operand in operands:
            node.replace_input_with(operand, self._clone(operand, layout, node))

    def _clone(self, operand: fx.Node, layout: torch.memory_format, user: fx.Node) -> fx.Node:
        known = self.clones.get((operand, layout))
        if known is None:
            known = self._copy(operand, user, layout)
            self.clones[operand, layout] = known
        return known

    def _copy(self, node: fx.Node, before: fx.Node, layout: torch.memory_format) -> fx.Node:
        clone = self.context.emit(aten.clone.default, (node,), before, {"memory_format": layout})
        with propagation(fake_mode(self.context.graph)):
            _set_value(clone, node.meta["val"].clone(memory_format=layout))
        return clone

    def propagate(self, node: fx.Node) -> bool:
        """Give `node` the value that follows from its operands' values; False where there is none."""
        before = self.traced.get(node, node.meta["val"])
        value = self.context.propagate(node.target, node.args, node.kwargs, symbolic=True)
        if value is None:
            return False
        self.traced.pop(node, None)
        if _moved(value, before):
            self.traced[node] = before
        _set_value(node, value if node in self.traced else before)
        return True

    def show_as_traced(self, owner: fx.Node) -> None:
        """Have those uses of new memory for which its strides matter, or those of its views, see it as it was traced."""
        strict = [u for u in owner.users if _by_strides(u)]
        if not strict:
            return
        shown = self._as_traced(owner, self.traced[owner], owner.next)
        for user in strict:
            user.replace_input_with(owner, shown)

    def _as_traced(self, owner: fx.Node, traced: torch.Tensor, before: fx.Node) -> fx.Node:
        """A copy of `owner` with the strides of `traced`: row-major, after the dimensions are sorted by stride."""
        order = dense_order(traced)
        if order is None:
            raise UnsupportedError(f"{owner.name} was traced with strides that are not dense: {traced.stride()}")
        straight = order == sorted(order)
        sorted_by_stride = owner if straight else self._permuted(owner, order, before)
        copy = self._copy(sorted_by_stride, before, torch.contiguous_format)
        shown = copy if straight else self._permuted(copy, [order.index(d) for d in range(len(order))], before)
        for made in {sorted_by_stride, copy, shown} - {owner}:
            made.meta = {**owner.meta, "val": made.meta["val"], "pass": self.context.pass_name}
        _set_value(shown, traced)
        return shown

    def _permuted(self, node: fx.Node, order: list[int], before: fx.Node) -> fx.Node:
        permuted = self.context.emit(aten.permute.default, (node, order), before)
        with propagation(fake_mode(self.context.graph)):
            _set_value(permuted, node.meta["val"].permute(order))
        return permuted


def has_strides(node: fx.Node) -> bool:
    """Whether `node` computes something whose strides may follow from others'."""
    return node.op == "call_function" and node.target is not COPY_INTO and not _is_size(node)


def _set_value(node: fx.Node, value: Any) -> None:
    node.meta["val"] = value
    node.meta.pop("tensor_meta", None)


def _is_size(node: fx.Node) -> bool:
    """Arithmetic on sizes, and the sizes of tensors (but neither their strides nor their offsets)."""
    name = ops.name_of(node.target)
    return ops.is_symbolic(node.target) and "stride" not in name and "offset" not in name


def owns_memory(node: fx.Node) -> bool:
    """Whether `node` is a tensor in new memory: no view, and no tuple of tensors but each of its members."""
    if tensor(node) is None:
        return False
    source: Any = node.args[0] if node.target is ops.GETITEM else node
    return not ops.is_view(source.target)


def _by_strides(user: fx.Node) -> bool:
    """Whether the strides of what `user` reads are seen outside: by the caller, or by a call of which nothing is known."""
    if user.op == "output":
        return True
    if user.target is COPY_INTO or _is_size(user):
        return False
    if not _follows(user):
        return True
    return ops.is_view(user.target) and any(map(_by_strides, user.users))


def _follows(node: fx.Node) -> bool:
    name = ops.name_of(node.target)
    if name in BY_STRIDES or node.target is aten.view.dtype:
        return False
    return ops.category(node.target) in FOLLOWING or name in FOLLOWING_CALLS


def _moved(value: Any, before: Any) -> bool:
    """Whether two values of one node differ in strides (those of dimensions of size 1 are free)."""
    if isinstance(value, tuple | list):
        return any(_moved(v, b) for v, b in zip(value, before, strict=True))
    if not isinstance(value, torch.Tensor):
        return False
    strides = zip(value.shape, value.stride(), before.stride(), strict=True)
    return any(not known_equal(a, b) for size, a, b in strides if not known_equal(size, 1))


def is_dense(value: torch.Tensor, order: list[int]) -> bool:
    """Whether the dimensions, in this order, are known to lie in memory without gaps, the last one's elements adjacent."""
    expected: Any = 1
    for d in reversed(order):
        if known_equal(value.shape[d], 1):
            continue
        if not known_equal(value.stride(d), expected):
            return False
        expected = expected * value.shape[d]
    return True


def channels_at_the_end(dims: int) -> list[int]:
    return [0, *range(2, dims), 1]


def dense_order(value: torch.Tensor) -> list[int] | None:
    """The dimensions by falling stride, for a dense tensor; None for any other."""
    orders = [list(range(value.dim())), channels_at_the_end(value.dim())] if value.dim() > 1 else [list(range(value.dim()))]
    if all(isinstance(s, int) for s in value.stride()):
        orders.append(sorted(range(value.dim()), key=lambda d: value.stride(d), reverse=True))
    return next((order for order in orders if is_dense(value, order)), None)
