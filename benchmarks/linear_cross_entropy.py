"""A language model's head and its loss in training: `python -m benchmarks.linear_cross_entropy compare --out FOLDER`.

One step is `cross_entropy(linear(hidden, weight), labels)` and its backward, the gradients of hidden states and weight
included, under eager, Inductor, fxopt and, on CUDA, Liger's fused kernel where that is installed. Without sizes it measures
CUDA_CASES there, in about 100 s. `products` times the products of one chunk over an odd vocabulary alone. Times are
interleaved in one process. Memory is the most that one step needs beyond what was in use before it (hidden states and
weights): on CUDA as torch's allocator counts it, on a CPU as the system does, in a process per contender whose step has run
once before. Loss and gradients are compared with float64.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks import liger
from benchmarks.choosing import contending
from benchmarks.results import revision, target_facts, versions
from fxopt.cli import pick_device, pick_dtype
from fxopt.report.contenders import pick
from fxopt.report.measure import interleaved, memory_in_use, peak_memory

CONTENDERS = "eager,inductor,liger,fxopt"
DEFAULTS = {"cpu": (2048, 512, 128 * 1024), "cuda": (8192, 4096, 128 * 1024)}
"""Rows, features and vocabulary by type of device, for what is not given."""

CUDA_CASES = (
    (8192, 4096, 128 * 1024),
    (8192, 2048, 128 * 1024),
    (8192, 1024, 128 * 1024),
    (8192, 4096, 50257),
    (8192, 4096, 50304),
)
"""Heads of language models; GPT-2's vocabulary as it is, and padded to a multiple of 64."""

SECONDS = {"cpu": 60.0, "cuda": 10.0}
"""Of timing, over all cases, by type of device."""

WEIGHT_SCALE = 0.02
"""Standard deviation of the weights, as models are initialized."""

Sizes = tuple[int, int, int]
"""Rows, features, vocabulary."""

