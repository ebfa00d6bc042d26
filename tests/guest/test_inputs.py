"""What a user may pass in and get back: layouts, aliases, containers, scalars, unusual dtypes. As eager, every time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import pytest
import torch

from tests.guest.agreement import agree, compiled, kernels, same


def scaled(x: torch.Tensor) -> Any:
    return x * 2 + 1, x.sum()


VIEWS = {
    "storage offset": lambda: torch.randn(41)[1:].view(4, 10),
    "transposed": lambda: torch.randn(6, 5).t(),
    "every second": lambda: torch.randn(8, 9)[::2, 1::3],
    "expanded": lambda: torch.randn(5, 1).expand(5, 7),
    "expanded scalar": lambda: torch.randn(()).expand(3, 3),
    "channels last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "overlapping windows": lambda: torch.randn(12).unfold(0, 4, 1),
    "zero-dimensional": lambda: torch.randn(()),
    "no elements": lambda: torch.randn(0, 4),
    "no elements inside": lambda: torch.randn(3, 0, 2),
    "one element": lambda: torch.randn(1, 1),
    "not a number": lambda: torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0]),
    "negative view": lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("name", VIEWS)
def test_layouts(name: str) -> None:
    agree(scaled, VIEWS[name]())


def test_one_compilation_serves_aligned_and_unaligned_memory() -> None:
    run = compiled(scaled)
    memory = torch.randn(80)
    for start in (0, 1, 2, 3):
        x = memory[start : start + 64].view(8, 8)
        same(run(x), scaled(x))


def test_extreme_values() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -1e-40, 0.0])
    agree(lambda x: (x.amax(), x.argmax(), x.exp(), x.clamp(-1, 1), torch.minimum(x, x.flip(0)), x.softmax(0)), x)


def test_integers_wrap_as_in_eager() -> None:
    big, small = torch.tensor([2**63 - 1, -(2**63), 3]), torch.tensor([127, -128, 5], dtype=torch.int8)

    def fn(a: torch.Tensor, b: torch.Tensor) -> Any:
        return a + 1, a * 3, -a, b + b, b * b, -b, b.sum(), a // 2, b.to(torch.uint8) - 200

    agree(fn, big, small)


def test_python_numbers_that_change() -> None:
    run = compiled(lambda x, n, s: x * n + s)
    x = torch.randn(5)
    for n, s in ((2, 0.5), (3, 0.25), (4, 1.5), (-7, math.inf), (0, 0.0), (1, 2.0), (True, 1)):
        same(run(x, n, s), x * n + s)


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclasses.dataclass
class Batch:
    data: torch.Tensor
    mask: torch.Tensor | None
    scale: float


def test_containers() -> None:
    def fn(tensors: list[torch.Tensor], table: dict[str, Any], pair: Pair, nothing: None) -> Any:
        total = sum(tensors) * table["k"] + pair.left
        return {
            "total": total,
            "pair": Pair(pair.right + 1, total.relu()),
            "rest": [nothing, table["deep"][0] * 2, 7, "text"],
        }

    x = [torch.randn(3) for _ in range(6)]
    agree(fn, x[:3], {"k": 3, "deep": (x[3],)}, Pair(x[4], x[5]), None)


def test_a_dataclass() -> None:
    def fn(batch: Batch) -> Any:
        y = batch.data * batch.scale
        return y if batch.mask is None else y.masked_fill(batch.mask, 0)

    x = torch.randn(4, 4)
    run = compiled(fn)
    for batch in (Batch(x, None, 2.0), Batch(x, x > 0, 2.0), Batch(x, x > 1, 3.0)):
        same(run(batch), fn(batch))


def test_keyword_and_default_arguments() -> None:
    def fn(x: torch.Tensor, *rest: torch.Tensor, shift: torch.Tensor | None = None, **more: torch.Tensor) -> Any:
        y = x if shift is None else x + shift
        return y * 2, [r + 1 for r in rest], {k: v - 1 for k, v in more.items()}

    x = torch.randn(3)
    run = compiled(fn)
    same(run(x), fn(x))
    same(run(x, x + 1, shift=x, a=x, b=x * 2), fn(x, x + 1, shift=x, a=x, b=x * 2))


ALIASING = {
    "an input": lambda x, y: (x, x + y),
    "an input twice": lambda x, y: (x, y, x),
    "a view of an input": lambda x, y: (x[1:], x.t(), y.view(-1), x + 1),
    "one result twice": lambda x, y: (lambda z: (z, z))(x + y),
    "a view of a result": lambda x, y: (lambda z: (z, z.t(), z[0], z.view(-1)))(x + y),
    "detached": lambda x, y: (lambda z: (z, z.detach(), z))(x + y),
    "a view twice": lambda x, y: (lambda z: (z.t(), z[1:].detach(), z.t()))(x + y),
    "no tensor at all": lambda x, y: (None, 3, x.shape[0]),
    "constants": lambda x, y: (torch.arange(3), torch.ones(2, 2), torch.tensor([1.0, 2.0]), x * 0),
}


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", ALIASING)
def test_outputs_that_share_memory(name: str, grad: bool) -> None:
    agree(ALIASING[name], torch.randn(4, 4, requires_grad=grad), torch.randn(4, 4))


def write_rows(x: torch.Tensor, y: torch.Tensor) -> Any:
    x[1:3] = y[:2]
    x[0].add_(1)
    return x.sum()


def write_and_return(x: torch.Tensor, y: torch.Tensor) -> Any:
    x.mul_(2)
    y.copy_(x + 1)
    return x, y.t(), x + y


def swap(x: torch.Tensor, y: torch.Tensor) -> Any:
    old = x.clone()
    x.copy_(y)
    y.copy_(old)


def shifted_onto_itself(x: torch.Tensor, y: torch.Tensor) -> Any:
    x[1:] = x[:-1] + y[1:]
    return x * 2


def metadata(x: torch.Tensor, y: torch.Tensor) -> Any:
    return x.t_().clone(), y.unsqueeze_(0) * 2


def masked_and_filled(x: torch.Tensor, y: torch.Tensor) -> Any:
    x.masked_fill_(y > 0, 5).clamp_(max=4)
    y.zero_()
    y[0].fill_(3)


@pytest.mark.parametrize("fn", [write_rows, write_and_return, swap, shifted_onto_itself, metadata, masked_and_filled])
def test_inputs_written_in_place(fn: Any) -> None:
    agree(fn, torch.randn(4, 4), torch.randn(4, 4))


@pytest.mark.parametrize("fn", [write_rows, write_and_return, masked_and_filled])
def test_writes_to_inputs_that_are_views_of_one_memory(fn: Any) -> None:
    memory = torch.randn(8, 8)
    agree(fn, memory[:4, :4], memory[4:, 4:].t())
    agree(fn, memory.view(-1)[3:19].view(4, 4), memory.view(-1)[32:64:2].view(4, 4))


def test_overlapping_inputs_that_are_written() -> None:
    memory = torch.randn(24)
    agree(write_rows, memory[:16].view(4, 4), memory[4:20].view(4, 4), strict=False)
    agree(lambda x, y: (x.add_(1).sum(), y * 2), memory[:16], memory[:16], strict=False)


def test_the_same_tensor_for_two_arguments() -> None:
    x = torch.randn(4, 4)
    run = compiled(lambda a, b: a.add_(b) * 2)
    mine, eager = x.clone(), x.clone()
    same((run(mine, mine), mine), (eager.add_(eager) * 2, eager))
    other_mine, other = torch.ones(4, 4), torch.ones(4, 4)
    same((run(mine, other_mine), mine), (eager.add_(other) * 2, eager))


@pytest.mark.parametrize(
    "dtype",
    ["float16", "bfloat16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"],
)
def test_element_types(dtype: str) -> None:
    x = (torch.randn(5, 7) * 4).to(getattr(torch, dtype))

    def fn(x: torch.Tensor) -> Any:
        return x + x, x.to(torch.float32) * 0.5, x == x.flip(0), torch.where(x > 1, x, x * 0), x.sum(0)

    agree(fn, x)
    assert kernels() > 0


def test_complex_numbers() -> None:
    x = torch.randn(4, 4, dtype=torch.complex64, requires_grad=True)
    agree(lambda x: (x * (1 + 2j), x.abs(), x.conj() @ x, torch.view_as_real(x) * 2, torch.fft.fft(x)), x, strict=False)
    agree(lambda x: torch.polar(x.relu(), x).imag + 1, torch.randn(4), strict=False)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bit_floats(name: str) -> None:
    dtype = getattr(torch, name)

    def fn(x: torch.Tensor) -> Any:
        return (x * 2).to(dtype).float() + 1, x.to(dtype)

    got = compiled(fn, strict=False)(torch.randn(6, 6))
    assert got[1].dtype == dtype
    x = torch.randn(6, 6)
    for mine, theirs in zip(compiled(fn, strict=False)(x), fn(x), strict=True):
        assert torch.equal(mine.float(), theirs.float())


def test_sparse_inputs() -> None:
    dense = torch.randn(4, 4).relu()

    def fn(s: torch.Tensor, x: torch.Tensor) -> Any:
        return torch.sparse.mm(s, x) + 1, x * 2

    run = compiled(fn, strict=False)
    for layout in (dense.to_sparse(), dense.to_sparse_csr()):
        torch.testing.assert_close(run(layout, dense), fn(layout, dense))


def test_quantized_inputs() -> None:
    q = torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 10, torch.quint8)
    torch.testing.assert_close(compiled(lambda q: q.dequantize() * 2, strict=False)(q), q.dequantize() * 2)


def test_nested_tensors() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)
    got = compiled(lambda x: (x * 2).relu(), strict=False)(nested)
    for mine, theirs in zip(got.unbind(), nested.unbind(), strict=True):
        torch.testing.assert_close(mine, (theirs * 2).relu())


def test_meta_tensors() -> None:
    x = torch.randn(4, 4, device="meta")
    got = compiled(lambda x: (x @ x).relu().sum(0), strict=False)(x)
    assert got.device.type == "meta" and got.shape == (4,)


def test_numpy_inside() -> None:
    import numpy as np

    def fn(x: torch.Tensor) -> Any:
        return torch.from_numpy(np.sin(x.numpy()) + 1)

    agree(fn, torch.randn(4), strict=False)


def test_an_input_with_the_negative_bit() -> None:
    """Its memory holds the negatives of its elements: the imaginary part of a conjugate is such a view."""
    imaginary = torch.randn(4, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    torch.testing.assert_close(compiled(lambda x: x * 2 + 1, strict=False)(imaginary), imaginary * 2 + 1)
