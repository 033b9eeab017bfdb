"""What a log says of its loss and its sampler, and what is read of logs that say nothing of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import nearfar.batching
import nearfar.losses
from nearfar.batching.base import BatchSampler
from nearfar.doctor import diagnose
from nearfar.doctor.levels import by_class, levels
from nearfar.doctor.phases import hard_epochs, means_hard, switch_epoch
from nearfar.doctor.run import read_run
from nearfar.doctor.signals import Signals
from nearfar.losses import (
    AdaptiveScoreContrastiveLoss,
    ClipLoss,
    FocalLoss,
    InfoNCELoss,
    MultiLabelSupConLoss,
    SigLipLoss,
    SpatialLoss,
    SupConLoss,
    WassersteinGapLoss,
)

N = 8


def rows(seed: int) -> torch.Tensor:
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(N) % 3
NEXT = torch.arange(N).roll(-1)[:, None]
#: each loss, its arguments, its name in a log, and what its record says
CALLS: dict[str, tuple[torch.nn.Module, tuple[Any, ...], str, str | None]] = {
    "infonce": (InfoNCELoss(), (rows(0), rows(1)), "softmax", "pair"),
    "clip": (ClipLoss(), (rows(0), rows(1), 10.0), "softmax", "pair"),
    "supcon": (SupConLoss(), (rows(0), LABELS), "softmax", "class"),
    "multi_label_supcon": (MultiLabelSupConLoss(), (rows(0), torch.eye(3)[LABELS].long()), "softmax", "overlap"),
    "spatial": (SpatialLoss(), (rows(0), rows(1), 10.0, NEXT, torch.ones(N, 1)), "softmax", "weights"),
    "adaptive_score": (AdaptiveScoreContrastiveLoss(), (rows(0), rows(1)[:, 0]), "softmax", "scores"),
    "siglip": (SigLipLoss(), (rows(0), rows(1), 10.0, -10.0), "sigmoid", "pair"),
    "focal": (FocalLoss(), (rows(0), LABELS), "other", None),
    "wasserstein": (WassersteinGapLoss(), (rows(0)[:, 0], rows(1)[:, 0]), "other", None),
}  # fmt: skip


def logged(name: str) -> dict[str, Any]:
    loss, arguments, _, _ = CALLS[name]
    value = loss(*arguments)
    record = loss.record.to_dict()  # type: ignore[union-attr,operator]
    return {"loss": value.item()} | record


@pytest.mark.parametrize("name", CALLS)
def test_the_record_says_what_the_loss_is(name: str) -> None:
    record = logged(name)
    assert (record["loss_kind"], record.get("positives_by")) == CALLS[name][2:]


def test_no_loss_is_without_traits() -> None:
    named = [getattr(nearfar.losses, name) for name in nearfar.losses.__all__ if name.endswith("Loss")]
    assert {type(loss) for loss, *_ in CALLS.values()} < set(named)
    for loss in named:
        assert isinstance(loss, type)
        if loss is not nearfar.losses.ContrastiveLoss:
            assert isinstance(loss.traits, nearfar.losses.LossTraits), loss  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CALLS)
def test_a_log_reads_alike_with_kind_and_with_name(name: str) -> None:
    """An older log has the numbers and the name of its loss; the kind must not change what is found."""
    record = logged(name)
    older = {key: value for key, value in record.items() if key not in ("loss_kind", "positives_by")}
    found = diagnose([record] * 20)
    before = diagnose([older] * 20, {"loss": name})
    assert found.to_dict() == before.to_dict()


def curve(**fields: Any) -> list[dict[str, Any]]:
    return [{"loss": 4.16 + 0.01 * (step % 3), "candidates": 64} | fields for step in range(20)]


@pytest.mark.parametrize(
    ("fields", "name", "guess"),
    [
        ({}, None, True),
        ({}, "infonce", True),
        ({}, "siglip", False),
        ({"loss_kind": "softmax"}, "siglip", True),  # what the log says of itself counts, not a name
        ({"loss_kind": "sigmoid"}, None, False),
        ({"loss_kind": "other"}, "infonce", False),
        ({"loss_kind": "softmax", "positives_by": "scores"}, None, False),
    ],
)
def test_guessing_costs_ln_candidates_of_a_softmax_alone(
    fields: dict[str, str], name: str | None, guess: bool
) -> None:
    found = diagnose(curve(**fields), {} if name is None else {"loss": name})
    assert ("loss-at-chance" in found.ids) is guess
    assert ("loss-at-chance" in [rule.id for rule in found.unjudged]) is not guess


def test_the_kind_may_be_said_of_the_run_or_in_columns() -> None:
    columns = {"loss": [4.16, 4.15, 4.16, 4.15, 4.16, 4.16], "candidates": 64}
    assert "loss-at-chance" in diagnose(columns).ids
    assert "loss-at-chance" not in diagnose(columns | {"loss_kind": "sigmoid"}).ids
    assert "loss-at-chance" not in diagnose(columns, {"loss_kind": "sigmoid"}).ids


@pytest.mark.parametrize(
    ("positives_by", "classes"),
    [("pair", False), ("class", True), ("overlap", True), ("weights", False), ("scores", False)],
)
def test_positives_by_class_is_what_the_log_says(positives_by: str, classes: bool) -> None:
    assert by_class(Signals(curve(positives_by=positives_by), {"loss": "my own"})) is classes
    assert by_class(Signals(curve(), {"loss": "supcon"})) is True
    assert by_class(Signals(curve(), {"loss": "infonce"})) is False
    assert by_class(Signals(curve())) is None


def test_the_floor_of_classes_is_ln_positives_where_none_is_logged() -> None:
    def floor(context: dict[str, Any], **fields: Any) -> float:
        (level,) = levels(Signals(curve(positives_per_row=7.0, **fields), context))
        return level.floor.mean()

    assert floor({"loss": "supcon"}) == pytest.approx(math.log(7))
    assert floor({}, positives_by="class") == pytest.approx(math.log(7))
    assert floor({"loss": "supcon"}, positives_by="pair") == 0.0
    assert floor({"loss": "supcon_inside"}, positives_by="class") == 0.0
    assert floor({}) == 0.0


def test_the_record_beside_an_objective_is_that_of_its_contrastive_term() -> None:
    step = {"first/raw": 4.16, "first/weight": 1.0, "second/raw": 0.4, "second/weight": 1.0, "candidates": 64}
    older = [step | {"loss": 4.56} for _ in range(20)]
    assert (
        "loss-at-chance" not in diagnose(older).ids
    )  # no name says which of the two the candidates belong to
    said = [each | {"first/loss_kind": "softmax", "second/loss_kind": "other"} for each in older]
    assert "loss-at-chance" in diagnose(said).ids
    named = [{key.replace("first", "contrastive"): value for key, value in each.items()} for each in older]
    assert "loss-at-chance" in diagnose(named).ids


# -- samplers ------------------------------------------------------------------------------------------------
def test_every_sampler_says_whether_it_composes_hard_batches() -> None:
    classes = [getattr(nearfar.batching, name) for name in nearfar.batching.__all__]
    samplers = [each for each in classes if isinstance(each, type) and issubclass(each, BatchSampler)]
    hard = {each.__name__ for each in samplers if each.composes_hard_batches}
    assert len(samplers) >= 6
    assert hard == {"HardNegativeSampler", "PartitionBatchSampler"}


def plans(hardness: float = 3.9, **fields: Any) -> list[dict[str, Any]]:
    """Epochs whose batches are no harder than random ones: an error for a sampler of hard batches."""
    return [
        {"epoch": epoch, "hardness": hardness, "hardness_random": 3.94}
        | {name: value[epoch - 1] if isinstance(value, list) else value for name, value in fields.items()}
        for epoch in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("fields", "context", "hard"),
    [
        # what the log says itself, whatever the name
        ({"sampler": "mine", "composes_hard_batches": True}, {}, True),
        ({"sampler": "hard", "composes_hard_batches": False}, {}, False),
        ({}, {"sampler": "mine", "composes_hard_batches": True}, True),
        ({"composes_hard_batches": False}, {"hard_ratio": 0.5}, False),
        # logs without it
        ({"sampler": "partition", "random_phase": False}, {"sampler": "partition"}, True),
        ({"sampler": "hard"}, {}, True),
        ({}, {"sampler": "hard"}, True),
        ({"sampler": "random"}, {"hard_ratio": 0.5}, False),
        ({"sampler": "balanced"}, {"hard_ratio": 0.5}, False),
        ({}, {"hard_ratio": 0.5}, True),
        ({}, {"hard_ratio": 0.0}, False),
        ({}, {}, True),
    ],
)
def test_whether_batches_were_meant_to_be_hard(
    fields: dict[str, Any], context: dict[str, Any], hard: bool
) -> None:
    signals = Signals(plans(**fields), context)
    assert means_hard(signals) is hard
    assert hard_epochs(signals, 2) is hard
    assert ("hardness-not-above-random" in diagnose(signals).ids) is hard


def test_the_switch_to_hard_batches_is_found_with_and_without_the_field() -> None:
    flags: list[dict[str, Any]] = [
        {"composes_hard_batches": [False, False, True], "sampler": "mine"},
        {"sampler": ["random", "random", "hard"]},
        {"composes_hard_batches": True, "random_phase": [True, True, False]},
    ]
    for fields in flags:
        signals = Signals(plans(**fields))
        assert switch_epoch(signals) == 3, fields
        assert [hard_epochs(signals, epoch) for epoch in (1, 2, 3)] == [False, False, True], fields
    curriculum = {"curriculum_epoch": 2}
    assert switch_epoch(Signals(plans(composes_hard_batches=True), curriculum)) == 3
    assert switch_epoch(Signals(plans(composes_hard_batches=False), curriculum)) is None
    assert switch_epoch(Signals(plans(sampler="random"), curriculum)) is None


# -- config.yaml ---------------------------------------------------------------------------------------------
def options(tmp_path: Path, config: dict[str, Any]) -> dict[str, Any]:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    context = read_run(tmp_path).context
    return {name: value for name, value in context.items() if name not in ("metrics", "splits")}


def test_one_rule_says_which_options_the_doctor_reads(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "batch_size": 64,
        "lr": 1e-3,
        "mask_duplicates": True,
        "trainer": {"precision": "32-true", "accumulate": 2, "epochs": 7},
        "sampler": {"name": "hard", "order": "level"},
        "loss": {"name": "supcon", "temperature": 0.2},
        "seed": 3,
    }
    assert options(tmp_path, config) == {
        "batch_size": 64, "lr": 1e-3, "mask_duplicates": True, "precision": "32-true", "accumulate": 2, "epochs": 7,
        "sampler": "hard", "order": "level", "loss": "supcon",
    }  # fmt: skip


def test_the_shortest_key_comes_first_and_a_wrong_type_does_not_count(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "epochs": [4, 2],
        "hard_ratio": "linear 0 -> 1",
        "trainer": {"epochs": 9},
        "monitor": "MRR",
        "evaluation": {"monitor": "AP"},
        "data": {"batch_size": 5},
        "loss": "infonce",
        "sampler": {"name": 3},
    }
    assert options(tmp_path, config) == {"epochs": 9, "monitor": "MRR", "loss": "infonce"}
