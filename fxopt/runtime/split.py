"""A plan in parts, each a plan of its own: up to three around what is captured, or a row of any number.

Values that pass from one part to a later one are results of the one and inputs of the other. Views are not passed: every
part makes those that it uses. Inputs that tell sizes are given to every part that needs these.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxopt.ir.exprs import Int, free_symbols
from fxopt.ir.graph import Role
from fxopt.ir.region import Alias, BufferSpec, Call, Ref, refs
from fxopt.runtime.encoding import size_values
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import InputSpec, Launch, Plan, PlanStep, defined, expressions, used


@dataclass(frozen=True)
class Part:
    """A plan, and where its inputs are found: `takes` are positions among the inputs of the whole plan, `given` in number,
    followed by the results of the parts before this one."""

    plan: Plan
    takes: tuple[int, ...]
    given: int


@dataclass(frozen=True)
class Parts:
    """Parts that do what the whole plan does, in this order; the results of the last are the plan's.

    `lent` are positions among the results of `captured`: values that `after` only reads, and of which nothing remains when
    it has run. They may be left where a captured run has them. `direct` are results of the plan, by position, that
    `captured` gives, at another position; `after` gives None for them.
    """

    before: Part | None
    captured: Part
    after: Part | None
    lent: frozenset[int]
    direct: tuple[tuple[int, int], ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether nothing runs plainly."""
        return self.before is None and self.after is None


class Mentions:
    """Which steps of a plan mention what: `steps` are those that run something, `first` and `last` say for each name that is
    no view at which of them it, or a view of it, is mentioned; `len(steps)` stands for the results. `root` is what a view is
    of. `returned` are the values whose memory is in a result."""

    def __init__(self, plan: Plan) -> None:
        self.steps: list[Launch | Call] = [s for s in plan.steps if isinstance(s, Launch | Call)]
        self.aliases = {s.name: s for s in plan.steps if isinstance(s, Alias)}
        self.root: dict[str, str] = {}
        for alias in self.aliases.values():
            self.root[alias.name] = self.root.get(alias.of, alias.of)
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        for k, step in enumerate(self.steps):
            for name in (*used(step), *defined(step)):
                owner = self.root.get(name, name)
                self.first.setdefault(owner, k)
                self.last[owner] = k
        self.returned = {self.root.get(n, n) for n in refs(plan.outputs)}
        for name in self.returned:
            self.first.setdefault(name, len(self.steps))
            self.last[name] = len(self.steps)
        given = {x.name for x in plan.inputs} | {x.name for x in plan.constants}
        self.made = [name for name in self.first if name not in given]

    def crossing(self, begin: int, cut: int) -> list[str]:
        """The values that steps from `begin` on make and that are mentioned at `cut` or later."""
        return [n for n in self.made if begin <= self.first[n] < cut <= self.last[n]]


def split(plan: Plan, begin: int, end: int | None, lends: bool, left: Collection[str] = ()) -> Parts:
    """`plan` in parts: its steps (those that run something) from `begin` to before `end` are captured. With None for `end`
    that part has the plan's results, else one after it does.

    With `lends` the part after it may read values in the memory of a captured run: none of its steps keeps or returns what
    it is given. `left` are values made in the captured part, by the names of their memory, that the plan saves for a
    backward and returns as nothing else: what is saved of them are that part's last results, and the plan's at once. Raises
    KeyError when a value that passes between parts is not described in `plan.buffers`.
    """
    found = Mentions(plan)
    writer = _Writer(plan, found)
    values = [x.name for x in plan.inputs]
    before = None
    if begin:
        passed = found.crossing(0, begin)
        before = writer.part(values, found.steps[:begin], [Ref(n) for n in passed])
        values += passed
    if end is None:
        return Parts(before, writer.part(values, found.steps[begin:], plan.outputs, plan.saved), None, frozenset())
    passed = found.crossing(begin, end)
    lent = [n for n in passed if lends and n not in found.returned]
    kept = [n for n in passed if n not in lent and n not in left]
    read = {found.root.get(n, n) for step in found.steps[end:] for n in used(step)}
    saved = [n for n in passed if n in left and n in read]
    order = [*kept, *lent, *saved]
    direct = [at for at, out in enumerate(plan.outputs) if any(found.root.get(n, n) in left for n in refs(out))]
    results = [*(Ref(n) for n in order), *(plan.outputs[at] for at in direct)]
    captured = writer.part(values, found.steps[begin:end], results, len(saved) + len(direct))
    rest = [None if at in direct else out for at, out in enumerate(plan.outputs)]
    after = writer.part([*values, *order], found.steps[end:], rest)
    places = frozenset(range(len(kept), len(kept) + len(lent)))
    return Parts(before, captured, after, places, tuple((at, len(order) + k) for k, at in enumerate(direct)))