Inputs = tuple[Tensor, Tensor, Tensor]
Exact = tuple[Tensor, Tensor, Tensor]
Step = Callable[[], Tensor]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def make_inputs(rows: int, features: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """hidden [rows, features], weight [vocabulary, features], both with a gradient; labels [rows]."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.empty((rows, features), dtype=dtype, device=device).normal_(generator=generator)
    weight = torch.empty((vocabulary, features), dtype=dtype, device=device).normal_(std=WEIGHT_SCALE, generator=generator)
    labels = torch.randint(0, vocabulary, (rows,), device=device, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def training_step(contender: str, inputs: Inputs) -> Step:
    """A call that computes the loss and new gradients of `inputs`, and returns the loss."""
    hidden, weight, labels = inputs
    if contender == "liger":
        compiled: Callable[..., Tensor] = liger.linear_cross_entropy
    else:
        (chosen,) = pick(contender)
        compiled = chosen.compile(head_loss, hidden.device)

    def step() -> Tensor:
        forget_gradients(inputs)
        loss: Tensor = compiled(hidden, weight, labels)
        loss.backward()
        return loss.detach()

    return step


def forget_gradients(inputs: Inputs) -> None:
    for x in inputs:
        x.grad = None


# ---------------------------------------------------------------------- memory


def resident_bytes() -> int:
    """Memory that this process has in RAM."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def peak_resident(call: Callable[[], object]) -> int:
    """Most bytes of RAM that one call needs beyond those in use before it, looked at every millisecond."""
    before = most = resident_bytes()
    finished = threading.Event()

    def watch() -> None:
        nonlocal most
        while not finished.wait(1e-3):
            most = max(most, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        finished.set()
        watcher.join()
    return most - before


@app.command()
def peak(contender: str, rows: int, features: int, vocabulary: int, dtype: str) -> None:
    """Print the peak of one step on the CPU, in bytes: what `compare` asks of a process for each contender."""
    inputs = make_inputs(rows, features, vocabulary, pick_dtype(dtype), torch.device("cpu"))
    step = training_step(contender, inputs)
    step()
    forget_gradients(inputs)
    typer.echo(peak_resident(step))


def peak_bytes(contender: str, step: Step, inputs: Inputs, dtype: str) -> int:
    hidden, weight, _ = inputs
    forget_gradients(inputs)
    if hidden.is_cuda:
        found = peak_memory(step, hidden.device, memory_in_use(hidden.device))
        assert found is not None
        return found
    sizes = map(str, (*hidden.shape, weight.shape[0]))
    command = [sys.executable, "-m", "benchmarks.linear_cross_entropy", "peak", contender, *sizes, dtype]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


# ---------------------------------------------------------------------- values


def exact_values(inputs: Inputs) -> Exact:
    """The loss and the gradients of hidden and weight in float64."""
    hidden, weight, labels = inputs
    wide, matrix = hidden.detach().double(), weight.detach().double()
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    grad_hidden, grad_weight = torch.zeros_like(wide), torch.zeros_like(matrix)
    for part in torch.arange(len(labels), device=labels.device).split(128):
        slopes = torch.log_softmax(wide[part] @ matrix.t(), -1)
        loss -= slopes.gather(1, labels[part, None]).sum() / len(labels)
        slopes.exp_()
        slopes.scatter_add_(1, labels[part, None], -torch.ones_like(slopes[:, :1]))
        slopes /= len(labels)
        grad_hidden[part] = slopes @ matrix
        grad_weight.addmm_(slopes.t(), wide[part])
    return loss, grad_hidden, grad_weight


def errors(exact: Exact, inputs: Inputs, loss: Tensor) -> dict[str, float]:
    """Largest errors of loss and gradients against `exact`, relative to the largest exact value of each."""
    found = dict(zip(("loss", "hidden", "weight"), (loss, inputs[0].grad, inputs[1].grad), strict=True))
    return {
        name: float((got - want).abs().max() / want.abs().max())
        for (name, got), want in zip(found.items(), exact, strict=True)
        if got is not None
    }


# ---------------------------------------------------------------------- the command


def measured(
    sizes: tuple[int, int, int], dtype: str, where: torch.device, names: list[str], seconds: float
) -> dict[str, Any]:
    """A case: what each contender takes, in time and memory, and how far its values are from float64."""
    torch.compiler.reset()  # sizes of another case must not become dynamic here
    rows, features, vocabulary = sizes
    inputs = make_inputs(rows, features, vocabulary, pick_dtype(dtype), where)
    steps = {name: training_step(name, inputs) for name in names}
    exact = exact_values(inputs)
    judged = {name: errors(exact, inputs, step()) for name, step in steps.items()}
    del exact
    timings = interleaved(steps, where, seconds=seconds)
    entries = []
    typer.echo(f"{rows} rows, {features} features, {vocabulary} words, {dtype}")
    for name, step in steps.items():
        seconds_taken, quartiles = timings[name].median, timings[name].quartiles
        memory = peak_bytes(name, step, inputs, dtype)
        entries.append(
            {
                "contender": name,
                "seconds": seconds_taken,
                "quartiles": quartiles,
                "peak_bytes": memory,
                "errors": judged[name],
            }
        )
        worst = max(judged[name].values())
        typer.echo(
            f"  {name:<10} {seconds_taken * 1e3:10.1f} ms {memory / 2**20:10.0f} MiB   largest relative error {worst:.1e}"
        )
    return {
        "sizes": {"rows": rows, "features": features, "vocabulary": vocabulary},
        "dtype": dtype,
        "contenders": entries,
    }


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="folder for linear_cross_entropy_<device>.json")],
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    rows: Annotated[int | None, typer.Option(help="tokens of a batch")] = None,
    features: int | None = None,
    vocabulary: int | None = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (CPU), bfloat16 (CUDA) or float16")] = None,
    seconds: Annotated[float | None, typer.Option(help="of timing, at least three rounds of each case")] = None,
    contenders: str = CONTENDERS,
) -> None:
    """Time and memory of one training step of a head under each contender, and how far its values are from float64.

    The file is written after each case.
    """
    wanted, where = [c.name for c in contending(contenders)], pick_device(device)
    default = DEFAULTS[where.type]
    cases = [(rows or default[0], features or default[1], vocabulary or default[2])]
    if where.type == "cuda" and (rows, features, vocabulary) == (None, None, None):
        cases = list(CUDA_CASES)
    chosen_dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    has_liger = where.type == "cuda" and liger.available()
    names = [name for name in wanted if name != "liger" or has_liger]
    document: dict[str, Any] = {
        "target": target_facts(where),
        "versions": versions(),
        "commit": revision(),
        "cases": [],
    }
    out.mkdir(parents=True, exist_ok=True)
    for sizes in cases:
        share = (seconds or SECONDS[where.type]) / len(cases)
        document["cases"].append(measured(sizes, chosen_dtype, where, names, share))
        (out / f"linear_cross_entropy_{where.type}.json").write_text(json.dumps(document, indent=1) + "\n")


