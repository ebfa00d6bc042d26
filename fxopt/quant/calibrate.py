"""`fxopt.calibrate(model, loader)`: run the model on real data and note what its layers are given."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

import fxopt
from fxopt.errors import CalibrationError
from fxopt.ir.layers import ATTENTION, CONVOLUTION, LINEAR
from fxopt.journal import RECENT, Journal
from fxopt.options import suggestion
from fxopt.quant.arguments import given_module
from fxopt.quant.batches import Forward, first_batches, on_device, run_batch, shown
from fxopt.quant.observers import Collector
from fxopt.quant.table import AMBIGUOUS, AVERAGE, NEVER, ROWS, ZERO, Calibration, LayerRange, check_method, joined_layers
from fxopt.report.explanation import graph_breaks

MOST_NAMED = 5
"""Layers that a warning names; of the others it tells the number."""

_OBSERVERS = (ROWS, AVERAGE, ATTENTION)

_fresh = itertools.count()


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    batches: int | None = None,
    forward: Forward | None = None,
    method: str = "amax",
    observe: Collection[str] = (),
    progress: bool = True,
    backend: Any = "fxopt",
) -> Calibration:
    """Run `model` on `loader`'s batches and return what its layers were given.

    `model` is in evaluation mode; its weights are on one device, to which batches are moved. A batch is a tensor, a tuple
    or list of positional arguments, or a mapping of keyword arguments; `forward(model, batch)` calls the model in another
    way. `batches` are used at most. `method` says how ranges become scales: "amax", "percentile", "mse", "entropy", "rows"
    or "average" (see `Calibration`). The last two need to be observed, which `method` or `observe` asks for; with
    "attention" in `observe`, so is what attention on a GPU is given.
    `backend` is what torch.compile takes for fxopt where its package is not installed.

    Raises CalibrationError, naming layer and batch where there is one: for a model in training mode, what is no loader, no
    batches, a batch that does not fit the model's parameters, NaN or Inf among activations, a batch that torch.compile did
    not run compiled, and a model without layers. Warns of layers that no batch reached, of such that were given only zeros,
    and of input channels that were always zero. What the model itself raises is raised as it is, with a note that names the
    batch.
    """
    model = given_module(model, "calibrate")
    _check_mode(model)
    check_method(method)
    _check_observers(observe)
    wanted = {method, *observe}
    collector = Collector(rows=ROWS in wanted, averages=AVERAGE in wanted, attention=ATTENTION in wanted)
    before = tuple(RECENT)
    compiled = _observed(model, collector, backend)
    count = 0
    with torch.no_grad(), graph_breaks() as breaks:
        for batch in shown(first_batches(loader, batches), "calibrating", progress):
            collector.begin_batch()
            run_batch(model, on_device(batch, model), count, forward, compiled)
            count += 1
    if not count:
        raise CalibrationError("the loader gave no batch: it is empty, or an iterator that was gone through before")
    layers = joined_layers(collector.layers())
    if not layers:
        raise CalibrationError(f"no layer was observed{_why_none(before, breaks)}")
    layers = (*layers, *_unreached(model, collector, layers))
    _warn(layers)
    return Calibration(layers, count, method, {"fxopt": fxopt.__version__, "torch": torch.__version__})


def _check_observers(observe: Collection[str]) -> None:
    if isinstance(observe, str):
        raise CalibrationError(f"observers are several names, such as ({observe!r},), not one string")
    for name in observe:
        if name not in _OBSERVERS:
            raise CalibrationError(
                f"there is no observer {name!r}{suggestion(name, _OBSERVERS)}; there are {', '.join(_OBSERVERS)}"
            )


def _check_mode(model: nn.Module) -> None:
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"module {training!r} of the model" if training else "the model"
        raise CalibrationError(f"{where} is in training mode, where layers are given other values: call model.eval() first")


def _observed(model: nn.Module, collector: Collector, backend: Any) -> Callable[..., Any]:
    """The model compiled to report to `collector`, apart from other compilations of it.

    Dynamo keeps compiled code with a function's code object: this one has its own. No kernels are measured, and no CUDA
    graphs captured: calibration is a few calls.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"observed_{next(_fresh)}")
    options: dict[str, Any] = {"freeze": True, "observer": collector, "tuning_seconds": 0, "cuda_graphs": False}
    compiled: Callable[..., Any] = torch.compile(call, backend=backend, options=options)
    return compiled


def _why_none(before: Collection[Journal], breaks: Collection[str]) -> str:
    """Why the compilations since those of `before` came to nothing, for a message. At `breaks` Dynamo stopped."""
    known = set(map(id, before))
    since = [journal for journal in RECENT if id(journal) not in known]
    reasons = [f"{what}: {why}" for journal in since for what, why in journal.retreats]
    if reasons:
        return f": fxopt could not compile the model ({reasons[-1]})"
    unobserved = [
        text for journal in since for topic, text in journal.notes if topic == "precision" and "is not observed" in text
    ]
    if unobserved:
        return f": {unobserved[0]}"
    where = "".join(f"; it stopped at: {reason}" for reason in breaks)
    return f": torch.compile captured no product or convolution whose weight is a parameter or buffer of the model{where}"


def _unreached(model: nn.Module, collector: Collector, layers: tuple[LayerRange, ...]) -> list[LayerRange]:
    """Linear layers and convolutions of the model whose weights no compiled graph has."""
    names = {layer.name for layer in layers}
    found = []
    for name, module in model.named_modules():
        kind = _kind(module)
        weight = getattr(module, "weight", None)
        if kind is None or name in names or not isinstance(weight, torch.Tensor) or collector.reads(weight):
            continue
        found.append(LayerRange(name, kind, tuple(weight.shape), _dtype(weight), None))
    return found


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return LINEAR
    return CONVOLUTION if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else None


def _dtype(weight: torch.Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _warn(layers: tuple[LayerRange, ...]) -> None:
    for obstacle in (NEVER, ZERO, AMBIGUOUS):
        named = [layer.name for layer in layers if layer.obstacle == obstacle]
        if named:
            warnings.warn(f"{_listed(named)}: {obstacle}; not to be quantized with this calibration", stacklevel=3)
    dead = [(layer, int((layer.channel_amax() == 0).sum())) for layer in layers if layer.obstacle is None]
    shares = {layer.name: f" ({count} of {layer.channel_amax().numel()})" for layer, count in dead if count}
    if shares:
        warnings.warn(f"{_listed(list(shares), shares)}: channels that were given only zeros", stacklevel=3)


def _listed(names: list[str], remarks: Mapping[str, str] = MappingProxyType({})) -> str:
    shown = ", ".join(f"{name!r}{remarks.get(name, '')}" for name in names[:MOST_NAMED])
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"layer{'s' if len(names) > 1 else ''} {shown}{more}"
