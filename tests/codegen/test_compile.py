"""Kernels are compiled once, in order, in parallel; failures are values."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fxopt import journal
from fxopt.codegen import compile as compiling
from fxopt.codegen import cpp_build, triton_build, triton_job, workers
from fxopt.codegen.compile import compile_kernels
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.runtime import cachedir
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target

CPU = Target.cpu()
H100 = Target.cuda(90)

TRITON = """
import triton
import triton.language as tl

@triton.jit
def increment(b0, b1, n0, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(b1 + i, tl.load(b0 + i, mask=i < n0) + CONSTANT, mask=i < n0)
"""
OPTIONS = {
    "signature": {"b0": "*fp32", "b1": "*fp32", "n0": "i32"},
    "constexprs": {"BLOCK": 256},
    "aligned": ["b0", "b1"],
    "num_warps": 4,
    "num_stages": 1,
    "asserts": False,
}


def cpp(n: int) -> KernelSource:
    """A kernel that returns n."""
    text = f'#include <cstdint>\nextern "C" int64_t give_{n}(void** buffers, const int64_t* sizes) {{ return {n}; }}\n'
    return KernelSource("cpp", f"give_{n}", text, ())


def triton(constant: str) -> KernelSource:
    return KernelSource("triton", "increment", TRITON.replace("CONSTANT", constant), ("x", "y"), compile_options=OPTIONS)


@pytest.fixture(autouse=True)
def _no_target_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's broken compilers teach about a target is forgotten after it."""
    monkeypatch.setattr(compiling, "_refused", {})
    monkeypatch.setattr(compiling, "_probed", set())


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "cache")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the C++ compiler by one that writes the text down, and fails for the text "bad"."""
    log: list[str] = []

    def compile_cpp(sources: list[KernelSource], directory: Path, capability: str, *_: Any) -> list[Path | CompileFailure]:
        out: list[Path | CompileFailure] = []
        for i, source in enumerate(sources):
            log.append(source.entry)
            path = directory / f"{i}.so"
            path.write_text(source.text)
            out.append(CompileFailure("", "error: it is bad") if source.text == "bad" else path)
        return out

    monkeypatch.setattr(cpp_build, "compile_cpp", compile_cpp)
    monkeypatch.setattr(cpp_build, "toolchain_id", lambda *_: "a compiler")
    return log


def entries(results: list[Artifact | CompileFailure]) -> list[str]:
    return [r.entry if isinstance(r, Artifact) else r.reason for r in results]


def test_results_are_in_order_and_equal_kernels_compiled_once(store: ArtifactStore, built: list[str]) -> None:
    results = compile_kernels([cpp(2), cpp(1), cpp(2), cpp(3)], CPU, store)
    assert entries(results) == ["give_2", "give_1", "give_2", "give_3"]
    assert results[0] == results[2] and built == ["give_2", "give_1", "give_3"]


def test_what_the_store_has_is_not_compiled(store: ArtifactStore, built: list[str]) -> None:
    compile_kernels([cpp(1)], CPU, store)
    built.clear()
    assert entries(compile_kernels([cpp(1), cpp(2)], CPU, ArtifactStore(store.directory))) == ["give_1", "give_2"]
    assert built == ["give_2"]


def test_each_place_is_ready_once_its_kernel_is_known(store: ArtifactStore, built: list[str]) -> None:
    compile_kernels([cpp(1)], CPU, store)
    heard: list[tuple[int, str]] = []

    def sources() -> Iterator[KernelSource]:
        yield from (cpp(2), cpp(1), KernelSource("cpp", "bad", "bad", ()), cpp(2))
        assert not heard, "not before the last source is there"

    results = compile_kernels(sources(), CPU, store, lambda place, result: heard.append((place, entries([result])[0])) or ())
    assert heard[0] == (1, "give_1"), "what the store has comes first"
    assert sorted(heard) == list(enumerate(entries(results)))


def test_what_was_stored_counts_for_the_cap_when_measuring_fails(store: ArtifactStore, built: list[str]) -> None:
    """The process may end with that: kernels that nobody has counted would stay behind each time."""

    def ready(place: int, result: Artifact | CompileFailure) -> list[KernelSource]:
        raise KeyError("hung kernel")

    with pytest.raises(KeyError):
        compile_kernels([cpp(1)], CPU, store, ready)
    usage = store.cache.get_document("", "usage")
    assert usage is not None and usage["bytes"] >= sum(p.stat().st_size for p in (store.directory / "blobs").iterdir()) > 0


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_kernel_that_is_ready_may_lead_to_others(
    store: ArtifactStore, workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them those that are known, that are compiled already, and what one that failed leads to."""
    monkeypatch.setenv("FXOPT_WORKERS", workers)
    (known,) = compile_kernels([triton("7.0")], H100, store)
    leads_to = {0: "2.0 7.0", 1: "3.0", 2: "1.0", 3: "bad", 4: "5.0", 5: "4.0"}
    heard: list[int] = []

    def ready(place: int, result: Artifact | CompileFailure) -> list[KernelSource]:
        heard.append(place)
        return [triton(n) for n in leads_to.get(place, "").split()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = compile_kernels([triton("1.0")], H100, store, ready)
    assert sorted(heard) == list(range(len(results)))
    good = [r for r in results if isinstance(r, Artifact)]
    assert len(good) == len(results) - 1 and known in good
    every = [triton(n) for n in ("1.0", "2.0", "3.0", "4.0", "5.0", "7.0")]
    assert {r.key for r in good} == {r.key for r in compile_kernels(every, H100, store) if isinstance(r, Artifact)}


def test_the_toolchain_and_target_are_in_the_key(
    store: ArtifactStore, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_kernels([cpp(1)], CPU, store)
    monkeypatch.setattr(cpp_build, "toolchain_id", lambda *_: "a newer compiler")
    compile_kernels([cpp(1)], CPU, store)
    compile_kernels([cpp(1)], Target("cpu", cpu_capability="other"), store)
    assert built == ["give_1"] * 3


def test_a_failure_is_a_value_with_its_reason(store: ArtifactStore, built: list[str]) -> None:
    bad = KernelSource("cpp", "bad", "bad", ())
    assert entries(compile_kernels([cpp(1), bad, cpp(2)], CPU, store)) == ["give_1", "error: it is bad", "give_2"]
    assert isinstance(compile_kernels([bad], CPU, store)[0], CompileFailure), "it is tried again: the compiler may be mended"
    assert built == ["give_1", "bad", "give_2", "bad"]


def test_damaged_machine_code_is_compiled_again(store: ArtifactStore, built: list[str]) -> None:
    (first,) = compile_kernels([cpp(1)], CPU, store)
    assert isinstance(first, Artifact)
    first.path.write_bytes(b"damage")
    with pytest.warns(UserWarning, match="damaged"):
        (again,) = compile_kernels([cpp(1)], CPU, ArtifactStore(store.directory))
    assert isinstance(again, Artifact)
    assert again.path.read_text() == cpp(1).text and built == ["give_1"] * 2


def test_nowhere_to_write_is_a_failure_not_an_exception(
    store: ArtifactStore, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (result,) = compile_kernels([cpp(1)], CPU, store)
    assert isinstance(result, CompileFailure)
    assert "No space left" in result.reason


def test_no_triton_is_a_failure_that_says_so(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_build, "available", lambda: "Triton is not installed: pip install triton")
    monkeypatch.setattr(triton_build, "toolchain_id", triton_build.toolchain_id.__wrapped__)  # it remembers what it said
    monkeypatch.setattr(journal, "_told", set())
    with pytest.warns(UserWarning, match="leaves GPU operators to ATen.*pip install triton") as caught:
        results = [compile_kernels([triton(n)], H100, store) for n in "12"]
    assert [entries(r) for r in results] == [["Triton is not installed: pip install triton"]] * 2 and len(caught) == 1


def test_a_triton_that_cannot_be_imported(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object) -> object:
        raise workers.WorkersUnavailable("the compile helper cannot work: ImportError: libLLVM is missing")

    monkeypatch.setattr(journal, "_told", set())
    monkeypatch.setattr(compiling, "_refused", {})
    monkeypatch.setattr(compiling, "shared_pool", unavailable)
    monkeypatch.setitem(sys.modules, "triton.compiler", None)
    with pytest.warns(UserWarning, match="Triton cannot be imported") as caught:
        results = [compile_kernels([triton(n)], H100, store) for n in "12"]
    assert len(caught) == 1 and all(isinstance(r, CompileFailure) for (r,) in results)


def test_a_gpu_that_triton_does_not_know(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(journal, "_told", set())
    future = Target.cuda(130)
    with pytest.warns(UserWarning, match="does not know the GPU sm_130") as caught:
        first, second = (compile_kernels([triton(n)], future, store)[0] for n in ("1.0", "2.0"))
    assert isinstance(first, CompileFailure) and isinstance(second, CompileFailure)
    assert first.reason == second.reason and "\n" not in first.reason and len(caught) == 1
    assert isinstance(compile_kernels([triton("1.0")], H100, store)[0], Artifact), "other targets are not affected"


@pytest.mark.parametrize("sound", [False, True])
def test_a_gpu_that_nothing_compiles_for(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, sound: bool) -> None:
    """Whatever the compiler says of a GPU that it cannot serve: when not even the simplest kernel compiles, that is why."""
    tried: list[str] = []

    def run_jobs(jobs: Iterable[dict[str, Any]], target: Target, heard: Any = None) -> list[workers.Outcome]:
        jobs = list(jobs)
        tried.extend(job["source"]["entry"] for job in jobs)
        fine, failed = workers.Outcome({"code": "", "meta": {}}), workers.Outcome(error="no ptxas")
        return [fine if sound and job["source"]["entry"] == "fx_probe" else failed for job in jobs]

    monkeypatch.setattr(compiling, "_run_jobs", run_jobs)
    monkeypatch.setattr(journal, "_told", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reasons = [compile_kernels([triton(n)], Target.cuda(130), store)[0].reason for n in "12"]
    assert tried == ["increment", "fx_probe", *(["increment"] if sound else [])]
    told = [str(w.message) for w in caught if "fxopt" in str(w.message)]
    assert len(told) == (0 if sound else 1) and all("compiles nothing for the GPU sm_130" in t for t in told)
    assert all(("compiles nothing" in r) is not sound and "no ptxas" in r for r in reasons)


def test_the_simplest_kernel_compiles() -> None:
    pytest.importorskip("triton")
    assert triton_build.compile_triton(triton_job.PROBE, H100)[0].startswith(b"\x7fELF")


def test_compile_workers_do_without_torch() -> None:
    """Its import takes longer than a compilation."""
    pytest.importorskip("triton")
    job = "import sys; from fxopt.codegen import triton_job; triton_job.rehearse(); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", job], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "False"


def test_a_gpu_older_than_triton_supports(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_told", set())
    with pytest.warns(UserWarning, match="does not support sm_61"):
        (result,) = compile_kernels([triton("1.0")], Target.cuda(61), store)
    assert isinstance(result, CompileFailure)


def test_no_workers_means_this_process_with_one_warning(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_build, "compile_triton", lambda source, target: (source.text.encode(), {"num_warps": 4}))
    monkeypatch.setattr(journal, "_told", set())
    monkeypatch.setattr(workers, "_pools", {})
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.warns(UserWarning, match="one by one in this process") as caught:
        results = [compile_kernels([triton(n)], H100, store) for n in "123"]
    assert len(caught) == 1 and [entries(r) for r in results] == [["increment"]] * 3


def test_zero_workers_means_this_process(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: KernelSource, target: Target) -> tuple[bytes, dict[str, Any]]:
        if source.entry == "fx_probe":
            return b"", {}
        raise ValueError(f"cannot compile for {target.name}")

    monkeypatch.setenv("FXOPT_WORKERS", "0")
    monkeypatch.setattr(triton_build, "compile_triton", fail)
    assert entries(compile_kernels([triton("1")], H100, store)) == ["ValueError: cannot compile for sm_90"]


def test_triton_kernels_compile_in_workers(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FXOPT_WORKERS", "2")
    good, bad, other = compile_kernels([triton("1.0"), triton("no_such_name"), triton("2.0")], H100, store)
    assert isinstance(good, Artifact) and isinstance(other, Artifact) and isinstance(bad, CompileFailure)
    assert good.path.read_bytes()[:4] == b"\x7fELF" and good.path.suffix == ".cubin"
    assert good.meta["name"] == "increment" and good.path != other.path
    assert "no_such_name" in bad.reason


def test_cpp_kernels_compile_and_load(store: ArtifactStore) -> None:
    results = compile_kernels([cpp(4), cpp(5)], CPU, store)
    for n, result in zip((4, 5), results, strict=True):
        assert isinstance(result, Artifact)
        assert ctypes.CDLL(str(result.path))[result.entry](None, None) == n


COLD = """
    import sys
    from fxopt.codegen import cpp_build
    from fxopt.codegen.compile import compile_kernels
    from fxopt.ir.kernel import Artifact, KernelSource
    from fxopt.runtime.artifacts import ArtifactStore
    from fxopt.target import Target

    def compile_cpp(sources, directory, capability, *_):
        out = []
        for i, source in enumerate(sources):
            out.append(directory / f"{i}.so")
            out[-1].write_text(source.text * 1000)
        return out

    cpp_build.compile_cpp, cpp_build.toolchain_id = compile_cpp, lambda *_: "a compiler"
    store = ArtifactStore(sys.argv[1])
    sources = [KernelSource("cpp", f"k{i}", f"text {i}", ()) for i in range(20)]
    for source, found in zip(sources, compile_kernels(sources, Target("cpu"), store)):
        assert isinstance(found, Artifact) and found.entry == source.entry, found
        assert found.path.read_text() == source.text * 1000
"""


def test_a_builder_that_never_ends_is_not_waited_for(
    store: ArtifactStore, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cachedir, "PATIENCE_SECONDS", 0.1)
    with store.cache.claimed(cpp(1).key(compiling.toolchain(CPU))):
        assert entries(compile_kernels([cpp(1)], CPU, store)) == ["give_1"]


def test_four_processes_on_one_cold_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(COLD), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(list((tmp_path / "cache" / "entries").iterdir())) == 20
