"""The loop IR: what every generated kernel is printed from.

A tensor value is a `Scalar` expression over index symbols; a `Nest` is an iteration domain with stores into buffers. The
expression is purely functional: a reduction is an expression too, binding the index symbols it sums over, so fusing a
producer into a consumer is substitution and nothing else. Nodes are interned: equal expressions are the same object, which
makes comparison and memoisation O(1) and common-subexpression elimination automatic.

dtype of a Scalar is the torch dtype of its value. float16, bfloat16 and float8 values are *computed* in float32 by all
printers and rounded when stored. `Load.dtype` is the dtype of the buffer's elements.
"""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxopt.ir.exprs import Expr, Int, Sym, free_symbols, substitute

FLOAT_UNARY = frozenset(
    "sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh "
    "erf erfc erfinv lgamma sigmoid".split()
)
"""Element functions of one floating argument (ints are cast before)."""

SAME_UNARY = frozenset("neg abs sign floor ceil trunc round reciprocal bitwise_not".split())
"""One argument, result of the same dtype. `round` is half to even; `reciprocal` is floating only; for bool, `bitwise_not`
is logical.
"""

PREDICATES = frozenset("isnan isinf signbit".split())
"""One argument, bool result."""

BINARY = frozenset(
    "add sub mul truediv floordiv truncdiv remainder fmod pow maximum minimum atan2 hypot copysign nextafter "
    "bitwise_and bitwise_or bitwise_xor lshift rshift".split()
)
"""Two arguments of one dtype, result of that dtype. `truediv` is floating only. `floordiv`/`remainder` round towards minus
infinity (torch.floor_divide, torch.remainder: result has the divisor's sign), `truncdiv`/`fmod` towards zero; integer
division by zero is undefined. `maximum`/`minimum` propagate NaN. `add`, `mul` on bool are or, and. Signed overflow wraps."""

COMPARE = frozenset("eq ne lt le gt ge".split())
"""Two arguments of one dtype, bool result."""

OTHER = {
    "where": "where(cond: bool, a, b): both arms are evaluated; a and b have the result's dtype",
    "cast": "cast(x): convert to `dtype`, as torch's .to() (float to int truncates; to bool is x != 0)",
    "bitcast": "bitcast(x): reinterpret the bits as `dtype` of the same width (x is stored precision, not the float32 form)",
    "rand": "rand(seed: int64, counter: int64) -> float32 uniform in [0, 1): philox4x32-10, see below",
    "randn": "randn(seed, counter) -> float32 standard normal: Box-Muller on the first two words",
    "randint": "randint(seed, counter, low: int64, high: int64) -> int64 in [low, high): words 0 and 1 as uint64, modulo "
    "the range",
    "checked_index": "checked_index(i: int64, size: int64) -> int64: i + size when i is negative; outside [0, size) the "
    "kernel reports an error (C++: returns a status that raises IndexError; Triton: device assert)",
    "group_sum": "group_sum(x, member: int64, n: int64): a printer's own (codegen/triton_groups.py), the sum of x over "
    "the n neighbouring points of which this is number `member`",
}
"""rand*: philox4x32-10 with key (low word, high word of seed) and counter (low, high word of `counter`, 0, 0). rand is
(word >> 8) * 2**-24 of word `counter` % 4 at `counter` // 4: compilers see that neighbours share it. randn is
sqrt(-2 log(((word 0 >> 8) + 1) * 2**-24)) * cos(2 pi (word 1 >> 8) * 2**-24). In randint, word 0 is the low half of the
uint64. Both printers give the same bits for rand and randint; ir/random_ops.py is the eager form."""

SCALAR_OPS = FLOAT_UNARY | SAME_UNARY | PREDICATES | BINARY | COMPARE | frozenset(OTHER)

REDUCTIONS = {
    "sum": "sum(x)",
    "prod": "prod(x)",
    "max": "max(x), NaN if any is NaN",
    "min": "min(x), NaN if any is NaN",
    "any": "any(x: bool)",
    "all": "all(x: bool)",
    "argmax": "argmax(x, i: int64) -> the `i` of the first maximal x (the first NaN wins); int64",
    "argmin": "argmin(x, i: int64) -> the `i` of the first minimal x (the first NaN wins); int64",
    "welford": "welford(x) -> output 0: mean, output 1: sum of squared distances from the mean",
    "softmax_stats": "softmax_stats(x) -> output 0: max(x), output 1: sum(exp(x - max)); -inf rows give (-inf, NaN) as "
    "eager would",
    "weighted_softmax": "weighted_softmax(x, y, w) -> outputs 0 and 1: those of softmax_stats(x), output 2: "
    "sum(w * (y - max(x))), output 3: sum(w); y is x wherever w is not zero",
}
"""Reduction kinds. Accumulated in float32 for float16/bfloat16/float32, float64 for float64, the dtype itself for
integers.
"""

