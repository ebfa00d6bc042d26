"""One nest as the text of one Triton kernel: header, index computation, passes over the row, stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, dropwhile, takewhile

import torch

from fxopt.codegen import triton_ops as ops
from fxopt.codegen.configs.demands import BYTE_RUN, byte_run, one_access, read_again, shared_operands
from fxopt.codegen.triton_chain import OTHERS_END
from fxopt.codegen.triton_config import TritonConfig, next_power_of_2, part_count
from fxopt.codegen.triton_emit import Emitter
from fxopt.codegen.triton_groups import group_size, with_group_sums
from fxopt.codegen.triton_halves import with_common_halves
from fxopt.codegen.triton_index import INT32_LIMIT, INT32_MAX, fits_int32, int32_limits
from fxopt.codegen.triton_memory import tight
from fxopt.codegen.triton_names import kernel_name
from fxopt.codegen.triton_narrow import with_narrow_choices
from fxopt.codegen.triton_reduce import accumulate, close_accumulators, open_accumulators, working_dtype
from fxopt.codegen.triton_scopes import Frame, Instance, Names
from fxopt.codegen.triton_tiling import Axis, Tiling, accumulator_dtype, tile
from fxopt.codegen.triton_values import has_slow_path, is_clamped, reduced_dtype, saturated
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, Sym, floordiv, mul, symbol
from fxopt.ir.kernel import KernelSource
from fxopt.ir.loops import (
    SUMMED_COLUMNS,
    Const,
    IndexValue,
    Load,
    Nest,
    Op,
    Reduce,
    Scalar,
    Scan,
    Store,
    holds_reduction,
    postorder,
)
from fxopt.ir.region import Region

_ATOMIC = (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64)
_BODIES = ("narrow", "wide")
NUM_STAGES = 1
"""Part of every kernel's compile options, as Triton's own default (3) would stage the loads of a loop through shared memory,
which only pays where elements are used more than once."""
PREAMBLE = """import triton
import triton.language as tl
from triton.language.extra import libdevice

