"""The rest of torch around and inside compiled functions: graph breaks, transforms, custom ops, control flow, threads."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.guest.agreement import agree, compiled, graphs, kernels, same


def test_graph_breaks() -> None:
    def fn(x: torch.Tensor) -> Any:
        y = (x * 2).sin()
        print(end="")
        if y.sum() > 0:
            y = y + 1
        torch._dynamo.graph_break()
        return y.cos(), y.tolist()[0]

    agree(fn, torch.ones(4))
    agree(fn, -torch.ones(4))
    assert len(graphs()) >= 2


def test_a_function_with_nothing_to_compile() -> None:
    assert compiled(lambda x: x)(3) == 3
    assert compiled(lambda: torch.ones(2).sum())() == 2
    agree(lambda x: None, torch.ones(2))


def test_errors_of_the_user_stay_the_users() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y

    with pytest.raises(Exception, match="4"):
        compiled(fn)(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(IndexError):
        compiled(lambda x, i: x[i] + 1)(torch.ones(3), torch.tensor([5]))
    with pytest.raises(ZeroDivisionError):
        compiled(lambda x, n: x + 1 // n)(torch.ones(3), 0)


def test_one_hot_checks_its_classes_as_eager_does() -> None:
    def fn(labels: torch.Tensor) -> torch.Tensor:
        return F.one_hot(labels, 4).float().mean(0)

    agree(fn, torch.tensor([0, 3, 1]))
    for bad in (torch.tensor([0, 4]), torch.tensor([-1, 0])):
        with pytest.raises(RuntimeError, match="Class values must be"):
            compiled(fn)(bad)


def test_functional_call() -> None:
    module = nn.Linear(3, 3)
    weights = {k: torch.randn_like(v) for k, v in module.named_parameters()}
    agree(lambda w, x: torch.func.functional_call(module, w, (x,)), weights, torch.randn(2, 3))


def test_function_transforms() -> None:
    def loss(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (x @ w).tanh().sum()

    w, x = torch.randn(3), torch.randn(4, 3)
    agree(lambda w, x: torch.vmap(torch.func.grad(loss), (None, 0))(w, x), w, x)
    agree(lambda w, x: torch.func.jacrev(lambda w: (x @ w).sin())(w), w, x)
    agree(lambda w, x: torch.func.jvp(lambda w: loss(w, x), (w,), (w,)), w, x, strict=False)
    agree(lambda w, x: torch.func.hessian(loss)(w, x), w, x, strict=False)
    mapped = torch.vmap(compiled(lambda x: x.sin() * 2, strict=False))
    torch.testing.assert_close(mapped(x), x.sin() * 2)


class Clipped(torch.autograd.Function):
    """Identity forward (twice the value), clamped gradient: not what differentiating the forward would give."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, limit: float) -> torch.Tensor:
        ctx.limit = limit
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return (g * x).clamp(-ctx.limit, ctx.limit), None


def test_a_custom_autograd_function() -> None:
    agree(lambda x: Clipped.apply(x.sin(), 0.25).exp(), torch.randn(6, requires_grad=True))


@pytest.fixture(scope="module")
def library() -> Iterator[None]:
    with torch.library._scoped_library("fxopt_guest", "FRAGMENT"):

        @torch.library.custom_op("fxopt_guest::twice", mutates_args=())
        def twice(x: torch.Tensor, k: float = 2.0) -> torch.Tensor:
            return torch.from_numpy(x.detach().numpy() * k)

        twice.register_fake(lambda x, k=2.0: torch.empty_like(x))
        twice.register_autograd(lambda ctx, g: (g * 2, None))

        @torch.library.custom_op("fxopt_guest::fill_rows", mutates_args=("cache",))
        def fill_rows(cache: torch.Tensor, x: torch.Tensor) -> None:
            cache[: x.shape[0]].copy_(x)

        @torch.library.custom_op("fxopt_guest::both", mutates_args=("state",))
        def both(state: torch.Tensor, rest: list[torch.Tensor]) -> list[torch.Tensor]:
            state.add_(1)
            return [r + state for r in rest]

        both.register_fake(lambda state, rest: [torch.empty_like(r) for r in rest])
        yield


