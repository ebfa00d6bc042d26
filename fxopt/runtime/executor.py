"""Running a plan.

`Executor` binds a plan once (kernels loaded, ops resolved, one Python function compiled; see `runtime/binding.py`) and is
then called with the inputs. It may be called from several threads at once and on any current CUDA stream.
"""

from __future__ import annotations

import itertools
import linecache
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxopt.errors import CacheError, PlanError
from fxopt.ir.kernel import Artifact
from fxopt.ir.region import BufferSpec, Call
from fxopt.runtime import workspace
from fxopt.runtime.binding import Binding, Writer
from fxopt.runtime.binding_values import ALIGNMENT
from fxopt.runtime.native import NativeKernel, load_kernel
from fxopt.runtime.plan import Launch, Plan
from fxopt.runtime.plan_ops import resolve_op

_serial = itertools.count()

LoadedKernels = dict[tuple[str, int], Any]
"""CUDA kernels by artifact and index of the device."""


class Executor:
    """A plan bound to this process.

    Called with a list of inputs, one per `plan.inputs`, in the boxed convention: the list is emptied, so that inputs nobody
    else holds are freed as soon as the last step that needs them has run. Returns a tuple, one value per `plan.outputs`.
    Raises IndexError when a kernel meets an index out of bounds.

    `plan` must come from bytes (`Plan.from_json`). `kernels` has the artifact of every kernel key that the plan launches;
    `constants` a tensor for every constant; `local_ops` a callable for every op "local:KEY", by KEY. `profile` wraps every
    kernel launch in `torch.profiler.record_function`; `loaded` are CUDA kernels loaded before, to which this plan's are
    added. Raises PlanError when one of these does not fit the plan, CacheError when a kernel cannot be loaded.
    """

    def __init__(
        self,
        plan: Plan,
        kernels: Mapping[str, Artifact],
        constants: Mapping[str, torch.Tensor] | None = None,
        local_ops: Mapping[str, Callable[..., Any]] | None = None,
        *,
        profile: bool = False,
        loaded: LoadedKernels | None = None,
    ) -> None:
        if not plan.from_bytes:
            raise PlanError(
                "the executor runs only what Plan.from_json returned: Executor(Plan.from_json(plan.to_json()), ...)"
            )
        self.plan = plan
        self.kept_as: str | None = None  # the name under which the plan is on disk, for whoever put it there
        self._boxed_call = True  # how AOTAutograd tells that the input list is handed over
        self._constants = _checked_constants(plan, constants or {})
        self._kernels, self._local_ops = kernels, local_ops or {}
        self._loaded = {} if loaded is None else loaded
        launches = [s for s in plan.steps if isinstance(s, Launch)]
        for launch in launches:
            if launch.kernel not in kernels:
                raise PlanError(
                    f"plan.steps: no artifact was given for kernel {launch.kernel} ({launch.label or launch.entry})"
                )
        natives = {x.kernel: load_kernel(kernels[x.kernel]) for x in launches if x.language == "cpp"}
        binding = self._write(natives, self._local_ops, profile)
        self.source = binding.source
        self._run = _with_devices(self._compile(binding, kernels), [x.device for x, _ in binding.cuda])

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # gradients are the business of whoever captured the graph
            with torch.no_grad():
                return self._run(inputs)
        return self._run(inputs)

    def part(self, plan: Plan, more_ops: Mapping[str, Callable[..., Any]] | None = None) -> Executor:
        """An executor of `plan`, which has some of this one's steps and calls of `more_ops` (by KEY, like `local_ops`);
        raises as the constructor does."""
        checked = Plan.from_json(plan.to_json())
        ops = {**self._local_ops, **(more_ops or {})}
        return Executor(checked, self._kernels, self._constants, ops, loaded=self._loaded)

    def _write(
        self, natives: dict[str, NativeKernel], local_ops: Mapping[str, Callable[..., Any]], profile: bool
    ) -> Binding:
        ops = {s.op: _callable(s.op, local_ops) for s in self.plan.steps if isinstance(s, Call)}
        return Writer(self.plan, self._constants, natives, ops, _HELPERS, profile).write()

    def _compile(self, binding: Binding, kernels: Mapping[str, Artifact]) -> Callable[[list[Any]], tuple[Any, ...]]:
        filename = f"<fxopt plan {self.plan.name} {next(_serial)}>"
        linecache.cache[filename] = (len(binding.source), None, binding.source.splitlines(True), filename)
        names = dict(binding.names)
        names["frames"] = []
        names["new_frame"] = _frame_maker(binding, _loaded_cuda([x for x, _ in binding.cuda], kernels, self._loaded))
        if any(launch.members for launch, _ in binding.cuda):  # a first call on a stream that is captured could make none
            names["frames"].append(names["new_frame"]())
        exec(compile(binding.source, filename, "exec"), names)
        run: Callable[[list[Any]], tuple[Any, ...]] = names["run"]
        return run


