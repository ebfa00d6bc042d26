"""The headers of C++ kernels, precompiled: parsing them is most of a small compilation (0.9 s of 1.0, then 0.1).

A process that compiles a second time makes them, behind the caller's back, and keeps them in the artifact store, where every
later process finds them for its first kernel. They count there like any kernel: believed by their hash, evicted when they
have not been used for long.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import torch

from fxopt import knobs
from fxopt.codegen import cpp_build, cxx
from fxopt.codegen.background import Background
from fxopt.ir.kernel import Artifact
from fxopt.runtime.artifacts import ArtifactStore

ENTRY = "fxopt_headers"
CALLS_BEFORE = 1
"""Compilations of a process before it makes them: one that compiles a single model has nothing of them."""

_SIZE = 64 << 20
"""More than they take: 48 MB with GCC 12, most of which are the intrinsics of all instruction sets."""
_SHARE_OF_CAP, _SHARE_OF_DISK = 1 / 16, 1 / 4
"""How much of the cache's cap, and of what is free on its disk, they may take."""


class Headers(Background[Artifact]):
    """What makes those of one compiler, with its flags, in one store."""

    without = "C++ kernels are compiled without precompiled headers"

    def __init__(self, store: ArtifactStore, command: tuple[str, ...]) -> None:
        super().__init__()
        self._store, self.command = store, command
        self.key = hashlib.sha256(json.dumps(facts(command), sort_keys=True).encode()).hexdigest()
        self.calls = 0

    def find(self) -> Artifact | None:
        """What this process or an earlier one has made and kept, verified."""
        return self._store.get(self.key)

    def make(self) -> Artifact | str:
        """Find or build them, or say why not."""
        with self._store.cache.claimed(ENTRY):  # a name that no kernel has: others do not wait for this
            found = self.find()
            reason = "this process ends" if self.is_ending else _no_room(self._store)
            return found or reason or self._build()

    def _build(self) -> Artifact | str:
        with self._store.cache.scratch() as directory:
            output = directory / f"{cpp_build.HEADER}.gch"
            source = str(cpp_build.HERE / cpp_build.HEADER)
            command = [*self.command, "-x", "c++-header", source, "-o", str(output)]
            _, reason = cxx.execute(command, cxx.COMPILE_SECONDS)
            if reason is not None:
                return reason
            known = facts(self.command)
            about = {"toolchain": known["compiler"], "language": "cpp", "entry": ENTRY, "options": {}, "text": ""}
            return self._store.put(self.key, "cpp", ENTRY, output, {}, about | known, optional=True)


def facts(command: tuple[str, ...]) -> dict[str, str]:
    """What they depend on."""
    return {
        "headers": cpp_build.headers_hash(),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "compiler": cxx.identity(cxx.find_compiler() or ()),
        "command": " ".join(command),
    }


def _no_room(store: ArtifactStore) -> str | None:
    cap = knobs.CACHE_SIZE.get()
    if cap and cap * _SHARE_OF_CAP < _SIZE:
        return f"the cache's cap of {cap} bytes leaves them no room"
    if shutil.disk_usage(store.directory).free * _SHARE_OF_DISK < _SIZE:
        return "the disk of the cache has no room for them"
    return None


_known: dict[tuple[Path, tuple[str, ...], int], Headers] = {}
_serving: dict[tuple[str, ...], Headers] = {}
"""For each command, those that were found last: another store of this process need not have its own."""
_lock = threading.Lock()


def headers_for(store: ArtifactStore, capability: str) -> Headers | None:
    """This process's for that store and instruction set; None where the compiler has no use for them.

    GCC takes them in place of the header when that is included; Clang would have to be told.
    """
    command = cpp_build.command(capability)
    if command is None or cxx.unusable() is not None or "clang" in cxx.version(cxx.find_compiler() or ()):
        return None
    place = store.directory, command, os.getpid()
    with _lock:
        if place not in _known:
            _known[place] = Headers(store, command)
        return _known[place]


def precompiled(store: ArtifactStore, capability: str) -> Path | None:
    """The precompiled headers for what is about to be compiled; None as long as there are none."""
    headers = headers_for(store, capability)
    if headers is None:
        return None
    headers.calls += 1
    for holder in (headers, _serving.get(headers.command, headers)):
        found = holder.find()
        if found is not None:
            _serving[headers.command] = holder
            return found.path
    if headers.calls > CALLS_BEFORE:
        headers()
    return None
