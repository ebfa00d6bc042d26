"""Every torch API without a stability promise that capture needs, imported in one place (checked on torch 2.11 and 2.13)."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._decomp import core_aten_decompositions
from torch._dynamo import disable
from torch._dynamo import exc as dynamo_errors
from torch._dynamo.pgo import auto_dynamic, get_code_state
from torch._dynamo.symbolic_convert import TensorifyState
from torch._dynamo.utils import counters, flatten_graph_inputs
from torch._functorch import config as functorch_config
from torch._functorch import partitioners
from torch._functorch._aot_autograd.schemas import MemoryFormatMeta, OutputType
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, tracing
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.fx.graph import _BoxedCodeGen
from torch.fx.node import _get_qualified_name as qualified_name
from torch.utils._python_dispatch import _disable_current_modes

from fxopt.capture.foreach import values_by_layout
from fxopt.capture.joint_graph import remove_duplicates, without_unread_logs
from fxopt.errors import CalibrationError, HungKernelError, RetreatError

_PATCHING = threading.RLock()

__all__ = [
    "PASS_THROUGH",
    "FakeTensor",
    "TracingContext",
    "boxed_code",
    "changed_sources",
    "core_decompositions",
    "flatten_graph_inputs",
    "forget_specialized_floats",
    "gradients_as_outputs",
    "graph_breaks",
    "keep_saved_values",
    "lazily_compiled",
    "min_cut_partition",
    "outside_tracing",
    "qualified_name",
    "retracing",
    "saved_values_kept",
    "through_aot",
]


def core_decompositions() -> dict[Any, Callable[..., Any]]:
    """A copy of torch's table of core ATen.

    torch asks its dispatcher for all composite ops again for each namespace, a tenth of a second in all; here once.
    """
    from torch._export import utils  # what a warm start does without

    listed = functools.cache(utils._materialize_cpp_cia_ops)
    with mock.patch.object(utils, "_materialize_cpp_cia_ops", listed):
        return dict(core_aten_decompositions())


def through_aot(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    bw_compiler: Callable[..., Any],
    around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda compiled: compiled,
    **settings: Any,
) -> Callable[..., Any]:
    """AOTAutograd's function for `gm`, called with flat inputs, or what `around` makes of it.

    `settings` are those of torch's `aot_module_simplified`.

    torch's `aot_autograd(...)` does the same, but imports a large part of Inductor (a tenth of a second), for logs that only
    TORCH_COMPILE_DEBUG asks for.
    """

    def compile_backward(*args: Any, **kwargs: Any) -> Any:
        compiled = disable(bw_compiler, reason="do not trace a compiler")(*args, **kwargs)
        return disable(compiled, reason="do not trace a compiled backward")

    counters["aot_autograd"]["total"] += 1
    try:
        # Lazy: the graphs on the way are not run, so their Python code need not be written.
        with (
            _aot_logs(),
            _PATCHING,
            gradients_as_outputs(),
            without_unread_logs(),
            values_by_layout(),
            _use_lazy_graph_module(True),
        ):
            compiled = aot_module_simplified(gm, list(inputs), bw_compiler=compile_backward, **settings)
    except dynamo_errors.TensorifyScalarRestartAnalysis:
        raise
    except Exception:
        counters["aot_autograd"]["not_ok"] += 1
        raise
    counters["aot_autograd"]["ok"] += 1
    return disable(around(compiled), reason="do not trace a compiled graph")


def _aot_logs() -> contextlib.AbstractContextManager[None]:
    if os.environ.get("TORCH_COMPILE_DEBUG", "0") != "1":
        return contextlib.nullcontext()
    from torch._inductor.debug import enable_aot_logging

    return enable_aot_logging()


@contextlib.contextmanager
def gradients_as_outputs() -> Iterator[None]:
    """What is traced in the block expects the gradient of an output in that output's strides, where sizes are static.

    That is torch's own default from 2.12 on. Before, a gradient that is neither contiguous nor channels-last, as those of
    heads taken out of rows are, is copied ahead of every backward. An output whose elements share memory, or that has gaps,
    gets no such gradient.
    """
    if functorch_config.guess_tangent_strides_as_outputs:
        yield
        return
    by_strides: Callable[..., Any] = MemoryFormatMeta.from_tensor

    def by_strides_if_dense(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        dense = tensor.layout is torch.strided and is_non_overlapping_and_dense_or_false(tensor)
        with functorch_config.patch(guess_tangent_strides_as_outputs=dense):
            return by_strides(tensor, *args, **kwargs)

    with _PATCHING, mock.patch.object(MemoryFormatMeta, "from_tensor", staticmethod(by_strides_if_dense)):
        yield


def lazily_compiled(root: Any, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule whose Python code is written when it is called or printed, not after each change of the graph."""
    return _LazyGraphModule(root, graph)


