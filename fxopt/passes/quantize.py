"""Layers of an inference graph in the precision that was decided for them (options `precision` and `calibration`).

What a layer is given is quantized by ordinary ops, which fuse with what makes it, and multiplied by `fxopt::scaled_mm`;
a weight-only layer becomes `fxopt::weight_only_mm`. With s the activations' scale and L the largest value of the type,

    quantized = cast(clamp(round(float32(x) * (1 / s)), -L, L))      (round: to even, of integers only)

- A calibration gives one scale for the whole operand: a 0-dimensional constant in memory, so that layers with different
  scales are one kernel (repeated for each row where the library's product wants that). Float8 saturates at L, NaN stays NaN;
  an integer has no NaN, and stands for zero then. What a relu has made is clamped at zero from below, which changes no
  value and lets a kernel's bound take care of NaN.
- Attention is quantized where a rule with "@attention" in its name or pattern asks for fp8: query, key and value with the
  calibration's scales (of heads, where their ranges are far apart), the products of them and of the probabilities in float8
  (ir/quantized_attention.py). The value is stored with its rows contiguous, as tensor cores read what they sum over.
- In a precision of groups, each so many neighbours along the inner dimension have a scale of their own, in the weight and in
  what it multiplies: from the calibration's ranges of channels for all rows, or each row's own.
- Where a calibration's range lies mostly on one side of zero (after an activation), an int8 operand has a zero point z: z is
  added before rounding, the limits are -128 and 127, and what z adds to the product, a constant for each column, is
  subtracted with the bias.
- A calibration may have limits at which weights are clipped, and a correction that is added with the bias.
- A calibration may have powers of two for the channels of a layer's input (quant/smooth.py, quant/equalize.py): x is
  divided by them first, and the weight multiplied, which changes no value of the product.
- Without a calibration, and in a dynamic precision, each row has the scale max |x| / L, at least the least normal float32:
  a row of zeros is zeros. A row with NaN or Inf has such a scale, and a result of NaN.

The weight is quantized here, once, and is a constant of its own beside the module's; layers that are given the same
quantize it once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx

from fxopt.errors import CalibrationError
from fxopt.ir import ops
from fxopt.ir.graph import Phase, Role
from fxopt.ir.group_scaled_op import GROUP_SCALED_MM
from fxopt.ir.layers import AT_ATTENTION, CONVOLUTION, LINEAR, AttentionLayer, Layer, attention_layers, layers
from fxopt.ir.quantized_attention import SCALED_ATTENTION, steps_by_groups
from fxopt.ir.quantized_convolution import SCALED_CONVOLUTION
from fxopt.ir.quantized_ops import SCALED_MM, WEIGHT_ONLY_MM, quantize_weight, zero_point_offset
from fxopt.ir.spec import fake_mode
from fxopt.options import suggestion
from fxopt.passes.channel_affine import channel_affine, constants_of, value_of
from fxopt.passes.constant_folding import add_constant
from fxopt.passes.context import Context
from fxopt.passes.facts import arguments, tensor
from fxopt.passes.quantize_attention import obstacle_of_attention, rows_last
from fxopt.precision import (
    HIGH,
    PRECISIONS,
    Decisions,
    KnownLayer,
    Precision,
    Table,
    convolution_misfit,
    group_of,
    misfit,
)
from fxopt.target import Target

aten = torch.ops.aten

TOPIC = "precision"
"""Of the journal's notes."""

LEAST_SCALE = torch.finfo(torch.float32).tiny
"""Of a row: its inverse is finite."""

_FLOATING = (torch.float16, torch.bfloat16, torch.float32)


