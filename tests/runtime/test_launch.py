"""The CUDA launcher against a driver that records calls; on a GPU, against the real one."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.runtime.launch import CudaError, load_cubin

META: dict[str, Any] = {
    "name": "kernel",
    "num_warps": 4,
    "shared": 0,
    "parameters": ["ptr", "ptr", "i32", "i64"],
    "scratch_pointers": 2,
}


class FakeDriver:
    """Answers the calls of `runtime.launch` and notes what a launch would have passed."""

    def __init__(self, refuse: dict[str, int] | None = None) -> None:
        self.refuse = refuse or {}
        self.launches: list[dict[str, Any]] = []
        self.attributes: list[tuple[int, int]] = []
        self.context: int | None = 5

    def cuCtxGetCurrent(self, context: Any) -> int:
        ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0] = self.context
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.context = context.value
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        ctypes.cast(device, ctypes.POINTER(ctypes.c_int))[0] = 10 + index
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0] = 100 + device.value
        return 0

    def cuModuleLoadData(self, module: Any, data: bytes) -> int:
        if self.context is None:
            return 201
        ctypes.cast(module, ctypes.POINTER(ctypes.c_void_p))[0] = 1
        return self.refuse.get("load", 0)

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        ctypes.cast(function, ctypes.POINTER(ctypes.c_void_p))[0] = 42
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
        self.attributes.append((attribute, value))
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        if self.context is None:
            return 201
        addresses = rest[8]
        values = [ctypes.c_uint64.from_address(a).value for a in addresses]
        self.launches.append({"function": function.value, "shape": rest[:7], "stream": rest[7].value, "values": values})
        return self.refuse.get("launch", 0)

    def cuLaunchKernelEx(self, given: Any, function: Any, addresses: Any, extra: Any) -> int:
        config = given._obj
        shape = tuple(getattr(config, name) for name, _ in config._fields_[:7])
        code = self.cuLaunchKernel(function, *shape, ctypes.c_void_p(config.stream), addresses, extra)
        attribute = config.attributes[0]
        if code == 0:
            self.launches[-1]["attributes"] = config.count, attribute.id, attribute.value
        return code

    def cuGetErrorName(self, code: int, out: Any) -> int:
        ctypes.cast(out, ctypes.POINTER(ctypes.c_char_p))[0] = b"CUDA_ERROR_ILLEGAL_ADDRESS"
        return 0

    def cuGetErrorString(self, code: int, out: Any) -> int:
        ctypes.cast(out, ctypes.POINTER(ctypes.c_char_p))[0] = b"an illegal memory access was encountered"
        return 0


def test_a_launch_passes_every_parameter_and_null_scratch(cubin: Path) -> None:
    driver = FakeDriver()
    launch = load_cubin(cubin, META, 0, driver).bind()
    launch(7, 3, 2, 1, 0x7F00_0000_1000, 0x7F00_0000_2000, 5, 2**40)
    assert driver.launches == [
        {
            "function": 42,
            "shape": (3, 2, 1, 128, 1, 1, 0),
            "stream": 7,
            "values": [0x7F00_0000_1000, 0x7F00_0000_2000, 5, 2**40, 0, 0],
        }
    ]


def test_an_early_launch_passes_the_same_with_an_attribute(cubin: Path) -> None:
    driver = FakeDriver()
    kernel = load_cubin(cubin, META | {"chained": True}, 0, driver)
    for early in (False, True):
        launch = kernel.bind(early=early)
        launch(7, 3, 2, 1, 0x1000, 0x2000, 5, 2**40)
        launch(8, 2, 1, 1, 0x3000, 0x2000, 5, 2**40)
    assert [x.pop("attributes", None) for x in driver.launches] == [None, None, (1, 6, 1), (1, 6, 1)]
    assert driver.launches[:2] == driver.launches[2:]


def test_a_kernel_that_does_not_wait_is_never_early(cubin: Path) -> None:
    driver = FakeDriver()
    load_cubin(cubin, META, 0, driver).bind(early=True)(7, 3, 2, 1, 0x1000, 0x2000, 5, 2**40)
    assert "attributes" not in driver.launches[0]


def test_structures_are_laid_out_as_the_driver_has_them() -> None:
    from fxopt.runtime.launch import _Attribute, _LaunchConfig

    assert (ctypes.sizeof(_Attribute), _Attribute.value.offset) == (72, 8)
    assert (_LaunchConfig.stream.offset, _LaunchConfig.attributes.offset, _LaunchConfig.count.offset) == (32, 40, 48)


def test_bound_launchers_do_not_share_slots(cubin: Path) -> None:
    driver = FakeDriver()
    kernel = load_cubin(cubin, META, 0, driver)
    first, second = kernel.bind(), kernel.bind()
    first(0, 1, 1, 1, 1, 2, 3, 4)
    second(0, 1, 1, 1, 5, 6, 7, 8)
    first(0, 1, 1, 1, 9, 10, 11, 12)
    assert [x["values"][:4] for x in driver.launches] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


def test_a_wrong_number_of_arguments_is_an_error(cubin: Path) -> None:
    launch = load_cubin(cubin, META, 0, FakeDriver()).bind()
    with pytest.raises(ValueError):
        launch(0, 1, 1, 1, 1, 2, 3)


def test_large_shared_memory_is_asked_for(cubin: Path) -> None:
    driver = FakeDriver()
    load_cubin(cubin, META | {"shared": 100_000}, 0, driver)
    assert driver.attributes == [(8, 100_000)]


def test_errors_are_named(cubin: Path) -> None:
    with pytest.raises(CudaError, match=r"loading kernel.cubin on cuda:1: CUDA_ERROR_ILLEGAL_ADDRESS \(209\)"):
        load_cubin(cubin, META, 1, FakeDriver({"load": 209}))
    launch = load_cubin(cubin, META, 0, FakeDriver({"launch": 700})).bind()
    with pytest.raises(CudaError, match=r"launching kernel: .*illegal memory access.*context of this process is lost"):
        launch(0, 1, 1, 1, 1, 2, 3, 4)


def test_a_thread_without_a_context_gets_that_of_loading(cubin: Path) -> None:
    driver = FakeDriver()
    launch = load_cubin(cubin, META, 0, driver).bind()
    driver.context = None
    launch(7, 3, 2, 1, 1, 2, 3, 4)
    assert driver.context == 5 and len(driver.launches) == 1


def test_loading_where_no_context_is_takes_the_primary_one_of_the_device(cubin: Path) -> None:
    driver = FakeDriver()
    driver.context = None
    assert load_cubin(cubin, META, 3, driver).context == 113 == driver.context


def test_unknown_parameter_kinds_are_refused(cubin: Path) -> None:
    with pytest.raises(ValueError, match="nvTmaDesc"):
        load_cubin(cubin, META | {"parameters": ["nvTmaDesc"]}, 0, FakeDriver())


@pytest.mark.gpu
def test_runs_on_the_gpu(tmp_path: Path) -> None:
    from fxopt.codegen.triton import TritonConfig, print_region
    from fxopt.codegen.triton_build import compile_triton
    from fxopt.ir.exprs import evaluate
    from fxopt.target import Target
    from tests.codegen import triton_nests as nests

    target = Target.current("cuda")
    for case in (nests.pointwise(5000, torch.float32), nests.layer_norm(33, 200, torch.bfloat16)):
        kernel = print_region(case.region, TritonConfig(2, r_block=64, persistent=False), target).kernels[0]
        code, meta = compile_triton(kernel, target)
        (tmp_path / "kernel.cubin").write_bytes(code)
        tensors = {n: torch.randn(case.shape(n), device="cuda").to(s.dtype) for n, s in case.region.buffers.items()}
        expected = case.reference(*(tensors[n].double() for n in case.inputs))
        launch = load_cubin(tmp_path / "kernel.cubin", meta, 0).bind()
        grid = [evaluate(g, {}) for g in kernel.grid]
        launch(torch.cuda.current_stream().cuda_stream, *grid, *(tensors[b].data_ptr() for b in kernel.buffers))
        torch.cuda.synchronize()
        for name, exact in zip(case.outputs, expected, strict=True):
            tolerance = 8 * torch.finfo(tensors[name].dtype).eps
            torch.testing.assert_close(tensors[name].double(), exact, rtol=tolerance, atol=tolerance * 4)
