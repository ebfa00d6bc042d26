"""What functions of calibrations are given by users: checked, with messages that say what belongs there."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxopt.errors import CalibrationError, OptionError
from fxopt.options import suggestion
from fxopt.precision import HIGH, PRECISIONS


def given_module(model: Any, function: str) -> nn.Module:
    """`model`, or the module that it was compiled from. Raises CalibrationError for what is none, naming `function`."""
    found = getattr(model, "_orig_mod", model)
    if not isinstance(found, nn.Module):
        raise CalibrationError(f"fxopt.{function} takes a module, not a {type(found).__name__}")
    return found


def check_quantizes(precision: str) -> None:
    """Raises OptionError for what is no precision, and for "high"."""
    if not isinstance(precision, str) or precision not in PRECISIONS or precision == HIGH:
        names = [name for name in PRECISIONS if name != HIGH]
        raise OptionError(
            f"there is no precision {precision!r} in few bits{suggestion(precision, names)}; there are {', '.join(names)}"
        )
