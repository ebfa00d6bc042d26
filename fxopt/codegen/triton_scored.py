"""Attention in training as Triton kernels: entries with flat parameters that call `codegen/templates/scored_attention.py`.

Sizes, strides and block sizes are literals of an entry, so its text is the whole problem; what is known only at run time is
made there from int64 parameters, one for each size symbol: a stride of n0 * 64 tells the compiler that rows are aligned.
Parameters are the operands in the order of their schema, then the results, then sizes.
"""

from __future__ import annotations

from fxopt.codegen.templates.attention_config import block_of
from fxopt.codegen.templates.scored_config import TEMPLATES, ScoredConfig
from fxopt.codegen.triton_nest import PREAMBLE
from fxopt.codegen.triton_ops import POINTER_TYPE
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Atom, Int, Sym, add, ask, floordiv, mod, mul, symbol_or_atom
from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import ScoredAttention, View
from fxopt.ir.scored_attention_op import dropped_below
from fxopt.target import Target

MODULE = "from fxopt.codegen.templates import scored_attention"

_NONE = View("", (1, 1, 1, 1), (0, 0, 0, 0))
_OPTIONAL = ("bias", "mask", "seed")


RUN = 8
"""Elements: if a bias or mask with a row for each query has rows of a multiple of these, they are read so many at a time."""

TILE = 128
"""How far a tile may reach beyond the last row or key."""


class _Sizes:
    """Integers as texts over an entry's int64 parameters, which stand for symbols and for non-linear operators on them."""

    def __init__(self) -> None:
        self.names: dict[Sym | Atom, str] = {}

    def text(self, x: Int, prefix: str = "n") -> str:
        """`x`; with another `prefix` than parameters have, of variables with their numbers."""
        if isinstance(x, int):
            return str(x)
        terms = []
        for factors, coefficient in x.terms:
            given = [prefix + self.names.setdefault(f, f"n{len(self.names)}")[1:] for f in factors]
            terms.append(" * ".join([*given, *([str(coefficient)] if coefficient != 1 or not given else [])]))
        return " + ".join(terms)

    def layout(self, x: View, far: str, near: str) -> str:
        """Strides; those within a head are made of other variables than those between."""
        return f"({''.join(f'{self.text(s, far if k < 2 else near)}, ' for k, s in enumerate(x.strides))})"

    @property
    def values(self) -> tuple[Int, ...]:
        """Of the parameters, in order."""
        return tuple(map(symbol_or_atom, self.names))


