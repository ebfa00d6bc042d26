"""Printed Triton kernels to cubins, offline: no GPU, no C compiler. What depends on Triton's version in compiling is here.

Triton is imported when the first kernel is compiled, never on import of this module: only compile workers pay for it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from fxopt.codegen import triton_chain, triton_in_flight, triton_libdevice
from fxopt.ir.kernel import KernelSource
from fxopt.target import Target

SCRATCH_POINTERS = 2
"""Triton 3.6 appends a global and a profiling scratch pointer to every kernel's parameters; both NULL when unused."""

_OPTIONS: dict[str, Any] = {"sanitize_overflow": False, "enable_reflect_ftz": False}
"""Signed overflow wraps as in eager, and denormals are kept."""

_DEVICE_FILES = ("triton_helpers/*.py", "triton_chain.py", "triton_in_flight.py", "templates/*.py")
"""Device functions that printed kernels import, what is done to their text, and what refuses some."""

_DESCRIPTOR = "tensordesc"
"""What the type of a parameter that is a tensor descriptor begins with."""

_PACKING = {"rounded_to_half": 80, "larger_place": 90, "larger_int8": 90}
"""Functions that take several narrow values at a time, and the first GPUs that have the instructions; the others have those
of one, by the same name after `each_`."""

_HOST_ELEMENT_TYPES = {8: 10, 9: 8, 10: 9}
"""CUtensorMapDataType of the element types that Triton's compiler numbers otherwise (as its own launcher has it)."""

_TFLOAT32 = 11
"""CUtensorMapDataType of float32 elements that are rounded to TF32 when loaded."""

_ATTR_FRAME_SIZE, _ATTR_REGCOUNT = 0x11, 0x2F  # entries of a cubin's .nv.info section
_FORMAT_SIZED = 4


@functools.cache
def available() -> str | None:
    """None when Triton is installed, else the reason it cannot be used."""
    try:
        if importlib.util.find_spec("triton") is not None:
            return None
    except (ImportError, ValueError):  # what sys.modules holds under its name is no module
        pass
    return "Triton is not installed: pip install triton"


def broken() -> str | None:
    """Why the Triton that is installed cannot be imported, or None. Imports it: ask only when compiling has failed."""
    try:
        importlib.import_module("triton.compiler")
    except Exception as error:
        return f"Triton cannot be imported ({type(error).__name__}: {error}); reinstall it"
    return None


@functools.cache
def toolchain_id(target: Target) -> str:
    """Everything a cubin depends on beside its source: Triton, ptxas, architecture, options and our device functions."""
    spec = importlib.util.find_spec("triton") if available() is None else None
    if spec is None or spec.origin is None:
        return f"no triton; {target.key}"
    ptxas = _ptxas_version(Path(spec.origin).parent / "backends/nvidia/bin", target)
    paths = (path for pattern in _DEVICE_FILES for path in sorted(Path(__file__).parent.glob(pattern)))
    texts = b"".join(path.read_bytes() for path in paths)
    helpers = hashlib.sha256(texts).hexdigest()[:16]
    version = importlib.metadata.version("triton")
    return f"triton {version}; ptxas {ptxas}; {target.key}; {sorted(_OPTIONS.items())}; helpers {helpers}"


def _ptxas_version(directory: Path, target: Target) -> str:
    """What the assembler that Triton takes for `target` says of itself: asking takes 3 ms, hashing its 32 MB 60."""
    name = "ptxas-blackwell" if target.is_blackwell else "ptxas"
    given = os.environ.get(f"TRITON_{name.upper().replace('-', '_')}_PATH")
    for path in (given, directory / name):  # as Triton does, which takes its own where the given one does not run
        if path:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
                return said.strip().splitlines()[-1]
    return "none"


def warm_up() -> None:
    """Pay Triton's import and its hash of itself (about a second) once, before worker processes are forked."""
    _environment()
    import triton.compiler
    from triton.runtime.cache import triton_key

    triton_key()
    assert triton.compiler.compile
    triton_libdevice.install()


