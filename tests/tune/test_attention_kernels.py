"""Attention by kernels of ours or by the library: what is compiled, and the plan that comes of it. There is no GPU here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.attention_op import attention
from fxopt.ir.region import Alternatives, Attention, Call
from fxopt.lower import Lowered
from fxopt.lower.attention_kernels import KERNEL, LIBRARY
from fxopt.lower.contractions import with_contractions
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.runtime.plan import Launch
from fxopt.tune.candidate import attention_candidates
from tests.lower.test_attention_kernels import decode, rand, searched
from tests.tune.test_alternatives import TARGET, Bench, planned, tuned

Q, K = rand(2, 32, 2, 128), rand(2, 8, 2048, 128)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def kernel_of(low: Lowered) -> Attention:
    (each,) = (s for s in low.steps if isinstance(s, Alternatives))
    (own,) = each.ways[1].steps
    assert isinstance(own, Attention)
    return own


def test_the_fastest_configuration_becomes_launches(bench: Bench, store: ArtifactStore) -> None:
    low = searched(decode, Q, K, K)
    own = kernel_of(low)
    proposed = attention_candidates(own, TARGET, "default")
    assert 1 < len(proposed) <= 4
    split = next(c for c in proposed if c.scratch)
    bench.seconds = {f"{KERNEL} {split.label}": 0.5}
    after, chosen, failed, _ = tuned(low, store, mode="default")
    assert not failed and chosen[own.name].label == split.label
    assert bench.measured[-1] == (own.name, [LIBRARY, *(f"{KERNEL} {c.label}" for c in proposed)])
    launches = [s for s in planned(after, chosen).steps if isinstance(s, Launch) and s.label == own.name]
    first, second = launches
    parts = tuple(s.name for s in split.scratch)
    assert first.buffers[3:] == first.writes == parts and second.buffers == (*parts, own.out.buffer)
    assert first.buffers[:3] == (own.query.buffer, own.key.buffer, own.value.buffer)
    assert set(first.aligned) == set(range(5)) and not first.inplace


def test_the_library_stays_unless_beaten(bench: Bench, store: ArtifactStore) -> None:
    bench.seconds = {KERNEL: 0.98}
    low, chosen, _, _ = tuned(searched(decode, Q, K, K), store, mode="default")
    assert [s.op for s in planned(low, chosen).steps if isinstance(s, Call)] == ["fxopt::attention.default"]


def test_layers_with_equal_layouts_are_one_contest(bench: Bench, store: ArtifactStore) -> None:
    def two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(attention(q, k, v, enable_gqa=True), v, k, enable_gqa=True)

    bench.seconds = {KERNEL: 0.5}
    low, chosen, _, _ = tuned(searched(two, Q, K, K), store, mode="default")
    assert len(bench.contests) == 1 and len({c.label for c in chosen.values()}) == 1
    reads = [s.buffers[0] for s in planned(low, chosen).steps if isinstance(s, Launch) and not s.entry.endswith("join")]
    assert len(reads) == 2 and reads[0] != reads[1]


def test_what_is_compiled_at_all() -> None:
    """Not where a library's kernels are known to be out of reach, unless everything is to be tried."""
    short = kernel_of(searched(attention, *(rand(1, 4, 256, 64),) * 3))  # 16 tiles on 132 multiprocessors
    assert attention_candidates(short, TARGET, "default")
    prefill = kernel_of(searched(attention, *(rand(8, 16, 256, 64),) * 3))
    assert not attention_candidates(prefill, TARGET, "default") and attention_candidates(prefill, TARGET, "max-autotune")
    mask = torch.zeros(256, 256, dtype=torch.bfloat16)
    assert attention_candidates(kernel_of(searched(attention, *(rand(1, 4, 256, 64),) * 3, mask)), TARGET, "default")
    written = kernel_of(searched(lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT), -1) @ v, *(rand(1, 4, 256, 64),) * 3))
    assert attention_candidates(written, TARGET, "default"), "no library computes that"


def test_written_attention_becomes_launches(bench: Bench, store: ArtifactStore) -> None:
    """Of one kernel or of two products, a softmax and copies, in a layer with products before and after."""

    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w, b).relu().unflatten(-1, (4, 16)).transpose(1, 2) for _ in range(3))
        scores = torch.softmax(torch.tanh(q @ k.mT), -1)
        return F.linear((scores @ v).transpose(1, 2).flatten(2), w, b).relu()

    args = tuple(torch.empty(shape, dtype=torch.bfloat16) for shape in ((2, 128, 64), (64, 64), (64,)))
    for winner, calls in ((KERNEL, 4), (LIBRARY, 6)):
        bench.seconds = {winner: 0.5}
        low = with_contractions(searched(layer, *args))
        after, chosen, failed, _ = tuned(low, ArtifactStore(store.directory / winner), mode="default")
        plan = planned(after, chosen)
        assert not failed and sum(isinstance(s, Call) for s in plan.steps) == calls
        entries = [s.entry for s in plan.steps if isinstance(s, Launch)]
        assert any(e.startswith("fx_attention") for e in entries) == (winner == KERNEL)
