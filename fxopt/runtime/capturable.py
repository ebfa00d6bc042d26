"""Which plans may run as a CUDA graph, decided from the plan alone.

A captured run repeats what the device did; whatever the host did in it happened once. So everything that a plan does must
happen on one GPU, at addresses and with numbers that are either the same in every call or given to the captured run anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.ir.attention_op import attention_backward
from fxopt.ir.exprs import Int
from fxopt.ir.graph import Role
from fxopt.ir.ops import calls_cublas
from fxopt.ir.region import BufferSpec, Call, Ref, refs
from fxopt.runtime import draws
from fxopt.runtime.footprint import footprint
from fxopt.runtime.lifetimes import Lifetimes, nbytes, only_writes, returns_fresh
from fxopt.runtime.plan import InputSpec, Launch, Plan, defined, used
from fxopt.runtime.split import Mentions, Part, Parts, row, split

CAPTURED = "captured at the second call with the same sizes and addresses of weights"

MIN_STEPS = 6
"""Below that, a replay with its copies takes the host about as long as the launches do."""
STEP_SECONDS = 5e-6
"""Host time that a replay saves for each step."""
COPY_BYTES_PER_SECOND = 1.3e12
"""Bytes that a GPU copies in a second; about half of the rate at which an H100 reads and writes."""
COPY_SHARE = 1 / 32
"""How much of the host time saved may go into copies: what a replay may lose where the GPU, not the host, was the slower."""
PART_SECONDS = 1e-5
"""Host time that a part of its own takes, beside its steps."""
PIECE_STEPS = MIN_STEPS + 2 * round(PART_SECONDS / STEP_SECONDS)
"""Steps from which on a captured part among several is worth its own time and that of the plain part beside it."""

_TRUSTED = frozenset({"aten", "prims", "fxopt", "mkldnn"})
"""Namespaces of ops that do nothing on the host that a replay would have to repeat, those below excepted."""
_WAITING = frozenset({"linear_cross_entropy", "linear_cross_entropy_backward", "_local_scalar_dense", "item", "nonzero"})
"""Ops that wait for the device to read a value."""
_SEEDED_WITHOUT_DROPOUT = "attention"
"""Ops with this in their names are tagged as random although they draw nothing without dropout."""
_DROPPING = frozenset({"_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"})
"""Of these, those that leave the state of torch's generator, by which they drop, in the GPU's memory for their backward,
whether they are captured or not. With others, capture fails."""
_DROPPING_ON_THE_HOST = "_scaled_dot_product_efficient_attention"
"""Leaves it there only when it is captured, and its backward reads it there only when that is captured, too: a captured
forward and a plain backward do not fit together."""

_ATTENTION, _ATTENTION_BACKWARD = "fxopt::attention_forward.default", "fxopt::attention_backward.default"
_NUMBER_AMONG_ARGUMENTS = [argument.name for argument in attention_backward._schema.arguments].index("number")
_NUMBER_AMONG_RESULTS = 2


@dataclass(frozen=True)
class Traits:
    """What a captured run has to know of a plan. Numbers are positions among the inputs, and further on among what parts
    before the captured one have made (`split.Part.takes`).

    `moved` are copied into memory of the run before each replay, `fixed` are used where they are; `written` of those are
    changed by the plan. `varying`, of the inputs alone, tell the sizes of a call. `seeds` are drawn in a call; `steps` run
    something. `draws` says that library ops draw from torch's generator, too. `peak` are the bytes that a call holds, as far
    as that is known, and `products` says whether it calls cuBLAS.
    """

    device: torch.device
    moved: tuple[int, ...]
    fixed: tuple[int, ...]
    written: tuple[int, ...]
    varying: tuple[int, ...]
    seeds: int
    steps: int
    draws: bool = False
    peak: int = 0
    products: bool = False


def gpu(plan: Plan) -> torch.device | None:
    """The GPU that the plan launches kernels on or calls ops for; None for a plan of CPUs alone."""
    return next((d for d in _devices(plan) if d.type == "cuda"), None)


@dataclass(frozen=True)
class Choice:
    """What of a plan is to run as a CUDA graph, and what the journal says of that."""

    parts: Parts
    note: str


@dataclass(frozen=True)
class Piece:
    """A part of a plan, and what of that is captured: None where it runs plainly."""

    part: Part
    choice: Choice | None


@dataclass(frozen=True)
class Pieces:
    """A plan as a row of parts of which several are captured, each for itself, and what the journal says of that."""

    pieces: tuple[Piece, ...]
    note: str


def flaw(plan: Plan) -> str | None:
    """Why the plan as a whole, whatever a replay may save, cannot run as a CUDA graph, perhaps one that draws from torch's
    generator (`Traits.draws`); None when it can."""
    facts = Facts(plan, drawing=True)
    reasons = (*map(facts.obstacle, facts.found.steps), facts.unreturnable())
    return _spread(plan) or next((reason for reason in reasons if reason is not None), None)


def choose(plan: Plan) -> Choice | str:
    """What of the plan is to run as a CUDA graph; why nothing of it, if so.

    Where steps are not to be captured, it is the most consecutive ones that are. Fewer are when the results of the last
    ones are so large that copying them would take longer than running those steps plainly.
    """
    if spread := _spread(plan):
        return spread
    facts = Facts(plan)
    reasons = [facts.obstacle(step) for step in facts.found.steps]
    count = len(reasons)
    begin, end = _longest_run(reasons)
    end = facts.first_rewrite(begin, end)
    obstacle = next((r for r in (*reasons, facts.unreturnable()) if r is not None), None)
    if end - begin < MIN_STEPS:
        return obstacle or f"it has {count} step{'s' * (count != 1)}; a replay saves time from {MIN_STEPS} on"
    cuts: list[int | None] = [] if obstacle else [None]
    if facts.is_described():
        cuts += range(begin + MIN_STEPS, end + 1)
        if begin and end == count and facts.unreturnable() is None:
            cuts.append(None)
    if not cuts:
        return str(obstacle)
    prices = facts.prices(begin, cuts)
    best = min(prices, key=lambda price: price.seconds)
    captured = (count if best.end is None else best.end) - begin
    if dear := too_dear(best.copied, captured):
        return dear
    if (begin, best.end) == (0, None):
        return Choice(whole(plan), CAPTURED)
    why = obstacle or "the last ones, so that their results need no copies"
    text = f"{CAPTURED}, but for {count - captured} of {count} steps: {why}"
    return Choice(split(plan, begin, best.end, facts.lends(best.end)), text)


def choose_pieces(plan: Plan) -> Pieces | None:
    """The parts of a plan in whose midst steps are not to be captured; None where fewer than two are worth capturing.

    Each is captured as a plan of its own: what passes between parts is copied out of the one and into the other, so that it
    does not matter what the steps between them do, nor who else takes a turn meanwhile.
    """
    facts = Facts(plan)
    if _spread(plan) or not facts.is_described():
        return None
    reasons = [facts.obstacle(step) for step in facts.found.steps]
    runs = [(begin, end) for begin, end in facts.runs(reasons) if end - begin >= PIECE_STEPS]
    if len(runs) < 2:
        return None
    parts = facts.row(runs)
    choices = {run: choose(parts[run].plan) for run in runs}
    taken = {run: choice for run, choice in choices.items() if isinstance(choice, Choice)}
    if len(taken) < 2:
        return None
    pieces = tuple(Piece(part, taken.get(span)) for span, part in facts.row(list(taken)).items())
    captured = sum(len(Mentions(choice.parts.captured.plan).steps) for choice in taken.values())
    why = dict.fromkeys(reason for reason in (*reasons, *choices.values()) if isinstance(reason, str))
    text = f"{CAPTURED}, in {len(taken)} parts, but for {len(reasons) - captured} of {len(reasons)} steps"
    return Pieces(pieces, f"{text}: {'; '.join(why)}" if why else text)


def whole(plan: Plan) -> Parts:
    """All of the plan as one captured part."""
    return Parts(None, Part(plan, tuple(range(len(plan.inputs))), len(plan.inputs)), None, frozenset())


def _spread(plan: Plan) -> str | None:
    several = len({device.index or 0 for device in _devices(plan) if device.type == "cuda"}) > 1
    return "it runs on several GPUs" if several else None


def _longest_run(reasons: Sequence[str | None]) -> tuple[int, int]:
    """(begin, end) of the most consecutive steps without a reason."""
    best, begin = (0, 0), 0
    for k, reason in enumerate((*reasons, "")):
        if reason is not None:
            best, begin = max(best, (begin, k), key=lambda run: run[1] - run[0]), k + 1
    return best


def traits(captured: Part) -> Traits:
    """Of the captured part of a choice."""
    plan = captured.plan
    device = gpu(plan)
    assert device is not None
    mentioned, written = _mentioned(plan), _written(plan)
    tensors = [
        (i, x) for i, x in zip(captured.takes, plan.inputs, strict=True) if x.kind == "tensor" and x.name in mentioned
    ]
    fixed = tuple(i for i, x in tensors if _stays(x, written))
    numbers = zip(captured.takes, plan.inputs, strict=True)
    return Traits(
        device=torch.device("cuda", device.index or 0),
        moved=tuple(i for i, _ in tensors if i not in fixed),
        fixed=fixed,
        written=tuple(i for i, x in tensors if x.name in written),
        varying=tuple(i for i, x in numbers if i < captured.given and (x.kind == "int" or not x.is_static)),
        seeds=sum(isinstance(s, Call) and s.op == draws.SEED for s in plan.steps),
        steps=len(Mentions(plan).steps),
        draws=any(isinstance(s, Call) and _drops(s) for s in plan.steps),
        peak=0 if (held := footprint(plan, device)) is None else held.peak,
        products=any(isinstance(s, Call) and calls_cublas(s.op) for s in plan.steps),
    )


def too_dear(copied: int, steps: int, share: float | None = None) -> str | None:
    """Why copying this many bytes a call is not worth the host time that a replay saves; None when it is.

    `share` of the time saved, COPY_SHARE by default, may go into copies.
    """
    if copied / COPY_BYTES_PER_SECOND <= steps * STEP_SECONDS * (COPY_SHARE if share is None else share):
        return None
    return f"copying its inputs and results, {copied / 2**20:.1f} MiB a call, costs more than {steps} launches less may save"


@dataclass(frozen=True)
class _Price:
    """Of capturing up to step `end` (None: to the end, results included): bytes copied in a call, and seconds that a call
    takes beside what the steps take anyway."""

    end: int | None
    copied: int
    seconds: float


class Facts:
    """What there is to know of a plan before it is split; `drawing` where a captured run may draw from torch's generator."""

    def __init__(self, plan: Plan, drawing: bool = False) -> None:
        self.plan, self.found, self.drawing = plan, Mentions(plan), drawing
        self.inputs = {x.name: x for x in plan.inputs}
        self.specs = {b.name: b for b in (*plan.constants, *plan.buffers)}
        self.places = _places(plan)
        self.written = _written(plan)
        self.numbers = _numbers(self.found.steps)
        self._related = _related(self.found)
        self._loans = self._lending()

    def is_described(self) -> bool:
        """Whether the layout of all that steps make is known."""
        return all(name in self.specs for name in self.found.made)

    def first_rewrite(self, begin: int, end: int) -> int:
        """The first step from `begin` to before `end`, else that, which changes what one before `begin` has made: a captured
        run has only a copy of it."""
        made = set(self.found.crossing(0, begin))
        steps = range(begin, end if made else begin)
        return next((k for k in steps if not made.isdisjoint(self.changed(self.found.steps[k]))), end)

    def changed(self, step: Launch | Call) -> Iterator[str]:
        """The values that share memory with what the step writes, as far as that is known or possible."""
        for name in step.writes:
            yield from self._related.get(self.found.root.get(name, name), (self.found.root.get(name, name),))

    def runs(self, reasons: Sequence[str | None]) -> list[tuple[int, int]]:
        """(begin, end) of the rows of steps without a reason that do not change what a step before the row has made."""
        found, begin, count = list[tuple[int, int]](), 0, len(reasons)
        while begin < count:
            if reasons[begin] is not None or self.first_rewrite(begin, begin + 1) == begin:
                begin += 1
                continue
            end = next((k for k in range(begin, count) if reasons[k] is not None), count)
            end = self.first_rewrite(begin, end)
            found.append((begin, end))
            begin = end
        return found

    def row(self, runs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Part]:
        """The plan as a row of parts by their steps (from, to before): those of `runs`, and what lies between them.

        The last of them has the plan's results, or else a part of its own has.
        """
        found, count = self.found, len(self.found.steps)
        spans, at = list[tuple[int, int]](), 0
        for begin, end in runs:
            spans += [(at, begin)] if at < begin else []
            spans.append((begin, end))
            at = end
        last = runs[-1][0]
        if at < count or self.unreturnable() or any(found.first[name] < last for name in found.returned):
            spans.append((at, count))
        return dict(zip(spans, row(self.plan, [begin for begin, _ in spans[1:]]), strict=True))

    def obstacle(self, step: Launch | Call) -> str | None:
        """Why the step is not to be captured."""
        if isinstance(step, Call) and (reason := _call(step, self.drawing)) is not None:
            return reason
        reasons = (self._operand(self.found.root.get(n, n)) for n in used(step))
        if reason := next((r for r in reasons if r is not None), None):
            return reason
        devices = [step.device] if isinstance(step, Launch) else _in_arguments((step.args, step.kwargs))
        devices += [self.places[n] for n in defined(step) if n in self.places and n not in self.numbers]
        return "some of it runs on the CPU" if any(d.type != "cuda" for d in devices) else None

    def _operand(self, name: str) -> str | None:
        x = self.inputs.get(name)
        if x is not None and x.kind in ("float", "other"):
            return f"{name} is a number or object that may be another one in each call"
        if name in self.places and self.places[name].type != "cuda" and name not in self.numbers:
            return f"{name} is not in a GPU's memory"
        if x is not None and x.dtype is not None and x.dtype.is_complex and not _stays(x, self.written):
            return f"{name} is complex"
        return None

    def unreturnable(self) -> str | None:
        """Why a captured run cannot have the plan's results."""
        return next((r for name in self.found.returned if (r := self._operand(name)) is not None), None)

    def _lending(self) -> list[bool]:
        """For each number of a step, whether it and all later ones could be captured and keep nothing of what they use."""
        out = [True]
        for step in reversed(self.found.steps):
            leaves = isinstance(step, Launch) or returns_fresh(step.op) or only_writes(step)
            out.append(out[-1] and leaves and self.obstacle(step) is None)
        return out[::-1]

    def lends(self, end: int | None) -> bool:
        return end is not None and self._loans[end]

    def prices(self, begin: int, cuts: Sequence[int | None]) -> list[_Price]:
        """Of capturing from step `begin` up to each of the cuts.

        Sizes that are not known count for nothing: those of a call are looked at when it is captured.
        """
        found, count = self.found, len(self.found.steps)
        moved = [
            (found.first[x.name], known(nbytes(buffer_of(x))))
            for x in self.plan.inputs
            if x.kind == "tensor" and found.last.get(x.name, -1) >= begin and not self._stays(x)
        ]
        sizes = {n: known(nbytes(self.specs[n])) for n in (*found.made, *found.returned) if n in self.specs}
        entering = sum(sizes[n] for n in found.crossing(0, begin))
        returned = [(found.first[n], size) for n, size in sizes.items() if n in found.returned and found.first[n] >= begin]
        passing = [0] * (count + 2)  # bytes of what is mentioned on both sides of each cut and is no result
        for name in found.made:
            if name in sizes and found.first[name] >= begin and name not in found.returned:
                passing[found.first[name] + 1] += sizes[name]
                passing[found.last[name] + 1] -= sizes[name]
        passing = list(itertools.accumulate(passing))
        out = []
        for cut in cuts:
            stop = count + 1 if cut is None else cut
            copied = entering + sum(size for first, size in (*moved, *returned) if first < stop)
            if cut is not None and not self.lends(cut):
                copied += passing[cut]
            plain = 0.0 if cut is None else PART_SECONDS + (count - cut) * STEP_SECONDS
            out.append(_Price(cut, copied, copied / COPY_BYTES_PER_SECOND + plain))
        return out

    def _stays(self, x: InputSpec) -> bool:
        return _stays(x, self.written)


