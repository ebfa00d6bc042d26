"""A decoding step's layers as one kernel whose programs stay, beside the launches of the compiled model.

    python -m benchmarks.persistent_decode --out FOLDER

For the Llama of 1.2 billion parameters without its head, one token, by precision of the weights: microseconds of a replay of
the compiled model's CUDA graph (embedding, last norm and 16 layers) and of one of a graph with the persistent kernel
(`persistent_layers.py`), interleaved, medians over rounds. "error" is that of the result relative to a float32 model with
the same, rounded weights; a kernel whose error is more than twice the compiled model's is "wrong", and its time says
nothing. "barrier" is what one barrier of all programs takes.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.decoding import DecodingStep
from benchmarks.early_launch import executors, mean, replays
from benchmarks.models import llama
from benchmarks.persistent_layers import PHASES, barriers, layers
from benchmarks.results import revision, target_facts, versions
from fxopt.cli import pick_device
from fxopt.ir.quantized_ops import QUANTIZE_WEIGHT, ZERO_OF_4_BITS
from fxopt.report.backends import resolve_backend, unshared

PRECISIONS: dict[int, dict[str, Any]] = {
    16: {"freeze": True},
    8: {"precision": "int8-weight"},
    4: {"precision": "int4-weight"},
}
"""torch.compile's options by bits of a weight."""

GROUP = 128
BARRIERS = 1000
SIZES = {"hidden": 2048, "layers": 16, "vocab": 128256, "cached": 1024}
SMALL = {"hidden": 512, "layers": 2, "vocab": 64, "cached": 32}


@dataclass(frozen=True)
class Shape:
    """Of the kernel: rows of a block of the weights before and after attention, of gate and up, and of the last one."""

    rows: int
    rows_up: int
    rows_down: int
    ahead: int
    warps: int = 8

    def __str__(self) -> str:
        rows = f"{self.rows}, {self.rows_up}, {self.rows_down} rows"
        return f"{rows}, {self.ahead >> 10} KiB ahead, w{self.warps}"


SHAPES = {
    16: [Shape(8, 8, 2, 128 << 10), Shape(8, 8, 2, 0), Shape(8, 16, 4, 128 << 10, 16)],
    8: [Shape(8, 8, 2, 128 << 10), Shape(8, 8, 2, 0)],
    4: [Shape(8, 8, 2, 128 << 10), Shape(8, 8, 2, 0), Shape(8, 16, 8, 128 << 10, 16)],
}


@dataclass
class Weights:
    """Of all layers: quantized [L, N, K] and their scales by name, and those as they were, in float32 [L, N, K]."""

    stored: dict[str, tuple[Tensor, Tensor]]
    exact: dict[str, Tensor]


class Hidden(nn.Module):
    """A language model's head that does nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def step_of(sizes: dict[str, int], device: torch.device) -> DecodingStep:
    """The Llama's step of one token without its head, bfloat16: it returns the normed row [1, 1, H]."""
    torch.manual_seed(0)
    model: Any = llama(sizes)
    model.lm_head = Hidden()
    return DecodingStep(model, 1, sizes["cached"]).to(device, torch.bfloat16).eval()


def weights_of(step: DecodingStep, bits: int) -> Weights:
    """The layers' weights in so many bits, as the pass `quantize` has them."""
    parts = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.o_proj",),
        "up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }
    stored, exact = {}, {}
    for name, modules in parts.items():
        own = [torch.cat([each.get_submodule(m).weight for m in modules]).detach() for each in step.model.model.layers]
        if bits == 16:
            stacked, scale = torch.stack(own), own[0].new_ones(1, dtype=torch.float32)
            exact[name] = stacked.float()
        else:
            dtype, group = (torch.uint8, GROUP) if bits == 4 else (torch.int8, 0)
            pairs = [QUANTIZE_WEIGHT(w, dtype, bits, group) for w in own]
            stacked, scale = torch.stack([w for w, _ in pairs]), torch.stack([s.float() for _, s in pairs])
            exact[name] = torch.stack([widened(w, s.float(), bits) for w, s in pairs])
        stored[name] = (stacked, scale)
    return Weights(stored, exact)


