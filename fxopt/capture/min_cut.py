"""Minimum cuts, for torch's partitioner: what networkx computes, in a tenth of the time."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import networkx


def minimum_cut(graph: networkx.DiGraph[str], source: str, sink: str) -> tuple[float, tuple[set[str], set[str]]]:
    """(a minimum cut's capacity, the nodes on the source's and on the sink's side), as `networkx.minimum_cut` gives them.

    Of all minimum cuts it is the one nearest to the sink, which does not depend on the algorithm: the sink's side are the
    nodes from which a maximum flow leaves a way to it. Edges without a "capacity" have room for everything. Raises
    NetworkXUnbounded where a path of such edges leads from `source` to `sink`.

    This is Dinic's algorithm on lists. Graphs of models need few of its rounds (ten in ResNet-50's training step).
    Capacities are exact integers, since a float that is off by a rounding would be a way that is not there.
    """
    return _Flow(graph, source, sink).cut()


class _Flow:
    """Nodes and arcs are numbers; arc `a ^ 1` is arc `a` backwards."""

    def __init__(self, graph: networkx.DiGraph[str], source: str, sink: str) -> None:
        self.names = list(graph)
        number = {name: k for k, name in enumerate(self.names)}
        self.source, self.sink = number[source], number[sink]
        self.arcs: list[list[int]] = [[] for _ in self.names]
        self.heads: list[int] = []
        self.room: list[float] = []  # integers, but for those that are infinite
        edges = [(number[u], number[v], capacity) for u, v, capacity in graph.edges(data="capacity", default=math.inf)]
        self.unit = max((_ratio(c)[1] for *_, c in edges if c != math.inf), default=1)
        for tail, head, capacity in edges:
            self.arcs[tail].append(len(self.heads))
            self.arcs[head].append(len(self.heads) + 1)
            self.heads += [head, tail]
            self.room += [_times(capacity, self.unit), 0]

    def cut(self) -> tuple[float, tuple[set[str], set[str]]]:
        value: float = 0
        while (distances := self._distances())[self.source] >= 0:
            value += self._push(distances)
        near = {name for name, distance in zip(self.names, distances, strict=True) if distance >= 0}
        return value / self.unit, (set(self.names) - near, near)

    def _distances(self) -> list[int]:
        """How many arcs with room lead from each node to the sink; -1 where no way does."""
        arcs, heads, room = self.arcs, self.heads, self.room
        distances = [-1] * len(self.names)
        distances[self.sink] = 0
        queue = deque([self.sink])
        while queue:
            node = queue.popleft()
            for arc in arcs[node]:
                before = heads[arc]
                if distances[before] < 0 and room[arc ^ 1]:
                    distances[before] = distances[node] + 1
                    queue.append(before)
        return distances

    def _push(self, distances: list[int]) -> float:
        """Fill the shortest ways until none of their length is left; what they took. Changes `distances`."""
        arcs, heads, room = self.arcs, self.heads, self.room
        next_arc = [0] * len(self.names)
        path, node = list[int](), self.source
        taken: float = 0
        while True:
            if node == self.sink:
                flow, node = self._fill(path)
                taken += flow
                continue
            own, place, wanted = arcs[node], next_arc[node], distances[node] - 1
            while place < len(own) and not (room[own[place]] and distances[heads[own[place]]] == wanted):
                place += 1
            next_arc[node] = place
            if place < len(own):
                path.append(own[place])
                node = heads[own[place]]
            elif path:  # a dead end
                distances[node] = -1
                node = heads[path.pop() ^ 1]
            else:
                return taken

    def _fill(self, path: list[int]) -> tuple[float, int]:
        """Send along `path` what it takes, and shorten it to the first arc that is full then: (how much, the node there)."""
        heads, room = self.heads, self.room
        flow = min(room[arc] for arc in path)
        if flow == math.inf:
            raise networkx.NetworkXUnbounded("Infinite capacity path, flow unbounded above.")
        full = len(path)
        for place, arc in reversed(list(enumerate(path))):
            room[arc] -= flow
            room[arc ^ 1] += flow
            if not room[arc]:
                full = place
        node = heads[path[full] ^ 1]
        del path[full:]
        return flow, node


def _times(capacity: Any, unit: int) -> float:
    """`capacity` in units of 1 / `unit`, exactly."""
    if capacity == math.inf:
        return math.inf
    numerator, denominator = _ratio(capacity)
    return numerator * (unit // denominator)


def _ratio(capacity: Any) -> tuple[int, int]:
    """Numerator and denominator, a power of two."""
    return (capacity, 1) if isinstance(capacity, int) else float(capacity).as_integer_ratio()
