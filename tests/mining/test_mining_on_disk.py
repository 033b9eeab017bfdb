"""Mining from an index on disk is mining in memory where the search is exact; and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet
import pytest

from nearfar.batching import MappedNeighbors, nearest_neighbors_on_disk
from nearfar.data import mapped
from nearfar.errors import NearfarError
from nearfar.mining import (
    measure_false_negatives,
    mine_negatives,
    mine_negatives_on_disk,
    mined_table,
    on_disk,
)
from nearfar.mining.candidates import Positives, groups_of, text_numbers
from nearfar.mining.mine import Rules

N, M, D = 330, 2500, 64


def exact_rows(n, seed):
    """Rows of unit length that float16 holds without rounding: 16 numbers of ±1/4."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((n, D), np.float32)
    place = rng.random((n, D)).argsort(1)[:, :16]
    np.put_along_axis(rows, place, rng.choice([-0.25, 0.25], (n, 16)).astype(np.float32), 1)
    return rows


rng = np.random.default_rng(7)
CORPUS = exact_rows(M, 1)
OWN = rng.integers(M, size=N)
QUERIES = (CORPUS[OWN] + 0.25 * rng.standard_normal((N, D))).astype(np.float32)
POSITIVES = [[int(OWN[i])] if i % 3 else [int(OWN[i]), i, i + 50] for i in range(N)]
PAIRS = np.array([(i, j) for i, own in enumerate(POSITIVES) for j in own])
TEXTS = [f"query {i}" for i in range(N)], [f"document  {j % 2400}" for j in range(M)]  # a hundred copies
TEXTS[1][40] = "query 4"
LABELS = [i % 5 if i % 7 else None for i in range(N)], [j % 5 for j in range(M)]
GUIDE = tuple(rng.standard_normal((size, 6)).astype(np.float32) for size in (N, M))


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    """An index that looks into all cells and compares everything exactly."""
    near = nearest_neighbors_on_disk(CORPUS, 10, tmp_path_factory.mktemp("mining") / "near")
    index = near._search_index()[0]
    index.probes, index.refine = index.cells, 100
    return near


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(on_disk, "_QUERIES", 100)


def by_query(table):
    order = sorted(range(len(table["anchor"])), key=lambda at: (table["anchor"][at], -table["label"][at]))
    return {name: [column[at] for at in order] for name, column in table.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "form"),
    [
        ({"per_query": 2}, "n-tuple"),
        ({"margin": 0.1, "rank_range": (0, 40)}, "triplet"),
        ({"margin": 0.3, "margin_kind": "relative", "rank_range": (3, 50), "guide": True}, "labeled-pair"),
        ({"min_score": 0.1, "max_score": 0.5, "strategy": "random", "seed": 3}, "labeled-list"),
    ],
)
def test_is_mining_in_memory(near, tmp_path, rules, form):
    rules = rules | ({"guide": GUIDE, "guide_margin": 0.1} if "guide" in rules else {})
    texts = {"query_texts": TEXTS[0], "corpus_texts": TEXTS[1]}
    wanted = mine_negatives(QUERIES, CORPUS, POSITIVES, **texts, **rules)
    table = mined_table(wanted, TEXTS[0], TEXTS[1], form, scores=True)
    shares = measure_false_negatives(
        wanted, labels=LABELS, texts=TEXTS, guide=GUIDE if "guide" in rules else None
    )
    if "guide" in rules:
        rules["guide"] = [tmp_path / f"{side}.npy" for side in "qd"]
        for path, vectors in zip(rules["guide"], GUIDE, strict=True):
            np.save(path, vectors)
    np.save(tmp_path / "queries.npy", QUERIES)
    np.save(tmp_path / "pairs.npy", PAIRS)
    output, done = tmp_path / "mined.parquet", []
    mined = mine_negatives_on_disk(
        tmp_path / "queries.npy", near, output, tmp_path / "pairs.npy", **texts, **rules, labels=LABELS, form=form,
        scores=True, query_values=TEXTS[0], corpus_values=TEXTS[1], advance=done.append,
    )  # fmt: skip
    assert done == [100, 100, 100, 30]
    written = pyarrow.parquet.read_table(output).to_pydict()
    assert list(written) == list(table)
    if form == "labeled-pair":  # answers come first in all, or in each block
        written, table = (by_query(each) for each in (written, table))
    for name, column in table.items():
        if name.startswith(("margin", "score")):
            flat = [np.hstack(each).tolist() for each in (written[name], column)]
            assert flat[0] == pytest.approx(flat[1], abs=1e-5)
        else:
            assert written[name] == column
    assert (mined.left_out, mined.candidates) == (wanted.left_out, wanted.candidates)
    assert mined.false_negatives == shares
    assert mined.recall == 1
    assert mined.summary()[1:2] == wanted.summary()[1:2]
    assert not [*tmp_path.glob(".mined*")]


