"""Products of one operand with frozen weights, where CPUs are among the devices that merge them: which, and the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt.ir.attention_op  # noqa: F401  # registers the op that attention becomes
from fxopt.ir import ops
from fxopt.ir.graph import Graph
from fxopt.ir.printer import print_graph
from fxopt.ir.quantized_ops import QUANTIZE_WEIGHT, SCALED_MM, WEIGHT_ONLY_MM
from fxopt.journal import RECENT
from fxopt.passes import merged_products as pass_module
from fxopt.passes.context import Context
from tests.numerics import assert_closer, check_compiled, to_float64
from tests.passes.graphs import CHECKED, aliasing, calls, execute, optimize

HEAD = 16
rand = torch.randn
PRODUCTS = ("mm", "addmm")


@pytest.fixture(autouse=True)
def _cpus_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_module, "merges", lambda device: True)


def check(
    fn: Callable[..., Any], args: tuple[Tensor, ...], frozen: tuple[int, ...], **options: Any
) -> tuple[Graph, Context]:
    """Optimize, checked after every pass; values, strides and aliasing are eager's."""
    graph, context = optimize(fn, args, frozen=frozen, **options)
    got, want = execute(graph, args), fn(*args)
    want = want if isinstance(want, tuple) else (want,)
    wide = fn(*to_float64(args))
    assert_closer(got, want, wide if isinstance(wide, tuple) else (wide,))
    assert [g.stride() for g in got] == [w.stride() for w in want]
    assert aliasing(args, got) == aliasing(args, want)
    return graph, context


def merges(context: Context) -> int:
    return sum(r.rule == "merged_products.columns" for r in context.log)


def products(graph: Graph) -> list[int]:
    """The columns of every product that is left."""
    nodes = (n for n in graph.gm.graph.nodes if n.op == "call_function" and ops.name_of(n.target) in PRODUCTS)
    return [n.meta["val"].shape[-1] for n in nodes]


def heads(t: Tensor) -> Tensor:
    return t.view(*t.shape[:2], -1, HEAD).transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    out = torch.ops.fxopt.attention(q, k, v, enable_gqa=True)
    return F.linear(out.transpose(1, 2).reshape(q.shape[0], -1, q.shape[1] * q.shape[3]), w)


def rotated(t: Tensor, cos: Tensor) -> Tensor:
    left, right = t.chunk(2, -1)
    return t * cos + torch.cat([-right, left], -1) * (1 - cos)


