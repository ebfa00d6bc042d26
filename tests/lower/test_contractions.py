"""Products with their epilogues: what becomes one, that every way gives the same values, and what must stay apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fxopt.ir.region import Alias, Alternatives, Call, Contraction, Region, SideBySide, Step
from fxopt.lower import Lowered
from fxopt.lower.contractions import BESIDE, FEW_ROWS, FUSED, LIBRARY, MOST_ROWS_BESIDE, ROW, TWO, with_contractions
from fxopt.lower.parts_for_reader import PARTS
from tests.lower.contracting import alternatives, check_ways, fused, kept, labels, searched, searched_for_any
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64

F = torch.nn.functional
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
M, K, N = 96, 24, 40  # more than few rows


def rand(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


SEED = torch.tensor(1234)


def dropout(x: torch.Tensor, seed: torch.Tensor, salt: int = 5) -> torch.Tensor:
    keep = torch.ops.fxopt.rand(seed + salt, list(x.shape)) >= 0.25
    return torch.where(keep, x * (1 / 0.75), torch.zeros([], dtype=x.dtype))


def gelu_of_residual(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x, w, b) + y)


def after_dropout(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, y: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    return y + dropout(F.linear(x, w, b), seed)


def several(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = F.linear(x, w, b)
    return torch.relu(h), torch.tanh(h), h.float() * 2, h > 0.1


def returned(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = x @ w
    return h, F.silu(h)


def returned_view(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = x @ w
    return h.view(4, -1, h.shape[1]), F.silu(h)


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(x @ gate) * (x @ up)


def merged(gate: Callable[[torch.Tensor], torch.Tensor], exchanged: bool = False) -> Callable[..., torch.Tensor]:
    """A gated layer whose two weights [N, K] are one [2 N, K]."""

    def layer(x: torch.Tensor, w: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        one, two = F.linear(x, w, *bias).chunk(2, dim=-1)
        return one * gate(two) if exchanged else gate(one) * two

    return layer


def swiglu_gradients(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, g: torch.Tensor) -> Any:
    x, gate, up = (t.detach().requires_grad_() for t in (x, gate, up))
    h = swiglu(x, gate, up)
    return h.detach(), *torch.autograd.grad(h, (x, gate, up), g)


def middle_of_three(qkv: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    _, k, _ = qkv.chunk(3, dim=-1)
    return torch.tanh(k @ w)


def scores(qkv: torch.Tensor) -> torch.Tensor:
    """Of heads that are views with offsets: [B, S, 3 H D] to [B H, S, S]."""
    q, k, _ = qkv.view(3, 70, 3, 1, 24).permute(2, 0, 3, 1, 4)
    return (torch.bmm(q.squeeze(1), k.squeeze(1).mT) * 0.125).sigmoid()


def own_operand(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x + torch.relu(x @ w)


def accumulated(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y.add_(x @ w)
    return x @ w


def merged_heads(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] of a batch of products to [B, S, H D]."""
    heads = torch.bmm(x, w).view(2, 4, 70, 10).permute(0, 2, 1, 3).reshape(140, 40)
    return torch.relu(heads) + y


