"""Sizes and numbers that change between calls: right every time, and compiled a bounded number of times."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F

from tests.guest.agreement import compiled, graphs, same


def encoder_step(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    scores = torch.softmax(x @ x.transpose(1, 2) * w.shape[0] ** -0.5, -1)
    return F.layer_norm(scores @ (x * w) + x, (w.shape[0],)).sum(1) + x.shape[1]


def test_two_hundred_sequence_lengths_are_one_compilation() -> None:
    lengths = random.Random(0)
    run, w = compiled(encoder_step, dynamic=True), torch.randn(8)
    for _ in range(200):
        x = torch.randn(2, lengths.randrange(2, 90), 8)
        torch.testing.assert_close(run(x, w), encoder_step(x, w), rtol=1e-4, atol=1e-5)
    assert len(graphs()) == 1


def test_lengths_in_training() -> None:
    run, w = compiled(encoder_step, dynamic=True), torch.randn(8, requires_grad=True)
    for length in (5, 3, 17, 8):
        x = torch.randn(2, length, 8)
        (got,), (want,) = (torch.autograd.grad(f(x, w).square().sum(), w) for f in (run, encoder_step))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert len(graphs()) == 2, "one forward, one backward"


def test_one_and_zero_are_sizes_too() -> None:
    run = compiled(lambda x: (x.softmax(0), x.sum(1), x.mean(), (x + 1).t().contiguous()), dynamic=True)
    for shape in ((3, 4), (1, 4), (5, 1), (0, 4), (4, 0), (1, 1)):
        x = torch.randn(shape)
        same(run(x), (x.softmax(0), x.sum(1), x.mean(), (x + 1).t().contiguous()))
    assert len(graphs()) <= 7


def test_sizes_in_arithmetic() -> None:
    def fn(x: torch.Tensor) -> Any:
        n = x.shape[0]
        halves = x[: n // 2], x[n // 2 :]
        padded = F.pad(x, (0, 0, 0, -n % 8)).view(-1, 8, x.shape[1])
        return halves[0].sum() + halves[1].mean(), padded.sum(1), torch.arange(n) * (n % 3), x.reshape(-1)[: n * 2], n + 1

    run = compiled(fn, strict=False, dynamic=True)
    for n in (6, 9, 16, 31, 8):
        x = torch.randn(n, 4)
        same(run(x), fn(x))
    assert len(graphs()) <= 3


def test_strides_that_change() -> None:
    run = compiled(lambda x: x * 2 + x.sum(0), dynamic=True)
    for x in (torch.randn(4, 6), torch.randn(6, 4).t(), torch.randn(8, 12)[::2, ::2], torch.randn(6).expand(4, 6)):
        same(run(x), x * 2 + x.sum(0))


def test_integers_and_floats_that_change_compile_a_few_times() -> None:
    run = compiled(lambda x, n, s: (x * n).sin() * s)
    x = torch.randn(5)
    for n in range(2, 12):
        same(run(x, n, n / 7), (x * n).sin() * (n / 7))
    assert len(graphs()) <= 4


def test_numbers_of_a_module_that_change() -> None:
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.scale = 0, 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls + self.scale

    mine, eager = Counter(), Counter()
    run = compiled(mine)
    for k in range(6):
        mine.scale = eager.scale = k / 3
        x = torch.randn(3)
        same(run(x), eager(x))
    assert mine.calls == 6


def test_a_size_that_depends_on_data() -> None:
    def fn(x: torch.Tensor) -> Any:
        return x[x > 0] * 2, x.nonzero().sum(), int(x.argmax()) + 1

    run = compiled(fn, strict=False)
    for _ in range(3):
        x = torch.randn(20)
        same(run(x), fn(x))


def test_more_elements_than_32_bits_count() -> None:
    # Never filled: an expanded row costs nothing, and only the index arithmetic is at stake.
    x = torch.arange(3, dtype=torch.int8).expand(2**31 // 3 + 100, 3)

    def fn(x: torch.Tensor) -> Any:
        return x[-2:] + 1, x[2**30 // 2 : 2**30 // 2 + 2, 1] * 2

    same(compiled(fn)(x), fn(x))
