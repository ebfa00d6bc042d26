"""The small libdevice: the same code as with the whole one, for whatever a kernel calls."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from fxopt.codegen import triton_build, triton_libdevice
from fxopt.codegen.triton_job import PROBE
from fxopt.ir.kernel import KernelSource
from fxopt.target import Target

H100 = Target.cuda(90)

pytest.importorskip("triton")


def kernel(*values: str) -> KernelSource:
    text = PROBE.text.replace("language as tl\n", "language as tl\nfrom triton.language.extra import libdevice\n")
    return replace(PROBE, text=text.replace("tl.store(b0, 1.0)", f"x = tl.load(b0)\n    tl.store(b0, {' + '.join(values)})"))


def cubin(source: KernelSource) -> bytes:
    return triton_build.compile_triton(source, H100)[0]


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The small library is installed until the test ends: the paths of what has been linked since."""
    from triton._C.libtriton import llvm

    whole, paths = llvm.link_extern_libs, []

    def link(module: Any, given: Sequence[str]) -> None:
        paths.extend(given)
        whole(module, given)

    monkeypatch.setattr(llvm, "link_extern_libs", link)
    triton_libdevice.install()
    return paths


def test_code_is_that_of_the_whole_library(linked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton._C.libtriton import llvm

    common = [f"libdevice.{name}(x)" for name in triton_libdevice.COMMON]
    sources = [kernel(*common), kernel("libdevice.sin(x)", "tl.rsqrt(x)")]
    ours = [cubin(source) for source in sources]
    taken_from, small, whole = linked
    assert small.startswith("/proc/self/fd/") and taken_from == whole
    monkeypatch.undo()
    assert llvm.link_extern_libs.__module__ != triton_libdevice.__name__
    assert [cubin(source) for source in sources] == ours


def test_what_cannot_be_taken_apart_is_linked_whole(
    linked: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from triton._C.libtriton import ir

    def fail(*_: Any) -> None:
        raise RuntimeError("another Triton")

    monkeypatch.setattr(ir, "parse_mlir_module", fail)
    with caplog.at_level(logging.INFO, "fxopt"):
        assert cubin(kernel("tl.rsqrt(x)"))
    assert [path.rpartition(".")[2] for path in linked] == ["bc"]
    assert "another Triton" in caplog.text
