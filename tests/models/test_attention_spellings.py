"""The committed table of attentions that become one op is complete, and still what the passes make of some of the models."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from tests.models.attention_spellings import RESULTS, SPELLINGS, find

pytest.importorskip("transformers")
TABLE: dict[str, dict[str, dict[str, Any]]] = json.loads(RESULTS.read_text())
LATE = {"capped scores", "a finite fill beside another mask"}
"""What no library computes in inference, and `lower/written_attention.py` looks at again."""


def test_every_attention_is_one_op() -> None:
    assert TABLE.keys() == SPELLINGS.keys()
    for name, modes in TABLE.items():
        for mode, found in modes.items():
            refused = {text.rpartition(" x")[0]: int(text.rpartition(" x")[2]) for text in found["reasons"]}
            assert refused.keys() <= (LATE if mode == "inference" else set()), (name, mode)
            others = name == "Mixtral"  # a router's
            assert found["left"] == sum(refused.values()) + others, (name, mode)
            assert found["fused"] + found["scored"] + len(refused) > 0, (name, mode)


@pytest.mark.parametrize(
    ("name", "mode"), [("BERT, padded", "training"), ("Falcon, ALiBi", "training"), ("GPT-J", "inference")]
)
def test_the_table_holds(name: str, mode: str) -> None:
    found = asdict(find(SPELLINGS[name], mode == "training"))
    assert found | {"reasons": list(found["reasons"])} == TABLE[name][mode]
