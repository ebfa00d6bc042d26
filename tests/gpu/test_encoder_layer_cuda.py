"""torch's encoder layers in inference on a GPU: taken apart, captured, and with the values of the operator."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.journal import RECENT
from fxopt.report.backends import resolve_backend
from fxopt.runtime.cuda_graph import GraphedExecutor
from tests.numerics import assert_closer, exact_products

pytestmark = pytest.mark.gpu

BATCH, LENGTH, WIDTH = 8, 96, 256


def encoder(dtype: torch.dtype, **settings: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).cuda().to(dtype).eval()


BEFORE: dict[str, Any] = {"norm_first": True, "activation": "gelu"}


@pytest.mark.parametrize(
    ("dtype", "settings", "padded"),
    [
        (torch.bfloat16, {}, True),
        (torch.bfloat16, BEFORE, False),
        (torch.float32, BEFORE, False),
        (torch.float32, {}, True),
    ],
)
def test_values_of_the_operator(
    dtype: torch.dtype, settings: dict[str, Any], padded: bool, made: list[GraphedExecutor]
) -> None:
    """Rows that have no key to see are NaN there, and so they are here."""
    exact_products()
    model = encoder(dtype, **settings)
    x = torch.randn(BATCH, LENGTH, WIDTH, device="cuda", dtype=dtype)
    lengths = torch.tensor([LENGTH, 40, 1, 0, 7, 95, 64, 33], device="cuda")
    masks = {"src_key_padding_mask": torch.arange(LENGTH, device="cuda") >= lengths[:, None]} if padded else {}
    torch.compiler.reset()
    RECENT.clear()
    compiled = torch.compile(model, backend=resolve_backend("fxopt"), options={"strict": True})
    with torch.no_grad():
        results = [compiled(x, **masks).clone() for _ in range(5)]
        eager, exact = model(x, **masks), copy.deepcopy(model).double()(x.double(), **masks)
    for got in results:
        assert torch.equal(got.isnan(), eager.isnan())
        assert_closer(got, eager, exact)
    called = {op for journal in RECENT for op, _ in journal.library}
    assert not any("_transformer_encoder_layer_fwd" in op for op in called)
    assert made and made[0].graphs


def test_layers_are_quantized() -> None:
    model, x = encoder(torch.bfloat16), torch.randn(BATCH, LENGTH, WIDTH, device="cuda", dtype=torch.bfloat16)
    calibration = fxopt.calibrate(model, [x], progress=False, backend=resolve_backend("fxopt"))
    options = {"precision": "fp8", "calibration": calibration}
    with torch.no_grad():
        exact = model(x).float()
        explained = fxopt.explain(model, x, fxopt_options=options)
        got = torch.compile(model, backend=resolve_backend("fxopt"), options=options)(x).float()
    told = [text for j in explained.graphs for topic, text in j.notes if topic == "precision"]
    assert len(told) == 8 and all(": fp8" in text for text in told), told
    assert 0.002 < float((got - exact).norm() / exact.norm()) < 0.1
