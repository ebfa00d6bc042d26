"""The one list that orders the passes, and the loop that runs them."""

from __future__ import annotations

import functools
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import fx

from fxopt.ir import printer, spec
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.journal import Journal
from fxopt.passes.algebra import algebra
from fxopt.passes.attention import attention
from fxopt.passes.attention_mask import attention_mask
from fxopt.passes.canonical_calls import canonical_calls
from fxopt.passes.channels_last import channels_last
from fxopt.passes.complex_pairs import complex_pairs
from fxopt.passes.constant_folding import constant_folding
from fxopt.passes.context import Context, PassOptions
from fxopt.passes.convolution_bias import convolution_bias
from fxopt.passes.cse import cse
from fxopt.passes.dead_code import dead_code
from fxopt.passes.disjoint_windows import disjoint_windows
from fxopt.passes.encoder_layer import encoder_layer
from fxopt.passes.flat_convolution import flat_convolution
from fxopt.passes.fp8_training import fp8_training
from fxopt.passes.fusions import PATTERNS
from fxopt.passes.hand_attention.rewrite import hand_attention
from fxopt.passes.linear_cross_entropy import linear_cross_entropy
from fxopt.passes.matcher import apply_pattern
from fxopt.passes.merged_products import merged_products
from fxopt.passes.module_floats import module_floats
from fxopt.passes.no_ops import no_ops
from fxopt.passes.observe import ATTENTIONS, ROWS, Observed, observe
from fxopt.passes.open_mask import open_mask
from fxopt.passes.pad_gemm import pad_gemm
from fxopt.passes.product_bias import product_bias
from fxopt.passes.quantize import quantize
from fxopt.passes.quantized_pools import quantized_pools
from fxopt.passes.quantized_residuals import quantized_residuals
from fxopt.passes.stored_attention import stored_attention
from fxopt.passes.views import views


@dataclass(frozen=True)
class Pass:
    """A named step. The name is what `disable`, dumps and reports use; a pass may stand in the list more than once."""

    name: str
    run: Callable[[Context], None]


FUSIONS: tuple[Pass, ...] = tuple(Pass(p.name, functools.partial(apply_pattern, declared=p)) for p in PATTERNS)

_UP_TO_LAYERS: tuple[Pass, ...] = (
    Pass("dead_code", dead_code),
    Pass("complex_pairs", complex_pairs),  # first: what follows is about real tensors
    Pass("no_ops", no_ops),
    Pass("views", views),
    Pass("disjoint_windows", disjoint_windows),  # before the next two: products are neither
    Pass("flat_convolution", flat_convolution),  # the next pass is about images
    Pass("channels_last", channels_last),  # of inference graphs; frozen weights are converted by folding
    Pass("convolution_bias", convolution_bias),
    Pass("constant_folding", constant_folding),
    Pass("algebra", algebra),
    Pass("no_ops", no_ops),  # folding and algebra make zeros, ones and equal operands
    Pass("views", views),
    Pass("attention_mask", attention_mask),  # folding has shown which masks hide nothing
    Pass("cse", cse),
    Pass("dead_code", dead_code),  # an unused user would keep a pattern from matching
    *FUSIONS,
)
"""After these, layers are what calibration, options and tables call so (ir/layers.py)."""

PASSES: tuple[Pass, ...] = (
    *_UP_TO_LAYERS,
    Pass("quantize", quantize),
    Pass("quantized_residuals", quantized_residuals),
    Pass("quantized_pools", quantized_pools),  # what was a residual besides is read in 8 bits now
    Pass("stored_attention", stored_attention),
    Pass("merged_products", merged_products),
    Pass("product_bias", product_bias),  # biases are merged by now; a padded product would want a padded one
    Pass("pad_gemm", pad_gemm),
    Pass("constant_folding", constant_folding),  # frozen weights are padded once
    Pass("views", views),  # fusions leave views next to each other
    Pass("cse", cse),  # products of one operand share its padded form
    Pass("dead_code", dead_code),
)
"""What runs on an ATen graph, in this order."""

AGAIN: tuple[Pass, ...] = (
    Pass("no_ops", no_ops),
    Pass("views", views),
    Pass("algebra", algebra),
    Pass("cse", cse),  # what several ops consist of
    Pass("dead_code", dead_code),
)
"""What runs once more on a graph in which an op has been taken apart since."""

OBSERVING: tuple[Pass, ...] = (*_UP_TO_LAYERS, Pass("observe", observe))
"""What makes a graph tell what its layers are given. All of PASSES run on it afterwards."""

