"""A wrong type is answered with a ``NearfarError`` that names the argument, in every public function of batching."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import nearfar.batching
from nearfar.batching import (
    HardNegativeSampler,
    Layout,
    LengthBatchSampler,
    MappedNeighbors,
    Neighbors,
    PartitionBatchSampler,
    Plan,
    RandomBatchSampler,
    SpatialBatchSampler,
    check_harder_than_random,
    in_batch_similarity,
    measure_hardness,
    nearest_neighbors,
    nearest_neighbors_on_disk,
    positions_in_batch,
    verify_sampler,
    weight_in_batch,
)
from nearfar.batching.base import BatchSampler
from nearfar.errors import NearfarError

N = 12
RING = np.array([[(i + 1) % N, (i + 2) % N] for i in range(N)])
VALUES = np.tile([0.9, 0.5], (N, 1))
LISTED = Neighbors(RING, VALUES, ids=list(range(N)))
XY = np.random.default_rng(0).random((N, 2))
ON_DISK = nearest_neighbors_on_disk(XY, 2, tempfile.mkdtemp()).folder
LAYOUT = Layout(N, 4)
PLAN = RandomBatchSampler(N, 4).plan()

RAGGED = [[1, 2], [3]]
FRAME = pd.DataFrame({"a": ["x", "y"], "b": [1, 2]})
OBJECTS = np.array([object(), None])
NOT_WHOLE = [
    None,
    "4",
    2.5,
    float("nan"),
    -1,
    [4],
    RAGGED,
    OBJECTS,
    FRAME,
    True,
    torch.tensor(1.5),
    torch.tensor([4]),
    {},
]
NOT_A_NUMBER = ["0.5", float("nan"), [0.5], RAGGED, OBJECTS, FRAME, True, torch.ones(2), {}, object()]
NOT_AN_ARRAY = [None, "abc", 3, RAGGED, OBJECTS, FRAME, {}, object(), [["a", "b"]], torch.ones(2, 2, 2)]
NOT_POSITIONS = [*NOT_AN_ARRAY, RING.astype(float), np.full((N, 2), 99), [[None]] * N]
NOT_IDS = ["abc", 3, RAGGED, OBJECTS, FRAME, {}, object(), [None] * N, np.zeros((N, 2)), [{}] * N]
NOT_A_FLAG = ["no", 1, None, 0.0, [True], np.array([True, False])]
NOT_A_PLAN = [None, "plan", 3, LAYOUT, FRAME, [[0, 1]]]

COMMON: dict[str, list[Any]] = {
    "batch_size": NOT_WHOLE,
    "seed": NOT_WHOLE,
    "drop_last": NOT_A_FLAG,
    "rank": NOT_WHOLE,
    "world_size": NOT_WHOLE,
    "ids": NOT_IDS,
}
SIMILAR: dict[str, list[Any]] = {
    "neighbors": NOT_POSITIONS,
    "group_size": [x for x in NOT_WHOLE if x is not None],
    "curriculum_epoch": NOT_WHOLE,
    "false_negative_threshold": NOT_A_NUMBER,
}


def sampler_of(kind: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    return lambda **arguments: kind(**{"batch_size": 4, **fixed, **arguments})


#: name → a call with good arguments, and the wrong values of each argument
CASES: dict[str, tuple[Callable[..., Any], dict[str, list[Any]]]] = {
    "BatchSampler": (sampler_of(BatchSampler, n=N), {"n": NOT_WHOLE, **COMMON}),
    "RandomBatchSampler": (sampler_of(RandomBatchSampler, n=N), {"n": NOT_WHOLE, **COMMON}),
    "HardNegativeSampler": (
        sampler_of(HardNegativeSampler, neighbors=LISTED, ids=None),
        {
            **COMMON,
            **SIMILAR,
            "hard_ratio": [None, -0.1, 1.5, *NOT_A_NUMBER],
            "hardness_k": [x for x in NOT_WHOLE if x is not None],
            "order": [None, 3, "levle", ["level"], np.array(["level", "greedy"])],
        },
    ),
    "PartitionBatchSampler": (
        sampler_of(PartitionBatchSampler, neighbors=LISTED),
        {**COMMON, **SIMILAR, "passes": NOT_WHOLE},
    ),
    "SpatialBatchSampler": (
        sampler_of(SpatialBatchSampler, positions=XY, slides=None),
        {
            **COMMON,
            "positions": [*NOT_AN_ARRAY, np.full((N, 2), np.nan)],
            "slides": [*NOT_IDS, ["a", 1] * (N // 2)],
            "tile_size": [x for x in NOT_WHOLE if x is not None],
        },
    ),
    "LengthBatchSampler": (
        sampler_of(LengthBatchSampler, lengths=list(range(N))),
        {
            **COMMON,
            "lengths": [*NOT_AN_ARRAY, [float("nan")] * N, [None] * N],
            "repeats": [*NOT_AN_ARRAY[1:], [0] * N, [1.5] * N, [None] * N],
            "window": NOT_WHOLE,
        },
    ),
    "Layout": (
        lambda **a: Layout(**{"n": N, "batch_size": 4, **a}),
        {"n": NOT_WHOLE, "batch_size": NOT_WHOLE, "world_size": NOT_WHOLE, "drop_last": NOT_A_FLAG},
    ),
    "Layout.slots": (lambda **a: LAYOUT.slots(**a), {"group_size": NOT_WHOLE}),
    "Plan": (
        lambda **a: Plan(**{"layout": LAYOUT, "order": np.arange(N), **a}),
        {
            "layout": [None, N, "layout"],
            "order": [*NOT_AN_ARRAY, [99] * N],
            "hard": [3, "no", RAGGED, np.ones(N)],
        },
    ),
    "Plan.batch": (
        lambda **a: PLAN.batch(**{"step": 0, **a}),
        {"step": [*NOT_WHOLE, 99], "rank": [*NOT_WHOLE, 9]},
    ),
    "Neighbors": (
        lambda **a: Neighbors(**{"indices": RING, "similarities": VALUES, **a}),
        {
            "indices": NOT_POSITIONS,
            "similarities": [*NOT_AN_ARRAY[1:], VALUES[:3], np.full((N, 2), np.nan)],
            "ids": NOT_IDS,
        },
    ),
    "Neighbors.check_ids": (lambda ids: LISTED.check_ids(ids), {"ids": [None, *NOT_IDS]}),
    "Neighbors.aligned_to": (lambda ids: LISTED.aligned_to(ids), {"ids": [None, *NOT_IDS]}),
    "Neighbors.too_close": (lambda threshold: LISTED.too_close(threshold), {"threshold": NOT_A_NUMBER}),
    "nearest_neighbors": (
        lambda **a: nearest_neighbors(**{"embeddings": XY, "k": 2, **a}),
        {
            "embeddings": [*NOT_AN_ARRAY, np.full((N, 2), np.nan), XY > 0, XY[0]],
            "k": [*NOT_WHOLE, N],
            "metric": [None, 3, "cosin", ["dot"]],
            "exact": ["no", 1, [True]],
            "min_recall": [None, 0.0, 1.5, *NOT_A_NUMBER],
            "seed": NOT_WHOLE,
            "ids": NOT_IDS,
        },
    ),
    "nearest_neighbors_on_disk": (
        lambda **a: nearest_neighbors_on_disk(
            **{"vectors": XY, "k": 2, "folder": Path(tempfile.mkdtemp()) / "new", **a}
        ),
        {
            "vectors": [*NOT_AN_ARRAY, np.full((N, 2), np.nan), XY > 0, XY[0]],
            "k": [*NOT_WHOLE, N],
            "folder": [None, 3, RAGGED, {}],
            "metric": [None, 3, "cosin", ["dot"]],
            "min_recall": [None, 0.0, 1.5, *NOT_A_NUMBER],
            "processes": [0, *NOT_WHOLE],
            "seed": NOT_WHOLE,
            "ids": NOT_IDS,
        },
    ),
    "MappedNeighbors": (
        lambda **a: MappedNeighbors(**{"folder": ON_DISK, **a}),
        {"folder": [None, 3, RAGGED, {}, "nowhere"]},
    ),
    "measure_hardness": (
        lambda **a: measure_hardness(**{"plan": PLAN, "neighbors": LISTED, **a}),
        {
            "plan": NOT_A_PLAN,
            "neighbors": NOT_POSITIONS,
            "k": [x for x in NOT_WHOLE if x is not None],
            "threshold": NOT_A_NUMBER,
            "sample": [0, *(x for x in NOT_WHOLE if x is not None)],
        },
    ),
    "in_batch_similarity": (
        lambda **a: in_batch_similarity(**{"embeddings": XY, "batches": [[0, 1]], **a}),
        {
            "embeddings": NOT_AN_ARRAY,
            "batches": [
                None,
                3,
                "abc",
                {},
                FRAME,
                [["a", "b"]],
                [[0.5, 1.0]],
                [[0, 99]],
                [[-1, 0]],
                [RAGGED],
                [0, 1],
            ],
        },
    ),
    "check_harder_than_random": (
        lambda **a: check_harder_than_random(
            **{"sampler": RandomBatchSampler(N, 4, ids=range(N)), "embeddings": XY, "raises": False, **a}
        ),
        {
            "sampler": [None, 3, "abc", FRAME, [["a", "b"]], [[0, 99]]],
            "embeddings": NOT_AN_ARRAY,
            "ids": NOT_IDS,
            "epoch": [x for x in NOT_WHOLE if x is not None],
            "max_batches": NOT_WHOLE,
            "errors": [None, *NOT_A_NUMBER],
            "seed": NOT_WHOLE,
        },
    ),
    "positions_in_batch": (
        lambda **a: positions_in_batch(
            **{"neighbors": torch.zeros(2, 3).long(), "batch": torch.arange(2), **a}
        ),
        {
            "neighbors": [None, 3, "abc", RAGGED, RING, FRAME, torch.zeros(2, 3), torch.arange(3)],
            "batch": [None, 3, [0, 1], np.arange(2), torch.zeros(2), torch.zeros(0).long(), torch.tensor(1)],
        },
    ),
    "weight_in_batch": (
        lambda **a: weight_in_batch(**{"plan": PLAN, "neighbors": RING, **a}),
        {
            "plan": NOT_A_PLAN,
            "neighbors": NOT_POSITIONS,
            "weights": [*NOT_AN_ARRAY[1:], VALUES[:2], np.full((N, 2), np.nan)],
        },
    ),
    "verify_sampler": (verify_sampler, {"seed": NOT_WHOLE}),
    "set_epoch": (lambda epoch: RandomBatchSampler(N, 4).set_epoch(epoch), {"epoch": NOT_WHOLE}),
    "plan": (
        lambda epoch: RandomBatchSampler(N, 4).plan(epoch),
        {"epoch": [x for x in NOT_WHOLE if x is not None]},
    ),
    "state_dict": (
        lambda position: RandomBatchSampler(N, 4).state_dict(position),
        {"position": [x for x in NOT_WHOLE if x is not None]},
    ),
    "load_state_dict": (
        lambda state: RandomBatchSampler(N, 4).load_state_dict(state),
        {"state": [None, 3, "abc", [], {}, FRAME, {"fingerprint": None}]},
    ),
    "check_ids": (
        lambda ids: RandomBatchSampler(N, 4, ids=range(N)).check_ids(ids),
        {"ids": [None, *NOT_IDS]},
    ),
    "realised_hardness": (
        lambda **a: PartitionBatchSampler(LISTED, 4).realised_hardness(**a),
        {
            "epoch": [x for x in NOT_WHOLE if x is not None],
            "threshold": NOT_A_NUMBER,
            "sample": [x for x in NOT_WHOLE if x is not None],
        },
    ),
}
#: what messages call an argument, where it is not by its name
WORDS = {"n": "number of items", "neighbors": "neighbo", "indices": "neighbour indices", "batches": "batch"}
RECORDS = {"HardnessReport", "SimilarityCheck", "SamplerVerdict"}  # results, which nobody builds by hand
FLAT = [
    (name, argument, at)
    for name, (_, wrong) in CASES.items()
    for argument, values in wrong.items()
    for at in range(len(values))
]


@pytest.mark.parametrize(("name", "argument", "at"), FLAT, ids=lambda part: str(part))
def test_a_wrong_argument_is_named(name, argument, at):
    call, wrong = CASES[name]
    word = WORDS.get(argument, argument)
    with pytest.raises(NearfarError, match=re.compile(word, re.IGNORECASE)):
        call(**{argument: wrong[argument][at]})


@pytest.mark.slow
def test_every_public_name_is_tried():
    tried = {name.split(".")[0] for name in CASES} | RECORDS
    assert set(nearfar.batching.__all__) - tried == {
        "BalancedBatchSampler",
        "StreamBatches",
    }  # their own tests
    good = {"Layout.slots": {"group_size": 2}, "set_epoch": {"epoch": 1}, "plan": {"epoch": 1}}
    good |= {
        "state_dict": {"position": 1},
        "load_state_dict": {"state": RandomBatchSampler(N, 4).state_dict()},
    }
    good |= {name: {"ids": range(N)} for name in CASES if name.endswith(("check_ids", "aligned_to"))}
    good["Neighbors.too_close"] = {"threshold": 0.5}
    for name, (call, _) in CASES.items():
        call(**good.get(name, {}))
