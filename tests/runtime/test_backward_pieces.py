"""Where a backward is cut into pieces: pure data, no GPU. That pieces do what the whole does: test_training_graphs.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxopt.ir.region import Call, Ref
from fxopt.runtime import backward_pieces
from fxopt.runtime.backward_pieces import MOST_PIECES, PIECE_STEPS, choose_backward_pieces
from fxopt.runtime.capturable import Pieces
from fxopt.runtime.plan import Plan
from fxopt.runtime.split import Mentions
from tests.runtime.plans import S0, buffer, plan, tensor

SIDE = 64


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_pieces, "SMALLEST", 1)


def backward(layers: int, wide: int = SIDE, rows: int = 1, more: tuple[Call, ...] = ()) -> Plan:
    """h(k + 1) = h(k) @ w, and a gradient [wide, SIDE] of each layer: d(k) = y @ h(k), h having `rows` rows."""
    inputs = [tensor("h0", rows, SIDE), tensor("w", SIDE, SIDE), tensor("y", wide, rows)]
    buffers, steps = [], []
    for k in range(layers):
        steps += [
            Call("aten::mm.default", (Ref(f"h{k}"), Ref("w")), outputs=(f"h{k + 1}",)),
            Call("aten::mm.default", (Ref("y"), Ref(f"h{k}")), outputs=(f"d{k}",)),
        ]
        buffers += [buffer(f"h{k + 1}", rows, SIDE), buffer(f"d{k}", wide, SIDE)]
    return plan(inputs, buffers, [*steps, *more], [Ref(f"d{k}") for k in range(layers)])


def gradients(made: Pieces) -> list[int]:
    """How many results each piece that has steps makes."""
    found = [Mentions(piece.part.plan) for piece in made.pieces if piece.choice is not None]
    return [sum(name.startswith("d") for name in one.made) for one in found]


def test_pieces_have_equally_many_gradients() -> None:
    found = choose_backward_pieces(backward(6 * PIECE_STEPS))
    assert found is not None
    assert gradients(found) == [PIECE_STEPS] * MOST_PIECES
    last = found.pieces[-1]
    assert last.choice is None and not Mentions(last.part.plan).steps and len(last.part.plan.outputs) == 6 * PIECE_STEPS


def test_small_backwards_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_pieces, "SMALLEST", 60 * SIDE * SIDE * 4 + 1)
    assert choose_backward_pieces(backward(60)) is None


def test_nothing_is_cut_where_much_would_pass() -> None:
    assert choose_backward_pieces(backward(60, wide=1)) is not None
    assert choose_backward_pieces(backward(60, wide=1, rows=60)) is None


def test_one_large_gradient_leaves_it_whole() -> None:
    made = backward(30)
    large = [replace(b, shape=(100 * SIDE, SIDE)) if b.name == "d9" else b for b in made.buffers]
    assert choose_backward_pieces(replace(made, buffers=tuple(large))) is None


def test_what_one_piece_has_made_no_other_one_changes() -> None:
    grown = Call("aten::add_.Tensor", (Ref("d30"), Ref("d30")), {}, (), writes=("d30",))
    found = choose_backward_pieces(backward(60, more=(grown,)))
    assert found is not None
    assert gradients(found) == [30, 30]


def test_symbolic_sizes_stay_whole() -> None:
    made = backward(60)
    unknown = [replace(b, shape=(S0, SIDE)) if b.name == "h7" else b for b in made.buffers]
    assert choose_backward_pieces(replace(made, buffers=tuple(unknown))) is None
