"""What tests of CUDA graphs share."""

from __future__ import annotations

from typing import Any

import pytest

from fxopt.runtime import cuda_graph
from fxopt.runtime.cuda_graph import GraphedExecutor


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[GraphedExecutor]:
    """The executors with graphs that are made during the test."""
    found: list[GraphedExecutor] = []

    class Watched(GraphedExecutor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            found.append(self)

    monkeypatch.setattr(cuda_graph, "GraphedExecutor", Watched)
    return found
