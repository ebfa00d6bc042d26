"""Every way in which models write into their caches changes the rows concerned and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxopt
from fxopt.capture.decompositions import decompositions
from fxopt.ir.exprs import free_symbols
from fxopt.ir.loops import Nest
from fxopt.ir.region import Region
from fxopt.lower import Lowered
from fxopt.lower.schedule import schedule
from tests.lower.capturing import library_calls
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered

HEADS, LENGTH, WIDTH = 3, 16, 4
Update = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A cache [2, heads, length, width], new rows of one place for it, and that place."""
    return torch.randn(2, HEADS, LENGTH, WIDTH), torch.randn(2, HEADS, 1, WIDTH), torch.tensor([7])


def _done(result: torch.Tensor) -> None:
    """Nothing is returned: an alias of the cache would be."""


def _two_places(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> None:
    c[:, :, p] = k
    c[:, :, p + 1] = k * 2


def _read_between(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    c[:, :, p] = k
    first = c.sum((-1, -2), keepdim=True)
    c[:, :, p + 1] = first
    return first


def _old_is_read(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    before = c.sum((-1, -2))
    c.index_copy_(2, p, k)
    return before


def _nested(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> None:
    c[:1, 1:][:, :, 5:6] = k[:1, 1:]


def _part_of_a_part(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> None:
    part = c[0]
    part[:, 5] = k[0, :, 0]
    part[1].index_copy_(0, p, k[1, 0])


UPDATES: dict[str, Update] = {
    "index_copy_": lambda c, k, p: _done(c.index_copy_(2, p, k)),
    "positions": lambda c, k, p: c.__setitem__((slice(None), slice(None), p), k),
    "slice": lambda c, k, p: c.__setitem__((slice(None), slice(None), slice(5, 6)), k),
    "part of the batch": lambda c, k, p: c.__setitem__((slice(1), slice(None), slice(5, 6)), k[:1]),
    "copy_ into a slice": lambda c, k, p: _done(c[:, :, 5:6].copy_(k)),
    "select": lambda c, k, p: c.__setitem__((slice(None), slice(None), 5), k[:, :, 0]),
    "select twice": lambda c, k, p: c.__setitem__((0, slice(None), 5), k[0, :, 0]),
    "slices of slices": _nested,
    "add to a slice": lambda c, k, p: _done(c[:, :, 5:6].add_(k)),
    "fill": lambda c, k, p: _done(c[:, :, 5].fill_(2.0)),
    "scatter_": lambda c, k, p: _done(c.scatter_(2, p.view(1, 1, 1, 1).expand(2, HEADS, 1, WIDTH), k)),
    "index_add_": lambda c, k, p: _done(c.index_add_(2, p, k)),
    "index_fill_": lambda c, k, p: _done(c.index_fill_(2, p, 0.5)),
    "through a view": lambda c, k, p: _done(c.view(-1, LENGTH, WIDTH).index_copy_(1, p, k.view(-1, 1, WIDTH))),
    "transposed": lambda c, k, p: _done(c.transpose(1, 2).index_copy_(1, p, k.transpose(1, 2))),
    "two places": _two_places,
    "read between": _read_between,
    "old contents read before": _old_is_read,
    "computed from other rows": lambda c, k, p: c.__setitem__((slice(None), slice(None), p), c[:, :, p - 1] + k),
    "a mask on a row": lambda c, k, p: _done(c[:, :, 5].masked_fill_(k[:, :, 0] > 0, 0.0)),
}


def stored_elements(low: Lowered) -> int:
    """The most elements that one store of `low` may write."""
    most = 0
    for step in low.steps:
        for nest in step.nests if isinstance(step, Region) else ():
            most = max(most, *(_elements(nest, free_symbols(s.index) | {x for x, _ in s.indirect}) for s in nest.stores))
    return most


def _elements(nest: Nest, symbols: Any) -> int:
    count = 1
    for sym in (*nest.points, *nest.reduced):
        if sym in symbols:
            assert isinstance(sym.size, int)
            count *= sym.size
    return count


def check(update: Update, low: Lowered, args: tuple[torch.Tensor, ...]) -> None:
    expected, given = [[a.clone() for a in args] for _ in range(2)]
    want = update(*expected)
    got = run_lowered(low, dict(zip(low.inputs, given, strict=True)))
    torch.testing.assert_close(given, expected)
    if want is not None:
        torch.testing.assert_close(got[0], want)


@pytest.mark.parametrize("name", UPDATES)
def test_only_what_changes_is_written(name: str) -> None:
    update, args = UPDATES[name], example()
    low = lower(update, args, decompose=decompositions())
    assert not library_calls(low)
    assert stored_elements(low) <= 2 * HEADS * WIDTH, "more than one place of the cache is written"
    check(update, low, args)
    check(update, schedule(low), args)


def _all_rows_move(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> None:
    c[:, :, :-1] = c[:, :, 1:].clone()
    c[:, :, -1:] = k


def _places_from_the_cache(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> None:
    c.index_copy_(2, c[0, 0, :1, 0].abs().clamp(max=9).long(), k)


def _old_view_is_read_after(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    old = c.transpose(1, 2).clone()
    c.index_copy_(2, p, k)
    return old.transpose(1, 2) - c


def _overlapping_slices(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    both = torch.cat([c[:, :, 5:6], k], 2)
    c[:, :, 5:7] = both
    c[:, :, 6:8] = both
    return both


def _functional_twin(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """What is read at the end is another update of the old contents than what the cache becomes."""
    other = c.index_copy(2, p + 1, k)
    c.index_copy_(2, p, k)
    return other.sum(-1) + c.sum(-1)


@pytest.mark.parametrize(
    "update",
    [
        _part_of_a_part,
        _all_rows_move,
        _places_from_the_cache,
        _old_view_is_read_after,
        _overlapping_slices,
        _functional_twin,
    ],
)
def test_values_where_old_contents_matter(update: Update) -> None:
    args = example()
    low = lower(update, args, decompose=decompositions())
    check(update, low, args)
    check(update, schedule(low), args)


# ---------------------------------------------------------------------- what the caller gets


def _new_tensor(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    new = c.index_copy(2, p, k)
    c.copy_(new)
    return new


def _new_and_updated_again(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    new = c.index_copy(2, p, k)
    c.copy_(new.index_copy(2, p + 1, k))
    return new


def _view_of_the_cache(c: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    c.index_copy_(2, p, k)
    return c, c[:, :, 3:9]


@pytest.mark.parametrize("update", [_new_tensor, _new_and_updated_again, _view_of_the_cache])
def test_results_share_memory_with_the_cache_as_in_eager(update: Update) -> None:
    args = example()
    expected, given = [[a.clone() for a in args] for _ in range(2)]
    torch.compiler.reset()
    with torch.no_grad():
        want, got = update(*expected), torch.compile(update, backend="fxopt", fullgraph=True)(*given)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (want, got)), strict=True):
        torch.testing.assert_close(b, a)
        assert _shares(b, given[0]) == _shares(a, expected[0])
    torch.testing.assert_close(given[0], expected[0])


def test_returning_the_cache_copies_nothing() -> None:
    with torch.no_grad():
        (journal,) = fxopt.explain(_view_of_the_cache, *example()).graphs
    assert journal.memory["peak"] == 0


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
