"""The walk over the graph: each node becomes a value; values that need memory become regions; the rest are library calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, Sym, as_symbol, contiguous_strides, index
from fxopt.ir.graph import Graph
from fxopt.ir.loops import Nest, Reduce, Scalar, Scan, Store, loads_below, transform
from fxopt.ir.region import Alias, Alternatives, BufferSpec, Ref, Region, Size, Step
from fxopt.ir.rounding import FLOAT8
from fxopt.journal import Journal
from fxopt.lower import calls, cost, layout
from fxopt.lower.one_hot import only_term, separated
from fxopt.lower.opsets import LIBRARY_OPS, VIEW_OPS, kernels_hold
from fxopt.lower.small import empty_reduction, trivial_reduction
from fxopt.lower.table import table
from fxopt.lower.values import (
    Computed,
    Indirect,
    Opaque,
    Stored,
    Value,
    address,
    at,
    cast,
    dim_indices,
    known_equal,
    nodes_of,
    symbols_of,
)


@dataclass
class Lowered:
    """The steps in a valid order, with every buffer they touch. Buffers in `inputs` and `constants` exist before the first
    step.

    `outputs` are Ref, Size, None or plain constants, in the order of the graph's outputs. `local_ops` holds the callables
    behind "local:KEY" calls. `lasting` are weights and states, which were touched a call ago; steps read
    `lasting_bytes` of them: of more than the L2 cache has, none are there when a step begins. The first way of each of
    `groupings` is among the steps: the tuner may prefer another one (lower/groupings.py).
    """

    steps: list[Step]
    buffers: dict[str, BufferSpec]
    inputs: tuple[str, ...]
    constants: dict[str, torch.Tensor]
    outputs: tuple[Any, ...]
    local_ops: dict[str, Callable[..., Any]] = field(default_factory=dict)
    lasting: frozenset[str] = frozenset()
    lasting_bytes: int = 0
    groupings: tuple[Alternatives, ...] = ()

    @property
    def is_single(self) -> bool:
        """Whether one step is all that runs: nothing before it hides its beginning, and nothing after it its end."""
        return sum(not isinstance(step, Alias) for step in self.steps) == 1


def lower_graph(graph: Graph, journal: Journal, library_nodes: frozenset[str] = frozenset()) -> Lowered:
    """Lower `graph`; nodes named in `library_nodes` stay library calls whatever the table says (the caller has noted why).

    Raises UnsupportedError when the graph as a whole cannot be expressed (a data-dependent output size, say).
    """
    return Lowering(graph, journal, library_nodes).run()


class Lowering:
    """State of one walk, and the interface that op lowerings use (`ctx`)."""

    def __init__(self, graph: Graph, journal: Journal, library_nodes: frozenset[str]) -> None:
        self.graph, self.journal, self.library_nodes = graph, journal, library_nodes
        self.table = table()
        self.steps: list[Step] = []
        self.buffers: dict[str, BufferSpec] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.local_ops: dict[str, Callable[..., Any]] = {}
        self.values: dict[fx.Node, Any] = {}
        self.aliases: dict[Stored, str] = {}
        self.restored: list[tuple[fx.Node, Any]] = []
        self.returned: dict[str, fx.Node] = {}
        self.readers: dict[str, list[fx.Node]] = {n: [] for n in _written(graph)}  # of inputs that are written
        self.node: fx.Node = next(iter(graph.gm.graph.nodes))
        self.origins = {node.name: origin(node) for node in graph.gm.graph.nodes}
        self.must_store = layout.nodes_needing_memory(graph.gm, self._needs_tensors)

    # ------------------------------------------------------------------ the walk

    def run(self) -> Lowered:
        inputs = iter(self.graph.inputs)
        names: list[str] = []
        outputs: tuple[Any, ...] = ()
        for node in self.graph.gm.graph.nodes:
            self.node = node
            if node.op == "placeholder":
                given = next(inputs)
                self.values[node] = self._placeholder(node, given.value)
                if given.value is None:
                    names.append(node.name)
            elif node.op == "get_attr":
                self.values[node] = self._attribute(node)
            elif node.op == "call_function":
                self.values[node] = self._call_function(node)
                self._note_reads(node)
            elif node.op == "output":
                outputs = tuple(self._output(a) for a in torch.utils._pytree.tree_leaves(node.args[0], is_leaf=_is_none))
            else:
                raise UnsupportedError(f"node {node.name} has op {node.op}")
        return Lowered(self.steps, self.buffers, tuple(names), self.constants, outputs, self.local_ops)

    def _note_reads(self, node: fx.Node) -> None:
        """Remember which expressions read inputs that are written, for `store_pending_readers`."""
        value = self.values[node]
        if self.readers and isinstance(value, Computed):
            for name in {load.buffer for load in loads_below((value.body,))} & self.readers.keys():
                self.readers[name].append(node)

    def _placeholder(self, node: fx.Node, constant: torch.Tensor | None) -> Any:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            if constant is not None:
                self.constants[node.name] = constant
            return self.declare(node.name, val)
        if isinstance(val, (int, torch.SymInt)) and not isinstance(val, bool):
            return self.graph.to_int(val)
        return Opaque(node.name)

    def _attribute(self, node: fx.Node) -> Any:
        target = operator.attrgetter(str(node.target))(self.graph.gm)
        if not isinstance(target, torch.Tensor):
            return target
        self.constants[node.name] = target
        return self.declare(node.name, node.meta["val"])

    def declare(self, name: str, val: torch.Tensor) -> Stored | Opaque:
        """A buffer `name` laid out as `val`; opaque when it is no strided tensor.

        Raises UnsupportedError for one whose memory holds the negative of its elements, which no kernel would notice.
        """
        if val.is_neg():
            raise UnsupportedError(f"{name} has torch's negative bit")
        if val.layout != torch.strided or val.is_nested:
            return Opaque(name)
        shape, strides = self.sizes(val.shape), self.sizes(val.stride())
        self.buffers[name] = BufferSpec(name, val.dtype, val.device, shape, strides)
        return Stored(name, val.dtype, val.device, shape, strides)

    def _call_function(self, node: fx.Node) -> Any:
        if isinstance(node.meta.get("val"), (torch.SymInt, int)) and not calls.has_effect(node):
            return self.graph.to_int(node.meta["val"])
        if node.target is operator.getitem:
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        if node.target is torch.ops.aten.copy_.default:
            return calls.copy_into(self, node)
        if self._is_library(node):
            planned = node.target in LIBRARY_OPS or calls.changes_device(node)
            if not planned and node.name not in self.library_nodes:
                self.journal.retreat(f"{node.name} ({node.target})", self._library_reason(node))
            return self.call(node)
        mark = self._mark()
        try:
            args, kwargs = self._arguments(node)
            result = self._checked(node, self.table[node.target](self, *args, **kwargs))
        except UnsupportedError as error:
            self._roll_back(mark)
            self.journal.retreat(f"{node.name} ({node.target})", error.reason)
            return self.call(node)
        return self._settle(node, result)

    def _mark(self) -> tuple[int, int]:
        """Where a lowering starts, for `_roll_back`."""
        self.restored.clear()
        return len(self.steps), len(self.aliases)

    def _roll_back(self, mark: tuple[int, int]) -> None:
        """Undo what a lowering that gave up has done: values stored by its steps are expressions again."""
        steps, aliases = mark
        del self.steps[steps:]
        while len(self.aliases) > aliases:
            self.aliases.popitem()
        self.values.update(self.restored)

    def _is_library(self, node: fx.Node) -> bool:
        if node.target not in self.table or node.name in self.library_nodes or calls.changes_device(node):
            return True
        read = [t for a in node.all_input_nodes for t in _tensor_vals(a)]
        if node.target not in VIEW_OPS and any(t.dtype in FLOAT8 for t in read):
            return True  # kernels write them; what one read of its own cast was not what eager reads on an H100
        tensors = [*_tensor_vals(node), *read]
        return not all(kernels_hold(t.dtype, t.device) and t.layout == torch.strided and not t.is_nested for t in tensors)

    def _needs_tensors(self, node: fx.Node) -> bool:
        if node.target in LIBRARY_OPS:  # also one that is lowered to several calls
            return True
        return node.target not in (torch.ops.aten.copy_.default, operator.getitem) and self._is_library(node)

    def _library_reason(self, node: fx.Node) -> str:
        if node.target not in self.table:
            return "no lowering for this op"
        return "an element type or layout that kernels do not have"

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def value_of(arg: fx.Node) -> Any:
            value = self.values[arg]
            if isinstance(value, Opaque):
                raise UnsupportedError(f"argument {arg.name} is neither a tensor nor an integer")
            return value

        args: Any = fx.node.map_arg(node.args, value_of)
        kwargs: Any = fx.node.map_arg(node.kwargs, value_of)
        return args, kwargs

    def _checked(self, node: fx.Node, result: Any) -> Any:
        """`result`, after making sure that it has the shapes and dtypes that torch says."""
        expected = node.meta["val"]
        many = isinstance(expected, (tuple, list))
        for got, want in zip(result if many else [result], expected if many else [expected], strict=True):
            if got is None or not isinstance(want, torch.Tensor):
                continue
            shape = self.sizes(want.shape)
            if got.dtype != want.dtype or len(shape) != len(got.shape):
                raise UnsupportedError(f"lowering gives {got.dtype}{list(got.shape)}, torch {want.dtype}{list(shape)}")
            if not all(a == b for a, b in zip(shape, got.shape, strict=True)):
                raise UnsupportedError(f"lowering gives shape {list(got.shape)}, torch {list(shape)}")
        return result

    def _settle(self, node: fx.Node, result: Any) -> Any:
        """Put `node` among the nodes that `result` holds, and store it if something needs it in memory or recomputing costs
        more.
        """
        if isinstance(result, (tuple, list)):
            vals = node.meta["val"]
            return tuple(self._settle_one(node, r, v) for r, v in zip(result, vals, strict=True))
        return self._settle_one(node, result, node.meta["val"])

    def _settle_one(self, node: fx.Node, value: Value | None, val: Any) -> Value | None:
        if not isinstance(value, Computed):
            return value
        value = Computed(value.body, value.dtype, value.device, value.shape, tuple(dict.fromkeys((*value.nodes, node.name))))
        if node in self.must_store and node.target not in VIEW_OPS:
            return self.store(value, layout.dense_strides(self, val))
        if cost.should_store(value, layout.reader_count(node)):
            return self.store(value, layout.dense_strides(self, val))
        return value

    def _output(self, arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        value = self.values[arg]
        if isinstance(value, (Stored, Computed)):
            return Ref(self._own_name(self.tensor_name(self._as_traced(value, arg), arg), arg))
        if isinstance(value, Opaque):
            return Ref(value.name)
        return value if value is None or isinstance(value, (bool, float)) else Size(value)

    def _as_traced(self, value: Value, node: fx.Node) -> Value:
        """`value` with the strides of tracing, copied if need be: the backward is compiled for those, and reads by them."""
        strides = self.sizes(node.meta["val"].stride())
        if isinstance(value, Computed) or any(known_equal(s, 0) for s in value.shape):
            return value
        if _equivalent_strides(value.shape, strides, value.strides):
            return value
        copy = self.new_buffer(value.dtype, value.device, value.shape, strides)
        points = tuple(index(f"x{k}", size) for k, size in enumerate(value.shape))
        store = Store(copy.buffer, address(copy, points), at(value, points))
        self.emit(Nest(symbols_of(points), (), (store,)), value.device, (node.name,))
        return copy

    def _own_name(self, name: str, node: fx.Node) -> str:
        """`name`, or an alias of it when another node returns that already: detached tensors share memory, not the
        object.
        """
        if self.returned.setdefault(name, node) is node:
            return name
        spec, alias = self.buffers.get(name), f"returned{len(self.returned)}"
        if spec is None:  # a view: its own alias step says what of
            step = next(s for s in self.steps if isinstance(s, Alias) and s.name == name)
            self.steps.append(replace(step, name=alias))
        else:
            self.steps.append(Alias(alias, name, spec.shape, spec.strides, 0))
        self.returned[alias] = node
        return alias

    # ------------------------------------------------------------------ what lowerings use

    def sizes(self, given: Sequence[Any]) -> tuple[Int, ...]:
        """ints and SymInts as `Int`."""
        return tuple(self.graph.to_int(s) for s in given)

    def out(self, position: int | None = None) -> torch.Tensor:
        """The FakeTensor that the current node gives (its `position`-th, for ops with several results)."""
        val = self.node.meta["val"]
        result: torch.Tensor = val if position is None else val[position]
        return result

    def store(self, value: Value, strides: tuple[Int, ...] | None = None) -> Stored:
        """`value` in a buffer of its own, with `strides` (row-major when None). A Stored value is returned as it is."""
        if isinstance(value, Stored):
            return value
        dest = self.new_buffer(value.dtype, value.device, value.shape, strides)
        points = tuple(index(f"x{k}", size) for k, size in enumerate(value.shape))
        store = Store(dest.buffer, address(dest, points), cast(at(value, points), dest.dtype))
        self.emit(Nest(symbols_of(points), (), (store,)), value.device, value.nodes)
        return dest

    def new_buffer(
        self, dtype: torch.dtype, device: torch.device, shape: Sequence[Int], strides: tuple[Int, ...] | None = None
    ) -> Stored:
        """A fresh, unwritten buffer."""
        name = f"buf{len(self.buffers)}"
        shape = tuple(shape)
        strides = contiguous_strides(shape) if strides is None else strides
        self.buffers[name] = BufferSpec(name, dtype, device, shape, strides)
        return Stored(name, dtype, device, shape, strides)

    def emit(self, nest: Nest, device: torch.device, nodes: tuple[str, ...]) -> None:
        """Append a region for `nest`, unless it has no iterations. (Reductions of no elements run along no axis.)"""
        if any(s.size == 0 for s in (*nest.points, *nest.reduced)):
            return
        names = dict.fromkeys((*nest.reads(), *nest.writes()))
        for name in names:
            if self.buffers[name].device != device:
                raise UnsupportedError(f"reads {self.buffers[name].device} memory from a kernel on {device}")
        nodes = tuple(dict.fromkeys((*nodes, self.node.name)))
        origins = tuple(dict.fromkeys(self.origins[n] for n in nodes))
        buffers = {name: self.buffers[name] for name in names}
        self.steps.append(Region(f"r{len(self.steps)}", nest, buffers, device, nodes, origins))

    def reduce(
        self,
        kind: str,
        shape: Sequence[Int],
        dims: Sequence[int],
        operands: Callable[[tuple[Int, ...]], tuple[Scalar, ...]],
        *,
        accumulate: torch.dtype,
        inputs: Sequence[Value],
        results: Sequence[tuple[int, torch.dtype]],
        keepdim: bool = False,
        strides: tuple[Int, ...] | None = None,
    ) -> tuple[Value, ...]:
        """Reduce over `dims` of a domain of `shape`; operands(indices) are the reduced scalars at one index of the domain.

        `results` lists (output of the kind, dtype of the buffer) for each value wanted. The results have `shape` without
        `dims` (or with size 1 there, when keepdim) and `strides` (row-major when None).
        """
        over = {d % max(len(shape), 1) for d in dims} if shape else set()
        idx = tuple(index(f"{'r' if k in over else 'x'}{k}", size) for k, size in enumerate(shape))
        axes = symbols_of(tuple(i for k, i in enumerate(idx) if k in over))
        kept = tuple(k for k in range(len(shape)) if keepdim or k not in over)
        out_shape = tuple(1 if k in over else shape[k] for k in kept)
        out_index = tuple(0 if k in over else idx[k] for k in kept)
        points = symbols_of(tuple(i for k, i in enumerate(idx) if k not in over))
        args = operands(idx)
        device, nodes = _one_device(inputs), nodes_of(*inputs)
        out: list[Value] = []
        empty = any(known_equal(shape[k], 0) for k in over)
        term = only_term(args[0], axes[0]) if kind == "sum" and len(axes) == 1 and not empty else None
        if term is not None:
            place = {as_symbol(idx[k]): i for k, i in zip(kept, dim_indices(out_shape), strict=True) if k not in over}
            term = transform(cast(term, accumulate), {s: i for s, i in place.items() if s is not None})
            return tuple(Computed(cast(term, d), d, device, out_shape, nodes) for _, d in results)
        apart = separated(args[0], axes[0], accumulate) if kind == "sum" and len(axes) == 1 and not empty else None
        if apart is not None:
            whole = apart.value(lambda along: self._total(along, axes[0], accumulate, inputs), accumulate)
            place = {as_symbol(idx[k]): i for k, i in zip(kept, dim_indices(out_shape), strict=True) if k not in over}
            whole = transform(whole, {s: i for s, i in place.items() if s is not None})
            nodes = (*nodes, self.node.name)
            return tuple(Computed(cast(whole, d), d, device, out_shape, nodes) for _, d in results)
        for position, dtype in results:
            if empty:
                value: Scalar = empty_reduction(kind, accumulate, position)
            elif axes:
                value = Reduce(kind, args, axes, accumulate, position)
            else:
                value = trivial_reduction(kind, args, accumulate, position)
            dest = self.new_buffer(dtype, device, out_shape, strides)
            store = Store(dest.buffer, address(dest, out_index), cast(value, dtype))
            self.emit(Nest(points, () if empty else axes, (store,)), device, nodes)
            out.append(dest)
        return tuple(out)

    def _total(self, term: Scalar, axis: Sym, dtype: torch.dtype, inputs: Sequence[Value]) -> Scalar:
        """The sum of `term`, which depends on `axis` alone, stored for all that want it."""
        assert axis.size is not None
        (total,) = self.reduce(
            "sum", (axis.size,), (0,), lambda idx: (cast(transform(term, {axis: idx[0]}), dtype),),
            accumulate=dtype, inputs=inputs, results=((0, dtype),),
        )  # fmt: skip
        return at(total, ())

    def scan(
        self,
        kind: str,
        value: Value,
        dim: int,
        accumulate: torch.dtype,
        dtype: torch.dtype,
        strides: tuple[Int, ...] | None = None,
    ) -> Value:
        """Inclusive scan of `value` along `dim`, stored with `strides` (row-major when None)."""
        if not value.shape:
            return Computed(cast(at(value, ()), dtype), dtype, value.device, (), nodes_of(value))
        dim %= len(value.shape)
        idx = tuple(index(f"{'r' if k == dim else 'x'}{k}", size) for k, size in enumerate(value.shape))
        body = cast(at(value, idx), accumulate)
        axis = as_symbol(idx[dim])
        points = symbols_of(tuple(i for k, i in enumerate(idx) if k != dim))
        scanned = body if axis is None else Scan(kind, body, axis, accumulate)
        dest = self.new_buffer(dtype, value.device, value.shape, strides)
        store = Store(dest.buffer, address(dest, idx), cast(scanned, dtype))
        self.emit(Nest(points, () if axis is None else (axis,), (store,)), value.device, nodes_of(value))
        return dest

    def scatter(
        self,
        dest: Stored,
        shape: Sequence[Int],
        element: Callable[[tuple[Int, ...]], tuple[Sequence[Int], tuple[Indirect, ...], Scalar]],
        mode: str,
        inputs: Sequence[Value],
    ) -> Stored:
        """Over a domain of `shape`, store (mode "set") or add (mode "add") into `dest`, a buffer that this op made.

        element(indices) gives (indices into dest, bindings of indirect symbols in them, the value).
        """
        idx = tuple(index(f"x{k}", size) for k, size in enumerate(shape))
        where, indirect, value = element(idx)
        store = Store(dest.buffer, address(dest, where), cast(value, dest.dtype), mode, indirect)
        self.emit(Nest(symbols_of(idx), (), (store,)), dest.device, nodes_of(*inputs))
        return dest

    def tensor_name(self, value: Value, node: fx.Node | None = None) -> str:
        """A name under which the plan knows exactly this tensor: its buffer, or an alias of it."""
        if isinstance(value, Computed):
            value = self.store(value, None if node is None else layout.dense_strides(self, node.meta["val"]))
        spec = self.buffers[value.buffer]
        same_layout = spec.shape == value.shape and _equivalent_strides(spec.shape, spec.strides, value.strides)
        if same_layout and value.offset == 0 and spec.dtype == value.dtype:
            return value.buffer
        if value not in self.aliases:
            name = f"view{len(self.aliases)}"
            self.aliases[value] = name
            self.steps.append(Alias(name, value.buffer, value.shape, value.strides, value.offset))
        return self.aliases[value]

    # ------------------------------------------------------------------ library calls and mutation

    def call(self, node: fx.Node) -> Any:
        """Run `node` as the call that it was. Raises UnsupportedError for a result of data-dependent size."""
        return calls.call(self, node)

    def store_pending_readers(self, buffer: str, writer: fx.Node) -> None:
        """Store every expression that reads `buffer` and is wanted after `writer`, which changes it."""
        for node in self.readers[buffer]:
            value = self.values[node]
            wanted = any(user is not writer and user not in self.values for user in node.users)
            if wanted and isinstance(value, Computed):
                self.restored.append((node, value))
                self.values[node] = self.store(value, layout.dense_strides(self, node.meta["val"]))


def origin(node: fx.Node) -> str:
    """Where a node came from, for people: "encoder.layer.0.output: aten.add.Tensor"."""
    module = node.meta.get("module", "")
    return f"{module}: {node.target}" if module else str(node.target)


def _written(graph: Graph) -> set[str]:
    """Names of the inputs that a copy writes."""
    copies = graph.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return {node.args[0].name for node in copies if isinstance(node.args[0], fx.Node)}


def _one_device(inputs: Sequence[Value]) -> torch.device:
    devices = {v.device for v in inputs}
    if len(devices) != 1:
        raise UnsupportedError(f"operands on several devices: {sorted(map(str, devices))}")
    return devices.pop()


def _equivalent_strides(shape: tuple[Int, ...], a: tuple[Int, ...], b: tuple[Int, ...]) -> bool:
    return all(x == y or known_equal(s, 1) for s, x, y in zip(shape, a, b, strict=True))


def _leaves(val: Any) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves(val))


def _tensor_vals(node: fx.Node) -> list[torch.Tensor]:
    return [v for v in _leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]


def _is_none(x: Any) -> bool:
    return x is None
