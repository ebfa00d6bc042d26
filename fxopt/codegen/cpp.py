"""The C++ printer: one loop nest as one function over vectors, with OpenMP threads.

    extern "C" int64_t ENTRY(void** buffers, const int64_t* sizes)

returns 0, or the 1-based number in `KernelSource.errors` of a check that failed (an index out of bounds, an integer
division by zero). Which loop is vectorised and what runs on which thread is decided in `cpp_domain`; expressions are printed
by `cpp_expr`; the functions used in the text are those of `cpp_runtime.h`.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

from fxopt.codegen.cpp_domain import Domain, Outer, extent, plan_domain
from fxopt.codegen.cpp_expr import Emitter, Names, Scope
from fxopt.codegen.cpp_ops import stored_type
from fxopt.codegen.cpp_passes import Pass, accumulator, operand_values, plan_passes, point_cost, scan_operand, scan_type
from fxopt.ir.exprs import Int, Sym, add, ask, bounds, coefficient, floordiv, mod, mul, prod, symbol
from fxopt.ir.kernel import KernelSource
from fxopt.ir.loops import Nest, Reduce, Scan, Store, postorder
from fxopt.ir.region import Region

_ENTRY = "ENTRY"
_SEQUENTIAL = 1


class HasCapability(Protocol):
    """A target as far as this printer looks at it."""

    @property
    def cpu_capability(self) -> str: ...


def print_nest(region: Region, target: HasCapability | None = None) -> KernelSource:
    """The kernel of `region` for a CPU with `target.cpu_capability` ("AVX512", "AVX2" or other; None: "AVX512").

    Raises UnsupportedError for dtypes without a C++ type and stores of an unknown mode.
    """
    capability = "AVX512" if target is None else target.cpu_capability
    domain = plan_domain(region.nest, capability)
    printer = _Printer(region, domain)
    body = printer.print()
    head = [f"constexpr int W = {domain.width};"] if domain.lanes is not None else []
    head += [f"const int64_t {name} = sizes[{i}];" for i, name in enumerate(printer.names.sizes.values())]
    signature = f'extern "C" int64_t {_ENTRY}(void** buffers, [[maybe_unused]] const int64_t* sizes) {{'
    text = "\n".join([signature, *indented(head + body), "}", ""])
    entry = "fx_" + hashlib.sha256(text.encode()).hexdigest()[:16]
    return KernelSource(
        "cpp",
        entry,
        text.replace(_ENTRY, entry, 1),
        tuple(printer.names.buffers),
        tuple(symbol(s) for s in printer.names.sizes),
        compile_options={"capability": capability},
        errors=tuple(printer.names.errors),
    )


def indented(lines: list[str]) -> list[str]:
    return ["  " + line for line in lines]


def block(head: str, lines: list[str], tail: str = "}") -> list[str]:
    """`lines` indented between `head` and `tail`."""
    return [head, *indented(lines), tail]


def tried(call: str, lines: list[str]) -> list[str]:
    """A call whose last argument is a lambda of these statements; returns from the caller with its error code."""
    return block(f"if (const int64_t error = {call}", [*lines, "return 0;"], "})) return error;")


class _Printer:
    """One kernel being printed."""

    def __init__(self, region: Region, domain: Domain) -> None:
        self.region, self.domain = region, domain
        self.nest: Nest = domain.nest
        self.names = Names()
        self.emit = Emitter(self.names, domain.lanes, region.buffers)
        for prefix, syms in (("p", self.nest.points), ("r", domain.reduced)):
            self.emit.indices |= {s: f"{prefix}{i}" for i, s in enumerate(syms)}
        self.passes, self.point_stores = plan_passes(domain)
        self.structs: list[str] = []
        self.scratch: list[str] = []
        self.kept: dict[object, str] = {}

    def text(self, x: Int) -> str:
        return self.emit.index(x)

    # ---- the frame ----

    def print(self) -> list[str]:
        thread = Scope(None, frozenset())
        point = thread.child(*(o.sym for o in self.domain.outer if o.block is None))
        digits = self._digits()
        self._points(point, self.domain.inner)
        total = self.text(prod(self._extent(o) for o in self.domain.outer))
        loop = block("for (int64_t at = begin; at < end; ++at) {", digits + point.lines)
        inside = [*self._pointers(), *self.scratch, *thread.lines, *loop, "return 0;"]
        count = [f"const int64_t count = {total};"]
        if self.domain.split:
            return [*self.structs, *count, "const int64_t begin = 0, end = count;", "if (count == 0) return 0;", *inside]
        team = f"fx::team_size(count, {self._grain()})" if self.domain.parallel else str(_SEQUENTIAL)
        head = f"return fx::parallel(count, {team}, [&](int64_t begin, int64_t end, int64_t) -> int64_t {{"
        return [*self.structs, *count, *block(head, inside, "});")]

    def _pointers(self) -> list[str]:
        """Declared inside the code of each thread: as locals that no closure holds, they stay in registers."""
        written = set(self.nest.writes())
        out = []
        for i, (buffer, name) in enumerate(self.names.buffers.items()):
            const = "" if buffer in written else "const "
            out.append(f"auto* const {name} = static_cast<{const}{self._stored(buffer)}*>(buffers[{i}]);")
        return out

    def _stored(self, buffer: str) -> str:
        return stored_type(self.region.buffers[buffer].dtype)

    def _extent(self, outer: Outer) -> Int:
        size = extent(outer.sym)
        return size if outer.block is None else floordiv(add(size, outer.block - 1), outer.block)

    def _digits(self) -> list[str]:
        """The indices that `at` stands for: the last outer loop is its lowest digit."""
        lines: list[str] = []
        below: Int = 1
        for position, outer in reversed(list(enumerate(self.domain.outer))):
            name, size = self.emit.indices[outer.sym], self._extent(outer)
            digit = "at" if below == 1 else f"at / ({self.text(below)})"
            digit = digit if position == 0 else f"{digit} % ({self.text(size)})"
            if outer.block is None:
                lines.append(f"const int64_t {name} = {digit};")
            else:
                lines.append(f"const int64_t {name}_lo = {digit} * {outer.block};")
                end = self.text(extent(outer.sym))
                lines.append(f"const int64_t {name}_hi = fx::min_of({name}_lo + {outer.block}, {end});")
            below = mul(below, size)
        return lines

    def _range(self, sym: Sym) -> tuple[str, str]:
        """Where the loop over `sym` inside one parallel iteration begins and ends."""
        name = self.emit.indices[sym]
        return (f"{name}_lo", f"{name}_hi") if self.domain.blocked(sym) else ("0", self.text(extent(sym)))

    def _has_tail(self, sym: Sym, step: int) -> str:
        size = extent(sym)
        blocks = [o.block for o in self.domain.outer if o.block and o.sym == sym]
        whole = ask("==", mod(size, step), 0) and all(b % step == 0 for b in blocks)
        return "false" if whole else "true"

    def _grain(self) -> str:
        cost = point_cost(self.nest)
        for sym in (*self.domain.inner, *((self.domain.lanes,) if self.domain.lanes in self.nest.points else ())):
            assert sym is not None
            blocks = [o.block for o in self.domain.outer if o.sym == sym and o.block]
            cost = mul(cost, blocks[0] if blocks else extent(sym))
        return f"fx::grain({self.text(cost)})"

    # ---- points ----

    def _points(self, scope: Scope, inner: tuple[Sym, ...]) -> None:
        """Everything inside one parallel iteration."""
        if self.domain.tiled:
            self._tiles(scope)
        elif inner:
            name, (lo, hi) = self.emit.indices[inner[0]], self._range(inner[0])
            body = scope.child(inner[0])
            self._points(body, inner[1:])
            scope.lines += block(f"for (int64_t {name} = {lo}; {name} < {hi}; ++{name}) {{", body.lines)
        elif self.domain.kind == "map":
            self._map(scope)
        elif self.domain.kind == "column":
            self._column(scope)
        else:
            self._reduce_and_store(scope)

    def _map(self, scope: Scope) -> None:
        lanes = self._lanes()
        body = scope.child(lanes, on="on")
        self._stores(self.point_stores, body)
        lo, hi = self._range(lanes)
        step = f"[&](int64_t {self.emit.indices[lanes]}, [[maybe_unused]] auto on) FX_STEP -> int64_t {{"
        scope.lines += tried(f"fx::each<W, {self._has_tail(lanes, self.domain.width)}>({lo}, {hi}, {step}", body.lines)

    def _tiles(self, scope: Scope) -> None:
        """Square tiles of the points: loads that run along the other side are transposed into a buffer first."""
        lanes, (other,) = self._lanes(), self.domain.inner
        outer_name = self.emit.indices[other]
        at, end = f"{outer_name}_at", f"{outer_name}_end"
        tile = scope.child(lanes, on="on")
        body = tile.child(other)
        for number, load in enumerate(self.domain.tiled):
            name, ctype = f"tile{number}", self._stored(load.buffer)
            source = f"{self.names.buffer(load.buffer)} + {self.emit.index(load.index, {other: at})}"
            stride = coefficient(load.index, lanes)
            assert stride is not None  # `cpp_domain` tiles only such loads
            tile.lines.append(f"alignas(64) {ctype} {name}[W * W];")
            tile.lines.append(f"fx::load_transposed<W>({name}, {source}, {self.emit.index(stride)}, {end} - {at}, on);")
            body.values[load] = f"fx::load<W>({name} + ({outer_name} - {at}) * W, on)"
        self._stores(self.point_stores, body)
        tile.lines += block(f"for (int64_t {outer_name} = {at}; {outer_name} < {end}; ++{outer_name}) {{", body.lines)
        (lo, hi), (other_lo, other_hi) = self._range(lanes), self._range(other)
        step = f"[&](int64_t {self.emit.indices[lanes]}, [[maybe_unused]] auto on) FX_STEP -> int64_t {{"
        walk = tried(f"fx::each<W, {self._has_tail(lanes, self.domain.width)}>({lo}, {hi}, {step}", tile.lines)
        last = f"const int64_t {end} = fx::min_of({at} + W, {other_hi});"
        scope.lines += block(f"for (int64_t {at} = {other_lo}; {at} < {other_hi}; {at} += W) {{", [last, *walk])

    def _lanes(self) -> Sym:
        assert self.domain.lanes is not None
        return self.domain.lanes

    def _stores(self, stores: list[Store], scope: Scope) -> None:
        scope.lines += self.emit.prepare_stores(stores, scope)

    def _column(self, scope: Scope) -> None:
        """Reductions whose vectors hold different points."""
        lanes, vectors = self._lanes(), 1 if self.domain.split else self.domain.vectors
        tile = scope.child(on="on") if vectors > 1 else scope.child(lanes, on="on")
        if vectors > 1:
            self._side_by_side(tile)
        else:
            self._reduce_and_store(tile)
        (lo, hi), name = self._range(lanes), self.emit.indices[lanes]
        start = f"{name}_at" if vectors > 1 else name
        step = f"[&](int64_t {start}, [[maybe_unused]] auto count, [[maybe_unused]] auto on) -> int64_t {{"
        tail = self._has_tail(lanes, self.domain.width)
        scope.lines += tried(f"fx::tiles<W, {vectors}, {tail}>({lo}, {hi}, {step}", tile.lines)

    def _side_by_side(self, tile: Scope) -> None:
        """Several vectors of columns in one walk over the rows, so that memory is read in longer runs."""
        (only,) = self.passes
        lanes = self._lanes()
        name = self.emit.indices[lanes]
        struct, flush = self._accumulators(only, prod(extent(s) for s in self.domain.reduced))
        columns = block("for (int u = 0; u < count.value; ++u) {", [f"const int64_t {name} = {name}_at + u * W;"])[:-1]

        loops = self._reduced_scopes(tile, self.domain.reduced)
        body = loops[-1].child(lanes)
        self._add_terms(only, body, "acc[u]")
        loops[-1].lines += ["#pragma GCC unroll 8", *columns, *indented(body.lines), "}"]
        if flush:
            run = "if (++run == fx::RUN) {"
            loops[-1].lines += block(run, ["run = 0;", "for (auto& one : acc) one.flush();"])
        tile.lines += [f"{struct} acc[count.value];", *(["int run = 0;"] if flush else []), *self._joined_loops(loops)]

        finish = tile.child(lanes)
        for i, node in enumerate(only.reduces):
            finish.values[node] = name_of = self.names.fresh()
            finish.lines.append(f"const auto {name_of} = acc[u].a{i}.{self._result(node)}();")
        self._stores(self.point_stores, finish)
        tile.lines += [*columns, *indented(finish.lines), "}"]

    def _result(self, node: Reduce) -> str:
        return "lanes" if self.emit.is_vector(node) or self.domain.lanes is None else "total"

    # ---- passes ----

    def _reduce_and_store(self, scope: Scope) -> None:
        for number, one in enumerate(self.passes):
            self._pass(number, one, scope)
        self._stores(self.point_stores, scope)

    def _accumulators(self, one: Pass, terms: Int) -> tuple[str, bool]:
        """(the name of the struct that holds the accumulators of a pass, whether it has to be flushed)."""
        name = f"A{len(self.structs)}"
        fields, flush = [], False
        for node in one.reduces:
            kind, long = accumulator(node, self._accumulator_lanes(node), terms)
            fields.append(kind)
            flush |= long
        numbers = range(len(fields))
        parts = [f"{kind} a{i};" for i, kind in enumerate(fields)]
        parts.append(f"void merge(const {name}& o) {{ {' '.join(f'a{i}.merge(o.a{i});' for i in numbers)} }}")
        if flush:
            parts.append(f"void flush() {{ {' '.join(f'a{i}.flush();' for i in numbers)} }}")
        self.structs.append(f"struct {name} {{ {' '.join(parts)} }};")
        return name, flush

    def _accumulator_lanes(self, node: Reduce) -> str:
        return "W" if self.domain.kind == "row" or self.emit.is_vector(node) else "1"

    def _reduced_scopes(self, scope: Scope, syms: tuple[Sym, ...]) -> list[Scope]:
        """Nested blocks for loops over `syms`, outermost first; at least one."""
        out = []
        for sym in syms:
            scope = scope.child(sym)
            out.append(scope)
        return out or [scope.child()]

    def _joined_loops(self, scopes: list[Scope], bounds_of: dict[Sym, tuple[str, str]] | None = None) -> list[str]:
        """The statements of nested `scopes`, each inside the loop over the symbol it adds."""
        lines: list[str] = []
        for scope in reversed(scopes):
            assert scope.parent is not None
            lines = scope.lines + lines
            for sym in scope.symbols - scope.parent.symbols:
                name = self.emit.indices[sym]
                lo, hi = (bounds_of or {}).get(sym, ("0", self.text(extent(sym))))
                lines = block(f"for (int64_t {name} = {lo}; {name} < {hi}; ++{name}) {{", lines)
        return lines

    def _pass(self, number: int, one: Pass, scope: Scope) -> None:
        if self.domain.split:
            self._split_pass(number, one, scope)
            return
        struct, lines = self._walk(number, one, scope, {})
        scope.lines += lines
        if struct and self.domain.kind == "row":
            scope.lines.append(f"fx::gather_ways(acc{number});")
        self._take_results(one, scope, f"acc{number}[0]")

    def _take_results(self, one: Pass, scope: Scope, where: str) -> None:
        for i, node in enumerate(one.reduces):
            name = self.names.fresh()
            scope.lines.append(f"const auto {name} = {where}.a{i}.{self._result(node)}();")
            scope.values[node] = name

    def _walk(self, number: int, one: Pass, scope: Scope, parts: dict[Sym, tuple[str, str]]) -> tuple[str, list[str]]:
        """One pass as (its accumulator struct or "", statements); `parts` limits the loop that threads share."""
        row, lanes, acc = self.domain.kind == "row", self.domain.lanes, f"acc{number}"
        terms = prod(extent(s) for s in self.domain.reduced)
        in_lane = floordiv(add(terms, self.domain.width - 1), self.domain.width) if row else terms
        struct, flush = self._accumulators(one, in_lane) if one.reduces else ("", False)
        states = self._open_scans(one, scope)
        loops = self._reduced_scopes(scope, tuple(s for s in self.domain.reduced if not row or s != lanes))
        innermost = loops[-1]
        body = innermost.child(self._lanes(), on="on") if row else innermost
        self._step(one, body, states, "acc" if row else f"{acc}[0]")
        if row:
            innermost.lines += self._sweep(body, struct, acc, flush, parts)
            if flush and len(self.domain.reduced) > 1:
                innermost.lines.append(f"for (auto& one : {acc}) one.flush();")
        elif flush:
            innermost.lines += block("if (++run == fx::RUN) {", ["run = 0;", f"{acc}[0].flush();"])
        head = [f"{struct} {acc}[{self._ways()}];"] if struct else []
        joined = self._joined_loops(loops, parts)
        if flush and not row:
            joined = block("{", ["int run = 0;", *joined])
        return struct, [*head, *joined]

    def _sweep(self, body: Scope, struct: str, acc: str, flush: bool, parts: dict[Sym, tuple[str, str]]) -> list[str]:
        lanes = self._lanes()
        lo, hi = parts.get(lanes, ("0", self.text(extent(lanes))))
        tail = "true" if lanes in parts else self._has_tail(lanes, self.domain.width)
        step = f"[&](int64_t {self.emit.indices[lanes]}, [[maybe_unused]] auto on"
        if not struct:
            return tried(f"fx::each<W, {tail}>({lo}, {hi}, {step}) FX_STEP -> int64_t {{", body.lines)
        options = f"W, {self._ways()}, {tail}, {'true' if flush else 'false'}"
        step = f"{step}, {struct}& acc) FX_STEP -> int64_t {{"
        return tried(f"fx::sweep<{options}>({lo}, {hi}, {acc}, {step}", body.lines)

    def _ways(self) -> int:
        """How many accumulators take turns, to hide the latency of dependent additions."""
        if self.domain.kind != "row":
            return 1
        longest = bounds(extent(self._lanes()))[1]
        vectors = 64 if longest is None else longest // self.domain.width
        return 4 if vectors >= 8 else 2 if vectors >= 4 else 1

    def _open_scans(self, one: Pass, scope: Scope) -> dict[Scan, str]:
        states = {node: self.names.fresh("s") for node in one.scans}
        for node, state in states.items():
            scope.lines.append(f"{scan_type(node, 'W' if self.emit.is_vector(node) else '1')} {state};")
        return states

    def _step(self, one: Pass, body: Scope, states: dict[Scan, str], acc: str) -> None:
        """One step of a pass: kept values read back, scans advanced, new values kept, terms added, stores."""
        for node, memory in self.kept.items():
            body.values[node] = self._read_back(memory)  # type: ignore[index]
        for node, state in states.items():
            name, operand = self.names.fresh(), scan_operand(node)
            text = self.emit.vector(operand, body) if self.emit.is_vector(node) else self.emit.value(operand, body)
            body.lines.append(f"const auto {name} = {state}.step({text});")
            body.values[node] = name
        for node in one.kept:
            memory = self.kept[node] = self._allocate(node.dtype.itemsize == 8)
            text = self.emit.vector(node, body)
            where = f"{memory}.data + {self._slot()}"
            vector = self.domain.lanes is not None
            body.lines.append(f"fx::store({where}, {text}, {body.on});" if vector else f"fx::store1({where}, {text});")
        self._add_terms(one, body, acc)
        self._stores(one.stores, body)

    def _add_terms(self, one: Pass, body: Scope, acc: str) -> None:
        for i, node in enumerate(one.reduces):
            vector = self._accumulator_lanes(node) == "W"
            values = [self.emit.vector(x, body) if vector else self.emit.value(x, body) for x in operand_values(node)]
            body.lines.append(f"{acc}.a{i}.add({', '.join(values)}, {body.on if vector else 'fx::All{}'});")

    # ---- scratch memory ----

    def _slot(self) -> str:
        """Where this step's values are in scratch memory."""
        linear: Int = 0
        for sym in self.domain.reduced:
            linear = add(mul(linear, extent(sym)), symbol(sym))
        text = self.text(linear)
        return f"{text} * W" if self.domain.kind == "column" else text

    def _allocate(self, double: bool) -> str:
        size = mul(prod(extent(s) for s in self.domain.reduced), self.domain.width if self.domain.kind == "column" else 1)
        name = f"kept{len(self.scratch)}"
        self.scratch.append(f"const fx::Scratch<{'double' if double else 'float'}> {name}({self.text(size)});")
        return name

    def _read_back(self, memory: str) -> str:
        where = f"{memory}.data + {self._slot()}"
        return f"fx::load1({where})" if self.domain.lanes is None else f"fx::load<W>({where}, on)"

    # ---- reductions shared by threads ----

    def _split_pass(self, number: int, one: Pass, scope: Scope) -> None:
        """Threads walk consecutive parts of the outermost reduced loop; their accumulators are joined in order."""
        sym = self.domain.reduced[0]
        by_lane = sym == self.domain.lanes
        size, unit = extent(sym), self.domain.width if by_lane else 1
        count = floordiv(add(size, unit - 1), unit)
        part = (f"begin * {unit}", f"fx::min_of(end * {unit}, {self.text(size)})") if by_lane else ("begin", "end")
        inner = scope.child()
        struct, lines = self._walk(number, one, inner, {sym: part})
        rest = prod(extent(s) for s in self.domain.reduced[1:])
        cost = mul(self._step_cost(one), mul(rest, unit if self.domain.kind != "column" else self.domain.width))
        team, partial, acc = f"team{number}", f"part{number}", f"acc{number}"
        keep = [f"fx::gather_ways({acc});", f"{partial}.all.data[member] = {acc}[0];"] if struct else []
        scope.lines.append(f"const int64_t {team} = fx::team_size({self.text(count)}, fx::grain({self.text(cost)}));")
        if struct:
            scope.lines.append(f"fx::Partials<{struct}> {partial}({team});")
        share = "[&](int64_t begin, int64_t end, [[maybe_unused]] int64_t member) -> int64_t {"
        scope.lines += tried(f"fx::parallel({self.text(count)}, {team}, {share}", [*inner.lines, *lines, *keep])
        if struct:
            scope.lines.append(f"const {struct} sum{number} = {partial}.joined();")
            self._take_results(one, scope, f"sum{number}")

    def _step_cost(self, one: Pass) -> Int:
        nodes = list(postorder(tuple(one.roots())))
        return max(1, len(nodes))
