"""Attention's backends on CUDA: each one's values and gradients in whatever layouts, and what is chosen and kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir import attention_backends
from fxopt.ir.attention_backends import (
    BACKENDS,
    BY_NUMBER,
    CUDNN,
    FLASH,
    MATH,
    Inputs,
    Settings,
    backward_by,
    eagers_choice,
    forward_by,
    supports,
)
from fxopt.ir.attention_op import attention_backward, attention_forward, empty_gradients
from fxopt.journal import RECENT
from fxopt.tune import measure

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_cache")]
TOLERANCE = {torch.float16: 2.0, torch.bfloat16: 2.0, torch.float32: 4.0}
"""Times eager's own error."""


def inputs(
    rows: int = 197,
    keys: int = 197,
    *,
    width: int = 64,
    groups: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    mask: Tensor | None = None,
    heads_last: bool = True,
    **settings: Any,
) -> Inputs:
    def make(heads: int, length: int) -> Tensor:
        x = torch.randn(2, heads, length, width, device="cuda", dtype=dtype)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if heads_last else x

    return Inputs(make(4, rows), make(groups, keys), make(groups, keys), mask, Settings(**settings))


def hiding(rows: int, keys: int) -> Tensor:
    mask = torch.rand(2, 1, rows, keys, device="cuda") > 0.4
    mask[..., 0], mask[0, 0, 1] = True, False
    return mask


CASES: dict[str, Any] = {
    "square": lambda: inputs(),
    "aligned rows": lambda: inputs(256, 256, width=128),
    "contiguous": lambda: inputs(heads_last=False),
    "causal": lambda: inputs(is_causal=True),
    "causal, more keys": lambda: inputs(64, 197, is_causal=True),
    "cross": lambda: inputs(256, 77),
    "grouped": lambda: inputs(groups=2, enable_gqa=True, is_causal=True),
    "scale": lambda: inputs(scale=1.0),
    "odd width": lambda: inputs(width=36),
    "float32": lambda: inputs(dtype=torch.float32),
    "float16": lambda: inputs(dtype=torch.float16),
    "one row": lambda: inputs(1, 300),
    "boolean mask": lambda: inputs(197, 130, mask=hiding(197, 130)),
    "additive mask": lambda: inputs(mask=torch.randn(197, 197, device="cuda", dtype=torch.bfloat16)),
}


def able(x: Inputs) -> list[str]:
    return [backend for backend in BACKENDS if supports(backend, x, trains=True)]


def exact(x: Inputs, grad: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients in float64."""
    mask = x.mask if x.mask is None or x.mask.dtype == torch.bool else x.mask.double()
    wide = Inputs(x.query.double(), x.key.double(), x.value.double(), mask, x.settings)
    with torch.no_grad():
        out, statistics = forward_by(MATH, wide, statistics=True)
        assert statistics is not None
        return (out, *backward_by(MATH, wide, grad.double(), out, statistics))


def worst(found: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    return [float((f.double() - w).abs().max() / w.abs().max()) for f, w in zip(found, want, strict=True)]


def steps(x: Inputs, backend: str, grad: Tensor, *, relaid: bool = False) -> tuple[Tensor, ...]:
    """Result and gradients through the ops; `relaid`: the backward gets copies in other layouts than the forward left."""
    options: dict[str, Any] = {"scale": x.settings.scale, "enable_gqa": x.settings.enable_gqa}
    out, statistics, number = attention_forward(*x[:4], x.settings.is_causal, **options, backend=backend)
    assert BY_NUMBER[int(number)] == backend
    assert number.device.type == "cpu"
    assert (statistics.shape, statistics.dtype) == (x.query.shape[:3], torch.float32)
    left = [other_layout(t) if relaid else t for t in (grad, out, statistics)]
    saved = (*left[1:], number)
    return (out, *attention_backward(left[0], *x[:4], *saved, x.settings.is_causal, **options))


def other_layout(x: Tensor) -> Tensor:
    """A copy in which the second and third dimension have changed places in memory."""
    swapped = x.transpose(1, 2)
    return x.contiguous() if swapped.is_contiguous() else swapped.contiguous().transpose(1, 2)


@pytest.mark.parametrize("relaid", [False, True], ids=["as left", "relaid"])
@pytest.mark.parametrize("name", CASES)
def test_every_backend_has_eagers_precision(name: str, relaid: bool) -> None:
    """Against float64, both ways, within a multiple of the error of eager's choice; a refusal would show in the number.

    A graph may lay out anew what lies between forward and backward. cuDNN's plans are remembered by the layouts of query,
    key and value alone, so that calls with other layouts of the rest come right after one another here.
    """
    torch.manual_seed(0)
    x: Inputs = CASES[name]()
    grad = torch.randn_like(x.query)
    want = exact(x, grad)
    eager = eagers_choice(x, trains=True)
    with torch.no_grad():
        reference = worst(steps(x, eager, grad), want)
        bound = [TOLERANCE[x.query.dtype] * e + 1e-6 for e in reference]
        for backend in able(x):
            errors = worst(steps(x, backend, grad, relaid=relaid), want)
            assert all(e <= b for e, b in zip(errors, bound, strict=True)), (backend, errors, reference)


@pytest.mark.parametrize("name", ["square", "aligned rows", "causal", "grouped", "boolean mask"])
@pytest.mark.parametrize("first", BACKENDS)
def test_a_backward_is_never_another_backends(name: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the backward refuses, the forward is computed again: no statistic of `first` reaches another backend."""
    torch.manual_seed(0)
    x: Inputs = CASES[name]()
    if first == MATH or first not in able(x):
        pytest.skip(f"{first} does not take this, or has nobody after it")
    grad = torch.randn_like(x.query)
    want = exact(x, grad)

    def refuse(*_: Any) -> Any:
        raise RuntimeError("refused by the test")

    with torch.no_grad():
        reference = worst(steps(x, MATH, grad), want)
        monkeypatch.setitem(attention_backends._BACKWARD, first, refuse)
        monkeypatch.setattr(attention_backends, "_refusals", set())
        errors = worst(steps(x, first, grad), want)
    assert all(e <= 2 * TOLERANCE[x.query.dtype] * r + 1e-6 for e, r in zip(errors, reference, strict=True)), errors


@pytest.mark.parametrize("name", ["aligned rows", "contiguous", "grouped"])
@pytest.mark.parametrize("backend", [FLASH, CUDNN])
def test_results_have_the_layouts_that_plans_expect(backend: str, name: str) -> None:
    """Else every call would end in a copy."""
    x: Inputs = CASES[name]()
    if backend not in able(x):
        pytest.skip(f"no {backend} here")
    with torch.no_grad():
        out, *gradients = steps(x, backend, torch.randn_like(x.query))
    assert out.stride() == torch.empty_like(x.query).stride()
    assert [g.stride() for g in gradients] == [p.stride() for p in empty_gradients(*x[:3])]


@pytest.mark.parametrize("first", ["eager", "own"])
def test_plans_of_eagers_and_ours_are_kept_apart(first: str) -> None:
    """torch finds cuDNN's plans without looking at the gradient's layout: whoever comes second would get garbage."""
    torch.manual_seed(0)
    x = inputs(160 if first == "own" else 224, 160, width=64)  # not met by another test
    if CUDNN not in able(x):
        pytest.skip("no cudnn here")
    grad = torch.randn_like(x.query).contiguous()
    want = exact(x, grad)
    leaves = [t.detach().requires_grad_() for t in x[:3]]

    def eagers() -> tuple[Tensor, ...]:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    def own() -> tuple[Tensor, ...]:
        out = attention_forward(*leaves, backend=CUDNN)[0]
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))  # in autograd's thread, as eager's

    runs = (eagers, own, eagers) if first == "eager" else (own, eagers, own)
    for run in runs:
        assert max(worst(run(), want)) < 2e-2, run.__name__


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def notes() -> list[str]:
    return [text for journal in RECENT for topic, text in journal.notes if topic == "attention"]


