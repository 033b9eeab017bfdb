"""The molecule system: pairs of molecules and texts, two towers, retrieval in both directions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from nearfar.batching import BatchSampler, Neighbors, nearest_neighbors
from nearfar.config.samplers import Items
from nearfar.contrast import DuplicateMask, Mask, SimilarityMask, join_masks
from nearfar.data.cache import cached_arrays, content_key
from nearfar.data.splits import column_name, data_paths
from nearfar.errors import NearfarError
from nearfar.losses import InfoNCELoss
from nearfar.metrics import Estimate, batch_signals, rank_estimates, retrieval_ranks
from nearfar.models.molecules.smiles import quiet_rdkit
from nearfar.models.text import TextEncoder, build_text_encoder, embed_texts, save_text_encoder
from nearfar.systems.molecules.data import MoleculeData, load_embedded, load_files
from nearfar.systems.molecules.dataset import MoleculeBatch, MoleculeDataset, MoleculeFeatures
from nearfar.systems.molecules.model import MoleculeTextModel
from nearfar.systems.molecules.options import MoleculeOptions
from nearfar.systems.molecules.records import MoleculeSplit
from nearfar.training.batches import (
    LIKELY_FALSE_NEGATIVE,
    build_sampler,
    check_batches,
    epoch_record,
    neighbors_needed,
)
from nearfar.training.sections import retrieval_examples
from nearfar.training.system import Evaluation, Say, StepOutput, System, TrainSampler

__all__ = ["MoleculeSystem", "draw", "molecule_examples"]


def draw(smiles: str, width: int = 220, height: int = 160) -> str:
    """A molecule as an SVG element.

    >>> draw("CCO").startswith("<svg")
    True
    """
    from rdkit import Chem
    from rdkit.Chem.Draw import rdMolDraw2D

    with quiet_rdkit():
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        return ""
    drawer = rdMolDraw2D.MolDraw2DSVG(width, height)
    options: Any = drawer.drawOptions()  # RDKit's stubs give its fields the wrong types
    options.clearBackground = False
    options.bondLineWidth = 1
    with quiet_rdkit():
        rdMolDraw2D.PrepareAndDrawMolecule(drawer, molecule)
    drawer.FinishDrawing()
    text: str = drawer.GetDrawingText()
    return text[text.index("<svg") :].strip()


def molecule_examples(
    split: MoleculeSplit, texts: Float[Tensor, "n d"], molecules: Float[Tensor, "n d"]
) -> list[dict[str, object]]:
    """Texts with their nearest molecules: right, nearly right and wrong ones."""

    def shown(position: int) -> dict[str, object]:
        smiles = split.smiles[position]
        return {"text": split.texts[position], "smiles": smiles, "svg": draw(smiles)}

    return retrieval_examples(texts, molecules, shown, shown)


KS = (1, 5, 10)
DIRECTIONS = ("text_to_molecule", "molecule_to_text")


class MoleculeSystem(System[MoleculeBatch, MoleculeTextModel]):
    """Trains a molecule encoder (and a head over frozen text embeddings) for retrieval in both directions."""

    name = "molecules"
    monitor = "text_to_molecule/MRR"

    config: MoleculeOptions

    def __init__(self, config: MoleculeOptions) -> None:
        self.config = config
        self.features = MoleculeFeatures.from_config(config)
        self.loss = InfoNCELoss(temperature=config.temperature, symmetric=config.loss.symmetric)
        self.data: MoleculeData
        self.text_encoder: TextEncoder
        self.neighbors: Neighbors
        self._directions: np.ndarray  # of the training texts, see text_directions
        self.datasets: dict[str, MoleculeDataset] = {}

    # -- data ------------------------------------------------------------------------------------------------
    def prepare(self, say: Say) -> None:
        """Read and check the data, fit or load the text encoder, featurise, find neighbours."""
        config = self.config
        self.data = self.load_data(say)
        say(self.data.summary())
        train = self.data.train
        if len(train) > 5000:
            say(
                "reading texts and molecules; the first time this takes a minute or two, afterwards it is in the cache"
            )
        self.text_encoder = build_text_encoder(**config.text_encoder).fit(train.texts)
        say(f"text encoder: {self.text_encoder.description}")
        for name, split in self.data.splits.items():
            self.datasets[name] = self.features.dataset(
                split,
                embed_texts(self.text_encoder, split.texts),
                mask_atoms=config.augment_atoms if name == "train" else 0.0,
                mask_bonds=config.augment_bonds if name == "train" else 0.0,
                seed=config.seed,
            )
        self._directions = text_directions(self.datasets["train"].text.numpy(), say)
        k = neighbors_needed(config, len(train))
        self.neighbors = cached_neighbors(self._directions, k, train.ids)

    def load_data(self, say: Say) -> MoleculeData:
        """The splits, from the configured files or the embedded set; fits and featurises nothing."""
        data = self.config.data
        paths = data_paths(data)
        if paths["train"] is None:
            say("data: the embedded set (names from the package chemicals); give data.train= for your own")
            return load_embedded(n=data.embedded_size, seed=data.split_seed)
        return load_files(
            paths["train"],
            paths["val"],
            paths["test"],
            smiles_column=column_name(data.smiles_column),
            text_column=column_name(data.text_column),
            id_column=column_name(data.id_column),
            encoding=data.encoding,
            val_fraction=data.val_fraction,
            val_split=data.val_split,
            seed=data.split_seed,
        )

    def layout(self) -> dict[str, object]:
        """Counts, rejections, hashes, and which encoders are really used."""
        return self.data.layout() | {
            "data_hash": self.content_hash(*self.data.splits.values()),
            "text_encoder": {
                "kind": self.text_encoder.kind,
                "name": self.text_encoder.name,
                "description": self.text_encoder.description,
                "dimensions": int(self.datasets["train"].text.shape[1]),
            },
            "molecule_encoder": self.features.description,
            "neighbors": {
                "k": self.neighbors.k,
                "exact": self.neighbors.exact,
                "index": self.neighbors.index,
                "recall": self.neighbors.recall,
            },
        }

    @staticmethod
    def content_hash(*splits: MoleculeSplit) -> str:
        """A hash of the content of splits: sixteen hexadecimal digits of ids, structures and texts, in order.

        Ids alone are not enough: two versions of a file may have the same ids, as have files that number their rows.
        """
        return content_key(*([s.ids, s.smiles, s.texts] for s in splits))[:16]

    # -- batches ---------------------------------------------------------------------------------------------
    def build_sampler(self) -> BatchSampler:
        """The sampler that the configuration names."""
        train = self.data.train
        items = Items(len(train), self.neighbors, labels=lambda: _scaffold_labels(train))
        return build_sampler(self.config, items)

    def on_epoch(self, epoch: int, sampler: TrainSampler, say: Say) -> dict[str, object]:
        """Apply schedules and measure how hard the resulting batches are."""
        return epoch_record(self.config, epoch, sampler, self.neighbors, say)

    def check_sampler(self, sampler: TrainSampler, say: Say) -> None:
        """The A/A check of the first hard epoch."""
        check_batches(self.config, sampler, self._directions, say)

    # -- model and loss --------------------------------------------------------------------------------------
    def build_model(self) -> MoleculeTextModel:
        """Molecule encoder and text head of the configured kind."""
        text_dim = int(self.datasets["train"].text.shape[1])
        return MoleculeTextModel.from_config(self.config, text_dim, self.features.fingerprint_dim)

    def encode(self, model: MoleculeTextModel, batch: MoleculeBatch) -> dict[str, Tensor]:
        """Both embeddings of every pair."""
        return {"molecules": model.encode_molecules(batch), "texts": model.encode_texts(batch.text)}

    def loss_of(
        self, model: MoleculeTextModel, embeddings: Mapping[str, Tensor], batch: MoleculeBatch
    ) -> StepOutput:
        """InfoNCE in both directions; duplicates and likely false negatives are no negatives."""
        molecules, texts = embeddings["molecules"], embeddings["texts"]
        mask, scale, memory = self._mask(batch), model.scale(), model.memory
        if memory is None:
            return StepOutput(self.loss(molecules, texts, mask, scale), lambda: self._record(batch, mask))
        negatives, left_out = None, None
        if memory.filled:
            config = self.config
            negatives = (memory.texts.rows(), memory.molecules.rows() if self.loss.symmetric else None)
            both = memory.left_out(batch, config.mask_duplicates, config.false_negative_threshold)
            left_out = (both, both if self.loss.symmetric else None)
        loss = self.loss(molecules, texts, mask, scale, negatives, left_out)
        age = memory.age()
        memory.push(molecules, texts, batch)
        return StepOutput(loss, lambda: self._record(batch, mask) | {"memory_age": age.item()})

    def _record(self, batch: MoleculeBatch, mask: Mask | None) -> dict[str, float]:
        """The loss's record, and the shares of copies and likely false negatives among the batch's negatives."""
        assert self.loss.record is not None
        record = self.loss.record.to_dict()
        # Embeddings have unit length: no logit is beyond the scale.
        record["largest_logit"] = record["scale"]
        threshold = self.config.false_negative_threshold
        threshold = LIKELY_FALSE_NEGATIVE if threshold is None else threshold
        likely = SimilarityMask(batch.text, threshold)
        return record | batch_signals(join_masks(_same_content(batch)), likely, left_out=mask)

    def _mask(self, batch: MoleculeBatch) -> Mask | None:
        """Pairs that are no negatives, as a mask computed tile by tile; the loss always keeps a row's own partner."""
        masks = _same_content(batch) if self.config.mask_duplicates else []
        if self.config.false_negative_threshold is not None:
            masks.append(SimilarityMask(batch.text, self.config.false_negative_threshold))
        return join_masks(masks)

    # -- evaluation ------------------------------------------------------------------------------------------
    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """Retrieval in both directions with the whole split as gallery."""
        part = self.data.splits[split]
        ranks = retrieval_ranks(outputs["texts"], outputs["molecules"], both=True)
        estimates: dict[str, Estimate] = {}
        per_item: dict[str, np.ndarray] = {}
        for direction, direction_ranks in zip(DIRECTIONS, ranks, strict=True):
            numbers = rank_estimates(
                direction_ranks,
                KS,
                bootstrap=self.config.bootstrap if final else 0,
                split=self.content_hash(part),
            )
            estimates |= {f"{direction}/{name}": estimate for name, estimate in numbers.items()}
            per_item |= {f"{direction}/R@{k}": direction_ranks.hits(k) for k in KS}
            per_item[f"{direction}/MRR"] = direction_ranks.reciprocal()
        return Evaluation(split, estimates, part.ids, per_item)

    def report_examples(self, outputs: Mapping[str, Tensor], split: str) -> list[dict[str, object]]:
        """Texts with their nearest molecules: right, nearly right and wrong ones."""
        return molecule_examples(self.data.splits[split], outputs["texts"], outputs["molecules"])

    def save_assets(self, folder: Path) -> None:
        """The fitted text encoder, without which new texts could not be embedded."""
        save_text_encoder(self.text_encoder, folder / "text_encoder")


