"""What printed Triton kernels compute, in Triton's interpreter: every form of a nest in every kind of configuration."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.codegen import triton_nests as nests
from tests.codegen.triton_interpreter import Interpreter
from tests.codegen.triton_nests import BF16, BOOL, F32, I64, Case
from tests.lower.capturing import assert_same, lower_function, moved
from tests.lower.contracting import alternatives, searched
from tests.numerics import assert_closer

pytest.importorskip("triton")

from fxopt.codegen.triton import TritonConfig, configs, print_region
from fxopt.codegen.triton_build import compile_to_text, compile_triton
from fxopt.codegen.triton_values import gelu_argument
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Sym, evaluate, floordiv, mod, symbol
from fxopt.ir.loops import Const, IndexValue, Load, Masked, Nest, Op, Reduce, Scalar, Store, postorder
from fxopt.ir.pool_ops import max_pool_offsets
from fxopt.ir.region import Call, Region
from fxopt.lower.schedule import schedule
from fxopt.target import Target
from fxopt.tune.choose import FEW_SPILLED

TARGET = Target.cuda(90)
LOOPED = TritonConfig(2, r_block=16, persistent=False)


def sample(case: Case, name: str) -> torch.Tensor:
    spec, shape = case.region.buffers[name], case.shape(name)
    if spec.dtype == BOOL:
        values = torch.rand(shape) < 0.1
    elif spec.dtype.is_floating_point:
        values = torch.randn(shape, dtype=torch.float64).to(spec.dtype)
    else:
        values = torch.randint(-5, 5, shape).to(spec.dtype)
    return torch.empty_strided(shape, case.strides(name), dtype=spec.dtype).copy_(values)


def garbage(extent: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((extent,), float("nan") if dtype.is_floating_point else 1, dtype=dtype)


def run(server: Interpreter, case: Case, config: TritonConfig, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of the printed kernels; whatever no input fills starts as garbage."""
    printed = print_region(case.region, config, TARGET)
    memory = {n: t.as_strided((case.extent(n),), (1,)).clone() for n, t in inputs.items()}
    for name in case.outputs:
        memory.setdefault(name, garbage(case.extent(name), case.region.buffers[name].dtype))
    for spec in printed.scratch:
        memory[spec.name] = garbage(evaluate(spec.extent, case.sizes), spec.dtype)
    for kernel in printed.kernels:
        server.run(kernel, memory, case.sizes)
    return [memory[n].as_strided(case.shape(n), case.strides(n)) for n in case.outputs]


def close(actual: torch.Tensor, expected: torch.Tensor, slack: float = 8.0) -> None:
    """Within `slack` rounding errors of float64's result, at its scale; NaN and infinities alike."""
    if not actual.is_floating_point():
        assert torch.equal(actual, expected.to(actual.dtype))
        return
    scale = max(1.0, float(expected[expected.isfinite()].abs().max())) if expected.isfinite().any() else 1.0
    atol = slack * torch.finfo(actual.dtype).eps * scale
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol, equal_nan=True)


def check(server: Interpreter, case: Case, config: TritonConfig, slack: float = 8.0, **given: torch.Tensor) -> None:
    inputs = {n: given.get(n, sample(case, n)) for n in case.inputs}
    wide = [t.double() if t.is_floating_point() else t for t in inputs.values()]
    for actual, expected in zip(run(server, case, config, inputs), case.reference(*wide), strict=True):
        close(actual, expected, slack)


def every_config(case: Case) -> list[TritonConfig]:
    return configs(case.region, TARGET)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16, torch.float64])
def test_pointwise(interpreter: Interpreter, dtype: torch.dtype) -> None:
    check(interpreter, nests.pointwise(1000, dtype), TritonConfig(128))


@pytest.mark.parametrize("case", [nests.one_byte_of_a_float(), nests.narrowed_constants()], ids=["byte", "constants"])
def test_a_single_point(interpreter: Interpreter, case: Case) -> None:
    for config in every_config(case):
        check(interpreter, case, config)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_what_is_rounded_before_it_is_used(interpreter: Interpreter, dtype: torch.dtype) -> None:
    check(interpreter, nests.rounded_product(300, dtype), TritonConfig(128), slack=0.51)


def test_products_of_one_row(interpreter: Interpreter) -> None:
    """One kernel for several, which loads everything before its first sum."""
    width, columns = 40, (96, 32, 64)
    x, *weights = torch.randn(1, width).to(BF16), *(torch.randn(n, width).to(BF16) for n in columns)
    low = searched(lambda x, *w: tuple(torch.nn.functional.linear(x, each).roll(1, 1) for each in w), x, *weights)
    (each,) = alternatives(low)
    (region,) = each.ways[1].steps
    assert isinstance(region, Region) and len(region.nest.stores) == 6
    results = [step.outputs[0] for step in each.ways[0].steps if isinstance(step, Call)]
    want = [(x.double() @ w.double().mT).flatten() for w in weights]
    for config in (*configs(region, TARGET), LOOPED):
        memory = {n: t.flatten() for n, t in zip(low.inputs, (x, *weights), strict=True)}
        memory |= {n: garbage(size, BF16) for n, size in zip(results, columns, strict=True) if n is not None}
        printed = print_region(region, config, TARGET)
        for spec in printed.scratch:
            memory[spec.name] = garbage(evaluate(spec.extent, {}), spec.dtype)
        for kernel in printed.kernels:
            interpreter.run(kernel, memory, {})
        for name, expected in zip(results, want, strict=True):
            close(memory[str(name)], expected)
        if config.persistent:
            assert "tl.sum" not in printed.kernels[0].text.rpartition("tl.load")[0]


def test_a_matrix_times_a_vector_takes_two_rows_a_program() -> None:
    """Proposed where that leaves enough programs; a sum over rows that share nothing is not."""
    shared = searched(lambda x, w: torch.nn.functional.linear(x, w), *(torch.empty(n, 4096).bfloat16() for n in (1, 2048)))
    (each,) = alternatives(shared)
    (row,) = next(way.steps for way in each.ways if way.label == "row")
    assert isinstance(row, Region)
    proposed = configs(row, TARGET)
    assert proposed[2] == replace(proposed[0], x_block=2)
    (kernel,) = print_region(row, proposed[2], TARGET).kernels
    assert kernel.grid[0] == 1024 and compile_triton(kernel, TARGET)[1]["n_regs"] <= 40
    (alone,) = searched(lambda x: x.float().sum(1), torch.empty(2048, 4096).bfloat16()).steps
    assert isinstance(alone, Region) and not any(c.x_block == 2 for c in configs(alone, TARGET))


def test_gathered_rows_are_shared_among_programs_as_others_are() -> None:
    def centered(x: torch.Tensor) -> torch.Tensor:
        return x - x.float().mean(1, keepdim=True)

    found = []
    for fn, *args in (
        (centered, torch.empty(1 << 16, 1024, dtype=BF16)),
        (lambda t, i: centered(t[i]), torch.empty(64, 1024, dtype=BF16), torch.zeros(1 << 16, dtype=I64)),
    ):
        (region,) = schedule(moved(lower_function(fn, tuple(args)), "cuda")).steps
        assert isinstance(region, Region)
        found.append([c for c in configs(region, TARGET) if not c.programs])  # gathers take no turns
    assert found[0] == found[1] and found[0][0].x_block == 2


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("row", [5, 64, 200])
def test_sums_over_rows(interpreter: Interpreter, row: int, dtype: torch.dtype) -> None:
    """In parts of one, some and all rows, one and several rows at a time; the last part and the last rows incomplete.

    What is proposed for many rows is tried on few: the interpreter runs programs one after another.
    """
    for points in (21, 32):
        case = nests.norm_gradients(points, row, dtype)
        length = 1 << (row - 1).bit_length()
        for block, split in ((1, 5), (4, 3), (8, 2), (16, 64), (1, 1)):
            config = TritonConfig(block, r_block=length, split=split, stages=2 if block == 4 else 1)
            check(interpreter, case, config, slack=32.0)
    for config in every_config(nests.norm_gradients(600, row, dtype)):
        check(interpreter, nests.norm_gradients(40, row, dtype), config, slack=64.0)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("groups", "members", "row"), [(5, 4, 6), (1, 2, 64), (3, 8, 16)])
