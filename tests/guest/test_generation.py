"""fxopt.generation.decode in the place of transformers' own loop: the same tokens, and that loop where it does more."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from torch._dynamo.utils import counters

from benchmarks.models import llama
from fxopt import generation

pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return llama({"hidden": 64, "layers": 1, "vocab": 23}).eval()


def prompts(batch: int = 1) -> Tensor:
    return torch.randint(1, 23, (batch, 7), generator=torch.Generator().manual_seed(5))


def write(model: Any, ids: Tensor, **more: Any) -> Any:
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False, **more}
    return model.generate(ids, cache_implementation="static", disable_compile=True, **given)


def test_a_compiled_step_writes_transformers_own_tokens(model: Any) -> None:
    torch.compiler.reset()
    generation._steps.clear()
    before = counters["stats"]["unique_graphs"]
    for ids in (prompts(), prompts().flip(1)):
        assert torch.equal(write(model, ids, custom_generate=generation.decode), write(model, ids))
    assert counters["stats"]["unique_graphs"] == before + 1


def test_sequences_end_where_transformers_own_do(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence, and several that end at different tokens, or not at all; each kind is compiled once."""
    torch.compiler.reset()
    generation._steps.clear()
    monkeypatch.setattr(generation, "resolve_backend", lambda name: "eager")  # what the loop does is asked here
    ids = prompts(3)
    free = write(model, ids)[:, 7:]
    ends = sorted({int(free[0, 2]), int(free[1, 5]), int(free[2, 1])})
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in ({}, {"eos_token_id": ends, "pad_token_id": 0}, {"eos_token_id": ends[0]}):
            want = write(model, ids, **given)
            got = write(model, ids, custom_generate=generation.decode, **given)
            assert torch.equal(got, want), given
            seen.add(want.shape[1])
        assert len(seen) > 1, "some of these texts have to end early"
        before = counters["stats"]["unique_graphs"]
        for start in range(3):
            one = ids[start : start + 1]
            assert torch.equal(write(model, one, custom_generate=generation.decode), write(model, one))
        assert counters["stats"]["unique_graphs"] == before + 1


OTHERS: dict[str, dict[str, Any]] = {
    "scores are processed by RepetitionPenalty": {"repetition_penalty": 1.5},
    "more than the tokens": {"return_dict_in_generate": True, "output_scores": True},
    "not a static one": {"cache_implementation": None},
    "prompts are padded": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]])},
}


@pytest.mark.parametrize("reason", OTHERS)
def test_what_it_cannot_do_is_left_to_transformers(model: Any, reason: str) -> None:
    ids, more = prompts(), {"cache_implementation": "static", **OTHERS[reason]}
    given = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 5,
        "do_sample": False,
        "disable_compile": True,
        **more,
    }
    want = model.generate(ids, **given)
    with pytest.warns(UserWarning, match=reason):
        got = model.generate(ids, custom_generate=generation.decode, **given)
    if isinstance(want, Tensor):
        assert torch.equal(got, want)
    else:
        assert torch.equal(got.sequences, want.sequences) and len(got.scores) == 5


def test_sampling_is_transformers_own(model: Any) -> None:
    ids = prompts()
    texts = []
    for custom in ({}, {"custom_generate": generation.decode}):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            texts.append(write(model, ids, **{**custom, "do_sample": True}))
    assert torch.equal(*texts)


def test_what_follows_an_end_is_cut_or_padded() -> None:
    tokens = torch.tensor([[4, 9, 4, 4], [9, 5, 5, 8], [3, 3, 8, 9]])
    assert generation._ended(tokens, torch.tensor([8, 9]), 0).tolist() == [[4, 9, 0], [9, 0, 0], [3, 3, 8]]
    assert generation._ended(tokens, torch.tensor([7]), 0).tolist() == tokens.tolist()
