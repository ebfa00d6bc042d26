"""The compiled code for replays (`replay.cpp`): made once for each torch, Python and compiler, behind the caller's back.

The first that asks for it starts a thread, which finds it in the artifact store or has it compiled, at the lowest priority;
until then, and where there is no compiler, replays go through Python. Nobody waits for it, and the compiler does not outlive
this process.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sysconfig
import threading
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch

from fxopt.codegen import cxx
from fxopt.codegen.background import Background
from fxopt.errors import CacheError
from fxopt.ir.kernel import Artifact
from fxopt.runtime.artifacts import ArtifactStore

MODULE = "fxopt_replay"
SOURCE = Path(__file__).parent / "replay.cpp"
_TORCH = Path(torch.__file__).parent
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-w")
_LOWEST = ("nice", "-n", "19")


class ReplayCode(Background[Any]):
    """The extension module, once it is there: what `runtime.native_replay.Extension` asks for."""

    without = "replays of CUDA graphs go through Python"

    def __init__(self, store: ArtifactStore) -> None:
        super().__init__()
        self._store = store

    def make(self) -> Any:
        """The module, or why there is none."""
        artifact = find(self._store) or self._built()
        return _load(artifact) if isinstance(artifact, Artifact) else artifact

    def _built(self) -> Artifact | str:
        key = _key()
        with self._store.cache.claimed(key):
            return find(self._store) or ("this process ends" if self.is_ending else build(self._store))


def facts() -> dict[str, str]:
    """What the compiled code depends on."""
    compiler = cxx.find_compiler()
    return {
        "source": hashlib.sha256(SOURCE.read_bytes()).hexdigest(),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "python": str(sysconfig.get_config_var("SOABI")),
        "compiler": cxx.NOT_FOUND if compiler is None else cxx.identity(compiler),
        "flags": " ".join(_FLAGS),
    }


def _key() -> str:
    return hashlib.sha256(json.dumps(facts(), sort_keys=True).encode()).hexdigest()


def find(store: ArtifactStore) -> Artifact | None:
    """What an earlier process, or this one, has compiled."""
    return store.get(_key())


def build(store: ArtifactStore) -> Artifact | str:
    """Compile it, or say why that is not possible. Raises CacheError and OSError where nothing can be written."""
    compiler, reason = cxx.find_compiler(), cxx.unusable()
    if compiler is None or reason is not None:
        return reason or cxx.NOT_FOUND
    with store.cache.scratch() as directory:
        output = directory / f"{MODULE}.so"
        priority = _LOWEST if shutil.which(_LOWEST[0]) else ()
        includes = [f"-I{_TORCH / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
        library = _TORCH / "lib" / "libc10.so"
        command = [*priority, *compiler, *_FLAGS, *includes, str(SOURCE), "-o", str(output), str(library)]
        _, reason = cxx.execute(command, cxx.COMPILE_SECONDS)
        if reason is not None:
            return cxx.blame(compiler) or reason
        known = facts()
        about = {
            "toolchain": known["compiler"],
            "language": "cpp",
            "entry": MODULE,
            "options": {},
            "text": SOURCE.read_text(),
        }
        return store.put(_key(), "cpp", MODULE, output, {}, about | known)


def _load(artifact: Artifact) -> Any:
    """Raises ImportError, and CacheError when there is nothing to load."""
    loader = ExtensionFileLoader(MODULE, str(artifact.path))
    spec = importlib.util.spec_from_file_location(MODULE, artifact.path, loader=loader)
    if spec is None:
        raise CacheError(f"{artifact.path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


_codes: dict[Path, ReplayCode] = {}
_codes_lock = threading.Lock()


def replay_code(store: ArtifactStore) -> ReplayCode:
    """The one of this process for that store."""
    with _codes_lock:
        code = _codes.get(store.directory)
        if code is None or code.process != os.getpid():
            code = _codes[store.directory] = ReplayCode(store)
        return code
