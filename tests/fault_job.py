"""A small training and inference job for a process of its own: `python -m tests.fault_job [PRELUDE]`, or a fork of
`tests.fault_server`, which saves importing torch.

Runs PRELUDE (Python that breaks something) before anything is compiled, compares every result with eager, and prints JSON:
the warnings that a user would see, the number of generated kernels, the retreats, and what explain says of them.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings

import torch
from torch import nn


class Net(nn.Module):
    """A softmax, and a counter written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("steps", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        return (self.last(torch.softmax(self.first(x), -1)) * 2).sin() + self.steps


def check_training() -> None:
    mine = Net()
    eager = copy.deepcopy(mine)
    x = torch.randn(6, 8)
    for model in (torch.compile(mine, backend="fxopt"), eager):
        model(x).square().sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close([p.grad for p in mine.parameters()], [p.grad for p in eager.parameters()], **close)
    assert torch.equal(mine.steps, eager.steps)


def check_dropout() -> None:
    dropped = torch.compile(lambda x: nn.functional.dropout(x, 0.5) * 2, backend="fxopt")(torch.ones(100))
    assert set(dropped.tolist()) == {0.0, 4.0}


def main(prelude: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(prelude, {})
        check_training()
        check_dropout()
    from fxopt.journal import RECENT
    from fxopt.report import Explanation

    explanation = Explanation(tuple(RECENT))
    seen = [str(w.message) for w in caught]
    found = {"kernels": explanation.kernels, "retreats": explanation.retreats, "explained": str(explanation)}
    print(json.dumps({"warnings": seen, **found}))


if __name__ == "__main__":
    main("".join(sys.argv[1:]))
