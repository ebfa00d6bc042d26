"""What tests of the tuner share: a store of kernels in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxopt.runtime.artifacts import ArtifactStore


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)
