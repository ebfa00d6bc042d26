"""Before autograd: a linear layer whose logits only feed a cross-entropy becomes `fxopt::linear_cross_entropy`.

That op (ir/linear_cross_entropy_op.py) never has all logits in memory. What stands between the two in real code either
casts the logits to a wider type or selects and reshapes rows, which can be done to the hidden states instead because it
leaves the last dimension alone. Logits that anything else uses have to exist and are left as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.ir import ops
from fxopt.ir.linear_cross_entropy_op import linear_cross_entropy as chunked
from fxopt.ir.spec import known_equal
from fxopt.passes.context import Context
from fxopt.passes.dynamo_facts import example, is_special, with_grad_mode

MIN_BYTES, MIN_CLASSES = 1 << 30, 4096
"""Smaller logits are left to ordinary fusion: chunks buy memory with a little time, and below this memory is no concern."""

PARAMETERS: dict[str, Any] = {
    "input": None,
    "target": None,
    "weight": None,
    "size_average": None,
    "ignore_index": -100,
    "reduce": None,
    "reduction": "mean",
    "label_smoothing": 0.0,
}
"""Of `cross_entropy`, in order, with defaults; `nll_loss` has all but the last."""

LOG_SOFTMAX: frozenset[Any] = frozenset({F.log_softmax, torch.log_softmax, "log_softmax"})
CASTS = frozenset({"float", "double", "to", "type"})
RESHAPES = frozenset({"view", "reshape"})
MATMULS: frozenset[Any] = frozenset({torch.matmul, torch.mm})
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class _ObstacleError(Exception):
    """Why a loss is left as it is."""


@dataclass
class _Linear:
    """The operands of a linear layer and the node that multiplies them; weight [V, K], or [K, V] when `transposed`."""

    product: fx.Node
    hidden: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None
    transposed: bool = False

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        return (self.hidden, self.weight) if self.bias is None else (self.hidden, self.weight, self.bias)


@dataclass
class _Head:
    """A loss, its parameters by name, the nodes from the linear layer's result to the loss's input, and that layer."""

    loss: fx.Node
    given: dict[str, Any]
    chain: list[fx.Node]
    linear: _Linear


def linear_cross_entropy(context: Context) -> None:
    modes = dict(with_grad_mode(context))
    for node in context.nodes:
        if context.exhausted:
            return
        if node.op != "call_function" or node.target not in (F.cross_entropy, F.nll_loss):
            continue
        try:
            head = _head(node)
            _check(head, modes)
        except _ObstacleError as obstacle:
            context.reject("linear_cross_entropy", str(obstacle))
            continue
        context.spend("chunked", node)
        _rewrite(context, head)


# ---------------------------------------------------------------------- what is matched


def _head(loss: fx.Node) -> _Head:
    given = PARAMETERS | dict(zip(PARAMETERS, loss.args, strict=False)) | dict(loss.kwargs)
    logits = example(given["input"])
    if logits is None or logits.dim() != 2 or logits.dtype not in DTYPES:
        raise _ObstacleError("the logits are not a matrix")
    if not _large(logits):
        raise _ObstacleError("the logits are small")
    chain = list(_chain(given["input"], logits.shape[-1]))
    softmaxes = sum(_is_log_softmax(n) for n in chain)
    if softmaxes != (loss.target is F.nll_loss):
        raise _ObstacleError("not one softmax")
    linear = _linear(chain[-1])
    if linear is None:
        raise _ObstacleError("the logits are not what a linear layer gives")
    return _Head(loss, given, chain[::-1], linear)


def _large(logits: torch.Tensor) -> bool:
    """Sizes that are not known are taken as they were when the graph was captured."""
    rows, classes = (s if isinstance(s, int) else s.node.hint or 0 for s in logits.shape)
    return classes >= MIN_CLASSES and rows * classes * logits.dtype.itemsize >= MIN_BYTES


def _chain(node: fx.Node, classes: Any) -> Iterator[fx.Node]:
    """The nodes from the loss's input up to one that neither casts nor only touches rows."""
    while True:
        if len(node.users) != 1:
            raise _ObstacleError("the logits have another use")
        yield node
        if not (_is_cast(node) or _is_log_softmax(node) or _is_row_step(node, classes)):
            return
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source


def _is_cast(node: fx.Node) -> bool:
    """Whether the node casts to a type that holds all values of the old one. Raises _ObstacleError for a narrower type."""
    if node.op != "call_method" or node.target not in CASTS or _is_log_softmax(node):
        return False
    return _widens(node)


