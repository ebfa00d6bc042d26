"""Comparison rows as a table for terminals of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from fxopt.report.compare import Row, speedup

_COLUMNS = ("", "time", "+/-", "speed-up", "error", "compile", "kernels", "memory")


def open_console() -> Console:
    """Standard output; wide enough for any table when it is no terminal, where 80 columns would cut it."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def comparison_table(title: str, rows: Sequence[Row]) -> Table:
    """One line per contender; the fastest in bold, those without a measurement and the reason below the table.

    "+/-" is half the distance between the quartiles; "*" marks a compilation that included loading the compiler. The memory
    column is left out when nobody measured any.
    """
    memory = any(r.peak_bytes is not None for r in rows)
    skipped = "\n".join(f"{r.contender}: {r.skipped}" for r in rows if r.skipped)
    table = Table(
        title=title,
        title_justify="left",
        caption=skipped or None,
        caption_justify="left",
        pad_edge=False,
        collapse_padding=True,
        box=box.SIMPLE_HEAD,
    )
    for number, name in enumerate(_COLUMNS if memory else _COLUMNS[:-1]):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    times = [r.seconds for r in rows if r.seconds is not None]
    for row in rows:
        if not row.skipped:
            table.add_row(*_cells(row, rows, memory), style="bold" if times and row.seconds == min(times) else None)
    return table


def _cells(row: Row, rows: Sequence[Row], memory: bool) -> list[str]:
    factor = speedup(row, rows)
    cells = [
        f"{row.contender} {row.part}".rstrip(),
        milliseconds(row.seconds),
        "" if row.quartiles is None else f"{(row.quartiles[1] - row.quartiles[0]) * 500:.2g}",
        "" if factor is None else f"{factor:.2f}x",
        "random" if row.error is None else f"{row.error:.1e}",
        _compile_cell(row),
        "?" if row.kernel_count is None else str(row.kernel_count),
    ]
    return [*cells, "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"] if memory else cells


def _compile_cell(row: Row) -> str:
    if row.contender == "eager" or row.compile_seconds is None:
        return ""
    return f"{row.compile_seconds:.1f} s{'*' if row.cache.endswith('first use') else ''}"


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.3f} ms"