EARLY_PASSES: tuple[Pass, ...] = (
    Pass("module_floats", module_floats),  # first: the others want literals
    Pass("encoder_layer", encoder_layer),  # what it makes is the other passes'
    Pass("open_mask", open_mask),  # before the next: canonical spellings hide from which calls a mask was made
    Pass("canonical_calls", canonical_calls),
    Pass("hand_attention", hand_attention),  # reads canonical spellings; its calls are the next pass's
    Pass("attention", attention),
    Pass("linear_cross_entropy", linear_cross_entropy),
)
"""What runs on Dynamo's graph, before autograd."""

JOINT_PASSES: tuple[Pass, ...] = (
    Pass("channels_last", channels_last),
    Pass("convolution_bias", convolution_bias),
    Pass("fp8_training", fp8_training),
)
"""What runs on forward and backward as one ATen graph, before the partitioner chooses what is saved between them."""

NAMES: tuple[str, ...] = tuple(dict.fromkeys(p.name for p in (*EARLY_PASSES, *JOINT_PASSES, *PASSES)))
"""Every name that `disable` accepts."""


def run(graph: Graph, options: PassOptions, journal: Journal, *, check: bool = False) -> Context:
    """Run PASSES on `graph` in place and note in `journal` what each did.

    `check` (or options.check) verifies the spec before the first pass and after each one (GraphSpecError names it). The
    returned Context has the log of rewrites and the counted rejections.
    """
    return run_passes(PASSES, graph, options, journal, check=check or options.check)


def run_again(graph: Graph, options: PassOptions, journal: Journal) -> None:
    """Run AGAIN on `graph` in place; its dumps have a folder of their own."""
    run_passes(AGAIN, replace(graph, name=f"{graph.name} again"), options, journal, check=options.check)


def run_observing(
    graph: Graph, options: PassOptions, journal: Journal, *, rows: bool = False, attention: bool = False
) -> tuple[Observed, ...]:
    """Run OBSERVING on `graph` in place; what the results say that are appended to its own (see observe.py)."""
    graph.notes |= {ROWS: rows, ATTENTIONS: attention}
    run_passes(OBSERVING, graph, options, journal, check=options.check)
    del graph.notes[ROWS], graph.notes[ATTENTIONS]
    observed: tuple[Observed, ...] = graph.notes.pop("observed", ())
    return observed


def run_early(gm: fx.GraphModule, options: PassOptions, journal: Journal) -> None:
    """Run EARLY_PASSES on Dynamo's graph in place, before autograd sees it."""
    inputs = [Input(str(n.target), Role.USER) for n in gm.graph.nodes if n.op == "placeholder"]
    run_passes(EARLY_PASSES, Graph(gm, inputs, Phase.EARLY, f"{journal.graph} early"), options, journal, check=False)


def run_joint(gm: fx.GraphModule, options: PassOptions, journal: Journal) -> None:
    """Run JOINT_PASSES on a joint graph in place."""
    inputs = [Input(n.name, Role.USER) for n in gm.graph.nodes if n.op == "placeholder"]
    run_passes(JOINT_PASSES, Graph(gm, inputs, Phase.JOINT, f"{journal.graph} joint"), options, journal, check=False)


def run_passes(passes: tuple[Pass, ...], graph: Graph, options: PassOptions, journal: Journal, *, check: bool) -> Context:
    """The loop: run, time, count, dump and (when `check`) verify each pass that is not disabled."""
    context = Context(graph, options, journal, fuel=options.fuel)
    dumps = _Dumps(graph, options.dump)
    if check:
        spec.check(graph, None)
    dumps.write("captured")
    for step in passes:
        if step.name in options.disable:
            continue
        rewrites = _timed(step, context)
        if rewrites:
            dumps.write(step.name)
            if check:
                spec.check(graph, step.name)
    if context.log:
        graph.gm.recompile()
    _note(context)
    return context


def _timed(step: Pass, context: Context) -> int:
    """Run one pass; how many rewrites it made."""
    before, start = len(context.log), time.perf_counter()
    context.pass_name = step.name
    step.run(context)
    rewrites = len(context.log) - before
    context.journal.passes.append((step.name, rewrites, time.perf_counter() - start))
    return rewrites


def _note(context: Context) -> None:
    for rule, count in Counter(r.rule for r in context.log).items():
        context.journal.note("rewrite", f"{rule} x{count}")
    for (rule, reason), count in context.rejections.items():
        context.journal.note("rejected", f"{rule}: {reason} x{count}")


class _Dumps:
    """Numbered listings in `directory`/<graph name>/: 00_captured.py, then one per pass that changed something."""

    def __init__(self, graph: Graph, directory: str | None) -> None:
        self.graph, self.count = graph, 0
        self.folder = Path(directory) / re.sub(r"\W+", "_", graph.name) if directory else None

    def write(self, name: str) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self.count:02d}_{name}.py").write_text(printer.print_graph(self.graph))
        self.count += 1
