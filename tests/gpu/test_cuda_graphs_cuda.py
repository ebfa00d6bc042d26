"""CUDA graphs on a GPU: whatever a caller does between calls, values are those of a run without graphs."""

from __future__ import annotations

import copy
import gc
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.codegen.replay_build import replay_code
from fxopt.runtime import graph_driver, native_replay
from fxopt.runtime.artifacts import default_store
from fxopt.runtime.copies import can_be_told, copying_kernel
from fxopt.runtime.cuda_graph import GraphedExecutor, _turns_at
from fxopt.runtime.in_parts import Whole
from fxopt.runtime.recording import Recording
from tests.gpu.networks import Worded, close, network, reasons, replays, x_of
from tests.guest.agreement import compiled, graphs

pytestmark = pytest.mark.gpu
CALLS = 5


@pytest.fixture(params=["native", "native, copies around", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How replays are done in the test."""
    if request.param == "python":
        monkeypatch.setenv("FXOPT_DISABLE", native_replay.NAME)
    else:
        code = replay_code(default_store())
        assert code.wait() is not None, code.reason
    monkeypatch.setattr(graph_driver, "COPIES_IN_GRAPH", request.param != "native, copies around")
    return str(request.param)


ONLY_PYTHON = pytest.mark.parametrize("way", ["python"], indirect=True)


@pytest.fixture(autouse=True)
def _every_way(way: str) -> None: ...


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_results_are_kept_across_calls(made: list[GraphedExecutor]) -> None:
    model = network()
    run = compiled(model)
    inputs = [x_of(k) for k in range(CALLS)]
    kept = [run(x) for x in inputs]
    close(kept, [model(x) for x in inputs])
    assert replays(made) == CALLS - 1 and made[0].graphs == 1
    assert len({out.data_ptr() for out in kept}) == CALLS


def test_values_equal_those_without_graphs_bit_for_bit(made: list[GraphedExecutor]) -> None:
    model = network()
    plain = compiled(model, cuda_graphs=False)
    want = [plain(x_of(k)) for k in range(CALLS)]
    run = compiled(model)
    assert all(torch.equal(run(x_of(k)), want[k]) for k in range(CALLS))
    assert replays(made) == CALLS - 1


def test_inputs_may_live_anywhere(made: list[GraphedExecutor]) -> None:
    model = network()
    run = compiled(model)
    memory = torch.zeros(20000, device="cuda")
    for k in range(CALLS):
        x = memory[k * 1001 : k * 1001 + 512].view(8, 64)  # not aligned
        x.copy_(x_of(k))
        close(run(x), model(x))
    assert replays(made) == CALLS - 1


def test_the_host_may_overwrite_an_input_after_the_call(made: list[GraphedExecutor]) -> None:
    model = network()
    run, x = compiled(model), x_of(0)
    for k in range(CALLS):
        x.copy_(x_of(k))
        out = run(x)
        x.zero_()
        close(out, model(x_of(k)))
    assert replays(made) == CALLS - 1


def test_replays_are_one_call(made: list[GraphedExecutor], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    run = compiled(model)
    for k in range(2):
        run(x_of(k))
    in_python = 0
    play = Recording.play

    def counted(*args: Any) -> Any:
        nonlocal in_python
        in_python += 1
        return play(*args)

    monkeypatch.setattr(Recording, "play", counted)
    for k in range(4):
        close(run(x_of(k)), model(x_of(k)))
    assert replays(made) == 5 and in_python == (4 if way == "python" else 0)


@ONLY_PYTHON
def test_the_kernel_of_copies_is_right() -> None:
    assert copying_kernel(torch.cuda.current_device()) != 0
    assert can_be_told(torch.cuda.current_device(), torch.cuda.Stream().cuda_stream)


def test_replays_that_wait_keep_what_they_were_told(made: list[GraphedExecutor], way: str) -> None:
    """Many calls of one graph behind a device that is busy, each with inputs and results elsewhere."""
    model = network()
    run = compiled(model)
    inputs = [x_of(k) for k in range(60)]
    for x in inputs[:3]:
        run(x)
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    results = [run(x) for x in inputs]
    assert replays(made) == 62
    recording = made[0]._latest
    assert recording is not None and (recording.nodes is not None) == (way != "native, copies around")
    for x, out in zip(inputs, results, strict=True):
        close(out, model(x))


def test_turns_on_the_default_stream_are_waited_for(made: list[GraphedExecutor]) -> None:
    """As long as all turns are on the default stream no end of one is recorded; the first on another one does that."""
    model = network(256)
    run = compiled(model)
    inputs = [x_of(k, 64, 256) for k in range(8)]
    want = [model(x) for x in inputs]
    for _ in range(2):
        run(inputs[0])
    turns = made[0]._turns
    torch.cuda.synchronize()
    turns.last, turns.driver.in_line = None, True
    torch.cuda._sleep(20_000_000)
    got = [run(x) for x in inputs[:4]]
    assert turns.driver.in_line
    for x in inputs[4:6]:
        with torch.cuda.stream(torch.cuda.Stream()):
            got.append(run(x))
    got += [run(x) for x in inputs[6:]]
    assert not turns.driver.in_line
    torch.cuda.synchronize()
    close(got, want)


def test_a_graph_outlives_replays_on_the_default_stream(made: list[GraphedExecutor]) -> None:
    model = network(256)
    run = compiled(model)
    x = x_of(0, 64, 256)
    want = model(x)
    for _ in range(2):
        run(x)
    turns = made[0]._turns
    torch.cuda.synchronize()
    turns.last, turns.driver.in_line = None, True
    torch.cuda._sleep(50_000_000)
    got = [run(x) for _ in range(3)]
    made[0]._decline("a test drops what was captured")
    gc.collect()
    torch.cuda.empty_cache()
    close(got, [want] * 3)


def _in_place(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(1.5)


def _load(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def _assign(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)


def _data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 0.7


def _replace(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight * 0.9)


def _there_and_back(model: nn.Module) -> None:
    model.cpu()
    junk = [torch.full((64, 256), float("nan"), device="cuda") for _ in range(64)]
    model.cuda()
    del junk


def _freed_and_reused(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.cpu())
    torch.cuda.empty_cache()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter((module.weight * -1).cuda())


@pytest.mark.parametrize("change", [_in_place, _load, _assign, _data, _replace, _there_and_back, _freed_and_reused])
def test_weights_that_change(change: Callable[[nn.Module], None], made: list[GraphedExecutor]) -> None:
    model = network()
    run = compiled(model)
    for k in range(3):
        close(run(x_of(k)), model(x_of(k)))
    for _ in range(3):
        change(model)
        for k in range(3):
            close(run(x_of(k)), model(x_of(k)))
    assert replays(made) >= 2


def test_two_models_of_one_class(made: list[GraphedExecutor]) -> None:
    models = [network(), network()]
    _in_place(models[1])
    torch.compiler.reset()
    runs = [torch.compile(model, backend="fxopt") for model in models]
    for k in range(4):
        for run, model in zip(runs, models, strict=True):
            close(run(x_of(k)), model(x_of(k)))
    assert replays(made) == 6


def test_threads_and_streams(made: list[GraphedExecutor]) -> None:
    models = [network(64), network(96)]
    torch.compiler.reset()
    runs = [torch.compile(model, backend="fxopt") for model in models]
    widths = (64, 96)
    for run, width in zip(runs, widths, strict=True):
        for k in range(3):
            run(x_of(k, 8, width))
    expected = [[model(x_of(k, 8, width)) for k in range(20)] for model, width in zip(models, widths, strict=True)]
    inputs = [[x_of(k, 8, width) for k in range(20)] for width in widths]
    torch.cuda.synchronize()
    failures: list[str] = []
    alone, begun = threading.Lock(), threading.Barrier(3)

    def work(number: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            # Dynamo compiles again for a thread with another number of CPU threads, which compiling may change once more,
            # and torch 2.11 refuses calls of compiled modules while any thread is tracing.
            with alone:
                for run, xs in zip(runs, inputs, strict=True):
                    for x in xs[:3]:
                        run(x)
            begun.wait()
            got = [[], []]  # type: ignore[var-annotated]
            for repetition in range(5):
                for which in ((number + repetition) % 2, (number + repetition + 1) % 2):
                    got[which] = [runs[which](x) for x in inputs[which]]
            torch.cuda.current_stream().synchronize()
            for which in (0, 1):
                try:
                    close(got[which], expected[which])
                except AssertionError as error:
                    failures.append(f"thread {number}: {error}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert replays(made) > 500


def test_a_slow_stream_is_waited_for(made: list[GraphedExecutor]) -> None:
    """A replay on one stream may not overwrite what one on another, further behind, still needs."""
    model = network(256)
    run = compiled(model)
    inputs = [x_of(k, 64, 256) for k in range(4)]
    want = [model(x) for x in inputs]
    for _ in range(2):
        run(inputs[0])
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    got = []
    for stream, x in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            got.append(run(x))
    torch.cuda.synchronize()
    close(got, want)
    assert replays(made) == 5


@ONLY_PYTHON
def test_exceptions_in_the_middle(made: list[GraphedExecutor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    run = compiled(model)
    for k in range(2):
        run(x_of(k))
    recording = made[0]._latest
    assert recording is not None and recording.nodes is not None
    replay: Any = recording.replay
    real = replay.tell
    for after in range(3):
        seen = 0

        def tell_or_raise(*args: Any, after: int = after) -> None:
            nonlocal seen
            seen += 1
            if seen > after:
                raise KeyboardInterrupt
            real(*args)

        monkeypatch.setattr(replay, "tell", tell_or_raise)
        if after < 2:
            with pytest.raises(KeyboardInterrupt):
                run(x_of(9))
        monkeypatch.undo()
        close(run(x_of(after)), model(x_of(after)))


class Dropping(nn.Module):
    """Drops in every mode; wide, so that masks that are equal are no coincidence."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.blocks(F.dropout(x, 0.5, training=True)), 0.5, training=True)


def test_random_numbers_are_those_without_graphs(made: list[GraphedExecutor]) -> None:
    model, x = Dropping(), x_of(0)
    plain = compiled(model, cuda_graphs=False)
    torch.manual_seed(5)
    want, state = [plain(x) for _ in range(CALLS)], torch.cuda.get_rng_state()
    after = torch.rand(4, device="cuda")
    run = compiled(model)
    torch.manual_seed(5)
    got = [run(x) for _ in range(CALLS)]
    assert torch.equal(torch.cuda.get_rng_state(), state) and torch.equal(torch.rand(4, device="cuda"), after)
    assert replays(made) == CALLS - 1
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(got[2], got[3])
    torch.manual_seed(5)
    assert torch.equal(run(x), want[0])


def test_eager_random_ops_are_not_captured(made: list[GraphedExecutor]) -> None:
    model = Dropping()
    run = compiled(model, strict=False, fallback_random=True)  # eager's dropout is a retreat
    for k in range(CALLS):
        torch.manual_seed(k)
        got = run(x_of(0))
        torch.manual_seed(k)
        close(got, model(x_of(0)))
    assert any("draws from torch's generator" in text for text in reasons())
    assert replays(made) == CALLS - 1, "what is between them is captured"


def test_other_threads_draw_while_a_run_is_captured(made: list[GraphedExecutor]) -> None:
    stop, failures = threading.Event(), []

    def draw() -> None:
        try:
            while not stop.is_set():
                torch.rand(100, device="cuda")
        except RuntimeError as error:
            failures.append(str(error))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for depth in (3, 4, 5):
            model = network(64, depth)
            run = compiled(model)
            for k in range(3):
                close(run(x_of(k)), model(x_of(k)))
    finally:
        stop.set()
        thread.join()
    assert not failures and replays(made) == 6


def test_lengths_that_vary(made: list[GraphedExecutor]) -> None:
    model = network()
    run = compiled(model, dynamic=True, cuda_graph_limit=4)
    for _ in range(3):
        for length in range(2, 10):
            x = x_of(length, 3, length, 64)
            close(run(x), model(x))
    assert sum(executor.graphs for executor in made) == 4
    assert len(graphs()) <= 2


@ONLY_PYTHON
def test_two_hundred_lengths_are_two_compilations_and_a_few_graphs(made: list[GraphedExecutor]) -> None:
    """Random lengths, two of them often: these have graphs."""
    model = network()
    run = compiled(model, cuda_graph_limit=4)
    rng = random.Random(0)
    lengths = [*rng.sample(range(2, 201), 199), 1]
    calls = [length for k in range(0, 200, 10) for length in (*lengths[k : k + 10], 77, 77, 33)]
    for length in calls:
        x = x_of(length, length, 64)
        close(run(x), model(x))
    assert len(graphs()) <= 3, "the first length, all others, and 1, which is a size of its own"
    assert sum(executor._captures for executor in made) == 2 and replays(made) >= 19 * 3


class Cached(nn.Module):
    """Writes a row into a cache that it keeps, and one that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = network()
        self.register_buffer("own", torch.zeros(16, 64, device="cuda"))

    def forward(self, x: torch.Tensor, at: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        y = self.blocks(x)
        self.own.index_copy_(0, at, y)
        given.index_copy_(0, at, y * 2)
        return (y @ self.own.t()).softmax(-1) @ given


def test_caches_are_written_where_they_are(made: list[GraphedExecutor]) -> None:
    model = Cached()
    eager = copy.deepcopy(model)
    run = compiled(model)
    mine, theirs = torch.zeros(16, 64, device="cuda"), torch.zeros(16, 64, device="cuda")
    for k in range(8):
        x, at = x_of(k, 1, 64), torch.tensor([k], device="cuda")
        version = mine._version
        close(run(x, at, mine), eager(x, at, theirs))
        close((model.own, mine), (eager.own, theirs))
        assert mine._version > version
    assert replays(made) >= 6
    other, others = torch.zeros(16, 64, device="cuda"), torch.zeros(16, 64, device="cuda")
    close(run(x, at, other), eager(x, at, others))
    close(other, others)


def test_results_share_memory_as_in_eager(made: list[GraphedExecutor]) -> None:
    blocks = network()

    def fn(x: torch.Tensor) -> Any:
        y = blocks(x)
        return y, y[1:], x[2:], x, y.t().expand(2, 64, 8)

    run = compiled(fn)
    for k in range(4):
        x = x_of(k)
        got, want = run(x), fn(x)
        close(got, want)
        assert [g.stride() for g in got] == [w.stride() for w in want]
        assert got[3] is x and got[2].data_ptr() == x[2:].data_ptr()
        got[0].zero_()
        assert (got[1].abs().max() == 0) == (want[1].data_ptr() == want[0][1:].data_ptr())
    assert replays(made) == 3


def test_compiled_inside_compiled_and_hooks(made: list[GraphedExecutor]) -> None:
    inner_model = network(64, 4)
    torch.compiler.reset()
    inner = torch.compile(inner_model, backend="fxopt")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = network(64, 4), network(64, 4)
            self.first.register_forward_hook(torch._dynamo.disable(lambda m, args, out: out + inner(out), recursive=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    outer = Outer()
    run = torch.compile(outer, backend="fxopt")
    for k in range(4):
        close(run(x_of(k)), outer(x_of(k)))
    assert replays(made) >= 6


def test_inside_a_capture_of_the_users(made: list[GraphedExecutor]) -> None:
    model = network()
    run, x = compiled(model), x_of(0)
    for _ in range(3):
        run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    before = replays(made)
    x.copy_(x_of(7))
    graph.replay()
    close(out, model(x_of(7)))
    close(run(x), model(x_of(7)))
    assert replays(made) == before + 1


def test_inference_mode_and_back(made: list[GraphedExecutor]) -> None:
    model = network()
    run = compiled(model)
    outs = []
    for k in range(6):
        with torch.inference_mode(k % 2 == 1):
            outs.append(run(x_of(k)))
            assert outs[-1].is_inference() == (k % 2 == 1)
    for k, out in enumerate(outs):
        close(out.clone(), model(x_of(k)))


def test_gradients_are_left_to_training(made: list[GraphedExecutor]) -> None:
    model = network()
    run = compiled(model)
    with torch.enable_grad():
        for k in range(3):
            run(x_of(k)).sum().backward()
    assert not made
    for k in range(3):
        close(run(x_of(k)), model(x_of(k)))
    assert replays(made) == 2


def test_what_is_not_captured_says_why(made: list[GraphedExecutor]) -> None:
    model = network()
    close(compiled(lambda x: model(x.cpu().mean().cuda() + x))(x_of(0)), model(x_of(0) + x_of(0).mean()))
    assert any("not in a GPU's memory" in text or "runs on the CPU" in text for text in reasons())
    made.clear()
    close(compiled(lambda x: x.sin() + 1)(x_of(0)), x_of(0).sin() + 1)
    assert "not captured: it has 1 step; a replay saves time from 6 on" in reasons()
    assert not made


@pytest.mark.parametrize("telling", [False, True])
def test_large_results_are_made_by_a_part_that_runs_plainly(telling: bool, made: list[GraphedExecutor]) -> None:
    model = Worded(telling)
    run = compiled(model)
    inputs = [x_of(k, 512, 64) for k in range(CALLS)]
    kept = [run(x) for x in inputs]
    close(kept, [model(x) for x in inputs])
    assert replays(made) == CALLS - 1 and any("the last ones, so that their results need no copies" in t for t in reasons())
    assert len(made[0]._way.lent) == (0 if telling else 1)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    got = []
    for stream, x in zip(streams, inputs, strict=False):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            got.append(run(x))
    torch.cuda.synchronize()
    close(got, kept[:3])


def test_several_models_in_parts_share_memory(made: list[GraphedExecutor]) -> None:
    torch.compiler.reset()
    models = [Worded(), Worded().double(), Worded()]
    runs = [torch.compile(m, backend="fxopt") for m in models]
    inputs = [x_of(k, 512, 64) for k in range(3)]
    inputs[1] = inputs[1].double()
    for _ in range(4):
        got = [run(x) for run, x in zip(runs, inputs, strict=True)]
        close(got, [model(x) for model, x in zip(models, inputs, strict=True)])
    assert replays(made) >= 6


def test_parts_before_and_after_run_plainly(made: list[GraphedExecutor]) -> None:
    blocks = network(64, 6)

    def fn(x: torch.Tensor, host: torch.Tensor) -> Any:
        y = blocks(host.cuda() * 2 + x)
        return y, y.sum(0).cpu()

    run = compiled(fn)
    for k in range(CALLS):
        x, host = x_of(k), torch.full((64,), float(k))
        close(run(x, host), fn(x, host))
    assert replays(made) == CALLS - 1 and any("not in a GPU's memory" in text for text in reasons())


def test_a_capture_that_fails_leaves_everything_as_it_was(
    made: list[GraphedExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    run = compiled(model)
    run(x_of(0))
    (executor,) = made
    real = executor._executor

    def waits(inputs: list[Any]) -> Any:
        torch.cuda.synchronize()  # not permitted while capturing
        return real(inputs)

    executor._way = Whole(waits)
    for k in range(3):
        close(run(x_of(k)), model(x_of(k)))
    assert any("not captured: " in text and "captur" in text for text in reasons())
    torch.cuda.synchronize()
    assert torch.rand(3, device="cuda").shape == (3,)
    fresh = network(96)
    again = compiled(fresh)
    for k in range(3):
        close(again(x_of(k, 8, 96)), fresh(x_of(k, 8, 96)))
    assert replays(made[1:]) == 2


def test_graphs_share_memory_and_give_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in pools alone: what else is reserved changes as well, with workspaces that are freed before a capture, or stand
    in the middle of memory that a contest has given up."""
    driver = _turns_at(0).driver
    monkeypatch.setattr(driver, "_pool", lambda: None)  # a pool of its own, whatever other tests have left in theirs
    others = {tuple(pool.id) for pool in graph_driver._pools}

    def reserved() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def held() -> int:
        reserved()
        pools = {tuple(pool.id) for pool in graph_driver._pools} - others
        return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) in pools)

    torch.compiler.reset()
    model = network(256, 12)
    before = reserved()
    x = x_of(0, 2048, 256)
    runs = [torch.compile(model, backend="fxopt")]
    runs[0](x)
    assert not held()
    for _ in range(3):
        runs[0](x)
    one = held()
    runs += [torch.compile(lambda x, k=k: model(x) * k, backend="fxopt") for k in range(2, 5)]
    for run in runs[1:]:
        for _ in range(3):
            run(x)
    several = held()
    assert one >= x.nbytes
    assert several - one < one / 4, "each graph has its own memory"
    del runs, run
    torch.compiler.reset()
    assert not held(), "somebody holds a graph"
    assert reserved() <= before + 2 * (64 << 20), "all but the workspaces of libraries has gone back"


