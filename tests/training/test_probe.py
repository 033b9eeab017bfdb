"""Recording during training: every field is there and right, and the run does not notice."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.losses import CrossBatchMemory, InfoNCELoss, Objective, WassersteinGapLoss
from nearfar.metrics import embedding_health
from nearfar.systems import build_system, check_config
from nearfar.training.checkpoint import Checkpoint, Resume
from nearfar.training.evaluation import consecutive
from nearfar.training.fit import fit
from nearfar.training.loop import TrainingLoop
from nearfar.training.probe import Probe, preserve_state
from nearfar.training.recorder import highest_scale, model_facts
from nearfar.training.run_folder import RunFolder
from nearfar.training.system import StepOutput, System, collect
from processes import run_until_killed
from run_files import records, states_equal
from tiny_molecules import split_files
from toy_system import N, ToyModel, ToySystem, killed_after, silent, toy_config

pytestmark = pytest.mark.slow  # real runs

OWN = {"effective_rank", "rank_limit", "dimensions", "variance", "uniformity", "mean_cosine"}


class BusyModel(ToyModel):
    """Everything that a look from outside could disturb: running statistics, a memory, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.memory = CrossBatchMemory(24, 8, ids=True)
        self.gap = WassersteinGapLoss(queue_size=16)
        self.frozen = nn.BatchNorm1d(8).eval()
        self.max_scale = 50.0


