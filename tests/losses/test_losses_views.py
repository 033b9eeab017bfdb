"""ViewLoss against explicit loops in float64: pairs of views, missing views, masks by content, memory, negatives."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from nearfar.contrast import NoPositivesWarning
from nearfar.errors import NearfarError
from nearfar.functional import distillation, info_nce, margin_mse
from nearfar.losses import ViewContext, ViewLoss
from nearfar.losses.views import view_pairs
from nearfar.models.views import ViewMemory


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def one_way(
    a: Tensor,
    b: Tensor,
    scale: float,
    left_out: set[tuple[int, int]] = frozenset(),  # type: ignore[assignment]
    further: list[list[Tensor]] | None = None,
) -> float:
    """InfoNCE of queries ``a``: mean of log Σ exp − own, without pairs that are left out, with further candidates."""
    total = 0.0
    for i in range(len(a)):
        scores = [scale * cosine(a[i], b[j]) for j in range(len(b)) if (i, j) not in left_out or i == j]
        if further is not None:
            scores += [scale * cosine(a[i], row) for row in further[i]]
        total += math.log(sum(math.exp(s) for s in scores)) - scale * cosine(a[i], b[i])
    return total / len(a)


def both(a: Tensor, b: Tensor, scale: float, left_out: set[tuple[int, int]] | None = None) -> float:
    out = left_out or set()
    return (one_way(a, b, scale, out) + one_way(b, a, scale, {(j, i) for i, j in out})) / 2


@pytest.mark.parametrize("anchor", [None, "b"])
def test_every_two_views_or_an_anchor_with_each(anchor: str | None) -> None:
    views = {name: draw(5, 3, seed=seed) for seed, name in enumerate("abc")}
    loss = ViewLoss(temperature=0.5, anchor=anchor)
    pairs = list(combinations("abc", 2)) if anchor is None else [("b", "a"), ("b", "c")]
    expected = sum(both(views[x], views[y], 2.0) for x, y in pairs) / len(pairs)
    assert float(loss(views)) == pytest.approx(expected, rel=1e-9)
    record = loss.record()
    assert record["terms"] == len(pairs)
    assert record["rows_contrasted"] == 5 * len(pairs)
    for x, y in pairs:
        assert record[f"{x}-{y}/loss"] == pytest.approx(both(views[x], views[y], 2.0), rel=1e-9)


def test_rows_without_a_view_are_left_out_and_terms_weigh_their_rows() -> None:
    views = {name: draw(6, 4, seed=seed) for seed, name in enumerate("abc")}
    present = torch.tensor([True, False, True, True, False, True])
    context = ViewContext(present={"c": present})
    value = float(ViewLoss(temperature=1.0)(views, context))
    kept = present.nonzero()[:, 0]
    part = {name: rows[kept] for name, rows in views.items()}
    expected = (
        6 * both(views["a"], views["b"], 1.0)
        + 4 * both(part["a"], part["c"], 1.0)
        + 4 * both(part["b"], part["c"], 1.0)
    ) / 14
    assert value == pytest.approx(expected, rel=1e-9)


def test_pairs_of_views_may_be_listed_and_a_batch_may_lack_some() -> None:
    """As a view that training batches alone have; the first of a pair asks where one direction is wanted."""
    pairs = [("c", "a"), ("a", "b"), ("a", "moved"), ("x", "y")]
    views = {name: draw(4, 3, seed=seed) for seed, name in enumerate("abc")}
    loss = ViewLoss(temperature=0.5, symmetric=False, pairs=pairs)
    expected = (one_way(views["c"], views["a"], 2.0) + one_way(views["a"], views["b"], 2.0)) / 2
    assert float(loss(views)) == pytest.approx(expected, rel=1e-9)
    assert loss.pairs_of(["moved", "a"]) == [("a", "moved")]
    views["moved"] = draw(4, 3, seed=9)
    present = {"moved": torch.tensor([True, False, True, False])}
    expected = (expected * 8 + one_way(views["a"][[0, 2]], views["moved"][[0, 2]], 2.0) * 2) / 10
    assert float(loss(views, ViewContext(present=present))) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(NearfarError, match="anchor and pairs"):
        ViewLoss(anchor="a", pairs=pairs)


def test_a_view_that_the_memory_does_not_keep_is_contrasted_within_the_batch() -> None:
    views = {"a": draw(3, 2).float(), "moved": draw(3, 2, seed=1).float()}
    memory = ViewMemory({"a": 2, "b": 2}, size=4)
    groups = {"a": torch.arange(2), "b": torch.arange(2)}
    memory.push({"a": torch.eye(2), "b": torch.eye(2)}, groups)
    context = ViewContext({"a": torch.arange(3), "moved": torch.arange(3)})
    loss = ViewLoss(temperature=0.5, pairs=[("a", "moved")])
    assert float(loss(views, context, memory=memory)) == float(loss(views, context))


def test_views_whose_groups_are_one_tensor_have_one_mask() -> None:
    group = torch.tensor([0, 0, 1])
    shared = ViewContext(dict.fromkeys("ab", group))
    assert len(shared.same_content("a", "b")) == 1
    assert len(shared.rows(torch.tensor([0, 1])).same_content("a", "b")) == 1
    assert len(ViewContext({"a": group, "b": group.clone()}).same_content("a", "b")) == 2
    views = {"a": draw(3, 2), "b": draw(3, 2, seed=1)}
    expected = both(views["a"], views["b"], 2.0, {(0, 1), (1, 0)})
    assert float(ViewLoss(temperature=0.5)(views, shared)) == pytest.approx(expected, rel=1e-9)


def test_equal_values_are_no_negatives_of_each_other() -> None:
    a, b = draw(4, 3), draw(4, 3, seed=1)
    groups = {"a": torch.tensor([7, 1, 7, -1]), "b": torch.tensor([0, 1, 2, -1])}
    loss = ViewLoss(temperature=0.5)
    value = float(loss({"a": a, "b": b}, ViewContext(groups)))
    assert value == pytest.approx(both(a, b, 2.0, {(0, 2), (2, 0)}), rel=1e-9)
    kept = float(loss({"a": a, "b": b}, ViewContext(groups, mask_duplicates=False)))
    assert kept == pytest.approx(both(a, b, 2.0), rel=1e-9)


def test_likely_false_negatives_are_told_by_the_reference() -> None:
    a, b = draw(3, 3), draw(3, 3, seed=1)
    reference = torch.tensor([[1.0, 0.0], [0.99, 0.01], [0.0, 1.0]], dtype=torch.float64)
    value = float(
        ViewLoss(temperature=0.5)({"a": a, "b": b}, ViewContext(reference=reference, threshold=0.9))
    )
    assert value == pytest.approx(both(a, b, 2.0, {(0, 1), (1, 0)}), rel=1e-9)


def test_mined_negatives_of_each_row_join_the_candidates_of_its_query() -> None:
    a, b, wrong = draw(4, 3), draw(4, 3, seed=1), draw(4, 2, 3, seed=2)
    value = float(ViewLoss(temperature=0.5)({"a": a, "b": b}, ViewContext(negatives={"b": wrong})))
    forward = one_way(a, b, 2.0, further=[list(rows) for rows in wrong])
    assert value == pytest.approx((forward + one_way(b, a, 2.0)) / 2, rel=1e-9)


def test_a_memory_adds_earlier_items_except_those_of_the_same_value() -> None:
    a, b = draw(3, 2).float(), draw(3, 2, seed=1).float()
    old = {"a": draw(3, 2, seed=2).float(), "b": draw(3, 2, seed=3).float()}
    memory = ViewMemory({"a": 2, "b": 2}, size=8)
    memory.push(old, {"a": torch.tensor([10, 11, 12]), "b": torch.tensor([20, 21, 22])})
    groups = {"a": torch.tensor([10, 1, 2]), "b": torch.tensor([3, 22, 5])}
    value = float(ViewLoss(temperature=0.5)({"a": a, "b": b}, ViewContext(groups), memory=memory))
    allowed = [[1, 2], [0, 1], [0, 1, 2]]  # row 0 shares a value with item 0, row 1 with item 2
    forward = one_way(a, b, 2.0, further=[[old["b"][j] for j in rows] for rows in allowed])
    backward = one_way(b, a, 2.0, further=[[old["a"][j] for j in rows] for rows in allowed])
    assert value == pytest.approx((forward + backward) / 2, rel=1e-5)


def test_a_memory_without_masks_leaves_out_the_item_itself_alone() -> None:
    a, b = draw(2, 2).float(), draw(2, 2, seed=1).float()
    memory = ViewMemory({"a": 2, "b": 2}, size=4)
    old = {"a": draw(2, 2, seed=2).float(), "b": draw(2, 2, seed=3).float()}
    memory.push(old, {"a": torch.tensor([0, 1]), "b": torch.tensor([0, 1])})
    groups = {"a": torch.tensor([0, 1]), "b": torch.tensor([0, 0])}
    context = ViewContext(groups, mask_duplicates=False)
    value = float(ViewLoss(temperature=0.5)({"a": a, "b": b}, context, memory=memory))
    allowed = [[1], [0, 1]]  # row 0 is item 0; row 1 (values 1 and 0) is neither
    forward = one_way(a, b, 2.0, further=[[old["b"][j] for j in rows] for rows in allowed])
    backward = one_way(b, a, 2.0, further=[[old["a"][j] for j in rows] for rows in allowed])
    assert value == pytest.approx((forward + backward) / 2, rel=1e-5)


def test_siglip_asks_of_every_pair() -> None:
    a, b = draw(4, 3), draw(4, 3, seed=1)
    value = float(ViewLoss("siglip", temperature=0.1)({"a": a, "b": b}, bias=-2.0))
    expected = sum(
        math.log1p(math.exp(-(1 if i == j else -1) * (10 * cosine(a[i], b[j]) - 2.0)))
        for i in range(4)
        for j in range(4)
    )
    assert value == pytest.approx(expected / 4, rel=1e-9)


def test_supcon_takes_rows_of_the_same_label_as_positives() -> None:
    a, b = draw(4, 3), draw(4, 3, seed=1)
    labels = [0, 1, 0, -1]
    value = float(ViewLoss("supcon", 0.5)({"a": a, "b": b}, ViewContext(labels=torch.tensor(labels))))
    expected = 0.0
    for x, y in ((a, b), (b, a)):
        for i in range(4):
            scores = [2.0 * cosine(x[i], y[j]) for j in range(4)]
            own = [j for j in range(4) if j == i or (labels[i] >= 0 and labels[j] == labels[i])]
            whole = math.log(sum(math.exp(s) for s in scores))
            expected += sum(whole - scores[j] for j in own) / len(own) / 8
    assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_gradients_reach_every_view_and_the_scale() -> None:
    views = {name: draw(4, 3, seed=seed).requires_grad_() for seed, name in enumerate("abc")}
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = ViewLoss()
    assert torch.autograd.gradcheck(
        lambda *rows: loss(dict(zip("abc", rows[:3], strict=True)), scale=rows[3]), (*views.values(), scale)
    )


def test_no_two_views_in_common_warns_and_teaches_nothing() -> None:
    views = {"a": draw(3, 2).requires_grad_(), "b": draw(3, 2, seed=1)}
    context = ViewContext(present={"b": torch.tensor([True, False, False])})
    with pytest.warns(NoPositivesWarning, match="no two rows of this batch have two views"):
        value = ViewLoss()(views, context)
    value.backward()
    assert float(value) == 0.0
    assert float(views["a"].grad.abs().sum()) == 0.0


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(NearfarError, match="did you mean 'infonce'"):
        ViewLoss("infoncee")  # type: ignore[arg-type]
    with pytest.raises(NearfarError, match="anchor=c is no view"):
        view_pairs(["a", "b"], "c")
    with pytest.raises(NearfarError, match="supcon needs labels"):
        ViewLoss("supcon")({"a": draw(2, 2), "b": draw(2, 2)})
    memory = ViewMemory({"a": 2, "b": 2}, size=4)
    groups = {"a": torch.tensor([0, 1]), "b": torch.tensor([0, 1])}
    memory.push({"a": torch.eye(2), "b": torch.eye(2)}, groups)
    context = ViewContext(groups, negatives={"b": torch.ones(2, 1, 2)})
    with pytest.raises(NearfarError, match="cannot be combined"):
        ViewLoss()({"a": torch.eye(2), "b": torch.eye(2)}, context, memory=memory)


# -- guides, terms, lengths ----------------------------------------------------------------------------------------


def judged(u: Tensor, v: Tensor, margin: float) -> set[tuple[int, int]]:
    """Pairs (query, key) that a guide scores as high as the query's own, less the margin."""
    n = len(u)
    return {(i, j) for i in range(n) for j in range(n) if cosine(u[i], v[j]) >= cosine(u[i], v[i]) - margin}


