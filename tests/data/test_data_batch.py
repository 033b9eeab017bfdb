"""Batches of named fields, and the dataset that hands them out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from nearfar.data.batch import Batch, Draw, ItemDataset, Partial, Pixels, Rows
from nearfar.errors import NearfarError
from nearfar.models.text.words import TokenTable


def dataset(**options: object) -> ItemDataset:
    table = TokenTable({"id": np.arange(6)}, [1, 2, 3])
    return ItemDataset({"x": Rows(np.arange(3.0)), "text": table}, **options)  # type: ignore[arg-type]


def add_noise(batch: Batch, draw: Draw) -> Batch:
    noise = torch.rand(len(batch), generator=draw.torch(), dtype=torch.float64)
    return batch.replaced(x=batch.tensor("x") + noise)


def test_rows_and_tokens_come_in_the_order_asked_for() -> None:
    batch = dataset().__getitems__([2, 0])
    assert batch.positions.tolist() == [2, 0]
    assert batch.tensor("x").tolist() == [2.0, 0.0]
    assert batch["text"]["id"].tolist() == [[3, 4, 5], [0, 0, 0]]  # type: ignore[index]


def test_a_batch_splits_into_parts_that_join_to_it() -> None:
    batch = dataset().__getitems__([0, 1, 2])
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part.tensor("x") for part in parts]), batch.tensor("x"))
    assert parts[0]["text"].mask.shape == (2, 2)  # type: ignore[attr-defined]  # padded as far as the part needs


def test_augmentation_depends_on_seed_epoch_and_first_position_alone() -> None:
    data = dataset(augment=add_noise, seed=3)
    first = data.__getitems__([1, 0]).tensor("x")
    assert torch.equal(data.__getitems__([1, 0]).tensor("x"), first)
    assert torch.equal(dataset(augment=add_noise, seed=3).__getitems__([1, 0]).tensor("x"), first)
    data.set_epoch(1)
    assert data.epoch == 1
    assert not torch.equal(data.__getitems__([1, 0]).tensor("x"), first)
    assert not torch.equal(dataset(augment=add_noise, seed=4).__getitems__([1, 0]).tensor("x"), first)


@pytest.mark.slow
def test_processes_of_a_loader_see_the_epoch() -> None:
    data = dataset(augment=add_noise)
    loader = DataLoader(
        data, batch_sampler=[[0, 1]], collate_fn=_same, num_workers=1, persistent_workers=True,
        multiprocessing_context="forkserver",
    )  # fmt: skip
    for epoch in (0, 2):
        data.set_epoch(epoch)
        (batch,) = list(loader)
        assert torch.equal(batch.tensor("x"), data.__getitems__([0, 1]).tensor("x"))


def _same(batch: Batch) -> Batch:
    return batch


def test_items_without_a_view_have_the_rows_of_some_other() -> None:
    present = np.array([False, True, False, True])
    view = Partial(Rows(np.array([5.0, 6.0])), present)
    assert len(view) == 4
    assert view.batch(torch.tensor([3, 1])).tolist() == [6.0, 5.0]  # type: ignore[attr-defined]
    assert len(view.batch(torch.tensor([0, 2]))) == 2
    with pytest.raises(NearfarError, match="2 items have this view, and there are 3 rows"):
        Partial(Rows(np.zeros(3)), present)


def test_pictures_come_with_colours_first() -> None:
    pictures = np.random.default_rng(0).integers(255, size=(3, 4, 5, 3)).astype(np.uint8)
    batch = Pixels(pictures).batch(torch.tensor([2]))
    assert np.array_equal(batch[0].numpy(), pictures[2].transpose(2, 0, 1))
    with pytest.raises(NearfarError, match="of uint8 is needed"):
        Pixels(np.zeros((3, 4, 5, 3)))


def test_what_does_not_fit_together_is_an_error() -> None:
    with pytest.raises(NearfarError, match="different numbers of rows: x 3, y 2"):
        ItemDataset({"x": Rows(np.zeros(3)), "y": Rows(np.zeros(2))})
    with pytest.raises(NearfarError, match="at least one field"):
        ItemDataset({})
    batch = dataset().__getitems__([0])
    with pytest.raises(NearfarError, match="this batch has no 'txt': did you mean 'text'"):
        batch["txt"]
    with pytest.raises(NearfarError, match="'text' of this batch is a TokenBatch"):
        batch.tensor("text")
    with pytest.raises(NearfarError, match="'text' of this dataset is a TokenTable"):
        dataset().tensor("text")