def quantize(context: Context) -> None:
    decisions, table = context.options.precision, context.options.calibration
    if context.graph.phase is not Phase.INFERENCE or (decisions is None and table is None):
        return
    assert not isinstance(table, str), "whoever runs passes has read the table"
    found = layers(context.graph)
    attention = attention_layers(context.graph)
    _check_names(context, decisions or Decisions(), [*found, *attention], table)
    if table is not None:
        _check_table(table, found)
    rewrite = _Rewrite(context, table)
    for layer in found:
        name = _wanted(layer, decisions or Decisions(), table)
        if name == HIGH:
            continue
        try:
            how = rewrite.layer(layer, name)
        except _HighError as problem:
            context.journal.note(TOPIC, f"{layer.name} stays high, not {name}: {problem}")
            context.reject("quantize", str(problem))
            continue
        context.journal.note(TOPIC, f"{layer.name}: {name}{how}")
    own = Decisions(tuple(rule for rule in (decisions or Decisions()).rules if AT_ATTENTION in rule[0]))
    for each in attention:
        name = own.of_layer(each.name) or HIGH
        if name == HIGH:
            continue
        try:
            rewrite.attention(each, name)
        except _HighError as problem:
            context.journal.note(TOPIC, f"{each.name} stays high, not {name}: {problem}")
            context.reject("quantize", str(problem))
            continue
        context.journal.note(TOPIC, f"{each.name}: {name}")
    for reason, names in rewrite.without_range.items():
        context.journal.warn(f"stay high, although another precision was asked for: {', '.join(map(repr, names))}: {reason}")


class _HighError(Exception):
    """Why a layer cannot have the precision that was asked for."""


# ---------------------------------------------------------------------- decisions


def _wanted(layer: Layer, decisions: Decisions, table: Table | None) -> str:
    """A rule with the layer's own name goes before what the table's user has set, and that before patterns."""
    known = None if table is None else table.known(layer.name)
    own = known.precision if known is not None else None
    return decisions.exact(layer.name) or own or decisions.of_layer(layer.name) or HIGH


def _check_names(context: Context, decisions: Decisions, found: list[Layer | AttentionLayer], table: Table | None) -> None:
    """A warning for each rule that matches no layer of a graph, nor one that the table has from the model's other graphs.

    A graph without layers says nothing.
    """
    names = [layer.name for layer in found]
    known = [*names, *(table.names() if table is not None else ())]
    for rule in decisions.unmatched(known) if names else ():
        context.journal.warn(
            f"option 'precision': none of the {len(names)} layers of this graph is called {rule!r}{suggestion(rule, known)};"
            " fxopt.calibrate(...).names() lists a model's layers"
        )


def _check_table(table: Table, found: list[Layer]) -> None:
    """Raises CalibrationError where a layer is another one than the table's, or none is known to it."""
    missing = []
    for layer in found:
        known = table.known(layer.name)
        if known is None:
            missing.append(layer)
        elif (layer.kind, layer.shape) != (known.kind, known.shape) and known.obstacle is None:
            raise CalibrationError(
                f"the calibration was made for another model: its layer {layer.name!r} is a {_described(known)}, here it is"
                f" a {_described(layer)}. Calibrate this model with fxopt.calibrate"
            )
    if found and len(missing) == len(found):
        first, names = missing[0], table.names()
        raise CalibrationError(
            f"the calibration was made for another model: it knows none of this graph's {len(found)} layers; the first is"
            f" {first.name!r}, a {_described(first)}{suggestion(first.name, names)} (the table begins with"
            f" {names[0] if names else None!r}). Calibrate this model with fxopt.calibrate"
        )


def _described(layer: Layer | KnownLayer) -> str:
    return f"{layer.kind} with a weight of {' x '.join(map(str, layer.shape))}"


# ---------------------------------------------------------------------- rewrites


