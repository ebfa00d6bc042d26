"""Precisions of layers, and which layer shall have which: what options, passes and tables speak of.

Plain data without torch. `Decisions` answers "which precision for this layer" from rules; a `Table` (what calibration has
found, quant/table.py) answers "which scale".
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Precision:
    """How the operands of a layer's product are stored. Types are names of torch dtypes, None: the model's own.

    `largest` is the magnitude that a scale brings the largest activation to. `group` is how many neighbours along the inner
    dimension share a weight's scale, 0: a whole output channel; activations in few bits have scales of the same groups then.
    `dynamic`: each row of activations has scales of its own, whatever a calibration says.
    """

    doc: str
    weights: str | None = None
    activations: str | None = None
    largest: float = 0.0
    bits: int = 8
    group: int = 0
    dynamic: bool = False

    @property
    def is_static(self) -> bool:
        """Whether activations have the scale that a calibration gives, where there is one."""
        return self.activations is not None and not self.dynamic

    @property
    def has_groups(self) -> bool:
        """Whether activations have scales of groups."""
        return self.activations is not None and self.group > 0


HIGH = "high"
PRECISIONS: dict[str, Precision] = {
    "fp8": Precision("weights and activations in float8 (e4m3)", "float8_e4m3fn", "float8_e4m3fn", 448.0),
    "int8": Precision("weights and activations in int8", "int8", "int8", 127.0),
    "fp8-dynamic": Precision("fp8 with a scale for each row", "float8_e4m3fn", "float8_e4m3fn", 448.0, dynamic=True),
    "int8-dynamic": Precision("int8 with a scale for each row", "int8", "int8", 127.0, dynamic=True),
    "fp8-group": Precision("fp8 with scales of groups", "float8_e4m3fn", "float8_e4m3fn", 448.0, group=128),
    "int8-group": Precision("int8 with scales of groups", "int8", "int8", 127.0, group=128),
    "fp8-group-dynamic": Precision(
        "fp8 with a scale for each row's groups", "float8_e4m3fn", "float8_e4m3fn", 448.0, group=128, dynamic=True
    ),
    "int8-group-dynamic": Precision(
        "int8 with a scale for each row's groups", "int8", "int8", 127.0, group=128, dynamic=True
    ),
    "int8-weight": Precision("weights in int8, activations as they are", "int8"),
    "int4-weight": Precision("weights in 4 bits, activations as they are", "uint8", bits=4, group=128),
    HIGH: Precision("as the model has it"),
}

TRAINED = ("fp8", "fp8-dynamic")
"""The precisions that training has, without a calibration; the same then."""

GROUPS = (128, 64, 32)
"""How many neighbours along the inner dimension may share a scale: the first that divides it."""


def group_of(inner: int) -> int | None:
    """How many neighbours along this inner dimension share a scale; None where it cannot have groups."""
    return next((group for group in GROUPS if inner % group == 0), None)


MULTIPLE = 16
"""Of rows and columns of an 8-bit weight on CUDA: what tensor cores and libraries take."""

MANY_COLUMNS = 4096
"""An even number of so many, or more, need be no multiple: a vocabulary is worth a kernel that no library has."""


MOST_ROWS_OF_WEIGHTS = 256
"""On CUDA, of a layer whose weight alone is of few bits. More rows are bound by arithmetic, which is the model's own: the
weight would be widened in each call, and save nothing, nor its memory, for the module keeps its own.
"""


def misfit(precision: str, columns: int, inner: int, device: str, rows: int | None = None) -> str | None:
    """Why a layer whose weight is [columns, inner] cannot have a precision on a kind of device; None if it can.

    `rows` is how many it is given, None if any.
    """
    given = PRECISIONS[precision]
    if not columns or not inner:
        return "it is empty"
    odd = columns % (2 if columns >= MANY_COLUMNS else MULTIPLE) != 0
    if device == "cuda" and (inner % MULTIPLE or (given.activations is not None and odd)):
        return f"its weight is {columns} x {inner}, and on a GPU both have to be multiples of {MULTIPLE}"
    weight_only = given.weights is not None and given.activations is None
    if device == "cuda" and weight_only and rows is not None and rows > MOST_ROWS_OF_WEIGHTS:
        return f"{rows} rows are bound by arithmetic, of which a weight in few bits saves nothing"
    if given.group and group_of(inner) is None:
        return f"its inner dimension {inner} is no multiple of {GROUPS[-1]}"
    return None


def convolution_misfit(precision: str, dims: int, groups: int, transposed: bool) -> str | None:
    """Why a convolution whose weight has `dims` dimensions cannot have a precision on any device; None if it can."""
    if transposed or groups != 1:
        return f"it is a {'transposed' if transposed else 'grouped'} convolution"
    if dims != 4:
        return "of convolutions, those of images are quantized"
    if not PRECISIONS[precision].is_static or PRECISIONS[precision].group:
        return "convolutions are quantized to fp8 or int8, with scales from a calibration"
    return None


LEAST_WIDTH, MOST_WIDTH = 32, 256
"""Features of a head that tensor cores multiply in float8, and that a kernel of ours holds."""


def misfit_of_attention(precision: str, widths: Iterable[int], half: bool) -> str | None:
    """Why attention whose operands have heads of these widths, and are of a half type or not, cannot have a precision; None
    if it can."""
    if precision != "fp8":
        return f"attention is quantized in fp8, not in {precision}"
    if not half:
        return "its operands are not of a half type"
    if any(width % MULTIPLE or not LEAST_WIDTH <= width <= MOST_WIDTH for width in widths):
        return f"its heads are not {LEAST_WIDTH} to {MOST_WIDTH} wide, and a multiple of {MULTIPLE}"
    return None


@dataclass(frozen=True)
class Decisions:
    """Rules (layer's name or fnmatch pattern, precision), in any order.

    Of the rules that match a layer, its exact name goes first, then the longest pattern.
    """

    rules: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, given: str | Mapping[str, str] | Decisions) -> Decisions:
        """From a precision for all layers, a mapping from names and patterns, or decisions as they are."""
        if isinstance(given, Decisions):
            return given
        rules = {"*": given} if isinstance(given, str) else given
        return cls(tuple(sorted(rules.items())))

    def exact(self, layer: str) -> str | None:
        """The precision that a rule with the layer's own name asks for."""
        return dict(self.rules).get(layer)

    def of_layer(self, layer: str) -> str | None:
        """The precision asked for; None where no rule matches."""
        own = self.exact(layer)
        if own is not None:
            return own
        matching = [rule for rule in self.rules if fnmatch.fnmatchcase(layer, rule[0])]
        return max(matching, key=lambda rule: (len(rule[0]), rule))[1] if matching else None

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        """The rules' names and patterns that match none of `layers`; "*" always does."""
        names = list(layers)
        return [p for p, _ in self.rules if p != "*" and p not in names and not fnmatch.filter(names, p)]

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.rules).encode()).hexdigest()


