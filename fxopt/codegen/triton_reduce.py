"""Reductions and scans as Triton text: of one block held in registers, or accumulated lane by lane over a loop of blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.codegen.triton_ops import compute_type, identity, literal
from fxopt.codegen.triton_tiling import accumulator_dtype

LAST_INDEX = 2**63 - 1

_COMBINE = {
    "sum": "h.addition",
    "prod": "h.product",
    "max": "h.largest",
    "min": "h.smallest",
    "any": "h.either",
    "all": "h.both",
    "cumsum": "h.addition",
    "cumprod": "h.product",
    "cummax": "h.maximum",
    "cummin": "h.minimum",
    "logcumsumexp": "h.log_add_exp",
    "argmax": "h.arg_max",
    "argmin": "h.arg_min",
    "welford": "h.welford",
    "softmax_stats": "h.softmax_stats",
    "weighted_softmax": "h.weighted_softmax",
}


def combine(kind: str) -> str:
    """The device function that joins two states of `kind`."""
    return _COMBINE[kind]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a reduction of values of `dtype` is carried out in: bool and narrow integers in int32 (wrapped when stored)."""
    if not dtype.is_floating_point and dtype.itemsize < 4:
        return torch.int32
    return accumulator_dtype(dtype)


@dataclass(frozen=True)
class BlockInfo:
    """The block a reduction sees: tile shape, the mask of its r lanes (None when all are valid), the row's length and, where
    that is a power of two, its reciprocal. In a loop along a contiguous row, a thread has `together` neighbours of each
    block."""

    shape: str
    mask: str | None
    count: str
    share: str | None = None
    together: int = 1

    def average(self, total: str, own: str) -> str:
        """`total`, of type `own`, over the row's length: correctly rounded."""
        if self.share is not None:
            return f"{total} * {self.share}"
        return f"h.divide({total}, tl.full([], {self.count}, {own}))"

    def fill(self, value: str, neutral: str) -> str:
        """`value` broadcast over the tile with invalid lanes neutral."""
        whole = f"tl.broadcast_to({value}, {self.shape})"
        return whole if self.mask is None else f"tl.where({self.mask}, {whole}, {neutral})"


def neutral_states(kind: str, dtype: torch.dtype) -> list[tuple[str, str]]:
    """(value, Triton type) of each state of `kind` before it has seen an element; `dtype` is the working dtype."""
    own = compute_type(dtype)
    if kind in ("argmax", "argmin"):
        return [(literal(identity(kind, dtype)), own), (str(LAST_INDEX), "tl.int64")]
    if kind == "welford":
        return [("0.0", own)] * 3
    if kind == "softmax_stats":
        return [(literal(float("-inf")), own), ("0.0", own)]
    if kind == "weighted_softmax":
        return [(literal(float("-inf")), own), *[("0.0", own)] * 3]
    return [(literal(identity(kind, dtype)), own)]


def persistent(
    kind: str, names: list[str], operands: list[str], dtype: torch.dtype, block: BlockInfo, exponential: str
) -> list[str]:
    """Lines that reduce the whole row at once into `names` (one per state; the unused welford count is left out)."""
    neutral = neutral_states(kind, dtype)
    if kind == "sum":
        return [f"{names[0]} = tl.sum({block.fill(operands[0], neutral[0][0])}, 1, keep_dims=True)"]
    if kind == "welford":
        zero = "0.0"
        total = f"tl.sum({block.fill(operands[0], zero)}, 1, keep_dims=True)"
        centered = block.fill(f"({operands[0]} - {names[0]})", zero)
        return [
            f"{names[0]} = {block.average(total, compute_type(dtype))}",
            f"{names[1]}_d = {centered}",
            f"{names[1]} = tl.sum({names[1]}_d * {names[1]}_d, 1, keep_dims=True)",
        ]
    if kind == "softmax_stats":
        low = literal(float("-inf"))
        term = block.fill(f"{exponential}({operands[0]} - {names[0]})", "0.0")
        return [
            f"{names[0]} = tl.reduce({block.fill(operands[0], low)}, 1, h.largest, keep_dims=True)",
            f"{names[1]} = tl.sum({term}, 1, keep_dims=True)",
        ]
    if kind == "weighted_softmax":
        low = literal(float("-inf"))
        away = f"{operands[1]} - h.finite_base({names[0]})"
        terms = [f"{exponential}({operands[0]} - {names[0]})", f"{operands[2]} * ({away})", operands[2]]
        summed = ", ".join(block.fill(term, "0.0") for term in terms)
        return [
            f"{names[0]} = tl.reduce({block.fill(operands[0], low)}, 1, h.largest, keep_dims=True)",
            f"{', '.join(names[1:])} = tl.reduce(({summed}), 1, h.three_sums, keep_dims=True)",
        ]
    filled = [block.fill(v, n) for v, (n, _) in zip(operands, neutral, strict=True)]
    if len(filled) == 1:
        return [f"{names[0]} = tl.reduce({filled[0]}, 1, {combine(kind)}, keep_dims=True)"]
    return [f"{', '.join(names)} = tl.reduce(({', '.join(filled)}), 1, {combine(kind)}, keep_dims=True)"]


