"""Generated scenes with a planted gap: figures of two groups, one of which stands out less from its background.

The gap between the groups has a known size and cause, so a method can be tested on it. A figure is drawn with
head, body, arms and legs in a pose of its own; around it lie things that are no figures. Pose, place, size, colours and
other things have the same distribution in both groups. Only the contrast differs: ``faint`` pictures stand in a haze
that leaves the share ``faint_contrast`` of every difference from the background's colour.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from nearfar.data.cache import cache_dir, content_key
from nearfar.data.files import Json
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

__all__ = ["GROUPS", "make_scene", "scenes_folder"]

VERSION = 3
GROUPS = ("faint", "clear")
#: drawn so many times larger and then reduced, so that edges are smooth
_FINER = 3
_NOISE = 0.03


def make_scene(
    rng: np.random.Generator, size: int, contrast: float, left: float = 1.0
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[float, float, float, float]]:
    """One picture of ``size`` × ``size`` pixels and the box (left, top, width, height) of its figure.

    ``contrast``: by how much the figure's colour differs from the background's mean on average over the three colours,
    0 to 1, up or down. ``left``: the share of all differences that haze leaves.

    >>> picture, box = make_scene(np.random.default_rng(0), 96, 0.4)
    >>> picture.shape, all(edge >= 0 for edge in box)
    ((96, 96, 3), True)
    """
    base = rng.uniform(0.35, 0.65, 3)
    picture = base + _texture(rng, size)
    for _ in range(rng.integers(0, 3)):
        mask = _thing(rng, size)
        picture += mask[..., None] * _colour(rng, rng.uniform(0.05, 0.4))
    mask, box = _figure(rng, size)
    picture = picture * (1 - mask[..., None]) + mask[..., None] * (
        base + _colour(rng, contrast) + 0.3 * _texture(rng, size)
    )
    picture = base + left * (picture - base + rng.normal(0.0, _NOISE, picture.shape))
    return (picture.clip(0, 1) * 255).round().astype(np.uint8), box


def scenes_folder(
    sizes: tuple[int, int, int],
    *,
    image_size: int = 96,
    contrast: float = 0.3,
    faint_contrast: float = 0.2,
    faint_share: float = 0.25,
    seed: int = 0,
) -> Path:
    """The folder, in COCO format, of generated scenes; drawn once and kept in the cache.

    Args:
        sizes: how many pictures of train, val and test.
        image_size: their side in pixels.
        contrast: of figures, see `make_scene`.
        faint_contrast: the share that haze leaves of it in faint pictures.
        faint_share: share of faint pictures in train; in val and test it is half.

    The group is the attribute ``visibility`` of picture and box.
    """
    options: Json = {
        "sizes": list(sizes),
        "image_size": int(image_size),
        "contrast": float(contrast),
        "faint_contrast": float(faint_contrast),
        "faint_share": float(faint_share),
        "seed": int(seed),
    }
    folder = cache_dir() / "scenes" / content_key([VERSION, options])[:16]
    if (folder / "test.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".drawing-"))
    try:
        (temporary / "images").mkdir()
        for number, (split, n) in enumerate(zip(("train", "val", "test"), options["sizes"], strict=True)):
            share = options["faint_share"] if split == "train" else 0.5
            _write_split(
                temporary, split, n, share, np.random.default_rng([options["seed"], number]), options
            )
        try:
            os.replace(temporary, folder)
        except OSError:  # a different process has drawn the same scenes meanwhile
            if not (folder / "test.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_split(
    folder: Path, split: str, n: int, faint_share: float, rng: np.random.Generator, options: Json
) -> None:
    from PIL import Image

    faint = rng.permutation(n) < round(n * faint_share)
    images, annotations = [], []
    for i, is_faint in enumerate(faint.tolist(), 1):
        left = options["faint_contrast"] if is_faint else 1.0
        picture, box = make_scene(rng, options["image_size"], options["contrast"], left)
        name, group = f"{split}_{i:05d}.png", GROUPS[0] if is_faint else GROUPS[1]
        Image.fromarray(picture).save(folder / "images" / name)
        side = options["image_size"]
        images.append({"id": i, "file_name": name, "width": side, "height": side, "visibility": group})
        annotations.append(
            {
                "id": i,
                "image_id": i,
                "category_id": 1,
                "bbox": [round(float(edge), 2) for edge in box],
                "area": round(float(box[2] * box[3]), 2),
                "iscrowd": 0,
                "attributes": {"visibility": group},
            }
        )
    content = {
        "info": {"description": f"generated figures: {dict(options)}"},
        "categories": [{"id": 1, "name": "person"}],
        "images": images,
        "annotations": annotations,
    }
    (folder / f"{split}.json").write_text(json.dumps(content))


# -- what is drawn -------------------------------------------------------------------------------------------
def _colour(rng: np.random.Generator, contrast: float) -> Float[np.ndarray, " 3"]:
    """A shift of colour, all lighter or all darker, of mean size ``contrast``."""
    parts = rng.uniform(0.6, 1.4, 3)
    return (1.0 if rng.random() < 0.5 else -1.0) * contrast * parts / parts.mean()


def _texture(rng: np.random.Generator, size: int) -> Float[np.ndarray, "s s 3"]:
    """Soft blotches of two sizes."""
    total = np.zeros((size, size, 3))
    for cells, strength in ((4, 0.06), (12, 0.03)):
        total += _enlarged(rng.normal(0.0, strength, (cells, cells, 3)), size)
    return total


def _enlarged(small: Float[np.ndarray, "k k 3"], size: int) -> Float[np.ndarray, "s s 3"]:
    """Bilinear, from a few cells to the whole picture."""
    at = np.linspace(0, len(small) - 1, size)
    low = np.minimum(at.astype(int), len(small) - 2)
    along = at - low
    rows = small[low] * (1 - along)[:, None, None] + small[low + 1] * along[:, None, None]
    return rows[:, low] * (1 - along)[None, :, None] + rows[:, low + 1] * along[None, :, None]


def _thing(rng: np.random.Generator, size: int) -> Float[np.ndarray, "s s"]:
    """A disc, a bar or a block: no figure."""
    canvas, draw = _canvas(size)
    reach = size * _FINER
    x, y = rng.uniform(0, reach, 2)
    a, b = rng.uniform(0.04, 0.14, 2) * reach
    if rng.random() < 0.5:
        draw.ellipse((x - a, y - b, x + a, y + b), fill=255)
    else:
        turn = rng.uniform(0, math.pi)
        ends = [(a * u * 1.6, b * v * 0.7) for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        cos, sin = math.cos(turn), math.sin(turn)
        draw.polygon([(x + p * cos - q * sin, y + p * sin + q * cos) for p, q in ends], fill=255)
    return _reduced(canvas, size)


def _figure(
    rng: np.random.Generator, size: int
) -> tuple[Float[np.ndarray, "s s"], tuple[float, float, float, float]]:
    """Head, body, two arms and two legs, and the box around what was drawn."""
    canvas, draw = _canvas(size)
    reach = size * _FINER
    tall = rng.uniform(0.5, 0.85) * reach
    x = rng.uniform(0.3, 0.7) * reach
    top = rng.uniform(0.04, 0.96 - tall / reach) * reach
    head, neck, hip = 0.085 * tall, top + 0.19 * tall, top + 0.55 * tall
    width = rng.uniform(0.10, 0.14) * tall
    thick = max(1, round(0.07 * tall))
    draw.ellipse((x - head, top, x + head, top + 2 * head), fill=255)
    draw.rounded_rectangle((x - width, neck, x + width, hip), radius=width / 2, fill=255)
    for side in (-1, 1):
        arm, leg = rng.uniform(-0.2, 0.9), rng.uniform(0.0, 0.4)
        shoulder = (x + side * width * 0.8, neck + thick / 2)
        hand = (shoulder[0] + side * 0.33 * tall * math.sin(arm), shoulder[1] + 0.33 * tall * math.cos(arm))
        joint = (x + side * width * 0.5, hip - thick / 2)
        foot = (joint[0] + side * 0.42 * tall * math.sin(leg), joint[1] + 0.42 * tall * math.cos(leg))
        draw.line((*shoulder, *hand), fill=255, width=thick)
        draw.line((*joint, *foot), fill=255, width=thick)
    mask = _reduced(canvas, size)
    rows, columns = (np.flatnonzero((mask > 0.5).any(axis)) for axis in (1, 0))
    box = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    return mask, tuple(float(edge) for edge in box)  # type: ignore[return-value]


def _canvas(size: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise NearfarError("drawing scenes needs Pillow: pip install 'nearfar[detector]'.") from None
    canvas = Image.new("L", (size * _FINER, size * _FINER), 0)
    return canvas, ImageDraw.Draw(canvas)


def _reduced(canvas: Image.Image, size: int) -> Float[np.ndarray, "s s"]:
    from PIL import Image

    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float64) / 255
