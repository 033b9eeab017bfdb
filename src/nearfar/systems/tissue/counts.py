"""What counts of molecules are, whatever layout they come in: finite whole numbers of 0 or more."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["no_counts", "whole_counts"]


def no_counts(matrix: Any) -> str | None:
    """What tells that a scipy sparse matrix holds no counts, None where it does.

    >>> from scipy.sparse import csr_matrix
    >>> no_counts(csr_matrix([[0, 3]])), no_counts(csr_matrix([[0, 1.37]])), no_counts(csr_matrix([[-1, 2]]))
    (None, '1.37 is no whole number', '-1 is below 0')
    """
    values = matrix.data
    if values.dtype.kind not in "biuf":
        return f"{values.dtype} is no number"
    for wrong, words in (
        (~np.isfinite(values), "is no number"),
        (values < 0, "is below 0"),
        (values != np.round(values), "is no whole number"),
    ):
        if wrong.any():
            return f"{values[np.argmax(wrong)]:.6g} {words}"
    return None


def whole_counts(matrix: Any) -> Any:
    """The matrix as CSR of float32, each place once."""
    from scipy.sparse import csr_matrix

    counts = csr_matrix(matrix, dtype=np.float32)
    counts.sum_duplicates()
    return counts
