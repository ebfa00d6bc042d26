"""Every fusion pattern, in the order in which they are tried. Adding one is adding its file and its name here."""

from __future__ import annotations

from fxopt.passes.fusions.mm_bias import MM_BIAS
from fxopt.passes.fusions.mm_view_bias import MM_VIEW_BIAS
from fxopt.passes.pattern import Pattern

PATTERNS: tuple[Pattern, ...] = (MM_BIAS, MM_VIEW_BIAS)
