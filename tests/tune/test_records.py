"""Measurements outlive the process, survive damage and travel."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from fxopt.errors import CacheError
from fxopt.runtime.cachedir import CacheDirectory
from fxopt.tune.records import RecordKey, Records, export_records, import_records

KEY = RecordKey("region", {"kernels": ["k1", "k2"], "shape": [4, 8]})


def records(folder: Path, architecture: str = "cuda-sm90") -> Records:
    return Records(CacheDirectory(folder), architecture)


def test_a_record_outlives_the_object(tmp_path: Path) -> None:
    assert records(tmp_path).get(KEY) is None
    records(tmp_path).put(KEY, {"winner": "k2", "seconds": {"k1": 1.5, "k2": 1.25}})
    assert records(tmp_path).get(KEY) == {"winner": "k2", "seconds": {"k1": 1.5, "k2": 1.25}}


@pytest.mark.parametrize(
    "other",
    [
        RecordKey("product", KEY.facts),
        RecordKey("region", {**KEY.facts, "shape": [4, 9]}),
        RecordKey("region", {"kernels": ["k1", "k2"]}),
    ],
)
def test_every_fact_counts(tmp_path: Path, other: RecordKey) -> None:
    kept = records(tmp_path)
    kept.put(KEY, {"winner": "k2"})
    assert kept.get(other) is None and other != KEY


def test_the_order_of_facts_does_not_count() -> None:
    turned = RecordKey("region", dict(reversed(KEY.facts.items())))
    assert turned == KEY and turned.digest() == KEY.digest() and hash(turned) == hash(KEY)


def test_tuples_in_facts_are_lists_on_disk(tmp_path: Path) -> None:
    key = RecordKey("region", {"shape": (1, 2)})
    records(tmp_path).put(key, {"winner": "a"})
    assert records(tmp_path).get(key) == {"winner": "a"}


def test_architectures_are_apart(tmp_path: Path) -> None:
    records(tmp_path).put(KEY, {"winner": "k2"})
    assert records(tmp_path, "cuda-sm80").get(KEY) is None


def test_the_key_stands_beside_the_value(tmp_path: Path) -> None:
    records(tmp_path).put(KEY, {"winner": "k2"})
    (path,) = (tmp_path / "records" / "cuda-sm90").iterdir()
    assert json.loads(path.read_text())["body"]["key"] == {"kind": KEY.kind, "facts": KEY.facts}


@pytest.mark.parametrize("damage", [b"", b"{", b'{"sha256": "0", "body": {}}', b"\xff\xfe\x00"])
def test_a_damaged_record_is_measured_again(tmp_path: Path, damage: bytes) -> None:
    records(tmp_path).put(KEY, {"winner": "k2"})
    (path,) = (tmp_path / "records" / "cuda-sm90").iterdir()
    path.write_bytes(damage)
    again = records(tmp_path)
    with pytest.warns(UserWarning, match="damaged") as caught:
        assert again.get(KEY) is None
    assert len(caught) == 1 and list((tmp_path / "quarantine").iterdir())
    again.put(KEY, {"winner": "k1"})
    assert records(tmp_path).get(KEY) == {"winner": "k1"}


@pytest.mark.parametrize("body", [[], {"format": 1}, {"format": 99, "key": {"kind": "a", "facts": {}}, "value": {}}])
def test_a_sound_file_that_is_no_record(tmp_path: Path, body: Any) -> None:
    CacheDirectory(tmp_path).put_document("records/cuda-sm90", KEY.digest(), body)
    with pytest.warns(UserWarning, match="not a record"):
        assert records(tmp_path).get(KEY) is None


def test_records_hold_in_memory_when_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = records(tmp_path)

    def refuse(*args: Any) -> None:
        raise CacheError("disk full")

    monkeypatch.setattr(CacheDirectory, "write", refuse)
    kept.put(KEY, {"winner": "k2"})
    assert kept.get(KEY) == {"winner": "k2"}


def test_export_and_import(tmp_path: Path) -> None:
    here, there = CacheDirectory(tmp_path / "here"), CacheDirectory(tmp_path / "there")
    keys = [RecordKey("region", {"n": i}) for i in range(4)]
    for i, key in enumerate(keys[:3]):
        Records(here, "cuda-sm90").put(key, {"winner": f"here {i}"})
    Records(here, "cpu-AVX2").put(keys[0], {"winner": "on the CPU"})
    Records(there, "cuda-sm90").put(keys[0], {"winner": "there 0"})
    Records(there, "cuda-sm90").put(keys[3], {"winner": "there 3"})
    assert export_records(here, tmp_path / "out.json") == {"cpu-AVX2": 1, "cuda-sm90": 3}
    assert import_records(there, tmp_path / "out.json") == {"cpu-AVX2": 1, "cuda-sm90": 2}
    found = Records(there, "cuda-sm90")
    assert [found.get(key) for key in keys] == [{"winner": w} for w in ("there 0", "here 1", "here 2", "there 3")]
    assert [key for key, _ in found.items()] == sorted(keys, key=RecordKey.digest)
    assert Records(there, "cpu-AVX2").get(keys[0]) == {"winner": "on the CPU"}
    assert import_records(there, tmp_path / "out.json") == {"cpu-AVX2": 0, "cuda-sm90": 0}


GOOD = {"key": {"kind": "a", "facts": {}}, "value": {}}


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"format": 1},
        {"format": 99, "records": {}},
        {"format": 1, "records": [GOOD]},
        {"format": 1, "records": {"cuda-sm90": [{"key": 3}]}},
        {"format": 1, "records": {"cuda-sm90": [GOOD, 7]}},
        {"format": 1, "records": {"cuda-sm90": [GOOD | {"key": {"kind": "a", "facts": {"x": float("nan")}}}]}},
        {"format": 1, "records": {"../../blobs": [GOOD]}},
        {"format": 1, "records": {"..": [GOOD]}},
    ],
    ids=str,
)
def test_not_an_export(tmp_path: Path, data: Any) -> None:
    (tmp_path / "in.json").write_text(json.dumps(data))
    cache = CacheDirectory(tmp_path / "cache")
    with pytest.raises(CacheError, match=r"in\.json is not a file of exported"):
        import_records(cache, tmp_path / "in.json")
    assert not any(tmp_path.glob("cache/records/**/*.json"))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"\x7fELF"])
def test_no_json_at_all(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "in.json").write_bytes(data)
    with pytest.raises(CacheError, match=r"in\.json is not a file of exported"):
        import_records(CacheDirectory(tmp_path / "cache"), tmp_path / "in.json")


def test_processes_may_record_at_once(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from fxopt.runtime.cachedir import CacheDirectory
        from fxopt.tune.records import RecordKey, Records
        kept = Records(CacheDirectory(Path(sys.argv[1])), "cpu")
        for i in range(60):
            kept.put(RecordKey("k", {"i": i % 20}), {"winner": i % 20})
            assert Records(kept._cache, "cpu").get(RecordKey("k", {"i": i % 20})) == {"winner": i % 20}
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(tmp_path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(list(Records(CacheDirectory(tmp_path), "cpu").items())) == 20