def test_a_guide_judges_each_direction_by_its_own_positives() -> None:
    views, guides = (
        {k: draw(7, 4, seed=i) for i, k in enumerate("ab")},
        {"a": draw(7, 3, seed=5), "b": draw(7, 3, seed=6)},
    )
    context = ViewContext(guides=guides, guide_margin=0.3)
    forth, back = judged(guides["a"], guides["b"], 0.3), judged(guides["b"], guides["a"], 0.3)
    expected = (one_way(views["a"], views["b"], 2.0, forth) + one_way(views["b"], views["a"], 2.0, back)) / 2
    loss = ViewLoss(temperature=0.5)
    assert float(loss(views, context)) == pytest.approx(expected, rel=1e-6)
    kept = sum(len(out - {(i, i) for i in range(7)}) for out in (forth, back)) / 14
    assert loss.record()["masked_per_row"] == pytest.approx(kept)
    # Rows that lack a view take their guide with them.
    present = torch.tensor([True] * 5 + [False] * 2)
    partial = ViewContext(guides=guides, guide_margin=0.3, present={"b": present})
    five = ViewContext(guides={k: x[:5] for k, x in guides.items()}, guide_margin=0.3)
    assert float(loss(views, partial)) == pytest.approx(
        float(loss({k: x[:5] for k, x in views.items()}, five)), rel=1e-9
    )


