"""Mining against loops over queries and candidates: exclusions, ranks, margins, guides, several positives, tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.mining import (
    measure_false_negatives,
    mine_negatives,
    mined_table,
    nearest_documents,
    read_marked,
    sample_to_mark,
)

N, M, D = 14, 40, 6


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


QUERIES, CORPUS = draw(N, D), draw(M, D, seed=1)
POSITIVES = [[i] if i % 3 else [i, i + 15, i + 20] for i in range(N)]
QUERY_TEXTS = [f"query {i}" for i in range(N)]
CORPUS_TEXTS = [f"document {j % 35}" for j in range(M)]  # the last five are copies of the first
CORPUS_TEXTS[30] = "query  4"  # a query's own text, with a space more


def loop(
    per_query: int,
    ranks: tuple[int, int],
    margin: float | None,
    relative: bool,
    scores: np.ndarray,
    own_texts: bool = False,
    guide: np.ndarray | None = None,
    limits: tuple[float, float] = (-9.0, 9.0),
) -> list[list[int]]:
    """The negatives of each query, one candidate after the other."""
    mined = []
    for i in range(N):
        weakest = min(scores[i, j] for j in POSITIVES[i])
        threshold = math.inf
        if margin is not None:
            threshold = weakest - margin * (abs(weakest) if relative else 1.0)
        order = sorted(range(M), key=lambda j: -cosine(QUERIES[i], CORPUS[j]))
        answers = {CORPUS_TEXTS[j] for j in POSITIVES[i]} | {QUERY_TEXTS[i]}
        candidates = [
            j
            for j in order
            if j not in POSITIVES[i] and not (own_texts and " ".join(CORPUS_TEXTS[j].split()) in answers)
        ]
        kept = [j for j in candidates[ranks[0] : ranks[1]] if scores[i, j] <= threshold]
        kept = [j for j in kept if limits[0] <= scores[i, j] <= limits[1]]
        if guide is not None:
            kept = [j for j in kept if guide[i, j] < min(guide[i, p] for p in POSITIVES[i]) - 0.1]
        mined.append(sorted(kept, key=lambda j: -scores[i, j])[:per_query])
    return mined


COSINES = np.array([[cosine(q, c) for c in CORPUS] for q in QUERIES])


def listed(mined) -> list[list[int]]:
    return [[j for j in row if j >= 0] for row in mined.negatives.tolist()]


@pytest.mark.parametrize("per_query", [1, 4])
@pytest.mark.parametrize("ranks", [(0, 30), (3, 12)])
@pytest.mark.parametrize(
    ("margin", "kind"), [(None, "absolute"), (0.0, "absolute"), (0.2, "absolute"), (0.3, "relative")]
)
@pytest.mark.parametrize("texts", [False, True])
def test_equals_the_loop(per_query, ranks, margin, kind, texts):
    given = {"query_texts": QUERY_TEXTS, "corpus_texts": CORPUS_TEXTS} if texts else {}
    mined = mine_negatives(
        QUERIES,
        CORPUS,
        POSITIVES,
        per_query=per_query,
        rank_range=ranks,
        margin=margin,
        margin_kind=kind,
        **given,
    )
    expected = loop(per_query, ranks, margin, kind == "relative", COSINES, texts)
    assert listed(mined) == expected
    for i, row in enumerate(expected):
        assert mined.scores[i, : len(row)] == pytest.approx([COSINES[i, j] for j in row], rel=1e-5)
        assert np.isnan(mined.scores[i, len(row) :]).all()
        assert mined.positive_score[i] == pytest.approx(min(COSINES[i, j] for j in POSITIVES[i]), rel=1e-5)
    assert mined.left_out["positive"] == sum(map(len, POSITIVES)) - _beyond(ranks)
    assert mined.counts.tolist() == [len(row) for row in expected]


def _beyond(ranks: tuple[int, int]) -> int:
    """Positives that are not even among the candidates that were looked at."""
    k = min(M, ranks[1] + 3 + 10)
    order = np.argsort(-COSINES, axis=1)[:, :k]
    return sum(j not in order[i] for i in range(N) for j in POSITIVES[i])


def test_a_relative_margin_lies_below_a_negative_score():
    queries = np.array([[1.0, 0.0]])
    corpus = np.array(
        [[-0.5, 0.866], [-0.52, 0.854], [-0.9, 0.436]]
    )  # positive at -.5, the others at -.52 and -.9
    mined = mine_negatives(queries, corpus, [0], per_query=1, margin=0.2, margin_kind="relative")
    assert mined.negatives.tolist() == [[2]]


def test_a_guide_and_scores_of_another_model():
    u, v = draw(N, 3, seed=4), draw(M, 3, seed=5)
    guide = np.array([[cosine(x, y) for y in v] for x in u])
    mined = mine_negatives(
        QUERIES, CORPUS, POSITIVES, per_query=5, rank_range=(0, 25), guide=(u, v), guide_margin=0.1
    )
    assert listed(mined) == loop(5, (0, 25), None, False, COSINES, guide=guide)
    assert mined.left_out["guide"] > 0
    scores = draw(N, M, seed=6)
    asked = []

    def rescore(query: np.ndarray, document: np.ndarray) -> np.ndarray:
        asked.append(len(query))
        return scores[query, document]

    mined = mine_negatives(
        QUERIES,
        CORPUS,
        POSITIVES,
        per_query=5,
        rank_range=(2, 25),
        margin=0.1,
        max_score=0.5,
        min_score=-1,
        rescore=rescore,
    )
    assert listed(mined) == loop(5, (2, 25), 0.1, False, scores, limits=(-1, 0.5))
    assert asked[0] == N * 23  # those of the range alone


def test_random_ones_are_of_those_that_pass():
    many = mine_negatives(QUERIES, CORPUS, POSITIVES, per_query=12, rank_range=(0, 12))
    some = mine_negatives(
        QUERIES, CORPUS, POSITIVES, per_query=4, rank_range=(0, 12), strategy="random", seed=3
    )
    again = mine_negatives(
        QUERIES, CORPUS, POSITIVES, per_query=4, rank_range=(0, 12), strategy="random", seed=3
    )
    assert (some.negatives == again.negatives).all()
    for row, of, values in zip(listed(some), listed(many), some.scores, strict=True):
        assert len(row) == 4
        assert set(row) <= set(of)
        assert (np.diff(values) <= 0).all()
    assert listed(some) != [row[:4] for row in listed(many)]


def test_queries_without_a_positive_and_small_corpora():
    mined = mine_negatives(QUERIES[:2], CORPUS[:3], [[], [1]], per_query=3, margin=0.0)
    assert mined.positive.tolist() == [-1, 1]
    assert np.isnan(mined.positive_score[0])
    assert mined.counts[0] == 3
    assert mined.counts[1] <= 2
    one = mine_negatives(QUERIES[:1], CORPUS[:1], [0], per_query=2, rank_range=(0, 2))
    assert one.negatives.tolist() == [[-1, -1]]
    assert "of them none" in " ".join(one.summary())
    with pytest.raises(NearfarError, match="no query has as many"):
        mined_table(one, ["a"], ["b"])


@pytest.mark.slow
def test_an_index_states_the_recall_that_it_has(monkeypatch):
    from nearfar.mining import candidates

    monkeypatch.setattr(candidates, "_PAIRS", 1000)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, 16))
    corpus = (centres[rng.integers(60, size=6000)] + 0.3 * rng.normal(size=(6000, 16))).astype(np.float32)
    queries = (centres[rng.integers(60, size=2500)] + 0.3 * rng.normal(size=(2500, 16))).astype(np.float32)
    corpus, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (corpus, queries))
    found = nearest_documents(queries, corpus, 10, 0.9)
    exact = nearest_documents(queries, corpus, 10, 1.0)
    assert exact.exact
    same = np.mean([np.isin(a, b).mean() for a, b in zip(found.indices, exact.indices, strict=True)])
    assert same >= 0.88
    if not found.exact:
        assert abs(found.recall - same) < 0.02
        assert "probes" in found.index


def test_tables():
    mined = mine_negatives(QUERIES, CORPUS, POSITIVES, per_query=2)
    documents = [f"d{j}" for j in range(M)]
    rows = [(i, j) for i in range(N) for j in POSITIVES[i]]
    table = mined_table(mined, QUERY_TEXTS, documents, scores=True)
    assert list(table) == ["anchor", "positive", "negative_1", "negative_2", "margin_1", "margin_2"]
    assert table["anchor"] == [QUERY_TEXTS[i] for i, _ in rows]
    assert table["positive"] == [documents[j] for _, j in rows]
    assert table["negative_2"] == [documents[mined.negatives[i, 1]] for i, _ in rows]
    wanted = [COSINES[i, j] - COSINES[i, mined.negatives[i, 0]] for i, j in rows]
    assert table["margin_1"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    triplets = mined_table(mined, QUERY_TEXTS, documents, "triplet", names=("question", "answer"))
    assert list(triplets) == ["question", "answer", "negative"]
    assert len(triplets["negative"]) == 2 * len(rows)
    pairs = mined_table(mined, QUERY_TEXTS, documents, "labeled-pair", scores=True)
    assert sum(pairs["label"]) == len(rows)
    assert len(pairs["label"]) == len(rows) + 2 * N
    lists = mined_table(mined, QUERY_TEXTS, documents, "labeled-list")
    assert lists["label"][0] == [1, 1, 1, 0, 0]
    assert lists["document"][1] == [documents[1], *(documents[j] for j in listed(mined)[1])]


def test_the_share_of_false_negatives():
    mined = mine_negatives(QUERIES, CORPUS, POSITIVES, per_query=4)
    query_labels, labels = [i % 3 for i in range(N)], [j % 3 if j != 7 else None for j in range(M)]
    u, v = draw(N, 3, seed=4), draw(M, 3, seed=5)
    guide = np.array([[cosine(x, y) for y in v] for x in u])
    by_label, by_text, by_guide = measure_false_negatives(
        mined, labels=(query_labels, labels), texts=(QUERY_TEXTS, CORPUS_TEXTS), guide=(u, v)
    )
    drawn = [(i, j) for i, row in enumerate(listed(mined)) for j in row]
    known = [(i, j) for i, j in drawn if labels[j] is not None]
    assert (by_label.value, by_label.n) == (
        pytest.approx(np.mean([query_labels[i] == labels[j] for i, j in known])),
        len(known),
    )
    copies = [
        CORPUS_TEXTS[j] in {CORPUS_TEXTS[p] for p in POSITIVES[i]}
        or CORPUS_TEXTS[j].split() == QUERY_TEXTS[i].split()
        for i, j in drawn
    ]
    assert by_text.value == pytest.approx(np.mean(copies))
    likely = [guide[i, j] >= min(guide[i, p] for p in POSITIVES[i]) for i, j in drawn]
    assert by_guide.value == pytest.approx(np.mean(likely))
    assert by_label.low <= by_label.value <= by_label.high
    without = mine_negatives(
        QUERIES, CORPUS, POSITIVES, per_query=4, query_texts=QUERY_TEXTS, corpus_texts=CORPUS_TEXTS
    )
    assert measure_false_negatives(without, texts=(QUERY_TEXTS, CORPUS_TEXTS))[0].value == 0


def test_a_sample_is_marked_by_hand():
    mined = mine_negatives(QUERIES, CORPUS, POSITIVES, per_query=4)
    table = sample_to_mark(mined, QUERY_TEXTS, CORPUS_TEXTS, rows=10)
    assert [len(column) for column in table.values()] == [10] * 5
    table["false_negative"][:4] = ["1", "no", 0.0, "yes"]
    share = read_marked(table)
    assert (share.value, share.n) == (0.5, 4)
    with pytest.raises(NearfarError, match="no row of the sample is marked"):
        read_marked({"false_negative": [""]})
    with pytest.raises(NearfarError, match="row 1"):
        read_marked({"false_negative": ["perhaps"]})
    with pytest.raises(NearfarError, match="no column"):
        read_marked({})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corpus": draw(M, 5)}, "same dimensions"),
        ({"queries": np.full((N, D), np.nan)}, "not finite"),
        ({"positives": [[99]] * N}, "name document 99"),
        ({"positives": [0]}, "of 1 queries"),
        ({"positives": None}, "without positives"),
        ({"rank_range": (5, 6)}, "has 1 ranks"),
        ({"rank_range": 5}, "rank_range"),
        ({"query_texts": QUERY_TEXTS}, "give both"),
        ({"query_texts": ["a"], "corpus_texts": CORPUS_TEXTS}, "one for each"),
        ({"rescore": lambda q, d: [1.0]}, "one number for each pair"),
        ({"rescore": lambda q, d: np.full(len(q), np.inf)}, "infinite"),
        ({"rescore": lambda q, d: np.full(len(q), np.nan)}, "positives .first: query 0 with document 0"),
        ({"guide": (draw(N, 3), draw(M, 4))}, "are needed"),
        ({"guide": draw(N, 3)}, "pair"),
        ({"strategy": "best"}, "strategy"),
        ({"margin": "much"}, "margin"),
    ],
)
def test_wrong_input(arguments, message):
    given = {"queries": QUERIES, "corpus": CORPUS, "positives": POSITIVES} | arguments
    with pytest.raises(NearfarError, match=message):
        mine_negatives(**given)


class Stub:
    """What sentence-transformers' miner asks of a model, from vectors by text."""

    device = "cpu"

    class model_card_data:
        base_model = ""

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self.vectors = vectors

    def encode_document(self, texts, **_):
        return np.stack([self.vectors[text] for text in texts]).astype(np.float32)

    encode_query = encode_document

    def get_embedding_dimension(self):
        return D

    def similarity(self, a, b):
        a, b = (torch.nn.functional.normalize(torch.as_tensor(x), dim=1) for x in (a, b))
        return a @ b.T

    def similarity_pairwise(self, a, b):
        return torch.nn.functional.cosine_similarity(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"absolute_margin": 0.1}, {"margin": 0.1}),
        ({"relative_margin": 0.2}, {"margin": 0.2, "margin_kind": "relative"}),
        ({"max_score": 0.3, "min_score": -0.2}, {"max_score": 0.3, "min_score": -0.2}),
        ({"range_min": 4}, {"rank_range": (4, 20)}),
    ],
)
def test_as_sentence_transformers_mines(theirs, ours):
    pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.util import mine_hard_negatives

    answers, rest = [f"answer {i}" for i in range(N)], [f"document {j}" for j in range(M - N)]
    vectors = dict(zip(QUERY_TEXTS, QUERIES, strict=True)) | dict(zip([*answers, *rest], CORPUS, strict=True))
    given = datasets.Dataset.from_dict({"anchor": QUERY_TEXTS, "positive": answers})
    options = {
        "range_min": 0,
        "range_max": 20,
        "num_negatives": 3,
        "output_format": "triplet",
        "verbose": False,
    } | theirs
    table = mine_hard_negatives(given, Stub(vectors), corpus=[*answers, *rest], **options)
    mined = mine_negatives(QUERIES, CORPUS, list(range(N)), per_query=3, **({"rank_range": (0, 20)} | ours))
    found = mined_table(mined, QUERY_TEXTS, [*answers, *rest], "triplet")
    wanted = set(zip(table["anchor"], table["positive"], table["negative"], strict=True))
    assert set(zip(found["anchor"], found["positive"], found["negative"], strict=True)) == wanted
