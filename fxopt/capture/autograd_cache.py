"""What AOTAutograd made of a Dynamo graph, on disk: a warm start neither traces, nor partitions, nor normalizes it again.

torch has a cache for this (AOTAutogradCache), which knows how to hash Dynamo's graph and how to put a finished graph back
behind its runtime wrappers. It is used here with keys and entries of fxopt's own. What torch would pickle as compiled code
is a `KeptCode`: the name of a finished plan, from which the executor is bound again. Entries lie in fxopt's cache directory
under its rules (`Shelf`), because unpickling a file runs it: no file that another user could have written is ever read.

The key is torch's hash of the graph, its inputs and torch's settings, together with everything else that decides the result
(`Session.facts`). What torch hashes for Inductor's sake is left out: it takes a second to import and to read. An entry is
kept only when all its graphs have plans on disk, and never for

- symbolic sizes, tensor subclasses, layouts other than strided;
- higher-order ops, custom ops and functions other than torch's, whose meaning is not in the graph; tensors that it holds;
- graphs for which AOTAutograd added guards (overlapping inputs of which one is written): a hit could not add them.

torch's hooks are private. Where torch is another version than those tested, or a function has other parameters than those
that were read, nothing is cached, and nothing else changes.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import fx
from torch._functorch import config as functorch_config

from fxopt.capture.decompositions import fingerprint
from fxopt.capture.freeze import Runner
from fxopt.capture.graph_text import graph_text
from fxopt.capture.passage import Passage, through_passage
from fxopt.capture.private import FakeTensor, TracingContext, outside_tracing
from fxopt.ir.graph import Phase
from fxopt.ir.precision import convolutions_use_tf32
from fxopt.journal import RECENT, Journal
from fxopt.options import Options

try:
    from torch._functorch._aot_autograd import autograd_cache
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
    from torch._functorch._aot_autograd.schemas import SerializableAOTDispatchCompiler
    from torch._inductor import config as inductor_config
    from torch._inductor.output_code import OutputCode
except ImportError:  # another torch: `usable` says no
    autograd_cache = inductor_config = None  # type: ignore[assignment]
    AOTAutogradCache = SerializableAOTDispatchCompiler = None  # type: ignore[assignment, misc]
    OutputCode = object  # type: ignore[assignment, misc]

log = logging.getLogger("fxopt")

TESTED = ("2.11", "2.13")
"""Versions of torch whose cache is known to work as this file says."""

_MASKS = ("in_heads", "with_lead", "as_added", "with_nan_rows", "with_open_rows", "with_nan_results", "without_hidden_rows")
OWN_FUNCTIONS = {
    "fxopt.passes.attention.multi_head_attention": "",
    **{f"fxopt.passes.hand_attention.score_mask.{name}": "" for name in _MASKS},
    **{f"fxopt.passes.hand_attention.scored.{name}": "" for name in ("by_head", "of_all_scores")},
}
"""Functions of fxopt's that its early passes put into graphs; fxopt's source is part of every key."""

FORMAT = 1

_PARAMETERS = {
    "_lookup": ["key", "local", "remote", "args", "cache_info", "aot_config"],
    "save": ["key", "entry", "remote"],
}
_OWN_NAMESPACES = ("aten", "prims", "fxopt")
"""Of ops whose meaning does not change under an unchanged torch and fxopt."""

_OWN_MODULES = ("torch", "_operator", "math", "builtins")


class Shelf(Protocol):
    """Where entries and plans are kept; implemented above capture."""

    def surroundings(self, options: Options, devices: Sequence[torch.device]) -> dict[str, Any]:
        """What else than the graph decides its plan. JSON data."""

    def get(self, name: str) -> Any:
        """The entry of that name, None when absent or damaged."""

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Keep an entry (JSON data) if possible."""

    def reject(self, name: str, reason: str) -> None:
        """Set an entry aside that cannot be read."""

    def load(self, plan: str, phase: Phase, options: Options, journal: Journal) -> Runner | None:
        """What runs the plan of that name, None when it cannot be had; the journal tells what it told when it was made."""


