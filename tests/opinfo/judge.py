"""Eager, float64 and compiled results of one problem, and the verdict."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tests.numerics import assert_closer, max_error
from tests.opinfo.classes import op_class
from tests.opinfo.samples import Problem, fresh_copy, widened
from tests.opinfo.skips import RANDOM, UNINITIALISED

REPEATS = 24
"""Calls whose values stand for a random op's distribution."""

NUDGES = 24
"""Runs of eager on inputs changed in their last bit."""


@dataclass
class Result:
    """Leaves of the op's result, gradients of the inputs that require one (training), and the inputs after the call."""

    outputs: list[Any]
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)

    @property
    def values(self) -> list[Any]:
        return [dense(v) for v in (*self.outputs, *self.gradients, *self.inputs)]


def dense(value: Any) -> Any:
    """Tensors as strided ones without autograd history, lazily negated or conjugated ones resolved."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return (value.to_dense() if value.layout != torch.strided else value).resolve_conj().resolve_neg()


def evaluate(problem: Problem, call: Callable[..., Any], seed: int = 0) -> Result:
    """call(*tensors) on fresh copies, and in training its vector-Jacobian product with fixed random cotangents."""
    tensors = problem.inputs()
    torch.manual_seed(seed)
    if problem.item.mode == "forward":
        with torch.no_grad():
            outputs = pytree.tree_leaves(call(*tensors))
        return Result(outputs, [], tensors)
    outputs = pytree.tree_leaves(call(*tensors))
    targets = [t for t in tensors if t.requires_grad]
    reached = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    if not targets or not reached:
        return Result(outputs)
    weights = [cotangent(problem, k, o) for k, o in enumerate(reached)]
    return Result(outputs, list(torch.autograd.grad(reached, targets, weights, allow_unused=True)))


def cotangent(problem: Problem, position: int, output: torch.Tensor) -> torch.Tensor:
    """The same values for every precision: multiples of 1/8, which all of them hold."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{problem.item.op}|{position}".encode()))
    values = torch.randint(-16, 17, output.shape, generator=generator) / 8
    return values.to(output.device, output.dtype)


def eager(problem: Problem, seed: int = 0) -> Result:
    return evaluate(problem, lambda *tensors: problem.call(list(tensors)), seed)


def exact(problem: Problem, reference: Result) -> list[Any]:
    """Eager's values in float64; eager's own where the op has no float64 form of the same shapes."""
    for dtypes in (True, False):
        try:
            values = eager(widened(problem, dtypes)).values
        except Exception:  # any refusal of the wide dtype
            continue
        if _comparable(values, reference.values):
            return values
    return [v.to(_wide(v.dtype)) if isinstance(v, torch.Tensor) else v for v in reference.values]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype


def _comparable(wide: list[Any], narrow: list[Any]) -> bool:
    if len(wide) != len(narrow):
        return False
    pairs = [(w, n) for w, n in zip(wide, narrow, strict=True) if isinstance(n, torch.Tensor)]
    return all(isinstance(w, torch.Tensor) and w.shape == n.shape and w.is_complex() == n.is_complex() for w, n in pairs)


@dataclass
class Reference:
    """What eager makes of a problem: `kind` says how a compiled result is compared with it."""

    result: Result
    kind: str  # "values", "random" or "layout"
    exact: list[Any]

    @classmethod
    def of(cls, problem: Problem) -> Reference:
        """Raises what eager raises."""
        result = eager(problem)
        if problem.item.op in UNINITIALISED:
            return cls(result, "layout", [])
        if problem.item.op in RANDOM and not all(_same_values(result, eager(problem, seed)) for seed in (1, 2, 3)):
            return cls(result, "random", [])
        return cls(result, "values", exact(problem, result))


def _same_values(a: Result, b: Result) -> bool:
    pairs = list(zip(a.values, b.values, strict=True))
    return all(x is y or (isinstance(x, torch.Tensor) and x.shape == y.shape and x.equal(y)) for x, y in pairs)


@dataclass
class Verdict:
    """`reason` says what is wrong, None when nothing is. `strides`: outputs have eager's. `nudged`: right only by eager's

    error on inputs that differ in their last bit, because the result is a difference of much larger numbers.
    """

    reason: str | None
    strides: bool
    nudged: bool = False


def verdict(problem: Problem, reference: Reference, call: Callable[..., Any]) -> Verdict:
    """The compiled `call` judged by the rule of `reference.kind`. Raises what the call raises."""
    actual = evaluate(problem, call)
    strides = same_strides(actual.outputs, reference.result.outputs)
    try:
        _assert_right(problem, reference, actual, call)
    except AssertionError as error:
        reason = str(error).partition("\n")[0]
    else:
        return Verdict(None, strides)
    if reference.kind == "values" and _as_close_as_nudged(problem, reference, actual):
        return Verdict(None, strides, nudged=True)
    return Verdict(reason, strides)


