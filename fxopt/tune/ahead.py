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
    whole, stream = constants(lowered), stream_of(lowered)
    asking: dict[Place, Asking] = {}
    small: dict[Place, list[tuple[str, int]]] = {}
    read = 0
    for step in lowered.steps:
        before, read = read, read + sum(piece.size for piece in stream.get(id(step), ()))
        if not isinstance(step, Work) or step.device != device:
            continue
        for number, (source, artifact) in enumerate(chosen[step.name].kernels):
            if not _may_ask(step, source, artifact, lowered):
                continue
            place, loads_first = (step.name, number), OTHERS_END in source.text
            if not (loads_first and isinstance(step, Region)):  # which has loaded them then
                small[place] = [(f"b{k}", whole[n].size) for k, n in enumerate(source.buffers) if _is_small(whole.get(n))]
            most = MOST_OF_PROGRAM * (programs_of(source) or 0)
            if most >= LEAST:
                asking[place] = Asking(read if loads_first else before, most)
    pieces = shared_out(
        [p for step in lowered.steps for p in stream.get(id(step), ())],
        list(asking.values()),
        int(target.l2_bytes * WINDOW),
    )
    wanted = _padded(chosen, {place: own for place, own in zip(asking, pieces, strict=True) if own})
    places = dict.fromkeys((*wanted, *(place for place, own in small.items() if own)))
    sources = {p: bringing(_kernel(chosen, p)[0], wanted.get(p, ()), small.get(p, ())) for p in places}
    brought = sum(piece.size for own in wanted.values() for piece in own)
    journal.note(NAME, f"{len(wanted)} kernels bring {brought / 1e6:.0f} MB of weights into the L2 cache for later ones")
    return _built(chosen, sources, target, store, journal)


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


def _may_ask(step: Work, source: KernelSource, artifact: Artifact, lowered: Lowered) -> bool:
    """Whether the kernel waits for memory: not tiles of a product, of which others are to begin early (`assemble.py`)."""
    waits = not isinstance(step, Contraction | SideBySide) or OTHERS_END in source.text
    if not waits or programs_of(source) is None or isinstance(step, Batch) or not artifact.meta.get("chained"):
        return False
    return sum(nbytes(spec) for name, spec in step.buffers.items() if name not in lowered.lasting) <= FEW_BYTES


def _is_small(piece: Piece | None) -> bool:
    return piece is not None and piece.size < LEAST_PIECE


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
