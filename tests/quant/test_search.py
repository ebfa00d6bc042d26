"""`fxopt.quantize` with times that are given, so that decisions depend on errors alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import CalibrationError, OptionError
from fxopt.journal import RECENT
from fxopt.precision import HIGH
from fxopt.quant import savings, search
from fxopt.quant.emulate import Window
from fxopt.quant.search import Result
from fxopt.report.measure import Timing


class _Model(nn.Module):
    """Of `wild`'s inputs one is a hundred times as large as the rest: on a grid that reaches so far they are lost."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.calm, self.wild, self.slow = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 48)
        self.spread = torch.ones(32)
        self.spread[3] = 100.0

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.slow(torch.tanh(self.wild(torch.tanh(self.calm(x)) * self.spread)))
        return result


def _loader() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(16, 32) for _ in range(3)]


def _error(run: Any, exact: Any) -> float:
    with torch.no_grad():
        pairs = [(run(x).double(), exact(x).double()) for x in _loader()]
    off, size = (sum(float(t.square().sum()) for t in parts) for parts in zip(*((a - b, b) for a, b in pairs), strict=True))
    return (off / size) ** 0.5


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Seconds of a layer and of the model: quantized layers take half, but for those with 48 columns."""
    given = {"quantized": 1.0, HIGH: 2.0}

    def of_layer(shape: savings.LayerShape, precisions: Any, *rest: Any) -> dict[str, float]:
        return {HIGH: 2e-3, **dict.fromkeys(precisions, 3e-3 if shape.columns == 48 else 1e-3)}

    def of_model(calls: dict[str, Callable[[], Any]], *rest: Any, **settings: Any) -> dict[str, Timing]:
        for call in calls.values():
            call()
        return {name: Timing([given[name]]) for name in calls}

    monkeypatch.setattr(savings, "measured", of_layer)
    monkeypatch.setattr(search, "interleaved", of_model)
    yield given
    torch.compiler.reset()


def _quantize(model: nn.Module, budget: float, **settings: Any) -> Result:
    return fxopt.quantize(model, _loader(), budget, precisions=("int8", HIGH), progress=False, **{"fit": False, **settings})


def _chosen(result: Result) -> list[str]:
    return [layer.name for layer in result.report().layers if layer.decision != HIGH]


def test_sensitive_layers_stay_high_and_the_budget_holds(times: dict[str, float]) -> None:
    model = _Model().eval()
    result = _quantize(model, 0.02)
    assert _chosen(result) == ["calm"] and result.refused is None
    assert 0.0 < _error(result.model, model) <= 0.02
    layers = {layer.name: layer for layer in result.report().layers}
    assert layers["wild"].error["int8"] > 0.02 > layers["calm"].error["int8"] > 0.0
    assert (layers["wild"].why, layers["slow"].why) == ("beyond the budget", "no precision is faster")
    assert result.decisions.exact("calm") == "int8" and result.decisions.exact("wild") == HIGH
    reached = result.report().reached
    assert reached == pytest.approx(_error(result.model, model), rel=1e-3)
    assert json.loads(json.dumps(result.report().to_dict()))["layers"][0]["decision"] == "int8"
    assert "calm" in str(result.report()) and "2.00x" in str(result.report())
    assert "1 int8" in repr(result) and len(repr(result)) < 250
    again = torch.compile(model, backend="fxopt", options={"precision": result.decisions, "calibration": result.calibration})
    with torch.no_grad():
        assert torch.equal(again(_loader()[0]), result.model(_loader()[0]))


def test_fitted_channels_let_more_layers_keep_the_budget(times: dict[str, float]) -> None:
    model = _Model().eval()
    result = _quantize(model, 0.02, fit=True)
    assert result.calibration.channels("wild") is not None
    assert _chosen(result) == ["calm", "wild"] and _error(result.model, model) <= 0.02


def test_one_search_decides_for_several_budgets(times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `quantize` does for each, without measuring layers again; what a budget has compiled serves the next."""
    model, judged = _Model().eval(), []
    monkeypatch.setattr(search.Loss, "of", lambda self, run: judged.append(run) or self._added(self._trial.error(run)))
    several = search.Search(model, _loader(), precisions=("int8", HIGH), fit=False, progress=False)
    monkeypatch.setattr(search.Trial, "emulated_error", lambda *args: pytest.fail("a layer was tried again"))
    monkeypatch.setattr(several.loss, "emulated", lambda decisions: 0.02 * len(decisions))
    small, large, again = (several.within(budget) for budget in (0.02, 1.0, 0.025))
    assert [_chosen(r) for r in (small, large, again)] == [["calm"], ["calm", "wild"], ["calm"]]
    assert [r.report().budget for r in (small, large, again)] == [0.02, 1.0, 0.025]
    assert again.model is small.model and len(judged) == 2
    rows = {layer.name: layer for layer in small.report().layers}
    assert rows["wild"].why == "beyond the budget"  # which a later budget has not written over


