"""Attention in training as Triton kernels: entries with flat parameters that call `codegen/templates/scored_attention.py`.

Sizes, strides and block sizes are literals of an entry, so its text is the whole problem; what is known only at run time is
made there from int64 parameters, one for each size symbol: a stride of n0 * 64 tells the compiler that rows are aligned.
Parameters are the operands in the order of their schema, then the results, then sizes.
"""

from __future__ import annotations

from collections.abc import Iterable

from fxopt.codegen.templates.attention_config import block_of
from fxopt.codegen.templates.scored_config import TEMPLATES, ScoredConfig
from fxopt.codegen.triton_nest import PREAMBLE
from fxopt.codegen.triton_ops import POINTER_TYPE
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Atom, Int, Sym, add, ask, floordiv, mod, symbol_or_atom
from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import ScoredAttention, View
from fxopt.ir.scored_attention_op import dropped_below
from fxopt.target import Target

MODULE = "from fxopt.codegen.templates import scored_attention"

_NONE = View("", (1, 1, 1, 1), (0, 0, 0, 0))
_OPTIONAL = ("bias", "mask", "seed")


class _Sizes:
    """Integers as texts over an entry's int64 parameters, which stand for symbols and for non-linear operators on them."""

    def __init__(self) -> None:
        self.names: dict[Sym | Atom, str] = {}

    def text(self, x: Int) -> str:
        if isinstance(x, int):
            return str(x)
        terms = []
        for factors, coefficient in x.terms:
            given = [self.names.setdefault(f, f"n{len(self.names)}") for f in factors]
            terms.append(" * ".join([*given, *([str(coefficient)] if coefficient != 1 or not given else [])]))
        return " + ".join(terms)

    def texts(self, xs: Iterable[Int]) -> str:
        return f"({''.join(f'{self.text(x)}, ' for x in xs)})"

    @property
    def values(self) -> tuple[Int, ...]:
        """Of the parameters, in order."""
        return tuple(map(symbol_or_atom, self.names))


def print_scored(attention: ScoredAttention, config: ScoredConfig, target: Target) -> KernelSource:
    """`attention` in configuration `config`. Raises UnsupportedError where Triton generates no code for `target`."""
    if not target.compiles_triton:
        raise UnsupportedError(f"Triton does not generate code for {target.name}")
    template, kind, sizes = TEMPLATES[attention.op], _kind(attention), _Sizes()
    tensors = (*attention.operands.values(), *attention.results)
    names = [f"b{k}" for k in range(len(tensors))]
    pointers = dict(zip(attention.operands, names, strict=False))
    given = [_at(pointers[n], x, sizes) if (x := attention.operands.get(n)) else "b0" for n in _parameters(attention)]
    given += [_at(n, x, sizes) for n, x in zip(names[len(pointers) :], attention.results, strict=True)]
    bias, mask = (attention.operands.get(n, _NONE) for n in ("bias", "mask"))
    query, key, value = (attention.operands[n] for n in ("query", "key", "value"))
    (batch, heads, rows, width), (groups, keys), values = query.shape, key.shape[1:3], value.shape[3]
    assert isinstance(heads, int) and isinstance(groups, int) and isinstance(width, int) and isinstance(values, int)
    strides = [x.strides for n in _parameters(attention) if n not in _OPTIONAL and (x := attention.operands[n])]
    layouts = [*strides, *(x.strides for x in attention.results)] if template != "bias_gradient" else [*strides, ()]
    drop = (dropped_below(attention.drop), 1 / (1 - attention.drop)) if "seed" in attention.operands else (0, 1.0)
    number = f'float("{attention.fill!r}")' if attention.fill == -float("inf") else repr(attention.fill)
    of_bias, of_mask = (f"{sizes.texts(x.strides)}, {sizes.text(x.shape[0])}" for x in (bias, mask))
    own_rows = tuple(x.strides[2] != 0 for x in (bias, mask))
    ragged = ", ".join(str(mod(n, block) != 0) for n, block in ((rows, config.block_m), (keys, config.block_n)))
    arguments = [
        ", ".join(given),
        f"{heads}, {sizes.text(rows)}, {sizes.text(keys)}, {width}, {values}, {heads // groups}",
        ", ".join(map(sizes.texts, layouts)),
        f'{"bias" in attention.operands}, {of_bias}, "{kind}", {own_rows}, {of_mask}',
        f"{attention.scale!r}, {attention.cap!r}, {number}, {_ends(attention)}, {drop}",
        f"{ragged}, BM={config.block_m}, BN={config.block_n}, EB={block_of(width)}, EVB={block_of(values)}",
    ]
    if template == "bias_gradient":
        repeats = sizes.text(floordiv(batch, bias.shape[0]))
        arguments.append(f"REPEATS={repeats}, BIAS_HEADS={bias.shape[1]}, PARTS={sizes.text(attention.parts)}")
    call = ",\n        ".join(arguments)
    kinds = [POINTER_TYPE[attention.buffers[x.buffer].dtype] for x in tensors]
    signature = dict(zip(names, kinds, strict=True)) | dict.fromkeys(sizes.names.values(), "i64")
    entry = f"fx_{attention.op}"
    kernel = f"@triton.jit\ndef {entry}({', '.join(signature)}):\n    scored_attention.{template}(\n        {call},\n    )"
    return KernelSource(
        language="triton",
        entry=entry,
        text=f"{PREAMBLE}\n{MODULE}\n\n\n{kernel}\n",
        buffers=tuple(x.buffer for x in tensors),
        sizes=sizes.values,
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


def _ends(attention: ScoredAttention) -> str:
    """Of the band, each with whether it may hide a key."""
    if attention.band is None:
        return "False, 0, False, 0"
    (least, most), rows, keys = attention.band, attention.operands["query"].shape[2], attention.operands["key"].shape[2]
    low = -least < 2**31 and ask("<=", add(rows, least), 1) is not True
    high = most < 2**31 and ask("<=", keys, most + 1) is not True
    return f"{low}, {least if low else 0}, {high}, {most if high else 0}"


def _parameters(attention: ScoredAttention) -> tuple[str, ...]:
    """The tensors that the template takes, in order."""
    operands = ("query", "key", "value", "bias", "mask")
    return (
        (*operands, "seed")
        if attention.op == "scored_attention"
        else ("grad", *operands, "most", "inverse", "total", "seed")
    )


def _at(name: str, x: View, sizes: _Sizes) -> str:
    return f"{name} + {sizes.text(x.offset)}" if x.offset != 0 else name


def _kind(attention: ScoredAttention) -> str:
    mask = attention.operands.get("mask")
    if mask is None:
        return ""
    return "boolean" if POINTER_TYPE[attention.buffers[mask.buffer].dtype] == "*i1" else "added"
