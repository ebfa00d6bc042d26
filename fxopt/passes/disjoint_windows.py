"""On GPUs a convolution of few channels whose windows lie side by side (a patch embedding) is a matrix product.

Tensor cores take channels in eights, so cuDNN transposes and pads an image of three, and then multiplies slices of a few
channels: a ViT-B's patch embedding takes it 97 us on an H100 for one image, where the product of the same numbers takes 5.
Where windows neither overlap nor leave anything out, the image in another order is the left operand, a copy of the image's
size, and the weight is the right one as it lies in memory.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxopt.ir.graph import Phase
from fxopt.passes.channels_last import prefers_channels_last
from fxopt.passes.context import Context
from fxopt.passes.facts import arguments, escapes, static_shape, tensor
from fxopt.passes.strides import StrideWalk, channels_at_the_end, is_dense

aten = torch.ops.aten

FEW_CHANNELS = 8
"""Channels of which as many fill what a tensor core takes at once."""

LONG_WINDOW = 256
"""Elements under a window from which on the product is worth the copy: below, a kernel of ours gathers as it multiplies."""


def disjoint_windows(context: Context) -> None:
    if context.graph.phase is not Phase.INFERENCE:
        return
    walk = StrideWalk(context)
    for node in context.nodes:
        if context.exhausted:
            break
        product = _as_product(context, node)
        if product is None:
            continue
        before = node.meta["val"]
        if context.replace("convolution", node, product) and product.meta["val"].stride() != before.stride():
            walk.traced[product] = before
            walk.show_as_traced(product)
    if walk.traced:
        for node in context.nodes:
            walk.visit(node)


def _as_product(context: Context, node: fx.Node) -> fx.Node | None:
    """convolution(x [N, C, *S], weight [O, C, *W]) as a view [N, O, *S / W] of a product [N * prod(S / W), O]."""
    if node.target is not aten.convolution.default or not _has_disjoint_windows(node) or escapes(node):
        return None  # a view cannot stand for new memory that the caller gets
    given, image, weight = arguments(node), tensor(node.args[0]), tensor(node.args[1])
    assert image is not None and weight is not None
    dims, window = weight.dim() - 2, weight.shape[2:]
    channels_first = is_dense(weight, list(range(dims + 2)))
    if not channels_first and not is_dense(weight, channels_at_the_end(dims + 2)):
        return None
    places = [s // w for s, w in zip(image.shape[2:], window, strict=True)]
    split = [x for pair in zip(places, window, strict=True) for x in pair]
    outer, within = [2 + 2 * d for d in range(dims)], [3 + 2 * d for d in range(dims)]
    order = [1, *within] if channels_first else [*within, 1]
    windows = _viewed(context, node, given["input"], ("view", [*image.shape[:2], *split]), ("permute", [0, *outer, *order]))
    copied = context.derive(aten.clone.default, (windows,), node, {"memory_format": torch.contiguous_format})
    inner = math.prod(weight.shape[1:])
    rows = _viewed(context, node, copied, ("view", [-1, inner]))
    straight = [] if channels_first else [("permute", channels_at_the_end(dims + 2))]
    columns = _viewed(context, node, given["weight"], *straight, ("view", [-1, inner]), ("permute", [1, 0]))
    target, bias = (aten.mm, ()) if given["bias"] is None else (aten.addmm, (given["bias"],))
    product = context.derive(target.default, (*bias, rows, columns), node)
    channels_back = [0, dims + 1, *range(1, dims + 1)]
    shape = [image.shape[0], *places, weight.shape[0]]
    return _viewed(context, node, product, ("view", shape), ("permute", channels_back))


def _viewed(context: Context, origin: fx.Node, start: fx.Node | None, *views: tuple[str, list[int]]) -> fx.Node | None:
    """`start` after views, each an ATen op's name and its list."""
    for name, numbers in views:
        start = None if start is None else context.derive(getattr(aten, name).default, (start, numbers), origin)
    return start


def _has_disjoint_windows(node: fx.Node) -> bool:
    """Whether the windows of a convolution of few channels cover the image once, and each has many elements."""
    given = arguments(node)
    image, weight = tensor(given["input"]), tensor(given["weight"])
    if image is None or weight is None or not static_shape(image) or not static_shape(weight):
        return False
    if not prefers_channels_last(image.device) or image.dtype not in (torch.float16, torch.bfloat16):
        return False  # float32 products and convolutions have different defaults of precision
    window = list(weight.shape[2:])
    if given["transposed"] or given["groups"] != 1 or image.dim() != weight.dim() or 0 in image.shape:
        return False
    if weight.shape[1] >= FEW_CHANNELS or math.prod(weight.shape[1:]) < LONG_WINDOW:
        return False
    settings = [_each(given[name], len(window)) for name in ("stride", "padding", "dilation")]
    if settings != [window, [0] * len(window), [1] * len(window)]:
        return False
    return all(s % w == 0 for s, w in zip(image.shape[2:], window, strict=True))


def _each(value: list[int], dims: int) -> list[int]:
    """A convolution's setting for every dimension: one number stands for all."""
    return list(value) * dims if len(value) == 1 else list(value)
