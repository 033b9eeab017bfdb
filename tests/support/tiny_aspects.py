"""Tiny aspect files in every layout, written by tests."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from nearfar.data.reviews.aspect_data import embedded_records
from nearfar.data.reviews.records import Records

WORDS = {1: "Negative", 2: "Neutral", 3: "Positive"}


def reviews(n: int = 300, seed: int = 0) -> Records:
    return embedded_records(n, seed)[0]


def write_field(path: Path, records: Records, chosen: Sequence[int]) -> Path:
    """As UIT-ViSFD writes it."""
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["index", "comment", "n_star", "date_time", "label"])
        for number, i in enumerate(chosen):
            label = "".join(f"{{{aspect}#{WORDS[code]}}};" for aspect, code in records.labels[i].items())
            out.writerow([number, records.texts[i], 5, "1/1/2020", label])
    return path


def write_columns(path: Path, records: Records, chosen: Sequence[int], aspects: Sequence[str]) -> Path:
    """One column per aspect, with a byte-order mark."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        out = csv.writer(file)
        out.writerow(["data", *aspects])
        for i in chosen:
            out.writerow([records.texts[i], *(WORDS.get(records.labels[i].get(a, 0), "") for a in aspects)])
    return path


def split_folder(folder: Path, n: int = 300, test: bool = True, seed: int = 0) -> Path:
    """Train.csv, Dev.csv and perhaps Test.csv in the layout of UIT-ViSFD."""
    records = reviews(n, seed)
    parts = {"Train": range(n * 6 // 10), "Dev": range(n * 6 // 10, n * 8 // 10)}
    if test:
        parts["Test"] = range(n * 8 // 10, n)
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in parts.items():
        write_field(folder / f"{name}.csv", records, list(chosen))
    return folder
