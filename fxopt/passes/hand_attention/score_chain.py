"""The spellings of what lies between the two products of written-out attention, in Dynamo's graph after canonical_calls.

Before the softmax: scales, additive masks, fills, casts and views of the scores. After it: casts, views and a dropout.
`before` and `after` read these chains; each returns None where there is no attention.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.ir.spec import known_equal
from fxopt.passes.dynamo_facts import example
from fxopt.passes.hand_attention.products import Operand, Product, bind, products
from fxopt.passes.hand_attention.score_mask import Added, Filled, Lead
from fxopt.passes.sizes import Sizes

SOFTMAX: dict[Any, tuple[str, ...]] = {
    F.softmax: ("input", "dim", "_stacklevel", "dtype"),
    torch.softmax: ("input", "dim", "dtype"),
    torch.special.softmax: ("input", "dim", "dtype"),
}
"""Call target -> names of its positional parameters."""

DROPOUT: dict[Any, tuple[str, ...]] = {
    F.dropout: ("input", "p", "training", "inplace"),
    torch.dropout: ("input", "p", "train"),
}

TRANSPARENT = frozenset(
    "to type type_as float half bfloat16 view reshape view_as reshape_as flatten unflatten contiguous".split()
)
"""Methods that leave the values, rounding aside, and the order of the elements as they are."""


@dataclass(frozen=True)
class Before:
    """A product and what is done to it, in order, up to the softmax; `scale` is the product's own, all of it. With a `cap`
    the scaled product is replaced by `cap` times its tanh, before any mask. `factors` [.., 1, 1], of heads, multiply the
    product, too."""

    product: Product
    nodes: tuple[fx.Node, ...]
    scale: float
    masks: tuple[Added | Filled, ...]
    cap: float | None = None
    factors: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class After:
    """What is done to the probabilities up to the second product, in order, that product last; each becomes zero with
    probability `drop`."""

    nodes: tuple[fx.Node, ...]
    product: Product
    drop: float


@dataclass(frozen=True)
class _Scaled:
    factor: float


def softmax_dim(softmax: fx.Node) -> Any:
    """The `dim` that a softmax is given."""
    return bind(softmax, SOFTMAX[softmax.target]).get("dim")


@dataclass(frozen=True)
class _Bent:
    """By tanh."""


@dataclass(frozen=True)
class _ScaledByHead:
    """By a tensor [.., 1, 1], such as Swin 2's learned temperature."""

    factor: fx.Node


_Effect = Added | Filled | _Scaled | _ScaledByHead | _Bent | None


def after(softmax: fx.Node) -> After | None:
    """The way from a softmax to a product of it, along the first user that leads there."""
    for user in softmax.users:
        for product in products(user):
            if product.first == Operand(softmax) and product.added is None and product.scale == 1:
                return After((user,), product, drop=0.0)
        drops = _drops(user, softmax)
        if drops is None and not _is_transparent(user, softmax):
            continue
        rest = after(user)
        if rest is not None and not (rest.drop and drops):
            return After((user, *rest.nodes), rest.product, rest.drop or drops or 0.0)
    return None


def before(softmax: fx.Node, sizes: Sizes) -> Before | None:
    """The way from a product to what a softmax is taken of."""
    traced = _trace(bind(softmax, SOFTMAX[softmax.target]).get("input"), sizes, set())
    if traced is None:
        return None
    product, steps = traced
    scale, masks, cap, factors = 1.0, list[Added | Filled](), None, list[fx.Node]()
    for _, effect in reversed(steps):  # what is done later scales what was done before
        if cap is not None and isinstance(effect, Added | Filled | _Bent):
            return None
        if factors and isinstance(effect, Added | Filled | _Bent):
            return None  # a factor is that of the product alone
        if isinstance(effect, _ScaledByHead):
            factors.append(effect.factor)
        if isinstance(effect, _Bent):
            scale, cap = 1.0, scale
        elif isinstance(effect, Added):
            masks.insert(0, replace(effect, factor=effect.factor * scale))
        elif isinstance(effect, Filled):
            masks.insert(0, replace(effect, value=effect.value * scale))
        elif isinstance(effect, _Scaled):
            scale *= effect.factor
    if not all(_fits(factor, steps[0][0]) for factor in factors):
        return None
    return Before(product, tuple(node for node, _ in steps), product.scale * scale, tuple(masks), cap, tuple(factors))


def _fits(factor: fx.Node, product: fx.Node) -> bool:
    """Whether a factor of heads broadcasts to the product itself, which views may have changed before it was applied."""
    one, all_ = example(factor), example(product)
    if one is None or all_ is None or one.dim() > all_.dim():
        return False
    pairs = zip(one.shape[:-2][::-1], all_.shape[:-2][::-1], strict=False)
    return all(known_equal(n, 1) or known_equal(n, size) for n, size in pairs)


def _trace(node: Any, sizes: Sizes, seen: set[fx.Node]) -> tuple[Product, list[tuple[fx.Node, _Effect]]] | None:
    """The product that the scores `node` come from, and every call from there on with its effect."""
    shown = example(node)
    if shown is None or shown.dim() < 2 or node in seen:
        return None
    seen.add(node)
    lead = tuple(shown.shape[:-2])
    for product in products(node):
        if product.order is None:
            added = product.added
            return product, [(node, None if added is None else Added(added, product.added_scale, lead))]
    for source, effect in _readings(node, lead, sizes):
        traced = _trace(source, sizes, seen)
        if traced is not None:
            return traced[0], [*traced[1], (node, effect)]
    return None