@dataclass(frozen=True)
class KnownLayer:
    """What a table says of a layer: `shape` of its weight ([N, K] of a linear layer), the precision that its user has set
    for it (None: none), and why it must stay high (None: it need not)."""

    kind: str
    shape: tuple[int, ...]
    precision: str | None
    obstacle: str | None


@dataclass(frozen=True, eq=False)
class Refinement:
    """What was fitted to a layer's weight [N, K] in one precision. Tensors are float32, on the CPU; None: nothing.

    `limits`, [N] or, for weights of groups, [N, K / group], are the magnitudes at which weights are clipped. `correction`
    [N] is added to the layer's result.
    """

    precision: str
    limits: Any = None
    correction: Any = None


@runtime_checkable
class Table(Protocol):
    """What calibration has found, as far as a compilation asks."""

    def digest(self) -> str:
        """Of everything that a compilation reads."""

    def names(self) -> list[str]:
        """All layers, in order."""

    def known(self, layer: str) -> KnownLayer | None:
        """None for a layer that the table does not have."""

    def scale(self, layer: str, precision: str) -> float:
        """What a quantized activation of the layer is to be multiplied by: positive, finite."""

    def group_scales(self, layer: str, precision: str) -> Any:
        """The same for each group of neighbours, in a precision that has groups: float32 [groups] on the CPU."""

    def head_scales(self, operand: str, precision: str) -> Any:
        """The same for each head of an operand of attention, float32 [heads] on the CPU; None where one scale does."""

    def zero_point(self, layer: str, precision: str) -> int:
        """The integer that stands for zero, from -128 to 127: what is added to a quantized activation of the layer."""

    def refinement(self, layer: str, precision: str) -> Refinement | None:
        """What was fitted to the layer in this precision."""

    def channels(self, layer: str) -> Any:
        """What the channels of the layer's input are divided by, and the weight's columns multiplied by, before they are
        quantized: float32 [K], powers of two. None: they stay as they are."""


def description(given: Any) -> str | None:
    """What is wrong with a value of the option `precision`; None for a good one."""
    if given is None or isinstance(given, Decisions):
        rules: Mapping[Any, Any] = {} if given is None else dict(given.rules)
    elif isinstance(given, str):
        rules = {"*": given}
    elif isinstance(given, Mapping):
        rules = given
    else:
        return f"it is a {type(given).__name__}, not a name, a mapping or Decisions"
    for layer, precision in rules.items():
        if not isinstance(layer, str):
            return f"a layer is named by a string, not by {layer!r}"
        if precision not in PRECISIONS:
            return f"there is no precision {precision!r} (for {layer!r})"
    return None