def widened(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """A quantized weight [N, K] in float32."""
    if bits == 8:
        return weight.float() * scale.reshape(-1, 1)
    both = torch.cat([weight & 15, weight >> 4], 1).float() - ZERO_OF_4_BITS
    return (both.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)


def reference(step: DecodingStep, weights: Weights, token: Tensor) -> Tensor:
    """The step in float32 with the weights as they are stored."""
    exact = copy.deepcopy(step).float()
    for k, each in enumerate(exact.model.model.layers):
        attention, mlp = each.self_attn, each.mlp
        heads = [attention.q_proj, attention.k_proj, attention.v_proj]
        rows = [m.weight.shape[0] for m in heads]
        for module, own in zip(heads, weights.exact["qkv"][k].split(rows), strict=True):
            module.weight.data.copy_(own)
        attention.o_proj.weight.data.copy_(weights.exact["out"][k])
        for module, own in zip((mlp.gate_proj, mlp.up_proj), weights.exact["up"][k].chunk(2), strict=True):
            module.weight.data.copy_(own)
        mlp.down_proj.weight.data.copy_(weights.exact["down"][k])
    return exact(token)


class Persistent:
    """The step's layers by the kernel; `run` puts one step on the current stream, `result` is the normed row."""

    def __init__(self, step: DecodingStep, weights: Weights, bits: int, shape: Shape, programs: int, token: Tensor) -> None:
        self.step, self.bits, self.shape, self.programs = step, bits, shape, programs
        model: Any = step.model.model
        config, device = model.config, token.device
        self.count, hidden = config.num_hidden_layers, config.hidden_size
        heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        features, cached = hidden // config.num_attention_heads, step.cache.layers[0].keys.shape[2]
        self.embedded = model.embed_tokens(token).flatten().detach()
        place = torch.full((1, 1), cached // 2, device=device)
        cos, sin = model.rotary_emb(self.embedded[None, None], place)
        self.keys = torch.cat([layer.keys for layer in step.cache.layers]).contiguous()
        self.values = torch.cat([layer.values for layer in step.cache.layers]).contiguous()
        norms = [[getattr(x, name).weight for x in model.layers] for name in ("input_layernorm", "post_attention_layernorm")]
        norm1, norm2 = (torch.stack(each).detach() for each in norms)

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        splits = min(16, cached // 16)
        rows = (group + 2) * heads * features
        blocks = [rows // shape.rows, hidden // shape.rows, hidden // shape.rows_down, heads * splits]
        if min(*blocks[:3], 2 * config.intermediate_size // shape.rows_up) < programs or blocks[3] > programs:
            raise ValueError("a program without a block, or a part of attention without a program")
        self.hidden = empty(hidden)
        parts = empty(heads * group, splits, features, dtype=torch.float32)
        stats = empty(heads * group, splits, 2, dtype=torch.float32)
        self.counters = torch.zeros(heads + 1, dtype=torch.int32, device=device)
        scratch = (empty(hidden), empty(rows), empty(hidden))
        act = empty(config.intermediate_size)
        flat = [x for name in ("qkv", "out", "up", "down") for x in weights.stored[name]]
        before = (self.hidden, *scratch, act, parts, stats, self.counters, self.counters[heads:])
        given = (norm1, *flat[:4], norm2, *flat[4:], self.keys, self.values, cos.flatten(), sin.flatten())
        self.arguments = (*before, *given, cached // 2, config.rms_norm_eps)
        self.constants = {
            "H": hidden, "F": config.intermediate_size, "HEADS": heads, "GROUP": group, "D": features, "CACHED": cached,
            "SPLITS": splits, "BITS": bits, "SCALED": GROUP, "BN": shape.rows, "BN_UP": shape.rows_up,
            "BN_DOWN": shape.rows_down, "AHEAD": shape.ahead, "num_warps": shape.warps,
        }  # fmt: skip

    def run(self) -> None:
        """All programs have to run at once, which a cooperative launch makes sure of."""
        self.counters.zero_()
        self.hidden.copy_(self.embedded)
        layers[(self.programs,)](
            *self.arguments, 0, self.count, 0, PHASES - 1, **self.constants, launch_cooperative_grid=True
        )

    def run_in_turn(self) -> None:
        """The same with a launch for each phase, for the interpreter."""
        self.counters.zero_()
        self.hidden.copy_(self.embedded)
        for layer in range(self.count):
            for phase in range(PHASES):
                layers[(self.programs,)](*self.arguments, layer, 1, phase, phase, **self.constants)

    def result(self) -> Tensor:
        out: Tensor = self.step.model.model.norm(self.hidden[None, None])
        return out


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.float() - exact).norm() / exact.norm())


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """A replay of a CUDA graph of `run`."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def microseconds(runs: dict[str, Callable[[], None]], rounds: int = 7, calls: int = 50) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(mean(run, calls, torch.cuda.synchronize))
    return {name: round(statistics.median(own), 2) for name, own in times.items()}


def barrier_microseconds(programs: int, device: torch.device) -> float:
    """Of one barrier."""
    arrivals = torch.zeros(1, dtype=torch.int32, device=device)

    def run() -> None:
        arrivals.zero_()
        barriers[(programs,)](arrivals, BARRIERS, num_warps=8, launch_cooperative_grid=True)

    return microseconds({"": captured(run)}, 3, 3)[""] / BARRIERS


def measured(bits: int, sizes: dict[str, int], device: torch.device, multiprocessors: int) -> dict[str, Any]:
    """JSON data of one precision."""
    step = step_of(sizes, device)
    token = torch.tensor([[5]], device=device)
    weights = weights_of(step, bits)
    exact = reference(step, weights, token)
    weights.exact.clear()
    torch.compiler.reset()
    known = executors()
    compiled = torch.compile(unshared(step), backend=resolve_backend("fxopt"), options=PRECISIONS[bits])
    for _ in range(4):
        result = compiled(token)
    runs = {"compiled": replays(known)}
    entry: dict[str, Any] = {"bits": bits, "error": {"compiled": relative(result, exact)}, "wrong": []}
    for shape in SHAPES[bits]:
        try:
            kernel = Persistent(step, weights, bits, shape, multiprocessors, token)
            replay = captured(kernel.run)
            replay()
        except Exception as error:  # a kernel that does not fit is a finding too
            entry["wrong"].append(f"{shape}: {type(error).__name__}: {str(error)[:200]}")
            continue
        entry["error"][str(shape)] = own = relative(kernel.result(), exact)
        if not own < 2 * entry["error"]["compiled"]:
            entry["wrong"].append(str(shape))
        runs[str(shape)] = replay
    return entry | {"us": microseconds(runs)}


def main(
    out: Annotated[Path, typer.Option(help="folder for persistent_decode_<device>.json")],
    bits: Annotated[str, typer.Option(help="of weights, by commas")] = "4,16,8",
    seconds: Annotated[float, typer.Option(help="no precision is begun later than this")] = 60.0,
    small: Annotated[bool, typer.Option(help="two layers, to try the script")] = False,
) -> None:
    """Measure the persistent kernel beside the compiled model."""
    device, start = pick_device("cuda"), time.perf_counter()
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    document: dict[str, Any] = {"target": target_facts(device), "versions": versions(), "commit": revision()}
    document |= {"barrier us": round(barrier_microseconds(multiprocessors, device), 3), "precisions": []}
    print(f"barrier {document['barrier us']} us", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for each in map(int, bits.split(",")):
            if time.perf_counter() - start > seconds:
                print(f"{each} bits: no time left")
                continue
            entry = measured(each, SMALL if small else SIZES, device, multiprocessors)
            document["precisions"].append(entry)
            for name, us in entry["us"].items():
                print(f"{each:3d} bits {us:8.1f} us  error {entry['error'][name]:.2e}  {name}", flush=True)
            for text in entry["wrong"]:
                print(f"{each:3d} bits wrong: {text}", flush=True)
            (out / f"persistent_decode_{device.type}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
