"""Few long rows: a reduction cut into parts that run side by side, then joined. A rewrite from one region to several.

Each part reduces its share of the row into scratch memory, a second kernel joins the parts, and what varies along the row
(or reduces again) follows as further regions. Every kernel is deterministic: no atomics, and the order of joining is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from fxopt.codegen.triton_ops import RANDOM, identity
from fxopt.codegen.triton_reduce import LAST_INDEX
from fxopt.codegen.triton_tiling import accumulator_dtype, size_of, tile
from fxopt.ir.exprs import (
    Int,
    Sym,
    contiguous_strides,
    floordiv,
    maximum,
    minimum,
    mul,
    prod,
    ravel,
    symbol,
    unravel,
)
from fxopt.ir.loops import (
    Const,
    IndexValue,
    Load,
    Masked,
    Nest,
    Op,
    Reduce,
    Scalar,
    Scan,
    Store,
    cast_to,
    holds_reduction,
    postorder,
    replaced_in,
    transform,
)
from fxopt.ir.region import BufferSpec, Region
from fxopt.ir.rounding import NARROW
from fxopt.ir.rows import settled

_TURN_ROWS = 64
"""Rows that each part of a column reduction takes at a time."""


@dataclass
class _Split:
    """One reduction round: how the row is cut, and the scratch it needs.

    `part` numbers the parts, `inside` the elements of one: several symbols each when the row has several axes.
    """

    region: Region
    part: tuple[Sym, ...]
    inside: tuple[Sym, ...]
    mapping: dict[Sym, Int]
    guard: Scalar | None
    row: Int
    chunk: Int
    scratch: dict[str, BufferSpec] = field(default_factory=dict)
    stores: list[Store] = field(default_factory=list)

    def save(self, value: Scalar) -> Scalar:
        """Store a partial result per (part, point), once; returns its load for the joining nest."""
        where = (*self.part, *self.region.nest.points)
        shape = tuple(map(size_of, where))
        index = ravel(tuple(map(symbol, where)), shape)
        for store in self.stores:
            if store.value is value:
                return Load(store.buffer, index, value.dtype)
        spec = scratch_spec(self.region, len(self.scratch), value.dtype, shape)
        self.scratch[spec.name] = spec
        self.stores.append(Store(spec.name, index, value))
        return Load(spec.name, index, value.dtype)

    def along(self, value: Scalar, neutral: bool | int | float) -> Scalar:
        """`value` at this part's elements, `neutral` past the row's end."""
        inner = transform(value, self.mapping)
        return inner if self.guard is None else Masked(self.guard, inner, Const(neutral, value.dtype))

    def reduce(self, kind: str, operands: tuple[Scalar, ...], dtype: torch.dtype, output: int = 0) -> Scalar:
        return Reduce(kind, operands, self.inside, dtype, output)

    def join(self, kind: str, operands: tuple[Scalar, ...], dtype: torch.dtype, output: int = 0) -> Scalar:
        return Reduce(kind, operands, self.part, dtype, output)

    def count(self, dtype: torch.dtype) -> Scalar:
        """How many elements a part has."""
        if self.guard is None:
            return cast_to(IndexValue(self.chunk), dtype)
        start = mul(symbol(self.part[0]), self.chunk)
        return cast_to(IndexValue(maximum(minimum(self.chunk, self.row - start), 0)), dtype)


def scratch_spec(region: Region, number: int, dtype: torch.dtype, shape: tuple[Int, ...]) -> BufferSpec:
    name = f"{region.name}.scratch{number}"
    return BufferSpec(name, dtype, region.device, shape, contiguous_strides(shape))


def split_region(region: Region, parts: int) -> list[Region] | None:
    """`region` as regions to run in order, its reduced axis cut into about `parts`; None when it cannot be cut.

    The new regions' `buffers` include the scratch they share: those absent from the region's own.
    """
    nest = tile(region, "flat").merged
    if not _can_split(nest):
        return None
    split = _cut(replace(region, nest=nest), parts)
    level = [n for n in postorder(nest.roots) if isinstance(n, Reduce) and not _reduces_below(n)]
    joined: dict[Scalar, Scalar] = {n: cast_to(_partial(split, n), n.dtype) for n in level}
    streamed, now, later, finals = _stage_stores(split, nest, joined)
    part = Nest((*split.part, *nest.points), split.inside, (*split.stores, *streamed))
    first = _subregion(region, "part", part, split.scratch)
    extra: dict[str, BufferSpec] = {}
    loads: dict[Scalar, Scalar] = {}
    for node in finals:
        shape = tuple(map(size_of, nest.points))
        spec = scratch_spec(region, len(split.scratch) + len(extra), accumulator_dtype(node.dtype), shape)
        index = ravel(tuple(map(symbol, nest.points)), shape)
        extra[spec.name] = spec
        now.append(Store(spec.name, index, cast_to(replaced_in(node, joined), spec.dtype)))
        loads[node] = cast_to(Load(spec.name, index, spec.dtype), node.dtype)
    second = _subregion(region, "join", Nest(nest.points, split.part, tuple(now)), split.scratch | extra)
    rest = [replace(s, value=replaced_in(s.value, loads)) for s in later]
    if (_reads(rest) - extra.keys()) & {s.buffer for s in (*streamed, *now)} or _reads(now) & {s.buffer for s in streamed}:
        return None
    kept = _worth_loading(region, nest, split)
    rest = [replace(s, value=replaced_in(s.value, kept)) for s in rest]
    return [first, second, *_remainder(region, nest, rest, extra, parts)]


def _worth_loading(region: Region, nest: Nest, split: _Split) -> dict[Scalar, Scalar]:
    """Values that the parts store on their way, with loads of what they have stored: where that is less work than computing
    them again, and not less exact."""
    kept: dict[Scalar, Scalar] = {}
    for store in filter(lambda s: _streams(split, nest, s), nest.stores):
        loads = {n for n in postorder((store.value,)) if isinstance(n, Load) and frozenset(nest.reduced) & n.symbols()}
        random = any(isinstance(n, Op) and n.name in RANDOM for n in postorder((store.value,)))
        exact = store.value.dtype not in NARROW and region.buffers[store.buffer].dtype == store.value.dtype
        if store.mode == "set" and not store.indirect and exact and (random or len(loads) > 1):
            kept[store.value] = Load(store.buffer, store.index, store.value.dtype)
    return kept


def turning(region: Region, pieces: Sequence[Region]) -> list[Region]:
    """`pieces` of `region` in turns forwards and backwards over its elements, but for those that only join parts."""
    backwards, out = region.backwards, []
    walking = [piece for piece in pieces if not piece.name.endswith(".join")]
    for piece in pieces:
        if piece not in walking:
            out.append(replace(piece, backwards=False, reread=False))
            continue
        out.append(replace(piece, backwards=backwards, reread=region.reread or piece is not walking[-1]))
        backwards = not backwards
    return out


def _remainder(region: Region, nest: Nest, rest: list[Store], extra: dict[str, BufferSpec], parts: int) -> list[Region]:
    """What is left once the innermost reductions are loads: another round, or a pointwise nest over the whole domain."""
    if not rest:
        return []
    if any(isinstance(n, Reduce) for s in rest for n in postorder(s.roots)):
        left = _subregion(region, "rest", Nest(nest.points, nest.reduced, tuple(rest)), extra)
        return split_region(left, parts) or [left]
    return [_subregion(region, "rest", Nest((*nest.points, *nest.reduced), (), tuple(rest)), extra)]


def _can_split(nest: Nest) -> bool:
    nodes = list(postorder(nest.roots))
    empty = any(s.size == 0 for s in (*nest.points, *nest.reduced))
    if not nest.reduced or empty or any(isinstance(n, Scan) for n in nodes):
        return False
    if any(holds_reduction(v) for store in nest.stores for _, v in store.indirect):
        return False
    return any(map(holds_reduction, nodes)) and not any(isinstance(n, Masked) and holds_reduction(n) for n in nodes)


def _reduces_below(node: Reduce) -> bool:
    return any(map(holds_reduction, node.operands))


def _cut(region: Region, parts: int) -> _Split:
    nest = region.nest
    sizes = tuple(map(size_of, nest.reduced))
    row = prod(sizes)
    cuts = whole_cuts(sizes, parts)
    if cuts is not None:
        return _cut_axes(region, row, cuts)
    chunk = floordiv(row + (parts - 1), parts)
    if isinstance(row, int) and isinstance(chunk, int) and row % parts:
        chunk = -(-chunk // 128) * 128 if chunk >= 128 else chunk
        parts = -(-row // chunk)
    part, inside = Sym("u0", size=parts), Sym("w0", size=chunk)
    linear = mul(symbol(part), chunk) + symbol(inside)
    mapping = dict(zip(nest.reduced, unravel(linear, sizes), strict=True))
    exact = isinstance(row, int) and isinstance(chunk, int) and row == chunk * parts
    guard = None if exact else Op("lt", (IndexValue(linear), IndexValue(row)), torch.bool)
    return _Split(region, (part,), (inside,), mapping, guard, row, chunk)


def whole_cuts(sizes: Sequence[Int], parts: int) -> list[int] | None:
    """How many pieces to cut each axis into, outermost first, for `parts` equal parts: an axis is cut only when the one
    outside it is down to single elements. None when that does not come out even.

    Such parts are boxes: their loops need no division, as those of a cut along the linear index would.
    """
    cuts, left = [], parts
    for size in sizes:
        cut = 1 if left == 1 else math.gcd(size, left) if isinstance(size, int) else 0
        if cut not in (size, left):
            return None
        cuts.append(cut)
        left //= cut
    return cuts if left == 1 else None


def _cut_axes(region: Region, row: Int, cuts: list[int]) -> _Split:
    """Parts as boxes of the elements. Along axes that are not contiguous, the parts take turns: then all of them together
    walk through memory in order, and what comes next finds the end in the L2 cache. Down columns a turn is several rows:
    each program's next lines lie on few pages."""
    part: list[Sym] = []
    inside: list[Sym] = []
    mapping: dict[Sym, Int] = {}
    along_rows = tile(region, "flat").inner_reduction
    contiguous = region.nest.reduced[-1:] if along_rows else ()
    for k, (sym, cut) in enumerate(zip(region.nest.reduced, cuts, strict=True)):
        length = floordiv(size_of(sym), cut)
        turn = math.gcd(length, _TURN_ROWS) if isinstance(length, int) and cut != 1 and not along_rows else 1
        outer, inner = Sym(f"u{k}", size=cut), Sym(f"w{k}", size=floordiv(length, turn))
        row_of_turn = Sym(f"t{k}", size=turn)
        part += [outer] * (cut != 1)
        inside += [inner] * (inner.size != 1) + [row_of_turn] * (turn != 1)
        number, place = symbol(outer) if cut != 1 else 0, symbol(inner) if inner.size != 1 else 0
        if sym in contiguous:
            mapping[sym] = mul(number, length) + place
        else:
            mapping[sym] = mul(mul(place, cut) + number, turn) + (symbol(row_of_turn) if turn != 1 else 0)
    return _Split(region, tuple(part), tuple(inside), mapping, None, row, floordiv(row, prod(cuts)))


