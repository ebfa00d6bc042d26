"""Convolutions with what follows them, by kernels of ours and by cuDNN: `python -m benchmarks.conv_kernels --out FOLDER`.

The convolutions of ResNet-50, ConvNeXt-T, MobileNetV3-Large, EfficientNet-B0, ViT-B and a UNet in bfloat16, each with bias
and the model's activation, channels-last, the gradients of the depthwise ones, and what precedes a pooling in VGG-16, Tiny
YOLOv3, the first UNet and DenseNet-121, with that (`--only pooled`). For each, the ways that the tuner would measure:
cuDNN's convolution and a generated kernel, its fused call, and our kernel in several configurations, the cost model's first
ones first. Values are checked against float64 beside eager's; times are interleaved, with operands in the L2 cache and
without. About four minutes on an H100 with 16 cores.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.choosing import containing_any
from benchmarks.conv_micro import ConvCase, Layer, convnext_t, operands, resnet50, unet
from benchmarks.kernels_micro import excess
from benchmarks.results import revision, target_facts, versions
from fxopt.capture.decompositions import decompositions
from fxopt.capture.symbols import to_int
from fxopt.codegen.compile import compile_kernels
from fxopt.codegen.templates import conv_config
from fxopt.codegen.templates.conv_config import ConvProblem, StencilConfig
from fxopt.codegen.templates.gemm_problem import GemmConfig
from fxopt.codegen.triton_contraction import with_room
from fxopt.codegen.triton_convolution import ConvConfig, convolution_problem, print_convolution
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.kernel import Artifact, KernelSource
from fxopt.ir.region import Alternatives, BufferSpec, Call, Contraction, Patches, Region, Way
from fxopt.journal import Journal
from fxopt.lower import Lowered, lower_graph
from fxopt.lower.contractions import IMPLICIT, PADDED, PADDED_POOLED, POOLED, STENCIL, with_contractions
from fxopt.lower.convolutions import CUDNN
from fxopt.lower.patches import is_common
from fxopt.lower.schedule import schedule
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.candidate import contraction_candidates, triton_candidates
from fxopt.tune.measure import BoundCall, Trial, interleaved, runner

JUDGED = 8
"""Images of which the results are compared with float64."""

SWEPT = (STENCIL, IMPLICIT, PADDED, POOLED, PADDED_POOLED)
"""The ways of which many configurations are tried."""

CHUNK = 8
"""Cases compiled together: as many as keep the workers busy, few enough to stop in time."""


def mobilenet_v3() -> Iterator[Layer]:
    """MobileNetV3-Large: the first layer and the depthwise ones."""
    yield 3, 16, 224, 3, 2, 1
    for width, side, window, stride in (
        (16, 112, 3, 1), (64, 112, 3, 2), (72, 56, 3, 1), (72, 56, 5, 2), (120, 28, 5, 1), (240, 28, 3, 2), (200, 14, 3, 1),
        (480, 14, 3, 1), (672, 14, 5, 1), (672, 14, 5, 2), (960, 7, 5, 1),
    ):  # fmt: skip
        yield width, width, side, window, stride, width


def efficientnet_b0() -> Iterator[Layer]:
    """The first layer and the depthwise ones."""
    yield 3, 32, 224, 3, 2, 1
    for width, side, window, stride in (
        (32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 5, 2), (240, 28, 5, 1), (240, 28, 3, 2),
        (480, 14, 3, 1), (480, 14, 5, 1), (672, 14, 5, 1), (672, 14, 5, 2), (1152, 7, 5, 1), (1152, 7, 3, 1),
    ):  # fmt: skip
        yield width, width, side, window, stride, width


def vit_b() -> Iterator[Layer]:
    yield 3, 768, 224, 16, 16, 1


def identity(x: Tensor) -> Tensor:
    return x


MODELS: dict[str, tuple[Callable[[], Iterator[Layer]], tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "convnext-t": (convnext_t, (1, 64), identity),
    "mobilenet-v3": (mobilenet_v3, (1, 64), F.hardswish),
    "efficientnet-b0": (efficientnet_b0, (1, 64), F.silu),
    "resnet50": (resnet50, (1, 64), F.relu),
    "vit-b": (vit_b, (1, 64), identity),
    "unet": (unet, (1, 8), F.silu),
}
"""Model -> its layers, batch sizes and activation."""


@dataclass(frozen=True)
class FusedCase:
    """activation(convolution + bias)."""

    conv: ConvCase
    activation: Callable[[Tensor], Tensor]

    @property
    def title(self) -> str:
        return self.conv.title

    def function(self, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        c = self.conv
        return (self.activation(F.conv2d(x, w, b, c.stride, c.padding, 1, c.groups)),)

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        o = operands(self.conv, device)
        return o.x, o.weight, o.bias

    def few(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Inputs for the results that are judged: those of the first images."""
        return inputs[0][:JUDGED], *inputs[1:]