def split_heads(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (F.linear(x, w, b).view(2, 70, 4, 10).permute(0, 2, 1, 3) * 0.5).contiguous()


def mlp_gradients(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, g: torch.Tensor) -> Any:
    x, w1, b1, w2 = (t.detach().requires_grad_() for t in (x, w1, b1, w2))
    h = F.linear(F.gelu(F.linear(x, w1, b1)), w2) + x
    return h.detach(), *torch.autograd.grad(h, (x, w1, b1, w2), g)


def with_alpha(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.sub(y, x @ w, alpha=0.25)


LINEAR = (rand(M, K), rand(N, K), rand(N))
TWO_WEIGHTS = (rand(M, K), rand(N, K), rand(N, K))
MERGED = (rand(M, K), rand(2 * N, K))
GATED: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "swiglu": (swiglu, (rand(M, K), rand(K, N), rand(K, N))),
    "geglu": (lambda x, v, w: F.gelu(F.linear(x, v)) * F.linear(x, w), TWO_WEIGHTS),
    "reglu exchanged": (lambda x, v, w: F.linear(x, w) * F.relu(F.linear(x, v)), TWO_WEIGHTS),
    "swiglu with biases": (
        lambda x, v, w, b, c: F.silu(F.linear(x, v, b)) * F.linear(x, w, c),
        (*TWO_WEIGHTS, rand(N), rand(N)),
    ),
    "three dimensions": (lambda x, v, w: F.silu(F.linear(x, v)) * F.linear(x, w), (rand(2, 70, K), *TWO_WEIGHTS[1:])),
    "batches": (lambda x, v, w: torch.sigmoid(torch.bmm(x, v)) * torch.bmm(x, w), (rand(3, M, K), *(rand(3, K, N),) * 2)),
    "both returned": (lambda x, v, w: ((g := x @ v.T), (u := x @ w.T), F.silu(g) * u), TWO_WEIGHTS),
    "square": (swiglu, (rand(96, 96), rand(96, 96), rand(96, 96))),
    "merged swiglu": (merged(F.silu), MERGED),
    "merged geglu with bias": (merged(F.gelu), (*MERGED, rand(2 * N))),
    "merged, exchanged": (merged(torch.sigmoid, exchanged=True), MERGED),
    "merged, square": (merged(F.silu), (rand(96, 96), rand(192, 96))),
    "merged, [K, 2 N]": (lambda x, w: (h := x @ w)[:, :N] * torch.tanh(h[:, N:]), (rand(M, K), rand(K, 2 * N))),
    "few rows": (lambda x, v, w: F.silu(F.linear(x, v)) * F.linear(x, w), (rand(8, K), *TWO_WEIGHTS[1:])),
    "one row": (lambda x, v, w: F.silu(F.linear(x, v)) * F.linear(x, w), (rand(1, K), *TWO_WEIGHTS[1:])),
    "merged, one row": (merged(F.silu), (rand(1, K), rand(2 * N, K))),
    "gradients": (swiglu_gradients, (rand(M, K), rand(K, N), rand(K, N), rand(M, N))),
}
BATCHED = (rand(3, M, K), rand(3, K, N))

CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "bias": (lambda x, w, b: (x @ w.T) + b, LINEAR),
    "gelu": (lambda x, w, b: F.gelu(F.linear(x, w, b)), LINEAR),
    "gelu tanh": (lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), LINEAR),
    "relu": (lambda x, w, b: F.relu(F.linear(x, w, b)), LINEAR),
    "silu": (lambda x, w, b: F.silu(F.linear(x, w, b)), LINEAR),
    "tanh float16": (
        lambda x, w, b: torch.tanh(F.linear(x, w, b)),
        tuple(t.to(F16) for t in LINEAR),
    ),
    "three dimensions": (lambda x, w, b: F.gelu(F.linear(x, w, b)), (rand(2, 70, K), *LINEAR[1:])),
    "residual after": (lambda x, w, b, y: y + F.gelu(F.linear(x, w, b)), (*LINEAR, rand(M, N))),
    "residual before": (gelu_of_residual, (*LINEAR, rand(M, N))),
    "dropout": (after_dropout, (*LINEAR, rand(M, N), SEED)),
    "cast": (lambda x, w, b: F.linear(x, w, b).float() * 3, LINEAR),
    "several results": (several, LINEAR),
    "product returned": (returned, (rand(M, K), rand(K, N))),
    "view of product returned": (returned_view, (rand(M, K), rand(K, N))),
    "alpha": (with_alpha, (rand(M, K), rand(K, N), rand(M, N))),
    "bmm": (lambda x, w: torch.tanh(torch.bmm(x, w)), BATCHED),
    "bmm transposed": (lambda x, w: torch.tanh(torch.bmm(x, w.mT)), (rand(3, M, K), rand(3, N, K))),
    "bmm of one": (lambda x, w: torch.tanh(torch.bmm(x, w)), (rand(1, M, K), rand(1, K, N))),
    "one weight for all": (lambda x, w: torch.tanh(torch.bmm(x, w.expand(3, K, N))), (rand(3, M, K), rand(K, N))),
    "left transposed": (lambda x, w: torch.relu(x.T @ w), (rand(K, M), rand(K, N))),
    "columns of a wider matrix": (lambda x, w: torch.relu(x[:, 3 : 3 + K] @ w[:, ::2]), (rand(M, 31), rand(K, 2 * N))),
    "a part of QKV": (middle_of_three, (rand(M, 3 * K), rand(K, N))),
    "scores of heads": (scores, (rand(3, 70, 3 * 24),)),
    "swiglu": (swiglu, (rand(M, K), rand(K, N), rand(K, N))),
    "operand again": (own_operand, (rand(M, N), rand(N, N))),
    "into an input": (accumulated, (rand(M, K), rand(K, N), rand(M, N))),
    "split heads": (split_heads, (rand(2, 70, K), *LINEAR[1:])),
    "few rows": (lambda x, w, b: F.gelu(F.linear(x, w, b)), (rand(FEW_ROWS, K), *LINEAR[1:])),
    "one row": (lambda x, w, b: F.gelu(F.linear(x, w, b)), (rand(1, K), *LINEAR[1:])),
    "one row, residual": (gelu_of_residual, (rand(1, K), *LINEAR[1:], rand(1, N))),
}
SHAPES = {"[N]": (N,), "[1, N]": (1, N), "[M, 1]": (M, 1), "[M, N]": (M, N), "[1, 1]": (1, 1), "scalar": ()}
for _name, _shape in SHAPES.items():
    CASES[f"addend {_name}"] = (lambda c, x, w: torch.relu(torch.addmm(c, x, w)), (rand(*_shape), rand(M, K), rand(K, N)))