class _Rewrite:
    """The layers of one graph, one after the other. What two of them need is made once, before the first."""

    def __init__(self, context: Context, table: Table | None) -> None:
        self.context, self.table = context, table
        self.without_range: dict[str, list[str]] = {}
        self._made: dict[Hashable, Any] = {}
        self._made_constants: dict[fx.Node, torch.Tensor] = {}

    def layer(self, layer: Layer, name: str) -> str:
        """Replace the layer's node; how, for people. Raises _HighError."""
        precision = PRECISIONS[name]
        _check_operands(layer, name)
        if layer.kind == CONVOLUTION:
            return self._convolution(layer, name)
        bias = _bias(layer)
        refined = None if self.table is None else self.table.refinement(layer.name, name)
        limits, offset = (None, None) if refined is None else (refined.limits, refined.correction)
        if precision.activations is None:
            group = (group_of(layer.shape[1]) or 0) if precision.group else 0
            weight, scales = self._weight(layer, precision, group, limits)
            bias = self._with_offset(layer, bias, offset)
            x = self._divided(layer, layer.x)
            product = self._derive(WEIGHT_ONLY_MM, (x, weight, scales, bias, precision.bits, group), layer)
            how = f", groups of {group}" if group else ""
        elif precision.has_groups:
            group = group_of(layer.shape[1]) or 0
            weight, scales = self._weight(layer, precision, group, limits)
            bias = self._with_offset(layer, bias, offset)
            x, scale_x, how = self._grouped_activation(layer, name, group)
            out = layer.node.meta["val"].dtype
            product = self._derive(GROUP_SCALED_MM, (x, weight, scale_x, scales, bias, out), layer)
        else:
            scale = self._scale(layer, name)
            zero = 0 if scale is None or self.table is None else self.table.zero_point(layer.name, name)
            weight, scales = self._weight(layer, precision, 0, limits)
            if zero and scale is not None:
                own = zero_point_offset(self._made_constants[weight], self._made_constants[scales], scale, zero)
                offset = own if offset is None else own + offset.to(own.device)
            bias = self._with_offset(layer, bias, offset)
            x, scale_x = self._activation(layer, precision, scale, zero)
            out = layer.node.meta["val"].dtype
            product = self._derive(SCALED_MM, (x, weight, scale_x, scales, bias, out), layer)
            how = ", scaled row by row" if scale is None else f", scale {scale:.4g}"
            how += f", zero at {zero}" if zero else ""
        how += ", refined" if refined is not None else ""
        if self.context.exhausted:
            raise _HighError("the limit of rewrites is reached")
        if not self.context.replace(name, layer.node, product):
            raise _HighError("its result shares memory with an output")
        return how

    def attention(self, layer: AttentionLayer, name: str) -> None:
        """Replace attention's node. Raises _HighError."""
        given = arguments(layer.node)
        problem = obstacle_of_attention(layer, name, given)
        if problem is not None:
            raise _HighError(problem)
        if self.table is None:
            raise _HighError("its scales come from a calibration, and there is none")
        scales: dict[str, Any] = {}
        for operand in layer.operands:
            known = self.table.known(layer.operand_name(operand))
            if known is None or known.obstacle is not None:
                reason = "calibration did not observe attention" if known is None else str(known.obstacle)
                self.without_range.setdefault(reason, []).append(layer.name)
                raise _HighError(reason)
            own = self.table.head_scales(layer.operand_name(operand), name)
            whole = torch.tensor(self.table.scale(layer.operand_name(operand), name))
            scales[operand] = whole if own is None else own
        factors = dict(scales)
        if scales["query"].dim():
            groups = layer.operands["key"].meta["val"].shape[1]
            scales["query"] = steps_by_groups(scales["query"], groups)
            factors |= {"query": None, "key": scales["key"] * scales["query"].view(groups, -1)[:, 0]}
        narrow = [self._narrow(layer, PRECISIONS[name], operand, scales[operand]) for operand in layer.operands]
        mask, settings = given["attn_mask"], (given["is_causal"], given["scale"], given["enable_gqa"])
        operands = (*narrow, *(self._factor_of_heads(layer, factors[operand]) for operand in layer.operands), mask)
        dtype = layer.node.meta["val"].dtype
        new = self._derive(SCALED_ATTENTION, (*operands, *settings, dtype), layer)
        if self.context.exhausted:
            raise _HighError("the limit of rewrites is reached")
        if not self.context.replace(name, layer.node, new):
            raise _HighError("its result shares memory with an output")

    def _factor_of_heads(self, layer: AttentionLayer, scale: torch.Tensor | None) -> fx.Node | None:
        """`scale`, [] or [heads], as `fxopt::scaled_attention` takes it."""
        if scale is None:
            return None
        own = scale.to(layer.node.meta["val"].device)
        return self._constant(layer, "scale", own.view(1, -1, 1, 1)) if own.dim() else self._scalar(layer, "scale", own)

    def _narrow(self, layer: AttentionLayer, precision: Precision, operand: str, scale: torch.Tensor) -> fx.Node:
        """An operand of attention in float8, with this scale, [] or [heads]."""
        x = layer.operands[operand]
        rows = x.meta["val"].shape[2]
        x = rows_last(functools.partial(self._derive, layer=layer), x) if operand == "value" else x
        wide = self._derive(aten._to_copy.default, (x,), layer, {"dtype": torch.float32})
        inverse = scale.reciprocal().to(x.meta["val"].device)
        factor = (
            self._constant(layer, "inverse", inverse[:, None, None])
            if inverse.dim()
            else self._scalar(layer, "inverse", inverse)
        )
        cast = self._cast(layer, precision, self._derive(aten.mul.Tensor, (wide, factor), layer), -precision.largest)
        if operand == "value":
            cast = self._derive(aten.slice.Tensor, (cast, 3, 0, rows), layer)
            cast = self._derive(aten.transpose.int, (cast, 2, 3), layer)
        return cast

    def _convolution(self, layer: Layer, name: str) -> str:
        """`layer` for a convolution, with what scales and shifts its channels after it."""
        precision, channels = PRECISIONS[name], layer.shape[0]
        _, _, _, stride, padding, dilation, *_ = layer.node.args
        scale = self._scale(layer, name)
        if scale is None:
            raise _HighError("a convolution takes its scale from a calibration")
        refined = None if self.table is None else self.table.refinement(layer.name, name)
        limits, correction = (None, None) if refined is None else (refined.limits, refined.correction)
        window, scales = self._window(layer, precision, limits)
        known = constants_of(self.context.graph)
        bias = None if layer.addend is None else known(layer.addend)
        if layer.addend is not None and bias is None:
            raise _HighError("its bias is no constant")
        if correction is not None:
            own = correction.double().to(layer.node.meta["val"].device)
            bias = own if bias is None else bias.detach().double() + own
        after = channel_affine(layer.node, channels, known)
        factor, offset = after.factor, after.offset
        if bias is not None:
            own = bias.detach().double() * (1.0 if factor is None else factor)
            offset = own if offset is None else offset + own
        if factor is not None:
            scales = (scales.double() * factor.to(scales.device)).float()
        x, scale_x = self._activation(layer, precision, scale, 0)
        shift = None if offset is None else self._constant(layer, "shift", offset.float())
        given = (x, window, scale_x, self._constant(layer, "scales", scales), shift, stride, padding, dilation)
        old = after.last
        product = self._derive(SCALED_CONVOLUTION, (*given, old.meta["val"].dtype), layer)
        if not _same_strides(product.meta["val"], old.meta["val"]):
            rows = {"memory_format": torch.contiguous_format}
            product = self._derive(aten.clone.default, (product,), layer, rows)
        if not _same_strides(product.meta["val"], old.meta["val"]):
            raise _HighError("its result lies in memory in an unusual order")
        if self.context.exhausted:
            raise _HighError("the limit of rewrites is reached")
        before, alone = old.prev, old is layer.node
        if not self.context.replace(name, old, product):
            raise _HighError("its result shares memory with an output")
        if not alone:
            _erase_unused(before, layer.node)
        return f", scale {scale:.4g}" + (", refined" if refined is not None else "")

    def _window(self, layer: Layer, precision: Precision, limits: torch.Tensor | None) -> tuple[fx.Node, torch.Tensor]:
        """The quantized weight [C_out, R, S, C], a constant, and its scales [C_out]."""
        dtype, channels = getattr(torch, str(precision.weights)), self._channels(layer)

        def make() -> tuple[fx.Node, torch.Tensor]:
            try:
                value = self._value(layer.weight).permute(0, 2, 3, 1)
                if channels is not None:
                    value = value.float() * channels.to(value.device)
                weight, scales = quantize_weight(value.reshape(value.shape[0], -1), dtype, limits=limits)
            except RuntimeError as error:
                raise _HighError(f"its weight cannot be quantized here: {str(error).partition(chr(10))[0]}") from error
            return self._constant(layer, "weight", weight.view(value.shape)), scales

        key = ("window", layer.weight, dtype, _bits(channels), _bits(limits))
        made: tuple[fx.Node, torch.Tensor] = self._once(key, make)
        return made

    def _scale(self, layer: Layer, name: str) -> float | None:
        """By which the layer's quantized input is to be multiplied; None: each row has its own."""
        if self.table is None or not PRECISIONS[name].is_static:
            return None
        known = self.table.known(layer.name)
        if known is None or known.obstacle is not None:
            reason = "calibration did not see it" if known is None else str(known.obstacle)
            self.without_range.setdefault(reason, []).append(layer.name)
            raise _HighError(reason)
        return self.table.scale(layer.name, name)

    def _weight(
        self, layer: Layer, precision: Precision, group: int, limits: torch.Tensor | None
    ) -> tuple[fx.Node, fx.Node]:
        """The quantized weight [N, K] and its scales, as constants."""
        dtype, channels = getattr(torch, str(precision.weights)), self._channels(layer)

        def make() -> tuple[fx.Node, fx.Node]:
            try:
                value = self._value(layer.weight).t()
                if channels is not None:
                    value = value.float() * channels.to(value.device)
                weight, scales = quantize_weight(value, dtype, precision.bits, group, limits)
            except RuntimeError as error:  # torch's OutOfMemoryError is one
                raise _HighError(f"its weight cannot be quantized here: {str(error).partition(chr(10))[0]}") from error
            return self._constant(layer, "weight", weight), self._constant(layer, "scales", scales)

        key = ("weight", layer.weight, dtype, group, _bits(channels), _bits(limits))
        made: tuple[fx.Node, fx.Node] = self._once(key, make)
        return made

    def _value(self, node: fx.Node) -> torch.Tensor:
        """What a frozen input or a view of one is."""
        return value_of(self.context.graph, node)

    def _with_offset(self, layer: Layer, bias: fx.Node | None, offset: torch.Tensor | None) -> fx.Node | None:
        """`bias` with `offset`, float32 [N], added to it."""
        if offset is None:
            return bias
        if bias is None or self._is_frozen(bias):
            device = layer.node.meta["val"].device
            known = offset.to(device) if bias is None else offset.to(device) + self._value(bias).to(torch.float32)
            return self._constant(layer, "bias", known)
        added = self._constant(layer, "offset", offset.to(bias.meta["val"].device))
        return self._derive(aten.add.Tensor, (bias, added), layer)

    def _is_frozen(self, node: fx.Node) -> bool:
        while node.op != "placeholder":
            if node.op != "call_function" or not ops.is_view(node.target) or len(node.all_input_nodes) != 1:
                return False
            node = node.all_input_nodes[0]
        return any(i.name in (node.name, node.target) and i.role is Role.CONSTANT for i in self.context.graph.inputs)

    def _activation(self, layer: Layer, precision: Precision, scale: float | None, zero: int) -> tuple[fx.Node, fx.Node]:
        """The quantized input [M, K] and its scale, [] or [M]."""
        _check_device(layer, precision)
        make = functools.partial(self._by_row, layer, precision)
        if scale is not None:
            make = functools.partial(self._by_tensor, layer, precision, scale, zero)
        made: tuple[fx.Node, fx.Node] = self._once(
            ("x", layer.x, precision.activations, scale, zero, _bits(self._channels(layer))), make
        )
        return made

    def _grouped_activation(self, layer: Layer, name: str, group: int) -> tuple[fx.Node, fx.Node, str]:
        """The quantized input [M, K], its scales, [1, K / group] or [M, K / group], and how, for people."""
        precision = PRECISIONS[name]
        _check_device(layer, precision)
        known = self.table is not None and precision.is_static and self._scale(layer, name) is not None
        scales = self.table.group_scales(layer.name, name) if known and self.table is not None else None
        key = ("groups", layer.x, precision.activations, group, _bits(scales), _bits(self._channels(layer)))
        values, scale_x = self._once(key, functools.partial(self._by_group, layer, precision, group, scales))
        return values, scale_x, f", groups of {group}" + (", scaled row by row" if scales is None else "")

    def _by_group(
        self, layer: Layer, precision: Precision, group: int, scales: torch.Tensor | None
    ) -> tuple[fx.Node, fx.Node]:
        wide, inner = self._divided(layer, self._wide(layer)), layer.shape[1]
        grouped = self._derive(aten.view.default, (wide, [-1, inner // group, group]), layer)
        if scales is None:
            values, scale_x = scaled_rows(lambda op, args: self._derive(op, args, layer), grouped, precision.largest)
        else:
            own = scales.to(layer.x.meta["val"].device)
            factors = self._constant(layer, "inverse", own.reciprocal()[:, None])
            values = self._derive(aten.mul.Tensor, (grouped, factors), layer)
            scale_x = self._constant(layer, "scale", own[None])
        values = self._derive(aten.view.default, (values, [-1, inner]), layer)
        return self._cast(layer, precision, values, -precision.largest), scale_x

    def _by_tensor(self, layer: Layer, precision: Precision, scale: float, zero: int) -> tuple[fx.Node, fx.Node]:
        device = layer.x.meta["val"].device
        own = torch.tensor(scale, dtype=torch.float32)
        factor = self._scalar(layer, "inverse", own.reciprocal().to(device))
        values = self._derive(aten.mul.Tensor, (self._divided(layer, self._wide(layer)), factor), layer)
        if zero:
            shift = self._scalar(layer, "zero", torch.tensor(float(zero)).to(device))
            values = self._derive(aten.add.Tensor, (values, shift), layer)
        least = -128.0 if zero else 0.0 if _made_by_relu(layer.x) else -precision.largest
        return self._cast(layer, precision, values, least), self._scale_of_rows(layer, precision, own.to(device))

    def _scale_of_rows(self, layer: Layer, precision: Precision, scale: torch.Tensor) -> fx.Node:
        """`scale` [], or [M] where the library's product of 8-bit floats would make that of it in each call."""
        rows = layer.x.meta["val"].shape[0]
        float8 = precision.activations == "float8_e4m3fn" and layer.kind == LINEAR
        if scale.device.type != "cuda" or not float8 or not isinstance(rows, int):
            return self._scalar(layer, "scale", scale)
        key = (scale.item(), scale.device, rows)
        made: fx.Node = self._once(key, lambda: self._constant(layer, "scale", scale.expand(rows).contiguous()))
        return made

    def _by_row(self, layer: Layer, precision: Precision) -> tuple[fx.Node, fx.Node]:
        wide = self._divided(layer, self._wide(layer))
        values, scale = scaled_rows(lambda target, args: self._derive(target, args, layer), wide, precision.largest)
        return self._cast(layer, precision, values, -precision.largest), scale

    def _channels(self, layer: Layer) -> torch.Tensor | None:
        return None if self.table is None else self.table.channels(layer.name)

    def _divided(self, layer: Layer, x: fx.Node) -> fx.Node:
        """`x` [M, K] or [N, C, H, W] by the layer's channels, exactly: these are powers of two."""
        channels = self._channels(layer)
        if channels is None:
            return x
        given = x.meta["val"]
        inverse = channels.reciprocal().to(given.device, given.dtype).view(-1, *[1] * (given.dim() - 2))
        key = _bits(channels), given.device, given.dtype, given.dim()
        factor = self._once(key, lambda: self._constant(layer, "channels", inverse))
        return self._derive(aten.mul.Tensor, (x, factor), layer)

    def _wide(self, layer: Layer) -> fx.Node:
        if layer.x.meta["val"].dtype == torch.float32:
            return layer.x
        return self._derive(aten._to_copy.default, (layer.x,), layer, {"dtype": torch.float32})

    def _cast(self, layer: Layer | AttentionLayer, precision: Precision, values: fx.Node, least: float) -> fx.Node:
        dtype = getattr(torch, str(precision.activations))
        if not dtype.is_floating_point:
            values = self._derive(aten.round.default, (values,), layer)
        values = self._derive(aten.clamp.default, (values, least, precision.largest), layer)
        return self._derive(aten._to_copy.default, (values,), layer, {"dtype": dtype})

    def _scalar(self, layer: Layer | AttentionLayer, what: str, value: torch.Tensor) -> fx.Node:
        made: fx.Node = self._once((value.item(), value.device), lambda: self._constant(layer, what, value))
        return made

    def _constant(self, layer: Layer | AttentionLayer, what: str, value: torch.Tensor) -> fx.Node:
        mode = fake_mode(self.context.graph)
        if mode is None or hasattr(value, "fake_mode"):
            raise _HighError("its weight is not at hand")
        with mode:
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        meta = {"val": fake, "module": layer.node.meta.get("module", "")}
        node = add_constant(self.context, f"{layer.node.name}_{what}", value, meta)
        self._made_constants[node] = value
        return node

    def _derive(
        self, target: Any, args: tuple[Any, ...], layer: Layer | AttentionLayer, kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        node = self.context.derive(target, args, layer.node, kwargs, symbolic=True)
        if node is None:
            raise _HighError(f"{ops.name_of(target)} cannot be propagated for its sizes")
        return node

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


Derive = Callable[[Any, tuple[Any, ...]], Any]


def scaled_rows(derive: Derive, wide: fx.Node, largest: float) -> tuple[Any, Any]:
    """`wide` [M, K] or [M, groups, group], float32, with the largest magnitude along the last dimension brought to
    `largest`, and the scales without that dimension; nodes that `derive(op, arguments)` makes."""
    amax = derive(aten.amax.default, (derive(aten.abs.default, (wide,)), [-1]))
    scale = derive(aten.clamp_min.default, (derive(aten.mul.Tensor, (amax, 1.0 / largest)), LEAST_SCALE))
    column = derive(aten.unsqueeze.default, (derive(aten.reciprocal.default, (scale,)), -1))
    return derive(aten.mul.Tensor, (wide, column)), scale


def _bits(values: torch.Tensor | None) -> bytes | None:
    """By which equal vectors are known."""
    return None if values is None else values.numpy().tobytes()


def _made_by_relu(x: fx.Node) -> bool:
    """Whether `x`, what a layer is given, is the result of a relu, as it is or in another shape."""
    while ops.is_view(x.target) and len(x.all_input_nodes) == 1:
        x = x.all_input_nodes[0]
    return x.target is aten.relu.default


def _same_strides(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike."""
    return all(a == b for a, b, n in zip(one.stride(), two.stride(), one.shape, strict=True) if n != 1)


def _erase_unused(last: fx.Node, first: fx.Node) -> None:
    """Erase `first` and what is computed from it, up to `last`: who still read the layer's input matters to other passes."""
    node = last
    while node is not first:
        node, candidate = node.prev, node
        if not candidate.users:
            candidate.graph.erase_node(candidate)
    if not first.users:
        first.graph.erase_node(first)


def _check_operands(layer: Layer, name: str) -> None:
    if layer.kind == CONVOLUTION:
        _, _, _, _, _, _, transposed, _, groups = layer.node.args
        problem = convolution_misfit(name, len(layer.shape), groups, bool(transposed))  # type: ignore[arg-type]  # an int
        if problem is not None:
            raise _HighError(problem)
    x, weight = tensor(layer.x), tensor(layer.weight)
    if x is None or weight is None or x.dtype != weight.dtype or x.dtype not in _FLOATING:
        raise _HighError(
            f"its operands are {'no tensors' if x is None or weight is None else f'{x.dtype} and {weight.dtype}'}"
        )
    if x.device != weight.device:
        raise _HighError(f"its operands are on {x.device} and {weight.device}")
    columns, inner = layer.shape[:2]
    rows = x.shape[0] if layer.kind == LINEAR else None
    problem = misfit(name, columns, inner, x.device.type, rows if isinstance(rows, int) else None)
    if problem is not None:
        raise _HighError(problem)


def _check_device(layer: Layer, precision: Precision) -> None:
    device = layer.x.meta["val"].device
    floating = getattr(torch, str(precision.activations)).is_floating_point
    if floating and device.type == "cuda" and torch.cuda.is_available() and not Target.current(device).has_float8:
        raise _HighError("its GPU does not multiply float8")


def _bias(layer: Layer) -> fx.Node | None:
    """The bias [N]. Raises _HighError for another addend."""
    bias = layer.addend
    if bias is None:
        return None
    value = tensor(bias)
    if value is None or tuple(value.shape) != layer.shape[:1] or not value.is_floating_point():
        raise _HighError("what is added to its product is no bias")
    return bias
