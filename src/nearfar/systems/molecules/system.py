"""The molecule system: pairs of molecules and texts, two towers, retrieval in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.batching import Neighbors, nearest_neighbors
from nearfar.config.samplers import Items
from nearfar.contrast import DuplicateMask, Mask, SimilarityMask, join_masks
from nearfar.data.cache import cached_arrays, content_key
from nearfar.data.splits import column_name, data_paths
from nearfar.errors import NearfarError
from nearfar.losses import InfoNCELoss
from nearfar.metrics import Estimate, batch_signals, rank_estimates, retrieval_ranks
from nearfar.models.text import TextEncoder, build_text_encoder, embed_texts, save_text_encoder
from nearfar.systems.molecules.data import (
    MoleculeData,
    MoleculeDataset,
    MoleculeSplit,
    load_embedded,
    load_files,
)
from nearfar.systems.molecules.dataset import MoleculeFeatures
from nearfar.systems.molecules.model import MoleculeTextModel
from nearfar.systems.molecules.options import MoleculeOptions
from nearfar.systems.molecules.smiles import quiet_rdkit
from nearfar.training.batches import (
    LIKELY_FALSE_NEGATIVE,
    build_sampler,
    check_batches,
    epoch_record,
    neighbors_needed,
)
from nearfar.training.sections import retrieval_examples
from nearfar.training.system import Evaluation, StepOutput, System

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
) -> list[dict[str, Any]]:
    """Texts with the molecules found for them: right, nearly, wrong."""

    def shown(position: int) -> dict[str, Any]:
        smiles = split.smiles[position]
        return {"text": split.texts[position], "smiles": smiles, "svg": draw(smiles)}

    return retrieval_examples(texts, molecules, shown, shown)


Say = Callable[[str], None]
KS = (1, 5, 10)
DIRECTIONS = ("text_to_molecule", "molecule_to_text")


class MoleculeSystem(System):
    """Trains a molecule encoder (and a head over frozen text embeddings) so that pairs find each other."""

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

    def layout(self) -> dict[str, Any]:
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
        """Names the content of splits: sixteen hexadecimal digits of ids, structures and texts, in order.

        Ids alone would not tell two versions of a file apart, and files without ids number their rows alike.
        """
        return content_key(*([s.ids, s.smiles, s.texts] for s in splits))[:16]

    # -- batches ---------------------------------------------------------------------------------------------
    def build_sampler(self) -> Any:
        """The sampler that the configuration names."""
        train = self.data.train
        items = Items(len(train), self.neighbors, labels=lambda: _scaffold_labels(train))
        return build_sampler(self.config, items)

    def on_epoch(self, epoch: int, sampler: Any, say: Say) -> dict[str, Any]:
        """Apply schedules and measure the batches that come out of them."""
        return epoch_record(self.config, epoch, sampler, self.neighbors, say)

    def check_sampler(self, sampler: Any, say: Say) -> None:
        """The A/A check of the first hard epoch."""
        check_batches(self.config, sampler, self._directions, say)

    # -- model and loss --------------------------------------------------------------------------------------
    def build_model(self) -> nn.Module:
        """Molecule encoder and text head of the configured kind."""
        text_dim = int(self.datasets["train"].text.shape[1])
        return MoleculeTextModel.from_config(self.config, text_dim, self.features.fingerprint_dim)

    def encode(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """Both embeddings of every pair."""
        return {"molecules": model.encode_molecules(batch), "texts": model.encode_texts(batch.text)}

    def loss_of(self, model: Any, embeddings: Mapping[str, Tensor], batch: Any) -> StepOutput:
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

    def _record(self, batch: Any, mask: Mask | None) -> dict[str, float]:
        """The loss's record, and what it cannot know: copies and likely false negatives among the batch's negatives."""
        assert self.loss.record is not None
        record = self.loss.record.to_dict()
        # Embeddings have unit length: no logit is beyond the scale.
        record["largest_logit"] = record["scale"]
        threshold = self.config.false_negative_threshold
        threshold = LIKELY_FALSE_NEGATIVE if threshold is None else threshold
        likely = SimilarityMask(batch.text, threshold)
        return record | batch_signals(join_masks(_same_content(batch)), likely, left_out=mask)

    def _mask(self, batch: Any) -> Mask | None:
        """Pairs that are no negatives, a tile at a time; a row's own partner stays in whatever the mask says."""
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
        for direction, found in zip(DIRECTIONS, ranks, strict=True):
            numbers = rank_estimates(
                found, KS, bootstrap=self.config.bootstrap if final else 0, split=self.content_hash(part)
            )
            estimates |= {f"{direction}/{name}": estimate for name, estimate in numbers.items()}
            per_item |= {f"{direction}/R@{k}": found.hits(k) for k in KS}
            per_item[f"{direction}/MRR"] = found.reciprocal()
        return Evaluation(split, estimates, part.ids, per_item)

    def report_examples(self, outputs: Mapping[str, Tensor], split: str) -> list[dict[str, Any]]:
        """Texts with their nearest molecules: right, nearly, wrong."""
        return molecule_examples(self.data.splits[split], outputs["texts"], outputs["molecules"])

    def save_assets(self, folder: Path) -> None:
        """The fitted text encoder, without which new texts could not be embedded."""
        save_text_encoder(self.text_encoder, folder / "text_encoder")


def _same_content(batch: Any) -> list[Mask]:
    """Pairs of rows with the same structure, or the same text."""
    return [DuplicateMask(batch.structure_group), DuplicateMask(batch.text_group)]


def cached_neighbors(directions: Float[np.ndarray, "n d"], k: int, ids: list[str]) -> Neighbors:
    """``nearest_neighbors``, kept by content.

    Not only for the time: a resumed run must see the very same list, and a product computed by another number of
    threads may round two nearly equal neighbours into another order.
    """

    def search() -> dict[str, np.ndarray]:
        found = nearest_neighbors(directions, k)
        assert found.similarities is not None
        how = {"exact": found.exact, "index": found.index, "recall": found.recall, "queries": found.queries}
        return {
            "indices": found.indices,
            "similarities": found.similarities,
            "how": np.array(json.dumps(how)),
        }

    kept = cached_arrays("neighbors", [1, directions, k], search)
    how = json.loads(str(kept["how"]))
    return Neighbors(kept["indices"], kept["similarities"], np.asarray(ids), **how)


def text_directions(text: Float[np.ndarray, "n d"], say: Say) -> Float[np.ndarray, "n d"]:
    """Text embeddings fit for a cosine: rows of zeros, texts without a known term, get random directions.

    Such a text is near to nothing, and a random direction in many dimensions says just that. More than half of them
    is an error: then the text encoder does not suit these texts.
    """
    unknown = ~text.any(axis=1)
    count = int(unknown.sum())
    if not count:
        return text
    if count > len(text) / 2:
        raise NearfarError(
            f"{count} of {len(text)} training texts hold no term that the text encoder kept. Terms in nearly all texts "
            "or in one alone are left out: try text_encoder.max_df=1.0, text_encoder.min_df=1, or another text_encoder."
        )
    say(
        f"{count} of {len(text)} training texts hold no term that the text encoder kept; they are nobody's neighbour"
    )
    directions = text.copy()
    directions[unknown] = np.random.default_rng(0).standard_normal((count, text.shape[1])).astype(text.dtype)
    return directions


def _scaffold_labels(split: MoleculeSplit) -> np.ndarray:
    """Scaffolds as classes: the balanced sampler then shows rare ring systems as often as benzene."""
    return np.unique(split.scaffolds, return_inverse=True)[1]
