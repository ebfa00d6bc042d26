"""Compiling one model several times side by side, with torch's public interface only."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

_fresh = itertools.count()


def unshared(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `model` and whose code object is its own.

    Dynamo keeps compiled code per code object, with a limit on entries: without this, compiling the same forward for several
    backends would share one list, and an earlier compilation could answer for a later one.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"call_{next(_fresh)}")
    return call


def resolve_backend(name: str) -> Any:
    """What torch.compile takes for backend `name`: the name, or fxopt's function when the package is not installed.

    Installation is what makes the name known to torch (an entry point); a source checkout on the path has only the function.
    """
    if name == "fxopt" and name not in torch.compiler.list_backends():
        from fxopt.backend import fxopt

        return fxopt
    return name
