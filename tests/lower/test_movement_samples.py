"""torch's own samples of the ops that move elements: exact results, and generated code except where listed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from fxopt.capture.decompositions import decompositions
from tests.lower.capturing import assert_same, library_calls
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered

OPS = frozenset(
    "T as_strided broadcast_to cat chunk column_stack constant_pad_nd diag diag_embed diagonal diagonal_scatter "
    "dsplit dstack expand flatten flip fliplr flipud gather hsplit hstack index_copy index_fill index_select kron "
    "meshgrid movedim narrow_copy nn.functional.channel_shuffle nn.functional.embedding nn.functional.pad "
    "nn.functional.pixel_shuffle nn.functional.pixel_unshuffle permute permute_copy ravel repeat reshape roll rot90 "
    "scatter select select_scatter slice slice_scatter split split_with_sizes squeeze stack t take_along_dim tile "
    "transpose unbind unflatten unfold unfold_copy unsqueeze view view_as view_copy vsplit vstack".split()
)
MAX_SAMPLES = 8
LIBRARY = {
    "as_strided": {"aten::as_strided.default"},  # reads before or after the tensor it is given
    "scatter": {"aten::scatter.reduce", "aten::scatter.value_reduce"},  # products
    "nn.functional.embedding": {"aten::embedding_renorm.default"},
}
"""What these samples may leave to the library."""


def _samples(op: Any, dtype: torch.dtype) -> list[Any]:
    return list(itertools.islice(op.sample_inputs("cpu", dtype), MAX_SAMPLES))


@pytest.mark.parametrize("op", [op for op in op_db if op.name in OPS], ids=lambda op: op.formatted_name)
def test_samples(op: Any) -> None:
    for dtype in (torch.float32, torch.bool):
        if dtype not in op.supported_dtypes("cpu"):
            continue
        for sample in _samples(op, dtype):
            leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
            moving = [k for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
            _check(op, leaves, spec, moving)


def _check(op: Any, leaves: list[Any], spec: Any, moving: list[int]) -> None:
    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        filled = list(leaves)
        for k, tensor in zip(moving, tensors, strict=True):
            filled[k] = tensor
        given, args, kwargs = pytree.tree_unflatten(filled, spec)
        return pytree.tree_leaves(op(given, *args, **kwargs))

    tensors = tuple(leaves[k] for k in moving)
    lowered = lower(call, tensors, decompose=decompositions())
    assert set(library_calls(lowered)) <= LIBRARY.get(op.name, set())
    results = run_lowered(lowered, dict(zip(lowered.inputs, tensors, strict=True)))
    for got, want in zip(results, call(*tensors), strict=True):
        assert_same(got, want)
