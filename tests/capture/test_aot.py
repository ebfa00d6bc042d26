"""Capture end to end, with an interpreter in the compiler's place: results, roles, mutation, random numbers, odd graphs."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.schemas import MemoryFormatMeta
from torch.utils.checkpoint import checkpoint

from fxopt.capture.private import gradients_as_outputs
from fxopt.ir.graph import Phase, Role
from tests.capture.recording import Recorder


class Small(nn.Module):
    """Linear, batch norm, a mutated counter, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.BatchNorm1d(6)])
        self.heads = nn.ModuleDict({"out": nn.Linear(6, 3)})
        self.norm = nn.LayerNorm(6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        self.calls.add_(1)
        return self.heads["out"](F.gelu(self.norm(x)))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_training_matches_eager_with_gradients_and_state():
    torch.manual_seed(0)
    model, x = Small(), torch.randn(5, 6, requires_grad=True)
    twin, y = copy.deepcopy(model), x.detach().clone().requires_grad_()
    recorder = Recorder()
    compiled = recorder.compile(model)
    for _ in range(2):
        compiled(x).square().sum().backward()
        twin(y).square().sum().backward()
    close(x.grad, y.grad)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad), name
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        close(p, q)
    assert [g.phase for g in recorder.graphs] == [Phase.FORWARD, Phase.BACKWARD]
    forward = recorder.graphs[0]
    assert forward.saved == len(forward.gm.graph.output_node().args[0]) - 1
    assert not any("batch_norm" in t or "layer_norm" in t for t in recorder.targets(Phase.FORWARD))


@pytest.mark.parametrize("mode", ["inference", "frozen", "forward", "training"])
def test_the_first_inputs_are_not_kept(mode):
    recorder, model = Recorder(freeze=mode == "frozen"), nn.Linear(6, 6)
    compiled, x = recorder.compile(model), torch.randn(2, 6)
    with torch.set_grad_enabled(mode in ("forward", "training")):
        y = compiled(x).relu()
        if mode == "training":
            y.sum().backward()
    alive = weakref.ref(x), weakref.ref(x.untyped_storage())
    del x, y
    gc.collect()
    assert [a() for a in alive] == [None, None]


def test_weights_that_are_given_up_are_freed():
    recorder, model = Recorder(), nn.Linear(6, 6)
    recorder.compile(model)(torch.randn(2, 6)).sum().backward()
    weight = weakref.ref(model.weight)
    del model.weight
    gc.collect()
    assert weight() is None


def test_roles_and_module_names():
    recorder = Recorder()
    model = Small().eval()
    with torch.no_grad():
        recorder.compile(model)(torch.randn(4, 6))
    (graph,) = recorder.graphs
    roles = [i.role for i in graph.inputs]
    assert roles.count(Role.STATE) == 1  # the counter; batch norm's statistics are not written in eval
    assert roles.count(Role.USER) == 1
    assert roles.count(Role.PARAMETER) == len(roles) - 2
    assert len(graph.notes["static"]) == len(roles) - 1
    modules = {n.target: n.meta["module"] for n in graph.gm.graph.nodes if n.op == "call_function"}
    assert modules[torch.ops.aten.gelu.default] == ""
    named = {n.meta["module"] for n in graph.gm.graph.nodes if n.target is torch.ops.aten.addmm.default}
    assert named == {"layers.0", "heads.out"}
    assert all(dict(model.named_modules()).get(name) is not None for name in named)


def test_state_is_written_in_place_in_an_inference_graph():
    recorder = Recorder()
    model = Small().eval()
    with torch.no_grad():
        recorder.compile(model)(torch.randn(4, 6))
    assert model.calls == 1
    assert recorder.targets().count("aten.copy_.default") == 1


def test_dynamic_shapes_share_one_graph_and_convert():
    recorder = Recorder()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    compiled = recorder.compile(model, dynamic=True)
    for batch in (3, 8, 17):
        x = torch.randn(batch, 4)
        close(compiled(x), model(x))
    assert len(recorder.of(Phase.FORWARD)) == 1
    graph = recorder.of(Phase.FORWARD)[0]
    sizes = [
        graph.to_int(s)
        for n in graph.gm.graph.nodes
        if isinstance(n.meta.get("val"), torch.Tensor)
        for s in n.meta["val"].shape
    ]
    assert any(not isinstance(s, int) for s in sizes)


def test_automatic_dynamic_shapes():
    recorder = Recorder()
    compiled = recorder.compile(lambda x: x.softmax(-1) * x.shape[0])
    for batch in (4, 5, 9, 33):
        x = torch.randn(batch, 7)
        close(compiled(x), x.softmax(-1) * batch)
    assert len(recorder.graphs) == 2


