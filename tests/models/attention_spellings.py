"""Which attentions of transformers' models become one fused op: `python -m tests.models.attention_spellings [--json FILE]`.

Tiny models with random weights in bfloat16 and `attn_implementation="eager"`, as on a GPU, in inference and in training
with dropout. What is counted are the calls in the graphs that the passes before autograd leave: fused ones, those of ops of
ours, and softmaxes that stay, with what the passes say about them. Values are for tests/passes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxopt.ir.scored_attention_op import scored_attention
from fxopt.journal import Journal
from fxopt.options import Options
from fxopt.passes import run_early
from fxopt.passes.hand_attention import scored, written
from fxopt.passes.hand_attention.score_chain import SOFTMAX

RESULTS = Path(__file__).with_name("attention_spellings.json")

TOKENS = torch.arange(48).reshape(2, 24)
PADDED = {"input_ids": TOKENS, "attention_mask": torch.ones(2, 24, dtype=torch.int64).index_fill(1, torch.arange(20, 24), 0)}
TEXT = {"input_ids": TOKENS}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
PAIR = {**TEXT, "decoder_input_ids": TOKENS[:, :20]}

_BERT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
_VISION = {"image_size": 32, "patch_size": 8, **{k: v for k, v in _BERT.items() if k != "vocab_size"}}
_T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
_BART = {
    "vocab_size": 99,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "attention_dropout": 0.1,
}


@dataclass(frozen=True)
class Spelling:
    """transformers' classes `<name>Model` and `<name>Config`, sizes, and inputs."""

    name: str
    sizes: dict[str, Any]
    inputs: dict[str, Tensor] = field(default_factory=lambda: TEXT)

    def model(self) -> Any:
        import transformers

        config = getattr(transformers, f"{self.name}Config")(**self.sizes, attn_implementation="eager")
        torch.manual_seed(0)
        return getattr(transformers, f"{self.name}Model")(config).to(torch.bfloat16)


_MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
_WHISPER = {**_BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 48, "pad_token_id": 0}
_ALIBI = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2], "num_heads": [2], "window_size": 4}
_CLIP = {"projection_dim": 16, "text_config": _BERT, "vision_config": _VISION}

SPELLINGS: dict[str, Spelling] = {
    "BERT": Spelling("Bert", _BERT),
    "BERT, padded": Spelling("Bert", _BERT, PADDED),
    "DistilBERT": Spelling("DistilBert", {"vocab_size": 99, "dim": 64, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}),
    "GPT-2": Spelling("GPT2", {"vocab_size": 99, "n_embd": 64, "n_layer": 1, "n_head": 4}),
    "GPT-2, padded": Spelling("GPT2", {"vocab_size": 99, "n_embd": 64, "n_layer": 1, "n_head": 4}, PADDED),
    "GPT-NeoX": Spelling("GPTNeoX", _BERT | {"attention_dropout": 0.1}),
    "GPT-J": Spelling(
        "GPTJ", {"vocab_size": 99, "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "attn_pdrop": 0.1}
    ),
    "T5": Spelling("T5", _T5, PAIR),
    "BLOOM": Spelling("Bloom", {"vocab_size": 99, "hidden_size": 64, "n_layer": 1, "n_head": 4, "attention_dropout": 0.1}),
    "Falcon, ALiBi": Spelling("Falcon", _ALIBI),
    "MPT": Spelling("Mpt", {"vocab_size": 99, "d_model": 64, "n_layers": 1, "n_heads": 4}),
    "Llama": Spelling("Llama", _LLAMA),
    "Llama, padded": Spelling("Llama", _LLAMA, PADDED),
    "Mistral, window": Spelling("Mistral", _LLAMA | {"sliding_window": 8}),
    "Mixtral": Spelling("Mixtral", _LLAMA | _MOE),
    "Gemma 2": Spelling("Gemma2", _LLAMA | {"sliding_window": 8, "num_hidden_layers": 2}),
    "Qwen 3": Spelling("Qwen3", _LLAMA),
    "Phi": Spelling("Phi", _LLAMA | {"attention_dropout": 0.1}),
    "OPT": Spelling("OPT", _BERT | {"ffn_dim": 64, "word_embed_proj_dim": 64, "attention_dropout": 0.1}),
    "BART": Spelling("Bart", _BART, PAIR),
    "Whisper": Spelling(
        "Whisper",
        _WHISPER,
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 40).reshape(2, 8, 40), "decoder_input_ids": TOKENS},
    ),
    "ViT": Spelling("ViT", _VISION | {"attention_probs_dropout_prob": 0.1}, PIXELS),
    "BEiT": Spelling("Beit", _VISION | {"use_relative_position_bias": True}, PIXELS),
    "Swin": Spelling("Swin", _SWIN | {"attention_probs_dropout_prob": 0.1}, PIXELS),
    "Swin 2": Spelling("Swinv2", _SWIN | {"attention_probs_dropout_prob": 0.1}, PIXELS),
    "CLIP": Spelling("CLIP", _CLIP, {**TEXT, **PIXELS}),
    "DeBERTa": Spelling(
        "DebertaV2",
        _BERT
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "position_buckets": 8,
            "max_relative_positions": 16,
        },
    ),
    "MPNet": Spelling("MPNet", _BERT),
}
"""Name -> the model."""


@dataclass(frozen=True)
class Found:
    """In one mode: calls of `scaled_dot_product_attention`, of `fxopt::scored_attention`, softmaxes left, and why."""

    fused: int
    scored: int
    left: int
    reasons: tuple[str, ...]


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The passes' decisions are those for a GPU, as far as they depend on the device."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(written, "MIN_CPU_SCORES", 0))
        for module in (written, scored):
            stack.enter_context(mock.patch.object(module, "chooses_late", return_value=True))
        yield


def find(spelling: Spelling, trains: bool) -> Found:
    """What the passes before autograd make of the model's attentions."""
    model = spelling.model().train(trains)
    given = {n: x.bfloat16() if x.is_floating_point() else x for n, x in spelling.inputs.items()}
    graphs: list[fx.GraphModule] = []
    journal = Journal("spellings")

    def early(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        run_early(gm, Options(), journal)
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    with as_on_a_gpu(), torch.set_grad_enabled(trains):
        torch.compile(model, backend=early, dynamic=False)(**given)
    targets = [n.target for gm in graphs for n in gm.graph.nodes]
    reasons = [
        text.partition(": ")[2] for topic, text in journal.notes if topic == "rejected" and text.startswith("hand_attention")
    ]
    left = sum(t in SOFTMAX or t == "softmax" for t in targets)
    return Found(targets.count(F.scaled_dot_product_attention), targets.count(scored_attention), left, tuple(reasons))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="models whose names begin so")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    table: dict[str, dict[str, Any]] = {}
    for name, spelling in SPELLINGS.items():
        if not name.startswith(given.only):
            continue
        table[name] = {}
        for mode in ("inference", "training"):
            try:
                table[name][mode] = asdict(find(spelling, mode == "training"))
            except Exception as error:
                table[name][mode] = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(f"{name:18} {mode:10} {table[name][mode]}", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
