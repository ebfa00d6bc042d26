"""What it is worth to bring weights into the L2 cache before they are read: `python -m benchmarks.weights_ahead --out FILE`.

A decoding step is a chain of short kernels. Each waits for the one before it, loads a row, multiplies, adds up between
warps and stores, and the memory rests for much of that; so it does while kernels run that read no weights (attention).
Where weights lie is known from the beginning, so kernels may ask, before they wait, for what comes after their own, up to a
share of the L2 cache beyond what has been read; and for what is small of their own (a norm's weight, scales). Who asks is a
variant: all kernels, or those that read no large weights. Contests time kernels alone and cannot tell what this is worth, so
the steps of whole plans are timed, as `quantized_steps.py` does; kernels are those that the tuner chooses without it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from benchmarks.bringing import Piece, bringing, programs_of
from benchmarks.choosing import names_of
from benchmarks.models import choose as models_named
from benchmarks.quantized_steps import measured
from benchmarks.results import revision, target_facts, versions
from fxopt import compiler, plan_cache
from fxopt.cli import pick_device, pick_dtype
from fxopt.codegen.compile import compile_kernels
from fxopt.codegen.triton_chain import OTHERS_END
from fxopt.ir.kernel import Artifact, KernelSource
from fxopt.ir.region import Alias, Batch, BufferSpec, Contraction, Region, SideBySide, Step, Work
from fxopt.lower import Lowered
from fxopt.lower.cost import nbytes
from fxopt.lower.steady import reads, views_of, written
from fxopt.precision import PRECISIONS
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.candidate import Choice


@dataclass(frozen=True)
class Variant:
    """Up to `window` of the L2 cache is brought beyond what has been read, by all kernels or by those that `rest`: that read
    no large weights.
    """

    window: float
    rest: bool


VARIANTS: dict[str, Variant | None] = {
    "plain": None,
    "resting, 1/4": Variant(1 / 4, True),
    "resting, 1/8": Variant(1 / 8, True),
    "small": Variant(0.0, True),
    "all, 1/4": Variant(1 / 4, False),
    "all, 1/2": Variant(1 / 2, False),
}

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
    lowered: Lowered, chosen: dict[str, Choice], variant: Variant, store: ArtifactStore
) -> dict[str, Choice]:
    """`chosen` with kernels that bring later steps' weights, and small ones of their own, on GPUs that start kernels early,
    where `lowered.lasting` is more than the L2 cache holds. Kernels that would not build so, or spill, stay as they are.
    """
    device = next((s.device for s in lowered.steps if isinstance(s, Work) and s.device.type == "cuda"), None)
    if device is None or lowered.lasting_bytes <= Target.current(device).l2_bytes:
        return chosen
    target = Target.current(device)
    small, asking = _own_of(lowered, chosen, device), _askings(lowered, chosen, device, variant)
    stream = [piece for own in stream_of(lowered).values() for piece in own]
    shares = shared_out(stream, list(asking.values()), int(target.l2_bytes * variant.window))
    wanted = _padded(chosen, {place: share for place, share in zip(asking, shares, strict=True) if share})
    places = dict.fromkeys((*wanted, *small))
    sources = {p: bringing(_kernel(chosen, p)[0], wanted.get(p, ()), small.get(p, ())) for p in places}
    return _built(chosen, sources, target, store)


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


def _askings(lowered: Lowered, chosen: Mapping[str, Choice], device: torch.device, variant: Variant) -> dict[Place, Asking]:
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
        if most >= LEAST and not (variant.rest and own):
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
) -> dict[str, Choice]:
    """`chosen` with `sources` in their places, where these could be built and spill no more than what they replace."""
    made, found = compile_kernels(sources.values(), target, store), dict(chosen)
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


@contextlib.contextmanager
def brought(variant: Variant | None) -> Iterator[None]:
    """Plans that are compiled in the block bring weights as `variant` says; they are not kept."""
    real = compiler._with_row_norms

    def choose(graph: Any, lowered: Lowered, chosen: Any, options: Any, journal: Any, store: ArtifactStore) -> Any:
        lowered, chosen = real(graph, lowered, chosen, options, journal, store)
        return lowered, chosen if variant is None else with_weights_ahead(lowered, chosen, variant, store)

    with (
        mock.patch.object(compiler, "_with_row_norms", choose),
        mock.patch.object(plan_cache, "plan_key", return_value=None),
    ):
        yield


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    device: str = "auto",
    workload: str = "llama-1b-decode",
    few: Annotated[str, typer.Option(help="precisions beside the model's own")] = "int4-weight,int8-weight",
    variants: Annotated[str, typer.Option(help="names, by semicolons")] = ";".join(VARIANTS),
    seconds: Annotated[float, typer.Option(help="no variant is begun after these")] = 100.0,
    tiny: bool = False,
) -> None:
    """Time the steps of a decoding step in each variant."""
    (known,) = models_named(workload)
    precisions = names_of(few, PRECISIONS, "precision")
    chosen = names_of(variants, VARIANTS, "variant", ";")
    where, start = pick_device(device), time.monotonic()
    case = known.build(known.sizes(tiny), where, pick_dtype("bfloat16" if where.type == "cuda" else "float32"))
    document: dict[str, Any] = {"target": target_facts(where), "versions": versions(), "commit": revision(), "variants": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        if time.monotonic() - start > seconds:
            typer.echo(f"{name}: no time left")
            continue
        typer.echo(name)
        with brought(VARIANTS[name]):
            found = measured(case, where, precisions)
        for own in found.values():
            own.pop("contests")
            own.pop("kernels")
        document["variants"][name] = found
        out.write_text(json.dumps(document, indent=1) + "\n")
        gc.collect()


if __name__ == "__main__":
    typer.run(main)
