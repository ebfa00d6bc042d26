"""The call of a matrix product template in a printed entry, and what the compiler and launcher need for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fxopt.codegen.templates.gemm_problem import GemmConfig, GemmProblem, Matrix
from fxopt.ir.exprs import Int

MODULE = "from fxopt.codegen.templates import gemm"
GROUPED_MODULE = "from fxopt.codegen.templates import grouped_gemm"
ALIGNED_MODULE = "from fxopt.codegen.templates import aligned_gemm"
TAILED_MODULE = "from fxopt.codegen.templates import tailed_gemm"
"""The imports that an entry's text needs."""

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


@dataclass(frozen=True)
class GemmCall:
    """`text` is the statement; `signature` the types of the operands' parameters; `tensor_maps` what the parameters that are
    tensor descriptors describe (`KernelSource.compile_options`, whose `aligned` has to list these parameters); `grid` the
    number of programs (`gemm_call` gives that for static sizes).
    """

    text: str
    signature: dict[str, str]
    tensor_maps: dict[str, dict[str, Any]]
    grid: Int


def gemm_call(
    problem: GemmProblem,
    config: GemmConfig,
    *,
    a: str = "b0",
    b: str = "b1",
    c: str = "b2",
    ends: str = "",
    extra: str = "()",
    epilogue: str = "epilogue",
    edge: str = "edge",
    vectors: str = "vectors",
    narrow: str = "b2",
    sizes: tuple[str, str, str, str] | None = None,
) -> GemmCall:
    """The call of the template that `config` means.

    `a`, `b` and, of a dual product, `c` name the operands' parameters, `ends` that of a grouped product's ends. `extra` is
    the text of the epilogue's tuple, and `epilogue` its name; of a split product, `extra` is the name of the parameter for
    the partial sums and there is no epilogue. `edge` is the epilogue of tiles that go beyond the columns, of a call with
    `config.classes`. Where `config.has_narrow_tiles`, `narrow` is the parameter for a second descriptor of b; `vectors`
    loads for whole tiles, where `config.vectors`. `sizes` are the texts of batch, m, n and k (default: the problem's
    numbers).
    """
    if problem.rows:
        return _grouped_call(problem, config, dict(zip((a, b, c), problem.matrices, strict=False)), ends, extra, epilogue)
    if config.classes > 1:
        return _aligned_call(problem, config, (a, b, narrow), extra, epilogue, edge, vectors)
    batch, m, n, k = sizes or tuple(str(s) for s in (problem.batch, problem.m, problem.n, problem.k))
    grid = config.programs or config.tiles(problem)
    blocks = f"BM={config.block_m}, BN={config.block_n}, BK={config.block_k}, GROUP={config.group}"
    split, dual = config.split > 1, problem.c is not None
    operands = dict(zip((a, b, c), problem.matrices, strict=False))
    way = f'PRECISION="{"promoted" if config.promote else problem.precision}"'
    way += "" if dual else f", SWAP={config.swap}"
    way += f", SPLIT={config.split}" if split else f", EPILOGUE={epilogue}, SUBTILE={config.subtile}"
    way += f", VECTORS={vectors}, LOADED={config.loaded}" * config.vectors
    way += _apart(config) + direct_of(config)
    name = "split_gemm" if split else "dual_gemm" if dual else "gemm"
    name = f"tma_{name}" if config.tma else "pointer_gemm" if name == "gemm" else name
    kind = _TYPES[problem.dtype]
    if config.tail > 1:
        return _tailed_call(problem, config, (a, b, narrow), extra, epilogue, vectors)
    if config.tma:
        a_batch, b_batch = (x.batch_rows(problem.batch) for x in (problem.a, problem.b))
        way += f", A_K_LAST={problem.a.columns_last}, B_K_LAST={not problem.b.columns_last}"
        way += "" if split else f", PROGRAMS={config.programs}, FLATTEN={config.flatten}"
        given = f"{', '.join(operands)}, {extra}, {batch}, {m}, {n}, {k}, {a_batch}, {b_batch}"
        signature, maps = _descriptors(problem, config, operands)
        return GemmCall(f"gemm.{name}({given}, {blocks}, {way})", signature, maps, grid)
    strides = [problem.a.row, problem.a.column, problem.b.row, problem.b.column, problem.a.batch, problem.b.batch]
    starts = [p + (f" + {x.offset}" if x.offset else "") for p, x in operands.items()]
    sizes_given = f"{batch}, {m}, {n}, {k}" if split else f"{m}, {n}, {k}"
    given = f"{', '.join(starts)}, {extra}, {sizes_given}, {', '.join(map(str, strides))}"
    text = f"gemm.{name}({given}, {blocks}, {way}, WIDE={problem.wide})"
    return GemmCall(text, dict.fromkeys(operands, f"*{kind}"), {}, grid)


