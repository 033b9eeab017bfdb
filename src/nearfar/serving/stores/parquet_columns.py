"""Ids and columns of the rows of a store in a Parquet file, of which a search reads the row groups that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from nearfar.errors import NearfarError
from nearfar.serving.stores.base import Columns, Row
from nearfar.serving.stores.filters import Condition, Kind

if TYPE_CHECKING:
    import pyarrow

__all__ = ["ParquetColumns", "columns_schema", "columns_table", "write_columns", "write_table"]

_GROUP = 8192  # rows of a row group: what is read to show one row
_GROUPS_KEPT = 64 << 20  # bytes of row groups that are kept decoded


# -- writing -------------------------------------------------------------------------------------------------
def columns_schema(kinds: Mapping[str, Kind], fields: Mapping[str, str]) -> pyarrow.Schema:
    """``id``, and the columns by the ``fields`` that stand for them in a file."""
    import pyarrow

    types = {"text": pyarrow.string(), "number": pyarrow.float64(), "boolean": pyarrow.bool_()}
    own = [(field, types[kinds[name]]) for name, field in fields.items()]
    return pyarrow.schema([("id", pyarrow.string()), *own])


def columns_table(
    ids: list[str], columns: Columns, fields: Mapping[str, str], schema: pyarrow.Schema
) -> pyarrow.Table:
    """Rows in memory as a table of this schema."""
    import pyarrow

    arrays = {"id": ids} | {fields[name]: values for name, values in columns.items()}
    return pyarrow.table(arrays, schema=schema)


def write_table(table: pyarrow.Table, file: IO[bytes]) -> None:
    """One table as a file of its own."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, file, compression="zstd")


def write_columns(file: IO[bytes], schema: pyarrow.Schema, tables: Iterable[pyarrow.Table]) -> None:
    """Tables one after the other, in row groups of one size."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        waiting: pyarrow.Table | None = None
        for table in tables:
            if waiting is not None:
                table = pyarrow.concat_tables([waiting, table]).combine_chunks()
            whole = len(table) // _GROUP * _GROUP
            if whole:
                writer.write_table(table.slice(0, whole), row_group_size=_GROUP)
                table = table.slice(whole)
            waiting = table
        if waiting is not None and len(waiting):
            writer.write_table(waiting)


# -- reading -------------------------------------------------------------------------------------------------
class ParquetColumns:
    """The file that `write_columns` wrote, memory-mapped.

    Args:
        path: of the file.
        rows: how many rows it should have.
        fields: by column, the name that stands for it in the file.
        damaged: the error for a file that is not as it was written, from what is wrong with it.
    """

    def __init__(
        self, path: Path, rows: int, fields: Mapping[str, str], damaged: Callable[[str], NearfarError]
    ) -> None:
        import pyarrow
        import pyarrow.parquet

        self.rows, self.fields, self._damaged = rows, fields, damaged
        try:
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise damaged(f"{path.name} cannot be read ({str(error).splitlines()[0]})") from None
        names = set(self._file.schema_arrow.names)
        if self._file.metadata.num_rows != rows or names != {"id", *fields.values()}:
            raise damaged(f"{path.name} does not hold the columns that it should")
        self._groups: dict[int, pyarrow.Table] = {}  # row groups that were read last, the latest at the end

    def table(self, fields: Sequence[str] | None = None) -> pyarrow.Table:
        """All rows, with these fields; None: with all."""
        import pyarrow

        try:
            return self._file.read(columns=None if fields is None else list(fields))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise self._damaged(f"columns cannot be read ({str(error).splitlines()[0]})") from None

    def passing(self, where: Sequence[Condition]) -> np.ndarray:
        """Which rows pass the conditions."""
        import pyarrow
        import pyarrow.compute as compute

        order = {
            "<": compute.less,
            "<=": compute.less_equal,
            ">": compute.greater,
            ">=": compute.greater_equal,
        }
        table = self.table(list({self.fields[each.column] for each in where}))
        passing = np.ones(self.rows, bool)
        for each in where:
            column = table.column(self.fields[each.column])
            if each.operator in ("in", "not in"):
                mask = compute.is_in(column, value_set=pyarrow.array(each.values, type=column.type))
                if each.operator == "not in":
                    mask = compute.and_(compute.invert(mask), compute.is_valid(column))
            else:
                mask = compute.fill_null(order[each.operator](column, each.values[0]), False)
            passing &= np.asarray(mask)
        return passing

    def rows_at(self, positions: np.ndarray) -> tuple[list[str], list[Row]]:
        """Ids and columns of ascending positions; row groups without any are not read."""
        import pyarrow

        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        begins = np.concatenate([[0], np.cumsum(sizes)])
        groups = np.searchsorted(begins, positions, side="right") - 1
        parts = []
        try:
            for group in np.unique(groups).tolist():
                inside = positions[groups == group] - begins[group]
                parts.append(self._group(group).take(pyarrow.array(inside)))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise self._damaged(f"columns cannot be read ({str(error).splitlines()[0]})") from None
        if not parts:
            return [], []
        table = pyarrow.concat_tables(parts)
        columns = {name: table.column(field).to_pylist() for name, field in self.fields.items()}
        ids = table.column("id").to_pylist()
        return ids, [{name: values[i] for name, values in columns.items()} for i in range(len(ids))]

    def _group(self, number: int) -> pyarrow.Table:
        """A row group with all its columns; the last ones are kept, so that many small searches decode them once."""
        group = self._groups.pop(number, None)
        if group is None:
            group = self._file.read_row_group(number)
        self._groups[number] = group
        oldest = list(self._groups)
        while len(oldest) > 1 and sum(each.nbytes for each in list(self._groups.values())) > _GROUPS_KEPT:
            self._groups.pop(oldest.pop(0), None)
        return group
