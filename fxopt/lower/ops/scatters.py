"""Writes at computed places: index_put, scatter, scatter_add, embedding backward, slice_scatter."""

from __future__ import annotations

import torch

from fxopt.lower.table import Table

aten = torch.ops.aten
TABLE = Table()
