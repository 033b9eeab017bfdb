"""Do hard batches or mined negatives beat random batches on real molecules, at a small and at a usual batch size?

Molecules and their texts: the names that the package chemicals carries, or the descriptions of ChEBI-20 below
``NEARFAR_DATA``. A fingerprint network and a linear head over frozen n-gram vectors of the texts train with symmetric
InfoNCE, always from the same start, for the same number of steps and rows. Only the negatives differ:

- random batches;
- hard batches: half of a batch are near neighbours by the frozen text vectors;
- mined negatives: random batches, and for every row one more pair, drawn from the nearest thirty texts, whose molecule
  and text are further candidates of every row (as sentence-transformers adds them). Its step costs twice as much.

Each without masks, and with pairs whose texts have a cosine of .95 or more left out. A row's own partner is never its
negative. The score is MRR of text → molecule among unseen molecules of other ring scaffolds. Each seed draws its own
split, start and order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from claims.training import fit
from nearfar.batching import BatchSampler, HardNegativeSampler, RandomBatchSampler, nearest_neighbors
from nearfar.config.compose import compose_config, read_config
from nearfar.errors import NearfarError
from nearfar.functional import info_nce
from nearfar.losses import SimilarityMask
from nearfar.metrics import retrieval_ranks
from nearfar.mining import mine_negatives
from nearfar.models.views import ViewModel
from nearfar.systems.molecules.options import MoleculeOptions
from nearfar.systems.molecules.system import MoleculeSystem
from nearfar.training.state import initial_model

QUANTITIES = {
    "random": "MRR after random batches, no mask",
    "hard": "hard batches minus random ones, no mask",
    "mined": "mined negatives minus random batches alone, no mask",
    "mask": "mask minus no mask, random batches",
    "hard_masked": "hard batches minus random ones, masks in both",
    "mined_masked": "mined negatives minus random batches alone, masks in both",
    "neighbours": "nearest texts of an item in a hard batch",
    "neighbours_random": "the same in a random batch",
    "false_mined": "share of mined negatives that the mask calls false",
}
#: the nearest texts that mined negatives are drawn from, and how many of them are kept for each row
RANKS, KEPT = (0, 30), 10
#: cosine of two texts from which they are taken to describe one molecule
SAME = 0.95


@dataclass(frozen=True)
class Settings:
    """``data``: "names" or "chebi". ``items``: molecules over all splits (of the names), 0 for all. ``width``: of the
    network and of the embeddings; ``dims``: of the text vectors."""

    data: str = "names"
    items: int = 26000
    batch_size: int = 256
    epochs: int = 8
    lr: float = 1e-3
    temperature: float = 0.07
    hard_ratio: float = 0.5
    hardness_k: int = 100
    width: int = 256
    dims: int = 512


def run(seed: int, settings: Settings) -> dict[str, float]:
    """Train six times, and compare MRR on unseen molecules."""
    world = World(seed, settings)
    score = {
        (name, masked): world.mrr_after(name, masked) for name in world.samplers for masked in (False, True)
    }
    near = {name: world.neighbours(name) for name in ("random", "hard")}
    return {
        "random": score["random", False],
        "hard": score["hard", False] - score["random", False],
        "mined": score["mined", False] - score["random", False],
        "mask": score["random", True] - score["random", False],
        "hard_masked": score["hard", True] - score["random", True],
        "mined_masked": score["mined", True] - score["random", True],
        "neighbours": near["hard"],
        "neighbours_random": near["random"],
        "false_mined": world.false_share(),
    }


class World:
    """The data of a seed, its samplers, and what is mined from it."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self.seed, self.settings = seed, settings
        self.system = _system(seed, settings)
        self.train, self.unseen = (self.system.datasets[name] for name in ("train", _unseen(self.system)))
        self.texts = torch.nn.functional.normalize(self.train.tensor("reference").float(), dim=1)
        self.near = nearest_neighbors(self.texts, settings.hardness_k)
        n, size = len(self.train), settings.batch_size
        self.samplers: dict[str, BatchSampler] = {
            "random": RandomBatchSampler(n, size, drop_last=True, seed=seed),
            "hard": HardNegativeSampler(
                self.near, size, settings.hard_ratio, settings.hardness_k, drop_last=True, seed=seed
            ),
            "mined": RandomBatchSampler(n, size, drop_last=True, seed=seed),
        }
        every = self.texts.numpy()
        self.mined = mine_negatives(
            every, every, per_query=KEPT, rank_range=RANKS, strategy="random", seed=seed
        )

    def mrr_after(self, name: str, masked: bool) -> float:
        """MRR of text → molecule after training on a sampler's batches."""
        model, sampler = initial_model(self.system, self.seed), self.samplers[name]
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.settings.lr)
        draw = torch.Generator().manual_seed(self.seed)

        def loss(at: Tensor) -> Tensor:
            views = self._embed(model, at)
            mask = SimilarityMask(self.texts[at], SAME) if masked else None
            more: dict[str, Any] = {}
            if name == "mined":
                other = self._mined(at, draw)
                negatives = self._embed(model, other)
                left = at[:, None] == other
                if masked:
                    left |= self.texts[at] @ self.texts[other].T >= SAME
                more = {
                    "negatives": (negatives["molecule"], negatives["text"]),
                    "negatives_mask": (left, left),
                }
            return info_nce(
                views["text"], views["molecule"], temperature=self.settings.temperature, mask=mask, **more
            )

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for epoch in range(self.settings.epochs):
                sampler.set_epoch(epoch)
                fit(model, sampler, loss, optimizer)
        return self._mrr(model)

    def _mined(self, at: Tensor, draw: torch.Generator) -> Tensor:
        """One mined pair for each row, without repetition: a row whose pairs are all taken has none."""
        kept = self.mined.negatives[at.numpy()]
        column = torch.randint(KEPT, (len(at),), generator=draw).numpy()
        chosen = kept[np.arange(len(at)), column]
        return torch.from_numpy(np.unique(chosen[chosen >= 0]))

    def _embed(self, model: ViewModel, at: Tensor) -> dict[str, Tensor]:
        return self.system.encode(model, self.train.__getitems__(at.tolist()))

    @torch.no_grad()
    def _mrr(self, model: ViewModel) -> float:
        model.eval()
        views = self.system.encode(model, self.unseen.__getitems__(list(range(len(self.unseen)))))
        return float(retrieval_ranks(views["text"], views["molecule"]).reciprocal().mean())

    def neighbours(self, name: str) -> float:
        """How many of its ``hardness_k`` nearest texts an item meets in a batch of the first epoch."""
        sampler, counts = self.samplers[name], []
        sampler.set_epoch(0)
        for batch in list(sampler)[:50]:
            near = self.near.indices[np.asarray(batch)]
            counts.append(np.isin(near, batch).sum(1).mean())
        return float(np.mean(counts))

    def false_share(self) -> float:
        """Of the mined negatives, the share that the mask leaves out."""
        kept = self.mined.negatives >= 0
        return float((self.mined.scores[kept] >= SAME).mean())


