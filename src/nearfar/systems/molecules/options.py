"""The options of the molecule system: their ranges, and where its files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nearfar.errors import NearfarError, nearest_name
from nearfar.schedules import schedule

__all__ = ["check_options", "data_paths"]

#: option → (type, least, most); None is no bound
RANGES: dict[str, tuple[type, float | None, float | None]] = {
    "seed": (int, 0, None),
    "epochs": (int, 1, None),
    "batch_size": (int, 2, None),
    "lr": (float, 0.0, None),
    "weight_decay": (float, 0.0, None),
    "warmup": (float, 0.0, 1.0),
    "temperature": (float, 1e-4, None),
    "layers": (int, 1, None),
    "heads": (int, 1, None),
    "hidden": (int, 1, None),
    "dropout": (float, 0.0, 0.99),
    "embedding_dim": (int, 1, None),
    "fingerprint_hidden": (int, 1, None),
    "fingerprint_dropout": (float, 0.0, 0.99),
    "input_dropout": (float, 0.0, 0.99),
    "fingerprint_bits": (int, 8, None),
    "fingerprint_radius": (int, 0, None),
    "curriculum_epoch": (int, 0, None),
    "augment_atoms": (float, 0.0, 0.99),
    "augment_bonds": (float, 0.0, 0.99),
}
CHOICES = {
    "molecule_encoder": ("graph", "fingerprint", "both"),
    "text_head": ("none", "linear", "mlp"),
}
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test",),
}
ENDINGS = (".txt", ".tsv", ".csv", ".parquet")


def check_options(config: Any) -> None:
    """Raise ``NearfarError`` for the first option that is of the wrong type or out of range."""
    for name, (kind, least, most) in RANGES.items():
        value = config[name]
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or (kind is int and value != int(value)):
            wanted = "a whole number" if kind is int else "a number"
            raise NearfarError(f"{name}={value!r}: {wanted} is needed.")
        if (least is not None and value < least) or (most is not None and value > most):
            raise NearfarError(f"{name}={value} is out of range: {_range(least, most)}.")
    for name, choices in CHOICES.items():
        if config[name] not in choices:
            raise NearfarError(
                f"{name}={config[name]}: no such choice; {nearest_name(str(config[name]), choices)}"
            )
    if config.molecule_encoder != "fingerprint" and config.hidden % config.heads:
        raise NearfarError(f"hidden={config.hidden} must be a multiple of heads={config.heads}.")
    for value in _values(config.hard_ratio, config.epochs):
        if not 0 <= value <= 1:
            raise NearfarError(
                f"hard_ratio={config.hard_ratio}: a share of the batch between 0 and 1 is needed."
            )
    for value in _values(config.hardness_k, config.epochs):
        if value < 1:
            raise NearfarError(f"hardness_k={config.hardness_k}: at least one neighbour is needed.")
    threshold = config.false_negative_threshold
    if threshold is not None and not -1 < threshold <= 1:
        raise NearfarError(
            f"false_negative_threshold={threshold}: a cosine between -1 and 1 is needed (.95 is usual)."
        )
    if (config.augment_atoms or config.augment_bonds) and config.molecule_encoder == "fingerprint":
        raise NearfarError(
            "augment_atoms and augment_bonds act on graphs; molecule_encoder=fingerprint has none."
        )


def _values(spec: Any, epochs: int) -> list[float]:
    rule = schedule(spec)
    return [rule(epoch, epochs) for epoch in range(epochs)]


def _range(least: float | None, most: float | None) -> str:
    if most is None:
        return f"at least {least:g}"
    return f"{least:g} to {most:g}"


def data_paths(data: Any) -> dict[str, Path | None]:
    """The files of the splits: as given by name, or found in ``data.dir``.

    Raises ``NearfarError`` if a file is missing, or if there is a val or test file and nothing to train on.
    """
    paths: dict[str, Path | None] = {name: Path(data[name]) if data[name] else None for name in SPLIT_NAMES}
    if data.dir:
        folder = Path(data.dir)
        if not folder.is_dir():
            raise NearfarError(f"data.dir={folder}: no such folder.")
        for split, names in SPLIT_NAMES.items():
            found = [
                folder / f"{name}{end}"
                for name in names
                for end in ENDINGS
                if (folder / f"{name}{end}").exists()
            ]
            if paths[split] is None and found:
                paths[split] = found[0]
        if paths["train"] is None:
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
            raise NearfarError(
                f"data.dir={folder}: there is no train file ({', '.join('train' + e for e in ENDINGS)}). "
                f"In it: {there}. Name the files with data.train=, data.val=, data.test=."
            )
    for split, path in paths.items():
        if path is not None and not path.exists():
            raise NearfarError(f"data.{split}={path}: no such file.")
    if paths["train"] is None and (paths["val"] or paths["test"]):
        raise NearfarError("data.val or data.test is given, but no data.train to learn from.")
    return paths
