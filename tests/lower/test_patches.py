"""Convolutions as products of patches: which, with which weight, and that every way has eager's values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.capture.decompositions import decompositions
from fxopt.ir.quantized_convolution import SCALED_CONVOLUTION
from fxopt.ir.region import Alternatives, Call, Contraction, Patches, Region
from fxopt.lower import Lowered, padded_images, patches
from fxopt.lower.contractions import DIRECT, IMPLICIT, LIBRARY, PADDED, STENCIL, STENCIL_SUMS, SUMS, with_contractions
from fxopt.lower.convolutions import CUDNN
from fxopt.lower.schedule import schedule
from tests.lower.capturing import moved
from tests.lower.contracting import alternatives, check_ways, kept, searched
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Function = Callable[..., Any]


def image(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def weight(out: int, inside: int, window: int = 3, dtype: torch.dtype = BF16) -> Tensor:
    values = torch.randn(out, inside, window, window) / (inside * window**2) ** 0.5
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def copies_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small images and windows are."""
    monkeypatch.setattr(padded_images, "LEAST_BYTES", 0)
    monkeypatch.setattr(padded_images, "FEWEST_GATHERED", 0)


def ways(low: Lowered) -> list[list[str]]:
    return [[w.label for w in each.ways] for each in alternatives(low)]


