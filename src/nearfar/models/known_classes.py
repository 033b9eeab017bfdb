"""The classes that a run knows: its embedded training items with their labels, which say the class of a new item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from nearfar.data.classes import Labels, class_codes, item_labels
from nearfar.data.files import Maybe, read_arrays, read_json, write_arrays, write_json
from nearfar.data.items import Items
from nearfar.errors import NearfarError
from nearfar.models.probes import LinearProbe, nearest_votes

__all__ = ["ClassNames", "KnownClasses", "LabelledGallery"]

_NAMES, _ROWS = "classes.json", "class_rows.npz"
_PROBE = "probe/"
#: classes up to which each has a column of its own with its probability
_COLUMNS = 100
#: share of the neighbours from which on a new item has one of several labels
_MOST = 0.5


@dataclass(frozen=True)
class ClassNames:
    """The classes of the training items, by number; written before training.

    ``label`` is the column of labels, ``several`` whether an item may have several of them, ``unseen`` the classes that
    were kept out of training. Without a column of labels there are no classes.
    """

    view: str
    label: str | None = None
    names: tuple[str, ...] = ()
    several: bool = False
    unseen: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        """Write ``classes.json``."""
        kept = {
            "view": self.view,
            "label": self.label,
            "classes": list(self.names),
            "several": self.several,
            "unseen": list(self.unseen),
        }
        write_json(folder / _NAMES, kept)

    @classmethod
    def load(cls, folder: Path) -> ClassNames:
        """What `save` wrote."""
        shape = {"view": str, "label": Maybe(str), "classes": [str], "several": bool, "unseen": [str]}
        kept = read_json(folder / _NAMES, shape)
        names, unseen = tuple(kept["classes"]), tuple(kept["unseen"])
        return cls(kept["view"], kept.get("label"), names, kept["several"], unseen)


@dataclass(frozen=True)
class KnownClasses:
    """Labelled items as a model embeds them, and a linear probe fitted on them.

    ``rows`` (n, d) are what the run judges, ``codes`` the class (n,) of each item, or with several labels an item rows
    of 0 and 1 (n, classes); ``ids`` name the items. Without ``probe`` the neighbours alone are asked.
    """

    names: Sequence[str]
    ids: Sequence[str]
    rows: Float[Tensor, "n d"]
    codes: Int[Tensor, " n"] | Int[Tensor, "n c"]
    k: int = 5
    probe: LinearProbe | None = None

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        ids: Sequence[str],
        rows: Float[Tensor, "n d"],
        codes: Int[Tensor, " n"] | Int[Tensor, "n c"],
        k: int,
        probe: LinearProbe | None = None,
    ) -> KnownClasses:
        """Of these items those that have a label of ``names``."""
        codes = codes if codes.ndim == 1 else codes[:, : len(names)]
        labelled = (codes >= 0) & (codes < len(names)) if codes.ndim == 1 else codes.sum(1) > 0
        at = labelled.nonzero()[:, 0]
        return cls(names, [ids[i] for i in at.tolist()], rows.float()[at], codes[at], k, probe)

    def columns(self, rows: Float[Tensor, "m d"]) -> dict[str, list[object]]:
        """What these items say of new ones that the same model embedded, as columns of a table.

        ``knn`` is the class that most of the k nearest have, ``knn/share`` the part of them that have it,
        ``knn/nearest`` and ``knn/cosine`` their ids and cosines, nearest first. ``probe`` is the most probable class by
        the linear probe, ``probe/probability`` its probability, ``probe/p(NAME)`` that of each class (of up to 100).

        With several labels an item, ``knn`` lists those that at least half of the nearest have, joined by ``;``,
        ``knn/labels`` the share of each label that any of them has; there is no probe.

        >>> names, rows = ["cat", "dog"], torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> known = KnownClasses.of(names, ["a", "b", "c"], rows, torch.tensor([0, 0, 1]), k=3)
        >>> columns = known.columns(torch.tensor([[2.0, 0.1]]))
        >>> columns["knn"], [round(share, 2) for share in columns["knn/share"]], columns["knn/nearest"]
        (['cat'], [0.67], [['a', 'b', 'c']])
        """
        if self.codes.ndim == 2:
            return self._several(rows)
        votes = nearest_votes(self.rows, self.codes, rows, self.k)
        columns: dict[str, list[object]] = {
            "knn": [self.names[code] for code in votes.classes.tolist()],
            "knn/share": votes.shares.tolist(),
            **self._nearest(votes.nearest, votes.similarities),
        }
        if self.probe is not None:
            logits = self.probe.logits(rows)
            probabilities = logits.double().softmax(1)
            chosen = logits.argmax(1)
            columns["probe"] = [self.names[code] for code in chosen.tolist()]
            columns["probe/probability"] = probabilities.gather(1, chosen[:, None])[:, 0].tolist()
            if len(self.names) <= _COLUMNS:
                for code, name in enumerate(self.names):
                    columns[f"probe/p({name})"] = probabilities[:, code].tolist()
        return columns

    def _several(self, rows: Float[Tensor, "m d"]) -> dict[str, list[object]]:
        votes = nearest_votes(self.rows, torch.zeros(len(self.rows), dtype=torch.int64), rows, self.k)
        shares = self.codes[votes.nearest].double().mean(1).tolist()
        ordered = [
            sorted((-share, name) for share, name in zip(row, self.names, strict=True) if share > 0)
            for row in shares
        ]
        return {
            "knn": [";".join(name for share, name in row if -share >= _MOST) for row in ordered],
            "knn/labels": [";".join(f"{name}:{-share:g}" for share, name in row) for row in ordered],
            **self._nearest(votes.nearest, votes.similarities),
        }

    def _nearest(self, at: Int[Tensor, "m k"], cosines: Float[Tensor, "m k"]) -> dict[str, list[object]]:
        return {
            "knn/nearest": [[self.ids[i] for i in row] for row in at.tolist()],
            "knn/cosine": cosines.tolist(),
        }

    def save(self, folder: Path) -> None:
        """Write ``class_rows.npz``: arrays alone."""
        arrays: dict[str, ArrayLike] = {
            "names": np.asarray(list(self.names), dtype=np.str_),
            "ids": np.asarray(list(self.ids), dtype=np.str_),
            "rows": self.rows.numpy(),
            "codes": self.codes.numpy(),
            "k": np.int64(self.k),
        }
        if self.probe is not None:
            arrays |= {f"{_PROBE}{name}": array for name, array in self.probe.to_arrays().items()}
        write_arrays(folder / _ROWS, arrays)

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove what `save` wrote, where it did."""
        (folder / _ROWS).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> KnownClasses | None:
        """What `save` wrote; None where nothing was: the run was never evaluated, or has no labels."""
        path = folder / _ROWS
        if not path.exists():
            return None
        arrays = read_arrays(path)
        own = {name: arrays.get(name) for name in ("names", "ids", "rows", "codes", "k")}
        names, ids, rows, codes, k = own.values()
        if (
            names is None or ids is None or rows is None or codes is None or k is None
            or rows.ndim != 2 or rows.dtype != np.float32 or codes.dtype != np.int64 or not len(rows)
            or not len(rows) == len(ids) == len(codes) or k.shape != () or int(k) < 1
            or (codes.ndim == 1 and not 0 <= codes.min() <= codes.max() < len(names))
            or (codes.ndim != 1 and codes.shape != (len(rows), len(names)))
        ):  # fmt: skip
            raise NearfarError(f"{path} does not hold the classes of a run: it was edited or damaged.")
        parts = {name.removeprefix(_PROBE): each for name, each in arrays.items() if name.startswith(_PROBE)}
        try:
            probe = LinearProbe.from_arrays(parts) if parts else None
        except NearfarError as error:
            raise NearfarError(f"{path}: {error}.") from None
        if probe is not None and (len(probe.bias) != len(names) or len(probe.mean) != rows.shape[1]):
            raise NearfarError(f"{path}: its probe is not of its classes: it was edited or damaged.")
        return cls(
            names.tolist(), ids.tolist(), torch.from_numpy(rows), torch.from_numpy(codes), int(k), probe
        )