def _widens(node: fx.Node) -> bool:
    before, after = example(node.args[0]), example(node)
    if before is None or after is None or before.device != after.device:
        return False
    if torch.promote_types(before.dtype, after.dtype) != after.dtype:
        raise _ObstacleError("the logits are rounded to a narrower type")
    return True


def _is_log_softmax(node: fx.Node) -> bool:
    """Whether the node is a logarithmic softmax over the last dimension."""
    if node.target not in LOG_SOFTMAX or node.op not in ("call_function", "call_method"):
        return False
    before = example(node.args[0]) if node.args else None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return before is not None and dim in (-1, before.dim() - 1) and _widens(node)


def _is_row_step(node: fx.Node, classes: Any) -> bool:
    """Whether the node selects or reshapes rows of `classes` elements, each row staying in one piece."""
    before, after = (example(node.args[0]) if node.args else None), example(node)
    if before is None or after is None or before.dim() == 0 or after.dim() == 0 or node.kwargs:
        return False
    if not (known_equal(before.shape[-1], classes) and known_equal(after.shape[-1], classes)):
        return False
    if node.op == "call_function":
        return node.target is operator.getitem and _spares_last(node.args[1], before.dim())
    if node.op == "call_method" and node.target in RESHAPES:
        return all(isinstance(s, int | fx.Node) for s in _sizes(node))
    return node.op == "call_method" and (node.target == "flatten" or (node.target == "contiguous" and len(node.args) == 1))