from fxopt.codegen import triton_helpers as h"""


@dataclass
class _Kernel:
    """A kernel being printed."""

    entry: str
    region: Region
    tiling: Tiling
    config: TritonConfig
    names: Names
    frame: Frame
    emitter: Emitter


@dataclass(frozen=True)
class _Loop:
    """A loop over the row: the lines that make its mask, its direction, and the eviction policy of what it loads."""

    masks: list[str]
    backwards: bool
    eviction: str


def print_kernel(region: Region, config: TritonConfig, stage: str | None = None) -> KernelSource:
    """The kernel of `region` in configuration `config` (its `split` is ignored here).

    `stage` names a part of a split reduction. Raises UnsupportedError for dtypes and atomics that Triton does not have, and
    where programs do not hold whole groups of the points that are summed over.
    """
    region = with_group_sums(region)
    if config.x_block % group_size(region.nest):
        raise UnsupportedError("a program would hold parts of groups")
    region = replace(region, nest=with_common_halves(with_narrow_choices(with_salts(region.nest))))
    names = Names()
    limits = int32_limits(region, _tiling(region, config))
    if limits == ():
        return _finish([_print(region, config, stage, names, index64=False)])
    wide = _print(region, config, stage, names, index64=True)
    if limits is None:
        return _finish([wide])
    return _finish([_print(region, config, stage, names, index64=False), wide], limits)


def _tiling(region: Region, config: TritonConfig) -> Tiling:
    return tile(region, "rows" if config.rows else "tiles" if config.y_block > 1 else "flat")


def _print(region: Region, config: TritonConfig, stage: str | None, names: Names, index64: bool) -> _Kernel:
    kernel = _open(region, config, stage, names, index64)
    if _takes_turns(kernel):
        _print_parts(kernel)
    elif kernel.tiling.reduces and not config.persistent:
        _print_looped(kernel)
    else:
        _print_straight(kernel)
    return kernel


def _open(region: Region, config: TritonConfig, stage: str | None, names: Names, index64: bool) -> _Kernel:
    tiling = _tiling(region, config)
    blocks = {"x": "XB"}
    if tiling.reduces:
        blocks = {"x": "XB", "r": "RB"}
    elif tiling.y.symbols:
        blocks = {"y": "YB", "x": "XB"}
    single = frozenset(a for a, size in (("x", config.x_block), ("y", config.y_block)) if a in blocks and size == 1)
    in_parts = config.programs > 0 or any(
        s.mode == "part" for s in tiling.nest.stores
    )  # whose loop fetches blocks ahead, and no scalars
    sizes = {"x": config.x_block, "y": config.y_block, "r": config.r_block}
    run = byte_run(tiling) if all(sizes[a] == 1 or sizes[a] >= BYTE_RUN for a in blocks) else 0
    frame = Frame(tiling, index64, {}, blocks, frozenset() if in_parts else single, single, run)
    if config.rows and config.y_block > 1:
        frame.several, frame.byte_run = config.y_block, one_access(tiling)
    looped = tiling.reduces and not config.persistent
    if config.stages == 1 and (config.rows or not tiling.y.symbols):
        frame.kept = (shared_operands if looped else read_again)(tiling, region.buffers)
    along = tiling.nest.reduced if looped else tiling.nest.points
    emitter = Emitter(frame, names, config.r_block if looped else 0, along)
    return _Kernel(kernel_name(tiling, stage), region, tiling, config, names, frame, emitter)


def with_salts(nest: Nest) -> Nest:
    """`nest` with the number that each random op adds to its graph's seed as a kernel parameter: every dropout of a model is
    then one and the same text."""
    changed: dict[Scalar, Scalar] = {}
    for node in postorder(nest.roots):
        args = tuple(changed.get(a, a) for a in node.args)
        new = node if args == node.args else node.rebuild(args, {})
        if isinstance(new, Op) and new.name in ops.RANDOM:
            new = Op(new.name, (_salted(new.args[0]), *new.args[1:]), new.dtype)
        changed[node] = new
    if all(node is new for node, new in changed.items()):
        return nest
    return replace(nest, stores=tuple(s.transformed({}, changed.__getitem__) for s in nest.stores))


def _salted(seed: Scalar) -> Scalar:
    """`seed` as a sum of what varies and a symbol of known value."""
    base, salt = seed, 0
    if isinstance(seed, Op) and seed.name == "add" and isinstance(seed.args[1], Const):
        base, salt = seed.args[0], int(seed.args[1].value)
    if isinstance(base, Const) or not 0 <= salt <= INT32_MAX:
        return seed
    known = symbol(Sym(f"salt{salt}", lo=salt, hi=salt))
    return Op("add", (base, IndexValue(known)), seed.dtype)


def _block_size(kernel: _Kernel, axis: str) -> int:
    config, extent = kernel.config, kernel.tiling.r.extent
    if axis == "r" and config.persistent:
        if not isinstance(extent, int):
            raise UnsupportedError("a row of unknown length cannot be held in registers")
        return next_power_of_2(extent)
    return {"x": config.x_block, "y": config.y_block, "r": config.r_block}[axis]


def row_value(region: Region, length: int, names: Names) -> tuple[list[str], str]:
    """(statements, the value that they compute, [1, RB]) of what the only store of `region`, over one row of `length`
    elements, a power of two, stores. They name that RB and 1 XB; accesses are 32 bits wide."""
    kernel = _open(region, TritonConfig(1, r_block=length), None, names, index64=False)
    if int32_limits(region, kernel.tiling) != ():
        raise UnsupportedError("a row that may be far away")
    outer = kernel.emitter.outer
    outer += [f"r = {_lanes(kernel, 'r')}", *_axis_lines(kernel, "r")]
    value = kernel.emitter.value(kernel.tiling.nest.stores[0].value)
    return outer, value


# index computation


def _lanes(kernel: _Kernel, axis: str) -> str:
    """tl.arange along `axis`, shaped for the tile, in the index type."""
    block = kernel.frame.blocks[axis]
    order = list(kernel.frame.blocks)
    where = ", ".join(":" if a == axis else "None" for a in order)
    text = f"tl.arange(0, {block})" + (f"[{where}]" if len(order) > 1 else "")
    return f"{text}.to(tl.int64)" if kernel.frame.index64 else text


def _point_lines(kernel: _Kernel) -> list[str]:
    """Program id to x (and y) indices."""
    lines = [_program_line(kernel)]
    if "y" not in kernel.frame.blocks:
        lines.append(_position_line(kernel, "x", "pid"))
        return lines + _axis_lines(kernel, "x")
    columns = kernel.emitter.index_text(_blocks_along(kernel, "x"))
    lines += [_position_line(kernel, "x", f"pid % {columns}"), _position_line(kernel, "y", f"pid // {columns}")]
    if kernel.frame.several > 1:
        lines.append(f"y_base = pid // {columns} * YB")
    return lines + _axis_lines(kernel, "x") + _axis_lines(kernel, "y")


def _program_line(kernel: _Kernel) -> str:
    number = "(tl.num_programs(0) - 1 - tl.program_id(0))" if kernel.region.backwards else "tl.program_id(0)"
    return f"pid = {number}{'.to(tl.int64)' if kernel.frame.index64 else ''}"


def _position_line(kernel: _Kernel, axis: str, number: str) -> str:
    if axis in kernel.frame.scalars:
        return f"{axis} = {number}"
    return f"{axis} = {number} * {kernel.frame.blocks[axis]} + {_lanes(kernel, axis)}"


def _blocks_along(kernel: _Kernel, axis: str) -> Int:
    points: Axis = getattr(kernel.tiling, axis)
    size = _block_size(kernel, axis)
    return floordiv(points.extent + (size - 1), size)


def _axis_lines(kernel: _Kernel, name: str) -> list[str]:
    """The mask of an axis, when it needs one."""
    axis: Axis = getattr(kernel.tiling, name)
    lines = []
    extent, size = axis.extent, _block_size(kernel, name)
    if name in kernel.frame.scalars:
        return []
    if not isinstance(extent, int) or extent == 0 or extent % size:
        kernel.frame.masks[name] = f"{name}_mask"
        lines.append(f"{name}_mask = {name} < {kernel.emitter.index_text(extent)}")
    return lines


# stores


def _store_varies(kernel: _Kernel, store: Store) -> bool:
    return bool(frozenset(kernel.tiling.nest.reduced) & store.symbols())


def _prepare(kernel: _Kernel, stores: list[Store], eviction: str = "") -> list[str]:
    return _prepared(kernel.region, kernel.frame, kernel.emitter, stores, eviction)


def _prepared(region: Region, frame: Frame, emitter: Emitter, stores: Sequence[Store], eviction: str = "") -> list[str]:
    """Print what `stores` need and return the store statements themselves."""
    lines = []
    for store in stores:
        for _, bound in store.indirect:
            emitter.value(bound)
        value = emitter.value(store.value)
        if store.mode == "sums":
            lines.append(_sums_line(frame, emitter, store, value))
        else:
            lines.append(_store_line(region, frame, emitter, store, value, eviction))
    return lines


def _sums_line(frame: Frame, emitter: Emitter, store: Store, value: str) -> str:
    """The statement of a store of mode "sums": runs of columns are in a block or out of it as a whole."""
    index = emitter.index_in_runs(store.index, frame.tiling.lines["x"], f"h.run_ends(x, {SUMMED_COLUMNS})")
    masks = [frame.masks["y"]] if "y" in frame.masks else []
    if "x" in frame.masks:
        masks.append(f"(h.run_ends({frame.masks['x']}.to(tl.int32), {SUMMED_COLUMNS}) > 0)")
    mask = f", {' & '.join(masks)}" if masks else ""
    pointer = f"{emitter.names.buffer(store.buffer)} + {tight(index)}"
    return f"tl.store({pointer}, h.run_sums({value}, {SUMMED_COLUMNS}){mask})"


def straight_line(region: Region, frame: Frame, emitter: Emitter) -> list[str]:
    """The statements of `region`, which does not reduce, on one block of its points."""
    nest = frame.tiling.nest
    statements = _prepared(region, frame, emitter, nest.stores)
    return [*emitter.outer, *_barrier(nest), *statements]


def _store_line(region: Region, frame: Frame, emitter: Emitter, store: Store, value: str, eviction: str) -> str:
    dtype = region.buffers[store.buffer].dtype
    varies = bool(frozenset(frame.tiling.nest.reduced) & store.symbols())
    wanted = frozenset(a for a in frame.blocks if a != "r" or varies)
    emitter.bind(store.indirect, ())
    address = emitter.address(store.index, _address_symbols(store), wanted, block=True)
    text = f"{emitter.names.buffer(store.buffer)} + {tight(address)}"
    pointer = emitter.pointer(text, store.index, dtype, wanted)
    mask = " & ".join(frame.masks[a] for a in frame.blocks if a in wanted and a in frame.masks)  # of one point as well
    if accumulator_dtype(dtype) != dtype:
        inner = saturated(store.value)
        if inner is not None and store.value.dtype == dtype:
            value = f"h.saturated_to_float8e4({emitter.value(inner)})"
        else:
            value = ops.narrowed(value, dtype, is_clamped(store.value))
    if store.value.dtype != dtype:
        raise ValueError(f"{store.buffer} holds {dtype}, not {store.value.dtype}: lowering must cast what it stores")
    if store.mode == "set":
        extra = f", {mask}" if mask else ""
        policy = f', eviction_policy="{eviction}"' if eviction else ""
        return f"tl.store({pointer}, {value}{extra}{policy})"
    if dtype not in _ATOMIC:
        raise UnsupportedError(f"no atomic addition of {dtype} in Triton")
    return f'tl.atomic_add({pointer}, {value}{f", {mask}" if mask else ""}, sem="relaxed")'


def _address_symbols(store: Store) -> frozenset[Sym]:
    """Index symbols that vary the store's address, through its bindings as well."""
    return Load(store.buffer, store.index, torch.int8, store.indirect).symbols()


