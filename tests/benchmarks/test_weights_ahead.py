"""What kernels bring of the weights that later steps read: which weights, in which order, how much, and when nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import weights_ahead as ahead
from benchmarks.bringing import Piece
from benchmarks.weights_ahead import (
    LEAST,
    MOST_PIECES,
    Asking,
    Variant,
    shared_out,
    stream_of,
    with_weights_ahead,
)
from fxopt.codegen.triton_chain import OTHERS_END
from fxopt.ir.exprs import Int, Sym, contiguous_strides, symbol
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.ir.loops import Load, Nest, Op, Store
from fxopt.ir.region import Alias, BufferSpec, Call, Ref, Region
from fxopt.lower import Lowered
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.candidate import Choice

ALL = Variant(1 / 4, rest=False)
CUDA = torch.device("cuda", 0)
MIB = 1 << 20
TARGET = replace(Target.cuda(90), l2_bytes=64 * MIB)


def spec(name: str, *shape: Int) -> BufferSpec:
    return BufferSpec(name, torch.float32, CUDA, shape, contiguous_strides(shape))


def chain(weights: int, size: int = 16 * MIB) -> Lowered:
    """Steps that each read a weight of `size` bytes and what the step before has stored, here a row of a few bytes."""
    buffers = {f"w{k}": spec(f"w{k}", size // 4) for k in range(weights)} | {"x0": spec("x0", 1024)}
    steps = []
    for k in range(weights):
        at = Sym("i", size=1024)
        loads = (Load(f"x{k}", symbol(at), torch.float32), Load(f"w{k}", symbol(at), torch.float32))
        nest = Nest((at,), (), (Store(f"x{k + 1}", symbol(at), Op("mul", loads, torch.float32)),))
        buffers[f"x{k + 1}"] = spec(f"x{k + 1}", 1024)
        steps.append(Region(f"r{k}", nest, {n: buffers[n] for n in (f"x{k}", f"w{k}", f"x{k + 1}")}, CUDA))
    lasting = frozenset(f"w{k}" for k in range(weights))
    return Lowered(steps, buffers, ("x0", *lasting), {}, (), lasting=lasting, lasting_bytes=weights * size)


def kernel(step: Region, programs: Int = 256) -> KernelSource:
    text = "@triton.jit\ndef fx(b0, b1, b2):\n    pass\n"
    options = {"signature": dict.fromkeys(("b0", "b1", "b2"), "*fp32"), "constexprs": {}, "aligned": []}
    return KernelSource("triton", "fx", text, tuple(step.buffers), grid=(programs, 1, 1), compile_options=options)


def made(source: KernelSource, spills: int = 0) -> Artifact:
    return Artifact(source.key(""), "triton", source.entry, Path("k"), {"n_spills": spills, "chained": True})


class Compiler:
    """Stands in for the compiler: what it was given, and what it makes of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[KernelSource] = []
        self.spills, self.fails = 0, False
        monkeypatch.setattr(Target, "current", staticmethod(lambda device: TARGET))
        monkeypatch.setattr(ahead, "compile_kernels", self.compile)

    def compile(self, sources: Iterable[KernelSource], target: Target, store: Any) -> list[Artifact | CompileFailure]:
        self.given = list(sources)
        return [CompileFailure("key", "no") if self.fails else made(s, self.spills) for s in self.given]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(monkeypatch)


def chosen_for(low: Lowered, programs: Int = 256) -> dict[str, Choice]:
    sources = {s.name: kernel(s, programs) for s in low.steps if isinstance(s, Region)}
    return {name: Choice("c", ((source, made(source)),)) for name, source in sources.items()}


def brought(low: Lowered, store: ArtifactStore, programs: Int = 256, variant: Variant = ALL) -> list[list[Piece]]:
    """By step."""
    chosen = with_weights_ahead(low, chosen_for(low, programs), variant, store)
    found = []
    for step in low.steps:
        assert isinstance(step, Region)
        (source, artifact) = chosen[step.name].kernels[0]
        assert artifact.key == made(source).key
        more = source.buffers[3:]
        found.append([Piece(n, int(source.sizes[3 * k]), int(source.sizes[3 * k + 1])) for k, n in enumerate(more)])  # type: ignore[arg-type]
    return found


def test_a_kernel_brings_what_comes_after_all_that_was_brought(compiler: Compiler, store: ArtifactStore) -> None:
    """Of 64 MiB 16 are on their way, which here is a weight: kernels that wait first begin with their own."""
    found = brought(chain(8), store)
    assert found[0] == [Piece("w0", 0, 16 * MIB)]
    assert found[1:] == [[Piece(f"w{k}", 0, 16 * MIB)] for k in range(1, 8)]
    assert len({source.text for source in compiler.given}) == 1


def test_kernels_of_one_text_have_equally_many_pieces(compiler: Compiler, store: ArtifactStore) -> None:
    found = brought(chain(64, size=2 * MIB), store)
    assert {len(pieces) for pieces in found if pieces} == {MOST_PIECES}
    assert len({source.text for source in compiler.given}) == 1
    whole = [piece for pieces in found for piece in pieces if piece.size]
    assert whole == [Piece(f"w{k}", 0, 2 * MIB) for k in range(64)]


def test_few_programs_bring_little(compiler: Compiler, store: ArtifactStore) -> None:
    assert not any(brought(chain(8), store, programs=4))
    assert sum(piece.size for piece in brought(chain(8), store, programs=16)[0]) == 16 * ahead.MOST_OF_PROGRAM
    assert not any(brought(chain(8), store, programs=symbol(Sym("s0"))))


