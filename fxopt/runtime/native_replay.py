"""Replays in one call of compiled code: what that is told of a recording and of its device.

The code (`codegen/replay.cpp`) does what `Recording.play` and `Turns.take` do, and looks at everything they look at. What it
does not take, it leaves to them: a call returns None then, and nothing has happened. Whether the code is there, and since
when, changes nothing but the host's time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fxopt.runtime.copies import CopyNode
from fxopt.runtime.draws import draw
from fxopt.runtime.recording import Recording, Results, span

if TYPE_CHECKING:
    from fxopt.runtime.cuda_graph import Turns

NAME = "native-replay"
"""What `FXOPT_DISABLE` and `options={"disable": ...}` call it."""


class Extension(Protocol):
    """Has the module made from `codegen/replay.cpp`: called, it returns that, or None as long as it is not there."""

    @property
    def reason(self) -> str | None:
        """Why there is none, as far as is known."""

    def __call__(self) -> Any: ...


Play = Callable[[list[Any] | tuple[Any, ...]], tuple[Any, ...] | None]


@dataclass(frozen=True)
class Device:
    """The functions of one device, as `codegen/replay.cpp` calls them.

    Addresses with the signatures of the driver's cuMemcpyDtoDAsync, cuGraphLaunch, cuEventRecord, cuStreamWaitEvent,
    cuStreamIsCapturing, cuLaunchKernel and, where a recording has nodes, cuGraphExecKernelNodeSetParams; the kernel of
    copies.cu, or 0; the event that ends turns; Python functions that need no interpreter frame where torch has such.
    `fail(what, code)` raises the error of a driver's code. `is_watched` is None where torch cannot tell.
    """

    copy: int
    launch: int
    record: int
    wait: int
    capturing: int
    launch_kernel: int
    tell: int
    copies: int
    event: int
    is_watched: Callable[[], int] | None
    current_device: Callable[[], int]
    stream: Callable[[int], int]
    empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]
    fail: Callable[[str, int], None]


def replayer(extension: Any, recording: Recording, turns: Turns, found: Device) -> Any:
    """A `Replay` of the extension for a recording of that device. It can always compare addresses; what else it
    may do, `plays` and `plays_within` say."""
    results, traits = recording.results, recording.traits
    nodes = recording.nodes if plays_within(recording, found) else None
    return extension.Replay(
        len(recording.addresses),
        (
            tuple((i, recording.addresses[i]) for i in traits.fixed),
            tuple((m.at, m.shape, m.strides, m.nbytes, m.target) for m in recording.moves),
            tuple(zip(traits.varying, recording.signature, strict=True)),
        ),
        (
            tuple(results.constants),
            tuple(_fresh(results, found)),
            tuple((x.at, x.input) for x in results.of_inputs if not x.view),
            traits.written,
        ),
        recording.seeds,
        (traits.device.type == "cuda", traits.device.index or 0),
        (turns, turns.lock, turns.driver),
        (found.copy, found.launch, found.record, found.wait, found.capturing, found.launch_kernel, found.tell, found.copies),
        (recording.replay.handle, found.event, recording.replay),
        (nodes, _told(nodes.before), _told(nodes.after)) if nodes is not None else (None, (), ()),
        (
            found.is_watched,
            found.current_device,
            found.stream,
            lambda: draw(traits.device),
            found.empty,
            found.fail,
        ),
    )


def plays(recording: Recording, device: Device) -> bool:
    """Whether the compiled code knows how to replay it and how all of its results come about."""
    results = recording.results
    views = any(x.view for x in results.of_inputs)
    return plays_within(recording, device) and not (results.kept or results.host or views)


def plays_within(recording: Recording, device: Device) -> bool:
    """Whether the compiled code can replay it in a turn that Python holds. Python makes results that are kept or views."""
    results = recording.results
    return not (recording.traits.draws or results.shared or (results.together and not device.copies))


def _told(nodes: Sequence[CopyNode]) -> tuple[tuple[int, int, int], ...]:
    """Where it is what they are told, their handles, and where it is what the driver is given."""
    return tuple((ctypes.addressof(x.told), x.handle, ctypes.addressof(x.parameters)) for x in nodes)


def _fresh(results: Results, device: Device) -> Iterator[tuple[Any, ...]]:
    """Results with memory of their own; many are copied together by torch unless the device has a kernel for it."""
    for x in results.fresh:
        yield x.at, x.shape, x.strides, x.dtype, x.nbytes, x.source
    for group in results.together if device.copies else ():
        for at, source in zip(group.positions, group.sources, strict=True):
            yield at, tuple(source.shape), source.stride(), source.dtype, span(source), source.data_ptr()
