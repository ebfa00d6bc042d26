"""Replays by compiled code: when it plays, when it leaves a call to Python, and how it comes to be there."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.codegen import replay_build
from fxopt.codegen.replay_build import ReplayCode
from fxopt.ir.kernel import Artifact
from fxopt.runtime import copies
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.runtime.copies import MOST
from fxopt.runtime.cuda_graph import PER_THREAD_STREAM
from fxopt.runtime.recording import Nodes, Recording
from tests.runtime.fake_graphs import Acted, FakeDriver


class Steps:
    """Counts the replays that go through Python."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_python = 0
        play = Recording.play

        def counted(*args: Any) -> Any:
            self.in_python += 1
            return play(*args)

        monkeypatch.setattr(Recording, "play", counted)


@pytest.fixture(params=[True, False], ids=["nodes", "around"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, compiled_code: ReplayCode) -> Steps:
    monkeypatch.setattr(Acted, "extension", compiled_code)
    monkeypatch.setattr(FakeDriver, "in_graph", request.param)
    return Steps(monkeypatch)


NODES = pytest.mark.parametrize("steps", [True], indirect=True)
AROUND = pytest.mark.parametrize("steps", [False], indirect=True)


def scaled(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x * w,)


def captured(fn: Callable[..., Any] = scaled, **facts: Any) -> tuple[Acted, torch.Tensor]:
    """`fn` of an input and a weight of ones, captured; and the weight."""
    run, w = Acted(fn, fixed=(1,), **facts), torch.ones(4)
    for _ in range(2):
        run(torch.ones(4), w)
    return run, w


def test_all_but_the_capturing_call_is_replayed_by_compiled_code(steps: Steps) -> None:
    run, w = captured()
    assert (run.replays, steps.in_python) == (1, 1)
    for k in range(3):
        torch.testing.assert_close(run(torch.full((4,), float(k)), w)[0], torch.full((4,), float(k)))
    assert (run.replays, steps.in_python) == (4, 1)
    assert run.run.replayed((torch.full((4,), 7.0), w))[0].tolist() == [7.0] * 4  # type: ignore[index]
    assert run.run._replays == run.replays == 5


def test_results_need_no_gradient_and_are_as_the_mode_makes_them(steps: Steps) -> None:
    run, _ = captured()
    w = torch.nn.Parameter(torch.ones(4))
    for _ in range(2):
        run(torch.ones(4), w)
    with torch.enable_grad():
        (out,) = run(torch.ones(4), w)
    assert not out.requires_grad and not out.is_inference()
    with torch.inference_mode():
        assert run(torch.ones(4), w)[0].is_inference()
    assert steps.in_python == 2


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "x",
    [torch.full((4,), 3.0).as_subclass(Sub), torch.full((8,), 3.0)[::2], torch.full((1,), 3.0).expand(4)],
    ids=["subclass", "gaps", "expanded"],
)
def test_inputs_of_another_kind_are_left_to_python(steps: Steps, x: torch.Tensor) -> None:
    run, w = captured()
    torch.testing.assert_close(torch.Tensor(run(x, w)[0]), torch.full((4,), 3.0))
    assert (run.replays, steps.in_python) == (2, 2)


def test_weights_elsewhere_are_noticed(steps: Steps) -> None:
    run, w = captured()
    moved = torch.full((4,), 2.0)
    w.data = moved
    torch.testing.assert_close(run(torch.ones(4), w)[0], moved)
    assert run.counts() == (2, 1, 1)
    with pytest.raises(TypeError, match="list or a tuple"):
        run.run._latest.native(torch.ones(4))  # type: ignore[union-attr]
    assert run.run._latest.native([torch.ones(4)]) is None, "another number of inputs"  # type: ignore[union-attr]


@pytest.mark.parametrize("what", ["user_captures", "watched"])
def test_the_host_is_not_free(steps: Steps, what: str) -> None:
    run, w = captured()
    setattr(run.driver, what, True)
    torch.testing.assert_close(run(torch.full((4,), 5.0), w)[0], torch.full((4,), 5.0))
    assert run.counts() == (2, 1, 1)


