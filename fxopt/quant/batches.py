"""Batches of a user's loader, and calls of a model with them."""

from __future__ import annotations

import inspect
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fxopt.errors import CalibrationError, FxoptError, OptionError

Forward = Callable[[Any, Any], Any]
T = TypeVar("T")

_fresh = itertools.count()


def first_batches(loader: Any, count: int | None) -> Iterator[Any]:
    """The first `count` batches of `loader`, all of them without a count.

    Raises CalibrationError for what is a batch by itself, or cannot be gone through; OptionError for a count that is none.
    """
    if count is not None and (not isinstance(count, numbers.Integral) or isinstance(count, bool) or count < 1):
        raise OptionError(f"a number of batches is an integer of 1 or more, not {count!r}")
    return itertools.islice(_checked_loader(loader), count)


def _checked_loader(loader: Any) -> Iterable[Any]:
    if isinstance(loader, (torch.Tensor, Mapping, str)):
        what = "tensor" if isinstance(loader, torch.Tensor) else "mapping" if isinstance(loader, Mapping) else "string"
        raise CalibrationError(f"a loader gives batches, and this one is a {what} itself: put a batch into a list")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise CalibrationError(f"a loader is gone through batch by batch, which type {type(loader).__name__} does not allow")
    return cast(Iterable[Any], loader)


def call_model(model: Callable[..., Any], batch: Any) -> Any:
    """The model on a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def run_batch(
    model: nn.Module, batch: Any, number: int, forward: Forward | None, run: Callable[..., Any] | None = None
) -> Any:
    """`model`, or its compiled form `run`, on batch `number` of a loader, as `forward` says or as `call_model` does.

    Raises CalibrationError for a batch whose values `model` does not have parameters for. Other errors of the model are
    raised as they are, with a note that names the batch.
    """
    called = model if run is None else run
    try:
        return call_model(called, batch) if forward is None else forward(called, batch)
    except FxoptError:
        raise
    except Exception as error:
        shown = f"batch {number} of the loader, {_described(batch)},"
        if forward is not None:
            error.add_note(f"fxopt: {shown} was given to `forward`")
            raise
        problem = _misfit(model, batch)
        if problem is None:
            error.add_note(f"fxopt: {shown} was given to the model; `forward=` says how to call the model in another way")
            raise
        raise CalibrationError(f"{shown} does not fit the model's parameters: {problem}. {_advice(batch)}") from error


def _advice(batch: Any) -> str:
    key = next(iter(batch), "x") if isinstance(batch, Mapping) else 0
    return f"Say how to call the model with a batch: forward=lambda model, batch: model(batch[{key!r}]), for instance"


def _misfit(model: nn.Module, batch: Any) -> str | None:
    """Why the parameters of a model's forward cannot be what is in `batch`; None where they can, or are not known."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None
    try:
        call_model(signature.bind, batch)
    except TypeError as error:
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        return f"{error}; forward takes {inspect.Signature(bare)}"
    return None


def _described(batch: Any) -> str:
    if isinstance(batch, torch.Tensor):
        return f"a tensor {list(batch.shape)}"
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"a {kind} with {', '.join(map(repr, batch))}"
    if isinstance(batch, (tuple, list)):
        kinds = [type(x).__name__ for x in batch[:4]] + ["..."] * (len(batch) > 4)
        return f"a {kind} of {len(batch)} ({', '.join(kinds)})"
    return f"a {kind}"


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

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):  # a file would be left with empty lines
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    yield from track(items, what, total=total, console=console, transient=True)
