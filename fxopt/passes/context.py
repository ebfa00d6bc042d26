"""What a pass is given: the graph, the fuel, and the two ways to change a node. All bookkeeping is here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.graph import Graph
from fxopt.ir.spec import difference, fake_mode, propagation
from fxopt.journal import Journal
from fxopt.passes.facts import may_stand_for, static_shape, tensor
from fxopt.precision import Decisions, Table


class PassOptions(Protocol):
    """The options that passes read (fxopt.options.Options has them)."""

    @property
    def disable(self) -> tuple[str, ...]: ...
    @property
    def fuel(self) -> int | None: ...
    @property
    def dump(self) -> str | None: ...
    @property
    def check(self) -> bool: ...
    @property
    def tuning_seconds(self) -> float | None: ...
    @property
    def precision(self) -> Decisions | None: ...
    @property
    def calibration(self) -> Table | str | None: ...
    @property
    def fallback_random(self) -> bool: ...


@dataclass(frozen=True)
class DefaultOptions:
    """Every pass on, no limit, no dumps, nothing quantized."""

    disable: tuple[str, ...] = ()
    fuel: int | None = None
    dump: str | None = None
    check: bool = False
    tuning_seconds: float | None = None
    precision: Decisions | None = None
    calibration: Table | None = None
    fallback_random: bool = False


@dataclass(frozen=True)
class Rewrite:
    """One applied rewrite: "pass.rule", and the node it replaced by name, op and module."""

    rule: str
    node: str
    op: str
    module: str


Rule = Callable[["Context", fx.Node], fx.Node | None]


@dataclass
class Context:
    """The state of one run of the pipeline. `fuel` is how many rewrites may still be applied (None: no limit)."""

    graph: Graph
    options: PassOptions
    journal: Journal
    fuel: int | None = None
    pass_name: str = ""
    log: list[Rewrite] = field(default_factory=list)
    rejections: Counter[tuple[str, str]] = field(default_factory=Counter)
    _mode: Any = None

    @classmethod
    def without_options(cls, graph: Graph) -> Context:
        """For running a pass on its own."""
        return cls(graph, DefaultOptions(), Journal(graph.name))

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.gm.graph.nodes)

    @property
    def exhausted(self) -> bool:
        return self.fuel is not None and self.fuel <= 0

    def spend(self, rule: str, node: fx.Node) -> None:
        """Count one rewrite of `node`. Callers check `exhausted` first."""
        if self.fuel is not None:
            self.fuel -= 1
        self.log.append(Rewrite(f"{self.pass_name}.{rule}", node.name, str(node.target), node.meta.get("module", "")))

    def reject(self, rule: str, reason: str) -> None:
        """Count a rewrite that was considered and not made."""
        self.rejections[rule, reason] += 1

    def emit(self, target: Any, args: tuple[Any, ...], origin: fx.Node, kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A new node with the value of `origin` (shape, dtype, strides), inserted before it, attributed to its module."""
        with self.graph.gm.graph.inserting_before(origin):
            node = self.graph.gm.graph.call_function(target, args, kwargs or {})
        node.meta = {**origin.meta, "pass": self.pass_name}
        return node

    def call(self, target: Any, args: tuple[Any, ...], origin: fx.Node, kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A new call in Dynamo's graph, before `origin`, with its example value (requires_grad included)."""
        fake_args, fake_kwargs = fx.node.map_arg((args, kwargs or {}), lambda n: n.meta["example_value"])
        with torch.enable_grad(), origin.meta["example_value"].fake_mode:
            value = target(*fake_args, **fake_kwargs)
        node = self.emit(target, args, origin, kwargs)
        node.meta["example_value"] = value
        return node

    def derive(
        self,
        target: Any,
        args: tuple[Any, ...],
        origin: fx.Node,
        kwargs: dict[str, Any] | None = None,
        symbolic: bool = False,
    ) -> fx.Node | None:
        """A new node whose value is computed by FakeTensor propagation; None where that fails (see `propagate`)."""
        value = self.propagate(target, args, kwargs or {}, symbolic)
        if value is None:
            return None
        node = self.emit(target, args, origin, kwargs)
        node.meta["val"] = value
        return node

    def propagate(
        self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, symbolic: bool = False
    ) -> Any:
        """The FakeTensor value of a call; None where the op refuses, or a size is symbolic.

        `symbolic=True` propagates symbolic sizes too, and gives None when that took a guard.
        """
        inputs: list[fx.Node] = []
        fx.node.map_arg((args, dict(kwargs or {})), inputs.append)
        if not symbolic and not all(_static(n.meta["val"]) for n in inputs):
            return None
        fake_args, fake_kwargs = fx.node.map_arg((args, dict(kwargs or {})), lambda n: n.meta["val"])
        self._mode = self._mode or fake_mode(self.graph)
        if self._mode is None:
            return None
        guards = _guard_count(self._mode)
        try:
            with propagation(self._mode):
                value = target(*fake_args, **fake_kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
        return value if _guard_count(self._mode) == guards else None

    def emit_checked(self, target: Any, args: tuple[Any, ...], origin: fx.Node) -> fx.Node | None:
        """`emit`, after propagation confirmed that the call gives exactly the value of `origin` (static sizes only)."""
        value = self.propagate(target, args)
        have = tensor(origin)
        if value is None or have is None or difference(have, value) or have.stride() != value.stride():
            return None
        return self.emit(target, args, origin)

    def replace(self, rule: str, old: fx.Node, new: fx.Node) -> bool:
        """Make every use of `old` a use of `new`, unless that would change aliasing. Counts one rewrite."""
        if not may_stand_for(old, new):
            return False
        self.replace_by_part(rule, old, new)
        return True

    def replace_by_part(self, rule: str, old: fx.Node, new: fx.Node) -> None:
        """`replace` where `new` lies beside others in one storage, its elements nobody else's, and its strides are those of
        `old`: that is not seen by who writes into it.
        """
        self.spend(rule, old)
        old.replace_all_uses_with(new)
        self.graph.gm.graph.erase_node(old)


def _guard_count(mode: Any) -> int:
    return len(mode.shape_env.guards) if mode.shape_env is not None else 0


def _static(value: Any) -> bool:
    """Whether a value of meta["val"] mentions no size symbol."""
    if isinstance(value, tuple | list):
        return all(_static(v) for v in value)
    if isinstance(value, torch.Tensor):
        return static_shape(value) and all(isinstance(s, int) for s in value.stride())
    return not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def apply_rules(context: Context, rules: Mapping[str, tuple[Rule, ...]]) -> None:
    """Walk the graph once, in order, trying on each node the rules listed under its op's name.

    Operands are already rewritten when a node is reached, and a node that a rule made is tried in turn. A rule returns the
    node that replaces its argument, or None; nodes it emitted in vain are removed.
    """
    for node in context.nodes:
        current: fx.Node | None = node
        while current is not None and current.op == "call_function" and ops.is_overload(current.target):
            current = _try_rules(context, rules.get(ops.name_of(current.target), ()), current)


def _try_rules(context: Context, rules: tuple[Rule, ...], node: fx.Node) -> fx.Node | None:
    """The newly made node that replaced `node`, if any."""
    for rule in rules:
        if context.exhausted:
            return None
        before = node.prev
        new = rule(context, node)
        made = node.prev is not before and node.prev is new
        if new is not None and new is not node and context.replace(rule.__name__, node, new):
            return new if made else None
        while node.prev is not before and not node.prev.users:
            context.graph.gm.graph.erase_node(node.prev)
    return None