def _barrier(nest: Nest) -> list[str]:
    """In place: no thread may store an element before another, holding a copy of it, has loaded it."""
    return ["tl.debug_barrier()"] if set(nest.reads()) & set(nest.writes()) else []


# the three shapes of a kernel


def _print_straight(kernel: _Kernel) -> None:
    """No loop: every value is one block."""
    outer = kernel.emitter.outer
    outer += _point_lines(kernel)
    if "r" in kernel.frame.blocks:
        outer.append(f"r = {_lanes(kernel, 'r')}")
        outer += _axis_lines(kernel, "r")
    _load_steady(kernel)
    _load_before_branches(kernel)
    if "r" in kernel.frame.blocks:
        _load_ahead(kernel)
    statements = _prepare(kernel, list(kernel.tiling.nest.stores))
    outer += [*_barrier(kernel.tiling.nest), *statements]


def _load_steady(kernel: _Kernel) -> None:
    """Print the loads that need not wait until other kernels have ended before those that do."""
    emitter = kernel.emitter
    roots = [emitter.instance(v, ()) for s in kernel.tiling.nest.stores for v in s.roots]
    loads = [node for node, guards in emitter.walk(roots) if isinstance(node, Load) and not guards]
    steady = [n for n in loads if n.buffer in kernel.region.steady and not n.indirect]
    for node in steady:
        emitter.value(node)
    if steady:
        emitter.outer.append(OTHERS_END)


