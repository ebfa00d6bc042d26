"""The tour: one captured graph in, something that runs it out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt import passes, plan_cache, tune
from fxopt.assemble import assemble
from fxopt.capture.eager_memory import eager_peak
from fxopt.capture.scored_apart import take_scores_apart
from fxopt.codegen.replay_build import replay_code
from fxopt.errors import CacheError, UnsupportedError
from fxopt.ir.graph import Graph, Phase, Role
from fxopt.ir.kernel import Artifact
from fxopt.ir.region import Alternatives, Batch, Call, Region, Step
from fxopt.journal import Journal
from fxopt.lower import (
    Lowered,
    attention_kernels,
    batching,
    contractions,
    group_sums,
    groupings,
    lower_graph,
    norm_scales,
    row_norms,
)
from fxopt.lower.attention_kernels import with_attention_kernels
from fxopt.lower.contractions import with_contractions
from fxopt.lower.schedule import schedule
from fxopt.lower.steady import with_steady_reads
from fxopt.options import Options
from fxopt.runtime import launch
from fxopt.runtime.artifacts import ArtifactStore, default_store
from fxopt.runtime.cuda_graph import with_graphs
from fxopt.runtime.executor import Executor
from fxopt.runtime.footprint import footprint
from fxopt.runtime.plan import Plan

MAX_ATTEMPTS = 4
"""Lowerings of one graph: the first, and again each time that kernels could not be built."""


def compile_graph(
    graph: Graph, example_inputs: Sequence[Any], options: Options, journal: Journal
) -> Callable[[list[Any]], Sequence[Any]]:
    """Compile `graph` (functional ATen, as `capture.normalize` leaves it).

    The result takes the graph's inputs as one list, which it empties (torch's boxed convention), and returns its outputs.
    `example_inputs` are the inputs that capture saw, FakeTensors among them. Raises UnsupportedError when the graph as a
    whole cannot be expressed, and RetreatError when something would fall back under options.strict.
    """
    if options.observer is not None:
        return _observed(graph, example_inputs, options, journal)
    options = _with_table(options)
    store = default_store()
    with journal.timed("plan cache"):
        key = plan_cache.plan_key(graph, options)
        known = None if key is None else plan_cache.load(key, graph, store, journal)
    if known is not None:
        return with_graphs(known, graph.phase, options, journal, replay_code(store))
    device = main_device(graph)
    eager = eager_peak(graph, device) if graph.phase is Phase.INFERENCE else None  # passes change what eager would run
    with journal.timed("passes"):
        passes.run(graph, options, journal)
    lowered, chosen = _lower_and_choose(graph, options, journal, store)
    try:
        plan, executor = _bind(graph, lowered, chosen, options, journal)
    except CacheError as error:  # sound files that this process cannot load: another machine's, say
        for artifact in _artifacts(chosen).values():
            store.forget(artifact.key, f"its kernel does not load: {error}")
        journal.kernels.clear()
        journal.library.clear()
        lowered, chosen = _lower_and_choose(graph, options, journal, store)
        plan, executor = _bind(graph, lowered, chosen, options, journal)
    journal.memory = memory_of(plan, device, eager)
    if key is not None and plan_cache.save(key, plan, lowered, journal, store):
        executor.kept_as = key.digest()
    return with_graphs(executor, graph.phase, options, journal, replay_code(store))


def _observed(
    graph: Graph, example_inputs: Sequence[Any], options: Options, journal: Journal
) -> Callable[[list[Any]], Sequence[Any]]:
    """`compile_graph` for calibration: the graph tells options.observer what its layers are given."""
    weights = [given.value for given in graph.inputs if given.value is not None]
    wanted = options.observer
    observed = passes.run_observing(graph, options, journal, rows=wanted.rows, attention=wanted.attention)
    run = compile_graph(graph, example_inputs, replace(options, observer=None), journal)
    attached: Callable[[list[Any]], Sequence[Any]] = options.observer.attached(observed, weights, run)
    return attached


def _with_table(options: Options) -> Options:
    """`options` with the calibration that lies at the path which they name. Raises CalibrationError for a bad one."""
    if not isinstance(options.calibration, str):
        return options
    from fxopt.quant.table import Calibration

    return replace(options, calibration=Calibration.load(options.calibration))


def main_device(graph: Graph) -> torch.device:
    """The GPU that the graph has values on, else the CPU."""
    leaves = pytree.tree_leaves([n.meta.get("val") for n in graph.gm.graph.nodes])
    devices = (x.device for x in leaves if isinstance(x, torch.Tensor))
    return next((d for d in devices if d.type == "cuda"), torch.device("cpu"))


def memory_of(plan: Plan, device: torch.device, eager: int | None) -> dict[str, int]:
    """What the journal tells of memory: empty where sizes are symbolic."""
    found = footprint(plan, device)
    if found is None:
        return {}
    return asdict(found) | ({} if eager is None else {"eager": eager})


def _bind(
    graph: Graph, lowered: Lowered, chosen: dict[str, tune.Choice], options: Options, journal: Journal
) -> tuple[Plan, Executor]:
    """Raises CacheError when a kernel cannot be loaded."""
    with journal.timed("assemble"):
        plan = assemble(graph, lowered, chosen, journal, early=launch.NAME not in options.disable)
        return plan, Executor(Plan.from_json(plan.to_json()), _artifacts(chosen), lowered.constants, lowered.local_ops)


def _with_row_norms(
    graph: Graph,
    lowered: Lowered,
    chosen: dict[str, tune.Choice],
    options: Options,
    journal: Journal,
    store: ArtifactStore,
) -> tuple[Lowered, dict[str, tune.Choice]]:
    """`lowered` with norms computed in the kernels of the products around them, or as factors in those of the products after
    them, where that is measured to be faster."""
    if options.tuning_seconds == 0:
        return lowered, chosen
    both, folds = lowered, dict[str, norm_scales.Fold]()
    if row_norms.NAME not in options.disable:
        both = row_norms.with_row_norms(both)
    if norm_scales.NAME not in options.disable:
        both, folds = norm_scales.with_norm_scales(both, every=options.mode == "max-autotune")
    both = with_steady_reads(both, _of_role(graph, Role.PARAMETER) | folds.keys())
    contests: list[Step] = [step for step in both.steps if isinstance(step, Alternatives)]
    if not contests:
        return lowered, chosen
    with journal.timed("kernels"):
        settled, more, failed = tune.choose(replace(both, steps=contests), options, store, journal)
    if failed:
        return lowered, chosen
    try:
        return norm_scales.folded(row_norms.kept(both, settled), folds), chosen | more
    except torch.OutOfMemoryError:
        journal.note(norm_scales.NAME, "norms stay: there is no memory for products of weights")
        return lowered, chosen


def _of_role(graph: Graph, role: Role) -> frozenset[str]:
    return frozenset(given.name for given in graph.inputs if given.role is role)


def _artifacts(chosen: dict[str, tune.Choice]) -> dict[str, Artifact]:
    return {artifact.key: artifact for choice in chosen.values() for _, artifact in choice.kernels}


def _take_scores_apart(graph: Graph, lowered: Lowered | None, options: Options, journal: Journal) -> bool:
    """Replace the ops of attention in training that no kernel of ours computes in `lowered`, or all of them, by products and
    what is between them: whether there were any."""
    called = None if lowered is None else {name for s in lowered.steps if isinstance(s, Call) for name in s.outputs}
    with journal.timed("lowering"):
        names = take_scores_apart(graph, None if called is None else called.__contains__)
        if names:
            passes.run_again(graph, options, journal)
    for name in names:
        journal.note("attention", f"{name}: no kernel of ours, as products and a softmax")
    return bool(names)


def _lower_and_choose(
    graph: Graph, options: Options, journal: Journal, store: ArtifactStore
) -> tuple[Lowered, dict[str, tune.Choice]]:
    """Regions and their kernels. What cannot be built is left to the library in another round; those built are stored."""
    library: frozenset[str] = frozenset()
    batch, apart = batching.NAME not in options.disable, frozenset[str]()
    with_kernels = attention_kernels.NAME not in options.disable and options.tuning_seconds != 0
    if not with_kernels:
        _take_scores_apart(graph, None, options, journal)
    for _ in range(MAX_ATTEMPTS):
        with journal.timed("lowering"):
            lowered = lower_graph(graph, journal, library)
        with journal.timed("library choice"):
            lowered = tune.choose_library(lowered, options, store, journal)
        with journal.timed("scheduling"):
            lowered = schedule(lowered, batch=batch, apart=apart)
            if with_kernels:
                lowered = with_attention_kernels(lowered)
            if contractions.NAME not in options.disable and options.tuning_seconds != 0:
                lowered = with_contractions(lowered, every=options.mode == "max-autotune")
            if group_sums.NAME not in options.disable and options.tuning_seconds != 0:
                lowered = group_sums.with_group_sums(lowered)
            if groupings.NAME not in options.disable and options.tuning_seconds != 0:
                lowered = groupings.with_groupings(lowered, options.mode)
            lowered = with_steady_reads(lowered, *(_of_role(graph, role) for role in (Role.PARAMETER, Role.STATE)))
        with journal.timed("kernels"):
            attention = functools.partial(tune.choose_attention, options=options, store=store, journal=journal)
            lowered, chosen, failed = tune.choose(lowered, options, store, journal, attention)
        if not failed and _take_scores_apart(graph, lowered, options, journal):
            continue
        if not failed:
            return _with_row_norms(graph, lowered, chosen, options, journal, store)
        journal.provisional = True  # the next process may have a compiler that works
        for region, reason in failed:
            if isinstance(region, Batch):  # its members are regions again
                apart |= {node for member in region.members for node in member.nodes}
                journal.note("batching", f"{len(region.members)} regions, {region.name}, run one by one: {reason}")
                continue
            journal.retreat(f"{region.name} ({', '.join(region.origins)})", reason)
            library |= frozenset(region.nodes)
    journal.retreat("the whole graph", f"kernels still failed to build after {MAX_ATTEMPTS} attempts")
    every = frozenset(n.name for n in graph.gm.graph.nodes if n.op == "call_function")
    lowered = lower_graph(graph, journal, every)
    if any(isinstance(step, Region) for step in lowered.steps):
        raise UnsupportedError("its kernels cannot be built")
    return lowered, {}
