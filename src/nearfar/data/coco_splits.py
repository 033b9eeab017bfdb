"""Files in COCO format into the splits of an experiment, checked for leaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nearfar.data.cache import content_key
from nearfar.data.coco import CocoSplit, read_coco
from nearfar.data.files import Json
from nearfar.data.splits import check_disjoint
from nearfar.errors import NearfarError

__all__ = ["DetectionData", "equal_bytes", "read_coco_splits"]


def read_coco_splits(
    files: Mapping[str, Path],
    *,
    folder: Path | None = None,
    images: Path | None = None,
    category: str | None = None,
    group_key: str | None = None,
    groups: Sequence[str] | None = None,
    val_fraction: float = 0.15,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, CocoSplit]:
    """The splits ``train``, ``val`` and ``test`` of files in COCO format.

    Three files are the three splits. With a val file and no test file, the val file is the test split, and
    ``val_fraction`` of train, stratified by group, becomes the validation split: a score that chose the epoch is
    biased and must not be reported. With a train file alone, val and test are held out of it.

    Args:
        files: "train", and perhaps "val" and "test" (`nearfar.data.coco_files.coco_files` finds them).
        folder: the data folder, below which pictures are looked for.
        images: where the pictures are, if not where exporters put them.
        category: the only one that is read; None: all of the training file.
        group_key, groups: the attribute that makes groups, and its two values.
        val_fraction, seed: of what is held out.

    Raises:
        NearfarError: unreadable files (see `read_coco`), none of train's categories or groups in val or test, one
            picture file in two splits, too few pictures to hold any out.
    """
    categories = None if category is None else [category]
    groups = None if groups is None else list(groups)
    read: dict[str, CocoSplit] = {}
    for name, path in files.items():
        split = read_coco(
            path,
            images,
            categories=categories,
            missing_categories="allow" if read else "error",
            group_key=group_key,
            groups=groups,
            folder=folder,
            say=say,
        )
        if not read:
            categories, groups = list(split.categories), list(split.groups) or None
        rejected = [split.rejections.summary()] if len(split.rejections) else []
        for sentence in [
            *rejected,
            *split.remarks(),
            *_unknown(read.get("train"), split, category is not None),
        ]:
            say(f"{name}: {path}: {sentence}")
        read[name] = split
    if read["train"].crowd.all():
        raise NearfarError(
            f"{read['train'].source}: every box is one around a crowd (iscrowd=1): there is none to learn from. Give "
            "boxes around single objects, with iscrowd=0."
        )
    if "test" not in read:
        train = read.pop("train")
        if "val" in read:
            say(
                f"{files['val'].name} is the test split; {val_fraction:.0%} of train is held out to choose epochs on"
            )
            test = read.pop("val")
            train, val = _hold_out(train, val_fraction, seed)
        else:
            say(
                f"there is one file: {val_fraction:.0%} of it is the test split, as much is held out to choose "
                "epochs on"
            )
            train, test = _hold_out(train, val_fraction, seed)
            train, val = _hold_out(train, val_fraction, seed + 1)
        read = {"train": train, "val": val, "test": test}
    elif "val" not in read:
        say(f"there is no file for val: {val_fraction:.0%} of train is held out to choose epochs on")
        read["train"], read["val"] = _hold_out(read["train"], val_fraction, seed)
    read = {name: read[name] for name in ("train", "val", "test") if name in read}
    check_disjoint({name: split.files for name, split in read.items()}, "picture")
    for sentence in equal_bytes(read):
        say(sentence)
    return read


def equal_bytes(splits: dict[str, CocoSplit]) -> list[str]:
    """A sentence for every two splits that hold pictures of the same bytes: one may be a copy of the other."""
    digests = {name: [image.digest for image in split.images] for name, split in splits.items()}
    shared = check_disjoint(digests, "picture", on_leak="count")
    return [
        f"{' and '.join(pair.split('/'))}: {leak['rows']} pictures of the second are byte for byte in the first, too: "
        "a leak, if they are copies"
        for pair, leak in shared.items()
    ]


def _unknown(train: CocoSplit | None, split: CocoSplit, one: bool) -> list[str]:
    """A sentence for each kind of category that the training file lacks, in name or in boxes, and this file has."""
    if train is None:
        return []
    sentences = []
    if split.left_out and not one:
        sentences.append("the training file does not have these categories: nothing is learned of them")
    known, here = set(train.label.tolist()), set(split.label.tolist())
    names = [train.categories[i] for i in sorted(here - known)]
    if names:
        sentences.append(f"no training box of {', '.join(names)}: it cannot be found")
    return sentences


@dataclass(frozen=True)
class DetectionData:
    """The splits of one experiment, as ``nearfar data`` shows them and a run records them."""

    splits: dict[str, CocoSplit]

    def layout(self) -> Json:
        """Counts, groups, rejections and hashes of each split, and one hash of all content."""
        return {
            "splits": {name: {"n": len(split), **split.layout()} for name, split in self.splits.items()},
            "classes": list(self.splits["train"].categories),
            "data_hash": content_key([split.content for split in self.splits.values()])[:16],
        }

    def summary(self) -> str:
        """A line for each split: pictures, those of each group, boxes."""
        lines = []
        for name, split in self.splits.items():
            groups = split.layout()["groups"]
            counts = ", ".join(f"{count['images']} {group}" for group, count in groups.items())
            lines.append(
                f"{name}: {len(split)} pictures{f' ({counts})' * bool(counts)}, {len(split.boxes)} boxes"
            )
        return "\n".join(lines)


def _hold_out(split: CocoSplit, fraction: float, seed: int) -> tuple[CocoSplit, CocoSplit]:
    """The split without a ``fraction`` of its pictures, and these; of each group the same share."""
    rng = np.random.default_rng([seed, len(split)])
    group = np.array([image.group for image in split.images])
    chosen = np.zeros(len(split), bool)
    for value in np.unique(group):
        members = rng.permutation(np.flatnonzero(group == value))
        chosen[members[: round(fraction * len(members))]] = True
    if chosen.all() or not chosen.any():
        raise NearfarError(
            f"{split.source}: data.val_fraction={fraction:g} of {len(split)} pictures leaves a split empty. Raise "
            "data.val_fraction (0.4, say), give more pictures, or name files with data.val=FILE data.test=FILE."
        )
    return split.take(np.flatnonzero(~chosen)), split.take(np.flatnonzero(chosen))