def direct_of(config: GemmConfig) -> str:
    """What a template is told of `config.direct`."""
    return (
        f", WARPS={config.warps}, DIRECT={config.direct}" * (config.direct > 0) + f", AHEAD={config.stages}" * config.ahead
    )


def _apart(config: GemmConfig) -> str:
    return f", RESIDENT={config.resident}, APART={config.apart}" * (config.apart > 0)


def _aligned_call(
    problem: GemmProblem,
    config: GemmConfig,
    names: tuple[str, str, str],
    extra: str,
    epilogue: str,
    edge: str,
    vectors: str,
) -> GemmCall:
    """The call of the template for tiles of rows of equal alignment: `classes` rows of a are one of its descriptor's."""
    (p, q, edges), a, classes = names, problem.a, config.classes
    rows = replace(a, rows=problem.m // classes, columns=(classes - 1) * a.row + a.columns, row=classes * a.row)
    signature, maps = _with_narrow(problem, config, {p: rows, q: problem.b}, edges)
    way = f"EPILOGUE={epilogue}, EDGE={edge}, BM={config.block_m}, BN={config.block_n}, BK={config.block_k}"
    way += f", NARROW={config.narrow}, ENDS={config.narrow_tiles(problem)}"
    way += f", GROUP={config.group}, SUBTILE={config.subtile}, PROGRAMS={config.programs}, FLATTEN={config.flatten}"
    way += f', B_K_LAST={not problem.b.columns_last}, PRECISION="{"promoted" if config.promote else problem.precision}"'
    way += f", CLASSES={classes}, RUN={problem.run}, PITCH={problem.pitch}"
    way += f", VECTORS={vectors}, LOADED={config.loaded}" * config.vectors
    way += _apart(config)
    given = f"{', '.join(names)}, {extra}, {problem.m}, {problem.n}, {problem.k}, {a.row}"
    return GemmCall(f"aligned_gemm.tma_aligned_gemm({given}, {way})", signature, maps, config.programs)


def _grouped_call(
    problem: GemmProblem, config: GemmConfig, operands: dict[str, Matrix], ends: str, extra: str, epilogue: str
) -> GemmCall:
    """The call of a template for grouped products; the grid is the most tiles that the groups can have."""
    power = 1 << (problem.batch - 1).bit_length()
    way = f"EPILOGUE={epilogue}, GROUPS={problem.batch}, POWER={power}, BM={config.block_m}, BN={config.block_n}"
    way += f', BK={config.block_k}, SUBTILE={config.subtile}, PRECISION="{problem.precision}"'
    name = "grouped_gemm" if problem.c is None else "grouped_dual_gemm"
    way += "" if problem.c is not None else f", SWAP={config.swap}"
    sizes, grid = f"{problem.rows}, {problem.n}, {problem.k}", config.most_tiles(problem)
    if config.tma:
        signature, maps = _descriptors(problem, config, operands)
        way += f", A_K_LAST={problem.a.columns_last}, B_K_LAST={not problem.b.columns_last}"
        given = f"{', '.join(operands)}, {ends}, {extra}, {sizes}, {problem.b.batch_rows(problem.batch)}"
        return GemmCall(f"grouped_gemm.tma_{name}({given}, {way})", signature | {ends: "*i32"}, maps, grid)
    starts = [p + (f" + {x.offset}" if x.offset else "") for p, x in operands.items()]
    strides = (problem.a.row, problem.a.column, problem.b.row, problem.b.column, problem.b.batch)
    given = f"{', '.join(starts)}, {ends}, {extra}, {sizes}, {', '.join(map(str, strides))}"
    signature = dict.fromkeys(operands, f"*{_TYPES[problem.dtype]}") | {ends: "*i32"}
    return GemmCall(f"grouped_gemm.{name}({given}, {way}, WIDE={problem.wide})", signature, {}, grid)


def _tailed_call(
    problem: GemmProblem, config: GemmConfig, names: tuple[str, str, str], extra: str, epilogue: str, vectors: str
) -> GemmCall:
    """The call of the template whose last tiles are narrow."""
    a, b, narrow = names
    signature, maps = _with_narrow(problem, config, {a: problem.a, b: problem.b}, narrow)
    a_batch, b_batch = (x.batch_rows(problem.batch) for x in (problem.a, problem.b))
    given = f"{', '.join(names)}, {extra}, {problem.batch}, {problem.m}, {problem.n}, {problem.k}, {a_batch}, {b_batch}"
    way = f"EPILOGUE={epilogue}, BM={config.block_m}, BN={config.block_n}, BK={config.block_k}, NARROW={config.narrow}"
    way += f", WHOLE={config.whole}, GROUP={config.group}, SUBTILE={config.subtile}, PROGRAMS={config.programs}"
    way += f", FLATTEN={config.flatten}, A_K_LAST={problem.a.columns_last}, B_K_LAST={not problem.b.columns_last}"
    way += f', PRECISION="{"promoted" if config.promote else problem.precision}"'
    way += f", VECTORS={vectors}, LOADED={config.loaded}" * config.vectors
    return GemmCall(f"tailed_gemm.tma_tailed_gemm({given}, {way})", signature, maps, config.programs)


def _with_narrow(
    problem: GemmProblem, config: GemmConfig, operands: dict[str, Matrix], narrow: str
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """`_descriptors`, and one more of the right operand, `narrow`, for narrow tiles."""
    signature, maps = _descriptors(problem, config, operands)
    a, b = operands.items()
    kinds, geometries = _descriptors(problem, replace(config, block_n=config.narrow), {a[0]: a[1], narrow: b[1]})
    return signature | {narrow: kinds[narrow]}, maps | {narrow: geometries[narrow]}


def _descriptors(
    problem: GemmProblem, config: GemmConfig, operands: dict[str, Matrix]
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Types and geometries of the operands' descriptors, the first of which is the left one's."""
    a, *_ = operands
    blocks = {
        p: (config.block_m if p == a else config.block_k, config.block_k if p == a else config.block_n) for p in operands
    }
    maps = {p: _tensor_map(x, problem, *blocks[p]) for p, x in operands.items()}
    if config.direct:
        (b,) = (p for p in operands if p != a)
        maps[b] |= in_groups(maps[b], config.direct)
    return {p: descriptor_type(problem.dtype, m["block"]) for p, m in maps.items()}, maps


def descriptor_type(dtype: torch.dtype, block: list[int]) -> str:
    """Triton's type of a descriptor of `dtype` with such blocks."""
    return f"tensordesc<{_TYPES[dtype]}[{', '.join(map(str, block))}]>"


def in_groups(geometry: dict[str, Any], direct: int) -> dict[str, list[int]]:
    """Sizes, strides and block of a descriptor of [columns, inner dimension], as `gemm.py` has it for DIRECT."""
    (columns, inner), (pitch, _), (block, depth) = (geometry[field] for field in ("shape", "strides", "block"))
    four, pairs = 4 * direct, direct // 2
    return {
        "shape": [columns // four, pairs, 4, 2, inner],
        "strides": [four * pitch, 2 * pitch, direct * pitch, pitch, 1],
        "block": [block // four, pairs, 4, 2, depth],
    }


def _tensor_map(matrix: Matrix, problem: GemmProblem, rows: int, columns: int) -> dict[str, Any]:
    """Geometry of the descriptor of `matrix` with blocks of so many of its rows and columns: sizes, strides and block with
    the contiguous dimension last, in elements. Elements of products in TF32 are rounded to it on their way.
    """
    outer, inner, block = matrix.rows, matrix.columns, [rows, columns]
    if not matrix.columns_last:
        outer, inner, block = inner, outer, block[::-1]
    outer += matrix.batch_rows(problem.batch) * (problem.batch - 1)
    geometry = {"shape": [outer, inner], "strides": [matrix.pitch, 1], "offset": matrix.offset, "block": block}
    return geometry | {"rounds_to_tf32": True} if problem.is_tf32 else geometry


def partial_shape(problem: GemmProblem, config: GemmConfig) -> tuple[int, int, int, int]:
    """The shape of a split product's partial sums (float32, contiguous)."""
    return (config.split, problem.batch, problem.m, problem.n)
