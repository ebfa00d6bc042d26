"""A slow, independent interpreter of lowered graphs: the oracle for lowering and scheduling, needing no printer.

A nest is evaluated by vectorised torch over its whole iteration domain: every index symbol is one axis of a broadcast grid,
so an expression becomes a tensor with one axis per symbol and a reduction is a reduction with keepdim. float16 and bfloat16
are computed in float32 and rounded when stored, as the printers do; a graph captured in float64 is computed in float64.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fxopt.ir.exprs import Atom, Expr, Int, Sym, as_symbol, evaluate, free_symbols
from fxopt.ir.loops import (
    BINARY,
    COMPARE,
    SUMMED_COLUMNS,
    Const,
    IndexValue,
    Load,
    Masked,
    Nest,
    Op,
    Reduce,
    Scalar,
    Scan,
    Store,
    postorder,
)
from fxopt.ir.region import (
    Alias,
    Alternatives,
    Batch,
    BufferSpec,
    Call,
    Contraction,
    Matrix,
    Patches,
    Ref,
    Region,
    SideBySide,
    Size,
    Step,
)
from fxopt.lower.lowering import Lowered

Env = dict[Sym, torch.Tensor]
Conditions = tuple[Scalar, ...]


def run_lowered(lowered: Lowered, inputs: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> list[Any]:
    """Run every step of `lowered` on `inputs` (by input name) and return its outputs.

    Size symbols are read from the shapes of the inputs; `sizes` gives those that no input shows. Inputs that the graph
    mutates are mutated. A load or store outside its buffer raises AssertionError, a checked index outside its dimension
    IndexError. Of alternatives the first way runs.
    """
    return _Run(lowered, inputs, sizes or {}).outputs()


class _Run:
    """The memory of one run: each buffer as a flat tensor over its extent."""

    def __init__(self, lowered: Lowered, inputs: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        self.lowered = lowered
        self.flat: dict[str, torch.Tensor] = {}
        self.views: dict[str, torch.Tensor] = {}
        self.plain = {name: value for name, value in inputs.items() if name not in lowered.buffers}
        given = {**lowered.constants, **{n: v for n, v in inputs.items() if n in lowered.buffers}}
        self.sizes = {**sizes_of(lowered.buffers, given), **sizes}
        for name, tensor in given.items():
            self._adopt(name, tensor)
        for step in lowered.steps:
            self._step(step)

    def outputs(self) -> list[Any]:
        return [self._argument(o) for o in self.lowered.outputs]

    def _adopt(self, name: str, tensor: torch.Tensor) -> None:
        spec = self.lowered.buffers[name]
        assert tensor.dtype == spec.dtype, f"{name} is {tensor.dtype}, declared {spec.dtype}"
        assert tuple(tensor.shape) == self.ints(spec.shape), f"{name} is {tuple(tensor.shape)}, declared {spec.shape}"
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        extent = 1 + reach if tensor.numel() else 0
        self.flat[name] = tensor.as_strided((extent,), (1,), tensor.storage_offset())

    def _step(self, step: Step) -> None:
        match step:
            case Region():
                self._region(step)
            case Batch():
                self._batch(step)
            case Alias():
                shape, strides = self.ints(step.shape), self.ints(step.strides)
                base = self._memory(step.of)
                self.views[step.name] = base.as_strided(shape, strides, base.storage_offset() + self.int(step.offset))
            case Call():
                self._call(step)
            case Contraction():
                self._contraction(step)
            case SideBySide():
                for part in step.parts:
                    self._contraction(part)
            case Alternatives():
                for inner in step.ways[0].steps:
                    self._step(inner)

    def _region(self, region: Region) -> None:
        touched = {*region.reads(), *region.writes()}
        assert touched <= region.buffers.keys(), f"{region.name} does not describe {touched - region.buffers.keys()}"
        for nest in region.nests:
            self._nest(nest)

    def _contraction(self, step: Contraction) -> None:
        """The product in float32, then the nest, to which it is in registers."""
        touched = {*step.reads(), *step.writes()}
        assert touched <= step.buffers.keys(), f"{step.name} does not describe {touched - step.buffers.keys()}"
        batch, m, k, n = self.ints(step.sizes)
        if isinstance(step.a, Patches):
            made = self._convolution(step.a, step.b, k, n)
            self._nest(step.region.nest, Registers(step, _of_pools(step, made) if step.pooled else {step.result: made}))
            return
        a = self._matrices(step.a, batch, m, k).double()
        ends = self._memory(step.ends).tolist() if step.ends else []
        made = {}
        for name, b in step.products.items():
            if step.ends:
                weights, parts = self._matrices(b, len(ends), k, n).double(), zip([0, *ends], ends, strict=False)
                products = [a[:, start:end] @ weights[g] for g, (start, end) in enumerate(parts)]
                unset = torch.full((1, m - (ends or [0])[-1], n), float("nan"), dtype=torch.float64)
                made[name] = torch.cat([*products, unset], 1).float()
            else:
                made[name] = (a @ self._matrices(b, batch, k, n).double()).float()
        self._nest(step.region.nest, Registers(step, made))

    def _convolution(self, patches: Patches, weight: Matrix, depth: int, channels: int) -> torch.Tensor:
        """What patches and weight give, float32 [1, places, channels]."""
        memory = self._memory(patches.buffer)
        last = sum((n - 1) * s for n, s in zip(patches.shape, patches.strides, strict=True))
        assert patches.offset >= 0 and patches.offset + last < memory.numel(), f"an operand outside {patches.buffer}"
        image = memory.as_strided(patches.shape, patches.strides, memory.storage_offset() + patches.offset)
        if patches.transposed:
            return self._weight_gradient(patches, image, self._matrices(weight, 1, depth, channels)[0])
        columns = self._matrices(weight, 1, depth, channels)[0].T.unflatten(1, (*patches.window, -1))
        geometry = (patches.stride, patches.padding, patches.dilation, channels if patches.depthwise else 1)
        x, w = (t.permute(0, 3, 1, 2).double() for t in (image, columns))
        made = torch.nn.functional.conv2d(x, w, None, *geometry).float()
        assert tuple(n - n % p for n, p in zip(made.shape[2:], patches.pool, strict=True)) == patches.places
        made = made.permute(0, 2, 3, 1)
        return made.reshape(1, patches.rows, channels) if patches.pool == (1, 1) else made

    def _weight_gradient(self, patches: Patches, image: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """That of a depthwise convolution, float32 [1, elements of the window, channels]; `grad` [places, channels]."""
        x = image.permute(0, 3, 1, 2).double()
        above = grad.unflatten(0, (patches.shape[0], *patches.places)).permute(0, 3, 1, 2).double()
        weight = torch.zeros(x.shape[1], 1, *patches.window, dtype=torch.float64)
        geometry = ([*patches.stride], [*patches.padding], [*patches.dilation], False, [0, 0], x.shape[1])
        found = torch.ops.aten.convolution_backward(above, x, weight, None, *geometry, [False, True, False])[1]
        return found.flatten(1).T.float()[None]

    def _matrices(self, matrix: Matrix, batch: int, rows: int, columns: int) -> torch.Tensor:
        memory, offset = self._memory(matrix.buffer), self.int(matrix.offset)
        strides = self.ints((matrix.batch, matrix.row, matrix.column))
        z, y, x = (torch.arange(n) * s for n, s in zip((batch, rows, columns), strides, strict=True))
        where = offset + z[:, None, None] + y[None, :, None] + x[None, None, :]
        assert where.min() >= 0 and where.max() < memory.numel(), f"an operand outside {matrix.buffer}"
        return memory[where]

    def _nest(self, nest: Nest, registers: Registers | None = None) -> None:
        if any(s.size is not None and self.int(s.size) == 0 for s in nest.points):
            return
        values = _NestValues(nest, self.sizes, self._memory, registers)
        for store, (where, value) in zip(nest.stores, values.stores(), strict=True):
            _write(self._memory(store.buffer), where, value, store.mode)

    def _batch(self, batch: Batch) -> None:
        """The body once for each member: what a batched kernel does."""
        (size,) = {s for x in batch.body.nest.points if x.size is not None for s in free_symbols(x.size)}
        for names, count in zip(batch.arguments, batch.elements, strict=True):
            real = dict(zip(batch.body.buffers, names, strict=True))
            values = _NestValues(batch.body.nest, {size.name: count}, lambda name, real=real: self._memory(real[name]))
            for store, (where, value) in zip(batch.body.nest.stores, values.stores(), strict=True):
                _write(self._memory(real[store.buffer]), where, value, store.mode)

    def _call(self, call: Call) -> None:
        is_leaf = lambda a: isinstance(a, (Ref, Size))  # noqa: E731
        args, kwargs = pytree.tree_map(self._argument, (call.args, call.kwargs), is_leaf=is_leaf)
        results = self._target(call.op)(*args, **kwargs)
        if not call.outputs:  # it has written into a buffer
            return
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        for name, result in zip(call.outputs, results, strict=True):
            if name is not None and name in self.lowered.buffers:
                self.strided(name).copy_(result)

    def _target(self, op: str) -> Callable[..., Any]:
        if op.startswith("local:"):
            return self.lowered.local_ops[op.removeprefix("local:")]
        namespace, rest = op.split("::")
        name, _, overload = rest.partition(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, Ref):
            return self.plain[arg.name] if arg.name in self.plain else self.strided(arg.name)
        return self.int(arg.expr) if isinstance(arg, Size) else arg

    def _memory(self, name: str) -> torch.Tensor:
        if name not in self.flat:
            spec = self.lowered.buffers[name]
            self.flat[name] = torch.empty(self.int(spec.extent), dtype=spec.dtype)
            _poison(self.flat[name])
        return self.flat[name]

    def strided(self, name: str) -> torch.Tensor:
        """The tensor of that name, sharing memory with its buffer."""
        if name in self.views:
            return self.views[name]
        spec = self.lowered.buffers[name]
        memory = self._memory(name)
        return memory.as_strided(self.ints(spec.shape), self.ints(spec.strides), memory.storage_offset())

    def int(self, x: Int) -> int:
        return evaluate(x, self.sizes)

    def ints(self, xs: Sequence[Int]) -> tuple[int, ...]:
        return tuple(self.int(x) for x in xs)


def _poison(memory: torch.Tensor) -> None:
    """Fill fresh memory with something conspicuous, so that a missing store shows."""
    memory.fill_(float("nan") if memory.dtype.is_floating_point else True if memory.dtype == torch.bool else 77)


def sizes_of(buffers: Mapping[str, BufferSpec], given: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Values of the size symbols that are a dimension or stride of one of the `given` tensors."""
    out: dict[str, int] = {}
    for name, tensor in given.items():
        spec = buffers[name]
        for declared, actual in zip((*spec.shape, *spec.strides), (*tensor.shape, *tensor.stride()), strict=True):
            symbol = as_symbol(declared)
            if symbol is not None:
                out.setdefault(symbol.name, actual)
    return out


