"""Compiles printed C++ kernels and runs them on torch tensors: what the C++ tests share."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fxopt.codegen import cpp_headers
from fxopt.codegen.cpp import print_nest
from fxopt.codegen.cpp_build import compile_cpp
from fxopt.ir.exprs import evaluate
from fxopt.ir.kernel import CompileFailure, KernelSource
from fxopt.runtime.artifacts import default_store
from tests.codegen.triton_nests import Case


@dataclass(frozen=True)
class Capability:
    """A target as the C++ printer sees it."""

    cpu_capability: str


HOST = Capability(torch.backends.cpu.get_cpu_capability())


def build(cases: list[Case], directory: Path, capability: Capability = HOST) -> list[tuple[KernelSource, Path]]:
    """The compiled kernels of `cases`; fails the test when one does not compile."""
    sources = [print_nest(c.region, capability) for c in cases]
    headers = cpp_headers.headers_for(default_store(), capability.cpu_capability)
    found = None if headers is None else headers.wait()
    built = compile_cpp(sources, directory, capability.cpu_capability, None if found is None else found.path)
    for result in built:
        assert not isinstance(result, CompileFailure), result.reason
    return list(zip(sources, built, strict=True))  # type: ignore[arg-type]


def call(source: KernelSource, path: Path, memory: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> int:
    """Run a kernel on flat buffers by name; its error code."""
    function = ctypes.CDLL(str(path))[source.entry]
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int64
    pointers = (ctypes.c_void_p * max(1, len(source.buffers)))(*(memory[b].data_ptr() for b in source.buffers))
    numbers = (ctypes.c_int64 * max(1, len(source.sizes)))(*(evaluate(s, sizes) for s in source.sizes))
    return int(function(ctypes.addressof(pointers), ctypes.addressof(numbers)))


def sample(case: Case, name: str) -> torch.Tensor:
    """Random contents for an input, in the buffer's strides."""
    spec, shape = case.region.buffers[name], case.shape(name)
    if spec.dtype == torch.bool:
        values = torch.rand(shape) < 0.1
    elif spec.dtype.is_floating_point:
        values = torch.randn(shape, dtype=torch.float64).to(spec.dtype)
    else:
        low = 0 if spec.dtype == torch.uint8 else -5
        values = torch.randint(low, 5, shape).to(spec.dtype)
    return torch.empty_strided(shape, case.strides(name), dtype=spec.dtype).copy_(values)


GUARD = 64
"""Elements before and after each buffer that a kernel must leave alone."""


def guarded(extent: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(the whole allocation, the buffer inside it), filled with something conspicuous."""
    filler = float("nan") if dtype.is_floating_point else 1
    whole = torch.full((extent + 2 * GUARD,), filler, dtype=dtype)
    return whole, whole[GUARD : GUARD + extent]


def run(case: Case, kernel: tuple[KernelSource, Path], inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The outputs; memory around every buffer is checked to be untouched."""
    source, path = kernel
    wholes, memory = {}, {}
    for name in case.region.buffers:
        wholes[name], memory[name] = guarded(case.extent(name), case.region.buffers[name].dtype)
        if name in inputs:
            memory[name].copy_(inputs[name].as_strided((case.extent(name),), (1,)))
    assert call(source, path, memory, case.sizes) == 0
    for name, whole in wholes.items():
        for edge in (whole[:GUARD], whole[len(whole) - GUARD :]):
            assert bool((edge.isnan() if edge.is_floating_point() else edge == 1).all()), f"wrote outside {name}"
    return [memory[n].as_strided(case.shape(n), case.strides(n)) for n in case.outputs]


def close(actual: torch.Tensor, expected: torch.Tensor, slack: float = 4.0) -> None:
    """Within `slack` rounding errors of float64's result, at its scale; NaN and infinities alike."""
    if not actual.is_floating_point():
        assert torch.equal(actual, expected.to(actual.dtype))
        return
    scale = max(1.0, float(expected[expected.isfinite()].abs().max())) if expected.isfinite().any() else 1.0
    atol = slack * torch.finfo(actual.dtype).eps * scale
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol, equal_nan=True)


def check(case: Case, kernel: tuple[KernelSource, Path], slack: float = 4.0, **given: torch.Tensor) -> None:
    """The kernel's outputs against the case's reference in float64."""
    inputs = {n: given.get(n, sample(case, n)) for n in case.inputs}
    wide = [t.double() if t.is_floating_point() else t for t in inputs.values()]
    for actual, expected in zip(run(case, kernel, inputs), case.reference(*wide), strict=True):
        close(actual, expected, slack)
