"""A directory that can be trusted, and files in it that can be believed.

What is read from disk here ends up as machine code in the user's process, so a cache directory must belong to this user and
nobody else may write to it. Each file is written in a temporary directory of the same file system and renamed into place, so
that a reader sees all of it or nothing; each carries or is covered by a SHA-256, so that damage is noticed. Damaged files
move to `quarantine/` and count as absent. Links are not followed: they may lead to what somebody else has written.

A file's modification time says when it was last used: reading a document renews it. `runtime/eviction.py` goes by that.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import hashlib
import io
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

RECENT_SECONDS = 600.0
"""What was used this recently may be about to be loaded by some process: it is not evicted."""

ROOM = 16 << 20
"""Bytes that must be free where something is compiled: compilers do not say clearly that a disk is full."""

PATIENCE_SECONDS = 120.0
"""How long to wait for what another process is building before building it too."""

_STALE_SECONDS = 24 * 3600


def default_directory() -> Path:
    """FXOPT_CACHE_DIR, else $XDG_CACHE_HOME/fxopt, else ~/.cache/fxopt."""
    chosen = knobs.CACHE_DIR.get()
    if chosen is not None:
        return chosen
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fxopt"


def sha256_of(path: Path) -> str:
    """Raises as `open_own`."""
    with open_own(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def open_own(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading. Raises ValueError when it is no plain file that only this user could have written, OSError
    when it cannot be read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not block
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("it is a symbolic link") from error
        raise
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("it is not a file")
        if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError("other users may write to it")
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def walk(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file below `root`, links not followed; those that vanish meanwhile are left out."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(OSError):
                yield path, os.lstat(path)


def distrust(path: Path, *, follow: bool = True) -> str | None:
    """Why the existing directory `path` cannot be trusted, or None. Raises OSError when it cannot be examined.

    Unless `follow`, a link to a directory is none.
    """
    info = os.stat(path, follow_symlinks=follow)
    if stat.S_ISLNK(info.st_mode):
        return "it is a symbolic link"
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
        self._locks_held = 0
        self._written = 0
        reason = self._prepare(self.asked)
        self.path = self.asked if reason is None else self._retreat(reason)

    # --- a directory to trust

    def _prepare(self, path: Path) -> str | None:
        """Create `path` with its folders; why it cannot be used, or None."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("tmp", "quarantine"):
                (path / name).mkdir(mode=0o700, exist_ok=True)
            for folder in (path, *(child for child in path.iterdir() if child.is_dir()), *(path / "records").glob("*/")):
                reason = distrust(folder, follow=folder == path)
                if reason is not None:
                    return reason if folder == path else f"{folder.relative_to(path)}/: {reason}"
            self._sweep(path / "tmp")
            with tempfile.TemporaryFile(dir=path / "tmp"):
                return None
        except FileExistsError as error:
            inside = Path(str(error.filename)).parent == path
            return f"{Path(error.filename).name} in it is not a directory" if inside else "it is not a directory"
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
                    remove(Path(entry.path))

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
        path = self.write(self._scratch)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _scratch(self) -> Path:
        parent = self.folder("tmp")
        space = os.statvfs(parent)
        if space.f_blocks and space.f_bavail * space.f_frsize < ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return Path(tempfile.mkdtemp(dir=parent))

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
        with self._lock:
            self._written += len(data)
        return target

    def take_written(self) -> int:
        """Bytes written here since the last call."""
        with self._lock:
            written, self._written = self._written, 0
        return written

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclusive among threads and processes; where the file system has no locks, among threads. May be nested."""
        with self._lock, contextlib.ExitStack() as stack:
            if self._locks_held == 0:
                with contextlib.suppress(OSError):
                    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                    handle = os.open(self.path / "lock", flags, 0o600)
                    stack.callback(os.close, handle)
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    # Not left to close(): a child forked meanwhile has the file open too.
                    stack.callback(fcntl.flock, handle, fcntl.LOCK_UN)
            self._locks_held += 1
            try:
                yield
            finally:
                self._locks_held -= 1

    @contextlib.contextmanager
    def claimed(self, name: str) -> Iterator[None]:
        """While another thread or process is in the block under `name`, wait, but not for ever: nothing but time depends on
        it."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                handle = os.open(self.folder("claims") / name[:2], flags, 0o600)
                stack.callback(os.close, handle)
                stack.callback(fcntl.flock, handle, fcntl.LOCK_UN)
                _wait_for(handle, PATIENCE_SECONDS)
            yield

    # --- documents: JSON that knows its own checksum

    def put_document(self, folder: str, name: str, body: Any) -> Path:
        """Write `body` (JSON data) as folder/name.json, on one line: json indents in Python, a tenth of a second for a plan.
        Raises OSError."""
        data = json.dumps({"sha256": _digest(body), "body": body}, sort_keys=True)
        return self.put_bytes(folder, f"{name}.json", data.encode())

    def get_document(self, folder: str, name: str) -> Any:
        """What `put_document` wrote, or None when absent or damaged (which is reported once and moved away)."""
        path = self.path / folder / f"{name}.json"
        try:
            return _body(_read_own(path, used=True))
        except (FileNotFoundError, NotADirectoryError):
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


def _wait_for(handle: int, seconds: float) -> None:
    """Take the lock of a file unless it stays taken for `seconds`. Raises OSError where there are no locks."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return


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


def _read_own(path: Path, used: bool = False) -> bytes:
    """The content of a file, which is noted as `used` now. Raises as `open_own`."""
    with open_own(path) as file:
        if used and time.time() - os.fstat(file.fileno()).st_mtime > RECENT_SECONDS / 2:
            with contextlib.suppress(OSError):
                os.utime(file.fileno())
        return file.read()


def _is_sound(path: Path) -> bool:
    try:
        _body(_read_own(path))
    except ValueError:
        return False
    return True


def remove(path: Path) -> None:
    """Delete a file, a link or a directory with all that is in it. Raises OSError for the first two."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_if_owner(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child must not remove its parent's directory
        shutil.rmtree(path, ignore_errors=True)
