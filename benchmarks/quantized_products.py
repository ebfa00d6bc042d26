"""Quantized linear layers of real models, on a GPU: `python -m benchmarks.quantized_products --out FOLDER --minutes 1.4`.

Each layer is an RMS norm, a product and what follows it, so that the cast of the rows is measured where it belongs: beside
the norm. Contenders are the layer in bfloat16, in FP8 (static: one scale for all rows, known before; dynamic: one for each
row), in INT8, with INT8 and INT4 weights alone, all under fxopt with frozen weights; torchao's under Inductor where it is
installed; and products alone, without norm, cast and epilogue: FP8 with sums kept in the tensor cores or promoted to float32
from block to block, and the library's calls.

Times are of the device alone, interleaved in one process. The error is the root mean square of the difference from
float64 arithmetic on the same quantized operands, over that of the values; those of the layer see rows that were quantized
after another rounding of the norm. For each contender of fxopt, the contests that its tuner held are there too, in
microseconds. Layers come in the order of what they decide; one ends before the next begins, and `--resume` goes on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
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
from fxopt.codegen.templates import gemm_config
from fxopt.ir import quantized_ops
from fxopt.ir.quantized_ops import FLOAT8, LARGEST, QUANTIZE_WEIGHT, SCALED_MM, WEIGHT_ONLY_MM, dequantized
from fxopt.passes.quantize import LEAST_SCALE
from fxopt.report.measure import interleaved

GROUP = 128
"""Values along the inner dimension that share a scale, of 4-bit weights."""

CHECKED_ROWS = 256
FEW_ROWS = 128
"""Weight-only contenders are for no more rows."""

LEFT_FOR_A_CASE = 12.0
"""Seconds that a case takes at least."""


@dataclass(frozen=True)
class Case:
    """`rows` by a layer of `inner` features in and `columns` out; `after` is "", "gelu", "residual" or "silu-gate" (half of
    the columns gate the others).
    """

    name: str
    rows: int
    inner: int
    columns: int
    after: str = ""


CASES = (
    Case("llama-8b gate-up, decode", 1, 4096, 28672, "silu-gate"),
    Case("llama-8b gate-up, prefill", 2048, 4096, 28672, "silu-gate"),
    Case("vit-b up", 12608, 768, 3072, "gelu"),
    Case("llama-8b qkv, decode", 1, 4096, 6144),
    Case("llama-8b down, prefill", 2048, 14336, 4096, "residual"),
    Case("vit-b down", 12608, 3072, 768, "residual"),
    Case("llama-8b down, decode", 1, 14336, 4096, "residual"),
    Case("bert up", 4096, 768, 3072, "gelu"),
    Case("vit-b qkv", 12608, 768, 2304),
    Case("llama-8b gate-up, 8 rows", 8, 4096, 28672, "silu-gate"),
    Case("llama-8b gate-up, 64 rows", 64, 4096, 28672, "silu-gate"),
    Case("llama-8b gate-up, 128 rows", 128, 4096, 28672, "silu-gate"),
    Case("bert down", 4096, 3072, 768, "residual"),
    Case("vit-b out", 12608, 768, 768, "residual"),
    Case("bert qkv", 4096, 768, 2304),
    Case("llama-8b qkv, prefill", 2048, 4096, 6144),
    Case("llama-8b out, decode", 1, 4096, 4096, "residual"),
    Case("resnet-50 stage 3, 1x1", 12544, 1024, 256),
    Case("resnet-50 stage 4, 1x1", 3136, 2048, 512),
    Case("resnet-50 stage 1, 1x1", 200704, 64, 256),
)


class Layer(nn.Module):
    """What surrounds the product: subclasses say what that is.

    `forward(x, residual)` takes bfloat16 [rows, inner] and [rows, columns].
    """

    def __init__(self, case: Case, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.after, self.inner = case.after, case.inner
        self.register_buffer("bias", bias)

    def rows(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.inner,))

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.product(self.rows(x))
        if self.after == "gelu":
            return F.gelu(y)
        if self.after == "silu-gate":
            gate, up = y.chunk(2, -1)
            return F.silu(gate) * up
        return y + residual if self.after == "residual" else y


class Bfloat16(Layer):
    def __init__(self, case: Case, weight: Tensor, bias: Tensor) -> None:
        super().__init__(case, weight, bias)
        self.register_buffer("weight", weight)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Scaled(Layer):
    """Rows and weight in 8 bits; rows by one scale or, `dynamic`, by one each."""

    def __init__(self, case: Case, weight: Tensor, bias: Tensor, dtype: torch.dtype, dynamic: bool) -> None:
        super().__init__(case, weight, bias)
        self.dtype, self.dynamic, self.largest = dtype, dynamic, LARGEST[dtype]
        stored, scale = QUANTIZE_WEIGHT(weight, dtype)
        self.register_buffer("weight", stored)
        self.register_buffer("scale", scale)
        self.register_buffer("scale_of_rows", torch.tensor(6.0 / self.largest, device=weight.device))
        self.register_buffer("inverse", self.scale_of_rows.reciprocal())

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As the pass `quantize` does it."""
        wide, scale, inverse = x.float(), self.scale_of_rows, self.inverse
        if self.dynamic:
            scale = (wide.abs().amax(-1) * (1.0 / self.largest)).clamp_min(LEAST_SCALE)
            inverse = scale.reciprocal().unsqueeze(-1)
        values = wide * inverse
        values = values.round() if self.dtype == torch.int8 else values
        return values.clamp(-self.largest, self.largest).to(self.dtype), scale

    def product(self, x: Tensor) -> Tensor:
        values, scale = self.quantized(x)
        return SCALED_MM(values, self.weight, scale, self.scale, self.bias, torch.bfloat16)


