"""A nest on one block of a product, as a function that a template calls: an epilogue, or what is done to scores.

What an epilogue loads of operands that vary along one dimension of the block at most may be a function of its own, which a
template calls once for several blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from fxopt.codegen import triton_ops as ops
from fxopt.codegen.triton_emit import Emitter
from fxopt.codegen.triton_index import int32_limits
from fxopt.codegen.triton_memory import widened
from fxopt.codegen.triton_nest import size_expressions, size_type, straight_line, with_salts
from fxopt.codegen.triton_scopes import Frame, Names
from fxopt.codegen.triton_tiling import Axis, Tiling, accesses_of
from fxopt.ir.exprs import Int, Sym
from fxopt.ir.loops import Load
from fxopt.ir.region import Region

_AXES = {"z": 0, "y": 1, "x": 2}
_BLOCKS = {"y": "YB", "x": "XB"}

MOST_VECTOR_BYTES = 4
"""Bytes for each column that are loaded for a whole tile: its threads hold them beside all of their accumulators."""


@dataclass(frozen=True)
class BlockFunction:
    """A printed function: its text, the entry's parameters for it in order with their types, the buffers and sizes that they
    are."""

    text: str
    parameters: dict[str, str]
    buffers: tuple[str, ...]
    sizes: tuple[Int, ...]

    @property
    def extra(self) -> str:
        """The tuple of its parameters, as an entry passes it."""
        return f"({', '.join(self.parameters)},)" if self.parameters else "()"


def print_block(
    name: str,
    region: Region,
    axes: tuple[Sym | None, Sym, Sym],
    extents: tuple[tuple[Int | str, bool], tuple[Int | str, bool]],
    registers: Mapping[str, str],
    reserved: int,
    returns: bool = False,
    more: Mapping[str, Int] = MappingProxyType({}),
    aligned: tuple[Int, int] | None = None,
    below: bool = False,
    vectors: tuple[str, bool] | None = None,
) -> BlockFunction:
    """`name(*registers, y, x, z, extra)` of `region`, which does not reduce and whose points are `axes`: batch, row, column.

    `registers` maps the buffers that are products to parameters, blocks in float32. `extents` are the sizes of rows and
    columns, or texts for them, each with whether a block may go beyond, which is masked. `more` are int32 parameters of the
    entry beside those that the region asks for, by name. The entry's first `reserved` buffers are the
    template's. The function stores what the region stores or, if it `returns`, gives the value of its only store, which is a
    buffer in registers, too. With `aligned`, an index and a number: what each row of a block has there begins at
    a multiple of so many elements. Columns may begin `below` 0, which is masked.

    With `vectors`, a name and whether its columns may go beyond theirs, a function `vectors(y, x, z, extra)` is printed
    before: it returns a tuple of what `loads_for_tiles` finds, which the other takes from the end of `extra`.
    """
    region = replace(region, nest=with_salts(region.nest))
    tiling = _tiling(region, axes)
    index64 = int32_limits(region, tiling) != ()
    sizes_of = dict(zip(_BLOCKS, extents, strict=True))
    masks = {axis: f"{axis}_mask" for axis, (_, ragged) in sizes_of.items() if ragged}
    names = Names(reserved=reserved)
    frame = Frame(tiling, index64, masks, _BLOCKS, frozenset({"z"}), aligned=aligned)
    emitter = Emitter(frame, names, registers=registers)
    loads = loads_for_tiles(region, axes, registers) if vectors else ()
    whole = {axis: f"{axis}_mask" for axis in _BLOCKS if (vectors and vectors[1] if axis == "x" else axis in masks)}
    ahead = Emitter(replace(frame, masks=whole), names, registers=registers)
    held = {f"w{k}": ahead.loaded(node) for k, node in enumerate(loads)}
    for own, node in zip(held, loads, strict=True):
        emitter.outer.append(f"f{own} = {widened(node, own)}")
        emitter.define((node, ()), f"f{own}")
    if returns:
        value = emitter.value(tiling.nest.stores[0].value)
        body = [*emitter.outer, f"return {value}"]
    else:
        body = straight_line(region, frame, emitter)
    kinds = {p: ops.POINTER_TYPE[region.buffers[b].dtype] for b, p in names.buffers.items()}
    kinds |= {p: size_type(s, index64) for s, p in names.sizes.items()}
    kinds |= dict.fromkeys(more, "i32")
    wide = [f"{axis} = {axis}.to(tl.int64)" for axis in tiling.lines] if index64 else []
    within = {axis: f"{axis}_mask = {axis} < {size}" for axis, (size, _) in sizes_of.items()}
    given = [*wide, *(within[axis] for axis in masks), *(["x_mask = x_mask & (x >= 0)"] * below)]
    first = next(iter(registers.values()))
    blocks = {block: f"{first}.shape[{dim}]" for dim, block in enumerate(_BLOCKS.values())}
    texts = [_function(f"{name}({', '.join(registers.values())}, y, x, z, extra)", [*kinds, *held], blocks, given, body)]
    if vectors:
        blocks = {block: f"{axis}.shape[{dim}]" for dim, (axis, block) in enumerate(_BLOCKS.items())}
        body = [*(f"{own} = {text}" for own, text in held.items()), f"return {_tuple(held)}"]
        given = [*wide, *(within[axis] for axis in whole)]
        texts.insert(0, _function(f"{vectors[0]}(y, x, z, extra)", kinds, blocks, given, body))
    return BlockFunction("\n\n\n".join(texts), kinds, tuple(names.buffers), (*size_expressions(names), *more.values()))


def _function(head: str, extra: Iterable[str], blocks: Mapping[str, str], given: list[str], body: list[str]) -> str:
    """A function that unpacks `extra`, knows the sizes `blocks` that `body` mentions, and the lines `given`."""
    lines = [f"{_tuple(extra)} = extra"] if extra else []
    lines += [f"{block}: tl.constexpr = {size}" for block, size in blocks.items() if any(block in text for text in body)]
    return "\n".join(["@triton.jit", f"def {head}:", *(f"    {line}" for line in [*lines, *given, *body])])


def _tuple(names: Iterable[str]) -> str:
    """As a target of an assignment, or after `return`."""
    parts = list(names)
    return f"{', '.join(parts)}{',' * (len(parts) == 1)}"


def loads_for_tiles(region: Region, axes: tuple[Sym | None, Sym, Sym], registers: Collection[str]) -> tuple[Load, ...]:
    """What the nest of `region` loads, whatever else it finds, from operands that vary along rows, or columns, or neither
    (`axes` and `registers`: `print_block`). Of those along columns as many as fit `MOST_VECTOR_BYTES`.
    """
    emitter = Emitter(Frame(_tiling(region, axes), False, {}, _BLOCKS), Names(), registers=dict.fromkeys(registers, ""))
    roots = [emitter.instance(v, ()) for s in region.nest.stores for v in s.roots]
    _, row, column = axes
    found, room, written = [], MOST_VECTOR_BYTES, region.nest.writes()
    for node, guards in emitter.walk(roots):
        if not isinstance(node, Load) or guards or node.indirect or node.buffer in registers or node.buffer in written:
            continue
        along = node.symbols()
        if {row, column} <= along or (column in along and node.dtype.itemsize > room):
            continue
        room -= node.dtype.itemsize * (column in along)
        found.append(node)
    return tuple(found)


def _tiling(region: Region, axes: tuple[Sym | None, Sym, Sym]) -> Tiling:
    """Rows are y, columns are x, the batch is one number."""
    lines = {name: sym for name, k in _AXES.items() if (sym := axes[k]) is not None}
    sizes = {name: spec.dtype.itemsize for name, spec in region.buffers.items()}
    x, y = Axis((axes[2],)), Axis((axes[1],))
    return Tiling(region.nest, region.nest, lines, x, y, Axis(()), accesses_of(region.nest, sizes))
