"""`fxopt.explain(model, *args)`: what became of a model, graph by graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.capture import private
from fxopt.ir.graph import Phase
from fxopt.journal import RECENT, Journal
from fxopt.report.backends import resolve_backend, unshared
from fxopt.report.render import journal_to_dict, journal_to_text


@dataclass(frozen=True)
class Explanation:
    """Journals of the graphs that one call compiled, in order, and why Dynamo split the model where it did.

    `print(explanation)` shows everything; `to_dict()` is JSON data of the same.
    """

    graphs: tuple[Journal, ...]
    breaks: tuple[str, ...] = field(default=())

    @property
    def kernels(self) -> int:
        """Generated kernels over all graphs."""
        return sum(len(j.kernels) for j in self.graphs)

    @property
    def retreats(self) -> tuple[tuple[str, str], ...]:
        """(what, why) of everything that runs as ATen although fxopt should have generated code for it."""
        return tuple(r for j in self.graphs for r in j.retreats)

    def to_dict(self) -> dict[str, Any]:
        """JSON data: graphs (kernels, library calls, retreats, passes, seconds, notes) and graph breaks."""
        return {"graphs": [journal_to_dict(j) for j in self.graphs], "graph_breaks": list(self.breaks)}

    def __str__(self) -> str:
        if not self.graphs:
            return "fxopt compiled no graph: the call ran nothing that torch.compile could capture."
        library = sum(len(j.library) for j in self.graphs)
        graphs = sum(_is_graph(j) for j in self.graphs)
        head = f"{graphs} graph(s): {self.kernels} generated kernels, {library} library calls"
        head += f", {len(self.retreats)} retreats to ATen"
        lines = [head, *(f"graph break: {reason}" for reason in self.breaks)]
        return "\n\n".join(["\n".join(lines), *(journal_to_text(j) for j in self.graphs)])


@contextmanager
def journals() -> Iterator[list[Journal]]:
    """Collects into the yielded list, when the block ends, the journals of compilations that happened in it."""
    before = list(RECENT)  # kept alive, so that identities stay distinct
    known = {id(j) for j in before}
    found: list[Journal] = []
    try:
        yield found
    finally:
        found += [j for j in RECENT if id(j) not in known]


@contextmanager
def graph_breaks() -> Iterator[list[str]]:
    """Collects into the yielded list, when the block ends, why Dynamo split what was compiled in it."""
    before = private.graph_breaks()
    found: list[str] = []
    try:
        yield found
    finally:
        found += ["; ".join(_paragraph(reason)) for reason in private.graph_breaks() - before]


def explain(
    model: Callable[..., Any], /, *args: Any, fxopt_options: dict[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """Compile `model` (a module or function) afresh, run it once on the arguments and tell what was done.

    When an output requires grad, the backward is compiled and run too; no `.grad` is touched. `fxopt_options` are the
    `options=` of torch.compile. Dynamo's caches are reset, as torch's own explain does, so that nothing is missing from the
    report: functions compiled earlier compile again when next called (from fxopt's disk cache). Errors of the model itself
    are raised as they are; TypeError for what cannot be called.
    """
    if not callable(model):
        raise TypeError(f"fxopt.explain takes a module or function and its arguments, not {type(model).__name__!r}")
    original = getattr(model, "_orig_mod", model)
    torch.compiler.reset()
    compiled = torch.compile(unshared(original), backend=resolve_backend("fxopt"), options=fxopt_options)
    with journals() as found, graph_breaks() as breaks:
        outputs = compiled(*args, **kwargs)
        _run_backward(original, (args, kwargs), outputs)
    return Explanation(tuple(j for j in found if _says_something(j)), tuple(breaks))


def _is_graph(journal: Journal) -> bool:
    """Whether it records a compiled graph (they are named after their phase) rather than what came before autograd."""
    return journal.graph.endswith(tuple(phase.value for phase in Phase))


def _says_something(journal: Journal) -> bool:
    return _is_graph(journal) or bool(journal.retreats or journal.notes or any(count for _, count, _ in journal.passes))


def _run_backward(model: Callable[..., Any], inputs: Any, outputs: Any) -> None:
    tensors = [t for t in _tensors(outputs) if t.requires_grad]
    leaves = [t for t in _tensors(inputs) if t.requires_grad]
    if isinstance(model, torch.nn.Module):
        leaves += [p for p in model.parameters() if p.requires_grad]
    if tensors and leaves:
        torch.autograd.grad(tensors, leaves, [torch.ones_like(t) for t in tensors], allow_unused=True)


def _tensors(tree: Any) -> list[torch.Tensor]:
    leaves: list[Any] = pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _paragraph(message: str) -> list[str]:
    """The first lines of a Dynamo message, up to the first empty line: what it could not trace, and where."""
    lines = message.strip().splitlines()
    end = next((i for i, line in enumerate(lines) if not line.strip()), len(lines))
    return [line.strip() for line in lines[:end]]
