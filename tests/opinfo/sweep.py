"""The sweep over torch's OpInfo database: `python -m tests.opinfo.sweep` (see docs/opinfo.md).

Records are appended to a file of JSON lines as they come, so the command can be killed and started again: items that have a
record are not run twice. A process that dies or hangs, or whose CUDA context is lost, costs the item that it was working on,
which is recorded as a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxopt.options import suggestion
from tests.opinfo.samples import DEVICES, DTYPES, LAYOUTS, MODES, Item, items, ops, supports
from tests.processes import Worker

BATCH = {"cpp": 128, "interpreter": 128, "triton": 16}
"""Items compiled together, by executor: a C++ compiler takes seconds for a file, Triton takes its time for each kernel."""

PATIENCE = {"cpp": 900.0, "interpreter": 900.0, "triton": 240.0}
"""Seconds without a word (one batch's compilation included) after which a worker is given up, by executor."""

GRACE = 20.0
"""Seconds that begun batches have when the time is up."""

PROGRESS = 10.0
"""Seconds between lines that say how far it is."""


def wanted(args: argparse.Namespace) -> Iterator[Item]:
    """The items asked for, in the order of op_db.

    An op whose samples cannot be made is one item, so that a worker meets the same error and records it.
    """
    device = DEVICES[args.executor]
    for dtype in args.dtypes:
        for mode in args.modes:
            for name, op in ops().items():
                if (args.ops and name not in args.ops) or not supports(op, dtype, mode, device):
                    continue
                for layout in args.layouts:
                    try:
                        found = items(name, dtype, mode, layout, args.samples, device)
                    except Exception:
                        found = [Item(name, dtype, mode, layout, 0, device)]
                    yield from found


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
    """The items still to run, the workers that run them, and the file of records.

    After `minutes` no batch is begun; those that are not finished soon are cut off, and their items have no record.
    """

    def __init__(self, path: Path, executor: str, processes: int, minutes: float = math.inf) -> None:
        self.path, self.executor, self.processes = path, executor, processes
        self.began = time.monotonic()
        self.deadline = self.began + 60 * minutes
        self.returned: list[list[Item]] = []
        self.listed: queue.Queue[list[Item]] = queue.Queue(2 * processes)
        self.counts: Counter[str] = Counter()
        self.generated = 0
        self.unusable = ""
        self.lock = threading.Lock()
        self.said = self.began

    def run(self, todo: Iterator[Item]) -> Counter[str]:
        """Run every item of `todo`, or those that time allows; returns how many had which status.

        Raises RuntimeError when workers do not even start, or `todo` fails.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as self.file:
            threading.Thread(target=self.list_batches, args=(todo,), daemon=True).start()
            threads = [threading.Thread(target=self.serve) for _ in range(self.processes)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self.unusable:
            raise RuntimeError(self.unusable)
        return self.counts

    def is_over(self, grace: float = 0.0) -> bool:
        """Whether no batch may begin (with `grace`: go on)."""
        return bool(self.unusable) or time.monotonic() >= self.deadline + grace

    def list_batches(self, todo: Iterator[Item]) -> None:
        """Batches for the workers, an empty one for each at the end. Listing items takes making all samples of their ops."""
        try:
            while not self.is_over() and (batch := list(itertools.islice(todo, BATCH[self.executor]))):
                self.listed.put(batch)
        except Exception as error:
            self.unusable = f"items cannot be listed: {type(error).__name__}: {error}"
        for _ in range(self.processes):
            self.listed.put([])

    def next_batch(self) -> list[Item]:
        """The next items, none at the end."""
        while not self.is_over():
            with self.lock:
                if self.returned:
                    return self.returned.pop()
            with contextlib.suppress(queue.Empty):
                return self.listed.get(timeout=1.0)
        return []

    def keep(self, record: dict[str, Any]) -> None:
        with self.lock:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            self.counts[record["status"]] += 1
            self.generated += bool(record.get("generated"))
            if time.monotonic() >= self.said + PROGRESS:
                self.said = time.monotonic()
                print(f"{self.progress()} {record['key']}", flush=True)

    def progress(self) -> str:
        """Time of day, seconds so far, records, records a second, and how they came out."""
        seconds, done = time.monotonic() - self.began, sum(self.counts.values())
        rate = done / max(seconds, 1e-9)
        said = f"{seconds:.0f} s: {done} ({rate:.1f}/s), {self.generated} generated, {dict(self.counts)}"
        return f"{time.strftime('%H:%M:%S')} {said}"

    def serve(self) -> None:
        """Feed one worker at a time until nothing is left."""
        worker: BatchWorker | None = None
        while batch := self.next_batch():
            while batch:
                worker = worker or BatchWorker(self.executor, self.processes)
                left, culprit = worker.work(batch, self.keep, self.deadline + GRACE)
                if culprit is not None:
                    worker.close()
                    if not worker.works and not self.is_over(GRACE):
                        self.unusable = f"workers do not start: {worker.last_words}"
                    if self.is_over(GRACE):
                        return
                    left = self.blame(culprit, left, worker.last_words)
                    worker = None
                batch = left
        if worker is not None:
            worker.close()

    def blame(self, culprit: str, left: list[Item], why: str) -> list[Item]:
        """Record the item that killed a worker; when that is a whole batch (its compilation), halve it."""
        if culprit or len(left) == 1:
            key = culprit or left[0].key
            self.keep({"key": key, "status": "crash", "why": why})
            return [item for item in left if item.key != key]
        with self.lock:
            self.returned.append(left[len(left) // 2 :])
        return left[: len(left) // 2]


class BatchWorker(Worker):
    """One `tests.opinfo.worker` process, of `processes` that share the machine."""

    COMMAND = ("-m", "tests.opinfo.worker")

    def __init__(self, executor: str, processes: int = 1) -> None:
        super().__init__((*self.COMMAND, executor), PATIENCE[executor], processes, OMP_NUM_THREADS="1")

    def work(self, batch: list[Item], keep: Any, until: float = math.inf) -> tuple[list[Item], str | None]:
        """(items without a record, None or the key at which the worker died; "" when it was none in particular)."""
        left = {item.key: item for item in batch}
        doing = ""
        for said in self.ask([dataclasses.astuple(item) for item in batch], until):
            if "done" in said:
                return list(left.values()), None
            if "doing" in said:
                doing = said["doing"]
            else:
                left.pop(said["key"])
                keep(said)
        return list(left.values()), doing


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m tests.opinfo.sweep", description=__doc__)
    out.add_argument("--samples", type=int, default=5, help="samples of each op, evenly spread; 0 for all (default 5)")
    out.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    out.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    out.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    out.add_argument("--ops", nargs="+", help="names of ops (OpInfo.formatted_name); default all")
    out.add_argument("--executor", default="cpp", choices=DEVICES, help="triton: samples and kernels on a GPU (default cpp)")
    out.add_argument("--processes", type=int, default=2)
    out.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after this time")
    out.add_argument("--records", type=Path, default=Path("build/opinfo.jsonl"), help="where records are kept")
    out.add_argument(
        "--again",
        nargs="*",
        help='run items with these statuses again, "retreated" among them (none given: what is not right)',
    )
    return out


def main() -> None:
    args = parser().parse_args()
    names = ops()
    for name in (name for name in args.ops or () if name not in names):
        parser().error(f"no op is called {name!r}{suggestion(name, names)}")
    known = read_records(args.records)
    if args.again is not None:
        again = args.again or ["wrong", "error", "crash", "internal", "torch"]
        retreated = "retreated" in again
        stale = {k for k, r in known.items() if r["status"] in again or (retreated and not r.get("generated", True))}
        known = {k: r for k, r in known.items() if k not in stale}
    print(f"{len(known)} items known", flush=True)
    todo = (item for item in wanted(args) if item.key not in known)
    sweep = Sweep(args.records, args.executor, args.processes, args.minutes)
    sweep.run(todo)
    print(f"{sweep.progress()}{'; the time is up' if sweep.is_over() else ''}", flush=True)


if __name__ == "__main__":
    main()
