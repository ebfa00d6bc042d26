"""Tensor maps: descriptors with which Hopper's tensor memory accelerator finds blocks of a tensor (the driver's
CUtensorMap).

A kernel that Triton compiles for tensor descriptors takes, for each, the 128 bytes of the map by value, then the tensor's
sizes (int32) and strides (int64). The driver encodes the map from an address, so it is encoded again when the address has
changed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

MAP_BYTES, MAP_ALIGNMENT = 128, 64
_NO_INTERLEAVE, _PROMOTE_TO_128_BYTES, _FILL_WITH_ZERO = 0, 2, 0


class TensorMap:
    """One map in memory of its own, and what a kernel's parameter array needs of it.

    shape, strides and block: elements, the contiguous dimension last. steps: from one element of a block to the next, along
    each dimension (default: 1). offset: elements from the buffer's address to the tensor. element_type and swizzle: the
    driver's CUtensorMapDataType and CUtensorMapSwizzle. `parameters` are the addresses of the kernel's parameters: map,
    sizes, strides. `address` is the buffer address that is encoded, None before the first.
    """

    def __init__(
        self,
        lib: Any,
        *,
        shape: Sequence[int],
        strides: Sequence[int],
        block: Sequence[int],
        offset: int,
        itemsize: int,
        element_type: int,
        swizzle: int,
        steps: Sequence[int] = (),
    ) -> None:
        rank = len(shape)
        apart = list(steps) or [1] * rank
        self.address: int | None = None
        self._encode_tiled, self._offset = lib.cuTensorMapEncodeTiled, offset * itemsize
        self._memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
        base = -(-ctypes.addressof(self._memory) // MAP_ALIGNMENT) * MAP_ALIGNMENT
        # The driver counts dimensions from the contiguous one, whose stride it does not ask for; strides are in bytes.
        outer = [s * itemsize for s in reversed(strides[:-1])]
        self._fixed = (
            (ctypes.c_uint64 * rank)(*reversed(shape)),
            (ctypes.c_uint64 * max(rank - 1, 1))(*outer),
            # The driver counts what a block spans, of which it takes every so-manieth.
            (ctypes.c_uint32 * rank)(*reversed([b * s for b, s in zip(block, apart, strict=True)])),
            (ctypes.c_uint32 * rank)(*reversed(apart)),
            *(_NO_INTERLEAVE, swizzle, _PROMOTE_TO_128_BYTES, _FILL_WITH_ZERO),
        )
        self._first = (ctypes.c_void_p(base), element_type, rank)
        self._sizes, self._strides = (ctypes.c_int32 * rank)(*shape), (ctypes.c_int64 * rank)(*strides)
        sizes, jumps = ctypes.addressof(self._sizes), ctypes.addressof(self._strides)
        self.parameters = [base, *(sizes + 4 * i for i in range(rank)), *(jumps + 8 * i for i in range(rank))]

    def encode(self, address: int) -> int:
        """Make this the map of the tensor in the buffer at `address`; the driver's result code, 0 for success.

        The driver refuses addresses and strides that are no multiples of 16 bytes.
        """
        code: int = self._encode_tiled(*self._first, ctypes.c_void_p(address + self._offset), *self._fixed)
        self.address = address if code == 0 else None
        return code
