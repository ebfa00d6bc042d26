"""Convolutions in channels-last layout, with CPUs counted among the devices that prefer it: where the layout spreads, what
keeps its strides, and the same values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.ir import ops
from fxopt.ir.graph import Graph
from fxopt.journal import RECENT, Journal
from fxopt.passes import channels_last as pass_module
from fxopt.passes.context import Context, DefaultOptions
from tests.numerics import assert_closer, check_compiled, to_float64
from tests.passes.graphs import aliasing, calls, capture, execute, optimize

pytestmark = pytest.mark.filterwarnings("ignore:Using backward:UserWarning")


@pytest.fixture(autouse=True)
def _cpus_prefer_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_module, "prefers_channels_last", lambda device: True)
    monkeypatch.setattr(pass_module, "convolutions_use_tf32", lambda: True)  # whatever other tests have set


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 16, 9, 8)))


def weight(out: int = 16, inside: int = 16, *window: int) -> Tensor:
    return torch.randn(out, inside, *(window or (3, 3))) / 10


def converted(fn: Callable[..., Any], *args: Tensor, dynamic: bool = False, options: Any = None) -> tuple[Graph, Context]:
    """`fn` after this pass (and what removes dead code), its values, strides and aliasing compared with eager's."""
    chosen = {} if options is None else {"options": options}
    graph, context = optimize(fn, args, only="channels_last", dynamic=dynamic, **chosen)
    got, want = execute(graph, args), fn(*args)
    want = want if isinstance(want, tuple) else (want,)
    wide = fn(*to_float64(args))
    assert_closer(got, want, wide if isinstance(wide, tuple) else (wide,))
    assert [node.meta["val"].stride() for node in graph.gm.graph.output_node().args[0]] == [w.stride() for w in want]
    assert aliasing(args, got) == aliasing(args, want)
    return graph, context


def layouts(graph: Graph, name: str = "convolution") -> list[bool]:
    """For every result of the ops called `name`, whether it is channels-last."""
    nodes = [n for n in graph.gm.graph.nodes if n.op == "call_function" and ops.name_of(n.target) == name]
    return [pass_module._is_channels_last(n.meta["val"]) for n in nodes]


def clones(graph: Graph) -> int:
    return calls(graph).count("clone")


