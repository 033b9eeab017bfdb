"""Which spots of a file are of which section of tissue: several libraries in one file are several slides.

A file that was concatenated holds spots of several pictures. Their places and neighbours mean nothing across pictures,
so a file is divided by the column of ``obs`` that names the library of each spot, or refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Section", "check_one_section", "rows_of", "sections_of"]

#: columns that name the section of a spot, surest first
COLUMNS = (
    "library_id", "library_key", "library", "sample_id", "sample", "sample_name", "section_id", "section", "slide_id",
    "slide", "capture_area", "batch",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """The spots of which ``column`` is ``value``; without a column all spots.

    ``first``: spots of which the column says nothing are counted as rejected with this section.
    """

    column: str | None = None
    value: str | None = None
    first: bool = True


def sections_of(
    obs: pd.DataFrame, libraries: Sequence[str], path: Path, single: bool = True
) -> list[Section]:
    """The sections of a file.

    The column is the one whose values are the names of ``libraries`` (of ``uns['spatial']``), however it is called;
    where there are none, the first of the usual names that holds several values.

    Raises:
        NearfarError: several libraries and no column that tells them apart, or two columns that differ.

    >>> import pandas as pd
    >>> obs = pd.DataFrame({"where": ["a", "b", "a"], "batch": [0, 0, 1]})
    >>> [section.value for section in sections_of(obs, ["a", "b"], Path("s.h5ad"))]
    ['a', 'b']
    >>> [section.value for section in sections_of(obs, [], Path("s.h5ad"))]
    ['0', '1']
    """
    usual = sorted(
        (name for name in obs.columns if str(name).lower() in COLUMNS),
        key=lambda name: COLUMNS.index(str(name).lower()),
    )
    rest = [name for name in obs.columns if name not in usual]
    naming = [name for name in [*usual, *rest] if _names_of(obs[name], libraries)]
    if len(libraries) > 1:
        if not naming:
            raise NearfarError(
                f"{path} holds {len(libraries)} libraries ({', '.join(libraries[:5])}), and no column of obs says "
                "which spot is of which: write obs['library_id'] with these names, or a file for each library."
            )
        values = [_texts(obs[name]) for name in naming]
        if any(each != values[0] for each in values[1:]):
            raise NearfarError(
                f"{path}: obs['{naming[0]}'] and obs['{naming[1]}'] both name libraries, and differ: remove one."
            )
        return _divided(obs, naming[0])
    for name in usual:
        count = obs[name].nunique()
        if 1 < count <= max(len(obs) // 2, 2):
            return _divided(obs, name)
    if not single:
        raise NearfarError(
            f"{path} says that it holds several sections (uns['spatial']['is_single'] is False), and no column of obs "
            "says which spot is of which: write obs['library_id'], or a file for each section."
        )
    return [Section(None, libraries[0] if libraries else None)]


def rows_of(section: Section, obs: pd.DataFrame) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Which spots are of a section, and which are of none that is known and counted with this one."""
    if section.column is None:
        return np.ones(len(obs), bool), np.zeros(len(obs), bool)
    texts = _texts(obs[section.column])
    own = np.array([text == section.value for text in texts], bool)
    unknown = np.array([section.first and text is None for text in texts], bool)
    return own, unknown


def check_one_section(obs: pd.DataFrame, depths: np.ndarray | None, path: Path) -> None:
    """``NearfarError`` for spots of one slide that lie in several: at several depths, or twice on the array.

    A place of the array that spots share by chance, or a column that is the same for all, says nothing.
    """
    told = None
    if depths is not None and len(np.unique(depths[np.isfinite(depths)])) > 1:
        told = "obsm['spatial'] has places at several depths (its third column)"
    elif {"array_row", "array_col"} <= set(obs.columns):
        grid = obs[["array_row", "array_col"]].dropna()
        grid = grid[~grid.index.duplicated()]  # of these the second is rejected by its name
        if grid.nunique().min() > 1 and grid.duplicated().mean() > 0.05:
            told = "spots stand on the same places of the array (array_row, array_col)"
    if told:
        raise NearfarError(
            f"{path} holds several sections and does not say which spot is of which: {told}. Write obs['library_id'], "
            "or a file for each section."
        )


def _divided(obs: pd.DataFrame, column: str) -> list[Section]:
    values = sorted({text for text in _texts(obs[column]) if text is not None})
    return [Section(column, value, at == 0) for at, value in enumerate(values)]


def _texts(values: pd.Series) -> list[str | None]:
    return [
        None if gone else str(value)
        for value, gone in zip(values.tolist(), values.isna().tolist(), strict=True)
    ]


def _names_of(values: pd.Series, libraries: Sequence[str]) -> bool:
    """Whether a column holds names of libraries and nothing else."""
    if not libraries or values.dtype.kind in "fc":
        return False
    there = {str(value) for value in values.dropna().unique().tolist()}
    return bool(there) and there <= set(libraries)
