"""The tissue system: image patches and gene expression of spots, trained by contrast with spatial targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from nearfar.batching import Plan, positions_in_batch, weight_in_batch
from nearfar.batching.base import BatchSampler
from nearfar.config.samplers import Items
from nearfar.data.files import Json
from nearfar.losses import ClipLoss, SpatialLoss
from nearfar.models.text import TextEncoder, build_text_encoder, embed_texts, save_text_encoder
from nearfar.systems.tissue.data import TissueBatch, TissueData, TissueDataset, load_data
from nearfar.systems.tissue.evaluation import Evaluator
from nearfar.systems.tissue.features import ImageFeatures, gene_sentences
from nearfar.systems.tissue.model import TissueModel
from nearfar.systems.tissue.options import TissueOptions
from nearfar.systems.tissue.report import examples, sections
from nearfar.training.batches import build_sampler
from nearfar.training.sections import Section
from nearfar.training.system import Evaluation, Say, StepOutput, System, TrainSampler

__all__ = ["TissueSystem"]


class TissueSystem(System[TissueBatch, TissueModel]):
    """Trains two towers, over patches and over expression, to match the two views of a spot."""

    name = "tissue"
    monitor = "image_to_gene/MRR"

    config: TissueOptions

    def __init__(self, config: TissueOptions) -> None:
        self.config = config
        self.features = ImageFeatures.from_config(config)
        self.loss = _loss(config)
        self.data: TissueData
        self.evaluator: Evaluator
        self.text_encoder: TextEncoder | None = None
        self._image_description = ""
        self.datasets: dict[str, TissueDataset] = {}

    # -- data ------------------------------------------------------------------------------------------------
    def prepare(self, say: Say) -> None:
        """Read the slides, compute or load frozen features, embed gene sentences."""
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
        if config.loss.name == "clip":
            say("loss=clip: neighbors, neighbor_alpha_scale and temp_reg_weight have no effect")
        self.evaluator = Evaluator(config, self.data)

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

    def layout(self) -> Json:
        """Counts, hashes, and which encoders are really used."""
        encoder = self.text_encoder
        return self.data.layout() | {
            "image_encoder": self._image_description,
            "gene_encoder": "network over expression"
            if encoder is None
            else f"sentences of {self.config.sentence_genes} gene names: {encoder.description}",
        }

    # -- batches ---------------------------------------------------------------------------------------------
    def build_sampler(self) -> BatchSampler:
        """The sampler that the configuration names."""
        train = self.data.splits["train"]
        return build_sampler(
            self.config,
            Items(len(train), labels=lambda: train.slides, places=(train.positions, train.slides)),
        )

    def on_epoch(self, epoch: int, sampler: TrainSampler, say: Say) -> Json:
        """Share of rows with a spatial neighbour in their batch, and share of the target on neighbours."""
        sampler.set_epoch(epoch)
        train = self.data.splits["train"]
        plan = cast(BatchSampler, sampler).plan()
        weight = weight_in_batch(plan, train.neighbors, train.alpha)
        reached, mass = float((weight > 0).mean()), float(self._mass(weight, plan).mean())
        if epoch == 0:
            share = f"{reached:.2%} of the rows have a spatial neighbour in their batch"
            of_target = (
                "" if self.config.loss.name == "clip" else f"; neighbours get {mass:.3f} of the target"
            )
            say(share + of_target)
            if self.config.loss.name == "spatial" and reached < 0.1:
                say("warning: the spatial target is all but inert in these batches; take sampler=spatial")
        return {"sampler": self.config.sampler.name, "neighbors_in_batch": reached, "neighbor_mass": mass}

    def _mass(self, weight: np.ndarray, plan: Plan) -> np.ndarray:
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
    def build_model(self) -> TissueModel:
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

    def encode(self, model: TissueModel, batch: TissueBatch) -> dict[str, Tensor]:
        """Both embeddings of every spot."""
        return {"images": model.encode_images(batch.images), "genes": model.encode_genes(batch.genes)}

    def embed(self, model: TissueModel, batch: TissueBatch) -> dict[str, Tensor]:
        """The embeddings, and the scale at which the model reads their cosines."""
        scale = model.scale().clamp(max=self.config.max_scale)
        return self.encode(model, batch) | {"scale": scale.expand(len(batch))}

    def loss_of(self, model: TissueModel, embeddings: Mapping[str, Tensor], batch: TissueBatch) -> StepOutput:
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
    def before_evaluation(self, model: TissueModel, split: str, final: bool) -> None:
        """Embed the expression of the training spots, from which that of others is predicted."""
        device = next(model.parameters()).device
        parts = self.datasets["train"].genes.split(4096)
        self.evaluator.references = torch.cat(
            [model.encode_genes(part.to(device)).float().cpu() for part in parts]
        )

    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """Retrieval in both directions, the loss of CLIP, and correlations of expression predicted by retrieval."""
        return self.evaluator.evaluate(outputs, split, final)

    def report_examples(self, outputs: Mapping[str, Tensor], split: str) -> list[Json]:
        """Patches with the spots retrieved for them: right, nearly, wrong."""
        return examples(self.data.splits[split], self.data.genes, outputs["images"], outputs["genes"])

    def report_sections(self, outputs: Mapping[str, Tensor], split: str) -> Sequence[Section]:
        """A table of the slides, and a gene over a slide as measured and as predicted."""
        return sections(self.evaluator, outputs, split)

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
