"""Files that are written beside their place and renamed into it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nearfar.data.files import (
    is_temporary,
    read_arrays,
    read_json,
    write_arrays,
    write_atomically,
    write_json,
    write_text,
)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fails(file: object) -> None:
        file.write(b"ne")  # type: ignore[attr-defined]
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fails)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_texts_json_and_arrays_are_read_back(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "größer\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "größer\n".encode()
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}
    for compressed in (False, True):
        write_arrays(tmp_path / "a.npz", {"x": np.arange(3), "k": np.int64(5)}, compressed)
        kept = read_arrays(tmp_path / "a.npz")
        assert (kept["x"].tolist(), int(kept["k"])) == ([0, 1, 2], 5)


def test_files_that_a_kill_left_are_known(tmp_path: Path) -> None:
    assert is_temporary(".map.npz.123.ab_c.tmp")
    assert not is_temporary("map.npz")
