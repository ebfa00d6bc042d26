"""Steps of a plan that may run beside others: on a second stream, within a captured run.

Where a step reads values that were computed independently of each other (a block's result and its shortcut), the smaller
part is a branch: it begins when what it reads is there, and the step that reads both waits for it. What a branch reads and
writes lives until then, in memory of its own, so that nothing beside it is given the same.

Whether that is faster depends on how much of the GPU kernels leave idle, so it is measured when a plan is captured
(`branch_contest.py`), and the results of both runs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.ir.ops import calls_cublas
from fxopt.ir.region import Call, Ref
from fxopt.runtime.lifetimes import only_writes, returns_fresh
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import Launch, Plan, defined, used
from fxopt.runtime.split import Mentions, with_steps

NAME = "branches"
"""What `FXOPT_DISABLE` and `options={"disable": ...}` call it."""
LEAST_BESIDE = 2
"""Steps that run beside a branch: waiting for each other costs about as much as one short kernel."""


@dataclass(frozen=True)
class Branch:
    """The steps numbered `steps` (of those that run something) run beside those between the last that they depend on and the
    step `join`."""

    steps: tuple[int, ...]
    join: int


def branched(plan: Plan) -> Plan | None:
    """`plan` with its branches between calls of the ops `local:fork`, `local:back` and `local:join`; None without any.

    `SideStream` has these ops.
    """
    found = Mentions(plan)
    depends = _dependencies(found)
    branches = [] if depends is None else _branches(found, depends)
    if not branches:
        return None
    assert depends is not None
    order: list[Launch | Call] = []
    inside = {k: branch for branch in branches for k in branch.steps}
    opened = {_begin(branch.steps, depends): branch for branch in branches}
    joined = {branch.join: branch for branch in branches}
    for k, step in enumerate(found.steps):
        if k in opened:
            steps = [found.steps[i] for i in opened[k].steps]
            order += [Call("local:fork", ()), *steps, Call("local:back", ())]
        if k in joined:
            order.append(Call("local:join", tuple(Ref(name) for name in _touched(found, joined[k]))))
        if k not in inside:
            order.append(step)
    return plan_memory(with_steps(plan, order))


def _touched(found: Mentions, branch: Branch) -> list[str]:
    names = (n for k in branch.steps for n in (*used(found.steps[k]), *defined(found.steps[k])))
    return list(dict.fromkeys(found.root.get(n, n) for n in names))


def _dependencies(found: Mentions) -> list[set[int]] | None:
    """For each step those that must have ended before it, but for those that they depend on; None where what a step reads or
    writes is not in sight."""
    out: list[set[int]] = []
    writer: dict[str, int] = {}
    readers: dict[str, list[int]] = {}
    for k, step in enumerate(found.steps):
        if isinstance(step, Call) and (step.effect or not (returns_fresh(step.op) or only_writes(step))):
            return None
        names = {found.root.get(n, n) for n in used(step)}
        written = {found.root.get(n, n) for n in (*step.writes, *defined(step))}
        needs = {writer[n] for n in names | written if n in writer}
        needs.update(r for n in written for r in readers.get(n, ()))
        out.append(needs)
        for n in written:
            writer[n], readers[n] = k, []
        for n in names - written:
            readers.setdefault(n, []).append(k)
    return out


def _branches(found: Mentions, depends: Sequence[set[int]]) -> list[Branch]:
    """Branches one after the other, at most one for each step that joins two."""
    before: list[set[int]] = []
    out: list[Branch] = []
    free = 0  # the first step that is in no branch and beside none
    for k, needs in enumerate(depends):
        before.append(needs.union(*(before[d] for d in needs)))
        candidates = (_branch(found, depends, before, k, d, free) for d in needs)
        best = min((b for b in candidates if b is not None), key=lambda b: len(b.steps), default=None)
        if best is not None:
            out.append(best)
            free = k
    return out


def _branch(
    found: Mentions, depends: Sequence[set[int]], before: Sequence[set[int]], join: int, last: int, free: int
) -> Branch | None:
    """The branch that ends with the step `last`, which `join` reads; None if that is none."""
    others = depends[join] - {last}
    rest = others.union(*(before[o] for o in others))
    own = {last, *before[last]} - rest
    begin = _begin(own, depends)
    beside = {k for k in rest if k >= begin}
    if not own or min(own) < free or begin < free or not LEAST_BESIDE <= len(beside) >= len(own):
        return None
    if any(k not in own and not depends[k].isdisjoint(own) for k in range(min(own), join)):
        return None  # somebody else waits for it
    return Branch(tuple(sorted(own)), join) if all(_may_branch(found.steps[k]) for k in own) else None


def _begin(own: Collection[int], depends: Sequence[set[int]]) -> int:
    """The step before which the steps `own` may begin."""
    return 1 + max((d for k in own for d in depends[k] if d not in own), default=-1)


def _may_branch(step: Launch | Call) -> bool:
    if isinstance(step, Launch):
        return not step.members
    return not calls_cublas(step.op)  # which would have another workspace on another stream


class SideStream:
    """The ops of a branched plan, for one capture at a time: a second stream that takes part in it."""

    def __init__(self, stream: Any) -> None:
        """`stream` is a torch stream that nobody else uses."""
        self._side, self._main = stream, stream

    def ops(self) -> dict[str, Callable[..., None]]:
        """By name, as an executor takes them."""
        return {"fork": self.fork, "back": self.back, "join": self.join}

    def fork(self) -> None:
        """From here on the second stream is the current one, and goes on where the current one is."""
        self._main = torch.cuda.current_stream(self._side.device)
        self._side.wait_stream(self._main)
        torch.cuda.set_stream(self._side)

    def back(self) -> None:
        """The stream of before is the current one."""
        torch.cuda.set_stream(self._main)

    def join(self, *touched: torch.Tensor) -> None:
        """What follows on the current stream waits for the second one. `touched` is not freed before."""
        self._main.wait_stream(self._side)
