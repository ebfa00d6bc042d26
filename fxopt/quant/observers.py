"""Adding up, over batches, what the layers of a model are given.

A `Collector` is the option `observer` of the compilations that calibration makes. Each compiled graph reports for each
operand of its layers the least and the largest value of each channel and a histogram of magnitudes (passes/observe.py);
they are added up on the operands' device, a few launches a call, and read once, by `layers`.

Minima, maxima and counts do not depend on the order of batches: several collectors' results join exactly. If asked for,
there are two more: a histogram of the rows' largest magnitudes, and moving averages of the least and the largest value (of
those of each call), which do depend on the order; joined they are as if one collector had seen the data one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fxopt.errors import CalibrationError
from fxopt.ir.observer_ops import BINS, FIRST_NOT_FINITE

Runner = Callable[[list[Any]], Sequence[Any]]


class Producer(Protocol):
    """Which layer makes an operand, and the factors of its channels on the way (passes/producers.py)."""

    @property
    def layer(self) -> str: ...
    @property
    def gains(self) -> Tensor | None: ...


class Operand(Protocol):
    """What a graph says of one operand: its layers (name, kind, shape of the weight), its dtype, which layer makes it."""

    @property
    def layers(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def producer(self) -> Producer | None: ...


@dataclass(frozen=True)
class Found:
    """A layer as one graph has it: `shape` of its weight, `dtype` of what it is given, what was seen of that (None: nothing
    came), and which layer makes it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    seen: Range | None
    producer: Producer | None


MOVING = 0.01
"""The weight of a call's least and largest value in a moving average."""


@dataclass(frozen=True)
class Range:
    """What was seen of one operand: least and largest value of each channel, float32 [channels], int64 counts [2048].

    `rows`, int64 [2048], counts the rows' largest magnitudes. `average`, float64 [3], is the moving average of the least and
    of the largest value, begun at zero, and what to divide these two by: the sum of all weights. None where not observed.
    """

    minimum: Tensor
    maximum: Tensor
    histogram: Tensor
    rows: Tensor | None = None
    average: Tensor | None = None

    def joined(self, other: Range) -> Range:
        """Of the data of both, `other`'s after this one's. What only one has observed is dropped."""
        minimum, maximum = torch.minimum(self.minimum, other.minimum), torch.maximum(self.maximum, other.maximum)
        rows = None if self.rows is None or other.rows is None else self.rows + other.rows
        average = None
        if self.average is not None and other.average is not None:
            average = self.average * (1.0 - other.average[2]) + other.average
        return Range(minimum, maximum, self.histogram + other.histogram, rows, average)


class Collector:
    """Of one calibration. `begin_batch` says when another batch starts, so that errors can name it.

    `rows`: graphs report a fourth result for each operand, a histogram of its rows. `averages`: moving averages are kept.
    `attention`: what attention is given is observed, too.
    """

    def __init__(self, *, rows: bool = False, averages: bool = False, attention: bool = False) -> None:
        self.rows, self.averages, self.attention = rows, averages, attention
        self._graphs: list[_Graph] = []
        self._weights: set[int] = set()
        self._batch = -1
        self._calls = 0

    def begin_batch(self) -> None:
        """Raises CalibrationError when the batch before was seen by no graph, although earlier ones were."""
        if self._batch >= 0 and self._graphs and not self._calls:
            raise CalibrationError(
                f"batch {self._batch} was not observed: torch.compile did not run it compiled, most likely because too many"
                " sizes came before (torch._dynamo.config.recompile_limit). Give batches of few different sizes"
            )
        self._batch, self._calls = self._batch + 1, 0

    def attached(self, operands: Sequence[Operand], weights: Sequence[Tensor], run: Runner) -> Runner:
        """`run`, whose last results, some for each of `operands`, go to this collector. `weights` are the graph's own."""
        self._weights |= {w.data_ptr() for w in weights}
        graph = _Graph(operands, self.rows, self.averages)
        self._graphs.append(graph)

        def call(args: list[Any]) -> Sequence[Any]:
            results = run(args)
            own = len(results) - graph.each * len(operands)
            self._calls += 1
            graph.add(results[own:], self._batch)
            return results[:own]

        return call

    def reads(self, weight: Tensor) -> bool:
        """Whether a compiled graph has `weight` among its weights."""
        return weight.data_ptr() in self._weights

    def layers(self) -> list[Found]:
        """In the order of graphs; a name stands several times if several of them have it.

        Raises CalibrationError for NaN or Inf, naming the first
        batch and layer that had one.
        """
        self.begin_batch()
        found, faults = [], []
        for graph in self._graphs:
            ranges = graph.ranges()
            for operand, seen, fault in zip(graph.operands, ranges, graph.faults(ranges), strict=True):
                found += [Found(*layer, operand.dtype, seen, operand.producer) for layer in operand.layers]
                faults += [] if fault is None else [(fault, operand.layers[0][0])]
        if faults:
            (batch, what), layer = min(faults, key=lambda fault: fault[0][0])
            raise CalibrationError(f"layer {layer!r} was given {what} in batch {batch}: such a range means nothing")
        return found


