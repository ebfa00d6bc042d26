"""ResNet-50's convolutions in 8 bits, beside float16, on a GPU: `python -m benchmarks.quantized_convolutions --out FOLDER`.

Each is a convolution of channels-last images with its bias, relu and, at the end of a block, a residual. In float16 all of
it is; in INT8 the images come in 8 bits, the residual too, and the result goes out so, as in a chain of quantized layers;
in FP8 the residual is float16. All run under fxopt, frozen. Times are of the device alone, interleaved in one process;
beside them stand the contests that the tuner held, in microseconds, and the error of each result from float64 arithmetic
on the operands that it has, relative to their root mean square.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.choosing import containing_any, names_of
from benchmarks.fused_products import BEST, kept
from benchmarks.results import revision, target_facts, versions
from fxopt.ir.quantized_convolution import SCALED_CONVOLUTION
from fxopt.ir.quantized_ops import FLOAT8, LARGEST, quantize_weight
from fxopt.report.measure import interleaved

RANGE = 6.0
"""Of what is quantized: most of a normal distribution's values after relu."""

LEFT_FOR_A_CASE = 5.0
"""Seconds that a case takes at least."""

JUDGED = 2
"""Images of which results are compared with float64."""


@dataclass(frozen=True)
class Case:
    """`count` such convolutions are in ResNet-50. `side` is that of the images."""

    side: int
    inside: int
    outside: int
    window: int
    stride: int
    residual: bool
    count: int

    @property
    def name(self) -> str:
        strided = f" / {self.stride}" if self.stride > 1 else ""
        after = " + residual" if self.residual else ""
        return f"{self.side} x {self.side}, {self.inside} to {self.outside}, {self.window} x {self.window}{strided}{after}"


CASES = (
    Case(56, 64, 64, 3, 1, False, 3),
    Case(28, 128, 128, 3, 1, False, 3),
    Case(14, 256, 256, 3, 1, False, 5),
    Case(7, 512, 512, 3, 1, False, 2),
    Case(56, 64, 256, 1, 1, True, 3),
    Case(56, 256, 64, 1, 1, False, 2),
    Case(28, 128, 512, 1, 1, True, 4),
    Case(28, 512, 128, 1, 1, False, 3),
    Case(14, 256, 1024, 1, 1, True, 6),
    Case(14, 1024, 256, 1, 1, False, 5),
    Case(7, 512, 2048, 1, 1, True, 3),
    Case(7, 2048, 512, 1, 1, False, 2),
    Case(56, 128, 128, 3, 2, False, 1),
    Case(28, 256, 256, 3, 2, False, 1),
    Case(14, 512, 512, 3, 2, False, 1),
    Case(56, 256, 512, 1, 2, False, 1),
    Case(28, 512, 1024, 1, 2, False, 1),
    Case(14, 1024, 2048, 1, 2, False, 1),
    Case(56, 64, 64, 1, 1, False, 1),
    Case(56, 64, 256, 1, 1, False, 1),
    Case(56, 256, 128, 1, 1, False, 1),
    Case(28, 512, 256, 1, 1, False, 1),
    Case(14, 1024, 512, 1, 1, False, 1),
)