def _assert_right(problem: Problem, reference: Reference, actual: Result, call: Callable[..., Any]) -> None:
    if reference.kind == "values":
        return assert_closer(actual.values, reference.result.values, reference.exact)
    _assert_same_layout(actual, reference.result)
    if reference.kind == "random":
        _assert_same_distribution(problem, call)
    return None


def _as_close_as_nudged(problem: Problem, reference: Reference, actual: Result) -> bool:
    """Whether eager, given inputs changed in their last bit, is as far from float64 as the compiled result is.

    Where a result is a small difference of large numbers, its size says nothing about the error that rounding must cause;
    this does. Every output is compared with the worst of a few such runs. Of a result that is nothing but rounding (a
    gradient that is zero in exact arithmetic) only smallness can be asked, next to the numbers that cancel.
    """
    if len(actual.values) != len(reference.exact):
        return False
    runs = [eager(nudged(problem, seed)).values for seed in range(NUDGES)]
    for k, (a, e, x) in enumerate(zip(actual.values, reference.result.values, reference.exact, strict=True)):
        if not isinstance(e, torch.Tensor) or not (e.is_floating_point() or e.is_complex()):
            if not (a is e or (isinstance(a, torch.Tensor) and a.shape == e.shape and a.equal(e))):
                return False
            continue
        if not isinstance(a, torch.Tensor) or (a.shape, a.dtype) != (e.shape, e.dtype):
            return False
        scale = magnitude([x])
        if scale <= 4 * max_error(e, x):  # eager has not one digit right
            scale = magnitude(reference.result.values, problem.tensors)
        worst = max(max_error(r[k], x) for r in (reference.result.values, *runs))
        if max_error(a, x) > 1.5 * worst + 4 * torch.finfo(e.dtype).eps * scale:
            return False
    return True


def magnitude(*values: list[Any]) -> float:
    """The largest finite absolute value in lists of tensors (and other things)."""
    tensors = [
        v.detach() for vs in values for v in vs if isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex())
    ]
    largest = [float(dense(t).abs().nan_to_num(posinf=0.0).max()) for t in tensors if t.numel()]
    return max(largest, default=0.0)


def nudged(problem: Problem, seed: int) -> Problem:
    """The problem with every floating input multiplied by 1 - eps, 1 or 1 + eps, element by element at random.

    Linear algebra promises no more than the exact result for an input some roundings away: there it is 8 eps.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = 8 if op_class(problem.op) == "library" else 1

    def nudge(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point() or x.layout != torch.strided:
            return x
        signs = torch.randint(-1, 2, x.shape, generator=generator).to(x.device, x.dtype)
        moved = fresh_copy(x).detach()
        return moved.mul_(1 + signs * steps * torch.finfo(x.dtype).eps).requires_grad_(x.requires_grad) if x.numel() else x

    return replace(problem, tensors=[nudge(t) for t in problem.tensors])


def _assert_same_layout(actual: Result, want: Result) -> None:
    assert len(actual.values) == len(want.values), "a different number of results"
    for k, (a, e) in enumerate(zip(actual.values, want.values, strict=True)):
        if isinstance(e, torch.Tensor):
            got, expected = (tuple(a.shape), a.dtype), (tuple(e.shape), e.dtype)
            assert got == expected, f"output {k}: {got} is not eager's {expected}"


def _assert_same_distribution(problem: Problem, call: Callable[..., Any]) -> None:
    """Means of tanh(values) (bounded, whatever the distribution's tails) differ by less than 6 standard errors.

    The error is that of the means of single calls, since the values of one call may depend on each other.
    """
    ours = [evaluate(problem, call, seed).outputs for seed in range(REPEATS)]
    theirs = [eager(problem, seed).outputs for seed in range(REPEATS)]
    for k in range(len(theirs[0])):
        if not isinstance(theirs[0][k], torch.Tensor) or theirs[0][k].is_complex() or not theirs[0][k].numel():
            continue
        a, b = (torch.stack([o[k].detach().double().tanh().mean() for o in runs]) for runs in (ours, theirs))
        error = ((a.var() + b.var()) / REPEATS).sqrt()
        distance = float((a.mean() - b.mean()).abs())
        assert distance <= 6 * float(error) + 1e-6, f"output {k}: mean {float(a.mean()):.4g}, eager's {float(b.mean()):.4g}"


def same_strides(actual: list[Any], want: list[Any]) -> bool:
    """Whether the tensors have equal strides wherever a stride matters."""
    for a, e in zip(actual, want, strict=False):
        if not isinstance(e, torch.Tensor) or e.layout != torch.strided or not e.numel() or a.shape != e.shape:
            continue
        if any(x != y for x, y, n in zip(a.stride(), e.stride(), e.shape, strict=True) if n != 1):
            return False
    return True
