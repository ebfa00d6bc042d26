"""Attention on a GPU, by shape: `python -m benchmarks.attention_micro --out FOLDER`.

For each shape, in inference (a forward) or training (a forward and a backward), interleaved in one process: every backend
that takes the problem, called directly; the backends that fxopt has chosen, called directly ("chosen": what it costs to be
wrong); eager's `scaled_dot_product_attention`; and `torch.compile(backend="fxopt")` of it. As in a model, heads and
features of the result become one dimension: a gradient in the layout of heads first would be copied by AOTAutograd before
fxopt sees it (torch up to 2.11). The values of eager and fxopt are compared with float64. Times are the device's alone: the
host is kept ahead of it, and inputs are not in the L2 cache.

In inference, fxopt's own kernels are contenders too: `--configs` of them are built and timed, and the fastest three of
these meet the backends ("kernel ..."). The JSON has the cost model's estimate beside each time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.attention_kernels import Contender, contenders
from benchmarks.choosing import containing_any
from benchmarks.results import revision, target_facts, versions
from fxopt.ir.attention_backends import (
    AUTO,
    BACKENDS,
    CUDNN,
    EFFICIENT,
    FLASH,
    MATH,
    Inputs,
    Settings,
    backward,
    backward_by,
    forward,
    forward_by,
    forward_for_training,
    supports,
)
from fxopt.journal import RECENT
from fxopt.lower import contractions
from fxopt.report.measure import geometric_mean, interleaved
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune import measure as tuner

MOST_SCORE_BYTES = 2 << 30
"""The backend that stores all scores is left out where they take more."""

OWN = "kernel "
"""What the names of fxopt's own kernels begin with."""

FINALISTS = 3

SLOWER = 1.03
"""Times of fxopt over the best backend's beyond this are told as slower."""

Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Shape:
    """A model's attention: query [batch, heads, rows, width], keys and values [batch, groups, keys, width].

    `mask`: "padding" hides the last keys, "cache" those that a static cache does not hold yet (boolean, one row for all),
    "causal" and "window" those after a row and also those `WINDOW` before it (boolean), "bias" is added for each head.
    """

    name: str
    batch: int
    heads: int
    rows: int
    width: int
    keys: int = 0
    groups: int = 0
    causal: bool = False
    train: bool = False
    mask: str = ""
    scale: float | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def score_bytes(self) -> int:
        return 4 * self.batch * self.heads * self.rows * (self.keys or self.rows)

    @property
    def label(self) -> str:
        return f"{self.name}/{'train' if self.train else 'infer'}"


WINDOW = 1024


def _decoding() -> Iterator[Shape]:
    """Llama-3-8B's attention for one new token, over all keys and over a static cache."""
    for batch, keys in ((1, 2048), (1, 8192), (8, 2048), (8, 8192), (64, 2048), (64, 8192)):
        for mask in ("", "cache"):
            name = f"decode-llama3-b{batch}-{keys}{'-cache' if mask else ''}"
            yield Shape(name, batch, 32, 1, 128, keys=keys, groups=8, mask=mask)


