"""Generated data: pairs of a view and a frozen text, in clusters, with near-duplicates in a share that is dialled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.errors import NearfarError

__all__ = ["Pairs", "clustered_pairs", "mix"]

#: near-duplicates come in groups of so many
COPIES = 4
#: noise between them, relative to a text of length 1: cosines of about .99
NEAR = 0.1


@dataclass(frozen=True)
class Pairs:
    """``n`` pairs: what the encoder sees, the text it should be near, and the cluster both come from."""

    view: Float[Tensor, "n v"]
    text: Float[Tensor, "n d"]
    cluster: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.view)

    def part(self, rows: slice) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.view[rows], self.text[rows], self.cluster[rows])


def clustered_pairs(
    seed: int,
    items: int,
    test: int,
    *,
    clusters: int,
    spread: float,
    noise: float,
    duplicates: float = 0.0,
    dims: int = 32,
    view_dims: int = 32,
) -> tuple[Pairs, Pairs]:
    """Training and test pairs of one world.

    Texts are unit vectors (``dims``) around their cluster's centre, ``spread`` away from it (1: as far as the centres
    are from the origin). A view is a fixed nonlinear mixture of the text and of ``noise`` of its own. A share
    ``duplicates`` of the training pairs come in groups of ``COPIES`` whose texts are all but the same (cosine about
    .99) and whose views show the same thing; test pairs have none.

    >>> train, test = clustered_pairs(0, 40, 10, clusters=5, spread=0.5, noise=0.3)
    >>> train.view.shape, test.text.shape
    (torch.Size([40, 32]), torch.Size([10, 32]))
    """
    if not 0.0 <= duplicates <= 1.0:
        raise NearfarError(f"duplicates is {duplicates}; give the share of training pairs, from 0 to 1")
    g = torch.Generator().manual_seed(seed)
    centres = _unit(torch.randn(clusters, dims, generator=g))
    cluster = torch.randint(clusters, (items + test,), generator=g)
    text = _unit(centres[cluster] + spread / dims**0.5 * torch.randn(items + test, dims, generator=g))
    groups = int(duplicates * items) // COPIES
    if groups:
        first = torch.arange(groups).repeat_interleave(COPIES) * COPIES
        near = text[first] + NEAR / dims**0.5 * torch.randn(len(first), dims, generator=g)
        text[: len(first)], cluster[: len(first)] = _unit(near), cluster[first]
    view = mix(text, view_dims, noise, g)
    order = torch.cat([torch.randperm(items, generator=g), torch.arange(items, items + test)])
    pairs = Pairs(view[order], text[order], cluster[order])
    return pairs.part(slice(items)), pairs.part(slice(items, None))


def mix(
    content: Float[Tensor, "n d"], dims: int, noise: float, generator: torch.Generator
) -> Float[Tensor, "n v"]:
    """A view of some content: noise added, then a random two-layer map that an encoder has to undo."""
    inner = content.shape[1]
    seen = content + noise / inner**0.5 * torch.randn(content.shape, generator=generator)
    first = torch.randn(inner, 2 * dims, generator=generator)
    second = torch.randn(2 * dims, dims, generator=generator) / (2 * dims) ** 0.5
    return torch.tanh(2 * seen @ first) @ second


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)
