"""Kernels that may be launched early: where they wait, in machine code, and what they load before."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.codegen import triton_nests as nests
from tests.codegen.gemm_entries import entry, problem
from tests.codegen.test_attention_templates import COMPILED as ATTENTION
from tests.codegen.test_triton_batch import BERT, batch_of
from tests.codegen.test_triton_values import check
from tests.codegen.triton_interpreter import Interpreter
from tests.codegen.triton_nests import BF16, F32, Case

pytest.importorskip("triton")

from fxopt.codegen.templates import attention_config
from fxopt.codegen.templates.gemm_problem import GemmConfig
from fxopt.codegen.triton import configs, print_region
from fxopt.codegen.triton_attention import print_attention
from fxopt.codegen.triton_batch import batch_candidates, print_batch
from fxopt.codegen.triton_build import compile_to_text, compile_triton
from fxopt.codegen.triton_chain import OTHERS_END, chained
from fxopt.ir.kernel import KernelSource
from fxopt.target import Target

H100 = Target.cuda(90)
WAIT = "griddepcontrol.wait"
GLOBAL = re.compile(r"\b(?:ld|st|atom|red)\.(?:\w+\.)*global|cp\.async|cp\.reduce")


def first(case: Case) -> KernelSource:
    return print_region(case.region, configs(case.region, H100)[0], H100).kernels[0]


def attention() -> KernelSource:
    step = ATTENTION["static cache"]
    return print_attention(step, attention_config.configs(step, H100)[0], H100).kernels[0]


KERNELS: dict[str, Callable[[], KernelSource]] = {
    "pointwise": lambda: first(nests.pointwise(1 << 20, BF16)),
    "looped": lambda: first(nests.softmax(512, 100_000, F32)),
    "symbolic": lambda: first(nests.broadcast_symbolic()),
    "atomic": lambda: first(nests.scatter_add()),
    "product": lambda: entry(problem(256, 512, 512, dtype=BF16), GemmConfig(False, 64, 64, 64, 4, 3)),
    "product by tensor maps": lambda: entry(problem(256, 512, 512, dtype=BF16), GemmConfig(True, 64, 64, 64, 4, 3)),
    "attention": attention,
}


def around_the_wait(source: KernelSource) -> tuple[list[str], list[str]]:
    """The instructions on global memory before and after the kernel has waited."""
    ptx = compile_to_text(source, H100, "ptx")
    ptx = ptx[ptx.index(".entry") :]
    assert ptx.count(WAIT) == 1 and ptx.count("griddepcontrol.launch_dependents") == 1
    before, after = ([line for line in part.splitlines() if GLOBAL.search(line)] for part in ptx.split(WAIT))
    return [line for line in before if ".param" not in line], after


@pytest.mark.parametrize("name", KERNELS)
def test_memory_is_touched_when_others_have_ended(name: str) -> None:
    before, after = around_the_wait(KERNELS[name]())
    assert not before
    assert after


def test_parts_of_the_keys_are_brought_while_others_are_waited_for() -> None:
    """Into the L2 cache and no further: somebody may write them."""
    source = attention()
    assert source.entry.endswith("split")
    ptx = compile_to_text(source, H100, "ptx")
    before, after = ptx[ptx.index(".entry") :].split(WAIT)
    assert before.count("prefetch.global.L2") >= 2 and "prefetch" not in after


def weighted_norm() -> Case:
    """A residual norm whose weight `w` and bias `c` nothing writes."""
    case = nests.layer_norm(2, 1024, BF16)
    return replace(case, region=replace(case.region, steady=frozenset("wc")))


def test_weights_are_loaded_before_others_have_ended() -> None:
    source = first(weighted_norm())
    before, after = around_the_wait(source)
    body = source.text[source.text.index("def fx_") :]
    loaded, rest = body.split(OTHERS_END)
    assert loaded.count("tl.load") == 2 and rest.count("tl.load") == 2
    assert before and not any("st." in line for line in before)
    assert sum("ld." in line for line in after) == len(before)


def test_values_with_weights_loaded_first(interpreter: Interpreter) -> None:
    case = weighted_norm()
    for config in configs(case.region, H100)[:2]:
        check(interpreter, case, config)


def test_other_targets_and_batches_know_nothing_of_it() -> None:
    source = first(nests.pointwise(1 << 20, BF16))
    assert WAIT not in compile_to_text(source, Target.cuda(80), "ptx")
    assert compile_triton(source, Target.cuda(80))[1]["chained"] is False
    assert compile_triton(source, H100)[1]["chained"] is True
    batch = batch_of(BERT)
    printed = print_batch(batch, batch_candidates(batch, H100)[0], H100)
    assert "griddepcontrol" not in compile_to_text(printed, H100, "ptx")
    assert compile_triton(printed, H100)[1]["chained"] is False


def test_a_kernel_that_is_not_found_is_an_error() -> None:
    with pytest.raises(ValueError, match="no function kernel"):
        chained("def other(b0):\n    pass\n", "kernel")
