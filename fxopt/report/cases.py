"""A case: something to run, with its inputs, in a form that every contender and the float64 reference can share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

Tensors = tuple[torch.Tensor, ...]


@dataclass
class Case:
    """`module` (module or function) is what gets compiled; it is called with `inputs`.

    With `training`, outputs are followed by the gradients of parameters and of inputs that require grad; `grad_output` is
    the gradient of a non-scalar output. `random` says that results differ from call to call by design (dropout), so that
    there is no error to judge. `reset` restores inputs that the call changes in place.
    """

    module: Callable[..., Any]
    inputs: tuple[Any, ...]
    training: bool = False
    grad_output: torch.Tensor | None = None
    random: bool = False
    reset: Callable[[], None] | None = None

    def drive(self, compiled: Callable[..., Any]) -> Tensors:
        """One step of `compiled` (some compilation of `module`): its output tensors, and gradients when training."""
        if not self.training:
            with torch.no_grad():
                return tensors_of(compiled(*self.inputs))
        outputs = tensors_of(compiled(*self.inputs))
        gradients = torch.autograd.grad(outputs[:1], self._leaves(), self._seed(outputs[0]))
        return (*(o.detach() for o in outputs), *gradients)

    def _leaves(self) -> list[torch.Tensor]:
        own = list(self.module.parameters()) if isinstance(self.module, torch.nn.Module) else []
        return [t for t in (*own, *tensors_of(self.inputs)) if t.requires_grad]

    def _seed(self, output: torch.Tensor) -> list[torch.Tensor | None]:
        return [None if output.dim() == 0 else self.grad_output]

    def exact(self) -> Tensors | None:
        """What float64 gives for the same weights and inputs; None for a random case."""
        if self.random:
            return None
        module = copy.deepcopy(self.module).double() if isinstance(self.module, torch.nn.Module) else self.module
        grad = None if self.grad_output is None else self.grad_output.double()
        wide = Case(module, pytree.tree_map(_widen, self.inputs), self.training, grad)
        return wide.drive(module)


def tensors_of(tree: Any) -> Tensors:
    leaves: list[Any] = pytree.tree_leaves(tree)
    return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def _widen(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    copied = leaf.detach().to(torch.float64) if leaf.is_floating_point() else leaf.detach().clone()
    return copied.requires_grad_(leaf.requires_grad)


def relative_error(actual: Tensors, exact: Tensors) -> float:
    """Largest over all outputs of max |actual - exact| / max |exact|; infinite where only one side is NaN or infinite.

    A tensor that is zero but for float64's own rounding (the gradient of a bias before a softmax, say) has no scale of its
    own and is judged by the largest of the others.
    """
    scales = [_scale(x) for x in exact]
    widest = max(scales, default=0.0)
    worst = 0.0
    for a, x, scale in zip(actual, exact, scales, strict=True):
        if not a.is_floating_point() or not a.numel():
            continue
        difference = (a.detach().to(torch.float64) - x).abs()
        difference = torch.where((a == x) | (a.isnan() & x.isnan()), 0.0, difference).nan_to_num(nan=float("inf"))
        worst = max(worst, float(difference.max()) / ((scale if scale > 1e-9 * widest else widest) or 1.0))
    return worst


def _scale(exact: torch.Tensor) -> float:
    finite = exact[exact.isfinite()].abs() if exact.is_floating_point() else exact.new_empty(0)
    return float(finite.max()) if finite.numel() else 0.0
