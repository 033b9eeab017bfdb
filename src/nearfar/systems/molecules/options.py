"""The options of the molecule system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nearfar.config import Encoding, Names, column, fraction, group, option, path, raw_group
from nearfar.config.views import ViewOptions
from nearfar.data.files import Json
from nearfar.errors import NearfarError

__all__ = ["InfoNCEOptions", "MoleculeDataOptions", "MoleculeOptions"]

#: the names of ``nearfar.models.molecules.fingerprint.FINGERPRINT_KINDS``, which would load PyTorch here
FINGERPRINT_KINDS = (
    *("morgan", "feature_morgan", "atom_pairs", "torsions", "paths", "maccs"),
    *("properties", "functional_groups", "descriptors"),
)
#: parts of a fingerprint by default
FINGERPRINTS = ["morgan", "maccs", "properties", "functional_groups"]


@dataclass
class MoleculeDataOptions:
    """Files with structures and texts (tables, .smi, .sdf), or, without ``data.train``, the embedded set."""

    train: str | int | None = path(None, "file of the training pairs")
    val: str | int | None = path(None, "file of the validation pairs")
    test: str | int | None = path(None, "file of the test pairs")
    dir: str | int | None = path(None, "a folder with train, validation (or val) and test files")
    smiles_column: str | int | None = column("column of the structures; null: the usual names")
    text_column: str | int | None = column("column of the texts; null: the usual names")
    id_column: str | int | None = column("column of ids; null: the usual names")
    encoding: str | None = option(
        None,
        "encoding of text files, e.g. cp1252; null: UTF-8, or UTF-16 with a byte-order mark",
        rule=Encoding(),
    )
    val_fraction: float = option(
        0.1, "share of train held out where there is no val file", least=0, most=1, inside=True
    )
    val_split: Literal["scaffold", "random"] = option(
        "scaffold", "hold-out of val from train: by whole scaffolds, or at random by structure"
    )
    embedded_size: int | None = option(
        24000, "molecules of the embedded set, over all splits; null: all", least=10
    )
    split_seed: int = option(0, "seed of the hold-out, and of the embedded set", least=0, most=2**32 - 1)


@dataclass
class InfoNCEOptions:
    """Each item's own partner against all others of the batch."""

    name: Literal["infonce"] = option("infonce", "the loss")
    symmetric: bool = option(True, "both directions: molecules to texts, and texts to molecules")


@dataclass
class MoleculeOptions(ViewOptions):
    """Molecule ↔ text retrieval."""

    system: str = "molecules"
    epochs: int = 40
    batch_size: int = 256
    warmup: float = 0.1
    molecule_encoder: Literal["fingerprint", "graph", "both"] = option(
        "fingerprint", "fingerprint: a network over it; graph: a transformer"
    )
    text_head: Literal["none", "linear", "mlp"] = option(
        "linear", "head trained on top of the frozen text embeddings"
    )
    hidden: int = option(128, "width of the graph transformer", least=1)
    layers: int = option(4, "layers of the graph transformer", least=1)
    heads: int = option(4, "attention heads of the graph transformer", least=1)
    dropout: float = fraction(0.1, "dropout in the graph transformer")
    fingerprints: str | list[str] = option(
        FINGERPRINTS, "parts of the fingerprint", rule=Names(FINGERPRINT_KINDS)
    )
    fingerprint_bits: int = option(2048, "bits of the Morgan part", least=8, most=2**20)
    fingerprint_radius: int = option(
        2, "radius of the Morgan part, in bonds around an atom", least=0, most=100
    )
    fingerprint_chirality: bool = option(True, "chirality in the fingerprint: mirror images differ")
    fingerprint_hidden: int = option(1024, "width of the fingerprint network", least=1)
    fingerprint_dropout: float = fraction(0.4, "dropout in the fingerprint network")
    input_dropout: float = fraction(0.2, "dropout of the fingerprint's entries")
    augment_atoms: float = fraction(0.0, "share of atoms whose features are masked while training")
    augment_bonds: float = fraction(0.0, "share of bonds whose features are masked while training")

    data: MoleculeDataOptions = group(molecules=MoleculeDataOptions(), help="pairs of molecules and texts")
    text_encoder: Json = raw_group({"kind": "ngram"}, "encoder of the texts", models=("model",))
    loss: InfoNCEOptions = group(infonce=InfoNCEOptions(), role="loss")

    def check(self) -> None:
        super().check()
        # The encoder checks its options here; no weights are read and nothing is fitted.
        from nearfar.models.text import build_text_encoder

        build_text_encoder(**self.text_encoder)
        if self.molecule_encoder != "fingerprint" and self.hidden % self.heads:
            raise NearfarError(f"hidden={self.hidden} must be a multiple of heads={self.heads}.")
        if self.learn_temperature and self.temperature < 0.01:
            raise NearfarError(
                f"temperature={self.temperature}: a learned temperature is kept at .01 or more; start there or higher."
            )
        if (self.augment_atoms or self.augment_bonds) and self.molecule_encoder == "fingerprint":
            raise NearfarError(
                "augment_atoms and augment_bonds act on graphs; molecule_encoder=fingerprint has none."
            )