SCANS = {
    "cumsum": "inclusive sum",
    "cumprod": "inclusive product",
    "cummax": "inclusive max",
    "cummin": "inclusive min",
    "logcumsumexp": "logarithm of the inclusive sum of exponentials (floating only)",
}


_interned: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()


class Scalar:
    """Base of all scalar expressions. Instances are interned: compare with `is` (or ==)."""

    __slots__ = ("__weakref__", "_symbols", "dtype")
    dtype: torch.dtype
    _symbols: frozenset[Sym]

    @property
    def args(self) -> tuple[Scalar, ...]:
        """The scalar operands (those of indirect loads included)."""
        return ()

    def symbols(self) -> frozenset[Sym]:
        """Free index and size symbols."""
        waiting: list[Scalar] = [] if hasattr(self, "_symbols") else [self]
        while waiting:  # a joined kernel may be deeper than Python's stack
            unknown = [a for a in waiting[-1].args if not hasattr(a, "_symbols")]
            if not unknown:
                waiting[-1]._symbols = waiting[-1]._free()
                waiting.pop()
            waiting += unknown
        return self._symbols

    def _free(self) -> frozenset[Sym]:
        return frozenset().union(*(a.symbols() for a in self.args))

    def rebuild(self, args: tuple[Scalar, ...], mapping: dict[Sym, Int]) -> Scalar:
        """The same node over new operands, its own integer expressions substituted by `mapping`."""
        raise TypeError(f"{type(self).__name__} has no operands")


def _intern(cls: type, fields: tuple[Any, ...], make: Callable[[Any], None]) -> Any:
    key = (cls, *fields)
    node = _interned.get(key)
    if node is None:
        node = object.__new__(cls)
        make(node)
        node = _interned.setdefault(key, node)
    return node


class Const(Scalar):
    """A literal of `dtype`."""

    __slots__ = ("value",)
    value: bool | int | float

    def __new__(cls, value: bool | int | float, dtype: torch.dtype) -> Const:
        if dtype == torch.bool:
            value = bool(value)
        elif dtype.is_floating_point:
            value = float(value)
        else:
            value = int(value)

        def make(node: Const) -> None:
            node.value, node.dtype = value, dtype

        return _intern(cls, (repr(value), dtype), make)  # repr: keeps -0.0 apart from 0.0, and NaN equal to itself

    def rebuild(self, args: tuple[Scalar, ...], mapping: dict[Sym, Int]) -> Scalar:
        return self

    def __repr__(self) -> str:
        return repr(self.value)


class IndexValue(Scalar):
    """An integer expression as a value (int64)."""

    __slots__ = ("expr",)
    expr: Int

    def __new__(cls, expr: Int) -> Scalar:  # type: ignore[misc]  # a known integer is a Const
        if isinstance(expr, int):
            return Const(expr, torch.int64)

        def make(node: IndexValue) -> None:
            node.expr, node.dtype = expr, torch.int64

        return _intern(cls, (expr,), make)

    def _free(self) -> frozenset[Sym]:
        return free_symbols(self.expr)

    def rebuild(self, args: tuple[Scalar, ...], mapping: dict[Sym, Int]) -> Scalar:
        return IndexValue(substitute(self.expr, mapping))

    def __repr__(self) -> str:
        return f"index({self.expr!r})"


class Load(Scalar):
    """buffer[index], in elements from the buffer's first; `indirect` binds symbols of `index` to loaded integer values.

    An indirect symbol stands for a value already wrapped and checked, so it has the range [0, size) of its dimension.
    """

    __slots__ = ("buffer", "index", "indirect")
    buffer: str
    index: Int
    indirect: tuple[tuple[Sym, Scalar], ...]

    def __new__(cls, buffer: str, index: Int, dtype: torch.dtype, indirect: tuple[tuple[Sym, Scalar], ...] = ()) -> Load:
        used = free_symbols(index)
        indirect = tuple((s, v) for s, v in indirect if s in used)

        def make(node: Load) -> None:
            node.buffer, node.index, node.dtype, node.indirect = buffer, index, dtype, indirect

        return _intern(cls, (buffer, index, dtype, indirect), make)

    @property
    def args(self) -> tuple[Scalar, ...]:
        return tuple(v for _, v in self.indirect)

    def _free(self) -> frozenset[Sym]:
        bound = {s for s, _ in self.indirect}
        return (free_symbols(self.index) - bound).union(*(v.symbols() for _, v in self.indirect))

    def rebuild(self, args: tuple[Scalar, ...], mapping: dict[Sym, Int]) -> Scalar:
        index, indirect = rebind_indirect(substitute(self.index, mapping), self.indirect, args)
        return Load(self.buffer, index, self.dtype, indirect)

    def __repr__(self) -> str:
        where = ", ".join(f"{s}={v!r}" for s, v in self.indirect)
        return f"{self.buffer}[{self.index!r}{'; ' + where if where else ''}]"


