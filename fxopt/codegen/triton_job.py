"""What compile workers run. Nothing here imports torch: that takes longer than everything else a helper starts with."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

from fxopt.codegen import triton_build
from fxopt.ir.kernel import KernelSource
from fxopt.target import Target

PROBE = KernelSource(
    "triton",
    "fx_probe",
    "import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef fx_probe(b0):\n    tl.store(b0, 1.0)\n",
    ("b0",),
    compile_options={
        "signature": {"b0": "*fp32"},
        "constexprs": {},
        "aligned": [],
        "num_warps": 1,
        "num_stages": 1,
        "asserts": False,
    },
)
"""A kernel that compiles for every target that Triton compiles for."""

_REHEARSED = replace(PROBE, text=PROBE.text.replace("1.0", "tl.rsqrt(tl.load(b0))"))
"""One that needs libdevice as well."""


def triton_job(source: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel from JSON data to JSON data."""
    kernel = KernelSource("triton", source["entry"], source["text"], (), compile_options=source["compile_options"])
    code, meta = triton_build.compile_triton(kernel, Target(**target))
    return {"code": base64.b64encode(code).decode(), "meta": meta}


def rehearse() -> None:
    """Compile a small kernel, and read the device functions that others import: a worker's first kernel then takes no
    longer than its next ones (0.2 s less). What Triton keeps of it does not depend on the target."""
    triton_build.read_device_functions()
    triton_build.compile_triton(_REHEARSED, Target.cuda(90))