def test_a_guide_judges_further_negatives() -> None:
    a, b, mined = draw(5, 4), draw(5, 4, seed=1), draw(5, 2, 4, seed=2)
    u, v, theirs = draw(5, 3, seed=3), draw(5, 3, seed=4), draw(5, 2, 3, seed=5)
    context = ViewContext(
        guides={"a": u, "b": v}, guide_margin=0.1, negatives={"b": mined}, negative_guides={"b": theirs}
    )
    left = [
        [row for k, row in enumerate(mined[i]) if cosine(u[i], theirs[i, k]) < cosine(u[i], v[i]) - 0.1]
        for i in range(5)
    ]
    forth = one_way(a, b, 2.0, judged(u, v, 0.1), left)
    back = one_way(b, a, 2.0, judged(v, u, 0.1))
    assert float(ViewLoss(temperature=0.5)({"a": a, "b": b}, context)) == pytest.approx(
        (forth + back) / 2, rel=1e-6
    )
    one = ViewLoss(temperature=0.5, symmetric=False)
    assert float(one({"a": a, "b": b}, context)) == pytest.approx(forth, rel=1e-6)


@pytest.mark.slow
def test_lengths_distillation_and_margins_are_terms() -> None:
    views = {k: draw(6, 8, seed=i) for i, k in enumerate("ab")}
    guides, mined, margins = (
        {k: draw(6, 3, seed=5 + i) for i, k in enumerate("ab")},
        draw(6, 2, 8, seed=9),
        draw(6, 2, seed=8),
    )
    context = ViewContext(guides=guides, negatives={"b": mined}, margins={"b": margins})
    loss = ViewLoss(
        temperature=0.5, dims=[4, 2], distill=0.5, teacher_temperature=0.2, margin=2.0, margin_scale=3.0
    )
    value = loss(views, context)
    plain = ViewLoss(temperature=0.5)
    parts = {}
    for length in (2, 4, 8):
        short = ViewContext(negatives={"b": mined[..., :length]})
        parts[length] = float(plain({k: x[:, :length] for k, x in views.items()}, short))
    taught = distillation(
        views["a"], views["b"], (guides["a"], guides["b"]), temperature=0.5, teacher_temperature=0.2
    )
    error = margin_mse(views["a"], views["b"], mined, margins, scale=3.0)
    assert float(value) == pytest.approx(
        sum(parts.values()) + 0.5 * float(taught) + 2.0 * float(error), rel=1e-9
    )
    record = loss.record()
    assert record["dim2/raw"] == pytest.approx(parts[2], rel=1e-9)
    assert record["contrastive/raw"] == pytest.approx(parts[8], rel=1e-9)
    assert record["distill/weighted"] == pytest.approx(0.5 * float(taught), rel=1e-9)
    assert record["margin/weight"] == 2.0
    assert record["candidates"] == 7  # of the whole embeddings: 6 + 2, and 6


