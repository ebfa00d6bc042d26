"""The fast path of torch's encoder layers, taken apart: values, names of layers, and what is left to the operator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxopt
from fxopt.journal import RECENT, Journal
from fxopt.passes.context import DefaultOptions
from fxopt.passes.encoder_layer import SPELLINGS
from fxopt.passes.pipeline import run_early
from tests.numerics import assert_closer, check_compiled, to_float64

BATCH, LENGTH, WIDTH, HEADS = 3, 7, 16, 2
PADDING = torch.arange(LENGTH) >= torch.tensor([[7], [4], [1]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)

NAMES = ["self_attn", "self_attn#1", "linear1", "linear2"]
"""What layers of one encoder layer are called."""


def layer(**settings: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    made = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True, **settings).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def encoder(**settings: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(**settings), 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False).eval()


def sequences(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def attention_calls(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[fx.Node]:
    """The calls of attention in `fn`'s graph after the early passes, which leave no layer whole and change no value."""
    found: list[fx.Node] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        run_early(gm, DefaultOptions(), Journal("test"))
        gm.recompile()
        assert not SPELLINGS & {node.target for node in gm.graph.nodes}
        found.extend(gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention))
        return gm.forward

    torch.compiler.reset()
    got = torch.compile(fn, backend=backend, fullgraph=True)(*args, **kwargs)
    torch.testing.assert_close(got, fn(*args, **kwargs), equal_nan=True)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"norm_first": True, "activation": "gelu", "layer_norm_eps": 1e-2}])
