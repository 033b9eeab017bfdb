"""Every public function answers an argument of a wrong type with a ``NearfarError`` that names it, or takes it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import nearfar.arguments
import nearfar.doctor
import nearfar.functional
import nearfar.labels
import nearfar.losses
import nearfar.models
import nearfar.schedules
from nearfar import functional, losses, schedules
from nearfar.batching import BalancedBatchSampler
from nearfar.contrast import OwnPair, SameClass
from nearfar.doctor import Signals, diagnose, read_run
from nearfar.errors import NearfarError
from nearfar.labels import apart, label_codes, label_tensor, missing_labels, whole_labels
from nearfar.models import ProjectionHead

MODULES = (nearfar.losses, nearfar.functional, nearfar.schedules, nearfar.doctor, nearfar.models)

Z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
QUEUE = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
SCORES = torch.linspace(0, 1, 6)
MASK = torch.zeros(6, 6, dtype=torch.bool)
INDEX, ALPHA = torch.tensor([[1]] * 6), torch.ones(6, 1)
LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))

#: what people pass by mistake
WRONG: dict[str, Any] = {
    "nothing": None,
    "text": "text",
    "an object": object(),
    "a ragged list": [[1.0], [1.0, 2.0]],
    "a list": [1.0, 2.0],
    "a list of flags": [True, False],
    "a dictionary": {"a": 1},
    "a number": 3.5,
    "minus one": -1,
    "NaN": float("nan"),
    "a flag": True,
    "a function": len,
    "a type": int,
    "a table": pd.DataFrame({"a": [1.0, 2.0]}),
    "a column": pd.Series([1.0, 2.0]),
    "an array": np.ones((6, 4)),
    "a text array": np.array(["a", "b"]),
    "whole numbers": torch.ones(6, 4, dtype=torch.int64),
    "bytes": torch.ones(6, 6, dtype=torch.uint8),
    "flags": torch.ones(3, dtype=torch.bool),
    "a scalar": torch.tensor(1.5),
    "one axis": torch.ones(6),
    "three axes": torch.ones(2, 3, 4),
    "complex": torch.ones(6, 4, dtype=torch.complex64),
    "nothing in it": torch.ones(0, 0),
    "a NaN tensor": torch.full((), float("nan")),
}


def module(kind: type, **options: Any) -> Callable[..., Any]:
    """A loss as a function of what it is called with."""
    return lambda **given: kind(**options)(**given)


def method(thing: Any, name: str) -> Callable[..., Any]:
    return lambda **given: getattr(thing(), name)(**given)


PAIR = {"a": Z, "b": OTHER}
VIEWS = {"image": Z, "text": OTHER, "logit_scale": 10.0}
SOFTMAX = {"temperature": 0.1, "normalize": True}
SPLIT = {
    "temperature": 0.1, "top_fraction": 0.4, "bottom_fraction": 0.4, "min_samples": 2, "middle": "ignore",
    "detach_positives": False, "threshold": None, "normalize": True,
}  # fmt: skip
NCE = {
    "symmetric": True, "in_batch": True, "denominator": "all", "reduction": "mean", "tau_plus": 0.1, "beta": 1.0,
} | SOFTMAX  # fmt: skip
SUPCON = {
    "sum": "outside",
    "own_pair": True,
    "denominator": "all",
    "reduction": "mean",
    "in_batch": True,
} | SOFTMAX
MULTI = {"weights": "jaccard", "sum": None, "neutral": 0} | SOFTMAX
SPATIAL = {
    "neighbor_alpha_scale": 0.5, "temp_reg_weight": 0.0, "neighbors": "soft", "max_scale": None, "normalize": True,
}  # fmt: skip
PLACES = {"neighbor_index": INDEX, "neighbor_alpha": ALPHA}
HOT = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0], [0, 1], [1, 1]])
FOCAL = {"gamma": 2.0, "alpha": None, "reduction": "mean", "ignore_index": -100}
GAP = {"form": "exact", "detach_upper": True}
PARTS: dict[str, Any] = {"rows": None, "tile": None}
TERMS = {"values": {"a": Z.sum()}, "position": 0.0, "total": 3.0, "on": None}


def memory() -> losses.CrossBatchMemory:
    kept = losses.CrossBatchMemory(5, 4, ids=True)
    kept.push(QUEUE, torch.arange(5))
    return kept


#: how each public name is called rightly; several calls where it is made and then called
CALLS: dict[str, list[tuple[Callable[..., Any], dict[str, Any]]]] = {
    "info_nce": [
        (functional.info_nce, PAIR | NCE | PARTS | {"scale": None, "mask": MASK, "negatives": None}),
        (functional.info_nce, PAIR | {"symmetric": False, "negatives": QUEUE, "negatives_mask": MASK[:, :5]}),
    ],
    "distillation": [
        (
            functional.distillation,
            PAIR | {"teacher": Z @ OTHER.T, "temperature": 0.1, "teacher_temperature": 0.2, "scale": None, "rows": None}
            | {"symmetric": True, "normalize": True},
        ),
    ],
    "margin_mse": [
        (
            functional.margin_mse,
            PAIR | {"negatives": OTHER.unsqueeze(1), "margins": torch.ones(6, 1), "scale": 1.0, "normalize": True}
            | {"rows": None},
        ),
    ],
    "clip": [(functional.clip, VIEWS | {"max_scale": 100.0, "normalize": True, "mask": MASK, "rows": None})],
    "siglip": [
        (functional.siglip, PAIR | PARTS | {"logit_scale": 10.0, "logit_bias": -10.0, "normalize": True, "mask": MASK})
    ],
    "supcon": [
        (functional.supcon, SUPCON | PARTS | {"z": Z, "labels": LABELS, "other": OTHER, "mask": MASK}),
        (functional.supcon, {"z": Z, "labels": LABELS, "memory": QUEUE, "memory_labels": LABELS[:5]}),
        (functional.supcon, {"z": Z, "positives": MASK}),
    ],
    "multi_label_supcon": [
        (functional.multi_label_supcon, MULTI | PARTS | {"z": Z, "labels": HOT}),
        (functional.multi_label_supcon, {"z": Z, "labels": HOT, "weights": "legacy", "neutral": 0}),
    ],
    "target_loss": [
        (losses.target_loss, PARTS | {"a": Z, "b": OTHER, "target": OwnPair(6), "mask": MASK, "scale": 10.0,
                              "both": True}),
        (losses.target_loss, {"a": Z, "b": None, "target": SameClass(LABELS), "temperature": 0.1, "sum": "inside",
                              "without_self": True, "normalize": True}),
    ],
    "spatial": [(functional.spatial, VIEWS | PLACES | SPATIAL | PARTS)],
    "adaptive_score_contrastive": [(functional.adaptive_score_contrastive, SPLIT | {"z": Z, "scores": SCORES})],
    "bidirectional_score_contrastive": [
        (
            functional.bidirectional_score_contrastive,
            SPLIT | {"z": Z, "scores": SCORES, "anchor_weight": 1.0, "positive_weight": 0.3},
        )
    ],
    "focal_loss": [(functional.focal_loss, FOCAL | {"logits": LOGITS, "labels": LABELS})],
    "focal_alpha": [(functional.focal_alpha, {"counts": [80, 20], "normalized": False})],
    "wasserstein_gap": [(functional.wasserstein_gap, GAP | {"lower_scores": SCORES, "upper_scores": SCORES})],
    "InfoNCELoss": [
        (losses.InfoNCELoss, NCE),
        (module(losses.InfoNCELoss), PAIR | {"mask": MASK, "scale": 10.0, "rows": None}),
        (
            module(losses.InfoNCELoss, symmetric=False),
            PAIR | {"negatives": QUEUE, "negatives_mask": MASK[:, :5]},
        ),
    ],
    "DistillationLoss": [
        (
            losses.DistillationLoss,
            {"temperature": 0.1, "teacher_temperature": 0.2, "symmetric": True, "normalize": True},
        ),
        (module(losses.DistillationLoss), PAIR | {"teacher": Z @ OTHER.T, "scale": 10.0, "rows": None}),
    ],
    "MarginMSELoss": [
        (losses.MarginMSELoss, {"scale": 1.0, "normalize": True}),
        (
            module(losses.MarginMSELoss),
            PAIR | {"negatives": OTHER.unsqueeze(1), "margins": torch.ones(6, 1), "rows": None},
        ),
    ],
    "MatryoshkaLoss": [
        (
            losses.MatryoshkaLoss,
            {"loss": losses.InfoNCELoss(), "dims": [2, 3], "weights": [1.0, 0.5], "embeddings": ["a", "b"]},
        ),
        (module(losses.MatryoshkaLoss, loss=losses.InfoNCELoss(), dims=[2]), PAIR),
    ],
    "ClipLoss": [
        (losses.ClipLoss, {"max_scale": 100.0, "normalize": True}),
        (module(losses.ClipLoss), VIEWS | {"mask": MASK, "rows": None}),
        (module(losses.ClipLoss, max_scale=100), VIEWS),
    ],
    "SigLipLoss": [
        (losses.SigLipLoss, {"normalize": True}),
        (module(losses.SigLipLoss), PAIR | {"logit_scale": 10.0, "logit_bias": -10.0, "mask": MASK, "rows": None}),
    ],
    "SupConLoss": [
        (losses.SupConLoss, SUPCON),
        (module(losses.SupConLoss), {"z": Z, "labels": LABELS, "other": OTHER, "mask": MASK, "rows": None}),
        (module(losses.SupConLoss), {"z": Z, "labels": LABELS, "memory": QUEUE, "memory_labels": LABELS[:5]}),
        (module(losses.SupConLoss), {"z": Z, "positives": MASK}),
    ],
    "MultiLabelSupConLoss": [
        (losses.MultiLabelSupConLoss, MULTI),
        (module(losses.MultiLabelSupConLoss), {"z": Z, "labels": HOT, "rows": None}),
    ],
    "SpatialLoss": [
        (losses.SpatialLoss, SPATIAL),
        (module(losses.SpatialLoss, temp_reg_weight=0), VIEWS | PLACES | {"rows": None}),
        (module(losses.SpatialLoss, neighbors="mask"), VIEWS | PLACES),
    ],
    "AdaptiveScoreContrastiveLoss": [
        (losses.AdaptiveScoreContrastiveLoss, SPLIT),
        (module(losses.AdaptiveScoreContrastiveLoss), {"z": Z, "scores": SCORES}),
    ],
    "BidirectionalScoreContrastiveLoss": [
        (losses.BidirectionalScoreContrastiveLoss, SPLIT | {"anchor_weight": 1.0, "positive_weight": 0.3}),
        (module(losses.BidirectionalScoreContrastiveLoss), {"z": Z, "scores": SCORES}),
    ],
    "FocalLoss": [
        (losses.FocalLoss, FOCAL),
        (module(losses.FocalLoss), {"logits": LOGITS, "labels": LABELS}),
    ],
    "WassersteinGapLoss": [
        (losses.WassersteinGapLoss, GAP | {"queue_size": 4, "rescale_gradient": False}),
        (module(losses.WassersteinGapLoss, queue_size=4), {"lower_scores": SCORES, "upper_scores": SCORES}),
    ],
    "Objective": [
        (losses.Objective, {"terms": {"a": 1.0}}),
        (module(losses.Objective, terms={"a": "linear 0 -> 1"}), TERMS),
        (
            method(lambda: losses.Objective({"a": 1.0}), "measure_shares"),
            {"values": {"a": (Z.clone().requires_grad_() ** 2).sum()}, "on": Z.clone().requires_grad_()},
        ),
    ],
    "CrossBatchMemory": [
        (losses.CrossBatchMemory, {"size": 5, "dim": 4, "ids": False}),
        (method(memory, "push"), {"features": QUEUE, "ids": torch.arange(5)}),
        (method(memory, "same"), {"ids": torch.arange(3)}),
    ],
    "ViewLoss": [
        (
            losses.ViewLoss,
            {
                "name": "supcon", "temperature": 0.1, "symmetric": True, "sum": "outside", "own_pair": True,
                "anchor": None, "pairs": [("a", "b")],
            },
        ),
        (
            losses.ViewLoss,
            {
                "tau_plus": 0.1, "beta": 0.5, "dims": [2, 4], "distill": 1.0, "teacher_temperature": 0.1,
                "margin": 1.0, "margin_scale": 2.0,
            },
        ),
        (
            module(losses.ViewLoss),
            {"views": PAIR, "context": losses.ViewContext(), "scale": 10.0, "bias": None, "memory": None},
        ),
        (module(losses.ViewLoss, name="siglip"), {"views": PAIR, "scale": 10.0, "bias": -10.0}),
    ],
    "DuplicateMask": [(losses.DuplicateMask, {"labels": LABELS, "key_labels": LABELS})],
    "SimilarityMask": [(losses.SimilarityMask, {"reference": Z, "threshold": 0.9})],
    "GuideMask": [
        (losses.GuideMask, {"queries": Z, "keys": OTHER, "margin": 0.1, "kind": "relative", "softness": 0.1})
    ],
    "NegativeWeights": [(losses.NegativeWeights, {"matrix": torch.ones(6, 6), "back": torch.ones(6, 6)})],
    "IndexMask": [(losses.IndexMask, {"index": INDEX})],
    "PairMask": [(losses.PairMask, {"items": torch.arange(6), "others": INDEX})],
    "duplicate_mask": [(losses.duplicate_mask, {"labels": LABELS})],
    "explain_batch": [
        (
            losses.explain_batch,
            {
                "queries": Z, "keys": OTHER, "temperature": 0.1, "masks": {"same": MASK}, "shown": list("abcdef"),
                "key_shown": list("abcdef"), "suspect": {"alike": MASK}, "margin": 0.0, "rows": [0], "k": 2,
            },
        ),
        (losses.explain_batch, {"queries": Z, "labels": LABELS, "key_labels": None, "k": 2}),
        (losses.explain_batch, {"similarities": Z @ OTHER.T, "positives": torch.eye(6, dtype=torch.bool)}),
    ],
    "false_negative_mask": [(losses.false_negative_mask, {"text": Z, "threshold": 0.9})],
    "Constant": [
        (schedules.Constant, {"value": 1.0}),
        (lambda **given: schedules.Constant(1.0)(**given), {"epoch": 0.0, "total": 3.0}),
    ],
    "Linear": [
        (schedules.Linear, {"start": 0.0, "end": 1.0}),
        (lambda **given: schedules.Linear(0, 1)(**given), {"epoch": 0.0, "total": 3.0}),
    ],
    "Step": [
        (schedules.Step, {"values": [0.0, 1.0]}),
        (lambda **given: schedules.Step([0, 1])(**given), {"epoch": 0.0, "total": 3.0}),
    ],
    "Piecewise": [
        (schedules.Piecewise, {"points": [(0, 1.0)], "interpolation": "step"}),
        (lambda **given: schedules.Piecewise([(0, 1), (5, 2)])(**given), {"epoch": 0.0, "total": 3.0}),
    ],
    "schedule": [(schedules.schedule, {"spec": 1.0, "integer": True})],
    "learning_rate_factor": [
        (schedules.learning_rate_factor, {"name": "cosine", "warmup": 0.1, "final": 0.0}),
        (lambda **given: schedules.learning_rate_factor()(**given), {"step": 1, "total": 10}),
    ],
    "diagnose": [(diagnose, {"signals": {"loss": [1.0, 2.0]}, "context": {"batch_size": 8}})],
    "Signals": [(Signals, {"records": [{"loss": 1.0}], "context": {"batch_size": 8}})],
    "ProjectionHead": [
        (
            lambda in_features, hidden, out_features, **options: ProjectionHead(
                in_features, hidden, out_features, **options
            ),
            {
                "in_features": 4, "hidden": 8, "out_features": 2, "dropout": 0.1, "norm": "layer",
                "activation": "relu",
            },
        ),
        (lambda x: ProjectionHead(4, 8, 2)(x), {"x": Z}),
    ],
    "BalancedBatchSampler": [
        (
            BalancedBatchSampler,
            {
                "labels": [0, 1] * 5, "batch_size": 4, "samples_per_class": 2, "repeat": False, "seed": 0,
                "drop_last": False, "rank": 0, "world_size": 1, "ids": None,
            },
        )
    ],
    "label_codes": [(label_codes, {"labels": [0, 1]})],
    "label_tensor": [(label_tensor, {"labels": [0, 1]})],
    "whole_labels": [(whole_labels, {"labels": LABELS})],
    "apart": [(apart, {"labels": LABELS})],
    "missing_labels": [(missing_labels, {"labels": LABELS})],
}  # fmt: skip

#: data that a call returns or takes, warnings and bases: nothing is checked when they are made
DATA = {
    "CONTEXT", "FIELDS", "RULES", "ContrastiveLoss", "Diagnosis", "Finding", "FocalRecord", "GradientShares",
    "LossTraits", "NoNegativesWarning", "NoPositivesWarning", "ObjectiveRecord", "Record", "Rectangle",
    "BatchExplanation", "Requires", "Rule", "Schedule", "Target", "Unjudged", "ViewContext",
    "WassersteinRecord",
    "read_run",  # takes a path alone, see below
}  # fmt: skip


#: what stands in an argument that is read, and is said in place of its name
SHOWN = {
    ("schedule", "spec"): ["schedule 'text'"],
    ("diagnose", "signals"): ["text is not a run", "record 1 of the log"],
    ("Signals", "records"): ["record 1 of the log"],
}


def test_every_public_name_is_in_the_table() -> None:
    public = {name for package in MODULES for name in package.__all__} | {"BalancedBatchSampler"}
    missing = public - CALLS.keys() - DATA
    assert not missing, f"say in CALLS how these are called: {sorted(missing)}"
    for name in ("temperature", "normalize", "mask", "labels", "max_scale"):
        assert any(name in given for calls in CALLS.values() for _, given in calls)


def test_every_parameter_of_a_loss_is_in_the_table() -> None:
    for name, calls in CALLS.items():
        target = getattr(nearfar.functional, name, None) or getattr(nearfar.losses, name, None)
        if target is None:
            continue
        asked = {argument for _, given in calls for argument in given}
        functions = [target] if inspect.isfunction(target) else [target.__init__, target.forward] if (
            hasattr(target, "forward")
        ) else [target.__init__]  # fmt: skip
        for function in functions:
            if getattr(function, "__name__", "") == "_forward_unimplemented":
                continue
            parameters = inspect.signature(function).parameters.values()
            named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            wanted = named - {"self"}
            assert wanted <= asked, f"{name}: {sorted(wanted - asked)}"


def answer(call: Callable[..., Any], given: dict[str, Any]) -> str | None:
    """What a call says where it is refused; None where it is taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(**given)
        except NearfarError as error:
            return str(error)
    return None


