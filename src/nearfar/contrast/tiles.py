"""The walk over tiles that forward and backward share: product, excluded pairs, positives set apart, sums and maxima.

Beyond its matrix products, a loss costs the memory it reads and the number of calls it makes. Sparse positives
(``Scattered``) would cost a few dozen small calls in each tile. So a tile only hands its entries over (forward) or
receives their derivatives (backward), one call each; what the kernel does with positives is done once, with all entries
together, as if they stood in one tile as large as the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from nearfar.contrast.masks import Mask, is_soft, mask_weights
from nearfar.contrast.positives import (
    MASKED_LOGIT,
    Entries,
    ExtractedPositives,
    InPlacePositives,
    PositiveLogits,
    Rectangle,
    Workspace,
    is_unmasked,
)
from nearfar.contrast.targets import Target
from nearfar.errors import NearfarError

__all__ = [
    "Scattered",
    "Setting",
    "Tile",
    "bounded",
    "common_shift",
    "finite",
    "rest_share",
    "tile_size",
    "tiles",
    "times",
    "times_sum",
    "tiny",
    "top_of",
    "top_of_powers",
    "total_of",
    "within",
]


def times_sum(
    x: Float[Tensor, "r c"],
    rows: Float[Tensor, "r 1"],
    columns: Float[Tensor, " c"],
    out: Float[Tensor, "r c"],
) -> Float[Tensor, "r c"]:
    """``x * (rows + columns)``, which may overwrite ``x``.

    PyTorch has this for the squared error, whose derivative is 2 · (input - target) · upstream.

    >>> x = torch.ones(2, 3)
    >>> times_sum(x, torch.tensor([[10.0], [20.0]]), torch.tensor([1.0, 2.0, 3.0]), out=x)
    tensor([[11., 12., 13.],
            [21., 22., 23.]])
    """
    torch.ops.aten.mse_loss_backward.grad_input(x, rows * 0.5, columns * -0.5, 0, grad_input=out)
    return out


def times(
    x: Float[Tensor, "r d"],
    y: Float[Tensor, "d c"],
    factor: float,
    plus: Float[Tensor, ""] | None = None,
    out: Float[Tensor, "r c"] | None = None,
) -> Float[Tensor, "r c"]:
    """``factor * (x @ y) + plus``.

    >>> times(torch.ones(1, 2), torch.ones(2, 1), 3.0)
    tensor([[6.]])
    """
    if plus is not None:
        return torch.addmm(plus, x, y, alpha=factor, out=out)
    # With beta = 0, what would be added is not looked at.
    return torch.addmm(x[:, :1] if out is None else out, x, y, beta=0, alpha=factor, out=out)


#: how far maxima may lie apart for a single shift
MAX_SHIFT_SPREAD = 50.0


def tiny(like: Tensor) -> float:
    """Keeps a division from 0/0: below every sum of exponentials that is not 0."""
    return torch.finfo(like.dtype).tiny


def total_of(tile: Float[Tensor, "r c"], axis: int) -> Tensor:
    """Sums along the rows (``axis`` 1) or the columns (0)."""
    strips = _strips(tile, axis)
    return tile.sum(axis) if strips is None else strips.sum(1).sum(0)


def top_of(tile: Shaped[Tensor, "r c"], axis: int) -> Tensor:
    """Maxima along the rows (``axis`` 1) or the columns (0)."""
    strips = _strips(tile, axis)
    return tile.amax(axis) if strips is None else strips.amax(1).amax(0)


def top_of_powers(powers: Float[Tensor, "r c"], axis: int) -> Tensor:
    """The same of exponentials, which are never below 0: those compare as the whole numbers that their bits make, and
    quicker, since a maximum of floats looks for NaN at every step."""
    if powers.dtype != torch.float32:
        return top_of(powers, axis)
    return top_of(powers.view(torch.int32), axis).view(torch.float32)


def _strips(tile: Tensor, axis: int) -> Tensor | None:
    """Down long columns, a tile is read in strips of rows: in one go, which is a column after the other for the memory,
    it takes half as long again."""
    rows, columns = tile.shape
    return tile.view(16, -1, columns) if axis == 0 and rows >= 256 and rows % 16 == 0 else None


def common_shift(tops: Iterable[Tensor]) -> float | None:
    """One shift for all exponentials of a tile, if these lie so close together that it is as good for each as its own;
    None if not, where a query has no logit at all, and on a different device, which would have to be waited for.

    The least of them then is e^-50, and what a sum loses below the smallest number, e^-37 of it or less, is less than
    its last digit.

    >>> common_shift([torch.tensor([40.0, 70.0])]), common_shift([torch.tensor([10.0, 70.0])])
    (70.0, None)
    """
    highest, lowest = -math.inf, math.inf
    for top in tops:
        if top.device.type != "cpu":
            return None
        least, most = (end.item() for end in torch.aminmax(top))
        highest, lowest = max(highest, most), min(lowest, least)
    return (
        highest if highest >= lowest > 0.5 * MASKED_LOGIT and highest - lowest <= MAX_SHIFT_SPREAD else None
    )


def rest_share(rest: Tensor, positive: Tensor) -> Tensor:
    """The probability of the rest; 0 where there is none."""
    return torch.sigmoid(torch.where(rest > -torch.inf, rest - positive, -torch.inf))


def within(outer: slice, inner: slice) -> slice:
    """``inner``, counted from the start of ``outer``, in the coordinates of ``outer``.

    >>> within(slice(10, 20), slice(2, 5))
    slice(12, 15, None)
    """
    return slice(outer.start + inner.start, outer.start + inner.stop)


def finite(top: Tensor) -> Tensor:
    """A shift to subtract: 0 where there was nothing to take the maximum of."""
    return torch.where(is_unmasked(top), top, 0.0)


class Scattered:
    """Entries of an (n, m) matrix in the order of a walk over its tiles, and their logits once it has passed.

    >>> entries = Entries(torch.tensor([0, 1]), torch.tensor([1, 0]), (2, 2), torch.ones(2))
    >>> sparse, tile = Scattered(entries, (1, 2), torch.empty(0)), torch.tensor([[5.0, 6.0]])
    >>> sparse.take(0, tile), sparse.logits[0].item(), tile[0, 1].item() < -1e29
    (None, 6.0, True)
    """

    @classmethod
    def of(
        cls, target: Target, offset: int, both: bool, size: tuple[int, int], queries: Float[Tensor, "n d"]
    ) -> Scattered | None:
        """Those of the queries, which are rows of the target from ``offset`` on; None where it has none."""
        entries = target.entries(slice(offset, offset + len(queries)), both)
        return None if entries is None else cls(entries, size, queries)

    def __init__(self, entries: Entries, size: tuple[int, int], like: Tensor) -> None:
        height, width = size
        m = entries.shape[1]
        row, column = entries.row, entries.column
        across = -(-m // width)
        number = row.div(height, rounding_mode="floor") * across + column.div(width, rounding_mode="floor")
        number, order = torch.sort(number, stable=True)
        row, column = row[order], column[order]
        weight, back = (None if w is None else w[order] for w in (entries.weight, entries.weight_back))
        self.patch = Entries(row, column, entries.shape, weight, back)
        left = column - column % width
        # In the memory of its tile, whose rows are as long as it is wide: the last one may be narrower.
        self._places = row % height * (m - left).clamp(max=width) + (column - left)
        ends = torch.arange(-(-entries.shape[0] // height) * across + 1, device=row.device)
        self._starts = torch.searchsorted(number, ends).tolist()
        self.logits = like.new_empty(len(row))
        self._open: Tensor | None = None

    def take(self, number: int, tile: Float[Tensor, "r c"]) -> None:
        """Note down the logits of a tile, the ``number``-th of the walk, and hide them there."""
        part, places = self._of(number)
        if len(places):
            flat = tile.view(-1)
            torch.index_select(flat, 0, places, out=self.logits[part])
            flat.index_fill_(0, places, MASKED_LOGIT)

    def exclude(self, number: int, mask: Float[Tensor, "r c"]) -> None:
        """Note down where a mask (1 where a pair is left out) leaves the other direction's positives out."""
        if self._open is None:
            self._open = torch.ones_like(self.logits)
        part, places = self._of(number)
        if len(places):
            self._open[part] = 1.0 - mask.flatten()[places]

    def put(self, number: int, tile: Float[Tensor, "r c"], values: Float[Tensor, " e"]) -> None:
        """Write what belongs to the entries of a tile."""
        part, places = self._of(number)
        if len(places):
            tile.view(-1).index_copy_(0, places, values[part])

    def as_positives(self, holds_self: bool) -> PositiveLogits:
        """All entries as positives of one tile."""
        return PositiveLogits(self.patch, self.logits, holds_self, self._open)

    def _of(self, number: int) -> tuple[slice, Tensor]:
        part = slice(self._starts[number], self._starts[number + 1])
        return part, self._places[part]


