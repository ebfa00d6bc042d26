"""Errors a user can meet. Each message names the thing and says what to do."""

from __future__ import annotations


class FxoptError(Exception):
    """Base of every error fxopt raises on purpose."""


class OptionError(FxoptError, ValueError):
    """An unknown or ill-typed mode or option."""


class RetreatError(FxoptError):
    """Under `options={"strict": True}`: something would have fallen back to ATen; the message says what and why."""


class UnsupportedError(FxoptError):
    """Internal to compilation: a rule does not cover this case; its caller retreats. `reason` is shown by explain."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class GradientError(FxoptError, RuntimeError):
    """A gradient was asked for that an op of fxopt does not have; the message names the op and says what to do."""


class HungKernelError(FxoptError, RuntimeError):
    """A generated kernel does not end. The process cannot use its GPU any more; the next one avoids the kernel."""


class CalibrationError(FxoptError, ValueError):
    """Data, a model or a table of ranges that calibration or quantization cannot use; the message names the layer."""


class PlanError(FxoptError):
    """A plan's bytes are not a valid plan; the message names the field."""


class GraphSpecError(FxoptError):
    """A graph broke the rules of its phase; the message names the node and, when known, the pass that did it."""


class CacheError(FxoptError):
    """The cache directory cannot be used; the message names it, the reason and what to do."""
