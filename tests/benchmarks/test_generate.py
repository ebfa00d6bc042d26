"""transformers' `generate` with fxopt as the backend of its decoding step, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from benchmarks import generate
from benchmarks.generate import LLAMA_1B, agreement, gap, sharing
from benchmarks.models import llama

pytest.importorskip("transformers")


def test_the_model_has_1_2_billion_parameters() -> None:
    with torch.device("meta"):
        model = llama(LLAMA_1B)
    assert sum(p.numel() for p in model.parameters()) == 1_235_814_400


def test_one_decoding_step_is_compiled_once_and_writes_what_eager_writes(tmp_path: Path) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(generate.main)
    out = tmp_path / "g.json"
    arguments = ["--tiny", "--device", "cpu", "--dtype", "float32", "--prompt", "5", "--tokens", "9", "--rounds", "2"]
    result = CliRunner().invoke(app, [*arguments, "--ways", "eager,eager-static,fxopt", "--out", str(out)])
    assert result.exit_code == 0, result.output
    eager, static, own = json.loads(out.read_text())["ways"]
    assert [way["tokens_as_first_way"] for way in (eager, static, own)] == [9, 9, 9]
    assert [way["graphs"] for way in (eager, static, own)] == [0, 0, 1]
    assert own["later_graphs"] == 0 and own["fxopt_kernels"] > 0 and own["repeatable"]
    assert len(own["seconds"]) == 2 and own["tokens_per_second"] > 0
    assert max(way["gap"] for way in (eager, static, own)) < 1e-5


def test_unknown_ways_are_refused() -> None:
    app = typer.Typer()
    app.command()(generate.main)
    result = CliRunner().invoke(app, ["--device", "cpu", "--ways", "eager,tensorrt"])
    assert result.exit_code != 0
    assert "fxopt-reduce-overhead" in result.output


def test_copies_share_parameters_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    twin = sharing(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert twin[0] is not model[0]


class _Judge(nn.Module):
    """Likes the word that is one larger than the last; all others fall short by 2."""

    def forward(self, written: torch.Tensor) -> object:
        logits = 2.0 * nn.functional.one_hot((written + 1) % 8, 8)
        return type("Output", (), {"logits": logits})


def test_a_wrong_choice_has_a_gap() -> None:
    assert gap(_Judge(), torch.tensor([[5, 1, 2, 3]]), 2) == 0.0
    assert gap(_Judge(), torch.tensor([[5, 1, 2, 7]]), 2) == 2.0
    assert gap(_Judge(), torch.tensor([[5, 1, 2, 3]]), 1) == 2.0


def test_texts_agree_until_they_part() -> None:
    assert agreement(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 9, 4]])) == 2
    assert agreement(torch.tensor([[1, 2]]), torch.tensor([[1, 2]])) == 2
