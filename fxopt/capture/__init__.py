"""From a Dynamo graph to `ir.graph.Graph`s: autograd, decompositions, normal form, roles. Private torch APIs live here."""

from fxopt.capture.freeze import refreeze

__all__ = ["refreeze"]
