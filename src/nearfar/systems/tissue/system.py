"""The tissue system: image patches and gene expression of spots, trained by contrast with spatial targets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.batching import Plan, positions_in_batch, weight_in_batch
from nearfar.batching.base import BatchSampler
from nearfar.data.augment import SquareSymmetries
from nearfar.data.batch import Augment, Batch, Draw, Inputs, Rows
from nearfar.data.chunks import NewData
from nearfar.data.files import Json, Maybe, read_json, read_names
from nearfar.data.items import Items
from nearfar.data.slides.anndata_writer import AnnDataWriter
from nearfar.data.slides.new_slides import LACKING, NEW_OPTIONS, Reading, read_slides
from nearfar.data.slides.tissue import items_of
from nearfar.errors import NearfarError
from nearfar.losses import ClipLoss, SpatialLoss
from nearfar.models.views import ViewModel, build_head
from nearfar.systems.new_items import prepare_again
from nearfar.systems.tissue.data import TissueData, load_data
from nearfar.systems.tissue.evaluation import Evaluator, References
from nearfar.systems.tissue.options import TissueOptions
from nearfar.systems.tissue.report import examples, sections
from nearfar.systems.view_system import PRESENT, ViewSystem
from nearfar.towers import Tower
from nearfar.towers.base import Backbone
from nearfar.towers.expression import ExpressionTower
from nearfar.towers.image import ImageTower
from nearfar.training.evaluation import consecutive
from nearfar.training.sections import Section
from nearfar.training.system import Evaluation, Say, StepOutput, TrainSampler, decayed_groups

__all__ = ["TissueSystem", "expression_tower", "image_tower"]

READING = "tissue.json"


def _side(value: object) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 2**14:
        return None
    return f"is {str(value)[:40]!r}, and a number of pixels is expected"


READING_SHAPE = {
    "size": {"height": _side, "width": _side},
    "patch": {"field": Maybe(str), "jpg_quality": Maybe(int)},
    "expression": {"target_sum": Maybe(float)},
}
#: how the names of weights began in earlier versions, and how they begin now
_EARLIER = {
    "encoder.encoder.": "towers.image.",
    "image_features.": "towers.image.",
    "gene_features.": "towers.gene.",
    "image.": "heads.image.",
    "gene.": "heads.gene.",
}


def image_tower(config: TissueOptions) -> ImageTower:
    """The tower of patches that the options describe: frozen or trained, patches at their own size or resized."""
    options = dict(config.image_encoder)
    kind, model, frozen = str(options.pop("kind")), options.pop("name", None), config.image_frozen
    if frozen is None:
        frozen = kind == "colors" or bool(options.get("pretrained", kind != "small"))
    size: int | Literal["own"] = "own" if config.image_pixels is None else config.image_pixels
    train: Backbone = "head" if frozen else "full"
    return ImageTower(
        kind,
        model=model,
        train=train,
        size=size,
        lr=None if frozen else config.lr,
        seed=config.seed,
        **options,
    )


def expression_tower(config: TissueOptions, genes: Sequence[str]) -> ExpressionTower:
    """The tower of expression that the options describe, over these genes."""
    if config.gene_encoder == "mlp":
        return ExpressionTower("numbers", genes)
    options = dict(config.text_encoder)
    text = {"encoder": options.pop("kind"), "train": "head", **options}
    return ExpressionTower("sentences", genes, config.sentence_genes, text)


class TissueSystem(ViewSystem):
    """Trains two towers, over patches and over expression, to match the two views of a spot."""

    name = "tissue"
    monitor = "image_to_gene/MRR"

    config: TissueOptions  # type: ignore[assignment]  # no options of a ViewLoss: neighbours are those in space
    data: TissueData
    evaluator: Evaluator
    new_options = NEW_OPTIONS

    def __init__(self, config: TissueOptions) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        #: the training spots, once they were embedded by the best weights, or loaded
        self.references: References | None = None
        self._reading: Reading | None = None
        self._folder: Path | None = None
        self._whole: TissueSystem | None = None

    # -- data ------------------------------------------------------------------------------------------------
    def prepare(self, say: Say) -> None:
        """Read the slides, compute or load frozen features, embed gene sentences."""
        super().prepare(say)
        if self.config.loss.name == "clip":
            say("loss=clip: neighbors, neighbor_alpha_scale and temp_reg_weight have no effect")
        self.evaluator = Evaluator(self.config, self.data)

    def load_data(self, say: Say) -> TissueData:
        """The splits, from shards or generated; computes no features."""
        return load_data(self.config.data, say)

    def load_items(self, say: Say) -> dict[str, Items]:
        self.data = self.load_data(say)
        say(self.data.summary())
        return {name: items_of(tissue, self.data.source) for name, tissue in self.data.splits.items()}

    def own_data(self, say: Say) -> tuple[dict[str, Items], str]:
        self._read(say)
        return self.splits, self.data.hash_of()

    def build_towers(self, say: Say) -> dict[str, Tower]:
        return {"image": image_tower(self.config), "gene": expression_tower(self.config, self.data.genes)}

    def readable(self, items: Items) -> Items:
        return items  # the readers of slides have rejected what no tower reads

    def value_groups(self, view: str) -> None:
        return None  # equal patches, such as empty ones, are negatives; only neighbours are not

    def further_inputs(self, split: str, items: Items) -> dict[str, Inputs]:
        """The spatial neighbours of each spot, as positions in the split (-1 for none), and their weights."""
        tissue = self.data.splits[split]
        return {
            "neighbors": Rows(np.asarray(tissue.neighbors, np.int64)),
            "alpha": Rows(np.asarray(tissue.alpha, np.float32)),
        }

    def augment(self) -> Augment | None:
        tower = self.towers["image"]
        if not self.config.augment or tower.train != "full":
            return None
        height, width = self.data.splits["train"].patches.shape[1:3]
        if height != width and self.config.image_pixels is None:
            raise NearfarError(
                f"patches of {height} × {width} pixels cannot be turned: they are no squares. Set augment=false, or "
                "bring them to a square with image_pixels=."
            )
        return _turned

    def layout(self) -> Json:
        """Counts, hashes, and which encoders are really used."""
        described = {view: tower.description for view, tower in self.towers.items()}
        encoders = {"image_encoder": described["image"], "gene_encoder": described["gene"]}
        return self.data.layout() | {"views": described} | encoders

    # -- batches ---------------------------------------------------------------------------------------------
    def labels(self) -> np.ndarray:
        return self.data.splits["train"].slides

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        train = self.data.splits["train"]
        return train.positions, train.slides

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
    def build_loss(self) -> ClipLoss | SpatialLoss:
        config = self.config
        if config.loss.name == "clip":
            return ClipLoss(max_scale=config.max_scale)
        return SpatialLoss(
            config.neighbor_alpha_scale, config.temp_reg_weight, config.neighbors, max_scale=config.max_scale
        )

    def build_head(self, tower: Tower, view: str, width: int, dim: int) -> nn.Module:
        config = self.config
        return build_head("mlp", width, dim, hidden=config.hidden, dropout=config.dropout, norm="layer")

    def model_options(self, dim: int) -> Json:
        config = self.config  # the loss clamps the scale, and records that it does
        return {
            "temperature": config.temperature,
            "learn_temperature": config.learn_temperature,
            "max_scale": None,
        }

    def parameter_groups(self, model: nn.Module) -> list[Json]:
        return decayed_groups(model, self.config.weight_decay)

    def read_weights(self, weights: Json) -> Json:
        """Weights by today's names; a temperature that does not learn is an option and none of them."""
        config = self.config
        start = {"log_scale": torch.tensor(-math.log(config.temperature))} if config.learn_temperature else {}
        kept = {
            key: value for key, value in weights.items() if key != "log_scale" or config.learn_temperature
        }
        return start | {_renamed(key): value for key, value in kept.items()}

    def scale(self, model: ViewModel) -> Tensor:
        """1 / temperature; the loss clamps it at ``max_scale``."""
        scale = model.scale()
        if scale is not None:
            return scale
        return next(model.parameters()).new_tensor(1.0 / self.config.temperature)

    def encode(self, model: ViewModel, batch: Batch) -> dict[str, Tensor]:
        """Both embeddings of every spot; of new spots those of the views that they have."""
        return {
            f"{view}s": model.encode(view, batch[view], self._present(batch, view))
            for view in ("image", "gene")
            if view in batch
        }

    @staticmethod
    def _present(batch: Batch, view: str) -> Tensor | None:
        return batch.tensor(f"{PRESENT}{view}") if f"{PRESENT}{view}" in batch else None

    def embed(self, model: ViewModel, batch: Batch) -> dict[str, Tensor]:
        """The embeddings, and the scale at which the model reads their cosines."""
        if self._folder is not None and self.references is None:  # not kept with the run
            self.references = self._prepared().references_of(model)
        scale = self.scale(model).clamp(max=self.config.max_scale)
        return self.encode(model, batch) | {"scale": scale.expand(len(batch))}

    def loss_of(self, model: ViewModel, embeddings: Mapping[str, Tensor], batch: Batch) -> StepOutput:
        """The loss of CLIP, or with targets that give neighbours a share."""
        images, genes, scale = embeddings["images"], embeddings["genes"], self.scale(model)
        if self.config.loss.name == "clip":
            return StepOutput(self.loss(images, genes, scale), self._numbers)
        index = positions_in_batch(batch.tensor("neighbors"), batch.positions)
        return StepOutput(self.loss(images, genes, scale, index, batch.tensor("alpha")), self._numbers)

    def _numbers(self) -> dict[str, float]:
        last = cast(ClipLoss | SpatialLoss, self.loss).record
        assert last is not None
        record: dict[str, float] = last.to_dict()
        return record | {"largest_logit": record["scale"]}  # embeddings have unit length

    # -- evaluation ------------------------------------------------------------------------------------------
    @torch.no_grad()
    def before_evaluation(self, model: ViewModel, split: str, final: bool) -> None:
        """Embed the expression of the training spots, from which that of others is predicted."""
        self.evaluator.references = self.references_of(model).embeddings

    @torch.no_grad()
    def references_of(self, model: ViewModel) -> References:
        """The training spots, embedded by ``model``."""
        device = next(model.parameters()).device
        genes = self.datasets["train"].inputs["gene"]
        parts = [torch.tensor(positions) for positions in consecutive(len(genes), 4096)]
        embeddings = torch.cat(
            [model.encode("gene", genes.batch(part).to(device)).float().cpu() for part in parts]
        )
        train = self.data.splits["train"].expression
        return References(embeddings, train, min(self.config.retrieve, len(train)))

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
        """Both towers, the names of the genes in order, how slides were read; once they are known, the references."""
        super().save_assets(folder)
        reading = self.reading
        (folder / "genes.txt").write_text("\n".join(reading.genes) + "\n", encoding="utf-8")
        height, width = reading.size
        about = {
            "size": {"height": height, "width": width},
            "patch": dict(reading.patch),
            "expression": dict(reading.expression),
        }
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        (folder / READING).write_text(text, encoding="utf-8")
        if self.references is not None:
            self.references.save(folder)

    def save_results(self, folder: Path) -> None:
        """The training spots, from which expression of new patches is predicted, up to 512 MB of their expression."""
        train = self.data.splits["train"].expression
        self.references = References(self.evaluator.references, train, self.evaluator.retrieve)
        if not self.references.save(folder):
            self._say(
                f"expression of the training spots takes {train.nbytes / 1e6:.0f} MB and is not kept with the run: "
                "predictions for new slides will read it from data.dir"
            )

    @property
    def reading(self) -> Reading:
        """How slides are read."""
        if self._reading is None:
            train = self.data.splits["train"]
            height, width = train.patches.shape[1:3]
            of_shards = self.data.reading
            self._reading = Reading(
                self.data.genes,
                (int(height), int(width)),
                of_shards.get("patch", {}),
                of_shards.get("expression", {}),
                int(self.config.trainer.eval_batch_size),
            )
        return self._reading

    # -- use of a trained run --------------------------------------------------------------------------------
    def load_assets(self, folder: Path) -> None:
        """Towers, genes, references; what an earlier version did not keep is made anew from the run's data, if it is
        there."""
        self._folder = folder
        if (folder / "towers").is_dir():
            super().load_assets(folder)
        else:
            self.towers = self._prepared().towers
        if (folder / READING).is_file():
            about = read_json(folder / READING, READING_SHAPE)
            genes = read_names(folder / "genes.txt", "gene")
            size = (about["size"]["height"], about["size"]["width"])
            batch = int(self.config.trainer.eval_batch_size)
            self._reading = Reading(genes, size, about["patch"], about["expression"], batch)
        else:
            self._reading = self._prepared().reading
        self.references = References.load(folder, len(self.reading.genes))

    def _prepared(self) -> TissueSystem:
        """The same with the data of its run read anew."""
        assert self._folder is not None
        if self._whole is None:
            self._whole = TissueSystem(self.config)
            prepare_again(self._whole, self._folder, "all that new slides need (towers, references)")
        return self._whole

    def new_items(self, source: NewData) -> Iterator[Items]:
        """Spots of shards, slides or an h5ad file (`read_slides`); or patches that are pictures: a folder, or a table
        with a column ``image``."""
        slides = read_slides(source, self.reading)
        return super().new_items(source) if slides is None else map(self.usable, slides)

    def view_headers(self) -> dict[str, Sequence[str]]:
        return {"image": ["image", "patch", "file_name"], "gene": ["gene", "expression"]}

    def predicts_from(self) -> Sequence[str]:
        return ["image"]

    def predictions(self, outputs: Mapping[str, Tensor], items: Items) -> dict[str, Sequence[object]]:
        """log1p expression of each gene, from the patches; ``slide``, ``x`` and ``y`` where they are known."""
        if "images" not in outputs:
            why = items.notes.get(LACKING, {}).get("image", "there is no column 'image'")
            raise NearfarError(
                f"expression is predicted from patches, and {why}. nearfar embed --tower gene embeds expression."
            )
        assert self.references is not None
        columns: dict[str, Sequence[object]] = {}
        if "slide" in items:
            columns["slide"] = list(items["slide"])
        if "position" in items:
            x, y = items.array("position").T.tolist()
            columns |= {"x": x, "y": y}
        predicted = self.references.predict(outputs["images"]).astype(np.float32)
        columns |= {
            gene: cast(Sequence[object], predicted[:, at]) for at, gene in enumerate(self.reading.genes)
        }
        return columns

    def prediction_writer(self, output: Path, source: NewData) -> AnnDataWriter | None:
        """AnnData for ``.h5ad``."""
        if output.suffix.lower() != ".h5ad":
            return None
        about = {"run": str(self._folder and self._folder.resolve().name), "source": str(source.path)}
        return AnnDataWriter(output, self.reading.genes, about)


def _turned(batch: Batch, draw: Draw) -> Batch:
    """Each patch turned and mirrored at random: tissue has no upright."""
    return batch.replaced(image=SquareSymmetries()(batch.tensor("image"), draw.numpy()))


def _renamed(key: str) -> str:
    for earlier, now in _EARLIER.items():
        if key.startswith(earlier):
            return now + key.removeprefix(earlier)
    return key
