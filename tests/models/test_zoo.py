"""A slice of the zoo for every commit, and the committed summary of all of it (`python -m tests.models.zoo --all`)."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.models.zoo import COMMITTED, MODELS, modes, run_case

CASES = (
    "transformer/train",
    "transformer-encoder/dynamic",
    "lstm-gru/train",
    "unet/train",
    "efficientnet-blocks/freeze",
    "shuffle-dense/train-dynamic",
    "wavenet/no_grad",
    "vae/train",
    "gan/train",
    "mlp-mixer/eval",
    "nerf/train",
    "gcn/train",
    "dlrm/no_grad",
    "scan/train",
    "moe/train",
    "diffusion-block/train-autocast",
    "pointnet/train",
    "contrastive/train",
    "bert-token-classification/train",
    "deberta-v2/no_grad",
    "gpt2/dynamic",
    "llama-gqa/train-autocast",
    "mistral-sliding/no_grad",
    "mixtral/train",
    "gemma2/freeze",
    "mamba/no_grad",
    "t5/train",
    "whisper/no_grad",
    "wav2vec2/no_grad",
    "vit/freeze",
    "swin/no_grad",
    "convnext/train",
    "resnet/train",
    "clip/no_grad",
    "segformer/train",
)

LEFT_TO_TORCH = frozenset(
    {
        "_assert_async",
        "_cdist_backward",
        "_cdist_forward",
        "_embedding_bag",
        "_embedding_bag_backward",
        "_embedding_bag_dense_backward",
        "_embedding_bag_per_sample_weights_backward",
        "randn_like",
        "scatter_reduce",
        "sort",
        "topk",
        "tril_indices",
    }
)
"""Ops that run as ATen calls in models of CASES: sorting, sparse tables, checks, eager's own random bits."""


def operator(what: str) -> str:
    """The ATen op in a retreat's `what`: "topk_1 (aten.topk.default)" is topk."""
    found = re.search(r"\(aten\.(\w+)\.", what)
    return found[1] if found else what


@pytest.mark.parametrize("case", CASES)
def test_model_is_right_and_generated(case: str) -> None:
    name, mode = case.split("/")
    record = run_case(name, mode)
    assert record.status == "right", record.why
    assert record.graphs and record.kernels
    assert {operator(what) for what, _ in record.retreats} <= LEFT_TO_TORCH, record.retreats


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(COMMITTED.read_text())


def test_the_summary_is_complete_and_right(committed: dict[str, Any]) -> None:
    assert committed.keys() == {f"{name}/{mode}" for name in MODELS for mode in modes(name)}
    assert not {case: record["why"] for case, record in committed.items() if record["status"] != "right"}


def test_no_graph_of_the_summary_ran_as_a_whole_without_kernels(committed: dict[str, Any]) -> None:
    whole = [case for case, record in committed.items() if any("the whole" in what for what, _ in record["retreats"])]
    assert not whole
    assert all(record["graphs"] and record["kernels"] for record in committed.values())
