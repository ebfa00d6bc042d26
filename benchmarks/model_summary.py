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


def summarize(cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """For each of fxopt's contenders: `over_best`, the geometric mean of how many times faster it is than the best of
    Inductor's modes with the same freezing, how many workloads are `slower` by more than 3 %, and `workloads` with ratios of
    time and of peak memory, to eager's and to that peer's."""
    names = dict.fromkeys(row["contender"] for case in cases for row in case["rows"] if row["contender"].startswith("fxopt"))
    summary = {}
    for own in names:
        lines = [line for case in cases if (line := _line(case, own)) is not None]
        if lines:
            ratios = [line["over_best"] for line in lines]
            slower = [line["workload"] for line in lines if line["over_best"] * SLOWER < 1]
            summary[own] = {"over_best": geometric_mean(ratios), "slower": slower, "workloads": lines}
    return summary


def _line(case: Case, own: str) -> dict[str, Any] | None:
    """The contender `own` on one case; None when it or all peers have no time."""
    rows = {row["contender"]: row for row in case["rows"] if row["seconds"] is not None and not row["part"]}
    mine = rows.get(own)
    if mine is None:
        return None
    peers = [row for row in rows.values() if row["contender"].startswith("inductor") and row["frozen"] == mine["frozen"]]
    if not peers:
        return None
    best, eager = min(peers, key=lambda row: row["seconds"]), rows.get("eager")
    return {
        "workload": case["workload"],
        "dtype": case["dtype"],
        "sizes": case["sizes"],
        "seconds": mine["seconds"],
        "best": best["contender"],
        "best_seconds": best["seconds"],
        "over_best": best["seconds"] / mine["seconds"],
        "over_eager": None if eager is None else eager["seconds"] / mine["seconds"],
        "memory_to_best": _memory(mine, best),
        "memory_to_eager": _memory(mine, eager),
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
    drawn.caption = f"geometric mean {entry['over_best']:.2f}x; slower by more than {SLOWER - 1:.0%}: {len(entry['slower'])}"
    return drawn


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
