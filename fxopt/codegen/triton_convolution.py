"""A convolution as a Triton kernel: a template of `templates/conv.py` with the printed epilogue as its argument.

As in `triton_contraction`, b0 and b1 are the image and the weight, and the geometry is literals of the entry.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from fxopt.codegen.templates import conv_config
from fxopt.codegen.templates.conv_config import ConvProblem, StencilConfig, SumsConfig
from fxopt.codegen.templates.gemm_entry import GemmCall, descriptor_type, partial_shape
from fxopt.codegen.templates.gemm_problem import GemmConfig
from fxopt.codegen.triton import Printed
from fxopt.codegen.triton_block import BlockFunction
from fxopt.codegen.triton_contraction import epilogue_ops, moved_by_epilogue, print_epilogue, print_join, source_of
from fxopt.codegen.triton_names import operations
from fxopt.codegen.triton_ops import POINTER_TYPE
from fxopt.errors import UnsupportedError
from fxopt.ir.region import Contraction, Patches
from fxopt.target import Target

MODULE = "from fxopt.codegen.templates import conv"
BOX_MODULE = "from fxopt.codegen.templates import box_conv"
_EPILOGUE = "epilogue"
_STENCIL_STAGES = 1
"""A stencil's loop begins each step with several loads that do not wait for each other: there is nothing to stage."""


def convolution_problem(contraction: Contraction) -> ConvProblem:
    """The convolution of `contraction` and what its epilogue moves, for the cost model and the templates.

    Raises UnsupportedError where the left operand is no patches or a number is unknown.
    """
    patches, weight, channels = contraction.a, contraction.b, contraction.sizes[3]
    if not isinstance(patches, Patches):
        raise UnsupportedError("a product of matrices")
    given = (channels, weight.row, weight.column, weight.offset)
    if not all(isinstance(x, int) for x in given):
        raise UnsupportedError("a weight of unknown layout")
    dtype = contraction.buffers[patches.buffer].dtype
    read, written = moved_by_epilogue(contraction)
    return ConvProblem(
        patches,
        channels,  # type: ignore[arg-type]  # they are numbers
        dtype,
        given[1:],  # type: ignore[arg-type]
        read,
        written,
        epilogue_ops(contraction),
    )


ConvConfig = StencilConfig | SumsConfig | GemmConfig


