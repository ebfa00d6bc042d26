"""Tokens per second of transformers' `generate`: `python -m benchmarks.generate --out FILE`.

A Llama with random weights writes greedily after a prompt, for one sequence: in eager mode, in eager mode with a static
cache, as transformers compiles the decoding step itself (Inductor, reduce-overhead), with fxopt in Inductor's place, and
with fxopt's loop (`fxopt.generation`) in transformers' own's ("fxopt-loop").
Rounds are interleaved; a time is that of a whole call of `generate`, prompt and host included.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table
from torch import Tensor, nn

from benchmarks.choosing import named
from benchmarks.models import llama
from benchmarks.results import revision, target_facts, versions
from fxopt.cli import pick_device, pick_dtype
from fxopt.generation import decode
from fxopt.report.backends import resolve_backend
from fxopt.report.contenders import caches_under
from fxopt.report.explanation import journals
from fxopt.report.tables import open_console
from fxopt.runtime.cuda_graph import NAME as CUDA_GRAPHS
from fxopt.runtime.cuda_graph import GraphedExecutor

LLAMA_1B = {"hidden": 2048, "layers": 16, "vocab": 128256}
MOST_KERNELS = 30
"""Kernels that a profile names."""

TINY = {"hidden": 64, "layers": 2, "vocab": 97}


@dataclass(frozen=True)
class Way:
    """One way to call `generate`: with a static cache or not, backend and mode of the decoding step (None: eager), and
    whether `fxopt.generation.decode` stands in the place of transformers' own loop."""

    name: str
    static: bool = True
    backend: str | None = None
    mode: str | None = None
    own_loop: bool = False

    def arguments(self, everywhere: bool) -> dict[str, Any]:
        """Of `generate`. transformers compiles on GPUs only, unless asked to do so `everywhere`."""
        if not self.static:
            return {}
        if self.own_loop:
            return {"cache_implementation": "static", "custom_generate": decode}
        if self.backend is None:
            return {"cache_implementation": "static", "disable_compile": True}
        from transformers import CompileConfig

        config = CompileConfig(fullgraph=True, backend=resolve_backend(self.backend), mode=self.mode)  # type: ignore[arg-type]
        config._compile_all_devices = everywhere or None
        return {"cache_implementation": "static", "compile_config": config}


WAYS = {
    way.name: way
    for way in (
        Way("eager", static=False),
        Way("eager-static"),
        Way("transformers", backend="inductor", mode="reduce-overhead"),
        Way("fxopt", backend="fxopt"),
        Way("fxopt-reduce-overhead", backend="fxopt", mode="reduce-overhead"),
        Way("fxopt-loop", own_loop=True),
    )
}


@dataclass
class Written:
    """What a way did: seconds of each call and of the first, the graphs that Dynamo compiled in the first call and in all
    later ones, the tokens of the first, and whether later calls wrote the same; what fxopt says of CUDA graphs, and how many
    it has captured and replayed in the later calls."""

    first_seconds: float
    graphs: int
    tokens: Tensor
    seconds: list[float] = field(default_factory=list)
    later_graphs: int = 0
    repeatable: bool = True
    kernels: int | None = None
    captured: list[str] = field(default_factory=list)
    device: dict[str, Any] = field(default_factory=dict)
    captures: int = 0
    replays: int = 0


def sharing(model: nn.Module) -> nn.Module:
    """A copy of `model` with the same parameters: transformers keeps a compiled call and a cache on the model."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def compiled_graphs() -> int:
    """How many graphs Dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def cuda_graphs() -> tuple[int, int]:
    """How many CUDA graphs fxopt has captured in this process, and how often it has replayed any."""
    found = [x for x in gc.get_objects() if type(x) is GraphedExecutor]
    return sum(x._captures for x in found), sum(x._replays for x in found)


def write(model: Any, prompt: Tensor, tokens: int, way: Way) -> Callable[[], Tensor]:
    """A call that writes exactly `tokens` tokens after `prompt` [batch, tokens]; its result has both."""
    arguments = way.arguments(everywhere=prompt.device.type != "cuda")
    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def call() -> Tensor:
        written: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), **limits, **arguments)
        return written

    return call


