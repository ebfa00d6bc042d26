"""The random ops of captured graphs: `fxopt::seed` draws, `fxopt::rand`, `randn` and `randint` are pure functions of a seed.

Importing this module registers them, with eager implementations that give the bits of the loop IR's `rand` and `randint`
(ir/loops.py): what a graph computes does not depend on whether its random ops ran in a generated kernel or here.

- `fxopt::seed(Device device) -> Tensor`: one int64, shape (), from torch's default generator of `device`; the only op of the
  four that is not a pure function.
- `fxopt::rand(Tensor seed, SymInt[] size) -> Tensor`: float32, uniform in [0, 1), contiguous, on the seed's device.
- `fxopt::randn(Tensor seed, SymInt[] size) -> Tensor`: float32, standard normal.
- `fxopt::randint(Tensor seed, SymInt low, SymInt high, SymInt[] size) -> Tensor`: int64, uniform in [low, high).

The generator is Philox4x32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key
(low, high word of the seed) and counter (low, high word, 0, 0). The element at row-major position i takes counter i; that of
`rand` takes word i % 4 of counter i // 4, so that four neighbours share one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _wide_multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32-bit words of a * b; int64 products wrap modulo 2**64, which leaves both words right."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of Philox4x32-10: int64 tensors in [0, 2**32) of `counter`'s shape; `seed` is an int64 scalar."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(_ROUNDS):
        high0, low0 = _wide_multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _wide_multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _words(seed: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    counter = torch.arange(math.prod(size), dtype=torch.int64, device=seed.device).view(list(size))
    return philox(seed.reshape(()), counter)[:2]


def _seed(device: torch.device) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def _rand(seed: Tensor, size: Sequence[int]) -> Tensor:
    count = math.prod(size)
    counter = torch.arange(-(-count // 4), dtype=torch.int64, device=seed.device)
    words = torch.stack(philox(seed.reshape(()), counter), 1).view(-1)[:count]
    return (words >> 8).to(torch.float32).view(list(size)) * 2.0**-24


def _randn(seed: Tensor, size: Sequence[int]) -> Tensor:
    """Box-Muller: u is in (0, 1], so that its logarithm is finite."""
    first, second = _words(seed, size)
    u = ((first >> 8) + 1).to(torch.float32) * 2.0**-24
    angle = (second >> 8).to(torch.float32) * (2.0**-24 * 2.0 * math.pi)
    return torch.sqrt(-2.0 * torch.log(u)) * torch.cos(angle)


def _randint(seed: Tensor, low: int, high: int, size: Sequence[int]) -> Tensor:
    """The words as one uint64 (word 0 low), modulo the range. The uint64 is an int64 here, 2**64 less where negative."""
    span = high - low
    if span <= 0:
        raise RuntimeError(f"random_ expects 'from' to be less than 'to', but got from={low} >= to={high}")
    first, second = _words(seed, size)
    bits = first | (second << 32)
    if span >= 2**63:
        return bits if span == 2**64 else _wide_range(bits, low, span)
    residue = torch.remainder(bits, span)
    wrap = 2**64 % span
    shifted = torch.where(residue >= span - wrap, residue - (span - wrap), residue + wrap)
    return torch.where(bits < 0, shifted, residue) + low


def _wide_range(bits: Tensor, low: int, span: int) -> Tensor:
    """A range of at least 2**63 fits into 2**64 once: reduce by one subtraction, in wrapping int64 arithmetic."""
    as_signed = span - 2**64
    too_large = (bits < 0) & (bits >= as_signed)
    return torch.where(too_large, bits - as_signed, bits) + low


def _fake(dtype: torch.dtype) -> Callable[..., Tensor]:
    def fake(seed: Tensor, *args: Sequence[int]) -> Tensor:
        return seed.new_empty(args[-1], dtype=dtype)

    return fake


def _fake_seed(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


_LIBRARY = torch.library.Library("fxopt", "DEF")
_PURE = (torch.Tag.pt2_compliant_tag,)


def _register(schema: str, eager: Callable[..., Tensor], fake: Callable[..., Tensor], tags: tuple[torch.Tag, ...]) -> None:
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxopt::{name}", fake, lib=_LIBRARY)


_register("seed(Device device) -> Tensor", _seed, _fake_seed, (*_PURE, torch.Tag.nondeterministic_seeded))
_register("rand(Tensor seed, SymInt[] size) -> Tensor", _rand, _fake(torch.float32), _PURE)
_register("randn(Tensor seed, SymInt[] size) -> Tensor", _randn, _fake(torch.float32), _PURE)
_register("randint(Tensor seed, SymInt low, SymInt high, SymInt[] size) -> Tensor", _randint, _fake(torch.int64), _PURE)

seed = torch.ops.fxopt.seed.default
rand = torch.ops.fxopt.rand.default
randn = torch.ops.fxopt.randn.default
randint = torch.ops.fxopt.randint.default