def _callable(op: str, local_ops: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if not op.startswith("local:"):
        return resolve_op(op)
    if op.removeprefix("local:") not in local_ops:
        raise PlanError(
            f"plan.steps: no callable was given for {op!r}; it exists only in the process that captured the graph"
        )
    return local_ops[op.removeprefix("local:")]


def _checked_constants(plan: Plan, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    aligned = {s.buffers[i] for s in plan.steps if isinstance(s, Launch) and s.language != "cpp" for i in s.aligned}
    for spec in plan.constants:
        tensor = given.get(spec.name)
        if tensor is None:
            raise PlanError(f"plan.constants.{spec.name}: no tensor was given")
        _check_constant(spec, tensor)
        out[spec.name] = _aligned_copy(tensor) if spec.name in aligned else tensor
    return out


def _check_constant(spec: BufferSpec, tensor: torch.Tensor) -> None:
    strided = tensor.layout == torch.strided  # a packed weight has no strides
    found = (tensor.dtype, tensor.device, tuple(tensor.shape), tuple(tensor.stride()) if strided else spec.strides)
    wanted = (spec.dtype, spec.device, spec.shape, spec.strides)
    if found != wanted:
        raise PlanError(f"plan.constants.{spec.name}: expected (dtype, device, shape, strides) {wanted}, was given {found}")


def _frame_maker(binding: Binding, loaded: list[Any]) -> Callable[[], tuple[Any, ...]]:
    """A function that makes what one running call needs for itself: argument arrays, their addresses, CUDA launchers.

    `loaded` has the kernel of each of the binding's CUDA launches.
    """

    def new_frame() -> tuple[Any, ...]:
        pointers, sizes = array("Q", binding.pointers), array("q", binding.sizes)
        launchers = [_launcher(kernel, *given) for kernel, given in zip(loaded, binding.cuda, strict=True)]
        return pointers, sizes, pointers.buffer_info()[0], sizes.buffer_info()[0], launchers

    return new_frame


def _launcher(kernel: Any, launch: Launch, early: bool) -> Callable[..., None]:
    bound: Callable[..., None] = kernel.bind(launch.label or launch.entry, early)
    if not launch.members:
        return bound
    from fxopt.runtime.batch import BatchLauncher

    width = len(launch.buffers) // len(launch.members)
    return BatchLauncher(bound, launch.members, launch.block, width, launch.device)


def _loaded_cuda(launches: list[Launch], kernels: Mapping[str, Artifact], loaded: LoadedKernels) -> list[Any]:
    """The launches' kernels, loaded on their devices if they are not yet. A plan for CPUs never gets to libcuda."""
    if not launches:
        return []
    from fxopt.runtime.launch import load_cubin

    for key in dict.fromkeys((x.kernel, x.device.index or 0) for x in launches):
        if key in loaded:
            continue
        artifact, device = kernels[key[0]], key[1]
        try:
            torch.cuda.init()  # a plan may make all its tensors itself
            with torch.cuda.device(device):
                loaded[key] = load_cubin(artifact.path, artifact.meta, device)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CacheError(f"cannot load kernel {artifact.entry} from {artifact.path}: {error}") from error
    return [loaded[x.kernel, x.device.index or 0] for x in launches]


def _with_devices(
    run: Callable[[list[Any]], tuple[Any, ...]], used: list[torch.device]
) -> Callable[[list[Any]], tuple[Any, ...]]:
    """`run` with the CUDA device that its kernels were loaded on current; several devices are switched between inside."""
    if not used:
        return run
    first = used[0].index or 0
    spans = len(set(used)) > 1

    def guarded(inputs: list[Any]) -> tuple[Any, ...]:
        if not spans and torch.cuda.current_device() == first:
            return run(inputs)
        with torch.cuda.device(first):
            return run(inputs)

    return guarded


# --- what the generated function calls


def _fail(launch: Launch, code: int) -> None:
    """Raise what eager would for a kernel's error code."""
    message = launch.errors[code - 1] if 0 < code <= len(launch.errors) else f"kernel {launch.entry} failed with code {code}"
    if message.startswith("ZeroDivisionError"):
        raise RuntimeError(message)
    raise IndexError(message)


def _flat(result: Any) -> list[Any]:
    """The values of a library call's result in order, nested sequences flattened."""
    if not isinstance(result, (tuple, list)):
        return [result]
    return [leaf for item in result for leaf in _flat(item)]


def _one(result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        (result,) = _flat(result)
    return result


def _relayout(tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """`tensor` with the strides the plan was made with. Strides of dimensions of size one, or of nothing, say nothing."""
    same = all(size <= 1 or a == b for size, a, b in zip(shape, tensor.stride(), strides, strict=True))
    if tensor.numel() == 0 or same:
        return tensor
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _aligned_copy(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself when its first element is aligned, else a copy that is, with the same strides (overlaps included)."""
    if tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    span = tensor.as_strided((extent if tensor.numel() else 0,), (1,), tensor.storage_offset())
    return span.clone().as_strided(tensor.shape, tensor.stride(), 0)


def _align(*tensors: torch.Tensor) -> tuple[Any, ...]:
    """(the aligned tensors, their addresses...)."""
    copies = [_aligned_copy(t) for t in tensors]
    return copies, *(t.data_ptr() for t in copies)


def _stream(device: int) -> int:
    """The raw handle of the device's current stream."""
    handle: int = torch.cuda.current_stream(device).cuda_stream
    return handle


def _changed(tensors: tuple[torch.Tensor, ...]) -> None:
    """Bump version counters, as the in-place op that the kernel stands for would have."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # tensors made in inference mode have no counter; asking each costs more than counting
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


_in_c = getattr(torch._C._dynamo, "guards", None)
_QUICK = {"empty_cpu": "_empty_strided_cpu", "empty_cuda": "_empty_strided_cuda", "reinterpret": "_reinterpret_tensor"}
"""Functions of torch's that allocate and view without the dispatcher, in half the time; without them, it goes through that.
The first two allocate on the current device; what the third returns has a version counter of its own, and its offset counts
from the first element of what it views."""

_HELPERS: dict[str, Any] = {
    **{ours: getattr(_in_c, theirs) for ours, theirs in _QUICK.items() if hasattr(_in_c, theirs)},
    "empty": torch.empty_strided,
    "fail": _fail,
    "flat": _flat,
    "one": _one,
    "relayout": _relayout,
    "align": _align,
    "stream": _stream,
    "changed": _changed,
    "data_ptr": torch.Tensor.data_ptr,
    "set_device": torch.cuda.set_device,
    "take": workspace.take,
    "give": workspace.give,
    "record_function": torch.profiler.record_function,
}
