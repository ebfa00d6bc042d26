"""Ways of the same values are compared before they are timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxopt.ir.quantized_ops import SCALED_MM
from fxopt.ir.region import Alias, BufferSpec, Call, Ref
from fxopt.lower.contractions import FUSED, LIBRARY, with_contractions
from fxopt.lower.ops import quantized
from fxopt.lower.schedule import schedule
from fxopt.tune.alternatives import memory_of
from fxopt.tune.measure import BoundCall, Memory, Trial, made_up
from fxopt.tune.suspects import Suspects
from fxopt.tune.values import agree, unlike_the_first
from tests.lower.capturing import moved
from tests.lower.contracting import alternatives, kept
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered

CPU = torch.device("cpu")


def buffer(name: str, dtype: torch.dtype = torch.float32) -> BufferSpec:
    return BufferSpec(name, dtype, CPU, (64, 64), (64, 1))


BUFFERS = {n: buffer(n) for n in ("a", "b", "c", "out")} | {"mask": buffer("mask", torch.bool)}
VIEWS = (Alias("bt", "b", (64, 64), (1, 64), 0),)


def trial(label: str, op: str, *args: str, outputs: tuple[str, ...] = ("out",)) -> Trial:
    return Trial(label, (BoundCall(Call(op, tuple(map(Ref, args)), {}, outputs), BUFFERS, VIEWS),))


def wrong(*trials: Trial) -> frozenset[str]:
    return unlike_the_first(Memory(BUFFERS), CPU, trials, Suspects(None))


def test_only_other_values_are_wrong() -> None:
    product = trial("product", "aten::mm.default", "a", "bt")
    same = trial("same", "aten::matmul.default", "a", "bt")
    other = trial("other", "aten::mm.default", "a", "b")
    assert wrong(product, same, other) == {"other"}


def test_what_cannot_be_compared_is_not_wrong() -> None:
    product = trial("product", "aten::mm.default", "a", "b")
    unknown = trial("of another weight", "aten::mm.default", "a", "c")
    elsewhere = trial("another result", "aten::add.Tensor", "a", "b", outputs=("c",))
    refused = trial("refused", "aten::mm.default", "a", "mask")
    assert wrong(product, unknown, elsewhere, refused) == frozenset()
    assert wrong(refused, product, trial("other", "aten::add.Tensor", "a", "b")) == frozenset()


@pytest.mark.parametrize("told", [True, False])
def test_what_reads_a_repeated_scale_once_has_the_librarys_values_on_made_up_ones(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would not if the contest were not told that all elements are equal."""
    monkeypatch.setattr(quantized, "sums_apart", lambda device: False)
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((80, 32), (48, 32)))
    args = (a, b, torch.full((80,), 0.25), torch.rand(48), torch.randn(48))
    low = schedule(moved(lower(lambda *t: torch.relu(SCALED_MM(*t, torch.float32)), args), "cuda"))
    scale = low.inputs[2]
    low = with_contractions(replace(low, constants={scale: args[2]}))
    (each,) = alternatives(low)
    memory = memory_of(each)
    assert memory.uniform == {scale}
    on_cpu = {name: replace(spec, device=CPU) for name, spec in memory.buffers.items()}
    tensors = made_up(replace(memory, buffers=on_cpu, uniform=memory.uniform if told else frozenset()), CPU, {})
    given = {name: tensors[name].as_strided(on_cpu[name].shape, on_cpu[name].strides) for name in low.inputs}
    (library,), (fused,) = (run_lowered(kept(low, label), given) for label in (LIBRARY, FUSED))
    assert agree(fused, library) == told


def test_masks_hide_some() -> None:
    """One that hid everything, or nothing, would make all masked ways alike."""
    masked, again = (trial(name, "aten::mul.Tensor", *names) for name, names in (("a", ("a", "mask")), ("b", ("mask", "a"))))
    assert wrong(masked, again, trial("square", "aten::mul.Tensor", "a", "a")) == {"square"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundings_and_jumps_agree_and_errors_do_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = torch.randn(1 << 14)
    values = exact.to(dtype)
    rounded = (exact * (1 + 0.004 * torch.randn_like(exact))).to(dtype)
    assert agree(rounded, values)
    jumps = values.clone()
    jumps[::500] = 3
    assert agree(jumps, values)
    assert not agree((exact + 0.15 * torch.randn_like(exact)).to(dtype), values)
    holes = values.clone()
    holes[: 1 << 10] = 0
    assert not agree(holes, values)


def test_what_is_not_finite_has_its_places() -> None:
    values = torch.randn(1000)
    infinite = values.clone()
    infinite[:100] = float("inf")
    assert agree(infinite, infinite) and not agree(values, infinite) and not agree(infinite, values)


def test_integers_agree_but_for_a_few() -> None:
    values = torch.arange(1000)
    few = values.clone()
    few[:5] += 1
    assert agree(few, values) and not agree(values + 1, values)
