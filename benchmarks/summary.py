"""What a memory-bound run says in a few lists: passes below the speed of a copy, passes slower than Inductor, means."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fxopt.report.measure import geometric_mean

COPY_SHARE, SLOWER = 0.95, 1.03
"""The share of the copy's bandwidth that one pass must reach; how many times Inductor's time is too slow."""
OWN = "fxopt"

Case = dict[str, Any]
Row = dict[str, Any]


def passes(case: Case) -> Iterator[dict[str, Row]]:
    """The rows of each pass, by contender."""
    for part in dict.fromkeys(r["part"] for r in case["rows"] if r["part"]):
        yield {r["contender"]: r for r in case["rows"] if r["part"] == part}


def ratio(rows: dict[str, Row], base: str) -> float | None:
    """How many times faster than `base` fxopt is; None when either has no time."""
    own, other = (rows.get(name, {}).get("seconds") for name in (OWN, base))
    return other / own if own and other else None


def step_ratio(case: Case, base: str) -> float | None:
    """`ratio` of forward and backward together: some do part of the backward's work in the forward."""
    times: dict[str, list[float | None]] = {OWN: [], base: []}
    for rows in passes(case):
        for name, seconds in times.items():
            seconds.append(rows.get(name, {}).get("seconds"))
    if not times[OWN] or None in times[OWN] or None in times[base]:
        return None
    return math.fsum(s or 0.0 for s in times[base]) / math.fsum(s or 0.0 for s in times[OWN])


def one_pass(case: Case, row: Row, l2_bytes: int) -> bool:
    """Whether the pass can read everything once and its tensors exceed the L2 cache."""
    limit = case["one_pass"][row["part"] == "backward"]
    return case["sizes"].get("cols", 0) <= limit and row["bytes_moved"] > 2 * l2_bytes


def summarize(data: dict[str, Any]) -> dict[str, Any]:
    """The lists and means of a results file, as JSON data."""
    l2_bytes, cases = data["target"].get("l2_bytes", 0), data["cases"]
    below, slower, failed = [], [], []
    kernels: dict[str, dict[str, list[float]]] = {}
    for case in cases:
        failed += [{**_place(case, r), "contender": r["contender"], "why": r["skipped"]} for r in case["rows"] if _failed(r)]
        for rows in passes(case):
            own, faster = rows.get(OWN, {}), ratio(rows, "inductor")
            share = own.get("copy_share")
            seen = kernels.setdefault(f"{case['workload']} {next(iter(rows.values()))['part']}", {"ratio": [], "share": []})
            seen["ratio"] += [faster] if faster else []
            if share and one_pass(case, own, l2_bytes):
                seen["share"].append(share)
                if share < COPY_SHARE:
                    below.append({**_place(case, own), "copy_share": share})
            if faster and 1 / faster > SLOWER:
                slower.append({**_place(case, own), "times": 1 / faster})
    liger, fused = ([r for c in cases if (r := step_ratio(c, base))] for base in ("liger", "fused"))
    return {
        "below_copy": sorted(below, key=lambda e: e["copy_share"]),
        "slower_than_inductor": sorted(slower, key=lambda e: -e["times"]),
        "failed": failed,
        "over_inductor": _mean([r for k in kernels.values() for r in k["ratio"]]),
        "over_liger": _mean(liger),
        "over_fused": _mean(fused),
        "kernels": {
            name: {"over_inductor": _mean(k["ratio"]), "least_copy_share": min(k["share"], default=None)}
            for name, k in kernels.items()
        },
    }


def _failed(row: Row) -> bool:
    return row["skipped"].startswith("failed")


def _place(case: Case, row: Row) -> dict[str, Any]:
    return {"workload": case["workload"], "part": row["part"], "dtype": case["dtype"], "sizes": case["sizes"]}


def _mean(values: Sequence[float]) -> float | None:
    return geometric_mean(values) if values else None


def summary_tables(summary: dict[str, Any]) -> list[Table]:
    """The means by kernel, then the three lists."""
    means = _table("fxopt by kernel", "", "over Inductor", "least share of the copy's bandwidth")
    for name, entry in summary["kernels"].items():
        means.add_row(name, _times(entry["over_inductor"]), _percent(entry["least_copy_share"]))
    names = {"Inductor": "over_inductor", "Liger": "over_liger", "torch's fused": "over_fused"}
    means.caption = "geometric means: " + ", ".join(f"{_times(summary[key])} over {name}" for name, key in names.items())
    below = _table(f"below {COPY_SHARE:.0%} of the copy's bandwidth", "", "dtype", "sizes", "share")
    for entry in summary["below_copy"]:
        below.add_row(*_where(entry), _percent(entry["copy_share"]))
    slower = _table(f"slower than Inductor by more than {SLOWER - 1:.0%}", "", "dtype", "sizes", "time")
    for entry in summary["slower_than_inductor"]:
        slower.add_row(*_where(entry), _times(entry["times"]))
    failed = _table("failed or wrong", "", "dtype", "sizes", "contender", "why")
    for entry in summary["failed"]:
        failed.add_row(*_where(entry), entry["contender"], entry["why"])
    return [means, *(t for t in (below, slower, failed) if t.row_count)]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", pad_edge=False, box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column)
    return table


def _where(entry: dict[str, Any]) -> tuple[str, str, str]:
    sizes = "x".join(str(v) for v in entry["sizes"].values())
    return f"{entry['workload']} {entry['part']}".rstrip(), entry["dtype"], sizes


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
