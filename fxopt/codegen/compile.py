"""From printed kernels to machine code in the store: equal kernels once, known ones not at all, the others in parallel."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from fxopt.codegen import cpp_build, cpp_headers, cxx, triton_build
from fxopt.codegen.triton_job import PROBE, triton_job
from fxopt.codegen.workers import Heard, Outcome, WorkersUnavailable, describe, shared_pool, worker_count
from fxopt.errors import CacheError
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.journal import warn_once
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target

Result = Artifact | CompileFailure
Keyed = list[tuple[str, KernelSource]]
Ready = Callable[[int, Result], Iterable[KernelSource]]
"""What is told the place of a source and what became of it, and gives the sources that are wanted now."""

_TRITON_JOB = "fxopt.codegen.triton_job:triton_job"
_TRITON_WARM_UP = "fxopt.codegen.triton_build:warm_up"
_TRITON_REHEARSAL = "fxopt.codegen.triton_job:rehearse"


def compile_kernels(
    sources: Iterable[KernelSource], target: Target, store: ArtifactStore, ready: Ready | None = None
) -> list[Result]:
    """Machine code for each of `sources`, in order; kernels already in `store` are not compiled again.

    Triton kernels are begun as soon as `sources` gives them, so that printing the next ones takes no time of its own. What
    does not compile (or finds no compiler, or hangs) comes back as a CompileFailure with the reason; nothing is raised but
    what `sources` and `ready` raise. That a whole language cannot be compiled here is also a warning, once in a process.

    When `sources` has come to its end, `ready` is called in this thread with the place of each source and what became of it,
    as soon as that is known: while the others are compiled. It may give more Triton sources, whose places come after all
    others.
    """
    with contextlib.ExitStack() as claims:
        request = _Request(target, store, claims, ready)
        claims.callback(request.trim)  # when others have the claims back
        triton = request.missing_triton(sources)
        while (first := next(triton, None)) is not None:
            results = _compile_triton(chain([first], triton), request)
            _report(any(isinstance(r, CompileFailure) for r in results), "triton", target)
            triton = request.following()  # what those that failed lead to
        if request.missing_cpp:
            compiled = _compile_cpp(request.missing_cpp, target, store, request.toolchains["cpp"])
            for key, result in compiled.items():
                request.tell(key, result)
            _report(any(isinstance(r, CompileFailure) for r in compiled.values()), "cpp", target)
    return [request.known[key] for key in request.keys]


class _Request:
    """The kernels of one call of `compile_kernels`: the key of each, and what is known or missing.

    The first that is missing is claimed until `claims` ends, so that processes with the same job do it once, not each.
    """

    def __init__(self, target: Target, store: ArtifactStore, claims: contextlib.ExitStack, ready: Ready | None) -> None:
        self.target, self.store, self.claims, self.ready = target, store, claims, ready
        self.keys: list[str] = []
        self.known: dict[str, Result] = {}
        self.missing_cpp: Keyed = []
        self.toolchains: dict[str, str] = {}
        self.missing: set[str] = set()
        self._wanted = deque[KernelSource]()
        self._places: dict[str, list[int]] | None = None

    def missing_triton(self, sources: Iterable[KernelSource]) -> Iterator[tuple[str, KernelSource]]:
        """The Triton kernels among `sources` that are not in the store; at the end, those that are there are ready, and what
        they lead to follows."""
        for source in sources:
            key = self._key(source)
            self.keys.append(key)
            if not self._is_new(key):
                continue
            if source.language == "cpp":
                self.missing_cpp.append((key, source))
            else:
                yield key, source
        self._places = {}
        for place, key in enumerate(self.keys):
            self._places.setdefault(key, []).append(place)
        for key, result in list(self.known.items()):
            self.tell(key, result)
        yield from self.following()

    def following(self) -> Iterator[tuple[str, KernelSource]]:
        """The Triton kernels wanted since the last time that are not in the store; those that are there are ready."""
        assert self._places is not None
        while self._wanted:
            source = self._wanted.popleft()
            key = self._key(source)
            self._places.setdefault(key, []).append(len(self.keys))
            self.keys.append(key)
            if self._is_new(key):
                yield key, source
            elif key in self.known:
                self._say(len(self.keys) - 1, self.known[key])

    def _is_new(self, key: str) -> bool:
        """Whether nobody has asked for it and the store does not have it."""
        if key in self.missing or key in self.known or self._is_known(key):
            return False
        self.missing.add(key)
        return True

    def trim(self) -> None:
        """Keep the store within its cap, in which what has been stored counts, also after an error."""
        if self.missing:
            self.store.trim()

    def tell(self, key: str, result: Result) -> None:
        """Note what became of the kernel `key`."""
        self.known[key] = result
        if self._places is not None:
            for place in self._places[key]:
                self._say(place, result)

    def _say(self, place: int, result: Result) -> None:
        if self.ready is not None:
            self._wanted += self.ready(place, result)

    def _key(self, source: KernelSource) -> str:
        if source.language not in self.toolchains:
            self.toolchains[source.language] = _toolchain(source.language, self.target)
        return source.key(self.toolchains[source.language])

    def _is_known(self, key: str) -> bool:
        found = self.store.get(key)
        if found is None and not self.missing:
            self.claims.enter_context(self.store.cache.claimed(key))
            found = self.store.get(key)  # who had the claim may have built it
        if found is not None:
            self.known[key] = found
        return found is not None


def prestart(target: Target) -> None:
    """Begin starting the compile workers for `target` in the background, so that they are ready when the first kernel is."""
    if target.compiles_triton and worker_count() > 0 and triton_build.available() is None:
        try:
            shared_pool(_TRITON_JOB, _TRITON_WARM_UP, _TRITON_REHEARSAL).start()
        except WorkersUnavailable:
            return  # reported when there is something to compile


def toolchain(target: Target) -> str:
    """What kernels for `target` are compiled with, versions and flags included."""
    return _toolchain("cpp" if target.kind == "cpu" else "triton", target)


def _toolchain(language: str, target: Target) -> str:
    return cpp_build.toolchain_id() + f"; {target.key}" if language == "cpp" else triton_build.toolchain_id(target)


def _facts(source: KernelSource, toolchain: str) -> dict[str, Any]:
    """What the key was made of, for people who look into the cache."""
    return {
        "toolchain": toolchain,
        "language": source.language,
        "entry": source.entry,
        "options": source.compile_options,
        "text": source.text,
    }


def _keep(key: str, source: KernelSource, code: Any, meta: dict[str, Any], store: ArtifactStore, toolchain: str) -> Result:
    try:
        return store.put(key, source.language, source.entry, code, meta, _facts(source, toolchain), more=True)
    except (CacheError, OSError) as error:
        return CompileFailure(key, describe(error))


# --- C++


def _compile_cpp(todo: Keyed, target: Target, store: ArtifactStore, toolchain: str) -> dict[str, Result]:
    results: dict[str, Result] = {}
    try:
        headers = cpp_headers.precompiled(store, target.cpu_capability)
        with store.cache.scratch() as directory:
            built = cpp_build.compile_cpp([source for _, source in todo], directory, target.cpu_capability, headers)
            for (key, source), code in zip(todo, built, strict=True):
                if isinstance(code, CompileFailure):
                    results[key] = CompileFailure(key, code.reason)
                else:
                    results[key] = _keep(key, source, code, {}, store, toolchain)
    except (CacheError, OSError) as error:
        return {key: results.get(key, CompileFailure(key, describe(error))) for key, _ in todo}
    return results


# --- Triton


_refused: dict[str, str] = {}
"""Targets (by key) that the installed Triton cannot compile for, with the reason."""


def _no_triton(target: Target) -> str | None:
    """Why no Triton kernel can be compiled for `target`, as far as is known by now."""
    if not target.compiles_triton:
        return f"Triton does not support {target.name} (sm_{target.arch})"
    return triton_build.available() or _refused.get(target.key)


_probed: set[str] = set()
"""Targets (by key) for which the probe has been compiled, or tried."""


def _learn(outcomes: Sequence[Outcome], target: Target) -> None:
    """Where no kernel compiles, remember whether the target is to blame: then nothing else will compile for it either.

    The assembler says so where it has no name for the GPU. Otherwise (it is missing, say) the simplest kernel tells.
    """
    errors = [o.error for o in outcomes if o.error is not None]
    if len(errors) < len(outcomes) or target.key in _refused:
        return
    wanted = f"{target.name} (sm_{target.arch})"
    nameless = any("gpu-name" in error for error in errors)
    if not nameless and target.key not in _probed:
        _probed.add(target.key)
        (probe,) = _run_jobs([_job(PROBE, target)], target)
        if probe.error is not None:
            nameless = "gpu-name" in probe.error
            reason = f"the installed Triton compiles nothing for the GPU {wanted}: {cxx.essence(probe.error)}"
            _refused.setdefault(target.key, reason)
    if nameless:
        _refused[target.key] = f"the installed Triton does not know the GPU {wanted}; install a newer one"


def _job(source: KernelSource, target: Target) -> dict[str, Any]:
    """The arguments of `triton_job`."""
    fields = ("entry", "text", "compile_options")
    return {"source": {f: getattr(source, f) for f in fields}, "target": dataclasses.asdict(target)}


def _compile_triton(missing: Iterable[tuple[str, KernelSource]], request: _Request) -> list[Result]:
    """What became of each of `missing`, which `request` is told."""
    target = request.target
    reason = _no_triton(target)
    if reason is not None:
        refused = [CompileFailure(key, reason) for key, _ in missing]
        for failure in refused:
            request.tell(failure.key, failure)
        return list(refused)
    todo: Keyed = []

    def jobs(missing: Iterable[tuple[str, KernelSource]]) -> Iterator[dict[str, Any]]:
        for key, source in missing:
            todo.append((key, source))
            yield _job(source, target)

    def heard(number: int, outcome: Outcome) -> Iterable[dict[str, Any]]:
        """Keep what has been compiled; why the others have not is known when all are there."""
        if outcome.error is None:
            key, source = todo[number]
            code, meta = base64.b64decode(outcome.value["code"]), outcome.value["meta"]
            request.tell(key, _keep(key, source, code, meta, request.store, request.toolchains["triton"]))
        return jobs(request.following())

    outcomes = _run_jobs(jobs(missing), target, heard)
    _learn(outcomes, target)
    for (key, _), outcome in zip(todo, outcomes, strict=True):
        if outcome.error is not None:
            request.tell(key, CompileFailure(key, _refused.get(target.key) or cxx.essence(outcome.error)))
    return [request.known[key] for key, _ in todo]


def _run_jobs(jobs: Iterable[dict[str, Any]], target: Target, heard: Heard | None = None) -> list[Outcome]:
    """In workers, each as soon as it is there; here, with one warning, when there can be none."""
    given, rest = list[dict[str, Any]](), iter(jobs)
    known: dict[int, Outcome] = {}

    def note(number: int, outcome: Outcome) -> Iterable[dict[str, Any]]:
        known[number] = outcome
        return () if heard is None else _noted(heard(number, outcome), given)

    if worker_count() > 0:
        try:
            return shared_pool(_TRITON_JOB, _TRITON_WARM_UP, _TRITON_REHEARSAL).run(_noted(rest, given), note)
        except WorkersUnavailable as error:
            reason = triton_build.broken()
            if reason is not None:
                _refused[target.key] = reason
                return [Outcome(error=reason) for _ in (*given, *rest)]
            warn_once("workers", f"fxopt compiles kernels one by one in this process, which is slower: {error}")
    given += rest
    for number, job in enumerate(given):  # to which `note` adds
        if number not in known:
            deque(note(number, _run_here(job)), maxlen=0)
    return [known[number] for number in sorted(known)]


def _noted(jobs: Iterable[dict[str, Any]], given: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for job in jobs:
        given.append(job)
        yield job


def _run_here(job: dict[str, Any]) -> Outcome:
    try:
        return Outcome(triton_job(**job))
    except Exception as error:
        return Outcome(error=describe(error))


# --- warnings


def _report(failed: bool, language: str, target: Target) -> None:
    """Warn when nothing at all can be compiled for `language`. A single kernel that fails is for the caller to judge."""
    general = (cxx.unusable() if language == "cpp" else _no_triton(target)) if failed else None
    if general is not None:
        where = "CPU" if language == "cpp" else "GPU"
        warn_once(language, f"fxopt leaves {where} operators to ATen instead of fusing them into kernels: {general}")
