"""The cap holds, least recently used first; nothing that is needed now goes, and nothing is left dangling."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from fxopt import knobs
from fxopt.runtime import eviction
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.runtime.cachedir import RECENT_SECONDS, walk

CODE = b"machine code" * 1000
DAY = 24 * 3600.0


def key(n: int) -> str:
    return f"{n:064d}"


def put(store: ArtifactStore, n: int, code: bytes | None = None) -> Any:
    return store.put(key(n), "cpp", "entry", code or CODE + b"%d" % n, {}, {})


def age(root: Path, seconds: float = DAY) -> None:
    when = time.time() - seconds
    for path, _ in walk(root):
        os.utime(path, (when, when), follow_symlinks=False)


def size(root: Path) -> int:
    return sum(info.st_size for _, info in walk(root))


def kept(store: ArtifactStore) -> set[int]:
    return {int(path.stem) for path in (store.directory / "entries").iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """Ten kernels of about 12 kB, kernel n last used 10 - n days ago."""
    made = ArtifactStore(tmp_path / "cache")
    for n in range(10):
        put(made, n)
        for path in (made.directory / "entries" / f"{key(n)}.json", *made.directory.glob("blobs/*")):
            if path.stat().st_mtime > time.time() - DAY / 2:
                os.utime(path, (time.time() - (10 - n) * DAY,) * 2)
    return made


def trim(store: ArtifactStore, cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a write in a new process."""
    monkeypatch.setenv("FXOPT_CACHE_SIZE", str(cap))
    (store.directory / "usage.json").unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ArtifactStore(store.directory).trim()


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("300000", 300000), ("2GiB", 2 << 30), ("2 gib", 2 << 30), ("1.5k", 1536), ("500MB", 500_000_000), ("7b", 7)],
)
def test_sizes(text: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CACHE_SIZE", text)
    assert knobs.CACHE_SIZE.get() == value


@pytest.mark.parametrize("text", ["much", "-1", "2 apples", "GiB", "1e9"])
def test_no_size(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CACHE_SIZE", text)
    with pytest.warns(UserWarning, match="FXOPT_CACHE_SIZE"):
        assert knobs.CACHE_SIZE.get() == 4 << 30


def test_the_least_recently_used_go_first_entry_and_code(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before = size(store.directory)
    trim(store, before // 2, monkeypatch)
    assert kept(store) == {6, 7, 8, 9}
    assert len(list(store.directory.glob("blobs/*"))) == 4
    assert size(store.directory) <= before // 2
    fresh = ArtifactStore(store.directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [fresh.get(key(n)) is not None for n in range(10)] == [n > 5 for n in range(10)]


def test_below_the_cap_or_without_one_all_stay(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    trim(store, size(store.directory), monkeypatch)
    trim(store, 0, monkeypatch)
    assert len(kept(store)) == 10


def test_reading_is_using(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = store.directory / "entries" / f"{key(0)}.json"
    ArtifactStore(store.directory).get(key(0))
    used = entry.stat().st_mtime
    assert used > time.time() - 60
    ArtifactStore(store.directory).get(key(0))
    assert entry.stat().st_mtime == used, "noted at most every few minutes"
    trim(store, 20_000, monkeypatch)
    assert kept(store) == {0}


def test_what_somebody_may_be_loading_stays(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CACHE_SIZE", "1")
    held = [store.get(key(n)) for n in (2, 3)]
    age(store.directory)
    (store.directory / "usage.json").unlink()
    store.trim()
    assert kept(store) == {2, 3}
    held.clear()
    (store.directory / "usage.json").unlink()
    store.trim()
    assert kept(store) == set()
    put(store, 5)
    assert kept(store) == {5}, "what was just written stays, whatever the cap"
    age(store.directory, RECENT_SECONDS / 2)
    trim(store, 1, monkeypatch)
    assert kept(store) == {5}


def test_code_goes_with_all_its_entries_and_by_the_newest(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in (20, 21, 22):
        put(store, n, CODE)
    age(store.directory)
    os.utime(store.directory / "entries" / f"{key(21)}.json")
    trim(store, 1, monkeypatch)
    assert kept(store) == {20, 21, 22}
    age(store.directory)
    trim(store, 1, monkeypatch)
    assert kept(store) == set() and not any(store.directory.glob("blobs/*"))


def test_quarantine_and_leftovers_go_first_records_never(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    root = store.directory
    store.cache.put_document("records/cpu", "r", {"x": "y" * 5000})
    store.cache.put_document("plans", "old", {"x": "y" * 5000})
    cap = size(root)
    (root / "quarantine" / "q").write_bytes(CODE)
    for name in ("dead", "alive"):
        (root / "tmp" / name).mkdir()
        (root / "tmp" / name / "x.so").write_bytes(CODE)
    age(root / "tmp" / "dead", 2 * eviction.LEFTOVER_SECONDS)
    trim(store, int((cap + 13_000) / eviction.GOAL), monkeypatch)
    assert not any((root / "quarantine").iterdir()) and [p.name for p in (root / "tmp").iterdir()] == ["alive"]
    assert len(kept(store)) == 10
    age(root / "plans")
    age(root / "records")
    trim(store, 1, monkeypatch)
    assert not kept(store) and not any((root / "plans").iterdir())
    assert [p.name for p in root.glob("records/*/*")] == ["r.json"]
    assert (root / "tmp" / "alive" / "x.so").exists()


def test_links_are_deleted_not_followed(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    for folder in ("quarantine", "entries", "blobs", "tmp"):
        (store.directory / folder / "link").symlink_to(precious)
        (store.directory / folder / "file-link").symlink_to(precious / "thesis.tex")
    age(store.directory)
    trim(store, 1, monkeypatch)
    assert (precious / "thesis.tex").read_text() == "years of work"


def test_writes_are_added_up_and_the_directory_walked_now_and_then(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[Path] = []
    monkeypatch.setattr(eviction, "_evict", lambda root, *_: walks.append(root) or size(root))
    monkeypatch.setenv("FXOPT_CACHE_SIZE", str(size(store.directory) + 500_000))
    for n in range(100, 135):
        put(store, n)
    assert walks == []
    usage = store.cache.get_document("", "usage")
    assert abs(usage["bytes"] - size(store.directory)) < 0.01 * usage["bytes"]
    for n in range(200, 230):
        put(store, n)
    assert 1 <= len(walks) <= 10, "beyond the cap not every write walks either, though nothing can be evicted"


def test_a_cap_that_cannot_be_kept_harms_nobody(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(eviction, "_evict", fail)
    trim(store, 1, monkeypatch)
    assert put(store, 50).path.exists()


CHURN = """
    import os, random, sys, time
    from pathlib import Path
    from fxopt.runtime import cachedir, eviction
    eviction.RECENT_SECONDS = 0.05
    from fxopt.runtime.artifacts import ArtifactStore
    random.seed(int(sys.argv[2]))
    store = ArtifactStore(sys.argv[1])
    rebuilt = rounds = 0
    until = time.monotonic() + 60  # what was used a moment ago stays: a quick process sees eviction only after a while
    while rounds < 150 or (rebuilt <= 20 and time.monotonic() < until):
        rounds += 1
        n = random.randrange(40)
        key, code = f"{n:064d}", b"code %d " % (n // 2) * 2000
        found = store.get(key)
        if found is None:
            rebuilt += 1
            found = store.put(key, "cpp", "entry", code, {}, {})
        try:
            assert found.path.read_bytes() == code
        except FileNotFoundError:  # evicted by another process: built again
            store.forget(key, "it does not load")
            store.put(key, "cpp", "entry", code, {}, {})
        store.trim()  # as one who writes something else: who finds all there would never evict what was too new
    print(rebuilt)
"""


def test_processes_that_read_write_and_evict_at_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(CHURN), str(cache)]
    environment = os.environ | {"FXOPT_CACHE_SIZE": "150kB"}
    running = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert int(out) > 20, "there was eviction"
    assert not any((cache / "quarantine").iterdir()) and not any((cache / "tmp").iterdir())
    assert size(cache / "blobs") < 40 / 2 * 16_000, "not all there ever was"
    fresh = ArtifactStore(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(fresh.get(path.stem) for path in cache.glob("entries/*"))
