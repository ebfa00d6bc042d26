"""One way to run a region, printed and not yet compiled."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import BufferSpec


@dataclass(frozen=True)
class Candidate:
    """One way to run a region: kernels in order, with scratch buffers that they share. `label` names the configuration."""

    label: str
    sources: tuple[KernelSource, ...]
    scratch: tuple[BufferSpec, ...] = ()

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for candidates that run the same code on the same sizes, on whatever buffers."""
        return tuple((s.text, repr(s.compile_options), sizes_text(s)) for s in self.sources)


def sizes_text(source: KernelSource) -> str:
    """Grid and sizes. A size that is a number is the key of a random op, which does not change what the kernel costs."""
    return repr([*source.grid, *(x for x in source.sizes if not isinstance(x, int))])