def row(plan: Plan, cuts: Sequence[int]) -> tuple[Part, ...]:
    """`plan` in parts that do what it does one after another, one more than there are `cuts`: numbers of the steps (those
    that run something) at which parts begin, in order.

    The last part has the plan's results, and may have no steps. Raises KeyError as `split` does.
    """
    found = Mentions(plan)
    writer = _Writer(plan, found)
    values = [x.name for x in plan.inputs]
    parts, begin = [], 0
    for cut in cuts:
        passed = found.crossing(begin, cut)
        parts.append(writer.part(values, found.steps[begin:cut], [Ref(n) for n in passed]))
        values += passed
        begin = cut
    return (*parts, writer.part(values, found.steps[begin:], plan.outputs))


def with_steps(plan: Plan, steps: Sequence[PlanStep]) -> Plan:
    """`plan` with these steps that run something in the place of its own, and without a memory plan. Views are made where
    they are first used."""
    views = _Writer(plan, Mentions(plan)).with_views(steps, plan.outputs)
    return replace(plan, steps=views, slots=(), placement={}, offsets={})


class _Writer:
    """Writes parts of one plan."""

    def __init__(self, plan: Plan, found: Mentions) -> None:
        self.plan, self.found = plan, found
        self.specs = {b.name: b for b in plan.buffers}
        self.inputs = {x.name: x for x in plan.inputs}
        self.constants = {x.name for x in plan.constants}

    def part(self, values: Sequence[str], steps: Sequence[PlanStep], outputs: Sequence[Any], saved: int = 0) -> Part:
        """A plan of `steps` with these outputs, the last `saved` of them for a backward; `values` are the names of what
        exists before."""
        written = self.with_views(steps, outputs)
        mentioned = {n for step in written for n in (*used(step), *defined(step))} | set(refs(tuple(outputs)))
        buffers = tuple(b for b in self.plan.buffers if b.name in mentioned.difference(values))
        symbols = _symbols(buffers, written, outputs)
        sources = [source for source in self.plan.symbols if source.name in symbols]
        telling = {source.input for source in sources}  # the first of the values are the plan's inputs
        takes = tuple(i for i, name in enumerate(values) if name in mentioned or i in telling)
        part = replace(
            self.plan,
            inputs=tuple(self._input(values[i]) for i in takes),
            constants=tuple(c for c in self.plan.constants if c.name in mentioned),
            symbols=tuple(replace(source, input=takes.index(source.input)) for source in sources),
            buffers=buffers,
            steps=written,
            outputs=tuple(outputs),
            saved=saved,
        )
        return Part(plan_memory(part), takes, len(self.plan.inputs))

    def with_views(self, steps: Sequence[PlanStep], outputs: Sequence[Any]) -> tuple[PlanStep, ...]:
        """`steps`, each view made before the first step that uses it."""
        out: list[PlanStep] = []
        there: set[str] = set()

        def make(name: str) -> None:
            alias = self.found.aliases.get(name)
            if alias is not None and name not in there:
                there.add(name)
                make(alias.of)
                out.append(alias)

        for step in steps:
            for name in used(step):
                make(name)
            out.append(step)
        for name in refs(tuple(outputs)):
            make(name)
        return tuple(out)

    def _input(self, name: str) -> InputSpec:
        if name in self.inputs:
            return self.inputs[name]
        spec = self.specs[name]
        return InputSpec(name, "tensor", Role.USER, spec.dtype, spec.device, spec.shape, spec.strides)


def _symbols(buffers: Sequence[BufferSpec], steps: Sequence[PlanStep], outputs: Sequence[Any]) -> set[str]:
    """The names of the size symbols whose values a part needs."""
    found: list[Int] = [n for b in buffers for n in (*b.shape, *b.strides)]
    found += [n for step in steps for n in expressions(step)]
    found += size_values(tuple(outputs))
    return {symbol.name for n in found for symbol in free_symbols(n)}
