"""Rewrites of captured graphs. `pipeline.py` has the one list that orders them."""

from __future__ import annotations

from fxopt.passes.pipeline import NAMES, run, run_again, run_early, run_joint, run_observing

__all__ = ["NAMES", "run", "run_again", "run_early", "run_joint", "run_observing"]
