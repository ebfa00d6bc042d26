"""What AOTAutograd made of a graph, on disk: found where nothing that decides it has changed, and only there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

from fxopt import backend
from fxopt.capture import aot, autograd_cache
from fxopt.journal import RECENT, Journal
from fxopt.passes import attention
from tests.no_compiler import no_compiler

pytestmark = [
    pytest.mark.usefixtures("fresh_cache"),
    pytest.mark.skipif(not autograd_cache.usable(), reason="torch's cache is not known for this version"),
]
X = torch.randn(6, 8)
W = torch.randn(8, 4)


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs that were normalized, that is, traced by AOTAutograd."""
    real, seen = aot.normalize, []

    def normalize(gm: Any, facts: Any, phase: Any, name: str, **rest: Any) -> Any:
        seen.append(name)
        return real(gm, facts, phase, name, **rest)

    monkeypatch.setattr(aot, "normalize", normalize)
    return seen


def start(fn: Callable[..., Any], dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    """`fn` compiled as a new process would, apart from what is on disk."""
    torch.compiler.reset()
    counters.clear()
    RECENT.clear()
    return torch.compile(fn, backend="fxopt", dynamic=dynamic, options=options or None)


def hits() -> int:
    return int(counters["aot_autograd"]["autograd_cache_hit"])


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "autograd").glob("*.json"))


def network(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.tanh(x) @ w + torch.arange(4), -1)


def told(record: Journal) -> tuple[Any, ...]:
    return record.kernels, record.library, record.retreats, [n for n in record.notes if n[0] != "plan"]


def test_inference(traced: list[str]) -> None:
    first, before = start(network)(X, W), list(RECENT)
    assert (hits(), len(traced)) == (0, 1)
    second, after = start(network)(X, W), list(RECENT)
    assert (hits(), len(traced)) == (1, 1)
    assert torch.equal(first, second)
    (ours,) = (j for j in after if j.kernels)
    assert told(ours) == told(next(j for j in before if j.kernels))
    assert ours.graph.endswith(" inference") and {"autograd cache", "plan cache"} == {
        x for x in ours.seconds if ":" not in x
    }
    assert any("not traced" in text for topic, text in ours.notes if topic == "plan")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.outer = nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, p: float = 0.5) -> torch.Tensor:
        self.calls.add_(1)
        hidden = nn.functional.gelu(self.norm(self.inner(x)))
        return self.outer(nn.functional.dropout(hidden, p, self.training))