def chunk_products(rows: int, features: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The three products of a chunk, each over a vocabulary that is no multiple of eight, and that with its last classes
    apart: what rows of logits that are padded do alone, and what fxopt does.
    """
    width = -(-vocabulary // 8) * 8
    main = vocabulary // 8 * 8
    hidden, weight, _ = (x.detach() for x in make_inputs(rows, features, vocabulary, dtype, device))
    rest = weight.new_zeros((8, features))
    rest[: vocabulary - main] = weight[main:]
    logits = hidden.new_empty((rows, width))
    whole, many, few = logits[:, :vocabulary], logits[:, :main], logits[:, main : main + 8]
    of_hidden, of_weight, of_rest = torch.empty_like(hidden), torch.empty_like(weight), torch.empty_like(rest)

    def parts(*products: tuple[Tensor, Tensor, Tensor]) -> Step:
        def step() -> Tensor:
            for a, b, out in products:
                torch.mm(a, b, out=out)
            return products[0][2]

        return step

    def hidden_apart() -> Tensor:
        torch.mm(few, rest, out=of_hidden)
        return of_hidden.addmm_(many, weight[:main])

    return {
        "logits, whole": parts((hidden, weight.t(), whole)),
        "logits, apart": parts((hidden, weight[:main].t(), many), (hidden, rest.t(), few)),
        "hidden, whole": parts((whole, weight, of_hidden)),
        "hidden, apart": hidden_apart,
        "weight, whole": parts((whole.t(), hidden, of_weight)),
        "weight, apart": parts((many.t(), hidden, of_weight[:main]), (few.t(), hidden, of_rest)),
    }


@app.command()
def products(
    out: Annotated[Path, typer.Option(help="folder for linear_cross_entropy_products_<device>.json")],
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    rows: Annotated[int, typer.Option(help="rows of a chunk")] = 4096,
    features: int = 4096,
    vocabulary: int = 50257,
    dtype: str = "bfloat16",
    seconds: float = 3.0,
) -> None:
    """Time the products of one chunk over an odd vocabulary, whole and with the last classes apart."""
    where = pick_device(device)
    steps = chunk_products(rows, features, vocabulary, pick_dtype(dtype), where)
    timings = interleaved(steps, where, seconds=seconds)
    found = {name: {"seconds": t.median, "quartiles": t.quartiles} for name, t in timings.items()}
    for name, timing in timings.items():
        typer.echo(f"  {name:<14} {timing.median * 1e3:8.2f} ms")
    sizes = {"rows": rows, "features": features, "vocabulary": vocabulary, "dtype": dtype}
    document = {
        "target": target_facts(where),
        "versions": versions(),
        "commit": revision(),
        "sizes": sizes,
        "products": found,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"linear_cross_entropy_products_{where.type}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    app()
