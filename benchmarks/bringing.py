"""Kernels that bring into the L2 cache what later ones of their plan will read, beside what they do (`weights_ahead.py`).

As by `fxopt/codegen/triton_chain.py` this is done to the finished text. What is brought may be written by others
meanwhile: a cache line that has been asked for changes no value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fxopt.codegen.triton_chain import OTHERS_END
from fxopt.errors import UnsupportedError
from fxopt.ir.kernel import KernelSource

LINE = 128
"""Bytes of the L2 cache's lines."""

MOST_AT_A_TIME = 512 << 10
"""Bytes that a program asks for at a time (`bulk.bring_share`)."""

SMALL = 4096
"""Of its own, at a time."""

_IMPORT = "from benchmarks import bulk"
_INDENT = "    "


@dataclass(frozen=True)
class Piece:
    """`size` bytes of `buffer`, from byte `first` on."""

    buffer: str
    first: int
    size: int


def programs_of(source: KernelSource) -> int | None:
    """How many programs run `source`, if that is known and they are counted along one dimension."""
    programs, *others = source.grid
    return programs if isinstance(programs, int) and others == [1, 1] else None


def bringing(source: KernelSource, pieces: Sequence[Piece], own: Sequence[tuple[str, int]] = ()) -> KernelSource:
    """`source` with programs that share out `pieces` between them, and bring those before they wait for other kernels; first
    of all so many bytes of what some of its `own` parameters point to.

    Where pieces lie and how large they are are parameters: the text depends on how many there are. Raises
    UnsupportedError for kernels whose programs are unknown in number or not in one dimension, and batched ones.
    """
    programs = programs_of(source)
    if programs is None or source.members or source.language != "triton":
        raise UnsupportedError("a kernel whose programs cannot share out what they bring")
    names = [f"ahead{k}" for k in range(len(pieces))]
    lines = [f"{_INDENT}bulk.bring_share({name}, 0, {size}, {SMALL})\n" for name, size in own]
    lines += [f"{_INDENT}bulk.bring_share({n}, {n}_first, {n}_size, {n}_each)\n" for n in names]
    given = source.compile_options["signature"]
    sizes = {f"{n}_{what}": kind for n in names for what, kind in (("first", "i64"), ("size", "i32"), ("each", "i32"))}
    pointers = {p: kind for p, kind in given.items() if kind.startswith(("*", "tensordesc"))}
    signature = pointers | dict.fromkeys(names, "*u8") | {p: given[p] for p in given if p not in pointers} | sizes
    blocks = [f"{block}: tl.constexpr" for block in source.compile_options["constexprs"]]
    values = [value for piece in pieces for value in (piece.first, piece.size, _portion(piece.size, programs))]
    return replace(
        source,
        text=_inserted(source, [*signature, *blocks], lines),
        buffers=(*source.buffers, *(piece.buffer for piece in pieces)),
        sizes=(*source.sizes, *values),
        compile_options=source.compile_options | {"signature": signature},
    )


def _portion(size: int, programs: int) -> int:
    """Bytes that each program asks for at a time, so that all have something to ask for."""
    lines = -(-size // (programs * LINE))
    return min(max(lines, 1) * LINE, MOST_AT_A_TIME)


def _inserted(source: KernelSource, parameters: Sequence[str], lines: Sequence[str]) -> str:
    """The text with other parameters of the entry, and `lines` after what it loads before it waits."""
    head = re.search(rf"^def {re.escape(source.entry)}\(.*\):\n", source.text, re.MULTILINE)
    if head is None:
        raise UnsupportedError(f"no function {source.entry} with its parameters on one line")
    body, marker = source.text[head.end() :], f"{_INDENT}{OTHERS_END}\n"
    before, waits, after = body.partition(marker) if marker in body else ("", marker, body)
    opening = f"{_IMPORT}\n{source.text[: head.start()]}def {source.entry}({', '.join(parameters)}):\n"
    return f"{opening}{before}{''.join(lines)}{waits}{after}"
