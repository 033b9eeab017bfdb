"""Install a built wheel in a new environment outside the clone, and try what it promises: in general, and by extra.

    python -m build
    python tools/smoke.py                                  # the wheel alone
    python tools/smoke.py --extra train --extra serve      # with these extras, together
    python tools/smoke.py --every-extra                    # all that go together and are not for development
    python tools/smoke.py --each                           # none, and every extra alone, in environments of their own

Exits with 1 where a check fails, and prints what it said. The environment is removed at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: an environment for work on a clone, not for users of a wheel
FOR_DEVELOPMENT = ("dev",)
#: needs Optuna 2, and `tune` a current one: tried by itself
APART = ("search",)


@dataclass(frozen=True)
class Check:
    """A command (`nearfar …`, or lines of Python) and what its output has to hold."""

    command: str
    shows: str = ""

    def argv(self, python: Path) -> list[str]:
        words = self.command.split()
        if words[0] == "nearfar":
            return [str(python.parent / "nearfar"), *words[1:]]
        return [str(python), "-c", self.command]


QUICK = "epochs=1 bootstrap=100 trainer.threads=1 trainer.accelerator=cpu batch_size=32"
SMALL = f"{QUICK} embedding_dim=8"
PICTURES = "image_encoder=small image_encoder.features=16"
#: the page of a server that runs for as long as it is asked
ANSWERS = """
import threading, time, urllib.request, uvicorn
{app}
server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
threading.Thread(target=server.run, daemon=True).start()
while not server.started:
    time.sleep(0.05)
port = server.servers[0].sockets[0].getsockname()[1]
print(urllib.request.urlopen(f"http://127.0.0.1:{{port}}/").read().decode())
"""
STORE = """
import numpy as np
from nearfar.serving.stores import create_store
store = create_store("{place}", dim=2, kinds={{}})
store.add(["near", "far"], np.eye(2, dtype=np.float32), {{}})
print(store.search(np.array([[1.0, 0.1]], dtype=np.float32), k=1)[0].ids)
"""

LIGHT = """
import sys, nearfar
assert not {"torch", "numpy"} & {*sys.modules}
print(nearfar.__file__)
"""
#: of every installation
BARE = (
    Check(LIGHT, "site-packages"),
    Check("nearfar --help", "doctor"),
    Check("nearfar check", "GPU"),
    Check("nearfar doctor stalled.csv", "loss-at-logarithm"),
    Check("nearfar verify sampler", "hard"),
    Check("nearfar score found.csv --qrels judged.csv", "nDCG@10"),
    Check("""
import torch
from nearfar.losses import InfoNCELoss
loss, x = InfoNCELoss(), torch.eye(8, requires_grad=True)
loss(x, torch.eye(8)).backward()
print(loss.record.candidates, bool(x.grad.isfinite().all()))
""", "8.0 True"),
)  # fmt: skip


def trains(experiment: str, options: str) -> Check:
    """An experiment that trains for seconds and writes its report."""
    return Check(f"nearfar train experiment={experiment} name={experiment} {options}", "report.html")


#: an experiment that needs nothing but the extra `train`: two columns of numbers
TABLE = f"experiment=pairs data.train=numbers.csv views=[x,y] {SMALL}"
#: its run, trained once, whatever extras are tried
NUMBERS = Check(f"nearfar train {TABLE} name=numbers exists=skip", "numbers")


#: what an extra gives, shown by one command
EXTRAS: dict[str, tuple[Check, ...]] = {
    "train": (
        Check("nearfar train --list", "molecules_demo"),
        NUMBERS,
        Check("""
import torch
from nearfar.integrations.pytorch import Monitor, retrieval_scores
from nearfar.losses import InfoNCELoss
for seed in (0, 1):
    for rate in (0.01, 0.02):
        torch.manual_seed(seed)
        text = torch.randn(128, 16)
        image, encoder, loss = text @ torch.randn(16, 24), torch.nn.Linear(24, 16), InfoNCELoss(temperature=0.1)
        optimizer = torch.optim.Adam(encoder.parameters(), lr=rate)
        scores = lambda: retrieval_scores(encoder(image).detach(), text, bootstrap=100)
        watch = Monitor(encoder, image, f"runs/watched/{rate}-{seed}", evaluate=scores, config={"lr": rate}, seed=seed)
        for epoch in range(2):
            value = loss(encoder(image), text)
            optimizer.zero_grad(); value.backward(); watch.step(value, record=loss.record); optimizer.step()
            watch.epoch()
        print(watch.finish().verdict)
