"""Weights that are brought into the L2 cache before they are read, by the kernels before.

A step for one row or few (a decoding step, a model at batch 1) is a chain of short kernels. Each waits for the one
before it, loads a row, multiplies, adds up between warps and stores, and the memory rests for much of that; so it does while
kernels run that read no weights (attention, norms). Where weights lie is known from the beginning, so each kernel asks,
before it waits, for what comes after its own: `WINDOW` of the L2 cache is always on its way. It also asks for what is small
of its own (a norm's weight, scales), which it would otherwise load when it has waited. Contests, which time kernels alone,
could not tell what that is worth; it is done where weights are more than the L2 cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fxopt.codegen.compile import compile_kernels
from fxopt.codegen.triton_ahead import Piece, bringing, programs_of
from fxopt.codegen.triton_chain import OTHERS_END
from fxopt.ir.kernel import Artifact, KernelSource
from fxopt.ir.region import Alias, Batch, BufferSpec, Contraction, Region, SideBySide, Step, Work
from fxopt.journal import Journal
from fxopt.lower import Lowered
from fxopt.lower.cost import nbytes
from fxopt.lower.steady import reads, views_of, written
from fxopt.options import Options
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.candidate import Choice

NAME = "weights-ahead"
"""What `Options.disable` calls it."""

WINDOW = 1 / 4
"""Of the L2 cache: what is brought has to stay there until it is read, beside all that others touch meanwhile."""

MOST_OF_PROGRAM = 128 << 10
"""Bytes that one program asks for: a multiprocessor takes the time of as many lines."""

LEAST = 1 << 20
"""Bytes that are worth a kernel's asking."""

LEAST_PIECE = 64 << 10
"""Of a large weight."""

MOST_PIECES = 4
"""Of a kernel, whose parameters they are."""

FEW_BYTES = 4 << 20
"""Of what a kernel touches beside weights and states: of one that moves more the memory does not rest."""


Place = tuple[str, int]
"""A kernel: the name of a step, and which of its kernels."""


@dataclass(frozen=True)
class Asking:
    """A kernel that may bring `most` bytes of what is read after the first `read` bytes of all weights, as the steps read
    these in turn.
    """

    read: int
    most: int


def with_weights_ahead(
    lowered: Lowered, chosen: dict[str, Choice], options: Options, store: ArtifactStore, journal: Journal
) -> dict[str, Choice]:
    """`chosen` with kernels that bring later steps' weights, and small ones of their own, on GPUs that start kernels early,
    where `lowered.lasting` is more than the L2 cache holds. Kernels that would not build so, or spill, stay as they are.
    """
    device = next((s.device for s in lowered.steps if isinstance(s, Work) and s.device.type == "cuda"), None)
    if NAME in options.disable or options.tuning_seconds == 0 or device is None:
        return chosen
    target = Target.current(device)
    if lowered.lasting_bytes <= target.l2_bytes:
        return chosen
    small, asking = _own_of(lowered, chosen, device), _askings(lowered, chosen, device)
    stream = [piece for own in stream_of(lowered).values() for piece in own]
    shares = shared_out(stream, list(asking.values()), int(target.l2_bytes * WINDOW))
    wanted = _padded(chosen, {place: share for place, share in zip(asking, shares, strict=True) if share})
    places = dict.fromkeys((*wanted, *small))
    sources = {p: bringing(_kernel(chosen, p)[0], wanted.get(p, ()), small.get(p, ())) for p in places}
    brought = sum(piece.size for share in wanted.values() for piece in share)
    journal.note(NAME, f"{len(wanted)} kernels bring {brought / 1e6:.0f} MB of weights into the L2 cache for later ones")
    return _built(chosen, sources, target, store, journal)


def _waiting(lowered: Lowered, chosen: Mapping[str, Choice], device: torch.device) -> Iterator[tuple[Work, Place]]:
    """The kernels on `device` that wait for memory: not tiles of products (of which others begin early, `assemble.py`), and
    none that moves much beside weights and states."""
    for step in lowered.steps:
        if not isinstance(step, Work) or isinstance(step, Batch) or step.device != device:
            continue
        if sum(nbytes(spec) for name, spec in step.buffers.items() if name not in lowered.lasting) > FEW_BYTES:
            continue
        for number, (source, artifact) in enumerate(chosen[step.name].kernels):
            waits = not isinstance(step, Contraction | SideBySide) or OTHERS_END in source.text
            if waits and programs_of(source) is not None and artifact.meta.get("chained"):
                yield step, (step.name, number)


def _askings(lowered: Lowered, chosen: Mapping[str, Choice], device: torch.device) -> dict[Place, Asking]:
    """What kernels may bring, where that is worth it. Those that load weights before they wait have their own then."""
    stream = stream_of(lowered)
    after, read = {}, 0
    for step in lowered.steps:
        read += sum(piece.size for piece in stream.get(id(step), ()))
        after[id(step)] = read
    found = {}
    for step, place in _waiting(lowered, chosen, device):
        source = _kernel(chosen, place)[0]
        own = sum(piece.size for piece in stream.get(id(step), ()))
        most = MOST_OF_PROGRAM * (programs_of(source) or 0)
        if most >= LEAST:
            found[place] = Asking(after[id(step)] - (0 if OTHERS_END in source.text else own), most)
    return found