def _load_before_branches(kernel: _Kernel) -> None:
    """Print the loads that would follow a division, but no reduction, before the first one: no load is moved across the
    branch to a division's slow path, so a row would be asked for only when the divisor of all its elements is there."""
    emitter = kernel.emitter
    roots = [emitter.instance(v, ()) for s in kernel.tiling.nest.stores for v in s.roots]
    before = list(takewhile(lambda i: not isinstance(i[0], Reduce | Scan), emitter.walk(roots)))
    for node, guards in dropwhile(lambda i: not has_slow_path(i[0]), before):
        if isinstance(node, Load) and not any(map(has_slow_path, postorder((node, *guards)))):
            emitter.value(node, guards)


def _load_ahead(kernel: _Kernel) -> None:
    """Print the loads of the innermost reductions before the first of these, if each has loads of its own: warps wait for
    each other in a reduction, and what is loaded after it is in flight only then. So with what each point picks by an index
    that it loads, which is two loads in turn."""
    emitter, nest = kernel.emitter, kernel.tiling.nest
    roots = [emitter.instance(v, ()) for s in nest.stores for v in s.roots]
    loads = [i for i in emitter.walk(roots) if isinstance(i[0], Load)]
    if group_size(nest) > 1:  # sums of sums: everything is waited for once
        for node, guards in loads:
            emitter.value(node, guards)
        return
    levels = _levels(emitter, roots)
    found: dict[frozenset[Instance], list[Instance]] = {}
    for reduction in levels[0] if levels else ():
        own = [i for i in emitter.walk(emitter.operands(reduction)) if isinstance(i[0], Load)]
        found.setdefault(frozenset(own), own)
    picked = [i for i in loads if i[0].indirect and not _waits(i[0], nest)]  # type: ignore[attr-defined]
    apart = len(found) > 1 and all(own.difference(*(f for f in found if f is not own)) for own in found)
    for node, guards in dict.fromkeys((*chain.from_iterable(found.values()), *picked)) if picked or apart else ():
        emitter.value(node, guards)


