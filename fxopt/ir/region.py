"""What passes, scheduler, tuner, printers and plan exchange: buffers, library calls and regions. Pure data."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxopt.ir.exprs import Int, Sym, maximum, prod
from fxopt.ir.loops import Load, Nest, Scalar, cast_to, transform


@dataclass(frozen=True)
class BufferSpec:
    """A tensor in memory: `shape` and `strides` in elements (possibly symbolic); `offset` 0 is its first element."""

    name: str
    dtype: torch.dtype
    device: torch.device
    shape: tuple[Int, ...]
    strides: tuple[Int, ...]

    @property
    def extent(self) -> Int:
        """Elements from the first to one past the last that the tensor addresses."""
        if any(s == 0 for s in self.shape):
            return 0
        span: Int = 1
        for size, stride in zip(self.shape, self.strides, strict=True):
            span = span + maximum(size - 1, 0) * stride
        return span

    @property
    def numel(self) -> Int:
        return prod(self.shape)


@dataclass(frozen=True)
class Ref:
    """A tensor argument: the buffer of that name."""

    name: str


@dataclass(frozen=True)
class Size:
    """An integer argument computed from size symbols at run time."""

    expr: Int


def refs(value: Any) -> list[str]:
    """Names of every buffer that an argument value mentions, in order, repeats included."""
    match value:
        case Ref(name):
            return [name]
        case list() | tuple():
            return [n for x in value for n in refs(x)]
        case dict():
            return [n for x in value.values() for n in refs(x)]
    return []


@dataclass(frozen=True)
class Call:
    """A library (ATen or custom) op, called as it is.

    `op` is "namespace::name.overload" (or "local:KEY" for a callable that only this process has, such as a higher-order op
    with its subgraphs). args/kwargs are nested tuples, lists and dicts of Ref, Size and plain constants (None, bool, int,
    float, complex, str, torch.dtype, device, layout, memory_format). `outputs` names the tensors of the result in order,
    flattened; None for one that is not a tensor or that nobody uses. The executor checks that an output has the strides of
    its BufferSpec and copies it into that layout if not. `writes` names buffers that the op changes in place; `effect` says
    that it must keep its place among the other effectful calls (random generators, custom ops that print, ...).
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str | None, ...] = ()
    origin: str = ""
    writes: tuple[str, ...] = ()
    effect: bool = False

    def __hash__(self) -> int:
        return hash((self.op, self.outputs))


@dataclass(frozen=True)
class Alias:
    """`name` is a strided view of buffer `of`; `offset` counts elements from the first element of `of` (not of its
    storage).
    """

    name: str
    of: str
    shape: tuple[Int, ...]
    strides: tuple[Int, ...]
    offset: Int


def base_of(name: str, views: Mapping[str, Alias]) -> str:
    """The buffer in whose memory `name` lies: itself, or what the view of that name is a view of."""
    while name in views:
        name = views[name].of
    return name


@dataclass(frozen=True)
class Region:
    """A loop nest that becomes one kernel, with what is needed to retreat from it.

    `buffers` describes every buffer that is read or written. `nodes` names the FX nodes whose computation it holds:
    they are its reference as ATen calls, and what lowering leaves to the library when the kernel cannot be built. `origins`
    are the qualified names of the modules and ops it came from, for reports.

    `across` is a second nest over the same iterations with the axes exchanged: it sums over the points of `nest`, and its
    own points are the axes that `nest` reduces (gradients of a normalization's input and of its weights). It runs after
    `nest` and loads what that stores at the index stored to; `passed` names buffers that nobody else reads, which a kernel
    for both need not store.

    Of operands larger than the GPU's L2 cache, that holds what was touched last. With `backwards` the programs of a kernel
    start with the last elements, where the region before it has ended; `reread` says that the next region or call touches
    what this one does, which should therefore stay there.

    `steady` names operands that nothing in the plan writes, which a kernel for a GPU may load before others have ended.
    """

    name: str
    nest: Nest
    buffers: dict[str, BufferSpec]
    device: torch.device
    nodes: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    across: Nest | None = None
    passed: frozenset[str] = frozenset()
    backwards: bool = False
    reread: bool = False
    steady: frozenset[str] = frozenset()

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def nests(self) -> tuple[Nest, ...]:
        """The nests in the order in which they run."""
        return (self.nest,) if self.across is None else (self.nest, self.across)

    def reads(self) -> tuple[str, ...]:
        """Buffers loaded, in order of first use."""
        return tuple(dict.fromkeys(name for nest in self.nests for name in nest.reads()))

    def writes(self) -> tuple[str, ...]:
        """Buffers stored to, in order."""
        return tuple(dict.fromkeys(name for nest in self.nests for name in nest.writes()))


