"""How a nest becomes C++ loops: dimensions merged, the vectorised loop chosen, and what runs on which thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fxopt.ir.exprs import Int, Sym, bounds, coefficient, floordiv, in_range, mod, mul, prod, substitute, symbol
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
    postorder,
)

HALF = (torch.float16, torch.bfloat16)
_NATIVE_BYTES = {"AVX512": 64, "AVX2": 32}
_SMALLEST_NATIVE = 16
_TINY = 4
"""Loops shorter than this are not worth a vector."""
_MAP_BLOCK = 4096
"""Elements of a vectorised point loop in one unit of parallel work."""
_TILE = 64
"""Edge of the square in which transposed accesses are walked, so that a cache line is used up before it is evicted."""
_TILE_VECTORS = 4
_LITTLE = 1024
_ENOUGH = 64
_FEW = 16
_LONG = 16384
_COMPARES = frozenset("eq ne lt le gt ge".split())


def computed(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of `dtype` are computed in."""
    return torch.float32 if dtype in HALF else dtype


def extent(sym: Sym) -> Int:
    """The number of values of a loop symbol."""
    return 1 if sym.size is None else sym.size


@dataclass(frozen=True)
class Outer:
    """One digit of the parallel iteration: `sym` itself, or blocks of `block` of its indices."""

    sym: Sym
    block: int | None = None


@dataclass(frozen=True)
class Domain:
    """The loops of one kernel, outermost first: parallel `outer`, sequential `inner` points, `lanes`, `reduced`.

    `lanes` is the vectorised symbol (None: scalar code) and `width` the lanes of a vector; `lanes` is among `nest.points`
    ("map" without reduction, "column" with one) or innermost in `reduced` ("row"). `vectors` of columns are reduced at once.
    `split`: few points and long reductions, so that threads share the reduction and points run one after the other.
    `parallel` is False when different points may add to one element. `tiled` loads are transposed in square tiles, `inner`
    being the loop along which they are contiguous.
    """

    nest: Nest
    outer: tuple[Outer, ...]
    inner: tuple[Sym, ...]
    lanes: Sym | None
    width: int
    reduced: tuple[Sym, ...]
    vectors: int = 1
    split: bool = False
    parallel: bool = True
    tiled: tuple[Load, ...] = ()

    @property
    def kind(self) -> str:
        if self.lanes is None:
            return "scalar"
        if self.lanes in self.reduced:
            return "row"
        return "column" if self.reduced else "map"

    def blocked(self, sym: Sym) -> bool:
        return any(o.sym == sym and o.block is not None for o in self.outer)


def plan_domain(nest: Nest, capability: str) -> Domain:
    """The loops for `nest` on a CPU of this capability ("AVX512", "AVX2", anything else: 16-byte vectors)."""
    nest = merge_dimensions(expand_statistics(nest))
    lanes = choose_lanes(nest)
    width = 1 if lanes is None else _width(nest, lanes, _NATIVE_BYTES.get(capability, _SMALLEST_NATIVE))
    if width < 2:
        lanes, width = None, 1
    reduced = tuple(s for s in nest.reduced if s != lanes) + ((lanes,) if lanes in nest.reduced else ())
    vectors = _TILE_VECTORS if lanes in nest.points and nest.reduced and _single_pass(nest) else 1
    domain = Domain(nest, (), (), lanes, width, reduced, vectors)
    return _with_outer_loops(domain)


# ---- rewriting ----


def expand_statistics(nest: Nest) -> Nest:
    """welford and softmax_stats as two dependent reductions: the second pass finds the row in cache, and is accurate."""
    memo: dict[Scalar, Scalar] = {}
    for node in postorder(nest.roots):
        args = tuple(memo[a] for a in node.args)
        new = node if args == node.args else node.rebuild(args, {})
        memo[node] = _expanded(new) if isinstance(new, Reduce) else new
    return Nest(nest.points, nest.reduced, tuple(s.transformed({}, memo.__getitem__) for s in nest.stores))


