"""Greedy decoding for transformers' `generate` in which the device does not wait for the host.

    model.generate(ids, do_sample=False, cache_implementation="static", custom_generate=fxopt.generation.decode)

Between two calls of the compiled model transformers' own loop prepares mask and positions, selects the token and asks
whether that was the last one, in eager mode, and waits for the device at each token: more than half of the time of a
model of a billion parameters. Here a whole step is one compiled function, from the last token to the next one (the cache
knows the positions), and whether every sequence has ended is read while the device computes another token.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.report.backends import resolve_backend, unshared

Step = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor, Tensor]]

_steps: weakref.WeakKeyDictionary[Any, dict[str, Step]] = weakref.WeakKeyDictionary()
_KNOWN = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Any,
    generation_config: Any,
    options: Mapping[str, Any] | None = None,
    **others: Any,
) -> Tensor:
    """What `generate` calls in the place of its own loop: `input_ids` [B, S] with what follows, int64 [B, S + T].

    The tokens are those of transformers' greedy search. What that loop does beyond (sampling, beams, processed scores,
    padded prompts, other caches, more results than tokens) is left to it, with a warning that says why. `options` are the
    backend's. transformers gives streamers to its own loops only.
    """
    reason = _obstacle(model, input_ids, logits_processor, stopping_criteria, generation_config, others)
    if reason is not None:
        warnings.warn(f"transformers' own loop runs: {reason}", stacklevel=2)
        tokens: Tensor = model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **others)
        return tokens
    last = [c.eos_token_id.flatten() for c in stopping_criteria if hasattr(c, "eos_token_id")]
    end = torch.cat([input_ids.new_empty(0), *(tokens.to(input_ids.device) for tokens in last)])
    written = _written(model, input_ids, stopping_criteria.max_length, end, options or {}, others)
    if len(end):
        pad = generation_config.pad_token_id
        written = _ended(written, end, int(end[0]) if pad is None else pad)
    return torch.cat([input_ids, written], 1)


def _written(
    model: Any, input_ids: Tensor, most: int, end: Tensor, options: Mapping[str, Any], others: Mapping[str, Any]
) -> Tensor:
    """Tokens [B, T] after `input_ids`, until there are `most` with these or every sequence has one of `end`, and perhaps one
    more."""
    known = {name: value for name, value in others.items() if name in _KNOWN}
    given = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **known)
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    token, done, all_done = _next(model(**given, return_dict=True).logits, done, end)
    tokens, step, has_ended = [token], _step(model, options), _later(all_done, end)
    while len(tokens) < most - input_ids.shape[1]:
        token, done, all_done = step(token, done, end, others["past_key_values"])
        tokens.append(token)
        if has_ended():
            break
        has_ended = _later(all_done, end)
    return torch.cat(tokens, 1)


def _next(logits: Tensor, done: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the likeliest tokens [B, 1], which sequences have had one of `end` [B], whether all have [])."""
    token = logits[:, -1].float().argmax(-1, keepdim=True)
    if len(end):
        done = done | (token == end).any(-1)
    return token, done, done.all()


def _step(model: Any, options: Mapping[str, Any]) -> Step:
    """The compiled step of `model`, made once: (tokens [B, 1], done [B], end, cache) to what `_next` gives."""
    known = _steps.setdefault(model, {})
    key = repr(sorted(options.items()))
    if key not in known:
        held = weakref.ref(model)

        def step(token: Tensor, done: Tensor, end: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
            run = held()
            assert run is not None
            return _next(run(input_ids=token, past_key_values=cache, use_cache=True, return_dict=True).logits, done, end)

        backend = resolve_backend("fxopt")
        known[key] = torch.compile(unshared(step), backend=backend, fullgraph=True, dynamic=False, options=dict(options))
    return known[key]


def _later(flag: Tensor, end: Tensor) -> Callable[[], bool]:
    """Reads `flag` [] when called; what is enqueued on the device between now and then is not waited for."""
    if not len(end):
        return lambda: False
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copied, event = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
    copied.copy_(flag, non_blocking=True)
    event.record()

    def read() -> bool:
        event.synchronize()
        return bool(copied)

    return read


def _ended(tokens: Tensor, end: Tensor, pad: int) -> Tensor:
    """`tokens` [B, T] with `pad` after each sequence's first of `end`, up to where the last sequence ends."""
    is_last = (tokens[..., None] == end).any(-1).int()
    after = is_last.cumsum(1) - is_last > 0
    return tokens.masked_fill(after, pad)[:, : int((~after).any(0).sum())]


def _obstacle(
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    config: Any,
    others: Mapping[str, Any],
) -> str | None:
    """Why `decode` cannot write these tokens, if it cannot."""
    from transformers.cache_utils import StaticCache, StaticLayer
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    cache = others.get("past_key_values")
    if config.do_sample or (config.num_beams or 1) > 1 or config.is_assistant or model.config.is_encoder_decoder:
        return "this is no greedy search of a decoder"
    if len(logits_processor):
        return f"scores are processed by {type(logits_processor[0]).__name__}"
    if config.return_dict_in_generate or others.get("streamer") is not None or others.get("synced_gpus"):
        return "more than the tokens at the end is asked for"
    if any(type(c) not in (EosTokenCriteria, MaxLengthCriteria) for c in stopping_criteria):
        return "it ends by other criteria than length and tokens"
    if not isinstance(cache, StaticCache) or any(type(layer) is not StaticLayer for layer in cache.layers):
        return "the cache is not a static one"
    if config.prefill_chunk_size is not None or int(cache.get_seq_length()):
        return "the prompt is not read at once"
    if unknown := [k for k, v in others.items() if v is not None and k not in (*_KNOWN, "streamer", "synced_gpus")]:
        return f"the model is given {', '.join(unknown)}"
    mask, positions = others.get("attention_mask"), others.get("position_ids")
    if mask is not None and not bool((mask == 1).all()):
        return "prompts are padded"
    counted = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    return None if positions is None or torch.equal(positions, counted) else "tokens have other positions than their numbers"
