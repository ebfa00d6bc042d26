"""The cost model of matrix products: what is proposed and what it should take. Figures are an H100's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gemm_model import measured
from fxopt.codegen.templates.gemm_config import begun_apart, configs, library_seconds, plausible, ranked
from fxopt.codegen.templates.gemm_entry import gemm_call
from fxopt.codegen.templates.gemm_estimate import estimate, tile_seconds
from fxopt.codegen.templates.gemm_problem import GemmConfig, GemmProblem
from fxopt.target import Target
from fxopt.tune.candidate import GEMM_CANDIDATES, _close, _may_win
from tests.codegen.gemm_entries import matrix, problem

H100, A100, B200 = Target.cuda(90), Target.cuda(80), Target.cuda(100)
BF16 = torch.bfloat16
SHAPES = [(4096, 4096, 4096), (4096, 3072, 768), (12608, 768, 3072), (128, 768, 768), (197, 2304, 768), (1, 14336, 4096)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", [A100, H100, B200], ids=lambda t: t.name)
def test_proposals_fit_and_are_ordered(shape: tuple[int, int, int], target: Target) -> None:
    p = problem(*shape, dtype=BF16)
    proposed = configs(p, target)
    assert 1 <= len(proposed) <= 6
    assert len({c.kind for c in proposed}) == len(proposed) == len({str(c) for c in proposed})
    seconds = [estimate(p, c, target) for c in proposed]
    assert seconds == sorted(seconds) and seconds[0] < float("inf")
    assert all(c.shared_bytes(p) <= target.shared_per_block for c in plausible(p, target))


def test_large_products_take_large_tiles_and_persistent_programs() -> None:
    first = configs(problem(4096, 4096, 4096, dtype=BF16), H100)[0]
    assert first.tma and {first.block_m, first.block_n} == {128, 256} and first.programs == H100.sm_count


def test_few_tiles_split_the_inner_dimension() -> None:
    p = problem(128, 768, 12288, dtype=BF16)
    first = configs(p, H100)[0]
    assert first.split > 1
    assert estimate(p, first, H100) < estimate(p, replace(first, split=1), H100)


def test_few_rows_are_bound_by_memory() -> None:
    p = problem(8, 14336, 4096, dtype=BF16)
    seconds = estimate(p, configs(p, H100)[0], H100)
    assert p.operand_bytes / H100.memory_rate < seconds < 1.2 * p.operand_bytes / H100.memory_rate


def test_the_large_ones_of_the_library() -> None:
    """cuBLAS does 4096^3 in 178 us on an H100."""
    assert library_seconds(problem(4096, 4096, 4096, dtype=BF16), H100) == pytest.approx(178e-6, rel=0.15)


def test_no_descriptors_without_the_hardware_or_alignment() -> None:
    p = problem(4096, 4096, 4096, dtype=BF16)
    assert any(c.tma for c in plausible(p, H100))
    for q in (
        problem(4096, 4096, 4100, dtype=BF16),  # rows that begin at no multiple of 16 bytes
        replace(p, static=False),
        replace(p, a=replace(p.a, offset=1)),
        replace(p, a=replace(p.a, aligned=False)),
        replace(p, batch=2, a=replace(p.a, batch=4096 * 4096 + 8)),  # the second matrix begins within a row
        replace(p, a=replace(p.a, row=8192, column=2)),
    ):
        assert not any(c.tma for c in plausible(q, H100))
    assert not any(c.tma for c in plausible(p, A100))


def test_a_batch_along_the_inner_dimension_needs_whole_blocks() -> None:
    whole = problem(512, 512, 512, "nn", batch=2, dtype=BF16)
    assert any(c.tma for c in plausible(whole, H100))
    assert not any(c.tma for c in plausible(problem(512, 512, 520, "nn", batch=2, dtype=BF16), H100))


def test_exact_float32_is_left_to_the_library_but_for_few_rows() -> None:
    many, few = problem(2048, 2048, 2048), problem(8, 4096, 4096)
    assert configs(many, H100) == [] and configs(few, H100)
    assert configs(replace(many, precision="tf32"), H100)
    assert not any(c.swap for c in plausible(few, H100))


@pytest.mark.parametrize("rows", [16, 2048])
def test_tf32_operands_are_rounded_by_tensor_maps_where_the_inner_dimension_is_contiguous(rows: int) -> None:
    p = replace(problem(rows, 2048, 2048), precision="tf32")
    assert all(c.tma for c in plausible(p, H100)) and plausible(p, H100)
    maps = gemm_call(p, configs(p, H100, limit=1)[0]).tensor_maps
    assert all(m["rounds_to_tf32"] for m in maps.values())
    assert plausible(p, A100) == [], "pointers truncate"
    for layout in ("nn", "tt"):
        assert plausible(replace(problem(rows, 2048, 2048, layout), precision="tf32"), H100) == []


def test_impossible_configurations_take_forever() -> None:
    p = problem(4096, 4096, 4096, dtype=BF16)
    assert estimate(p, GemmConfig(True, 256, 256, 64, 8, 3), H100) == float("inf")  # registers
    assert estimate(p, GemmConfig(True, 128, 256, 128, 8, 4), H100) == float("inf")  # shared memory


def test_labels_tell_all_plausible_ones_apart() -> None:
    found = ranked(problem(128, 768, 3072, dtype=BF16), H100)
    assert len({str(c) for c in found}) == len(found) > 50
    assert str(GemmConfig(True, 128, 256, 64, 8, 4)) == "tma 128x256x64 w8 s4 g8"


def test_wide_offsets_are_asked_for() -> None:
    p = problem(128, 256, 512, dtype=BF16)
    assert not p.wide
    assert replace(p, b=matrix(2**23, 256)).wide


def test_proposals_are_close_to_the_best_that_was_measured() -> None:
    found = measured()
    regrets = [r for each in found if (r := each.regret(GEMM_CANDIDATES["default"])) is not None]
    assert len(regrets) >= 0.8 * len(found)
    assert sum(r <= 1.03 for r in regrets) >= 0.95 * len(regrets) and max(regrets) < 1.15


def test_what_the_model_has_far_behind_is_not_compiled() -> None:
    """Of the three best, those that are left out have not won by more than noise."""
    fewer = 0
    for each in measured():
        three = configs(each.problem, H100, limit=GEMM_CANDIDATES["default"])
        close = _close(each.problem, three, H100)
        assert list(close) == three[: len(close)] and len(close) >= min(2, len(three))
        fewer += len(three) - len(close)
        times = [each.seconds[c] for c in close if c in each.seconds]
        left_out = [each.seconds[c] for c in three[len(close) :] if c in each.seconds]
        assert not left_out or not times or min(times) <= 1.02 * min(left_out)
    assert fewer > 20


def test_the_library_is_estimated_as_it_was_measured() -> None:
    """Where that is neither the host's time, as in short products, nor bound by power, as in long ones."""
    some = [m for m in measured() if 25e-6 < m.library < 500e-6 and not (m.case.epilogue or m.case.name == "decode")]
    errors = [library_seconds(m.problem, H100) / m.library for m in some]
    assert len(some) >= 14 and all(0.88 < e < 1.08 for e in errors)


