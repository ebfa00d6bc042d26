"""Attention templates: values in Triton's interpreter, code for several architectures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.attention_kernels import memory_of, step_of
from fxopt.codegen.templates.attention_config import BOUNDED, AttentionConfig, bounded, configs
from fxopt.codegen.triton_attention import print_attention
from fxopt.codegen.triton_build import compile_triton
from fxopt.ir.attention_backends import MATH, Inputs, Settings, forward_by
from fxopt.ir.region import Attention
from fxopt.target import Target
from tests.codegen.triton_interpreter import Interpreter

H100 = Target.cuda(90)
BF16 = torch.bfloat16
WHOLE, SPLIT = AttentionConfig(16, 16, 4, 2), AttentionConfig(16, 16, 4, 2, split=3)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """[batch, heads, rows, width], with heads next to features in memory."""
    batch, heads, rows, width = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, rows, heads, width, generator=generator).to(dtype).transpose(1, 2)


def inputs(
    heads: int,
    groups: int,
    rows: int,
    keys: int,
    width: int = 16,
    values: int = 0,
    *,
    batch: int = 1,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Random operands; `values` features of the last one, if they are others."""
    query, key = rand(batch, heads, rows, width, dtype=dtype), rand(batch, groups, keys, width, dtype=dtype, seed=1)
    value = rand(batch, groups, keys, values or width, dtype=dtype, seed=2)
    return Inputs(query, key, value, mask, Settings(causal, scale, heads != groups))


def run(interpreter: Interpreter, config: AttentionConfig, x: Inputs, out: Tensor | None = None) -> Tensor:
    """The result [B, H, S, Ev] of the printed kernels, in `out` or the query's layout."""
    if out is None:
        out = rand(*x.query.shape[:3], x.value.shape[3], dtype=x.query.dtype).fill_(float("nan"))
    attention, memory = step_of(x, out, torch.device("cuda", 0)), memory_of(x, out)
    printed = print_attention(attention, config, H100)
    scratch = {s.name: torch.full((math.prod(s.shape),), float("nan")) for s in printed.scratch}  # type: ignore[arg-type]
    for kernel in printed.kernels:
        interpreter.run(kernel, memory | scratch)
    return out


def check(interpreter: Interpreter, config: AttentionConfig, x: Inputs, out: Tensor | None = None) -> None:
    mask = x.mask if x.mask is None or x.mask.dtype == torch.bool else x.mask.double()
    exact = Inputs(x.query.double(), x.key.double(), x.value.double(), mask, x.settings)
    got, want = run(interpreter, config, x, out), forward_by(MATH, exact, statistics=False)[0]
    tolerance = 1e-5 if got.dtype == torch.float32 else 16 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("rows", "keys", "config"), [(32, 48, WHOLE), (19, 41, WHOLE), (19, 41, SPLIT), (5, 50, SPLIT), (50, 5, WHOLE)], ids=str
)
def test_lengths(interpreter: Interpreter, rows: int, keys: int, config: AttentionConfig, causal: bool) -> None:
    check(interpreter, config, inputs(1, 1, rows, keys, causal=causal))


@pytest.mark.parametrize("width", [8, 24, 80])
def test_widths(interpreter: Interpreter, width: int) -> None:
    check(interpreter, WHOLE, inputs(2, 1, 9, 20, width, width + 8, causal=True))
    check(interpreter, SPLIT, inputs(2, 1, 9, 40, width, 8))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("pack", [1, 3])
def test_heads_of_a_group_share_tiles(interpreter: Interpreter, split: int, pack: int) -> None:
    packed = AttentionConfig(16, 16, 4, 2, pack, split)
    check(interpreter, packed, inputs(6, 2, 1, 41, batch=2))
    check(interpreter, packed, inputs(6, 2, 8, 41, causal=True))


MASKS = {
    "one row for all": (2, 1, 1, 41),
    "rows": (1, 1, 7, 41),
    "everything": (2, 4, 7, 41),
}


