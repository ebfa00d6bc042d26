"""fxopt.calibrate on small models: what it finds, what it refuses, and that the compiled model speaks of the same layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt import journal
from fxopt.errors import CalibrationError, OptionError
from fxopt.ir.observer_ops import BINS, MOST_COUNTED, exponent_histogram
from fxopt.quant.calibrate import calibrate
from fxopt.quant.table import NEVER, ZERO, Calibration


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(journal, "_told", set())
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    """A module that is called twice, one with two products of its own, and what they are given, noted in eager."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.head = nn.Linear(16, 16), nn.Linear(16, 32, bias=False)
        self.left, self.right = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(torch.tanh(self.twice(x)))
        return self.head(F.linear(F.linear(h, self.right), self.left)[..., :16])

    def operands(self, x: Tensor) -> dict[str, Tensor]:
        first = torch.tanh(self.twice(x))
        second = self.twice(first)
        third = F.linear(second, self.right)
        fourth = F.linear(third, self.left)[..., :16]
        return {"twice": x, "twice#1": first, "": second, "#1": third, "head": fourth}


def batches(count: int = 3, *shape: int) -> list[Tensor]:
    return [torch.randn(shape or (2, 5, 16)) for _ in range(count)]


def quiet(model: nn.Module, loader: Any, **options: Any) -> Calibration:
    return calibrate(model, loader, progress=False, **options)


