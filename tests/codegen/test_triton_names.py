"""Names of generated kernels: telling, short, and equal for equal nests."""

from __future__ import annotations

import pytest
import torch

from tests.codegen import triton_nests as nests
from tests.codegen.triton_nests import BF16, F32, I64, Case

pytest.importorskip("triton")

from fxopt.codegen.triton import TritonConfig, print_region
from fxopt.ir.exprs import Sym, symbol
from fxopt.ir.kernel import KernelSource
from fxopt.ir.loops import Const, IndexValue, Load, Nest, Op, Store
from fxopt.target import Target

TARGET = Target.cuda(90)


def printed(case: Case, config: TritonConfig) -> tuple[KernelSource, ...]:
    return print_region(case.region, config, TARGET).kernels


@pytest.mark.parametrize(
    ("case", "config", "names"),
    [
        (nests.pointwise(256, BF16), TritonConfig(64), ["fx_point_sigmoid_add_mul"]),
        (nests.transposed(F32), TritonConfig(32, y_block=32), ["fx_tile_add"]),
        (nests.layer_norm(8, 64, F32), TritonConfig(1), ["fx_row_welford_div_rsqrt_add"]),
        (nests.variance(64, 640), TritonConfig(16), ["fx_column_welford_div"]),
        (nests.reduction("sum", 4, 512, F32), TritonConfig(1, split=4), ["fx_part_sum", "fx_join_sum"]),
        (nests.cumulative("cumsum", 4, 64), TritonConfig(1), ["fx_scan_cumsum"]),
        (nests.gather(), TritonConfig(32), ["fx_point_gather"]),
        (nests.cat(), TritonConfig(32), ["fx_point_copy"]),
    ],
)
def test_names_say_what_a_kernel_does(case: Case, config: TritonConfig, names: list[str]) -> None:
    kernels = printed(case, config)
    assert [k.entry for k in kernels] == names
    assert all(f"def {k.entry}(" in k.text for k in kernels)


def dropout(number: int) -> Case:
    """Random op `number` of a graph: its key is the graph's seed plus `number`."""
    x = Sym("x0", size=64)
    seed = Load("s", 0, I64)
    key = Op("add", (seed, Const(number, I64)), I64) if number else seed
    stores = (Store("o", symbol(x), Op("rand", (key, IndexValue(symbol(x))), F32)),)
    buffers = [nests.buffer("s", I64, ()), nests.buffer("o", F32, (64,))]
    return nests.make(Nest((x,), (), stores), buffers, "s", "o", lambda s: torch.ops.fxopt.rand(s + number, [64]))


def test_random_ops_differ_in_a_parameter_and_not_in_text() -> None:
    first, other = (printed(dropout(n), TritonConfig(64))[0] for n in (0, 7))
    assert first.text == other.text
    assert first.key("toolchain") == other.key("toolchain")
    assert (first.sizes, other.sizes) == ((0,), (7,))