@dataclass(frozen=True)
class GradientCase:
    """The gradients of a depthwise convolution's input and weight."""

    conv: ConvCase

    @property
    def title(self) -> str:
        return f"{self.conv.title} gradients"

    def function(self, grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        c = self.conv
        geometry = ([c.stride] * 2, [c.padding] * 2, [1, 1], False, [0, 0], c.groups)
        return torch.ops.aten.convolution_backward(grad, x, w, None, *geometry, [True, True, False])[:2]

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        o = operands(self.conv, device)
        return o.residual, o.x, o.weight

    def few(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All: each element of the weight's gradient is a sum over them."""
        return inputs


@dataclass(frozen=True)
class PooledCase(FusedCase):
    """pool(activation(convolution + bias)), the windows of the pooling 2 x 2 side by side."""

    pool: Callable[[Tensor, int], Tensor]
    skips: bool = False
    """Whether what is pooled is a result as well."""

    @property
    def title(self) -> str:
        return f"{self.conv.title}, {'and ' * self.skips}pooled"

    def function(self, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        (y,) = super().function(x, w, b)
        return (y, self.pool(y, 2)) if self.skips else (self.pool(y, 2),)


def pooled_cases() -> Iterator[PooledCase]:
    for width, side in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14)):
        yield PooledCase(ConvCase("vgg-16", 32, width, width, side, 3), F.relu, F.max_pool2d)
    for inside, width, side in ((3, 16, 416), (16, 32, 208), (32, 64, 104), (64, 128, 52), (128, 256, 26)):
        yield PooledCase(ConvCase("tiny-yolov3", 32, inside, width, side, 3), leaky, F.max_pool2d)
    for width, side in ((64, 256), (128, 128), (256, 64), (512, 32)):
        yield PooledCase(ConvCase("first-unet", 16, width, width, side, 3), F.relu, F.max_pool2d, skips=True)
    for width, side in ((256, 56), (512, 28), (1024, 14)):
        yield PooledCase(ConvCase("densenet-121", 64, width, width // 2, side, 1), identity, F.avg_pool2d)


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


Case = FusedCase | GradientCase


def cases() -> Iterator[Case]:
    """Each different convolution that is no plain product, once; those before a pooling; gradients of the depthwise ones."""
    listed = list[FusedCase]()
    for model, (layers, batches, activation) in MODELS.items():
        for batch in batches:
            for layer in dict.fromkeys(layers()):
                case = ConvCase(model, batch, *layer)
                if not case.is_product:
                    listed.append(FusedCase(case, activation))
    yield from listed
    yield from pooled_cases()
    yield from (GradientCase(c.conv) for c in listed if c.conv.groups > 1 and c.conv.batch > 1)


def lower(case: Case, inputs: Sequence[Tensor]) -> tuple[Lowered, Alternatives]:
    """The case, and the one step that it is. Raises ValueError where it is more."""
    gm = make_fx(lambda *given: case.function(*given), decomposition_table=decompositions(), tracing_mode="fake")(*inputs)
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    graph = Graph(gm, [Input(n, Role.USER) for n in names], Phase.INFERENCE, case.title, to_int)
    lowered = with_contractions(schedule(lower_graph(graph, Journal(case.title))), every=True)
    found = [s for s in lowered.steps if isinstance(s, Alternatives)]
    if len(found) != 1 or len(lowered.steps) != 1:
        raise ValueError(f"{case.title} is not one convolution: {lowered.steps}")
    return lowered, found[0]


def choose(problem: ConvProblem, target: Target, count: int) -> Sequence[ConvConfig]:
    """The cost model's proposals, and others from its best to its worst; `count` at most."""
    if problem.patches.transposed:
        return list(conv_config.sums_configs(problem, target, count))
    if not problem.patches.depthwise:
        return [*conv_config.implicit_configs(problem, target, count), *conv_config.box_configs(problem, target, count)]
    kinds: dict[object, StencilConfig] = {}
    for config in conv_config.ranked_stencils(problem, target):
        kinds.setdefault((config.rows, config.channels), config)
    first = conv_config.stencil_configs(problem, target)
    others = [c for c in kinds.values() if c not in first]
    return [*first, *others[:: max(1, len(others) // max(1, count - len(first)))]][:count]


@dataclass(frozen=True)
class Printed:
    """A way, printed: kernels and calls in order, with buffers between them. `config` is that of our kernel, if there is
    one; `seconds` what the cost model says of that.
    """

    label: str
    parts: tuple[KernelSource | BoundCall, ...]
    scratch: tuple[BufferSpec, ...] = ()
    config: str = ""
    seconds: float = 0.0


def printed(found: Alternatives, target: Target, count: int) -> list[Printed]:
    """Every way of `found`, our kernels in `count` configurations at most."""
    out: list[Printed] = []
    for way in found.ways:
        kernels = [s for s in way.steps if isinstance(s, Contraction)]
        if not kernels:
            out.append(_printed(way, found, target, {}))
        elif all(isinstance(k.a, Patches) for k in kernels):
            varied = next((k for k in kernels if not k.a.transposed), kernels[0])  # type: ignore[union-attr]
            for config in choose(convolution_problem(varied), target, count if way.label in SWEPT else 3):
                out.append(_printed(way, found, target, {varied.name: config}))
    return out


def _printed(way: Way, found: Alternatives, target: Target, chosen: dict[str, ConvConfig]) -> Printed:
    """`way` with the configurations `chosen` by contraction, else the first."""
    parts, scratch = list[KernelSource | BoundCall](), list[BufferSpec]()
    label, seconds = [way.label], 0.0
    for step in way.steps:
        if isinstance(step, Call):
            parts.append(BoundCall(step, found.buffers, found.views))
        elif isinstance(step, Region):
            parts += triton_candidates(step, target, "default", 1)[0].sources
        elif isinstance(step, Contraction):
            problem = convolution_problem(step)
            config = chosen[step.name] if step.name in chosen else choose(problem, target, 1)[0]
            if isinstance(config, GemmConfig):
                seconds = conv_config.implicit_seconds(problem, config, target)
                config = with_room(step, config, target)
            elif isinstance(config, StencilConfig):
                seconds = conv_config.stencil_seconds(problem, config, target)
            made = print_convolution(step, config, target)
            parts += made.kernels
            scratch += made.scratch
            label.append(str(config))
    return Printed(" ".join(label), tuple(parts), tuple(scratch), "".join(map(str, chosen.values())), seconds)


def tuned(found: Alternatives, target: Target) -> set[str]:
    """The labels of what the tuner would compile and measure in default mode, our kernels' ways alone."""
    labels = set[str]()
    for way in found.ways:
        kernels = [s for s in way.steps if isinstance(s, Contraction)]
        left = way.label == IMPLICIT and any(w.label == CUDNN for w in found.ways)
        left = left and any(isinstance(k.a, Patches) and is_common(k.a) for k in kernels)
        if kernels and not left and all(isinstance(k.a, Patches) for k in kernels):
            choices = ([c.label for c in contraction_candidates(k, target, "default")] for k in kernels)
            labels |= {" ".join([way.label, *each]) for each in itertools.product(*choices)}
    return labels


def build(groups: Sequence[list[Printed]], target: Target, store: ArtifactStore) -> list[list[tuple[Printed, Trial | str]]]:
    """Each way with what runs it, or why it did not compile; all compiled in one go."""
    kernels = [p for group in groups for way in group for p in way.parts if isinstance(p, KernelSource)]
    results = dict(zip(map(id, kernels), compile_kernels(kernels, target, store), strict=True))
    out = []
    for group in groups:
        built: list[tuple[Printed, Trial | str]] = []
        for way in group:
            parts: list[Any] = [(p, results[id(p)]) if isinstance(p, KernelSource) else p for p in way.parts]
            reasons = [p[1].reason for p in parts if isinstance(p, tuple) and not isinstance(p[1], Artifact)]
            built.append((way, "; ".join(reasons) or Trial(way.label, tuple(parts), way.scratch)))
        out.append(built)
    return out


def measure(
    case: Case,
    lowered: Lowered,
    proposed: set[str],
    built: list[tuple[Printed, Trial | str]],
    device: torch.device,
) -> dict[str, Any]:
    """Errors and microseconds of every way, as JSON data. `proposed`: labels of those that the tuner would measure."""
    inputs = case.inputs(device)
    eager, exact = case.function(*case.few(inputs)), case.function(*(t.double() for t in case.few(inputs)))
    tensors = dict(zip(lowered.inputs, inputs, strict=True))
    for name, spec in lowered.buffers.items():
        if name not in tensors:
            tensors[name] = torch.empty_strided(spec.shape, spec.strides, dtype=spec.dtype, device=device)  # type: ignore[arg-type]
    results = [tensors[o.name] for o in lowered.outputs]
    rows, runs = list[dict[str, Any]](), list[Callable[[], Any]]()
    for way, trial in built:
        run = None if isinstance(trial, str) else runner(trial, tensors, {})
        if isinstance(trial, str) or run is None:
            rows.append({"label": way.label, "failed": trial if isinstance(trial, str) else "does not run"})
            continue
        row: dict[str, Any] = {"label": way.label, "ours": way.config != "", "proposed": way.label in proposed}
        if not any(isinstance(p, BoundCall) for p in trial.parts):  # calls make results of their own while they are measured
            for result in results:
                result.fill_(float("nan"))
            run()
            judged = [r[: len(e)] for r, e in zip(results, eager, strict=True)]
            row["excess_error"] = min(excess(judged, eager, exact), 1e9)
        if way.config:
            metas = [p[1].meta for p in trial.parts if isinstance(p, tuple)]
            row |= {field: [m.get(field) for m in metas] for field in ("n_regs", "n_spills", "shared")}
            row["estimate_us"] = way.seconds * 1e6
        rows.append(row)
        runs.append(run)
    del exact, eager
    hot, cold = (interleaved(runs, device, cold=c) for c in (False, True))
    timed = (row for row in rows if "failed" not in row)
    for row, warm, cool in zip(timed, hot, cold, strict=True):
        row |= {"us_hot": warm * 1e6, "us_cold": cool * 1e6}
    return {"case": case.title, "rows": rows}


def report(entry: dict[str, Any]) -> str:
    timed = [r for r in entry["rows"] if "failed" not in r]

    def mean(row: dict[str, Any]) -> float:
        return (row["us_hot"] + row["us_cold"]) / 2

    text = f"{entry['case']:<66}"
    for row in timed:
        if not row["ours"]:
            text += f" | {row['label']} {mean(row):.1f}"
    ours = [r for r in timed if r["ours"]]
    for word, some in (("proposed", [r for r in ours if r["proposed"]]), ("best", ours)):
        best = min(some, key=mean, default=None)
        if best is not None:
            text += f" | {word} {best['label']} {mean(best):.1f} ({best['estimate_us']:.1f})"
    wrong = [r["label"] for r in timed if r.get("excess_error", 0.0) > 1]
    failed = [f"{r['label']}: {r['failed']}" for r in entry["rows"] if "failed" in r]
    return text + (f" | WRONG: {wrong}" if wrong else "") + (f" | not run: {failed}" if failed else "")


def summary(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How much faster the tuner's choice is than without kernels of ours: by case, and how often each label won."""
    ratios, wins = {}, dict[str, int]()
    for entry in entries:
        timed = [r for r in entry["rows"] if "failed" not in r]
        library = min((r["us_hot"] + r["us_cold"] for r in timed if not r["ours"]), default=inf)
        tuned = [r for r in timed if not r["ours"] or r["proposed"]]
        best = min(tuned, key=lambda r: r["us_hot"] + r["us_cold"])
        ratios[entry["case"]] = library / (best["us_hot"] + best["us_cold"])
        kind = best["label"].split()[0]
        wins[kind] = wins.get(kind, 0) + 1
    mean = torch.tensor(list(ratios.values()), dtype=torch.float64).log().mean().exp().item() if ratios else inf
    return {"geometric_mean": mean, "wins": wins, "ratios": ratios}


def main(
    out: Annotated[Path, typer.Option(help="folder for conv_kernels.json")],
    only: Annotated[str, typer.Option(help="run cases whose title contains one of these, separated by commas")] = "",
    seconds: Annotated[float, typer.Option(help="begin no further cases after so long")] = 280.0,
    count: Annotated[int, typer.Option(help="configurations of our kernel a case")] = 8,
) -> None:
    """Check and time ways to compute convolutions with what follows them on this machine's first GPU."""
    chosen = containing_any(cases(), only, lambda case: case.title)
    device = torch.device("cuda", 0)
    target, store = Target.current(device), ArtifactStore()
    facts = {"target": target_facts(device), "versions": versions(), "commit": revision()}
    data: dict[str, Any] = {**facts, "compile_seconds": 0.0, "cases": []}
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for at in range(0, len(chosen), CHUNK):
        if time.perf_counter() - began > seconds:
            typer.echo(f"out of time: {len(chosen) - at} cases left out")
            break
        group = chosen[at : at + CHUNK]
        lowered = [lower(case, case.inputs(device)) for case in group]
        ways = [printed(found, target, count) for _, found in lowered]
        start = time.perf_counter()
        built = build(ways, target, store)
        data["compile_seconds"] += time.perf_counter() - start
        for case, (low, found), trials in zip(group, lowered, built, strict=True):
            data["cases"].append(measure(case, low, tuned(found, target), trials, device))
            typer.echo(report(data["cases"][-1]))
            torch.cuda.empty_cache()
        data["summary"] = summary(data["cases"])
        (out / "conv_kernels.json").write_text(json.dumps(data, indent=1) + "\n")
    typer.echo(f"geometric mean {data['summary']['geometric_mean']:.3f}, kept: {data['summary']['wins']}")
    if any(r.get("excess_error", 0.0) > 1 for c in data["cases"] for r in c["rows"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
