"""Models of transformers with tiny configurations and random weights: nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from tests.models.judge import Problem

tf.logging.set_verbosity_error()  # token numbers beyond these vocabularies are not used

WORDS = 64
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
"""Sizes under the names that most configurations have; those with other names get them as aliases."""
DECODER = {**TEXT, "num_key_value_heads": 2, "attention_dropout": 0.0, "use_cache": False, "pad_token_id": 0}
SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

EVERY_CONFIG_HAS = ("num_labels", "decoder_start_token_id")


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padding(batch: int, length: int) -> Tensor:
    """An attention mask whose last row ends in padding."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - length // 4 :] = 0
    return mask


def text(model: str, labels: str = "", masked: bool = True, **settings: Any) -> Callable[[], Problem]:
    """`model` is the class's name; `labels`: "" for none, "tokens" for one a token, "classes", "sequence" or "spans"."""

    def inputs(batch: int, length: int) -> dict[str, Any]:
        ids = tokens(batch, length)
        given: dict[str, Any] = {"input_ids": ids}
        if masked:
            given["attention_mask"] = padding(batch, length)
        if labels == "tokens":
            given["labels"] = torch.where(ids % 5 == 0, -100, ids)
        elif labels == "classes":
            given["labels"] = ids % 3
        elif labels == "sequence":
            given["labels"] = ids[:, 0] % 3
        elif labels == "spans":
            given |= {"start_positions": ids[:, 0] % length, "end_positions": ids[:, 1] % length}
        return given

    return lambda: Problem(build(model, {**TEXT, "num_labels": 3, **settings}), inputs(2, 12), (inputs(3, 19),))


def decoder(model: str, **settings: Any) -> Callable[[], Problem]:
    return text(model, "tokens", **{**DECODER, **settings})


def translator(model: str, **settings: Any) -> Callable[[], Problem]:
    def inputs(length: int) -> dict[str, Any]:
        return {"input_ids": tokens(2, length), "attention_mask": padding(2, length), "labels": tokens(2, length - 2, 1)}

    return lambda: Problem(build(model, {**SEQ2SEQ, **settings}), inputs(12), (inputs(17),))


def image(model: str, size: int = 32, channels: int = 3, labels: bool = True, **settings: Any) -> Callable[[], Problem]:
    def inputs() -> dict[str, Any]:
        given: dict[str, Any] = {"pixel_values": values(2, channels, size, size)}
        return {**given, "labels": torch.tensor([1, 2])} if labels else given

    common = {**TEXT, "image_size": size, "patch_size": 8, "num_channels": channels, "num_labels": 3}
    if "num_heads" in settings:  # the same thing under another name
        del common["num_attention_heads"]
    return lambda: Problem(build(model, {**common, "drop_path_rate": 0.0, **settings}), inputs())


def build(model: str, settings: dict[str, Any]) -> nn.Module:
    """The model called `model` with as much of `settings` as its configuration knows."""
    torch.manual_seed(0)
    made = getattr(tf, model)
    config = made.config_class(**known(made.config_class, settings))
    config._attn_implementation = settings.get("attention", "sdpa" if getattr(made, "_supports_sdpa", False) else "eager")
    config._experts_implementation = settings.get("experts", "eager")
    module = made(config)
    _off_the_beaten_path(module)
    return module.eval()


def known(config_class: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of `settings` that the configuration has, so that what is left out are only sizes other families use."""
    fields = {*inspect.signature(config_class).parameters, *config_class.attribute_map, *EVERY_CONFIG_HAS}
    return {k: v for k, v in settings.items() if k in fields}


def _off_the_beaten_path(module: nn.Module) -> None:
    """Larger weights than an initializer's 0.02, and biases and norms that are not trivial, or mistakes would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.1 * noise)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def whisper() -> Problem:
    sizes = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 20}
    model = build("WhisperForConditionalGeneration", {**SEQ2SEQ, **sizes})
    return Problem(model, {"input_features": values(2, 8, 32), "labels": tokens(2, 9)})


def wav2vec2(model: str, **settings: Any) -> Callable[[], Problem]:
    sizes = {
        "conv_dim": (16, 16),
        "conv_stride": (5, 4),
        "conv_kernel": (10, 4),
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
    }

    def make() -> Problem:
        module = build(model, {**TEXT, **sizes, **settings})
        return Problem(module, {"input_values": values(2, 400), "attention_mask": padding(2, 400)})

    return make