class Float16(nn.Module):
    """`forward(x, residual)`, float16 channels-last; the residual is None where there is none."""

    def __init__(self, case: Case, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.case = case
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias)

    def given(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The operands as this form has them in memory."""
        return x, residual

    def widened(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images, weight and residual in float64."""
        return x.double(), self.weight.double(), None if residual is None else residual.double()

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.case.stride, self.case.window // 2)
        return torch.relu(y if residual is None else y + residual)

    def read(self, result: Tensor) -> Tensor:
        """What a result stands for."""
        return result.double()


class Quantized(Float16):
    """In 8 bits of `dtype`."""

    def __init__(self, case: Case, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.case, self.dtype, self.largest = case, dtype, LARGEST[dtype]
        rows = weight.permute(0, 2, 3, 1)
        stored, scales = quantize_weight(rows.reshape(len(rows), -1), dtype)
        self.register_buffer("weight", stored.view(rows.shape))
        self.register_buffer("scales", scales)
        self.register_buffer("scale", torch.tensor(RANGE / self.largest, device=weight.device))
        self.register_buffer("inverse", self.scale.reciprocal())
        self.register_buffer("bias", bias.float())

    def narrow(self, x: Tensor) -> Tensor:
        values = x.float() * self.inverse
        values = values if self.dtype.is_floating_point else values.round()
        return values.clamp(-self.largest, self.largest).to(self.dtype)

    def given(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        narrow = residual is not None and self.dtype == torch.int8
        return self.narrow(x), self.narrow(residual) if narrow and residual is not None else residual

    def _residual(self, residual: Tensor) -> Tensor:
        return residual if residual.is_floating_point() else (residual.float() * self.scale).to(torch.float16)

    def widened(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        weight = (self.weight.double() * self.scales.double()[:, None, None, None]).permute(0, 3, 1, 2)
        return x.double() * self.scale.double(), weight, None if residual is None else self._residual(residual).double()

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        geometry = ([self.case.stride] * 2, [self.case.window // 2] * 2, [1, 1])
        y = SCALED_CONVOLUTION(x, self.weight, self.scale, self.scales, self.bias, *geometry, torch.float16)
        return self.narrow(torch.relu(y if residual is None else y + self._residual(residual)))

    def read(self, result: Tensor) -> Tensor:
        return result.double() * self.scale.double()


FORMS: dict[str, Callable[[Case, Tensor, Tensor], Float16]] = {
    "float16": Float16,
    "int8": lambda *given: Quantized(*given, torch.int8),
    "fp8": lambda *given: Quantized(*given, FLOAT8),
}


def exact(form: Float16, x: Tensor, residual: Tensor | None) -> Tensor:
    """The layer in float64 on the operands that `form` has."""
    image, weight, added = form.widened(x, residual)
    y = F.conv2d(image, weight, form.bias.double(), form.case.stride, form.case.window // 2)
    return torch.relu(y if added is None else y + added)


def measured(
    case: Case, images: int, device: torch.device, seconds: float, backend: str | None, forms: tuple[str, ...]
) -> dict[str, Any]:
    """Times, errors and contests of the contenders of `case`."""
    torch._dynamo.reset()
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=torch.float16).normal_(generator=generator)

    places = (case.side - 1) // case.stride + 1
    x, residual = (
        torch.relu(normal(images, side, side, channels)).permute(0, 3, 1, 2)
        for side, channels in ((case.side, case.inside), (places, case.outside))
    )
    weight = normal(case.outside, case.inside, case.window, case.window) * (2.0 / (case.inside * case.window**2)) ** 0.5
    bias = normal(case.outside) * 0.1
    runs: dict[str, Callable[[], Tensor]] = {}
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with torch.no_grad():
        for name in forms:
            form = FORMS[name](case, weight, bias)
            given = form.given(x, residual if case.residual else None)
            with kept(BEST) as contests:
                ready: Any = form
                if backend is not None:
                    ready = torch.compile(form, backend=backend, options={"freeze": True}, dynamic=False)
                try:
                    result = form.read(ready(*given)[:JUDGED])
                except Exception as reason:
                    failed[name] = f"{type(reason).__name__}: {reason}"[:300]
                    typer.echo(f"  {name}: {failed[name]}")
                    continue
            few = tuple(None if t is None else t[:JUDGED] for t in given)
            wanted = exact(form, *few)  # type: ignore[arg-type]  # the images are there
            error = (result - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            found[name] = {"error": float(error), "contests": contests}
            runs[name] = functools.partial(ready, *given)
        timings = interleaved(runs, device, seconds=seconds, ahead=device.type == "cuda")
    for name, timing in timings.items():
        found[name] |= {"seconds": timing.median, "quartiles": timing.quartiles}
    return {"case": case.name, "count": case.count, "images": images, "contenders": found, "failed": failed}


def report(entry: dict[str, Any]) -> list[str]:
    found = entry["contenders"]
    first = next(iter(found.values()))["seconds"]
    lines = [f"{entry['case']} ({entry['count']})"]
    for name, figures in found.items():
        us = figures["seconds"] * 1e6
        lines.append(f"  {name:<10} {us:9.1f} us  {first / figures['seconds']:5.2f}x  error {figures['error']:.2e}")
        for contest, labels in figures["contests"].items():
            best = sorted(labels.items(), key=lambda each: each[1])[:4]
            lines.append(f"      {contest}: " + ", ".join(f"{label} {us:.1f}" for label, us in best))
    return lines


def totals(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of all convolutions of the network that were measured in every form, by form."""
    names = {name for entry in cases for name in entry["contenders"]}
    whole = [entry for entry in cases if set(entry["contenders"]) == names]
    return {name: sum(e["count"] * e["contenders"][name]["seconds"] for e in whole) for name in sorted(names)}


def main(
    out: Annotated[Path, typer.Option(help="folder for quantized_convolutions_<device>.json")],
    device: str = "cuda",
    only: Annotated[str, typer.Option(help="cases whose names contain one of these, separated by semicolons")] = "",
    contenders: Annotated[str, typer.Option(help="names, by commas")] = ",".join(FORMS),
    images: int = 64,
    seconds: Annotated[float, typer.Option(help="of timing, each case")] = 0.5,
    minutes: Annotated[float, typer.Option(help="time budget; cases that do not fit are left for --resume")] = 9.0,
    resume: Annotated[bool, typer.Option("--resume", help="keep the cases already in the results file")] = False,
) -> None:
    """Time ResNet-50's convolutions in 8 bits."""
    chosen = containing_any(CASES, only, lambda case: case.name, ";")
    forms = tuple(names_of(contenders, FORMS, "contender"))
    end, where = time.perf_counter() + 60 * minutes, torch.device(device)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"quantized_convolutions_{where.type}.json"
    document: dict[str, Any] = {"target": target_facts(where), "versions": versions(), "commit": revision(), "cases": []}
    if resume and path.exists():
        document["cases"] = json.loads(path.read_text())["cases"]
    done = {entry["case"] for entry in document["cases"]}
    longest = LEFT_FOR_A_CASE
    for case in chosen:
        start = time.perf_counter()
        if case.name in done or start + longest > end:
            continue
        document["cases"].append(measured(case, images, where, seconds, "fxopt", forms))
        typer.echo("\n".join(report(document["cases"][-1])))
        document["seconds of all"] = totals(document["cases"])
        path.write_text(json.dumps(document, indent=1) + "\n")
        longest = max(longest, time.perf_counter() - start)
    for name, total in document.get("seconds of all", {}).items():
        typer.echo(f"{name:<10} {total * 1e3:8.3f} ms for all convolutions measured")


if __name__ == "__main__":
    typer.run(main)
