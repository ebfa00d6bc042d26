"""From a graph of ATen ops to a schedule of regions, library calls and views."""

from fxopt.lower.lowering import Lowered, lower_graph

__all__ = ["Lowered", "lower_graph"]
