"""Kernels that bring what later ones read: what is asked for, where, and that nothing else changes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from benchmarks.bringing import LINE, MOST_AT_A_TIME, Piece, bringing
from fxopt.lower.contractions import FUSED
from tests.codegen import triton_nests as nests
from tests.codegen.test_quantized_products import way_of, weight_only
from tests.codegen.test_triton_batch import BERT, batch_of
from tests.codegen.test_triton_chain import GLOBAL, KERNELS, WAIT, first, weighted_norm
from tests.codegen.triton_interpreter import Interpreter
from tests.codegen.triton_nests import BF16, F32

pytest.importorskip("triton")

from fxopt.codegen.templates.weight_config import DotConfig
from fxopt.codegen.triton_batch import batch_candidates, print_batch
from fxopt.codegen.triton_build import compile_to_text, compile_triton
from fxopt.codegen.triton_chain import OTHERS_END
from fxopt.codegen.triton_weights import print_vector
from fxopt.errors import UnsupportedError
from fxopt.ir.kernel import KernelSource
from fxopt.target import Target

H100 = Target.cuda(90)
ASKED = re.compile(r"cp\.async\.bulk\.prefetch\.L2\.global")
PIECES = [Piece("w", 0, 1 << 20), Piece("v", 4096, 300 << 10)]


def row_by_4_bits() -> KernelSource:
    """A product of one row whose programs have all of their weight in registers before they wait."""
    low, way = way_of(*weight_only(4, 1, 2048, 3072, 128), FUSED)
    (step,) = way.steps
    marked = replace(step, region=replace(step.region, steady=frozenset(low.inputs[1:])))
    return print_vector(marked, DotConfig(16, 8, 1, 128, 8), H100).kernels[0]


@pytest.mark.parametrize("name", ["pointwise", "looped", "attention"])
def test_a_kernel_asks_before_it_waits_and_touches_memory_afterwards(name: str) -> None:
    source = KERNELS[name]()
    given = bringing(source, PIECES)
    ptx = compile_to_text(given, H100, "ptx")
    before, after = ptx[ptx.index(".entry") :].split(WAIT)
    assert len(ASKED.findall(before)) == 2 and not ASKED.search(after)
    touched = [line for line in before.splitlines() if GLOBAL.search(line) and not ASKED.search(line)]
    assert not [line for line in touched if ".param" not in line]
    meta = compile_triton(given, H100)[1]
    assert meta["n_spills"] == 0 and meta["chained"]
    assert meta["parameters"].count("ptr") == compile_triton(source, H100)[1]["parameters"].count("ptr") + 2
    assert meta["parameters"][-6:] == ["i64", "i32", "i32"] * 2


def test_what_is_loaded_before_waiting_is_asked_for_first() -> None:
    body = bringing(first(weighted_norm()), PIECES).text.partition("def fx_")[2]
    assert body.index("tl.load") < body.index("bulk.bring_share") < body.index(OTHERS_END)
    ptx = compile_to_text(bringing(row_by_4_bits(), PIECES), H100, "ptx")
    before, after = ptx[ptx.index(".entry") :].split(WAIT)
    assert re.search(r"ld\.global\.\S*v4", before) and len(ASKED.findall(before)) == 2 and not ASKED.search(after)
    assert compile_triton(bringing(row_by_4_bits(), PIECES), H100)[1]["n_spills"] == 0


def test_parameters_are_pointers_then_sizes() -> None:
    source = first(nests.broadcast_symbolic())
    with pytest.raises(UnsupportedError):  # its programs are as many as there are elements
        bringing(source, PIECES)
    source = first(nests.pointwise(1 << 20, BF16))
    given = bringing(source, PIECES)
    assert given.buffers == (*source.buffers, "w", "v")
    assert given.sizes == (0, 1 << 20, 1024, 4096, 300 << 10, 384)
    assert list(given.compile_options["signature"])[len(source.buffers) : len(given.buffers)] == ["ahead0", "ahead1"]
    assert given.compile_options["aligned"] == source.compile_options["aligned"]


def test_texts_depend_on_how_many_pieces_there_are() -> None:
    source = first(nests.softmax(512, 100_000, F32))
    others = [Piece("u", 128, 7 << 20), Piece("w", 0, 128)]
    assert bringing(source, PIECES).text == bringing(source, others).text != bringing(source, PIECES[:1]).text


def test_operands_of_its_own_are_no_new_parameters() -> None:
    source = first(nests.softmax(512, 100_000, F32))
    given = bringing(source, PIECES[:1], [("b0", 4096)])
    assert given.buffers == (*source.buffers, "w")
    ptx = compile_to_text(given, H100, "ptx")
    before, after = ptx[ptx.index(".entry") :].split(WAIT)
    assert len(ASKED.findall(before)) == 2 and not ASKED.search(after)


def test_programs_ask_for_equal_shares() -> None:
    source = first(nests.softmax(512, 100_000, F32))
    (programs, *_) = source.grid
    assert isinstance(programs, int)
    _, size, each = bringing(source, [Piece("w", 0, 8 << 20)]).sizes
    assert isinstance(each, int) and each % LINE == 0 and programs * each >= size == 8 << 20
    assert bringing(source, [Piece("w", 0, 2047 << 20)]).sizes[-1] == MOST_AT_A_TIME


def test_batched_kernels_cannot() -> None:
    batch = batch_of(BERT)
    with pytest.raises(UnsupportedError):
        bringing(print_batch(batch, batch_candidates(batch, H100)[0], H100), PIECES)


def test_values_are_the_same(interpreter: Interpreter) -> None:
    case = weighted_norm()
    source = first(case)
    kinds = {name: (spec.dtype, spec.extent) for name, spec in case.region.buffers.items()}
    generator = torch.Generator().manual_seed(0)
    given = {n: torch.randn(int(size), generator=generator).to(dtype) for n, (dtype, size) in kinds.items()}  # type: ignore[arg-type]
    plain, asking = ({n: x.clone() for n, x in given.items()} for _ in range(2))
    interpreter.run(source, plain)
    interpreter.run(bringing(source, [Piece("w", 0, 1024)]), asking)
    assert all(torch.equal(plain[n], asking[n]) for n in given)
    assert any(not torch.equal(plain[n], given[n]) for n in given)