def read_device_functions() -> None:
    """Let Triton parse the functions that printed kernels import, once for all forks of this process."""
    import triton

    for name in ("triton_helpers", *(f"templates.{each}" for each in ("gemm", "conv", "attention"))):
        module = importlib.import_module(f"fxopt.codegen.{name}")
        for function in vars(module).values():
            if isinstance(function, triton.JITFunction):
                assert function.cache_key
                function.parse()


def _environment() -> None:
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"


def compile_triton(source: KernelSource, target: Target, directory: Path | None = None) -> tuple[bytes, dict[str, Any]]:
    """The cubin of `source` for `target`, and the JSON data that the launcher needs.

    Only `text`, `entry` and `compile_options` of the source are used. Temporary files go to `directory` (default: the
    system's). meta: name, num_warps, shared (bytes), parameters ("ptr", "i32", "i64" or "tensor_map" each), tensor_maps (one
    for each parameter of that kind, see `runtime.tensor_map`), scratch_pointers, n_regs, n_spills (bytes of stack frame per
    thread), chained (whether it may be launched early, see `triton_chain`). Raises whatever Triton raises when the kernel
    does not compile; ValueError when it needs scratch memory, which the launcher does not provide, or when products may read
    registers that are written meanwhile (`triton_in_flight`).
    """
    _environment()
    with tempfile.TemporaryDirectory(prefix="fxopt-triton-", dir=directory) as scratch:
        compiled = _compile(source, target.arch, Path(scratch), binary_only=True)
        cubin: bytes = compiled.asm["cubin"]
        return cubin, _meta(source, compiled.metadata, cubin) | {"chained": _is_chained(source, target.arch)}


def compile_to_text(source: KernelSource, target: Target, stage: str) -> str:
    """An intermediate form of `source` ("ttir", "ttgir", "llir", "ptx"), for tests and dumps."""
    with tempfile.TemporaryDirectory(prefix="fxopt-triton-") as scratch:
        return str(_compile(source, target.arch, Path(scratch), binary_only=False).asm[stage])


def _compile(source: KernelSource, arch: int, scratch: Path, binary_only: bool) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    text = triton_chain.chained(source.text, source.entry) if _is_chained(source, arch) else source.text
    for name, first in _PACKING.items():
        text = text if arch >= first else text.replace(f"h.{name}(", f"h.each_{name}(")
    function = _load(text, source.entry, scratch)
    options = source.compile_options
    signature = options["signature"] | dict.fromkeys(options["constexprs"], "constexpr")
    order = list(signature)
    pointers = [p for p in options["aligned"] if not signature[p].startswith(_DESCRIPTOR)]
    attrs = {(order.index(p),): [["tt.divisibility", 16]] for p in pointers}
    ast = ASTSource(function, signature, constexprs=options["constexprs"], attrs=attrs)
    flags = _OPTIONS | {"num_warps": options["num_warps"], "num_stages": options["num_stages"], "debug": options["asserts"]}
    flags |= {"maxnreg": options["registers"]} if "registers" in options else {}
    with triton.knobs.cache.scope(), triton.knobs.compilation.scope(), triton.knobs.runtime.scope():
        triton.knobs.cache.dir = str(scratch / "cache")
        triton.knobs.compilation.store_binary_only = binary_only
        if binary_only and Target.cuda(arch).is_hopper:
            triton.knobs.runtime.add_stages_inspection_hook = _refuse_written_while_read
        return triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=flags)


def _refuse_written_while_read(backend: Any, stages: dict[str, Any], *others: Any) -> None:
    """Have the compiler's stage that makes TTGIR raise ValueError for what `triton_in_flight` finds in that."""
    make = stages["ttgir"]

    def checked(module: Any, metadata: dict[str, Any]) -> Any:
        made = make(module, metadata)
        if (reason := triton_in_flight.written_while_read(str(made))) is not None:
            raise ValueError(reason)
        return made

    stages["ttgir"] = checked


