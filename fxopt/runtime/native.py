"""Loading generated C++ kernels: `int64_t entry(void** buffers, const int64_t* sizes)` in a shared object."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

from fxopt.errors import CacheError
from fxopt.ir.kernel import Artifact

NativeKernel = Callable[[int, int], int]
"""(address of the pointer array, address of the int64 size array) -> 0, or the 1-based number of the error that occurred.

The interpreter lock is released while the kernel runs."""

_libraries: dict[Path, ctypes.CDLL] = {}
_lock = threading.Lock()


def load_kernel(artifact: Artifact) -> NativeKernel:
    """The C++ kernel in `artifact.path`. Raises CacheError naming the file when it cannot be loaded or lacks the entry."""
    with _lock:
        try:
            library = _libraries.get(artifact.path)
            if library is None:
                library = _libraries[artifact.path] = ctypes.CDLL(str(artifact.path))
            function = library[artifact.entry]
        except (OSError, AttributeError) as error:
            raise CacheError(f"cannot load kernel {artifact.entry} from {artifact.path}: {error}") from error
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_int64
    return function
