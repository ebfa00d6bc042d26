"""Configurations of single generated kernels against each other: `python -m benchmarks.kernels_micro --out FOLDER`.

Every case is one function that lowers to one region. Its values are checked against float64 in every configuration, next to
eager's own error; then all configurations are timed on this GPU, with inputs in the L2 cache and without. The JSON says what
the cost model proposes first, so that the cost model can be corrected. About a minute on an H100 with 16 cores.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.choosing import containing_any
from benchmarks.results import target_facts, versions
from fxopt.capture.symbols import to_int
from fxopt.codegen import triton
from fxopt.codegen.compile import compile_kernels
from fxopt.codegen.triton import TritonConfig
from fxopt.errors import UnsupportedError
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.kernel import Artifact, CompileFailure
from fxopt.ir.region import Ref, Region
from fxopt.journal import Journal
from fxopt.lower import Lowered, lower_graph
from fxopt.lower.cost import nbytes
from fxopt.lower.schedule import schedule
from fxopt.report.cases import widened
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.candidate import Candidate, Choice
from fxopt.tune.measure import interleaved, runner

BF16, F32 = torch.bfloat16, torch.float32
EAGER_SHARE, ROUNDINGS = 1.5, 8.0
"""A value may be this many times as far from float64 as eager's, plus so many rounding errors at the result's scale."""


_ALTERATIONS = (
    ("forwards", r"r_base = .* - r_done", "r_base = r_done"),
    ("kept", r'(tl\.store\(.*), eviction_policy="evict_first"\)', r"\1)"),
    ("unmarked", r'(tl\.load\(.*), eviction_policy="evict_\w+"\)', r"\1)"),
)


def column_sum(x: Tensor) -> Tensor:
    return x.sum(0)


def vector_product(vector: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return residual + (weight.float() * vector.float()).sum(1).to(residual.dtype)


def activation_and_bias_gradient(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    out = grad * torch.tanh(x)
    return out, out.sum(0)


def norm_weight_gradients(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return (grad * (x - mean) * scale).sum(0), grad.sum(0)


def layer_norm_gradients(
    grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide, normal = (t.to(mean.dtype) for t in (grad, x))
    normal = (normal - mean) * scale
    weighted = wide * weight
    along = (weighted * normal).mean(-1, keepdim=True)
    dx = (weighted - weighted.mean(-1, keepdim=True) - normal * along) * scale
    return dx.to(x.dtype), (wide * normal).sum(0), wide.sum(0)


def rms_norm_gradients(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    wide, normal = (t.to(scale.dtype) for t in (grad, x))
    normal = normal * scale
    weighted = wide * weight
    dx = (weighted - normal * (weighted * normal).mean(-1, keepdim=True)) * scale
    return dx.to(x.dtype), (wide * normal).sum(0)


def embedding_norm_gradients(
    ids: Tensor, grad: Tensor, table: Tensor, mean: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, along_weight, along_bias = layer_norm_gradients(grad, table[ids], mean, scale, weight)
    return torch.zeros_like(table).index_put((ids,), dx, accumulate=True), along_weight, along_bias


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x: [batch, GROUPS, channels of a group, positions]; weight and bias: [GROUPS, channels of a group]."""
    wide = x.float() if x.dtype == BF16 else x
    variance, mean = torch.var_mean(wide, (2, 3), correction=0, keepdim=True)
    normal = (wide - mean) * torch.rsqrt(variance + 1e-5) * weight[:, :, None] + bias[:, :, None]
    return torch.nn.functional.silu(normal).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float() if x.dtype == BF16 else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)


