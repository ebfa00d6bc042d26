"""A process that takes batches of items on stdin and answers on stdout, both as lines of JSON.

`python -m tests.opinfo.worker EXECUTOR`. A batch is a list of an Item's fields. While an item is worked on, its key is
announced ({"doing": key}), so that whoever reads knows the culprit if the process dies; every item ends in a record, and the
batch in {"done": true}. An item that ends the CUDA context (a device-side assertion) ends the process, which can do nothing
more: {"died": reason} are its last words.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from tests.numerics import exact_products
from tests.opinfo.compiled import Batch, Outcome, own_code
from tests.opinfo.judge import Reference, Verdict, evaluate, verdict
from tests.opinfo.samples import DEVICES, Item, Problem
from tests.opinfo.skips import NEEDS_DYNAMO

Record = dict[str, Any]


class DeviceLost(Exception):
    """An item has left the CUDA context unusable."""


@dataclass
class Candidate:
    """A problem captured and waiting for its kernels."""

    problem: Problem
    reference: Reference
    call: Callable[..., Any]
    outcome: Outcome
    route: str


def run_batch(items: Iterable[Item], executor: str, doing: Callable[[str], None]) -> Iterable[Record]:
    """Records of `items`, in any order; `doing` is told the key of what is being worked on ("" while compiling)."""
    torch.compiler.reset()
    batch = Batch(executor)
    waiting: list[Candidate] = []
    for item in items:
        doing(item.key)
        prepared = prepare(item, batch)
        check_device(item, prepared)
        if isinstance(prepared, Candidate):
            waiting.append(prepared)
        else:
            yield prepared
    doing("")
    batch.compile()
    for candidate in waiting:
        item = candidate.problem.item
        doing(item.key)
        finished = judged(candidate)
        check_device(item, finished)
        yield finished


def check_device(item: Item, outcome: Candidate | Record) -> None:
    """Raises DeviceLost when the item, of which `outcome` is what was seen so far, was the CUDA context's last."""
    if item.device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        seen = outcome.get("why", outcome["status"]) if isinstance(outcome, dict) else "capture"
        raise DeviceLost(f"{seen}: {_brief(error)}") from error


def prepare(item: Item, batch: Batch) -> Candidate | Record:
    """The item captured, or the record that says why it cannot be."""
    try:
        problem = Problem.of(item)
        reference = Reference.of(problem)
    except Exception as error:
        return record(item, "skipped", f"eager: {_brief(error)}")
    dynamo = item.number == 0 or item.op in NEEDS_DYNAMO
    for route in ("dynamo",) if dynamo else ("autograd", "dynamo"):
        try:
            call, outcome = batch.add(problem, dynamo=route == "dynamo")
            evaluate(problem, call)
            return Candidate(problem, reference, call, outcome, route)
        except Exception as error:
            reason = _brief(error)
    return record(item, "error" if right_without_compiler(problem, reference) else "torch", f"capture: {reason}")


def judged(candidate: Candidate) -> Record:
    """Run for good, and compare. What aot_eager gets wrong as well is torch's own difference between eager and compiled."""
    problem, outcome = candidate.problem, candidate.outcome
    finish = functools.partial(record, problem.item, outcome=outcome, route=candidate.route)
    try:
        found = verdict(problem, candidate.reference, candidate.call)
    except Exception as error:
        status = "error" if right_without_compiler(problem, candidate.reference) else "torch"
        return finish(status, f"run: {_brief(error)}")
    finish = functools.partial(finish, verdict=found)
    if found.reason is None:
        return finish("internal", outcome.internal[0]) if outcome.internal else finish("right", "")
    return finish("wrong" if right_without_compiler(problem, candidate.reference) else "torch", found.reason)


def right_without_compiler(problem: Problem, reference: Reference) -> bool:
    """Whether torch.compile with AOTAutograd and nothing behind it runs the problem, and right."""
    compiled = torch.compile(own_code(problem), backend="aot_eager", dynamic=False)
    try:
        return verdict(problem, reference, lambda *tensors: compiled(list(tensors))).reason is None
    except Exception:  # whatever the tracer raises, any backend would meet it
        return False


def record(
    item: Item, status: str, why: str, outcome: Outcome | None = None, route: str = "", verdict: Verdict | None = None
) -> Record:
    """What is written down about one item. `retreats` are pairs of (what, why)."""
    out: Record = {"key": item.key, "status": status}
    if why:
        out["why"] = why[:300]
    if verdict is not None:
        out |= {"strides": verdict.strides, "nudged": verdict.nudged}
    if outcome is not None:
        out["route"], out["generated"] = route, outcome.generated
        out["retreats"] = sorted({(_op_of(what), reason[:160]) for what, reason in outcome.retreats})
        out["bytes"] = [outcome.generated_bytes, outcome.library_bytes]
    return out


def _op_of(what: str) -> str:
    """ "aten.sort.stable" of "sort (aten.sort.stable)"."""
    return what.partition("(")[2].removesuffix(")") or what


def _brief(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def main(executor: str) -> None:
    """Serve batches until stdin ends. What torch prints goes to stderr."""
    answers: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    exact_products()
    warnings.simplefilter("ignore")

    def say(line: Any) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    for line in sys.stdin:
        items = [Item(*fields) for fields in json.loads(line)]
        try:
            for result in run_batch(items, executor, lambda key: say({"doing": key})):
                say(result)
        except DeviceLost as lost:
            say({"died": str(lost)})
            os._exit(1)
        if DEVICES[executor] == "cuda":
            torch.cuda.empty_cache()  # others share the GPU
        say({"done": True})


if __name__ == "__main__":
    main(sys.argv[1])
