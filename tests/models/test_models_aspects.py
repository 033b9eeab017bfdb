"""The linear baseline of aspects."""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.models.aspects import linear_answers


def test_the_baseline_keeps_unknown_labels_out_and_is_kept_by_content() -> None:
    texts = ["good camera", "bad camera", "good price", "bad price"] * 5
    codes = np.array([[3, 0], [1, 0], [0, 3], [0, 1]] * 5)
    unknown = codes.copy()
    unknown[0, 0] = -1
    for labels in (codes, unknown):
        answers = linear_answers(texts, labels, {"val": ["good camera", "bad price"]})
        assert answers["val"].tolist() == [[3, 0], [0, 1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearfar.models.aspects._fit", lambda *_: pytest.fail("fitted again"))
        linear_answers(texts, codes, {"val": ["good camera", "bad price"]})
