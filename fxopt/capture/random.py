"""Random ops become pure functions of a seed, before the partitioner sees them.

One `fxopt::seed` per graph and device draws from torch's generator (reproducible under torch.manual_seed, fresh on every
call); random op number k then uses `seed + k` as its key. Recomputing such an op in the backward, under checkpointing or
because memory is cheaper that way, gives the same values: only the seed is saved, never drawn again.

What is not covered keeps eager's op: an explicit generator, layouts other than strided, exponential and the like, random ops
inside the subgraphs of higher-order ops. `options={"fallback_random": True}` skips this pass, so that eager's bits come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.utils.checkpoint import CheckpointPolicy

from fxopt.capture.symbols import to_int
from fxopt.errors import UnsupportedError
from fxopt.ir import exprs, random_ops

aten = torch.ops.aten

_COPIED_META = (
    "nn_module_stack",
    "fwd_nn_module_stack",
    "original_aten",
    "partitioner_tag",
    "recompute",
    "ac_graph_id",
    "seq_nr",
    "stack_trace",
    "custom",
)
_SIGNIFICAND_BITS = {torch.float16: 11, torch.bfloat16: 8}
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def functionalize_random(gm: fx.GraphModule) -> int:
    """Rewrite the random ops of a joint or inference graph in place; returns how many there were that could be."""
    seeds = _Seeds(gm.graph)
    count = 0
    for node in list(gm.graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is None or not _plain(node):
            continue
        try:
            result = rule(_Emitter(node, seeds), *node.args)
        except (UnsupportedError, TypeError):  # a form the rule does not know: the op stays what it is
            continue
        _replace(node, result)
        count += 1
    if count:
        gm.graph.eliminate_dead_code(is_impure_node=_is_effect)
        gm.recompile()
    return count


def _is_effect(node: fx.Node) -> bool:
    return node.is_impure() if node.target is not random_ops.seed else False


def _plain(node: fx.Node) -> bool:
    values = node.meta.get("val")
    first = values[0] if isinstance(values, (tuple, list)) else values
    if not isinstance(first, torch.Tensor) or first.layout is not torch.strided:
        return False
    return node.kwargs.get("generator") is None and not node.kwargs.get("pin_memory")


def _replace(node: fx.Node, result: fx.Node | tuple[fx.Node, ...]) -> None:
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index]
            user.graph.erase_node(user)
    node.graph.erase_node(node)


class _Seeds:
    """The seed node of each device (and of forward and backward apart), and how many random ops have used it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._nodes: dict[tuple[torch.device, str | None], fx.Node] = {}
        self._used: dict[fx.Node, int] = {}

    def next(self, emit: _Emitter, device: torch.device, tag: str | None) -> fx.Node:
        """A key that no other random op of this graph has."""
        if (device, tag) not in self._nodes:
            self._nodes[device, tag] = self._draw(emit, device, tag)
        seed = self._nodes[device, tag]
        count = self._used[seed] = self._used.get(seed, -1) + 1
        return emit(aten.add.Tensor, seed, count) if count else seed

    def _draw(self, emit: _Emitter, device: torch.device, tag: str | None) -> fx.Node:
        first = next(n for n in self._graph.nodes if n.op != "placeholder")
        with self._graph.inserting_before(first):
            seed = self._graph.call_function(random_ops.seed, (device,))
        seed.meta["val"] = emit.propagate(random_ops.seed, (device,), {})
        seed.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        if tag is not None:
            seed.meta["partitioner_tag"] = tag
        return seed


class _Emitter:
    """Inserts nodes before `node`, with meta["val"] and with what autograd's tools noted on `node`."""

    def __init__(self, node: fx.Node, seeds: _Seeds) -> None:
        self.node, self.seeds = node, seeds
        value = node.meta["val"]
        self.out: torch.Tensor = value[0] if isinstance(value, (tuple, list)) else value
        self._mode: Any = detect_fake_mode(self.out)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.node.graph.inserting_before(self.node):
            new = self.node.graph.call_function(target, args, kwargs)
        new.meta.update({k: self.node.meta[k] for k in _COPIED_META if k in self.node.meta})
        new.meta["val"] = self.propagate(target, args, kwargs)
        return new

    def propagate(self, target: Any, args: Any, kwargs: Any) -> Any:
        fake_args, fake_kwargs = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with torch.no_grad(), self._mode:
            return target(*fake_args, **fake_kwargs)

    def seed(self) -> fx.Node:
        return self.seeds.next(self, self.out.device, self.node.meta.get("partitioner_tag"))

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if x.meta["val"].dtype == dtype else self(aten._to_copy.default, x, dtype=dtype)


