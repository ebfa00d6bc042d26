"""A process that judges cases of the zoo: [name, mode] on stdin, its record on stdout, as lines of JSON.

`python -m tests.models.worker DEVICE`. A case that ends the CUDA context ends the process, which can do nothing more:
{"died": reason} are its last words.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from typing import Any, TextIO

import torch


def main(device: str) -> None:
    """Serve cases until stdin ends. What torch prints goes to stderr."""
    answers: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from tests.models.zoo import run_case

    warnings.simplefilter("ignore")

    def say(line: Any) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    for line in sys.stdin:
        name, mode = json.loads(line)
        record = run_case(name, mode, device)
        if device != "cpu":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                say({"died": f"{record.why or record.status}: {error}"[:600]})
                os._exit(1)
        say(dataclasses.asdict(record))
        say({"done": True})


if __name__ == "__main__":
    main(sys.argv[1])
