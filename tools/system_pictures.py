"""The pictures of the systems' pages: each a part of the report of one small run, which is trained if it is not there.

    NEARFAR_DATA=path/to/data python tools/system_pictures.py            # all of them
    python tools/system_pictures.py pairs labels                         # some
    python tools/system_pictures.py pairs --run runs/emoji               # from a run that is there

Runs lie in runs/pictures and are kept. Pictures go to docs/images/systems, under 100 kB each. Needs the extra `dev` and
Chromium; NEARFAR_DATA names the folder with `her2st/`, for tissue alone.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "pictures"
PICTURES = ROOT / "docs" / "images" / "systems"
LARGEST = 100_000  # bytes
SCALE = 1.5  # pixels of the picture for one of the page
ONE_THREAD = ("trainer.threads=1", "trainer.accelerator=cpu", "exists=skip")


@dataclass(frozen=True)
class Shot:
    """A run (the words after ``nearfar train``) and which part of its report is shown: a heading, and so many boxes."""

    run: str
    heading: str
    most: int = 2
    width: int = 1080
    before: str = ""

    def words(self, command: str, data: str) -> list[str]:
        """The words of a command, with the folder of real data filled in."""
        return command.format(data=data, runs=RUNS).split()


#: not a part of the report, but items of the test split and those nearest to them
NEIGHBOURS = "neighbours"
SHOTS = {
    "pairs": Shot("experiment=pairs", "nearly", 1),
    "molecules": Shot("experiment=molecules_demo sampler=hard", "right", 1),
    "labels": Shot("experiment=labels epochs=2", NEIGHBOURS),
    "augmented": Shot("experiment=augmented", NEIGHBOURS),
    "aspects": Shot("experiment=aspects epochs=1", "Confusions", 1),
    "tissue": Shot(
        "experiment=medium_spatial data.dir={runs}/shards data.hold_out=B4 image_encoder=colors",
        "A gene over a slide",
        width=560,
        before="data shards {data}/her2st {runs}/shards --pixels 64 --genes all --values counts",
    ),
    "relations": Shot("experiment=relations epochs=5", "Pairs", 6),
    "detector": Shot("experiment=detector_scenes", "Predicted and true boxes", 4),
    "fair_detection": Shot("experiment=fair_detection detector={runs}/detector epochs=4", "Pictures", 4),
}

#: hides what is not shown, and returns whether there was such a heading
KEEP = """([title, most]) => {
  const heads = [...document.querySelectorAll("h2, h3")];
  const head = heads.find(each => each.textContent.trim().startsWith(title));
  if (!head) return false;
  const shown = new Set();
  for (let each = head.nextElementSibling; each && !/^H[23]$/.test(each.tagName); each = each.nextElementSibling)
    shown.add(each);
  for (const each of document.querySelectorAll("main > *")) if (!shown.has(each)) each.style.display = "none";
  const inside = each => each.matches(".card") ? [each] : [...each.querySelectorAll("figure, .card")];
  const boxes = [...shown].flatMap(inside);
  boxes.slice(most).forEach(each => { each.style.display = "none"; });
  document.querySelector("main").style.padding = "12px 12px 4px";
  return true;
}"""


def nearfar(words: list[str]) -> None:
    print("nearfar", *words, flush=True)
    subprocess.run([sys.executable, "-m", "nearfar.cli", *words], check=True, cwd=ROOT)


def train(name: str, shot: Shot) -> Path:
    """The run's folder; it is trained where it is not finished."""
    run = RUNS / name
    if (run / "report.html").exists():
        return run
    data = os.environ.get("NEARFAR_DATA", "")
    if "{data}" in shot.run + shot.before and not data:
        raise SystemExit(f"{name} is trained on real data: set NEARFAR_DATA to the folder that holds it")
    RUNS.mkdir(parents=True, exist_ok=True)
    if shot.before:
        nearfar(shot.words(shot.before, data))
    nearfar(["train", *shot.words(shot.run, data), f"runs_dir={RUNS}", f"name={name}", *ONE_THREAD])
    return run


def photograph(browser: Any, report: Path, shot: Shot) -> Any:
    """The part of a report, as a picture of Pillow."""
    from PIL import Image

    page = browser.new_page(viewport={"width": shot.width, "height": 600}, device_scale_factor=SCALE)
    page.goto(report.absolute().as_uri())
    if not page.evaluate(KEEP, [shot.heading, shot.most]):
        raise SystemExit(f"{report} has no heading {shot.heading!r}")
    picture = Image.open(io.BytesIO(page.locator("main").screenshot())).convert("RGB")
    page.close()
    return picture


def neighbours(run: Path, rows: int = 6, near: int = 9) -> Any:
    """Pictures of the test split, each with those nearest to it: green where the label is the same, else red."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot
    from PIL import Image

    import nearfar
    from nearfar.systems import build_system
    from nearfar.training.run_folder import RunFolder

    trained = nearfar.load(run)
    system: Any = build_system(RunFolder(run).config(), saved=True)
    test = system.load_data(print).splits["test"]
    pictures, labels = test["image"], np.asarray(test["label"])
    vectors = np.asarray(trained.embed(pictures, trained.views[0]))
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    figure, axes = pyplot.subplots(rows, near + 1, figsize=(near + 2, rows), layout="constrained")
    for line, query in zip(axes, np.linspace(0, len(test) - 1, rows).astype(int), strict=True):
        for place, (at, item) in enumerate(
            zip(line, [query, *np.argsort(-cosines[query])[:near]], strict=True)
        ):
            at.imshow(pictures[item])
            at.set(xticks=[], yticks=[])
            colour = "#1f2733" if not place else "#20794a" if labels[item] == labels[query] else "#b3421b"
            at.spines[:].set(color=colour, linewidth=3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    return Image.open(drawn).convert("RGB")


def write_small(picture: Any, path: Path) -> None:
    """A PNG of few colours, where 64 are enough for the size; a JPEG otherwise."""
    from PIL import Image

    for colours in (256, 128, 64):
        out = io.BytesIO()
        few = picture.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(out, "PNG", optimize=True)
        if out.tell() < LARGEST:
            path.with_suffix(".png").write_bytes(out.getvalue())
            print(f"{path}.png: {out.tell():,} bytes", flush=True)
            return
    for quality in (85, 75, 65, 55):
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=quality, optimize=True)
        if out.tell() < LARGEST:
            path.with_suffix(".jpg").write_bytes(out.getvalue())
            print(f"{path}.jpg: {out.tell():,} bytes", flush=True)
            return
    raise SystemExit(f"{path}: larger than {LARGEST:,} bytes; show fewer boxes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("systems", nargs="*", choices=[[], *SHOTS], help="all by default")
    parser.add_argument(
        "--run", type=Path, help="take the report of this run, of the one system that is named"
    )
    chosen = parser.parse_args()
    names = chosen.systems or list(SHOTS)
    if chosen.run is not None and len(names) != 1:
        parser.error("--run is the run of one system: name that")
    from playwright.sync_api import sync_playwright

    program = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        for name in names:
            run = chosen.run or train(name, SHOTS[name])
            shot = SHOTS[name]
            part = (
                neighbours(run)
                if shot.heading == NEIGHBOURS
                else photograph(browser, run / "report.html", shot)
            )
            write_small(part, PICTURES / name)
        browser.close()


if __name__ == "__main__":
    main()
