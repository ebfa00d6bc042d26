"""Options: what is accepted, what is refused with a helpful message, and what enters a cache key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fxopt import knobs
from fxopt.errors import OptionError
from fxopt.options import MODES, Options


def test_defaults_and_modes(monkeypatch):
    for knob in knobs.ALL:
        monkeypatch.delenv(knob.name, raising=False)
    assert Options.parse() == Options()
    for mode in MODES:
        assert Options.parse(mode).mode == mode
        assert Options.parse(None, {"mode": mode}).mode == mode


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        ("fast", None, ["'fast'", "default", "reduce-overhead", "max-autotune"]),
        ("max-autotun", None, ["did you mean 'max-autotune'"]),
        (None, {"mode": "turbo"}, ["'turbo'", "reduce-overhead"]),
        (None, {"frezee": True}, ["'frezee'", "did you mean 'freeze'", "strict", "fallback_random"]),
        (None, {"freeze": 1}, ["'freeze'", "a bool", "1"]),
        (None, {"fuel": -1}, ["'fuel'", ">= 0"]),
        (None, {"fuel": True}, ["'fuel'"]),
        (None, {"disable": "cse"}, ["'disable'", "list of pass names"]),
        (None, {"dump": 3}, ["'dump'"]),
        (None, {"tuning_seconds": -1}, ["'tuning_seconds'", ">= 0"]),
        ("default", {"mode": "max-autotune"}, ["contradicts"]),
    ],
)
def test_bad_options_name_the_valid_ones(mode, options, words):
    with pytest.raises(OptionError) as caught:
        Options.parse(mode, options)
    for word in words:
        assert word in str(caught.value)


def test_environment_is_folded_in(monkeypatch):
    monkeypatch.setenv("FXOPT_DISABLE", "cse, views")
    monkeypatch.setenv("FXOPT_FUEL", "7")
    monkeypatch.setenv("FXOPT_DUMP", "/tmp/somewhere")
    monkeypatch.setenv("FXOPT_STRICT", "1")
    monkeypatch.setenv("FXOPT_TUNING_SECONDS", "0.5")
    parsed = Options.parse(None, {"disable": ["algebra"]})
    assert parsed.disable == ("algebra", "cse", "views")
    assert (parsed.fuel, parsed.dump, parsed.strict) == (7, "/tmp/somewhere", True)
    assert parsed.tuning_seconds == 0.5
    assert Options.parse(None, {"fuel": 3, "dump": Path("x")}).fuel == 3
    assert Options.parse(None, {"tuning_seconds": 0}).tuning_seconds == 0


def test_malformed_environment_warns_and_keeps_the_default(monkeypatch):
    monkeypatch.setenv("FXOPT_FUEL", "lots")
    with pytest.warns(UserWarning, match="FXOPT_FUEL"):
        assert Options.parse().fuel is None


def test_cache_key_facts_follow_what_changes_code():
    base = Options.parse()
    json.dumps(base.cache_key_facts())
    changes = {"freeze": True, "mode": "max-autotune", "disable": ["cse"], "fuel": 1, "fallback_random": True}
    for name, value in (changes | {"tuning_seconds": 0}).items():
        assert Options.parse(None, {name: value}).cache_key_facts() != base.cache_key_facts()
    for change in ({"strict": True}, {"dump": "d"}, {"check": True}):
        assert Options.parse(None, change).cache_key_facts() == base.cache_key_facts()


def test_every_knob_is_documented_and_unique():
    names = [knob.name for knob in knobs.ALL]
    assert len(set(names)) == len(names)
    declared = {value for value in vars(knobs).values() if isinstance(value, knobs.Knob)}
    assert declared == set(knobs.ALL)
    assert all(knob.name.startswith("FXOPT_") and knob.doc for knob in knobs.ALL)
    texts = (path.read_text() for path in Path(knobs.__file__).parent.rglob("*.py"))
    assert {name for text in texts for name in re.findall(r'"(FXOPT_[A-Z_]+)"', text)} == set(names)
