"""Before autograd: an attention mask that hides nothing is no mask.

Models build a mask from position indices for every kind of attention, and under a tracer they cannot look whether it hides
anything; for encoders it is true everywhere. Fused attention kernels take no mask much faster than one of ones, and some
take none at all, so it matters to know before a backend is chosen. Only masks computed from sizes alone are looked at, by
computing them: on the CPU, where they are small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.passes.attention import PARAMETERS, SPELLINGS
from fxopt.passes.context import Context
from fxopt.passes.sizes import Sizes


def open_mask(context: Context) -> None:
    known = Sizes(context.nodes)
    for node in context.nodes:
        if context.exhausted:
            return
        if node.op != "call_function" or node.target not in SPELLINGS:
            continue
        mask = _mask(node)
        if isinstance(mask, fx.Node) and _hides_nothing(mask, known):
            context.spend("hides_nothing", node)
            _remove_mask(node)


def _mask(node: fx.Node) -> Any:
    position = PARAMETERS.index("attn_mask")
    return node.args[position] if len(node.args) > position else node.kwargs.get("attn_mask")


def _remove_mask(node: fx.Node) -> None:
    position = PARAMETERS.index("attn_mask")
    if len(node.args) > position:
        node.args = (*node.args[:position], None, *node.args[position + 1 :])
    else:
        node.kwargs = {**node.kwargs, "attn_mask": None}


def _hides_nothing(mask: fx.Node, known: Sizes) -> bool:
    example = mask.meta.get("example_value")
    if not isinstance(example, torch.Tensor) or example.dtype != torch.bool:
        return False
    value = known.value(mask)
    return value is not None and value.dtype == torch.bool and bool(value.all())
