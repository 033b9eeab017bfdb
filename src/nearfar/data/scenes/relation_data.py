"""Pairs of objects in pictures: read, checked, and split by picture, so that no photo is in two splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from nearfar.data.cache import content_key
from nearfar.data.coco_files import too_small_for
from nearfar.data.files import Json
from nearfar.data.images import Box, File, Photo
from nearfar.data.picture_files import PictureFile, PictureFiles, check_pictures
from nearfar.data.rejections import Rejections
from nearfar.data.scenes.readers import LAYOUTS, Places, annotation_files
from nearfar.data.scenes.triples import Pairs, Triple, collect_pairs
from nearfar.data.splits import check_disjoint
from nearfar.errors import NearfarError
from nearfar.ids import split_hash

__all__ = ["PhotoUse", "PictureShares", "RelationData", "read_triples", "split_relations", "usable_photos"]

SPLITS = ("train", "val", "test")


@dataclass
class RelationData:
    """The pairs of each split, the classes, and what was rejected."""

    splits: dict[str, Pairs]
    relations: tuple[str, ...]
    source: str
    how_split: str
    rejections: Rejections
    #: counts and lists by short names, which `summary` puts into words
    notes: Json = field(default_factory=dict)

    @property
    def train(self) -> Pairs:
        """The training pairs."""
        return self.splits["train"]

    def labels(self, split: str) -> np.ndarray:
        """The class of every pair, as an index into ``relations``."""
        place = {name: i for i, name in enumerate(self.relations)}
        return np.array([place[name] for name in self.splits[split].relation], dtype=np.int64)

    def content_hash(self, *splits: str) -> str:
        """A hash of the content of some splits (by default all) and of the classes: sixteen hexadecimal digits."""
        names = splits or tuple(self.splits)
        return content_key(list(self.relations), *(self.splits[name].content() for name in names))[:16]

    def layout(self) -> dict[str, object]:
        """The entries of the data in ``dataset_layout.json``."""
        images = {name: sorted(set(part.image)) for name, part in self.splits.items()}
        return {
            "source": self.source,
            "relations": list(self.relations),
            "split": self.how_split,
            "splits": {
                name: {
                    "rows": len(part),
                    "images": len(images[name]),
                    "rows_with_photo": int(part.has_photo.sum()),
                    "images_with_photo": len(part.photos),
                    "sizes_from_boxes": int((~part.size_known).sum()),
                    "pairs_with_several_relations": len(part) - len(np.unique(part.group)),
                    "relations": part.counts(),
                    "majority": part.counts()[next(iter(part.counts()))] / len(part),
                    "hash": split_hash(part.ids),
                }
                for name, part in self.splits.items()
            },
            "leaks": {},  # a picture in two splits is an error
            "rejections": self.rejections.as_dict(),
            "notes": self.notes,
        }

    def summary(self) -> str:
        """Lines for the terminal."""
        lines = [f"data: {self.source}; {self.how_split}"]
        for name, part in self.splits.items():
            counts = part.counts()
            most = next(iter(counts))
            photos = int(part.has_photo.sum())
            lines.append(
                f"{name}: {len(part)} pairs in {len(set(part.image))} pictures, {photos} of them with a photo; "
                + ", ".join(f"{relation} {count}" for relation, count in counts.items())
                + f"; always “{most}” is right in {counts[most] / len(part):.3f}"
            )
            guessed = int((~part.size_known).sum())
            if guessed:
                lines.append(
                    f"{name}: of {guessed} pairs the picture's size is guessed from its boxes (no photo)"
                )
        if len(self.rejections):
            lines.append(self.rejections.summary())
        return "\n".join([*lines, *self._remarks()])

    def _remarks(self) -> list[str]:
        """The notes as sentences."""
        notes = self.notes
        lines = list(notes.get("remarks", ()))
        if count := notes.get("boxes_cut_at_border"):
            lines.append(f"{count} boxes cut at the picture's border")
        if count := notes.get("pictures_without_photo"):
            lines.append(f"{count} annotated pictures without a photo that can be used")
        if count := notes.get("pictures_of_several_files"):
            lines.append(
                f"{count} pictures have files of one name in several folders (first: "
                f"{notes['first_of_several_files']}); data.images=FOLDER chooses"
            )
        for relation in notes.get("relations_without_training_pairs", ()):
            counts = ", ".join(
                f"{part.counts().get(relation, 0)} of {name}"
                for name, part in self.splits.items()
                if name != "train"
            )
            lines.append(f"no training pair of “{relation}”: it cannot be predicted ({counts})")
        return lines


@dataclass(frozen=True)
class PictureShares:
    """How pictures are split where their files do not say it.

    Attributes:
        val, test: shares of the pictures.
        seed: of the draw.
        folds, fold: with a number of folds, ``fold`` (from 0) is test; val is a share of the others.
    """

    val: float = 0.15
    test: float = 0.2
    seed: int = 0
    folds: int | None = None
    fold: int = 0


#: whether pairs need a photo: those without one have boxes alone, are left out, or no photo is read at all
PhotoUse = Literal["optional", "required", "none"]


def read_triples(
    layout: str,
    folder: Path | None,
    rejections: Rejections,
    notes: Json,
    *,
    given: Mapping[str, Path] | None = None,
    images: Path | None = None,
    photos: PhotoUse = "optional",
) -> tuple[list[Triple], dict[str, Photo], str]:
    """The annotated relations of a data set, the photos that can be used, and its source in words.

    Args:
        layout: one of `LAYOUTS`.
        folder: of annotations and photos.
        given: annotation files by split, where they are not found in the folder by name.
        images: where the photos are, if not below the folder.
    """
    places = Places(images, folder)
    files = annotation_files(layout, folder, given or {}, places.remarks.append)
    triples: list[Triple] = []
    for split, path in files.items():
        own = None if split == "whole" else split
        triples += LAYOUTS[layout].read(path, own, rejections, places)
    if not triples:
        raise NearfarError(
            f"{', '.join(map(str, files.values()))}: no annotated relation. {rejections.summary()}."
        )
    if places.remarks:
        notes["remarks"] = places.remarks
    source = f"{layout}: {', '.join(str(path) for path in files.values())}"
    triples = _distinct_names(triples)
    if photos == "none":
        return triples, {}, source
    place = images or folder or next(iter(files.values())).parent
    if not place.is_dir():
        raise NearfarError(f"data.images={place}: no such folder.")
    known = [place] if images is not None else [place / "images", place / "photos", place]
    sought = PictureFiles(place, known, endings=True, given=images is not None)
    return triples, dict(usable_photos(triples, sought, rejections, notes)), source


def split_relations(
    triples: Sequence[Triple],
    photos: Mapping[str, Photo],
    relations: Sequence[str],
    source: str,
    shares: PictureShares,
    *,
    synonyms: bool = True,
    use: PhotoUse = "optional",
    composed: bool = False,
    rejections: Rejections | None = None,
    notes: Json | None = None,
) -> RelationData:
    """The usable pairs of ``relations``, split by picture.

    Args:
        triples, photos, source: as `read_triples` or `composed_scenes` give them.
        composed: the scenes were drawn for their splits.
        rejections, notes: what was noticed while they were read; more is added.

    Raises:
        NearfarError: no usable pair, a split without pairs, a photo in two splits.
    """
    rejections, notes = Rejections() if rejections is None else rejections, {} if notes is None else notes
    pairs = collect_pairs(
        triples,
        photos,
        relations,
        synonyms=synonyms,
        rejections=rejections,
        notes=notes,
        photos_required=use == "required",
    )
    missing = {row.image for row in triples} - set(photos)
    if missing and use != "none":
        notes["pictures_without_photo"] = len(missing)
    codes, how = _split(pairs, shares, composed)
    parts = {
        name: pairs.take(np.flatnonzero(codes == code).tolist())
        for code, name in enumerate(SPLITS)
        if (codes == code).any()
    }
    check_disjoint({name: sorted(set(part.image)) for name, part in parts.items()}, "picture")
    result = RelationData(parts, tuple(relations), source, how, rejections, notes)
    _check(result)
    return result


def _distinct_names(triples: list[Triple]) -> list[Triple]:
    """Name pictures by their paths where several files have one name (``train/1.jpg``, ``valid/1.jpg``)."""
    paths: dict[str, set[Path]] = {}
    for triple in triples:
        if triple.photo is not None:
            paths.setdefault(triple.image, set()).add(triple.photo)
    several = {name for name, files in paths.items() if len(files) > 1}
    return [row._replace(image=str(row.photo)) if row.image in several else row for row in triples]


def usable_photos(
    triples: Sequence[Triple], files: PictureFiles, rejections: Rejections, notes: dict[str, object]
) -> dict[str, File]:
    """The photo of each picture, checked by decoding it once; damaged ones and those of a different size are left out.

    A name may hold folders ("train2017/1.jpg"). Without a file of that name one that differs in its suffix alone is
    taken: some releases have GIFs as JPEGs. For several files of one name see `PictureFiles`.
    """
    stated: dict[str, Triple] = {}
    boxes: dict[str, list[Box]] = {}
    for triple in triples:
        stated.setdefault(triple.image, triple)
        boxes.setdefault(triple.image, []).extend((triple.subject_box, triple.object_box))
    paths: dict[str, Path] = {}
    several = []
    for image, triple in stated.items():
        file = PictureFile(triple.photo) if triple.photo else files.find(image, _pixels(triple.size))
        if file.path is not None:
            paths[image] = file.path
            if file.others:
                several.append(f"{file.path}, not {', '.join(file.others)}")
        elif file.reason != "missing picture":  # missing ones are counted together
            rejections.add(
                "several photos of one name", None, image, f"{file.detail}: data.images=FOLDER chooses"
            )
    if several:
        notes |= {"pictures_of_several_files": len(several), "first_of_several_files": several[0]}
    photos = {}
    for (image, path), check in zip(paths.items(), check_pictures(list(paths.values())), strict=True):
        size = _pixels(stated[image].size)
        if check.problem:
            rejections.add("damaged photo", None, image, check.problem)
        elif size is not None and size != (check.width, check.height):
            detail = f"{check.width} × {check.height} in truth, {size[0]} × {size[1]} in the file"
            rejections.add("photo of a different size", None, image, detail)
        elif size is None and too_small_for(boxes[image], check.width, check.height):
            detail = f"{check.width} × {check.height}, and most of its boxes reach over its edge"
            rejections.add("photo that is too small for its boxes", None, image, detail)
        else:
            photos[image] = File(path)
    return photos


def _pixels(size: tuple[float, float] | None) -> tuple[int, int] | None:
    """A stated size in whole pixels; None where it is not stated (0 stands for that, too)."""
    if size is None or not np.isfinite(size).all() or min(size) <= 0:
        return None
    return round(size[0]), round(size[1])


def _split(pairs: Pairs, shares: PictureShares, composed: bool) -> tuple[np.ndarray, str]:
    """0, 1 or 2 (train, val, test) for every pair, and how it was decided, in words."""
    declared = {name for name in pairs.declared if name is not None}
    images = list(dict.fromkeys(pairs.image))
    if shares.folds is not None:
        return _folds(pairs, images, shares.folds, shares)
    if "train" in declared:
        codes = np.array([SPLITS.index(name) if name else 0 for name in pairs.declared])
        if "val" in declared:
            return codes, "as composed" if composed else "as the files say"
        train = list(
            dict.fromkeys(image for image, code in zip(pairs.image, codes, strict=True) if code == 0)
        )
        held_out = set(_drawn(train, shares.val, shares.seed))
        codes[[image in held_out for image in pairs.image]] = 1
        return (
            codes,
            f"as the files say; val: {shares.val:g} of the training pictures, seed {shares.seed}",
        )
    test = _drawn(images, shares.test, shares.seed)
    rest = [image for image in images if image not in set(test)]
    val = _drawn(rest, shares.val / (1 - shares.test), shares.seed + 1)
    code = dict.fromkeys(test, 2) | dict.fromkeys(val, 1)
    codes = np.array([code.get(image, 0) for image in pairs.image])
    return codes, (
        f"by picture: val {shares.val:g}, test {shares.test:g} of the pictures, seed {shares.seed}"
    )


def _folds(pairs: Pairs, images: Sequence[str], folds: int, shares: PictureShares) -> tuple[np.ndarray, str]:
    if folds > len(images):
        raise NearfarError(
            f"data.folds={folds}: there are {len(images)} pictures. Take as many folds at most."
        )
    order = np.random.default_rng([shares.seed, folds]).permutation(len(images))
    fold_of = {images[i]: place % folds for place, i in enumerate(order)}
    rest = [image for image in images if fold_of[image] != shares.fold]
    held_out = set(_drawn(rest, shares.val, shares.seed + 1))
    codes = np.array(
        [2 if fold_of[image] == shares.fold else 1 if image in held_out else 0 for image in pairs.image]
    )
    return (
        codes,
        f"cross-validation by picture: fold {shares.fold + 1} of {folds} is test, seed {shares.seed}",
    )


def _drawn(images: Sequence[str], share: float, seed: int) -> list[str]:
    """A share of the pictures, chosen by (seed, the picture's name) alone: further pictures do not move the others.

    >>> few, many = (_drawn([f"{i}.jpg" for i in range(n)], 0.3, 0) for n in (100, 200))
    >>> len(few), set(few) == {name for name in many if int(name[:-4]) < 100}
    (35, True)
    """
    top = 16**12
    return [image for image in images if int(content_key("split", int(seed), image)[:12], 16) < share * top]


def _check(data: RelationData) -> None:
    train = data.splits.get("train")
    if train is None or len(train) < 2:
        raise NearfarError(
            f"the training split holds fewer than two pairs: give more pictures. {data.rejections.summary()}."
        )
    for name in ("val", "test"):
        if name not in data.splits and name == "val":
            raise NearfarError(
                "the validation split is empty: raise data.val_fraction, or name the files with data.train=, data.val=."
            )
    counts = Counter(train.relation)
    missing = [relation for relation in data.relations if relation not in counts]
    if len(counts) < 2:
        raise NearfarError(
            f"the training pairs have one relation alone ({next(iter(counts))}): there is nothing to tell apart. "
            f"Choose others with relations=; without a training pair are {', '.join(missing)}."
        )
    if missing:
        data.notes["relations_without_training_pairs"] = missing