SHAPES = (
    *_decoding(),
    Shape("decode-8-rows", 1, 32, 8, 128, keys=2048, groups=8, mask="cache"),
    Shape("decode-gpt2-b8", 8, 12, 1, 64, keys=512),
    Shape("decode-whisper-cross", 8, 20, 1, 64, keys=1500),
    Shape("decode-gemma2", 1, 8, 1, 256, keys=4096, groups=4, mask="cache"),
    Shape("llama3-prefill-2048-mask", 1, 32, 2048, 128, groups=8, mask="causal"),
    Shape("mistral-window-4096", 1, 32, 4096, 128, groups=8, mask="window"),
    Shape("phi3-prefill-2048", 1, 32, 2048, 96, causal=True),
    Shape("sd15-self", 2, 8, 1024, 80, dtype=torch.float16),
    Shape("vit-b-b64", 64, 12, 197, 64),
    Shape("vit-b-b64", 64, 12, 197, 64, train=True),
    Shape("vit-b-b1", 1, 12, 197, 64),
    Shape("bert-b32-s128", 32, 12, 128, 64),
    Shape("bert-b32-s128", 32, 12, 128, 64, train=True),
    Shape("bert-b32-s512-padding", 32, 12, 512, 64, mask="padding"),
    Shape("bert-b32-s512-padding", 32, 12, 512, 64, mask="padding", train=True),
    Shape("gpt2-b8-s512", 8, 12, 512, 64, causal=True),
    Shape("gpt2-b8-s512", 8, 12, 512, 64, causal=True, train=True),
    Shape("llama3-prefill-2048", 1, 32, 2048, 128, groups=8, causal=True),
    Shape("llama3-prefill-8192", 1, 32, 8192, 128, groups=8, causal=True),
    Shape("llama3-2048", 1, 32, 2048, 128, groups=8, causal=True, train=True),
    Shape("llama3-8192", 1, 32, 8192, 128, groups=8, causal=True, train=True),
    Shape("t5-bias", 8, 12, 512, 64, mask="bias", scale=1.0),
    Shape("whisper", 8, 20, 1500, 64),
    Shape("whisper", 8, 20, 1500, 64, train=True),
    Shape("sdxl-self", 2, 10, 4096, 64, dtype=torch.float16),
    Shape("sdxl-self", 2, 10, 4096, 64, dtype=torch.float16, train=True),
    Shape("sdxl-cross", 2, 10, 4096, 64, keys=77, dtype=torch.float16),
    Shape("dense-4096", 4, 16, 4096, 128),
    Shape("dense-4096-causal", 4, 16, 4096, 128, causal=True, train=True),
    Shape("long-16k", 1, 16, 16384, 128, causal=True),
    Shape("long-16k", 1, 16, 16384, 128, causal=True, train=True),
    Shape("decode-float32-b8", 8, 12, 1, 64, keys=1024, mask="cache", dtype=torch.float32),
    Shape("float32-s512", 8, 12, 512, 64, dtype=torch.float32),
    Shape("width-256", 2, 8, 2048, 256, causal=True),
)


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Random operands with heads next to features in memory, as a projection leaves them."""
    generator = torch.Generator(device).manual_seed(0)

    def make(length: int, heads: int) -> Tensor:
        x = torch.empty((shape.batch, length, heads, shape.width), dtype=shape.dtype, device=device)
        return x.normal_(generator=generator).transpose(1, 2)

    keys, groups = shape.keys or shape.rows, shape.groups or shape.heads
    mask = None
    if shape.mask == "padding":
        seen = torch.randint(keys // 2, keys + 1, (shape.batch, 1, 1, 1), device=device, generator=generator)
        mask = (torch.arange(keys, device=device) < seen).expand(shape.batch, 1, shape.rows, keys)
    elif shape.mask == "cache":
        mask = (torch.arange(keys, device=device) < keys * 3 // 4).expand(shape.batch, 1, shape.rows, keys)
    elif shape.mask in ("causal", "window"):
        distance = torch.arange(shape.rows, device=device)[:, None] - torch.arange(keys, device=device)
        mask = ((distance >= 0) & (distance < (WINDOW if shape.mask == "window" else keys)))[None, None]
    elif shape.mask == "bias":
        sizes = (1, shape.heads, shape.rows, keys)
        mask = torch.empty(sizes, dtype=shape.dtype, device=device).normal_(generator=generator)
    settings = Settings(shape.causal, shape.scale, groups != shape.heads)
    return Inputs(make(shape.rows, shape.heads), make(keys, groups), make(keys, groups), mask, settings)


def direct(x: Inputs, grad: Tensor, train: bool, backend: str) -> Step:
    """The forward by `backend` and, when `train`, its backward, without autograd around them."""

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            if not train:
                return (forward(x, backend),)
            computed = forward_for_training(x, backend)
            return (computed.out, *backward(x, grad, computed))

    return step


def whole(attend: Callable[..., Tensor], x: Inputs, grad: Tensor, train: bool) -> Step:
    """`attend` and, when `train`, its gradients by autograd."""
    leaves = [t.detach().requires_grad_(train) for t in x[:3]]
    merged = grad.transpose(1, 2).flatten(2)

    def step() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(train):
            out = attend(*leaves, x.mask)
            heads = out.detach().unflatten(2, (x.query.shape[1], -1)).transpose(1, 2)
            return (heads, *torch.autograd.grad(out, leaves, merged)) if train else (heads,)

    return step


def eager_attention(settings: Settings) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"scale": settings.scale, "enable_gqa": settings.enable_gqa}
        out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, settings.is_causal, **options)
        return out.transpose(1, 2).flatten(2)

    return attend


def choice() -> str:
    """The backend that fxopt's journals tell, of the one attention that was compiled."""
    notes = [text for journal in RECENT for topic, text in journal.notes if topic == "attention"]
    return notes[0].partition(": ")[2].partition(" ")[0] if notes else AUTO


