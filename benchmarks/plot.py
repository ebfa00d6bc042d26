"""Pictures and tables from a results file: `python -m benchmarks.plot results.json`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.results import load
from fxopt.report.compare import Row
from fxopt.report.tables import comparison_table, open_console


def rows_of(case: dict[str, Any]) -> list[Row]:
    """A case's rows as they were measured."""
    return [Row(**{k: v for k, v in row.items() if k != "kernel_count"}) for row in case["rows"]]


def speedups(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """contender -> case label -> speed-up over eager, for every case that has eager's time."""
    table: dict[str, dict[str, float]] = {}
    for case in data["cases"]:
        times = {r["contender"]: r["seconds"] for r in case["rows"] if r["seconds"]}
        for name, seconds in times.items():
            if "eager" in times and name != "eager":
                table.setdefault(name, {})[label_of(case, data["cases"])] = times["eager"] / seconds
    return table


def label_of(case: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    """The workload's name, with its sizes where several cases share the name."""
    same = sum(c["workload"] == case["workload"] for c in cases)
    return case["workload"] if same == 1 else f"{case['workload']} {'x'.join(str(v) for v in case['sizes'].values())}"


def plot_results(data: dict[str, Any], path: Path) -> Path | None:
    """Save a bar chart of the speed-ups over eager as `path`; None when there is nothing to draw or no matplotlib."""
    table = speedups(data)
    labels = list(dict.fromkeys(label for bars in table.values() for label in bars))
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    if not labels:
        return None
    figure, axes = plt.subplots(figsize=(10, 1 + 0.16 * len(labels) * (len(table) + 1)))
    height = 0.85 / len(table)
    for number, (name, bars) in enumerate(table.items()):
        places = [i + number * height for i, label in enumerate(labels) if label in bars]
        axes.barh(places, [bars[label] for label in labels if label in bars], height, label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([i + 0.4 for i in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_xlabel("speed-up over eager (higher is better)")
    axes.set_title(f"{data['target']['name']}, torch {data['versions']['torch']}")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main(argument: str) -> None:
    """Print every table of a results file and redraw its plot."""
    path, console = Path(argument), open_console()
    data = load(path)
    for case in data["cases"]:
        console.print(comparison_table(f"{label_of(case, data['cases'])} ({case['dtype']})", rows_of(case)))
    console.print(plot_results(data, path.with_suffix(".png")) or "nothing to draw")


if __name__ == "__main__":
    main(sys.argv[1])