def test_what_layers_are_given_over_all_batches() -> None:
    model, data = Block().eval(), batches()
    found = quiet(model, data)
    assert found.names() == ["twice", "twice#1", "", "#1", "head"] and found.batches == 3
    with torch.no_grad():
        eager = [model.operands(x) for x in data]
    for layer in found.layers:
        wanted = torch.cat([e[layer.name].reshape(-1, 16) for e in eager])
        assert layer.seen is not None and layer.elements == wanted.numel()
        torch.testing.assert_close(layer.seen.minimum, wanted.amin(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.seen.maximum, wanted.amax(0), rtol=1e-5, atol=1e-5)
        assert (layer.seen.histogram - exponent_histogram(wanted)).abs().sum() <= wanted.numel() // 50  # rounding near edges
    first = found["twice"].seen
    assert first is not None
    assert torch.equal(first.histogram, exponent_histogram(torch.cat(data)))


def test_parts_merge_to_what_one_pass_finds(tmp_path: Path) -> None:
    model, data = Block().eval(), batches(4)
    whole = quiet(model, data)
    parts = [quiet(model, data[:1]), quiet(model, data[1:])]
    assert Calibration.merge(*reversed(parts)).digest() == whole.digest() == quiet(model, iter(data)).digest()


def test_compiled_layers_are_those_of_the_calibration() -> None:
    """With another number of rows, too; the table is right for each layer, so that none warns."""
    model, data = Block().eval(), batches()
    found = quiet(model, data)
    x = torch.randn(3, 4, 16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        explained = fxopt.explain(model, x, fxopt_options={"precision": "int8", "calibration": found})
        got = torch.compile(model, backend="fxopt", options={"precision": "int8", "calibration": found})(x)
        want = model(x)
    told = [text.partition(":")[0] for j in explained.graphs for topic, text in j.notes if topic == "precision"]
    assert told == found.names()
    assert (got - want).norm() < 0.1 * want.norm()


class Broken(nn.Module):
    """Two graphs, which share a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        torch._dynamo.graph_break()
        return self.a(y)


def test_graphs_of_one_model_share_the_table(tmp_path: Path) -> None:
    model, data = Broken().eval(), batches()
    found = quiet(model, data)
    assert found.names() == ["a", "b"]
    assert found["a"].elements == 2 * found["b"].elements
    found.save(tmp_path / "t.fxcal")
    with torch.no_grad():
        options = {"precision": {"a": "int8"}, "calibration": tmp_path / "t.fxcal"}
        explained = fxopt.explain(model, data[0], fxopt_options=options)
    notes = [text.partition(",")[0] for j in explained.graphs for topic, text in j.notes if topic == "precision"]
    assert notes == ["a: int8", "a: int8"]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_batches_are_tensors_tuples_or_mappings(wrap: Any) -> None:
    model, data = Broken().eval(), batches(2)
    assert quiet(model, [wrap(x) for x in data]).names() == ["a", "b"]


def test_forward_and_the_number_of_batches() -> None:
    model, data = Broken().eval(), batches(3)
    found = quiet(model, ((x, "label") for x in data), batches=2, forward=lambda m, batch: m(batch[0]))
    assert found.batches == 2 and found["b"].elements == 2 * data[0].numel()


def test_quantizing_without_data() -> None:
    model, x = Block().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        want = model(x)
        for precision in ("int8", "fp8"):
            torch.compiler.reset()
            got = torch.compile(model, backend="fxopt", options={"precision": precision}, dynamic=True)(x)
            assert (got - want).norm() < 0.15 * want.norm()


# ---------------------------------------------------------------------- what cannot be used


def test_a_model_in_training_mode() -> None:
    model = Block().eval()
    model.head.train()
    with pytest.raises(CalibrationError, match=r"module 'head' .* call model.eval\(\) first"):
        quiet(model, batches())
    with pytest.raises(CalibrationError, match="takes a module"):
        quiet(F.relu, batches())  # type: ignore[arg-type]


@pytest.mark.parametrize("calibrated", [False, True])
def test_batches_that_do_not_fit_the_model(calibrated: bool) -> None:
    """Pairs of data and labels, above all: the message names the batch and says what `forward` is for."""
    model, data = Block().eval(), batches(2)
    pairs = [*((x,) for x in data), (data[0], torch.tensor([1, 2]))]
    known = quiet(model, data) if calibrated else None

    def run(loader: Any, **options: Any) -> Any:
        if known is None:
            return quiet(model, loader, **options)
        return fxopt.activation_aware(known, model, loader, "int8", batches=9, **options)

    described = r"batch 2 of the loader, a tuple of 2 \(Tensor, Tensor\), does not fit"
    with pytest.raises(CalibrationError, match=described) as raised:
        run(pairs)
    assert "too many positional arguments; forward takes (x)" in str(raised.value) and "forward=lambda" in str(raised.value)
    with pytest.raises(CalibrationError, match=r"a dict with 'x', 'y', does not fit.*: model\(batch\['x'\]\)"):
        run([{"x": data[0], "y": data[1]}])
    assert run(pairs, forward=lambda model, batch: model(batch[0])).names()


def test_a_number_of_batches_may_be_numpys() -> None:
    assert quiet(Block().eval(), batches(3), batches=np.int64(2)).batches == 2


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_a_number_of_batches_is_one_or_more(count: Any) -> None:
    with pytest.raises(OptionError, match="a number of batches is an integer of 1 or more, not"):
        quiet(Block().eval(), batches(1), batches=count)


def test_functions_of_tables_say_what_they_take() -> None:
    model, data = Block().eval(), batches(1)
    known = quiet(model, data)
    with pytest.raises(CalibrationError, match=r"fxopt\.smoothed takes a module, not a list"):
        fxopt.smoothed(known, data, 0.5)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"fxopt\.bias_corrected takes a module, not a list"):
        fxopt.bias_corrected(known, data, model, "int8")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"no precision 'int4' in few bits; did you mean 'int4-weight'\?; there are fp8, "):
        fxopt.clipped(known, model, "int4")
    with pytest.raises(OptionError, match="no precision 'high' in few bits"):
        fxopt.activation_aware(known, model, data, "high")
    with pytest.raises(OptionError, match="no precision"):
        fxopt.clipped(known, model, ["int8"])  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a number of batches is"):
        fxopt.bias_corrected(known, model, data, "int8", batches=0)


def test_errors_of_the_model_name_the_batch() -> None:
    model, data = Block().eval(), batches(1)
    with pytest.raises(Exception) as raised:
        quiet(model, [*data, torch.randn(2, 5, 3)])
    assert any("batch 1 of the loader, a tensor [2, 5, 3], was given" in note for note in raised.value.__notes__)
    with pytest.raises(KeyError) as raised:
        quiet(model, data, forward=lambda model, batch: {}["input"])
    assert raised.value.__notes__ == ["fxopt: batch 0 of the loader, a tensor [2, 5, 16], was given to `forward`"]
    with pytest.raises(Exception) as raised:
        quiet(model, ["a text"])
    assert any("a str, was given to the model; `forward=`" in note for note in raised.value.__notes__)


def test_an_empty_loader_and_an_unknown_method() -> None:
    with pytest.raises(CalibrationError, match="gave no batch"):
        quiet(Block().eval(), [])
    with pytest.raises(CalibrationError, match="did you mean 'entropy'"):
        quiet(Block().eval(), batches(), method="entropie")


def test_a_model_without_layers() -> None:
    with pytest.raises(CalibrationError, match=r"no layer was observed: torch\.compile captured no product") as raised:
        quiet(nn.Sequential(nn.ReLU()).eval(), batches(1))
    assert "stopped" not in str(raised.value)


def test_where_capture_stopped_is_told() -> None:
    """torch's encoder looks at the values of a mask, unless it is told whether that is causal."""
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    batch = {"src": batches(1)[0], "mask": nn.Transformer.generate_square_subsequent_mask(5)}
    with pytest.raises(CalibrationError, match=r"no layer was observed: .*; it stopped at: .*item"):
        quiet(model, [batch])
    assert len(quiet(model, [batch | {"is_causal": True}]).layers) == 4


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (torch.randn(4, 5, 16), "this one is a tensor itself: put a batch into a list"),
        ({"x": torch.randn(4, 16)}, "this one is a mapping itself"),
        (None, "which type NoneType does not allow"),
        ([torch.randn(0, 16)], "a is not observed: its input is empty"),
    ],
)
def test_what_is_no_loader_of_batches(loader: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        quiet(Broken().eval(), loader)


@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_values_that_are_not_finite_name_layer_and_batch(bad: float, word: str) -> None:
    data = batches(3)
    data[1][0, 0, 3] = bad
    with pytest.raises(CalibrationError, match=f"layer 'a' was given {word} in batch 1"):
        quiet(Broken().eval(), data)


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead, self.never = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.used(x) + self.dead(x * 0.0)
        return self.never(y) if x.shape[0] == 7 else y


def test_layers_without_data_stay_high_and_are_named() -> None:
    model, data = Unreached().eval(), batches()
    data = [x * (torch.arange(16) != 5) for x in data]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = quiet(model, data)
    messages = [str(w.message) for w in told]
    assert any("'never'" in m and NEVER in m for m in messages)
    assert any("'dead'" in m and ZERO in m for m in messages)
    assert any("'used' (1 of 16)" in m and "only zeros" in m for m in messages)
    with torch.no_grad(), pytest.warns(UserWarning, match=f"'never': {NEVER}"):
        explained = fxopt.explain(model, torch.randn(7, 5, 16), fxopt_options={"precision": "int8", "calibration": found})
    notes = [text for j in explained.graphs for topic, text in j.notes if topic == "precision"]
    assert [n.split(":")[0] for n in notes] == ["used", "dead stays high, not int8", "never stays high, not int8"]


def test_another_models_table_is_an_error_of_the_call() -> None:
    found = quiet(Broken().eval(), batches(1))
    other = nn.Sequential(nn.Linear(16, 8)).eval()
    # Dynamo wraps what a backend raises.
    with (
        torch.no_grad(),
        pytest.raises(Exception, match=r"CalibrationError: .* none of this graph's 1 layers; the first is '0'"),
    ):
        torch.compile(other, backend="fxopt", options={"precision": "int8", "calibration": found})(torch.randn(2, 16))


def test_sizes_beyond_torchs_limit_are_not_missed() -> None:
    limited = torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False)
    with limited, pytest.raises(CalibrationError, match="batch 1 was not observed"):
        quiet(Broken().eval(), [torch.randn(rows, 16) for rows in (2, 3, 4)])


