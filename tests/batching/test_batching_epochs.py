"""When an epoch has ended: what ``DataLoader(shuffle=True)`` gives, in plain loops and under other trainers."""

from __future__ import annotations

import itertools
import logging
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from nearfar.batching import (
    HardNegativeSampler,
    PartitionBatchSampler,
    RandomBatchSampler,
    SpatialBatchSampler,
    nearest_neighbors,
)
from nearfar.errors import NearfarError

N, BATCH = 40, 8
DATA = torch.arange(float(N))[:, None]


def epochs(count: int, n: int = N, batch: int = BATCH) -> list[list[list[int]]]:
    sampler = RandomBatchSampler(n, batch)
    return [[b.tolist() for b in sampler.plan(epoch).batches()] for epoch in range(count)]


WANTED = epochs(6)


def numbers(batch: torch.Tensor) -> list[int]:
    return batch.flatten().int().tolist()


LOOPS = {
    "whole": list,
    "break": lambda loader: [next(iter(loader))],
    "islice": lambda loader: list(itertools.islice(loader, 2)),
    "zip": lambda loader: [batch for batch, _ in zip(loader, range(2), strict=False)],
    "zip behind": lambda loader: [batch for _, batch in zip(range(2), loader, strict=False)],
}


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("loop", LOOPS)
def test_every_pass_is_a_new_epoch(loop, workers, persistent):
    loader = DataLoader(
        DATA,
        batch_sampler=RandomBatchSampler(N, BATCH),
        num_workers=workers,
        persistent_workers=persistent,
    )
    for epoch in range(3):
        got = [numbers(batch) for batch in LOOPS[loop](loader)]
        assert got == WANTED[epoch][: len(got)], f"{loop}, epoch {epoch}"


def test_iterators_use_up_an_epoch_when_they_yield():
    sampler = RandomBatchSampler(N, BATCH)
    iter(sampler), iter(sampler)  # looked at, and never drawn from
    assert next(iter(sampler)) == WANTED[0][0]
    both = [list(side) for side in zip(*zip(sampler, sampler, strict=True), strict=True)]
    assert both == WANTED[1:3]
    first, second = iter(sampler), iter(sampler)
    assert (next(second), next(first), next(second)) == (WANTED[3][0], WANTED[4][0], WANTED[3][1])
    assert sampler.state_dict()["epoch"] == 4  # the pass that began last


def test_an_epoch_may_be_set_until_the_first_batch():
    sampler = RandomBatchSampler(N, BATCH)
    running = iter(sampler)
    sampler.set_epoch(3)
    assert list(running) == WANTED[3]
    sampler.set_epoch(1)
    sampler.set_epoch(1)
    assert list(sampler) == WANTED[1]
    sampler.set_epoch(1)  # the same again, from its beginning
    assert next(iter(sampler)) == WANTED[1][0]
    running = iter(sampler)
    next(running)
    sampler.set_epoch(2)  # the epoch that is running: announced late, and no epoch comes twice
    assert [*running, next(iter(sampler))] == [*WANTED[2][1:], WANTED[3][0]]


def test_an_epoch_set_too_late_is_told():
    sampler = RandomBatchSampler(N, BATCH)
    running = iter(sampler)
    next(running)
    sampler.set_epoch(4)
    with pytest.warns(UserWarning, match=r"set_epoch\(4\) came after the first batch.*goes on with epoch 0"):
        assert next(running) == WANTED[0][1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(running) == WANTED[0][2:]
    assert list(sampler) == WANTED[4]


def test_a_broken_pass_resumes_elsewhere_and_moves_on_here():
    sampler = RandomBatchSampler(N, BATCH)
    for count, _ in enumerate(sampler, start=1):
        if count == 2:
            break
    state = sampler.state_dict(position=2)
    fresh = RandomBatchSampler(N, BATCH)
    fresh.load_state_dict(state)
    assert list(fresh) == WANTED[0][2:]
    assert list(fresh) == WANTED[1] == list(sampler)
    fresh.load_state_dict(state)
    iter(fresh)  # unused
    fresh.set_epoch(0)
    assert list(fresh) == WANTED[0][2:]
    fresh.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"batch 2 of 5 of epoch 0, is given up"):
        fresh.set_epoch(3)
    assert list(fresh) == WANTED[3]


# ---- Lightning


def lightning_net():
    lightning = pytest.importorskip("lightning")

    class Net(lightning.LightningModule):
        def __init__(self, hook=None):
            super().__init__()
            self.layer, self.seen, self.hook = torch.nn.Linear(1, 1), {}, hook

        def training_step(self, batch, index):
            self.seen.setdefault(self.current_epoch, []).append(numbers(batch))
            return self.layer(batch).mean()

        def validation_step(self, batch, index):
            return None

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    return Net


class HookedData:
    """A data module as the docs write it: the epoch is set where the loader is made."""

    def __new__(cls, sampler, workers):
        lightning = pytest.importorskip("lightning")

        class Data(lightning.LightningDataModule):
            def train_dataloader(self):
                sampler.set_epoch(self.trainer.current_epoch)
                return DataLoader(DATA, batch_sampler=sampler, num_workers=workers)

        return Data()


