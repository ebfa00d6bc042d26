"""Observers for calibration: the graph tells, beside its results, what its layers are given.

For each different operand of a layer three results are appended: the least and the largest value of each channel (in the
operand's dtype) and the histogram of magnitudes by bits (`fxopt::exponent_histogram`). The first two are ordinary
reductions, which fuse with what makes the operand. If asked for, a fourth result is the histogram of the rows' largest
magnitudes (of an image, of its places'). `graph.notes["observed"]` says in which order: an `Observed` for each operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Phase
from fxopt.ir.layers import ATTENTION, CHANNEL, Layer, attention_layers, layers
from fxopt.ir.observer_ops import exponent_histogram, sampling_step
from fxopt.passes.context import Context
from fxopt.passes.facts import tensor
from fxopt.passes.producers import Producer, Producers

aten = torch.ops.aten

ROWS = "observes rows"
"""In a graph's notes: whether rows are observed."""

ATTENTIONS = "observes attention"
"""In a graph's notes: whether what attention is given is observed."""


Described = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Layers of one operand: (name, kind, shape of the weight) each."""


@dataclass(frozen=True)
class Observed:
    """Layers of one operand, its dtype, and which layer makes it (None: none, or by more than scales as its input does)."""

    layers: Described
    dtype: torch.dtype
    producer: Producer | None = None


def _note_unobserved(context: Context, layer: str, reason: str) -> None:
    context.journal.note("precision", f"{layer or '(the model itself)'} is not observed: {reason}")


def observe(context: Context) -> None:
    if context.graph.phase is not Phase.INFERENCE:
        return
    operands: dict[fx.Node, list[Layer]] = {}
    all_layers = layers(context.graph)
    producers = Producers(context.graph, all_layers)
    for layer in all_layers:
        reason = _obstacle(layer.x)
        if reason is None:
            operands.setdefault(layer.x, []).append(layer)
        else:
            _note_unobserved(context, layer.name, reason)
    found: list[tuple[fx.Node, fx.Node, Described]] = [
        (x, readers[0].node, tuple((layer.name, layer.kind, layer.shape) for layer in readers))
        for x, readers in operands.items()
    ]
    if context.graph.notes.get(ATTENTIONS):
        found += _of_attention(context)
    results: list[fx.Node] = []
    observed = []
    for x, reader, described in found:
        made = _observers(context, x, reader)
        if made is None:
            _note_unobserved(context, described[0][0], "its observers cannot be propagated")
            continue
        context.spend("observe", x)
        results += made
        observed.append(Observed(described, x.meta["val"].dtype, producers.of(x) if x in operands else None))
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


def _of_attention(context: Context) -> list[tuple[fx.Node, fx.Node, Described]]:
    """What attention is given: each operand by itself, [heads, features] in the place of a weight's shape."""
    found: list[tuple[fx.Node, fx.Node, Described]] = []
    for layer in attention_layers(context.graph):
        for name, x in layer.operands.items():
            value = tensor(x)
            if value is None or _obstacle(x) is not None or not all(isinstance(value.shape[d], int) for d in (1, 3)):
                continue
            shape = int(value.shape[1]), int(value.shape[3])
            found.append((x, layer.node, ((layer.operand_name(name), ATTENTION, shape),)))
    return found


def _observers(context: Context, x: fx.Node, reader: fx.Node) -> list[fx.Node] | None:
    """The least, the largest and the histogram of x, and that of its rows."""
    try:
        least, largest = (_made(context, reader, target, x, _places(x)) for target in (aten.amin.default, aten.amax.default))
        made = [least, largest, _made(context, reader, exponent_histogram, x, *_ends(context, reader, x, least, largest))]
        if context.graph.notes.get(ROWS):
            magnitudes = _made(context, reader, aten.abs.default, x)
            rows = _made(context, reader, aten.amax.default, magnitudes, [CHANNEL])
            made.append(_made(context, reader, exponent_histogram, rows))
    except _NotPropagatedError:
        return None
    return made


class _NotPropagatedError(Exception):
    """A node has no value for its sizes."""


def _made(context: Context, reader: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call in front of `reader`. Raises _NotPropagatedError."""
    node = context.derive(target, args, reader, symbolic=True)
    if node is None:
        raise _NotPropagatedError
    return node


def _places(x: fx.Node) -> list[int]:
    """All dimensions but that of channels."""
    return [d for d in range(x.meta["val"].dim()) if d != CHANNEL]


def _ends(context: Context, reader: fx.Node, x: fx.Node, least: fx.Node, largest: fx.Node) -> tuple[fx.Node, ...]:
    """What a histogram of a sample of x needs besides: the least and the largest element, from those of channels."""
    shape = x.meta["val"].shape
    if all(isinstance(size, int) for size in shape) and sampling_step(shape) == 1:
        return ()
    return _made(context, reader, aten.amin.default, least), _made(context, reader, aten.amax.default, largest)


def _append(context: Context, results: list[fx.Node]) -> None:
    output = context.graph.gm.graph.output_node()
    own = output.args[0]
    assert isinstance(own, tuple | list)
    output.args = ((*own, *results),)
