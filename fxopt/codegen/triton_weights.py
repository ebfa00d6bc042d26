"""A product with a weight of few bits, or of a single row, as a Triton kernel: a template of `weight_gemm.py` or
`weight_dot.py` with the printed epilogue.

As in `triton_contraction`, b0 and b1 are the operands (of two products b2 too), and sizes and strides are literals of the
entry; next come the scales of 4-bit weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch

from fxopt.codegen.templates.gemm_entry import GemmCall
from fxopt.codegen.templates.weight_config import DotConfig, VectorConfig, WeightConfig, WeightProblem
from fxopt.codegen.triton import Printed, configs, print_nest, refuse_unknown_types
from fxopt.codegen.triton_block import BlockFunction
from fxopt.codegen.triton_chain import OTHERS_END
from fxopt.codegen.triton_contraction import in_parts, print_epilogue, source_of
from fxopt.codegen.triton_names import operations
from fxopt.codegen.triton_nest import row_value
from fxopt.codegen.triton_ops import POINTER_TYPE, narrowed
from fxopt.codegen.triton_scopes import Names
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int
from fxopt.ir.region import Contraction, Matrix, Quantized, Region
from fxopt.target import Target

MODULE = "from fxopt.codegen.templates import weight_gemm"
DOT_MODULE = "from fxopt.codegen.templates import weight_dot, weight_gemm"
_EPILOGUE, _ROW = "epilogue", "row_of"
_HALVES = (torch.float16, torch.bfloat16)
_HALF_WEIGHT = Quantized(16, 0, None)


def takes_vectors(contraction: Contraction) -> bool:
    """Whether `contraction` is of a single row and a weight, both in half precision, whose rows are contiguous."""
    batch, rows, *_ = contraction.sizes
    plain = isinstance(contraction.a, Matrix) and not contraction.ends and not contraction.quantized
    weight = contraction.b
    return plain and (batch, rows, weight.row) == (1, 1, 1) and contraction.buffers[weight.buffer].dtype in _HALVES


def weight_problem(contraction: Contraction) -> WeightProblem:
    """The product of `contraction`, for the choice of configurations and the template.

    Of operands that are both in half precision only a single row has such a template. Raises UnsupportedError for what the
    templates have no form for: sizes or layouts that are unknown or not by rows, rows that are not in half precision, two
    products by weights of different forms.
    """
    kind, *others = contraction.quantized or (_HALF_WEIGHT,) * len(contraction.products)
    alike = all((o.bits, o.group, _strides(o.scale)) == (kind.bits, kind.group, _strides(kind.scale)) for o in others)
    if not alike or not isinstance(contraction.a, Matrix) or contraction.ends:
        raise UnsupportedError("products with weights of different forms")
    batch, m, k, n = contraction.sizes
    left = contraction.buffers if contraction.row is None else contraction.row.buffers
    dtype = left[contraction.a.buffer].dtype
    if not (isinstance(m, int) and isinstance(k, int) and isinstance(n, int)) or batch != 1:
        raise UnsupportedError("a product of unknown size")
    matrices = [contraction.a, contraction.b, *([] if kind.scale is None else [kind.scale])]
    if not all(isinstance(x, int) for matrix in matrices for x in (matrix.row, matrix.column, matrix.offset)):
        raise UnsupportedError("a matrix of unknown layout")
    if dtype not in _HALVES or contraction.a.column != 1 or contraction.b.row != 1:
        raise UnsupportedError(f"a product of {dtype} by a weight of few bits whose rows are not contiguous")
    if kind.scale is not None and kind.scale.row != 1:
        raise UnsupportedError("scales of groups that are not contiguous")
    return WeightProblem(m, n, k, dtype, kind.bits, kind.group, len(contraction.products))


def _strides(matrix: Matrix | None) -> tuple[Int, Int] | None:
    return None if matrix is None else (matrix.row, matrix.column)


def print_vector(contraction: Contraction, config: VectorConfig | DotConfig, target: Target) -> Printed:
    """`contraction` of a single row in configuration `config`; raises as `print_weights` does."""
    if not target.compiles_triton:
        raise UnsupportedError(f"Triton does not generate code for {target.name}")
    refuse_unknown_types(contraction.buffers, target)
    problem = weight_problem(contraction)
    scales = [kind.scale for kind in contraction.quantized if kind.scale is not None]
    products = list(contraction.products.values())
    assert isinstance(contraction.a, Matrix)
    left = [] if contraction.row is not None else [contraction.a]
    operands = {f"b{k}": matrix for k, matrix in enumerate((*left, *products, *scales))}
    row = None if contraction.row is None else _print_row(contraction.row, problem.k, len(operands))
    reserved = len(operands) + (0 if row is None else len(row.buffers))
    epilogue = print_epilogue(contraction, 1, config.rows, reserved=reserved)
    starts = [name + (f" + {matrix.offset}" if matrix.offset else "") for name, matrix in operands.items()]
    *x, weights = (*starts[: len(left)], starts[len(left) : len(left) + len(products)])
    factors = starts[len(left) + len(products) :] or weights  # of 8 bits, theirs are the epilogue's: whatever is a pointer
    sizes = f"{problem.n}, {problem.k}, {contraction.b.column}, {scales[0].column if scales else 0}"
    firsts = [f"w{k}" for k in range(len(weights))]
    lines = [f"n = weight_gemm.rows_of_program({config.rows})"]
    for name, w, scale in zip(firsts, weights, factors, strict=True):
        given = f"{w}, {scale}, n, {sizes}, BITS={problem.bits}, GROUP={problem.group}, {config.literals}"
        lines.append(f"{name} = {_loads(config)}({given})")
    if config.ahead:
        counts = [problem.row_elements] * len(products) + [problem.k // problem.group for _ in scales]
        for start, matrix, count in zip(starts[len(left) :], (*products, *scales), counts, strict=True):
            later = f"{start}, {matrix.column}, {count}, {problem.n}, {config.rows}, {config.ahead}"
            lines.append(f"weight_gemm.bring_later({later})")
    if all(matrix.buffer in contraction.region.steady for matrix in (*products, *scales)):
        lines.append(OTHERS_END)
    dual = "" if problem.products == 1 else "dual_"
    template = f"weight_dot.{dual}weight_dot" if isinstance(config, DotConfig) else f"weight_gemm.{dual}weight_vector"
    if row is not None:
        lines.append(f"row = {_ROW}({row.extra})")
        template, given = f"{template}_of_row", ", ".join(("row", *firsts, epilogue.extra))
    elif isinstance(config, DotConfig):
        given = ", ".join((*x, *firsts, epilogue.extra, str(problem.k)))
    else:
        given = ", ".join((*x, *weights, *factors, *firsts, epilogue.extra, sizes, f"GROUP={problem.group}"))
    literals = f"BITS={problem.bits}, {config.literals}, BN={config.rows}, EPILOGUE={_EPILOGUE}"
    lines.append(f"{template}({given}, {literals})")
    call = GemmCall("\n    ".join(lines), _types(contraction, operands), {}, config.programs(problem))
    kind, module = ("dot", DOT_MODULE) if isinstance(config, DotConfig) else ("vector", MODULE)
    entry = "_".join([f"fx_weight_{kind}", *operations(contraction.region.nest)])
    functions = epilogue if row is None else _both(row, epilogue)
    return Printed((source_of(contraction, entry, call, functions, config.warps, 1, module),))


def _loads(config: VectorConfig | DotConfig) -> str:
    """The function that loads what a program has of the weight before anything else."""
    return "weight_dot.chunks_of" if isinstance(config, DotConfig) else "weight_gemm.first_block"


def _both(one: BlockFunction, other: BlockFunction) -> BlockFunction:
    """What an entry needs that calls both."""
    text = "\n\n\n".join((one.text, other.text))
    parameters, buffers = one.parameters | other.parameters, (*one.buffers, *other.buffers)
    return BlockFunction(text, parameters, buffers, (*one.sizes, *other.sizes))


def _print_row(region: Region, length: int, reserved: int) -> BlockFunction:
    """The function that gives the row which `region` stores, [1, length]; the first `reserved` buffers are others'."""
    names = Names(reserved=reserved)
    body, value = row_value(region, length, names)
    dtype = region.buffers[region.nest.stores[0].buffer].dtype
    kinds = {p: POINTER_TYPE[region.buffers[b].dtype] for b, p in names.buffers.items()}
    if names.sizes:
        raise UnsupportedError("a row whose values depend on sizes")
    sizes = [f"{block}: tl.constexpr = {size}" for block, size in (("XB", 1), ("RB", length))]
    lines = [f"{', '.join(kinds)}, = extra", *sizes, *body, f"return {narrowed(value, dtype)}"]
    text = "\n".join(["@triton.jit", f"def {_ROW}(extra):", *(f"    {line}" for line in lines)])
    return BlockFunction(text, kinds, tuple(names.buffers), ())


