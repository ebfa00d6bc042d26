"""Batched kernels: the text, machine code without spills and with wide accesses, and what they are independent of."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fxopt.ir.exprs import Sym, symbol
from fxopt.ir.loops import Const, Load, Nest, Op, Scalar, Store
from fxopt.ir.region import Batch, BufferSpec, Region
from fxopt.lower.batching import steps_of
from tests.codegen.triton_interpreter import Interpreter
from tests.codegen.triton_nests import BF16, BOOL, F32, I64, cast, op

pytest.importorskip("triton")

from fxopt.codegen.triton_batch import batch_candidates, for_members, print_batch
from fxopt.codegen.triton_build import compile_to_text, compile_triton
from fxopt.codegen.triton_config import TritonConfig
from fxopt.errors import UnsupportedError
from fxopt.target import Target

GOLDEN = Path(__file__).parents[1] / "golden"
CUDA, TARGET = torch.device("cuda", 0), Target.cuda(90)
BERT = [768] * 100 + [3072] * 12 + [768 * 768] * 48 + [4 * 768 * 768] * 24 + [30522 * 768]


def adam(k: int, size: int, dtype: torch.dtype) -> Region:
    """A step of Adam on parameters of `dtype` with moments in float32."""
    x, at = Sym("x0", size=size), symbol(Sym("x0", size=size)) if size > 1 else 0
    dtypes = {"p": dtype, "g": dtype, "m": F32, "v": F32, "step": F32}
    specs = {f"{n}{k}": BufferSpec(f"{n}{k}", d, CUDA, (size,), (1,)) for n, d in dtypes.items() if n != "step"}
    specs[f"step{k}"] = BufferSpec(f"step{k}", F32, CUDA, (), ())

    def load(name: str) -> Scalar:
        return cast(Load(f"{name}{k}", 0 if name == "step" else at, dtypes[name]), F32)

    p, g, m, v, step = (load(name) for name in dtypes)
    m, v = op("add", op("mul", m, Const(0.9, F32)), g), op("add", op("mul", v, Const(0.999, F32)), op("mul", g, g))
    scale = op("sub", Const(1.0, F32), op("pow", Const(0.999, F32), step))
    new = op("sub", p, op("truediv", m, op("sqrt", op("truediv", v, scale))))
    stores = (Store(f"p{k}", at, cast(new, dtype)), Store(f"m{k}", at, m), Store(f"v{k}", at, v))
    return Region(f"r{k}", Nest((x,) if size > 1 else (), (), stores), specs, CUDA)


def batch_of(sizes: list[int], dtype: torch.dtype = F32) -> Batch:
    (found,) = steps_of("test", [adam(k, size, dtype) for k, size in enumerate(sizes)])
    assert isinstance(found, Batch)
    return found


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_golden_text(dtype: torch.dtype) -> None:
    """EXPECTTEST_ACCEPT=1 accepts a change."""
    batch = batch_of(BERT, dtype)
    source = print_batch(batch, batch_candidates(batch, TARGET)[0], TARGET)
    options = source.compile_options
    text = f"# grid {source.grid}, {options['num_warps']} warps, {options['constexprs']}\n{source.text}"
    path = GOLDEN / f"triton_batch_{'bf16' if dtype == BF16 else 'f32'}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(text)
    assert path.exists(), f"no golden text {path.name}: run with EXPECTTEST_ACCEPT=1"
    assert text == path.read_text()


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64])
def test_every_candidate_tried_by_default_compiles_without_spills(dtype: torch.dtype, arch: int) -> None:
    target, batch = Target.cuda(arch), batch_of(BERT, dtype)
    for config in batch_candidates(batch, target)[:2]:
        cubin, meta = compile_triton(print_batch(batch, config, target), target)
        assert cubin[:4] == b"\x7fELF" and meta["n_spills"] == 0 and 0 < meta["n_regs"] <= 128
        assert meta["parameters"] == ["ptr"] * 3


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_whole_blocks_of_aligned_memory_are_accessed_sixteen_bytes_at_once(dtype: torch.dtype) -> None:
    batch = batch_of(BERT, dtype)
    config = batch_candidates(batch, TARGET)[0]
    ptx = compile_to_text(print_batch(batch, config, TARGET), TARGET, "ptx")
    per_thread = config.x_block // (32 * config.num_warps)
    for what, names in (("ld", "pgmv"), ("st", "pmv")):
        wide = len(re.findall(rf"\b{what}\.global[.\w:]*\.v4\.b32", ptx))
        assert wide == sum(per_thread * batch.buffers[f"{n}0"].dtype.itemsize // 16 for n in names)
    assert ptx.count("st.global") > 3, "and there is another body for the rest"


def test_sizes_and_numbers_of_members_are_no_part_of_the_kernel() -> None:
    config = TritonConfig(1024)
    one, other = (print_batch(batch_of(sizes), config, TARGET) for sizes in ([5000] * 8, [1, 3000, 1 << 20, *range(1, 9)]))
    assert one.text == other.text and one.key("t") == other.key("t")
    assert (one.grid, one.members, one.block) == ((40, 1, 1), (5000,) * 8, 1024)
    assert other.grid == (1 + 3 + 1024 + 8, 1, 1)
    assert other.buffers[:5] == tuple(f"{n}0" for n in ("p", "m", "g", "v", "step")) and len(other.buffers) == 55


def test_a_member_of_one_element_reads_what_the_others_read() -> None:
    batch = batch_of([1, *range(2, 9)])
    assert batch.elements[0] == 1 and [bool(s.shape) for s in batch.body.buffers.values()] == [True] * 4 + [False]
    alone = batch_of([1] * 8)
    assert all(s.shape for s in alone.body.buffers.values())


def test_the_sample_that_is_measured_runs_the_same_kernel() -> None:
    batch = batch_of(BERT)
    source = print_batch(batch, TritonConfig(1024), TARGET)
    part = for_members(source, batch.sample(1 << 20))
    assert part.key("t") == source.key("t") and part.grid[0] < source.grid[0]
    assert len(part.buffers) == 5 * len(part.members)


def test_blocks_are_no_larger_than_members() -> None:
    assert batch_candidates(batch_of([1] * 8), TARGET) == [TritonConfig(32, num_warps=1)]
    assert batch_candidates(batch_of([100] * 8), TARGET)[0].x_block == 128
    first = batch_candidates(batch_of(BERT), TARGET)
    assert first[0] == TritonConfig(1024, num_warps=4) and len(first) > 2


def test_what_triton_does_not_hold_is_refused() -> None:
    region = adam(0, 64, F32)
    specs = {n: replace(s, dtype=torch.complex64) for n, s in region.buffers.items()}
    (batch,) = steps_of("test", [replace(region, buffers=specs)] * 8)
    assert isinstance(batch, Batch)
    with pytest.raises(UnsupportedError):
        print_batch(batch, TritonConfig(64), TARGET)
    with pytest.raises(UnsupportedError):
        print_batch(batch_of(BERT), TritonConfig(64), Target.cpu())


def chosen(k: int, size: int, dtype: torch.dtype) -> Region:
    """a, and where the mask `c` says so, the first element of `s` added (booleans: exclusive or)."""
    x, at = Sym("x0", size=size), symbol(Sym("x0", size=size)) if size > 1 else 0
    a, s = Load(f"a{k}", at, dtype), Load(f"s{k}", 0, dtype)
    both = Op("bitwise_xor", (a, s), dtype) if dtype == BOOL else op("add", cast(a, wide(dtype)), cast(s, wide(dtype)))
    value = Op("where", (Load(f"c{k}", at, BOOL), cast(both, dtype), a), dtype)
    specs = {f"{n}{k}": BufferSpec(f"{n}{k}", BOOL if n == "c" else dtype, CUDA, (size,), (1,)) for n in "aco"}
    specs[f"s{k}"] = BufferSpec(f"s{k}", dtype, CUDA, (3,), (1,))
    return Region(f"r{k}", Nest((x,) if size > 1 else (), (), (Store(f"o{k}", at, value),)), specs, CUDA)


def wide(dtype: torch.dtype) -> torch.dtype:
    return F32 if dtype.itemsize == 2 and dtype.is_floating_point else dtype


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16, torch.float64, I64, torch.int8, torch.uint8, BOOL], ids=str)
def test_values(interpreter: Interpreter, dtype: torch.dtype) -> None:
    sizes = [1, 2, 64, 65, 130, 7, 1, 128, 200]
    (batch,) = steps_of("test", [chosen(k, size, dtype) for k, size in enumerate(sizes)])
    assert isinstance(batch, Batch)
    memory = {
        n: torch.randint(0, 2 if n[0] in "c" or dtype == BOOL else 9, s.shape).to(s.dtype) for n, s in batch.buffers.items()
    }
    source = print_batch(batch, TritonConfig(64), TARGET)
    compile_triton(source, TARGET)
    interpreter.run(source, memory)
    for k in range(len(sizes)):
        a, s, c, o = (memory[f"{n}{k}"] for n in "asco")
        assert torch.equal(o, torch.where(c, a ^ s[0] if dtype == BOOL else a + s[0], a))
