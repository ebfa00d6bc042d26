"""Precompiled headers of C++ kernels: made once, kept for all processes, believed like kernels, never in the way."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fxopt.codegen import cpp_build, cpp_headers, cxx
from fxopt.codegen.compile import compile_kernels
from fxopt.codegen.cpp import print_nest
from fxopt.codegen.cpp_build import compile_cpp
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.runtime.artifacts import ArtifactStore, default_store
from fxopt.target import Target
from tests.codegen import triton_nests as nests
from tests.codegen.cpp_harness import HOST, check
from tests.codegen.triton_nests import F32

CAPABILITY = HOST.cpu_capability

pytestmark = pytest.mark.skipif(
    cpp_headers.headers_for(default_store(), CAPABILITY) is None, reason="needs a compiler that takes them"
)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests' stores have is not found."""
    monkeypatch.setattr(cpp_headers, "_known", {})
    monkeypatch.setattr(cpp_headers, "_serving", {})


@pytest.fixture(scope="module")
def made() -> Artifact:
    """Real ones."""
    headers = cpp_headers.headers_for(default_store(), CAPABILITY)
    assert headers is not None
    found = headers.wait()
    assert found is not None, headers.reason
    return found


class Fake(NamedTuple):
    store: ArtifactStore
    headers: cpp_headers.Headers
    commands: list[Any]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A store of the test's own, and a compiler that writes a few bytes at once."""
    commands: list[Any] = []

    def execute(command: list[str], seconds: float) -> tuple[str, str | None]:
        commands.append(command)
        Path(command[-1]).write_bytes(b"precompiled")
        return "", None

    store = ArtifactStore(tmp_path / "cache")
    headers = cpp_headers.headers_for(store, CAPABILITY)
    assert headers is not None
    monkeypatch.setattr(cpp_headers.cxx, "execute", execute)
    return Fake(store, headers, commands)


def kernel(length: int) -> tuple[nests.Case, KernelSource]:
    case = nests.pointwise(length, F32)
    return case, print_nest(case.region, HOST)


def test_the_compiler_takes_them(made: Artifact, tmp_path: Path) -> None:
    how = cpp_build.command(CAPABILITY)
    assert how is not None
    source = tmp_path / "kernels.cpp"
    source.write_text('#include "cpp_runtime.h"\n')
    with cpp_build._with_headers(how, made.path, tmp_path) as quick:
        done = subprocess.run([*quick, "-H", "-fsyntax-only", str(source)], capture_output=True, text=True, check=True)
    assert done.stderr.startswith(f"! {tmp_path}") and "cpp_vec.h" not in done.stderr


def test_kernels_compiled_with_them_are_right(made: Artifact, tmp_path: Path) -> None:
    case, source = kernel(500)
    bad = KernelSource("cpp", "fx_bad", 'extern "C" int64_t fx_bad(void**, const int64_t*) { return nonsense; }', ())
    path, failure = compile_cpp([source, bad], tmp_path, CAPABILITY, made.path)
    assert isinstance(path, Path), path
    check(case, (source, path))
    assert isinstance(failure, CompileFailure) and "nonsense" in failure.reason
    assert [p.suffix for p in tmp_path.iterdir()] == [".so"], "nothing else is left behind"


def test_a_compiler_that_fails_on_them_does_without(made: Artifact, tmp_path: Path) -> None:
    """Sound, and still nothing that the compiler reads: half of them, say, by a fault of the compiler that wrote them."""
    half = tmp_path / "half.gch"
    half.write_bytes(made.path.read_bytes()[:1000000])
    case, source = kernel(501)
    (path,) = compile_cpp([source], tmp_path, CAPABILITY, half)
    assert isinstance(path, Path), path
    check(case, (source, path))


def test_a_process_that_keeps_compiling_makes_them_for_all(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpp_headers.precompiled(fake.store, CAPABILITY) is None
    assert fake.headers._thread is None, "the first compilation makes nothing"
    assert cpp_headers.precompiled(fake.store, CAPABILITY) is None, "nobody waits"
    found = fake.headers.wait()
    assert found is not None and cpp_headers.precompiled(fake.store, CAPABILITY) == found.path
    monkeypatch.setattr(cpp_headers, "_known", {})  # another process
    monkeypatch.setattr(cpp_headers, "_serving", {})
    assert cpp_headers.precompiled(ArtifactStore(tmp_path / "cache"), CAPABILITY) == found.path
    other = ArtifactStore(tmp_path / "other")
    assert cpp_headers.precompiled(other, CAPABILITY) == found.path, "another store of the same process"
    assert len(fake.commands) == 1 and not (tmp_path / "other" / "blobs").exists()


def test_compilations_of_graphs_find_them(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake.headers.wait()
    assert found is not None
    given: list[Any] = []
    monkeypatch.setattr(cpp_build, "compile_cpp", lambda *args: given.append(args[-1]) or [CompileFailure("", "enough")])
    compile_kernels([kernel(502)[1]], Target.cpu(), fake.store)
    assert given == [found.path]


def test_they_depend_on_compiler_flags_torch_and_headers(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {fake.headers.key, cpp_headers.Headers(fake.store, (*fake.headers.command, "-O0")).key}
    for module, name, value in (
        (cpp_build, "headers_hash", lambda: "other"),
        (cxx, "version", lambda compiler: "g++ 99"),
        (cpp_headers.torch, "__version__", "9.9"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            keys.add(cpp_headers.Headers(fake.store, fake.headers.command).key)
    assert len(keys) == 5


def test_damaged_ones_are_made_again(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake.headers.wait()
    assert found is not None
    found.path.write_bytes(b"precompileD!")
    with pytest.warns(UserWarning, match="damaged"):
        assert cpp_headers.precompiled(fake.store, CAPABILITY) is None
    monkeypatch.setattr(cpp_headers, "_known", {})
    again = cpp_headers.headers_for(fake.store, CAPABILITY)
    assert again is not None and again.wait() is not None and len(fake.commands) == 2


def test_where_there_is_no_room_none_are_made(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CACHE_SIZE", "500MB")
    assert fake.headers.wait() is None and "cap" in str(fake.headers.reason)
    monkeypatch.delenv("FXOPT_CACHE_SIZE")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 200 << 20))
    headers = cpp_headers.Headers(fake.store, fake.headers.command)
    assert headers.wait() is None and "disk" in str(headers.reason)
    assert not fake.commands


def test_a_disk_that_fills_up_is_no_reason_to_leave_the_cache(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fake.store.cache, "put_bytes", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fake.headers.wait() is None
    assert "No space left" in str(fake.headers.reason) and not fake.store.cache.temporary


def test_where_no_thread_can_be_started_none_are_made(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    for _ in range(3):
        assert cpp_headers.precompiled(fake.store, CAPABILITY) is None
    assert fake.headers.wait() is None and "can't start new thread" in str(fake.headers.reason)


@pytest.mark.parametrize("version", ["Debian clang version 14.0.6", "Apple clang version 15.0.0"])
def test_clang_has_no_use_for_them(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cxx, "version", lambda compiler: version)
    assert cpp_headers.headers_for(ArtifactStore(tmp_path / "cache"), CAPABILITY) is None