class LabelledGallery:
    """Labelled items of a user's, which say the class of others: a `Comparison` of items with a gallery.

    Args:
        view: what the outputs call the embeddings.
        label: the column of labels.
        separator: what separates several labels in one cell; None: a cell is one label.
        several: whether an item may have several labels.
        k: how many of the nearest are asked.

    Beside their vote there is a linear probe, fitted on the gallery, where items have one label.
    """

    def __init__(self, view: str, label: str, separator: str | None, several: bool, k: int) -> None:
        if k < 1:
            raise NearfarError(f"k={k}: at least one neighbour is needed.")
        self.view, self.label, self.separator, self.several, self.k = view, label, separator, several, k
        self._ids: list[str] = []
        self._rows: list[Tensor] = []
        self._labels: list[Labels] = []
        self._known: KnownClasses | None = None

    def add(self, outputs: Mapping[str, Tensor], items: Items) -> None:
        """Further labelled items; those without a label have no vote."""
        if self.label not in items:
            raise NearfarError(
                f"{items.source} has no column '{self.label}': the items of a gallery have labels. Name their column "
                f"with --gallery-column {self.label}=HEADER."
            )
        self._ids.extend(items.ids)
        self._rows.append(outputs[self.view].float().cpu())
        self._labels.extend(item_labels(items[self.label], self.label, self.separator))
        self._known = None

    def of_all(self, start: int, stop: int) -> dict[str, list[object]]:
        """Not asked for: items vote for others, not for themselves."""
        raise NearfarError("labelled items are a gallery: other items are compared with them.")

    def of_others(self, outputs: Mapping[str, Tensor], items: Items) -> dict[str, list[object]]:
        """`KnownClasses.columns` of other items."""
        if self._known is None:
            self._known = self._classes()
        return self._known.columns(outputs[self.view].float().cpu())

    def _classes(self) -> KnownClasses:
        several = self.several or any(len(each) > 1 for each in self._labels)
        classes = class_codes({"train": self._labels}, several)
        if not classes.known:
            raise NearfarError("no item of the gallery has a label.")
        codes = torch.from_numpy(classes.codes["train"])
        known = KnownClasses.of(classes.names, self._ids, torch.cat(self._rows), codes, self.k)
        return known if several else replace(known, probe=LinearProbe(known.rows, known.codes))
