"""Compiling printed C++: batches, failures kept apart, no compiler, one OpenMP runtime."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fxopt.codegen import cpp_build, cpp_headers, cxx, replay_build
from fxopt.codegen.cpp import print_nest
from fxopt.codegen.cpp_build import compile_cpp, toolchain_id
from fxopt.codegen.cxx import find_compiler
from fxopt.ir.kernel import CompileFailure, KernelSource
from tests.codegen import triton_nests as nests
from tests.codegen.cpp_harness import HOST, check
from tests.codegen.triton_nests import F32, Case


def sources(count: int) -> tuple[list[Case], list[KernelSource]]:
    cases = [nests.pointwise(100 + i, F32) for i in range(count)]
    return cases, [print_nest(c.region, HOST) for c in cases]


def test_kernels_share_few_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_WORKERS", "2")
    cases, printed = sources(5)
    built = compile_cpp([*printed, printed[0]], tmp_path, HOST.cpu_capability)
    paths = [b for b in built if isinstance(b, Path)]
    assert len(paths) == 6 and len(set(paths)) == 2 and paths[5] == paths[0]
    for case, source, path in zip(cases, printed, paths, strict=False):
        assert re.fullmatch(r"[0-9a-f]{64}\.so", path.name)
        check(case, (source, path))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".so", ".so"], "nothing else is left behind"


def test_only_the_guilty_kernel_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_WORKERS", "1")
    cases, (first, second) = sources(2)
    bad = KernelSource("cpp", "fx_bad", 'extern "C" int64_t fx_bad(void**, const int64_t*) { return nonsense; }', ())
    good, failure, also_good = compile_cpp([first, bad, second], tmp_path, HOST.cpu_capability)
    assert isinstance(failure, CompileFailure) and "nonsense" in failure.reason
    for case, source, path in ((cases[0], first, good), (cases[1], second, also_good)):
        assert isinstance(path, Path)
        check(case, (source, path))


def test_no_compiler_is_a_clear_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("FXOPT_CXX", raising=False)
    _, printed = sources(1)
    (result,) = compile_cpp(printed, tmp_path, HOST.cpu_capability)
    assert isinstance(result, CompileFailure)
    assert "no C++ compiler found: install g++ or set CXX" in result.reason
    assert "no C++ compiler" in toolchain_id()


def test_the_chosen_compiler_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "my-compiler"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", f"{fake} -O0")
    monkeypatch.delenv("FXOPT_CXX", raising=False)
    assert find_compiler() == (str(fake), "-O0")
    monkeypatch.setenv("FXOPT_CXX", str(fake))
    assert find_compiler() == (str(fake),)
    _, printed = sources(1)
    (result,) = compile_cpp(printed, tmp_path, HOST.cpu_capability)
    assert isinstance(result, CompileFailure) and "3" in result.reason


def test_the_toolchain_depends_on_the_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = toolchain_id()
    monkeypatch.setattr(cpp_build, "headers_hash", lambda: "other")
    assert toolchain_id() != before


def test_one_openmp_runtime(tmp_path: Path) -> None:
    """A process that has loaded torch and a kernel maps a single OpenMP library."""
    _, printed = sources(1)
    (path,) = compile_cpp(printed, tmp_path, HOST.cpu_capability)
    assert isinstance(path, Path)
    code = (
        "import ctypes, re, torch\n"
        f"ctypes.CDLL({str(path)!r})\n"
        "print(len(set(re.findall(r'\\S*lib(?:g|i)?omp\\S*', open('/proc/self/maps').read()))))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
    assert ctypes.CDLL(str(path))[printed[0].entry]


def test_what_the_compiler_is_always_told_is_part_of_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-march=native is another set of instructions on another machine, which may use the same home directory."""
    machine, compiler = tmp_path / "machine", tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ncase $* in *--version*) echo g++ 1;; *-dM*) cat {machine};; esac\n")
    compiler.chmod(0o700)
    found = []
    for words, macros in (("", ""), ("-O1", ""), ("-march=native", "AVX2"), ("-march=native", "AVX512")):
        machine.write_text(f"#define __{macros}__ 1\n")
        monkeypatch.setenv("FXOPT_CXX", f"{compiler} {words}")
        cxx._predefined.cache_clear()
        found.append((toolchain_id(), replay_build.facts()["compiler"], cpp_headers.facts(())["compiler"]))
    assert [len(set(column)) for column in zip(*found, strict=True)] == [4, 4, 4]
