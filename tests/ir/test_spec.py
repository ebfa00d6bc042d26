"""Each rule of the graph spec, broken once: the error must name the rule, the node and the pass."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx

from fxopt.errors import GraphSpecError
from fxopt.ir import ops, spec
from fxopt.ir.graph import Graph, Input, Phase, Role
from tests.passes.graphs import capture

aten = torch.ops.aten


def legal() -> Graph:
    return capture(
        lambda x, w: (torch.var_mean(x @ w, 1)[1].exp(), x.view(-1), None), (torch.randn(3, 4), torch.randn(4, 4))
    )


def node(graph: Graph, name: str) -> fx.Node:
    return next(n for n in graph.gm.graph.nodes if n.op == "call_function" and ops.name_of(n.target) == name)


def _unknown_target(graph: Graph) -> None:
    node(graph, "exp").target = torch.exp


def _method(graph: Graph) -> None:
    call = node(graph, "exp")
    call.op, call.target = "call_method", "exp"


def _order(graph: Graph) -> None:
    node(graph, "exp").append(node(graph, "mm"))


def _no_value(graph: Graph) -> None:
    del node(graph, "exp").meta["val"]


def _odd_value(graph: Graph) -> None:
    node(graph, "exp").meta["val"] = object()


def _shape(graph: Graph) -> None:
    call = node(graph, "exp")
    call.meta["val"] = call.meta["val"].new_empty(4)


def _dtype(graph: Graph) -> None:
    call = node(graph, "exp")
    call.meta["val"] = call.meta["val"].double()


def _strides(graph: Graph) -> None:
    call = node(graph, "mm")
    call.meta["val"] = call.meta["val"].new_empty(4, 3).t()


def _arity(graph: Graph) -> None:
    call = node(graph, "var_mean")
    call.meta["val"] = call.meta["val"][:1]


def _inputs(graph: Graph) -> None:
    graph.inputs.pop()


def _input_name(graph: Graph) -> None:
    graph.inputs[0].name = "other"


def _value_of_user(graph: Graph) -> None:
    graph.inputs[0].value = torch.randn(3, 4)


def _late_placeholder(graph: Graph) -> None:
    with graph.gm.graph.inserting_before(node(graph, "exp")):
        late = graph.gm.graph.placeholder("late")
    late.meta["val"] = torch.empty(1)
    graph.inputs.append(Input("late", Role.USER))


def _in_place(graph: Graph) -> None:
    node(graph, "exp").target = aten.exp_.default


def _copy_in_the_middle(graph: Graph) -> None:
    call, source = node(graph, "exp"), graph.gm.graph.find_nodes(op="placeholder")[0]
    with graph.gm.graph.inserting_before(call):
        graph.gm.graph.call_function(aten.copy_.default, (source, source)).meta["val"] = source.meta["val"]


def _copy_into_a_value(graph: Graph) -> None:
    call = node(graph, "exp")
    with graph.gm.graph.inserting_before(graph.gm.graph.output_node()):
        graph.gm.graph.call_function(aten.copy_.default, (call, call)).meta["val"] = call.meta["val"]


def _bare_output(graph: Graph) -> None:
    output = graph.gm.graph.output_node()
    output.args = (output.args[0][0],)  # type: ignore[index]


def _saved(graph: Graph) -> None:
    graph.saved = 4


def _missing_attribute(graph: Graph) -> None:
    with graph.gm.graph.inserting_before(node(graph, "exp")):
        graph.gm.graph.create_node("get_attr", "absent")


BROKEN: dict[str, tuple[Callable[[Graph], None], str]] = {
    "a function that is no operator": (_unknown_target, "neither an OpOverload"),
    "a method call": (_method, "op kind call_method"),
    "a use before the definition": (_order, "not defined before its use"),
    "a node without a value": (_no_value, r'no meta\["val"\]'),
    "a value of a strange type": (_odd_value, "is a object"),
    "a wrong shape": (_shape, "stale: shape"),
    "a wrong dtype": (_dtype, "stale: torch.float64"),
    "wrong strides": (_strides, "stale: strides"),
    "a wrong number of results": (_arity, "stale: structure"),
    "an input too few": (_inputs, "2 placeholders but 1 inputs"),
    "a misnamed input": (_input_name, "is called 'other'"),
    "a user input with a value": (_value_of_user, "user input carries a value"),
    "a placeholder in the middle": (_late_placeholder, "placeholders must come first"),
    "a mutation": (_in_place, "only a trailing aten.copy_"),
    "a copy in the middle": (_copy_in_the_middle, "computation after a copy_"),
    "a copy into a value": (_copy_into_a_value, "only a trailing aten.copy_"),
    "an output that is no tuple": (_bare_output, "not a tuple or list"),
    "more saved activations than outputs": (_saved, "4 saved activations but 3 outputs"),
    "an attribute that is not there": (_missing_attribute, "absent does not exist"),
}


def test_a_legal_graph_passes() -> None:
    spec.check(legal(), None)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named(name: str) -> None:
    damage, message = BROKEN[name]
    graph = legal()
    damage(graph)
    with pytest.raises(GraphSpecError, match=rf"after pass 'some_pass'\).*{message}"):
        spec.check(graph, "some_pass")


def test_values_are_not_propagated_on_request() -> None:
    graph = legal()
    _dtype(graph)
    spec.check(graph, None, propagate=False)


def test_strides_of_size_one_dimensions_are_free() -> None:
    graph = capture(lambda x: x.exp(), (torch.randn(1, 4),))
    call = node(graph, "exp")
    call.meta["val"] = call.meta["val"].as_strided((1, 4), (99, 1))
    spec.check(graph, None)


def test_symbolic_sizes_are_legal() -> None:
    graph = capture(lambda x: x.view(x.shape[0] * 2, -1).exp() + x.shape[1], (torch.randn(4, 6),), dynamic=True)
    assert any(ops.category(n.target) == "symbolic" for n in graph.gm.graph.nodes if n.op == "call_function")
    spec.check(graph, None)


def test_higher_order_operators_are_legal() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.exp(), lambda y: y.sin(), (x,))

    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(lambda x: (function(x),), tracing_mode="fake")(torch.randn(3))
    spec.check(Graph(gm, [Input("x_1", Role.USER)], Phase.INFERENCE, "test"), None)


def test_an_early_graph_may_hold_what_dynamo_writes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.add, (graph.call_method("relu_", (x,)), 1)))
    spec.check(Graph(fx.GraphModule({}, graph), [Input("x", Role.USER)], Phase.EARLY, "early"), None)


def test_no_name_is_in_two_categories() -> None:
    seen: dict[str, str] = {}
    for category, names in ops.CATEGORIES.items():
        assert not seen.keys() & names, (category, seen.keys() & names)
        seen.update(dict.fromkeys(names, category))


@pytest.mark.parametrize("category", ops.CATEGORIES)
def test_every_listed_name_is_an_operator(category: str) -> None:
    fxopt_only = {"seed"}
    missing = [n for n in ops.CATEGORIES[category] - fxopt_only if not hasattr(aten, n)]
    assert not missing


@pytest.mark.parametrize(
    ("target", "category", "view", "pure"),
    [
        (aten.add.Tensor, "pointwise", False, True),
        (aten.sum.dim_IntList, "reduction", False, True),
        (aten.view.default, "view", True, True),
        (aten._unsafe_view.default, "view", True, True),
        (aten.mm.default, "contraction", False, True),
        (aten.rand.default, "random", False, False),
        (aten.copy_.default, "library", True, False),
        (aten._assert_async.msg, "library", False, False),
        (operator.getitem, "getitem", True, True),
        (operator.add, "symbolic", False, True),
        (aten.sym_size.int, "symbolic", False, True),
        (torch.ops.higher_order.cond, "higher_order", True, False),
        (aten.max_pool2d_with_indices.default, "library", False, True),
    ],
)
def test_facts_about_operators(target: object, category: str, view: bool, pure: bool) -> None:
    assert (ops.category(target), ops.is_view(target), ops.is_pure(target)) == (category, view, pure)
