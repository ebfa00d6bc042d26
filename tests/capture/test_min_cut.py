"""Minimum cuts are networkx's, whatever the algorithm."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import networkx
import pytest
import torch

from fxopt.capture import min_cut
from fxopt.capture.min_cut import minimum_cut


def graph_of(edges: list[tuple[str, str, Any]]) -> networkx.DiGraph[str]:
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_nodes_from(["source", "sink"])
    for tail, head, capacity in edges:
        graph.add_edge(tail, head, **({} if capacity is None else {"capacity": capacity}))
    return graph


def random_graph(seed: int) -> networkx.DiGraph[str]:
    """Like a partitioner's: nodes with a weight, whole or not, edges of infinite capacity between them; ties are likely."""
    draw = random.Random(seed)
    count = draw.randint(2, 30)
    edges: list[tuple[str, str, Any]] = []
    for k in range(count):
        weight = draw.choice([0, 1, 1, 2, 3.0, 4 * 1.1 ** draw.randint(0, 30), 0.1, math.inf])
        edges.append((f"{k}_in", f"{k}_out", weight))
        users = [j for j in range(count) if draw.random() < 0.15]
        edges += [(f"{k}_out", f"{j}_in", draw.choice([math.inf, math.inf, None, 2])) for j in users]
        if draw.random() < 0.25:
            edges.append(("source", f"{k}_in", math.inf))
        if draw.random() < 0.25:
            edges.append((f"{k}_{draw.choice(['in', 'out'])}", "sink", math.inf))
    return graph_of(edges)


def test_the_cut_is_networkx_own() -> None:
    unbounded = 0
    for seed in range(400):
        graph = random_graph(seed)
        try:
            value, (near_source, near_sink) = networkx.minimum_cut(graph, "source", "sink")
        except networkx.NetworkXUnbounded:
            unbounded += 1
            with pytest.raises(networkx.NetworkXUnbounded):
                minimum_cut(graph, "source", "sink")
            continue
        own, (own_source, own_sink) = minimum_cut(graph, "source", "sink")
        assert own == pytest.approx(value) and own_source | own_sink == set(graph) and not own_source & own_sink
        edges = graph.edges(data="capacity", default=math.inf)
        assert sum(c for u, v, c in edges if u in own_source and v in own_sink) == pytest.approx(value)
        assert own_sink <= near_sink, "the nearest to the sink; networkx may take a way that is left by rounding"
        if all(c == math.inf or float(c).is_integer() for *_, c in edges):
            assert (own_source, own_sink) == (near_source, near_sink)
    assert 20 < unbounded < 380


def test_sums_of_floats_leave_no_way() -> None:
    """0.1 + 0.2 fills 0.3 but for a rounding; in exact numbers it does not, and the cut is where networkx would have it."""
    graph = graph_of([("source", "a", 0.1), ("source", "b", 0.2), ("a", "c", 1), ("b", "c", 1), ("c", "sink", 0.3)])
    value, (_, near_sink) = minimum_cut(graph, "source", "sink")
    assert value == 0.3 and near_sink == {"sink"}


def test_the_partitioner_uses_it_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts: list[str] = []
    theirs, graph = networkx.minimum_cut, graph_of([("source", "sink", 3)])

    def spy(*args: Any) -> Any:
        cuts.append("ours")
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: networkx.minimum_cut(graph, "source", "sink", capacity="capacity")).result()[0] == 3
        return minimum_cut(*args)

    monkeypatch.setattr(min_cut, "minimum_cut", spy)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.Linear(4, 4))
    torch.compile(model, backend="fxopt")(torch.ones(2, 4)).sum().backward()
    assert cuts == ["ours"] and networkx.minimum_cut is theirs
