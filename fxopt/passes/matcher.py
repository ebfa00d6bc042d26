"""Find the places where a declared pattern occurs, and replace them.

Matching is a backtracking search from the last output towards the inputs. The operands of commutative ops are
tried in both orders. An inner node may have users outside the match only if it is a view of an operand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.passes.context import Context
from fxopt.passes.facts import base, may_stand_for, same_tensor, tensor
from fxopt.passes.pattern import Anything, Parameter, Pattern, Step, Template, TemplateNode, by_name, templates


@dataclass(frozen=True)
class _State:
    """What is bound so far: parameters to values, template nodes to graph nodes, and nodes looked through."""

    values: dict[str, Any]
    nodes: dict[int, fx.Node]
    skipped: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class Match:
    """One occurrence. `values`: what each parameter is bound to, an fx.Node for tensors, else a literal (or a size node)."""

    pattern: Pattern
    values: dict[str, Any]
    outputs: tuple[fx.Node, ...]
    inner: frozenset[fx.Node]

    def is_tensor(self, name: str) -> bool:
        return tensor(self.values[name]) is not None

    def tensor(self, name: str) -> torch.Tensor:
        """The FakeTensor of parameter `name`."""
        value = tensor(self.values[name])
        assert value is not None, f"parameter {name} of {self.pattern.name} is not a tensor"
        return value

    def result(self, index: int = 0) -> torch.Tensor:
        """The FakeTensor of an output."""
        value = tensor(self.outputs[index])
        assert value is not None
        return value


def apply_pattern(context: Context, declared: Pattern) -> None:
    """Replace every occurrence of `declared` whose guard accepts; count the others with the reason."""
    present = {n.target for n in context.graph.gm.graph.nodes}
    if not present.issuperset(declared.needs):
        return
    search, build = templates(declared)
    anchor = search.nodes[search.outputs[-1]].target
    gone: set[fx.Node] = set()
    for node in context.nodes:
        if node in gone or node.target is not anchor or node.op != "call_function" or context.exhausted:
            continue
        match = find(context, declared, node)
        if match is None:
            continue
        reason = _obstacle(match) or declared.guard(match)
        if reason is not None:
            context.reject(declared.name, reason)
        elif _rewrite(context, match, build):
            gone |= _erase(context, match)
        else:
            context.reject(declared.name, "the replacement would not have the same strides, aliasing or sizes")


def find(context: Context, declared: Pattern, anchor: fx.Node) -> Match | None:
    """The first match whose last output is `anchor`."""
    search, _ = templates(declared)
    matcher = _Matcher(search, declared.through_casts)
    state = next(matcher.roots(anchor, context), None)
    if state is None:
        return None
    outputs = tuple(state.nodes[i] for i in search.outputs)
    inner = frozenset(state.nodes.values()) | state.skipped
    return Match(declared, state.values, outputs, inner - frozenset(outputs))


class _Matcher:
    def __init__(self, template: Template, through_casts: bool) -> None:
        self.template, self.through_casts = template, through_casts

    def roots(self, anchor: fx.Node, context: Context) -> Iterator[_State]:
        *others, last = self.template.outputs
        for state in self.node(last, anchor, _State({}, {})):
            yield from self._outputs(others, state, context)

    def _outputs(self, wanted: list[int], state: _State, context: Context) -> Iterator[_State]:
        """Bind the outputs that the anchor does not depend on."""
        if not wanted:
            yield state
            return
        index, *rest = wanted
        if index in state.nodes:
            yield from self._outputs(rest, state, context)
            return
        bound = [*state.nodes.values(), *(v for v in state.values.values() if isinstance(v, fx.Node))]
        for candidate in dict.fromkeys(user for node in bound for user in node.users):
            if candidate.target is self.template.nodes[index].target and candidate not in state.nodes.values():
                for found in self.node(index, candidate, state):
                    yield from self._outputs(rest, found, context)

    def node(self, index: int, node: fx.Node, state: _State) -> Iterator[_State]:
        """Every way in which template node `index` can be `node`."""
        if index in state.nodes:
            if state.nodes[index] is node:
                yield state
            return
        wanted = self.template.nodes[index]
        if node.op == "call_function" and node.target is wanted.target and ops.is_pure(node.target):
            bound = _State(state.values, {**state.nodes, index: node}, state.skipped)
            have = by_name(node)
            for order in _orders(wanted):
                yield from self._all([(wanted.arguments[a], have[b]) for a, b in order], bound)
        elif self._transparent(node):
            looked = _State(state.values, state.nodes, state.skipped | {node})
            yield from self.node(index, node.args[0], looked)  # type: ignore[arg-type]

    def _transparent(self, node: fx.Node) -> bool:
        """A no-op view, or (when declared) a cast between floating dtypes, that may stand in between."""
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        if node.target is torch.ops.aten._to_copy.default:
            before, after = tensor(node.args[0]), tensor(node)
            floats = before is not None and after is not None and before.is_floating_point() and after.is_floating_point()
            return self.through_casts and floats and before.device == after.device  # type: ignore[union-attr]
        return ops.category(node.target) == "view" and same_tensor(node, node.args[0])

    def _all(self, pairs: list[tuple[Any, Any]], state: _State) -> Iterator[_State]:
        if not pairs:
            yield state
            return
        (wanted, have), *rest = pairs
        for found in self._value(wanted, have, state):
            yield from self._all(rest, found)

    def _value(self, wanted: Any, have: Any, state: _State) -> Iterator[_State]:
        if isinstance(wanted, Step):
            if isinstance(have, fx.Node):
                yield from self.node(wanted.index, have, state)
        elif isinstance(wanted, Parameter):
            if wanted.name not in state.values:
                yield _State({**state.values, wanted.name: have}, state.nodes, state.skipped)
            elif _equal(state.values[wanted.name], have):
                yield state
        elif isinstance(wanted, tuple | list):
            if isinstance(have, tuple | list) and len(have) == len(wanted):
                yield from self._all(list(zip(wanted, have, strict=True)), state)
        elif isinstance(wanted, Anything) or _equal(wanted, have):
            yield state


def _orders(wanted: TemplateNode) -> Iterator[list[tuple[str, str]]]:
    """Pairings of argument names to try: as written, and swapped for commutative ops."""
    names = list(wanted.arguments)
    yield [(n, n) for n in names]
    if len(names) >= 2 and ops.name_of(wanted.target) in ops.COMMUTATIVE and wanted.arguments.get("alpha", 1) == 1:
        first, second, *rest = names
        yield [(first, second), (second, first), *((n, n) for n in rest)]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _obstacle(match: Match) -> str | None:
    """Why the matched nodes may not be replaced, whatever the guard says."""
    group = match.inner | frozenset(match.outputs)
    for node in match.inner:
        if any(user not in group for user in node.users) and base(node) in group:
            return "an intermediate result has other users"
    if len(match.outputs) > 1 and not _ordered(match):
        return "an operand is computed after the first output"
    return None


def _ordered(match: Match) -> bool:
    """Whether everything bound precedes every output, so that one insertion point serves all."""
    bound = {v for v in match.values.values() if isinstance(v, fx.Node)}
    for node in match.outputs[0].graph.nodes:
        if node in match.outputs:
            return not bound
        bound.discard(node)
    return False


def _rewrite(context: Context, match: Match, build: Template) -> bool:
    first = _earliest(match.outputs)
    before = first.prev
    made: dict[int, fx.Node] = {}
    for index, step in enumerate(build.nodes):
        args, kwargs = _filled(step.args, match, made), _filled(step.kwargs, match, made)
        if index in build.outputs:
            node: fx.Node | None = context.emit(step.target, tuple(args), first, kwargs)
        else:
            node = context.derive(step.target, tuple(args), first, kwargs, symbolic=True)
        if node is None:
            break
        made[index] = node
    complete = len(made) == len(build.nodes)
    pairs = [(old, made[i]) for old, i in zip(match.outputs, build.outputs, strict=True)] if complete else []
    for old, new in pairs:
        new.meta = {**old.meta, "pass": context.pass_name}
    if not complete or not all(_fits(context, old, new) for old, new in pairs):
        while first.prev is not before:
            context.graph.gm.graph.erase_node(first.prev)
        return False
    context.spend("match", match.outputs[-1])
    for old, new in pairs:
        old.replace_all_uses_with(new)
    return True


def _erase(context: Context, match: Match) -> set[fx.Node]:
    """Erase what the rewrite left unused at once: a dead user would keep later matches from being complete."""
    gone: set[fx.Node] = set()
    remaining = set(match.outputs) | match.inner
    while unused := [n for n in remaining if not n.users]:
        for node in unused:
            context.graph.gm.graph.erase_node(node)
        gone.update(unused)
        remaining.difference_update(unused)
    return gone


def _fits(context: Context, old: fx.Node, new: fx.Node) -> bool:
    """Whether `new` has the dtype and strides of `old` (checked where sizes are static) and may be aliased like it."""
    again = context.propagate(new.target, new.args, new.kwargs)
    have = tensor(old)
    if isinstance(again, torch.Tensor) and have is not None:
        alike = again.dtype == have.dtype and again.shape == have.shape and again.stride() == have.stride()
        return alike and may_stand_for(old, new)
    return may_stand_for(old, new)


def _earliest(outputs: tuple[fx.Node, ...]) -> fx.Node:
    if len(outputs) == 1:
        return outputs[0]
    for node in outputs[0].graph.nodes:
        if node in outputs:
            break
    return node


def _filled(value: Any, match: Match, made: dict[int, fx.Node]) -> Any:
    """A template's argument with parameters and steps replaced by what they are here."""
    if isinstance(value, Parameter):
        return match.values[value.name]
    if isinstance(value, Step):
        return made[value.index]
    if isinstance(value, dict):
        return {k: _filled(v, match, made) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_filled(v, match, made) for v in value]
    return value
