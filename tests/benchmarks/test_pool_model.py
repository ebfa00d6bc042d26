"""The model of torch's allocator, and of a step's pool."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import pool_model
from benchmarks.pool_model import GPU, MIB, ONE_BY_ONE, ONE_PIECE, OVERWRITTEN, WORKSPACE, Allocator, Step, main
from fxopt.ir.graph import Role
from fxopt.ir.region import BufferSpec, Ref
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import InputSpec, Launch, Plan
from tests.runtime.plans import F32


@pytest.mark.parametrize(
    ("size", "taken"), [(1, 2), (MIB, 2), (MIB + 1, 20), (10 * MIB - 512, 20), (10 * MIB, 10), (11 * MIB + 1, 12)]
)
def test_what_is_taken_from_the_device(size: int, taken: int) -> None:
    memory = Allocator()
    memory.take(size)
    assert memory.reserved == taken * MIB


def test_free_neighbours_become_one_block() -> None:
    memory = Allocator()
    blocks = [memory.take(4 * MIB) for _ in range(5)]
    assert memory.reserved == 20 * MIB and len(memory.segments[0].blocks) == 5
    for k in (1, 3, 2):
        memory.give(blocks[k])
    assert [(b.size // MIB, b.free) for b in memory.segments[0].blocks] == [(4, False), (12, True), (4, False)]
    memory.take(12 * MIB)
    assert memory.reserved == 20 * MIB


def test_segments_never_become_one_block() -> None:
    memory = Allocator()
    for block in [memory.take(16 * MIB) for _ in range(2)]:
        memory.give(block)
    memory.take(32 * MIB)
    assert memory.reserved == 64 * MIB


def test_the_smallest_block_that_fits_is_taken_and_cut_where_enough_is_left() -> None:
    memory = Allocator()
    first, second = memory.take(40 * MIB), memory.take(20 * MIB)
    memory.give(first)
    memory.give(second)
    assert memory.take(19 * MIB) is second and second.size == 20 * MIB, "one MiB stays with it"
    assert memory.take(19 * MIB) is first and first.size == 19 * MIB


def spec(name: str, mib: int) -> BufferSpec:
    return BufferSpec(name, F32, GPU, (mib * MIB // 4,), (1,))


def given(name: str, mib: int) -> InputSpec:
    return InputSpec(name, "tensor", Role.USER, F32, GPU, (mib * MIB // 4,), (1,))


def launch(*names: str) -> Launch:
    return Launch("k", "triton", "k", names, names[-1:], GPU)


def step(count: int, mib: int) -> Step:
    """A forward that saves `count` values, and a backward that reads the last one first and returns one of twice the size
    of any of them, made of all."""
    saved = [f"h{k}" for k in range(count)]
    forward = Plan(
        "forward",
        (given("x", 1),),
        (),
        (),
        tuple(spec(name, mib) for name in saved),
        tuple(launch(a, b) for a, b in zip(["x", *saved], saved, strict=False)),
        tuple(map(Ref, saved)),
        saved=count,
    )
    steps = [launch(*saved[k : k + 2], f"g{k}") for k in reversed(range(count - 1))]
    backward = Plan(
        "backward",
        (*(given(name, mib) for name in saved), given("tangents_1", 1)),
        (),
        (),
        tuple(spec(f"g{k}", 2 * mib if k == 0 else 1) for k in range(count - 1)),
        tuple(steps),
        tuple(Ref(f"g{k}") for k in range(count - 1)),
    )
    return Step.of(plan_memory(forward), plan_memory(backward))


def test_a_piece_makes_room_for_larger_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_model, "captured", lambda plan, phase: plan)
    made = step(8, 32)
    assert made.passed == {f"h{k}": f"h{k}" for k in range(8)}
    one_by_one, overwritten, piece = map(made.pool, (ONE_BY_ONE, OVERWRITTEN, ONE_PIECE))
    assert piece < overwritten == one_by_one, "no single value that has been read is as large as the last result"
    assert made.peak() < piece <= made.peak() * 33 / 32 + WORKSPACE + 22 * MIB


def test_a_tiny_model() -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--workloads", "gpt2-train", "--tiny", "--dtype", "float32"])
    assert result.exit_code == 0 and "gpt2-train: at most" in result.output and "one piece" in result.output