for _name, _shape in {"[N]": (N,), "[Z, 1, N]": (3, 1, N), "[1, M, N]": (1, M, N), "[Z, M, 1]": (3, M, 1)}.items():
    CASES[f"batched addend {_name}"] = (lambda c, x, w: torch.relu(torch.baddbmm(c, x, w)), (rand(*_shape), *BATCHED))


@pytest.mark.parametrize("name", CASES)
def test_every_way_gives_the_same_values(name: str) -> None:
    fn, args = CASES[name]
    found = alternatives(check_ways(fn, *args))
    assert found and {w.label for w in found[-1].ways} >= {LIBRARY, FUSED}


@pytest.mark.parametrize("name", GATED)
def test_gated_layers_are_two_products_in_one_kernel(name: str) -> None:
    fn, args = GATED[name]
    low = check_ways(fn, *args)
    steps = kept(low, TWO).steps
    found = [s for s in steps if isinstance(s, Contraction) and s.c is not None]
    assert len(found) == 1 and not {found[0].result, found[0].second} & {*found[0].reads(), *found[0].writes()}
    if name != "gradients":
        assert not [s for s in steps if isinstance(s, Region | Call)]
        assert len(found[0].writes()) == (3 if name == "both returned" else 1)


def test_a_plan_may_be_a_product_and_nothing_else() -> None:
    x, w = rand(1, 64), rand(64, 64)
    assert searched(lambda x, w: torch.relu(x @ w), x, w).is_single
    assert not searched(lambda x, w: F.softmax(torch.relu(x @ w) @ w, dim=-1), x, w).is_single


