"""Poolings whose windows lie side by side, as the epilogue of the convolution before them.

Where the rows of a product come pool by pool, a tile holds all places of a pool, and what is computed from them (the largest
of them after a bias and relu, their mean) needs the product nowhere but in registers. Nothing is asked of what that is: any
region serves that reads each place of a pool once, and nothing else of the convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from fxopt.ir.exprs import Int, Sym, add, free_symbols, mul, ravel, symbol, unravel
from fxopt.ir.loops import Load, Nest, Scalar, Store, transform
from fxopt.ir.region import BufferSpec, Matrix, Pair, Patches, Region
from fxopt.lower.align import along, mappings
from fxopt.lower.joining import remap
from fxopt.lower.products import Product
from fxopt.lower.values import cast

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


def places_read(region: Region, name: str) -> list[Load]:
    """What each point of `region` loads of buffer `name`; none where it reduces, or does not tell where it does."""
    loads = [load for load in region.nest.loads() if load.buffer == name]
    plain = not region.nest.reduced and region.across is None and not any(load.indirect for load in loads)
    return loads if plain else []


def pooled(product: Product, region: Region, buffers: Mapping[str, BufferSpec]) -> Pooled | None:
    """`product`, a convolution, with its places in the pools that `region` reads; None where it reads anything else."""
    patches, name = product.a, product.result.buffer
    if not isinstance(patches, Patches) or patches.depthwise or patches.transposed or product.result.column != 1:
        return None
    loads = places_read(region, name)
    pool = _pool(loads, patches.places[1], product.result.row)
    if pool is None:
        return None
    counts = (patches.shape[0], patches.places[0] // pool[0], patches.places[1] // pool[1])
    inside = replace(patches, pool=pool, places=(counts[1] * pool[0], counts[2] * pool[1]))
    row, column = Sym("x1", size=counts[0] * counts[1] * counts[2]), product.axes[2]
    own = replace(product, a=inside, axes=(None, row, column), result=Matrix(name, 0, 0, product.sizes[3], 1))
    more = [load for load in (*product.scales, product.addend) if load is not None]
    if any(not free_symbols(load.index) <= {column} for load in more):
        return None
    registers = tuple(f"{name}.product{k}" for k in range(pool[0] * pool[1]))
    places = _places(product, patches.places, counts, pool, symbol(row))
    values = dict(zip(places, (own.value(r, buffers[name].dtype) for r in registers), strict=True))
    nest = _over_pools(region.nest, own, values)
    return None if nest is None else Pooled(own, nest, registers)


def _pool(loads: Sequence[Load], width: int, step: Int) -> Pair | None:
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


def _places(product: Product, places: Pair, counts: tuple[int, int, int], pool: Pair, row: Int) -> list[Int]:
    """Where the convolution's result has the places of pool number `row`, in the channel of `product`."""
    image, down, across = unravel(row, counts)
    out: list[Int] = []
    for r in range(pool[0]):
        for c in range(pool[1]):
            place = (image, add(mul(down, pool[0]), r), add(mul(across, pool[1]), c))
            number = ravel(place, (counts[0], *places))
            out.append(add(add(product.result.offset, mul(number, product.result.row)), symbol(product.axes[2])))
    return out


def _over_pools(nest: Nest, product: Product, values: Mapping[Int, Scalar]) -> Nest | None:
    """`nest` over pools and channels, with `values` for what it loads of the convolution; None if it loads anything else."""
    name = product.result.buffer
    own = Nest(product.points, (), (Store(name, product.index, next(iter(values.values()))),))
    for mapping in chain(along(nest, own, name), mappings(nest, own)):
        mapped = remap(nest, mapping, own)
        if all(load.index in values for load in mapped.loads() if load.buffer == name):

            def value(load: Load) -> Scalar | None:
                return cast(values[load.index], load.dtype) if load.buffer == name else None

            stores = tuple(s.transformed({}, lambda v: transform(v, {}, value)) for s in mapped.stores)
            return replace(mapped, stores=stores)
    return None