""", "rules could be judged"),
        Check("nearfar compare runs/watched --baseline lr=0.01", "report.html"),
    ),
    "molecules": (trains("molecules", f"data.embedded_size=300 {SMALL}"),),
    "aspects": (trains("aspects", f"text_encoder.hidden=16 {QUICK}"),),
    "image": (Check("""
import numpy as np
from nearfar.towers import build_tower
tower = build_tower("image", encoder="efficientnet")
pictures = np.zeros((4, 64, 64, 3), dtype=np.uint8)
tower.fit(pictures)
print(tuple(tower.read(pictures).values.shape))
""", "(4, "),),
    "pairs": (trains("pairs", f"{PICTURES} {SMALL}"),),
    "labels": (trains("labels", f"data.limit=128 {PICTURES} {SMALL}"),),
    "augmented": (trains("augmented", f"data.limit=128 {PICTURES} {SMALL}"),),
    "datasets": (Check("""
import datasets
datasets.Dataset.from_dict({"word": ["a", "b"], "sense": ["first", "second"]}).save_to_disk("saved")
from nearfar.data.sources import read_items
print(list(read_items("saved", ["word", "sense"])["sense"]))
""", "second"),),
    "tissue": (trains("medium_normal", "data.slides=4 data.side=8 data.generated_genes=40 retrieve=10 "
                      f"variable_genes=20 expressed_genes=5 {PICTURES} {SMALL}"),),
    "relations": (trains("relations", f"crop_size=32 {PICTURES} {SMALL}"),),
    "detector": (trains("detector_scenes", "data.train=24 data.val=8 data.test=8 width=16 heads=2 layers=1 queries=4 "
                        f"image_encoder.features=16 {QUICK} batch_size=8"),),
    "fair-detection": (Check("nearfar options fair_detection", "pictures"),),
    "minilm": (Check("""
from nearfar.towers import build_tower
tower = build_tower("text", encoder="minilm")
tower.fit(["a river", "a stone"])
print(tuple(tower.read(["a river"]).values.shape))
""", "(1, 384)"),),
    "export": (NUMBERS, Check("nearfar export runs/numbers exported --format onnx", "exported")),
    "lora": (Check("""
import torch
from nearfar.models.hub import add_adapters
network = torch.nn.ModuleDict({"query": torch.nn.Linear(8, 8), "value": torch.nn.Linear(8, 8)})
print(sum(p.requires_grad for p in add_adapters(network, 2).parameters()))
""", "4"),),
    "serve": (NUMBERS, Check(ANSWERS.format(app="""
import nearfar
from nearfar.serving.server import build_app
app = build_app(nearfar.load("runs/numbers"))
"""), "Skip to the results")),
    "board": (NUMBERS, Check(ANSWERS.format(app="""
from pathlib import Path
from nearfar.board.server import build_board
app = build_board(Path("runs"))
"""), "<html")),
    "search": (Check(f"nearfar train -m {TABLE} hydra/sweeper=search hydra.sweeper.n_trials=2 lr=interval(1e-3,1e-2) "
                     "name=searched", "searched"),),
    "slurm": (Check(f"nearfar train -m {TABLE} hydra/launcher=submitit_local name=submitted seed=1,2"),
              Check("nearfar report runs/submitted/seed=1", "report.html")),
    "ray": (Check(f"nearfar train {TABLE} trainer.engine=ray trainer.devices=2 name=on_ray", "on_ray"),),
    "tune": (Check(f"nearfar tune {TABLE} lr=1e-3,1e-2 name=tuned --trials 2 --judge 0", "best of 2 trials"),),
    "lance": (Check(STORE.format(place="lance:vectors"), "near"),),
    "qdrant": (Check(STORE.format(place="qdrant:vectors"), "near"),),
    "postgres": (Check("import psycopg, pgvector; print(psycopg.pq.version())", ""),),
    "sentence-transformers": (Check("import nearfar.integrations.sentence_transformers as st; print(dir(st))", "["),),
    "transformers": (Check("import nearfar.integrations.transformers as trainer; print(trainer.__all__)", "["),),
    "mteb": (Check("from nearfar.integrations import mteb as m; print(m.__all__)", "encoder"),),
    "docs": (Check("import mkdocs, material, mkdocstrings; print(mkdocs.__version__)", "."),),
    "loggers": (Check("""
from torch.utils.tensorboard import SummaryWriter
with SummaryWriter("events") as writer:
    for step in range(40):
        writer.add_scalar("train/loss", 4.158883, step)
