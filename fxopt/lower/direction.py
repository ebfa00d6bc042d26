"""In which order the programs of a GPU's kernels take the elements: each from where the one before it has ended.

What was touched last is still in the L2 cache, and where that is smaller than the operands, the next kernel would only get
there when it is gone. It starts there instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeGuard

from fxopt.ir.region import Alias, Batch, Call, Region, Step, base_of, refs

FITS_IN_CACHE = 24 << 20
"""Bytes that the cache holds in any case; the L2 caches of data-centre GPUs have 40 MiB (A100) and more."""

WORTH_TURNING = 4 << 20
"""Bytes that two kernels share for the order to matter."""

SMALL = 1 << 20
"""Bytes; what touches less between two kernels leaves the cache as it was."""


def alternate(steps: Sequence[Step], nbytes: Mapping[str, int]) -> list[Step]:
    """`steps` with `Region.backwards` and `Region.reread` set. `nbytes` has the size of each buffer, aliases included."""
    out: list[Step] = []
    views = {s.name: s for s in steps if isinstance(s, Alias)}
    previous: int | None = None  # the last step before this one that touched much
    for step in steps:
        out.append(step)
        touched = _touched(step, views)
        if isinstance(step, Alias) or sum(nbytes.get(n, 0) for n in touched) < SMALL:
            continue
        if previous is not None:
            before = out[previous]
            known = _touched(before, views)
            shared = sum(nbytes.get(n, 0) for n in known & touched)
            if sum(nbytes.get(n, 0) for n in known) > FITS_IN_CACHE and shared > WORTH_TURNING:
                if _is_kernel(step):
                    out[-1] = replace(step, backwards=not (isinstance(before, Region) and before.backwards))
                if _is_kernel(before):
                    out[previous] = replace(before, reread=True)
        previous = len(out) - 1
    return out


def _is_kernel(step: Step) -> TypeGuard[Region]:
    return isinstance(step, Region) and step.device.type == "cuda"


def _touched(step: Step, views: Mapping[str, Alias]) -> set[str]:
    """Base buffers that `step` reads or writes."""
    match step:
        case Region() | Batch():
            names = {*step.reads(), *step.writes()}
        case Call():
            names = {*refs((step.args, step.kwargs)), *(n for n in step.outputs if n is not None), *step.writes}
        case Alias():
            names = set()
    return {base_of(n, views) for n in names}
