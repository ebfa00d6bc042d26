"""The sweep over torch's OpInfo database: `python -m tests.opinfo.sweep` (see docs/opinfo.md).

Records are appended to a file of JSON lines as they come, so the command can be killed and started again: items that have a
record are not run twice. A process that dies or hangs costs the item that it was working on, which is recorded as a crash.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.opinfo.samples import DTYPES, LAYOUTS, MODES, Item, items, ops, supports

BATCH = 128
PATIENCE = 900.0
"""Seconds without a word (one batch's compilation included) after which a worker is given up."""


def wanted(args: argparse.Namespace) -> Iterator[Item]:
    """The items asked for, in the order of op_db."""
    for dtype in args.dtypes:
        for mode in args.modes:
            for name, op in ops().items():
                if (args.ops and name not in args.ops) or not supports(op, dtype, mode):
                    continue
                for layout in args.layouts:
                    yield from items(name, dtype, mode, layout, args.samples)


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Records by key, later ones first in force; a line cut short by a kill is ignored."""
    out: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            out[found["key"]] = found
    return out


class Sweep:
    """The items still to run, the workers that run them, and the file of records."""

    def __init__(self, path: Path, executor: str, processes: int) -> None:
        self.path, self.executor, self.processes = path, executor, processes
        self.returned: list[list[Item]] = []
        self.counts: Counter[str] = Counter()
        self.lock, self.taking = threading.Lock(), threading.Lock()

    def run(self, todo: Iterator[Item]) -> Counter[str]:
        """Run every item of `todo`; returns how many had which status."""
        self.todo = todo
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as self.file:
            threads = [threading.Thread(target=self.serve) for _ in range(self.processes)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return self.counts

    def next_batch(self) -> list[Item]:
        """The next items, none at the end. Listing them takes making the samples: so late, and one thread at a time."""
        with self.taking:
            return self.returned.pop() if self.returned else list(itertools.islice(self.todo, BATCH))

    def keep(self, record: dict[str, Any]) -> None:
        with self.lock:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            self.counts[record["status"]] += 1
            done = sum(self.counts.values())
            if done % 200 == 0:
                print(f"{time.strftime('%H:%M:%S')} {done} {dict(self.counts)} {record['key']}", flush=True)

    def serve(self) -> None:
        """Feed one worker at a time until nothing is left."""
        worker: Worker | None = None
        while batch := self.next_batch():
            while batch:
                worker = worker or Worker(self.executor)
                left, culprit = worker.work(batch, self.keep)
                if culprit is not None:
                    worker.close()
                    worker = None
                    left = self.blame(culprit, left)
                batch = left
        if worker is not None:
            worker.close()

    def blame(self, culprit: str, left: list[Item]) -> list[Item]:
        """Record the item that killed a worker; when that is a whole batch (its compilation), halve it."""
        if culprit or len(left) == 1:
            key = culprit or left[0].key
            self.keep({"key": key, "status": "crash", "why": "the process died or hung"})
            return [item for item in left if item.key != key]
        with self.taking:
            self.returned.append(left[len(left) // 2 :])
        return left[: len(left) // 2]


class Worker:
    """One `tests.opinfo.worker` process."""

    def __init__(self, executor: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.opinfo.worker", executor],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def work(self, batch: list[Item], keep: Any) -> tuple[list[Item], str | None]:
        """(items without a record, None or the key at which the worker died; "" when it was none in particular)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        left = {item.key: item for item in batch}
        doing = ""
        fields = [[i.op, i.dtype, i.mode, i.layout, i.number] for i in batch]
        watch = threading.Timer(PATIENCE, self.process.kill)
        watch.start()
        try:
            self.process.stdin.write(json.dumps(fields) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                said = json.loads(line)
                if "done" in said:
                    return list(left.values()), None
                if "doing" in said:
                    doing = said["doing"]
                    continue
                left.pop(said["key"])
                keep(said)
        except OSError:
            return list(left.values()), doing
        finally:
            watch.cancel()
        return list(left.values()), doing

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m tests.opinfo.sweep", description=__doc__)
    out.add_argument("--samples", type=int, default=5, help="samples of each op, evenly spread; 0 for all (default 5)")
    out.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    out.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    out.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    out.add_argument("--ops", nargs="+", help="names of ops (OpInfo.formatted_name); default all")
    out.add_argument("--executor", default="cpp", choices=("cpp", "interpreter"))
    out.add_argument("--processes", type=int, default=2)
    out.add_argument("--records", type=Path, default=Path("build/opinfo.jsonl"), help="where records are kept")
    out.add_argument(
        "--again",
        nargs="*",
        help='run items with these statuses again, "retreated" among them (none given: what is not right)',
    )
    return out


def main() -> None:
    args = parser().parse_args()
    known = read_records(args.records)
    if args.again is not None:
        again = args.again or ["wrong", "error", "crash", "internal", "torch"]
        retreated = "retreated" in again
        stale = {k for k, r in known.items() if r["status"] in again or (retreated and not r.get("generated", True))}
        known = {k: r for k, r in known.items() if k not in stale}
    print(f"{len(known)} items known", flush=True)
    todo = (item for item in wanted(args) if item.key not in known)
    counts = Sweep(args.records, args.executor, args.processes).run(todo)
    print(dict(counts))


if __name__ == "__main__":
    main()
