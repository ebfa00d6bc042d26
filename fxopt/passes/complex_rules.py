"""What becomes of each complex op when its operands are pairs; `complex_pairs` walks the graph and keeps the books.

A rule takes (pairs, node) and emits the twin of a complex result, or the value of a real one. It raises CannotError, with
the reason, for a node that has to stay as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.passes.facts import arguments, escapes, tensor

if TYPE_CHECKING:
    from fxopt.passes.complex_pairs import Pairs

aten = torch.ops.aten
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
"""Complex dtypes with pairs, and the dtype of those."""

Part = fx.Node | float
PairRule = Callable[["Pairs", fx.Node], fx.Node]

_TENSOR_FORM = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.sum.default: aten.sum.dim_IntList,
    aten.mean.default: aten.mean.dim,
    aten.where.ScalarOther: aten.where.self,
    aten.where.ScalarSelf: aten.where.self,
}


class CannotError(Exception):
    """Why a node keeps its complex form."""


def is_complex(node: Any) -> bool:
    value = tensor(node)
    return value is not None and value.is_complex()


def _real(node: fx.Node) -> torch.dtype:
    """The dtype of a complex result's pairs."""
    return REAL[node.meta["val"].dtype]


# --- complex results: the twin


def product(p: Pairs, node: fx.Node) -> fx.Node:
    dtype = _real(node)
    (a, b), (c, d) = sorted((p.parts(x, dtype) for x in node.args[:2]), key=lambda parts: isinstance(parts[0], float))
    re = p.call(aten.sub.Tensor, p.times(a, c), p.times(b, d))
    return p.pair(re, p.call(aten.add.Tensor, p.times(a, d), p.times(b, c)))


def quotient(p: Pairs, node: fx.Node) -> fx.Node:
    """a / b, and 1 / b of `reciprocal`."""
    dtype = _real(node)
    a, b = node.args if len(node.args) == 2 else (1.0, node.args[0])
    if isinstance(b, int | float):
        return p.call(aten.div.Tensor, p.value(a, dtype), b)
    if isinstance(b, fx.Node) and not is_complex(b):
        return p.call(aten.div.Tensor, p.value(a, dtype), p.call(aten.unsqueeze.default, p.parts(b, dtype)[0], -1))
    (x, y), (c, d) = p.tensors(a, dtype), p.tensors(b, dtype)
    first = p.call(aten.ge.Tensor, p.call(aten.abs.default, c), p.call(aten.abs.default, d))

    def choose(this: fx.Node, that: fx.Node) -> fx.Node:
        return p.call(aten.where.self, first, this, that)

    def add_product(op: Any, x: fx.Node, y: fx.Node) -> fx.Node:
        return p.call(op, x, p.call(aten.mul.Tensor, y, ratio))

    large, small, u, v = choose(c, d), choose(d, c), choose(x, y), choose(y, x)
    ratio = p.call(aten.div.Tensor, small, large)
    scale = add_product(aten.add.Tensor, large, small)
    im = add_product(aten.sub.Tensor, v, u)
    im = choose(im, p.call(aten.neg.default, im))
    return p.pair(*(p.call(aten.div.Tensor, part, scale) for part in (add_product(aten.add.Tensor, u, v), im)))


def conjugate(p: Pairs, node: fx.Node) -> fx.Node:
    re, im = p.tensors(node.args[0], _real(node))
    return p.pair(re, p.call(aten.neg.default, im))


def from_parts(p: Pairs, node: fx.Node) -> fx.Node:
    return p.pair(*(p.cast(x, _real(node)) for x in node.args))  # type: ignore[arg-type]


def from_angle(p: Pairs, node: fx.Node) -> fx.Node:
    size, angle = (p.cast(x, _real(node)) for x in node.args)  # type: ignore[arg-type]
    return p.pair(*(p.call(aten.mul.Tensor, size, p.call(f, angle)) for f in (aten.cos.default, aten.sin.default)))


def constant(p: Pairs, node: fx.Node) -> fx.Node:
    given: dict[str, Any] = {"size": [], **arguments(node)}
    named = {"zeros": 0, "ones": 1}.get(ops.name_of(node.target))
    size, number = given["size"], given.get("fill_value", given.get("s", named))
    if not isinstance(number, int | float | complex):
        raise CannotError("a value known at run time")
    return p.pair(*(p.full(size, part, _real(node)) for part in (complex(number).real, complex(number).imag)))


def converted(p: Pairs, node: fx.Node) -> fx.Node:
    held = tensor(node.args[0])
    if held is None or held.device != node.meta["val"].device:
        raise CannotError("another device")
    return p.call(aten.clone.default, p.value(node.args[0], _real(node)))


def same_view(p: Pairs, node: fx.Node) -> fx.Node:
    return _same_call(p, node, p.raw)


def same_op(p: Pairs, node: fx.Node) -> fx.Node:
    return _same_call(p, node, lambda operand: p.value(operand, _real(node)))


