"""Attention as Triton kernels: entries with flat parameters that call the templates of `codegen/templates/attention.py`.

Sizes, strides and block sizes are literals of an entry, so its text is the whole problem. Of `attend`, b0, b1 and b2 are
query, key and value; then come the mask and factors, if there are any, what is stored, and what scores are computed from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fxopt.codegen.templates.attention_config import AttentionConfig, block_of
from fxopt.codegen.triton import Printed
from fxopt.codegen.triton_block import BlockFunction, print_block
from fxopt.codegen.triton_chain import OTHERS_END
from fxopt.codegen.triton_names import operations
from fxopt.codegen.triton_nest import PREAMBLE
from fxopt.codegen.triton_ops import POINTER_TYPE
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, contiguous_strides
from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import Attention, BufferSpec, Factors, Strided
from fxopt.target import Target

MODULE = "from fxopt.codegen.templates import attention"

_SCORES = "scores"
_JOIN = AttentionConfig(1, 1, warps=4, stages=1)
"""How parts are joined; only warps and stages count."""


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
    factors = () if attention.factors is None else tuple(dict.fromkeys(attention.factors.buffers))
    results = [f"b{len(operands) + len(factors) + k}" for k in range(len(stored))]
    scores = _scores(attention, config, len(operands) + len(factors) + len(results))
    given = [*operands, *(["b0"] if mask is None else []), *results]
    if not split:
        given[-1:] = [given[-1] + _plus(attention.out), given[-1]]
    _, heads, rows, width = attention.query.shape
    groups, keys, value_width = attention.key.shape[1], attention.key.shape[2], attention.value.shape[3]
    boolean = mask is not None and attention.buffers[mask.buffer].dtype == torch.bool
    strides = (0, 0, 0, 0) if mask is None else mask.strides
    sizes = f"{heads}, {rows}, {keys}, {width}, {value_width}, {heads // groups}"
    layouts = ", ".join(map(str, (attention.query.strides[:3], attention.key.strides, attention.value.strides)))
    meaning = f'{attention.scale!r}, {attention.causal}, "{_kind(attention)}", {boolean}'
    blocks = f"BM={config.block_m}, BN={config.block_n}, EB={block_of(width)}, EVB={block_of(value_width)}"
    way = f'PACK={config.pack}, SPLIT={config.split}, PRECISION="ieee", SCORES={_SCORES if scores.text else None}'
    pointers, kinds = _factors(attention, {name: f"b{len(operands) + k}" for k, name in enumerate(factors)})
    kinds += f", BOUNDED={config.bounded}"
    bringing = ""
    if split and not config.bounded and attention.key.strides[3] == attention.value.strides[3] == 1:
        part = f"BM={config.block_m}, BN={config.block_n}, PACK={config.pack}, SPLIT={config.split}"
        given_part = f"{operands[1]}, {operands[2]}, {sizes}, {attention.key.strides}, {attention.value.strides}, {part}"
        bringing = f"attention.bring_part({given_part})\n    {OTHERS_END}\n    "
    call = (
        f"{bringing}attention.attend(\n        {', '.join(given)}, {scores.extra}, {pointers}, {sizes},\n"
        f"        {layouts}, {strides}, {attention.out.strides},\n        {meaning},\n        {blocks}, {way}{kinds},\n    )"
    )
    types = [POINTER_TYPE[attention.buffers[x.buffer].dtype] for x in attention.operands]
    types += [POINTER_TYPE[attention.buffers[name].dtype] for name in factors]
    types += ["*fp32", "*fp32"] if split else [POINTER_TYPE[attention.dtype]]
    parameters = {f"b{k}": kind for k, kind in enumerate(types)} | scores.parameters
    buffers = (*(x.buffer for x in attention.operands), *factors, *stored, *scores.buffers)
    return _source(_name(attention, split), call, parameters, buffers, config.programs(attention), config, scores)


def _name(attention: Attention, split: bool) -> str:
    words = ["fx_attention"]
    if attention.scores is not None:
        words += operations(attention.scores.region.nest)
    words += [] if attention.factors is None else ["narrow"]
    return "_".join(words + ["causal"] * attention.causal + ["masked"] * (attention.mask is not None) + ["split"] * split)


_NOTHING = BlockFunction("", {}, (), ())


def _factors(attention: Attention, names: Mapping[str, str]) -> tuple[str, str]:
    """The template's arguments for factors: pointers, of which those that it does not read are b0, and what they mean."""
    factors = attention.factors or Factors(None, None, None)
    query = "b0" if factors.query is None else names[factors.query]
    pointers = [query, *("b0" if x is None else names[x.buffer] + _plus(x) for x in (factors.key, factors.value))]
    kinds = ["" if x is None else "row" if x.strides[2] else "head" for x in (factors.key, factors.value)]
    strides = [(0, 0, 0) if x is None else x.strides for x in (factors.key, factors.value)]
    return ", ".join(pointers), f", FACTORS={(factors.query is not None, *kinds, *strides)}"


def _scores(attention: Attention, config: AttentionConfig, reserved: int) -> BlockFunction:
    """What is done to scores, as the function that the template calls."""
    scores = attention.scores
    if scores is None:
        return _NOTHING
    rows, keys = attention.query.shape[2], attention.key.shape[2]
    extents = (rows, rows * config.pack % config.block_m != 0), (keys, keys % config.block_n != 0)
    return print_block(_SCORES, scores.region, scores.axes, extents, {scores.product: "acc"}, reserved, returns=True)


def _join(attention: Attention, config: AttentionConfig, stored: Sequence[str]) -> KernelSource:
    batch, heads, rows, _ = attention.query.shape
    width = attention.value.shape[3]
    call = (
        f"attention.join(\n        b0, b1, b2{_plus(attention.out)}, {heads}, {rows}, {width}, {attention.out.strides},\n"
        f'        "{_kind(attention)}", '
        f"SPLIT={config.split}, PARTS={block_of(config.split, 1)}, EVB={block_of(width)},\n    )"
    )
    parameters = {"b0": "*fp32", "b1": "*fp32", "b2": POINTER_TYPE[attention.dtype]}
    programs = batch * heads * rows
    return _source("fx_attention_join", call, parameters, (*stored, attention.out.buffer), programs, _JOIN, _NOTHING)


def _kind(attention: Attention) -> str:
    """The template's word for what else there is to scores."""
    mask = attention.mask
    if attention.scores is not None:
        return "function"
    return "" if mask is None else "rows" if mask.strides[1] or mask.strides[2] else "row"


def _plus(view: Strided) -> str:
    return f" + {view.offset}" if view.offset else ""


def _source(
    entry: str,
    call: str,
    parameters: dict[str, str],
    buffers: tuple[str, ...],
    programs: int,
    config: AttentionConfig,
    scores: BlockFunction,
) -> KernelSource:
    kernel = f"@triton.jit\ndef {entry}({', '.join(parameters)}):\n    {call}"
    return KernelSource(
        language="triton",
        entry=entry,
        text="\n\n\n".join(part for part in (f"{PREAMBLE}\n{MODULE}", scores.text, kernel) if part) + "\n",
        buffers=buffers,
        sizes=scores.sizes,
        grid=(programs, 1, 1),
        compile_options={
            "signature": parameters,
            "constexprs": {},
            "aligned": [p for p, kind in parameters.items() if kind.startswith("*")],
            "num_warps": config.warps,
            "num_stages": config.stages,
            "asserts": False,
        },
    )
