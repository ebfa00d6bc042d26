"""Training attention that no library's backward takes, on a GPU: `python -m benchmarks.attention_training --out FOLDER`.

For each case, forward and backward: eager, Inductor, and fxopt with attention left as it is written ("apart"), as its own
kernels ("kernel") and as what runs where these are refused ("refused"), interleaved; the contests that the tuner held, in
microseconds; errors against float64 next to eager's. "dynamic" and "dynamic apart" are the same with batch and length known
only at run time: of the first one, errors at other lengths than those it was compiled at, and into how many graphs.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.choosing import beginning, names_of
from benchmarks.fused_products import Figures, kept
from benchmarks.kernels_micro import excess
from benchmarks.results import target_facts, versions
from benchmarks.written_attention import capped, copy_of, line
from fxopt.lower.attention_kernels import KERNEL
from fxopt.report.measure import interleaved

TUNING_SECONDS = 20.0
WINDOW = 512


def relative(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As in T5: a bias that learns."""
    scores = torch.matmul(q, k.transpose(3, 2)) * q.shape[-1] ** -0.5 + bias
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v).transpose(1, 2).contiguous()


def windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """As in Swin: windows of images, with a bias that learns and a mask for each window."""
    count, (batch, heads, size, width) = mask.shape[0], q.shape
    scores = torch.matmul(q, k.transpose(-1, -2)) * width**-0.5 + bias.unsqueeze(0)
    scores = scores.view(batch // count, count, heads, size, size) + mask.unsqueeze(1).unsqueeze(0)
    weights = F.softmax(scores.view(-1, heads, size, size), dim=-1)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def distances(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor, mask: Tensor) -> Tensor:
    """As in BLOOM: ALiBi, and a causal mask among the inputs."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5 + alibi
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def dropping(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """As in BERT, with or without padding among the inputs."""
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    weights = F.dropout(F.softmax(scores, dim=-1), p=0.1, training=True)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def dropping_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in GPT-2."""
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = torch.where(seen, torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5, torch.finfo(q.dtype).min)
    weights = torch.dropout(F.softmax(scores, dim=-1), 0.1, True)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Capped scores in a window made of positions."""
    away = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(k.shape[2], device=q.device)
    scores = torch.tanh(torch.matmul(q, k.mT) * (q.shape[-1] ** -0.5 / 30)) * 30
    scores = scores.masked_fill((away < 0) | (away >= WINDOW), float("-inf"))
    return torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Case:
    """`addends` are sizes of what is added to the scores, and whether each learns; "causal" is a mask's."""

    name: str
    attend: Callable[..., Tensor]
    batch: int
    heads: int
    groups: int
    length: int
    width: int
    addends: tuple[tuple[tuple[int, ...] | str, bool], ...] = ()

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)

        def made(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(generator=generator)

        shapes = [(self.batch, self.length, heads, self.width) for heads in (self.heads, self.groups, self.groups)]
        operands = [made(*shape).transpose(1, 2).requires_grad_() for shape in shapes]
        for shape, learns in self.addends:
            operands.append(self._causal(device) if isinstance(shape, str) else made(*shape).requires_grad_(learns))
        return tuple(operands)

    def resized(self, batch: int, length: int) -> Case:
        """The same of other sizes, masks included; batches that are windows of images keep their number."""
        sizes = {self.batch: batch, self.length: length}
        addends = tuple(
            (s if isinstance(s, str) else (*(sizes.get(n, n) for n in s),), learns) for s, learns in self.addends
        )
        return replace(self, batch=batch, length=length, addends=addends)

    def mark(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`inputs`, with batches and lengths that a compilation takes as symbols."""
        for x in inputs:
            for dim, size in enumerate(x.shape):
                if size == self.length or (dim == 0 and size == self.batch):
                    torch._dynamo.maybe_mark_dynamic(x, dim)
        return inputs

    def _causal(self, device: torch.device) -> Tensor:
        least = torch.finfo(torch.bfloat16).min
        return torch.full((self.length, self.length), least, device=device, dtype=torch.bfloat16).triu(1)[None, None]


CASES = (
    Case("t5 b8 s512", relative, 8, 12, 12, 512, 64, (((1, 12, 512, 512), True),)),
    Case("gemma2-27b b1 s4096", capped, 1, 32, 16, 4096, 128, (("causal", False),)),
    Case("bloom b4 s1024", distances, 4, 16, 16, 1024, 64, (((16, 1, 1024), False), ("causal", False))),
    Case("swin-t b32", windows, 2048, 3, 3, 49, 32, (((3, 49, 49), True), ((64, 49, 49), False))),
    Case("window b4 s2048", window, 4, 16, 16, 2048, 64),
    Case("gemma2-2b b2 s2048", capped, 2, 8, 4, 2048, 256, (("causal", False),)),
)

DROPPING = (
    Case("bert b32 s128, padded, dropout", dropping, 32, 12, 12, 128, 64, (((32, 1, 1, 128), False),)),
    Case("bert b8 s512, padded, dropout", dropping, 8, 12, 12, 512, 64, (((8, 1, 1, 512), False),)),
    Case("bert b8 s512, dropout", dropping, 8, 12, 12, 512, 64),
    Case("gpt2 b8 s1024, dropout", dropping_causal, 8, 12, 12, 1024, 64),
)
"""Timed only: each contender drops others."""


DYNAMIC, DYNAMIC_APART = "dynamic", "dynamic apart"
DISABLED = {
    "inductor": "",
    "apart": "hand_attention",
    KERNEL: "",
    "refused": "attention_kernels",
    DYNAMIC: "",
    DYNAMIC_APART: "hand_attention",
}
"""What each contender does without."""

CONTENDERS = tuple(DISABLED)


def outcome(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], weight: Tensor) -> list[Tensor]:
    """The result, and the gradients of what learns."""
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, [x for x in inputs if x.requires_grad], weight)]


@contextlib.contextmanager
def compiling(name: str) -> Iterator[dict[str, Figures]]:
    """Compilations in the block are those of contender `name`; yields the contests."""
    with mock.patch.dict(os.environ, FXOPT_DISABLE=DISABLED[name]), kept(name) as contests:
        yield contests


def lengths(case: Case) -> list[Case]:
    """`case` with other batches and lengths: shorter and longer ones, odd ones and primes."""
    each = (1, 0), (1, 1), (0, -61), (2, -case.length // 2), (1, 3 - case.length // 2), (0, case.length // 2 + 8)
    sizes = [(max(2, case.batch + batch), max(17, case.length + length)) for batch, length in each]
    return [case.resized(*size) for size in dict.fromkeys(sizes)]


def errors(case: Case, compiled: Callable[..., Tensor], device: torch.device) -> dict[str, Any]:
    """Of one compilation at `lengths`, by "batch x length", and the graphs that it has made by then."""
    found: dict[str, Any] = {}
    for other in lengths(case):
        inputs = other.inputs(device)
        weight = torch.randn_like(case.attend(*inputs))
        wide = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
        results = (outcome(case.attend, inputs, weight), outcome(case.attend, wide, weight.double()))
        found[f"{other.batch} x {other.length}"] = excess(outcome(compiled, other.mark(inputs), weight), *results)
    return found | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def measure(
    case: Case,
    device: torch.device,
    seconds: float,
    contenders: Sequence[str] = CONTENDERS,
    tuning_seconds: float = TUNING_SECONDS,
) -> dict[str, Any]:
    """One entry of the results."""
    inputs = case.inputs(device)
    weight = torch.randn_like(case.attend(*inputs))
    entry: dict[str, Any] = {"case": case.name, "excess_error": {}, "compile_seconds": {}, "contests": {}}
    eager = exact = None
    if case.attend not in (dropping, dropping_causal):
        eager = outcome(case.attend, inputs, weight)
        wide = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
        exact = outcome(case.attend, wide, weight.double())
        del wide
    steps: dict[str, Callable[[], Any]] = {"eager": lambda: outcome(case.attend, inputs, weight)}
    for name in contenders:
        backend = "inductor" if name == "inductor" else "fxopt"
        options = {} if name == "inductor" else {"options": {"tuning_seconds": tuning_seconds, "cuda_graphs": False}}
        dynamic = None if name in (DYNAMIC, DYNAMIC_APART) else False
        given = inputs if dynamic is False else case.mark(case.inputs(device))
        torch._dynamo.utils.counters.clear()
        start = time.perf_counter()
        with compiling(name) as contests:
            compiled = torch.compile(copy_of(case.attend, name), backend=backend, dynamic=dynamic, **options)  # type: ignore[call-overload]
            got = outcome(compiled, given, weight)
        entry["compile_seconds"][name] = time.perf_counter() - start
        typer.echo(f"{case.name}: {name} compiled in {entry['compile_seconds'][name]:.1f} s")
        if name == DYNAMIC and eager is not None:
            entry["lengths"] = errors(case, compiled, device)
            typer.echo(f"{case.name}: {entry['lengths']}")
        if eager is not None and exact is not None:
            entry["excess_error"][name] = excess(got, eager, exact)
        entry["contests"] |= {f"{each}, {name}": figures for each, figures in contests.items() if name in (KERNEL, DYNAMIC)}
        steps[name] = lambda compiled=compiled, given=given: outcome(compiled, given, weight)  # type: ignore[misc]
    del eager, exact
    timings = interleaved(steps, device, seconds=seconds, ahead=True)
    entry["us"] = {name: timings[name].median * 1e6 for name in steps}
    return entry


def main(
    out: Annotated[Path, typer.Option(help="folder for attention_training.json")],
    seconds: Annotated[float, typer.Option(help="of timing a case")] = 1.0,
    only: Annotated[str, typer.Option(help="cases whose names begin with one of these, comma-separated")] = "",
    contenders: Annotated[str, typer.Option(help="beside eager, comma-separated")] = ",".join(CONTENDERS),
    minutes: Annotated[float, typer.Option(help="after which no case begins")] = 10.0,
    tuning: Annotated[float, typer.Option(help="seconds of tuning a compilation")] = TUNING_SECONDS,
    device: Annotated[str, typer.Option(help="cpu: to try the command")] = "cuda:0",
    tiny: Annotated[bool, typer.Option(help="cases of few heads, to try the command")] = False,
) -> None:
    """Time each case on this machine's first GPU."""
    chosen = beginning((*CASES, *DROPPING), only, lambda case: case.name)
    beside = names_of(contenders, CONTENDERS, "contender")
    on = torch.device(device)
    out.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    begun = time.monotonic()
    for case in chosen:
        if time.monotonic() - begun > 60 * minutes:
            continue
        try:
            entries.append(measure(case.resized(2, 48) if tiny else case, on, seconds, beside, tuning))
        except RuntimeError as error:
            entries.append({"case": case.name, "error": str(error).partition("\n")[0]})
        torch.compiler.reset()
        typer.echo(line(entries[-1]))
        document = {"target": target_facts(on), "versions": versions(), "cases": entries}
        (out / "attention_training.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
