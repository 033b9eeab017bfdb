"""Equal ids are equal wherever they are compared or hashed; states are plain data whatever the arguments were."""

from __future__ import annotations

import json
import uuid
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from nearfar.batching import (
    BalancedBatchSampler,
    HardNegativeSampler,
    LengthBatchSampler,
    Neighbors,
    PartitionBatchSampler,
    RandomBatchSampler,
    SpatialBatchSampler,
)
from nearfar.data.splits import check_disjoint
from nearfar.errors import NearfarError
from nearfar.ids import canonical_ids, plain_ids
from nearfar.losses import CrossBatchMemory
from nearfar.metrics import split_hash

WHOLE = {
    "list": [3, 1, 2, 40],
    "tuple": (3, 1, 2, 40),
    "int64": np.array([3, 1, 2, 40]),
    "int32": np.array([3, 1, 2, 40], np.int32),
    "uint8": np.array([3, 1, 2, 40], np.uint8),
    "uint64": np.array([3, 1, 2, 40], np.uint64),
    "other bytes": np.array([3, 1, 2, 40], ">i4"),
    "objects": np.array([3, 1, 2, 40], object),
    "NumPy's numbers": [np.int16(3), np.uint8(1), 2, np.int64(40)],
    "Series": pd.Series([3, 1, 2, 40], index=[7, 8, 9, 9]),
    "nullable": pd.Series([3, 1, 2, 40], dtype="Int64"),
    "Index": pd.Index([3, 1, 2, 40]),
    "a table with a gap": pd.Series([3.0, 1.0, 2.0, 40.0]),
    "tensor": torch.tensor([3, 1, 2, 40]),
    "short tensor": torch.tensor([3, 1, 2, 40], dtype=torch.uint8),
    "0-d tensors": [torch.tensor(3), torch.tensor(1), torch.tensor(2), torch.tensor(40)],
    "keys": {3: 0, 1: 0, 2: 0, 40: 0}.keys(),
}
TEXT = {
    "list": ["b", "a", "ü", "long name"],
    "wide": np.array(["b", "a", "ü", "long name"], "<U40"),
    "objects": np.array(["b", "a", "ü", "long name"], object),
    "np.str_": [np.str_("b"), "a", np.str_("ü"), "long name"],
    "bytes": [b"b", b"a", "ü".encode(), b"long name"],
    "Series": pd.Series(["b", "a", "ü", "long name"]),
    "string": pd.Series(["b", "a", "ü", "long name"], dtype="string"),
    "categories": pd.Series(["b", "a", "ü", "long name"], dtype="category"),
    "Index": pd.Index(["b", "a", "ü", "long name"]),
    "paths": [Path("b"), Path("a"), Path("ü"), Path("long name")],
}
RING = np.array([[1], [2], [3], [0]])


@pytest.mark.parametrize("forms", [WHOLE, TEXT], ids=["whole", "text"])
def test_equal_ids_are_equal_everywhere(forms):
    plain = forms["list"]
    listed = Neighbors(RING, ids=plain)
    state = RandomBatchSampler(4, 2, ids=plain).state_dict()
    for form, ids in forms.items():
        assert plain_ids(ids) == plain, form
        assert split_hash(ids) == split_hash(plain), form
        sampler = RandomBatchSampler(4, 2, ids=ids)
        assert sampler.state_dict() == state, form
        sampler.load_state_dict(state)
        sampler.check_ids(plain)
        listed.check_ids(ids)
        assert Neighbors(RING, ids=ids).fingerprint() == listed.fingerprint(), form
        PartitionBatchSampler(listed, 2, ids=ids)
        assert listed.aligned_to(ids).indices.tolist() == RING.tolist(), form
        repeated = LengthBatchSampler([1, 2, 3, 4], 2, repeats=[1, 2, 1, 1], ids=ids)
        assert plain_ids(repeated.ids) == [plain[0], plain[1], plain[1], *plain[2:]], form
        assert (
            check_disjoint({"train": plain[:1], "test": ids}, on_leak="count")["train/test"]["rows"] == 1
        ), form


