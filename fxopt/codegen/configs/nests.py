"""Configurations of one nest, of whatever form it is."""

from __future__ import annotations

from fxopt.codegen.configs.points import (
    pointwise_configs,
    row_point_configs,
    sharing_row_points,
    short_row_points,
    tile_configs,
)
from fxopt.codegen.configs.reductions import reduction_configs
from fxopt.codegen.configs.rows import group_configs
from fxopt.codegen.triton_config import TritonConfig
from fxopt.codegen.triton_groups import group_size, with_group_sums
from fxopt.codegen.triton_tiling import tile
from fxopt.ir.region import Region
from fxopt.target import Target


def nest_configs(region: Region, target: Target, limit: int = 8) -> list[TritonConfig]:
    """Up to `limit` distinct configurations of a region without sums over its rows beside it, best first."""
    region = with_group_sums(region)
    two_dimensional = tile(region)
    if two_dimensional.y.symbols:
        found = tile_configs(two_dimensional, target)
    elif (size := group_size(region.nest)) > 1:
        found = group_configs(two_dimensional, size, target)
    elif two_dimensional.reduces:
        found = reduction_configs(two_dimensional, target)
    else:
        rows, points = tile(region, "rows"), pointwise_configs(two_dimensional, target)
        own = [*row_point_configs(rows, target), *points]
        found = [*own[:1], *sharing_row_points(rows), *short_row_points(rows), *own[1:]]
    return list(dict.fromkeys(found))[:limit]
