"""The committed summary of a sweep: `python -m tests.opinfo.table RECORDS` writes table/*.json and prints the shares.

The committed tables are of the CPU: those of a GPU's records go elsewhere, `python -m tests.opinfo.table RECORDS DIRECTORY`.

table/<dtype>.json holds for each op its class and, for each mode (forward, training), how many samples ran, how many were
right, how many ran through generated code (nothing but kernels, views and planned library calls), bytes moved by kernels and
by unplanned library calls, and what was not right or not generated. Both layouts are counted together.
table/retreats.json lists the operators that may run as ATen calls, each with the reasons; the slice in CI allows no other.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.opinfo.classes import JUDGED, op_class
from tests.opinfo.samples import DTYPES, MODES, ops
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
        known = op_class(ops()[op]) if op in ops() else "of another torch"
        entry = out[dtype].setdefault(op, {"class": known})
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
    """(class, mode, samples, right, generated, bytes of kernels, of unplanned calls); "judged" and "all" sum up classes."""
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * 5)
    for entry in summary.values():
        for mode in (m for m in MODES if m in entry):
            c = entry[mode]
            row = [c["samples"], c["right"], c["generated"], *c.get("bytes", (0, 0))]
            names = [entry["class"], "all", *(["judged"] if entry["class"] in JUDGED else [])]
            for name in names:
                totals[name, mode] = [a + b for a, b in zip(totals[name, mode], row, strict=True)]
    return [(name, mode, *row) for (name, mode), row in sorted(totals.items())]  # type: ignore[misc]


def planned_retreats(records: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """operator -> why it ran as an ATen call. A kernel that could not be built is a bug and not among the reasons."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for what, why in record.get("retreats", ()):
            if record["status"] == "right" and not _is_bug(what, why):
                found[what].add(re.sub(r"\d+", "N", why))
    return {what: sorted(found[what]) for what in sorted(found)}


def _is_bug(what: str, why: str) -> bool:
    return "could not be built" in why or "error:" in why or "," in what or what == "the whole graph"


def write(summaries: dict[str, Summary], retreats: dict[str, list[str]], directory: Path = DIRECTORY) -> None:
    """One file for each dtype, an op a line, and the list of retreats."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(what)}: {json.dumps(why)}" for what, why in retreats.items()]
    (directory / "retreats.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for dtype, summary in summaries.items():
        lines = [f"{json.dumps(op)}: {json.dumps(entry)}" for op, entry in sorted(summary.items())]
        (directory / f"{dtype}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(name: str) -> Summary:
    """The committed table of a dtype, or "retreats"."""
    found: Summary = json.loads((DIRECTORY / f"{name}.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.opinfo.table", description=__doc__)
    parser.add_argument("records", type=Path, help="what the sweep has written")
    parser.add_argument("directory", type=Path, nargs="?", default=DIRECTORY, help="default: that of the committed tables")
    given = parser.parse_args()
    records = read_records(given.records).values()
    if not records:
        parser.error(f"{given.records} has no records")
    summaries = summarise(records)
    write(summaries, planned_retreats(records), given.directory)
    for dtype, summary in summaries.items():
        print(f"{dtype}: {len(summary)} ops")
        print(f"  {'class':15} {'mode':9} {'samples':>8} {'right':>8} {'generated':>10} {'of samples':>11} {'of bytes':>9}")
        for name, mode, samples, right, generated, kernels, calls in shares(summary):
            by_samples, by_bytes = generated / max(samples, 1), kernels / max(kernels + calls, 1)
            print(f"  {name:15} {mode:9} {samples:8} {right:8} {generated:10} {by_samples:11.1%} {by_bytes:9.1%}")


if __name__ == "__main__":
    main()
