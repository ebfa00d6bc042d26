"""A contraction as a Triton kernel: a template of `codegen/templates` with the printed epilogue as its argument.

The entry kernel has the flat parameters of every kernel and passes sizes and strides as literals: b0 and b1 are the
operands, the others what the epilogue loads and stores. An operand that the epilogue reads as well is a parameter twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from types import MappingProxyType
from typing import Any

import torch

from fxopt.codegen import triton_ops as ops
from fxopt.codegen.direct_stores import most_registers
from fxopt.codegen.templates import gemm_entry, gemm_problem
from fxopt.codegen.templates.gemm_config import FEW_ROWS
from fxopt.codegen.templates.gemm_problem import GemmConfig, GemmProblem
from fxopt.codegen.triton import Printed, configs, print_nest, refuse_unknown_types
from fxopt.codegen.triton_block import BlockFunction, loads_for_tiles, print_block
from fxopt.codegen.triton_memory import VECTOR_BYTES
from fxopt.codegen.triton_names import operations
from fxopt.codegen.triton_nest import PREAMBLE
from fxopt.codegen.triton_values import gelu_argument, rounded_to_8_bits
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import (
    Int,
    Sym,
    add,
    assumed,
    coefficient,
    contiguous_strides,
    evaluate,
    floordiv,
    free_symbols,
    mul,
    prod,
    symbol,
)
from fxopt.ir.kernel import KernelSource
from fxopt.ir.loops import FLOAT_UNARY, SUMMED_COLUMNS, Load, Op, Reduce, Scalar, postorder
from fxopt.ir.region import BufferSpec, Contraction, Matrix, Patches, Region, SideBySide
from fxopt.target import Target

_EPILOGUE, _EDGE, _VECTORS = "epilogue", "edge", "vectors"
_ROWS = "rows"
_OPS = {"erf": 1.0, "erfc": 1.0, "tanh": 0.6, "exp": 0.2, "exp2": 0.2, "log": 0.3, "sigmoid": 0.4, "truediv": 0.2}
_CHEAP_OP, _FUNCTION, _RANDOM = 0.02, 1.5, 4.0
"""What one op, any other function of a floating argument and a random number cost, in error functions."""

_COARSE = 0.3
"""The same of a GELU that is rounded to 8 bits."""

_MANY_OPS = 0.5
"""Error functions an element beside which four warps hold no vectors (`benchmarks/results/gemm_biases_h200.json`)."""

_RANDOM_AT_ONCE = 16
"""Elements of one thread: 32 spill beside an accumulator of 128 registers, on sm_80 as on sm_90 and sm_100."""


def problem_of(contraction: Contraction, rows: int | None = None) -> GemmProblem:
    """The product and what its epilogue moves, for the cost model and the templates.

    All sizes but the number of rows have to be numbers; where that one is known only at run time, it is taken to be `rows`
    (what is measured, if None).
    """
    batch, m, k, n = contraction.sizes
    if not all(isinstance(x, int) for x in (batch, k, n)):
        raise UnsupportedError("a product of unknown size")
    if isinstance(contraction.a, Patches):
        raise UnsupportedError("a product of patches, which are no matrix in memory")
    specs = contraction.region.buffers.values()
    sizes = {sym.name: assumed(symbol(sym)) for spec in specs for x in spec.shape for sym in free_symbols(x)}
    typical = evaluate(m, sizes | {sym.name: assumed(symbol(sym)) for sym in free_symbols(m)})
    static = isinstance(m, int)
    m = typical if static or rows is None else rows
    read, written = (nbytes * m // typical for nbytes in moved_by_epilogue(contraction, sizes))
    a, total = _operand(contraction.a, m, k), 0
    if contraction.ends:
        (groups,), total = contraction.buffers[contraction.ends].shape, m
        assert isinstance(groups, int)
        batch, m = groups, ceil(m / groups)
    return GemmProblem(
        batch,  # type: ignore[arg-type]  # they are numbers
        m,
        n,  # type: ignore[arg-type]
        k,  # type: ignore[arg-type]
        contraction.buffers[contraction.a.buffer].dtype,
        a,
        _operand(contraction.b, k, n),
        read=read,
        written=written,
        static=static,
        precision="tf32" if contraction.tf32 else "ieee",
        c=None if contraction.c is None else _operand(contraction.c, k, n),
        rows=total,
        epilogue_ops=epilogue_ops(contraction),
        **_rows_stored(contraction),
    )


def _rows_stored(contraction: Contraction) -> dict[str, int]:
    """`GemmProblem.pitch` and `run` of one product whose epilogue stores elements where it finds them, row by row."""
    stores, (batch, row, column) = contraction.region.nest.stores, contraction.axes
    places = {s.index for s in stores if s.mode == "set" and not s.indirect}
    itemsizes = [contraction.region.buffers[s.buffer].dtype.itemsize for s in stores]
    if batch is not None or contraction.ends or len(places) != 1 or any(s.mode != "set" or s.indirect for s in stores):
        return {}
    (place,) = places
    pitch = coefficient(place, row)
    if not isinstance(pitch, int) or pitch <= 0 or place != add(mul(symbol(row), pitch), symbol(column)):
        return {}
    return {"pitch": pitch, "run": VECTOR_BYTES // min(itemsizes)}


def moved_by_epilogue(contraction: Contraction, sizes: Mapping[str, int] = MappingProxyType({})) -> tuple[int, int]:
    """Bytes that the epilogue reads and writes, for these values of the size symbols."""
    specs = {name: spec for name, spec in contraction.region.buffers.items() if name not in contraction.registers}
    reads, writes = contraction.region.reads(), contraction.writes()
    nbytes = {name: _bytes(spec, sizes) for name, spec in specs.items()}
    return sum(n for name, n in nbytes.items() if name in reads), sum(n for name, n in nbytes.items() if name in writes)


def epilogue_ops(contraction: Contraction) -> float:
    """What the epilogue computes for an element of a product, in error functions."""
    nest = contraction.region.nest
    coarse = any(gelu_argument(n) is not None for n in rounded_to_8_bits(nest))
    ops_of = [n for n in postorder(nest.roots) if isinstance(n, Op)]
    total = sum(_COARSE if coarse and n.name == "erf" else _cost(n) for n in ops_of)
    return total / max(1, len(contraction.pooled))


def _cost(op: Op) -> float:
    """What `op` costs in error functions (`GemmProblem.epilogue_ops`)."""
    if op.name in ops.RANDOM:
        return _RANDOM
    return _OPS.get(op.name, _FUNCTION if op.name in FLOAT_UNARY else _CHEAP_OP)


def _operand(matrix: Matrix, rows: Int, columns: Int) -> gemm_problem.Matrix:
    given = (rows, columns, matrix.row, matrix.column, matrix.batch, matrix.offset)
    if not all(isinstance(x, int) for x in given):
        raise UnsupportedError("a matrix of unknown layout")
    return gemm_problem.Matrix(*given)  # type: ignore[arg-type]


def _bytes(spec: BufferSpec, sizes: Mapping[str, int]) -> int:
    distinct = prod(size for size, stride in zip(spec.shape, spec.strides, strict=True) if stride != 0)
    return evaluate(distinct, sizes) * spec.dtype.itemsize


def print_contraction(contraction: Contraction, config: GemmConfig, target: Target, unrolled: bool = False) -> Printed:
    """`contraction` in configuration `config`: one kernel, or with `config.split` above 1 two and a buffer between them, the
    second one `unrolled` or not.

    Raises UnsupportedError where Triton has no form for the epilogue or `target`, or sizes other than the number of rows are
    symbolic. A product of any number of rows takes no descriptors, which have sizes, and is not split.
    """
    if not target.compiles_triton:
        raise UnsupportedError(f"Triton does not generate code for {target.name}")
    refuse_unknown_types(contraction.buffers, target)
    problem = problem_of(contraction)
    if not problem.static and (config.tma or config.split > 1):
        raise UnsupportedError("a product of unknown size through descriptors, or in parts")
    if not takes_sums(contraction, config):
        raise UnsupportedError("sums of columns that no tile has")
    if config.split == 1:
        return Printed((_print_whole(contraction, problem, config, target),))
    partial, join = print_join(contraction, gemm_entry.partial_shape(problem, config), target, "gemm_parts", unrolled)
    return Printed((_print_parts(contraction, partial, problem, config), join), (partial,))


def takes_sums(contraction: Contraction, config: GemmConfig) -> bool:
    """Whether a kernel in `config` has all columns at once of those that the epilogue adds up, if it does."""
    if all(s.mode != "sums" for s in contraction.region.nest.stores):
        return True
    whole = config.split == 1 and config.classes == 1 and config.tail == 1
    return whole and config.block_n // config.subtile % SUMMED_COLUMNS == 0


def with_room(contraction: Contraction, config: GemmConfig, target: Target) -> GemmConfig:
    """`config` with the epilogue in so many parts that it does not spill: random numbers need many registers an element."""
    nodes = postorder(contraction.region.nest.roots)
    if config.split > 1 or not any(isinstance(n, Op) and n.name in ops.RANDOM for n in nodes):
        return config
    each = len(contraction.products) * config.block_m * config.block_n // (config.warps * target.warp_size)
    return replace(config, subtile=max(config.subtile, each // _RANDOM_AT_ONCE))


def with_vectors(contraction: Contraction, config: GemmConfig) -> GemmConfig:
    """`config` with what the epilogue loads along one dimension loaded once for a tile, if there is such an operand, the
    template can and it pays: not for few rows, nor beside functions of each element that four warps have no registers for,
    nor after one block of products beside another matrix: a second program hides more of what that is waited for
    (`quantized_convolutions_h200.json`: 102 us for 79, 55 for 41).
    """
    rows = contraction.sizes[1]
    if config.split > 1 or contraction.c is not None or contraction.ends or not isinstance(rows, int):
        return config
    if rows <= FEW_ROWS or (config.warps < 8 and epilogue_ops(contraction) >= _MANY_OPS):
        return config
    problem = problem_of(contraction)
    if problem.k <= config.block_k and problem.read >= problem.batch * problem.m * problem.n:
        return config
    found = loads_for_tiles(contraction.region, contraction.axes, contraction.products)
    return replace(config, vectors=True) if found else config


def _print_whole(contraction: Contraction, problem: GemmProblem, config: GemmConfig, target: Target) -> KernelSource:
    if config.classes > 1:
        epilogue = _print_aligned_epilogues(contraction, problem, config)
    else:
        wider = config.tail > 1 or config.loaded > config.block_n  # than a tile, and so than what is left for the last one
        beyond = wider or problem.n % config.block_n != 0
        epilogue = print_epilogue(
            contraction,
            config.block_m,
            config.block_n,
            reserved=len(_operands(contraction)) + config.has_narrow_tiles,
            vectors=(_VECTORS, beyond) if config.vectors else None,
        )
    entry = "_".join(["fx_gemm", *operations(contraction.region.nest)])
    sizes = (str(problem.batch), _rows(contraction), str(problem.n), str(problem.k))
    ends = f"b{len(contraction.products) + 1}"
    names = {"epilogue": _EPILOGUE, "edge": _EDGE, "vectors": _VECTORS}
    call = gemm_entry.gemm_call(problem, config, ends=ends, extra=epilogue.extra, sizes=sizes, **names)
    call = replace(call, grid=_grid(contraction, config, call))
    module = gemm_entry.GROUPED_MODULE if contraction.ends else gemm_entry.MODULE
    if config.classes > 1:
        module = gemm_entry.ALIGNED_MODULE
    elif config.tail > 1:
        module = gemm_entry.TAILED_MODULE
    registers = most_registers(problem, config, target)
    source = source_of(contraction, entry, call, epilogue, config.warps, config.stages, module, registers)
    if config.has_narrow_tiles:  # b has a second descriptor
        return replace(source, buffers=(*_operands(contraction), contraction.b.buffer, *epilogue.buffers))
    return source


def _rows(contraction: Contraction) -> str:
    """The number of rows in a kernel's text: a literal or a parameter."""
    rows = contraction.sizes[1]
    return str(rows) if isinstance(rows, int) else _ROWS


