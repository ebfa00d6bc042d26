"""What becomes one kernel in the blocks that models are made of. Accept a change with EXPECTTEST_ACCEPT=1.

A line per step: a kernel's loops (points | reduced), how many buffers it reads and writes, its reductions, scatters and
random draws; or the library call. Views are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from expecttest import TestCase
from torch import nn

from fxopt import passes
from fxopt.backend import compile_dynamo_graph
from fxopt.capture.aot import as_it_is
from fxopt.ir.exprs import Int
from fxopt.ir.graph import Graph
from fxopt.ir.loops import Nest, Op, Reduce, Scan, postorder
from fxopt.ir.region import Call, Region, Step
from fxopt.journal import Journal
from fxopt.lower import lower_graph
from fxopt.lower.schedule import schedule
from fxopt.options import Options


def schedules(fn: Callable[..., torch.Tensor], *args: torch.Tensor) -> str:
    """The schedules of every graph that calling `fn` on `args` and, where it can, going backward compiles."""
    found: list[str] = []

    def compile_graph(graph: Graph, inputs: Sequence[Any], options: Options, journal: Journal) -> Any:
        passes.run(graph, options, journal)
        low = schedule(lower_graph(graph, journal))
        found.extend((f"{graph.phase.value}:", *(line(s) for s in low.steps if isinstance(s, (Region, Call)))))
        return as_it_is(graph.gm)

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_dynamo_graph(gm, inputs, Options.parse(None, {"strict": True}), compile_graph)

    torch.compiler.reset()
    out = torch.compile(fn, backend=backend)(*args)
    if out.requires_grad:
        out.sum().backward()
    return "\n".join(found) + "\n"


def line(step: Step) -> str:
    if isinstance(step, Call):
        return f"  call {step.op}"
    assert isinstance(step, Region)
    nest = step.nest
    reads, writes = set(nest.reads()), set(nest.writes())
    loops = f"[{_sizes(s.size for s in nest.points)} | {_sizes(s.size for s in nest.reduced)}]".replace(" | ]", "]")
    return f"  kernel {loops} {len(reads)} in, {len(writes)} out {' '.join(_marks(nest))}".rstrip()


def _sizes(sizes: Any) -> str:
    known: list[Int] = [s for s in sizes if s is not None]
    return " x ".join(map(str, known))


def _marks(nest: Nest) -> list[str]:
    marks = [n.kind for n in postorder(nest.roots) if isinstance(n, (Reduce, Scan))]
    marks += sorted({n.name for n in postorder(nest.roots) if isinstance(n, Op) and n.name.startswith("rand")})
    return marks + ["scatter" for s in nest.stores if s.mode != "set" or s.indirect]


def parameter(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


class Goldens(TestCase):
    def test_layer_norm(self) -> None:
        norm = nn.LayerNorm(64)
        self.assertExpectedInline(
            schedules(norm, parameter(8, 16, 64)),
            """\
forward:
  kernel [8 x 16 | 64] 3 in, 3 out welford welford
backward:
  kernel [8 x 16 | 64] 5 in, 1 out sum sum
  kernel [64 | 8 x 16] 4 in, 2 out sum sum
""",
        )

    def test_softmax(self) -> None:
        self.assertExpectedInline(
            schedules(lambda x: torch.softmax(x * 0.5, -1), parameter(8, 16, 64)),
            """\
forward:
  kernel [8 x 16 | 64] 1 in, 1 out softmax_stats softmax_stats
backward:
  kernel [8 x 16 | 64] 2 in, 1 out sum
""",
        )

    def test_dropout_residual_norm(self) -> None:
        norm = nn.LayerNorm(64)

        def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return norm(x + F.dropout(y, 0.1))

        self.assertExpectedInline(
            schedules(fn, parameter(8, 16, 64), parameter(8, 16, 64)),
            """\
forward:
  call fxopt::seed.default
  kernel [8 x 16 | 64] 5 in, 3 out welford welford rand
backward:
  kernel [8 x 16 | 64] 5 in, 2 out sum sum rand
  kernel [64 | 8 x 16] 2 in, 2 out sum sum
""",
        )

    def test_mlp(self) -> None:
        mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.assertExpectedInline(
            schedules(lambda x: x + mlp(x), parameter(8, 16, 64)),
            """\
forward:
  call aten::addmm.default
  kernel [8 x 16 x 256] 1 in, 1 out
  call aten::addmm.default
  kernel [8 x 16 x 64] 2 in, 1 out
backward:
  call aten::mm.default
  call aten::mm.default
  kernel [256 | 128] 2 in, 2 out sum
  call aten::mm.default
  kernel [64 | 128] 2 in, 2 out sum
  call aten::mm.default
""",
        )

    def test_attention_block(self) -> None:
        norm, project, merge = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)

        def fn(x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in project(norm(x)).chunk(3, -1))
            heads = F.scaled_dot_product_attention(q, k, v)
            return x + merge(heads.transpose(1, 2).flatten(2))

        self.assertExpectedInline(
            schedules(fn, parameter(8, 16, 64)),
            """\
forward:
  kernel [8 x 16 | 64] 3 in, 3 out welford welford
  call aten::addmm.default
  call aten::_scaled_dot_product_flash_attention_for_cpu.default
  call aten::addmm.default
  kernel [8 x 16 x 64] 2 in, 1 out
backward:
  call aten::mm.default
  call aten::mm.default
  kernel [64 | 128] 1 in, 1 out sum
  call aten::_scaled_dot_product_flash_attention_for_cpu_backward.default
  kernel [8 x 16 x 64] 1 in, 1 out
  kernel [8 x 16 x 64] 1 in, 1 out
  kernel [8 x 16 x 64] 1 in, 1 out
  call aten::mm.default
  call aten::mm.default
  kernel [192 | 128] 1 in, 1 out sum
  kernel [8 x 16 | 64] 6 in, 1 out sum sum
  kernel [64 | 8 x 16] 4 in, 2 out sum sum
""",
        )

    def test_cross_entropy(self) -> None:
        labels = torch.randint(0, 100, (32,))
        self.assertExpectedInline(
            schedules(lambda x: F.cross_entropy(x, labels), parameter(32, 100)),
            """\
forward:
  kernel [32 | 100] 1 in, 2 out softmax_stats softmax_stats
  kernel [ | 32] 4 in, 2 out sum sum
backward:
  kernel [32 x 100] 6 in, 1 out
""",
        )

    def test_batch_norm_in_training(self) -> None:
        norm = nn.BatchNorm2d(8)
        self.assertExpectedInline(
            schedules(lambda x: torch.relu(norm(x)), parameter(4, 8, 6, 6)),
            """\
forward:
  kernel [8 | 4 x 6 x 6] 5 in, 6 out welford welford
  kernel [] 1 in, 1 out
backward:
  kernel [8 | 4 x 6 x 6] 6 in, 3 out sum sum
""",
        )

    def test_an_optimizer_step_is_one_kernel_per_shape(self) -> None:
        def fn(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            m.lerp_(g, 0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            return p - 0.001 * m / (v.sqrt() + 1e-8)

        self.assertExpectedInline(
            schedules(fn, *(torch.randn(32, 48) for _ in range(4))),
            """\
inference:
  kernel [32 x 48] 4 in, 3 out
""",
        )