def test_an_unfinished_turn_is_left_to_python(steps: Steps) -> None:
    run, w = captured()
    run.turns.owner = 1  # a thread that was interrupted while leaving
    torch.testing.assert_close(run(torch.full((4,), 5.0), w)[0], torch.full((4,), 5.0))
    assert run.driver.log[-3:] == [("synchronize", 0), ("replay", 7), ("record", 7)]
    assert (steps.in_python, run.turns.owner) == (2, 0)


def test_another_threads_turn_is_waited_for(steps: Steps) -> None:
    run, w = captured()
    results: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: results.append(run(torch.full((4,), 5.0), w)[0]))
    with run.turns.lock:
        thread.start()
        thread.join(0.1)
        assert not results
    thread.join()
    torch.testing.assert_close(results[0], torch.full((4,), 5.0))
    assert steps.in_python == 2


def in_line() -> tuple[Acted, torch.Tensor]:
    """`scaled`, all of whose turns were on the default stream."""
    run, w = Acted(scaled, fixed=(1,)), torch.ones(4)
    run.driver.current = 0
    for k in range(4):
        assert run(torch.full((4,), float(k)), w)[0].tolist() == [float(k)] * 4
    return run, w


def test_turns_on_the_default_stream_need_no_event(steps: Steps) -> None:
    run, w = in_line()
    assert run.driver.log == [("replay", 0)] * 3 and steps.in_python == 1 and run.turns.last == 0
    run.driver.log.clear()
    run.driver.current = 8
    for _ in range(2):
        run(torch.ones(4), w)
    run.driver.current = 0
    run(torch.ones(4), w)
    first = [("record", 0), ("wait", 8), ("replay", 8), ("record", 8)]
    assert run.driver.log == [*first, ("replay", 8), ("record", 8), ("wait", 0), ("replay", 0), ("record", 0)]
    assert steps.in_python == 2, "the first that had to wait"


def test_threads_default_streams_share_a_handle_but_no_order(steps: Steps) -> None:
    run, w = in_line()
    run.driver.current = PER_THREAD_STREAM
    run(torch.ones(4), w)
    run.driver.log.clear()
    for k in range(2):  # perhaps by another thread
        assert run(torch.full((4,), float(k)), w)[0].tolist() == [float(k)] * 4
    turn = [("wait", PER_THREAD_STREAM), ("replay", PER_THREAD_STREAM), ("record", PER_THREAD_STREAM)]
    assert run.driver.log == turn * 2


