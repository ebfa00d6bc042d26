"""A journal as text and as JSON data."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fxopt.journal import Journal, KernelEntry


def journal_to_dict(journal: Journal) -> dict[str, Any]:
    """JSON data of one graph's record; kernel sources included."""
    return {
        "graph": journal.graph,
        "kernels": [
            {
                "name": k.name,
                "language": k.language,
                "origins": list(k.origins),
                "choice": k.choice,
                "bytes": k.nbytes,
                "source": k.source,
            }
            for k in journal.kernels
        ],
        "library": [{"op": op, "origin": origin} for op, origin in journal.library],
        "retreats": [{"what": what, "reason": reason} for what, reason in journal.retreats],
        "passes": [{"name": n, "rewrites": c, "seconds": s} for n, c, s in journal.passes],
        "seconds": dict(journal.seconds),
        "memory": dict(journal.memory),
        "notes": [{"topic": topic, "text": text} for topic, text in journal.notes],
    }


def journal_to_text(journal: Journal) -> str:
    """One graph's record for people: kernels, library calls, retreats, passes, time."""
    sections = [
        _section("kernels", [_kernel_line(k) for k in journal.kernels]),
        _section("library calls", _counted(journal.library), len(journal.library)),
        _section("retreats to ATen", [f"{what}: {reason}" for what, reason in journal.retreats]),
        _section("passes that changed something", [_pass_line(*p) for p in journal.passes if p[1]]),
        _section("memory, beside inputs", _memory_lines(journal.memory)),
        _section("compile time", [f"{phase:<24}{_duration(s)}" for phase, s in journal.seconds.items()]),
        _section("notes", [f"{topic}: {text}" for topic, text in journal.notes]),
    ]
    return "\n".join([f"== {journal.graph}", *(s for s in sections if s)])


def _counted(library: list[tuple[str, str]]) -> list[str]:
    """Each op that is called, with how often."""
    return [f"{count:4d} x {op}" for op, count in Counter(op for op, _ in library).most_common()]


def _memory_lines(memory: dict[str, int]) -> list[str]:
    if not memory:
        return []
    parts = f"planned {_bytes(memory['planned'])}, own storages and outputs {_bytes(memory['own'])}"
    lines = [f"peak {_bytes(memory['peak'])}: {parts}, library results {_bytes(memory['library'])}"]
    if "eager" in memory:
        lines.append(f"eager {_bytes(memory['eager'])}, by the lifetimes of its values")
    return lines


def _section(title: str, lines: list[str], count: int | None = None) -> str:
    """With a number in its title: of its lines, or the `count` that they stand for."""
    head = f"  {title} ({len(lines) if count is None else count})"
    return "\n".join([head, *(f"    {line}" for line in lines)]) if lines else ""


def _kernel_line(kernel: KernelEntry) -> str:
    size = f", moves {_bytes(kernel.nbytes)}" if kernel.nbytes else ""
    choice = f", {kernel.choice}" if kernel.choice and kernel.language != "cpp" else ""  # C++ has but one form
    return f"{kernel.name} [{kernel.language}{choice}{size}] <- {fold_origins(kernel.origins)}"


def fold_origins(origins: tuple[str, ...], limit: int = 6) -> str:
    """Origins in order without repeats, those beyond `limit` counted: a long list helps nobody in a table."""
    distinct = list(dict.fromkeys(o for o in origins if o))
    rest = len(distinct) - limit
    return ", ".join(distinct[:limit]) + (f", and {rest} more" if rest > 0 else "") or "(no module)"


def _pass_line(name: str, rewrites: int, seconds: float) -> str:
    return f"{name:<24}{rewrites:5d} rewrites{_duration(seconds):>12}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
