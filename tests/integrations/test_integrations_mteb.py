"""A run as a model of mteb: the real package evaluates it, and its predictions are compared query by query."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lazily import Lazily
from nearfar.errors import NearfarError
from nearfar.integrations.mteb import encoder
from nearfar.lab.rankings import Judged, RankingOptions, compare_rankings
from nearfar.metrics import score_ranking

mteb = Lazily("mteb")

WORDS = ("river", "stone", "cloud", "forest", "harbour", "candle", "ladder", "mirror")
CORPUS = {f"d{i}": f"{a} and {b}" for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS if a < b)}
QUERIES = {f"q{i}": f"a {word}" for i, word in enumerate(WORDS)}
QRELS = {
    q: {d: 1 for d, text in CORPUS.items() if word in text} for (q, word) in zip(QUERIES, WORDS, strict=True)
}


class Bags:
    """Stands for a trained run: bags of words, of which some count more."""

    name, members = "bags", (SimpleNamespace(model=torch.nn.Linear(2, 2)),)

    def __init__(self, noise: float = 0.0, views: tuple[str, ...] = ("text",)) -> None:
        self.noise, self.views, self.dim = noise, list(views), len(WORDS) + 1

    def kind(self, view: str) -> str:
        return "vector" if view == "price" else "text"

    def check(self, values, view):
        return [None if value.strip() else "empty text" for value in values]

    def vectors(self, values, view, *, batch_size=None):
        assert all(values)
        rows = np.array([[*(word in value for word in WORDS), 0.1] for value in values], np.float32)
        own = np.random.default_rng(len(values))
        rows += self.noise * own.standard_normal(rows.shape).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def task(name: str = "NearfarTest", corpus: dict[str, str] | None = None):
    """A retrieval task that is in memory."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class InMemory(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description="words",
            reference="https://example.org",
            dataset={"path": "none/none", "revision": "1"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=("2020-01-01", "2020-01-02"),
            domains=[],
            task_subtypes=[],
            license="mit",
            annotations_creators="derived",
            dialect=[],
            sample_creation="found",
            bibtex_citation="",
        )

        def load_data(self, **_):
            self.corpus = {"test": corpus or CORPUS}
            self.queries = {"test": QUERIES}
            self.relevant_docs = {"test": QRELS}
            self.convert_v1_dataset_format_to_v2(None)
            self.data_loaded = True

    return InMemory()


@pytest.mark.slow
def test_mteb_evaluates_a_run_and_its_predictions_are_compared(tmp_path: Path):
    results = {}
    for name, noise in (("good", 0.1), ("bad", 0.8)):
        model = encoder(Bags(noise))
        result = mteb.evaluate(
            model, task(), cache=None, prediction_folder=tmp_path / name, show_progress_bar=False
        )
        results[name] = result.task_results[0].scores["test"][0]
    files = [tmp_path / name / "NearfarTest_predictions.json" for name in ("bad", "good")]
    written = json.loads(files[1].read_text())
    assert written["mteb_model_meta"]["model_name"] == "nearfar/bags"
    ours = score_ranking(written["default"]["test"], QRELS, ["nDCG@10", "MAP@10", "recall@5", "MRR@10"])
    for name, theirs in (
        ("nDCG@10", "ndcg_at_10"),
        ("MAP@10", "map_at_10"),
        ("recall@5", "recall_at_5"),
        ("MRR@10", "mrr_at_10"),
    ):
        assert ours[name].mean() == pytest.approx(results["good"][theirs], abs=1e-4), name
    (tmp_path / "qrels.json").write_text(json.dumps(QRELS))
    options = RankingOptions(metrics=("nDCG@10", "MAP"), bootstrap=100)
    comparison = compare_rankings(files, Judged.read(tmp_path / "qrels.json", options), options)
    label = str(files[1])
    assert comparison.differences[label]["nDCG@10"].verdict == "better"


@pytest.mark.slow
def test_views_and_what_cannot_be_encoded():
    model = encoder(Bags(views=("text", "price")))
    assert (model.query_view, model.document_view) == ("text", "text")
    batches = [{"text": ["a river", ""]}, {"text": ["stone and cloud"]}]
    with pytest.warns(UserWarning, match="1 row rejected: empty text 1"):
        vectors = model.encode(batches, prompt_type="document")
    assert vectors.shape == (3, len(WORDS) + 1)
    assert not vectors[1].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[[0, 2]], axis=1), 1, rtol=1e-6)
    similar = model.similarity(vectors, vectors)
    torch.testing.assert_close(similar.diagonal(), model.similarity_pairwise(vectors, vectors))
    assert similar[0, 0] == pytest.approx(1)
    assert similar[1].abs().max() == 0
    with pytest.raises(NearfarError, match="no text"):
        model.encode([{"image": [1]}])
    with pytest.raises(NearfarError, match="query_view= and document_view="):
        encoder(Bags(views=("title", "text")))
    named = encoder(Bags(views=("title", "text")), "title", "text")
    assert (named.query_view, named.document_view) == ("title", "text")
    with pytest.raises(NearfarError, match="query_view is 'price'"):
        encoder(Bags(views=("text", "price")), "price")


def test_the_revision_is_that_of_the_weights():
    metas = []
    for seed in (0, 0, 1):
        bags = Bags()
        torch_model = torch.nn.Linear(2, 2)
        with torch.no_grad():
            torch_model.weight.copy_(torch.randn(2, 2, generator=torch.Generator().manual_seed(seed)))
            torch_model.bias.zero_()
        bags.members = (SimpleNamespace(model=torch_model),)
        metas.append(encoder(bags).mteb_model_meta)
    assert metas[0].revision == metas[1].revision != metas[2].revision
    assert metas[0].n_parameters == 6
    assert metas[0].modalities == ["text"]


@pytest.mark.slow
def test_a_trained_run(tmp_path: Path):
    import tiny_runs

    run = tiny_runs.train("pairs", tmp_path)
    model = encoder(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = mteb.evaluate(model, task(), cache=None, show_progress_bar=False)
    assert 0 <= result.task_results[0].scores["test"][0]["ndcg_at_10"] <= 1
    assert model.mteb_model_meta.name == f"nearfar/{run.name}"
