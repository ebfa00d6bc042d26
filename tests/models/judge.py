"""One model in one mode: run eagerly, compiled by fxopt, and in float64; outputs, gradients and buffers compared.

A gradient whose exact value is zero (of a key's bias, say) or nearly so is nothing but rounding noise, in eager mode too,
and one run tells little about the size of noise. So a result that one run of eager beats is judged again by the largest
error of several eager runs whose inputs and parameters differ in their last bits, each against its own float64 run; and the
scale of a gradient is that of all gradients of its module, since the terms that cancel out in a bias's are its weight's.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxopt.journal import RECENT, Journal
from tests.numerics import max_error, to_float64

MODES = ("no_grad", "eval", "train", "autocast", "train-autocast", "freeze", "dynamic", "train-dynamic")
NUDGES = 6
FACTOR, K = 1.5, 4.0
ROUNDING = torch.finfo(torch.bfloat16).eps / 2
"""Relative error of one rounding to the type of autocast: a gradient in float32 has been through it."""

Inputs = dict[str, Any]
Named = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """A model and its keyword inputs; `more` has inputs of other sizes, for the dynamic modes."""

    module: nn.Module
    inputs: Inputs
    more: tuple[Inputs, ...] = ()


def moved(problem: Problem, device: torch.device | str) -> Problem:
    """The problem with its module and all its tensors on `device`."""

    def move(leaf: Any) -> Any:
        return leaf.detach().to(device).requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf

    inputs, *more = (pytree.tree_map(move, given) for given in (problem.inputs, *problem.more))
    return Problem(problem.module.to(device), inputs, tuple(more))


def device_of(inputs: Inputs) -> torch.device:
    """Where the model runs."""
    return next(leaf.device for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor))


@dataclass
class Record:
    """What came out. `status`: right, wrong, error, torch (AOTAutograd alone gets it wrong too, without fxopt), or crash;
    `worst`: the largest error, as a share of the error allowed.
    """

    status: str = "right"
    why: str = ""
    worst: float = 0.0
    graphs: int = 0
    kernels: int = 0
    library: int = 0
    seconds: float = 0.0
    retreats: list[tuple[str, str]] = field(default_factory=list)


class Widened(TorchFunctionMode):
    """Runs a float32 model's code in float64: casts to float32 go to float64, random values are float32's, widened."""

    RANDOM = (torch.rand_like, torch.randn_like, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.RANDOM:
            return func(*args, **{**(kwargs or {}), "dtype": torch.float32}).double()
        widen = {torch.float32: torch.float64, torch.bfloat16: torch.float64}
        args, kwargs = pytree.tree_map(lambda x: widen.get(x, x) if isinstance(x, torch.dtype) else x, (args, kwargs or {}))
        return func(*args, **kwargs) if func is not torch.Tensor.float else torch.Tensor.double(*args, **kwargs)


def judge(problem: Problem, mode: str) -> Record:
    """Compile and run `problem` in `mode` (one of MODES) and compare. Does not raise for a result or a failure of fxopt."""
    torch.compiler.reset()
    RECENT.clear()
    record = Record()
    start = time.perf_counter()
    try:
        with torch._dynamo.config.patch(allow_rnn=True):  # without it, Dynamo leaves nn.LSTM and nn.GRU out
            _compare(problem, mode, record)
    except Exception as error:
        record.status, record.why = "error", f"{type(error).__name__}: {error}".strip()[:600]
    journals = [j for j in RECENT if j.graph.startswith("graph ")]
    record.seconds = round(time.perf_counter() - start, 1)
    _summarize(journals, record)
    record.retreats = [r for j in RECENT for r in j.retreats]
    return record


def _summarize(journals: list[Journal], record: Record) -> None:
    record.graphs, record.kernels = len(journals), sum(len(j.kernels) for j in journals)
    record.library = sum(len(j.library) for j in journals)


def _compare(problem: Problem, mode: str, record: Record) -> None:
    # Random numbers are eager's own, so that they can be compared.
    options: Any = {"fallback_random": True, "freeze": mode == "freeze"}
    _compare_with(problem, mode, record, backend="fxopt", options=options)
    if record.status == "wrong":
        torch.compiler.reset()
        alone = Record()
        _compare_with(problem, mode, alone, backend="aot_eager")
        record.status = "torch" if alone.status == "wrong" else "wrong"


def _compare_with(problem: Problem, mode: str, record: Record, **compile_arguments: Any) -> None:
    module = copy.deepcopy(problem.module)
    dynamic = True if mode.endswith("dynamic") else None
    compiled = torch.compile(module, dynamic=dynamic, **compile_arguments)
    _prepare(module, mode)
    for inputs in (problem.inputs, *(problem.more if dynamic else ())):
        state = copy.deepcopy(module.state_dict())
        actual = run(compiled, inputs, mode)
        replay = copy.deepcopy(problem.module)
        replay.load_state_dict(state)
        _weigh(replay, inputs, mode, actual, record)
    if mode == "no_grad":  # once more: nothing that the first call left behind may change the second
        _weigh(replay, inputs, mode, run(compiled, inputs, mode), record)


def _weigh(module: nn.Module, inputs: Inputs, mode: str, actual: Named, record: Record) -> None:
    """Compare `actual` with eager, enter the worst ratio."""
    eager, exact = _pair(module, inputs, mode)
    if actual.keys() != eager.keys():
        raise AssertionError(f"results {sorted(actual)} are not eager's {sorted(eager)}")
    errors = {name: max_error(eager[name], exact[name]) for name in eager}
    noise = _noise(eager, exact, mode)
    suspects = [name for name in eager if _ratio(actual[name], eager[name], exact[name], errors[name], noise[name]) > 1]
    if suspects:
        for seed in range(NUDGES):
            nudged, narrow_exact = _pair(_nudged(module, seed), _nudged(inputs, seed), mode)
            errors = {name: max(errors[name], max_error(nudged[name], narrow_exact[name])) for name in eager}
    ratios = {name: _ratio(actual[name], eager[name], exact[name], errors[name], noise[name]) for name in eager}
    name = max(ratios, key=lambda n: ratios[n])
    record.worst = round(max(record.worst, ratios[name]), 3)
    if ratios[name] > 1:
        record.status = "wrong"
        error, wrong = max_error(actual[name], exact[name]), sum(r > 1 for r in ratios.values())
        compared = f"error {error:.3e}, eager's {errors[name]:.3e}, noise {noise[name]:.3e}"
        record.why = f"{wrong} of {len(ratios)}: {name}: {compared}"


def _noise(eager: Named, exact: Named, mode: str) -> dict[str, float]:
    """What each result may be off beside eager's error: K units in the last place of the largest magnitude.

    For a gradient that is the largest of all gradients of its module. Under autocast it is one rounding at least.
    """
    own = {name: float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0 for name, x in exact.items()}
    scales: dict[str, float] = {}
    for name, scale in own.items():
        scales[_module(name)] = max(scales.get(_module(name), 0.0), scale)
    least = ROUNDING if mode.endswith("autocast") else 0.0
    floating = {name: K * torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0 for name, x in eager.items()}
    return {name: max(floating[name] * scales[_module(name)], least * scale) for name, scale in own.items()}


def _module(name: str) -> str:
    return name.rpartition(".")[0] if name.startswith("gradient ") and "." in name else name


def _ratio(actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, eager_error: float, noise: float) -> float:
    """Error over what is allowed; infinite where shape, dtype or device differ, or integers do."""
    if (actual.shape, actual.dtype, actual.device) != (eager.shape, eager.dtype, eager.device):
        return float("inf")
    if not actual.is_floating_point():
        return 0.0 if torch.equal(actual, eager) else float("inf")
    allowed = FACTOR * eager_error + noise
    error = max_error(actual, exact)
    return error / allowed if allowed else (float("inf") if error else 0.0)


def _pair(module: nn.Module, inputs: Inputs, mode: str) -> tuple[Named, Named]:
    """Eager's results, and those of float64."""
    wide, wide_inputs = to_float64(module), to_float64(inputs)
    narrow = copy.deepcopy(module)
    _prepare(narrow, mode)
    _prepare(wide, mode)
    with Widened():
        exact = run(wide, wide_inputs, mode.removesuffix("autocast").rstrip("-") or "no_grad")
    return run(narrow, inputs, mode), exact


