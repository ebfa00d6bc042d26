"""Frozen graphs: parameters and unmutated buffers as constants of an inference graph, for those who ask.

Every call compares the frozen tensors with what they were at freezing (`Watch`); a difference compiles the graph again with
the new values, and a graph whose weights keep changing goes back to taking them as inputs. Writes through `.data` are not
counted by torch: they are the one change that goes unnoticed, and what `refreeze` is for.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxopt.capture.roles import InputFacts, written_inputs
from fxopt.journal import warn_once

MAX_REFREEZES = 3
"""Recompilations because weights changed, per graph, before it is left unfrozen."""

IN_TRAINING = (
    "options={'freeze': True} and 'precision' do nothing for a graph that autograd records, as here: model.eval() does not"
    " switch that off. Call the model under torch.no_grad() or torch.inference_mode()"
)
THAWED = (
    f"weights changed more than {MAX_REFREEZES} times, and each time the graph was compiled again: they are no longer frozen"
    " but inputs. fxopt.refreeze(model) freezes them again"
)

Runner = Callable[[list[Any]], Sequence[Any]]
Build = Callable[[dict[str, torch.Tensor], Sequence[str]], tuple[Runner, bool]]


class Watch:
    """Recognises tensors: the same objects, in the same memory, at the same version as when the watch was set up.

    An identity or an address says something only while what it belongs to lives: another tensor may have it afterwards. So
    the tensors and their storages are watched for their end, by weak references. A version counts for one tensor only.
    """

    def __init__(self, tensors: dict[int, torch.Tensor]) -> None:
        """`tensors` by their positions among a call's arguments."""
        self._lost: list[Any] = []  # the references whose object died
        owners = [owner for t in tensors.values() for owner in (t, t.untyped_storage())]
        self._references = [weakref.ref(owner, self._lost.append) for owner in owners]
        self._positions = list(tensors)
        self._identities = [id(t) for t in tensors.values()]
        self._addresses = [t.data_ptr() for t in tensors.values()]
        self._versions = [t._version for t in tensors.values()]

    def recognises(self, args: Sequence[Any]) -> bool:
        """Whether nothing changed in `args`. Every call of a frozen graph waits for this: 0.1 to 0.3 us a tensor."""
        if self._lost:
            return False
        tensors = [args[i] for i in self._positions]
        return (
            [id(t) for t in tensors] == self._identities
            and [t.data_ptr() for t in tensors] == self._addresses
            and [t._version for t in tensors] == self._versions
        )


@dataclass(frozen=True)
class Candidates:
    """The inputs of one graph that may become constants: `names` gives their placeholders, by position.

    They are static, written neither by this graph nor through another of its inputs, and not themselves outputs. `written`
    are the positions that the graph writes, `arity` is how many inputs there are.
    """

    names: dict[int, str]
    written: tuple[int, ...]
    arity: int

    @staticmethod
    def of(gm: fx.GraphModule, facts: InputFacts) -> Candidates:
        placeholders = gm.graph.find_nodes(op="placeholder")
        written = written_inputs(gm)
        names = {
            i: node.name
            for i, node in enumerate(placeholders)
            if node.name in facts.static and node not in written and not any(u.op == "output" for u in node.users)
        }
        return Candidates(names, tuple(i for i, n in enumerate(placeholders) if n in written), len(placeholders))

    def constants(self, args: Sequence[Any]) -> tuple[dict[int, torch.Tensor], list[str]]:
        """Those of `args` that can be constants, by position; and, for people, why the other candidates cannot."""
        written = {_address(args[i]) for i in self.written} - {None}
        constants: dict[int, torch.Tensor] = {}
        reasons: Counter[str] = Counter()
        for position in self.names:
            value = args[position]
            obstacle = _obstacle(value) or ("memory that the graph writes" if _address(value) in written else None)
            if obstacle is None:
                constants[position] = value
            else:
                reasons[obstacle] += 1
        notes = [f"{n} weight{'s' * (n > 1)} not frozen: {obstacle}" for obstacle, n in reasons.items()]
        return constants, notes

    def storages(self, args: Sequence[Any]) -> frozenset[int]:
        """Addresses of the storages of all candidates."""
        return frozenset(a for i in self.names if (a := _address(args[i])) is not None)


