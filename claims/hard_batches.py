"""What the experiments on hard batches share: generated pairs, random and hard batches, one encoder, MRR.

An experiment derives its ``Settings`` from ``HardBatches`` and adds what only it varies. Every field is an option of
the ledger; a field with ``init=False`` is fixed in that experiment and no option.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from claims.pairs import Pairs, clustered_pairs
from claims.training import encoder, fit
from nearfar.batching import (
    BatchSampler,
    HardNegativeSampler,
    Neighbors,
    RandomBatchSampler,
    nearest_neighbors,
)
from nearfar.losses import InfoNCELoss, SimilarityMask
from nearfar.metrics import retrieval_ranks
from nearfar.models import ProjectionHead

__all__ = ["HardBatches", "World"]


@dataclass(frozen=True)
class HardBatches:
    """Generated pairs (see ``clustered_pairs``), batches of which ``hard_ratio`` is hard, and epochs of training."""

    items: int = 2000
    test: int = 1000
    clusters: int = 40
    spread: float = 0.3
    noise: float = 0.2
    epochs: int = 10
    hard_ratio: float = 0.5
    hardness_k: int = 50
    batch_size: int = 32

    def world(self, seed: int, *, spread: float | None = None, duplicates: float = 0.0) -> World:
        """The pairs of a seed; ``spread`` replaces that of the settings, ``duplicates`` is the share of near ones."""
        train, unseen = clustered_pairs(
            seed,
            self.items,
            self.test,
            clusters=self.clusters,
            spread=self.spread if spread is None else spread,
            noise=self.noise,
            duplicates=duplicates,
        )
        return World(self, seed, train, unseen, nearest_neighbors(train.text, self.hardness_k))


@dataclass(frozen=True)
class World:
    """Pairs to train on and unseen ones, and the nearest neighbours of the former's texts."""

    settings: HardBatches
    seed: int
    train: Pairs
    unseen: Pairs
    near: Neighbors

    def random(self) -> RandomBatchSampler:
        """Random batches."""
        return RandomBatchSampler(len(self.train), self.settings.batch_size, seed=self.seed)

    def hard(
        self,
        hard_ratio: float | None = None,
        *,
        neighbors: Neighbors | None = None,
        curriculum_epoch: int = 0,
        threshold: float | None = None,
    ) -> HardNegativeSampler:
        """Hard batches; ``threshold`` keeps pairs at least this similar out of a batch where it can."""
        return HardNegativeSampler(
            self.near if neighbors is None else neighbors,
            self.settings.batch_size,
            self.settings.hard_ratio if hard_ratio is None else hard_ratio,
            self.settings.hardness_k,
            curriculum_epoch,
            false_negative_threshold=threshold,
            seed=self.seed,
        )

    def encoder(self) -> ProjectionHead:
        """The untrained encoder, the same for every arm of a seed."""
        return encoder(self.seed, self.train.view.shape[1], self.train.text.shape[1])

    def fit(
        self,
        model: nn.Module,
        sampler: BatchSampler,
        epochs: int | None = None,
        *,
        temperature: float = 0.07,
        mask_from: float | None = None,
        after: Callable[[int, float], None] = lambda epoch, loss: None,
    ) -> None:
        """Train an encoder of views towards frozen texts with InfoNCE.

        ``epochs`` replaces that of the settings. ``mask_from``: negatives whose text has at least this cosine with the
        anchor's are left out. ``after`` is called with the number of epochs done and the mean loss of the last.
        """
        contrast, optimizer = InfoNCELoss(temperature), torch.optim.Adam(model.parameters(), lr=2e-3)

        def loss(batch: Tensor) -> Tensor:
            text = self.train.text[batch]
            mask = None if mask_from is None else SimilarityMask(text, mask_from)
            return contrast(model(self.train.view[batch]), text, mask=mask)

        for epoch in range(self.settings.epochs if epochs is None else epochs):
            sampler.set_epoch(epoch)
            values = fit(model, sampler, loss, optimizer)
            after(epoch + 1, sum(values) / len(values))

    @torch.no_grad()
    def mrr(self, model: nn.Module) -> float:
        """Mean reciprocal rank of each unseen text's view among all unseen views; chance is about ln(n) / n."""
        model.eval()
        return float(retrieval_ranks(self.unseen.text, model(self.unseen.view)).reciprocal().mean())

    def mrr_after(
        self, sampler: BatchSampler, *, temperature: float = 0.07, mask_from: float | None = None
    ) -> float:
        """MRR of a new encoder trained on a sampler's batches; options as of ``fit``."""
        model = self.encoder()
        self.fit(model, sampler, temperature=temperature, mask_from=mask_from)
        return self.mrr(model)
