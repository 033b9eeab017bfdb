"""Numbers by retrieval and by ridge regression, against loops and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from nearfar.errors import NearfarError
from nearfar.models.probes import retrieved_expression, ridge_predictions

RNG = np.random.default_rng(0)


def test_retrieved_expression_against_a_loop() -> None:
    images, genes = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), torch.eye(20)[:, :5]
    genes = genes + 0.3 * torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    expression = RNG.random((20, 3))
    means = retrieved_expression(images, genes, expression, k=4)
    for row, image in zip(means, images.double().numpy(), strict=True):
        vectors = genes.double().numpy()
        cosine = vectors @ image / np.linalg.norm(vectors, axis=1) / np.linalg.norm(image)
        np.testing.assert_allclose(row, expression[np.argsort(-cosine)[:4]].mean(0))
    np.testing.assert_allclose(retrieved_expression(images, genes, expression, k=20)[0], expression.mean(0))
    with pytest.raises(NearfarError, match="retrieve=21: there are 20 training spots"):
        retrieved_expression(images, genes, expression, k=21)


def test_ridge_is_scikit_learns() -> None:
    x, y, new = RNG.standard_normal((40, 7)), RNG.standard_normal((40, 3)), RNG.standard_normal((5, 7))
    x[:, 3] = 2.0  # says nothing, and must not divide by 0
    new[:, 3] = 2.0
    mean, sd = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
    other = Ridge(alpha=2.0 * 40 / 100).fit((x - mean) / sd, y).predict((new - mean) / sd)
    np.testing.assert_allclose(ridge_predictions(x, y, new, penalty=2.0), other, rtol=1e-8)
