"""Tensors made from nothing: full, arange, iota and casts between types."""

from __future__ import annotations

import torch

from fxopt.lower.table import Table

aten = torch.ops.aten
TABLE = Table()
