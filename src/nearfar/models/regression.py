"""Numbers of new items from training items: of the nearest by their embeddings, or by ridge regression."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.errors import NearfarError

__all__ = ["retrieved_expression", "ridge_predictions"]


def ridge_predictions(
    train: Float[np.ndarray, "n d"],
    values: Float[np.ndarray, "n g"],
    test: Float[np.ndarray, "m d"],
    penalty: float = 1.0,
) -> Float[np.ndarray, "m g"]:
    """Ridge regression of ``values`` on ``train``, for the rows of ``test``.

    Features are standardised by the training rows; the penalty on squared weights is ``penalty`` per hundred rows.

    >>> x = np.arange(6.0)[:, None]
    >>> ridge_predictions(x, 2 * x + 1, np.array([[10.0]]), penalty=1e-9).round(3)
    array([[21.]])
    """
    mean, sd = train.mean(0), train.std(0)
    sd = np.where(sd > 1e-8 * np.maximum(1.0, np.abs(mean)), sd, 1.0)
    x, centre = (train - mean) / sd, values.mean(0)
    gram = x.T @ x + penalty * len(x) / 100 * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (values - centre))
    predicted: Float[np.ndarray, "m g"] = (test - mean) / sd @ weights + centre
    return predicted


_ROWS = 4096  # queries at a time: their similarities to all training spots are what memory goes into


def retrieved_expression(
    images: Float[Tensor, "m d"],
    genes: Float[Tensor, "n d"],
    expression: Float[np.ndarray, "n g"],
    k: int,
) -> Float[np.ndarray, "m g"]:
    """Mean ``expression`` of the ``k`` training spots whose embeddings ``genes`` are nearest to a patch's, by cosine.

    >>> means = retrieved_expression(torch.eye(2), torch.eye(2), np.array([[1.0], [3.0]]), k=1)
    >>> means.tolist()
    [[1.0], [3.0]]
    """
    if not 1 <= k <= len(genes):
        raise NearfarError(
            f"retrieve={k}: there are {len(genes)} training spots to average over; take 1 to that many."
        )
    images, genes = (torch.nn.functional.normalize(x.float(), dim=1) for x in (images, genes))
    means = np.empty((len(images), expression.shape[1]))
    for start in range(0, len(images), _ROWS):
        part = images[start : start + _ROWS]
        nearest = (part @ genes.T).topk(k, dim=1).indices.numpy()
        # One matrix product instead of a gather of (rows, k, genes).
        weight = np.zeros((len(part), len(genes)), expression.dtype)
        np.put_along_axis(weight, nearest, 1.0 / k, axis=1)
        means[start : start + len(part)] = weight @ expression
    return means
