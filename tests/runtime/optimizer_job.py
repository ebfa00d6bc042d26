"""Compiled optimizer steps as on a GPU, without one: plans with batched kernels, run on CPU memory by Triton's interpreter.

A script, since the interpreter is chosen when triton is imported: `python -m tests.runtime.optimizer_job CASE...` steps each
case's optimizer and eager's side by side and writes, as JSON, what was launched and how far the results are off. A case is
the name of an optimizer, or that and ", kept" for gradients that stay where they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # what imports this module goes on compiling kernels
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.optimizers import Lion
from fxopt import passes
from fxopt.assemble import assemble
from fxopt.backend import compile_dynamo_graph
from fxopt.codegen.triton_build import _load
from fxopt.codegen.triton_ops import POINTER_TYPE
from fxopt.ir.graph import Graph
from fxopt.ir.kernel import Artifact, KernelSource
from fxopt.ir.region import Batch, Region, Step
from fxopt.journal import Journal
from fxopt.lower import Lowered, lower_graph
from fxopt.lower.schedule import schedule
from fxopt.options import Options
from fxopt.runtime import batch, executor
from fxopt.runtime.executor import Executor
from fxopt.runtime.plan import Plan
from fxopt.target import Target
from fxopt.tune.candidate import Choice, batch_candidates, triton_candidates
from tests.codegen import triton_interpreter

CUDA, TARGET = torch.device("cuda", 0), Target.cuda(90)
STEPS = 4
KEPT = ", kept"
SIZES = ((1,), (3,), (33, 31), (1024,), (1000,), (2048,), (64, 48), (16, 64, 3), (1,), (5000,))

COMPILED = {"foreach": True, "capturable": True}
"""What torch.compile makes of an optimizer on a GPU; eager refuses the second on a CPU."""

MAKES: dict[str, Callable[..., Any]] = {
    "sgd": lambda p, **how: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
    "adam": lambda p, **how: torch.optim.Adam(p, lr=1e-2, **how),
    "adamw": lambda p, **how: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True, **how),
    "adamw, lr a tensor": lambda p, **how: torch.optim.AdamW(p, lr=torch.tensor(1e-2), **how),
    "lion": lambda p, **how: Lion(p, lr=1e-2),
}


def on_cuda(lowered: Lowered) -> Lowered:
    """`lowered` with its kernels said to run on a GPU; memory stays where it is."""
    return replace(lowered, steps=[replace(s, device=CUDA) if isinstance(s, Region) else s for s in lowered.steps])


class Machine:
    """Compiles graphs to plans whose kernels are interpreted; counts launches and copies of tables."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.launched, self.copied = directory, [], 0  # type: ignore[var-annotated]
        self.functions: dict[str, tuple[Any, KernelSource]] = {}
        self.stream = 7

    def compile_graph(self, graph: Graph, inputs: Sequence[Any], options: Options, journal: Journal) -> Executor:
        passes.run(graph, options, journal)
        lowered = schedule(on_cuda(lower_graph(graph, journal)))
        chosen = {s.name: self.choice(s) for s in lowered.steps if isinstance(s, Region | Batch)}
        plan = Plan.from_json(assemble(graph, lowered, chosen, journal).to_json())
        artifacts = {a.key: a for c in chosen.values() for _, a in c.kernels}
        return Executor(plan, artifacts, lowered.constants, lowered.local_ops)

    def choice(self, step: Step) -> Choice:
        found = batch_candidates if isinstance(step, Batch) else triton_candidates
        candidate = found(step, TARGET, "default")[0]  # type: ignore[arg-type]
        return Choice(candidate.label, tuple((s, self.artifact(s)) for s in candidate.sources), candidate.scratch)

    def artifact(self, source: KernelSource) -> Artifact:
        key = source.key("interpreter")
        if key not in self.functions:
            (self.directory / key).mkdir()
            self.functions[key] = _load(source.text, source.entry, self.directory / key), source
        return Artifact(key, "triton", source.entry, self.directory)

    def loaded(self, launches: Sequence[Any], kernels: dict[str, Artifact], known: Any) -> list[Any]:
        return [_Kernel(self, *self.functions[launch.kernel]) for launch in launches]

    def page_locked(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int64)

    def on_device(self, source: torch.Tensor, device: torch.device, wait: bool = False) -> torch.Tensor:
        self.copied += source.dim() == 1 and source.dtype == torch.int64
        return source.clone()


