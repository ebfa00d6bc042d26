"""Views: on a stored value a change of strides, on an expression a change of index."""

from __future__ import annotations

import torch

from fxopt.lower.table import Table

aten = torch.ops.aten
TABLE = Table()
