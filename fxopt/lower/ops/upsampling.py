"""Nearest-neighbour upsampling as index arithmetic, where that picks the very pixels of eager's floating-point rule."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, add, floordiv, mul
from fxopt.ir.loops import Op, Scalar
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.elements import Indices, moved
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value, at, cast, pointwise

aten = torch.ops.aten
TABLE = Table()

Rule = Callable[[Int], Int]
MAX_TAPS = 64


def nearest(size: Int, out: Int, scale: float | None, exact: bool) -> Rule:
    """The source index, of `size`, for each of `out` output indices; `exact` takes pixel centres.

    Raises UnsupportedError for symbolic sizes and when integers do not reproduce eager's rounding.
    """
    if not isinstance(size, int) or not isinstance(out, int):
        raise UnsupportedError("upsampling of symbolic sizes")

    def rule(i: Int) -> Int:
        return floordiv(add(mul(i, 2 * size), size), 2 * out) if exact else floordiv(mul(i, size), out)

    picked = [rule(i) for i in range(out)]
    if picked != _eager_indices(size, out, scale, exact).tolist():
        raise UnsupportedError("nearest upsampling by a scale that rounds")
    return rule


def _eager_indices(size: int, out: int, scale: float | None, exact: bool) -> torch.Tensor:
    """What eager computes in float32: floor(i * scale), the scale being rounded to float32 first."""
    step = torch.tensor(1.0 / scale if scale is not None and scale > 0 else size / out, dtype=torch.float64).to(
        torch.float32
    )
    i = torch.arange(out, dtype=torch.float32)
    source = ((i + 0.5) * step if exact else i * step).floor().to(torch.int64).clamp(max=size - 1)
    if not exact and out == size:
        return torch.arange(out)
    if not exact and out == 2 * size:
        return torch.arange(out) // 2
    return source


def _rules(small: Sequence[Int], large: Sequence[Int], scales: Sequence[float | None], exact: bool) -> list[Rule]:
    return [nearest(a, b, scale, exact) for a, b, scale in zip(small, large, scales, strict=True)]


def _forward(exact: bool) -> Callable[..., Computed]:
    def lower(ctx: Lowering, x: Value, output_size: Sequence[Int], *scales: float | None, **named: float | None) -> Computed:
        shape = ctx.sizes(ctx.out().shape)
        rank = len(output_size)
        rules = _rules(x.shape[-rank:], shape[-rank:], _all_scales(rank, scales, named), exact)

        def source(i: Indices) -> Indices:
            return (*i[:-rank], *(rule(k) for rule, k in zip(rules, i[-rank:], strict=True)))

        return moved(x, shape, source)

    return lower


def _all_scales(rank: int, scales: Sequence[float | None], named: dict[str, float | None]) -> list[float | None]:
    order = ("scales",) if rank == 1 else ("scales_d", "scales_h", "scales_w")[3 - rank :]
    given = dict(zip(order, scales, strict=False)) | named
    return [given.get(name) for name in order]


def _backward(exact: bool) -> Callable[..., Computed]:
    def lower(
        ctx: Lowering,
        grad: Value,
        output_size: Sequence[Int],
        input_size: Sequence[Int],
        *scales: float | None,
        **named: float | None,
    ) -> Computed:
        """For whole factors: each input element sums the block of output elements that copied it."""
        rank = len(output_size)
        small, large = tuple(input_size[-rank:]), grad.shape[-rank:]
        _rules(small, large, _all_scales(rank, scales, named), exact)
        factors = [_whole_factor(a, b) for a, b in zip(small, large, strict=True)]
        return _block_sums(grad, (*grad.shape[:-rank], *small), factors)

    return lower


def _whole_factor(small: Int, large: Int) -> int:
    assert isinstance(small, int) and isinstance(large, int)
    if large % small:
        raise UnsupportedError("the gradient of upsampling by a fraction")
    return large // small


def _block_sums(grad: Value, shape: tuple[Int, ...], factors: list[int]) -> Computed:
    rank = len(factors)
    taps = list(itertools.product(*map(range, factors)))
    if len(taps) > MAX_TAPS:
        raise UnsupportedError("the gradient of upsampling by a large factor")
    dtype = torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else grad.dtype

    def body(i: Indices) -> Scalar:
        terms = []
        for tap in taps:
            own = tuple(add(mul(k, f), t) for k, f, t in zip(i[-rank:], factors, tap, strict=True))
            terms.append(cast(at(grad, (*i[:-rank], *own)), dtype))
        return functools.reduce(lambda a, b: Op("add", (a, b), dtype), terms)

    return pointwise(shape, grad.dtype, grad.device, body, (grad,))


for _rank in (1, 2, 3):
    TABLE.lowers(getattr(aten, f"upsample_nearest{_rank}d").default)(_forward(exact=False))
    TABLE.lowers(getattr(aten, f"_upsample_nearest_exact{_rank}d").default)(_forward(exact=True))
    TABLE.lowers(getattr(aten, f"upsample_nearest{_rank}d_backward").default)(_backward(exact=False))
    TABLE.lowers(getattr(aten, f"_upsample_nearest_exact{_rank}d_backward").default)(_backward(exact=True))
