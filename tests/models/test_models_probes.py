"""Nearest classes and the linear probe against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.models.probes import LinearProbe, nearest_classes, nearest_votes

sklearn = pytest.importorskip("sklearn")


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 12, generator=generator)
    codes = torch.randint(0, 6, (700,), generator=generator)
    rows = centres[codes] + 1.2 * torch.randn(700, 12, generator=generator)
    return rows[:500], codes[:500], rows[500:], codes[500:]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5, 10_000])
def test_neighbours_vote_as_in_a_loop(
    metric: str, k: int, data: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nearfar.models.probes._TILE", 7_000)
    train, codes, queries, _ = data
    predicted = nearest_classes(train, codes, queries, k, metric)  # type: ignore[arg-type]
    a, b = train.double().numpy(), queries.double().numpy()
    if metric == "cosine":
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    for query, guess in zip(b, predicted.tolist(), strict=True):
        order = np.argsort(((a - query) ** 2).sum(1))[:k]
        votes = np.bincount(codes.numpy()[order], minlength=6)
        best = np.flatnonzero(votes == votes.max())
        nearest = next(int(codes[i]) for i in order if codes[i] in best)
        assert guess == nearest if len(best) == 1 or k == 1 else guess in best


def test_the_nearest_decides_between_as_many_votes() -> None:
    train, codes = torch.tensor([[0.0], [1.0], [2.5], [4.0]]), torch.tensor([1, 0, 0, 1])
    assert nearest_classes(train, codes, torch.tensor([[-1.0], [5.0]]), 2, "euclidean").tolist() == [1, 1]


@pytest.mark.slow
def test_the_probe_is_scikit_learns(data: tuple) -> None:
    from sklearn.linear_model import LogisticRegression

    train, codes, queries, truth = data
    train = torch.cat([train, torch.full((500, 1), 3.0)], dim=1)  # a constant column says nothing
    queries = torch.cat([queries, torch.full((200, 1), 3.0)], dim=1)
    probe = LinearProbe(train, codes)
    mean, spread = train.mean(0), train.std(0, correction=0)
    spread[-1] = 1
    other = LogisticRegression(C=1.0, max_iter=2000, tol=1e-8).fit(
        ((train - mean) / spread).numpy(), codes.numpy()
    )
    weight = probe.weight - probe.weight.mean(0)  # the same up to what all classes have in common
    np.testing.assert_allclose(weight, other.coef_ - other.coef_.mean(0), atol=5e-3)
    expected = other.predict(((queries - mean) / spread).numpy())
    assert (probe.classes(queries).numpy() == expected).mean() > 0.99
    assert (probe.classes(queries) == truth).float().mean() > 0.6
    again = LinearProbe(train, codes)
    assert torch.equal(again.weight, probe.weight)
    with torch.inference_mode():  # where the embeddings of an evaluation come from
        assert torch.equal(LinearProbe(train.clone(), codes).weight, probe.weight)


def test_wrong_arguments(data: tuple) -> None:
    train, codes, queries, _ = data
    with pytest.raises(NearfarError, match="one length"):
        nearest_classes(train, codes, queries[:, :3])
    with pytest.raises(NearfarError, match="codes are"):
        nearest_classes(train, codes[:4], queries)
    with pytest.raises(NearfarError, match="codes are"):
        LinearProbe(train, codes - 1)
    with pytest.raises(NearfarError, match="k is 0"):
        nearest_classes(train, codes, queries, 0)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_votes_say_who_voted(metric: str, data: tuple) -> None:
    train, codes, queries, _ = data
    votes = nearest_votes(train, codes, queries, 7, metric)  # type: ignore[arg-type]
    assert torch.equal(votes.classes, nearest_classes(train, codes, queries, 7, metric))  # type: ignore[arg-type]
    for i in range(len(queries)):
        if metric == "cosine":
            every = torch.cosine_similarity(train, queries[i][None])
        else:
            every = -(train - queries[i]).norm(dim=1)
        torch.testing.assert_close(
            votes.similarities[i], every.sort(descending=True)[0][:7], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(every[votes.nearest[i]], votes.similarities[i], atol=1e-4, rtol=0)
        own = codes[votes.nearest[i]]
        assert votes.shares[i] == pytest.approx(float((own == votes.classes[i]).float().mean()))
    none = nearest_votes(train, codes, queries[:0], 7, metric)  # type: ignore[arg-type]
    assert none.nearest.shape == (0, 7)


def test_a_probe_is_the_same_from_its_arrays(data: tuple) -> None:
    train, codes, queries, _ = data
    probe = LinearProbe(train, codes)
    arrays = probe.to_arrays()
    again = LinearProbe.from_arrays(arrays)
    assert torch.equal(again.logits(queries), probe.logits(queries))
    assert torch.equal(again.classes(queries), probe.classes(queries))
    by_hand = (queries - probe.mean) / probe.spread @ probe.weight.T + probe.bias
    torch.testing.assert_close(probe.logits(queries), by_hand)
    for wrong, message in (
        ({"bias": arrays["bias"].astype(np.float64)}, "'bias' of a linear probe is missing, or no array"),
        ({"weight": arrays["weight"][:, 1:]}, "do not fit each other"),
        ({"mean": arrays["mean"][None]}, "do not fit each other"),
    ):
        with pytest.raises(NearfarError, match=message):
            LinearProbe.from_arrays(arrays | wrong)
    with pytest.raises(NearfarError, match="'spread' of a linear probe is missing"):
        LinearProbe.from_arrays({name: arrays[name] for name in ("mean", "weight", "bias")})
