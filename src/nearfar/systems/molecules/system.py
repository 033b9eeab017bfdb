"""The molecule system: pairs of molecules and texts, two towers, retrieval in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from nearfar.data.cache import content_key
from nearfar.data.chunks import NewData, read_chunks
from nearfar.data.files import Json
from nearfar.data.items import Column, Items, value_groups
from nearfar.data.molecules.pairs import MoleculeData, load_embedded, load_files
from nearfar.data.molecules.smiles import canonical_smiles, parse_smiles, quiet_rdkit
from nearfar.data.molecules.structure_files import (
    COLUMNS,
    STRUCTURE_SUFFIXES,
    is_headless,
    read_structures,
    scaffolds_of,
)
from nearfar.data.splits import column_name, data_paths
from nearfar.data.table_formats import full_suffix
from nearfar.data.tables import TABLE_SUFFIXES, is_placeholder
from nearfar.errors import NearfarError, nearest_name
from nearfar.losses.views import ViewLoss
from nearfar.models.text import load_text_encoder
from nearfar.models.views import HeadKind, build_head
from nearfar.systems.molecules.options import MoleculeOptions
from nearfar.systems.view_system import ViewSystem
from nearfar.towers import Tower
from nearfar.towers.molecule import MoleculeTower
from nearfar.towers.text import TextTower
from nearfar.training.system import Say, decayed_groups

__all__ = ["MoleculeSystem", "draw", "molecule_tower", "text_tower"]


#: how a command asks for a header of a list of SMILES or an SDF
_NAMING = "--column {name}=HEADER"


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


def molecule_tower(config: MoleculeOptions, width: int | None = None) -> MoleculeTower:
    """The tower of molecules that the options describe; ``width``: of its vectors, where not ``embedding_dim``."""
    return MoleculeTower(
        config.molecule_encoder,
        width=config.embedding_dim if width is None else width,
        hidden=config.hidden,
        layers=config.layers,
        heads=config.heads,
        dropout=config.dropout,
        fingerprints=config.fingerprints,
        bits=config.fingerprint_bits,
        radius=config.fingerprint_radius,
        chirality=config.fingerprint_chirality,
        fingerprint_hidden=config.fingerprint_hidden,
        fingerprint_dropout=config.fingerprint_dropout,
        input_dropout=config.input_dropout,
        mask_atoms=config.augment_atoms,
        mask_bonds=config.augment_bonds,
    )


def text_tower(config: MoleculeOptions) -> TextTower:
    """The tower of texts: a frozen encoder."""
    options = dict(config.text_encoder)
    return TextTower(options.pop("kind"), train="head", **options)


class MoleculeSystem(ViewSystem):
    """Trains a molecule encoder (and a head over frozen text embeddings) for retrieval in both directions."""

    name = "molecules"
    monitor = "text_to_molecule/MRR"

    config: MoleculeOptions
    data: MoleculeData

    # -- data ------------------------------------------------------------------------------------------------
    def load_items(self, say: Say) -> dict[str, Items]:
        self.data = self.load_data(say)
        say(self.data.summary())
        if len(self.data.splits["train"]) > 5000:
            say(
                "reading texts and molecules; the first time this takes a minute or two, afterwards it is in the cache"
            )
        return self.data.splits

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

    def build_towers(self, say: Say) -> dict[str, Tower]:
        return {"molecule": molecule_tower(self.config), "text": text_tower(self.config)}

    def fit_towers(self) -> None:
        super().fit_towers()
        if self.config.text_head == "none":
            self.towers["molecule"] = molecule_tower(self.config, self.text_dim)

    @property
    def text_dim(self) -> int:
        """The length of a frozen text vector."""
        return int(cast(int, self.towers["text"].build().width))

    def readable(self, items: Items) -> Items:
        return items  # the readers of molecules have rejected what no tower reads

    def value_groups(self, view: str) -> dict[str, np.ndarray] | None:
        # Structures are canonical by now, and need not be parsed again.
        return value_groups(self.splits, view, list) if view == "molecule" else super().value_groups(view)

    def announce_shared(self, say: Say) -> None:
        """Nothing more: the summary of the data says which structures and texts splits share."""

    def reference_view(self) -> str:
        return "text"

    def layout(self) -> Json:
        """Counts, rejections, hashes, and which encoders are really used."""
        layout, text = super().layout(), self.towers["text"]
        assert isinstance(text, TextTower)
        return (
            layout
            | self.data.layout()
            | {
                "text_encoder": {
                    "kind": text.encoder.kind,
                    "name": text.encoder.name,
                    "description": text.encoder.description,
                    "dimensions": self.text_dim,
                },
                "molecule_encoder": self.towers["molecule"].description,
            }
        )

    def data_hash(self, *splits: Items) -> str:
        """A hash of the content of splits: sixteen hexadecimal digits of ids, structures and texts, in order.

        Ids alone are not enough: two versions of a file may have the same ids, as have files that number their rows.
        """
        return content_key(*([s.ids, s.texts("molecule"), s.texts("text")] for s in splits))[:16]

    def content_hash(self, items: Items) -> str:
        return self.data_hash(items)

    def labels(self) -> np.ndarray:
        """Scaffolds as classes: the balanced sampler then draws rare ring systems as often as benzene."""
        return np.unique(scaffolds_of(self.splits["train"]), return_inverse=True)[1]

    # -- model and loss --------------------------------------------------------------------------------------
    def build_loss(self) -> ViewLoss:
        return ViewLoss("infonce", self.config.temperature, symmetric=self.config.loss.symmetric)

    def shared_dim(self, widths: Mapping[str, int]) -> int:
        return widths["molecule"]

    def build_head(self, tower: Tower, view: str, width: int, dim: int) -> nn.Module:
        kind: HeadKind = self.config.text_head if view == "text" else "none"
        return build_head(kind, width, dim, hidden=dim, dropout=0.1, norm="layer")

    def parameter_groups(self, model: nn.Module) -> list[Json]:
        return decayed_groups(model, self.config.weight_decay)  # the tables of atoms and bonds decay, too

    # -- use of a trained run --------------------------------------------------------------------------------
    def load_assets(self, folder: Path) -> None:
        """The towers; of a run of version 0.1, which kept its text encoder alone, the tower around that."""
        if (folder / "towers").is_dir():
            super().load_assets(folder)
            return
        text = text_tower(self.config)
        text.encoder = load_text_encoder(folder / "text_encoder")
        width = cast(int, text.build().width) if self.config.text_head == "none" else None
        self.towers = {"molecule": molecule_tower(self.config, width), "text": text}

    def view_headers(self) -> dict[str, Sequence[str]]:
        """The headers that the run was trained with, then the usual ones."""
        return {"molecule": self._headers("smiles"), "text": self._headers("text")}

    def _headers(self, name: str) -> list[str]:
        own = column_name(getattr(self.config.data, f"{name}_column"))
        return [*filter(None, [own]), *COLUMNS[name]]

    def new_items(self, source: NewData) -> Iterator[Items]:
        """Tables, also without a header line, and lists of SMILES and SDF as `read_structures` reads them."""
        path = Path(source.path).expanduser()
        suffix = full_suffix(path) if path.is_file() else ""
        listed = suffix in STRUCTURE_SUFFIXES and suffix not in TABLE_SUFFIXES
        if listed or (not source.columns and is_headless(path, self._all_headers(), source.encoding)):
            yield from self._new_structures(path, source)
            return
        for items in read_chunks(source, self.view_headers(), ids=self._headers("id")):
            yield self.usable(items)

    def _all_headers(self) -> dict[str, list[str]]:
        return {name: self._headers(name) for name in COLUMNS}

    def _new_structures(self, path: Path, source: NewData) -> Iterator[Items]:
        roles = {"smiles": "molecule", "text": "text"}
        for view in source.columns:
            if view not in self.views:
                raise NearfarError(f"this run has no view '{view}'; {nearest_name(view, self.views)}")
        given = {name: source.columns.get(role) for name, role in roles.items()} | {"id": source.id_column}
        table = read_structures(
            path, self._all_headers(), given, ("text", "id"), _NAMING, source.encoding, "--encoding"
        )
        ids = table["id"] if "id" in table else ["" for _ in table.rows]
        ids = [each.strip() or f"row{row}" for each, row in zip(ids, table.rows, strict=True)]
        columns: dict[str, Column] = {
            roles[name]: [value.strip() or None for value in table[name]] for name in roles if name in table
        }
        whole = Items(ids, columns, str(path), rows=table.rows, rejections=table.rejections)
        for start in range(0, len(whole), source.rows):
            chunk = whole.take(range(start, min(start + source.rows, len(whole))))
            yield self.usable(replace(chunk, rejections=whole.rejections) if start == 0 else chunk)

    def checked(self, items: Items) -> tuple[Items, dict[str, list[str | None]]]:
        """Molecules as canonical SMILES and texts without further blanks, as they were trained on."""
        columns: dict[str, Column] = dict(items.columns)
        reasons: dict[str, list[str | None]] = {}
        if "molecule" in items:
            smiles: list[str | None] = []
            reasons["molecule"] = []
            for value in items["molecule"]:
                if value is None or not str(value).strip():
                    smiles.append(None)
                    continue
                molecule, _ = parse_smiles(str(value))
                smiles.append(str(value) if molecule is None else canonical_smiles(molecule))
                reasons["molecule"].append("unparsable SMILES" if molecule is None else None)
            columns["molecule"] = smiles
        if "text" in items:
            texts = ["" if value is None else " ".join(str(value).split()) for value in items["text"]]
            columns["text"] = [None if not text or is_placeholder(text) else text for text in texts]
            reasons["text"] = [None] * sum(text is not None for text in columns["text"])
        return replace(items, columns=columns), reasons

    def read_weights(self, weights: Json) -> Json:
        """Weights by today's names; before its towers were shared with other systems, the model had its own."""
        if any(key.startswith("towers.") for key in weights):
            return weights
        return {_renamed(key): value for key, value in weights.items()}

    # -- results ---------------------------------------------------------------------------------------------
    def pairs(self) -> list[tuple[str, str]]:
        return [("text", "molecule")]

    def shown(self, split: str, view: str, position: int) -> Json:
        items = self.splits[split]
        smiles = str(items["molecule"][position])
        return {"text": items["text"][position], "smiles": smiles, "svg": draw(smiles)}


#: how names of weights began in earlier versions, and how they begin now
_NAMES = {
    "graph.": "towers.molecule.graph.",
    "fingerprint.": "towers.molecule.fingerprint.",
    "text.": "heads.text.",
    "memory.molecules.": "memory.kept.molecule.",
    "memory.texts.": "memory.kept.text.",
}


def _renamed(key: str) -> str:
    for old, new in _NAMES.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
