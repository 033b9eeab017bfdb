"""The probe on parts of an embedding, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.errors import NearfarError
from nearfar.models.parts_probe import PartsProbe, _gaussian, sample_rows


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_probe_of_arrays_scores_as_scikit_learn_does(classes: int) -> None:
    from sklearn.svm import SVC

    rng = np.random.default_rng(classes)
    label = rng.integers(0, classes, 120)
    blocks = {
        "a": (rng.normal(size=(120, 3)) + label[:, None]).astype(np.float32),
        "b": rng.normal(size=(120, 2)),
    }
    probe = PartsProbe().fit(blocks, label)
    rows = probe.rows(blocks)
    kernel = _gaussian(rows, rows)
    expected = SVC(C=3.0, kernel="precomputed").fit(kernel, label).decision_function(kernel)
    if classes == 2:
        expected = np.stack([-expected, expected], axis=1)
    np.testing.assert_allclose(probe.scores(blocks, classes), expected, atol=1e-9)
    loaded = PartsProbe.of_arrays("rbf", probe.parts, probe.arrays())
    assert np.array_equal(loaded.scores(blocks, classes), probe.scores(blocks, classes))
    damaged = probe.arrays() | {"weights": probe.arrays()["weights"][1:]}
    with pytest.raises(NearfarError, match="do not fit together"):
        PartsProbe.of_arrays("rbf", probe.parts, damaged)
    with pytest.raises(NearfarError, match="this is no probe"):
        PartsProbe.of_arrays("rbf", [*probe.parts, "c"], probe.arrays())


def test_probe_equals_scikit_learn_on_scaled_parts() -> None:
    from sklearn.svm import SVC

    rng = np.random.default_rng(0)
    a, b = rng.normal(2, 3, (80, 4)), rng.normal(0, 0.1, (80, 6))
    label = (a[:, 0] + 30 * b[:, 0] > 2).astype(int) + (a[:, 1] > 4)
    probe = PartsProbe().fit({"a": a[:60], "b": b[:60]}, label[:60])
    parts = [(x - x[:60].mean(0)) / np.sqrt(x[:60].var(0).sum()) for x in (a, b)]
    rows = np.concatenate(parts, axis=1)
    plain = SVC(C=3.0, gamma=0.5).fit(rows[:60], label[:60])
    np.testing.assert_allclose(
        probe.scores({"a": a[60:], "b": b[60:]}, 3), plain.decision_function(rows[60:]), atol=1e-6
    )


def test_probe_without_a_part() -> None:
    rng = np.random.default_rng(1)
    label = np.arange(60) % 2
    informative = label[:, None] + 0.1 * rng.normal(size=(60, 1))
    gone = np.full((60, 3), np.nan)
    both = PartsProbe().fit({"a": informative, "b": gone}, label)
    assert (both.predict({"a": informative, "b": gone}) == label).all()
    # A part that some pairs have: the others are not what is learned from.
    some = np.where(np.arange(60)[:, None] < 20, informative, np.nan)
    only = PartsProbe("linear").fit({"b": some}, label)
    assert (only.predict({"b": some})[:20] == label[:20]).all()
    one = PartsProbe().fit({"a": informative}, np.ones(60, int))
    assert (one.predict({"a": informative}) == 1).all()
    assert one.scores({"a": informative}, 3)[0].tolist() == [-np.inf, 0.0, -np.inf]
    assert len(sample_rows(label, 10)) == 10