def test_what_is_not_faster_is_refused(times: dict[str, float]) -> None:
    model = _Model().eval()
    times["quantized"] = 1.99  # of 2.0: no more than measuring is off by
    with pytest.warns(UserWarning, match="not faster"):
        result = _quantize(model, 1.0)
    assert result.refused is not None and not _chosen(result) and _error(result.model, model) < 1e-6
    assert "not faster" in repr(result) and "\n" not in repr(result)
    assert "not faster" in str(result.report())


def test_fewer_layers_are_tried_where_all_together_are_not_faster(
    times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a smaller budget has found faster is not refused by a larger one."""
    model = _Model().eval()
    sizes: dict[Any, int] = {}

    def compiled(self: search.Search, chosen: dict[str, str]) -> Any:
        sizes[run := lambda x: model(x)] = len(chosen)
        return run

    def timed(self: search.Search, tried: Any) -> bool:
        tried.seconds = (2.0, 1.0 if sizes[tried.model] == 1 else 3.0)
        return tried.gain > 1.0

    monkeypatch.setattr(search.Search, "_compiled", compiled)
    monkeypatch.setattr(search.Search, "_is_faster", timed)
    several = search.Search(model, _loader(), precisions=("int8", HIGH), fit=False, progress=False)
    monkeypatch.setattr(several.loss, "emulated", lambda decisions: 0.02 * len(decisions))
    whole = several.within(1.0)
    alone, smaller = _chosen(whole), several.within(0.02)
    reasons = [{layer.name: layer.why for layer in each.report().layers}["wild"] for each in (whole, smaller)]
    assert reasons == ["with it, the whole model is not faster", "beyond the budget"]
    assert alone == _chosen(smaller) == _chosen(several.within(1.0)) == ["calm"] and sorted(sizes.values()) == [0, 1, 2]


def test_a_budget_that_no_layer_keeps_is_refused(times: dict[str, float]) -> None:
    with pytest.warns(UserWarning, match=r"within the budget of 1e-06"):
        result = _quantize(_Model().eval(), 1e-6)
    assert result.refused is not None and result.report().reached is None


def test_a_compiled_model_over_the_budget_loses_layers(times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """In eager everything seems to fit; what is compiled tells otherwise."""
    monkeypatch.setattr(search.Loss, "emulated", lambda self, decisions: 1e-3 * len(decisions))
    model = _Model().eval()
    result = _quantize(model, 0.02)
    assert _chosen(result) == ["calm"] and _error(result.model, model) <= 0.02


def test_the_budget_may_be_that_of_a_metric(times: dict[str, float]) -> None:
    model = _Model().eval()
    with torch.no_grad():
        wanted = [model(x) for x in _loader()]

    def metric(run: Any) -> float:
        return 5.0 - sum(float((run(x) - y).norm()) for x, y in zip(_loader(), wanted, strict=True))

    result = _quantize(model, 1e9, metric=metric)
    assert _chosen(result) == ["calm", "wild"] and result.report().measure == "metric's loss"
    reached = result.report().reached
    with torch.no_grad():
        assert reached is not None and reached == pytest.approx(5.0 - metric(result.model), rel=1e-3)
    with pytest.raises(CalibrationError, match="metric returned a str"):
        _quantize(model, 1.0, metric=lambda run: "good")


def test_of_many_layers_those_that_go_first_are_tried(times: dict[str, float]) -> None:
    model = _Model().eval()
    result = _quantize(model, 0.02, trials=1)
    layers = {layer.name: layer for layer in result.report().layers}
    assert (layers["calm"].estimated, layers["wild"].estimated) == ([], ["int8"])
    assert _chosen(result) == ["calm"] and _error(result.model, model) <= 0.02
    assert "~" in str(result.report())


class _Bare(nn.Module):
    """A product whose weight is no module's `weight`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def test_a_bare_parameter_is_a_layer(times: dict[str, float]) -> None:
    result = _quantize(_Bare().eval(), 0.1, fit=True)
    assert _chosen(result) == [""] and "(the model itself)" in str(result.report())


@pytest.mark.parametrize("budget", [-0.1, float("nan"), float("inf"), True, "small"])
def test_a_budget_is_a_number(budget: Any) -> None:
    with pytest.raises(OptionError, match="budget"):
        _quantize(_Model().eval(), budget)


@pytest.mark.parametrize(
    ("precisions", "message"), [(("int9",), "did you mean 'int8'"), ("int8", "several names"), ((HIGH,), "besides 'high'")]
)
def test_precisions_are_known_names(precisions: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fxopt.quantize(_Model().eval(), _loader(), precisions=precisions, progress=False)


@pytest.mark.parametrize("trials", [0, 1.5, True])
def test_trials_are_a_number_of_one_or_more(trials: Any) -> None:
    with pytest.raises(OptionError, match="trials"):
        _quantize(_Model().eval(), 0.1, trials=trials)


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), "1", True])
def test_seconds_are_a_number_above_zero(seconds: Any) -> None:
    with pytest.raises(OptionError, match="seconds for measuring a layer are a number above 0"):
        fxopt.quantize(nn.Linear(4, 4).eval(), [torch.ones(1, 4)], seconds=seconds)


