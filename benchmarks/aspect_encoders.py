"""Which text encoder learns most from a few thousand reviews? Kinds of encoder on a held-out part of the training file.

Needs the UIT-ViSFD file ``visfd/Train.csv`` in the folder that the environment variable NEARFAR_DATA names. All kinds
read the same words, share heads, loss (cross-entropy over not mentioned / negative / neutral / positive of each aspect)
and schedule, and are scored on the 15 % of the reviews that are held out, with one fixed threshold. Seeds differ in
initial weights, order and dropout, not in the split. CPU seconds are those of one thread.

    python benchmarks/aspect_encoders.py --seeds 3 --only mark cnn lstm
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.batching.random import LengthBatchSampler
from nearfar.data.batch import ItemDataset, Rows
from nearfar.data.reviews.aspect_data import AspectData, load_files
from nearfar.metrics.aspect_scores import Decision, polarity_weights
from nearfar.metrics.classification import detection_counts, pair_counts
from nearfar.metrics.count_metrics import f1_macro, f1_micro
from nearfar.models.aspects import AspectModel, linear_answers
from nearfar.models.projection import Dropout
from nearfar.models.text.trainable import WordTextEncoder, word_windows
from nearfar.models.text.words import TokenBatch
from nearfar.schedules import learning_rate_factor
from nearfar.towers.text import PooledText

THRESHOLD = 0.42  # an aspect is mentioned from this probability on
TAU = 0.3  # polarities by p / share^τ


class Bag(nn.Module):
    """No order at all: the vectors of the words."""

    def __init__(self, embedding: nn.Module, dims: int) -> None:
        super().__init__()
        self.embedding, self.width = embedding, dims

    def forward(self, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        return _with_mean(self.embedding(tokens), tokens)


class Convolutions(Bag):
    """Windows of several widths beside the words themselves (Kim 2014)."""

    def __init__(
        self, embedding: nn.Module, dims: int, channels: int = 64, widths: Sequence[int] = (1, 2, 3, 5)
    ) -> None:
        super().__init__(embedding, dims)
        self.widths = widths
        self.maps = nn.ModuleList(nn.Linear(width * dims, channels) for width in widths)
        self.width = dims + channels * len(widths)

    def forward(self, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        seen = [F.gelu(layer(word_windows(x, w))) for w, layer in zip(self.widths, self.maps, strict=True)]
        return _with_mean(torch.cat([*seen, x], dim=-1) * tokens.mask[..., None], tokens)


class Transformer(Bag):
    """Two layers of self-attention with learned positions (Vaswani et al. 2017), normalised first."""

    def __init__(
        self, embedding: nn.Module, dims: int, heads: int = 4, layers: int = 2, most: int = 128
    ) -> None:
        super().__init__(embedding, dims)
        self.place = nn.Parameter(torch.randn(most, dims) * 0.1)
        layer = nn.TransformerEncoderLayer(
            dims, heads, 2 * dims, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dims), enable_nested_tensor=False)

    def forward(self, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        x = self.layers(x + self.place[: x.shape[1]], src_key_padding_mask=~tokens.mask)
        return _with_mean(x * tokens.mask[..., None], tokens)


class MeanPooling(nn.Module):
    """In place of an attention for each aspect: the mean over all states, the same for each."""

    def __init__(self, aspects: int) -> None:
        super().__init__()
        self.aspects = aspects

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        mean = states.sum(1) / mask.sum(1, keepdim=True)
        return mean[:, None].expand(-1, self.aspects, -1)


def _with_mean(states: Tensor, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    return states, states.sum(1) / tokens.mask.sum(1, keepdim=True).clamp(min=1)


#: name → what it changes: options of the encoder, or the network over its embedding
KINDS: dict[str, dict[str, Any]] = {
    "mark": {},
    "no first vectors": {"vectors": False},
    "no pieces": {"pieces": None},
    "lstm": {"widths": ()},
    "hidden 128": {"hidden": 128},
    "hidden 256": {"hidden": 256},
    "two lstms": {"layers": 2},
    "cnn": {"network": Convolutions},
    "transformer": {"network": Transformer},
    "bag": {"network": Bag},
    "mean pooling": {"pooled": True},
    "averaged": {"averaged": 0.995},
}


def build(kind: dict[str, Any], data: AspectData) -> tuple[WordTextEncoder, nn.Module]:
    options = {name: value for name, value in kind.items() if name not in ("network", "pooled", "averaged")}
    encoder = WordTextEncoder(**options).fit(data.train.texts("text"))
    network: nn.Module = encoder.build()
    if "network" in kind:
        network = kind["network"](network.embedding, encoder.options["dims"])
    model = AspectModel(PooledText(network), len(data.scheme.aspects), data.scheme.classes, projection_dim=0)
    model.dropout = Dropout(0.4)
    if kind.get("pooled"):
        model.attention = MeanPooling(len(data.scheme.aspects))
    return encoder, model


def fit(
    kind: dict[str, Any], data: AspectData, args: argparse.Namespace, seed: int
) -> tuple[np.ndarray, float]:
    """Probabilities (n, A, C) of the held-out reviews, and CPU seconds of training."""
    torch.manual_seed(seed)
    encoder, model = build(kind, data)
    train, val = (
        ItemDataset({"text": encoder.tokenize(split.texts("text")), "codes": Rows(split.array("codes"))})
        for split in (data.train, data.val)
    )
    sampler = LengthBatchSampler(train.inputs["text"].lengths, args.batch_size, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01, fused=True)
    factor = learning_rate_factor("cosine", warmup=0.1)
    average = copy.deepcopy(model) if "averaged" in kind else model
    start, step, total = time.process_time(), 0, args.epochs * len(sampler)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        model.train()
        for positions in sampler:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * factor(step, total)
            batch = train.__getitems__(positions)
            logits = model.classify(model.encode(batch["text"]))
            loss = F.cross_entropy(
                logits.flatten(0, 1), batch.tensor("codes").flatten(), reduction="sum"
            ) / len(batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            step += 1
            if average is not model:
                keep = min(kind["averaged"], (1 + step) / (10 + step))
                pairs = zip(average.parameters(), model.parameters(), strict=True)
                with torch.no_grad():
                    for kept, new in pairs:
                        kept.lerp_(new, 1 - keep)
    seconds = time.process_time() - start
    average.eval()
    order = np.argsort(val.inputs["text"].lengths, kind="stable")
    probabilities = np.zeros((len(val), len(data.scheme.aspects), data.scheme.classes))
    with torch.inference_mode():
        for first in range(0, len(order), 256):
            rows = order[first : first + 256]
            batch = val.__getitems__(rows)
            probabilities[rows] = average.classify(average.encode(batch["text"])).softmax(-1).double().numpy()
    return probabilities, seconds


def score(data: AspectData, codes: np.ndarray) -> list[float]:
    """In per cent: micro and macro F1 of detection, micro and macro F1 of aspect-polarity pairs."""
    truth, pairs = data.val.array("codes"), data.scheme.pair_array
    counts = [x.sum(axis=0) for x in (detection_counts(truth, codes), pair_counts(truth, codes, pairs))]
    return [100 * float(f1(x)) for x in counts for f1 in (f1_micro, f1_macro)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=["linear", *KINDS], default=["linear", *KINDS])
    parser.add_argument(
        "--val", type=Path, help="another file to score on, in place of a part of the training file"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ["NEARFAR_DATA"]) / "visfd"
    data = load_files({"train": folder / "Train.csv", "val": args.val}, val_fraction=0.15, tune_fraction=0.0)
    print(f"{len(data.train)} reviews to train, {len(data.val)} held out; epochs {args.epochs}, lr {args.lr}")
    print("| encoder | seeds | aspect F1 micro | macro | sentiment F1 micro | macro | τ = 0 | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.only:
        for line in linear_lines(data) if name == "linear" else lines(name, data, args):
            print(line, flush=True)


def linear_lines(data: AspectData) -> Iterator[str]:
    """The linear baseline in one line of the table."""
    start = time.process_time()
    asked = {"val": data.val.texts("text")}
    codes = linear_answers(data.train.texts("text"), data.train.array("codes"), asked, cache=False)["val"]
    yield line("linear", np.array([score(data, codes)]), time.process_time() - start)


def lines(name: str, data: AspectData, args: argparse.Namespace) -> Iterator[str]:
    """One kind over the seeds, and its seeds as one ensemble (their mean probabilities)."""
    counts = np.stack(
        [(data.train.array("codes") == k).sum(axis=0) for k in range(1, data.scheme.classes)], axis=1
    )
    limits = (THRESHOLD,) * len(data.scheme.aspects)
    weights = tuple(map(tuple, np.asarray(polarity_weights(counts, TAU)).tolist()))

    def scores(probabilities: np.ndarray) -> list[float]:
        plain = score(data, Decision("one", limits).codes(probabilities))
        return [*score(data, Decision("one", limits, "", weights).codes(probabilities)), *plain[2:]]

    found = [fit(KINDS[name], data, args, seed) for seed in range(args.seeds)]
    seconds = float(np.mean([seconds for _, seconds in found]))
    yield line(name, np.array([scores(probabilities) for probabilities, _ in found]), seconds)
    if args.seeds > 1:
        together = np.mean([probabilities for probabilities, _ in found], axis=0)
        yield line(f"{name}: the seeds' mean", np.array([scores(together)]), seconds * args.seeds)


def line(name: str, rows: np.ndarray, seconds: float) -> str:
    """Means, with standard deviations over seeds."""
    cells = [f"{column.mean():.1f}" for column in rows.T]
    if len(rows) > 1:
        cells = [f"{cell} ± {s:.1f}" for cell, s in zip(cells, rows.std(axis=0, ddof=1), strict=True)]
    without = " / ".join(cells[4:]) or "–"
    return f"| {name} | {len(rows)} | {' | '.join(cells[:4])} | {without} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