def _expanded(node: Reduce) -> Scalar:
    if node.kind not in ("welford", "softmax_stats"):
        return node
    dtype, x = computed(node.dtype), node.operands[0]
    if node.kind == "welford":
        count = Op("cast", (IndexValue(prod(extent(s) for s in node.axes)),), dtype)
        centre: Scalar = Op("truediv", (Reduce("sum", (x,), node.axes, dtype), count), dtype)
    else:
        centre = Reduce("max", (x,), node.axes, dtype)
    if node.output == 0:
        return centre
    distance = Op("sub", (x, centre), dtype)
    term = Op("mul", (distance, distance), dtype) if node.kind == "welford" else Op("exp", (distance,), dtype)
    return Reduce("sum", (term,), node.axes, dtype)


def index_expressions(nest: Nest) -> Iterator[Int]:
    """Every integer expression over loop indices in `nest`."""
    for node in postorder(nest.roots):
        if isinstance(node, Load):
            yield node.index
        elif isinstance(node, IndexValue):
            yield node.expr
    for store in nest.stores:
        yield store.index


def merge_dimensions(nest: Nest) -> Nest:
    """`nest` with every pair of dimensions joined that all accesses walk as one."""
    scanned = {n.axis for n in postorder(nest.roots) if isinstance(n, Scan)}
    while True:
        found = _mergeable_pair(nest, scanned)
        if found is None:
            return nest
        nest = _merged(nest, *found)


def _mergeable_pair(nest: Nest, scanned: set[Sym]) -> tuple[Sym, Sym] | None:
    expressions = list(dict.fromkeys(index_expressions(nest)))
    for group in (nest.points, tuple(s for s in nest.reduced if s not in scanned)):
        strides = {s: tuple(coefficient(e, s) for e in expressions) for s in group}
        for low in group:
            wanted = tuple(None if c is None else mul(c, extent(low)) for c in strides[low])
            for high in group:
                if high != low and None not in wanted and strides[high] == wanted:
                    return high, low
    return None


def _merged(nest: Nest, high: Sym, low: Sym) -> Nest:
    """`high` and `low` as one symbol: every index has the form c*(high*size + low) + rest, so low becomes it and high 0."""
    joint = Sym(low.name, size=mul(extent(high), extent(low)))  # loop_order reads names
    mapping: dict[Sym, Int] = {high: 0, low: symbol(joint)}
    stores = tuple(s.transformed(mapping) for s in nest.stores)

    def renamed(syms: tuple[Sym, ...]) -> tuple[Sym, ...]:
        return tuple(joint if s == low else s for s in syms if s != high)

    return Nest(renamed(nest.points), renamed(nest.reduced), stores)


# ---- the vectorised loop ----


@dataclass(frozen=True)
class Access:
    """One load or store as a function of the loop indices."""

    index: Int
    indirect: tuple[tuple[Sym, Scalar], ...]
    is_store: bool

    def stride(self, sym: Sym) -> Int | None:
        """Elements between neighbours along `sym`; None when that is not a constant."""
        if any(sym in value.symbols() for _, value in self.indirect):
            return None
        return coefficient(self.index, sym)


def accesses(nest: Nest) -> list[Access]:
    loads = [Access(n.index, n.indirect, False) for n in nest.loads()]
    return loads + [Access(s.index, s.indirect, True) for s in nest.stores]


def choose_lanes(nest: Nest) -> Sym | None:
    """The loop to vectorise: the one with the cheapest accesses; None when no loop is long enough."""
    scanned = {n.axis for n in postorder(nest.roots) if isinstance(n, Scan)}
    found = accesses(nest)
    candidates = [s for s in (*nest.reduced, *reversed(nest.points)) if s not in scanned and not _at_most(s, _TINY - 1)]
    return min(candidates, key=lambda s: _lane_cost(s, found), default=None)


def _at_most(sym: Sym, limit: int) -> bool:
    high = bounds(extent(sym))[1]
    return high is not None and high <= limit


