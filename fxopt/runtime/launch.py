"""Launching cubins through the CUDA driver by ctypes, without Triton; what its launch convention asks for is here.

The context is torch's primary context: load with the device current and torch.cuda initialised, launch on a raw stream
handle (`torch.cuda.current_stream(device).cuda_stream`) of that device. A thread of autograd's has no context before its
first call of CUDA's runtime, which a backward out of the cache may come before: a launch then sets that of loading.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt.errors import FxoptError
from fxopt.runtime.tensor_map import TensorMap

NAME = "early-launch"
"""What `Options.disable` calls launches before the end of the kernel before."""

_WARP = 32
_SHARED_WITHOUT_ASKING = 48 * 1024
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PARAMETER_KINDS = ("ptr", "i32", "i64", "tensor_map")
_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

Launcher = Callable[..., None]
"""launcher(stream, grid_x, grid_y, grid_z, *pointers, *sizes): plain integers, in the order of the kernel's parameters.

For a parameter that is a tensor map, too, the address of its buffer is passed.
"""


class CudaError(FxoptError, RuntimeError):
    """The CUDA driver refused a call; the message has the driver's name for it. `code` is the CUresult."""

    def __init__(self, what: str, code: int, name: str, text: str) -> None:
        super().__init__(f"{what}: {name} ({code}): {text}")
        self.code, self.name = code, name

    @property
    def ends_context(self) -> bool:
        """Whether nothing can be done on the device any more in this process."""
        return self.code in _FATAL


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of which only values that are one int are used."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_ENDS_CONTEXT = "; the CUDA context of this process is lost"
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_FATAL = (700, 709, 710, 714, 715, 716, 717, 718, 719)


@functools.cache
def driver() -> ctypes.CDLL:
    """libcuda with the prototypes used here. Raises OSError on machines without an NVIDIA driver."""
    lib = ctypes.CDLL("libcuda.so.1")
    pointer, handle = ctypes.POINTER, ctypes.c_void_p
    lib.cuGetErrorName.argtypes = lib.cuGetErrorString.argtypes = [ctypes.c_int, pointer(ctypes.c_char_p)]
    lib.cuModuleLoadData.argtypes = [pointer(handle), ctypes.c_char_p]
    lib.cuModuleGetFunction.argtypes = [pointer(handle), handle, ctypes.c_char_p]
    lib.cuFuncSetAttribute.argtypes = [handle, ctypes.c_int, ctypes.c_int]
    lib.cuModuleUnload.argtypes = [handle]
    lib.cuCtxGetCurrent.argtypes = [pointer(handle)]
    lib.cuCtxSetCurrent.argtypes = [handle]
    lib.cuDeviceGet.argtypes = [pointer(ctypes.c_int), ctypes.c_int]
    lib.cuDevicePrimaryCtxRetain.argtypes = [pointer(handle), ctypes.c_int]
    # cuLaunchKernel has no prototype: converting eleven arguments by one adds 0.9 us to 1.4 us. Handles are passed as
    # c_void_p objects, and every other argument fits a C int.
    return lib


def check(lib: Any, code: int, what: str) -> None:
    """Raise CudaError naming `what` unless `code` is CUDA_SUCCESS."""
    if code == 0:
        return
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    lib.cuGetErrorName(code, ctypes.byref(name))
    lib.cuGetErrorString(code, ctypes.byref(text))
    message = (text.value or b"no description").decode() + (_ENDS_CONTEXT if code in _FATAL else "")
    raise CudaError(what, code, (name.value or b"unknown error").decode(), message)


def context_of(device_index: int, lib: Any, what: str) -> int | None:
    """The context of CUDA device `device_index`, which is torch's current device; current on this thread from here on.

    A thread that has not called CUDA yet has none, and torch gives it none as long as it asks for nothing new: it then gets
    the primary context, which torch uses. Raises CudaError naming `what`.
    """
    context, device = ctypes.c_void_p(), ctypes.c_int()
    check(lib, lib.cuCtxGetCurrent(ctypes.byref(context)), what)
    if not context:
        check(lib, lib.cuDeviceGet(ctypes.byref(device), device_index), what)
        check(lib, lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), what)
        check(lib, lib.cuCtxSetCurrent(context), what)
    return context.value