def test_hashes_of_recorded_runs_stay():
    """As version 0.1 wrote them."""
    assert split_hash(["b", "a"]) == "8116057864f03b3e"
    assert split_hash([3, 1, 2]) == "08749f02f956b1ac"
    prints = [
        RandomBatchSampler(3, 2, ids=ids).state_dict()["fingerprint"]["ids"]
        for ids in (["b", "a", "long"], np.arange(3))
    ]
    assert prints == ["9cc759c9e6e95eb7c6ffc4a9", "dc3e5ccef61033b683b73542"]


def test_numbers_and_texts_are_different_ids_everywhere():
    numbers, texts = [0, 1, 2, 3], ["0", "1", "2", "3"]
    assert split_hash(numbers) != split_hash(texts)
    assert canonical_ids([1, "1", (1, "a"), True]).tolist() == [1, "1", (1, "a"), True]
    with pytest.raises(
        NearfarError, match=r"differ at 4 of 4.*sampler are whole numbers.*dataset text.*convert"
    ):
        RandomBatchSampler(4, 2, ids=numbers).check_ids(texts)
    with pytest.raises(NearfarError, match="ids: saved"):
        RandomBatchSampler(4, 2, ids=numbers).load_state_dict(
            RandomBatchSampler(4, 2, ids=texts).state_dict()
        )
    with pytest.raises(NearfarError, match="4 of them unknown"):
        Neighbors(RING, ids=numbers).aligned_to(texts)
    assert check_disjoint({"train": numbers, "test": texts}) == {}


def test_ids_of_several_kinds_and_great_numbers():
    mixed = [1, "1", 2**63, ("slide", 3)]
    RandomBatchSampler(4, 2, ids=mixed).check_ids(mixed)
    with pytest.raises(NearfarError, match="differ at 1 of 4 positions, first at 3"):
        RandomBatchSampler(4, 2, ids=mixed).check_ids([*mixed[:3], ("slide", 4)])
    great = [2**63, 2**63 + 1]
    assert plain_ids(np.array(great, np.uint64)) == great
    assert split_hash(np.array(great, np.uint64)) == split_hash(great)
    one = uuid.UUID(int=5)
    assert plain_ids([one]) == [str(one)]
    assert split_hash(iter("ab")) == split_hash({"a", "b"}) == split_hash(["b", "a"])


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, pd.NA, pd.NaT, np.datetime64("NaT")])
def test_a_missing_id_is_refused(missing):
    for ids in ([missing, "a"], pd.Series(["a", missing]), np.array(["a", missing], object)):
        for use in (split_hash, plain_ids, lambda ids: RandomBatchSampler(2, 2, ids=ids)):
            with pytest.raises(NearfarError, match=r"ids: item \d has none"):
                use(ids)
    with pytest.raises(NearfarError, match="item 1 has none"):
        split_hash(pd.Series([1, None], dtype="Int64"))


@pytest.mark.parametrize(
    "ids",
    [None, "abcd", b"abcd", 4, {"a": 1}, {"a", "b", "c", "d"}, pd.DataFrame({"a": range(4)}), [[1], [2], [3], [4]],
     np.zeros((4, 1)), torch.zeros(4, 2), [[1], [2, 3], [], [4]], [object()] * 4, [{}] * 4, torch.tensor(3)],
    ids=lambda ids: type(ids).__name__,
)  # fmt: skip
def test_what_is_no_list_of_ids_is_refused(ids):
    with pytest.raises(NearfarError, match="ids"):
        canonical_ids(ids)
    if not isinstance(ids, set):
        with pytest.raises(NearfarError, match="ids"):
            split_hash(ids)


def test_ids_may_repeat_where_they_are_only_compared():
    RandomBatchSampler(4, 2, ids=["a", "a", "b", "b"]).check_ids(["a", "a", "b", "b"])
    with pytest.raises(NearfarError, match="2 distinct ids"):
        Neighbors(RING, ids=["a", "a", "b", "b"]).aligned_to(["a", "a", "b", "b"])


# ---- states

SCALARS = {
    "python": (int, float, bool),
    "numpy": (np.int64, np.float32, np.bool_),
    "numpy, short": (np.uint8, np.float16, np.bool_),
    "0-d arrays": (
        lambda x: np.array(int(x)),
        lambda x: np.array(x, np.float64),
        lambda x: np.array(bool(x)),
    ),
    "0-d tensors": (lambda x: torch.tensor(int(x)), torch.tensor, torch.tensor),
    "pandas": (lambda x: pd.Series([int(x)])[0], lambda x: pd.Series([x])[0], lambda x: pd.Series([x])[0]),
}


