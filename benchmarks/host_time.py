"""Host time of a call: without CUDA graphs, with them, and under Inductor; and what the parts of a replay take.

    python -m benchmarks.host_time --out benchmarks/results/host_time_h100.json

A call's host time is what it takes to return when the device keeps up: calls are timed one by one, each begun on an idle
device for which the host has waited, and the median counts. A host that comes from waiting is two to three times slower than
in a loop. "total" is from the call to the end of the device's work, "loop" the mean over calls that follow each other
without waiting. "burst" is the mean over few calls in a row, begun on an idle device whose queue takes them all, so that
the host is warm and waits for nothing; of several rounds the least.

"guards" is a backend whose results are those of the first call: what remains is Dynamo's guards; "guards and wrappers" has
AOTAutograd's as well. "above guards" is what a way adds to them in bursts. In ways called "steady", modules are said to stay
as they are (`steady_modules`). "spent" says where the host time of a call of "fxopt" goes, and of one whose replays go
through Python; "pieces" are such parts in a loop.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from benchmarks.choosing import names_of
from benchmarks.models import choose
from benchmarks.results import target_facts
from benchmarks.workload import Workload
from fxopt.capture.guards import trust_modules
from fxopt.cli import pick_device, pick_dtype
from fxopt.codegen.replay_build import replay_code
from fxopt.report.backends import unshared
from fxopt.report.contenders import CONTENDERS, Contender
from fxopt.runtime import capturable, graph_driver, native_replay
from fxopt.runtime.artifacts import default_store
from fxopt.runtime.cuda_graph import GraphedExecutor, _comparison
from fxopt.runtime.graph_driver import CapturedGraph
from fxopt.runtime.recording import Recording

WORKLOADS = "bert-base-b1,resnet50-b1,vit-b-b1,bert-base,gpt2"
IN_PYTHON = "fxopt, replays in Python"
AROUND = "fxopt, copies around"
"""Copies before and after a graph are launches of their own."""
STEADY = "fxopt, steady"
GUARDS, STEADY_GUARDS = "guards", "guards, steady"
AT_ANY_PRICE = "fxopt, any copies"
"""Captured however much has to be copied: what `capturable.COPY_SHARE` should be."""
BURST, BURSTS = 20, 25
"""Calls in a row, and rounds of them."""
SLEEP_CYCLES = 1_000_000
"""Of the device before each call that is timed alone: about half a millisecond."""
WAYS = {
    "without graphs": Contender("fxopt", "fxopt", options={"cuda_graphs": False}),
    "fxopt": CONTENDERS["fxopt"],
    IN_PYTHON: Contender("fxopt", "fxopt", options={"disable": [native_replay.NAME]}),
    AROUND: CONTENDERS["fxopt"],
    STEADY: Contender("fxopt", "fxopt", options={"steady_modules": True}),
    AT_ANY_PRICE: CONTENDERS["fxopt"],
    "inductor": CONTENDERS["inductor"],
    "inductor-reduce-overhead": CONTENDERS["inductor-reduce-overhead"],
}


def _keep_waiting(wait: Callable[[], None]) -> None:
    if torch.cuda.is_available():
        torch.cuda._sleep(SLEEP_CYCLES)
    wait()


def microseconds(call: Callable[[], Any], calls: int, wait: Callable[[], None]) -> tuple[float, float]:
    """Medians over `calls`, each begun on an idle device: (until the call returns, until the device is done)."""
    host, total = [], []
    for _ in range(calls):
        _keep_waiting(wait)
        start = time.perf_counter()
        out = call()
        returned = time.perf_counter()
        wait()
        host.append(returned - start)
        total.append(time.perf_counter() - start)
        del out
    return statistics.median(host) * 1e6, statistics.median(total) * 1e6


def looped(call: Callable[[], Any], calls: int, wait: Callable[[], None]) -> float:
    """Microseconds of a call among others."""
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        out = call()
    wait()
    del out
    return (time.perf_counter() - start) / calls * 1e6


def in_bursts(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Microseconds of a call on the host while the device's queue has room."""
    best = float("inf")
    for _ in range(BURSTS):
        wait()
        start = time.perf_counter()
        for _ in range(BURST):
            call()
        best = min(best, (time.perf_counter() - start) / BURST)
    wait()
    return best * 1e6


def piece(call: Callable[[], Any], wait: Callable[[], None], repeats: int = 300) -> float:
    """Microseconds of a part, the least of five means."""
    best = float("inf")
    for _ in range(5):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats)
    wait()
    return best * 1e6


