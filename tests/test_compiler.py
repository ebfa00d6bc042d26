"""The tour's own decisions: what is said of modes, what happens to kernels that do not load."""

from __future__ import annotations

import pytest
import torch

from fxopt import compiler
from fxopt.errors import CacheError
from fxopt.journal import RECENT, Journal
from fxopt.options import Options


@pytest.mark.parametrize(
    ("mode", "devices", "said"),
    [
        ("reduce-overhead", {"cuda", "cpu"}, ["not captured in this version; runs as default"]),
        ("max-autotune", {"cuda"}, ["CUDA graphs are not captured"]),
        ("default", {"cuda"}, []),
        ("reduce-overhead", {"cpu"}, []),
    ],
)
def test_modes_do_not_claim_cuda_graphs(mode: str, devices: set[str], said: list[str]) -> None:
    journal = Journal("graph")
    compiler.note_mode(Options.parse(mode), devices, journal)
    assert [topic for topic, _ in journal.notes] == ["mode"] * len(said)
    assert all(words in text for words, (_, text) in zip(said, journal.notes, strict=True))


def test_kernels_that_never_load_are_tried_twice_and_the_graph_runs_as_it_was(
    monkeypatch: pytest.MonkeyPatch, fresh_cache: object
) -> None:
    attempts = []

    def refuse(*args: object) -> None:
        attempts.append(args)
        raise CacheError("cannot load kernel k: wrong machine")

    monkeypatch.setattr(compiler, "Executor", refuse)
    torch.compiler.reset()
    RECENT.clear()
    x = torch.randn(4)
    with pytest.warns(UserWarning, match="does not load: cannot load kernel k: wrong machine"):
        got = torch.compile(lambda x: x.sin() + 1, backend="fxopt")(x)
    torch.testing.assert_close(got, x.sin() + 1)
    assert len(attempts) == 2
    assert [what for j in RECENT for what, _ in j.retreats] == ["the whole graph"]