class BusySystem(ToySystem):
    """Two losses in an objective, one of which draws on a memory, and a dataset that draws like a careless one."""

    embed = System.embed

    def prepare(self, say: Any) -> None:
        super().prepare(say)
        self.objective = Objective({"contrast": 0.7, "gap": "linear 0 -> 0.5"})
        self.draws = 0

    def build_model(self) -> nn.Module:
        return BusyModel()

    def encode(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {"a": model.norm(model.a(batch[0])), "b": model.frozen(model.b(batch[1]))}

    def loss_of(self, model: Any, embeddings: Any, batch: Any) -> StepOutput:
        a, b = embeddings["a"], embeddings["b"]
        torch.rand(1)  # the global generator
        contrast = self.loss(a, b, negatives=model.memory.rows() if model.memory.filled else None)
        model.memory.push(b, torch.arange(len(b)))
        scores = torch.nn.functional.cosine_similarity(a, b)
        values = {"contrast": contrast, "gap": model.gap(scores[::2], scores[1::2])}
        place: dict[str, Any] = {"position": 1.0, "total": 4.0}
        return StepOutput(
            self.objective(values, **place),
            lambda: self.loss.record.to_dict() | self.objective.record.to_dict(),  # type: ignore[union-attr]
            lambda: self.objective.measure_shares(values, on=list(embeddings.values()), **place).to_dict(),
        )


def train(
    folder: Path, config: Any, system: type[ToySystem] = BusySystem, resume: Resume | None = None
) -> RunFolder:
    made = system(config)
    made.prepare(silent)
    return fit(made, config, RunFolder(folder), resume, say=silent)


def of_kind(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [record for record in folder.log() if record["kind"] == kind]


def plain(batch: Any) -> Any:
    return batch


# -- the run does not notice ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("system", "changes"),
    [
        (ToySystem, {}),
        (BusySystem, {}),
        (BusySystem, {"trainer__precision": "bf16-mixed", "trainer__workers": 1}),
        (ToySystem, {"trainer__cached_chunk": 3}),
    ],
    ids=["plain", "state", "half precision", "cached"],
)
def test_weights_are_the_same_bits_with_and_without_recording(
    tmp_path: Path, system: type[ToySystem], changes: dict[str, Any]
) -> None:
    changes = {"epochs": 2, **changes}
    often = train(
        tmp_path / "often",
        toy_config(trainer__probe_every=1, trainer__log_every=1, trainer__probe_rows=16, **changes),
        system,
    )
    rarely = train(
        tmp_path / "rarely", toy_config(trainer__probe_rows=0, trainer__log_every=1000, **changes), system
    )
    a, b = Checkpoint.load(often.path), Checkpoint.load(rarely.path)
    assert states_equal(a, b)
    assert {"_extra_state" in key for key in a.model} == ({True, False} if system is BusySystem else {False})
    assert often.read_json("metrics.json")["splits"] == rarely.read_json("metrics.json")["splits"]
    assert len(of_kind(often, "probe")) == a.step
    assert not of_kind(rarely, "probe")


@pytest.mark.parametrize(("accumulate", "kill_at"), [(1, 13), (2, 15), (1, 18)])
def test_a_killed_run_writes_the_same_probes(tmp_path: Path, accumulate: int, kill_at: int) -> None:
    config = toy_config(
        trainer__probe_every=3,
        trainer__accumulate=accumulate,
        trainer__checkpoint_steps=2,
        trainer__threads=1,
    )
    whole = train(tmp_path / "whole", config, ToySystem)
    run_until_killed(killed_after, config, tmp_path / "killed", kill_at)
    killed = RunFolder(tmp_path / "killed")
    train(killed.path, config, ToySystem, Resume.find(str(killed.path), config))
    assert records(whole) == records(killed)
    steps = [record["step"] for record in of_kind(killed, "probe")]
    assert steps == sorted(set(steps)), "one probe at a step"
    assert states_equal(Checkpoint.load(whole.path), Checkpoint.load(killed.path))


def test_untouched_puts_everything_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    model.add_module("memory", CrossBatchMemory(5, 4))
    model[0].eval()  # a frozen layer
    system = type("Holder", (), {})()
    system.loss = WassersteinGapLoss(queue_size=4)
    memory: Any = model.memory
    memory.push(torch.ones(3, 4))
    system.loss(torch.rand(2), torch.rand(2))
    before = copy.deepcopy((model.state_dict(), system.loss.state_dict(), torch.get_rng_state()))
    with preserve_state(model, system) as put_back:
        for _ in range(2):
            torch.rand(3)
            memory.push(torch.zeros(4, 4))
            model[0].running_mean = torch.ones(4)
            system.loss.lower_queue.add_(1)
            system.loss.train()(torch.rand(2), torch.rand(2))
            assert not model[1].training
            put_back()
            assert memory.filled == 3
    after = (model.state_dict(), system.loss.state_dict(), torch.get_rng_state())
    for old, new in zip(before[:2], after[:2], strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert torch.equal(before[2], after[2])
    assert (model.training, model[0].training, model[1].training, system.loss.training) == (
        True,
        False,
        True,
        True,
    )


def test_an_error_inside_leaves_nothing_behind_either() -> None:
    model = nn.BatchNorm1d(3)

    def fail() -> None:
        torch.rand(1)
        model.running_mean.add_(1)
        raise ZeroDivisionError

    generator = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), preserve_state(model):
        fail()
    assert torch.equal(generator, torch.get_rng_state())
    assert model.training
    assert torch.equal(model.running_mean, torch.zeros(3))
    assert torch.is_grad_enabled()


def test_weights_that_move_in_eval_mode_are_an_error() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(NearfarError, match=r"model\.training"), preserve_state(model):
        model.weight.mul_(0.9)


# -- probe records -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(tmp_path_factory.mktemp("run") / "busy", toy_config(trainer__probe_every=4))


def test_probe_fields(busy: RunFolder) -> None:
    probes, epochs = of_kind(busy, "probe"), of_kind(busy, "epoch")
    expected = {f"{view}/{name}" for view in "ab" for name in OWN} | {
        *("kind", "epoch", "step", "seconds", "probe_rows", "probe_split"),
        *("alignment", "modality_gap", "hubness"),
        *("val_loss", "val_uniform_level", "val_candidates", "train_loss_same_composition"),
    }
    assert all(record.keys() == expected for record in probes)
    assert all(math.isfinite(v) for r in probes for v in r.values() if not isinstance(v, str))
    assert {(r["probe_rows"], r["probe_split"]) for r in probes} == {(20, "val")}
    ends = [record["step"] for record in epochs]
    assert [r["step"] for r in probes] == sorted({*range(4, ends[-1], 4), *ends})
    # Batches of 8 rows, and from the memory what the training had pushed by then: nothing of the probe.
    # One direction has them, the other has its 8.
    assert {r["val_candidates"] for r in probes} == {((8.0 + 24.0) + 8.0) / 2}


def final_system(config: Any, folder: RunFolder) -> tuple[Any, Any]:
    system = BusySystem(config)
    system.prepare(silent)
    model = system.build_model()
    model.load_state_dict(Checkpoint.load(folder.checkpoints / "last.ckpt").model)
    return system, model


def test_probe_numbers_equal_those_computed_by_hand(busy: RunFolder) -> None:
    config = toy_config()
    system, model = final_system(config, busy)
    system.datasets["train"].set_epoch(config.epochs - 1)
    logged = of_kind(busy, "probe")[-1]
    probe = Probe(system, 256, config.batch_size, config.seed)
    assert sorted(probe.positions) == list(range(20))
    assert len(set(probe.train.tolist())) == 16
    model.eval()
    with torch.no_grad():
        # At the end of an epoch validation has embedded all rows, in its own batches.
        batches = [system.datasets["val"].__getitems__(rows) for rows in consecutive(20, 16)]
        whole = collect([system.encode(model, batch) for batch in batches])
        health = embedding_health({name: view[probe.positions] for name, view in whole.items()})
        for name, value in health.items():
            assert logged[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name

        def loss(split: str, positions: Any) -> float:
            if split == "train":
                z = system.encode(model, system.datasets["train"].__getitems__(positions.tolist()))
            else:
                z = {name: view[positions] for name, view in whole.items()}
            scores = torch.nn.functional.cosine_similarity(z["a"], z["b"])
            values = {
                "contrast": InfoNCELoss(0.2)(z["a"], z["b"], negatives=model.memory.rows()),
                "gap": model.gap(scores[::2], scores[1::2]),
            }
            return float(Objective({"contrast": 0.7, "gap": "linear 0 -> 0.5"})(values, 1.0, 4.0))

        for name, split, rows in (
            ("val_loss", "val", probe.positions),
            ("train_loss_same_composition", "train", probe.train),
        ):
            parts = [loss(split, rows[start : start + 8]) for start in (0, 8)]
            assert logged[name] == pytest.approx(sum(parts) / 2, rel=1e-4), name


def test_rows_that_validation_has_embedded_are_not_embedded_again(busy: RunFolder) -> None:
    system, model = final_system(toy_config(), busy)
    system.datasets["val"].noise = 0.0  # that of the toy depends on the batch
    probe = Probe(system, 15, 8, seed=0)
    with preserve_state(model):
        validated = system.encode(model, system.datasets["val"].__getitems__(list(range(20))))
    asked: list[int] = []
    encode = system.encode

    def counting(model: Any, batch: Any) -> Any:
        asked.append(len(batch[0]))
        return encode(model, batch)

    system.encode = counting
    again, at_once = probe.record(model, plain), probe.record(model, plain, validated)
    assert asked == [8, 7, 8, 8], "15 rows of validation and 8 of training; then those of training"
    assert at_once.keys() == again.keys()
    for name, value in again.items():
        assert at_once[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name
    # Outputs that are not a row for each item cannot stand for the items.
    assert probe.record(model, plain, {"a": validated["a"][:19]}) == again


def test_the_sample_is_fixed_by_the_seed() -> None:
    system = ToySystem(toy_config())
    system.prepare(silent)
    one, same, other = (Probe(system, 12, 4, seed) for seed in (0, 0, 1))
    assert one.positions.tolist() == same.positions.tolist() != other.positions.tolist()
    assert one.train.tolist() == same.train.tolist() != other.train.tolist()
    assert len(set(one.positions.tolist())) == len(one.train) == 12
    assert max(one.train) < N


class Without(ToySystem):
    """A system without validation rows."""

    def dataset(self, split: str) -> Any:
        return self.datasets["train"] if split == "train" else None


def test_without_validation_the_probe_takes_training_rows() -> None:
    system = Without(toy_config())
    system.prepare(silent)
    record = Probe(system, 32, 8, 0).record(system.build_model(), plain)
    assert (record["probe_split"], record["probe_rows"]) == ("train", 32)
    assert "val_loss" not in record
    assert record["train_loss_same_composition"] > 0
    small = Probe(system, 5, 8, 0)
    assert small.record(system.build_model(), plain)["train_loss_same_composition"] > 0
    assert small.size == 5, "a batch of what there is"
    assert "train_loss_same_composition" not in Probe(system, 1, 8, 0).record(system.build_model(), plain)


class Demanding(ToySystem):
    """A loss that not every batch satisfies, and outputs that are no embeddings."""

    def embed(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        return self.encode(model, batch) | {
            "score": batch[0][:, 0],
            "id": torch.arange(len(batch[0]))[:, None],
        }

    def loss_of(self, model: Any, embeddings: Any, batch: Any) -> StepOutput:
        if not model.training:
            raise NearfarError("no pair of one class in this batch")
        return super().loss_of(model, embeddings, batch)


def test_a_loss_that_cannot_be_had_does_not_end_the_run(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", toy_config(epochs=1), Demanding)
    (record,) = of_kind(folder, "probe")
    assert record["loss_problem"] == "no pair of one class in this batch"
    assert not {"val_loss", "train_loss_same_composition"} & record.keys()
    assert {key.split("/")[0] for key in record if "/" in key} == {"a", "b"}
    assert folder.read_json("model.json")["views"] == {"a": 8, "b": 8}


def test_embeddings_that_are_not_finite_are_said_to_be_so() -> None:
    class Broken(ToySystem):
        def embed(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
            return {"a": torch.full((len(batch[0]), 3), math.nan)}

    system = Broken(toy_config())
    system.prepare(silent)
    record = Probe(system, 16, 8, 0).record(system.build_model(), plain)
    assert record == {"probe_rows": 16, "probe_split": "val", "finite": False}


# -- step records --------------------------------------------------------------------------------------------
def test_step_fields(busy: RunFolder) -> None:
    steps = of_kind(busy, "step")
    assert {r["rows"] for r in steps} <= {8, 6}
    for record in steps:
        assert record["clipped"] == (record["gradient_norm"] > 1.0)
        assert record["scale_max"] == 50.0
        assert record["contrast/share"] + record["gap/share"] == pytest.approx(1)
        assert -1 <= record.get("contrast/cosine/gap", 0.0) <= 1, "absent where a term has no gradient"
        assert record["contrast/weighted"] == pytest.approx(0.7 * record["contrast/raw"])
        assert record["gap/weight"] == pytest.approx(0.5 / 3)
        assert "world_size" not in record
    assert sum("contrast/cosine/gap" in record for record in steps) > len(steps) / 2


@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.05), (2, 50.0), (2, 0.0)])
def test_gradient_norm_is_that_of_the_whole_gradient_before_clipping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, clip: float
) -> None:
    seen: dict[int, float] = {}
    before = TrainingLoop._clip_gradients

    def watching(self: TrainingLoop) -> Any:
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        seen[self.state.step + 1] = torch.cat(gradients).double().norm().item()
        norm = before(self)
        after = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).norm()
        assert not clip or after <= clip * 1.001
        return norm

    monkeypatch.setattr(TrainingLoop, "_clip_gradients", watching)
    config = toy_config(trainer__accumulate=accumulate, trainer__gradient_clip=clip, epochs=2)
    steps = of_kind(train(tmp_path / "run", config, ToySystem), "step")
    assert len(steps) == max(seen) // 2
    for record in steps:
        assert record["gradient_norm"] == pytest.approx(seen[record["step"]], rel=1e-5)
        assert record["clipped"] is (bool(clip) and record["gradient_norm"] > clip)
    assert any(r["clipped"] for r in steps) == (clip == 0.05)


def test_clipping_is_the_one_of_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(trainer__gradient_clip=0.05)
    ours = train(tmp_path / "ours", config, ToySystem)

    def plain(self: TrainingLoop) -> torch.Tensor:
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        return torch.nn.utils.clip_grad_norm_(weights, 0.05)

    monkeypatch.setattr(TrainingLoop, "_clip_gradients", plain)
    theirs = train(tmp_path / "theirs", config, ToySystem)
    assert states_equal(Checkpoint.load(ours.path), Checkpoint.load(theirs.path))


def test_rows_of_the_last_and_of_a_resumed_batch(tmp_path: Path) -> None:
    config = toy_config(trainer__log_every=1, epochs=2)
    folder = train(tmp_path / "run", config, ToySystem)
    rows = [r["rows"] for r in of_kind(folder, "step")]
    sampler = ToySystem(config).build_sampler()
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected += [len(batch) for batch in sampler]
    assert rows == expected


# -- what the run is made of ---------------------------------------------------------------------------------
def test_model_json(busy: RunFolder) -> None:
    facts = busy.read_json("model.json")
    model = BusyModel()
    count = sum(p.numel() for p in model.parameters())
    assert facts == {
        "parameters": count,
        "trained_parameters": count,
        "batchnorm": 1,  # the frozen one normalises by what it has learned
        "dropout": 0.3,
        "scale_max": 50.0,
        "views": {"a": 8, "b": 8},
        "world_size": 1,
    }
    assert highest_scale(nn.Linear(1, 1)) is None
    assert "scale_max" not in model_facts(nn.Linear(1, 1))


@pytest.mark.parametrize(
    "change", [{"trainer__probe_rows": -1}, {"trainer__probe_every": 0}, {"trainer__probe_rows": "many"}]
)
def test_wrong_options_are_named(change: Mapping[str, Any]) -> None:
    config = compose_config(["experiment=molecules"])
    for key, value in change.items():
        config.trainer[key.split("__")[1]] = value
    with pytest.raises(NearfarError, match=next(iter(change)).replace("__", r"\.")):
        check_config(config)


# -- molecules -----------------------------------------------------------------------------------------------
SMALL = [
    *("experiment=molecules", "epochs=1", "batch_size=16", "embedding_dim=16", "fingerprint_hidden=32"),
    *("fingerprint_bits=128", "bootstrap=100", "text_encoder.dims=32", "trainer.accelerator=cpu"),
    *("trainer.threads=1", "report=false", "trainer.log_every=2", "name=run"),
]


def molecules(folder: Path, *overrides: str) -> RunFolder:
    every = list({o.split("=")[0]: o for o in [*SMALL, f"runs_dir={folder}", *overrides]}.values())
    with open(os.devnull, "w") as nowhere:
        return run_one(compose_config(every), every, False, Console(file=nowhere))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEARFAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield split_files(tmp_path_factory.mktemp("data"))


def test_molecules_record_their_batches(tmp_path: Path, files: list[str]) -> None:
    options = ["mask_duplicates=false", "learn_temperature=true", "memory=32", "trainer.probe_every=3"]
    folder = molecules(tmp_path / "a", *files, *options)
    steps, probes = of_kind(folder, "step"), of_kind(folder, "probe")
    for record in steps:
        assert record["scale_max"] == 100.0
        assert record["largest_logit"] == record["scale"] > 14
        assert 2 <= record["rows"] <= 16
        assert 0 <= record["false_negative_share"] <= 1
        assert 0 <= record["duplicate_keys"] <= 1
    assert {"molecule/effective_rank", "text/effective_rank", "val_loss"} <= probes[-1].keys()
    assert folder.read_json("model.json")["views"] == {"molecule": 16, "text": 16}
    without = molecules(tmp_path / "b", *files, *options, "trainer.probe_rows=0", "trainer.log_every=1000")
    assert states_equal(Checkpoint.load(folder.path), Checkpoint.load(without.path))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_copies_and_false_negatives_of_a_batch_of_molecules(
    files: list[str], masked: bool, threshold: float | None
) -> None:
    given = "null" if threshold is None else str(threshold)
    every = [*SMALL, *files, f"mask_duplicates={masked}", f"false_negative_threshold={given}"]
    system: Any = build_system(compose_config(every))
    system.prepare(silent)
    batch = system.dataset("train").__getitems__(list(range(8)))
    text = batch["text"].clone()
    text[6] = text[7]
    structures, texts = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 2, 3, 4, 5, 6]])
    batch = batch.replaced(
        **{"text": text, "reference": text, "group:molecule": structures, "group:text": texts}
    )
    logs = system.training_step(system.build_model(), batch).logs()
    assert logs["duplicate_keys"] == (0.0 if masked else 4 / 8)
    unit = torch.nn.functional.normalize(text.double(), dim=1)
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    copies = {(0, 1), (1, 0), (2, 3), (3, 2)} if masked else set()
    near = {(i, j) for i, j in pairs if unit[i] @ unit[j] >= (0.95 if threshold is None else 0.5)}
    negatives = [p for p in pairs if p not in copies and not (threshold is not None and p in near)]
    expected = sum(p in near for p in negatives) / len(negatives)
    assert logs["false_negative_share"] == pytest.approx(expected)
    assert (expected > 0) == (threshold is None)
