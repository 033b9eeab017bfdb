"""What makes molecule ↔ text retrieval good: the key comparisons of docs/experiments/molecules.md, paired.

Needs the ChEBI-20 file ``chebi20/validation.txt`` in the folder that the environment variable NEARFAR_DATA
names. Every variant is trained on two thirds of a random split and ranks the other third; a gain is the
difference on the same split and seed, with a 95 % interval of Student's t over splits.

    python benchmarks/molecules_ablation.py --splits 5 --only mark no-input-dropout
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import nn

from nearfar.batching import HardNegativeSampler, PartitionBatchSampler, RandomBatchSampler, nearest_neighbors
from nearfar.losses import InfoNCELoss, false_negative_mask
from nearfar.metrics import retrieval_metrics
from nearfar.models.molecules.fingerprint import FingerprintSpec
from nearfar.models.molecules.graph import MoleculeField, Molecules
from nearfar.models.text import build_text_encoder
from nearfar.models.views import PassThrough, ViewModel, build_head
from nearfar.towers.molecule import MoleculeTower


@dataclass(frozen=True)
class Setting:
    """One variant: text features, molecule features, model, batches."""

    words: tuple[int, int] | None = None
    chars: tuple[int, int] | None = (3, 5)
    dims: int = 2048
    singular_power: float = 1.0
    kinds: tuple[str, ...] = ("morgan", "maccs", "properties", "functional_groups")
    counts: bool = True
    chirality: bool = True
    encoder: str = "fingerprint"
    text_head: str = "linear"
    hidden: int = 1024
    input_dropout: float = 0.2
    dropout: float = 0.4
    batch_size: int = 256
    epochs: int = 40
    lr: float = 1e-3
    cosine: bool = True
    temperature: float = 0.07
    sampler: str = "random"
    options: tuple[tuple[str, Any], ...] = ()
    mask_above: float | None = None
    bare: bool = False


DEFAULT = Setting()
MARK = Setting(
    bare=True,
    dims=256,
    kinds=("morgan",),
    counts=False,
    chirality=False,
    hidden=512,
    batch_size=64,
    epochs=25,
    cosine=False,
)
VARIANTS: dict[str, Setting] = {
    "mark": MARK,
    "default": DEFAULT,
    "words-alone": replace(DEFAULT, words=(1, 2), chars=None),
    "words-and-characters": replace(DEFAULT, words=(1, 2)),
    "dims-512": replace(DEFAULT, dims=512),
    "singular-power-half": replace(DEFAULT, singular_power=0.5),
    "morgan-alone": replace(DEFAULT, kinds=("morgan",)),
    "without-groups": replace(DEFAULT, kinds=("morgan", "maccs", "properties")),
    "no-text-head": replace(DEFAULT, text_head="none"),
    "mlp-text-head": replace(DEFAULT, text_head="mlp"),
    "no-input-dropout": replace(DEFAULT, input_dropout=0.0),
    "input-dropout-half": replace(DEFAULT, input_dropout=0.5),
    "batch-64": replace(DEFAULT, batch_size=64),
    "graph": replace(DEFAULT, encoder="graph", batch_size=128),
    "graph-and-fingerprint": replace(DEFAULT, encoder="both", batch_size=128),
    "masked-95": replace(DEFAULT, mask_above=0.95),
    "hard-50": replace(DEFAULT, sampler="hard", options=(("hard_ratio", 0.5),)),
    "hard-50-masked-90": replace(DEFAULT, sampler="hard", options=(("hard_ratio", 0.5),), mask_above=0.9),
    "partition-8-masked-95": replace(
        DEFAULT, sampler="partition", options=(("group_size", 8),), mask_above=0.95
    ),
    "partition-256-masked-95": replace(DEFAULT, sampler="partition", mask_above=0.95),
}
SAMPLERS = {"hard": HardNegativeSampler, "partition": PartitionBatchSampler}


class Split:
    """Molecules and texts of one random split; features are made when first asked for."""

    def __init__(self, smiles: list[str], texts: list[str], seed: int) -> None:
        order = np.random.default_rng(1000 + seed).permutation(len(smiles))
        self.test, self.train = order[: len(order) // 3], order[len(order) // 3 :]
        self.smiles, self.texts, self.seed = smiles, texts, seed
        self._text: dict[tuple[Any, ...], torch.Tensor] = {}

    def text(self, setting: Setting) -> torch.Tensor:
        """Text vectors of all rows by an encoder fitted on the training texts alone."""
        key = (setting.bare, setting.words, setting.chars, setting.dims, setting.singular_power)
        if key not in self._text:
            training = [self.texts[i] for i in self.train]
            if setting.bare:
                vectors = bare_text_vectors(training, self.texts, setting.dims)
            else:
                encoder = build_text_encoder(
                    "ngram",
                    words=setting.words,
                    chars=setting.chars,
                    dims=setting.dims,
                    singular_power=setting.singular_power,
                )
                vectors = encoder.fit(training).encode(self.texts)
            self._text[key] = torch.from_numpy(np.asarray(vectors, dtype=np.float32))
        return self._text[key]


def bare_text_vectors(training: list[str], texts: list[str], dims: int) -> np.ndarray:
    """scikit-learn's TF-IDF over words and its truncated SVD, all at their defaults."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    terms = TfidfVectorizer().fit(training)
    axes = TruncatedSVD(dims, random_state=0).fit(terms.transform(training))
    return axes.transform(terms.transform(texts))


