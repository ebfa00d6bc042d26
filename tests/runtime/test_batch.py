"""Batched launches: their tables, when those are copied, how a plan writes them down, and whole optimizer steps."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.errors import PlanError
from fxopt.ir.kernel import Artifact
from fxopt.ir.region import Ref
from fxopt.runtime import batch, executor
from fxopt.runtime.batch import BatchLauncher, layout, program_count
from fxopt.runtime.executor import Executor
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import Launch, Plan
from tests.runtime.plans import CPU, buffer, plan, tensor

ROOT = Path(__file__).parents[2]


class Machine:
    """Stands for a GPU: a kernel that adds 1 to each member's first buffer and writes the second, tables in CPU memory."""

    def __init__(self) -> None:
        self.copies: list[list[int]] = []
        self.streams: list[int] = []
        self.capturing, self.stream, self.devices = False, 100, 0

    def page_locked(self, count: int) -> torch.Tensor:
        assert not self.capturing, "no page-locked memory can be had while a stream is captured"
        return torch.empty(count, dtype=torch.int64)

    def on_device(self, source: torch.Tensor, device: torch.device, wait: bool = False) -> torch.Tensor:
        if source.dim() == 1 and source.dtype == torch.int64:
            self.copies.append(source.tolist())
        return source.clone()

    def bind(self, label: str, early: bool = False) -> Any:
        return self.launch

    def launch(self, stream: int, gx: int, gy: int, gz: int, owners: int, sizes: int, table: int) -> None:
        """What the kernel does, program by program."""
        self.streams.append(stream)
        block = 4
        for pid in range(gx):
            member = ctypes.c_int32.from_address(owners + 4 * pid).value
            count, first = (ctypes.c_int64 * 2).from_address(sizes + 16 * member)
            source, target = (ctypes.c_int64 * 2).from_address(table + 16 * member)
            at = (pid - first) * block
            for k in range(at, min(at + block, count)):
                value = ctypes.c_float.from_address(source + 4 * k).value
                ctypes.c_float.from_address(target + 4 * k).value = value + 1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()

    @contextmanager
    def entered(device: int) -> Iterator[None]:
        yield

    monkeypatch.setattr(executor, "_loaded_cuda", lambda launches, kernels, loaded: [made] * len(launches))
    monkeypatch.setitem(executor._HELPERS, "stream", lambda device: made.stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(batch, "page_locked", made.page_locked)
    monkeypatch.setattr(batch, "_on_device", made.on_device)
    batch.device_layout.cache_clear()
    return made


MEMBERS = (3, 1, 9, 4)


def launch(buffers: tuple[str, ...], writes: tuple[str, ...], **kwargs: Any) -> Launch:
    grid = (program_count(MEMBERS, 4), 1, 1)
    return Launch(
        "k", "triton", "k", buffers, writes, torch.device("cuda", 0), grid=grid, members=MEMBERS, block=4, **kwargs
    )


def a_plan() -> Plan:
    """o0, ..., o2 and x3 itself become x0, ..., x3, each plus one."""
    names = tuple(n for k in range(3) for n in (f"x{k}", f"o{k}"))
    step = launch((*names, "x3", "x3"), ("o0", "o1", "o2", "x3"))
    inputs = [tensor(f"x{k}", n) for k, n in enumerate(MEMBERS)]
    outputs = [buffer(f"o{k}", n) for k, n in enumerate(MEMBERS[:3])]
    return plan_memory(plan(inputs, outputs, [step], [Ref(f"o{k}") for k in range(3)]))


def bound() -> Executor:
    artifact = Artifact("k", "triton", "k", None)  # type: ignore[arg-type]
    return Executor(Plan.from_json(a_plan().to_json()), {"k": artifact})


def test_the_tables_that_never_change() -> None:
    owners, sizes = layout(MEMBERS, 4)
    assert owners.dtype == torch.int32 and owners.tolist() == [0, 1, 2, 2, 2, 3]
    assert sizes.dtype == torch.int64 and sizes.tolist() == [[3, 0], [1, 1], [9, 2], [4, 5]]
    assert program_count(MEMBERS, 4) == 6


def test_a_batched_launch_runs_all_members(machine: Machine) -> None:
    run = bound()
    xs = [torch.randn(n) for n in MEMBERS]
    xs[2] = torch.randn(10)[1:]  # no copy is made of what is not aligned
    want = [x + 1 for x in xs]
    out = run(list(xs))
    torch.testing.assert_close([*out, xs[3]], want)
    assert machine.streams == [100]
    assert xs[3]._version == 1 and xs[0]._version == 0, "autograd learns what was written"


def test_addresses_are_copied_when_one_has_changed(machine: Machine) -> None:
    launcher = BatchLauncher(machine.launch, (1, 1), 4, 2, CPU)
    memory = torch.arange(8.0)
    first = tuple(memory.data_ptr() + 4 * k for k in (0, 1, 2, 3))
    other = tuple(memory.data_ptr() + 4 * k for k in (0, 1, 4, 5))
    for addresses in (first, first, (*first[:2], *first[2:]), other, other, first):
        launcher(100, addresses)
    assert machine.copies == [list(first), list(other), list(first)]
    assert memory.tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and memory[[1, 3, 5]].tolist() == [1, 3, 5]


def test_each_stream_has_a_table_of_its_own(machine: Machine) -> None:
    launcher = BatchLauncher(machine.launch, (1,), 4, 2, CPU)
    memory = torch.zeros(2)
    addresses = (memory.data_ptr(), memory.data_ptr() + 4)
    for stream in (1, 1, 2, 2):
        launcher(stream, addresses)
    assert len(machine.copies) == 2 and machine.streams == [1, 1, 2, 2]


def test_a_captured_launch_copies_anew_and_keeps_what_it_copies_from(machine: Machine) -> None:
    launcher = BatchLauncher(machine.launch, (1,), 4, 2, CPU)
    memory = torch.zeros(2)
    addresses = (memory.data_ptr(), memory.data_ptr() + 4)
    launcher(1, addresses)
    kept = len(batch._sources_of_graphs)
    machine.capturing = True
    launcher(1, addresses)
    assert len(machine.copies) == 2
    assert batch._sources_of_graphs[kept].tolist() == list(addresses)
    machine.capturing = False
    launcher(1, addresses)
    assert len(machine.copies) == 2, "the table of calls outside is as it was"
    assert batch._sources_of_graphs[kept].tolist() == list(addresses)


def test_a_failed_copy_is_not_taken_for_done(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = BatchLauncher(machine.launch, (1,), 4, 2, CPU)
    memory = torch.zeros(2)
    addresses = (memory.data_ptr(), memory.data_ptr() + 4)

    def full(source: torch.Tensor, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_on_device", full)
        with pytest.raises(torch.OutOfMemoryError):
            launcher(1, addresses)
    launcher(1, addresses)
    assert memory.tolist() == [0, 1]


def test_calls_at_once_have_tables_of_their_own(machine: Machine) -> None:
    run = bound()
    frame = run._run.__closure__  # the frames are the generated function's globals
    assert frame is not None
    first = [torch.zeros(n) for n in MEMBERS]
    run(list(first))
    copied = len(machine.copies)
    run([torch.zeros(n) for n in MEMBERS])
    assert len(machine.copies) == copied + 1
    assert all(torch.equal(x, torch.zeros_like(x)) for x in first[:3])


def test_nothing_is_kept_alive(machine: Machine) -> None:
    import weakref

    run = bound()
    xs = [torch.zeros(n) for n in MEMBERS]
    dead = [weakref.ref(x) for x in xs]
    run(xs)
    assert all(ref() is None for ref in dead)


def test_a_plan_with_a_batch_survives_its_bytes() -> None:
    made = a_plan()
    again = Plan.from_json(made.to_json())
    assert again == made
    (step,) = (s for s in again.steps if isinstance(s, Launch))
    assert (step.members, step.block) == (MEMBERS, 4)


@pytest.mark.parametrize(
    "change",
    [{"members": [1, 2, 3]}, {"members": [0, 1, 1, 1]}, {"block": 0}, {"language": "cpp"}, {"aligned": [0]}, {"sizes": [3]}],
    ids=str,
)
def test_tables_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    data = json.loads(a_plan().to_json())
    step = next(s for s in data["steps"] if s["step"] == "launch")
    step.update(change)
    with pytest.raises(PlanError, match=r"plan\.steps\[\d\]\.(members|buffers)"):
        Plan.from_json(json.dumps(data))


def test_a_shared_storage_is_not_taken_while_the_batch_runs() -> None:
    """Every member's memory is in use until the whole batch is done, so what dies in it goes to nobody in it."""
    steps = [
        launch(("x0", "a0", "x1", "a1", "x2", "a2", "x3", "a3"), ("a0", "a1", "a2", "a3")),
        launch(("a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"), ("b0", "b1", "b2", "b3"), inplace=(("b1", "a1"),)),
        launch(("b0", "c0", "b1", "c1", "b2", "c2", "b3", "c3"), ("c0", "c1", "c2", "c3")),
    ]
    own = [buffer(f"{n}{k}", size) for n in "abc" for k, size in enumerate(MEMBERS)]
    inputs = [tensor(f"x{k}", n) for k, n in enumerate(MEMBERS)]
    placed = plan_memory(plan(inputs, own, steps, [Ref(f"c{k}") for k in range(4)])).placement
    assert placed["b1"] == placed["a1"]
    assert not {placed.get(f"b{k}", f"b{k}") for k in (0, 2, 3)} & {placed.get(f"a{k}", f"a{k}") for k in range(4)}


STEPPED = ("sgd", "sgd, kept", "adam", "adam, kept", "adamw", "adamw, lr a tensor", "lion")
"""Which gradients stay where they are decides what is copied, whatever the optimizer computes."""


@pytest.fixture(scope="module")
def stepped() -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])}
    job = [sys.executable, "-m", "tests.runtime.optimizer_job", *STEPPED]
    done = subprocess.run(job, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", STEPPED)
def test_optimizers_step_as_eager_ones_do(stepped: dict[str, dict[str, Any]], case: str) -> None:
    """Parameters of many sizes, some of one element and some not aligned; the printed kernels, interpreted."""
    from tests.runtime.optimizer_job import KEPT, STEPS

    name, keep, result = case.removesuffix(KEPT), case.endswith(KEPT), stepped[case]
    assert result["off"] <= 1.5 * result["eager off"] + 4 * torch.finfo(torch.float32).eps
    batches = 2 if "adam" in name else 1  # the numbers of steps are one
    assert len(result["launched"]) == batches * STEPS
    assert all(entry.startswith("fx_batch_") for entry in result["launched"])
    graphs = 2 if name == "sgd" else 1  # the first step makes the momenta
    copies = batches * graphs if keep else STEPS + batches - 1
    assert result["copied"] == copies
