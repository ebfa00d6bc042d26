"""Where the text of a kernel's values is written: what a tile looks like, names, and scopes.

Every node is printed once per scope and mask. A kernel has the outer scope and, while a loop is open (over the reduced axis
or over points), that loop's body; nodes that do not vary along the loop go to the outer scope even when met inside. A node
below the body of a `Masked` carries the conditions it stands under (`Guards`), which mask its memory accesses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fxopt.codegen.triton_tiling import Tiling
from fxopt.ir.exprs import Int, Sym
from fxopt.ir.loops import Load, Op, Reduce, Scalar, Scan, postorder

Guards = tuple[Scalar, ...]
Instance = tuple[Scalar, Guards]


@dataclass
class Names:
    """Canonical parameter names: buffers and size symbols by order of first use, and the messages of device asserts.

    The first `reserved` names of buffers are the caller's.
    """

    reserved: int = 0
    buffers: dict[str, str] = field(default_factory=dict)
    sizes: dict[Sym, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def buffer(self, name: str) -> str:
        return self.buffers.setdefault(name, f"b{self.reserved + len(self.buffers)}")

    def size(self, sym: Sym) -> str:
        return self.sizes.setdefault(sym, f"n{len(self.sizes)}")


@dataclass
class Frame:
    """What the tile looks like: its axes (whose names are the index variables), masks and block names."""

    tiling: Tiling
    index64: bool
    masks: dict[str, str]  # axis -> mask variable, for axes that need one
    blocks: dict[str, str]  # axis -> block size name, in tile order
    scalars: frozenset[str] = frozenset()  # axes of which a program has one index, a scalar: what it loads is loaded once
    single: frozenset[str] = frozenset()  # axes along which the block has one element
    byte_run: int = 0  # neighbouring 1-byte elements that a thread may take at most; 0 for any number
    aligned: tuple[Int, int] | None = None  # at this index each row of a block begins at a multiple of so many elements
    kept: frozenset[str] = frozenset()  # buffers whose lines leave the L2 cache last
    several: int = 1  # rows of a block that begins at a multiple of so many of them, its first one called y_base

    def axis_of(self, sym: Sym) -> str | None:
        return next((name for name, line in self.tiling.lines.items() if line == sym), None)

    def axes(self, symbols: frozenset[Sym]) -> frozenset[str]:
        return frozenset(a for a in map(self.axis_of, symbols) if a is not None)

    def shape(self, axes: frozenset[str]) -> str:
        """The block shape that varies along `axes` and is 1 elsewhere."""
        return "[" + ", ".join(block if a in axes else "1" for a, block in self.blocks.items()) + "]"


class Scopes:
    """What is written into `outer` and, between `open_loop` and `close_loop`, `inner`, and which variable has which value.

    Loops run along the symbols `along`.
    """

    def __init__(self, frame: Frame, names: Names, along: tuple[Sym, ...]) -> None:
        self.frame, self.names = frame, names
        self._along = frozenset(along)
        self.outer: list[str] = []
        self.inner: list[str] | None = None
        self.eviction = ""
        self._outer_memo: dict[Instance, str] = {}
        self._inner_memo: dict[Instance, str] = {}
        self._touches: dict[Scalar, bool] = {}
        self._reduced = frozenset(frame.tiling.nest.reduced)
        self._count = 0

    def open_loop(self, eviction: str) -> None:
        self.inner, self._inner_memo, self.eviction = [], {}, eviction

    def close_loop(self) -> list[str]:
        assert self.inner is not None
        body, self.inner, self.eviction = self.inner, None, ""
        return body

    def fresh(self) -> str:
        self._count += 1
        return f"v{self._count - 1}"

    def varies(self, node: Scalar, guards: Guards) -> bool:
        """The instance differs along the loop."""
        return bool(self._along & node.symbols()) or any(self._along & g.symbols() for g in guards)

    def _scope(self, instance: Instance) -> tuple[list[str], dict[Instance, str]]:
        if self.inner is not None and self.varies(*instance):
            return self.inner, self._inner_memo
        return self.outer, self._outer_memo

    def known(self, instance: Instance) -> str | None:
        return self._scope(instance)[1].get(instance)

    def define(self, instance: Instance, text: str) -> None:
        """Record `text` (a variable or literal) as the value of `instance`."""
        self._scope(instance)[1][instance] = text

    def write(self, instance: Instance, lines: list[str]) -> None:
        self._scope(instance)[0].extend(lines)

    def touches_memory(self, node: Scalar) -> bool:
        """A Load or an index check lies below `node`, so the conditions it stands under matter."""
        for n in postorder((node,)):
            if n not in self._touches:
                own = isinstance(n, Load) or (isinstance(n, Op) and n.name == "checked_index")
                self._touches[n] = own or any(self._touches[a] for a in n.args)
        return self._touches[node]

    def instance(self, node: Scalar, guards: Guards) -> Instance:
        if isinstance(node, Reduce | Scan):  # its operands are wanted along the whole row
            guards = tuple(g for g in guards if not self._reduced & g.symbols())
        return node, guards if guards and self.touches_memory(node) else ()

    def text(self, instance: Instance) -> str:
        text = self.known(instance)
        assert text is not None, f"operand not printed yet: {instance!r}"
        return text

    def arg(self, node: Scalar, guards: Guards) -> str:
        return self.text(self.instance(node, guards))
