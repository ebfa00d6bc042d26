"""What each input of a captured graph is: user, parameter, constant or state, and the module a node came from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.capture.private import FakeTensor, is_token, plain_input_index, static_positions
from fxopt.ir.graph import Phase, Role


@dataclass
class InputFacts:
    """What capture learns about one Dynamo graph's inputs; shared by its forward and backward graphs.

    `tensors` are Dynamo's inputs (real tensors, or FakeTensors for intermediate values), until AOTAutograd returns: backward
    graphs are compiled later, and the first batch must not live until then. `static` names the placeholders whose address
    does not change from call to call: parameters, buffers and whatever the user marked static.
    """

    tensors: Sequence[Any] = ()
    static: set[str] = field(default_factory=set)

    def observe(self, gm: fx.GraphModule, phase: Phase) -> None:
        """Take note of static inputs; to be called on an inference or forward graph while AOTAutograd compiles it."""
        if phase is Phase.BACKWARD:
            return
        positions = static_positions()
        inputs = [n for n in gm.graph.find_nodes(op="placeholder") if not is_token(n)]
        self.static |= {n.name for i, n in enumerate(inputs) if i in positions}

    def role(self, node: fx.Node, written: set[fx.Node]) -> Role:
        """STATE when the graph writes it, PARAMETER when its address is fixed, else USER (see freeze.py for CONSTANT)."""
        if node in written:
            return Role.STATE
        return Role.PARAMETER if node.name in self.static else Role.USER

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """The real tensor that `node` stands for at the first call, or None when there is none to be had."""
        index = plain_input_index(node)
        value = self.tensors[index] if index is not None and 0 <= index < len(self.tensors) else None
        return value if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) else None


def written_inputs(gm: fx.GraphModule) -> set[fx.Node]:
    """Placeholders that a trailing `aten.copy_` writes."""
    copies = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return {n.args[0] for n in copies if isinstance(n.args[0], fx.Node)}


_ROOT = re.compile(r"^(?:[LG]\[['\"][^'\"]*['\"]\]|self)\.?")
_GETATTR = re.compile(r"getattr\(([^()]*), ?['\"]([^'\"]*)['\"]\)")
_ITEM = re.compile(r"\[['\"]?([^'\"\]]*)['\"]?\]")


def qualified_name(path: str) -> str:
    """A module's name as in named_modules, from Dynamo's source: "L['self'].layers[0]" gives "layers.0"."""
    while "getattr(" in path and (flat := _GETATTR.sub(r"\1.\2", path)) != path:
        path = flat
    rest = _ITEM.sub(r".\1", _ROOT.sub("", path))
    parts = [part for part in rest.split(".") if part and part != "_modules"]
    return ".".join(parts)


def module_of(node: fx.Node) -> str:
    """Name of the innermost module that `node` (or the forward node it differentiates) came from; "" if unknown."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return qualified_name(path)
