"""A slice of the OpInfo sweep for every commit: ops of every class, drawn by a fixed seed, compiled, run and compared.

Strict: an operator that runs as an ATen call must be in table/retreats.json. The whole is `python -m tests.opinfo.sweep`.
"""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from tests.opinfo.classes import JUDGED, op_class
from tests.opinfo.samples import DTYPES, LAYOUTS, MODES, Item, items, ops, supports
from tests.opinfo.skips import NOT_RUN, RANDOM, UNINITIALISED
from tests.opinfo.table import read
from tests.opinfo.worker import run_batch

SEED = 20
GROUPS = 8
JUDGED_OPS, OTHER_OPS = 48, 12
"""Ops drawn from each class."""

DTYPE_ROTATION = ("float32", "float32", "bfloat16", "float32", "int64", "bool")


def drawn() -> list[Item]:
    """The items of the slice: of each class some ops, one sample of each, dtypes, modes and layouts in turn."""
    generator = random.Random(SEED)
    by_class: dict[str, list[str]] = defaultdict(list)
    for name, op in ops().items():
        if name not in NOT_RUN["cpu"]:
            by_class[op_class(op)].append(name)
    names = []
    for kind, members in sorted(by_class.items()):
        most = JUDGED_OPS if kind in JUDGED else OTHER_OPS
        names += generator.sample(members, min(most, len(members)))
    generator.shuffle(names)
    return [item for k, name in enumerate(names) for item in _one(name, k, generator)]


def _one(name: str, k: int, generator: random.Random) -> list[Item]:
    """At most one item of the op, the `k`-th drawn."""
    op = ops()[name]
    wanted = DTYPE_ROTATION[k % len(DTYPE_ROTATION)]
    dtype = next((d for d in (wanted, *DTYPES) if supports(op, d, "forward")), None)
    if dtype is None:
        return []
    mode = MODES[k % 2] if supports(op, dtype, MODES[k % 2]) else "forward"
    found = items(name, dtype, mode, LAYOUTS[k // 2 % 2], 0)
    return [generator.choice(found)] if found else []


def groups() -> list[list[Item]]:
    chosen = drawn()
    return [chosen[k::GROUPS] for k in range(GROUPS)]


@pytest.fixture(scope="module")
def slices() -> list[list[Item]]:
    return groups()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", range(GROUPS))
def test_slice(slices: list[list[Item]], group: int) -> None:
    allowed = read("retreats")
    faults = []
    for record in run_batch(slices[group], "cpp", lambda key: None):
        if record["status"] not in ("right", "skipped", "torch"):
            faults.append(f"{record['key']}: {record['status']}: {record.get('why', '')}")
        faults += [
            f"{record['key']}: {what} runs as ATen: {why}" for what, why in record.get("retreats", ()) if what not in allowed
        ]
    assert not faults, "\n".join(faults)


def test_the_table_is_complete() -> None:
    """Five samples of every op that a CPU has in float32, all right, and nine in ten of the judged classes generated."""
    table = read("float32")
    expected = [name for name, op in ops().items() if supports(op, "float32", "forward")]
    assert not set(expected) - set(table)
    generated = samples = 0
    for name, entry in table.items():
        counts = entry["forward"]
        assert counts["right"] == counts["samples"], f"{name}: {counts}"
        if entry["class"] in JUDGED:
            generated, samples = generated + counts["generated"], samples + counts["samples"]
    assert generated >= 0.9 * samples


def test_lists_of_exceptions_name_ops_that_exist() -> None:
    for names in (*NOT_RUN.values(), RANDOM, UNINITIALISED):
        assert not set(names) - set(ops())