def clip(model: str) -> Callable[[], Problem]:
    def make() -> Problem:
        vision = {"image_size": 16, "patch_size": 8, "num_channels": 3}
        sizes = {**TEXT, "eos_token_id": 2, "projection_dim": 16}
        made = getattr(tf, model)
        torch.manual_seed(0)
        config = made.config_class(text_config=sizes, vision_config={**sizes, **vision}, projection_dim=16)
        module = made(config).eval()
        _off_the_beaten_path(module)
        given = {"input_ids": tokens(3, 7), "pixel_values": values(3, 3, 16, 16), "return_loss": True}
        return Problem(module, given)

    return make


def detr() -> Problem:
    backbone = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    config = tf.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_queries=5,
        **{k: v for k, v in SEQ2SEQ.items() if not k.endswith("token_id") and k not in ("vocab_size", "use_cache")},
    )  # fmt: skip
    torch.manual_seed(0)
    module = tf.DetrForObjectDetection(config).eval()
    _off_the_beaten_path(module)
    return Problem(module, {"pixel_values": values(1, 3, 48, 48), "pixel_mask": torch.ones(1, 48, 48, dtype=torch.int64)})


ALBERT = {"embedding_size": 16, "num_hidden_groups": 1}
BART = {"scale_embedding": True, "classifier_dropout": 0.0}
T5 = {
    "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "dropout_rate": 0.0,
}  # fmt: skip
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "final_logit_softcapping": 5.0,
         "attn_logit_softcapping": 5.0, "attention": "eager"}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
STAGES = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4}

