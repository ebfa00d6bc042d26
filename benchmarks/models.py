"""Model workloads. Architectures come from transformers' configurations with random weights, so nothing is downloaded;
MiniLM alone is the trained model of the demo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.choosing import named
from benchmarks.workload import Build, Sizes, Workload
from fxopt.report import minilm
from fxopt.report.cases import Case


class Picked(nn.Module):
    """A transformers model called with one tensor (and labels, when training); returns one field of its result."""

    def __init__(self, model: nn.Module, argument: str, result: str) -> None:
        super().__init__()
        self.model, self.argument, self.result = model, argument, result
        self.extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def forward(self, value: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        arguments: dict[str, Any] = {self.argument: value, **self.extra}
        if labels is not None:
            arguments["labels"] = labels
        return getattr(self.model(**arguments), self.result)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise minilm.MissingModelError("model workloads need transformers: pip install 'fxopt[bench]'") from error
    return transformers


def _bert(sizes: Sizes) -> nn.Module:
    t, hidden = _transformers(), sizes["hidden"]
    config = t.BertConfig(
        hidden_size=hidden,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=4 * hidden,
        vocab_size=sizes["vocab"],
        hidden_dropout_prob=sizes.get("dropout", 0) / 100,
        attention_probs_dropout_prob=sizes.get("dropout", 0) / 100,
    )
    return t.BertForMaskedLM(config)


def _gpt2(sizes: Sizes) -> nn.Module:
    t, hidden, dropout = _transformers(), sizes["hidden"], sizes.get("dropout", 0) / 100
    config = t.GPT2Config(
        n_embd=hidden,
        n_layer=sizes["layers"],
        n_head=max(1, hidden // 64),
        vocab_size=sizes["vocab"],
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return t.GPT2LMHeadModel(config)


def llama(sizes: Sizes) -> nn.Module:
    """Llama 3.2's proportions: with 2048 features, 16 layers and 128256 words its 1.24 billion parameters."""
    t, hidden = _transformers(), sizes["hidden"]
    config = t.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 256),
        intermediate_size=4 * hidden,
        vocab_size=sizes["vocab"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return t.LlamaForCausalLM(config)


def _resnet(sizes: Sizes) -> nn.Module:
    t, width = _transformers(), sizes["width"]
    config = t.ResNetConfig(
        embedding_size=width, hidden_sizes=[4 * width, 8 * width, 16 * width, 32 * width], num_labels=sizes["classes"]
    )
    return with_statistics(t.ResNetForImageClassification(config))


def with_statistics(model: nn.Module) -> nn.Module:
    """`model` with BatchNorms like a trained network's.

    A fresh one multiplies by 1 / sqrt(1 + eps): the sum of two bfloat16 values after it is a rounding tie in every other
    element, and eps alone decides them all one way as soon as nothing is rounded in between. Errors measured so would be
    those of an accident: 2.4 times eager's with eps, exactly eager's without.
    """
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            size = module.running_mean.shape
            with torch.no_grad(), torch.device("cpu"):
                module.running_mean.copy_(0.1 * torch.randn(size, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(size, generator=generator))
                module.weight.copy_(0.75 + 0.5 * torch.rand(size, generator=generator))
                module.bias.copy_(0.1 * torch.randn(size, generator=generator))
    return model


def _vit(sizes: Sizes) -> nn.Module:
    t, hidden = _transformers(), sizes["hidden"]
    config = t.ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=4 * hidden,
        image_size=sizes["side"],
        num_labels=sizes["classes"],
    )
    return t.ViTForImageClassification(config)


def _convnext(sizes: Sizes) -> nn.Module:
    t, width = _transformers(), sizes["width"]
    config = t.ConvNextConfig(hidden_sizes=[width, 2 * width, 4 * width, 8 * width], num_labels=sizes["classes"])
    return t.ConvNextForImageClassification(config)


def _finish(model: nn.Module, device: torch.device, dtype: torch.dtype, training: bool) -> nn.Module:
    return model.to(device, dtype).train(training)


def _text(make: Callable[[Sizes], nn.Module], training: bool) -> Callable[[Sizes, torch.device, torch.dtype], Case]:
    def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
        torch.manual_seed(0)
        module = Picked(make(sizes), "input_ids", "loss" if training else "logits")
        ids = torch.randint(1, sizes["vocab"], (sizes["batch"], sizes["tokens"])).to(device)
        inputs = (ids, ids.clone()) if training else (ids,)
        return Case(_finish(module, device, dtype, training), inputs, training, random=sizes.get("dropout", 0) > 0)

    return build


def _images(
    make: Callable[[Sizes], nn.Module], training: bool, channels_last: bool = False
) -> Callable[[Sizes, torch.device, torch.dtype], Case]:
    def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
        torch.manual_seed(0)
        module = _finish(Picked(make(sizes), "pixel_values", "loss" if training else "logits"), device, dtype, training)
        images = torch.randn(sizes["batch"], 3, sizes["side"], sizes["side"]).to(device, dtype)
        if channels_last:
            module, images = module.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
        labels = torch.randint(sizes["classes"], (sizes["batch"],)).to(device)
        return Case(module, (images, labels) if training else (images,), training)

    return build


def _decoding(make: Callable[[Sizes], nn.Module]) -> Build:
    def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
        from benchmarks.decoding import decoding  # needs transformers

        return decoding(make)(sizes, device, dtype)

    return build


def _build_minilm(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    encoder, tokenizer = minilm.load(device, dtype)
    texts = (minilm.sentences() * (sizes["batch"] // 16 + 1))[: sizes["batch"]]
    return Case(encoder, minilm.encode(tokenizer, texts, device, sizes["tokens"]))


_BASE = {"hidden": 768, "layers": 12}
_SMALL = {"hidden": 64, "layers": 2, "vocab": 97, "batch": 2, "tokens": 10}
_BERT = {**_BASE, "vocab": 30522, "batch": 32, "tokens": 128}
_GPT2 = {**_BASE, "vocab": 50257, "batch": 8, "tokens": 512}
_LLAMA = {"hidden": 2048, "layers": 16, "vocab": 128256, "batch": 1, "tokens": 2048}
_STEP = {"batch": 1, "tokens": 1, "cached": 1024}
_SMALL_STEP = {**_SMALL, "batch": 1, "tokens": 1, "cached": 16}
_RESNET = ({"width": 64, "classes": 1000, "batch": 64, "side": 224}, {"width": 8, "classes": 5, "batch": 2, "side": 64})
_VIT = (
    {**_BASE, "classes": 1000, "batch": 64, "side": 224},
    {"hidden": 64, "layers": 2, "classes": 5, "batch": 2, "side": 32},
)
_CONVNEXT = ({"width": 96, "classes": 1000, "batch": 32, "side": 224}, {"width": 16, "classes": 5, "batch": 2, "side": 64})
_TEXT = {"batch": (1, 16), "tokens": (5, 384)}
_IMAGE = {"batch": (1, 48)}


def _pair(
    name: str, family: Callable[..., Any], make: Any, full: Sizes, tiny: Sizes, ranges: Any, **more: Any
) -> list[Workload]:
    """Inference at the given batch and at batch 1, and the training step."""
    one = {**full, "batch": 1}
    return [
        Workload(name, "model", family(make, False, **more), full, tiny, ranges),
        Workload(f"{name}-b1", "model", family(make, False, **more), one, {**tiny, "batch": 1}),
        Workload(f"{name}-train", "model", family(make, True, **more), full, tiny, ranges, training=True),
    ]


def _half(*workloads: Workload) -> list[Workload]:
    return [replace(workload, dtype="float16") for workload in workloads]


MODELS = (
    Workload("minilm", "model", _build_minilm, {"batch": 16, "tokens": 64}, {"batch": 2, "tokens": 8}, _TEXT),
    *_pair("bert-base", _text, _bert, _BERT, _SMALL, _TEXT),
    *_pair("gpt2", _text, _gpt2, _GPT2, _SMALL, _TEXT),
    *_pair("resnet50", _images, _resnet, *_RESNET, _IMAGE, channels_last=True),
    *_pair("resnet50-nchw", _images, _resnet, *_RESNET, _IMAGE),
    *_pair("vit-b", _images, _vit, *_VIT, _IMAGE),
    *_pair("convnext-t", _images, _convnext, *_CONVNEXT, _IMAGE, channels_last=True),
    *_pair("convnext-t-nchw", _images, _convnext, *_CONVNEXT, _IMAGE),
    *_half(*_pair("resnet50-fp16", _images, _resnet, *_RESNET, _IMAGE, channels_last=True)[:2]),
    Workload("llama-1b", "model", _text(llama, False), _LLAMA, _SMALL, {"tokens": (5, 2048)}),
    Workload("gpt2-decode", "model", _decoding(_gpt2), {**_GPT2, **_STEP}, _SMALL_STEP),
    Workload("llama-1b-decode", "model", _decoding(llama), {**_LLAMA, **_STEP}, _SMALL_STEP),
    Workload(
        "bert-base-train-dropout",
        "model",
        _text(_bert, True),
        {**_BERT, "dropout": 10},
        {**_SMALL, "dropout": 10},
        training=True,
    ),
    Workload(
        "gpt2-train-dropout", "model", _text(_gpt2, True), {**_GPT2, "dropout": 10}, {**_SMALL, "dropout": 10}, training=True
    ),
)

END_TO_END = (
    *("resnet50-fp16-b1", "resnet50-fp16", "vit-b-b1", "vit-b", "convnext-t", "bert-base-b1", "bert-base", "gpt2"),
    *("gpt2-decode", "llama-1b", "llama-1b-decode"),
    *("bert-base-train", "gpt2-train", "vit-b-train", "resnet50-train"),
)
"""Inference at small and large batches, decoding steps and training steps by which whole graphs are judged."""


def choose(names: str) -> list[Workload]:
    """Models by comma-separated names. Raises UnknownName, with all names, for another."""
    return named(names, {w.name: w for w in MODELS}, "workload")
