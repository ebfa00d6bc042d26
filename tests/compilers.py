"""C++ compilers for tests: scripts that stand before the system's own."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

REAL = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")

_REMEMBERING = """
    for a; do
        [ "$before" = -o ] && out=$a
        case $a in *.cpp) text=$a;; /*|-I*) ;; *) flags="$flags $a";; esac
        before=$a
    done
    [ -n "$text" ] && [ -n "$out" ] || exec REAL "$@"
    known=FOLDER/$({ echo "$flags"; cat "$text"; } | sha256sum | cut -c1-64)
    [ -f "$known" ] || { REAL "$@" && cp "$out" "$known.$$" && mv "$known.$$" "$known"; } || exit 1
    cp "$known" "$out"
"""


def compiler(folder: Path, body: str) -> str:
    """An executable in `folder` that runs the lines `body` of a shell; its path."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)
    return str(path)


def remembering(folder: Path) -> str:
    """A compiler in the empty `folder` that compiles a text once for the same flags: caches that begin empty cost little."""
    known = folder / "known"
    known.mkdir()
    return compiler(folder, textwrap.dedent(_REMEMBERING).replace("REAL", str(REAL)).replace("FOLDER", str(known)))