@pytest.mark.parametrize("kind", SCALARS)
def test_states_are_plain_whatever_the_arguments_were(kind):
    i, f, b = SCALARS[kind]
    n = 24
    rng = np.random.default_rng(0)
    near = np.stack([np.roll(np.arange(n), -shift) for shift in (1, 2, 3)], 1)
    listed = Neighbors(near, np.tile([0.9, 0.5, 0.25], (n, 1)), ids=pd.Series(range(n)))
    common = {"seed": i(3), "drop_last": b(True), "rank": i(1), "world_size": i(2)}
    threshold = f(0.5)

    def make():
        yield RandomBatchSampler(i(n), i(4), ids=np.arange(n, dtype=np.int16), **common)
        yield HardNegativeSampler(
            listed, i(4), f(0.5), i(2), i(0), i(2), false_negative_threshold=threshold, **common
        )
        yield PartitionBatchSampler(
            listed, i(4), i(2), i(0), passes=i(2), false_negative_threshold=threshold, **common
        )
        yield SpatialBatchSampler(
            torch.tensor(rng.random((n, 2))), pd.Series(["a", "b"] * 12), i(4), i(2), **common
        )
        yield LengthBatchSampler(
            pd.Series(range(n)), i(4), repeats=torch.ones(n, dtype=torch.int32), window=i(2), **common
        )

    for sampler in make():
        sampler.set_epoch(i(2))
        next(iter(sampler))
        for state in (sampler.state_dict(), sampler.state_dict(position=i(1))):
            assert json.loads(json.dumps(state, allow_nan=False)) == state
            stream = BytesIO()
            torch.save(state, stream)
            stream.seek(0)
            assert torch.load(stream, weights_only=True) == state
            rest = list(sampler)
            sampler.load_state_dict(state)
            assert len(list(sampler)) == len(rest) - 1
    if kind == "numpy":  # what is a number there is the same number here
        plain = HardNegativeSampler(listed, 4, 0.5, 2, 0, 2, false_negative_threshold=0.5, seed=3)
        assert plain.state_dict() == HardNegativeSampler(
            listed, i(4), f(0.5), i(2), i(0), i(2), false_negative_threshold=f(0.5), seed=i(3)
        ).state_dict()  # fmt: skip


def test_lengths_in_another_width_are_the_same_lengths():
    states = [
        LengthBatchSampler(lengths, 2).state_dict()
        for lengths in (
            [5, 3, 2, 9],
            np.array([5, 3, 2, 9], np.uint8),
            pd.Series([5, 3, 2, 9], dtype="Int64"),
        )
    ]
    assert states[0] == states[1] == states[2]


def test_the_state_of_a_memory_loads_as_weights_only():
    memory = CrossBatchMemory(np.int64(4), np.int32(2), ids=True)
    memory.push(torch.ones(3, 2), torch.tensor([1, 2, 3]))
    stream = BytesIO()
    torch.save(memory.state_dict(), stream)
    stream.seek(0)
    fresh = CrossBatchMemory(4, 2, ids=True)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    assert fresh.ids().tolist() == [1, 2, 3]
    assert (type(memory.size), type(memory.dim)) == (int, int)


def test_a_damaged_state_is_refused():
    sampler = HardNegativeSampler(np.array([[1], [2], [3], [0]]), 2, hardness_k=1)
    state = sampler.state_dict()
    for change, named in [
        ({"options": {}}, "'options' in the state does not name"),
        ({"planned": None}, "'planned' in the state does not name"),
        ({"epoch": -1}, "epoch in the state is -1"),
        ({"position": "1"}, "position in the state is '1'"),
        ({"position": 9}, "position 9"),
        ({"version": 7}, "version 7"),
        ({"fingerprint": 3}, "not the state"),
    ]:
        with pytest.raises(NearfarError, match=named):
            sampler.load_state_dict({**state, **change})
    with pytest.raises(NearfarError, match="lacks epoch"):
        sampler.load_state_dict({key: value for key, value in state.items() if key != "epoch"})


def test_balanced_states_are_plain():
    sampler = BalancedBatchSampler(["a", "b"] * 8, np.int64(4), np.int32(2), ids=pd.Series(range(16)))
    assert json.loads(json.dumps(sampler.state_dict())) == sampler.state_dict()