def _print_parts(contraction: Contraction, partial: BufferSpec, problem: GemmProblem, config: GemmConfig) -> KernelSource:
    call = gemm_entry.gemm_call(problem, config, extra="b2")
    sums = BlockFunction("", {"b2": "*fp32"}, (partial.name,), ())
    return source_of(contraction, "fx_gemm_split", call, sums, config.warps, config.stages)


def source_of(
    contraction: Contraction,
    entry: str,
    call: gemm_entry.GemmCall,
    epilogue: BlockFunction,
    warps: int,
    stages: int,
    module: str = gemm_entry.MODULE,
    registers: int = 0,
) -> KernelSource:
    """The kernel `entry` that makes `call`, of a template of `module` (an import), with `epilogue`. Where `registers` is not
    0, a thread has no more.
    """
    parameters = call.signature | epilogue.parameters
    kernel = f"@triton.jit\ndef {entry}({', '.join(parameters)}):\n    {call.text}"
    preamble = f"{PREAMBLE}\n{module}"
    return KernelSource(
        language="triton",
        entry=entry,
        text="\n\n\n".join(part for part in (preamble, epilogue.text, kernel) if part) + "\n",
        buffers=(*_operands(contraction), *epilogue.buffers),
        sizes=epilogue.sizes,
        grid=(call.grid, 1, 1),
        compile_options=_options(parameters, call.tensor_maps, warps, stages, registers),
    )


