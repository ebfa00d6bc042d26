"""Which plans run as CUDA graphs: pure data, no GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fxopt.errors import OptionError
from fxopt.ir.exprs import contiguous_strides
from fxopt.ir.graph import Phase, Role
from fxopt.ir.region import Alias, BufferSpec, Call, Ref
from fxopt.journal import Journal
from fxopt.options import Options
from fxopt.runtime import capturable, cuda_graph
from fxopt.runtime.capturable import (
    CAPTURED,
    MIN_STEPS,
    PIECE_STEPS,
    Choice,
    Pieces,
    Traits,
    choose,
    choose_pieces,
    flaw,
    gpu,
    too_dear,
)
from fxopt.runtime.in_parts import InPieces
from fxopt.runtime.plan import InputSpec, Launch, Plan, SymbolSource
from fxopt.runtime.split import Mentions
from fxopt.runtime.training_graph import GraphedBackward, GraphedForward
from tests.runtime.plans import CPU, S0, plan

GPU = torch.device("cuda", 0)


def given(
    name: str, *shape: Any, dtype: torch.dtype = torch.float32, device: torch.device = GPU, **kwargs: Any
) -> InputSpec:
    return InputSpec(name, dtype=dtype, device=device, shape=shape, strides=contiguous_strides(shape), **kwargs)


def spec(name: str, *shape: Any, device: torch.device = GPU) -> BufferSpec:
    return BufferSpec(name, torch.float32, device, shape, contiguous_strides(shape))


def product(source: str, target: str, op: str = "aten::mm.default", **kwargs: Any) -> Call:
    return Call(op, (Ref(source), Ref("w")), outputs=(target,), **kwargs)


def network(*more: Any, outputs: tuple[Any, ...] = (Ref("h9"),), steps: int = 10) -> Plan:
    """h0 = x @ w, h1 = h0 @ w, ...: a plan that is captured, with `more` inputs, buffers and steps."""
    chain = [product("x" if k == 0 else f"h{k - 1}", f"h{k}") for k in range(steps)]
    inputs = [given("x", 8, 8), given("w", 8, 8, role=Role.PARAMETER), *(m for m in more if isinstance(m, InputSpec))]
    buffers = [*(spec(f"h{k}", 8, 8) for k in range(steps)), *(m for m in more if isinstance(m, BufferSpec))]
    extra = [m for m in more if not isinstance(m, InputSpec | BufferSpec)]
    return plan(inputs, buffers, [*chain, *extra], list(outputs))


def launch(*buffers: str, device: torch.device = GPU, language: str = "triton") -> Launch:
    return Launch("k", language, "k", buffers, (buffers[-1],), device, (8,))


def chosen(made: Plan) -> Choice:
    found = choose(made)
    assert isinstance(found, Choice), found
    return found


def is_whole(made: Plan) -> bool:
    return chosen(made).parts.captured.plan is made and chosen(made).note == CAPTURED


def traits(made: Plan) -> Traits:
    return capturable.traits(chosen(made).parts.captured)


def test_what_a_captured_run_holds() -> None:
    assert (traits(network()).peak, traits(network()).products) == (2 * 512, True), "two results at a time"
    launches = [launch(f"h{k}", f"h{k + 1}") for k in range(9)]
    buffers, inputs = [spec(f"h{k}", 8, 8) for k in range(1, 10)], [given("h0", 8, 8)]
    assert not traits(plan(inputs, buffers, launches, [Ref("h9")])).products
    sized = [given("h0", S0, 8)]
    symbols = [SymbolSource("s0", 0, "size")]
    some = [spec(f"h{k}", S0, 8) for k in range(1, 10)]
    assert traits(plan(sized, some, launches, [Ref("h9")], symbols=symbols)).peak == 0


def steps(made: Plan) -> tuple[int, int, int]:
    """How many steps run before the captured ones, captured, and after them."""
    parts = chosen(made).parts
    counts = [0 if p is None else len(Mentions(p.plan).steps) for p in (parts.before, parts.captured, parts.after)]
    return counts[0], counts[1], counts[2]


def test_a_network_is_captured() -> None:
    made = network(launch("h3", "h9"))
    assert gpu(made) == GPU and is_whole(made)
    found = traits(made)
    assert (found.moved, found.fixed, found.written, found.varying) == ((0,), (1,), (), ())
    assert (found.device, found.seeds, found.steps) == (GPU, 0, 11)


def test_a_plan_of_cpus_is_no_business_of_graphs() -> None:
    made = plan([given("x", 4, device=CPU)], [spec("y", 4, device=CPU)], [launch("x", "y", device=CPU, language="cpp")], [])
    assert gpu(made) is None


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ((given("c", 8, device=CPU), Call("aten::copy_.default", (Ref("h1"), Ref("c")))), "c is not in a GPU's memory"),
        ((spec("c", 8, device=CPU), Call("aten::_to_copy.default", (Ref("h1"),), {}, ("c",))), "some of it runs on the CPU"),
        ((Call("aten::_to_copy.default", (Ref("h1"),), {"device": CPU}, (None,)),), "some of it runs on the CPU"),
        ((product("h1", "c", "local:graph 0/cond", origin="layer.cond"), spec("c", 8, 8)), "layer.cond does on the host"),
        ((product("h1", "c", "mylib::gate.default"), spec("c", 8, 8)), "nothing is known of what mylib::gate"),
        ((Call("aten::_local_scalar_dense.default", (Ref("h1"),), {}, (None,)),), "waits for the GPU"),
        ((Call("fxopt::linear_cross_entropy.default", (Ref("h1"),), {}, ("c",)), spec("c", 8)), "waits for the GPU"),
        ((Call("aten::bernoulli.p", (Ref("h1"), 0.5), {}, ("c",)), spec("c", 8, 8)), "draws from torch's generator"),
        (
            (InputSpec("f", "float"), Call("aten::mul.Scalar", (Ref("h1"), Ref("f")), {}, ("c",)), spec("c", 8)),
            "f is a number",
        ),
        (
            (given("z", 8, dtype=torch.complex64), Call("aten::abs.default", (Ref("z"),), {}, ("c",)), spec("c", 8)),
            "complex",
        ),
    ],
)
def test_what_cannot_be_captured_runs_before_or_after_what_can(more: tuple[Any, ...], reason: str) -> None:
    at_the_end, short = network(*more), network(*more, steps=MIN_STEPS - 1, outputs=(Ref("h1"),))
    assert steps(at_the_end) == (0, 10, 1)
    assert reason in chosen(at_the_end).note and "but for 1 of 11 steps" in chosen(at_the_end).note
    assert reason in str(choose(short))
    turned = replace(at_the_end, steps=(*at_the_end.steps[:2], at_the_end.steps[-1], *at_the_end.steps[2:-1]))
    assert steps(turned) == (3, 8, 0) and reason in chosen(turned).note


def test_a_captured_part_does_not_change_what_one_before_has_made() -> None:
    steps_before = [launch("x", "c"), Call("mylib::gate.default", (Ref("c"),), {}, (None,))]
    made = network(spec("c", 8, 8), launch("h9", "c"), outputs=(Ref("c"),))
    assert steps(replace(made, steps=(*steps_before, *made.steps))) == (2, 10, 1)
    reading = network(spec("c", 8, 8), launch("c", "h9"))
    assert steps(replace(reading, steps=(*steps_before, *reading.steps))) == (2, 11, 0)


GATE = Call("mylib::gate.default", (Ref("h0"),), {}, (None,), "layer.gate")


def with_islands(made: Plan, *at: int, island: Call | Launch = GATE) -> Plan:
    """`made` with `island` after steps `at`."""
    steps = list(made.steps)
    for place in sorted(at, reverse=True):
        steps.insert(place, island)
    return replace(made, steps=tuple(steps))


def pieces(made: Plan) -> list[tuple[int, bool]]:
    """How many steps each part of the row has, and whether it is captured."""
    found = choose_pieces(made)
    assert isinstance(found, Pieces)
    return [(len(Mentions(piece.part.plan).steps), piece.choice is not None) for piece in found.pieces]


def test_plans_with_islands_are_captured_in_pieces() -> None:
    made = with_islands(network(steps=40, outputs=(Ref("h39"),)), 10, 12, 25)
    assert pieces(made) == [(10, True), (4, False), (13, True), (1, False), (15, True)]
    found = choose_pieces(made)
    assert found is not None and found.note == (
        f"{CAPTURED}, in 3 parts, but for 5 of 43 steps: nothing is known of what layer.gate does on the host"
    )
    assert choose_pieces(network(steps=40, outputs=(Ref("h39"),))) is None, "whole"
    assert choose_pieces(with_islands(network(steps=20), PIECE_STEPS - 1)) is None, "one part, and a few steps before it"


def test_a_part_that_is_dear_to_copy_runs_plainly() -> None:
    big, sums = given("big", 1 << 24), Call("aten::sum.default", (Ref("big"),), {}, ("c",))
    made = network(big, spec("c"), steps=45, outputs=(Ref("h44"),))
    made = with_islands(replace(made, steps=(*made.steps[:20], sums, *made.steps[20:])), 15, 30)
    assert pieces(made) == [(15, True), (17, False), (16, True)]
    found = choose_pieces(made)
    assert found is not None and "64.0 MiB a call" in found.note and "layer.gate" in found.note
    assert choose_pieces(with_islands(network(big, spec("c"), sums, steps=30), 15)) is not None
    first = network(big, spec("c"), steps=30)
    first = with_islands(replace(first, steps=(sums, *first.steps)), 15)
    assert choose_pieces(first) is None, "one part is left, which `choose` finds"


def test_results_of_several_parts_come_from_a_part_of_their_own() -> None:
    made = with_islands(network(steps=30, outputs=(Ref("h29"), Ref("h3"))), 15)
    assert pieces(made) == [(15, True), (1, False), (15, True), (0, False)]
    on_the_host = network(given("c", 8, device=CPU), steps=30, outputs=(Ref("h29"), Ref("c")))
    assert pieces(with_islands(on_the_host, 15)) == [(15, True), (1, False), (15, True), (0, False)]


def test_a_step_that_changes_what_an_earlier_part_has_made_runs_plainly() -> None:
    made = with_islands(network(steps=40, outputs=(Ref("h39"), Ref("h3"))), 15)
    changing = launch("h30", "h3")
    in_the_midst = [(15, True), (1, False), (12, True), (1, False), (13, True), (0, False)]
    assert pieces(with_islands(made, 28, island=changing)) == in_the_midst
    own = launch("h30", "h20")
    assert pieces(with_islands(made, 33, island=own)) == [(15, True), (1, False), (26, True), (0, False)]


def test_a_step_that_changes_what_an_earlier_part_may_have_made_a_view_of_runs_plainly() -> None:
    state = given("cache", 8, 8, role=Role.STATE)
    peeks = Call("aten::reshape.default", (Ref("cache"), [64]), {}, ("peek",))
    sees = Call("aten::sum.default", (Ref("peek"),), {}, ("c",))
    made = network(state, spec("peek", 64), spec("c"), steps=40, outputs=(Ref("h39"),))
    made = with_islands(replace(made, steps=(peeks, *made.steps, sees)), 15)
    writes = launch("h20", "cache")
    assert pieces(with_islands(made, 28, island=writes)) == [(15, True), (1, False), (12, True), (1, False), (15, True)]
    before = replace(made, steps=tuple(s for s in made.steps if s not in (peeks, sees)))
    assert pieces(with_islands(before, 28, island=writes)) == [(14, True), (1, False), (27, True)]


def test_several_gpus() -> None:
    assert choose(network(launch("h1", "h2", device=torch.device("cuda", 1)))) == "it runs on several GPUs"


def test_few_steps_are_not_worth_it() -> None:
    assert is_whole(network(steps=MIN_STEPS, outputs=(Ref(f"h{MIN_STEPS - 1}"),)))
    short = network(steps=MIN_STEPS - 1, outputs=(Ref("h1"),))
    assert f"it has {MIN_STEPS - 1} steps" in str(choose(short))


def test_what_is_returned_but_cannot_be_comes_from_a_part_after() -> None:
    made = network(given("c", 8, device=CPU), outputs=(Ref("h9"), Ref("c")))
    assert steps(made) == (0, 10, 0) and chosen(made).parts.after is not None
    assert "c is not in a GPU's memory" in chosen(made).note


def test_large_results_are_written_by_steps_that_run_plainly() -> None:
    grown = network(launch("h8", "r"), spec("r", 1 << 24), outputs=(Ref("r"), Ref("h8")))
    assert steps(grown) == (0, 10, 1)
    parts = chosen(grown).parts
    assert [n.name for n in parts.captured.plan.outputs] == ["h8"] and not parts.lent, "a result is not lent"
    lending = chosen(network(launch("h9", "r"), spec("r", 1 << 24), outputs=(Ref("r"),)))
    assert [n.name for n in lending.parts.captured.plan.outputs] == ["h9"] and lending.parts.lent == {0}
    keeping = product("h9", "r", "aten::reshape.default")
    kept = network(launch("h9", "q"), keeping, spec("q", 1 << 24), spec("r", 8, 8), outputs=(Ref("r"), Ref("q")))
    assert steps(kept) == (0, 10, 2) and not chosen(kept).parts.lent, "reshape may return what it is given"
    early = network(launch("h0", "r"), spec("r", 1 << 24), outputs=(Ref("r"), Ref("h9")))
    early = replace(early, steps=(early.steps[0], early.steps[-1], *early.steps[1:-1]))
    assert "64.0 MiB a call" in str(choose(early))
    state = given("cache", 1 << 24, role=Role.STATE)
    updated = network(state, Alias("part", "cache", (8, 8), (8, 1), 0), launch("h9", "part"), outputs=(Ref("cache"),))
    assert is_whole(updated)
    assert (traits(updated).fixed, traits(updated).written) == ((1, 2), (2,))


def test_large_inputs_are_dear() -> None:
    big = network(given("big", 1 << 24), Call("aten::sum.default", (Ref("big"),), {}, ("c",)), spec("c"))
    assert steps(big) == (0, 10, 1), "a sum at the end runs plainly"
    first = replace(big, steps=(big.steps[-1], *big.steps[:-1]))
    assert "64.0 MiB a call" in str(choose(first))
    assert too_dear(10_000, 100) is None and too_dear(100_000_000, 100) is not None


def test_written_without_being_state_stays_where_it_is() -> None:
    found = traits(network(given("y", 8, 8), launch("h9", "y")))
    assert (found.moved, found.fixed, found.written) == ((0,), (1, 2), (2,))


def test_unused_inputs_do_not_matter() -> None:
    made = network(given("c", 8, device=CPU), InputSpec("f", "float"))
    assert is_whole(made) and traits(made).moved == (0,)


def test_sizes_that_vary_are_looked_at() -> None:
    made = network(InputSpec("n", "int"), given("y", S0, 8), launch("y", "h9"))
    made = replace(made, symbols=(SymbolSource("s0", 2, "value"),))
    assert is_whole(made)
    assert (traits(made).varying, traits(made).moved) == ((2, 3), (0, 3))


def test_seeds_are_drawn_outside() -> None:
    made = network(Call("fxopt::seed.default", (GPU,), {}, ("s",), effect=True), spec("s"), launch("s", "h9"))
    assert is_whole(made) and traits(made).seeds == 1


def test_attention_draws_nothing() -> None:
    flash = Call(
        "aten::_scaled_dot_product_flash_attention.default", (Ref("h1"), Ref("h1"), Ref("h1")), {}, ("c", *[None] * 8)
    )
    assert is_whole(network(flash, spec("c", 8, 8)))


def drops(op: str, **kwargs: Any) -> Plan:
    results = len(getattr(torch.ops.aten, op).default._schema.returns)
    call = Call(f"aten::{op}.default", (Ref("h1"),) * 3, kwargs, ("c", *[None] * (results - 1)), effect=True)
    return network(call, spec("c", 8, 8), outputs=(Ref("h9"), Ref("c")))


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_attention_that_drops_is_captured_in_training(backend: str) -> None:
    options = {"attn_bias": None, "compute_log_sumexp": True} if backend == "cudnn" else {}
    made = drops(f"_scaled_dot_product_{backend}_attention", dropout_p=0.1, **options)
    assert flaw(made) is None and capturable.traits(capturable.whole(made).captured).draws
    assert "draws from torch's generator" in str(choose(made))  # an inference run has no graph that could
    assert not traits(drops(f"_scaled_dot_product_{backend}_attention", dropout_p=0.0, **options)).draws


def test_attention_that_drops_by_a_state_on_the_host() -> None:
    options = {"attn_bias": None, "compute_log_sumexp": True}
    op = "_scaled_dot_product_efficient_attention"
    assert flaw(drops(op, **options)) is None
    assert "leaves the state of its generator" in str(flaw(drops(op, dropout_p=0.1, **options)))


def number(name: str) -> dict[str, Any]:
    return {"name": name, "dtype": torch.int64, "device": CPU, "shape": (), "strides": ()}


def attends() -> Call:
    given = (Ref("h1"), Ref("h1"), Ref("h1"), None, False)
    return Call("fxopt::attention_forward.default", given, {}, ("a", "sums", "n"))


def attends_backward() -> Call:
    given = (*[Ref("h1")] * 4, None, Ref("h1"), Ref("h2"), Ref("n"), False)
    return Call("fxopt::attention_backward.default", given, {}, ("dq", "dk", "dv"))


def test_the_number_of_attentions_backend_may_be_on_the_host() -> None:
    made = (spec("a", 8, 8), spec("sums", 8), BufferSpec(**number("n")))
    assert flaw(network(attends(), *made, outputs=(Ref("h9"), Ref("a"), Ref("n")))) is None
    gradients = (spec("dq", 8, 8), spec("dk", 8, 8), spec("dv", 8, 8))
    assert flaw(network(attends_backward(), InputSpec(**number("n")), *gradients)) is None


def test_numbers_on_the_host_that_anything_else_reads_or_returns() -> None:
    made = (spec("a", 8, 8), spec("sums", 8), BufferSpec(**number("n")))
    reads = Call("aten::mul.Tensor", (Ref("h1"), Ref("n")), outputs=("y",))
    assert flaw(network(attends(), reads, *made, spec("y", 8, 8))) == "some of it runs on the CPU"
    gradients = (spec("dq", 8, 8), spec("dk", 8, 8), spec("dv", 8, 8))
    both = network(attends_backward(), reads, InputSpec(**number("n")), *gradients, spec("y", 8, 8))
    assert flaw(both) == "n is not in a GPU's memory"
    assert flaw(network(InputSpec(**number("n")), outputs=(Ref("h9"), Ref("n")))) == "n is not in a GPU's memory"


class Stub:
    """An executor of a plan that is not run."""

    def __init__(self, made: Plan) -> None:
        self.plan, self.kept_as = made, None

    def part(self, made: Plan) -> Stub:
        return Stub(made)


def prepared(made: Plan, phase: Phase = Phase.INFERENCE, mode: str = "default", **options: Any) -> tuple[Any, list[str]]:
    journal, stub = Journal("graph"), Stub(made)
    parsed = Options.parse(None, {"mode": mode, **options})
    out = cuda_graph.with_graphs(stub, phase, parsed, journal)  # type: ignore[arg-type]
    assert out is stub or isinstance(out, cuda_graph.GraphedExecutor | InPieces)
    return out, [text for _, text in journal.notes]


@pytest.fixture
def some_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "_turns_at", lambda index: cuda_graph.Turns(None))  # type: ignore[arg-type]


@pytest.mark.usefixtures("some_gpu")
def test_inference_is_captured_in_every_mode() -> None:
    for mode in ("default", "reduce-overhead", "max-autotune"):
        found, notes = prepared(network(), mode=mode)
        assert isinstance(found, cuda_graph.GraphedExecutor) and notes == [CAPTURED]


@pytest.mark.usefixtures("some_gpu")
def test_inference_is_captured_in_pieces() -> None:
    found, notes = prepared(with_islands(network(steps=30, outputs=(Ref("h29"),)), 15))
    assert type(found) is InPieces and len(notes) == 1 and "in 2 parts" in notes[0]
    inner, outer = found._runs[0][0], found._last
    assert isinstance(inner, cuda_graph.GraphedExecutor) and isinstance(outer, cuda_graph.GraphedExecutor)


@pytest.mark.usefixtures("some_gpu")
def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"cuda_graphs": False}, {"disable": ["cuda-graphs"]}):
        assert prepared(network(), **options)[1] == ["not captured: switched off"]
    monkeypatch.setenv("FXOPT_DISABLE", "cuda-graphs")
    assert prepared(network())[1] == ["not captured: switched off"]


@pytest.mark.usefixtures("some_gpu")
def test_training_is_captured_where_it_is_asked_for() -> None:
    for phase, kind in [(Phase.FORWARD, GraphedForward), (Phase.BACKWARD, GraphedBackward)]:
        made = network(steps=2, outputs=(Ref("h1"),))
        assert prepared(made, phase)[1] == [] and prepared(made, phase, mode="max-autotune")[1] == []
        found, notes = prepared(made, phase, mode="reduce-overhead")
        assert type(found) is kind and notes == [CAPTURED]
        waits = network(Call("aten::_local_scalar_dense.default", (Ref("h1"),), {}, (None,)))
        assert "waits for the GPU" in prepared(waits, phase, mode="reduce-overhead")[1][0]
        assert prepared(made, phase, mode="reduce-overhead", cuda_graphs=False)[1] == ["not captured: switched off"]


def test_an_obstacle_is_noted() -> None:
    (said,) = prepared(network(steps=2, outputs=(Ref("h1"),)))[1]
    assert said.startswith("not captured: it has 2 steps")


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cuda_graph, "_turns_at", refuse)
    assert prepared(network())[1] == ["not captured: libcuda.so.1: cannot open shared object file"]


@pytest.mark.parametrize("value", [0, -1, True, 2.5])
def test_the_limit_is_a_count(value: Any) -> None:
    with pytest.raises(OptionError, match="a number > 0"):
        Options.parse(None, {"cuda_graph_limit": value})