def batch_norm_sums(positive: Tensor, grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """What the gradients of a batch norm under a ReLU reduce to; `positive` is the ReLU's mask, an integer here."""
    kept = torch.where(positive > 0, grad.to(mean.dtype), 0.0)
    return kept.sum((0, 2)), (kept * (x.to(mean.dtype) - mean)).sum((0, 2))


def batch_norm_input_gradient(positive: Tensor, grad: Tensor, x: Tensor, mean: Tensor, slope: Tensor) -> Tensor:
    kept = torch.where(positive > 0, grad.to(mean.dtype), 0.0)
    return ((kept - (x.to(mean.dtype) - mean) * slope) * slope).to(grad.dtype)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.var_mean(x, (0, 2, 3), correction=0)


def layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    wide = total.float() if total.dtype == BF16 else total
    variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    return ((wide - mean) * torch.rsqrt(variance + 1e-5) * weight + bias).to(x.dtype), total


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """`mask` is one row for all, an integer here."""
    return torch.softmax((x * 0.125).masked_fill(mask > 0, float("-inf")), -1)


def log_total(x: Tensor) -> Tensor:
    return torch.logsumexp(x.float() if x.dtype == BF16 else x, -1)


def gelu_mul(x: Tensor, gate: Tensor) -> Tensor:
    return torch.nn.functional.gelu(gate) * x


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def widen(x: Tensor, y: Tensor) -> Tensor:
    return x.double() * 2 + y if x.dtype == torch.float64 else x.float() * 2 + y


def transposed_add(x: Tensor, y: Tensor) -> Tensor:
    return x.t() + y


def heads_first(x: Tensor) -> Tensor:
    return x.permute(0, 2, 1, 3).contiguous()


def channels_last_to_first(x: Tensor, bias: Tensor) -> Tensor:
    return (x + bias[:, None, None]).contiguous()


@dataclass(frozen=True)
class MicroCase:
    """`shapes` are the inputs'; `dtypes` theirs, integers being below `upper`; a fourth-rank first input is channels-last
    when `nhwc`."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    nhwc: bool = False
    upper: int = 0

    @property
    def title(self) -> str:
        shape, dtype = max(
            zip(self.shapes, self.dtypes, strict=True), key=lambda t: (t[1].is_floating_point, math.prod(t[0]))
        )
        name = str(dtype).removeprefix("torch.")
        return f"{self.name} {'x'.join(map(str, shape))} {name}{' nhwc' if self.nhwc else ''}"

    def inputs(self, device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        made = [
            torch.empty(s, device=device, dtype=d).normal_(generator=generator)
            if d.is_floating_point
            else torch.randint(self.upper, s, device=device, dtype=d, generator=generator)
            for s, d in zip(self.shapes, self.dtypes, strict=True)
        ]
        return [t.contiguous(memory_format=torch.channels_last) if self.nhwc and t.dim() == 4 else t for t in made]


def _same(
    name: str, function: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype, nhwc: bool = False
) -> MicroCase:
    return MicroCase(name, function, shapes, (dtype,) * len(shapes), nhwc)


def cases(scale: int = 1) -> Iterator[MicroCase]:
    """What real models spend memory-bound time in. `scale` divides the number of rows (for tests)."""
    rows = max(8, 4096 // scale)
    for width, dtype in ((768, BF16), (3072, BF16), (50257, BF16), (768, F32)):
        yield _same("column-sum", column_sum, (rows, width), dtype=dtype)
    for width in (768, 3072):
        yield _same("bias-gradient", activation_and_bias_gradient, (rows, width), (rows, width), dtype=BF16)
    yield _same("norm-gradients", norm_weight_gradients, (rows, 768), (rows, 768), (rows, 1), (rows, 1), dtype=BF16)
    for count, width, dtype in (
        (2 * rows, 1024, BF16),
        (16 * rows, 1024, BF16),
        (4 * rows, 768, BF16),
        (128 * rows, 64, F32),
        (16 * rows, 256, F32),
        (2 * rows, 8192, BF16),
        (rows, 4096, F32),
    ):
        count = max(count, 512)  # fewer rows have sums of their own
        whole, row, line = (count, width), (count, 1), (width,)
        yield MicroCase("rms-norm-gradients", rms_norm_gradients, (whole, whole, row, line), (dtype, dtype, F32, F32))
        shapes, types = (whole, whole, row, row, line), (dtype, dtype, F32, F32, F32)
        yield MicroCase("layer-norm-gradients", layer_norm_gradients, shapes, types)
    for channels, side in ((64, 56), (256, 56), (2048, 7)):
        shape = (max(2, 64 // scale), channels, side, side)
        yield _same("batch-statistics", batch_statistics, shape, dtype=BF16, nhwc=True)
    for count, width, dtype in ((rows, 768, BF16), (4 * rows, 4096, BF16), (rows, 768, F32), (rows, 4096, F32)):
        yield _same("layer-norm", layer_norm, (count, width), (count, width), (width,), (width,), dtype=dtype)
    for count, width, dtype in ((12 * rows, 128, F32), (12 * rows, 197, BF16), (4 * rows, 64, BF16), (rows, 4096, BF16)):
        yield _same("softmax", softmax, (count, width), dtype=dtype)
    for width in (50257, 32000):
        many = max(rows, 256)  # fewer long rows become several kernels
        yield _same("softmax", softmax, (many, width), dtype=BF16)
        yield _same("log-total", log_total, (many, width), dtype=BF16)
    for dtype in (BF16, F32):
        yield _same("gelu-mul", gelu_mul, (2 * rows, 4096), (2 * rows, 4096), dtype=dtype)
        yield _same("add", add, (rows, 768), (rows, 768), dtype=dtype)
        yield _same("transposed-add", transposed_add, (rows, 4096), (4096, rows), dtype=dtype)
        yield _same("heads-first", heads_first, (32, max(8, 512 // scale), 12, 64), dtype=dtype)
    yield MicroCase("widen", widen, ((rows, 4096), (rows, 4096)), (BF16, F32))
    yield _same("nhwc-to-nchw", channels_last_to_first, (max(2, 64 // scale), 256, 56, 56), (256,), dtype=BF16, nhwc=True)


def long_rows(scale: int = 1) -> Iterator[MicroCase]:
    """Rows that do not fit on chip, and other passes that once were slower than elsewhere. `scale` divides lengths."""
    long = max(64, 131072 // scale)
    for count, dtype in ((256, F32), (512, BF16), (32, F32)):
        shape, line = (max(2, count // scale), 8, 4, long // 4), (8, 4)
        yield _same("long-rows group-norm-silu", group_norm_silu, shape, line, line, dtype=dtype)
    for count, dtype in ((4096, BF16), (2048, F32)):
        yield _same("long-rows rms-norm", rms_norm, (max(300, count // scale), long), (long,), dtype=dtype)
    whole = (max(300, 2048 // scale), long)
    yield _same("long-rows add-layer-norm", layer_norm, whole, whole, (long,), (long,), dtype=F32)
    for count, dtype in ((256, F32), (2048, BF16), (2048, F32)):
        count = count if scale == 1 else max(512, count // scale)
        whole, row, line = (count, long), (count, 1), (long,)
        types = (dtype, dtype, F32, F32)
        yield MicroCase("long-rows rms-norm-gradients", rms_norm_gradients, (whole, whole, row, line), types)
        yield MicroCase(
            "long-rows layer-norm-gradients", layer_norm_gradients, (whole, whole, row, row, line), (*types[:3], F32, F32)
        )
    for count, width in ((4096, 14336), (4096, 4096), (6144, 4096), (28672, 4096), (768, 3072)):
        some, inner = max(64, count // scale), max(64, width // scale)
        yield _same("vector-product", vector_product, (inner,), (some, inner), (some,), dtype=BF16)
    for count, width, dtype in ((8388608, 64, BF16), (65536, 8192, BF16), (32768, 8192, F32)):
        yield _same("long-rows column-sum", column_sum, (max(64, count // scale), width), dtype=dtype)
    for count, width in ((4096, 8192), (32768, 1024)):
        shapes = ((max(300, count // scale), width), (width,))
        yield MicroCase("long-rows masked-softmax", masked_softmax, shapes, (F32, torch.int8), upper=2)
    count = max(1024, 4194304 // scale)
    words = count // 8
    shapes = ((count,), (count, 64), (words, 64), (count, 1), (count, 1), (64,))
    yield MicroCase(
        "long-rows embedding-norm-gradients", embedding_norm_gradients, shapes, (torch.int64, *[F32] * 5), upper=words
    )
    for images, size, dtype in ((128, 8192, F32), (8192, 64, F32), (16384, 1024, BF16)):
        whole, channel = (max(8, images // scale), 32, size), (32, 1)
        types = (torch.int8, dtype, dtype, F32)
        yield MicroCase("long-rows batch-norm-sums", batch_norm_sums, (whole, whole, whole, channel), types, upper=2)
        yield MicroCase(
            "long-rows batch-norm-input-gradient",
            batch_norm_input_gradient,
            (whole, whole, whole, channel, channel),
            (*types, F32),
            upper=2,
        )


def lower(case: MicroCase, inputs: Sequence[Tensor], prepare: Callable[[Lowered], Lowered] = lambda x: x) -> Lowered:
    """The case as one region, after regions that only fill its outputs; `prepare` sees it before it is scheduled. Raises
    ValueError when it lowers to more, or to library calls.
    """
    gm = make_fx(lambda *given: case.function(*given), tracing_mode="fake")(*inputs)
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    graph = Graph(gm, [Input(n, Role.USER) for n in names], Phase.INFERENCE, case.title, to_int)
    lowered = schedule(prepare(lower_graph(graph, Journal(case.title))))
    *fills, last = lowered.steps
    if not isinstance(last, Region) or not all(isinstance(s, Region) and not s.reads() for s in fills):
        raise ValueError(f"{case.title} is not one kernel: {lowered.steps}")
    return lowered


def main_region(lowered: Lowered) -> Region:
    region = lowered.steps[-1]
    assert isinstance(region, Region)
    return region


def variants(region: Region, target: Target) -> list[TritonConfig]:
    """The cost model's proposals, best first, then a grid of its neighbours."""
    proposed = triton.configs(region, target)
    first = proposed[0]
    grid: list[TritonConfig] = []
    for factor, warps in itertools.product((0.5, 1, 2), (0.5, 1, 2)):
        x, w = max(1, int(first.x_block * factor)), min(32, max(1, int(first.num_warps * warps)))
        grid.append(TritonConfig(x, first.y_block, first.r_block, first.persistent, w))
    if first.statistics:
        shapes = ((32, 32, 4), (32, 64, 8), (64, 16, 4), (64, 32, 8), (128, 16, 8), (128, 8, 4), (256, 8, 8))
        grid = [TritonConfig(x, r_block=r, persistent=False, num_warps=w, statistics=True) for x, r, w in shapes]
        grid.append(replace(first, split=4))
    elif region.nest.reduced and not first.persistent and first.x_block == 1 and first.r_block >= 1024:
        alone = [replace(c, split=1) for c in (first, replace(first, r_block=8192, num_warps=32))]
        grid = [replace(c, stages=s) for c in alone for s in (1, 3)]
        grid += [replace(first, split=p) for p in (2, 4, 8, 16, 64)]
        several = (
            (1, 4096, 4),
            (1, 4096, 16),
            (1, 8192, 8),
            (2, 1024, 4),
            (2, 2048, 4),
            (2, 2048, 8),
            (4, 1024, 8),
            (8, 512, 8),
        )
        grid += [replace(first, x_block=x, r_block=r, num_warps=w) for x, r, w in several]
    elif region.across is not None and first.split > 1:
        grid = [replace(first, stages=s, split=int(first.split * f)) for s in (1, 2, 3) for f in (1, 0.5, 2)]
        grid += [replace(first, x_block=2 * first.x_block), replace(first, num_warps=2 * first.num_warps)]
    elif first.split > 1:
        grid = [TritonConfig(1, split=p) for p in (first.split * 2, first.split // 4) if p > 1] + grid[3:6]
    kept = [c for c in grid if c not in proposed and 1 <= c.x_block * c.y_block * c.r_block <= 1 << 17]
    return [*proposed, *kept]


def _with_alterations(candidate: Candidate) -> Iterator[Candidate]:
    """`candidate`, and with its second loops forwards, its stores kept in the cache or its loads unmarked, to see what that
    costs."""
    yield candidate
    for name, pattern, text in _ALTERATIONS:
        sources = [replace(s, text=re.sub(pattern, text, s.text)) if "r_base" in s.text else s for s in candidate.sources]
        yield Candidate(f"{candidate.label} {name}", tuple(sources), candidate.scratch)


def candidates(region: Region, target: Target) -> list[Candidate]:
    """Every variant that prints, once per distinct code."""
    found: dict[object, Candidate] = {}
    for config in variants(region, target):
        try:
            printed = triton.print_region(region, config, target)
        except UnsupportedError:
            continue
        for candidate in _with_alterations(Candidate(str(config), printed.kernels, printed.scratch)):
            found.setdefault(candidate.identity, candidate)
    return list(found.values())


def build(prepared: Sequence[list[Candidate]], target: Target, store: ArtifactStore) -> list[list[Choice]]:
    """Compile every candidate of every case in one go; those that fail are left out."""
    sources = [s for group in prepared for c in group for s in c.sources]
    results = dict(zip(map(id, sources), compile_kernels(sources, target, store), strict=True))
    out = []
    for group in prepared:
        choices = []
        for candidate in group:
            pairs = [(s, results[id(s)]) for s in candidate.sources]
            kernels = tuple((s, a) for s, a in pairs if isinstance(a, Artifact))
            if not any(isinstance(a, CompileFailure) for _, a in pairs):
                choices.append(Choice(candidate.label, kernels, candidate.scratch))
        out.append(choices)
    return out


def flat(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def excess(outputs: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error over what is allowed (see EAGER_SHARE); at most 1 is right."""
    worst = 0.0
    for got, own, want in zip(outputs, eager, exact, strict=True):
        error, eagers = ((t.double() - want).abs().max().item() for t in (got, own))
        allowed = EAGER_SHARE * eagers + ROUNDINGS * torch.finfo(got.dtype).eps * max(want.abs().max().item(), 1e-30)
        worst = max(worst, error / allowed if math.isfinite(error) else float("inf"))
    return worst


Launch = Callable[[Choice, dict[str, Tensor]], None]


def launch_on_gpu(choice: Choice, tensors: dict[str, Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    run = runner(choice.trial, tensors, {})
    if run is None:
        raise RuntimeError(f"{choice.label} does not load")
    for name, tensor in tensors.items():  # the runner has tried its kernels once, and what they add to would count it twice
        tensor.copy_(before[name])
    run()


def memory(lowered: Lowered, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Every buffer by name. What is no input starts as NaN, or as zero where a region before the last fills it."""
    tensors = dict(zip(lowered.inputs, inputs, strict=True))
    filled = {name for step in lowered.steps[:-1] if isinstance(step, Region) for name in step.writes()}
    for name, spec in lowered.buffers.items():
        if name not in tensors:
            made = torch.empty_strided(spec.shape, spec.strides, dtype=spec.dtype, device=spec.device)  # type: ignore[arg-type]
            tensors[name] = made.fill_(0.0 if name in filled else float("nan"))
    return tensors


def check(lowered: Lowered, choice: Choice, inputs: Sequence[Tensor], eager: Any, exact: Any, launch: Launch) -> float:
    """`excess` of what `choice` computes from `inputs`."""
    tensors = memory(lowered, inputs)
    launch(choice, tensors)
    outputs = [_output(tensors, lowered, ref) for ref in lowered.outputs]
    return excess(outputs, flat(eager), flat(exact))


def _output(tensors: dict[str, Tensor], lowered: Lowered, ref: Any) -> Tensor:
    assert isinstance(ref, Ref)
    return tensors[ref.name]


def measure(case: MicroCase, lowered: Lowered, choices: list[Choice], device: torch.device) -> dict[str, Any]:
    """Errors and times of every choice, as JSON data."""
    inputs = case.inputs(device)
    eager = case.function(*inputs)
    exact = case.function(*widened(inputs))
    loading = []
    for choice in choices:
        run = runner(choice.trial, memory(lowered, inputs), {})
        if run is None:
            typer.echo(f"{case.title}: {choice.label} does not load")
        else:
            loading.append(choice)
    choices = loading
    errors = [check(lowered, c, inputs, eager, exact, launch_on_gpu) for c in choices]
    del exact, eager
    moved = sum(nbytes(spec) for spec in main_region(lowered).buffers.values())
    tensors = memory(lowered, inputs)
    runs = [runner(choice.trial, tensors, {}) for choice in choices]
    hot, cold = (interleaved(runs, device, cold=cold) for cold in (False, True))
    del runs, tensors
    rows = []
    for choice, error, warm, cool in zip(choices, errors, hot, cold, strict=True):
        rows.append(
            {
                "label": choice.label,
                "entries": [a.entry for _, a in choice.kernels],
                "grid": [s.grid[0] for s, _ in choice.kernels],
                "registers": [a.meta.get("n_regs") for _, a in choice.kernels],
                "spills": [a.meta.get("n_spills") for _, a in choice.kernels],
                "excess_error": error,
                "us_hot": warm * 1e6,
                "us_cold": cool * 1e6,
                "gb_per_s_cold": moved / cool / 1e9,
            }
        )
    return {
        "case": case.title,
        "bytes": moved,
        "eager_us": interleaved([lambda: case.function(*inputs)], device, cold=True)[0] * 1e6,
        "rows": rows,
    }


def report(entry: dict[str, Any]) -> str:
    rows = entry["rows"]
    first, best = rows[0], min(rows, key=lambda r: r["us_cold"])
    wrong = sum(r["excess_error"] > 1 for r in rows)
    text = f"{entry['case']:<44} eager {entry['eager_us']:8.1f} us"
    for word, row in (("first", first), ("best", best)):
        text += f" | {word} {row['label']:<28} hot {row['us_hot']:8.1f} cold {row['us_cold']:8.1f} us"
    return text + f" | {first['gb_per_s_cold']:5.0f} GB/s" + (f" | {wrong} WRONG" if wrong else "")


def main(
    out: Annotated[Path, typer.Option(help="folder for kernels_micro.json")],
    only: Annotated[str, typer.Option(help="run cases whose title contains one of these, separated by commas")] = "",
) -> None:
    """Check and time the configurations of generated kernels on this machine's first GPU."""
    chosen = containing_any((*cases(), *long_rows()), only, lambda case: case.title)
    device = torch.device("cuda", 0)
    target, store = Target.current(device), ArtifactStore()
    start = time.perf_counter()
    lowered = [lower(case, case.inputs(device)) for case in chosen]
    built = build([candidates(main_region(low), target) for low in lowered], target, store)
    compiled = time.perf_counter() - start
    typer.echo(f"{sum(map(len, built))} configurations of {len(chosen)} kernels compiled in {compiled:.1f} s")
    data: dict[str, Any] = {"target": target_facts(device), "versions": versions(), "compile_seconds": compiled, "cases": []}
    out.mkdir(parents=True, exist_ok=True)
    for case, low, choices in zip(chosen, lowered, built, strict=True):
        data["cases"].append(measure(case, low, choices, device))
        typer.echo(report(data["cases"][-1]))
        (out / "kernels_micro.json").write_text(json.dumps(data, indent=1) + "\n")
        torch.cuda.empty_cache()
    wrong = [r["label"] for c in data["cases"] for r in c["rows"] if r["excess_error"] > 1]
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
