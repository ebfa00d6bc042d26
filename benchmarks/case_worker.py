"""A process that runs cases of one program one after the other: `python -m benchmarks.case_worker MODULE DEVICE`.

`benchmarks/dealing.py` starts it and says what the lines on its pipes are. It measures while it holds the device's lock in
FXOPT_LOCK_DIR: fxopt's tuner takes it by itself, Inductor's is made to here, and neither measures without.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import sys
import time
from contextlib import AbstractContextManager
from typing import Any, TextIO, cast

import torch

from benchmarks.budget import Budget
from benchmarks.crew import Suite
from benchmarks.run import compile_case, run_case
from fxopt import knobs
from fxopt.cli import pick_device, pick_dtype
from fxopt.report.contenders import CONTENDERS, Contender
from fxopt.runtime.device_lock import device_identity, turn
from fxopt.tune import measure


def inductor_tunes_in_turn(device_turn: Any) -> None:
    """Inductor's own choices among configurations and templates are by time too.

    A torch that makes them elsewhere is left as it is.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    for owner, name in (
        (CachingAutotuner, "benchmark_all_configs"),
        (CachingAutotuner, "bench"),  # each step of a coordinate descent
        (AlgorithmSelectorCache, "benchmark_in_current_process"),  # templates and library calls of a product
    ):
        if hasattr(owner, name):
            setattr(owner, name, _in_turn(vars(owner)[name], device_turn))


def _in_turn(method: Any, device_turn: Any) -> Any:
    """`method`, plain or a class method, run while the device is held."""
    measured = method.__func__ if isinstance(method, classmethod) else method

    @functools.wraps(measured)
    def call(*args: Any, **kwargs: Any) -> Any:
        with device_turn():
            return measured(*args, **kwargs)

    return classmethod(call) if isinstance(method, classmethod) else call


def is_broken(device: torch.device) -> bool:
    """Whether this process can no longer use the device."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def answer(suite: Suite, request: dict[str, Any], device: torch.device, device_turn: Any, channel: TextIO) -> bool:
    """Run the case of `request`; whether another can follow."""

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    busy = ""

    def report(what: str, share: float) -> None:
        nonlocal busy
        busy = what.split()[-1] if what.startswith(("compiling", "checking")) else ""
        say({"progress": what, "contender": busy})

    def why_not(contender: Contender) -> str:
        return str(request["without"].get(contender.name, ""))

    workload = suite.WORKLOADS[request["workload"]]
    budget = Budget(time.monotonic() + request["left"], request["compile_limit"], slow=request["slow"])
    plan = suite.plan_case(budget, workload, device, request["seconds"], request["warm"])
    plan.skip, plan.caches = why_not, request.get("caches")
    chosen = [CONTENDERS[name] for name in request["contenders"]]
    run = compile_case if request.get("ahead") else run_case
    # Beside compilers that tune, timing comes first: the cases left are what the run still takes.
    plan.turn = functools.partial(device_turn, run is run_case and plan.caches is not None)
    rows = run(workload, request["sizes"], pick_dtype(request["dtype"]), chosen, plan, report)
    broken = is_broken(device)
    say({"rows": [row.to_dict() for row in rows], "broken": (busy or chosen[0].name) if broken else ""})
    return not broken


def main(module: str, name: str) -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not get between the answers
    device, suite = pick_device(name), cast(Suite, importlib.import_module(module))
    folder = knobs.LOCK_DIR.get()
    assert folder is not None

    def device_turn(first: bool = False) -> AbstractContextManager[bool]:
        return turn(folder, device_identity(device), first=first)

    inductor_tunes_in_turn(device_turn)
    measure.PATIENCE_SECONDS = math.inf  # fxopt's tuner waits as long as Inductor's
    channel.write('{"ready": true}\n')
    channel.flush()
    for line in sys.stdin:
        if not answer(suite, json.loads(line), device, device_turn, channel):
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
