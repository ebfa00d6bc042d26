"""A directory that can be trusted, and files in it that can be believed.

What is read from disk here ends up as machine code in the user's process, so a cache directory must belong to this user and
nobody else may write to it. Each file is written in a temporary directory of the same file system and renamed into place, so
that a reader sees all of it or nothing; each carries or is covered by a SHA-256, so that damage is noticed. Damaged files
move to `quarantine/` and count as absent.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fxopt import knobs
from fxopt.errors import CacheError

T = TypeVar("T")

_STALE_SECONDS = 24 * 3600


def default_directory() -> Path:
    """FXOPT_CACHE_DIR, else $XDG_CACHE_HOME/fxopt, else ~/.cache/fxopt."""
    chosen = knobs.CACHE_DIR.get()
    if chosen is not None:
        return chosen
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fxopt"


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def distrust(path: Path) -> str | None:
    """Why the existing directory `path` cannot be trusted, or None. Raises OSError when it cannot be examined."""
    info = os.stat(path)
    if not stat.S_ISDIR(info.st_mode):
        return "it is not a directory"
    if info.st_uid != os.geteuid():
        return f"it belongs to another user (uid {info.st_uid})"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users may write to it (mode {stat.S_IMODE(info.st_mode):o}; chmod go-w would do)"
    return None


class CacheDirectory:
    """A trusted, writable directory: the one asked for or, with one warning, a temporary one of this process.

    `path` is where it is now; it changes if writing fails later (disk full, remounted read-only). Safe for several processes
    and threads at once.
    """

    def __init__(self, directory: Path | str) -> None:
        self.asked = Path(directory).expanduser().absolute()
        self.temporary = False
        self.damaged: list[str] = []
        self._lock = threading.RLock()
        reason = self._prepare(self.asked)
        self.path = self.asked if reason is None else self._retreat(reason)

    # --- a directory to trust

    def _prepare(self, path: Path) -> str | None:
        """Create `path` with its folders; why it cannot be used, or None."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("tmp", "quarantine"):
                (path / name).mkdir(mode=0o700, exist_ok=True)
            for folder in (path, *(child for child in path.iterdir() if child.is_dir())):
                reason = distrust(folder)
                if reason is not None:
                    return reason if folder == path else f"{folder.name}/: {reason}"
            self._sweep(path / "tmp")
            with tempfile.TemporaryFile(dir=path / "tmp"):
                return None
        except FileExistsError:
            return "it is not a directory"
        except OSError as error:
            return error.strerror or str(error)

    def _retreat(self, reason: str) -> Path:
        warnings.warn(
            f"fxopt cannot use its cache directory {self.asked}: {reason}. Compiled kernels last for this process only; "
            "set FXOPT_CACHE_DIR to a directory with free space that you own and only you can write",
            stacklevel=4,
        )
        return self._temporary_directory(reason)

    def _temporary_directory(self, reason: str) -> Path:
        try:
            path = Path(tempfile.mkdtemp(prefix="fxopt-"))
            failure = self._prepare(path)
        except OSError as error:
            failure = str(error)
        if failure is not None:
            raise CacheError(
                f"fxopt cannot write to its cache directory {self.asked} ({reason}) nor to a temporary one ({failure}); set "
                "FXOPT_CACHE_DIR to a directory that you own and only you can write, or free some space"
            )
        self.temporary = True
        atexit.register(_remove_if_owner, path, os.getpid())
        return path

    @staticmethod
    def _sweep(folder: Path) -> None:
        """Remove what writers that were killed left behind long ago."""
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_SECONDS:
                    _remove(Path(entry.path))

    def folder(self, name: str) -> Path:
        """A subfolder, created when needed. Raises OSError."""
        path = self.path / name
        if not path.is_dir():
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    # --- atomic writing

    def write(self, action: Callable[[], T]) -> T:
        """Run `action`, which writes below `path`; if the file system refuses, once more in a temporary directory.

        Raises CacheError when that fails too.
        """
        try:
            return action()
        except OSError as error:
            reason = error.strerror or str(error)
        with self._lock:
            if not self.temporary:
                self.path = self._retreat(reason)
        try:
            return action()
        except OSError as error:
            raise CacheError(f"fxopt cannot write to {self.path}: {error.strerror or error}; free some space") from error

    def try_write(self, action: Callable[[], object]) -> bool:
        """Like `write`, for what need not last: False instead of an error."""
        try:
            self.write(action)
        except CacheError:
            return False
        return True

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private temporary directory in the cache's file system, removed afterwards."""
        path = self.write(lambda: Path(tempfile.mkdtemp(dir=self.folder("tmp"))))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def put_bytes(self, folder: str, name: str, data: bytes) -> Path:
        """Write a file atomically, replacing one of that name. Raises OSError."""
        handle, temporary = tempfile.mkstemp(dir=self.folder("tmp"))
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            target = self.folder(folder) / name
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        return target

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclusive among threads and processes; where the file system has no locks, among threads."""
        with self._lock, contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                file = stack.enter_context(open(self.path / "lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # --- documents: JSON that knows its own checksum

    def put_document(self, folder: str, name: str, body: Any) -> Path:
        """Write `body` (JSON data) as folder/name.json. Raises OSError."""
        data = json.dumps({"sha256": _digest(body), "body": body}, sort_keys=True, indent=1)
        return self.put_bytes(folder, f"{name}.json", data.encode())

    def get_document(self, folder: str, name: str) -> Any:
        """What `put_document` wrote, or None when absent or damaged (which is reported once and moved away)."""
        path = self.path / folder / f"{name}.json"
        try:
            return _body(_read_own(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            self.report_damage(path, error.strerror or str(error))
        except ValueError as error:
            self.quarantine(path, str(error), lambda: _is_sound(path))
        return None

    # --- damage

    def quarantine(self, path: Path, reason: str, sound: Callable[[], bool]) -> None:
        """Move the damaged file `path` away unless, looked at again under the lock, it is `sound` (another process mended
        it)."""
        try:
            with self.locked():
                if sound():
                    return
                os.replace(path, self.folder("quarantine") / f"{path.name}.{time.time_ns()}")
        except FileNotFoundError:
            return  # another process has set it aside
        except OSError:
            reason += "; it could not be moved away"
        self.report_damage(path, reason)

    def report_damage(self, path: Path, reason: str) -> None:
        """Warn about a damaged file; after the first of this directory only count them in `damaged`."""
        self.damaged.append(f"{path}: {reason}")
        if len(self.damaged) == 1:
            warnings.warn(
                f"fxopt found a damaged file in its cache, {path} ({reason}). It is set aside in "
                f"{self.path / 'quarantine'} and built again; this is reported once",
                stacklevel=4,
            )


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _body(data: bytes) -> Any:
    """The body of a document. Raises ValueError saying what is wrong with it."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not complete JSON") from error
    if not isinstance(document, dict) or document.keys() != {"sha256", "body"}:
        raise ValueError("it is not a cache document")
    if document["sha256"] != _digest(document["body"]):
        raise ValueError("its checksum does not match")
    return document["body"]


def _read_own(path: Path) -> bytes:
    """The content of a file. Raises ValueError when someone else could have written it, OSError when it cannot be read."""
    with open(path, "rb") as file:
        info = os.fstat(file.fileno())
        if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError("other users may write to it")
        return file.read()


def _is_sound(path: Path) -> bool:
    try:
        _body(_read_own(path))
    except ValueError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_if_owner(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child must not remove its parent's directory
        shutil.rmtree(path, ignore_errors=True)