def open_accumulators(kind: str, names: list[str], dtype: torch.dtype, block: BlockInfo) -> list[str]:
    """Lines before the loop."""
    states = zip(names, neutral_states(kind, dtype), strict=True)
    shape = block.shape
    if kind in ("softmax_stats", "weighted_softmax") and block.together > 1:
        shape = f"{shape.removesuffix(']')} // {block.together}]"
    lines = [f"{n}_a = tl.full({shape}, {v}, {t})" for n, (v, t) in states]
    return lines[:2] if kind == "welford" else lines


def accumulate(kind: str, names: list[str], operands: list[str], dtype: torch.dtype, block: BlockInfo) -> list[str]:
    """Lines inside the loop (over `r_base`, in steps of RB) that join one block into the lanes' accumulators."""
    states = [f"{n}_a" for n in names]
    own = compute_type(dtype)
    if kind == "welford":
        value = block.fill(operands[0], states[0])  # a lane past the row's end stays as it is
        step = f"h.welford_step({states[0]}, {states[1]}, {value}, tl.full([], r_base // RB + 1, {own}))"
        return [f"{states[0]}, {states[1]} = {step}"]
    if kind == "softmax_stats":
        low = literal(float("-inf"))
        if block.together > 1:
            return [f"{', '.join(states)} = h.softmax_step({', '.join(states)}, {block.fill(operands[0], low)})"]
        values = [block.fill(operands[0], low), block.fill(f"tl.full([], 1.0, {own})", "0.0")]
    elif kind == "weighted_softmax":
        values = [block.fill(v, n) for v, n in zip(operands, (literal(float("-inf")), "0.0", "0.0"), strict=True)]
        return [f"{', '.join(states)} = h.weighted_softmax_step({', '.join([*states, *values])})"]
    else:
        values = [block.fill(v, n) for v, (n, _) in zip(operands, neutral_states(kind, dtype), strict=True)]
    if kind == "sum":
        return [f"{states[0]} += {values[0]}"]
    return [f"{', '.join(states)} = {combine(kind)}({', '.join([*states, *values])})"]


def close_accumulators(kind: str, names: list[str], dtype: torch.dtype, block: BlockInfo) -> list[str]:
    """Lines after the loop: the lanes joined into one value per row."""
    states = [f"{n}_a" for n in names]
    if kind == "welford":  # every lane has seen one element per step, but for those past the row's end in the last one
        seen = f"(({block.count} - r_lane + (RB - 1)) // RB).to({compute_type(dtype)})"
        joined = f"tl.reduce(({states[0]}, {states[1]}, {states[2]}), 1, {combine(kind)}, keep_dims=True)"
        return [f"{states[2]} = tl.broadcast_to({seen}, {block.shape})", f"{', '.join(names)} = {joined}"]
    if kind == "sum":
        return [f"{names[0]} = tl.sum({states[0]}, 1, keep_dims=True)"]
    if len(names) == 1:
        return [f"{names[0]} = tl.reduce({states[0]}, 1, {combine(kind)}, keep_dims=True)"]
    lines = [f"{', '.join(names)} = tl.reduce(({', '.join(states)}), 1, {combine(kind)}, keep_dims=True)"]
    if kind in ("softmax_stats", "weighted_softmax"):
        lines.append(f"{names[1]} = h.softmax_total({names[0]}, {names[1]})")
    return lines


def state_count(kind: str, looped: bool) -> int:
    """How many variables hold the result of `kind` (a looped welford carries its count as well)."""
    if kind == "welford":
        return 3 if looped else 2
    if kind == "weighted_softmax":
        return 4
    return 2 if kind in ("argmax", "argmin", "softmax_stats") else 1


def scan_block(name: str, kind: str, value: str, dtype: torch.dtype, block: BlockInfo) -> list[str]:
    """Lines for an inclusive scan of one block."""
    filled = block.fill(value, literal(identity(kind, dtype)))
    return [f"{name}_f = {filled}", f"{name} = tl.associative_scan({name}_f, 1, {combine(kind)})"]


def scan_carry(name: str, kind: str) -> list[str]:
    """Lines after `scan_block` that put what earlier blocks gave in front, and carry on."""
    op = combine(kind)
    return [
        f"{name} = {op}({name}_c, {name})",
        f"{name}_c = {op}({name}_c, tl.reduce({name}_f, 1, {op}, keep_dims=True))",
    ]
