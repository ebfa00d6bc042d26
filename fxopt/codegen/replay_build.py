"""The compiled code for replays (`replay.cpp`): made once for each torch, Python and compiler, behind the caller's back.

The first that asks for it starts a thread, which finds it in the artifact store or has it compiled, at the lowest priority;
until then, and where there is no compiler, replays go through Python. Nobody waits for it, and the compiler does not outlive
this process.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sysconfig
import threading
import time
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch

from fxopt.codegen import cxx
from fxopt.errors import CacheError
from fxopt.ir.kernel import Artifact
from fxopt.runtime.artifacts import ArtifactStore

log = logging.getLogger("fxopt")

MODULE = "fxopt_replay"
SOURCE = Path(__file__).parent / "replay.cpp"
_TORCH = Path(torch.__file__).parent
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-w")
_LOWEST = ("nice", "-n", "19")
_END_SECONDS = 2.0
"""More than it takes to end the compiler, and to find out that it has ended."""


class ReplayCode:
    """The extension module, once it is there: what `runtime.native_replay.Extension` asks for."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._module: Any = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._is_ending = False
        self.reason: str | None = None

    def __call__(self) -> Any:
        """The module; None as long as it is not there. The first call begins to look for it, and does not wait."""
        if self._module is None and self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._look, name=MODULE, daemon=True)
                    atexit.register(self._end)
                    self._thread.start()
        return self._module

    def wait(self) -> Any:
        """The module when the search for it is over; None if there is none."""
        self()
        assert self._thread is not None
        self._thread.join()
        return self._module

    def _look(self) -> None:
        try:
            artifact = find(self._store) or self._made()
            if isinstance(artifact, Artifact):
                self._module = _load(artifact)
            else:
                self.reason = artifact
        except Exception as error:  # in a thread of nobody's: to be seen where the reason is
            self.reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if self.reason is not None and not self._is_ending:
            log.info("replays of CUDA graphs go through Python: %s", self.reason)

    def _made(self) -> Artifact | str:
        key = _key()
        with self._store.cache.claimed(key):
            return find(self._store) or ("this process ends" if self._is_ending else build(self._store))

    def _end(self) -> None:
        thread = self._thread
        if os.getpid() != self._process or thread is None:
            return
        self._is_ending = True
        deadline = time.monotonic() + _END_SECONDS
        while thread.is_alive() and time.monotonic() < deadline:  # a command may be about to be started
            cxx.end_all()
            thread.join(0.01)


def facts() -> dict[str, str]:
    """What the compiled code depends on."""
    compiler = cxx.find_compiler()
    return {
        "source": hashlib.sha256(SOURCE.read_bytes()).hexdigest(),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "python": str(sysconfig.get_config_var("SOABI")),
        "compiler": cxx.NOT_FOUND if compiler is None else cxx.version(compiler),
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
        if code is None or code._process != os.getpid():
            code = _codes[store.directory] = ReplayCode(store)
        return code
