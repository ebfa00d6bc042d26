"""Running a plan around what is captured of it: all of it, or one of three parts.

Values are a list: the inputs of the call, then what the part before has made, then the results of the captured one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

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

    def captured(self, values: list[Any]) -> tuple[Any, ...]: ...

    def handed(self, values: list[Any]) -> list[Any]:
        """`values` for a replay, which empties the list that it gets."""

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

        self.lent = parts.lent
        self._before = None if parts.before is None else bound(parts.before)
        self._captured = bound(parts.captured)
        self._after = None if parts.after is None else bound(parts.after)

    def begin(self, inputs: list[Any]) -> list[Any]:
        values = list(inputs)
        inputs.clear()
        if self._before is not None:
            run, takes = self._before
            values += run(_taken(values, takes))
        return values

    def captured(self, values: list[Any]) -> tuple[Any, ...]:
        run, takes = self._captured
        return run(_taken(values, takes))

    def handed(self, values: list[Any]) -> list[Any]:
        return list(values)

    def end(self, values: list[Any], results: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._after is None:
            return results
        run, takes = self._after
        values += results
        del results
        arguments = _taken(values, takes)
        values.clear()
        return run(arguments)


def _taken(values: Sequence[Any], takes: Sequence[int]) -> list[Any]:
    return [values[i] for i in takes]
