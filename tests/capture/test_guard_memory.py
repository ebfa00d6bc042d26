"""What is remembered of guards: nothing that these would have noticed goes unnoticed.

Each change is made to a model that was called several times. It is noticed when Dynamo compiles again. By a memory that
says that nothing has changed it is not noticed: so those guards are really gone, and what notices it is the memory's own.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.capture import guard_memory
from fxopt.codegen.replay_build import GUARDS, ReplayCode
from fxopt.runtime.artifacts import ArtifactStore

pytestmark = pytest.mark.skipif(not guard_memory.SUPPORTED, reason="nothing is remembered with this Python")

OFFSET = 1.0
TABLE = {"shift": 1.0}


def twice(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
    return x * by


def thrice(x: torch.Tensor, by: float = 3.0) -> torch.Tensor:
    return x * by


def made(by: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * by

    return scaled


def reset(function: Any, by: float) -> None:
    function.__closure__[0].cell_contents = by


closed = made(2.0)


@dataclass
class Settings:
    gain: float = 1.5
    table: dict[str, float] = field(default_factory=lambda: {"bias": 0.5})


class Layer(nn.Module):
    power = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("mean", torch.randn(4))
        self.scale = 2.0
        self.limits = [0.5, 8.0]
        self.pair = (1.0, (2.0, 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x @ self.weight + self.mean) * self.scale * self.power
        if hasattr(self, "extra"):
            x = x + 100
        return x * self.limits[0] + self.pair[1][0]


class Other(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) - 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.named = nn.ModuleDict({"last": nn.Linear(4, 4), "drop": nn.Dropout(0.5)})
        self.settings = Settings()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        x = self.named["drop"](self.named["last"](x)) * self.settings.gain + self.settings.table["bias"]
        return closed(twice(x)) + OFFSET + TABLE["shift"]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = ReplayCode(ArtifactStore(tmp_path_factory.mktemp("guards") / "cache"), GUARDS)
    module = made.wait()
    assert module is not None, made.reason
    return module


class Backend:
    """Runs graphs as they are; guards are remembered in `memories`, made by `make`."""

    def __init__(self, make: Callable[..., Any] | None) -> None:
        self.make, self.compilations = make, 0
        self.memories: list[Any] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compilations += 1
        if self.make is not None:
            guard_memory.remember_next(lambda: self)
        return gm.forward

    def Memory(self, *args: Any) -> Any:
        assert self.make is not None
        self.memories.append(self.make(*args))
        return self.memories[-1]


class Blind:
    """A memory for which nothing ever changes."""

    def __init__(self, memory: Any) -> None:
        self.add, self.seal = memory.add, memory.seal

    def __call__(self, f_locals: dict[str, Any]) -> bool:
        return True


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All that the model reads is as it was, and nothing is compiled."""
    torch._dynamo.reset()
    for owner, name in ((Layer, "power"), (Layer, "forward"), (nn.Linear, "forward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    module = sys.modules[__name__]
    for name in ("OFFSET", "twice", "closed"):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setitem(TABLE, "shift", 1.0)
    defaults, body = twice.__defaults__, twice.__code__
    yield
    twice.__defaults__, twice.__code__ = defaults, body
    reset(closed, 2.0)
    torch._dynamo.reset()


def set_global(name: str, value: Any) -> None:
    setattr(sys.modules[__name__], name, value)


def replace_dict(layer: nn.Module) -> None:
    layer.__dict__ = {**layer.__dict__, "scale": 3.0}


def swap(modules: nn.ModuleList) -> None:
    first = modules._modules.pop("0")
    modules._modules["0"] = first


class Tagged(torch.Tensor):
    pass


CHANGES: dict[str, Callable[[Model], Any]] = {
    "an attribute": lambda m: setattr(m.layers[1], "scale", 3.0),
    "an attribute's type": lambda m: setattr(m.layers[1], "scale", 3),
    "training": lambda m: m.train(),
    "training of one layer": lambda m: m.named["drop"].train(),
    "a parameter's shape": lambda m: setattr(m.named, "last", nn.Linear(4, 6)),
    "a parameter's dtype": lambda m: m.named.double(),
    "a parameter's memory format": lambda m: setattr(m.layers[0].weight, "data", m.layers[0].weight.data.t()),
    "a parameter that is frozen": lambda m: m.layers[0].weight.requires_grad_(False),
    "a parameter that is gone": lambda m: delattr(m.layers[0], "weight"),
    "a parameter of a subclass": lambda m: setattr(m.layers[0], "mean", torch.ones(4).as_subclass(Tagged)),
    "a buffer's shape": lambda m: setattr(m.layers[0], "mean", torch.randn(1, 4)),
    "a bias that is gone": lambda m: setattr(m.named["last"], "bias", None),
    "a marked weight": lambda m: torch._dynamo.mark_dynamic(m.layers[0].weight, 0),
    "a module's class": lambda m: setattr(m.layers[1], "__class__", Other),
    "a module": lambda m: m.layers.__setitem__(1, Other()),
    "one module more": lambda m: m.layers.append(Layer()),
    "modules' order": lambda m: swap(m.layers),
    "a module's dict": lambda m: replace_dict(m.layers[1]),
    "a module's own forward": lambda m: setattr(m.layers[1], "forward", lambda x: x),
    "an attribute that was not there": lambda m: setattr(m.layers[1], "extra", 1),
    "a buffer that was not there": lambda m: m.layers[1].register_buffer("extra", torch.ones(1)),
    "a class's attribute": lambda m: setattr(Layer, "power", 3.0),
    "a class's attribute that hides": lambda m: setattr(m.layers[1], "power", 3.0),
    "an item of a list": lambda m: m.layers[1].limits.__setitem__(0, 0.25),
    "a list's length": lambda m: m.layers[1].limits.append(1.0),
    "a tuple": lambda m: setattr(m.layers[1], "pair", (1.0, (5.0, 3.0))),
    "an object's attribute": lambda m: setattr(m.settings, "gain", 3.0),
    "an object": lambda m: setattr(m, "settings", Settings(gain=3.0)),
    "an item of a dict": lambda m: m.settings.table.__setitem__("bias", 2.0),
    "a global": lambda m: set_global("OFFSET", 7.0),
    "an item of a global": lambda m: TABLE.__setitem__("shift", 7.0),
    "a global function": lambda m: set_global("twice", thrice),
    "a function's defaults": lambda m: setattr(twice, "__defaults__", (5.0,)),
    "a closure's variable": lambda m: reset(closed, 5.0),
}


def outcome(call: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor | str:
    torch.manual_seed(0)
    try:
        return call(x)
    except (AttributeError, KeyError, RuntimeError, torch._dynamo.exc.TorchDynamoException):
        return "fails"


def after(change: Callable[[Model], Any], make: Callable[..., Any]) -> tuple[int, Any, Any]:
    """How often a change had it compiled again; what the compiled model gives, and what the model gives."""
    backend = Backend(make)
    model, x = Model().eval(), torch.randn(3, 4)
    run = torch.compile(model, backend=backend, dynamic=False)
    for _ in range(3):
        torch.testing.assert_close(run(x), model(x))
    assert backend.compilations == 1
    change(model)
    got = outcome(run, x)
    return backend.compilations - 1, got, outcome(model, x)


def compiled(code: Any) -> tuple[Backend, Model, Callable[..., torch.Tensor]]:
    backend = Backend(code.Memory)
    model = Model().eval()
    return backend, model, torch.compile(model, backend=backend, dynamic=False)


@pytest.mark.parametrize("what", CHANGES)
def test_changes_are_noticed(what: str, code: Any) -> None:
    again, got, expected = after(CHANGES[what], code.Memory)
    if isinstance(expected, str):
        assert got == expected
        return
    assert again == 1
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("what", CHANGES)
def test_it_is_the_memory_that_notices(what: str, code: Any) -> None:
    again, _, _ = after(CHANGES[what], lambda *args: Blind(code.Memory(*args)))
    assert again == 0


def test_modes_and_arguments_are_noticed(code: Any) -> None:
    backend, model, run = compiled(code)
    x = torch.randn(3, 4)
    run(x)
    run(x)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
    assert backend.compilations == 2
    with torch.inference_mode():
        torch.testing.assert_close(run(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(x).dtype == model(x).dtype
    assert backend.compilations == 4
    torch.testing.assert_close(run(torch.randn(5, 4))[:0], x[:0])
    assert backend.compilations == 5
    torch.testing.assert_close(run(x), model(x))
    assert backend.compilations == 5


class Summing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = [torch.ones(4), torch.ones(4)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x + self.state[0] * self.state[1]


def test_a_tensor_that_is_given_twice_is_noticed(code: Any) -> None:
    backend, model = Backend(code.Memory), Summing()
    run = torch.compile(model, backend=backend, dynamic=False)
    for _ in range(3):
        torch.testing.assert_close(run(torch.zeros(4)), torch.full((4,), 2.0))
    torch.testing.assert_close(run(model.state[1]), torch.full((4,), 4.0))
    assert backend.compilations == 2
    torch.testing.assert_close(run(torch.zeros(4)), torch.full((4,), 3.0))
    assert backend.compilations == 2


def test_a_value_at_an_address_used_again_is_noticed(code: Any) -> None:
    backend, model, run = compiled(code)
    x = torch.randn(3, 4)
    with torch._dynamo.config.patch(recompile_limit=64):
        for k in range(20):
            model.layers[1].scale = 2.0 + k
            model.layers[1].limits[0] = 0.5 + k
            set_global("OFFSET", 1.0 + k)
            torch.testing.assert_close(run(x), model(x))
            torch.testing.assert_close(run(x), model(x))
    assert backend.compilations == 20


def test_models_after_each_other_are_told_apart(code: Any) -> None:
    backend, x = Backend(code.Memory), torch.randn(3, 4)
    with torch._dynamo.config.patch(recompile_limit=64):
        for k in range(10):
            model = Model().eval()
            model.layers[0].scale = 2.0 + k % 3
            run = torch.compile(model, backend=backend, dynamic=False)
            for _ in range(3):
                torch.testing.assert_close(run(x), model(x))
            del model, run
            gc.collect()
    assert backend.compilations == 3


def test_models_that_take_turns_are_all_remembered(code: Any) -> None:
    backend, x = Backend(code.Memory), torch.randn(3, 4)
    models = [Model().eval() for _ in range(4)]
    runs = [torch.compile(model, backend=backend, dynamic=False) for model in models]
    for _ in range(4):
        for model, run in zip(models, runs, strict=True):
            torch.testing.assert_close(run(x), model(x))
    (memory,) = backend.memories
    assert backend.compilations == 1
    assert memory.state()["records"] == memory.state()["walks"] == len(models)


def test_no_model_is_kept_alive(code: Any) -> None:
    backend, model, run = compiled(code)
    x = torch.randn(3, 4)
    run(x)
    run(x)
    gone = [weakref.ref(x) for x in (model, model.layers[0], model.layers[0].weight, model.settings)]
    del model, run
    gc.collect()
    assert [x() for x in gone] == [None] * len(gone)
    assert backend.memories


def test_what_changes_in_each_call_costs_no_walk_each(code: Any) -> None:
    backend, model, run = compiled(code)
    x = torch.randn(3, 4)
    for k in range(200):
        model.layers[0].calls = k
        set_global("CALLS", k)
        run(x)
    (memory,) = backend.memories
    assert backend.compilations == 1
    assert memory.state()["walks"] < 10 or memory.state()["off"]


def test_other_backends_keep_their_guards(code: Any) -> None:
    asked = []

    def failing(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        guard_memory.remember_next(lambda: asked.append(1))
        raise RuntimeError("no")

    x = torch.randn(3, 4)
    model = Model().eval()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(model, backend=failing, dynamic=False)(x)
    before = len(asked)
    backend = Backend(None)
    torch.compile(model, backend=backend, dynamic=False)(x)
    assert backend.compilations == 1 and len(asked) == before


def test_nothing_happens_outside_of_a_compilation() -> None:
    guard_memory.remember_next(lambda: pytest.fail("asked for"))