def _draw(emit: _Emitter, op: Any, like: fx.Node | None, sizes: Any, *bounds: Any) -> fx.Node:
    """A draw with the shape and strides of `emit.out`; sizes come from the arguments (`sizes`) or from the tensor `like`."""
    if like is None:
        return emit(op, emit.seed(), *bounds, list(sizes))
    order = _dense_order(emit.out)
    dims = [_size_node(emit, like, d) for d in order]
    drawn = emit(op, emit.seed(), *bounds, dims)
    if order == sorted(order):
        return drawn
    return emit(aten.permute.default, drawn, [order.index(d) for d in range(len(order))])


def _size_node(emit: _Emitter, like: fx.Node, dim: int) -> Any:
    size = emit.out.shape[dim]
    return size if isinstance(size, int) else emit(aten.sym_size.int, like, dim)


def _dense_order(x: torch.Tensor) -> list[int]:
    """Dimensions from the largest stride to the smallest. Raises UnsupportedError unless `x` is dense in that order."""
    sizes, strides = [to_int(s) for s in x.shape], [to_int(s) for s in x.stride()]
    order = list(range(x.dim()))
    if tuple(strides) == exprs.contiguous_strides(tuple(sizes)):
        return order
    if not all(isinstance(s, int) for s in strides):
        raise UnsupportedError("symbolic strides that are not contiguous")
    order.sort(key=lambda d: -x.stride()[d])
    expected = exprs.contiguous_strides(tuple(sizes[d] for d in order))
    if any(sizes[d] != 1 and strides[d] != e for d, e in zip(order, expected, strict=True)):
        raise UnsupportedError("strides that are not dense")
    return order


def _uniform(emit: _Emitter, like: fx.Node | None, sizes: Any = (), dtype: torch.dtype | None = None) -> fx.Node:
    """Uniform in [0, 1) in `dtype` (default: the output's), below 1 even after rounding to 8 or 11 significant bits."""
    dtype = dtype or emit.out.dtype
    if dtype not in _REAL:
        raise UnsupportedError(f"uniform values of dtype {dtype}")
    if dtype == torch.float64:
        drawn = _draw(emit, random_ops.randint, like, sizes, 0, 2**53)
        return emit(aten.mul.Tensor, emit.cast(drawn, dtype), 2.0**-53)
    u = _draw(emit, random_ops.rand, like, sizes)
    if dtype == torch.float32:
        return u
    scale = 2.0 ** _SIGNIFICAND_BITS[dtype]
    floored = emit(aten.floor.default, emit(aten.mul.Tensor, u, scale))
    return emit.cast(emit(aten.mul.Tensor, floored, 1.0 / scale), dtype)


def _normal(emit: _Emitter, like: fx.Node | None, sizes: Any = ()) -> fx.Node:
    """Standard normal in the output's dtype; float64 by Box-Muller on two uniforms of 53 bits."""
    if emit.out.dtype not in _REAL:
        raise UnsupportedError(f"normal values of dtype {emit.out.dtype}")
    if emit.out.dtype != torch.float64:
        return emit.cast(_draw(emit, random_ops.randn, like, sizes), emit.out.dtype)
    u = emit(aten.sub.Tensor, _constant(emit, 1.0), _uniform(emit, like, sizes))
    radius = emit(aten.sqrt.default, emit(aten.mul.Tensor, emit(aten.log.default, u), -2.0))
    angle = emit(aten.mul.Tensor, _uniform(emit, like, sizes), 2.0 * math.pi)
    return emit(aten.mul.Tensor, radius, emit(aten.cos.default, angle))


def _constant(emit: _Emitter, value: float) -> fx.Node:
    return emit(aten.full.default, [], value, dtype=emit.out.dtype, device=emit.out.device)


def _rand(emit: _Emitter, size: Any) -> fx.Node:
    return _uniform(emit, None, size)


def _rand_like(emit: _Emitter, x: fx.Node) -> fx.Node:
    return _uniform(emit, x)


