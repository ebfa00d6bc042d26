"""What a training step's pool takes under CUDA graphs, by a model of torch's allocator: `python -m benchmarks.pool_model`.

    python -m benchmarks.pool_model --workloads gpt2-train,resnet50-train

No GPU is needed. The plans are those of one step on the CPU, of full size, thought to be a GPU's; memory that library calls
take for a while is not known, but for cuBLAS's workspace. Steps at the ends that run plainly have no part in it. Three ways
are told: values that are taken from the device one by one, the same where the backward overwrites what it has read, and that
in a pool which begins with one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from benchmarks.models import choose
from fxopt import backend, compiler, plan_cache
from fxopt.cli import pick_dtype
from fxopt.ir.graph import Phase, Role
from fxopt.ir.region import Alias, BufferSpec, Call, refs
from fxopt.passes import pad_gemm
from fxopt.report.contenders import CONTENDERS
from fxopt.runtime.footprint import footprint, peak_with
from fxopt.runtime.lifetimes import Lifetimes, nbytes, returns_fresh
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import Free, InputSpec, Plan, allocated, defined, used
from fxopt.runtime.training_graph import ROOM
from fxopt.runtime.training_window import choose_window

GPU = torch.device("cuda", 0)
MIB = 1 << 20
WORKSPACE = 32 * MIB
"""cuBLAS's, on Hopper."""
ONE_BY_ONE, OVERWRITTEN, ONE_PIECE = "one by one", "overwritten", "one piece"


@dataclass(eq=False)
class Block:
    """A part of a segment."""

    segment: Segment
    size: int
    free: bool = True


@dataclass(eq=False)
class Segment:
    """Memory taken from the device at once; its blocks in order."""

    size: int
    small: bool
    blocks: list[Block] = field(default_factory=list)


