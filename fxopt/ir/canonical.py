"""Canonical JSON of what a graph's nodes hold, for cache keys: what differs for a compiler differs in the text."""

from __future__ import annotations

from collections.abc import Callable
from types import EllipsisType
from typing import Any

import torch
from torch import fx


class UnwritableError(Exception):
    """A value that cannot be written down."""


def argument(x: Any, name: Callable[[fx.Node], Any]) -> Any:
    """A node's argument as JSON data in which different arguments differ; `name` says what stands for a node.

    Raises UnwritableError for a value whose meaning is not in its text.
    """
    match x:
        case None | bool() | str():
            return x
        case fx.Node():
            return {"node": name(x)}
        case int() | float() | complex():
            return {type(x).__name__: repr(x)}
        case list() | tuple():
            return [argument(a, name) for a in x]
        case dict():
            return {"dict": [[argument(k, name), argument(v, name)] for k, v in x.items()]}
        case slice():
            return {"slice": [argument(a, name) for a in (x.start, x.stop, x.step)]}
        case EllipsisType():
            return {"ellipsis": None}
        case torch.dtype() | torch.layout() | torch.memory_format() | torch.device():
            return {type(x).__name__: str(x)}
    raise UnwritableError(f"{type(x).__name__} has no canonical text")
