"""What a memory-bound run says: means and worst cases against every other contender and by kernel, lists of what is slow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from fxopt.report.measure import geometric_mean

COPY_SHARE, SLOWER = 0.95, 1.03
"""The share of the copy's bandwidth that one pass must reach; how many times Inductor's time is too slow."""
OWN = "fxopt"
NAMES = {"inductor": "Inductor", "liger": "Liger", "fused": "torch's fused", "eager": "eager"}
BASES = tuple(NAMES)
WORST = 30
"""Lines of a printed list."""

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
    """The lists, counts and means of a results file, as JSON data."""
    cases = data["cases"]
    found = [_Pass.of(case, rows, data["target"].get("l2_bytes", 0)) for case in cases for rows in passes(case)]
    below = [p for p in found if p.share is not None and p.share < COPY_SHARE]
    slower = [p for p in found if _is_slower(p.ratios.get("inductor"))]
    return {
        "over": {base: entry for base in BASES if (entry := _over(base, found, cases))},
        "one_pass": _reached(found),
        "below_copy": [{**p.place, "copy_share": p.share} for p in sorted(below, key=lambda p: p.share or 0.0)],
        "slower_than_inductor": [
            {**p.place, "times": 1 / p.ratios["inductor"]} for p in sorted(slower, key=lambda p: p.ratios["inductor"])
        ],
        "failed": [
            {**_place(case, row), "contender": row["contender"], "why": row["skipped"]}
            for case in cases
            for row in case["rows"]
            if _failed(row)
        ],
        "kernels": {name: _kernel([p for p in found if p.name == name]) for name in dict.fromkeys(p.name for p in found)},
    }


@dataclass(frozen=True)
class _Pass:
    """A pass of a case: how many times faster fxopt is than others, and its share of the copy's bandwidth where that counts:
    one pass suffices, and the tensors exceed the L2 cache."""

    place: dict[str, Any]
    ratios: dict[str, float]
    share: float | None

    @classmethod
    def of(cls, case: Case, rows: dict[str, Row], l2_bytes: int) -> _Pass:
        own = rows.get(OWN, {})
        share = own.get("copy_share")
        counts = bool(share) and one_pass(case, own, l2_bytes)
        ratios = {base: r for base in BASES if (r := ratio(rows, base)) is not None}
        return cls(_place(case, next(iter(rows.values()))), ratios, share if counts else None)

    @property
    def name(self) -> str:
        return f"{self.place['workload']} {self.place['part']}"


def _is_slower(faster: float | None) -> bool:
    return faster is not None and 1 / faster > SLOWER


def _over(base: str, found: Sequence[_Pass], cases: Sequence[Case]) -> dict[str, Any] | None:
    """fxopt against `base`, by passes and by steps (both passes together); None where they never met."""
    ratios = [p.ratios[base] for p in found if base in p.ratios]
    steps = [r for case in cases if (r := step_ratio(case, base)) is not None]
    if not ratios:
        return None
    slower = sum(map(_is_slower, ratios))
    return {"mean": _mean(ratios), "passes": len(ratios), "least": min(ratios), "slower": slower, "steps_mean": _mean(steps)}


def _reached(found: Sequence[_Pass]) -> dict[str, Any]:
    """Of the passes that can go over memory once, how many reach COPY_SHARE."""
    shares = [p.share for p in found if p.share is not None]
    return {"passes": len(shares), "reached": sum(s >= COPY_SHARE for s in shares), "least": min(shares, default=None)}


def _kernel(found: Sequence[_Pass]) -> dict[str, Any]:
    inductor, liger = ([p.ratios[base] for p in found if base in p.ratios] for base in ("inductor", "liger"))
    return {
        "over_inductor": _mean(inductor),
        "least_over_inductor": min(inductor, default=None),
        "over_liger": _mean(liger),
        "one_pass": _reached(found),
    }


def _failed(row: Row) -> bool:
    return row["skipped"].startswith("failed")


def _place(case: Case, row: Row) -> dict[str, Any]:
    return {"workload": case["workload"], "part": row["part"], "dtype": case["dtype"], "sizes": case["sizes"]}


def _mean(values: Sequence[float]) -> float | None:
    return geometric_mean(values) if values else None


def summary_tables(summary: dict[str, Any]) -> list[Table]:
    """Lines by kernel, then lists of the worst; the file has all of them."""
    once = summary["one_pass"]
    kernels = table_of(
        "fxopt by kernel", "", "over Inductor", "at worst", "over Liger", f">= {COPY_SHARE:.0%} of copy", "least"
    )
    for name, entry in summary["kernels"].items():
        own = entry["one_pass"]
        cells = [_times(entry[key]) for key in ("over_inductor", "least_over_inductor", "over_liger")]
        kernels.add_row(name, *cells, f"{own['reached']} of {own['passes']}", _percent(own["least"]))
    lines = [
        f"over {NAMES[base]}: {_times(e['mean'])} (geometric mean of {e['passes']} passes; of whole steps "
        f"{_times(e['steps_mean'])}), at worst {_times(e['least'])}, {e['slower']} slower by more than {SLOWER - 1:.0%}"
        for base, e in summary["over"].items()
    ]
    lines.append(
        f"where one pass suffices beyond the L2 cache: {once['reached']} of {once['passes']} at {COPY_SHARE:.0%} of copy"
    )
    kernels.caption = "\n".join(lines)
    below = table_of(f"below {COPY_SHARE:.0%} of the copy's bandwidth", "", "dtype", "sizes", "share")
    for entry in summary["below_copy"][:WORST]:
        below.add_row(*_where(entry), _percent(entry["copy_share"]))
    slower = table_of(f"slower than Inductor by more than {SLOWER - 1:.0%}", "", "dtype", "sizes", "time")
    for entry in summary["slower_than_inductor"][:WORST]:
        slower.add_row(*_where(entry), _times(entry["times"]))
    failed = table_of("failed or wrong", "", "dtype", "sizes", "contender", "why")
    for entry in summary["failed"][:WORST]:
        failed.add_row(*_where(entry), entry["contender"], entry["why"])
    lists = {"below_copy": below, "slower_than_inductor": slower, "failed": failed}
    for key, table in lists.items():
        if (more := len(summary[key]) - WORST) > 0:
            table.caption = f"and {more} more in the file"
    return [kernels, *(t for t in lists.values() if t.row_count)]


def table_of(title: str, *columns: str) -> Table:
    """An empty table of a summary."""
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
