"""Weights that are brought into the L2 cache before they are read, by the kernels before.

A step for one row or few (a decoding step, a model at batch 1) is a chain of short kernels. Each waits for the one
before it, loads a row, multiplies, adds up between warps and stores, and the memory rests for much of that; so it does while
kernels run that read no weights (attention, norms). Where weights lie is known from the beginning, so each kernel asks,
before it waits, for what comes after its own: `WINDOW` of the L2 cache is always on its way. Contests, which time kernels
alone, could not tell what that is worth; it is done where weights are more than the L2 cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
MOST_PIECES = 4
"""Of a kernel, whose parameters they are."""

FEW_BYTES = 4 << 20
"""Of what a kernel touches beside weights and states: of one that moves more the memory does not rest."""


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
    """`chosen` with kernels that bring later steps' weights, on GPUs that start kernels early and have `lowered.lasting`
    weights beyond their L2 cache. Kernels that would not build so, or spill, stay as they are.
    """
    device = next((s.device for s in lowered.steps if isinstance(s, Work) and s.device.type == "cuda"), None)
    if NAME in options.disable or options.tuning_seconds == 0 or device is None:
        return chosen
    target = Target.current(device)
    if lowered.lasting_bytes <= target.l2_bytes:
        return chosen
    stream, places = stream_of(lowered), list[tuple[Work, int, Asking]]()
    read = 0
    for step in lowered.steps:
        before, read = read, read + sum(piece.size for piece in stream.get(id(step), ()))
        if not isinstance(step, Work) or step.device != device:
            continue
        for number, (source, artifact) in enumerate(chosen[step.name].kernels):
            most = _most(step, source, artifact, lowered)
            begun = read if OTHERS_END in source.text else before  # else its own come when it has waited
            places += [(step, number, Asking(begun, most))] if most >= LEAST else []
    pieces = shared_out(
        [p for step in lowered.steps for p in stream.get(id(step), ())],
        [asking for *_, asking in places],
        int(target.l2_bytes * WINDOW),
    )
    wanted = {(step.name, number): own for (step, number, _), own in zip(places, pieces, strict=True) if own}
    return _built(chosen, _padded(chosen, wanted), target, store, journal)


def stream_of(lowered: Lowered) -> dict[int, list[Piece]]:
    """What each step (by identity) is the first to read of weights: whole ones, in the memory that they are views of."""
    base = views_of(lowered)
    constant = lowered.lasting - written(lowered)
    seen: set[tuple[str, int]] = set()
    found: dict[int, list[Piece]] = {}
    for step in lowered.steps:
        for name in _read_whole(step):
            root, first = _place(name, base)
            size = _dense_bytes(lowered.buffers.get(name))
            if root in constant and first is not None and size >= LEAST_PIECE and (root, first) not in seen:
                seen.add((root, first))
                found.setdefault(id(step), []).append(Piece(root, first * lowered.buffers[name].dtype.itemsize, size))
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


def _most(step: Work, source: KernelSource, artifact: Artifact, lowered: Lowered) -> int:
    """Bytes that the kernel may ask for. Tiles of a product that do not load their weights first are none that wait."""
    programs = programs_of(source)
    if programs is None or source.language != "triton" or isinstance(step, Batch) or not artifact.meta.get("chained"):
        return 0
    if isinstance(step, Contraction | SideBySide) and OTHERS_END not in source.text:
        return 0
    touched = sum(nbytes(spec) for name, spec in step.buffers.items() if name not in lowered.lasting)
    return 0 if touched > FEW_BYTES else programs * MOST_OF_PROGRAM


def _padded(
    chosen: Mapping[str, Choice], wanted: Mapping[tuple[str, int], list[Piece]]
) -> dict[tuple[str, int], list[Piece]]:
    """`wanted` with as many pieces, some of them empty, for all kernels of one text, so that these stay one kernel."""
    text = {place: chosen[place[0]].kernels[place[1]][1].key for place in wanted}
    most: dict[str, int] = {}
    for place, pieces in wanted.items():
        most[text[place]] = max(most.get(text[place], 0), len(pieces))
    return {
        place: [*pieces, *[Piece(pieces[0].buffer, 0, 0)] * (most[text[place]] - len(pieces))]
        for place, pieces in wanted.items()
    }


def _built(
    chosen: dict[str, Choice],
    wanted: Mapping[tuple[str, int], list[Piece]],
    target: Target,
    store: ArtifactStore,
    journal: Journal,
) -> dict[str, Choice]:
    """`chosen` with the kernels that bring what is `wanted`, where these could be built."""
    sources = {place: bringing(chosen[place[0]].kernels[place[1]][0], pieces) for place, pieces in wanted.items()}
    with journal.timed("kernels that bring weights"):
        made = compile_kernels(sources.values(), target, store)
    found, brought = dict(chosen), 0
    for ((name, number), source), artifact in zip(sources.items(), made, strict=True):
        kernels = list(found[name].kernels)
        if not isinstance(artifact, Artifact) or artifact.meta["n_spills"] > kernels[number][1].meta["n_spills"]:
            continue
        kernels[number] = source, artifact
        found[name] = replace(found[name], kernels=tuple(kernels))
        brought += sum(piece.size for piece in wanted[name, number])
    journal.note(NAME, f"{len(sources)} kernels bring {brought / 1e6:.0f} MB of weights into the L2 cache for later ones")
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