class BareNetwork(nn.Module):
    """Two layers over bits."""

    def __init__(self, fingerprint_dim: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(fingerprint_dim, hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, dim)
        )

    def forward(self, molecules: MoleculeField) -> torch.Tensor:
        return self.network(molecules.fingerprint)


def build(setting: Setting, text_dim: int, fingerprint_dim: int) -> ViewModel:
    """The model of a setting: a molecule tower, and a head over text vectors."""
    if setting.bare:
        network, head = BareNetwork(fingerprint_dim, setting.hidden, text_dim), "none"
        width = text_dim
    else:
        head = setting.text_head
        width = text_dim if head == "none" else 512
        network = MoleculeTower(
            setting.encoder,
            width=width,
            fingerprints=setting.kinds,
            chirality=setting.chirality,
            fingerprint_hidden=setting.hidden,
            fingerprint_dropout=setting.dropout,
            input_dropout=setting.input_dropout,
        ).build()
    text_head = build_head(head, text_dim, width, hidden=width, dropout=0.1, norm="layer")
    return ViewModel(
        {"molecules": network, "texts": PassThrough(text_dim)},
        {"molecules": nn.Identity(), "texts": text_head},
    )


def batches(setting: Setting, vectors: torch.Tensor, seed: int) -> Any:
    """The sampler of a setting over the training rows."""
    if setting.sampler == "random":
        return RandomBatchSampler(len(vectors), setting.batch_size, seed=seed)
    neighbors = nearest_neighbors(vectors.numpy(), 100)
    return SAMPLERS[setting.sampler](neighbors, setting.batch_size, seed=seed, **dict(setting.options))


def evaluate(setting: Setting, split: Split) -> dict[str, float]:
    """Train one model and rank the unseen third."""
    start = time.perf_counter()
    torch.manual_seed(split.seed)
    text = split.text(setting)
    spec = FingerprintSpec(setting.kinds, counts=setting.counts, chirality=setting.chirality)
    molecules = Molecules.from_smiles(split.smiles, setting.encoder != "fingerprint", spec)
    model = build(setting, text.shape[1], spec.dim)

    def encoded(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Text vectors of some rows, and the embeddings of their molecules and texts."""
        at = torch.from_numpy(rows)
        return text[at], model.encode("molecules", molecules.batch(at)), model.encode("texts", text[at])

    sampler = batches(setting, text[torch.from_numpy(split.train)], split.seed)
    loss = InfoNCELoss(setting.temperature)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, _shape(setting, setting.epochs * len(sampler)))
    for epoch in range(setting.epochs):
        sampler.set_epoch(epoch)
        for rows in sampler:
            vectors, *embeddings = encoded(split.train[np.asarray(rows)])
            mask = None if setting.mask_above is None else false_negative_mask(vectors, setting.mask_above)
            value = loss(*embeddings, mask=mask)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            rate.step()
    model.eval()
    with torch.inference_mode():
        parts = [encoded(rows) for rows in _chunks(split.test, 256)]
    gallery, queries = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    found = retrieval_metrics(queries, gallery, ks=(1, 10))
    numbers = {name: found[name].value for name in ("MRR", "R@1", "R@10")}
    return numbers | {"seconds": time.perf_counter() - start}


def _shape(setting: Setting, steps: int) -> Any:
    """Warm-up over a tenth of the steps, then a cosine down to 0; or constant."""
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        if not setting.cosine:
            return 1.0
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def interval(differences: list[float]) -> str:
    """Mean difference and its 95 % interval."""
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return f"{mean:+.3f}"
    half = (
        student.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / math.sqrt(len(differences))
    )
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--against", choices=list(VARIANTS), default="default")
    arguments = parser.parse_args()
    if "NEARFAR_DATA" not in os.environ:
        parser.error("set NEARFAR_DATA to the folder that holds chebi20/validation.txt")
    path = Path(os.environ["NEARFAR_DATA"]) / "chebi20" / "validation.txt"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    splits = [Split([r[1] for r in rows], [r[2] for r in rows], seed) for seed in range(arguments.splits)]
    names = list(dict.fromkeys([arguments.against, *arguments.only]))
    results: dict[str, list[dict[str, float]]] = {}
    print(f"| variant | MRR | R@1 | R@10 | MRR − {arguments.against} | seconds |\n|---|---|---|---|---|---|")
    for name in names:
        found = results[name] = [evaluate(VARIANTS[name], split) for split in splits]
        mean = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
        gains = [one["MRR"] - ref["MRR"] for one, ref in zip(found, results[arguments.against], strict=True)]
        gain = "" if name == arguments.against else interval(gains)
        print(
            f"| {name} | {mean['MRR']:.3f} | {mean['R@1']:.3f} | {mean['R@10']:.3f} | {gain} "
            f"| {mean['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
