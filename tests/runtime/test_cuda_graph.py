"""When runs are captured and replayed, and that results and inputs are what they are without; acted out on the CPU."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch

from fxopt.ir import random_ops
from fxopt.runtime import cuda_graph, recording
from fxopt.runtime.draws import draw
from tests.runtime.fake_graphs import Acted, FakeDriver


@pytest.fixture(params=["python", "python, nodes", "native", "native, one launch", "native, nodes"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How replays are done in the test."""
    if request.param.startswith("native"):
        monkeypatch.setattr(Acted, "extension", request.getfixturevalue("compiled_code"))
    monkeypatch.setattr(FakeDriver, "one_launch", request.param == "native, one launch")
    monkeypatch.setattr(FakeDriver, "in_graph", request.param.endswith("nodes"))
    return str(request.param)


@pytest.fixture(autouse=True)
def _every_way(way: str) -> None: ...


def twice(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x * 2,)


def test_the_second_call_captures_and_later_ones_replay() -> None:
    run = Acted(twice)
    for k, counts in enumerate([(1, 0, 0), (1, 1, 1), (1, 1, 2), (1, 1, 3)]):
        x = torch.full((4,), float(k))
        (out,) = run(x)
        torch.testing.assert_close(out, x * 2)
        assert run.counts() == counts


def test_results_are_nobodys_memory_but_the_callers() -> None:
    run = Acted(twice)
    inputs = [torch.full((3,), float(k)) for k in range(6)]
    kept = [run(x)[0] for x in inputs]
    for x, out in zip(inputs, kept, strict=True):
        torch.testing.assert_close(out, x * 2)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(3.0).expand(4, 3),
        torch.arange(24.0).view(4, 6)[:, ::2],
        torch.arange(20.0)[3:15].view(4, 3),
        torch.zeros(4, 0),
        torch.tensor(3.0),
    ],
    ids=["transposed", "expanded", "gaps", "offset", "empty", "scalar"],
)
def test_layouts_of_inputs(x: torch.Tensor) -> None:
    run = Acted(twice)
    for k in range(4):
        value = x + k if k else x
        value = torch.empty_strided(x.shape, x.stride()).copy_(value) if 0 not in x.stride() else x
        (out,) = run(value)
        torch.testing.assert_close(out, value * 2)
    assert run.replays == 3


def test_an_input_in_another_layout_than_the_captured_one() -> None:
    run = Acted(twice)
    for x in [torch.randn(3, 4), torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(3, 1).expand(3, 4)]:
        torch.testing.assert_close(run(x)[0], x * 2)
    expanded = Acted(twice)
    for x in [torch.randn(3, 1).expand(3, 4), torch.randn(3, 1).expand(3, 4), torch.ones(3, 4)]:
        torch.testing.assert_close(expanded(x)[0], x * 2)
    assert run.replays == 3 and expanded.replays == 2


def test_weights_are_used_where_they_are() -> None:
    run = Acted(lambda x, w: (x * w,), fixed=(1,))
    weights = [torch.randn(4), torch.randn(4)]
    x = torch.randn(4)
    for w, counts in zip(weights[:1] * 3 + weights[1:] * 3 + weights[:1], range(7), strict=True):
        torch.testing.assert_close(run(x, w)[0], x * w, msg=f"call {counts}")
    assert run.counts() == (2, 2, 5), "each of both weights runs once, is captured once, and found again"
    weights[0].mul_(3)
    torch.testing.assert_close(run(x, weights[0])[0], x * weights[0])
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.data = weights[1]
    torch.testing.assert_close(run(x, parameter)[0], x * weights[1])
    assert run.counts() == (2, 2, 7)


def test_what_is_read_where_it_is_lives_until_the_run_is_enqueued() -> None:
    """What is handed over may have no other owner: its memory would be somebody else's before the run is begun."""
    run = Acted(lambda x, w: (x * w,), fixed=(1,))
    w = torch.randn(4)
    for _ in range(2):
        run(torch.ones(4), w)
    inputs = [torch.ones(4), w.detach()]
    seen, alive = weakref.ref(inputs[1]), list[bool]()
    run.driver.during_replay = lambda: alive.append(seen() is not None)
    torch.testing.assert_close(run.run(inputs)[0], w)
    assert alive == [True] and not inputs and seen() is None