def test_sums_over_groups_of_rows(interpreter: Interpreter, groups: int, members: int, row: int, dtype: torch.dtype) -> None:
    """One group a program, several, the last program not full, in registers and in a loop; what is proposed for many."""
    case = nests.group_totals(groups, members, row, dtype)
    block = 1 << (row - 1).bit_length()
    for points in (members, 2 * members, 16):
        check(interpreter, case, TritonConfig(points, r_block=block), slack=32.0)
        check(interpreter, case, TritonConfig(points, r_block=4, persistent=False), slack=32.0)
    for config in every_config(nests.group_totals(4096, members, row, dtype)):
        check(interpreter, case, config, slack=32.0)
    with pytest.raises(UnsupportedError, match="parts of groups"):
        print_region(case.region, TritonConfig(1, r_block=block), TARGET)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("points", [1, 37, 64])
def test_sums_over_rows_after_what_the_rows_reduce_to(interpreter: Interpreter, points: int, dtype: torch.dtype) -> None:
    """Down the columns with a loop over the rows, with all rows at once, and in parts."""
    case = nests.norm_gradients(points, 200, dtype)
    for config in (
        TritonConfig(32, r_block=16, persistent=False, statistics=True),
        TritonConfig(64, r_block=64, statistics=True),
        *([TritonConfig(32, r_block=16, persistent=False, split=4, statistics=True)] if points > 1 else []),
    ):
        check(interpreter, case, config, slack=32.0)


def test_long_rows_are_reduced_first() -> None:
    case = nests.norm_gradients(16, 65536, F32)
    found = every_config(case)
    assert found[0].statistics and any(c.split == 1 and not c.statistics for c in found)
    entries = [k.entry for k in print_region(case.region, found[0], TARGET).kernels]
    assert sum("column" in e for e in entries) == 1 and "column" in entries[-1]
    assert not any(c.statistics for c in every_config(nests.norm_gradients(8192, 1024, F32)))


def test_rows_that_crowd_registers_may_have_more_warps_or_be_apart_in_turns() -> None:
    case = nests.norm_gradients(8192, 8192, F32)
    found = every_config(case)
    more = next(c for c in found if c.split > 1 and c.stages == 2)
    assert more == replace(found[0], num_warps=2 * found[0].num_warps, stages=2)
    assert compile_triton(print_region(case.region, more, TARGET).kernels[0], TARGET)[1]["n_spills"] <= FEW_SPILLED
    in_turns, one_by_one = (c for c in found if c.split == 1)
    assert (in_turns, one_by_one) == (TritonConfig(1, stages=2), TritonConfig(1))
    rows, alone = (print_region(case.region, c, TARGET).kernels[0] for c in (in_turns, one_by_one))
    assert int(rows.grid[0]) <= TARGET.sm_count and "num_stages=3" in rows.text and int(alone.grid[0]) == 8192
    assert not any(c.stages == 2 for c in every_config(nests.norm_gradients(8192, 1024, F32)))


def test_what_only_the_sums_read_is_not_stored(interpreter: Interpreter) -> None:
    case = nests.norm_gradients(40, 64, F32)
    alone = replace(case, region=replace(case.region, passed=frozenset({"dx"})))
    inputs = {n: sample(case, n) for n in case.inputs}
    for config in (TritonConfig(4, r_block=64, split=4), TritonConfig(32, r_block=16, persistent=False, statistics=True)):
        assert not any("dx" in k.buffers for k in print_region(alone.region, config, TARGET).kernels)
        _, *expected = run(interpreter, case, config, inputs)
        _, *actual = run(interpreter, alone, config, inputs)
        assert all(map(torch.equal, actual, expected))


def test_sums_over_a_symbolic_number_of_rows(interpreter: Interpreter) -> None:
    rows = symbol(Sym("s0", lo=2))
    for points in (5, 64, 100):
        case = nests.norm_gradients(rows, 48, F32, s0=points)
        for config in every_config(case):
            check(interpreter, case, config, slack=64.0)


def test_symbolic_broadcast(interpreter: Interpreter) -> None:
    check(interpreter, nests.broadcast_symbolic(), TritonConfig(64))


@pytest.mark.parametrize("config", [TritonConfig(32, y_block=16), TritonConfig(128)])
def test_transposed(interpreter: Interpreter, config: TritonConfig) -> None:
    check(interpreter, nests.transposed(F32), config)
    check(interpreter, nests.nhwc_add(), config)


