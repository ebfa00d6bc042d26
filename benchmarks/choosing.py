"""Which cases a program runs: those that its command line names. One that there is not ends it before it measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import typer

from fxopt.options import suggestion
from fxopt.report.contenders import Contender, pick

T = TypeVar("T")
LISTED = 120
"""No more names are listed."""


class UnknownName(typer.BadParameter, ValueError):
    """Nothing has the name that was given; says which names there are."""


def containing(cases: Iterable[T], part: str, name: Callable[[T], str]) -> list[T]:
    """Those of `cases` whose name contains `part`, in order. Raises UnknownName, with all names, if there is none."""
    return _having(cases, [part], name, str.__contains__, "has {} in its name")


def containing_any(cases: Iterable[T], parts: str, name: Callable[[T], str], separator: str = ",") -> list[T]:
    """Those of `cases` whose name contains one of `parts`, in order: all of them if there are no parts.

    Raises UnknownName, with all names, if a part is in none.
    """
    return _having(cases, split(parts, separator) or [""], name, str.__contains__, "has {} in its name")


def beginning(cases: Iterable[T], parts: str, name: Callable[[T], str], separator: str = ",") -> list[T]:
    """As `containing_any`, of names that begin with one of `parts`."""
    return _having(cases, split(parts, separator) or [""], name, str.startswith, "begins with {}")


def named(names: str, known: Mapping[str, T], what: str, separator: str = ",") -> list[T]:
    """What `names` stand for in `known`, in the order given, each once. Raises UnknownName, with all names, for another."""
    wanted = split(names, separator)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        hint = suggestion(unknown[0], known) if unknown else ""
        raise UnknownName(
            f"no {what} {', '.join(map(repr, unknown)) or 'is named'}{hint}; there are: {_listed(list(known))}"
        )
    return [known[name] for name in dict.fromkeys(wanted)]


def names_of(names: str, known: Iterable[str], what: str, separator: str = ",") -> list[str]:
    """`names`, each once, after the check of `named`."""
    return named(names, {name: name for name in known}, what, separator)


def contending(names: str) -> list[Contender]:
    """Those of fxopt.report, by name, "all" or "plain". Raises UnknownName, with all names, for another."""
    try:
        return pick(names)
    except ValueError as error:
        raise UnknownName(str(error)) from error


def split(names: str, separator: str = ",") -> list[str]:
    """What stands between separators, without the spaces around it; nothing for nothing."""
    return [name.strip() for name in names.split(separator) if name.strip()]


def _having(
    cases: Iterable[T], parts: list[str], name: Callable[[T], str], has: Callable[[str, str], bool], what: str
) -> list[T]:
    given = list(cases)
    names = list(dict.fromkeys(map(name, given)))
    for part in parts:
        if given and not any(has(each, part) for each in names):
            raise UnknownName(f"no case {what.format(repr(part))}{suggestion(part, names)}; cases: {_listed(names)}")
    return [case for case in given if any(has(name(case), part) for part in parts)]


def _listed(names: list[str]) -> str:
    separator = "; " if any("," in name for name in names) else ", "
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return separator.join([*names[:LISTED], *more])
