"""From schedule to plan: what may share memory, and where sizes come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt import passes, tune
from fxopt.assemble import assemble, in_place_pairs, spreads_beside
from fxopt.capture.symbols import to_int
from fxopt.codegen.triton_chain import OTHERS_END
from fxopt.compiler import compile_graph
from fxopt.errors import UnsupportedError
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import Alternatives, Contraction
from fxopt.journal import Journal
from fxopt.lower import lower_graph
from fxopt.lower.schedule import schedule
from fxopt.options import Options
from fxopt.runtime.artifacts import default_store
from fxopt.runtime.plan import Launch, Plan
from tests.lower.contracting import searched
from tests.lower.test_schedule import lowered, rand, regions


def pairs(fn: Callable[..., Any], *args: torch.Tensor) -> list[list[tuple[str, str]]]:
    return [list(in_place_pairs(region)) for region in regions(schedule(lowered(fn, *args)))]


def test_a_pointwise_result_may_overwrite_its_operand() -> None:
    assert pairs(lambda x: x * 2 + 1, rand(4, 6)) != [[]]


def test_an_operand_read_at_another_index_stays() -> None:
    assert pairs(lambda x: x + torch.ops.aten.permute.default(x, [1, 0]), rand(5, 5)) == [[]]


def test_a_row_that_is_read_again_after_a_store_stays() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + y
        return h, torch.softmax(h, -1)

    assert pairs(fn, rand(4, 6), rand(4, 6)) == [[]]


def test_a_result_of_other_operands_does_not_overwrite_this_one() -> None:
    """Nothing makes a thread load its element of `y` before another stores there what has nothing to do with it."""
    ((pair, other),) = pairs(lambda x, y: (x * 2, y * 3), rand(4, 6), rand(4, 6))
    assert {pair[1], other[1]} == {"x_1", "y_1"} and pair[0] != other[0]


def test_an_operand_loaded_under_a_mask_stays() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.constant_pad_nd.default(x[:, :4], [0, 2]) + x

    assert pairs(fn, rand(4, 6)) == [[]]


# ---------------------------------------------------------------------- where sizes come from


def captured(fn: Callable[..., Any], *args: Any, start: Any = None) -> Graph:
    """`fn` with symbolic sizes; the result of the first call of `start` becomes the only input when that is given."""
    gm = make_fx(fn, tracing_mode="symbolic")(*args)
    if start is not None:
        _cut(gm, start)
    inputs = [Input(n.name, Role.USER) for n in gm.graph.nodes if n.op == "placeholder"]
    return Graph(gm, inputs, Phase.INFERENCE, "test", to_int)


def _cut(gm: fx.GraphModule, start: Any) -> None:
    node = next(n for n in gm.graph.nodes if n.target is start)
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        given = gm.graph.placeholder("given")
    given.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(given)
    for other in reversed(list(gm.graph.nodes)):
        if other.op != "output" and other is not given and not other.users:
            gm.graph.erase_node(other)
    gm.recompile()


def planned(graph: Graph) -> Plan:
    journal, options = Journal("test"), Options.parse(None, None)
    passes.run(graph, options, journal)
    low = schedule(lower_graph(graph, journal))
    low, chosen, failed = tune.choose(low, options, default_store(), journal)
    assert not failed
    return assemble(graph, low, chosen, journal)


def run(graph: Graph, *args: Any) -> Any:
    return compile_graph(graph, args, Options.parse(None, None), Journal("test", strict=True))(list(args))


def test_a_size_is_read_from_a_shape() -> None:
    plan = planned(captured(lambda x: x + 1, torch.randn(5, 4)))
    assert {(s.what, s.times, s.plus) for s in plan.symbols} == {("size", 1, 0)}


def test_a_size_is_read_from_an_integer_input() -> None:
    def fn(x: torch.Tensor, n: int) -> torch.Tensor:
        return x.new_ones(n) * 3

    graph = captured(fn, torch.randn(4), 7)
    assert "value" in {s.what for s in planned(graph).symbols}
    (out,) = run(captured(fn, torch.randn(4), 7), torch.randn(4), 5)
    torch.testing.assert_close(out, torch.full((5,), 3.0))


def test_a_size_is_read_from_a_stride() -> None:
    wide = torch.randn(5, 11)
    plan = planned(captured(lambda x: x * 2, wide[:, :4]))
    assert "stride" in {s.what for s in plan.symbols}
    (out,) = run(captured(lambda x: x * 2, wide[:, :4]), torch.arange(28.0).reshape(2, 14)[:, 3:8])
    torch.testing.assert_close(out, torch.arange(28.0).reshape(2, 14)[:, 3:8] * 2)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x]) * 2


def test_a_size_is_solved_for_when_inputs_show_a_multiple_of_it() -> None:
    (symbol,) = planned(captured(doubled, torch.randn(5), start=torch.ops.aten.cat.default)).symbols
    assert (symbol.what, symbol.times, symbol.plus) == ("size", 2, 0)
    x = torch.randn(6)
    torch.testing.assert_close(run(captured(doubled, torch.randn(5), start=torch.ops.aten.cat.default), x), (x * 2,))


def test_a_size_is_solved_for_when_inputs_show_it_shifted() -> None:
    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.constant_pad_nd(x, [1, 2]) * 2

    graph = captured(padded, torch.randn(5), start=torch.ops.aten.constant_pad_nd.default)
    (symbol,) = planned(graph).symbols
    assert (symbol.times, symbol.plus) == (1, 3)
    x = torch.randn(9)
    graph = captured(padded, torch.randn(5), start=torch.ops.aten.constant_pad_nd.default)
    torch.testing.assert_close(run(graph, x), (x * 2,))


def test_a_size_that_no_input_tells_is_named() -> None:
    def flat(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1) * 2

    with pytest.raises(UnsupportedError, match="no input tells the size s"):
        planned(captured(flat, torch.randn(5, 3), start=torch.ops.aten.view.default))


def test_tiles_start_early_beside_few_programs_or_if_their_weights_are_loaded_first() -> None:
    low = searched(lambda x, w: torch.relu(x @ w), torch.rand(64, 64).half(), torch.rand(64, 64).half())
    ways = (way for step in low.steps if isinstance(step, Alternatives) for way in step.ways)
    (product,) = (s for way in ways for s in way.steps if isinstance(s, Contraction))
    tile, loading = (KernelSource("triton", "fx", text, ()) for text in ("", OTHERS_END))

    def before(programs: int) -> Launch:
        return Launch("key", "triton", "fx", (), (), product.device, grid=(programs, 1, 1))

    assert [spreads_beside(product, kernel, before(2048)) for kernel in (tile, loading)] == [False, True]
    assert spreads_beside(product, tile, before(1))
    assert spreads_beside(product.region, tile, before(2048))