def _lane_cost(sym: Sym, found: list[Access]) -> float:
    cost = 0.1
    for access in found:
        stride = access.stride(sym)
        if stride == 0:
            cost += 0.02
        elif stride == 1:
            cost += 0.1
        else:
            cost += 1.5 if access.is_store else 1.0
    size = bounds(extent(sym))[1]
    return cost * (1.0 if size is None else max(1.0, 16 / size))


def narrow_index(node: Scalar, lanes: Sym | None) -> bool:
    """An integer that int32 lanes can hold: a bounded index that is linear in `lanes`, or a small literal."""
    if isinstance(node, Const):
        return node.dtype == torch.int64 and abs(node.value) < 2**31
    if not isinstance(node, IndexValue):
        return False
    low, high = bounds(node.expr)
    fits = low is not None and high is not None and low > -(2**31) and high < 2**31
    return fits and (lanes is None or coefficient(node.expr, lanes) is not None)


def takes_narrow(user: Scalar, lanes: Sym | None) -> bool:
    """`user` can be evaluated with int32 forms of its int64 operands: a comparison of indices, or a cast of one."""
    if not isinstance(user, Op) or not all(narrow_index(a, lanes) for a in user.args):
        return False
    return user.name in _COMPARES or (user.name == "cast" and user.dtype not in (torch.float64, torch.int64, torch.bool))


def _width(nest: Nest, lanes: Sym, native: int) -> int:
    """Lanes of a vector: as many as the widest element type in vector code allows."""
    needs_wide: set[Scalar] = set()
    for user in postorder(nest.roots):
        if not takes_narrow(user, lanes):
            needs_wide.update(user.args)
    needs_wide.update(nest.roots)
    widest = 4 if native > _SMALLEST_NATIVE else 1
    for node in postorder(nest.roots):
        operands = node.args if isinstance(node, Reduce) else ()
        vector = lanes in node.symbols() or any(lanes in a.symbols() for a in operands)
        if vector and not (isinstance(node, IndexValue) and node not in needs_wide):
            widest = max(widest, computed(node.dtype).itemsize)
    for access in accesses(nest):
        if access.stride(lanes) is None:
            widest = max(widest, 8)
    return native // widest


# ---- what runs where ----


def _single_pass(nest: Nest) -> bool:
    """Plain column sums: no reduction inside another, no scan, nothing stored inside the reduction."""
    reduces = [n for n in postorder(nest.roots) if isinstance(n, Reduce)]
    nested = any(isinstance(n, Reduce | Scan) for r in reduces for n in postorder(r.operands))
    scans = any(isinstance(n, Scan) for n in postorder(nest.roots))
    inside = any(s.symbols() & set(nest.reduced) for s in nest.stores)
    return not (nested or scans or inside)


def _with_outer_loops(domain: Domain) -> Domain:
    nest, lanes = domain.nest, domain.lanes
    if any(s.mode == "add" for s in nest.stores):
        return _scattering(domain)
    points = tuple(s for s in nest.points if s != lanes)
    partner = _transposed_partner(domain) if domain.kind == "map" else None
    outer = [Outer(s, _TILE if s == partner else None) for s in points]
    if lanes in nest.points:
        block = _TILE if partner else _lane_block(domain, points)
        if block is not None:
            outer.append(Outer(lanes, block))
    if _worth_splitting(domain, outer):
        return _rebuilt(domain, outer=tuple(outer), split=True)
    inner = (partner,) if partner else _sequential(domain, outer)
    outer = [o for o in outer if o.block is not None or o.sym not in inner]
    return _rebuilt(domain, outer=tuple(outer), inner=inner, tiled=transposable(domain, partner) if partner else ())


def _sequential(domain: Domain, outer: list[Outer]) -> tuple[Sym, ...]:
    """The innermost point loop, when it is too little work to be a parallel iteration and there are enough without it."""
    if not outer or outer[-1].block is not None:
        return ()
    last = outer[-1].sym
    here = (domain.lanes,) if domain.lanes in domain.nest.points else domain.reduced
    work = bounds(prod(extent(s) for s in here if s is not None))[1]
    others = bounds(prod(extent(o.sym) for o in outer[:-1]))[0]
    return (last,) if work is not None and work <= _LITTLE and others is not None and others >= _ENOUGH else ()


