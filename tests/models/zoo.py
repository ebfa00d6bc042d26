"""A zoo of models, compiled in every mode and judged against float64: `python -m tests.models.zoo --all --json FILE`.

Nothing here is known to fxopt by name: these are the models that nobody listed. Results are written after every case, and
cases that FILE already holds as right are not run again, so the command can be killed and started again. A case during
which the process died stays in FILE as a crash.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.models import architectures, nets
from tests.models.architectures import tokens, values
from tests.models.judge import MODES, Problem, Record, judge

COMMITTED = Path(__file__).with_name("results.json")


def net(made: Callable[[], nn.Module], *given: dict[str, Any]) -> Callable[[], Problem]:
    """A plain torch model from its builder and its inputs; inputs after the first are for the dynamic modes."""

    def make() -> Problem:
        torch.manual_seed(0)
        return Problem(made().eval(), given[0], given[1:])

    return make


def _points(*shape: int) -> torch.Tensor:
    return values(*shape).requires_grad_()


def _edges(nodes: int, count: int) -> torch.Tensor:
    return torch.randint(0, nodes, (2, count), generator=torch.Generator().manual_seed(2))


def _sampled(rays: int, samples: int) -> dict[str, Any]:
    return {"points": _points(rays, samples, 3), "depths": values(rays, samples).abs().cumsum(-1)}


NOISY = {"steps": torch.tensor([3, 700])}

PLAIN_MODELS: dict[str, Callable[[], Problem]] = {
    "transformer": net(nets.Seq2Seq, *({"source": tokens(2, n) % 20, "target": tokens(2, n + 1, 1) % 20} for n in (7, 11))),
    "transformer-pre-norm": net(
        lambda: nets.Seq2Seq(norm_first=True), {"source": tokens(2, 7) % 20, "target": tokens(2, 6) % 20}),
    "transformer-breaking": net(
        lambda: nets.Seq2Seq(told=False), {"source": tokens(2, 7) % 20, "target": tokens(2, 6) % 20}),
    "transformer-encoder": net(nets.Encoder, *({"x": values(2, n, 16)} for n in (9, 14))),
    "lstm-gru": net(nets.Recurrent, {"tokens": tokens(3, 6) % 20}),
    "lstm-by-hand": net(nets.HandCell, *({"x": values(n, 6, 8)} for n in (3, 5))),
    "unet": net(nets.UNet, *({"x": _points(2, 3, n, n)} for n in (16, 24))),
    "efficientnet-blocks": net(nets.EfficientNet, {"x": values(4, 3, 20, 20), "labels": torch.tensor([0, 4, 2, 2])}),
    "shuffle-dense": net(nets.ShuffleDense, *({"x": _points(2, 3, n, n)} for n in (12, 18))),
    "wavenet": net(nets.WaveNet, *({"x": values(2, 1, n)} for n in (32, 45))),
    "vae": net(nets.VAE, {"x": values(6, 24).sigmoid()}),
    "gan": net(nets.Generator, {"z": values(4, 6)}),
    "mlp-mixer": net(nets.Mixer, *({"x": values(n, 3, 16, 16)} for n in (2, 5))),
    "nerf": net(nets.Nerf, *(_sampled(n, 10) for n in (5, 8))),
    "gcn": net(nets.GCN, *({"x": _points(n, 6), "edges": _edges(n, 3 * n)} for n in (10, 15))),
    "dlrm": net(nets.DLRM, {
        "dense": values(4, 5), "indices": tokens(3, 9) % 20, "offsets": torch.tensor([[0, 2, 2, 5]] * 3)}),
    "scan": net(nets.Scan, *({"x": _points(2, n, 8)} for n in (10, 13))),
    "moe": net(nets.MoE, *({"x": _points(n, 8)} for n in (9, 12))),
    "diffusion-block": net(nets.DiffusionBlock, *({"x": _points(2, 8, n, n), **NOISY} for n in (8, 12))),
    "pointnet": net(nets.PointNet, {"points": values(2, 12, 3)}),
    "contrastive": net(nets.Contrastive, *({"x": values(n, 10), "y": values(n, 7)} for n in (6, 9))),
    "conv3d": net(nets.Conv3D, {"x": _points(2, 2, 4, 6, 6)}),
    "fourier-operator": net(nets.Spectral, {"x": values(2, 16)}),
}  # fmt: skip

MODELS = {**PLAIN_MODELS, **architectures.TEXT_MODELS, **architectures.OTHER_MODELS}

EVERYWHERE = ("no_grad", "train", "eval")
AUTOCAST = {"bert", "llama-gqa", "t5", "vit", "resnet", "gpt2", "unet", "diffusion-block", "mlp-mixer", "whisper",
            "transformer-encoder", "convnext"}  # fmt: skip
FROZEN = {"bert", "gpt2", "llama-gqa", "resnet", "vit", "convnext", "unet", "efficientnet-blocks", "t5", "swin", "wavenet",
          "gemma2", "shuffle-dense", "mobilenet-v2"}  # fmt: skip
DYNAMIC = {"bert", "bert-masked-lm", "gpt2", "llama-gqa", "t5", "bart", "distilbert", "opt", "qwen3", "transformer",
           "transformer-encoder", "lstm-by-hand", "unet", "shuffle-dense", "wavenet", "mlp-mixer", "nerf", "gcn", "scan",
           "moe", "diffusion-block", "contrastive", "deberta-v2", "bloom"}  # fmt: skip


def modes(name: str) -> list[str]:
    """The modes in which model `name` is run."""
    wanted = {*EVERYWHERE}
    wanted |= {"autocast", "train-autocast"} if name in AUTOCAST else set()
    wanted |= {"freeze"} if name in FROZEN else set()
    wanted |= {"dynamic", "train-dynamic"} if name in DYNAMIC else set()
    return [mode for mode in MODES if mode in wanted]


def run_case(name: str, mode: str) -> Record:
    """Build model `name` and judge it in `mode`."""
    torch.manual_seed(0)
    return judge(MODELS[name](), mode)


def cases(args: argparse.Namespace) -> list[tuple[str, str]]:
    names = list(MODELS) if args.all else args.models
    unknown = set(names) - set(MODELS)
    if unknown:
        raise SystemExit(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    return [(name, mode) for mode in MODES for name in names if mode in (args.modes or modes(name))]


def run_all(todo: list[tuple[str, str]], path: Path | None) -> dict[str, dict[str, Any]]:
    """Records by "model/mode", those known from `path` kept; `path` is written after every case."""
    known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path and path.exists() else {}
    for name, mode in todo:
        key = f"{name}/{mode}"
        if known.get(key, {}).get("status") == "right":
            continue
        known[key] = {"status": "crash", "why": "the process died"}
        write(known, path)
        record = run_case(name, mode)
        known[key] = dataclasses.asdict(record)
        write(known, path)
        said = f"{record.status} {record.worst} {record.graphs}g {record.kernels}k {record.library}l {record.seconds}s"
        print(f"{key}: {said} {len(record.retreats)} retreats {record.why}", flush=True)
    return known


def write(records: dict[str, dict[str, Any]], path: Path | None) -> None:
    """Atomically, sorted by model."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n")
        os.replace(part, path)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m tests.models.zoo", description=__doc__)
    out.add_argument("models", nargs="*", help="names of models")
    out.add_argument("--all", action="store_true", help="every model")
    out.add_argument("--modes", nargs="+", choices=MODES, help="default: those chosen for each model")
    out.add_argument("--json", type=Path, help="where results are kept; what is right there is not run again")
    return out


def main() -> None:
    args = parser().parse_args()
    warnings.filterwarnings("ignore")
    records = run_all(cases(args), args.json)
    print(dict(Counter(r["status"] for r in records.values())))
    ops = Counter(what for r in records.values() for what, _ in r.get("retreats", ()))
    print("retreats:", *(f"{count} {what}" for what, count in ops.most_common()), sep="\n  ")
    if any(r["status"] != "right" for r in records.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
