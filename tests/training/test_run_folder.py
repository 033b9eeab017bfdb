from __future__ import annotations

from pathlib import Path

import pytest

from nearfar.errors import NearfarError
from nearfar.training.run_folder import RunFolder, environment


def test_a_cut_off_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append({"kind": "step", "step": 1})
    with folder.log_path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert [r["step"] for r in folder.log()] == [1]
    folder.keep_log_until(5)
    folder.append({"kind": "step", "step": 2})
    assert [r["step"] for r in folder.log()] == [1, 2]


def test_missing_and_damaged_files_say_so(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(NearfarError, match="no such file"):
        folder.read_json("metrics.json")
    with pytest.raises(NearfarError, match="is not a run"):
        folder.config()
    folder.write_text("metrics.json", "{")
    with pytest.raises(NearfarError, match="not valid JSON"):
        folder.read_json("metrics.json")


def test_environment_names_what_computes() -> None:
    found = environment()
    assert {"torch", "numpy", "lightning"} <= found["packages"].keys()
    assert found["torch_threads"] >= 1
