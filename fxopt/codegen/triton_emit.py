"""Scalar expressions of a nest as Triton statements.

Every node is printed once per scope and mask. A kernel has the outer scope and, while a loop is open (over the reduced axis
or over points), that loop's body; nodes that do not vary along the loop go to the outer scope even when met inside. A node
below the body of a `Masked` carries the conditions it stands under (`Guards`), which mask its memory accesses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from fxopt.codegen import triton_ops as ops
from fxopt.codegen.triton_groups import GROUP_SUM
from fxopt.codegen.triton_index import computed_in_int32, in_runs, same_within
from fxopt.codegen.triton_reduce import BlockInfo, persistent, scan_block, scan_carry, state_count, working_dtype
from fxopt.codegen.triton_tiling import Tiling, accumulator_dtype
from fxopt.codegen.triton_values import (
    ARITHMETIC,
    asked_of_index,
    counts_index,
    exact_reciprocal,
    is_bell,
    is_clamped,
    is_narrow_comparison,
    is_of_half,
    is_share,
    is_within,
    larger_place,
    reduced_dtype,
    rounded_soon,
    rounded_to_8_bits,
    rounded_within_int8,
    uncast,
)
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Atom, Int, Sym, bounds, floordiv, free_symbols, mod, substitute, symbol
from fxopt.ir.loops import Const, IndexValue, Load, Masked, Op, Reduce, Scalar, Scan, postorder
from fxopt.ir.rounding import HALVES, unrounded

Guards = tuple[Scalar, ...]
Instance = tuple[Scalar, Guards]
VECTOR_BYTES = 16  # what one access of a thread takes at most
_FILLED = (torch.float32, *HALVES)
_WIDE_RUN = 4  # neighbours in memory that one access takes


@dataclass
class Names:
    """Canonical parameter names: buffers and size symbols by order of first use, and the messages of device asserts.

    The first `reserved` names of buffers are the caller's.
    """

    reserved: int = 0
    buffers: dict[str, str] = field(default_factory=dict)
    sizes: dict[Sym, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def buffer(self, name: str) -> str:
        return self.buffers.setdefault(name, f"b{self.reserved + len(self.buffers)}")

    def size(self, sym: Sym) -> str:
        return self.sizes.setdefault(sym, f"n{len(self.sizes)}")


@dataclass
class Frame:
    """What the tile looks like: its axes (whose names are the index variables), masks and block names."""

    tiling: Tiling
    index64: bool
    masks: dict[str, str]  # axis -> mask variable, for axes that need one
    blocks: dict[str, str]  # axis -> block size name, in tile order
    scalars: frozenset[str] = frozenset()  # axes of which a program has one index, a scalar: what it loads is loaded once
    single: frozenset[str] = frozenset()  # axes along which the block has one element
    byte_run: int = 0  # neighbouring 1-byte elements that a thread may take at most; 0 for any number
    aligned: tuple[Int, int] | None = None  # at this index each row of a block begins at a multiple of so many elements
    several: int = 1  # rows of a block that begins at a multiple of so many of them, its first one called y_base

    def axis_of(self, sym: Sym) -> str | None:
        return next((name for name, line in self.tiling.lines.items() if line == sym), None)

    def axes(self, symbols: frozenset[Sym]) -> frozenset[str]:
        return frozenset(a for a in map(self.axis_of, symbols) if a is not None)

    def shape(self, axes: frozenset[str]) -> str:
        """The block shape that varies along `axes` and is 1 elsewhere."""
        return "[" + ", ".join(block if a in axes else "1" for a, block in self.blocks.items()) + "]"


class Emitter:
    """Prints nodes into `outer` and, between `open_loop` and `close_loop`, `inner`.

    Loops run along the symbols `along`; a `step` above 0 says that those are the reduced ones, of which so many are taken
    at a time. `registers` maps buffers that are no memory to the variable that a load of one means, in the compute type of
    its dtype.
    """

    def __init__(
        self,
        frame: Frame,
        names: Names,
        step: int = 0,
        along: tuple[Sym, ...] = (),
        registers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.frame, self.names, self.step, self.looped = frame, names, step, step > 0
        self.registers = registers
        self._along = frozenset(along)
        self.outer: list[str] = []
        self.inner: list[str] | None = None
        self.eviction = ""
        self._outer_memo: dict[Instance, str] = {}
        self._inner_memo: dict[Instance, str] = {}
        self._touches: dict[Scalar, bool] = {}
        self._reduced = frozenset(frame.tiling.nest.reduced)
        self._rounded = rounded_soon(frame.tiling.nest)
        self._rounded_later = rounded_soon(frame.tiling.nest, ARITHMETIC)
        self._rounded_to_8_bits = rounded_to_8_bits(frame.tiling.nest)
        roots = frame.tiling.nest.roots
        self._uses = Counter([*roots, *(a for node in postorder(roots) for a in node.args)])
        self._count = 0
        self._states: dict[tuple[object, ...], list[str]] = {}
        self._bound: dict[Sym, str] = {}

    # scopes

    def open_loop(self, eviction: str) -> None:
        self.inner, self._inner_memo, self.eviction = [], {}, eviction

    def close_loop(self) -> list[str]:
        assert self.inner is not None
        body, self.inner, self.eviction = self.inner, None, ""
        return body

    def fresh(self) -> str:
        self._count += 1
        return f"v{self._count - 1}"

    def varies(self, node: Scalar, guards: Guards) -> bool:
        """The instance differs along the loop."""
        return bool(self._along & node.symbols()) or any(self._along & g.symbols() for g in guards)

    def _scope(self, instance: Instance) -> tuple[list[str], dict[Instance, str]]:
        if self.inner is not None and self.varies(*instance):
            return self.inner, self._inner_memo
        return self.outer, self._outer_memo

    def _known(self, instance: Instance) -> str | None:
        return self._scope(instance)[1].get(instance)

    def define(self, instance: Instance, text: str) -> None:
        """Record `text` (a variable or literal) as the value of `instance`."""
        self._scope(instance)[1][instance] = text

    def write(self, instance: Instance, lines: list[str]) -> None:
        self._scope(instance)[0].extend(lines)

    # traversal

    def touches_memory(self, node: Scalar) -> bool:
        """A Load or an index check lies below `node`, so the conditions it stands under matter."""
        for n in postorder((node,)):
            if n not in self._touches:
                own = isinstance(n, Load) or (isinstance(n, Op) and n.name == "checked_index")
                self._touches[n] = own or any(self._touches[a] for a in n.args)
        return self._touches[node]

    def instance(self, node: Scalar, guards: Guards) -> Instance:
        if isinstance(node, Reduce | Scan):  # its operands are wanted along the whole row
            guards = tuple(g for g in guards if not self._reduced & g.symbols())
        return node, guards if guards and self.touches_memory(node) else ()

    def operands(self, instance: Instance) -> list[Instance]:
        node, guards = instance
        if isinstance(node, Masked):
            inside = within(node, guards)
            filled = self._filled_load(node, guards)
            if filled is not None:
                return [self.instance(node.cond, guards), *self.operands(filled)]
            parts = [(node.cond, guards), (node.body, inside), (node.other, guards)]
            return [self.instance(*p) for p in parts]
        if is_narrow_comparison(node):
            return []
        conditions = [self.instance(g, guards[:i]) for i, g in enumerate(guards)]
        inner = self._beside_one(node) or self._root_below(node)  # one function computes both
        asked = asked_of_index(node)
        if asked is not None or (unrounded(node) is not node and node.dtype in HALVES):
            return [*conditions, self.instance(unrounded(node) if asked is None else asked[1], guards)]
        largest = larger_place(node)
        if largest is not None:
            value, top, _, other = largest
            return [*conditions, *(self.instance(a, guards) for a in (value, top, other))]
        alone = counts_index(node) or (isinstance(node, Op) and node.name == GROUP_SUM)
        args = node.args[:1] if alone else inner.args if inner is not None else node.args
        return [*conditions, *(self.instance(a, guards) for a in args)]

    def walk(self, roots: list[Instance]) -> Iterator[Instance]:
        """Every instance below `roots`, operands first; not below instances already printed in the current scope."""
        seen: set[Instance] = set()
        stack = [(r, False) for r in reversed(roots)]
        while stack:
            instance, ready = stack.pop()
            if ready:
                yield instance
            elif instance not in seen:
                seen.add(instance)
                if self._known(instance) is None:
                    stack.append((instance, True))
                    stack += [(o, False) for o in reversed(self.operands(instance))]

    def value(self, node: Scalar, guards: Guards = ()) -> str:
        """Text of `node`, printing whatever it needs first."""
        root = self.instance(node, guards)
        for instance in self.walk([root]):
            self._emit(instance)
        text = self._known(root)
        assert text is not None
        return text

    def _emit(self, instance: Instance) -> None:
        node, guards = instance
        if isinstance(node, Const):
            self.define(instance, ops.typed_constant(node.value, node.dtype))
        elif isinstance(node, Reduce):
            self._emit_reduce(instance, node)
        elif isinstance(node, Scan):
            self._emit_scan(instance, node)
        elif isinstance(node, Op) and node.name == "checked_index":
            self._emit_checked(instance, node)
        else:
            text = self._expression(instance)
            if not text.isidentifier():
                name = self.fresh()
                self.write(instance, [f"{name} = {text}"])
                text = name
            self.define(instance, text)
            filled = self._filled_load(node, guards) if isinstance(node, Masked) else None
            if filled is not None:  # the same where its condition holds, which is where others want it
                self.define(filled, text)

    def _expression(self, instance: Instance) -> str:
        node, guards = instance
        match node:
            case IndexValue():
                return self.index_value(node.expr)
            case Load():
                return self._load(node, guards)
            case Masked() if (filled := self._filled_load(node, guards)) is not None:
                load, inside = filled
                assert isinstance(load, Load) and isinstance(node.other, Const)
                return widened(load, self.loaded(load, inside, f", other={ops.literal(node.other.value)}"))
            case Masked():
                cond, body, other = (self._text(o) for o in self.operands(instance)[-3:])
                return f"tl.where({cond}, {body}, {other})"
            case Op():
                return self._op(node, guards)
        raise TypeError(f"not a scalar node: {node!r}")

    def _text(self, instance: Instance) -> str:
        text = self._known(instance)
        assert text is not None, f"operand not printed yet: {instance!r}"
        return text

    def arg(self, node: Scalar, guards: Guards) -> str:
        return self._text(self.instance(node, guards))

    # operators

    def _op(self, node: Op, guards: Guards) -> str:
        if is_narrow_comparison(node):
            left, right = (self._narrow_text(a) for a in node.args)
            return ops.apply(node.name, [left, right], torch.int32, torch.bool)
        asked = asked_of_index(node)
        if asked is not None:
            index, wanted = asked
            args = [self.index_text(index.expr), f"h.as_natural({self.arg(wanted, guards)})"]
            return ops.apply(node.name, args, torch.int32, torch.bool)
        largest = larger_place(node)
        if largest is not None:
            value, top, place, other = largest
            texts = [self.arg(value, guards), self.arg(top, guards), str(place), self.arg(other, guards)]
            return f"h.larger_place({', '.join(texts)}, {ops.tl_type(value.dtype)})"
        if counts_index(node):
            return self._rand(self.arg(node.args[0], guards), node.args[1].expr)  # type: ignore[attr-defined]
        if node.name == GROUP_SUM:
            return self._group_sum(node, guards)
        beside = self._beside_one(node)
        if beside is not None:
            coarse = "coarse_" if beside.name == "erf" and node in self._rounded_to_8_bits else ""
            return f"h.{coarse}{beside.name}_plus_one({self.arg(beside.args[0], guards)})"
        root = self._root_below(node)
        if root is not None:
            return ops.apply("rsqrt", [self.arg(root.args[0], guards)], torch.float32, torch.float32, fast=True)
        within = rounded_within_int8(node)
        if within is not None:
            value, low, high = within
            return f"h.rounded_to_int8({self.arg(value, guards)}, {low!r}, {high!r})"
        inner = unrounded(node)
        if inner is not node and node.dtype in HALVES:
            return f"h.rounded_to_half({self.arg(inner, guards)}, {ops.tl_type(node.dtype)})"
        args = [self.arg(a, guards) for a in node.args]
        source = node.args[0].dtype
        if node.name == "cast":
            if self.registers and source == torch.int8 and node.dtype == torch.float32:  # memory does not bound epilogues
                return f"h.int8_to_float32({args[0]})"
            return ops.cast(args[0], source, node.dtype)
        if node.name == "bitcast":
            return ops.bitcast(args[0], source, node.dtype, is_clamped(node.args[0]))
        if node.name in ops.INFIX and not all(isinstance(a, Const) for a in node.args) and source != torch.bool:
            args = [ops.literal(a.value) if isinstance(a, Const) else t for a, t in zip(node.args, args, strict=True)]
        reciprocal = exact_reciprocal(node.args[1]) if node.name == "truediv" else None
        if reciprocal is not None:  # the same value without a division's slow path
            return f"({args[0]} * {reciprocal!r})"
        if is_share(node):
            share = "share_before_rounding" if self._may_be_fast(node) else "share"
            return f"h.{share}({', '.join(args)})"
        if (is_bell(node) or is_of_half(node)) and node in self._rounded_later:
            return f"h.flushing_exp({args[0]})"
        if self._divides_many(node):
            return f"h.divide_many({', '.join(args)})"
        if node.name in ("floordiv", "remainder") and not source.is_floating_point and source.is_signed is False:
            return f"({args[0]} {'//' if node.name == 'floordiv' else '%'} {args[1]})"
        return ops.apply(node.name, args, source, node.dtype, self._may_be_fast(node))

    def _group_sum(self, node: Op, guards: Guards) -> str:
        """Raises UnsupportedError where neighbours in the tile are not the rows of a group."""
        value, member, size = node.args[0], node.args[1].expr, node.args[2].value  # type: ignore[attr-defined]
        x = symbol(self.frame.tiling.lines["x"])
        if member not in (x, mod(x, size)):
            raise UnsupportedError("the rows of a group are no neighbours")
        column = self.frame.shape(frozenset(("x",)))
        return f"h.group_sum(tl.broadcast_to({self.arg(value, guards)}, {column}), {size})"

    def _may_be_fast(self, node: Op) -> bool:
        """Whether the error of a fast form of `node` is not seen in what is stored."""
        if node in self._rounded or node.dtype in ops.HALF:
            return True
        by_number = node.name == "truediv" and isinstance(uncast(node.args[1]), Const)  # as a mean has it
        return (by_number or node.name in ops.FEW_UNITS) and node in self._rounded_later

    def _divides_many(self, node: Op) -> bool:
        """Whether `node` is an exact float32 quotient whose divisor is the same for neighbours in the block."""
        if node.name != "truediv" or node.dtype != torch.float32 or self._may_be_fast(node):
            return False
        along = list(self.frame.blocks)[-1]
        whole, divisor = (self.frame.axes(n.symbols()) - self.frame.scalars for n in (node, node.args[1]))
        return len(self.frame.blocks) > 1 and along in whole - divisor

    def _root_below(self, node: Scalar) -> Op | None:
        """The square root of which `node` is the reciprocal, if one instruction may compute both."""
        if not (
            isinstance(node, Op) and node.name == "reciprocal" and node.dtype == torch.float32 and self._may_be_fast(node)
        ):
            return None
        root = node.args[0]
        return root if isinstance(root, Op) and root.name == "sqrt" else None

    def _beside_one(self, node: Scalar) -> Op | None:
        """The function of `node` if that is 1 + erf(...) or 1 + tanh(...) in float32, as normal distributions and what comes
        close to them have it: such a sum is one expression, with tanh only if nobody else wants that and the sum is rounded.
        """
        if not (isinstance(node, Op) and node.name == "add" and accumulator_dtype(node.dtype) == torch.float32):
            return None
        one, other = node.args if isinstance(node.args[0], Const) else reversed(node.args)
        if not (isinstance(one, Const) and one.value == 1 and isinstance(other, Op)):
            return None
        alone = other.name == "tanh" and self._uses[other] == 1 and self._may_be_fast(node)
        return other if other.name == "erf" or alone else None

    def _rand(self, seed: str, counter: Int) -> str:
        """`h.rand`, its quotient and remainder taken from as few symbols as possible: LLVM sees what neighbours share."""
        return f"h.rand_word({seed}, {self.index_value(floordiv(counter, 4))}, {self.index_value(mod(counter, 4))})"

    def _exponential(self) -> str:
        """What persistent softmax statistics take exp with: the function that the row's other exponentials use, so that the
        compiler finds them equal; alone, the fast one, whose error vanishes in a sum that is at least 1."""
        nodes = [n for n in postorder(self.frame.tiling.nest.roots) if isinstance(n, Op) and n.name == "exp"]
        if not nodes:
            return "h.flushing_exp"
        return "libdevice.exp" if any(n not in self._rounded and n.dtype not in ops.HALF for n in nodes) else "tl.exp"

    def _narrow_text(self, node: Scalar) -> str:
        return str(node.value) if isinstance(node, Const) else self.index_text(node.expr)  # type: ignore[attr-defined]

    def _emit_checked(self, instance: Instance, node: Op) -> None:
        index, size = (self.arg(a, instance[1]) for a in node.args)
        name = self.fresh()
        if is_within(*node.args):
            self.write(instance, [f"{name} = h.wrap_index({index}, {size})"])
            self.define(instance, name)
            return
        known = f" for dimension of size {node.args[1]!r}" if isinstance(node.args[1], Const) else ""
        message = f"index out of bounds{known}"
        if message not in self.names.errors:
            self.names.errors.append(message)
        mask = self.mask(node.symbols(), instance[1])
        guard = f", mask={mask}" if mask else ""
        self.write(
            instance,
            [
                f"{name} = h.wrap_index({index}, {size})",
                f'tl.device_assert(({name} >= 0) & ({name} < {size}), "{message}"{guard})',
            ],
        )
        self.define(instance, name)

    # memory

    def mask(self, symbols: frozenset[Sym], guards: Guards) -> str | None:
        """The conjunction of the axis masks along `symbols` and of `guards`; None when every lane is valid."""
        axes = self.frame.axes(symbols.union(*(g.symbols() for g in guards)))
        parts = [self.frame.masks[a] for a in self.frame.blocks if a in axes and a in self.frame.masks]
        parts += [self._text(self.instance(g, guards[:i])) for i, g in enumerate(guards)]
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
        for axis in wanted - frame.single if frame.byte_run and dtype.itemsize == 1 else ():
            if (axis != "y" or frame.several == 1) and in_runs(index, frame.tiling.lines[axis], frame.byte_run):
                return f"tl.max_contiguous({text}, {[frame.byte_run if a == axis else 1 for a in frame.blocks]})"
        return text

    def bind(self, indirect: tuple[tuple[Sym, Scalar], ...], guards: Guards) -> None:
        for sym, value in indirect:
            self._bound[sym] = self.arg(value, guards)

    def _load(self, node: Load, guards: Guards) -> str:
        if node.buffer in self.registers:
            return self.registers[node.buffer]
        return widened(node, self.loaded(node, guards))

    def _filled_load(self, node: Masked, guards: Guards) -> Instance | None:
        """The load in `node` that gives its value under its condition, if one access may fill in the constant elsewhere."""
        load, other = uncast(node.body), node.other
        if not (isinstance(load, Load) and isinstance(other, Const) and load.dtype in _FILLED):
            return None
        if accumulator_dtype(load.dtype) != accumulator_dtype(node.dtype) or load.buffer in self.registers or load.indirect:
            return None
        if not _holds(load.dtype, other.value):
            return None
        filled = self.instance(load, within(node, guards))
        return None if self._known(filled) not in (None, self._known((node, guards))) else filled

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
        if eviction and self.varies(*self.instance(node, guards)):
            extra += f', eviction_policy="{eviction}"'
        pointer = self.pointer(f"{self.names.buffer(node.buffer)} + {tight(address)}", index, node.dtype, wanted)
        return f"tl.load({pointer}{extra})"

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
            return f"({text}).to(tl.int64)" if not text.startswith("(") else f"{text}.to(tl.int64)"
        return self.index_text(x, wide=True)

    # reductions and scans

    def block(self) -> BlockInfo:
        extent = self.frame.tiling.r.extent
        share = repr(1 / extent) if isinstance(extent, int) and extent > 0 and extent & (extent - 1) == 0 else None
        shape = f"[{', '.join(self.frame.blocks.values())}]"
        return BlockInfo(shape, self.frame.masks.get("r"), self.index_text(extent), share)

    def state_names(self, node: Reduce, guards: Guards, looped: bool) -> tuple[list[str], bool]:
        """The variables of a reduction's result (shared by its outputs) and whether they are new."""
        key = (node.kind, node.operands, node.dtype, guards)
        if key in self._states:
            return self._states[key], False
        self._states[key] = [self.fresh() for _ in range(state_count(node.kind, looped))]
        return self._states[key], True

    def result(self, node: Reduce, names: list[str]) -> str:
        """Text of one output of a finished reduction in the compute type of its dtype."""
        if node.kind in ("argmax", "argmin"):
            return names[1]
        working = working_dtype(reduced_dtype(node))
        return ops.cast(names[node.output], working, node.dtype)

    def reduce_operands(self, node: Reduce, guards: Guards) -> list[str]:
        """Printed operands, the first in the working dtype."""
        texts = [self.value(o, guards) for o in node.operands]
        texts[0] = ops.cast(texts[0], node.operands[0].dtype, working_dtype(reduced_dtype(node)))
        return texts

    def _emit_reduce(self, instance: Instance, node: Reduce) -> None:
        names, new = self.state_names(node, instance[1], looped=False)
        if new:
            if self.looped:
                raise ValueError(f"reduction met outside its pass: {node!r}")
            dtype = working_dtype(reduced_dtype(node))
            operands = self.reduce_operands(node, instance[1])
            self.write(instance, persistent(node.kind, names, operands, dtype, self.block(), self._exponential()))
        self.define(instance, self.result(node, names))

    def _emit_scan(self, instance: Instance, node: Scan) -> None:
        name = self.fresh()
        dtype = working_dtype(node.dtype)
        value = ops.cast(self.arg(node.operand, instance[1]), node.operand.dtype, dtype)
        self.write(instance, scan_block(name, node.kind, value, dtype, self.block()))
        if self.inner is not None:
            start = ops.literal(ops.identity(node.kind, dtype))
            column = self.frame.shape(frozenset(self.frame.blocks) - {"r"})
            self.outer.append(f"{name}_c = tl.full({column}, {start}, {ops.compute_type(dtype)})")
            self.inner.extend(scan_carry(name, node.kind))
        self.define(instance, ops.cast(name, dtype, node.dtype))


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
