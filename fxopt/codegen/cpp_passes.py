"""What each pass over the reduced dimensions computes: which reductions, which stores, and what is kept between passes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fxopt.codegen.cpp_domain import Domain, computed, extent
from fxopt.codegen.cpp_ops import value_type
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, add, bounds, mul, prod
from fxopt.ir.loops import Const, IndexValue, Load, Masked, Nest, Op, Reduce, Scalar, Scan, Store, postorder

_COSTLY = frozenset(
    "exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc erfinv lgamma "
    "sigmoid pow atan2 hypot rand randn randint floordiv remainder fmod".split()
)
_SLOW = frozenset("truediv sqrt rsqrt reciprocal truncdiv checked_index".split())
_WORTH_KEEPING = 8
"""Cost from which a value that a later pass needs again is written to scratch memory and read back."""
_SCRATCH_LIMIT = 32768
"""Elements of scratch memory per kept value: beyond this it would not stay in cache."""
_SHORT_RUN = 64
"""Terms in one lane that are added without keeping the rounding errors."""


_CLASSES = {"prod": "Prod", "max": "Max", "min": "Min", "any": "Any", "all": "Every", "argmax": "ArgMax", "argmin": "ArgMin"}
_ON_BOOL = {"sum": "any", "max": "any", "min": "all", "prod": "all"}
_SCANS = {"cumsum": "CumSum", "cumprod": "CumProd", "cummax": "CumMax", "cummin": "CumMin", "logcumsumexp": "LogCumSumExp"}


@dataclass
class Pass:
    """One walk over the reduced dimensions. `kept` are values of this pass that later ones read from scratch memory."""

    reduces: list[Reduce] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    scans: list[Scan] = field(default_factory=list)
    kept: list[Scalar] = field(default_factory=list)

    def roots(self) -> list[Scalar]:
        return [x for r in self.reduces for x in r.operands] + [x for s in self.stores for x in s.roots]


def plan_passes(domain: Domain) -> tuple[list[Pass], list[Store]]:
    """(the passes in order, the stores executed once per point after them)."""
    nest, levels = domain.nest, _levels(domain.nest)
    inside = [s for s in nest.stores if s.symbols() & set(nest.reduced)]
    passes = [Pass() for _ in range(max((levels[n] for n in levels if isinstance(n, Reduce)), default=0))]
    for node in levels:
        if isinstance(node, Reduce):
            passes[levels[node] - 1].reduces.append(node)
    read = set(nest.reads())
    last = len(passes)
    for store in inside:
        # A store into a buffer that is also read waits for the last pass: the earlier ones may still need the old values.
        first = max(levels[r] for r in store.roots)
        number = last if store.buffer in read else first
        if number == len(passes):
            passes.append(Pass())
        passes[number].stores.append(store)
    for one in passes:
        one.scans = [n for n in _own_nodes(one.roots()) if isinstance(n, Scan)]
    if not domain.split:
        _keep_values(domain, passes)
    return passes, [s for s in nest.stores if s not in inside]


def _levels(nest: Nest) -> dict[Scalar, int]:
    """How many passes must have ended before a node can be computed; of a Reduce, the number of its own pass, from 1."""
    levels: dict[Scalar, int] = {}
    for node in postorder(nest.roots):
        levels[node] = max((levels[a] for a in node.args), default=0) + isinstance(node, Reduce)
    return levels


def _own_nodes(roots: list[Scalar]) -> list[Scalar]:
    """The nodes below `roots` that the pass itself evaluates, operands first: finished reductions are not entered."""
    out: list[Scalar] = []
    seen: set[Scalar] = set()
    stack = [(r, False) for r in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            out.append(node)
        elif node not in seen and not isinstance(node, Reduce):
            seen.add(node)
            stack.append((node, True))
            stack += [(a, False) for a in reversed(node.args)]
    return out


# ---- values kept between passes ----


def _keep_values(domain: Domain, passes: list[Pass]) -> None:
    lanes = 1 if domain.kind == "row" else domain.width
    length = bounds(mul(prod(extent(s) for s in domain.reduced), lanes))[1]
    if length is None or length > _SCRATCH_LIMIT:
        return
    first: dict[Scalar, Pass] = {}
    for one in passes:
        reached = _always_evaluated(one.roots(), domain)
        for node in _outermost_known(one.roots(), first):
            if node not in first[node].kept:
                first[node].kept.append(node)
        for node in reached:
            first.setdefault(node, one)


def _always_evaluated(roots: list[Scalar], domain: Domain) -> list[Scalar]:
    """Floating-point nodes that every step of the pass computes and that are costly enough to keep."""
    out: list[Scalar] = []
    stack, seen = list(roots), set(roots)
    while stack:
        node = stack.pop()
        if isinstance(node, Reduce | Const | IndexValue):
            continue
        if _keepable(node, domain):
            out.append(node)
        below = (node.cond,) if isinstance(node, Masked) else node.args
        for arg in below:
            if arg not in seen:
                seen.add(arg)
                stack.append(arg)
    return out


def _keepable(node: Scalar, domain: Domain) -> bool:
    if not node.dtype.is_floating_point or isinstance(node, Scan):
        return False
    needs = set(domain.reduced)
    if not node.symbols() & needs or (domain.lanes is not None and domain.lanes not in node.symbols()):
        return False
    own = [n for n in _own_nodes([node]) if n.symbols() & needs]
    return not any(isinstance(n, Scan) for n in own) and sum(map(weight, own)) >= _WORTH_KEEPING


def _outermost_known(roots: list[Scalar], known: dict[Scalar, Pass]) -> list[Scalar]:
    out: list[Scalar] = []
    stack, seen = list(reversed(roots)), set(roots)
    while stack:
        node = stack.pop()
        if node in known:
            out.append(node)
            continue
        if isinstance(node, Reduce):
            continue
        for arg in reversed(node.args):
            if arg not in seen:
                seen.add(arg)
                stack.append(arg)
    return out


# ---- cost ----


def weight(node: Scalar) -> int:
    """Cost of one element of `node`, in cheap vector operations."""
    if isinstance(node, Op):
        if node.name in _COSTLY:
            return 16
        return 4 if node.name in _SLOW else 1
    if isinstance(node, Load):
        return 8 if node.indirect else 2
    return 2 if isinstance(node, Reduce | Scan) else 1


def point_cost(nest: Nest) -> Int:
    """Cost of one point, its whole reduction included."""
    inner, outer = 0, 2 * len(nest.stores)
    reduced = set(nest.reduced)
    for node in postorder(nest.roots):
        if node.symbols() & reduced or isinstance(node, Reduce):
            inner += weight(node)
        else:
            outer += weight(node)
    return add(mul(inner, prod(extent(s) for s in nest.reduced)), outer) if nest.reduced else outer


# ---- accumulators ----


def accumulator(node: Reduce, lanes: str, terms: Int) -> tuple[str, bool]:
    """(the C++ type that accumulates `node`, whether it has to be flushed). `terms` go into one lane."""
    of = computed(node.operands[0].dtype if node.kind in ("argmax", "argmin") else node.dtype)
    kind = _ON_BOOL.get(node.kind, node.kind) if of == torch.bool else node.kind
    if kind == "sum":
        if value_type(of) == "float" and len(node.axes) > 1:
            return f"fx::WideSum<{lanes}>", False
        most = bounds(terms)[1]
        long = of.is_floating_point and (most is None or most > _SHORT_RUN)
        return f"fx::{'LongSum' if long else 'Sum'}<{value_type(of)}, {lanes}>", long
    if kind not in _CLASSES:
        raise UnsupportedError(f"reduction {kind!r}")
    if of == torch.bool and kind in ("argmax", "argmin"):
        return f"fx::{_CLASSES[kind]}<uint8_t, {lanes}>", False
    return f"fx::{_CLASSES[kind]}<{value_type(of)}, {lanes}>", False


def operand_values(node: Reduce) -> tuple[Scalar, ...]:
    """The operands of `node` in the dtype that it accumulates."""
    first, rest = node.operands[0], node.operands[1:]
    if node.kind in ("argmax", "argmin"):
        wanted = torch.uint8 if first.dtype == torch.bool else first.dtype
    else:
        wanted = node.dtype
    same = value_type(first.dtype) == value_type(wanted)
    return (first if same else Op("cast", (first,), wanted), *rest)


def scan_type(node: Scan, lanes: str) -> str:
    """The C++ type that holds the state of `node`."""
    return f"fx::{_SCANS[node.kind]}<{value_type(node.dtype)}, {lanes}>"


def scan_operand(node: Scan) -> Scalar:
    same = value_type(node.operand.dtype) == value_type(node.dtype)
    return node.operand if same else Op("cast", (node.operand,), node.dtype)