def _partial(split: _Split, node: Reduce) -> Scalar:
    """Save the parts of `node`; returns the expression that joins them."""
    if node.kind == "welford":
        return _partial_welford(split, node)
    if node.kind in ("softmax_stats", "weighted_softmax"):
        return _partial_softmax(split, node)
    if node.kind in ("argmax", "argmin"):
        values = split.along(node.operands[0], identity(node.kind, accumulator_dtype(node.operands[0].dtype)))
        indices = split.along(node.operands[1], LAST_INDEX)
        best = split.save(split.reduce(node.kind.removeprefix("arg"), (values,), accumulator_dtype(values.dtype)))
        where = split.save(split.reduce(node.kind, (values, indices), torch.int64))
        return split.join(node.kind, (best, where), torch.int64)
    dtype = accumulator_dtype(node.dtype)
    neutral = identity(node.kind, accumulator_dtype(node.operands[0].dtype))
    saved = split.save(split.reduce(node.kind, (split.along(node.operands[0], neutral),), dtype))
    return split.join(node.kind, (saved,), dtype)


def _partial_welford(split: _Split, node: Reduce) -> Scalar:
    """Joined by sums over the parts, weighted by their lengths (Chan, Golub and LeVeque 1979)."""
    dtype = accumulator_dtype(node.dtype)
    count = split.count(dtype)
    if split.guard is None:
        inner = (transform(node.operands[0], split.mapping),)
        mean, m2 = (split.reduce("welford", inner, dtype, output) for output in (0, 1))
    else:
        nonzero = Op("maximum", (count, Const(1.0, dtype)), dtype)
        total = split.reduce("sum", (cast_to(split.along(node.operands[0], 0.0), dtype),), dtype)
        mean = Op("truediv", (total, nonzero), dtype)
        away = Op("sub", (cast_to(transform(node.operands[0], split.mapping), dtype), mean), dtype)
        m2 = split.reduce("sum", (Masked(split.guard, Op("mul", (away, away), dtype), Const(0.0, dtype)),), dtype)
    means, m2s = split.save(mean), split.save(m2)
    row = cast_to(IndexValue(split.row), dtype)
    overall = Op("truediv", (split.join("sum", (Op("mul", (count, means), dtype),), dtype), row), dtype)
    if node.output == 0:
        return overall
    away = Op("sub", (means, overall), dtype)
    between = Op("mul", (count, Op("mul", (away, away), dtype)), dtype)
    return split.join("sum", (Op("add", (m2s, between), dtype),), dtype)