def train(model: nn.Module, compiled: Callable[..., Any], steps: int = 2) -> list[torch.Tensor]:
    """Losses, gradients and buffers."""
    torch.manual_seed(0)
    x = X.clone().requires_grad_()
    seen = []
    for _ in range(steps):
        loss = compiled(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        seen.append(loss.detach())
    return [*seen, x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]  # type: ignore[list-item]


def test_training(traced: list[str]) -> None:
    results = []
    for _ in range(2):
        model = Network()
        results.append(train(model, start(model)))
    assert hits() == 1
    assert [name.split()[-1] for name in traced] == ["forward", "backward"]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert {j.graph.split()[-1] for j in RECENT if j.kernels} == {"forward", "backward"}
    reference = Network().eval()
    trained = Network().eval()
    for p, q in zip(train(reference, reference), train(trained, start(trained)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_multi_head_attention_as_on_a_gpu(traced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The early passes put a function of fxopt's into the graph, which torch does not know."""
    monkeypatch.setattr(attention, "chooses_late", lambda device: True)
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)

    def call(x: torch.Tensor) -> torch.Tensor:
        return layer(x, x, x, need_weights=False)[0]

    (want,) = torch.autograd.grad(call(x).square().sum(), layer.in_proj_weight)
    for _ in range(2):
        (got,) = torch.autograd.grad(start(call)(x).square().sum(), layer.in_proj_weight)
        torch.testing.assert_close(got, want)
    assert hits() == 1
    assert [name.split()[-1] for name in traced] == ["forward", "backward"]


def test_masks_that_early_passes_make(traced: list[str]) -> None:
    """Their functions are fxopt's, too."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        want = model(x, src_key_padding_mask=padding)
        for _ in range(2):
            torch.testing.assert_close(start(model)(x, src_key_padding_mask=padding), want)
    assert (hits(), len(traced)) == (1, 1)


def test_compile_workers_start_for_what_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(backend, "_prestart_compiler", started.append)
    start(network)(X, W)
    assert started == [{X.device}]
    start(network)(X, W)
    assert hits() == 1 and len(started) == 1
    with functorch_config.patch(enable_autograd_cache=False):
        start(network)(X, W)
    start(network, freeze=True)(X, W)
    assert len(started) == 3


def test_random_numbers_stay_random() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5)

    x = torch.ones(4000)
    start(fn)(x)
    compiled = start(fn)
    torch.manual_seed(3)
    a, b = compiled(x), compiled(x)
    torch.manual_seed(3)
    assert hits() == 1
    assert not torch.equal(a, b) and torch.equal(a, compiled(x)) and 0.4 < (a == 0).float().mean() < 0.6


def test_inputs_that_are_written_or_returned() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x.mul_(2).add_(y.t())
        y.t_()
        return x.view(-1), x[1:], y, x + 1

    for count in range(2):
        x, y = X.clone(), torch.randn(8, 6)
        want = fn(a := x.clone(), b := y.clone())
        got = start(fn)(x, y)
        assert bool(hits()) == bool(count)
        torch.testing.assert_close([*got, x, y], [*want, a, b])
        assert [t.stride() for t in (*got, y)] == [t.stride() for t in (*want, b)]
        assert got[0].data_ptr() == x.data_ptr() and got[2].data_ptr() == y.data_ptr()


def test_outputs_that_are_views_keep_their_gradients() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.view(-1)[3:], (x * 2).detach()

    for count in range(2):
        x = X.clone().requires_grad_()
        view, detached = start(fn)(x)
        assert hits() == count and not detached.requires_grad
        (grad,) = torch.autograd.grad(view.sum(), x)
        assert grad.sum() == x.numel() - 3


def test_symbolic_sizes_are_right(fresh_cache: Path) -> None:
    for _ in range(2):
        compiled = start(network, dynamic=True)
        for rows in (5, 3, 117):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(compiled(x, W), network(x, W))
    assert entries(fresh_cache) == []


def test_a_second_size_after_a_hit() -> None:
    for _ in range(2):
        compiled = start(network)
        for rows in (5, 3, 117):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(compiled(x, W), network(x, W))


def literal(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.tanh(x) @ w + torch.arange(1, 5), -1)


def attribute(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) @ w + torch.tensor([1.0, 2.0, 3.0, 5.0])


CHANGES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], dict[str, Any]]] = {
    "a literal": (literal, (X, W), {}),
    "a tensor": (attribute, (X, W), {}),
    "an op": (lambda x, w: torch.softmax(torch.sinh(x) @ w + torch.arange(4), -1), (X, W), {}),
    "a dtype": (network, (X.double(), W.double()), {}),
    "a size": (network, (torch.randn(7, 8), W), {}),
    "strides": (network, (torch.randn(8, 6).t(), W), {}),
    "a gradient": (network, (X, W.clone().requires_grad_()), {}),
    "another gradient": (network, (X.clone().requires_grad_(), W), {}),
    "a view": (network, (X.clone()[:], W), {}),
    "an option": (network, (X, W), {"disable": ["cse"]}),
    "fuel": (network, (X, W), {"fuel": 0}),
    "eager's random numbers": (network, (X, W), {"fallback_random": True}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_the_result_is_not_found(what: str) -> None:
    fn, args, options = CHANGES[what]
    start(network)(X, W)
    for count in range(2):
        got = start(fn, **options)(*args)
        assert hits() == count
        torch.testing.assert_close(got, fn(*args))
        if got.requires_grad:  # an entry is complete when the backward is
            got.square().sum().backward()


@pytest.fixture
def flags() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.set_float32_matmul_precision("highest")


STATES: dict[str, Callable[[], object]] = {
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "precision": lambda: torch.set_float32_matmul_precision("high"),
}


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("what", STATES)
def test_global_state_is_part_of_the_key(what: str) -> None:
    start(network)(X, W)
    STATES[what]()
    start(network)(X, W)
    assert hits() == 0


def test_modes_are_part_of_the_key() -> None:
    w = W.clone().requires_grad_()

    def step(mode: Any) -> torch.Tensor:
        with mode:
            result: torch.Tensor = start(torch.mm)(X, w)
        return result

    bfloat16 = torch.autocast("cpu", dtype=torch.bfloat16)
    modes: list[Callable[[], Any]] = [
        torch.enable_grad,
        torch.no_grad,
        lambda: bfloat16,
        lambda: torch.autocast("cpu", dtype=torch.float16),
    ]
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
    for seen in range(2):
        for mode, dtype in zip(modes, dtypes, strict=True):
            result = step(mode())
            assert result.dtype == dtype and hits() in (0, seen)
            if result.requires_grad:
                w.grad = None
                result.float().sum().backward()
                torch.testing.assert_close(w.grad, X.sum(0)[:, None].expand(8, 4), rtol=2e-2, atol=2e-2)


def test_inputs_that_share_memory() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return x + y

    def apart() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(20)[2:12], torch.ones(20)[4:14]

    def together() -> tuple[torch.Tensor, torch.Tensor]:
        base = torch.ones(20)
        return base[2:12], base[4:14]

    for make in (apart, together, apart, together):
        torch.testing.assert_close(start(fn)(*make()), fn(*make()))


@torch.library.custom_op("fxopt_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def checkpointed(x: torch.Tensor) -> torch.Tensor:
    return torch.utils.checkpoint.checkpoint(lambda x: x.sin().exp(), x, use_reentrant=False)  # type: ignore[no-any-return]


NOT_KEPT: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "an op of the user's": (lambda x: twice(x) + 1, {}),
    "a branch": (lambda x: torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,)), {}),
    "checkpointing": (checkpointed, {}),
    "frozen weights": (nn.Linear(8, 4).requires_grad_(False), {"freeze": True}),
}


@pytest.mark.parametrize("what", NOT_KEPT)
def test_what_is_not_kept(what: str, fresh_cache: Path) -> None:
    fn, options = NOT_KEPT[what]
    for _ in range(2):
        got = start(fn, **options)(X)
        torch.testing.assert_close(got, fn(X))
    assert hits() == 0 and entries(fresh_cache) == []


def test_dumps_show_every_pass_again(tmp_path: Path, traced: list[str]) -> None:
    for _ in range(2):
        start(network, dump=str(tmp_path))(X, W)
    assert len(traced) == 2


def test_what_was_compiled_without_a_compiler_is_not_remembered(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_compiler(monkeypatch):
        start(network)(X, W)
    assert entries(fresh_cache) == []
    start(network)(X, W)
    assert len(entries(fresh_cache)) == 1


def _cut(path: Path) -> None:
    path.write_text(path.read_text()[: path.stat().st_size // 2])


def _replace(path: Path, **changes: Any) -> None:
    from fxopt.runtime.artifacts import default_store

    body = json.loads(path.read_text())["body"]
    default_store().cache.put_document("autograd", path.stem, {**body, **changes})


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": _cut,
    "empty": lambda path: path.write_text(""),
    "no pickle": lambda path: _replace(path, entry="00ff"),
    "no entry": lambda path: _replace(path, entry=b"I1\n.".hex()),
    "no bytes": lambda path: _replace(path, entry=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(damage: str, fresh_cache: Path, traced: list[str]) -> None:
    want = start(network)(X, W)
    (entry,) = entries(fresh_cache)
    DAMAGES[damage](entry)
    with pytest.warns(UserWarning, match="damaged file") as caught:
        assert torch.equal(start(network)(X, W), want)
    assert len([w for w in caught if "damaged" in str(w.message)]) == 1
    assert len(traced) == 2 and entries(fresh_cache) == [entry]
    assert torch.equal(start(network)(X, W), want)
    assert hits() == 1


@pytest.mark.parametrize("folder", ["plans", "entries"])
def test_what_an_entry_names_is_gone(folder: str, fresh_cache: Path, traced: list[str]) -> None:
    want = start(network)(X, W)
    for path in (fresh_cache / folder).glob("*.json"):
        path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(start(network)(X, W), want)
    assert len(traced) == 2
    assert torch.equal(start(network)(X, W), want)
    assert (hits(), len(traced)) == (1, 2)


def test_torchs_own_switches(fresh_cache: Path, traced: list[str]) -> None:
    start(network)(X, W)
    with functorch_config.patch(enable_autograd_cache=False):
        torch.testing.assert_close(start(network)(X, W), network(X, W))
    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(start(network)(X, W), network(X, W))
    assert len(traced) == 3 and hits() == 0
    assert len(entries(fresh_cache)) == 1


def test_another_torch_caches_nothing(fresh_cache: Path, traced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd_cache, "usable", lambda: False)
    for _ in range(2):
        torch.testing.assert_close(start(network)(X, W), network(X, W))
    assert len(traced) == 2 and entries(fresh_cache) == []


def test_an_error_of_the_cache_is_no_error(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    for name in ("key", "lookup"):
        with monkeypatch.context() as patch:
            patch.setattr(autograd_cache.Session, name, broken)
            torch.testing.assert_close(start(network)(X, W), network(X, W))
    with monkeypatch.context() as patch:
        patch.setattr(autograd_cache.KeptCode, "__reduce__", broken)
        torch.testing.assert_close(start(network)(X, W), network(X, W))
    assert not any(j.retreats for j in RECENT)
    assert entries(fresh_cache) == []


def test_other_backends_keep_torchs_cache(fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    start(network)(X, W)
    for count in range(2):
        torch.compiler.reset()
        counters.clear()
        result = torch.compile(torch.mm, backend="inductor")(X, W)  # it has no C++ to compile
        torch.testing.assert_close(result, torch.mm(X, W))
        assert hits() == count
    assert len(entries(fresh_cache)) == 1


PROGRAM = """
import json, sys, torch
from torch import nn
from torch._dynamo.utils import counters
from fxopt.codegen import cpp_headers
cpp_headers.CALLS_BEFORE = 99  # they take seconds
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4))
compiled = torch.compile(model, backend="fxopt", options={"strict": True})
for _ in range(2):
    loss = compiled(torch.randn(5, 8)).square().sum()
    loss.backward()
model.eval()
with torch.no_grad():
    result = compiled(torch.randn(5, 8))
values = [loss, result.sum(), *(p.grad.sum() for p in model.parameters()), *(b.sum() for b in model.buffers())]
found = dict(counters["aot_autograd"])
print(json.dumps([[v.item() for v in values], found.get("autograd_cache_hit", 0), found.get("autograd_cache_miss", 0)]))
"""


def process(cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "FXOPT_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning:fxopt", "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_processes(fresh_cache: Path) -> None:
    """Two at once on an empty cache, then one that traces nothing."""
    reports = []
    for count in (2, 1):
        running = [process(fresh_cache) for _ in range(count)]
        for child in running:
            out, err = child.communicate(timeout=300)
            assert child.returncode == 0, err
            assert "damaged" not in err
            reports.append(json.loads(out.splitlines()[-1]))
    (first, *_), (second, *_), (third, hit, missed) = reports
    assert first == second == third
    assert (hit, missed) == (2, 0)