def test_deterministic_algorithms_fill_memory(made: list[GraphedExecutor]) -> None:
    model = network()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        run = compiled(model)
        for k in range(4):
            close(run(x_of(k)), model(x_of(k)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_pool_of_the_users_is_not_shared(made: list[GraphedExecutor]) -> None:
    """A run that would be captured while allocations go to the caller's pool is right, captured or not."""
    model = network()
    run = compiled(model)
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        outs = [run(x_of(k)) for k in range(4)]
        junk = [torch.full((8, 64), float("nan"), device="cuda") for _ in range(100)]
        outs.append(run(x_of(4)))
    close(outs, [model(x_of(k)) for k in range(5)])
    del junk


def test_index_errors_are_as_good_as_without(tmp_path: Any) -> None:
    from tests.gpu.test_guest_cuda import run_apart

    script = """
        import torch
        from torch import nn
        table = nn.Embedding(10, 64).cuda()
        blocks = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(4))).cuda()
        run = torch.compile(lambda i: blocks(table(i)), backend="fxopt")
        with torch.no_grad():
            for k in range(4):
                run(torch.arange(4, device="cuda") + k)
            torch.cuda.synchronize()
            print("fine until here")
            run(torch.tensor([1, 2, 3, 10], device="cuda"))
            torch.cuda.synchronize()
    """
    failed = run_apart(script, tmp_path)
    assert "fine until here" in failed.stdout and failed.returncode != 0
    assert "device-side assert" in failed.stderr