@pytest.mark.slow
def test_sparse_forms_and_queries_without_an_answer(near, tmp_path):
    import scipy.sparse

    matrix = scipy.sparse.csr_matrix((np.ones(len(PAIRS)), PAIRS.T), (N, M))
    first = mine_negatives_on_disk(QUERIES, near.folder, tmp_path / "a.parquet", matrix)
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pydict()
    assert list(zip(table["anchor"], table["positive"], strict=True)) == sorted(map(tuple, PAIRS.tolist()))
    few = np.where(np.arange(N) % 2, OWN, -1)
    half = mine_negatives_on_disk(QUERIES, near.folder, tmp_path / "b.parquet", few)
    assert (first.queries, half.queries, half.unanswered) == (N, N // 2, N // 2)
    assert "165 queries have no answer" in half.summary()[-1]
    assert first.sampled == N // 2


def test_rows_of_the_same_query_share_their_answers():
    numbers = np.array([2, 0, 2, 1, 0])
    positives = Positives.same_query(numbers)
    assert positives.counts.tolist() == [2, 2, 2, 1, 2]
    row, column = positives.among(np.array([0, 3, 4]))
    assert (row.tolist(), column.tolist()) == ([0, 0, 1, 2, 2], [0, 2, 3, 1, 4])
    elsewhere = Positives.same_query(numbers, np.array([4, 3, 2, 1, 0]))
    assert elsewhere.among(np.array([0, 3]))[1].tolist() == [4, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": QUERIES[:, :5]}, "5 dimensions"),
        ({"queries": np.full((3, D), np.nan, np.float32), "positives": [-1, -1, 2]}, "row 2 holds"),
        ({"output": "mined.csv"}, r"name it \.parquet"),
        ({"positives": None}, "without positives document i"),
        ({"positives": np.array([[0, M]])}, f"name document {M}"),
        ({"positives": np.array([[-1, 0]])}, "name query -1"),
        ({"positives": [[]] * N}, "no query has a positive"),
        ({"query_texts": TEXTS[0]}, "give both"),
        ({"query_texts": TEXTS[0], "corpus_texts": ["a"]}, "one for each"),
        ({"labels": ([1], [2])}, "one for each"),
        ({"query_values": ["a"]}, "one for each"),
        ({"query_values": [*range(N - 1), "a"]}, "query_values: rows 0 to 329 do not fit"),
        ({"labels": ([[1]] * N, LABELS[1])}, r"labels of the queries: row 0 has \[1\]"),
        ({"positives": "none.npy"}, r"none\.npy cannot be read: No such file"),
        ({"positives": "a.tsv"}, "nearfar mine --qrels"),
        ({"names": ("negative_1", "document")}, "'negative_1' is a column that form=n-tuple adds"),
        ({"names": ("document", "text"), "form": "labeled-pair"}, "'document' is a column"),
        ({"names": ("a", "margin"), "form": "triplet", "scores": True}, "'margin' is a column"),
        ({"guide": (GUIDE[0], GUIDE[0])}, "are needed"),
        ({"margin": 3.0}, "no query has as many"),
        ({"min_recall": 1.5}, "min_recall"),
        ({"corpus": "nowhere"}, "no finished neighbours"),
    ],
)
def test_wrong_input(near, tmp_path, arguments, message):
    given = {
        "queries": QUERIES,
        "corpus": near,
        "output": tmp_path / "m.parquet",
        "positives": PAIRS,
    } | arguments
    with pytest.raises(NearfarError, match=message):
        mine_negatives_on_disk(**given)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        [{"a": i} if i < 100 else {"a": i, "b": "kept"} for i in range(N)],
        [i if i < 200 else i + 0.5 for i in range(N)],
        [None if i < 100 else f"text {i}" for i in range(N)],
        [[] if i < 100 else [i, 0.5] for i in range(N)],
    ],
)
@pytest.mark.parametrize("form", ["triplet", "labeled-list"])
def test_cells_whose_type_shows_in_later_rows(near, tmp_path, monkeypatch, values, form):
    """No key is lost and no number cut although the first blocks have neither."""
    monkeypatch.setattr(on_disk, "_STRETCH", 70)
    corpus = [values[j % N] for j in range(M)]
    mine_negatives_on_disk(
        QUERIES, near, tmp_path / "m.parquet", OWN, form=form, query_values=values, corpus_values=corpus
    )
    written = pyarrow.parquet.read_table(tmp_path / "m.parquet").to_pydict()
    wanted = mined_table(mine_negatives(QUERIES, CORPUS, OWN), values, corpus, form)
    if isinstance(values[0], dict):  # a key that a row lacks is null in Parquet
        wanted["anchor"] = [{"a": row["a"], "b": row.get("b")} for row in wanted["anchor"]]
        written, wanted = ({"anchor": table["anchor"]} for table in (written, wanted))
    assert written == wanted


