"""Finished plans on disk: a graph that any process has compiled before is loaded, not lowered, printed or measured again.

    plans/<hash of the key>.json      {"key", "plan", "kernels", "constants", "journal"}

The key holds everything that compilation looks at: the captured graph with the layouts of all its values, roles, literals,
options, torch's global flags, devices, compilers, and fxopt's own source. What cannot be written down (subgraphs, callables
that only this process has, large constants) has no key: such a graph is compiled each time, from kernels already built.
A document whose plan or kernels are gone or damaged counts as absent.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt.codegen.compile import toolchain
from fxopt.codegen.replay_build import replay_code
from fxopt.errors import CacheError, PlanError, UnsupportedError
from fxopt.garbage import collection_paused
from fxopt.ir import ops
from fxopt.ir.attention_backends import enabled_backends
from fxopt.ir.canonical import UnwritableError, argument
from fxopt.ir.exprs_json import to_json
from fxopt.ir.graph import Graph, Phase
from fxopt.ir.precision import convolutions_use_tf32, products_use_tf32
from fxopt.journal import WARNING, Journal, KernelEntry
from fxopt.lower import Lowered
from fxopt.options import Options
from fxopt.runtime.artifacts import ArtifactStore, default_store
from fxopt.runtime.cachedir import default_directory
from fxopt.runtime.cuda_graph import GraphedExecutor, with_graphs
from fxopt.runtime.encoding import torch_name
from fxopt.runtime.executor import Executor
from fxopt.runtime.in_parts import InPieces
from fxopt.runtime.plan import Launch, Plan
from fxopt.target import Target
from fxopt.tune.records import RecordKey

FORMAT = 1
FOLDER = "plans"
AUTOGRAD_FOLDER = "autograd"

SMALL = 1 << 20
"""Bytes of constants, all together, that a document holds and a key hashes. Frozen weights are more."""


# ---------------------------------------------------------------------- the key


def plan_key(graph: Graph, options: Options) -> RecordKey | None:
    """What the plan of `graph`, not yet touched by passes, depends on; None when that cannot be written down.

    Graphs that are to be dumped or verified pass by pass have no key either: their passes must run.
    """
    if options.dump or options.check:
        return None
    try:
        text = _graph_text(graph)
    except (UnwritableError, UnsupportedError):
        return None
    return RecordKey("plan", {"graph": hashlib.sha256(text.encode()).hexdigest(), **surroundings(options, _devices(graph))})


def surroundings(options: Options, devices: Sequence[torch.device]) -> dict[str, Any]:
    """What beside the graph decides its plan: JSON data."""
    targets = [Target.current(device) for device in devices]
    return {
        "options": options.cache_key_facts(),
        "flags": _flags(),
        "targets": [dataclasses.asdict(target) for target in targets],
        "toolchains": [toolchain(target) for target in targets],
        "torch": torch.__version__,
        "fxopt": _own_source(),
    }


def _graph_text(graph: Graph) -> str:
    """Canonical JSON of all that passes and lowering read of a graph."""
    inputs = [[i.name, i.role.value, _constant_digest(i.value)] for i in graph.inputs]
    if sum(i.value.nbytes for i in graph.inputs if i.value is not None) > SMALL:
        raise UnwritableError
    nodes = [_node(node, graph) for node in graph.gm.graph.nodes]
    return json.dumps([graph.phase.value, graph.saved, sorted(graph.notes.items()), inputs, nodes], allow_nan=True)


def _constant_digest(value: torch.Tensor | None) -> str | None:
    return None if value is None else hashlib.sha256(_bytes(value)).hexdigest()


def _bytes(value: torch.Tensor) -> bytes:
    """The elements in row-major order. Raises UnwritableError for a tensor that is no plain memory."""
    if value.layout != torch.strided or value.is_quantized or value.nbytes > SMALL:
        raise UnwritableError
    resolved = value.detach().resolve_conj().resolve_neg().cpu().reshape(-1)
    # Not .contiguous(), which keeps the strides of dimensions of one element as they are (as of a 1x1 convolution's
    # weight in channels-last): such a tensor cannot be viewed as bytes.
    plain = resolved.clone(memory_format=torch.contiguous_format)
    return bytes(plain.view(torch.uint8).numpy().tobytes())


def _node(node: fx.Node, graph: Graph) -> list[Any]:
    if node.op == "get_attr":
        raise UnwritableError
    target = _target(node.target) if node.op == "call_function" else str(node.target)
    given = [argument(a, _node_name) for a in (list(node.args), dict(node.kwargs))]
    value = None if node.op == "output" else _value(node.meta.get("val"), graph)
    return [node.name, node.op, target, given, value, node.meta.get("module", "")]


def _node_name(node: fx.Node) -> str:
    return node.name


def _target(target: Any) -> str:
    if ops.is_overload(target):
        return str(target)
    if target is ops.GETITEM or ops.is_symbolic(target):
        return f"{target.__module__}.{target.__name__}"
    raise UnwritableError


def _value(val: Any, graph: Graph) -> Any:
    """A node's meta["val"]: sizes, strides and offsets with the ranges of their symbols."""
    match val:
        case None | bool() | float():
            return repr(val)
        case int() | torch.SymInt():
            return to_json(graph.to_int(val))
        case list() | tuple():
            return [_value(v, graph) for v in val]
        case torch.Tensor() if val.layout == torch.strided and not val.is_nested and not val.is_quantized:
            numbers = [*val.shape, *val.stride(), val.storage_offset()]
            bits = [val.is_conj(), val.is_neg()]
            return [torch_name(val.dtype), str(val.device), [to_json(graph.to_int(n)) for n in numbers], bits]
    raise UnwritableError


