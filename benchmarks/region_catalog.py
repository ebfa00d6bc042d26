"""Regions around single products, convolutions and attentions of nine models, with the models' own shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import region_layers as layers
from benchmarks.models import with_statistics
from benchmarks.workload import Sizes, Values
from fxopt.report.cases import Case, Tensors

Make = Callable[[Sizes], nn.Module]
Inputs = Callable[[Sizes, Values], Tensors]

GEMV, PLAIN, ATTENTION, CONVOLUTION = "gemv", "plain", "attention", "convolution"
"""What a region is judged by besides its peers: the bandwidth of a copy (one row), or eager's product alone."""


@dataclass(frozen=True)
class Region:
    """`make(sizes)` is the module on the default device, `inputs(sizes, values)` its arguments in inference.

    Images are channels-last. `kind` is one of the constants above, or "" for products with something around them.
    """

    model: str
    part: str
    make: Make
    inputs: Inputs
    full: Mapping[str, int]
    tiny: Mapping[str, int]
    kind: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}/{self.part}"

    @property
    def weighted(self) -> bool:
        """Whether it has weights, which freezing is about."""
        with torch.device("meta"):
            return any(True for _ in self.make(dict(self.tiny)).parameters())

    def build(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
        """The same values at each call."""
        torch.manual_seed(0)
        with torch.device(device):
            module = _settled(self.make(sizes))
        inputs = self.inputs(sizes, Values(device, dtype))
        module = module.to(dtype).eval().requires_grad_(False)
        if self.kind == CONVOLUTION:
            module = module.to(memory_format=torch.channels_last)
            inputs = tuple(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs)
        return Case(module, inputs)


def _settled(module: nn.Module) -> nn.Module:
    """`module` with norms like a trained network's: factors of one and summands of zero hide what is wrong with them."""
    for norm in module.modules():
        if isinstance(norm, (nn.LayerNorm, nn.GroupNorm, layers.RmsNorm)):
            with torch.no_grad():
                norm.weight.uniform_(0.75, 1.25)
                if (bias := getattr(norm, "bias", None)) is not None:
                    bias.normal_(0.0, 0.1)
    return with_statistics(module)


def _tokens(width: str = "width") -> Inputs:
    """One tensor [batch, tokens, width]."""
    return lambda s, values: (values(s["batch"], s["tokens"], s[width]),)


def _two(width: str, residual: str = "width") -> Inputs:
    """What is projected, and the residual."""
    return lambda s, values: (
        values(s["batch"], s["tokens"], s[width]),
        values(s["batch"], s["tokens"], s[residual]),
    )


def _image(channels: str = "channels", *more: tuple[str, int]) -> Inputs:
    """An image of `channels`, and others, each with its channels and how many times larger its sides are."""

    def inputs(s: Sizes, values: Values) -> Tensors:
        side = s["side"]
        others = (values(s["batch"], s[name], side * times, side * times) for name, times in more)
        return (values(s["batch"], s[channels], side, side), *others)

    return inputs


def _heads(values: Values, batch: int, heads: int, tokens: int, width: int) -> Tensor:
    """[batch, heads, tokens, width] as a view of rows, as projections leave it."""
    return values(batch, tokens, heads, width).transpose(1, 2)


def _own_heads(s: Sizes, values: Values) -> Tensors:
    """Queries, keys and values of the same tokens."""
    q = _heads(values, s["batch"], s["heads"], s["tokens"], s["head"])
    kv_heads = s.get("kv_heads", s["heads"])
    return q, *(_heads(values, s["batch"], kv_heads, s["tokens"], s["head"]) for _ in "kv")


def _resnet() -> Iterator[Region]:
    def conv(part: str, full: Sizes, tiny: Sizes, make: Make, inputs: Inputs) -> Region:
        return Region("resnet50", part, make, inputs, full, tiny, CONVOLUTION)

    def plain(s: Sizes) -> nn.Module:
        return layers.NormedConv(s["channels"], s["out"], s["window"], s["stride"])

    yield conv(
        "stem",
        {"batch": 64, "channels": 3, "side": 224, "out": 64},
        {"batch": 2, "channels": 3, "side": 16, "out": 8},
        lambda s: nn.Sequential(layers.NormedConv(s["channels"], s["out"], 7, 2), nn.MaxPool2d(3, 2, 1)),
        _image(),
    )
    small = {"batch": 2, "channels": 8, "side": 6, "out": 8}
    for batch, channels, side, out, window, stride in (
        (64, 256, 56, 64, 1, 1),
        (64, 64, 56, 64, 3, 1),
        (64, 128, 56, 128, 3, 2),
        (64, 256, 14, 256, 3, 1),
        (64, 512, 7, 512, 3, 1),
        (1, 256, 14, 256, 3, 1),
    ):
        sizes = {"batch": batch, "channels": channels, "side": side, "out": out, "window": window, "stride": stride}
        part = f"conv{window}x{window}-{side}{'-strided' if stride > 1 else ''}{'-b1' if batch == 1 else ''}"
        yield conv(part, sizes, {**small, "window": window, "stride": stride}, plain, _image())
    for batch, side, inner in ((64, 56, 64), (64, 14, 256), (64, 7, 512), (1, 14, 256)):
        sizes = {"batch": batch, "channels": inner, "side": side, "out": 4 * inner}
        yield conv(
            f"expand-add-{side}{'-b1' if batch == 1 else ''}",
            sizes,
            {**small, "out": 32},
            lambda s: layers.NormedConv(s["channels"], s["out"]),
            _image("channels", ("out", 1)),
        )
    yield conv(
        "shortcut-28",
        {"batch": 64, "channels": 128, "side": 28, "out": 512, "outer": 256},
        {**small, "out": 32, "outer": 16},
        lambda s: layers.Downsampled(s["channels"], s["out"], s["outer"]),
        _image("channels", ("outer", 2)),
    )
    yield conv(
        "head",
        {"batch": 64, "channels": 2048, "side": 7, "out": 1000},
        small,
        lambda s: layers.PooledHead(s["channels"], s["out"]),
        _image(),
    )


def _convnext() -> Iterator[Region]:
    def conv(part: str, channels: int, side: int, make: Make, inputs: Inputs, more: Mapping[str, int] = {}) -> Region:
        full = {"batch": 32, "channels": channels, "side": side, **more}
        tiny = {"batch": 2, "channels": min(channels, 8), "side": 8, **dict.fromkeys(more, 16)}
        return Region("convnext-t", part, make, inputs, full, tiny, CONVOLUTION)

    yield conv(
        "stem",
        3,
        224,
        lambda s: layers.Chain(nn.Conv2d(s["channels"], s["out"], 4, 4), layers.ChannelNorm(s["out"])),
        _image(),
        {"out": 96},
    )
    for channels, side in ((96, 56), (384, 14), (768, 7)):
        yield conv(f"depthwise-up-{side}", channels, side, lambda s: layers.DepthwiseUp(s["channels"]), _image())
    for channels, side in ((96, 56), (384, 14)):

        def inputs(s: Sizes, values: Values) -> Tensors:
            batch, side, channels = s["batch"], s["side"], s["channels"]
            image = values(batch, channels, side, side)
            return values(batch, side, side, 4 * channels), image.contiguous(memory_format=torch.channels_last)

        # Not of kind "convolution": the wide tensor is rows of channels already.
        full = {"batch": 32, "channels": channels, "side": side}
        tiny = {"batch": 2, "channels": 8, "side": 4}
        yield Region("convnext-t", f"down-{side}", lambda s: layers.ScaledDown(s["channels"]), inputs, full, tiny)
    yield conv(
        "downsample-56",
        96,
        56,
        lambda s: layers.Chain(layers.ChannelNorm(s["channels"]), nn.Conv2d(s["channels"], 2 * s["channels"], 2, 2)),
        _image(),
    )


_ENCODER = {"width": 768, "hidden": 3072, "heads": 12, "head": 64}
_TINY = {"batch": 2, "tokens": 8, "width": 32, "hidden": 64, "heads": 2, "head": 16, "out": 24}


def _up(s: Sizes) -> nn.Module:
    return layers.Chain(nn.Linear(s["width"], s["hidden"]), F.gelu)


def _vit() -> Iterator[Region]:
    full = {**_ENCODER, "batch": 64, "tokens": 197}

    def region(part: str, make: Make, inputs: Inputs, kind: str = "", more: Mapping[str, int] = full) -> Region:
        return Region("vit-b", part, make, inputs, more, _TINY, kind)

    def down(s: Sizes) -> nn.Module:
        return layers.AddProjected(nn.Linear(s["hidden"], s["width"]), nn.LayerNorm(s["width"]))

    yield Region(
        "vit-b",
        "patch-embedding",
        lambda s: layers.PatchEmbedding(s["out"], s["patch"], s["side"]),
        _image(),
        {"batch": 64, "channels": 3, "side": 224, "patch": 16, "out": 768},
        {"batch": 2, "channels": 3, "side": 16, "patch": 4, "out": 16},
        CONVOLUTION,
    )
    yield region("qkv", lambda s: layers.Heads(s["width"], s["head"], s["heads"], norm=nn.LayerNorm(s["width"])), _tokens())
    yield region("attention", lambda s: layers.Attention(), _own_heads, ATTENTION)
    yield region(
        "attention-out",
        lambda s: layers.AddProjected(nn.Linear(s["width"], s["width"]), nn.LayerNorm(s["width"])),
        _two("width"),
    )
    yield region("up", _up, _tokens())
    yield region("down", down, _two("hidden"))
    yield region("up-b1", _up, _tokens(), more={**full, "batch": 1})
    yield region("down-b1", down, _two("hidden"), more={**full, "batch": 1})
    yield region(
        "head",
        lambda s: layers.FirstToken(nn.LayerNorm(s["width"]), nn.Linear(s["width"], s["out"])),
        _tokens(),
        more={**full, "out": 1000},
    )


def _bert() -> Iterator[Region]:
    full = {**_ENCODER, "batch": 32, "tokens": 128, "out": 30522}

    def region(part: str, make: Make, inputs: Inputs, kind: str = "", more: Mapping[str, int] = full) -> Region:
        return Region("bert-base", part, make, inputs, more, _TINY, kind)

    def padded(s: Sizes, values: Values) -> Tensors:
        lengths = 1 + torch.arange(s["batch"], device=values.device) % s["tokens"]
        mask = torch.arange(s["tokens"], device=values.device) < lengths[:, None]
        return *_own_heads(s, values), mask[:, None, None, :].expand(-1, 1, s["tokens"], -1)

    def post(projection: Callable[[Sizes], nn.Module]) -> Make:
        return lambda s: layers.AddProjected(projection(s), nn.LayerNorm(s["width"]), post=True)

    down = post(lambda s: nn.Linear(s["hidden"], s["width"]))
    yield region("qkv", lambda s: layers.Heads(s["width"], s["head"], s["heads"]), _tokens())
    yield region("attention", lambda s: layers.Attention(), padded, ATTENTION)
    yield region("attention-out", post(lambda s: nn.Linear(s["width"], s["width"])), _two("width"))
    yield region("up", _up, _tokens())
    yield region("down", down, _two("hidden"))
    yield region("up-b1", _up, _tokens(), more={**full, "batch": 1})
    yield region("down-b1", down, _two("hidden"), more={**full, "batch": 1})
    yield region("pooler", lambda s: layers.FirstToken(nn.Linear(s["width"], s["width"]), torch.tanh), _tokens())
    yield region("head", lambda s: layers.MaskedLmHead(s["width"], s["out"]), _tokens())


def _gpt2() -> Iterator[Region]:
    full = {**_ENCODER, "batch": 8, "tokens": 512, "out": 50257}
    step = {**full, "batch": 1, "tokens": 1}

    def region(part: str, make: Make, inputs: Inputs, kind: str = "", more: Mapping[str, int] = full) -> Region:
        tiny = {**_TINY, "batch": 1, "tokens": 1} if more is step else _TINY
        return Region("gpt2", part, make, inputs, more, tiny, kind)

    def qkv(s: Sizes) -> nn.Module:
        return layers.MergedHeads(layers.Conv1D(s["width"], 3 * s["width"]), s["head"], nn.LayerNorm(s["width"]))

    def up(s: Sizes) -> nn.Module:
        return layers.Chain(layers.Conv1D(s["width"], s["hidden"]), layers.gelu_new)

    def down(s: Sizes) -> nn.Module:
        return layers.AddProjected(layers.Conv1D(s["hidden"], s["width"]), nn.LayerNorm(s["width"]))

    def head(s: Sizes) -> nn.Module:
        return nn.Linear(s["width"], s["out"], bias=False)

    yield region("qkv", qkv, _tokens())
    yield region("attention", lambda s: layers.Attention(causal=True), _own_heads, ATTENTION)
    yield region("up", up, _tokens())
    yield region("down", down, _two("hidden"))
    yield region("head", head, _tokens(), PLAIN)
    yield region("qkv-decode", qkv, _tokens(), GEMV, step)
    yield region("up-decode", up, _tokens(), GEMV, step)
    yield region("down-decode", down, _two("hidden"), GEMV, step)
    yield region("head-decode", head, _tokens(), GEMV, step)


def _llama() -> Iterator[Region]:
    full = {"width": 4096, "hidden": 14336, "heads": 32, "kv_heads": 8, "head": 128, "out": 128256}
    small = {**_TINY, "kv_heads": 1, "cached": 16}

    def heads(s: Sizes) -> nn.Module:
        norm = layers.RmsNorm(s["width"])
        return layers.RotaryHeads(s["width"], s["head"], s["heads"], s["kv_heads"], biases="", norm=norm)

    def rotated(s: Sizes, values: Values) -> Tensors:
        angles = torch.rand(1, s["tokens"], s["head"] // 2, generator=values.generator, device=values.device) * 6.28
        angles = torch.cat((angles, angles), dim=-1)
        return values(s["batch"], s["tokens"], s["width"]), angles.cos().to(values.dtype), angles.sin().to(values.dtype)

    def cached(s: Sizes, values: Values) -> Tensors:
        """One query for a cache that three quarters of its places are in use of."""
        keys, entries = (values(s["batch"], s["kv_heads"], s["cached"], s["head"]) for _ in "kv")
        places = torch.arange(s["cached"], device=values.device) < s["cached"] * 3 // 4
        mask = places.expand(s["batch"], 1, s["tokens"], -1)
        return _heads(values, s["batch"], s["heads"], s["tokens"], s["head"]), keys, entries, mask

    for label, batch, tokens in (("prefill", 1, 2048), ("decode1", 1, 1), ("decode8", 8, 1), ("decode64", 64, 1)):
        sizes = {**full, "batch": batch, "tokens": tokens}
        decoding = tokens == 1
        linear = GEMV if decoding and batch == 1 else ""

        def region(
            part: str,
            make: Make,
            inputs: Inputs,
            kind: str,
            more: Mapping[str, int] = sizes,
            label: str = label,
            decoding: bool = decoding,
        ) -> Region:
            tiny = {**small, "batch": min(more["batch"], 2), "tokens": 1 if decoding else 8}
            return Region("llama-8b", f"{part}-{label}", make, inputs, more, tiny, kind)

        yield region("qkv", heads, rotated, linear)
        if decoding:
            yield region("attention", lambda s: layers.Attention(), cached, ATTENTION, {**sizes, "cached": 2048})
        else:
            yield region("attention", lambda s: layers.Attention(causal=True), _own_heads, ATTENTION)
        yield region(
            "attention-out",
            lambda s: layers.AddProjected(nn.Linear(s["width"], s["width"], bias=False), layers.RmsNorm(s["width"])),
            _two("width"),
            linear,
        )
        yield region("swiglu", lambda s: layers.Gated(s["width"], s["hidden"], F.silu), _tokens(), linear)
        yield region(
            "down",
            lambda s: layers.AddProjected(nn.Linear(s["hidden"], s["width"], bias=False)),
            _two("hidden"),
            linear,
        )
        # In a prefill only the last token's words are wanted; the plain product that is of that size is a layer's.
        out = {**sizes, "out": full["out"] if decoding else full["width"]}
        yield region(
            "head" if decoding else "plain",
            lambda s: nn.Linear(s["width"], s["out"], bias=False),
            _tokens(),
            linear or PLAIN,
            out,
        )


def _t5() -> Iterator[Region]:
    full = {"batch": 8, "tokens": 512, "width": 768, "hidden": 2048, "heads": 12, "head": 64, "out": 32128, "target": 128}
    small = {**_TINY, "target": 4}

    def region(part: str, make: Make, inputs: Inputs, kind: str = "") -> Region:
        return Region("t5-base", part, make, inputs, full, small, kind)

    def bucketed(s: Sizes, values: Values) -> Tensors:
        places = torch.arange(s["tokens"], device=values.device)
        return *_own_heads(s, values), (places[None, :] - places[:, None]).clamp(-16, 15) + 16

    def crossed(s: Sizes, values: Values) -> Tensors:
        q = _heads(values, s["batch"], s["heads"], s["target"], s["head"])
        return q, *(_heads(values, s["batch"], s["heads"], s["tokens"], s["head"]) for _ in "kv")

    yield region(
        "qkv",
        lambda s: layers.Heads(s["width"], s["head"], s["heads"], biases="", norm=layers.RmsNorm(s["width"])),
        _tokens(),
    )
    yield region("attention", lambda s: layers.BiasedAttention(s["heads"], 32), bucketed, ATTENTION)
    yield region("cross-attention", lambda s: layers.Attention(scale=1.0), crossed, ATTENTION)
    yield region(
        "geglu",
        lambda s: layers.Gated(s["width"], s["hidden"], layers.gelu_new, layers.RmsNorm(s["width"])),
        _tokens(),
    )
    yield region("down", lambda s: layers.AddProjected(nn.Linear(s["hidden"], s["width"], bias=False)), _two("hidden"))
    yield region(
        "head",
        lambda s: layers.Chain(layers.RmsNorm(s["width"]), nn.Linear(s["width"], s["out"], bias=False)),
        _tokens(),
    )


def _whisper() -> Iterator[Region]:
    full = {"batch": 8, "tokens": 1500, "width": 1280, "hidden": 5120, "heads": 20, "head": 64, "out": 51866}
    audio = {"batch": 8, "frames": 3000, "bins": 128, "width": 1280}
    few = {"batch": 2, "frames": 12, "bins": 4, "width": 16}

    def region(part: str, make: Make, inputs: Inputs, kind: str = "", more: Mapping[str, int] = full) -> Region:
        return Region("whisper-large", part, make, inputs, more, _TINY, kind)

    def asked(s: Sizes, values: Values) -> Tensors:
        q = _heads(values, s["batch"], s["heads"], 1, s["head"])
        return q, *(_heads(values, s["batch"], s["heads"], s["tokens"], s["head"]).contiguous() for _ in "kv")

    yield Region(
        "whisper-large",
        "stem-1",
        lambda s: layers.Chain(nn.Conv1d(s["bins"], s["width"], 3, padding=1), F.gelu),
        lambda s, values: (values(s["batch"], s["bins"], s["frames"]),),
        audio,
        few,
        CONVOLUTION,
    )
    yield Region(
        "whisper-large",
        "stem-2",
        lambda s: layers.AudioStem(s["width"], s["frames"]),
        lambda s, values: (values(s["batch"], s["width"], s["frames"]),),
        audio,
        few,
        CONVOLUTION,
    )
    yield region(
        "qkv",
        lambda s: layers.Heads(s["width"], s["head"], s["heads"], biases="qv", norm=nn.LayerNorm(s["width"])),
        _tokens(),
    )
    yield region("attention", lambda s: layers.Attention(), _own_heads, ATTENTION)
    yield region("up", _up, _tokens())
    yield region(
        "down",
        lambda s: layers.AddProjected(nn.Linear(s["hidden"], s["width"]), nn.LayerNorm(s["width"])),
        _two("hidden"),
    )
    yield region("cross-attention-decode", lambda s: layers.Attention(), asked, ATTENTION)
    yield region(
        "head-decode",
        lambda s: layers.Chain(nn.LayerNorm(s["width"]), nn.Linear(s["width"], s["out"], bias=False)),
        _tokens(),
        more={**full, "tokens": 1},
    )


def _unet() -> Iterator[Region]:
    """SDXL's at 1024 pixels: latents of 128 x 128, two images (with and without guidance)."""
    tiny = {"batch": 2, "channels": 8, "out": 16, "side": 4, "groups": 4, "time": 12, "outer": 12}
    words = {"words": 77, "context": 2048}
    few = {**_TINY, "words": 5, "context": 12}

    def image(part: str, make: Make, inputs: Inputs, **full: int) -> Region:
        return Region("sdxl-unet", part, make, inputs, {"batch": 2, "groups": 32, **full}, tiny, CONVOLUTION)

    def text(part: str, make: Make, inputs: Inputs, kind: str = "", width: int = 640, tokens: int = 4096) -> Region:
        full = {"batch": 2, "tokens": tokens, "width": width, "hidden": 4 * width, "head": 64, **words}
        return Region("sdxl-unet", f"{part}-{width}", make, inputs, full, few, kind)

    def timed(s: Sizes, values: Values) -> Tensors:
        return values(s["batch"], s["channels"], s["side"], s["side"]), values(s["batch"], s["time"])

    def worded(s: Sizes, values: Values) -> Tensors:
        return values(s["batch"], s["tokens"], s["width"]), values(s["batch"], s["words"], s["context"])

    def time_conv(s: Sizes) -> nn.Module:
        return layers.TimedConv(s["channels"], s["out"], s["groups"], s["time"])

    def residual(s: Sizes) -> nn.Module:
        return layers.ResidualConv(s["channels"], s["groups"], s["outer"])

    yield image(
        "norm-silu-conv-128",
        lambda s: layers.NormSiluConv(s["channels"], s["out"], s["groups"]),
        _image(),
        channels=320,
        out=320,
        side=128,
    )
    yield image("timed-conv-64", time_conv, timed, channels=320, out=640, side=64, time=1280)
    yield image("timed-conv-32", time_conv, timed, channels=1280, out=1280, side=32, time=1280)
    yield image("residual-64", residual, _image("channels", ("outer", 1)), channels=640, outer=320, side=64)
    yield image("residual-32", residual, _image("channels", ("outer", 1)), channels=1280, outer=1280, side=32)
    yield image(
        "skipped-conv-64",
        lambda s: layers.SkippedConv(s["channels"] + s["outer"], s["out"], s["groups"]),
        _image("channels", ("outer", 1)),
        channels=1280,
        outer=640,
        out=640,
        side=64,
    )
    yield image(
        "downsample-128", lambda s: nn.Conv2d(s["channels"], s["channels"], 3, 2, 1), _image(), channels=320, side=128
    )
    yield image("upsample-32", lambda s: layers.Upsampled(s["channels"]), _image(), channels=1280, side=32)
    yield image("image-tokens-64", lambda s: layers.ImageTokens(s["channels"], s["groups"]), _image(), channels=640, side=64)
    yield image(
        "out-128",
        lambda s: layers.NormSiluConv(s["channels"], s["out"], s["groups"]),
        _image(),
        channels=320,
        out=4,
        side=128,
    )
    yield text("self-attention", lambda s: layers.ProjectedAttention(s["width"], s["head"]), _tokens(), ATTENTION)
    yield text(
        "cross-attention",
        lambda s: layers.ProjectedAttention(s["width"], s["head"], s["context"]),
        worded,
        ATTENTION,
    )
    for width, tokens in ((640, 4096), (1280, 1024)):
        yield text("geglu", lambda s: layers.Geglu(s["width"], s["hidden"]), _tokens(), width=width, tokens=tokens)
        yield text(
            "down",
            lambda s: layers.AddProjected(nn.Linear(s["hidden"], s["width"])),
            _two("hidden"),
            width=width,
            tokens=tokens,
        )
    yield Region(
        "sdxl-unet",
        "time-embedding",
        lambda s: nn.Sequential(nn.Linear(s["channels"], s["time"]), nn.SiLU(), nn.Linear(s["time"], s["time"])),
        lambda s, values: (values(s["batch"], s["channels"]),),
        {"batch": 2, "channels": 320, "time": 1280},
        {"batch": 2, "channels": 8, "time": 12},
    )


MODELS = (_resnet, _convnext, _vit, _bert, _gpt2, _llama, _t5, _whisper, _unet)
REGIONS = tuple(region for model in MODELS for region in model())