class KeptCode(OutputCode):
    """A compiled graph for AOTAutograd: a runner in the boxed convention, and where its plan is kept, if it is.

    Pickled, it is only the plan's name and the phase.
    """

    def __init__(self, run: Runner | None, phase: Phase, plan: str | None, session: Session | None) -> None:
        self.run, self.phase, self.plan, self.session = run, phase, plan, session
        self._boxed_call = True
        self._fx_graph_cache_key = plan  # torch looks whether there is one before it saves
        self._fx_graph_cache_debug_lines = []
        self._time_taken_ns = 0

    def __call__(self, inputs: Sequence[Any]) -> Any:
        return self.run(inputs)  # type: ignore[misc, arg-type]

    def __reduce__(self) -> Any:
        return KeptCode, (None, self.phase, self.plan, None)

    def prepare_for_serialization(self) -> None: ...

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None: ...

    def set_triton_bundle(self, triton_bundle: Any) -> None: ...


class Session:
    """One compilation of a Dynamo graph, as far as the cache has to do with it. It ends with the backward's compilation."""

    def __init__(self, shelf: Shelf, facts: dict[str, Any], number: int, options: Options) -> None:
        self.shelf, self.facts, self.number, self.options = shelf, facts, number, options
        self.on_miss: Callable[[], None] | None = None
        self.name: str | None = None  # of the entry: set by the lookup, unless there shall be none
        self._guards = _guards()
        self.seconds = 0.0
        self.passage: Passage | None = None  # of an inference graph that was found
        self._found: list[Journal] = []

    def missed(self) -> None:
        """AOTAutograd is about to trace the graph: `on_miss` is told, once."""
        on_miss, self.on_miss = self.on_miss, None
        if on_miss is not None:
            on_miss()

    def lookup(self, given: str, args: Sequence[Any], aot_config: Any) -> tuple[Any, bytes] | None:
        """(torch's entry with its code bound, its pickled form), or None.

        `given` is what `key` returned; `args` are AOTAutograd's fake inputs.
        """
        if not all(type(a) is FakeTensor and not _is_symbolic(a) for a in args):
            return None
        static = sorted(aot_config.static_input_indices or ())
        text = json.dumps([FORMAT, given, static, self.facts], sort_keys=True)
        self.name = hashlib.sha256(text.encode()).hexdigest()
        start = time.perf_counter()
        found = self._read(self.name)
        if found is None:
            return None
        self.seconds += time.perf_counter() - start
        self._found.clear()
        if not all(self._bind(part.result) for part in _parts(found[0])):
            self._found.clear()
            return None
        if (code := found[0].compiled_fw.result).phase is Phase.INFERENCE:
            code.run, self.passage = through_passage(code.run, found[0].runtime_metadata)
        self._found[0].seconds["autograd cache"] = self.seconds
        return found

    def key(self, mod: Any, args: Sequence[Any], aot_config: Any) -> str:
        """A hash of what AOTAutograd is given, and of the settings that it and the partitioner read.

        `args` are fake tensors. Raises where torch would not cache the graph, and UnwritableError for what has no canonical
        text: AOTAutograd's cache is then bypassed.
        """
        start = time.perf_counter()
        known = {**inductor_config.unsafe_marked_cacheable_functions, **OWN_FUNCTIONS}
        with inductor_config.patch(unsafe_marked_cacheable_functions=known):
            autograd_cache.check_cacheable(mod)
        settings = functorch_config.save_config(), inductor_config.save_config_portable(ignore_private_configs=False)
        hashed: str = autograd_cache.AOTAutogradCachePickler(mod).get_hash(settings)
        text = json.dumps([hashed, graph_text(mod, args, aot_config)])
        self.seconds += time.perf_counter() - start
        return hashlib.sha256(text.encode()).hexdigest()

    def _read(self, name: str) -> tuple[Any, bytes] | None:
        body = self.shelf.get(name)
        if body is None:
            return None
        try:
            content = bytes.fromhex(body["entry"])
            entry = pickle.loads(content)
            codes = [part.result for part in _parts(entry)]
            if not all(type(code) is KeptCode and isinstance(code.plan, str) for code in codes):
                raise ValueError("it holds other code than plans")
        except Exception as error:  # unpickling raises what it likes
            self.shelf.reject(name, f"its contents are not an entry: {type(error).__name__}: {error}")
            return None
        return entry, content

    def _bind(self, code: KeptCode) -> bool:
        journal = Journal(f"graph {self.number} {code.phase.value}", strict=self.options.strict)
        with journal.timed("plan cache"), outside_tracing():
            code.run = self.shelf.load(str(code.plan), code.phase, self.options, journal)
        journal.note("plan", "not traced by AOTAutograd either: what it made of Dynamo's graph was in the cache")
        self._found.append(journal)
        return code.run is not None

    def compiled_anew(self) -> None:
        """AOTAutograd calls the compiler: there was no entry, or torch could not use it."""
        self.missed()
        self._found.clear()
        self.passage = None
        if _guards() != self._guards:
            self.name = None

    def tell(self) -> None:
        """Put the journals of a hit where those of compilations are."""
        RECENT.extend(self._found)
        self._found.clear()

    def save(self, entry: Any) -> None:
        """Keep torch's `entry` if it can be loaded to the same effect. Never raises."""
        name, self.name = self.name, None
        try:
            if name is None or not _is_plain(entry):
                return
            for text in ("aot_joint_graph_str", "aot_forward_graph_str", "aot_backward_graph_str", "min_cut_info_str"):
                if hasattr(entry, text):
                    setattr(entry, text, None)  # listings for logs, larger than everything else
            with outside_tracing():
                content = pickle.dumps(entry)
                self.shelf.put(name, {"format": FORMAT, "entry": content.hex()})
        except Exception as error:
            log.debug("graph %s is not kept for a warm start: %s: %s", self.number, type(error).__name__, error)


