"""The backend of attention: the fastest of those that agree with eager's choice, remembered, within what the user allows.

There is no GPU here: timings are made up, and CPU tensors stand for a GPU's.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxopt.ir import attention_backends
from fxopt.ir.attention_backends import AUTO, BACKENDS, CUDNN, EFFICIENT, FLASH, MATH, Settings
from fxopt.ir.attention_op import attention, attention_forward
from fxopt.ir.region import BufferSpec, Call
from fxopt.journal import RECENT
from fxopt.lower.attention_calls import AttentionCall, Operand
from fxopt.passes import attention as attention_pass
from fxopt.runtime.graph_driver import CaptureError
from fxopt.runtime.plan_ops import DIRECT
from fxopt.target import Target
from fxopt.tune import attention as tune_attention
from fxopt.tune import measure
from fxopt.tune.attention import Problem

pytestmark = pytest.mark.usefixtures("fresh_cache")
CPU = torch.device("cpu")
Measured = list[Problem]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_pass, "chooses_late", lambda device: True)
    monkeypatch.setattr(tune_attention, "is_measurable", lambda device: True)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Measured]:
    """timed(flash=1.0, ...) makes these the times; the list returned receives the problems that were measured."""

    def make(**seconds: float) -> Measured:
        measured: Measured = []

        def time_backends(problem: Problem, device: torch.device) -> tuple[str, dict[str, float]]:
            measured.append(problem)
            return MATH, {name: s for name, s in seconds.items() if name in problem.candidates}

        monkeypatch.setattr(tune_attention, "time_backends", time_backends)
        return measured

    return make


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q + 1, k, v, is_causal=True) * 2


def run(*, train: bool = False, dynamic: bool = False, fn: Callable[..., Tensor] = attend, **options: Any) -> None:
    """Compile and run `fn` on small tensors, its backward too when `train`, and compare the values with eager's."""
    torch.compiler.reset()
    RECENT.clear()
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=train) for _ in range(3))
    compiled = torch.compile(fn, backend="fxopt", dynamic=dynamic, options={"strict": True, **options})
    with torch.set_grad_enabled(train):
        got, want = compiled(q, k, v), fn(q, k, v)
    torch.testing.assert_close(got, want)
    if train:
        own, eagers = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (got, want))
        torch.testing.assert_close(own, eagers)


def chosen() -> list[str]:
    """The backends that the journals tell, in order."""
    notes = [text for journal in RECENT for topic, text in journal.notes if topic == "attention"]
    return [text.partition(": ")[2].partition(" ")[0] for text in notes]


def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Receives the backend of every forward without gradients that is run from now on."""
    seen: list[str] = []
    original = torch.ops.fxopt.attention.default

    def spy(*args: Any, backend: str = AUTO, **kwargs: Any) -> Any:
        seen.append(backend)
        return original(*args, **kwargs)

    monkeypatch.setitem(DIRECT, "fxopt::attention.default", spy)
    return seen


def test_the_fastest_runs(timed: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch) -> None:
    timed(math=1.0, flash=0.9, cudnn=0.5, efficient=0.8)
    seen = told(monkeypatch)
    run()
    assert chosen() == [CUDNN]
    assert seen == [CUDNN]


@pytest.mark.parametrize(("flash", "winner"), [(0.98, MATH), (0.96, FLASH)])
def test_eagers_choice_stays_unless_another_wins_by_more_than_noise(
    flash: float, winner: str, timed: Callable[..., Measured]
) -> None:
    timed(math=1.0, flash=flash)
    run()
    assert chosen() == [winner]


def test_eagers_rule_holds_where_its_choice_could_not_be_timed(timed: Callable[..., Measured]) -> None:
    timed(flash=1.0)
    run()
    assert chosen() == [AUTO]


def test_forward_and_backward_are_one_contest(timed: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided with the forward; the winner's own backward runs."""
    measured = timed(math=1.0, flash=0.5)
    ran: list[str] = []
    monkeypatch.setattr(attention_backends, "_refusals", set())
    for table in (attention_backends._FORWARD, attention_backends._BACKWARD):

        def by_flash(*given: Any, by_math: Any = table[MATH]) -> Any:
            ran.append(FLASH)
            return by_math(*given)

        monkeypatch.setitem(table, FLASH, by_flash)
    run(train=True)
    assert [p.op for p in measured] == ["fxopt::attention_forward.default"]
    assert chosen() == [FLASH]
    assert ran == [FLASH, FLASH]


