"""Complex arithmetic as real arithmetic on pairs, since kernels hold no complex numbers.

Each complex node z gets a twin: a real tensor of shape (*z.shape, 2) that lies in memory as z does, so that
`view_as_complex(twin)` has z's strides, views of z are the same views of its twin, and what shared memory with z shares
it with the twin. The twin of a conjugated view is that of the memory behind it; whoever computes with it changes the sign of
the imaginary part. Inputs and results of library calls are viewed as real. Who still needs a complex tensor (an output, a
library call) gets a view of the twin.

Products are the textbook formula that eager uses, a real factor having an imaginary zero: infinities and NaN are eager's.
Quotients are Smith's (R. L. Smith, Algorithm 116, 1962), as in c10::complex and numpy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.graph import Phase
from fxopt.ir.spec import known_equal
from fxopt.passes.complex_rules import COMPLEX, CONSUMERS, REAL, CannotError, Part, is_complex
from fxopt.passes.context import Context
from fxopt.passes.facts import base, is_output, is_written, same_sizes, tensor

aten = torch.ops.aten


def complex_pairs(context: Context) -> None:
    values = (node.meta.get("val") for node in context.graph.gm.graph.nodes)
    if any(isinstance(value, torch.Tensor) and value.is_complex() for value in values):
        Pairs(context).run()


class Pairs:
    """One walk over the graph. `origin` is the node being rewritten: what is emitted stands before it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.twins: dict[fx.Node, fx.Node] = {}  # of rewritten nodes and of sources
        self.rewritten: dict[fx.Node, None] = {}
        self.made: set[fx.Node] = set()
        self.cache: dict[Any, fx.Node] = {}
        self.origin: fx.Node = context.nodes[0]

    def run(self) -> None:
        for node in self.context.nodes:
            if self.context.exhausted:
                break
            if node.op == "call_function" and ops.is_overload(node.target) and tensor(node) is not None:
                self.visit(node, ops.name_of(node.target))
        for node in reversed(self.rewritten):
            self.release(node)
        for node in reversed(self.context.nodes):
            ours = node.op == "call_function" and (node in self.made or is_complex(node))
            if ours and not node.users and ops.is_pure(node.target):
                self.context.graph.gm.graph.erase_node(node)

    def visit(self, node: fx.Node, name: str) -> None:
        self.origin = node
        complex_result = is_complex(node)
        rule = (COMPLEX if complex_result else CONSUMERS).get(name)
        if rule is None or not (complex_result or name == "_neg_view" or any(map(is_complex, node.args))):
            return
        try:
            if any(is_complex(x) and x.meta["val"].dtype not in REAL for x in (node, *node.all_input_nodes)):
                raise CannotError("a dtype without pairs")
            new = rule(self, node)
            if complex_result:
                self.twins[node] = self.laid_out(new, node, twin=True)
                self.rewritten[node] = None
                self.context.spend(name, node)
            elif ops.is_view(node.target) and name != "_neg_view":
                self.mirror(name, node, new)
            else:
                self.context.replace(name, node, self.laid_out(new, node, twin=False))
        except CannotError as reason:
            self.twins.pop(node, None)
            self.context.reject(name, str(reason))

    def mirror(self, name: str, node: fx.Node, new: fx.Node) -> None:
        """Put `new`, the same memory, in the place of the real view `node`; an output stays a tensor object of its own."""
        if not _fits(tensor(new), node, twin=False):
            raise CannotError("another layout")
        if is_output(node) and (new.op != "call_function" or is_output(new)):
            raise CannotError("an output of its own")
        self.context.spend(name, node)
        node.replace_all_uses_with(new)
        self.context.graph.gm.graph.erase_node(node)

    def release(self, node: fx.Node) -> None:
        """Give the users that still need the complex tensor `node` a view of its twin."""
        self.origin = node
        if node.users:
            try:
                new = self.call(aten.view_as_complex.default, self.twins[node])
                if node.meta["val"].is_conj():
                    new = self.call(aten._conj.default, new)
            except CannotError:
                return
            node.replace_all_uses_with(new)
        self.context.graph.gm.graph.erase_node(node)

    # ------------------------------------------------------------------ emitting

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.context.derive(target, args, self.origin, kwargs, symbolic=True)
        if node is None:
            raise CannotError(f"{target} on pairs")
        self.made.add(node)
        return node

    def once(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """`call`, unless that very call has been made."""
        key = (target, args, tuple(kwargs.items()))
        if key not in self.cache:
            self.cache[key] = self.call(target, *args, **kwargs)
        return self.cache[key]

    def pair(self, re: fx.Node, im: fx.Node) -> fx.Node:
        if same_sizes(re.meta["val"].shape, im.meta["val"].shape):
            return self.call(aten.stack.default, [re, im], -1)
        places = self.call(aten.arange.start_step, 0, 2, 1, device=re.meta["val"].device)
        columns = (self.call(aten.unsqueeze.default, part, -1) for part in (re, im))
        return self.call(aten.where.self, self.call(aten.eq.Scalar, places, 0), *columns)  # broadcasts them

    def laid_out(self, new: fx.Node, node: fx.Node, *, twin: bool) -> fx.Node:
        """`new` with the strides of `node` (those of its twin), copied if need be; a view must have them already."""
        if _fits(tensor(new), node, twin):
            return new
        order = None if ops.is_view(node.target) else _dense_order(node.meta["val"])
        if order is None:
            raise CannotError("strides that no copy has")
        back = [order.index(k) for k in range(len(order))]
        tail = [len(order)] if twin else []
        turned = order == sorted(order)
        new = new if turned else self.call(aten.permute.default, new, order + tail)
        new = self.call(aten.clone.default, new, memory_format=torch.contiguous_format)
        new = new if turned else self.call(aten.permute.default, new, back + tail)
        if not _fits(tensor(new), node, twin):
            raise CannotError("another layout")
        return new

    # ------------------------------------------------------------------ operands

    def raw(self, node: fx.Node) -> fx.Node:
        """The memory of the complex tensor `node` as pairs, not conjugated even where `node` is."""
        if node.target is aten._conj.default and isinstance(node.args[0], fx.Node):
            return self.raw(node.args[0])
        if node.target is aten.view_as_complex.default:
            return node.args[0]  # type: ignore[return-value]
        if node not in self.twins:
            self.twins[node] = self.source(node)
        return self.twins[node]

    def source(self, node: fx.Node) -> fx.Node:
        """An input or a library call's result, viewed. Whether tangents and results come conjugated shows when run.

        Of a number's conjugate (what the gradient of a product with a number multiplies by), a constant.
        """
        value = tensor(node)
        if value is None or value.dtype not in REAL or value.is_neg():
            raise CannotError("a dtype or bit without pairs")
        if node.target is aten._conj.default:
            number = complex(node.args[0])  # type: ignore[arg-type]
            return self.value(number if value.is_conj() else number.conjugate(), REAL[value.dtype])
        if is_written(base(node)):
            raise CannotError("an input that the graph writes")
        plain = self.call(aten._conj.default, node) if value.is_conj() else node
        if node.op != "placeholder" or self.context.graph.phase is Phase.BACKWARD:
            plain = self.call(aten.resolve_conj.default, plain)
        return self.call(aten.view_as_real.default, plain)

    def parts(self, operand: Any, dtype: torch.dtype) -> tuple[Part, Part]:
        """Real and imaginary part of a tensor or number, in the real `dtype`."""
        if not isinstance(operand, fx.Node):
            number = complex(operand)
            return number.real, number.imag
        value = tensor(operand)
        if value is None or value.is_neg():
            raise CannotError("an operand that is no plain tensor")
        if not value.is_complex():
            return self.cast(operand, dtype), 0.0
        raw = self.cast(self.raw(operand), dtype)
        re, im = (self.once(aten.select.int, raw, value.dim(), k) for k in (0, 1))
        return re, self.once(aten.neg.default, im) if value.is_conj() else im

    def tensors(self, operand: Any, dtype: torch.dtype) -> tuple[fx.Node, fx.Node]:
        """`parts`, numbers as tensors."""
        re, im = self.parts(operand, dtype)
        if isinstance(operand, fx.Node):
            return re, im if isinstance(im, fx.Node) else self.call(aten.full_like.default, re, im)  # type: ignore[return-value]
        return self.full([], re, dtype), self.full([], im, dtype)

    def full(self, size: Any, number: Part, dtype: torch.dtype) -> fx.Node:
        return self.call(aten.full.default, size, number, dtype=dtype, device=self.origin.meta["val"].device)

    def value(self, operand: Any, dtype: torch.dtype) -> fx.Node:
        """The pairs of a tensor or number, in the real `dtype`; conjugation is applied."""
        if is_complex(operand) and not operand.meta["val"].is_conj():
            return self.cast(self.raw(operand), dtype)
        return self.pair(*self.tensors(operand, dtype))

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else self.once(aten._to_copy.default, node, dtype=dtype)

    def times(self, x: Part, y: Part) -> Part:
        if isinstance(x, fx.Node) or isinstance(y, fx.Node):
            return self.call(aten.mul.Tensor, *((x, y) if isinstance(x, fx.Node) else (y, x)))
        return x * y


def _fits(new: torch.Tensor | None, node: fx.Node, twin: bool) -> bool:
    """Whether `new` has the dtype, shape and strides of `node` (`twin`: those of its twin)."""
    held = node.meta["val"]
    shape, strides, dtype = [*held.shape], [*held.stride()], held.dtype
    if twin:
        shape, strides, dtype = [*shape, 2], [*(2 * s for s in strides), 1], REAL[dtype]
    if new is None or new.dtype != dtype or new.device != held.device or not same_sizes(new.shape, shape):
        return False
    if any(known_equal(size, 0) for size in shape):
        return True
    return all(known_equal(n, 1) or known_equal(a, b) for n, a, b in zip(shape, new.stride(), strides, strict=True))


def _dense_order(value: torch.Tensor) -> list[int] | None:
    """The dimensions from the outermost in memory inwards; None where `value` is not known to be dense."""
    left = [k for k, size in enumerate(value.shape) if not known_equal(size, 1)]
    inner: list[int] = []
    expected: Any = 1
    while left:
        found = next((k for k in reversed(left) if known_equal(value.stride(k), expected)), None)
        if found is None:
            return None
        left.remove(found)
        inner.insert(0, found)
        expected = expected * value.shape[found]
    return [k for k in range(value.dim()) if k not in inner] + inner