def test_who_cannot_wait_for_the_default_stream_has_done_nothing(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    run, w = in_line()
    run.driver.log.clear()
    run.driver.current = 8

    def fail(stream: int) -> None:
        raise RuntimeError("no")

    for what in ("record", "wait"):
        with monkeypatch.context() as patch:
            patch.setattr(run.driver, what, fail)
            with pytest.raises(RuntimeError, match="no"):
                run(torch.ones(4), w)
        assert (run.turns.last, run.turns.owner, run.replays) == (0, 0, 0)
    assert run(torch.full((4,), 5.0), w)[0].tolist() == [5.0] * 4
    assert run.driver.log[-3:] == [("wait", 8), ("replay", 8), ("record", 8)]


def test_an_error_of_the_driver_on_the_default_stream_ends_the_turn(steps: Steps) -> None:
    run, w = in_line()
    run.driver.code, before = 719, len(run.driver.log)
    kept = [torch.ones(4) for _ in range(3)]
    with pytest.raises(RuntimeError, match="copying for a CUDA graph: 719"):
        run(torch.cat(kept)[:4], w)
    assert (len(run.driver.log), run.turns.owner) == (before, 0)
    run.driver.code = 0
    assert run(torch.full((4,), 3.0), w)[0].tolist() == [3.0] * 4


def test_an_error_of_the_driver_ends_the_turn(steps: Steps) -> None:
    run, w = captured()
    run.driver.code = 719
    with pytest.raises(RuntimeError, match="copying for a CUDA graph: 719"):
        run(torch.ones(4), w)
    assert run.driver.log[-1] == ("record", 7) and run.replays == 1
    run.driver.code = 0
    torch.testing.assert_close(run(torch.full((4,), 3.0), w)[0], torch.full((4,), 3.0))
    assert (steps.in_python, run.turns.owner) == (1, 0)


def test_who_runs_out_of_memory_has_changed_nothing(steps: Steps) -> None:
    def step(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state += x
        return (state * 2,)

    wanted = {"short": False}

    def empty(shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
        if wanted["short"]:
            raise torch.OutOfMemoryError("no")
        return torch.empty_strided(shape, strides, dtype=dtype)

    run, state = captured(step, written=(1,))
    native = run.driver.native()
    run.driver.native = lambda: type(native)(**{**vars(native), "empty": empty})  # type: ignore[method-assign]
    run.run._latest.native = None  # type: ignore[union-attr]
    run.run._use(run.run._latest)
    before, version = state.clone(), state._version
    wanted["short"] = True
    with pytest.raises(torch.OutOfMemoryError):
        run(torch.ones(4), state)
    torch.testing.assert_close(state, before)
    assert (state._version, run.turns.owner) == (version, 0)
    wanted["short"] = False
    torch.testing.assert_close(run(torch.ones(4), state)[0], (before + 1) * 2)
    assert state._version > version and steps.in_python == 1


def test_a_turn_that_python_holds(steps: Steps) -> None:
    """Results that are views are Python's to make, all else is done by compiled code."""

    def viewing(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * w, w[1:3]

    run, w = captured(viewing)
    for k in range(3):
        x = torch.full((8,), float(k))[::2] if k == 1 else torch.full((4,), float(k))
        scaled_x, view = run(x, w)
        torch.testing.assert_close(scaled_x, x)
        assert view.data_ptr() == w.data_ptr() + w.itemsize and tuple(view.shape) == (2,)
    assert (run.replays, steps.in_python) == (4, 4) and run.run._play is None
    play = run.run._latest.play_within  # type: ignore[union-attr]
    assert play is not None and play([torch.ones(8)[::2], w], 7) is None, "another layout"
    assert play([w], 7) is None, "another number of inputs"
    out, nothing = play([torch.full((4,), 3.0), w], 7)  # type: ignore[misc]
    assert out.tolist() == [3.0] * 4 and nothing is None
    with pytest.raises(TypeError, match="inputs and a stream"):
        play([torch.ones(4), w])  # type: ignore[call-arg]
    run.driver.code = 9
    before = len(run.driver.log)
    with pytest.raises(RuntimeError, match="copying for a CUDA graph: 9"):
        play([torch.ones(4), w], 7)
    assert len(run.driver.log) == before, "neither launched nor the end of a turn recorded"


def test_code_that_is_there_later_is_used_from_then_on(monkeypatch: pytest.MonkeyPatch, compiled_code: ReplayCode) -> None:
    class Later:
        reason = None
        module: Any = None

        def __call__(self) -> Any:
            return self.module

    later = Later()
    monkeypatch.setattr(Acted, "extension", later)
    steps = Steps(monkeypatch)
    run, w = captured()
    run(torch.ones(4), w)
    assert steps.in_python == 2
    later.module = compiled_code()
    for k in range(3):
        torch.testing.assert_close(run(torch.full((4,), float(k)), w)[0], torch.full((4,), float(k)))
    assert steps.in_python == 3, "the first of these finds it"


# ---------------------------------------------------------------------- how it is made


def test_it_is_compiled_once(compiled_code: ReplayCode, monkeypatch: pytest.MonkeyPatch) -> None:
    store = compiled_code._store
    monkeypatch.setattr(replay_build, "build", lambda store: pytest.fail("compiled again"))
    again = ReplayCode(store)
    assert again.wait() is not None and again.reason is None


def test_damaged_code_is_not_loaded(compiled_code: ReplayCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replay_build.find(compiled_code._store)
    assert isinstance(found, Artifact)
    store = ArtifactStore(tmp_path / "cache")
    copy = store.put(found.key, "cpp", replay_build.MODULE, found.path, {}, {})
    copy.path.chmod(0o600)
    copy.path.write_bytes(copy.path.read_bytes()[:-1] + b"!")
    monkeypatch.setattr(replay_build, "build", lambda store: "not now")
    code = ReplayCode(ArtifactStore(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="damaged"):
        replay_build.find(code._store)
    assert code.wait() is None and code.reason == "not now"


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "no command here"), ("false", "does not work"), ("true", "No such file")]
)
def test_without_a_compiler(compiler: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CXX", compiler)
    code = ReplayCode(ArtifactStore(tmp_path / "cache"))
    assert code.wait() is None
    assert code.reason is not None and reason in code.reason
    assert code() is None


def test_the_compiler_does_not_outlive_the_process(tmp_path: Path) -> None:
    compiler, started = tmp_path / "slow", tmp_path / "started"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo slow && exit\necho $$ > {started}.part\n'
                        f"mv {started}.part {started}\nsleep 60\n")  # fmt: skip
    compiler.chmod(0o700)
    script = f"""
        import time
        from pathlib import Path
        from fxopt.codegen.replay_build import ReplayCode
        from fxopt.runtime.artifacts import ArtifactStore
        code = ReplayCode(ArtifactStore({str(tmp_path / "cache")!r}))
        assert code() is None
        while not Path({str(started)!r}).exists():
            time.sleep(0.01)
    """
    environment = {**os.environ, "FXOPT_CXX": str(compiler)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=True, timeout=60)
    process = int(started.read_text())
    for _ in range(100):
        if not Path(f"/proc/{process}").exists() or "State:\tZ" in Path(f"/proc/{process}/status").read_text():
            return
        time.sleep(0.01)
    pytest.fail("the compiler is still there")


def many(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (*(x + k for k, x in enumerate(xs)), xs[0][:0])


def play_many(run: Acted, call: int) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    inputs = [torch.full((2,), float(call + 10 * k)) for k in range(MOST + 3)]
    results = run(*inputs)
    torch.testing.assert_close(results, many(*inputs))
    return inputs, results


@AROUND
def test_several_copies_are_one_launch(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDriver, "one_launch", True)
    run = Acted(many, moved=tuple(range(MOST + 3)))
    for call in range(4):
        play_many(run, call)
    launches = [count for what, count in run.driver.log if what == "copies"]
    assert launches == [MOST, 3] * 6 and steps.in_python == 1, "three times two before and two after a graph"


# ---------------------------------------------------------------------- copies that are nodes


@NODES
def test_several_copies_are_few_nodes(steps: Steps) -> None:
    run = Acted(many, moved=tuple(range(MOST + 3)))
    kept = [play_many(run, call) for call in range(4)]
    sizes = [len(copies) for copies in run.driver.told.values()]
    assert sizes == [MOST, 3, MOST, 3] and run.driver.tellings == 3 * 4 and steps.in_python == 1
    for call, (_, results) in enumerate(kept):
        assert [x[0].item() for x in results[:-1]] == [call + 11 * k for k in range(MOST + 3)]


@NODES
def test_nodes_are_told_what_has_changed(steps: Steps) -> None:
    run, w = captured()
    x = torch.ones(4)
    (kept,) = run(x, w)
    first, last = run.driver.told.values()
    before = run.driver.tellings
    (other,) = run(x.fill_(3.0), w)
    assert run.driver.tellings == before + 1, "the result is elsewhere, the input is not"
    assert list(run.driver.told.values()) == [first, [(other.data_ptr(), *last[0][1:])]]
    assert (kept.tolist(), other.tolist(), steps.in_python) == ([1.0] * 4, [3.0] * 4, 1)


@NODES
def test_nodes_that_python_and_compiled_code_tell_in_turn(steps: Steps) -> None:
    run, w = captured()
    same, kept = torch.full((8,), 2.0)[::2].clone(), []
    for k in range(6):
        other_layout = torch.full((8,), float(k))[::2]
        kept.append(run(other_layout, w)[0])
        kept.append(run(same, w)[0])
        assert kept[-2].tolist() == [float(k)] * 4 and kept[-1].tolist() == [2.0] * 4
    assert steps.in_python == 1 + 6


@NODES
@pytest.mark.parametrize("in_python", [False, True])
def test_a_node_that_could_not_be_told_is_told_again(steps: Steps, in_python: bool) -> None:
    run, w = captured()
    x = torch.full((8,), 5.0)[::2] if in_python else torch.full((4,), 5.0)
    kept = run(torch.ones(4), w)
    run.driver.code = 719
    with pytest.raises(RuntimeError, match="copying for a CUDA graph: 719"):
        run(x, w)
    assert run.driver.log[-2:] == [("record", 7), ("record", 7)], "not launched, and the turn has ended"
    run.driver.code = 0
    assert run(x, w)[0].tolist() == [5.0] * 4 and kept[0].tolist() == [1.0] * 4
    assert run.turns.owner == 0


@NODES
def test_who_is_interrupted_while_telling_has_told_nothing(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    run, w = captured()
    x, play = torch.full((4,), 5.0), run.run._play
    recording = run.run._latest
    assert recording is not None and recording.nodes is not None
    native, recording.play_within, run.run._play = recording.native, None, None
    (node,) = recording.nodes.before

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        node.tell([(1, x.data_ptr(), 16)], interrupted)
    assert not node.told.is_known
    assert run(x, w)[0].tolist() == [5.0] * 4, "in Python"
    with pytest.raises(KeyboardInterrupt):
        node.tell([(1, x.data_ptr(), 16)], interrupted)
    run.run._play = play
    assert run(x, w)[0].tolist() == [5.0] * 4 and run.run._play is native, "in compiled code"


@NODES
def test_a_replay_alone_copies_nothing(steps: Steps) -> None:
    run, w = captured()
    x = torch.full((4,), 5.0)
    (out,) = run(x, w)
    x.fill_(6.0)
    out.zero_()
    recording = run.run._latest
    assert recording is not None
    recording.replay_alone(7)
    assert out.tolist() == [0.0] * 4
    assert run(x, w)[0].tolist() == [6.0] * 4


@NODES
def test_results_in_one_piece_of_memory_are_copied_by_nodes_in_python(steps: Steps) -> None:
    def overlapping(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * w
        return y, y[1:], x + 1

    run, w = captured(overlapping)
    for k in range(3):
        x = torch.full((4,), float(k))
        torch.testing.assert_close(run(x, w), overlapping(x, w))
    assert steps.in_python == 4 and run.run._latest.native.has_fixed([x, w])  # type: ignore[union-attr]


@NODES
def test_nodes_for_another_number_of_copies_are_refused(steps: Steps) -> None:
    run, _ = captured()
    recording = run.run._latest
    assert recording is not None and recording.nodes is not None
    recording.nodes = Nodes(recording.nodes.before, ())
    recording.native = None
    run.run._use(recording)
    assert run.run._play is None and "another number of copies" in run.notes[-1]


def test_the_kernel_of_copies_compiles_for_every_gpu() -> None:
    backend = pytest.importorskip("triton.backends.nvidia")
    assembler = Path(backend.__file__).parent / "bin" / "ptxas"
    for arch in (75, 80, 90, 100):
        command = [str(assembler), f"-arch=sm_{arch}", "-v", str(copies._PTX), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert " 0 bytes spill stores" in done.stderr
    text = copies._PTX.read_text()
    assert f"fxopt_copies_param_0[{ctypes.sizeof(copies.Copies)}]" in text
