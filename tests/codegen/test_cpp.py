"""What printed C++ kernels compute: every form of a nest, vectorised over points or rows, tails, symbolic sizes, threads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fxopt.codegen.cpp import print_nest
from fxopt.codegen.cpp_domain import plan_domain
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, Sym, floordiv, mod, symbol
from fxopt.ir.loops import Const, IndexValue, Load, Masked, Nest, Op, Reduce, Scalar, Scan, Store, indirect_symbol, transform
from tests.codegen import triton_nests as nests
from tests.codegen.cpp_harness import HOST, Capability, build, call, check, close, run, sample
from tests.codegen.triton_nests import BF16, BOOL, F32, I64, Case, buffer, cast, make, op

F16, F64, I32, U8 = torch.float16, torch.float64, torch.int32, torch.uint8
TAILS = range(1, 68)


def compiled(case: Case, directory: Path, capability: Capability = HOST):  # type: ignore[no-untyped-def]
    (kernel,) = build([case], directory, capability)
    return kernel


def size_symbol(name: str, lo: int = 0) -> Int:
    return symbol(Sym(name, lo=lo))


def with_sizes(case: Case, **sizes: int) -> Case:
    return dataclasses.replace(case, sizes=sizes)


def transposed_symbolic(n: int, m: int) -> Case:
    return nests.transposed(F32, size_symbol("s0", 2), size_symbol("s1", 2), s0=n, s1=m)  # type: ignore[arg-type]


# ---- whole families, compiled together ----

STATIC: dict[str, Callable[[], Case]] = {
    "pointwise": lambda: nests.pointwise(1000, F32),
    "pointwise bfloat16": lambda: nests.pointwise(37, BF16),
    "pointwise float16": lambda: nests.pointwise(37, F16),
    "pointwise float64": lambda: nests.pointwise(37, F64),
    "broadcast, symbolic": nests.broadcast_symbolic,
    "transposed": lambda: nests.transposed(F32, 130, 45),
    "transposed, bfloat16": lambda: nests.transposed(BF16),
    "transposed, symbolic": lambda: transposed_symbolic(130, 45),
    "channels last": nests.nhwc_add,
    "softmax": lambda: nests.softmax(5, 67, F32),
    "softmax of a long row": lambda: nests.softmax(3, 40000, F32),
    "log-softmax, bfloat16": lambda: nests.softmax(5, 1000, BF16, log=True),
    "layer norm": lambda: nests.layer_norm(7, 384, F32),
    "layer norm, bfloat16": lambda: nests.layer_norm(7, 131, BF16),
    "side by side": lambda: nests.side_by_side(33, 70),
    "variance of columns": lambda: nests.variance(33, 70),
    "cat": nests.cat,
    "gather": nests.gather,
    "address beyond int32": lambda: nests.computed_gather(30_000_000, 77),
    "negative address beyond int32": lambda: nests.computed_gather_backwards(30_000_000, 70_000_001),
    "address of unknown factor": lambda: nests.computed_gather_symbolic(-30_000_000, 100),
    "divisor beyond int32": lambda: nests.divided_by_size(2**32 + 5),
    "number beyond int32": lambda: nests.plus_number(2**40, 100),
    "in place": lambda: nests.in_place(100),
    "cumulative sum": lambda: nests.cumulative("cumsum", 4, 50),
    "cumulative product": lambda: nests.cumulative("cumprod", 4, 50),
    "cumulative maximum": lambda: nests.cumulative("cummax", 20, 50),
    "cumulative minimum": lambda: nests.cumulative("cummin", 1, 50),
    "cumulative sum of exponentials": lambda: nests.cumulative("logcumsumexp", 3, 50),
}
for kind in ("sum", "prod", "max", "min", "argmax", "argmin"):
    for columns in (False, True):
        name = f"{kind} of {'columns' if columns else 'rows'}"
        STATIC[name] = lambda k=kind, c=columns: nests.reduction(k, 6, 200, F32, columns=c)
        STATIC[f"{name}, wide"] = lambda k=kind, c=columns: nests.reduction(k, 100, 37, F32, columns=c)
for kind in ("any", "all"):
    STATIC[f"{kind} of columns"] = lambda k=kind: nests.reduction(k, 66, 37, BOOL, columns=True)
    STATIC[f"{kind} of rows"] = lambda k=kind: nests.reduction(k, 6, 200, BOOL)
STATIC["sum of integers"] = lambda: nests.reduction("sum", 6, 200, I64)
STATIC["sum of bfloat16"] = lambda: nests.reduction("sum", 6, 200, BF16)
STATIC["sum shared by threads"] = lambda: nests.reduction("sum", 2, 100_003, F32)
STATIC["column sums shared by threads"] = lambda: nests.reduction("sum", 20, 30_001, F32, columns=True)
STATIC["argmax shared by threads"] = lambda: nests.reduction("argmax", 2, 100_003, F32)


@pytest.mark.parametrize("capability", ["host", "AVX2", "DEFAULT"])
def test_families(capability: str, tmp_path: Path) -> None:
    if capability == "AVX2" and HOST.cpu_capability not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    target = HOST if capability == "host" else Capability(capability)
    chosen = list(STATIC.items())[:: 1 if capability == "host" else 3]
    cases = {name: make_case() for name, make_case in chosen}
    for (name, case), kernel in zip(cases.items(), build(list(cases.values()), tmp_path, target), strict=True):
        try:
            check(case, kernel, slack=64.0 if "threads" in name else 8.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}\n{kernel[0].text}") from error


# ---- sizes ----


def test_tails_of_every_length(tmp_path: Path) -> None:
    """One kernel for all sizes: no element beyond the row is read or written, none before its end is missed."""
    n, m = size_symbol("s0"), size_symbol("s1", 1)
    cases = [nests.softmax(n, m, F32), nests.layer_norm(n, m, BF16), nests.pointwise(m, F32)]  # type: ignore[arg-type]
    kernels = build(cases, tmp_path)
    for length in TAILS:
        for case, kernel in zip(cases, kernels, strict=True):
            check(with_sizes(case, s0=3, s1=length), kernel, slack=8.0)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, I64, U8], ids=str)
def test_pairs_of_every_length(dtype: torch.dtype, tmp_path: Path) -> None:
    """Elements 2i and 2i + 1 side by side, as real and imaginary parts are; the stores in either order."""
    n = size_symbol("s0")
    x = Sym("x0", size=n)
    even, odd = 2 * symbol(x), 2 * symbol(x) + 1
    a, b = Load("a", even, dtype), Load("a", odd, dtype)
    stores = (Store("o", odd, op("add", a, b)), Store("o", even, op("sub", b, a)))
    buffers = [buffer(name, dtype, (n, 2)) for name in "ao"]
    case = make(Nest((x,), (), stores), buffers, "a", "o", lambda a: torch.stack([a[:, 1] - a[:, 0], a[:, 0] + a[:, 1]], 1))
    kernel = compiled(case, tmp_path)
    assert "store_pairs" in kernel[0].text
    for length in TAILS:
        check(with_sizes(case, s0=length), kernel)


def test_columns_of_every_width(tmp_path: Path) -> None:
    n = size_symbol("s0", 1)
    case = nests.reduction("sum", n, 5, F32, columns=True)  # type: ignore[arg-type]
    kernel = compiled(case, tmp_path)
    for width in (*TAILS, 130):
        check(with_sizes(case, s0=width), kernel)


def test_empty_domains(tmp_path: Path) -> None:
    n, m = size_symbol("s0"), size_symbol("s1")
    total = nests.reduction("sum", n, m, F32)  # type: ignore[arg-type]
    kernel = compiled(total, tmp_path)
    assert run(with_sizes(total, s0=0, s1=7), kernel, {})[0].numel() == 0
    assert run(with_sizes(total, s0=3, s1=0), kernel, {})[0].tolist() == [0.0, 0.0, 0.0]
    static = nests.reduction("sum", 1, 0, F32)
    assert run(static, compiled(static, tmp_path), {})[0].tolist() == [0.0]


def test_one_point_without_loops(tmp_path: Path) -> None:
    nest = Nest((), (), (Store("o", 0, op("mul", Load("a", 0, F32), Const(3.0, F32))),))
    case = make(nest, [buffer("a", F32, (1,)), buffer("o", F32, (1,))], "a", "o", lambda a: a * 3)
    check(case, compiled(case, tmp_path))


# ---- numerics ----


def test_long_sums_are_as_exact_as_eager(tmp_path: Path) -> None:
    case = nests.reduction("sum", 1, 1 << 20, F32)
    kernel = compiled(case, tmp_path)
    values = torch.rand(1, 1 << 20, generator=torch.Generator().manual_seed(0))
    (got,) = run(case, kernel, {"a": values})
    exact = values.double().sum()
    assert abs(got.double() - exact) <= abs(values.sum().double() - exact) + torch.finfo(F32).eps * exact


def test_variance_far_from_zero(tmp_path: Path) -> None:
    case = nests.layer_norm(4, 1000, F32)
    given = {"a": torch.randn(4, 1000) + 1000.0, "b": torch.zeros(4, 1000)}
    inputs = {n: given.get(n, sample(case, n)) for n in case.inputs}
    _, _, scale = run(case, compiled(case, tmp_path), inputs)
    exact = case.reference(*(t.double() for t in inputs.values()))[2]
    torch.testing.assert_close(scale.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("columns", [False, True])
def test_nan_and_infinity_in_reductions(columns: bool, tmp_path: Path) -> None:
    kinds = ("sum", "prod", "max", "min", "argmax", "argmin")
    cases = [nests.reduction(k, 37, 70, F32, columns=columns) for k in kinds]
    values = torch.randn(70, 37)
    values[3, 1], values[69, 2], values[5:8, 3], values[9, 4] = math.nan, math.nan, math.inf, -math.inf
    values[7, 5], values[9, 5] = math.nan, math.nan
    values[4:9, 6] = 50.0
    inputs = {"a": values if columns else values.t().contiguous()}
    for case, kernel in zip(cases, build(cases, tmp_path), strict=True):
        (got,), (expected,) = run(case, kernel, inputs), case.reference(inputs["a"].double())
        close(got, expected, slack=1e3)


def test_softmax_of_a_row_of_minus_infinity(tmp_path: Path) -> None:
    case = nests.softmax(3, 40, F32)
    rows = torch.randn(3, 40)
    rows[1], rows[2, :39] = -math.inf, -math.inf
    check(case, compiled(case, tmp_path), a=rows)


# ---- memory: masks, indices, collisions ----


def padded(n: int, before: int, after: int, inner: int) -> Case:
    """Zeros around rows and columns: a mask that lanes share and one they do not."""
    x, y = Sym("x0", size=n + before + after), Sym("x1", size=inner + before + after)
    i, j = symbol(x) - before, symbol(y) - before

    def inside(index: Int, size: int) -> Scalar:
        low = Op("ge", (IndexValue(index), Const(0, I64)), BOOL)
        return Op("bitwise_and", (low, Op("lt", (IndexValue(index), Const(size, I64)), BOOL)), BOOL)

    body = Masked(inside(j, inner), Load("a", i * inner + j, F32), Const(0.0, F32))
    value = Masked(inside(i, n), body, Const(0.0, F32))
    width = inner + before + after
    nest = Nest((x, y), (), (Store("o", symbol(x) * width + symbol(y), value),))
    buffers = [buffer("a", F32, (n, inner)), buffer("o", F32, (n + before + after, width))]
    return make(nest, buffers, "a", "o", lambda a: torch.nn.functional.pad(a, (before, after, before, after)))


def test_masked_loads(tmp_path: Path) -> None:
    cases = [padded(5, 3, 4, 40), padded(2, 1, 0, 3), padded(1, 20, 20, 17)]
    for case, kernel in zip(cases, build(cases, tmp_path), strict=True):
        check(case, kernel)


def test_masks_of_values_and_bool_results(tmp_path: Path) -> None:
    x = Sym("x0", size=67)
    a, f = Load("a", symbol(x), F32), Load("f", symbol(x), BOOL)
    positive = Op("gt", (a, Const(0.0, F32)), BOOL)
    stores = (
        Store("o", symbol(x), Masked(positive, Load("b", symbol(x), F64), Const(-1.0, F64))),
        Store("p", symbol(x), Masked(positive, f, Const(True, BOOL))),
    )
    shape = (67,)
    buffers = [buffer("a", F32, shape), buffer("b", F64, shape), buffer("f", BOOL, shape)]
    buffers += [buffer("o", F64, shape), buffer("p", BOOL, shape)]
    reference = lambda a, b, f: (torch.where(a > 0, b, -1.0), torch.where(a > 0, f, True))  # noqa: E731
    case = make(Nest((x,), (), stores), buffers, "a b f", "o p", reference)
    check(case, compiled(case, tmp_path))


def test_conditions_that_all_lanes_share(tmp_path: Path) -> None:
    """One condition per row selects between vectors, of numbers and of bools."""
    x, y = Sym("x0", size=5), Sym("x1", size=40)
    at = symbol(x) * 40 + symbol(y)
    row, a, b = Load("f", symbol(x), BOOL), Load("a", at, F32), Load("b", symbol(y), F32)
    chosen = Op("where", (row, a, b), F32)
    flags = Op("where", (row, Op("gt", (a, b), BOOL), Op("isnan", (a,), BOOL)), BOOL)
    either = Op("bitwise_or", (Op("lt", (a, b), BOOL), row), BOOL)
    nest = Nest((x, y), (), (Store("o", at, chosen), Store("p", at, flags), Store("q", at, either)))
    buffers = [buffer("f", BOOL, (5,)), buffer("a", F32, (5, 40)), buffer("b", F32, (40,)), buffer("o", F32, (5, 40))]
    buffers += [buffer("p", BOOL, (5, 40)), buffer("q", BOOL, (5, 40))]

    def reference(f: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        row = f[:, None]
        return torch.where(row, a, b), torch.where(row, a > b, a.isnan()), (a < b) | row

    case = make(nest, buffers, "f a b", "o p q", reference)
    check(case, compiled(case, tmp_path), f=torch.tensor([True, False, True, True, False]))


def lane_gather(n: int, table: int) -> Case:
    """Every lane has its own checked index."""
    x = Sym("x0", size=n)
    t, bound = indirect_symbol(Op("checked_index", (Load("i", symbol(x), I64), Const(table, I64)), I64), table)
    nest = Nest((x,), (), (Store("o", symbol(x), Load("t", symbol(t), F32, (bound,))),))
    buffers = [buffer("i", I64, (n,)), buffer("t", F32, (table,)), buffer("o", F32, (n,))]
    return make(nest, buffers, "i t", "o", lambda i, t: t[i])


@pytest.mark.parametrize("position", [0, 66])
@pytest.mark.parametrize("bad", [9, -10, 2**62])
def test_an_index_out_of_bounds_is_reported(position: int, bad: int, tmp_path: Path) -> None:
    case = lane_gather(67, 9)
    source, path = compiled(case, tmp_path)
    index = torch.randint(-9, 9, (67,))
    check(case, (source, path), i=index)
    index[position] = bad
    memory = {"i": index, "t": torch.zeros(9), "o": torch.zeros(67)}
    assert call(source, path, memory, {}) == 1
    assert source.errors == ("index out of bounds for dimension of size 9",)


def test_a_masked_index_is_not_checked(tmp_path: Path) -> None:
    """Where the mask is false an index may be anything, and an integer divisor zero."""
    x = Sym("x0", size=40)
    raw = Load("i", symbol(x), I64)
    t, bound = indirect_symbol(Op("checked_index", (raw, Const(5, I64)), I64), 5)
    small = Op("lt", (raw, Const(5, I64)), BOOL)
    value = Masked(small, Load("t", symbol(t), F32, (bound,)), Const(7.0, F32))
    case = make(
        Nest((x,), (), (Store("o", symbol(x), value),)),
        [buffer("i", I64, (40,)), buffer("t", F32, (5,)), buffer("o", F32, (40,))],
        "i t",
        "o",
        lambda i, t: torch.where(i < 5, t[i.clamp(max=4)], 7.0),
    )
    check(case, compiled(case, tmp_path), i=torch.arange(40) % 9)


def test_integer_division_by_zero_is_reported(tmp_path: Path) -> None:
    x = Sym("x0", size=20)
    value = Op("floordiv", (Load("a", symbol(x), I32), Load("b", symbol(x), I32)), I32)
    buffers = [buffer(b, I32, (20,)) for b in "abo"]
    case = make(Nest((x,), (), (Store("o", symbol(x), value),)), buffers, "a b", "o", lambda a, b: a // b)
    source, path = compiled(case, tmp_path)
    memory = {"a": torch.ones(20, dtype=I32), "b": torch.ones(20, dtype=I32), "o": torch.zeros(20, dtype=I32)}
    assert call(source, path, memory, {}) == 0
    memory["b"][19] = 0
    assert call(source, path, memory, {}) == 1
    assert source.errors == ("ZeroDivisionError",)


def flat_scatter_add(n: int, size: int) -> Case:
    x = Sym("x0", size=n)
    t, bound = indirect_symbol(Op("checked_index", (Load("i", symbol(x), I64), Const(size, I64)), I64), size)
    nest = Nest((x,), (), (Store("o", symbol(t), Load("a", symbol(x), F32), "add", (bound,)),))
    buffers = [buffer("i", I64, (n,)), buffer("a", F32, (n,)), buffer("o", F32, (size,))]
    return make(nest, buffers, "i a o", "o", lambda i, a, o: o.index_add(0, i % size, a))


def test_scatter_add(tmp_path: Path) -> None:
    cases = [nests.scatter_add(), flat_scatter_add(20000, 5)]
    for case, kernel in zip(cases, build(cases, tmp_path), strict=True):
        check(case, kernel, slack=64.0)


def test_additions_that_may_meet_stay_on_one_thread() -> None:
    assert not plan_domain(flat_scatter_add(100, 5).region.nest, "AVX512").parallel
    rows = plan_domain(nests.scatter_add().region.nest, "AVX512")
    assert not rows.outer or all(o.sym.name != "x0" for o in rows.outer)
    wide = embedding_gradient(300, 7, 256)
    assert plan_domain(wide.region.nest, "AVX512").parallel


def embedding_gradient(n: int, table: int, width: int) -> Case:
    x, y = Sym("x0", size=n), Sym("x1", size=width)
    t, bound = indirect_symbol(Op("checked_index", (Load("i", symbol(x), I64), Const(table, I64)), I64), table)
    value = Load("a", symbol(x) * width + symbol(y), F32)
    nest = Nest((x, y), (), (Store("o", symbol(t) * width + symbol(y), value, "add", (bound,)),))
    buffers = [buffer("i", I64, (n,)), buffer("a", F32, (n, width)), buffer("o", F32, (table, width))]
    return make(nest, buffers, "i a o", "o", lambda i, a, o: o.index_add(0, i % table, a))


def test_embedding_gradient_in_parallel_over_columns(tmp_path: Path) -> None:
    case = embedding_gradient(2000, 7, 130)
    check(case, compiled(case, tmp_path), slack=64.0)


# ---- loops ----


def test_indices_that_are_not_linear(tmp_path: Path) -> None:
    """A row-major walk over a (3, 5) tensor repeated, through // and %, also of the vectorised index."""
    x = Sym("x0", size=60)
    i = symbol(x)
    value = op("add", Load("a", mod(i, 15), F32), Load("b", floordiv(i, 7), F32))
    buffers = [buffer("a", F32, (15,)), buffer("b", F32, (9,)), buffer("o", F32, (60,))]
    reference = lambda a, b: a.repeat(4) + b.repeat_interleave(7)[:60]  # noqa: E731
    case = make(Nest((x,), (), (Store("o", i, value),)), buffers, "a b", "o", reference)
    check(case, compiled(case, tmp_path))


