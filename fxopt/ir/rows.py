"""What rows reduce to, and how often a kernel walks over a row for that and for what is computed from it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from fxopt.ir.exprs import Sym
from fxopt.ir.loops import Nest, Reduce, Scalar, Scan, postorder


def settled(roots: Sequence[Scalar], along: frozenset[Sym], known: Collection[Scalar]) -> list[Scalar]:
    """The largest values below `roots` that are made of reductions in `known` and the same along `along`, in order of first
    use: to be computed once for each point and not for each element."""
    found: dict[Scalar, None] = {}
    seen: set[Scalar] = set()
    stack = list(reversed(roots))
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        reductions = [n for n in postorder((node,)) if isinstance(n, Reduce)]
        whole = node in known or node.dtype in (torch.float32, torch.float64)
        if whole and reductions and not along & node.symbols() and all(n in known for n in reductions):
            found[node] = None
        elif reductions:
            stack += reversed(node.args)
    return list(found)


def walks(nest: Nest) -> dict[Scalar, int]:
    """In how many walks over a row that is not held each value of `nest` is needed.

    There is one for each level of nested reductions, and one for what is stored of each element.
    """
    level: dict[Scalar, int] = {}
    for node in postorder(nest.roots):
        level[node] = max((level[a] for a in node.args), default=0) + isinstance(node, Reduce | Scan)
    reduced = frozenset(nest.reduced)
    begins = [(level[n] - 1, n.args) for n in level if isinstance(n, Reduce | Scan)]
    begins += [(max(level[r] for r in s.roots), s.roots) for s in nest.stores if reduced & s.symbols()]
    found: dict[Scalar, set[int]] = {}
    for walk, roots in begins:
        for node in _in_one_walk(roots):
            found.setdefault(node, set()).add(walk)
    return {node: len(each) for node, each in found.items()}


def _in_one_walk(roots: Sequence[Scalar]) -> Iterator[Scalar]:
    """What `roots` are computed from for each element, down to what is reduced."""
    seen: set[Scalar] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack += () if isinstance(node, Reduce | Scan) else node.args
