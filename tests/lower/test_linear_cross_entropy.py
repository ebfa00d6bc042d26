"""A large head's loss taken apart as on GPUs: its steps, its kernels and the memory that the plan needs.

That its values are right is tests/passes/test_linear_cross_entropy.py's business, which compiles it for CPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.assemble import assemble
from fxopt.capture.symbols import to_int
from fxopt.codegen import triton
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.kernel import Artifact
from fxopt.ir.linear_cross_entropy_op import (
    MAX_CHUNK,
    MOST_CHUNKS,
    Chunks,
    linear_cross_entropy_backward,
    linear_cross_entropy_op,
    plan_chunks,
)
from fxopt.ir.region import Alias, Call, Region, refs
from fxopt.journal import Journal
from fxopt.lower import Lowered, lower_graph
from fxopt.lower.ops import linear_cross_entropy as lowering
from fxopt.lower.schedule import schedule
from fxopt.runtime.lifetimes import nbytes
from fxopt.runtime.plan import Free, Plan, defined, used
from fxopt.target import Target
from fxopt.tune import Choice
from tests.lower.capturing import library_calls, moved
from tests.lower.interpreter import run_lowered
from tests.passes.test_linear_cross_entropy import compiled, loss_of, operands, with_gradients

SM90 = Target.cuda(90)
VOCABULARY = 128 * 1024
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "runs_apart", lambda device: True)


def captured(
    rows: int,
    features: int,
    classes: int,
    dtype: torch.dtype,
    *,
    reduction: str = "mean",
    smoothing: float = 0.0,
    bias: bool = False,
    weighted: bool = False,
    wanted: bool = True,
    backward: bool = False,
) -> Graph:
    """The op, or its backward, on fake tensors."""
    flags = [wanted, wanted, wanted and bias]

    def step(h: Any, w: Any, b: Any, y: Any, c: Any, g: Any) -> Any:
        given = (h, w, b if bias else None, y, c if weighted else None, reduction, -100, smoothing, torch.float32, flags)
        return linear_cross_entropy_backward(g, *given) if backward else linear_cross_entropy_op(*given)

    with FakeTensorMode():
        floats = (torch.empty(s, dtype=dtype) for s in ((rows, features), (classes, features), (classes,)))
        per_row = (rows,) if reduction == "none" else ()
        others = torch.empty(rows, dtype=torch.int64), torch.empty(classes), torch.empty(per_row)
        gm = make_fx(step)(*floats, *others)
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    return Graph(gm, [Input(n, Role.USER) for n in names], Phase.INFERENCE, "test", to_int)


def scheduled(graph: Graph) -> Lowered:
    return schedule(moved(lower_graph(graph, Journal("test")), "cuda:0"))


def kernels(lowered: Lowered) -> dict[str, triton.Printed]:
    """Each region printed in the cost model's best configuration."""
    regions = [s for s in lowered.steps if isinstance(s, Region)]
    return {r.name: triton.print_region(r, triton.configs(r, SM90)[0], SM90) for r in regions}


# ---------------------------------------------------------------------- steps


def products_and_more(lowered: Lowered) -> list[str]:
    return [op.partition("::")[2].partition(".")[0] for op in library_calls(lowered)]


def test_a_chunk_is_three_products_and_one_kernel() -> None:
    low = scheduled(captured(8192, 2048, VOCABULARY, BF16))
    assert products_and_more(low) == ["mm", "slice_copy", "mm", "add_product_"] * 4 + ["cat"]
    large = [s for s in low.steps if isinstance(s, Region) and len(s.nest.points) == len(s.nest.reduced) == 1]
    assert len(large) == 4
    texts = {kernels(low)[r.name].kernels[0].text for r in large}
    assert len(texts) == 1, "each chunk has a kernel of its own"


def test_without_gradients_a_chunk_is_one_product_and_one_kernel() -> None:
    low = scheduled(captured(8192, 2048, VOCABULARY, BF16, reduction="none", wanted=False))
    assert products_and_more(low) == ["mm", "slice_copy"] * 2 + ["cat"]


@pytest.mark.parametrize("backward", [False, True])
def test_all_options_are_one_region_a_chunk(backward: bool) -> None:
    """With the sum of the bias's gradient over the chunk's rows, whose last one also rounds it."""
    reduction = "none" if backward else "mean"
    options: dict[str, Any] = {"smoothing": 0.1, "weighted": True, "bias": True, "reduction": reduction}
    low = scheduled(captured(8192, 2048, 50257, BF16, backward=backward, **options))
    large = [s for s in low.steps if isinstance(s, Region) and len(s.nest.points) == len(s.nest.reduced) == 1]
    assert 2 * len(large) == products_and_more(low).count("addmm") and all(r.across is not None for r in large)
    printed = kernels(low)
    assert len({tuple(k.text for k in printed[r.name].kernels) for r in large}) == 2