def _write(memory: torch.Tensor, where: torch.Tensor, value: torch.Tensor, mode: str) -> None:
    assert mode in ("set", "add", "sums"), mode
    where, value = where.reshape(-1), value.reshape(-1)
    assert not where.numel() or (int(where.min()) >= 0 and int(where.max()) < memory.numel()), "a store outside its buffer"
    if mode == "set":
        memory[where] = value.to(memory.dtype)
    elif mode == "sums":
        assert torch.bincount(where, minlength=memory.numel()).eq(SUMMED_COLUMNS).all(), "not runs of columns"
        memory.zero_().index_add_(0, where, value.to(memory.dtype))
    else:
        dtype = compute_dtype(memory.dtype)
        memory.copy_(memory.to(dtype).index_put((where,), value.to(dtype), accumulate=True))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a scalar of `dtype` is computed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _of_pools(step: Contraction, made: torch.Tensor) -> dict[str, torch.Tensor]:
    """The places of `made` [images, rows, columns, channels] by the buffer in registers that has them, [1, pools, channels].
    """
    assert isinstance(step.a, Patches)
    (down, across), (rows, columns) = step.a.places, step.a.pool
    pools = made[:, :down, :across].unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
    places = pools.permute(2, 4, 0, 1, 3, 5).reshape(rows * columns, 1, -1, made.shape[3])
    return dict(zip(step.pooled, places, strict=True))


