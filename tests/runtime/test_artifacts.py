"""The store keeps kernels, and believes nothing that is not its own and whole."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxopt.errors import CacheError
from fxopt.runtime import artifacts, cachedir
from fxopt.runtime.artifacts import ArtifactStore, default_store

KEY = "ab" * 32
CODE = b"\x7fELF machine code" * 100


def put(store: ArtifactStore, key: str = KEY, code: bytes = CODE) -> Any:
    return store.put(key, "triton", "kernel", code, {"num_warps": 4}, {"text": "def kernel(): ..."})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    made = ArtifactStore(tmp_path / "cache")
    put(made)
    return made


def test_what_was_put_is_found_by_another_store(store: ArtifactStore) -> None:
    found = ArtifactStore(store.directory).get(KEY)
    assert found is not None
    assert (found.key, found.language, found.entry, found.meta) == (KEY, "triton", "kernel", {"num_warps": 4})
    assert found.path.read_bytes() == CODE
    assert store.get("cd" * 32) is None


def test_key_facts_stand_beside_the_value(store: ArtifactStore) -> None:
    entry = json.loads((store.directory / "entries" / f"{KEY}.json").read_text())["body"]
    assert entry["facts"] == {"text": "def kernel(): ..."} and entry["key"] == KEY


def test_equal_code_is_stored_once(store: ArtifactStore, tmp_path: Path) -> None:
    file = tmp_path / "kernels.so"
    file.write_bytes(CODE)
    paths = {store.put(k * 64, "cpp", f"entry_{k}", file, {}, {}).path for k in "123"}
    assert len(paths) == 1 and paths.pop().suffix == ".so"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def loosen(path: Path) -> None:
    path.chmod(0o666)


def replace_entry(path: Path) -> None:
    """A sound document that is no entry."""
    CacheDirectory = cachedir.CacheDirectory
    CacheDirectory(path.parent.parent).put_document("entries", path.stem, {"key": path.stem, "blob": "../../etc/passwd"})


def link(path: Path) -> None:
    """The same content, but where somebody else may have put it."""
    path.symlink_to(path.rename(path.parent.parent.parent / "elsewhere"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: list[tuple[str, Callable[[Path], None]]] = [
    ("blobs", truncate),
    ("blobs", empty),
    ("blobs", flip),
    ("blobs", Path.unlink),
    ("blobs", loosen),
    ("blobs", link),
    ("blobs", pipe),
    ("blobs", folder),
    ("entries", truncate),
    ("entries", empty),
    ("entries", flip),
    ("entries", loosen),
    ("entries", link),
    ("entries", pipe),
    ("entries", folder),
    ("entries", replace_entry),
]


@pytest.mark.parametrize(("folder", "damage"), DAMAGE, ids=lambda x: getattr(x, "__name__", x))
def test_damage_is_set_aside_reported_once_and_rebuilt(
    store: ArtifactStore, folder: str, damage: Callable[[Path], None]
) -> None:
    put(store, "cd" * 32, b"other code")
    blob = store.get(KEY).path  # type: ignore[union-attr]
    damage(blob if folder == "blobs" else store.directory / "entries" / f"{KEY}.json")
    fresh = ArtifactStore(store.directory)
    with pytest.warns(UserWarning, match=r"damaged file in its cache, .*quarantine") as caught:
        found = [fresh.get(KEY) for _ in range(2)]
    assert len(caught) == 1 and found == [None, None]
    assert any((store.directory / "quarantine").iterdir())
    assert fresh.get("cd" * 32) is not None, "damage costs nothing but what is damaged"
    put(fresh)
    assert ArtifactStore(store.directory).get(KEY).path.read_bytes() == CODE  # type: ignore[union-attr]


def test_damage_after_it_was_verified_is_noticed(store: ArtifactStore) -> None:
    blob = store.get(KEY).path  # type: ignore[union-attr]
    flip(blob)
    os.utime(blob, ns=(1, 1))
    with pytest.warns(UserWarning, match="damaged"):
        assert store.get(KEY) is None


def test_putting_over_damaged_code_mends_it(store: ArtifactStore) -> None:
    blob = store.get(KEY).path  # type: ignore[union-attr]
    truncate(blob)
    put(store, "ef" * 32)
    assert blob.read_bytes() == CODE


def refuse(store: ArtifactStore, asked: Path, caught: Any, reason: str) -> None:
    """The store warned once, naming directory, reason and remedy, and works elsewhere."""
    assert len(caught) == 1
    message = str(caught[0].message)
    assert str(asked) in message and reason in message and "FXOPT_CACHE_DIR" in message
    assert store.directory != asked and put(store) and store.get(KEY) is not None
    assert store.directory.stat().st_mode & 0o077 == 0


def test_a_directory_that_others_may_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.warns(UserWarning, match="cannot use its cache directory") as caught:
        store = ArtifactStore(tmp_path)
    refuse(store, tmp_path, caught, "other users may write to it (mode 777")


def test_a_subdirectory_that_others_may_write(store: ArtifactStore) -> None:
    (store.directory / "blobs").chmod(0o775)
    with pytest.warns(UserWarning, match="cannot use its cache directory") as caught:
        other = ArtifactStore(store.directory)
    refuse(other, store.directory, caught, "blobs/: other users may write")


@pytest.mark.parametrize("name", ["blobs", "tmp", "records/cpu"])
def test_a_link_in_place_of_a_subdirectory(store: ArtifactStore, tmp_path: Path, name: str) -> None:
    """It is not used and, above all, not swept."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    os.utime(precious / "thesis.tex", (1, 1))
    planted = store.directory / name
    planted.parent.mkdir(exist_ok=True)
    if planted.exists():
        planted.rename(tmp_path / "away")
    planted.symlink_to(precious)
    with pytest.warns(UserWarning, match="cannot use its cache directory") as caught:
        other = ArtifactStore(store.directory)
    refuse(other, store.directory, caught, f"{name}/: it is a symbolic link")
    assert [p.name for p in precious.iterdir()] == ["thesis.tex"]