def _own_of(lowered: Lowered, chosen: Mapping[str, Choice], device: torch.device) -> dict[Place, list[tuple[str, int]]]:
    """The small weights of kernels, as parameters and bytes, but for loop nests that have loaded them before they wait."""
    whole = {name: piece for name, piece in constants(lowered).items() if piece.size < LEAST_PIECE}
    found = {}
    for step, place in _waiting(lowered, chosen, device):
        source = _kernel(chosen, place)[0]
        own = [(f"b{k}", whole[name].size) for k, name in enumerate(source.buffers) if name in whole]
        if own and not (isinstance(step, Region) and OTHERS_END in source.text):
            found[place] = own
    return found


def constants(lowered: Lowered) -> dict[str, Piece]:
    """The weights that nothing writes, and views of them, that have no gaps: where each lies in the memory that it is of."""
    base = views_of(lowered)
    unwritten = lowered.lasting - written(lowered)
    found = {}
    for name, spec in lowered.buffers.items():
        root, first = _place(name, base)
        size = _dense_bytes(spec)
        if root in unwritten and first is not None and size:
            found[name] = Piece(root, first * spec.dtype.itemsize, size)
    return found


def stream_of(lowered: Lowered) -> dict[int, list[Piece]]:
    """The large weights that each step (by identity) is the first to read."""
    whole = constants(lowered)
    seen: set[tuple[str, int]] = set()
    found: dict[int, list[Piece]] = {}
    for step in lowered.steps:
        for piece in (whole[name] for name in _read_whole(step) if name in whole):
            if piece.size >= LEAST_PIECE and (piece.buffer, piece.first) not in seen:
                seen.add((piece.buffer, piece.first))
                found.setdefault(id(step), []).append(piece)
    return found


def shared_out(stream: Sequence[Piece], askings: Sequence[Asking], window: int) -> list[list[Piece]]:
    """What each of `askings`, which are in order, is to bring of `stream`: what follows all that was brought or read before,
    no further than `window` bytes after what has been read.
    """
    brought, found = 0, []
    for asking in askings:
        brought = max(brought, asking.read)
        end = min(asking.read + window, brought + asking.most)
        pieces = _between(stream, brought, end)[:MOST_PIECES]
        size = sum(piece.size for piece in pieces)
        if size < LEAST:
            pieces, size = [], 0
        found.append(pieces)
        brought += size
    return found


def _between(stream: Sequence[Piece], first: int, end: int) -> list[Piece]:
    """The bytes from `first` to `end` of `stream`, neighbours in memory as one piece."""
    found: list[Piece] = []
    at = 0
    for piece in stream:
        start, stop = max(first - at, 0), min(end - at, piece.size)
        at += piece.size
        if stop <= start:
            continue
        last = found[-1] if found else None
        if last is not None and (last.buffer, last.first + last.size) == (piece.buffer, piece.first + start):
            found[-1] = replace(last, size=last.size + stop - start)
        else:
            found.append(Piece(piece.buffer, piece.first + start, stop - start))
    return found


def _kernel(chosen: Mapping[str, Choice], place: Place) -> tuple[KernelSource, Artifact]:
    name, number = place
    return chosen[name].kernels[number]


def _padded(chosen: Mapping[str, Choice], wanted: Mapping[Place, list[Piece]]) -> dict[Place, list[Piece]]:
    """`wanted` with as many pieces, some of them empty, for all kernels of one text, so that these stay one kernel."""
    most: dict[str, int] = {}
    for place, pieces in wanted.items():
        key = _kernel(chosen, place)[1].key
        most[key] = max(most.get(key, 0), len(pieces))
    missing = {place: most[_kernel(chosen, place)[1].key] - len(pieces) for place, pieces in wanted.items()}
    return {place: [*pieces, *[Piece(pieces[0].buffer, 0, 0)] * missing[place]] for place, pieces in wanted.items()}


def _built(
    chosen: dict[str, Choice],
    sources: Mapping[Place, KernelSource],
    target: Target,
    store: ArtifactStore,
    journal: Journal,
) -> dict[str, Choice]:
    """`chosen` with `sources` in their places, where these could be built and spill no more than what they replace."""
    with journal.timed("kernels that bring weights"):
        made = compile_kernels(sources.values(), target, store)
    found = dict(chosen)
    for ((name, number), source), artifact in zip(sources.items(), made, strict=True):
        kernels = list(found[name].kernels)
        if isinstance(artifact, Artifact) and artifact.meta["n_spills"] <= kernels[number][1].meta["n_spills"]:
            kernels[number] = source, artifact
            found[name] = replace(found[name], kernels=tuple(kernels))
    return found


def _read_whole(step: Step) -> Iterator[str]:
    """What `step` reads, but for tables that it picks from by indices that it loads."""
    loads = [load for nest in step.nests for load in nest.loads()] if isinstance(step, Region) else []
    picked = {load.buffer for load in loads if load.indirect}
    return (name for name in reads(step) if name not in picked)


def _place(name: str, base: Mapping[str, Alias]) -> tuple[str, int | None]:
    """The buffer that `name` is a view of, and at which of its elements it begins; None if that is unknown."""
    first: int | None = 0
    while name in base:
        offset = base[name].offset
        first = first + offset if first is not None and isinstance(offset, int) else None
        name = base[name].of
    return name, first


def _dense_bytes(spec: BufferSpec | None) -> int:
    """Of a tensor without gaps, of known size; of any other 0."""
    if spec is None or not isinstance(spec.extent, int) or spec.extent != spec.numel:
        return 0
    return spec.extent * spec.dtype.itemsize
