"""Configurations of the matrix product templates against cuBLAS: `python -m benchmarks.gemm_micro --out FOLDER`.

Products of BERT, ViT, GPT-2 and Llama, square ones, and a few rows with Llama-3-8B's weights, each plain and with bias and
GELU in the epilogue. All kernels are compiled and launched as fxopt does it. Values are checked against float32; times are
of this GPU, interleaved with the library's, with inputs in the L2 cache and without. The JSON has the cost model's estimate
beside each time, so that the model can be corrected; its summary has the speed of the best configuration over the library's.
`--large` runs what the template is judged by: plain products in bfloat16 of many rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional

from benchmarks.choosing import containing_any
from benchmarks.kernels_micro import excess
from benchmarks.results import revision, target_facts, versions
from fxopt.codegen.compile import compile_kernels
from fxopt.codegen.templates.gemm_config import configs, library_seconds, ranked, with_tail
from fxopt.codegen.templates.gemm_entry import ALIGNED_MODULE, MODULE, TAILED_MODULE, gemm_call, partial_shape
from fxopt.codegen.templates.gemm_estimate import estimate
from fxopt.codegen.templates.gemm_problem import GemmConfig, GemmProblem, Matrix
from fxopt.ir.kernel import Artifact, KernelSource
from fxopt.ir.region import BufferSpec
from fxopt.ir.rounding import FLOAT8
from fxopt.report.measure import geometric_mean
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.candidate import Choice
from fxopt.tune.measure import interleaved, runner

OPS = {"": 0.0, "bias": 0.06, "gelu": 1.1, "gated": 0.5}
"""`GemmProblem.epilogue_ops`."""

_BIASED = ("bias", "gelu")
JOIN_BLOCK = 512
LARGE = 2048
"""Rows and columns from which on a product is large; the inner dimension may have fewer."""

CHUNK = 6
"""Cases compiled together: as many as keep the workers busy, few enough to stop in time."""


@dataclass(frozen=True)
class GemmCase:
    """x [m, k] times a weight: stored [n, k] ("nt", a linear layer's) or [k, n] ("nn").

    `epilogue`: "" for none, "bias" for a bias that is added, "gelu" of such a sum, or "gated": silu of the product times x
    times another weight.
    """

    name: str
    m: int
    n: int
    k: int
    layout: str = "nt"
    epilogue: str = ""
    dtype: torch.dtype = torch.bfloat16

    @property
    def title(self) -> str:
        return f"{self.name} {self.m}x{self.n}x{self.k} {self.layout} {self.epilogue}".rstrip()

    @property
    def is_large(self) -> bool:
        """Whether it is one of the plain products in bfloat16 by which the template is judged."""
        return not self.epilogue and self.dtype == torch.bfloat16 and min(self.m, self.n) >= LARGE

    @property
    def out_dtype(self) -> torch.dtype:
        """Of bias and result."""
        return torch.bfloat16 if self.dtype in FLOAT8 else self.dtype

    @property
    def problem(self) -> GemmProblem:
        b = (1, self.k) if self.layout == "nt" else (self.n, 1)
        written = self.m * self.n * self.out_dtype.itemsize
        read = self.n * self.out_dtype.itemsize if self.epilogue in _BIASED else 0
        x, w = Matrix(self.m, self.k, self.k, 1), Matrix(self.k, self.n, *b)
        gate = w if self.epilogue == "gated" else None
        ops, run = OPS[self.epilogue], 16 // self.out_dtype.itemsize
        return GemmProblem(
            1, self.m, self.n, self.k, self.dtype, x, w, read, written, c=gate, epilogue_ops=ops, pitch=self.n, run=run
        )

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """x, w and gate [k, n] (whatever their strides) and bias."""
        generator = torch.Generator(device).manual_seed(0)

        def made(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape, device=device, dtype=self.out_dtype).normal_(0, scale, generator=generator)

        scale = self.k**-0.5

        def weight() -> Tensor:
            shape = (self.n, self.k) if self.layout == "nt" else (self.k, self.n)
            values = made(*shape, scale=scale).to(self.dtype)
            return values.t() if self.layout == "nt" else values

        return {"x": made(self.m, self.k).to(self.dtype), "w": weight(), "bias": made(self.n), "gate": weight()}

    def reference(self, x: Tensor, w: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        if self.epilogue == "gated":
            return functional.silu(x @ w) * (x @ gate)
        if x.dtype in FLOAT8:
            result = self._float8_product(x, w) + bias if self.epilogue in _BIASED else self._float8_product(x, w)
        else:
            result = torch.addmm(bias, x, w) if self.epilogue in _BIASED else x @ w
        return functional.gelu(result) if self.epilogue == "gelu" else result

    def _float8_product(self, x: Tensor, w: Tensor) -> Tensor:
        one = torch.ones((), device=x.device)
        return torch._scaled_mm(x, w, one, one, out_dtype=self.out_dtype, use_fast_accum=True)

    def products(self, x: Tensor, w: Tensor, gate: Tensor) -> None:
        """What the library has to do: the products alone."""
        if x.dtype in FLOAT8:
            self._float8_product(x, w)
            return
        torch.mm(x, w)
        if self.epilogue == "gated":
            torch.mm(x, gate)


_SHAPES = (
    # name, rows, (columns, inner) of each weight, weights' layout
    ("square", 4096, ((4096, 4096),), "nt"),
    ("bert-b32", 4096, ((768, 768), (2304, 768), (3072, 768), (768, 3072)), "nt"),
    ("decode", 16, ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)), "nt"),
    ("vit-b64", 12608, ((768, 768), (2304, 768), (3072, 768), (768, 3072)), "nt"),
    ("decode", 1, ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)), "nt"),
    ("llama-prefill", 2048, ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)), "nt"),
    ("bert-b1", 128, ((768, 768), (3072, 768), (768, 3072)), "nt"),
    ("decode", 64, ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)), "nt"),
    ("vit-b1", 197, ((2304, 768), (3072, 768)), "nt"),
    ("gpt2-b8", 4096, ((2304, 768), (3072, 768), (768, 3072)), "nn"),
    ("decode", 8, ((4096, 4096), (28672, 4096)), "nt"),
    ("square", 8192, ((8192, 8192),), "nt"),
    ("square", 4096, ((4096, 4096),), "nn"),
    ("gpt2-head", 4096, ((50304, 768), (50257, 768)), "nt"),
    ("bert-head", 4096, ((30522, 768),), "nt"),
    ("decode", 16, ((4096, 4096),), "nn"),
    ("bert-b1", 128, ((768, 768), (3072, 768)), "nn"),
)


_IN_8_BITS = ("bert-b32", "vit-b64", "llama-prefill")
_WITH_BIAS = ("bert-b32", "vit-b64", "gpt2-head", "bert-head")


def cases() -> Iterator[GemmCase]:
    """The most telling first: what does not fit in the time is left out."""
    for name, m, weights, layout in _SHAPES:
        for n, k in weights:
            for epilogue in ("", "gelu", *(("bias",) if name in _WITH_BIAS else ())):
                yield GemmCase(name, m, n, k, layout, epilogue)
                if name in _IN_8_BITS:
                    yield GemmCase(f"{name} fp8", m, n, k, layout, epilogue, torch.float8_e4m3fn)
        if name in ("decode", "llama-prefill") and layout == "nt":
            yield GemmCase(name, m, 14336, 4096, layout, "gated")


def choose_configs(problem: GemmProblem, target: Target, count: int) -> list[GemmConfig]:
    """The cost model's proposals, the best without tensor maps, and the neighbours of the first two; at most `count`."""
    order = ranked(problem, target)
    chosen = configs(problem, target, limit=count - count // 3)
    pointers = [c for c in order if not c.tma][:1]
    neighbours = [c for first in chosen[:2] for c in order if c.kind == first.kind]
    return list(dict.fromkeys([*chosen, *pointers, *neighbours]))[:count]


_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_PREAMBLE = f"import triton\nimport triton.language as tl\nfrom triton.language.extra import libdevice\n\n{MODULE}\n"


def sources(case: GemmCase, config: GemmConfig) -> tuple[tuple[KernelSource, ...], tuple[BufferSpec, ...]]:
    """The kernels of one configuration over the buffers x, w, bias and out, and their scratch buffers."""
    if config.split > 1:
        shape = partial_shape(case.problem, config)
        scratch = BufferSpec("partial", torch.float32, torch.device("cuda", 0), (torch.Size(shape).numel(),), (1,))
        return (_product(case, config, "partial"), _join(case, config)), (scratch,)
    return (_product(case, config, "out"),), ()


def _value(case: GemmCase, bias: str) -> str:
    """Lines that compute v from `acc` (and `gate`) and the text `bias`."""
    if case.epilogue == "gated":
        return "    v = acc / (1.0 + tl.exp(-acc)) * gate\n"
    if not case.epilogue:
        return "    v = acc\n"
    gelu = "    v = 0.5 * v * (1.0 + libdevice.erf(v * 0.7071067811865476))\n"
    return f"    v = acc + {bias}.to(tl.float32)\n{gelu * (case.epilogue == 'gelu')}"


def _product(case: GemmCase, config: GemmConfig, result: str) -> KernelSource:
    extra = "b3" if result == "partial" else "(b2, b3)"
    gated = case.epilogue == "gated"
    call = gemm_call(case.problem, config, c="b4", narrow="b4", extra=extra)
    third = ["gate"] if gated else ["w"] if config.has_narrow_tiles else []
    blocks, parameter = "acc, gate" if gated else "acc", ", b4" * len(third)
    place, below = f"b3 + (y * {case.n} + x)", f"x < {case.n}"

    def function(name: str, pointer: str, columns: str = "") -> str:
        early = config.vectors and name != "edge"
        head = f"\n\n@triton.jit\ndef {name}({blocks}, y, x, z, extra):\n    b2, b3{', w' * early} = extra\n"
        bias = "w" if early else f"tl.load(b2 + x{f', mask={columns}, other=0.0' if columns else ''})"
        value, mask = _value(case, bias), f" & {columns}" if columns else ""
        return f"{head}{value}    tl.store({pointer}, v.to(b3.dtype.element_ty), (y < {case.m}){mask})\n"

    if config.classes > 1:
        inside = function("epilogue", f"tl.multiple_of({place}, [1, 16])")
        functions = f"{ALIGNED_MODULE}\n{inside}{function('edge', place, f'({below}) & (x >= 0)')}"
    else:
        functions = function("epilogue", place, f"({below})")
    if config.vectors:
        functions += f"\n\n@triton.jit\ndef vectors(y, x, z, extra):\n    return (tl.load(extra[0] + x, {below}),)\n"
    functions = f"{TAILED_MODULE}\n{functions}" if config.tail > 1 else functions
    text = f"{_PREAMBLE}{functions}\n\n@triton.jit\ndef product(b0, b1, b2, b3{parameter}):\n    {call.text}\n"
    results = "*fp32" if result == "partial" else _TYPES[case.out_dtype]
    types = call.signature | {"b2": _TYPES[case.out_dtype], "b3": results}
    signature = {name: types[name] for name in sorted(types)}
    buffers = ("x", "w", "bias", result, *third)
    options = {
        **_options(signature),
        "num_warps": config.warps,
        "num_stages": config.stages,
        "tensor_maps": call.tensor_maps,
    }
    return KernelSource("triton", "product", text, buffers, (), (call.grid, 1, 1), options)


def _join(case: GemmCase, config: GemmConfig) -> KernelSource:
    """Sums the parts in order; the epilogue is this kernel's."""
    numel = case.m * case.n
    text = (
        f"{_PREAMBLE}\n\n@triton.jit\ndef join(b2, b3, b4):\n"
        f"    i = tl.program_id(0) * {JOIN_BLOCK} + tl.arange(0, {JOIN_BLOCK})\n    x = i % {case.n}\n"
        f"    acc = tl.zeros([{JOIN_BLOCK}], tl.float32)\n"
        f"    for part in tl.static_range({config.split}):\n"
        f"        acc += tl.load(b4 + (part * {numel} + i), mask=i < {numel}, other=0.0)\n{_value(case, 'tl.load(b2 + x)')}"
        f"    tl.store(b3 + i, v.to(b3.dtype.element_ty), i < {numel})\n"
    )
    signature = {"b2": _TYPES[case.out_dtype], "b3": _TYPES[case.out_dtype], "b4": "*fp32"}
    options = {**_options(signature), "num_warps": 4, "num_stages": 1}
    grid = (ceil(numel / JOIN_BLOCK), 1, 1)
    return KernelSource("triton", "join", text, ("bias", "out", "partial"), (), grid, options)


def _options(signature: dict[str, str]) -> dict[str, Any]:
    return {"signature": signature, "constexprs": {}, "aligned": list(signature), "asserts": False}


def _configs_of(case: GemmCase, target: Target, count: int) -> list[GemmConfig]:
    """`choose_configs`; with a bias the first of them that take it also with that loaded for whole tiles; and the first that
    may have narrow tiles at the end.
    """
    chosen = choose_configs(case.problem, target, count)
    whole = [replace(c, vectors=True) for c in chosen if c.split == 1] if case.epilogue in _BIASED else []
    tailed = [t for c in (whole or chosen) if (t := with_tail(case.problem, c, target)).tail > 1]
    return [*chosen, *whole[: count // 3], *tailed[: count // 3]]


Built = list[tuple[GemmConfig, Choice | str]]
"""Each configuration with what runs it, or why it did not compile."""


def build(chosen: Sequence[GemmCase], target: Target, store: ArtifactStore, count: int) -> list[Built]:
    """Compile the configurations of all of `chosen` in one go."""
    printed = [[(c, *sources(case, c)) for c in _configs_of(case, target, count)] for case in chosen]
    kernels = [s for group in printed for _, ks, _ in group for s in ks]
    results = dict(zip(map(id, kernels), compile_kernels(kernels, target, store), strict=True))
    out = []
    for group in printed:
        built: Built = []
        for config, ks, scratch in group:
            pairs = [(s, results[id(s)]) for s in ks]
            done = tuple((s, a) for s, a in pairs if isinstance(a, Artifact))
            reason = "; ".join(a.reason for _, a in pairs if not isinstance(a, Artifact))
            built.append((config, reason or Choice(str(config), done, scratch)))
        out.append(built)
    return out


def measure(case: GemmCase, built: Built, target: Target, device: torch.device) -> dict[str, Any]:
    """Errors and times of every configuration and the library, as JSON data."""
    inputs = case.inputs(device)
    eager = case.reference(**inputs)
    exact = case.reference(**{n: t.float() for n, t in inputs.items()}).double()
    out = torch.empty_like(eager)
    names, runs, rows = [], list[Callable[[], Any]](), list[dict[str, Any]]()
    for config, choice in built:
        run = None if isinstance(choice, str) else runner(choice.trial, {**inputs, "out": out}, {})
        if isinstance(choice, str) or run is None:
            rows.append({"label": str(config), "error": choice if isinstance(choice, str) else "does not load"})
            continue
        out.fill_(float("nan"))
        run()
        meta = choice.kernels[0][1].meta
        rows.append(
            {
                "label": str(config),
                "estimate_us": estimate(case.problem, config, target) * 1e6,
                "excess_error": excess([out], [eager], [exact]),
                **{field: meta.get(field) for field in ("n_regs", "n_spills", "shared")},
            }
        )
        names.append(len(rows) - 1)
        runs.append(run)
    del exact
    runs += [lambda: case.reference(**inputs), lambda: case.products(inputs["x"], inputs["w"], inputs["gate"])]
    hot, cold = (interleaved(runs, device, cold=c) for c in (False, True))
    for at, warm, cool in zip(names, hot, cold, strict=False):
        rows[at] |= {"us_hot": warm * 1e6, "us_cold": cool * 1e6, "tflops": case.problem.flops / warm / 1e12}
    library = {"us_hot": hot[-1] * 1e6, "us_cold": cold[-1] * 1e6, "tflops": case.problem.flops / hot[-1] / 1e12}
    library["estimate_us"] = library_seconds(case.problem, target) * 1e6
    return {
        "case": case.title,
        "flops": case.problem.flops,
        "bytes": case.problem.operand_bytes + case.problem.read + case.problem.written,
        "eager": {"us_hot": hot[-2] * 1e6, "us_cold": cold[-2] * 1e6},
        "library": library,
        "rows": rows,
    }


def summarize(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By case, how many times as fast as the library's product the best configuration is and the cost model's first one is,
    inputs in the L2 cache; the least of all with its case, and their geometric mean. An epilogue is more work.
    """
    speeds: dict[str, dict[str, float]] = {}
    for entry in entries:
        taken = [row["us_hot"] for row in entry["rows"] if "us_hot" in row]
        if taken:
            library = entry["library"]["us_hot"]
            speeds[entry["case"]] = {"best": library / min(taken), "first": library / taken[0]}
    if not speeds:
        return {"speeds": {}}
    slowest = min(speeds, key=lambda case: speeds[case]["best"])
    means = {f"geometric mean, {which}": geometric_mean([s[which] for s in speeds.values()]) for which in ("best", "first")}
    return {"speeds": speeds, "slowest": slowest, "least": speeds[slowest]["best"], **means}


def report(entry: dict[str, Any]) -> str:
    rows = [r for r in entry["rows"] if "us_hot" in r]
    library, eager = entry["library"], entry["eager"]
    text = f"{entry['case']:<38} mm {library['us_hot']:7.1f} eager {eager['us_hot']:7.1f} cold {eager['us_cold']:7.1f}"
    if rows:
        best = min(rows, key=lambda r: r["us_hot"])
        for word, row in (("first", rows[0]), ("best", best)):
            text += (
                f" | {word} {row['label']:<34} {row['us_hot']:7.1f} cold {row['us_cold']:7.1f} ({row['estimate_us']:.1f})"
            )
        text += f" | {best['tflops']:.0f} TFLOP/s"
    wrong = sum(r["excess_error"] > 1 for r in rows)
    failed = sum("error" in r for r in entry["rows"])
    return text + (f" | {wrong} WRONG" if wrong else "") + (f" | {failed} not built" if failed else "")


def main(
    out: Annotated[Path, typer.Option(help="folder for gemm_micro.json")],
    only: Annotated[str, typer.Option(help="run cases whose title has one of these in it, separated by commas")] = "",
    seconds: Annotated[float, typer.Option(help="begin no further cases after so long")] = 140.0,
    count: Annotated[int, typer.Option(help="configurations a case")] = 12,
    large: Annotated[
        bool, typer.Option("--large", help="only plain bfloat16 products of 2048 rows and columns or more")
    ] = False,
) -> None:
    """Check and time the configurations of matrix products on this machine's first GPU."""
    chosen = containing_any((c for c in cases() if c.is_large or not large), only, lambda case: case.title)
    device = torch.device("cuda", 0)
    target, store = Target.current(device), ArtifactStore()
    torch.backends.cuda.matmul.allow_tf32 = False
    data: dict[str, Any] = {"target": target_facts(device), "versions": versions(), "commit": revision()}
    data |= {"compile_seconds": 0.0, "summary": {}, "cases": []}
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for at in range(0, len(chosen), CHUNK):
        if time.perf_counter() - began > seconds:
            typer.echo(f"out of time: {len(chosen) - at} cases left out")
            break
        start = time.perf_counter()
        group = chosen[at : at + CHUNK]
        built = build(group, target, store, count)
        data["compile_seconds"] += time.perf_counter() - start
        for case, choices in zip(group, built, strict=True):
            data["cases"].append(measure(case, choices, target, device))
            typer.echo(report(data["cases"][-1]))
            torch.cuda.empty_cache()
        data["summary"] = summarize(data["cases"])
        (out / "gemm_micro.json").write_text(json.dumps(data, indent=1) + "\n")
    if "least" in data["summary"]:
        typer.echo(f"least speed over the library: {data['summary']['least']:.2f} ({data['summary']['slowest']})")
    if any(r.get("excess_error", 0.0) > 1 for c in data["cases"] for r in c["rows"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
