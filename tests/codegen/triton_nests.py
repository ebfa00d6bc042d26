"""Hand-built regions that the Triton tests share, with what they compute as torch functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxopt.ir.exprs import Int, Sym, contiguous_strides, evaluate, floordiv, mod, symbol
from fxopt.ir.loops import Const, IndexValue, Load, Masked, Nest, Op, Reduce, Scalar, Scan, Store, indirect_symbol
from fxopt.ir.region import BufferSpec, Region
from fxopt.ir.rounding import rounded
from fxopt.lower.online import with_weighted_sums

CPU = torch.device("cpu")
F32, BF16, I64, BOOL = torch.float32, torch.bfloat16, torch.int64, torch.bool


@dataclass
class Case:
    """A region, the function from input tensors to output tensors (in order of the stores), values of its size symbols."""

    region: Region
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reference: Callable[..., tuple[torch.Tensor, ...]]
    sizes: dict[str, int]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(evaluate(s, self.sizes) for s in self.region.buffers[name].shape)

    def strides(self, name: str) -> tuple[int, ...]:
        return tuple(evaluate(s, self.sizes) for s in self.region.buffers[name].strides)

    def extent(self, name: str) -> int:
        return evaluate(self.region.buffers[name].extent, self.sizes)


def buffer(name: str, dtype: torch.dtype, shape: tuple[Int, ...], strides: tuple[Int, ...] | None = None) -> BufferSpec:
    return BufferSpec(name, dtype, CPU, shape, contiguous_strides(shape) if strides is None else strides)


def make(
    nest: Nest,
    buffers: list[BufferSpec],
    inputs: str,
    outputs: str,
    reference: Callable[..., object],
    across: Nest | None = None,
    **sizes: int,
) -> Case:
    def call(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = reference(*args)
        return out if isinstance(out, tuple) else (out,)

    region = Region("region", nest, {b.name: b for b in buffers}, CPU, across=across)
    return Case(region, tuple(inputs.split()), tuple(outputs.split()), call, sizes)


def cast(x: Scalar, dtype: torch.dtype) -> Scalar:
    return x if x.dtype == dtype else Op("cast", (x,), dtype)


def op(name: str, *args: Scalar) -> Op:
    return Op(name, args, args[0].dtype)


def rows(points: Int, row: Int) -> tuple[Sym, Sym, Int]:
    """Symbols of a (points, row) domain and its row-major index."""
    p, r = Sym("x0", size=points), Sym("r1", size=row)
    return p, r, symbol(p) * row + symbol(r)


def norm_gradients(points: Int, row: Int, dtype: torch.dtype, **sizes: int) -> Case:
    """Gradients of a normalization's input, weight and bias, and the sum over rows of the first."""
    p, r, at = rows(points, row)
    grad, x = (cast(Load(name, at, dtype), F32) for name in ("grad", "x"))
    mean, scale = (Load(name, symbol(p), F32) for name in ("mean", "scale"))
    weighted = op("mul", grad, cast(Load("weight", symbol(r), dtype), F32))
    normal = op("mul", op("sub", x, mean), scale)
    length = cast(IndexValue(row), F32)
    middle, along = (op("truediv", Reduce("sum", (v,), (r,), F32), length) for v in (weighted, op("mul", weighted, normal)))
    away = op("mul", op("sub", op("sub", weighted, middle), op("mul", normal, along)), scale)
    nest = Nest((p,), (r,), (Store("dx", at, cast(away, dtype)),))
    sums = {"dw": op("mul", grad, normal), "db": grad, "total": cast(Load("dx", at, dtype), F32)}
    across = Nest(
        (r,), (p,), tuple(Store(n, symbol(r), cast(Reduce("sum", (v,), (p,), F32), dtype)) for n, v in sums.items())
    )
    wide, narrow, flat = (points, row), (row,), (points,)
    buffers = [buffer("grad", dtype, wide), buffer("x", dtype, wide), buffer("mean", F32, flat), buffer("scale", F32, flat)]
    buffers += [buffer("weight", dtype, narrow), buffer("dx", dtype, wide), *(buffer(n, dtype, narrow) for n in sums)]

    def reference(*given: torch.Tensor) -> object:
        grad, x, mean, scale, weight = given
        normal = (x - mean[:, None]) * scale[:, None]
        weighted = grad * weight
        along = (weighted * normal).mean(1, keepdim=True)
        dx = (weighted - weighted.mean(1, keepdim=True) - normal * along) * scale[:, None]
        return dx, (grad * normal).sum(0), grad.sum(0), dx.sum(0)

    return make(nest, buffers, "grad x mean scale weight", "dx dw db total", reference, across, **sizes)


