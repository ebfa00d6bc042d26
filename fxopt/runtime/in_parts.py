"""Running a plan around what is captured of it: all of it, one of three parts, or several of a row.

Values are a list: the inputs of the call, then what the parts have made, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from fxopt.runtime.executor import Executor
from fxopt.runtime.split import Part, Parts

Run = Callable[[list[Any]], tuple[Any, ...]]


class Way(Protocol):
    """How a call goes: `begin`, then `captured` or a replay of it, then `end`.

    `lent` are positions among the results of `captured` that `end` reads where they are: it belongs to the replay then.
    """

    lent: frozenset[int]

    def begin(self, inputs: list[Any]) -> list[Any]:
        """The values that `captured` takes; empties `inputs`, or returns it."""

    def captured(self, values: list[Any]) -> tuple[Any, ...]:
        """What a replay does, on what `handed` gave; empties that list."""

    def handed(self, values: list[Any]) -> list[Any]:
        """`values` for `captured` or a replay, which empties the list that it gets. Leaves in `values` what `end` needs."""

    def end(self, values: list[Any], results: tuple[Any, ...]) -> tuple[Any, ...]:
        """The results of the call, from those of `captured`; empties `values`."""


class Whole:
    """A plan of which all is captured."""

    lent: frozenset[int] = frozenset()

    def __init__(self, executor: Run) -> None:
        self.captured = executor

    def begin(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def handed(self, values: list[Any]) -> list[Any]:
        return values

    def end(self, values: list[Any], results: tuple[Any, ...]) -> tuple[Any, ...]:
        return results


class InParts:
    """The plan of `executor` in parts. Raises PlanError and CacheError where one cannot be bound."""

    def __init__(self, parts: Parts, executor: Executor) -> None:
        def bound(part: Part) -> tuple[Run, tuple[int, ...]]:
            return executor.part(part.plan), part.takes

        self.lent, self._direct = parts.lent, parts.direct
        self._before = None if parts.before is None else bound(parts.before)
        self._captured = bound(parts.captured)
        self._after = None if parts.after is None else bound(parts.after)
        later = {*parts.captured.takes, *(() if parts.after is None else parts.after.takes)}
        self._dying = () if parts.before is None else tuple(i for i in parts.before.takes if i not in later)
        needed = () if parts.after is None else parts.after.takes
        self._spent = tuple(i for i in parts.captured.takes if i not in needed)

    def begin(self, inputs: list[Any]) -> list[Any]:
        values = list(inputs)
        inputs.clear()
        if self._before is not None:
            run, takes = self._before
            arguments = _taken(values, takes)
            for i in self._dying:
                values[i] = None
            values += run(arguments)
        return values

    def captured(self, values: list[Any]) -> tuple[Any, ...]:
        run, takes = self._captured
        arguments = _taken(values, takes)
        values.clear()
        return run(arguments)

    def handed(self, values: list[Any]) -> list[Any]:
        handed = list(values)
        for i in self._spent:
            values[i] = None
        return handed

    def end(self, values: list[Any], results: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._after is None:
            return results
        run, takes = self._after
        direct = [(at, results[k]) for at, k in self._direct]
        values += results
        del results
        arguments = _taken(values, takes)
        values.clear()
        returned = run(arguments)
        if direct:
            found = list(returned)
            for at, value in direct:
                found[at] = value
            returned = tuple(found)
        return returned


class InPieces:
    """The plan of `executor` as a row: `runs` are what runs each part, with or without graphs, and which values it takes.

    Called like an `Executor`. Between two parts nothing is held but the values that later ones take.
    """

    def __init__(self, executor: Executor, runs: Sequence[tuple[Run, tuple[int, ...]]]) -> None:
        self.plan, self.kept_as = executor.plan, executor.kept_as
        self._boxed_call = True
        self._last, self._last_takes = runs[-1]
        needed = set(self._last_takes)
        dying = list[tuple[int, ...]]()
        for _, takes in reversed(runs[:-1]):
            dying.append(tuple(i for i in takes if i not in needed))
            needed.update(takes)
        self._runs = [(run, takes, dead) for (run, takes), dead in zip(runs[:-1], reversed(dying), strict=True)]

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(inputs)
        values = list(inputs)
        inputs.clear()
        for run, takes, dying in self._runs:
            arguments = _taken(values, takes)
            for i in dying:
                values[i] = None
            values += run(arguments)
        arguments = _taken(values, self._last_takes)
        values.clear()
        return self._last(arguments)


def _taken(values: Sequence[Any], takes: Sequence[int]) -> list[Any]:
    return [values[i] for i in takes]
