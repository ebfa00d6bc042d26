"""PP-OCRv6's small reader of text lines: a trained network of convolutions and two layers of attention, and lines to read.

The weights are those of the PyPI package `rapidocr` (an ONNX file), of whose characters those are kept that the lines are
written in; the lines are Python's own documentation, drawn by Pillow.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEIGHT, WIDTH = 48, 320
"""Of an image of a line."""

LETTERS = "".join(map(chr, range(33, 127))) + " "
_HEADS, _INNER = 8, 120

# (channels, stride, whether a squeeze and excitation follows the depthwise convolution)
_BLOCKS: tuple[tuple[int, tuple[int, int], bool], ...] = (
    (96, (1, 1), True),
    *[(96, (1, 1), False)] * 2,
    (192, (2, 1), False),
    *[(192, (1, 1), at % 2 == 0) for at in range(6)],
    (384, (2, 1), False),
    (384, (1, 1), True),
    (384, (1, 1), False),
)


class Stem(nn.Module):
    """Images [N, 3, H, W] -> [N, 96, H / 4, W / 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 48, 3, 2, 1)
        self.narrow, self.wide = nn.Conv2d(48, 24, 2), nn.Conv2d(24, 48, 2)
        self.joined, self.last = nn.Conv2d(96, 48, 3, 2, 1), nn.Conv2d(48, 96, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        after = F.relu(self.wide(_padded(F.relu(self.narrow(_padded(x))))))
        # After a relu zeros are as good as nothing beyond the edge.
        x = torch.cat([F.max_pool2d(_padded(x), 2, 1), after], 1)
        return F.relu(self.last(F.relu(self.joined(x))))


def _padded(x: Tensor) -> Tensor:
    """A row and a column more, so that a window of 2 x 2 has as many places as the image."""
    return F.pad(x, (0, 1, 0, 1))


class Excitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class ConvBlock(nn.Module):
    def __init__(self, given: int, channels: int, stride: tuple[int, int], excites: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(given, given, 3, stride, 1, groups=given)
        self.excitation = Excitation(given) if excites else nn.Identity()
        self.up, self.down = nn.Conv2d(given, 2 * given, 1), nn.Conv2d(2 * given, channels, 1)
        self.adds = stride == (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.excitation(self.depthwise(x))
        result: Tensor = self.down(F.gelu(self.up(x)))
        return x + result if self.adds else result


class Normed(nn.Module):
    """A convolution, its norm and SiLU."""

    def __init__(self, *sizes: Any, **settings: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(*sizes, bias=False, **settings), nn.BatchNorm2d(_INNER)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class Layer(nn.Module):
    """Of a transformer: [N, T, 120] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_hidden = nn.LayerNorm(_INNER), nn.LayerNorm(_INNER)
        self.qkv, self.out = nn.Linear(_INNER, 3 * _INNER), nn.Linear(_INNER, _INNER)
        self.up, self.down = nn.Linear(_INNER, 2 * _INNER), nn.Linear(2 * _INNER, _INNER)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.before_attention(x)).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(F.silu(self.up(self.before_hidden(x))))
        return result


class TextReader(nn.Module):
    """Images of lines [N, 3, 48, W], -1 to 1 -> logits [N, W / 8, 1 + len(LETTERS)] of letters, the first of none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        given = [96, *(channels for channels, _, _ in _BLOCKS)]
        self.blocks = nn.Sequential(*(ConvBlock(before, *block) for before, block in zip(given, _BLOCKS, strict=False)))
        self.aside, self.narrow = Normed(384, _INNER, 1), Normed(384, _INNER, 1)
        self.along = Normed(_INNER, _INNER, (1, 7), padding=(0, 3), groups=_INNER)
        self.layers, self.norm = nn.Sequential(Layer(), Layer()), nn.LayerNorm(_INNER, eps=1e-6)
        self.head = nn.Linear(_INNER, 1 + len(LETTERS))

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.blocks(self.stem(x)), (3, 2))
        aside, narrow = self.aside(x), self.narrow(x)
        read = self.norm(self.layers((narrow + self.along(narrow)).flatten(2).transpose(1, 2)))
        logits: Tensor = self.head(read + aside.flatten(2).transpose(1, 2))
        return logits


def trained(path: Path) -> TextReader:
    """The reader with the weights of rapidocr's file, of whose characters it keeps LETTERS. Raises ValueError for another
    network."""
    import onnx
    from onnx import numpy_helper

    file = onnx.load(path)
    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in file.graph.initializer}
    characters = next(p.value for p in file.metadata_props if p.key == "character").split("\n")
    kept = torch.tensor([0, *(1 + (characters.index(c) if c != " " else len(characters)) for c in LETTERS)])
    model = TextReader().eval()
    given = _parameters_in_order(file.graph, arrays)
    with torch.no_grad():
        for own, found in zip(own_in_order(model), given, strict=True):
            found = found[kept] if len(found) == 2 + len(characters) else found
            own.copy_(found.reshape(own.shape))
    return model


def own_in_order(model: TextReader) -> Iterator[Tensor]:
    """The model's tensors in the order in which a call reads them."""
    modules = [*model.stem.modules(), *model.blocks.modules(), *model.aside.modules(), *model.narrow.modules()]
    modules += model.along.modules()
    for layer in model.layers:
        assert isinstance(layer, Layer)
        modules += [layer.before_attention, layer.qkv, layer.out, layer.before_hidden, layer.up, layer.down]
    for module in (*modules, model.norm, model.head):
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            yield from (module.weight, module.bias, module.running_mean, module.running_var)
        elif isinstance(module, nn.Conv2d | nn.Linear | nn.LayerNorm):
            yield module.weight
            if module.bias is not None:
                yield module.bias


def _parameters_in_order(graph: Any, arrays: dict[str, Tensor]) -> Iterator[Tensor]:
    """What the nodes of an ONNX graph read of `arrays` with more than one element, weights of products as [out, in]."""
    for node in graph.node:
        if node.op_type in ("Conv", "BatchNormalization", "Add", "Mul", "MatMul"):
            found = (arrays[name] for name in node.input if name in arrays and arrays[name].is_floating_point())
            yield from (x.t() if node.op_type == "MatMul" else x for x in found if x.numel() > 1)


# Lines to read.


def drawn(text: str, seed: int) -> Tensor:
    """An image [48, 320] of `text`, uint8: dark on light or the other way round, of any size that fits, with noise."""
    import numpy
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    rng = random.Random(seed)
    font = ImageFont.load_default(rng.choice((22, 26, 30)))
    dark, light = rng.randint(0, 90), rng.randint(150, 255)
    page = Image.new("L", (WIDTH, HEIGHT), light)
    ImageDraw.Draw(page).text((4, HEIGHT // 2), text, fill=dark, font=font, anchor="lm")
    page = page.rotate(rng.uniform(-1.5, 1.5), fillcolor=light).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.4)))
    noise = numpy.random.default_rng(seed).normal(0.0, 12.0, (HEIGHT, WIDTH))
    pixels = (numpy.asarray(page) + noise).clip(0, 255).astype(numpy.uint8)
    return torch.from_numpy(255 - pixels if rng.random() < 0.5 else pixels)


def lines(count: int) -> list[str]:
    """Short lines of Python's documentation, evenly spaced among all."""
    from pydoc_data.topics import topics

    found = (" ".join(line.split()) for name in sorted(topics) for line in topics[name].splitlines())
    short = [line for line in dict.fromkeys(found) if 12 <= len(line) <= 22 and set(line) <= set(LETTERS)]
    return [short[at * len(short) // count] for at in range(count)]


def as_input(pixels: Tensor) -> Tensor:
    """Images uint8 [N, 48, W] as the reader takes them."""
    return (pixels.float() / 127.5 - 1.0)[:, None].expand(-1, 3, -1, -1).contiguous()


def read(logits: Tensor) -> list[str]:
    """The likeliest letters, each run of equal ones once (CTC)."""
    texts = []
    for row in logits.argmax(-1).tolist():
        runs = [at for k, at in enumerate(row) if k == 0 or row[k - 1] != at]
        texts.append("".join(LETTERS[at - 1] for at in runs if at))
    return texts


def letters_right(found: Sequence[str], wanted: Sequence[str]) -> float:
    """1 less the edits for each letter that make `wanted` of `found`."""
    edits = sum(_distance(a, b) for a, b in zip(found, wanted, strict=True))
    return 1.0 - edits / sum(map(len, wanted))


def _distance(a: str, b: str) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


def package_file() -> Path | None:
    """Rapidocr's file of the reader, where that is installed."""
    found = importlib.util.find_spec("rapidocr")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "models" / "PP-OCRv6_rec_small.onnx"
