"""The gallery of broken runs: every notebook names its fault, and finds nothing once it is repaired; and its page.

``NEARFAR_WRITE_DOCS=1 pytest tests/test_gallery.py`` writes docs/gallery.md and its pictures from these runs.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nearfar.data.files import write_atomically, write_text

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "broken_runs"
PAGE = ROOT / "docs" / "gallery.md"
PICTURES = ROOT / "docs" / "images" / "gallery"
SHARED = "gallery"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != SHARED)
WRITING = bool(os.environ.get("NEARFAR_WRITE_DOCS"))
INTRODUCTION = f"""# Gallery of broken runs

{len(NAMES)} small runs that break one thing on purpose, each beside the same run repaired. Every one is a notebook in
the percent format of Jupytext, `examples/broken_runs/NAME.py`: a script of seconds, or cells in VS Code, PyCharm,
Spyder and Jupyter (with jupytext). Tests run them all: the fault is named in the broken run, and the repaired one is
without a warning. The numbers and curves are of those runs, on one thread of a CPU.

```bash
python examples/broken_runs/frozen_encoder.py
```

The log is a list of dictionaries that the loop fills; `nearfar.doctor.diagnose` reads it. [The doctor](doctor.md) has
all rules and reads the logs of other trainers.
"""


@pytest.fixture(scope="module", autouse=True)
def notebook_folder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.setenv("MPLBACKEND", "Agg")
        yield


def parts(name: str) -> tuple[str, str, str]:
    """Title, what is broken, and the remedy: the text cells of a notebook."""
    cells = re.split(r"^# %%", (FOLDER / f"{name}.py").read_text(), flags=re.MULTILINE)
    texts = [
        "\n".join(line[2:] for line in cell.splitlines()[1:])
        for cell in cells
        if cell.startswith(" [markdown]")
    ]
    title, _, broken = texts[0].partition("\n")
    return title.removeprefix("# "), broken.strip(), texts[1].strip()


def written() -> dict[str, tuple[str, str]]:
    """Finding and evidence that the page holds, by notebook: what was not run anew is kept."""
    text = PAGE.read_text() if PAGE.exists() else ""
    pattern = r"\(images/gallery/(\w+)\.png\)\n\n`([\w-]+)`: (.*)\n"
    return {name: (finding, evidence) for name, finding, evidence in re.findall(pattern, text)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_is_named_and_the_repaired_run_is_silent(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not WRITING and name != NAMES[0]:  # the curves of one are drawn
        monkeypatch.setattr(importlib.import_module(SHARED).Shown, "figure", lambda _: None)
    ran: Any = runpy.run_path(str(FOLDER / f"{name}.py"))
    shown = ran["shown"]  # it asserts both
    assert f" {shown.finding.id}: " in capsys.readouterr().out
    title, _, remedy = parts(name)
    assert remedy.startswith("**Remedy.** ")
    if WRITING:
        PICTURES.mkdir(parents=True, exist_ok=True)
        save = ran["figure"].savefig
        write_atomically(PICTURES / f"{name}.png", lambda file: save(file, format="png", dpi=80))
        write_text(PICTURES / f"{name}.finding", f"{shown.finding.id}\n{shown.finding.evidence['text']}\n")
    page = PAGE.read_text() if PAGE.exists() else ""
    assert WRITING or f"| [{title}](#{name.replace('_', '-')}) | `{shown.finding.id}` |" in page


def test_the_page_has_every_notebook() -> None:
    if WRITING:
        rows, sections, known = [], [], written()
        for name in NAMES:
            title, broken, remedy = parts(name)
            said = PICTURES / f"{name}.finding"
            finding, evidence = said.read_text().splitlines() if said.exists() else known[name]
            anchor = name.replace("_", "-")
            rows.append(f"| [{title}](#{anchor}) | `{finding}` | {evidence.replace('|', chr(92) + '|')} |")
            sections.append(
                f'<a id="{anchor}"></a>\n\n## {title}\n\n{broken}\n\n'
                f"![Both runs: {title}](images/gallery/{name}.png)\n\n"
                f"`{finding}`: {evidence}\n\n{remedy}\n\n`examples/broken_runs/{name}.py`\n"
            )
        table = "\n".join(["| what is broken | finding | what it saw |", "|---|---|---|", *rows])
        write_text(PAGE, "\n".join([INTRODUCTION, table, "", *sections]))
        for each in PICTURES.glob("*.finding"):
            each.unlink()
    page = PAGE.read_text()
    assert page.startswith(INTRODUCTION)
    for name in NAMES:
        title, broken, remedy = parts(name)
        section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        assert broken in section, name
        assert remedy in section, name
        assert f"(images/gallery/{name}.png)" in section
        assert (PICTURES / f"{name}.png").exists()
    assert {path.stem for path in PICTURES.iterdir()} == set(NAMES)