def _load_points(kernel: _Kernel, stores: Sequence[Store]) -> None:
    """Print the loads of the points themselves, beside what `stores` reduce, before the loops: after them nothing else is in
    flight, and the program would wait for memory once more."""
    emitter, nest = kernel.emitter, kernel.tiling.nest
    roots = [emitter.instance(v, ()) for s in stores for v in s.roots]
    for node, guards in emitter.walk(roots):
        if isinstance(node, Load) and not node.indirect and not guards and not _waits(node, nest):
            emitter.value(node)


def _waits(load: Scalar, nest: Nest) -> bool:
    """Whether `load` varies along the reduced axis or depends on what is reduced."""
    return bool(frozenset(nest.reduced) & load.symbols()) or holds_reduction(load)


def _print_looped(kernel: _Kernel) -> None:
    """One loop over the row per reduction depth, then one for the stores that vary along it and could not be made before.

    Every second loop runs backwards, from what the one before has just read: where all rows in flight are more than the L2
    cache holds, it still holds their ends.
    """
    emitter, stores = kernel.emitter, kernel.tiling.nest.stores
    emitter.outer += _point_lines(kernel)
    emitter.outer.append(f"r_lane = {_lanes(kernel, 'r')}")
    along = _axis_lines(kernel, "r")
    levels = _levels(emitter, [emitter.instance(v, ()) for s in stores for v in s.roots])
    varying = [s for s in stores if _store_varies(kernel, s)]
    early = varying if len(levels) == 1 and not any(map(_stores_reduction, varying)) else []
    at_last = "" if kernel.region.reread else "evict_first"
    _load_points(kernel, [s for s in stores if s not in varying])
    turning, backwards = not any(isinstance(n, Scan) for n in postorder(kernel.tiling.nest.roots)), False
    for number, level in enumerate(levels, 1):
        last = number == len(levels) and len(early) == len(varying)
        counts = any(isinstance(n, Reduce) and n.kind == "welford" for n, _ in level)  # it counts its steps
        backwards = turning and number > 1 and not backwards and not counts
        _reduction_pass(kernel, level, _Loop(along, backwards, at_last if last else "evict_last"), early)
    at_end = _prepare(kernel, [s for s in stores if s not in varying])
    if varying and not early:
        emitter.open_loop(at_last)
        statements = _prepare(kernel, varying, at_last)  # lest they drive out rows that are still to be read again
        body = emitter.close_loop()
        last_loop = _Loop(along, turning and bool(levels) and not backwards, at_last)
        emitter.outer += _loop(kernel, last_loop, [*body, *_barrier(kernel.tiling.nest), *statements])
    emitter.outer += [*_barrier(kernel.tiling.nest), *at_end]


def _takes_turns(kernel: _Kernel) -> bool:
    return kernel.config.programs > 0 or any(s.mode == "part" for s in kernel.tiling.nest.stores)