def transposable(domain: Domain, partner: Sym) -> tuple[Load, ...]:
    """Loads that every point executes and that are contiguous along `partner`, strided along the lanes."""
    assert domain.lanes is not None
    out: dict[Load, None] = {}
    stack, seen = list(reversed(domain.nest.roots)), set(domain.nest.roots)
    while stack:
        node = stack.pop()
        if isinstance(node, Load):
            access = Access(node.index, node.indirect, False)
            if not node.indirect and access.stride(partner) == 1 and access.stride(domain.lanes) not in (0, 1, None):
                out[node] = None
        below = (node.cond,) if isinstance(node, Masked) else node.args
        stack += [a for a in reversed(below) if a not in seen]
        seen.update(below)
    return tuple(out)


def _rebuilt(domain: Domain, **changes: object) -> Domain:
    fields = {name: getattr(domain, name) for name in domain.__dataclass_fields__}
    return Domain(**(fields | changes))


def _lane_block(domain: Domain, points: tuple[Sym, ...]) -> int | None:
    """Lanes in one unit of parallel work; None when the whole loop is one unit."""
    assert domain.lanes is not None
    block = domain.width * domain.vectors * (4 if domain.kind == "column" and domain.vectors == 1 else 1)
    if domain.kind == "map":
        size = bounds(extent(domain.lanes))[1]
        block = _MAP_BLOCK if size is None or size >= 8 * _MAP_BLOCK or points else max(512, _rounded(size // 8, 64))
    return None if _at_most(domain.lanes, block) else block


def _rounded(n: int, step: int) -> int:
    return -(-n // step) * step


def _transposed_partner(domain: Domain) -> Sym | None:
    """A point loop along which some access is contiguous that is strided along the lanes: walk both in square tiles."""
    strided = [a for a in accesses(domain.nest) if domain.lanes is not None and a.stride(domain.lanes) not in (0, 1, None)]
    for sym in domain.nest.points:
        if sym != domain.lanes and not _at_most(sym, _TINY - 1) and any(a.stride(sym) == 1 for a in strided):
            return sym
    return None


def _worth_splitting(domain: Domain, outer: list[Outer]) -> bool:
    """Few independent points, each with a long reduction."""
    nest = domain.nest
    if not nest.reduced or any(isinstance(n, Scan) for n in postorder(nest.roots)):
        return False
    units = bounds(prod(floordiv(extent(o.sym), o.block or 1) for o in outer))[1]
    length = bounds(prod(extent(s) for s in nest.reduced))
    return units is not None and units < _FEW and (length[1] is None or length[0] is None or length[0] >= _LONG)


def _scattering(domain: Domain) -> Domain:
    """Loops for stores that add: threads divide a dimension along which indices cannot meet, or there is one thread."""
    nest, lanes = domain.nest, domain.lanes
    adds = [s for s in nest.stores if s.mode == "add"]
    safe = [p for p in nest.points if all(_disjoint(s, p) for s in adds)]
    inner = tuple(p for p in nest.points if p != lanes and p not in safe)
    outer = [Outer(p) for p in safe if p != lanes]
    if lanes in safe and domain.kind == "map" and not _at_most(lanes, _TILE):
        outer.append(Outer(lanes, _TILE))
    return _rebuilt(domain, outer=tuple(outer), inner=inner, vectors=1, parallel=bool(outer))


def _disjoint(store: Store, sym: Sym) -> bool:
    """Whether points that differ in `sym` never meet in one element: index = c*sym + rest with rest mod c*size < c."""
    if sym.size is None or any(sym in v.symbols() for _, v in store.indirect):
        return False
    step = coefficient(store.index, sym)
    if step is None or step == 0 or (bounds(step)[0] or 0) <= 0:
        return False
    rest = substitute(store.index, {sym: 0})
    return in_range(mod(rest, mul(step, sym.size)), step)
