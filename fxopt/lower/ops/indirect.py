"""Indices that are themselves loaded: eager's wrap-around and bounds checks, and reads of any value at such places."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, Sym, add, as_symbol, ask, bounds, floordiv, in_range, maximum, minimum, mod, mul, symbol
from fxopt.ir.loops import Const, IndexValue, Load, Op, Scalar, indirect_symbol, postorder, transform
from fxopt.lower.lowering import Lowering
from fxopt.lower.values import Computed, Indirect, Stored, Value, at, cast, dim_indices, numel, size_value

_EXACT_BELOW = {torch.float32: 1 << 24, torch.float64: 1 << 53}
"""Integers of a smaller magnitude, and these over powers of two, are floating-point numbers."""

INDEX_DTYPES = frozenset((torch.int64, torch.int32, torch.int16, torch.int8))


def require_integer(*values: Value) -> None:
    """Raise UnsupportedError unless all are integers; masks (bool, uint8) make results of a size that depends on data."""
    for v in values:
        if v.dtype not in INDEX_DTYPES:
            raise UnsupportedError(f"an index of {v.dtype}")


def require_device(device: torch.device, *values: Value) -> None:
    """Raise UnsupportedError if a value would be read from memory of another device."""
    for v in values:
        reads = isinstance(v, Stored) or any(isinstance(n, Load) for n in postorder((v.body,)))
        if reads and v.device != device:
            raise UnsupportedError(f"reads {v.device} memory from a kernel on {device}")


def position(value: Scalar, size: Int, *, wrap: bool) -> tuple[Int, tuple[Indirect, ...]]:
    """The integer scalar `value` as an index into a dimension of `size`, with the bindings it needs.

    With `wrap` negative values count from the end; without, they are errors, as all values outside of the dimension are. An
    index that is known to be inside (arithmetic on loop indices, say) needs no binding.
    """
    known = as_int(value)
    if known is not None:
        negative = ask("<", known, 0)
        inner = known + size if negative and wrap else known
        if in_range(inner, size):
            return inner, ()
    value = cast(value, torch.int64)
    bound = size_value(size)
    if not wrap:
        outside = Op("lt", (value, Const(0, torch.int64)), torch.bool)
        value = Op("where", (outside, bound, value), torch.int64)
    sym, binding = indirect_symbol(Op("checked_index", (value, bound), torch.int64), size)
    return symbol(sym), (binding,)


def as_int(value: Scalar) -> Int | None:
    """`value` as an integer expression, if it is arithmetic on indices and sizes only: in int64, or in floating point where
    that is exact.
    """
    if isinstance(value, Const):
        return value.value if isinstance(value.value, int) and value.dtype != torch.bool else None
    if isinstance(value, IndexValue):
        return value.expr
    if not isinstance(value, Op) or value.dtype != torch.int64:
        return None
    if value.name == "where":
        return _chosen(value)
    if value.name == "cast" and value.args[0].dtype in _EXACT_BELOW:
        return _truncated(value.args[0])
    args = [as_int(a) for a in value.args]
    known = [a for a in args if a is not None]
    return _arithmetic(value.name, known) if len(known) == len(args) else None


def _truncated(value: Scalar) -> Int | None:
    """The floating-point `value` as an integer, if it is an exact quotient of no negative one: the places that an upsampled
    image reads, when each is so many times as large as before.
    """
    found = _quotient(value)
    if found is None or not ask("<=", 0, found[0]):
        return None
    return floordiv(found[0], found[1])


def _quotient(value: Scalar) -> tuple[Int, int] | None:
    """(numerator, power of two) of a `value` that floating-point arithmetic on integers gives without any rounding."""
    limit = _EXACT_BELOW.get(value.dtype)
    found: tuple[Int, int] | None = None
    match value:
        case Const(value=float() | int() as number) if limit is not None and abs(number) < limit:
            found = float(number).as_integer_ratio()
        case Op(name="cast", args=(whole,)) if not whole.dtype.is_floating_point:
            integer = as_int(whole)
            found = None if integer is None else (integer, 1)
        case Op(name="add" | "sub" | "mul" as name, args=(left, right)):
            one, other = _quotient(left), _quotient(right)
            if one is not None and other is not None:
                found = _combined(name, one, other)
    if found is None or limit is None or found[1] > limit:
        return None
    low, high = bounds(found[0])
    return found if low is not None and high is not None and max(-low, high) < limit else None


def _combined(name: str, one: tuple[Int, int], other: tuple[Int, int]) -> tuple[Int, int]:
    (a, n), (b, m) = one, other
    if name == "mul":
        return mul(a, b), n * m
    both = max(n, m)  # both are powers of two
    return add(mul(a, both // n), mul(b, (1 if name == "add" else -1) * (both // m))), both


def _arithmetic(name: str, args: list[Int]) -> Int | None:
    match name, args:
        case "cast", [a]:
            return a
        case "neg", [a]:
            return -a
        case "abs", [a]:
            return maximum(a, -a)
        case "add", [a, b]:
            return a + b
        case "sub", [a, b]:
            return a - b
        case "mul", [a, b]:
            return a * b
        case "minimum", [a, b]:
            return minimum(a, b)
        case "maximum", [a, b]:
            return maximum(a, b)
        case (("floordiv" | "truncdiv" | "remainder" | "fmod"), [a, b]) if ask("<", 0, b):
            if name in ("truncdiv", "fmod") and not ask("<=", 0, a):
                return None
            return floordiv(a, b) if name in ("floordiv", "truncdiv") else mod(a, b)
    return None


def _chosen(value: Op) -> Int | None:
    """The arm of a `where` whose comparison of integers is statically known."""
    cond, yes, no = value.args
    if isinstance(cond, Op) and cond.name in ("lt", "ge") and len(cond.args) == 2:
        a, b = as_int(cond.args[0]), as_int(cond.args[1])
        known = ask("<", a, b) if a is not None and b is not None else None
        if known is not None:
            return as_int(yes if known == (cond.name == "lt") else no)
    return None


def gathered(ctx: Lowering, source: Value, shape: Sequence[Int], binds: bool) -> Value:
    """`source` made ready for reads at `shape` places, whose indices are loaded if `binds`: it is stored then.

    Except when it can take such indices in all its loads and the gather is known to want no more elements than it has; or
    when it is a wider form of something stored, since reading that again costs less than reading a wide copy.
    """
    if isinstance(source, Stored) or not binds or _is_widened(source):
        return source
    total: Int = 1
    for size in shape:
        total = total * size
    if ask("<=", total, numel(source)) and _takes_indices(source):
        return source
    return ctx.store(source)


def _is_widened(source: Computed) -> bool:
    """Whether the value is a cast of loaded elements that are no wider than its own."""
    body = source.body
    if not (isinstance(body, Op) and body.name == "cast"):
        return False
    (x,) = body.args
    return isinstance(x, Load) and not x.indirect and x.dtype.itemsize <= body.dtype.itemsize


def _takes_indices(source: Computed) -> bool:
    """Whether every use of the value's indices is in the address of a load."""
    own = {s for s in map(as_symbol, dim_indices(source.shape)) if s is not None}
    return all(isinstance(n, Load) or not (_own_symbols(n) & own) for n in postorder((source.body,)))


def _own_symbols(node: Scalar) -> frozenset[Sym]:
    """Symbols that `node` itself mentions, apart from its operands."""
    return node.symbols() if not node.args else frozenset()


def element(source: Value, indices: Sequence[Int], bindings: tuple[Indirect, ...]) -> Scalar:
    """source[indices], where `bindings` bind symbols in `indices`; an expression takes them in its loads."""
    if isinstance(source, Stored) or not bindings:
        return at(source, indices, bindings)
    mapping = {}
    for own, new in zip(dim_indices(source.shape), indices, strict=True):
        sym = as_symbol(own)
        if sym is not None:
            mapping[sym] = new

    def bind(load: Load) -> Scalar:
        return Load(load.buffer, load.index, load.dtype, (*load.indirect, *bindings))

    body = transform(source.body, mapping, bind)
    if any(s in body.symbols() for s, _ in bindings):
        raise UnsupportedError("an indirect index into a value that is not stored")
    return body