def test_flip_and_index_values(tmp_path: Path) -> None:
    x = Sym("x0", size=67)
    i = symbol(x)
    value = op("add", Load("a", 66 - i, F32), cast(IndexValue(3 * i - 5), F32))
    stores = (Store("o", i, value), Store("p", i, op("mul", IndexValue(i), Const(3, I64))))
    buffers = [buffer("a", F32, (67,)), buffer("o", F32, (67,)), buffer("p", I64, (67,))]
    steps = torch.arange(67)
    case = make(Nest((x,), (), stores), buffers, "a", "o p", lambda a: (a.flip(0) + (3 * steps - 5), steps * 3))
    check(case, compiled(case, tmp_path))


def test_stores_of_both_levels_and_several_reduced_loops(tmp_path: Path) -> None:
    """x + b stored, its mean over two loops that cannot be merged, and the centred values."""
    p, r, s = Sym("x0", size=3), Sym("r1", size=5), Sym("r2", size=40)
    at = symbol(p) * 400 + symbol(r) * 80 + symbol(s)
    out = symbol(p) * 200 + symbol(r) * 40 + symbol(s)
    x = op("add", Load("a", at, F32), Load("b", symbol(s), F32))
    mean = op("truediv", Reduce("sum", (x,), (r, s), F32), Const(200.0, F32))
    stores = (Store("x", out, x), Store("m", symbol(p), mean), Store("c", out, op("sub", x, mean)))
    buffers = [buffer("a", F32, (3, 5, 40), (400, 80, 1)), buffer("b", F32, (40,))]
    buffers += [buffer("x", F32, (3, 5, 40)), buffer("m", F32, (3,)), buffer("c", F32, (3, 5, 40))]

    def reference(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = a + b
        mean = x.mean((1, 2))
        return x, mean, x - mean[:, None, None]

    case = make(Nest((p,), (r, s), stores), buffers, "a b", "x m c", reference)
    check(case, compiled(case, tmp_path))


def test_normalisation_in_place(tmp_path: Path) -> None:
    """The row is overwritten by the last pass only, after all passes have read it."""
    p, r, at = nests.rows(4, 50)
    x = Load("a", at, F32)
    total = Reduce("sum", (op("exp", op("sub", x, Reduce("max", (x,), (r,), F32))),), (r,), F32)
    value = op("truediv", op("exp", op("sub", x, Reduce("max", (x,), (r,), F32))), total)
    stores = (Store("a", at, value), Store("t", symbol(p), total))
    reference = lambda a: (a.softmax(1), (a - a.amax(1, keepdim=True)).exp().sum(1))  # noqa: E731
    case = make(Nest((p,), (r,), stores), [buffer("a", F32, (4, 50)), buffer("t", F32, (4,))], "a", "a t", reference)
    check(case, compiled(case, tmp_path))


def test_scan_after_a_reduction_and_along_columns(tmp_path: Path) -> None:
    """cumsum(x - max(x)) where the scanned axis is the outer one."""
    p, r = Sym("x0", size=37), Sym("r1", size=20)
    at = symbol(r) * 37 + symbol(p)
    x = Load("a", at, F32)
    scan = Scan("cumsum", op("sub", x, Reduce("max", (x,), (r,), F32)), r, F32)
    buffers = [buffer("a", F32, (20, 37)), buffer("o", F32, (20, 37))]
    reference = lambda a: 2 * (a - a.amax(0)).cumsum(0)  # noqa: E731
    case = make(Nest((p,), (r,), (Store("o", at, op("mul", scan, Const(2.0, F32))),)), buffers, "a", "o", reference)
    check(case, compiled(case, tmp_path))


def test_integer_and_byte_tensors(tmp_path: Path) -> None:
    x = Sym("x0", size=131)
    a, b = Load("a", symbol(x), U8), Load("b", symbol(x), U8)
    wide = Op("add", (cast(a, I32), cast(b, I32)), I32)
    stores = (Store("o", symbol(x), op("add", a, b)), Store("w", symbol(x), wide))
    buffers = [buffer(n, U8, (131,)) for n in "abo"] + [buffer("w", I32, (131,))]
    case = make(Nest((x,), (), stores), buffers, "a b", "o w", lambda a, b: (a + b, a.int() + b.int()))
    check(case, compiled(case, tmp_path), a=torch.arange(131, dtype=U8), b=torch.full((131,), 200, dtype=U8))


def test_equal_regions_have_equal_text() -> None:
    """Buffer and symbol names of the region do not show in the kernel."""
    first = nests.layer_norm(7, 384, F32)
    renamed = {b: f"buf_{b}" for b in first.region.buffers}

    def rename(node: Load) -> Scalar:
        return Load(renamed[node.buffer], node.index, node.dtype, node.indirect)

    old = first.region.nest
    stores = tuple(Store(renamed[s.buffer], s.index, transform(s.value, {}, rename), s.mode) for s in old.stores)
    nest = dataclasses.replace(old, stores=stores)
    buffers = {renamed[n]: dataclasses.replace(b, name=renamed[n]) for n, b in first.region.buffers.items()}
    second = dataclasses.replace(first.region, nest=nest, buffers=buffers)
    one, two = print_nest(first.region, HOST), print_nest(second, HOST)
    assert one.text == two.text and one.entry == two.entry
    assert tuple(renamed[b] for b in one.buffers) == two.buffers


def test_dtypes_without_a_c_type_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="complex64"):
        print_nest(nests.pointwise(4, torch.complex64).region, HOST)