def test_no_batches_and_training_mode_are_errors() -> None:
    with pytest.raises(CalibrationError, match="no batch"):
        fxopt.quantize(_Model().eval(), [], progress=False)
    with pytest.raises(CalibrationError, match="training mode"):
        _quantize(_Model(), 0.1)


def test_layers_are_timed_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = fxopt.calibrate(_Model().eval(), _loader(), progress=False)
    shape = savings.LayerShape(16, 32, 48, True, torch.float32, torch.device("cpu"))
    state = torch.random.get_rng_state()
    times = savings.measured(shape, ["int8", "int4-weight"], calibration, "slow", "fxopt", 0.01)
    assert list(times) == [HIGH, "int8", "int4-weight"] and min(times.values()) > 0.0
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.compiler.reset()


def _pictures() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 48)).eval()


def test_convolutions_are_searched_too(times: dict[str, float]) -> None:
    torch.manual_seed(1)
    data = [torch.randn(4, 16, 8, 8) for _ in range(2)]
    result = fxopt.quantize(_pictures(), data, 0.05, precisions=("int8", HIGH), progress=False, fit=False)
    rows = {layer.name: layer for layer in result.report().layers}
    assert [rows[name].rows for name in ("0", "2", "5")] == [256, 256, 4]
    assert set(_chosen(result)) == {"0", "2"} and result.refused is None


def test_convolutions_are_timed_in_a_chain() -> None:
    model, x = _pictures(), torch.randn(2, 16, 8, 8)
    calibration = fxopt.calibrate(model, [x], progress=False)
    window = Window((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    shape = savings.ConvolutionShape((2, 16, 8, 8), (32, 16, 3, 3), window, True, torch.float32, torch.device("cpu"), False)
    times = savings.measured(shape, ["int8"], calibration, "0", "fxopt", 0.01)
    assert list(times) == [HIGH, "int8"] and min(times.values()) > 0.0
    notes = next(
        found for journal in reversed(RECENT) if (found := [t for topic, t in journal.notes if topic == "precision"])
    )
    assert len(notes) == 2 and all(": int8" in note for note in notes)
    torch.compiler.reset()
