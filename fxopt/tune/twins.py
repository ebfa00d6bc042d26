"""Regions, products and attention that are equal but for the names of their buffers (the layers of a model): each is printed
once.

Printing takes longer than comparing: in canonical names each is a value, equal for all twins, and what is printed for it is
every twin's with the names put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fxopt.ir.kernel import KernelSource
from fxopt.ir.loops import Load, Nest, Scalar, postorder
from fxopt.ir.region import Attention, BufferSpec, Contraction, Region, Strided, Work
from fxopt.tune.candidate import Candidate


def canonical(region: Region) -> tuple[Region, dict[str, str]]:
    """(`region` with its buffers called b0, b1, ... in order of use and no origins; the region's own name for each)."""
    names = _names(region)
    return _renamed_region(region, names), {name: own for own, name in names.items()}


def canonical_contraction(contraction: Contraction) -> tuple[Contraction, dict[str, str]]:
    """As `canonical`, of a product that no row is computed for and whose operands are as they are in memory."""
    names = _names(contraction, contraction.region)
    c = contraction.c
    twin = replace(
        contraction,
        name="contraction",
        a=replace(contraction.a, buffer=names[contraction.a.buffer]),
        b=replace(contraction.b, buffer=names[contraction.b.buffer]),
        result=names[contraction.result],
        region=_renamed_region(contraction.region, names),
        buffers=_renamed_specs(contraction.buffers, names),
        c=None if c is None else replace(c, buffer=names[c.buffer]),
        second=names.get(contraction.second, ""),
        ends=names.get(contraction.ends, ""),
        pooled=tuple(names[own] for own in contraction.pooled),
    )
    return twin, {name: own for own, name in names.items()}


def _names(*works: Region | Contraction | Attention) -> dict[str, str]:
    """The canonical name of each buffer by its own, in order of use."""
    order = dict.fromkeys(name for work in works for name in (*work.reads(), *work.writes(), *work.buffers))
    return {own: f"b{k}" for k, own in enumerate(order)}


def _renamed_specs(buffers: Mapping[str, BufferSpec], names: Mapping[str, str]) -> dict[str, BufferSpec]:
    """Those of `buffers`, in the order of `names`, with their canonical names."""
    return {name: replace(buffers[own], name=name) for own, name in names.items() if own in buffers}


def _renamed_region(region: Region, names: Mapping[str, str]) -> Region:
    """`region` with canonical names, no origins and no nodes."""
    changed: dict[Scalar, Scalar] = {}
    for node in postorder(tuple(root for nest in region.nests for root in nest.roots)):
        args = tuple(changed[a] for a in node.args)
        new = node if args == node.args else node.rebuild(args, {})
        if isinstance(new, Load):
            new = Load(names[new.buffer], new.index, new.dtype, new.indirect)
        changed[node] = new

    def renamed(nest: Nest) -> Nest:
        stores = (replace(s.transformed({}, changed.__getitem__), buffer=names[s.buffer]) for s in nest.stores)
        return replace(nest, stores=tuple(stores))

    return replace(
        region,
        name="region",
        nest=renamed(region.nest),
        buffers=_renamed_specs(region.buffers, names),
        nodes=(),
        origins=(),
        across=None if region.across is None else renamed(region.across),
        passed=frozenset(names[own] for own in region.passed),
        steady=frozenset(names[own] for own in region.steady),
    )


def canonical_attention(attention: Attention) -> tuple[Attention, dict[str, str]]:
    """As `canonical`, of attention whose scores are those of a library."""
    names = _names(attention)

    def renamed(x: Strided) -> Strided:
        return replace(x, buffer=names[x.buffer])

    twin = replace(
        attention,
        name="attention",
        query=renamed(attention.query),
        key=renamed(attention.key),
        value=renamed(attention.value),
        mask=None if attention.mask is None else renamed(attention.mask),
        out=renamed(attention.out),
        factors=None if attention.factors is None else attention.factors.renamed(names),
        buffers=_renamed_specs(attention.buffers, names),
        origins=(),
    )
    return twin, {name: own for own, name in names.items()}


@dataclass
class Printer:
    """`candidates` of steps, made once for all twins among regions, products and attention. Raises what `candidates`
    raises."""

    candidates: Callable[[Any], list[Candidate]]
    _made: dict[object, list[Candidate]] = field(default_factory=dict)

    def __call__(self, work: Work) -> list[Candidate]:
        key: object
        twin: Work
        if isinstance(work, Region):
            twin, names = canonical(work)
            key = (twin, tuple(twin.buffers.values()))
        elif isinstance(work, Attention) and work.scores is None:
            twin, names = canonical_attention(work)
            key = twin
        elif isinstance(work, Contraction) and work.row is None and not work.quantized:
            twin, names = canonical_contraction(work)
            key = (twin, tuple(twin.buffers.values()), tuple(twin.region.buffers.values()))
        else:
            return self.candidates(work)
        if key not in self._made:
            self._made[key] = self.candidates(twin)
        return [_for_work(candidate, work, names) for candidate in self._made[key]]


def _for_work(candidate: Candidate, work: Work, names: dict[str, str]) -> Candidate:
    """`candidate` of the canonical twin with the buffers of `work`; scratch buffers are named after their step."""
    own = names | {spec.name: f"{work.name}.{spec.name.partition('.')[2]}" for spec in candidate.scratch}
    scratch: Sequence[BufferSpec] = [replace(spec, name=own[spec.name]) for spec in candidate.scratch]
    return replace(candidate, sources=tuple(_renamed(s, own) for s in candidate.sources), scratch=tuple(scratch))


def _renamed(source: KernelSource, own: dict[str, str]) -> KernelSource:
    return replace(source, buffers=tuple(own[name] for name in source.buffers))