def _options(
    parameters: dict[str, str], maps: dict[str, dict[str, Any]], warps: int, stages: int, registers: int = 0
) -> dict[str, Any]:
    """`KernelSource.compile_options` of an entry with `parameters`, of which `maps` describes the tensor descriptors."""
    options: dict[str, Any] = {
        "signature": parameters,
        "constexprs": {},
        "aligned": [p for p, kind in parameters.items() if kind.startswith(("*", "tensordesc"))],
        "num_warps": warps,
        "num_stages": stages,
        "asserts": False,
    }
    return options | ({"tensor_maps": maps} if maps else {}) | ({"registers": registers} if registers else {})


def _grid(contraction: Contraction, config: GemmConfig, call: gemm_entry.GemmCall) -> Int:
    batch, m, _, n = contraction.sizes
    if isinstance(m, int):
        return call.grid
    tiles = [floordiv(add(size, block - 1), block) for size, block in ((m, config.block_m), (n, config.block_n))]
    return prod((batch, *tiles))


def _operands(contraction: Contraction) -> tuple[str, ...]:
    """The buffers of the operands' parameters: b0 unless it is a computed row, b1, of two products b2, and then the ends of
    groups or scales."""
    more = [contraction.ends] if contraction.ends else []
    more += [kind.scale.buffer for kind in contraction.quantized if kind.scale is not None]
    left = [contraction.a.buffer] if contraction.row is None else []
    return (*left, *(m.buffer for m in contraction.products.values()), *more)