def begin(shelf: Shelf | None, gm: fx.GraphModule, inputs: Sequence[Any], options: Options, number: int) -> Session | None:
    """A session for the compilation of `gm` with Dynamo's `inputs`, or None when its result cannot be kept."""
    if shelf is None or not usable() or not _is_wanted(options):
        return None
    start = time.perf_counter()
    if not _can_be_kept(gm, inputs) or (decomposed := fingerprint()) is None:
        return None
    facts = {
        "surroundings": shelf.surroundings(options, _devices(gm, inputs)),
        "decompositions": decomposed,
        "inputs": [[type(x).__name__, x.requires_grad, x.is_leaf, x._is_view(), x.is_inference()] for x in inputs],
        "shared memory": _shared_memory(inputs),
        "state": _state(),
    }
    session = Session(shelf, facts, number, options)
    session.seconds = time.perf_counter() - start
    return session


@functools.cache
def usable() -> bool:
    """Whether this torch has the cache that this file was written for. Then its hooks are in place."""
    if AOTAutogradCache is None or not torch.__version__.startswith(tuple(f"{v}." for v in TESTED)):
        return False
    try:
        for name, parameters in _PARAMETERS.items():
            if list(inspect.signature(getattr(AOTAutogradCache, name)).parameters) != parameters:
                return False
        if list(inspect.signature(autograd_cache.autograd_cache_key).parameters)[1] != "example_inputs":
            return False
        pickler = autograd_cache.AOTAutogradCachePickler
        if not all(map(callable, (AOTAutogradCache.make_entry, autograd_cache.check_cacheable, pickler.get_hash))):
            return False
    except (AttributeError, IndexError, TypeError, ValueError):
        return False
    _install()
    return True