@pytest.mark.parametrize("train", [False, True])
def test_what_is_chosen_is_measured_and_remembered(train: bool) -> None:
    q, k, v = (t.detach().requires_grad_(train) for t in inputs(512, 512, width=128)[:3])
    told = []
    for _ in range(2):
        torch.compiler.reset()
        RECENT.clear()
        with torch.set_grad_enabled(train):
            got = torch.compile(attend, backend="fxopt", options={"strict": True})(q, k, v)
            want = attend(q, k, v)
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
        if train:
            own, eagers = (torch.autograd.grad(x.float().sum(), (q, k, v)) for x in (got, want))
            torch.testing.assert_close(own, eagers, atol=5e-2, rtol=5e-2)
        told.append(notes())
    assert len(told[0]) == 1
    assert told[0] == told[1]


def test_replays_are_measured_for_what_will_be_replayed() -> None:
    """Graphs of every able backend, which give the same time as launches in a stream within what their gaps can be."""
    x = inputs(128, 128)
    runs = [lambda b=b: forward_by(b, x, statistics=False) for b in able(x) if b != MATH]
    for run in runs:
        run()
    device = torch.device("cuda", torch.cuda.current_device())
    replays = measure.replayed(runs, device)
    assert replays is not None and len(replays) == len(runs) > 0
    seconds = [s / measure.REPEATS for s in measure.interleaved(replays, device, cold=False)]
    assert all(1e-6 < s < 1e-3 for s in seconds), seconds


def test_flags_are_obeyed() -> None:
    q, k, v = inputs(512, 512, width=128)[:3]
    allowed = [torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION]
    torch.compiler.reset()
    RECENT.clear()
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(allowed):
        torch.compile(attend, backend="fxopt")(q, k, v)
    assert not any("cudnn" in text or "math" in text for text in notes())


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != MATH])
def test_calls_can_be_captured(backend: str) -> None:
    """A CUDA graph of a forward and a backward: nothing waits for the device."""
    x = inputs(256, 256)
    if not supports(backend, x, trains=True):
        pytest.skip(f"no {backend} here")
    grad = torch.randn_like(x.query)

    def step() -> tuple[Tensor, ...]:
        return steps(x, backend, grad)

    with torch.no_grad():
        want = step()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        graph.replay()
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_a_refusal_is_only_slower() -> None:
    x = inputs(64, 64, mask=torch.randn(64, 64, device="cuda", dtype=torch.bfloat16))
    got = torch.ops.fxopt.attention(*x[:4], backend=FLASH)  # which takes no masks
    torch.testing.assert_close(got, F.scaled_dot_product_attention(*x[:4]))
