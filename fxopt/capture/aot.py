"""Through AOTAutograd: one Dynamo graph becomes an inference graph, or a forward and a backward graph, each compiled.

`compile_graph(graph, example_inputs, options, journal)` is handed in from above. It returns a function of one list, the
values of those inputs whose role is not CONSTANT, in order, which it may empty; the function returns the outputs. If it
raises, the graph runs as its FX graph and the journal says why; under options.strict that is a RetreatError.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.capture import autograd_cache, private
from fxopt.capture.decompositions import Decompositions
from fxopt.capture.foreach import is_symbolic, take_lists_apart
from fxopt.capture.freeze import IN_TRAINING, Candidates, FrozenFunction, Runner
from fxopt.capture.joint_graph import save_before_changes
from fxopt.capture.normalize import copy_module, normalize
from fxopt.capture.passage import Passage, through_passage
from fxopt.capture.pool_offsets import save_pool_offsets
from fxopt.capture.random import functionalize_random
from fxopt.capture.roles import InputFacts, module_of
from fxopt.errors import UnsupportedError
from fxopt.garbage import collection_paused
from fxopt.ir.graph import Graph, Phase
from fxopt.journal import RECENT, Journal, warn_once
from fxopt.options import Options

log = logging.getLogger("fxopt")

CompileGraph = Callable[[Graph, Sequence[Any], Options, Journal], Runner]
RewriteJoint = Callable[[fx.GraphModule], None]

RECOMPUTABLE = (torch.ops.fxopt.rand, torch.ops.fxopt.randn, torch.ops.fxopt.randint)
"""Pure functions of a seed: the partitioner may compute them again in the backward."""

_numbers = itertools.count()


def compile_with_autograd(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    compile_graph: CompileGraph,
    shelf: autograd_cache.Shelf | None = None,
    on_miss: Callable[[], None] | None = None,
    rewrite_joint: RewriteJoint | None = None,
) -> Callable[..., Any]:
    """A function with `gm`'s calling convention, differentiable where `gm` is.

    `inputs` are Dynamo's example inputs: tensors (parameters included), SymInts, or lists and dicts of them. With a `shelf`,
    what was compiled before is found there as a whole, without tracing; `on_miss` is called before what is not is traced.
    `rewrite_joint` changes forward and backward in place while they are one graph.
    """
    if any(isinstance(x, (list, tuple, dict)) for x in inputs):
        inner = functools.partial(
            compile_with_autograd,
            options=options,
            compile_graph=compile_graph,
            on_miss=on_miss,
            rewrite_joint=rewrite_joint,
        )
        return private.flatten_graph_inputs(gm, inputs, inner)
    return Capture(options, compile_graph, rewrite_joint).through_autograd(gm, inputs, shelf, on_miss)


class Capture:
    """The compilation of one Dynamo graph: what its inference, forward and backward graphs have in common.

    AOTAutograd keeps it, to compile the backward at its first run.
    """

    def __init__(self, options: Options, compile_graph: CompileGraph, rewrite_joint: RewriteJoint | None = None) -> None:
        self.number = next(_numbers)
        self.facts = InputFacts()
        self.options, self.compile_graph, self.rewrite_joint = options, compile_graph, rewrite_joint
        self._user_outputs: int | None = None
        self._session: autograd_cache.Session | None = None
        self._passage: Passage | None = None

    def through_autograd(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        shelf: autograd_cache.Shelf | None,
        on_miss: Callable[[], None] | None,
    ) -> Callable[..., Any]:
        self._session = autograd_cache.begin(shelf, gm, inputs, self.options, self.number)
        if self._session is not None:
            self._session.on_miss = on_miss
        elif on_miss is not None:
            on_miss()
        forward: Any = functools.partial(self.compile, phase=Phase.FORWARD)
        autograd = functools.partial(
            private.through_aot,
            inference_compiler=functools.partial(self.compile, phase=Phase.INFERENCE),
            fw_compiler=forward if self._session is None else autograd_cache.serializable(forward),
            bw_compiler=functools.partial(self.compile, phase=Phase.BACKWARD),
            partition_fn=self.partition,
            decompositions=Decompositions(lists=any(map(is_symbolic, inputs))),
            keep_inference_input_mutations=True,
            around=self._around if isinstance(gm, fx.GraphModule) else _unchanged,  # else inputs come in one list
        )
        self.facts.tensors = inputs
        try:
            with autograd_cache.looking_up(self._session):
                compiled = autograd(gm, inputs)
        finally:
            self.facts.tensors = ()
        if self._session is not None:
            self._session.tell()
        return compiled

    def _around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        kept = None if self._session is None else self._session.passage
        passage = self._passage or kept
        return compiled if passage is None else passage.around(compiled)

    def partition(self, joint: fx.GraphModule, inputs: Any, **settings: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split the joint graph where the fewest bytes need saving; random values can be recomputed from their seed."""
        self._user_outputs = settings.get("num_fwd_outputs")
        take_lists_apart(joint, Decompositions())
        if not self.options.fallback_random:
            functionalize_random(joint)
        save_pool_offsets(joint)
        if self.rewrite_joint is not None:
            for node in joint.graph.nodes:
                node.meta["module"] = module_of(node)
            self.rewrite_joint(joint)
        recomputable = RECOMPUTABLE if self.options.recompute_random else ()
        if _gathers_are_repeatable(joint, settings.get("num_fwd_outputs", 0)):
            recomputable = (*recomputable, torch.ops.aten.embedding)
        save_before_changes(joint.graph)
        return private.min_cut_partition(joint, inputs, recomputable, **settings)

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], phase: Phase) -> Runner:
        """The compiler that AOTAutograd calls, once for each graph."""
        if self._session is not None:
            self._session.compiled_anew()
        self.facts.observe(gm, phase)
        if phase is Phase.FORWARD:
            private.keep_saved_values(private.TracingContext.try_get())
        if phase is Phase.INFERENCE:
            take_lists_apart(gm, Decompositions())
            if not self.options.fallback_random:
                gm = _with_pure_random(gm)
        build = functools.partial(self._build, gm, example_inputs, phase, private.TracingContext.try_get())
        notes = []
        if self.options.freeze and phase is Phase.INFERENCE:
            candidates = Candidates.of(gm, self.facts)
            if candidates.names:
                values = [self.facts.value(n) for n in gm.graph.find_nodes(op="placeholder")]
                return FrozenFunction(build, candidates, values)
        elif self.options.freeze and phase is Phase.FORWARD and not self.options.trains_narrow:
            notes.append(IN_TRAINING)
            warn_once("in training", IN_TRAINING)
        built = build({}, notes)[0]
        run, self._passage = through_passage(built, private.compiled_metadata() if phase is Phase.INFERENCE else None)
        if self._session is None:
            return _boxed(run)
        return autograd_cache.KeptCode(run, phase, getattr(built, "kept_as", None), self._session)

    def _build(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        phase: Phase,
        context: Any,
        constants: dict[str, torch.Tensor],
        notes: Sequence[str],
    ) -> tuple[Runner, bool]:
        """(function, whether it leaves out `constants`); the FX graph itself when compilation fails.

        `notes` are what the journal shall say about freezing.
        """
        journal = Journal(f"graph {self.number} {phase.value}", strict=self.options.strict)
        for note in notes:
            journal.note("freeze", note)
        RECENT.append(journal)
        try:
            # The backward is compiled at its first run, outside the block of the backend.
            with collection_paused(), private.retracing(context), private.outside_tracing():
                with journal.timed("normalize"):
                    graph = self._normalized(gm, phase, journal.graph, constants)
                return self.compile_graph(graph, list(example_inputs), self.options, journal), True
        except private.PASS_THROUGH:
            raise
        except Exception as error:
            retreat(journal, "the whole graph", error)
            return as_it_is(gm), False

    def _normalized(self, gm: fx.GraphModule, phase: Phase, name: str, constants: dict[str, torch.Tensor]) -> Graph:
        saved = 0
        if phase is Phase.FORWARD and self._user_outputs is not None:
            saved = len(gm.graph.output_node().args[0]) - self._user_outputs  # type: ignore[arg-type]
        return normalize(gm, self.facts, phase, name, saved=saved, constants=constants)