@pytest.mark.parametrize("config", [WHOLE, AttentionConfig(16, 16, 4, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_masks(interpreter: Interpreter, config: AttentionConfig, kind: str) -> None:
    """Rows that are hidden throughout are zero."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(MASKS[kind], generator=generator) < 0.7
    seen[..., :20] = False
    seen.view(-1, 41)[0] = False
    check(interpreter, config, inputs(4, 2, 7, 41, batch=2, mask=seen))
    addend = torch.randn(MASKS[kind], generator=generator).masked_fill(~seen, -torch.inf)
    check(interpreter, config, inputs(4, 2, 7, 41, batch=2, mask=addend))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("kind", ["boolean", "added", "least"])
def test_what_the_mask_does_not_show_is_not_read(interpreter: Interpreter, kind: str, split: int) -> None:
    """There, keys and values are NaN, from the next block on; a batch that is shown nothing reads all."""
    config = AttentionConfig(16, 16, 4, 2, 2, split, bounded=True)
    for keys in (64, 41):
        shown = torch.zeros(3, 1, 1, keys, dtype=torch.bool)
        shown[0, ..., [3, 17]], shown[1, ..., :] = True, True
        hidden = {"added": -torch.inf, "least": torch.finfo(torch.float32).min}.get(kind, 0.0)
        mask = shown if kind == "boolean" else torch.randn(shown.shape).masked_fill(~shown, hidden)
        x = inputs(4, 2, 2, keys, batch=3, mask=mask)
        whole = x._replace(key=x.key.clone(), value=x.value.clone())
        x.key[0, :, 32:], x.value[0, :, 32:] = float("nan"), float("nan")
        got = run(interpreter, config, x)
        exact = whole._replace(**{n: getattr(whole, n).double() for n in ("query", "key", "value")})
        exact = exact if kind == "boolean" else exact._replace(mask=mask.double())
        torch.testing.assert_close(got.double(), forward_by(MATH, exact, statistics=False)[0], rtol=1e-5, atol=1e-5)


def test_a_mask_that_is_nan_is_shown(interpreter: Interpreter) -> None:
    mask = torch.zeros(1, 1, 1, 41)
    mask[..., 20:], mask[..., 40] = -torch.inf, float("nan")
    check(interpreter, AttentionConfig(16, 16, 4, 2, split=2, bounded=True), inputs(1, 1, 2, 41, mask=mask))


def test_a_mask_with_padded_rows(interpreter: Interpreter) -> None:
    padded = torch.randn(1, 1, 9, 48)[..., :41]
    check(interpreter, WHOLE, inputs(2, 2, 9, 41, mask=padded))


@pytest.mark.parametrize("config", [WHOLE, SPLIT], ids=str)
def test_the_least_float_hides_and_leaves_equal_scores(interpreter: Interpreter, config: AttentionConfig) -> None:
    least = torch.finfo(torch.float32).min
    mask = torch.zeros(2, 1, 7, 41)
    mask[0, :, 2], mask[1, :, 3, 5:] = least, least
    check(interpreter, config, inputs(1, 1, 7, 41, batch=2, mask=mask))


@pytest.mark.parametrize("config", [WHOLE, SPLIT], ids=str)
def test_what_is_not_finite_spreads_as_in_eager(interpreter: Interpreter, config: AttentionConfig) -> None:
    x = inputs(3, 3, 7, 41)
    x.query[0, 0, 3, 1], x.key[0, 1, 20, 0], x.value[0, 2, 40, 2] = float("nan"), float("nan"), float("inf")
    check(interpreter, config, x)
    mask = torch.zeros(1, 1, 7, 41)
    mask[..., 2, :] = float("nan")
    check(interpreter, config, inputs(1, 1, 7, 41, mask=mask))


def test_values_past_the_end_are_not_read(interpreter: Interpreter) -> None:
    """Memory after the last key of a head holds NaN, which times a probability of 0 would be NaN."""
    x = inputs(2, 2, 7, 41)
    longer = [torch.full((1, 2, 64, 16), float("nan")) for _ in range(2)]
    for wide, own in zip(longer, (x.key, x.value), strict=True):
        wide[:, :, :41] = own
    key, value = (wide[:, :, :41] for wide in longer)
    check(interpreter, WHOLE, x._replace(key=key, value=value))


@pytest.mark.parametrize("width", [16, 24])
def test_keys_with_contiguous_rows(interpreter: Interpreter, width: int) -> None:
    x = inputs(4, 2, 7, 41, width)
    check(interpreter, AttentionConfig(16, 16, 4, 2, 2, 2), x._replace(key=x.key.mT.contiguous().mT))
    x = inputs(2, 2, 7, 32, width)
    check(interpreter, WHOLE, x._replace(key=x.key.mT.contiguous().mT))


def test_half_types(interpreter: Interpreter) -> None:
    for config in (WHOLE, AttentionConfig(16, 16, 4, 2, 2, 3)):
        check(interpreter, config, inputs(4, 2, 8, 41, 32, scale=0.3, dtype=torch.float16))


def test_views_in_a_larger_buffer(interpreter: Interpreter) -> None:
    """Query, key and value of one projection [B, S, 3, H, E], and a result with heads first."""
    whole = torch.randn(2, 19, 3, 2, 16)
    query, key, value = (whole[:, :, i].transpose(1, 2) for i in range(3))
    out = torch.full((2, 2, 19, 16), float("nan"))
    check(interpreter, WHOLE, Inputs(query, key, value, None, Settings()), out)


# --- code


def shaped(
    heads: int,
    groups: int,
    rows: int,
    keys: int,
    width: int,
    mask: str = "",
    causal: bool = False,
    dtype: torch.dtype = BF16,
) -> Attention:
    """A step over tensors without values."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value = (empty(8, n, h, width).transpose(1, 2) for h, n in ((heads, rows), (groups, keys), (groups, keys)))
    given = {"": None, "row": empty(8, 1, 1, keys), "rows": empty(8, heads, rows, keys)}[mask]
    x = Inputs(query, key, value, given, Settings(causal, None, heads != groups))
    return step_of(x, torch.empty_like(query), torch.device("cuda", 0))


def test_caches_may_be_read_as_far_as_they_are_shown() -> None:
    cache = shaped(32, 8, 1, 2048, 128, "row")
    first, *more = configs(cache, H100)
    (found,) = bounded(cache, [first, *more])
    assert found == replace(first, bounded=True) and str(found).endswith(BOUNDED)
    for other in (shaped(32, 8, 1, 2048, 128), shaped(12, 12, 2048, 2048, 64, "row"), shaped(32, 8, 1, 512, 128, "row")):
        assert bounded(other, [first]) == []
    assert bounded(shaped(12, 12, 8, 2048, 64, "rows"), [first]) == []


COMPILED = {
    "static cache": shaped(32, 8, 1, 2048, 128, "row"),
    "width 256": shaped(8, 4, 512, 512, 256, causal=True),
    "bias": shaped(12, 12, 512, 512, 64, "rows"),
    "float32": shaped(32, 8, 1, 2048, 128, "row", dtype=torch.float32),
}


WITHOUT_A_SPILL = [*((90, n) for n in COMPILED), (80, "bias"), (80, "float32"), (100, "static cache"), (100, "float32")]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_bounded_kernel_compiles_without_spills(arch: int) -> None:
    target, cache = Target.cuda(arch), COMPILED["static cache"]
    (config,) = bounded(cache, configs(cache, target))
    assert compile_triton(print_attention(cache, config, target).kernels[0], target)[1]["n_spills"] == 0


@pytest.mark.parametrize(("arch", "name"), WITHOUT_A_SPILL)
def test_the_first_proposal_compiles_without_spills(arch: int, name: str) -> None:
    target = Target.cuda(arch)
    first = configs(COMPILED[name], target)[0]
    metas = [compile_triton(kernel, target)[1] for kernel in print_attention(COMPILED[name], first, target).kernels]
    assert all(meta["n_spills"] == 0 for meta in metas)
    assert metas[0]["shared"] <= target.shared_per_block