@pytest.mark.slow
def test_a_pandas_series_is_read_by_place(near, tmp_path):
    pandas = pytest.importorskip("pandas")
    values = pandas.Series([f"q{i}" for i in range(2 * N)])[::-2]  # its index says neither place nor order
    corpus = pandas.Series(TEXTS[1], index=np.arange(M)[::-1])
    mine_negatives_on_disk(
        QUERIES, near, tmp_path / "m.parquet", OWN, query_values=values, corpus_values=corpus
    )
    written = pyarrow.parquet.read_table(tmp_path / "m.parquet").to_pydict()
    assert written["anchor"] == values.tolist()
    assert written["positive"] == [TEXTS[1][j] for j in OWN]
    mined = mine_negatives(QUERIES, CORPUS, OWN)
    assert mined_table(mined, values, corpus) == mined_table(mined, values.tolist(), TEXTS[1]) == written


@pytest.mark.slow
def test_repeated_pairs_and_lists_that_read_as_pairs(near, tmp_path):
    twice = mine_negatives_on_disk(QUERIES, near, tmp_path / "m.parquet", np.concatenate([PAIRS, PAIRS]))
    assert twice.rows == len(PAIRS)
    with pytest.warns(UserWarning, match=r"give np\.array\(positives\)"):
        mine_negatives_on_disk(QUERIES[:2], near, tmp_path / "m.parquet", [(0, 5), (1, 7)])


@pytest.mark.slow
def test_texts_and_labels_that_are_missing_are_equal_to_nothing(near, tmp_path):
    pandas = pytest.importorskip("pandas")
    texts = [None, "a", float("nan"), pandas.NA, "a "], [None, "a"]
    for number in (text_numbers, groups_of):
        queries, corpus = number(*texts, 5, 2)
        assert (queries[:, None] == [*queries, *corpus]).sum(1).tolist() == [1, 3, 1, 1, 3]
    labels = [pandas.NA, *(float(each) if each is not None else None for each in LABELS[0][1:])], LABELS[1]
    mined = mine_negatives_on_disk(QUERIES, near, tmp_path / "m.parquet", OWN, labels=labels)
    wanted = measure_false_negatives(mine_negatives(QUERIES, CORPUS, OWN), labels=LABELS)
    assert mined.false_negatives == wanted


@pytest.mark.parametrize("hashes", [hash, lambda text: hash(text) if text[0] == "+" else len(text) % 3])
def test_places_of_ids_are_those_of_a_loop(monkeypatch, hashes):
    """Ids that repeat, one that is very long, and hashes that are equal for different ids."""
    monkeypatch.setattr(mapped, "hash", hashes, raising=False)
    ids = [str(each) for each in np.random.default_rng(0).integers(50, size=200)] + ["y" * 5000]
    places = mapped.IdPlaces(ids)
    wanted = ["7", "x", *ids, "49", "+7"]
    assert places.of(wanted).tolist() == [ids.index(name) if name in ids else -1 for name in wanted]
    assert places.first.tolist() == [ids.index(name) for name in ids]
    entry, at = places.every(np.array([3, 200, 5]))
    loop = [(k, j) for k, i in enumerate((3, 200, 5)) for j in range(201) if ids[j] == ids[i]]
    assert list(zip(entry.tolist(), at.tolist(), strict=True)) == loop
    assert places.ids.nbytes == 201 * 8


def test_a_query_of_very_many_positives_does_not_widen_all_searches():
    rules = Rules.checked(3, (0, 100), None, "absolute", None, None, 0.0, "top", 0)
    counts = np.ones(1_000_000, np.int64)
    assert rules.width(counts, 10**7) == 111
    counts[5] = 50_000
    with pytest.warns(UserWarning, match=r"1 queries have more than 1000 positives \(up to 50000\)"):
        assert rules.width(counts, 10**7) == 1110


def test_lists_by_the_dot_product_are_refused(tmp_path):
    near = nearest_neighbors_on_disk(CORPUS[:50], 3, tmp_path / "dot", metric="dot")
    with pytest.raises(NearfarError, match="metric='cosine'"):
        mine_negatives_on_disk(QUERIES, MappedNeighbors(near.folder), tmp_path / "m.parquet", PAIRS)
