"""Which operands count as weights that nothing in the plan writes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxopt.ir.region import Alias, Alternatives, Contraction, Region
from fxopt.lower.schedule import schedule
from fxopt.lower.steady import with_steady_reads
from tests.lower.capturing import moved
from tests.lower.contracting import searched
from tests.lower.harness import lower


def scaled(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """Reads all three, and writes the state."""
    out = x * weight + state
    state.copy_(state + 1)
    return out


def steady(device: str, parameters: set[str]) -> set[str]:
    low = schedule(moved(lower(scaled, (torch.rand(8), torch.rand(8), torch.rand(8))), device))
    assert len(low.inputs) == 3
    named = dict(zip(("x", "weight", "state"), low.inputs, strict=True))
    marked = with_steady_reads(low, {named[n] for n in parameters})
    found = {name for s in marked.steps if isinstance(s, Region) for name in s.steady}
    return {n for n, own in named.items() if own in found}


def test_weights_are_steady_unless_they_are_written() -> None:
    assert steady("cuda", {"weight"}) == {"weight"}
    assert steady("cuda", {"weight", "state"}) == {"weight"}


def test_nothing_is_for_kernels_that_do_not_wait() -> None:
    assert steady("cpu", {"weight"}) == set()


def test_what_a_view_is_of_counts() -> None:
    low = schedule(moved(lower(scaled, (torch.rand(8), torch.rand(8), torch.rand(8))), "cuda"))
    (region,) = (s for s in low.steps if isinstance(s, Region))
    read, written = region.nest.reads()[0], region.writes()[0]
    of = {"steady": Alias(read, "parameter", (8,), (1,), 0), "written": Alias(read, written, (8,), (1,), 0)}
    buffers = low.buffers | {"parameter": replace(low.buffers[read], name="parameter")}
    for name, expected in (("steady", {read}), ("written", set())):
        viewed = replace(low, steps=[of[name], *low.steps], buffers=buffers)
        marked = with_steady_reads(viewed, {"parameter", written})
        assert {n for s in marked.steps if isinstance(s, Region) for n in s.steady} == expected


def test_weights_and_states_last_from_call_to_call() -> None:
    """Those that are read, also if the plan writes them; what another round has found stays."""
    low = schedule(moved(lower(scaled, (torch.rand(8), torch.rand(8), torch.rand(8))), "cuda"))
    _, weight, state = low.inputs
    marked = with_steady_reads(low, {weight, "unread"}, {state})
    assert (marked.lasting, marked.lasting_bytes) == ({weight, state}, 2 * 8 * 4)
    part = with_steady_reads(replace(marked, steps=[]), {weight})
    assert (part.lasting, part.lasting_bytes) == (marked.lasting, marked.lasting_bytes)


def test_ways_of_alternatives_are_marked() -> None:
    low = searched(lambda x, w: torch.nn.functional.linear(x, w), torch.rand(1, 64).half(), torch.rand(64, 64).half())
    weight = low.inputs[1]
    marked = with_steady_reads(low, {weight})
    (each,) = (s for s in marked.steps if isinstance(s, Alternatives))
    rows = [s for way in each.ways for s in way.steps if isinstance(s, Region)]
    assert rows and all(s.steady == {weight} for s in rows)
    products = [s for way in each.ways for s in way.steps if isinstance(s, Contraction)]
    assert products and all(s.region.steady == {weight} for s in products)