def _devices(graph: Graph) -> list[torch.device]:
    """The devices of all values in a stable order, those without generated kernels (meta) left out."""
    leaves = torch.utils._pytree.tree_leaves([n.meta.get("val") for n in graph.gm.graph.nodes])
    found = {v.device for v in leaves if isinstance(v, torch.Tensor) and v.device.type in ("cpu", "cuda")}
    return sorted(found, key=str)


def _flags() -> dict[str, Any]:
    """torch's global state that decompositions, passes, lowering and library choice look at."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default dtype": torch_name(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "cudnn": [torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic, convolutions_use_tf32()],
        "products": products_use_tf32(),
        "attention": enabled_backends(),
    }


@functools.cache
def _own_source() -> str:
    """A hash of fxopt's source: another version, or an edited checkout, makes plans of its own."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".h")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------- reading and writing


def is_empty() -> bool:
    """Whether no plan is kept where plans would be."""
    folder = default_directory() / FOLDER
    try:
        return next(folder.iterdir(), None) is None
    except OSError:
        return True


def load(key: RecordKey, graph: Graph, store: ArtifactStore, journal: Journal) -> Executor | None:
    """What runs `graph`, from the plan of `key`; None when there is none, or one that cannot be used any more.

    The journal tells what it told when the plan was made. Under journal.strict a plan with retreats counts as absent:
    compiling names them.
    """
    name = key.digest()
    body = store.cache.get_document(FOLDER, name)
    if body is not None and body.get("key") != {"kind": key.kind, "facts": key.facts}:
        _set_aside(store, name, "another key")
        return None
    return _executor(name, body, graph.name, store, journal)


def _executor(name: str, body: Any, graph: str, store: ArtifactStore, journal: Journal) -> Executor | None:
    """What runs the plan in `body`, for the graph of that name."""
    if body is None:
        return None
    try:
        if body["format"] != FORMAT:
            raise ValueError("another format")
        if journal.strict and body["journal"]["retreats"]:
            return None
        with collection_paused():
            with journal.timed("plan cache: reading"):
                plan = Plan.from_json(json.dumps({**body["plan"], "name": graph}))
                constants = {name: _decoded(data) for name, data in body["constants"].items()}
                kernels = {name: store.get(name) for name in body["kernels"]}
            if not all(kernels.values()):
                return None
            with journal.timed("plan cache: binding"):
                executor = Executor(plan, {k: a for k, a in kernels.items() if a is not None}, constants)
            _restore(journal, body["journal"])
    except (PlanError, ValueError, KeyError, TypeError, AttributeError) as error:
        _set_aside(store, name, str(error))
        return None
    except CacheError:  # a kernel that does not load: compiling anew replaces it
        return None
    executor.kept_as = name
    return executor