def _related(found: Mentions) -> dict[str, set[str]]:
    """For values given to or returned by calls that may return what they are given: those that may be the same memory."""
    out = dict[str, set[str]]()
    for step in found.steps:
        if isinstance(step, Launch) or only_writes(step) or returns_fresh(step.op):
            continue
        names = {found.root.get(n, n) for n in (*used(step), *defined(step))}
        group = names.union(*(out[n] for n in names if n in out))
        out.update(dict.fromkeys(group, group))
    return out


def _call(step: Call, drawing: bool) -> str | None:
    namespace, _, rest = step.op.partition("::")
    name = rest.partition(".")[0]
    if step.op.startswith("local:") or namespace not in _TRUSTED:
        return f"nothing is known of what {step.origin or step.op} does on the host"
    if name in _WAITING:
        return f"{step.op} waits for the GPU"
    if name.startswith(_DROPPING_ON_THE_HOST) and _dropout(step):
        return f"{step.op} leaves the state of its generator where only another captured run could read it"
    if (_draws(step.op) and step.op != draws.SEED) or (not drawing and _drops(step)):
        return f"{step.op} draws from torch's generator"
    return None


def _drops(step: Call) -> bool:
    """Whether it is attention that drops by torch's generator, as it may in a captured run."""
    namespace, _, rest = step.op.partition("::")
    return namespace == "aten" and rest.partition(".")[0] in _DROPPING and _dropout(step)


