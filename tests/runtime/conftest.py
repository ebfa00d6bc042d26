"""Hand-written C++ kernels and the code for replays, compiled once per session."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fxopt.codegen.replay_build import ReplayCode
from fxopt.ir.kernel import Artifact
from fxopt.runtime.artifacts import ArtifactStore

KERNELS = r"""
#include <cstdint>
#include <cmath>
extern "C" {
int64_t axpy(void** b, const int64_t* n) {  // b2 = 2*b0 + b1
  auto x = (const float*)b[0]; auto y = (const float*)b[1]; auto out = (float*)b[2];
  for (int64_t i = 0; i < n[0]; ++i) out[i] = 2 * x[i] + y[i];
  return 0;
}
int64_t increment(void** b, const int64_t* n) {  // b1 = b0 + 1
  auto x = (const float*)b[0]; auto out = (float*)b[1];
  for (int64_t i = 0; i < n[0]; ++i) out[i] = x[i] + 1;
  return 0;
}
int64_t gather(void** b, const int64_t* n) {  // b2 = b0[b1], checked
  auto x = (const float*)b[0]; auto index = (const int64_t*)b[1]; auto out = (float*)b[2];
  for (int64_t i = 0; i < n[1]; ++i) {
    if (index[i] < 0 || index[i] >= n[0]) return 2;
    out[i] = x[index[i]];
  }
  return 0;
}
}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("kernels")
    source, target = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(KERNELS)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="session")
def kernels(library: Path) -> dict[str, Artifact]:
    """Artifacts by key; the key is the entry's name."""
    return {name: Artifact(name, "cpp", name, library) for name in ("axpy", "increment", "gather")}


@pytest.fixture
def cubin(tmp_path: Path) -> Path:
    """A file that passes for a kernel with a driver that only records."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(b"\x7fELF")
    return path


@pytest.fixture(scope="session")
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> ReplayCode:
    """The compiled code for replays."""
    code = ReplayCode(ArtifactStore(tmp_path_factory.mktemp("replays") / "cache"))
    assert code.wait() is not None, code.reason
    return code