def test_custom_ops(library: None) -> None:
    ops = torch.ops.fxopt_guest
    agree(lambda x: ops.twice(x.sin()).relu() + ops.twice(x, 3.0), torch.randn(3, 4), strict=False)
    agree(lambda x: ops.twice(x.sin()).relu() + 1, torch.randn(3, 4, requires_grad=True), strict=False)


def test_custom_ops_that_write(library: None) -> None:
    ops = torch.ops.fxopt_guest

    def fn(cache: torch.Tensor, x: torch.Tensor) -> Any:
        ops.fill_rows(cache, x * 2)
        y = cache.sum(0)
        ops.fill_rows(cache, x + 1)
        first, second = ops.both(cache, [x[0] * 1, y])
        return first + second, y

    agree(fn, torch.zeros(5, 4), torch.randn(3, 4), strict=False)

    def inside(x: torch.Tensor) -> Any:
        scratch = torch.zeros(5, 4)
        ops.fill_rows(scratch, x)
        return scratch * 2, x * scratch[:3]

    agree(inside, torch.randn(3, 4), strict=False)


def test_conditional() -> None:
    def fn(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x.sin() * 2, lambda x: x - 1, (x,)) + x

    agree(fn, torch.ones(4), strict=False)
    agree(fn, -torch.ones(4), strict=False)


def test_while_loop() -> None:
    from torch._higher_order_ops.while_loop import while_loop

    def fn(n: torch.Tensor, x: torch.Tensor) -> Any:
        return while_loop(lambda n, x: n > 0, lambda n, x: (n - 1, x * 1.5 + 1), (n, x))

    agree(fn, torch.tensor(4), torch.randn(3), strict=False)


def test_scan() -> None:
    scan = pytest.importorskip("torch._higher_order_ops.scan").scan

    def fn(start: torch.Tensor, xs: torch.Tensor) -> Any:
        return scan(lambda c, x: (c + x, (c * x).sin()), start, xs)

    agree(fn, torch.zeros(3), torch.randn(5, 3), strict=False)


def test_flex_attention() -> None:
    attention = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    q, k, v = (torch.randn(1, 2, 16, 16) for _ in range(3))
    run = compiled(lambda q, k, v: attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j)), strict=False)
    torch.testing.assert_close(run(q, k, v), attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j)))


def test_threads_share_one_compiled_function() -> None:
    module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8))
    run = compiled(module)
    inputs = [torch.randn(k % 3 + 2, 16) for k in range(24)]
    with torch.no_grad():
        run(inputs[0])
        want = [module(x) for x in inputs]

    def work(k: int) -> None:
        for _ in range(5):
            with torch.no_grad():
                torch.testing.assert_close(run(inputs[k]), want[k], rtol=1e-4, atol=1e-5)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(24)))