def problem_of_all(step: SideBySide) -> GemmProblem:
    """All parts of `step` as one problem for the cost model: a batch of products that share their left operand."""
    one = problem_of(step.parts[0])
    matrix = one.b.pitch * (one.b.rows if one.b.columns_last else one.b.columns)
    read, written = (len(step.parts) * nbytes for nbytes in (one.read, one.written))
    return replace(one, batch=len(step.parts), b=replace(one.b, batch=matrix), read=read, written=written)


def print_side_by_side(step: SideBySide, config: GemmConfig, target: Target) -> Printed:
    """`step` in configuration `config`, which is neither split nor persistent: the grid's second axis counts the parts.

    Raises UnsupportedError as `print_contraction`, and where a size is symbolic.
    """
    if not target.compiles_triton:
        raise UnsupportedError(f"Triton does not generate code for {target.name}")
    refuse_unknown_types(step.buffers, target)
    first, problem = step.parts[0], problem_of(step.parts[0])
    count, operands = len(step.parts), [first.a.buffer, *(part.b.buffer for part in step.parts)]
    parameters: dict[str, str] = {}
    maps: dict[str, dict[str, Any]] = {}
    more: dict[str, str] = {}
    functions: list[str] = []
    branches: list[str] = []
    for k, part in enumerate(step.parts):
        name = f"{_EPILOGUE}{k}"
        epilogue = print_epilogue(part, config.block_m, config.block_n, name, 1 + count + len(more))
        if epilogue.sizes or not problem.static:
            raise UnsupportedError("products of unknown size beside each other")
        own = replace(problem, b=_operand(part.b, problem.k, problem.n))
        call = gemm_entry.gemm_call(own, config, b=f"b{k + 1}", extra=epilogue.extra, epilogue=name)
        parameters |= call.signature
        maps |= call.tensor_maps
        more |= epilogue.parameters
        operands += epilogue.buffers
        functions.append(epilogue.text)
        branches.append(f"    {'el' * (k > 0)}if tl.program_id(1) == {k}:\n        {call.text}")
    parameters |= more
    entry = "_".join([f"fx_gemm{count}", *operations(first.region.nest)])
    body = "\n".join(branches)
    kernel = f"@triton.jit\ndef {entry}({', '.join(parameters)}):\n{body}"
    source = KernelSource(
        language="triton",
        entry=entry,
        text="\n\n\n".join((f"{PREAMBLE}\n{gemm_entry.MODULE}", *functions, kernel)) + "\n",
        buffers=tuple(operands),
        sizes=(),
        grid=(config.tiles(problem), count, 1),
        compile_options=_options(parameters, maps, config.warps, config.stages),
    )
    return Printed((source,))