from nearfar.doctor import diagnose
print(diagnose("events").ids)
""", "loss-at-logarithm"),),
}  # fmt: skip


def install(folder: Path, wheel: Path, extras: list[str]) -> Path:
    """A new environment with the wheel and these extras; returns its Python."""
    print(f"{', '.join(extras) or 'no extra'}: environment in {folder}", flush=True)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    wanted = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
    # bytecode of what is never imported would take as long as the checks
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    begun = time.perf_counter()
    subprocess.run([*pip, "--constraint", str(ROOT / "constraints.txt"), wanted], check=True, cwd=folder)
    print(
        f"installed {wheel.name} with {', '.join(extras) or 'no extra'}: {time.perf_counter() - begun:.0f} s",
        flush=True,
    )
    return python


def write_inputs(folder: Path) -> None:
    """What the checks read: a loss that stands at ln 64, a ranking and judgments."""
    folder.mkdir(exist_ok=True)
    rows = "".join(f"{step},{4.158883 + 1e-4 * (step % 3)}\n" for step in range(60))
    (folder / "stalled.csv").write_text("step,loss\n" + rows)
    (folder / "judged.csv").write_text(
        "query,document,grade\n" + "".join(f"q{i},d{i},1\n" for i in range(20))
    )
    found = "".join(f"q{i},d{(i + k) % 20},{1 - 0.1 * k}\n" for i in range(20) for k in range(3))
    (folder / "found.csv").write_text("query,document,score\n" + found)
    pairs = [(i % 7 / 7, i % 11 / 11, i % 13 / 13) for i in range(200)]
    numbers = "".join(f'"[{a}, {b}, {c}]","[{a + b}, {b + c}, {c - a}]"\n' for a, b, c in pairs)
    (folder / "numbers.csv").write_text("x,y\n" + numbers)


def try_out(python: Path, folder: Path, extras: list[str]) -> list[str]:
    """Run the checks outside the clone; returns what failed."""
    write_inputs(folder)
    hidden = ("PYTHONPATH", "PYTHONHOME", "NEARFAR_DATA")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"NEARFAR_CACHE": str(folder / "cache"), "PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1"}
    failed = []
    bare = BARE[:3] if extras else BARE  # all of it where nothing but the package is there
    for name, checks in [("nearfar", bare), *((extra, EXTRAS[extra]) for extra in extras)]:
        for check in checks:
            begun = time.perf_counter()
            ran = subprocess.run(
                check.argv(python), cwd=folder, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            good = ran.returncode == 0 and check.shows in ran.stdout
            title = (
                check.command
                if check.command.startswith("nearfar")
                else "python: " + check.command.split()[-1]
            )
            print(
                f"{'ok    ' if good else 'FAILED'} {name}: {title[:70]} ({time.perf_counter() - begun:.1f} s)",
                flush=True,
            )
            if not good:
                print(f"{ran.stdout}\n  exit code {ran.returncode}, looked for {check.shows!r}", flush=True)
                failed.append(f"{name}: {check.command}")
    return failed


def extras_of_the_package() -> list[str]:
    """The extras of pyproject.toml that are not for development."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [name for name in project["optional-dependencies"] if name not in FOR_DEVELOPMENT]


def try_extras(extras: list[str], wheel: Path | None, python: Path | None, keep: Path | None) -> list[str]:
    """Install these extras together and run their checks; returns what failed."""
    folder = keep or Path(tempfile.mkdtemp(prefix="nearfar-smoke-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if python is None:
            assert wheel is not None
            python = install(folder, wheel.absolute(), extras)
        return try_out(python, folder / "work", extras)
    except subprocess.CalledProcessError:
        return [f"{', '.join(extras) or 'nearfar'}: pip install"]
    finally:
        if keep is None:
            shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=Path, help="the newest in dist/ by default")
    parser.add_argument("--extra", action="append", default=[], choices=extras_of_the_package())
    parser.add_argument(
        "--every-extra", action="store_true", help="all that are not for development, together"
    )
    parser.add_argument(
        "--each", action="store_true", help="those of --extra, or all, each in an environment of its own"
    )
    parser.add_argument("--python", type=Path, help="try this environment's, and install nothing")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    chosen = parser.parse_args()
    extras = chosen.extra
    if chosen.every_extra:
        extras = [name for name in extras_of_the_package() if name not in APART]
    together = [extras]
    if chosen.each:
        together = [[name] for name in extras] or [[], *([name] for name in extras_of_the_package())]
    built = sorted((ROOT / "dist").glob("nearfar-*.whl"), key=lambda path: path.stat().st_mtime)
    wheel = chosen.wheel or (built[-1] if built else None)
    if wheel is None and chosen.python is None:
        parser.error("there is no wheel in dist/: python -m build")
    failed = []
    for one in together:
        keep = chosen.keep / "".join(one) if chosen.keep and chosen.each else chosen.keep
        failed += try_extras(one, wheel, chosen.python, keep)
    print("\n".join(["failed:", *failed]) if failed else "everything works")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
