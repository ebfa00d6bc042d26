"""Which steps of a schedule read and write which buffers, and which of them only copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from fxopt.ir.region import Alias, Alternatives, Call, Ref, Region, Step, base_of, refs
from fxopt.lower.copies import Copy, copies_of
from fxopt.lower.lowering import Lowered

OUTSIDE = -1
"""The reader of what the graph returns, and of its inputs, which it may write."""


class Uses:
    """Of a schedule: its `buffers` and `views` by name, the `readers` of each buffer (steps by number, OUTSIDE among them),
    and `copies` by their targets, which nothing else is written to, each with the number of the step that makes it and does
    nothing but copy."""

    def __init__(self, lowered: Lowered) -> None:
        self.steps, self.buffers = lowered.steps, lowered.buffers
        self.views = {s.name: s for s in lowered.steps if isinstance(s, Alias)}
        self.copies: dict[str, tuple[int, Copy]] = {}
        returned = (base_of(o.name, self.views) for o in lowered.outputs if isinstance(o, Ref))
        self.readers: dict[str, list[int]] = {name: [OUTSIDE] for name in (*returned, *lowered.inputs)}
        writes = Counter(name for step in lowered.steps for name in self._writes(step))
        for k, step in enumerate(lowered.steps):
            if isinstance(step, Region):
                self.copies |= {c.target: (k, c) for c in copies_of(step) or () if writes[c.target] == 1}
            for name in self._reads(step):
                self.readers.setdefault(name, []).append(k)

    def only_reader(self, name: str) -> int | None:
        """The one step that reads `name`, which is not returned either."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0] != OUTSIDE else None

    def reads(self, k: int) -> set[str]:
        """The buffers that step k reads, views looked through."""
        return self._reads(self.steps[k])

    def writes(self, k: int) -> set[str]:
        """The buffers that step k writes, views looked through."""
        return self._writes(self.steps[k])

    def is_for(self, k: int, parts: Sequence[int]) -> bool:
        """Whether all that step k, a region, writes is read by `parts` alone, or it is the last of them."""
        step = self.steps[k]
        made = step.writes() if isinstance(step, Region) else ()
        return k == parts[-1] or all(set(self.readers.get(n, ())) <= set(parts) for n in made)

    def is_written_over(self, k: int, parts: Sequence[int]) -> bool:
        """Whether a step that is not one of `parts` writes what step k reads, from that on to the last of `parts`, where it
        will be read."""
        read, between = self._reads(self.steps[k]), range(k, parts[-1])
        return any(self._writes(self.steps[i]) & read for i in between if i not in parts)

    def _reads(self, step: Step) -> set[str]:
        if isinstance(step, Alternatives):
            return {name for way in step.ways for own in way.steps for name in self._reads(own)}
        if isinstance(step, Call):
            return self._bases(refs((step.args, step.kwargs)))
        return set() if isinstance(step, Alias) else self._bases(step.reads())

    def _writes(self, step: Step) -> set[str]:
        if isinstance(step, Alternatives):
            return {name for way in step.ways for own in way.steps for name in self._writes(own)}
        if isinstance(step, Call):
            made = (name for name in step.outputs if name is not None)
            return self._bases((*step.writes, *made))
        return set() if isinstance(step, Alias) else self._bases(step.writes())

    def _bases(self, names: Iterable[str]) -> set[str]:
        return {base_of(n, self.views) for n in names}
