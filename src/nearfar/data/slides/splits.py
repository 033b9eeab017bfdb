"""Splits by slide: by name, at random, or by ``train_samples.txt``, ``val_samples.txt`` and ``test_samples.txt``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from nearfar.data.files import write_text
from nearfar.data.splits import check_disjoint
from nearfar.data.tables import read_table
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "SPLITS",
    "check_splits",
    "draw_splits",
    "patients_of",
    "read_split_files",
    "write_split_files",
]

SPLITS = ("train", "val", "test")


def read_split_files(folder: Path) -> dict[str, list[str]]:
    """The slides that the files of a folder list, by split; empty where there is no file.

    Raises:
        NearfarError: a slide in two splits or twice in one, a file that cannot be read.
    """
    splits: dict[str, list[str]] = {}
    for split in SPLITS:
        path = folder / f"{split}_samples.txt"
        if path.exists():
            if not path.is_file():
                raise NearfarError(f"{path} is no file; a name of a slide on each line is expected.")
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise NearfarError(f"{path} cannot be read: {error}.") from None
            splits[split] = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    check_splits(splits, where=str(folder))
    return splits


def write_split_files(folder: Path, splits: Mapping[str, Sequence[str]]) -> None:
    """Write the three files, empty for a split of no slides."""
    for split in SPLITS:
        text = "".join(f"{name}\n" for name in splits.get(split, ()))
        write_text(folder / f"{split}_samples.txt", text)


def check_splits(
    splits: Mapping[str, Sequence[str]],
    slides: Sequence[str] | None = None,
    patients: Mapping[str, str] | None = None,
    where: str = "",
) -> None:
    """``NearfarError`` for a slide in two splits or twice in one, a slide that is not among ``slides``, or (where
    ``patients`` are given) a patient in two splits."""
    for split, names in splits.items():
        for name in names:
            if names.count(name) > 1 if isinstance(names, list) else list(names).count(name) > 1:
                raise NearfarError(f"{where + ': ' if where else ''}slide {name} stands twice in {split}.")
            if slides is not None and name not in slides:
                raise NearfarError(
                    f"{split} names slide {name!r}, which is not there; {nearest_name(name, slides)}"
                )
    check_disjoint(splits, what="slide")
    if patients is not None:
        check_disjoint(
            {split: [patients[name] for name in names] for split, names in splits.items()}, what="patient"
        )


def draw_splits(
    slides: Sequence[str],
    patients: Mapping[str, str],
    *,
    val: Sequence[str] = (),
    test: Sequence[str] = (),
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    by: Literal["slide", "patient"] = "slide",
    seed: int = 0,
) -> dict[str, list[str]]:
    """Splits by name or at random; slides in neither val nor test train.

    Args:
        slides, patients: the slides in order, and the patient of each.
        val, test: slides of a split, by name; with ``by="patient"`` patients are understood too, and all slides of a
            patient must be named together.
        val_fraction, test_fraction: shares of the slides (of the patients) drawn for a split that is not named.
        by: what must not be in two splits, and what is drawn.

    >>> draw_splits(["A1", "A2", "B1"], {"A1": "A", "A2": "A", "B1": "B"}, test=["A"], by="patient")
    {'train': ['B1'], 'val': [], 'test': ['A1', 'A2']}
    """
    named = {"val": _named(val, slides, patients, by), "test": _named(test, slides, patients, by)}
    fractions = {"val": val_fraction, "test": test_fraction}
    for split, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise NearfarError(
                f"{split}_fraction={fraction}: a share of the {by}s from 0 to below 1 is needed."
            )
        if fraction and named[split]:
            raise NearfarError(f"{split} is given by name and by {split}_fraction; give one of the two.")
    unit = {name: name if by == "slide" else patients[name] for name in slides}
    taken = {unit[name] for names in named.values() for name in names}
    free = sorted(set(unit.values()) - taken)
    drawn = [free[at] for at in np.random.default_rng(seed).permutation(len(free)).tolist()]
    every = len(set(unit.values()))
    for split, fraction in fractions.items():
        if fraction:
            count = max(1, round(fraction * every))
            chosen, drawn = set(drawn[:count]), drawn[count:]
            named[split] = [name for name in slides if unit[name] in chosen]
    not_training = {*named["val"], *named["test"]}
    splits = {"train": [name for name in slides if name not in not_training], **named}
    check_splits(splits, slides, patients if by == "patient" else None)
    if not splits["train"]:
        raise NearfarError(f"of {len(slides)} slides none is left to train on: val and test take them all.")
    return splits


def _named(names: Sequence[str], slides: Sequence[str], patients: Mapping[str, str], by: str) -> list[str]:
    chosen = []
    for name in names:
        if name in slides:
            chosen.append(name)
        elif by == "patient" and name in patients.values():
            chosen += [slide for slide in slides if patients[slide] == name]
        else:
            raise NearfarError(f"there is no slide {name!r}; {nearest_name(name, slides)}")
    return chosen


def patients_of(slides: Mapping[str, str | None], rule: str | None) -> dict[str, str]:
    """The patient of each slide.

    Args:
        slides: for each slide what its own files say, or None.
        rule: a table with the columns slide (or id, sample) and patient, or a regular expression whose first group (or
            whole match) in the slide's name is the patient, or None: what the files say, else each slide its own.

    >>> patients_of({"B4": None, "C12": None}, "[A-H]")
    {'B4': 'B', 'C12': 'C'}
    """
    if rule is None:
        return {name: stated or name for name, stated in slides.items()}
    if Path(rule).is_file():
        columns = {
            "slide": ["slide", "id", "sample", "sample_id"],
            "patient": ["patient", "patient_id", "subject"],
        }
        table = read_table(rule, columns)
        known = dict(zip(table["slide"], table["patient"], strict=True))
        missing = [name for name in slides if not known.get(name)]
        if missing:
            raise NearfarError(f"{rule} names no patient of slide {', '.join(missing[:5])}.")
        return {name: known[name] for name in slides}
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise NearfarError(f"patients={rule}: neither a file nor a regular expression ({error}).") from None
    matched = {}
    for name in slides:
        match = pattern.search(name)
        if match is None or not match.group(1 if pattern.groups else 0):
            raise NearfarError(f"patients={rule}: nothing in the name of slide {name} matches.")
        matched[name] = match.group(1 if pattern.groups else 0)
    return matched