def depthwise(x: Tensor, w: Tensor, *bias: Tensor) -> Tensor:
    return F.conv2d(x, w, bias[0] if bias else None, 2, w.shape[2] // 2, 1, x.shape[1])


def dense(x: Tensor, w: Tensor, *bias: Tensor) -> Tensor:
    return F.conv2d(x, w, bias[0] if bias else None, 2, w.shape[2] // 2)


def stem(x: Tensor, w: Tensor, *bias: Tensor) -> Tensor:
    return F.conv2d(x, w, bias[0] if bias else None, 2, 3)


def batch_norm(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Of known statistics, which are multiplied and added channel by channel."""
    return F.hardswish(depthwise(x, w) * scale[:, None, None] + shift[:, None, None])


def norm_of_places(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """As in ConvNeXt: what reduces stays apart."""
    return F.layer_norm(depthwise(x, w, b).permute(0, 2, 3, 1), (x.shape[1],))


def kept_too(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = dense(x, w)
    return y, F.silu(y)


STENCILS = [[LIBRARY, STENCIL, DIRECT]]
COMPUTED: dict[str, tuple[Function, tuple[Tensor, ...], list[list[str]]]] = {
    "depthwise": (lambda *a: F.silu(depthwise(*a)), (image(2, 16, 7, 5), weight(16, 1)), STENCILS),
    "depthwise, alone": (depthwise, (image(2, 16, 7, 5), weight(16, 1, 5), torch.randn(16).to(BF16)), STENCILS),
    "depthwise, float32": (depthwise, (image(2, 16, 7, 5, dtype=F32), weight(16, 1, dtype=F32)), STENCILS),
    "batch norm": (
        batch_norm, (image(2, 16, 7, 5), weight(16, 1), torch.randn(16), torch.randn(16)), STENCILS,
    ),
    "norm of places": (
        norm_of_places, (image(2, 16, 7, 5), weight(16, 1, 7), torch.randn(16).to(BF16)), STENCILS,
    ),
    "dense": (lambda *a: F.gelu(dense(*a)), (image(2, 16, 7, 5), weight(24, 16)), [[LIBRARY, IMPLICIT]]),
    "strided 1x1": (lambda *a: F.gelu(dense(*a)), (image(2, 16, 7, 5), weight(24, 16, 1)), [[LIBRARY, IMPLICIT]]),
    "result kept": (kept_too, (image(1, 3, 9, 7), weight(24, 3)), [[LIBRARY, IMPLICIT, PADDED]]),
    "few channels": (lambda *a: F.silu(stem(*a)), (image(2, 3, 18, 13), weight(24, 3, 7)), [[LIBRARY, IMPLICIT, PADDED]]),
    "few channels, alone": (
        stem, (image(1, 3, 12, 9), weight(24, 3, 6).contiguous(), torch.randn(24).to(BF16)), [[LIBRARY, IMPLICIT, PADDED]],
    ),
    "few channels, in pairs": (
        lambda x, w: F.silu(F.conv2d(x, w, None, 2, 1)), (image(2, 3, 9, 8), weight(24, 3, 4)),
        [[LIBRARY, IMPLICIT, PADDED]],
    ),
    "few channels, one by one": (
        lambda x, w: F.silu(F.conv2d(x, w, None, 1, (0, 2))), (image(2, 3, 7, 5), weight(24, 3)),
        [[LIBRARY, IMPLICIT, PADDED]],
    ),
    "few channels, side by side": (
        lambda x, w: F.silu(F.conv2d(x, w, None, 3)), (image(2, 5, 12, 9), weight(24, 5)),
        [[LIBRARY, IMPLICIT, PADDED]],
    ),
    "few channels, strides apart": (
        lambda x, w: F.silu(F.conv2d(x, w, None, (1, 3), (1, 0))), (image(2, 2, 6, 14), weight(24, 2, 4)),
        [[LIBRARY, IMPLICIT, PADDED]],
    ),
    "a vector as they are": (
        lambda x, w: F.silu(F.conv2d(x, w)), (image(2, 4, 7, 5), weight(24, 4)), [[LIBRARY, IMPLICIT]],
    ),
    "few channels, dilated": (
        lambda x, w: F.silu(F.conv2d(x, w, None, 2, 1, 2)), (image(2, 3, 7, 7), weight(24, 3)),
        [[LIBRARY, IMPLICIT, PADDED]],
    ),
    "a weight by rows": (
        lambda *a: F.gelu(dense(*a)), (image(2, 16, 7, 5), weight(24, 16).contiguous()), [[LIBRARY, IMPLICIT]],
    ),
    "a part of the channels": (
        lambda x, w: F.gelu(dense(x[:, 8:24], w)), (image(2, 32, 7, 5), weight(24, 16)), [[LIBRARY, IMPLICIT]],
    ),
}  # fmt: skip


def gradients(padding: int, dilation: int, mask: tuple[bool, ...]) -> Function:
    """Those of a depthwise convolution, with something computed from the input's."""

    def fn(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        geometry = ([1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], x.shape[1])
        found = torch.ops.aten.convolution_backward(grad, x, w, [x.shape[1]], *geometry, list(mask))
        return torch.tanh(found[0]), *(g for g, wanted in zip(found[1:], mask[1:], strict=True) if wanted)

    return fn


@pytest.mark.parametrize(
    ("window", "padding", "dilation", "mask"),
    [(3, 1, 1, (True, True, False)), (7, 3, 1, (True, False, False)), (3, 0, 1, (True, True, True)), (3, 1, 2, (True,) * 3)],
)
def test_gradients_of_depthwise_convolutions(window: int, padding: int, dilation: int, mask: tuple[bool, ...]) -> None:
    """The input's is a convolution as well, the weight's are sums; a bias's stays with the library."""
    side = dilation * (window - 1) - 2 * padding
    grad, x, w = image(2, 16, 9 - side, 8 - side), image(2, 16, 9, 8), weight(16, 1, window)
    low = check_ways(gradients(padding, dilation, mask), grad, x, w)
    assert ways(low) == ([[*STENCILS[0], STENCIL_SUMS]] if mask[1] else STENCILS)
    left = {STENCIL: [False, *mask[1:]], DIRECT: [False, *mask[1:]], STENCIL_SUMS: [False, False, mask[2]]}
    for label in ways(low)[0][1:]:
        calls = [s for s in kept(low, label).steps if isinstance(s, Call)]
        assert [c.args[-1] for c in calls] == ([left[label]] if any(left[label]) else [])


@pytest.mark.parametrize("wanted", [True, False])
def test_the_gradient_of_a_strided_depthwise_weight(wanted: bool) -> None:
    """The input's stays with the library."""

    def fn(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        geometry = ([2, 2], [1, 1], [1, 1], False, [0, 0], x.shape[1])
        found = torch.ops.aten.convolution_backward(grad, x, w, None, *geometry, [wanted, True, False])
        return tuple(g for g in found if g is not None)

    low = check_ways(fn, image(2, 16, 4, 3), image(2, 16, 7, 6), weight(16, 1))
    assert ways(low) == [[LIBRARY, SUMS]]
    assert len([s for s in kept(low, SUMS).steps if isinstance(s, Call)]) == wanted


@pytest.mark.parametrize("name", COMPUTED)
def test_every_way_has_eagers_values(name: str) -> None:
    fn, args, expected = COMPUTED[name]
    assert ways(check_ways(fn, *args)) == expected


LEFT: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "by rows": (dense, (image(2, 16, 7, 5).contiguous(), weight(24, 16))),
    "groups": (lambda x, w: F.conv2d(x, w, groups=4), (image(2, 16, 7, 5), weight(24, 4))),
    "two results a channel": (lambda x, w: F.conv2d(x, w, groups=16), (image(2, 16, 7, 5), weight(32, 1))),
    "a large depthwise window": (depthwise, (image(1, 16, 12, 12), weight(16, 1, 11))),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w), (image(2, 16, 7, 5), weight(16, 24))),
    "float64": (dense, (image(2, 16, 7, 5).double(), weight(24, 16).double())),
    "two dtypes": (lambda x, w: F.conv2d(x, w.to(BF16)), (image(1, 0, 7, 5), weight(24, 0, dtype=F16))),
    "one dimension": (lambda x, w: F.conv1d(x, w), (torch.randn(2, 16, 7).to(BF16), torch.randn(24, 16, 3).to(BF16))),
}


def test_where_a_call_of_cudnns_does_all_of_it_common_convolutions_are_left_to_that() -> None:
    x, colours = image(2, 16, 8, 6), image(2, 3, 8, 6)

    def relu(x: Tensor, w: Tensor) -> Tensor:
        return F.relu(dense(x, w))

    with torch.backends.cudnn.flags(enabled=True):
        assert ways(searched(relu, x, weight(24, 16))) == [[LIBRARY, CUDNN]]
        assert ways(searched(relu, x, weight(24, 16), every=True)) == [[LIBRARY, IMPLICIT, CUDNN]]
        assert ways(searched(relu, x, weight(24, 16, 1))) == [[LIBRARY, IMPLICIT, CUDNN]]
        assert ways(searched(relu, colours, weight(24, 3))) == [[LIBRARY, IMPLICIT, PADDED, CUDNN]]


@pytest.mark.parametrize("name", LEFT)
def test_left_to_the_library(name: str) -> None:
    fn, args = LEFT[name]
    assert ways(searched(fn, *args)) == []


def test_float32_is_left_to_the_library_but_for_depthwise_ones() -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        assert ways(searched(dense, image(2, 16, 7, 5, dtype=F32), weight(24, 16, dtype=F32))) == []


def test_sizes_known_only_at_run_time_are_left_to_the_library() -> None:
    assert ways(searched(dense, image(2, 16, 7, 5), weight(24, 16), dynamic=True)) == []


def test_offsets_stay_within_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    args = (image(2, 16, 7, 5), weight(24, 16))
    monkeypatch.setattr(patches, "LARGEST_OFFSET", 2 * 16 * 7 * 5 - 1)
    assert ways(searched(dense, *args)) == []


def frozen(fn: Function, args: tuple[Tensor, ...], constants: tuple[int, ...]) -> Lowered:
    low = lower(fn, args, decompose=decompositions())
    known = {low.inputs[k]: args[k] for k in constants}
    inputs = tuple(n for n in low.inputs if n not in known)
    return with_contractions(schedule(moved(replace(low, inputs=inputs, constants=known), "cuda")))


def test_a_frozen_weight_is_laid_out_once() -> None:
    args = (image(2, 16, 7, 5), weight(16, 1, 5))
    low = frozen(depthwise, args, (1,))
    own = kept(low, STENCIL)
    assert ways(low) == [[LIBRARY, STENCIL]]
    assert [type(s) for s in own.steps] == [Contraction]
    known = own.constants[own.steps[0].b.buffer]  # type: ignore[union-attr]
    assert torch.equal(known, args[1][:, 0].permute(1, 2, 0).float())
    (got,) = run_lowered(moved(own, "cpu"), {own.inputs[0]: args[0]})
    assert_closer(got, depthwise(*args), depthwise(*to_float64(args)), k=0)


def test_a_frozen_weight_of_a_padded_image_is_laid_out_once() -> None:
    args = (image(2, 3, 9, 6), weight(24, 3, 7).contiguous())
    own = kept(frozen(stem, args, (1,)), PADDED)
    assert [type(s) for s in own.steps] == [Region, Contraction]
    known = own.constants[own.steps[1].b.buffer]  # type: ignore[union-attr]
    assert torch.equal(known, F.pad(args[1].permute(0, 2, 3, 1), (0, 1)))
    (got,) = run_lowered(moved(own, "cpu"), {own.inputs[0]: args[0]})
    assert_closer(got, stem(*args), stem(*to_float64(args)), k=0)


def test_images_of_8_bits_are_padded_too() -> None:
    x, w = (torch.randint(-100, 101, shape).to(torch.int8) for shape in ((2, 9, 7, 3), (24, 7, 7, 3)))
    args = (x.permute(0, 3, 1, 2), w, torch.tensor(0.01), torch.rand(24) * 0.01, torch.randn(24))

    def fn(*given: Tensor) -> Tensor:
        return torch.relu(SCALED_CONVOLUTION(*given, [2, 2], [3, 3], [1, 1], F16))

    low = searched(fn, *args)
    assert ways(low) == [[LIBRARY, IMPLICIT, PADDED]]
    own = kept(low, PADDED)
    assert {own.buffers[step.writes()[0]].dtype for step in own.steps[:2]} == {torch.int8}  # type: ignore[union-attr]
    (got,) = run_lowered(own, dict(zip(low.inputs, args, strict=True)))
    torch.testing.assert_close(got, fn(*args), rtol=1e-3, atol=0.0)


def test_a_weight_that_lies_as_kernels_read_it_is_no_copy() -> None:
    args = (image(2, 16, 7, 5), weight(24, 16))
    (step,) = kept(searched(dense, *args), IMPLICIT).steps
    assert isinstance(step, Contraction) and isinstance(step.a, Patches)
    other = kept(searched(dense, args[0], args[1].contiguous()), IMPLICIT)
    assert [type(s) for s in other.steps] == [Region, Contraction]


def test_a_kernel_of_the_result_and_one_of_its_readers() -> None:
    """What reads it beside them finds it in memory."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = dense(x, w)
        return F.silu(y), F.avg_pool2d(y, 2)

    low = check_ways(fn, image(2, 16, 9, 7), weight(24, 16))
    (found,) = (s for s in low.steps if isinstance(s, Alternatives))
    assert [w.label for w in found.ways] == [LIBRARY, IMPLICIT]
