"""Kernels for Hopper that write registers which products still read are refused; others are not."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from fxopt.codegen.compile import compile_kernels
from fxopt.codegen.triton_build import compile_to_text, compile_triton
from fxopt.codegen.triton_in_flight import written_while_read
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target

HOPPER = Target.cuda(90)

HEAD = """import triton
import triton.language as tl
from fxopt.codegen.templates.weight_gemm import finished


@triton.jit
def fx_product(b0, b1, b2):
    y, n, k = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 64)
    acc = tl.zeros([64, 64], tl.float32)
"""
ONCE = "    {0} = tl.load(b0 + y[:, None] * 1024 + k[None, :]){1}\n"
STEP = """    for start in range(0, 1024, 64):
        left = tl.load(b0 + y[:, None] * 1024 + (start + k)[None, :])
        right = tl.load(b1 + n[None, :] * 1024 + (start + k)[:, None])
"""
STORE = "    tl.store(b2 + y[:, None] * 64 + n[None, :], acc)\n"


def kernel(step: str, left: str = "*i8", once: str = "") -> KernelSource:
    names = ("b0", "b1", "b2")
    options = {
        "signature": {"b0": left, "b1": "*bf16", "b2": "*fp32"},
        "constexprs": {},
        "aligned": list(names),
        "num_warps": 4,
        "num_stages": 3,
        "asserts": False,
    }
    return KernelSource("triton", "fx_product", HEAD + once + STEP + step + STORE, names, compile_options=options)


WIDENED = "        acc = tl.dot(left.to(tl.bfloat16), right, acc)\n"
ADDED = "        acc += tl.dot(left.to(tl.bfloat16), right)\n"
ROUNDED = "        acc = tl.dot(tl.exp2(left.to(tl.float32)).to(tl.bfloat16), right, acc)\n"

SHARED = "        acc = tl.dot(left, right, acc)\n"
SCALED = "        acc = acc * 0.5 + tl.dot(left.to(tl.bfloat16), right)\n"
FINISHED = "        acc = finished(tl.dot(left.to(tl.bfloat16), right, acc))\n"
BEFORE = "        acc = tl.dot(before, right, acc)\n"


@pytest.mark.parametrize(("step", "left"), [(WIDENED, "*i8"), (ADDED, "*i8"), (ROUNDED, "*bf16")])
def test_products_that_run_on_into_the_next_step_are_refused(step: str, left: str) -> None:
    bad = kernel(step, left)
    with pytest.raises(ValueError, match="registers that the loop's next step writes"):
        compile_triton(bad, HOPPER)
    assert written_while_read(compile_to_text(bad, HOPPER, "ttgir")) is not None, "a text for whoever wants to look"
    compile_triton(bad, Target.cuda(80))  # whose products have no such operands


@pytest.mark.parametrize(("step", "left"), [(SHARED, "*bf16"), (SCALED, "*i8"), (FINISHED, "*i8")])
def test_products_that_end_in_their_step_are_not(step: str, left: str) -> None:
    text = compile_to_text(kernel(step, left), HOPPER, "ttgir")
    assert "ttng.warp_group_dot " in text and written_while_read(text) is None
    assert (step == SHARED) == ("#ttg.dot_op" not in text)
    compile_triton(kernel(step, left), HOPPER)


def test_registers_that_no_step_writes_are_read_at_any_time() -> None:
    once = ONCE.format("before", ".to(tl.bfloat16)")
    text = compile_to_text(kernel(BEFORE, once=once), HOPPER, "ttgir")
    assert "ttng.warp_group_dot " in text and written_while_read(text) is None


PRODUCT = """
  %w{0} = ttg.local_load %b : !ttg.memdesc<64x16xbf16, #shared> -> tensor<64x16x2xbf16, #ttg.dot_op<{{opIdx = 0}}>>
  %v{0}, %u{0} = tt.split %w{0} : tensor<64x16x2xbf16, #d> -> tensor<64x16xbf16, #d> loc(#loc1)
  %p{0} = ttng.warp_group_dot %v{0}, %x, %c {{isAsync = true}} : tensor<64x16xbf16, #d> * !ttg.memdesc<16x64xbf16> -> t"""
IN_MEMORY = "\n  %s = ttng.warp_group_dot %a, %b, %c {isAsync = true} : !ttg.memdesc<64x16> * !ttg.memdesc<16x64> -> t"
WAIT = "\n  %r:2 = ttng.warp_group_dot_wait %p, %x {{pendings = {0} : i32}} : tensor<64x64xf32, #mma>"
ONE, TWO = PRODUCT.format(1), PRODUCT.format(2)
ALL, ALL_BUT_LAST = WAIT.format(0), WAIT.format(1)


def loop(body: str) -> str:
    return "%acc:2 = scf.for %i = %c0 to %c9 step %c1 iter_args(%a = %z) -> (t)  : i32 {" + body + "\n} loc(#loc)"


def branch(body: str, other: str = "") -> str:
    return "\n  scf.if %yes {" + body + "\n  } else {" + other + "\n  } loc(#loc2)"


@pytest.mark.parametrize(
    "text",
    [
        loop(ONE + TWO + ALL_BUT_LAST),
        loop(ONE + WAIT.format(3) + TWO),
        loop(ONE + branch(ALL)),
        loop(branch(ONE, ALL)),
        loop(loop(ONE + ALL_BUT_LAST)),
        loop(IN_MEMORY + WAIT.format(2) + ONE),
        loop(ONE + loop(IN_MEMORY + WAIT.format(3))),
        "%acc = scf.while (%a = %z) : (t) -> t {\n} do {\n^bb0(%a: t):" + ONE + "\n} loc(#loc)",
    ],
)
def test_what_is_found(text: str) -> None:
    assert written_while_read(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        loop(ONE + TWO + ALL),
        loop(IN_MEMORY + ALL + ONE),
        loop(ONE + IN_MEMORY + ALL_BUT_LAST),
        loop(branch(ONE + ALL, ONE + ALL)),
        loop(ONE + ALL) + TWO,
        ONE + loop(IN_MEMORY + ALL_BUT_LAST),
        loop(ONE.replace(" {isAsync = true}", "")),
    ],
)
def test_what_is_right(text: str) -> None:
    assert written_while_read(text) is None


def test_the_reason_is_told(tmp_path: Path) -> None:
    good, bad = kernel(FINISHED), kernel(WIDENED)
    built, refused = compile_kernels([good, bad], HOPPER, ArtifactStore(tmp_path / "cache"))
    assert isinstance(built, Artifact)
    assert isinstance(refused, CompileFailure) and "registers that the loop's next step writes" in refused.reason
