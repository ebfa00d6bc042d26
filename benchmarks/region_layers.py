"""What stands around one product, convolution or attention in well-known models, each as a small module.

Spelled as in transformers, torchvision and diffusers, so that what a compiler finds here it finds there. Activations are
[batch, tokens, width] or [batch, channels, height, width], heads are [batch, heads, tokens, width of a head].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]
Norm = Callable[[int], nn.Module]


def gelu_new(x: Tensor) -> Tensor:
    """GPT-2's and T5's GELU: the approximation by tanh, written out."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _statistics(x: Tensor) -> Tensor:
    """`x` in float32, in which half precision's statistics are computed; other dtypes as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class RmsNorm(nn.Module):
    """Llama's and T5's, with the weight after the cast."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = _statistics(x)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class ChannelNorm(nn.Module):
    """ConvNeXt's layer norm over the channels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is [in, out]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(width, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], self.weight.shape[1])


class Chain(nn.Sequential):
    """Modules and functions one after the other."""

    def __init__(self, *steps: nn.Module | Activation) -> None:
        super().__init__(*(step if isinstance(step, nn.Module) else _Function(step) for step in steps))


class _Function(nn.Module):
    def __init__(self, function: Activation) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class AddProjected(nn.Module):
    """The end of a sublayer: x is projected and added to the residual, and both the sum and its norm go on (pre-norm), or
    the norm alone (post-norm)."""

    def __init__(self, projection: nn.Module, norm: nn.Module | None = None, post: bool = False) -> None:
        super().__init__()
        self.projection, self.norm, self.post = projection, norm, post

    def forward(self, x: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        total = residual + self.projection(x)
        if self.norm is None:
            return total
        return self.norm(total) if self.post else (self.norm(total), total)


class Heads(nn.Module):
    """Queries, keys and values of x, each split into heads. `biases` says which of the three have one."""

    def __init__(
        self, width: int, head: int, heads: int, kv_heads: int = 0, biases: str = "qkv", norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.norm, self.head, kv_heads = norm or nn.Identity(), head, kv_heads or heads
        self.q = nn.Linear(width, heads * head, bias="q" in biases)
        self.k = nn.Linear(width, kv_heads * head, bias="k" in biases)
        self.v = nn.Linear(width, kv_heads * head, bias="v" in biases)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.norm(x)
        q, k, v = (layer(x).view(*x.shape[:2], -1, self.head).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return q, k, v


class RotaryHeads(Heads):
    """Llama's: queries and keys are turned by their positions. cos and sin are [1, tokens, head]."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v = super().forward(x)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin, v


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class MergedHeads(nn.Module):
    """Queries, keys and values by one product of `projection`, split along the columns."""

    def __init__(self, projection: nn.Module, head: int, norm: nn.Module) -> None:
        super().__init__()
        self.projection, self.head, self.norm = projection, head, norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.projection(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (part.view(*x.shape[:2], -1, self.head).transpose(1, 2) for part in parts)
        return q, k, v


class Gated(nn.Module):
    """activation(gate(x)) * up(x), after a norm where there is one."""

    def __init__(self, width: int, hidden: int, activation: Activation, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.activation, self.norm = activation, norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.activation(self.gate(x)) * self.up(x)


class Geglu(nn.Module):
    """Diffusers' GEGLU: one product whose second half of columns is the gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(width), nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(self.norm(x)).chunk(2, dim=-1)
        return value * F.gelu(gate)


def _merged(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).reshape(heads.shape[0], heads.shape[2], -1)


class Attention(nn.Module):
    """Fused attention, and the heads side by side again. `mask` is what `scaled_dot_product_attention` takes."""

    def __init__(self, causal: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.causal, self.scale = causal, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        if grouped and mask is not None:  # transformers repeats heads wherever there is a mask
            k, v = (_repeated(t, q.shape[1] // t.shape[1]) for t in (k, v))
            grouped = False
        return _merged(
            F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, scale=self.scale, enable_gqa=grouped)
        )


def _repeated(heads: Tensor, times: int) -> Tensor:
    batch, count, tokens, width = heads.shape
    return heads[:, :, None].expand(batch, count, times, tokens, width).reshape(batch, count * times, tokens, width)


class BiasedAttention(nn.Module):
    """T5's, written out: scores are not scaled, and each head learns a bias by the bucket of the distance."""

    def __init__(self, heads: int, buckets: int) -> None:
        super().__init__()
        self.bias = nn.Embedding(buckets, heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, buckets: Tensor) -> Tensor:
        """`buckets` [tokens of q, tokens of k], int64."""
        scores = torch.matmul(q, k.transpose(3, 2)) + self.bias(buckets).permute(2, 0, 1).unsqueeze(0)
        return _merged(torch.matmul(F.softmax(_statistics(scores), dim=-1).type_as(scores), v))


class ProjectedAttention(nn.Module):
    """Diffusers' attention of an image's tokens to `context` (or themselves), projections and residual included."""

    def __init__(self, width: int, head: int, context: int | None = None) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), head
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(context or width, width, bias=False)
        self.v = nn.Linear(context or width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        source = normed if context is None else context
        q, k, v = (
            layer(tensor).view(x.shape[0], -1, x.shape[-1] // self.head, self.head).transpose(1, 2)
            for layer, tensor in ((self.q, normed), (self.k, source), (self.v, source))
        )
        return self.out(_merged(F.scaled_dot_product_attention(q, k, v))) + x


class MaskedLmHead(nn.Module):
    """BERT's: a layer with GELU and norm, then the vocabulary."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.decoder = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(x))))


class FirstToken(nn.Module):
    """A layer on the first token alone: poolers and classifiers."""

    def __init__(self, *steps: nn.Module | Activation) -> None:
        super().__init__()
        self.steps = Chain(*steps)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x[:, 0])


class NormedConv(nn.Module):
    """torchvision's convolution, batch norm, and a relu, before which a residual may be added."""

    def __init__(self, channels: int, out: int, window: int = 1, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, window, stride, window // 2, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(out), relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(self.conv(x))
        y = y if residual is None else y + residual
        return F.relu(y) if self.relu else y


class Downsampled(nn.Module):
    """The end of a stage's first bottleneck: the shortcut has a strided convolution and a norm of its own."""

    def __init__(self, inner: int, out: int, outer: int) -> None:
        super().__init__()
        self.last, self.shortcut = NormedConv(inner, out), NormedConv(outer, out, stride=2, relu=False)

    def forward(self, x: Tensor, block_input: Tensor) -> Tensor:
        return self.last(x, self.shortcut(block_input))


class PooledHead(nn.Module):
    """Global average pooling and a classifier."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class DepthwiseUp(nn.Module):
    """The first half of ConvNeXt's block: depthwise convolution, layer norm, wider layer, GELU.

    The result is channels-last.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.up = nn.LayerNorm(channels), nn.Linear(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.up(self.norm(self.conv(x).permute(0, 2, 3, 1))))


class ScaledDown(nn.Module):
    """The second half: narrower layer, a learned factor for each channel, back to channels first, the residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.gamma = nn.Linear(4 * channels, channels), nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + (self.gamma * self.down(x)).permute(0, 3, 1, 2)


class PatchEmbedding(nn.Module):
    """ViT's: patches by a convolution, a class token in front, positions added."""

    def __init__(self, width: int, patch: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv(x).flatten(2).transpose(1, 2)
        return torch.cat((self.first.expand(x.shape[0], -1, -1), patches), dim=1) + self.positions


class AudioStem(nn.Module):
    """Whisper's second convolution over time, which halves it: GELU, positions, tokens first."""

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, 2, 1)
        self.positions = nn.Parameter(torch.randn(frames // 2, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.conv(x)).permute(0, 2, 1) + self.positions


class NormSiluConv(nn.Module):
    """Half of diffusers' residual block: group norm, SiLU, convolution."""

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(groups, channels), nn.Conv2d(channels, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


class TimedConv(NormSiluConv):
    """The first half, to which the timestep's embedding is added."""

    def __init__(self, channels: int, out: int, groups: int, embedding: int) -> None:
        super().__init__(channels, out, groups)
        self.time = nn.Linear(embedding, out)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + self.time(F.silu(embedding))[:, :, None, None]


class ResidualConv(NormSiluConv):
    """The second half with the block's residual, which a 1x1 convolution fits to other channels."""

    def __init__(self, channels: int, groups: int, outer: int) -> None:
        super().__init__(channels, channels, groups)
        self.shortcut = nn.Identity() if outer == channels else nn.Conv2d(outer, channels, 1)

    def forward(self, x: Tensor, block_input: Tensor) -> Tensor:  # type: ignore[override]
        return self.shortcut(block_input) + super().forward(x)


class SkippedConv(NormSiluConv):
    """The first half in the upward path, after the skip connection."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat((x, skip), dim=1))


class Upsampled(nn.Module):
    """Nearest-neighbour upsampling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ImageTokens(nn.Module):
    """The entry of diffusers' transformers: group norm, pixels as tokens, a layer."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.GroupNorm(groups, channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])
        return self.proj(tokens)
