"""Nearest neighbours against an explicit float64 product; duplicates, bad input, the approximate index."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from nearfar.batching import Neighbors, nearest_neighbors
from nearfar.errors import NearfarError


def reference(x, k, metric="cosine"):
    x = np.asarray(x, np.float64)
    if metric == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    s = x @ x.T
    np.fill_diagonal(s, -np.inf)
    order = np.argpartition(-s, k - 1, axis=1)[:, :k]
    values = np.take_along_axis(s, order, 1)
    rank = np.argsort(-values, axis=1)
    return np.take_along_axis(order, rank, 1), np.take_along_axis(values, rank, 1)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize(("n", "d", "k"), [(2, 1, 1), (50, 3, 49), (700, 33, 20), (300, 8, 150)])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
def test_equals_the_full_product(metric, n, d, k, scale):
    x = scale * np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)
    near = nearest_neighbors(x, k, metric=metric)
    order, values = reference(x, k, metric)
    assert near.indices.shape == near.similarities.shape == (n, k)
    assert near.indices.dtype == np.int32
    assert near.similarities.dtype == np.float32
    tolerance = 2e-6 * max(1.0, float(np.abs(values).max()))
    assert np.abs(near.similarities - values).max() <= tolerance
    swapped = near.indices != order  # only ties may come in another order
    assert swapped.mean() < 0.02
    assert (near.indices != np.arange(n)[:, None]).all()
    assert all(len(set(row)) == k for row in near.indices)
    assert (near.exact, near.recall, near.k, near.n) == (True, 1.0, k, n)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_takes_tensors(kind):
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).to(kind).requires_grad_()
    near = nearest_neighbors(x, 3)
    assert np.array_equal(near.indices, nearest_neighbors(x.detach().float().numpy(), 3).indices)


@pytest.mark.parametrize("exact", [True, False])
def test_an_item_is_never_its_own_neighbour_among_duplicates(exact):
    x = np.repeat(np.random.default_rng(0).standard_normal((6, 4)), 100, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        near = nearest_neighbors(x, 7, exact=exact)  # fewer than there are duplicates
    assert (near.indices != np.arange(600)[:, None]).all()
    assert (near.indices // 100 == np.arange(600)[:, None] // 100).all()
    assert near.similarities == pytest.approx(1.0, abs=1e-5)
    assert near.similarities.max() <= 1.0
    assert all(len(set(row)) == 7 for row in near.indices)


@pytest.mark.slow
def test_approximate_measures_its_recall():
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((60, 16)), 100, 0) + 0.3 * rng.standard_normal((6000, 16))
    near = nearest_neighbors(x, 20, exact=False, min_recall=0.95)
    assert not near.exact
    assert near.index.startswith("IVF")
    assert near.recall >= 0.95
    assert near.queries > 0
    order, _ = reference(x, 20)
    true = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(near.indices, order, strict=True)])
    assert true == pytest.approx(near.recall, abs=0.01)
    again = nearest_neighbors(x, 20, exact=False, min_recall=0.95)
    assert np.array_equal(again.indices, near.indices)


@pytest.mark.slow
def test_goes_exact_and_says_so_where_an_index_does_not_help():
    x = np.random.default_rng(0).standard_normal((3000, 64))
    with pytest.warns(UserWarning, match="the search is exact"):
        near = nearest_neighbors(x, 10, exact=False)
    assert near.exact
    assert np.array_equal(near.indices, nearest_neighbors(x, 10).indices)


def test_bad_input_is_named():
    x = np.random.default_rng(0).standard_normal((10, 3))
    with pytest.raises(NearfarError, match="k=10 neighbours were asked for, but each of 10 items has only 9"):
        nearest_neighbors(x, 10)
    for k in (0, 2.0, True):
        with pytest.raises(NearfarError, match="whole number"):
            nearest_neighbors(x, k)
    for value in (np.nan, np.inf):
        bad = x.copy()
        bad[4, 1] = value
        with pytest.raises(NearfarError, match="1 of 10 embeddings are not finite, first row 4"):
            nearest_neighbors(bad, 2)
    zero = x.copy()
    zero[[2, 6]] = 0
    with pytest.raises(NearfarError, match="2 of 10 embeddings are all zero, first row 2"):
        nearest_neighbors(zero, 2)
    assert nearest_neighbors(zero, 2, metric="dot").n == 10
    with pytest.raises(NearfarError, match="did you mean 'cosine'"):
        nearest_neighbors(x, 2, metric="cosin")
    with pytest.raises(NearfarError, match="shape"):
        nearest_neighbors(x[0], 2)
    with pytest.raises(NearfarError, match="one id per item"):
        nearest_neighbors(x, 2, ids=["a"])


def test_a_list_of_other_items_is_refused():
    with pytest.raises(NearfarError, match="a different set of items"):
        Neighbors(np.array([[1], [2]]))
    with pytest.raises(NearfarError, match="item 1 is listed as its own"):
        Neighbors(np.array([[1], [1]]))
    with pytest.raises(NearfarError, match="whole numbers"):
        Neighbors(np.array([[1.0], [0.0]]))
    with pytest.raises(NearfarError, match="do not match"):
        Neighbors(np.array([[1], [0]]), np.ones((2, 2)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("recall", "0.9"), ("recall", 2.0), ("exact", "no"), ("queries", -1), ("metric", 3), ("index", 3)],
)
def test_what_is_said_of_a_list_is_of_the_right_kind(name: str, value: object) -> None:
    with pytest.raises(NearfarError, match=name):
        Neighbors(np.array([[1], [0]]), **{name: value})  # type: ignore[arg-type]
