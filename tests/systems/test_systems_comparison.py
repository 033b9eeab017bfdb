"""Comparisons of views against explicit loops: nearest items, ranks with ties, missing views, answers, galleries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nearfar.data.items import Items
from nearfar.errors import NearfarError
from nearfar.metrics import retrieval_metrics
from nearfar.systems.new_items import ViewComparison, nearest_keys


def drawn(n: int, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def items_of(prefix: str, n: int, lacking: dict[str, list[int]] | None = None, **columns: list) -> Items:
    lacking = lacking or {}
    views = {
        view: [None if i in lacking.get(view, ()) else f"{view}{i}" for i in range(n)]
        for view in ("text", "picture")
    }
    return Items([f"{prefix}{i}" for i in range(n)], views | columns, "table")


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def test_nearest_keys_against_a_loop() -> None:
    queries, keys = drawn(7), drawn(11, seed=1)
    cosines, at = nearest_keys(queries, keys, 4)
    for i in range(7):
        every = sorted(((cosine(queries[i], keys[j]), j) for j in range(11)), reverse=True)[:4]
        assert at[i].tolist() == [j for _, j in every]
        np.testing.assert_allclose(cosines[i], [value for value, _ in every], atol=1e-6)
    assert nearest_keys(queries, keys, 40)[1].shape == (7, 11)
    assert nearest_keys(queries, keys[:0], 3)[1].shape == (7, 0)


def test_items_of_a_file_with_each_other() -> None:
    n = 9
    outputs = {"text": drawn(n), "picture": drawn(n, seed=1)}
    lacking = {"text": [2], "picture": [5, 6]}
    items = items_of("a", n, lacking)
    comparison = ViewComparison([("text", "picture")], k=3)
    for rows in ([0, 1, 2, 3], [4, 5], [6, 7, 8]):  # in parts
        comparison.add({view: outputs[view][rows] for view in outputs}, items.take(rows))
    assert len(comparison) == n
    whole = comparison.of_all(0, n)
    halves = [comparison.of_all(0, 4), comparison.of_all(4, n)]
    for name, values in whole.items():
        if not name.endswith("/cosine"):  # which are rounded differently
            assert halves[0][name] + halves[1][name] == values
    both = [i for i in range(n) if i not in (2, 5, 6)]
    for query, key in (("text", "picture"), ("picture", "text")):
        keys = [j for j in range(n) if j not in lacking[key]]
        for i in range(n):
            near, rank = whole[f"{query}_to_{key}/nearest"][i], whole[f"{query}_to_{key}/rank"][i]
            if i in lacking[query]:
                assert near is rank is whole[f"{query}_to_{key}/cosine"][i] is None
                continue
            scores = {j: cosine(outputs[query][i], outputs[key][j]) for j in keys}
            assert near == [f"a{j}" for j in sorted(scores, key=scores.__getitem__, reverse=True)[:3]]
            if i in both:
                assert rank == 1 + sum(scores[j] > scores[i] for j in both)
                assert whole[f"{query}_to_{key}/MRR"][i] == pytest.approx(1 / rank)
                assert whole[f"{query}_to_{key}/R@1"][i] == (rank == 1)
            else:
                assert rank is None


@pytest.mark.slow
def test_means_are_the_metrics_with_ties_too() -> None:
    n = 12
    first, second = drawn(n), drawn(n, seed=1)
    first[3], second[7] = first[4], second[2]
    comparison = ViewComparison([("text", "picture")])
    comparison.add({"text": first, "picture": second}, items_of("a", n))
    columns = comparison.of_all(0, n)
    there, back = retrieval_metrics(first, second, both=True)
    for name, metrics in (("text_to_picture", there), ("picture_to_text", back)):
        for metric in ("R@1", "MRR"):
            assert np.mean(columns[f"{name}/{metric}"]) == metrics[metric].value
    assert any(rank != round(rank) for rank in columns["text_to_picture/rank"])  # a tie is shared


def test_answers_are_items_with_an_equal_value() -> None:
    n = 10
    outputs = {"text": drawn(n), "picture": drawn(n, seed=1)}
    topics = ["Sea", "sea ", "land", None, "land", "sky", "sky", "sea", None, "alone"]
    comparison = ViewComparison([("text", "picture")], answers="topic")
    comparison.add(outputs, items_of("a", n, topic=topics))
    columns = comparison.of_all(0, n)
    keys = [None if topic is None else topic.strip().casefold() for topic in topics]
    for i in range(n):
        rank = columns["text_to_picture/rank"][i]
        if keys[i] is None:
            assert rank is None
            continue
        scores = [cosine(outputs["text"][i], outputs["picture"][j]) for j in range(n)]
        best = max(score for j, score in enumerate(scores) if keys[j] == keys[i])
        assert rank == 1 + sum(score > best for j, score in enumerate(scores) if keys[j] != keys[i])


def test_a_gallery_of_other_items() -> None:
    gallery, new = {"text": drawn(8), "picture": drawn(8, seed=1)}, {"text": drawn(3, seed=2)}
    comparison = ViewComparison([("text", "picture")], k=2)
    comparison.add(gallery, items_of("g", 8))
    alone = Items(["n0", "n1", "g5"], {"text": ["x", "y", "z"]}, "new")
    columns = comparison.of_others(new, alone)
    assert set(columns) == {f"text_to_picture/{name}" for name in ("nearest", "cosine", "rank", "R@1", "MRR")}
    for i in range(3):
        scores = {j: cosine(new["text"][i], gallery["picture"][j]) for j in range(8)}
        order = sorted(scores, key=scores.__getitem__, reverse=True)
        assert columns["text_to_picture/nearest"][i] == [f"g{j}" for j in order[:2]]
    assert columns["text_to_picture/rank"] == [None, None, 1.0 + order.index(5)]  # the item of the same id
    strangers = comparison.of_others(new, Items(["a", "b", "c"], {"text": ["x", "y", "z"]}))
    assert set(strangers) == {"text_to_picture/nearest", "text_to_picture/cosine"}
    topics = ViewComparison([("text", "picture")], k=2, answers="topic")
    topics.add(gallery, items_of("g", 8, topic=["sea", "sky"] * 4))
    asked = topics.of_others(
        new, Items(["a", "b", "c"], {"text": ["x", "y", "z"], "topic": ["sky", "land", None]})
    )
    assert asked["text_to_picture/rank"][1:] == [None, None]
    scores_of = [cosine(new["text"][0], gallery["picture"][j]) for j in range(8)]
    best = max(scores_of[1::2])
    assert asked["text_to_picture/rank"][0] == 1 + sum(score > best for score in scores_of[0::2])


def test_what_cannot_be_compared_says_so() -> None:
    comparison = ViewComparison([("text", "picture")])
    comparison.add({"text": drawn(3)}, Items(["a", "b", "c"], {"text": ["x", "y", "z"]}))
    with pytest.raises(NearfarError, match=r"have one view alone.*--gallery FILE"):
        comparison.of_all(0, 3)
    with pytest.raises(
        NearfarError, match=r"no view that could be compared with what the gallery has \(text\)"
    ):
        comparison.of_others({"text": drawn(2)}, Items(["d", "e"], {"text": ["x", "y"]}, "new"))
    with pytest.raises(NearfarError, match="k=0"):
        ViewComparison([("text", "picture")], k=0)
