"""The normal form on small graphs: identities, assertions, literals, writes, names."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.capture.normalize import copy_module, normalize
from fxopt.capture.roles import InputFacts, qualified_name
from fxopt.ir import spec
from fxopt.ir.graph import Phase, Role

aten = torch.ops.aten


def traced(fn, *args):
    gm = make_fx(fn, tracing_mode="fake")(*args)
    output = gm.graph.output_node()
    if not isinstance(output.args[0], tuple | list):
        output.args = ((output.args[0],),)
        gm.recompile()
    return gm


def normalized(fn, *args):
    gm = traced(fn, *args)
    graph = normalize(gm, InputFacts(args), Phase.INFERENCE, "g")
    spec.check(graph, None)
    return graph


def targets(graph):
    return [n.target for n in graph.gm.graph.nodes if n.op == "call_function"]


def test_identities_inside_disappear():
    graph = normalized(lambda x: aten.alias(aten.detach(x.sin())).cos(), torch.ones(2))
    assert targets(graph) == [aten.sin.default, aten.cos.default]


def test_identities_at_an_output_stay_as_one_alias():
    graph = normalized(lambda x: aten.detach(x), torch.ones(2))
    assert targets(graph) == [aten.alias.default]


def test_the_given_module_is_untouched():
    gm = traced(lambda x: aten.detach(x.sin()).cos(), torch.ones(2))
    before = str(gm.graph)
    normalize(gm, InputFacts([]), Phase.INFERENCE, "g")
    assert str(gm.graph) == before
    assert str(copy_module(gm).graph) == before


def test_literals_become_constant_inputs():
    graph = normalized(lambda x: x + torch.tensor([1.0, 2.0]), torch.ones(2))
    assert [i.role for i in graph.inputs] == [Role.USER, Role.CONSTANT]
    assert graph.inputs[1].value.tolist() == [1.0, 2.0]
    assert [n.op for n in graph.gm.graph.nodes][:2] == ["placeholder", "placeholder"]


def test_literals_without_any_input():
    graph = normalized(lambda: torch.tensor([1, 2]) * 3)
    assert [i.role for i in graph.inputs] == [Role.CONSTANT]


def test_writes_come_last_and_later_reads_see_the_new_value():
    def fn(x):
        y = x.sin()
        aten.copy_(x, y)
        return x.cos()

    graph = normalized(fn, torch.ones(2))
    assert targets(graph) == [aten.sin.default, aten.cos.default, aten.copy_.default]
    cos = graph.gm.graph.find_nodes(op="call_function", target=aten.cos.default)[0]
    assert cos.args[0].target is aten.sin.default
    assert graph.inputs[0].role is Role.STATE


def test_every_node_has_module_and_value():
    graph = normalized(lambda x: aten.max.dim(x, 0)[0], torch.ones(2, 2))
    for node in graph.gm.graph.nodes:
        assert node.meta["module"] == ""
        assert node.op == "output" or "val" in node.meta


def test_constants_by_name():
    gm = traced(lambda x, w: x @ w, torch.ones(2, 2), torch.ones(2, 2))
    second = gm.graph.find_nodes(op="placeholder", sort=True)[1].name
    value = torch.eye(2)
    graph = normalize(gm, InputFacts([]), Phase.INFERENCE, "g", constants={second: value})
    assert [i.role for i in graph.inputs] == [Role.USER, Role.CONSTANT]
    assert graph.inputs[1].value.data_ptr() == value.data_ptr()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].encoder.layers.0.fc", "encoder.layers.0.fc"),
        ("L['self'].encoder.layers[0].fc", "encoder.layers.0.fc"),
        ("L['self']._modules['encoder']._modules['layers']._modules['0']", "encoder.layers.0"),
        ("getattr(L['self'].layers, '0')", "layers.0"),
        ("getattr(getattr(L['s'].a, '1').b, '2')", "a.1.b.2"),
        ("L['model']", ""),
        ('G["net"].fc', "fc"),
        ("self.fc", "fc"),
        ("", ""),
    ],
)
def test_qualified_names(path, name):
    assert qualified_name(path) == name