def print_scored(attention: ScoredAttention, config: ScoredConfig, target: Target) -> KernelSource:
    """`attention` in configuration `config`. Raises UnsupportedError where Triton generates no code for `target`."""
    if not target.compiles_triton:
        raise UnsupportedError(f"Triton does not generate code for {target.name}")
    sizes = _Sizes()
    tensors = (*attention.operands.values(), *attention.results)
    names = [f"b{k}" for k in range(len(tensors))]
    if any(not isinstance(x.strides[2], int) for x in _addends(attention)):
        branches = [
            _call(attention, c, sizes, *n) for c, n in ((config, "wm"), (config.in_smaller_steps(attention.op), "nn"))
        ]
        call = _choice(attention, sizes, *(text.replace("\n", "\n    ") for text in branches))
    else:
        call = _call(attention, config, sizes, "n", "n")
    kinds = [POINTER_TYPE[attention.buffers[x.buffer].dtype] for x in tensors]
    signature = dict(zip(names, kinds, strict=True)) | dict.fromkeys(sizes.names.values(), "i64")
    entry = f"fx_{attention.op}"
    return KernelSource(
        language="triton",
        entry=entry,
        text=f"{PREAMBLE}\n{MODULE}\n\n\n@triton.jit\ndef {entry}({', '.join(signature)}):\n    {call}\n",
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


def _choice(attention: ScoredAttention, sizes: _Sizes, aligned: str, call: str) -> str:
    """The body of an entry that calls `aligned` where keys are a multiple of RUN and offsets within a head fit int32, which
    is decided when it runs: else biases are read one by one, by offsets that need twice the registers each.

    What `aligned` calls so is m0, ... in int32 and w0, ... in int64.
    """
    keys = attention.operands["key"].shape[2]
    reach = [
        add(mul(add(x.shape[-2], TILE), x.strides[-2]), mul(add(x.shape[-1], TILE), x.strides[-1]))
        for x in (*attention.operands.values(), *attention.results)
        if len(x.shape) > 3
    ]
    tests = [f"({sizes.text(n)} < {2**31})" for n in dict.fromkeys(reach) if not isinstance(n, int)]
    tests += [] if isinstance(keys, int) else [f"(({sizes.text(keys)}) % {RUN} == 0)"]
    lines = []
    for symbol, name in sizes.names.items():
        whole = f" // {RUN} * {RUN}" if symbol_or_atom(symbol) == keys else ""
        lines += [f"m{name[1:]} = {name}.to(tl.int32){whole}", f"w{name[1:]} = m{name[1:]}.to(tl.int64)"]
    return "\n    ".join([*lines, f"if {' & '.join(tests)}:", f"    {aligned}", "else:", f"    {call}"])


def _call(attention: ScoredAttention, config: ScoredConfig, sizes: _Sizes, far: str, near: str) -> str:
    """The template's call, with sizes and strides within a head made of variables `near`, the others of `far`."""
    template = TEMPLATES[attention.op]
    pointers = {n: f"b{k}" for k, n in enumerate(attention.operands)}
    bias, mask = _addends(attention)
    query, key, value = (attention.operands[n] for n in ("query", "key", "value"))
    (batch, heads, rows, width), (groups, keys), values = query.shape, key.shape[1:3], value.shape[3]
    assert isinstance(heads, int) and isinstance(groups, int) and isinstance(width, int) and isinstance(values, int)

    def at(name: str, x: View) -> str:
        return f"{name} + {sizes.text(x.offset, far)}" if x.offset != 0 else name

    def of_batches(x: View) -> str:
        return f"{sizes.layout(x, far, near)}, {sizes.text(x.shape[0], far)}"

    given = [at(pointers[n], x) if (x := attention.operands.get(n)) else "b0" for n in _parameters(attention)]
    given += [at(f"b{len(pointers) + k}", x) for k, x in enumerate(attention.results)]
    laid = [x for n in _parameters(attention) if n not in _OPTIONAL and (x := attention.operands[n])]
    layouts = [sizes.layout(x, far, near) for x in laid]
    layouts += ["()"] if template == "bias_gradient" else [sizes.layout(x, far, near) for x in attention.results]
    drop = (dropped_below(attention.drop), 1 / (1 - attention.drop)) if "seed" in attention.operands else (0, 1.0)
    number = f'float("{attention.fill!r}")' if attention.fill == -float("inf") else repr(attention.fill)
    own_rows = tuple(x.strides[2] != 0 for x in (bias, mask))
    ragged = ", ".join(str(mod(n, block) != 0) for n, block in ((rows, config.block_m), (keys, config.block_n)))
    arguments = [
        ", ".join(given),
        f"{heads}, {sizes.text(rows, near)}, {sizes.text(keys, near)}, {width}, {values}, {heads // groups}",
        ", ".join(layouts),
        f'{"bias" in attention.operands}, {of_batches(bias)}, "{_kind(attention)}", {own_rows}, {of_batches(mask)}',
        f"{attention.scale!r}, {attention.cap!r}, {number}, {_ends(attention)}, {drop}",
        f"{ragged}, BM={config.block_m}, BN={config.block_n}, EB={block_of(width)}, EVB={block_of(values)}",
    ]
    if template == "bias_gradient":
        repeats = sizes.text(floordiv(batch, bias.shape[0]), far)
        arguments.append(f"REPEATS={repeats}, BIAS_HEADS={bias.shape[1]}, PARTS={sizes.text(attention.parts, far)}")
    together = ",\n        ".join(arguments)
    return f"scored_attention.{template}(\n        {together},\n    )"


def _addends(attention: ScoredAttention) -> tuple[View, View]:
    """Bias and mask."""
    bias, mask = (attention.operands.get(n, _NONE) for n in ("bias", "mask"))
    return bias, mask


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


def _kind(attention: ScoredAttention) -> str:
    mask = attention.operands.get("mask")
    if mask is None:
        return ""
    return "boolean" if POINTER_TYPE[attention.buffers[mask.buffer].dtype] == "*i1" else "added"
