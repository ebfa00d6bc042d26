"""Frozen graphs: parameters and unmutated buffers as constants of an inference graph (decision 13, opt-in).

Every call compares the address and version counter of each frozen tensor with those at freezing; a difference compiles the
graph again with the new values, and a graph whose weights keep changing goes back to taking them as inputs. Writes through
`.data` move neither address nor version: they are the one change that is not noticed, and what `refreeze` is for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.capture.private import plain_input_index
from fxopt.capture.roles import InputFacts, written_inputs

MAX_REFREEZES = 3
"""Recompilations because weights changed, per graph, before it is left unfrozen."""

Runner = Callable[[list[Any]], Sequence[Any]]
Build = Callable[[dict[str, torch.Tensor]], tuple[Runner, bool]]

_live: weakref.WeakSet[FrozenFunction] = weakref.WeakSet()


def freezable(gm: fx.GraphModule, facts: InputFacts) -> dict[str, tuple[int, torch.Tensor]]:
    """Placeholder name to (position, value) of every input whose value may become a constant.

    That is: static, a real tensor, written neither by this graph nor through another input that shares its storage, and not
    itself an output.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    written = written_inputs(gm)
    shared = {_storage(facts.tensors[i]) for n in written if (i := plain_input_index(n)) is not None}
    out: dict[str, tuple[int, torch.Tensor]] = {}
    for position, node in enumerate(placeholders):
        value = None if node in written else facts.frozen_value(node)
        if value is None or _storage(value) in shared or any(user.op == "output" for user in node.users):
            continue
        out[node.name] = (position, value)
    return out


def _storage(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else -1


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class FrozenFunction:
    """Runs a graph compiled with some inputs as constants, watching those inputs.

    `build(constants)` compiles: it returns a boxed function, and whether that function expects the constants to be left out
    of its arguments (a retreat takes every input). Called, like every compiled graph, with all inputs in one list.
    """

    _boxed_call = True

    def __init__(self, build: Build, frozen: dict[str, tuple[int, torch.Tensor]], arity: int) -> None:
        self._build, self._arity = build, arity
        self._positions = {name: position for name, (position, _) in frozen.items()}
        self._refreezes = 0
        self._stale = False
        self._storages: set[int] = set()
        self._kept: list[int] | None = None  # positions passed on; None: all of them
        self._freeze([tensor for _, tensor in frozen.values()])
        _live.add(self)

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self._watched and (self._stale or self._changed(args)):
            self._refreeze(args)
        if self._kept is not None:
            kept = [args[i] for i in self._kept]
            args.clear()
            args = kept
        return self._run(args)

    def mark_stale(self, storages: set[int]) -> bool:
        """Have the next call freeze anew if a frozen tensor lives in one of `storages`; returns whether it does."""
        affected = not storages.isdisjoint(self._storages)
        if affected:
            self._stale, self._refreezes = True, 0
            self._watched = list(self._positions.values())
        return affected

    def _changed(self, args: list[Any]) -> bool:
        watched = self._watched
        return [args[i].data_ptr() for i in watched] != self._pointers or [
            _version(args[i]) for i in watched
        ] != self._versions

    def _refreeze(self, args: list[Any]) -> None:
        self._stale = False
        self._refreezes += 1
        if self._refreezes <= MAX_REFREEZES:
            self._freeze([args[i] for i in self._positions.values()])
        else:
            self._watched, self._kept = [], None
            self._run, _ = self._build({})

    def _freeze(self, tensors: Sequence[torch.Tensor]) -> None:
        self._watched = list(self._positions.values())
        self._pointers = [t.data_ptr() for t in tensors]
        self._versions = [_version(t) for t in tensors]
        self._storages = {_storage(t) for t in tensors}
        self._run, left_out = self._build(dict(zip(self._positions, tensors, strict=True)))
        frozen = set(self._watched) if left_out else set()
        self._kept = [i for i in range(self._arity) if i not in frozen] if left_out else None


def refreeze(model: torch.nn.Module) -> int:
    """Have every frozen graph that uses a parameter or buffer of `model` read its weights again at its next call.

    Needed after writes that torch does not count (through `.data`). Returns how many frozen graphs are affected.
    """
    tensors = [*model.parameters(), *model.buffers()]
    storages = {_storage(t) for t in tensors if t.numel()}
    return sum(function.mark_stale(storages) for function in list(_live))
