"""Gathers: index, gather, embedding, index_select, take."""

from __future__ import annotations

import torch

from fxopt.lower.table import Table

aten = torch.ops.aten
TABLE = Table()