def _partial_softmax(split: _Split, node: Reduce) -> Scalar:
    """Joined as sum of s_i * exp(m_i - m); a part that is all -inf has a NaN sum, which only counts when every part is.
    Weighted distances t_i from m_i are sums of t_i + w_i * (m_i - m)."""
    dtype = accumulator_dtype(node.dtype)
    neutral = (-float("inf"), 0.0, 0.0)
    operands = tuple(cast_to(split.along(o, n), dtype) for o, n in zip(node.operands, neutral, strict=False))
    outputs = range(2 if node.kind == "softmax_stats" else 4)
    tops, sums, *others = (split.save(split.reduce(node.kind, operands, dtype, output)) for output in outputs)
    if node.output == 3:
        return split.join("sum", (others[1],), dtype)
    top = split.join("max", (tops,), dtype)
    if node.output == 0:
        return top
    low = Const(-float("inf"), dtype)
    if node.output == 2:
        still = Op("bitwise_or", (Op("eq", (tops, top), torch.bool), Op("eq", (tops, low), torch.bool)), torch.bool)
        moved = Op("mul", (others[1], Op("sub", (tops, top), dtype)), dtype)
        term = Op("add", (others[0], Op("where", (still, Const(0.0, dtype), moved), dtype)), dtype)
        return split.join("sum", (term,), dtype)
    scaled = Op("mul", (sums, Op("exp", (Op("sub", (tops, top), dtype),), dtype)), dtype)
    empty = Op("where", (Op("eq", (top, low), torch.bool), Const(float("nan"), dtype), Const(0.0, dtype)), dtype)
    return split.join("sum", (Op("where", (Op("eq", (tops, low), torch.bool), empty, scaled), dtype),), dtype)


