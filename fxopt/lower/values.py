"""Tensor values during lowering: a strided view of a buffer, or an expression not yet stored anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, Sym, add, as_symbol, ask, index, mul, prod
from fxopt.ir.loops import Const, IndexValue, Load, Op, Scalar, transform

Indirect = tuple[Sym, Scalar]


@dataclass(frozen=True)
class Stored:
    """A strided view of `buffer`: element (i, j, ...) lies at offset + i*strides[0] + j*strides[1] + ..., in elements."""

    buffer: str
    dtype: torch.dtype
    device: torch.device
    shape: tuple[Int, ...]
    strides: tuple[Int, ...]
    offset: Int = 0


@dataclass(frozen=True)
class Computed:
    """A value as an expression over the symbols of `dim_indices(shape)`.

    `nodes` names the FX nodes whose computation the expression holds (those behind stored values excluded).
    """

    body: Scalar
    dtype: torch.dtype
    device: torch.device
    shape: tuple[Int, ...]
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opaque:
    """An input that is not a tensor or integer (None, a float, a script object); only library calls take it."""

    name: str


Value = Stored | Computed


def dim_indices(shape: Sequence[Int]) -> tuple[Int, ...]:
    """The canonical indices d0, d1, ... of a value of `shape` (0 along dimensions of size 1)."""
    return tuple(index(f"d{k}", size) for k, size in enumerate(shape))


def symbols_of(indices: Sequence[Int]) -> tuple[Sym, ...]:
    """The symbols among loop indices (dimensions of size 1 have none)."""
    return tuple(s for s in map(as_symbol, indices) if s is not None)


def address(value: Stored, indices: Sequence[Int]) -> Int:
    """Element offset in the buffer of `value[indices]`."""
    out = value.offset
    for i, stride in zip(indices, value.strides, strict=True):
        out = add(out, mul(i, stride))
    return out


def at(value: Value, indices: Sequence[Int], indirect: tuple[Indirect, ...] = ()) -> Scalar:
    """The element of `value` at `indices`. `indirect` binds symbols in `indices`; only stored values take those."""
    if isinstance(value, Stored):
        return Load(value.buffer, address(value, indices), value.dtype, indirect)
    if indirect:
        raise UnsupportedError("an indirect index into a value that is not stored")
    mapping = {}
    for own, new in zip(dim_indices(value.shape), indices, strict=True):
        sym = as_symbol(own)
        if sym is not None and own != new:
            mapping[sym] = new
    return transform(value.body, mapping)


def nodes_of(*values: Value) -> tuple[str, ...]:
    """The FX nodes held by unstored values, each once."""
    return tuple(dict.fromkeys(n for v in values if isinstance(v, Computed) for n in v.nodes))


def pointwise(
    shape: Sequence[Int],
    dtype: torch.dtype,
    device: torch.device,
    fn: Callable[[tuple[Int, ...]], Scalar],
    inputs: Sequence[Value] = (),
) -> Computed:
    """The value whose element at `indices` is fn(indices), computed from `inputs`."""
    shape = tuple(shape)
    body = fn(dim_indices(shape))
    return Computed(cast(body, dtype), dtype, device, shape, nodes_of(*inputs))


def cast(x: Scalar, dtype: torch.dtype) -> Scalar:
    """`x` as `dtype`; folds constants and lossless chains."""
    if x.dtype == dtype:
        return x
    if isinstance(x, Const) and not (isinstance(x.value, float) and not dtype.is_floating_point):
        return Const(x.value, dtype)
    return Op("cast", (x,), dtype)


def known_equal(a: Int, b: Int) -> bool:
    """True when a == b is statically known; unknown counts as different, which is always the safe reading here."""
    return ask("==", a, b) is True


def broadcast_shape(*shapes: Sequence[Int]) -> tuple[Int, ...]:
    """torch's broadcasting. Raises UnsupportedError when sizes may or may not be equal."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[Int] = [1] * rank
    for shape in shapes:
        for k, size in enumerate(shape, rank - len(shape)):
            if known_equal(out[k], 1):
                out[k] = size
            elif not known_equal(size, 1) and not known_equal(size, out[k]):
                raise UnsupportedError(f"sizes {out[k]} and {size} may differ")
    return tuple(out)


def broadcast_indices(shape: Sequence[Int], indices: Sequence[Int]) -> tuple[Int, ...]:
    """Indices into a value of `shape` for element `indices` of a shape it broadcasts to."""
    own = indices[len(indices) - len(shape) :]
    return tuple(0 if known_equal(size, 1) else i for size, i in zip(shape, own, strict=True))


def numel(value: Value) -> Int:
    return prod(value.shape)


def size_value(x: Int, dtype: torch.dtype = torch.int64) -> Scalar:
    """An integer expression as a scalar of `dtype`."""
    return cast(IndexValue(x), dtype)