class _Kernel:
    def __init__(self, machine: Machine, function: Any, source: KernelSource) -> None:
        self.machine, self.function, self.source = machine, function, source

    def bind(self, label: str, early: bool = False) -> Callable[..., None]:
        types = list(self.source.compile_options["signature"].values())
        blocks = self.source.compile_options["constexprs"]

        def launch(stream: int, gx: int, gy: int, gz: int, *arguments: int) -> None:
            assert stream == self.machine.stream
            self.machine.launched.append(self.source.entry)
            given = [_at(a, t) if t.startswith("*") else a for a, t in zip(arguments, types, strict=True)]
            self.function[gx, gy, gz](*given, **blocks)

        return launch


def _at(address: int, kind: str) -> torch.Tensor:
    """A tensor that begins at `address`: all that the interpreter wants to know of it."""
    dtype = next(d for d, t in POINTER_TYPE.items() if t == kind)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


@contextlib.contextmanager
def machine() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory() as directory:
        made = Machine(Path(directory))
        executor._loaded_cuda = made.loaded  # type: ignore[assignment]
        executor._HELPERS["stream"] = lambda device: made.stream
        torch.cuda.current_device = lambda: 0
        torch.cuda.is_current_stream_capturing = lambda: False
        batch.page_locked, batch._on_device = made.page_locked, made.on_device
        triton_interpreter._fake_libdevice()
        triton_interpreter._patch_once()
        triton_interpreter._enable_asserts()
        yield made


def values(dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """One tensor of each size; every third starts four bytes past an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for k, shape in enumerate(SIZES):
        drawn = torch.randn(shape, generator=generator).to(dtype)
        out.append(torch.empty(drawn.numel() + 1, dtype=dtype)[1:].view(shape).copy_(drawn) if k % 3 == 2 else drawn)
    return out


def stepped(make: Callable[..., Any], dtype: torch.dtype, keep: bool, backend: Any = None) -> list[torch.Tensor]:
    """Parameters and state after some steps; gradients stay where they are if `keep`, else each step has new ones."""
    parameters = [torch.nn.Parameter(v) for v in values(dtype, 1)]
    optimizer = make(parameters, **(COMPILED if backend is not None else {}))
    step = torch.compile(optimizer.step, backend=backend) if backend is not None else optimizer.step
    for number in range(STEPS):
        for p, g in zip(parameters, values(dtype, 10 + number), strict=True):
            if keep and p.grad is not None:
                p.grad.copy_(g)
            else:
                p.grad = g
        step()
    kept = (
        optimizer.momenta
        if isinstance(optimizer, Lion)
        else [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    )
    return [*(p.detach() for p in parameters), *kept]


def off_by(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(float((g.double() - e).abs().max() / e.abs().max().clamp(min=1e-3)) for g, e in zip(got, exact, strict=True))


def main(cases: Sequence[str]) -> None:
    report = {}
    with machine() as made:

        def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            return compile_dynamo_graph(gm, inputs, Options.parse(None, {"strict": True}), made.compile_graph)

        for case in cases:
            name, keep = case.removesuffix(KEPT), case.endswith(KEPT)
            torch.compiler.reset()
            made.launched, made.copied = [], 0
            got = stepped(MAKES[name], torch.float32, keep, backend)
            eager, exact = (stepped(MAKES[name], d, keep) for d in (torch.float32, torch.float64))
            report[case] = {
                "launched": made.launched,
                "copied": made.copied,
                "off": off_by(got, exact),
                "eager off": off_by(eager, exact),
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