# ---------------------------------------------------------------------- the histogram


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_histograms_count_by_exponent_and_three_bits(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -1.1, 1.125, 2.0, float("inf"), float("nan")], dtype=dtype)
    counts = exponent_histogram(x)
    assert counts.shape == (BINS,) and counts.dtype == torch.int64
    one = 127 << 3
    expected = {0: 2, one: 2, one + 1: 1, one + 8: 1, 255 << 3: 1}
    expected[(255 << 3) + 1] = 1
    assert {k: int(counts[k]) for k in expected} == expected and int(counts.sum()) == len(x)
    another = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # the NaN that GPUs make
    assert int(exponent_histogram(another)[(255 << 3) + 1]) == 1
    assert int(exponent_histogram(torch.randn(700, 1000).t()).sum()) == 700_000


def test_histograms_of_much_count_rows_apart_and_both_ends() -> None:
    x = torch.ones(4096, 1024)
    x[1::2] = 2.0  # as tokens of two kinds in turn
    x[5, 7], x[8, 9] = -40.0, 0.5
    counts = exponent_histogram(x)
    one, two = int(counts[127 << 3]), int(counts[128 << 3])
    assert one + two <= MOST_COUNTED and min(one, two) > 0.3 * MOST_COUNTED and abs(one - two) <= 2048
    assert int(counts.nonzero()[-1]) == (132 << 3) + 2  # 40 = 2**5 * 1.25
    for bad, place in ((float("inf"), 255 << 3), (float("nan"), (255 << 3) + 1)):
        x[4095, 1023] = bad
        assert int(exponent_histogram(x)[place]) > 0
