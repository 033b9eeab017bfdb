"""What `nearfar data shards` can be told, checked before anything is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nearfar.errors import NearfarError
from nearfar.systems.tissue.records import Values

__all__ = ["ShardOptions"]


@dataclass(frozen=True)
class ShardOptions:
    """How slides become shards.

    Attributes:
        patch: side of the square that is cut around a spot, in pixels of the source.
        patch_um: the same in micrometres, instead of ``patch``; slides must say how large a pixel is.
        pixels: side of the stored patch; None: as it was cut (224 with ``patch_um``).
        quality: of the jpg, 1 to 100.
        genes: how many genes, the most variable within the training slides; or a file that names them; None: all that
            every slide has.
        values: "log1p": normalised, ready for training; "counts": as measured, for readers that choose genes and
            normalise for themselves (leaving slides out in turn).
        target_sum: counts of a spot after normalisation.
        min_counts: spots with fewer counts are rejected.
        neighbors: nearest spots of the same slide that are written to each.
        spots_per_shard: largest number of samples in a tar file.
        val, test, val_fraction, test_fraction, split_by, seed: see `slide_splits.divide`; without any of them the
            ``*_samples.txt`` of the source are taken, and without those all slides train.
        patients: see `slide_splits.patients_of`.

    Raises:
        NearfarError: a value out of its range, or two that contradict each other.
    """

    patch: int = 224
    patch_um: float | None = None
    pixels: int | None = None
    quality: int = 90
    genes: int | Path | None = 2000
    values: Values = "log1p"
    target_sum: float = 1e4
    min_counts: int = 10
    neighbors: int = 6
    spots_per_shard: int = 4096
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    val_fraction: float = 0.0
    test_fraction: float = 0.0
    split_by: Literal["slide", "patient"] = "slide"
    seed: int = 0
    patients: str | None = None

    def __post_init__(self) -> None:
        for name in ("patch", "neighbors", "spots_per_shard", "min_counts"):
            if getattr(self, name) < 1:
                raise NearfarError(f"{name}={getattr(self, name)}: 1 or more is needed.")
        if self.patch_um is not None and not self.patch_um > 0:
            raise NearfarError(f"patch_um={self.patch_um}: a side of more than 0 micrometres is needed.")
        if isinstance(self.genes, int) and self.genes < 1:
            raise NearfarError(f"genes={self.genes}: at least one gene is needed.")
        if not 1 <= self.quality <= 100:
            raise NearfarError(f"quality={self.quality}: 1 to 100 is needed; 90 is usual.")
        if not self.target_sum > 0:
            raise NearfarError(f"target_sum={self.target_sum}: more than 0 is needed; 10000 is usual.")
        if self.values not in ("log1p", "counts"):
            raise NearfarError(f"values={self.values!r}; it is 'log1p' or 'counts'.")
        if self.split_by not in ("slide", "patient"):
            raise NearfarError(f"split_by={self.split_by!r}; it is 'slide' or 'patient'.")
        if self.stored < 8:
            raise NearfarError(f"pixels={self.stored}: a patch of 8 pixels or more is needed.")
        if self.patch_um is None and self.stored > self.patch:
            raise NearfarError(
                f"pixels={self.stored} is more than is cut (patch={self.patch}): that adds no detail. Lower pixels."
            )

    @property
    def stored(self) -> int:
        """Side of the stored patch."""
        return self.pixels or (self.patch if self.patch_um is None else 224)

    @property
    def splits_given(self) -> bool:
        """Whether splits are asked for here."""
        return bool(self.val or self.test or self.val_fraction or self.test_fraction)

    def field(self, name: str, pixel_size: float | None) -> int:
        """Side of what is cut from a slide, in its pixels."""
        if self.patch_um is None:
            return self.patch
        if pixel_size is None:
            raise NearfarError(
                f"slide {name} does not say how large a pixel is: give patch= in pixels, not patch_um=."
            )
        side = round(self.patch_um / pixel_size)
        if side < self.stored:
            raise NearfarError(
                f"slide {name}: {self.patch_um:g} µm are {side} pixels of {pixel_size:.3g} µm, fewer than pixels="
                f"{self.stored}: lower pixels, or raise patch_um."
            )
        return side

    def of_patches(self) -> dict[str, Any]:
        """What decides which spots can be used and what their patches are."""
        wanted = ("patch", "patch_um", "min_counts")
        return {name: value for name, value in asdict(self).items() if name in wanted}

    def of_samples(self) -> dict[str, Any]:
        """What else decides the bytes of the shards, the genes apart."""
        wanted = ("quality", "values", "target_sum", "neighbors", "spots_per_shard")
        return self.of_patches() | {"pixels": self.stored} | {name: getattr(self, name) for name in wanted}
