"""Kernels that may be launched before the one before them has ended (programmatic dependent launch, from Hopper on).

Launched so (`runtime/launch.py`), a kernel's programs start as soon as the last ones of the kernel before have started and
leave room. Each of them waits until that has ended and its stores are visible, before it touches what others write: loads
the other has to make first, stores to memory that the other still reads. By then all kernels before that one have ended,
too, because it has waited in the same way. Where a kernel is launched as usual, both instructions do nothing.

This is done to the text as it is compiled, so that printers and interpreters know nothing of it.
"""

from __future__ import annotations

import re

FIRST_ARCH = 90
"""Compute capability that has the instructions."""

OTHERS_END = "# others have ended"
"""A line of an entry's body before which it touches only what nothing in its plan writes; without it, that is the first."""

_IMPORT = "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait"
_LET_NEXT_START, _WAIT = "gdc_launch_dependents()", "gdc_wait()"
_INDENT = "    "


def chained(text: str, entry: str) -> str:
    """`text`, whose kernel is the function `entry`, with the instructions: the next kernel may start at once."""
    head = re.search(rf"^def {re.escape(entry)}\(.*\):\n", text, re.MULTILINE)
    if head is None:
        raise ValueError(f"there is no function {entry} with its parameters on one line")
    before, body = text[: head.end()], text[head.end() :]
    opening = f"{_INDENT}{_LET_NEXT_START}\n"
    marker = f"{_INDENT}{OTHERS_END}\n"
    if marker in body:
        body = body.replace(marker, f"{_INDENT}{_WAIT}\n", 1)
    else:
        opening += f"{_INDENT}{_WAIT}\n"
    return f"{_IMPORT}\n{before}{opening}{body}"