def _unchanged(compiled: Callable[..., Any]) -> Callable[..., Any]:
    return compiled


def retreat(journal: Journal, what: str, error: Exception) -> None:
    """Record that `what` falls back because of `error`. An error that fxopt does not raise on purpose is logged as well."""
    if isinstance(error, UnsupportedError):
        journal.retreat(what, error.reason)
        return
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    log.warning("%s: %s falls back to ATen: %s", journal.graph, what, reason)
    log.debug("the error behind the fallback", exc_info=error)
    journal.retreat(what, reason)


def as_it_is(gm: fx.GraphModule) -> Runner:
    """`gm` op by op, freeing each value after its last use. Takes its inputs in a list, which it empties."""
    return private.boxed_code(copy_module(gm))


def _gathers_are_repeatable(joint: fx.GraphModule, outputs: int) -> bool:
    """Whether each embedding's table is an input that is trained and not written in the graph: it then still is what it was
    when the backward runs, and kernels pick its rows on the way. The partitioner takes it where it is smaller than the rows.

    `outputs` of the joint graph's results are the forward's; the gradients of the inputs, or None, follow in their order.
    """
    aten = torch.ops.aten
    inputs = [n for n in joint.graph.find_nodes(op="placeholder") if "tangents" not in n.name]
    gradients = torch.utils._pytree.tree_leaves(joint.graph.output_node().args[0], is_leaf=lambda x: x is None)[outputs:]
    trained = {n for n, gradient in zip(inputs, gradients, strict=False) if gradient is not None}
    tables = {n.args[0] for n in joint.graph.find_nodes(op="call_function", target=aten.embedding.default)}
    written = {n.args[0] for n in joint.graph.find_nodes(op="call_function", target=aten.copy_.default)}
    return tables <= trained - written


def _with_pure_random(gm: fx.GraphModule) -> fx.GraphModule:
    copy = copy_module(gm)
    return copy if functionalize_random(copy) else gm


def _boxed(run: Runner) -> Runner:
    def call(args: list[Any]) -> Sequence[Any]:
        return run(args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call
