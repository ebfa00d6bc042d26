"""The size cap of a cache directory: when it is passed, what was used least recently goes.

    usage.json      {"bytes": about how much there is, "kept": what the last look left, "looked": when that was}

What is written is added up there, under the lock; only when the sum passes the cap is the directory walked, sized exactly
and cut to nine tenths of the cap. First go the quarantine and what killed writers have left, then kernels (machine code
together with every entry that names it) and plans, in the order of their last use. Records are kept, which are small and
dear; so is what was used within RECENT_SECONDS and what this process is about to load: the cap gives way to them.

A reader in another process may lose a file between finding it and loading it. That is an absent kernel, and built again. A
shared object that is loaded stays so.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt import knobs
from fxopt.runtime.cachedir import RECENT_SECONDS, CacheDirectory, open_own, remove, walk

GOAL = 0.9
"""The share of the cap that is left, so that the next writes do not walk again."""

AGAIN = 1 / 16
"""When the cap had to give way: the share of it that is written before another walk, unless RECENT_SECONDS have passed."""

LEFTOVER_SECONDS = 3600.0
"""Compilers are stopped long before: what is older in tmp/ has no writer any more."""


@dataclass(frozen=True)
class _Item:
    """What is deleted as a whole, `paths` in that order: an entry never names machine code that is gone."""

    paths: tuple[Path, ...]
    size: int
    used: float


def keep_within_cap(cache: CacheDirectory, in_use: Callable[[], set[Path]]) -> None:
    """Note what this process has written to `cache`, and evict where that passes the cap (FXOPT_CACHE_SIZE).

    `in_use` names machine code that must stay. Never raises OSError: a cap that cannot be kept now is kept later.
    """
    cap = knobs.CACHE_SIZE.get()
    if cap == 0:
        return
    with contextlib.suppress(OSError), cache.locked():
        written, now = cache.take_written(), time.time()
        usage = cache.get_document("", "usage")
        if not _is_usage(usage) or _is_due(usage, usage["bytes"] + written, cap, now):
            left = _evict(cache.path, cap, in_use(), now)
            usage = {"bytes": left, "kept": left, "looked": now}
        else:
            usage["bytes"] += written
        cache.put_document("", "usage", usage)
        cache.take_written()


def _is_usage(usage: Any) -> bool:
    return isinstance(usage, dict) and all(isinstance(usage.get(k), (int, float)) for k in ("bytes", "kept", "looked"))


def _is_due(usage: dict[str, float], size: float, cap: int, now: float) -> bool:
    return size > cap and (size - usage["kept"] > cap * AGAIN or abs(now - usage["looked"]) > RECENT_SECONDS)


def _evict(root: Path, cap: int, in_use: set[Path], now: float) -> int:
    """Delete until at most GOAL of `cap` is left, or nothing that may be deleted. Returns the bytes left."""
    sizes = {path: info.st_size for path, info in walk(root)}
    total = sum(sizes.values())
    if total <= cap:
        return total
    for item in (*_by_use(_rubbish(root, now)), *_by_use(_kernels_and_plans(root, in_use, now))):
        if total <= cap * GOAL:
            break
        with contextlib.suppress(OSError):
            for path in item.paths:
                remove(path)
            total -= item.size
    return total


def _by_use(items: Iterator[_Item]) -> list[_Item]:
    return sorted(items, key=lambda item: item.used)


def _rubbish(root: Path, now: float) -> Iterator[_Item]:
    for folder, age in (("quarantine", 0.0), ("tmp", LEFTOVER_SECONDS)):
        trees: dict[Path, list[os.stat_result]] = {}
        for path, info in walk(root / folder):
            trees.setdefault(root / folder / path.relative_to(root / folder).parts[0], []).append(info)
        for path, found in trees.items():
            used = max(info.st_mtime for info in found)
            if now - used >= age:
                yield _Item((path,), sum(info.st_size for info in found), used)


def _kernels_and_plans(root: Path, in_use: set[Path], now: float) -> Iterator[_Item]:
    """Those that may be deleted."""
    blobs: dict[Path, list[tuple[Path, int, float]]] = {}
    folders = ("plans", "autograd")
    plans = [[(path, info.st_size, info.st_mtime)] for folder in folders for path, info in walk(root / folder)]
    for path, info in walk(root / "entries"):
        blobs.setdefault(root / "blobs" / _blob(path), []).append((path, info.st_size, info.st_mtime))
    for path, info in walk(root / "blobs"):
        blobs.setdefault(path, []).append((path, info.st_size, info.st_mtime))  # last: it goes after its entries
    for group in (*(files for blob, files in blobs.items() if blob not in in_use), *plans):
        used = max(mtime for *_, mtime in group)
        if now - used > RECENT_SECONDS:
            yield _Item(tuple(path for path, *_ in group), sum(size for _, size, _ in group), used)


def _blob(entry: Path) -> str:
    """The file that an entry names, to be grouped with it, not to be believed. A damaged entry is a group of its own."""
    try:
        with open_own(entry) as file:
            return Path(json.loads(file.read())["body"]["blob"]).name or entry.name
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return entry.name
