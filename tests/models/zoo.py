"""A zoo of models, compiled in every mode and judged against float64: `python -m tests.models.zoo --all --json FILE`.

Nothing here is known to fxopt by name: these are the models that nobody listed. Results are written after every case, and
cases that FILE already holds as right are not run again, so the command can be killed and started again. A case during
which the process died stays in FILE as a crash. With `--processes` (always on a GPU) cases run in processes of their own,
several at once, and a death costs its case only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.models import architectures, nets
from tests.models.architectures import tokens, values
from tests.models.judge import MODES, Problem, Record, judge, moved
from tests.numerics import exact_products
from tests.processes import Worker

COMMITTED = Path(__file__).with_name("results.json")
"""Results on the CPU."""

WORKER = ("-m", "tests.models.worker")

PATIENCE = 300.0
"""Seconds after which a process that judges one case is given up."""

GRACE = 30.0
"""Seconds that begun cases have when the time is up."""


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


def run_case(name: str, mode: str, device: str = "cpu") -> Record:
    """Build model `name` and judge it in `mode` on `device`."""
    exact_products()
    torch.manual_seed(0)
    try:
        problem = moved(MODELS[name](), device)
    except Exception as error:
        return Record("error", f"building the model: {type(error).__name__}: {error}"[:600])
    return judge(problem, mode)


def cases(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The pairs of model and mode asked for, mode by mode in the order given."""
    names = list(MODELS) if args.all else args.models
    unknown = set(names) - set(MODELS)
    if unknown:
        raise SystemExit(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    chosen = args.all or not args.modes
    return [(name, mode) for mode in args.modes or MODES for name in names if not chosen or mode in modes(name)]


class Run:
    """Records by "model/mode", those known from `path` kept; `path` is written after every case.

    After `minutes` no case is begun; those that are not finished soon are cut off, and keep the record they had.
    """

    def __init__(self, path: Path | None, device: str, minutes: float) -> None:
        self.path, self.device = path, device
        self.records: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path and path.exists() else {}
        self.deadline = time.monotonic() + 60 * minutes
        self.lock = threading.Lock()

    def missing(self, todo: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The cases that are not known to be right."""
        return [case for case in todo if self.records.get("/".join(case), {}).get("status") != "right"]

    def is_over(self, grace: float = 0.0) -> bool:
        return time.monotonic() >= self.deadline + grace

    def here(self, todo: list[tuple[str, str]]) -> None:
        """Run the cases in this process."""
        for name, mode in todo:
            if self.is_over():
                return
            self.put(name, mode, {"status": "crash", "why": "the process died"}, tell=False)
            self.put(name, mode, dataclasses.asdict(run_case(name, mode, self.device)))

    def apart(self, todo: list[tuple[str, str]], processes: int) -> None:
        """Run the cases in `processes` processes."""
        left = deque(todo)
        threads = [threading.Thread(target=self._serve, args=(left, processes)) for _ in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _serve(self, left: deque[tuple[str, str]], processes: int) -> None:
        worker: Worker | None = None
        threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
        # Kernels of these sizes are all launch: measuring them, beside other processes, says nothing.
        settings = {"OMP_NUM_THREADS": threads, "FXOPT_TUNING_SECONDS": "0"}
        while not self.is_over():
            try:
                name, mode = left.popleft()
            except IndexError:
                break
            worker = worker or Worker((*WORKER, self.device), PATIENCE, processes, **settings)
            answer = list(worker.ask([name, mode], self.deadline + GRACE))
            if len(answer) == 2:
                self.put(name, mode, answer[0])
                continue
            worker.close()
            if not self.is_over(GRACE):
                self.put(name, mode, {"status": "crash", "why": worker.last_words})
            worker = None
        if worker is not None:
            worker.close()

    def put(self, name: str, mode: str, record: dict[str, Any], tell: bool = True) -> None:
        with self.lock:
            self.records[f"{name}/{mode}"] = record
            write(self.records, self.path)
        if tell:
            r = {**dataclasses.asdict(Record()), **record}
            said = f"{r['status']} {r['worst']} {r['graphs']}g {r['kernels']}k {r['library']}l {r['seconds']}s"
            print(f"{name}/{mode}: {said} {len(r['retreats'])} retreats {r['why']}", flush=True)


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
    out.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        help="in this order; default, and at most with --all: those chosen for each model",
    )
    out.add_argument("--json", type=Path, help="where results are kept; what is right there is not run again")
    out.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="results of each belong in a FILE of its own")
    out.add_argument("--processes", type=int, help="run cases in so many other processes (default: one on a GPU, else none)")
    out.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after this time")
    return out


def main() -> None:
    args = parser().parse_args()
    warnings.filterwarnings("ignore")
    if args.device == "cuda" and args.json and args.json.resolve() == COMMITTED:
        raise SystemExit(f"{args.json} holds results of the CPU")
    run = Run(args.json, args.device, args.minutes)
    todo, processes = run.missing(cases(args)), args.processes
    if processes is None:
        processes = 1 if args.device == "cuda" else 0
    if processes:
        run.apart(todo, processes)
    else:
        run.here(todo)
    records = run.records
    print(dict(Counter(r["status"] for r in records.values())), "; the time is up" if run.is_over() else "")
    ops = Counter(what for r in records.values() for what, _ in r.get("retreats", ()))
    print("retreats:", *(f"{count} {what}" for what, count in ops.most_common()), sep="\n  ")
    if any(r["status"] != "right" for r in records.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
