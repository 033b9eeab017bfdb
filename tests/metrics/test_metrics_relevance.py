"""Relevance in every form that people have: read as what it is, or refused with words; never read as another form."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.errors import NearfarError
from nearfar.labels import shared_codes
from nearfar.metrics import retrieval_metrics, retrieval_ranks

pd = pytest.importorskip("pandas")
sparse = pytest.importorskip("scipy.sparse")

N, M = 6, 9
QUERY_IDS, KEY_IDS = [f"q{i}" for i in range(N)], [f"d{j}" for j in range(M)]


def embeddings(n: int = N, m: int = M) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 5, generator=generator), torch.randn(m, 5, generator=generator)


def read(relevant, n: int = N, m: int = M, **options) -> np.ndarray:
    """The matrix that ``relevant`` was read as, from what depends on it: whom each query has, one key at a time."""
    from nearfar.metrics.relevance import ItemIds
    from nearfar.metrics.relevance_forms import read_relevance

    relevance = read_relevance(relevant, ItemIds(n, m, **options), torch.device("cpu"))
    whole = relevance.tile(slice(0, n), slice(0, m)).numpy()
    pairs = np.zeros((n, m), dtype=bool)
    pairs[relevance.pairs()] = True
    np.testing.assert_array_equal(whole, pairs)
    np.testing.assert_array_equal(relevance.counts()[0], whole.sum(1))
    np.testing.assert_array_equal(relevance.counts()[1], whole.sum(0))
    return whole


MATRIX = np.zeros((N, M), dtype=bool)
MATRIX[[0, 0, 1, 2, 4, 5, 5], [0, 3, 8, 2, 1, 0, 7]] = True  # query 3 has none
LISTS = [np.flatnonzero(row).tolist() for row in MATRIX]
PADDED = np.array([row + [-1] * (2 - len(row)) for row in LISTS])


def forms() -> dict[str, object]:
    matrix, tensor = MATRIX, torch.tensor(MATRIX)
    objects = np.empty(N, dtype=object)
    for i, row in enumerate(LISTS):
        objects[i] = row
    forms = {
        "Boolean array": matrix,
        "Boolean tensor": tensor,
        "list of Booleans": matrix.tolist(),
        "list of tensors": list(tensor),
        "list of arrays": list(matrix),
        "object array of Booleans": matrix.astype(object),
        "list of 0 and 1": matrix.astype(int).tolist(),
        "table": pd.DataFrame(matrix),
        "table of 0 and 1": pd.DataFrame(matrix.astype(np.int8)),
        "scipy": sparse.csr_matrix(matrix),
        "scipy array": sparse.coo_array(matrix.astype(float)),
        "sparse tensor": tensor.to_sparse(),
        "sparse csr": tensor.float().to_sparse_csr(),
        "lists": LISTS,
        "lists with repeats": [row * 2 for row in LISTS],
        "sets": [set(row) for row in LISTS],
        "tuples": [tuple(row) for row in LISTS],
        "index tensors": [
            torch.tensor(row) for row in LISTS
        ],  # the empty one is of floats, as PyTorch makes it
        "index arrays": [np.array(row) for row in LISTS],
        "small index arrays": [np.array(row, dtype=np.uint8) for row in LISTS],
        "lists of 0-d tensors": [list(torch.tensor(row)) for row in LISTS],
        "object array of lists": objects,
        "column of lists": pd.Series(LISTS),
        "column with a gap": pd.Series([row or None for row in LISTS]),
        "values of a mapping": dict(enumerate(LISTS)).values(),
        "padded array": PADDED,
        "padded tensor": torch.tensor(PADDED),
        "padded list": PADDED.tolist(),
    }
    for dtype in (np.uint8, np.int8, np.int32, np.int64, np.uint64):
        forms[f"0 and 1 as {dtype.__name__}"] = matrix.astype(dtype)
        forms[f"rows of {dtype.__name__}"] = list(matrix.astype(dtype))
    return forms


NAMED = {q: {KEY_IDS[j]: 1 for j in row} for q, row in zip(QUERY_IDS, LISTS, strict=True)}


def named_forms() -> dict[str, object]:
    ids = [[KEY_IDS[j] for j in row] for row in LISTS]
    by_name = dict(zip(QUERY_IDS, ids, strict=True))
    return {
        "qrels": NAMED,
        "qrels with grades": {q: dict.fromkeys(row, 2.0) | {"d6": 0, "d5": -1} for q, row in NAMED.items()},
        "qrels without a query": {q: row for q, row in NAMED.items() if row},
        "qrels in other order": dict(reversed(NAMED.items())),
        "lists by id": by_name,
        "sets by id": {q: set(row) for q, row in by_name.items()},
        "arrays by id": {q: np.array(row) for q, row in by_name.items()},
        "text lists": ids,
        "text arrays": [np.array(row, dtype=str) for row in ids],
        "sets of text": [set(row) for row in ids],
        "column by id": pd.Series(by_name).iloc[::-1],
        "list of grades": [dict.fromkeys(row, True) for row in ids],
        "matrix": MATRIX,
        "table by name": pd.DataFrame(MATRIX, QUERY_IDS, KEY_IDS).iloc[::-1, ::-1],
    }


@pytest.mark.parametrize("name", forms())
def test_every_form_is_read_as_its_matrix(name):
    np.testing.assert_array_equal(read(forms()[name]), MATRIX)
    queries, keys = embeddings()
    expected = retrieval_metrics(queries, keys, torch.tensor(MATRIX))
    assert retrieval_metrics(queries, keys, forms()[name]) == expected
    assert expected["R@1"].protocol["without_relevant"] == 1


@pytest.mark.parametrize("name", named_forms())
def test_every_form_by_name_is_read_as_its_matrix(name):
    whole = read(named_forms()[name], query_ids=QUERY_IDS, key_ids=KEY_IDS)
    np.testing.assert_array_equal(whole, MATRIX)


def test_ids_are_numbers_as_well():
    qrels = {10: {300: 1}, 11: [100, 200]}
    for key_ids in ([100, 200, 300], np.array([100, 200, 300]), torch.tensor([100, 200, 300])):
        whole = read(qrels, 2, 3, query_ids=pd.Series([11, 10]), key_ids=key_ids)
        assert whole.tolist() == [[True, True, False], [False, False, True]]
        by_list = read([[100, -1], [300, 200]], 2, 3, key_ids=key_ids)
        assert by_list.tolist() == [[True, False, False], [False, True, True]]
        assert read([300, 100], 2, 3, key_ids=key_ids).tolist() == [
            [False, False, True],
            [True, False, False],
        ]
        assert read(np.array([300, 100]), 2, 3, key_ids=key_ids).argmax(1).tolist() == [2, 0]


ONE = [3, 0, -1, 8, 8, 2]


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
def test_one_key_for_each_query(dtype):
    expected = np.zeros((N, M), dtype=bool)
    for i, j in enumerate(ONE):
        if j >= 0:
            expected[i, j] = True
    array = np.array(ONE, dtype=dtype)
    gap = [None if j < 0 else j for j in ONE]
    for relevant in (
        array,
        torch.tensor(array),
        list(array),
        ONE,
        pd.Series(array),
        gap,
        pd.Series(gap, dtype="Int64"),
    ):
        np.testing.assert_array_equal(read(relevant), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_unsigned_numbers_have_no_minus_one(dtype):
    largest = 255
    places = np.array([largest, 3], dtype=dtype)
    for relevant in (
        places,
        torch.from_numpy(places),
        list(places),
        pd.Series(places),
        [places[:1], places[1:]],
    ):
        assert read(relevant, 2, 300).nonzero()[1].tolist() == [255, 3]
    with pytest.raises(NearfarError, match="names key 255"):
        read(places, 2, 200)


REFUSED = {
    "floats in rows": ([[0.9], [1.2], [2.0], [3.7], [4.1], [5.5]], "row of query 0 holds floats"),
    "whole floats in rows": ([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]], "floats"),
    "floats": (np.arange(6.0), "holds floats"),
    "list of floats": ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "floats"),
    "column of floats": (pd.Series([0, 1, None, 3, 4, 5]), "holds floats"),
    "Booleans for each query": ([True] * 6, "1 Booleans, but there are 9 keys"),
    "Boolean array for each query": (np.ones(6, dtype=bool), "one-dimensional and holds Booleans"),
    "Boolean tensor for each query": (torch.ones(6, dtype=torch.bool), "one-dimensional and holds Booleans"),
    "short flags": ([[True] * 8] * 6, "8 Booleans, but there are 9 keys"),
    "flags with a gap": ([[True, None, *[False] * 7]] * 6, "mixes kinds"),
    "set of flags": ([{True, False}] * 6, "set of Booleans"),
    "numbers and flags": ([[1, True]] * 6, "mixes kinds"),
    "numbers and text": ([[1, "d1"]] * 6, "mixes kinds"),
    "single and lists": ([1, [2], 3, 4, 5, 6], "mixes single keys"),
    "out of range": ([[0], [1], [9], [0], [0], [0]], "query 2 names key 9"),
    "negative": ([[0], [1], [-2], [0], [0], [0]], "query 2 names key -2"),
    "negative index": ([0, 1, -3, 0, 0, 0], "query 2 names key -3"),
    "too large for 64 bits": ([2**70, 1, 1, 0, 0, 0], "names key"),
    "grades": (np.full((N, M), 2), "grades are no positions"),
    "list of grades": ([[0, 1, 2, 0, 0, 0, 0, 0, 0]] * 6, "grades are no positions"),
    "sparse grades": (sparse.csr_matrix(MATRIX * 2), "sparse matrix that holds 2"),
    "sparse scores": ((torch.tensor(MATRIX) * 0.5).to_sparse(), "sparse matrix that holds 0.5"),
    "table of grades": (pd.DataFrame(MATRIX * 2), "pass table > 0"),
    "float matrix": (MATRIX.astype(float), "matrix of floats"),
    "float tensor": (torch.ones(N, M), "matrix of floats"),
    "transposed": (MATRIX.T, "relevant is a matrix"),
    "three dimensions": (np.zeros((N, M, 1), dtype=bool), "not understood"),
    "qrels without ids": (NAMED, "pass query_ids= and key_ids="),
    "grades without ids": ([{"d1": 1}] * 6, "with key_ids= the keys"),
    "text": ("relevant", "relevant is 'relevant'"),
    "texts": (["d1"] * 6, "pass the ids of the keys.*key_ids=.*tuple"),
    "text array": (np.array(["d1"] * 6), "pass the ids of the keys"),
    "text labels": (["cat", "dog", "cat", "dog", "cat", "dog"], "if these are class labels, a tuple"),
    "set": ({1, 2, 3}, "not understood"),
    "number": (3, "relevant is 3"),
    "generator": ((i for i in range(6)), "not understood"),
    "object": (object(), "not understood"),
    "too few rows": ([[0], [1]], "lists the keys of 2 queries"),
    "labels as a list": ([list("aabbcc"), list("aabbccdde")], "relevant=\\(query_labels, key_labels\\)"),
    "labels of another length": (([1] * 6, [1] * 6), "tuple states labels"),
    "labels of two dimensions": (([[1]] * 6, [1] * 9), "label of item 0 is \\[1\\]"),
    "label matrix": ((np.ones((6, 1)), np.ones(9)), "one dimension"),
    "one label list": (([1] * 6,), "tuple states labels"),
    "number and text labels": (([1] * 6, ["1"] * 9), "labels of different kinds"),
    "infinite labels": ((np.full(6, np.inf), [1.0] * 9), "no label"),
    "masked": (np.ma.masked_array([0, 1, 2, 3, 4, 5], [1, 0, 0, 0, 0, 0]), "masked"),
    "long table": (pd.DataFrame({"query": ["q0"], "key": ["d0"], "grade": [1]}), "make a dictionary"),
    "levels": (pd.Series({("q0", "d0"): 1, ("q1", "d1"): 1}), "several levels"),
    "complex": (np.zeros(6, dtype=complex), "not understood"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_none_of_the_forms_is_refused(name):
    relevant, message = REFUSED[name]
    with pytest.raises(NearfarError, match=message) as caught:
        retrieval_ranks(*embeddings(), relevant)
    assert "relevant" in str(caught.value)


@pytest.mark.parametrize(
    ("relevant", "options", "message"),
    [
        (NAMED, {"query_ids": QUERY_IDS}, "pass key_ids="),
        (NAMED, {"query_ids": QUERY_IDS[:-1], "key_ids": KEY_IDS}, "query_ids has 5 ids for 6 queries"),
        (NAMED, {"query_ids": QUERY_IDS, "key_ids": ["d0"] * M}, "'d0' more than once"),
        (NAMED, {"query_ids": range(N), "key_ids": KEY_IDS}, "'1' are different ids"),
        (NAMED, {"query_ids": QUERY_IDS, "key_ids": range(M)}, "'1' are different ids"),
        (NAMED, {"query_ids": "queries", "key_ids": KEY_IDS}, "query_ids is 'queries'"),
        (
            NAMED,
            {"query_ids": [None, *QUERY_IDS[1:]], "key_ids": KEY_IDS},
            "query_ids misses the id of row 0",
        ),
        ({"q0": {"d0": "1"}}, {"query_ids": QUERY_IDS, "key_ids": KEY_IDS}, "the grade '1'"),
        ({"q0": {"d0": float("nan")}}, {"query_ids": QUERY_IDS, "key_ids": KEY_IDS}, "the grade nan"),
        ({"q0": [("d0", 1)]}, {"query_ids": QUERY_IDS, "key_ids": KEY_IDS}, "dictionary of grades"),
        ([["d0", "d99"]] * N, {"key_ids": KEY_IDS}, "names 'd99', which is not among key_ids"),
        (None, {"query_ids": QUERY_IDS, "key_ids": KEY_IDS}, "relevant=None"),
    ],
)
def test_ids_that_do_not_fit_are_refused(relevant, options, message):
    with pytest.raises(NearfarError, match=message):
        retrieval_ranks(*embeddings(), relevant, **options)


def test_what_qrels_name_and_the_gallery_lacks_is_counted():
    qrels = NAMED | {"q3": {"d99": 1}, "other": {"d0": 1}}
    with pytest.warns(UserWarning, match=r"1 relevant keys are not among key_ids.*1 of its 7 queries"):
        ranks = retrieval_ranks(*embeddings(), qrels, query_ids=QUERY_IDS, key_ids=KEY_IDS)
    assert ranks.without_relevant == 1


def test_two_readings_are_refused():
    queries, keys = embeddings(2, 2)
    for relevant in ([[0, 1], [1, 0]], np.array([[0, 1], [1, 0]]), torch.eye(2, dtype=torch.int64)):
        with pytest.raises(NearfarError, match="matrix or lists of positions"):
            retrieval_ranks(queries, keys, relevant)
        retrieval_ranks(queries, keys, np.asarray(relevant, dtype=bool))  # what the message says to do


def test_the_advice_works():
    table = pd.DataFrame(
        {"query": ["q0", "q0", "q1"], "key": ["d0", "d3", "d8"], "grade": [1, 2, 1]},
    )
    made = {q: dict(zip(t["key"], t["grade"], strict=True)) for q, t in table.groupby("query")}
    expected = read({"q0": ["d0", "d3"], "q1": ["d8"]}, query_ids=QUERY_IDS, key_ids=KEY_IDS)
    np.testing.assert_array_equal(read(made, query_ids=QUERY_IDS, key_ids=KEY_IDS), expected)
    series = table.set_index(["query", "key"])["grade"]
    made = {q: t.droplevel(0).to_dict() for q, t in series.groupby(level=0)}
    np.testing.assert_array_equal(read(made, query_ids=QUERY_IDS, key_ids=KEY_IDS), expected)
    np.testing.assert_array_equal(read(np.asarray(MATRIX * 2) > 0), MATRIX)
    np.testing.assert_array_equal(read(sparse.csr_matrix(MATRIX * 2) > 0), MATRIX)
    np.testing.assert_array_equal(read(pd.DataFrame(MATRIX * 2) > 0), MATRIX)


# -- labels ----------------------------------------------------------------------------------------------------
LABELS = [2, 0, 2, 1, 0, 1]
OF_KEYS = [1, 1, 0, 2, 3, 0, 2, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("missing", [-1, None, float("nan"), pd.NA])
def test_labels_of_every_type(missing):
    queries, keys = [*LABELS[:5], missing], [missing, *OF_KEYS[1:]]
    expected = np.array([[i != 5 and j != 0 and LABELS[i] == OF_KEYS[j] for j in range(M)] for i in range(N)])
    gone = lambda x: x is missing  # noqa: E731
    as_float = lambda labels: [np.nan if gone(x) else float(x) for x in labels]  # noqa: E731
    as_int = lambda labels: [-1 if gone(x) else x for x in labels]  # noqa: E731
    kinds = {
        "list": lambda x: x,
        "array of objects": lambda x: np.array(x, dtype=object),
        "integers": lambda x: np.array(as_int(x), dtype=np.int8),
        "tensor": lambda x: torch.tensor(as_int(x)),
        "floats": lambda x: np.array(as_float(x)),
        "half floats": lambda x: torch.tensor(as_float(x), dtype=torch.bfloat16),
        "column": lambda x: pd.Series(as_float(x)),
        "nullable": lambda x: pd.array([None if gone(y) else y for y in x], dtype="Int64"),
        "categories": lambda x: pd.Series([None if gone(y) else y for y in x], dtype="category"),
        "masked": lambda x: np.ma.masked_array(as_int(x), [gone(y) for y in x]),
    }
    for first in kinds:
        for second in kinds:
            np.testing.assert_array_equal(
                read((kinds[first](queries), kinds[second](keys))), expected, f"{first}, {second}"
            )
    text = lambda labels: [None if gone(x) else f"species {x}" for x in labels]  # noqa: E731
    for first in (list, pd.Series, lambda x: np.array(x, dtype=object)):
        np.testing.assert_array_equal(read((first(text(queries)), text(keys))), expected)
    as_text = lambda labels: np.array([np.nan if gone(x) else f"species {x}" for x in labels])  # noqa: E731
    np.testing.assert_array_equal(read((as_text(queries), as_text(keys))), expected)  # NumPy writes "nan"


def test_labels_keep_their_last_digit():
    big = 2**63
    first, second = shared_codes(a=np.array([big, big + 1], dtype=np.uint64), b=np.array([5, 2**62 + 1]))
    assert len({*first.tolist(), *second.tolist()}) == 4
    first, second = shared_codes(a=[2**53, 2**53 + 1], b=np.array([float(2**53)]))
    assert first[0] == second[0] != first[1]
    assert shared_codes(a=[True, 1, 1.0, "1"])[0].tolist() == [0, 0, 0, 1]
    assert shared_codes(a=[("x", 1), ("x", 1), ("x", 2)])[0].tolist() == [0, 0, 1]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(-1, 3), st.sampled_from(["a", "b"])), min_size=1, max_size=12),
    st.data(),
)
def test_labels_against_a_loop(labels, data):
    others = data.draw(st.permutations(labels))
    same = lambda a, b: a is not None and b is not None and a != -1 and b != -1 and a == b  # noqa: E731
    first, second = shared_codes(a=labels, b=others)
    for i, a in enumerate(labels):
        for j, b in enumerate(others):
            assert (first[i] == second[j] != -1) == same(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_the_case_that_users_met():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, 8, generator=generator)
    k = torch.cat([q + 0.01, torch.randn(3, 8, generator=generator)])
    matrix = torch.eye(6, 9, dtype=torch.bool)
    for relevant in (matrix, matrix.tolist(), list(matrix), list(matrix.numpy()), matrix.int().tolist()):
        assert retrieval_metrics(q, k, relevant, ks=(1,))["R@1"].value == 1.0
    one = retrieval_metrics(
        torch.eye(300)[[255, 3]], torch.eye(300), torch.tensor([255, 3], dtype=torch.uint8), ks=(1,)
    )
    assert (one["R@1"].n, one["R@1"].value) == (2, 1.0)


@pytest.mark.slow
def test_a_wide_relation_is_read_in_time():
    rows = np.random.default_rng(0).random((2000, 500)) < 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read(rows.tolist(), 2000, 500), rows)
