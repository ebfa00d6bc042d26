"""Values put together or surrounded: cat, stack, pad, flip, roll."""

from __future__ import annotations

import torch

from fxopt.lower.table import Table

aten = torch.ops.aten
TABLE = Table()