TEXT_MODELS: dict[str, Callable[[], Problem]] = {
    "bert": text("BertModel"),
    "bert-eager-attention": text("BertModel", attention="eager"),
    "bert-token-classification": text("BertForTokenClassification", "classes"),
    "bert-question-answering": text("BertForQuestionAnswering", "spans", num_labels=2),
    "bert-masked-lm": text("BertForMaskedLM", "tokens"),
    "bert-relative-keys": text("BertModel", position_embedding_type="relative_key_query", attention="eager"),
    "distilbert": text("DistilBertForSequenceClassification", "sequence", dim=32, hidden_dim=48, n_layers=2, n_heads=4,
                       dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0),
    "roberta": text("RobertaForSequenceClassification", "sequence"),
    "electra": text("ElectraForPreTraining", embedding_size=16),
    "albert": text("AlbertForMaskedLM", "tokens", **ALBERT),
    "deberta-v2": text("DebertaV2Model", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
                       norm_rel_ebd="layer_norm", share_att_key=True),
    "mpnet": text("MPNetModel"),
    "convbert": text("ConvBertModel", embedding_size=16, conv_kernel_size=3, head_ratio=2),
    "squeezebert": text("SqueezeBertModel", embedding_size=32),
    "fnet": text("FNetModel", masked=False),
    "roformer": text("RoFormerModel", embedding_size=16),
    "esm": text("EsmModel", position_embedding_type="rotary", pad_token_id=0),
    "xlnet": text("XLNetModel", d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0),
    "gpt2": decoder("GPT2LMHeadModel", **GPT),
    "gptj": decoder("GPTJForCausalLM", **GPT, rotary_dim=4),
    "gpt-neox": decoder("GPTNeoXForCausalLM"),
    "codegen": decoder("CodeGenForCausalLM", **GPT, n_ctx=64, rotary_dim=4),
    "opt": decoder("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=16, dropout=0.0),
    "bloom": decoder("BloomForCausalLM", n_layer=2, n_head=4),
    "llama-gqa": decoder("LlamaForCausalLM"),
    "llama-eager-attention": decoder("LlamaForCausalLM", attention="eager"),
    "mistral-sliding": decoder("MistralForCausalLM", sliding_window=4),
    "mixtral": decoder("MixtralForCausalLM", **EXPERTS, output_router_logits=True, experts="batched_mm"),
    "qwen2": decoder("Qwen2ForCausalLM"),
    "qwen3": decoder("Qwen3ForCausalLM", head_dim=8),
    "qwen3-moe": decoder("Qwen3MoeForCausalLM", **EXPERTS, head_dim=8),
    "gemma2": decoder("Gemma2ForCausalLM", **GEMMA),
    "phi": decoder("PhiForCausalLM", resid_pdrop=0.0),
    "phi3": decoder("Phi3ForCausalLM", resid_pdrop=0.0),
    "falcon": decoder("FalconForCausalLM", alibi=False, new_decoder_architecture=False),
    "falcon-alibi": decoder("FalconForCausalLM", alibi=True),
    "cohere": decoder("CohereForCausalLM"),
    "olmo2": decoder("Olmo2ForCausalLM"),
    "stablelm": decoder("StableLmForCausalLM"),
    "starcoder2": decoder("Starcoder2ForCausalLM", residual_dropout=0.0, embedding_dropout=0.0),
    "mamba": decoder("MambaForCausalLM", state_size=4, conv_kernel=3, expand=2, masked=False),
    "mamba2": decoder("Mamba2ForCausalLM", state_size=4, conv_kernel=3, expand=2, num_heads=8, head_dim=8, n_groups=2,
                      chunk_size=4, masked=False),
    "rwkv": decoder("RwkvForCausalLM", context_length=64, masked=False),
    "recurrent-gemma": decoder("RecurrentGemmaForCausalLM", lru_width=32, attention_window_size=8, head_dim=8,
                               block_types=["recurrent", "attention"]),
    "t5": translator("T5ForConditionalGeneration", **T5),
    "t5-gated": translator("T5ForConditionalGeneration", **T5, feed_forward_proj="gated-gelu"),
    "bart": translator("BartForConditionalGeneration", **BART),
    "pegasus": translator("PegasusForConditionalGeneration"),
    "marian": translator("MarianMTModel"),
    "m2m100": translator("M2M100ForConditionalGeneration", encoder_layerdrop=0.0, decoder_layerdrop=0.0),
}  # fmt: skip

OTHER_MODELS: dict[str, Callable[[], Problem]] = {
    "whisper": whisper,
    "wav2vec2": wav2vec2("Wav2Vec2Model"),
    "hubert": wav2vec2("HubertModel"),
    "wavlm": wav2vec2("WavLMModel", num_buckets=8, max_bucket_distance=16),
    "ast": lambda: Problem(
        build("ASTForAudioClassification", {**TEXT, "patch_size": 4, "num_mel_bins": 8, "max_length": 16, "num_labels": 3,
                                            "frequency_stride": 4, "time_stride": 4}),
        {"input_values": values(2, 16, 8), "labels": torch.tensor([0, 2])}),
    "vit": image("ViTForImageClassification"),
    "deit": image("DeiTForImageClassification"),
    "beit": image("BeitForImageClassification", use_relative_position_bias=True),
    "dinov2": image("Dinov2ForImageClassification", mlp_ratio=2),
    "swin": image("SwinForImageClassification", **STAGES),
    "swinv2": image("Swinv2ForImageClassification", **STAGES),
    "convnext": image("ConvNextForImageClassification", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4),
    "convnextv2": image("ConvNextV2ForImageClassification", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4),
    "resnet": image("ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "regnet": image("RegNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4),
    "mobilenet-v2": image("MobileNetV2ForImageClassification", depth_multiplier=0.35, classifier_dropout_prob=0.0),
    "poolformer": image("PoolFormerForImageClassification", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    "segformer": image("SegformerForImageClassification", depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1],
                       hidden_sizes=[8, 16], num_attention_heads=[1, 2], patch_sizes=[3, 3], strides=[2, 2],
                       mlp_ratios=[2, 2], classifier_dropout_prob=0.0),
    "mobilevit": image("MobileViTForImageClassification", hidden_sizes=[12, 16, 20],
                       neck_hidden_sizes=[4, 6, 8, 8, 10, 12, 16], patch_size=2, output_stride=8, size=64),
    "efficientnet": image("EfficientNetForImageClassification", depth_coefficient=0.2, width_coefficient=0.2, hidden_dim=256,
                          dropout_rate=0.0, drop_connect_rate=0.0),
    "clip": clip("CLIPModel"),
    "siglip": clip("SiglipModel"),
    "detr": detr,
    "patchtst": lambda: Problem(
        build("PatchTSTForPrediction", {"d_model": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "ffn_dim": 24,
                                        "context_length": 24, "patch_length": 4, "patch_stride": 4, "prediction_length": 6,
                                        "num_input_channels": 2, "loss": "mse"}),
        {"past_values": values(2, 24, 2), "future_values": values(2, 6, 2, seed=1)}),
}  # fmt: skip
