"""Scalar expressions of the loop IR as C++ statements, each placed in the outermost block where its indices are known.

A value is a vector when it depends on the vectorised symbol, else a plain scalar, converted by `fx::splat` where a vector is
needed. Blocks (`Scope`) mirror the nesting of the printed code; what is computed in one is reused in the blocks inside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fxopt.codegen.cpp_domain import narrow_index, takes_narrow
from fxopt.codegen.cpp_ops import divides_integers, literal, op_text, stored_type, value_type
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Atom, Int, Sym, coefficient, free_symbols
from fxopt.ir.loops import Const, IndexValue, Load, Masked, Op, Reduce, Scalar, Scan, Store, postorder
from fxopt.ir.region import BufferSpec

ALL = "fx::All{}"
_ATOMS = {"floordiv": "index_div", "mod": "index_mod", "min": "index_min", "max": "index_max"}


@dataclass
class Names:
    """Canonical names for the parameters of one kernel: buffers and size symbols in order of first use, error messages."""

    buffers: dict[str, str] = field(default_factory=dict)
    sizes: dict[Sym, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    count: int = 0

    def buffer(self, name: str) -> str:
        return self.buffers.setdefault(name, f"b{len(self.buffers)}")

    def size(self, sym: Sym) -> str:
        return self.sizes.setdefault(sym, f"n{len(self.sizes)}")

    def error(self, message: str) -> int:
        """The code of `message`."""
        if message not in self.errors:
            self.errors.append(message)
        return self.errors.index(message) + 1

    def fresh(self, prefix: str = "t") -> str:
        self.count += 1
        return f"{prefix}{self.count}"


@dataclass
class Scope:
    """A block of printed code: the index symbols known in it, its statements, and the values computed so far.

    `on` is the text of the lanes that exist. A `guarded` block runs only where a condition holds: nothing moves out of it.
    """

    parent: Scope | None
    symbols: frozenset[Sym]
    on: str = ALL
    guarded: bool = False
    lines: list[str] = field(default_factory=list)
    values: dict[Scalar, str] = field(default_factory=dict)
    splats: dict[str, str] = field(default_factory=dict)

    def find(self, node: Scalar) -> str | None:
        scope: Scope | None = self
        while scope is not None:
            if node in scope.values:
                return scope.values[node]
            scope = scope.parent
        return None

    def home(self, symbols: frozenset[Sym], results: frozenset[Scalar]) -> Scope:
        """The outermost block, this one or around it, in which these index symbols and loop results are known."""
        scope = self
        while (
            scope.parent is not None
            and not scope.guarded
            and symbols <= scope.parent.symbols
            and all(scope.parent.find(r) is not None for r in results)
        ):
            scope = scope.parent
        return scope

    def child(self, *symbols: Sym, on: str | None = None, guarded: bool = False) -> Scope:
        return Scope(self, self.symbols | frozenset(symbols), on or self.on, guarded)


class Emitter:
    """Prints values into scopes. `lanes` is the vectorised symbol (or None), `indices` the C++ names of loop symbols."""

    def __init__(self, names: Names, lanes: Sym | None, buffers: dict[str, BufferSpec]) -> None:
        self.names, self.lanes, self.specs = names, lanes, buffers
        self.indices: dict[Sym, str] = {}
        self._results: dict[Scalar, frozenset[Scalar]] = {}

    def home(self, node: Scalar, scope: Scope) -> Scope:
        """Where `node` is computed when it is wanted in `scope`."""
        return scope.home(node.symbols() & self.indices.keys(), self.loop_results(node))

    def loop_results(self, node: Scalar) -> frozenset[Scalar]:
        """The reductions and scans that `node` is computed from, those inside other reductions left out."""
        if node not in self._results:
            for below in postorder((node,)):
                if below not in self._results:
                    own = isinstance(below, Reduce | Scan)
                    parts = (self._results[a] for a in below.args)
                    self._results[below] = frozenset((below,)) if own else frozenset().union(*parts)
        return self._results[node]

    def is_vector(self, node: Scalar) -> bool:
        return self.lanes is not None and self.lanes in node.symbols()

    def on(self, scope: Scope, vector: bool) -> str:
        return scope.on if vector else ALL

    # ---- integer expressions ----

    def index(self, expr: Int, bound: dict[Sym, str] | None = None) -> str:
        """`expr` as scalar int64 text; the vectorised symbol stands for the first lane."""
        return self._sum(expr, lambda s: (bound or {}).get(s) or self._symbol(s), None)

    def _symbol(self, sym: Sym) -> str:
        return self.indices[sym] if sym in self.indices else self._size(sym)

    def _size(self, sym: Sym) -> str:
        if sym.size is not None:
            raise UnsupportedError(f"index {sym} is used outside its loop")
        return self.names.size(sym)

    def _sum(self, expr: Int, leaf, vectors: frozenset[Sym] | None) -> str:  # type: ignore[no-untyped-def]
        if isinstance(expr, int):
            return f"int64_t({expr})" if vectors is not None or abs(expr) >= 2**31 else str(expr)
        parts = []
        for monomial, coef in expr.terms:
            factors = sorted(self._factor(a, leaf, vectors) for a in monomial)
            if coef != 1 or not factors:
                factors.insert(0, f"int64_t({coef})" if vectors is not None or abs(coef) >= 2**31 else str(coef))
            parts.append((-len(monomial), " * ".join(factors)))
        text = " + ".join(p for _, p in sorted(parts))
        return f"({text})" if len(parts) > 1 else text

    def _factor(self, atom: Sym | Atom, leaf, vectors: frozenset[Sym] | None) -> str:  # type: ignore[no-untyped-def]
        if isinstance(atom, Sym):
            return str(leaf(atom))
        operands = [self._sum(x, leaf, vectors) for x in (atom.a, atom.b)]
        if vectors is not None:
            vector = [bool(free_symbols(x) & vectors) for x in (atom.a, atom.b)]
            if any(vector):
                operands = [o if v else f"fx::splat<W>({o})" for o, v in zip(operands, vector, strict=True)]
                return f"fx::{_ATOMS[atom.kind]}({', '.join(operands)})"
        return f"fx::{_ATOMS[atom.kind]}({', '.join(f'int64_t({o})' for o in operands)})"

    def vector_index(self, expr: Int, bound: dict[Sym, str], vectors: frozenset[Sym]) -> str:
        """`expr` as an int64 vector, given the texts of bound symbols, those in `vectors` being vectors themselves."""
        assert self.lanes is not None
        if not free_symbols(expr) & vectors:
            return f"fx::splat<W>(int64_t({self.index(expr, bound)}))"
        step = coefficient(expr, self.lanes)
        if step is not None and not (free_symbols(expr) & vectors) - {self.lanes}:
            return f"fx::iota<int64_t, W>({self.index(expr, bound)}, {self.index(step)})"
        lane = f"fx::iota<int64_t, W>({self.indices[self.lanes]}, 1)"
        return self._sum(expr, lambda s: bound.get(s) or (lane if s == self.lanes else self._symbol(s)), vectors)

    # ---- values ----

    def value(self, node: Scalar, scope: Scope) -> str:
        """The C++ text of `node`, computed in `scope` or around it."""
        if isinstance(node, Const):
            return literal(node)
        for below in self._order(node, scope):
            if scope.find(below) is None and not isinstance(below, Const):
                self._compute(below, scope)
        found = scope.find(node)
        assert found is not None
        return found

    def _order(self, node: Scalar, scope: Scope) -> list[Scalar]:
        """What has to be computed for `node`, operands first; masked bodies and finished values are not entered."""
        out: list[Scalar] = []
        seen: set[Scalar] = set()
        stack = [(node, False)]
        while stack:
            current, ready = stack.pop()
            if ready:
                out.append(current)
            elif current not in seen and scope.find(current) is None:
                seen.add(current)
                stack.append((current, True))
                stack += [(a, False) for a in reversed(self._eager_args(current))]
        return out

    def _eager_args(self, node: Scalar) -> tuple[Scalar, ...]:
        if isinstance(node, Masked) and touches_memory(node.body):
            return (node.cond, node.other)
        if takes_narrow(node, self.lanes) and self.is_vector(node):
            return ()
        return node.args

    def _compute(self, node: Scalar, scope: Scope) -> None:
        home = self.home(node, scope)
        if isinstance(node, Reduce | Scan):
            raise UnsupportedError(f"{node.kind} is used where its loop has not run")
        text = self._masked(node, home) if isinstance(node, Masked) else self._text(node, home)
        if not text.isidentifier():  # a cast that changes nothing, or a value that has its variable already
            name = self.names.fresh()
            home.lines.append(f"const auto {name} = {text};")
            text = name
        home.values[node] = text

    def _text(self, node: Scalar, scope: Scope) -> str:
        match node:
            case IndexValue():
                if not self.is_vector(node):
                    return f"int64_t({self.index(node.expr)})"
                return self.vector_index(node.expr, {}, frozenset((self.lanes,)) if self.lanes else frozenset())
            case Load():
                return self._load(node, scope)
            case Op(name="checked_index"):
                return self._checked(node, scope)
            case Op():
                return self._op(node, scope)
        raise UnsupportedError(f"no C++ for {type(node).__name__}")

    def vector(self, node: Scalar, scope: Scope) -> str:
        """`node` as a vector of W lanes (a scalar in scalar code)."""
        text = self.value(node, scope)
        if self.lanes is None or self.is_vector(node):
            return text
        if isinstance(node, Const):
            return f"fx::splat<W>({text})"
        home = self.home(node, scope)
        if text not in home.splats:
            home.splats[text] = name = self.names.fresh()
            home.lines.append(f"const auto {name} = fx::splat<W>({text});")
        return home.splats[text]

    def _args(self, node: Op, scope: Scope) -> list[str]:
        vector = self.is_vector(node)
        if vector and takes_narrow(node, self.lanes):
            return [self._narrow(a) for a in node.args]
        texts = [self.vector(a, scope) if vector else self.value(a, scope) for a in node.args]
        if node.name == "where" and node.dtype != torch.bool and not self.is_vector(node.args[0]):
            texts[0] = self.value(node.args[0], scope)
        return texts

    def _narrow(self, node: Scalar) -> str:
        """An index as int32 lanes: half the width of int64, so that float lanes stay full."""
        if isinstance(node, Const):
            return f"fx::splat<W>(int32_t({node.value}))"
        assert isinstance(node, IndexValue) and self.lanes is not None and narrow_index(node, self.lanes)
        if not self.is_vector(node):
            return f"fx::splat<W>(static_cast<int32_t>({self.index(node.expr)}))"
        step = coefficient(node.expr, self.lanes)
        assert step is not None
        return f"fx::iota<int32_t, W>({self.index(node.expr)}, {self.index(step)})"

    def _op(self, node: Op, scope: Scope) -> str:
        args = self._args(node, scope)
        vector = self.is_vector(node)
        divisor = node.args[1] if divides_integers(node) else None
        if divisor is not None and not (isinstance(divisor, Const) and divisor.value):
            code = self.names.error("ZeroDivisionError")
            scope.lines.append(f"if (fx::has_zero({args[1]}, {self.on(scope, vector)})) return {code};")
        if vector and takes_narrow(node, self.lanes) and node.name == "cast":
            return f"fx::cast<{value_type(node.dtype)}>({args[0]})"
        return op_text(node, args, vector)

    def _checked(self, node: Op, scope: Scope) -> str:
        index, size = (self.vector(a, scope) if self.is_vector(node) else self.value(a, scope) for a in node.args)
        what = node.args[1]
        code = self.names.error(
            f"index out of bounds for dimension of size {what.value}" if isinstance(what, Const) else "index out of bounds"
        )
        name = self.names.fresh()
        scope.lines.append(f"const auto {name} = fx::wrapped({index}, {size});")
        scope.lines.append(f"if (fx::outside({name}, {size}, {self.on(scope, self.is_vector(node))})) return {code};")
        return name

    def _load(self, node: Load, scope: Scope) -> str:
        stored_type(node.dtype)
        base, access = self.address(node.buffer, node.index, node.indirect, scope)
        on = self.on(scope, True)
        match access:
            case None:
                return f"fx::load1({base})"
            case "1":
                return f"fx::load<W>({base}, {on})"
            case "2":
                return f"fx::load_every_second<W>({base}, {on})"
            case str():
                return f"fx::load_strided<W>({base}, {access}, {on})"
            case (index,):
                return f"fx::gather({base}, {index}, {on})"

    def address(
        self, buffer: str, index: Int, indirect: tuple[tuple[Sym, Scalar], ...], scope: Scope
    ) -> tuple[str, str | tuple[str] | None]:
        """(pointer text, access): None one element, a text the stride between lanes, (text,) a vector of indices."""
        name = self.names.buffer(buffer)
        bound = {s: self.value(v, scope) for s, v in indirect}
        vectors = {s for s, v in indirect if self.is_vector(v)}
        if self.lanes is not None and self.lanes in free_symbols(index):
            vectors.add(self.lanes)
        if not vectors:
            return f"{name} + {self.index(index, bound)}", None
        step = coefficient(index, self.lanes) if vectors == {self.lanes} and self.lanes is not None else None
        if step is not None:
            return f"{name} + {self.index(index, bound)}", self.index(step)
        return name, (self.vector_index(index, bound, frozenset(vectors)),)

    def _masked(self, node: Masked, scope: Scope) -> str:
        vector = self.is_vector(node)
        as_lanes = self.vector if vector else self.value
        if not touches_memory(node.body):
            return op_text(
                Op("where", (node.cond, node.body, node.other), node.dtype),
                [self.vector(node.cond, scope) if vector else self.value(node.cond, scope)]
                + [as_lanes(x, scope) for x in (node.body, node.other)],
                vector,
            )
        name, by_lane = self.names.fresh(), self.is_vector(node.cond)
        ctype = f"fx::V<{value_type(node.dtype)}, {'W' if vector else '1'}>"
        is_mask = vector and node.dtype == torch.bool
        cond, other = self.value(node.cond, scope), as_lanes(node.other, scope)
        scope.lines.append(f"{ctype} {name} = {_as(ctype, other) if is_mask else other};")
        scope.lines.append(f"if ({f'fx::any({cond}, {scope.on})' if by_lane else cond}) {{")
        block = scope.child(guarded=True)
        if by_lane:
            block.on = self.names.fresh("on")
            block.lines.append(f"const auto {block.on} = fx::narrow({cond}, {scope.on});")
        body = as_lanes(node.body, block)
        body = _as(ctype, body) if is_mask else body
        if by_lane:
            chosen = f"fx::mask_select({cond}, {body}, {name})" if is_mask else f"fx::select({cond}, {body}, {name})"
            body = _as(ctype, chosen) if is_mask else chosen
        block.lines.append(f"{name} = {body};")
        scope.lines += ["  " + line for line in block.lines] + ["}"]
        return name

    # ---- stores ----

    def prepare_stores(self, stores: list[Store], scope: Scope) -> list[str]:
        """`prepare_store` for each of `stores`; two that fill the even and the odd elements of one row are one statement."""
        lines, rest = [], list(stores)
        while rest:
            store = rest.pop(0)
            partner = next((s for s in rest if self._are_pairs(store, s, scope)), None)
            if partner is None:
                lines.append(self.prepare_store(store, scope))
                continue
            rest.remove(partner)
            even, odd = (store, partner) if partner.index - store.index == 1 else (partner, store)
            base, _ = self.address(even.buffer, even.index, (), scope)
            values = f"{self.vector(even.value, scope)}, {self.vector(odd.value, scope)}"
            lines.append(f"fx::store_pairs({base}, {values}, {scope.on});")
        return lines

    def _are_pairs(self, a: Store, b: Store, scope: Scope) -> bool:
        if a.buffer != b.buffer or (a.mode, b.mode) != ("set", "set") or a.indirect or b.indirect:
            return False
        if self.lanes is None or self.lanes not in scope.symbols or coefficient(a.index, self.lanes) != 2:
            return False
        return b.index - a.index in (1, -1)

    def prepare_store(self, store: Store, scope: Scope) -> str:
        """Compute what `store` needs in `scope`; the store statement itself, to be placed after every load of the step."""
        base, access = self.address(store.buffer, store.index, store.indirect, scope)
        verb = {"set": "store", "add": "add"}.get(store.mode)
        if verb is None:
            raise UnsupportedError(f"store mode {store.mode!r}")
        stepped = self.lanes is not None and self.lanes in scope.symbols
        if not stepped:
            return f"fx::{verb}1({base}, {self.value(store.value, scope)});"
        value = self.vector(store.value, scope)
        if isinstance(access, str):
            if access == "1":
                return f"fx::{verb}({base}, {value}, {scope.on});"
            return f"fx::{verb}_strided({base}, {access}, {value}, {scope.on});"
        scattered = "scatter_add" if store.mode == "add" else "scatter"
        if access is None:
            return f"fx::{scattered}({base}, fx::splat<W>(int64_t(0)), {value}, {scope.on});"
        return f"fx::{scattered}({base}, {access[0]}, {value}, {scope.on});"


def _as(ctype: str, text: str) -> str:
    return f"fx::mask_as<{ctype}>({text})"


def touches_memory(root: Scalar) -> bool:
    """Whether computing `root` reads memory or can fail, so that it must not run where its mask is false."""
    return any(
        isinstance(n, Load) or (isinstance(n, Op) and (n.name == "checked_index" or divides_integers(n)))
        for n in postorder((root,))
    )