def _is_chained(source: KernelSource, arch: int) -> bool:
    return arch >= triton_chain.FIRST_ARCH and bool(source.compile_options.get("chained", True))


def _load(text: str, entry: str, scratch: Path) -> Any:
    """The JIT function; Triton reads its source through `inspect`, so it must come from a real file."""
    path = scratch / "fxopt_kernel.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, entry)


def _meta(source: KernelSource, metadata: Any, cubin: bytes) -> dict[str, Any]:
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError("the kernel needs Triton's scratch memory, which fxopt does not allocate")
    signature = source.compile_options["signature"]
    usage = resource_usage(cubin)
    return {
        "name": metadata.name,
        "num_warps": metadata.num_warps,
        "shared": metadata.shared,
        "parameters": [_kind(t) for t in signature.values()],
        "tensor_maps": _tensor_maps(source, metadata),
        "scratch_pointers": SCRATCH_POINTERS,
        "n_regs": usage.get("registers", 0),
        "n_spills": usage.get("stack", 0),
    }


def _kind(parameter_type: str) -> str:
    if parameter_type.startswith(_DESCRIPTOR):
        return "tensor_map"
    return "ptr" if parameter_type.startswith("*") else parameter_type


def _tensor_maps(source: KernelSource, metadata: Any) -> list[dict[str, Any]]:
    """Geometry (the source's) and encoding (the compiler's) of each parameter that is a tensor descriptor.

    The block that the hardware copies may be a part of the one that the kernel asks for, so the compiler's counts.
    """
    described = source.compile_options.get("tensor_maps", {})
    names = [p for p, t in source.compile_options["signature"].items() if t.startswith(_DESCRIPTOR)]
    if len(names) != len(metadata.tensordesc_meta or ()):
        raise ValueError("the compiler has no tensor maps for this target")
    maps = []
    for name, encoding in zip(names, metadata.tensordesc_meta or (), strict=True):
        if encoding["fp4_padded"]:
            raise ValueError("padded 4-bit elements have no tensor map here")
        number = _TFLOAT32 if described[name].get("rounds_to_tf32") else encoding["elem_type"]
        maps.append(
            {field: described[name][field] for field in ("shape", "strides", "offset", "steps") if field in described[name]}
            | {"block": list(encoding["block_size"]), "swizzle": encoding["swizzle"], "itemsize": encoding["elem_size"]}
            | {"element_type": _HOST_ELEMENT_TYPES.get(number, number)}
        )
    return maps


def resource_usage(cubin: bytes) -> dict[str, int]:
    """`registers` and `stack` bytes per thread of a cubin's kernel, from its ELF section .nv.info."""
    found: dict[str, int] = {}
    for name, data in _sections(cubin):
        if name != ".nv.info":
            continue
        at = 0
        while at + 4 <= len(data):
            form, attribute, size = struct.unpack_from("<BBH", data, at)
            if form == _FORMAT_SIZED:
                key = {_ATTR_REGCOUNT: "registers", _ATTR_FRAME_SIZE: "stack"}.get(attribute)
                if key is not None and size >= 8:
                    found[key] = max(found.get(key, 0), struct.unpack_from("<I", data, at + 8)[0])
                at += 4 + size
            else:
                at += 4
    return found


def _sections(elf: bytes) -> list[tuple[str, bytes]]:
    """(name, contents) of the sections of a 64-bit little-endian ELF file; empty for anything else."""
    if elf[:6] != b"\x7fELF\x02\x01":
        return []
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_size) for i in range(count)]
    strings = headers[names_index][4]
    out = []
    for name, kind, _flags, _address, offset, size in headers:
        start = strings + name
        text = elf[start : elf.index(b"\0", start)].decode()
        out.append((text, elf[offset : offset + size] if kind != 8 else b""))  # 8: no bits in the file
    return out
