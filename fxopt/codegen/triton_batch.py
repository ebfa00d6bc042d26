"""A batch as one Triton kernel, which knows neither the sizes nor the number of its members.

Each program does one block of one member. What it needs to know is in three tables in device memory (`runtime/batch.py`
makes them): the member of each program, each member's number of elements and first program, and its buffers' addresses. The
body exists twice. Where a block is whole and all its memory aligned, accesses are 16 bytes wide and not masked; the last
block of a member, and members that are not aligned, take the other one. So nothing is assumed of alignment.
"""

from __future__ import annotations

from dataclasses import replace

from fxopt.codegen import triton_ops as ops
from fxopt.codegen.configs.points import batch_configs
from fxopt.codegen.triton_config import TritonConfig
from fxopt.codegen.triton_emit import Emitter
from fxopt.codegen.triton_names import kernel_name
from fxopt.codegen.triton_nest import NUM_STAGES, PREAMBLE, straight_line
from fxopt.codegen.triton_scopes import Frame, Names
from fxopt.codegen.triton_tiling import tile
from fxopt.errors import UnsupportedError
from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import Batch
from fxopt.runtime.batch import ALIGNMENT, program_count
from fxopt.target import Target

_TABLES = {"owners": "*i32", "sizes": "*i64", "table": "*i64"}
_NAME_OF_THE_REST = "left"


def batch_candidates(batch: Batch, target: Target) -> list[TritonConfig]:
    """Configurations of `batch` for `target`, best first by the cost model. Never empty."""
    return batch_configs(tile(batch.body), batch.elements, target)


def print_batch(batch: Batch, config: TritonConfig, target: Target) -> KernelSource:
    """The kernel of `batch` in configuration `config` (its `x_block` and `num_warps`).

    Raises UnsupportedError when Triton has no form for the body or `target`.
    """
    if not target.compiles_triton:
        raise UnsupportedError(f"Triton does not generate code for {target.name}")
    entry = kernel_name(tile(batch.body), "batch")
    text = "\n\n\n".join([PREAMBLE, _body(batch, whole=True), _body(batch, whole=False), _kernel(entry, batch)]) + "\n"
    options = {
        "signature": dict(_TABLES),
        "constexprs": {"XB": config.x_block},
        "aligned": list(_TABLES),
        "num_warps": config.num_warps,
        "num_stages": NUM_STAGES,
        "asserts": False,
        "chained": False,  # its tables are copied before it, and optimizers write what other kernels take for constant
    }
    return for_members(KernelSource("triton", entry, text, (), compile_options=options), batch)


def for_members(source: KernelSource, batch: Batch) -> KernelSource:
    """`source`, printed for a batch with the same body, run on the members of `batch`."""
    return replace(
        source,
        buffers=tuple(name for names in batch.arguments for name in names),
        members=batch.elements,
        grid=(program_count(batch.elements, source.compile_options["constexprs"]["XB"]), 1, 1),
    )


def _body(batch: Batch, whole: bool) -> str:
    """What a program does once it has its addresses: a function of those of its block, and of what is left of the member."""
    names = Names()
    buffers = {name: names.buffer(name) for name in batch.body.buffers}  # in the table's order
    frame = Frame(tile(batch.body), False, {} if whole else {"x": "x_mask"}, {"x": "XB"})
    emitter = Emitter(frame, names)
    lines = [_pointer(batch, name, whole) for name in buffers]
    lines.append("x = tl.arange(0, XB)")
    if not whole:
        lines.append(f"x_mask = x < {_NAME_OF_THE_REST}")
    lines += straight_line(batch.body, frame, emitter)
    rest = [] if whole else [_NAME_OF_THE_REST]
    head = f"def {'whole' if whole else 'part'}({', '.join([*_addresses(batch), *rest])}, XB: tl.constexpr):"
    return "\n".join(["@triton.jit", head, *(f"    {line}" for line in lines)])


def _pointer(batch: Batch, name: str, aligned: bool) -> str:
    spec = batch.body.buffers[name]
    text = f"{_address(name)}.to(tl.pointer_type({ops.tl_type(spec.dtype)}))"
    return f"{name} = tl.multiple_of({text}, {ALIGNMENT})" if aligned and spec.shape else f"{name} = {text}"


def _address(name: str) -> str:
    return name.replace("b", "a")


def _addresses(batch: Batch) -> list[str]:
    return [_address(name) for name in batch.body.buffers]


def _kernel(entry: str, batch: Batch) -> str:
    walked = {name: spec.dtype.itemsize for name, spec in batch.body.buffers.items() if spec.shape}
    lines = [
        "pid = tl.program_id(0)",
        "member = tl.load(owners + pid).to(tl.int64)",
        "at = (pid - tl.load(sizes + member * 2 + 1)) * XB",
        f"{_NAME_OF_THE_REST} = tl.load(sizes + member * 2) - at",
        f"row = table + member * {len(batch.body.buffers)}",
    ]
    for k, name in enumerate(batch.body.buffers):
        moved = f" + at * {walked[name]}" if name in walked else ""
        lines.append(f"{_address(name)} = tl.load(row + {k}){moved}")
    together = " | ".join(map(_address, walked))
    given = ", ".join(_addresses(batch))
    lines += [
        f"if ({_NAME_OF_THE_REST} >= XB) & ((({together}) & {ALIGNMENT - 1}) == 0):",
        f"    whole({given}, XB)",
        "else:",
        f"    part({given}, {_NAME_OF_THE_REST}, XB)",
    ]
    head = f"def {entry}({', '.join(_TABLES)}, XB: tl.constexpr):"
    return "\n".join(["@triton.jit", head, *(f"    {line}" for line in lines)])