def way() -> str:
    """The way that the tuner has kept, where kernels of ours were candidates."""
    notes = [text for journal in RECENT for topic, text in journal.notes if topic == contractions.NAME]
    return notes[0].partition(": ")[2] if notes else ""


def exact_values(x: Inputs, grad: Tensor, train: bool) -> tuple[Tensor, ...]:
    """Result and gradients of the first batch's first group of heads, in float64."""
    part = first_group(x)
    mask = part.mask if part.mask is None or part.mask.dtype == torch.bool else part.mask.double()
    wide = Inputs(part.query.double(), part.key.double(), part.value.double(), mask, part.settings)
    with torch.no_grad():
        out, statistics = forward_by(MATH, wide, train)
        if statistics is None or not train:
            return (out,)
        return (out, *backward_by(MATH, wide, grad[:1, : out.shape[1]].double(), out, statistics))


def first_group(x: Inputs) -> Inputs:
    heads = x.query.shape[1] // x.key.shape[1]
    mask = x.mask if x.mask is None else x.mask[:1, : min(heads, x.mask.shape[1])]
    return Inputs(x.query[:1, :heads], x.key[:1, :1], x.value[:1, :1], mask, x.settings)


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Largest error of the result and each gradient, relative to the largest exact value."""
    cut = (f[:1, : w.shape[1]].double() for f, w in zip(found, exact, strict=True))
    return [float((f - w).abs().max() / w.abs().max()) for f, w in zip(cut, exact, strict=True)]


Rows = list[dict[str, Any]]


def measure_kernels(x: Inputs, exact: Tensor, device: torch.device, count: int) -> tuple[list[Contender], Rows]:
    """fxopt's own kernels, the fastest first, and what the results tell of each."""
    found = contenders(x, Target.current(device), ArtifactStore(), count)
    taken = tuner.interleaved([c.run for c in found], device, cold=True)
    rows: Rows = []
    for each, time_taken in zip(found, taken, strict=True):
        each.out.fill_(float("nan"))
        each.run()
        rows.append(
            {
                "config": str(each.config),
                "seconds": time_taken,
                "estimate": each.estimate,
                "error": errors((each.out,), (exact,))[0],
                "registers": each.registers,
                "spills": each.spills,
            }
        )
    order = sorted(range(len(found)), key=lambda k: taken[k])
    return [found[k] for k in order], [rows[k] for k in order]


def stored(contender: Contender) -> Step:
    def step() -> tuple[Tensor, ...]:
        contender.run()
        return (contender.out,)

    return step


def measure(shape: Shape, device: torch.device, seconds: float, configs: int) -> dict[str, Any]:
    """One entry of the results."""
    x = make_inputs(shape, device)
    grad = torch.randn_like(x.query)
    compiled = torch.compile(eager_attention(x.settings), backend="fxopt", dynamic=False, options={"cuda_graphs": False})
    torch.compiler.reset()
    RECENT.clear()
    steps = {"eager": whole(eager_attention(x.settings), x, grad, shape.train)}
    start = time.perf_counter()
    steps["fxopt"] = whole(compiled, x, grad, shape.train)
    own = steps["fxopt"]()
    first_call = time.perf_counter() - start
    chosen = choice()
    exact = exact_values(x, grad, shape.train)
    judged = {"eager": errors(steps["eager"](), exact), "fxopt": errors(own, exact)}
    kernels: Rows = []
    if configs and not shape.train and shape.dtype != torch.float32:
        found, kernels = measure_kernels(x, exact[0], device, configs)
        steps |= {f"{OWN}{c.config}": stored(c) for c in found[:FINALISTS]}
    del exact, own
    for name in BACKENDS:
        if supports(name, x, shape.train) and (name != MATH or shape.score_bytes <= MOST_SCORE_BYTES):
            steps[name] = direct(x, grad, shape.train, name)
    steps["chosen"] = direct(x, grad, shape.train, chosen)
    timings = interleaved(steps, device, seconds=seconds, ahead=True)
    taken = {name: timings[name].median for name in steps}
    best = min((name for name in steps if name in BACKENDS), key=lambda name: taken[name])
    ours = min((name for name in steps if name.startswith(OWN)), key=lambda name: taken[name], default=best)
    return {
        "case": shape.label,
        "shape": {**asdict(shape), "dtype": str(shape.dtype)},
        "chosen": chosen,
        "best": best,
        "way": way(),
        "kernels": kernels,
        "kernel_over_best": taken[ours] / taken[best],
        "seconds": taken,
        "quartiles": {name: timings[name].quartiles for name in steps},
        "chosen_over_best": taken["chosen"] / taken[best],
        "fxopt_over_best": taken["fxopt"] / taken[best],
        "eager_over_fxopt": taken["eager"] / taken["fxopt"],
        "errors": judged,
        "error_ratio": max(f / max(e, 1e-7) for f, e in zip(judged["fxopt"], judged["eager"], strict=True)),
        "first_call": first_call,
    }


