"""Use of a trained run: embed new molecules and texts, and search among them."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float

from nearfar.config.compose import read_config
from nearfar.data.cache import cached_array, content_key
from nearfar.data.items import Items
from nearfar.data.splits import column_name, data_paths
from nearfar.data.tables import Table
from nearfar.errors import NearfarError
from nearfar.models.molecules.smiles import canonical_smiles, parse_smiles
from nearfar.models.text import TextEncoder, embed_texts, load_text_encoder
from nearfar.systems.molecules.options import MoleculeOptions
from nearfar.systems.molecules.records import COLUMNS, pairs_of, read_records, scaffolds_of
from nearfar.systems.molecules.structure_files import read_structures
from nearfar.systems.molecules.system import MoleculeSystem, draw, molecule_tower, text_tower
from nearfar.terminal import say
from nearfar.towers import Tower
from nearfar.towers.build import load_towers
from nearfar.towers.text import TextTower
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.evaluation import consecutive
from nearfar.training.run_folder import RunFolder, write_atomically

if TYPE_CHECKING:
    import faiss
    from rich.console import Console

__all__ = ["Hit", "Hits", "TrainedMolecules"]

#: headers by what they hold: ``smiles``, ``text``, ``id``; None: the usual names
Columns = Mapping[str, str | None]
#: how ``nearfar embed`` and ``nearfar search`` ask for a header
OPTION = "--{name}-column NAME"


@dataclass(frozen=True)
class Hit:
    """One answer: its cosine with the query, and the pair it belongs to."""

    rank: int
    score: float
    id: str
    smiles: str
    text: str


class Hits(list[Hit]):
    """Answers, best first; a notebook shows them with pictures."""

    def __init__(self, hits: Sequence[Hit], query: str = "") -> None:
        super().__init__(hits)
        self.query = query

    def _repr_html_(self) -> str:
        cards = "".join(
            f'<div style="width:200px;border:1px solid #ddd;border-radius:6px;padding:6px;font:12px sans-serif">'
            f"{draw(hit.smiles, 190, 140)}<div><b>{hit.rank}.</b> {hit.score:.3f} · {html.escape(hit.id)}</div>"
            f"<div>{html.escape(hit.text[:160])}</div></div>"
            for hit in self
        )
        return (
            f'<p style="font:14px sans-serif">{html.escape(self.query)}</p>'
            f'<div style="display:flex;flex-wrap:wrap;gap:8px">{cards}</div>'
        )


class TrainedMolecules:
    """The best model of a run, with the text encoder and features it was trained with.

    ``TrainedMolecules(run).search("an alkaloid …")`` answers with molecules; ``search(smiles, molecule=True)``
    with texts. The gallery is all pairs of the run's data unless a table is given.
    """

    def __init__(self, run: str | Path) -> None:
        path = find_checkpoint(run, prefer="best")
        self.folder = RunFolder.of(path)
        self.config = cast(MoleculeOptions, read_config(self.folder.config(), saved=True))
        self.checkpoint = path
        self._layout = self.folder.read_json("dataset_layout.json")
        # A memory of earlier batches is for training alone.
        self.system = MoleculeSystem(replace(self.config, memory=0))
        self.system.towers = self._towers()
        state = Checkpoint.load(path)
        self.model = self.system.build_model()
        self.model.load_state_dict(self.system.read_weights(state.model))
        self.model.eval()
        self._key = content_key([np.asarray(v.float()) for v in state.model.values()])
        self._galleries: dict[str, tuple[Items, faiss.IndexFlatIP]] = {}

    def _towers(self) -> dict[str, Tower]:
        if (self.folder.path / "towers").is_dir():
            return load_towers(self.folder.path / "towers")
        # A run of an earlier version, which kept its text encoder alone.
        text = text_tower(self.config)
        text.encoder = load_text_encoder(self.folder.path / "text_encoder")
        width: Any = text.build().width if self.config.text_head == "none" else None
        return {"molecule": molecule_tower(self.config, width), "text": text}

    @property
    def text_encoder(self) -> TextEncoder:
        """The frozen encoder of the texts."""
        text = self.system.towers["text"]
        assert isinstance(text, TextTower)
        encoder: TextEncoder = text.encoder
        return encoder

    # -- embedding -------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def embed_molecules(self, smiles: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Unit vectors of molecules; a SMILES that cannot be read is an error naming it."""
        for i, text in enumerate(smiles):
            molecule, reason = parse_smiles(text)
            if molecule is None:
                raise NearfarError(f"molecule {i} ({text!r}) cannot be read: {reason}.")
        inputs = self.system.towers["molecule"].read(list(smiles))
        parts = [
            self.model.encode("molecule", inputs.batch(torch.tensor(rows)))
            for rows in consecutive(len(smiles), 512)
        ]
        return torch.nn.functional.normalize(torch.cat(parts).float(), dim=1).numpy()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Unit vectors of texts."""
        frozen = torch.from_numpy(embed_texts(self.text_encoder, texts, cache=len(texts) > 100))
        return torch.nn.functional.normalize(self.model.encode("text", frozen).float(), dim=1).numpy()

    # -- search ----------------------------------------------------------------------------------------------
    def gallery(
        self, path: Path | None = None, molecules: bool = True, columns: Columns | None = None
    ) -> tuple[Items, faiss.IndexFlatIP]:
        """The pairs to search in, and a FAISS index of their molecules (or texts); embeddings are cached.

        ``columns`` are headers of the table for ``smiles``, ``text`` and ``id``, where they are not the usual ones.
        """
        import faiss

        name = f"{path or ''}/{sorted((columns or {}).items())}/{'molecules' if molecules else 'texts'}"
        if name not in self._galleries:
            records = self._records(path, columns or {})
            values = records.texts("molecule" if molecules else "text")
            embed = self.embed_molecules if molecules else self.embed_texts
            vectors = cached_array("galleries", [self._key, values], lambda: embed(values))
            index = faiss.IndexFlatIP(vectors.shape[1])
            index.add(np.ascontiguousarray(vectors, dtype=np.float32))
            self._galleries[name] = (records, index)
        return self._galleries[name]

    def _headers(self) -> dict[str, list[str]]:
        """The headers to look for in a new table: first those that the run was trained with, then the usual ones."""
        own = {name: column_name(getattr(self.config.data, f"{name}_column")) for name in COLUMNS}
        return {name: [*filter(None, [own[name]]), *usual] for name, usual in COLUMNS.items()}

    def _records(self, path: Path | None, columns: Columns) -> Items:
        if path is not None:
            given = (columns.get("smiles"), columns.get("text"), columns.get("id"))
            return read_records(
                path,
                *given,
                columns=self._headers(),
                naming=OPTION,
                encoding=self.config.data.encoding,
                encoding_option="",
            )
        try:
            data_paths(self.config.data)
        except NearfarError as error:
            raise NearfarError(
                f"{self.folder}: the run's data is not there ({error}) Give a table to search in: --gallery FILE."
            ) from None
        splits = list(self.system.load_data(lambda _: None).splits.values())
        current, trained = self.system.data_hash(*splits), self._layout["data_hash"]
        if current != trained:
            raise NearfarError(
                f"{self.folder}: its data files have changed since it was trained (content hash {trained} then, "
                f"{current} now). Give the table to search in: --gallery FILE."
            )
        return pairs_of(
            [identity for split in splits for identity in split.ids],
            [smiles for split in splits for smiles in split.texts("molecule")],
            [text for split in splits for text in split.texts("text")],
            [scaffold for split in splits for scaffold in scaffolds_of(split)],
            "run",
        )

    def search(
        self,
        query: str,
        molecule: bool = False,
        k: int = 10,
        gallery: Path | None = None,
        columns: Columns | None = None,
    ) -> Hits:
        """The ``k`` nearest molecules of a text; with ``molecule=True`` the nearest texts of a SMILES.

        ``gallery`` is a table to search in instead of the run's data, ``columns`` as for `gallery`.
        """
        if not query.strip():
            raise NearfarError("the query is empty: give a text, or a SMILES with --molecule.")
        if k < 1:
            raise NearfarError(f"k={k}: at least one answer is needed.")
        if molecule:
            parsed, reason = parse_smiles(query)
            if parsed is None:
                raise NearfarError(
                    f"{query!r} is no SMILES ({reason}). Leave --molecule out to search by text."
                )
            vector = self.embed_molecules([canonical_smiles(parsed)])
        else:
            vector = self.embed_texts([query])
        records, index = self.gallery(gallery, not molecule, columns)
        scores, indices = index.search(np.ascontiguousarray(vector, dtype=np.float32), min(k, len(records)))
        hits = [
            Hit(rank + 1, float(score), records.ids[i], records["molecule"][i], records["text"][i])
            for rank, (score, i) in enumerate(zip(scores[0], indices[0], strict=True))
        ]
        return Hits(hits, query)

    # -- the verbs -------------------------------------------------------------------------------------------
    def search_and_print(
        self,
        query: str,
        molecule: bool,
        k: int,
        gallery: Path | None,
        page: Path | None,
        console: Console,
        columns: Columns | None = None,
    ) -> None:
        """The command ``nearfar search``: print the hits, and write a page with pictures."""
        from rich.markup import escape
        from rich.table import Table as Grid

        if page is not None:
            _require_writable(page, "hits.html")
        hits = self.search(query, molecule, k, gallery, columns)
        if not molecule and not np.any(self.text_encoder.encode([query])):
            say(console, "no word of this query occurs in the training texts: the order below means nothing")
        table = Grid(show_lines=False)
        for column in ("", "cosine", "id", "text", "SMILES"):
            table.add_column(
                column, overflow="ellipsis", no_wrap=True, justify="right" if not column else "left"
            )
        for hit in hits:
            # Escaped, because Rich takes [nH] for a style and leaves it out.
            words = (escape(word) for word in (hit.id, hit.text[:60], hit.smiles[:60]))
            table.add_row(str(hit.rank), f"{hit.score:.3f}", *words)
        console.print(table, soft_wrap=False)
        if page is not None:
            body = (
                f"<!doctype html><meta charset='utf-8'><title>search</title><body>{hits._repr_html_()}</body>"
            )
            write_atomically(page, lambda file: file.write(body.encode()))
            say(console, f"pictures: {page}")

    def embed_table(self, data: Path, output: Path, console: Console, columns: Columns | None = None) -> None:
        """The command ``nearfar embed``: the molecules and the texts of a table as vectors, in one ``.npz``.

        ``molecules`` and ``texts`` hold a row for each SMILES that can be read and each text that is not empty;
        ``ids`` names the rows of both. Where a row has only one of the two usable, ``molecule_ids`` and
        ``text_ids`` stand there instead of ``ids``. ``columns`` as for `gallery`.
        """
        _require_writable(output, "embeddings.npz")
        optional = ("id", "smiles", "text")
        table = read_structures(
            data, self._headers(), columns or {}, optional, OPTION, self.config.data.encoding
        )
        if "smiles" not in table and "text" not in table:
            raise NearfarError(
                f"{data}: neither a SMILES nor a text column; name one with --smiles-column NAME or "
                "--text-column NAME."
            )
        ids = table["id"] if "id" in table else [f"row{row}" for row in table.rows]
        molecules, texts = _readable_molecules(table), _filled_texts(table)
        if not molecules and not texts:
            raise NearfarError(f"{data}: no row can be embedded; {table.rejections.summary()}.")
        arrays: dict[str, np.ndarray] = {}
        same = molecules == texts or not molecules or not texts
        for name, rows in (("molecule_ids", molecules), ("text_ids", texts)):
            if rows:
                arrays["ids" if same else name] = np.asarray([ids[i] for i in rows], dtype=np.str_)
        if molecules:
            arrays["molecules"] = self.embed_molecules([table["smiles"][i] for i in molecules])
        if texts:
            arrays["texts"] = self.embed_texts([table["text"][i] for i in texts])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub wants allow_pickle first
        write_atomically(output, lambda file: file.write(buffer.getvalue()))
        say(console, f"{output}: {len(molecules)} molecules, {len(texts)} texts ({', '.join(arrays)})")
        if len(table.rejections):
            say(console, table.rejections.summary())


def _readable_molecules(table: Table) -> list[int]:
    """Positions whose SMILES is a molecule; the others are counted in the table's rejections."""
    good = []
    for position, smiles in enumerate(table.columns.get("smiles", [])):
        if not smiles.strip():
            table.rejections.add("empty SMILES", table.rows[position])
            continue
        molecule, reason = parse_smiles(smiles)
        if molecule is None:
            table.rejections.add("unparsable SMILES", table.rows[position], smiles, reason)
        else:
            good.append(position)
    return good


def _filled_texts(table: Table) -> list[int]:
    """Positions whose text is not empty; the others are counted in the table's rejections."""
    good = []
    for position, text in enumerate(table.columns.get("text", [])):
        if text.strip():
            good.append(position)
        else:
            table.rejections.add("empty text", table.rows[position])
    return good


def _require_writable(path: Path, example: str) -> None:
    """Raise before the work where no file can be written to ``path``."""
    if path.is_dir():
        raise NearfarError(f"{path} is a folder; name the file to write, such as {path / example}.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise NearfarError(f"{path} cannot be written: {above} is a file and not a folder.")
