"""The ways of running a model that are compared, and cold caches for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.options import suggestion
from fxopt.report.backends import resolve_backend, unshared

CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FXOPT_CACHE_DIR")


@dataclass(frozen=True)
class Contender:
    """One way to run a model: `backend` None is eager; `mode` and `options` as torch.compile takes them (one of the two).

    `frozen` says that weights are treated as constants, so it only makes sense for inference. `slow` marks compilations of
    minutes, which harness runs leave out of large workloads unless asked. `alternative` names the implementation to run
    instead of the case's own (`Case.alternatives`), as it is.
    """

    name: str
    backend: str | None = None
    mode: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    frozen: bool = False
    slow: bool = False
    alternative: str = ""

    @property
    def mode_label(self) -> str:
        return self.mode or str(self.options.get("mode", "default"))

    def countable(self, device: torch.device) -> bool:
        """Whether the profiler sees this contender's kernels; on CPU, Inductor names them only on request."""
        # The request is an option, and torch.compile takes either options or a mode.
        return device.type == "cuda" or self.backend != "inductor" or self.mode is None

    def compile(self, fn: Callable[..., Any], device: torch.device, replay: bool = True) -> Callable[..., Any]:
        """`fn` under this contender; nothing is compiled before the first call.

        Without `replay`, fxopt's default mode makes no CUDA graphs, as Inductor's makes none.
        """
        if self.backend is None:
            return fn
        options = dict(self.options)
        if self.backend == "fxopt" and self.mode is None and not replay:
            options["cuda_graphs"] = False
        if self.backend == "inductor" and device.type == "cpu" and self.countable(device):
            # Makes Inductor's C++ kernels visible to the profiler; costs about 0.1 us per kernel.
            options["cpp.enable_kernel_profile"] = True
        compiled = torch.compile(
            unshared(fn), backend=resolve_backend(self.backend), mode=self.mode, options=options or None, dynamic=False
        )
        if self.backend == "inductor" and self.frozen:
            compiled = _first_call_frozen(compiled)
        return _marking_steps(compiled) if device.type == "cuda" else compiled


def _first_call_frozen(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's freezing in full: as an option it does not reach Dynamo, which then keeps the weights as inputs."""
    first = True

    def call(*args: Any) -> Any:
        nonlocal first
        if not first:
            return compiled(*args)
        first = False
        import torch._inductor.config as inductor

        with inductor.patch(freezing=True):
            return compiled(*args)

    return call


def _marking_steps(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Tells CUDA-graph modes that outputs of the previous call are no longer used, as a user's loop has to."""

    def step(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args)

    return step


_FREEZING = {"freezing": True}
_MAX_AUTOTUNE = {"max_autotune": True, "coordinate_descent_tuning": True}
"""What mode max-autotune-no-cudagraphs sets, as options, which can be joined with freezing."""
_ALL = (
    Contender("eager"),
    Contender("inductor", "inductor"),
    Contender("inductor-freezing", "inductor", options=_FREEZING, frozen=True),
    Contender("inductor-reduce-overhead", "inductor", mode="reduce-overhead"),
    Contender(
        "inductor-reduce-overhead-freezing", "inductor", options={**_FREEZING, "triton.cudagraphs": True}, frozen=True
    ),
    Contender("inductor-max-autotune", "inductor", mode="max-autotune", slow=True),
    Contender("fxopt", "fxopt"),
    Contender("fxopt-freeze", "fxopt", options={"freeze": True}, frozen=True),
    Contender("fxopt-reduce-overhead", "fxopt", mode="reduce-overhead"),
    Contender("fxopt-reduce-overhead-freeze", "fxopt", options={"mode": "reduce-overhead", "freeze": True}, frozen=True),
    Contender("fxopt-max-autotune", "fxopt", mode="max-autotune", slow=True),
)
_TUNED = (
    Contender("inductor-max-autotune-no-cudagraphs", "inductor", options=_MAX_AUTOTUNE, slow=True),
    Contender(
        "inductor-max-autotune-no-cudagraphs-freezing",
        "inductor",
        options={**_FREEZING, **_MAX_AUTOTUNE},
        frozen=True,
        slow=True,
    ),
)
"""For timing on the device alone, which makes CUDA graphs pointless."""

COPY = Contender("copy")
"""No implementation of the case: a copy that moves as many bytes as the case must."""
_PEERS = (COPY, Contender("liger", alternative="liger"), Contender("fused", alternative="fused"))
CONTENDERS = {c.name: c for c in (*_ALL, *_TUNED, *_PEERS)}


def pick(names: str) -> list[Contender]:
    """Contenders from a comma-separated list, "all", or "plain" (default modes only). ValueError lists the valid names.

    "all" are the ways of running a torch model; those that only some cases or programs have (liger, fused, copy,
    max-autotune without CUDA graphs) are asked for by name.
    """
    if names == "all":
        return list(_ALL)
    if names == "plain":
        return [c for c in _ALL if c.mode_label == "default" and "triton.cudagraphs" not in c.options]
    wanted = [n.strip() for n in names.split(",") if n.strip()]
    unknown = [n for n in wanted if n not in CONTENDERS]
    if unknown or not wanted:
        hint = suggestion(unknown[0], CONTENDERS) if unknown else ""
        given = ", ".join(map(repr, unknown)) or "(none given)"
        raise ValueError(f"unknown contender {given}{hint}; valid: all, plain, {', '.join(CONTENDERS)}")
    return [CONTENDERS[n] for n in dict.fromkeys(wanted)]


def cache_variables(root: str) -> dict[str, str]:
    """The environment in which Inductor, Triton and fxopt keep their caches below `root`."""
    return {name: os.path.join(root, name.split("_")[0].lower()) for name in CACHE_VARIABLES}


@contextmanager
def caches_under(root: str) -> Iterator[None]:
    """Inductor, Triton and fxopt keep their caches below `root` (empty: cold) while the block runs."""
    before = {name: os.environ.get(name) for name in CACHE_VARIABLES}
    os.environ.update(cache_variables(root))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
