"""How the files of a calibration (quant/table.py) are written, and which belong together."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Aside, and renamed. Raises OSError where that is not possible."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def tensor_file_of(path: Path) -> str | None:
    """The name of the tensors' file that the calibration at `path` has so far."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    tensors = document.get("tensors") if isinstance(document, dict) else None
    file = tensors.get("file") if isinstance(tensors, dict) else None
    return file if isinstance(file, str) and _is_tensor_file(file, path) else None


def _is_tensor_file(file: str, path: Path) -> bool:
    return re.fullmatch(re.escape(path.name) + r"\.[0-9a-f]{8}\.tensors", file) is not None