class _Current(threading.local):
    session: Session | None = None


_current = _Current()


@contextmanager
def looking_up(session: Session | None) -> Iterator[None]:
    """The first lookup of AOTAutograd's cache in this block, on this thread, is the session's."""
    _current.session = session
    try:
        yield
    finally:
        _current.session = None


def serializable(compiler: Callable[..., Any]) -> Any:
    """`compiler` in the form that makes AOTAutograd look into its cache."""
    return SerializableAOTDispatchCompiler(OutputCode, compiler)


def _install() -> None:
    """Four functions of torch's cache ask first whether it is about a graph of fxopt's; all else goes on to torch's own."""
    lookup, make_entry, save = AOTAutogradCache._lookup, AOTAutogradCache.make_entry, AOTAutogradCache.save
    cache_key = autograd_cache.autograd_cache_key

    @functools.wraps(cache_key)
    def fxopt_key(mod: Any, args: Any, aot_config: Any, *rest: Any, **more: Any) -> tuple[str, list[str]]:
        if _current.session is None:
            return cache_key(mod, args, aot_config, *rest, **more)
        try:
            return _current.session.key(mod, args, aot_config), []
        except Exception:
            _current.session.missed()
            raise

    @functools.wraps(lookup)
    def fxopt_lookup(key: str, local: bool, remote: bool, args: Any, cache_info: Any, aot_config: Any) -> Any:
        session, _current.session = _current.session, None
        if session is None:
            return lookup(key, local, remote, args, cache_info, aot_config)
        found = session.lookup(key, args, aot_config) if local else None
        if found is None:
            session.missed()
        return found

    @functools.wraps(make_entry)
    def fxopt_make_entry(*args: Any, **kwargs: Any) -> Any:
        code = _code(kwargs.get("compiled_fw_func", args[0] if args else None))
        if code is None:
            return make_entry(*args, **kwargs)
        try:
            with functorch_config.patch(bundled_autograd_cache=True):
                return make_entry(*args, **kwargs)
        except Exception as error:
            log.debug("no entry for a warm start: %s: %s", type(error).__name__, error)
            return None

    @functools.wraps(save)
    def fxopt_save(key: str, entry: Any, remote: bool) -> None:
        code = getattr(getattr(entry, "compiled_fw", None), "result", None)
        if isinstance(code, KeptCode):
            if code.session is not None:
                code.session.save(entry)
        elif entry is not None:
            save(key, entry, remote)

    autograd_cache.autograd_cache_key = fxopt_key  # type: ignore[assignment]
    AOTAutogradCache._lookup = staticmethod(fxopt_lookup)  # type: ignore[method-assign]
    AOTAutogradCache.make_entry = staticmethod(fxopt_make_entry)  # type: ignore[method-assign]
    AOTAutogradCache.save = staticmethod(fxopt_save)  # type: ignore[method-assign]


def _code(compiled: Any) -> KeptCode | None:
    while not isinstance(compiled, KeptCode) and hasattr(compiled, "__wrapped__"):
        compiled = compiled.__wrapped__
    return compiled if isinstance(compiled, KeptCode) else None


# ---------------------------------------------------------------------- what can be kept


def _is_wanted(options: Options) -> bool:
    """Not when the graphs are to be seen, nor when their weights are constants, nor when torch's cache is not to be used."""
    if options.freeze or options.dump or options.check:
        return False
    dynamo: Any = torch._dynamo.config
    unusual = ("strict_autograd_cache", "bypass_autograd_cache_key", "bundled_autograd_cache")
    return not any(getattr(functorch_config, name, False) for name in unusual) and not any(
        getattr(dynamo, name, False) for name in ("strict_precompile", "caching_precompile")
    )


