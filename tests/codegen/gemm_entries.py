"""Entries that store a template's product as it is: what the tests of templates print."""

from __future__ import annotations

import torch

from fxopt.codegen.templates.gemm_entry import ALIGNED_MODULE, MODULE, TAILED_MODULE, gemm_call, partial_shape
from fxopt.codegen.templates.gemm_problem import GemmConfig, GemmProblem, Matrix
from fxopt.ir.exprs import Sym, symbol
from fxopt.ir.kernel import KernelSource

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def matrix(rows: int, columns: int, transposed: bool = False, batch: int = 1, offset: int = 0) -> Matrix:
    """A dense operand [batch, rows, columns], with contiguous rows or (`transposed`) columns."""
    strides = (1, rows) if transposed else (columns, 1)
    return Matrix(rows, columns, *strides, batch=rows * columns if batch > 1 else 0, offset=offset)


def problem(
    m: int, n: int, k: int, layout: str = "nt", batch: int = 1, dtype: torch.dtype = torch.float32, offset: int = 0
) -> GemmProblem:
    """`layout` has a letter for each operand: "n" for contiguous rows, "t" for contiguous columns."""
    a, b = matrix(m, k, layout[0] == "t", batch, offset), matrix(k, n, layout[1] == "t", batch)
    rows = {"pitch": n, "run": 16 // dtype.itemsize} if batch == 1 else {}
    return GemmProblem(batch, m, n, k, dtype, a, b, written=batch * m * n * dtype.itemsize, **rows)


def entry(p: GemmProblem, config: GemmConfig, run_time: str = "") -> KernelSource:
    """The product of buffers a and b to `result` [batch, m, n] (of p's dtype), or its partial sums (float32).

    With an operand c it is a @ b * (a @ c + 1).

    The sizes named in `run_time` (of "mnk") are parameters of these names.
    """
    m, n, k = (name if name in run_time else str(getattr(p, name)) for name in "mnk")
    split = config.split > 1
    call = gemm_call(
        p, config, c="b3", narrow="b3", extra="b2" if split else f"(b2, {m}, {n})", sizes=(str(p.batch), m, n, k)
    )
    sizes = list(run_time)
    place, inside = "b2 + (z * (m * n) + y * n + x)", "(y < m) & (x >= 0) & (x < n)"
    vectors = f"tl.multiple_of({place}, [1, 16])"
    blocks, value = ("acc", "") if p.c is None else ("one, two", "    acc = one * (two + 1.0)\n")
    third = ["b3"] if p.c is not None or config.has_narrow_tiles else []

    def function(name: str, pointer: str, mask: str) -> str:
        head = f"@triton.jit\ndef {name}({blocks}, y, x, z, extra):\n    b2, m, n = extra\n{value}"
        return f"{head}    tl.store({pointer}, acc.to(b2.dtype.element_ty), {mask})\n\n\n"

    whole = function("epilogue", vectors, "y < m") if config.classes > 1 else ""
    module = ALIGNED_MODULE if config.classes > 1 else TAILED_MODULE if config.tail > 1 else MODULE
    text = (
        f"import triton\nimport triton.language as tl\n\n{module}\n\n\n"
        f"{whole}{function('edge' if config.classes > 1 else 'epilogue', place, inside)}"
        f"@triton.jit\ndef product({', '.join(['b0', 'b1', 'b2', *third, *sizes])}):\n    {call.text}\n"
    )
    types = call.signature | {"b2": "*fp32" if split else TYPES[p.dtype]} | dict.fromkeys(sizes, "i32")
    signature = {name: types[name] for name in ("b0", "b1", "b2", *third, *sizes)}
    options = {
        "signature": signature,
        "constexprs": {},
        "aligned": ["b0", "b1", "b2", *third],
        "num_warps": config.warps,
        "num_stages": config.stages,
        "asserts": False,
        "tensor_maps": call.tensor_maps,
    }
    values = tuple(symbol(Sym(name)) for name in sizes)
    buffers = ("a", "b", "result", *("c" if p.c is not None else "b" for _ in third))
    return KernelSource("triton", "product", text, buffers, values, (call.grid, 1, 1), options)


def result_shape(p: GemmProblem, config: GemmConfig) -> tuple[int, ...]:
    """[parts, batch, m, n]; one part where the product is whole."""
    return partial_shape(p, config)
