"""Aspect sentiment as a system: data, model, objective, thresholds and metrics put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.batching import BatchSampler, LengthBatchSampler
from nearfar.data.batch import Batch, Field, ItemDataset, Rows
from nearfar.data.cache import content_key
from nearfar.data.chunks import NewData
from nearfar.data.files import Json
from nearfar.data.items import Items
from nearfar.data.reviews.aspect_data import (
    AspectData,
    load_embedded,
    load_files,
    read_reviews,
    usable_reviews,
)
from nearfar.data.reviews.labels import LabelScheme
from nearfar.data.reviews.readers import ID_COLUMNS, TEXT_COLUMNS
from nearfar.data.reviews.records import repeats
from nearfar.data.splits import column_name, data_paths
from nearfar.errors import NearfarError
from nearfar.metrics import Estimate
from nearfar.metrics.aspect_scores import Decision, Scores, choose_decision, polarity_weights, score_split
from nearfar.models.aspects import NAME as LINEAR
from nearfar.models.aspects import AspectModel, linear_answers
from nearfar.models.text.trainable import WordTextEncoder
from nearfar.models.text.words import TokenBatch, TokenTable
from nearfar.systems.aspects.objective import AspectObjective, class_weights
from nearfar.systems.aspects.options import AspectOptions
from nearfar.systems.aspects.report import (
    SCHEME_FILE,
    answer_columns,
    baseline_section,
    calibration_section,
    confusion_section,
    hardest_section,
    read_decision,
    read_scheme,
    write_scheme,
)
from nearfar.systems.aspects.tower import text_tower
from nearfar.towers import Tower
from nearfar.towers.build import load_tower
from nearfar.towers.text import TextTower
from nearfar.training.sections import Section
from nearfar.training.system import Evaluation, Say, StepOutput, System, TrainSampler

__all__ = ["AspectSystem"]


class AspectSystem(System[Batch, AspectModel]):
    """Trains a text encoder to classify the aspects of a review and their polarity, optionally with contrast."""

    name = "aspects"
    monitor = "sentiment/F1_micro"

    config: AspectOptions

    def __init__(self, config: AspectOptions) -> None:
        self.config = config
        self.data: AspectData
        self.scheme: LabelScheme
        self.tower: TextTower
        self.objective: AspectObjective
        self.decision: Decision
        self.datasets: dict[str, ItemDataset] = {}
        self._linear: dict[str, np.ndarray] = {}
        self._linear_estimates: dict[str, dict[str, Estimate]] = {}
        self._usual: np.ndarray
        self._weights: np.ndarray | None = None
        self._epoch = 0

    # -- data ------------------------------------------------------------------------------------------------
    def prepare(self, say: Say) -> None:
        """Read and check the data, fit tokenizer and linear baseline on the training texts."""
        config = self.config
        self.data = self.load_data(say)
        say(self.data.summary())
        train, scheme = self.data.train, self.data.scheme
        self.scheme = scheme
        texts = {name: items.texts("text") for name, items in self.data.splits.items()}
        self.tower = text_tower(**config.text_encoder, run_lr=config.lr).fit(texts["train"])
        say(f"text encoder: {self.tower.description}")
        for name, items in self.data.splits.items():
            inputs = {"text": self.tower.read(texts[name]), "codes": Rows(items.array("codes"))}
            self.datasets[name] = ItemDataset(inputs, seed=config.seed)
        known = train.array("codes")
        codes = torch.from_numpy(known)
        self.objective = AspectObjective(
            scheme,
            class_weights(codes, scheme.classes, config.alpha),
            focal_weight=config.focal_weight,
            contrastive_weight=config.contrastive_weight,
            gamma=config.gamma,
            contrastive=config.contrastive,
            temperature=config.temperature,
            reduction=config.reduction,
        )
        evaluated = {name: some for name, some in texts.items() if name in ("val", "test")}
        self._linear = linear_answers(texts["train"], known, evaluated)
        counts = np.stack([(known == kind).sum(axis=0) for kind in range(scheme.classes)], axis=1)
        self._usual = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        self._weights = polarity_weights(counts[:, 1:], config.logit_adjustment)
        self.decision = Decision.plain(len(scheme.aspects), self._weights)

    def own_data(self, say: Say) -> tuple[dict[str, Items], str]:
        """The reviews, each with the polarity of every aspect as numbers (``codes``)."""
        splits = self.load_data(say).splits
        return splits, self.content_hash(*splits.values())

    def load_data(self, say: Say) -> AspectData:
        """The splits, from the configured files or the embedded set; fits nothing."""
        data = self.config.data
        paths = data_paths(data)
        if paths["train"] is None and data.embedded_size is not None:
            say("data: generated reviews, for a first run; give data.dir= or data.train= for your own")
            return load_embedded(data.embedded_size, data.split_seed)
        if paths["train"] is None:
            raise NearfarError(
                "give the files: data.dir=FOLDER (with Train, Dev or validation, and Test files) or data.train=FILE; "
                "data=aspects_embedded needs none."
            )
        return load_files(
            paths,
            text_column=column_name(data.text_column),
            label_column=column_name(data.label_column),
            aspect_column=column_name(data.aspect_column),
            polarity_column=column_name(data.polarity_column),
            polarities=data.polarities,
            encoding=data.encoding,
            aspects=None if data.aspects is None else [str(name) for name in data.aspects],
            id_column=column_name(data.id_column),
            min_mentions=data.min_mentions,
            val_fraction=data.val_fraction,
            tune_fraction=data.tune_fraction if self.config.thresholds != "none" else 0.0,
            seed=data.split_seed,
        )

    def layout(self) -> dict[str, object]:
        """Counts, rejections, hashes, and which encoder is really used."""
        encoder = {"kind": self.config.text_encoder["kind"], "description": self.tower.description}
        return self.data.layout() | {
            "data_hash": self.content_hash(*self.data.splits.values()),
            "text_encoder": encoder,
            "baseline": LINEAR,
        }

    @staticmethod
    def content_hash(*splits: Items) -> str:
        """A hash of the content of splits: sixteen hexadecimal digits of ids, texts and codes, in order."""
        return content_key(*([s.ids, s.texts("text"), s.array("codes")] for s in splits))[:16]

    # -- batches ---------------------------------------------------------------------------------------------
    def build_sampler(self) -> LengthBatchSampler:
        """Random batches of similar length; with ``balance=oversample`` reviews with rare labels are repeated."""
        config, train = self.config, self.data.train
        if config.batch_size > len(train):
            raise NearfarError(
                f"batch_size={config.batch_size} is larger than the training set of {len(train)} reviews; lower it."
            )
        copies = None
        if config.balance == "oversample":
            pairs = self.data.scheme.pair_array
            copies = repeats(
                train.array("codes"), pairs, config.oversample_frequency, config.oversample_most, config.seed
            )
        tokens = self.datasets["train"].inputs["text"]
        assert isinstance(tokens, TokenTable)
        return LengthBatchSampler(tokens.lengths, config.batch_size, repeats=copies, seed=config.seed)

    def check_sampler(self, sampler: TrainSampler, say: Say) -> None:
        """Announce the effect of oversampling; there are no neighbours that could be misaligned."""
        if self.config.balance == "oversample":
            assert isinstance(sampler, BatchSampler)
            say(
                f"balance=oversample: an epoch has {sampler.n} rows made of {len(self.data.train)} reviews; its "
                "training loss is of repeated rows"
            )

    def on_epoch(self, epoch: int, sampler: TrainSampler, say: Say) -> dict[str, object]:
        """Set the position in the schedules of the weights; returns weights and rows for the log."""
        assert isinstance(sampler, BatchSampler)
        self._epoch = epoch
        weights = self.objective.objective.weights(float(epoch), float(self.config.epochs))
        record = {f"{name}/weight": weight for name, weight in weights.items()}
        return {"sampler": "random", "rows": sampler.n, "reviews": len(self.data.train)} | record

    # -- model and loss --------------------------------------------------------------------------------------
    def build_model(self) -> AspectModel:
        """A fresh model."""
        config, scheme = self.config, self.scheme
        return AspectModel(
            self.tower.build(),
            len(scheme.aspects),
            scheme.classes,
            projection_dim=config.projection_dim if config.contrastive != "none" else 0,
            dropout=config.head_dropout,
        )

    def read_weights(self, weights: Json) -> Json:
        """Also those of versions in which the encoder was no tower's: a network over words had a name less."""
        return {
            f"encoder.network.{name.removeprefix('encoder.')}"
            if str(name).startswith("encoder.") and not name.startswith("encoder.network.")
            else name: value
            for name, value in weights.items()
        }

    def parameter_groups(self, model: nn.Module) -> list[Json]:
        """Weight decay for matrices that are no embeddings; a pretrained encoder has its own learning rate."""
        assert isinstance(model, AspectModel)
        rate = self.tower.lr
        tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        groups: list[Json] = []
        for parameters, lr in ((model.encoder.parameters(), rate), (model.heads(), None)):
            trained = [p for p in parameters if p.requires_grad]
            plain = [p for p in trained if p.ndim < 2 or any(p is table for table in tables)]
            decayed = [p for p in trained if not any(p is other for other in plain)]
            for some, decay in ((decayed, self.config.weight_decay), (plain, 0.0)):
                if some:
                    own = {} if lr is None else {"lr": float(lr)}
                    groups.append({"params": some, "weight_decay": decay} | own)
        return groups

    def encode(self, model: AspectModel, batch: Batch) -> dict[str, Tensor]:
        """A review as one vector for each aspect (b, A, d)."""
        return {"aspects": model.encode(cast(TokenBatch, batch["text"]))}

    def loss_of(self, model: AspectModel, embeddings: Mapping[str, Tensor], batch: Batch) -> StepOutput:
        """The objective; its terms' shares of the gradient are measured on the review's vectors, their common input."""
        aspects = embeddings["aspects"]
        objective = self.objective.to(aspects.device)
        loss = objective(
            model.classify(aspects),
            model.project(aspects),
            batch.tensor("codes"),
            self._epoch,
            self.config.epochs,
        )
        return StepOutput(loss, objective.record, lambda: objective.shares([aspects]))

    def embed(self, model: AspectModel, batch: Batch) -> dict[str, Tensor]:
        """Probabilities (b, A, C), and the review as one vector, the mean over its aspects."""
        aspects = self.encode(model, batch)["aspects"]
        return {
            "review": aspects.mean(dim=1).float(),
            "probabilities": model.classify(aspects).float().softmax(dim=-1),
        }

    # -- evaluation ------------------------------------------------------------------------------------------
    def average(self, outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The mean of the probabilities; vectors are concatenated, since models may differ in their length."""
        return {
            "review": torch.cat([nn.functional.normalize(each["review"], dim=1) for each in outputs], dim=1),
            "probabilities": torch.stack([each["probabilities"] for each in outputs]).mean(dim=0),
        }

    def calibrate(self, outputs: Callable[[str], Mapping[str, Tensor]], say: Say) -> None:
        """Choose thresholds on the split that is reserved for it, never on the reported one."""
        split = self.data.threshold_split
        kind = self.config.thresholds if split is not None else "none"
        if split is None or kind == "none":
            say("thresholds: none chosen; an aspect counts as mentioned from a probability of one half on")
            return
        probabilities = outputs(split)["probabilities"].double().numpy()
        truth = self.data.splits[split].array("codes")
        self.decision = choose_decision(kind, truth, probabilities, split, self._weights)
        say(f"thresholds: chosen on {split} ({kind})")

    def _scores(self, split: str, codes: np.ndarray, probabilities: np.ndarray | None, final: bool) -> Scores:
        part = self.data.splits[split]
        return score_split(
            part.array("codes"),
            codes,
            self.data.scheme,
            probabilities,
            self._usual,
            split=self.content_hash(part),
            bootstrap=self.config.bootstrap if final else 0,
        )

    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """All scores of the split; in the final evaluation also those of the linear baseline."""
        probabilities = outputs["probabilities"].double().numpy()
        scores = self._scores(split, self.decision.codes(probabilities), probabilities, final)
        facts: dict[str, object] = {}
        if final:
            self._linear_estimates[split] = self._scores(split, self._linear[split], None, final).estimates
            overall = {
                where: {
                    name: e.to_dict() | {"name": LINEAR} for name, e in every.items() if name.count("/") < 2
                }
                for where, every in self._linear_estimates.items()
            }
            facts = {
                "baselines": overall,
                "decision": self.decision.to_dict(self.data.scheme.aspects),
                "reported": self.data.reported,
            }
        return Evaluation(split, scores.estimates, self.data.splits[split].ids, scores.per_item, facts)

    def report_sections(self, outputs: Mapping[str, Tensor], split: str) -> list[Section]:
        """Comparison with the linear baseline, confusion tables, calibration, reviews with the largest loss."""
        part, scheme = self.data.splits[split], self.data.scheme
        truth = part.array("codes")
        probabilities = outputs["probabilities"].double().numpy()
        codes = self.decision.codes(probabilities)
        estimates = self._scores(split, codes, probabilities, final=True).estimates
        return [
            baseline_section(estimates, self._linear_estimates[split], LINEAR, scheme.aspects),
            confusion_section(truth, codes, scheme),
            calibration_section(truth, probabilities),
            hardest_section(part.texts("text"), truth, probabilities, codes, scheme),
        ]

    def save_assets(self, folder: Path) -> None:
        """The fitted text tower, the aspects, and the decision as far as it is made."""
        self.tower.save(folder / "towers" / "text")
        write_scheme(folder, self.scheme, self.decision)

    def save_results(self, folder: Path) -> None:
        """The thresholds that were chosen."""
        write_scheme(folder, self.scheme, self.decision)

    # -- use of a trained run --------------------------------------------------------------------------------
    def load_assets(self, folder: Path) -> None:
        """Tower, aspects and decision; of a run of version 0.1 from its text encoder, layout and metrics."""
        self.scheme, self.decision = read_scheme(folder, self.config.logit_adjustment)
        place = folder / "towers" / "text"
        if place.is_dir():
            tower = load_tower(place)
            assert isinstance(tower, TextTower)
            self.tower = tower
            return
        self.tower = text_tower(**self.config.text_encoder, run_lr=self.config.lr)
        if self.tower.encoder_kind == "words":
            self.tower.encoder = WordTextEncoder.load(folder / "text_encoder")

    def load_results(self, folder: Path) -> None:
        """The decision of an ensemble, chosen for the average of its members."""
        if (folder / SCHEME_FILE).is_file():
            scheme, self.decision = read_scheme(folder, self.config.logit_adjustment)
        else:
            scheme, self.decision = self.scheme, read_decision(folder, self.scheme) or self.decision
        if scheme != self.scheme:
            raise NearfarError(f"{folder}: its aspects are not those of its members.")

    @property
    def towers(self) -> dict[str, Tower]:  # type: ignore[override]
        """The tower of the only view, the text."""
        return {"text": self.tower}

    def embed_view(self, model: AspectModel, view: str, field: Field) -> Tensor:
        """The review as one vector, the mean over its aspects."""
        return model.encode(cast(TokenBatch, field)).mean(dim=1)

    def view_dim(self, model: AspectModel, view: str) -> int:
        return int(cast(int, model.encoder.width))

    def new_items(self, source: NewData) -> Iterator[Items]:
        """Reviews of a table, an XML file or a corpus (their labels are not needed): see `read_reviews`."""
        data = self.config.data
        text, identity = column_name(data.text_column), column_name(data.id_column)
        return read_reviews(
            source,
            [*([] if text is None else [text]), *TEXT_COLUMNS],
            [*([] if identity is None else [identity]), *ID_COLUMNS],
        )

    def usable(self, items: Items) -> Items:
        """The items without those whose text is empty."""
        return usable_reviews(items)

    def new_dataset(self, items: Items) -> ItemDataset:
        return ItemDataset({"text": self.tower.read(items.texts("text"))})

    def predictions(self, outputs: Mapping[str, Tensor], items: Items) -> Mapping[str, Sequence[object]]:
        """The aspects that each review mentions and their polarity, with probabilities: see `answer_columns`."""
        return answer_columns(self.scheme, self.decision, outputs["probabilities"].double().numpy())
