"""Which steps at the ends of a training step's plans run plainly beside what is captured."""

from __future__ import annotations

from typing import Any

import pytest

from fxopt.ir.exprs import Int
from fxopt.ir.graph import Phase, Role
from fxopt.ir.region import Call, Ref
from fxopt.runtime.capturable import Choice, Facts
from fxopt.runtime.plan import Plan
from fxopt.runtime.training_window import choose_window
from tests.runtime.plans import S0, buffer, plan, tensor

ROWS, WORDS = 4096, 8192


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Facts, "obstacle", lambda self, step: None)


def product(a: str, b: str, target: str) -> Call:
    return Call("aten::mm.default", (Ref(a), Ref(b)), outputs=(target,))


def forward(saves: str = "h3") -> Plan:
    """Layers, and a head whose product is cut to size: 128 MiB of results, once more in memory before that."""
    inputs = [tensor("primals_1", 4096, 8), tensor("w", 8, 8, role=Role.PARAMETER)]
    inputs.append(tensor("head", 8, WORDS + 8, role=Role.PARAMETER))
    buffers: list[Any] = [buffer(f"h{k}", ROWS, 8) for k in range(9)]
    buffers += [buffer("padded", ROWS, WORDS + 8), buffer("logits", ROWS, WORDS)]
    steps = [product("primals_1" if k == 0 else f"h{k - 1}", "w", f"h{k}") for k in range(9)]
    cut = Call("aten::constant_pad_nd.default", (Ref("padded"), [0, -8]), outputs=("logits",))
    return plan(inputs, buffers, [*steps, product("h8", "head", "padded"), cut], [Ref("logits"), Ref(saves)], saved=1)


def backward(returns: str = "h9") -> Plan:
    inputs = [tensor("tangents_1", ROWS, WORDS), tensor("head", WORDS, 8, role=Role.PARAMETER), tensor("x", ROWS, 8)]
    buffers = [buffer(f"h{k}", ROWS, 8) for k in range(10)]
    steps = [product("tangents_1" if k == 0 else f"h{k - 1}", "head" if k == 0 else "x", f"h{k}") for k in range(10)]
    return plan(inputs, buffers, steps, [Ref(returns)])


def counts(made: Plan, phase: Phase) -> tuple[int, int, int]:
    """How many steps run before, in and after the captured part."""
    choice = choose_window(made, phase)
    assert isinstance(choice, Choice)
    parts = (choice.parts.before, choice.parts.captured, choice.parts.after)
    before, captured, after = (0 if part is None else len(Facts(part.plan).found.steps) for part in parts)
    return before, captured, after


def test_a_result_that_is_cut_to_size_is_not_in_the_captured_run_before_that() -> None:
    assert counts(forward(), Phase.FORWARD) == (0, 9, 2)


def test_all_that_is_saved_is_made_in_the_captured_part() -> None:
    assert counts(forward("padded"), Phase.FORWARD) == (0, 10, 1)


def test_what_is_returned_and_saved_is_copied_either_way() -> None:
    """Out of the captured forward, or into its backward: no ends that run plainly would spare that."""
    reason = choose_window(forward("logits"), Phase.FORWARD)
    assert isinstance(reason, str) and "128.1 MiB a call, costs more than 11 launches" in reason


@pytest.mark.parametrize("columns", [8, S0])
def test_what_a_last_step_changes_has_no_copy(columns: Int) -> None:
    """A result that may be the same memory would be one, made before the change, whether its size is known or not."""
    made = forward()
    same = Call("aten::contiguous.default", (Ref("y"),), outputs=("z",))
    change = Call("aten::add_.Tensor", (Ref("y"), 1.0), {}, (None,), writes=("y",))
    steps = [*made.steps[:9], product("h8", "w", "y"), same, *made.steps[9:], change]
    buffers = [*made.buffers, buffer("y", 4, columns), buffer("z", 4, columns)]
    made = plan(list(made.inputs), buffers, steps, [Ref("z"), *made.outputs], saved=1)
    assert counts(made, Phase.FORWARD) == (0, 9, 5), "made beside what changes it"


def test_what_reads_a_large_gradient_runs_plainly() -> None:
    assert counts(backward(), Phase.BACKWARD) == (1, 9, 0)


def test_little_is_captured_whole() -> None:
    choice = choose_window(backward("h9"), Phase.BACKWARD, ends=False)
    assert isinstance(choice, str) and "costs more than 10 launches" in choice
    small = backward()
    small = plan([*small.inputs[2:], tensor("h0", ROWS, 8)], list(small.buffers[1:]), list(small.steps[1:]), [Ref("h9")])
    assert counts(small, Phase.BACKWARD) == (0, 9, 0)
