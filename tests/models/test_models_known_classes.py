"""Known classes: votes and probe as columns, several labels, what is kept and read back, labelled galleries."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from nearfar.data.items import Items
from nearfar.errors import NearfarError
from nearfar.models.known_classes import ClassNames, KnownClasses, LabelledGallery
from nearfar.models.probes import LinearProbe

NAMES = ["cat", "dog", "owl"]


def drawn(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


def codes_of(n: int) -> torch.Tensor:
    return torch.arange(n) % 3


def known(k: int = 4, n: int = 30) -> KnownClasses:
    rows, codes = drawn(n), codes_of(n)
    return KnownClasses.of(NAMES, [f"t{i}" for i in range(n)], rows, codes, k, LinearProbe(rows, codes))


def test_columns_against_a_loop() -> None:
    queries, model = drawn(12, seed=1), known()
    columns = model.columns(queries)
    assert model.probe is not None
    for i, query in enumerate(queries):
        order = cosine_similarity(model.rows, query[None]).argsort(descending=True)[:4].tolist()
        votes = Counter(NAMES[model.codes[j]] for j in order)
        assert columns["knn/nearest"][i] == [f"t{j}" for j in order]
        assert votes[columns["knn"][i]] == max(votes.values())
        assert columns["knn/share"][i] == votes[columns["knn"][i]] / 4
        probabilities = model.probe.logits(query[None])[0].double().softmax(0)
        for code, name in enumerate(NAMES):
            assert columns[f"probe/p({name})"][i] == pytest.approx(float(probabilities[code]))
        assert columns["probe"][i] == NAMES[int(probabilities.argmax())]
        assert columns["probe/probability"][i] == pytest.approx(float(probabilities.max()))


def test_items_without_a_label_do_not_vote() -> None:
    rows, codes = drawn(6), torch.tensor([0, -1, 1, 5, 1, 0])  # 5: a class that training lacks
    model = KnownClasses.of(NAMES, list("abcdef"), rows, codes, 10)
    assert model.ids == ["a", "c", "e", "f"]
    assert set(model.columns(rows)["knn"]) <= {"cat", "dog"}


def test_many_classes_have_no_column_each() -> None:
    n = 202
    names = [f"c{i}" for i in range(101)]
    rows, codes = drawn(n), torch.arange(n) % 101
    model = KnownClasses.of(names, [str(i) for i in range(n)], rows, codes, 1, LinearProbe(rows, codes))
    assert set(model.columns(rows[:2])) == {
        *("knn", "knn/share", "knn/nearest", "knn/cosine", "probe", "probe/probability"),
    }


def test_several_labels_an_item() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    codes = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    columns = KnownClasses.of(NAMES, list("abcd"), rows, codes, 3).columns(
        torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    )
    assert columns["knn"] == ["cat;dog", ""]
    assert columns["knn/labels"][0] == "cat:0.666667;dog:0.666667"
    assert columns["knn/nearest"][0] == ["a", "b", "c"]
    assert "probe" not in columns
    assert "knn/share" not in columns


@pytest.mark.parametrize("several", [False, True])
def test_what_is_kept_says_the_same(several: bool, tmp_path: Path) -> None:
    model = known()
    if several:
        codes = torch.nn.functional.one_hot(model.codes, 3)
        model = KnownClasses.of(NAMES, model.ids, model.rows, codes, 4)
    assert KnownClasses.load(tmp_path) is None
    model.save(tmp_path)
    again = KnownClasses.load(tmp_path)
    assert again is not None
    assert again.columns(drawn(9, seed=2)) == model.columns(drawn(9, seed=2))
    KnownClasses.remove(tmp_path)
    KnownClasses.remove(tmp_path)  # nothing is left, which is no error
    assert KnownClasses.load(tmp_path) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": np.int64(0)},
        {"codes": np.full(30, 3)},
        {"codes": np.zeros((30, 2), np.int64)},
        {"ids": np.array(["a"])},
        {"rows": np.zeros((30, 5))},
        {"rows": np.zeros((0, 5), np.float32), "ids": np.zeros(0, "U1"), "codes": np.zeros(0, np.int64)},
        {"probe/mean": np.zeros(4, np.float32), "probe/spread": np.ones(4, np.float32)},
    ],
)
def test_damaged_arrays_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    known().save(tmp_path)
    path = tmp_path / "class_rows.npz"
    arrays = dict(np.load(path)) | wrong
    np.savez(path, **arrays)
    with pytest.raises(NearfarError, match=r"class_rows\.npz"):
        KnownClasses.load(tmp_path)


def test_names_are_kept(tmp_path: Path) -> None:
    names = ClassNames("photo", "bird", ("gull", "wren"), False, ("owl",))
    names.save(tmp_path)
    assert ClassNames.load(tmp_path) == names
    ClassNames("photo").save(tmp_path)
    assert ClassNames.load(tmp_path) == ClassNames("photo", None, (), False, ())


def test_a_gallery_of_labelled_items() -> None:
    rows, labels = drawn(20), ["red", "blue", "", "red"] * 5
    gallery = LabelledGallery("x", "colour", ";", False, k=3)
    for at in (slice(0, 8), slice(8, 20)):
        ids = [f"g{i}" for i in range(20)][at]
        gallery.add({"x": rows[at]}, Items(ids, {"x": rows[at].numpy(), "colour": labels[at]}))
    columns = gallery.of_others({"x": rows[:4]}, Items(list("abcd"), {"x": rows[:4].numpy()}))
    labelled = [i for i in range(20) if labels[i]]
    for i in range(4):
        cosines = {j: float(cosine_similarity(rows[i], rows[j], dim=0)) for j in labelled}
        order = sorted(cosines, key=cosines.__getitem__, reverse=True)[:3]
        assert columns["knn/nearest"][i] == [f"g{j}" for j in order]
        assert columns["knn"][i] == Counter(labels[j] for j in order).most_common(1)[0][0]
    codes = torch.tensor([["blue", "red"].index(labels[j]) for j in labelled])
    probe = LinearProbe(rows[labelled], codes)
    assert columns["probe"] == [["blue", "red"][c] for c in probe.classes(rows[:4])]


def test_galleries_that_say_nothing() -> None:
    rows = drawn(2)
    gallery = LabelledGallery("x", "colour", ";", False, k=3)
    with pytest.raises(NearfarError, match=r"no column 'colour'.*--gallery-column colour=HEADER"):
        gallery.add({"x": rows}, Items(["a", "b"], {"x": rows.numpy()}))
    gallery.add({"x": rows}, Items(["a", "b"], {"x": rows.numpy(), "colour": ["", None]}))
    with pytest.raises(NearfarError, match="no item of the gallery has a label"):
        gallery.of_others({"x": rows}, Items(["a", "b"], {"x": rows.numpy()}))
    with pytest.raises(NearfarError, match="k=0"):
        LabelledGallery("x", "colour", ";", False, k=0)
    several = LabelledGallery("x", "colour", ";", False, k=2)
    several.add({"x": rows}, Items(["a", "b"], {"x": rows.numpy(), "colour": ["red; blue", "red"]}))
    assert several.of_others({"x": rows}, Items(["a", "b"], {}))["knn"] == ["red;blue"] * 2
