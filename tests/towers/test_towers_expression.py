"""The tower of expression: numbers and sentences, against their parts by themselves; wrong options and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nearfar.data.batch import Rows
from nearfar.errors import NearfarError
from nearfar.models.text import build_text_encoder
from nearfar.towers import build_tower, load_tower
from nearfar.towers.expression import ExpressionTower, gene_sentences

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(1.0, (40, 6)).astype(np.float32)
GENES = ["TP53", "ERBB2", "KRT8", "ACTB", "CD3E", "MUC1"]
WORDS = {"encoder": "ngram", "dims": 4, "min_df": 1}

pytestmark = pytest.mark.usefixtures("module_cache")


def sentence(row: np.ndarray, count: int) -> str:
    ranked = sorted(range(len(row)), key=lambda gene: (-row[gene], gene))[:count]
    return " ".join(GENES[gene] for gene in ranked if row[gene] > 0) or "none"


def rows(tower: ExpressionTower, values: Any) -> torch.Tensor:
    read = tower.read(values)
    assert isinstance(read, Rows)
    return read.values


def standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)


def test_numbers_are_standardised_by_the_training_rows() -> None:
    counts = COUNTS.copy()
    counts[:, 2] = 3.0
    tower = ExpressionTower(genes=GENES).fit(counts)
    read = rows(tower, counts)
    np.testing.assert_array_equal(read, counts)
    assert read.data_ptr() == counts.ctypes.data  # nothing is copied
    np.testing.assert_allclose(tower.build()(read), standardised(counts), atol=1e-5)
    np.testing.assert_allclose(tower.reference(counts), standardised(counts), atol=1e-5)
    other = tower.build()(rows(tower, counts[:1] + 1))
    np.testing.assert_allclose(
        other[0, 0], (counts[0, 0] + 1 - counts[:, 0].mean()) / counts[:, 0].std(), rtol=1e-5
    )
    plain = ExpressionTower(standardize=False).fit(counts.tolist())
    np.testing.assert_array_equal(plain.build()(rows(plain, counts.tolist())), counts)


def test_sentences_are_the_names_of_the_most_expressed_genes() -> None:
    counts = np.vstack([COUNTS, np.zeros((1, 6), np.float32)])
    wanted = [sentence(row, 3) for row in counts]
    assert gene_sentences(counts, GENES, 3) == wanted
    assert wanted[-1] == "none"
    assert gene_sentences(counts, GENES, 100) == [sentence(row, 100) for row in counts]
    tower = ExpressionTower("sentences", GENES, sentence_genes=3, text=WORDS).fit(counts)
    vectors = build_text_encoder("ngram", dims=4, min_df=1).fit(wanted).encode(wanted)
    np.testing.assert_allclose(rows(tower, counts), vectors, atol=1e-6)
    np.testing.assert_allclose(tower.build()(rows(tower, counts)), standardised(vectors), atol=1e-3)
    np.testing.assert_allclose(tower.reference(counts), vectors, atol=1e-6)
    assert "sentences of 3 gene names: TF-IDF" in tower.description


def test_sentences_may_be_read_by_a_network_that_is_trained() -> None:
    tower = ExpressionTower("sentences", GENES, 4, {"encoder": "words", "dims": 8}).fit(COUNTS)
    assert tower.train == "full"
    assert tower.reference(COUNTS) is None
    module = tower.build()
    out = module(tower.read(COUNTS).batch(torch.tensor([3, 1])))
    assert out.shape == (2, module.width)
    out.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize("encoder", ["numbers", "sentences"])
def test_saved_and_loaded(encoder: str, tmp_path: Path) -> None:
    names = tmp_path / "genes.txt"
    names.write_text("\ufeff" + "\n".join(GENES) + "\n\n", encoding="utf-8")
    tower = ExpressionTower(encoder, str(names), 3, WORDS if encoder == "sentences" else None).fit(COUNTS)
    assert tower.genes == GENES
    module = tower.build()
    tower.save(tmp_path / "tower")
    names.unlink()  # the names are saved with the tower
    loaded = load_tower(tmp_path / "tower")
    assert isinstance(loaded, ExpressionTower)
    assert (loaded.options, loaded.description) == (tower.options, tower.description)
    fresh = loaded.build()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh(rows(loaded, COUNTS[:5])), module(rows(tower, COUNTS[:5])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "sentence"}, "did you mean 'sentences'"),
        ({"encoder": "sentences"}, "needs genes"),
        ({"genes": ["a", "a"]}, "each once"),
        ({"genes": []}, "a name for each column"),
        ({"genes": "no/such/file.txt"}, "no such file"),
        ({"sentence_genes": 0}, "sentence_genes=0"),
        ({"sentence_genes": 2.5}, "sentence_genes=2.5"),
        ({"text": {"encoder": "ngram"}}, "text is for encoder=sentences"),
        ({"encoder": "sentences", "genes": GENES, "text": "minilm"}, "options of a text tower"),
        ({"encoder": "sentences", "genes": GENES, "text": {"encoder": "ngam"}}, "did you mean 'ngram'"),
        ({"standardize": 1}, "true or false"),
        ({"sentence_gene": 3}, "did you mean 'sentence_genes'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        build_tower("expression", **options)


def test_values_that_cannot_be_read() -> None:
    bad = COUNTS.copy()
    bad[3, 2] = np.inf
    tower = ExpressionTower(genes=GENES)
    assert [i for i, reason in enumerate(tower.check(bad)) if reason] == [3]
    assert tower.check([[1.0, 2.0], [1.0], [2.0, 3.0], ["x", "y"]]) == [
        None, "not 2 numbers", None, "no number",
    ]  # fmt: skip
    with pytest.raises(NearfarError, match="5 numbers of each item for 6 genes"):
        tower.fit(COUNTS[:, :5])
    with pytest.raises(NearfarError, match="not fitted"):
        ExpressionTower().build()