def test_products_that_share_nothing_stay_apart() -> None:
    """Another left operand, other sizes, other strides of the weight, a half that is not half, and all of a row."""
    x, v, w = TWO_WEIGHTS
    apart: list[tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = [
        (lambda x, y, v, w: F.silu(x @ v.T) * (y @ w.T), (x, rand(M, K), v, w)),
        (lambda x, v, w: F.silu(x @ v.T) * (x @ w), (x, v, rand(K, N))),
        (lambda x, v: (h := F.linear(x, v))[:, :10] * torch.tanh(h[:, 10:20]), (x, v)),
        (lambda x, v: F.linear(x, v) * torch.tanh(F.linear(x, v).flip(1)), (x, v)),
    ]
    for fn, args in apart:
        assert not [way for each in alternatives(check_ways(fn, *args)) for way in each.ways if way.label == TWO]


@pytest.mark.parametrize("name", CASES)
def test_the_epilogue_is_in_the_kernel(name: str) -> None:
    """Nothing is left but library calls and contractions: no region runs for itself."""
    steps = kept(searched(*_case(name)), FUSED).steps
    assert not [s for s in steps if isinstance(s, Region)]


def _case(name: str) -> tuple[Any, ...]:
    fn, args = CASES[name]
    return fn, *args


@pytest.mark.parametrize("name", ["bias", "gelu", "cast", "bmm", "residual after"])
def test_a_product_that_only_its_epilogue_reads_is_not_stored(name: str) -> None:
    low = searched(*_case(name))
    after = kept(low, FUSED)
    contraction = next(s for s in after.steps if isinstance(s, Contraction))
    stored = {n for each in alternatives(low) for s in each.ways[0].steps if isinstance(s, Call) for n in s.outputs}
    assert not stored & {*contraction.reads(), *contraction.writes()}


@pytest.mark.parametrize("rows", [1, 8, M])
def test_gradients_of_an_mlp(rows: int) -> None:
    args = (rand(rows, K), rand(N, K), rand(N), rand(K, N), rand(rows, K))
    low = check_ways(mlp_gradients, *args)
    assert len(alternatives(low)) >= 2


@pytest.mark.parametrize("every", [False, True])
def test_products_alone(every: bool) -> None:
    """Where there is no epilogue, few rows alone are worth a try; max-autotune tries all."""
    many, few = (rand(M, K), rand(K, N)), (rand(8, K), rand(K, N))
    assert len(alternatives(check_ways(torch.matmul, *many, every=every))) == every
    assert len(alternatives(check_ways(torch.matmul, *few, every=every))) == 1


def test_one_row_is_a_row_reduction_too() -> None:
    low = check_ways(lambda x, w: torch.relu(x @ w), rand(1, K), rand(K, N))
    (each,) = alternatives(low)
    assert [w.label for w in each.ways] == [LIBRARY, FUSED, ROW]
    (region,) = each.ways[2].steps
    assert isinstance(region, Region) and len(region.nest.reduced) == 1 and region.reads() == ("arg0_1", "arg1_1")
    two = searched(lambda x, w: torch.relu(x @ w), rand(2, K), rand(K, N))
    assert ROW not in [w.label for w in alternatives(two)[0].ways]


def attended(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The projections of a new token, whose halves change places."""
    query, key = F.linear(x, q).view(-1, 8), F.linear(x, k).view(-1, 8)
    return query + query.roll(4, 1), key + key.roll(4, 1), F.linear(x, v)


def projections(
    x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return F.linear(x, q, b), x @ k.T, F.linear(x, v, b)


def test_products_of_the_same_rows_stand_side_by_side() -> None:
    args = (rand(M, K), rand(N, K), rand(N, K), rand(N, K), rand(N))
    (each,) = alternatives(check_ways(projections, *args))
    assert [w.label for w in each.ways] == [LIBRARY, BESIDE]
    (step,) = each.ways[1].steps
    assert isinstance(step, SideBySide) and len(step.parts) == 3
    assert set(step.writes()) == {n for call in each.ways[0].steps for n in call.outputs}
    assert set(step.buffers) == {*step.reads(), *step.writes()}


def test_products_stay_apart() -> None:
    """Of other rows, sizes and layouts; where one adds another's result, or waits for what reads it; few rows, and many."""
    x, y, w, v = rand(M, K), rand(M, K), rand(N, K), rand(N, K)
    cases: list[tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = [
        (lambda x, y, w, v: (x @ w.T, y @ v.T), (x, y, w, v)),
        (lambda x, w, v: (x @ w.T, x @ v.T), (x, w, rand(2 * N, K))),
        (lambda x, w, v: (x @ w.T, x @ v), (x, w, rand(K, N))),
        (lambda x, w, v: torch.addmm(x @ w.T, x, v.T), (x, w, v)),
        (lambda x, w, v: x @ (x @ w.T).T[:, :K].T, (rand(M, K), rand(K, K), v)),
        (lambda x, w, v: (x @ w.T, x @ v.T), (rand(FEW_ROWS, K), w, v)),
        (lambda x, w, v: (x @ w.T, x @ v.T), (rand(MOST_ROWS_BESIDE + 1, K), w, v)),
    ]
    for fn, args in cases:
        assert BESIDE not in labels(check_ways(fn, *args))


def normed(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = x @ w.T + b + y
    return F.layer_norm(total, (N,)), total


def test_a_norm_adds_up_the_parts_of_the_product_before_it() -> None:
    for fn in (normed, lambda x, w, b, y: torch.softmax(x @ w.T + b, -1) * y):
        low = check_ways(fn, rand(M, 1024), rand(N, 1024) / 32, rand(N), rand(M, N))
        (each,) = alternatives(low)
        assert [w.label for w in each.ways] == [LIBRARY, f"{PARTS} 4", f"{PARTS} 2"]
        product, norm = each.ways[1].steps
        assert isinstance(product, Contraction) and isinstance(norm, Region)
        assert product.sizes == (4, M, 256, N) and set(product.writes()) < set(norm.reads())


def test_a_row_by_a_weight_of_contiguous_columns_is_added_up_by_the_norm_after_it() -> None:
    """A new token's; not by a weight whose rows are contiguous, of which each program has some for itself."""
    args = rand(1, 1024), rand(1024, N) / 32, rand(N), rand(1, N)
    low = check_ways(lambda x, w, b, y: normed(x, w.T, b, y), *args)
    (each,) = alternatives(low)
    assert [w.label for w in each.ways] == [LIBRARY, f"{PARTS} 8", ROW]
    product, norm = each.ways[1].steps
    assert isinstance(product, Contraction) and isinstance(norm, Region)
    assert product.sizes == (8, 1, 128, N) and set(product.writes()) < set(norm.reads())
    others = labels(check_ways(normed, args[0], rand(N, 1024) / 32, *args[2:]))
    assert not any(label.startswith(PARTS) for label in others)


def test_parts_are_not_for_a_reader_that_cannot_add_them_up() -> None:
    """One that is not alone, or does not reduce; few rows, a short inner dimension, results that the caller sees."""
    x, w, b, y = rand(M, 1024), rand(N, 1024) / 32, rand(N), rand(M, N)
    cases: list[tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = [
        (lambda x, w, y: (h := x @ w.T, F.layer_norm(h + y, (N,))), (x, w, y)),
        (lambda x, w, y: torch.relu(x @ w.T + y), (x, w, y)),
        (normed, (rand(FEW_ROWS, 1024), w, b, rand(FEW_ROWS, N))),
        (normed, (rand(M, 256), rand(N, 256) / 16, b, y)),
        (lambda x, w, y: F.layer_norm(torch.addmm(y, x, w.T), (N,)), (x, w, y)),
    ]
    for fn, args in cases:
        assert not any(label.startswith(PARTS) for label in labels(check_ways(fn, *args)))


def test_products_of_one_row_are_one_region() -> None:
    low = check_ways(attended, rand(1, K), rand(48, K), rand(16, K), rand(16, K))
    (each,) = alternatives(low)
    assert [[type(s) for s in w.steps] for w in each.ways] == [[Call] * 3, [Region]]
    (region,) = each.ways[1].steps
    assert isinstance(region, Region) and region.reads()[:1] == ("arg0_1",) and len(region.nest.stores) == 5
    assert [s.size for s in region.nest.points] == [1, 16] and [s.size for s in region.nest.reduced] == [K]


def test_products_of_one_row_stay_apart() -> None:
    def chained(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, a).view(-1, 8)
        return F.linear((y + y.roll(4, 1)).view(1, -1), b)

    def two_rows(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return F.linear(x, a), F.linear(y, b)

    square = rand(K, K)
    assert len(alternatives(check_ways(chained, rand(1, K), square, square * 2))) == 2, "one waits for the other"
    assert len(alternatives(check_ways(two_rows, rand(1, K), rand(1, K), square, square * 2))) == 2
    many = check_ways(lambda x, a, b: (F.linear(x, a), F.linear(x, b)), rand(1, K), rand(40, K), rand(3, K))
    assert len(alternatives(many)) == 2, "40 and 3 columns have no parts of equal size but 43 of one"


# ---------------------------------------------------------------------- order and memory


def test_an_operand_is_not_overwritten_while_others_read_it() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x.copy_(torch.relu(x @ w))
        return x * 1

    assert not alternatives(check_ways(fn, rand(M, N), rand(N, N)))
    assert not alternatives(check_ways(lambda x, w: w.copy_(torch.relu(x @ w)), rand(M, M), rand(M, M)))


def test_an_addend_may_be_overwritten_element_by_element() -> None:
    def fn(c: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
        c.copy_(torch.relu(torch.addmm(c, x, w)))

    def transposed(c: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
        c.copy_(torch.relu(torch.addmm(c.T, x, w)))

    (each,) = alternatives(check_ways(fn, rand(M, N), rand(M, K), rand(K, N)))
    assert each.ways[1].steps[0].writes() == ("arg0_1",)  # type: ignore[union-attr]
    assert not alternatives(check_ways(transposed, rand(M, M), rand(M, K), rand(K, M)))


def test_an_epilogue_waits_for_what_is_computed_between() -> None:
    """The second product is an operand of the first one's epilogue: that runs where the region was."""
    args = (rand(M, K), rand(M, K), rand(K, N), rand(K, N))
    low = check_ways(lambda x, y, v, w: F.silu(x @ v) * (y @ w), *args)
    second, first = (s for s in low.steps if not isinstance(s, Alias))
    assert isinstance(second, Call) and second.outputs == ("mm_1",)
    assert isinstance(first, Alternatives) and {"mm_1"} < set(first.ways[1].steps[0].reads())  # type: ignore[union-attr]


def test_a_product_that_another_step_reads_first_is_stored_in_time() -> None:
    """Its epilogue moves to the product, before the reader."""

    def fn(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x @ w
        return h @ v, F.gelu(h)

    low = check_ways(fn, rand(M, K), rand(K, N), rand(N, N))
    first, second = kept(low, FUSED).steps
    assert isinstance(first, Contraction) and "mm" in first.writes()
    assert isinstance(second, Call) and second.outputs == ("mm_1",)


def test_a_region_that_needs_a_reader_of_the_product_stays_apart() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        h = x @ w
        return torch.relu(h) + h @ v

    low = check_ways(fn, rand(M, K), rand(K, N), rand(N, N))
    (each,) = alternatives(low)
    assert each.ways[0].steps[0].outputs == ("mm_1",), "the second product has the epilogue"  # type: ignore[union-attr]


def test_a_product_read_by_two_regions_is_stored_for_the_second() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x @ w
        return torch.relu(h), F.pad(h, (0, 3))

    steps = kept(check_ways(fn, rand(M, K), rand(K, N)), FUSED).steps
    assert [type(s) for s in steps] == [Contraction, Region]
    assert "mm" in steps[0].writes() and "mm" in steps[1].reads()  # type: ignore[union-attr]


def test_what_a_region_overwrites_is_read_before() -> None:
    """A library call between product and region reads what the region writes, and another one what the product is of."""

    def fn(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h, old = x @ w, y @ v
        y.copy_(torch.relu(h))
        return old, y @ v

    check_ways(fn, rand(M, K), rand(K, N), rand(M, N), rand(N, N))


def test_a_view_follows_the_product_that_it_is_of() -> None:
    """Wherever a schedule names a view of the product between it and the region."""

    def fn(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x @ w
        return F.gelu(h), h.view(2, M, N) @ v

    plain = _undecided(searched(fn, rand(2 * M, K), rand(K, N), rand(2, N, N)))
    (view,) = (s for s in plain.steps if isinstance(s, Alias))
    (region,) = (s for s in plain.steps if isinstance(s, Region))
    steps: list[Step] = [s for s in plain.steps if s is not view]
    steps.insert(steps.index(region), view)
    after = kept(with_contractions(replace(plain, steps=steps)), FUSED).steps
    (made,) = (s for s in after if isinstance(s, Contraction))
    assert after.index(made) < after.index(view)


def _undecided(low: Lowered) -> Lowered:
    """The schedule that `low` was made of."""
    return kept(low, LIBRARY)


def test_views_that_nobody_names_any_more_are_gone() -> None:
    low = searched(lambda x, w, b: F.gelu(F.linear(x, w, b)), *LINEAR)
    assert any(isinstance(s, Alias) for s in kept(low, LIBRARY).steps)
    assert not any(isinstance(s, Alias) for s in kept(low, FUSED).steps)


# ---------------------------------------------------------------------- what stays apart


APART: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "a reduction": (lambda x, w: (x @ w).sum(-1), (rand(M, K), rand(K, N))),
    "a softmax": (lambda x, w: torch.softmax(x @ w, -1), (rand(M, K), rand(K, N))),
    "checked indices": (
        lambda x, w, t, i: (x @ w) + t[i],
        (rand(M, K), rand(K, N), rand(7, N), torch.randint(0, 7, (M,))),
    ),
    "float32": (lambda x, w: torch.relu(x @ w), (rand(M, K, dtype=F32), rand(K, N, dtype=F32))),
    "float64": (lambda x, w: torch.relu(x @ w), (rand(M, K).double(), rand(K, N).double())),
    "a shifted read": (lambda x, w: (h := x @ w) + h.roll(1, 0), (rand(M, K), rand(K, N))),
    "a transposed read": (lambda x, w: (h := x @ w) + h.T, (rand(M, K), rand(K, M))),
    "a part of the result": (lambda x, w: torch.relu((x @ w)[:, :8]), (rand(M, K), rand(K, N))),
    "merged heads": (merged_heads, (rand(8, 70, K), rand(8, K, 10), rand(140, 40))),
    "padding": (lambda x, w: F.pad(torch.relu(x @ w), (0, 3)), (rand(M, K), rand(K, N))),
    "one column": (lambda x, w: torch.relu(x @ w), (rand(M, K), rand(K, 1))),
    "no rows": (lambda x, w: torch.relu(x @ w), (rand(0, K), rand(K, N))),
    "no inner dimension": (lambda x, w: torch.relu(x @ w), (rand(M, 0), rand(0, N))),
}


@pytest.mark.parametrize("name", APART)
def test_what_stays_apart(name: str) -> None:
    fn, args = APART[name]
    assert not alternatives(check_ways(fn, *args))


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_where_the_library_may_round_to_tf32(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.lower.contractions.products_use_tf32", lambda: allowed)
    args = tuple(t.float() for t in LINEAR)
    found = alternatives(check_ways(lambda x, w, b: F.gelu(F.linear(x, w, b)), *args))
    contractions = [s for each in found for way in each.ways for s in way.steps if isinstance(s, Contraction)]
    assert [c.tf32 for c in contractions] == [True] * allowed
    assert not any(c.tf32 for c in fused(lambda x, w, b: F.gelu(F.linear(x, w, b)), *LINEAR))


def test_a_convolution_in_float32_goes_by_cudnns_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.lower.contractions.convolutions_use_tf32", lambda: True)
    monkeypatch.setattr("fxopt.lower.contractions.products_use_tf32", lambda: False)
    image = rand(2, K, 9, 8, dtype=F32).to(memory_format=torch.channels_last)
    found = fused(lambda x, w: torch.relu(F.conv2d(x, w)), image, rand(N, K, 1, 1, dtype=F32))
    assert [c.tf32 for c in found] == [True]


def test_products_of_other_factors_are_the_librarys() -> None:
    low = searched(lambda c, x, w: torch.relu(torch.addmm(c, x, w, beta=0.5, alpha=2)), rand(N), rand(M, K), rand(K, N))
    assert all(s.op != "aten::addmm.default" or s.kwargs for s in low.steps if isinstance(s, Call))
    assert not alternatives(low)


def test_products_of_unknown_width_stay_apart() -> None:
    low = searched(lambda x, w: torch.relu(x @ w), rand(M, K), rand(K, N), dynamic=True)
    assert not alternatives(low)


ANY_ROWS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], set[tuple[int, int]]]] = {
    "rows": (lambda x, w, b: F.gelu(F.linear(x, w, b)), LINEAR, {(0, 0)}),
    "a sequence": (lambda x, w, b: F.gelu(x @ w.T + b), (rand(3, 70, K), *LINEAR[1:]), {(0, 1)}),
    "sequences": (lambda x, w, b: F.gelu(x @ w.T + b), (rand(3, 70, K), *LINEAR[1:]), {(0, 0), (0, 1)}),
    "residual": (
        lambda x, w, y: y + F.linear(x, w), (rand(M, K), rand(N, K), rand(M, N)), {(0, 0), (2, 0)}
    ),
    "swiglu": (lambda x, v, w: F.silu(F.linear(x, v)) * F.linear(x, w), TWO_WEIGHTS, {(0, 0)}),
    "merged swiglu": (merged(F.silu), MERGED, {(0, 0)}),
}  # fmt: skip


@pytest.mark.parametrize("dims", [{(0, 0), (3, 0)}, {(1, 0), (2, 0), (3, 1)}], ids=["rows", "columns"])
def test_a_norm_after_a_product_of_unknown_size_is_a_kernel(dims: set[tuple[int, int]]) -> None:
    """What cannot be the product's epilogue is asked whether it cuts a padded product to size."""
    args = (*LINEAR, rand(M, N))
    low = searched_for_any(lambda x, w, b, y: F.layer_norm(y + F.linear(x, w, b), (w.shape[0],)), args, dims)
    assert any(isinstance(s, Region) for s in low.steps)
    (got,) = run_lowered(low, dict(zip(low.inputs, args, strict=True)))
    x, w, b, y = args
    torch.testing.assert_close(got, F.layer_norm(y + F.linear(x, w, b), (N,)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ANY_ROWS)
def test_any_number_of_rows(name: str) -> None:
    """Every way is right for other sizes than those of tracing."""
    fn, args, dims = ANY_ROWS[name]
    low = searched_for_any(fn, args, dims)
    assert alternatives(low)
    for more in (0, 2):
        own = [_longer(x, [d for k, d in dims if k == n], more) for n, x in enumerate(args)]
        exact = fn(*to_float64(own))
        for label in labels(low):
            steps = kept(low, label)
            (got,) = run_lowered(steps, dict(zip(low.inputs, own, strict=True)))
            assert_closer(got, fn(*own), exact)


def _longer(x: torch.Tensor, dims: list[int], more: int) -> torch.Tensor:
    for d in dims:
        x = torch.cat([x, x.narrow(d, 0, more)], d)
    return x


def test_cpus_have_no_alternatives() -> None:
    from fxopt.capture.decompositions import decompositions
    from fxopt.lower.schedule import schedule
    from tests.lower.harness import lower

    low = schedule(lower(lambda x, w: torch.relu(x @ w), (rand(1, K), rand(K, N)), decompose=decompositions()))
    assert with_contractions(low, every=True).steps == low.steps


def test_the_interpreter_notices_a_wrong_index() -> None:
    """The oracle of this file can fail: an epilogue that reads another element than the product's own is refused."""
    (contraction,) = fused(lambda x, w: torch.relu(x @ w), rand(M, K), rand(K, M))
    z, y, x = contraction.axes
    wrong = replace(contraction, axes=(z, x, y))
    low = searched(lambda x, w: torch.relu(x @ w), rand(M, K), rand(K, M))
    with pytest.raises(AssertionError, match="own element"):
        run_lowered(replace(low, steps=[wrong]), {"arg0_1": rand(M, K), "arg1_1": rand(K, M)})
