"""Printed kernels and their compiled form. Pure data; the printers make the first, `codegen.compile` the second."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxopt.ir.exprs import Int


@dataclass(frozen=True)
class KernelSource:
    """One printed kernel.

    `text` is canonical: parameters are named by position, so two regions that compute the same thing have equal texts.
    `buffers` names the region's buffer for each pointer parameter and `sizes` the value of each integer parameter (after the
    pointers). `grid` is the launch grid in blocks (Triton only; an entry may be symbolic). `compile_options` is whatever the
    compiler needs beside the text (signature, alignment, num_warps, num_stages; C++ flags) as JSON data and is part of
    the key. `errors` are messages for the kernel's error codes 1, 2, ... (an index out of bounds). A batched kernel (Triton
    only) has `members`, the number of elements of each: its parameters are tables, and `buffers` what they point to, one
    member's after another's.
    """

    language: str  # "triton" or "cpp"
    entry: str
    text: str
    buffers: tuple[str, ...]
    sizes: tuple[Int, ...] = ()
    grid: tuple[Int, Int, Int] = (1, 1, 1)
    compile_options: dict[str, Any] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    members: tuple[int, ...] = ()

    @property
    def block(self) -> int:
        """Elements that one program of a batched kernel does; 0 for any other."""
        return int(self.compile_options["constexprs"]["XB"]) if self.members else 0

    def __hash__(self) -> int:
        return hash(self.text)

    def key(self, toolchain: str) -> str:
        """SHA-256 over everything the binary depends on; `toolchain` names compiler, versions and target."""
        facts = [self.language, self.entry, self.text, self.compile_options, toolchain]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """Machine code in the cache.

    `path` is the file to load (a shared object for C++, a cubin for Triton); `meta` is JSON data that the launcher needs
    (C++: nothing more; Triton: name, num_warps, shared bytes, cluster dims, and the number of trailing scratch pointers).
    """

    key: str
    language: str
    entry: str
    path: Path
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompileFailure:
    """Why a kernel did not compile: the compiler's message, shortened, for reports."""

    key: str
    reason: str
