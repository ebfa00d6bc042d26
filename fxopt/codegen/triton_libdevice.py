"""A small libdevice: linking CUDA's whole one takes a quarter of the time in which an element-wise kernel is compiled.

Triton links it into each kernel that calls a function of it, reading all of its 450 KB, of which a norm needs the reciprocal
square root. What kernels need most is taken out of it once, as LLVM's text, and linked instead where it is enough. The code
that results is the same.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COMMON = ("ceil", "erf", "exp", "exp2", "expm1", "floor", "log", "log1p", "log2", "rint", "rsqrt", "tanh", "trunc")
"""Functions of one float32, the short ones: most of the library reduces large arguments (sin) or computes in float64."""

_SYMBOLS = frozenset(f"__nv_{name}f" for name in COMMON)
_LINKED = re.compile(r"^define internal (?=.*@__nv_)", re.MULTILINE)

Link = Callable[[Any, Sequence[str]], None]
"""Triton's `link_extern_libs`: it takes of the libraries at the paths what the module declares."""

log = logging.getLogger(__name__)


def install() -> None:
    """Let Triton link the small library where that is enough, from now on: for processes that do nothing but compile."""
    from triton._C.libtriton import llvm

    whole: Link = llvm.link_extern_libs
    small = functools.cache(functools.partial(small_library, whole))

    def link(module: Any, paths: Sequence[str]) -> None:
        called = {f.name for f in module.get_functions() if f.is_declaration() and f.name.startswith("__nv_")}
        enough = len(paths) == 1 and called <= _SYMBOLS
        library = small(paths[0]) if enough else None
        whole(module, paths if library is None else [library])

    llvm.link_extern_libs = link


def small_library(link: Link, path: str) -> str | None:
    """The path of a library of nothing but COMMON and what these call, out of the one at `path`; None if it cannot be made.

    It lies in memory, where forks of this process find it under the same path.
    """
    try:
        text = _LINKED.sub("define ", _linked(link, path))
        file = os.memfd_create("libdevice.ll")
        with open(file, "w", closefd=False) as target:
            target.write(text)
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError) as error:  # another Triton, another system
        log.info("kernels are linked with the whole libdevice: %s", error)
        return None
    return f"/proc/self/fd/{file}"


def _linked(link: Link, path: str) -> str:
    """The text of a module that calls each of COMMON, with what it needs of the library at `path`."""
    from triton._C.libtriton import ir, llvm, nvidia

    declared = [f"llvm.func @{symbol}(f32) -> f32" for symbol in sorted(_SYMBOLS)]
    calls = [f"  llvm.call @{symbol}(%x) : (f32) -> f32" for symbol in sorted(_SYMBOLS)]
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.TemporaryDirectory(prefix="fxopt-libdevice-") as directory:
        source = Path(directory) / "calls.mlir"
        source.write_text("\n".join([*declared, "llvm.func @fx_calls(%x: f32) {", *calls, "  llvm.return", "}\n"]))
        parsed = ir.parse_mlir_module(str(source), context)
    parsed.context = context  # which must live as long
    llvm.init_targets()
    within = llvm.context()
    module = llvm.to_module(parsed, within)
    llvm.attach_datalayout(module, "nvptx64-nvidia-cuda", "sm_90", "")
    link(module, [path])
    return str(module)