def test_addresses_that_never_return_are_not_captured() -> None:
    run = Acted(lambda x, w: (x * w,), fixed=(1,))
    alive = [torch.randn(4) for _ in range(50)]
    for w in alive:
        torch.testing.assert_close(run(torch.ones(4), w)[0], w)
    assert run.counts() == (50, 0, 0)


def test_one_graph_for_each_size_and_a_limit() -> None:
    run = Acted(twice, varying=(0,), limit=2)
    for n in (3, 4, 3, 4, 3, 4):
        x = torch.randn(n)
        torch.testing.assert_close(run(x)[0], x * 2)
    assert run.counts() == (2, 2, 4) and run.run.graphs == 2
    for n in (5, 6, 5, 6, 3, 4):
        x = torch.randn(n)
        torch.testing.assert_close(run(x)[0], x * 2)
    assert run.counts() == (6, 2, 6), "sizes that take turns do not push each other out"


def test_the_least_recently_used_graph_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "REPLAYS_PER_CAPTURE", 1)
    run = Acted(twice, varying=(0,), limit=2)
    for n in (3, 3, 4, 4, 3, 5, 5, 3, 5):
        torch.testing.assert_close(run(torch.ones(n))[0], torch.full((n,), 2.0))
    assert run.counts() == (3, 3, 6) and run.run.graphs == 2
    run(torch.ones(4))
    assert run.driver.captures == 4, "4 made place for 5"


def test_sizes_may_be_numbers() -> None:
    run = Acted(lambda x, n: (x[:n] * n,), varying=(1,))
    for n in (2, 2, 3, 3, 2, 3):
        x = torch.randn(5)
        torch.testing.assert_close(run(x, n)[0], x[:n] * n)
    assert run.counts() == (2, 2, 4)


def test_what_the_plan_writes_is_written_where_it_is() -> None:
    def step(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state += x
        return (state * 2,)

    run = Acted(step, fixed=(1,), written=(1,))
    state, want = torch.zeros(4), torch.zeros(4)
    for k in range(5):
        before = state._version
        (out,) = run(torch.full((4,), float(k)), state)
        want += k
        torch.testing.assert_close(state, want)
        torch.testing.assert_close(out, want * 2)
        assert state._version > before
    assert run.counts() == (1, 1, 4)
    with torch.inference_mode():
        uncounted = torch.zeros(4)
        for _ in range(3):
            run(torch.ones(4), uncounted)
    torch.testing.assert_close(uncounted, torch.full((4,), 3.0))


def test_results_that_are_inputs_views_of_them_or_of_each_other() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> tuple[Any, ...]:
        y = x * w
        return x, x.as_strided((2,), (2,), x.storage_offset() + 1), w, w[1:], y[1:], y.view(2, 2), 7, None

    run = Acted(fn, fixed=(1,))
    w = torch.randn(4)
    for _ in range(4):
        x = torch.randn(6)[2:]
        same, odd, weight, tail, part, whole, number, nothing = run(x, w)
        assert same is x and weight is w and (number, nothing) == (7, None)
        assert (odd.data_ptr(), tail.data_ptr()) == (x[1:].data_ptr(), w[1:].data_ptr()) and odd.stride() == (2,)
        torch.testing.assert_close(whole.reshape(-1), x * w)
        torch.testing.assert_close(part, (x * w)[1:])
        assert part.data_ptr() == whole.data_ptr() + 4 and part.untyped_storage()._cdata == whole.untyped_storage()._cdata
    assert run.replays == 3


def test_many_results_have_their_layouts_and_their_own_memory() -> None:
    n = recording.MANY_RESULTS

    def fn(x: torch.Tensor) -> tuple[Any, ...]:
        wide = [(x * k).t().contiguous().t() for k in range(n)]
        whole = [(x * k).long().unsqueeze(1) for k in range(n)]
        odd = [x.repeat(2, 1)[::2], x.mul(3).bool(), x[:0].clone()]
        return (*wide, *odd, *whole)

    run = Acted(fn)
    kept = []
    for k in range(4):
        x = torch.arange(12.0).view(3, 4) + k
        kept.append((run(x), fn(x)))
    assert run.replays == 3 and run.run._latest is not None, run.notes
    together = run.run._latest.results.together
    assert sorted(len(group.positions) for group in together) == ([] if run.driver.in_graph else [n, n])
    for got, want in kept:
        assert [x.stride() for x in got] == [x.stride() for x in want]
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in got[:n])