def _set_aside(store: ArtifactStore, name: str, reason: str) -> None:
    path = store.cache.path / FOLDER / f"{name}.json"
    store.cache.quarantine(path, f"its contents are not a plan: {reason}", lambda: False)


def save(key: RecordKey, plan: Plan, lowered: Lowered, journal: Journal, store: ArtifactStore) -> bool:
    """Remember `plan` for `key`, unless it holds what exists in this process only, or came about under pressure.

    Returns whether it is on disk now.
    """
    if lowered.local_ops or journal.provisional:
        return False
    try:
        constants = {name: _encoded(t) for name, t in lowered.constants.items() if name in {s.name for s in plan.constants}}
    except UnwritableError:
        return False
    body = {
        "format": FORMAT,
        "key": {"kind": key.kind, "facts": key.facts},
        "plan": json.loads(plan.to_json()),
        "kernels": sorted({step.kernel for step in plan.steps if isinstance(step, Launch)}),
        "constants": constants,
        "journal": _kept(journal),
    }
    written = store.cache.try_write(lambda: store.cache.put_document(FOLDER, key.digest(), body))
    store.trim()
    return written


def _encoded(value: torch.Tensor) -> list[Any]:
    shape, strides = list(value.shape), list(value.stride()) if value.layout == torch.strided else []
    return [torch_name(value.dtype), str(value.device), shape, strides, base64.b64encode(_bytes(value)).decode()]


def _decoded(data: list[Any]) -> torch.Tensor:
    dtype, device, shape, strides, text = data
    raw = bytearray(base64.b64decode(text))
    elements = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    plain = elements.view(getattr(torch, dtype)).reshape(shape)
    return torch.empty_strided(shape, strides, dtype=plain.dtype, device=device).copy_(plain)


def _kept(journal: Journal) -> dict[str, Any]:
    return {
        "kernels": [dataclasses.astuple(entry) for entry in journal.kernels],
        "library": journal.library,
        "retreats": journal.retreats,
        "notes": journal.notes,
        "memory": journal.memory,
        "passes": [(name, rewrites, 0.0) for name, rewrites, _ in journal.passes],
    }


def _restore(journal: Journal, kept: dict[str, Any]) -> None:
    entries = [KernelEntry(n, lang, tuple(o), c, size, source) for n, lang, o, c, size, source in kept["kernels"]]
    journal.kernels += entries
    for what in ("library", "retreats", "passes"):
        getattr(journal, what).extend(tuple(item) for item in kept[what])
    for topic, text in kept["notes"]:
        if topic == WARNING:
            journal.warn(text)
        else:
            journal.note(topic, text)
    journal.memory = dict(kept["memory"])
    journal.note("plan", "loaded from the cache: compiled by an earlier process or call")


# ---------------------------------------------------------------------- whole Dynamo graphs


class AutogradShelf:
    """What AOTAutograd made of Dynamo graphs (capture/autograd_cache.py), beside the plans that it names."""

    def __init__(self) -> None:
        self._store = default_store()

    def surroundings(self, options: Options, devices: Sequence[torch.device]) -> dict[str, Any]:
        return surroundings(options, devices)

    def get(self, name: str) -> Any:
        return self._store.cache.get_document(AUTOGRAD_FOLDER, name)

    def put(self, name: str, entry: dict[str, Any]) -> None:
        self._store.cache.try_write(lambda: self._store.cache.put_document(AUTOGRAD_FOLDER, name, entry))
        self._store.trim()

    def reject(self, name: str, reason: str) -> None:
        path = self._store.cache.path / AUTOGRAD_FOLDER / f"{name}.json"
        self._store.cache.quarantine(path, reason, lambda: False)

    def load(
        self, plan: str, phase: Phase, options: Options, journal: Journal
    ) -> Executor | GraphedExecutor | InPieces | None:
        """As `load`, by the name of the plan's document, and what `compile_graph` makes of that."""
        body = self._store.cache.get_document(FOLDER, plan)
        executor = _executor(plan, body, journal.graph, self._store, journal)
        return None if executor is None else with_graphs(executor, phase, options, journal, replay_code(self._store))
