"""Launch configurations of a region, ordered by a cost model: bytes in flight, wasted lanes, registers, GPU filled."""

from __future__ import annotations

from fxopt.codegen.configs.across import across_configs
from fxopt.codegen.configs.nests import nest_configs
from fxopt.codegen.triton_config import TritonConfig
from fxopt.ir.region import Region
from fxopt.target import Target


def configs(region: Region, target: Target, limit: int = 8) -> list[TritonConfig]:
    """Up to `limit` distinct configurations of `region` for `target`, best first by the cost model. Never empty."""
    return nest_configs(region, target, limit) if region.across is None else across_configs(region, target)[:limit]
