"""From printed kernels to machine code in the store: equal kernels once, known ones not at all, the others in parallel."""

from __future__ import annotations

import base64
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from fxopt.codegen import cpp_build, cxx, triton_build
from fxopt.codegen.workers import Outcome, WorkersUnavailable, describe, shared_pool, worker_count
from fxopt.errors import CacheError
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target

Result = Artifact | CompileFailure
Keyed = list[tuple[str, KernelSource]]

_TRITON_JOB = "fxopt.codegen.compile:triton_job"
_TRITON_WARM_UP = "fxopt.codegen.triton_build:warm_up"
_TRITON_REHEARSAL = "fxopt.codegen.compile:rehearse_triton"


def compile_kernels(sources: Sequence[KernelSource], target: Target, store: ArtifactStore) -> list[Result]:
    """Machine code for each of `sources`, in order; kernels already in `store` are not compiled again.

    What does not compile (or finds no compiler, or hangs) comes back as a CompileFailure with the reason; nothing is raised.
    That a whole language cannot be compiled here is also a warning, once in a process.
    """
    toolchains = {language: _toolchain(language, target) for language in dict.fromkeys(s.language for s in sources)}
    keys = [source.key(toolchains[source.language]) for source in sources]
    unique = dict(zip(keys, sources, strict=True))
    results = _known(unique, store)
    if len(results) < len(unique):
        with store.cache.claimed(min(unique)):  # processes with the same job build its kernels once, not each
            results = _known(unique, store)
            missing = {key: source for key, source in unique.items() if key not in results}
            results.update(_compile(missing, toolchains, target, store))
    return [results[key] for key in keys]


def _known(unique: dict[str, KernelSource], store: ArtifactStore) -> dict[str, Result]:
    return {key: found for key in unique if (found := store.get(key)) is not None}


def _compile(
    missing: dict[str, KernelSource], toolchains: dict[str, str], target: Target, store: ArtifactStore
) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for language, compile_missing in _COMPILERS.items():
        todo = [(key, source) for key, source in missing.items() if source.language == language]
        if todo:
            compiled = compile_missing(todo, target, store, toolchains[language])
            results.update(compiled)
            _report(any(isinstance(r, CompileFailure) for r in compiled.values()), language, target)
    return results


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
        return store.put(key, source.language, source.entry, code, meta, _facts(source, toolchain))
    except (CacheError, OSError) as error:
        return CompileFailure(key, describe(error))


# --- C++


def _compile_cpp(todo: Keyed, target: Target, store: ArtifactStore, toolchain: str) -> dict[str, Result]:
    results: dict[str, Result] = {}
    try:
        with store.cache.scratch() as directory:
            built = cpp_build.compile_cpp([source for _, source in todo], directory, target.cpu_capability)
            for (key, source), code in zip(todo, built, strict=True):
                if isinstance(code, CompileFailure):
                    results[key] = CompileFailure(key, code.reason)
                else:
                    results[key] = _keep(key, source, code, {}, store, toolchain)
    except (CacheError, OSError) as error:
        return {key: results.get(key, CompileFailure(key, describe(error))) for key, _ in todo}
    return results


# --- Triton


def triton_job(source: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel from JSON data to JSON data; what compile workers run."""
    kernel = KernelSource("triton", source["entry"], source["text"], (), compile_options=source["compile_options"])
    code, meta = triton_build.compile_triton(kernel, Target(**target))
    return {"code": base64.b64encode(code).decode(), "meta": meta}


def rehearse_triton() -> None:
    """Compile a small kernel, and read the device functions that others import: a worker's first kernel then takes no
    longer than its next ones (0.2 s less). What Triton keeps of it does not depend on the target."""
    triton_build.read_device_functions()
    triton_build.compile_triton(_PROBE, Target.cuda(90))


_refused: dict[str, str] = {}
"""Targets (by key) that the installed Triton cannot compile for, with the reason."""


def _no_triton(target: Target) -> str | None:
    """Why no Triton kernel can be compiled for `target`, as far as is known by now."""
    if not target.compiles_triton:
        return f"Triton does not support {target.name} (sm_{target.arch})"
    return triton_build.available() or _refused.get(target.key)


_PROBE = KernelSource(
    "triton",
    "fx_probe",
    "import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef fx_probe(b0):\n    tl.store(b0, 1.0)\n",
    ("b0",),
    compile_options={
        "signature": {"b0": "*fp32"},
        "constexprs": {},
        "aligned": [],
        "num_warps": 1,
        "num_stages": 1,
        "asserts": False,
    },
)
"""A kernel that compiles for every target that Triton compiles for."""

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
        (probe,) = _run_jobs([_job(_PROBE, target)], target)
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


def _compile_triton(todo: Keyed, target: Target, store: ArtifactStore, toolchain: str) -> dict[str, Result]:
    reason = _no_triton(target)
    if reason is not None:
        return {key: CompileFailure(key, reason) for key, _ in todo}
    results: dict[str, Result] = {}
    outcomes = _run_jobs([_job(source, target) for _, source in todo], target)
    _learn(outcomes, target)
    for (key, source), outcome in zip(todo, outcomes, strict=True):
        if outcome.error is not None:
            results[key] = CompileFailure(key, _refused.get(target.key) or cxx.essence(outcome.error))
        else:
            code = base64.b64decode(outcome.value["code"])
            results[key] = _keep(key, source, code, outcome.value["meta"], store, toolchain)
    return results


def _run_jobs(jobs: list[dict[str, Any]], target: Target) -> list[Outcome]:
    """In workers; here, with one warning, when there can be none."""
    if worker_count() > 0:
        try:
            return shared_pool(_TRITON_JOB, _TRITON_WARM_UP, _TRITON_REHEARSAL).run(jobs)
        except WorkersUnavailable as error:
            reason = triton_build.broken()
            if reason is not None:
                _refused[target.key] = reason
                return [Outcome(error=reason) for _ in jobs]
            _warn_once("workers", f"fxopt compiles kernels one by one in this process, which is slower: {error}")
    return [_run_here(job) for job in jobs]


def _run_here(job: dict[str, Any]) -> Outcome:
    try:
        return Outcome(triton_job(**job))
    except Exception as error:
        return Outcome(error=describe(error))


# --- warnings


_warned: set[str] = set()


def _report(failed: bool, language: str, target: Target) -> None:
    """Warn when nothing at all can be compiled for `language`. A single kernel that fails is for the caller to judge."""
    general = (cxx.unusable() if language == "cpp" else _no_triton(target)) if failed else None
    if general is not None:
        where = "CPU" if language == "cpp" else "GPU"
        _warn_once(language, f"fxopt leaves {where} operators to ATen instead of fusing them into kernels: {general}")


def _warn_once(kind: str, message: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(message, stacklevel=2)


_COMPILERS: dict[str, Callable[[Keyed, Target, ArtifactStore, str], dict[str, Result]]] = {
    "cpp": _compile_cpp,
    "triton": _compile_triton,
}
