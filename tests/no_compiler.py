"""Compilations in which no kernel can be built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fxopt import compiler


@contextmanager
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the block, every region's kernels fail to build."""
    real = compiler.tune.choose

    def failing(lowered: Any, *rest: Any) -> Any:
        lowered, _, failed = real(lowered, *rest)
        return lowered, {}, failed + [(s, "no compiler today") for s in lowered.steps if hasattr(s, "nest")]

    with monkeypatch.context() as patch:
        patch.setattr(compiler.tune, "choose", failing)
        yield
