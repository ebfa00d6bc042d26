"""A kernel that does not end while it is tried: a named error in its process, and no candidate in the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxopt.runtime.cachedir import CacheDirectory
from fxopt.tune.suspects import Suspects
from tests.gpu.test_guest_cuda import run_apart

pytestmark = pytest.mark.gpu

HANGS = """
    import os, torch
    from fxopt.errors import HungKernelError
    from fxopt.runtime.artifacts import default_store
    from fxopt.tune.suspects import Suspects

    torch.cuda.init()
    suspects = Suspects(default_store().cache, limit=0.5)
    stream = torch.cuda.current_stream()
    with suspects.on_trial("short", "short", stream.query):
        torch.cuda._sleep(1000)
    try:
        with suspects.on_trial("endless", "endless", stream.query):
            torch.cuda._sleep(1 << 40)  # minutes
    except HungKernelError as error:
        print(error, flush=True)
        os._exit(7)  # what ends in order waits for the kernel
"""


def test_a_kernel_that_hangs(tmp_path: Path) -> None:
    done = run_apart(HANGS, tmp_path)
    assert done.returncode == 7, done.stderr
    assert "the generated kernel endless has not ended" in done.stdout
    after = Suspects(CacheDirectory(tmp_path))
    assert after.reason("short") is None
    assert after.reason("endless") is not None
