"""Attention found in a schedule: which steps go, where operands are read from, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.capture.decompositions import decompositions
from fxopt.ir.region import Alias, Alternatives, Attention, Call, Matrix, Ref, Region
from fxopt.lower import Lowered
from fxopt.lower.copies import Copy, Matrices
from fxopt.lower.schedule import schedule
from fxopt.lower.written_attention import find_written_attention
from tests.lower.capturing import moved
from tests.lower.harness import lower
from tests.lower.test_attention_kernels import BF16, rand, searched

Q, K, V = rand(2, 4, 7, 16), rand(2, 4, 40, 16), rand(2, 4, 40, 16)


def odd(scores: Tensor) -> Tensor:
    """What no pass before takes for attention."""
    return torch.softmax(torch.tanh(scores), -1)


def found(fn: Callable[..., Any], *args: Tensor) -> tuple[Lowered, Attention, list[str]]:
    """The schedule, the only attention in it, and the kinds of the steps that it takes the place of."""
    low = searched(fn, *args)
    (each,) = (s for s in low.steps if isinstance(s, Alternatives))
    (own,) = each.ways[1].steps
    assert isinstance(own, Attention) and own.scores is not None
    return low, own, [type(s).__name__ for s in each.ways[0].steps]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (odd(q @ k.mT) @ v).transpose(1, 2).contiguous()


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(2, 2, 2, 40, 16).reshape(2, 4, 40, 16) for x in (k, v))
    return attend(q, k, v)


def test_copies_of_operands_and_result_go() -> None:
    low, own, steps = found(attend, Q, K, V)
    assert steps.count("Call") == 2 and steps[-1] == "Region"
    assert [s for s in low.steps if not isinstance(s, Alias | Alternatives)] == []
    assert own.reads() == low.inputs and own.out.buffer == low.outputs[0].name
    for x, given in zip((own.query, own.key, own.value), (Q, K, V), strict=True):
        assert x.shape == given.shape and x.strides == given.stride()
    assert own.out.strides == (7 * 64, 16, 64, 1)


def test_repeated_keys_are_read_once_for_a_group() -> None:
    k, v = rand(2, 2, 40, 16), rand(2, 2, 40, 16)
    low, own, _ = found(repeated, Q, k, v)
    assert own.key.shape == own.value.shape == (2, 2, 40, 16) and own.key.strides == k.stride()
    assert own.reads() == low.inputs and own.query.shape == (2, 4, 7, 16)


def test_a_copy_that_others_read_stays() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        dense = k.contiguous()
        return attend(q, dense, v), dense.view(-1)

    low, own, _ = found(fn, Q, K, V)
    assert any(isinstance(s, Region) for s in low.steps) and own.key.strides in (K.stride(), (2560, 640, 16, 1))


def test_keys_may_have_contiguous_rows() -> None:
    _, own, _ = found(lambda q, k, v: odd(q @ k) @ v, Q, K.mT.contiguous(), V)
    assert own.key.strides == (2560, 640, 1, 40) and own.value.strides == V.stride()


def test_one_matrix() -> None:
    _, own, _ = found(lambda q, k, v: odd(q @ k.T) @ v, *(x[0, 0].contiguous() for x in (Q, K, V)))
    assert own.query.shape == (1, 1, 7, 16) and own.scores is not None and own.scores.axes[0] is None


def test_what_a_product_adds_is_part_of_the_scores() -> None:
    q, k, v = (x.flatten(0, 1).contiguous() for x in (Q, K, V))
    bias = torch.randn(8, 7, 40).to(BF16)
    _, own, _ = found(lambda q, k, v, b: odd(torch.baddbmm(b, q, k.mT)) @ v, q, k, v, bias)
    assert own.scores is not None and len(own.scores.reads()) == 1


def overwritten(name: str, *args: Tensor) -> list[Attention]:
    """What is found where a call before the last product writes the input `name` in place."""
    low = lower(lambda q, k, v, m: odd(q @ k.mT + m) @ v, args, decompose=decompositions())
    low = schedule(moved(low, "cuda"))
    assert len(list(find_written_attention(low))) == 1
    written = dict(zip("qkvm", low.inputs, strict=True))[name]
    last = max(k for k, s in enumerate(low.steps) if isinstance(s, Call))
    low.steps.insert(last, Call("aten::zero_.default", (Ref(written),), writes=(written,)))
    return [w.step for w in find_written_attention(low)]


MASK = torch.zeros(7, 40).to(BF16)


@pytest.mark.parametrize(("name", "count"), [("q", 0), ("k", 0), ("m", 0), ("v", 1)])
def test_nothing_is_read_after_somebody_has_written_it(name: str, count: int) -> None:
    """The values are read after that anyway."""
    assert len(overwritten(name, Q.contiguous(), K.contiguous(), V.contiguous(), MASK)) == count


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_copies_are_read_if_what_they_copy_is_written(name: str) -> None:
    (own,) = overwritten(name, Q, K, V, MASK)
    assert not {*own.reads()[:3]} & {"arg0_1", "arg1_1", "arg2_1"}


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (lambda q, k, v: (s := q @ k.mT, odd(s) @ v), (Q, K, V)),
        (lambda q, k, v: (p := odd(q @ k.mT), p @ v), (Q, K, V)),
        (lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT), -2) @ v, (Q, K, V)),
        (lambda q, k, v: (odd(q @ k.mT) * 2) @ v, (Q, K, V)),
        (lambda q, k, v: odd((q @ k.mT).transpose(0, 1)).transpose(0, 1) @ v, (rand(4, 4, 40, 16),) * 3),
        (lambda q, k, v: odd((q @ k.mT).flip(-1)) @ v, (Q, K, V)),
        (lambda q, k, v: odd(q @ k.mT) @ v, (rand(2, 4, 17, 16).float(), K.float(), V.float())),
        (lambda q, k, v: odd(q @ k.mT) @ v, (rand(2, 4, 7, 12), rand(2, 4, 40, 12), V)),
    ],
    ids=[
        "scores wanted",
        "probabilities wanted",
        "columns",
        "scaled after",
        "turned",
        "flipped",
        "float32",
        "odd",
    ],
)
def test_the_rest_stays(fn: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    low = searched(fn, *args)
    assert not any(isinstance(s, Alternatives) for s in low.steps)
    assert sum(isinstance(s, Call) for s in low.steps) == 2


def test_matrices_through_copies() -> None:
    """Element (z, r, c) of [6, 5, 4]: the copy's batch is 2 by 3, of which the second is repeated."""
    copy = Copy("x", "y", ((3, 20, 0), (4, 1, 7), (2, 60, 100), (5, 4, 28)), 11, 2)
    dense = Matrices.of(Matrix("y", 2, 20, 4, 1), 6)
    assert dense is not None
    assert dense.through(copy, 5, 4) == Matrices("x", 11, ((2, 100), (3, 0)), 28, 7)
    assert dense.through(copy, 4, 5) is None and dense.through(copy.turned(), 5, 4) is None
    for other in (Matrix("y", 3, 20, 4, 1), Matrix("y", 2, 40, 4, 1), Matrix("y", 2, 20, 1, 5)):
        assert (m := Matrices.of(other, 6)) is not None and m.through(copy, 5, 4) is None
    assert (part := Matrices.of(Matrix("y", 2, 20, 4, 1), 3)) is not None and part.through(copy, 5, 4) is None


def test_strides_of_other_dimensions() -> None:
    flat, two = Matrices("x", 0, ((12, 5),), 1, 1), Matrices("x", 0, ((3, 100), (4, 7)), 1, 1)
    assert flat.split(12) == (5,) and flat.split(2, 3, 2) == (30, 10, 5) and flat.split(3, 1, 4) == (20, 0, 5)
    assert two.split(3, 4) == (100, 7) and two.split(3, 2, 2) == (100, 14, 7)
    assert two.split(12) is None and two.split(6, 2) is None and two.split(3, 2) is None
    assert Matrices("x", 0, ((3, 20), (4, 5)), 1, 1).split(2, 6) == (30, 5)
    assert Matrices("x", 0, ((1, 9),), 1, 1).split(1, 1) == (0, 0)