class _Graph:
    """What one compiled graph has reported so far."""

    def __init__(self, operands: Sequence[Operand], rows: bool, averages: bool) -> None:
        self.operands = operands
        self.each = 4 if rows else 3
        self.rows: Tensor | None = None
        self.averages: Tensor | None = None  # float64 [3, operands]
        self._averaged = averages
        self.widths: list[int] = []
        self.minima: Tensor | None = None  # of all operands' channels, one after the other
        self.maxima: Tensor | None = None
        self.counts = torch.zeros(0)
        self.not_finite: list[tuple[int, Tensor]] = []  # (batch, int64 [operands])

    def add(self, results: Sequence[Tensor], batch: int) -> None:
        if not self.operands:
            return
        minima = torch.cat([t.float() for t in results[0 :: self.each]])
        maxima = torch.cat([t.float() for t in results[1 :: self.each]])
        counts = torch.stack(list(results[2 :: self.each]))
        self.not_finite.append((batch, counts[:, FIRST_NOT_FINITE:].sum(1)))
        if self.minima is None or self.maxima is None:
            self.widths = [t.numel() for t in results[0 :: self.each]]
            self.minima, self.maxima, self.counts = minima, maxima, counts
        else:
            torch.minimum(self.minima, minima, out=self.minima)
            torch.maximum(self.maxima, maxima, out=self.maxima)
            self.counts += counts
        if self.each == 4:
            rows = torch.stack(list(results[3::4]))
            self.rows = rows if self.rows is None else self.rows + rows
        if self._averaged:
            self._average(minima, maxima)

    def _average(self, minima: Tensor, maxima: Tensor) -> None:
        sizes = torch.tensor(self.widths, device=minima.device)
        operand = torch.arange(len(self.widths), device=minima.device).repeat_interleave(sizes, output_size=len(minima))
        least = minima.new_full((len(self.widths),), torch.inf).scatter_reduce(0, operand, minima, "amin")
        largest = maxima.new_full((len(self.widths),), -torch.inf).scatter_reduce(0, operand, maxima, "amax")
        new = torch.stack([least, largest, torch.ones_like(least)]).double() * MOVING
        self.averages = new if self.averages is None else self.averages * (1.0 - MOVING) + new

    def ranges(self) -> list[Range | None]:
        if self.minima is None or self.maxima is None:
            return [None] * len(self.operands)
        minima, maxima = (t.cpu().split(self.widths) for t in (self.minima, self.maxima))
        nothing = [None] * len(self.operands)
        rows = nothing if self.rows is None else self.rows.cpu().unbind()
        averages = nothing if self.averages is None else self.averages.cpu().unbind(1)
        return [Range(*parts) for parts in zip(minima, maxima, self.counts.cpu().unbind(), rows, averages, strict=True)]

    def faults(self, ranges: Sequence[Range | None]) -> list[tuple[int, str] | None]:
        """For each operand the first batch with NaN or Inf, and which of them it was given."""
        if not self.not_finite:
            return [None] * len(self.operands)
        counts = torch.stack([count for _, count in self.not_finite]).cpu()
        faults: list[tuple[int, str] | None] = []
        for column, seen in zip(counts.unbind(1), ranges, strict=True):
            places = column.nonzero().reshape(-1).tolist()
            nan = seen is not None and bool(torch.isnan(seen.maximum).any())
            faults.append((self.not_finite[places[0]][0], "NaN" if nan else "Inf") if places else None)
        return faults


def empty_histogram() -> Tensor:
    return torch.zeros(BINS, dtype=torch.int64)
