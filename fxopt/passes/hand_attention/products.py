"""The spellings of a batched matrix product in Dynamo's graph, after canonical_calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.ops import is_overload
from fxopt.passes.dynamo_facts import example

Order = tuple[int, ...] | None
"""A permutation of dimensions; None is the one that changes nothing."""


@dataclass(frozen=True)
class Operand:
    """A tensor, and the permutation that brings it to [*batch, rows, columns]."""

    node: fx.Node
    order: Order = None


@dataclass(frozen=True)
class Product:
    """scale * (first @ second) + added * added_scale: [*batch, rows, columns], then permuted by `order`."""

    first: Operand
    second: Operand
    order: Order = None
    scale: float = 1.0
    added: fx.Node | None = None
    added_scale: float = 1.0

    @property
    def operands(self) -> tuple[fx.Node, fx.Node]:
        return self.first.node, self.second.node


def bind(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments that a call gives, by name; `names` are those of the positional ones, in order."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def products(node: fx.Node) -> Iterator[Product]:
    """Every way to read a call as a product of two batched matrices: none for other calls, several for an einsum."""
    if node.op != "call_function" or is_overload(node.target):
        return
    if node.target in PLAIN:
        yield from _plain(bind(node, PLAIN[node.target]), PLAIN[node.target])
    elif node.target is torch.baddbmm:
        yield from _baddbmm(bind(node, ("input", "batch1", "batch2")))
    elif node.target is torch.einsum:
        yield from _einsum(*node.args)


PLAIN = {torch.matmul: ("input", "other"), torch.bmm: ("input", "mat2")}
"""Function -> names of its parameters."""


def _plain(given: dict[str, Any], names: tuple[str, str]) -> Iterator[Product]:
    nodes = [x for name in names if isinstance(x := given.get(name), fx.Node)]
    if len(nodes) == len(given) == 2 and all((shown := example(x)) is not None and shown.dim() >= 2 for x in nodes):
        yield Product(Operand(nodes[0]), Operand(nodes[1]))


def _baddbmm(given: dict[str, Any]) -> Iterator[Product]:
    beta, alpha = given.get("beta", 1), given.get("alpha", 1)
    nodes = [x for name in ("batch1", "batch2", "input") if isinstance(x := given.get(name), fx.Node)]
    if len(nodes) == 3 and all(isinstance(x, int | float) for x in (beta, alpha)):
        first, second, added = nodes
        yield Product(Operand(first), Operand(second), None, alpha, added if beta != 0 else None, beta)


def _einsum(equation: Any, *operands: Any) -> Iterator[Product]:
    nodes = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or len(nodes) != 2 or not all(isinstance(n, fx.Node) for n in nodes):
        return
    left, arrow, out = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    if not arrow or len(letters) != 2 or not all(s.isalpha() and len(set(s)) == len(s) for s in (*letters, out)):
        return
    for i, j in ((0, 1), (1, 0)):
        for batch_order in dict.fromkeys((letters[i], out)):
            read = _read(letters[i], letters[j], out, batch_order)
            if read is not None:
                first, second, order = read
                yield Product(Operand(nodes[i], first), Operand(nodes[j], second), order)


def _read(first: str, second: str, out: str, batch_order: str) -> tuple[Order, Order, Order] | None:
    """The three permutations of an einsum over one letter, its batch letters taken in the order of `batch_order`."""
    f, s, o = set(first), set(second), set(out)
    batch = [x for x in batch_order if x in f & s & o]
    inner, rows, columns = f & s - o, f & o - s, s & o - f
    if not len(inner) == len(rows) == len(columns) == 1 or len(f | s | o) != len(batch) + 3:
        return None
    (i,), (r,), (c,) = inner, rows, columns
    product = [*batch, r, c]
    return (
        _order(tuple(first.index(x) for x in (*batch, r, i))),
        _order(tuple(second.index(x) for x in (*batch, i, c))),
        _order(tuple(product.index(x) for x in out)),
    )


def _order(permutation: tuple[int, ...]) -> Order:
    return None if permutation == tuple(range(len(permutation))) else permutation
