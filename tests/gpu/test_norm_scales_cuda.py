"""Norms as factors of rows on a GPU: every way is as close to float64 as eager, with frozen weights and without a weight."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxopt.ir.region import Alternatives, Step
from fxopt.lower import Lowered, norm_scales
from fxopt.lower.norm_scales import SCALED, STORED, SUMMED, Fold
from tests.numerics import assert_closer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_cache")]
ROWS, WIDTH = 2100, 512
"""No tile divides the rows."""


class Layers(nn.Module):
    """A residual sum with a product, and two products of its norm: with a gelu, and plain."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.before = nn.Linear(256, WIDTH, bias=False)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6, elementwise_affine=affine)
        self.up, self.other = nn.Linear(WIDTH, 1024), nn.Linear(WIDTH, 384, bias=False)
        if affine:
            nn.init.uniform_(self.norm.weight, 0.1, 4.0)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        total = residual + self.before(x)
        normed = self.norm(total)
        return total, F.gelu(self.up(normed)), self.other(normed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("wanted", [STORED, SCALED, SUMMED])
def test_every_way_has_eagers_values(wanted: str, affine: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = norm_scales.with_norm_scales, []

    def only(step: Step) -> Step:
        if not isinstance(step, Alternatives) or step.kind != norm_scales.NAME:
            return step
        way = [way for way in step.ways if way.label.startswith(wanted)][-1]
        seen.append(way.label)
        return replace(step, ways=(way,))

    def with_one_way(lowered: Lowered, every: bool = False) -> tuple[Lowered, dict[str, Fold]]:
        both, folds = found(lowered, every)
        return replace(both, steps=[only(step) for step in both.steps]), folds

    monkeypatch.setattr(norm_scales, "with_norm_scales", with_one_way)
    torch.manual_seed(0)
    layers = Layers(affine).cuda().to(dtype).requires_grad_(False)
    x, residual = (torch.randn(ROWS, n, device="cuda", dtype=dtype) for n in (256, WIDTH))
    residual[:, 7] *= 100
    run = torch.compile(layers, backend="fxopt", options={"freeze": True, "strict": True})
    got, eager = run(x, residual), layers(x, residual)
    assert_closer(got, eager, copy.deepcopy(layers).double()(x.double(), residual.double()))
    assert seen and all(label.startswith(wanted) for label in seen)
