"""Embedding health and batch signals against explicit float64 loops, numpy and scipy; extremes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from nearfar.contrast import DuplicateMask, SimilarityMask
from nearfar.errors import NearfarError
from nearfar.metrics import (
    alignment,
    batch_signals,
    effective_rank,
    embedding_health,
    group_signals,
    hubness,
    mean_cosine,
    modality_gap,
    uniformity,
    variance,
)

SHAPES = [(2, 3), (7, 3), (5, 40), (60, 8)]


def sample(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Anisotropic rows away from the origin."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) * (1 + np.arange(d)) ** -0.5 + 0.3


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def loop_rank(x: np.ndarray, center: bool) -> float:
    values = np.linalg.svd(x - x.mean(0) if center else x, compute_uv=False)
    p = [v / values.sum() for v in values if v > 1e-7 * values.max()]
    return math.exp(-sum(q * math.log(q) for q in p))


def loop_hubness(queries: np.ndarray, keys: np.ndarray, k: int) -> float:
    counts = np.zeros(len(keys))
    for query in unit(queries):
        for j in sorted(range(len(keys)), key=lambda j: -float(query @ unit(keys)[j]))[:k]:
            counts[j] += 1
    return float(scipy.stats.skew(counts))


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_single_view_equals_loops(n: int, d: int) -> None:
    x = sample(n, d)
    u = unit(x)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    assert effective_rank(x) == pytest.approx(loop_rank(x, True), rel=1e-6)
    assert effective_rank(x, center=False) == pytest.approx(loop_rank(x, False), rel=1e-6)
    assert variance(x) == pytest.approx(np.mean(np.var(u, axis=0)) * d, rel=1e-9)
    assert mean_cosine(x) == pytest.approx(np.mean([u[i] @ u[j] for i, j in pairs]), abs=1e-12)
    for t in (2.0, 0.5):
        mean = np.mean([math.exp(-t * np.sum((u[i] - u[j]) ** 2)) for i, j in pairs])
        assert uniformity(x, t) == pytest.approx(math.log(mean), rel=1e-9)
    assert uniformity(x) == pytest.approx(
        torch.pdist(torch.from_numpy(u)).pow(2).mul(-2).exp().mean().log().item(), rel=1e-9
    )


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_pair_equals_loops(n: int, d: int) -> None:
    x, y = sample(n, d), sample(n, d, seed=1)
    partners = [np.linalg.norm(a - b) for a, b in zip(unit(x), unit(y), strict=True)]
    assert alignment(x, y) == pytest.approx(np.mean(np.square(partners)), rel=1e-9)
    assert alignment(x, y, alpha=1) == pytest.approx(np.mean(partners), rel=1e-9)
    assert modality_gap(x, y) == pytest.approx(np.linalg.norm(unit(x).mean(0) - unit(y).mean(0)), rel=1e-9)


@pytest.mark.parametrize(("n", "m", "k"), [(30, 50, 10), (50, 30, 3), (9, 12, 1)])
def test_hubness_equals_a_loop(n: int, m: int, k: int) -> None:
    queries, keys = sample(n, 6), sample(m, 6, seed=1)
    assert hubness(queries, keys, k) == pytest.approx(loop_hubness(queries, keys, k), rel=1e-9)


def test_a_hub_is_seen() -> None:
    rng = np.random.default_rng(0)
    queries, keys = rng.standard_normal((200, 30)), rng.standard_normal((200, 30))
    plain = hubness(queries, keys)
    keys[0] = queries.mean(0)  # near to everyone
    queries += 2 * queries.mean(0)
    assert hubness(queries + 3 * keys[0] / np.linalg.norm(keys[0]), keys) > plain + 1


def test_ties_share_the_last_places() -> None:
    # Two equal keys for one place: each is found half a time by every query.
    keys = torch.eye(3)[[0, 0, 1, 2]]
    queries = torch.eye(3)[[0, 1, 2]]
    assert hubness(queries, keys, k=1) == pytest.approx(
        float(scipy.stats.skew([0.5, 0.5, 1.0, 1.0])), abs=1e-12
    )
    assert hubness(torch.randn(20, 4), torch.ones(15, 4), k=10) == 0.0


@pytest.mark.slow
def test_ranges_at_the_extremes() -> None:
    generator = torch.Generator().manual_seed(0)
    sphere = torch.randn(4000, 32, generator=generator)
    assert variance(sphere) == pytest.approx(1, abs=0.01)
    assert uniformity(sphere) == pytest.approx(-4 + 2 * 4 / 32, abs=0.1)  # second order of exp(4 x·y)
    assert effective_rank(sphere) == pytest.approx(32, rel=0.01)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite) == pytest.approx(-8)
    assert mean_cosine(opposite) == -1.0
    assert alignment(opposite, opposite.flip(0)) == pytest.approx(4)
    assert modality_gap(opposite[:1], opposite[1:]) == pytest.approx(2)
    assert effective_rank(1e30 * sphere) == pytest.approx(effective_rank(sphere), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_collapse_in_every_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 16, generator=generator)
    same = row.expand(40, 16).to(dtype)
    health = embedding_health({"a": same, "b": same})
    assert health["a/effective_rank"] == 0.0
    assert health["a/variance"] == pytest.approx(0, abs=1e-12)
    assert health["a/mean_cosine"] == pytest.approx(1)
    assert health["a/uniformity"] == pytest.approx(0, abs=1e-12)
    assert health["hubness"] == 0.0
    assert health["alignment"] == health["modality_gap"] == 0.0
    # A line, rounded to this precision, is one direction and not many of rounding.
    line = (row + torch.linspace(-1, 1, 40)[:, None] * torch.randn(1, 16, generator=generator)).to(dtype)
    assert 1 <= effective_rank(line) < (1.5 if dtype != torch.bfloat16 else 2.5)


def test_half_precision_is_near_the_full_one() -> None:
    x = torch.from_numpy(sample(100, 12)).float()
    full, half = embedding_health({"v": x}), embedding_health({"v": x.half()})
    for name, value in full.items():
        assert half[name] == pytest.approx(value, rel=0.02), name


def test_health_of_views_has_the_documented_fields() -> None:
    x, y = torch.from_numpy(sample(30, 5)), torch.from_numpy(sample(30, 5, 1))
    health = embedding_health({"q": x, "k": y})
    own = {"effective_rank", "rank_limit", "dimensions", "variance", "uniformity", "mean_cosine"}
    assert health.keys() == {f"{v}/{name}" for v in "qk" for name in own} | {
        "alignment",
        "modality_gap",
        "hubness",
    }
    assert all(type(value) is float for value in health.values())
    assert (health["q/rank_limit"], health["q/dimensions"]) == (5.0, 5.0)
    assert health["q/effective_rank"] == pytest.approx(effective_rank(unit(x.numpy())))
    assert health["k/uniformity"] == pytest.approx(uniformity(y))
    assert health["hubness"] == pytest.approx(hubness(x, y))
    assert embedding_health({"q": x, "k": y}, pairs=[("k", "q")])["hubness"] == pytest.approx(hubness(y, x))
    assert "alignment" not in embedding_health({"q": x, "k": y}, pairs=[])
    three = embedding_health({"q": x, "k": y, "other": x[:, :2]})
    assert three["alignment"] == health["alignment"], "views of other length are no partners"
    many = embedding_health({"a": x, "b": y, "c": x})
    assert many["a-b/alignment"] == many["b-c/alignment"] == pytest.approx(health["alignment"])
    assert many["a-c/alignment"] == 0.0


def test_few_rows() -> None:
    one = embedding_health({"a": torch.ones(1, 4), "b": torch.ones(1, 4)})
    assert one["a/effective_rank"] == one["a/rank_limit"] == one["a/variance"] == 0.0
    assert "a/uniformity" not in one
    assert "hubness" not in one
    assert one["alignment"] == 0.0
    for function in (uniformity, mean_cosine):
        with pytest.raises(NearfarError, match="one row"):
            function(torch.ones(1, 4))
    zeros = embedding_health({"a": torch.zeros(20, 4)})
    assert (zeros["a/effective_rank"], zeros["a/variance"], zeros["a/mean_cosine"]) == (0.0, 0.0, 0.0)
    wide = embedding_health({"a": torch.randn(5, 100, generator=torch.Generator().manual_seed(1))})
    assert wide["a/rank_limit"] == 4.0
    assert 3.5 < wide["a/effective_rank"] <= 4 + 1e-9
    assert hubness(torch.eye(4), torch.eye(4), k=4) == hubness(torch.eye(4), torch.eye(4), k=9) == 0.0
    assert "hubness" not in embedding_health({"a": torch.eye(10), "b": torch.eye(10)})


@pytest.mark.slow
def test_more_rows_than_a_tile() -> None:
    x, y = sample(1500, 3), sample(1500, 3, 1)
    u, v = unit(x), unit(y)
    distances = np.exp(-2 * ((u[:, None] - u[None]) ** 2).sum(2))
    expected = math.log((distances.sum() - np.trace(distances)) / (1500 * 1499))
    assert uniformity(x) == pytest.approx(expected, rel=1e-9)
    counts = np.bincount(np.argsort(-(u @ v.T), axis=1)[:, :10].ravel(), minlength=1500)
    assert hubness(x, y) == pytest.approx(float(scipy.stats.skew(counts)), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: effective_rank(torch.ones(4)), "matrix"),
        (lambda: variance(torch.ones(4, 2, dtype=torch.int64)), "floating"),
        (lambda: variance(torch.ones(0, 2)), "matrix"),
        (
            lambda: embedding_health({"texts": torch.tensor([[1.0, math.nan]])}),
            "texts are not finite in 1 of 1",
        ),
        (lambda: embedding_health({"a": torch.ones(2, 2)}, pairs=[("a", "b")]), "'b'; there are a"),
        (lambda: alignment(torch.ones(2, 2), torch.ones(3, 2)), "partners"),
        (lambda: modality_gap(torch.ones(2, 2), torch.ones(2, 3)), "one space"),
        (lambda: hubness(torch.ones(2, 2), torch.ones(2, 3)), "one space"),
        (lambda: hubness(torch.ones(2, 2), torch.ones(2, 2), k=0), "whole number"),
        (lambda: uniformity(torch.ones(2, 2), t=0), "above 0"),
    ],
)
def test_bad_input_is_named(call: Any, words: str) -> None:
    with pytest.raises(NearfarError, match=words):
        call()


# -- batches -------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("masked", ["nothing", "copies", "some"])
def test_batch_signals_equal_a_loop(masked: str) -> None:
    n = 1100  # more than a tile
    generator = torch.Generator().manual_seed(0)
    structure = torch.randint(900, (n,), generator=generator)
    text = torch.randint(700, (n,), generator=generator)
    reference = torch.randn(n, 3, generator=generator)
    copies = DuplicateMask(structure) | DuplicateMask(text)
    likely = SimilarityMask(reference, 0.9)
    some = torch.rand(n, n, generator=generator) < 0.4
    left_out: Any = {"nothing": None, "copies": copies, "some": some}[masked]
    found = batch_signals(copies, likely, left_out)

    same = (structure[:, None] == structure) | (text[:, None] == text)
    unit_rows = torch.nn.functional.normalize(reference.double(), dim=1)
    near = unit_rows @ unit_rows.T >= 0.9 - 1e-6
    out = {"nothing": torch.zeros(n, n, dtype=torch.bool), "copies": same, "some": some}[masked]
    negative = ~(out | torch.eye(n, dtype=torch.bool))
    assert found["duplicate_keys"] == pytest.approx(
        (same & negative).any(1).double().mean().item(), rel=1e-12
    )
    assert found["false_negative_share"] == pytest.approx(near[negative].double().mean().item(), rel=1e-4)
    assert (found["duplicate_keys"] == 0) == (masked == "copies")


def test_batch_signals_at_the_ends() -> None:
    assert batch_signals() == {}
    everything = torch.ones(3, 3, dtype=torch.bool)
    assert batch_signals(everything, everything) == {"duplicate_keys": 1.0, "false_negative_share": 1.0}
    assert batch_signals(everything, everything, everything) == {
        "duplicate_keys": 0.0,
        "false_negative_share": 0.0,
    }
    assert batch_signals(DuplicateMask(torch.tensor([5]))) == {"duplicate_keys": 0.0}
    # Further keys after the partners: a copy there is one too.
    keys = DuplicateMask(torch.tensor([1, 2]), torch.tensor([1, 2, 2]))
    assert batch_signals(keys) == {"duplicate_keys": 0.5}
    with pytest.raises(NearfarError, match="one batch"):
        batch_signals(everything, left_out=torch.ones(2, 2, dtype=torch.bool))


def test_group_signals_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    names = [("woman", "man", "unknown")[i] for i in rng.integers(0, 3, 50)]
    scores, features = rng.random(50), rng.standard_normal((50, 4)) + 1
    anchors = rng.random(50) < 0.3
    found = group_signals(names, torch.from_numpy(scores), torch.from_numpy(anchors), features)
    means = {}
    for name in set(names):
        rows = [i for i in range(50) if names[i] == name]
        assert found[f"group_share/{name}"] == pytest.approx(len(rows) / 50)
        assert found[f"score/{name}"] == pytest.approx(np.mean(scores[rows]))
        chosen = [i for i in rows if anchors[i]]
        assert found[f"anchor_share/{name}"] == pytest.approx(len(chosen) / anchors.sum())
        means[name] = unit(features)[rows].mean(0)
    gap = max(np.linalg.norm(a - b) for a in means.values() for b in means.values())
    assert found["feature_gap"] == pytest.approx(gap)
    assert len(found) == 10
    by_position = group_signals(names, anchors=np.flatnonzero(anchors))
    assert by_position["anchor_share/man"] == found["anchor_share/man"]


def test_group_signals_at_the_ends() -> None:
    assert group_signals(torch.tensor([1, 1])) == {"group_share/1": 1.0}
    without = group_signals([0, 1], anchors=torch.zeros(2, dtype=torch.bool), features=torch.eye(2))
    assert not any(name.startswith("anchor_share") for name in without)
    assert group_signals([0, 1], anchors=torch.tensor([])) == {"group_share/0": 0.5, "group_share/1": 0.5}
    assert "feature_gap" not in group_signals([0, 0], features=torch.eye(2))
    for arguments, words in (
        (([],), "at least one"),
        (([0, 1], torch.ones(3)), "scores"),
        (([0, 1], None, torch.tensor([2])), "anchors"),
        (([0, 1], None, torch.tensor([0.5])), "anchors"),
        (([0, 1], None, None, torch.ones(3, 2)), "features"),
        ((torch.ones(2, 2),), "one name or number"),
    ):
        with pytest.raises(NearfarError, match=words):
            group_signals(*arguments)  # type: ignore[arg-type]
