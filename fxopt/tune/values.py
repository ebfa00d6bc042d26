"""Whether ways to compute the same values do: each runs once on the same made-up data before any is timed.

Kernels are tested, but compilers are not: Triton 3.6 makes a convolution of 128 x 128 tiles on four warps, stored in two
halves, whose results are 8 % off on an H100, without a word and without a spilled register, where 64 rows, eight warps or
one half are right. So what is kept has shown the values of the library's way on this GPU, or those of the cost model's
first configuration where all ways are configurations of one kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch

from fxopt.ir.region import refs
from fxopt.tune.measure import BoundCall, Memory, Trial, assumed_sizes, bound_arguments, launched, made_up, strided, zeros
from fxopt.tune.suspects import Suspects

MOST_COMPARED = 1 << 22
"""Elements of a buffer that are compared, evenly spread."""

TOLERANCE = 1 / 16
"""Of an element's size plus the buffer's root mean square: several roundings of bfloat16, whichever way sums are ordered."""

MOST_APART = 0.01
"""Share of elements that may differ by more: where values jump, a rounding makes a few."""

log = logging.getLogger(__name__)
Sample = dict[str, torch.Tensor]


def unlike_the_first(memory: Memory, device: torch.device, trials: Sequence[Trial], suspects: Suspects) -> frozenset[str]:
    """Labels of the trials that leave other values than the first in a buffer that both write.

    What does not run is not among them, nor anything if the first does not. Nor is a trial that reads what the first does
    not know, as a weight that freezing has laid out or multiplied: its made-up values say nothing of the other's.
    The current device is `device`.
    """
    sizes = assumed_sizes(memory, trials)
    start = _sample(made_up(memory, device, sizes))
    expected: Sample | None = None
    wrong = set()
    for trial in trials:
        tensors = made_up(memory, device, sizes)
        if not _ran(trial, tensors, sizes, suspects):
            if expected is None:
                return frozenset()
            continue
        found = {name: value for name, value in _sample(tensors).items() if not _same_bits(value, start[name])}
        if expected is None:
            expected = found
        elif not _named(trial) - _named(trials[0]) - found.keys() and any(
            name in expected and not agree(value, expected[name]) for name, value in found.items()
        ):
            wrong.add(trial.label)
    return frozenset(wrong)


def _named(trial: Trial) -> set[str]:
    """The buffers that `trial` shares with others."""
    names: set[str] = set()
    for part in trial.parts:
        if isinstance(part, BoundCall):
            of = {v.name: v.of for v in part.views}
            used = (*refs((part.call.args, part.call.kwargs)), *filter(None, part.call.outputs))
            names |= {of.get(name, name) for name in used}
        else:
            names |= set(part[0].buffers)
    return names - {spec.name for spec in trial.scratch}


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype may be the same values, computed with other roundings."""
    if not expected.dtype.is_floating_point:
        return _share(found != expected) <= MOST_APART
    a, b = found.float(), expected.float()
    finite = a.isfinite() & b.isfinite()
    if _share(a.isfinite() != b.isfinite()) > MOST_APART:
        return False
    a, b = a[finite], b[finite]
    size = b.square().mean().sqrt()
    return _share((a - b).abs() > TOLERANCE * (b.abs() + size)) <= MOST_APART


def _share(apart: torch.Tensor) -> float:
    return float(apart.float().mean()) if apart.numel() else 0.0


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _sample(tensors: Mapping[str, torch.Tensor]) -> Sample:
    """Elements of each flat tensor: all, or every n-th with an odd n, which meets all columns of a tile."""
    return {name: t[:: (len(t) // MOST_COMPARED) | 1].clone() for name, t in tensors.items()}


def _ran(trial: Trial, tensors: dict[str, torch.Tensor], sizes: dict[str, int], suspects: Suspects) -> bool:
    """Whether all parts ran, each once, with results of library calls where the plan would have them."""
    memory = tensors | {spec.name: zeros(spec, sizes) for spec in trial.scratch}
    for part in trial.parts:
        if not isinstance(part, BoundCall):
            if launched(*part, memory, sizes, suspects) is None:
                return False
        elif not _called(part, memory, sizes):
            return False
    return True


def _called(bound: BoundCall, tensors: dict[str, torch.Tensor], sizes: dict[str, int]) -> bool:
    op, args, kwargs = bound_arguments(bound, tensors, sizes)
    try:
        results = op(*args, **kwargs)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.info("%s cannot be compared: %s", bound.call.op, error)
        return False
    results = results if isinstance(results, tuple | list) else [results]
    views = {v.name: v for v in bound.views}
    for name, value in zip_longest(bound.call.outputs, results):
        if name is not None and isinstance(value, torch.Tensor):
            strided(views.get(name), name, bound.buffers, tensors, sizes).copy_(value)
    return True