def _print_parts(kernel: _Kernel) -> None:
    """One loop over a part of the points, whole rows at a time, with the sums over those points, if any, in registers.

    The programs take turns, so that all of them together walk through memory in order, and not as many streams as there are
    programs, far from each other.
    """
    emitter, outer = kernel.emitter, kernel.emitter.outer
    rows = kernel.tiling.x.extent
    outer += [_program_line(kernel), f"r = {_lanes(kernel, 'r')}", *_axis_lines(kernel, "r")]
    outer.append(f"x_lane = {_lanes(kernel, 'x')}")
    turned = kernel.region.backwards
    along = ["x = x_base + x_lane", *_axis_lines(kernel, "x")]
    if turned:
        along.insert(0, f"x_base = ({tight(emitter.index_text(rows))} - 1) // XB * XB - x_done")
    shape = f"[{', '.join(kernel.frame.blocks.values())}]"
    parts = [s for s in kernel.tiling.nest.stores if s.mode == "part"]
    emitter.open_loop("")
    statements = _prepare(kernel, [s for s in kernel.tiling.nest.stores if s.mode != "part"])
    sums = []
    for number, store in enumerate(parts):
        value = f"tl.broadcast_to({emitter.value(store.value)}, {shape})"
        if "x" in kernel.frame.masks:
            value = f"tl.where(x_mask, {value}, 0.0)"
        sums.append(f"s{number} += {value}")
    body = [*emitter.close_loop(), *_barrier(kernel.tiling.nest), *statements, *sums]
    outer += [f"s{n} = tl.zeros({shape}, {ops.compute_type(s.value.dtype)})" for n, s in enumerate(parts)]
    ahead = kernel.config.stages
    turn = emitter.index_text(mul(part_count(rows, kernel.config), kernel.config.x_block))
    walk = f"pid * XB, {emitter.index_text(rows)}, {turn}"
    steps = f"tl.range({walk}, num_stages={ahead})" if ahead > 1 else f"range({walk})"
    outer += [f"for {'x_done' if turned else 'x_base'} in {steps}:", *(f"    {line}" for line in [*along, *body])]
    row = emitter.index_text(kernel.tiling.r.extent)
    for number, store in enumerate(parts):
        address = f"{kernel.names.buffer(store.buffer)} + (pid * {tight(row)} + {tight(emitter.index_text(store.index))})"
        mask = f", {kernel.frame.masks['r']}" if "r" in kernel.frame.masks else ""
        outer.append(f"tl.store({address}, tl.sum(s{number}, 0, keep_dims=True){mask})")


def _stores_reduction(store: Store) -> bool:
    return any(isinstance(n, Reduce) for n in postorder(store.roots))


def _loop(kernel: _Kernel, loop: _Loop, body: list[str]) -> list[str]:
    extent = kernel.emitter.index_text(kernel.tiling.r.extent)
    ahead = kernel.config.stages
    steps = f"tl.range(0, {extent}, RB, num_stages={ahead})" if ahead > 1 else f"range(0, {extent}, RB)"
    if loop.backwards:  # not a negative step: Triton would no longer know what the index is a multiple of
        lines = [f"for r_done in {steps}:", f"    r_base = ({tight(extent)} - 1) // RB * RB - r_done"]
    else:
        lines = [f"for r_base in {steps}:"]
    return [*lines, *(f"    {line}" for line in ("r = r_base + r_lane", *loop.masks, *body))]


def _levels(emitter: Emitter, roots: list[Instance]) -> list[list[Instance]]:
    """Reductions grouped by how deeply they nest, innermost first."""
    depth: dict[Instance, int] = {}
    levels: dict[int, list[Instance]] = {}
    for instance in emitter.walk(roots):
        below = max((depth.get(o, 0) for o in emitter.operands(instance)), default=0)  # 0: loads that are printed already
        if isinstance(instance[0], Reduce):
            below += 1
            levels.setdefault(below, []).append(instance)
        depth[instance] = below
    return [levels[d] for d in sorted(levels)]


def _reduction_pass(kernel: _Kernel, level: list[Instance], loop: _Loop, early: list[Store]) -> None:
    """The loop of one reduction depth, which also makes the stores in `early`: no later loop reads memory again."""
    emitter = kernel.emitter
    fresh = []
    emitter.open_loop(loop.eviction)
    block = replace(emitter.block(), together=_neighbours(kernel))
    for node, guards in level:
        assert isinstance(node, Reduce)
        names, new = emitter.state_names(node, guards, looped=True)
        if new:
            dtype = working_dtype(reduced_dtype(node))
            emitter.outer += open_accumulators(node.kind, names, dtype, block)
            operands = emitter.reduce_operands(node, guards)
            assert emitter.inner is not None
            emitter.inner += accumulate(node.kind, names, operands, dtype, block)
            fresh.append((node.kind, names, dtype))
    statements = _prepare(kernel, early)
    body = [*emitter.close_loop(), *(_barrier(kernel.tiling.nest) if early else []), *statements]
    emitter.outer += _loop(kernel, loop, body)
    for kind, names, dtype in fresh:
        emitter.outer += close_accumulators(kind, names, dtype, block)
    for node, guards in level:
        assert isinstance(node, Reduce)
        names, _ = emitter.state_names(node, guards, looped=True)
        emitter.define((node, guards), emitter.result(node, names))