def _types(contraction: Contraction, operands: Mapping[str, Matrix]) -> dict[str, str]:
    return {p: POINTER_TYPE[contraction.buffers[matrix.buffer].dtype] for p, matrix in operands.items()}


def print_weights(contraction: Contraction, config: WeightConfig, target: Target) -> Printed:
    """`contraction` in configuration `config`: one kernel, or with `config.split` above 1 two and a buffer between them.

    Raises UnsupportedError where Triton has no form for the epilogue or `target`, or as `weight_problem` does.
    """
    if not target.compiles_triton:
        raise UnsupportedError(f"Triton does not generate code for {target.name}")
    refuse_unknown_types(contraction.buffers, target)
    problem = weight_problem(contraction)
    own = "b2" if problem.bits == 8 else "b3"
    if config.split == 1:
        epilogue = print_epilogue(contraction, config.block_m, config.block_n)
        entry = "_".join(["fx_weight_gemm", *operations(contraction.region.nest)])
        call = _call(contraction, problem, config, epilogue.extra)
        return Printed((source_of(contraction, entry, call, epilogue, config.warps, config.stages, MODULE),))
    partial, rest = in_parts(contraction, (config.split, 1, problem.m, problem.n))
    best = next(c for c in configs(rest, target) if c.split == 1)
    sums = BlockFunction("", {own: "*fp32"}, (partial.name,), ())
    call = _call(contraction, problem, config, own)
    parts = source_of(contraction, "fx_weight_gemm_split", call, sums, config.warps, config.stages, MODULE)
    return Printed((parts, print_nest(rest, best, target, "gemm_parts")), (partial,))