def test_values(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    model = encoder(**settings).to(dtype)
    for inputs in (sequences(dtype), sequences(dtype)[:, :0], sequences(dtype).transpose(0, 1)):
        got = check_compiled(model, inputs)
        assert got.stride() == model(inputs).stride()


FLOATS = itertools.product(("padding", "causal", "told causal", "both", "heads", "boolean"), (torch.float32,))


@pytest.mark.parametrize(("masks", "dtype"), [*FLOATS, ("padding", torch.bfloat16), ("both", torch.bfloat16)])
def test_masks(masks: str, dtype: torch.dtype) -> None:
    causal, padding = CAUSAL.to(dtype), torch.zeros(BATCH, LENGTH, dtype=dtype).masked_fill(PADDING, -math.inf)
    given: dict[str, Any] = {
        "padding": {"src_key_padding_mask": PADDING},
        "causal": {"mask": causal, "is_causal": False},
        "told causal": {"mask": causal, "is_causal": True},
        "both": {"mask": causal, "src_key_padding_mask": padding, "is_causal": False},
        "heads": {"mask": causal.expand(BATCH * HEADS, -1, -1).clone(), "is_causal": False},
        "boolean": {"mask": CAUSAL.isinf(), "src_key_padding_mask": PADDING, "is_causal": False},
    }[masks]
    model, x = encoder().to(dtype), sequences(dtype)
    torch.compiler.reset()
    got = torch.compile(model, backend="fxopt", options={"strict": True})(x, **given)
    assert_closer(got, model(x, **given), model.double()(x.double(), **to_float64(given)))
    assert not any("_transformer_encoder_layer_fwd" in op for journal in RECENT for op, _ in journal.library)


def test_what_is_not_zero_hides_and_rows_without_keys_are_nan() -> None:
    """As the operator has it, and not the slow path."""
    padding, added = PADDING.clone(), torch.zeros(LENGTH, LENGTH)
    padding[0] = True
    added[2, :3] = torch.tensor([0.5, math.nan, 1e-30])
    assert len(attention_calls(layer(), sequences(), src_key_padding_mask=padding)) == 1
    assert len(attention_calls(layer(), sequences(), src_mask=added)) == 1


def test_a_causal_mask_made_in_the_graph_is_no_mask() -> None:
    model = layer()

    def call(x: Tensor) -> Any:
        return model(x, src_mask=torch.full((LENGTH, LENGTH), -math.inf).triu(1))

    (attention,) = attention_calls(call, sequences())
    assert attention.kwargs["attn_mask"] is None and attention.kwargs["is_causal"] is True


def test_masks_made_in_the_graph_of_sequences_without_elements() -> None:
    """Of what follows from sizes alone, no row has a key to see or not."""
    model = layer()

    def call(x: Tensor) -> Any:
        length = x.shape[1]
        return model(x, src_mask=torch.full((length, length), -math.inf).triu(1))

    assert len(attention_calls(call, sequences()[:, :0])) == 1


def operator_of(model: nn.TransformerEncoderLayer, x: Tensor, *mask: Any) -> Tensor:
    """The operator, called with the weights of `model`."""
    attention, norms, linears = model.self_attn, (model.norm1, model.norm2), (model.linear1, model.linear2)
    given = [attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias]
    pairs = [t for module in (*norms, *linears) for t in (module.weight, module.bias)]
    return torch._transformer_encoder_layer_fwd(x, WIDTH, HEADS, *given, True, False, 1e-5, *pairs, *mask)


def test_a_sum_of_masks_that_is_written_to() -> None:
    model = layer(activation="gelu")

    def call(x: Tensor, hidden: Tensor) -> Tensor:
        mask = torch.zeros(LENGTH, LENGTH) + hidden.expand(LENGTH, LENGTH)
        mask.fill_diagonal_(0.0)
        return operator_of(model, x, mask, 0)

    hidden = torch.zeros(1, LENGTH).masked_fill(torch.arange(LENGTH) > 3, -math.inf)
    assert len(attention_calls(call, sequences(), hidden)) == 1


def test_masks_are_not_repeated_for_each_head() -> None:
    padding = torch.zeros(BATCH, LENGTH).masked_fill(PADDING, -math.inf)
    for masks, batch in (({"src_mask": CAUSAL}, 1), ({"src_mask": CAUSAL, "src_key_padding_mask": padding}, BATCH)):
        (attention,) = attention_calls(layer(), sequences(), **masks)
        assert attention.kwargs["attn_mask"].meta["example_value"].shape == (batch, 1, LENGTH, LENGTH)


@pytest.mark.parametrize("make", [encoder, layer])
def test_dynamic_sizes(make: Callable[[], nn.Module]) -> None:
    """Of a layer that is compiled by itself, the width and the epsilon of its norms are symbols too."""
    model = make()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="fxopt", dynamic=True, options={"strict": True})
    for batch, length in itertools.product((2, 5), (3, 9)):
        x, padding = torch.randn(batch, length, WIDTH), torch.zeros(batch, length, dtype=torch.bool)
        padding[0, 2:] = True
        exact = to_float64(model)(x.double(), src_key_padding_mask=padding)
        assert_closer(compiled(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding), exact)


def test_frozen_layers_where_gradients_are_recorded() -> None:
    model = layer().requires_grad_(False)
    with torch.enable_grad():
        assert len(attention_calls(model, sequences())) == 1


def test_what_is_left_to_the_operator() -> None:
    model = layer(activation="gelu")

    def call(x: Tensor) -> Tensor:
        nested = torch.nested.as_nested_tensor([x[0], x[1, :4]])
        return operator_of(model, nested).to_padded_tensor(0.0)

    x = sequences()
    torch.compiler.reset()
    RECENT.clear()
    torch.testing.assert_close(torch.compile(call, backend="fxopt")(x), call(x))


def test_switched_off() -> None:
    for options in ({"disable": ["encoder_layer"]}, {"fuel": 1}):
        RECENT.clear()
        torch.compiler.reset()
        torch.compile(encoder(), backend="fxopt", options=options)(sequences())
        left = [what for journal in RECENT for what, _ in journal.retreats]
        assert len(left) == (2 if "disable" in options else 1)


def test_layers_have_the_names_of_the_slow_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loader = encoder(), [sequences()]
    names = fxopt.calibrate(model, loader, progress=False).names()
    assert names == [f"layers.{number}.{name}" for number in range(2) for name in NAMES]
    assert fxopt.calibrate(layer(), loader, progress=False).names() == NAMES
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    assert fxopt.calibrate(model, loader, progress=False).names() == names
