"""Half-precision matrix products on CUDA whose rows do not start on 16-byte boundaries are padded with zeros.

Matrix units are fed by 16-byte loads, eight elements at a time. When a leading dimension in memory (the distance between
rows of an operand stored row by row, between columns of one stored column by column, or between rows of the result) is not a
multiple of eight elements, libraries fall back to kernels that load one, two or four elements at a time. A vocabulary of
50257 is the common case. Padding that dimension with zeros to the next multiple of eight leaves every sum as it was; the
result is cut to size again.

The rule: pad when the traffic of padding, `extra bytes / 3 TB/s` and 3 us for each extra kernel, is less than half of what
is expected to be gained. The gain is `(SLOWDOWN - 1) * flops / 700 TFLOP/s`. Bytes count one read and one write of every
padded operand, and of the result where something needs it in memory under its own layout; padding inside the kernel that
produces an operand, or shared between products, costs less than that. Static sizes only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.passes.context import Context
from fxopt.passes.facts import arguments, needs_memory, static_shape, tensor

aten = torch.ops.aten

ALIGNMENT = 8
"""Elements of two bytes in 16 bytes."""

SLOWDOWN = {1: 3.0, 2: 2.8, 4: 1.25}
"""How much longer a product takes whose leading dimensions are multiples of only so many elements. Measured for two on an
H200 (bfloat16, 4096 x 768 x 30522: 802 us against 280 us padded); the others are cautious assumptions."""

BYTES_PER_SECOND, FLOPS_PER_SECOND, LAUNCH_SECONDS = 3e12, 700e12, 3e-6
MARGIN = 0.5

PRODUCTS = {aten.mm.default: ("self", "mat2"), aten.addmm.default: ("mat1", "mat2"), aten.bmm.default: ("self", "mat2")}
"""The products, with the names of their two operands."""


def wants_alignment(device: torch.device) -> bool:
    """Whether libraries for this device are slower on rows that are not aligned."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Product:
    """a [.., m, k] times b [.., k, n]; `pads` says by how many elements m, k and n grow."""

    node: fx.Node
    a: fx.Node
    b: fx.Node
    sizes: tuple[int, int, int]
    pads: tuple[int, int, int]
    alignment: int


def pad_gemm(context: Context) -> None:
    for node in context.nodes:
        if context.exhausted:
            return
        product = _product(node)
        if product is None or not any(product.pads):
            continue
        if not _pays(product):
            context.reject("pad_gemm", "too small for the traffic of padding")
            continue
        padded = _padded(context, product)
        if padded is not None:
            context.replace("aligned", node, padded)


def _product(node: fx.Node) -> Product | None:
    """The product that `node` is, if it is one that alignment may speed up."""
    if node.op != "call_function" or node.target not in PRODUCTS:
        return None
    first, second = (arguments(node)[name] for name in PRODUCTS[node.target])
    a, b, out = tensor(first), tensor(second), tensor(node)
    if a is None or b is None or out is None or not wants_alignment(out.device):
        return None
    if out.dtype not in (torch.float16, torch.bfloat16) or not all(map(static_shape, (a, b, out))) or out.numel() == 0:
        return None
    sizes = (a.shape[-2], a.shape[-1], b.shape[-1])
    leading = [_leading(a, 0, 1), _leading(b, 1, 2), (2, sizes[2])]
    wrong = [(dim, stride) for dim, stride in leading if stride % ALIGNMENT]
    pads = [0, 0, 0]
    for dim, _ in wrong:
        pads[dim] = -sizes[dim] % ALIGNMENT
    alignment = min((math.gcd(stride, ALIGNMENT) for _, stride in wrong), default=ALIGNMENT)
    return Product(node, first, second, sizes, (pads[0], pads[1], pads[2]), alignment)


def _leading(operand: torch.Tensor, rows: int, columns: int) -> tuple[int, int]:
    """(which of m, k, n runs along memory, the distance between two lines of it); `rows`, `columns` number the dimensions.

    An operand stored in neither order is copied row by row first.
    """
    if operand.stride(-1) == 1:
        return columns, operand.stride(-2)
    if operand.stride(-2) == 1:
        return rows, operand.stride(-1)
    return columns, operand.shape[-1]


