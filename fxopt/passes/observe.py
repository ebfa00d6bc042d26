"""Observers for calibration: the graph tells, beside its results, what its layers are given.

For each different operand of a layer three results are appended: the least and the largest value of each channel (in the
operand's dtype) and the histogram of magnitudes by bits (`fxopt::exponent_histogram`). The first two are ordinary
reductions, which fuse with what makes the operand. If asked for, a fourth result is the histogram of the rows' largest
magnitudes (of an image, of its places'). `graph.notes["observed"]` says in which order: an `Observed` for each operand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxopt.ir.graph import Phase
from fxopt.ir.layers import CHANNEL, Layer, layers
from fxopt.ir.observer_ops import exponent_histogram
from fxopt.passes.context import Context
from fxopt.passes.facts import tensor

aten = torch.ops.aten

ROWS = "observes rows"
"""In a graph's notes: whether rows are observed."""


@dataclass(frozen=True)
class Observed:
    """Layers of one operand: (name, kind, shape of the weight) each; and the operand's dtype."""

    layers: tuple[tuple[str, str, tuple[int, ...]], ...]
    dtype: torch.dtype


def observe(context: Context) -> None:
    if context.graph.phase is not Phase.INFERENCE:
        return
    operands: dict[fx.Node, list[Layer]] = {}
    for layer in layers(context.graph):
        reason = _obstacle(layer.x)
        if reason is None:
            operands.setdefault(layer.x, []).append(layer)
        else:
            context.journal.note("precision", f"{layer.name} is not observed: {reason}")
    results: list[fx.Node] = []
    observed = []
    for x, readers in operands.items():
        made = _observers(context, x, readers[0])
        if made is None:
            context.journal.note("precision", f"{readers[0].name} is not observed: its observers cannot be propagated")
            continue
        context.spend("observe", x)
        results += made
        described = tuple((layer.name, layer.kind, layer.shape) for layer in readers)
        observed.append(Observed(described, x.meta["val"].dtype))
    _append(context, results)
    context.graph.notes["observed"] = tuple(observed)


def _obstacle(x: fx.Node) -> str | None:
    value = tensor(x)
    if value is None or not value.is_floating_point():
        return "its input is not floating"
    if value.dtype == torch.float64:
        return "its input is float64"
    if any(isinstance(size, int) and size == 0 for size in value.shape):
        return "its input is empty"
    return None


def _observers(context: Context, x: fx.Node, layer: Layer) -> list[fx.Node] | None:
    """The least, the largest and the histogram of x, and that of its rows."""
    others = [d for d in range(x.meta["val"].dim()) if d != CHANNEL]
    made = []
    for target, args in ((aten.amin.default, (x, others)), (aten.amax.default, (x, others)), (exponent_histogram, (x,))):
        node = context.derive(target, args, layer.node, symbolic=True)
        if node is None:
            return None
        made.append(node)
    if context.graph.notes.get(ROWS):
        node = x
        for target, more in ((aten.abs.default, ()), (aten.amax.default, ([CHANNEL],)), (exponent_histogram, ())):
            derived = context.derive(target, (node, *more), layer.node, symbolic=True)
            if derived is None:
                return None
            node = derived
        made.append(node)
    return made


def _append(context: Context, results: list[fx.Node]) -> None:
    output = context.graph.gm.graph.output_node()
    own = output.args[0]
    assert isinstance(own, tuple | list)
    output.args = ((*own, *results),)