def main(
    out: Annotated[Path, typer.Option(help="folder for attention_micro.json")],
    only: Annotated[str, typer.Option(help="shapes whose label has one of these in it, separated by commas")] = "",
    seconds: Annotated[float, typer.Option(help="of timing a shape")] = 1.5,
    configs: Annotated[int, typer.Option(help="configurations of fxopt's own kernels; 0 for none")] = 0,
    limit: Annotated[float, typer.Option(help="begin no further shapes after so many seconds")] = 3600.0,
) -> None:
    """Time each backend, eager's choice and fxopt's at every shape."""
    shapes = containing_any(SHAPES, only, lambda shape: shape.label)
    device = torch.device("cuda", torch.cuda.current_device())
    entries: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for shape in shapes:
        if time.perf_counter() - began > limit:
            typer.echo(f"out of time before {shape.label}")
            break
        try:
            entry = measure(shape, device, seconds, configs)
        except RuntimeError as error:
            entry = {"case": shape.label, "error": str(error).partition("\n")[0]}
        entries.append(entry)
        timed = [e for e in entries if "seconds" in e]
        document = {
            "target": target_facts(device),
            "versions": {**versions(), "cudnn": torch.backends.cudnn.version()},
            "commit": revision(),
            "summary": summarize(timed),
            "entries": entries,
        }
        (out / "attention_micro.json").write_text(json.dumps(document, indent=1) + "\n")
        typer.echo(line(entry))
        torch.cuda.empty_cache()
    slower = summarize([e for e in entries if "seconds" in e]).get("slower", {})
    typer.echo(
        "".join(f"slower than the best backend: {case} {ratio:.2f}\n" for case, ratio in slower.items()) or "none slower"
    )


def summarize(timed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means over all cases, and `slower`: where fxopt takes more than SLOWER times as long as the best backend."""
    if not timed:
        return {}
    keys = ("chosen_over_best", "fxopt_over_best", "kernel_over_best", "eager_over_fxopt")
    means = {key: geometric_mean([entry[key] for entry in timed]) for key in keys}
    slower = {e["case"]: e["fxopt_over_best"] for e in timed if e["fxopt_over_best"] > SLOWER}
    return {**means, "cases": len(timed), "slower": slower}


def line(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"{entry['case']:<30} {entry['error']}"
    own = [name for name in entry["seconds"] if name.startswith(OWN)]
    shown = ("eager", "fxopt", "chosen", FLASH, EFFICIENT, CUDNN, MATH, *own)
    figures = " ".join(f"{name} {entry['seconds'][name] * 1e6:8.1f}" for name in shown if name in entry["seconds"])
    told = f"{entry['chosen']:<10} {entry['chosen_over_best']:.2f} of best"
    fxopts, eagers = (max(entry["errors"][name]) for name in ("fxopt", "eager"))
    worst = max((row["error"] for row in entry["kernels"]), default=0.0)
    judged = f"errors {fxopts:.1e} (eager {eagers:.1e}, kernels {worst:.1e})"
    return f"{entry['case']:<30} {told}, {judged}: {figures} {entry['way']}"


if __name__ == "__main__":
    typer.run(main)