def _call(contraction: Contraction, problem: WeightProblem, config: WeightConfig, extra: str) -> GemmCall:
    (kind,), a, b = contraction.quantized, contraction.a, contraction.b
    assert isinstance(a, Matrix)
    operands = {"b0": a, "b1": b} | ({} if kind.scale is None else {"b2": kind.scale})
    starts = [name + (f" + {matrix.offset}" if matrix.offset else "") for name, matrix in operands.items()]
    scale, scale_row = (starts[2], kind.scale.column) if kind.scale is not None else ("b1", 0)
    sizes = f"{problem.m}, {problem.n}, {problem.k}, {a.row}, {b.column}, {scale_row}"
    blocks = f"BITS={problem.bits}, GROUP={problem.group}, BM={config.block_m}, BN={config.block_n}, BK={config.block_k}"
    blocks += f", ROWS_FIRST={ceil(problem.m / config.block_m)}"
    split = config.split > 1
    way = f", SPLIT={config.split}" if split else f", EPILOGUE={_EPILOGUE}"
    name = "weight_split_gemm" if split else "weight_gemm"
    text = f"weight_gemm.{name}({starts[0]}, {starts[1]}, {scale}, {extra}, {sizes}, {blocks}{way})"
    return GemmCall(text, _types(contraction, operands), {}, config.programs(problem))