@pytest.mark.parametrize("name", CALLS)
def test_the_right_call_is_taken(name: str) -> None:
    for call, given in CALLS[name]:
        assert answer(call, given) is None


@pytest.mark.parametrize(
    ("name", "at", "argument"),
    [(name, at, a) for name, calls in CALLS.items() for at, (_, given) in enumerate(calls) for a in given],
)
def test_a_wrong_argument_is_taken_or_named(name: str, at: int, argument: str) -> None:
    call, given = CALLS[name][at]
    words = [argument, *SHOWN.get((name, argument), [])]
    for what, wrong in WRONG.items():
        text = answer(call, given | {argument: wrong})
        assert text is None or any(word in text for word in words), f"{name}({argument}={what}): {text}"


@pytest.mark.parametrize("flag", ["false", 0, 1, None, "no"])
def test_a_flag_is_true_or_false(flag: Any) -> None:
    for call in (lambda: losses.InfoNCELoss(normalize=flag), lambda: losses.SupConLoss(own_pair=flag)):
        with pytest.raises(NearfarError, match="it is True or False"):
            call()


@pytest.mark.parametrize("value", [None, 0.0, -1.0, float("nan"), float("inf"), torch.ones(2), True, "10"])
def test_no_scale_and_no_temperature_is_guessed(value: Any) -> None:
    for call in (
        lambda: losses.InfoNCELoss(temperature=value),
        lambda: losses.SupConLoss(temperature=value),
        lambda: losses.MultiLabelSupConLoss(temperature=value),
        lambda: losses.AdaptiveScoreContrastiveLoss(temperature=value),
    ):
        with pytest.raises(NearfarError, match="temperature"):
            call()
    for call in (
        lambda: losses.ClipLoss()(Z, OTHER, value),
        lambda: losses.ClipLoss(max_scale=100)(Z, OTHER, value),
        lambda: losses.SigLipLoss()(Z, OTHER, value),
        lambda: losses.SpatialLoss()(Z, OTHER, value, INDEX, ALPHA),
        lambda: functional.clip(Z, OTHER, value),
    ):
        with pytest.raises(NearfarError, match="logit_scale"):
            call()


def test_a_run_that_is_none_is_named() -> None:
    with pytest.raises(NearfarError, match="there is no such folder"):
        read_run("nowhere")
    with pytest.raises(NearfarError, match="folder is NoneType"):
        read_run(None)
