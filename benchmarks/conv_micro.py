"""Ways to compute single convolutions, against each other: `python -m benchmarks.conv_micro --out FOLDER`.

The convolutions of ResNet-50, ConvNeXt-T, MobileNetV2 and a UNet in half precision at batch 1 and 64, each once. The ways:

- `rows` and `channels-last`: cuDNN's plain convolution on operands in either layout;
- `then relu`, `then add`: the channels-last one and a pass over its result, as a generated kernel would make (bias and
  activation cost it nothing; a residual is one more tensor to read);
- `relu`, `add relu`: torch's calls of cuDNN's fused kernels, with a bias; `relu, wide bias` with one in float32;
- `product`, `product relu`: windows of one element as a matrix product of places by channels, plain and with bias and
  activation in cuBLASLt's epilogue.

Every way is compared with float64, fused calls also with their result in memory that held NaN, and it is noted which of them
make something else of a bias of NaN, which torch's relu keeps. Times are interleaved and those of the device alone. About
90 s on an H100; what does not fit is listed as left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.choosing import containing
from benchmarks.results import revision, target_facts, versions
from fxopt.report.measure import interleaved

SECONDS_EACH = 0.12
MAX_ROUNDS = 12


@dataclass(frozen=True)
class ConvCase:
    """A convolution of [batch, inside, side, side] by [outside, inside / groups, window, window]."""

    model: str
    batch: int
    inside: int
    outside: int
    side: int
    window: int
    stride: int = 1
    groups: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def padding(self) -> int:
        """That of the models: none where windows do not overlap."""
        return self.window // 2 if self.stride < self.window or self.window == 1 else 0

    @property
    def title(self) -> str:
        shape = f"{self.inside}x{self.side}x{self.side} -> {self.outside}, {self.window}x{self.window}"
        more = f" stride {self.stride}" * (self.stride > 1) + f" groups {self.groups}" * (self.groups > 1)
        return f"{self.model} b{self.batch} {str(self.dtype).removeprefix('torch.')} {shape}{more}"

    @property
    def is_product(self) -> bool:
        return self.window == self.stride == self.groups == 1


Layer = tuple[int, int, int, int, int, int]
"""(inside, outside, side, window, stride, groups)"""


def resnet50() -> Iterator[Layer]:
    yield 3, 64, 224, 7, 2, 1
    inside = 64
    for width, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        before, stride = (side, 1) if width == 64 else (2 * side, 2)
        yield inside, width, before, 1, 1, 1
        yield width, width, before, 3, stride, 1
        yield inside, 4 * width, before, 1, stride, 1
        inside = 4 * width
        yield width, inside, side, 1, 1, 1
        yield inside, width, side, 1, 1, 1
        yield width, width, side, 3, 1, 1


def convnext_t() -> Iterator[Layer]:
    yield 3, 96, 224, 4, 4, 1
    for width, side in ((96, 56), (192, 28), (384, 14), (768, 7)):
        yield width, width, side, 7, 1, width
        if width < 768:
            yield width, 2 * width, side, 2, 2, 1


def mobilenet_v2() -> Iterator[Layer]:
    yield 3, 32, 224, 3, 2, 1
    blocks = ((16, 24, 112, 2), (24, 32, 56, 2), (32, 64, 28, 2), (64, 96, 14, 1), (96, 160, 14, 2))
    for inside, outside, side, stride in blocks:
        inner = 6 * inside
        yield inside, inner, side, 1, 1, 1
        yield inner, inner, side, 3, stride, inner
        yield inner, outside, side // stride, 1, 1, 1
    yield 320, 1280, 7, 1, 1, 1


def unet() -> Iterator[Layer]:
    """Of latent diffusion, at 64 x 64."""
    for width, side in ((320, 64), (640, 32), (1280, 16), (1280, 8)):
        yield width, width, side, 3, 1, 1
        yield 2 * width, width, side, 3, 1, 1
        yield width, width, side, 1, 1, 1
    yield 4, 320, 64, 3, 1, 1


MODELS: dict[str, tuple[Callable[[], Iterator[Layer]], tuple[int, ...], tuple[torch.dtype, ...]]] = {
    "resnet50": (resnet50, (1, 64), (torch.bfloat16, torch.float16)),
    "convnext-t": (convnext_t, (1, 64), (torch.bfloat16,)),
    "mobilenet-v2": (mobilenet_v2, (1, 64), (torch.bfloat16,)),
    "unet": (unet, (1, 8), (torch.float16,)),
}
"""Model -> its layers, batch sizes and dtypes."""


def cases() -> Iterator[ConvCase]:
    """Each different convolution once."""
    for model, (layers, batches, dtypes) in MODELS.items():
        for dtype in dtypes:
            for batch in batches:
                for layer in dict.fromkeys(layers()):
                    yield ConvCase(model, batch, *layer, dtype=dtype)


@dataclass(frozen=True)
class Way:
    """One way: `call` computes it, `kind` says what that is ("plain", "relu", "add relu"; "pass" is only timed)."""

    call: Callable[[], Tensor]
    kind: str = "plain"


@dataclass(frozen=True)
class Operands:
    """x [batch, inside, side, side], its weight and bias, and a residual in the result's shape; channels-last."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor


