"""A generated tissue: patches and expression of a spot show the same content, with neighbours of a chosen likeness.

Content is six numbers per spot. ``signal`` says how much of it varies smoothly over the slide: at 0 neighbours are no
more alike than any two spots, at 1 they are all but the same. So the value of neighbours as positives is known.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from nearfar.data.cache import cached_arrays, content_key
from nearfar.data.files import Json
from nearfar.data.slides.tissue import Tissue, spatial_neighbors
from nearfar.errors import NearfarError

__all__ = ["CONTENT", "content_of", "expressed", "generated_tissue", "grid", "rendered"]

_VERSION = 1  # part of the cache key

#: what a patch shows of a spot's content, in order
CONTENT = ("nuclei", "size of nuclei", "eosin", "darkness of nuclei", "fibres", "holes")
#: standard deviation, in spots, of the kernel that makes content smooth: next spots then correlate .91 at signal 1
SMOOTH = 1.6
#: counts of a spot, and how far genes follow the content
_DEPTH, _LOADING = 2000.0, 0.6


def generated_tissue(
    slides: int = 8,
    side: int = 16,
    signal: float = 0.8,
    noise: float = 0.5,
    *,
    genes: int = 200,
    patch: int = 32,
    neighbors: int = 6,
    seed: int = 0,
) -> Tissue:
    """``slides`` slides of ``side`` × ``side`` spots, kept in the cache.

    ``signal`` is the share of content that is smooth over a slide, ``noise`` the spread of what a patch of ``patch``
    pixels shows beside it. All slides have the same loadings of genes on content; each is of a different patient.
    """
    key: Json = {
        "slides": slides, "side": side, "signal": float(signal), "noise": float(noise), "genes": genes, "pixels": patch,
        "seed": seed,
    }  # fmt: skip
    arrays = cached_arrays("tissue-slides", ["generated", _VERSION, key], lambda: _slides(key))
    spots, places = side * side, grid(side)
    near, alpha = spatial_neighbors(places, neighbors)
    of_slide = np.repeat(np.arange(slides), spots)
    shift = spots * of_slide[:, None]
    beside = np.tile(near, (slides, 1))
    counts = arrays["counts"].astype(np.float32)
    totals = counts.sum(axis=1)
    slide_names = [f"slide{number + 1}" for number in range(slides)]
    return Tissue(
        ids=[f"{name}/{spot}" for name in slide_names for spot in range(spots)],
        slides=of_slide,
        slide_names=slide_names,
        patients=slide_names,
        positions=np.tile(places, (slides, 1)),
        neighbors=np.where(beside >= 0, beside + shift, -1),
        alpha=np.tile(alpha, (slides, 1)).astype(np.float32),
        expression=np.log1p(counts / np.maximum(totals, 1)[:, None] * 1e4),
        patches=arrays["patches"],
        genes=[f"gene{number + 1}" for number in range(genes)],
        values="log1p",
        totals=totals,
        content=content_key("generated", _VERSION, key, neighbors),
    )


def _slides(key: Json) -> dict[str, np.ndarray]:
    """Counts and patches of all slides; slide s is the same whatever their number."""
    seed = key["seed"]
    loadings = np.random.default_rng(seed).standard_normal((len(CONTENT), key["genes"]))
    counts, patches = [], []
    for number in range(key["slides"]):
        rng = np.random.default_rng([seed, number])
        content = content_of(key["side"], key["signal"], rng)
        counts.append(expressed(content, loadings, rng))
        patches.append(rendered(content, key["pixels"], key["noise"], rng))
    return {"counts": np.concatenate(counts).astype(np.uint16), "patches": np.concatenate(patches)}


def grid(side: int) -> Float[np.ndarray, "spots 2"]:
    """``side`` × ``side`` spots in the hexagonal pattern of Visium, one apart.

    >>> grid(2).round(2).tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.5, 0.87], [1.5, 0.87]]
    """
    row, column = np.divmod(np.arange(side * side), side)
    return np.stack([column + 0.5 * (row % 2), row * np.sqrt(0.75)], axis=1)


def content_of(side: int, signal: float, rng: np.random.Generator) -> Float[np.ndarray, "spots 6"]:
    """The content of a slide: unit variance, a share ``signal`` of it smooth over some spots.

    >>> smooth, white = (content_of(40, s, np.random.default_rng(0)) for s in (1.0, 0.0))
    >>> [abs(round(float((c[1:] * c[:-1]).mean()), 1)) for c in (smooth, white)]
    [0.9, 0.0]
    """
    if not 0.0 <= signal <= 1.0:
        raise NearfarError(f"signal={signal}: the share of content that is smooth, from 0 to 1, is needed.")
    reach = int(np.ceil(4 * SMOOTH))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTH) ** 2)
    kernel /= np.sqrt((kernel**2).sum())  # sums of white noise keep its variance
    field = rng.standard_normal((side + 2 * reach, side + 2 * reach, len(CONTENT)))
    for axis in (0, 1):
        field = np.apply_along_axis(np.convolve, axis, field, kernel, mode="valid")
    smooth = field.reshape(side * side, len(CONTENT))
    white = rng.standard_normal(smooth.shape)
    content: NDArray[np.float64] = np.sqrt(signal) * smooth + np.sqrt(1 - signal) * white
    return content


def expressed(
    content: Float[np.ndarray, "spots 6"], loadings: Float[np.ndarray, "6 genes"], rng: np.random.Generator
) -> Float[np.ndarray, "spots genes"]:
    """Counts of every gene: Poisson around rates that follow the content, at a depth that differs from spot to spot."""
    rate = np.exp(_LOADING * content @ loadings + np.linspace(0.0, 3.0, loadings.shape[1]))
    depth = _DEPTH * np.exp(0.3 * rng.standard_normal(len(content)))
    counts: NDArray[np.float64] = rng.poisson(rate / rate.sum(1, keepdims=True) * depth[:, None]).astype(
        float
    )
    return counts


def rendered(
    content: Float[np.ndarray, "spots 6"], pixels: int, noise: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "spots pixels pixels 3"]:
    """Patches that look a little like H&E: pink ground with fibres and holes, and violet nuclei.

    ``noise`` is the standard deviation of what the picture shows beside the content.
    """
    seen = content + noise * rng.standard_normal(content.shape)
    axis = (np.arange(pixels) + 0.5) / pixels
    y, x = np.meshgrid(axis, axis, indexing="ij")
    pink, violet, white = (np.array(c) for c in ((0.90, 0.58, 0.76), (0.42, 0.26, 0.56), (0.96, 0.95, 0.96)))
    patches = np.empty((len(content), pixels, pixels, 3), np.uint8)
    for spot, (many, size, eosin, dark, fibres, holes) in enumerate(np.tanh(seen / 2) * 2):
        turn, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        wave = np.sin(25 * (x * np.cos(turn) + y * np.sin(turn)) + phase)
        ground = 1 - (1 - pink) * (0.8 * np.exp(0.35 * eosin))
        ground = ground * (1 - 0.06 * np.exp(0.6 * fibres) * np.maximum(wave, 0))[..., None]
        hole = _blobs(x, y, rng.poisson(np.exp(0.6 * holes)), 0.10, rng)[..., None]
        nucleus = _blobs(x, y, rng.poisson(9 * np.exp(0.4 * many)), 0.045 * np.exp(0.3 * size), rng)[
            ..., None
        ]
        stain = 1 - (1 - violet) * np.exp(0.25 * dark - 0.1)
        picture = (ground * (1 - hole) + white * hole) * (1 - nucleus) + stain * nucleus
        picture = picture + 0.02 * rng.standard_normal(picture.shape)
        patches[spot] = np.clip(255 * picture, 0, 255).astype(np.uint8)
    return patches


def _blobs(
    x: NDArray[np.float64], y: NDArray[np.float64], count: int, radius: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """How far each pixel lies inside one of ``count`` soft discs, 0 to 1."""
    if not count:
        return np.zeros_like(x)
    at = rng.random((count, 2, 1, 1))
    distance = np.sqrt((x - at[:, 0]) ** 2 + (y - at[:, 1]) ** 2).min(0)
    inside: NDArray[np.float64] = 1 / (1 + np.exp((distance - radius) * 4 / (0.3 * radius)))
    return inside