def test_eagers_choice_without_a_record_to_name_it_is_its_rule(
    timed: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN is no candidate for unknown sizes, though eager may choose it for the sizes that were assumed."""
    measured = timed()
    monkeypatch.setattr(tune_attention, "time_backends", lambda p, d: measured.append(p) or (CUDNN, {CUDNN: 1.0}))
    for _ in range(2):
        run(dynamic=True)
        assert chosen() == [AUTO]
    assert len(measured) == 1


def test_records_are_used_again_and_equal_calls_are_one_contest(timed: Callable[..., Measured]) -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(attend(q, k, v), k, v)

    measured = timed(math=1.0, flash=0.5)
    run(fn=twice)
    assert len(measured) == 1
    run(fn=lambda q, k, v: attend(q, k, v) + 3)  # another plan
    assert len(measured) == 1
    assert chosen() == [FLASH]


def test_backends_that_the_user_switched_off_are_no_candidates(timed: Callable[..., Measured]) -> None:
    measured = timed(math=1.0, flash=0.2, cudnn=0.3, efficient=0.4)
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
        run()
    assert measured[0].candidates == (EFFICIENT, MATH)
    assert chosen() == [EFFICIENT]
    run()  # neither the plan nor the record of other flags
    assert chosen() == [FLASH]
    assert len(measured) == 2


def test_nothing_is_chosen_where_the_user_has_chosen(timed: Callable[..., Measured]) -> None:
    measured = timed(math=1.0, flash=0.2)
    with sdpa_kernel(SDPBackend.MATH):
        run()
    torch.use_deterministic_algorithms(True)
    try:
        run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not measured


def test_no_plan_for_every_new_size(timed: Callable[..., Measured]) -> None:
    """cuDNN builds one, which takes longer than many calls."""
    measured = timed(math=1.0, cudnn=0.1, flash=0.5)
    run(dynamic=True)
    assert set(measured[0].candidates) == set(BACKENDS) - {CUDNN}
    assert chosen() == [FLASH]


def test_without_time_nothing_is_measured(timed: Callable[..., Measured]) -> None:
    measured = timed(math=1.0, flash=0.2)
    run(tuning_seconds=0)
    assert not measured
    assert chosen() == []


def test_a_spent_budget_leaves_eagers_rule_and_no_plan(
    timed: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = timed(math=1.0, flash=0.2)
    monkeypatch.setitem(tune_attention.BUDGET_SECONDS, "default", 0.0)
    run()
    assert not measured
    monkeypatch.setitem(tune_attention.BUDGET_SECONDS, "default", 5.0)
    run()
    assert len(measured) == 1


# ---------------------------------------------------------------------- the rule without measuring


def call_of(
    shape: tuple[int, ...] = (2, 16, 1024, 128),
    *,
    keys: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    mask: bool = False,
) -> AttentionCall:
    batch, heads, rows, width = shape

    def operand(*sizes: int) -> Operand:
        return Operand(dtype, CPU, sizes, torch.empty(sizes, device="meta").stride(), 0)

    operands = {name: operand(batch, heads, keys or rows, width) for name in ("key", "value")}
    operands["query"] = operand(*shape)
    if mask:
        operands["attn_mask"] = operand(batch, 1, rows, keys or rows)
    out = BufferSpec("out", dtype, CPU, shape, operands["query"].strides)
    return AttentionCall(Call("fxopt::attention.default", ()), operands, Settings(causal), (out,))


@pytest.mark.parametrize(
    ("call", "arch", "backend"),
    [
        (call_of(), 90, CUDNN),
        (call_of((2, 16, 1024, 64), causal=True), 90, CUDNN),
        (call_of(keys=77), 90, CUDNN),
        (call_of(), 80, AUTO),
        (call_of(dtype=torch.float32), 90, AUTO),
        (call_of((2, 16, 1, 128), keys=2048), 90, AUTO),
        (call_of((2, 16, 1024, 80)), 90, AUTO),
        (call_of(keys=77, causal=True), 90, AUTO),
        (call_of(mask=True), 90, AUTO),
    ],
)
def test_the_rule_without_measuring(call: AttentionCall, arch: int, backend: str) -> None:
    assert tune_attention.by_rule(call, Target.cuda(arch)) == backend


# ---------------------------------------------------------------------- what is measured


def problem_of(op: Any, layouts: dict[str, Tensor], results: tuple[Tensor, ...]) -> Problem:
    operands = {n: Operand(x.dtype, CPU, tuple(x.shape), x.stride(), x.storage_offset()) for n, x in layouts.items()}
    specs = tuple(BufferSpec(f"r{k}", x.dtype, CPU, tuple(x.shape), x.stride()) for k, x in enumerate(results))
    name = f"{op._schema.name}.default"
    return Problem.of(AttentionCall(Call(name, ()), operands, Settings(), specs))


Q, K = torch.empty(2, 4, 8, 24)[..., 3:11], torch.empty(2, 9, 4, 8).transpose(1, 2)
V = torch.empty(2, 1, 9, 8).expand(2, 4, 9, 8)
MASKS = {
    "none": None,
    "padding": torch.empty(2, 1, 1, 9).expand(2, 1, 8, 9),
    "boolean": torch.empty(2, 4, 8, 9, dtype=torch.bool),
    "one row": torch.empty(1, 9),
}


@pytest.mark.parametrize("name", MASKS)
def test_made_up_operands_have_the_layouts_of_the_call(name: str) -> None:
    mask = MASKS[name]
    layouts = {"query": Q, "key": K, "value": V} | ({} if mask is None else {"attn_mask": mask})
    problem = problem_of(attention, layouts, (torch.empty(2, 8, 4, 8).transpose(1, 2),))
    made = tune_attention.make_tensors(problem, CPU)
    for operand, x in made.items():
        assert (x.shape, x.stride(), x.dtype) == (layouts[operand].shape, layouts[operand].stride(), layouts[operand].dtype)
    assert made["query"].storage_offset() == 3
    if mask is not None:
        seen = made["attn_mask"] if mask.dtype == torch.bool else made["attn_mask"] == 0
        hidden_rows = ~seen.expand(2, 4, 8, 9).any(-1)
        assert hidden_rows.any() == (name != "one row")
        assert not hidden_rows.all()
    (out,) = tune_attention.runner(problem, made, MATH)()
    assert out is not None
    assert out.stride() == (256, 8, 32, 1)


def test_a_contest_in_training_runs_both_ways() -> None:
    q, k, v = (torch.empty(2, 4, 9, 8) for _ in range(3))
    layouts = {"query": q, "key": k, "value": v, "attn_mask": torch.empty(9, 9)}
    heads_last = torch.empty(2, 9, 4, 8).transpose(1, 2)
    problem = problem_of(attention_forward, layouts, (heads_last, torch.empty(2, 4, 9), torch.empty((), dtype=torch.int64)))
    made = tune_attention.make_tensors(problem, CPU)
    assert made["grad"].stride() == heads_last.stride()
    out, *gradients = tune_attention.runner(problem, made, MATH)()
    leaves = [made[name].clone().requires_grad_() for name in ("query", "key", "value")]
    want = F.scaled_dot_product_attention(*leaves, attn_mask=made["attn_mask"])
    torch.testing.assert_close(out, attention(*leaves, made["attn_mask"]))
    # The first row is hidden throughout: eager's gradients of it are NaN or zero, by version.
    want.nan_to_num(0.0)[:, :, 1:].backward(made["grad"][:, :, 1:])
    torch.testing.assert_close(gradients[0][:, :, 1:], leaves[0].grad[:, :, 1:])
    assert all(g.stride() == x.stride() for g, x in zip(gradients, (q, k, v), strict=True))


def test_what_will_be_replayed_is_measured_in_graphs(
    timed: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN fills memory before its kernel, which only a graph's replay shows."""
    measured = timed(math=1.0)
    run()
    run(cuda_graphs=False)
    run(disable=("cuda-graphs",))
    run(train=True)
    assert [problem.replayed for problem in measured] == [True, False, False]  # the two without graphs are one contest

    class Graphs:
        def capture(self, run: Callable[[], None], pool: object) -> tuple[Callable[[int], None], None]:
            return (lambda stream: run()), None

        def new_pool(self) -> object:
            return self

    monkeypatch.setattr(measure, "_graph_driver", lambda index: Graphs())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    counts: list[int] = []

    def interleaved(runs: Sequence[Callable[[], object]], device: torch.device, cold: bool) -> list[float]:
        for each in runs:
            each()
        return [8.0, 16.0]

    monkeypatch.setattr(measure, "interleaved", interleaved)
    each = [lambda: counts.append(0), lambda: counts.append(1)]
    device = torch.device("cuda", 0)
    assert tune_attention._seconds(each, device, replayed=True) == [8.0 / measure.REPEATS, 16.0 / measure.REPEATS]
    assert counts == [0] * measure.REPEATS + [1] * measure.REPEATS
    assert tune_attention._seconds(each, device, replayed=False) == [8.0, 16.0]

    def refuse(index: int) -> Graphs:
        raise CaptureError("memory comes from another pool")

    monkeypatch.setattr(measure, "_graph_driver", refuse)
    assert tune_attention._seconds(each, device, replayed=True) == [8.0, 16.0]


def test_who_cannot_win_is_not_measured_further() -> None:
    assert tune_attention.promising({"a": 1.0, "b": 1.9, "c": 2.1}, "a") == ["a", "b"]
    assert tune_attention.promising({"a": 9.0, "b": 1.0}, "a") == ["a", "b"]  # eager's choice stays for comparison
    assert tune_attention.promising({}, "a") == []


def test_who_disagrees_or_raises_is_out() -> None:
    want = torch.randn(2, 3, 16, 8, dtype=torch.bfloat16)
    gradient = torch.randn(2, 3, 16, 8)
    hidden = want.clone()
    hidden[0, 0, 0] = 0
    nan = want.clone()
    nan[0, 0, 0] = torch.nan

    def refuse() -> Any:
        raise RuntimeError("not for this")

    runs: dict[str, Callable[[], Any]] = {
        "reference": lambda: (want, gradient),
        "rounded": lambda: (want * 1.004, gradient),
        "other hidden rows": lambda: (hidden, gradient),
        "nan": lambda: (nan, gradient),
        "other gradient": lambda: (want, gradient * 1.1),
        "refuses": refuse,
    }
    assert tune_attention.agreeing(runs, "reference") == ["reference", "rounded"]
    assert tune_attention.agreeing(runs, "refuses") == []


def test_hidden_rows_that_are_nan_in_eager_have_to_be_nan() -> None:
    """Comparing one leaves the reference as it was for the next."""
    want = torch.randn(2, 3, 16, 8)
    want[0, 0, 0] = torch.nan
    runs: dict[str, Callable[[], Any]] = {
        "reference": lambda: (want,),
        "zero": lambda: (want.nan_to_num(0.0),),
        "nan": lambda: (want.clone(),),
        "nan again": lambda: (want.clone(),),
    }
    assert tune_attention.agreeing(runs, "reference") == ["reference", "nan", "nan again"]
