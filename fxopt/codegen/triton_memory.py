"""Integers, addresses and loads of a nest as Triton expressions, with what the compiler is told of them: masks, neighbours,
alignment, which lines leave the cache first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fxopt.codegen.triton_index import computed_in_int32, in_runs, same_within
from fxopt.codegen.triton_scopes import Frame, Guards, Instance, Names, Scopes
from fxopt.codegen.triton_tiling import accumulator_dtype
from fxopt.codegen.triton_values import uncast
from fxopt.ir.exprs import Atom, Int, Sym, bounds, free_symbols, substitute, symbol
from fxopt.ir.loops import Const, Load, Masked, Scalar
from fxopt.ir.rounding import HALVES

VECTOR_BYTES = 16  # what one access of a thread takes at most
_FILLED = (torch.float32, torch.int8, *HALVES)
_WIDE_RUN = 4  # neighbours in memory that one access takes


class Memory(Scopes):
    """Prints what memory holds.

    A `step` above 0 says that loops run along the reduced symbols, of which so many are taken at a time. `registers` maps
    buffers that are no memory to the variable that a load of one means, in the compute type of its dtype.
    """

    def __init__(self, frame: Frame, names: Names, step: int, along: tuple[Sym, ...], registers: Mapping[str, str]) -> None:
        super().__init__(frame, names, along)
        self.step, self.looped, self.registers = step, step > 0, registers
        self._bound: dict[Sym, str] = {}

    # integers

    def index_text(self, x: Int, wide: bool = False) -> str:
        """An integer expression in the kernel's index type, or int64 when `wide`."""
        if isinstance(x, int):
            return str(x)
        parts = []
        for monomial, coef in x.terms:
            factors = [self._atom_text(a, wide) for a in monomial]
            if coef != 1 or not factors:
                factors.append(str(coef) if coef >= 0 else f"({coef})")
            parts.append("*".join(factors))
        return parts[0] if len(parts) == 1 else "(" + " + ".join(parts) + ")"

    def _atom_text(self, atom: Sym | Atom, wide: bool) -> str:
        if isinstance(atom, Sym):
            return self._symbol_text(atom, wide)
        a, b = (tight(self.index_text(x, wide)) for x in (atom.a, atom.b))
        if atom.kind in ("min", "max"):
            return f"tl.{atom.kind}imum({a}, {b})"
        low = bounds(atom.a)[0]
        if low is not None and low >= 0:
            return f"({a} {'//' if atom.kind == 'floordiv' else '%'} {b})"
        quotient = f"h.floor_index({a}, {b})"
        return quotient if atom.kind == "floordiv" else f"({a} - {quotient}*{b})"

    def _symbol_text(self, sym: Sym, wide: bool) -> str:
        text = self._bound.get(sym) or self.frame.axis_of(sym)
        if text is None:
            if sym.size is not None:
                raise ValueError(f"index symbol {sym!r} is not part of the nest's domain")
            text = self.names.size(sym)
        return f"{text}.to(tl.int64)" if wide and not self.frame.index64 else text

    def index_value(self, x: Int) -> str:
        """An integer expression as an int64 value."""
        if self.frame.index64:
            return self.index_text(x)
        if computed_in_int32(x):
            text = self.index_text(x)
            return f"{text}.to(tl.int64)" if _enclosed(text) else f"({text}).to(tl.int64)"
        return self.index_text(x, wide=True)

    def index_in_runs(self, x: Int, along: Sym, text: str) -> str:
        """`index_text` where `text` has the numbers of `along`."""
        self._bound[along] = text
        found = self.index_text(x)
        del self._bound[along]
        return found

    # memory

    def mask(self, symbols: frozenset[Sym], guards: Guards) -> str | None:
        """The conjunction of the axis masks along `symbols` and of `guards`; None when every lane is valid."""
        axes = self.frame.axes(symbols.union(*(g.symbols() for g in guards)))
        parts = [self.frame.masks[a] for a in self.frame.blocks if a in axes and a in self.frame.masks]
        parts += [self.text(self.instance(g, guards[:i])) for i, g in enumerate(guards)]
        return " & ".join(parts) if parts else None

    def address(self, index: Int, symbols: frozenset[Sym], wanted: frozenset[str], block: bool = False) -> str:
        """Index text whose block varies along every axis in `wanted`; a scalar, unless `block`, if only scalars vary it."""
        text = self.index_text(index)
        own, needed = (axes - self.frame.scalars for axes in (self.frame.axes(symbols), wanted))
        if needed <= own and (own or not block):
            return text
        return f"tl.zeros({self.frame.shape(wanted)}, tl.int32) + {text}"

    def _lies_along_rows(self, index: Int, wanted: frozenset[str]) -> bool:
        """Whether what is the same for all rows of a block is better loaded for each of them, as wide as the rows are.

        Triton gives [1, RB] pointers a layout of their own, with other elements for each thread, and brings the values into
        that of the block through shared memory: barriers, and a fifth of the registers of an RMS norm.
        """
        frame = self.frame
        along = list(frame.blocks)[-1]
        rows = frame.tiling.inner_reduction if along == "r" else frame.several > 1
        if self.looped or wanted != {along} or not frame.scalars.isdisjoint(frame.blocks) or not rows:
            return False
        return in_runs(index, frame.tiling.lines[along], _WIDE_RUN)

    def pointer(self, text: str, index: Int, dtype: torch.dtype, wanted: frozenset[str]) -> str:
        """`text`, the pointers at `index`, with what the frame knows of them: that they are neighbours in shorter runs where
        those of bytes are limited, or that a block's rows begin at whole vectors.
        """
        frame = self.frame
        if frame.aligned is not None and index == frame.aligned[0]:
            multiple = min(frame.aligned[1] * dtype.itemsize, VECTOR_BYTES)
            return f"tl.multiple_of({text}, {[multiple if a == 'x' else 1 for a in frame.blocks]})"
        lines = frame.tiling.lines  # of one point there is none
        for axis in (wanted - frame.single) & lines.keys() if frame.byte_run and dtype.itemsize == 1 else ():
            if (axis != "y" or frame.several == 1) and in_runs(index, lines[axis], frame.byte_run):
                return f"tl.max_contiguous({text}, {[frame.byte_run if a == axis else 1 for a in frame.blocks]})"
        return text

    def bind(self, indirect: tuple[tuple[Sym, Scalar], ...], guards: Guards) -> None:
        for sym, value in indirect:
            self._bound[sym] = self.arg(value, guards)

    def load(self, node: Load, guards: Guards) -> str:
        if node.buffer in self.registers:
            return self.registers[node.buffer]
        return widened(node, self.loaded(node, guards))

    def filled_load(self, node: Masked, guards: Guards) -> Instance | None:
        """The load in `node` that gives its value under its condition, if one access may fill in the constant elsewhere."""
        load, other = uncast(node.body), node.other
        if not (isinstance(load, Load) and isinstance(other, Const) and load.dtype in _FILLED):
            return None
        if accumulator_dtype(load.dtype) != accumulator_dtype(node.dtype) or load.buffer in self.registers or load.indirect:
            return None
        if not _holds(load.dtype, other.value):
            return None
        filled = self.instance(load, within(node, guards))
        return None if self.known(filled) not in (None, self.known((node, guards))) else filled

    def loaded(self, node: Load, guards: Guards = (), other: str = "") -> str:
        """Text of what memory holds for `node`, in its dtype there; `other` is an argument for where no `guards` hold."""
        self.bind(node.indirect, guards)
        symbols, index = node.symbols(), node.index
        row, eviction = self.frame.tiling.lines.get("r"), self.eviction
        if self.step and not guards and row in free_symbols(index) and same_within(index, row, self.step):
            start = Sym("r_base", size=row.size)  # one load for all of a step
            self._bound[start] = f"r_base{'.to(tl.int64)' if self.frame.index64 else ''}"
            symbols, index, eviction = symbols - {row}, substitute(index, {row: symbol(start)}), ""
        slow, several = self.frame.tiling.lines.get("y"), self.frame.several
        if several > 1 and slow in free_symbols(index) and same_within(index, slow, several):
            first = Sym("y_base", size=slow.size)  # one load for all rows of the block
            self._bound[first] = "y_base"
            symbols, index = symbols - {slow}, substitute(index, {slow: symbol(first)})
        wanted = self.frame.axes(symbols.union(*(g.symbols() for g in guards)))
        if self._lies_along_rows(index, wanted):
            wanted = frozenset(self.frame.blocks)
        address = self.address(index, symbols, wanted, block=bool(guards and wanted))
        mask = self.mask(symbols, guards)
        extra = f", {mask}{other}" if mask else ""
        walks = eviction != "" and self.varies(*self.instance(node, guards))
        if node.buffer in self.frame.kept and (walks or not self.looped):
            extra += ', eviction_policy="evict_last"'
        elif walks:
            extra += f', eviction_policy="{eviction}"'
        pointer = self.pointer(f"{self.names.buffer(node.buffer)} + {tight(address)}", index, node.dtype, wanted)
        return f"tl.load({pointer}{extra})"


def within(node: Masked, guards: Guards) -> Guards:
    """What holds where the body of `node` is wanted."""
    return (*guards, node.cond) if node.cond not in guards else guards


def _holds(dtype: torch.dtype, value: float) -> bool:
    """Whether `dtype` has the value as it is."""
    return math.isinf(value) or float(torch.tensor(value, dtype=dtype)) == value


def widened(node: Load, text: str) -> str:
    """`text`, which memory holds for `node`, in the dtype that is computed with."""
    return text if accumulator_dtype(node.dtype) == node.dtype else f"{text}.to(tl.float32)"


def tight(text: str) -> str:
    """`text` in parentheses unless it is one operand already."""
    return text if text.isidentifier() or text.isdigit() or _enclosed(text) else f"({text})"


def _enclosed(text: str) -> bool:
    """The first parenthesis is closed by the last character."""
    if not text.startswith("("):
        return False
    depth = 0
    for place, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return place == len(text) - 1
    return False
