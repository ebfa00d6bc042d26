"""Dynamo's guards, evaluated again only when something that they look at has changed.

For a model of a few hundred weights they take longer than a replay of its CUDA graph, and nearly always nothing has changed.
`codegen/guards.cpp` remembers what a walk along their paths saw when all guards had passed, and compares that in a few
microseconds. This file makes the paths of it: for each guard on modules' and other objects' attributes, globals, classes and
tensors that it can follow, a row of steps. Those guards leave the tree that Dynamo evaluates in each call; the whole tree is
evaluated instead when anything differs. Guards that cannot be followed (a property, a class with an attribute lookup of its
own, relations between tensors) stay, as do those of arguments and of torch's modes.
"""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum, IntFlag
from typing import Any, Protocol

import torch
from torch._dynamo import guards
from torch._guards import CompileContext

log = logging.getLogger("fxopt")

SUPPORTED = (3, 11) <= sys.version_info < (3, 13)
"""Of newer Pythons it is not known what changes the version of a dict."""
NAME = "guard-memory"
"""What `FXOPT_DISABLE` and `options={"disable": ...}` call it."""


class Kind(IntEnum):
    """What a step leads to, as `codegen/guards.cpp` has it."""

    LOCAL = 0
    GLOBALS = 1
    DICT = 2
    ITEM = 3
    ATTRIBUTE = 4
    TYPE = 5
    BASES = 6
    TYPE_DICT = 7
    INDEX = 8
    NTH = 9


class Needs(IntFlag):
    """What guards say of a value beside its identity and its type."""

    NOTHING = 0
    VALUE = 1
    CONTENTS = 2
    TENSOR = 4
    ORDER = 8
    LACKS = 16


_NEEDS = {
    "TYPE_MATCH": Needs.NOTHING,
    "ID_MATCH": Needs.NOTHING,
    "NONE_MATCH": Needs.NOTHING,
    "NOT_NONE": Needs.NOTHING,
    "TRUE_MATCH": Needs.VALUE,
    "FALSE_MATCH": Needs.VALUE,
    "EQUALS_MATCH": Needs.VALUE,
    "DICT_CONTAINS": Needs.CONTENTS,
    "DICT_LENGTH": Needs.CONTENTS,
    "LENGTH_CHECK": Needs.CONTENTS,
    "NO_HASATTR": Needs.LACKS,
    "TENSOR_MATCH": Needs.TENSOR,
    "DIMENSION_DYNAMIC_MARKING_GUARD": Needs.TENSOR,
    "DYNAMIC_INDICES": Needs.TENSOR,
}
_ATTRIBUTES = {
    "CodeGuardAccessor": "__code__",
    "ClosureGuardAccessor": "__closure__",
    "FuncDefaultsGuardAccessor": "__defaults__",
    "FuncKwDefaultsGuardAccessor": "__kwdefaults__",
}
_WITH_KEYS = {
    "DictGetItemGuardAccessor": Kind.ITEM,
    "TupleGetItemGuardAccessor": Kind.INDEX,
    "ListGetItemGuardAccessor": Kind.INDEX,
    "GetItemGuardAccessor": Kind.INDEX,
}
_WITHOUT_KEYS = {
    "GlobalsGuardAccessor": Kind.GLOBALS,
    "GetGenericDictGuardAccessor": Kind.DICT,
    "TypeGuardAccessor": Kind.TYPE,
    "TypeMROGuardAccessor": Kind.BASES,
    "TypeDictGuardAccessor": Kind.TYPE_DICT,
}


_APART = "NO_TENSOR_ALIASING"
"""The guard of tensors that are all different ones; it says nothing else."""


class Memory(Protocol):
    """`fxopt_guards.Memory`."""

    def add(self, parent: int, kind: int, key: Any, needs: int) -> tuple[int, type] | None: ...

    def seal(self, used: Sequence[int], apart: Sequence[int], arguments: tuple[tuple[str, int], ...]) -> None: ...

    def state(self) -> dict[str, int]: ...

    def __call__(self, f_locals: dict[str, Any]) -> bool: ...


