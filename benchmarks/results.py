"""The results file: what ran where, one entry per case, rewritten after each so that a kill loses nothing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.workload import Sizes, Workload
from fxopt import __version__

SCHEMA = 1


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
    """A results file being written. With `resume`, cases already in the file are kept and `has` knows them."""

    def __init__(self, path: Path, device: torch.device, settings: dict[str, Any], resume: bool = False) -> None:
        self.path = path
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
        return any((c["workload"], c["sizes"], c["dtype"]) == (workload.name, sizes, dtype) for c in self.data["cases"])

    def add(self, workload: Workload, sizes: Sizes, dtype: str, rows: Sequence[Measured]) -> None:
        """Append a case and rewrite the file."""
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
            }
        )
        self.save()

    def save(self) -> None:
        """Rewrite the file, atomically: a reader or a kill never sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(temporary, self.path)


def load(path: Path) -> dict[str, Any]:
    """A results file's data. Raises ValueError when it is not one of this schema."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a results file of schema {SCHEMA}")
    return data
