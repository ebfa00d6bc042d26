"""`aten::_foreach_*`: one element op per tensor, so that what optimizers compute fuses within each parameter.

torch's optimizers work on lists of tensors (`foreach=True`, the default on CUDA): each list op reads and writes all
parameters once, which is what fusion is there to avoid. Tensors of one size share the kernel that results.

Where sizes are static, AOTAutograd traces list ops whole, and `take_lists_apart` replaces them in the graph that results:
what a decomposition consists of is traced once for all tensors of one layout, instead of for each of hundreds.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses import fake_impls
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fxopt.capture.splicing import like, sizes, splice

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
        return [element(*_item(args, k), **kwargs) for k in range(_count(args))]

    return foreach


def _count(args: Sequence[Any]) -> int:
    return next(len(a) for a in args if isinstance(a, list | tuple))


def _item(args: Sequence[Any], k: int) -> list[Any]:
    return [a[k] if isinstance(a, list | tuple) else a for a in args]


def _decompositions() -> dict[Any, Callable[..., Any]]:
    return {overload: _for_each(element) for overload, element in _ELEMENTS.items()}


def _elements() -> dict[Any, Callable[..., Any]]:
    table = {}
    for name in (*_SAME_NAME, *_OTHERS):
        packet = getattr(aten, f"_foreach_{name}", None)
        if packet is None:  # not in this version of torch
            continue
        element = _OTHERS.get(name) or getattr(aten, name)
        for overload in map(packet.__getattr__, packet.overloads()):
            tensor_of_scalars = any(a.name == "scalars" and str(a.type) == "Tensor" for a in overload._schema.arguments)
            if not overload._schema.is_mutable and not tensor_of_scalars:
                table[overload] = element
    return table


_ELEMENTS: dict[Any, Callable[..., Any]] = _elements()
"""List op to what computes one tensor of its result."""

FOREACH: dict[Any, Callable[..., Any]] = _decompositions()
"""List op to its decomposition. Not the forms whose factors are one tensor: eager reads that on the host."""


Table = Mapping[Any, Callable[..., Any]]


def take_lists_apart(gm: fx.GraphModule, table: Table) -> None:
    """Replace the list ops of a functional graph by their element ops, taken apart by `table`; in place.

    What AOTAutograd would have traced with `FOREACH` in its table. A list op of symbolic sizes stays, and runs as a whole.
    """
    targets = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in _ELEMENTS]
    if not targets:
        return
    mode: Any = detect_fake_mode([v for n in targets for v in n.meta["val"]])
    apart = _Apart(gm, table, mode)
    with _disable_current_modes(), torch._C._DisablePythonDispatcher(), torch.no_grad():
        for node in targets:
            apart.take(node)


class _Apart:
    """The replacement of one graph's list ops. `traced` is what element ops consist of, by the layouts of their operands."""

    def __init__(self, gm: fx.GraphModule, table: Table, mode: Any) -> None:
        self.gm, self.table, self.mode = gm, table, mode
        self.traced: dict[Any, fx.GraphModule] = {}

    def take(self, node: fx.Node) -> None:
        items: dict[fx.Node, Any] = {user: user.args[1] for user in node.users if user.target is operator.getitem}
        operands = [n.meta["val"] for n in node.all_input_nodes]
        if len(items) != len(node.users) or any(map(is_symbolic, pytree.tree_leaves(operands))):
            return
        with self.gm.graph.inserting_before(node):
            made = {k: self._element(node, _item(node.args, k)) for k in dict.fromkeys(items.values())}
        for user, k in items.items():
            user.replace_all_uses_with(made[k])
            self.gm.graph.erase_node(user)
        self.gm.graph.erase_node(node)

    def _element(self, node: fx.Node, args: list[Any]) -> fx.Node:
        """The element op of `node` for `args`, as nodes at the point where nodes are inserted."""
        nodes = [a for a in args if isinstance(a, fx.Node)]
        facts = tuple(_layout(a.meta["val"]) if isinstance(a, fx.Node) else (type(a), a) for a in args)
        key = node.target, facts, tuple((name, type(v), v) for name, v in node.kwargs.items())
        traced = self.traced.get(key)
        if traced is None:
            traced = self.traced[key] = self._trace(node, args, [n.meta["val"] for n in nodes])
        result: fx.Node = splice(self.gm, node, traced, nodes, self.mode)
        return result

    def _trace(self, node: fx.Node, args: list[Any], values: list[Tensor]) -> fx.GraphModule:
        def element(*tensors: Tensor) -> Any:
            given = iter(tensors)
            return _ELEMENTS[node.target](*(next(given) if isinstance(a, fx.Node) else a for a in args), **node.kwargs)

        plain = [like(self.mode, v) if v._has_symbolic_sizes_strides else v for v in values]
        with self.mode:
            return make_fx(element, decomposition_table=dict(self.table))(*plain)


@contextlib.contextmanager
def values_by_layout() -> Iterator[None]:
    """In the block, fake values of list ops are computed once for all tensors of one layout, not for each.

    Otherwise as torch computes them. To be entered under a lock: the table of fake implementations is torch's own.
    """
    implementations = fake_impls.op_implementations_checks
    entry = (_ELEMENTS.__contains__, _by_layout)
    implementations.insert(0, entry)
    try:
        yield
    finally:
        implementations.remove(entry)


def _by_layout(mode: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    """Fake results of a list op; NotImplemented, for torch's own way, where no two tensors are alike."""
    counts = {len(a) for a in args if isinstance(a, list | tuple)}
    if len(counts) != 1 or any(map(is_symbolic, pytree.tree_leaves(args))):
        return NotImplemented
    items = [_item(args, k) for k in range(*counts)]
    layouts = [tuple(_layout(a) if isinstance(a, Tensor) else type(a) for a in item) for item in items]
    first = {layout: k for k, layout in reversed(list(enumerate(layouts)))}
    if len(first) == len(layouts):
        return NotImplemented
    few = [[a[k] for k in first.values()] if isinstance(a, list | tuple) else a for a in args]
    values = dict(zip(first, op(*few, **kwargs), strict=True))
    return [like(mode, values[layout]) for layout in layouts]


def _layout(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.device, *sizes(value), value.is_conj(), value.is_neg()


def is_symbolic(value: Any) -> bool:
    """Whether `value` is a symbolic number, or a tensor of symbolic sizes or strides.

    Not symbolic is a SymInt that is known: torch has such sizes for views whose storage alone is of symbolic size.
    """
    if isinstance(value, Tensor):
        if not value._has_symbolic_sizes_strides or value.is_conj() or value.is_neg():
            return value._has_symbolic_sizes_strides
        return any(map(is_symbolic, (*value.shape, *value.stride())))
    if isinstance(value, torch.SymInt):
        return value.node.maybe_as_int() is None
    return isinstance(value, torch.SymFloat | torch.SymBool)