@dataclass(frozen=True)
class Registers:
    """Products [Z, M, N] (float32) by name that a contraction's nest loads before they have been rounded or stored."""

    contraction: Contraction
    products: Mapping[str, torch.Tensor]


class _NestValues:
    """Values of the expressions of one nest over its whole domain."""

    def __init__(
        self,
        nest: Nest,
        sizes: Mapping[str, int],
        memory: Callable[[str], torch.Tensor],
        registers: Registers | None = None,
    ) -> None:
        self.nest, self.memory, self.registers = nest, memory, registers
        bound = [s for n in postorder(nest.roots) if isinstance(n, (Reduce, Scan)) for s in _axes(n)]
        self.axes = list(dict.fromkeys((*nest.points, *nest.reduced, *bound)))
        self.extent = [evaluate(s.size, sizes) if s.size is not None else 0 for s in self.axes]
        self.env: Env = {s: self._range(k) for k, s in enumerate(self.axes)}
        self.sizes = sizes
        self.done: dict[tuple[Scalar, Conditions], torch.Tensor] = {}

    def _range(self, axis: int) -> torch.Tensor:
        shape = [1] * len(self.axes)
        shape[axis] = self.extent[axis]
        return torch.arange(self.extent[axis]).reshape(shape)

    def stores(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(element offsets, values) of each store; all are evaluated before any is written."""
        return [self._store(s) for s in self.nest.stores]

    def _store(self, store: Store) -> tuple[torch.Tensor, torch.Tensor]:
        env = {**self.env, **{s: self.value(v, ()) for s, v in store.indirect}}
        where, value = self.integer(store.index, env), self.value(store.value, ())
        over = set(self.nest.points)
        if store.symbols() & set(self.nest.reduced):
            over |= set(self.nest.reduced)
        shape = [n if s in over else 1 for s, n in zip(self.axes, self.extent, strict=True)]
        return where.expand(shape), value.expand(shape)

    def integer(self, x: Int, env: Env) -> torch.Tensor:
        """An integer expression over the grid, int64."""
        out = torch.zeros([1] * len(self.axes), dtype=torch.int64)
        for monomial, coef in x.terms if isinstance(x, Expr) else (((), x),):
            factors = [self._atom(a, env) for a in monomial]
            out = out + functools.reduce(operator.mul, factors, torch.tensor(coef))
        return out

    def _atom(self, atom: Sym | Atom, env: Env) -> torch.Tensor:
        if isinstance(atom, Sym):
            return env[atom] if atom in env else torch.tensor(self.sizes[atom.name])
        a, b = self.integer(atom.a, env), self.integer(atom.b, env)
        match atom.kind:
            case "floordiv":
                return torch.div(a, b, rounding_mode="floor")
            case "mod":
                return torch.remainder(a, b)
        return torch.minimum(a, b) if atom.kind == "min" else torch.maximum(a, b)

    def value(self, node: Scalar, conditions: Conditions) -> torch.Tensor:
        """`node` over the grid, meaningful where all `conditions` (of enclosing Masked nodes) hold."""
        key = (node, conditions)
        if key not in self.done:
            self.done[key] = self._evaluate(node, conditions)
        return self.done[key]

    def _evaluate(self, node: Scalar, under: Conditions) -> torch.Tensor:
        match node:
            case Const():
                return torch.full([1] * len(self.axes), node.value, dtype=compute_dtype(node.dtype))
            case IndexValue():
                return self.integer(node.expr, self.env)
            case Load():
                return self._load(node, under)
            case Masked():
                inner = (*under, node.cond)
                return torch.where(self.value(node.cond, under), self.value(node.body, inner), self.value(node.other, under))
            case Reduce():
                return self._reduce(node, under)
            case Scan():
                return self._scan(node, under)
            case Op():
                return self._op(node, under)
        raise AssertionError(f"unknown node {node!r}")

    def _holds(self, conditions: Conditions) -> torch.Tensor:
        out = torch.ones([1] * len(self.axes), dtype=torch.bool)
        for k, condition in enumerate(conditions):
            out = out & self.value(condition, conditions[:k])
        return out

    def _load(self, node: Load, under: Conditions) -> torch.Tensor:
        env = {**self.env, **{s: self.value(v, under) for s, v in node.indirect}}
        where = self.integer(node.index, env)
        if self.registers is not None and node.buffer in self.registers.products:
            return self._in_registers(self.registers, node, where)
        memory = self.memory(node.buffer)
        assert memory.dtype == node.dtype, f"{node!r} reads {memory.dtype} as {node.dtype}"
        outside = (where < 0) | (where >= memory.numel())
        assert not bool((outside & self._holds(under)).any()), f"{node!r} reads outside its buffer"
        if memory.numel() == 0:
            return torch.zeros(where.shape, dtype=compute_dtype(node.dtype))
        return memory[torch.where(outside, 0, where)].to(compute_dtype(node.dtype))

    def _in_registers(self, registers: Registers, node: Load, where: torch.Tensor) -> torch.Tensor:
        """The product at each point's own row and column, whatever the index says: a kernel has no other. Which is why it
        must say just that.
        """
        contraction = registers.contraction
        assert not node.indirect and set(self.nest.points) == {s for s in contraction.axes if s is not None}
        spec = contraction.region.buffers[node.buffer]
        places = [torch.zeros(1, dtype=torch.int64) if s is None else self.env[s] for s in contraction.axes]
        strides = spec.strides if len(spec.strides) == 3 else (0, *spec.strides)
        if len(spec.strides) == 4:  # a convolution's result: its places in a row, and its channels
            transposed = isinstance(contraction.a, Patches) and contraction.a.transposed
            strides = (0, spec.strides[3], spec.strides[0 if transposed else 1])
        own = sum(p * evaluate(s, self.sizes) for p, s in zip(places, strides, strict=True))
        half = evaluate(contraction.sizes[3], self.sizes) * evaluate(strides[-1], self.sizes)
        both = (own, own + half) if contraction.c is not None else (own,)  # of one product, two halves of the columns
        assert any(bool((where == own).all()) for own in both), f"{node!r} is not the product's own element"
        return registers.products[node.buffer][tuple(places)]

    def _op(self, node: Op, under: Conditions) -> torch.Tensor:
        args = [self.value(a, under) for a in node.args]
        dtype = compute_dtype(node.dtype)
        if node.name == "checked_index":
            return self._checked_index(node, args, self._holds(under))
        if node.name == "bitcast":
            return args[0].to(node.args[0].dtype).view(node.dtype).to(dtype)
        _check_operands(node)
        result = OPS[node.name](*args) if node.name != "cast" else _convert(args[0], dtype)
        assert result.dtype == dtype, f"{node!r} has dtype {node.dtype}, its value {result.dtype}"
        return result

    def _checked_index(self, node: Op, args: list[torch.Tensor], holds: torch.Tensor) -> torch.Tensor:
        i, size = args
        bad = ((i < -size) | (i >= size)) & holds
        if bool(bad.any()):
            raise IndexError(f"{node!r} is out of range")
        return torch.where(i < 0, i + size, i).clamp(min=0)

    def _spread(self, node: Scalar, under: Conditions, axes: Sequence[Sym]) -> torch.Tensor:
        """The value with its full size along `axes`, so that reducing counts every iteration."""
        value = self.value(node, under)
        shape = [n if s in axes else old for s, n, old in zip(self.axes, self.extent, value.shape, strict=True)]
        return value.expand(shape)

    def _reduce(self, node: Reduce, under: Conditions) -> torch.Tensor:
        operands = [self._spread(a, under, node.axes) for a in node.operands]
        operands = list(torch.broadcast_tensors(*operands))
        dims = [self.axes.index(s) for s in node.axes]
        kept = [k for k in range(len(self.axes)) if k not in dims]
        rows = [o.permute(*kept, *dims).reshape([o.shape[k] for k in kept] + [-1]) for o in operands if o.numel()]
        if not rows:  # nothing to reduce: the identity
            shape = [1 if k in dims else n for k, n in enumerate(operands[0].shape)]
            return torch.full(shape, _identity(node), dtype=compute_dtype(node.dtype))
        result = _REDUCE[node.kind](node.output, *rows).to(compute_dtype(node.dtype))
        return result.reshape([1 if k in dims else operands[0].shape[k] for k in range(len(self.axes))])

    def _scan(self, node: Scan, under: Conditions) -> torch.Tensor:
        operand = self._spread(node.operand, under, (node.axis,))
        dim = self.axes.index(node.axis)
        return SCANS[node.kind](operand, dim).to(compute_dtype(node.dtype))


def _axes(node: Reduce | Scan) -> Iterator[Sym]:
    yield from node.axes if isinstance(node, Reduce) else (node.axis,)


def _check_operands(node: Op) -> None:
    """Binary operators take two operands of one dtype; a mixture would be a promotion that the lowering forgot."""
    if node.name in BINARY | COMPARE:
        a, b = node.args
        assert a.dtype == b.dtype, f"{node!r} mixes {a.dtype} and {b.dtype}"


def _identity(node: Reduce) -> bool | int | float:
    dtype = compute_dtype(node.dtype)
    low: int | float = -float("inf") if dtype.is_floating_point else 0 if dtype == torch.bool else torch.iinfo(dtype).min
    high: int | float = float("inf") if dtype.is_floating_point else 1 if dtype == torch.bool else torch.iinfo(dtype).max
    if node.kind in ("softmax_stats", "weighted_softmax"):
        return low if node.output == 0 else 0
    return {"sum": 0, "prod": 1, "max": low, "min": high, "any": False, "all": True}.get(node.kind, 0)


def _softmax_stats(output: int, x: torch.Tensor) -> torch.Tensor:
    top = x.amax(-1, keepdim=True)
    return top[..., 0] if output == 0 else (x - top).exp().sum(-1)


def _weighted_softmax(output: int, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    if output < 2:
        return _softmax_stats(output, x)
    return (w * (y - x.amax(-1, keepdim=True))).sum(-1) if output == 2 else w.sum(-1)


def _welford(output: int, x: torch.Tensor) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    return mean[..., 0] if output == 0 else (x - mean).square().sum(-1)


def _arg_extreme(pick: Callable[..., torch.Tensor], x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    """The smallest `i` among the extreme elements; NaN counts as extreme."""
    x = x.to(torch.uint8) if x.dtype == torch.bool else x
    best = pick(x, -1, keepdim=True)
    hit = torch.where(best.isnan(), x.isnan(), x == best) if x.dtype.is_floating_point else x == best
    return torch.where(hit, i, torch.iinfo(torch.int64).max).amin(-1)


_REDUCE: dict[str, Callable[..., torch.Tensor]] = {
    "sum": lambda _, x: x.sum(-1, dtype=x.dtype) if x.dtype != torch.bool else x.any(-1),
    "prod": lambda _, x: x.prod(-1, dtype=x.dtype) if x.dtype != torch.bool else x.all(-1),
    "max": lambda _, x: x.amax(-1),
    "min": lambda _, x: x.amin(-1),
    "any": lambda _, x: x.any(-1),
    "all": lambda _, x: x.all(-1),
    "argmax": lambda _, x, i: _arg_extreme(torch.amax, x, i),
    "argmin": lambda _, x, i: _arg_extreme(torch.amin, x, i),
    "welford": _welford,
    "softmax_stats": _softmax_stats,
    "weighted_softmax": _weighted_softmax,
}


def _cummax(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cummax(x, dim).values


def _cummin(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cummin(x, dim).values


SCANS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "cumsum": torch.cumsum,
    "cumprod": torch.cumprod,
    "cummax": _cummax,
    "cummin": _cummin,
    "logcumsumexp": torch.logcumsumexp,
}


def _convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype)


def philox(seed: torch.Tensor, counter: torch.Tensor) -> list[np.ndarray]:
    """The four uint64-held 32-bit words of philox4x32-10 (Salmon et al. 2011), as fxopt.ir.loops documents the use."""
    seed, counter = torch.broadcast_tensors(seed, counter)
    s, c = (t.contiguous().numpy().view(np.uint64) for t in (seed, counter))
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = s & low, s >> np.uint64(32)
    c0, c1 = c & low, c >> np.uint64(32)
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return [c0, c1, c2, c3]


def _uniform(word: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((word >> np.uint64(8)).astype(np.float32)) * 2.0**-24


def _rand(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    return _uniform(np.choose((counter & 3).numpy(), philox(seed, counter >> 2)))


def _randn(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    words = philox(seed, counter)
    u1, u2 = _uniform(words[0]) + 2.0**-24, _uniform(words[1])  # u1 in (0, 1], so that its logarithm is finite
    return torch.sqrt(-2.0 * torch.log(u1)) * torch.cos(2.0 * torch.pi * u2)


def _randint(seed: torch.Tensor, counter: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    words = philox(seed, counter)
    bits = words[0] | (words[1] << np.uint64(32))
    span = (high - low).numpy().astype(np.uint64)
    return torch.from_numpy((bits % span).astype(np.int64)) + low


def _sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a | b if a.dtype == torch.bool else a + b


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a & b if a.dtype == torch.bool else a * b


def _safe_divisor(b: torch.Tensor) -> torch.Tensor:
    """Integer division by zero is undefined in the IR; here it divides by one."""
    return b if b.dtype.is_floating_point else torch.where(b == 0, 1, b).to(b.dtype)


_SAME_NAME_IN_TORCH = (
    "sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc "
    "erfinv lgamma sigmoid neg abs sign floor ceil trunc round reciprocal isnan isinf signbit pow maximum minimum atan2 "
    "hypot copysign nextafter eq ne lt le gt ge bitwise_and bitwise_or bitwise_xor bitwise_not sub where"
)
OPS: dict[str, Callable[..., torch.Tensor]] = {
    **{n: getattr(torch, n) for n in _SAME_NAME_IN_TORCH.split()},
    "add": _sum,
    "mul": _product,
    "truediv": torch.true_divide,
    "floordiv": lambda a, b: torch.div(a, _safe_divisor(b), rounding_mode="floor"),
    "truncdiv": lambda a, b: torch.div(a, _safe_divisor(b), rounding_mode="trunc"),
    "remainder": lambda a, b: torch.remainder(a, _safe_divisor(b)),
    "fmod": lambda a, b: torch.fmod(a, _safe_divisor(b)),
    "lshift": torch.bitwise_left_shift,
    "rshift": torch.bitwise_right_shift,
    "rand": _rand,
    "randn": _randn,
    "randint": _randint,
}
