"""What was measured, remembered on disk per GPU architecture (or CPU instruction set).

    records/<architecture>/<hash of the key>.json      {"key": {"kind", "facts"}, "value"}

One file per key, written atomically: any number of processes may add records at once, and a damaged one costs only itself
(`runtime/cachedir.py` sets it aside). The key stands beside the value, so records can be read, exported and imported.

An exported file holds the records of every architecture: {"format", "records": {architecture: [{"key", "value"}, ...]}}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt.errors import CacheError
from fxopt.runtime.cachedir import CacheDirectory

FORMAT = 1
FOLDER = "records"


@dataclass(frozen=True)
class RecordKey:
    """What a measurement depends on: `kind` says of what it is, `facts` (JSON data) everything that could change it beside
    the architecture: shapes, dtypes, layouts, candidates, flags, versions."""

    kind: str
    facts: dict[str, Any]

    def digest(self) -> str:
        """SHA-256 of the key's canonical JSON. Raises TypeError or ValueError when `facts` is not JSON data."""
        text = json.dumps([self.kind, self.facts], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest())


class Records:
    """The records of one architecture. Values are JSON objects, kept in memory once read or written.

    Never raises for a damaged or unwritable cache: what cannot be read is measured again.
    """

    def __init__(self, cache: CacheDirectory, architecture: str) -> None:
        self._cache = cache
        self._folder = f"{FOLDER}/{_file_name(architecture)}"
        self._known: dict[str, dict[str, Any]] = {}
        self.architecture = architecture

    def get(self, key: RecordKey) -> dict[str, Any] | None:
        """The value recorded for `key`, or None."""
        name = key.digest()
        if name not in self._known:
            entry = self._read(name)
            if entry is None or entry["key"] != _key_json(key):
                return None
            self._known[name] = entry["value"]
        return self._known[name]

    def put(self, key: RecordKey, value: dict[str, Any]) -> None:
        """Record `value` (JSON data) for `key`, in this process even when the disk refuses."""
        name, entry = key.digest(), {"format": FORMAT, **_entry(key, value)}
        self._known[name] = json.loads(json.dumps(value))
        self._cache.try_write(lambda: self._cache.put_document(self._folder, name, entry))

    def _read(self, name: str) -> dict[str, Any] | None:
        entry: dict[str, Any] | None = self._cache.get_document(self._folder, name)
        if entry is not None and not _is_entry(entry):
            path = self._cache.path / self._folder / f"{name}.json"
            self._cache.quarantine(path, "its contents are not a record", lambda: False)
            return None
        return entry

    def items(self) -> Iterator[tuple[RecordKey, dict[str, Any]]]:
        """Every sound record on disk, in a stable order."""
        for path in sorted((self._cache.path / self._folder).glob("*.json")):
            entry = self._read(path.stem)
            if entry is not None:
                yield _record_key(entry), entry["value"]


def architectures(cache: CacheDirectory) -> list[str]:
    """Those with records in `cache`."""
    return sorted(path.name for path in (cache.path / FOLDER).glob("*/"))


def export_records(cache: CacheDirectory, path: Path | str) -> dict[str, int]:
    """Write every record in `cache` to one JSON file; returns how many there are of each architecture. Raises OSError."""
    found = {name: [_entry(key, value) for key, value in Records(cache, name).items()] for name in architectures(cache)}
    data = {"format": FORMAT, "records": found}
    Path(path).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    return {name: len(entries) for name, entries in found.items()}


def import_records(cache: CacheDirectory, path: Path | str) -> dict[str, int]:
    """Add an exported file's records to `cache`; returns how many of each architecture were new.

    A key already recorded keeps its value, so that choices made here stay as they are. Raises CacheError, before anything is
    added, when the file is no export, OSError when it cannot be read.
    """
    added = {}
    for architecture, entries in _exported(Path(path)).items():
        records = Records(cache, architecture)
        new = [entry for entry in entries if records.get(_record_key(entry)) is None]
        for entry in new:
            records.put(_record_key(entry), entry["value"])
        added[architecture] = len(new)
    return added


def _exported(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT}")
        found: dict[str, list[dict[str, Any]]] = data["records"]
        for architecture, entries in found.items():
            if architecture != _file_name(architecture) or architecture.startswith("."):
                raise ValueError(f"{architecture!r} is no architecture")
            for entry in entries:
                if not _is_entry({"format": FORMAT, **entry}):
                    raise ValueError(f"not everything listed for {architecture} is a record")
                _record_key(entry).digest()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise CacheError(f"{path} is not a file of exported fxopt records: {reason}") from error
    return found


def _record_key(entry: dict[str, Any]) -> RecordKey:
    return RecordKey(entry["key"]["kind"], entry["key"]["facts"])


def _entry(key: RecordKey, value: dict[str, Any]) -> dict[str, Any]:
    return {"key": _key_json(key), "value": value}


def _key_json(key: RecordKey) -> dict[str, Any]:
    """The key as it comes back from disk (tuples become lists)."""
    out: dict[str, Any] = json.loads(json.dumps({"kind": key.kind, "facts": key.facts}))
    return out


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.get("format") != FORMAT or not isinstance(entry.get("value"), dict):
        return False
    key = entry.get("key")
    return isinstance(key, dict) and isinstance(key.get("kind"), str) and isinstance(key.get("facts"), dict)


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text) or "unknown"