def _can_be_kept(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    if not isinstance(gm, fx.GraphModule) or hasattr(gm, "saved_tensors_hooks_pack_0"):
        return False
    return all(_is_plain_tensor(x) for x in inputs) and all(_is_known(node) for node in gm.graph.nodes)


def _is_plain_tensor(x: Any) -> bool:
    if type(x) not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
        return False
    return x.layout is torch.strided and not x.is_nested and not x.is_quantized and not _is_symbolic(x)


def _is_symbolic(x: torch.Tensor) -> bool:
    return any(not isinstance(n, int) for n in (*x.shape, *x.stride(), x.storage_offset()))


def _is_known(node: fx.Node) -> bool:
    """Whether the node's text says all that it does, and its sizes are numbers."""
    if node.op in ("get_attr", "call_module") or node.meta.get("custom"):  # annotations, a memory budget among them
        return False
    if node.op == "call_function" and not _is_own(node.target):
        return False
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("example_value"))
    symbols = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return not any(isinstance(v, symbols) or (isinstance(v, torch.Tensor) and not _is_plain_value(v)) for v in leaves)


def _is_plain_value(x: torch.Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested and not _is_symbolic(x)


def _is_own(target: Any) -> bool:
    match target:
        case torch._ops.HigherOrderOperator():
            return False
        case torch._ops.OpOverload():
            return target.namespace in _OWN_NAMESPACES
        case torch._ops.OpOverloadPacket():
            return target._qualified_op_name.partition("::")[0] in _OWN_NAMESPACES
    module = getattr(target, "__module__", None)
    if f"{module}.{getattr(target, '__name__', '')}" in OWN_FUNCTIONS:
        return True
    return module is None or module.partition(".")[0] in _OWN_MODULES


def _parts(entry: Any) -> list[Any]:
    """The entry's forward and, where there is one, its backward."""
    return [part for part in (entry.compiled_fw, entry.compiled_bw) if part is not None]


def _is_plain(entry: Any) -> bool:
    """Whether all of an entry's graphs have plans, and nothing in it needs more than those to be put back."""
    codes = [_code(part.result) for part in _parts(entry)]
    if any(code is None or code.plan is None for code in codes):
        return False
    if entry.maybe_subclass_meta is not None or getattr(entry.runtime_metadata, "tokens", None):
        return False
    return entry.compiled_bw is None or not entry.compiled_bw.backward_state_indices


# ---------------------------------------------------------------------- what the key holds beside torch's hash


def _guards() -> int:
    """How many guards AOTAutograd has added so far in this compilation."""
    context: Any = TracingContext.try_get()
    return 0 if context is None else len(context.guards_context.aotautograd_guards)


def _devices(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> list[torch.device]:
    """Those of all values that have generated kernels, in a stable order."""
    leaves = torch.utils._pytree.tree_leaves([node.meta.get("example_value") for node in gm.graph.nodes])
    found = {x.device for x in (*inputs, *leaves) if isinstance(x, torch.Tensor)}
    return sorted((device for device in found if device.type in ("cpu", "cuda")), key=str)


def _shared_memory(inputs: Sequence[torch.Tensor]) -> list[int]:
    """For each input, the first one in the same storage."""
    first: dict[int, int] = {}
    return [first.setdefault(x.untyped_storage()._cdata, i) for i, x in enumerate(inputs)]


def _state() -> dict[str, Any]:
    """Global state that tracing looks at: which kernels attention is taken apart into, autocast, precisions."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    autocast = {
        device: str(torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    }
    return {
        "torch": torch.version.git_version,
        "autocast": autocast,
        "autocast cache": torch.is_autocast_cache_enabled(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "device": str(torch.get_default_device()),
        "attention": [
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
            cuda.fp16_bf16_reduction_math_sdp_allowed(),
        ],
        "cudnn": [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, convolutions_use_tf32()],
        "precision": [
            torch.get_float32_matmul_precision(),
            cuda.matmul.allow_fp16_reduced_precision_reduction,
            cuda.matmul.allow_bf16_reduced_precision_reduction,
        ],
        "deterministic": [
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        ],
    }
