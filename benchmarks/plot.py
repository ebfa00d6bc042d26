"""Pictures and tables from a results file: `python -m benchmarks.plot results.json`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.results import load
from fxopt.report.compare import Row
from fxopt.report.tables import comparison_table, open_console

MOST_SHARE = 1.3
"""Where the plot of shares ends: what the L2 cache holds can be faster than a copy, by how much is of no interest."""


def rows_of(case: dict[str, Any]) -> list[Row]:
    """A case's rows as they were measured."""
    return [Row.from_dict(row) for row in case["rows"]]


def speedups(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """contender -> case label, with its pass where passes are split -> speed-up over eager, where eager has a time."""
    table: dict[str, dict[str, float]] = {}
    for case in data["cases"]:
        label, rows = label_of(case, data["cases"]), [r for r in case["rows"] if r["seconds"]]
        eager = {r.get("part", ""): r["seconds"] for r in rows if r["contender"] == "eager"}
        for row in rows:
            part = row.get("part", "")
            if part in eager and row["contender"] != "eager":
                table.setdefault(row["contender"], {})[f"{label} {part}".rstrip()] = eager[part] / row["seconds"]
    return table


def label_of(case: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    """The workload's name, with its sizes where several cases share the name."""
    same = sum(c["workload"] == case["workload"] for c in cases)
    return case["workload"] if same == 1 else f"{case['workload']} {'x'.join(str(v) for v in case['sizes'].values())}"


def plot_results(data: dict[str, Any], path: Path) -> Path | None:
    """Save a bar chart of the speed-ups over eager as `path`; None as in `plot_bars`."""
    return plot_bars(data, speedups(data), path, "speed-up over eager (higher is better)")


def plot_bars(data: dict[str, Any], table: dict[str, dict[str, float]], path: Path, meaning: str) -> Path | None:
    """Save `table`, series -> label -> speed-up, as bars; None when there is nothing to draw or no matplotlib."""
    labels = list(dict.fromkeys(label for bars in table.values() for label in bars))
    if not labels:
        return None
    height = 0.85 / len(table)
    with _figure(data, path, labels, len(table) + 1) as axes:
        if axes is None:
            return None
        for number, (name, bars) in enumerate(table.items()):
            places = [i + number * height for i, label in enumerate(labels) if label in bars]
            axes.barh(places, [bars[label] for label in labels if label in bars], height, label=name)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel(meaning)
    return path


def shares(data: dict[str, Any]) -> dict[str, dict[str, list[tuple[float, int]]]]:
    """contender -> "kernel pass" -> (share of the copy's bandwidth, bytes moved) of each case."""
    table: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for case in data["cases"]:
        for row in case["rows"]:
            if row["copy_share"] and row["contender"] != "copy":
                label = f"{case['workload']} {row['part']}"
                table.setdefault(row["contender"], {}).setdefault(label, []).append((row["copy_share"], row["bytes_moved"]))
    return table


def plot_shares(data: dict[str, Any], path: Path) -> Path | None:
    """Save the shares of the copy's bandwidth as `path`, larger marks for larger tensors; None as in `plot_results`."""
    table = shares(data)
    labels = list(dict.fromkeys(label for points in table.values() for label in points))
    if not labels:
        return None
    with _figure(data, path, labels, 1 + len(table)) as axes:
        if axes is None:
            return None
        for number, (name, points) in enumerate(table.items()):
            marks = [(x, labels.index(k) + 0.8 * (number + 0.5) / len(table), n) for k, p in points.items() for x, n in p]
            x, y, sizes = zip(*marks, strict=True)
            axes.scatter(x, y, [max(4.0, 6 * math.log2(n / (1 << 20) + 1)) for n in sizes], label=name, alpha=0.7)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel("share of the bandwidth of a copy of as many bytes (larger marks: more bytes)")
        axes.set_xlim(0, MOST_SHARE)
    return path


def plot_first_calls(data: dict[str, Any], path: Path) -> Path | None:
    """Save the seconds of first calls by workload, cold and warm, as `path`; None as in `plot_results`."""
    summary = data["summary"]
    labels = list(summary)
    columns = list(dict.fromkeys(name for entry in summary.values() for name in entry))
    if not labels:
        return None
    with _figure(data, path, labels, 1 + len(columns)) as axes:
        if axes is None:
            return None
        height = 0.85 / len(columns)
        for number, column in enumerate(columns):
            values = [summary[label].get(column) or 0.0 for label in labels]
            axes.barh([i + number * height for i in range(len(labels))], values, height, label=column)
        axes.set_xlabel("seconds of the first call in a new process")
    return path


@contextmanager
def _figure(data: dict[str, Any], path: Path, labels: list[str], lines: int) -> Iterator[Any]:
    """Axes with a place of `lines` lines for each label, saved as `path`; None without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        yield None
        return
    height = 1 + 0.16 * len(labels) * lines
    figure, axes = plt.subplots(figsize=(10, height))
    axes.set_yticks([i + 0.4 for i in range(len(labels))], labels)
    axes.set_ylim(len(labels), -0.2)
    axes.set_title(f"{data['target']['name']}, torch {data['versions']['torch']}")
    yield axes
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=130 if height < 20 else 80)
    plt.close(figure)


def main(argument: str) -> None:
    """Print every table of a results file and redraw its plot."""
    path, console = Path(argument), open_console()
    data = load(path)
    for case in data["cases"]:
        console.print(comparison_table(f"{label_of(case, data['cases'])} ({case['dtype']})", rows_of(case)))
    console.print(plot_results(data, path.with_suffix(".png")) or "nothing to draw")


if __name__ == "__main__":
    main(sys.argv[1])