def test_nothing_is_brought_where_it_is_no_use(compiler: Compiler, store: ArtifactStore) -> None:
    assert any(brought(chain(8), store))
    assert not any(brought(chain(4, size=15 * MIB), store))  # the cache holds them all
    assert not any(brought(chain(8), store, variant=Variant(1 / 4, rest=True)))  # each reads a weight itself
    assert not any(brought(chain(8), store, variant=Variant(0.0, rest=False)))
    low = chain(8)
    busy = replace(low, lasting=frozenset({"w7"}))  # the others are as large as activations of many rows
    assert [bool(pieces) for pieces in brought(busy, store)] == [False] * 7 + [True]


def test_a_kernel_that_spills_or_fails_stays_as_it_was(compiler: Compiler, store: ArtifactStore) -> None:
    compiler.spills = 8
    assert not any(brought(chain(8), store))
    compiler.spills, compiler.fails = 0, True
    assert not any(brought(chain(8), store))


def test_what_is_asked_for_stays_within_the_window() -> None:
    stream = [Piece(f"w{k}", 0, 10 * MIB) for k in range(4)]
    (one, other, last) = shared_out(stream, [Asking(0, 4 * MIB), Asking(0, 64 * MIB), Asking(30 * MIB, 64 * MIB)], 15 * MIB)
    assert one == [Piece("w0", 0, 4 * MIB)]
    assert other == [Piece("w0", 4 * MIB, 6 * MIB), Piece("w1", 0, 5 * MIB)]
    assert last == [Piece("w3", 0, 10 * MIB)]  # the rest of w1 and w2 have been read meanwhile
    assert shared_out(stream, [Asking(40 * MIB - LEAST + 1, 64 * MIB)], 15 * MIB) == [[]]


def test_neighbours_in_memory_are_one_piece() -> None:
    stream = [Piece("w", 0, 2 * MIB), Piece("w", 2 * MIB, 2 * MIB), Piece("v", 4 * MIB, MIB)]
    assert shared_out(stream, [Asking(MIB, 8 * MIB)], 8 * MIB) == [[Piece("w", MIB, 3 * MIB), Piece("v", 4 * MIB, MIB)]]


def test_weights_come_in_the_order_of_their_first_reading() -> None:
    low = chain(4)
    again = replace(low, steps=[*low.steps, replace(low.steps[0], name="again")])  # type: ignore[type-var]
    assert [p.buffer for step in again.steps for p in stream_of(again).get(id(step), [])] == ["w0", "w1", "w2", "w3"]
    library = Call("aten::mm.default", (Ref("x4"), Ref("w4")), {}, ("x5",))
    buffers = low.buffers | {"w4": spec("w4", MIB)}
    called = replace(low, steps=[*low.steps, library], buffers=buffers, lasting=low.lasting | {"w4"})
    assert stream_of(called)[id(library)] == [Piece("w4", 0, 4 * MIB)]


def test_views_are_parts_of_what_they_are_of() -> None:
    low = chain(2)
    part = Alias("w1", "w", (4 * MIB,), (1,), MIB)
    buffers = low.buffers | {"w": spec("w", 8 * MIB)}
    viewed = replace(low, steps=[part, *low.steps], buffers=buffers, lasting=frozenset({"w"}))
    assert [p for step in viewed.steps for p in stream_of(viewed).get(id(step), [])] == [Piece("w", 4 * MIB, 16 * MIB)]


def test_what_is_written_gathered_from_or_has_gaps_is_left_alone() -> None:
    low = chain(1)
    (step,) = low.steps
    assert isinstance(step, Region) and stream_of(low)

    writing = Call("aten::copy_.default", (Ref("w0"), Ref("x0")), {}, (None,), writes=("w0",))
    assert not stream_of(replace(low, steps=[step, writing]))

    (store,) = step.nest.stores
    place = Sym("j", size=4 * MIB)
    picked = Load("w0", symbol(place), torch.float32, ((place, Load("x0", 0, torch.int64)),))
    gathering = replace(step, nest=replace(step.nest, stores=(replace(store, value=picked),)))
    assert not stream_of(replace(low, steps=[gathering]))

    gaps = replace(low.buffers["w0"], shape=(1024, 1024), strides=(4096, 1))
    assert not stream_of(replace(low, buffers=low.buffers | {"w0": gaps}))


def test_a_kernel_asks_for_small_weights_of_its_own_which_it_has_not_loaded(
    compiler: Compiler, store: ArtifactStore
) -> None:
    low = replace(chain(8, size=16 << 10), lasting_bytes=128 * MIB)
    chosen = with_weights_ahead(low, chosen_for(low, 1), ALL, store)
    texts = {source.text for choice in chosen.values() for source, _ in choice.kernels}
    assert len(texts) == 1 and "bulk.bring_share(b1, 0, 16384, 4096)" in next(iter(texts))
    (source, _), *_ = chosen["r3"].kernels
    assert source.buffers == ("x3", "w3", "x4")

    early = {name: replace(c, kernels=((loading := with_marker(c), made(loading)),)) for name, c in chosen_for(low).items()}
    assert with_weights_ahead(low, early, ALL, store) == early


def with_marker(choice: Choice) -> KernelSource:
    """The kernel as one that loads weights before it waits."""
    (source, _) = choice.kernels[0]
    return replace(source, text=source.text.replace("    pass", f"    {OTHERS_END}\n    pass"))
