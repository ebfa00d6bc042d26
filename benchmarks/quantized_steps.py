"""What each step of a quantized model takes, beside what it could: `python -m benchmarks.quantized_steps --out FOLDER`.

Each workload (a model of `fxopt bench`) is compiled in its own dtype and in each precision; the kernels of replays of its
plan are timed by the profiler and put beside the plan's steps. A step's `limit` is the longer of two times: that of its
bytes (each buffer it names, once) at the rate of a copy, and that of its products at the rate of large products of their
dtype (twice that of 16 bits for 8). Equal steps (the layers) are one line: how often, microseconds of one, limit, and what
is lost in all. The sum of limits is a floor under this plan, not under the model: other plans may have fewer steps. Beside
them stand the contests that the tuner held, in microseconds.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from benchmarks.choosing import names_of
from benchmarks.early_launch import timeline
from benchmarks.models import choose
from benchmarks.quantized_models import contenders
from benchmarks.results import revision, target_facts, versions
from fxopt.cli import pick_device, pick_dtype
from fxopt.ir.exprs import evaluate
from fxopt.ir.graph import Role
from fxopt.ir.region import Alias, BufferSpec, Call, refs
from fxopt.precision import PRECISIONS
from fxopt.quant.calibrate import calibrate
from fxopt.report.backends import resolve_backend, unshared
from fxopt.report.cases import Case
from fxopt.runtime.cuda_graph import GraphedExecutor
from fxopt.runtime.executor import Executor
from fxopt.runtime.plan import Launch, Plan
from fxopt.target import Target
from fxopt.tune import alternatives

Kernel = tuple[str, float]
"""Its name, and its microseconds."""

LOOK_AHEAD = 8
"""Steps among which a kernel is looked for: another one of its name may be at the end."""

_CONVOLUTION = "aten::convolution.default"

PROFILED = 5
"""Calls, of which each kernel's median counts."""


@dataclass
class Step:
    """A step of a plan: `of_products` are the sizes M, K, N of what it multiplies, and their operands' dtype."""

    what: str
    label: str
    nbytes: int
    products: list[tuple[int, int, int, torch.dtype]] = field(default_factory=list)
    us: float = 0.0

    def limit(self, target: Target) -> float:
        """Microseconds."""
        rates = [(2.0 * m * k * n, target.half_flops * (2.0 / dtype.itemsize)) for m, k, n, dtype in self.products]
        return 1e6 * max(self.nbytes / target.memory_rate, sum(flops / rate for flops, rate in rates))


def steps_of(plan: Plan) -> list[Step]:
    """The launches and calls of `plan`, in order. What kernels bring for later ones (`tune/ahead.py`) is these ones': of
    constants and parameters, the last one's that names them.
    """
    specs: dict[str, BufferSpec] = {b.name: b for b in (*plan.constants, *plan.buffers)}
    for given in plan.inputs:
        if given.kind == "tensor" and given.dtype is not None and given.device is not None:
            specs[given.name] = BufferSpec(given.name, given.dtype, given.device, given.shape, given.strides)
    views = {s.name: s for s in plan.steps if isinstance(s, Alias)}

    def root(name: str) -> str:
        while name in views:
            name = views[name].of
        return name

    found = []
    last = {root(name): step for step in plan.steps if isinstance(step, Launch) for name in step.buffers}
    weights = {c.name for c in plan.constants} | {given.name for given in plan.inputs if given.role is Role.PARAMETER}
    for step in plan.steps:
        if isinstance(step, Launch):
            names = [n for n in step.buffers if root(n) not in weights or last[root(n)] is step]
            label, what = step.label, step.entry
        elif isinstance(step, Call):
            names = [*refs((step.args, step.kwargs)), *(n for n in step.outputs if n)]
            label, what = "", step.op
        else:
            continue
        touched = [specs[n] for n in dict.fromkeys(map(root, names)) if n in specs]
        own = Step(what, label, _moved(touched, "gather" in what))
        if what.startswith("fx_conv") or what == _CONVOLUTION:
            own.products = _convolution([specs[n] for n in map(root, names) if n in specs])
        elif what.startswith(("fx_gemm", "fx_weight_gemm")) or "mm" in what.partition("::")[2]:
            own.products = _products([specs[n] for n in map(root, names) if n in specs], what)
        found.append(own)
    return found


