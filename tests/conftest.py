"""Shared set-up: no more threads than cores, a cache of the run's own, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = max(1, len(os.sched_getaffinity(0)) // _WORKERS) if hasattr(os, "sched_getaffinity") else 1
# OpenMP reads this when it is loaded, so before torch is imported: workers must not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))

if "FXOPT_CACHE_DIR" not in os.environ:
    # Worker processes inherit it, so kernels are compiled once per run, and nothing of the user's own cache is read.
    _CACHE = tempfile.TemporaryDirectory(prefix="fxopt-tests-")
    os.environ["FXOPT_CACHE_DIR"] = _CACHE.name

import pytest
import torch

from tests.codegen.triton_interpreter import Interpreter
from tests.compilers import REAL, remembering

gc.disable()  # until all is imported: see pytest_collection_finish
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# pytest gives handlers to loggers that do not propagate, and torch renders graphs and stacks for whoever listens to this:
# a twentieth of the tests' time.
logging.getLogger("torch.__trace").propagate = True

if not torch.cuda.is_available():
    # torch seeds every kind of device; for one that is not there it queues the call, with the whole stack as text, for ever.
    torch.random._manual_seed_impl = lambda seed: torch.default_generator.manual_seed(int(seed))


BENCHMARKS = Path(__file__).with_name("benchmarks")
COSTLY, MANY = ("capture", "codegen", "passes", "quant", "runtime"), 8
"""Folders whose tests compile or interpret kernels, and how many cases of a test are so many that every second is slow."""


def _test(item: pytest.Item) -> str:
    """The test that `item` is a case of."""
    return item.nodeid.partition("[")[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == BENCHMARKS and item.path.name != "test_choosing.py":
            item.add_marker(pytest.mark.slow)  # programs that nobody's model runs; what they refuse is cheap to see
    costly = [item for item in items if item.path.parent.name in COSTLY]
    cases = Counter(_test(item) for item in costly)
    seen = Counter[str]()
    for item in costly:
        seen[_test(item)] += 1
        if cases[_test(item)] >= MANY and seen[_test(item)] % 2 == 0:
            item.add_marker(pytest.mark.slow)
    if os.environ.get("CI"):  # whose time is bounded
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def remembering_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A C++ compiler, for FXOPT_CXX, that compiles nothing twice."""
    return remembering(tmp_path_factory.mktemp("compiler"))


@pytest.fixture
def fresh_cache(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembering_compiler: str
) -> Path:
    """An fxopt cache directory for one test: empty, or where KEPT_CACHES names a folder as its last run there left it."""
    kept = os.environ.get("KEPT_CACHES")
    own = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    directory = Path(kept, own) if kept else tmp_path / "cache"
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(directory))
    if REAL is not None:
        monkeypatch.setenv("FXOPT_CXX", remembering_compiler)
    return directory


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """One for all modules: it takes seconds to import what it needs."""
    server = Interpreter()
    yield server
    server.close()


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays until the end, a million objects of modules and tests, and torch's samples of
    ops the search for the `unittest` method that draws them.

    The latter reads the source of every caller, and under pytest there is none.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # tracing makes many objects that stay for a while: a twentieth of the tests' own time
    gc.enable()
    for name in ("common_utils", "opinfo.core"):
        if module := sys.modules.get(f"torch.testing._internal.{name}"):
            module.extract_test_fn = lambda: None  # type: ignore[attr-defined]


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Values that a module draws while it is imported (parameters of tests) are the same in every run."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the last sweep over OpInfo found, by its committed table: of the classes that are judged (opinfo/classes.py)."""
    judged = ("pointwise", "reduction", "indexing", "view")
    table = json.loads((Path(__file__).parent / "opinfo" / "table" / "float32.json").read_text())
    for mode in ("forward", "training"):
        counts = [entry[mode] for entry in table.values() if mode in entry and entry["class"] in judged]
        samples, right, generated = (sum(c[what] for c in counts) for what in ("samples", "right", "generated"))
        ours, theirs = (sum(c.get("bytes", (0, 0))[k] for c in counts) for k in (0, 1))
        terminalreporter.write_line(
            f"OpInfo float32 {mode} (committed sweep): {right} of {samples} samples right, {generated / samples:.1%} through"
            f" generated code alone, which moved {ours / (ours + theirs):.1%} of the bytes outside planned library calls"
        )
