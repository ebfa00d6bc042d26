"""Generated C++ to shared objects, with the system's compiler: few translation units, in parallel, each failure kept apart.

Kernels bind to the OpenMP runtime and the vector math that torch itself has loaded: a second OpenMP runtime in one process
would bring a second pool of threads.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fxopt import knobs
from fxopt.codegen import cxx
from fxopt.ir.kernel import CompileFailure, KernelSource

HERE = Path(__file__).parent
HEADER = "cpp_runtime.h"
"""What kernels include."""
_HEADERS = ("cpp_vec.h", "cpp_math.h", HEADER)
_TORCH = Path(torch.__file__).parent
_FLAGS = (
    "-std=c++17 -O2 -fPIC -fopenmp -fwrapv -ffp-contract=off -fno-math-errno -fno-trapping-math "
    "-fvisibility-inlines-hidden -Wno-psabi -Wno-ignored-attributes -Wno-unknown-pragmas -w"
).split()
_INCLUDES = (f"-I{HERE}", f"-I{_TORCH / 'include'}")
_X86_FLAGS = {
    "AVX512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mf16c".split(),
    "AVX2": "-mavx2 -mfma -mf16c".split(),
}


def toolchain_id() -> str:
    """Compiler, its version and flags, fxopt's headers and torch's version: what a compiled kernel depends on."""
    compiler = cxx.find_compiler()
    identity = cxx.NOT_FOUND if compiler is None else cxx.identity(compiler)
    return f"{identity}; {' '.join(_FLAGS)}; runtime {headers_hash()}; torch {torch.__version__}"


@functools.cache
def headers_hash() -> str:
    """Of the headers that kernels include."""
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in _HEADERS)).hexdigest()[:16]


def command(capability: str) -> tuple[str, ...] | None:
    """The compiler and what it is told of kernels and their headers for `capability`; None where there is no compiler."""
    compiler = cxx.find_compiler()
    if compiler is None:
        return None
    return (*compiler, *_FLAGS, *_X86_FLAGS.get(capability, []), *_INCLUDES)


def compile_cpp(
    sources: Sequence[KernelSource], directory: Path, capability: str, precompiled: Path | None = None
) -> list[Path | CompileFailure]:
    """A shared object in `directory` for each of `sources`, in order; several kernels may share one.

    `capability` is torch's name of the instruction set, `precompiled` the headers as `cpp_headers` has made them: without
    them, and should the compiler not take them, it reads the headers' text. Files are named after their content and moved
    into place when complete. A kernel that does not compile comes back as a CompileFailure with the compiler's message,
    without harm to the others. Raises OSError when `directory` cannot be written.
    """
    compiler, reason, how = cxx.find_compiler(), cxx.unusable(), command(capability)
    if compiler is None or how is None or reason is not None:
        return [CompileFailure(s.entry, reason or cxx.NOT_FOUND) for s in sources]
    unique = list({s.entry: s for s in sources}.values())
    with (
        _with_headers(how, precompiled, directory) as quick,
        ThreadPoolExecutor(max_workers=_workers()) as pool,
        cxx.ended_with_the_block(),
    ):
        batches = _batches(unique, _workers())
        built = list(pool.map(lambda batch: _build(batch, quick, directory), batches))
        results = {s.entry: r for batch, r in zip(batches, built, strict=True) for s in batch}
        failed = [b for b, r in zip(batches, built, strict=True) if isinstance(r, CompileFailure)]
        reason = cxx.blame(compiler) if failed else None
        if reason is not None:
            return [CompileFailure(s.entry, reason) for s in sources]
        suspects = [s for batch in failed if len(batch) > 1 or quick != how for s in batch]
        alone = pool.map(lambda s: _build([s], how, directory), suspects)
        results.update(zip((s.entry for s in suspects), alone, strict=True))
    return [_for(results[s.entry], s) for s in sources]


@contextlib.contextmanager
def _with_headers(how: tuple[str, ...], precompiled: Path | None, directory: Path) -> Iterator[tuple[str, ...]]:
    """The command `how` that finds precompiled headers first, by the name that the compiler looks for."""
    if precompiled is None:
        yield how
        return
    with tempfile.TemporaryDirectory(dir=directory, prefix="headers-") as folder:
        Path(folder, f"{HEADER}.gch").symlink_to(precompiled)
        yield (*how[: -len(_INCLUDES)], f"-I{folder}", *_INCLUDES)


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
        source.write_text(f'#include "{HEADER}"\n\n' + "\n".join(s.text for s in batch))
        _, reason = cxx.execute([*command, "-shared", str(source), "-o", str(output), *_link_flags()], cxx.COMPILE_SECONDS)
        if reason is not None:
            return CompileFailure("", reason)
        final = directory / (hashlib.sha256(output.read_bytes()).hexdigest() + ".so")
        os.replace(output, final)
        return final


@functools.cache
def _link_flags() -> tuple[str, ...]:
    """torch's own libraries, by path: already loaded in every process that runs a kernel, so the loader reuses them."""
    lib = _TORCH / "lib"
    openmp = sorted(p for pattern in ("libgomp*.so*", "libomp*.so*", "libiomp5*.so*") for p in lib.glob(pattern))
    return ("-Wl,--as-needed", "-Wl,--no-undefined", *map(str, [*openmp[:1], lib / "libtorch_cpu.so"]))
