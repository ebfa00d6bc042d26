"""A tensor's halves that have changed places, read by one load.

Rotary embeddings put -second and first half of a row side by side. As a selection between two expressions, one for each half
of the index, everything below them is loaded and computed twice, under masks. Where both compute the same at indices half a
row apart, it is computed once, at the index in the other half: a permutation that keeps runs of half a row, without a mask.
"""

from __future__ import annotations

from dataclasses import replace

from fxopt.ir.exprs import Int, Sym, mod, symbol
from fxopt.ir.loops import Const, IndexValue, Load, Masked, Nest, Op, Scalar, postorder


def with_common_halves(nest: Nest) -> Nest:
    """`nest` with what both arms of a selection by the half of an index compute, half its range apart, computed once."""
    changed: dict[Scalar, Scalar] = {}
    for node in postorder(nest.roots):
        args = tuple(changed[a] for a in node.args)
        new = node if args == node.args else node.rebuild(args, {})
        changed[node] = _common(new) if isinstance(new, Masked) else new
    if all(node is new for node, new in changed.items()):
        return nest
    return replace(nest, stores=tuple(s.transformed({}, changed.__getitem__) for s in nest.stores))


def _common(node: Masked) -> Scalar:
    """`node` with one computation for both halves, or as it is."""
    found = _halves(node)
    if found is None:
        return node
    sym, half, lower, upper = found
    here = symbol(sym)
    beyond = _shifted(upper, sym, here + 2 * half)  # the upper half's expression at the index that the lower half's has
    if _shifted(beyond, sym, here - 2 * half) is not upper:
        return node  # simplified by a range that the index has left
    below = set(postorder((lower,)))
    both = {n for n in postorder((beyond,)) if n in below and sym in n.symbols() and _reads(n)}
    if not both:
        return node
    turned = {n: _shifted(n, sym, mod(here + half, 2 * half) - half) for n in both}
    first, second = _outside(lower, turned, sym, here), _outside(beyond, turned, sym, here - 2 * half)
    if first is None or second is None:
        return node
    return first if first is second else Op("where", (node.cond, first, second), node.dtype)


def _halves(node: Masked) -> tuple[Sym, int, Scalar, Scalar] | None:
    """(index, half its range, value in the lower half, in the upper) if `node` selects by them."""
    upper = node.other
    if not (isinstance(upper, Masked) and isinstance(node.cond, Op) and isinstance(upper.cond, Op)):
        return None
    index, half = node.cond.args if node.cond.name == "lt" else (None, None)
    if not (isinstance(index, IndexValue) and isinstance(half, Const)):
        return None
    sym = next((s for s in index.symbols() if index.expr == symbol(s)), None)
    if sym is None or sym.size != 2 * half.value:
        return None
    other = Op("ge", (IndexValue(symbol(sym) - int(half.value)), Const(0, half.dtype)), upper.cond.dtype)
    return (sym, int(half.value), node.body, upper.body) if upper.cond is other else None


def _shifted(root: Scalar, sym: Sym, to: Int) -> Scalar:
    """`root` at another index. A reduction over `sym` has an index of its own by that name, and stays."""
    done: dict[Scalar, Scalar] = {}
    for node in postorder((root,)):
        free = sym in node.symbols()
        done[node] = node.rebuild(tuple(done[a] for a in node.args), {sym: to}) if free else node
    return done[root]


def _outside(root: Scalar, turned: dict[Scalar, Scalar], sym: Sym, at: Int) -> Scalar | None:
    """`root` at index `at` but for the nodes in `turned`, which have their images; None if anything else touches memory."""
    done: dict[Scalar, Scalar] = {}
    stack = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if node in turned:
            done[node] = turned[node]
        elif ready:
            done[node] = node.rebuild(tuple(done[a] for a in node.args), {sym: at}) if sym in node.symbols() else node
        elif node not in done:
            if _touches_memory(node):
                return None
            stack += [(node, True), *((a, False) for a in node.args)]
    return done[root]


def _reads(node: Scalar) -> bool:
    return any(isinstance(n, Load) for n in postorder((node,)))


def _touches_memory(node: Scalar) -> bool:
    return isinstance(node, Load) or (isinstance(node, Op) and node.name == "checked_index")
