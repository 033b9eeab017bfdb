"""Every public function of the metrics, with every argument wrong in many ways: right, or an error that names it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import nearfar.metrics
from nearfar.errors import NearfarError
from nearfar.metrics import (
    Difference,
    Estimate,
    Ranks,
    RecallAtK,
    RetrievalScores,
    f1_micro,
    paired_difference,
)
from nearfar.metrics.classification import class_counts
from nearfar.metrics.detection import Boxes, detection_evidence

pd = pytest.importorskip("pandas")

GENERATOR = torch.Generator().manual_seed(0)
A, B = torch.randn(2, 8, 4, generator=GENERATOR)
SCORES = np.random.default_rng(0).random((3, 20))
COUNTS = np.ones((40, 2, 3))
CODES = np.array([[1, 0], [2, 1], [0, -1]])
ESTIMATE = Estimate(0.5, 0.4, 0.6, 0.1, 20, False, "R@1", {"gallery": 8, "split": "x", "confidence": 0.95})
DIFFERENCE = paired_difference(SCORES, SCORES[:, ::-1])
RANKS = Ranks.of([0, 3, 1], tied=[0, 0, 1], gallery=8)
QRELS = {"q1": {"d1": 2, "d2": 0}, "q2": {"d3": 1}}
LISTS = {"q1": {"d1": 0.5, "d4": 0.7}, "q2": {"d1": 1.0}}
# made by hand: what computes it is compiled, which collecting tests should not wait for
SCORED = RetrievalScores(
    {"MAP": SCORES[0], "nDCG@3": SCORES[1]}, {"MAP": SCORES[2], "nDCG@3": SCORES[2]}, np.arange(20)
)
SQUARES = np.array([[0.0, 0, 10, 10], [0, 0, 10, 10]])
TRUE = Boxes(SQUARES, np.zeros(2, int), np.arange(2), group=np.arange(2))
SEEN = Boxes(SQUARES + 1, np.zeros(2, int), np.arange(2), scores=np.array([0.9, 0.8]))
EVIDENCE = detection_evidence(SEEN, TRUE, 2, ("one", "other"))
MASK = torch.eye(4, dtype=torch.bool)

#: a valid call of every public name, and, where it is a class with methods, of those
CALLS: dict[str, dict[str, Any]] = {
    "Difference": {f.name: getattr(DIFFERENCE, f.name) for f in dataclasses.fields(Difference)},
    "Estimate": {f.name: getattr(ESTIMATE, f.name) for f in dataclasses.fields(Estimate)},
    "Estimate.from_dict": {"record": ESTIMATE.to_dict()},
    "Ranks": {f.name: getattr(RANKS, f.name) for f in dataclasses.fields(Ranks)},
    "Ranks.of": {"better": [0, 1], "tied": [0, 0], "gallery": 8},
    "RANKS.hits": {"k": 1},
    "RANKS.reciprocal": {"k": 3},
    "RANKS.order_statistic": {"place": 1.0},
    "RANKS.at_place": {"place": 1.5},
    "RecallAtK": {"k": 1},
    "RECALL.__call__": {"logits": A @ B.T, "targets": torch.arange(8).flip(0), "leave_one_out": False},
    "RECALL.estimate": {
        "logits": A @ B.T,
        "targets": torch.arange(8).flip(0),
        "leave_one_out": False,
        "confidence": 0.9,
        "split": "x",
    },
    "alignment": {"queries": A, "keys": B, "alpha": 2.0},
    "batch_signals": {"copies": MASK, "likely": MASK, "left_out": MASK},
    "bootstrap_mean": {"values": SCORES[0], "confidence": 0.9, "resamples": 200, "seed": 0, "method": "bca"},
    "by_group": {"counts": COUNTS[:3], "groups": ["a", "b", "a"]},
    "comparable": {"a": ESTIMATE, "b": ESTIMATE},
    "compare": {"a": ESTIMATE, "b": ESTIMATE},
    "count_estimate": {
        "counts": COUNTS,
        "statistic": f1_micro,
        "metric": "F1",
        "chance": 0.5,
        "split": "x",
        "protocol": {"images": 3},
        "confidence": 0.9,
        "resamples": 200,
        "seed": 0,
        "trivial": False,
    },
    "effective_rank": {"embeddings": A, "center": True},
    "embedding_health": {"views": {"a": A, "b": B}, "pairs": [("a", "b")], "k": 3},
    "f1_macro": {"sums": COUNTS[0]},
    "f1_micro": {"sums": COUNTS[0]},
    "few_runs": {"values": [0.3, 0.4], "confidence": 0.9},
    "group_signals": {
        "groups": ["a", "b", "a", "a"],
        "scores": np.ones(4),
        "anchors": np.array([0, 1]),
        "features": np.ones((4, 2)),
    },
    "holm": {"differences": {"a": DIFFERENCE}, "confidence": 0.9},
    "hubness": {"queries": A, "keys": B, "k": 3},
    "item_values": {"counts": COUNTS, "statistic": f1_micro},
    "map_at_r": {
        "embeddings": A,
        "labels": torch.tensor([0, 0, 1, 1, 2, 2, 0, 1]),
        "confidence": 0.9,
        "bootstrap": 200,
        "seed": 0,
        "split": "x",
    },
    "mean_cosine": {"embeddings": A},
    "mean_interval": {"values": SCORES[0], "confidence": 0.9, "resamples": 200, "seed": 0},
    "modality_gap": {"queries": A, "keys": B},
    "paired_difference": {
        "a": SCORES,
        "b": SCORES,
        "confidence": 0.9,
        "metric": "MRR",
        "higher_is_better": True,
    },
    "rank_estimates": {
        "ranks": RANKS,
        "ks": (1, 5),
        "confidence": 0.9,
        "bootstrap": 200,
        "seed": 0,
        "split": "x",
    },
    "retrieval_metrics": {
        "queries": A,
        "keys": B,
        "relevant": [[1], [2], [3], [4], [5], [6], [7], [0]],
        "ks": (1, 5),
        "metrics": ["MAP", "R@k"],
        "both": False,
        "normalize": True,
        "leave_one_out": True,
        "query_ids": None,
        "key_ids": None,
        "ties": "optimistic",
        "gain": "linear",
        "confidence": 0.9,
        "bootstrap": 200,
        "seed": 0,
        "split": "x",
        "tile": (4, 4),
    },
    "retrieval_ranks": {
        "queries": A,
        "keys": B,
        "relevant": [[1], [2], [3], [4], [5], [6], [7], [0]],
        "both": False,
        "normalize": True,
        "leave_one_out": True,
        "query_ids": None,
        "key_ids": None,
        "tile": (4, 4),
    },
    "RetrievalScores": {f.name: getattr(SCORED, f.name) for f in dataclasses.fields(RetrievalScores)},
    "SCORED.estimates": {"confidence": 0.9, "bootstrap": 200, "seed": 0, "split": "x"},
    "items_needed": {"difference": paired_difference(SCORES[0], SCORES[1]), "power": 0.8},
    "describe_ranking": {"ranking": LISTS, "qrels": QRELS, "documents": 9, "depth": 10},
    "score_ranking": {
        "ranking": LISTS,
        "qrels": QRELS,
        "metrics": ["MAP", "recall@k"],
        "ks": (1, 5),
        "documents": 9,
        "missing": "zero",
        "ties": "expected",
        "gain": "linear",
    },
    "score_retrieval": {
        "queries": A,
        "keys": B,
        "relevant": [[1], [2], [3], [4], [5], [6], [7], [0]],
        "metrics": ["MAP", "R@k"],
        "ks": (1, 5),
        "both": False,
        "normalize": True,
        "leave_one_out": True,
        "query_ids": None,
        "key_ids": None,
        "ties": "expected",
        "gain": "linear",
        "tile": (4, 4),
    },
    "seeds_interval": {"scores": SCORES, "confidence": 0.9},
    "share": {"sums": np.array([3.0, 4.0])},
    "split_hash": {"ids": ["a", "b"]},
    "uniformity": {"embeddings": A, "t": 2.0},
    "variance": {"embeddings": A},
    "wilson": {"share": 0.5, "n": 10, "confidence": 0.9},
    # -- nearfar.metrics.classification
    "calibration_counts": {
        "confidence": np.full((3, 2), 0.7),
        "right": np.ones((3, 2), bool),
        "known": np.ones((3, 2), bool),
        "bins": 10,
    },
    "class_counts": {"truth": CODES, "predicted": CODES, "classes": 3},
    "constant_detection": {"truth": CODES, "average": "micro"},
    "constant_pairs": {"truth": CODES, "pairs": np.array([[0, 1]]), "polarities": 2, "average": "micro"},
    "constant_polarity": {"truth": CODES, "polarities": 2},
    "detection_counts": {"truth": CODES, "predicted": CODES},
    "exact_counts": {"truth": CODES, "predicted": CODES},
    "expected_calibration_error": {"sums": np.ones((4, 3))},
    "pair_counts": {"truth": CODES, "predicted": CODES, "pairs": np.array([[0, 1]])},
    "weighted_f1": {"sums": np.ones((2, 4, 3))},
    # -- nearfar.metrics.detection and detection_estimates
    "Boxes": {
        "boxes": SQUARES,
        "labels": np.zeros(2, int),
        "picture": np.arange(2),
        "scores": np.ones(2),
        "crowd": np.zeros(2, bool),
        "group": np.arange(2),
    },
    "EVIDENCE.statistics": {"weights": np.ones((2, 2))},
    "EVIDENCE.resamples": {"rows": 3, "seed": 0},
    "box_overlap": {"detections": SQUARES, "true": SQUARES, "crowd": np.zeros(2, bool)},
    "detection_evidence": {"detections": SEEN, "true": TRUE, "n": 2, "groups": ("one", "other")},
    "detection_estimates": {
        "evidence": EVIDENCE,
        "split": "x",
        "chance": {"AP": 0.1},
        "resamples": 200,
        "confidence": 0.9,
        "seed": 0,
        "protocol": {"images": 3},
    },
    "detection_change": {
        "before": EVIDENCE,
        "after": EVIDENCE,
        "metric": "AP",
        "resamples": 200,
        "confidence": 0.9,
        "seed": 0,
    },
}
MODULES = [
    importlib.import_module(f"nearfar.metrics{name}") for name in ("", ".classification", ".detection")
]
#: what is made by other functions, and a table
MADE = {"IOUS", "DetectionEvidence", "Change"}
#: steps between a system and a metric, which nobody calls with what a user gives
STEPS = {
    "constant_boxes",
    "detection_boxes",
    "fitted_temperature",
    "gap_closed",
    "ordered",
    "predicted_boxes",
    "probabilities",
    "true_boxes",
}
OBJECTS = {
    "SCORED": SCORED,
    "RANKS": RANKS,
    "RECALL": RecallAtK(1),
    "EVIDENCE": EVIDENCE,
    "Estimate": Estimate,
    "Ranks": Ranks,
}

WRONG: dict[str, Any] = {
    "None": None,
    "text": "text",
    "empty text": "",
    "object": object(),
    "class": int,
    "ragged": [[1, 2], [3]],
    "fraction": 0.37,
    "negative": -3,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "large": 10**400,
    "True": True,
    "complex": 1 + 2j,
    "dictionary": {"a": 1},
    "nested dictionary": {"a": {"b": 1.5}},
    "set": {1, 2},
    "generator": "GENERATOR",  # made for each call
    "empty list": [],
    "texts": ["a", "b"],
    "list with None": [1, None],
    "list with NaN": [1.0, float("nan")],
    "array with NaN": np.array([[np.nan, 1.0], [1.0, 2.0]]),
    "objects": np.array([object(), None], dtype=object),
    "text array": np.array(["a", "b"]),
    "complex array": np.ones((2, 2), dtype=complex),
    "dates": np.array(["2026-01-01"], dtype="datetime64[D]"),
    "empty array": np.zeros((0, 3)),
    "cube": np.ones((2, 2, 2)),
    "Boolean": np.ones(2, dtype=bool),
    "unsigned": np.array([255, 3], dtype=np.uint8),
    "table": pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}),
    "number table": pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, np.nan]}),
    "nullable": pd.Series([1, None], dtype="Int64"),
    "tensor": torch.ones(2, 3, 4),
    "0-d tensor": torch.tensor(1.5),
    "sparse": torch.eye(3).to_sparse(),
    "meta": torch.ones(2, 2, device="meta"),
    "complex tensor": torch.ones(2, 2, dtype=torch.complex64),
    "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    "module": torch.nn.Linear(1, 1),
    "bytes": b"12",
    "function": len,
    "estimate": ESTIMATE,
}


def target(name: str) -> Callable[..., Any]:
    if "." in name:
        owner, method = name.split(".")
        return getattr(OBJECTS[owner], method)
    return next(getattr(module, name) for module in MODULES if name in module.__all__)


def test_every_public_name_is_in_the_table():
    public = {name for module in MODULES for name in module.__all__} - MADE - STEPS
    assert public == {name for name in CALLS if "." not in name}
    for name, arguments in CALLS.items():
        parameters = [
            p.name
            for p in inspect.signature(target(name)).parameters.values()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        assert parameters == list(arguments), name


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_valid(name):
    target(name)(**CALLS[name])


#: what an error may call an argument beside its name
ALSO = {("Estimate.from_dict", "record"): "missing in", ("split_hash", "ids"): ""}


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, call in CALLS.items() for a in call])
def test_a_wrong_argument_is_named(name, argument):
    function = target(name)
    for kind, wrong in WRONG.items():
        if name == "split_hash":
            continue  # takes ids of any kind; what it refuses is tested with it
        value = (i for i in range(3)) if kind == "generator" else wrong
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                function(**{**CALLS[name], argument: value})
            except NearfarError as error:
                words = str(error)
                assert argument in words or ALSO.get((name, argument), argument) in words, f"{kind}: {words}"
            except Exception as error:
                pytest.fail(f"{name}({argument}={kind}): {type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: nearfar.metrics.mean_interval([0.5, 1.2, -0.1]),
            "values holds 2 of 3 values outside 0 to 1",
        ),
        (lambda: nearfar.metrics.mean_interval([0.5, np.nan]), "values holds 1 of 2 values that are NaN"),
        (lambda: nearfar.metrics.mean_interval([]), "values is empty"),
        (lambda: nearfar.metrics.few_runs([0.1, np.inf]), "values holds 1 of 2"),
        (lambda: nearfar.metrics.bootstrap_mean([0.1, np.nan]), "values holds 1 of 2"),
        (lambda: nearfar.metrics.bootstrap_mean([0.1, 0.2], resamples=10), "resamples is 10"),
        (lambda: nearfar.metrics.seeds_interval(np.full((2, 3), np.nan)), "scores holds 6 of 6"),
        (lambda: nearfar.metrics.seeds_interval(np.ones(3)), "seeds, items"),
        (lambda: nearfar.metrics.wilson(1.2, 3), "share is 1.2"),
        (lambda: nearfar.metrics.wilson(0.2, 0), "n is 0"),
        (lambda: nearfar.metrics.wilson(0.2, 10, 95), "confidence is 95"),
        (lambda: nearfar.metrics.retrieval_metrics(A, B, normalize="no"), "normalize is 'no'"),
        (lambda: nearfar.metrics.retrieval_metrics(A, B, bootstrap=10), "bootstrap is 10"),
        (lambda: nearfar.metrics.retrieval_metrics(A, B, ks="10"), "ks is '10'"),
        (lambda: nearfar.metrics.retrieval_metrics(A, B[:, :3]), "4 dimensions and keys 3"),
        (lambda: nearfar.metrics.by_group(COUNTS[:2], ["a", None]), "no name in 1 of 2 rows"),
        (lambda: class_counts(CODES, CODES + 1, 3), "predicted holds the code 3"),
        (lambda: Estimate.from_dict({**ESTIMATE.to_dict(), "trivial": "false"}), "trivial is 'false'"),
        (lambda: Estimate.from_dict({**ESTIMATE.to_dict(), "value": "high"}), "value is 'high'"),
    ],
)
def test_wrong_values_are_named(call, words):
    with pytest.raises(NearfarError, match=words):
        call()


@pytest.mark.parametrize(
    "ks", [5, np.int64(5), (5, 5), [np.int32(5)], np.array([5]), torch.tensor([5]), range(5, 6)]
)
def test_cut_offs_in_every_form(ks):
    assert nearfar.metrics.retrieval_metrics(A, B, ks=ks).keys() == {"R@5", "MRR", "median_rank"}
    assert nearfar.metrics.retrieval_metrics(A, B, ks=ks)["R@5"].trivial is False


@pytest.mark.slow
def test_embeddings_of_every_kind():
    """Lists, tables, whole numbers and turned arrays are read as what they are."""
    a, b = torch.randint(-9, 9, (2, 8, 4), generator=GENERATOR)
    expected = nearfar.metrics.retrieval_ranks(a.double(), b.double())
    for made in (
        lambda x: x,
        lambda x: x.int(),
        lambda x: x.numpy(),
        lambda x: x.numpy().astype(np.int8),
        lambda x: x.tolist(),
        lambda x: x.half(),
        lambda x: x.numpy().astype(">f4"),
        lambda x: x.numpy()[::-1][::-1].astype(float)[::-1][::-1],
        lambda x: np.asfortranarray(x.numpy().astype(np.float32)),
        lambda x: list(x.float()),
        lambda x: pd.DataFrame(x.numpy()),
    ):
        np.testing.assert_array_equal(
            nearfar.metrics.retrieval_ranks(made(a), made(b)).better, expected.better
        )
    mixed = nearfar.metrics.retrieval_ranks(a.half(), b.double())
    np.testing.assert_array_equal(mixed.better, expected.better)
    upside_down = a.numpy().astype(float)[::-1]
    nearfar.metrics.retrieval_ranks(upside_down, b)


def test_numbers_of_an_estimate_are_plain():
    import json

    estimate = Estimate(
        np.float32(0.5), 0, torch.tensor(1.0), np.float64(0.1), np.int64(3), np.bool_(True), "R@1"
    )
    json.dumps(estimate.to_dict())
    assert str(estimate) == "R@1 .5000 [0, 1] (chance .1, n 3, trivial)" or "R@1" in str(estimate)
    assert type(estimate.low) is float
    assert type(estimate.trivial) is bool