def linears(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    """Grouped heads, as in Llama."""
    return attended(heads(F.linear(x, q)), heads(F.linear(x, k)), heads(F.linear(x, v)), o)


def with_rotary(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, cos: Tensor) -> Tensor:
    return attended(rotated(heads(x @ q.t()), cos), rotated(heads(x @ k.t()), cos), heads(x @ v.t()), o)


def some_biases(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Whisper's keys have no bias."""
    return attended(heads(F.linear(x, q, a)), heads(F.linear(x, k)), heads(F.linear(x, v) + b), o)


def weights_by_row(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    """Weights [K, N], as in GPT-2's layers."""
    rows = x.view(-1, x.shape[-1])
    q, k, v = (heads((rows @ w).view(*x.shape[:2], -1)) for w in (q, k, v))
    return attended(q, k, v, o)


def written_out(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    q, k, v = (heads(torch.einsum("bsk,nk->bsn", x, w)) for w in (q, k, v))
    p = torch.softmax(q @ k.transpose(-1, -2) / HEAD**0.5, -1)
    return F.linear((p @ v).transpose(1, 2).flatten(2), o)


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def normed_heads(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: Tensor) -> Tensor:
    """Queries and keys with a norm of their own, as in Qwen3."""

    def norm(t: Tensor) -> Tensor:
        return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * scale

    q, k = (norm(F.linear(x, w).view(*x.shape[:2], -1, HEAD)).transpose(1, 2) for w in (q, k))
    return attended(q, k, heads(F.linear(x, v)), o)


X, Q, K, V, O = rand(2, 5, 24), rand(64, 24), rand(32, 24), rand(32, 24), rand(24, 64)  # noqa: E741
EQUAL = (X, Q, rand(64, 24), rand(64, 24), O)
SPELLINGS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], list[int]]] = {
    "linear layers, grouped heads": (linears, (X, Q, K, V, O), [128, 24]),
    "rotary embeddings": (with_rotary, (X, Q, K, V, O, rand(HEAD)), [128, 24]),
    "some with a bias": (some_biases, (X, Q, K, V, O, rand(64), rand(32)), [128, 24]),
    "weights by row": (weights_by_row, (X, Q.t().contiguous(), K.t().contiguous(), V.t().contiguous(), O), [128, 24]),
    "written out": (written_out, EQUAL, [192, 24]),
    "norms of queries and keys": (normed_heads, (X, Q, K, V, O, rand(HEAD)), [128, 24]),
    "a gated layer": (gated, (X, rand(40, 24), rand(40, 24), rand(24, 40)), [80, 24]),
    "views between": (linears, (X[:1, :1], Q, K, V, O), [128, 24]),
    "half precision": (linears, tuple(t.to(torch.bfloat16) for t in (X, Q, K, V, O)), [128, 24]),
    "one row": (linears, (rand(1, 1, 24), Q, K, V, O), [128, 24]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_product_over_all_columns(name: str) -> None:
    fn, args, columns = SPELLINGS[name]
    graph, context = check(fn, args, tuple(range(1, len(args))))
    assert products(graph) == columns
    assert merges(context) == (2 if fn is gated else 3)
    if fn not in (with_rotary, written_out):  # which have some of their own
        assert not {"cat", "clone"} & set(calls(graph)), "weights are merged once, results read in place"


GOLDEN = """\
    view = aten.view.default(x_1, [10, 24])  # 0000 f32[10, 24]
    mm_default = aten.mm.default(view, folded_4_cat_default)  # 0001 f32[10, 80] · by merged_products
    slice_tensor = aten.slice.Tensor(mm_default, 1, 0, 40)  # 0002 f32[10, 40] strides (80, 1) · by merged_products
    view_default = aten.view.default(slice_tensor, [2, 5, 40])  # 0003 f32[2, 5, 40] strides (400, 80, 1) · by views
    silu = aten.silu.default(view_default)  # 0004 f32[2, 5, 40]
    slice_tensor_1 = aten.slice.Tensor(mm_default, 1, 40, 80)  # 0005 f32[10, 40] strides (80, 1) · by merged_products
    view_default_1 = aten.view.default(slice_tensor_1, [2, 5, 40])  # 0006 f32[2, 5, 40] strides (400, 80, 1) · by views
    mul = aten.mul.Tensor(silu, view_default_1)  # 0007 f32[2, 5, 40]
    permute_default_2 = aten.permute.default(down_1, [1, 0])  # 0008 f32[40, 24] strides (1, 40) · by views
    view_2 = aten.view.default(mul, [10, 40])  # 0009 f32[10, 40]
    mm_2 = aten.mm.default(view_2, permute_default_2)  # 0010 f32[10, 24]
    view_default_2 = aten.view.default(mm_2, [2, 5, 24])  # 0011 f32[2, 5, 24] · by views
    return (view_default_2,)
"""


def test_the_graph_of_a_gated_layer() -> None:
    graph, _ = optimize(gated, (X, rand(40, 24), rand(40, 24), rand(24, 40)), frozen=(1, 2, 3))
    assert print_graph(graph).partition("):\n")[2] == GOLDEN


def shared_with(*, out: bool = False, frozen: bool = True) -> Callable[..., Any]:
    def fn(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Any:
        one, two = F.linear(x, a), F.linear(x, b)
        done = F.linear(one * two, c)
        return (done, one) if out else done

    return fn


def different_rows(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return F.linear(F.linear(x, a) * F.linear(x.sin(), b), c)


def parallel_block(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Each layer has an epilogue and a next layer of its own."""
    return F.linear(F.gelu(F.linear(x, a)), c) + F.linear(F.relu(F.linear(x, b)), d)


def scaled(x: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> Tensor:
    one = torch.addmm(bias, x[0], a.t(), alpha=2.0)
    return torch.mm(one * torch.addmm(bias, x[0], b.t(), alpha=2.0), c.t())


A, B, C = rand(40, 24), rand(40, 24), rand(24, 40)
NEAR_MISSES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], tuple[int, ...]]] = {
    "not frozen": (shared_with(), (X, A, B, C), ()),
    "one frozen": (shared_with(), (X, A, B, C), (1, 3)),
    "a result is returned": (shared_with(out=True), (X, A, B, C), (1, 2, 3)),
    "other rows": (different_rows, (X, A, B, C), (1, 2, 3)),
    "each for a layer of its own": (parallel_block, (X, A, B, C, C.clone()), (1, 2, 3, 4)),
    "other factors": (scaled, (X, A, B, C, rand(40)), (1, 2, 3, 4)),
    "columns that are not aligned": (shared_with(), (X, rand(39, 24), rand(39, 24), rand(24, 39)), (1, 2, 3)),
    "a bias that is no constant": (
        lambda x, a, b, c, y: F.linear(F.linear(x, a, y) * F.linear(x, b, y), c), (X, A, B, C, rand(40)), (1, 2, 3),
    ),
    "a weight in neither order": (
        lambda x, a, b, c: F.linear(F.linear(x, a[::2]) * F.linear(x, b[::2]), c[:, ::2]), (X, A, B, C), (1, 2, 3),
    ),
    "nothing but a result": (lambda x, a, b: F.linear(x, a) + F.linear(x, b), (X, A, B), (1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_left_alone(name: str) -> None:
    fn, args, frozen = NEAR_MISSES[name]
    _, context = check(fn, args, frozen)
    assert merges(context) == 0


def returned_heads(x: Tensor, q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> tuple[Tensor, ...]:
    """Whoever calls this attends."""
    padded = (*biases, *(None for _ in range(3 - len(biases))))
    return tuple(heads(F.linear(x, w, bias)) for w, bias in zip((q, k, v), padded, strict=True))


MANY = rand(2, 40, 24)
SQUARE = tuple(rand(64, 24) for _ in range(3))
HALVES = tuple(t.to(torch.bfloat16) for t in (MANY, *SQUARE, rand(64), rand(64)))
RETURNED: dict[str, tuple[tuple[Tensor, ...], list[tuple[int, ...]]]] = {
    "without biases": ((MANY, *SQUARE), [(3, 80, 64)]),
    "two of a size": ((MANY, Q, K, V), [(80, 64), (2, 80, 32)]),
    "weights by row": ((MANY, *(w.t().contiguous().t() for w in SQUARE)), [(3, 80, 64)]),
    "half precision, some with a bias": (HALVES, [(3, 80, 64)]),
    "float32 with biases": ((MANY, *SQUARE, rand(64), rand(64)), [(80, 64)] * 3),
    "few rows": ((X, *SQUARE), [(10, 64)] * 3),
    "all sizes differ": ((MANY, Q, K, rand(16, 24)), [(80, 64), (80, 32), (80, 16)]),
}


@pytest.mark.parametrize("name", RETURNED)
def test_products_that_are_returned_are_a_batch(name: str) -> None:
    """Each result has the strides of eager's, and elements that are nobody else's."""
    args, shapes = RETURNED[name]
    graph, context = optimize(returned_heads, args, frozen=tuple(range(1, len(args))))
    named = (n for n in graph.gm.graph.nodes if n.op == "call_function" and ops.name_of(n.target) in (*PRODUCTS, "bmm"))
    assert [tuple(n.meta["val"].shape) for n in named] == shapes
    assert sum(r.rule == "merged_products.batch" for r in context.log) == sum(s[0] for s in shapes if len(s) == 3)
    got, want = execute(graph, args), returned_heads(*args)
    assert_closer(got, want, returned_heads(*to_float64(args)))
    assert [g.stride() for g in got] == [w.stride() for w in want]
    spoilt, *others = got
    before = [t.clone() for t in others]
    spoilt.fill_(7)
    assert all(map(torch.equal, before, others))


def test_fuel_may_end_within_a_batch() -> None:
    log = optimize(returned_heads, (MANY, *SQUARE), frozen=(1, 2, 3))[1].log
    ends = [k for k, rewrite in enumerate(log) if rewrite.rule == "merged_products.batch"]
    for fuel in ends:
        graph, _ = optimize(returned_heads, (MANY, *SQUARE), frozen=(1, 2, 3), options=replace(CHECKED, fuel=fuel))
        assert_closer(
            execute(graph, (MANY, *SQUARE)), returned_heads(MANY, *SQUARE), returned_heads(*to_float64((MANY, *SQUARE)))
        )
    assert len(ends) == 3


def test_fuel_may_end_within_a_merged_product() -> None:
    args = (X, Q, K, V, O)
    log = optimize(linears, args, frozen=(1, 2, 3, 4))[1].log
    for fuel in (k for k, rewrite in enumerate(log) if rewrite.rule == "merged_products.columns"):
        check(linears, args, (1, 2, 3, 4), options=replace(CHECKED, fuel=fuel))


def test_without_memory_for_a_merged_weight_products_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined at each call, weights would cost more than three products."""

    def no_memory(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(pass_module.torch, "cat", no_memory)
    graph, context = check(gated, (X, A, B, C), (1, 2, 3))
    assert merges(context) == 0 and calls(graph).count("mm") == 3
    assert any(rule == "merged_products" and "cannot be computed" in reason for rule, reason in context.rejections)


def test_calls_that_read_memory_by_its_strides_see_those_of_the_traced_result() -> None:
    def fn(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        one, two = F.linear(x, a), F.linear(x, b)
        return F.linear(torch.as_strided(one, (2, 5, 40), (200, 40, 1)) * two, c)

    graph, context = check(fn, (X, A, B, C), (1, 2, 3))
    assert merges(context) == 2 and calls(graph).count("clone") == 1


class Attention(nn.Module):
    def __init__(self, size: int = 64, groups: int = 2) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(size, size), nn.Linear(size, groups * HEAD), nn.Linear(size, groups * HEAD)
        self.o = nn.Linear(size, size)
        self.gate, self.up, self.down = nn.Linear(size, 96), nn.Linear(size, 96), nn.Linear(96, size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(layer(x)) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def test_compiled_values() -> None:
    pytest.importorskip("triton")
    model = Attention().eval()
    with torch.no_grad():
        check_compiled(model, rand(2, 7, 64), options={"freeze": True})
    notes = [text for journal in RECENT for topic, text in journal.notes if topic == "rewrite"]
    assert any("merged_products.columns x5" in text for text in notes)


def test_compiled_values_of_a_batch() -> None:
    pytest.importorskip("triton")

    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(heads(layer(x)) for layer in (self.q, self.k, self.v))

    with torch.no_grad():
        check_compiled(Projections().eval(), rand(2, 40, 64), options={"freeze": True})
    notes = [text for journal in RECENT for topic, text in journal.notes if topic == "rewrite"]
    assert any("merged_products.batch x3" in text for text in notes)


def test_compiled_values_for_any_number_of_rows() -> None:
    pytest.importorskip("triton")
    model = Attention().eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxopt", options={"freeze": True, "strict": True}, dynamic=True)
        for rows in (7, 3):
            x = rand(2, rows, 64)
            assert_closer(compiled(x), model(x), to_float64(model)(x.double()))
    notes = [text for journal in RECENT for topic, text in journal.notes if topic == "rewrite"]
    assert any("merged_products.columns x5" in text for text in notes)


@pytest.mark.parametrize("form", ["rows", "static", "weights", "4 bits"])
def test_quantized_products(form: str) -> None:
    """Weights one below the other, with their scales and biases."""
    bits, group = (4, 16) if form == "4 bits" else (8, 0)
    dtype = torch.uint8 if bits == 4 else torch.int8
    (first, first_scale), (second, second_scale) = (QUANTIZE_WEIGHT(rand(n, 32), dtype, bits, group) for n in (16, 32))
    x, bias, after = rand(6, 32), rand(32), rand(16, 5)

    def fn(x: Tensor, first: Tensor, fs: Tensor, second: Tensor, ss: Tensor, bias: Tensor, after: Tensor) -> Tensor:
        if form in ("rows", "static"):
            scale = x.abs().amax(-1) / 127 if form == "rows" else x.abs().amax() / 127
            rows = (x / (scale[:, None] if form == "rows" else scale)).round().to(torch.int8)
            a, b = (SCALED_MM(rows, w, scale, s, c, x.dtype) for w, s, c in ((first, fs, None), (second, ss, bias)))
        else:
            a, b = (WEIGHT_ONLY_MM(x, w, s, c, bits, group) for w, s, c in ((first, fs, None), (second, ss, bias)))
        return (torch.relu(a) + b[:, :16] * b[:, 16:]) @ after

    args = (x, first, first_scale, second, second_scale, bias, after)
    graph, context = optimize(fn, args, frozen=(1, 2, 3, 4, 5, 6))
    (got,) = execute(graph, args)
    torch.testing.assert_close(got, fn(*args), rtol=1e-5, atol=1e-5)
    assert merges(context) == 2
    named = [n for n in graph.gm.graph.nodes if n.op == "call_function" and n.target in (SCALED_MM, WEIGHT_ONLY_MM)]
    assert [n.meta["val"].shape for n in named] == [(6, 48)]


def test_quantized_products_of_different_forms_stay_apart() -> None:
    def fn(x: Tensor, first: Tensor, fs: Tensor, second: Tensor, ss: Tensor, after: Tensor) -> Tensor:
        return (WEIGHT_ONLY_MM(x, first, fs, None, 8, 0) + WEIGHT_ONLY_MM(x, second, ss, None, 4, 16)) @ after

    first, second = QUANTIZE_WEIGHT(rand(16, 32), torch.int8), QUANTIZE_WEIGHT(rand(16, 32), torch.uint8, 4, 16)
    args = (rand(6, 32), *first, *second, rand(16, 5))
    graph, context = optimize(fn, args, frozen=(1, 2, 3, 4, 5))
    torch.testing.assert_close(execute(graph, args)[0], fn(*args))
    assert merges(context) == 0