def _stage_stores(
    split: _Split, nest: Nest, joined: dict[Scalar, Scalar]
) -> tuple[list[Store], list[Store], list[Store], list[Scalar]]:
    """(stores the parts make on their way, stores complete after joining, those left for later, what these need of it)."""
    streamed, now, later = [], [], []
    reduced = frozenset(nest.reduced)
    for store in nest.stores:
        varies = bool(reduced & store.symbols())
        if _streams(split, nest, store):
            streamed.append(store.transformed(split.mapping))
        elif varies or any(isinstance(n, Reduce) and n not in joined for n in postorder((store.value,))):
            later.append(store)
        else:
            now.append(replace(store, value=replaced_in(store.value, joined)))
    return streamed, now, later, settled([v for s in later for v in s.roots], reduced, joined)


def _streams(split: _Split, nest: Nest, store: Store) -> bool:
    """Whether the parts make `store` on their way."""
    varies = bool(frozenset(nest.reduced) & store.symbols())
    return varies and split.guard is None and not any(map(holds_reduction, store.roots))


def _reads(stores: list[Store]) -> set[str]:
    return {n.buffer for s in stores for n in postorder(s.roots) if isinstance(n, Load)}


def _subregion(region: Region, suffix: str, nest: Nest, scratch: dict[str, BufferSpec]) -> Region:
    used = {*nest.reads(), *nest.writes()}
    buffers = {n: s for n, s in (region.buffers | scratch).items() if n in used}
    return replace(region, name=f"{region.name}.{suffix}", nest=nest, buffers=buffers, nodes=())
