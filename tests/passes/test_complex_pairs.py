"""Complex arithmetic on pairs of reals: what becomes of each op, what stays complex, strides, aliasing and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.ir import ops
from fxopt.ir.graph import Graph
from fxopt.passes.context import DefaultOptions
from tests.numerics import assert_closer, check_compiled, to_float64
from tests.passes.graphs import aliasing, calls, execute, optimize

C = torch.complex64
INF, NAN = float("inf"), float("nan")
FREE_VIEWS = {"view_as_real", "view_as_complex", "_conj", "resolve_conj"}


def z(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=C)


def left_complex(graph: Graph) -> list[str]:
    """The calls that are left with complex operands or results and are no free views."""

    def is_complex(node: Any) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.is_complex()

    nodes = [n for n in graph.gm.graph.nodes if n.op == "call_function"]
    touched = [ops.name_of(n.target) for n in nodes if any(map(is_complex, (n, *n.all_input_nodes)))]
    return [name for name in touched if name not in FREE_VIEWS]


def check(fn: Callable[..., Any], *args: torch.Tensor, only: bool = True, dynamic: bool = False) -> Graph:
    """Optimize, checked after every pass: values, strides, conjugate bits and aliasing are eager's."""
    graph, _ = optimize(fn, args, only="complex_pairs" if only else None, dynamic=dynamic)
    got, want, exact = execute(graph, args), fn(*args), fn(*to_float64(args))
    want, exact = (x if isinstance(x, tuple) else (x,) for x in (want, exact))
    assert_closer(got, want, exact)
    assert [g.stride() for g in got] == [w.stride() for w in want]
    assert [g.is_conj() for g in got] == [w.is_conj() for w in want]
    assert aliasing(args, got) == aliasing(args, want)
    return graph


def views(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2
    return y, y.t(), y[1:], y[:, -1], y.unsqueeze(-1), y.view(2, 6), y.expand(2, 3, 4), y.mH, y.permute(1, 0).conj()


CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "a product": (lambda a, b: a * b, (z(3, 4), z(3, 4))),
    "a product of transposed": (lambda a, b: a * b, (z(4, 3).t(), z(4, 3).t())),
    "a product of both": (lambda a, b: a * b, (z(4, 3).t(), z(3, 4))),
    "a product that broadcasts": (lambda a, b: a * b, (z(2, 1, 4), z(3, 1))),
    "times real": (lambda a, b: a * b, (z(3, 4), torch.randn(4))),
    "real times complex": (lambda a, b: b * a, (z(3, 4), torch.randn(3, 1))),
    "times int": (lambda a, b: a * b, (z(3, 4), torch.arange(4))),
    "times double": (lambda a, b: a * b, (z(3, 4), torch.randn(3, 4, dtype=torch.float64))),
    "times a number": (lambda a: a * 2 * (1 - 2j), (z(3, 4),)),
    "real times a complex number": (lambda a: a * (1 - 2j), (torch.randn(3, 4),)),
    "a quotient": (lambda a, b: a / b, (z(3, 4), z(3, 4))),
    "large and small divisors": (lambda a, b: a / (b * torch.tensor([1e30, 1e-30, 1.0, 1e18])), (z(3, 4), z(3, 4))),
    "by real": (lambda a, b: a / b, (z(3, 4), torch.rand(3, 1) + 1)),
    "real by complex": (lambda a, b: a / b, (torch.randn(3, 4), z(4))),
    "by a number": (lambda a: a / 3, (z(3, 4),)),
    "a reciprocal": (lambda a: 1 / a, (z(3, 4),)),
    "sums": (lambda a, b: torch.add(a, b, alpha=2) - b + 1j, (z(3, 4), z(4))),
    "sums with reals": (lambda a, b: b - a + 3, (z(3, 4), torch.randn(3, 4))),
    "negated": (lambda a: -a, (z(4, 3).t(),)),
    "conjugated": (lambda a, b: (a.conj() * b, a.conj() + b.mT.conj().mT, b.conj()), (z(3, 4), z(3, 4))),
    "conjugated memory": (lambda a: torch.conj_physical(a), (z(3, 4),)),
    "where": (lambda a, b: torch.where(a.real > 0, a, b), (z(3, 4), z(3, 4))),
    "joined": (lambda a, b: (torch.cat([a, b], -1), torch.stack([a, b], -1)), (z(3, 4), z(3, 4))),
    "reduced": (lambda a: (a.sum(), a.sum(-1), a.sum(0, keepdim=True), a.mean(1), a.cumsum(-1)), (z(3, 4),)),
    "no dimensions": (lambda a: (a * 2).sum() * a.sum(), (z(),)),
    "nothing": (lambda a: a[:0] * 2, (z(3, 4),)),
    "magnitude": (lambda a: a.abs(), (z(4, 3).t(),)),
    "angle": (lambda a: a.angle(), (z(3, 4),)),
    "parts": (lambda a: (a * a).real + (a * a).imag * a.conj().imag, (z(3, 4),)),
    "compared": (lambda a, b: (a == b, a != b, a == 0, a * 1 == a.real), (z(3, 4), z(3, 4))),
    "from parts": (lambda a, b: torch.complex(a, b), (torch.randn(3, 4), torch.randn(3, 4))),
    "from parts that broadcast": (lambda a, b: torch.complex(a, b), (torch.randn(3, 1), torch.randn(4))),
    "from angles": (lambda a: torch.polar(torch.ones_like(a), a), (torch.randn(3, 4),)),
    "from reals": (lambda a: a.to(C) * 1j, (torch.randn(3, 4),)),
    "another precision": (lambda a: a.to(torch.complex128) * 1j, (z(3, 4),)),
    "picked": (lambda a, i: (a[i] * 2, a.flip(0), a.roll(1, -1)), (z(3, 4), torch.tensor([2, 0, 2]))),
    "views": (views, (z(3, 4),)),
    "its pairs": (lambda a: ((y := a * 2), torch.view_as_real(y), torch.view_as_real(a * 3)), (z(3, 4),)),
    "views of an input": (lambda a: (a.t(), a.t()[1:].conj() * 2), (z(3, 4),)),
    "zeros": (lambda a: torch.where(a.abs() > 1, a, torch.zeros((), dtype=C)), (z(3, 4),)),
}


