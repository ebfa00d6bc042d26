"""Training around fxopt: gradients as eager's wherever backward is called, what is saved, recomputed, hooked or mixed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.guest.agreement import agree, compiled, graphs, same


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 3))


def pair(module: nn.Module, **options: Any) -> tuple[Callable[..., Any], nn.Module, nn.Module]:
    """(the compiled module, the module it trains, an eager copy)."""
    mine, eager = copy.deepcopy(module), copy.deepcopy(module)
    return compiled(mine, **options), mine, eager


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def grads(module: nn.Module) -> list[torch.Tensor | None]:
    return [p.grad for p in module.parameters()]


def test_gradients_accumulate() -> None:
    run, mine, eager = pair(network())
    for _ in range(3):
        x = torch.randn(5, 6)
        run(x).square().mean().backward()
        eager(x).square().mean().backward()
    close(grads(mine), grads(eager))


def test_several_forwards_before_a_backward() -> None:
    run, mine, eager = pair(network())
    inputs = [torch.randn(5, 6) for _ in range(3)]
    for model in (run, eager):
        losses = [model(x).square().mean() for x in inputs]
        for loss in reversed(losses):
            loss.backward()
    close(grads(mine), grads(eager))


def test_a_graph_kept_for_two_backwards() -> None:
    run, mine, eager = pair(network())
    x = torch.randn(5, 6)
    for model in (run, eager):
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    close(grads(mine), grads(eager))


def test_a_second_backward_is_torchs_own_error() -> None:
    out = compiled(lambda x: x.sin() * x)(torch.randn(3, requires_grad=True)).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_a_saved_tensor_changed_in_place_is_torchs_own_error() -> None:
    x = torch.randn(3, requires_grad=True)
    y = x * 1
    out = compiled(lambda y: y.exp() * y)(y)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_backward_is_torchs_own_error() -> None:
    x = torch.randn(3, requires_grad=True)
    (g,) = torch.autograd.grad(compiled(lambda x: (x**3).sum())(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        g.sum().backward()


def test_only_some_inputs_need_gradients() -> None:
    for wanted in ((True, False, False), (False, True, True), (True, True, True), (False, False, False)):
        args = [torch.randn(4, 4, requires_grad=w) for w in wanted]
        agree(lambda a, b, c: ((a @ b).relu() + c, b * 2, c.sum()), *args)


def test_parameters_frozen_later() -> None:
    run, mine, eager = pair(network())
    x = torch.randn(5, 6)
    for frozen in (False, True, False):
        for model, module in ((run, mine), (eager, eager)):
            module[0].requires_grad_(not frozen)
            module.zero_grad(set_to_none=True)
            model(x).sum().backward()
        close(grads(mine), grads(eager))


def test_outputs_nobody_differentiates() -> None:
    run = compiled(lambda x: (x.sin(), x.argmax(), x > 0, (x * 2).detach(), x.cos()))
    x = torch.randn(5, requires_grad=True)
    out = run(x)
    assert [o.requires_grad for o in out] == [True, False, False, False, True]
    (got,) = torch.autograd.grad(out[4].sum(), x)
    close(got, -x.sin())


@pytest.mark.parametrize(("where", "reentrant"), [("inside", False), ("outside", False), ("outside", True)])
def test_checkpointing_keeps_dropouts_mask(where: str, reentrant: bool) -> None:
    def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.dropout((x * w).sin(), 0.5, training=True)

    x, w = torch.randn(32, 32), torch.ones(32, requires_grad=True)
    if where == "inside":
        out = compiled(lambda x, w: checkpoint(block, x, w, use_reentrant=False))(x, w)
    else:
        out = checkpoint(compiled(block), x, w, use_reentrant=reentrant)
    (got,) = torch.autograd.grad(out.sum(), w) if not reentrant else (_backward(out, w),)
    mask = (out != 0).float() * 2
    assert 0.3 < mask.mean() / 2 < 0.7
    close(got, (mask * x * (x * w).cos()).sum(0).detach())


def _backward(out: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor | None:
    out.sum().backward()
    return leaf.grad


def test_selective_checkpointing_of_a_module() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return x

    run, mine, eager = pair(Blocks())
    x = torch.randn(4, 8)
    run(x).square().sum().backward()
    eager(x).square().sum().backward()
    close(grads(mine), grads(eager))


def test_hooks_of_modules_and_tensors() -> None:
    seen: list[str] = []

    def build() -> nn.Module:
        module = network()
        module[0].register_forward_hook(lambda m, args, out: out * 2)
        module[3].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        module[1].register_full_backward_hook(lambda m, gi, go: seen.append("module"))
        return module

    torch.manual_seed(0)
    mine = build()
    torch.manual_seed(0)
    eager = build()
    x = torch.randn(5, 6)
    for model, module in ((compiled(mine, strict=False), mine), (eager, eager)):
        y = model(x)
        y.register_hook(lambda g: g * 3)
        module[0].weight.register_hook(lambda g: g + 1)
        y.sum().backward()
    close(grads(mine), grads(eager))
    assert seen.count("module") == 2


def test_modes_that_switch_gradients_off() -> None:
    run, _, eager = pair(network())
    x = torch.randn(5, 6)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            got, want = run(x), eager(x)
        close(got, want)
        assert (got.requires_grad, got.is_inference()) == (want.requires_grad, want.is_inference())

    def mixed(x: torch.Tensor) -> Any:
        with torch.no_grad():
            y = x * 2
        return y, x * y

    agree(mixed, torch.randn(4, requires_grad=True))


def test_an_inference_tensor_as_input() -> None:
    with torch.inference_mode():
        x = torch.randn(4)
    run = compiled(lambda x: x.sin() + 1)
    same(run(x), x.sin() + 1)
    with torch.inference_mode():
        same(run(x), x.sin() + 1)


def test_batch_norm_updates_its_statistics() -> None:
    run, mine, eager = pair(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    for _ in range(3):
        x = torch.randn(3, 2, 7, 7)
        for model in (run, eager):
            model(x).square().mean().backward()
        close(list(mine.buffers()), list(eager.buffers()))
    close(grads(mine), grads(eager))
    with torch.no_grad():
        run(x), eager(x)
    close(list(mine.buffers()), list(eager.buffers()))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_a_compiled_optimizer_step(name: str) -> None:
    settings = {"SGD": {"momentum": 0.9, "weight_decay": 0.1}, "AdamW": {}, "RMSprop": {"momentum": 0.5}}[name]
    mine, eager = network(), network()
    eager.load_state_dict(mine.state_dict())
    optimizers = [getattr(torch.optim, name)(m.parameters(), lr=0.01, foreach=True, **settings) for m in (mine, eager)]
    step = compiled(optimizers[0].step, strict=False)
    for k in range(4):
        x = torch.randn(5, 6)
        for module, optimizer, advance in zip((mine, eager), optimizers, (step, optimizers[1].step), strict=True):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            if k == 2:
                optimizer.param_groups[0]["lr"] = 0.003
            advance()
    close(list(mine.parameters()), list(eager.parameters()))
    assert len(graphs()) <= 6


def test_a_whole_training_step_with_autocast_and_clipping() -> None:
    run, mine, eager = pair(network())
    for _ in range(2):
        x = torch.randn(5, 6)
        for model, module in ((run, mine), (eager, eager)):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), torch.tensor([0, 1, 2, 0, 1]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    torch.testing.assert_close(list(mine.parameters()), list(eager.parameters()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(where: str) -> None:
    model = network()

    def inside(x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        with torch.autocast("cpu", enabled=False):
            return y, x @ x.t()

    x = torch.randn(5, 6)
    if where == "inside":
        got, want = compiled(inside)(x), inside(x)
    else:
        run = compiled(model)
        same(run(x).dtype, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = run(x), model(x)
        close(run(x), model(x))
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_the_state_dict_survives_copies_and_pickles(tmp_path: Any) -> None:
    module = network()
    run = compiled(module)
    x = torch.randn(5, 6)
    want = run(x).detach()
    assert set(run.state_dict()) == {f"_orig_mod.{k}" for k in module.state_dict()}
    torch.save(run.state_dict(), tmp_path / "state.pt")
    other = compiled(network())
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    close(other(x), want)
    close(compiled(copy.deepcopy(run)._orig_mod)(x), want)
    close(copy.deepcopy(run)(x), want)


def test_parameters_replaced_after_compiling() -> None:
    run, mine, eager = pair(network())
    x = torch.randn(5, 6)
    run(x)
    with torch.no_grad():
        for module in (mine, eager):
            module[0].weight.mul_(2)
            module[3].weight = nn.Parameter(torch.ones(3, 12))
            module[3].bias.data = torch.full((3,), 4.0)
    close(run(x), eager(x))


def test_shared_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 6)
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(tokens).relu())

    run, mine, eager = pair(Tied())
    tokens = torch.randint(0, 10, (3, 4))
    run(tokens).square().sum().backward()
    eager(tokens).square().sum().backward()
    close(grads(mine), grads(eager))


def test_a_graph_kept_for_a_second_backward_after_one_that_was_not() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Softmax(-1))
    x = torch.randn(4, 8, requires_grad=True)
    run = compiled(model)
    (run(x) ** 2).sum().backward()
    out = (run(x) ** 2).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(out, x)[0], first, rtol=0, atol=0)
