"""Templates of attention in training: values and gradients in Triton's interpreter, code for several architectures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fxopt.codegen.templates.scored_config import ScoredConfig, configs
from fxopt.codegen.triton_build import compile_triton
from fxopt.codegen.triton_scored import print_scored
from fxopt.ir.exprs import Int, Sym, contiguous_strides, symbol
from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import BufferSpec, ScoredAttention, View
from fxopt.ir.scored_attention_op import attend, bias_gradient, key_value_gradients, query_gradient
from fxopt.target import Target
from fxopt.tune.values import agree
from tests.codegen.triton_interpreter import Interpreter

H100 = Target.cuda(90)
BF16 = torch.bfloat16
SMALL = ScoredConfig(16, 16, 4, 2)


@dataclass(frozen=True)
class Problem:
    """Tensors by the names of the ops' schemas, and the rest of their arguments."""

    tensors: dict[str, Tensor]
    rule: dict[str, Any]

    @property
    def operands(self) -> list[Tensor | None]:
        return [self.tensors.get(n) for n in ("query", "key", "value", "bias", "mask")]

    @property
    def seed(self) -> Tensor | None:
        return self.tensors.get("seed")

    def exact(self) -> Problem:
        wide = {n: x.double() if x.is_floating_point() else x for n, x in self.tensors.items()}
        return Problem(wide, self.rule)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[batch, heads, rows, width], with heads next to features in memory."""
    batch, heads, rows, width = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, rows, heads, width, generator=generator).to(dtype).transpose(1, 2)


def problem(
    rows: int,
    keys: int,
    batch: int = 1,
    heads: int = 2,
    groups: int = 2,
    width: int = 16,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    **rule: Any,
) -> Problem:
    given = {
        "query": rand(batch, heads, rows, width, dtype=dtype),
        "key": rand(batch, groups, keys, width, seed=1, dtype=dtype),
    }
    given |= {"value": rand(batch, groups, keys, width, seed=2, dtype=dtype)}
    drawn = None if seed is None else torch.tensor(seed)
    given |= {n: x for n, x in (("bias", bias), ("mask", mask), ("seed", drawn)) if x is not None}
    return Problem(given, {"scale": width**-0.5, "cap": 0.0, "fill": -math.inf, "band": None} | rule)


def step_of(op: str, x: Problem, results: list[Tensor], parts: int = 1) -> ScoredAttention:
    tensors = x.tensors | {f"result{k}": r for k, r in enumerate(results)}
    specs = {n: BufferSpec(n, t.dtype, torch.device("cuda", 0), (1,), (1,)) for n, t in tensors.items()}
    views = {n: View(n, tuple(t.shape), _strides(t, n), int(t.storage_offset())) for n, t in tensors.items()}
    made = tuple(views.pop(f"result{k}") for k in range(len(results)))
    rule = x.rule | {"band": None if x.rule["band"] is None else tuple(x.rule["band"])}
    return ScoredAttention("attention", op, views, made, buffers=specs, parts=parts, **rule)


def _strides(x: Tensor, name: str) -> tuple[int, ...]:
    addend = name in ("bias", "mask")
    return tuple(0 if addend and n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))


BATCH, ROWS, KEYS, PARTS = (symbol(Sym(name, lo=1)) for name in ("s0", "s1", "s2", "s3"))


def of_any_size(step: ScoredAttention) -> ScoredAttention:
    """`step` with symbols for its batch, rows, keys and parts."""
    batch, rows, keys = step.operands["query"].shape[0], *(step.operands[n].shape[2] for n in ("query", "key"))

    def sized(x: View, shape: tuple[Int, ...]) -> View:
        if len(shape) != 4 or x.strides[1:] != (shape[3], shape[1] * shape[3], 1):  # type: ignore[operator]
            strides = contiguous_strides(shape)
        else:  # heads next to features
            strides = (shape[2] * (shape[1] * shape[3]), *x.strides[1:])  # type: ignore[operator]
        return View(x.buffer, shape, tuple(0 if n == 1 else s for n, s in zip(shape, strides, strict=True)))

    def own(name: str, x: View) -> View:
        if not x.shape:
            return x
        first, *middle, last = x.shape
        if name in ("bias", "mask"):
            several = BATCH if first == batch and first != 1 else first
            return sized(x, (several, middle[0], ROWS if middle[1] == rows else 1, KEYS if last == keys else 1))
        if len(x.shape) == 3:
            return sized(x, (BATCH, *middle, ROWS))
        if len(x.shape) == 5:
            several = BATCH if middle[0] == batch and batch != 1 else middle[0]
            return sized(x, (PARTS, several, middle[1], ROWS, KEYS))
        return sized(x, (BATCH, middle[0], KEYS if name in ("key", "value") else ROWS, last))

    names = {"scored_attention_key_value": ["key", "value"]}.get(step.op, ["", "", "", ""])
    operands = {n: own(n, x) for n, x in step.operands.items()}
    results = tuple(own(n, x) for n, x in zip(names, step.results, strict=False))
    return replace(step, operands=operands, results=results, parts=PARTS)


def run(
    interpreter: Interpreter,
    op: str,
    x: Problem,
    results: list[Tensor],
    config: ScoredConfig,
    parts: int = 1,
    printed: dict[str, KernelSource] | None = None,
) -> None:
    """Run the printed kernel, which stores into `results`. If there are kernels `printed` before, by the names of their ops,
    they are such of any size, and are run again."""
    memory = x.tensors | {f"result{k}": r.fill_(math.nan) for k, r in enumerate(results)}
    flat = {n: t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0) for n, t in memory.items()}
    step = step_of(op, x, results, parts)
    (batch, _, rows, _), keys = x.tensors["query"].shape, x.tensors["key"].shape[2]
    if printed is None:
        source = print_scored(step, config, H100)
    elif op in printed:
        source = printed[op]
    else:
        source = printed[op] = print_scored(of_any_size(step), config, H100)
    interpreter.run(source, flat, {"s0": batch, "s1": rows, "s2": keys, "s3": parts})


def check(
    interpreter: Interpreter,
    x: Problem,
    config: ScoredConfig = SMALL,
    parts: int = 3,
    printed: dict[str, KernelSource] | None = None,
) -> None:
    """All kernels against the formulas in float64; `printed` as `run` takes them."""
    query, key, value, bias = x.operands[:4]
    assert query is not None and key is not None and value is not None
    most, inverse = (torch.empty(query.shape[:3]) for _ in range(2))
    out, unrounded = (torch.empty_like(query) for _ in range(2))
    run(interpreter, "scored_attention", x, [out, unrounded, most, inverse], config, printed=printed)
    exact = x.exact()
    want, _, want_most, want_inverse = attend(*exact.operands, x.seed, **x.rule)
    close(out, want)
    close(unrounded, want)
    hidden = want_most == -math.inf
    close(most, want_most)
    close(inverse[~hidden], want_inverse[~hidden])

    grad = rand(*out.shape, seed=3)
    total = (grad * out).sum(-1)
    tensors = {"grad": grad, **x.tensors, "most": most, "inverse": inverse, "total": total}
    order = ("grad", "query", "key", "value", "bias", "mask", "most", "inverse", "total", "seed")
    back = replace(x, tensors={n: tensors[n] for n in order if n in tensors})
    wide = [grad.double(), *exact.operands, want_most, want_inverse, (grad * want).sum(-1)]
    of_query, of_key, of_value = (torch.empty_like(t) for t in (query, key, value))
    run(interpreter, "scored_attention_query", back, [of_query], config, printed=printed)
    close(of_query, query_gradient(*wide, x.seed, **x.rule))  # type: ignore[arg-type]
    run(interpreter, "scored_attention_key_value", back, [of_key, of_value], config, printed=printed)
    for got, expected in zip((of_key, of_value), key_value_gradients(*wide, x.seed, **x.rule), strict=True):  # type: ignore[arg-type]
        close(got, expected)
    if bias is not None and bias.shape[2:] == (query.shape[2], key.shape[2]):
        summands = torch.empty(parts, *bias.shape)
        run(interpreter, "scored_attention_bias", back, [summands], config, parts, printed)
        close(summands, bias_gradient(*wide, parts, x.seed, **x.rule))  # type: ignore[arg-type]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5, equal_nan=True)


def addend(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def seen(*shape: int) -> Tensor:
    return addend(*shape) < 0.6


CASES = {
    "capped, causal": problem(37, 37, cap=1.5, band=[-37, 0]),
    "window": problem(41, 41, band=[-9, 2]),
    "a bias for all batches": problem(19, 37, batch=2, bias=addend(1, 2, 19, 37)),
    "a bias that heads share": problem(9, 16, bias=addend(1, 1, 9, 16), batch=3),
    "slopes of distances": problem(9, 21, bias=addend(1, 2, 1, 21), mask=addend(1, 1, 9, 21)),
    "windows of images": problem(16, 16, batch=4, bias=addend(1, 2, 16, 16), mask=addend(2, 1, 16, 16)),
    "boolean": problem(9, 37, batch=2, bias=addend(2, 1, 9, 37), mask=seen(2, 1, 1, 37)),
    "groups": problem(19, 37, heads=4, groups=2, cap=2.0, bias=addend(1, 4, 19, 37), band=[-37, 18]),
    "more rows": problem(50, 5, bias=addend(1, 2, 50, 5), band=[-50, 0]),
    "features": problem(9, 20, width=24),
    "dropout": problem(9, 19, batch=2, bias=addend(1, 2, 9, 19), band=[-37, 9], seed=-(2**62) + 5, drop=0.3),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(interpreter: Interpreter, case: str) -> None:
    check(interpreter, CASES[case])


LENGTHS = ((2, 7, 13), (1, 1, 1), (1, 16, 16), (3, 37, 5), (2, 5, 53))
"""Batches, rows and keys; of the first ones no two are equal."""

OF_ANY_SIZE: dict[str, Callable[[int, int, int], Problem]] = {
    "a bias for all batches": lambda b, s, t: problem(s, t, b, bias=addend(1, 2, s, t), cap=2.0, band=[-(2**40), 0]),
    "a mask of each": lambda b, s, t: problem(s, t, b, heads=4, mask=seen(b, 1, s, t), fill=-3e38),
    "slopes of distances, dropout": lambda b, s, t: problem(
        s, t, b, bias=addend(1, 2, 1, t), mask=addend(b, 1, s, t), seed=7, drop=0.3
    ),
    "a bias of each": lambda b, s, t: problem(s, t, b, bias=addend(b, 1, s, t), band=[-34, 2**40]),
}


@pytest.mark.parametrize("case", OF_ANY_SIZE)
def test_one_kernel_for_all_lengths(interpreter: Interpreter, case: str) -> None:
    printed: dict[str, KernelSource] = {}
    for lengths in LENGTHS:
        check(interpreter, OF_ANY_SIZE[case](*lengths), parts=2, printed=printed)
    assert len(printed) >= 3 and all({ROWS, KEYS} <= {*source.sizes} for source in printed.values())


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("how", ["filled", "added"])
def test_rows_that_are_hidden_throughout(interpreter: Interpreter, how: str, value: float) -> None:
    """As in a softmax: NaN, or equal probabilities; what is filled passes no gradient on."""
    mask = seen(1, 1, 7, 21)
    mask[0, :, 3] = False
    given = mask if how == "filled" else torch.zeros(mask.shape).masked_fill(~mask, value)
    check(interpreter, problem(7, 21, bias=addend(1, 2, 7, 21), mask=given, fill=value))


def test_the_tuner_finds_the_eager_values(interpreter: Interpreter) -> None:
    """On half operands and made-up statistics, as it compares them, with parts of which one is empty."""
    x = problem(19, 37, batch=4, bias=addend(1, 2, 19, 37), dtype=torch.float16, cap=3.0, band=[-37, 0])
    out, unrounded = torch.empty_like(x.tensors["query"]), torch.empty_like(x.tensors["query"], dtype=torch.float32)
    results = [out, unrounded, *(torch.empty(4, 2, 19) for _ in range(2))]
    run(interpreter, "scored_attention", x, results, SMALL)
    assert all(map(agree, results, attend(*x.operands, **x.rule)))
    statistics = {n: rand(4, 2, 19, 1, seed=k)[..., 0] for k, n in enumerate(("most", "inverse", "total"))}
    back = replace(x, tensors={"grad": x.tensors["key"][:, :, :19], **x.tensors, **statistics})
    given = (back.tensors["grad"], *x.operands, *statistics.values())
    summands = torch.empty(3, 1, 2, 19, 37)
    run(interpreter, "scored_attention_bias", back, [summands], SMALL, 3)
    assert agree(summands, bias_gradient(*given, 3, **x.rule))  # type: ignore[arg-type]
    gradients = [torch.empty_like(x.tensors[n]) for n in ("query", "key", "value")]
    run(interpreter, "scored_attention_query", back, gradients[:1], SMALL)
    run(interpreter, "scored_attention_key_value", back, gradients[1:], SMALL)
    expected = (query_gradient(*given, **x.rule), *key_value_gradients(*given, **x.rule))  # type: ignore[arg-type]
    assert all(map(agree, gradients, expected))


@pytest.mark.parametrize(("arch", "width"), [(80, 64), (90, 128), (100, 128)])
def test_code_without_spilled_registers(arch: int, width: int) -> None:
    """The kernel that needs the most of them, as it is proposed first."""
    mask = torch.ones(1, 1, 96, 96, dtype=torch.bool)
    drop = 0.1 if arch == 100 else 0.0
    given = {"cap": 50.0, "fill": -1e9, "band": [-96, 0], "drop": drop, "seed": 3 if drop else None}
    x = problem(96, 96, width=width, dtype=BF16, mask=mask, **given)
    statistics = {n: torch.empty(1, 2, 96) for n in ("most", "inverse", "total")}
    x = replace(x, tensors={"grad": x.tensors["query"], **x.tensors, **statistics})
    step, target = step_of("scored_attention_key_value", x, [x.tensors["key"]] * 2), Target.cuda(arch)
    cubin, meta = compile_triton(print_scored(step, configs(step, target)[0], target), target)
    assert cubin and meta["n_spills"] == 0 and meta["shared"] <= target.shared_per_block
