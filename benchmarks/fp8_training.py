"""Training in fp8 against bfloat16: `python -m benchmarks.fp8_training --out FOLDER`.

A byte-level GPT (`benchmarks.real_models.ByteGPT`) learns Python's own documentation from the same first weights and
batches under autocast to bfloat16, compiled, with its linear layers as they are ("bf16") and with `options={"precision":
"fp8"}` ("fp8"). The JSON has the loss of every step, the loss on texts that were held out, and the time of a step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.real_models import ByteGPT, documentation
from benchmarks.results import target_facts, versions
from fxopt.quant.batches import compiled_apart

OPTIONS: dict[str, dict[str, Any]] = {"bf16": {}, "fp8": {"precision": "fp8"}}
WARM = 5
"""Steps that are not timed: the first ones compile, and capture."""


def loss_of(call: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """Of bytes [N, 129], each but the first given those before it."""
    with torch.autocast(windows.device.type, torch.bfloat16):
        logits = call(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def train(
    name: str, device: torch.device, read: Tensor, held_out: Tensor, sizes: dict[str, int], steps: int, batch: int
) -> dict[str, Any]:
    """Losses of `steps`, the loss on `held_out`, and seconds of a step."""
    torch.manual_seed(0)
    model = ByteGPT(**sizes).to(device)
    call = compiled_apart(model, "fxopt", OPTIONS[name], dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    order = torch.Generator().manual_seed(1)
    losses: list[Tensor] = []
    begin = time.perf_counter()
    for step in range(steps):
        if step == WARM:
            _wait(device)
            begin = time.perf_counter()
        rows = read[torch.randint(len(read), (batch,), generator=order)].to(device)
        loss = loss_of(call, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    _wait(device)
    seconds = (time.perf_counter() - begin) / max(steps - WARM, 1)
    with torch.no_grad():
        parts = [float(loss_of(model.eval(), part.to(device))) for part in held_out.split(64)]
    return {"losses": [float(x) for x in losses], "held_out": sum(parts) / len(parts), "seconds": seconds}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(
    out: Annotated[Path, typer.Option(help="folder for fp8_training.json")],
    steps: Annotated[int, typer.Option(help="of the optimizer")] = 400,
    batch: Annotated[int, typer.Option(help="windows of 128 bytes in a step")] = 64,
    width: Annotated[int, typer.Option(help="features, a multiple of 64")] = 512,
    layers: int = 6,
    device: str = "cuda",
) -> None:
    """Train both on one device, one after the other."""
    read, held_out = documentation()
    sizes = {"width": width, "layers": layers, "heads": width // 64}
    where = torch.device(device)
    found = {name: train(name, where, read, held_out[:256], sizes, steps, batch) for name in OPTIONS}
    document = {"target": target_facts(where), "versions": versions(), "sizes": sizes, "steps": steps, "batch": batch}
    out.mkdir(parents=True, exist_ok=True)
    (out / "fp8_training.json").write_text(json.dumps(document | {"runs": found}, indent=1) + "\n")
    for name, run in found.items():
        curve = " ".join(f"{run['losses'][min(at, steps - 1)]:.3f}" for at in range(0, steps + 1, max(1, steps // 8)))
        typer.echo(f"{name}: {run['seconds'] * 1e3:.2f} ms a step; held out {run['held_out']:.4f}; losses {curve}")


if __name__ == "__main__":
    typer.run(main)