def keep_saved_values(context: Any) -> None:
    """For the forward graph being compiled: its backward is not given the saved activations to overwrite.

    torch then refuses `backward(retain_graph=True)`, and nothing here makes use of the gift.
    """
    metadata = getattr(context, "fw_metadata", None)
    if metadata is not None and hasattr(metadata, "bw_donated_idxs"):
        metadata.bw_donated_idxs = []


def graph_breaks() -> Counter[str]:
    """Why Dynamo has split functions so far in this process, and how often."""
    return Counter(counters["graph_break"])


PASS_THROUGH: tuple[type[Exception], ...] = (
    dynamo_errors.RestartAnalysis,  # TensorifyScalarRestartAnalysis among them
    dynamo_errors.ShortenTraceback,
    dynamo_errors.SkipFrame,
    RetreatError,
    HungKernelError,
    CalibrationError,
)
"""What every catch-all lets pass: exceptions by which Dynamo steers itself, the error that `strict` asks for, the one after
which eager would hang, too, and that of a table which is not this model's."""


def min_cut_partition(
    joint: fx.GraphModule, inputs: Any, recomputable: tuple[Any, ...], **settings: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """torch's min-cut partitioner, with the op packets `recomputable` added to those that it may recompute."""
    original = partitioners.get_default_op_list

    def extended() -> Any:
        types = original()
        types.recomputable_ops.update(recomputable)
        types.fusible_ops.update(recomputable)
        return types

    with (
        _PATCHING,
        mock.patch.object(partitioners, "get_default_op_list", extended),
        mock.patch.object(partitioners, "fx_graph_cse", remove_duplicates),
    ):
        return partitioners.min_cut_rematerialization_partition(joint, inputs, **settings)


def boxed_code(gm: fx.GraphModule) -> Callable[[list[Any]], Any]:
    """`gm`'s generated code with the boxed convention: its inputs come in one list, which it empties. Changes `gm`."""
    gm.graph.set_codegen(_BoxedCodeGen())
    gm.recompile()
    _LazyGraphModule.force_recompile(gm)
    return gm.forward


@contextlib.contextmanager
def outside_tracing() -> Iterator[None]:
    """Plain eager torch for the compiler: AOTAutograd calls it under a fake mode, the Python dispatcher and maybe autocast.

    Casts are in the graph already; folding and measuring need real tensors. Code that wants fake values enters their mode.
    """
    autocast = torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else contextlib.nullcontext()
    with _disable_current_modes(), torch._C._DisablePythonDispatcher(), autocast, torch.no_grad():
        yield


@contextlib.contextmanager
def retracing(context: Any) -> Iterator[None]:
    """The tracing context of an earlier compilation, for one that happens at run time."""
    if context is None or TracingContext.try_get() is not None:
        yield
        return
    with tracing(context):
        yield


@contextlib.contextmanager
def saved_values_kept() -> Iterator[None]:
    """No backward compiled in the block reuses the memory of what its forward saved, so that it can run more than once."""
    with functorch_config.patch(donated_buffer=False):
        yield


def changed_sources() -> frozenset[str]:
    """Names of the numbers that Dynamo has seen with several values, in any function that it has compiled."""
    known = (state.automatic_dynamic.items() for state in get_code_state().values())
    return frozenset(name for each in known for name, seen in each if seen.scalar is auto_dynamic)


def forget_specialized_floats() -> None:
    """Have Dynamo make inputs of floats again that it was told to take as literals when it traced a graph once more.

    It keeps them, by names that other functions have too, until it is reset: each value would be another graph.
    """
    TensorifyState.clear()


def compiled_metadata() -> Any:
    """AOTAutograd's metadata of the graph that it is compiling, or None."""
    return getattr(TracingContext.try_get(), "fw_metadata", None)


def static_positions() -> frozenset[int]:
    """Positions, among the inputs of the graph AOTAutograd is compiling, whose tensors keep their address."""
    context: Any = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    return frozenset(metadata.static_input_indices or ()) if metadata is not None else frozenset()


def regenerated_outputs() -> frozenset[int]:
    """Positions, among the outputs of the graph AOTAutograd is compiling, of which the caller gets the input itself or a new
    view of it: of the graph's own result only the layout is looked at."""
    metadata: Any = getattr(TracingContext.try_get(), "fw_metadata", None)
    if metadata is None:
        return frozenset()
    first = metadata.num_mutated_inp_runtime_indices
    kinds = (OutputType.alias_of_input, OutputType.is_input)
    return frozenset(first + k for k, info in enumerate(metadata.output_info) if info.output_type in kinds)


def plain_input_index(node: fx.Node) -> int | None:
    """Which input of Dynamo's graph a placeholder of AOTAutograd's graph is; None when it is none, or only a part of one."""
    descriptor: Any = node.meta.get("desc")
    return descriptor.idx if type(descriptor).__name__ == "PlainAOTInput" else None


def is_token(node: fx.Node) -> bool:
    """Whether a placeholder is an effect token (an ordering, not a tensor of the user's)."""
    return "Token" in type(node.meta.get("desc")).__name__