class WeightOnly(Layer):
    def __init__(self, case: Case, weight: Tensor, bias: Tensor, dtype: torch.dtype, bits: int) -> None:
        super().__init__(case, weight, bias)
        self.bits, self.group = bits, GROUP if bits == 4 else 0
        stored, scale = QUANTIZE_WEIGHT(weight, dtype, bits, self.group)
        self.register_buffer("weight", stored)
        self.register_buffer("scale", scale)

    def product(self, x: Tensor) -> Tensor:
        return WEIGHT_ONLY_MM(x, self.weight, self.scale, self.bias, self.bits, self.group)


class Converted(Bfloat16):
    """Around a linear layer that another library has converted."""

    def __init__(self, case: Case, weight: Tensor, bias: Tensor, linear: nn.Module) -> None:
        super().__init__(case, weight, bias)
        self.linear = linear

    def product(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result


FORMS: dict[str, Callable[[Case, Tensor, Tensor], Layer]] = {
    "bf16": Bfloat16,
    "fp8": lambda *given: Scaled(*given, FLOAT8, False),
    "fp8-dynamic": lambda *given: Scaled(*given, FLOAT8, True),
    "int8": lambda *given: Scaled(*given, torch.int8, False),
    "int8-dynamic": lambda *given: Scaled(*given, torch.int8, True),
    "int8-weight": lambda *given: WeightOnly(*given, torch.int8, 8),
    "int4-weight": lambda *given: WeightOnly(*given, torch.uint8, 4),
}
_FOR_MANY_ROWS = ("bf16", "fp8", "fp8-dynamic", "int8")
_FOR_FEW_ROWS = ("bf16", "int8-weight", "int4-weight", "fp8-dynamic")


def exact(layer: Layer, x: Tensor, residual: Tensor) -> Tensor:
    """`layer` in float64 on the operands that it quantizes."""
    rows = layer.rows(x)
    if isinstance(layer, Scaled):
        values, scale = layer.quantized(rows)
        y = values.double() @ layer.weight.double().t() * (scale[:, None] if layer.dynamic else scale) * layer.scale
    elif isinstance(layer, WeightOnly):
        y = rows.double() @ dequantized(layer.weight, layer.scale, layer.bits, layer.group).double().t()
    else:
        assert isinstance(layer, Bfloat16)
        y = rows.double() @ layer.weight.double().t()
    y = y + layer.bias.double()
    if layer.after == "silu-gate":
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(y) if layer.after == "gelu" else y + residual if layer.after == "residual" else y


def error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of `wanted`."""
    difference = (found.double() - wanted).square().mean().sqrt()
    return float(difference / wanted.square().mean().sqrt())


@contextlib.contextmanager
def summing(longest: int) -> Iterator[None]:
    """Sums of 8-bit floats of no more than `longest` products are imprecise in kernels compiled in the block."""
    before = quantized_ops.LONGEST_IMPRECISE_SUM
    quantized_ops.LONGEST_IMPRECISE_SUM = longest
    gemm_config._of_each_kind.cache_clear()
    try:
        yield
    finally:
        quantized_ops.LONGEST_IMPRECISE_SUM = before
        gemm_config._of_each_kind.cache_clear()


Run = Callable[[], Tensor]
Contests = dict[str, dict[str, float]]


@dataclass
class Bench:
    """The contenders of one case: what runs each, what it should give for the first rows, and its tuner's contests."""

    case: Case
    device: torch.device
    backend: str | None
    runs: dict[str, Run]
    wanted: dict[str, Tensor]
    contests: dict[str, Contests]
    failed: dict[str, str]

    def add(
        self, name: str, fn: Callable[..., Tensor], args: tuple[Tensor, ...], wanted: Tensor, freeze: bool = True
    ) -> None:
        """`fn`, compiled by fxopt unless there is no backend."""
        with kept(BEST) as contests:
            options = {"freeze": freeze}
            ready = fn if self.backend is None else torch.compile(fn, backend=self.backend, options=options, dynamic=False)
            self.keep(name, functools.partial(ready, *args), wanted)
        self.contests[name] = contests

    def keep(self, name: str, run: Run, wanted: Tensor) -> None:
        try:
            run()
        except Exception as reason:
            self.failed[name] = f"{type(reason).__name__}: {reason}"[:300]
            typer.echo(f"  {name}: {self.failed[name]}")
            return
        self.runs[name], self.wanted[name] = run, wanted


def measured(
    case: Case, device: torch.device, seconds: float, backend: str | None, forms: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Times, errors and contests of all contenders of `case`; of those in `forms`, if any."""
    torch._dynamo.reset()
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(std=scale, generator=generator)

    x, weight = normal(case.rows, case.inner), normal(case.columns, case.inner, scale=case.inner**-0.5)
    bias, residual = normal(case.columns), normal(case.rows, case.columns)
    bench = Bench(case, device, backend, {}, {}, {}, {})
    few = case.rows <= FEW_ROWS
    checked = slice(0, CHECKED_ROWS)
    with torch.no_grad():
        for name in forms or (_FOR_FEW_ROWS if few else _FOR_MANY_ROWS):
            layer = FORMS[name](case, weight, bias)
            bench.add(name, layer, (x, residual), exact(layer, x[checked], residual[checked]))
        if not forms:
            _products_alone(bench, x, weight)
            _torchao(bench, x, weight, bias, residual)
        errors = {name: error(run()[checked], bench.wanted[name]) for name, run in bench.runs.items()}
        timings = interleaved(bench.runs, device, seconds=seconds, ahead=device.type == "cuda")
    found = {
        name: {
            "seconds": t.median,
            "quartiles": t.quartiles,
            "error": errors[name],
            "contests": bench.contests.get(name, {}),
        }
        for name, t in timings.items()
    }
    return {"case": case.name, "sizes": [case.rows, case.inner, case.columns], "contenders": found, "failed": bench.failed}


def _products_alone(bench: Bench, x: Tensor, weight: Tensor) -> None:
    """8-bit products without anything around them: fxopt's with and without promotion, the library's."""
    many = bench.case.rows > FEW_ROWS
    one = torch.ones((), device=x.device)
    a, scale_a = QUANTIZE_WEIGHT(x, FLOAT8)
    b, scale_b = QUANTIZE_WEIGHT(weight, FLOAT8)
    checked = a[:CHECKED_ROWS].double() @ b.double().t()
    scaled = checked * scale_a[:CHECKED_ROWS, None] * scale_b

    def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return SCALED_MM(a, b, scale_a, scale_b, None, torch.bfloat16)

    for label, longest in (("promoted", 0), ("imprecise", 1 << 30)):
        with summing(longest):
            bench.add(f"fp8 product alone, {label}", _copy(product), (a, b, scale_a, scale_b), scaled, freeze=False)
    if x.device.type != "cuda":
        return
    rowwise = (scale_a[:, None], scale_b[None, :])
    for label, scales, wanted in (("one scale", (one, one), checked), ("row-wise", rowwise, scaled)):
        for fast in (False, True):
            call = functools.partial(torch._scaled_mm, a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)
            bench.keep(f"_scaled_mm {label}{', fast' * fast}", call, wanted)
    if many:
        ints, _ = QUANTIZE_WEIGHT(x, torch.int8)
        weights, _ = QUANTIZE_WEIGHT(weight, torch.int8)
        sums = ints[:CHECKED_ROWS].double() @ weights.double().t()
        bench.keep("_int_mm", functools.partial(torch._int_mm, ints, weights.t()), sums)


def _copy(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`fn` with a code object of its own: what is compiled of one is not taken for the other."""

    def own(*args: Tensor) -> Tensor:
        return fn(*args)

    own.__code__ = own.__code__.replace(co_name=f"{fn.__name__}_{id(own)}")
    return own


def _torchao(bench: Bench, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> None:
    """torchao's quantized linear layers under Inductor, where it is installed."""
    try:
        from torchao import quantization
    except ImportError:
        return
    few = bench.case.rows <= FEW_ROWS
    names = ("Float8DynamicActivationFloat8WeightConfig", "Int8DynamicActivationInt8WeightConfig")
    for name in ("Int8WeightOnlyConfig", "Int4WeightOnlyConfig") if few else names:
        linear = nn.Linear(bench.case.inner, bench.case.columns, device=x.device, dtype=x.dtype)
        linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
        around = Converted(bench.case, weight, bias, linear)
        try:
            quantization.quantize_(around, getattr(quantization, name)())
            if type(around.linear.weight) is nn.Parameter:
                raise TypeError("torchao left the weight as it was")
        except Exception as reason:
            bench.failed[f"torchao {name}"] = f"{type(reason).__name__}: {reason}"[:300]
            continue
        compiled = torch.compile(around, dynamic=False)
        unquantized = exact(Bfloat16(bench.case, weight, bias), x[:CHECKED_ROWS], residual[:CHECKED_ROWS])
        bench.keep(f"torchao {name.removesuffix('Config')}", functools.partial(compiled, x, residual), unquantized)


def report(entry: dict[str, Any]) -> list[str]:
    found = entry["contenders"]
    first = next(iter(found.values()))["seconds"]
    lines = [f"{entry['case']} {entry['sizes']}"]
    for name, figures in sorted(found.items(), key=lambda each: each[1]["seconds"]):
        us = figures["seconds"] * 1e6
        lines.append(f"  {name:<36} {us:9.1f} us  {first / figures['seconds']:5.2f}x  error {figures['error']:.2e}")
        for contest, labels in figures["contests"].items():
            best = sorted(labels.items(), key=lambda each: each[1])[:4]
            lines.append(f"      {contest}: " + ", ".join(f"{label} {us:.1f}" for label, us in best))
    return lines


def main(
    out: Annotated[Path, typer.Option(help="folder for quantized_products_<device>.json")],
    device: str = "cuda",
    only: Annotated[str, typer.Option(help="cases whose names contain one of these, separated by commas")] = "",
    contenders: Annotated[str, typer.Option(help=f"layers alone, of {', '.join(FORMS)}")] = "",
    seconds: Annotated[float, typer.Option(help="of timing, each case")] = 1.0,
    minutes: Annotated[float, typer.Option(help="time budget; cases that do not fit are left for --resume")] = 9.0,
    resume: Annotated[bool, typer.Option("--resume", help="keep the cases already in the results file")] = False,
) -> None:
    """Time quantized linear layers."""
    chosen = containing_any(CASES, only, lambda case: case.name)
    forms = tuple(names_of(contenders, FORMS, "contender")) if contenders else ()
    end, where = time.perf_counter() + 60 * minutes, torch.device(device)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"quantized_products_{where.type}.json"
    document: dict[str, Any] = {"target": target_facts(where), "versions": versions(), "commit": revision(), "cases": []}
    if resume and path.exists():
        document["cases"] = json.loads(path.read_text())["cases"]
    done = {entry["case"] for entry in document["cases"]}
    longest = LEFT_FOR_A_CASE
    for case in chosen:
        start = time.perf_counter()
        if case.name in done or start + longest > end:
            continue
        document["cases"].append(measured(case, where, seconds, "fxopt", forms))
        typer.echo("\n".join(report(document["cases"][-1])))
        path.write_text(json.dumps(document, indent=1) + "\n")
        longest = max(longest, time.perf_counter() - start)
        if where.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