def _guards_alone(gm: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend whose results are those of the first call."""
    known: list[Any] = []

    def run(*args: Any) -> Any:
        if not known:
            known.append(gm(*args))
        return known[0]

    return run


def _fewer_guards(gm: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The same with the guards of steady modules."""
    trust_modules()
    return _guards_alone(gm, inputs)


def _doing_nothing(gm: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The same behind AOTAutograd."""
    from torch._dynamo.backends.common import aot_autograd

    def compiler(graph: Any, example: Any) -> Callable[..., Any]:
        known: list[Any] = []

        def run(args: list[Any]) -> Any:
            if not known:
                known.append(graph(*args))
            args.clear()
            return known[0]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return aot_autograd(fw_compiler=compiler)(gm, inputs)


def _executors(before: set[int]) -> list[GraphedExecutor]:
    return [x for x in gc.get_objects() if type(x) is GraphedExecutor and id(x) not in before]


def _inputs_of(call: Callable[[], Any], executor: GraphedExecutor) -> list[Any]:
    """What the executor is given in a call, if compiled code replays it."""
    seen: list[list[Any]] = []
    play = executor._play
    if play is None:
        return []

    def watched(inputs: Sequence[Any]) -> Any:
        seen.append(list(inputs))
        return play(inputs)  # type: ignore[arg-type]

    with mock.patch.object(executor, "_play", watched):
        call()
    return seen[0]


def pieces(executor: GraphedExecutor, call: Callable[[], Any], wait: Callable[[], None]) -> dict[str, float]:
    """What the parts of a replay of the executor's latest recording take."""
    recording = executor._latest
    assert recording is not None
    driver, found = executor._turns.driver, recording.traits
    device = found.device
    fixed = [torch.nn.Parameter(torch.empty(4, device=device)) for _ in found.fixed]
    addresses = [x.data_ptr() for x in fixed]
    same = _comparison(tuple(range(len(fixed))))
    a, b = torch.empty(1024, device=device), torch.empty(1024, device=device)
    stream = driver.stream()
    shapes = [(x.shape, x.strides, x.dtype) for x in recording.results.fresh]
    inputs, native = _inputs_of(call, executor), recording.native
    in_one_call: dict[str, Callable[[], Any]] = {}
    if inputs:
        in_one_call = {
            "a replay in one call": lambda: native(inputs),
            "comparing addresses in C": lambda: native.has_fixed(inputs),
        }
    shapes += [(tuple(x.shape), x.stride(), x.dtype) for group in recording.results.together for x in group.sources]
    found_us = {
        **{what: piece(part, wait, 20) for what, part in in_one_call.items()},
        "comparing addresses": piece(lambda: same(fixed, addresses), wait),
        "comparing addresses in Python": piece(lambda: list(map(torch.Tensor.data_ptr, fixed)) == addresses, wait),
        "comparing identities": piece(lambda: list(map(id, fixed)), wait),
        "whether the host is free": piece(lambda: (driver.is_captured(), driver.is_watched(), driver.is_current()), wait),
        "the stream": piece(driver.stream, wait),
        "a turn": piece(lambda: executor._turns.take(lambda s: None, lambda: None), wait),
        "one copy": piece(lambda: driver.copy(a.data_ptr(), b.data_ptr(), 4096, stream), wait, 100),
        "one copy by torch": piece(lambda: a.copy_(b), wait, 100),
        "allocating results": piece(
            lambda: [torch.empty_strided(s, t, dtype=d, device=device) for s, t, d in shapes], wait, 100
        ),
    }
    recording.replay_alone(stream)  # from here on its nodes copy nothing
    return {**found_us, "launching the graph": piece(lambda: recording.replay(stream), wait, 20)}


class _Clock:
    """Seconds spent in functions that are replaced by ones that measure themselves."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds[name][-1] += time.perf_counter() - start

        self.seconds[name] = []
        return run


def spent(call: Callable[[], Any], executor: GraphedExecutor, calls: int, wait: Callable[[], None]) -> dict[str, float]:
    """Median microseconds that parts of a call take on the host, each call begun on an idle device."""
    recording, clock, driver = executor._latest, _Clock(), executor._turns.driver
    assert recording is not None
    patched: list[tuple[Any, str, Any]] = [
        (executor, "_play", clock.timed("a replay in one call", executor._play) if executor._play is not None else None),
        (GraphedExecutor, "__call__", clock.timed("the executor", GraphedExecutor.__call__)),
        (executor, "_inputs_are", clock.timed("comparing addresses", executor._inputs_are)),
        (driver, "is_captured", clock.timed("whether the stream is captured", driver.is_captured)),
        (driver, "copy", clock.timed("copies", driver.copy)),
        (driver, "record", clock.timed("recording the event", driver.record)),
        (CapturedGraph, "__call__", clock.timed("launching the graph", CapturedGraph.__call__)),
        (Recording, "play", clock.timed("copies, allocations and the launch", Recording.play)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in patched:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        for _ in range(calls):
            _keep_waiting(wait)
            for found in clock.seconds.values():
                found.append(0.0)
            call()
    wait()
    return {name: statistics.median(found) * 1e6 for name, found in clock.seconds.items()}


@contextlib.contextmanager
def _at_any_price(wanted: bool) -> Iterator[None]:
    usual = capturable.COPY_SHARE
    capturable.COPY_SHARE = float("inf") if wanted else usual
    try:
        yield
    finally:
        capturable.COPY_SHARE = usual


@contextlib.contextmanager
def _copies_around(wanted: bool) -> Iterator[None]:
    usual = graph_driver.COPIES_IN_GRAPH
    graph_driver.COPIES_IN_GRAPH = usual and not wanted
    try:
        yield
    finally:
        graph_driver.COPIES_IN_GRAPH = usual


def measure(
    known: Workload, ways: Sequence[str], device: torch.device, dtype: torch.dtype, tiny: bool, calls: int
) -> dict[str, Any]:
    workload = known.name
    case = known.build(known.sizes(tiny), device, dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    entry: dict[str, Any] = {"workload": workload, "ways": {}}
    compiled: dict[str, Callable[..., Any]] = {}
    torch.compiler.reset()
    captured: dict[str, list[GraphedExecutor]] = {}
    for name in ways:
        compiled[name] = WAYS[name].compile(case.module, device)
    around = {GUARDS: _guards_alone, STEADY_GUARDS: _fewer_guards, "guards and wrappers": _doing_nothing}
    for name, backend in around.items():
        compiled[name] = torch.compile(unshared(case.module), backend=backend, dynamic=False)
    with torch.no_grad():
        for name, run in compiled.items():
            before = {id(x) for x in _executors(set())}
            with _at_any_price(name == AT_ANY_PRICE), _copies_around(name == AROUND):
                for _ in range(3):
                    run(*case.inputs)
                if name in ("fxopt", AROUND, STEADY) and replay_code(default_store()).wait() is None:
                    print(f"replays go through Python: {replay_code(default_store()).reason}")
                for _ in range(3):
                    run(*case.inputs)
            captured[name] = [x for x in _executors(before) if x.graphs]
            call = functools.partial(run, *case.inputs)
            host, total = microseconds(call, calls, wait)
            found = {"host": host, "total": total, "loop": looped(call, calls, wait), "burst": in_bursts(call, wait)}
            entry["ways"][name] = {f"{what}_us": round(us, 2) for what, us in found.items()}
            told = ", ".join(f"{what} {us:8.1f}" for what, us in found.items())
            print(f"{workload:>16} {name:<26} {told} us", flush=True)
    for name, base in (*((name, GUARDS) for name in ways if name != STEADY), (STEADY, STEADY_GUARDS)):
        if name in ways:
            row = entry["ways"][name]
            row["above_guards_us"] = round(row["burst_us"] - entry["ways"][base]["burst_us"], 2)
            print(f"{workload:>16} {name:<26} above guards {row['above_guards_us']:8.1f} us", flush=True)
    kinds = {"fxopt": "spent_us", AROUND: "spent_with_copies_around_us", IN_PYTHON: "spent_in_python_us"}
    for name, kind in kinds.items():
        if captured.get(name):
            largest = max(captured[name], key=lambda x: len(x._traits.fixed))
            entry["fixed inputs"] = len(largest._traits.fixed)
            call = functools.partial(compiled[name], *case.inputs)
            with torch.no_grad():
                if name == "fxopt":
                    entry["pieces_us"] = {what: round(us, 3) for what, us in pieces(largest, call, wait).items()}
                entry[kind] = {what: round(us, 3) for what, us in spent(call, largest, calls, wait).items()}
    for kind in (k for k in entry if k.endswith("_us")):
        for what, us in entry[kind].items():
            print(f"{workload:>16}   {kind}: {what:<36} {us:8.2f} us", flush=True)
    return entry


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    workloads: Annotated[str, typer.Option(help="comma-separated")] = WORKLOADS,
    ways: Annotated[str, typer.Option(help="separated by semicolons: " + "; ".join(WAYS))] = ";".join(WAYS),
    device: str = "cuda",
    dtype: str = "bfloat16",
    tiny: Annotated[bool, typer.Option(help="small sizes, to try the script")] = False,
    calls: int = 200,
) -> None:
    """Measure host time per call."""
    known, chosen = choose(workloads), names_of(ways, WAYS, "way", ";")
    place = pick_device(device)
    facts: dict[str, Any] = {"device": target_facts(place), "torch": torch.__version__, "calls": calls, "workloads": []}
    for workload in known:
        facts["workloads"].append(measure(workload, chosen, place, pick_dtype(dtype), tiny, calls))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
