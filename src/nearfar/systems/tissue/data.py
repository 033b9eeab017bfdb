"""The slides of an experiment, read or generated, split by slide; and the batches of its datasets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.data.augment import SquareSymmetries
from nearfar.data.batch import Draw
from nearfar.data.cache import content_key
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.systems.tissue.generated import generated_tissue
from nearfar.systems.tissue.options import TissueData as DataOptions
from nearfar.systems.tissue.records import Tissue
from nearfar.systems.tissue.slide_splits import resolve_splits

__all__ = ["Tissue", "TissueBatch", "TissueData", "TissueDataset", "load_data"]


@dataclass(frozen=True)
class TissueData:
    """The splits of one experiment, all with the same genes, and their source."""

    splits: dict[str, Tissue]
    source: str
    notes: Mapping[str, object] = field(default_factory=dict)

    @property
    def genes(self) -> list[str]:
        """The genes of every split, in order."""
        return list(self.splits["train"].genes)

    def hash_of(self, *names: str) -> str:
        """Names the content of splits (of all without names): sixteen hexadecimal digits."""
        return content_key(*(self.splits[name].content for name in names or self.splits))[:16]

    def layout(self) -> Json:
        """The content of ``dataset_layout.json``."""
        return {
            "system": "tissue",
            "source": self.source,
            "splits": {
                name: {
                    "rows": len(tissue),
                    "slides": dict(zip(tissue.slide_names, np.bincount(tissue.slides).tolist(), strict=True)),
                    "patients": sorted(set(tissue.patients or ())),
                    "split_hash": self.hash_of(name),
                }
                for name, tissue in self.splits.items()
            },
            "genes": len(self.genes),
            "neighbors": int(self.splits["train"].neighbors.shape[1]),
            "patch": list(self.splits["train"].patches.shape[1:3]),
            "notes": dict(self.notes),
            "leaks": {},
            "data_hash": self.hash_of(),
        }

    def summary(self) -> str:
        """A line for each split."""
        lines = []
        for name, tissue in self.splits.items():
            slides = ", ".join(tissue.slide_names[:8]) + (", …" if len(tissue.slide_names) > 8 else "")
            lines.append(f"{name}: {len(tissue)} spots of {len(tissue.slide_names)} slide(s) ({slides})")
        return "\n".join([*lines, f"{len(self.genes)} genes, {self.source}"])


def load_data(options: DataOptions, say: Callable[[str], None]) -> TissueData:
    """The splits that ``data`` asks for: slides in a folder of shards, or generated ones."""
    if options.dir is None:
        say("data: generated slides; give data.dir= for your own")
        tissue = generated_tissue(
            options.slides,
            options.side,
            options.signal,
            options.noise,
            genes=options.generated_genes,
            patch=options.patch,
            neighbors=options.neighbors,
            seed=options.generated_seed,
        )
        tests = max(1, options.slides // 4)
        names = list(tissue.slide_names)
        usual = {"train": names[: -tests - 1], "val": names[-tests - 1 : -tests], "test": names[-tests:]}
        splits = resolve_splits(names, options, usual, "the generated tissue")
        notes: dict[str, object] = {"signal": options.signal, "noise": options.noise}
        return TissueData(_of_slides(tissue, splits), "generated slides", notes)
    folder = Path(str(options.dir)).expanduser()
    if not folder.is_dir():
        raise NearfarError(f"data.dir={folder}: no such folder.")
    from nearfar.systems.tissue.shard_dataset import read_shards
    from nearfar.systems.tissue.shard_index import read_index, read_splits

    names = [slide.name for slide in read_index(folder).slides]
    splits = resolve_splits(names, options, read_splits(folder), str(folder))
    # Each by itself: a split then has a memory map of its own, wherever its slides stand in the folder.
    parts = {
        name: read_shards(
            folder, slides, genes=options.genes, genes_of=splits["train"], neighbors=options.neighbors
        )
        for name, slides in splits.items()
    }
    notes = {"genes": f"{len(parts['train'].genes)} most variable over the training slides"}
    return TissueData(parts, f"shards in {folder.name}", notes)


def _of_slides(tissue: Tissue, splits: Mapping[str, Sequence[str]]) -> dict[str, Tissue]:
    return {name: tissue.select(slides) for name, slides in splits.items()}


@dataclass
class TissueBatch:
    """One batch: what both towers read of its spots, and their spatial neighbours with weights.

    ``positions`` and ``neighbors`` (-1 for none) are positions in the split.
    """

    positions: Int[Tensor, " b"]
    images: Shaped[Tensor, "b ..."]
    genes: Float[Tensor, "b g"]
    neighbors: Int[Tensor, "b k"]
    alpha: Float[Tensor, "b k"]

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TissueBatch:
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TissueBatch:
        return self._each(lambda part: part.pin_memory())

    def split(self, rows: int) -> list[TissueBatch]:
        """Parts of ``rows`` rows, the last perhaps shorter."""
        parts = [getattr(self, each.name).split(rows) for each in fields(self)]
        return [TissueBatch(*part) for part in zip(*parts, strict=True)]

    def _each(self, move: Callable[[Tensor], Tensor]) -> TissueBatch:
        return TissueBatch(*(move(getattr(self, each.name)) for each in fields(self)))


class TissueDataset(Dataset[TissueBatch]):
    """A split with everything a batch needs; ``__getitems__`` gives a whole `TissueBatch`.

    Args:
        images: frozen features (n, f), or patches (n, h, w, 3) of uint8, which batches hold as (b, 3, h, w).
        genes: (n, g) what the gene tower reads.
        neighbors: (n, k) positions of spatial neighbours in the split, -1 for none.
        alpha: (n, k) their weights.
        augment: turn and mirror patches, drawn from (seed, epoch, first position of the batch) and nothing else: the
            same whatever worker makes the batch and wherever a resumed run begins.
        seed: of the augmentation.

    The epoch lies in shared memory, so that persistent workers see it too.
    """

    def __init__(
        self,
        images: Float[np.ndarray, "n f"] | UInt8[np.ndarray, "n h w 3"],
        genes: Float[np.ndarray, "n g"],
        neighbors: Int[np.ndarray, "n k"],
        alpha: Float[np.ndarray, "n k"],
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        for name, part in (("genes", genes), ("neighbors", neighbors), ("alpha", alpha)):
            if len(part) != len(images):
                raise NearfarError(f"{name}: {len(part)} rows for the images of {len(images)} spots.")
        self.patches = images if images.ndim == 4 else None
        self.features = torch.from_numpy(np.asarray(images, np.float32)) if images.ndim == 2 else None
        if augment and self.patches is None:
            raise NearfarError("augmentation turns patches, and this dataset has frozen features.")
        if augment and self.patches is not None and self.patches.shape[1] != self.patches.shape[2]:
            raise NearfarError(
                f"patches of {self.patches.shape[1:3]} pixels cannot be turned: they are no squares."
            )
        self.genes = torch.from_numpy(np.asarray(genes, np.float32))
        self.neighbors = torch.from_numpy(np.asarray(neighbors, np.int64))
        self.alpha = torch.from_numpy(np.asarray(alpha, np.float32))
        self.augment, self.seed = augment, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.genes)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's augmentation."""
        self._epoch.fill_(epoch)

    def __getitem__(self, position: int) -> TissueBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> TissueBatch:
        chosen = torch.as_tensor(positions, dtype=torch.int64)
        return TissueBatch(
            positions=chosen,
            images=self._images(chosen),
            genes=self.genes[chosen],
            neighbors=self.neighbors[chosen],
            alpha=self.alpha[chosen],
        )

    def _images(self, chosen: Int[Tensor, " b"]) -> Tensor:
        if self.features is not None:
            return self.features[chosen]
        assert self.patches is not None
        patches = np.ascontiguousarray(np.asarray(self.patches[chosen.numpy()]).transpose(0, 3, 1, 2))
        pixels = torch.from_numpy(patches)
        if not self.augment:
            return pixels
        draw = Draw(self.seed, self.epoch, int(chosen[0]))
        return SquareSymmetries()(pixels, draw.numpy())
