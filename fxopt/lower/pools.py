"""Poolings whose windows lie side by side, as the epilogue of the convolution before them.

Where the rows of a product come pool by pool, a tile holds all places of a pool, and what is computed from them (the largest
of them after a bias and relu, their mean) needs the product nowhere but in registers. Nothing is asked of what that is: any
region serves that reads each place of a pool once, and nothing else of the convolution.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from fxopt.ir.exprs import Int, Sym, add, coefficient, mul, ravel, symbol, unravel
from fxopt.ir.loops import Load, Nest, Scalar, Store, transform
from fxopt.ir.region import Matrix, Pair, Patches, Region, Step
from fxopt.lower.align import along, mappings
from fxopt.lower.joining import compared, in_register, remap
from fxopt.lower.products import Product

SIZES = (2, 4)
"""Places of a pool: each takes a share of a tile's registers, whose number is a power of two."""


@dataclass(frozen=True)
class Pooled:
    """`product`, a point of which is a pool of places, and `nest`, which computes something of it: there the places of a
    pool are the loads of `registers`, in order.
    """

    product: Product
    nest: Nest
    registers: tuple[str, ...]


def pooling_after(steps: Sequence[Step | None], k: int, name: str) -> tuple[int, ...]:
    """The first of `steps` after `k`, which makes `name`, that reads several places of that; or the first that reads one,
    and the first that reads several of what it makes. Neither: ().
    """
    regions = {j: s for j in range(k + 1, len(steps)) if isinstance(s := steps[j], Region)}
    read = {j: len(_places_read(region, name)) for j, region in regions.items() if name in region.nest.reads()}
    if (several := next((j for j, count in read.items() if count > 1), None)) is not None:
        return (several,)
    for first in [*read][:1]:
        for made in regions[first].writes():
            later = (j for j, region in regions.items() if j > first and len(_places_read(region, made)) > 1)
            if (pooling := next(later, None)) is not None:
                return first, pooling
    return ()


def _places_read(region: Region, name: str) -> list[Load]:
    """What each point of `region` loads of buffer `name`; none where it reduces, or does not tell where it does."""
    loads = [load for load in region.nest.loads() if load.buffer == name]
    plain = not region.nest.reduced and region.across is None and not any(load.indirect for load in loads)
    return loads if plain else []


def pooled(product: Product, made: Nest, held: str, region: Region, wanted: Collection[str]) -> Pooled | None:
    """`product`, a convolution, with its places in the pools that `region` reads; None where it reads anything else.

    `made` stores what is computed of each place, with the product in registers `held`, and `region` reads what it stores; of
    that the buffers in `wanted` are stored as well.
    """
    patches = product.a
    if not isinstance(patches, Patches) or patches.depthwise or patches.transposed:
        return None
    row, column = product.axes[1:]
    loads = {s: _places_read(region, s.buffer) for s in made.stores if s.buffer in region.reads()}
    read = max(loads, key=lambda s: len(loads[s]), default=None)
    pool = None if read is None else _pool(loads[read], patches.places[1], coefficient(read.index, row))
    if read is None or pool is None:
        return None
    counts = (patches.shape[0], patches.places[0] // pool[0], patches.places[1] // pool[1])
    if not all(counts):
        return None
    inside = replace(patches, pool=pool, places=(counts[1] * pool[0], counts[2] * pool[1]))
    if wanted and inside.places != patches.places:
        return None  # what is in no pool is computed nowhere
    name, pools = product.result.buffer, Sym("x1", size=counts[0] * counts[1] * counts[2])
    own = replace(product, a=inside, axes=(None, pools, column), result=Matrix(name, 0, 0, product.sizes[3], 1))
    registers = tuple(f"{held}{k}" for k in range(pool[0] * pool[1]))
    numbers = _places(patches.places, counts, pool, symbol(pools))
    of_places = [s for n, r in zip(numbers, registers, strict=True) for s in _of_place(made, {row: n}, held, r, own.index)]
    nest = _over_pools(region.nest, own, read.buffer, {(s.buffer, s.index): s.value for s in of_places})
    if nest is None:
        return None
    stores = (*(s for s in of_places if s.buffer in wanted), *nest.stores)
    return Pooled(own, replace(nest, stores=stores), registers)


def _of_place(made: Nest, place: dict[Sym, Int], held: str, register: str, index: Int) -> list[Store]:
    """The stores of `made` at `place`, with the product in `register`, at `index` there, for what is in `held`."""

    def in_register(load: Load) -> Scalar | None:
        return Load(register, index, load.dtype) if load.buffer == held else None

    return [s.transformed(place, lambda v: transform(v, place, in_register)) for s in made.stores]


def _pool(loads: Sequence[Load], width: int, step: Int | None) -> Pair | None:
    """Rows and columns of the pool that `loads` are of rows of so many places, each a `step` from the next."""
    apart = [add(load.index, mul(loads[0].index, -1)) for load in loads]
    known = sorted({n for n in apart if isinstance(n, int)})
    if len(known) < len(apart) or len(known) not in SIZES or not isinstance(step, int):
        return None
    distances = [n - known[0] for n in known]
    columns = next((n for n in range(1, len(known)) if distances[n] != n * step or n == width), len(known))
    rows = len(known) // columns
    wanted = [(r * width + c) * step for r in range(rows) for c in range(columns)]
    return (rows, columns) if distances == wanted else None


def _places(places: Pair, counts: tuple[int, int, int], pool: Pair, number: Int) -> list[Int]:
    """The numbers of the places of pool `number` among all `places` of `counts[0]` images."""
    image, down, across = unravel(number, counts)
    corners = [(add(mul(down, pool[0]), r), add(mul(across, pool[1]), c)) for r in range(pool[0]) for c in range(pool[1])]
    return [ravel((image, *corner), (counts[0], *places)) for corner in corners]


def _over_pools(nest: Nest, product: Product, name: str, values: Mapping[tuple[str, Int], Scalar]) -> Nest | None:
    """`nest`, which reads `name`, over pools and channels, with `values` for what it loads of their buffers; None if it
    loads anything else of these.
    """
    held = {buffer for buffer, _ in values}
    own = Nest(product.points, (), (Store(name, product.index, next(iter(values.values()))),))
    for mapping in chain(along(nest, own, name), mappings(nest, own)):
        mapped = remap(nest, mapping, own)
        loads = [load for load in mapped.loads() if load.buffer in held]
        if all((load.buffer, load.index) in values and not load.indirect for load in loads):
            exact = compared(mapped.roots)

            def value(load: Load, exact: Container[Load] = exact) -> Scalar | None:
                return in_register(values[load.buffer, load.index], load, exact) if load.buffer in held else None

            return replace(mapped, stores=tuple(s.transformed({}, lambda v: transform(v, {}, value)) for s in mapped.stores))
    return None
