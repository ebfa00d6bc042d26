"""The committed summary of a sweep: `python -m tests.opinfo.table RECORDS` writes table/<dtype>.json and prints the shares.

For each op: its class and, for each mode (forward, training), how many samples ran, how many were right, how many of those ran
through generated code (nothing but kernels, views and planned library calls), bytes moved by kernels and by unplanned library
calls, and what was not right or not generated. Both layouts are counted together.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.opinfo.classes import JUDGED, op_class
from tests.opinfo.samples import DTYPES, MODES, ops
from tests.opinfo.skips import NOT_RUN
from tests.opinfo.sweep import read_records

DIRECTORY = Path(__file__).parent / "table"

Summary = dict[str, Any]


def summarise(records: Iterable[dict[str, Any]]) -> dict[str, Summary]:
    """dtype -> op -> {"class", mode: counts}."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        op, dtype, mode, _, _ = record["key"].split("|")
        grouped[dtype, op, mode].append(record)
    out: dict[str, Summary] = {dtype: {} for dtype in DTYPES}
    for (dtype, op, mode), found in sorted(grouped.items()):
        entry = out[dtype].setdefault(op, {"class": op_class(ops()[op])})
        entry[mode] = counts(found)
    return {dtype: summary for dtype, summary in out.items() if summary}


def counts(records: list[dict[str, Any]]) -> Summary:
    """One op in one mode. Keys that would hold nothing are left out."""
    run = [r for r in records if r["status"] not in ("skipped", "torch")]
    right = [r for r in run if r["status"] == "right"]
    moved = [r.get("bytes", (0, 0)) for r in run]
    notes = Counter(f"{r['status']}: {r.get('why', '')[:120]}" for r in records if r["status"] != "right")
    retreats = Counter(what for r in run for what in {what for what, _ in r.get("retreats", ())})
    out: Summary = {
        "samples": len(run),
        "right": len(right),
        "generated": sum(bool(r.get("generated")) for r in run),
        "bytes": [sum(m[0] for m in moved), sum(m[1] for m in moved)],
        "other strides": sum(not r.get("strides", True) for r in run),
        "nudged": sum(bool(r.get("nudged")) for r in run),
        "notes": dict(sorted(notes.items())),
        "retreats": dict(sorted(retreats.items())),
    }
    return {name: value for name, value in out.items() if value or name in ("samples", "right", "generated")}


def shares(summary: Summary) -> list[tuple[str, str, int, int, int, int, int]]:
    """(class, mode, samples, right, generated, bytes by kernels, bytes by unplanned calls), and the judged classes together."""
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * 5)
    for entry in summary.values():
        for mode in (m for m in MODES if m in entry):
            c = entry[mode]
            row = [c["samples"], c["right"], c["generated"], *c.get("bytes", (0, 0))]
            names = [entry["class"], "all", *(["judged"] if entry["class"] in JUDGED else [])]
            for name in names:
                totals[name, mode] = [a + b for a, b in zip(totals[name, mode], row, strict=True)]
    return [(name, mode, *row) for (name, mode), row in sorted(totals.items())]  # type: ignore[misc]


def write(summaries: dict[str, Summary], directory: Path = DIRECTORY) -> None:
    """One file for each dtype, an op a line."""
    directory.mkdir(exist_ok=True)
    for dtype, summary in summaries.items():
        lines = [f"{json.dumps(op)}: {json.dumps(entry)}" for op, entry in sorted(summary.items())]
        (directory / f"{dtype}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(dtype: str) -> Summary:
    """The committed table of `dtype`."""
    found: Summary = json.loads((DIRECTORY / f"{dtype}.json").read_text())
    return found


def main(path: str) -> None:
    summaries = summarise(read_records(Path(path)).values())
    write(summaries)
    for dtype, summary in summaries.items():
        print(f"{dtype}: {len(summary)} ops ({len(NOT_RUN)} that a CPU does not have are left out)")
        print(f"  {'class':15} {'mode':9} {'samples':>8} {'right':>8} {'generated':>10} {'of samples':>11} {'of bytes':>9}")
        for name, mode, samples, right, generated, kernels, calls in shares(summary):
            by_samples, by_bytes = generated / max(samples, 1), kernels / max(kernels + calls, 1)
            print(f"  {name:15} {mode:9} {samples:8} {right:8} {generated:10} {by_samples:11.1%} {by_bytes:9.1%}")


if __name__ == "__main__":
    main(sys.argv[1])