def _pays(product: Product) -> bool:
    """The rule above."""
    (m, k, n), (pad_m, pad_k, pad_n) = product.sizes, product.pads
    batch = _numel(product.node) // (m * n)
    moved = [_numel(x) for x, grows in ((product.a, pad_m or pad_k), (product.b, pad_k or pad_n)) if grows]
    if (pad_m or pad_n) and needs_memory(product.node):
        moved.append(_numel(product.node))
    seconds = sum(moved) * 2 * 2 / BYTES_PER_SECOND + len(moved) * LAUNCH_SECONDS
    gained = (SLOWDOWN[product.alignment] - 1) * 2 * batch * m * k * n / FLOPS_PER_SECOND
    return seconds < MARGIN * gained


def _numel(node: fx.Node) -> int:
    return int(node.meta["val"].numel())


def _padded(context: Context, product: Product) -> fx.Node | None:
    """The product over padded operands, cut to size, in the layout of the original."""
    (m, _, n), (pad_m, pad_k, pad_n) = product.sizes, product.pads
    a = _grown(context, product.a, pad_m, pad_k, product.node)
    b = _grown(context, product.b, pad_k, pad_n, product.node)
    if a is None or b is None:
        return None
    target: Any = product.node.target
    names = PRODUCTS[target]
    given = {**arguments(product.node), names[0]: a, names[1]: b}
    if "mat1" in given:
        given["self"] = _grown_bias(context, product)
    schema = ops.schema(target).arguments
    args = tuple(given[p.name] for p in schema if not p.kwarg_only)
    kwargs = {p.name: given[p.name] for p in schema if p.kwarg_only and given[p.name] != p.default_value}
    result = context.derive(target, args, product.node, kwargs)
    for dim, size, pad in ((-2, m, pad_m), (-1, n, pad_n)):
        if result is not None and pad:
            dim %= product.node.meta["val"].dim()
            result = context.derive(aten.slice.Tensor, (result, dim, 0, size), product.node)
    if result is None or not (pad_m or pad_n):
        return result
    # A copy by name only: whoever computes with the values reads them where they are. It gives the result its own layout.
    return context.derive(aten.clone.default, (result,), product.node, {"memory_format": torch.contiguous_format})


def _grown(context: Context, operand: fx.Node, rows: int, columns: int, origin: fx.Node) -> fx.Node | None:
    """`operand` with that many rows and columns of zeros more; one stored column by column stays so."""
    if not rows and not columns:
        return operand
    value = operand.meta["val"]
    if value.stride(-1) == 1 or value.stride(-2) != 1:
        return _with_zeros(context, operand, rows, columns, origin)
    turned = _turned(context, operand, origin)
    grown = None if turned is None else _with_zeros(context, turned, columns, rows, origin)
    return None if grown is None else _turned(context, grown, origin)


def _with_zeros(context: Context, operand: fx.Node, rows: int, columns: int, origin: fx.Node) -> fx.Node | None:
    pad = [0, columns, 0, rows] if rows else [0, columns]
    return context.derive(aten.constant_pad_nd.default, (operand, pad, 0.0), origin)


def _turned(context: Context, operand: fx.Node, origin: fx.Node) -> fx.Node | None:
    """`operand` with its last two dimensions exchanged; what was exchanged to make it, where that is known."""
    order = list(range(operand.meta["val"].dim()))
    order[-2:] = order[:-3:-1]
    if operand.target is aten.permute.default and list(operand.args[1]) == order:  # type: ignore[arg-type]
        return operand.args[0]  # type: ignore[return-value]
    if operand.target is aten.t.default:
        return operand.args[0]  # type: ignore[return-value]
    return context.derive(aten.permute.default, (operand, order), origin)


def _grown_bias(context: Context, product: Product) -> Any:
    """addmm's addend, padded along the dimensions that it does not broadcast along."""
    bias: Any = arguments(product.node)["self"]
    shape = bias.meta["val"].shape
    (m, _, n), (pad_m, _, pad_n) = product.sizes, product.pads
    columns = pad_n if len(shape) > 0 and shape[-1] == n else 0
    rows = pad_m if len(shape) > 1 and shape[-2] == m else 0
    return _with_zeros(context, bias, rows, columns, product.node) if rows or columns else bias