def _spares_last(index: Any, dims: int) -> bool:
    """Whether an index (integers, slices, an ellipsis) takes the last of `dims` dimensions whole."""
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        literal = part is Ellipsis or isinstance(part, slice) or (isinstance(part, int) and not isinstance(part, bool))
        if not literal and (not isinstance(part, fx.Node) or example(part) is not None):
            return False
    reaches_last = Ellipsis in parts or len(parts) == dims
    return not reaches_last or parts[-1] is Ellipsis or parts[-1] == slice(None)


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of `view` and `reshape`, given as numbers or as a tuple of them."""
    sizes = node.args[1:]
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes


def _linear(node: fx.Node) -> _Linear | None:
    """The operands if the node is a linear layer in one of its spellings."""
    if node.op != "call_function" or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    args: tuple[Any, ...] = node.args
    if node.target is F.linear and not node.kwargs.keys() - {"bias"}:
        return _Linear(node, args[0], args[1], args[2] if len(args) > 2 else node.kwargs.get("bias"))  # type: ignore[arg-type]
    if node.kwargs:
        return None
    if node.target in MATMULS and len(args) == 2:
        return _product(node, args[0], args[1])
    if node.target is torch.addmm and len(args) == 3 and _is_vector(args[0], node):
        return _with_bias(_product(node, args[1], args[2]), args[0])
    if node.target is torch.add and len(args) == 2 and _is_vector(args[1], node) and len(args[0].users) == 1:
        return _with_bias(_linear(args[0]), args[1])
    return None


def _product(node: fx.Node, hidden: fx.Node, weight: fx.Node) -> _Linear | None:
    shape = example(weight)
    if shape is None or shape.dim() != 2:
        return None
    source = _transposed(weight)
    return _Linear(node, hidden, weight, transposed=True) if source is None else _Linear(node, hidden, source)


def _with_bias(product: _Linear | None, bias: fx.Node) -> _Linear | None:
    return replace(product, bias=bias) if product is not None and product.bias is None else None


def _is_vector(bias: fx.Node, logits: fx.Node) -> bool:
    """Whether `bias` has one element per class."""
    x, out = example(bias), example(logits)
    return x is not None and out is not None and x.dim() == 1 and known_equal(x.shape[0], out.shape[-1])


def _transposed(node: fx.Node) -> fx.Node | None:
    """The matrix of which the node is the transpose."""
    if not node.args or not isinstance(node.args[0], fx.Node) or node.kwargs:
        return None
    rest = node.args[1:]
    if node.op == "call_method":
        found = (node.target == "t" and not rest) or (node.target == "permute" and rest in ((1, 0), ((1, 0),)))
    else:
        found = (node.target is getattr and rest in (("T",), ("mT",))) or (node.target is torch.t and not rest)
        found = found or (node.target is torch.transpose and rest in ((0, 1), (1, 0), (-1, -2), (-2, -1)))
    return node.args[0] if found else None


# ---------------------------------------------------------------------- what is refused


def _check(head: _Head, modes: dict[fx.Node, bool]) -> None:
    """Raises _ObstacleError for a head that the op would compute differently from eager, or in another place."""
    given, nodes = head.given, [head.loss, *head.chain, head.linear.product]
    labels, class_weight = example(given["target"]), example(given["weight"])
    values = [example(n) for n in (*head.linear.operands, *nodes)]
    tensors = [x for x in (*values, labels, class_weight) if x is not None]
    if any(map(is_special, tensors)):
        raise _ObstacleError("a tensor subclass, a transformed or a nested tensor")
    if None in values or any(example(n).dtype not in DTYPES for n in head.linear.operands):  # type: ignore[union-attr]
        raise _ObstacleError("an operand that is not a floating tensor")
    if labels is None or labels.dim() != 1 or labels.dtype != torch.int64:
        raise _ObstacleError("labels that are not class numbers")
    if given["size_average"] is not None or given["reduce"] is not None or given["reduction"] not in ("mean", "sum", "none"):
        raise _ObstacleError("the reduction is not named")
    if not isinstance(given["ignore_index"], int) or not isinstance(given["label_smoothing"], int | float):
        raise _ObstacleError("a parameter that is not a literal")
    if not 0.0 <= given["label_smoothing"] <= 1.0:
        raise _ObstacleError("label smoothing outside of [0, 1]")
    if class_weight is not None and (class_weight.requires_grad or class_weight.dim() != 1):
        raise _ObstacleError("class weights with a gradient")
    if len({modes[n] for n in nodes}) != 1:
        raise _ObstacleError("the grad mode changes before the loss")
    if any(map(_writes, _between(head.linear.product, head.loss))):
        raise _ObstacleError("a tensor is written before the loss")


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _writes(node: fx.Node) -> bool:
    """Whether a call may write into a tensor: the product moves behind it, and its operands must not have changed.

    Custom and higher-order ops are not looked into.
    """
    target = node.target
    if isinstance(target, _PACKET) or ops.is_overload(target) or ops.is_higher_order(target):
        return True
    if node.op == "call_module" or "out" in node.kwargs or node.kwargs.get("inplace"):
        return True
    name = str(target) if node.op == "call_method" else getattr(target, "__name__", "")
    in_place = getattr(operator, name, None) is target and name.startswith("i") and name[1:] in _AUGMENTED
    return in_place or target is operator.setitem or (name.endswith("_") and not name.endswith("__"))


_AUGMENTED = frozenset("add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split())
"""Operators that have a form in place, whose name has an "i" before it."""

_PACKET = type(torch.ops.aten.add)


# ---------------------------------------------------------------------- what it becomes


def _rewrite(context: Context, head: _Head) -> None:
    loss, linear, given = head.loss, head.linear, head.given
    logits = example(head.chain[0])
    value = example(loss)
    assert logits is not None and value is not None
    graph = context.graph.gm.graph
    with graph.inserting_before(loss):
        hidden = _cast(graph, linear.hidden, logits.dtype)
        weight = _cast(graph, linear.weight, logits.dtype)
        bias = None if linear.bias is None else _cast(graph, linear.bias, logits.dtype)
        if linear.transposed:
            weight = graph.call_method("t", (weight,))
        for step in head.chain[1:]:
            hidden = _on_hidden(graph, step, hidden, linear.hidden)
        settings = (given["reduction"], given["ignore_index"], float(given["label_smoothing"]), value.dtype)
        new = graph.call_function(chunked, (hidden, weight, bias, given["target"], given["weight"], *settings))
    new.meta = {**loss.meta, "pass": context.pass_name}
    loss.replace_all_uses_with(new)
    for node in dict.fromkeys((loss, *reversed(head.chain), linear.product)):
        graph.erase_node(node)


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """`node` as autocast hands it to the linear layer, which is known by the dtype of its result."""
    value = example(node)
    return node if value is None or value.dtype == dtype else graph.call_method("to", (node, dtype))


def _on_hidden(graph: fx.Graph, step: fx.Node, hidden: fx.Node, source: fx.Node) -> fx.Node:
    """What `step` does to rows of logits, done to rows of `hidden`, whose last dimension is that of `source`."""
    if step.op == "call_function" and step.target is operator.getitem:
        return graph.call_function(operator.getitem, (hidden, step.args[1]))
    if step.op == "call_method" and step.target == "flatten":
        return graph.call_method("flatten", (hidden, *step.args[1:]))
    if step.op == "call_method" and step.target in RESHAPES:
        *sizes, last = _sizes(step)
        return graph.call_method("reshape", (hidden, *sizes, -1 if last == -1 else _last_size(graph, source)))
    return hidden


def _last_size(graph: fx.Graph, node: fx.Node) -> Any:
    value = example(node)
    assert value is not None
    size = value.shape[-1]
    return size if isinstance(size, int) else graph.call_method("size", (node, -1))