def test_threads_that_write_to_tensors_of_their_own() -> None:
    run = compiled(lambda x, y: x.add_(y).mul_(2).sum())
    run(torch.zeros(64), torch.zeros(64))

    def work(k: int) -> None:
        x, y = torch.zeros(64), torch.full((64,), float(k))
        for _ in range(20):
            x.zero_()
            assert run(x, y) == 128.0 * k and bool((x == 2.0 * k).all())

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_generators_and_seeds() -> None:
    run = compiled(lambda x: torch.rand_like(x) + torch.randn(4), strict=False)
    x = torch.zeros(4)
    torch.manual_seed(3)
    first, second = run(x), run(x)
    torch.manual_seed(3)
    assert torch.equal(run(x), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    third = run(x)
    torch.set_rng_state(state)
    assert torch.equal(run(x), third)

    def with_generator(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        return x + torch.rand(4, generator=g)

    given = [torch.Generator().manual_seed(1) for _ in range(2)]
    same(compiled(with_generator, strict=False)(x, given[0]), with_generator(x, given[1]))


def test_fallback_random_gives_eagers_bits() -> None:
    def fn(x: torch.Tensor) -> Any:
        return F.dropout(x, 0.5, training=True) + torch.randn(5), torch.randint(0, 9, (5,)), torch.bernoulli(x.sigmoid())

    run = compiled(fn, strict=False, fallback_random=True)
    x = torch.randn(5)
    for _ in range(2):
        torch.manual_seed(7)
        got = run(x)
        torch.manual_seed(7)
        same(got, fn(x))


def test_deterministic_algorithms() -> None:
    def fn(x: torch.Tensor, index: torch.Tensor) -> Any:
        return (
            torch.zeros(4).index_add(0, index, x),
            torch.zeros(4).scatter_add(0, index, x),
            torch.empty(3),
            torch.empty(2, dtype=int),
        )

    x, index = torch.randn(100), torch.randint(0, 4, (100,))
    torch.use_deterministic_algorithms(True)
    try:
        run = compiled(fn, strict=False)
        first = run(x, index)
        same(first, fn(x, index))
        for _ in range(3):
            same(run(x, index), first)
    finally:
        torch.use_deterministic_algorithms(False)


def test_default_dtype() -> None:
    def fn(n: torch.Tensor) -> Any:
        return torch.ones(3) * 0.1 + n, n / 3, torch.full((2,), 1.5), torch.arange(0, 1, 0.25)

    torch.set_default_dtype(torch.float64)
    try:
        run = compiled(fn)
        same(run(torch.arange(3)), fn(torch.arange(3)))
        torch.set_default_dtype(torch.float32)
        same(run(torch.arange(3)), fn(torch.arange(3)))
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_device() -> None:
    with torch.device("cpu"):
        agree(lambda x: x + torch.ones(3), torch.randn(3))


class Cache(nn.Module):
    """Keys written at a position, as a language model's decoding does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 8, 4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, new: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self.keys.index_copy_(1, position, new)
        self.count += position.numel()
        mask = torch.arange(8) < self.count
        return (self.keys * mask[:, None]).sum(1)


def test_a_cache_written_in_place() -> None:
    mine, eager = Cache(), Cache()
    address = mine.keys.data_ptr()
    run = compiled(mine)
    for positions in ([0, 1, 2], [3], [4], [5]):
        new, position = torch.randn(2, len(positions), 4), torch.tensor(positions)
        with torch.no_grad():
            same(run(new, position), eager(new, position))
        same(list(mine.buffers()), list(eager.buffers()))
    assert mine.keys.data_ptr() == address


def test_a_cache_written_through_slices() -> None:
    def fn(cache: torch.Tensor, new: torch.Tensor, start: int) -> torch.Tensor:
        cache[:, start : start + new.shape[1]] = new
        return cache[:, : start + new.shape[1]].sum(1)

    run = compiled(fn)
    mine, eager = torch.zeros(2, 8, 4), torch.zeros(2, 8, 4)
    for start in range(6):
        new = torch.randn(2, 1, 4)
        same((run(mine, new, start), mine), (fn(eager, new, start), eager))
    assert len(graphs()) <= 4


def test_tensor_subclasses() -> None:
    class Tagged(torch.Tensor):
        """Behaves as a plain tensor but keeps its type."""

    x = torch.randn(4).as_subclass(Tagged)
    got = compiled(lambda x: x * 2 + 1, strict=False)(x)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), (x * 2 + 1).as_subclass(torch.Tensor))
    assert type(got) is type(x * 2 + 1)


def test_nested_compilation_and_fullgraph() -> None:
    inner = torch.compile(lambda x: x.sin(), backend="fxopt")
    agree(lambda x: inner(x) + 1, torch.randn(4))
    torch.compiler.reset()
    run = torch.compile(lambda x: x.sin() + 1, backend="fxopt", fullgraph=True)
    x = torch.randn(4)
    same(run(x), x.sin() + 1)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes(mode: str) -> None:
    torch.compiler.reset()
    x = torch.randn(4, 5)
    same(torch.compile(lambda x: x.softmax(1) + 1, backend="fxopt", mode=mode)(x), x.softmax(1) + 1)


def test_methods_and_modules() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 1

        def inner(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp()

    model, x = Model(), torch.randn(3)
    same(compiled(model.inner)(x), x.exp())
    torch.compiler.reset()
    model.compile(backend="fxopt")
    same(model(x), x.exp() + 1)


def test_what_is_compiled_is_generated() -> None:
    agree(lambda x: (x * 2).sin().sum(1), torch.randn(4, 5))
    assert kernels() > 0