def test_autocast_is_in_the_graph():
    recorder = Recorder()
    linear, x = nn.Linear(8, 8), torch.randn(3, 8)

    def fn(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear(x).float()

    got = recorder.compile(fn)(x)
    torch.testing.assert_close(got, fn(x), rtol=2e-2, atol=2e-2)
    assert any("_to_copy" in t for t in recorder.targets(Phase.FORWARD))
    assert not any("prims" in t for t in recorder.targets(Phase.FORWARD))


def test_graph_breaks():
    recorder = Recorder()

    def fn(x):
        y = x * 2
        torch._dynamo.graph_break()
        return y.sin() + x

    x = torch.randn(5)
    close(recorder.compile(fn)(x), fn(x))
    assert len(recorder.graphs) == 2


def test_user_inputs_mutated_and_outputs_aliased():
    recorder = Recorder()

    def fn(x, y):
        x.add_(1)
        return y.t(), y.detach(), x.view(-1), y * 2

    x, y = torch.zeros(2, 3), torch.randn(3, 4)
    view, detached, flat, doubled = recorder.compile(fn)(x, y)
    assert torch.equal(x, torch.ones(2, 3)) and torch.equal(flat, torch.ones(6))
    assert view.data_ptr() == detached.data_ptr() == y.data_ptr() and flat.data_ptr() == x.data_ptr()
    assert torch.equal(doubled, y * 2)


def test_a_detached_output_keeps_its_twin_differentiable():
    def fn(x):
        y = x.sin()
        return y, y.detach()

    x = torch.randn(4, requires_grad=True)
    y, detached = Recorder().compile(fn)(x)
    assert y.requires_grad and not detached.requires_grad
    y.sum().backward()
    close(x.grad, x.detach().cos())


def test_lists_dicts_and_scalars_as_inputs():
    recorder = Recorder()
    compiled = recorder.compile(lambda xs, d, k: (xs[0] + xs[1] * k, {"z": d["a"] - 1}))
    xs, d = [torch.ones(2), torch.ones(2)], {"a": torch.zeros(3)}
    first, second = compiled(xs, d, 3)
    assert torch.equal(first, torch.full((2,), 4.0)) and torch.equal(second["z"], -torch.ones(3))


def test_list_inputs_of_the_graph_itself():
    """Compiled autograd and others hand a graph lists: they are flattened."""

    class TakesList(nn.Module):
        def forward(self, xs):
            return (xs[0] * xs[1],)

    recorder = Recorder()
    gm = torch.fx.symbolic_trace(TakesList())
    xs = [torch.randn(3), torch.randn(3)]
    compiled = recorder(gm, [xs])
    assert torch.equal(compiled(list(xs))[0], xs[0] * xs[1])
    assert len(recorder.graphs) == 1


def test_integers_only_and_no_tensor_inputs():
    recorder = Recorder()
    assert torch.equal(recorder.compile(lambda: torch.arange(4) * 2)(), torch.arange(4) * 2)
    x = torch.arange(6)
    assert torch.equal(recorder.compile(lambda x: (x // 2) % 3)(x), (x // 2) % 3)


def test_literals_become_constants():
    recorder = Recorder()

    def fn(x):
        return x + torch.tensor([1.0, 2.0, 3.0])

    x = torch.randn(3)
    close(recorder.compile(fn)(x), fn(x))
    constants = [i for g in recorder.graphs for i in g.inputs if i.role is Role.CONSTANT]
    assert [c.value.tolist() for c in constants] == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize("phase", [Phase.INFERENCE, Phase.FORWARD])
def test_whole_ops_stay_whole(phase):
    recorder = Recorder()

    def fn(q, image, kernel):
        attended = F.scaled_dot_product_attention(q, q, q)
        return attended, F.conv2d(image, kernel)

    grad = phase is Phase.FORWARD
    recorder.compile(fn)(
        torch.randn(1, 2, 8, 16, requires_grad=grad), torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=grad)
    )
    targets = recorder.targets(phase)
    for name in ("aten._scaled_dot_product", "aten.convolution.default"):
        assert sum(t.startswith(name) for t in targets) == 1, (name, targets)


# --- random numbers -------------------------------------------------------------------------------------------------------


def test_dropout_is_reproducible_fresh_and_unbiased():
    recorder = Recorder()
    compiled = recorder.compile(lambda x: F.dropout(x, 0.3))
    x = torch.ones(40_000)
    torch.manual_seed(5)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(5)
    assert torch.equal(first, compiled(x)) and not torch.equal(first, second)
    assert abs((first == 0).double().mean() - 0.3) < 0.015 and abs(first.double().mean() - 1) < 0.02
    assert "fxopt.seed.default" in recorder.targets() and "aten.native_dropout.default" not in recorder.targets()


def test_dropout_gradient_uses_the_mask_that_was_used():
    recorder = Recorder()
    compiled = recorder.compile(lambda x: F.dropout(x.sin(), 0.5))
    x = torch.randn(1000, requires_grad=True)
    for _ in range(2):
        x.grad = None
        y = compiled(x)
        y.sum().backward()
        assert torch.equal(x.grad == 0, y.detach() == 0)
    backward = recorder.targets(Phase.BACKWARD)
    assert "fxopt.rand.default" in backward and "fxopt.seed.default" not in backward
    saved = [n.meta["val"] for n in recorder.of(Phase.FORWARD)[0].gm.graph.output_node().args[0][1:]]
    assert sorted(v.numel() for v in saved) == [1, 1000]  # the seed and x: no mask


def test_saved_masks_on_request():
    recorder = Recorder(recompute_random=False)
    x = torch.randn(100, requires_grad=True)
    y = recorder.compile(lambda x: F.dropout(x.sin(), 0.5))(x)
    y.sum().backward()
    assert torch.equal(x.grad == 0, y.detach() == 0)
    assert "fxopt.rand.default" not in recorder.targets(Phase.BACKWARD)


@pytest.mark.parametrize(("words", "trained", "gathered"), [(8, True, True), (4000, True, False), (8, False, False)])
def test_rows_of_a_small_trained_table_are_picked_again(words: int, trained: bool, gathered: bool):
    recorder = Recorder()
    table, scale = torch.randn(words, 16, requires_grad=trained), torch.ones(16, requires_grad=True)
    ids = torch.randint(words, (500,))
    results = []
    for run in (fn := lambda ids, table, scale: torch.sin(F.embedding(ids, table) * scale), recorder.compile(fn)):
        table.grad = scale.grad = None
        run(ids, table, scale).sum().backward()
        results.append((scale.grad, table.grad if trained else None))
    torch.testing.assert_close(*results)
    assert ("aten.embedding.default" in recorder.targets(Phase.BACKWARD)) is gathered


@pytest.mark.parametrize("fallback", [False, True])
def test_checkpoint_recomputes_the_same_mask(fallback):
    recorder = Recorder(fallback_random=fallback)

    def block(x, w):
        return F.dropout(torch.relu(x @ w), 0.5)

    def fn(x, w):
        return checkpoint(block, checkpoint(block, x, w, use_reentrant=False), w, use_reentrant=False)

    x, w = torch.randn(16, 16, requires_grad=True), torch.eye(16)
    y = recorder.compile(fn)(x, w)
    y.sum().backward()
    # With w the identity, x contributes 4 per kept and positive element: exactly y / x.
    kept = (y.detach() != 0).float()
    close(x.grad, 4 * kept)
    assert any("seed" in t for t in recorder.targets(Phase.FORWARD)) is not fallback


def test_fallback_random_gives_eagers_bits():
    compiled = Recorder(fallback_random=True).compile(lambda x: F.dropout(x, 0.4) + torch.rand_like(x))
    x = torch.randn(64)
    torch.manual_seed(9)
    got = compiled(x)
    torch.manual_seed(9)
    assert torch.equal(got, F.dropout(x, 0.4) + torch.rand_like(x))


def test_two_draws_of_one_graph_differ():
    a, b = Recorder().compile(lambda: (torch.rand(50), torch.rand(50)))()
    assert not torch.equal(a, b)


DRAWS = {
    "rand": (lambda: torch.rand(20_000), 0.5, 1 / 12),
    "rand float64": (lambda: torch.rand(20_000, dtype=torch.float64), 0.5, 1 / 12),
    "rand bfloat16": (lambda: torch.rand(20_000, dtype=torch.bfloat16), 0.498, 1 / 12),
    "randn": (lambda: torch.randn(20_000), 0.0, 1.0),
    "randn float64": (lambda: torch.randn(20_000, dtype=torch.float64), 0.0, 1.0),
    "randint": (lambda: torch.randint(-3, 4, (20_000,)), 0.0, 4.0),
    "randint like": (lambda: torch.randint_like(torch.zeros(20_000), 5), 2.0, 2.0),
    "uniform": (lambda: torch.empty(20_000).uniform_(-1, 3), 1.0, 16 / 12),
    "normal": (lambda: torch.empty(20_000).normal_(2, 3), 2.0, 9.0),
    "random_": (lambda: torch.ops.aten.random.to(torch.zeros(20_000), 5), 2.0, 2.0),
    "bernoulli": (lambda: torch.bernoulli(torch.full((20_000,), 0.25)), 0.25, 0.1875),
    "bernoulli p": (lambda: torch.empty(20_000).bernoulli_(0.75), 0.75, 0.1875),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_have_their_distribution_and_type(name):
    fn, mean, variance = DRAWS[name]
    recorder = Recorder()
    torch.manual_seed(1)
    got, eager = recorder.compile(fn)(), fn()
    assert (got.dtype, got.shape, got.stride()) == (eager.dtype, eager.shape, eager.stride())
    assert any("fxopt.seed" in t for t in recorder.targets())
    assert abs(got.double().mean() - mean) < 5 * (variance / 20_000) ** 0.5 + 1e-9
    assert abs(got.double().var() - variance) < 0.06 * variance
    if name.startswith("rand "):
        assert got.max() < 1


def test_like_draws_keep_dense_strides_and_symbolic_sizes():
    recorder = Recorder()
    compiled = recorder.compile(torch.rand_like, dynamic=True)
    x = torch.empty(4, 3, 5, 6).to(memory_format=torch.channels_last)
    assert compiled(x).stride() == torch.rand_like(x).stride()
    contiguous = Recorder()
    draw = contiguous.compile(lambda x: torch.randn_like(x), dynamic=True)
    assert draw(torch.empty(3, 7)).shape == (3, 7) and draw(torch.empty(5, 2)).shape == (5, 2)
    assert any("fxopt.randn" in t for t in contiguous.targets())


def test_dropout_edge_probabilities():
    x = torch.randn(50)
    assert torch.equal(Recorder().compile(lambda x: F.dropout(x, 0.0))(x), x)
    assert torch.equal(Recorder().compile(lambda x: F.dropout(x, 1.0))(x), torch.zeros(50))


# --- higher-order ops -----------------------------------------------------------------------------------------------------


def test_cond_passes_through():
    recorder = Recorder()

    def fn(x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    compiled = recorder.compile(fn)
    for x in (torch.ones(3), -torch.ones(3)):
        close(compiled(x), x.sin() if x.sum() > 0 else x.cos())
    assert "cond" in recorder.targets()


def test_scan_passes_through():
    from torch._higher_order_ops.scan import scan

    recorder = Recorder()

    def fn(init, xs):
        return scan(lambda carry, x: (carry + x, carry * 2 + x), init, xs)

    init, xs = torch.zeros(3), torch.randn(5, 3)
    carry, _ = recorder.compile(fn)(init, xs)
    close(carry, xs.sum(0))


def test_flex_attention_passes_through():
    from torch.nn.attention.flex_attention import flex_attention

    recorder = Recorder()
    q = torch.randn(1, 2, 16, 8)

    def fn(q):
        return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: torch.where(i >= j, score, -float("inf")))

    with torch.no_grad():
        got = recorder.compile(fn)(q)
    close(got, F.scaled_dot_product_attention(q, q, q, is_causal=True))


def test_tensor_subclasses():
    from torch.testing._internal.two_tensor import TwoTensor

    recorder = Recorder()
    x = TwoTensor(torch.randn(3), torch.randn(3))
    out = recorder.compile(lambda x: x.sin() * 2)(x)
    assert isinstance(out, TwoTensor)
    close(out.a, x.a.sin() * 2)
    close(out.b, x.b.sin() * 2)


def test_custom_ops_and_ops_with_effects():
    recorder = Recorder()

    def fn(x):
        return torch.linalg.inv(x) + 1

    x = torch.eye(3) * 2
    close(recorder.compile(fn)(x), fn(x))


def test_gradients_come_in_the_layout_of_their_outputs():
    """Also with a torch that copies those which are neither contiguous nor channels-last (up to 2.11)."""
    heads = torch.randn(2, 6, 4, 8).transpose(1, 2)
    cases = {"heads": heads, "one row for all": torch.randn(1, 8).expand(6, 8), "gaps": torch.randn(6, 8)[:, ::2]}
    with functorch_config.patch(guess_tangent_strides_as_outputs=False):
        before = {n: MemoryFormatMeta.from_tensor(t).stride for n, t in cases.items()}
        with gradients_as_outputs():
            inside = {n: MemoryFormatMeta.from_tensor(t).stride for n, t in cases.items()}
    assert before == dict.fromkeys(cases)
    assert inside == {"heads": heads.stride(), "one row for all": None, "gaps": None}
