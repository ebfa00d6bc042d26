"""Budgets against what `fxopt.quantize` reaches within them on a trained model: error, figures and speed on data that the
search has not seen. `python -m benchmarks.accuracy search` runs it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.outputs import cosines, outputs_of, relative_error
from benchmarks.real_models import Batch, Task
from benchmarks.results import revision
from fxopt.precision import HIGH
from fxopt.quant.search import Result, Search
from fxopt.report.measure import interleaved


@dataclass(frozen=True)
class Limits:
    """What a search may cost: rows of each batch that errors are measured on (0 for all), layers and precisions tried one by
    one, seconds for each shape of layer and for whole models."""

    rows: int
    trials: int
    layer_seconds: float
    seconds: float


class BudgetRun:
    """One task's search, and the rows of its table."""

    def __init__(self, task: Task, reference: Task, precisions: Sequence[str], limits: Limits) -> None:
        """`reference` is the task in float32, whose outputs are the exact ones."""
        start = time.perf_counter()
        self.task, self.seconds = task, limits.seconds
        self.device = next(task.model.parameters()).device
        self.exact = outputs_of(lambda batch: reference.model(*batch), reference.evaluation)
        self.float32 = reference.judge(self.exact)
        batches = [tuple(t[: limits.rows or None] for t in batch) for batch in task.calibration]
        self.search = Search(
            task.model,
            batches,
            precisions=precisions,
            seconds=limits.layer_seconds,
            trials=limits.trials,
            progress=False,
        )
        self.took = time.perf_counter() - start

    def entry(self, dtype: torch.dtype) -> dict[str, Any]:
        """What is true of all budgets."""
        layers = [
            {
                "name": r.name,
                "shape": list(r.shape),
                "rows": r.rows,
                "seconds": r.seconds,
                "error": r.error,
                "saved": r.saved,
            }
            for r in self.search.rows.values()
        ]
        high = self._judged(lambda batch: self.search.high(*batch))
        facts = {"task": self.task.name, "dtype": str(dtype), "commit": revision(), "measured_seconds": self.took}
        return {**facts, "float32": self.float32, "unquantized": high, "layers": layers, "budgets": []}

    def within(self, budget: float) -> dict[str, Any]:
        """The table's row for `budget`."""
        start = time.perf_counter()
        result = self.search.within(budget)
        chosen = time.perf_counter() - start
        return {
            "budget": budget,
            "reached": result.report().reached,
            "refused": result.refused,
            "search_seconds": chosen,
            **self._judged(lambda batch: result.model(*batch)),
            "seconds": self._times(result),
            "decisions": {r.name: r.decision for r in result.report().layers if r.decision != HIGH},
        }

    def _judged(self, run: Callable[[Batch], Tensor]) -> dict[str, Any]:
        outputs = outputs_of(run, self.task.evaluation)
        similar = cosines(outputs, self.exact)
        errors = {"error": relative_error(outputs, self.exact), "mean_cosine": float(similar.mean())}
        return {**errors, "least_cosine": float(similar.min()), "figures": self.task.judge(outputs)}

    def _times(self, result: Result) -> dict[str, float]:
        """Seconds of a call on the task's timed batch, in turns."""
        ways = {"eager": self.task.model, "fxopt": self.search.high, "quantized": result.model}
        runs = {name: lambda run=run: run(*self.task.timed) for name, run in ways.items()}
        with torch.no_grad():
            for call in runs.values():
                call()
            timings = interleaved(runs, self.device, seconds=self.seconds)
        return {name: timing.median for name, timing in timings.items()}


def table(entry: Mapping[str, Any]) -> list[str]:
    """The lines of a task's table."""
    high, head = entry["unquantized"], f"{entry['task']}, {entry['dtype']}; float32 {_figures(entry['float32'])}"
    return [head, f"  not quantized: {_judgement(high)}", *(row_line(row, len(entry["layers"])) for row in entry["budgets"])]


def row_line(row: Mapping[str, Any], layers: int) -> str:
    counts = Counter(row["decisions"].values())
    times = row["seconds"]
    reached = "none" if row["reached"] is None else f"{row['reached']:.4f}"
    parts = [
        f"  budget {row['budget']:g}: reached {reached}",
        f"on other data {_judgement(row)}",
        f"{times['eager'] / times['quantized']:.2f}x eager, {times['fxopt'] / times['quantized']:.2f}x fxopt",
        f"{sum(counts.values())} of {layers} layers ({', '.join(f'{n} {name}' for name, n in sorted(counts.items()))})",
    ]
    return "; ".join(parts) + (f"; refused: {row['refused']}" if row["refused"] else "")


def _judgement(row: Mapping[str, Any]) -> str:
    return f"error {row['error']:.4f}, mean cosine {row['mean_cosine']:.4f}, {_figures(row['figures'])}"


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def missing(entries: Iterable[Mapping[str, Any]], task: str, dtype: torch.dtype, budgets: Sequence[float]) -> list[float]:
    """Those of `budgets` that no row of `entries` has."""
    same = (e for e in entries if (e["task"], e["dtype"]) == (task, str(dtype)))
    done = {row["budget"] for entry in same for row in entry["budgets"]}
    return [budget for budget in budgets if budget not in done]
