"""The layers of a graph: products and convolutions with a frozen weight, by names that users know.

A layer is called as the module that it was captured from; in a graph where that module computes several, the second is
`name#1`, the third `name#2`. So a layer has one name in calibration, in options, in tables and in reports, whatever the
sizes of a batch and however Dynamo splits the model: a module that several graphs call is one layer.

Attention is a layer of its own kind: `fxopt::attention` is called as the module that it is captured from, with "@attention"
after it (then `@attention#1`), and what it is given has names as well (`...@attention.query`, `.key`, `.value`).

Layers are looked for where decisions about them are made, after folding has made of a weight's casts one constant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.attention_op import attention
from fxopt.ir.graph import Graph, Role

aten = torch.ops.aten

LINEAR, CONVOLUTION, ATTENTION = "linear", "convolution", "attention"

OPERANDS = ("query", "key", "value")
"""Of attention: what is observed, each with a name of its own in tables."""

AT_ATTENTION = "@attention"

CHANNEL = 1
"""The dimension of what a layer is given that holds its features or channels."""


@dataclass(frozen=True)
class Layer:
    """One layer of a graph. `shape` is that of the weight as modules have it: [N, K] of a linear layer, and of a convolution
    [C_out, C_in, ...].

    The operands are the node's at the time they are asked for, so that earlier layers may have been rewritten.
    """

    name: str
    kind: str
    node: fx.Node
    shape: tuple[int, ...]

    @property
    def x(self) -> fx.Node:
        """What it is given: [M, K] of a linear layer, images [N, C, ...] of a convolution."""
        return _operands(self.node)[0]

    @property
    def weight(self) -> fx.Node:
        """A view of a frozen input: [K, N] of a linear layer, as `aten::mm` takes it, else as `shape` says."""
        return _operands(self.node)[1]

    @property
    def addend(self) -> fx.Node | None:
        """What the product is added to (addmm), or a convolution's bias."""
        return _operands(self.node)[2]


@dataclass(frozen=True)
class AttentionLayer:
    """One call of `fxopt::attention` in a graph."""

    name: str
    node: fx.Node

    @property
    def operands(self) -> dict[str, fx.Node]:
        """By the names OPERANDS: query [B, H, S, E], key [B, G, T, E] and value [B, G, T, Ev]."""
        given = zip(OPERANDS, self.node.args, strict=False)
        return {name: x for name, x in given if isinstance(x, fx.Node)}

    def operand_name(self, operand: str) -> str:
        """What the table calls one of OPERANDS."""
        return f"{self.name}.{operand}"


def attention_of(name: str) -> str | None:
    """The name of the attention layer that has an operand of this name; None for other names."""
    layer, _, operand = name.rpartition(".")
    return layer if operand in OPERANDS and AT_ATTENTION in layer else None


def attention_layers(graph: Graph) -> list[AttentionLayer]:
    """In the order of the graph."""
    seen: Counter[str] = Counter()
    found = []
    for node in graph.gm.graph.nodes:
        if node.target is attention and len(node.args) >= len(OPERANDS):
            module = node.meta.get("module", "")
            found.append(AttentionLayer(attention_name(module, seen[module]), node))
            seen[module] += 1
    return found


def attention_name(module: str, before: int) -> str:
    """Of a module's attention, before which it has computed some others."""
    return f"{module}{AT_ATTENTION}#{before}" if before else f"{module}{AT_ATTENTION}"


def layers(graph: Graph) -> list[Layer]:
    """In the order of the graph."""
    placeholders = (n for n in graph.gm.graph.nodes if n.op == "placeholder")
    frozen = {n for n, given in zip(placeholders, graph.inputs, strict=True) if given.role is Role.CONSTANT}
    seen: Counter[str] = Counter()
    found = []
    for node in graph.gm.graph.nodes:
        kind = _kind(node)
        if kind is None:
            continue
        x, weight, _ = _operands(node)
        shape = weight.meta["val"].shape
        if x in frozen or not is_view_of(weight, frozen) or not all(isinstance(size, int) for size in shape):
            continue
        module = node.meta.get("module", "")
        name = f"{module}#{seen[module]}" if seen[module] else module
        seen[module] += 1
        found.append(Layer(name, kind, node, tuple(reversed(shape)) if kind == LINEAR else tuple(shape)))
    return found


def _kind(node: fx.Node) -> str | None:
    if node.target is aten.mm.default or (node.target is aten.addmm.default and not node.kwargs):
        return LINEAR
    return CONVOLUTION if node.target is aten.convolution.default else None


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """x, weight and addend of a node that has a kind."""
    if node.target is aten.mm.default:
        return node.args[0], node.args[1], None
    if node.target is aten.addmm.default:
        return node.args[1], node.args[2], node.args[0]
    return node.args[0], node.args[1], node.args[2]


def is_view_of(node: fx.Node, sources: Collection[fx.Node]) -> bool:
    """Whether `node` is one of `sources`, or made of one by views alone."""
    while node not in sources:
        if node.op != "call_function" or not ops.is_view(node.target) or len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return True
