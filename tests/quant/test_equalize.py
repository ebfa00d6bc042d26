"""Divisors of channels between layers: ranges become equal, values stay, and int8 loses less."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.errors import CalibrationError
from fxopt.quant.smooth import channel_magnitudes
from fxopt.quant.table import Calibration


class Network(nn.Module):
    """Convolutions with a norm and a pool between them, then linear layers; channels that are hundreds of times as large as
    others, and as much smaller in the next weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3)
        self.third, self.last = nn.Linear(8 * 4, 16), nn.Linear(16, 8)
        spread = torch.exp2(torch.arange(16.0) / 2 - 4)
        with torch.no_grad():
            self.norm.weight.copy_(spread)
            self.second.weight /= spread[:, None, None]
            self.third.weight *= spread[:, None]
            self.last.weight /= spread

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.second(self.norm(self.first(x)).relu()).relu(), 2)
        result: Tensor = self.last(self.third(x.flatten(1)).relu())
        return result


def images(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(16, 8, 8, 8)


def calibrated(model: nn.Module, data: list[Tensor]) -> Calibration:
    torch.compiler.reset()
    return fxopt.calibrate(model, data, progress=False)


@functools.cache
def table_of_network() -> Calibration:
    return calibrated(Network().eval(), [images(1)])


def compiled(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    torch.compiler.reset()
    with torch.no_grad():
        result: Tensor = torch.compile(model, backend="fxopt", options=options)(x)
    return result


def test_layers_that_follow_each_other_lose_less_in_int8() -> None:
    model = Network().eval()
    plain = table_of_network()
    assert {layer.name: layer.after for layer in plain.layers} == {
        "first": None,
        "second": "first",
        "third": "second",
        "last": "third",
    }
    table = fxopt.equalized(plain, model)
    x = images(2)
    with torch.no_grad():
        exact = model.double()(x.double())
    model.float()
    errors = [
        float((compiled(model, x, precision="int8", calibration=t).double() - exact).norm() / exact.norm())
        for t in (plain, table)
    ]
    assert errors[1] < 0.25 * errors[0]


def test_ranges_are_equal_to_a_power_of_two() -> None:
    model = Network().eval()
    table = fxopt.equalized(table_of_network(), model)
    channels = {name: table.channels(name) for name in table.names()}
    second, third, last = (channels[name] for name in ("second", "third", "last"))
    assert channels["first"] is None and second is not None and third is not None and last is not None
    assert bool((second.frexp().mantissa == 0.5).all()) and torch.equal(
        third.view(8, 4)[:, :1].expand(8, 4), third.view(8, 4)
    )
    gains = table["second"].gains
    assert gains is not None
    # After everything: the rows that make a channel, and the columns that it is multiplied by, in the weights as they are
    # with all divisors, stand to each other alike.
    outgoing = third.view(8, 4)[:, 0]
    rows = model.first.weight.detach().abs().flatten(1).amax(1) * gains / second
    columns = channel_magnitudes(model.second.weight.detach() / outgoing[:, None, None, None]) * second
    off = (rows / columns).log2()
    assert float(off.max() - off.min()) <= 2.1  # two roundings, each of half an octave to either side


def test_a_channel_of_several_readers_has_one_divisor() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return torch.cat([self.b(y.relu()), self.c(y)], -1)

    model = Both().eval()
    table = fxopt.equalized(calibrated(model, [torch.randn(32, 8)]), model)
    b, c = table.channels("b"), table.channels("c")
    assert b is not None and c is not None and torch.equal(b, c)


def test_dead_channels_are_left() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        model[0].weight[3] = 0.0
        model[2].weight[:, 5] = 0.0
    table = fxopt.equalized(calibrated(model, [torch.randn(32, 8)]), model)
    channels = table.channels("2")
    assert channels is not None and channels[3] == channels[5] == 1.0 and bool(channels.isfinite().all())


def test_what_does_not_follow_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    table = calibrated(model, [torch.randn(32, 8)])
    with pytest.raises(CalibrationError, match="follow each other"):
        fxopt.equalized(table, model)


def test_tables_keep_who_follows_whom(tmp_path: Path) -> None:
    model = Network().eval()
    one, other = table_of_network(), calibrated(model, [images(2)])
    one.save(tmp_path / "a.fxcal")
    read = Calibration.load(tmp_path / "a.fxcal")
    assert read.digest() == one.digest() and read["second"].after == "first"
    assert torch.equal(Calibration.merge(read, other)["second"].gains, one["second"].gains)  # type: ignore[arg-type]
    second = fxopt.equalized(read, model).channels("second")
    assert second is not None and torch.equal(second, fxopt.equalized(one, model).channels("second"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"after": "nobody"}, "comes after 'nobody', which is no layer"),
        ({"gains": torch.ones(3)}, "its gains are no float32 vector"),
        ({"gains": torch.full((16,), -1.0)}, "not finite, or negative"),
        ({"after": None}, "its gains are no float32 vector"),
    ],
)
def test_tables_with_nonsense_are_refused(wrong: dict[str, Any], words: str, tmp_path: Path) -> None:
    table = table_of_network()
    layers = tuple(replace(x, **wrong) if x.name == "second" else x for x in table.layers)
    replace(table, layers=layers).save(tmp_path / "a.fxcal")
    with pytest.raises(CalibrationError, match=f"layer 'second': .*{words}"):
        Calibration.load(tmp_path / "a.fxcal")
