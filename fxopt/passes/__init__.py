"""Rewrites of captured graphs. `pipeline.py` has the one list that orders them."""

from __future__ import annotations

from fxopt.passes.pipeline import run, run_early

__all__ = ["run", "run_early"]