@pytest.mark.parametrize(("classes", "bias"), [(50257, False), (50257, True), (50263, True), (50260, False)])
def test_products_over_an_odd_vocabulary_have_whole_lines_of_16_bytes(classes: int, bias: bool) -> None:
    """Each operand and result begins at one, and its rows, which lie along memory, have a multiple of eight elements."""
    low = scheduled(captured(8192, 1024, classes, BF16, bias=bias))
    views = {step.name: step for step in low.steps if isinstance(step, Alias)}
    products = [s for s in low.steps if isinstance(s, Call) and ("mm." in s.op or "add_product_" in s.op)]
    assert len(products) % 6 == 0 and products, "three for the last classes, three for all others"
    for product in products:
        for name in refs((product.args, product.kwargs)):
            spec = views.get(name) or low.buffers[name]
            offset = spec.offset if isinstance(spec, Alias) else 0
            along = spec.strides.index(1)
            assert [n % 8 for n in (offset, spec.shape[along], *spec.strides[:along], *spec.strides[along + 1 :])] == [0] * (
                len(spec.shape) + 1
            )


def test_exact_products_over_an_odd_vocabulary_are_whole() -> None:
    low = scheduled(captured(8192, 1024, 50257, F32))
    assert products_and_more(low).count("mm") == 2 * products_and_more(low).count("add_product_")