def group_scale(points: int, groups: int, length: int) -> Case:
    """Rows of `groups` runs of `length` elements, each run times its weight, less the mean of that over the row."""
    p, r, at = rows(points, groups * length)
    scaled = op("mul", Load("a", at, F32), Load("w", floordiv(symbol(r), length), F32))
    mean = op("truediv", Reduce("sum", (scaled,), (r,), F32), cast(IndexValue(groups * length), F32))
    nest = Nest((p,), (r,), (Store("o", at, op("sub", scaled, mean)),))
    shape = (points, groups * length)
    buffers = [buffer("a", F32, shape), buffer("w", F32, (groups,)), buffer("o", F32, shape)]

    def reference(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        scaled = a * w.repeat_interleave(length)
        return scaled - scaled.mean(1, keepdim=True)

    return make(nest, buffers, "a w", "o", reference)


def group_totals(groups: int, members: int, row: int, dtype: torch.dtype) -> Case:
    """Sums of rows, and every element less the weighted sum of all rows of its group."""
    g, m, r, other = Sym("x0", size=groups), Sym("x1", size=members), Sym("r2", size=row), Sym("r3", size=members)

    def weighted(member: Sym) -> tuple[Int, Scalar, Scalar]:
        at = symbol(g) * (members * row) + symbol(member) * row + symbol(r)
        total = Reduce("sum", (cast(Load("a", at, dtype), F32),), (r,), F32)
        return at, total, op("mul", total, Load("w", symbol(member), F32))

    at, total, _ = weighted(m)
    whole = Reduce("sum", (weighted(other)[2],), (other,), F32)
    value = op("sub", cast(Load("a", at, dtype), F32), op("mul", whole, Load("scale", symbol(g), F32)))
    stores = (Store("sums", symbol(g) * members + symbol(m), total), Store("o", at, cast(value, dtype)))
    shape = (groups, members, row)
    buffers = [buffer(n, dtype, shape) for n in ("a", "o")]
    buffers += [buffer("sums", F32, shape[:2]), buffer("w", F32, (members,)), buffer("scale", F32, (groups,))]

    def reference(a: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = a.sum(2)
        return total, a - ((total * w).sum(1) * scale)[:, None, None]

    return make(Nest((g, m), (r,), stores), buffers, "a w scale", "sums o", reference)


def residual_norm(points: int, row: int) -> Case:
    """A sum that is stored, and its RMS norm."""
    p, r, at = rows(points, row)
    total = op("add", Load("a", at, F32), Load("b", at, F32))
    mean = op("truediv", Reduce("sum", (op("mul", total, total),), (r,), F32), cast(IndexValue(row), F32))
    nest = Nest((p,), (r,), (Store("total", at, total), Store("o", at, op("mul", total, op("rsqrt", mean)))))
    buffers = [buffer(name, F32, (points, row)) for name in ("a", "b", "total", "o")]

    def reference(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = a + b
        return total, total * total.square().mean(1, keepdim=True).rsqrt()

    return make(nest, buffers, "a b", "total o", reference)


def pointwise(n: int, dtype: torch.dtype) -> Case:
    x = Sym("x0", size=n)
    a, b = Load("a", symbol(x), dtype), Load("b", symbol(x), dtype)
    nest = Nest((x,), (), (Store("o", symbol(x), op("mul", op("add", a, b), op("sigmoid", a))),))
    buffers = [buffer(name, dtype, (n,)) for name in "abo"]
    return make(nest, buffers, "a b", "o", lambda a, b: (a + b) * torch.sigmoid(a))


def one_byte_of_a_float() -> Case:
    """Whether a number is positive: a kernel of one point."""
    sign = Op("gt", (Load("a", 0, F32), Const(0.0, F32)), BOOL)
    buffers = [buffer("a", F32, ()), buffer("o", BOOL, ())]
    return make(Nest((), (), (Store("o", 0, sign),)), buffers, "a", "o", lambda a: a > 0)


def narrowed_constants() -> Case:
    """Numbers that are cast and bounded, and nothing that varies."""
    half = cast(Const(0.5, F32), BF16)
    stores = (Store("a", 0, half), Store("b", 0, Op("minimum", (half, Const(0.25, BF16)), BF16)))
    buffers = [buffer(name, BF16, ()) for name in "ab"]
    return make(Nest((), (), stores), buffers, "", "a b", lambda: tuple(torch.tensor([0.5, 0.25]).double()))


def picked(points: int, row: int) -> Case:
    """The element of each row at an index of its own, and zeros."""
    p, r, at = rows(points, row)
    hit = Op("eq", (IndexValue(symbol(r)), Load("index", symbol(p), I64)), BOOL)
    nest = Nest((p, r), (), (Store("out", at, Op("where", (hit, Load("a", at, F32), Const(0.0, F32)), F32)),))
    buffers = [buffer("a", F32, (points, row)), buffer("index", I64, (points,)), buffer("out", F32, (points, row))]

    def reference(a: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.where(torch.arange(row) == index[:, None], a, 0.0),)

    return make(nest, buffers, "a index", "out", reference)


def shared_quotient(points: int, row: int) -> Case:
    """A gradient through a weighted mean: its scale is one quotient for all elements."""
    p, r, at = rows(points, row)
    scale = op("truediv", Load("grad", 0, F32), Load("total", 0, F32))
    own = op("mul", scale, Load("weight", symbol(r), F32))
    out = op("sub", own, op("mul", Load("x", at, F32), Reduce("sum", (own,), (r,), F32)))
    nest = Nest((p,), (r,), (Store("out", at, out),))
    shapes = {"grad": (1,), "total": (1,), "weight": (row,), "x": (points, row), "out": (points, row)}

    def reference(grad: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        own = grad / total * weight
        return own - x * own.sum()

    return make(nest, [buffer(n, F32, s) for n, s in shapes.items()], "grad total weight x", "out", reference)


def exponential_gradient(n: int, dtype: torch.dtype) -> Case:
    """What a log-softmax's gradient does to its output."""
    x = Sym("x0", size=n)
    grad, out = (cast(Load(name, symbol(x), dtype), F32) for name in ("grad", "out"))
    value = op("sub", grad, op("mul", op("exp", out), grad))
    nest = Nest((x,), (), (Store("dx", symbol(x), cast(value, dtype)),))

    def reference(grad: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor]:
        return (grad - out.exp() * grad,)

    return make(nest, [buffer(name, dtype, (n,)) for name in ("grad", "out", "dx")], "grad out", "dx", reference)


def silu_gradient(n: int, dtype: torch.dtype) -> Case:
    x = Sym("x0", size=n)
    grad, a = (cast(Load(name, symbol(x), dtype), F32) for name in ("grad", "a"))
    share, one = op("sigmoid", a), Const(1.0, F32)
    slope = op("add", op("mul", a, op("sub", one, share)), one)
    value = op("mul", op("mul", grad, share), slope)
    nest = Nest((x,), (), (Store("da", symbol(x), cast(value, dtype)),))

    def reference(grad: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor]:
        share = torch.sigmoid(a)
        return (grad * share * (a * (1 - share) + 1),)

    return make(nest, [buffer(name, dtype, (n,)) for name in ("grad", "a", "da")], "grad a", "da", reference)


def rounded_product(n: int, dtype: torch.dtype) -> Case:
    """A product that is rounded before it is added to."""
    x = Sym("x0", size=n)
    a, b = (Load(name, symbol(x), dtype) for name in "ab")
    nest = Nest((x,), (), (Store("out", symbol(x), Op("add", (rounded(Op("mul", (a, b), dtype)), a), dtype)),))

    def reference(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor]:
        return ((a * b).to(dtype).double() + a,)

    return make(nest, [buffer(name, dtype, (n,)) for name in ("a", "b", "out")], "a b", "out", reference)


def broadcast_symbolic() -> Case:
    s0, s1 = Sym("s0", lo=2), Sym("s1", lo=2)
    n, m = symbol(s0), symbol(s1)
    x, y = Sym("x0", size=n), Sym("x1", size=m)
    at = symbol(x) * m + symbol(y)
    nest = Nest((x, y), (), (Store("o", at, op("add", Load("a", at, F32), Load("b", symbol(y), F32))),))
    buffers = [buffer("a", F32, (n, m)), buffer("b", F32, (m,)), buffer("o", F32, (n, m))]
    return make(nest, buffers, "a b", "o", lambda a, b: a + b, s0=37, s1=21)


def transposed(dtype: torch.dtype, n: Int = 70, m: Int = 45, **sizes: int) -> Case:
    x, y = Sym("x0", size=n), Sym("x1", size=m)
    a, b = Load("a", symbol(y) * n + symbol(x), dtype), Load("b", symbol(x) * m + symbol(y), dtype)
    nest = Nest((x, y), (), (Store("o", symbol(x) * m + symbol(y), op("add", a, b)),))
    buffers = [buffer("a", dtype, (n, m), (1, n)), buffer("b", dtype, (n, m)), buffer("o", dtype, (n, m))]
    return make(nest, buffers, "a b", "o", lambda a, b: a + b, **sizes)


def nhwc_add() -> Case:
    """NCHW plus channels-last, stored channels-last."""
    shape = (2, 24, 5, 7)
    n, c, h, w = (Sym(f"x{i}", size=s) for i, s in enumerate(shape))
    last = (5 * 7 * 24, 1, 7 * 24, 24)
    first = contiguous_strides(shape)

    def at(strides: tuple[Int, ...]) -> Int:
        return sum((symbol(s) * d for s, d in zip((n, c, h, w), strides, strict=True)), 0)

    value = op("add", op("add", Load("a", at(first), F32), Load("b", at(last), F32)), Load("k", symbol(c), F32))
    buffers = [
        buffer("a", F32, shape),
        buffer("b", F32, shape, last),
        buffer("k", F32, (24,)),
        buffer("o", F32, shape, last),
    ]
    nest = Nest((n, c, h, w), (), (Store("o", at(last), value),))
    return make(nest, buffers, "a b k", "o", lambda a, b, k: a + b + k[:, None, None])


def turned_halves(points: int, row: int, half: int, reduces: bool = False) -> Case:
    """Rows, normalized if `reduces`, with their parts before and after `half` (all of them if that is half) in each other's
    place, the second with its sign changed; times 2, plus the row."""
    p, r, _ = rows(points, row)

    def value(at: Int) -> Scalar:
        x = Load("a", symbol(p) * row + at, F32)
        return op("mul", x, Reduce("max", (Load("a", symbol(p) * row + symbol(r), F32),), (r,), F32)) if reduces else x

    below = Op("lt", (IndexValue(symbol(r)), Const(half, I64)), BOOL)
    above = Op("ge", (IndexValue(symbol(r) - half), Const(0, I64)), BOOL)
    second, first = op("neg", value(symbol(r) + half)), value(symbol(r) - half)
    turned = Masked(below, second, Masked(above, first, Const(0.0, F32)))
    at = symbol(p) * row + symbol(r)
    stored = Store("o", at, op("add", op("mul", turned, Const(2.0, F32)), value(symbol(r))))
    nest = Nest((p,), (r,), (stored,)) if reduces else Nest((p, r), (), (stored,))
    buffers = [buffer("a", F32, (points, row)), buffer("o", F32, (points, row))]

    def reference(a: torch.Tensor) -> torch.Tensor:
        a = a * a.amax(1, keepdim=True) if reduces else a
        return torch.cat((-a[:, half:], a[:, : row - half]), 1)[:, :row] * 2 + a

    return make(nest, buffers, "a", "o", reference)


def kept_rows(points: int, row: int) -> Case:
    """The values of rows that are kept, less their mean: one byte beside each row."""
    p, r, at = rows(points, row)
    value = Load("a", at, F32)
    mean = op("truediv", Reduce("sum", (value,), (r,), F32), cast(IndexValue(row), F32))
    kept = Op("where", (Load("kept", symbol(p), BOOL), op("sub", value, mean), Const(0.0, F32)), F32)
    buffers = [buffer("kept", BOOL, (points,)), *(buffer(n, F32, (points, row)) for n in "ao")]

    def reference(kept: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.where(kept[:, None], a - a.mean(1, keepdim=True), 0.0),)

    return make(Nest((p,), (r,), (Store("o", at, kept),)), buffers, "kept a", "o", reference)


def masked_excess(points: Int, row: Int) -> Case:
    """Of values that a mask keeps, what is above the row's mean, and whether it is: bytes beside float32."""
    p, r, at = rows(points, row)
    kept = Op("where", (Load("mask", at, BOOL), Load("a", at, F32), Const(0.0, F32)), F32)
    mean = op("truediv", Reduce("sum", (kept,), (r,), F32), cast(IndexValue(row), F32))
    stores = (Store("o", at, op("sub", kept, mean)), Store("above", at, Op("gt", (kept, mean), BOOL)))
    buffers = [buffer(n, d, (points, row)) for n, d in (("mask", BOOL), ("a", F32), ("o", F32), ("above", BOOL))]

    def reference(mask: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = torch.where(mask, a, 0.0)
        mean = kept.mean(1, keepdim=True)
        return kept - mean, kept > mean

    return make(Nest((p,), (r,), stores), buffers, "mask a", "o above", reference)


def softmax(points: Int, row: Int, dtype: torch.dtype, log: bool = False, **sizes: int) -> Case:
    p, r, at = rows(points, row)
    x = cast(Load("a", at, dtype), F32)
    top, total = (Reduce("softmax_stats", (x,), (r,), F32, k) for k in (0, 1))
    shifted = op("sub", x, top)
    value = op("sub", shifted, op("log", total)) if log else op("truediv", op("exp", shifted), total)
    nest = Nest((p,), (r,), (Store("o", at, cast(value, dtype)),))
    buffers = [buffer("a", dtype, (points, row)), buffer("o", dtype, (points, row))]
    function = torch.log_softmax if log else torch.softmax
    return make(nest, buffers, "a", "o", lambda a: function(a, 1), **sizes)


def weighted_log_softmax(points: Int, row: Int, dtype: torch.dtype) -> Case:
    """The weighted sum of the logarithms of a row's probabilities, and the logarithm of what they are divided by."""
    p, r, at = rows(points, row)
    x, weight = cast(Load("a", at, dtype), F32), cast(Load("w", symbol(r), dtype), F32)
    top, total = (Reduce("softmax_stats", (x,), (r,), F32, k) for k in (0, 1))
    loss = Reduce("sum", (op("mul", op("sub", op("sub", x, top), op("log", total)), weight),), (r,), F32)
    stores = (Store("o", symbol(p), loss), Store("whole", symbol(p), op("add", top, op("log", total))))
    buffers = [buffer("a", dtype, (points, row)), buffer("w", dtype, (row,))]
    buffers += [buffer(n, F32, (points,)) for n in ("o", "whole")]

    def reference(a: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.log_softmax(a, 1) * w).sum(1), a.amax(1) + (a - a.amax(1, keepdim=True)).exp().sum(1).log()

    return make(with_weighted_sums(Nest((p,), (r,), stores)), buffers, "a w", "o whole", reference)


def layer_norm(points: Int, row: Int, dtype: torch.dtype, **sizes: int) -> Case:
    """A residual add, LayerNorm and its statistics: three stores of two kinds."""
    p, r, at = rows(points, row)
    x = op("add", cast(Load("a", at, dtype), F32), cast(Load("b", at, dtype), F32))
    mean, m2 = (Reduce("welford", (x,), (r,), F32, k) for k in (0, 1))
    scale = op("rsqrt", op("add", op("truediv", m2, cast(IndexValue(row), F32)), Const(1e-5, F32)))
    weight, bias = (cast(Load(n, symbol(r), dtype), F32) for n in "wc")
    value = op("add", op("mul", op("mul", op("sub", x, mean), scale), weight), bias)
    stores = (Store("o", at, cast(value, dtype)), Store("mean", symbol(p), mean), Store("scale", symbol(p), scale))
    buffers = [buffer(n, dtype, (points, row)) for n in "abo"] + [buffer(n, dtype, (row,)) for n in "wc"]
    buffers += [buffer("mean", F32, (points,)), buffer("scale", F32, (points,))]

    def reference(a: torch.Tensor, b: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = a + b
        variance, mean = torch.var_mean(x, 1, correction=0)
        scale = (variance + 1e-5).rsqrt()
        return (x - mean[:, None]) * scale[:, None] * w + c, mean, scale

    return make(Nest((p,), (r,), stores), buffers, "a b w c", "o mean scale", reference, **sizes)


def reduction(kind: str, points: int, row: int, dtype: torch.dtype, columns: bool = False) -> Case:
    """One reduction of every kind; over the strided axis when `columns`."""
    p, r, at = rows(points, row)
    shape, dim = (points, row), 1
    if columns:
        at, shape, dim = symbol(r) * points + symbol(p), (row, points), 0
    x = Load("a", at, dtype)
    out = {"any": BOOL, "all": BOOL, "argmax": I64, "argmin": I64}.get(kind, dtype)
    operands = (x, IndexValue(symbol(r))) if kind.startswith("arg") else (x,)
    nest = Nest((p,), (r,), (Store("o", symbol(p), Reduce(kind, operands, (r,), out)),))
    functions = {"max": torch.amax, "min": torch.amin, "sum": torch.sum, "prod": torch.prod}
    function = functions.get(kind) or getattr(torch, kind)
    buffers = [buffer("a", dtype, shape), buffer("o", out, (points,))]
    return make(nest, buffers, "a", "o", lambda a: function(a, dim))


def side_by_side(points: int, row: int) -> Case:
    """What was joined for the launches alone: two sums that share nothing, and the halves of one result."""
    p, r, at = rows(points, row)
    a, b = Load("a", at, F32), Load("b", at, F32)
    nest = Nest(
        (p,),
        (r,),
        (
            Store("s", symbol(p), Reduce("sum", (a,), (r,), F32)),
            Store("o", 2 * symbol(p) + 1, Reduce("max", (b,), (r,), F32)),
            Store("o", 2 * symbol(p), Load("c", symbol(p), F32)),
        ),
    )
    buffers = [*(buffer(n, F32, (points, row)) for n in "ab"), *(buffer(n, F32, (points,)) for n in "cs")]
    return make(
        nest,
        [*buffers, buffer("o", F32, (points, 2))],
        "a b c",
        "s o",
        lambda a, b, c: (a.sum(1), torch.stack([c, b.amax(1)], 1)),
    )


def variance(points: int, row: int) -> Case:
    """Column statistics, as in BatchNorm."""
    p, r = Sym("x0", size=points), Sym("r1", size=row)
    x = Load("a", symbol(r) * points + symbol(p), F32)
    mean, m2 = (Reduce("welford", (x,), (r,), F32, k) for k in (0, 1))
    stores = (Store("m", symbol(p), mean), Store("v", symbol(p), op("truediv", m2, Const(float(row), F32))))
    buffers = [buffer("a", F32, (row, points)), buffer("m", F32, (points,)), buffer("v", F32, (points,))]
    return make(Nest((p,), (r,), stores), buffers, "a", "m v", lambda a: tuple(reversed(torch.var_mean(a, 0, correction=0))))


def gelu_backward(rows: int, columns: int, dtype: torch.dtype) -> Case:
    """The gradient of an activation, stored, and its sum over the rows: a linear layer's bias gradient."""
    p, r = Sym("x0", size=columns), Sym("r1", size=rows)
    at = symbol(r) * columns + symbol(p)
    g, x = (cast(Load(n, at, dtype), F32) for n in "gx")
    value = op("mul", g, op("tanh", x))
    stores = (Store("o", at, cast(value, dtype)), Store("s", symbol(p), cast(Reduce("sum", (value,), (r,), F32), dtype)))
    buffers = [buffer(n, dtype, (rows, columns)) for n in "gxo"] + [buffer("s", dtype, (columns,))]

    def reference(g: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = g * torch.tanh(x)
        return out, out.sum(0)

    return make(Nest((p,), (r,), stores), buffers, "g x", "o s", reference)


def cat() -> Case:
    x = Sym("x0", size=33)
    inside = Op("lt", (IndexValue(symbol(x)), Const(13, I64)), BOOL)
    value = Masked(inside, Load("a", symbol(x), F32), Load("b", symbol(x) - 13, F32))
    other = Op("ge", (IndexValue(symbol(x)), Const(13, I64)), BOOL)
    value = Masked(inside, Load("a", symbol(x), F32), Masked(other, Load("b", symbol(x) - 13, F32), Const(0.0, F32)))
    buffers = [buffer("a", F32, (13,)), buffer("b", F32, (20,)), buffer("o", F32, (33,))]
    return make(Nest((x,), (), (Store("o", symbol(x), value),)), buffers, "a b", "o", lambda a, b: torch.cat((a, b)))


def gather() -> Case:
    """Embedding: rows of a table by checked index, negative ones from the end."""
    x, y = Sym("x0", size=9), Sym("x1", size=12)
    checked = Op("checked_index", (Load("i", symbol(x), I64), Const(20, I64)), I64)
    t, bound = indirect_symbol(checked, 20)
    value = Load("t", symbol(t) * 12 + symbol(y), F32, (bound,))
    buffers = [buffer("t", F32, (20, 12)), buffer("i", I64, (9,)), buffer("o", F32, (9, 12))]
    nest = Nest((x, y), (), (Store("o", symbol(x) * 12 + symbol(y), value),))
    return make(nest, buffers, "t i", "o", lambda t, i: t[i])


def computed_gather(times: int, divisor: int, size: int = 100) -> Case:
    """a[i * times % divisor], an address computed by the user."""
    x = Sym("x0", size=size)
    nest = Nest((x,), (), (Store("o", symbol(x), op("neg", Load("a", mod(symbol(x) * times, divisor), F32))),))
    buffers = [buffer("a", F32, (divisor,)), buffer("o", F32, (size,))]
    return make(nest, buffers, "a", "o", lambda a: -a[torch.arange(size) * times % divisor])


def computed_gather_backwards(times: int, divisor: int, size: int = 100) -> Case:
    """a[-i * times // divisor + n - 1]: the dividend is negative."""
    x, n = Sym("x0", size=size), (size - 1) * times // divisor + 2
    at = floordiv(symbol(x) * -times, divisor) + (n - 1)
    nest = Nest((x,), (), (Store("o", symbol(x), op("neg", Load("a", at, F32))),))
    buffers = [buffer("a", F32, (n,)), buffer("o", F32, (size,))]
    return make(nest, buffers, "a", "o", lambda a: -a[-torch.arange(size) * times // divisor + (n - 1)])


def computed_gather_symbolic(times: int, size: int) -> Case:
    """The first, where the factor and the domain are known only at run time; the factor may be of any size and sign."""
    s0, s1 = Sym("s0", lo=-(2**63)), Sym("s1", lo=2)
    x = Sym("x0", size=symbol(s1))
    nest = Nest((x,), (), (Store("o", symbol(x), op("neg", Load("a", mod(symbol(x) * symbol(s0), 77), F32))),))
    buffers = [buffer("a", F32, (77,)), buffer("o", F32, (symbol(s1),))]
    return make(nest, buffers, "a", "o", lambda a: -a[torch.arange(size) * times % 77], s0=times, s1=size)


def divided_by_size(divisor: int, size: int = 100) -> Case:
    """a[i % n], where n may be beyond int32 while no buffer is."""
    x, s0 = Sym("x0", size=size), Sym("s0", lo=1)
    nest = Nest((x,), (), (Store("o", symbol(x), op("neg", Load("a", mod(symbol(x), symbol(s0)), F32))),))
    buffers = [buffer("a", F32, (size,)), buffer("o", F32, (size,))]
    return make(nest, buffers, "a", "o", lambda a: -a[torch.arange(size) % divisor], s0=divisor)


def plus_number(number: int, size: Int, **sizes: int) -> Case:
    """a + n for integers, n being a number that the call is given."""
    x, s0 = Sym("x0", size=size), Sym("s0", lo=-(2**63))
    value = op("add", Load("a", symbol(x), I64), IndexValue(symbol(s0)))
    nest = Nest((x,), (), (Store("o", symbol(x), value),))
    return make(nest, [buffer(n, I64, (size,)) for n in "ao"], "a", "o", lambda a: a + number, s0=number, **sizes)


def channel_variance(images: int, channels: int, pixels: int, dtype: torch.dtype) -> Case:
    """Variance over images and pixels of [images, channels, pixels], as batch normalization takes it."""
    n, c, p = Sym("r0", size=images), Sym("x1", size=channels), Sym("r2", size=pixels)
    value = cast(Load("a", (symbol(n) * channels + symbol(c)) * pixels + symbol(p), dtype), F32)
    variance = Reduce("welford", (value,), (n, p), F32, output=1)
    nest = Nest((c,), (n, p), (Store("o", symbol(c), variance),))
    buffers = [buffer("a", dtype, (images, channels, pixels)), buffer("o", F32, (channels,))]
    reference = lambda a: a.var((0, 2), correction=0) * (images * pixels)  # noqa: E731
    return make(nest, buffers, "a", "o", reference)


def channel_scale(images: Int, channels: int, pixels: int, dtype: torch.dtype, **sizes: int) -> Case:
    """[images, channels, pixels] times a number for each channel and a mask of channels, whose false ones are not read."""
    n, c, p = Sym("x0", size=images), Sym("x1", size=channels), Sym("x2", size=pixels)
    at = (symbol(n) * channels + symbol(c)) * pixels + symbol(p)
    scale = Masked(Load("m", symbol(c), BOOL), Load("w", symbol(c), dtype), Const(1.0, dtype))
    value = op("mul", Load("a", at, dtype), scale)
    nest = Nest((n, c, p), (), (Store("o", at, value), Store("r", at, cast(value, F32))))
    shape = (images, channels, pixels)
    buffers = [buffer("a", dtype, shape), buffer("m", BOOL, (channels,)), buffer("w", dtype, (channels,))]
    buffers += [buffer("o", dtype, shape), buffer("r", F32, shape)]

    def reference(a: torch.Tensor, m: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = a * torch.where(m, w, 1)[:, None]
        return out, out.to(a.dtype if a.dtype == torch.float64 else F32)

    return make(nest, buffers, "a m w", "o r", reference, **sizes)


def scatter_add(lowest: int | None = None, highest: int = 4) -> Case:
    """Rows added to the rows of five that indices name, which are clamped where `lowest` is given."""
    x, y = Sym("x0", size=30), Sym("x1", size=8)
    index: Scalar = Load("i", symbol(x), I64)
    if lowest is not None:
        index = op("minimum", op("maximum", index, Const(lowest, I64)), Const(highest, I64))
    t, bound = indirect_symbol(Op("checked_index", (index, Const(5, I64)), I64), 5)
    store = Store("o", symbol(t) * 8 + symbol(y), Load("a", symbol(x) * 8 + symbol(y), F32), "add", (bound,))
    buffers = [buffer("i", I64, (30,)), buffer("a", F32, (30, 8)), buffer("o", F32, (5, 8))]
    reference = lambda i, a, o: o.index_add(0, i.clamp(lowest, highest) % 5, a)  # noqa: E731
    return make(Nest((x, y), (), (store,)), buffers, "i a o", "o", reference)


def add_to_scalar() -> Case:
    """A domain of one point: lanes beyond it must not add again."""
    nest = Nest((), (), (Store("o", 0, op("mul", Load("a", 0, F32), Load("a", 0, F32)), "add"),))
    buffers = [buffer("a", F32, ()), buffer("o", F32, ())]
    return make(nest, buffers, "a o", "o", lambda a, o: o + a * a)


def cumulative(kind: str, points: int, row: int) -> Case:
    p, r, at = rows(points, row)
    scan = Scan(kind, Load("a", at, F32), r, F32)
    buffers = [buffer("a", F32, (points, row)), buffer("o", F32, (points, row))]
    functions = {"cummax": lambda a: torch.cummax(a, 1)[0], "cummin": lambda a: torch.cummin(a, 1)[0]}
    function = functions.get(kind) or (lambda a: getattr(torch, kind)(a, 1))
    return make(Nest((p,), (r,), (Store("o", at, scan),)), buffers, "a", "o", function)


def in_place(n: int) -> Case:
    """Momentum update: two buffers read and written."""
    x = Sym("x0", size=n)
    w, m, g = (Load(b, symbol(x), F32) for b in "wmg")
    momentum = op("add", op("mul", m, Const(0.9, F32)), g)
    stores = (Store("m", symbol(x), momentum), Store("w", symbol(x), op("sub", w, op("mul", momentum, Const(0.1, F32)))))
    buffers = [buffer(b, F32, (n,)) for b in "wmg"]
    return make(Nest((x,), (), stores), buffers, "w m g", "m w", lambda w, m, g: (0.9 * m + g, w - 0.1 * (0.9 * m + g)))
