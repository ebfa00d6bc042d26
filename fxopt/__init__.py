"""fxopt: a `torch.compile` backend that captures, fuses, measures and replays whole graphs.

`torch.compile(model, backend="fxopt")` needs no import of this package. What is here is for looking inside (`explain`), for
frozen models (`refreeze`), for quantization (`quantize`, `calibrate`, `smoothed`, `equalized`, `activation_aware`,
`clipped`, `bias_corrected`, `Calibration`, `Decisions`) and for typed settings (`Options`). Every name is loaded on first
use, so `import fxopt` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxopt.capture.freeze import refreeze
    from fxopt.options import Options
    from fxopt.precision import Decisions
    from fxopt.quant.awq import activation_aware
    from fxopt.quant.calibrate import calibrate
    from fxopt.quant.clip import clipped
    from fxopt.quant.correct import bias_corrected
    from fxopt.quant.equalize import equalized
    from fxopt.quant.search import quantize
    from fxopt.quant.smooth import smoothed
    from fxopt.quant.table import Calibration
    from fxopt.report import Explanation, explain

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Decisions",
    "Explanation",
    "Options",
    "__version__",
    "activation_aware",
    "bias_corrected",
    "calibrate",
    "clipped",
    "equalized",
    "explain",
    "quantize",
    "refreeze",
    "smoothed",
]

_HOME = {
    "Calibration": ("fxopt.quant.table", "Calibration"),
    "Decisions": ("fxopt.precision", "Decisions"),
    "Explanation": ("fxopt.report", "Explanation"),
    "Options": ("fxopt.options", "Options"),
    "calibrate": ("fxopt.quant.calibrate", "calibrate"),
    "explain": ("fxopt.report", "explain"),
    "quantize": ("fxopt.quant.search", "quantize"),
    "activation_aware": ("fxopt.quant.awq", "activation_aware"),
    "clipped": ("fxopt.quant.clip", "clipped"),
    "bias_corrected": ("fxopt.quant.correct", "bias_corrected"),
    "equalized": ("fxopt.quant.equalize", "equalized"),
    "smoothed": ("fxopt.quant.smooth", "smoothed"),
    "refreeze": ("fxopt.capture.freeze", "refreeze"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fxopt' has no attribute {name!r}")
    module, attribute = _HOME[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