def operands(case: ConvCase, device: torch.device) -> Operands:
    generator = torch.Generator(device).manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    last = torch.channels_last
    depth = case.inside // case.groups * case.window**2
    x = values(case.batch, case.inside, case.side, case.side).contiguous(memory_format=last)
    weight = values(case.outside, case.inside // case.groups, case.window, case.window) / depth**0.5
    weight = weight.contiguous(memory_format=last)
    side = (case.side + 2 * case.padding - case.window) // case.stride + 1
    residual = values(case.batch, case.outside, side, side).contiguous(memory_format=last)
    return Operands(x, weight, values(case.outside), residual)


def ways(case: ConvCase, o: Operands) -> dict[str, Way]:
    """The ways that this device has, by name."""
    geometry: Any = ([case.stride] * 2, [case.padding] * 2, [1, 1], case.groups)
    rows, row_weight = o.x.contiguous(), o.weight.contiguous()

    def plain() -> Tensor:
        return torch.conv2d(o.x, o.weight, None, *geometry)

    def then_add() -> Tensor:
        y = plain()
        return torch.add(y, o.residual, out=y)

    out = {
        "rows": Way(lambda: torch.conv2d(rows, row_weight, None, *geometry)),
        "channels-last": Way(plain),
        "then relu": Way(lambda: plain().relu_(), "pass"),
        "then add": Way(then_add, "pass"),
    }
    if o.x.is_cuda:
        wide = o.bias.float()
        out["relu"] = Way(lambda: torch.cudnn_convolution_relu(o.x, o.weight, o.bias, *geometry), "relu")
        out["relu, wide bias"] = Way(lambda: torch.cudnn_convolution_relu(o.x, o.weight, wide, *geometry), "relu")
        out["add relu"] = Way(
            lambda: torch.cudnn_convolution_add_relu(o.x, o.weight, o.residual, 1.0, o.bias, *geometry), "add relu"
        )
    if case.is_product:
        places = o.x.permute(0, 2, 3, 1).reshape(-1, case.inside)
        matrix = o.weight.reshape(case.outside, case.inside).t()
        out["product"] = Way(lambda: _image(torch.mm(places, matrix), o.residual))
        out["product relu"] = Way(lambda: _image(torch._addmm_activation(o.bias, places, matrix), o.residual), "relu")
    return out


def _image(product: Tensor, like: Tensor) -> Tensor:
    """[places, channels] as the channels-last image that it is."""
    batch, channels, height, width = like.shape
    return product.view(batch, height, width, channels).permute(0, 3, 1, 2)


def exact(case: ConvCase, o: Operands, kind: str) -> Tensor:
    """A result of this kind in float64."""
    y = F.conv2d(o.x.double(), o.weight.double(), None, case.stride, case.padding, 1, case.groups)
    if kind == "plain":
        return y
    y = y + o.bias.double()[:, None, None]
    return (y + o.residual.double() if kind == "add relu" else y).relu()


def error(got: Tensor, want: Tensor) -> float:
    """The largest, in roundings of the dtype at the scale of the largest value."""
    scale = torch.finfo(got.dtype).eps * want.abs().max().item()
    return float((got.double() - want).abs().max()) / scale


def judge(case: ConvCase, o: Operands, chosen: dict[str, Way]) -> tuple[dict[str, float], dict[str, str]]:
    """(errors by way, why others do not run here). Batches beyond 8 are judged by the first 8."""
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    few = Operands(o.x[:8], o.weight, o.bias, o.residual[:8])
    known = {kind: exact(case, few, kind) for kind in {w.kind for w in chosen.values()} - {"pass"}}
    for name, way in chosen.items():
        try:
            torch.full_like(o.residual, float("nan"))  # freed at once, and given to the next tensor of this size
            got = way.call()
        except (RuntimeError, NotImplementedError) as failure:
            refused[name] = str(failure).partition("\n")[0]
            continue
        if way.kind in known:
            errors[name] = error(got[:8], known[way.kind])
    return errors, refused


def hides_nan(case: ConvCase, o: Operands, names: Iterable[str]) -> list[str]:
    """Those of the ways `names` with a bias whose result is not all NaN where that is."""
    few = Operands(o.x[:1], o.weight, torch.full_like(o.bias, float("nan")), o.residual[:1])
    chosen = ways(case, few)
    return [name for name in names if "relu" in chosen[name].kind and not bool(chosen[name].call().isnan().all())]


def measure(case: ConvCase, device: torch.device) -> dict[str, Any]:
    """Errors and microseconds of every way, as JSON data."""
    o = operands(case, device)
    chosen = ways(case, o)
    errors, refused = judge(case, o, chosen)
    calls = {name: way.call for name, way in chosen.items() if name not in refused}
    timings = interleaved(calls, device, seconds=SECONDS_EACH, max_rounds=MAX_ROUNDS, ahead=True)
    facts = {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
    times = {name: timing.median * 1e6 for name, timing in timings.items()}
    hiding = hides_nan(case, o, calls)
    return {"case": case.title, **facts, "us": times, "errors": errors, "refused": refused, "hides_nan": hiding}


def report(entry: dict[str, Any]) -> str:
    wrong = [name for name, e in entry["errors"].items() if not e < 8]
    text = " | ".join(f"{name} {us:.1f}" for name, us in entry["us"].items())
    faults = {"WRONG": wrong, "hides NaN": entry["hides_nan"]}
    return f"{entry['case']:<66} {text}" + "".join(
        f" | {what}: {', '.join(names)}" for what, names in faults.items() if names
    )


def main(
    out: Annotated[Path, typer.Option(help="folder for conv_micro.json")],
    only: Annotated[str, typer.Option(help="run cases whose title contains this")] = "",
    seconds: Annotated[float, typer.Option(help="begin no case after this time")] = 95.0,
) -> None:
    """Check and time ways to compute single convolutions on this machine's first GPU."""
    chosen = containing(cases(), only, lambda case: case.title)
    device = torch.device("cuda", 0)
    end = time.monotonic() + seconds
    facts = {"target": target_facts(device), "versions": versions(), "commit": revision()}
    data: dict[str, Any] = {**facts, "cases": [], "left": []}
    out.mkdir(parents=True, exist_ok=True)
    for case in chosen:
        if time.monotonic() > end:
            data["left"].append(case.title)
            continue
        data["cases"].append(measure(case, device))
        typer.echo(report(data["cases"][-1]))
        (out / "conv_micro.json").write_text(json.dumps(data, indent=1) + "\n")
    (out / "conv_micro.json").write_text(json.dumps(data, indent=1) + "\n")
    typer.echo(f"{len(data['cases'])} convolutions, {len(data['left'])} left out for time")


if __name__ == "__main__":
    typer.run(main)