def print_epilogue(
    contraction: Contraction,
    rows: int | None,
    columns: int,
    name: str = _EPILOGUE,
    reserved: int | None = None,
    vectors: tuple[str, bool] | None = None,
) -> BlockFunction:
    """The nest of `contraction` on one block of so many rows (None: some of them may be none) and columns of the product, as
    the function `name` that a template calls. The entry's first `reserved` buffers (None: the operands) are not its own.
    `vectors` as `print_block` takes it.
    """
    _, m, _, n = contraction.sizes
    whole = rows is not None and isinstance(m, int) and m % rows == 0 and not contraction.ends
    return _print_epilogue(contraction, name, not whole, n % columns != 0, reserved, vectors=vectors)


def _print_aligned_epilogues(contraction: Contraction, problem: GemmProblem, config: GemmConfig) -> BlockFunction:
    """The functions of `aligned_gemm.py`: for blocks within the columns, in whole vectors, and at their ends."""
    ragged = problem.m % (config.classes * config.block_m) != 0
    vectors = (_VECTORS, config.loaded > config.block_n) if config.vectors else None
    reserved = len(_operands(contraction)) + 1
    inside = _print_epilogue(contraction, _EPILOGUE, ragged, False, reserved, run=problem.run, vectors=vectors)
    edge = _print_epilogue(contraction, _EDGE, ragged, True, reserved, below=True)
    assert (inside.buffers, inside.sizes) == (edge.buffers, edge.sizes), "one tuple of parameters serves both"
    return replace(inside, text=f"{inside.text}\n\n\n{edge.text}")


def _print_epilogue(
    contraction: Contraction,
    name: str,
    ragged_rows: bool,
    ragged_columns: bool,
    reserved: int | None = None,
    run: int = 0,
    below: bool = False,
    vectors: tuple[str, bool] | None = None,
) -> BlockFunction:
    """The function `name`, and `vectors` as `print_block` takes it; with `run`, what it stores begins at a multiple of so
    many elements in each row of a block.
    """
    _, m, _, n = contraction.sizes
    limits = ("z" if contraction.ends else _rows(contraction), ragged_rows), (n, ragged_columns)
    blocks = {name: f"acc{k + 1 if k else ''}" for k, name in enumerate(contraction.registers)}
    more = {} if isinstance(m, int) else {_ROWS: m}
    aligned = (contraction.region.nest.stores[0].index, run) if run else None
    reserved = len(_operands(contraction)) if reserved is None else reserved
    return print_block(
        name,
        contraction.region,
        contraction.axes,
        limits,
        blocks,
        reserved,
        more=more,
        aligned=aligned,
        below=below,
        vectors=vectors,
    )


def print_join(
    contraction: Contraction, shape: tuple[int, ...], target: Target, name: str, unrolled: bool = False
) -> tuple[BufferSpec, KernelSource]:
    """The partial sums of a product, of `shape`, and the kernel `name` that adds them up and has the epilogue.

    `unrolled`: as so many loads of each element by one thread, else as a reduction, whose parts several threads load.
    """
    partial, rest = in_parts(contraction, shape, unrolled)
    proposed = [c for c in configs(rest, target) if c.split == 1]
    printed = [print_nest(rest, c, target, name) for c in (proposed if unrolled else proposed[:1])]
    spread = (k for k in printed if isinstance(k.grid[0], int) and 2 * k.grid[0] >= target.sm_count)
    return partial, next(spread, printed[0])


def in_parts(contraction: Contraction, shape: tuple[int, ...], unrolled: bool = False) -> tuple[BufferSpec, Region]:
    """The partial sums of a product, and the region that adds them up and has the epilogue."""
    name = f"{contraction.name}.parts"
    spec = BufferSpec(name, torch.float32, contraction.device, shape, contiguous_strides(shape))
    place: Int = 0
    for sym, stride in zip(contraction.axes, spec.strides[1:], strict=True):
        place = place if sym is None else add(place, mul(symbol(sym), stride))
    axes, total = _sum_of_parts(spec, place, unrolled)
    return spec, contraction.reduced(contraction.name, axes, {contraction.result: total}, {name: spec})


def _sum_of_parts(spec: BufferSpec, place: Int, unrolled: bool) -> tuple[tuple[Sym, ...], Scalar]:
    """The sum over the first dimension of `spec` at `place` of the others, and the axes over which it is a reduction."""
    count, stride = spec.shape[0], spec.strides[0]
    assert isinstance(count, int)
    if not unrolled:
        part = Sym("r3", size=count)
        load = Load(spec.name, add(place, mul(symbol(part), stride)), torch.float32)
        return (part,), Reduce("sum", (load,), (part,), torch.float32)
    total: Scalar = Load(spec.name, place, torch.float32)
    for k in range(1, count):
        total = Op("add", (total, Load(spec.name, add(place, mul(k, stride)), torch.float32)), torch.float32)
    return (), total
