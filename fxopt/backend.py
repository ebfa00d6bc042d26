"""What `torch.compile(model, backend="fxopt")` calls, found through the entry-point group torch_dynamo_backends."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.capture import private
from fxopt.capture.aot import CompileGraph, compile_with_autograd, retreat
from fxopt.capture.autograd_cache import Shelf
from fxopt.capture.freeze import Runner
from fxopt.capture.guards import trust_modules
from fxopt.capture.normalize import copy_graph
from fxopt.capture.steady_floats import mark_steady_floats
from fxopt.capture.tracing_pause import pause_while_tracing
from fxopt.errors import OptionError
from fxopt.garbage import collection_paused
from fxopt.ir.graph import Graph
from fxopt.journal import RECENT, Journal
from fxopt.options import Options, suggestion
from fxopt.target import Target


def fxopt(
    gm: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one Dynamo graph. `mode` and `options` are torch.compile's (see options.py).

    Raises OptionError for a mode or option that does not exist. Nothing else is raised because of fxopt: what it cannot
    compile runs as the graph that it was, unless `options={"strict": True}` asks for a RetreatError.
    """
    parsed = Options.parse(mode, options)
    pause_while_tracing()
    _check_disabled(parsed, options or {})
    if parsed.steady_modules:
        trust_modules()
    devices = {x.device for x in inputs if isinstance(x, torch.Tensor)}
    on_miss = functools.partial(_prestart_compiler, devices)
    with collection_paused():
        return compile_dynamo_graph(gm, inputs, parsed, _compile_graph, _shelf(), on_miss)


def _check_disabled(parsed: Options, given: Mapping[str, Any]) -> None:
    """A name that no pass has: an OptionError when the user's options hold it, a warning when FXOPT_DISABLE does."""
    if not parsed.disable:
        return
    from fxopt.lower import attention_kernels, batching, contractions, group_sums, groupings, norm_scales, row_norms
    from fxopt.passes import NAMES
    from fxopt.runtime import backward_pieces, branches, cuda_graph, launch, native_replay, training_window

    lowering = (attention_kernels, batching, contractions, group_sums, groupings, norm_scales, row_norms)
    running = (cuda_graph, launch, native_replay, backward_pieces, training_window, branches)
    known = (*NAMES, *(part.NAME for part in (*lowering, *running)))
    for name in (name for name in parsed.disable if name not in known):
        text = f"no pass is called {name!r}{suggestion(name, known)}\nPasses: {', '.join(known)}"
        if name in given.get("disable", ()):
            raise OptionError(f"option 'disable': {text}")
        warnings.warn(f"FXOPT_DISABLE: {text}", stacklevel=3)


def _prestart_compiler(devices: Collection[torch.device]) -> None:
    """For a GPU: the process that compiles kernels takes seconds to start, which pass while the graph is traced."""
    gpu = next((d for d in devices if d.type == "cuda"), None)
    if gpu is not None:
        from fxopt.codegen.compile import prestart

        prestart(Target.current(gpu))


def _compile_graph(graph: Graph, example_inputs: Sequence[Any], options: Options, journal: Journal) -> Runner:
    # Imported here so that looking up the backend's name is cheap, and that an incomplete installation is only a retreat.
    from fxopt.compiler import compile_graph

    return compile_graph(graph, example_inputs, options, journal)


def _shelf() -> Shelf | None:
    try:
        from fxopt.plan_cache import AutogradShelf

        return AutogradShelf()
    except Exception:  # an incomplete installation, no place for a cache: shows where it is needed
        return None


def compile_dynamo_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    compile_graph: CompileGraph,
    shelf: Shelf | None = None,
    on_miss: Callable[[], None] | None = None,
) -> Callable[..., Any]:
    """Early passes, then AOTAutograd with `compile_graph` for each graph that comes out; `gm` itself if capture fails.

    On the `shelf` lies what AOTAutograd and `compile_graph` have made of the same graph before. `on_miss` is called before
    AOTAutograd traces a graph that is not there.
    """
    original = copy_graph(gm)
    journal = Journal("capture", strict=options.strict)
    try:
        _run_early(gm, options, journal)
        joint = functools.partial(_run_joint, options=options, journal=journal)
        compiled = compile_with_autograd(gm, inputs, options, compile_graph, shelf, on_miss, joint)
        private.forget_specialized_floats()  # now that the graph without them is compiled
    except private.PASS_THROUGH:
        raise
    except Exception as error:
        RECENT.append(journal)
        retreat(journal, "the whole Dynamo graph", error)
        return fx.GraphModule(gm, original).forward
    if journal.passes or journal.notes:
        RECENT.append(journal)
    return compiled


def _run_early(gm: fx.GraphModule, options: Options, journal: Journal) -> None:
    """The phase before autograd: passes that must see whole operations (attention, losses) with their own backward."""
    from fxopt.passes import run_early

    mark_steady_floats(gm)
    run_early(gm, options, journal)


def _run_joint(joint: fx.GraphModule, options: Options, journal: Journal) -> None:
    """The phase between autograd and partitioner: passes that decide about values that the backward reads, too."""
    from fxopt.passes import run_joint

    run_joint(joint, options, journal)


def _nothing_is_kept() -> bool:
    from fxopt.plan_cache import is_empty

    return is_empty()


pause_while_tracing()

# torch.compile imports this module when it looks the backend up, before Dynamo traces: seconds won for a first model on a
# GPU. Where plans are kept, there may be nothing to compile.
if torch.cuda.is_initialized() and _nothing_is_kept():
    _prestart_compiler([torch.device("cuda", torch.cuda.current_device())])