def _moved(touched: Sequence[BufferSpec], gathers: bool) -> int:
    """Bytes of `touched`; of a table that a step gathers from, no more than the largest of the others."""
    sizes = sorted(map(_nbytes, touched))
    if gathers and len(sizes) > 1:
        sizes[-1] = min(sizes[-1], sizes[-2])
    return sum(sizes)


def _nbytes(spec: BufferSpec) -> int:
    return _elements(spec) * spec.dtype.itemsize


def _elements(spec: BufferSpec) -> int:
    sizes = (evaluate(n, {}) for n, stride in zip(spec.shape, spec.strides, strict=True) if stride != 0)
    return math.prod(sizes)


def _convolution(buffers: Sequence[BufferSpec]) -> list[tuple[int, int, int, torch.dtype]]:
    """The product of patches that a convolution is: of images, the first buffer, by a weight, the second one; the result is
    the last one of four sizes, [N, C, H, W].
    """
    images = [[evaluate(n, {}) for n in b.shape] for b in buffers if len(b.shape) == 4]
    if len(images) < 2:
        return []
    count, channels, height, width = images[-1]
    return [(count * height * width, _elements(buffers[1]) // channels, channels, buffers[0].dtype)]


def _products(buffers: Sequence[BufferSpec], what: str) -> list[tuple[int, int, int, torch.dtype]]:
    """The product of the first two matrices that have an inner dimension in common, by their largest dimensions."""
    matrices = [b for b in buffers if len([n for n in b.shape if n != 1]) >= 2]
    if what.startswith("aten::addmm"):
        matrices = matrices[-3:]
    if len(matrices) < 2:
        return []
    a, b = matrices[:2]
    inner = {evaluate(n, {}) for n in a.shape} & {evaluate(n, {}) for n in b.shape} - {1}
    if not inner:
        return []
    k = evaluate(a.shape[-1], {}) if evaluate(a.shape[-1], {}) in inner else max(inner)
    return [(_elements(a) // k, k, _elements(b) // k, a.dtype)]


def timed(steps: Sequence[Step], kernels: Sequence[Kernel]) -> None:
    """Note in `steps` the microseconds of `kernels`, in the order in which they ran: launches are known by their names, and
    what lies between belongs to the call there, or to the first of several.
    """
    at = 0
    for name, us in kernels:
        ahead = next((k for k in range(at, min(at + LOOK_AHEAD, len(steps))) if name == steps[k].what[:60]), None)
        if ahead is not None:
            steps[ahead].us += us
            at = ahead + 1
            continue
        calls = [k for k in range(max(at - 1, 0), len(steps)) if "::" in steps[k].what]
        if calls:
            steps[calls[0]].us += us
            at = max(at, calls[0])


def shown(spans: Sequence[tuple[str, float, float]]) -> list[Kernel]:
    """Kernels, given as name, start and length, with the time that each adds: one launched early waits for the one before
    it, and both are not to be counted at once.
    """
    found, ended = [], 0.0
    for name, start, length in spans:
        found.append((name, max(start + length - max(start, ended), 0.0)))
        ended = max(ended, start + length)
    return found


def grouped(steps: Sequence[Step], target: Target) -> Iterator[dict[str, Any]]:
    """Equal steps as one line, by what is lost."""
    equal: dict[tuple[Any, ...], list[Step]] = {}
    for step in steps:
        equal.setdefault((step.what, step.nbytes, *map(repr, step.products)), []).append(step)
    lines = []
    for same in equal.values():
        us, limit = statistics.mean(s.us for s in same), same[0].limit(target)
        lines.append(
            {
                "step": same[0].what,
                "label": same[0].label,
                "times": len(same),
                "us": round(us, 2),
                "limit us": round(limit, 2),
                "lost us": round(len(same) * (us - limit), 1),
                "megabytes": round(same[0].nbytes / 1e6, 2),
                "products": [[m, k, n, str(dtype).removeprefix("torch.")] for m, k, n, dtype in same[0].products],
            }
        )
    yield from sorted(lines, key=lambda line: -line["lost us"])


@contextlib.contextmanager
def noted() -> Iterator[dict[str, dict[str, float]]]:
    """Yields the contests that compilations in the block hold, or know the results of: microseconds by label."""
    contests: dict[str, dict[str, float]] = {}
    real = alternatives.decide

    def decide(key: Any, name: str, *rest: Any) -> Any:
        found = real(key, name, *rest)
        if found is not None:
            contests[f"{len(contests)} {name}"] = {label: round(s * 1e6, 2) for label, s in found[1].items()}
        return found

    with mock.patch.object(alternatives, "decide", decide):
        yield contests


def executed(known: set[int]) -> GraphedExecutor | Executor | None:
    """The executor with the longest plan that is not among `known` (identities)."""
    found = [x for x in gc.get_objects() if type(x) in (GraphedExecutor, Executor) and id(x) not in known]
    return max(found, key=lambda x: len(x.plan.steps), default=None)


def measured(case: Case, device: torch.device, wanted: list[str]) -> dict[str, Any]:
    """By contender: the time of a call's kernels, its floor and its steps."""
    backend = resolve_backend("fxopt")
    static = [p for p in wanted if p in ("fp8", "int8")]
    calibration = calibrate(case.module, [case.inputs], progress=False, backend=backend) if static else None  # type: ignore[arg-type]
    target = Target.current(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    found = {}
    for name, options in contenders(calibration, wanted).items():  # type: ignore[arg-type]
        torch.compiler.reset()
        known = {id(x) for x in gc.get_objects() if type(x) in (GraphedExecutor, Executor)}
        compiled = torch.compile(
            unshared(case.module), backend=backend, options={k: v for k, v in options.items() if v is not None}
        )
        with noted() as contests:
            for _ in range(4):
                case.drive(compiled)
        executor = executed(known)
        if executor is None:
            continue
        steps = steps_of(executor.plan)
        calls = [shown(timeline(lambda compiled=compiled: case.drive(compiled), device, wait)) for _ in range(PROFILED)]
        alike = [call for call in calls if len(call) == len(calls[0])]
        kernels = [(own[0][0], statistics.median(k[1] for k in own)) for own in zip(*alike, strict=True)]
        timed(steps, kernels)
        lines = list(grouped(steps, target))
        found[name] = {
            "kernels us": round(sum(us for _, us in kernels), 1),
            "limit us": round(sum(s.limit(target) for s in steps), 1),
            "steps": lines,
            "kernels": kernels,
            "contests": contests,
        }
        typer.echo(f"  {name}: {found[name]['kernels us']} us in {len(kernels)} kernels, floor {found[name]['limit us']} us")
        for line in lines[:14]:
            typer.echo(
                f"    {line['times']:4d} x {line['us']:8.2f} us, limit {line['limit us']:7.2f}, lost {line['lost us']:8.1f}"
                f"  {line['step'][:48]} {line['products']} {line['megabytes']} MB"
            )
    return found


def main(
    out: Annotated[Path, typer.Option(help="folder for quantized_steps_<device>.json")],
    device: str = "auto",
    workloads: Annotated[str, typer.Option(help="names, by commas")] = "bert-base,vit-b,llama-1b-decode",
    precisions: Annotated[str, typer.Option(help="names, by commas; of decoding steps, weight-only ones instead")] = "fp8",
    few: Annotated[str, typer.Option(help="precisions of decoding steps")] = "int8-weight,int4-weight",
    minutes: Annotated[float, typer.Option(help="no workload is begun after these")] = 2.0,
    tiny: bool = False,
) -> None:
    """Put the steps of quantized models beside their limits."""
    chosen = choose(workloads)
    many, single = (names_of(names, PRECISIONS, "precision") for names in (precisions, few))
    where = pick_device(device)
    end = time.monotonic() + 60 * minutes
    document: dict[str, Any] = {"target": target_facts(where), "versions": versions(), "commit": revision(), "cases": []}
    out.mkdir(parents=True, exist_ok=True)
    for workload in chosen:
        name = workload.name
        if time.monotonic() > end:
            typer.echo(f"{name}: no time left")
            continue
        typer.echo(name)
        dtype = pick_dtype((workload.dtype or "bfloat16") if where.type == "cuda" else "float32")
        case = workload.build(workload.sizes(tiny), where, dtype)
        wanted = single if "decode" in name else many
        document["cases"].append({"workload": name, "dtype": str(dtype), "contenders": measured(case, where, wanted)})
        (out / f"quantized_steps_{where.type}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
