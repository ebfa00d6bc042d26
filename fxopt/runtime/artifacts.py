"""Compiled kernels on disk.

    blobs/<sha256><suffix>     machine code, named after its content; several kernels may share one shared object
    entries/<key>.json         for each kernel: which blob, its entry point, and every fact its key was made of

An entry is believed only if its own checksum holds, and its blob only if the content hashes to the name the entry gives it.
Everything about trust, atomicity and damage is in `runtime/cachedir.py`, about the size cap in `runtime/eviction.py`.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from pathlib import Path
from typing import Any

from fxopt.ir.kernel import Artifact
from fxopt.runtime import eviction
from fxopt.runtime.cachedir import CacheDirectory, default_directory, sha256_of

FORMAT = 1


class ArtifactStore:
    """Artifacts by key in one directory. Safe for several threads and processes at once; never raises for a damaged cache.

    A directory that cannot be used (not writable, owned by someone else, writable by others, disk full) gives one warning
    and a temporary directory for this process. CacheError is raised only when that cannot be had either.
    """

    def __init__(self, directory: Path | str | None = None) -> None:
        self.cache = CacheDirectory(default_directory() if directory is None else directory)
        self._verified: dict[Path, tuple[int, int, int]] = {}
        self._given: weakref.WeakValueDictionary[int, Artifact] = weakref.WeakValueDictionary()
        self._given_lock = threading.Lock()

    @property
    def directory(self) -> Path:
        """Where artifacts are now."""
        return self.cache.path

    def get(self, key: str) -> Artifact | None:
        """The artifact of `key`, its machine code verified; None when absent or damaged."""
        body = self.cache.get_document("entries", key)
        if body is None:
            return None
        entry = self.directory / "entries" / f"{key}.json"
        if not _is_entry(body, key):
            self.cache.quarantine(entry, "its contents are not an entry of this key", lambda: False)
            return None
        path = self.directory / "blobs" / str(body["blob"])
        if not self._sound(path, body["sha256"]):
            self._drop(entry, path, body["sha256"])
            return None
        return self._give(Artifact(key, body["language"], body["entry"], path, body["meta"]))

    def put(
        self,
        key: str,
        language: str,
        entry: str,
        code: Path | bytes,
        meta: dict[str, Any],
        facts: dict[str, Any],
        *,
        more: bool = False,
        optional: bool = False,
    ) -> Artifact:
        """Store machine code (bytes, or a file whose content is copied) under `key`; `facts` says what the key was made of.

        `meta` and `facts` are JSON data. Who has `more` to store calls `trim` after the last one. Raises CacheError when
        neither the cache nor a temporary directory can be written. For what is `optional` there is no temporary directory:
        OSError when the cache cannot be written.
        """
        suffix = code.suffix if isinstance(code, Path) else {"cpp": ".so", "triton": ".cubin"}.get(language, ".bin")
        data = code.read_bytes() if isinstance(code, Path) else code
        digest = hashlib.sha256(data).hexdigest()
        body = {
            "format": FORMAT,
            "key": key,
            "language": language,
            "entry": entry,
            "blob": digest + suffix,
            "sha256": digest,
            "meta": meta,
            "facts": facts,
        }
        path = self._write(key, body, data) if optional else self.cache.write(lambda: self._write(key, body, data))
        artifact = self._give(Artifact(key, language, entry, path, meta))
        if not more:
            self.trim()
        return artifact

    def forget(self, key: str, reason: str) -> None:
        """Set the entry of `key` aside, because of `reason`: the next `get` finds nothing.

        Not where machine code that this process holds is gone (evicted by another process): that is reason enough for what
        did not load, and `get` will see it.
        """
        if any(not path.exists() for path in self._in_use()):
            return
        self.cache.quarantine(self.directory / "entries" / f"{key}.json", reason, lambda: False)

    def trim(self) -> None:
        """Keep the directory within the size cap; what has been written is worth a look only now and then. Never raises."""
        eviction.keep_within_cap(self.cache, self._in_use)

    def _give(self, artifact: Artifact) -> Artifact:
        """Remember `artifact` for as long as anybody holds it: it may be about to be loaded."""
        with self._given_lock:
            self._given[id(artifact)] = artifact
        return artifact

    def _in_use(self) -> set[Path]:
        with self._given_lock:
            return {artifact.path for artifact in self._given.values()}

    def _write(self, key: str, body: dict[str, Any], data: bytes) -> Path:
        path = self.directory / "blobs" / str(body["blob"])
        with self.cache.locked():
            if not path.exists() or not self._sound(path, body["sha256"]):
                path = self.cache.put_bytes("blobs", body["blob"], data)
            self.cache.put_document("entries", key, body)
        return path

    def _sound(self, path: Path, digest: str) -> bool:
        """Whether the file hashes to `digest`; remembered for as long as the file is not touched."""
        try:
            info = os.lstat(path)
            stamp = (info.st_ino, info.st_size, info.st_mtime_ns)
            if self._verified.get(path) != stamp:
                if path.stem != digest or sha256_of(path) != digest:
                    return False
                self._verified[path] = stamp
        except (OSError, ValueError):
            return False
        return True

    def _drop(self, entry: Path, blob: Path, digest: str) -> None:
        """Set aside an entry whose machine code is missing or damaged, and the damaged file."""
        if blob.exists():
            self.cache.quarantine(blob, "its checksum does not match", lambda: self._sound(blob, digest))
        self.cache.quarantine(entry, "its machine code is missing or damaged", lambda: self._sound(blob, digest))


def _is_entry(body: Any, key: str) -> bool:
    kinds = {"language": str, "entry": str, "blob": str, "sha256": str, "meta": dict}
    return (
        isinstance(body, dict)
        and body.get("format") == FORMAT
        and body.get("key") == key
        and all(isinstance(body.get(name), kind) for name, kind in kinds.items())
        and os.path.basename(body["blob"]) == body["blob"]
    )


_stores: dict[tuple[Path, int], ArtifactStore] = {}
_stores_lock = threading.Lock()


def default_store() -> ArtifactStore:
    """This process's store in the directory that FXOPT_CACHE_DIR and XDG_CACHE_HOME name now."""
    where = (default_directory(), os.getpid())
    with _stores_lock:
        if where not in _stores:
            _stores[where] = ArtifactStore(where[0])
        return _stores[where]
