"""A captured ATen graph with what is known of its inputs."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.ir.exprs import Int


class Phase(enum.Enum):
    """Where in autograd a graph stands. `EARLY` is the Dynamo graph before AOTAutograd; the others are functional ATen
    graphs. `JOINT` is forward and backward before they are split.
    """

    EARLY = "early"
    JOINT = "joint"
    INFERENCE = "inference"
    FORWARD = "forward"
    BACKWARD = "backward"


class Role(enum.Enum):
    """What an input is. Only CONSTANT inputs may be folded; STATE is written in place; a PARAMETER keeps its address."""

    USER = "user"
    PARAMETER = "parameter"
    CONSTANT = "constant"
    STATE = "state"


@dataclass
class Input:
    """One placeholder. `value` is the tensor itself for CONSTANT inputs (frozen), else None."""

    name: str
    role: Role
    value: torch.Tensor | None = None


@dataclass
class Graph:
    """An FX graph whose nodes are call_function of OpOverloads (or higher-order ops), one Input per placeholder, in order.

    Every node has meta["val"]: a FakeTensor, a (Sym)int/float/bool, or a tuple/list of them. meta["module"] is the qualified
    name of the module the node came from ("" when unknown). `to_int` turns an int or SymInt of any meta["val"] into an `Int`
    (UnsupportedError when it cannot); below capture nothing else looks into a SymInt. `saved` is how many trailing
    outputs of a FORWARD graph are activations kept for the backward. `name` labels reports and dumps ("graph 0 forward").
    """

    gm: fx.GraphModule
    inputs: list[Input]
    phase: Phase
    name: str
    to_int: Callable[[Any], Int] = int
    saved: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