def test_expensive_epilogues_want_two_programs_on_a_multiprocessor() -> None:
    p = problem(4096, 3072, 768, dtype=BF16)
    gelu = replace(p, epilogue_ops=1.1)
    large, small = (
        GemmConfig(True, 128, 256, 64, 8, 4, subtile=2, programs=132, flatten=True),
        GemmConfig(True, 128, 128, 64, 8, 3, subtile=2, programs=264, flatten=True),
    )
    assert estimate(gelu, small, H100) < estimate(gelu, large, H100)
    assert estimate(gelu, small, H100) > estimate(p, small, H100) + 10e-6  # 14 us measured


def test_programs_of_a_multiprocessor_begin_a_tile_apart() -> None:
    """By what the products of one take it; where it holds two or more with several tiles each."""
    p = problem(4096, 3072, 768, dtype=torch.float8_e4m3fn)
    (two,) = (c for c in configs(p, H100) if c.programs == 264 and c.warps == 8)
    apart = begun_apart(p, two, H100)
    assert apart == replace(two, resident=2, apart=apart.apart) and str(apart).startswith(str(two))  # type: ignore[union-attr]
    assert apart.apart == pytest.approx(1e9 * tile_seconds(p, two, H100), abs=50)  # type: ignore[union-attr]
    assert f", RESIDENT=2, APART={apart.apart}, " in gemm_call(p, apart).text  # type: ignore[arg-type,union-attr]
    assert begun_apart(p, replace(two, programs=132), H100) is None
    assert begun_apart(p, replace(two, programs=0, flatten=False), H100) is None
    assert begun_apart(problem(1024, 3072, 768, dtype=torch.float8_e4m3fn), two, H100) is None


def test_what_is_worth_a_contest() -> None:
    """An epilogue, few rows, or what no tensor map describes; a plain product is the library's."""

    def worth(p: GemmProblem) -> bool:
        return _may_win(p, configs(p, H100), H100)

    large = problem(4096, 3072, 768, dtype=BF16)
    assert not worth(large) and worth(replace(large, epilogue_ops=0.02)) and worth(replace(large, epilogue_ops=1.1))
    assert worth(problem(16, 4096, 4096, dtype=BF16)) and worth(problem(111, 3075, 770, dtype=BF16))
    assert worth(replace(large, c=large.b, epilogue_ops=0.5))


def test_two_products_share_the_left_operand() -> None:
    p = problem(2048, 14336, 4096, dtype=BF16)
    dual = replace(p, c=p.b)
    assert dual.flops == 2 * p.flops and dual.operand_bytes < 2 * p.operand_bytes
    first = configs(dual, H100)[0]
    assert 1.8 < estimate(dual, first, H100) / estimate(p, configs(p, H100)[0], H100) < 2.4
    assert not any(c.split > 1 or c.swap for c in plausible(replace(dual, m=16), H100))
    with pytest.raises(ValueError, match="strides"):
        replace(p, c=matrix(4096, 14336))
