"""From a schedule and its chosen kernels to the Plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from fxopt.codegen.triton_chain import OTHERS_END
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, coefficient, free_symbols, prod, substitute
from fxopt.ir.graph import Graph
from fxopt.ir.kernel import KernelSource
from fxopt.ir.loops import Masked, loads_below, postorder
from fxopt.ir.region import (
    Alias,
    Alternatives,
    Batch,
    BufferSpec,
    Call,
    Contraction,
    Ref,
    Region,
    SideBySide,
    Size,
    Work,
)
from fxopt.journal import Journal, KernelEntry
from fxopt.lower import Lowered
from fxopt.lower.cost import nbytes
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import InputSpec, Launch, Plan, PlanStep, SymbolSource, defined, expressions, used
from fxopt.tune import Choice

FEW_PROGRAMS = 32
"""Of a kernel that leaves multiprocessors without any."""


def assemble(graph: Graph, lowered: Lowered, chosen: dict[str, Choice], journal: Journal, *, early: bool = True) -> Plan:
    """The plan that runs `lowered` with the kernels in `chosen` (by region name); without `early` each kernel is launched
    when the one before it has ended. Raises UnsupportedError if a size's source is unknown.
    """
    steps: list[PlanStep] = []
    buffers = dict(lowered.buffers)
    for step in lowered.steps:
        if isinstance(step, Work):
            choice = chosen[step.name]
            buffers.update({spec.name: spec for spec in choice.scratch})
            before = next((s for s in reversed(steps) if not isinstance(s, Alias)), None)
            steps += _launches(step, choice, early, before)
            _note_kernels(step, choice, journal)
        elif isinstance(step, Alternatives):
            raise AssertionError(f"{step.name}: nobody has decided among its alternatives")
        else:
            steps.append(step)
            if isinstance(step, Call):
                journal.library.append((step.op, step.origin))
    inputs = tuple(_input_spec(graph, lowered, name) for name in lowered.inputs)
    named = _named(steps, lowered)
    given = {*lowered.inputs, *lowered.constants}
    plan = Plan(
        name=graph.name,
        inputs=inputs,
        constants=tuple(buffers[n] for n in lowered.constants if n in named and n in buffers),
        symbols=_symbol_sources(inputs, graph, lowered, steps, buffers),
        buffers=tuple(s for n, s in buffers.items() if n in named and n not in given),
        steps=tuple(steps),
        outputs=lowered.outputs,
        saved=graph.saved,
    )
    return plan_memory(plan)


def _launches(region: Work, choice: Choice, early: bool, before: PlanStep | None) -> list[PlanStep]:
    """One launch per kernel of the choice (a split reduction has two), after the step `before`."""
    out: list[PlanStep] = []
    parts = region.members if isinstance(region, Batch) else (region,)
    written = {*(n for part in parts for n in part.writes()), *(spec.name for spec in choice.scratch)}
    pairs = tuple(pair for part in parts if isinstance(part, Region) for pair in in_place_pairs(part))
    for number, (source, artifact) in enumerate(choice.kernels):
        spreads = number > 0 or spreads_beside(region, source, before)
        out.append(
            Launch(
                kernel=artifact.key,
                language=source.language,
                entry=artifact.entry,
                buffers=source.buffers,
                writes=tuple(dict.fromkeys(b for b in source.buffers if b in written)),
                device=region.device,
                sizes=source.sizes,
                grid=source.grid,
                errors=source.errors,
                aligned=_aligned_positions(source),
                inplace=pairs if len(choice.kernels) == 1 else (),
                label=region.name,
                members=source.members,
                block=source.block,
                early=early and spreads and bool(artifact.meta.get("chained")),
            )
        )
    return out


def spreads_beside(work: Work, source: KernelSource, before: PlanStep | None) -> bool:
    """Whether the first kernel of `work` may start beside the step `before`.

    Tiles of a product may not beside a kernel of many programs: several of them would go where that has none, and the last
    would end later than if each had found a multiprocessor of its own (BERT-base at batch 1: 1 %). But one that loads its
    weights before it waits may: the memory would be idle then.
    """
    loads_first = OTHERS_END in source.text
    return loads_first or not isinstance(work, Contraction | SideBySide) or _leaves_room(before)


def _leaves_room(step: PlanStep | None) -> bool:
    programs = prod(step.grid) if isinstance(step, Launch) else None
    return isinstance(programs, int) and programs <= FEW_PROGRAMS


def _aligned_positions(source: KernelSource) -> tuple[int, ...]:
    """Which pointer parameters (b0, b1, ...) the code assumes 16-byte aligned."""
    assumed = source.compile_options.get("aligned", ())
    return tuple(k for k in range(len(source.buffers)) if f"b{k}" in assumed)


def in_place_pairs(region: Region) -> Iterator[tuple[str, str]]:
    """(output, input) pairs where the output may overwrite the input: every access to either is at one and the same index,
    and the output is computed from the input.

    Without the second condition threads of one block may store an element before another thread has loaded it. For the same
    reason an input that is loaded under a mask is left alone: such loads are instructions of their own. None for nests
    that reduce: those read a row again after part of it has been stored.
    """
    if region.nest.reduced:
        return
    loads = region.nest.loads()
    masked = {n.buffer for m in postorder(region.nest.roots) if isinstance(m, Masked) for n in loads_below((m.body,))}
    for store in region.nest.stores:
        if store.mode != "set" or store.indirect:
            continue
        out = region.buffers[store.buffer]
        for name in dict.fromkeys(load.buffer for load in loads_below((store.value,))):
            spec = region.buffers[name]
            if name == store.buffer or (spec.dtype, spec.shape, spec.strides) != (out.dtype, out.shape, out.strides):
                continue
            own = [load for load in loads if load.buffer == name]
            if name not in masked and all(load.index == store.index and not load.indirect for load in own):
                yield store.buffer, name


def _note_kernels(region: Work, choice: Choice, journal: Journal) -> None:
    moved = sum(nbytes(spec) for spec in region.buffers.values())
    source = choice.kernels[0][0]
    label = f"{choice.label}, {len(region.members)} members" if isinstance(region, Batch) else choice.label
    for kernel, artifact in choice.kernels:
        entry = KernelEntry(artifact.entry, source.language, region.origins, label, moved, kernel.text)
        journal.kernels.append(entry)


def _input_spec(graph: Graph, lowered: Lowered, name: str) -> InputSpec:
    role = next(i.role for i in graph.inputs if i.name == name)
    spec = lowered.buffers.get(name)
    if spec is not None:
        return InputSpec(name, "tensor", role, spec.dtype, spec.device, spec.shape, spec.strides)
    node = next(n for n in graph.gm.graph.nodes if n.op == "placeholder" and n.name == name)
    val = node.meta.get("val")
    if isinstance(val, (int, torch.SymInt)) and not isinstance(val, bool):
        return InputSpec(name, "int", role)
    return InputSpec(name, "float" if isinstance(val, float) else "other", role)


def _named(steps: Iterable[PlanStep], lowered: Lowered) -> set[str]:
    """Every buffer that a step or an output mentions."""
    names: set[str] = set()
    for step in steps:
        names |= set(used(step)) | set(defined(step))
    return names | {o.name for o in lowered.outputs if isinstance(o, Ref)}


def _symbol_sources(
    inputs: tuple[InputSpec, ...], graph: Graph, lowered: Lowered, steps: list[PlanStep], buffers: dict[str, BufferSpec]
) -> tuple[SymbolSource, ...]:
    given = list(_readable(inputs, graph))
    known: dict[str, SymbolSource] = {}
    for direct in (True, False):  # a size that is the symbol itself needs no arithmetic at run time
        for x, source in given:
            solved = _solved(x, source)
            if solved is not None and (not direct or (solved.times, solved.plus) == (1, 0)):
                known.setdefault(solved.name, solved)
    needed = {s.name for x in _integers(lowered, steps, buffers) for s in free_symbols(x)}
    missing = sorted(needed - known.keys())
    if missing:
        raise UnsupportedError(f"no input tells the size {', '.join(missing)}")
    return tuple(known[name] for name in sorted(needed))


def _readable(inputs: tuple[InputSpec, ...], graph: Graph) -> Iterator[tuple[Int, SymbolSource]]:
    """Every integer that can be read off the inputs, the cheapest first, and where."""
    values = {n.name: n.meta.get("val") for n in graph.gm.graph.nodes if n.op == "placeholder"}
    for position, spec in enumerate(inputs):
        if spec.kind == "int":
            yield graph.to_int(values[spec.name]), SymbolSource("", position, "value")
    for what in ("size", "stride"):
        for position, spec in enumerate(inputs):
            for dim, x in enumerate(spec.shape if what == "size" else spec.strides):
                yield x, SymbolSource("", position, what, dim)


def _solved(x: Int, source: SymbolSource) -> SymbolSource | None:
    """How to get a symbol from `x`, found at `source`; None unless `x` is linear in one symbol and holds nothing else."""
    syms = free_symbols(x)
    if len(syms) != 1:
        return None
    sym = next(iter(syms))
    times, plus = coefficient(x, sym), substitute(x, {sym: 0})
    if not isinstance(times, int) or not isinstance(plus, int) or times == 0:
        return None
    return replace(source, name=sym.name, times=times, plus=plus)


def _integers(lowered: Lowered, steps: list[PlanStep], buffers: dict[str, BufferSpec]) -> Iterator[Int]:
    """Every integer that the plan evaluates at run time."""
    for spec in buffers.values():
        yield from (*spec.shape, *spec.strides)
    for step in steps:
        yield from expressions(step)
    yield from (o.expr for o in lowered.outputs if isinstance(o, Size))