def test_one_conversion_of_the_input_one_of_each_weight_and_one_of_the_output() -> None:
    def net(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = F.conv2d(x, a, padding=1).relu()
        return F.conv2d(y, b, padding=1).sigmoid() + y

    graph, context = converted(net, image(), weight(), weight())
    assert layouts(graph) == [True, True]
    assert layouts(graph, "relu") == layouts(graph, "sigmoid") == [True]
    assert clones(graph) == 4
    assert [r.rule for r in context.log] == ["channels_last.convolution"] * 2


def test_layout_spreads_through_norms_pools_concatenation_and_means() -> None:
    def net(x: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        y = F.conv2d(x, a, padding=1)
        y = ((y - y.mean((0, 2, 3), keepdim=True)) * scale[:, None, None]).relu()
        y = torch.cat([F.avg_pool2d(y, 2), F.max_pool2d(y, 2)], 1)
        return F.conv2d(y, b).mean((2, 3))

    graph, _ = converted(net, image(), weight(), weight(16, 32), torch.randn(16))
    assert layouts(graph) == [True, True]
    assert layouts(graph, "cat") == [True]
    assert clones(graph) == 3


def test_a_view_that_needs_rows_one_after_the_other_gets_a_copy() -> None:
    graph, _ = converted(lambda x, a, m: F.conv2d(x, a).flatten(1) @ m, image(), weight(), torch.randn(16 * 7 * 6, 3))
    assert layouts(graph) == [True]
    assert clones(graph) == 3


def test_a_view_that_can_do_without_gets_none() -> None:
    graph, _ = converted(lambda x, a, m: F.conv2d(x, a).flatten(2).mT @ m, image(), weight(), torch.randn(16, 3))
    assert clones(graph) == 2


SHOWN: dict[str, Callable[..., Any]] = {
    "twice": lambda y: (y, y.relu()),
    "a view": lambda y: (y.permute(0, 2, 3, 1), y * 2),
    "a view and what it is of": lambda y: (y, y[:, 1:]),
    "a view of rows": lambda y: y.view(2, -1),
    "a part that was split": lambda y: (y.split(8, 1)[1], y.split(8, 1)[0] + 1),
    "read by strides": lambda y: y.as_strided((3, 4), (4, 1), 5) + 0.5,
    "sorted": lambda y: torch.sort(y, 1)[0],
    "transposed when traced": lambda y: y.permute(3, 1, 0, 2) + 1,
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_seen_outside_keeps_its_strides(name: str) -> None:
    graph, _ = converted(lambda x, a: SHOWN[name](F.conv2d(x, a) * 2), image(), weight())
    assert layouts(graph) == [True]


def test_writes_into_inputs() -> None:
    def net(x: Tensor, a: Tensor, state: Tensor) -> Tensor:
        y = F.conv2d(x, a, padding=1)
        state.copy_(y + 1)
        return y.mean((2, 3))

    args = image(), weight(), image()
    graph, _ = optimize(net, args, only="channels_last")
    ours, theirs = [a.clone() for a in args], [a.clone() for a in args]
    assert_closer(execute(graph, ours)[0], net(*theirs), net(*to_float64(args)))
    assert layouts(graph) == [True]
    torch.testing.assert_close(ours[2], theirs[2])


KINDS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "strided, padded, dilated": (
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), (2, 0), (2, 1)), (image(), weight(), torch.randn(16))
    ),
    "one by one": (F.conv2d, (image(), weight(24, 16, 1, 1))),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1), (image(), weight(16, 24))
    ),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2), (image(2, 32, 9, 8), weight(32, 16))),
    "three dimensions": (F.conv3d, (image(2, 16, 5, 6, 7), weight(16, 16, 3, 3, 3))),
    "bfloat16": (F.conv2d, (image().bfloat16(), weight().bfloat16())),
    "channels-last already": (F.conv2d, (image().contiguous(memory_format=torch.channels_last), weight())),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_convolution(name: str) -> None:
    fn, args = KINDS[name]
    graph, context = converted(fn, *args)
    assert layouts(graph) == [True]
    assert len(context.log) == 1


def test_a_depthwise_convolution_and_one_of_three_channels_follow_the_others() -> None:
    def net(x: Tensor, first: Tensor, depthwise: Tensor, last: Tensor) -> Tensor:
        y = F.conv2d(x, first, stride=2)
        return F.conv2d(F.conv2d(y, depthwise, groups=16, padding=1), last).mean((2, 3))

    graph, _ = converted(net, image(2, 3, 9, 8), weight(16, 3), weight(16, 1), weight(32, 16, 1, 1))
    assert layouts(graph) == [True, True, True]


def test_channels_last_models_have_only_their_weights_converted() -> None:
    x = image().contiguous(memory_format=torch.channels_last)
    graph, _ = converted(lambda x, a, b: F.conv2d(F.conv2d(x, a).relu(), b), x, weight(), weight())
    assert clones(graph) == 2
    laid_out = weight().contiguous(memory_format=torch.channels_last)
    assert not converted(lambda x, a: F.conv2d(x, a).relu(), x, laid_out)[1].log