def test_a_view_of_an_input_in_another_layout_has_its_values() -> None:
    run = Acted(lambda x: (x[0],))
    for x in (torch.randn(2, 3), torch.randn(2, 3), torch.randn(3, 2).t()):
        torch.testing.assert_close(run(x)[0], x[0])
    assert run.replays == 2


def test_seeds_are_drawn_as_without_graphs() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x + random_ops.rand(draw(torch.device("cpu")), list(x.shape)),)

    run, x = Acted(fn, seeds=1), torch.zeros(8)
    torch.manual_seed(3)
    got = [run(x)[0] for _ in range(4)]
    state = torch.get_rng_state()
    torch.manual_seed(3)
    want = [fn(x)[0] for _ in range(4)]
    torch.testing.assert_close(got, want)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(got[2], got[3]) and run.replays == 3
    torch.manual_seed(3)
    torch.testing.assert_close(run(x)[0], want[0])


def test_what_cannot_be_captured_runs_as_it_did() -> None:
    run = Acted(twice)
    run.driver.refusal = "operation not permitted when stream is capturing\nmore"
    for k in range(4):
        torch.testing.assert_close(run(torch.full((2,), float(k)))[0], torch.full((2,), 2.0 * k))
    assert run.counts() == (4, 0, 0)
    assert run.notes == ["not captured: operation not permitted when stream is capturing"]


@pytest.mark.parametrize(
    ("fn", "x", "reason"),
    [
        (twice, torch.arange(1 << 20, dtype=torch.float32)[:: 1 << 10], "much more memory"),
        (lambda x: (x * 1j, torch.conj(x * 1j)), torch.ones(3), "no plain tensor"),
        (lambda x: (x.to_sparse(),), torch.ones(3), "no plain tensor"),
    ],
    ids=["spread", "conjugated", "sparse"],
)
def test_what_is_not_replayed_says_why(fn: Any, x: torch.Tensor, reason: str) -> None:
    run = Acted(fn)
    for _ in range(3):
        torch.testing.assert_close(run(x), fn(x))
    assert run.replays == 0 and len(run.notes) == 1 and reason in run.notes[0]


def test_copies_that_cost_more_than_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Acted(twice)
    x = torch.ones(1 << 23)
    for _ in range(3):
        run(x)
    assert run.counts() == (3, 1, 0) and "64.0 MiB a call" in run.notes[0]


def test_the_host_is_not_free() -> None:
    run = Acted(twice)
    for captured in (False, False, True, False):
        run.driver.user_captures = captured
        torch.testing.assert_close(run(torch.ones(2))[0], torch.full((2,), 2.0))
    assert run.counts() == (2, 1, 2)


def test_a_call_that_is_watched_runs_plainly_and_counts_as_the_first() -> None:
    run = Acted(twice)
    for watched, counts in ((True, (1, 0, 0)), (False, (1, 1, 1)), (True, (2, 1, 1)), (False, (2, 1, 2))):
        run.driver.watched = watched
        torch.testing.assert_close(run(torch.ones(2))[0], torch.full((2,), 2.0))
        assert run.counts() == counts


def test_another_stream_waits_for_the_last() -> None:
    run = Acted(twice)
    run(torch.ones(2))
    for stream in (7, 7, 0, 9, 9, 0):
        run.driver.current = stream
        run(torch.ones(2))
    seen = [entry for entry in run.driver.log if entry[0] in ("wait", "replay")]
    assert seen == [
        *(("wait", 7), ("replay", 7), ("replay", 7), ("wait", 0), ("replay", 0)),
        *(("wait", 9), ("replay", 9), ("replay", 9), ("wait", 0), ("replay", 0)),
    ]
    after_replays = [run.driver.log[i + 1] for i, (what, _) in enumerate(run.driver.log) if what == "replay"]
    assert after_replays == [("record", s) for s in (7, 7, 0, 9, 9, 0)]


