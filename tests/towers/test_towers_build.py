"""Choosing towers by name, towers of other packages, and docs/towers.md: its tables and its example are the code."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.towers import Tower, build_tower, guess_tower, load_tower, register_tower, tower_names
from nearfar.towers.build import TOWERS, tower_class
from nearfar.towers.text import TEXT_ENCODERS
from processes import command

PAGE = Path(__file__).parents[2] / "docs" / "towers.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="installed without its sources")


def shown(value: Any) -> str:
    """A default as YAML writes it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def defaults(cls: type[Any]) -> dict[str, str]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: shown(p.default) for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "cache"}


def example() -> str:
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "(Tower)" in c)
    return code


@pytest.mark.parametrize("kind", TOWERS)
def test_the_page_has_every_option_with_its_default(kind: str) -> None:
    sections = re.split(
        r"^### `(\w+)`$", PAGE.read_text().split("## A tower of your own")[0], flags=re.MULTILINE
    )
    assert kind in sections, f"docs/towers.md has no section ### `{kind}`"
    table = sections[sections.index(kind) + 1]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .+ \|$", table.split("<!--")[0], flags=re.MULTILINE)
    assert dict(rows) == defaults(tower_class(kind))


def test_the_page_has_every_method() -> None:
    table = PAGE.read_text().split("## What a tower does")[1].split("##")[0]
    named = set(re.findall(r"`(\w+)\(", table))
    assert named == {name for name, _ in inspect.getmembers(Tower, inspect.isroutine) if name[0] != "_"} | {
        "__init__"
    }


def test_the_page_has_the_options_of_every_text_encoder() -> None:
    """NEARFAR_WRITE_DOCS=1 writes them."""
    rows = [
        f"| `{name}` | {', '.join(f'`{option}: {value}`' for option, value in defaults(cls).items())} |"
        for name, cls in TEXT_ENCODERS.items()
    ]
    table = "\n".join(["| encoder | options and defaults |", "|---|---|", *rows])
    before, rest = PAGE.read_text().split("<!-- text encoders -->")
    text = f"{before}<!-- text encoders -->\n\n{table}\n\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    if os.environ.get("NEARFAR_WRITE_DOCS"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text, (
        "write it anew: NEARFAR_WRITE_DOCS=1 pytest tests/towers/test_towers_build.py"
    )


@pytest.fixture
def dna(monkeypatch: pytest.MonkeyPatch) -> type[Tower]:
    space: dict[str, Any] = {}
    exec(example(), space)
    monkeypatch.setattr("nearfar.towers.build.TOWERS", dict(TOWERS))
    register_tower("dna", space["DnaTower"])
    return space["DnaTower"]


def test_the_tower_of_the_page(dna: type[Tower], tmp_path: Path) -> None:
    assert len(example().splitlines()) < 50
    assert "dna" in tower_names()
    tower = build_tower("dna", "views.dna", k=2, width=5)
    assert tower.check(["ACGT", "A", "ACGU"]) == [None, "no DNA", "no DNA"]
    shares = tower.read(["ACAC"]).batch(torch.tensor([0]))
    assert torch.equal(shares.nonzero()[:, 1], torch.tensor([1, 4])), "AC and CA"
    assert shares.sum().item() == pytest.approx(1)
    assert tower.build()(shares).shape == (1, 5)
    tower.save(tmp_path)
    assert load_tower(tmp_path).options == {"k": 2, "width": 5}
    with pytest.raises(
        NearfarError, match=r"views\.dna: a dna tower has no option 'widht'; did you mean 'width'"
    ):
        build_tower("dna", "views.dna", widht=5)


def install(folder: Path, value: str) -> None:
    """What pip leaves of a package with that tower."""
    info = folder / "helix-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "helix.py").write_text(example() + "\n\nOTHER = int\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: helix\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[nearfar.towers]\ndna = {value}\n")


def pairs(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        word, letters = ("binds copper", "AC") if i % 2 else ("binds zinc", "GT")
        rows.append(f"{''.join(rng.choice(list(letters + 'A'), 12))},{word} at site {i}")
    (folder / "genes.csv").write_text("\n".join(["dna,function", *rows, "not DNA,unknown"]) + "\n")
    fixed = ["experiment=pairs", "data.train=genes.csv", "views=[dna,function]", "epochs=1", "batch_size=16"]
    fixed += [
        "text_encoder.dims=8",
        "text_encoder.min_df=1",
        "text_encoder.max_df=1.0",
        "embedding_dim=8",
        "bootstrap=0",
        "name=run",
        "trainer.accelerator=cpu",
    ]
    return command("train", *fixed, *arguments, cwd=folder, path=folder)


@pytest.mark.slow
@pytest.mark.usefixtures("module_cache")
def test_a_tower_of_a_package_outside_trains_by_its_name(tmp_path: Path) -> None:
    install(tmp_path, "helix:DnaTower")
    done = pairs(tmp_path, "towers.dna.tower=dna", "towers.dna.k=2")
    assert done.returncode == 0, done.stderr
    layout = json.loads((tmp_path / "runs" / "run" / "dataset_layout.json").read_text())
    assert layout["views"]["dna"] == "DNA as words of 2 letters, a layer of 64"
    assert "dna: no DNA" in json.dumps(layout["splits"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("helix:OTHER", "has to be a class below nearfar.towers.Tower"),
        ("helix.gone:DnaTower", "cannot be imported"),
    ],
)
def test_a_faulty_entry_point_is_named(tmp_path: Path, value: str, message: str) -> None:
    install(tmp_path, value)
    done = pairs(tmp_path, "towers.dna.tower=dna")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a.png", None], "image"),
        (["a.png", "b"], "text"),
        ([[1.0, 2.0], None], "vector"),
        ([None, None], "text"),
        (np.zeros((2, 3)), "vector"),
        (np.zeros((2, 8, 8, 3), np.uint8), "image"),
        (np.zeros((2, 8), np.uint8), "vector"),
    ],
)
def test_the_kind_is_guessed_from_values(values: Any, kind: str) -> None:
    assert guess_tower(values) == kind


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(NearfarError, match=r"tower='imag' is unknown; did you mean 'image'"):
        build_tower("imag")
