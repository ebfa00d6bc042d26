"""Models in plain torch, small: one of each kind that people build, written the way they are usually written."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """Convolutions, max pooling, bilinear and transposed upsampling, skips by concatenation (arXiv:1505.04597)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.one, self.two, self.three = self._double(3, width), self._double(width, 2 * width), self._double(2 * width, 16)
        self.up = nn.ConvTranspose2d(16, 2 * width, 2, stride=2)
        self.four, self.five = self._double(4 * width, 2 * width), self._double(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _double(inside: int, outside: int) -> nn.Module:
        first = [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]
        return nn.Sequential(*first, nn.Conv2d(outside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        three = self.three(F.max_pool2d(two, 2))
        four = self.four(torch.cat([self.up(three), two], 1))
        wide = F.interpolate(four, scale_factor=2, mode="bilinear", align_corners=True)
        return self.head(self.five(torch.cat([wide, one], 1)))


class MBConv(nn.Module):
    """EfficientNet's inverted bottleneck with squeeze and excitation (arXiv:1905.11946)."""

    def __init__(self, channels: int, expand: int = 4) -> None:
        super().__init__()
        inner = channels * expand
        self.expand = nn.Sequential(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.SiLU())
        depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(inner), nn.SiLU())
        self.squeeze, self.excite = nn.Conv2d(inner, channels, 1), nn.Conv2d(channels, inner, 1)
        self.project = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        gate = self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.project(y * gate)


class EfficientNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Hardswish()]
        self.body = nn.Sequential(*stem, MBConv(8), MBConv(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.head(self.body(x))
        return logits if labels is None else F.cross_entropy(logits, labels, label_smoothing=0.1)


class ShuffleDense(nn.Module):
    """Grouped convolutions with a channel shuffle (arXiv:1707.01083), then a dense block (arXiv:1608.06993)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * k) for k in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * k, 4, 3, padding=1) for k in range(3))
        self.transition = nn.Sequential(nn.Conv2d(20, 10, 1), nn.AvgPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.channel_shuffle(self.grouped(self.stem(x)).relu(), 4)
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.transition(torch.cat(features, 1))


class WaveNet(nn.Module):
    """Causal dilated convolutions with gated activations, residual and skip paths (arXiv:1609.03499)."""

    def __init__(self, width: int = 8, layers: int = 4) -> None:
        super().__init__()
        self.inlet = nn.Conv1d(1, width, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**k) for k in range(layers))
        self.residual = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(width, width, 1), nn.ReLU(), nn.Conv1d(width, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.inlet(x), 0
        for dilated, residual, skip in zip(self.dilated, self.residual, self.skips, strict=True):
            filtered, gate = dilated(F.pad(x, (dilated.dilation[0], 0))).chunk(2, 1)
            y = filtered.tanh() * gate.sigmoid()
            total, x = total + skip(y), x + residual(y)
        return self.head(total).log_softmax(1)


class VAE(nn.Module):
    """Encoder, reparameterised sample, decoder; returns reconstruction and divergence (arXiv:1312.6114)."""

    def __init__(self, size: int = 24, latent: int = 4) -> None:
        super().__init__()
        self.encoder, self.mean, self.log_var = nn.Linear(size, 16), nn.Linear(16, latent), nn.Linear(16, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, 16), nn.ELU(), nn.Linear(16, size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.softplus(self.encoder(x))
        mean, log_var = self.mean(hidden), self.log_var(hidden)
        sample = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        divergence = -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).sum(1).mean()
        return F.binary_cross_entropy_with_logits(self.decoder(sample), x, reduction="sum"), divergence


class Generator(nn.Module):
    """DCGAN's generator (arXiv:1511.06434) with a discriminator's score, spectral norm left out."""

    def __init__(self) -> None:
        super().__init__()
        up = [nn.ConvTranspose2d(6, 12, 4), nn.BatchNorm2d(12), nn.ReLU(True)]
        self.generate = nn.Sequential(*up, nn.ConvTranspose2d(12, 3, 4, 2, 1), nn.Tanh())
        down = [nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.InstanceNorm2d(8, affine=True)]
        self.judge = nn.Sequential(*down, nn.Conv2d(8, 1, 4), nn.Flatten())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        image = self.generate(z[:, :, None, None])
        return image, F.softplus(-self.judge(image)).mean()


class Mixer(nn.Module):
    """MLP-Mixer (arXiv:2105.01601)."""

    def __init__(self, patches: int = 16, width: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.tokens = nn.ModuleList(self._mlp(patches, 8) for _ in range(2))
        self.channels = nn.ModuleList(self._mlp(width, 24) for _ in range(2))
        self.head = nn.Linear(width, 5)

    @staticmethod
    def _mlp(size: int, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for k in range(2):
            x = x + self.tokens[k](self.norms[2 * k](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.channels[k](self.norms[2 * k + 1](x))
        return self.head(x.mean(1))


class Nerf(nn.Module):
    """Positional encoding, an MLP with a skip, and volume rendering by cumulative products (arXiv:2003.08934)."""

    def __init__(self, bands: int = 3, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(bands))
        size = 3 * (2 * bands + 1)
        self.one, self.two, self.three = nn.Linear(size, width), nn.Linear(width + size, width), nn.Linear(width, 4)

    def forward(self, points: Tensor, depths: Tensor) -> Tensor:
        angles = points[..., None] * self.frequencies
        code = torch.cat([points, angles.sin().flatten(-2), angles.cos().flatten(-2)], -1)
        hidden = self.two(torch.cat([self.one(code).relu(), code], -1)).relu()
        raw = self.three(hidden)
        color, density = raw[..., :3].sigmoid(), raw[..., 3].relu()
        steps = torch.cat([depths.diff(dim=-1), torch.full_like(depths[..., :1], 1e3)], -1)
        alpha = 1 - (-density * steps).exp()
        clear = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha + 1e-6], -1), -1)[..., :-1]
        return ((alpha * clear)[..., None] * color).sum(-2)


class GCN(nn.Module):
    """Graph convolution by index_add, then attention over edges by scatter_reduce (arXiv:1609.02907, 1710.10903)."""

    def __init__(self, features: int = 6, width: int = 8) -> None:
        super().__init__()
        self.one, self.two, self.score = nn.Linear(features, width), nn.Linear(width, width), nn.Linear(2 * width, 1)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        nodes = x.shape[0]
        degree = x.new_zeros(nodes).scatter_add(0, target, torch.ones_like(target, dtype=x.dtype))
        norm = degree.clamp(min=1).rsqrt()
        messages = self.one(x)[source] * (norm[source] * norm[target])[:, None]
        x = x.new_zeros(nodes, messages.shape[1]).index_add(0, target, messages).relu()
        x = self.two(x)
        logits = F.leaky_relu(self.score(torch.cat([x[source], x[target]], 1)).squeeze(1), 0.2)
        top = x.new_full((nodes,), -1e4).scatter_reduce(0, target, logits.detach(), "amax")
        weights = (logits - top[target]).exp()
        total = x.new_zeros(nodes).index_add(0, target, weights)
        attended = x[source] * (weights / total[target])[:, None]
        return torch.zeros_like(x).index_add_(0, target, attended)


class DLRM(nn.Module):
    """Bags of embeddings, pairwise dot products of features, MLPs (arXiv:1906.00091)."""

    def __init__(self, width: int = 8, tables: int = 3) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(20, width, mode="sum") for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + tables * (tables + 1) // 2, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        x = self.bottom(dense)
        features = torch.stack([x, *(bag(indices[k], offsets[k]) for k, bag in enumerate(self.bags))], 1)
        pairs = torch.bmm(features, features.transpose(1, 2))
        rows, columns = torch.tril_indices(features.shape[1], features.shape[1], -1)
        return self.top(torch.cat([x, pairs[:, rows, columns]], 1)).sigmoid()


class Scan(nn.Module):
    """A diagonal state space by cumulative sums of logarithms, as linear-recurrence models are written without kernels."""

    def __init__(self, width: int = 8, state: int = 4) -> None:
        super().__init__()
        self.inlet, self.step, self.mix = nn.Linear(width, 2 * width), nn.Linear(width, width), nn.Linear(width, 2 * state)
        self.log_a = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(width, 1))
        self.conv, self.out = nn.Conv1d(width, width, 3, groups=width, padding=2), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.inlet(x).chunk(2, -1)
        y = F.silu(self.conv(y.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, (b, c) = F.softplus(self.step(y)), self.mix(y).chunk(2, -1)
        decay = torch.cumsum(-step[..., None] * self.log_a.exp(), 1)
        driven = (step * y)[..., None] * b[:, :, None]
        states = decay.exp() * torch.cumsum((-decay).exp() * driven, 1)
        return self.out((states * c[:, :, None]).sum(-1) * F.silu(gate))


class MoE(nn.Module):
    """Top-2 routing over experts: one dense dispatch by one-hot products, one sparse by sorting and gathering."""

    def __init__(self, width: int = 8, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, 12) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(experts, 12, width) / math.sqrt(12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.router(x).softmax(-1)
        weights, chosen = probabilities.topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        mask = F.one_hot(chosen, probabilities.shape[-1]).to(x.dtype)
        combine = (weights[..., None] * mask).sum(1)
        dense = torch.einsum("neh,ehw,ne->nw", F.silu(torch.einsum("nw,ewh->neh", x, self.up)), self.down, combine)
        order = chosen.flatten().argsort(stable=True)
        token, expert = order // 2, chosen.flatten()[order]
        hidden = F.silu(torch.bmm(x[token][:, None], self.up[expert]))
        rows = torch.bmm(hidden, self.down[expert])[:, 0] * weights.flatten()[order, None]
        sparse = torch.zeros_like(x).index_put((token,), rows, accumulate=True)
        balance = (mask.sum(1).mean(0) * probabilities.mean(0)).sum()
        return dense + sparse, balance


class DiffusionBlock(nn.Module):
    """A residual block with a time embedding, then spatial self-attention (as in latent diffusion, arXiv:2112.10752)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(4, channels) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.time = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, channels))
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        rates = torch.exp(-math.log(1e4) * torch.arange(8, dtype=x.dtype, device=x.device) / 8)
        angles = steps[:, None].to(x.dtype) * rates
        time = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        y = self.conv1(F.silu(self.norm1(x))) + time[:, :, None, None]
        x = x + self.conv2(F.silu(self.norm2(y)))
        batch, channels, high, wide = x.shape
        q, k, v = self.qkv(self.norm3(x)).view(batch, 3, 2, channels // 2, high * wide).transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(batch, channels, high, wide)
        return F.interpolate(x + self.out(mixed), scale_factor=2, mode="nearest")


class Recurrent(nn.Module):
    """An embedding, two LSTM layers in both directions and a GRU."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(2 * width, width, batch_first=True)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states, last = self.gru(self.lstm(self.embed(tokens))[0])
        return states.amax(1), last


class HandCell(nn.Module):
    """An LSTM written by hand and unrolled, with layer norm on its gates."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width, self.gates, self.norm = width, nn.Linear(2 * width, 4 * width), nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], self.width)
        states = []
        for t in range(6):
            i, f, g, o = self.norm(self.gates(torch.cat([x[:, t], h], 1))).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        return torch.stack(states, 1)


class Seq2Seq(nn.Module):
    """nn.Transformer with masks and label-smoothed loss.

    Told that the mask is causal, it is one graph; else it looks at the mask's values, where Dynamo breaks.
    """

    def __init__(self, width: int = 16, words: int = 20, norm_first: bool = False, told: bool = True) -> None:
        super().__init__()
        self.told = told or None
        self.source, self.target = nn.Embedding(words, width), nn.Embedding(words, width)
        settings = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True, "norm_first": norm_first}
        self.body, self.head = nn.Transformer(width, 2, 2, 2, **settings), nn.Linear(width, words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1] - 1, dtype=self.head.weight.dtype)
        given = self.target(target[:, :-1])
        masks = {"tgt_mask": mask, "tgt_is_causal": self.told, "src_key_padding_mask": source == 0}
        y = self.body(self.source(source), given, **masks)
        return F.cross_entropy(self.head(y).flatten(0, 1), target[:, 1:].flatten(), label_smoothing=0.1, ignore_index=0)