@pytest.mark.slow
def test_lengths_with_a_memory() -> None:
    views = {k: draw(4, 6, seed=i).float() for i, k in enumerate("ab")}
    memory = ViewMemory({"a": 6, "b": 6}, size=3)
    groups = {"a": torch.tensor([7, 8, 9]), "b": torch.tensor([7, 8, 9])}
    memory.push({k: draw(3, 6, seed=4).float() for k in "ab"}, groups)
    context = ViewContext({k: torch.arange(4) for k in "ab"})
    loss = ViewLoss(dims=[3])
    value = loss(views, context, memory=memory)
    short = ViewMemory({"a": 3, "b": 3}, size=3)
    short.push({k: draw(3, 6, seed=4).float()[:, :3] for k in "ab"}, groups)
    plain = ViewLoss()
    expected = plain(views, context, memory=memory) + plain(
        {k: x[:, :3] for k, x in views.items()}, context, memory=short
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    context.guides, context.guide_margin = {k: draw(4, 2).float() for k in "ab"}, 0.0
    with pytest.raises(NearfarError, match="does not know the items of a memory"):
        loss(views, context, memory=memory)


def test_what_terms_need() -> None:
    views = {k: draw(4, 6, seed=i) for i, k in enumerate("ab")}
    with pytest.raises(NearfarError, match="guides of no view"):
        ViewLoss(distill=1.0)(views)
    with pytest.raises(NearfarError, match="length of 9"):
        ViewLoss(dims=[9])(views)
    with pytest.raises(NearfarError, match="of the loss infonce"):
        ViewLoss("siglip", tau_plus=0.1)
    hard = ViewLoss(temperature=0.5, tau_plus=0.1, beta=0.5)
    expected = info_nce(views["a"], views["b"], temperature=0.5, tau_plus=0.1, beta=0.5)
    assert float(hard(views)) == pytest.approx(float(expected), rel=1e-12)