def _obstacle(value: Any) -> str | None:
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
        return "no plain tensor in memory"
    if value.is_inference():
        return "an inference tensor, whose changes torch does not count (make the model outside torch.inference_mode())"
    return None


def _address(value: Any) -> int | None:
    """Of the storage; None where there is none, or an empty one."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return value.untyped_storage().data_ptr() or None


@dataclass(frozen=True)
class _State:
    """One build of the graph. `watch` says for which inputs it holds, `kept` are the positions passed on (None: all).

    `storages` hold the weights it was built for, frozen or not. `stale` asks for another build whatever `watch` says.
    """

    run: Runner
    kept: list[int] | None
    watch: Watch
    storages: frozenset[int]
    refreezes: int = 0
    stale: bool = False

    def fits(self, args: Sequence[Any]) -> bool:
        return not self.stale and self.watch.recognises(args)


class FrozenFunction:
    """Runs a graph compiled with some inputs as constants, watching those inputs.

    `build(constants, notes)` compiles, and writes the notes in its journal: it returns a boxed function, and whether that
    function expects the constants to be left out of its arguments (a retreat takes every input, and nothing is frozen then).
    `args` are the values to begin with. Called, like every compiled graph, with all inputs in one list.

    A call reads `_state` once. A new state is published whole, when its build is done: a build that fails or is interrupted
    changes nothing, so the next call tries again. Calls in other threads wait for the build, unless the old state fits them.
    """

    _boxed_call = True

    def __init__(self, build: Build, candidates: Candidates, args: Sequence[Any]) -> None:
        self._build, self._candidates = build, candidates
        self._lock = threading.RLock()  # held to replace _state; entered again when a signal handler calls the model
        self._state = self._built(args, 0)
        with _live_lock:
            _live.add(self)

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        state = self._state
        if not state.fits(args):
            state = self._renewed(args)
        if state.kept is not None:
            kept = [args[i] for i in state.kept]
            args.clear()
            args = kept
        return state.run(args)

    def mark_stale(self, storages: set[int]) -> bool:
        """Have the next call freeze anew if a weight lives in one of `storages`; returns whether it does."""
        with self._lock:
            affected = not storages.isdisjoint(self._state.storages)
            if affected:
                self._state = replace(self._state, stale=True, refreezes=0)
        return affected

    def _renewed(self, args: list[Any]) -> _State:
        with self._lock:
            state = self._state
            if state.fits(args):  # another thread was faster
                return state
            state = self._built(args, state.refreezes if state.stale else state.refreezes + 1)
            self._state = state
        if state.refreezes > MAX_REFREEZES:
            warn_once("thawed", THAWED)
        return state

    def _built(self, args: Sequence[Any], refreezes: int) -> _State:
        constants, notes = self._candidates.constants(args)
        if refreezes > MAX_REFREEZES:
            constants, notes = {}, [THAWED]
        watch = Watch(constants)  # before their values are read: a write meanwhile shows at the next call
        names = self._candidates.names
        run, left_out = self._build({names[i]: value for i, value in constants.items()}, notes)
        storages = self._candidates.storages(args)
        if not left_out or not constants:
            return _State(run, None, Watch({}), storages, refreezes)
        kept = [i for i in range(self._candidates.arity) if i not in constants]
        return _State(run, kept, watch, storages, refreezes)


_live: weakref.WeakSet[FrozenFunction] = weakref.WeakSet()
_live_lock = threading.RLock()


def refreeze(model: torch.nn.Module) -> int:
    """Have every frozen graph that uses a parameter or buffer of `model` read its weights again at its next call.

    Needed after writes that torch does not count (through `.data`), and to freeze again a graph that is no longer frozen as
    its weights kept changing. Returns how many graphs are affected. Waits for one that another thread is compiling. Raises
    TypeError for what is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fxopt.refreeze takes the module whose weights changed, not {type(model).__name__!r}")
    storages = {a for t in (*model.parameters(), *model.buffers()) if (a := _address(t)) is not None}
    with _live_lock:
        functions = list(_live)
    return sum(function.mark_stale(storages) for function in functions)