def _dropout(step: Call) -> bool:
    """Whether a call of attention drops anything."""
    overload = _overload(step.op)
    names = [argument.name for argument in overload._schema.arguments]
    return bool((dict(zip(names, step.args, strict=False)) | step.kwargs).get("dropout_p", 0.0))


def _numbers(steps: Sequence[Launch | Call]) -> set[str]:
    """The numbers of backends that attention's forward tells its backward, in the host's memory.

    What a number says is part of a captured run: a forward's is the same in each replay, and a backward is replayed for the
    very tensor that it was captured with. What anything else reads is none of them.
    """
    found: set[str] = set()
    others: set[str] = set()
    for step in steps:
        told: object = None
        if isinstance(step, Call) and step.op == _ATTENTION:
            told = step.outputs[_NUMBER_AMONG_RESULTS]
        elif isinstance(step, Call) and step.op == _ATTENTION_BACKWARD:
            number = step.args[_NUMBER_AMONG_ARGUMENTS] if len(step.args) > _NUMBER_AMONG_ARGUMENTS else None
            told = number.name if isinstance(number, Ref) else None
        if isinstance(told, str):
            found.add(told)
        others.update(n for n in (*used(step), *defined(step)) if n != told)
    return found - others


def _overload(op: str) -> Any:
    """torch's op of that name; None if there is none."""
    namespace, _, rest = op.partition("::")
    name, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), name, None), overload or "default", None)


