"""Values stored or computed again, by measurement and by the estimate: `python -m benchmarks.groupings --out FOLDER`.

Each case runs in eager, under Inductor, under fxopt, and under fxopt with groupings switched off, where the scheduler's
estimate decides alone. Times are of the device, interleaved in one process; values are compared with float64. What the
tuner said of each grouping is in the file. The whole list takes about two minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.choosing import containing
from benchmarks.kernels_micro import excess
from benchmarks.results import revision, target_facts, versions
from fxopt.cli import pick_device
from fxopt.journal import RECENT
from fxopt.lower.groupings import NAME
from fxopt.report.contenders import Contender, pick
from fxopt.report.measure import interleaved

ESTIMATED = Contender("fxopt-estimate", "fxopt", options={"disable": (NAME,)})
CONTENDERS = (*pick("eager,inductor,fxopt"), ESTIMATED)


@dataclass(frozen=True)
class Case:
    """`make` gives the tensors, on the CPU, of a size divided by its argument. With `grad` the last one is the gradient of
    the result, and what is timed is the backward of all others."""

    name: str
    fn: Callable[..., Tensor]
    make: Callable[[int], tuple[Tensor, ...]]
    grad: bool = False


def squeezed(x: Tensor, scale: Tensor, bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """A channels-last activation whose channels are weighed by what is computed from their means (EfficientNet)."""
    y = F.silu(x * scale[:, None, None] + bias[:, None, None])
    return y * torch.sigmoid(F.silu(y.mean((2, 3)) @ down) @ up)[:, :, None, None]


def response_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Global response normalization of a GELU over places (ConvNeXt V2)."""
    y = F.gelu(x)
    size = y.float().square().sum((1, 2), keepdim=True).sqrt()
    return gamma * (y * (size / (size.mean(-1, keepdim=True) + 1e-6)).to(y.dtype)) + beta + y


def residual_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The end of a ResNet's block in training."""
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True) + residual)


def mixed_softmax(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Of rows made of three operands."""
    return F.softmax(x * y + z, -1)


def mixed_norm(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Of rows made of three operands."""
    return F.layer_norm(x + F.silu(y) * z, x.shape[-1:])


def _image(n: int, c: int, side: int) -> Tensor:
    return torch.randn(n, c, side, side).to(memory_format=torch.channels_last)


def _squeezed(part: int) -> tuple[Tensor, ...]:
    c = 240
    weights = (torch.randn(c), torch.randn(c), torch.randn(c, 10) / 15, torch.randn(10, c))
    return (_image(max(1, 128 // part), c, 56), *weights)


def _response(part: int) -> tuple[Tensor, ...]:
    return torch.randn(max(1, 64 // part), 28, 28, 768), torch.randn(768), torch.randn(768)


def _residual(part: int) -> tuple[Tensor, ...]:
    n = max(1, 64 // part)
    residual = _image(n, 256, 56).sign() * 64  # whatever the norm is, roundings decide no sign
    return _image(n, 256, 56), residual, torch.randn(256), torch.randn(256), _image(n, 256, 56)


def _rows(rows: int, row: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda part: tuple(torch.randn(max(1, rows // part), max(2, row // part)) for _ in range(3))


CASES = (
    Case("squeeze-excite 128 x 240 x 56 x 56", squeezed, _squeezed),
    Case("response norm 64 x 28 x 28 x 768", response_norm, _response),
    Case("batch norm, residual, relu: backward", residual_norm, _residual, grad=True),
    Case("softmax of three operands, 1024 x 65536", mixed_softmax, _rows(1024, 65536)),
    Case("softmax of three operands, 512 x 131072", mixed_softmax, _rows(512, 131072)),
    Case("layer norm of three operands, 1024 x 65536", mixed_norm, _rows(1024, 65536)),
)


def measured(case: Case, device: torch.device, dtype: torch.dtype, seconds: float, part: int) -> dict[str, Any]:
    """Times of all contenders, their errors over what is allowed, and what was said of groupings."""
    torch.compiler.reset()
    torch.manual_seed(0)
    RECENT.clear()
    args = [t.to(device, dtype) for t in case.make(part)]
    runs = {c.name: _run(c.compile(case.fn, device, replay=False), args, case.grad) for c in CONTENDERS}
    results = {name: run() for name, run in runs.items()}
    exact = _run(case.fn, [a.double() for a in args], case.grad)()
    timings = interleaved(runs, device, seconds=seconds, ahead=device.type == "cuda")
    found = {}
    typer.echo(f"{case.name}, {str(dtype).removeprefix('torch.')}")
    for name, timing in timings.items():
        error = excess(results[name], results["eager"], exact)
        found[name] = {"seconds": timing.median, "quartiles": timing.quartiles, "error over allowed": error}
        typer.echo(f"  {name:<16} {timing.median * 1e6:9.1f} us   error over allowed {error:.2f}")
    said = [text for journal in RECENT for topic, text in journal.notes if topic == NAME]
    for text in said:
        typer.echo(f"  {text}")
    return {"case": case.name, "dtype": str(dtype), "contenders": found, "groupings": said}


def _run(fn: Callable[..., Tensor], args: list[Tensor], grad: bool) -> Callable[[], list[Tensor]]:
    """A call of `fn`, or of the backward of one."""
    if not grad:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [fn(*args)]

        return forward
    *operands, gradient = [a.detach().clone() for a in args]
    for operand in operands:
        operand.requires_grad_()
    out = fn(*operands)
    return lambda: list(torch.autograd.grad(out, operands, gradient, retain_graph=True))


def main(
    out: Annotated[Path, typer.Option(help="folder for groupings_<device>.json")],
    device: str = "cuda",
    only: Annotated[str, typer.Option(help="cases whose name has this")] = "",
    dtypes: str = "bfloat16,float32",
    seconds: Annotated[float, typer.Option(help="of timing for each case")] = 0.6,
    part: Annotated[int, typer.Option(help="divide sizes by this")] = 1,
) -> None:
    """Compare the groupings that are measured with those that are estimated."""
    chosen = containing(CASES, only, lambda case: case.name)
    where = pick_device(device)
    entries: list[dict[str, Any]] = []
    facts = {**target_facts(where), **versions(), "revision": revision()}
    out.mkdir(parents=True, exist_ok=True)
    for name in dtypes.split(","):
        for case in chosen:
            entries.append(measured(case, where, getattr(torch, name), seconds, part))
            text = json.dumps({"device": facts, "cases": entries}, indent=1)
            (out / f"groupings_{where.type}.json").write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
