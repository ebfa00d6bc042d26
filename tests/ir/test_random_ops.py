"""The eager random ops: the published Philox vectors, distribution, reproducibility, and agreement with plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from fxopt.ir import random_ops
from fxopt.ir.random_ops import philox, rand, randint, randn, seed

M0, M1, W0, W1, MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def python_philox(seed_value: int, counter: int) -> tuple[int, ...]:
    k0, k1 = seed_value & MASK, (seed_value >> 32) & MASK
    c = [counter & MASK, (counter >> 32) & MASK, 0, 0]
    for _ in range(10):
        p0, p1 = M0 * c[0], M1 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & MASK, (p0 >> 32) ^ c[3] ^ k1, p0 & MASK]
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return tuple(c)


def test_published_vector():
    """Known answer of Random123 for a zero key and a zero counter."""
    words = philox(torch.tensor(0), torch.tensor(0))
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed_value", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_philox_matches_plain_python(seed_value):
    counters = torch.tensor([0, 1, 7, 2**31, 2**32 + 5, 2**40 + 3])
    words = philox(torch.tensor(seed_value), counters)
    for i, counter in enumerate(counters.tolist()):
        assert tuple(int(w[i]) for w in words) == python_philox(seed_value, counter)


def test_seed_follows_the_generator():
    torch.manual_seed(3)
    a, b = seed(torch.device("cpu")), seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(a, seed(torch.device("cpu")))
    assert not torch.equal(a, b)
    assert a.dtype == torch.int64 and a.shape == ()


def test_rand_is_uniform_and_indexed_by_position():
    s = torch.tensor(42)
    u = rand(s, [100, 1000])
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert abs(u.double().mean() - 0.5) < 5 / math.sqrt(12 * u.numel())
    assert torch.equal(u.view(-1), rand(s, [100000]))
    assert not torch.equal(u, rand(s + 1, [100, 1000]))
    words = [python_philox(42, i // 4)[i % 4] for i in range(10)]
    assert rand(s, [2, 5]).view(-1).tolist() == [(w >> 8) * 2.0**-24 for w in words]


def test_randn_is_normal():
    x = randn(torch.tensor(7), [200_000]).double()
    assert torch.isfinite(x).all()
    assert abs(x.mean()) < 0.012 and abs(x.var() - 1) < 0.02
    assert abs((x.abs() < 1.0).double().mean() - 0.6827) < 0.006


@pytest.mark.parametrize("bounds", [(0, 10), (-3, 4), (0, 2**53), (-(2**62), 2**62 - 3), (-(2**63), 2**63 - 1), (5, 6)])
def test_randint_is_the_uint64_modulo_the_range(bounds):
    low, high = bounds
    got = randint(torch.tensor(11), low, high, [257])
    for i in range(257):
        first, second, *_ = python_philox(11, i)
        assert int(got[i]) == low + (first | second << 32) % (high - low)


def test_randint_rejects_an_empty_range():
    with pytest.raises(RuntimeError, match="less than"):
        randint(torch.tensor(0), 4, 4, [2])


def test_empty_and_scalar_sizes():
    assert rand(torch.tensor(0), [0, 3]).shape == (0, 3)
    assert randn(torch.tensor(0), []).shape == ()


def test_fake_implementations_agree_with_eager():
    for op, args in ((rand, ([2, 3],)), (randn, ([2, 3],)), (randint, (0, 5, [2, 3]))):
        torch.library.opcheck(op, (torch.tensor(5), *args), test_utils=("test_schema", "test_faketensor"))
    assert random_ops.seed in (torch.ops.fxopt.seed.default,)
