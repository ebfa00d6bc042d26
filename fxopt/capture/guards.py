"""Fewer guards of Dynamo's, for whoever says that modules stay as they are (`options={"steady_modules": True}`).

At each call Dynamo looks at all that it has read while it traced: attributes of modules, of their configurations and
classes, globals. For a model of a few hundred weights that takes longer than a replay of its CUDA graph. Guards are made
when the backend has returned, of a list that it can shorten.
"""

from __future__ import annotations

from torch._guards import Guard, GuardSource

from fxopt.capture.private import TracingContext

_OF_MODULES = frozenset(
    {
        GuardSource.LOCAL_UNSPECIALIZED_NN_MODULE,
        GuardSource.LOCAL_UNSPECIALIZED_BUILTIN_NN_MODULE,
        GuardSource.GLOBAL_UNSPECIALIZED_NN_MODULE,
        GuardSource.GLOBAL_UNSPECIALIZED_BUILTIN_NN_MODULE,
        GuardSource.GLOBAL,
    }
)
_OF_TENSORS = frozenset({"TENSOR_MATCH", "TENSOR_SUBCLASS_METADATA_MATCH", "DUPLICATE_INPUT"})
_TRAINING = ".training"


def trust_modules() -> int:
    """Drop the guards of attributes of modules, and of what is reached through them, and of globals; how many those were.

    Called while Dynamo waits for its backend; elsewhere nothing happens. Kept are guards of tensors, wherever these are, of
    arguments that are no modules, of torch's modes, and whether the outermost modules are in training.
    """
    context = TracingContext.try_get()
    if context is None:
        return 0
    found = context.guards_context.dynamo_guards
    modes = [guard.name for guard in found.inner if guard.name.endswith(_TRAINING)]
    outermost = min(map(_depth, modes), default=0)
    dropped = [guard for guard in found.inner if _trusts(guard) and not _is_mode(guard, outermost)]
    found.inner -= type(found.inner)(dropped)
    return len(dropped)


def _trusts(guard: Guard) -> bool:
    """Guards without a name are those of torch's modes."""
    return bool(guard.name) and guard.source in _OF_MODULES and guard.create_fn_name() not in _OF_TENSORS


def _is_mode(guard: Guard, outermost: int) -> bool:
    return guard.name.endswith(_TRAINING) and _depth(guard.name) == outermost


def _depth(name: str) -> int:
    """How many steps lead from a local or global name to what `name` says."""
    return name.count(".") + name.count("[")
