"""What a run over models says: fxopt against the best of Inductor's modes, workload by workload, in time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fxopt.report.measure import geometric_mean
from fxopt.report.tables import milliseconds

SLOWER = 1.03
"""How many times the best peer's time is too slow."""

Case = dict[str, Any]
Row = dict[str, Any]


BEST_MODE = "fxopt's best mode"


def summarize(cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """For each of fxopt's contenders, and for the fastest of those that freeze nothing where there are several: `over_best`,
    the geometric mean of how many times faster it is than the best of Inductor's modes with the same freezing, which
    workloads are `slower` by more than 3 %, which take `more_memory` than eager's inference or that mode's training step,
    and `workloads` with times, ratios and peaks of memory."""
    names = dict.fromkeys(row["contender"] for case in cases for row in case["rows"] if row["contender"].startswith("fxopt"))
    modes = [n for n in names if not any(r["frozen"] for case in cases for r in case["rows"] if r["contender"] == n)]
    together = {BEST_MODE: modes} if len(modes) > 1 else {}
    summary = {}
    for title, own in {**{name: [name] for name in names}, **together}.items():
        lines = [line for case in cases if (line := _line(case, own)) is not None]
        if lines:
            summary[title] = {
                "over_best": geometric_mean([line["over_best"] for line in lines]),
                "slower": [line["workload"] for line in lines if line["over_best"] * SLOWER < 1],
                "more_memory": [line["workload"] for line in lines if (line["memory_to_bound"] or 0.0) > 1],
                "workloads": lines,
            }
    return summary


def _line(case: Case, own: Sequence[str]) -> dict[str, Any] | None:
    """The fastest of the contenders `own` on one case; None when none of them or no peer has a time."""
    rows = {row["contender"]: row for row in case["rows"] if row["seconds"] is not None and not row["part"]}
    mine = min((rows[name] for name in own if name in rows), key=lambda row: row["seconds"], default=None)
    if mine is None:
        return None
    peers = [row for row in rows.values() if row["contender"].startswith("inductor") and row["frozen"] == mine["frozen"]]
    if not peers:
        return None
    best, eager = min(peers, key=lambda row: row["seconds"]), rows.get("eager")
    compared = [mine, *peers, *([] if eager is None else [eager])]
    return {
        "workload": case["workload"],
        "dtype": case["dtype"],
        "sizes": case["sizes"],
        "contender": mine["contender"],
        "seconds": mine["seconds"],
        "quartiles": mine.get("quartiles"),
        "best": best["contender"],
        "best_seconds": best["seconds"],
        "best_quartiles": best.get("quartiles"),
        "over_best": best["seconds"] / mine["seconds"],
        "over_eager": None if eager is None else eager["seconds"] / mine["seconds"],
        "peak_bytes": {row["contender"]: row.get("peak_bytes") for row in compared},
        "reserved_bytes": {row["contender"]: row.get("reserved_bytes") for row in compared},
        "memory_to_best": _memory(mine, best),
        "memory_to_eager": _memory(mine, eager),
        "memory_to_bound": _memory(mine, best if case.get("training") else eager),
    }


def _memory(own: Row, other: Row | None) -> float | None:
    """How many times the other's peak, in what torch's allocator has from the device."""
    if other is None or not own.get("reserved_bytes") or not other.get("reserved_bytes"):
        return None
    return own["reserved_bytes"] / other["reserved_bytes"]


def summary_table(own: str, entry: Mapping[str, Any]) -> Table:
    """A line for each workload; the file has more."""
    drawn = Table(title=f"{own} against the best of Inductor's modes", title_justify="left", caption_justify="left")
    drawn.box, drawn.pad_edge = box.SIMPLE_HEAD, False
    for column in ("", "time", "the best", "its time", "speed-up", "memory to eager's", "to the best's"):
        drawn.add_column(column)
    for line in entry["workloads"]:
        drawn.add_row(
            f"{line['workload']} {line['dtype']}",
            milliseconds(line["seconds"]),
            line["best"],
            milliseconds(line["best_seconds"]),
            f"{line['over_best']:.2f}x",
            _times(line["memory_to_eager"]),
            _times(line["memory_to_best"]),
        )
    drawn.caption = (
        f"geometric mean {entry['over_best']:.2f}x; slower by more than {SLOWER - 1:.0%}: {len(entry['slower'])}; "
    )
    drawn.caption += f"with more memory than eager's inference or its peer's training: {len(entry['more_memory'])}"
    return drawn


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
