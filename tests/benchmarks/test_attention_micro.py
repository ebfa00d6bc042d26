"""The benchmark of attention: its masks, and the configurations of fxopt's own kernels that it tries."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.attention_kernels import choose_configs, step_of
from benchmarks.attention_micro import SHAPES, WINDOW, Shape, make_inputs, summarize
from fxopt.ir.attention_backends import Inputs
from fxopt.target import Target

CPU, H100 = torch.device("cpu"), Target.cuda(90)


def test_masks_show_what_they_are_named_after() -> None:
    cache = make_inputs(Shape("x", 2, 4, 1, 8, keys=64, groups=2, mask="cache"), CPU).mask
    causal, window = (make_inputs(Shape("x", 1, 1, 2 * WINDOW, 8, mask=kind), CPU).mask for kind in ("causal", "window"))
    assert cache is not None and cache.shape == (2, 1, 1, 64) and cache.sum(-1).unique().tolist() == [48]
    assert causal is not None and torch.equal(causal[0, 0], torch.ones(2 * WINDOW, 2 * WINDOW, dtype=torch.bool).tril())
    assert window is not None and torch.equal(window, causal & ~causal.roll(WINDOW, -2).tril(-WINDOW))


def test_every_shape_has_several_configurations() -> None:
    for shape in SHAPES:
        if shape.train or shape.dtype == torch.float32:
            continue
        small = make_inputs(Shape("x", 1, 1, 1, 1, dtype=shape.dtype), CPU)
        query, key = (
            torch.empty((), dtype=shape.dtype).expand(shape.batch, n, h, shape.width)
            for n, h in ((shape.heads, shape.rows), (shape.groups or shape.heads, shape.keys or shape.rows))
        )
        x = Inputs(query, key, key, None, small.settings._replace(is_causal=shape.causal))
        found = choose_configs(step_of(x, query), H100, 12)
        assert 6 <= len(found) <= 12 and len({str(c) for c in found}) == len(found), shape.label


def test_the_summary_names_what_is_slower() -> None:
    def entry(case: str, ratio: float) -> dict[str, Any]:
        keys = ("chosen_over_best", "fxopt_over_best", "kernel_over_best", "eager_over_fxopt")
        return {"case": case, **dict.fromkeys(keys, ratio)}

    found = summarize([entry("a", 1.0), entry("b", 1.05), entry("c", 1.02)])
    assert found["slower"] == {"b": 1.05} and found["cases"] == 3 and summarize([]) == {}