def _system(seed: int, settings: Settings) -> MoleculeSystem:
    data: dict[str, Any] = {"split_seed": seed}
    if settings.data == "chebi":
        file = Path(os.environ.get("NEARFAR_DATA", "")) / "chebi20" / "validation.txt"
        if not file.is_file():
            raise NearfarError(
                "this claim is judged on real molecules: NEARFAR_DATA must name a folder with chebi20 in it."
            )
        data |= {"train": str(file), "val_fraction": 0.2}
    elif settings.data == "names":
        data |= {"embedded_size": settings.items or None}
    else:
        raise NearfarError(f"data is '{settings.data}'; it is names or chebi.")
    changes = {
        "seed": seed,
        "batch_size": settings.batch_size,
        "hardness_k": settings.hardness_k,
        "embedding_dim": settings.width,
        "fingerprint_hidden": settings.width,
        "text_encoder": {"dims": settings.dims},
        "false_negative_threshold": SAME,  # so that the frozen text vectors are kept beside the items
        "data": data,
    }
    composed = compose_config(["experiment=molecules"])
    merged = OmegaConf.merge(composed, changes)
    assert isinstance(merged, DictConfig)
    options = read_config(merged)
    assert isinstance(options, MoleculeOptions)
    system = MoleculeSystem(options)
    system.prepare(lambda _: None)
    return system


def _unseen(system: MoleculeSystem) -> str:
    """The test split; where a file has none, the molecules that were held out from it."""
    return "test" if "test" in system.datasets else "val"