def _same_call(p: Pairs, node: fx.Node, of: Callable[[Any], fx.Node]) -> fx.Node:
    """The op of `node` on the pairs of its operands, which `of` gives; dimensions are counted from the front."""
    name, given = ops.name_of(node.target), arguments(node)
    target: Any = _TENSOR_FORM.get(node.target, node.target)  # type: ignore[call-overload]
    if name in ("cat", "stack"):
        operands, rank = given["tensors"], max(x.meta["val"].dim() for x in given["tensors"])
        given["tensors"] = [of(x) for x in operands]
    else:
        rank = max(tensor(x).dim() for x in node.args if tensor(x) is not None)  # type: ignore[union-attr]
        given.update({key: of(given[key]) for key in ("self", "other", "src") if key in given})
    around = rank + (name in ("stack", "unsqueeze"))
    if name in ("sum", "mean"):
        given["dim"] = given.get("dim") or list(range(rank))
        if rank == 0:
            del given["dim"]
            return p.call(aten.clone.default, given["self"])
    if name == "t":
        return p.call(aten.permute.default, given["self"], [*reversed(range(rank)), rank])
    if name == "constant_pad_nd" and given["value"] != 0:
        raise CannotError("padding that is not zero")
    for key in {"dim", "dims", "dim0", "dim1"} & given.keys():
        where = given[key]
        if around == 0:
            raise CannotError("a dimension of a tensor that has none")
        given[key] = [d % around for d in where] if isinstance(where, list | tuple) else where % around
    if name == "roll" and not given["dims"]:
        raise CannotError("a roll of the flattened tensor")
    if name == "permute":
        given["dims"] = [*given["dims"], rank]
    for key, more in (("size", [2]), ("repeats", [1])):
        if key in given:
            given[key] = [*given[key], *more]
    if "pad" in given:
        given["pad"] = [0, 0, *given["pad"]]
    if name == "where":
        given["condition"] = p.call(aten.unsqueeze.default, given["condition"], -1)
    kwargs = {key: given[key] for key in ("alpha", "implicit") if key in given}
    args = [given[a.name] for a in ops.schema(target).arguments if not a.kwarg_only and a.name in given]
    return p.call(target, *args, **kwargs)


# --- real results of complex operands


def as_real(p: Pairs, node: fx.Node) -> fx.Node:
    """view_as_real of what has pairs anyhow; of an input it stays what it is."""
    operand: Any = node.args[0]
    if operand not in p.rewritten and operand.target not in (aten._conj.default, aten.view_as_complex.default):
        raise CannotError("a free view already")
    return p.raw(operand)


def part(p: Pairs, node: fx.Node) -> fx.Node:
    """real, imag: views."""
    operand: Any = node.args[0]
    imaginary = ops.name_of(node.target) == "imag"
    if imaginary and operand.meta["val"].is_conj():
        raise CannotError("a negated view")
    return p.call(aten.select.int, p.raw(operand), operand.meta["val"].dim(), int(imaginary))


def magnitude(p: Pairs, node: fx.Node) -> fx.Node:
    return p.call(aten.hypot.default, *p.parts(node.args[0], node.meta["val"].dtype))


def angle(p: Pairs, node: fx.Node) -> fx.Node:
    re, im = p.parts(node.args[0], node.meta["val"].dtype)
    return p.call(aten.atan2.default, im, re)


def equality(p: Pairs, node: fx.Node) -> fx.Node:
    a, b = (tensor(x) if isinstance(x, fx.Node) else x for x in node.args)
    dtype = REAL.get(torch.result_type(a, b))  # type: ignore[arg-type]
    if dtype is None:
        raise CannotError("a dtype without pairs")
    (re, im), others = p.tensors(node.args[0], dtype), p.tensors(node.args[1], dtype)
    equal = ops.name_of(node.target) == "eq"
    compare, join = (aten.eq, aten.logical_and) if equal else (aten.ne, aten.logical_or)
    return p.call(join.default, *(p.call(compare.Tensor, x, y) for x, y in zip((re, im), others, strict=True)))


def to_real(p: Pairs, node: fx.Node) -> fx.Node:
    """A conversion that drops the imaginary part."""
    held = node.meta["val"]
    if tensor(node.args[0]).device != held.device:  # type: ignore[union-attr]
        raise CannotError("another device")
    return p.call(aten._to_copy.default, p.parts(node.args[0], _real(node.args[0]))[0], dtype=held.dtype)  # type: ignore[arg-type]


def negated(p: Pairs, node: fx.Node) -> fx.Node:
    """_neg_view, the imaginary part of a conjugate: kernels read memory and see no negative bit."""
    if escapes(node):
        raise CannotError("a view that leaves the graph")
    return p.call(aten.neg.default, node.args[0])


_SAME_VIEW = "view _unsafe_view unsqueeze squeeze permute transpose t expand slice select alias detach".split()
_SAME_OP = (
    "add sub neg clone where cat stack flip roll repeat index index_select sum mean cumsum constant_pad_nd slice_scatter "
    "select_scatter".split()
)

COMPLEX: dict[str, PairRule] = {
    "mul": product,
    "div": quotient,
    "reciprocal": quotient,
    "complex": from_parts,
    "polar": from_angle,
    "full": constant,
    "zeros": constant,
    "ones": constant,
    "scalar_tensor": constant,
    "_to_copy": converted,
    "_conj_physical": conjugate,
    "conj_physical": conjugate,
    **dict.fromkeys(_SAME_VIEW, same_view),
    **dict.fromkeys(_SAME_OP, same_op),
}
"""Op name -> rule, for ops with a complex result."""

CONSUMERS: dict[str, PairRule] = {
    "view_as_real": as_real,
    "real": part,
    "imag": part,
    "abs": magnitude,
    "angle": angle,
    "eq": equality,
    "ne": equality,
    "_to_copy": to_real,
    "_neg_view": negated,
}
"""Op name -> rule, for ops with a real result and a complex operand (_neg_view has a real one)."""
