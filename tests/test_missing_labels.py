"""A missing label is nobody's: read in every container, and the same in all losses, masks and memories."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import oracles
from nearfar.errors import NearfarError
from nearfar.functional import focal_loss, multi_label_supcon, supcon
from nearfar.labels import apart, is_missing, label_codes, label_tensor, whole_labels
from nearfar.losses import (
    AdaptiveScoreContrastiveLoss,
    ClipLoss,
    CrossBatchMemory,
    DuplicateMask,
    FocalLoss,
    InfoNCELoss,
    MultiLabelSupConLoss,
    NoNegativesWarning,
    SigLipLoss,
    SpatialLoss,
    SupConLoss,
    duplicate_mask,
)
from nearfar.losses.score_contrastive import split_scores

Z = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHER = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([0, -1, 0, 1, -1, 1, 2])
#: the same with a class of its own for each row that has none
ALONE = torch.tensor([0, 7, 0, 1, 8, 1, 2])

GIVEN: dict[str, Any] = {
    "numbers": LABELS.numpy(),
    "small numbers": LABELS.numpy().astype(np.int8),
    "floats": np.array([0, np.nan, 0, 1, np.nan, 1, 2], np.float32),
    "minus one as a float": LABELS.numpy().astype(np.float64),
    "a list": [0, None, 0, 1, -1, 1, 2],
    "a tuple with NaN": (0, float("nan"), 0, 1, float("nan"), 1, 2),
    "NumPy's numbers in a list": [np.int32(0), np.nan, np.int64(0), 1, None, np.uint8(1), 2],
    "texts": ["a", None, "a", "b", "", "b", "c"],
    "an array of texts": np.array(["a", "nan", "a", "b", "None", "b", "c"]),
    "objects": np.array(["a", np.nan, "a", "b", pd.NA, "b", "c"], object),
    "flags and gaps": [False, None, False, True, None, True, 2],
    "a column": pd.Series([0, None, 0, 1, None, 1, 2], index=[5] * 7),
    "a nullable column": pd.Series([0, None, 0, 1, None, 1, 2], dtype="Int64"),
    "a column of texts": pd.Series(["a", None, "a", "b", np.nan, "b", "c"]),
    "text type": pd.Series(["a", None, "a", "b", pd.NA, "b", "c"], dtype="string"),
    "categories": pd.Categorical(["a", None, "a", "b", None, "b", "c"]),
    "a column of categories": pd.Series(["a", None, "a", "b", None, "b", "c"], dtype="category"),
    "dates": pd.to_datetime(["2020", None, "2020", "2021", None, "2021", "2022"]),
    "masked": np.ma.masked_array([0, 5, 0, 1, 5, 1, 2], [0, 1, 0, 0, 1, 0, 0]),
    "a tensor": LABELS,
    "a floating tensor": torch.tensor([0, math.nan, 0, 1, math.nan, 1, 2], dtype=torch.bfloat16),
    "tensors in a list": [*map(torch.tensor, [0, -1, 0, 1, -1, 1, 2])],
}


@pytest.mark.parametrize("form", GIVEN)
def test_labels_of_every_container(form: str) -> None:
    codes, classes = label_codes(GIVEN[form])
    assert codes.tolist() == LABELS.tolist()
    assert codes.dtype == np.int64
    assert len(classes) == 3
    assert torch.equal(label_tensor(GIVEN[form]), LABELS)


def test_large_numbers_and_mixed_ones_stay_apart() -> None:
    assert label_codes([2**53, 2**53 + 1, None])[0].tolist() == [0, 1, -1]
    assert label_codes(np.array([2**63, 2**63 + 1], np.uint64))[0].tolist() == [0, 1]
    assert label_codes([2**70, None, 2**70])[0].tolist() == [0, -1, 0]
    assert label_codes(["1", 1, "a"])[0].tolist() == [0, 0, 1]
    assert label_codes([0.5, 0.25])[0].tolist() == [1, 0]
    assert label_codes(["-1", "none", "None"])[0].tolist() == [0, 1, -1]
    assert not is_missing(True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("text", "kinds is a str"),
        (None, "kinds is a NoneType"),
        ({1, 2}, "kinds is a set"),
        ([[1], [2, 3]], "position 0 holds a list"),
        (np.zeros((3, 2)), "not an array of shape"),
        (np.array([1, np.inf]), "not finite"),
        ([1.0, np.inf, None], "not finite"),
        (np.array([1j]), "kinds are complex"),
        (pd.DataFrame({"a": [1]}), "kinds is a table"),
        (3, "kinds is a int"),
    ],
)
def test_what_is_no_list_of_labels_is_named(given: Any, words: str) -> None:
    with pytest.raises(NearfarError, match=words):
        label_codes(given, "kinds")


def test_tensors_of_labels() -> None:
    assert whole_labels(LABELS.double()).tolist() == LABELS.tolist()
    assert whole_labels(LABELS.to(torch.int8)).dtype == torch.int64
    with pytest.raises(NearfarError, match=r"hold 0\.5"):
        whole_labels(LABELS + 0.5)
    codes = torch.cat([apart(LABELS), apart(LABELS, len(LABELS))])
    assert len(codes.unique()) == 3 + 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sum": "inside"},
        {"denominator": "own"},
        {"denominator": "negatives", "reduction": "sum"},
        {"rows": slice(1, 5)},
        {"tile": (3, 2)},
        {"other": OTHER},
        {"other": OTHER, "own_pair": False},
        {"memory": OTHER, "memory_labels": LABELS},
        {"memory": OTHER, "memory_labels": LABELS, "in_batch": False},
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float32])
def test_supcon_takes_rows_without_a_label_as_candidates_alone(options: Any, dtype: torch.dtype) -> None:
    theirs = {"memory_labels": ALONE + 100 * (ALONE > 6)} if "memory" in options else {}
    z, y = Z.clone().requires_grad_(), Z.clone().requires_grad_()
    given = options | ({"memory_labels": options["memory_labels"].to(dtype)} if theirs else {})
    value, wanted = supcon(z, LABELS.to(dtype), **given), supcon(y, ALONE, **options | theirs)
    assert value.item() == wanted.item()
    assert torch.equal(torch.autograd.grad(value, z)[0], torch.autograd.grad(wanted, y)[0])


def test_a_large_batch_in_the_order_of_its_labels() -> None:
    z = torch.randn(1200, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(1200) % 50 - 1
    alone = torch.where(labels < 0, 1000 + torch.arange(1200), labels)
    assert torch.allclose(supcon(z, labels), supcon(z, alone))


def test_such_rows_are_counted_as_rows_without_positives() -> None:
    loss = SupConLoss()
    loss(Z, LABELS)
    assert loss.record.rows_without_positives == 3  # two without a label, one alone in its class
    assert loss.record.candidates == 6


def test_entries_of_several_labels() -> None:
    hot = torch.tensor([[1, 1, 0], [1, -1, 0], [0, 1, 1], [-1, -1, -1], [1, 0, 1]])
    clean = hot.clamp(min=0)
    assert multi_label_supcon(Z[:5], hot).item() == multi_label_supcon(Z[:5], clean).item()
    floats = hot.float().masked_fill(hot < 0, math.nan)
    assert multi_label_supcon(Z[:5], floats).item() == multi_label_supcon(Z[:5], clean).item()
    loss = MultiLabelSupConLoss()
    loss(Z[:5], hot)
    assert loss.record.rows_without_positives == 1
    with pytest.raises(NearfarError, match="multi-hot"):
        multi_label_supcon(Z[:5], hot - (hot < 0).long())


@pytest.mark.parametrize("unknown", [[-1, -1], [-1, 2]])
def test_codes_of_several_aspects(unknown: list[int]) -> None:
    codes = torch.tensor([[1, 2], [1, 0], unknown, [0, 2], unknown])

    def weight(i: int, j: int) -> float:
        if codes[i].max() < 0 or codes[j].max() < 0:
            return 0.0
        same = [
            (a == b) * (1 + (a != 0))
            for a, b in zip(codes[i].tolist(), codes[j].tolist(), strict=True)
            if a >= 0 and b >= 0
        ]
        return sum(same) / 4 + 0.1

    unit = torch.nn.functional.normalize(Z[:5])
    wanted, rows = 0.0, 0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        score = (unit[i] @ unit[others].T) / 0.1
        weights = torch.tensor([weight(i, j) for j in others], dtype=torch.float64)
        if weights.sum() > 0:
            wanted += (torch.logsumexp(score, 0) - torch.logsumexp(score + weights.log(), 0)).item()
            rows += 1
    loss = MultiLabelSupConLoss(weights="legacy")
    assert loss(Z[:5], codes).item() == pytest.approx(wanted / rows, rel=1e-12)
    assert loss.record.rows_without_positives == 5 - rows


def test_focal_loss_leaves_them_out() -> None:
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    usual = LABELS.masked_fill(LABELS < 0, -100)
    wanted = focal_loss(logits, usual)
    assert focal_loss(logits, LABELS) == focal_loss(logits, LABELS.float()) == wanted
    assert focal_loss(logits, LABELS.float().masked_fill(LABELS < 0, math.nan)) == wanted
    loss = FocalLoss(ignore_index=2)
    loss(logits, LABELS)
    assert (loss.record.labels, loss.record.labels_left_out) == (4, 3)
    with pytest.raises(NearfarError, match="no class"):
        focal_loss(logits, LABELS - 1)


@pytest.mark.parametrize("middle", ["ignore", "negatives"])
def test_a_row_without_a_score_is_neither_anchor_nor_positive(middle: str) -> None:
    scores = torch.tensor([0.9, math.nan, 0.1, 0.8, math.nan, 0.2, 0.5])
    known = scores.isfinite()
    split = split_scores(scores)
    assert split.anchors.tolist() == [2, 5]
    assert split.positives.tolist() == [3, 0]
    assert sorted(split.middle.tolist()) == [1, 4, 6]
    loss = AdaptiveScoreContrastiveLoss(middle=middle)
    value = loss(Z, scores)
    assert loss.record.extra["scores_missing"] == 2
    assert loss.record.candidates == (3 if middle == "ignore" else 6)
    if middle == "ignore":
        assert value.item() == pytest.approx(loss(Z[known], scores[known]).item())
    with pytest.raises(NearfarError, match="scores are not finite in row 0"):
        loss(Z, scores.masked_fill(scores == scores[0], math.inf))


def test_padding_of_neighbours_weighs_nothing() -> None:
    index = torch.tensor([[1, -1]] * 7)
    alpha = torch.tensor([[0.5, math.nan]] * 7)
    loss = SpatialLoss()
    assert loss(Z, OTHER, 10.0, index, alpha) == loss(Z, OTHER, 10.0, index, alpha.nan_to_num(0.3))
    with pytest.raises(NearfarError, match="neighbor_alpha"):
        loss(Z, OTHER, 10.0, index, alpha.flip(1))


def test_masks_and_memories_take_no_two_of_them_as_equal() -> None:
    wanted = oracles.same_class(ALONE).bool()
    assert torch.equal(DuplicateMask(LABELS).tile(slice(0, 7), slice(0, 7)), wanted)
    assert torch.equal(duplicate_mask(LABELS), wanted.fill_diagonal_(False))
    keys = DuplicateMask(LABELS, LABELS.clone()).tile(slice(0, 7), slice(0, 7))
    assert not keys[[1, 4]].any()
    assert not keys[:, [1, 4]].any()
    memory = CrossBatchMemory(7, 4, ids=True)
    memory.push(Z.float(), LABELS)
    assert torch.equal(memory.same(LABELS), keys)


# -- rows without a negative -----------------------------------------------------------------------------------------

ALL = torch.ones(7, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    "call",
    [
        lambda loss, mask: loss[0](Z, OTHER, mask=mask),
        lambda loss, mask: loss[1](Z, OTHER, 10.0, mask),
        lambda loss, mask: loss[2](Z, OTHER, 10.0, mask=mask),
        lambda loss, mask: loss[3](Z, ALONE, other=OTHER, mask=mask),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_that_leaves_no_negative_is_counted_and_said_once(call: Any, dtype: torch.dtype) -> None:
    kinds = (InfoNCELoss(), ClipLoss(), SigLipLoss(), SupConLoss())
    mask = torch.zeros(7, 7, dtype=torch.bool)
    mask[2] = mask[:, 2] = True
    with pytest.warns(NoNegativesWarning, match="mask leaves 1 rows of a batch no negative"):
        call(kinds, mask)
    loss = next(kind for kind in kinds if kind.record is not None)
    assert loss.record.rows_without_negatives == 1
    call(kinds, ALL)  # said once; pytest would show a second one
    assert loss.record.rows_without_negatives == 7
    assert loss.record.to_dict()["rows_without_negatives"] == 7
    call(kinds, None)
    assert loss.record.rows_without_negatives == 0


def test_later_batches_are_looked_at_where_the_record_is_read() -> None:
    loss = InfoNCELoss()
    loss(Z, OTHER, mask=~ALL)
    loss(Z, OTHER, mask=ALL)
    with pytest.warns(NoNegativesWarning, match="7 rows"):
        _ = loss.record


@pytest.mark.parametrize(
    "mask",
    [
        ALL.float(),
        ALL.to(torch.uint8),
        ALL[:3],
        ALL.tolist(),
        ALL.numpy(),
        DuplicateMask(LABELS[:3]),
        torch.ones(7, dtype=torch.bool),
    ],
)
def test_masks_of_other_types_and_shapes_are_refused(mask: Any) -> None:
    for call in (
        lambda: InfoNCELoss()(Z, OTHER, mask=mask),
        lambda: SupConLoss()(Z, LABELS, mask=mask),
        lambda: SigLipLoss()(Z, OTHER, 10.0, mask=mask),
        lambda: ClipLoss()(Z, OTHER, 10.0, mask=mask),
    ):
        with pytest.raises(NearfarError, match="mask is"):
            call()


@pytest.mark.parametrize(
    "given", [np.array([[1, 0], [1, 1]]), [[1, 0], [1, 1]], pd.DataFrame([[1, 0], [1, 1]])]
)
def test_the_advice_for_labels_that_are_no_tensor_holds_for_several_labels_too(given: object) -> None:
    with pytest.raises(
        NearfarError, match=r"torch\..*tensor\(labels.*label_tensor.*whole data set"
    ) as raised:
        MultiLabelSupConLoss()(torch.ones(2, 3), given)  # type: ignore[arg-type]
    inner = given.to_numpy() if "labels.to_numpy()" in str(raised.value) else given  # type: ignore[attr-defined]
    assert MultiLabelSupConLoss()(torch.randn(2, 3), torch.tensor(inner)).ndim == 0