def _prepare(module: nn.Module, mode: str) -> None:
    module.train(mode.startswith("train"))


def _nudged(value: Any, seed: int) -> Any:
    """A copy of `value` (module or inputs), its floating tensors changed by at most one unit in the last place."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        step = torch.randint(-1, 2, leaf.shape, generator=generator) * torch.finfo(leaf.dtype).eps
        return (leaf.detach() * (1 + step.to(leaf.device, leaf.dtype))).requires_grad_(leaf.requires_grad)

    if not isinstance(value, nn.Module):
        return pytree.tree_map(nudge, value)
    module = copy.deepcopy(value)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(nudge(parameter))
    return module


def run(module: Callable[..., Any], inputs: Inputs, mode: str) -> Named:
    """Outputs by position, the buffers of the module afterwards, and in training gradients by name.

    The loss is the model's own where it has one, else a weighted sum of its outputs.
    """
    torch.manual_seed(0)
    inputs = pytree.tree_map(_detached, inputs)
    with _context(mode, device_of(inputs)):
        leaves, loss = _outputs(module(**inputs))
    named = {f"output {k}": leaf.detach() for k, leaf in enumerate(leaves)}
    original = getattr(module, "_orig_mod", module)
    named |= {f"buffer {name}": buffer.detach().clone() for name, buffer in original.named_buffers()}
    if mode.startswith("train"):
        named |= _gradients(leaves if loss is None else [loss], original, inputs)
    return named


def _detached(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf


def _outputs(result: Any) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return leaves, getattr(result, "loss", None)


def _gradients(ends: list[torch.Tensor], module: nn.Module, inputs: Inputs) -> Named:
    ends = [t for t in ends if t.requires_grad]
    wanted = dict(module.named_parameters())
    wanted |= {f"input {name}": t for name, t in inputs.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    wanted = {name: t for name, t in wanted.items() if t.requires_grad}
    weights = [torch.linspace(0.5, 1.5, t.numel()).to(t).view(t.shape) for t in ends]
    found = torch.autograd.grad(ends, list(wanted.values()), weights, allow_unused=True)
    return {f"gradient {name}": g for name, g in zip(wanted, found, strict=True) if g is not None}


@contextlib.contextmanager
def _context(mode: str, device: torch.device) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if not mode.startswith("train") and mode != "eval":
            stack.enter_context(torch.no_grad())
        if mode.endswith("autocast"):
            stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
        yield