#: rows × columns of a tile on a CPU: large enough for the matrix product, small enough for the cache
TILE = (1024, 1024)
#: of queries that are their own keys: smaller, as tiles on the diagonal do half their work for nothing
TWIN_TILE = 512
#: up to this many pairs, one tile is the whole matrix, and backward finds it where forward left it
DENSE_MAX_PAIRS = 1 << 20
#: logarithm of the largest upstream gradient
MAX_LOG_UPSTREAM = math.log(2.0**24)
#: on an accelerator a tile of a CPU's size would take longer to start than to compute
ACCELERATOR_TILE, ACCELERATOR_DENSE_MAX_PAIRS = (4096, 8192), 1 << 24


def tile_size(
    n: int, m: int, device: torch.device, twin: bool = False, tile: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Rows and columns of a tile for n queries and m keys; ``tile`` is a wish.

    >>> tile_size(300, 300, torch.device("cpu")), tile_size(9000, 9000, torch.device("cpu"), twin=True)
    ((300, 300), (512, 512))
    """
    on_cpu = device.type == "cpu"
    if tile is not None and min(tile) < 1:
        raise NearfarError(f"tile is {tile}; it is a number of rows and one of columns, 1 or more each")
    if tile is None and n * m <= (DENSE_MAX_PAIRS if on_cpu else ACCELERATOR_DENSE_MAX_PAIRS):
        return n, m
    if tile is None:
        tile = TILE if on_cpu else ACCELERATOR_TILE
        if twin:
            tile = (TWIN_TILE, TWIN_TILE) if on_cpu else (tile[0], tile[0])
    height, width = min(tile[0], n), min(tile[1], m)
    if twin:  # square, so that tiles meet the diagonal in their corners
        height = width = min(height, width)
    return height, width


@dataclass(frozen=True)
class Setting:
    """What one call computes, apart from its tensors.

    ``offset``: query 0 is row ``offset`` of the target (and key ``offset`` is the same item, for ``without_self``).
    ``normalize``: rows are brought to unit length first.
    ``both``: the keys are queries too. ``twin``: queries and keys are the same rows; only tiles on and above the
    diagonal are computed. ``bounded``: no logit is so large that its exponential overflows, so that no shift is
    needed. ``inside``: weights of the positives stand inside the logarithm. ``expected``: the mean logit under the
    softmax is wanted.
    """

    target: Target
    mask: Mask | None
    offset: int
    without_self: bool
    normalize: bool
    both: bool
    twin: bool
    inside: bool
    expected: bool
    bounded: bool
    size: tuple[int, int]
    keep: bool

    @property
    def has_excess(self) -> bool:
        """Whether the positives' own term is anything but zero, see ``kernel``."""
        return not (self.target.single or (self.inside and self.target.binary))


class Tile(NamedTuple):
    """Logits of some queries and keys. Left-out pairs and positives are hidden; ``positives`` are apart."""

    rows: slice
    columns: slice
    queries: Float[Tensor, "r d"]
    keys: Float[Tensor, "c d"]
    logits: Float[Tensor, "r c"]
    positives: list[ExtractedPositives]
    #: its place in the walk
    number: int
    #: its columns are queries in their own right (false on the diagonal of twins, where the rows say it all)
    back: bool
    #: by how much each pair counts as a negative, where the mask says so; the logits hold the logarithm already
    weights: Float[Tensor, "r c"] | None = None


def bounded(largest_logit: float, n: int, m: int, dtype: torch.dtype) -> bool:
    """Whether sums of exponentials stay in range without a shift: logits up to about 70 in float32.

    So do the quotients of backward: an upstream gradient of up to 2^24, as loss scaling has, over the least sum.

    A constant shift fails silently beyond: the sums of some rows underflow to 0. CLIP's scale of 100 is beyond.

    >>> bounded(14.3, 8192, 8192, torch.float32), bounded(100.0, 8192, 8192, torch.float32)
    (True, False)
    """
    return largest_logit + max(math.log(max(n, m)), MAX_LOG_UPSTREAM) < math.log(torch.finfo(dtype).max) - 1.0


def tiles(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    scale: Tensor,
    setting: Setting,
    space: Workspace,
    collect: Scattered | None = None,
    lengths: Float[Tensor, "n 1"] | None = None,
) -> Iterator[Tile]:
    """All tiles, one after the other in the same buffer; rows change last. ``collect`` takes its entries out.

    With ``lengths``, each row of ``a`` is divided by its own, in a buffer that holds a tile's queries at a time.
    """
    n, m = len(a), len(b)
    height, width = setting.size
    columns = [slice(left, min(left + width, m)) for left in range(0, m, width)]
    keys = b.split(width)
    spare = a.new_empty(height, a.shape[1])
    unit = None if lengths is None else torch.empty_like(spare)
    for top, queries in zip(range(0, n, height), a.split(height), strict=True):
        rows = slice(top, top + len(queries))
        own = slice(rows.start + setting.offset, rows.stop + setting.offset)
        if unit is not None and lengths is not None:
            queries = torch.div(queries, lengths[rows], out=unit[: len(queries)])
        scaled = torch.mul(queries, scale, out=spare[: len(queries)])
        for k in range(top // width if setting.twin else 0, len(columns)):
            logits = space("logits", len(queries), len(keys[k]))
            torch.mm(scaled, keys[k].T, out=logits)
            positives = _take(logits, own, columns[k], setting, space)
            number = top // height * len(columns) + k
            if collect is not None:
                collect.take(number, logits)
            weights = None
            if setting.mask is not None and is_soft(setting.mask):
                weights = mask_weights(setting.mask, own, columns[k]).to(logits)
                logits.add_(weights.log().clamp_(min=MASKED_LOGIT))
            elif setting.mask is not None:
                left_out = setting.mask.tile(own, columns[k]).to(logits)
                logits.add_(left_out, alpha=MASKED_LOGIT)
                if collect is not None:
                    collect.exclude(number, left_out)
            back = setting.both or (setting.twin and columns[k].start > top)
            yield Tile(rows, columns[k], queries, keys[k], logits, positives, number, back, weights)


def _take(
    logits: Tensor, own: slice, columns: slice, setting: Setting, space: Workspace
) -> list[ExtractedPositives]:
    """Hide each row's own place, where it is no candidate, and set the positives apart."""
    first, last = max(own.start, columns.start), min(own.stop, columns.stop)
    others = None
    if setting.without_self and first < last:
        place = (
            slice(first - own.start, last - own.start),
            slice(first - columns.start, last - columns.start),
        )
        logits[place].diagonal().fill_(MASKED_LOGIT)
        others = space("others", *logits.shape).fill_(1.0)
        others[place].diagonal().zero_()
    positives: list[ExtractedPositives] = []
    for number, patch in enumerate(setting.target.patches(own, columns, space)):
        if isinstance(patch, Rectangle) and setting.bounded and not setting.expected and setting.mask is None:
            positives.append(InPlacePositives(patch, logits, others, f"block {number}", space))
        else:
            positives.append(ExtractedPositives(patch, patch.take(logits), others is not None))
    return positives
