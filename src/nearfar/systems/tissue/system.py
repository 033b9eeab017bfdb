"""Tissue patch ↔ gene expression as a system: slides, encoders, batches of tiles, spatial targets and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.batching import positions_in_batch, weight_in_batch
from nearfar.config.samplers import Items
from nearfar.losses import ClipLoss, SpatialLoss
from nearfar.models.text import TextEncoder, build_text_encoder, embed_texts, save_text_encoder
from nearfar.systems.tissue.data import TissueData, TissueDataset, load_data
from nearfar.systems.tissue.evaluation import Judge
from nearfar.systems.tissue.features import ImageFeatures, gene_sentences
from nearfar.systems.tissue.model import TissueModel
from nearfar.systems.tissue.options import TissueOptions
from nearfar.systems.tissue.report import examples, sections
from nearfar.training import ranks
from nearfar.training.batches import build_sampler
from nearfar.training.sections import Section
from nearfar.training.system import Evaluation, StepOutput, System

__all__ = ["TissueSystem"]

Say = Callable[[str], None]


class TissueSystem(System):
    """Trains two towers so that the patch and the expression of a spot find each other."""

    name = "tissue"
    monitor = "image_to_gene/MRR"

    config: TissueOptions

    def __init__(self, config: TissueOptions) -> None:
        self.config = config
        self.features = ImageFeatures.from_config(config)
        self.loss = _loss(config)
        self.data: TissueData
        self.judge: Judge
        self.text_encoder: TextEncoder | None = None
        self._image_description = ""
        self.datasets: dict[str, TissueDataset] = {}

    # -- data ------------------------------------------------------------------------------------------------
    def prepare(self, say: Say) -> None:
        """Read the slides, compute or find frozen features, embed gene sentences."""
        config = self.config
        self.data = self.load_data(say)
        say(self.data.summary())
        genes = self._gene_inputs()
        for name, tissue in self.data.splits.items():
            images, self._image_description = self.features.read(tissue, config.seed)
            self.datasets[name] = TissueDataset(
                images,
                genes[name],
                tissue.neighbors,
                tissue.alpha,
                augment=config.augment and name == "train" and not self.features.frozen,
                seed=config.seed,
            )
        say(f"image encoder: {self._image_description}")
        if self.text_encoder is not None:
            say(f"gene sentences of {config.sentence_genes} names: {self.text_encoder.description}")
        if ranks.count() == 1:
            say("one process: local_loss and gather_with_grad have no effect")
        if config.loss.name == "clip":
            say("loss=clip: neighbors, neighbor_alpha_scale and temp_reg_weight have no effect")
        self.judge = Judge(config, self.data)

    def load_data(self, say: Say) -> TissueData:
        """The splits, from shards or generated; computes no features."""
        return load_data(self.config.data, say)

    def _gene_inputs(self) -> dict[str, np.ndarray]:
        """What the gene tower reads of every split."""
        if self.config.gene_encoder == "mlp":
            return {name: tissue.expression for name, tissue in self.data.splits.items()}
        sentences = {
            name: gene_sentences(tissue.expression, self.data.genes, self.config.sentence_genes)
            for name, tissue in self.data.splits.items()
        }
        encoder = build_text_encoder(**self.config.text_encoder).fit(sentences["train"])
        self.text_encoder = encoder
        return {name: embed_texts(encoder, texts) for name, texts in sentences.items()}

    def layout(self) -> dict[str, Any]:
        """Counts, hashes, and which encoders are really used."""
        encoder = self.text_encoder
        return self.data.layout() | {
            "image_encoder": self._image_description,
            "gene_encoder": "network over expression"
            if encoder is None
            else f"sentences of {self.config.sentence_genes} gene names: {encoder.description}",
        }

    # -- batches ---------------------------------------------------------------------------------------------
    def build_sampler(self) -> Any:
        """The sampler that the configuration names."""
        train = self.data.splits["train"]
        return build_sampler(
            self.config,
            Items(len(train), labels=lambda: train.slides, places=(train.positions, train.slides)),
        )

    def on_epoch(self, epoch: int, sampler: Any, say: Say) -> dict[str, Any]:
        """Count whose neighbours are in the batch, and how much of its target they get."""
        sampler.set_epoch(epoch)
        train = self.data.splits["train"]
        weight = weight_in_batch(sampler.plan(), train.neighbors, train.alpha)
        reached, mass = float((weight > 0).mean()), float(self._mass(weight, sampler.plan()).mean())
        if epoch == 0:
            said = f"{reached:.2%} of the rows have a spatial neighbour in their batch"
            of_target = (
                "" if self.config.loss.name == "clip" else f"; neighbours get {mass:.3f} of the target"
            )
            say(said + of_target)
            if self.config.loss.name == "spatial" and reached < 0.1:
                say("warning: the spatial target is all but inert in these batches; take sampler=spatial")
        return {"sampler": self.config.sampler.name, "neighbors_in_batch": reached, "neighbor_mass": mass}

    def _mass(self, weight: np.ndarray, plan: Any) -> np.ndarray:
        """Share of each row's target that lies on neighbours, 0 under losses that give them none."""
        config = self.config
        if config.loss.name == "clip" or config.neighbors in ("none", "mask"):
            return np.zeros_like(weight)
        if config.neighbors == "positive":
            train = self.data.splits["train"]
            weight = weight_in_batch(plan, train.neighbors, (train.alpha > 0).astype(np.float64))
            return np.asarray(weight / (1 + weight))
        return np.asarray(config.neighbor_alpha_scale * weight / (1 + config.neighbor_alpha_scale * weight))

    # -- model and loss --------------------------------------------------------------------------------------
    def build_model(self) -> nn.Module:
        """Both towers of the configured kinds."""
        config, train = self.config, self.datasets["train"]
        encoder = None if self.features.frozen else self.features.encoder()
        return TissueModel(
            train.genes,
            images=train.features,
            encoder=encoder,
            embedding_dim=config.embedding_dim,
            hidden=config.hidden,
            dropout=config.dropout,
            temperature=config.temperature,
            learn_temperature=config.learn_temperature,
            max_scale=config.max_scale,
        )

    def encode(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """Both embeddings of every spot."""
        return {"images": model.encode_images(batch.images), "genes": model.encode_genes(batch.genes)}

    def embed(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """The embeddings, and the scale at which the model reads their cosines."""
        scale = model.scale().clamp(max=self.config.max_scale)
        return self.encode(model, batch) | {"scale": scale.expand(len(batch))}

    def loss_of(self, model: Any, embeddings: Mapping[str, Tensor], batch: Any) -> StepOutput:
        """The loss of CLIP, or with targets that give neighbours a share."""
        images, genes, scale = embeddings["images"], embeddings["genes"], model.scale()
        if self.config.loss.name == "clip":
            return StepOutput(self.loss(images, genes, scale), self._record)
        index = positions_in_batch(batch.neighbors, batch.positions)
        return StepOutput(self.loss(images, genes, scale, index, batch.alpha), self._record)

    def _record(self) -> dict[str, float]:
        assert self.loss.record is not None
        record: dict[str, float] = self.loss.record.to_dict()
        return record | {"largest_logit": record["scale"]}  # embeddings have unit length

    # -- evaluation ------------------------------------------------------------------------------------------
    @torch.no_grad()
    def before_evaluation(self, model: Any, split: str, final: bool) -> None:
        """Embed the expression of the training spots, from which that of others is predicted."""
        device = next(model.parameters()).device
        parts = self.datasets["train"].genes.split(4096)
        self.judge.references = torch.cat(
            [model.encode_genes(part.to(device)).float().cpu() for part in parts]
        )

    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """Retrieval in both directions, the loss of CLIP, and correlations of expression predicted by retrieval."""
        return self.judge.evaluate(outputs, split, final)

    def report_examples(self, outputs: Mapping[str, Tensor], split: str) -> list[dict[str, Any]]:
        """Patches with the spots found for them: right, nearly, wrong."""
        return examples(self.data.splits[split], self.data.genes, outputs["images"], outputs["genes"])

    def report_sections(self, outputs: Mapping[str, Tensor], split: str) -> Sequence[Section]:
        """A table of the slides, and a gene over a slide as measured and as predicted."""
        return sections(self.judge, outputs, split)

    def save_assets(self, folder: Path) -> None:
        """The names of the genes in order, and the fitted text encoder of gene sentences."""
        (folder / "genes.txt").write_text("\n".join(self.data.genes) + "\n", encoding="utf-8")
        if self.text_encoder is not None:
            save_text_encoder(self.text_encoder, folder / "text_encoder")


def _loss(config: TissueOptions) -> ClipLoss | SpatialLoss:
    if config.loss.name == "clip":
        return ClipLoss(max_scale=config.max_scale)
    return SpatialLoss(
        config.neighbor_alpha_scale, config.temp_reg_weight, config.neighbors, max_scale=config.max_scale
    )
