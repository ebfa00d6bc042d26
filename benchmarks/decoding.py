"""One decoding step of a language model with a static cache, as a case that can be called again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from benchmarks.workload import Build, Sizes
from fxopt.report.cases import Case


class StandingLayer(StaticLayer):
    """A static cache of `cached` places that stays in the middle: every call writes the same place."""

    def __init__(self, cached: int, keys: Tensor, values: Tensor) -> None:
        super().__init__(cached)
        self.lazy_initialization(keys, values)
        self.keys.copy_(keys)
        self.values.copy_(values)
        self.cumulative_length.fill_(cached // 2)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        place = torch.arange(key_states.shape[-2], device=self.device) + self.cumulative_length
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        return self.keys, self.values


class DecodingStep(nn.Module):
    """`model` on the next token [batch, 1]: logits [batch, 1, words]. Half of the cache's places are in use."""

    def __init__(self, model: Any, batch: int, cached: int) -> None:
        super().__init__()
        self.model, config = model, model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (batch, heads, cached, config.hidden_size // config.num_attention_heads)
        layers = [StandingLayer(cached, torch.randn(shape), torch.randn(shape)) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers)

    def forward(self, token: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=token, past_key_values=self.cache, use_cache=True).logits
        return logits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts the cache too, which is no module."""
        super()._apply(fn, recurse)
        for layer in self.cache.layers:
            for name in ("keys", "values", "cumulative_length"):
                setattr(layer, name, fn(getattr(layer, name)))
                torch._dynamo.mark_static_address(getattr(layer, name))  # as transformers does, for CUDA graphs
            layer.device, layer.dtype = layer.keys.device, layer.keys.dtype
        return self


def decoding(make: Callable[[Sizes], nn.Module]) -> Build:
    """Builds the step of the model that `make` gives, for sizes "batch" and "cached"."""

    def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
        torch.manual_seed(0)
        step = DecodingStep(make(sizes), sizes["batch"], sizes["cached"]).to(device, dtype).eval()
        return Case(step, (torch.randint(1, sizes["vocab"], (sizes["batch"], 1)).to(device),))

    return build