@pytest.mark.parametrize(
    "config",
    [
        TritonConfig(1),
        TritonConfig(4),
        LOOPED,
        replace(LOOPED, stages=3),
        TritonConfig(1, split=4),
        TritonConfig(1, split=3),
        TritonConfig(4, stages=3, programs=2),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_softmax(interpreter: Interpreter, config: TritonConfig, dtype: torch.dtype) -> None:
    case = nests.softmax(6, 100, dtype)
    x = sample(case, "a")
    x[1] = -float("inf")
    x[2, ::2] = -float("inf")
    x[3, 50:] = -float("inf")
    x[4, 7] = float("inf")
    x[5, 9] = float("nan")
    check(interpreter, case, config, a=x)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("log", [False, True])
def test_softmax_of_neighbours_together(interpreter: Interpreter, dtype: torch.dtype, log: bool) -> None:
    """A thread's neighbours share an accumulator; rows end within a block, and some hold nothing but one infinity."""
    config = TritonConfig(2, r_block=256, persistent=False, num_warps=1)
    case = nests.softmax(7, 1000, dtype, log=log)
    (printed,) = print_region(case.region, config, TARGET).kernels
    assert "h.softmax_step" in printed.text and "RB // " in printed.text
    x = sample(case, "a")
    x[0], x[1, 300:], x[2, 0], x[3, 999], x[4, :900] = -torch.inf, -torch.inf, torch.inf, torch.nan, -torch.inf
    x[5] *= 80
    check(interpreter, case, config, a=x)


@pytest.mark.parametrize("row", [100, 512])
@pytest.mark.parametrize(
    "config",
    [
        TritonConfig(1),
        LOOPED,
        TritonConfig(2, r_block=128, persistent=False, num_warps=1),
        TritonConfig(1, split=4),
        TritonConfig(1, split=3),
        TritonConfig(4, stages=3, programs=2),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_weighted_logarithms_of_probabilities(
    interpreter: Interpreter, config: TritonConfig, dtype: torch.dtype, row: int
) -> None:
    """Rows of large numbers lose nothing to their size, nor to a beginning far below the others that has no weight."""
    case = nests.weighted_log_softmax(10, row, dtype)
    assert {n.kind for n in postorder(case.region.nest.roots) if isinstance(n, Reduce)} == {"weighted_softmax"}
    x, w = sample(case, "a"), sample(case, "w").abs()
    w[::3] = 0
    x[0], x[1, 1::3], x[2, 3::3], x[3, 7], x[4, 9] = -torch.inf, -torch.inf, -torch.inf, torch.inf, torch.nan
    x[5], x[6], x[7, :9:3], x[8, -8:] = x[5] + 4096, x[6] * 80 - 2048, -3e8, -torch.inf
    eager, exact = case.reference(x.float(), w.float()), case.reference(x.double(), w.double())
    for each in zip(run(interpreter, case, config, {"a": x, "w": w}), eager, exact, strict=True):
        assert_closer(*map(tuple, each))  # each row by its own size


@pytest.mark.parametrize("config", [TritonConfig(1, split=4), TritonConfig(1, r_block=32, persistent=False, split=4)])
def test_a_part_without_probability_leaves_a_weighted_sum_infinite(interpreter: Interpreter, config: TritonConfig) -> None:
    """Each of its logarithms is minus infinity, as eager has them: no difference of two infinities is NaN."""
    case = nests.weighted_log_softmax(3, 512, F32)
    x, w = sample(case, "a"), sample(case, "w").abs() + 1
    x[0, 128:256], x[1, 384:] = -torch.inf, -torch.inf
    loss, whole = run(interpreter, case, config, {"a": x, "w": w})
    eager, exact = case.reference(x, w), case.reference(x.double(), w.double())
    assert eager[0].isneginf().tolist() == [True, True, False]
    assert_closer((loss, whole), eager, exact)


def test_many_short_rows_share_programs() -> None:
    """Programs of 2 KiB would start more slowly than memory moves so much; few of them do not matter."""
    for case in (nests.softmax(1 << 20, 64, BF16), nests.softmax(1 << 16, 1024, BF16)):
        first = every_config(case)[0]
        assert first.x_block * first.r_block * 4 >= 8192
    assert every_config(nests.softmax(1 << 12, 1024, BF16))[0].x_block == 1


def test_symbolic_softmax(interpreter: Interpreter) -> None:
    s0, s1 = Sym("s0", lo=1), Sym("s1", lo=1)
    check(interpreter, nests.softmax(symbol(s0), symbol(s1), F32, log=True, s0=5, s1=37), LOOPED)


@pytest.mark.parametrize(
    "config", [TritonConfig(1), TritonConfig(4), LOOPED, TritonConfig(1, split=3), TritonConfig(2, stages=3, programs=2)]
)
@pytest.mark.parametrize("row", [96, 100])
def test_layer_norm(interpreter: Interpreter, config: TritonConfig, row: int) -> None:
    case = nests.layer_norm(7, row, F32)
    check(interpreter, case, config, slack=200.0, a=sample(case, "a") + 100)  # a + b alone rounds at 100 * eps


@pytest.mark.parametrize("config", [TritonConfig(2), LOOPED, TritonConfig(2, split=3)])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("kind", ["sum", "prod", "max", "min", "argmax", "argmin", "any", "all"])
def test_reductions(interpreter: Interpreter, kind: str, columns: bool, config: TritonConfig) -> None:
    dtype = BOOL if kind in ("any", "all") else F32
    case = nests.reduction(kind, 5, 50, dtype, columns)
    x = sample(case, "a")
    if kind not in ("sum", "prod", "any", "all"):
        row = x.T if columns else x
        row[1, 30], row[1, 40] = float("nan"), float("nan")
        row[2] = -float("inf") if kind.endswith("max") else float("inf")
        row[3] = 2.0
    check(interpreter, case, config, a=x)


@pytest.mark.parametrize("config", [TritonConfig(4), LOOPED])
@pytest.mark.parametrize("kind", ["sum", "max", "min", "argmax"])
@pytest.mark.parametrize("dtype", [I64, torch.int32, torch.int8, torch.uint8])
def test_integer_reductions(interpreter: Interpreter, kind: str, dtype: torch.dtype, config: TritonConfig) -> None:
    case = nests.reduction(kind, 4, 45, dtype)
    x = sample(case, "a")
    result = run(interpreter, case, config, {"a": x})[0]
    assert torch.equal(result, case.reference(x)[0].to(result.dtype))


@pytest.mark.parametrize("config", [TritonConfig(4), LOOPED, TritonConfig(4, split=5), replace(LOOPED, stages=3, split=5)])
def test_column_variance(interpreter: Interpreter, config: TritonConfig) -> None:
    check(interpreter, nests.variance(6, 130), config)


@pytest.mark.parametrize("config", [TritonConfig(4), LOOPED, TritonConfig(1, split=3)])
def test_side_by_side(interpreter: Interpreter, config: TritonConfig) -> None:
    check(interpreter, nests.side_by_side(7, 50), config)


@pytest.mark.parametrize("config", [TritonConfig(8), LOOPED, TritonConfig(8, split=4)])
def test_stores_along_a_reduced_axis(interpreter: Interpreter, config: TritonConfig) -> None:
    check(interpreter, nests.gelu_backward(64, 12, F32), config)


@pytest.mark.parametrize("parts", [1, 2, 4, 12, 24, 5])
def test_a_reduction_over_images_and_pixels_in_parts(interpreter: Interpreter, parts: int) -> None:
    check(interpreter, nests.channel_variance(12, 3, 14, F32), TritonConfig(1, r_block=16, persistent=False, split=parts))


def test_parts_of_whole_images_are_read_along_their_pixels() -> None:
    """A row of several axes is cut along the outer ones, and its parts stay row reductions."""
    region = nests.channel_variance(64, 32, 8192, BF16).region
    first = configs(region, TARGET)[0]
    part = print_region(region, first, TARGET).kernels[0]
    assert first.split > 1
    assert part.grid[0] == 32 * first.split
    assert part.compile_options["constexprs"]["XB"] == 1


@pytest.mark.parametrize(
    "config",
    [TritonConfig(128, rows=True), TritonConfig(256, rows=True), TritonConfig(128, y_block=4, rows=True), TritonConfig(128)],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_programs_of_one_row(interpreter: Interpreter, config: TritonConfig, dtype: torch.dtype) -> None:
    images = symbol(Sym("s0", lo=1))
    check(interpreter, nests.channel_scale(2, 3, 272, dtype), config)
    check(interpreter, nests.channel_scale(images, 3, 272, dtype, s0=2), config)


def test_what_is_the_same_along_a_row_is_loaded_once() -> None:
    region = nests.channel_scale(64, 32, 8192, BF16).region
    first = configs(region, TARGET)[0]
    assert first.rows
    (kernel,) = print_region(region, first, TARGET).kernels
    assert "tl.load(b1 + (y % 32))" in kernel.text
    assert not any(c.rows for c in configs(nests.channel_scale(64, 32, 49, BF16).region, TARGET)), "too short"
    short = [c for c in configs(nests.channel_scale(64, 32, 64, BF16).region, TARGET) if c.rows]
    assert [(c.x_block, c.y_block) for c in short] == [(64, 32)], "as wide as the rows"


@pytest.mark.parametrize(("together", "backwards"), [(4, False), (8, True), (16, False)])
def test_what_several_rows_share_is_loaded_once(interpreter: Interpreter, together: int, backwards: bool) -> None:
    """A vector of columns, and rows of which each stands for eight: by a program's first row, if that tells."""
    y, x = Sym("x0", size=40), Sym("x1", size=512)
    repeated = Load("a", floordiv(symbol(y), 8) * 512 + symbol(x), F32)
    total = nests.op("add", repeated, Load("b", symbol(x), F32))
    value = Op("where", (Load("c", symbol(y), BOOL), total, Const(0.0, F32)), F32)
    nest = Nest((y, x), (), (Store("o", symbol(y) * 512 + symbol(x), value),))
    shapes = {"a": (5, 512), "b": (512,), "c": (40,), "o": (40, 512)}

    def expected(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.where(c[:, None], a.view(5, 512).repeat_interleave(8, 0) + b, 0.0)

    buffers = [nests.buffer(n, BOOL if n == "c" else F32, s) for n, s in shapes.items()]
    case = nests.make(nest, buffers, "a b c", "o", expected)
    case.region = replace(case.region, backwards=backwards)
    config = TritonConfig(256, y_block=together, num_warps=2, rows=True)
    (kernel,) = print_region(case.region, config, TARGET).kernels
    assert ("(y_base // 8)*512" in kernel.text) is (together <= 8)
    check(interpreter, case, config)
    several = [c for c in configs(case.region, TARGET) if c.rows and c.y_block > 1]
    assert several and several[0].x_block == 512, "they are proposed"
    (proposed,) = print_region(case.region, several[0], TARGET).kernels
    assert compile_triton(proposed, TARGET)[1]["shared"] <= 8, "no tile is brought into another layout"
    (few,) = print_region(case.region, replace(several[0], y_block=2), TARGET).kernels
    assert compile_triton(few, TARGET)[1]["shared"] <= 8, "nor where a mask has fewer rows than an access elements"


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_one_plus_tanh(interpreter: Interpreter, dtype: torch.dtype) -> None:
    """Where the sum is rounded it is computed as a whole, and exact where it is small. Tanh with more users stays."""
    x = Sym("x", size=4096)
    tanh = Op("tanh", (Op("cast", (Load("a", symbol(x), F32),), F32),), F32)
    total = Op("add", (tanh, Const(1.0, F32)), F32)
    nest = Nest((x,), (), (Store("o", symbol(x), Op("cast", (total,), dtype)),))
    buffers = [nests.buffer("a", F32, (4096,)), nests.buffer("o", dtype, (4096,))]

    def expected(a: torch.Tensor) -> torch.Tensor:
        return (2 / (1 + torch.exp(-2 * a.double()))).to(dtype)

    case = nests.make(nest, buffers, "a", "o", expected)
    (kernel,) = print_region(case.region, TritonConfig(1024), TARGET).kernels
    assert ("tanh_plus_one" in kernel.text) is (dtype == BF16)
    allowed = {"rtol": 8e-3, "atol": 0.0} if dtype == BF16 else {"rtol": 1e-6, "atol": 2e-7}
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 100.0, -100.0])
    for inputs in (torch.linspace(-9, 9, 4096), special.repeat(586)[:4096]):
        (actual,) = run(interpreter, case, TritonConfig(1024), {"a": inputs})
        torch.testing.assert_close(actual, expected(inputs), equal_nan=True, **allowed)
    twice = replace(nest, stores=(replace(nest.stores[0], value=Op("cast", (Op("mul", (total, tanh), F32),), dtype)),))
    (kernel,) = print_region(nests.make(twice, buffers, "a", "o", expected).region, TritonConfig(1024), TARGET).kernels
    assert "tanh_plus_one" not in kernel.text


def test_parts_down_large_columns_have_few_registers_first() -> None:
    """The parts have the shape that their configuration names."""
    small, large = (nests.reduction("sum", 1024, n, BF16, columns=True).region for n in (4096, 65536))
    assert configs(small, TARGET)[0].r_block == 64
    first = configs(large, TARGET)[0]
    assert (first.x_block, first.r_block, first.stages) == (64, 16, 1)
    assert print_region(large, first, TARGET).kernels[0].compile_options["constexprs"] == {"XB": 64, "RB": 16}


def test_split_parts_store_along_the_row_themselves() -> None:
    """Equal parts: everything is read once. Unequal ones would need a mask, so the row is read again by a third kernel."""
    case = nests.gelu_backward(64, 12, F32)
    equal, unequal = (print_region(case.region, TritonConfig(8, split=p), TARGET).kernels for p in (4, 5))
    assert [len(k.buffers) for k in equal] == [4, 2]
    assert len(unequal) == 3


def test_a_normal_distribution(interpreter: Interpreter) -> None:
    """1 + erf(x) as exact as with the nearest float32 to erf(x), which is off by 4.5e-8 and 9e-8 of the sum."""
    x = Sym("x", size=4096)
    value = Op("add", (Const(1.0, F32), Op("erf", (Load("a", symbol(x), F32),), F32)), F32)
    nest = Nest((x,), (), (Store("o", symbol(x), value),))
    case = nests.make(nest, [nests.buffer(n, F32, (4096,)) for n in "ao"], "a", "o", lambda a: 1 + torch.special.erf(a))
    inputs = {"a": torch.linspace(-7, 7, 4096)}
    (actual,) = run(interpreter, case, TritonConfig(1024), inputs)
    error = (actual.double() - 1 - torch.special.erf(inputs["a"].double())).abs()
    assert error[:2048].max() < 9e-8 and error[2048:].max() < 2e-7
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 100.0, -100.0]).repeat(586)[:4096]
    torch.testing.assert_close(
        run(interpreter, case, TritonConfig(1024), {"a": special})[0], 1 + torch.special.erf(special), equal_nan=True
    )


@pytest.mark.parametrize(("order", "biased"), [(0, False), (1, False), (2, False), (0, True), (1, True)])
def test_a_gelu_that_is_rounded_to_8_bits(interpreter: Interpreter, order: int, biased: bool) -> None:
    """As near to the exact one as float8 is, with infinities and NaN as they are; its factors come in any order, and what it
    is of may be a sum.
    """
    float8, x = torch.float8_e4m3fn, Sym("x", size=4096)
    given, half = Load("a", symbol(x), F32), Const(0.5, F32)
    a = Op("add", (Op("mul", (given, half), F32), Op("mul", (half, given), F32)), F32) if biased else given
    total = Op("add", (Op("erf", (Op("mul", (a, Const(0.7071067811865476, F32)), F32),), F32), Const(1.0, F32)), F32)
    one, two, three = [(a, half, total), (total, a, half), (half, total, a)][order]
    gelu = Op("mul", (one, Op("mul", (two, three), F32)), F32)
    store = Store("o", symbol(x), Op("cast", (Op("mul", (gelu, Const(64.0, F32)), F32),), float8))

    def expected(a: torch.Tensor) -> torch.Tensor:
        exact = 32 * a.double() * torch.special.erfc(-a.double() * 0.5**0.5)
        return exact.clamp(-448.0, 448.0).float()

    buffers = [nests.buffer("a", F32, (4096,)), nests.buffer("o", float8, (4096,))]
    case = nests.make(Nest((x,), (), (store,)), buffers, "a", "o", expected)
    (kernel,) = print_region(case.region, TritonConfig(1024), TARGET).kernels
    assert "h.coarse_gelu" in kernel.text and "erf_plus_one" not in kernel.text
    inputs = torch.linspace(-6, 6, 4096)
    inputs[:6] = torch.tensor([float("nan"), float("-inf"), -100.0, 0.0, -0.0, 20.0])
    (actual,) = run(interpreter, case, TritonConfig(1024), {"a": inputs})
    torch.testing.assert_close(actual.float(), expected(inputs), rtol=0.0635, atol=2.0**-9, equal_nan=True)


def test_a_squared_distribution_is_no_gelu() -> None:
    x = Load("a", symbol(Sym("x", size=8)), F32)
    total = Op("add", (Const(1.0, F32), Op("erf", (Op("mul", (x, Const(0.5**0.5, F32)), F32),), F32)), F32)
    assert gelu_argument(Op("mul", (Op("mul", (Const(0.5, F32), total), F32), total), F32)) is None
    assert gelu_argument(Op("mul", (Op("mul", (Const(0.5, F32), x), F32), total), F32)) is x


def test_a_normal_distribution_that_is_rounded_to_8_bits(interpreter: Interpreter) -> None:
    """A GELU by a shorter polynomial, as near to the exact one as float8 is; not where a wider type holds it as well."""
    float8, x = torch.float8_e4m3fn, Sym("x", size=4096)
    a = Load("a", symbol(x), F32)
    total = Op("add", (Const(1.0, F32), Op("erf", (Op("mul", (a, Const(0.5**0.5, F32)), F32),), F32)), F32)
    gelu = Op("mul", (a, total), F32)
    scaled = Op("mul", (Op("cast", (Op("cast", (gelu,), BF16),), F32), Const(32.0, F32)), F32)
    bounded = Op("minimum", (Op("maximum", (scaled, Const(-448.0, F32)), F32), Const(448.0, F32)), F32)
    store = Store("o", symbol(x), Op("cast", (bounded,), float8))

    def expected(a: torch.Tensor) -> torch.Tensor:
        exact = 32 * a.double() * torch.special.erfc(-a.double() * 0.5**0.5)
        return exact.clamp(-448.0, 448.0).float()

    buffers = [nests.buffer("a", F32, (4096,)), nests.buffer("o", float8, (4096,))]
    case = nests.make(Nest((x,), (), (store,)), buffers, "a", "o", expected)
    (kernel,) = print_region(case.region, TritonConfig(1024), TARGET).kernels
    assert "h.coarse_erf_plus_one" in kernel.text and "h.saturated_to_float8e4" in kernel.text
    inputs = torch.linspace(-6, 8, 4096)
    (actual,) = run(interpreter, case, TritonConfig(1024), {"a": inputs})
    torch.testing.assert_close(actual.float(), expected(inputs), rtol=0.0635, atol=2.0**-9)
    both = Nest((x,), (), (store, Store("p", symbol(x), Op("cast", (gelu,), BF16))))
    wider = nests.make(both, [*buffers, nests.buffer("p", BF16, (4096,))], "a", "o", expected)
    (kernel,) = print_region(wider.region, TritonConfig(1024), TARGET).kernels
    assert "coarse" not in kernel.text


@pytest.mark.parametrize("reduces", [False, True])
def test_halves_in_each_others_place_are_loaded_once(interpreter: Interpreter, reduces: bool) -> None:
    case = nests.turned_halves(5, 32, 16, reduces)
    configs = [TritonConfig(4, r_block=32), TritonConfig(1, r_block=8, persistent=False)] if reduces else [TritonConfig(64)]
    for config in configs:
        check(interpreter, case, config, slack=16.0)
        (kernel,) = print_region(case.region, config, TARGET).kernels
        assert "+ 16) % 32" in kernel.text and not re.search(r"tl\.load\(.*, v", kernel.text), "no load is masked"


def test_parts_of_other_sizes_are_selected() -> None:
    (kernel,) = print_region(nests.turned_halves(5, 32, 20).region, TritonConfig(64), TARGET).kernels
    assert kernel.text.count("tl.load(") == 3


@pytest.mark.parametrize("row", [37, 64])
def test_bytes_beside_float32(interpreter: Interpreter, row: int) -> None:
    for config in (TritonConfig(4, r_block=64), TritonConfig(1, r_block=16, persistent=False), TritonConfig(1, split=2)):
        check(interpreter, nests.masked_excess(7, row), config)


def test_a_split_reduction_of_uneven_parts(interpreter: Interpreter) -> None:
    check(interpreter, nests.gelu_backward(64, 12, F32), TritonConfig(8, split=5))


@pytest.mark.parametrize(
    ("case", "config"),
    [
        (nests.pointwise(1000, F32), TritonConfig(128)),
        (nests.transposed(F32), TritonConfig(32, y_block=16)),
        (nests.softmax(6, 100, F32), LOOPED),
        (nests.softmax(6, 100, F32), TritonConfig(1, split=4)),
        (nests.norm_gradients(37, 64, F32), TritonConfig(4, r_block=64, split=3)),
        (nests.broadcast_symbolic(), TritonConfig(64)),
    ],
)
def test_programs_in_reverse(interpreter: Interpreter, case: Case, config: TritonConfig) -> None:
    turned = replace(case, region=replace(case.region, backwards=True, reread=True))
    texts = [k.text for k in print_region(turned.region, config, TARGET).kernels]
    assert "tl.num_programs(0) - 1" in texts[0] and "evict_first" not in texts[0]
    check(interpreter, turned, config, slack=32.0)


def test_what_is_the_same_for_a_step_is_loaded_once(interpreter: Interpreter) -> None:
    """A weight for each run of 32 elements: the same for a step of 16 or 32, not of 64, nor of 16 over runs of 24."""
    for length, step, same in ((32, 16, True), (32, 32, True), (32, 64, False), (24, 16, False)):
        case = nests.group_scale(5, 4, length)
        config = TritonConfig(1, r_block=step, persistent=False)
        check(interpreter, case, config)
        check(interpreter, case, replace(config, x_block=2))
        assert (f"r_base // {length}" in print_region(case.region, config, TARGET).kernels[0].text) == same


def test_powers_of_two_divide_by_their_reciprocal() -> None:
    """The same values, without the slow path that a correctly rounded division has."""
    texts = {
        row: print_region(nests.group_scale(5, 4, row // 4).region, TritonConfig(1, r_block=64), TARGET) for row in (48, 64)
    }
    assert "h.divide" in texts[48].kernels[0].text
    assert "h.divide" not in texts[64].kernels[0].text and f"* {1 / 64})" in texts[64].kernels[0].text


@pytest.mark.parametrize("divisor", [3.0, -7.0, 0.0, float("inf"), float("nan"), 1e-45, -1e-39, 3e38])
def test_a_divisor_that_neighbours_share_is_inverted_once(interpreter: Interpreter, divisor: float) -> None:
    """Quotients are a division's: of zeros, infinities and NaN too, and whatever the size of the divisor."""
    y, x = Sym("x0", size=2), Sym("x1", size=256)
    at = symbol(y) * 256 + symbol(x)
    value = nests.op("truediv", Load("a", at, F32), Load("b", symbol(y), F32))
    nest = Nest((y, x), (), (Store("o", at, value),))
    buffers = [nests.buffer("a", F32, (2, 256)), nests.buffer("b", F32, (2,)), nests.buffer("o", F32, (2, 256))]
    case = nests.make(nest, buffers, "a b", "o", lambda a, b: a.view(2, 256) / b[:, None])
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-18, 1e18, -3e38])
    given = {"a": torch.cat((torch.randn(504), special)), "b": torch.tensor([divisor, 1.25])}
    config = TritonConfig(256, rows=True)
    (kernel,) = print_region(case.region, config, TARGET).kernels
    assert "h.divide_many" in kernel.text
    assert "h.divide(" in print_region(case.region, TritonConfig(256), TARGET).kernels[0].text, "one index for both"
    (actual,) = run(interpreter, case, config, given)
    (expected,) = case.reference(given["a"], given["b"])
    torch.testing.assert_close(actual.flatten(), expected.flatten(), rtol=3e-7, atol=3e-45, equal_nan=True)
    finite = expected.flatten().isfinite()
    assert torch.equal(actual.flatten()[finite].signbit(), expected.flatten()[finite].signbit())


def test_what_parts_have_stored_is_loaded_again(interpreter: Interpreter) -> None:
    """Rather than its operands; where the last part is incomplete, nothing is stored on the way."""
    for row, buffers in ((128, {"total", "o"}), (100, {"a", "b", "o", "total"})):
        case = nests.residual_norm(3, row)
        config = TritonConfig(1, split=4 if row == 128 else 3)
        check(interpreter, case, config)
        check(interpreter, case, LOOPED)
        rest = print_region(case.region, config, TARGET).kernels[-1]
        assert buffers <= set(rest.buffers) and ("a" in rest.buffers) == ("a" in buffers)


def test_clamped_indices_need_no_check(interpreter: Interpreter) -> None:
    """Whatever lies outside is at the end that it is clamped to; a clamp to more than the dimension is none."""
    case = nests.scatter_add(lowest=-5)
    config = TritonConfig(64)
    check(interpreter, case, config, i=torch.randint(-9, 9, (30,)))
    assert not any(k.errors for k in print_region(case.region, config, TARGET).kernels)
    for other in (nests.scatter_add(), nests.scatter_add(lowest=-6), nests.scatter_add(lowest=-5, highest=5)):
        assert all(k.errors for k in print_region(other.region, config, TARGET).kernels)


FORMS = [nests.cat, nests.gather, nests.scatter_add, nests.add_to_scalar, lambda: nests.in_place(77)]


@pytest.mark.parametrize("make", FORMS)
def test_memory_forms(interpreter: Interpreter, make: object) -> None:
    assert callable(make)
    check(interpreter, make(), TritonConfig(32))


def test_index_out_of_bounds_is_an_assert(interpreter: Interpreter) -> None:
    case = nests.gather()
    inputs = {"t": sample(case, "t"), "i": torch.full((9,), 20)}
    with pytest.raises(RuntimeError, match="index out of bounds for dimension of size 20"):
        run(interpreter, case, TritonConfig(32), inputs)


@pytest.mark.parametrize("config", [TritonConfig(2), LOOPED])
@pytest.mark.parametrize("kind", ["cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"])
def test_scans(interpreter: Interpreter, kind: str, config: TritonConfig) -> None:
    check(interpreter, nests.cumulative(kind, 3, 40), config)


def test_every_proposed_configuration(interpreter: Interpreter) -> None:
    cases = [nests.pointwise(500, F32), nests.layer_norm(9, 70, BF16), nests.reduction("sum", 40, 90, F32, True)]
    for case in [*cases, nests.transposed(BF16), nests.reduction("argmax", 2, 300, F32)]:
        for config in every_config(case):
            check(interpreter, case, config)


def test_empty_rows_reduce_to_the_neutral_element(interpreter: Interpreter) -> None:
    check(interpreter, nests.reduction("sum", 4, 0, F32), TritonConfig(2))


def test_int64_indexing_when_sizes_are_unbounded() -> None:
    bounded = nests.pointwise(1000, F32)
    assert "int64" not in print_region(bounded.region, TritonConfig(64), TARGET).kernels[0].text
    kernel = print_region(nests.broadcast_symbolic().region, TritonConfig(64), TARGET).kernels[0]
    assert "i64" in kernel.compile_options["signature"].values()


def positions(n: int) -> Case:
    """Indices as values: a product and a sum that begin and do not end with a parenthesis."""
    x = Sym("x0", size=n)
    here = symbol(x)
    values = (mod(floordiv(here, 2), 4) * 2, mod(here, 5) + 3, floordiv(here, 7) + mod(here, 3))
    stores = tuple(Store(f"o{k}", here, IndexValue(value)) for k, value in enumerate(values))
    at = torch.arange(n)
    expected = (at // 2 % 4 * 2, at % 5 + 3, at // 7 + at % 3)
    buffers = [nests.buffer(f"o{k}", I64, (n,)) for k in range(3)]
    return nests.make(Nest((x,), (), stores), buffers, "", "o0 o1 o2", lambda: expected)


def test_indices_as_values(interpreter: Interpreter) -> None:
    check(interpreter, positions(100), TritonConfig(32))


def huge(sizes: tuple[int, int]) -> Case:
    """Column 0 of a strided matrix whose extent a kernel must not take for small: n rows, m elements apart."""
    s0, s1 = Sym("s0", lo=1), Sym("s1", lo=1)
    n, m = symbol(s0), symbol(s1)
    x = Sym("x0", size=n)
    nest = Nest((x,), (), (Store("o", symbol(x), nests.op("neg", Load("a", symbol(x) * m, F32))),))
    buffers = [nests.buffer("a", F32, (n,), (m,)), nests.buffer("o", F32, (n,))]
    return nests.make(nest, buffers, "a", "o", lambda a: -a, s0=sizes[0], s1=sizes[1])


def test_unbounded_sizes_take_int32_indices_when_they_fit(interpreter: Interpreter) -> None:
    (kernel,) = print_region(huge((5, 3)).region, TritonConfig(8), TARGET).kernels
    narrow, wide, entry = kernel.text.split("@triton.jit")[1:]
    assert "int64" not in narrow and "int64" in wide
    assert "narrow(b0, b1, n0.to(tl.int32), n1.to(tl.int32), XB)" in entry
    assert set(kernel.compile_options["signature"].values()) == {"*fp32", "i64"}
    check(interpreter, huge((5, 3)), TritonConfig(8))


def test_more_than_int32_elements_take_int64_indices() -> None:
    (kernel,) = print_region(huge((2, 2**31 + 5)).region, TritonConfig(8), TARGET).kernels
    entry = kernel.text.split("@triton.jit")[-1]
    condition = entry.split("if ")[1].split(":")[0]
    for sizes, small in (((5, 3), True), ((2, 2**31 + 5), False), ((2**31, 1), False)):
        values = dict(zip((repr(s) for s in kernel.sizes), (f"n{k}" for k in range(2)), strict=True))
        env = {values["s0"]: sizes[0], values["s1"]: sizes[1]}
        assert eval(condition, {"tl": _Scalars}, env) is small


class _Scalars:
    """The scalar functions that a dispatch condition calls."""

    maximum = staticmethod(max)
    minimum = staticmethod(min)


def test_sizes_known_to_be_huge_have_no_narrow_form() -> None:
    case = nests.pointwise(2**31 + 64, BF16)
    (kernel,) = print_region(case.region, TritonConfig(1024), TARGET).kernels
    assert kernel.text.count("@triton.jit") == 1 and "int64" in kernel.text


@pytest.mark.parametrize(
    "case", [nests.computed_gather(30_000_000, 77), nests.computed_gather_backwards(30_000_000, 70_000_001)]
)
def test_addresses_computed_beyond_int32(interpreter: Interpreter, case: Case) -> None:
    (kernel,) = print_region(case.region, TritonConfig(64), TARGET).kernels
    assert "int64" in kernel.text
    for config in every_config(case):
        check(interpreter, case, config)


def test_addresses_computed_within_int32_stay_narrow(interpreter: Interpreter) -> None:
    for case in (nests.computed_gather(20_000_000, 77), nests.computed_gather_backwards(20_000_000, 70_000_001)):
        assert "int64" not in print_region(case.region, TritonConfig(64), TARGET).kernels[0].text
        check(interpreter, case, TritonConfig(64))


def test_indices_are_compared_with_narrow_ones(interpreter: Interpreter) -> None:
    """What is one for a row is narrowed there; what that would cut off or is negative equals no index."""
    case = nests.picked(6, 2048)
    (kernel,) = print_region(case.region, every_config(case)[0], TARGET).kernels
    assert kernel.text.count("h.as_natural(") == 1
    index = torch.tensor([0, 2047, 2**32 + 3, -1, -(2**40) + 5, 2**31 - 1])
    for config in every_config(case):
        check(interpreter, case, config, index=index)
    flat = print_region(case.region, TritonConfig(64), TARGET).kernels[0]
    assert "as_natural" not in flat.text, "one for each element"


def test_rows_are_asked_for_before_what_divides_them(interpreter: Interpreter) -> None:
    """A division has a branch, beyond which no load is moved: a row would wait for its divisor."""
    case, config = nests.shared_quotient(6, 1024), TritonConfig(1, r_block=1024)
    text = print_region(case.region, config, TARGET).kernels[0].text
    assert text.count("tl.load") == 4 and text.rindex("tl.load") < text.index("h.divide")
    check(interpreter, case, config)


@pytest.mark.parametrize(
    ("make", "short"), [(nests.exponential_gradient, "h.flushing_exp"), (nests.silu_gradient, "h.fast_sigmoid")]
)
def test_exponentials_of_halves_are_short_where_the_result_is_rounded(
    interpreter: Interpreter, make: Callable[[int, torch.dtype], Case], short: str
) -> None:
    for dtype in (BF16, torch.float16):
        case = make(300, dtype)
        assert short in print_region(case.region, TritonConfig(128), TARGET).kernels[0].text
        check(interpreter, case, TritonConfig(128))
    exact = print_region(make(300, F32).region, TritonConfig(128), TARGET).kernels[0]
    assert short not in exact.text


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_maxima_and_their_places(interpreter: Interpreter, dtype: torch.dtype) -> None:
    """Padding is filled in by the loads. In half precision two are compared at a time, where the GPU can (from sm_90 on)."""
    x = torch.randint(-2, 3, (2, 5, 6, 16)).to(dtype).permute(0, 3, 1, 2)
    x[0, 3, 2, 1], x[0, 5, 1:4, 2:5], x[1, :4] = torch.nan, torch.nan, -torch.inf
    low = lower_function(lambda x: max_pool_offsets(x, [3, 3], [2, 2], [1, 1], False), (x,))
    (region,) = (step for step in schedule(moved(low, "cuda")).steps if isinstance(step, Region))
    values, offsets = max_pool_offsets(x, [3, 3], [2, 2], [1, 1], False)
    for config in (TritonConfig(64), TritonConfig(16, y_block=2, rows=True)):
        (kernel,) = print_region(region, config, TARGET).kernels
        assert kernel.text.count("-inf") == kernel.text.count("other=") > 0
        memory = {low.inputs[0]: x.permute(0, 2, 3, 1).flatten()}
        memory |= {name: garbage(values.numel(), region.buffers[name].dtype) for name in region.writes()}
        interpreter.run(kernel, memory, {})
        for want in (values, offsets):
            (got,) = (memory[n] for n in region.writes() if memory[n].dtype == want.dtype)
            assert_same(got.view(2, 3, 3, 16).permute(0, 3, 1, 2), want)
    for arch in (80, 90) if dtype == BF16 else ():
        assert ("set.gt.u32.bf16x2" in compile_to_text(kernel, Target.cuda(arch), "ptx")) == (arch == 90)


@pytest.mark.parametrize(("times", "size"), [(3, 50), (30_000_000, 100), (-30_000_000, 100), (2**40 + 1, 5)])
def test_computed_addresses_decide_at_run_time(interpreter: Interpreter, times: int, size: int) -> None:
    case = nests.computed_gather_symbolic(times, size)
    (kernel,) = print_region(case.region, TritonConfig(64), TARGET).kernels
    assert kernel.text.count("@triton.jit") == 3
    check(interpreter, case, TritonConfig(64))


@pytest.mark.parametrize("divisor", [7, 2**32 + 5])
def test_divisors_beyond_int32(interpreter: Interpreter, divisor: int) -> None:
    check(interpreter, nests.divided_by_size(divisor), TritonConfig(64))


def test_numbers_beyond_int32_are_passed_whole(interpreter: Interpreter) -> None:
    """Neither the parameter's type nor the int32 body of a kernel with two may cut a number off."""
    (kernel,) = print_region(nests.plus_number(2**40, 100).region, TritonConfig(64), TARGET).kernels
    assert kernel.text.count("@triton.jit") == 1
    assert set(kernel.compile_options["signature"].values()) == {"*i64", "i64"}
    for number in (5, 2**40, -(2**40)):
        check(interpreter, nests.plus_number(number, symbol(Sym("s1", lo=2)), s1=9), TritonConfig(64))


def exponential(dtype: torch.dtype, name: str) -> str:
    """The text of dtype(name(exp(a) / b, 1.0)) over float32 inputs."""
    x = Sym("x0", size=64)
    a, b = (Load(n, symbol(x), F32) for n in "ab")
    value = nests.op(name, nests.op("truediv", nests.op("exp", a), b), Const(1.0, F32))
    nest = Nest((x,), (), (Store("o", symbol(x), nests.cast(value, dtype)),))
    buffers = [nests.buffer("a", F32, (64,)), nests.buffer("b", F32, (64,)), nests.buffer("o", dtype, (64,))]
    case = nests.make(nest, buffers, "a b", "o", lambda a, b: a)
    return print_region(case.region, TritonConfig(64), TARGET).kernels[0].text


def test_fast_functions_only_where_half_precision_hides_their_error() -> None:
    assert "tl.exp(" in exponential(BF16, "mul") and "h.divide" not in exponential(BF16, "mul")
    for text in (exponential(F32, "mul"), exponential(BF16, "sub")):  # a difference may cancel
        assert "libdevice.exp(" in text and "h.divide(" in text


def normed(dtype: torch.dtype, last: str) -> Case:
    """dtype(last(a * (1 / sqrt(b)) + sqrt(b) / 3)): a batch norm has the first, a mean the last."""
    n = 256
    x = Sym("x0", size=n)
    a, b = (Load(k, symbol(x), F32) for k in "ab")
    root = nests.op("sqrt", b)
    mean = nests.op("truediv", root, Const(3.0, F32))
    total = nests.op("add", nests.op("mul", a, nests.op("reciprocal", root)), mean)
    nest = Nest((x,), (), (Store("o", symbol(x), nests.cast(nests.op(last, total), dtype)),))
    buffers = [*(nests.buffer(k, F32, (n,)) for k in "ab"), nests.buffer("o", dtype, (n,))]

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        done: torch.Tensor = getattr(torch, last)(a * b.sqrt().reciprocal() + b.sqrt() / 3.0)
        return done

    return nests.make(nest, buffers, "a b", "o", run)


def test_roots_and_their_reciprocals_are_fast_where_float32_is_rounded_to_half_precision_in_the_end() -> None:
    text = print_region(normed(BF16, "tanh").region, TritonConfig(64), TARGET).kernels[0].text
    assert "tl.rsqrt(" in text and "tl.sqrt(" in text, "a reciprocal of a root is one function, the root another"
    assert not {"h.divide(", "h.square_root("} & set(re.findall(r"h\.\w+\(", text))
    for case in (normed(F32, "tanh"), normed(BF16, "floor")):  # stored as it is; half an integer's distance counts
        exact = print_region(case.region, TritonConfig(64), TARGET).kernels[0].text
        assert "h.divide(" in exact and "h.square_root(" in exact and "rsqrt" not in exact


def test_fast_roots(interpreter: Interpreter) -> None:
    b = torch.rand(256)
    b[:6] = torch.tensor([0.0, -0.0, -1.0, 1e-40, float("inf"), float("nan")])
    check(interpreter, normed(BF16, "tanh"), TritonConfig(64), b=b)


def test_texts_are_canonical() -> None:
    one, other = nests.pointwise(256, F32), nests.pointwise(256, F32)
    renamed = {b: f"other_{b}" for b in "abo"}
    x = Sym("x5", size=256)
    a, b = (Load(renamed[n], symbol(x), F32) for n in "ab")
    value = nests.op("mul", nests.op("add", a, b), nests.op("sigmoid", a))
    other.region.buffers.update({renamed[n]: other.region.buffers.pop(n) for n in "abo"})
    nest = Nest((x,), (), (Store("other_o", symbol(x), value),))
    second = type(other.region)("r2", nest, other.region.buffers, other.region.device)
    first = print_region(one.region, TritonConfig(64), TARGET).kernels[0]
    assert first.text == print_region(second, TritonConfig(64), TARGET).kernels[0].text


def test_bfloat16_atomics_are_refused() -> None:
    x = Sym("x0", size=8)
    nest = Nest((x,), (), (Store("o", 0, Load("a", symbol(x), BF16), "add"),))
    case = nests.make(nest, [nests.buffer("a", BF16, (8,)), nests.buffer("o", BF16, (1,))], "a", "o", lambda a: a)
    with pytest.raises(UnsupportedError, match="atomic addition"):
        print_region(case.region, TritonConfig(8), TARGET)


def elementwise(name: str, dtypes: list[torch.dtype], out: torch.dtype, n: int) -> Case:
    x = Sym("x0", size=n)
    args: tuple[Scalar, ...] = tuple(Load(f"a{k}", symbol(x), d) for k, d in enumerate(dtypes))
    nest = Nest((x,), (), (Store("o", symbol(x), Op(name, args, out)),))
    buffers = [nests.buffer(f"a{k}", d, (n,)) for k, d in enumerate(dtypes)] + [nests.buffer("o", out, (n,))]
    return nests.make(nest, buffers, " ".join(f"a{k}" for k in range(len(dtypes))), "o", lambda *a: a[0])


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.5, -2.5, 3.0, -7.3, 1e-40, 88.0, float("inf"), -float("inf"), float("nan")]
UNARY = {
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": torch.sign,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "round": torch.round,
    "reciprocal": torch.reciprocal,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "signbit": torch.signbit,
}
BINARY = {
    "floordiv": torch.floor_divide,
    "remainder": torch.remainder,
    "fmod": torch.fmod,
    "pow": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "truediv": torch.true_divide,
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "atan2": torch.atan2,
    "copysign": torch.copysign,
    "le": torch.le,
    "ne": torch.ne,
}


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        zero = (actual == 0) & (expected == 0)
        assert torch.equal(actual.signbit()[zero], expected.signbit()[zero])
    rtol = 2**-8 if actual.dtype == BF16 else 2e-6
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", UNARY)
def test_float_unary(interpreter: Interpreter, name: str) -> None:
    x = torch.tensor(SPECIAL)
    out = BOOL if name.startswith(("is", "signbit")) else F32
    case = elementwise(name, [F32], out, len(x))
    same(run(interpreter, case, TritonConfig(16), {"a0": x})[0], UNARY[name](x))


@pytest.mark.parametrize("name", BINARY)
def test_float_binary(interpreter: Interpreter, name: str) -> None:
    values = torch.tensor([s for s in SPECIAL if s != 1e-40])  # eager's vectorised fmod takes denormals for zero
    a, b = (t.reshape(-1).clone() for t in torch.meshgrid(values, values, indexing="ij"))
    case = elementwise(name, [F32, F32], BOOL if name in ("le", "ne") else F32, len(a))
    same(run(interpreter, case, TritonConfig(256), {"a0": a, "a1": b})[0], BINARY[name](a, b))


INTEGER = {
    "floordiv": torch.floor_divide,
    "remainder": torch.remainder,
    "fmod": torch.fmod,
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "maximum": torch.maximum,
    "bitwise_xor": torch.bitwise_xor,
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", INTEGER)
def test_integer_binary(interpreter: Interpreter, name: str, dtype: torch.dtype) -> None:
    low = 0 if dtype == torch.uint8 else -9
    values = torch.arange(low, 10).to(dtype)
    a, b = (t.reshape(-1).clone() for t in torch.meshgrid(values, values[values != 0], indexing="ij"))
    case = elementwise(name, [dtype, dtype], dtype, len(a))
    same(run(interpreter, case, TritonConfig(512), {"a0": a, "a1": b})[0], INTEGER[name](a, b))


def test_integer_power_and_shifts(interpreter: Interpreter) -> None:
    a = torch.tensor([3, -3, 1, -1, 7, 2, 0, -1], dtype=I64)
    b = torch.tensor([5, 3, 100, 101, 70, 62, 0, 8], dtype=I64)
    case = elementwise("pow", [I64, I64], I64, 8)
    same(run(interpreter, case, TritonConfig(8), {"a0": a, "a1": b})[0], a**b)
    shift = torch.tensor([0, 1, 63, 64, 65, -1, 3, 2], dtype=I64)
    expected = {"lshift": [3, -6, 0, 0, 0, 0, 0, -4], "rshift": [3, -2, 0, -1, 0, 0, 0, -1]}
    expected["lshift"][2] = 1 << 63
    for name, values in expected.items():
        want = torch.tensor([v - (1 << 64) if v >= 1 << 63 else v for v in values])
        case = elementwise(name, [I64, I64], I64, 8)
        same(run(interpreter, case, TritonConfig(8), {"a0": a, "a1": shift})[0], want)


@pytest.mark.parametrize("source", [F32, BF16, I64, BOOL, torch.uint8])
@pytest.mark.parametrize("to", [F32, BF16, torch.float64, I64, torch.int8, torch.uint8, BOOL])
def test_casts(interpreter: Interpreter, source: torch.dtype, to: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.0, 2.75, 100.9, 3.0, 0.3]).to(source)
    case = elementwise("cast", [source], to, 6)
    same(run(interpreter, case, TritonConfig(8), {"a0": x})[0], x.to(to))


def test_bitcast_reads_stored_precision(interpreter: Interpreter) -> None:
    x = torch.tensor([1.0, -2.5, 3.1]).to(BF16)
    case = elementwise("bitcast", [BF16], torch.int16, 3)
    assert torch.equal(run(interpreter, case, TritonConfig(4), {"a0": x})[0], x.view(torch.int16))


def test_random_bits_are_those_of_the_eager_form(interpreter: Interpreter) -> None:
    random_ops = pytest.importorskip("fxopt.ir.random_ops")
    x = Sym("x0", size=64)
    seed, counter = Load("s", 0, I64), IndexValue(symbol(x))
    stores = (
        Store("u", symbol(x), Op("rand", (seed, counter), F32)),
        Store("n", symbol(x), Op("randn", (seed, counter), F32)),
        Store("i", symbol(x), Op("randint", (seed, counter, Const(-3, I64), Const(1000, I64)), I64)),
    )
    buffers = [nests.buffer("s", I64, ()), *(nests.buffer(n, d, (64,)) for n, d in (("u", F32), ("n", F32), ("i", I64)))]
    case = nests.make(Nest((x,), (), stores), buffers, "s", "u n i", lambda s: s)
    seed_value = torch.tensor(-(2**40) - 12345)
    u, n, i = run(interpreter, case, TritonConfig(64), {"s": seed_value})
    assert random_ops is not None
    assert torch.equal(u, torch.ops.fxopt.rand(seed_value, [64]))
    assert torch.equal(i, torch.ops.fxopt.randint(seed_value, -3, 1000, [64]))
    torch.testing.assert_close(n, torch.ops.fxopt.randn(seed_value, [64]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("otherwise", [-1, 2**31 - 1, 2**40])
def test_choices_among_indices_are_made_in_as_few_bits_as_they_fit(interpreter: Interpreter, otherwise: int) -> None:
    x = Sym("x0", size=64)
    index = IndexValue(symbol(x))
    loaded, other = Op("gt", (Load("a", symbol(x), F32), Const(0.0, F32)), torch.bool), Const(otherwise, I64)
    chosen = Op("where", (loaded, index, other), I64)
    again = Op("where", (Op("lt", (chosen, Const(9, I64)), torch.bool), Const(7, I64), chosen), I64)
    stores = (Store("o", symbol(x), again), Store("f", symbol(x), Op("cast", (chosen,), F32)))
    buffers = [nests.buffer("a", F32, (64,)), nests.buffer("o", I64, (64,)), nests.buffer("f", F32, (64,))]
    case = nests.make(Nest((x,), (), stores), buffers, "a", "o f", lambda a: a)
    a = torch.randn(64)
    got, as_float = run(interpreter, case, TritonConfig(64), {"a": a})
    want = torch.where(a > 0, torch.arange(64), otherwise)
    assert torch.equal(got, torch.where(want < 9, 7, want)) and torch.equal(as_float, want.float())
    text = print_region(case.region, TritonConfig(64), Target.cuda(90)).kernels[0].text
    assert ("tl.int32" in text) == (otherwise < 2**31)


@pytest.mark.parametrize("row", [36, 37])
def test_random_rows_are_those_of_the_eager_form(interpreter: Interpreter, row: int) -> None:
    """Whether or not rows start at multiples of four, in whose middle a call of Philox is shared; down columns as well."""
    x, r = Sym("x0", size=5), Sym("r1", size=row)
    value = Op("rand", (Load("s", 0, I64), IndexValue(symbol(r) + symbol(x) * row)), F32)
    total = Store("t", symbol(x), Reduce("sum", (value,), (r,), F32))
    buffers = [nests.buffer("s", I64, ()), nests.buffer("t", F32, (5,)), nests.buffer("o", F32, (row, 5))]
    sums = nests.make(Nest((x,), (r,), (total,)), buffers[:2], "s", "t", lambda s: s)
    turned = Nest((x, r), (), (Store("o", symbol(r) * 5 + symbol(x), value),))
    whole = nests.make(turned, [buffers[0], buffers[2]], "s", "o", lambda s: s)
    seed = torch.tensor(2**40 + 7)
    expected = torch.ops.fxopt.rand(seed, [5, row])
    for config in (TritonConfig(2, r_block=8, persistent=False), TritonConfig(4, r_block=64)):
        torch.testing.assert_close(run(interpreter, sums, config, {"s": seed})[0], expected.sum(1))
    for config in (TritonConfig(64), TritonConfig(8, y_block=8)):
        assert torch.equal(run(interpreter, whole, config, {"s": seed})[0], expected.T)


@pytest.mark.parametrize("number", [0, 3])
def test_random_ops_add_their_number_to_the_seed(interpreter: Interpreter, number: int) -> None:
    from tests.codegen.test_triton_names import dropout

    case, seed = dropout(number), torch.tensor(2**35 + 11)
    (got,) = run(interpreter, case, TritonConfig(64), {"s": seed})
    assert torch.equal(got, case.reference(seed)[0])


def test_masked_reduction_keeps_its_guard(interpreter: Interpreter) -> None:
    """Rows past the end of the first input of a cat must not be read, reductions included."""
    p, r = Sym("x0", size=6), Sym("r1", size=20)
    inside = Op("lt", (IndexValue(symbol(p)), Const(2, I64)), BOOL)
    total = Reduce("sum", (Load("a", symbol(p) * 20 + symbol(r), F32),), (r,), F32)
    nest = Nest((p,), (r,), (Store("o", symbol(p), Masked(inside, total, Const(7.0, F32))),))
    buffers = [nests.buffer("a", F32, (2, 20)), nests.buffer("o", F32, (6,))]
    case = nests.make(nest, buffers, "a", "o", lambda a: torch.cat((a.sum(1), torch.full((4,), 7.0, dtype=a.dtype))))
    for config in (TritonConfig(4), LOOPED):
        check(interpreter, case, config)
        assert "&" in print_region(case.region, config, TARGET).kernels[0].text


def test_dividing_by_a_product_of_sizes(interpreter: Interpreter) -> None:
    """`i // (n * m)` is not `i // n * m`, and a divisor that starts with a parenthesis may need another."""
    n, m = symbol(Sym("s0", lo=2)), symbol(Sym("s1", lo=2))
    sizes = {"s0": 3, "s1": 5}
    blocks = floordiv(n + 1, 2) * 2
    x = Sym("x0", size=n * m * 4)
    at = symbol(x)
    for divisor in (n * m, blocks * m, blocks * 2):
        index = IndexValue(floordiv(at, divisor) * 100 + mod(at, divisor))
        nest = Nest((x,), (), (Store("o", at, index),))
        spec = nests.buffer("o", I64, (n * m * 4,))
        value = evaluate(divisor, sizes)

        def reference(value: int = value) -> torch.Tensor:
            place = torch.arange(60)
            return place // value * 100 + place % value

        check(interpreter, nests.make(nest, [spec], "", "o", reference, **sizes), TritonConfig(16))


def test_what_is_read_again_after_much_else_leaves_the_cache_last() -> None:
    """Angles of a rotary embedding for each sequence of a batch, not what each row shares."""
    x = torch.empty(16, 2048, 1024)
    for shape, kept in (((2048, 1024), True), ((1024,), False), ((16, 1, 1), False)):
        low = moved(schedule(lower_function(torch.mul, (x, torch.empty(shape)))), "cuda")
        (region,) = (s for s in low.steps if isinstance(s, Region))
        (kernel,) = print_region(region, TritonConfig(1024), TARGET).kernels
        assert kernel.text.count('eviction_policy="evict_last"') == kept


def test_what_programs_share_does_not_leave_the_cache_first() -> None:
    """A loop's own elements do: nobody reads them again."""
    long = nests.group_scale(300, 64, 1024)
    (kernel,) = print_region(long.region, TritonConfig(1, r_block=2048, persistent=False), TARGET).kernels
    first, second = kernel.text.split("for r_done")
    assert first.count('"evict_last"') == 2 and '"evict_first"' not in first  # row and weights are read once more
    loads = {m[1]: m[2] for m in re.finditer(r'tl\.load\((b\d) .*eviction_policy="(\w+)"', second)}
    assert sorted(loads.values()) == ["evict_first", "evict_last"]