def test_a_link_in_place_of_the_lock(store: ArtifactStore, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("years of work")
    (store.directory / "lock").unlink()
    (store.directory / "lock").symlink_to(precious)
    put(store, "cd" * 32, b"new code")
    assert precious.read_text() == "years of work"


@pytest.mark.parametrize("name", ["tmp", "quarantine"])
def test_a_file_in_place_of_a_subdirectory(store: ArtifactStore, name: str) -> None:
    (store.directory / name).rmdir()
    (store.directory / name).write_text("mine")
    with pytest.warns(UserWarning, match="cannot use its cache directory") as caught:
        other = ArtifactStore(store.directory)
    refuse(other, store.directory, caught, f"{name} in it is not a directory")


@pytest.mark.parametrize("name", ["blobs", "entries"])
def test_a_file_in_place_of_a_folder_of_kernels(store: ArtifactStore, name: str) -> None:
    (store.directory / name).rename(store.directory / "away")
    (store.directory / name).write_text("mine")
    other = ArtifactStore(store.directory)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fxopt found a damaged file")
        assert other.get(KEY) is None
    with pytest.warns(UserWarning, match="cannot use its cache directory") as caught:
        put(other)
    refuse(other, store.directory, caught, "File exists")


def test_a_directory_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def stat(path: Any, **kwargs: Any) -> os.stat_result:
        info = real(path, **kwargs)
        if isinstance(path, (str, Path)) and Path(path) == tmp_path:
            fields = list(info)
            fields[4] = info.st_uid + 1
            return os.stat_result(fields)
        return info

    monkeypatch.setattr(os, "stat", stat)
    with pytest.warns(UserWarning, match="cannot use its cache directory") as caught:
        store = ArtifactStore(tmp_path)
    refuse(store, tmp_path, caught, "belongs to another user")


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a directory")
    with pytest.warns(UserWarning, match="cannot use its cache directory") as caught:
        store = ArtifactStore(tmp_path / "cache")
    refuse(store, tmp_path / "cache", caught, "it is not a directory")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_directory_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        if tmp_path in self.parents:
            raise OSError(code, os.strerror(code), str(self))
        real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.warns(UserWarning, match="cannot use its cache directory") as caught:
        store = ArtifactStore(tmp_path / "cache")
    refuse(store, tmp_path / "cache", caught, os.strerror(code))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_write_permission(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="cannot use its cache directory") as caught:
        store = ArtifactStore(tmp_path / "cache")
    refuse(store, tmp_path / "cache", caught, "Permission denied")


def fill_disk(monkeypatch: pytest.MonkeyPatch, full: Callable[[str], bool]) -> None:
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if full(str(target)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


def test_the_disk_fills_up_later(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = store.directory
    fill_disk(monkeypatch, lambda target: target.startswith(str(asked)))
    with pytest.warns(UserWarning, match="No space left") as caught:
        made = put(store, "cd" * 32, b"new code")
    assert len(caught) == 1 and made.path.read_bytes() == b"new code" and asked not in made.path.parents
    assert store.get("cd" * 32) == made


def test_no_disk_has_room(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, lambda target: True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CacheError, match="No space left"):
            put(store, "cd" * 32, b"new code")


def test_leftovers_of_killed_writers_are_harmless_and_swept(store: ArtifactStore) -> None:
    old, new = store.directory / "tmp" / "old", store.directory / "tmp" / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "half").write_bytes(b"half a kernel")
    (store.directory / "tmp" / "file").write_bytes(b"half a kernel")
    day_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (day_ago, day_ago))
    os.utime(store.directory / "tmp" / "file", (day_ago, day_ago))
    fresh = ArtifactStore(store.directory)
    assert fresh.get(KEY) is not None
    assert [p.name for p in (store.directory / "tmp").iterdir()] == ["new"], "a young one may belong to a living writer"


def test_nothing_is_compiled_on_a_full_disk(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers write there, and do not say clearly what stopped them."""
    asked, real = store.directory, os.statvfs

    def statvfs(path: Any) -> Any:
        found = real(path)
        return os.statvfs_result((*found[:3], 0, 0, *found[5:10])) if asked in Path(path).parents else found

    monkeypatch.setattr(os, "statvfs", statvfs)
    with pytest.warns(UserWarning, match="No space left") as caught, store.cache.scratch() as folder:
        assert asked not in folder.parents
    assert len(caught) == 1


def test_locks_may_be_nested_and_a_forked_child_does_not_keep_them(store: ArtifactStore) -> None:
    with store.cache.locked():
        with store.cache.locked():
            put(store, "cd" * 32, b"new code")
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        script = "import sys; from fxopt.runtime.cachedir import CacheDirectory as C\nwith C(sys.argv[1]).locked(): pass"
        subprocess.run([sys.executable, "-c", script, str(store.directory)], check=True, timeout=30)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_scratch_is_removed(store: ArtifactStore) -> None:
    with store.cache.scratch() as folder:
        (folder / "x").write_text("x")
        assert folder.stat().st_dev == store.directory.stat().st_dev
    assert not folder.exists()


def test_the_default_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXOPT_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cachedir.default_directory() == tmp_path / ".cache" / "fxopt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cachedir.default_directory() == tmp_path / "xdg" / "fxopt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/to/be/ignored")
    assert cachedir.default_directory() == tmp_path / ".cache" / "fxopt"
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path / "own"))
    assert cachedir.default_directory() == tmp_path / "own"
    assert default_store() is default_store() and default_store().directory == tmp_path / "own"
    monkeypatch.setattr(artifacts, "_stores", {})


def test_a_temporary_directory_ends_with_its_process(tmp_path: Path) -> None:
    script = """
        import sys, warnings
        warnings.simplefilter("ignore")
        from fxopt.runtime.artifacts import ArtifactStore
        store = ArtifactStore(sys.argv[1])
        store.put("k" * 64, "cpp", "e", b"code", {}, {})
        print(store.directory)
    """
    tmp_path.chmod(0o777)
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    folder = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    assert folder != tmp_path and not folder.exists()


HAMMER = """
    import random, sys, warnings
    from pathlib import Path
    from fxopt.runtime.artifacts import ArtifactStore
    random.seed(int(sys.argv[2]))
    store = ArtifactStore(sys.argv[1])
    for i in range(150):
        n = random.randrange(10)
        key, code = str(n) * 64, b"code %d " % n * 5000
        found = store.get(key)
        if found is None:
            found = store.put(key, "cpp", f"entry{n}", code, {}, {"n": n})
        assert found.entry == f"entry{n}" and found.path.read_bytes() == code
        if sys.argv[3] == "damage" and random.random() < 0.1:
            (Path(sys.argv[1]) / "entries" / f"{key}.json").write_bytes(b"{")
    print(len(store.cache.damaged))
"""


@pytest.mark.parametrize("mode", ["clean", "damage"])
def test_four_processes_on_one_cold_cache(tmp_path: Path, mode: str) -> None:
    def start(seed: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(HAMMER), str(tmp_path / "cache"), str(seed), mode]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    running = [start(seed) for seed in range(4)]
    results = [(*process.communicate(timeout=120), process.returncode) for process in running]
    assert all(code == 0 for *_, code in results), results[0][1]
    damaged = sum(int(out) for out, *_ in results)
    assert damaged == 0 if mode == "clean" else damaged > 0
    assert not any((tmp_path / "cache" / "tmp").iterdir())


WRITER = """
    import sys
    from fxopt.runtime.artifacts import ArtifactStore
    store = ArtifactStore(sys.argv[1])
    print("ready", flush=True)
    for i in range(10**9):
        n = i % 200
        store.put(f"{n:064d}", "cpp", f"entry{n}", b"code %d " % n * 20000, {}, {"i": i})
        store.cache.put_document("plans", f"plan{n}", {"n": n, "i": i, "text": "plan " * 4000})
        store.trim()
"""


def test_killed_at_any_moment_of_a_write(tmp_path: Path) -> None:
    """kill -9: what is there is whole, what is half is in tmp/, and the next process goes on."""
    cache = tmp_path / "cache"
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(WRITER), str(cache)]
    for _ in range(8):
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0, 0.15))
        writer.kill()
        _, errors = writer.communicate()
        assert not errors
        store = ArtifactStore(cache)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for path in cache.glob("entries/*"):
                found = store.get(path.stem)
                assert found is not None
                assert found.path.read_bytes() == b"code %d " % int(path.stem) * 20000
            for path in cache.glob("plans/*"):
                assert store.cache.get_document("plans", path.stem)["text"] == "plan " * 4000
            for path in cache.glob("blobs/*"):
                assert cachedir.sha256_of(path) == path.stem
        assert {p.name for p in cache.iterdir()} <= {"blobs", "entries", "plans", "quarantine", "tmp", "lock", "usage.json"}
    assert not any((cache / "quarantine").iterdir())
