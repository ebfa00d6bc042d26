"""The attention that transformers writes out (attn_implementation="eager") is found in tiny models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.passes.hand_attention import written
from tests.numerics import assert_closer, to_float64
from tests.passes.test_hand_attention import compiled

transformers = pytest.importorskip("transformers")
EAGER = {"attn_implementation": "eager"}
TOKENS = torch.arange(32).reshape(2, 16)
PADDING = torch.ones(2, 16, dtype=torch.int64)
PADDING[1, 9:] = 0


def bert() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    return transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes, **EAGER))


def gpt2() -> Any:
    return transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, **EAGER)
    )


def llama() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=99, intermediate_size=37, **sizes, **EAGER))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    return transformers.T5Model(transformers.T5Config(vocab_size=99, **sizes, **EAGER))


def swin() -> Any:
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    return transformers.SwinModel(transformers.SwinConfig(**sizes, **EAGER))


PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], int, int]] = {
    "bert": (bert, {"input_ids": TOKENS}, 2, 2),
    "bert, padded": (bert, {"input_ids": TOKENS, "attention_mask": PADDING}, 2, 0),
    "gpt2": (gpt2, {"input_ids": TOKENS}, 2, 2),
    "gpt2, padded": (gpt2, {"input_ids": TOKENS, "attention_mask": PADDING}, 2, 0),
    "llama": (llama, {"input_ids": TOKENS}, 2, 2),
    "t5": (t5, {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :7]}, 6, 2),
    "swin": (swin, {"pixel_values": PIXELS}, 4, 0),
}
"""Name -> the model, its arguments, attentions fused in inference, and in a graph with gradients: fewer of those, since a
bias that learns stays, as does an added mask that may hide whole rows."""


def outputs(model: Any, given: dict[str, Any]) -> Any:
    return model(**given, use_cache=False)[0] if "input_ids" in given else model(**given)[0]


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "MIN_CPU_SCORES", 0)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    torch.manual_seed(0)
    make, given, in_inference, with_gradients = MODELS[name]
    model = make().eval()
    exact = outputs(to_float64(model), to_float64(given))
    for grad_mode, expected in ((False, in_inference), (True, with_gradients)):
        with torch.set_grad_enabled(grad_mode):
            result, count, reasons = compiled(lambda given: outputs(model, given), given)
            assert count == expected, reasons
            assert_closer(result.detach(), outputs(model, given).detach(), exact.detach())