def indirect_symbol(value: Scalar, size: Int) -> tuple[Sym, tuple[Sym, Scalar]]:
    """A symbol in [0, size) that stands for the integer `value`, and its binding.

    The symbol is named after the interned value's content, so that equal gathers stay equal.
    """
    sym = Sym(f"t{content_hash(value)}", size=size)
    return sym, (sym, value)


def rebind_indirect(
    index: Int, indirect: tuple[tuple[Sym, Scalar], ...], args: tuple[Scalar, ...]
) -> tuple[Int, tuple[tuple[Sym, Scalar], ...]]:
    """`index` and its bindings with new bound values, symbols renamed after them."""
    pairs, renamed = [], {}
    for (sym, _), value in zip(indirect, args, strict=True):
        assert sym.size is not None
        new, pair = indirect_symbol(value, sym.size)
        pairs.append(pair)
        renamed[sym] = Expr((((new,), 1),))
    return substitute(index, renamed), tuple(pairs)


class Op(Scalar):
    """An operator of SCALAR_OPS applied to operands."""

    __slots__ = ("_args", "name")
    name: str
    _args: tuple[Scalar, ...]

    def __new__(cls, name: str, args: tuple[Scalar, ...], dtype: torch.dtype) -> Op:
        if name not in SCALAR_OPS:
            raise ValueError(f"{name!r} is not a scalar op of the loop IR")

        def make(node: Op) -> None:
            node.name, node._args, node.dtype = name, args, dtype

        return _intern(cls, (name, args, dtype), make)

    @property
    def args(self) -> tuple[Scalar, ...]:
        return self._args

    def rebuild(self, args: tuple[Scalar, ...], mapping: dict[Sym, Int]) -> Scalar:
        return Op(self.name, args, self.dtype)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        extra = f", {dtype}" if self.name in ("cast", "bitcast") else ""
        return f"{self.name}({', '.join(map(repr, self._args))}{extra})"


class Masked(Scalar):
    """`body` where `cond` holds, `other` elsewhere; memory that `body` loads is not touched where `cond` is false."""

    __slots__ = ("body", "cond", "other")
    cond: Scalar
    body: Scalar
    other: Scalar

    def __new__(  # type: ignore[misc]  # under a known condition it is one of the arms
        cls, cond: Scalar, body: Scalar, other: Scalar
    ) -> Scalar:
        if isinstance(cond, Const):
            return body if cond.value else other

        def make(node: Masked) -> None:
            node.cond, node.body, node.other, node.dtype = cond, body, other, body.dtype

        return _intern(cls, (cond, body, other), make)

    @property
    def args(self) -> tuple[Scalar, ...]:
        return (self.cond, self.body, self.other)

    def rebuild(self, args: tuple[Scalar, ...], mapping: dict[Sym, Int]) -> Scalar:
        return Masked(*args)

    def __repr__(self) -> str:
        return f"masked({self.cond!r}, {self.body!r}, {self.other!r})"


class Reduce(Scalar):
    """Reduction of `operands` over the index symbols `axes`; `output` picks one of the kind's results."""

    __slots__ = ("axes", "kind", "operands", "output")
    kind: str
    operands: tuple[Scalar, ...]
    axes: tuple[Sym, ...]
    output: int

    def __new__(
        cls, kind: str, operands: tuple[Scalar, ...], axes: tuple[Sym, ...], dtype: torch.dtype, output: int = 0
    ) -> Reduce:
        if kind not in REDUCTIONS:
            raise ValueError(f"{kind!r} is not a reduction of the loop IR")

        def make(node: Reduce) -> None:
            node.kind, node.operands, node.axes, node.dtype, node.output = kind, operands, axes, dtype, output

        return _intern(cls, (kind, operands, axes, dtype, output), make)

    @property
    def args(self) -> tuple[Scalar, ...]:
        return self.operands

    def _free(self) -> frozenset[Sym]:
        return super()._free() - frozenset(self.axes)

    def rebuild(self, args: tuple[Scalar, ...], mapping: dict[Sym, Int]) -> Scalar:
        return Reduce(self.kind, args, renamed_axes(self.axes, mapping), self.dtype, self.output)

    def __repr__(self) -> str:
        axes = ", ".join(map(repr, self.axes))
        return f"{self.kind}.{self.output}[{axes}]({', '.join(map(repr, self.operands))})"


