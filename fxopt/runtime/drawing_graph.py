"""CUDA graphs in which library ops draw from torch's generator: attention that drops.

Such an op can be captured only while the generator is in a mode for it, which torch.cuda.CUDAGraph alone can set: kernels
then read the generator's seed and offset from the GPU's memory, where the graph writes them before each replay. The mode
belongs to the state that a generator has, so the device's default generator has another state meanwhile: whatever happens in
a capture, the generator is as before afterwards. Before a replay that other state is brought to where the generator stands,
and afterwards the generator to where the state has come, so that it advances as it does without graphs.

Another thread that draws on the device during a capture gets an error, as in every capture by torch's own means.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class DrawingGraph:
    """A captured run, with the pool that its memory is in. Destroyed with the last reference to it.

    `states` is the generator's own and that of the capture; `destroy(graph)` is called in the end.
    """

    def __init__(
        self, graph: Any, pool: Any, states: tuple[torch.Generator, torch.Generator], destroy: Callable[[Any], None]
    ) -> None:
        self._pool, self._graph, self._generator, self._captured_state = pool, graph, *states
        weakref.finalize(self, destroy, graph).atexit = False

    @property
    def handle(self) -> int:
        """0: only torch may replay it, which moves the generator."""
        return 0

    def __call__(self, stream: int) -> None:
        """Replay on `stream`, a raw handle of the current one. Raises RuntimeError where CUDA refuses."""
        generator, state = self._generator, self._captured_state
        state.manual_seed(generator.initial_seed())
        state.set_offset(generator.get_offset())
        self._graph.replay()
        generator.set_offset(state.get_offset())


def capture_drawing(
    run: Callable[[], T], index: int, pool: Any, generator: torch.Generator, destroy: Callable[[Any], None]
) -> tuple[DrawingGraph, T]:
    """(what replays `run`, the result of `run`), captured on the current stream of device `index` with memory of `pool`,
    executing nothing.

    `generator` is the device's default one. Raises what `run` raises, and RuntimeError where CUDA refuses; afterwards all is
    as before.
    """
    state = generator.clone_state()
    with _state_of(generator, state), _released_on_failure(index, pool):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool.id, capture_error_mode="thread_local")
        try:
            result = run()
        finally:
            graph.capture_end()
    return DrawingGraph(graph, pool, (generator, state), destroy), result


@contextlib.contextmanager
def _state_of(generator: torch.Generator, state: torch.Generator) -> Iterator[None]:
    """`generator` has the state of another one meanwhile."""
    before = generator.graphsafe_get_state()
    generator.graphsafe_set_state(state)
    try:
        yield
    finally:
        generator.graphsafe_set_state(before)


@contextlib.contextmanager
def _released_on_failure(index: int, pool: Any) -> Iterator[None]:
    """A capture that fails goes on directing allocations to its pool, and keeps it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # it may have ended in time
            torch._C._cuda_endAllocateToPool(index, pool.id)
            torch._C._cuda_releasePool(index, pool.id)
        raise
