"""Kernels with tensor maps, launched through a driver that records what it is given."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from fxopt.runtime.launch import CudaError, load_cubin
from tests.runtime.test_launch import META, FakeDriver

GEOMETRY: dict[str, Any] = {
    "shape": [256, 320],
    "strides": [640, 1],
    "block": [128, 64],
    "offset": 16,
    "itemsize": 2,
    "element_type": 9,
    "swizzle": 3,
}
MAPPED = META | {"parameters": ["ptr", "tensor_map", "i32"], "tensor_maps": [GEOMETRY]}


class MappingDriver(FakeDriver):
    """Writes the address into a map, and reads the parameters of a kernel (pointer, map, int32)."""

    def __init__(self, refuse: dict[str, int] | None = None) -> None:
        super().__init__(refuse)
        self.encoded: list[dict[str, Any]] = []

    def cuTensorMapEncodeTiled(self, where: Any, element_type: int, rank: int, address: Any, *rest: Any) -> int:
        if self.context is None:
            return 201
        assert where.value % 64 == 0
        ctypes.c_uint64.from_address(where.value + 120).value = address.value  # the last of its 128 bytes
        arrays = [list(values) for values in rest[:4]]
        self.encoded.append(
            {"type": element_type, "rank": rank, "address": address.value, "arrays": arrays, "rest": rest[4:]}
        )
        return self.refuse.get("encode", 0)

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        if self.context is None:
            return 201
        pointer, tensor_map, rows, columns, row, column, size, *scratch = rest[8]
        wide, narrow = ctypes.c_uint64.from_address, ctypes.c_int32.from_address
        self.launches.append(
            {
                "pointer": wide(pointer).value,
                "map": wide(tensor_map + 120).value,
                "shape": [narrow(rows).value, narrow(columns).value],
                "strides": [wide(row).value, wide(column).value],
                "size": narrow(size).value,
                "scratch": [wide(s).value for s in scratch],
            }
        )
        return 0


def test_a_map_is_passed_with_sizes_and_strides(cubin: Path) -> None:
    driver = MappingDriver()
    load_cubin(cubin, MAPPED, 0, driver).bind()(7, 3, 2, 1, 0x1000, 0x2000, 5)
    assert driver.launches == [
        {
            "pointer": 0x1000,
            "map": 0x2000 + 16 * 2,
            "shape": [256, 320],
            "strides": [640, 1],
            "size": 5,
            "scratch": [0, 0],
        }
    ]


def test_the_driver_counts_from_the_contiguous_dimension_in_bytes(cubin: Path) -> None:
    driver = MappingDriver()
    load_cubin(cubin, MAPPED, 0, driver).bind()(7, 1, 1, 1, 0x1000, 0x2000, 5)
    assert driver.encoded == [
        {
            "type": 9,
            "rank": 2,
            "address": 0x2020,
            "arrays": [[320, 256], [1280], [64, 128], [1, 1]],
            "rest": (0, 3, 2, 0),  # no interleave, 128-byte swizzle, 128-byte promotion, zeros outside
        }
    ]


def test_a_block_of_every_second_row_spans_twice_as_many(cubin: Path) -> None:
    driver = MappingDriver()
    meta = MAPPED | {"tensor_maps": [GEOMETRY | {"steps": [2, 1]}]}
    load_cubin(cubin, meta, 0, driver).bind()(7, 1, 1, 1, 0x1000, 0x2000, 5)
    assert driver.encoded[0]["arrays"] == [[320, 256], [1280], [64, 256], [1, 2]]


def test_only_a_new_address_is_encoded(cubin: Path) -> None:
    driver = MappingDriver()
    kernel = load_cubin(cubin, MAPPED, 0, driver)
    first, second = kernel.bind(), kernel.bind()
    for launch, address in ((first, 0x2000), (first, 0x2000), (second, 0x4000), (first, 0x2000), (first, 0x8000)):
        launch(0, 1, 1, 1, 0x1000, address, 5)
    assert [e["address"] - 32 for e in driver.encoded] == [0x2000, 0x4000, 0x8000]
    assert [x["map"] - 32 for x in driver.launches] == [0x2000, 0x2000, 0x4000, 0x2000, 0x8000]


def test_a_refused_map_is_an_error_and_tried_again(cubin: Path) -> None:
    driver = MappingDriver({"encode": 1})
    launch = load_cubin(cubin, MAPPED, 0, driver).bind()
    with pytest.raises(CudaError, match="describing a tensor for kernel"):
        launch(0, 1, 1, 1, 0x1000, 0x2001, 5)
    driver.refuse = {}
    launch(0, 1, 1, 1, 0x1000, 0x2001, 5)
    assert len(driver.launches) == 1 and len(driver.encoded) == 2


def test_a_thread_without_a_context_gets_that_of_loading(cubin: Path) -> None:
    driver = MappingDriver()
    launch = load_cubin(cubin, MAPPED, 0, driver).bind()
    driver.context = None
    launch(0, 1, 1, 1, 0x1000, 0x2000, 5)
    assert driver.context == 5 and len(driver.launches) == len(driver.encoded) == 1


def test_an_old_driver_is_told_at_loading(cubin: Path) -> None:
    with pytest.raises(OSError, match="CUDA 12"):
        load_cubin(cubin, MAPPED, 0, FakeDriver())
