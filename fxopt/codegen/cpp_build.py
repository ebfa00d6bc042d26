"""Generated C++ to shared objects, with the system's compiler: few translation units, in parallel, each failure kept apart.

Kernels bind to the OpenMP runtime and the vector math that torch itself has loaded: a second OpenMP runtime in one process
would bring a second pool of threads.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fxopt import knobs
from fxopt.codegen import cxx
from fxopt.ir.kernel import CompileFailure, KernelSource

_HERE = Path(__file__).parent
_HEADERS = ("cpp_vec.h", "cpp_math.h", "cpp_runtime.h")
_TORCH = Path(torch.__file__).parent
_FLAGS = (
    "-std=c++17 -O2 -fPIC -fopenmp -fwrapv -ffp-contract=off -fno-math-errno -fno-trapping-math "
    "-fvisibility-inlines-hidden -Wno-psabi -Wno-ignored-attributes -Wno-unknown-pragmas -w"
).split()
_X86_FLAGS = {
    "AVX512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mf16c".split(),
    "AVX2": "-mavx2 -mfma -mf16c".split(),
}
_CALLS_BEFORE_PRECOMPILING = 2
"""Parsing the headers is most of a small compilation. A process that keeps compiling precompiles them once, which costs
about as much as three compilations and makes later ones several times faster; one that compiles a single model does not."""


def toolchain_id() -> str:
    """Compiler, its version and flags, fxopt's headers and torch's version: what a compiled kernel depends on."""
    compiler = cxx.find_compiler()
    version = cxx.NOT_FOUND if compiler is None else cxx.version(compiler)
    return f"{version}; {' '.join(_FLAGS)}; runtime {_headers_hash()}; torch {torch.__version__}"


@functools.cache
def _headers_hash() -> str:
    return hashlib.sha256(b"".join((_HERE / name).read_bytes() for name in _HEADERS)).hexdigest()[:16]


def compile_cpp(sources: Sequence[KernelSource], directory: Path, capability: str) -> list[Path | CompileFailure]:
    """A shared object in `directory` for each of `sources`, in order; several kernels may share one.

    `capability` is torch's name of the instruction set. Files are named after their content and moved into place when
    complete. A kernel that does not compile comes back as a CompileFailure with the compiler's message, without harm to the
    others. Raises OSError when `directory` cannot be written.
    """
    compiler, reason = cxx.find_compiler(), cxx.unusable()
    if compiler is None or reason is not None:
        return [CompileFailure(s.entry, reason or cxx.NOT_FOUND) for s in sources]
    command = (*compiler, *_FLAGS, *_X86_FLAGS.get(capability, []))
    headers = _HEADER_CACHE.directory(command)
    includes = [f"-I{d}" for d in (headers, _HERE, _TORCH / "include") if d is not None]
    unique = list({s.entry: s for s in sources}.values())
    with ThreadPoolExecutor(max_workers=_workers()) as pool, cxx.ended_with_the_block():
        batches = _batches(unique, _workers())
        built = list(pool.map(lambda batch: _build(batch, [*command, *includes], directory), batches))
        results = {s.entry: r for batch, r in zip(batches, built, strict=True) for s in batch}
        failed = [b for b, r in zip(batches, built, strict=True) if isinstance(r, CompileFailure)]
        reason = cxx.blame(compiler) if failed else None
        if reason is not None:
            return [CompileFailure(s.entry, reason) for s in sources]
        suspects = [s for batch in failed if len(batch) > 1 for s in batch]
        alone = pool.map(lambda s: _build([s], [*command, *includes], directory), suspects)
        results.update(zip((s.entry for s in suspects), alone, strict=True))
    return [_for(results[s.entry], s) for s in sources]


def _for(result: Path | CompileFailure, source: KernelSource) -> Path | CompileFailure:
    return CompileFailure(source.entry, result.reason) if isinstance(result, CompileFailure) else result


def _workers() -> int:
    wanted = knobs.WORKERS.get()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores if wanted is None else wanted)


def _batches(sources: list[KernelSource], count: int) -> list[list[KernelSource]]:
    """At most `count` groups of about the same length of text."""
    groups: list[list[KernelSource]] = [[] for _ in range(min(count, len(sources)))]
    lengths = [0] * len(groups)
    for source in sorted(sources, key=lambda s: (-len(s.text), s.entry)):
        smallest = lengths.index(min(lengths))
        groups[smallest].append(source)
        lengths[smallest] += len(source.text)
    return groups


def _build(batch: list[KernelSource], command: Sequence[str], directory: Path) -> Path | CompileFailure:
    """One shared object with every kernel of `batch`; a failure is the whole batch's."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as scratch:
        source, output = Path(scratch, "kernels.cpp"), Path(scratch, "kernels.so")
        source.write_text('#include "cpp_runtime.h"\n\n' + "\n".join(s.text for s in batch))
        _, reason = cxx.execute([*command, "-shared", str(source), "-o", str(output), *_link_flags()], cxx.COMPILE_SECONDS)
        if reason is not None:
            return CompileFailure("", reason)
        final = directory / (hashlib.sha256(output.read_bytes()).hexdigest() + ".so")
        os.replace(output, final)
        return final


class _HeaderCache:
    """The runtime headers, precompiled for a command, in a private directory that goes away with the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[tuple[str, ...], int] = {}
        self._made: dict[tuple[str, ...], tempfile.TemporaryDirectory[str] | None] = {}

    def directory(self, command: tuple[str, ...]) -> Path | None:
        """Where the compiler finds them when they pay; None otherwise, or when this compiler cannot make them."""
        with self._lock:
            self._calls[command] = self._calls.get(command, 0) + 1
            if self._calls[command] <= _CALLS_BEFORE_PRECOMPILING:
                return None
            if command not in self._made:
                self._made[command] = self._make(command)
            made = self._made[command]
        return None if made is None else Path(made.name)

    def _make(self, command: tuple[str, ...]) -> tempfile.TemporaryDirectory[str] | None:
        place = tempfile.TemporaryDirectory(prefix="fxopt-headers-", ignore_cleanup_errors=True)
        header, output = _HERE / _HEADERS[-1], Path(place.name, _HEADERS[-1] + ".gch")
        precompile = [*command, f"-I{_TORCH / 'include'}", "-x", "c++-header", str(header), "-o", str(output)]
        if cxx.execute(precompile, cxx.COMPILE_SECONDS)[1] is None:
            return place
        place.cleanup()
        return None


_HEADER_CACHE = _HeaderCache()


@functools.cache
def _link_flags() -> tuple[str, ...]:
    """torch's own libraries, by path: already loaded in every process that runs a kernel, so the loader reuses them."""
    lib = _TORCH / "lib"
    openmp = sorted(p for pattern in ("libgomp*.so*", "libomp*.so*", "libiomp5*.so*") for p in lib.glob(pattern))
    return ("-Wl,--as-needed", "-Wl,--no-undefined", *map(str, [*openmp[:1], lib / "libtorch_cpu.so"]))
