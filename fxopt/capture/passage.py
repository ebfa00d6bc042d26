"""Replays that go around AOTAutograd's wrappers, where those do nothing.

At each call of an inference graph they copy lists, switch gradients off, look for inputs to write back and outputs to make
views of: ten microseconds and more for a few hundred inputs. A replay of a CUDA graph by compiled code takes less, and
depends on no mode of autograd's. So calls go to it first where AOTAutograd's own metadata says that there is nothing to do
for the wrappers, and where a call was seen in which they handed on the inputs that they were given and returned the results
that they got, the very objects. What is not replayed goes through them, as ever.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fxopt.capture.freeze import Runner

Seen = list[tuple[list[Any], Any]]


class Passage:
    """The runner of an inference graph, called by AOTAutograd's wrappers; `replayed` is its way around them.

    `metadata` is AOTAutograd's (`ViewAndMutationMeta`).
    """

    def __init__(self, run: Runner, metadata: Any) -> None:
        self._boxed_call = True
        self._run = run
        self._watch = threading.local()
        replayed = getattr(run, "replayed", None)
        self.replayed: Callable[[tuple[Any, ...]], Any] | None = (
            replayed if replayed is not None and _wrappers_do_nothing(metadata, getattr(run, "written", ())) else None
        )

    def __call__(self, inputs: list[Any]) -> Any:
        seen: Seen | None = getattr(self._watch, "seen", None)
        if seen is None:
            return self._run(inputs)
        given = list(inputs)
        results = self._run(inputs)
        seen.append((given, results))
        return results

    @contextmanager
    def watched(self) -> Iterator[Seen]:
        """Collects inputs and results of this thread's calls in the block."""
        self._watch.seen = seen = Seen()
        try:
            yield seen
        finally:
            del self._watch.seen

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, AOTAutograd's function that calls this runner, with the way around it where there is one."""
        replayed = self.replayed
        if replayed is None:
            return compiled
        hands_on: bool | None = None

        @functools.wraps(compiled)
        def call(*args: Any) -> Any:
            nonlocal hands_on
            if hands_on:
                results = replayed(args)
                if results is not None:
                    return results
            if hands_on is not None:
                return compiled(*args)
            with self.watched() as seen:
                results = compiled(*args)
            hands_on = len(seen) == 1 and _are_same(args, seen[0][0]) and _are_same(results, seen[0][1])
            return results

        return call


def through_passage(run: Runner, metadata: Any) -> tuple[Runner, Passage | None]:
    """What AOTAutograd's wrappers shall call for an inference graph, and the passage that this is, if there is a way around
    them. `metadata` is None where there is none."""
    passage = Passage(run, metadata)
    return (run, None) if passage.replayed is None else (passage, passage)


def _are_same(some: Any, others: Any) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _wrappers_do_nothing(metadata: Any, written: tuple[int, ...]) -> bool:
    """Whether AOTAutograd's wrappers of an inference graph that changes the inputs `written`, and counts that, have nothing
    to do. False where torch's metadata is not what is expected."""
    try:
        return (
            metadata.num_mutated_inp_runtime_indices == 0
            and metadata.num_outputs_aliased == 0
            and metadata.num_intermediate_bases == 0
            and not metadata.dynamic_outputs
            and not metadata.tokens
            and not metadata.is_rng_op_functionalized
            and metadata.grad_enabled_mutation is None
            and set(metadata.mutated_graph_handled_indices_seen_by_autograd) <= set(written)
        )
    except AttributeError:
        return False