class Allocator:
    """The rules of c10/cuda/CUDACachingAllocator.cpp for one stream of a pool, without expandable segments."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    @property
    def reserved(self) -> int:
        """Bytes taken from the device."""
        return sum(segment.size for segment in self.segments)

    def take(self, size: int) -> Block:
        """The smallest free block for so many bytes, cut where enough is left over."""
        size = max(512, -(-size // 512) * 512)
        small = size <= MIB
        fitting = [
            b for s in self.segments if s.small == small for b in s.blocks if b.free and b.size >= size
        ] or self._new_segment(size, small).blocks
        block = min(fitting, key=lambda b: b.size)
        left = block.size - size
        if left >= 512 if small else left > MIB:
            blocks = block.segment.blocks
            blocks.insert(blocks.index(block) + 1, Block(block.segment, left))
            block.size = size
        block.free = False
        return block

    def give(self, block: Block) -> None:
        """Free it, joined with its free neighbours."""
        blocks = block.segment.blocks
        block.free, at = True, blocks.index(block)
        if at + 1 < len(blocks) and blocks[at + 1].free:
            block.size += blocks.pop(at + 1).size
        if at and blocks[at - 1].free:
            blocks[at - 1].size += blocks.pop(at).size

    def _new_segment(self, size: int, small: bool) -> Segment:
        taken = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        made = Segment(taken, small)
        made.blocks.append(Block(made, taken))
        self.segments.append(made)
        return made


def size_of(spec: BufferSpec | InputSpec) -> int:
    """Bytes of a value of known size."""
    if isinstance(spec, InputSpec):
        assert spec.dtype is not None and spec.device is not None
        spec = BufferSpec(spec.name, spec.dtype, spec.device, spec.shape, spec.strides)
    size = nbytes(spec)
    assert isinstance(size, int)
    return size


def run(plan: Plan, memory: Allocator, given: Mapping[str, Block]) -> dict[str, Block]:
    """The memory of what `plan` makes and returns, by name; `given` are inputs that end with their last use."""
    root = Lifetimes.of(plan).root
    specs, own = {b.name: b for b in plan.buffers}, allocated(plan)
    returned = {root.get(name, name) for name in refs(plan.outputs)}
    tenants = [{name for name, slot in plan.placement.items() if slot == k} for k in range(len(plan.slots))]
    slots, held, inputs = dict[int, Block](), dict[str, Block](), dict(given)

    def begin(name: str) -> None:
        slot = plan.placement.get(name)
        if slot is not None and slot not in slots:
            size = plan.slots[slot].nbytes
            assert isinstance(size, int)
            slots[slot] = memory.take(size)
        elif slot is None and name in own and name not in held:
            held[name] = memory.take(size_of(own[name]))

    def end(name: str) -> None:
        slot = plan.placement.get(name)
        if slot is not None:
            tenants[slot].discard(name)
            if not tenants[slot] and slot in slots:
                memory.give(slots.pop(slot))
        elif name in inputs:
            memory.give(inputs.pop(name))
        elif name in held and name not in returned:
            memory.give(held.pop(name))

    for step in plan.steps:
        if isinstance(step, Free):
            for name in step.names:
                end(name)
            continue
        if isinstance(step, Alias):
            continue
        for name in (*used(step), *step.writes):
            begin(root.get(name, name))
        if isinstance(step, Call) and (returns_fresh(step.op) or not step.op.startswith("aten::")):
            for name in defined(step):
                if name in specs and name not in held:
                    held[name] = memory.take(size_of(specs[name]))
    for name in returned:
        begin(name)
    return {name: held[name] for name in returned if name in held}


@dataclass(frozen=True)
class Step:
    """The captured parts of a training step's plans. `passed` are the backward's inputs that are in memory of the forward's,
    by the name that this has there; the last of them to be read, where there are several. `copied` are those that are copied
    in."""

    forward: Plan
    backward: Plan
    passed: dict[str, str]
    copied: list[InputSpec]

    @staticmethod
    def of(forward: Plan, backward: Plan) -> Step:
        root, last = Lifetimes.of(forward).root, Lifetimes.of(backward).storage_last()
        made = {b.name for b in forward.buffers}
        passed: dict[str, str] = {}
        saved = forward.outputs[len(forward.outputs) - forward.saved :]
        for x, value in zip(backward.inputs, saved, strict=False):
            for name in {root.get(n, n) for n in refs(value)} & made:
                if name not in passed or last.get(x.name, 0) > last.get(passed[name], 0):
                    passed[name] = x.name
        parts = captured(forward, Phase.FORWARD), captured(backward, Phase.BACKWARD)
        kept = {x.name for x in backward.inputs if not x.name.startswith("tangents")}
        return Step(*parts, passed, [x for x in moved(parts[1]) if x.name not in kept])

    def peak(self) -> int:
        """Bytes that both hold at most, one after the other."""
        specs = {b.name: b for b in self.forward.buffers}
        first, given = footprint(self.forward, GPU), [((x,), size_of(specs[n])) for n, x in self.passed.items()]
        second = peak_with(self.backward, GPU, given)
        assert first is not None and second is not None
        return max(first.peak + sum(map(size_of, moved(self.forward))), second + sum(map(size_of, self.copied)))

    def pool(self, way: str) -> int:
        """Bytes of the pool."""
        memory, peak = Allocator(), self.peak()
        workspace = memory.take(WORKSPACE)
        if way == ONE_PIECE:
            memory.give(memory.take(peak + peak // ROOM))
        twins = [memory.take(size_of(x)) for x in moved(self.forward)]
        made = run(self.forward, memory, {})
        for block in (workspace, *twins, *(block for name, block in made.items() if name not in self.passed)):
            memory.give(block)
        memory.take(WORKSPACE)
        for x in self.copied:
            memory.take(size_of(x))
        given = {x: made[name] for name, x in self.passed.items() if name in made}
        run(self.backward, memory, {} if way == ONE_BY_ONE else given)
        return memory.reserved


def captured(plan: Plan, phase: Phase) -> Plan:
    """What of `plan` is captured; all of it where that would not be worth it."""
    choice = choose_window(plan, phase)
    return plan if isinstance(choice, str) else choice.parts.captured.plan


def moved(plan: Plan) -> list[InputSpec]:
    return [x for x in plan.inputs if x.kind == "tensor" and x.role is Role.USER]


@contextmanager
def plans() -> Iterator[list[tuple[Plan, Phase]]]:
    """A list that gets the plans of what is compiled in the block, as they would be for a GPU: with products padded for its
    library. None of these are kept on disk, or taken from there."""
    found: list[tuple[Plan, Phase]] = []

    def note(executor: Any, phase: Phase, *others: Any) -> Any:
        text = executor.plan.to_json().replace('"cpu"', '"cuda:0"')
        found.append((plan_memory(Plan.from_json(text)), phase))
        return executor

    for_a_gpu = mock.patch.object(pad_gemm, "wants_alignment", return_value=True)
    no_plans = mock.patch.object(plan_cache, "plan_key", return_value=None)
    no_graphs = mock.patch.object(backend, "_shelf", return_value=None)
    with mock.patch.object(compiler, "with_graphs", note), for_a_gpu, no_plans, no_graphs:
        yield found


def largest(found: Sequence[tuple[Plan, Phase]], phase: Phase) -> Plan:
    return max((plan for plan, other in found if other is phase), key=lambda plan: len(plan.steps))


def main(
    workloads: Annotated[str, typer.Option(help="training workloads, comma-separated")] = "gpt2-train,resnet50-train",
    dtype: str = "bfloat16",
    tiny: Annotated[bool, typer.Option("--tiny", help="small sizes, to try the script")] = False,
) -> None:
    """Print what the largest graphs' pool takes each way, in MiB."""
    for known in choose(workloads):
        torch.compiler.reset()
        case = known.build(known.sizes(tiny), torch.device("cpu"), pick_dtype(dtype))
        with plans() as found:
            case.drive(CONTENDERS["fxopt"].compile(case.module, torch.device("cpu")))
        step = Step.of(largest(found, Phase.FORWARD), largest(found, Phase.BACKWARD))
        told = ", ".join(f"{way} {step.pool(way) / MIB:.0f}" for way in (ONE_BY_ONE, OVERWRITTEN, ONE_PIECE))
        typer.echo(f"{known.name}: at most {step.peak() / MIB:.0f} at a time; {told}")


if __name__ == "__main__":
    typer.run(main)