def _neighbours(kernel: _Kernel) -> int:
    """How many neighbours of a contiguous row a thread takes in one access of the narrowest type; 1 down columns, where they
    are other threads'."""
    if not kernel.tiling.inner_reduction:
        return 1
    own = kernel.config.x_block * kernel.config.r_block // (32 * kernel.config.num_warps)
    return max(1, min(own, kernel.config.r_block, 16 // min(a.itemsize for a in kernel.tiling.accesses)))


# the finished kernel


def _finish(kernels: list[_Kernel], limits: tuple[Int, ...] = ()) -> KernelSource:
    """The source of one kernel, from its body or from one body per index type (int32 first, taken within `limits`)."""
    kernel = kernels[-1]
    names, config = kernel.names, kernel.config
    lines = kernel.emitter.outer if len(kernels) == 1 else _dispatch(kernel, limits)
    pointers = list(names.buffers.values())
    blocks = {name: _block_size(kernel, axis) for axis, name in kernel.frame.blocks.items()}
    functions = (
        [] if len(kernels) == 1 else [_function(k, n, k.emitter.outer) for k, n in zip(kernels, _BODIES, strict=True)]
    )
    text = "\n\n\n".join([PREAMBLE, *functions, _function(kernel, kernel.entry, lines)]) + "\n"
    types = {p: ops.POINTER_TYPE[kernel.region.buffers[b].dtype] for b, p in names.buffers.items()}
    options = {
        "signature": types | {p: size_type(s, kernel.frame.index64) for s, p in names.sizes.items()},
        "constexprs": blocks,
        "aligned": pointers if config.aligned else [],
        "num_warps": config.num_warps,
        "num_stages": NUM_STAGES,
        "asserts": bool(names.errors),
    }
    return KernelSource(
        language="triton",
        entry=kernel.entry,
        text=text,
        buffers=tuple(names.buffers),
        sizes=tuple(size_expressions(names)),
        grid=(part_count(kernel.tiling.x.extent, kernel.config) if _takes_turns(kernel) else _grid(kernel), 1, 1),
        compile_options=options,
        errors=tuple(names.errors),
    )


def size_type(sym: Sym, index64: bool) -> str:
    """How a size is passed: in the index type, or in int64 when it is a number of its own that may not fit."""
    return "i32" if not index64 and fits_int32(symbol(sym)) else "i64"


def _function(kernel: _Kernel, name: str, lines: list[str]) -> str:
    params = [*kernel.names.buffers.values(), *kernel.names.sizes.values()]
    params += [f"{b}: tl.constexpr" for b in kernel.frame.blocks.values()]
    return "\n".join(["@triton.jit", f"def {name}({', '.join(params)}):", *(f"    {line}" for line in lines)])


def _dispatch(wide: _Kernel, limits: tuple[Int, ...]) -> list[str]:
    """Sizes that are not known to be small decide at run time, in the kernel, whether int32 indices do: every program of a
    launch takes the same branch, and one division in int64 costs more than the test."""
    tests = [f"({wide.emitter.index_text(x)} < {INT32_LIMIT})" for x in limits]
    names, blocks = wide.names, list(wide.frame.blocks.values())
    sizes = list(names.sizes.values())
    calls = []
    for name, own in zip(_BODIES, ([f"{s}.to(tl.int32)" for s in sizes], sizes), strict=True):
        calls.append(f"    {name}({', '.join([*names.buffers.values(), *own, *blocks])})")
    return [f"if {' & '.join(tests)}:", calls[0], "else:", calls[1]]


def size_expressions(names: Names) -> list[Int]:
    return [s.lo if s.lo == s.hi else symbol(s) for s in names.sizes]


def _grid(kernel: _Kernel) -> Int:
    blocks = _blocks_along(kernel, "x")
    return mul(blocks, _blocks_along(kernel, "y")) if "y" in kernel.frame.blocks else blocks
