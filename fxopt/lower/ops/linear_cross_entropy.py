"""`fxopt::linear_cross_entropy` on GPUs, taken apart: chunks of rows, each a few products and one generated kernel.

The op itself (`ir/linear_cross_entropy_op.py` says what it computes) is a loop in Python that suits CPUs. For sizes that are
known it becomes steps of the plan here. All chunks have their logits in one buffer, one after the other: a chunk's kernel
turns them into the losses and, in place, into the gradient of the logits, and products add that to the gradients of the
operands. So the chunks' kernels are the same text, which is compiled and measured once.

Nothing is read on the host. Rows with the ignored label are computed like the others and count as zeros, also where they
have a NaN: that reaches the weight's gradient through the row's hidden state alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxopt.ir.exprs import Int, add, index
from fxopt.ir.linear_cross_entropy_op import Chunks, linear_cross_entropy_backward, linear_cross_entropy_op, plan_chunks
from fxopt.ir.loops import Const, Load, Masked, Nest, Op, Reduce, Scalar, Store
from fxopt.ir.region import Call, Ref
from fxopt.lower.calls import overload_name
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops import terms as t
from fxopt.lower.ops.indirect import position
from fxopt.lower.ops.terms import Term
from fxopt.lower.table import Table
from fxopt.lower.values import Stored, Value, address, at, cast, pointwise, size_value, symbols_of

aten, fxopt = torch.ops.aten, torch.ops.fxopt
TABLE = Table()

LINE = 16
"""Bytes that rows of logits are padded to: a vocabulary of odd size would slow the kernel and the products (`_Part`)."""


@TABLE.lowers(linear_cross_entropy_op)
def _forward(ctx: Lowering, *operands: Any) -> Any:
    return _Head.of(ctx, None, *operands).steps() if _is_taken_apart(*operands[:2]) else ctx.call(ctx.node)


@TABLE.lowers(linear_cross_entropy_backward)
def _backward(ctx: Lowering, grad_loss: Value, *operands: Any) -> Any:
    return _Head.of(ctx, grad_loss, *operands).steps()[1:] if _is_taken_apart(*operands[:2]) else ctx.call(ctx.node)


def _is_taken_apart(hidden: Value, weight: Value) -> bool:
    sizes = (*hidden.shape, *weight.shape)
    return runs_apart(hidden.device) and all(isinstance(s, int) and s > 0 for s in sizes)


def runs_apart(device: torch.device) -> bool:
    """Whether steps of the plan are better than the op there: on CPUs that one's blocks fit into the cache."""
    return device.type == "cuda"


@dataclass(frozen=True)
class _Row:
    """What the kernel knows of one row of logits, as scalars in `acc`, the type that the loss is computed in.

    `label` is int32, -1 for a row that does not count (`counts`); `own` is the label's class weight, None where all are 1.
    """

    counts: Term
    label: Term
    own: Term | None
    acc: torch.dtype

    def zero_unless_counted(self, x: Term) -> Term:
        return t.where(self.counts, x, 0.0)


@dataclass(frozen=True)
class _Part:
    """Classes from `first` on whose products are made together, and their operands in memory.

    Libraries multiply half precision at full speed only if the rows of each matrix begin on 16-byte boundaries and consist
    of whole 16 bytes as well (cuBLAS, "tensor core usage"): padding between the rows is not enough. So the last V % 8
    classes of a vocabulary are a part of their own, padded with zeros to eight: `weight` [C, K], `bias` [C] or None,
    `of_weight` the sums of the weight's gradient [C, K]. That of padding is never looked at.
    """

    first: int
    weight: Stored
    bias: Stored | None
    of_weight: Stored | None

    def columns(self, logits: Stored) -> Stored:
        """This part of a chunk's logits [r, V], which have room for the padding."""
        count, pitch = self.weight.shape[0], logits.strides[1]
        return replace(logits, shape=(logits.shape[0], count), offset=logits.offset + self.first * pitch)


