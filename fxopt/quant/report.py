"""What a search for precisions measured, as data and as a table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class LayerReport:
    """A layer: `error` of the model with it alone quantized and seconds `saved`, by precision; `seconds` in its own.

    `rows` are those of its input in the longest batch. `why` tells the reason of `decision`; of the `estimated` precisions
    gradients tell the error.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    dtype: str
    why: str
    seconds: float | None = None
    error: dict[str, float] = field(default_factory=dict)
    saved: dict[str, float] = field(default_factory=dict)
    decision: str = "high"
    estimated: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The layers in the order of the graph, and what was measured of the whole model.

    `reached` is what of the `budget` the last compiled model took, None if none was compiled; `floor` the relative error
    of the compiled model that is not quantized. `seconds` and `quantized_seconds` are those of a call, where both ran.
    """

    layers: tuple[LayerReport, ...]
    measure: str
    budget: float
    reached: float | None
    floor: float
    seconds: float | None
    quantized_seconds: float | None
    refused: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, but for infinite errors."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n".join([self.summary(), *_columns([_TITLES, *map(_cells, self.layers)])])

    def summary(self) -> str:
        """What was measured of the whole model, and how many layers have which precision."""
        parts = [f"{self.measure}: budget {self.budget:g}"]
        if self.reached is not None:
            parts.append(f"reached {self.reached:.3g}")
        parts.append(f"relative error unquantized {self.floor:.2g}")
        if self.seconds is not None and self.quantized_seconds is not None:
            ratio = self.seconds / self.quantized_seconds
            parts.append(f"{_time(self.seconds)} a call, quantized {_time(self.quantized_seconds)} ({ratio:.2f}x)")
        counts = Counter(layer.decision for layer in self.layers)
        parts.append(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
        refused = f"not quantized: {self.refused}\n" if self.refused else ""
        return refused + "; ".join(parts)


_TITLES = ("layer", "weight", "rows", "time", "error", "saved", "decision", "why")


def _cells(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name or "(the model itself)",
        " x ".join(map(str, layer.shape)),
        str(layer.rows or ""),
        "" if layer.seconds is None else _time(layer.seconds),
        ", ".join(f"{name} {'~' * (name in layer.estimated)}{error:.2g}" for name, error in layer.error.items()),
        ", ".join(f"{name} {_time(gain)}" for name, gain in layer.saved.items()),
        layer.decision,
        layer.why,
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _time(seconds: float) -> str:
    if abs(seconds) >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us"
