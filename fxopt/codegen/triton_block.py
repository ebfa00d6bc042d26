"""A nest on one block of a product, as a function that a template calls: an epilogue, or what is done to scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from fxopt.codegen import triton_ops as ops
from fxopt.codegen.triton_emit import Emitter, Frame, Names
from fxopt.codegen.triton_index import int32_limits
from fxopt.codegen.triton_nest import size_expressions, size_type, straight_line, with_salts
from fxopt.codegen.triton_tiling import Axis, Tiling, accesses_of
from fxopt.ir.exprs import Int, Sym
from fxopt.ir.region import Region

_AXES = {"z": 0, "y": 1, "x": 2}
_BLOCKS = {"y": "YB", "x": "XB"}


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
) -> BlockFunction:
    """`name(*registers, y, x, z, extra)` of `region`, which does not reduce and whose points are `axes`: batch, row, column.

    `registers` maps the buffers that are products to parameters, blocks in float32. `extents` are the sizes of rows and
    columns, or texts for them, each with whether a block may go beyond, which is masked. `more` are int32 parameters of the
    entry beside those that the region asks for, by name. The entry's first `reserved` buffers are the
    template's. The function stores what the region stores or, if it `returns`, gives the value of its only store, which is a
    buffer in registers, too. With `aligned`, an index and a number: what each row of a block has there begins at
    a multiple of so many elements. Columns may begin `below` 0, which is masked.
    """
    region = replace(region, nest=with_salts(region.nest))
    tiling = _tiling(region, axes)
    index64 = int32_limits(region, tiling) != ()
    sizes_of = dict(zip(_BLOCKS, extents, strict=True))
    masks = {axis: f"{axis}_mask" for axis, (_, ragged) in sizes_of.items() if ragged}
    names = Names(reserved=reserved)
    frame = Frame(tiling, index64, masks, _BLOCKS, frozenset({"z"}), aligned=aligned)
    emitter = Emitter(frame, names, registers=registers)
    if returns:
        value = emitter.value(tiling.nest.stores[0].value)
        body = [*emitter.outer, f"return {value}"]
    else:
        body = straight_line(region, frame, emitter)
    kinds = {p: ops.POINTER_TYPE[region.buffers[b].dtype] for b, p in names.buffers.items()}
    kinds |= {p: size_type(s, index64) for s, p in names.sizes.items()}
    kinds |= dict.fromkeys(more, "i32")
    first = next(iter(registers.values()))
    lines = [f"{', '.join(kinds)}{',' * (len(kinds) == 1)} = extra"] if kinds else []
    blocks = [f"{block}: tl.constexpr = {first}.shape[{dim}]" for dim, block in enumerate(_BLOCKS.values())]
    lines += [line for line, block in zip(blocks, _BLOCKS.values(), strict=True) if any(block in text for text in body)]
    lines += [f"{axis} = {axis}.to(tl.int64)" for axis in tiling.lines] if index64 else []
    lines += [f"{mask} = {axis} < {sizes_of[axis][0]}" for axis, mask in masks.items()]
    lines += ["x_mask = x_mask & (x >= 0)"] * below
    head = ["@triton.jit", f"def {name}({', '.join(registers.values())}, y, x, z, extra):"]
    text = "\n".join([*head, *(f"    {line}" for line in [*lines, *body])])
    return BlockFunction(text, kinds, tuple(names.buffers), (*size_expressions(names), *more.values()))


def _tiling(region: Region, axes: tuple[Sym | None, Sym, Sym]) -> Tiling:
    """Rows are y, columns are x, the batch is one number."""
    lines = {name: sym for name, k in _AXES.items() if (sym := axes[k]) is not None}
    sizes = {name: spec.dtype.itemsize for name, spec in region.buffers.items()}
    x, y = Axis((axes[2],)), Axis((axes[1],))
    return Tiling(region.nest, region.nest, lines, x, y, Axis(()), accesses_of(region.nest, sizes))