def _readings(node: fx.Node, lead: Lead, sizes: Sizes) -> Iterator[tuple[Any, _Effect]]:
    """Every way to read a call as one on scores: the scores, and what is done to them."""
    if node.op == "call_method" and _is_transparent(node, node.args[0]):
        yield node.args[0], None
    reader = READERS.get(ALIASES.get(node.target, node.target))
    if reader is not None:
        yield from reader(node, lead, sizes.number)


_Number = Callable[[Any], float | None]
_Reader = Callable[[fx.Node, Lead, _Number], Iterator[tuple[Any, _Effect]]]


def _scaled(node: fx.Node, lead: Lead, number: _Number) -> Iterator[tuple[Any, _Effect]]:
    given = bind(node, ("input", "other"))
    for scores, factor in ((given["input"], given["other"]), (given["other"], given["input"])):
        if example(factor) is None or number(factor) is not None:
            yield scores, _Scaled(_factor(factor, number))
        elif isinstance(factor, fx.Node) and _is_of_heads(factor, scores):
            yield scores, _ScaledByHead(factor)


def _is_of_heads(factor: fx.Node, scores: Any) -> bool:
    """Whether a factor is one number for all scores of a head, as a product's query can have it instead."""
    one, all_ = example(factor), example(scores)
    if one is None or all_ is None or one.dim() < 2 or one.dim() > all_.dim() or not one.is_floating_point():
        return False
    return all(known_equal(n, 1) for n in one.shape[-2:]) and not all(known_equal(n, 1) for n in all_.shape[-2:])


def _divided(node: fx.Node, lead: Lead, number: _Number) -> Iterator[tuple[Any, _Effect]]:
    given = bind(node, ("input", "other"))
    if given.get("rounding_mode") is None and (example(given["other"]) is None or number(given["other"]) is not None):
        divisor = _factor(given["other"], number)
        yield given["input"], _Scaled(1 / divisor if divisor else math.nan)


def _factor(x: Any, number: _Number) -> float:
    """A scale; NaN for one that is computed from symbolic sizes."""
    known = number(x)
    return math.nan if known is None else known


def _added(node: fx.Node, lead: Lead, number: _Number, sign: int = 1) -> Iterator[tuple[Any, _Effect]]:
    given = bind(node, ("input", "other"))
    one, other, alpha = given["input"], given["other"], number(given.get("alpha", 1))
    if alpha is not None and example(one) is not None and example(other) is not None:
        yield one, Added(other, sign * alpha, lead)
        if sign * alpha == 1:
            yield other, Added(one, 1.0, lead)


def _subtracted(node: fx.Node, lead: Lead, number: _Number) -> Iterator[tuple[Any, _Effect]]:
    return _added(node, lead, number, sign=-1)


def _bent(node: fx.Node, lead: Lead, number: _Number) -> Iterator[tuple[Any, _Effect]]:
    yield bind(node, ("input",))["input"], _Bent()


def _masked(node: fx.Node, lead: Lead, number: _Number) -> Iterator[tuple[Any, _Effect]]:
    given = bind(node, ("input", "mask", "value"))
    if (value := number(given["value"])) is not None:
        yield given["input"], Filled(given["mask"], False, value, lead)


def _selected(node: fx.Node, lead: Lead, number: _Number) -> Iterator[tuple[Any, _Effect]]:
    given = bind(node, ("condition", "input", "other"))
    if len(given) < 3:
        return
    for scores, fill, inverted in ((given["input"], given["other"], True), (given["other"], given["input"], False)):
        if (value := number(fill)) is not None:
            yield scores, Filled(given["condition"], inverted, value, lead)


READERS: dict[Any, _Reader] = {
    torch.mul: _scaled,
    torch.div: _divided,
    torch.add: _added,
    torch.sub: _subtracted,
    torch.masked_fill: _masked,
    torch.where: _selected,
    torch.tanh: _bent,
}
"""Function -> how it is read as a call on scores."""

ALIASES: dict[Any, Any] = {
    operator.mul: torch.mul,  # with a literal first: canonical_calls leaves these
    operator.imul: torch.mul,
    "mul_": torch.mul,
    operator.itruediv: torch.div,
    "div_": torch.div,
    torch.true_divide: torch.div,
    operator.iadd: torch.add,
    "add_": torch.add,
    operator.isub: torch.sub,
    "sub_": torch.sub,
    "masked_fill_": torch.masked_fill,
    F.tanh: torch.tanh,
    "tanh": torch.tanh,
    "tanh_": torch.tanh,
}
"""Call target -> the function of READERS it stands for; in place or not makes no difference to a value used once."""


def _is_transparent(node: fx.Node, operand: Any) -> bool:
    if node.op != "call_method" or node.target not in TRANSPARENT or node.args[0] is not operand:
        return False
    return node.target != "view" or not isinstance(node.args[1], torch.dtype)  # that reinterprets the bytes


def _drops(node: fx.Node, operand: fx.Node) -> float | None:
    """With which probability a dropout of `operand` drops; None for other calls, and where it is not known."""
    if node.target not in DROPOUT:
        return None
    given = bind(node, DROPOUT[node.target])
    probability, training = given.get("p", 0.5), given.get("training", given.get("train", True))
    if given.get("input") is not operand or not isinstance(probability, int | float):
        return None
    return float(probability) if training else 0.0
