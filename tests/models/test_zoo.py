"""A slice of the zoo, and of that one for every commit; `python -m tests.models.zoo --all` runs all of it."""

from __future__ import annotations

import re

import pytest

from tests.models.zoo import run_case

CASES = (
    "transformer/train",
    "transformer-encoder/dynamic",
    "lstm-gru/train",
    "unet/train",
    "efficientnet-blocks/freeze",
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

EVERY_TIME = frozenset(
    {
        "unet/train",
        "efficientnet-blocks/freeze",
        "diffusion-block/train-autocast",
        "moe/train",
        "deberta-v2/no_grad",
        "gpt2/dynamic",
        "llama-gqa/train-autocast",
        "gemma2/freeze",
        "t5/train",
        "vit/freeze",
        "convnext/train",
        "mamba/no_grad",
    }
)
"""Those that CI runs: each mode, and each kind of layer."""

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


@pytest.mark.parametrize("case", [c if c in EVERY_TIME else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_model_is_right_and_generated(case: str) -> None:
    name, mode = case.split("/")
    record = run_case(name, mode)
    assert record.status == "right", record.why
    assert record.graphs and record.kernels
    assert {operator(what) for what, _ in record.retreats} <= LEFT_TO_TORCH, record.retreats
