"""Whether a kernel for Hopper writes registers that its products still read, found in Triton's own IR (TTGIR).

A product of a group of warps (wgmma) runs on while the kernel does something else, and may have its left operand in
registers. Triton 3.6 lets such a product run on into the next step of its loop as if the operand were in shared memory, of
which each step has a buffer of its own; in registers the next step has the same ones, and may fill them before it waits. On
an H200 some elements of such kernels were wrong, depending on the tile, without a message from any compiler.
"""

from __future__ import annotations

import re

_NAME = re.compile(r"%([\w$.-]+)")
_RESULTS = re.compile(r"(?:%[\w$.-]+(?::\d+)?(?:, )?)+(?= = )")
_VIEW = re.compile(r" = (?:ttg\.convert_layout|tt\.(?:bitcast|join|reshape|split|trans)) ([^:{]*)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot %([\w$.-]+).* : (tensor|!ttg\.memdesc)<")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")
_LOOP = re.compile(r"\bscf\.(?:for|while) |^} do {")
_CARRIED = re.compile(r"[(,] ?(%[\w$.-]+) = ")
_LOCATION = re.compile(r" loc\([^()]*\)$")

_Lines = frozenset[int]


class _Steps:
    """The lines of a kernel, and what runs when."""

    def __init__(self, ttgir: str) -> None:
        self.lines = [_LOCATION.sub("", line.strip()) for line in ttgir.splitlines()]
        self.ends = _ends(self.lines)
        self.reads = _reads(self.lines)
        self.running: list[_Lines] = []
        """Of each product under way, the lines that write the registers it reads."""

    def clash(self, first: int, last: int, before: int = 0) -> bool:
        """Whether lines from `first` to `last`, the steps of loops twice, write what a product under way reads. Products end
        in order; a wait leaves as many of the latest as its `pendings` says, and in a branch, which may not run, also the
        first `before`, which were under way there already.
        """
        number = first
        while number < last:
            line, end = self.lines[number], self.ends.get(number)
            if number in self.reads:
                self.running.append(self.reads[number])
                if "isAsync = true" not in line:
                    del self.running[before:]
            elif wait := _WAIT.search(line):
                del self.running[before : max(before, len(self.running) - int(wait[1]))]
            loops = _LOOP.search(line) is not None
            for _ in range(2 if loops else 1):
                if any(number in written for written in self.running):
                    return True
                if end is not None and self.clash(number + 1, end, before if loops else len(self.running)):
                    return True
            number = end or number + 1
        return False


def _ends(lines: list[str]) -> dict[int, int]:
    """Where what begins in a line with its last brace ends."""
    ends: dict[int, int] = {}
    opened: list[int] = []
    for number, line in enumerate(lines):
        if line.startswith("}") and opened:
            ends[opened.pop()] = number
        if line.endswith("{"):
            opened.append(number)
    return ends


def _reads(lines: list[str]) -> dict[int, _Lines]:
    """The lines that write what the product in a line reads from registers, for each that has a product. A value that a loop
    hands on is written where that begins; what only looks at another value otherwise writes nothing.
    """
    written: dict[str, _Lines] = {}
    reads: dict[int, _Lines] = {}
    opened = 0
    for number, line in enumerate(lines):
        if product := _PRODUCT.search(line):
            own = written.get(product[1], frozenset((opened,)))
            reads[number] = own if product[2] == "tensor" else frozenset()
        lines_of = frozenset((number,))
        if view := _VIEW.search(line):
            lines_of = frozenset[int]().union(*(written.get(n, frozenset((opened,))) for n in _NAME.findall(view[1])))
        results = _RESULTS.match(line)
        named = (results[0] if results else "", *_CARRIED.findall(line))
        written.update(dict.fromkeys(_NAME.findall(" ".join(named)), lines_of))
        opened = number if line.endswith("{") else opened
    return reads


def written_while_read(ttgir: str) -> str | None:
    """Why the kernel of this TTGIR may be wrong, None if it is not: a step of a loop writes the registers of a left operand
    that a product of the step before it may still read.
    """
    steps = _Steps(ttgir)
    if not any(steps.reads.values()) or not steps.clash(0, len(steps.lines)):
        return None
    return "Triton lets a product read its left operand from registers that the loop's next step writes"