def timed(call: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds until the result is there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def compare(
    model: nn.Module, prompt: Tensor, tokens: int, ways: Sequence[Way], rounds: int, profile: bool = False
) -> dict[str, Written]:
    """Every way's first call, then `rounds` interleaved ones, and one under a profiler if `profile`."""
    torch.compiler.reset()
    calls = {way.name: write(sharing(model), prompt, tokens, way) for way in ways}
    found: dict[str, Written] = {}
    for name, call in calls.items():
        before = compiled_graphs()
        with journals() as graphs:
            seconds, result = timed(call, prompt.device)
        found[name] = Written(seconds, compiled_graphs() - before, result)
        if graphs:
            found[name].kernels = sum(len(journal.kernels) for journal in graphs)
            found[name].captured = [text for journal in graphs for topic, text in journal.notes if topic == CUDA_GRAPHS]
    for _ in range(rounds):
        for name, call in calls.items():
            before, own = compiled_graphs(), found[name]
            captures, replays = cuda_graphs()
            seconds, result = timed(call, prompt.device)
            own.captures += cuda_graphs()[0] - captures
            own.replays += cuda_graphs()[1] - replays
            own.seconds.append(seconds)
            own.later_graphs += compiled_graphs() - before
            own.repeatable &= torch.equal(result, own.tokens)
    for name, call in calls.items() if profile else ():
        found[name].device = device_times(call, tokens, prompt.device)
    return found


def device_times(call: Callable[[], Tensor], tokens: int, device: torch.device) -> dict[str, Any]:
    """Where the device's time goes in one more call, in microseconds and launches for each of `tokens`: in all, and of the
    kernels that take most. The rest of a token's time the device waits for the host."""
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        timed(call, device)
    kernels = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    rows = [[e.key, e.self_device_time_total / tokens, e.count / tokens] for e in kernels]
    busy, launches = (sum(row[k] for row in rows) for k in (1, 2))
    return {"busy_us": busy, "launches": launches, "kernels": rows[:MOST_KERNELS]}


def gap(model: Any, written: Tensor, prompt_tokens: int) -> float:
    """By how much the logit of a chosen token falls short of the largest, at most: `model` judges every choice.

    Greedy texts part for good where two words are nearly as likely; a right choice still has a gap of a rounding error.
    """
    logits = model(written[:, :-1]).logits[:, prompt_tokens - 1 :].float()
    chosen = logits.gather(-1, written[:, prompt_tokens:, None]).squeeze(-1)
    return float((logits.amax(-1) - chosen).max())


def agreement(a: Tensor, b: Tensor) -> int:
    """How many tokens two texts have in common before they part."""
    same = (a == b).all(dim=0)
    return int(same.long().cumprod(0).sum())


def entries(found: Mapping[str, Written], judge: nn.Module, prompt: Tensor, tokens: int) -> list[dict[str, Any]]:
    """JSON data of each way. `judge` is the model in float32."""
    first = next(iter(found.values()))
    start = prompt.shape[1]
    return [
        {
            "way": name,
            "tokens_per_second": tokens / statistics.median(own.seconds),
            "seconds": own.seconds,
            "first_seconds": own.first_seconds,
            "graphs": own.graphs,
            "later_graphs": own.later_graphs,
            "fxopt_kernels": own.kernels,
            "fxopt_captured": own.captured,
            "device": own.device,
            "fxopt_captures": own.captures,
            "fxopt_replays": own.replays,
            "gap": gap(judge, own.tokens, start),
            "tokens_as_first_way": agreement(own.tokens, first.tokens) - start,
            "repeatable": own.repeatable,
        }
        for name, own in found.items()
    ]


def table(rows: Sequence[Mapping[str, Any]], tokens: int) -> Table:
    drawn = Table(title=f"{tokens} tokens, one sequence", title_justify="left", pad_edge=False, box=box.SIMPLE_HEAD)
    for column in ("", "tokens/s", "first call", "graphs", "later", "gap in logits", "tokens as the first"):
        drawn.add_column(column)
    for row in rows:
        drawn.add_row(
            row["way"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['first_seconds']:.1f} s",
            str(row["graphs"]),
            str(row["later_graphs"]),
            f"{row['gap']:.1e}",
            str(row["tokens_as_first_way"]),
        )
    return drawn


def main(
    out: Annotated[Path, typer.Option(help="results file")] = Path("benchmarks/out/generate.json"),
    device: Annotated[str, typer.Option(help="cuda, cpu or auto")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    ways: Annotated[str, typer.Option(help="comma-separated, the first is compared with")] = ",".join(WAYS),
    prompt: Annotated[int, typer.Option(help="tokens of the prompt")] = 128,
    tokens: Annotated[int, typer.Option(help="tokens to write")] = 256,
    rounds: Annotated[int, typer.Option(help="timed calls of each way")] = 5,
    profile: Annotated[bool, typer.Option("--profile", help="also tell where the device's time goes")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="a tiny model, to try the harness itself")] = False,
) -> None:
    """Compare the ways of writing text with a Llama of 1.2 billion parameters; JSON and a table."""
    chosen = named(ways, WAYS, "way")
    where = pick_device(device)
    torch.manual_seed(0)
    sizes = TINY if tiny else LLAMA_1B
    with torch.device(where):
        model = llama(sizes).to(pick_dtype(dtype)).eval()
        text = torch.randint(1, sizes["vocab"], (1, prompt))
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="fxopt-cold-") as caches, caches_under(caches):
        found = compare(model, text, tokens, chosen, rounds, profile)
        rows = entries(found, copy.deepcopy(model).float(), text, tokens)
    data = {
        "target": target_facts(where),
        "versions": versions(),
        "commit": revision(),
        "settings": {"dtype": dtype, "prompt": prompt, "tokens": tokens, "rounds": rounds, **sizes},
        "parameters": sum(p.numel() for p in model.parameters()),
        "ways": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data, indent=1) + "\n")
    open_console().print(table(rows, tokens))


if __name__ == "__main__":
    typer.run(main)