def print_convolution(contraction: Contraction, config: ConvConfig, target: Target, unrolled: bool = False) -> Printed:
    """`contraction`, whose left operand are patches, in configuration `config`: one kernel, or for the gradient of a weight,
    and in parts, two and a buffer between them, the second one `unrolled` or not.

    Raises UnsupportedError where Triton has no form for the epilogue or `target`.
    """
    if not target.compiles_triton:
        raise UnsupportedError(f"Triton does not generate code for {target.name}")
    problem = convolution_problem(contraction)
    if isinstance(config, SumsConfig):
        return _print_sums(contraction, problem, config, target)
    if isinstance(config, GemmConfig) and config.tma:
        return _print_boxes(contraction, problem, config)
    if isinstance(config, GemmConfig) and config.split > 1:
        if contraction.pooled:
            raise UnsupportedError("pools of places in parts of the inner dimension")
        return _print_parts(contraction, problem, config, target, unrolled)
    rows, columns = (None, config.channels) if isinstance(config, StencilConfig) else (config.block_m, config.block_n)
    epilogue = print_epilogue(contraction, rows and rows // problem.pool_places, columns)
    if isinstance(config, StencilConfig):
        kinds = {"b0": POINTER_TYPE[problem.dtype], "b1": POINTER_TYPE[contraction.buffers[contraction.b.buffer].dtype]}
        call, entry, stages = _stencil(problem, config, epilogue.extra, kinds), "fx_stencil", _STENCIL_STAGES
    else:
        call, entry, stages = _implicit(problem, config, epilogue.extra), "fx_conv", config.stages
    name = "_".join([entry, *operations(contraction.region.nest)])
    return Printed((source_of(contraction, name, call, epilogue, config.warps, stages, MODULE),))


def _print_boxes(contraction: Contraction, problem: ConvProblem, config: GemmConfig) -> Printed:
    shape = conv_config.box(problem, config.block_m)
    count = conv_config.boxes(problem, shape)
    whole = count * config.block_m == problem.product.m
    epilogue = print_epilogue(contraction, 1 if whole else None, config.block_n)
    call = _boxes(problem, config, shape, count, epilogue.extra)
    name = "_".join(["fx_conv", *operations(contraction.region.nest)])
    return Printed((source_of(contraction, name, call, epilogue, config.warps, config.stages, BOX_MODULE),))


def _boxes(problem: ConvProblem, config: GemmConfig, shape: tuple[int, int, int], count: int, extra: str) -> GemmCall:
    seen = conv_config.boxed(problem)
    if seen is None:
        raise UnsupportedError("an image or a weight that no tensor descriptor has")
    if not config.swap:
        raise UnsupportedError("patches that pass through registers")
    (_, column, offset), inner, weight, more = problem.weight, config.block_k, "b1", ""
    image: dict[str, Any] = {"shape": list(seen.shape), "strides": list(seen.strides), "offset": seen.offset}
    image |= {"block": [*shape, inner]} | ({"steps": [1, *seen.stride, 1]} if seen.stride != (1, 1) else {})
    maps = {"b0": image}
    signature = {"b0": descriptor_type(problem.dtype, image["block"])}
    if conv_config.is_by_rows(problem):
        weight, more = f"b1 + {offset}" if offset else "b1", f", W_COLUMN={column}"
        signature["b1"] = POINTER_TYPE[problem.dtype]
    else:
        block = [config.block_n, inner]
        maps["b1"] = {"shape": [problem.channels, seen.columns], "strides": [column, 1], "offset": offset, "block": block}
        signature["b1"] = descriptor_type(problem.dtype, block)
    names = ("SHAPE", "PLACES", "WINDOW", "STRIDE", "PADDING", "DILATION")
    values = (seen.shape, seen.places, seen.window, seen.stride, seen.padding, seen.dilation)
    way = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    way += f", BOX={shape}, EPILOGUE={_EPILOGUE}, BM={config.block_m}, BN={config.block_n}, BK={inner}"
    way += f", GROUP={config.group}, SUBTILE={config.subtile}" + ", PROMOTE=True" * config.promote
    way += _pool(problem)
    text = f"box_conv.box_gemm(b0, {weight}, {extra}, {problem.channels}, {way}{more})"
    return GemmCall(text, signature, maps, count * ceil(problem.channels / config.block_n))


def _print_parts(
    contraction: Contraction, problem: ConvProblem, config: GemmConfig, target: Target, unrolled: bool
) -> Printed:
    partial, join = print_join(contraction, partial_shape(problem.product, config), target, "conv_parts", unrolled)
    sums = BlockFunction("", {"b2": "*fp32"}, (partial.name,), ())
    call = _implicit(problem, config, "b2")
    parts = source_of(contraction, "fx_conv_split", call, sums, config.warps, config.stages, MODULE)
    return Printed((parts, join), (partial,))


def _print_sums(contraction: Contraction, problem: ConvProblem, config: SumsConfig, target: Target) -> Printed:
    patches, (row, column, offset) = problem.patches, problem.weight
    if not patches.transposed or column != 1:
        raise UnsupportedError("sums of anything but a depthwise weight's gradient, channels-last")
    partial, join = print_join(contraction, (config.parts, 1, patches.rows, problem.channels), target, "parts")
    blocks = f"T={config.rows}, P={config.columns}, BC={config.channels}, PARTS={config.parts}"
    grad = f"b1 + {offset}" if offset else "b1"
    text = f"conv.stencil_gradient({_image(problem)}, {grad}, b2, ROW={row}, {_geometry(problem)}, {blocks})"
    kinds = dict.fromkeys(("b0", "b1"), POINTER_TYPE[problem.dtype])
    call = GemmCall(text, kinds, {}, config.programs(problem))
    epilogue = BlockFunction("", {"b2": "*fp32"}, (partial.name,), ())
    parts = source_of(contraction, "fx_stencil_gradient", call, epilogue, config.warps, _STENCIL_STAGES, MODULE)
    return Printed((parts, join), (partial,))


def _stencil(problem: ConvProblem, config: StencilConfig, extra: str, kinds: dict[str, str]) -> GemmCall:
    if not problem.patches.depthwise or problem.patches.transposed:
        raise UnsupportedError("a stencil of anything but a depthwise convolution")
    row, column, offset = problem.weight
    weight = f"b1 + {offset}" if offset else "b1"
    blocks = f"T={config.rows}, P={config.columns}, BC={config.channels}"
    given = f"{_image(problem)}, {weight}, {extra}, {row}, {column}"
    text = f"conv.stencil({given}, {_geometry(problem)}, EPILOGUE={_EPILOGUE}, {blocks})"
    return GemmCall(text, kinds, {}, config.programs(problem))


def _implicit(problem: ConvProblem, config: GemmConfig, extra: str) -> GemmCall:
    row, column, offset = problem.weight
    blocks = f"BM={config.block_m}, BN={config.block_n}, BK={config.block_k}, GROUP={config.group}"
    split = config.split > 1
    way = f"{blocks}, SPLIT={config.split}" if split else f"EPILOGUE={_EPILOGUE}, {blocks}, SUBTILE={config.subtile}"
    way += (", PROMOTE=True" if config.promote else "") + _pool(problem)
    weight = f"b1 + {offset}" if offset else "b1"
    given = f"{_image(problem)}, {weight}, {extra}, {problem.channels}, {row}, {column}"
    text = f"conv.{'split_' if split else ''}implicit_gemm({given}, {_geometry(problem)}, {way})"
    return GemmCall(text, dict.fromkeys(("b0", "b1"), POINTER_TYPE[problem.dtype]), {}, config.tiles(problem.product))


def _pool(problem: ConvProblem) -> str:
    pool = problem.patches.pool
    return f", POOL={pool}" if pool != (1, 1) else ""


def _image(problem: ConvProblem) -> str:
    offset = problem.patches.offset
    return f"b0 + {offset}" if offset else "b0"


def _geometry(problem: ConvProblem) -> str:
    p = problem.patches
    given = {
        "SHAPE": p.shape,
        "STRIDES": p.strides,
        "PLACES": p.places,
        "WINDOW": p.window,
        "STRIDE": p.stride,
        "PADDING": p.padding,
        "DILATION": p.dilation,
    }
    return ", ".join(f"{name}={value}" for name, value in given.items())