def _same_content(batch: MoleculeBatch) -> list[Mask]:
    """Pairs of rows with the same structure, or the same text."""
    return [DuplicateMask(batch.structure_group), DuplicateMask(batch.text_group)]


def cached_neighbors(directions: Float[np.ndarray, "n d"], k: int, ids: list[str]) -> Neighbors:
    """``nearest_neighbors``, cached by content.

    The cache saves time, and a resumed run needs exactly the same list: with a different number of threads rounding
    may swap two neighbours of nearly equal similarity.
    """

    def search() -> dict[str, np.ndarray]:
        neighbors = nearest_neighbors(directions, k)
        assert neighbors.similarities is not None
        how = {
            "exact": neighbors.exact,
            "index": neighbors.index,
            "recall": neighbors.recall,
            "queries": neighbors.queries,
        }
        return {
            "indices": neighbors.indices,
            "similarities": neighbors.similarities,
            "how": np.array(json.dumps(how)),
        }

    kept = cached_arrays("neighbors", [1, directions, k], search)
    how = json.loads(str(kept["how"]))
    return Neighbors(kept["indices"], kept["similarities"], np.asarray(ids), **how)


def text_directions(text: Float[np.ndarray, "n d"], say: Say) -> Float[np.ndarray, "n d"]:
    """Text embeddings without rows of zeros: a text without a known term gets a random direction.

    In many dimensions a random direction is near to no other. If more than half of the texts have no known term, the
    text encoder does not suit these texts: an error.
    """
    unknown = ~text.any(axis=1)
    count = int(unknown.sum())
    if not count:
        return text
    if count > len(text) / 2:
        raise NearfarError(
            f"{count} of {len(text)} training texts hold no term that the text encoder kept. Terms in nearly all texts "
            "or in one alone are left out: try text_encoder.max_df=1.0, text_encoder.min_df=1, or a different "
            "text_encoder."
        )
    say(
        f"{count} of {len(text)} training texts hold no term that the text encoder kept; they have no real neighbours"
    )
    directions = text.copy()
    directions[unknown] = np.random.default_rng(0).standard_normal((count, text.shape[1])).astype(text.dtype)
    return directions


def _scaffold_labels(split: MoleculeSplit) -> np.ndarray:
    """Scaffolds as classes: the balanced sampler then draws rare ring systems as often as benzene."""
    return np.unique(split.scaffolds, return_inverse=True)[1]
