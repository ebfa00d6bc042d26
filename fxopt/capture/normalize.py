"""The normal form: what AOTAutograd leaves becomes an `ir.graph.Graph`.

- `detach`, `alias`, `lift_fresh` disappear where only memory identity depends on them (an output stays a tensor of its own);
- range assertions that only inform the tracer disappear, as do runtime assertions that hold already;
- tensor attributes (literals in the user's code) become CONSTANT inputs, after the real ones; subgraphs stay attributes;
- writes into inputs (`aten.copy_`) come last;
- every node has meta["val"] and meta["module"]; every input a role.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from fxopt.capture.private import lazily_compiled, regenerated_outputs
from fxopt.capture.roles import InputFacts, module_of, written_inputs
from fxopt.capture.symbols import to_int
from fxopt.ir.graph import Graph, Input, Phase, Role

aten = torch.ops.aten

IDENTITIES = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift.default})
"""Ops that return their argument's memory unchanged."""

TRACER_ONLY = frozenset(
    {
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        aten._assert_tensor_metadata.default,
    }
)
"""Assertions about what tracing has established; nothing is left to check at run time."""


def normalize(
    gm: fx.GraphModule,
    facts: InputFacts,
    phase: Phase,
    name: str,
    *,
    saved: int = 0,
    constants: dict[str, torch.Tensor] | None = None,
) -> Graph:
    """A Graph over a copy of `gm`, which stays as it was (a retreat runs it).

    `constants` maps names of placeholders to their frozen values: those inputs are CONSTANT. `saved` counts the trailing
    outputs of a forward graph that are activations for the backward. `notes["static"]` names inputs with fixed addresses;
    `notes["views of inputs"]` are positions of outputs in whose place the caller gets a view of an input.
    """
    copy = copy_module(gm)
    written = {n.name for n in written_inputs(gm)}
    frozen = constants or {}
    inputs = []
    for node in copy.graph.find_nodes(op="placeholder"):
        value = frozen.get(node.name)
        role = Role.CONSTANT if value is not None else facts.role(node, _named(copy, written))
        inputs.append(Input(node.name, role, None if value is None else value.detach()))
    _drop_identities(copy.graph)
    _drop_assertions(copy.graph)
    _sink_copies(copy.graph)
    inputs += _lift_attributes(copy)
    _complete_meta(copy.graph)
    copy.graph.lint()
    copy.recompile()
    static = [i.name for i in inputs if i.name in facts.static]
    notes = {"static": static, "views of inputs": sorted(() if phase is Phase.BACKWARD else regenerated_outputs())}
    return Graph(copy, inputs, phase, name, to_int=to_int, saved=saved, notes=notes)


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with a graph of its own; node names, meta and attributes are kept."""
    return lazily_compiled(gm, copy_graph(gm))


def copy_graph(gm: fx.GraphModule) -> fx.Graph:
    """`gm`'s graph; node names and meta are kept."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    value, original = output
    graph.output(value).meta.update(original.meta)
    return graph


def _named(gm: fx.GraphModule, names: set[str]) -> set[fx.Node]:
    return {n for n in gm.graph.find_nodes(op="placeholder") if n.name in names}


def _drop_identities(graph: fx.Graph) -> None:
    """Remove IDENTITIES unless an output is made of them; a copy of a literal is a clone like any other.

    A graph output that is an alias has to stay a tensor object of its own: autograd marks outputs one by one.
    """
    for node in list(graph.nodes):
        if node.target is aten.lift_fresh_copy.default:
            node.target = aten.clone.default
        if node.op != "call_function" or node.target not in IDENTITIES or not isinstance(node.args[0], fx.Node):
            continue
        for user in list(node.users):
            if user.op != "output":
                user.replace_input_with(node, node.args[0])
        if not node.users:
            graph.erase_node(node)
        else:
            node.target = aten.alias.default


def _sink_copies(graph: fx.Graph) -> None:
    """Writes into inputs come last; what stood after one and read its target (the new value) reads the copied value."""
    written: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.copy_.default:
            written[node.args[0]] = written[node] = node.args[1]
            graph.output_node().replace_input_with(node, node.args[0])
            graph.output_node().prepend(node)
            continue
        for target in [t for t in node.all_input_nodes if t in written]:
            node.replace_input_with(target, written[target])


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.op == "call_function" and (node.target in TRACER_ONLY or _holds(node)) and not node.users:
            graph.erase_node(node)


def _holds(node: fx.Node) -> bool:
    return node.target is aten._assert_scalar.default and node.args[0] is True


def _lift_attributes(gm: fx.GraphModule) -> list[Input]:
    """Turn tensor attributes into placeholders after the last one, and return their inputs."""
    graph, lifted = gm.graph, []
    last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)
    for node in list(graph.find_nodes(op="get_attr")):
        value = operator.attrgetter(str(node.target))(gm)
        if not isinstance(value, torch.Tensor) or _used_by_subgraphs(node):
            continue
        with graph.inserting_before(next(iter(graph.nodes))) if last is None else graph.inserting_after(last):
            last = graph.placeholder(f"constant_{node.name}")
        last.meta = dict(node.meta)
        if "val" not in last.meta:
            last.meta["val"] = _fake(gm, value)
        node.replace_all_uses_with(last)
        graph.erase_node(node)
        lifted.append(Input(last.name, Role.CONSTANT, value.detach()))
    return lifted


def _used_by_subgraphs(node: fx.Node) -> bool:
    return any(isinstance(user.target, torch._ops.HigherOrderOperator) for user in node.users)


def _fake(gm: fx.GraphModule, value: torch.Tensor) -> torch.Tensor:
    mode: Any = detect_fake_mode([n.meta.get("val") for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)])
    if mode is None:
        mode = torch._subclasses.FakeTensorMode()
    return mode.from_tensor(value, static_shapes=True)


def _complete_meta(graph: fx.Graph) -> None:
    """meta["module"] everywhere, and meta["val"] where the tracer left it out but the operands say it."""
    for node in graph.nodes:
        node.meta["module"] = module_of(node)
        if "val" in node.meta or node.op != "call_function":
            continue
        if node.target is operator.getitem:
            node.meta["val"] = node.args[0].meta["val"][node.args[1]]
        elif all("val" in a.meta for a in node.all_input_nodes) and node.users:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
            mode: Any = detect_fake_mode([a.meta["val"] for a in node.all_input_nodes])
            with torch.no_grad(), mode or torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)
