"""The command line: `fxopt cache ls | clear | export FILE | import FILE`."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxopt.errors import CacheError, FxoptError

if TYPE_CHECKING:
    from fxopt.runtime.cachedir import CacheDirectory

app = typer.Typer(
    invoke_without_command=True,
    help="Where compiled kernels, plans and measurements are kept, and how much there is. Without a command: ls.",
)

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="a JSON file of measurements")]


@app.callback()
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        ls()


@app.command()
def ls() -> None:
    """Files, bytes and last use by folder; of measurements, by architecture."""
    from fxopt import knobs
    from fxopt.runtime.cachedir import default_directory, walk

    directory, cap = default_directory(), knobs.CACHE_SIZE.get()
    if not _exists(directory):
        print(f"{directory}: empty")
        return
    groups: dict[str, list[tuple[int, float]]] = {}
    for path, info in walk(directory):
        groups.setdefault(_group(path.relative_to(directory)), []).append((info.st_size, info.st_mtime))
    width = max(map(len, groups), default=0)
    for name, files in sorted(groups.items()):
        print(f"{name:<{width}}  {_amount(size for size, _ in files)}, last used {_ago(max(used for _, used in files))}")
    limit = f"of at most {_size(cap)} (FXOPT_CACHE_SIZE)" if cap else "and no limit"
    print(f"{directory}: {_amount((size for files in groups.values() for size, _ in files), aligned=False)} {limit}")


@app.command()
def clear() -> None:
    """Delete everything in it, measurements too."""
    directory = _own_directory()
    entries = list(directory.iterdir()) if directory.exists() else []
    if entries and not {"tmp", "quarantine"} <= {e.name for e in entries}:
        raise FxoptError(f"{directory} does not look like a cache of fxopt: delete it yourself if you are sure")
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    print(f"{directory}: empty")


@app.command()
def export(file: FileArgument) -> None:
    """Write the measurements of every architecture to FILE, for another machine to import."""
    from fxopt.tune.records import export_records

    with _refusals(file):
        found = export_records(_open(_own_directory()), file)
    print(f"{_count(sum(found.values()), 'record')} of {', '.join(found) or 'no architecture'} written to {file}")


@app.command("import")
def import_(file: FileArgument) -> None:
    """Add the measurements in FILE; those made here stay as they are."""
    from fxopt.tune.records import import_records

    with _refusals(file):
        cache = _open(_own_directory())
        added = import_records(cache, file)
    if cache.temporary:
        raise FxoptError(f"the records could not be kept in {cache.asked}")
    for architecture, count in added.items():
        print(f"{architecture}: {_count(count, 'new record')}")
    print(f"{_count(sum(added.values()), 'new record')} from {file}")


def _exists(directory: Path) -> bool:
    if directory.exists() and not directory.is_dir():
        raise FxoptError(f"{directory} is not a directory; set FXOPT_CACHE_DIR to another place")
    return directory.exists()


def _own_directory() -> Path:
    """The cache directory, refused when there is one that fxopt would not use."""
    from fxopt.runtime.cachedir import default_directory, distrust

    directory = default_directory()
    if _exists(directory) and (reason := distrust(directory)):
        raise FxoptError(f"{directory} is left alone: {reason}")
    return directory


def _open(directory: Path) -> CacheDirectory:
    from fxopt.runtime.cachedir import CacheDirectory

    cache = CacheDirectory(directory)
    if cache.temporary:
        raise FxoptError(f"{directory} cannot be used")
    return cache


@contextlib.contextmanager
def _refusals(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(f"{error.filename or file}: {error.strerror or error}") from error


def _group(path: Path) -> str:
    """The folder that a file is listed under."""
    folders = path.parts[:-1]
    return "/".join(folders[: 2 if folders[:1] == ("records",) else 1]) or "(own notes)"


def _amount(sizes: Iterable[int], aligned: bool = True) -> str:
    found = list(sizes)
    count, size = _count(len(found), "file"), _size(sum(found))
    return f"{count:>14}{size:>14}" if aligned else f"{count}, {size}"


def _size(size: int) -> str:
    return f"{size / 2**10:.1f} KiB" if size < 2**20 else f"{size / 2**20:.1f} MiB"


def _ago(when: float) -> str:
    minutes = max(0.0, time.time() - when) / 60
    if minutes < 100:
        return f"{minutes:.0f} minutes ago"
    return f"{minutes / 60:.0f} hours ago" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} days ago"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
