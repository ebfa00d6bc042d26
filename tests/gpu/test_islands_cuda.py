"""Plans in whose midst something cannot be captured, on a GPU: their parts are, and nobody notices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from fxopt.runtime.cuda_graph import GraphedExecutor
from tests.gpu.networks import close, network, reasons, replays, x_of
from tests.guest.agreement import compiled

pytestmark = pytest.mark.gpu


class _Meanwhile(threading.local):
    """What this thread's gates do beside their work."""

    do: Callable[[torch.Tensor], None] = staticmethod(lambda x: None)


meanwhile = _Meanwhile()


@torch.library.custom_op("fxopt_islands::gate", mutates_args=())
def gate(x: torch.Tensor) -> torch.Tensor:
    """Waits for the GPU, as nothing that is captured may: x, halved where its sum is negative."""
    meanwhile.do(x)
    return x * (0.5 if x.sum().item() < 0 else 1.0)


@gate.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Gated(nn.Module):
    """Three networks with a gate after each but the last, whose results are all needed in the end."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.parts = nn.ModuleList(network(width, 6) for _ in range(3))
        self.register_buffer("total", torch.zeros(width).cuda())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = self.parts[0](x)
        b = self.parts[1](torch.ops.fxopt_islands.gate(a))
        if self.total is not None:
            self.total += b.sum(0)
        c = self.parts[2](torch.ops.fxopt_islands.gate(b))
        return a + c, b, c[1:]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_parts_around_islands_are_replayed(made: list[GraphedExecutor]) -> None:
    model, eager = Gated(), Gated()
    run = compiled(model, strict=False)
    inputs = [x_of(k) for k in range(5)]
    kept = [run(x) for x in inputs]
    close(kept, [eager(x) for x in inputs])
    close(model.total, eager.total)
    assert len(made) == 3 and replays(made) == 12
    assert any("in 3 parts, but for 2 of" in text and "fxopt_islands" in text for text in reasons())


def test_lengths_that_vary_around_islands(made: list[GraphedExecutor]) -> None:
    model = Gated()
    run = compiled(model, strict=False, dynamic=True)
    for _ in range(3):
        for length in (3, 5, 8):
            close(run(x_of(length, length, 64)), model(x_of(length, length, 64)))
    assert replays(made) == 18


def test_other_models_run_within_islands(made: list[GraphedExecutor], monkeypatch: pytest.MonkeyPatch) -> None:
    """They use the memory that the parts are captured in."""
    model, other = Gated(), network(64, 6)
    run = compiled(model, strict=False)
    inner = torch.compile(other, backend="fxopt")
    for k in range(3):
        run(x_of(k))
        inner(x_of(k))
    got: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(meanwhile, "do", lambda x: got.append((inner(x), other(x))), raising=False)
    for k in range(3):
        close(run(x_of(k)), model(x_of(k)))
    assert len(got) == 12
    for mine, theirs in got:
        close(mine, theirs)
    assert replays(made) >= 3 * 5 + 2


def test_exceptions_in_islands_and_weights_that_move(made: list[GraphedExecutor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gated()
    run = compiled(model, strict=False)

    def refuse(x: torch.Tensor) -> None:
        raise KeyError("no gate today")

    for k in range(3):
        close(run(x_of(k)), model(x_of(k)))
    with monkeypatch.context() as patch:
        patch.setattr(meanwhile, "do", refuse, raising=False)
        with pytest.raises(KeyError, match="no gate today"):
            run(x_of(3))
    for p in model.parameters():
        p.data = p.data * 0.9
    for k in range(3):
        close(run(x_of(k)), model(x_of(k)))
    assert replays(made) == 2 * 3 + 1 + 2 * 3


def test_threads_take_turns_part_by_part(made: list[GraphedExecutor]) -> None:
    model = Gated()
    run = compiled(lambda x: model.parts[2](torch.ops.fxopt_islands.gate(model.parts[0](x))), strict=False)
    want = [model.parts[2](gate(model.parts[0](x_of(k)))) for k in range(20)]
    for k in range(2):
        run(x_of(k))
    torch.cuda.synchronize()
    failures = list[str]()

    def work() -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            inputs = [x_of(k) for k in range(20)]
            got = [run(x) for x in inputs]
            torch.cuda.current_stream().synchronize()
            try:
                close(got, want)
            except AssertionError as error:
                failures.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert replays(made) >= 2 + 3 * 2 * 18
