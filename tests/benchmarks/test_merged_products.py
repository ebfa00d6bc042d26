"""The benchmark of merged products: its layers are what it says, and what its file has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import merged_products
from benchmarks.merged_products import Case, Encoder, Llama, measured
from fxopt.report.contenders import pick


@pytest.mark.parametrize("layer", [Encoder(32, 2, 48, True), Encoder(32, 2, 48, False), Llama(32, 4, 2, 48)])
def test_the_file_has_times_and_errors_of_each_contender(
    layer: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_products, "CONTENDERS", tuple(pick("eager")))
    found = measured(Case("small", lambda: layer, (2, 7, 32)), torch.device("cpu"), torch.bfloat16, 0.01)
    entry = json.loads(json.dumps(found))["contenders"]["eager"]
    assert entry["seconds"] > 0 and 0 < entry["error over allowed"] < 1
