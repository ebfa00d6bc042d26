"""Which implementation runs each region and each library call."""

from fxopt.tune.candidate import Choice
from fxopt.tune.choose import choose
from fxopt.tune.library import choose_library

__all__ = ["Choice", "choose", "choose_library"]
