"""The kernel, its targets and masks against loops over pairs; what every loss inherits from it."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor

import oracles
from combinations import combined
from nearfar.contrast import (
    Columns,
    DenseMask,
    DuplicateMask,
    IndexMask,
    LabelOverlap,
    NoPositives,
    NoPositivesWarning,
    OwnPair,
    SameClass,
    SimilarityMask,
    SparseWeights,
    Weights,
    log_sums,
    sigmoid_sums,
    softmax_loss,
    unit_rows,
)
from nearfar.contrast.tiles import bounded, common_shift, tile_size
from nearfar.errors import NearfarError
from nearfar.functional import (
    adaptive_score_contrastive,
    bidirectional_score_contrastive,
    clip,
    info_nce,
    multi_label_supcon,
    siglip,
    spatial,
    supcon,
)
from nearfar.losses import InfoNCELoss, Record, SigLipLoss, SpatialLoss, SupConLoss
from processes import together

N = 9


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(draw(*shape, seed=seed))


def mixed_targets() -> dict:
    """Targets for N rows, with the weights of both directions pair by pair: unsorted and negative labels, rows
    without positives, entries that are repeated, missing, of weight 0, a row itself.
    """
    labels = torch.tensor([3, 0, 1, 3, 0, 7, 1, -2, 3])
    multi = (draw(N, 4, seed=1) < 0).long()
    multi[5] = 0
    index = torch.tensor(
        [
            [1, 2, -1],
            [0, 0, 1],
            [-1, -1, -1],
            [4, -1, 8],
            [3, 3, 3],
            [0, 1, 2],
            [6, 6, -1],
            [8, -1, -1],
            [7, 2, -1],
        ]
    )
    weight = draw(N, 3, seed=2).abs().float()
    weight[5] = 0
    near = oracles.sparse(index, weight, N)
    free = draw(N, N, seed=3).clamp(min=0)
    free[4] = 0
    targets = {
        "own": (OwnPair(N), oracles.own_pair(N)),
        "class": (SameClass(labels), oracles.same_class(labels)),
        "class, sorted": (SameClass(labels.sort().values), oracles.same_class(labels.sort().values)),
        "overlap": (LabelOverlap(multi), oracles.jaccard(multi)),
        "sparse": (SparseWeights(index, weight, N), near),
        "weights": (Weights(free), free),
    }
    # Column i has the positives of row i where weights are sparse; in all others, what row i weighs for column j.
    return {name: (target, w, w if name == "sparse" else w.T) for name, (target, w) in targets.items()}


def mixed_masks() -> dict:
    some = draw(N, N, seed=4) < -0.3
    number = torch.arange(N) % 4
    repeated = number[:, None] == number[None]
    index = torch.tensor([[1], [-1], [5], [3], [-1], [0], [8], [8], [2]])
    near = oracles.sparse(index, torch.ones(N, 1), N) > 0
    reference = draw(N, 2, seed=5)
    cosine = oracles.cosines(reference, reference)
    return {
        "none": (None, None),
        "dense": (DenseMask(some), some),
        "repeated": (DuplicateMask(number), repeated),
        "similar": (SimilarityMask(reference, 0.8), cosine >= 0.8),
        "joined": (some | IndexMask(index), some | near | near.T),
        "all": (DenseMask(torch.ones(N, N, dtype=torch.bool)), torch.ones(N, N, dtype=torch.bool)),
    }


TARGETS, MASKS = mixed_targets(), mixed_masks()


def situations(target):
    """Directions, own places, twins, tiles."""
    for both, alone, twin, tile in itertools.product(
        (False, True), (False, True), (False, True), (None, (4, 3))
    ):
        if not (both and twin) and not (alone and target.single):
            yield both, alone, twin, tile


def tables(scores, weights, back, absent, masked, inside, both):
    first = oracles.table(scores, weights, absent, masked, inside)
    return [first, oracles.Table(scores.T, back, first.absent.T, first.masked.T, inside)][: 1 + both]


@pytest.mark.filterwarnings("ignore::nearfar.contrast.NoPositivesWarning")
@combined(
    2,
    slow=["similar", "all"],
    name=TARGETS,
    masked=["none", "joined", "similar", "all"],
    where=["outside", "inside"],
)
def test_value_gradients_and_record_of_every_target_and_mask(name, masked, where):
    inside = where == "inside"
    target, weights, back = TARGETS[name]
    mask, left_out = MASKS[masked]
    # The larger scale is beyond the limit for sums without a shift, in both precisions. Each situation has one of the
    # three, and all of them over the masks of a target.
    precisions = ((torch.float64, 3.0), (torch.float64, 900.0), (torch.float32, 110.0))
    first = list(MASKS).index(masked)
    for case, (both, alone, twin, tile) in enumerate(situations(target)):
        dtype, scale = precisions[(first + case) % 3]
        x, y = unit(N, 4, seed=case).to(dtype), unit(N, 4, seed=100 + case).to(dtype)
        found = [x.requires_grad_(), *([] if twin else [y.requires_grad_()])]
        s = torch.tensor(scale, dtype=dtype, requires_grad=True)
        value, step = softmax_loss(
            x, None if twin else y, s, target,
            both=both, mask=mask, without_self=alone, inside=inside, tile=tile, unit=True,
        )  # fmt: skip
        exact = oracles.double(*found, s)
        scores = exact[0] @ exact[0 if twin else 1].T * exact[-1]
        absent = torch.eye(N, dtype=torch.bool) if alone else None
        directions = tables(scores, weights, back, absent, left_out, inside, both)
        # Weights of labels and neighbours are float32.
        tolerance = 3e-6 if dtype == torch.float64 else 1e-3
        oracles.agree(value, [*found, s], oracles.mean(directions), exact, tolerance, floor=1e-3 * scale)
        record = Record.of(step).to_dict()
        assert record == pytest.approx(oracles.record(directions, scale), rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("masked", ["none", "joined"])
@pytest.mark.parametrize("name", TARGETS)
def test_mean_logit_of_every_target(name, masked):
    target, weights, back = TARGETS[name]
    mask, left_out = MASKS[masked]
    # each situation has one of the three, and all of them over the targets and masks
    precisions = ((torch.float64, 3.0), (torch.float64, 900.0), (torch.float32, 60.0))
    first = list(TARGETS).index(name) + list(MASKS).index(masked)
    for case, (both, alone, twin, tile) in enumerate(situations(target)):
        dtype, scale = precisions[(first + case) % 3]
        x, y = unit(N, 4, seed=case).to(dtype), unit(N, 4, seed=100 + case).to(dtype)
        found = [x.requires_grad_(), *([] if twin else [y.requires_grad_()])]
        s = torch.tensor(scale, dtype=dtype, requires_grad=True)
        sums = log_sums(
            x, None if twin else y, s, target,
            both=both, mask=mask, without_self=alone, expected=True, tile=tile, unit=True,
        )  # fmt: skip
        exact = oracles.double(*found, s)
        scores = exact[0] @ exact[0 if twin else 1].T * exact[-1]
        absent = torch.eye(N, dtype=torch.bool) if alone else None
        value, wanted = torch.zeros((), dtype=dtype), torch.zeros((), dtype=torch.float64)
        directions = tables(scores, weights, back, absent, left_out, False, both)
        for each, direction in zip(sums, directions, strict=True):
            valid = direction.positives.any(1)
            some = torch.nonzero(valid).flatten()
            means, _ = oracles.expected(oracles.only(direction, some))
            share = draw(N, seed=7)[some]
            value = value + (each.mean_logit()[some] * share.to(dtype)).sum() + each.losses().sum()
            wanted = wanted + (torch.stack(means) * share).sum()
            wanted = wanted + torch.stack([x for x in oracles.losses(direction) if x is not None]).sum()
        tolerance = 3e-6 if dtype == torch.float64 else 2e-3
        oracles.agree(value, [*found, s], wanted, exact, tolerance, floor=1e-3 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("name", TARGETS)
def test_gradients_by_differences(name, inside):
    target, _, _ = TARGETS[name]
    mask, _ = MASKS["joined"]
    inputs = [x.requires_grad_() for x in (draw(N, 2), draw(N, 2, seed=1), torch.tensor(1.3).double())]

    def value(a, b, scale):
        sums = log_sums(
            a, b, scale, target, both=True, mask=mask, inside=inside, expected=not inside, tile=(5, 4)
        )
        total = sum(each.losses().sum() for each in sums)
        return total if inside else total + sum((each.mean_logit() ** 2).sum() for each in sums)

    assert torch.autograd.gradcheck(value, inputs, fast_mode=True)


def test_the_oracle_is_the_cross_entropy_of_pytorch():
    a, b = draw(6, 3), draw(6, 3, seed=1)
    scores = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2) * 7.0
    own = torch.arange(6)
    expected = torch.nn.functional.cross_entropy(scores, own) + torch.nn.functional.cross_entropy(
        scores.T, own
    )
    assert oracles.mean(oracles.info_nce(a, b, 7.0)).item() == pytest.approx(expected.item() / 2, rel=1e-12)
    soft = torch.softmax(draw(6, 6, seed=2), 1)
    found = oracles.mean([oracles.table(scores, soft)])
    assert found.item() == pytest.approx(torch.nn.functional.cross_entropy(scores, soft).item(), rel=1e-12)


# -- the two ways to sum, the two sizes -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", [0.5, 0.99, 1.01, 2.0])
@pytest.mark.parametrize("anti", [False, True], ids=["spread", "all far apart"])
def test_both_sides_of_the_limit_of_sums_without_a_shift(dtype, part, anti):
    limit = next(x / 100 for x in range(1, 10**6) if not bounded(x / 100, 6, 6, dtype))
    assert 60 < limit < 1000
    labels = torch.tensor([0, 1, 0, 2, 2, 1])
    lengths = draw(6, 1, seed=9).abs() + 1.0
    for long in (False, True):
        a, b = unit(6, 3), unit(6, 3, seed=1)
        if anti:  # every sum is as small as it can be
            a, b = a * 0.02 + torch.eye(3)[0], b * 0.02 - torch.eye(3)[0]
        a, b = (unit_rows(x) * (lengths if long else 1.0) for x in (a, b))
        longest = (a.norm(dim=1).max() * b.norm(dim=1).max()).item()
        scale = part * limit / 1.001 / longest
        x, y = (v.to(dtype).requires_grad_() for v in (a, b))
        u, v = oracles.double(x, y)
        tolerance = 2e-3 if dtype == torch.float32 else 1e-6
        for tile in (None, (4, 4)):
            for inside in (False, True):
                value = supcon(
                    x, labels, other=y, temperature=1 / scale, normalize=not long, tile=tile,
                    sum="inside" if inside else "outside",
                )  # fmt: skip
                exact = oracles.mean(oracles.supcon(u, labels, scale, inside, normalize=not long, other=v))
                oracles.agree(value, (x, y), exact, (u, v), tolerance, floor=1e-3)
            value = info_nce(x, y, scale=scale, normalize=not long, tile=tile)
            exact = oracles.mean(oracles.info_nce(u, v, scale, normalize=not long))
            oracles.agree(value, (x, y), exact, (u, v), tolerance, floor=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [0.0, 20.0, 40.0, 47.0, 53.0, 60.0, 90.0, 300.0])
def test_both_sides_of_the_limit_of_a_single_shift(dtype, apart):
    # The largest logits of the queries, and of the keys, lie so far apart; more than 100 are too large without a shift.
    angle = torch.linspace(0.0, 0.05, 6).double().unsqueeze(1)
    lengths = torch.cat([torch.ones(3, 1), torch.full((3, 1), 400.0 / (400.0 + apart))]).double()
    a = torch.cat([angle.cos(), angle.sin()], 1) * lengths
    b = torch.cat([angle.cos(), -angle.sin()], 1)
    scale, index, alpha = 400.0 + apart, torch.tensor([[1], [2], [3], [4], [5], [0]]), torch.ones(6, 1)
    tops = (a @ b.T * scale).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).amax(1)
    assert (common_shift([tops]) is None) == (apart > 50)
    x, y = (v.to(dtype).requires_grad_() for v in (a, b))
    u, v = oracles.double(x, y)
    tolerance = 2e-3 if dtype == torch.float32 else 1e-9
    for tile in (None, (3, 4)):
        value = info_nce(x, y, scale=scale, normalize=False, tile=tile)
        oracles.agree(
            value,
            (x, y),
            oracles.mean(oracles.info_nce(u, v, scale, normalize=False)),
            (u, v),
            tolerance,
            floor=1e-3,
        )
        for weight in (0.0, 0.05):  # with the mean logit under the softmax
            value = spatial(x, y, scale, index, alpha, temp_reg_weight=weight, normalize=False, tile=tile)
            exact = oracles.spatial(u, v, scale, index, alpha, normalize=False)
            oracles.agree(
                value, (x, y), oracles.spatial_value(exact, scale, weight), (u, v), tolerance, floor=1e-3
            )


@pytest.mark.parametrize("scale", [40.0, 60.0, 69.0, 71.0, 80.0, 86.0])
def test_a_scaled_loss_does_not_overflow_in_backward(scale):
    # Mixed precision multiplies the loss by up to 2^24; sums of exp(-scale) are near the end of float32.
    a = torch.tensor([[1.0, 0.1], [1.0, -0.1], [1.0, 0.3]])
    x, y = a.clone().requires_grad_(), (-a).requires_grad_()
    u, v = oracles.double(x, y)
    labels, index = torch.tensor([0, 1, 1]), torch.tensor([[1], [0], [0]])
    calls = [
        (info_nce(x, y, scale=scale, tile=(2, 2)), oracles.mean(oracles.info_nce(u, v, scale))),
        (
            supcon(x, labels, other=y, temperature=1 / scale),
            oracles.mean(oracles.supcon(u, labels, scale, other=v)),
        ),
        (
            spatial(x, y, scale, index, torch.ones(3, 1), neighbors="mask"),
            oracles.spatial_value(
                oracles.spatial(u, v, scale, index, torch.ones(3, 1), neighbors="mask"), scale, 0.05
            ),
        ),
    ]
    for value, exact in calls:
        oracles.agree(value * 2.0**24, (x, y), exact * 2.0**24, (u, v), 1e-3)


def test_small_sums_in_double_precision():
    # exp(-300) is far below the smallest float32, but no zero in float64.
    a = torch.tensor([[1.0, 0.0], [0.9, 0.1]], dtype=torch.float64)
    x, y = a.clone().requires_grad_(), (-a).requires_grad_()
    u, v = oracles.double(x, y)
    for scale in (100.0, 300.0, 680.0):
        value = info_nce(x, y, scale=scale, tile=(1, 2))
        oracles.agree(value, (x, y), oracles.mean(oracles.info_nce(u, v, scale)), (u, v), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1024, 1025])
@pytest.mark.parametrize("scale", [12.0, 100.0])
def test_large_batches_equal_one_matrix(n, scale):
    assert (tile_size(n, n, torch.device("cpu")) == (n, n)) == (n == 1024)
    a, b = (unit(n, 8, seed=seed).float().requires_grad_() for seed in (0, 1))
    labels = torch.arange(n) * 7 % 100
    index = (torch.arange(n).unsqueeze(1) + torch.tensor([[1, 5, -n]])) % n
    index[:, 2] = -1
    alpha = draw(n, 3).abs().float()
    u, v = oracles.double(a, b)
    own, eye = torch.arange(n), torch.eye(n, dtype=torch.bool)
    cross_entropy = torch.nn.functional.cross_entropy
    scores = torch.nn.functional.normalize(u) @ torch.nn.functional.normalize(v).T * scale
    twin = torch.nn.functional.normalize(u) @ torch.nn.functional.normalize(u).T * scale
    same = ((labels[:, None] == labels[None]) & ~eye).double()
    near = torch.where(index < 0, 0.0, alpha.double())
    soft = eye.double().scatter_add_(1, index.clamp(min=0), 0.5 * near)
    soft = soft / soft.sum(1, keepdim=True)
    pairs = {
        "info_nce": (
            info_nce(a, b, scale=scale),
            (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2,
        ),
        "supcon": (
            supcon(a, labels, temperature=1 / scale),
            -((twin - twin.masked_fill(eye, -torch.inf).logsumexp(1, keepdim=True)) * same)
            .sum(1)
            .div(same.sum(1))
            .mean(),
        ),
        "spatial": (
            spatial(a, b, scale, index, alpha, temp_reg_weight=0.0),
            (cross_entropy(scores, soft) + cross_entropy(scores.T, soft)) / 2,
        ),
        "siglip": (
            siglip(a, b, scale, -3.0),
            torch.nn.functional.softplus(-(scores - 3.0) * (2 * eye.double() - 1), threshold=700).sum() / n,
        ),
    }
    for name, (value, exact) in pairs.items():
        inputs, wanted = ((a,), (u,)) if name == "supcon" else ((a, b), (u, v))
        oracles.agree(value, inputs, exact, wanted, 1e-4)


# -- targets and masks by themselves ----------------------------------------------------------------------------


def test_a_row_without_positives_is_not_moved_by_who_points_at_it():
    # Only row 0 has a positive; rows 1 and 2 are pointed at and have none themselves.
    index = torch.tensor([[1, 2], [-1, -1], [-1, -1]])
    target = SparseWeights(index, torch.tensor([[1.0, 2.0]]).expand(3, 2), 3)
    for tile, scale in itertools.product((None, (2, 2)), (2.0, 100.0)):
        x, y = (unit(3, 2, seed=seed).float().requires_grad_() for seed in (1, 2))
        value, step = softmax_loss(x, y, torch.tensor(scale), target, unit=True, tile=tile)
        gradient = torch.autograd.grad(value, x)[0]
        assert (gradient[1:] == 0).all()
        assert (gradient[0] != 0).any()
        assert step.directions()[0].losses[1:].tolist() == [0.0, 0.0]
        assert Record.of(step).rows_without_positives == 2.0


@pytest.mark.parametrize(("n", "m"), [(5, 3), (3, 5)])
def test_sparse_weights_of_more_or_fewer_keys(n, m):
    index = torch.tensor([[m - 1, 0], [1, -1], [2, 2], [0, 1], [-1, m - 1]])[:n]
    weight = draw(n, 2).abs().float()
    target = SparseWeights(index, weight, m)
    for tile in (None, (2, 2)):
        x, y = draw(n, 3, seed=1).requires_grad_(), draw(m, 3, seed=2).requires_grad_()
        u, v = oracles.double(x, y)
        value, _ = softmax_loss(x, y, torch.tensor(2.0).double(), target, tile=tile)
        exact = oracles.mean([oracles.table(u @ v.T * 2.0, oracles.sparse(index, weight, m))])
        oracles.agree(value, (x, y), exact, (u, v), 1e-6)
    with pytest.raises(NearfarError, match="as many keys"):
        target.transposed()


@pytest.mark.slow
def test_chosen_columns_and_nobody():
    x, y = draw(3, 2).requires_grad_(), draw(7, 2, seed=1).requires_grad_()
    u, v = oracles.double(x, y)
    scale = torch.tensor(1.5).double()
    weights = oracles.pairs(3, 7, lambda i, j: 2 <= j < 6)
    absent = torch.eye(3, 7, dtype=torch.bool)
    for inside, tile in itertools.product((False, True), (None, (2, 3))):
        value, _ = softmax_loss(
            x, y, scale, Columns(3, 7, slice(2, 6)), without_self=True, inside=inside, tile=tile
        )
        exact = oracles.mean([oracles.table(u @ v.T * 1.5, weights, absent, inside=inside)])
        oracles.agree(value, (x, y), exact, (u, v), 1e-9)
        (sums,) = log_sums(x, y, scale, NoPositives(3, 7), tile=tile)
        assert torch.allclose(sums.rest, torch.logsumexp(x @ y.T * 1.5, 1))
        assert (sums.positive == -torch.inf).all()
    with pytest.raises(NearfarError, match="one direction"):
        Columns(3, 7, slice(2, 6)).transposed()
    assert Columns(3, 7, slice(2, 3)).has_positives(True).tolist() == [True, True, False]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("alone", [False, True])
def test_who_has_positives(name, alone):
    target, weights, back = TARGETS[name]
    there = weights > 0
    if alone:
        there = there & ~torch.eye(N, dtype=torch.bool)
        back = torch.where(torch.eye(N, dtype=torch.bool), 0.0, back)
    if not (alone and name == "own"):
        assert target.has_positives(alone).tolist() == there.any(1).tolist()
        assert target.transposed().has_positives(alone).tolist() == (back > 0).any(1).tolist()


@pytest.mark.parametrize("masked", [name for name in MASKS if name != "none"])
def test_tiles_of_masks(masked):
    mask, left_out = MASKS[masked]
    assert mask.shape == (N, N)
    if mask.symmetric:
        assert torch.equal(left_out, left_out.T)
    for rows, columns in itertools.product((slice(0, N), slice(2, 5), slice(8, 9)), repeat=2):
        assert torch.equal(mask.tile(rows, columns), left_out[rows, columns])


def test_masks_of_other_shapes():
    mask = DuplicateMask(torch.tensor([1, 2]), torch.tensor([2, 2, 1]))
    assert mask.tile(slice(0, 2), slice(0, 3)).tolist() == [[False, False, True], [True, True, False]]
    assert not mask.symmetric
    with pytest.raises(NearfarError, match="cannot be joined"):
        mask | DuplicateMask(torch.tensor([1, 2]))
    row = torch.tensor([[0.3, 0.1, -0.7]])
    alike = SimilarityMask(torch.cat([row, 5 * row, row + 0.5]), 1.0)  # a copy is a copy, whatever is rounded
    assert alike.tile(slice(0, 1), slice(0, 3)).tolist() == [[True, True, False]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool])
def test_labels_of_any_whole_type(dtype):
    largest = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    z = unit(6, 3)
    for labels in (
        torch.tensor([0, 0, 1, 1, largest, largest]),
        torch.tensor([largest, 0, 1, 0, 1, largest]),
    ):
        value = supcon(z, labels.to(dtype))
        assert value.item() == pytest.approx(oracles.mean(oracles.supcon(z, labels, 10.0)).item())


@pytest.mark.parametrize("name", TARGETS)
def test_the_pairwise_sigmoid_takes_every_target(name):
    target, weights, _ = TARGETS[name]
    softplus = torch.nn.functional.softplus
    for masked, tile in itertools.product(("none", "joined"), (None, (4, 5))):
        mask, left_out = MASKS[masked]
        x, y = (unit(N, 3, seed=seed).requires_grad_() for seed in (0, 1))
        s, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (5.0, -2.0))
        exact = oracles.double(x, y, s, bias)
        scores = exact[0] @ exact[1].T * exact[2] + exact[3]
        direction = oracles.table(scores, weights, masked=left_out)
        ours, rest = direction.positives.double(), direction.rest.double()
        positive, others, hardest, push, left = sigmoid_sums(x, y, s, bias, target, mask=mask, tile=tile)
        wanted = (softplus(-scores) * ours).sum(1), (softplus(scores) * rest).sum(1)
        assert torch.allclose(positive, wanted[0])
        assert torch.allclose(others, wanted[1])
        share = draw(2, N, seed=3)
        oracles.agree(
            (positive * share[0] + others * share[1]).sum(), (x, y, s, bias),
            (wanted[0] * share[0] + wanted[1] * share[1]).sum(), exact, 1e-9,
        )  # fmt: skip
        assert torch.allclose(push, (torch.sigmoid(scores) * rest).sum(1))
        assert torch.allclose(hardest.clamp(min=-99), torch.where(rest > 0, scores, -99).amax(1))
        if mask is not None:
            assert left.tolist() == rest.sum(1).tolist()


def test_unit_rows_at_the_ends_of_the_range():
    x = torch.tensor([[3e30, 4e30], [0.0, 0.0], [3e-30, -4e-30], [1.0, 0.0]])
    assert torch.allclose(unit_rows(x), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, -0.8], [1.0, 0.0]]))
    assert unit_rows(torch.empty(0, 3)).shape == (0, 3)
    for rows in (draw(4, 3), torch.cat([draw(4, 3), draw(1, 3) * 1e-20])):
        assert torch.allclose(unit_rows(rows), torch.nn.functional.normalize(rows, eps=0.0))
    few, many = draw(3, 5).requires_grad_(), draw(1 << 15, 5).requires_grad_()
    for each in (few, many):
        found = torch.autograd.grad((unit_rows(each) ** 3).sum(), each)[0]
        exact = torch.autograd.grad((torch.nn.functional.normalize(each) ** 3).sum(), each)[0]
        assert oracles.error(found, exact) < 1e-12
    rows = draw(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(unit_rows, rows)
    with pytest.raises(NearfarError, match="first derivatives only"):
        torch.autograd.grad(unit_rows(rows).sum(), rows, create_graph=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: softmax_loss(draw(3, 2), draw(3, 2), torch.tensor(1.0), OwnPair(4)), "target is for"),
        (lambda: SparseWeights(torch.tensor([[3]]), torch.ones(1, 1), 3), "holds 3, but there are 3 columns"),
        (lambda: SparseWeights(torch.tensor([[1]]), -torch.ones(1, 1), 3), "0 or more"),
        (lambda: SparseWeights(torch.tensor([[1]]), torch.tensor([[math.nan]]), 3), "not a number"),
        (lambda: IndexMask(torch.tensor([[2], [0]])), "positions in the batch"),
        (lambda: Weights(torch.tensor([[-1.0]])), "0 or more"),
        (lambda: Weights(torch.tensor([[math.nan]])), "not a number"),
        (lambda: Weights(torch.ones(3)), "matrix"),
        (lambda: LabelOverlap(torch.ones(3)), "matrix"),
        (lambda: SameClass(torch.ones(3)), "whole number"),
        (lambda: DenseMask(torch.ones(2, 2)), "Boolean"),
        (lambda: SimilarityMask(torch.ones(2, 2), 95), "cosine"),
        (lambda: DuplicateMask(torch.ones(2, 2)), "one for each row"),
        (lambda: info_nce(draw(3, 2), draw(3, 2), tile=(0, 2)), "tile"),
        (lambda: info_nce(draw(3, 2), draw(3, 2), rows=slice(0, 3, 2)), "without steps"),
        (lambda: info_nce(draw(3, 2), draw(3, 2), rows=slice(2, 2)), "at least one row"),
        (lambda: info_nce(draw(3, 2), draw(3, 2), scale=torch.ones(2)), "one number"),
        (lambda: info_nce(draw(3, 2), draw(3, 2), scale=math.nan), "finite number above 0"),
        (lambda: info_nce(draw(3, 2).long(), draw(3, 2)), "floating point"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(NearfarError, match=message):
        call()


# -- what every loss inherits -----------------------------------------------------------------------------------

M = 12
CLASS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 3, 4])
CODES = (draw(M, 4, seed=11) * 1.5).round().long().clamp(-1, 1)
INDEX = torch.tensor(
    [[1, 4], [0, -1], [3, 3], [-1, -1], [5, 0], [4, 6], [7, 8], [6, -1], [9, 2], [8, -1], [11, 10], [0, 1]]
)
ALPHA = draw(M, 2, seed=12).abs().float()
SCORES = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.2, 0.95, 0.3, 0.6, 0.05, 0.8, 0.4, 0.55])
MORE, OTHERS, MINED = draw(5, 6, seed=13).float(), draw(7, 6, seed=14).float(), draw(M, 3, 6, seed=15).float()
MASK = draw(M, M, seed=16) < -0.5

CALLS = {
    "info_nce": lambda a, b, **k: info_nce(a, b, temperature=0.2, **k),
    "info_nce, one way": lambda a, b, **k: info_nce(a, b, temperature=0.2, symmetric=False, **k),
    "info_nce, masked, steep": lambda a, b, **k: info_nce(a, b, temperature=0.005, mask=MASK, **k),
    "info_nce, negatives": lambda a, b, **k: info_nce(a, b, temperature=0.2, negatives=(MORE, MINED), **k),
    "clip": lambda a, b, **k: clip(a, b, torch.tensor(14.0), max_scale=10.0, **k),
    "supcon": lambda a, b, **k: supcon(a + 0 * b, CLASS, temperature=0.2, **k),
    "supcon, inside": lambda a, b, **k: supcon(a + 0 * b, CLASS, temperature=0.2, sum="inside", **k),
    "supcon, masked": lambda a, b, **k: supcon(a + 0 * b, CLASS, temperature=0.2, mask=MASK, **k),
    "supcon, two views": lambda a, b, **k: supcon(a, CLASS, temperature=0.2, other=b, own_pair=False, **k),
    "supcon, memory": lambda a, b, **k: supcon(
        a + 0 * b, CLASS, temperature=0.2, memory=OTHERS, memory_labels=torch.arange(7) % 5, **k
    ),
    "overlap": lambda a, b, **k: multi_label_supcon(a + 0 * b, CODES.clamp(min=0), temperature=0.2, **k),
    "legacy": lambda a, b, **k: multi_label_supcon(a + 0 * b, CODES, temperature=0.2, weights="legacy", **k),
    "spatial": lambda a, b, **k: spatial(a, b, 5.0, INDEX, ALPHA, **k),
    "spatial, rows": lambda a, b, **k: spatial(a, b, 5.0, INDEX, ALPHA, temp_reg_weight=0.0, **k),
    "spatial, masked": lambda a, b, **k: spatial(a, b, 90.0, INDEX, ALPHA, neighbors="mask", **k),
    "siglip": lambda a, b, **k: siglip(a, b, 5.0, -2.0, **k),
    "siglip, masked": lambda a, b, **k: siglip(a, b, 5.0, -2.0, mask=MASK, **k),
    "scores": lambda a, b, **k: adaptive_score_contrastive(a + 0 * b, SCORES, temperature=0.2, **k),
    "scores, both": lambda a, b, **k: bidirectional_score_contrastive(
        a + 0 * b, SCORES, temperature=0.2, middle="negatives", **k
    ),
}  # fmt: skip
IN_PARTS = [
    name for name in CALLS if name not in ("clip", "spatial", "spatial, masked", "scores", "scores, both")
]
every_loss = pytest.mark.parametrize("name", CALLS)


def views(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    a = draw(M, 6, seed=20)
    b = draw(M, 6, seed=21) + a
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def gradients(name: str, a: Tensor, b: Tensor, **options: object) -> tuple[Tensor, list[Tensor]]:
    value = CALLS[name](a, b, **options)
    return value, list(torch.autograd.grad(value, (a, b)))


# (PyTorch's own backward of the einsum of mined negatives is in half precision under autocast.)
@pytest.mark.parametrize("name", [name for name in CALLS if name != "info_nce, negatives"])
def test_autocast_is_left_aside_forward_and_backward(name):
    exact, wanted = gradients(name, *views())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, found = gradients(name, *views())
    assert value.item() == exact.item()
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@every_loss
def test_without_a_graph_the_value_is_the_same(name):
    a, b = views()
    value = CALLS[name](a, b)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            again = CALLS[name](a, b)
        assert again.item() == value.item()
        assert not again.requires_grad
    assert CALLS[name](a.detach(), b.detach()).item() == value.item()


@every_loss
@pytest.mark.parametrize("normalize", [True, False])
def test_what_comes_out_is_anybodys(name, normalize):
    # Small batches are computed in inference mode, whose tensors take no part in a graph and cannot be changed.
    a, b = (x.detach().mul_(0.3).requires_grad_() for x in views())
    log_scale = torch.tensor(1.0, requires_grad=True)
    value = CALLS[name](a, b, **({} if normalize or name.startswith("scores") else {"normalize": False}))
    total = value * log_scale + info_nce(a, b, scale=log_scale.exp(), normalize=normalize)
    total = total + siglip(a, b, log_scale.exp(), log_scale - 3.0, normalize=normalize)
    total.backward()
    for x in (value, a.grad, b.grad, log_scale.grad):
        assert not x.is_inference()
    torch.nn.utils.clip_grad_norm_([a, b, log_scale], 0.1)
    torch.optim.SGD([a, b, log_scale], lr=0.1, momentum=0.9).step()


@every_loss
def test_a_value_that_nobody_uses_moves_nothing(name):
    a, b = views()
    value = CALLS[name](a, b)
    nothing = torch._C._functions.UndefinedGrad()(value)
    for found in torch.autograd.grad(nothing, (a, b), torch.tensor(1.0), allow_unused=True):
        assert found is None or not found.any()


@every_loss
def test_a_gradient_for_one_side_only(name):
    a, b = views()
    _, (by_a, by_b) = gradients(name, a, b)
    for one, other, wanted in ((a, b, by_a), (b, a, by_b)):
        value = CALLS[name](*((one, other.detach()) if one is a else (other.detach(), one)))
        assert torch.allclose(torch.autograd.grad(value, one)[0], wanted, rtol=1e-5, atol=1e-8)


@every_loss
def test_inputs_are_left_alone_and_may_lie_anywhere(name):
    a, b = views()
    value, wanted = gradients(name, a, b)
    strange = [torch.stack([x.detach().T, x.detach().T], 2)[..., 1].T.requires_grad_() for x in (a, b)]
    assert not strange[0].is_contiguous()
    before = [x.detach().clone() for x in strange]
    again, found = gradients(name, *strange)
    assert again.item() == pytest.approx(value.item(), rel=1e-6)
    for x, y, z, old in zip(found, wanted, strange, before, strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-7)
        assert torch.equal(z.detach(), old)


@every_loss
@pytest.mark.parametrize("tile", [None, (5, 7)])
def test_a_graph_can_be_gone_through_twice(name, tile):
    options = {} if tile is None or name in ("clip", "scores", "scores, both") else {"tile": tile}
    a, b = views()
    value = CALLS[name](a, b, **options)
    first = torch.autograd.grad(value, (a, b), retain_graph=True)
    CALLS[name](b, a, **options)  # another call between
    second = torch.autograd.grad(value, (a, b), grad_outputs=torch.tensor(3.0))
    for one, other in zip(first, second, strict=True):
        assert oracles.error(other, 3 * one.double()) < 1e-6


@every_loss
def test_a_second_derivative_is_an_error(name):
    a, b = views()
    with pytest.raises(NearfarError, match="first derivatives only"):
        torch.autograd.grad(CALLS[name](a, b), (a, b), create_graph=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
@every_loss
def test_other_precisions_are_computed_in_single(name, dtype, tolerance):
    a, b = views(dtype)
    value = CALLS[name](a, b)
    assert value.dtype == torch.float32
    u, v = oracles.double(a, b)
    oracles.agree(value, (a, b), CALLS[name](u, v), (u, v), tolerance)
    mixed = CALLS[name](a, b.detach().double())
    assert mixed.dtype == torch.float64
    assert mixed.item() == pytest.approx(CALLS[name](u, v).item(), rel=1e-5)


@every_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_named(name, bad):
    a, b = (x.detach() for x in views())
    a[7, 2] = bad
    with pytest.raises(NearfarError, match=r"(a|z|image) is not finite in 1 of 12 rows \(row 7\)"):
        CALLS[name](a, b)


@every_loss
def test_rows_of_zeros_and_of_any_length_stay_finite(name):
    a, b = (x.detach() for x in views())
    a[3], b[4], a[5], b[6] = 0.0, 0.0, a[5] * 1e-30, b[6] * 1e30
    value, found = gradients(name, a.requires_grad_(), b.requires_grad_())
    assert value.isfinite()
    assert all(x[:5].isfinite().all() for x in found)
    collapsed = torch.ones(M, 6, requires_grad=True)
    value, found = gradients(name, collapsed, torch.ones(M, 6, requires_grad=True))
    assert value.isfinite()
    assert all(x.isfinite().all() for x in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PARTS)
def test_parts_of_a_batch_add_up(name):
    value, wanted = gradients(name, *views())
    for tile in (None, (3, 5)):
        total, sums = 0.0, [torch.zeros(M, 6), torch.zeros(M, 6)]
        for rows in (slice(0, 5), slice(5, 6), slice(6, None)):
            part, found = gradients(name, *views(), rows=rows, tile=tile)
            total += part.item()
            sums = [x + y for x, y in zip(sums, found, strict=True)]
        assert total == pytest.approx(value.item(), rel=1e-5)
        assert all(oracles.error(x, y.double()) < 1e-5 for x, y in zip(sums, wanted, strict=True))


def compile_and_compare():
    a, b = views()
    layer = torch.nn.Linear(6, 6, bias=False)
    for name in ("info_nce", "supcon, two views", "spatial", "siglip", "scores, both"):

        def step(x, y, name=name):
            return CALLS[name](layer(x), torch.tanh(y)) * 2.0

        expected = torch.autograd.grad(step(a, b), (a, b, layer.weight))
        for backend in ("eager", "aot_eager"):
            torch.compiler.reset()
            compiled = torch.compile(step, backend=backend)
            for _ in range(2):
                found = torch.autograd.grad(compiled(a, b), (a, b, layer.weight))
            for x, y in zip(found, expected, strict=True):
                assert torch.allclose(x, y, rtol=1e-4, atol=1e-6)
    loss = torch.compile(InfoNCELoss(), backend="eager")
    assert loss(a, b).item() == InfoNCELoss()(a, b).item()


@pytest.mark.slow
def test_compiled_code_may_call_a_loss():
    assert together(compile_and_compare, world=1) == [
        None
    ]  # where no signature is checked while it is compiled


@pytest.mark.slow
def test_records_can_be_copied_and_hold_no_graph():
    a, b = views()
    for loss, inputs in (
        (InfoNCELoss(), (a, b)),
        (SupConLoss(), (a, CLASS)),
        (SpatialLoss(), (a, b, 5.0, INDEX, ALPHA)),
        (SigLipLoss(), (a, b, 5.0, -2.0)),
    ):
        assert loss.record is None
        loss(*inputs)
        assert copy.deepcopy(loss).record == pickle.loads(pickle.dumps(loss)).record == loss.record
        assert loss.state_dict() == {}


def test_a_batch_without_positives_warns_and_is_zero():
    for rows in (1, 4):
        z = draw(rows, 3).requires_grad_()
        with pytest.warns(NoPositivesWarning):
            value = supcon(z, torch.arange(rows))
        assert value.item() == 0.0
        assert (torch.autograd.grad(value, z)[0] == 0).all()


@pytest.mark.parametrize("tile", [None, (2, 3)])
def test_sparse_weights_with_an_own_weight_are_those_with_the_diagonal_listed(tile) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    index = torch.tensor([[1, 0], [1, -1], [5, 5], [-1, -1], [0, 2], [3, 4]])
    weight = torch.rand(6, 2, generator=generator, dtype=torch.float64)
    own = torch.arange(6).unsqueeze(1)
    listed = SparseWeights(torch.cat([own, index], 1), torch.cat([torch.full((6, 1), 0.7), weight], 1), 6)
    short = SparseWeights(index, weight, 6, own=0.7)
    torch.testing.assert_close(short.dense(a), listed.dense(a))
    for without_self in (False, True):
        assert torch.equal(short.has_positives(without_self), listed.has_positives(without_self))
    losses = [softmax_loss(a, b, torch.tensor(5.0), t, both=True, tile=tile)[0] for t in (short, listed)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(
        SparseWeights(index, weight, 6, most=1.0, own=0.7).dense(a),
        listed.dense(a).clamp(max=1.0),
    )