def test_a_call_inside_a_replay() -> None:
    run = Acted(twice)
    for _ in range(2):
        run(torch.ones(2))
    inner: list[torch.Tensor] = []
    run.driver.during_replay = lambda: inner.append(run(torch.full((2,), 5.0))[0])
    (out,) = run(torch.ones(2))
    torch.testing.assert_close(out, torch.full((2,), 2.0))
    torch.testing.assert_close(inner[0], torch.full((2,), 10.0))
    assert run.function.plain_runs == 2


ONLY_PYTHON = pytest.mark.parametrize("way", ["python"], indirect=True)
"""No signal is handled while compiled code replays."""


@pytest.mark.parametrize(
    ("way", "where"),
    [("python", "copy"), ("python", "during_replay"), ("python, nodes", "tell"), ("python, nodes", "during_replay")],
    indirect=["way"],
)
def test_an_interrupted_replay_leaves_nothing_broken(where: str) -> None:
    run = Acted(twice)
    for _ in range(2):
        run(torch.ones(2))

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    usual = getattr(run.driver, where)
    setattr(run.driver, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(torch.ones(2))
    setattr(run.driver, where, usual)
    assert run.driver.log[-1] == ("record", 7)
    torch.testing.assert_close(run(torch.full((2,), 4.0))[0], torch.full((2,), 8.0))


@ONLY_PYTHON
def test_an_interrupt_while_leaving_is_waited_out() -> None:
    run = Acted(twice)
    for _ in range(2):
        run(torch.ones(2))
    usual = run.driver.record

    def interrupt(stream: int) -> None:
        raise KeyboardInterrupt

    run.driver.record = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(torch.ones(2))
    run.driver.record = usual  # type: ignore[method-assign]
    torch.testing.assert_close(run(torch.full((2,), 4.0))[0], torch.full((2,), 8.0))
    results: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: results.append(run(torch.full((2,), 3.0))[0]))
    thread.start()
    thread.join()
    torch.testing.assert_close(results[0], torch.full((2,), 6.0))
    assert ("synchronize", 0) in run.driver.log


def test_a_thread_captures_only_what_it_has_run() -> None:
    run = Acted(twice)
    run(torch.ones(2))
    thread = threading.Thread(target=lambda: run(torch.ones(2)))
    thread.start()
    thread.join()
    assert run.counts() == (2, 0, 0)
    run(torch.ones(2))
    assert run.counts() == (2, 1, 1)


def test_many_threads() -> None:
    run = Acted(twice)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for k in range(100):
            x = torch.full((3,), float(seed * 1000 + k))
            if not torch.equal(run(x)[0], x * 2):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and run.driver.captures == 1 and run.replays > 300


@ONLY_PYTHON
@pytest.mark.parametrize("in_c", [True, False])
def test_addresses_are_compared_where_they_count(in_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_c and not hasattr(torch._C, "_tensors_data_ptrs_at_indices_equal"):
        pytest.skip("this torch has no such function")
    if not in_c:
        monkeypatch.delattr(torch._C, "_tensors_data_ptrs_at_indices_equal", raising=False)
    a, b, c = (torch.ones(2) for _ in range(3))
    addresses = [0, b.data_ptr(), c.data_ptr(), 0]
    for fixed, others in [((), [a, c, b, 1]), ((1,), [a, b, a, 1]), ((1, 2), [c, b, c, 1])]:
        same = cuda_graph._comparison(fixed)
        assert same([a, b, c, 1], addresses) and same(others, addresses)
        assert same([a, c, c, 1], addresses) is (1 not in fixed)


@ONLY_PYTHON
def test_what_is_dense() -> None:
    x = torch.empty(2, 3, 4)
    for dense in (x, x.permute(2, 0, 1), x[:1], x[:, :1].squeeze(1)[:1], x.unsqueeze(1).expand(2, 1, 3, 4), x[0, 0, 0]):
        assert recording._is_dense(dense.shape, dense.stride())
    for loose in (x[:, ::2], x[..., :3], x[:, :1].expand(2, 3, 4), x.as_strided((2, 3), (1, 1)), x[:, :1]):
        assert not recording._is_dense(loose.shape, loose.stride())


@ONLY_PYTHON
def test_spans() -> None:
    assert recording.span(torch.zeros(3, 4)) == 48
    assert recording.span(torch.zeros(3, 4)[:, :2]) == 40
    assert recording.span(torch.zeros(1).expand(5)) == 4
    assert recording.span(torch.zeros(0, 4)) == 0
