"""What was measured, remembered on disk per GPU architecture (or CPU instruction set).

    records/<architecture>/<hash of the key>.json      {"key": {"kind", "facts"}, "value"}

One file per key, written atomically: any number of processes may add records at once, and a damaged one costs only itself
(`runtime/cachedir.py` sets it aside). The key stands beside the value, so records can be read, exported and merged.
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
        self._folder = f"records/{_file_name(architecture)}"
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
        name, entry = key.digest(), {"format": FORMAT, "key": _key_json(key), "value": value}
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
                yield RecordKey(entry["key"]["kind"], entry["key"]["facts"]), entry["value"]

    def export(self, path: Path | str) -> int:
        """Write every record to one JSON file; returns how many. Raises OSError."""
        records = [{"key": _key_json(key), "value": value} for key, value in self.items()]
        data = {"format": FORMAT, "architecture": self.architecture, "records": records}
        Path(path).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
        return len(records)

    def merge(self, path: Path | str) -> int:
        """Add an exported file's records; returns how many were new. A key already recorded keeps its value, so that choices
        made here stay as they are. Raises CacheError when the file is not an export for this architecture, OSError when it
        cannot be read."""
        entries = self._exported(Path(path))
        added = 0
        for entry in entries:
            key = RecordKey(entry["key"]["kind"], entry["key"]["facts"])
            if self.get(key) is None:
                self.put(key, entry["value"])
                added += 1
        return added

    def _exported(self, path: Path) -> list[dict[str, Any]]:
        try:
            data = json.loads(path.read_bytes())
            if data["format"] != FORMAT or not all(_is_entry({"format": FORMAT, **e}) for e in data["records"]):
                raise ValueError("unknown format")
            architecture = data["architecture"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CacheError(f"{path} is not a file of exported fxopt records: {error}") from error
        if architecture != self.architecture:
            raise CacheError(f"{path} has records of {architecture}, not of {self.architecture}; measure on this machine")
        entries: list[dict[str, Any]] = data["records"]
        return entries


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