@dataclass
class CudaKernel:
    """A loaded kernel. Never unloaded: launches may be in flight or recorded in CUDA graphs."""

    lib: Any
    function: int
    name: str
    threads: int
    shared: int
    parameters: tuple[str, ...]
    scratch_pointers: int
    context: int | None = None
    tensor_maps: tuple[dict[str, Any], ...] = ()
    chained: bool = False

    def bind(self, launch: Any = None, early: bool = False) -> Launcher:
        """A launcher with argument slots of its own. Not to be shared between threads: give each its own.

        A launch writes the slots and calls cuLaunchKernel, which copies them. `launch` (a plan's Launch) only lends its
        label to error messages. With `early` its programs may start before the kernel before it in the stream has ended,
        if that lets them: kernels that are `chained` wait inside (`codegen/triton_chain.py`), others are launched as usual.
        """
        count = len(self.parameters)
        slots = (ctypes.c_uint64 * (count + self.scratch_pointers))()
        maps = self._tensor_maps()
        addresses = _addresses(slots, dict(maps))
        function, threads, shared = ctypes.c_void_p(self.function), self.threads, self.shared
        lib, call, handle, context = self.lib, self.lib.cuLaunchKernel, ctypes.c_void_p, ctypes.c_void_p(self.context)
        what = getattr(launch, "label", "") or self.name
        if early and self.chained and hasattr(lib, "cuLaunchKernelEx"):  # drivers of CUDA 12 and later have it
            call = self._early_call()

        def describe(tensor_map: TensorMap, address: int) -> None:
            code = tensor_map.encode(address)
            if code == _NO_CONTEXT and context:
                check(lib, lib.cuCtxSetCurrent(context), f"launching {what}")
                code = tensor_map.encode(address)
            check(lib, code, f"describing a tensor for {what}")

        def run(stream: int, grid_x: int, grid_y: int, grid_z: int, *arguments: int) -> None:
            slots[:count] = arguments  # type: ignore[call-overload]  # any sequence will do
            for at, tensor_map in maps:
                if tensor_map.address != arguments[at]:
                    describe(tensor_map, arguments[at])
            code = call(function, grid_x, grid_y, grid_z, threads, 1, 1, shared, handle(stream), addresses, None)
            if code == _NO_CONTEXT and context:
                check(lib, lib.cuCtxSetCurrent(context), f"launching {what}")
                code = call(function, grid_x, grid_y, grid_z, threads, 1, 1, shared, handle(stream), addresses, None)
            if code:
                check(lib, code, f"launching {what}")

        return run

    def _early_call(self) -> Callable[..., int]:
        """cuLaunchKernelEx with the parameters of cuLaunchKernel."""
        attribute = _Attribute(id=_EARLY, value=1)
        config = _LaunchConfig(attributes=ctypes.pointer(attribute), count=1)
        given, launch = ctypes.byref(config), self.lib.cuLaunchKernelEx

        def call(function: Any, *shape_stream_and_arguments: Any) -> int:
            *shape, stream, addresses, extra = shape_stream_and_arguments
            config.grid_x, config.grid_y, config.grid_z, config.block_x, config.block_y, config.block_z, config.shared = (
                shape
            )
            config.stream = stream
            code: int = launch(given, function, addresses, extra)
            return code

        return call

    def _tensor_maps(self) -> list[tuple[int, TensorMap]]:
        """A map of its own, to be encoded, for each parameter (its number) that is one."""
        positions = [i for i, kind in enumerate(self.parameters) if kind == "tensor_map"]
        return [(i, TensorMap(self.lib, **given)) for i, given in zip(positions, self.tensor_maps, strict=True)]


def _addresses(slots: Any, maps: dict[int, TensorMap]) -> Any:
    """Where cuLaunchKernel finds each of the kernel's own parameters: in `slots`, but several for a tensor map."""
    base, found = ctypes.addressof(slots), list[int]()
    for i in range(len(slots)):
        found += maps[i].parameters if i in maps else [base + 8 * i]
    return (ctypes.c_void_p * len(found))(*found)


def load_cubin(path: Path, meta: dict[str, Any], device_index: int, lib: Any = None) -> CudaKernel:
    """Load the kernel at `path` into the context of CUDA device `device_index`, which is torch's current device.

    `meta` is what `codegen.triton_build.compile_triton` returned. Raises CudaError when the driver refuses it (another
    architecture, damaged, too much shared memory), ValueError when `meta` is not understood, OSError without driver or file
    and for a kernel with tensor maps under a driver that knows none.
    """
    unknown = [p for p in meta["parameters"] if p not in _PARAMETER_KINDS]
    if unknown:
        raise ValueError(f"{path}: unknown kernel parameter kinds {unknown}")
    lib = lib or driver()
    if "tensor_map" in meta["parameters"] and not hasattr(lib, "cuTensorMapEncodeTiled"):
        raise OSError(f"{path}: the kernel takes tensor maps, which this NVIDIA driver (before CUDA 12) cannot make")
    what = f"loading {path.name} on cuda:{device_index}"
    context = context_of(device_index, lib, what)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(lib, lib.cuModuleLoadData(ctypes.byref(module), path.read_bytes()), what)
    check(lib, lib.cuModuleGetFunction(ctypes.byref(function), module, meta["name"].encode()), what)
    if meta["shared"] > _SHARED_WITHOUT_ASKING:
        check(lib, lib.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, meta["shared"]), what)
    assert function.value is not None
    threads = meta["num_warps"] * _WARP
    parameters = tuple(meta["parameters"])
    scratch, maps = meta["scratch_pointers"], tuple(meta.get("tensor_maps", ()))
    chained = bool(meta.get("chained"))
    return CudaKernel(
        lib, function.value, meta["name"], threads, meta["shared"], parameters, scratch, context, maps, chained
    )
