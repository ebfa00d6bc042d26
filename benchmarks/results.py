"""The results file: what ran where, one entry per case, rewritten after each so that a kill loses nothing."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import re
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.workload import Sizes, Workload
from fxopt import __version__
from fxopt.report.compare import Row

SCHEMA = 1

DIGITS = 4
"""Significant digits of a compact file: more than any time repeats."""

SAVE_SECONDS = 4.0

MOST_NAME = 28
"""Characters of a kernel's name in one."""

MOST_LINE = 400
"""Characters of JSON that stand on one line of a compact file."""

_USUAL: dict[str, Any] = {**Row("", "default", False).to_dict(), "contender": None}
"""What a compact file leaves out of a row."""


def target_facts(device: torch.device) -> dict[str, Any]:
    """The device by name and architecture, as far as torch knows it."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        return {
            "kind": "cuda",
            "name": p.name,
            "arch": f"sm_{p.major}{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
        }
    return {
        "kind": "cpu",
        "name": platform.processor() or platform.machine(),
        "arch": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    names = ("triton", "numpy", "transformers", "liger-kernel")
    own = {"fxopt": __version__, "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return {**own, **{n: installed(n) for n in names}}


def revision() -> str | None:
    """The commit of this checkout, with "+" when files differ from it; None outside of a git checkout."""

    def git(*arguments: str) -> str:
        where = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Measured(Protocol):
    """A row of a case."""

    def to_dict(self) -> dict[str, Any]: ...


class Results:
    """A results file being written. With `resume`, cases already in the file are kept and `has` knows them.

    A `compact` file, for hundreds of cases, has rounded numbers and short kernel names. What a row lacks is as in the row
    before when it lacks its contender too, else as in `usual`; `load` fills it in.
    """

    def __init__(
        self, path: Path, device: torch.device, settings: dict[str, Any], resume: bool = False, compact: bool = False
    ) -> None:
        self.path, self.compact = path, compact
        self._saved = -math.inf
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "started": _now(),
            "target": target_facts(device),
            "versions": versions(),
            "settings": settings,
            "cases": [],
        }
        if resume and path.exists():
            self.data["cases"] = load(path)["cases"]

    def has(self, workload: Workload, sizes: Sizes, dtype: str) -> bool:
        """Whether the case is there and whole."""
        case = (workload.name, sizes, dtype)
        return any(_identity(c) == case and not c.get("unfinished") for c in self.data["cases"])

    def add(
        self, workload: Workload, sizes: Sizes, dtype: str, rows: Sequence[Measured], *, unfinished: bool = False
    ) -> None:
        """Append a case and rewrite the file; a compact one, of hundreds, not more often than every SAVE_SECONDS.

        An `unfinished` case, which lacks rows, gives way to the same case with more of them.
        """
        case = (workload.name, sizes, dtype)
        self.data["cases"] = [c for c in self.data["cases"] if not (_identity(c) == case and c.get("unfinished"))]
        self.data["cases"].append(
            {
                "workload": workload.name,
                "kind": workload.kind,
                "training": workload.training,
                "dtype": dtype,
                "sizes": sizes,
                "one_pass": list(workload.one_pass),
                "finished": _now(),
                "commit": revision(),
                "rows": [r.to_dict() for r in rows],
                **({"unfinished": True} if unfinished else {}),
            }
        )
        if not self.compact or time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Rewrite the file, atomically: a reader or a kill never sees half of it."""
        self._saved = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        text = folded(compacted(self.data)) if self.compact else json.dumps(self.data, indent=1)
        temporary.write_text(text + "\n")
        os.replace(temporary, self.path)


def _identity(case: dict[str, Any]) -> tuple[str, Sizes, str]:
    return case["workload"], case["sizes"], case["dtype"]


def load(path: Path) -> dict[str, Any]:
    """A results file's data. Raises ValueError when it is not one of this schema."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a results file of schema {SCHEMA}")
    usual = data.pop("usual", {})
    for case in data["cases"] if usual else []:
        case["rows"] = _completed(case["rows"], usual)
    return data


def _completed(rows: Sequence[dict[str, Any]], usual: dict[str, Any]) -> list[dict[str, Any]]:
    full: list[dict[str, Any]] = []
    for row in rows:
        same = full[-1] if full and "contender" not in row else usual
        full.append(copy.deepcopy(same) | row)
        kernels = full[-1]["kernels"]
        full[-1]["kernel_count"] = None if kernels is None else sum(kernels.values())
    return full


def compacted(data: dict[str, Any]) -> dict[str, Any]:
    """`data` of comparison rows as a compact file has it."""
    short: dict[str, Any] = rounded({**data, "usual": _USUAL})
    for case in short["cases"]:
        for row in case["rows"]:
            names = Counter[str]()
            for name, count in (row["kernels"] or {}).items():
                names[short_name(name)] += count
            row["kernels"] = None if row["kernels"] is None else dict(names)
        bases = [_USUAL, *case["rows"]]
        case["rows"] = [_unlike(row, base) for row, base in zip(case["rows"], bases, strict=False)]
    return short


def _unlike(row: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What `row` has otherwise than the row before it, if that is the same contender's, or than is usual."""
    base = before if before["contender"] == row["contender"] else _USUAL
    return {k: v for k, v in row.items() if k != "kernel_count" and v != base[k]}


def short_name(kernel: str) -> str:
    """A C++ kernel's own name, without result type, namespaces, template arguments and parameters, and not all of it."""
    name = kernel.replace("(anonymous namespace)::", "")
    own = re.split(r"[<(]", name, maxsplit=1)[0]
    return (name if own == name else own.rsplit("::", 1)[-1].rsplit(" ", 1)[-1])[:MOST_NAME]


def rounded(value: Any) -> Any:
    """`value` with numbers as a compact file has them."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def folded(value: Any, margin: str = "") -> str:
    """JSON in which whatever fits on a line stands on one."""
    line = json.dumps(value, separators=(",", ":"))
    if len(line) <= MOST_LINE or not isinstance(value, (list, dict)):
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(k)}:{folded(v, margin + ' ')}" for k, v in value.items()]
    else:
        parts = [folded(v, margin + " ") for v in value]
    first, last = "[]" if isinstance(value, list) else "{}"
    return f"{first}\n{margin} " + f",\n{margin} ".join(parts) + f"\n{margin}{last}"