@pytest.mark.parametrize("change", ["device", "sizes"])
def test_elsewhere_the_op_stays(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = captured(8192, 64, 8192, BF16)
    if change == "device":
        monkeypatch.setattr(lowering, "runs_apart", lambda device: device.type == "cuda")
    else:
        graph = captured(0, 64, 8192, BF16)
    assert products_and_more(lower_graph(graph, Journal("test"))) == ["linear_cross_entropy"]


# ---------------------------------------------------------------------- chunks


@pytest.mark.parametrize("rows", [1, 700, 2048, 8188, 8192, 8191, 100_000, 1 << 20])
@pytest.mark.parametrize("features", [256, 4096])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_chunks_are_few_and_even(rows: int, features: int, dtype: torch.dtype) -> None:
    chunks = plan_chunks(rows, features, dtype, F32, True, True)
    count = -(-rows // chunks.rows)
    assert 1 <= count <= 2 * MOST_CHUNKS
    assert chunks.rows <= max(MAX_CHUNK, -(-rows // MOST_CHUNKS))
    assert count * chunks.rows - rows < count, "the last chunk has fewer rows than it need have"


def test_what_the_weights_gradient_is_summed_in() -> None:
    assert plan_chunks(8192, 2048, BF16, F32, True, True).sums == F32
    assert plan_chunks(8192, 4096, BF16, F32, True, True).sums == BF16, "float32 sums would be more than a fifth of eager's"
    assert plan_chunks(8192, 4096, BF16, F32, True, False).rows == MAX_CHUNK, "there are none"
    assert plan_chunks(8192, 4096, F16, F32, True, True).sums == F32, "scaled sums may leave float16's range"


# ---------------------------------------------------------------------- memory


def planned(graph: Graph, lowered: Lowered) -> Plan:
    """The plan with kernels that are printed but not compiled."""
    chosen = {}
    for name, printed in kernels(lowered).items():
        built = ((k, Artifact(k.key, k.language, k.entry, Path("none"))) for k in printed.kernels)
        chosen[name] = Choice("", tuple(built), printed.scratch)
    return assemble(graph, lowered, chosen, Journal("test"))


def peak_bytes(plan: Plan) -> int:
    """Most bytes that the plan has allocated at a time: its buffers, slots and the results of its calls, as it runs."""
    sizes = {spec.name: int(nbytes(spec)) for spec in plan.buffers}
    waiting = [{n for n, s in plan.placement.items() if s == slot} for slot in range(len(plan.slots))]
    live: dict[str | int, int] = {}
    most = 0
    for step in plan.steps:
        for name in (*used(step), *defined(step)):
            if name in plan.placement:
                slot = plan.placement[name]
                live[slot] = int(plan.slots[slot].nbytes)
            elif name in sizes:
                live[name] = sizes[name]
        most = max(most, sum(live.values()))
        for name in step.names if isinstance(step, Free) else ():
            live.pop(name, None)
            if name in plan.placement:
                waiting[plan.placement[name]].discard(name)
                if not waiting[plan.placement[name]]:
                    live.pop(plan.placement[name])
    return most


@pytest.mark.parametrize(
    ("rows", "features", "dtype"),
    [(2048, 512, BF16), (4096, 1024, BF16), (8192, 1024, BF16), (8192, 2048, BF16), (8192, 4096, BF16), (8192, 2048, F32)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_plan_needs_a_fifth_of_eagers_memory(rows: int, features: int, dtype: torch.dtype, bias: bool) -> None:
    """Eager has the log-softmax, its gradient and that of the logits in float32, all of them at once."""
    graph = captured(rows, features, VOCABULARY, dtype, bias=bias)
    peak = peak_bytes(planned(graph, scheduled(graph)))
    assert rows * VOCABULARY * dtype.itemsize / 32 < peak <= 3 * rows * VOCABULARY * 4 / 5


# ---------------------------------------------------------------------- values


def test_the_schedule_for_gpus_computes_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """In-place updates of one buffer by several steps keep their order, also where rows are joined with sums over them."""
    monkeypatch.setattr(lowering, "plan_chunks", lambda *sizes: Chunks(640, F32))
    given = torch.randn(1600, 3), torch.randn(19, 3), torch.randn(19), torch.randint(0, 19, (1600,)), torch.rand(19)
    given[3][::7] = -100
    graph = captured(1600, 3, 19, F32, bias=True, weighted=True, smoothing=0.1)
    low = scheduled(graph)
    assert products_and_more(low).count("add_product_") == 3
    assert any(step.across is not None for step in low.steps if isinstance(step, Region))
    actual = run_lowered(moved(low, "cpu"), dict(zip(low.inputs, (*given, torch.zeros(())), strict=True)))
    settings = ("mean", -100, 0.1, F32, [True, True, True])
    torch.testing.assert_close(actual, list(linear_cross_entropy_op(*given, *settings)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("classes", [19, 16, 23, 7])
def test_the_classes_beyond_whole_lines_are_computed_apart(
    classes: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by the exact values: these sums are rounded as often as the whole ones."""
    monkeypatch.setattr(lowering, "plan_chunks", lambda *sizes: Chunks(64, F32))
    rows, features = 150, 8
    floats = torch.randn(rows, features), torch.randn(classes, features), torch.randn(classes)
    h, w, b = (x.to(BF16) for x in floats)
    labels = torch.randint(0, classes, (rows,))
    labels[::2] = classes - 1
    labels[5], h[5, 2] = -100, float("nan")
    others = labels, torch.ones(classes), torch.zeros(())
    low = scheduled(captured(rows, features, classes, BF16, bias=bias))
    loss, of_hidden, of_weight, of_bias = run_lowered(
        moved(low, "cpu"), dict(zip(low.inputs, (h, w, b, *others), strict=True))
    )
    wide = [x.double().requires_grad_() for x in (h, w, b)]
    logits = wide[0][labels != -100] @ wide[1].t() + (wide[2] if bias else 0)
    exact = torch.nn.functional.cross_entropy(logits, labels[labels != -100])
    exact.backward()
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(of_hidden.double(), wide[0].grad, rtol=2e-2, atol=5e-4)
    torch.testing.assert_close(of_weight.double()[:, 3:], wide[1].grad[:, 3:], rtol=2e-2, atol=5e-4)
    if bias:
        torch.testing.assert_close(of_bias.double(), wide[2].grad, rtol=2e-2, atol=5e-4)


def test_nan_in_a_row_that_does_not_count_reaches_the_weight_as_in_eager(
    monkeypatch: pytest.MonkeyPatch, fresh_cache: Path
) -> None:
    monkeypatch.setattr("fxopt.passes.linear_cross_entropy.MIN_BYTES", 0)
    monkeypatch.setattr("fxopt.passes.linear_cross_entropy.MIN_CLASSES", 2)
    hidden, weight, bias, labels = operands()
    with torch.no_grad():
        hidden[0, 2, 3] = float("nan")  # its label is ignored
    step = loss_of()
    loss, of_hidden, of_weight, _ = with_gradients(compiled(step), hidden, weight, bias, labels)
    expected = with_gradients(step, hidden, weight, bias, labels)
    torch.testing.assert_close(loss, expected[0])
    assert of_weight[:, 3].isnan().all() and expected[2][:, 3].isnan().all()
    assert not of_hidden.isnan().any(), "eager has NaN for this row"
