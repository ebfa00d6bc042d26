"""Which implementation runs each region and each library call."""

from fxopt.tune.attention import choose_attention
from fxopt.tune.candidate import Choice
from fxopt.tune.choose import choose
from fxopt.tune.library import choose_library

__all__ = ["Choice", "choose", "choose_attention", "choose_library"]