def trainer(**options):
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**{"max_epochs": 3, **quiet, **options})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"limit_train_batches": 2}, {"val_check_interval": 2, "num_sanity_val_steps": 2}],
    ids=["plain", "limited", "validated"],
)
def test_lightning_sets_the_epoch(options, workers):
    sampler, net = RandomBatchSampler(N, BATCH), lightning_net()()
    loader = DataLoader(DATA, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    trainer(**options).fit(net, loader, DataLoader(DATA, BATCH))
    steps = options.get("limit_train_batches", 5)
    assert [net.seen[epoch] for epoch in range(3)] == [batches[:steps] for batches in WANTED[:3]]
    assert sampler.epoch == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_curriculum_begins_under_lightning():
    near = nearest_neighbors(np.random.default_rng(0).standard_normal((N, 4)), 10)
    sampler = HardNegativeSampler(near, BATCH, hardness_k=5, curriculum_epoch=1)
    net = lightning_net()()
    trainer().fit(net, DataLoader(DATA, batch_sampler=sampler))
    assert [net.seen[epoch] for epoch in range(3)] == [
        [batch.tolist() for batch in sampler.plan(epoch).batches()] for epoch in range(3)
    ]
    assert [sampler.plan(epoch).hard is None for epoch in range(3)] == [True, False, False]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_lightning_run_goes_on_with_its_epoch(tmp_path, workers):
    first = trainer(max_epochs=2)
    first.fit(lightning_net()(), DataLoader(DATA, batch_sampler=RandomBatchSampler(N, BATCH)))
    first.save_checkpoint(tmp_path / "a.ckpt")
    net = lightning_net()()
    trainer().fit(
        net, datamodule=HookedData(RandomBatchSampler(N, BATCH), workers), ckpt_path=str(tmp_path / "a.ckpt")
    )
    assert net.seen == {2: WANTED[2]}


def test_lightning_is_told_why_it_cannot_cut_the_batches():
    data = pytest.importorskip("lightning.pytorch.utilities.data")
    near = np.array([[(i + 1) % N] for i in range(N)])
    for sampler in (
        RandomBatchSampler(N, BATCH),
        RandomBatchSampler(N, BATCH, drop_last=True),
        PartitionBatchSampler(near, BATCH, drop_last=True),
    ):
        loader = DataLoader(DATA, batch_sampler=sampler)
        with pytest.raises(NearfarError, match="use_distributed_sampler=False"):
            data._update_dataloader(loader, DistributedSampler(range(N), 2, 0))
    spatial = SpatialBatchSampler(np.zeros((N, 2)), None, BATCH)
    with pytest.raises(NearfarError, match="use_distributed_sampler=False"):
        data._update_dataloader(DataLoader(DATA, batch_sampler=spatial), DistributedSampler(range(N), 2, 0))


# ---- accelerate and the Trainer of transformers


def test_accelerate_in_one_process():
    accelerate = pytest.importorskip("accelerate")
    sampler = RandomBatchSampler(N, BATCH)
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(DATA, batch_sampler=sampler))
    assert [[numbers(batch) for batch in loader] for _ in range(3)] == WANTED[:3]
    for epoch in (3, 4):  # a loop that breaks off announces its epochs
        loader.set_epoch(epoch)
        assert numbers(next(iter(loader))) == WANTED[epoch][0]
    loader.set_epoch(2)
    rest = accelerate.skip_first_batches(loader, 2)
    assert [numbers(batch) for batch in rest] == WANTED[2][2:]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("n", [40, 41, 43, 48, 57])
def test_accelerate_cuts_full_batches_evenly_or_not_at_all(n, even, split):
    shards = pytest.importorskip("accelerate.data_loader")

    def loader(rank, **options):
        sampler = RandomBatchSampler(n, BATCH, **options)
        return sampler, shards.prepare_data_loader(
            DataLoader(range(n), batch_sampler=sampler),
            num_processes=2,
            process_index=rank,
            even_batches=even,
            split_batches=split,
        )

    ranks = []
    for rank in range(2):
        sampler, prepared = loader(rank, drop_last=True)
        prepared.set_epoch(3)
        ranks.append([batch.tolist() for batch in prepared])
        assert sampler.epoch == 3
    flat = [item for batches in ranks for batch in batches for item in batch]
    assert len(ranks[0]) == len(ranks[1]) == len(prepared)
    assert len({len(batch) for batches in ranks for batch in batches}) == 1
    assert len(flat) == len(set(flat))
    assert len(flat) == n // BATCH * BATCH if split else n // (2 * BATCH) * 2 * BATCH
    with pytest.raises(NearfarError, match="drop_last=True, or build it in each process"):
        loader(0)
    with pytest.raises(NearfarError, match="rank 0 of 2 already"):
        loader(0, world_size=2, drop_last=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers_sets_the_epoch_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    seen: list[list[int]] = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, x):
            seen.append(numbers(x))
            return {"loss": self.layer(x).mean()}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            sampler = RandomBatchSampler(N, BATCH)
            return self.accelerator.prepare(DataLoader(self.train_dataset, batch_sampler=sampler))

    def train(**options):
        seen.clear()
        arguments = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=3, use_cpu=True, report_to=[], save_steps=7, disable_tqdm=True
        )
        Trainer(Net(), arguments, train_dataset=[{"x": row} for row in DATA]).train(**options)
        return list(seen)

    whole = [batch for epoch in WANTED[:3] for batch in epoch]
    assert train() == whole
    assert train(resume_from_checkpoint=str(tmp_path / "checkpoint-7")) == whole[7:]