def _randn(emit: _Emitter, size: Any) -> fx.Node:
    return _normal(emit, None, size)


def _randn_like(emit: _Emitter, x: fx.Node) -> fx.Node:
    return _normal(emit, x)


def _uniform_between(emit: _Emitter, x: fx.Node, low: float = 0.0, high: float = 1.0) -> fx.Node:
    u = _uniform(emit, x)
    if (low, high) == (0.0, 1.0):
        return u
    return emit(aten.add.Tensor, emit(aten.mul.Tensor, u, high - low), low)


def _normal_like(emit: _Emitter, x: fx.Node, mean: float = 0.0, std: float = 1.0) -> fx.Node:
    return emit(aten.add.Tensor, emit(aten.mul.Tensor, _normal(emit, x), std), mean)


def _randint(emit: _Emitter, high: Any, size: Any) -> fx.Node:
    return _randint_low(emit, 0, high, size)


def _randint_low(emit: _Emitter, low: Any, high: Any, size: Any) -> fx.Node:
    return emit.cast(_draw(emit, random_ops.randint, None, size, low, high), emit.out.dtype)


def _randint_like(emit: _Emitter, x: fx.Node, high: Any) -> fx.Node:
    return _randint_like_low(emit, x, 0, high)


def _randint_like_low(emit: _Emitter, x: fx.Node, low: Any, high: Any) -> fx.Node:
    if not isinstance(low, int | fx.Node) or not isinstance(high, int | fx.Node):
        raise UnsupportedError("open range")
    return emit.cast(_draw(emit, random_ops.randint, x, (), low, high), emit.out.dtype)


def _below(emit: _Emitter, x: fx.Node, p: Any, compare: Any) -> fx.Node:
    return emit.cast(emit(compare, _uniform(emit, x, dtype=torch.float32), p), emit.out.dtype)


def _bernoulli(emit: _Emitter, p: fx.Node) -> fx.Node:
    return _below(emit, p, p, aten.lt.Tensor)


def _bernoulli_p(emit: _Emitter, x: fx.Node, p: float = 0.5) -> fx.Node:
    return _below(emit, x, p, aten.lt.Scalar)


def _bernoulli_tensor(emit: _Emitter, x: fx.Node, p: fx.Node) -> fx.Node:
    return _below(emit, x, p, aten.lt.Tensor)


def _native_dropout(emit: _Emitter, x: fx.Node, p: float, train: bool | None) -> tuple[fx.Node, fx.Node]:
    """(output, mask). The mask is u >= p: an element is kept with probability 1 - p. As in eager, p = 1 gives zeros."""
    value = x.meta["val"]
    if train is False or p == 0.0:
        ones = emit(aten.full_like.default, x, True, dtype=torch.bool)
        return emit(aten.clone.default, x), ones
    if p == 1.0:
        return emit(aten.full_like.default, x, 0), emit(aten.full_like.default, x, False, dtype=torch.bool)
    if value.dtype not in _REAL:
        raise UnsupportedError(f"dropout of dtype {value.dtype}")
    mask = emit(aten.ge.Scalar, _uniform(emit, x, dtype=torch.float32), p)
    kept = emit(aten.mul.Tensor, x, mask)
    return emit(aten.mul.Tensor, kept, 1.0 / (1.0 - p)), mask


def _own_seed(emit: _Emitter, device: torch.device) -> fx.Node:
    """A seed that a pass before autograd has asked for."""
    return emit.seed()


_RULES: dict[Any, Callable[..., fx.Node | tuple[fx.Node, ...]]] = {
    aten.rand.default: _rand,
    aten.rand_like.default: _rand_like,
    aten.randn.default: _randn,
    aten.randn_like.default: _randn_like,
    aten.randint.default: _randint,
    aten.randint.low: _randint_low,
    aten.randint_like.default: _randint_like,
    aten.randint_like.low_dtype: _randint_like_low,
    getattr(aten.random, "from"): _randint_like_low,
    aten.random.to: _randint_like,
    aten.uniform.default: _uniform_between,
    aten.normal_functional.default: _normal_like,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli.p: _bernoulli_p,
    aten.bernoulli.Tensor: _bernoulli_tensor,
    aten.native_dropout.default: _native_dropout,
    random_ops.seed: _own_seed,
}
"""Rules take the op's positional arguments; keyword ones (dtype, device, layout) already show in meta["val"]."""