@dataclass(frozen=True)
class _Head:
    """The op's operands, in memory, and its settings; `rows`, `features` and `classes` are its sizes."""

    ctx: Lowering
    grad_loss: Stored | None
    hidden: Stored
    weight: Stored
    bias: Stored | None
    labels: Stored
    class_weight: Stored | None
    reduction: str
    ignore_index: int
    smoothing: float
    dtype: torch.dtype
    wanted: Sequence[bool]
    rows: int
    features: int
    classes: int
    chunks: Chunks

    @classmethod
    def of(
        cls,
        ctx: Lowering,
        grad_loss: Value | None,
        hidden: Value,
        weight: Value,
        bias: Value | None,
        labels: Value,
        class_weight: Value | None,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        dtype: torch.dtype,
        wanted: Sequence[bool],
    ) -> _Head:
        def stored(x: Value | None) -> Stored | None:
            return None if x is None else ctx.store(x)

        (rows, features), classes = hidden.shape, weight.shape[0]
        assert isinstance(rows, int) and isinstance(features, int) and isinstance(classes, int)
        return cls(
            ctx, stored(grad_loss),
            ctx.store(hidden), ctx.store(weight), stored(bias), ctx.store(labels), stored(class_weight),
            reduction, ignore_index, float(label_smoothing), dtype, wanted, rows, features, classes,
            plan_chunks(rows, features, hidden.dtype, dtype, any(wanted), wanted[1]),
        )  # fmt: skip

    @property
    def acc(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    # ------------------------------------------------------------------ the steps

    def steps(self) -> tuple[Value, Value, Value, Value]:
        """Append them all; (loss, gradient of hidden, of weight, of bias)."""
        ctx, kind = self.ctx, self.weight.dtype
        total = self._total() if self.reduction == "mean" else None
        every = self._every_class() if self.smoothing else None
        pitch = LINE // kind.itemsize
        width = -(-self.classes // pitch) * pitch
        logits = ctx.new_buffer(kind, self.device, (min(self.chunks.rows, self.rows), width))
        of_hidden = self._gradient(0, (self.rows, self.features), kind)
        of_weight = self._gradient(1, (self.classes, self.features), self.chunks.sums)
        of_bias = self._gradient(2, (self.classes,), torch.promote_types(kind, torch.float32))
        parts, losses = self._parts(of_weight), []
        for start in range(0, self.rows, self.chunks.rows):
            count = min(self.chunks.rows, self.rows - start)
            here = replace(logits, shape=(count, self.classes))
            rows = _rows(self.hidden, start, count)
            for part in parts:
                self._multiply(rows, part, here)
            if len(parts) > 1 and any(self.wanted):
                self._clear_padding(logits, count)
            losses.append(self._losses_and_slopes(here, start, total, every))
            if of_hidden is not None:
                self._multiply_back(here, parts, _rows(of_hidden, start, count))
            for part in parts:
                if part.of_weight is not None:
                    self._add_product(part.of_weight, _transposed(part.columns(here)), rows, start > 0)
            if of_bias is not None:
                self._add_columns(of_bias, here, start > 0)
        if of_weight is not None:
            for part in parts[1:]:
                self._put_rows(of_weight, part)
        gradients = (self._finished(g, kind) for g in (of_hidden, of_weight, of_bias))
        loss = self._reduced(losses, total)
        ctx.journal.note("linear_cross_entropy", f"{self.rows} rows in {len(losses)} chunks, sums in {self.chunks.sums}")
        return (loss, *gradients)  # type: ignore[return-value]

    def _parts(self, of_weight: Stored | None) -> list[_Part]:
        """All classes, in parts; `of_weight` [V, K] has the sums of the weight's gradient."""
        whole, kind = _Part(0, self.weight, self.bias, of_weight), self.weight.dtype
        pitch = LINE // kind.itemsize
        rest = self.classes % pitch
        first = self.classes - rest
        if not rest or not first or kind.itemsize != 2:
            return [whole]
        sums = of_weight and self.ctx.new_buffer(of_weight.dtype, self.device, (pitch, self.features))
        bias = self.bias and self._padded(self.bias, first, pitch)
        main = _Part(
            0,
            _rows(self.weight, 0, first),
            self.bias and _rows(self.bias, 0, first),
            of_weight and _rows(of_weight, 0, first),
        )
        return [main, _Part(first, self._padded(self.weight, first, pitch), bias, sums)]

    def _padded(self, x: Stored, first: int, count: int) -> Stored:
        """`count` rows of `x` from `first` on, zeros after its last one."""
        rest = self.classes - first

        def element(i: tuple[Int, ...]) -> Scalar:
            inside = Term(size_value(i[0], torch.int32)).lt(rest)
            return Masked(inside.scalar, at(x, (add(i[0], first), *i[1:])), Const(0.0, x.dtype))

        return self.ctx.store(pointwise((count, *x.shape[1:]), x.dtype, self.device, element, (x,)))

    def _put_rows(self, of_weight: Stored, part: _Part) -> None:
        """Append the kernel that puts the gradient of `part` into that of the weight, without padding."""
        assert part.of_weight is not None
        i, k = index("x0", self.classes - part.first), index("x1", self.features)
        value = at(part.of_weight, (i, k))
        store = Store(of_weight.buffer, address(of_weight, (add(i, part.first), k)), value)
        self.ctx.emit(Nest(symbols_of((i, k)), (), (store,)), self.device, ())

    def _clear_padding(self, logits: Stored, count: int) -> None:
        """Append the kernel that sets the padding of `count` rows of `logits` to zero: it is NaN where a row has a NaN, also
        in rows that do not count."""
        width = logits.shape[1]
        assert isinstance(width, int)
        r, c = index("x0", count), index("x1", width - self.classes)
        store = Store(logits.buffer, address(logits, (r, add(c, self.classes))), Const(0.0, logits.dtype))
        self.ctx.emit(Nest(symbols_of((r, c)), (), (store,)), self.device, ())

    def _gradient(self, operand: int, shape: tuple[int, ...], dtype: torch.dtype) -> Stored | None:
        return self.ctx.new_buffer(dtype, self.device, shape) if self.wanted[operand] else None

    def _finished(self, gradient: Stored | None, dtype: torch.dtype) -> Value:
        if gradient is None:  # as the op: no elements
            return self.ctx.new_buffer(dtype, self.device, (0,))
        if gradient.dtype == dtype:
            return gradient
        return pointwise(gradient.shape, dtype, self.device, lambda i: cast(at(gradient, i), dtype), (gradient,))

    def _reduced(self, losses: list[Stored], total: Stored | None) -> Value:
        """The loss from those of the rows, chunk by chunk."""
        ctx = self.ctx
        joined = losses[0]
        if len(losses) > 1:
            joined = ctx.new_buffer(self.acc, self.device, (self.rows,))
            self._call(aten.cat.out, (losses,), joined)
        found = joined if self.reduction == "none" else self._sum(self.rows, lambda i: at(joined, (i,)), joined)

        def loss(i: tuple[Int, ...]) -> Scalar:
            value = Term(at(found, i))
            return cast((value if total is None else value / Term(at(total, ()))).scalar, self.dtype)

        return pointwise(found.shape, self.dtype, self.device, loss, (found,))

    # ------------------------------------------------------------------ what depends on labels and class weights alone

    def _row(self, labels: Stored, at_row: Int) -> _Row:
        """The row whose label is labels[at_row]. A label out of range fails as in eager."""
        label = Term(at(labels, (at_row,)))
        counts = label.ne(self.ignore_index)
        where, bindings = position(t.where(counts, label, 0).scalar, self.classes, wrap=False)
        checked = bindings[0][1] if bindings else size_value(where)
        own = None
        if self.class_weight is not None:
            weight = Load(self.class_weight.buffer, address(self.class_weight, (where,)), self.class_weight.dtype, bindings)
            own = t.where(counts, Term(cast(weight, self.acc)), 0.0)
        return _Row(counts, t.where(counts, Term(cast(checked, torch.int32)), -1), own, self.acc)

    def _total(self) -> Stored:
        """What a mean divides by: the weights of the labels that count, summed."""

        def weight(i: Int) -> Scalar:
            row = self._row(self.labels, i)
            return (row.counts.to(self.acc) if row.own is None else row.own).scalar

        return self._sum(self.rows, weight, self.labels)

    def _every_class(self) -> Scalar:
        """The sum of all classes' weights."""
        given = self.class_weight
        if given is None:
            return Const(float(self.classes), self.acc)
        return at(self._sum(self.classes, lambda i: cast(at(given, (i,)), self.acc), given), ())

    def _sum(self, size: int, element: Callable[[Int], Scalar], read: Stored) -> Stored:
        """element(index) summed over `size` indices, a 0-dim value in `acc`; `read` is what it reads."""
        (found,) = self.ctx.reduce(
            "sum", (size,), (0,), lambda i: (element(i[0]),), accumulate=self.acc, inputs=(read,), results=((0, self.acc),)
        )  # fmt: skip
        assert isinstance(found, Stored)
        return found

    # ------------------------------------------------------------------ the kernel of a chunk

    def _losses_and_slopes(self, logits: Stored, start: int, total: Stored | None, every: Scalar | None) -> Stored:
        """Append the kernel that stores the losses of `logits` [r, V], the result, and overwrites these with their gradient.

        As `torch.nn.functional.cross_entropy` defines it, the loss of a row with label t is (1 - s) w_t (-log p_t) + s / V *
        sum over c of w_c (-log p_c). Its gradient is a * p_c - s / V * w_c, with a = (1 - s) w_t + s / V * sum of w, less
        (1 - s) w_t for the label's class: there from log p_t, in a form that does not cancel where p_t is close to 1.
        """
        count = logits.shape[0]
        assert isinstance(count, int)
        r, c = index("x0", count), index("r1", self.classes)
        row = self._row(self._part(self.labels, start, count), r)
        axes = symbols_of((c,))
        x = Term(cast(at(logits, (r, c)), self.acc))
        hit = Term(size_value(c, torch.int32)).eq(row.label)
        top, sum_of_exp = (Term(Reduce("softmax_stats", (x.scalar,), axes, self.acc, k)) for k in (0, 1))
        at_label = Term(Reduce("sum", (t.where(hit, x, 0.0).scalar,), axes, self.acc))
        log_p = at_label - top - t.log(sum_of_exp)
        share, kept = self.smoothing / self.classes, 1 - self.smoothing
        loss = -log_p if row.own is None else -log_p * row.own
        w = None if self.class_weight is None else Term(cast(at(self.class_weight, (c,)), self.acc))
        if every is not None:
            weighted = Term(Reduce("sum", ((x if w is None else x * w).scalar,), axes, self.acc))
            loss = loss * kept - (weighted - (top + t.log(sum_of_exp)) * Term(every)) * share
        losses = self.ctx.new_buffer(self.acc, self.device, (count,))
        stores = [Store(losses.buffer, address(losses, (r,)), row.zero_unless_counted(loss).scalar)]
        if any(self.wanted):
            factor = self._factor(start, count, r, total)
            at_target, floor = t.expm1(log_p), None
            if every is not None:
                own = t.literal(1.0, self.acc) if row.own is None else row.own
                scale = own * kept + Term(every) * share
                at_target = (scale * at_target + (Term(every) - own) * share) * factor
                scale, floor = scale * factor, factor * share if w is None else w * (factor * share)
            else:
                scale = factor if row.own is None else row.own * factor
                at_target = at_target * scale
            slope = t.exp(x - top) * (scale / sum_of_exp)
            slope = t.where(hit, at_target, slope if floor is None else slope - floor)
            slope = row.zero_unless_counted(slope)
            stores.append(Store(logits.buffer, address(logits, (r, c)), cast(slope.scalar, logits.dtype)))
        self.ctx.emit(Nest(symbols_of((r,)), axes, tuple(stores)), self.device, ())
        return losses

    def _factor(self, start: int, count: int, r: Int, total: Stored | None) -> Term:
        """What the gradient of the loss of row `r` is multiplied by."""
        factor = t.literal(1.0, self.acc)
        if self.grad_loss is not None and self.reduction == "none":
            factor = Term(cast(at(self._part(self.grad_loss, start, count), (r,)), self.acc))
        elif self.grad_loss is not None:
            factor = Term(cast(at(self.grad_loss, ()), self.acc))
        return factor if total is None else factor / Term(at(total, ()))

    # ------------------------------------------------------------------ calls

    def _multiply(self, rows: Stored, part: _Part, logits: Stored) -> None:
        out = part.columns(logits)
        if part.bias is None:
            self._call(aten.mm.out, (rows, _transposed(part.weight)), out)
        else:
            self._call(aten.addmm.out, (part.bias, rows, _transposed(part.weight)), out)

    def _multiply_back(self, slopes: Stored, parts: list[_Part], out: Stored) -> None:
        """out = slopes [r, V] @ weight [V, K]. The few classes first: the sum is rounded with the many."""
        first, *others = parts[::-1]
        self._call(aten.mm.out, (first.columns(slopes), first.weight), out)
        for part in others:
            self._add_product(out, part.columns(slopes), part.weight, True)

    def _add_product(self, total: Stored, a: Stored, b: Stored, keep: bool) -> None:
        """total += a @ b, or its first value."""
        names = [Ref(self.ctx.tensor_name(x)) for x in (total, a, b)]
        name = overload_name(fxopt.add_product_.default)
        self.ctx.steps.append(Call(name, (*names, keep), {}, (), self._origin, (total.buffer,)))

    def _add_columns(self, total: Stored, x: Stored, keep: bool) -> None:
        """total += the sums over the rows of `x`, or its first value."""
        c, r = index("x0", self.classes), index("r1", x.shape[0])
        where = address(total, (c,))
        if not keep:
            zero = Store(total.buffer, where, Const(0.0, total.dtype))
            self.ctx.emit(Nest(symbols_of((c,)), (), (zero,)), self.device, ())
        element, axes = cast(at(x, (r, c)), total.dtype), symbols_of((r,))
        found = Reduce("sum", (element,), axes, total.dtype) if axes else element
        value = Op("add", (at(total, (c,)), found), total.dtype)
        self.ctx.emit(Nest(symbols_of((c,)), axes, (Store(total.buffer, where, value),)), self.device, ())

    def _part(self, x: Stored, start: int, count: int) -> Stored:
        """`count` rows of the vector `x` as a buffer: kernels that read it at an offset would each be another kernel."""
        if count == self.rows:
            return x
        part = self.ctx.new_buffer(x.dtype, x.device, (count,))
        args = (Ref(self.ctx.tensor_name(x)), 0, start, start + count)
        name = overload_name(aten.slice_copy.Tensor)
        self.ctx.steps.append(Call(name, args, {}, (part.buffer,), self._origin))
        return part

    def _call(self, op: Any, args: tuple[Any, ...], out: Stored) -> None:
        def named(x: Any) -> Any:
            return [named(v) for v in x] if isinstance(x, list) else Ref(self.ctx.tensor_name(x))

        given = tuple(map(named, args))
        kwargs = {"out": Ref(self.ctx.tensor_name(out))}
        self.ctx.steps.append(Call(overload_name(op), given, kwargs, (), self._origin, (out.buffer,)))

    @property
    def _origin(self) -> str:
        return self.ctx.origins[self.ctx.node.name]


def _rows(x: Stored, start: int, count: int) -> Stored:
    return replace(x, shape=(count, *x.shape[1:]), offset=x.offset + start * x.strides[0])


def _transposed(matrix: Stored) -> Stored:
    return replace(matrix, shape=matrix.shape[::-1], strides=matrix.strides[::-1])