class Scan(Scalar):
    """Inclusive scan of `operand` along index symbol `axis`: a value over the full domain, `axis` included.

    `axis` stays free in the result: the value at axis = k combines operand values at 0..k.
    """

    __slots__ = ("axis", "kind", "operand")
    kind: str
    operand: Scalar
    axis: Sym

    def __new__(cls, kind: str, operand: Scalar, axis: Sym, dtype: torch.dtype) -> Scan:
        if kind not in SCANS:
            raise ValueError(f"{kind!r} is not a scan of the loop IR")

        def make(node: Scan) -> None:
            node.kind, node.operand, node.axis, node.dtype = kind, operand, axis, dtype

        return _intern(cls, (kind, operand, axis, dtype), make)

    @property
    def args(self) -> tuple[Scalar, ...]:
        return (self.operand,)

    def _free(self) -> frozenset[Sym]:
        return self.operand.symbols() | {self.axis}

    def rebuild(self, args: tuple[Scalar, ...], mapping: dict[Sym, Int]) -> Scalar:
        (axis,) = renamed_axes((self.axis,), mapping)
        return Scan(self.kind, args[0], axis, self.dtype)

    def __repr__(self) -> str:
        return f"{self.kind}[{self.axis!r}]({self.operand!r})"


def renamed_axes(axes: tuple[Sym, ...], mapping: dict[Sym, Int]) -> tuple[Sym, ...]:
    """Bound axes after a substitution: the index symbols of the expressions that the axes map to, in loop order."""
    out: list[Sym] = []
    for axis in axes:
        image = mapping.get(axis)
        if image is None:
            fresh: list[Sym] = [axis]
        else:
            fresh = [s for s in free_symbols(image) if s.size is not None]
        out += [s for s in fresh if s not in out]
    return loop_order(out)


def loop_order(syms: Iterable[Sym]) -> tuple[Sym, ...]:
    """Index symbols in the order of the dimensions they are named after (x0, r1, x2, ...)."""
    return tuple(sorted(syms, key=lambda s: (int(s.name[1:]), s.name)))


def transform(root: Scalar, mapping: dict[Sym, Int], leaf: Callable[[Load], Scalar | None] | None = None) -> Scalar:
    """`root` with index symbols substituted by `mapping` and, after that, each Load for which `leaf` returns a value
    replaced.

    Iterative and memoised: cost is linear in the number of distinct nodes.
    """
    done: dict[Scalar, Scalar] = {}
    for node in postorder((root,)):
        args = tuple(done[a] for a in node.args)
        new = node if not args and not (node.symbols() & mapping.keys()) else node.rebuild(args, mapping)
        if leaf is not None and isinstance(new, Load):
            new = leaf(new) or new
        done[node] = new
    return done[root]


def replaced_in(root: Scalar, images: Mapping[Scalar, Scalar]) -> Scalar:
    """`root` with each node that `images` has replaced by what it has for it."""
    done: dict[Scalar, Scalar] = {}
    for node in postorder((root,)):
        args = tuple(done[a] for a in node.args)
        done[node] = images.get(node) or (node if args == node.args else node.rebuild(args, {}))
    return done[root]


def cast_to(value: Scalar, dtype: torch.dtype) -> Scalar:
    """`value` as `dtype`."""
    return value if value.dtype == dtype else Op("cast", (value,), dtype)


def postorder(roots: tuple[Scalar, ...]) -> Iterator[Scalar]:
    """Every distinct node below `roots`, operands before users."""
    return iter(_postorder(roots))