def _draws(op: str) -> bool:
    overload = _overload(op)
    seeded = overload is not None and torch.Tag.nondeterministic_seeded in overload.tags
    return seeded and _SEEDED_WITHOUT_DROPOUT not in op


def known(size: Int) -> int:
    """A size that is a number, else zero."""
    return size if isinstance(size, int) else 0


def buffer_of(x: InputSpec) -> BufferSpec:
    assert x.dtype is not None and x.device is not None
    return BufferSpec(x.name, x.dtype, x.device, x.shape, x.strides)


def _stays(x: InputSpec, written: set[str]) -> bool:
    """Whether the input is used at the caller's address: what keeps its own, and what the plan changes."""
    return x.role in (Role.PARAMETER, Role.STATE) or x.name in written


def _mentioned(plan: Plan) -> set[str]:
    return {n for step in plan.steps for n in used(step)} | set(refs(plan.outputs))


def _written(plan: Plan) -> set[str]:
    root = Lifetimes.of(plan).root
    names = {n for step in plan.steps if isinstance(step, Launch | Call) for n in step.writes}
    return {root.get(n, n) for n in names} & {x.name for x in plan.inputs}


def _devices(plan: Plan) -> list[torch.device]:
    found = [step.device for step in plan.steps if isinstance(step, Launch)]
    found += [slot.device for slot in plan.slots]
    known = _places(plan)
    for step in plan.steps:
        if isinstance(step, Call):
            found += [known[n] for n in (*step.outputs, *refs(step.args), *refs(step.kwargs)) if n in known]
            found += _in_arguments((step.args, step.kwargs))
    return found


def _places(plan: Plan) -> dict[str, torch.device]:
    """The device of each tensor that the plan describes."""
    found = {x.name: x.device for x in plan.inputs if x.device is not None}
    return found | {spec.name: spec.device for spec in (*plan.constants, *plan.buffers)}


def _in_arguments(value: object) -> list[torch.device]:
    match value:
        case torch.device():
            return [value]
        case list() | tuple():
            return [d for x in value for d in _in_arguments(x)]
        case dict():
            return [d for x in value.values() for d in _in_arguments(x)]
    return []
