"""Graphs and loop nests as text: Python that reads like the computation, numbered, with shapes and origins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.graph import Graph
from fxopt.ir.loops import Const, IndexValue, Load, Masked, Nest, Op, Reduce, Scalar, Scan, Store, postorder
from fxopt.ir.region import BufferSpec, Region

_SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b8",
}  # fmt: skip
_INDENT = "    "


def print_graph(graph: Graph) -> str:
    """`graph` as a Python function: one numbered line per call, with value, module and the pass that made it."""
    nodes = list(graph.gm.graph.nodes)
    lines = [f"# {graph.name}: {graph.phase.value}, {sum(n.op == 'call_function' for n in nodes)} calls", "import torch"]
    lines += ["from torch import device", "", "aten = torch.ops.aten", "", ""]
    lines += [f"def {_identifier(graph.name)}("]
    placeholders = [n for n in nodes if n.op == "placeholder"]
    for node, given in zip(placeholders, graph.inputs, strict=False):
        lines.append(f"{_INDENT}{node.name},  # {describe(node.meta.get('val'))} · {given.role.value}{_origin(node)}")
    lines.append("):")
    body = [n for n in nodes if n.op != "placeholder"]
    lines += [_line(number, node) for number, node in enumerate(body)]
    return "\n".join(lines) + "\n"


def _line(number: int, node: fx.Node) -> str:
    if node.op == "output":
        return f"{_INDENT}return {_argument(node.args[0])}"
    if node.op == "get_attr":
        return f"{_INDENT}{node.name} = self.{node.target}  # {number:04d}"
    comment = f"  # {number:04d} {describe(node.meta.get('val'))}{_origin(node)}"
    return f"{_INDENT}{node.name} = {_call(node)}{comment}"


def _call(node: fx.Node) -> str:
    if node.target is ops.GETITEM and len(node.args) == 2:
        return f"{_argument(node.args[0])}[{_argument(node.args[1])}]"
    given = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    if node.op == "call_method":
        return f"{given[0]}.{node.target}({', '.join(given[1:])})"
    return f"{_target(node.target)}({', '.join(given)})"


def _target(target: Any) -> str:
    if ops.is_overload(target):
        name = str(target.name()).replace("::", ".")
        name = name if "." in name.partition(".")[2] else f"{name}.default"
        return name if name.startswith("aten.") else f"torch.ops.{name}"
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__name__", str(target))
    return f"torch.ops.higher_order.{name}" if ops.is_higher_order(target) else f"{module.lstrip('_')}.{name}".lstrip(".")


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple | list):
        inner = ", ".join(_argument(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_argument(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    if isinstance(value, slice):
        return f"slice({_argument(value.start)}, {_argument(value.stop)}, {_argument(value.step)})"
    return str(value) if isinstance(value, torch.dtype | torch.memory_format | torch.layout) else repr(value)


def _origin(node: fx.Node) -> str:
    module, made_by = node.meta.get("module"), node.meta.get("pass")
    return (f" · {module}" if module else "") + (f" · by {made_by}" if made_by else "")


def describe(value: Any) -> str:
    """meta["val"] in short: `f32[2, 3] strides (1, 2) cuda:0`; strides when not contiguous, device when not cpu."""
    if isinstance(value, tuple | list):
        return "(" + ", ".join(describe(v) for v in value) + ")"
    if not isinstance(value, torch.Tensor):
        return "None" if value is None else f"{type(value).__name__} {value}"
    text = f"{dtype_name(value.dtype)}[{', '.join(str(s) for s in value.shape)}]"
    if value.layout == torch.strided and list(map(str, value.stride())) != _row_major(value):
        text += f" strides ({', '.join(str(s) for s in value.stride())})"
    return text if value.device.type == "cpu" else f"{text} {value.device}"


def _row_major(value: torch.Tensor) -> list[str]:
    strides, step = [], 1
    for size in reversed(value.shape):
        strides.append(str(step))
        step = step * size
    return strides[::-1]


def dtype_name(dtype: torch.dtype) -> str:
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def _identifier(text: str) -> str:
    name = "".join(c if c.isalnum() else "_" for c in text)
    return name if name[:1].isalpha() or name[:1] == "_" else f"graph_{name}"


def print_region(region: Region) -> str:
    """A region: its buffers, what it came from, its loops."""
    lines = [f"# region {region.name} on {region.device}"]
    lines += [f"# from {origin}" for origin in region.origins]
    written = set(region.writes())
    for spec in region.buffers.values():
        lines.append(f"{_buffer(spec)}{'  # written' if spec.name in written else ''}")
    return "\n".join([*lines, *(print_nest(nest).rstrip("\n") for nest in region.nests)]) + "\n"


def _buffer(spec: BufferSpec) -> str:
    shape, strides = (", ".join(map(str, numbers)) for numbers in (spec.shape, spec.strides))
    return f"{spec.name}: {dtype_name(spec.dtype)}[{shape}] strides ({strides})"


def print_nest(nest: Nest) -> str:
    """A nest as loops over its points; each shared value once, under a name; reductions say what they run over."""
    lines = []
    for depth, sym in enumerate(nest.points):
        lines.append(f"{_INDENT * depth}for {sym} in range({sym.size}):")
    margin = _INDENT * len(nest.points)
    if nest.reduced:
        lines.append(f"{margin}# reduced: {', '.join(f'{s} in range({s.size})' for s in nest.reduced)}")
    names = _Names(nest.roots)
    for name, node in names.shared():
        lines.append(f"{margin}{name} = {names.text(node, top=True)}  # {dtype_name(node.dtype)}{_varies(node, nest)}")
    lines += [f"{margin}{_store(store, names)}" for store in nest.stores]
    return "\n".join(lines) + "\n"


def _varies(node: Scalar, nest: Nest) -> str:
    over = [s.name for s in nest.reduced if s in node.symbols()]
    return f", per {', '.join(over)}" if over else ""


def _store(store: Store, names: _Names) -> str:
    operator = {"set": "=", "add": "+=", "sums": "+="}[store.mode]
    return f"{store.buffer}[{_index(store.index, store.indirect, names)}] {operator} {names.text(store.value)}"


def _index(index: Any, indirect: Iterable[tuple[Any, Scalar]], names: _Names) -> str:
    bound = ", ".join(f"{sym} := {names.text(value)}" for sym, value in indirect)
    return f"{index!r}; {bound}" if bound else repr(index)


class _Names:
    """Names for the values worth one: reductions, scans and whatever is used more than once."""

    def __init__(self, roots: tuple[Scalar, ...]) -> None:
        self.order = list(postorder(roots))
        uses = Counter(a for node in self.order for a in node.args) + Counter(roots)
        plain = (Const, IndexValue)
        worth = [n for n in self.order if isinstance(n, Reduce | Scan) or (uses[n] > 1 and not isinstance(n, plain))]
        self.names: dict[Scalar, str] = {node: f"v{i}" for i, node in enumerate(worth)}

    def shared(self) -> list[tuple[str, Scalar]]:
        return [(name, node) for node, name in self.names.items()]

    def text(self, node: Scalar, top: bool = False) -> str:
        """`node` as an expression; by its name, if it has one, unless `top`."""
        if not top and node in self.names:
            return self.names[node]
        match node:
            case Load():
                return f"{node.buffer}[{_index(node.index, node.indirect, self)}]"
            case Op():
                cast = f", {dtype_name(node.dtype)}" if node.name in ("cast", "bitcast") else ""
                return f"{node.name}({', '.join(self.text(a) for a in node.args)}{cast})"
            case Masked():
                return f"({self.text(node.body)} if {self.text(node.cond)} else {self.text(node.other)})"
            case Reduce():
                axes = ", ".join(map(repr, node.axes))
                return f"{node.kind}({', '.join(self.text(o) for o in node.operands)}; over {axes})[{node.output}]"
            case Scan():
                return f"{node.kind}({self.text(node.operand)}; along {node.axis!r})"
        return repr(node)