@functools.lru_cache(maxsize=1024)  # what is scheduled and printed is walked over five times and more
def _postorder(roots: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
    out: list[Scalar] = []
    seen: set[Scalar] = set()
    stack: list[Scalar | None] = list(reversed(roots))
    while stack:
        node = stack.pop()
        if node is None:  # the operands of the one below are done
            node = stack.pop()
            assert node is not None
            out.append(node)
        elif node not in seen:
            seen.add(node)
            if node.args:
                stack += (node, None, *node.args[::-1])
            else:
                out.append(node)
    return tuple(out)


def holds_reduction(root: Scalar) -> bool:
    """Whether a Reduce is `root` or lies below it."""
    return any(isinstance(n, Reduce) for n in postorder((root,)))


def loads_below(roots: tuple[Scalar, ...]) -> Iterator[Load]:
    """Every distinct load below `roots`, those that index others first."""
    return (n for n in postorder(roots) if isinstance(n, Load))


_hashes: weakref.WeakKeyDictionary[Scalar, str] = weakref.WeakKeyDictionary()


def content_hash(root: Scalar) -> str:
    """A short hash of what `root` says; equal in every process."""
    for node in postorder((root,)):
        if node not in _hashes:
            own = (type(node).__name__, str(node.dtype), *_own_fields(node), *(_hashes[a] for a in node.args))
            _hashes[node] = hashlib.sha256(repr(own).encode()).hexdigest()[:12]
    return _hashes[root]


def _own_fields(node: Scalar) -> tuple[Any, ...]:
    match node:
        case Const():
            return (repr(node.value),)
        case IndexValue():
            return (repr(node.expr),)
        case Load():
            return (node.buffer, repr(node.index))
        case Op():
            return (node.name,)
        case Reduce():
            return (node.kind, repr(node.axes), node.output)
        case Scan():
            return (node.kind, repr(node.axis))
    return ()


SUMMED_COLUMNS = 64
"""Columns of a product whose values are added up by a store of mode "sums": no tile has fewer of them at a time."""


@dataclass(frozen=True)
class Store:
    """buffer[index] = value (mode "set") or += value (mode "add": several iterations may hit one element).

    Mode "part" is a printer's own: each program adds up the values of the points that it runs and stores the sums at
    `index`, which no point varies, of a row of `buffer` that is the program's. Mode "sums", of a contraction's region only:
    the element at `index` is the sum of float32 values of SUMMED_COLUMNS neighbours in a row, which alone lead there.
    `indirect` binds symbols of `index`, as in Load.
    """

    buffer: str
    index: Int
    value: Scalar
    mode: str = "set"
    indirect: tuple[tuple[Sym, Scalar], ...] = ()

    def symbols(self) -> frozenset[Sym]:
        """Free symbols of index and value together."""
        bound = {s for s, _ in self.indirect}
        own = (free_symbols(self.index) - bound).union(*(v.symbols() for _, v in self.indirect))
        return own | self.value.symbols()

    @property
    def roots(self) -> tuple[Scalar, ...]:
        return (*(v for _, v in self.indirect), self.value)

    def transformed(self, mapping: dict[Sym, Int], values: Callable[[Scalar], Scalar] | None = None) -> Store:
        """The same store with `mapping` substituted in its index and each of its `roots` replaced by what `values` gives for
        it: by default the root with `mapping` substituted as well."""
        image = values or functools.partial(transform, mapping=mapping)
        bound = tuple(image(v) for _, v in self.indirect)
        index, indirect = rebind_indirect(substitute(self.index, mapping), self.indirect, bound)
        used = free_symbols(index)
        return replace(self, index=index, value=image(self.value), indirect=tuple((s, v) for s, v in indirect if s in used))


@dataclass(frozen=True)
class Nest:
    """Stores executed over the domain `points` x `reduced`.

    A store whose index and value mention no symbol of `reduced` is executed once per point; one that does, once per point
    and reduced index. Every Reduce and Scan below binds exactly the symbols in `reduced` (all of them), but for sums
    over groups of points (lower/group_sums.py), which bind a symbol of their own. All loads of a
    buffer that the nest also stores to happen before the first store to it, and at the same index, so a nest may update in
    place.
    """

    points: tuple[Sym, ...]
    reduced: tuple[Sym, ...]
    stores: tuple[Store, ...]

    @property
    def roots(self) -> tuple[Scalar, ...]:
        return tuple(r for s in self.stores for r in s.roots)

    def loads(self) -> tuple[Load, ...]:
        """Every distinct load below the stores."""
        return self._loads

    def reads(self) -> tuple[str, ...]:
        """Buffers loaded, in order of first use."""
        return self._reads

    def writes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s.buffer for s in self.stores))

    @functools.cached_property
    def _loads(self) -> tuple[Load, ...]:
        return tuple(loads_below(self.roots))

    @functools.cached_property
    def _reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(load.buffer for load in self._loads))
