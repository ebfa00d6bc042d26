"""A kernel that hangs, or whose process dies while it is tried, is not tried again."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from fxopt.capture.private import PASS_THROUGH
from fxopt.errors import HungKernelError
from fxopt.runtime.cachedir import CacheDirectory
from fxopt.tune.suspects import FOLDER, Suspects


@pytest.fixture
def cache(tmp_path: Path) -> CacheDirectory:
    return CacheDirectory(tmp_path / "cache")


def after(queries: int) -> Callable[[], bool]:
    """An event that has happened when it is asked for the `queries`th time."""
    answers = iter([False] * (queries - 1))
    return lambda: next(answers, True)


def never() -> bool:
    return False


def documents(cache: CacheDirectory) -> list[str]:
    return [path.stem for path in (cache.path / FOLDER).glob("*.json")]


def test_a_kernel_is_a_suspect_until_it_has_ended(cache: CacheDirectory) -> None:
    suspects = Suspects(cache)
    with suspects.on_trial("k", "kernel", after(3)):
        assert documents(cache) == ["k"]
    assert documents(cache) == []
    with suspects.on_trial("k", "kernel", never):  # has ended before: not watched again
        assert documents(cache) == []
    assert suspects.reason("k") is None


def test_a_kernel_that_hangs_is_a_named_error_and_stays_a_suspect(cache: CacheDirectory) -> None:
    suspects = Suspects(cache, limit=0.05)
    with pytest.raises(HungKernelError, match="kernel has not ended") as raised, suspects.on_trial("k", "kernel", never):
        pass
    assert str(cache.path / FOLDER / "k.json") in str(raised.value)
    reason = Suspects(cache, limit=0.05).reason("k")
    assert reason is not None and "did not end" in reason
    assert HungKernelError in PASS_THROUGH, "eager would hang, too"


def test_without_a_cache_a_hang_is_still_an_error() -> None:
    suspects = Suspects(None, limit=0.02)
    with pytest.raises(HungKernelError), suspects.on_trial("k", "kernel", never):
        pass
    assert suspects.reason("k") is None


def test_what_ends_its_process_is_a_suspect(cache: CacheDirectory) -> None:
    program = f"""
        import os
        from fxopt.runtime.cachedir import CacheDirectory
        from fxopt.tune.suspects import Suspects
        with Suspects(CacheDirectory({str(cache.path)!r})).on_trial("k", "kernel", lambda: True):
            os._exit(3)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == 3
    assert Suspects(cache).reason("k") == "the process that tried it ended meanwhile"


def test_a_process_that_tries_it_now_is_no_reason(cache: CacheDirectory) -> None:
    with Suspects(cache).on_trial("k", "kernel", after(1)):
        assert Suspects(cache).reason("k") is None
        document = cache.get_document(FOLDER, "k")
        assert document["pid"] == os.getpid()
        cache.put_document(FOLDER, "k", {**document, "started": document["started"] + 1})  # another process of that number
        assert Suspects(cache).reason("k") is not None


def test_an_error_leaves_a_suspect_until_it_is_cleared(cache: CacheDirectory) -> None:
    suspects = Suspects(cache)
    with pytest.raises(ValueError, match="illegal"), suspects.on_trial("k", "kernel", never):
        raise ValueError("illegal address")
    assert documents(cache) == ["k"]
    suspects.clear("k")
    assert documents(cache) == []


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]"])
def test_damaged_documents_accuse_nobody(cache: CacheDirectory, damage: bytes) -> None:
    cache.put_document(FOLDER, "k", {"kernel": "kernel", "pid": 1, "started": 0, "hung": True})
    assert Suspects(cache).reason("k") is not None
    (cache.path / FOLDER / "k.json").write_bytes(damage)
    with pytest.warns(UserWarning, match="k.json"):
        assert Suspects(cache).reason("k") is None
