"""Whatever data is kept in, read as items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nearfar.data.arrow import hub_items, hub_name, parquet_items
from nearfar.data.items import Items
from nearfar.data.table_formats import PARQUET_SUFFIXES, REFUSED, full_suffix
from nearfar.data.table_items import ARRAY_SUFFIXES, array_items, table_items
from nearfar.data.tables import TABLE_SUFFIXES, require_file

__all__ = ["read_items"]


def read_items(
    path: str | Path,
    columns: Sequence[str | int] | None = None,
    *,
    id_column: str | int | None = None,
    group_column: str | int | None = None,
    encoding: str | None = None,
    encoding_option: str = "encoding",
    naming: str = "columns=[NAME]",
) -> Items:
    """The items of a file, a folder or a name on the Hugging Face hub, whatever its format.

    A missing value is None (in floats: NaN), not a rejection.

    Args:
        path: a table (CSV, TSV, JSON, JSON lines, Parquet, xlsx, ``.npy``, ``.npz``), …
        columns: names of those wanted; None: all. Letter case, blanks and ``-`` against ``_`` do not matter. Numbers
            (1, 2, …) are columns of a file without a header line.
        id_column: of ids; None: a column called ``id`` whose values differ, or else ``row2``, ….
        group_column: what splits keep together.
        encoding, encoding_option: of a text file, and how the caller's users give it; None: UTF-8.
        naming: how the caller's users give the column ``{name}``, for the message that asks them to.

    Raises:
        NearfarError: what `nearfar.data.tables.open_table` raises, a missing column (with the nearest name and the
            columns there are), no usable row.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "words.tsv"
    >>> _ = file.write_text("id\\tword\\tdefinition\\nn1\\tnear\\tat a short distance\\nn2\\tfar\\t\\n")
    >>> items = read_items(file, ["word", "definition"])
    >>> items.ids, items["word"], items["definition"]
    (['n1', 'n2'], ['near', 'far'], ['at a short distance', None])
    """
    wanted = None if columns is None else [str(name) for name in columns]
    id_name = None if id_column is None else str(id_column)
    group_name = None if group_column is None else str(group_column)
    place = Path(path).expanduser()
    if not place.exists() and hub_name(str(path)) is not None and _by_hub(str(path)):
        return hub_items(str(path), wanted, id_name, group_name, naming)
    require_file(place)
    suffix = full_suffix(place)
    if suffix in PARQUET_SUFFIXES:
        return parquet_items(place, wanted, id_name, group_name, naming)
    if place.suffix.lower() in ARRAY_SUFFIXES:
        return array_items(place, wanted, id_name, group_name, naming)
    return table_items(place, wanted, id_name, group_name, encoding, encoding_option, naming)


def _by_hub(text: str) -> bool:
    """Whether ``a/b``, which is no file or folder here, means a name on the hub: no folder ``a``, no known ending."""
    ending = "".join(Path(text).suffixes[-1:]).lower()
    known = (*TABLE_SUFFIXES, *ARRAY_SUFFIXES, ".gz", ".zip", ".tar", ".tgz", *REFUSED)
    return text.startswith("hf:") or (ending not in known and not Path(text).parent.exists())