@dataclass(frozen=True)
class Batch:
    """Independent regions that do the same to buffers and numbers of elements of their own: one kernel for all.

    `body` is what each does: a nest over one symbol, whose size is the only size symbol, and buffers named b0, b1, ...
    Those of shape () are read at their first element, the others walked element by element. Member k does it to
    `elements[k]` elements of the buffers `arguments[k]`, which `buffers` describes; `members[k]` is the same as a region.
    """

    name: str
    body: Region
    members: tuple[Region, ...]
    arguments: tuple[tuple[str, ...], ...]
    elements: tuple[int, ...]
    buffers: dict[str, BufferSpec]

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def device(self) -> torch.device:
        return self.body.device

    @functools.cached_property
    def origins(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(o for m in self.members for o in m.origins))

    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n for m in self.members for n in m.nest.reads()))

    def writes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n for m in self.members for n in m.nest.writes()))

    def sample(self, nbytes: int) -> Batch:
        """A batch without regions that moves about `nbytes` bytes at most: the first elements, in buffers of its own."""
        specs = list(self.body.buffers.values())
        width = max(1, sum(spec.dtype.itemsize for spec in specs if spec.shape))
        left, elements = max(1, nbytes // width), []
        for count in self.elements:
            if left > 0:
                elements.append(min(count, left))
                left -= count
        arguments = tuple(tuple(f"{k}.{spec.name}" for spec in specs) for k in range(len(elements)))
        buffers = {
            name: replace(spec, name=name, shape=(count,) if spec.shape else ())
            for names, count in zip(arguments, elements, strict=True)
            for name, spec in zip(names, specs, strict=True)
        }
        return Batch(self.name, self.body, (), arguments, tuple(elements), buffers)


@dataclass(frozen=True)
class Matrix:
    """A batch of matrices in memory: element (z, y, x) is number `offset + z * batch + y * row + x * column` of `buffer`."""

    buffer: str
    offset: Int
    batch: Int
    row: Int
    column: Int


Pair = tuple[int, int]
"""Of rows and columns of an image."""


@dataclass(frozen=True)
class Patches:
    """What a window sees of images in memory, as a matrix [M, K]: a row for each place of the window, in the order (image,
    place's row, place's column), and a column for each element under it, in the order (window's row, column, channel).

    Element (n, h, w, c) of the images, whose sizes are `shape`, is number `offset + n * strides[0] + h * strides[1] +
    w * strides[2] + c * strides[3]` of `buffer`. Under element (r, s) of the window at place (y, x) lies the pixel
    (y * stride[0] - padding[0] + r * dilation[0], x * stride[1] - padding[1] + s * dilation[1]), zero outside of the image.

    `depthwise`: each channel is multiplied by a column of its own. Then K counts the window's elements only, and element
    (m, c) of the product is the sum over k of the patch's element (k, c) times element (k, c) of the right operand. With
    `transposed`, which is for depthwise ones only, a row is an element of the window and a column a place: so the gradient
    of the weight is a product with that of the result.

    With a `pool`, whose numbers divide those of `places`, so many rows and columns of places come together: then the order
    of rows is (image, pool's row, pool's column, row in the pool, column in the pool).
    """

    buffer: str
    offset: int
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    window: Pair
    places: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    depthwise: bool = False
    transposed: bool = False
    pool: Pair = (1, 1)

    @property
    def rows(self) -> int:
        return self._taps if self.transposed else self._all_places

    @property
    def columns(self) -> int:
        return self._all_places if self.transposed else self._taps

    @property
    def _all_places(self) -> int:
        return self.shape[0] * self.places[0] * self.places[1]

    @property
    def _taps(self) -> int:
        return self.window[0] * self.window[1] * (1 if self.depthwise else self.shape[3])


@dataclass(frozen=True)
class Quantized:
    """How a right operand [K, N] in few bits, under a floating left one, is to be read (`ir/quantized_ops.py`).

    With 8 `bits` its elements are what is multiplied, and the epilogue has their scales. With 4, row j of the matrix has the
    values of rows j and j + K / 2 in its bytes, and `scale` [K / group, N] is a factor of each.
    """

    bits: int
    group: int
    scale: Matrix | None


@dataclass(frozen=True)
class Contraction:
    """A matrix product and what is computed from it element by element, as one kernel.

    `a` [Z, M, K] times `b` [Z, K, N]; of a convolution, `a` is what its window sees. The points of `region`, which does not
    reduce, are `axes`, the symbols of (batch, row, column), of which the batch is None for a single product. In its nest the
    product is the load of `result`, a buffer in registers, at the index of the product's own element. `buffers` describes
    what memory is read and written.

    With `c`, of the shape and strides of `b`, there are two products (a gated layer): that with `c` is the load of `second`.
    With `ends`, an int32 buffer [G], the rows belong to G groups, one after the other: group g ends before row ends[g] and
    is multiplied by the g-th matrix of `b`, whose batch stride leads there. Rows after the last end have no product.

    `quantized` has, for each product, how its right operand is to be read, if it is of fewer bits than the left one.

    With `pooled` a point's row is not one of the product but a pool of `a`: so many rows one after the other, of which each
    has the load of one of these buffers in registers, the first of which is `result`.

    `tf32`: float32 operands are rounded to TF32 first, as the library does where the user allows it.

    With `row`, a region over one row whose only store is `a`, that is nowhere in memory: each program computes it.

    `region.steady` names operands of the product, too.
    """

    name: str
    a: Matrix | Patches
    b: Matrix
    depth: Int
    result: str
    axes: tuple[Sym | None, Sym, Sym]
    region: Region
    buffers: dict[str, BufferSpec]
    c: Matrix | None = None
    second: str = ""
    tf32: bool = False
    ends: str = ""
    quantized: tuple[Quantized, ...] = ()
    row: Region | None = None
    pooled: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def device(self) -> torch.device:
        return self.region.device

    @property
    def origins(self) -> tuple[str, ...]:
        return self.region.origins

    @property
    def products(self) -> dict[str, Matrix]:
        """The right operand of each product by the buffer in registers that is its result."""
        return {self.result: self.b} | ({} if self.c is None else {self.second: self.c})

    @property
    def registers(self) -> tuple[str, ...]:
        """The buffers that are in no memory: what the nest loads of products."""
        return self.pooled or tuple(self.products)

    @property
    def sizes(self) -> tuple[Int, Int, Int, Int]:
        """Z, M (with `pooled`, the number of pools), K, N."""
        batch, row, column = self.axes
        assert row.size is not None and column.size is not None
        return (1 if batch is None or batch.size is None else batch.size), row.size, self.depth, column.size

    def reduced(self, name: str, axes: tuple[Sym, ...], totals: Mapping[str, Scalar], more: dict[str, BufferSpec]) -> Region:
        """The region `name`, which also reads buffers `more`: there each product is what `totals` has for it, a float32
        computed from sums over `axes`, not in registers.
        """

        def summed(load: Load) -> Scalar | None:
            if load.buffer not in totals:
                return None
            total = totals[load.buffer]
            return cast_to(total, load.dtype)

        nest = self.region.nest
        stores = tuple(s.transformed({}, lambda v: transform(v, {}, summed)) for s in nest.stores)
        buffers = {n: s for n, s in self.region.buffers.items() if n not in totals} | more
        return replace(self.region, name=name, nest=Nest(nest.points, axes, stores), buffers=buffers)

    def reads(self) -> tuple[str, ...]:
        """Buffers read, operands first."""
        left = (self.a.buffer,) if self.row is None else self.row.reads()
        operands = [*left, *(m.buffer for m in self.products.values()), *([self.ends] if self.ends else [])]
        operands += [q.scale.buffer for q in self.quantized if q.scale is not None]
        return tuple(dict.fromkeys((*operands, *(n for n in self.region.reads() if n not in self.registers))))

    def writes(self) -> tuple[str, ...]:
        """Buffers stored to, in order."""
        return self.region.writes()


@dataclass(frozen=True)
class SideBySide:
    """Products of one left operand, each with its epilogue, as one kernel whose programs share them out.

    `parts` have equal sizes and equal strides of their right operands, which lie anywhere; none of them reads what another
    stores.
    """

    name: str
    parts: tuple[Contraction, ...]

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def origins(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(o for part in self.parts for o in part.origins))

    @property
    def buffers(self) -> dict[str, BufferSpec]:
        """What memory is read and written."""
        return {name: spec for part in self.parts for name, spec in part.buffers.items()}

    def reads(self) -> tuple[str, ...]:
        """Buffers read, in order of first use."""
        return tuple(dict.fromkeys(n for part in self.parts for n in part.reads()))

    def writes(self) -> tuple[str, ...]:
        """Buffers stored to, in order."""
        return tuple(dict.fromkeys(n for part in self.parts for n in part.writes()))


@dataclass(frozen=True)
class View:
    """A tensor in memory, `offset` elements into `buffer`; sizes, strides and offset may be symbolic."""

    buffer: str
    shape: tuple[Int, ...]
    strides: tuple[Int, ...]
    offset: Int = 0


@dataclass(frozen=True)
class Strided(View):
    """A tensor in memory of which nothing is symbolic."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Scores:
    """What is done to products of queries and keys before the softmax, element by element.

    The points of `region` are `axes`, the symbols of (head, row, key); heads of all batches are counted together, and None
    where there is one. Its nest has one store, of the scores in float32, in which the product is the load of `product`; both
    are buffers in registers.
    """

    axes: tuple[Sym | None, Sym, Sym]
    product: str
    region: Region

    def __hash__(self) -> int:
        return hash(self.region)

    @property
    def value(self) -> Scalar:
        return self.region.nest.stores[0].value

    def reads(self) -> tuple[str, ...]:
        """Buffers in memory that are read."""
        return tuple(name for name in self.region.reads() if name != self.product)


@dataclass(frozen=True)
class Factors:
    """By what stored operands of few bits are to be multiplied, in float32. None: by one.

    `query` is the buffer of one number; `key` and `value` are broadcast to [B, G, T] by strides of 0.
    """

    query: str | None
    key: Strided | None
    value: Strided | None

    def renamed(self, names: Mapping[str, str]) -> Factors:
        """With other names of buffers."""
        query = None if self.query is None else names[self.query]
        key, value = (None if x is None else replace(x, buffer=names[x.buffer]) for x in (self.key, self.value))
        return Factors(query, key, value)

    @property
    def buffers(self) -> tuple[str, ...]:
        own = [self.query, *(None if x is None else x.buffer for x in (self.key, self.value))]
        return tuple(name for name in own if name is not None)


@dataclass(frozen=True)
class Attention:
    """softmax(query @ key.T * scale + mask) @ value as kernels of ours.

    query [B, H, S, E], key [B, G, T, E], value [B, G, T, Ev] and out [B, H, S, Ev] lie in `buffers`; so does the mask, which
    strides of 0 broadcast to [B, H, S, T]: true where a key is seen, or an addend. A causal mask shows row i the keys up
    to i. With `scores`, these are in the place of scale, mask and causality, and a row of minus infinity is NaN. With
    `factors`, keys and values have 8 bits, and so may the query.
    """

    name: str
    query: Strided
    key: Strided
    value: Strided
    mask: Strided | None
    out: Strided
    causal: bool
    scale: float
    buffers: dict[str, BufferSpec]
    origins: tuple[str, ...] = ()
    scores: Scores | None = None
    factors: Factors | None = None

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def device(self) -> torch.device:
        return self.buffers[self.out.buffer].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the result; without factors that of query, key and value, too."""
        return self.buffers[self.out.buffer].dtype

    @property
    def operands(self) -> tuple[Strided, ...]:
        """What is read; the mask last, if there is one."""
        return (self.query, self.key, self.value, *(() if self.mask is None else (self.mask,)))

    def reads(self) -> tuple[str, ...]:
        """Buffers read, in order of first use."""
        more = () if self.scores is None else self.scores.reads()
        more += () if self.factors is None else self.factors.buffers
        return tuple(dict.fromkeys((*(x.buffer for x in self.operands), *more)))

    def writes(self) -> tuple[str, ...]:
        """The buffer stored to."""
        return (self.out.buffer,)


@dataclass(frozen=True)
class ScoredAttention:
    """One op of `scored_attention_op.py` as a kernel of ours.

    `op` is its name there, `operands` its tensors by the names of its schema; those that are not given are missing.
    `results` are in its order. All lie in `buffers`. Batches and lengths may be symbolic, heads and features are not. The
    rest are its other arguments.
    """

    name: str
    op: str
    operands: dict[str, View]
    results: tuple[View, ...]
    scale: float
    cap: float
    fill: float
    band: tuple[int, int] | None
    buffers: dict[str, BufferSpec]
    parts: Int = 1
    origins: tuple[str, ...] = ()
    drop: float = 0.0

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def device(self) -> torch.device:
        return self.buffers[self.results[0].buffer].device

    @property
    def dtype(self) -> torch.dtype:
        """Of query, key and value."""
        return self.buffers[self.operands["query"].buffer].dtype

    def reads(self) -> tuple[str, ...]:
        """Buffers read, in the order of the operands."""
        return tuple(dict.fromkeys(x.buffer for x in self.operands.values()))

    def writes(self) -> tuple[str, ...]:
        """Buffers stored to, in the order of the results."""
        return tuple(x.buffer for x in self.results)


@dataclass(frozen=True)
class Way:
    """One way to compute something: steps in order. `label` says which, for people and records."""

    label: str
    steps: tuple[Region | Contraction | SideBySide | Attention | ScoredAttention | Call, ...]

    @property
    def names(self) -> list[str]:
        """Of the steps that become kernels."""
        return [step.name for step in self.steps if not isinstance(step, Call)]


@dataclass(frozen=True)
class Alternatives:
    """The same values in several ways, of which the tuner keeps the fastest. The first is what runs when nothing is known.

    `buffers` describes every buffer that a way reads or writes, `views` what calls name beside buffers. Of the buffers in
    `uniform` all elements are equal, and a way may read one for all: the others need not give its values for other data.
    `kind` says what they are alternatives of, for reports.
    """

    name: str
    ways: tuple[Way, ...]
    buffers: dict[str, BufferSpec]
    views: tuple[Alias, ...] = ()
    uniform: frozenset[str] = frozenset()
    kind: str = "contractions"

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def device(self) -> torch.device:
        return next(iter(self.buffers.values())).device


Work = Region | Batch | Contraction | SideBySide | Attention | ScoredAttention
"""What becomes kernels."""

Step = Work | Call | Alias | Alternatives
