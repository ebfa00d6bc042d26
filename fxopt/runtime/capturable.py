"""Which plans may run as a CUDA graph, decided from the plan alone.

A captured run repeats what the device did; whatever the host did in it happened once. So everything that a plan does must
happen on one GPU, at addresses and with numbers that are either the same in every call or given to the captured run anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.ir.graph import Role
from fxopt.ir.region import BufferSpec, Call, refs
from fxopt.runtime import draws
from fxopt.runtime.lifetimes import Lifetimes, nbytes
from fxopt.runtime.plan import InputSpec, Launch, Plan, used

MIN_STEPS = 6
"""Below that, a replay with its copies takes the host about as long as the launches do."""
STEP_SECONDS = 5e-6
"""Host time that a replay saves for each step."""
COPY_BYTES_PER_SECOND = 1.3e12
"""Bytes that a GPU copies in a second; about half of the rate at which an H100 reads and writes."""
COPY_SHARE = 1 / 32
"""How much of the host time saved may go into copies: what a replay may lose where the GPU, not the host, was the slower."""

_TRUSTED = frozenset({"aten", "prims", "fxopt", "mkldnn"})
"""Namespaces of ops that do nothing on the host that a replay would have to repeat, those below excepted."""
_WAITING = frozenset({"linear_cross_entropy", "linear_cross_entropy_backward", "_local_scalar_dense", "item", "nonzero"})
"""Ops that wait for the device to read a value."""
_SEEDED_WITHOUT_DROPOUT = "attention"
"""Ops with this in their names are tagged as random although they draw nothing without dropout; with it, capture fails."""


@dataclass(frozen=True)
class Traits:
    """What a captured run has to know of a plan. Numbers are positions among the inputs.

    `moved` are copied into memory of the run before each replay, `fixed` are used where they are; `written` of those are
    changed by the plan. `varying` tell the sizes of a call. `seeds` are drawn in a call; `steps` run something.
    """

    device: torch.device
    moved: tuple[int, ...]
    fixed: tuple[int, ...]
    written: tuple[int, ...]
    varying: tuple[int, ...]
    seeds: int
    steps: int


def gpu(plan: Plan) -> torch.device | None:
    """The GPU that the plan launches kernels on or calls ops for; None for a plan of CPUs alone."""
    return next((d for d in _devices(plan) if d.type == "cuda"), None)


def obstacle(plan: Plan) -> str | None:
    """Why the plan is not to run as a CUDA graph; None when it may."""
    return _place(plan) or _calls(plan) or _inputs(plan) or _price(plan)


def traits(plan: Plan) -> Traits:
    """Of a plan without obstacle."""
    device = gpu(plan)
    assert device is not None
    mentioned, written = _mentioned(plan), _written(plan)
    tensors = [(i, x) for i, x in enumerate(plan.inputs) if x.kind == "tensor" and x.name in mentioned]
    fixed = tuple(i for i, x in tensors if _stays(x, written))
    return Traits(
        device=torch.device("cuda", device.index or 0),
        moved=tuple(i for i, _ in tensors if i not in fixed),
        fixed=fixed,
        written=tuple(i for i, x in tensors if x.name in written),
        varying=tuple(i for i, x in enumerate(plan.inputs) if x.kind == "int" or not _is_static(x)),
        seeds=sum(isinstance(s, Call) and s.op == draws.SEED for s in plan.steps),
        steps=_steps(plan),
    )


def too_dear(copied: int, steps: int) -> str | None:
    """Why copying this many bytes a call is not worth the host time that a replay saves; None when it is."""
    if copied / COPY_BYTES_PER_SECOND <= steps * STEP_SECONDS * COPY_SHARE:
        return None
    return f"copying its inputs and results, {copied / 2**20:.1f} MiB a call, costs more than {steps} launches less may save"


def _place(plan: Plan) -> str | None:
    mentioned = _mentioned(plan)
    for name, device in _places(plan).items():
        if name in mentioned and device.type != "cuda":
            return f"{name} is not in a GPU's memory"
    devices = {device.index or 0 for device in _devices(plan) if device.type == "cuda"}
    if len(devices) > 1:
        return "it runs on several GPUs"
    if any(device.type != "cuda" for device in _devices(plan)):
        return "some of it runs on the CPU"
    return None


def _calls(plan: Plan) -> str | None:
    for step in plan.steps:
        if not isinstance(step, Call):
            continue
        namespace, _, rest = step.op.partition("::")
        name = rest.partition(".")[0]
        if step.op.startswith("local:") or namespace not in _TRUSTED:
            return f"nothing is known of what {step.origin or step.op} does on the host"
        if name in _WAITING:
            return f"{step.op} waits for the GPU"
        if _draws(namespace, name, rest) and step.op != draws.SEED:
            return f"{step.op} draws from torch's generator"
    return None


def _draws(namespace: str, name: str, rest: str) -> bool:
    packet = getattr(getattr(torch.ops, namespace), name, None)
    overload = getattr(packet, rest.partition(".")[2] or "default", None)
    seeded = overload is not None and torch.Tag.nondeterministic_seeded in overload.tags
    return seeded and _SEEDED_WITHOUT_DROPOUT not in name


def _inputs(plan: Plan) -> str | None:
    mentioned, written = _mentioned(plan), _written(plan)
    for x in plan.inputs:
        if x.name not in mentioned:
            continue
        if x.kind in ("float", "other"):
            return f"{x.name} is a number or object that may be another one in each call"
        if x.kind == "tensor" and x.dtype is not None and x.dtype.is_complex and not _stays(x, written):
            return f"{x.name} is complex"
    return None


def _price(plan: Plan) -> str | None:
    steps = _steps(plan)
    if steps < MIN_STEPS:
        return f"it has {steps} step{'s' * (steps != 1)}; a replay saves time from {MIN_STEPS} on"
    root, inputs = Lifetimes.of(plan).root, {x.name for x in plan.inputs}
    specs = {b.name: b for b in (*plan.buffers, *plan.constants)}
    made = {root.get(n, n) for n in refs(plan.outputs)} - inputs
    given = [_buffer(plan.inputs[i]) for i in traits(plan).moved]
    sizes = [nbytes(spec) for spec in (*given, *(specs[n] for n in made if n in specs))]
    return too_dear(sum(n for n in sizes if isinstance(n, int)), steps)  # others are known when there are sizes


def _buffer(x: InputSpec) -> BufferSpec:
    assert x.dtype is not None and x.device is not None
    return BufferSpec(x.name, x.dtype, x.device, x.shape, x.strides)


def _steps(plan: Plan) -> int:
    return sum(isinstance(step, Launch | Call) for step in plan.steps)


def _stays(x: InputSpec, written: set[str]) -> bool:
    """Whether the input is used at the caller's address: what keeps its own, and what the plan changes."""
    return x.role in (Role.PARAMETER, Role.STATE) or x.name in written


def _is_static(x: InputSpec) -> bool:
    return all(isinstance(n, int) for n in (*x.shape, *x.strides))


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
