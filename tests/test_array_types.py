"""The check of arrays in signatures: what it reports, and what it leaves to the function."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from array_types import check_arrays
from nearfar.contrast.softmax import softmax_loss
from nearfar.errors import NearfarError
from nearfar.losses.siglip import siglip
from nearfar.metrics.retrieval import retrieval_ranks


@jaxtyped(typechecker=check_arrays)
def sums(
    a: Float[Tensor, "n d"], b: Float[Tensor, "n d"] | None = None, shift: int = 0
) -> Float[Tensor, " n"]:
    if a.ndim != 2:
        raise NearfarError("a matrix is needed")
    total = a.sum(1) if b is None else (a.sum(1) + b.sum())
    return total[shift:].to(torch.int64) if shift == 99 else total[shift:]


def test_results_and_shapes_have_to_fit() -> None:
    assert torch.equal(sums(torch.ones(3, 2)), torch.full((3,), 2.0))
    with pytest.raises(TypeCheckError, match="return value"):
        sums(torch.ones(3, 2), shift=1)
    with pytest.raises(TypeCheckError, match="return value"):
        sums(torch.ones(3, 2), torch.ones(2, 2))
    with pytest.raises(TypeCheckError, match="return value"):
        sums(torch.ones(0, 2), shift=99)


def test_wrong_arguments_are_left_to_the_function() -> None:
    with pytest.raises(NearfarError, match="a matrix is needed"):
        sums(torch.ones(3))


@pytest.mark.parametrize("function", [softmax_loss, siglip, retrieval_ranks])
def test_the_package_is_checked(function: object) -> None:
    assert hasattr(function, "__wrapped__")