def test_few_channels_are_converted_where_the_library_would() -> None:
    """A channels-last convolution after something that asked for rows, and one in no layout that anybody asked for."""

    def net(x: Tensor, last: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        y = x.contiguous().sigmoid()
        return F.conv2d(y, last), F.conv2d(y, other)

    x, last = (t.contiguous(memory_format=torch.channels_last) for t in (image(), weight(4)))
    graph, context = converted(net, x, last, weight(4))
    assert layouts(graph) == [True, False]
    assert layouts(graph, "sigmoid") == [False]
    assert [r.rule for r in context.log] == ["channels_last.convolution"]
    assert not context.rejections


def test_gradients_of_few_channels_are_converted_where_the_library_would() -> None:
    def net(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        settings = [4], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
        return tuple(torch.ops.aten.convolution_backward.default(grad, x, w, *settings))

    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (image(), weight(4)))
    graph, context = converted(net, image(2, 4, 9, 8), x, w)
    assert len(context.log) == clones(graph) == 1
    assert not converted(net, image(2, 4, 9, 8), image(), weight(4))[1].log


LEFT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str | None]] = {
    "float64": (F.conv2d, (image().double(), weight().double()), None),
    "one dimension": (F.conv1d, (image(2, 16, 9), weight(16, 16, 3)), None),
    "nothing in the batch": (F.conv2d, (image(0, 16, 9, 8), weight()), "the library has no channels-last kernel"),
    "few channels": (F.conv2d, (image(2, 3, 9, 8), weight(16, 3)), "no convolution from 16 channels"),
    "one pixel of few channels, in any layout": (
        F.conv2d,
        (image(2, 3, 3, 3), weight(4, 3).contiguous(memory_format=torch.channels_last)),
        "no convolution from 16 channels",
    ),
    "narrow groups": (
        lambda x, w: F.conv2d(x, w, groups=4), (image(2, 32, 9, 8), weight(32, 8)), "no convolution from 16 channels"
    ),
    "depthwise": (
        lambda x, w, d: F.conv2d(F.conv2d(x, d, groups=16), w, stride=7),
        (image(2, 16, 30, 30), weight(16, 16, 1, 1), weight(16, 1, 5, 5)),
        "most of the arithmetic is in depthwise",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    fn, args, reason = LEFT[name]
    graph, context = converted(fn, *args)
    assert not context.log
    assert clones(graph) == 0
    assert [why.startswith(reason) for _, why in context.rejections] == ([] if reason is None else [True])


def test_float32_without_tf32_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_module, "convolutions_use_tf32", lambda: False)
    assert not converted(F.conv2d, image(), weight())[1].log
    assert converted(F.conv2d, image().bfloat16(), weight().bfloat16())[1].log


def test_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not converted(F.conv2d, image(), weight())[1].log


def test_fuel_stops_conversions_and_nothing_else() -> None:
    options = DefaultOptions(check=True, fuel=1)
    args = image(), weight(), weight()
    graph, context = converted(lambda x, a, b: F.conv2d(F.conv2d(x, a), b), *args, options=options)
    assert len(context.log) == 1
    assert layouts(graph)[0]


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("train", [False, True])
def test_symbolic_sizes_take_no_guard(train: bool) -> None:
    """Compiled once for all sizes of batch and image."""
    RECENT.clear()
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2))
    compiled = torch.compile(model, backend="fxopt", options={"strict": True}, dynamic=True)
    for shape in ((2, 16, 9, 8), (3, 16, 12, 7), (5, 16, 8, 13)):
        x = image(*shape).requires_grad_(train)
        with torch.set_grad_enabled(train):
            actual, expected = compiled(x), model(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        if train:
            got, want = (torch.autograd.grad(y.square().sum(), [x, *model.parameters()]) for y in (actual, expected))
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert len([j for j in RECENT if j.graph.startswith("graph ")]) == (2 if train else 1)
    assert ("rewrite", f"channels_last.convolution x{4 if train else 2}") in notes()


def test_frozen_weights_are_converted_when_compiled() -> None:
    args = image(), weight()
    graph, _ = optimize(lambda x, a: F.conv2d(x, a).mean((2, 3)), args, frozen=(1,))
    assert clones(graph) == 1
    torch.testing.assert_close(execute(graph, args)[0], F.conv2d(*args).mean((2, 3)))


class Net(nn.Module):
    """Residual blocks with batch norm, a depthwise and a transposed convolution, pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.depthwise, self.up = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ConvTranspose2d(16, 16, 2, 2)
        self.group, self.head = nn.GroupNorm(4, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.two(F.gelu(self.one(x))) + x, inplace=True)
        y = self.up(F.max_pool2d(self.depthwise(x), 2))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1)), self.group(y)


def net(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().to(dtype), torch.randn(2, 3, 16, 16).to(dtype)


def notes() -> list[tuple[str, str]]:
    return [note for journal in RECENT for note in journal.notes]


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("freeze", [False, True])
def test_compiled_inference(freeze: bool, dynamic: bool) -> None:
    RECENT.clear()
    model, x = net()
    with torch.no_grad():
        actual = check_compiled(model.eval(), x, options={"freeze": freeze}, dynamic=dynamic, k=8)
        assert [t.stride() for t in actual] == [t.stride() for t in model(x)]
    assert ("rewrite", "channels_last.convolution x4") in notes()


def strides(x: Tensor) -> list[int]:
    """Those that mean something."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1]


def step(model: Callable[..., Any], x: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    logits, features = model(x)
    loss = logits.square().sum() + (features * torch.linspace(0, 1, features.shape[-1]).to(x.dtype)).sum()
    return [logits.detach(), features.detach(), *torch.autograd.grad(loss, [x, *parameters])]


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_training(dtype: torch.dtype) -> None:
    RECENT.clear()
    torch.compiler.reset()
    model, x = net(dtype)
    eager, wide = copy.deepcopy(model), to_float64(model)
    compiled = torch.compile(model, backend="fxopt", options={"strict": True})
    actual = step(compiled, x, list(model.parameters()))
    expected = step(eager, x, list(eager.parameters()))
    assert_closer(actual, expected, step(wide, x.double(), list(wide.parameters())), k=32)
    assert [strides(t) for t in actual] == [strides(t) for t in expected]
    assert ("rewrite", "channels_last.convolution x8") in notes()


@pytest.mark.usefixtures("fresh_cache")
def test_training_saves_activations_in_the_layout_that_both_sides_compute_in() -> None:
    """No more conversions than those of the input, the output, four weights and their gradients."""
    joints: list[Graph] = []

    def recorded(context: Context) -> None:
        if context.graph.phase.value == "joint":
            joints.append(context.graph)

    torch.compiler.reset()
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.ReLU()) for _ in range(4)))
    from fxopt.passes import pipeline

    steps = (*pipeline.JOINT_PASSES, pipeline.Pass("recorded", recorded))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "JOINT_PASSES", steps)
        torch.compile(model, backend="fxopt", options={"strict": True})(image()).sum().backward()
    (joint,) = joints
    assert layouts(joint) == [True] * 4
    assert clones(joint) == 1 + 4 + 4 + 1


@pytest.mark.usefixtures("fresh_cache")
def test_checkpointed_training() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = net()

    def call(model: nn.Module, given: Tensor) -> Any:
        return checkpoint(model, given, use_reentrant=False)

    torch.compiler.reset()
    eager, wide = copy.deepcopy(model), to_float64(model)
    compiled = torch.compile(lambda given: call(model, given), backend="fxopt", options={"strict": True})
    actual = step(compiled, x, list(model.parameters()))
    expected = step(eager, x, list(eager.parameters()))
    assert_closer(actual, expected, step(wide, x.double(), list(wide.parameters())), k=32)


@pytest.mark.usefixtures("fresh_cache")
def test_disabled_by_name() -> None:
    RECENT.clear()
    model, x = net()
    with torch.no_grad():
        check_compiled(model.eval(), x, options={"disable": ["channels_last"]}, k=8)
    assert not any("channels_last" in text for _, text in notes())


def test_the_journal_says_why_not() -> None:
    graph = capture(F.conv2d, (image(2, 3, 9, 8), weight(16, 3)))
    journal = Journal("test")
    from fxopt.passes import run

    run(graph, DefaultOptions(), journal)
    assert ("rejected", "channels_last: no convolution from 16 channels or more into as many x1") in journal.notes
