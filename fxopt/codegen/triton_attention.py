"""Attention as Triton kernels: entries with flat parameters that call the templates of `codegen/templates/attention.py`.

Sizes, strides and block sizes are literals of an entry, so its text is the whole problem. Of `attend`, b0, b1 and b2 are
query, key and value; then come the mask, if there is one, and what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.codegen.templates.attention_config import AttentionConfig, block_of
from fxopt.codegen.triton import Printed
from fxopt.codegen.triton_nest import PREAMBLE
from fxopt.codegen.triton_ops import POINTER_TYPE
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, contiguous_strides
from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import Attention, BufferSpec, Strided
from fxopt.target import Target

MODULE = "from fxopt.codegen.templates import attention"

JOIN_WARPS = 4


def print_attention(attention: Attention, config: AttentionConfig, target: Target) -> Printed:
    """`attention` in configuration `config`: one kernel, or with `config.split` above 1 two and buffers between them.

    Raises UnsupportedError where Triton generates no code for `target`.
    """
    if not target.compiles_triton:
        raise UnsupportedError(f"Triton does not generate code for {target.name}")
    if config.split == 1:
        return Printed((_attend(attention, config, (attention.out.buffer,)),))
    batch, heads, rows, _ = attention.query.shape
    parts = _scratch(attention, "parts", (config.split, batch * heads * rows, attention.value.shape[3]))
    statistics = _scratch(attention, "statistics", (2, *parts.shape[:2]))
    stored = (parts.name, statistics.name)
    return Printed((_attend(attention, config, stored), _join(attention, config, stored)), (parts, statistics))


def _scratch(attention: Attention, what: str, shape: tuple[Int, ...]) -> BufferSpec:
    return BufferSpec(f"{attention.name}.{what}", torch.float32, attention.device, shape, contiguous_strides(shape))


def _attend(attention: Attention, config: AttentionConfig, stored: Sequence[str]) -> KernelSource:
    split, mask = config.split > 1, attention.mask
    operands = [f"b{k}{_plus(x)}" for k, x in enumerate(attention.operands)]
    results = [f"b{len(operands) + k}" for k in range(len(stored))]
    if not split:
        results = [results[0] + _plus(attention.out), results[0]]
    _, heads, rows, width = attention.query.shape
    groups, keys, value_width = attention.key.shape[1], attention.key.shape[2], attention.value.shape[3]
    boolean = mask is not None and attention.buffers[mask.buffer].dtype == torch.bool
    kind, strides = _kind(attention), (0, 0, 0, 0) if mask is None else mask.strides
    sizes = f"{heads}, {rows}, {keys}, {width}, {value_width}, {heads // groups}"
    layouts = ", ".join(str(x.strides[:3]) for x in (attention.query, attention.key, attention.value))
    meaning = f'{attention.scale!r}, {attention.causal}, "{kind}", {boolean}'
    blocks = f"BM={config.block_m}, BN={config.block_n}, EB={block_of(width)}, EVB={block_of(value_width)}"
    way = f'PACK={config.pack}, SPLIT={config.split}, PRECISION="ieee"'
    given = [*operands, *(["b0"] if mask is None else []), *results]
    call = (
        f"attention.attend(\n        {', '.join(given)}, {sizes},\n        {layouts}, {strides}, {attention.out.strides},\n"
        f"        {meaning},\n        {blocks}, {way},\n    )"
    )
    buffers = (*(x.buffer for x in attention.operands), *stored)
    types = [POINTER_TYPE[attention.buffers[x.buffer].dtype] for x in attention.operands]
    types += ["*fp32", "*fp32"] if split else [POINTER_TYPE[attention.dtype]]
    name = "_".join(["fx_attention", *(["causal"] * attention.causal), *(["masked"] * bool(kind)), *(["split"] * split)])
    return _source(name, call, types, buffers, config.programs(attention), config.warps, config.stages)


def _join(attention: Attention, config: AttentionConfig, stored: Sequence[str]) -> KernelSource:
    batch, heads, rows, _ = attention.query.shape
    width = attention.value.shape[3]
    call = (
        f"attention.join(\n        b0, b1, b2{_plus(attention.out)}, {heads}, {rows}, {width}, {attention.out.strides},\n"
        f'        "{_kind(attention)}", '
        f"SPLIT={config.split}, PARTS={block_of(config.split, 1)}, EVB={block_of(width)},\n    )"
    )
    types = ["*fp32", "*fp32", POINTER_TYPE[attention.dtype]]
    buffers = (*stored, attention.out.buffer)
    return _source("fx_attention_join", call, types, buffers, batch * heads * rows, JOIN_WARPS, 1)


def _kind(attention: Attention) -> str:
    """The template's name for the kind of mask."""
    mask = attention.mask
    return "" if mask is None else "rows" if mask.strides[1] or mask.strides[2] else "row"


def _plus(view: Strided) -> str:
    return f" + {view.offset}" if view.offset else ""


def _source(
    entry: str, call: str, types: Sequence[str], buffers: tuple[str, ...], programs: int, warps: int, stages: int
) -> KernelSource:
    parameters = {f"b{k}": kind for k, kind in enumerate(types)}
    return KernelSource(
        language="triton",
        entry=entry,
        text=f"{PREAMBLE}\n{MODULE}\n\n\n@triton.jit\ndef {entry}({', '.join(parameters)}):\n    {call}\n",
        buffers=buffers,
        grid=(programs, 1, 1),
        compile_options={
            "signature": parameters,
            "constexprs": {},
            "aligned": list(parameters),
            "num_warps": warps,
            "num_stages": stages,
            "asserts": False,
        },
    )
