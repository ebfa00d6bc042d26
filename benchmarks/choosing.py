"""Which cases a program runs: those that its command line names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import typer

from fxopt.options import suggestion

T = TypeVar("T")


def containing(cases: Iterable[T], part: str, name: Callable[[T], str]) -> list[T]:
    """Those of `cases` whose name contains `part`, in order. Raises typer.BadParameter, with all names, if there is none."""
    given = list(cases)
    found = [case for case in given if part in name(case)]
    if given and not found:
        names = [name(case) for case in given]
        raise typer.BadParameter(f"no case has {part!r} in its name{suggestion(part, names)}; cases: {', '.join(names)}")
    return found