@pytest.mark.parametrize("only", [True, False], ids=["alone", "all passes"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_complex_is_computed(name: str, dynamic: bool, only: bool) -> None:
    fn, args = CASES[name]
    assert left_complex(check(fn, *args, only=only, dynamic=dynamic)) == []


LIBRARY: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], list[str]]] = {
    "a transform": (lambda a: torch.fft.fft(a * 2).abs(), (z(3, 4),), ["_fft_c2c"]),
    "a matrix product": (lambda a, b: (a @ b.mH) * 2, (z(3, 4), z(3, 4)), ["mm"]),
    "an unknown op": (lambda a: (a * 2).sqrt() + 1, (z(3, 4),), ["sqrt"]),
    "an overlapping layout": (lambda a: a.as_strided((3, 3), (1, 1)) * 2, (z(3, 4),), ["as_strided"]),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_library_calls_are_given_views_of_pairs(name: str) -> None:
    fn, args, left = LIBRARY[name]
    assert left_complex(check(fn, *args)) == left


NEAR_MISSES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "half precision": (lambda a: a * 2, (torch.randn(3, 4).to(torch.complex32),)),
    "an input that is written": (lambda a: a.mul_(2).abs(), (z(3, 4),)),
    "its pairs only": (lambda a: torch.view_as_real(a) * 2, (z(3, 4),)),
    "no complex numbers": (lambda a: torch.stack([a, a], -1) * 2, (torch.randn(3, 4),)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_left_alone(name: str) -> None:
    fn, args = NEAR_MISSES[name]
    graph, context = optimize(fn, [a.clone() for a in args], only="complex_pairs")
    if name != "an input that is written":
        assert not context.log
    got = execute(graph, [a.clone() for a in args])
    torch.testing.assert_close(got[0], fn(*(a.clone() for a in args)))


def test_infinities_and_nan_multiply_as_in_eager() -> None:
    numbers = [0.0, -0.0, 1.5, INF, -INF, NAN]
    every = torch.tensor([complex(a, b) for a in numbers for b in numbers], dtype=C)
    reals = torch.tensor(numbers)
    for fn, args in (
        (lambda a, b: a[:, None] * b, (every, every)),
        (lambda a, b: a[:, None] * b, (every, reals)),
        (lambda a: a * 2.0, (every,)),
        (lambda a: a * 1j, (every,)),
    ):
        graph, _ = optimize(fn, args)
        torch.testing.assert_close(execute(graph, args)[0], fn(*args), rtol=0, atol=0, equal_nan=True)


def test_fuel_and_disabling() -> None:
    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((a * b + a) * b).abs()

    args = z(3, 4), z(3, 4)
    for fuel in range(5):
        graph, context = optimize(fn, args, options=DefaultOptions(fuel=fuel, check=True))
        assert len(context.log) == fuel
        assert_closer(execute(graph, args), (fn(*args),), (fn(*to_float64(args)),))
    graph, context = optimize(fn, args, options=DefaultOptions(disable=("complex_pairs",)))
    assert calls(graph) == ["mul", "add", "mul", "abs"]


# --- rotary embeddings


def frequencies(length: int, width: int) -> torch.Tensor:
    steps = torch.outer(torch.arange(length).float(), 1.0 / (10000.0 ** (torch.arange(0, width, 2).float() / width)))
    return torch.polar(torch.ones_like(steps), steps)


def llama(q: torch.Tensor, k: torch.Tensor, freqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.view_as_complex(q.float().reshape(*q.shape[:-1], -1, 2))
    second = torch.view_as_complex(k.float().reshape(*k.shape[:-1], -1, 2))
    freqs = freqs.view(1, freqs.shape[0], 1, freqs.shape[1])
    turned = (torch.view_as_real(x * freqs).flatten(3) for x in (first, second))
    return next(turned).type_as(q), next(turned).type_as(k)


def deepseek(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    dtype = x.dtype
    x = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(x * freqs.view(1, x.size(1), 1, x.size(-1))).flatten(3).to(dtype)


def block(x: torch.Tensor, weight: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    q, k, v = (x @ weight).view(x.shape[0], x.shape[1], 3, 2, 8).unbind(2)
    q, k = llama(q, k, freqs)
    return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2).flatten(2)


def test_rotary_embeddings_compile_strictly() -> None:
    q, k, freqs = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8), frequencies(5, 8)
    check_compiled(llama, q, k, freqs)
    check_compiled(deepseek, q, freqs)
    check_compiled(lambda x: deepseek(x, frequencies(5, 8)), q)
    for fn, args in ((llama, (q, k, freqs)), (deepseek, (q.bfloat16(), freqs))):
        assert left_complex(optimize(fn, args)[0]) == []


def check_training(fn: Callable[..., Any], *calls: tuple[torch.Tensor, ...], dynamic: bool | None = None) -> None:
    """Results and gradients of the strictly compiled function are as good as eager's, call by call."""
    torch.compiler.reset()
    compiled = torch.compile(fn, backend="fxopt", options={"strict": True}, dynamic=dynamic)

    def run(f: Callable[..., Any], args: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        args = tuple(a.detach().requires_grad_(a.requires_grad) for a in args)
        out = f(*args)
        out = out if isinstance(out, tuple) else (out,)
        sum((o.abs() ** 2).sum() for o in out).backward()
        return [*(o.detach() for o in out), *(a.grad for a in args if a.requires_grad)]

    for args in calls:
        wide = tuple(w.requires_grad_(a.requires_grad) for w, a in zip(to_float64(args), args, strict=True))
        assert_closer(run(compiled, args), run(fn, args), run(fn, wide), k=16)


def test_a_rotary_block_trains() -> None:
    def args(length: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(2, length, 16, requires_grad=True), weight, frequencies(length, 8)

    weight = torch.randn(16, 48, requires_grad=True)
    check_training(block, args(5))
    check_training(block, args(5), args(7), dynamic=True)


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b: (a * b.conj() / (b * b.conj() + 1)).abs() + (a.mT @ b).abs().sum(),
        lambda a, b: (a * b.conj(), a * 2),
        lambda a, b: (a.t() * b[1:].t()[:, :1], torch.cat([a, b]).angle()),
        lambda a, b: (a * b).conj().imag * a.real,
    ],
    ids=["a product and a quotient", "complex outputs", "views", "a negative bit"],
)
def test_complex_parameters_train(fn: Callable[..., Any]) -> None:
    check_training(fn, (z(3, 4).requires_grad_(), z(3, 4).requires_grad_()))


@pytest.mark.parametrize(
    "fn", [lambda x: x * (2 + 1j), lambda x: x / (2 - 1j) + 1j, lambda x: (1j - x) * 3j], ids=["product", "quotient", "sum"]
)
def test_complex_numbers_in_training(fn: Callable[..., Any]) -> None:
    """Their conjugates are numbers' own."""
    given = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    check_training(lambda a, b: torch.view_as_real(fn(torch.complex(a, b))), given)


def test_gradients_that_come_conjugated() -> None:
    """Tracing sees a plain tangent; what arrives has the conjugate bit."""
    a, b = z(3, 4).requires_grad_(), z(3, 4)

    def gradient(f: Callable[..., Any]) -> torch.Tensor:
        return torch.autograd.grad(f(a, b).conj(), a, torch.ones(3, 4, dtype=C) * (1 + 2j))[0]

    compiled = torch.compile(lambda a, b: a * b, backend="fxopt", options={"strict": True})
    torch.testing.assert_close(gradient(compiled), gradient(lambda a, b: a * b))


def test_conjugated_inputs() -> None:
    for x in (z(3, 4).conj(), z(3, 4)):
        check_compiled(lambda x: (x * 2, x.abs()), x)
