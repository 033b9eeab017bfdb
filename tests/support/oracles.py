"""The losses as their papers write them: one query after the other, in float64, differentiated by autograd.

Nothing here is shared with ``nearfar``. A loss is a list of ``Table``, one for each direction: a score and a weight for
each pair, and which pairs are no candidates. Everything else, values and records, follows from the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class Table:
    """Queries and their candidates. ``absent``: no candidate, whatever else is said (a row itself).

    ``masked``: no candidate unless a positive. A pair of weight above 0 is a positive. ``inside``: the weights stand
    inside the logarithm.
    """

    scores: Tensor
    weights: Tensor
    absent: Tensor
    masked: Tensor
    inside: bool = False

    @cached_property
    def positives(self) -> Tensor:
        return (self.weights > 0) & ~self.absent

    @cached_property
    def rest(self) -> Tensor:
        return ~self.positives & ~self.absent & ~self.masked


def double(*tensors: Tensor) -> list[Tensor]:
    """Copies in float64 that take a gradient."""
    return [x.detach().double().requires_grad_() for x in tensors]


def cosines(a: Tensor, b: Tensor, normalize: bool = True) -> Tensor:
    """The dot product of each row with each, of unit length if wanted; a row of zeros stays as it is."""

    def unit(x: Tensor) -> Tensor:
        length = [math.sqrt(sum(v * v for v in row)) or 1.0 for row in x.tolist()]
        factor = torch.tensor(length, dtype=x.dtype).unsqueeze(1)
        # Written so that autograd differentiates the length as well, where there is one.
        there = (x != 0).any(1, keepdim=True)
        safe = torch.where(there, x, torch.ones_like(x))
        return torch.where(there, safe / (safe * safe).sum(1, keepdim=True).sqrt(), x / factor)

    return (unit(a) if normalize else a) @ (unit(b) if normalize else b).T


def table(
    scores: Tensor,
    weights: Tensor,
    absent: Tensor | None = None,
    masked: Tensor | None = None,
    inside: bool = False,
) -> Table:
    """A table in which everybody is a candidate unless said otherwise."""
    nobody = torch.zeros(scores.shape, dtype=torch.bool)
    return Table(
        scores,
        weights.double(),
        nobody if absent is None else absent,
        nobody if masked is None else masked,
        inside,
    )


def changed(direction: Table, change: Callable[[Tensor], Tensor]) -> Table:
    """The same change of all four matrices."""
    matrices = direction.scores, direction.weights, direction.absent, direction.masked
    scores, weights, absent, masked = (change(each) for each in matrices)
    return Table(scores, weights, absent, masked, direction.inside)


def turned(direction: Table) -> Table:
    """The keys as queries."""
    return changed(direction, lambda matrix: matrix.T)


def only(direction: Table, rows: Tensor) -> Table:
    """Some of the queries."""
    return changed(direction, lambda matrix: matrix[rows])


def joined(direction: Table, scores: Tensor, masked: Tensor | None = None) -> Table:
    """With further negatives: more columns, none of them a positive."""
    more = table(scores, torch.zeros(scores.shape), masked=masked)
    return Table(
        torch.cat([direction.scores, more.scores], 1),
        torch.cat([direction.weights, more.weights], 1),
        torch.cat([direction.absent, more.absent], 1),
        torch.cat([direction.masked, more.masked], 1),
        direction.inside,
    )


def log_sum(values: Tensor) -> Tensor:
    top = values.detach().max()
    return (values - top).exp().sum().log() + top


def losses(direction: Table, denominator: str = "all") -> list[Tensor | None]:
    """The loss of each query, None where it has no positive.

    ``denominator``: each positive against "all" candidates, against the negatives and itself ("own"), or against the
    "negatives" alone.
    """
    found: list[Tensor | None] = []
    scores = direction.scores.unbind(0)
    for i, row in enumerate(scores):
        ours, rest = direction.positives[i], direction.rest[i]
        if not ours.any():
            found.append(None)
            continue
        everybody, weights = row[ours | rest], direction.weights[i][ours]
        if denominator == "own":
            each = [log_sum(torch.cat([row[rest], s.view(1)])) - s for s in row[ours].unbind(0)]
            found.append((torch.stack(each) * weights / weights.sum()).sum())
            continue
        if denominator == "negatives":
            if not rest.any():
                found.append(row.sum() * 0.0)
                continue
            everybody = row[rest]
        if direction.inside:
            found.append(log_sum(everybody) - log_sum(row[ours] + weights.log()))
        else:
            found.append(log_sum(everybody) - (row[ours] * weights / weights.sum()).sum())
    return found


def mean(directions: Sequence[Table], rows: slice | None = None, denominator: str = "all") -> Tensor:
    """Averaged over the queries that have a positive, and over the directions; of some rows only, their part of it."""
    parts = []
    for direction in directions:
        every = losses(direction, denominator)
        valid = sum(each is not None for each in every)
        some = [each for each in every[rows or slice(None)] if each is not None]
        zero = direction.scores.sum() * 0.0
        parts.append(torch.stack([*some, zero]).sum() / max(1, valid))
    return torch.stack(parts).mean()


def expected(direction: Table) -> tuple[list[Tensor], list[Tensor]]:
    """For each query the mean score under its softmax, and under its target."""
    found, held = [], []
    for i, row in enumerate(direction.scores.unbind(0)):
        ours, rest = direction.positives[i], direction.rest[i]
        found.append((torch.softmax(row[ours | rest], 0) * row[ours | rest]).sum())
        weights = direction.weights[i][ours]
        held.append((row[ours] * weights / weights.sum()).sum())
    return found, held


def record(
    directions: Sequence[Table], scale: float, rows: slice | None = None, denominator: str = "all"
) -> dict[str, float]:
    """The fields of a record, each by its definition (for rows of unit length)."""
    columns: dict[str, list[float]] = {}
    least = math.inf
    for direction in directions:
        numbers: dict[str, list[float]] = {name: [] for name in ("c", "n", "m", "p", "h", "u", "f")}
        without = alone = 0.0
        # A positive's probability is one among all, also where the loss leaves it out.
        every = losses(direction, "own" if denominator == "own" else "all")
        for i, loss in list(enumerate(every))[rows or slice(None)]:
            ours, rest = direction.positives[i], direction.rest[i]
            among = {"all": ours.sum(), "own": 1, "negatives": 0}[denominator] + rest.sum()
            numbers["c"].append(float(among))
            numbers["n"].append(float(ours.sum()))
            numbers["m"].append(float((direction.masked[i] & ~ours & ~direction.absent[i]).sum()))
            push = torch.softmax(direction.scores[i].detach()[rest], 0)
            if len(push):
                numbers["h"].append(push.max().item())
            else:
                alone += 1.0
            if loss is None:
                without += 1.0
                continue
            weights = direction.weights[i][ours]
            numbers["p"].append(math.exp(-loss.item()))
            candidates = math.log(max(1.0, numbers["c"][-1]))
            if denominator == "negatives":
                share = math.log(weights.sum().item()) if direction.inside else 0.0
                numbers["u"].append(candidates - share)
                numbers["f"].append(candidates - 2 * scale - share if rest.any() else 0.0)
            elif denominator == "own":
                numbers["u"].append(candidates)
                numbers["f"].append(0.0)
            elif direction.inside:
                numbers["u"].append(candidates - math.log(weights.sum().item()))
                numbers["f"].append(-math.log(weights.max().item()))
            else:
                share = (weights / weights.sum()).tolist()
                numbers["u"].append(candidates)
                numbers["f"].append(-sum(q * math.log(q) for q in share))
        least = min(least, *numbers["n"])
        means = {name: sum(values) / max(1, len(values)) for name, values in numbers.items()}
        for name, value in (means | {"without": without, "alone": alone}).items():
            columns.setdefault(name, []).append(value)
    average = {name: sum(values) / len(values) for name, values in columns.items()}
    return {
        "candidates": average["c"],
        "positives_per_row": average["n"],
        "positives_min": least,
        "rows_without_positives": average["without"],
        "rows_without_negatives": average["alone"],
        "masked_per_row": average["m"],
        "p_positive": average["p"],
        "hardest_share": average["h"],
        "uniform_level": average["u"],
        "floor": average["f"],
        "scale": scale,
        "finite": True,
    }


# -- who belongs to whom, pair by pair ---------------------------------------------------------------------------


def pairs(n: int, m: int, rule: Callable[[int, int], float]) -> Tensor:
    return torch.tensor([[float(rule(i, j)) for j in range(m)] for i in range(n)], dtype=torch.float64)


def own_pair(n: int, m: int | None = None) -> Tensor:
    return pairs(n, m or n, lambda i, j: i == j)


def same_class(labels: Tensor, key_labels: Tensor | None = None) -> Tensor:
    mine, theirs = labels.tolist(), (labels if key_labels is None else key_labels).tolist()
    return pairs(len(mine), len(theirs), lambda i, j: mine[i] == theirs[j])


def jaccard(labels: Tensor) -> Tensor:
    sets = [{k for k, here in enumerate(row) if here} for row in labels.tolist()]

    def rule(i: int, j: int) -> float:
        either = len(sets[i] | sets[j])
        return len(sets[i] & sets[j]) / either if either else 0.0

    return pairs(len(sets), len(sets), rule)


def legacy(codes: Tensor, neutral: int = 0) -> Tensor:
    rows = codes.tolist()

    def rule(i: int, j: int) -> float:
        found = 0.0
        for x, y in zip(rows[i], rows[j], strict=True):
            if x == y:
                found += 1 + (x != neutral and y != neutral)
        return found / (2 * len(rows[i])) + 0.1

    return pairs(len(rows), len(rows), rule)


def sparse(index: Tensor, weight: Tensor, m: int) -> Tensor:
    matrix = torch.zeros(len(index), m, dtype=torch.float64)
    for i, (columns, values) in enumerate(zip(index.tolist(), weight.tolist(), strict=True)):
        for j, value in zip(columns, values, strict=True):
            if j >= 0:
                matrix[i, j] += value
    return matrix


# -- the losses --------------------------------------------------------------------------------------------------


def info_nce(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    symmetric: bool = True,
    normalize: bool = True,
    mask: Tensor | None = None,
    negatives: Sequence[Tensor | None] = (None, None),
    negatives_masks: Sequence[Tensor | None] = (None, None),
    in_batch: bool = True,
) -> list[Table]:
    others = None if in_batch else ~torch.eye(len(a), dtype=torch.bool)
    there = table(cosines(a, b, normalize) * scale, own_pair(len(a), len(b)), others, mask)
    found = []
    for direction, query, more, masked in zip(
        (there, turned(there)), (a, b), negatives, negatives_masks, strict=True
    ):
        if more is not None and more.ndim == 3:
            rows = [cosines(query[i : i + 1], more[i], normalize) for i in range(len(query))]
            direction = joined(direction, torch.cat(rows) * scale, masked)
        elif more is not None:
            direction = joined(direction, cosines(query, more, normalize) * scale, masked)
        found.append(direction)
    return found[: 2 if symmetric else 1]


def supcon(
    z: Tensor,
    labels: Tensor | None,
    scale: float | Tensor,
    inside: bool = False,
    normalize: bool = True,
    other: Tensor | None = None,
    own_pair: bool = True,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    mask: Tensor | None = None,
    positives: Tensor | None = None,
    in_batch: bool = True,
) -> list[Table]:
    n = len(z)
    if memory is not None and not in_batch:
        weights = same_class(labels, memory_labels) if positives is None else positives
        return [table(cosines(z, memory, normalize) * scale, weights, None, mask, inside)]
    weights = same_class(labels) if positives is None else positives
    self = torch.eye(n, dtype=torch.bool)
    if memory is not None and memory_labels is not None:
        keys, key_labels = torch.cat([z, memory]), torch.cat([labels.long(), memory_labels.long()])
        self = torch.cat([self, torch.zeros(n, len(memory), dtype=torch.bool)], 1)
        scores = cosines(z, keys, normalize) * scale
        return [table(scores, same_class(labels, key_labels), self, mask, inside)]
    if other is not None:
        absent = None if own_pair else self
        there = table(cosines(z, other, normalize) * scale, weights, absent, mask, inside)
        return [there, turned(there)]
    return [table(cosines(z, z, normalize) * scale, weights, self, mask, inside)]


def multi_label(
    z: Tensor, weights: Tensor, scale: float | Tensor, inside: bool, normalize: bool = True
) -> list[Table]:
    self = torch.eye(len(z), dtype=torch.bool)
    return [table(cosines(z, z, normalize) * scale, weights, self, inside=inside)]


def spatial(
    image: Tensor,
    text: Tensor,
    scale: float | Tensor,
    index: Tensor,
    alpha: Tensor,
    factor: float = 0.5,
    neighbors: str = "soft",
    normalize: bool = True,
) -> list[Table]:
    n = len(image)
    near = sparse(index, alpha, n)
    weights, masked = own_pair(n), None
    if neighbors == "soft":
        weights = weights + factor * near
    elif neighbors == "positive":
        weights = weights + sparse(index, (alpha > 0).double(), n)
    elif neighbors == "mask":
        masked = (near > 0) | (near.T > 0)
    scores = cosines(image, text, normalize) * scale
    # The target of both directions is the same: text i has the positives of image i.
    return [
        table(scores, weights, masked=masked),
        table(scores.T, weights, masked=None if masked is None else masked.T),
    ]


def spatial_value(directions: Sequence[Table], scale: float | Tensor, weight: float) -> Tensor:
    gap = []
    for direction in directions:
        found, held = expected(direction)
        gap += [x - y for x, y in zip(found, held, strict=True)]
    return mean(directions) + weight * (torch.stack(gap).mean() / scale) ** 2


def siglip(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    mask: Tensor | None = None,
    normalize: bool = True,
) -> list[Tensor]:
    """For each row of ``a``: -Σ_j log σ(t_ij (scale · cos + bias))."""
    found = []
    for i, row in enumerate((cosines(a, b, normalize) * scale + bias).unbind(0)):
        total = torch.nn.functional.softplus(-row[i], threshold=700.0)
        for j in range(len(b)):
            if j != i and not (mask is not None and mask[i, j]):
                total = total + torch.nn.functional.softplus(row[j], threshold=700.0)
        found.append(total)
    return found


def split(
    scores: Tensor, top: float = 0.4, bottom: float = 0.4, least: int = 2, threshold: float | None = None
) -> tuple[list[int], list[int], list[int]]:
    """Anchors, positives, middle: positions in the batch."""
    values, n = scores.tolist(), len(scores)
    order = sorted(range(n), key=lambda i: (values[i], i))
    if threshold is not None:
        high = sum(value > threshold for value in values)
        low = n - high
    else:
        # The shares are decimal numbers: 0.4 of 5 is 2.
        high = max(least, math.floor(round(n * top, 6)))
        low = max(least, math.floor(round(n * bottom, 6)))
        if high + low > n:
            high, low = n // 2, n - n // 2
    if n < 2 * least or min(high, low) < least:
        return [], [], order
    return order[:low], order[n - high :], order[low : n - high]


def score_contrastive(
    z: Tensor,
    scores: Tensor,
    scale: float,
    weights: tuple[float, float] = (1.0, 0.0),
    middle: str = "ignore",
    detach: bool = False,
    normalize: bool = True,
    **options: float | int | None,
) -> tuple[Tensor, list[Table]]:
    """The value, and the table of the anchors."""
    anchors, positives, between = split(scores, **options)  # type: ignore[arg-type]
    if not anchors:
        return z.sum() * 0.0, []
    held = z[positives].detach() if detach else z[positives]
    rest = [z[between]] if middle == "negatives" else []
    keys = torch.cat([z[anchors], held, *rest])
    places = [*anchors, *positives, *(between if rest else [])]

    def pull(queries: list[int]) -> Table:
        absent = pairs(len(queries), len(places), lambda i, j: queries[i] == places[j]) > 0
        towards = pairs(len(queries), len(places), lambda i, j: places[j] in positives)
        return table(cosines(z[queries], keys, normalize) * scale, towards, absent, inside=True)

    first = pull(anchors)
    value = weights[0] * mean([first])
    if weights[1]:
        value = value + weights[1] * mean([pull(positives)])
    return value, [first]


# -- comparing ---------------------------------------------------------------------------------------------------


def error(found: Tensor | None, exact: Tensor | None, floor: float = 1e-6) -> float:
    """The largest difference of two gradients, in units of the largest number of the exact one (or the floor)."""
    assert found is not None
    assert exact is not None
    assert found.isfinite().all()
    return (found.double() - exact).abs().max().item() / max(exact.abs().max().item(), floor)


def agree(
    value: Tensor,
    inputs: Sequence[Tensor],
    exact: Tensor,
    exact_inputs: Sequence[Tensor],
    tolerance: float,
    floor: float = 1e-6,
) -> None:
    """Assert that a value and its gradients are those of the oracle."""
    assert value.shape == ()
    distance = abs(value.item() - exact.item())
    assert distance <= tolerance * max(abs(exact.item()), 0.01 if floor else 0.0), (
        value.item(),
        exact.item(),
    )
    found = torch.autograd.grad(value, inputs)
    wanted = torch.autograd.grad(exact, exact_inputs, retain_graph=True)
    for k, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.dtype == inputs[k].dtype
        assert error(one, other, floor) <= tolerance, (k, error(one, other, floor))
