"""A case: something to run, with its inputs, in a form that every contender and the float64 reference can share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

Tensors = tuple[torch.Tensor, ...]
FORWARD, BACKWARD = "forward", "backward"
PART_ELEMENTS = 1 << 26
"""As much of a tensor is compared with float64 at once."""


@dataclass
class Case:
    """`module` (module or function) is what gets compiled; it is called with `inputs`.

    With `training`, outputs are followed by the gradients of parameters and of inputs that require grad; `grad_output` is
    the gradient of a non-scalar output, or a tuple of those of the first few outputs. `random` says that results differ from
    call to call by design (dropout), so that there is no error to judge, unless `reference` is given: from one step's
    outputs, what float64 gives for the draws that they show. `reset` restores inputs that the call changes in place.
    `state` are tensors that the call changes and does not return; they count as outputs. `alternatives` make this case in
    implementations other than torch's, by name.

    `traffic` are the bytes that forward and backward must move, where they do not follow from inputs and outputs (see
    `bytes_moved`); `backward_reads` are the positions of inputs that the backward needs, None for all of them.
    """

    module: Callable[..., Any]
    inputs: tuple[Any, ...]
    training: bool = False
    grad_output: torch.Tensor | Tensors | None = None
    random: bool = False
    reset: Callable[[], None] | None = None
    reference: Callable[[Tensors], Tensors] | None = None
    state: Tensors = ()
    alternatives: Mapping[str, Callable[[], Case]] = field(default_factory=dict)
    traffic: Mapping[str, int] | None = None
    backward_reads: tuple[int, ...] | None = None

    def drive(self, compiled: Callable[..., Any]) -> Tensors:
        """One step of `compiled` (some compilation of `module`): its output tensors, and gradients when training."""
        if not self.training:
            with torch.no_grad():
                return (*tensors_of(compiled(*self.inputs)), *(t.detach() for t in self.state))
        outputs = tensors_of(compiled(*self.inputs))
        return (*(o.detach() for o in outputs), *self._gradients(outputs))

    def passes(self, compiled: Callable[..., Any]) -> dict[str, Callable[[], Tensors]]:
        """Forward and, when training, backward of `compiled`, each alone; the backward runs again and again over one graph.

        The graph, and with it what the forward saved, lives as long as the result.
        """
        if not self.training:
            return {FORWARD: lambda: self.drive(compiled)}
        outputs = tensors_of(compiled(*self.inputs))
        return {
            FORWARD: lambda: tensors_of(compiled(*self.inputs)),
            BACKWARD: lambda: self._gradients(outputs, retain_graph=True),
        }

    def bytes_moved(self, outputs: Tensors) -> dict[str, int]:
        """Bytes that each pass must move: inputs and a module's parameters and buffers read once, outputs written once.

        `outputs` are what `drive` returned. The backward's inputs are the gradient and `backward_reads`: values saved by the
        forward stand for inputs of their size. A tensor returned twice (a residual's gradient) is written once.
        """
        if self.traffic is not None:
            return dict(self.traffic)
        inputs, held = tensors_of(self.inputs), self._held()
        if not self.training:
            return {FORWARD: _nbytes((*inputs, *held, *outputs))}
        own, gradients = outputs[: -len(self._leaves())], outputs[-len(self._leaves()) :]
        read = inputs if self.backward_reads is None else tuple(inputs[i] for i in self.backward_reads)
        seeds = tensors_of(self.grad_output)
        return {FORWARD: _nbytes((*inputs, *held, *own)), BACKWARD: _nbytes((*read, *held, *seeds, *gradients))}

    def _held(self) -> Tensors:
        """What belongs to the module."""
        if not isinstance(self.module, torch.nn.Module):
            return ()
        return (*self.module.parameters(), *self.module.buffers())

    def _gradients(self, outputs: Tensors, retain_graph: bool = False) -> Tensors:
        seeds = self._seeds()
        return torch.autograd.grad(outputs[: len(seeds)], self._leaves(), seeds, retain_graph=retain_graph)

    def _leaves(self) -> list[torch.Tensor]:
        own = list(self.module.parameters()) if isinstance(self.module, torch.nn.Module) else []
        return [t for t in (*own, *tensors_of(self.inputs)) if t.requires_grad]

    def _seeds(self) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the first outputs; None for a scalar's, which is one."""
        return self.grad_output if isinstance(self.grad_output, tuple) else (self.grad_output,)

    def exact(self) -> Tensors | None:
        """What float64 gives for the same weights and inputs; None for a random case."""
        if self.random:
            return None
        module = copy.deepcopy(self.module).double() if isinstance(self.module, torch.nn.Module) else self.module
        wide = Case(module, widened(self.inputs), self.training, widened(self.grad_output))
        return wide.drive(module)


def _nbytes(tensors: Tensors) -> int:
    """Bytes of the distinct ones among `tensors`."""
    return sum({(t.data_ptr(), t.shape): t.numel() * t.itemsize for t in tensors}.values())


def tensors_of(tree: Any) -> Tensors:
    leaves: list[Any] = pytree.tree_leaves(tree)
    return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def widened(tree: Any) -> Any:
    """`tree` with float64 copies of its floating-point tensors and copies of its others."""
    return pytree.tree_map(_widen, tree)


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
        difference = max(_distance(*parts) for parts in zip(_parts(a.detach()), _parts(x), strict=True))
        worst = max(worst, difference / ((scale if scale > 1e-9 * widest else widest) or 1.0))
    return worst


def _distance(actual: torch.Tensor, exact: torch.Tensor) -> float:
    difference = (actual.to(torch.float64) - exact).abs()
    agree = (actual == exact) | (actual.isnan() & exact.isnan())
    return float(torch.where(agree, 0.0, difference).nan_to_num(nan=float("inf")).max())


def _scale(exact: torch.Tensor) -> float:
    if not exact.is_floating_point() or not exact.numel():
        return 0.0
    return max(float(torch.where(part.isfinite(), part.abs(), 0.0).max()) for part in _parts(exact))


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of at most about PART_ELEMENTS along the longest dimension: float64 temporaries of a whole GiB of bfloat16 take
    four each."""
    if tensor.numel() <= PART_ELEMENTS:
        return (tensor,)
    longest = max(range(tensor.dim()), key=lambda d: tensor.shape[d])
    return tensor.split(max(1, tensor.shape[longest] * PART_ELEMENTS // tensor.numel()), longest)
