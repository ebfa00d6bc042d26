"""Scalar expressions of a nest as Triton statements: operators, reductions and scans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch

from fxopt.codegen import triton_ops as ops
from fxopt.codegen.triton_groups import GROUP_SUM
from fxopt.codegen.triton_memory import Memory, widened, within
from fxopt.codegen.triton_reduce import BlockInfo, persistent, scan_block, scan_carry, state_count, working_dtype
from fxopt.codegen.triton_scopes import Frame, Guards, Instance, Names
from fxopt.codegen.triton_tiling import accumulator_dtype
from fxopt.codegen.triton_values import (
    ARITHMETIC,
    asked_of_index,
    counts_index,
    exact_reciprocal,
    gelu_argument,
    is_bell,
    is_clamped,
    is_narrow_comparison,
    is_of_half,
    is_share,
    is_within,
    larger_place,
    reduced_dtype,
    rounded_soon,
    rounded_to_8_bits,
    rounded_within_int8,
    scaled_relu,
    uncast,
)
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, Sym, floordiv, mod, symbol
from fxopt.ir.loops import Const, IndexValue, Load, Masked, Op, Reduce, Scalar, Scan, postorder
from fxopt.ir.rounding import HALVES, unrounded


class Emitter(Memory):
    """Prints values, and what they need before them."""

    def __init__(
        self,
        frame: Frame,
        names: Names,
        step: int = 0,
        along: tuple[Sym, ...] = (),
        registers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(frame, names, step, along, registers)
        nest = frame.tiling.nest
        self._rounded = rounded_soon(nest)
        self._rounded_later = rounded_soon(nest, ARITHMETIC)
        self._rounded_to_8_bits = rounded_to_8_bits(nest)
        self._uses = Counter([*nest.roots, *(a for node in postorder(nest.roots) for a in node.args)])
        self._states: dict[tuple[object, ...], list[str]] = {}

    # traversal

    def operands(self, instance: Instance) -> list[Instance]:
        node, guards = instance
        if isinstance(node, Masked):
            inside = within(node, guards)
            filled = self.filled_load(node, guards)
            if filled is not None:
                return [self.instance(node.cond, guards), *self.operands(filled)]
            parts = [(node.cond, guards), (node.body, inside), (node.other, guards)]
            return [self.instance(*p) for p in parts]
        if is_narrow_comparison(node):
            return []
        conditions = [self.instance(g, guards[:i]) for i, g in enumerate(guards)]
        inner = self._beside_one(node) or self._root_below(node)  # one function computes both
        asked = asked_of_index(node)
        if asked is not None or (unrounded(node) is not node and node.dtype in HALVES):
            return [*conditions, self.instance(unrounded(node) if asked is None else asked[1], guards)]
        normal = self._coarse_gelu(node)
        if normal is not None:
            return [*conditions, self.instance(normal, guards)]
        largest = larger_place(node)
        if largest is not None:
            value, top, _, other = largest
            return [*conditions, *(self.instance(a, guards) for a in (value, top, other))]
        alone = counts_index(node) or (isinstance(node, Op) and node.name == GROUP_SUM)
        args = node.args[:1] if alone else inner.args if inner is not None else node.args
        return [*conditions, *(self.instance(a, guards) for a in args)]

    def walk(self, roots: list[Instance]) -> Iterator[Instance]:
        """Every instance below `roots`, operands first; not below instances already printed in the current scope."""
        seen: set[Instance] = set()
        stack = [(r, False) for r in reversed(roots)]
        while stack:
            instance, ready = stack.pop()
            if ready:
                yield instance
            elif instance not in seen:
                seen.add(instance)
                if self.known(instance) is None:
                    stack.append((instance, True))
                    stack += [(o, False) for o in reversed(self.operands(instance))]

    def value(self, node: Scalar, guards: Guards = ()) -> str:
        """Text of `node`, printing whatever it needs first."""
        root = self.instance(node, guards)
        for instance in self.walk([root]):
            self._emit(instance)
        text = self.known(root)
        assert text is not None
        return text

    def _emit(self, instance: Instance) -> None:
        node, guards = instance
        if isinstance(node, Const):
            self.define(instance, ops.typed_constant(node.value, node.dtype))
        elif isinstance(node, Reduce):
            self._emit_reduce(instance, node)
        elif isinstance(node, Scan):
            self._emit_scan(instance, node)
        elif isinstance(node, Op) and node.name == "checked_index":
            self._emit_checked(instance, node)
        else:
            text = self._expression(instance)
            if not text.isidentifier():
                name = self.fresh()
                self.write(instance, [f"{name} = {text}"])
                text = name
            self.define(instance, text)
            filled = self.filled_load(node, guards) if isinstance(node, Masked) else None
            if filled is not None:  # the same where its condition holds, which is where others want it
                self.define(filled, text)

    def _expression(self, instance: Instance) -> str:
        node, guards = instance
        match node:
            case IndexValue():
                return self.index_value(node.expr)
            case Load():
                return self.load(node, guards)
            case Masked() if (filled := self.filled_load(node, guards)) is not None:
                load, inside = filled
                assert isinstance(load, Load) and isinstance(node.other, Const)
                return widened(load, self.loaded(load, inside, f", other={ops.literal(node.other.value)}"))
            case Masked():
                cond, body, other = (self.text(o) for o in self.operands(instance)[-3:])
                return f"tl.where({cond}, {body}, {other})"
            case Op():
                return self._op(node, guards)
        raise TypeError(f"not a scalar node: {node!r}")

    # operators

    def _op(self, node: Op, guards: Guards) -> str:
        special = self._of_indices(node, guards) or self._joined(node, guards)
        return special or self._applied(node, guards)

    def _of_indices(self, node: Op, guards: Guards) -> str | None:
        """What is computed from the place in the tile, if `node` is."""
        if is_narrow_comparison(node):
            left, right = (self._narrow_text(a) for a in node.args)
            return ops.apply(node.name, [left, right], torch.int32)
        asked = asked_of_index(node)
        if asked is not None:
            index, wanted = asked
            args = [self.index_text(index.expr), f"h.as_natural({self.arg(wanted, guards)})"]
            return ops.apply(node.name, args, torch.int32)
        if counts_index(node):
            return self._rand(self.arg(node.args[0], guards), node.args[1].expr)  # type: ignore[attr-defined]
        if node.name == GROUP_SUM:
            return self._group_sum(node, guards)
        return None

    def _joined(self, node: Op, guards: Guards) -> str | None:
        """`node` and operators below it by one function, if there is one for them."""
        largest = larger_place(node)
        if largest is not None:
            value, top, place, other = largest
            texts = [self.arg(value, guards), self.arg(top, guards), str(place), self.arg(other, guards)]
            return f"h.larger_place({', '.join(texts)}, {ops.tl_type(value.dtype)})"
        normal = self._coarse_gelu(node)
        if normal is not None:
            return f"h.coarse_gelu({self.arg(normal, guards)})"
        beside = self._beside_one(node)
        if beside is not None:
            coarse = "coarse_" if beside.name == "erf" and node in self._rounded_to_8_bits else ""
            return f"h.{coarse}{beside.name}_plus_one({self.arg(beside.args[0], guards)})"
        root = self._root_below(node)
        if root is not None:
            return ops.apply("rsqrt", [self.arg(root.args[0], guards)], torch.float32, fast=True)
        within = rounded_within_int8(node)
        if within is not None:
            value, low, high = within
            if (low, high) == (0.0, 127.0):
                x, factor = scaled_relu(value)
                return f"h.scaled_to_int8({self.arg(x, guards)}, {'1.0' if factor is None else self.arg(factor, guards)})"
            return f"h.rounded_to_int8({self.arg(value, guards)}, {low!r}, {high!r})"
        inner = unrounded(node)
        if inner is not node and node.dtype in HALVES:
            return f"h.rounded_to_half({self.arg(inner, guards)}, {ops.tl_type(node.dtype)})"
        return None

    def _applied(self, node: Op, guards: Guards) -> str:
        """`node` on its operands."""
        args = [self.arg(a, guards) for a in node.args]
        source = node.args[0].dtype
        if node.name == "cast":
            if self.registers and source == torch.int8 and node.dtype == torch.float32:  # memory does not bound epilogues
                return f"h.int8_to_float32({args[0]})"
            return ops.cast(args[0], source, node.dtype)
        if node.name == "bitcast":
            return ops.bitcast(args[0], source, node.dtype, is_clamped(node.args[0]))
        if node.name in ops.INFIX and not all(isinstance(a, Const) for a in node.args) and source != torch.bool:
            args = [ops.literal(a.value) if isinstance(a, Const) else t for a, t in zip(node.args, args, strict=True)]
        reciprocal = exact_reciprocal(node.args[1]) if node.name == "truediv" else None
        if reciprocal is not None:  # the same value without a division's slow path
            return f"({args[0]} * {reciprocal!r})"
        if is_share(node):
            share = "share_before_rounding" if self._may_be_fast(node) else "share"
            return f"h.{share}({', '.join(args)})"
        if node.name == "exp" and (is_bell(node) or is_of_half(node)) and node in self._rounded_later:
            return f"h.flushing_exp({args[0]})"
        if self._divides_many(node):
            return f"h.divide_many({', '.join(args)})"
        if node.name in ("floordiv", "remainder") and not source.is_floating_point and source.is_signed is False:
            return f"({args[0]} {'//' if node.name == 'floordiv' else '%'} {args[1]})"
        return ops.apply(node.name, args, source, self._may_be_fast(node))

    def _group_sum(self, node: Op, guards: Guards) -> str:
        """Raises UnsupportedError where neighbours in the tile are not the rows of a group."""
        value, member, size = node.args[0], node.args[1].expr, node.args[2].value  # type: ignore[attr-defined]
        x = symbol(self.frame.tiling.lines["x"])
        if member not in (x, mod(x, size)):
            raise UnsupportedError("the rows of a group are no neighbours")
        column = self.frame.shape(frozenset(("x",)))
        return f"h.group_sum(tl.broadcast_to({self.arg(value, guards)}, {column}), {size})"

    def _may_be_fast(self, node: Op) -> bool:
        """Whether the error of a fast form of `node` is not seen in what is stored."""
        if node in self._rounded or node.dtype in ops.HALF:
            return True
        by_number = node.name == "truediv" and isinstance(uncast(node.args[1]), Const)  # as a mean has it
        return (by_number or node.name in ops.FEW_UNITS or is_of_half(node)) and node in self._rounded_later

    def _divides_many(self, node: Op) -> bool:
        """Whether `node` is an exact float32 quotient whose divisor is the same for neighbours in the block."""
        if node.name != "truediv" or node.dtype != torch.float32 or self._may_be_fast(node):
            return False
        along = list(self.frame.blocks)[-1]
        whole, divisor = (self.frame.axes(n.symbols()) - self.frame.scalars for n in (node, node.args[1]))
        return len(self.frame.blocks) > 1 and along in whole - divisor

    def _root_below(self, node: Scalar) -> Op | None:
        """The square root of which `node` is the reciprocal, if one instruction may compute both."""
        if not (
            isinstance(node, Op) and node.name == "reciprocal" and node.dtype == torch.float32 and self._may_be_fast(node)
        ):
            return None
        root = node.args[0]
        return root if isinstance(root, Op) and root.name == "sqrt" else None

    def _coarse_gelu(self, node: Scalar) -> Scalar | None:
        """The x of which `node` is a GELU that only a cast to float8 reads."""
        return gelu_argument(node) if node in self._rounded_to_8_bits else None

    def _beside_one(self, node: Scalar) -> Op | None:
        """The function of `node` if that is 1 + erf(...) or 1 + tanh(...) in float32, as normal distributions and what comes
        close to them have it: such a sum is one expression, with tanh only if nobody else wants that and the sum is rounded.
        """
        if not (isinstance(node, Op) and node.name == "add" and accumulator_dtype(node.dtype) == torch.float32):
            return None
        one, other = node.args if isinstance(node.args[0], Const) else reversed(node.args)
        if not (isinstance(one, Const) and one.value == 1 and isinstance(other, Op)):
            return None
        alone = other.name == "tanh" and self._uses[other] == 1 and self._may_be_fast(node)
        return other if other.name == "erf" or alone else None

    def _rand(self, seed: str, counter: Int) -> str:
        """`h.rand`, its quotient and remainder taken from as few symbols as possible: LLVM sees what neighbours share."""
        return f"h.rand_word({seed}, {self.index_value(floordiv(counter, 4))}, {self.index_value(mod(counter, 4))})"

    def _exponential(self) -> str:
        """What persistent softmax statistics take exp with: the function that the row's other exponentials use, so that the
        compiler finds them equal; alone, the fast one, whose error vanishes in a sum that is at least 1."""
        nodes = [n for n in postorder(self.frame.tiling.nest.roots) if isinstance(n, Op) and n.name == "exp"]
        if not nodes:
            return "h.flushing_exp"
        return "libdevice.exp" if any(n not in self._rounded and n.dtype not in ops.HALF for n in nodes) else "tl.exp"

    def _narrow_text(self, node: Scalar) -> str:
        return str(node.value) if isinstance(node, Const) else self.index_text(node.expr)  # type: ignore[attr-defined]

    def _emit_checked(self, instance: Instance, node: Op) -> None:
        index, size = (self.arg(a, instance[1]) for a in node.args)
        name = self.fresh()
        if is_within(*node.args):
            self.write(instance, [f"{name} = h.wrap_index({index}, {size})"])
            self.define(instance, name)
            return
        known = f" for dimension of size {node.args[1]!r}" if isinstance(node.args[1], Const) else ""
        message = f"index out of bounds{known}"
        if message not in self.names.errors:
            self.names.errors.append(message)
        mask = self.mask(node.symbols(), instance[1])
        guard = f", mask={mask}" if mask else ""
        self.write(
            instance,
            [
                f"{name} = h.wrap_index({index}, {size})",
                f'tl.device_assert(({name} >= 0) & ({name} < {size}), "{message}"{guard})',
            ],
        )
        self.define(instance, name)

    # reductions and scans

    def block(self) -> BlockInfo:
        extent = self.frame.tiling.r.extent
        share = repr(1 / extent) if isinstance(extent, int) and extent > 0 and extent & (extent - 1) == 0 else None
        shape = f"[{', '.join(self.frame.blocks.values())}]"
        return BlockInfo(shape, self.frame.masks.get("r"), self.index_text(extent), share)

    def state_names(self, node: Reduce, guards: Guards, looped: bool) -> tuple[list[str], bool]:
        """The variables of a reduction's result (shared by its outputs) and whether they are new."""
        key = (node.kind, node.operands, node.dtype, guards)
        if key in self._states:
            return self._states[key], False
        self._states[key] = [self.fresh() for _ in range(state_count(node.kind, looped))]
        return self._states[key], True

    def result(self, node: Reduce, names: list[str]) -> str:
        """Text of one output of a finished reduction in the compute type of its dtype."""
        if node.kind in ("argmax", "argmin"):
            return names[1]
        working = working_dtype(reduced_dtype(node))
        return ops.cast(names[node.output], working, node.dtype)

    def reduce_operands(self, node: Reduce, guards: Guards) -> list[str]:
        """Printed operands, the first in the working dtype."""
        texts = [self.value(o, guards) for o in node.operands]
        texts[0] = ops.cast(texts[0], node.operands[0].dtype, working_dtype(reduced_dtype(node)))
        return texts

    def _emit_reduce(self, instance: Instance, node: Reduce) -> None:
        names, new = self.state_names(node, instance[1], looped=False)
        if new:
            if self.looped:
                raise ValueError(f"reduction met outside its pass: {node!r}")
            dtype = working_dtype(reduced_dtype(node))
            operands = self.reduce_operands(node, instance[1])
            self.write(instance, persistent(node.kind, names, operands, dtype, self.block(), self._exponential()))
        self.define(instance, self.result(node, names))

    def _emit_scan(self, instance: Instance, node: Scan) -> None:
        name = self.fresh()
        dtype = working_dtype(node.dtype)
        value = ops.cast(self.arg(node.operand, instance[1]), node.operand.dtype, dtype)
        self.write(instance, scan_block(name, node.kind, value, dtype, self.block()))
        if self.inner is not None:
            start = ops.literal(ops.identity(node.kind, dtype))
            column = self.frame.shape(frozenset(self.frame.blocks) - {"r"})
            self.outer.append(f"{name}_c = tl.full({column}, {start}, {ops.compute_type(dtype)})")
            self.inner.extend(scan_carry(name, node.kind))
        self.define(instance, ops.cast(name, dtype, node.dtype))
