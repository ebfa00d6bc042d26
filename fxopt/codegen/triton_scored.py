"""Attention in training as Triton kernels: entries with flat parameters that call `codegen/templates/scored_attention.py`.

Sizes, strides and block sizes are literals of an entry, so its text is the whole problem. Parameters are the operands in the
order of their schema, then the results.
"""

from __future__ import annotations

from fxopt.codegen.templates.attention_config import block_of
from fxopt.codegen.templates.scored_config import TEMPLATES, ScoredConfig
from fxopt.codegen.triton_nest import PREAMBLE
from fxopt.codegen.triton_ops import POINTER_TYPE
from fxopt.errors import UnsupportedError
from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import ScoredAttention, Strided
from fxopt.ir.scored_attention_op import dropped_below
from fxopt.target import Target

MODULE = "from fxopt.codegen.templates import scored_attention"

_NONE = Strided("", (1, 1, 1, 1), (0, 0, 0, 0))
_OPTIONAL = ("bias", "mask", "seed")


def print_scored(attention: ScoredAttention, config: ScoredConfig, target: Target) -> KernelSource:
    """`attention` in configuration `config`. Raises UnsupportedError where Triton generates no code for `target`."""
    if not target.compiles_triton:
        raise UnsupportedError(f"Triton does not generate code for {target.name}")
    template, kind = TEMPLATES[attention.op], _kind(attention)
    tensors = (*attention.operands.values(), *attention.results)
    names = [f"b{k}" for k in range(len(tensors))]
    pointers = dict(zip(attention.operands, names, strict=False))
    given = [_at(pointers[n], x) if (x := attention.operands.get(n)) else "b0" for n in _parameters(attention)]
    given += [_at(n, x) for n, x in zip(names[len(pointers) :], attention.results, strict=True)]
    bias, mask = (attention.operands.get(n, _NONE) for n in ("bias", "mask"))
    query, key, value = (attention.operands[n] for n in ("query", "key", "value"))
    (batch, heads, rows, width), (groups, keys), values = query.shape, key.shape[1:3], value.shape[3]
    strides = [x.strides for n in _parameters(attention) if n not in _OPTIONAL and (x := attention.operands[n])]
    layouts = [*strides, *(x.strides for x in attention.results)] if template != "bias_gradient" else [*strides, ()]
    least, most = attention.band or (0, 0)
    drop = (dropped_below(attention.drop), 1 / (1 - attention.drop)) if "seed" in attention.operands else (0, 1.0)
    number = f'float("{attention.fill!r}")' if attention.fill == -float("inf") else repr(attention.fill)
    arguments = [
        ", ".join(given),
        f"{heads}, {rows}, {keys}, {width}, {values}, {heads // groups}",
        ", ".join(map(str, layouts)),
        f'{"bias" in attention.operands}, {bias.strides}, {bias.shape[0]}, "{kind}", {mask.strides}, {mask.shape[0]}',
        f"{attention.scale!r}, {attention.cap!r}, {number}, {attention.band is not None}, {least}, {most}, {drop}",
        f"BM={config.block_m}, BN={config.block_n}, EB={block_of(width)}, EVB={block_of(values)}",
    ]
    if template == "bias_gradient":
        arguments.append(f"B={batch}, BIAS_HEADS={bias.shape[1]}, PARTS={attention.parts}")
    call = ",\n        ".join(arguments)
    kinds = [POINTER_TYPE[attention.buffers[x.buffer].dtype] for x in tensors]
    signature = dict(zip(names, kinds, strict=True))
    entry = f"fx_{attention.op}"
    kernel = f"@triton.jit\ndef {entry}({', '.join(names)}):\n    scored_attention.{template}(\n        {call},\n    )"
    return KernelSource(
        language="triton",
        entry=entry,
        text=f"{PREAMBLE}\n{MODULE}\n\n\n{kernel}\n",
        buffers=tuple(x.buffer for x in tensors),
        sizes=(),
        grid=(config.programs(attention), 1, 1),
        compile_options={
            "signature": signature,
            "constexprs": {},
            "aligned": names,
            "num_warps": config.warps,
            "num_stages": config.stages,
            "asserts": False,
        },
    )


def _parameters(attention: ScoredAttention) -> tuple[str, ...]:
    """The tensors that the template takes, in order."""
    operands = ("query", "key", "value", "bias", "mask")
    return (
        (*operands, "seed")
        if attention.op == "scored_attention"
        else ("grad", *operands, "most", "inverse", "total", "seed")
    )


def _at(name: str, x: Strided) -> str:
    return f"{name} + {x.offset}" if x.offset else name


def _kind(attention: ScoredAttention) -> str:
    mask = attention.operands.get("mask")
    if mask is None:
        return ""
    return "boolean" if POINTER_TYPE[attention.buffers[mask.buffer].dtype] == "*i1" else "added"