class _Paths:
    """The steps of a tree of guards, and which of its managers can go. With `related`, tensors that have to be different
    ones can, too."""

    def __init__(self, memory: Memory, root: Any, f_locals: dict[str, Any], related: bool) -> None:
        self._memory, self._f_locals = memory, f_locals
        self._needs = _NEEDS | ({_APART: Needs.TENSOR} if related else {})
        self._managers: list[Any] = []  # alive, so that an id is one manager's
        self.dropped: set[int] = set()
        self.used: list[int] = []
        self.apart: list[int] = []
        self.arguments: list[tuple[str, int]] = []
        self.are_related = False  # tensors that can go to ones that cannot, and that are no arguments
        self._below(root, -1, None)

    def _below(self, manager: Any, at: int, local: str | None) -> bool:
        """Whether anything below a manager has to stay, whose value step `at` leads to. `local` is its name if it is one."""
        self._managers.append(manager)
        stays = False
        if hasattr(manager, "get_key_value_managers"):
            for index, (key, value) in manager.get_key_value_managers().items():
                stays |= key is not None and self._key(key, at, index)
                stays |= value is not None and self._child((Kind.NTH, index), value, at, None)
            return stays
        for accessor, child in zip(manager.get_accessors(), manager.get_child_managers(), strict=True):
            stays |= self._child(_way(accessor), child, at, local)
        return stays

    def _key(self, manager: Any, at: int, index: int) -> bool:
        """Whether a manager of a dict's key has to stay. Where there is a step to the item, the key cannot change."""
        self._managers.append(manager)
        is_known = self._needed(manager) is not None and not manager.get_accessors()
        if not is_known or self._add(at, (Kind.NTH, index), Needs.NOTHING) is None:
            return True
        self.dropped.add(id(manager))
        return False

    def _child(self, way: tuple[Kind, Any] | None, child: Any, at: int, local: str | None) -> bool:
        needs = self._needed(child)
        found = self._add(at, way, needs or Needs.NOTHING)
        if found is not None and found[1] is not child.get_type_of_guarded_value():
            found = None
        name = way[1] if way is not None and way[0] is Kind.LOCAL else None
        stays = self._below(child, -1 if found is None else found[0], name) or needs is None or found is None
        is_apart = any(type(guard).__name__ == _APART for guard in child.get_leaf_guards())
        if found is not None and not stays:
            self.dropped.add(id(child))
            (self.apart if is_apart else self.used).append(found[0])
        elif is_apart:
            if name is not None:
                self.arguments.append((name, -1))
            elif local is not None and way is not None and way[0] is Kind.INDEX and type(self._f_locals[local]) is tuple:
                self.arguments.append((local, way[1]))
            else:
                self.are_related = True
        return stays

    def _add(self, at: int, way: tuple[Kind, Any] | None, needs: Needs) -> tuple[int, type] | None:
        """What `Memory.add` says. Of locals only modules: others may be made anew for each call."""
        if way is None or (at < 0 and way[0] > Kind.GLOBALS):
            return None
        if way[0] is Kind.LOCAL and not isinstance(self._f_locals.get(way[1]), torch.nn.Module):
            return None
        return self._memory.add(at, way[0], way[1], needs)

    def _needed(self, manager: Any) -> Needs | None:
        """What its own guards look at; None where that is not known."""
        needs = Needs.ORDER if hasattr(manager, "get_key_value_managers") else Needs.NOTHING
        for guard in manager.get_leaf_guards():
            found = self._needs.get(type(guard).__name__)
            if found is None:
                return None
            needs |= found
        return needs


def _way(accessor: Any) -> tuple[Kind, Any] | None:
    """The step that an accessor is, with its key."""
    kind = type(accessor).__name__
    if kind in _ATTRIBUTES:
        return Kind.ATTRIBUTE, _ATTRIBUTES[kind]
    if kind == "GetAttrGuardAccessor":
        return Kind.ATTRIBUTE, accessor.get_attr_name()
    if kind in _WITHOUT_KEYS:
        return _WITHOUT_KEYS[kind], None
    text = accessor.repr().partition("(")[2].removesuffix(")")
    if kind == "FrameLocalsGuardAccessor":
        kind_of_step, text = Kind.LOCAL, text.removeprefix("key=").rpartition(", framelocals_idx=")[0]
    elif kind in _WITH_KEYS:
        kind_of_step = _WITH_KEYS[kind]
    else:
        return None
    try:
        key = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return (kind_of_step, key) if type(key) in (str, int) else None


def remember(
    wrapper: Any, f_locals: dict[str, Any], f_globals: dict[str, Any], make: Callable[..., Memory]
) -> Memory | None:
    """Let a frame's guards (torch's `GuardManagerWrapper`) be evaluated only when something has changed.

    `make` is `fxopt_guards.Memory`. None, and nothing is done, where there is nothing to gain.
    """
    full = wrapper.root
    for related in (True, False):
        memory = make(full.check, f_locals, f_globals)
        paths = _Paths(memory, full, f_locals, related)
        if not (paths.are_related and paths.apart):
            break
    if not paths.dropped:
        return None
    memory.seal(paths.used, paths.apart, tuple(paths.arguments))
    fewer = full.clone_manager(lambda manager: id(manager) not in paths.dropped)
    parts = ["something that guards look at has changed"]
    try:
        fewer.add_lambda_guard(memory, parts, None)
    except TypeError:  # torch 2.11
        fewer.add_lambda_guard(memory, parts)
    wrapper.root = fewer
    wrapper.check_verbose = full.check_verbose  # which names the guard that failed
    return memory


def remember_next(code: Callable[[], Any]) -> None:
    """Do that with the guards of this compilation, which Dynamo makes when its backend has returned.

    `code` returns the module made from `codegen/guards.cpp`, or None where it is not there (yet). Elsewhere than in a
    backend that Dynamo waits for, nothing happens.
    """
    compilation = CompileContext.current_compile_id()
    if compilation is None or not SUPPORTED:
        return
    code()  # begins to look for it
    others = guards.guard_manager_testing_hook_fn

    def on_guards(wrapper: Any, f_locals: dict[str, Any], builder: Any) -> None:
        if guards.guard_manager_testing_hook_fn is on_guards:
            guards.guard_manager_testing_hook_fn = others
        if others is not None:
            others(wrapper, f_locals, builder)
        module = code() if CompileContext.current_compile_id() == compilation else None
        if module is None:
            return
        try:
            remember(wrapper, f_locals, builder.scope["G"], module.Memory)
        except Exception as error:  # guards of another torch: they stay as they are
            log.info("guards are evaluated in each call: %s: %s", type(error).__name__, error)

    guards.guard_manager_testing_hook_fn = on_guards