class Encoder(nn.Module):
    """nn.TransformerEncoder, whose fast path eager takes without gradients."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, is_causal=False).mean(1)


class PointNet(nn.Module):
    """Shared MLPs over points, distances, k nearest neighbours and maxima (arXiv:1706.02413's ingredients)."""

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8))
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, points: Tensor) -> Tensor:
        near = torch.cdist(points, points).topk(4, largest=False).indices
        batch = torch.arange(points.shape[0], device=points.device)[:, None, None]
        neighbours = points[batch, near]
        centre = points[:, :, None].expand_as(neighbours)
        features = self.edge(torch.cat([centre, neighbours - centre], -1)).amax(2)
        return self.head(self.norm(features.transpose(1, 2)).amax(-1))


class Contrastive(nn.Module):
    """Two towers, normalised, a temperature, symmetric InfoNCE (arXiv:2103.00020)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(10, 6), nn.Sequential(nn.Linear(7, 12), nn.Mish(), nn.Linear(12, 6))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one, two = F.normalize(self.one(x), dim=-1), F.normalize(self.two(y), dim=-1)
        logits = self.scale.exp() * one @ two.t()
        labels = torch.arange(x.shape[0], device=x.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


class Conv3D(nn.Module):
    """A video network: 3-D convolutions and pooling, weight normalisation, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act = nn.utils.parametrizations.weight_norm(nn.Conv3d(2, 4, 3, padding=1)), nn.PReLU(4)
        self.pool, self.norm, self.two = nn.MaxPool3d(2), nn.BatchNorm3d(4), nn.Conv3d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.norm(self.pool(self.act(self.one(x))))).flatten(2).std(-1)


class Spectral(nn.Module):
    """A Fourier neural operator's layer (arXiv:2010.08895): complex numbers, so mostly library calls."""

    def __init__(self, width: int = 4, kept: int = 5) -> None:
        super().__init__()
        self.kept, self.lift, self.local = kept, nn.Linear(1, width), nn.Conv1d(width, width, 1)
        self.weight = nn.Parameter(torch.randn(width, width, kept, 2) / width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x[..., None]).transpose(1, 2)
        modes = torch.fft.rfft(x)
        low = torch.einsum("bik,iok->bok", modes[..., : self.kept], torch.view_as_complex(self.weight))
        high = torch.zeros_like(modes[..., self.kept :])
        return F.gelu(torch.fft.irfft(torch.cat([low, high], -1), n=x.shape[-1]) + self.local(x))
