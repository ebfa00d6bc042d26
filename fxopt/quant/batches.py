"""Batches of a user's loader, and calls of a model with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fxopt.errors import CalibrationError

Forward = Callable[[Any, Any], Any]
T = TypeVar("T")

_fresh = itertools.count()


def checked_loader(loader: Any) -> Iterable[Any]:
    """`loader`, if it is one. Raises CalibrationError for what is a batch by itself, or cannot be gone through."""
    if isinstance(loader, (torch.Tensor, Mapping, str)):
        what = "tensor" if isinstance(loader, torch.Tensor) else "mapping" if isinstance(loader, Mapping) else "string"
        raise CalibrationError(f"a loader gives batches, and this one is a {what} itself: put a batch into a list")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise CalibrationError(f"a loader is gone through batch by batch, which a {type(loader).__name__} is not")
    return cast(Iterable[Any], loader)


def call_model(model: Callable[..., Any], batch: Any) -> Any:
    """The model on a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def on_device(batch: Any, model: nn.Module) -> Any:
    """Tensors of `batch` where the model's weights are, if these are on one device."""
    devices = {t.device for t in itertools.chain(model.parameters(), model.buffers())}
    if len(devices) != 1:
        return batch
    device = devices.pop()
    plain = dict(batch) if isinstance(batch, Mapping) else batch  # transformers' batches are mappings of their own
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), plain)


def compiled_apart(model: Callable[..., Any], backend: Any, options: dict[str, Any], **settings: Any) -> Callable[..., Any]:
    """`model` compiled by torch.compile, apart from other compilations of it.

    Dynamo keeps compiled code with a function's code object, and after eight versions of one runs it in eager
    (`torch._dynamo.config.recompile_limit`). The function here has a code object of its own.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"quantized_{next(_fresh)}")
    compiled: Callable[..., Any] = torch.compile(call, backend=backend, options=options, **settings)
    return compiled


def shown(items: Iterable[T], what: str, progress: bool) -> Iterator[T]:
    """`items`, with a bar on the standard error while they are gone through."""
    if not progress:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    total = len(items) if isinstance(items, Sized) else None
    yield from track(items, what, total=total, console=Console(stderr=True), transient=True)
